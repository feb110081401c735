"""What a program can be away from the map that it computes, carried along with the sizes of the numbers in it.

A bound here is affine in the size u = ‖x‖ of the network's input: ``Affine(slope, constant)`` is u ↦ slope·u + constant. An
``Enclosure`` holds two of them for a quantity inside a network: ``norm``, a bound on its exact size, and ``error``, a bound on
the distance between what the program holds and the exact value. The operations are those of a network (linear maps,
elementwise functions, sums, multiples), each with its forward error bound (Higham 2002, §3.1 and §3.5), so that running a
network's formula on enclosures instead of tensors gives a rigorous bound for the floating-point run. With ``unit = 0`` the
arithmetic is exact and only errors put in by hand (a solver's tolerance) are carried on.
"""

from __future__ import annotations

from dataclasses import dataclass

from nonexpansive.errors import Refused
from nonexpansive.math.activation import Slopes
from nonexpansive.math.rounding import gamma, plus, root, times, up

TINY = 2.0**-126
"""Smallest normal float32: more than what one operation loses to underflow."""


@dataclass(frozen=True)
class Affine:
    """u ↦ slope·u + constant with both coefficients ≥ 0, every operation rounded up."""

    slope: float = 0.0
    constant: float = 0.0

    def __add__(self, other: Affine) -> Affine:
        return Affine(plus(self.slope, other.slope), plus(self.constant, other.constant))

    def __mul__(self, factor: float) -> Affine:
        return Affine(times(self.slope, factor), times(self.constant, factor))

    __rmul__ = __mul__

    def __call__(self, u: float) -> float:
        return plus(times(self.slope, u), self.constant)

    def of(self, inner: Affine) -> Affine:
        """u ↦ self(inner(u))."""
        return Affine(times(self.slope, inner.slope), self(inner.constant))


@dataclass(frozen=True)
class Enclosure:
    """Bounds on a quantity of ``entries`` numbers as functions of ‖x‖: ``norm`` of the exact one, ``error`` of the program's.

    ``unit``: the unit roundoff of the program, 0 for exact arithmetic.
    """

    norm: Affine
    error: Affine
    unit: float
    entries: int

    @staticmethod
    def input(unit: float, entries: int) -> Enclosure:
        """The input x itself: of size ‖x‖, known exactly."""
        return Enclosure(Affine(1.0), Affine(), unit, entries)

    @property
    def computed(self) -> Affine:
        """A bound on the size of what the program holds."""
        return self.norm + self.error

    def linear(self, norm: float, absolute: float, terms: int, entries: int, bias: float = 0.0) -> Enclosure:
        """Ax + b with ‖A‖ ≤ norm, ‖|A|‖ ≤ absolute, ``terms`` products an entry, ``entries`` outputs, ‖b‖ ≤ bias.

        Sums may be taken in any order, with or without fused multiply-add, and A may have been multiplied by a number before:
        |fl - exact| ≤ γ_{terms+2}(|A||x| + |b|), to which every operation adds what it loses to underflow.
        """
        size, error = self.norm * norm + Affine(0.0, bias), self.error * norm
        if self.unit:
            try:
                relative = gamma(terms + 2, self.unit)
            except ValueError as why:
                raise Refused(f"no bound on the rounding of a linear layer: {why}. Ask for exact arithmetic") from why
            error += (self.computed * absolute + Affine(0.0, bias)) * relative
            error += Affine(0.0, times((2 * terms + 2) * TINY, root(entries)))
        return Enclosure(size, error, self.unit, entries)

    def elementwise(self, slope: Slopes) -> Enclosure:
        """σ(x), where the program's σ(t) is off by at most ulps·u·(|t| + scale) + absolute."""
        size = self.norm * slope.lipschitz + self._each(slope.scale)
        error = self.error * slope.lipschitz + self._each(slope.absolute)
        if self.unit:
            if not slope.ulps < float("inf"):
                raise Refused("an activation gives no bound on its rounding (Slopes.ulps): ask for exact arithmetic")
            # intermediate results may be smaller than the final one, so their underflow may be multiplied
            error += (self.computed + self._each(slope.scale)) * times(slope.ulps, self.unit) + self._each(64 * TINY)
        return Enclosure(size, error, self.unit, self.entries)

    def __mul__(self, factor: float) -> Enclosure:
        """factor·x: one rounding for the product, one for the factor."""
        factor = abs(factor)
        size, error = self.norm * factor, self.error * factor
        if self.unit and factor not in (0.0, 1.0):
            if not 2.0**-100 < factor < 2.0**100:
                raise Refused(
                    f"the number {factor:g} comes near the end of float32's range, where no rounding bound holds"
                )
            error += self.computed * times(factor, 2.5 * self.unit) + self._each(TINY)
        return Enclosure(size, error, self.unit, self.entries)

    __rmul__ = __mul__

    def __add__(self, other: Enclosure) -> Enclosure:
        size, error = self.norm + other.norm, self.error + other.error
        return Enclosure(size, error + (size + error) * self.unit, self.unit, self.entries)

    def lerp(self, end: Enclosure, t: float) -> Enclosure:
        """(1-t)x + t·end as ``torch.lerp`` computes it: x + t(end - x) for |t| < 1/2, else end - (1-t)(end - x)."""
        rest = 0.0 if t == 1 else up(abs(1 - t))
        size, error = self.norm * rest + end.norm * abs(t), self.error * rest + end.error * abs(t)
        if self.unit:
            ulps = up(2 + 2 * abs(t) + 5 * rest)  # also for t itself, which is rounded first
            error += (self.computed + end.computed) * times(ulps, self.unit) + self._each(ulps * TINY)
        return Enclosure(size, error, self.unit, self.entries)

    def rounded(self, operands: Affine, ulps: float) -> Enclosure:
        """The same quantity, computed with ``ulps`` more roundings of operands of that size."""
        if not self.unit:
            return self
        error = self.error + operands * times(ulps, self.unit) + self._each(ulps * TINY)
        return Enclosure(self.norm, error, self.unit, self.entries)

    def _each(self, size: float) -> Affine:
        """The norm of a tensor whose entries are at most ``size``."""
        return Affine(0.0, times(size, root(self.entries)))
