"""A linear layer and its exact adjoint, whatever the layer.

``affine(linear, x)`` gives t = Ax + b and the pullback s ↦ Aᵀs. For ``nn.Linear`` and zero-padded convolutions the adjoint is
written out (a transposed convolution, or where that is slow the same sum column by column); for every other layer it is the
vector-Jacobian product of the layer's own forward, hence right for each padding mode, parametrization, and module of the user's.

In evaluation mode a product with a matrix of many columns is summed in chunks, and then over the chunks: what can be proved of the
rounding of a sum grows with the length of its longest chain of additions (Higham 2002, §4.2): 272 for 4,096 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import Shape
from nonexpansive.math.rounding import euclidean, times
from nonexpansive.math.rules import bias_norm

Pullback = Callable[..., Tensor]

_ADJOINT = {nn.Conv1d: F.conv_transpose1d, nn.Conv2d: F.conv_transpose2d, nn.Conv3d: F.conv_transpose3d}


CHUNK = 256
"""The longest chunk."""

FEW = 4
"""Of a convolution of up to so many channels the adjoint is taken column by column on the CPU: :func:`_columns`. Measured with one and four
channels and filters of side 9 and 5, it is some 5 and 2 times as fast."""

MANY = 1024
"""From so many columns on a product is summed in chunks."""


def affine(linear: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """(Ax + b, pullback) with pullback(s, scale=1) = scale·Aᵀs, for a float or 0-dimensional tensor ``scale``."""
    return _run(linear, x, *_numbers(linear)) if is_torch(linear) else _run(linear, x)


def absolute(linear: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """(|A|x + |b|, pullback of |A|) for a layer of torch's own, |·| entrywise: with x ≥ 0, what scales the rounding of A."""
    weight, bias = _numbers(linear)
    return _run(linear, x, weight.abs(), None if bias is None else bias.abs())


