"""Runge-Kutta methods as data, and how long a step of each keeps a dissipative flow non-expansive.

A method (a, b) applied to ẋ = X(x) with step h takes stages Y_i = x + h Σ_j a_ij X(Y_j) to x + h Σ_i b_i X(Y_i). Let
B = diag(b) and M = Ba + aᵀB - bbᵀ. Where every b_i > 0 the **circle-contractivity radius** is
r = -1/λ_min(B^{-1/2} M B^{-1/2}), or ∞ where M is positive semi-definite (Dahlquist & Jeltsch 1979, *Generalized disks
of contractivity for explicit and implicit Runge-Kutta methods*). If X is ν-cocoercive dissipative,
⟨X(y) - X(x), y - x⟩ ≤ -ν‖X(y) - X(x)‖², then expanding ‖x₁ - y₁‖² and M + cB ⪰ 0 with Σb_i = 1 give

    ‖x₁ - y₁‖² ≤ ‖x - y‖² - (2ν/h - c) ‖(x₁ - x) - (y₁ - y)‖²    whenever h > 0 and 2ν/h ≥ c,

so a step is non-expansive for h ≤ 2ν/c and α-averaged with α = 1/(1 + 2ν/h - c). The least such c is 1/r where r is
finite, and -λ_min ≤ 0 otherwise. Here c is verified in rational arithmetic, never typed in.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property
from itertools import combinations_with_replacement

import numpy as np

from nonexpansive.errors import BadInput, Refused

Number = int | float | Fraction
Row = tuple[float, tuple[tuple[int, float], ...], tuple[int, ...]]
Tree = tuple["Tree", ...]


@dataclass(frozen=True)
class ButcherTableau:
    """A Runge-Kutta method: ``name``, the s x s matrix ``a`` and the s weights ``b``.

    Numbers are kept as exact fractions. Weights that miss Σb_i = 1 by the rounding of their float representation (up to
    1e-12) are divided by their sum. Raises ValueError if the shapes disagree, a number is not finite or Σb_i ≠ 1.
    """

    name: str
    a: Sequence[Sequence[Number]]
    b: Sequence[Number]
    recurrence: tuple[Row, ...] = field(init=False, repr=False, compare=False)
    """An explicit method in low-storage form (empty for an implicit one). Entry i is (θ, terms, dead):
    Y_{i+1} = x + θ(Y_i - x) + h Σ_{(j, w) in terms} w k_j with k_j = X(Y_j), after which the k_j, j in dead, are not
    needed any more; Y_0 = x and Y_s is the result. θ ≠ 0 where a row is a multiple of the one above it, which turns the
    strong-stability-preserving methods into their two-register form."""

    def __post_init__(self) -> None:
        s = len(self.b)
        if s == 0 or len(self.a) != s or any(len(row) != s for row in self.a):
            raise ValueError(f"{self.name}: a must be s x s for the s = {s} ≥ 1 weights b")
        if not all(math.isfinite(v) for row in (*self.a, self.b) for v in row):
            raise ValueError(f"{self.name}: the coefficients must be finite")
        a = tuple(tuple(Fraction(v) for v in row) for row in self.a)
        b = tuple(Fraction(v) for v in self.b)
        if abs(sum(b) - 1) > 1e-12:
            raise ValueError(f"{self.name}: the weights b sum to {float(sum(b)):.15g}, a consistent method needs 1")
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", tuple(v / sum(b) for v in b))
        object.__setattr__(self, "recurrence", _recurrence(a, self._b) if self.explicit else ())

    @property
    def _a(self) -> tuple[tuple[Fraction, ...], ...]:
        return self.a  # type: ignore[return-value]  # fractions since __post_init__

    @property
    def _b(self) -> tuple[Fraction, ...]:
        return self.b  # type: ignore[return-value]

    @property
    def stages(self) -> int:
        """Number of stages s, which is the number of evaluations of X per step."""
        return len(self.b)

    @property
    def explicit(self) -> bool:
        """Whether a is strictly lower triangular, so that no equation has to be solved."""
        return all(v == 0 for i, row in enumerate(self.a) for v in row[i:])

    @property
    def c(self) -> tuple[Fraction, ...]:
        """The nodes c_i = Σ_j a_ij."""
        return tuple(sum(row, Fraction(0)) for row in self._a)

    @cached_property
    def order(self) -> int:
        """The order of accuracy, checked up to 5: Φ(t) = 1/γ(t) for every rooted tree t of at most that many nodes
        (Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, §II.2), with 1e-12 for rounded
        coefficients."""
        for p in range(1, 6):
            for tree in _trees(p):
                weight = sum((b * v for b, v in zip(self._b, _elementary(tree, self._a), strict=True)), Fraction(0))
                if abs(weight * _density(tree) - 1) > 1e-12:
                    return p - 1
        return 5

    @cached_property
    def deficiency(self) -> Fraction | None:
        """A number c with M + cB ⪰ 0, verified exactly, and the least such up to 1e-12; None where some b_i ≤ 0."""
        if min(self._b) <= 0:
            return None
        a, b, n = self._a, self._b, range(self.stages)
        m = [[b[i] * a[i][j] + b[j] * a[j][i] - b[i] * b[j] for j in n] for i in n]
        root = np.sqrt(np.array(b, dtype=float))
        c = Fraction(-float(np.linalg.eigvalsh(np.array(m, dtype=float) / np.outer(root, root))[0]))

        def proved(c: Fraction) -> bool:
            return _positive_semidefinite([[m[i][j] + (c * b[i] if i == j else 0) for j in n] for i in n])

        nice = [c.limit_denominator(1000)]  # 1 and not 1.0000000000000002 for Euler
        if nice[0]:
            nice.append(1 / (1 / c).limit_denominator(1000))
        for candidate in nice:
            if abs(candidate - c) <= 1e-9 * max(1, abs(c)) and proved(candidate):
                return candidate
        margin = Fraction(1, 10**12)
        while not proved(c + margin * max(1, abs(c))):
            margin *= 2
        return c + margin * max(1, abs(c))

    @cached_property
    def radius(self) -> float:
        """The circle-contractivity radius r, from below: ∞ where M ⪰ 0, 0 where some b_i ≤ 0 (unusable)."""
        if self.deficiency is None:
            return 0.0
        return _down(1 / self.deficiency) if self.deficiency > 0 else math.inf

    def require_usable(self) -> Fraction:
        """The number c = 1/r of the module's docstring. Raises Refused where r = 0, naming the weights to blame."""
        if self.deficiency is None:
            culprits = ", ".join(f"b_{i} = {v}" for i, v in enumerate(self.b, 1) if v <= 0)
            raise Refused(
                f"Runge-Kutta method {self.name!r} has circle-contractivity radius 0 because {culprits}: no step of it"
                " is known to be non-expansive. Take a method with positive weights, such as euler, heun, ssp33 or rk4"
            )
        return self.deficiency

    def max_step(self, nu: float, alpha: float = 1.0) -> float:
        """The largest step h, rounded down, that is α-averaged (α = 1: non-expansive) on a ν-cocoercive dissipative
        field: h = 2ν/(1/α - 1 + 1/r), that is 2νr for α = 1. Infinite where any step will do.

        Raises ValueError unless ν > 0 and 0 < α ≤ 1, Refused where r = 0.
        """
        if not nu > 0:
            raise ValueError(f"the cocoercivity ν = {nu} must be positive")
        if not 0 < alpha <= 1:
            raise ValueError(f"the averagedness α = {alpha} must lie in (0, 1]")
        denominator = 1 / Fraction(alpha) - 1 + self.require_usable()
        return math.inf if denominator <= 0 or math.isinf(nu) else _down(2 * Fraction(nu) / denominator)

    def averagedness(self, nu: float, h: float) -> float:
        """α = 1/(1 + 2ν/h - 1/r), rounded up: a step of size h is α-averaged on a ν-cocoercive dissipative field.
        Above 1 (or infinite) no bound is known, not even non-expansiveness. A step h = 0 or a constant field (ν = ∞)
        has α = 0.

        Raises ValueError if ν ≤ 0, h < 0 or either is not a number, Refused where r = 0.
        """
        c = self.require_usable()
        if not nu > 0 or not 0 <= h < math.inf:
            raise ValueError(f"needs a cocoercivity ν > 0 and a finite step h ≥ 0, not ν = {nu} and h = {h}")
        if h == 0 or math.isinf(nu):
            return 0.0
        gain = 2 * Fraction(nu) / Fraction(h) - c
        return _up(1 / (1 + gain)) if gain > -1 else math.inf

    def substeps(self, span: float, nu: float, alpha: float = 1.0) -> int:
        """The fewest equal substeps n ≥ 1 for which span/n, as a float64, is at most ``max_step(nu, alpha)``."""
        if not 0 <= span < math.inf:
            raise ValueError(f"the time span {span} must be finite and not negative")
        longest = self.max_step(nu, alpha)
        if math.isinf(longest):
            return 1
        if longest == 0:
            raise Refused(f"the cocoercivity ν = {nu} is too small for any step: the linear map's norm is out of range")
        n = max(1, math.floor(Fraction(span) / Fraction(longest)))
        while span / n > longest:
            n += 1
        return n


