"""Floating point, one-sided: what is a bound stays a bound after rounding.

A float64 operation rounded to nearest has a relative error of at most 2^-53, so a result moved outward by a few units in
the last place is a bound again. ``plus``, ``times`` and ``root`` are tighter, rounding up exactly where that is needed, so
that constants which are 1 stay 1. ``gamma`` is the constant of Higham, *Accuracy and Stability of Numerical Algorithms*
(2nd ed., §3.1): an inner product of n terms, summed in any order, with or without fused multiply-add, has a relative
backward error of at most γ_n = nu/(1 - nu).
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from fractions import Fraction

import torch
from torch import Tensor

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


def plus(a: float, b: float) -> float:
    """The smallest float64 not below a + b."""
    total = a + b
    if not math.isfinite(total):
        return total
    return total if math.fsum((a, b, -total)) <= 0 else math.nextafter(total, math.inf)


def times(a: float, b: float) -> float:
    """The smallest float64 not below a·b."""
    product = a * b
    if not math.isfinite(product):
        return product
    (p, q), (k, l), (m, n) = product.as_integer_ratio(), a.as_integer_ratio(), b.as_integer_ratio()
    return product if p * l * n >= k * m * q else math.nextafter(product, math.inf)


def root(square: Fraction | int) -> float:
    """The smallest float64 not below √square (or the one after it)."""
    x = math.sqrt(square)
    while (ratio := x.as_integer_ratio())[0] ** 2 * square.denominator < square.numerator * ratio[1] ** 2:
        x = math.nextafter(x, math.inf)
    return x


def gamma(n: int, unit: float) -> float:
    """γ_n = nu/(1 - nu), rounded up. Raises ValueError where nu ≥ 1, as no bound holds there."""
    if n * unit >= 1:
        raise ValueError(f"an inner product of {n} terms at unit roundoff {unit:g} has no error bound")
    return up(n * unit / (1 - n * unit))


def euclidean(x: Tensor | None) -> float:
    """‖x‖ from above, over all entries; 0 for None. Computed in float64."""
    if x is None:
        return 0.0
    x = x.detach().double()
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return up(
        largest * float((x / largest).norm()) * (1 + (x.numel() + 4) * 2.0**-53)
    )  # no square underflows that counts


def above(x: float, digits: int = 7) -> str:
    """x in decimals, rounded up, so that what is printed is a bound too."""
    return _printed(x, digits, ROUND_CEILING)


def below(x: float, digits: int = 7) -> str:
    """x in decimals, rounded down."""
    return _printed(x, digits, ROUND_FLOOR)


def _printed(x: float, digits: int, rounding: str) -> str:
    return f"{float(Context(digits, rounding).create_decimal(repr(x))):.{digits}g}" if math.isfinite(x) else str(x)