def homogeneous(linear: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """(Ax, pullback): the linear part alone, b left out."""
    if is_torch(linear):
        return _run(linear, x, _numbers(linear)[0])
    t, pullback = _run(linear, x)
    return t - linear(torch.zeros_like(x)), pullback


def is_torch(linear: nn.Module) -> bool:
    """Whether this is a linear layer of torch itself (before parametrization), and no subclass."""
    kind = parametrize.type_before_parametrizations(linear)
    return kind is nn.Linear or kind in _ADJOINT


def is_written_out(linear: Any) -> bool:
    """Whether the adjoint is one of torch's own operations, and no vector-Jacobian product."""
    if not is_torch(linear):
        return False
    kind = parametrize.type_before_parametrizations(linear)
    return kind is nn.Linear or (linear.padding_mode == "zeros" and not isinstance(linear.padding, str))


def _numbers(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _run(linear: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Pullback]:
    """``affine`` with these numbers in place of the layer's own; without any, the layer as it is."""
    kind = parametrize.type_before_parametrizations(linear)
    if weight is None:
        forward = linear
    elif kind is nn.Linear:
        return _product(
            x, weight, bias, _chunk(weight.shape[1], linear.training)
        ), lambda s, scale=1.0: s @ _scaled(weight, scale)
    else:
        if is_written_out(linear):
            if _columns(
                linear, x
            ):  # t, and what is pulled back, have a pixel's channels together then, which is faster
                x = x.contiguous(memory_format=torch.channels_last)
            t = linear._conv_forward(x, weight, bias)
            stride, padding, dilation = linear.stride, linear.padding, linear.dilation
            geometry = zip(x.shape[2:], t.shape[2:], stride, padding, dilation, linear.kernel_size, strict=True)
            unreached = tuple(n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, s, p, d, k in geometry)
            adjoint, groups, size = _ADJOINT[kind], linear.groups, tuple(x.shape[2:])

            def pullback(s: Tensor, scale: float | Tensor = 1.0) -> Tensor:
                w = _scaled(weight, scale)
                if _columns(linear, s):
                    return _gathered(s, w, size, unreached[0], linear)
                return adjoint(s, w, None, stride, padding, unreached, groups, dilation)

            return t, pullback

        def forward(x: Tensor) -> Tensor:
            return linear._conv_forward(x, weight, bias)

    t, vjp = torch.func.vjp(forward, x)  # type: ignore[misc]
    return t, lambda s, scale=1.0: vjp(s * scale if isinstance(scale, Tensor) or scale != 1 else s)[0]


def _columns(linear: Any, x: Tensor) -> bool:
    """Whether the adjoint is taken column by column: as that of filters of a single column, which gives images for each column j of the
    real ones, to be moved by j columns and added up. A CPU is slow where few channels come out, and that makes channels of the columns.

    Not where anything is differentiated, for the derivative is slow, and not in 16 bits, in which the columns would add up."""
    plain = (
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    )
    plain = plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not plain or x.ndim != 4 or not isinstance(linear, nn.Conv2d) or linear.groups > 1 or linear.in_channels > FEW:
        return False
    columns = linear.kernel_size[1]
    return columns > 1 and columns * linear.in_channels <= linear.out_channels  # no more memory than the output has


def _single_columns(weight: Tensor) -> Tensor:
    """(O, C, m, k) → (O, kC, m, 1)."""
    return weight.movedim(-1, 1).flatten(1, 2)[..., None]


def _gathered(s: Tensor, weight: Tensor, size: tuple[int, ...], unreached: int, linear: Any) -> Tensor:
    """Aᵀs, column by column."""
    (down, right), (above, left), (tall, wide) = linear.stride, linear.padding, linear.dilation
    moved = F.conv_transpose2d(s, _single_columns(weight), None, (down, 1), (above, 0), (unreached, 0), 1, (tall, 1))
    columns = moved.unflatten(1, (weight.shape[3], weight.shape[1]))
    total = s.new_zeros(len(s), weight.shape[1], size[0], size[1] + 2 * left)
    for j in range(weight.shape[3]):
        total[..., wide * j : wide * j + right * (s.shape[-1] - 1) + 1 : right] += columns[:, j]
    return total[..., left : left + size[1]].contiguous()


def widest(linear: nn.Conv2d) -> int:
    """The most channels that an array has which the convolution, or its adjoint, makes for each position of its output."""
    return max(linear.in_channels, linear.out_channels)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
    """xWᵀ + b, summed in chunks of so many columns. They are kept apart until the last sum, or a compiler would join them again."""
    if chunk == weight.shape[1]:
        return F.linear(x, weight, bias)
    t = torch.einsum("...kc,mkc->k...m", x.unflatten(-1, (-1, chunk)), weight.unflatten(1, (-1, chunk))).sum(0)
    return t if bias is None else t + bias


def _chunk(columns: int, training: bool) -> int:
    """The largest divisor of the columns up to CHUNK; all of them, where they are few or would make more chunks than a chunk has, and in
    training mode, which is quicker so."""
    if columns < MANY or training:
        return columns
    chunk = max(n for n in range(1, CHUNK + 1) if columns % n == 0)
    return chunk if chunk * chunk >= columns else columns


def chain_length(linear: Any) -> int | None:
    """The most additions, one after the other, that a summand of an entry of ``affine``'s Ax goes through, where it is summed in chunks;
    None where nothing is known but the number of summands. Of the mode, training or evaluation, in which the layer is."""
    if parametrize.type_before_parametrizations(linear) is not nn.Linear:
        return None
    columns = linear.weight.shape[1]
    chunk = _chunk(columns, linear.training)
    return None if chunk == columns else chunk + columns // chunk


def _scaled(weight: Tensor, scale: float | Tensor) -> Tensor:
    """scale·W: the multiple is taken on the weights, which are few, and not on the images, which are many."""
    return weight if not isinstance(scale, Tensor) and scale == 1 else weight * scale


def offset_norm(linear: nn.Module, shape: Shape, codomain: Shape) -> float:
    """‖b‖ over all entries of the output for a sample of ``shape``; for a module of the user's, that of its value at 0."""
    if is_torch(linear):
        return bias_norm(linear, codomain)
    like = next(linear.parameters(), torch.zeros(()))
    with torch.no_grad():
        value = linear(torch.zeros((1, *shape), dtype=like.dtype, device=like.device))
    return times(euclidean(value), 1.001)  # more than its rounding can have hidden


def probe_shape(linear: Any, shape: Sequence[int] | None = None) -> Shape:
    """An input shape on which a power iteration can run: that of the layer, with 16 (in three dimensions 8) entries an axis.

    ``shape`` is the one to take for a module of the user's. Raises Refused for a module of which no norm bound is known.
    """
    kind = parametrize.type_before_parametrizations(linear)
    if kind is nn.Linear:
        return (linear.in_features,)
    if kind in _ADJOINT:
        m = len(linear.kernel_size)
        side = 8 if m == 3 else 16
        reach = [d * (k - 1) + 1 for d, k in zip(linear.dilation, linear.kernel_size, strict=True)]
        return (linear.in_channels, *(max(side, 2 * n) for n in reach))
    if callable(getattr(linear, "norm_bound", None)):
        if shape is not None:
            return tuple(shape)
        raise BadInput(
            f"the shape of an input of {kind.__name__} is not known from it: give GradientFlow(..., shape=(...))"
        )
    raise Refused(
        f"{kind.__name__} is not a linear layer with a known norm bound: use torch.nn.Linear or ConvNd, or give your linear "
        "module a method norm_bound(shape) -> float that bounds its norm from above"
    )
