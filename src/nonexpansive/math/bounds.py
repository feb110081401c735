"""Sound upper bounds on the ℓ2 operator norm of a layer's linear part A, rounding included.

A convolution of any dimension is, per axis, y[t] = Σ_u K_u x̃[s t + d u - lo] with x̃ the padded input. One algorithm
serves every layer: a transposed convolution is bounded through the convolution of which it is the adjoint, and a
``Linear`` is a convolution of one tap on one point.

**Stride and dilation fold away** (polyphase). With g = gcd(s, d), split the taps as u = (s/g) v + ψ and the input as
z_ψ[q] = x̃[s q + d ψ]: a stride-1 convolution with dilation d/g, ⌈k g/s⌉ taps and s/g times the channels. A dilated one
on N points is d/g separate undilated ones on N g/d points, so the frequencies are those of the folded kernel.

**Symbol.** K̂(ω) = Σ_v K_v e^{-iω·v}. Every operator here is R C E: E places the input on a cyclic grid of N points per
axis, C is the cyclic convolution, R picks outputs, so ‖A‖ ≤ ‖R‖ ‖E‖ max σ₁(K̂(ω)) over the N-grid of frequencies. Zero
padding only needs N so large that nothing wraps into the picture (then ‖R‖ = ‖E‖ = 1); as the entries that wrap are
outside it, they may also change sign, which shifts the grid by half a cell (θ = 1/2). Circular padding has N = n,
reflection the period 2n - 2; any padding may be taken as an operator of its own, whose squared norm is the largest
multiplicity of a pixel.

**Covering the frequency torus.** Let M bound σ₁ everywhere and r_i = (k_i - 1)/2. For unit u, v the function
Re uᴴK̂(ω)v, its taps centred, is along a direction δ of exponential type τ = Σ r_i|δ_i| and at most M in modulus, so
that f'² + τ²f² ≤ τ²M² (Bernstein-Szegő; Duffin & Schaeffer 1938). Hence

    arccos(σ₁(K̂(ω))/M) is 1-Lipschitz in Σ r_i |ω_i - ω'_i|.

A box of half-widths h, ρ = Σ r_i h_i, whose centre has σ₁ ≤ c cos ρ cannot hold a maximum above c; boxes that fail are
split (`_cover`). That σ₁² ≤ t² at a centre is *proved*, by a completed Cholesky factorisation of t²I - K̂ᴴK̂, not read
off an eigenvalue routine; what eigenvalue routines and power methods say here only chooses what to try.

**The operator compressed.** Zero padding, stride 1: let Ĥ(ω) = [0 K̂; K̂ᴴ 0], in channels turned so that the first d of
either side hold most of A's leading singular vectors, be split into these (P) and the rest (Q). For any c > λ₁(Ĥ_QQ)

    Ĥ ⪯ diag(S, cI) with S = Ĥ_PP + Ĥ_PQ (cI - Ĥ_QQ)⁻¹ Ĥ_QP.

So it is on an N-grid, and so are the compressions to the box that holds the picture and the output, of which that of
[0 A; Aᵀ 0] is a part: ‖A‖ ≤ max(c, λ₁(T(S))), T(S) Toeplitz with blocks of order 2d whatever the number of channels
(`_compression_bound`). The symbol's supremum exceeds ‖A‖ by O(1/n²), this by O(1/n³) and less as d grows. S comes from
a Cholesky factorisation of cI - Ĥ_QQ, T(S) from sums over the grid; λ₁(T(S)) is proved by one of c I - T(S).

**The operator itself.** Where affordable, cI - AᵀA (or cI - AAᵀ) is factorised whole: ordered along one axis it is
block tridiagonal (`_Gram`). That is right for every padding mode and as tight as wished.

**Rounding.** A Cholesky factorisation that runs to completion in floating point proves A + ΔA ⪰ 0 with
‖ΔA‖₂ ≤ γ_{n+1}/(1 - γ_{n+1}) tr A (Higham 2002, thm 10.3; Demmel 1989; Rump 2006). To this are added the rounding of
the Gram matrix, at most γ ‖|A|‖², and of the symbol. The constants are generous; the excess is 1e-13 to 1e-7 relative.
Weights are first scaled by a power of two, so that nothing overflows or vanishes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, pad
from torch.nn.utils import parametrize

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.rounding import UNIT, gamma, up

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NUMPY_MODE: dict[str, Literal["wrap", "reflect", "edge"]] = {
    "circular": "wrap",
    "reflect": "reflect",
    "replicate": "edge",
}
_U = UNIT[torch.float64]

_TOLERANCE = 2e-3  # of the supremum over all frequencies, for any size at once
_TOLERANCE_AT_SHAPE = 4e-4
_COARSEST = 0.4  # boxes with a larger ρ are split unseen: cos ρ would be too small to prove much
_LOOSEST = 4.9e-3  # accepted where refining further is too dear: a symbol that is flat has no boxes to discard
_SYMBOL_FLOPS = 4e10
_GRAM_FLOPS = 1.2e11  # about 3 s on one core
_GRAM_FLOPS_AT_MOST = 1e12  # half a minute, where nothing else comes within 1.001
_GRAM_FLOPS_AT_ONCE = 2e8  # so cheap that the symbol is not even looked at
_ENTRIES = 3.5e7  # of the largest arrays, 280 MB
_CHUNK = 300_000  # entries of the symbol formed at once: what stays in a processor's cache
_SLAB = 128  # slabs are not made thinner than this order
_ORDER = 2**17  # of a Gram matrix: Lanczos keeps 80 vectors
_COMPRESSED_ORDER = 4096  # of a scalar Toeplitz matrix: 134 MB, factorised in about a second
_MOST_KEPT = 16  # directions of either side that are kept exactly
_SUBSPACE = 8  # leading singular vectors that choose them
_MARGIN = 2e-4  # above the estimate, for what is not kept
_SMALL = 256  # the order of a Gram matrix whose eigenvalues are computed


@torch.inference_mode(False)  # Lanczos differentiates
def norm_bound(layer: nn.Module, shape: Sequence[int] | None = None) -> float:
    """An upper bound on ‖A‖₂, A the linear part of ``layer`` on one input of ``shape`` (without batch axis).

    ``shape`` None: for every input size at once. Never below the true norm, rounding included.

    Tightness, stride 1, zero or circular padding: at any size at most 1.005 sup σ₁(K̂); at a shape at most 1.001 ‖A‖ for
    circular padding that keeps the size, and for zero padding on random 3x3 kernels of up to 64 channels from n = 8 (see
    benchmarks/README.md). Factorising the operator (up to 1.2e11 operations: 64 channels up to 15x15, 3 up to 128x128) is
    tight for every kernel; beyond, the excess falls as 1/n³, with no more than a thousand pixels, or as 1/n².

    Layers: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, possibly parametrized (a parametrization that changes with
    every use in training needs eval mode), and any module with a method ``norm_bound(shape)``, whose value is trusted.
    Raises Refused for any other type and for weights that are not finite, BadInput for a shape that does not fit.
    """
    if not _is_ours(layer):
        return _users(layer, "norm_bound", None if shape is None else tuple(shape))
    convolution = _read(layer)
    sizes = None if shape is None else convolution.sizes(shape)
    if not convolution.weight.any():
        return 0.0
    return convolution.unscaled(_bound(convolution, sizes))


def absolute_norm_bound(layer: nn.Module) -> float:
    """An upper bound on ‖|A|‖₂ for any input size, |A| the entrywise absolute values; |A|ᵀ has the same norm.

    Schur's test, √(largest row sum · largest column sum) of the folded kernel, times the norm of the padding. It scales
    the rounding error of A in floating point. A user's module offers a method ``absolute_norm_bound()``.
    Raises Refused as `norm_bound` does.
    """
    if not _is_ours(layer):
        return _users(layer, "absolute_norm_bound")
    convolution = _read(layer)
    if not convolution.weight.any():
        return 0.0
    return convolution.unscaled(_absolute(convolution, None))


def terms(layer: nn.Module) -> tuple[int, int]:
    """The largest number of non-zero summands in an entry of Ax and of Aᵀy, for any input size: the n of γ_n.

    A user's module offers a method ``terms()``. Raises Refused as `norm_bound` does.
    """
    if not _is_ours(layer):
        forward, adjoint = _method(layer, "terms")()
        return int(forward), int(adjoint)
    convolution = _read(layer)
    _, rows, columns, *taps = convolution.weight.shape
    forward = columns * math.prod(taps)
    adjoint = rows * math.prod(a.folded_taps * a.most_copies for a in convolution.axes)
    return (adjoint, forward) if convolution.transposed else (forward, adjoint)


@torch.inference_mode(False)
def norm_estimate(layer: nn.Module, shape: Sequence[int], *, iterations: int = 100, seed: int = 0) -> float:
    """An *estimate* of ‖A‖₂ from below by the power method on AᵀA: it may steer training, never enter a certificate.

    Runs the layer itself, in its own precision and on its own device; A x = layer(x) - layer(0), Aᵀy by reverse
    differentiation.
    """
    like = next(itertools.chain(layer.parameters(), layer.buffers()), torch.empty(0, dtype=torch.float64))
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(like)
    norm = 0.0
    with torch.enable_grad():
        offset = layer(torch.zeros_like(x)).detach()
        for _ in range(iterations):
            x = (x / x.double().norm().to(x)).requires_grad_()
            y = layer(x) - offset
            norm = float(y.detach().double().norm())
            if norm == 0.0:
                break
            (x,) = torch.autograd.grad(y, x, y.detach() / norm)
    return norm


# --- the layer, read ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """One axis of y[t] = Σ_u K_u x̃[s t + d u - lo]; ``extra`` is a transposed convolution's output padding."""

    taps: int
    stride: int
    dilation: int
    lo: int
    hi: int
    mode: str
    extra: int = 0

    @property
    def gcd(self) -> int:
        return math.gcd(self.stride, self.dilation)

    @property
    def phases(self) -> int:
        return self.stride // self.gcd

    @property
    def folded_taps(self) -> int:
        return -(-self.taps // self.phases)

    @property
    def span(self) -> int:
        return self.dilation * (self.taps - 1)

    @property
    def smallest(self) -> int:
        """The smallest input that torch accepts."""
        pads = max(self.lo, self.hi)
        least = {"circular": pads, "reflect": pads + 1}.get(self.mode, 1)
        return max(1, least, self.span + 1 - self.lo - self.hi)

    def outputs(self, n: int) -> int:
        return (n + self.lo + self.hi - self.span - 1) // self.stride + 1

    def inputs(self, m: int) -> int:
        """The output size of the transposed layer on m points."""
        return (m - 1) * self.stride - self.lo - self.hi + self.span + self.extra + 1

    def sources(self, n: int) -> np.ndarray:
        """The pixel behind each padded position, -1 where there is none."""
        if self.mode == "zeros":
            return np.pad(np.arange(n), (self.lo, self.hi), constant_values=-1)
        return np.pad(np.arange(n), (self.lo, self.hi), mode=_NUMPY_MODE[self.mode])

    def copies(self, n: int) -> int:
        """The squared norm of the padding: its AᵀA is diagonal, each pixel's multiplicity."""
        return 1 if self.mode == "zeros" else int(np.bincount(self.sources(n)).max())

    @cached_property
    def _distinct_sizes(self) -> range:
        """Beyond these, what `copies` and `embedding` say depends on n mod s alone."""
        return range(self.smallest, self.smallest + self.lo + self.hi + 2 * self.stride + 4)

    @cached_property
    def most_copies(self) -> int:
        return 1 if self.mode == "zeros" else max(self.copies(n) for n in self._distinct_sizes)

    @cached_property
    def factor(self) -> int:
        """The largest ‖R‖²‖E‖² over all sizes."""
        if self.mode == "zeros":
            return 1
        return max(self.embedding(n, self.outputs(n))[2] for n in self._distinct_sizes)

    def embedding(self, n: int, m: int) -> tuple[int, bool, int]:
        """(N, free, ‖R‖²‖E‖²) for n inputs and m outputs: N frequencies, free if more or shifted ones do as well."""
        step = self.dilation // self.gcd
        if self.mode == "zeros":
            return -(-self._least_grid(n, m, self.lo) // step), True, 1
        padded = n + self.lo + self.hi
        best = (-(-self._least_grid(padded, m, 0) // step), True, self.copies(n))
        period, repeats = (2 * n - 2, 2) if self.mode == "reflect" and n > 1 else (n, 1)
        if self.mode != "replicate" or n == 1:  # periodic: a symmetric extension shows inner pixels twice a period
            cycle = math.lcm(period, self.stride)
            grid = cycle // self.stride
            squared = repeats * (cycle // period) * -(-m // grid)
            if squared <= best[2]:
                best = (grid // math.gcd(grid, step), False, squared)
        return best

    def _least_grid(self, n: int, m: int, lo: int) -> int:
        """The least N so that on the cyclic grid of N no tap that misses the n pixels comes round to hit one.

        Folded, row t reads z_ψ at t + (d/g) v; z_ψ[q] holds a pixel for q in [a, b]. An index q below a comes back at
        q + N, to be above b; one above b, at most ``top``, at q - N, to be below a; and rows must stay distinct.
        """
        top = m - 1 + self.dilation // self.gcd * (self.folded_taps - 1)
        least = m
        for phase in range(self.phases):
            a = max(0, -((self.dilation * phase - lo) // self.stride))
            b = min(top, (lo + n - 1 - self.dilation * phase) // self.stride)
            if a <= b:
                least = max(least, b + 1, top + 1 - a)
        return least


_POINT = _Axis(taps=1, stride=1, dilation=1, lo=0, hi=0, mode="zeros")


@dataclass(frozen=True)
class _Convolution:
    """``weight`` (groups, out, in, *taps), float64, times 2^exponent. Transposed layers appear as their adjoint."""

    weight: Tensor
    exponent: int
    axes: tuple[_Axis, ...]
    transposed: bool = False
    linear: bool = False

    @classmethod
    def of(
        cls, weight: Tensor, axes: tuple[_Axis, ...], *, transposed: bool = False, linear: bool = False
    ) -> _Convolution:
        """Scaled so that the largest entry lies in [1/2, 1): exact, a power of two."""
        exponent = math.frexp(float(weight.abs().max()))[1] if weight.numel() else 0
        half = -exponent // 2  # in two steps, for 2^1074 is no float64
        return cls(weight * 2.0**half * 2.0 ** (-exponent - half), exponent, axes, transposed, linear)

    def unscaled(self, bound: float) -> float:
        """The bound on the layer's own scale, rounded up."""
        try:
            return up(math.ldexp(up(bound), self.exponent))
        except OverflowError:
            raise Refused("the weights are so large that their norm is no float64 number: scale them down") from None

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(n, m) per axis: inputs and outputs of the convolution (of the adjoint, for a transposed layer)."""
        shape = tuple(int(n) for n in shape)
        groups, rows, columns, *_ = self.weight.shape
        channels = groups * (rows if self.transposed else columns)
        if self.linear:
            if not shape or shape[-1] != columns:
                raise BadInput(f"a Linear layer with {columns} inputs cannot take an input of shape {shape}")
            return ((1, 1),)
        if len(shape) != len(self.axes) + 1 or shape[0] != channels or min(shape) < 1:
            raise BadInput(f"expected an input shape ({channels}, {len(self.axes)} sizes, no batch axis), got {shape}")
        sizes = []
        for axis, n in zip(self.axes, shape[1:], strict=True):
            size = (axis.inputs(n), n) if self.transposed else (n, axis.outputs(n))
            if min(size) < 1 or (not self.transposed and n < axis.smallest):
                raise BadInput(f"an input of shape {shape} is too small for this kernel and padding")
            sizes.append(size)
        return tuple(sizes)

    def factor(self, sizes: Sequence[tuple[int, int]] | None) -> float:
        """‖R‖‖E‖, at these sizes or for all."""
        if sizes is None:
            return up(math.sqrt(math.prod(axis.factor for axis in self.axes)))
        return up(math.sqrt(math.prod(axis.embedding(n, m)[2] for axis, (n, m) in zip(self.axes, sizes, strict=True))))

    @cached_property
    def folded(self) -> Tensor:
        """The polyphase kernel (groups, out, in·phases, *folded taps), without outer taps that are zero."""
        weight = self.weight
        for i, axis in enumerate(self.axes, start=3):
            weight = weight.movedim(i, -1)
            weight = pad(weight, (0, axis.folded_taps * axis.phases - axis.taps)).unflatten(-1, (-1, axis.phases))
            weight = weight.movedim(-1, 3).flatten(2, 3).movedim(-1, i)
        for i in range(3, weight.ndim):
            used = weight.movedim(i, 0).flatten(1).any(1).nonzero()
            weight = weight.narrow(i, int(used[0]), int(used[-1] - used[0]) + 1)
        return weight

    def apply(self, x: Tensor, sizes: _Sizes) -> Tensor:
        """A x for x (1, groups·in, *n)."""
        mode = next((axis.mode for axis in self.axes if axis.mode != "zeros"), "constant")
        x = pad(x, [p for axis in reversed(self.axes) for p in (axis.lo, axis.hi)], mode=mode)
        run = (conv1d, conv2d, conv3d)[len(self.axes) - 1]
        stride, dilation = [axis.stride for axis in self.axes], [axis.dilation for axis in self.axes]
        y = run(x, self.weight.flatten(0, 1), None, stride, 0, dilation, self.weight.shape[0])
        return y[(..., *(slice(m) for _, m in sizes))]  # output padding may allow rows that a transposed layer has not

    def normal(self, sizes: _Sizes) -> tuple[Callable[[Tensor], Tensor], int]:
        """x ↦ AᵀA x on flat x, and the length of x."""
        shape = (1, self.weight.shape[0] * self.weight.shape[2], *(n for n, _ in sizes))

        def apply(x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.view(shape).requires_grad_()
                y = self.apply(x, sizes)
                return torch.autograd.grad(y, x, y.detach())[0].flatten()

        return apply, math.prod(shape)


def _is_ours(layer: nn.Module) -> bool:
    return parametrize.type_before_parametrizations(layer) in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


def _method(layer: nn.Module, name: str) -> Callable[..., Any]:
    method = getattr(layer, name, None)
    if not callable(method):
        raise Refused(
            f"no bound is known for {type(layer).__module__}.{type(layer).__qualname__}: use torch's Linear, Conv or "
            f"ConvTranspose layers themselves, or give the module a method `{name}` of its own"
        )
    return method


def _users(layer: nn.Module, name: str, *arguments: object) -> float:
    bound = float(_method(layer, name)(*arguments))
    if not (math.isfinite(bound) and bound >= 0):
        raise Refused(f"{type(layer).__qualname__}.{name} gave {bound}: a bound is finite and not negative")
    return bound


def _read(layer: nn.Module) -> _Convolution:
    kind = parametrize.type_before_parametrizations(layer)
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        raise Refused(
            f"this {kind.__name__} has forward hooks or a replaced forward, which may change what it computes: remove "
            "them (torch.nn.utils.parametrizations replace the old weight_norm and spectral_norm)"
        )
    weight = cast(Tensor, layer.weight)
    if (found := unreadable(weight)) is not None or not weight.is_floating_point():
        raise Refused(f"the weight of this {kind.__name__} is {found or 'not real floating point'}: use a real layer")
    weight = weight.detach().to("cpu", torch.float64)
    if not weight.isfinite().all():
        raise Refused(f"the weight of this {kind.__name__} is not finite: training diverged or the file is damaged")
    if isinstance(layer, nn.Linear):
        return _Convolution.of(weight[None, :, :, None], (_POINT,), linear=True)
    assert isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED))
    _require_as_built(layer, tuple(weight.shape))
    pads = _pads(layer)
    # the weight of a transposed layer, (in, out/groups, *taps), is that of its adjoint
    transposed = isinstance(layer, _TRANSPOSED)
    if any(p < 0 for pad in pads for p in pad):
        raise Refused(f"{layer} crops by a negative padding: crop before it instead")
    extras = layer.output_padding if transposed else [0] * len(pads)
    axes = tuple(
        _Axis(k, s, d, lo, hi, layer.padding_mode if lo or hi else "zeros", extra)
        for k, s, d, (lo, hi), extra in zip(layer.kernel_size, layer.stride, layer.dilation, pads, extras, strict=True)
    )
    return _Convolution.of(weight.unflatten(0, (layer.groups, -1)), axes, transposed=transposed)


_REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def unreadable(tensor: Tensor) -> str | None:
    """Why what a layer does with these numbers is not known: None, if they are torch's own tensor in an ordinary form."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}, which may change what a layer does with it"
    if tensor.is_complex() or tensor.is_meta:
        return "complex" if tensor.is_complex() else "without data (meta)"
    if tensor.layout != torch.strided or (tensor.is_floating_point() and tensor.dtype not in _REAL):
        return f"stored as {tensor.dtype}, {tensor.layout}"
    return None


def _require_as_built(layer: Any, weight: tuple[int, ...]) -> None:
    """That a convolution's settings are those of its weight, which alone decides what torch computes."""
    name = type(layer).__name__
    stated = [layer.kernel_size, layer.stride, layer.dilation, layer.output_padding]
    stated += [] if isinstance(layer.padding, str) else [layer.padding]
    inner, outer = layer.in_channels, layer.out_channels
    first, second = (inner, outer) if isinstance(layer, _TRANSPOSED) else (outer, inner)
    if not all(isinstance(value, tuple) and len(value) == len(weight) - 2 for value in stated):
        raise Refused(
            f"this {name} holds settings that are not one number an axis, as torch stores them: build it anew"
        )
    if weight != (first, second // layer.groups, *layer.kernel_size):
        raise Refused(f"this {name} holds a weight of shape {weight}, which is not what it states: build it anew")


def _pads(layer: Any) -> list[tuple[int, int]]:
    if layer.padding_mode != "zeros":  # torch pads by what it noted when the layer was made, the last axis first
        noted = layer._reversed_padding_repeated_twice
        return list(zip(noted[::2], noted[1::2], strict=True))[::-1]
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    if layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in layer.padding]


# --- the bounds -----------------------------------------------------------------------------------------------------


_Sizes = tuple[tuple[int, int], ...]
_Grid = tuple[tuple[int, float], ...]


def _bound(convolution: _Convolution, sizes: _Sizes | None) -> float:
    """The least of the bounds that are affordable, for the scaled weight."""
    absolute = _absolute(convolution, sizes)
    if sizes is None:
        return min(absolute, _symbol_bound(convolution, None))
    gram = _Gram(convolution, sizes, absolute)
    if convolution.linear or gram.flops <= _GRAM_FLOPS_AT_ONCE:
        return min(absolute, gram.bound())
    best = min(absolute, _symbol_bound(convolution, sizes))
    matters = convolution.factor(sizes) > 1.001 or not _is_large(convolution, sizes)
    if matters and gram.flops <= _GRAM_FLOPS and best > gram.estimate * (1 + 5e-4):
        best = min(best, gram.bound())
    elif matters and _fits(convolution, sizes):
        best = min(best, _compression_bound(convolution, sizes, best))
        if gram.flops <= _GRAM_FLOPS_AT_MOST and best > gram.estimate * (1 + 9e-4):
            best = min(best, gram.bound())
    return best


def _is_large(convolution: _Convolution, sizes: _Sizes) -> bool:
    """Whether the frequencies of these sizes are so dense that the supremum over all is as good."""
    grids = (axis.embedding(n, m)[0] for axis, (n, m) in zip(convolution.axes, sizes, strict=True))
    angle = sum(math.pi * (k - 1) / 2 / n for k, n in zip(convolution.folded.shape[3:], grids, strict=True))
    return angle < 1 and 1 / math.cos(angle) - 1 < _TOLERANCE_AT_SHAPE


def _absolute(convolution: _Convolution, sizes: _Sizes | None) -> float:
    return up(_schur(convolution.folded) * convolution.factor(sizes))


def _schur(weight: Tensor) -> float:
    """√(largest row sum · largest column sum) of absolute values, largest group."""
    columns, rows = weight.abs().flatten(3).sum(-1).sum(1), weight.abs().flatten(2).sum(-1)
    product = (columns.amax(1) * rows.amax(1)).max()
    return up(math.sqrt(float(product)) * (1 + gamma(weight.numel() + 4, _U)))


def _symbol_bound(convolution: _Convolution, sizes: _Sizes | None) -> float:
    """‖R‖‖E‖ max σ₁(K̂) over the torus, or over the best of several grids where the sizes are small."""
    factor, symbol = convolution.factor(sizes), _Symbol(convolution.folded)
    if not any(symbol.radii):
        one_tap = _Convolution(convolution.folded.flatten(3), 0, (_POINT,), linear=True)
        return up(factor * _Gram(one_tap, ((1, 1),), _schur(one_tap.weight)).bound())
    best = top = _cover(symbol, _TOLERANCE if sizes is None else _TOLERANCE_AT_SHAPE)
    if sizes is not None and not _is_large(convolution, sizes):
        least = [axis.embedding(n, m)[:2] for axis, (n, m) in zip(convolution.axes, sizes, strict=True)]
        for grid in _grids(least, top[1]):
            best = min(best, _cover(symbol, _TOLERANCE_AT_SHAPE, grid, top, best[0]))
    return up(factor * best[0])


def _grids(least: list[tuple[int, bool]], peak: list[float]) -> list[_Grid]:
    """Grids (N, θ) per axis that are all sound; where an axis is free, those that straddle the peak are the lowest."""
    astride = tuple(_astride(n, w) if free else (n, 0.0) for (n, free), w in zip(least, peak, strict=True))
    choices = [[(n, 0.0), (n, 0.5)] if free else [(n, 0.0)] for n, free in least]
    return list(dict.fromkeys([astride, *itertools.product(*choices)]))


def _astride(least: int, peak: float) -> tuple[int, float]:
    """The grid (N ≥ least, θ in {0, 1/2}) whose points stay farthest from ±peak."""

    def distance(grid: tuple[int, float]) -> float:
        n, offset = grid
        place = n * peak / (2 * math.pi) - offset
        return abs(place - round(place)) / n

    return max(itertools.product(range(least, 2 * least), (0.0, 0.5)), key=distance)


class _Symbol:
    """K̂ᴴK̂(ω) of a folded kernel (groups, out, in, *taps), transposed if need be so that this Gram matrix is the smaller one.

    It is a polynomial itself, Σ_w S_w e^{-iω·w} with S_w = Σ_u K_uᵀK_{u+w}; S_{-w} = S_wᵀ leaves half of the w.
    """

    def __init__(self, weight: Tensor) -> None:
        if weight.shape[1] < weight.shape[2]:
            weight = weight.transpose(1, 2)
        groups, rows, columns, *sizes = weight.shape
        self.shape = (groups, columns, columns)
        self.radii = [(k - 1) / 2 for k in sizes]
        taps = torch.cartesian_prod(*(torch.arange(k) for k in sizes)).view(-1, len(sizes))
        places = torch.tensor([math.prod(2 * k - 1 for k in sizes[i + 1 :]) for i in range(len(sizes))])
        middle = math.prod(2 * k - 1 for k in sizes) // 2
        sums = torch.zeros(middle + 1, groups, columns, columns, dtype=torch.float64)
        kernel = weight.flatten(3).permute(3, 0, 1, 2)
        for tap, part in zip(taps, kernel, strict=True):
            which = (taps - tap) @ places  # w, numbered; those after the middle one are left out
            sums.index_add_(0, which[which >= 0], part.mT @ kernel[which >= 0])
        ones = torch.tensor([k - 1 for k in sizes])
        every = torch.cartesian_prod(*(torch.arange(2 * k - 1) for k in sizes)).view(-1, len(sizes)) - ones
        self.shifts = every[middle:].double()
        self.even = torch.cat([sums[:1], sums[1:] + sums[1:].mT]).flatten(1)
        self.odd = (sums[1:].mT - sums[1:]).flatten(1)
        self.flops = 4.0 * groups * columns * columns * (columns + len(self.shifts))  # at one frequency
        size = float(
            weight.abs().flatten(3).sum(-1).flatten(1).norm(dim=1).max()
        )  # ‖Σ_u |K_u|‖_F, so ‖K̂‖ is never more
        # of S_w, then of the sum over w; phases: the error of the angle, and of its cosine
        self.slack = (4 * gamma(rows * len(taps) + len(every) + 8, _U) + _U * (256 * sum(sizes) + 256)) * size**2
        self.size = size
        self.at_once = max(1, int(_CHUNK / math.prod(self.shape)))

    def inflate(self, c: float) -> float:
        """c enlarged by all that rounding can hide, where every factorisation completed had c/2 ≤ t ≤ c.

        The true σ₁ at a centre is at most √(t² + Δ), and t ↦ M cos(arccos(t/M) - ρ) does not stretch.
        """
        columns = self.shape[2]
        squared = self.slack + (4 * gamma(4 * columns + 8, _U) * columns + 4 * _U) * c**2
        return up(c * (1 + 64 * _U) + 2 * min(math.sqrt(squared), squared / c), 8)

    def gram(self, frequency: Tensor) -> Tensor:
        """K̂(ω)ᴴK̂(ω) for ω (points, axes): (points, groups, in, in)."""
        angle = frequency @ self.shifts.T
        real, imaginary = angle.cos() @ self.even, angle[:, 1:].sin() @ self.odd
        return torch.complex(real, imaginary).view(-1, *self.shape)


class _Torus:
    """Boxes, all of one size, that cover the frequencies up to sign, ω and -ω alike.

    Where two axes have the same radius r, a box is a diamond in them: a square of half-width h in p, q = r(ω_i ± ω_j), whose
    ρ = r(|δ_i| + |δ_j|) ≤ max(|δp|, |δq|) is h: half as many as of squares in ω. Up to periods and sign, p in [0, 4πr] and
    q in [0, πr] are all.
    """

    filled = True

    def __init__(self, radii: list[float]) -> None:
        axes = len(radii)
        pair = next(((i, j) for i, j in itertools.combinations(range(axes), 2) if radii[i] == radii[j] > 0), ())
        self.basis = torch.eye(axes, dtype=torch.float64)
        self.units: list[tuple[list[int], float]] = [([i], radii[i]) for i in range(axes) if i not in pair]
        length = torch.full((axes,), 2 * math.pi, dtype=torch.float64)
        if pair:
            i, j = pair
            r = radii[i]
            self.units.append(([i, j], 1.0))
            self.basis[i, i] = self.basis[i, j] = self.basis[j, i] = 1 / (2 * r)
            self.basis[j, j] = -1 / (2 * r)
            length[i], length[j] = 4 * math.pi * r, math.pi * r
        else:
            length[next((i for i in range(axes) if radii[i]), 0)] = math.pi
        share = _COARSEST / max(1, sum(factor > 0 for _, factor in self.units))
        count = [1] * axes
        for unit, factor in self.units:
            shortest = min(float(length[i]) for i in unit)
            cells = max(1, math.ceil(factor * shortest / (2 * share)))
            for i in unit:
                count[i] = cells * round(float(length[i]) / shortest)
        self.half = length / torch.tensor(count) / 2
        grids = [(2 * torch.arange(n, dtype=torch.float64) + 1) * h for n, h in zip(count, self.half, strict=True)]
        self.centre = torch.cartesian_prod(*grids).view(-1, axes)

    def __len__(self) -> int:
        return len(self.centre)

    def centres(self) -> tuple[Tensor, Tensor]:
        """ω and ρ of every box."""
        rho = sum(factor * self.half[unit[0]] for unit, factor in self.units)
        return self.centre @ self.basis, torch.full((len(self),), float(rho), dtype=torch.float64)

    def split(self, keep: Tensor) -> None:
        """Those of ``keep``, halved along what adds most to ρ; the others are gone."""
        self.centre, extent = self.centre[keep], [factor * float(self.half[unit[0]]) for unit, factor in self.units]
        for (unit, _), e in zip(self.units, extent, strict=True):
            for i in unit if e > 0.51 * max(extent) else ():
                self.half[i] /= 2
                self.centre = torch.cat([self.centre, self.centre])
                self.centre[: len(self) // 2, i] -= self.half[i]
                self.centre[len(self) // 2 :, i] += self.half[i]


class _Cells:
    """Boxes that cover the points 2π(j + θ)/N, each ending at its outer points; half of the first axis is enough."""

    filled = False

    def __init__(self, radii: list[float], grid: _Grid) -> None:
        self.cell = torch.tensor([2 * math.pi / n for n, _ in grid], dtype=torch.float64)
        self.offset = torch.tensor([theta for _, theta in grid], dtype=torch.float64)
        self.weight = self.cell * torch.tensor(radii, dtype=torch.float64)
        self.start, self.length = torch.zeros(1, len(grid), dtype=torch.int64), torch.tensor([[n for n, _ in grid]])
        first, theta = grid[0]
        self.length[0, 0] = first // 2 + 1 if theta == 0 else (first + 1) // 2
        while float(self.centres()[1].max()) > _COARSEST:
            self.split(torch.ones(len(self), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.start)

    def centres(self) -> tuple[Tensor, Tensor]:
        reach = (self.length - 1).double() / 2
        return (self.start + reach + self.offset) * self.cell, reach @ self.weight

    def split(self, keep: Tensor) -> None:
        start, length = self.start[keep], self.length[keep]
        extent = (length.amax(0) - 1) * self.weight if len(start) else torch.zeros(0)
        for i in (extent > 0.51 * extent.max()).nonzero().flatten().tolist() if len(extent) else ():
            right = length[:, i] // 2
            moved, kept, shrunk = start.clone(), length.clone(), length.clone()
            kept[:, i] -= right
            moved[:, i] += kept[:, i]
            shrunk[:, i] = right
            start, length = torch.cat([start, moved[right > 0]]), torch.cat([kept, shrunk[right > 0]])
        self.start, self.length = start, length


def _cover(
    symbol: _Symbol,
    tolerance: float,
    grid: _Grid | None = None,
    ceiling: tuple[float, list[float]] = (math.inf, []),
    below: float = math.inf,
) -> tuple[float, list[float]]:
    """(c, ω): σ₁(K̂) ≤ c, within about ``tolerance`` of the largest, near ω; on the torus, or on the grid 2π(j + θ)/N.

    A grid needs the torus's own answer as ``ceiling``; it is given back where the grid is too dear or no better than
    ``below``. As K̂(-ω) is the conjugate of K̂(ω), half of the frequencies are enough.
    """
    if grid is None:
        boxes = _Torus(symbol.radii)
        step = boxes.centres()[1][0] / 2 / torch.tensor(symbol.radii).double()
        highest, where, values = _climb(symbol, boxes.centres()[0], step.where(step.isfinite(), 0.0))
    else:  # the grid's points about ±peak
        boxes, peak = _Cells(symbol.radii, grid), torch.tensor(ceiling[1], dtype=torch.float64)
        corners = torch.cartesian_prod(*(torch.arange(2.0, dtype=torch.float64) for _ in grid)).view(-1, len(grid))
        nearest = [(sign * peak / boxes.cell - boxes.offset).floor() + corners + boxes.offset for sign in (1, -1)]
        highest, where = _largest(symbol.gram(torch.cat(nearest) * boxes.cell)), peak
        values = torch.zeros(len(boxes), dtype=torch.float64)
    target = max(1e-7 * symbol.size, highest * (1 + tolerance))
    while len(boxes):
        if not boxes.filled and (target >= below or len(boxes) * symbol.flops > _SYMBOL_FLOPS):
            return ceiling
        frequency, rho = boxes.centres()
        dear = boxes.filled and 2 ** frequency.shape[1] * len(boxes) * symbol.flops > _SYMBOL_FLOPS
        closed = torch.zeros(len(boxes), dtype=torch.bool)
        hopeful = (values <= _allowed(target, rho, ceiling[0]) ** 2).nonzero().flatten()
        for chunk in hopeful.split(symbol.at_once):
            gram, left = symbol.gram(frequency[chunk]), torch.arange(len(chunk))
            while True:
                allowed = _allowed(target, rho[chunk[left]], ceiling[0])
                passed = (allowed >= target / 2) & _positive_definite(allowed**2, gram[left])
                closed[chunk[left[passed]]] = True
                left, allowed = left[~passed], allowed[~passed]
                final = allowed >= target * (1 - (_LOOSEST if dear else tolerance / 4))
                if not final.any():
                    break
                # no use in splitting these: what is asked is too little
                target = (1 + tolerance / 2) * max(target, _largest(gram[left[final]]))
        boxes.split(~closed)
        values = torch.zeros(len(boxes), dtype=torch.float64)  # not estimated: nearly all of the small boxes pass
    return symbol.inflate(target), where.tolist()


def _allowed(c: float, rho: Tensor, ceiling: float) -> Tensor:
    """The largest σ₁ at a centre that keeps a box of angle ρ below c: M cos(arccos(c/M) + ρ), M the ceiling, or c."""
    away = math.sqrt((ceiling - c) * (ceiling + c)) if c < ceiling < math.inf else 0.0
    return c * rho.cos() - away * rho.sin()


def _power(gram: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """About the largest eigenvalue over the groups (points,) of (points, groups, n, n), and the vectors."""
    for _ in range(steps):
        vector = gram @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(1e-300))
    return torch.linalg.vector_norm(vector, dim=(-2, -1)).amax(1), vector


def _random(gram: Tensor) -> Tensor:
    vector = torch.randn(gram.shape[-1], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return vector.to(gram.dtype).expand(*gram.shape[:-1], 1)


def _largest(gram: Tensor) -> float:
    """About the largest σ₁ = √λ of all. No bound."""
    likely = _power(gram, _random(gram), 8)[0].topk(min(4, len(gram))).indices
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram[likely])[..., -1].max())))


def _climb(symbol: _Symbol, frequency: Tensor, step: Tensor) -> tuple[float, Tensor, Tensor]:
    """About the largest σ₁(K̂) on the torus and where, by pattern search from the best of the given places. No bound.

    Also, about, σ₁² at these places.
    """
    around = torch.cartesian_prod(*(torch.tensor([0.0, -1.0, 1.0] if h > 0 else [0.0]).double() for h in step))
    around = around.view(-1, len(step)) * step
    values = []
    for part in frequency.split(symbol.at_once):
        gram = symbol.gram(part)
        values.append(_power(gram, _random(gram), 8)[0])
    values = torch.cat(values)
    place = frequency[values.topk(min(3, len(values))).indices]
    vector = _random(symbol.gram(place))
    value = values[:1]
    for _ in range(6):
        tried = (place[:, None] + around).flatten(0, 1)
        value, vector = _power(symbol.gram(tried), vector.repeat_interleave(len(around), 0), 5)
        best = value.view(len(place), -1).argmax(1) + torch.arange(len(place)) * len(around)
        place, vector, value, around = tried[best], vector[best], value[best], around / 2
    return _largest(symbol.gram(place)), place[value.argmax()], values


def _positive_definite(c: Tensor, gram: Tensor) -> Tensor:
    """Whether the Cholesky factorisation of cI - G runs to completion, for c (points,), G (points, groups, n, n)."""
    shifted = -gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(c[:, None, None])
    factor, info = torch.linalg.cholesky_ex(shifted)
    return ((info == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)).all(-1)


def _boxes(convolution: _Convolution, sizes: _Sizes) -> list[tuple[int, int]]:
    """(N, p) per axis: N frequencies, and the length p of the box that holds inputs and outputs, of tap k//2 at each other's
    place; empty where that is not worked out: for strides, dilations and paddings other than zeros."""
    boxes = []
    for axis, (n, m) in zip(convolution.axes, sizes, strict=True):
        if (axis.stride, axis.dilation, axis.mode) != (1, 1, "zeros"):
            return []
        middle = axis.taps // 2
        p = max(axis.lo + n, middle + m) - min(axis.lo, middle)
        boxes.append((max(axis.embedding(n, m)[0], p) + p // 2, p) if axis.taps > 1 else (1, 1))
    return boxes


def _fits(convolution: _Convolution, sizes: _Sizes) -> bool:
    return 0 < 4 * math.prod(p for _, p in _boxes(convolution, sizes) or [(0, 0)]) <= _COMPRESSED_ORDER


def _compression_bound(convolution: _Convolution, sizes: _Sizes, enough: float) -> float:
    """‖A‖ by Schur complements of the symbol (see above), largest group; inf where it fails.

    ``enough`` is a bound that is known: nothing is done where it is within 5e-4 of an estimate.
    """
    bound = 0.0
    for weight in convolution.weight.split(1):
        largest = float(weight.abs().max())
        if not largest:
            continue
        unit = 2.0 ** math.floor(
            math.log2(largest)
        )  # each group in a unit of its own: one may be far smaller than another
        group = replace(convolution, weight=weight / unit)
        estimate = _lanczos(*group.normal(sizes))
        better = enough / unit > estimate * (1 + 5e-4)
        bound = max(bound, _group_bound(group, sizes, estimate) * unit if better else enough)
    return bound


def _group_bound(convolution: _Convolution, sizes: _Sizes, estimate: float) -> float:
    """The same for one group, with c a little above ``estimate``: a bound whatever that is."""
    boxes, c = _boxes(convolution, sizes), estimate * (1 + _MARGIN)
    weight = convolution.weight[0].flatten(2)
    rows, columns, taps = weight.shape
    d = min(rows, columns, _MOST_KEPT, _COMPRESSED_ORDER // (2 * math.prod(p for _, p in boxes)))
    u, v = _principal(convolution, sizes)
    kernel = torch.einsum("or,oct,cs->rst", u, weight, v)
    moved = (
        torch.einsum("or,oc,cs->rs", u.abs(), weight.abs().sum(2), v.abs()).norm() * 4 * gamma(rows + columns + 8, _U)
    )
    # of UᵀU - I and VᵀV - I, measured; what rounding hides of them is far below their own
    skew = sum(
        float((q.T @ q - torch.eye(len(q), dtype=q.dtype)).norm()) + 2 * gamma(len(q) + 2, _U) * len(q) for q in (u, v)
    )
    if not skew < 1e-6:
        return math.inf

    counts = [(n // 2 + 1 if i == 0 else n) for i, (n, _) in enumerate(boxes)]
    numbers = torch.cartesian_prod(*(torch.arange(count) for count in counts)).view(-1, len(boxes))
    places = [torch.arange(axis.taps) - axis.taps // 2 for axis in convolution.axes]
    places = torch.cartesian_prod(*places).view(-1, len(boxes))
    grid = torch.tensor([n for n, _ in boxes])
    symbols, q = [], rows + columns - 2 * d
    rounding = 0.0
    for chunk in numbers.split(max(1, int(_CHUNK / (rows + columns) ** 2))):
        angle = 2 * math.pi * ((chunk[:, None] * places % grid).double() / grid).sum(2)
        k = torch.polar(torch.ones_like(angle), angle) @ kernel.permute(2, 0, 1).flatten(1).to(torch.complex128)
        k = k.view(-1, rows, columns)
        inner = _dilated(-k[:, d:, d:])
        inner.diagonal(dim1=1, dim2=2).add_(c)
        coupling = k.new_zeros(len(k), q, 2 * d)
        coupling[:, : rows - d, d:], coupling[:, rows - d :, :d] = k[:, d:, :d], k[:, :d, d:].mH
        factor, info = torch.linalg.cholesky_ex(inner)
        if info.any() or not factor.diagonal(dim1=1, dim2=2).isfinite().all():
            return math.inf
        part = torch.linalg.solve_triangular(factor, coupling, upper=False)
        symbols.append(_dilated(k[:, :d, :d]) + part.mH @ part)
        traces = part.abs().square().sum((1, 2)) + k.abs().square().sum((1, 2)).sqrt() * 2 * d
        rounding = max(rounding, 2 * (q * c + float(traces.max())) * 4 * gamma(4 * (q + 2 * d) + 8, _U))
    symbol = torch.cat(symbols).view(*counts, 2 * d, 2 * d)
    matrix = _toeplitz(symbol, boxes)
    top = _lanczos(lambda x: matrix @ x, len(matrix), 80) ** 2
    for margin in (1e-5, 1e-4, 1e-3):
        c = max(c, top * (1 + margin))
        if _positive_definite(torch.tensor([c], dtype=torch.float64), matrix[None, None])[0]:
            break
    else:
        return math.inf
    size = float(kernel.abs().sum(2).norm())
    rounding += _U * (2 * taps + 64 * sum(convolution.weight.shape[3:]) + 64) * size  # of K̂
    rounding += (4 * gamma(len(matrix) + 2, _U) * len(matrix) + 4 * _U) * c
    entry = gamma(4 * sum(n for n, _ in boxes) + 64, _U) * 2 * float(symbol.abs().max())
    rounding += math.prod(2 * p - 1 for _, p in boxes) * 2 * d * entry + float(moved)
    return up((c + rounding) * (1 + 2 * skew), 8)


def _dilated(k: Tensor) -> Tensor:
    """[0 K; Kᴴ 0]."""
    rows, columns = k.shape[1:]
    out = k.new_zeros(len(k), rows + columns, rows + columns)
    out[:, :rows, rows:], out[:, rows:, :rows] = k, k.mH
    return out


def _principal(convolution: _Convolution, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Orthogonal (out, out) and (in, in): channels by what they hold of A's leading singular vectors, the most first.

    By subspace iteration in float32: any two bases are right, these make the bound tight.
    """
    single = replace(convolution, weight=convolution.weight.float())
    shape = (_SUBSPACE, convolution.weight.shape[2], *(n for n, _ in sizes))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for _ in range(30):
        x = torch.linalg.qr(x.flatten(1).T)[0].T.reshape(-1, *shape[1:]).requires_grad_()
        with torch.enable_grad():
            y = single.apply(x, sizes)
            (ahead,) = torch.autograd.grad(y, x, y.detach())
        x, last, y = ahead, x.detach(), y.detach()
    squares, turn = torch.linalg.eigh((y.flatten(1) @ y.flatten(1).T).double())
    weights = (squares / squares[-1]).clamp_min(0) ** 10
    bases = []
    for vectors in (y, last):
        parts = (turn.T @ vectors.flatten(1).double()).view(len(turn), vectors.shape[1], -1)
        covariance = torch.einsum("mcp,mdp,m->cd", parts, parts, weights)
        bases.append(torch.linalg.eigh(covariance)[1].flip(1))
    return bases[0], bases[1]


def _toeplitz(symbol: Tensor, boxes: list[tuple[int, int]]) -> Tensor:
    """The compression to the box of the cyclic operator with this symbol on the grid (half of its first axis): symmetric."""
    coefficients, order = symbol, symbol.shape[-1]
    for i, (n, p) in enumerate(boxes):
        w, j = torch.arange(1 - p, p), torch.arange(symbol.shape[i])
        angle = 2 * math.pi * ((w[:, None] * j) % n).double() / n
        share = torch.full((len(j),), 1.0 / n, dtype=torch.float64)
        if i == 0:
            share[(j > 0) & (2 * j < n)] *= 2  # for the conjugate half
        wave = torch.polar(share.expand(len(w), -1).contiguous(), angle)
        coefficients = torch.tensordot(wave, coefficients.movedim(i, 0), 1).movedim(0, i)
    matrix = coefficients.real
    for i, (_, p) in enumerate(boxes):
        away = torch.arange(p)[:, None] - torch.arange(p) + p - 1
        matrix = matrix.index_select(2 * i, away.flatten()).unflatten(2 * i, (p, p))
    axes = range(0, 2 * len(boxes) + 2, 2)
    size = order * math.prod(p for _, p in boxes)
    return matrix.permute(*axes, *(i + 1 for i in axes)).reshape(size, size)


class _Gram:
    """G = AᵀA or AAᵀ, whichever is cheaper, ordered along one axis in slabs so wide that only neighbours couple.

    Per axis and tap, S_u (outputs x inputs) says which pixel a tap meets: A = Σ_u K_u ⊗ S_u₁ ⊗ S_u₂ …, so that
    G = Σ_{u,u'} K_uᵀK_u' ⊗ S_u₁ᵀS_u'₁ ⊗ …, formed without A; the S are exact whole numbers.
    """

    def __init__(self, convolution: _Convolution, sizes: _Sizes, absolute: float) -> None:
        self.convolution, self.sizes, self.absolute = convolution, sizes, absolute
        plans = [self._plan(rowwise, i) for rowwise in (False, True) for i in range(len(sizes))]
        self.flops, self.rowwise, self.axis, self.width = min(plans)

    def _plan(self, rowwise: bool, i: int) -> tuple[float, bool, int, int]:
        """(operations, G = AAᵀ?, axis, width of a slab)."""
        groups, order, n = self.convolution.weight.shape[0], self._order(rowwise), self.sizes[i][rowwise]
        taps = self.convolution.weight.shape[3:]
        if order <= _SMALL:
            width = n
        else:
            band = _Incidence.of(self.convolution.axes[i], *self.sizes[i], rowwise).band
            width = min(n, max(1, band, _SLAB * n // order))
        slabs, block, slice_ = -(-n // width), order // n * width, order // n * taps[i]
        flops = groups * block**3 * (2.0 * slabs if slabs > 1 else 1.0)
        taps_squared = (self.convolution.weight.shape[1 if rowwise else 2] * math.prod(taps)) ** 2
        fits = groups * max(block**2, slice_**2, taps_squared) <= _ENTRIES and groups * order <= _ORDER
        return flops if fits or self.convolution.linear else math.inf, rowwise, i, width

    def _order(self, rowwise: bool) -> int:
        return self.convolution.weight.shape[1 if rowwise else 2] * math.prod(size[rowwise] for size in self.sizes)

    def bound(self) -> float:
        """√c for the least c tried for which cI - G is proved positive semi-definite; inf if none is."""
        estimate, floor = self.estimate**2, 1e-13 * self.absolute**2
        precise = self._order(self.rowwise) <= _SMALL
        for margin in (1e-12, 1e-9, 1e-6, 1e-3, 1e-1) if precise else (2e-4, 2e-3, 2e-2):
            c = max(floor, estimate * (1 + margin))
            if self._proves(c):
                return up(math.sqrt(c + self._slack(c)))
        return math.inf

    def _slack(self, c: float) -> float:
        """What rounding can hide: in forming G, in cI - G, in the factorisation (four times what theory asks)."""
        weight, order = self.convolution.weight, self._order(self.rowwise)
        inner = weight.shape[2 if self.rowwise else 1] + sum(k * k + 2 for k in weight.shape[3:])
        return up((2 * gamma(inner, _U) + 4 * _U) * self.absolute**2 + (4 * gamma(order + 2, _U) * order + 4 * _U) * c)

    def _proves(self, c: float) -> bool:
        diagonal, upper = self.slabs
        coupling: list[tuple[int, int, Tensor]] = []  # columns from, rows from, the rest
        for j, block in enumerate(diagonal):
            shifted = -block
            shifted.diagonal(dim1=1, dim2=2).add_(c)
            for (at, top, right), (at_, top_, left) in itertools.combinations_with_replacement(coupling, 2):
                low = max(top, top_)  # only the lower triangle is read
                part = shifted[:, at_ : at_ + left.shape[2], at : at + right.shape[2]]
                part -= left[:, low - top_ :].mT @ right[:, low - top :]
            factor, info = torch.linalg.cholesky_ex(shifted)
            if info.any() or not factor.diagonal(dim1=1, dim2=2).isfinite().all():
                return False
            coupling = []
            for at, top, part in self._coupled[id(upper[j])] if j < len(upper) else ():
                coupling.append((at, top, torch.linalg.solve_triangular(factor[:, top:, top:], -part, upper=False)))
        return True

    @cached_property
    def _coupled(self) -> dict[int, list[tuple[int, int, Tensor]]]:
        """The blocks above the diagonal, by place in memory, in strips of columns (from, rows from, what is not zero)."""
        strips: dict[int, list[tuple[int, int, Tensor]]] = {}
        for block in self.slabs[1]:
            if id(block) not in strips:
                pixel = self._order(self.rowwise) // self.sizes[self.axis][self.rowwise]
                wide, strips[id(block)] = max(pixel, -(-block.shape[2] // (4 * pixel)) * pixel), []
                for at in range(0, block.shape[2], wide):
                    part = block[:, :, at : at + wide]
                    rows = part.any(2).any(0).nonzero()
                    if len(rows):
                        strips[id(block)].append((at, int(rows[0]), part[:, int(rows[0]) :].contiguous()))
        return strips

    @cached_property
    def estimate(self) -> float:
        """About ‖A‖: from the eigenvalues of a small G, else by Lanczos, from below. No bound."""
        order = self._order(self.rowwise)
        if order <= _SMALL:
            return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(self.slabs[0][0])[:, -1].max())))
        groups = self.convolution.weight.shape[0]
        if self.convolution.linear:
            gram = self.slabs[0][0]
            return _lanczos(lambda x: (gram @ x.view(groups, order, 1)).flatten(), groups * order)
        return _lanczos(*self.convolution.normal(self.sizes), 80)

    @cached_property
    def slabs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The diagonal blocks of G and those above them, each (groups, b, b'); equal ones are one tensor."""
        weight = self.convolution.weight.transpose(1, 2) if self.rowwise else self.convolution.weight
        ordered = [self.axis, *(i for i in range(len(self.sizes)) if i != self.axis)]
        weight = weight.permute(0, 1, 2, *(3 + i for i in ordered))
        slabbed, *others = (_Incidence.of(self.convolution.axes[i], *self.sizes[i], self.rowwise) for i in ordered)

        groups, _, channels, *taps = weight.shape
        flat = weight.flatten(2)
        product = (flat.mT @ flat).view(groups, channels, *taps, channels, *taps)
        paired = [i for axis in range(len(taps)) for i in (2 + axis, 3 + len(taps) + axis)]
        product = product.permute(0, 1, 2 + len(taps), *paired)
        product = product.reshape(groups, channels, channels, *(k * k for k in taps))
        for incidence in others:
            every = incidence.dense(0, incidence.pixels)
            product = product.movedim(4, -1) @ _overlap(every, every).flatten(2).flatten(0, 1)

        made: dict[tuple[object, ...], Tensor] = {}

        def block(i: int, j: int) -> Tensor:
            overlap = _overlap(*(slabbed.dense(k * self.width, (k + 1) * self.width) for k in (i, j)))
            key = (*overlap.shape, overlap.numpy().tobytes())
            if key not in made:
                sides = [(incidence.pixels, incidence.pixels) for incidence in others] + [overlap.shape[2:]]
                entries = product.movedim(3, -1) @ overlap.flatten(2).flatten(0, 1)
                entries = entries.view(groups, channels, channels, *(n for side in sides for n in side))
                last = entries.ndim - 1  # the slab's own axis comes first, so that far pixels' zeros lie together
                entries = entries.permute(0, last - 1, 1, *range(3, last - 1, 2), last, 2, *range(4, last, 2))
                made[key] = entries.reshape(groups, channels * math.prod(n for n, _ in sides), -1)
            return made[key]

        count = -(-slabbed.pixels // self.width)
        return [block(j, j) for j in range(count)], [block(j, j + 1) for j in range(count - 1)]


@dataclass(frozen=True)
class _Incidence:
    """The ones of S_u (others x pixels) on one axis, sorted by pixel: a pixel is an input, or an output if rowwise."""

    tap: np.ndarray
    other: np.ndarray
    pixel: np.ndarray
    taps: int
    others: int
    pixels: int

    @classmethod
    def of(cls, axis: _Axis, n: int, m: int, rowwise: bool) -> _Incidence:
        tap, output = (x.ravel() for x in np.meshgrid(np.arange(axis.taps), np.arange(m), indexing="ij"))
        source = axis.sources(n)[axis.stride * output + axis.dilation * tap]
        tap, output, source = tap[source >= 0], output[source >= 0], source[source >= 0]
        (other, others), (pixel, pixels) = ((source, n), (output, m)) if rowwise else ((output, m), (source, n))
        order = np.argsort(pixel, kind="stable")
        return cls(tap[order], other[order], pixel[order], axis.taps, others, pixels)

    @cached_property
    def band(self) -> int:
        """The largest distance of two pixels that share an other, so that G couples them."""
        first, last = np.full(self.others, self.pixels), np.full(self.others, -1)
        np.minimum.at(first, self.other, self.pixel)
        np.maximum.at(last, self.other, self.pixel)
        return int((last - first).max(initial=0))

    def dense(self, start: int, stop: int) -> tuple[int, Tensor]:
        """(o, S) with S (taps, others from o on that are met, pixels from start to stop)."""
        stop = min(stop, self.pixels)
        part = slice(*np.searchsorted(self.pixel, [start, stop]))
        tap, other, pixel = self.tap[part], self.other[part], self.pixel[part]
        low = int(other.min(initial=self.others))
        ones = torch.zeros(self.taps, max(0, int(other.max(initial=-1)) + 1 - low), stop - start, dtype=torch.float64)
        ones[tap, other - low, pixel - start] = 1.0
        return low, ones


def _overlap(a: tuple[int, Tensor], b: tuple[int, Tensor]) -> Tensor:
    """S_uᵀS_u' (taps, taps, pixels, pixels): how many others two pixels share through two taps."""
    (low, left), (low_, right) = a, b
    begin, end = max(low, low_), min(low + left.shape[1], low_ + right.shape[1])
    size = max(0, end - begin)
    left, right = left.narrow(1, begin - low if size else 0, size), right.narrow(1, begin - low_ if size else 0, size)
    return torch.einsum("uoi,voj->uvij", left, right)


def _lanczos(apply: Callable[[Tensor], Tensor], size: int, steps: int = 40) -> float:
    """√ of about the largest eigenvalue of a symmetric operator on R^size, from below."""
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis, diagonal, beside = [x / x.norm()], [], []
    while True:
        y = apply(basis[-1])
        diagonal.append(float(y @ basis[-1]))
        stacked = torch.stack(basis)
        for _ in range(2):  # once is not enough for orthogonality
            y = y - stacked.T @ (stacked @ y)
        norm = float(y.norm())
        if len(diagonal) == min(steps, size) or norm <= 1e-13 * abs(diagonal[0]):
            break
        beside.append(norm)
        basis.append(y / norm)
    tridiagonal = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(tridiagonal)[-1])))
