"""What a program can be away from the map that it computes, carried along with the sizes of the numbers in it.

A bound here is affine in the size u = ‖x‖ of the network's input: ``Affine(slope, constant)`` is u ↦ slope·u + constant. An
``Enclosure`` holds two of them for a quantity inside a network: ``norm``, a bound on its exact size, and ``error``, a bound on
the distance between what the program holds and the exact value. The operations are those of a network (linear maps,
elementwise functions, sums, multiples), each with its forward error bound (Higham 2002, §3.1 and §3.5), so that running a
network's formula on enclosures instead of tensors gives a rigorous bound for the floating-point run. With ``unit = 0`` the
arithmetic is exact and only errors put in by hand (a solver's tolerance) are carried on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nonexpansive.errors import Refused
from nonexpansive.math.activation import Slopes
from nonexpansive.math.rounding import gamma, up

TINY = 2.0**-126
"""Smallest normal float32: an upper bound on what one operation can lose to underflow, flushed to zero or not."""


@dataclass(frozen=True)
class Affine:
    """u ↦ slope·u + constant with both coefficients ≥ 0, every operation rounded up."""

    slope: float = 0.0
    constant: float = 0.0

    def __add__(self, other: Affine) -> Affine:
        return Affine(_up(self.slope + other.slope), _up(self.constant + other.constant))

    def __mul__(self, factor: float) -> Affine:
        return Affine(times(self.slope, factor), times(self.constant, factor))

    __rmul__ = __mul__

    def __call__(self, u: float) -> float:
        return _up(times(self.slope, u) + self.constant)

    def of(self, inner: Affine) -> Affine:
        """u ↦ self(inner(u))."""
        return Affine(times(self.slope, inner.slope), self(inner.constant))


def times(a: float, b: float) -> float:
    """a·b for a, b ≥ 0, rounded up; exact where a factor is 0 or 1, so that maps with L = 1 stay at 1."""
    return a * b if a in (0.0, 1.0) or b in (0.0, 1.0) else up(a * b)


def _up(total: float) -> float:
    """A sum of numbers ≥ 0 rounded up; a sum of zeros is zero."""
    return up(total) if total else 0.0


@dataclass(frozen=True)
class Enclosure:
    """Bounds on a quantity of a network as functions of ‖x‖: ``norm`` of the exact one, ``error`` of the program's."""

    norm: Affine
    error: Affine
    unit: float

    @staticmethod
    def input(unit: float) -> Enclosure:
        """The input x itself: of size ‖x‖, known exactly."""
        return Enclosure(Affine(1.0), Affine(), unit)

    @property
    def computed(self) -> Affine:
        """A bound on the size of what the program holds."""
        return self.norm + self.error

    def linear(self, norm: float, absolute: float, terms: int, entries: int, bias: float = 0.0) -> Enclosure:
        """Ax + b with ‖A‖ ≤ norm, ‖|A|‖ ≤ absolute, ``terms`` products an entry, ``entries`` outputs, ‖b‖ ≤ bias.

        Sums may be taken in any order, with or without fused multiply-add: |fl - exact| ≤ γ_{terms+1}(|A||x| + |b|).
        """
        size = self.norm * norm + Affine(0.0, bias)
        if not self.unit:
            return Enclosure(size, self.error * norm, 0.0)
        local = (self.computed * absolute + Affine(0.0, bias)) * gamma(terms + 2, self.unit)
        return Enclosure(size, self.error * norm + local + Affine(0.0, underflow(terms, entries)), self.unit)

    def elementwise(self, slope: Slopes, entries: int) -> Enclosure:
        """σ(x) for x of ``entries`` entries; the program's σ(t) is off by at most ulps·u·(|t| + scale) + absolute."""
        root = up(entries**0.5)
        size = self.norm * slope.lipschitz + Affine(0.0, up(slope.scale * root))
        error = self.error * slope.lipschitz + Affine(0.0, up(slope.absolute * root))
        if self.unit:
            if not math.isfinite(slope.ulps):
                raise Refused("an activation gives no bound on its rounding (Slopes.ulps): ask for exact arithmetic")
            error += (self.computed + Affine(0.0, up(slope.scale * root))) * up(slope.ulps * self.unit)
        return Enclosure(size, error, self.unit)

    def __mul__(self, factor: float) -> Enclosure:
        """factor·x: one rounding for the product, one for the factor."""
        factor = abs(factor)
        return Enclosure(
            self.norm * factor,
            self.error * factor + self.computed * times(factor, _up(2.5 * self.unit)),
            self.unit,
        )

    __rmul__ = __mul__

    def __add__(self, other: Enclosure) -> Enclosure:
        size, error = self.norm + other.norm, self.error + other.error
        return Enclosure(size, error + (size + error) * self.unit, self.unit)

    def rounded(self, operands: Affine, ulps: float) -> Enclosure:
        """The same quantity, computed with ``ulps`` more roundings of operands of that size."""
        return Enclosure(self.norm, self.error + operands * _up(ulps * self.unit), self.unit)


def underflow(terms: int, entries: int) -> float:
    """What ``entries`` sums of ``terms`` products can lose to underflow, in the Euclidean norm."""
    return up((2 * terms + 2) * TINY * up(entries**0.5))
