"""What a program can be away from the map that it computes, carried along with the sizes of the numbers in it.

A bound here is affine in the size u = ‖x‖ of the network's input: ``Affine(slope, constant)`` is u ↦ slope·u + constant. An
``Enclosure`` holds two of them for a quantity inside a network: ``norm``, a bound on its exact size, and ``error``, a bound on
the distance between what the program holds and the exact value. The operations are those of a network (linear maps,
elementwise functions, sums, multiples), each with its forward error bound (Higham 2002, §3.1 and §3.5), so that running a
network's formula on enclosures instead of tensors gives a rigorous bound for the floating-point run. With ``unit = 0`` the
arithmetic is exact and only errors put in by hand (a solver's tolerance) are carried on.

An ``Enclosure`` knows of its quantity no more than the size of the input it came from. An ``Observed`` has seen samples of it,
and bounds by the sizes that they have: the same operations, hence the same formulas of networks, with smaller results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nonexpansive.errors import Refused
from nonexpansive.math.activation import Slopes
from nonexpansive.math.rounding import UNIT, gamma, plus, root, times, up

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
class LinearMap:
    """x ↦ Ax + b with ‖A‖ ≤ ``norm``, ‖|A|‖ ≤ ``absolute``, ``terms`` products an entry, ``entries`` outputs, ‖b‖ ≤ ``bias``.

    For samples that are seen also the map itself, ``apply``, and ``sizes``: |x| ↦ |A||x| + |b|. ``chain``: the most additions, one after
    the other, that a product goes through (None: any order, as many as there are products).
    """

    norm: float
    absolute: float
    terms: int
    entries: int
    bias: float = 0.0
    apply: Callable[[Tensor], Tensor] | None = None
    sizes: Callable[[Tensor], Tensor] | None = None
    chain: int | None = None

    def rounding(self, unit: float) -> float:
        """γ with |fl - exact| ≤ γ(|A||x| + |b|) for sums in any order (of that chain), with or without fused multiply-add, where A may
        have been multiplied by a number before. Raises Refused where there is none."""
        try:
            return gamma((self.terms if self.chain is None else self.chain) + 2, unit)
        except ValueError as why:
            raise Refused(f"no bound on the rounding of a linear layer: {why}. Ask for exact arithmetic") from why

    @property
    def underflow(self) -> float:
        """What an output's operations lose to it at most."""
        return times((2 * self.terms + 2) * TINY, root(self.entries))


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

    def linear(self, a: LinearMap) -> Enclosure:
        """Ax + b."""
        size, error = self.norm * a.norm + Affine(0.0, a.bias), self.error * a.norm
        if self.unit:
            error += (self.computed * a.absolute + Affine(0.0, a.bias)) * a.rounding(self.unit)
            error += Affine(0.0, a.underflow)
        return Enclosure(size, error, self.unit, a.entries)

    def elementwise(self, slope: Slopes, apply: Callable[[Tensor], Tensor] | None = None) -> Enclosure:
        """σ(x), where the program's σ(t) is off by at most ulps·u·(|t| + scale) + absolute; ``apply``: σ, for samples that are seen."""
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


SLACK = 1 + 2.0**-30
"""More than the rounding of any sum taken of sizes here, in float64 of terms ≥ 0 and at most 2^22 of them."""

NOTHING = 1e-150
"""More than what operations on float64 numbers, and norms of them, lose where results or squares underflow."""


def sizes(y: Tensor) -> Tensor:
    """‖y‖ (N,) of each sample of y (N, ...), in float64, from above."""
    return y.detach().double().flatten(1).norm(dim=1) * (SLACK + y[:1].numel() * 2.0**-52) + NOTHING


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number for each sample, (N,), in the shape in which it meets ``like`` (N, ...)."""
    return values.reshape(-1, *(1 for _ in like.shape[1:]))


@dataclass(frozen=True)
class Observed:
    """Samples on their way through a network, in float64, with what a program run on the same samples may be away from them.

    - ``value`` (N, ...): v, the samples as a float64 run has them;
    - ``error`` (2, N): bounds on ‖v - y‖ for y held by the program of unit roundoff ``unit``, and for the exact y.

    The operations are those of :class:`Enclosure`. A float64 run rounds too, so both errors grow by its rounding.
    """

    value: Tensor
    error: Tensor
    unit: float

    @staticmethod
    def input(x: Tensor, unit: float) -> Observed:
        """The samples x (N, ...) themselves, float64, known exactly."""
        return Observed(x, x.new_zeros((2, len(x)), dtype=torch.float64), unit)

    @property
    def apart(self) -> Tensor:
        """A bound (N,) on the distance of what the program holds from the exact quantity."""
        return self.error.sum(0) * SLACK

    @property
    def computed(self) -> Tensor:
        """Bounds (2, N) on the sizes of what the program, and of what exact arithmetic has."""
        return sizes(self.value) + self.error

    def linear(self, a: LinearMap) -> Observed:
        assert a.apply is not None and a.sizes is not None
        seen = sizes(a.sizes(self.value.abs())) + self.error * a.absolute
        own = a.rounding(UNIT[torch.float64])
        error = self.error * a.norm + seen * self._each(a.rounding(self.unit) + own, own)
        error = error + self._each(a.underflow, NOTHING)
        return Observed(a.apply(self.value), error * SLACK, self.unit)

    def elementwise(self, slope: Slopes, apply: Callable[[Tensor], Tensor] | None = None) -> Observed:
        assert apply is not None
        grown = self.error * slope.lipschitz + (slope.absolute * 2 + self._each(64 * TINY, NOTHING)) * self._root
        operands = self.computed + slope.scale * self._root
        return Observed(apply(self.value), grown, self.unit)._rounded(operands, slope.ulps)

    def __mul__(self, factor: float) -> Observed:
        if abs(factor) in (0.0, 1.0):
            return Observed(self.value * factor, self.error * abs(factor), self.unit)
        moved = Observed(
            self.value * factor, self.error * abs(factor) + self._each(TINY, NOTHING) * self._root, self.unit
        )
        return moved._rounded(self.computed, 2.5 * abs(factor))

    def __add__(self, other: Observed) -> Observed:
        total = Observed(self.value + other.value, self.error + other.error, self.unit)
        return total._rounded(total.computed, 1.0)

    def lerp(self, end: Observed, t: float) -> Observed:
        rest = abs(1 - t)
        total = Observed(self.value.lerp(end.value, t), self.error * rest + end.error * abs(t), self.unit)
        return total.rounded(self.computed + end.computed, 2 + 2 * abs(t) + 5 * rest)

    def rounded(self, operands: Tensor, ulps: float) -> Observed:
        return Observed(self.value, self.error + self._each(ulps * TINY, NOTHING) * self._root, self.unit)._rounded(
            operands, ulps
        )

    def _rounded(self, operands: Tensor, ulps: float) -> Observed:
        own = UNIT[torch.float64]
        error = self.error + operands * ulps * self._each(self.unit + own, own)
        return Observed(self.value, error * SLACK, self.unit)

    def _each(self, program: float, exact: float) -> Tensor:
        return self.error.new_tensor([[program], [exact]])

    @property
    def _root(self) -> float:
        return root(math.prod(self.value.shape[1:]))
