"""Laws of the Runge-Kutta methods: order, contractivity radius, averagedness, and the stepper that runs them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.integrate import integrate, step
from nonexpansive.math.tableau import METHODS, ButcherTableau, ssp2, tableau

ORDERS = {
    "euler": 1, "heun": 2, "ssp33": 3, "ssp43": 3, "ssp104": 4, "rk4": 4, "kutta3": 3, "rk38": 4, "ralston2": 2,
    "ralston3": 3, "midpoint": 2, "heun3": 3, "dopri5": 5, "implicit_euler": 1, "ssp(3,2)": 2, "ssp(7,2)": 2,
}  # fmt: skip
RADII = {
    "euler": 1, "heun": 1, "ssp33": 1, "rk4": 1, "ssp(3,2)": 2, "ssp43": 2, "ssp104": 6, "kutta3": 0.5,
    "implicit_euler": math.inf,
}  # fmt: skip
METHOD_LIST = [*METHODS.values(), *map(ssp2, (3, 5))]
EXPLICIT = [m for m in METHOD_LIST if m.explicit]
USABLE = [m for m in EXPLICIT if m.radius > 0]


def by_name(method: ButcherTableau) -> str:
    return method.name


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_conditions(name: str, order: int) -> None:
    assert tableau(name).order == order


@pytest.mark.parametrize("method", EXPLICIT, ids=by_name)
def test_order_by_regression(method: ButcherTableau) -> None:
    """The global error on a smooth nonlinear system falls like h^p."""

    def field(x: Tensor) -> Tensor:
        return torch.stack([x[1].sin() - x[0], -x[0] * x[1] + x[1].cos()])

    x, counts = torch.tensor([0.7, -0.4], dtype=torch.float64), [24, 32, 48, 64]
    exact = integrate(field, x, 2 / 400, METHODS["dopri5"], 400)
    errors = [float((integrate(field, x, 2 / n, method, n) - exact).norm()) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(method.order, abs=0.25)


@pytest.mark.parametrize("method", EXPLICIT, ids=by_name)
def test_low_storage_form_is_the_method(method: ButcherTableau) -> None:
    """The recurrence agrees with the textbook formula, for float and tensor steps, and differentiates in h."""

    def field(x: Tensor) -> Tensor:
        return torch.sin(3 * x) - x

    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    slopes: list[Tensor] = []
    for row in method.a:
        slopes.append(
            field(x + 0.3 * sum((float(w) * k for w, k in zip(row, slopes, strict=False)), torch.zeros_like(x)))
        )
    expected = x + 0.3 * sum(float(w) * k for w, k in zip(method.b, slopes, strict=True))
    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(step(field, x, 0.3, method), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(step(field, x, h, method), expected, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda h: step(field, x, h, method), (h,))


@pytest.mark.parametrize(("name", "radius"), RADII.items())
def test_known_radii_are_exact(name: str, radius: float) -> None:
    assert tableau(name).radius == radius


@pytest.mark.parametrize(
    ("name", "radius"), {"ralston2": 0.7913, "ralston3": 0.8990, "rk38": 2 * math.sqrt(3) - 3}.items()
)
def test_other_radii(name: str, radius: float) -> None:
    assert tableau(name).radius == pytest.approx(radius, abs=5e-5)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_radius_of_any_method_is_a_proven_lower_bound(s: int, seed: int) -> None:
    """M + B/r is positive semi-definite, and for a slightly larger r it is not."""
    random = np.random.default_rng(seed)
    a, b = np.tril(random.normal(size=(s, s)), -1), random.uniform(0.1, 1, s)
    method = ButcherTableau("random", a.tolist(), (b / b.sum()).tolist())
    b = np.array(method.b, dtype=float)
    m = b[:, None] * a + a.T * b - np.outer(b, b)
    assert method.deficiency is not None
    eigenvalue = np.linalg.eigvalsh(m / np.sqrt(np.outer(b, b)))[0]
    assert float(method.deficiency) == pytest.approx(-eigenvalue, rel=1e-8)
    assert method.radius > 0
    assert method.deficiency <= 0 or Fraction(method.radius) * method.deficiency <= 1
    x = random.normal(size=s)
    assert x @ m @ x + float(method.deficiency) * (b * x) @ x >= -1e-12


def convex_field(seed: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, dtype=torch.float64, generator=generator)
    return (
        a,
        torch.randn(m, dtype=torch.float64, generator=generator),
        (1 - 1e-14) / float(torch.linalg.matrix_norm(a, 2)) ** 2,
    )


@pytest.mark.parametrize("method", USABLE, ids=by_name)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.floats(0.05, 1), st.sampled_from(["relu", "tanh"])
)
@settings(max_examples=15, deadline=None)
def test_a_step_is_averaged(method: ButcherTableau, n: int, m: int, seed: int, alpha: float, name: str) -> None:
    """‖Tx - Ty‖² ≤ ‖x - y‖² - ((1-α)/α)‖(I-T)x - (I-T)y‖² at the largest step for α; for α = 1, non-expansive."""
    a, b, nu = convex_field(seed, n, m)
    sigma = getattr(torch, name)

    def field(x: Tensor) -> Tensor:
        return -sigma(x @ a.T + b) @ a

    for wanted in (1.0, alpha):
        h = method.max_step(nu, wanted)
        assert method.averagedness(nu, h) == pytest.approx(wanted, rel=1e-12)
        x, y = torch.randn(2, 64, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
        y = torch.where(torch.arange(64)[:, None] % 2 == 0, y, x + 0.01 * y)
        tx, ty = step(field, x, h, method), step(field, y, h, method)
        before, after = (x - y).square().sum(1), (tx - ty).square().sum(1)
        moved = (x - y - tx + ty).square().sum(1)
        # what the float64 program itself loses: a nearby pair has few digits left in Tx - Ty
        size = x.norm(dim=1) + y.norm(dim=1)
        lost = 1e-14 * (size + h / nu * (size + nu**0.5 * b.norm()))
        slack = 1e-12 * before + (before.sqrt() + lost) * lost / wanted
        assert (after <= before - (1 - wanted) / wanted * moved + slack).all()


@pytest.mark.parametrize("name", ["euler", "heun", "ssp33", "ssp(3,2)", "ssp43", "ralston2"])
def test_the_step_is_sharp(name: str) -> None:
    """5 % above h = 2νr some 1-cocoercive dissipative field makes the step expand. A step meets the field at its
    stages, and there it may act as any multiplications by z_i with |z_i + 1/2| ≤ 1/2, which is cocoercivity (ν = 1)
    in the plane."""
    method = tableau(name)
    h = 1.05 * method.max_step(1.0)
    circle = -0.5 + 0.5 * np.exp(2j * np.pi * np.arange(24) / 24)
    slopes: list[np.ndarray] = []
    for row, z in zip(method.a, np.meshgrid(*[circle] * method.stages, indexing="ij", sparse=True), strict=True):
        slopes.append(z * (1 + h * sum(float(w) * k for w, k in zip(row, slopes, strict=False))))
    growth = np.abs(1 + h * sum(float(w) * k for w, k in zip(method.b, slopes, strict=True)))
    assert growth.max() > 1.001


def test_substeps_are_safe_and_fewest() -> None:
    for method in USABLE:
        for span, nu, alpha in [(1.0, 0.3, 1.0), (7.3, 0.01, 0.5), (0.01, 1.0, 0.2), (2.0, 1 / 3, 1.0)]:
            n = method.substeps(span, nu, alpha)
            assert span / n <= method.max_step(nu, alpha)
            assert n == 1 or span / (n - 1) > method.max_step(nu, alpha)
    assert tableau("euler").substeps(5.0, math.inf) == 1
    assert tableau("euler").substeps(0.0, 1.0) == 1


def test_edges() -> None:
    euler, implicit = tableau("euler"), tableau("implicit_euler")
    assert euler.averagedness(1.0, 0.0) == 0.0
    assert euler.averagedness(math.inf, 1.0) == 0.0
    assert euler.averagedness(1.0, 1.0) == 0.5
    assert euler.averagedness(1.0, 2.1) > 1
    assert math.isinf(
        ButcherTableau("k", [[0, 0, 0], [0.5, 0, 0], [-1, 2, 0]], [1 / 6, 2 / 3, 1 / 6]).averagedness(1.0, 1e9)
    )
    assert math.isinf(implicit.max_step(1.0))
    assert math.isinf(implicit.max_step(1.0, 0.5))
    assert implicit.averagedness(1.0, 2.0) == pytest.approx(1 / 3)
    for bad in [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, math.nan)]:
        with pytest.raises(ValueError, match="must"):
            euler.max_step(*bad)
    for bad in [(0.0, 1.0), (1.0, -1.0), (1.0, math.nan), (1.0, math.inf)]:
        with pytest.raises(ValueError, match="needs"):
            euler.averagedness(*bad)


@pytest.mark.parametrize("name", ["midpoint", "heun3", "dopri5"])
def test_radius_zero_is_refused_with_the_reason(name: str) -> None:
    for use in (lambda m: m.max_step(1.0), lambda m: m.averagedness(1.0, 1.0), lambda m: m.substeps(1.0, 1.0)):
        with pytest.raises(Refused, match=r"b_\d = "):
            use(tableau(name))
    assert tableau(name).radius == 0


def test_implicit_methods_cannot_be_stepped() -> None:
    with pytest.raises(Refused, match="Resolvent"):
        step(torch.neg, torch.ones(2), 0.1, tableau("implicit_euler"))


@pytest.mark.parametrize(
    ("a", "b"),
    [([[0]], [0.5]), ([[0, 0]], [1]), ([], []), ([[0, 0], [1]], [0.5, 0.5]), ([[math.nan]], [1]), ([[0]], [math.inf])],
)
def test_bad_tableaus(a: list, b: list) -> None:
    with pytest.raises(ValueError, match="mine"):
        ButcherTableau("mine", a, b)


def test_names() -> None:
    assert tableau("ssp(5,2)") is tableau("SSP52") is ssp2(5)
    assert tableau("ssp22").radius == 1
    assert tableau("ssp(12,2)").stages == 12
    assert tableau(ssp2(4)) is ssp2(4)
    with pytest.raises(BadInput, match="Did you mean rk4"):
        tableau("rk5")
    for name in ("ssp12", "", "ssp(1,2)"):
        with pytest.raises(BadInput, match="Known: euler"):
            tableau(name)


def test_compiles_and_transforms() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    method = tableau("ssp43")
    compiled = torch.compile(lambda x, h: step(torch.neg, x, h, method), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, 0.25), step(torch.neg, x, 0.25, method))
    _, tangent = torch.func.jvp(lambda x: step(torch.neg, x, 0.25, method), (x,), (x,))
    torch.testing.assert_close(tangent, step(torch.neg, x, 0.25, method))
