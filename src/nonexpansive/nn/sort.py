"""Non-linearities *between* blocks: sorting channels, which permutes entries and so keeps every distance or shrinks it.

MaxMin and GroupSort (Anil, Lucas, Grosse 2019, arXiv:1811.05381) are 1-Lipschitz, and their gradient is orthogonal wherever it
exists. They are not gradients of an elementwise potential, so they may not be the σ inside a gradient flow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import Certificate, Shape, isometry, rule


class GroupSort(nn.Module):
    """Sorts the channels (axis 1) in groups of ``group`` neighbours, ascending. (B, C, ...) → (B, C, ...), ``group`` divides C."""

    def __init__(self, group: int) -> None:
        super().__init__()
        if group < 2:
            raise BadInput(f"group is the number of channels that are sorted together, at least 2; got {group}")
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.group)).sort(2).values.flatten(1, 2)

    def extra_repr(self) -> str:
        return f"group={self.group}"


class MaxMin(nn.Module):
    """Channel i < C/2 becomes max(x_i, x_{i+C/2}), channel i + C/2 their minimum. (B, C, ...) → (B, C, ...), C even.

    GroupSort of pairs, without a sort; the partner is half the channels away so that both halves are contiguous in every
    memory format.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise BadInput(f"MaxMin pairs channels (axis 1), so their number must be even, not {x.shape[1]}")
        return _MaxMin.apply(x)  # type: ignore[return-value]


class _MaxMin(torch.autograd.Function):
    """Autograd's own would compare once more for each derivative, with masks, at many times the cost of the comparison."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        (a, b), y = x.chunk(2, 1), torch.empty_like(x)
        high, low = y.chunk(2, 1)
        torch.maximum(a, b, out=high)
        torch.minimum(a, b, out=low)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(tangent, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _MaxMin.apply(x.movedim(in_dims[0], -1)), x.ndim - 1  # type: ignore[return-value]


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _exchange(t: Tensor, x: Tensor) -> Tensor:
    """t with the entries of a pair exchanged where x's are: MaxMin's derivative at x, which is its own adjoint."""
    (a, b), bits = x.chunk(2, 1), _BITS.get(x.element_size())
    if torch.is_grad_enabled() or bits is None:  # to be differentiated again, or batched by torch.func
        keep, (p, q) = a >= b, t.chunk(2, 1)
        return torch.cat((torch.where(keep, p, q), torch.where(keep, q, p)), 1)
    out = torch.empty_like(x)
    first, second = out.chunk(2, 1)
    torch.sub(a, b, out=second)
    (p, q), (first, second) = t.view(bits).chunk(2, 1), out.view(bits).chunk(2, 1)
    second >>= 8 * x.element_size() - 1  # the sign, in every bit: all ones where a < b
    torch.bitwise_xor(p, q, out=first).bitwise_and_(second)
    torch.bitwise_xor(q, first, out=second)
    first ^= p
    return out


@rule(GroupSort, MaxMin)
def _sorting(module: GroupSort | MaxMin, shape: Shape, unit: float) -> Certificate:
    group = module.group if isinstance(module, GroupSort) else 2
    if shape[0] % group:
        raise Refused(
            f"{type(module).__name__} sorts {group} channels together, which does not divide {shape[0]} channels"
        )
    return isometry(shape, shape, f"{type(module).__name__}, sorts entries")
