"""Floating point, one-sided: what is a bound stays a bound after rounding.

A float64 operation rounded to nearest has a relative error of at most 2^-53, so a result moved outward by a few units in
the last place is a bound again. ``gamma`` is the constant of Higham, *Accuracy and Stability of Numerical Algorithms*
(2nd ed., §3.1): an inner product of n terms, summed in any order, with or without fused multiply-add, has a relative
backward error of at most γ_n = nu/(1 - nu).
"""

from __future__ import annotations

import math

import torch

UNIT: dict[torch.dtype, float] = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Unit roundoff u of each floating type: fl(x op y) = (x op y)(1 + δ), |δ| ≤ u."""


def up(x: float, ulps: int = 4) -> float:
    """The smallest safe number above x: x moved up by ``ulps`` units in the last place."""
    for _ in range(ulps):
        x = math.nextafter(x, math.inf)
    return x


def down(x: float, ulps: int = 4) -> float:
    """x moved down by ``ulps`` units in the last place."""
    for _ in range(ulps):
        x = math.nextafter(x, -math.inf)
    return x


def gamma(n: int, unit: float) -> float:
    """γ_n = nu/(1 - nu), rounded up. Raises ValueError where nu ≥ 1, as no bound holds there."""
    if n * unit >= 1:
        raise ValueError(f"an inner product of {n} terms at unit roundoff {unit:g} has no error bound")
    return up(n * unit / (1 - n * unit))
