"""Whole networks by name, each built from a plain config that a checkpoint can hold."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, NonexpansiveError, Refused
from nonexpansive.math.certificate import Certificate, Shape, entries, fold, rule, split_averaged
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.rounding import root, times, up
from nonexpansive.nn.classifier import dense_classifier, flow_classifier, paper_classifier
from nonexpansive.nn.control import LipschitzStep
from nonexpansive.nn.flow import Flows, GradientFlow
from nonexpansive.nn.implicit import Resolvent
from nonexpansive.nn.linear import widest
from nonexpansive.nn.ordinary import DnCNN
from nonexpansive.nn.pooled import PooledRamps, SignedRamps, WeaklyConvexRamps
from nonexpansive.nn.resize import Lifted
from nonexpansive.nn.spline import ClippedRamps, LinearSpline

SCALE = 32.0
"""Initial scale of the weights and thresholds of flows with learned activations."""

REFERENCE_LEVEL = 25 / 255
"""The noise level, on the scale of [0, 1] images, that learned activations take as 1."""

TRAINING = 1e-3
"""The residual to which training solves for a proximal denoiser, relative as its tolerance is. The gradient is then within some 2 %."""

_LEVELLED: dict[str, Callable[[int, float, float], nn.Module]] = {
    "clipped_ramps": lambda channels, size, _: ClippedRamps(channels, threshold=0.06 * size),
    "pooled_ramps": lambda channels, size, _: PooledRamps(channels, -(-channels // 3), threshold=0.06 * size),
    "signed_ramps": lambda channels, size, _: SignedRamps(channels, -(-channels // 3), threshold=0.06 * size),
    "weakly_convex_ramps": lambda channels, size, modulus: WeaklyConvexRamps(
        channels, -(-channels // 3), threshold=0.06 * size, modulus=modulus, rise=1.0
    ),
    "linear_spline": lambda channels, size, _: LinearSpline(channels, range=size),
}
"""Learned activations for so many channels, to begin with on inputs of that relative size, and how steeply they may fall where they can."""


def cosine_frame(channels: int, factor: int, kernel: int) -> Tensor:
    """The weight of a convolution, on images unshuffled by ``factor``, that gives all coefficients but the mean of the discrete cosine
    transform of every patch of side n = factor·kernel (at steps of ``factor``), in each of ``channels`` decorrelated colours.

    (channels·(n² - 1), channels·factor², kernel, kernel), scaled so that AᵀA is the identity less a low-pass filter: ‖A‖ ≤ 1.
    """
    n = factor * kernel
    position = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(torch.pi / n * (position + 0.5) * position[:, None]) * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    atoms = torch.einsum("ay,bx->abyx", basis, basis).reshape(n * n, n, n)[1:] / kernel
    colours = torch.tensor(
        [[3**-0.5] * 3, [2**-0.5, 0, -(2**-0.5)], [6**-0.5, -2 * 6**-0.5, 6**-0.5]], dtype=torch.float64
    )
    colours = colours if channels == 3 else torch.ones(1, 1, dtype=torch.float64)
    images = torch.einsum("kc,ayx->kacyx", colours, atoms).reshape(-1, channels, n, n)
    return torch.nn.functional.pixel_unshuffle(images, factor).float().contiguous()


class ImageDenoiser(nn.Module):
    """``model(noisy, sigma)``: images (B, C, H, W) in [0, 1], any H and W; σ, the standard deviation of the noise in the same unit, a
    number or (B,). What :class:`Denoiser` and :class:`ProximalDenoiser` have in common: y ↦ ½ + PT(P*(y - ½)) at a level.

    ``levelled``: whether σ enters the inner map as a level; if not, by scaling.
    """

    channels: int
    levelled: bool
    lifted: Lifted

    @property
    def width(self) -> float:
        """The largest number of channels of an array within, for each pixel of the image."""
        raise NotImplementedError

    def level(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        """σ relative to REFERENCE_LEVEL. Raises BadInput for images of other channels, or a number for σ outside [0, 1] (a tensor is
        not looked at, which would stall a device; its negative entries count as 0)."""
        if noisy.ndim != 4 or noisy.shape[1] != self.channels:
            raise BadInput(f"this denoiser takes images (B, {self.channels}, H, W), not {tuple(noisy.shape)}")
        if not isinstance(sigma, Tensor) and not 0 <= sigma <= 1:
            raise BadInput(
                f"the noise level sigma is a standard deviation where white is 1, such as 25/255, not {sigma}"
            )
        return torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device) / REFERENCE_LEVEL


class Denoiser(ImageDenoiser):
    """An α-averaged denoiser D(y, σ): lift by an isometry, gradient flows, project by its adjoint (Sherry et al. 2024, §5).

    For every fixed σ ≥ 0 the map y ↦ D(y, σ) is ``alpha``-averaged (0.9 unless given; under the control "unconstrained" it need not
    be). With ``lipschitz``, a number above 1, in place of ``alpha`` it is that Lipschitz, and not averaged: each of the flows may
    stretch by its share, and denoises more for it (:class:`~nonexpansive.nn.control.LipschitzStep`; with "weakly_convex_ramps").

    - ``channels``: 1 (grey) or 3 (colour); ``features``: channels of the flows' state, those above the image's own begin as zeros;
      ``hidden``: outputs of each A, as many as ``features`` unless given; ``blocks``: their number; ``kernel``: their kernel size.
      With more outputs than inputs A is nearly an isometry from the start (its singular values lie close together), so that each
      step moves the image far. "frame" asks for as many as :func:`cosine_frame` has, which A then begins as.
    - ``factor``: the flows work at 1/factor of the resolution, on pixel-unshuffled images (an isometry), which for the same receptive
      field costs factor² times less.
    - ``scales``: the flows take turns at these scales: at scale s, a flow unshuffles the state by s once more, and back (PTP* again).
      It then sees patches s times as large. Scales other than 1 need ``hidden="frame"``.
    - ``activation``: "clipped_ramps", "pooled_ramps" or "linear_spline", learned, into whose thresholds σ enters; or any fixed activation
      by name, for which σ enters by scaling, D(y, σ) = μ⁻¹T(μy) with μ = 25/(255σ). "signed_ramps", which need not be monotone,
      are for the control "unconstrained": the ordinary twin of "pooled_ramps". "weakly_convex_ramps" decrease as far as
      ``lipschitz`` lets them.
    - ``method``, ``control``: as for :class:`GradientFlow`; ``recompute``: as for :class:`Flows`.
    """

    def __init__(
        self,
        channels: int = 3,
        features: int = 64,
        blocks: int = 10,
        kernel: int = 3,
        factor: int = 2,
        activation: str = "clipped_ramps",
        alpha: float | None = None,
        method: str = "euler",
        control: str = "maximal",
        recompute: int = 0,
        hidden: int | str | None = None,
        scales: Sequence[int] = (1,),
        lipschitz: float | None = None,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise BadInput(f"channels must be 1 (grey) or 3 (colour), not {channels}")
        if channels * factor**2 > features:
            raise BadInput(
                f"{channels} channels unshuffled by {factor} need features ≥ {channels * factor**2}, not {features}"
            )
        if kernel % 2 == 0:
            raise BadInput(f"kernel must be odd, so that the flows keep the image's size; not {kernel}")
        if lipschitz is not None and (alpha is not None or control != "maximal" or method != "euler"):
            raise BadInput(
                'lipschitz takes the place of alpha, and goes with the control "maximal" and Euler\'s method'
            )
        if lipschitz is not None and not 1 < lipschitz < math.inf:
            raise BadInput(f"lipschitz must be a finite number above 1, not {lipschitz}; for 1 and below give alpha")
        if alpha is None and lipschitz is None:
            alpha = 0.9
        if alpha is not None and not 0 < alpha < 1:
            raise BadInput(f"alpha must lie strictly between 0 and 1, not {alpha}")
        if not scales or any(not isinstance(scale, int) or scale < 1 for scale in scales):
            raise BadInput(f"scales are whole numbers from 1, at least one, not {scales}")
        framed = hidden == "frame"
        if framed and features != channels * factor**2:
            raise BadInput(f'hidden="frame" needs features = {channels * factor**2}, the image\'s own, not {features}')
        if set(scales) != {1} and not framed:
            raise BadInput(f'scales of {list(scales)} need hidden="frame", not {hidden!r}')
        hidden = features if hidden is None else hidden
        if not framed and not (isinstance(hidden, int) and hidden >= 1):
            raise BadInput(f'hidden must be a number from 1, or "frame", not {hidden!r}')
        self.channels, self.alpha, self.lipschitz = channels, alpha, lipschitz
        self.kernel, self.levelled = kernel, activation in _LEVELLED
        self.scales = [scales[index % len(scales)] for index in range(blocks)]
        each = None if alpha is None else split_averaged(alpha, blocks)
        stretch = 1.0 if lipschitz is None else lipschitz ** (1 / blocks)

        def flow(scale: int) -> nn.Module:
            fine = factor * scale
            outputs = channels * ((fine * kernel) ** 2 - 1) if framed else int(hidden)
            inputs = features * scale**2
            linear = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not self.levelled)
            # (outputs, inputs) of a frame also where ``hidden`` is its number
            if inputs == channels * fine**2 and outputs == channels * ((fine * kernel) ** 2 - 1):
                linear.weight = nn.Parameter(cosine_frame(channels, fine, kernel))
            sigma: str | nn.Module = activation
            if self.levelled:
                # (sA, s·σ(·/s), h/s²) is the same flow for every scale s: a large one lets an optimiser whose steps have the size of
                # the learning rate, as Adam's, change the weights slowly and the thresholds, which are learned as logarithms, quickly.
                # All blocks together begin as about one soft-thresholding.
                with torch.no_grad():
                    linear.weight.mul_(SCALE)
                size = SCALE * (inputs / outputs) ** 0.5 / blocks
                sigma = _LEVELLED[activation](outputs, size, (stretch - 1) / (stretch + 1))
            kept = control if lipschitz is None else LipschitzStep(stretch)
            block = GradientFlow(linear, sigma, method=method, control=kept, alpha=each)
            return block if scale == 1 else Lifted(block, inputs, scale)

        self.lifted = Lifted(Flows((flow(scale) for scale in self.scales), recompute), features, factor)

    def flows(self) -> list[GradientFlow]:
        """The gradient flows, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, GradientFlow)]

    @property
    def alignment(self) -> int:
        """The map commutes with shifts by multiples of this many pixels, away from the borders."""
        return self.lifted.factor * math.lcm(*self.scales)

    @property
    def reach(self) -> int:
        """In evaluation mode an output pixel depends on no input further than this many pixels away along an axis."""
        spread = 1
        for scale, flow in zip(self.scales, self.flows(), strict=True):
            spread += scale * flow.step()[1] * flow.tableau.stages * (self.kernel - 1) + scale - 1
        return self.lifted.factor * spread

    @property
    def width(self) -> float:
        layers = [cast(nn.Conv2d, flow.linear) for flow in self.flows()]
        widths = (widest(layer) / scale**2 for layer, scale in zip(layers, self.scales, strict=True))
        return max(widths) / self.lifted.factor**2

    def forward(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        level, x = self.level(noisy, sigma), noisy - 0.5
        if self.levelled:
            return self.lifted(x, level) + 0.5
        scale = level.reshape(-1, 1, 1, 1).clamp_min(1e-4)
        return self.lifted(x / scale) * scale + 0.5


class ProximalDenoiser(ImageDenoiser):
    """D(y, σ) = argmin_x ½‖x - y‖² + R_σ(x), the proximal map of a learned R_σ, convex or weakly convex (Goujon et al. 2022 and
    2024, arXiv:2211.12461 and arXiv:2308.10542).

    R_σ is a sum over groups of filters of functions of their amplitudes, and ``modulus``-weakly convex by construction:

    - ``modulus`` 0: R_σ is convex, and D firmly non-expansive (α ≤ 1/2), which every splitting takes as it is;
    - above: D is 1/(1 - ``modulus``)-Lipschitz for every fixed σ, not averaged. What the freedom to be concave buys is strength; what is
      left of the theory is descent on an objective (:class:`nonexpansive.restore.Descent`).

    - ``channels``: 1 or 3; ``factor``, ``kernel``: the filters have side factor·kernel. They begin as :func:`cosine_frame`'s, or, for a
      smaller ``frame``, as those of side factor·``frame`` with zeros around them, which are fewer;
    - ``ramps``, ``rise``: of :class:`~nonexpansive.nn.pooled.WeaklyConvexRamps`;
    - ``tolerance``: of :class:`~nonexpansive.nn.implicit.Resolvent` in evaluation mode, relative to max(‖y - ½‖, 1).
    """

    levelled = True
    solved = True
    """Whether :meth:`forward` takes a picture to begin from."""

    def __init__(
        self,
        channels: int = 1,
        factor: int = 2,
        kernel: int = 5,
        ramps: int = 2,
        modulus: float = 0.9,
        rise: float = 12.0,
        tolerance: float = 5e-5,
        frame: int | None = None,
    ) -> None:
        super().__init__()
        frame = kernel if frame is None else frame
        if channels not in (1, 3):
            raise BadInput(f"channels must be 1 (grey) or 3 (colour), not {channels}")
        if kernel % 2 == 0 or kernel < 1:
            raise BadInput(f"kernel must be odd, so that the filters keep the image's size; not {kernel}")
        if factor < 1 or factor * kernel < 2:
            raise BadInput(
                f"factor is at least 1, and filters see more than one pixel; not {factor} and kernel {kernel}"
            )
        if not 0 < frame <= kernel or frame % 2 == 0 or factor * frame < 2:
            raise BadInput(f"frame is odd and at most the kernel, {kernel}, and sees more than one pixel; not {frame}")
        self.channels, self.convex = channels, modulus == 0
        inputs, outputs = channels * factor**2, channels * ((factor * frame) ** 2 - 1)
        linear = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        border = [(kernel - frame) // 2] * 4
        linear.weight = nn.Parameter(nn.functional.pad(SCALE * cosine_frame(channels, factor, frame), border))
        size = SCALE * (inputs / outputs) ** 0.5
        sigma = WeaklyConvexRamps(outputs, -(-outputs // 3), ramps, 0.012 * size, modulus, rise)
        self.lifted = Lifted(Resolvent(linear, sigma, 1.0, tolerance, relative=True), inputs, factor)
        self.tolerance = tolerance

    def forward(self, noisy: Tensor, sigma: float | Tensor, near: Tensor | None = None) -> Tensor:
        """``near``, images of the same shape, is where the solver begins, as for :class:`~nonexpansive.nn.implicit.Resolvent`."""
        others = {} if near is None else {"near": near - 0.5}
        return self.lifted(noisy - 0.5, self.level(noisy, sigma), **others) + 0.5

    def regulariser(self, x: Tensor, sigma: float | Tensor) -> Tensor | None:
        """R_σ(x) of each image, (B,), in float64; in evaluation mode. None where ``factor`` does not divide the sides of x: there D is
        the proximal map of min over b of R_σ(x, b) + ½‖b - ½‖², b a border of the image, which has no formula."""
        if x.shape[-2] % self.lifted.factor or x.shape[-1] % self.lifted.factor:
            return None
        resolvent = cast(Resolvent, self.lifted.inner)
        return resolvent.potential(self.lifted.lift(x - 0.5), self.level(x, sigma))

    @property
    def width(self) -> float:
        linear = cast(nn.Conv2d, cast(Resolvent, self.lifted.inner).linear)
        return widest(linear) / self.lifted.factor**2

    @property
    def tolerance(self) -> float:
        """Of the solver in evaluation mode, relative to max(‖y - ½‖, 1)."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, tolerance: float) -> None:
        if not 0 < tolerance < 1:
            raise BadInput(f"the tolerance of the solver is relative, in (0, 1), not {tolerance}")
        self._tolerance = float(tolerance)
        self.train(self.training)

    def train(self, mode: bool = True) -> ProximalDenoiser:
        super().train(mode)
        resolvent = cast(Resolvent, self.lifted.inner)
        modulus = cast(WeaklyConvexRamps, resolvent.activation).modulus
        coarse = TRAINING * min(10.0, 1 / (1 - modulus))  # the tolerance of which that is the residual, to one percent
        resolvent.tolerance = max(coarse, self._tolerance) if mode else self._tolerance
        return self


@rule(Denoiser, ProximalDenoiser)
def _denoiser(module: ImageDenoiser, shape: Shape, unit: float) -> Certificate:
    if len(shape) != 3 or shape[0] != module.channels:
        raise Refused(f"this denoiser takes images of shape ({module.channels}, H, W), not {shape}")
    inner, size = fold(module.lifted, shape, unit), entries(shape)
    half = Enclosure(Affine(0.0, times(0.5, root(size))), Affine(), unit, size)
    x = Enclosure.input(unit, size) + half
    # μ⁻¹T(μ·) has T's slopes; its constants are those of T times the level, which is at most 1/REFERENCE_LEVEL for σ ≤ 1.
    # The division and the multiplication by it are four roundings, in units that are up to that large.
    largest, roundings = (1.0, 0.0) if module.levelled else (up(1 / REFERENCE_LEVEL), 4.0)
    x = x.rounded(x.computed, roundings * largest)
    norm = Affine(inner.growth.slope, times(inner.growth.constant, largest)).of(x.norm)
    error = Affine(inner.error.slope, times(inner.error.constant, largest)).of(x.computed) + x.error * inner.lipschitz
    y = Enclosure(norm, error, unit, size)
    y = y.rounded(y.computed, roundings * largest) + half
    return replace(
        inner.plain(),
        growth=y.norm,
        error=y.error,
        rule=f"{type(module).__name__}: a translation of PTP*, for every fixed noise level",
        assumptions=(*inner.assumptions, "the noise level is fixed, and at most 1"),
        parts=(inner,),
    )


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "denoiser": Denoiser,
    "dense_classifier": dense_classifier,
    "dncnn": DnCNN,
    "flow_classifier": flow_classifier,
    "paper_classifier": paper_classifier,
    "proximal_denoiser": ProximalDenoiser,
}


def build(architecture: str, **config: Any) -> nn.Module:
    """A network by the name of its architecture and its config. Raises BadInput for names or keys that do not exist."""
    if architecture not in ARCHITECTURES:
        close = difflib.get_close_matches(architecture, ARCHITECTURES, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"no architecture {architecture!r}{hint}; there are {sorted(ARCHITECTURES)}")
    known = inspect.signature(ARCHITECTURES[architecture]).parameters
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise BadInput(f"{architecture} takes no {', '.join(unknown)}; its settings are {', '.join(known)}")
    try:
        return ARCHITECTURES[architecture](**config)
    except NonexpansiveError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise BadInput(f"{architecture} cannot be built with {config}: {error}") from error
