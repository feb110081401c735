"""Non-linearities *between* blocks: sorting channels, which permutes entries and so keeps every distance or shrinks it.

MaxMin and GroupSort (Anil, Lucas, Grosse 2019, arXiv:1811.05381) are 1-Lipschitz, and their gradient is orthogonal wherever it
exists. They are not gradients of an elementwise potential, so they may not be the σ inside a gradient flow.
"""

from __future__ import annotations

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
    """(max, min) of channels 2i and 2i+1, as two channels: GroupSort of pairs, without a sort. (B, C, ...) → (B, C, ...), C even."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unflatten(1, (-1, 2)).unbind(2)
        return torch.stack((torch.maximum(a, b), torch.minimum(a, b)), 2).flatten(1, 2)


@rule(GroupSort, MaxMin)
def _sorting(module: GroupSort | MaxMin, shape: Shape, unit: float) -> Certificate:
    group = module.group if isinstance(module, GroupSort) else 2
    if shape[0] % group:
        raise Refused(
            f"{type(module).__name__} sorts {group} channels together, which does not divide {shape[0]} channels"
        )
    return isometry(shape, shape, f"{type(module).__name__}, sorts entries")
