"""Certificate rules for the layers of torch.nn, each with the true norm of what the layer does.

Pooling, padding and nearest upsampling act on each axis by itself, so their norm is the product of one small matrix's norm an
axis. That matrix is read off the layer by running it along one axis, which makes it right for every stride, padding,
dilation and ceil_mode. Squared norms that are fractions are kept as such, so that a norm of 1/2 or 2 is exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import Refused
from nonexpansive.math.activation import REGISTERED, Slopes, slopes
from nonexpansive.math.bounds import absolute_norm_bound, norm_bound, terms
from nonexpansive.math.certificate import Certificate, Shape, chain, entries, fold, from_enclosure, isometry, rule
from nonexpansive.math.enclosure import Affine, Enclosure, LinearMap
from nonexpansive.math.rounding import above, below, euclidean, plus, root, times, up

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def name_of(module: nn.Module) -> str:
    """The name of the module's type, that of torch where it is parametrized."""
    return type(module).__name__.removeprefix("Parametrized")


def dimensions(module: nn.Module) -> int:
    """1, 2 or 3: as torch names its layers, Conv1d or MaxPool3d."""
    return int(name_of(module)[-2])


def spatial(module: nn.Module, shape: Shape) -> Shape:
    """The axes of a sample of ``shape`` behind its channels. Refused unless there are as many as the layer's name says."""
    m = dimensions(module)
    if len(shape) != m + 1:
        raise Refused(f"{name_of(module)} needs a sample of {m + 1} axes (channels first), not shape {shape}")
    return shape[1:]


def output_shape(module: nn.Module, shape: Shape) -> Shape:
    """The shape that the module gives for one sample of ``shape``, from its own forward run on meta tensors.

    Refused unless the module accepts a batch of such samples and treats its first axis as the batch.
    """
    dtype = next((t.dtype for t in module.parameters() if t.is_floating_point()), torch.get_default_dtype())
    state = (*module.named_parameters(), *module.named_buffers())
    meta = {name: torch.empty_like(t, device="meta") for name, t in state}
    device = next((t.device for _, t in state), torch.device("cpu"))
    batch = (2, *shape)  # of two, so that a layer which takes the first axis for channels gives itself away
    with torch.no_grad():
        try:
            out = torch.func.functional_call(
                module, meta, (torch.empty(batch, device="meta", dtype=dtype),), strict=False
            )
        except Exception:  # a module of the user's may read its numbers, or hold tensors that are no state
            try:
                out = module(torch.zeros(batch, device=device, dtype=dtype))
            except Exception as error:
                raise Refused(f"{name_of(module)} does not accept a sample of shape {shape}: {error}") from error
    if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[0] != 2:
        raise Refused(f"{name_of(module)} does not map samples of shape {shape} to one tensor each")
    return tuple(out.shape[1:])


# ------------------------------------------------------------------------------------------------------------ linear layers


@rule(nn.Linear, *CONVOLUTIONS)
def _linear(module: nn.Linear | nn.Conv2d, shape: Shape, unit: float) -> Certificate:
    if not isinstance(module, nn.Linear):
        spatial(module, shape)
    return linear(module, shape, unit)


def linear(module: nn.Linear | nn.Conv2d, shape: Shape, unit: float, norm: float | None = None) -> Certificate:
    """The certificate of a linear layer of torch on samples of ``shape``; ``norm`` bounds its ‖A‖ (None: it is bounded here)."""
    codomain = output_shape(module, shape)
    norm = norm_bound(module, shape) if norm is None else norm
    absolute = absolute_norm_bound(module) if unit else 0.0
    x = Enclosure.input(unit, entries(shape))
    out = x.linear(LinearMap(norm, absolute, terms(module)[0], entries(codomain), bias_norm(module, codomain)))
    rule = f"{name_of(module)}, ‖A‖ ≤ {above(norm)}"
    return from_enclosure(out, lipschitz=norm, averaged=None, domain=shape, codomain=codomain, rule=rule)


