"""One stepper for every explicit Runge-Kutta method, read off its tableau."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nonexpansive.errors import Refused
from nonexpansive.math.tableau import ButcherTableau


def step(field: Callable[[Tensor], Tensor], x: Tensor, h: float | Tensor, tableau: ButcherTableau) -> Tensor:
    """One step x ↦ x + h Σ_i b_i X(Y_i) of ẋ = X(x), with Y_i = x + h Σ_{j<i} a_ij X(Y_j).

    ``field`` is X, from tensors of x's shape to the same; h is a float or a 0-dimensional tensor, through which the
    result can be differentiated. Uses the low-storage form of the method (``ButcherTableau.recurrence``).

    Raises Refused if the method is implicit.
    """
    if not tableau.recurrence:
        raise Refused(
            f"{tableau.name!r} is implicit, and a flow block takes explicit steps only:"
            " use the block nonexpansive.nn.implicit.Resolvent, which solves implicit Euler to a stated tolerance"
        )
    stage, slopes = x, {}
    for i, (theta, terms, dead) in enumerate(tableau.recurrence):
        slopes[i] = field(stage)
        stage = torch.lerp(x, stage, theta) if theta not in (0.0, 1.0) else stage if theta else x
        for j, weight in terms:
            if isinstance(h, Tensor):
                stage = torch.addcmul(stage, slopes[j], h if weight == 1 else h * weight)
            else:
                stage = torch.add(stage, slopes[j], alpha=h * weight)
        for j in dead:
            del slopes[j]
    return stage


def integrate(
    field: Callable[[Tensor], Tensor], x: Tensor, h: float | Tensor, tableau: ButcherTableau, substeps: int
) -> Tensor:
    """``substeps`` steps of size h each, over a time of substeps * h. Arguments and errors as for ``step``."""
    for _ in range(substeps):
        x = step(field, x, h, tableau)
    return x