def _down(x: Fraction) -> float:
    """The largest float not above x ≥ 0 (where that is finite)."""
    try:
        y = float(x)
    except OverflowError:
        return sys.float_info.max
    return math.nextafter(y, -math.inf) if Fraction(y) > x else y


def _up(x: Fraction) -> float:
    """The smallest float not below x ≥ 0."""
    try:
        y = float(x)
    except OverflowError:
        return math.inf
    return math.nextafter(y, math.inf) if Fraction(y) < x else y


def _positive_semidefinite(m: list[list[Fraction]]) -> bool:
    """Exactly, by LDLᵀ: no negative pivot, and a zero pivot only with a zero row."""
    m = [row[:] for row in m]
    for k in range(len(m)):
        if m[k][k] < 0 or (m[k][k] == 0 and any(m[k][k:])):
            return False
        for i in range(k + 1, len(m)):
            if m[i][k]:
                factor = m[i][k] / m[k][k]
                for j in range(k, len(m)):
                    m[i][j] -= factor * m[k][j]
    return True


def _recurrence(a: tuple[tuple[Fraction, ...], ...], b: tuple[Fraction, ...]) -> tuple[Row, ...]:
    rows = [row[:i] for i, row in enumerate((*a, b))][1:]
    plan: list[tuple[Fraction, list[tuple[int, Fraction]]]] = []
    for i, row in enumerate(rows):
        above = rows[i - 1] if i else ()
        ratios = {w / v for w, v in zip(row, above, strict=False) if v}
        multiple = len(ratios) == 1 and all(bool(v) or not w for w, v in zip(row, above, strict=False))
        theta = ratios.pop() if multiple else Fraction(0)
        plan.append((theta, [(j, w) for j, w in enumerate(row) if w and (not theta or j == i)]))
    last = {j: i for i, (_, terms) in enumerate(plan) for j, _ in terms}
    return tuple(
        (float(theta), tuple((j, float(w)) for j, w in terms), tuple(j for j in range(i + 1) if last.get(j, j) == i))
        for i, (theta, terms) in enumerate(plan)
    )


