"""A linear layer and its exact adjoint, whatever the layer.

``affine(linear, x)`` gives t = Ax + b and the pullback s ↦ Aᵀs. For ``nn.Linear`` and zero-padded convolutions the adjoint is
written out (a transposed convolution); for every other layer it is the vector-Jacobian product of the layer's own forward,
hence right for each padding mode, parametrization, and module of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nonexpansive.errors import BadInput, Refused

Pullback = Callable[..., Tensor]

_ADJOINT = {nn.Conv1d: F.conv_transpose1d, nn.Conv2d: F.conv_transpose2d, nn.Conv3d: F.conv_transpose3d}


def affine(linear: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """(Ax + b, pullback) with pullback(s, scale=1) = scale·Aᵀs, for a float or 0-dimensional tensor ``scale``."""
    kind = parametrize.type_before_parametrizations(linear)
    if kind is nn.Linear:
        weight = linear.weight
        return F.linear(x, weight, linear.bias), lambda s, scale=1.0: s @ _scaled(weight, scale)
    if kind in _ADJOINT and linear.padding_mode == "zeros" and not isinstance(linear.padding, str):
        weight, dimensions = linear.weight, x.shape[2:]
        t = linear._conv_forward(x, weight, linear.bias)
        geometry = zip(dimensions, t.shape[2:], linear.stride, linear.padding, linear.dilation, linear.kernel_size, strict=True)
        unreached = tuple(n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, s, p, d, k in geometry)

        def pullback(s: Tensor, scale: float | Tensor = 1.0) -> Tensor:
            return _ADJOINT[kind](
                s, _scaled(weight, scale), None, linear.stride, linear.padding, unreached, linear.groups, linear.dilation
            )

        return t, pullback
    t, vjp = torch.func.vjp(linear, x)
    return t, lambda s, scale=1.0: vjp(s * scale if isinstance(scale, Tensor) or scale != 1 else s)[0]


def _scaled(weight: Tensor, scale: float | Tensor) -> Tensor:
    """scale·W: the multiple is taken on the weights, which are few, and not on the images, which are many."""
    return weight if not isinstance(scale, Tensor) and scale == 1 else weight * scale


def homogeneous(linear: nn.Module, x: Tensor) -> tuple[Tensor, Pullback]:
    """(Ax, pullback): the linear part alone, b left out."""
    t, pullback = affine(linear, x)
    bias = getattr(linear, "bias", None)
    if bias is None:
        return t, pullback
    return t - bias.reshape(-1, *(1 for _ in t.shape[2:])) if t.ndim > 2 else t - bias, pullback


def probe_shape(linear: nn.Module, shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """An input shape on which a power iteration can run: that of the layer, with 16 (in three dimensions 8) entries an axis.

    ``shape`` is the one to take for a module of the user's. Raises Refused for a module of which no norm bound is known.
    """
    kind = parametrize.type_before_parametrizations(linear)
    if kind is nn.Linear:
        return (linear.in_features,)
    if kind in _ADJOINT:
        m = linear.weight.ndim - 2
        side = 8 if m == 3 else 16
        reach = [d * (k - 1) + 1 for d, k in zip(linear.dilation, linear.kernel_size, strict=True)]
        return (linear.in_channels, *(max(side, 2 * n) for n in reach))
    if callable(getattr(linear, "norm_bound", None)):
        if shape is not None:
            return tuple(shape)
        raise BadInput(f"the shape of an input of {kind.__name__} is not known from it: give GradientFlow(..., shape=(...))")
    raise Refused(
        f"{kind.__name__} is not a linear layer with a known norm bound: use torch.nn.Linear or ConvNd, or give your linear module "
        "a method norm_bound(shape) -> float that bounds its norm from above"
    )
