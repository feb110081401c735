"""Forward models by name, each with a sound bound on its norm: blur, downsample, inpaint, mri, tomography, and a user's own.

The physics are deepinv's; what is added here is what a certificate needs of them: the norm from above (deepinv's own is a power
method, from below), the exact adjoint, and the proximal map only where it has a closed form. Pictures are (B, *image_shape), data
(B, *data_shape). deepinv is imported where it is used, so that the package works without it.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import Shape
from nonexpansive.math.rounding import UNIT, up
from nonexpansive.restore.physics import blur, check, kernel
from nonexpansive.restore.steps import DataTerm

Map = Callable[[Tensor], Tensor]
SEED = 0x5EED
"""Of the random vectors on which an operator is tried."""

MOST_BYTES = 16 * 2**30
"""What is stored for tomography, at most: a number of angles mistyped must not bring the machine down."""


class Operator:
    """A linear map A from pictures (B, *image_shape) to data (B, *data_shape), with ‖A‖ ≤ ``norm``.

    - ``A``: the map, on batches, in the type ``dtype``. ``adjoint``: Aᵀ; None takes it from A by ``torch.func.vjp``, which is exact
      and costs one more evaluation of A.
    - ``norm``: an upper bound on ‖A‖, which you must be able to prove: it enters the certificate. ``derivation`` says how it is proved.
    - ``prox``: (z, y, τ) ↦ argmin_x ½‖Ax - y‖² + ‖x - z‖²/(2τ), exact; without it the methods that need one are refused.
    - ``start``: a picture to begin from, given the data; AᵀY/norm² unless given. ``measured``: a mask of the data's entries that are
      measurements, if not all are: noise is added to those only. ``signed``: whether data of pictures are of both signs, so that they
      cannot be counts of photons.

    Once built, A is tried on random vectors: that it is linear and takes each sample of a batch by itself, that ``adjoint`` is its
    adjoint, that ``prox`` solves its equation, and that a few power iterations do not exceed ``norm``. That refutes mistakes; it proves
    nothing, so the certificate names A, its adjoint and its norm among its assumptions. Raises BadInput for what was refuted.
    """

    def __init__(
        self,
        A: Map,
        image_shape: Shape,
        data_shape: Shape,
        norm: float,
        adjoint: Map | None = None,
        *,
        prox: Callable[[Tensor, Tensor, float], Tensor] | None = None,
        start: Map | None = None,
        measured: Tensor | None = None,
        signed: bool = False,
        dtype: torch.dtype = torch.float32,
        name: str = "operator",
        derivation: str = "stated, not derived",
    ) -> None:
        self.image_shape, self.data_shape = _shape("image", image_shape), _shape("data", data_shape)
        if not isinstance(norm, (int, float)) or not 0 <= norm < math.inf:
            raise BadInput(f"{name}: norm is a finite number from 0 that bounds ‖A‖ from above, not {norm!r}")
        self.norm, self.name, self.derivation, self.measured, self.dtype = (
            float(norm),
            name,
            derivation,
            measured,
            dtype,
        )
        self.signed = signed
        self._map, self._adjoint, self._prox, self._start = A, adjoint or self._transpose, prox, start
        self._try()

    @property
    def lipschitz(self) -> float:
        """norm², rounded up: bounds the Lipschitz constant of the gradient Aᵀ(Ax - y) of ½‖Ax - y‖²."""
        return up(self.norm * self.norm)

    def A(self, x: Tensor) -> Tensor:
        """Ax: (B, *image_shape) to (B, *data_shape)."""
        check(x, self.image_shape, "a picture")
        return self._map(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Aᵀy: (B, *data_shape) to (B, *image_shape)."""
        check(y, self.data_shape, "data")
        return self._adjoint(y)

    def prox(self, z: Tensor, y: Tensor, tau: float) -> Tensor:
        """argmin_x ½‖Ax - y‖² + ‖x - z‖²/(2τ), in closed form; raises Refused where there is none."""
        if self._prox is None:
            raise Refused(
                f"{self.name}: the proximal map of its data term has no closed form, and a truncated solver would be outside the "
                "certificate: use a method that takes gradients, such as forward-backward"
            )
        if not 0 < tau < math.inf:
            raise BadInput(f"the step τ must be a positive, finite number, got {tau}")
        check(z, self.image_shape, "a picture")
        check(y, self.data_shape, "data")
        return self._prox(z, y, tau)

    def start(self, y: Tensor) -> Tensor:
        """A picture to begin from."""
        check(y, self.data_shape, "data")
        if self._start is not None:
            return self._start(y)
        return self.A_adjoint(y) / max(self.lipschitz, torch.finfo(y.dtype).tiny)

    def __repr__(self) -> str:
        shapes = " → ".join("×".join(map(str, shape)) for shape in (self.image_shape, self.data_shape))
        return f"Operator({self.name}: {shapes}, ‖A‖ ≤ {self.norm:.7g}: {self.derivation})"

    def _transpose(self, y: Tensor) -> Tensor:
        return torch.func.vjp(self._map, y.new_zeros(len(y), *self.image_shape))[1](y)[0]

    @torch.no_grad()
    def _try(self) -> None:
        """Raises BadInput for what random vectors refute."""
        generator, near = torch.Generator().manual_seed(SEED), 200 * torch.finfo(self.dtype).eps

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        def wrong(what: str) -> BadInput:
            return BadInput(f"{self.name}: {what}")

        x = normal(3, *self.image_shape)
        x[2] = 3 * x[0] - 0.5 * x[1]
        try:
            ax = self._map(x)
            alone = self._map(x[:1])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise wrong(f"A fails on pictures of shape {tuple(x.shape)} in {self.dtype}: {error}") from error
        if tuple(ax.shape) != (3, *self.data_shape):
            raise wrong(
                f"A gives {tuple(ax.shape)} for pictures {tuple(x.shape)}, but data (B, *{self.data_shape}) are stated"
            )
        if ax.dtype != self.dtype or not bool(torch.isfinite(ax).all()):
            raise wrong(f"A gives {ax.dtype} data, or infinite ones, for pictures of {self.dtype}")
        size = float(ax.norm())
        if float((alone - ax[:1]).norm()) > near * size:
            raise wrong("A treats a picture differently alone than in a batch")
        if float((ax[2] - 3 * ax[0] + 0.5 * ax[1]).norm()) > near * 4 * size:
            raise wrong("A is not linear: A(3u - v/2) is not 3Au - Av/2. An affine or nonlinear map has no norm")
        try:
            for y in (alone, normal(1, *self.data_shape)):
                back = self._adjoint(y)
                if tuple(back.shape) != (1, *self.image_shape):
                    raise wrong(f"adjoint gives {tuple(back.shape)}, not pictures (B, *{self.image_shape})")
                gap = abs(float((alone * y).sum() - (x[:1] * back).sum()))
                if not gap <= near * float(alone.norm() * y.norm() + x[:1].norm() * back.norm()):
                    raise wrong(
                        "adjoint is not the adjoint of A: ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ. Leave it out, and it is derived from A"
                    )
        except RuntimeError as error:
            raise wrong(f"its adjoint fails ({error}): if torch cannot differentiate A, give adjoint") from error
        v = x[:1]
        for _ in range(6):
            v = v / v.norm().clamp_min(torch.finfo(self.dtype).tiny)
            av = self._map(v)
            if float(av.norm()) > self.norm * (1 + near):
                raise wrong(f"the norm {self.norm:.7g} is no bound: ‖Av‖ = {float(av.norm()):.7g} for a unit vector v")
            v = self._adjoint(av)
        if self._prox is not None:
            tau = 0.7 / max(self.lipschitz, 1e-6)
            y, z = normal(1, *self.data_shape), x[:1]
            p = self._prox(z, y, tau)
            slope = tau * self._adjoint(self._map(p) - y) + p - z
            if not float(slope.norm()) <= near * float(z.norm() + tau * self.norm * y.norm()):
                raise wrong("prox does not solve τAᵀ(Ax - y) + x - z = 0")