@cache
def _trees(nodes: int) -> tuple[Tree, ...]:
    """All rooted trees with that many nodes, each the sorted tuple of its subtrees."""

    def forests(total: int, largest: int) -> Iterator[Tree]:
        if total == 0:
            yield ()
        for size in range(min(total, largest), 0, -1):
            for count in range(1, total // size + 1):
                for group in combinations_with_replacement(_trees(size), count):
                    for rest in forests(total - size * count, size - 1):
                        yield group + rest

    return tuple(forests(nodes - 1, nodes - 1))


def _size(tree: Tree) -> int:
    return 1 + sum(map(_size, tree))


def _density(tree: Tree) -> int:
    return _size(tree) * math.prod(map(_density, tree))


def _elementary(tree: Tree, a: tuple[tuple[Fraction, ...], ...]) -> list[Fraction]:
    value = [Fraction(1)] * len(a)
    for subtree in tree:
        inner = _elementary(subtree, a)
        value = [
            v * sum((w * x for w, x in zip(row, inner, strict=True)), Fraction(0))
            for v, row in zip(value, a, strict=True)
        ]
    return value


def _lower(name: str, rows: Sequence[Sequence[str | int]], b: Sequence[str | int]) -> ButcherTableau:
    """An explicit method from the rows of a below the diagonal, row 1 (empty) left out."""
    s = len(b)
    full = [[Fraction(v) for v in row] + [Fraction(0)] * (s - len(row)) for row in ((), *rows)]
    return ButcherTableau(name, full, [Fraction(v) for v in b])


@cache
def ssp2(s: int) -> ButcherTableau:
    """SSP(s, 2), the optimal strong-stability-preserving method of order 2 with s ≥ 2 stages, r = s - 1: s - 1 equal
    Euler steps averaged with a last one (Ketcheson 2008, *Highly efficient strong stability-preserving Runge-Kutta
    methods with low-storage implementations*). Raises ValueError if s < 2."""
    if s < 2:
        raise ValueError(f"SSP(s, 2) needs s ≥ 2 stages, not {s}")
    return _lower(f"ssp({s},2)", [[f"1/{s - 1}"] * i for i in range(1, s)], [f"1/{s}"] * s)


METHODS: dict[str, ButcherTableau] = {
    method.name: method
    for method in (
        # Euler 1768: the residual step, the longest non-expansive step per evaluation of any explicit method (r = 1).
        _lower("euler", (), [1]),
        # Heun 1900, the same as SSP(2,2) (r = 1).
        _lower("heun", [[1]], ["1/2", "1/2"]),
        # Shu & Osher 1988 (r = 1).
        _lower("ssp33", [[1], ["1/4", "1/4"]], ["1/6", "1/6", "2/3"]),
        # Kraaijevanger 1991 (r = 2).
        _lower("ssp43", [["1/2"], ["1/2"] * 2, ["1/6"] * 3], ["1/6", "1/6", "1/6", "1/2"]),
        # Ketcheson 2008 (r = 6).
        _lower(
            "ssp104",
            [*(["1/6"] * i for i in range(1, 5)), *(["1/15"] * 5 + ["1/6"] * i for i in range(5))],
            ["1/10"] * 10,
        ),
        # Kutta 1901: the method of order 4 (r = 1), the one of order 3 (r = 1/2) and the 3/8 rule (r = 0.46).
        _lower("rk4", [["1/2"], [0, "1/2"], [0, 0, 1]], ["1/6", "1/3", "1/3", "1/6"]),
        _lower("kutta3", [["1/2"], [-1, 2]], ["1/6", "2/3", "1/6"]),
        _lower("rk38", [["1/3"], ["-1/3", 1], [1, -1, 1]], ["1/8", "3/8", "3/8", "1/8"]),
        # Ralston 1962: least error bound at orders 2 (r = 0.79) and 3 (r = 0.90).
        _lower("ralston2", [["2/3"]], ["1/4", "3/4"]),
        _lower("ralston3", [["1/2"], [0, "3/4"]], ["2/9", "1/3", "4/9"]),
        # Methods with r = 0, here to be refused by name: Runge 1895, Heun 1900, Dormand & Prince 1980.
        _lower("midpoint", [["1/2"]], [0, 1]),
        _lower("heun3", [["1/3"], [0, "2/3"]], ["1/4", 0, "3/4"]),
        _lower(
            "dopri5",
            [
                ["1/5"],
                ["3/40", "9/40"],
                ["44/45", "-56/15", "32/9"],
                ["19372/6561", "-25360/2187", "64448/6561", "-212/729"],
                ["9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"],
            ],
            ["35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84"],
        ),
        # The resolvent (I - hX)^{-1}, solved for by its own block (r = ∞).
        ButcherTableau("implicit_euler", [[1]], [1]),
    )
}
"""The methods by name; SSP(s, 2) is found at any s as "ssp(s,2)" or "ssps2"."""


def tableau(method: str | ButcherTableau) -> ButcherTableau:
    """Looks a method up by name ("euler", "rk4", "ssp(5,2)", "ssp32", ...); a tableau is returned as it is.

    Raises BadInput, listing the names and the closest ones, where there is none of that name.
    """
    if isinstance(method, ButcherTableau):
        return method
    name = method.strip().lower().replace("-", "_")
    if name in METHODS:
        return METHODS[name]
    if match := re.fullmatch(r"ssp(?:\((\d{1,3}), ?2\)|(\d{1,2})2)", name):
        stages = int(match[1] or match[2])
        if stages >= 2:
            return ssp2(stages)
    close = difflib.get_close_matches(name, METHODS, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise BadInput(
        f"no Runge-Kutta method is called {method!r}.{hint} Known: {', '.join(METHODS)}, ssp(s,2) for any s ≥ 2"
    )
