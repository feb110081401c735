"""Laws of one-sided rounding: against exact rationals, and enclosures against the float32 operations that they enclose."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nonexpansive.errors import Refused
from nonexpansive.math.activation import slopes
from nonexpansive.math.enclosure import Affine, Enclosure, LinearMap, Observed
from nonexpansive.math.rounding import UNIT, above, below, down, euclidean, gamma, plus, root, times, up

positive = st.floats(1e-300, 1e150)
number = st.floats(-1e150, 1e150)
U = UNIT[torch.float32]


@given(number, number)
def test_sums_and_products_are_rounded_up_and_no_further(a: float, b: float) -> None:
    for rounded, exact in ((plus(a, b), Fraction(a) + Fraction(b)), (times(a, b), Fraction(a) * Fraction(b))):
        assert Fraction(rounded) >= exact
        assert Fraction(math.nextafter(rounded, -math.inf)) < exact


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_roots_are_rounded_up(numerator: int, denominator: int) -> None:
    square = Fraction(numerator, denominator)
    assert Fraction(root(square)) ** 2 >= square
    assert Fraction(max(0.0, down(root(square), 2))) ** 2 <= square
    assert root(numerator**2) == numerator
    assert root(Fraction(1, 4)) == 0.5


@given(st.one_of(number, st.floats(-10, 10)), st.integers(2, 9))
def test_what_is_printed_is_a_bound(x: float, digits: int) -> None:
    high, low = above(x, digits), below(x, digits)
    assert float(low) <= x <= float(high)
    assert float(high) - float(low) <= 2.1 * abs(x) * 10 ** (1 - digits)
    assert len(high.replace("-", "").replace(".", "").partition("e")[0].lstrip("0")) <= digits
    assert down(x) < x < up(x)


def test_gamma_and_norms_are_upper_bounds() -> None:
    assert Fraction(gamma(7, U)) >= Fraction(7) * Fraction(U) / (1 - 7 * Fraction(U))
    with pytest.raises(ValueError, match="no error bound"):
        gamma(2**24, U)
    x = torch.tensor([3.0, 4.0])
    assert 5 <= euclidean(x) <= 5 * (1 + 1e-14)
    assert euclidean(None) == 0
    assert math.isinf(times(1e200, 1e200)) and math.isinf(plus(1.7e308, 1.7e308))


@given(positive, positive, positive, positive, st.floats(0, 1e100))
def test_affine_bounds_compose(a: float, b: float, c: float, d: float, u: float) -> None:
    outer, inner = Affine(a, b), Affine(c, d)
    exact = Fraction(a) * (Fraction(c) * Fraction(u) + Fraction(d)) + Fraction(b)
    if exact < 1e300:
        assert Fraction(outer.of(inner)(u)) >= exact
        assert Fraction((outer + inner)(u)) >= (Fraction(a) + Fraction(c)) * Fraction(u) + Fraction(b) + Fraction(d)


scales = st.sampled_from([1e-42, 1e-36, 1e-30, 1e-9, 1.0, 1e4, 1e12])


def vector(n: int, scale: float, seed: int) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).float()


def assert_enclosed(program: Tensor, exact: Tensor, enclosure: Enclosure, u: float) -> None:
    assert program.dtype == torch.float32 and exact.dtype == torch.float64
    assert float((program.double() - exact).norm()) <= enclosure.error(u)
    assert float(exact.norm()) <= enclosure.norm(u) * (1 + 1e-12)


@given(scales, scales, st.integers(1, 40), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_linear_maps_stay_in_their_enclosure(size: float, weight: float, n: int, seed: int) -> None:
    x, b = vector(n, size, seed), vector(3, size, seed + 2)
    matrix = vector(3 * n, min(weight, 1e10 / size), seed + 1).reshape(3, n)
    exact, u = matrix.double() @ x.double() + b.double(), float(x.double().norm())
    norms = [float(torch.linalg.matrix_norm(m.double(), 2)) * (1 + 1e-12) for m in (matrix, matrix.abs())]
    enclosure = Enclosure.input(U, n).linear(LinearMap(*norms, n, 3, euclidean(b)))
    assert_enclosed(torch.addmv(b, matrix, x), exact, enclosure, u)
    scaled = Enclosure.input(U, n).linear(LinearMap(*norms, n, 3)) * 0.3
    assert_enclosed((matrix @ x) * 0.3, 0.3 * (matrix.double() @ x.double()), scaled, u)


@given(scales, scales, st.floats(-3, 3), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_sums_multiples_and_interpolations_stay_in_their_enclosure(one: float, two: float, t: float, seed: int) -> None:
    x, y = vector(9, one, seed), vector(9, two, seed + 1)
    u, v = euclidean(x), euclidean(y)
    a, b = Enclosure.input(U, 9), Enclosure(Affine(0.0, v), Affine(), U, 9)
    assert_enclosed(x + y, x.double() + y.double(), a + b, u)
    assert_enclosed(x.lerp(y, t), x.double() * (1 - t) + y.double() * t, a.lerp(b, t), u)
    near = 1 - t * 1e-9
    assert_enclosed(x.lerp(y, near), x.double() * (1 - near) + y.double() * near, a.lerp(b, near), u)
    if t == 0 or abs(t) > 2.0**-100:
        assert_enclosed(x * t, x.double() * t, a * t, u)


@pytest.mark.parametrize(
    "sigma", [nn.ReLU(), nn.LeakyReLU(0.01), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Softplus()], ids=repr
)
@pytest.mark.parametrize("scale", [1e-42, 1e-36, 1e-9, 1.0, 30.0, 1e4])
def test_activations_stay_in_their_enclosure(sigma: nn.Module, scale: float) -> None:
    x = vector(200, scale, 0)
    # softplus is enclosed without its switch to the identity
    exact = (
        torch.nn.functional.softplus(x.double(), threshold=700) if isinstance(sigma, nn.Softplus) else sigma(x.double())
    )
    assert_enclosed(sigma(x), exact, Enclosure.input(U, 200).elementwise(slopes(sigma)), euclidean(x))


def observe(x: Tensor) -> Observed:
    """One sample, of float32 numbers, seen."""
    return Observed.input(x.double()[None], U)


def assert_observed(program: Tensor, exact: Tensor, seen: Observed, enclosure: Enclosure, u: float) -> None:
    """The program is within the bound, also if all of it were due to the float64 run, and the bound is no worse than unseen."""
    assert program.dtype == torch.float32 and exact.dtype == torch.float64
    assert float((program.double() - exact).norm()) <= float(seen.apart)
    assert float((program.double() - seen.value[0]).norm()) <= float(seen.error[0])
    assert float(seen.apart) <= enclosure.error(u) * (1 + 1e-6)


@given(scales, scales, st.integers(1, 40), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_linear_maps_stay_within_what_was_seen(size: float, weight: float, n: int, seed: int) -> None:
    x, b = vector(n, size, seed), vector(3, size, seed + 2)
    matrix = vector(3 * n, min(weight, 1e10 / size), seed + 1).reshape(3, n)
    norms = [float(torch.linalg.matrix_norm(m.double(), 2)) * (1 + 1e-12) for m in (matrix, matrix.abs())]
    a, o = matrix.double(), b.double()
    linear = LinearMap(*norms, n, 3, euclidean(b), lambda v: v @ a.T + o, lambda v: v @ a.abs().T + o.abs())
    for program in (torch.addmv(b, matrix, x), sum((matrix[:, k] * x[k] for k in range(n)), b)):  # and one by one
        seen, enclosure = observe(x).linear(linear), Enclosure.input(U, n).linear(linear)
        assert_observed(program, a @ x.double() + o, seen, enclosure, euclidean(x))
        exact = a @ (0.3 * (a @ x.double() + o).repeat(n)[:n]) + o
        again = LinearMap(*norms, n, 3, euclidean(b), linear.apply, linear.sizes)
        inner = program.repeat(n)[:n]  # made of what was computed: its error is handed on
        handed = Observed(seen.value.repeat(1, n)[:, :n], seen.error * n**0.5, U) * 0.3
        assert float((torch.addmv(b, matrix, inner * 0.3).double() - exact).norm()) <= float(handed.linear(again).apart)


def test_what_was_off_before_is_off_afterwards() -> None:
    """Errors far above any rounding, of the program and of the exact value apart, through each operation."""
    torch.manual_seed(0)
    a, x, y = torch.randn(5, 9).double(), torch.randn(9).double(), torch.randn(9).double()
    steep = torch.linalg.svd(a).Vh[0]  # the direction in which A stretches the most
    norms = [float(torch.linalg.matrix_norm(m, 2)) for m in (a, a.abs())]
    linear = LinearMap(*norms, 9, 5, 0.0, lambda v: v @ a.T, lambda v: v @ a.abs().T)
    for row, size in ((0, 0.1), (1, 0.03)):
        error = torch.zeros(2, 1, dtype=torch.float64)
        error[row] = size
        seen, known, off = Observed(x[None], error, U), observe(y), size * steep
        for after, moved in (
            (seen.linear(linear), a @ off),
            (seen.elementwise(slopes(nn.Softplus()), nn.Softplus()), nn.Softplus()(x + off) - nn.Softplus()(x)),
            (seen * -3.0, -3.0 * off),
            (seen * 1.0, off),
            (seen + known, off),
            (seen + seen, 2 * off),
            (seen.lerp(known, 0.25), 0.75 * off),
            (known.lerp(seen, 0.25), 0.25 * off),
            (seen.rounded(seen.computed, 1.0), off),
        ):
            least = float(moved.norm()) * (1 - 1e-12)  # its own rounding
            assert float(after.error[row]) >= least and float(after.apart) >= least
            assert float(after.error[1 - row]) < 1e-4


def test_a_sum_taken_in_the_worst_order_comes_near_what_is_allowed() -> None:
    """1 and n - 1 numbers of which each is lost when it is added to 1: a program that is allowed, and a bound that is not idle."""
    n = 65
    x = torch.full((n,), 2.0**-24 * 0.99)
    x[0] = 1.0
    program = sum(x[1:], x[0])
    linear = LinearMap(n**0.5, n**0.5, n, 1, 0.0, lambda v: v.sum(1, keepdim=True), lambda v: v.sum(1, keepdim=True))
    lost = abs(float(program) - float(x.double().sum()))
    seen = float(observe(x).linear(linear).apart)
    assert 0.9 * (n - 1) * U < lost <= seen < 1.2 * lost
    assert Enclosure.input(U, n).linear(linear).error(euclidean(x)) > 5 * seen


@given(scales, scales, st.floats(-3, 3), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_sums_multiples_and_interpolations_stay_within_what_was_seen(
    one: float, two: float, t: float, seed: int
) -> None:
    x, y = vector(9, one, seed), vector(9, two, seed + 1)
    u = euclidean(x)
    a, b = Enclosure.input(U, 9), Enclosure(Affine(0.0, euclidean(y)), Affine(), U, 9)
    v, w = observe(x), observe(y)
    assert_observed(x + y, x.double() + y.double(), v + w, a + b, u)
    assert_observed(x.lerp(y, t), x.double() * (1 - t) + y.double() * t, v.lerp(w, t), a.lerp(b, t), u)
    if t == 0 or abs(t) > 2.0**-100:
        assert_observed(x * t, x.double() * t, v * t, a * t if t not in (0, 1) else a * 0.9, u)


@pytest.mark.parametrize("sigma", [nn.ReLU(), nn.LeakyReLU(0.01), nn.Tanh(), nn.GELU(), nn.SiLU()], ids=repr)
@pytest.mark.parametrize("scale", [1e-42, 1e-36, 1e-9, 1.0, 30.0, 1e4])
def test_activations_stay_within_what_was_seen(sigma: nn.Module, scale: float) -> None:
    x = vector(200, scale, 0)
    seen, enclosure = observe(x).elementwise(slopes(sigma), sigma), Enclosure.input(U, 200).elementwise(slopes(sigma))
    assert_observed(sigma(x), sigma(x.double()), seen, enclosure, euclidean(x))


def test_exact_arithmetic_has_no_error_but_what_is_put_in() -> None:
    x = Enclosure.input(0.0, 4)
    assert (x.linear(LinearMap(2.0, 9.0, 5, 4, 1.0)) * 0.3 + x).lerp(x, 0.7).rounded(Affine(9.0), 9).error == Affine()
    assert (Enclosure(Affine(1.0), Affine(0.5), 0.0, 4).linear(LinearMap(2.0, 9.0, 5, 4)) * 3).error == Affine(3.0)


def test_numbers_near_the_end_of_the_range_are_refused() -> None:
    with pytest.raises(Refused, match="range"):
        Enclosure.input(U, 4) * 1e-40
    with pytest.raises(Refused, match="inner product"):
        Enclosure.input(U, 4).linear(LinearMap(1.0, 1.0, 2**24, 4))


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-170, 1e-40, 1.0, 1e170, 8e307])
def test_a_norm_is_not_lost_to_underflow(value: float) -> None:
    x = torch.full((4,), value, dtype=torch.float64)
    assert Fraction(euclidean(x)) >= 2 * Fraction(value)
    assert euclidean(x) <= 2 * value * (1 + 1e-12) + 1e-322
    assert euclidean(torch.tensor([1.0, math.inf])) == math.inf and math.isnan(euclidean(torch.tensor([math.nan])))
    assert euclidean(torch.zeros(0)) == 0