def _shape(what: str, shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    if not shape or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise BadInput(f"the {what} shape is that of one sample, whole numbers from 1, not {shape}")
    return shape


# ---- norms from above


def nonnegative_norm(
    A: Map, adjoint: Map, image_shape: Shape, data_shape: Shape, *, error: float = 0.0, steps: int = 30
) -> float:
    """An upper bound on ‖A‖ for an A without negative entries, from its values on float64 vectors.

    For such an A and *any* p > 0, ‖A‖² = ρ(AᵀA) ≤ max_i (AᵀAp)_i/p_i (Collatz & Wielandt; p = 1 gives Schur's test). So each step of
    a power method on p, begun at 1, gives a bound, and the least is taken; it is tight where p gets near the Perron vector, less for
    the 0.001 that keeps p away from zero. ``error`` bounds what A and adjoint together err in an entry of AᵀAp for 0 < p ≤ 1. Sums of
    m products without cancellation, which err by γ_m relative to their value, need none: that is added for sums of all entries.
    """
    p = torch.ones(1, *image_shape, dtype=torch.float64)
    best = math.inf
    for _ in range(steps):
        q = adjoint(A(p))
        if not bool((q >= -error).all()):
            raise AssertionError("a map that was said to have no negative entries has some")
        before, best = best, min(best, float(((q + error) / p).max()))
        if not best < before * (1 - 1e-4):
            break
        p = (q.clamp_min(0) / q.max() + 1e-3) / (1 + 2e-3)
    terms = math.prod(image_shape) + math.prod(data_shape) + 64
    return up(math.sqrt(best) * (1 + 2 * terms * UNIT[torch.float64]))


def _aliased_norm(k: Tensor, size: tuple[int, int], factor: int) -> float:
    """‖SC‖ for C circular with kernel k on a grid of ``size``, S keeping every factor-th row and column: SCCᵀSᵀ is circular on the
    coarse grid, with the mean of |k̂|² over the factor² aliases of a frequency as its symbol. S = I where the sides are no multiples,
    which bounds the rest. The error of the FFT, at most 32 log₂(n) u √n ‖k‖ in any value (sides that are primes included), is added.
    """
    from deepinv.physics.functional import filter_fft

    k = k.double()
    power = filter_fft(k[None, None], (1, *size), real_fft=False, dims=(-2, -1))[0, 0].abs().square()
    if not any(n % factor for n in size):
        power = power.reshape(factor, size[0] // factor, factor, size[1] // factor).mean((0, 2))
    n = size[0] * size[1]
    error = 32 * math.log2(n + 1) * UNIT[torch.float64] * math.sqrt(n) * float(k.norm())
    return up(math.sqrt(float(power.max())) * (1 + 1e-14) + error)


# ---- the models

FILTERS = ("bicubic", "bilinear", "sinc")
"""deepinv's filters for down-sampling, made for the factor."""


def _blur(
    image_shape: tuple[int, int, int],
    *,
    kernel: str | Tensor,
    boundary: str = "circular",
    dtype: torch.dtype = torch.float32,
) -> DataTerm:
    """y = k ∗ x. ``kernel``: as for :func:`nonexpansive.restore.physics.kernel`, or a matrix.

    ``boundary``: "circular" and "valid", ‖A‖ ≤ ‖k‖₁, exact if circular (see :func:`nonexpansive.restore.physics.blur`); "reflect" and
    "replicate", which continue the picture by itself: A has no negative entries, so ‖A‖ is bounded by Collatz & Wielandt's ratio.
    """
    k = _kernel(kernel, dtype)
    if boundary in ("circular", "valid"):
        return blur(k, image_shape, boundary)  # pyright: ignore[reportArgumentType]
    return _filtered(image_shape, k, 1, boundary, f"blur ({boundary})")


def _downsample(
    image_shape: tuple[int, int, int],
    *,
    factor: int = 2,
    kernel: str | Tensor = "bicubic",
    boundary: str = "circular",
    dtype: torch.dtype = torch.float32,
) -> DataTerm:
    """y = S(k ∗ x), S keeping every ``factor``-th row and column, from the first. ``kernel``: "bicubic", "bilinear" or "sinc", made for
    the factor, or as for a blur; its entries may be negative.

    ``boundary`` "circular": the norm is exact, from the aliased symbol, if both sides are multiples of the factor, else the smaller of
    max|k̂| and the following; "reflect", "replicate", "valid": ‖A‖ ≤ ‖|A|‖, that of the kernel |k|, bounded by Collatz & Wielandt's
    ratio. The proximal map has a closed form (Zhao et al., IEEE TIP 2016) in the first case only.
    """
    from deepinv.physics.functional import bicubic_filter, bilinear_filter, sinc_filter

    if not isinstance(factor, int) or not 1 <= factor <= min(image_shape[1:]):
        raise BadInput(f"factor is a whole number from 1 to the picture's smaller side, not {factor!r}")
    if isinstance(kernel, str) and kernel in FILTERS:
        made = {"bicubic": bicubic_filter, "bilinear": bilinear_filter}
        filter = made[kernel](factor) if kernel in made else sinc_filter(factor, length=4 * factor)
        k = filter[0, 0].to(dtype)
    else:
        k = _kernel(kernel, dtype)
    return _filtered(image_shape, k, factor, boundary, f"down-sampling by {factor} ({boundary})")


def _kernel(given: str | Tensor, dtype: torch.dtype) -> Tensor:
    k = kernel(given) if isinstance(given, str) else given
    if k.ndim != 2 or not bool(torch.isfinite(k).all()) or not bool((k != 0).any()):
        raise BadInput(f"a kernel is a finite matrix (h, w), not zero everywhere; got shape {tuple(k.shape)}")
    return k.to(dtype)


def _filtered(image_shape: tuple[int, int, int], k: Tensor, factor: int, boundary: str, name: str) -> Operator:
    """S(k ∗ ·) with any of deepinv's boundaries."""
    from deepinv.physics import Downsampling

    boundaries = ("circular", "reflect", "replicate", "valid")
    if boundary not in boundaries:
        raise BadInput(f"the boundary must be one of {', '.join(boundaries)}, not {boundary!r}")
    channels, *size = image_shape
    rows, columns = size
    height, width = k.shape
    if boundary != "valid":  # deepinv's adjoints need kernels of three pixels: zeros about it change nothing
        around = {1: (1, 1), 2: (0, 1)}
        h, w = (around.get(side, (0, 0)) for side in k.shape)
        k = torch.nn.functional.pad(k, (*w, *h))
    if k.shape[0] > rows or k.shape[1] > columns:
        raise BadInput(
            f"the kernel ({height} x {width}) is larger than the picture ({rows} x {columns}), or that has fewer than 3 pixels a side: "
            "take a smaller kernel or a larger picture"
        )

    seen = [n - (side - 1 if boundary == "valid" else 0) for n, side in zip(size, k.shape, strict=True)]
    data_shape = (channels, *(-(-n // factor) for n in seen))
    divisible = boundary == "circular" and not any(n % factor for n in size)
    norms = {}
    if boundary == "circular":
        norms["of the aliased symbol" if divisible else "of the symbol"] = _aliased_norm(k, (rows, columns), factor)
    if not divisible:
        norms["of Collatz & Wielandt's ratio"] = _absolute_norm(
            k, (rows, columns), (seen[0], seen[1]), factor, boundary
        )
    best = min(norms, key=lambda key: norms[key])
    physics: Any = Downsampling(image_shape, filter=k[None, None], factor=factor, padding=boundary)
    return Operator(
        physics.A,
        image_shape,
        data_shape,
        norms[best],
        physics.A_adjoint,
        prox=(lambda z, y, tau: physics.prox_l2(z, y, gamma=tau)) if divisible else None,
        start=lambda y: _enlarged(y, (rows, columns), (seen[0], seen[1])),
        dtype=k.dtype,
        name=name,
        derivation=f"the maximum {best}",
    )


def _absolute_norm(k: Tensor, size: tuple[int, int], seen: tuple[int, int], factor: int, boundary: str) -> float:
    """‖S(|k| ∗ ·)‖ from above, by the maximal ratio for the FFT of the whole. Two convolutions of p ≤ 1 and the fold of the boundary, in
    which a pixel stands for no more than four times all pixels of the frame, err by less than 800 log₂(n) n u ‖k‖₁² on n pixels: the FFT's
    relative error is at most 32 log₂(n) u in ℓ2 (primes included), in each of three of them, and ‖p‖ ≤ √n.
    """
    from deepinv.physics.functional import conv2d_fft, conv_transpose2d_fft

    k = k.double().abs()[None, None]

    def forward(x: Tensor) -> Tensor:
        return conv2d_fft(x, k, padding=boundary)[..., ::factor, ::factor]

    def adjoint(y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), 1, *seen)
        x[..., ::factor, ::factor] = y
        return conv_transpose2d_fft(x, k, padding=boundary)

    n = (size[0] + k.shape[-2]) * (size[1] + k.shape[-1])
    error = 800 * math.log2(n) * n * UNIT[torch.float64] * float(k.sum()) ** 2
    return nonnegative_norm(forward, adjoint, (1, *size), (1, *(-(-m // factor) for m in seen)), error=error)


def _enlarged(y: Tensor, size: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """y stretched over what is seen, and continued by its border beyond that."""
    if tuple(y.shape[-2:]) != seen:
        y = torch.nn.functional.interpolate(y, size=seen, mode="bilinear", align_corners=False)
    (top, bottom), (left, right) = (
        (total - n - (total - n) // 2, (total - n) // 2) for total, n in zip(size, seen, strict=True)
    )
    return torch.nn.functional.pad(y, (left, right, top, bottom), mode="replicate")


def _inpaint(
    image_shape: tuple[int, int, int],
    *,
    keep: float | None = None,
    seed: int = 0,
    mask: str | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> DataTerm:
    """y = m·x, entry by entry: ‖A‖ = max|m|, exactly. ``keep``: the share of pixels kept (a half unless given), all channels of a pixel
    alike, drawn from ``seed``; or ``mask``: (H, W) or (C, H, W), or a file of it, .npy or .png, white where a pixel is known."""
    from deepinv.physics import Inpainting

    shape: Any = image_shape
    if keep is not None and mask is not None:
        raise BadInput("give either the share of pixels to keep or a mask, not both")
    if mask is None:
        keep = 0.5 if keep is None else keep
        if not 0 < keep < 1:
            raise BadInput(f"keep is the share of pixels that are known, strictly between 0 and 1, not {keep}")
        physics: Any = Inpainting(shape, mask=float(keep), rng=torch.Generator().manual_seed(seed))
        m = physics.mask[0]
    else:
        m = _mask(mask, image_shape)
    m = m.expand(image_shape).to(dtype).contiguous()
    physics = Inpainting(shape, mask=m)
    norm = float(m.abs().max())
    if not norm:
        raise BadInput("the mask is zero everywhere: nothing of the picture is known")
    known = (m != 0).to(dtype)

    def start(y: Tensor) -> Tensor:
        """What is known, and its mean in each channel where nothing is."""
        x = known * y / torch.where(m != 0, m, 1)
        mean = x.sum((-2, -1), keepdim=True) / known.sum((-2, -1), keepdim=True).clamp_min(1)
        return x + (1 - known) * mean

    return Operator(
        physics.A,
        image_shape,
        image_shape,
        norm,
        physics.A_adjoint,
        prox=lambda z, y, tau: physics.prox_l2(z, y, gamma=tau),
        start=start,
        measured=known,
        dtype=dtype,
        name="inpainting",
        derivation="the largest entry of the mask",
    )


def _mri(
    image_shape: tuple[int, int, int],
    *,
    acceleration: float = 4,
    centre: float = 0.08,
    seed: int = 0,
    mask: str | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> DataTerm:
    """y = m·Fx, single-coil Cartesian: F the centred, orthonormal Fourier transform. Data (2, H, W), real and imaginary part.

    ``image_shape``: (2, H, W), a complex picture, or (1, H, W), a real one, x ↦ m·F(x + 0i): then Aᵀ is the *real part* of F⁻¹(m·y),
    the adjoint of A between the real spaces ℝⁿ and ℝ²ⁿ. ``mask``: (H, W), or a file of it, the centre of frequencies in its middle; or
    drawn from ``seed`` (deepinv's Gaussian masks): whole columns, 1/``acceleration`` of them, among these the share ``centre`` of all
    columns in the middle, the others more often near it.

    ‖A‖ = max|m|, and for real pictures √max(m(ω)² + m(-ω)²)/2, exactly: Re F⁻¹m²F is then circular with that symbol, as F(x) at -ω is
    the conjugate of F(x) at ω. The proximal map divides by the symbol.
    """
    from deepinv.physics import MRI
    from deepinv.physics.generator import GaussianMaskGenerator

    if image_shape[0] not in (1, 2):
        raise BadInput(f"mri takes real pictures (1, H, W) or complex ones (2, H, W), not {image_shape}")
    rows, columns = image_shape[1:]
    if mask is None:
        if not 1 <= acceleration <= columns or not 0 <= centre <= 1:
            raise BadInput(
                f"mri: acceleration lies between 1 and the number of columns ({columns}) and centre, the share of columns always measured, "
                f"between 0 and 1; got {acceleration} and {centre}"
            )
        if int(centre * columns) > columns // acceleration or not columns // acceleration:
            raise BadInput(
                f"mri: centre = {centre} asks for more columns than acceleration = {acceleration} allows: lower either"
            )
        rng = torch.Generator().manual_seed(seed)
        generator = GaussianMaskGenerator((rows, columns), acceleration, centre, rng=rng)  # pyright: ignore[reportArgumentType]
        m = generator.step()["mask"][0, 0]
    else:
        m = _mask(mask, (1, rows, columns))[0]
    m = m.to(dtype)
    real = image_shape[0] == 1
    physics: Any = MRI(mask=m)
    power = m.double().square()
    if real:
        mirrored = torch.fft.ifftshift(power, dim=(-2, -1)).flip((-2, -1)).roll((1, 1), (-2, -1))
        power = (power + torch.fft.fftshift(mirrored, dim=(-2, -1))) / 2
    norm = math.sqrt(float(power.max()))
    if not norm:
        raise BadInput("the mask is zero everywhere: nothing is measured")
    norm = norm if norm == 1 else up(norm)
    power = power.to(dtype)

    def as_complex(x: Tensor) -> Tensor:
        return torch.cat((x, torch.zeros_like(x)), 1)

    def prox(z: Tensor, y: Tensor, tau: float) -> Tensor:
        b = physics.A_adjoint(y)[:, :1] + z / tau
        return physics.V(physics.V_adjoint(as_complex(b)) / (power + 1 / tau))[:, :1]

    return Operator(
        (lambda x: physics.A(as_complex(x))) if real else physics.A,
        image_shape,
        (2, rows, columns),
        norm,
        (lambda y: physics.A_adjoint(y)[:, :1]) if real else physics.A_adjoint,
        prox=prox if real else (lambda z, y, tau: physics.prox_l2(z, y, gamma=tau)),
        start=(lambda y: physics.A_adjoint(y)[:, :1]) if real else physics.A_adjoint,
        measured=(m != 0).to(dtype).expand(2, rows, columns),
        signed=True,
        dtype=dtype,
        name="mri",
        derivation="the maximum of its symbol, F being orthonormal",
    )


def _tomography(
    image_shape: tuple[int, int, int],
    *,
    angles: int = 60,
    circle: bool = False,
    dtype: torch.dtype = torch.float32,
) -> DataTerm:
    """Line integrals of a square picture along parallel beams, in pixels: data (C, detectors, angles), the ``angles`` even in [0°, 180°).
    ``circle``: only what is in the inscribed circle is measured.

    A rotates by bilinear interpolation and sums, so its entries are sums of products of weights in [0, 1]: none is negative, and ‖A‖ is
    bounded by Collatz & Wielandt's ratio for the stored positions of the samples, in float64. Weights computed in a type of unit
    roundoff u differ from those by at most 11uN each (N detectors): a sample touches at most 9 pixels, in sums of N; a pixel is touched
    by at most 16 samples of each angle (discs of radius ½ about them lie in one of radius 2); so by Schur's test 132uN√(N·angles) is
    added, and the bound is one for the weights as computed. Aᵀ is taken by differentiation, exactly: deepinv's back-projection is not Aᵀ.
    """
    from deepinv.physics import Tomography

    channels, side, other = image_shape
    if side != other or side < 2 + circle:
        raise BadInput(
            f"tomography takes square pictures of side {2 + circle} and more, not {side} x {other}: crop or pad it"
        )
    if not isinstance(angles, int) or angles < 1:
        raise BadInput(f"angles is a number of angles, from 1, not {angles!r}")
    needed = 16 * angles * side**2  # two float64 coordinates of each sample, of which each angle has side² and more
    if needed > MOST_BYTES:
        raise BadInput(
            f"{angles} angles of a picture of side {side} need {needed / 2**30:,.0f} GiB and more, but no more than "
            f"{MOST_BYTES / 2**30:.0f} GiB are begun with: take fewer angles; {math.ceil(math.pi / 2 * side)} sample such a picture fully"
        )
    theta: Any = torch.arange(angles, dtype=torch.float64) * (180 / angles)
    physics: Any = Tomography(
        theta.to(dtype), side, circle=circle, adjoint_via_backprop=True, normalize=False, dtype=dtype
    )
    exact: Any = deepcopy(physics.radon).double()
    detectors = physics.A(torch.zeros(1, 1, side, side, dtype=dtype)).shape[2]

    def exact_adjoint(y: Tensor) -> Tensor:
        return torch.func.vjp(exact, y.new_zeros(len(y), 1, side, side))[1](y)[0]

    norm = nonnegative_norm(exact, exact_adjoint, (1, side, side), (1, detectors, angles))
    norm = up(norm + 132 * UNIT[dtype] * detectors * math.sqrt(detectors * angles))
    return Operator(
        physics.A,
        image_shape,
        (channels, detectors, angles),
        norm,
        physics.A_adjoint,
        start=lambda y: physics.fbp(y).clamp(0, 1),
        dtype=dtype,
        name=f"tomography ({angles} angles)",
        derivation="the maximum of Collatz & Wielandt's ratio, rounding of the weights included",
    )


def _mask(given: str | Tensor, shape: tuple[int, int, int]) -> Tensor:
    """A mask for ``shape`` (C, H, W) from a tensor or a file, (1, H, W) or (C, H, W)."""
    values = _mask_file(Path(given)) if isinstance(given, str) else given
    m = values if values.ndim == 3 else values[None]
    if m.ndim != 3 or tuple(m.shape[1:]) != tuple(shape[1:]) or m.shape[0] not in (1, shape[0]):
        raise BadInput(f"a mask of shape {tuple(shape[1:])} or {tuple(shape)} is expected, got {tuple(values.shape)}")
    if m.is_complex() or not bool(torch.isfinite(m).all()):
        raise BadInput("a mask holds finite, real numbers")
    return m.double()


def _mask_file(path: Path) -> Tensor:
    from PIL import Image

    if not path.is_file() or path.suffix.lower() not in (".npy", ".png"):
        raise BadInput(f"there is no mask file {str(path)!r}: a .npy or .png is expected")
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
            if values.dtype.kind not in "biuf":
                raise BadInput(f"the mask {str(path)!r} holds {values.dtype}, not real numbers")
            return torch.from_numpy(values.astype(np.float64))
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.mode not in ("1", "L"):
                raise BadInput(f"the mask {str(path)!r} is a picture of mode {picture.mode}: save it as grey, 8 bit")
            return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float64) / 255)
    except BadInput:
        raise
    except Exception as error:  # whatever a decoder says of a bad file
        raise BadInput(f"the mask {str(path)!r} cannot be read: {error}") from error


MODELS: dict[str, Callable[..., DataTerm]] = {
    "blur": _blur,
    "downsample": _downsample,
    "inpaint": _inpaint,
    "mri": _mri,
    "tomography": _tomography,
}
"""Forward models by name. Each states in its docstring its settings and how its norm is derived."""


def settings(name: str) -> dict[str, inspect.Parameter]:
    """The settings of the forward model ``name``, by name, with their defaults. Raises BadInput for a name that there is not."""
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"no forward model {name!r}{hint}; there are {', '.join(MODELS)}")
    parameters = inspect.signature(MODELS[name]).parameters
    return {key: value for key, value in parameters.items() if key != "image_shape"}


def forward_model(name: str, image_shape: Sequence[int], **given: Any) -> DataTerm:
    """The forward model ``name`` for pictures of ``image_shape`` (C, H, W), with its settings: see :data:`MODELS`.

    - ``blur``: ``kernel``, ``boundary`` ("circular", "valid", "reflect", "replicate")
    - ``downsample``: ``factor``, ``kernel``, ``boundary``
    - ``inpaint``: ``keep`` and ``seed``, or ``mask``
    - ``mri``: ``acceleration``, ``centre`` and ``seed``, or ``mask``
    - ``tomography``: ``angles``, ``circle``

    All: ``dtype`` (float32). Raises BadInput for names, settings and shapes that do not fit.
    """
    known = settings(name)
    shape = _shape("image", image_shape)
    if len(shape) != 3:
        raise BadInput(f"pictures have a shape (C, H, W), not {shape}")
    if unknown := sorted(set(given) - set(known)):
        raise BadInput(f"{name} takes no {', '.join(unknown)}; its settings are {', '.join(known)}")
    if missing := [
        key for key, value in known.items() if value.default is inspect.Parameter.empty and key not in given
    ]:
        raise BadInput(f"{name} needs {', '.join(missing)} (on the command line: --set {missing[0]}=...)")
    dtype = given.get("dtype", torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise BadInput(f"forward models work in torch.float32 or torch.float64, not {dtype}")
    return MODELS[name](shape, **given)


__all__ = ["MODELS", "Operator", "forward_model", "nonnegative_norm", "settings"]
