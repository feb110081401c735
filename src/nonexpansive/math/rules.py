"""Certificate rules for the layers of torch.nn, each with the true norm of what the layer does.

Pooling, padding and nearest upsampling act on each axis by itself, so their norm is the product of one small matrix's norm an
axis. That matrix is read off the layer by running it along one axis, which makes it right for every stride, padding,
dilation and ceil_mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import Refused
from nonexpansive.math.activation import REGISTERED, Slopes, slopes
from nonexpansive.math.bounds import absolute_norm_bound, norm_bound, terms
from nonexpansive.math.certificate import Certificate, Shape, chain, fold, from_enclosure, isometry, rule
from nonexpansive.math.enclosure import Affine, Enclosure, times
from nonexpansive.math.rounding import up

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_shape(module: nn.Module, shape: Shape) -> Shape:
    """The shape that the module gives for one sample of ``shape``, from its own forward run on meta tensors."""
    meta_state = {
        name: torch.empty_like(t, device="meta") for name, t in (*module.named_parameters(), *module.named_buffers())
    }
    try:
        out = torch.func.functional_call(module, meta_state, (torch.empty((1, *shape), device="meta"),), strict=False)
    except (RuntimeError, ValueError, IndexError) as error:
        raise Refused(f"{type(module).__name__} does not accept a sample of shape {shape}: {error}") from error
    return tuple(out.shape[1:])


def _euclidean(x: Tensor | None) -> float:
    """‖x‖ from above, in float64."""
    if x is None:
        return 0.0
    x = x.detach().double()
    return up(float(x.norm()) * (1 + (x.numel() + 2) * 2.0**-53))


# ------------------------------------------------------------------------------------------------------------ linear layers


@rule(nn.Linear, *CONVOLUTIONS)
def _linear(module: nn.Linear | nn.Conv2d, shape: Shape, unit: float) -> Certificate:
    codomain = output_shape(module, shape)
    norm = norm_bound(module, shape)
    positions = math.prod(codomain) // (codomain[-1] if isinstance(module, nn.Linear) else codomain[0])
    bias = up(_euclidean(module.bias) * up(positions**0.5))
    absolute = absolute_norm_bound(module) if unit else 0.0
    out = Enclosure.input(unit).linear(norm, absolute, terms(module)[0], math.prod(codomain), bias)
    name = type(module).__name__.removeprefix("Parametrized")
    return from_enclosure(out, lipschitz=norm, averaged=None, domain=shape, codomain=codomain, rule=f"{name}, norm bound")


# ------------------------------------------------------------------------------------------------------- elementwise functions


def averagedness_of_slopes(slope: Slopes) -> float | None:
    """A function with slopes in [low, 1] is (1 - low)/2-averaged: (σ - (1-α)I)/α then has slopes in [-1, 1]."""
    if slope.high > 1 or slope.low <= -1:
        return None
    return up((1 - slope.low) / 2) if slope.low < 1 else 0.0


@rule(*REGISTERED)
def elementwise(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """The rule of every elementwise activation: L = max|slope|."""
    slope = slopes(module)
    return from_enclosure(
        Enclosure.input(unit).elementwise(slope, math.prod(shape)),
        lipschitz=slope.lipschitz,
        averaged=averagedness_of_slopes(slope),
        domain=shape,
        codomain=shape,
        rule=f"{type(module).__name__}, slopes in [{slope.low:g}, {slope.high:g}]",
        assumptions=slope_assumptions(slope, unit),
    )


def slope_assumptions(slope: Slopes, unit: float) -> tuple[str, ...]:
    """What the certificate of a floating-point program takes for granted about an elementwise function."""
    return (slope.assumption,) if slope.assumption and (unit or slope.absolute) else ()


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: nn.BatchNorm2d, shape: Shape, unit: float) -> Certificate:
    if module.training or module.running_mean is None or module.running_var is None:
        raise Refused(
            f"{type(module).__name__} normalises by the batch, so a sample's output depends on the others: "
            "call .eval() (and keep track_running_stats=True) before certifying."
        )
    if bool((module.running_var < 0).any()):
        raise Refused(f"{type(module).__name__} holds a negative running variance")
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -module.running_mean.double() * scale
    beta = module.bias.detach().double() if module.bias is not None else torch.zeros_like(shift)
    positions = up((math.prod(shape) / shape[0]) ** 0.5)
    high, low = float(scale.max()), float(scale.min())
    slope = Slopes(low - 1e-12 * abs(low), high + 1e-12 * abs(high), 0)
    lipschitz = max(abs(slope.low), abs(slope.high))
    size = up(_euclidean(shift + beta) * positions)
    # computed as (x - mean)·scale + β or as x·scale + shift: at most eight roundings of terms that add up to this
    spread = Affine(lipschitz, up((_euclidean(shift) + _euclidean(beta)) * positions))
    out = Enclosure(Affine(lipschitz, size), spread * up(8 * unit), unit)
    return from_enclosure(
        out,
        lipschitz=lipschitz,
        averaged=averagedness_of_slopes(slope),
        domain=shape,
        codomain=shape,
        rule=f"{type(module).__name__} in eval mode, an affine map",
    )


# ------------------------------------------------------------------------------------------------------ one matrix an axis

_POOLS: dict[type[nn.Module], int] = {
    nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3,
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
    nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3,
    nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3,
}  # fmt: skip


def _pick(value: int | Sequence[int] | None, axis: int) -> int | None:
    return value if value is None or isinstance(value, int) else value[axis]


def _spatial(module: nn.Module, shape: Shape, dimensions: int) -> Shape:
    if len(shape) != dimensions + 1:
        raise Refused(f"{type(module).__name__} needs a sample of {dimensions + 1} axes (channels first), not shape {shape}")
    return shape[1:]


def _average_on_axis(module: nn.Module, axis: int) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        kernel = _pick(module.kernel_size, axis)
        assert kernel is not None
        stride, padding = _pick(module.stride, axis), _pick(module.padding, axis)
        return lambda x: F.avg_pool1d(x, kernel, stride, padding or 0, module.ceil_mode, module.count_include_pad)
    size = _pick(module.output_size, axis)  # type: ignore[arg-type]
    return lambda x: F.adaptive_avg_pool1d(x, x.shape[-1] if size is None else size)


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _average(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    norm, window = 1.0, 1
    for axis, n in enumerate(_spatial(module, shape, _POOLS[type(module)])):
        matrix = _average_on_axis(module, axis)(torch.eye(n, dtype=torch.float64)[:, None])[:, 0].T
        norm = times(norm, _matrix_norm(matrix))
        window *= int((matrix != 0).sum(1).max())
    if getattr(module, "divisor_override", None):
        kernel = math.prod(_pick(module.kernel_size, axis) or 1 for axis in range(_POOLS[type(module)]))  # type: ignore
        if not module.count_include_pad or module.ceil_mode:
            raise Refused(f"{type(module).__name__} with divisor_override: set count_include_pad=True and ceil_mode=False")
        norm = up(norm * kernel / abs(int(module.divisor_override)))  # type: ignore[arg-type]
    codomain = output_shape(module, shape)
    out = Enclosure.input(unit).linear(norm, norm, window + 1, math.prod(codomain))
    return from_enclosure(
        out, lipschitz=norm, averaged=None, domain=shape, codomain=codomain, rule=f"{type(module).__name__}, norm of the averaging"
    )


def _matrix_norm(matrix: Tensor) -> float:
    """The norm of a small matrix with entries ≥ 0, from above: exact by counting where no two rows overlap, else by norm_bound."""
    overlapping = (matrix != 0).sum(0).max() > 1
    if not overlapping:
        return up(float(matrix.square().sum(1).max()) ** 0.5)
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.float64)
    linear.weight.data = matrix.contiguous()
    return norm_bound(linear)


def _windows_on_axis(module: nn.Module, axis: int, n: int) -> int:
    """The largest number of pooling windows that one entry of an axis of length n is in."""
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        kernel, stride = _pick(module.kernel_size, axis), _pick(module.stride, axis)
        padding, dilation = _pick(module.padding, axis), _pick(module.dilation, axis)
        assert kernel and stride and dilation and padding is not None
        outputs = F.max_pool1d(torch.zeros(1, 1, n), kernel, stride, padding, dilation, module.ceil_mode).shape[-1]
        starts = [i * stride - padding for i in range(outputs)]
        windows = [range(start, start + kernel * dilation, dilation) for start in starts]
    else:
        outputs = _pick(module.output_size, axis) or n  # type: ignore[arg-type]
        windows = [range(i * n // outputs, -(-(i + 1) * n // outputs)) for i in range(outputs)]
    counts = [0] * n
    for window in windows:
        for i in window:
            if 0 <= i < n:
                counts[i] += 1
    return max(counts)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _maximum(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """|max a - max b| ≤ max|a - b| ≤ ‖a - b‖ on each window; an entry in m windows counts m times: L = √m."""
    if getattr(module, "return_indices", False):
        raise Refused(f"{type(module).__name__} with return_indices=True has two outputs")
    axes = enumerate(_spatial(module, shape, _POOLS[type(module)]))
    windows = math.prod(_windows_on_axis(module, axis, n) for axis, n in axes)
    norm = 1.0 if windows <= 1 else up(windows**0.5)
    return Certificate(norm, None, shape, output_shape(module, shape), f"{type(module).__name__}, windows overlap {windows}-fold", Affine(norm))


def _copies(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """A map whose outputs are each one input entry (or a constant): its norm is √(the most copies of one entry)."""
    codomain = output_shape(module, shape)
    inner = shape[1:] if len(codomain) == len(shape) else shape
    copies = 1
    for axis, n in enumerate(inner):
        line = [1] * len(inner)
        line[axis] = n
        index = torch.arange(1, n + 1, dtype=torch.float64).reshape(1, 1, *line).expand(1, 1, *inner)
        picked = module(index).select(1, 0)[0]
        along = picked.movedim(axis, 0).flatten(1)
        # entries that padding by a constant wrote are not copies
        counts = torch.stack([torch.bincount(along[:, k].long().clamp(0, n), minlength=n + 1)[1:] for k in range(along.shape[1])])
        copies *= int(counts.max())
    norm = 1.0 if copies <= 1 else up(copies**0.5)
    return Certificate(norm, None, shape, codomain, f"{type(module).__name__}, copies an entry at most {copies} times", Affine(norm))


@rule(
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
def _padding(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    return _copies(module, shape, unit)


@rule(
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d
)  # fmt: skip
def _constant_padding(module: nn.ConstantPad2d, shape: Shape, unit: float) -> Certificate:
    codomain = output_shape(module, shape)
    constant = up(abs(float(module.value)) * up(math.prod(codomain) ** 0.5))
    return Certificate(1.0, None, shape, codomain, f"{type(module).__name__}, an isometry", Affine(1.0, constant))


@rule(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(module: nn.Upsample, shape: Shape, unit: float) -> Certificate:
    if module.mode not in ("nearest", "nearest-exact"):
        raise Refused(f"Upsample in mode {module.mode!r} has no rule: use mode='nearest', or a transposed convolution")
    return _copies(module, shape, unit)


# -------------------------------------------------------------------------------------------------- what costs nothing


@rule(nn.Identity)
def _identity(module: nn.Identity, shape: Shape, unit: float) -> Certificate:
    return isometry(shape, shape, "Identity", averaged=0.0)


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout(module: nn.Dropout, shape: Shape, unit: float) -> Certificate:
    if module.training:
        raise Refused(f"{type(module).__name__} is random in training mode: call .eval() before certifying")
    return isometry(shape, shape, f"{type(module).__name__} in eval mode, the identity", averaged=0.0)


@rule(nn.Flatten, nn.Unflatten)
def _reshape(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        raise Refused("Flatten with start_dim=0 mixes the samples of a batch: use start_dim=1")
    return isometry(shape, output_shape(module, shape), f"{type(module).__name__}, an isometry")


@rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def _permutation(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    return isometry(shape, output_shape(module, shape), f"{type(module).__name__}, an isometry")


@rule(nn.Sequential)
def _sequential(module: nn.Sequential, shape: Shape, unit: float) -> Certificate:
    parts: list[Certificate] = []
    for name, child in module.named_children():
        try:
            parts.append(fold(child, parts[-1].codomain if parts else shape, unit))
        except Refused as refusal:
            raise Refused(f"in layer {name} of Sequential: {refusal}") from refusal
    if not parts:
        return isometry(shape, shape, "Sequential, empty", averaged=0.0)
    return chain(*parts, rule="Sequential")