def bias_norm(module: nn.Module, codomain: Shape) -> float:
    """‖b‖ over all positions of an output of that shape, for torch's linear layers."""
    features = codomain[-1] if isinstance(module, nn.Linear) else codomain[0]
    return times(euclidean(module.bias), root(entries(codomain) // features))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- elementwise functions


def averagedness_of_slopes(slope: Slopes) -> float | None:
    """A function with slopes in [low, 1] is (1 - low)/2-averaged: (σ - (1-α)I)/α then has slopes in [-1, 1]."""
    if slope.high > 1 or slope.low <= -1:
        return None
    return plus(1.0, -slope.low) / 2


@rule(*REGISTERED)
def elementwise(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """The rule of every elementwise activation: L = max|slope|."""
    slope = slopes(module)
    return from_enclosure(
        Enclosure.input(unit, entries(shape)).elementwise(slope),
        lipschitz=slope.lipschitz,
        averaged=averagedness_of_slopes(slope),
        domain=shape,
        codomain=shape,
        rule=f"{name_of(module)}, slopes in [{below(slope.low)}, {above(slope.high)}]",
        assumptions=slope_assumptions(slope, unit),
    )


def slope_assumptions(slope: Slopes, unit: float) -> tuple[str, ...]:
    """What the certificate of a floating-point program takes for granted about an elementwise function."""
    return (slope.assumption,) if slope.assumption and (unit or slope.absolute) else ()


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(module: nn.BatchNorm2d, shape: Shape, unit: float) -> Certificate:
    if module.training or module.running_mean is None or module.running_var is None:
        raise Refused(
            f"{name_of(module)} normalises by the batch, so a sample's output depends on the others: "
            "call .eval() (and keep track_running_stats=True) before certifying."
        )
    if not (isinstance(module, nn.BatchNorm1d) and len(shape) == 1):
        spatial(module, shape)
    if shape[0] != module.num_features:
        raise Refused(f"{name_of(module)} of {module.num_features} channels does not take a sample of shape {shape}")
    variance = module.running_var.double() + module.eps
    if not bool((variance > 0).all()):
        raise Refused(f"{name_of(module)} holds a running variance that is not positive")
    weight = torch.ones_like(variance) if module.weight is None else module.weight.detach().double()
    beta = torch.zeros_like(variance) if module.bias is None else module.bias.detach().double()
    scale = variance.rsqrt() * weight
    shift = -module.running_mean.double() * scale
    high, low = float(scale.max()), float(scale.min())
    slope = Slopes(low - 1e-12 * abs(low), high + 1e-12 * abs(high), 0)  # float64 was used to compute them
    positions = root(entries(shape) // shape[0])
    spread = Affine(slope.lipschitz, times(up(euclidean(shift) + euclidean(beta)), positions))
    size = Affine(slope.lipschitz, times(up(euclidean(shift + beta) + 1e-12 * spread.constant), positions))
    # computed as (x - mean)·scale + β or as x·scale + shift: at most eight roundings of terms that add up to ``spread``
    out = Enclosure(size, Affine(), unit, entries(shape)).rounded(spread, 8)
    return from_enclosure(
        out,
        lipschitz=slope.lipschitz,
        averaged=averagedness_of_slopes(slope),
        domain=shape,
        codomain=shape,
        rule=f"{name_of(module)} in eval mode, slopes in [{below(slope.low)}, {above(slope.high)}]",
    )


# ------------------------------------------------------------------------------------------------------ one matrix an axis


def _pick(value: int | Sequence[int] | None, axis: int) -> int | None:
    return value if value is None or isinstance(value, int) else value[axis]


def _average_on_axis(module: Any, axis: int) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
        kernel = _pick(module.kernel_size, axis)
        assert kernel is not None
        stride, padding = _pick(module.stride, axis), _pick(module.padding, axis)
        return lambda x: F.avg_pool1d(x, kernel, stride, padding or 0, module.ceil_mode, module.count_include_pad)  # type: ignore[arg-type]
    size = _pick(module.output_size, axis)
    return lambda x: F.adaptive_avg_pool1d(x, x.shape[-1] if size is None else size)


@rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _average(module: Any, shape: Shape, unit: float) -> Certificate:
    squared, factor, window = Fraction(1), 1.0, 1
    for axis, n in enumerate(spatial(module, shape)):
        matrix = _average_on_axis(module, axis)(torch.eye(n, dtype=torch.float64)[:, None])[:, 0].T
        window *= int((matrix != 0).sum(1).max())
        if (matrix != 0).sum(0).max() > 1:
            linear = nn.Linear(*reversed(matrix.shape), bias=False, dtype=torch.float64)
            linear.weight.data = matrix.contiguous()
            factor = times(factor, times(norm_bound(linear), 1 + 2.0**-50))  # the entries 1/k are rounded
        else:  # the rows are orthogonal, each with c entries of one size 1/k
            squared *= max(Fraction(int((row != 0).sum()), round(1 / float(row.max())) ** 2) for row in matrix)
    if getattr(module, "divisor_override", None):
        if not module.count_include_pad or module.ceil_mode:
            raise Refused(f"{name_of(module)} with divisor_override: set count_include_pad=True and ceil_mode=False")
        kernel = math.prod(_pick(module.kernel_size, axis) or 1 for axis in range(dimensions(module)))
        squared *= Fraction(kernel, int(module.divisor_override)) ** 2
    norm, codomain = times(root(squared), factor), output_shape(module, shape)
    out = Enclosure.input(unit, entries(shape)).linear(LinearMap(norm, norm, window + 1, entries(codomain)))
    rule = f"{name_of(module)}, norm of the averaging"
    return from_enclosure(out, lipschitz=norm, averaged=None, domain=shape, codomain=codomain, rule=rule)


def _windows_on_axis(module: Any, axis: int, n: int) -> int:
    """The largest number of pooling windows that one entry of an axis of length n is in."""
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        kernel, stride = _pick(module.kernel_size, axis), _pick(module.stride, axis)
        padding, dilation = _pick(module.padding, axis), _pick(module.dilation, axis)
        assert kernel and stride and dilation and padding is not None
        outputs = F.max_pool1d(torch.zeros(1, 1, n), kernel, stride, padding, dilation, module.ceil_mode).shape[-1]
        starts = [i * stride - padding for i in range(outputs)]
        windows = [range(start, start + kernel * dilation, dilation) for start in starts]
    else:
        outputs = _pick(module.output_size, axis) or n
        windows = [range(i * n // outputs, -(-(i + 1) * n // outputs)) for i in range(outputs)]
    counts = [0] * n
    for window in windows:
        for i in window:
            if 0 <= i < n:
                counts[i] += 1
    return max(counts)


@rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _maximum(module: Any, shape: Shape, unit: float) -> Certificate:
    """|max a - max b| ≤ max|a - b| ≤ ‖a - b‖ on each window; an entry in m windows counts m times: L = √m."""
    if module.return_indices:
        raise Refused(f"{name_of(module)} with return_indices=True has two outputs")
    axes, codomain = enumerate(spatial(module, shape)), output_shape(module, shape)
    windows = math.prod(_windows_on_axis(module, axis, n) for axis, n in axes)
    norm = root(max(windows, 1))
    return Certificate(norm, None, shape, codomain, f"{name_of(module)}, windows overlap {windows}-fold", Affine(norm))


def _copies(module: nn.Module, shape: Shape) -> Certificate:
    """A map whose outputs are each one input entry, axis by axis: its norm is √(the most copies of one entry)."""
    codomain, copies = output_shape(module, shape), 1
    for axis, n in enumerate(shape[1:]):
        line = torch.arange(n).reshape(1, 1, *(n if i == axis else 1 for i in range(len(shape) - 1)))
        most = 0
        for dtype in (torch.float32, torch.float64):  # upsampling finds its indices in the type of its input
            picked = module(line.to(dtype).expand(1, 1, *shape[1:])).movedim(2 + axis, -1)
            most = max(most, int(torch.bincount(picked.reshape(-1, picked.shape[-1])[0].long(), minlength=n).max()))
        copies *= most
    norm = root(max(copies, 1))
    return Certificate(
        norm, None, shape, codomain, f"{name_of(module)}, copies an entry at most {copies} times", Affine(norm)
    )


@rule(
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
def _padding(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    spatial(module, shape)
    if min(module.padding) < 0 and not name_of(module).startswith("Replication"):  # type: ignore[arg-type, operator]
        raise Refused(
            f"{module} crops by a negative padding, where torch may leave numbers unset: crop before it instead"
        )
    return _copies(module, shape)


@rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def _constant_padding(module: nn.ConstantPad2d, shape: Shape, unit: float) -> Certificate:
    spatial(module, shape)
    codomain = output_shape(module, shape)
    constant = times(abs(float(module.value)), root(entries(codomain)))
    error = Affine(0.0, times(constant, unit))  # the value itself is rounded
    return Certificate(1.0, None, shape, codomain, f"{name_of(module)}, an isometry", Affine(1.0, constant), error)


@rule(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(module: nn.Upsample, shape: Shape, unit: float) -> Certificate:
    if module.mode not in ("nearest", "nearest-exact"):
        raise Refused(f"Upsample in mode {module.mode!r} has no rule: use mode='nearest', or a transposed convolution")
    return _copies(module, shape)


# -------------------------------------------------------------------------------------------------- what costs nothing


@rule(nn.Identity)
def _identity(module: nn.Identity, shape: Shape, unit: float) -> Certificate:
    return isometry(shape, shape, "Identity", averaged=0.0)


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout(module: nn.Dropout, shape: Shape, unit: float) -> Certificate:
    if module.training:
        raise Refused(f"{name_of(module)} is random in training mode: call .eval() before certifying")
    return isometry(shape, shape, f"{name_of(module)} in eval mode, the identity", averaged=0.0)


@rule(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
def _rearrangement(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    return isometry(shape, output_shape(module, shape), f"{name_of(module)}, an isometry")


@rule(nn.Sequential)
def _sequential(module: nn.Sequential, shape: Shape, unit: float) -> Certificate:
    parts: list[Certificate] = []
    for name, child in module._modules.items():  # not named_children, which leaves out a layer's second occurrence
        assert child is not None
        try:
            parts.append(fold(child, parts[-1].codomain if parts else shape, unit))
        except Refused as refusal:
            raise Refused(f"in layer {name} of Sequential: {refusal}") from refusal
    if not parts:
        return isometry(shape, shape, "Sequential, empty", averaged=0.0)
    return chain(*parts, rule="Sequential")
