"""Laws of the resolvent: solved to a stated tolerance, firmly non-expansive, with the right gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import Difference
from nonexpansive import certify
from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.math.tableau import tableau
from nonexpansive.nn import implicit
from nonexpansive.nn.control import sound_norm
from nonexpansive.nn.implicit import Resolvent
from nonexpansive.nn.linear import homogeneous
from nonexpansive.nn.pooled import PooledRamps, WeaklyConvexRamps
from nonexpansive.nn.spline import ClippedRamps

CASES = [
    (lambda: nn.Linear(5, 7), (5,)),
    (lambda: nn.Linear(6, 3, bias=False), (6,)),
    (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 7)),
    (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2), (2, 5, 6)),
    (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", groups=2), (2, 4, 4)),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (4,)),
]
ACTIVATIONS = ["relu", "tanh", "softplus", "sigmoid"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of operations on a few numbers each: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(
    case: int, activation: str | nn.Module = "relu", step: float = 1.0, tolerance: float = 1e-11
) -> tuple[Resolvent, tuple[int, ...]]:
    torch.manual_seed(case)
    make, shape = CASES[case]
    return Resolvent(make(), activation, step, tolerance).double().eval(), shape


def sample(shape: tuple[int, ...], count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(resolvent: Resolvent, z: Tensor) -> Tensor:
    """Aᵀσ(Az + b), by the vector-Jacobian product and nothing of the block's own."""
    t, pullback = torch.func.vjp(resolvent.linear, z)
    return pullback(resolvent.activation(t))[0]


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@pytest.mark.parametrize("step", [0.1, 30.0])
@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_solves_its_equation(case: int, activation: str, step: float) -> None:
    loose, shape = built(case, activation, step, 1e-3)
    tight = copy.deepcopy(loose)
    tight.tolerance = 1e-9
    x = sample(shape)
    for mode in (True, False):
        z = loose.train(mode)(x)
        assert (norms(z + step * gradient(loose, z) - x) <= 1e-3 * norms(x).clamp_min(1) * (1 + 1e-9)).all()
        deviation = torch.tensor([loose.deviation(float(n)) for n in norms(x)])
        assert (norms(z - tight(x)) <= deviation + 1e-9 * norms(x).clamp_min(1)).all()


@given(st.integers(0, len(CASES) - 1), st.sampled_from(ACTIVATIONS), st.floats(-2, 1.5), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_it_is_firmly_non_expansive_at_every_step(case: int, activation: str, exponent: float, seed: int) -> None:
    """‖Tx - Ty‖² ≤ ‖x - y‖² - ((1-α)/α)‖(I-T)x - (I-T)y‖² with α = 1/2, and with the smaller α = 1/(2 + 2ν/h)."""
    resolvent, shape = built(case, activation, 10**exponent)
    x, y = sample(shape, 8, seed), sample(shape, 8, seed + 1)
    with torch.no_grad():
        tx, ty = resolvent(x), resolvent(y)
        bound = 0.25 if activation == "sigmoid" else 1.0
        matrix = torch.func.jacrev(resolvent.linear)(x[:1]).reshape(-1, math.prod(shape))
    nu = 1 / (bound * float(torch.linalg.matrix_norm(matrix, 2)) ** 2)
    alpha = tableau("implicit_euler").averagedness(nu, resolvent.step)
    assert alpha <= 0.5
    assert alpha == pytest.approx(1 / (2 + 2 * nu / resolvent.step))
    before, after, moved = norms(x - y) ** 2, norms(tx - ty) ** 2, norms(x - y - tx + ty) ** 2
    for a in (0.5, alpha):
        assert (after <= before - (1 - a) / a * moved + 1e-8 * before).all()


@pytest.mark.parametrize("activation", ["softplus", "tanh"])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_gradients(case: int, mode: bool, activation: str) -> None:
    resolvent, shape = built(case, activation, 3.0, 1e-12)
    resolvent.train(mode)
    names = [name for name, _ in resolvent.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(resolvent, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (sample(shape, 2).requires_grad_(), *resolvent.parameters()), fast_mode=True)
    # with other weights than its own, which are gone when the gradient is taken
    others = [(1.5 * p.detach()).requires_grad_() for p in resolvent.parameters()]
    assert torch.autograd.gradcheck(run, (sample(shape, 2).requires_grad_(), *others), fast_mode=True)


def weakly_convex(case: int, tolerance: float = 1e-11, modulus: float = 0.9) -> tuple[Resolvent, tuple[int, ...]]:
    torch.manual_seed(case)
    make, shape = CASES[case]
    linear = make()
    channels = linear(torch.zeros(1, *shape)).shape[1]
    ramps = WeaklyConvexRamps(channels, 2, modulus=modulus)
    with torch.no_grad():
        for p in ramps.parameters():
            p.add_(0.3 * torch.randn(p.shape))
        ramps.falls[1:].add_(1.0)
    return Resolvent(linear, ramps, 1.0, tolerance, relative=True).double().eval(), shape


@pytest.mark.parametrize("case", range(len(CASES)))
def test_wherever_it_begins_it_ends_at_the_solution(case: int) -> None:
    resolvent, shape = weakly_convex(case, 1e-6)
    x = 0.3 * sample(shape, 3)
    with torch.no_grad():
        there = resolvent(x, 0.7)
        for near in (there, torch.zeros_like(x), 100 * torch.randn_like(x), there + 1e-4 * torch.randn_like(x)):
            z = resolvent(x, 0.7, near=near)
            for one, other, norm in zip(z, there, x.flatten(1).norm(dim=1), strict=True):
                assert (one - other).norm() <= 2 * resolvent.deviation(float(norm)) * 1.001
        assert torch.equal(resolvent(x, 0.7, near=there), there)  # nothing to do
        with pytest.raises(BadInput, match="begin near"):
            resolvent(x, 0.7, near=there[:1])
    y, w = x.clone().requires_grad_(), x.clone().requires_grad_()
    resolvent(y, 0.7).square().sum().backward()
    resolvent(w, 0.7, near=there).square().sum().backward()
    assert y.grad is not None and w.grad is not None and torch.allclose(y.grad, w.grad, atol=1e-4)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_of_a_weakly_convex_function_it_solves_its_equation_and_is_as_lipschitz_as_stated(case: int) -> None:
    resolvent, shape = weakly_convex(case)
    h = resolvent.length(sound_norm(resolvent.linear))
    certificate = certify(resolvent, shape)
    assert (
        certificate.lipschitz == pytest.approx(10, rel=1e-3) and certificate.averaged is None and certificate.proximal
    )
    x = 0.3 * sample(shape, 8)
    with torch.no_grad():
        z = resolvent(x)
        assert (norms(z + h * gradient(resolvent, z) - x) <= 1e-11).all()
        for size in (1e-3, 0.1, 1.0):  # a point elsewhere has a larger objective: by (m/2)‖d‖² at least
            d = size * sample(shape, 8, 1)
            value = [(u - x).square().flatten(1).sum(1) / 2 + resolvent.potential(u) for u in (z, z + d)]
            assert (value[1] >= value[0] + 0.049 * norms(d) ** 2 - 1e-9).all()
    loose, _ = weakly_convex(case, 1e-3)
    assert (
        norms(loose(x) - z) <= 1e-3 * norms(x).clamp_min(1) + 1e-9
    ).all()  # in units of the result, not of the residual
    # gradient ascent on the ratio, and ⟨Tx - Ty, x - y⟩ ≥ ‖Tx - Ty‖²/L
    sizes = torch.logspace(-1.5, 0.5, 6, dtype=torch.float64).reshape(-1, *(1 for _ in shape))
    x, d = (sizes * sample(shape, 6, 2)).requires_grad_(), (1e-3 * sample(shape, 6, 3)).requires_grad_()
    optimiser = torch.optim.Adam([x, d], lr=0.01, maximize=True)
    for _ in range(15):
        moved = resolvent(x + d) - resolvent(x)
        ratio = norms(moved) / norms(d)
        assert (ratio <= certificate.lipschitz + 1e-6).all()
        assert ((moved * d).flatten(1).sum(1) >= norms(moved) ** 2 / certificate.lipschitz - 1e-9).all()
        optimiser.zero_grad()
        ratio.sum().backward()
        optimiser.step()


def test_the_constant_of_a_weakly_convex_resolvent_is_met() -> None:
    ramps = WeaklyConvexRamps(1, 1, 1)
    with torch.no_grad():
        ramps.shares[0], ramps.falls[0] = -9.0, -9.0  # nothing is left alone or out
    linear = nn.Linear(1, 1, bias=False)
    resolvent = Resolvent(linear, ramps, 1.0, 1e-12, relative=True).double().eval()
    x = torch.linspace(0, 3, 4001, dtype=torch.float64)[:, None] / linear.weight.detach().abs().double()
    z = resolvent(x)[:, 0]
    steepest = float(((z[1:] - z[:-1]) / (x[1:, 0] - x[:-1, 0])).max())
    L = certify(resolvent, (1,)).lipschitz
    assert 0.98 * L < steepest <= L


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("case", [0, 3])
def test_gradients_through_an_activation_that_couples_channels(case: int, mode: bool) -> None:
    resolvent, shape = weakly_convex(case, 1e-12)
    resolvent.train(mode)
    names = [name for name, _ in resolvent.named_parameters()]
    vector = resolvent.estimate.vector.clone()  # type: ignore[union-attr]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        with torch.no_grad():
            resolvent.estimate.vector.copy_(vector)  # type: ignore[union-attr]  # the estimate moves on at each call
        return torch.func.functional_call(resolvent, dict(zip(names, values, strict=True)), (x, 0.7))

    inputs = (0.3 * sample(shape, 2)).requires_grad_(), *resolvent.parameters()
    if mode:  # the derivative of the estimate is that at fixed v: right where v is a singular vector
        with torch.no_grad():
            for _ in range(300):
                resolvent.estimate.squared_norm(resolvent.linear, homogeneous)  # type: ignore[union-attr]
            vector.copy_(resolvent.estimate.vector)  # type: ignore[union-attr]
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-5)
    else:  # h follows a bound that is no function to differentiate: x alone, and σ's parameters
        weight = [p.detach() for p in resolvent.linear.parameters()]
        assert torch.autograd.gradcheck(
            lambda x, *values: run(x, *weight, *values),
            (inputs[0], *list(resolvent.activation.parameters())),
            fast_mode=True,
        )


def test_memory_does_not_grow_with_the_iterations() -> None:
    saved = []
    for step in (0.1, 100.0):
        resolvent, shape = built(3, "tanh", step)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            resolvent(sample(shape).requires_grad_())
        saved.append(sum(sizes))
    assert saved[0] == saved[1]


def test_a_sample_does_not_depend_on_the_others() -> None:
    resolvent, shape = built(0, step=30.0, tolerance=1e-4)
    x = sample(shape, 6) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(resolvent(x), torch.cat([resolvent(row[None]) for row in x]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(2, 4, 3, padding=1, bias=False), lambda: Difference(0.8)])
def test_samples_that_are_solved_are_left_out_and_keep_their_levels(layer: Callable[[], nn.Module]) -> None:
    """Solutions and gradients of a batch are those of its samples, and what is evaluated for is ever fewer of them."""
    torch.manual_seed(0)
    linear = layer()
    channels = 4 if isinstance(linear, nn.Conv2d) else 2
    resolvent = Resolvent(linear, ClippedRamps(channels, threshold=0.3), 30.0, 1e-8).double().eval()
    x, level = sample((2, 5, 5), 4) * torch.logspace(-2, 1, 4).double()[:, None, None, None], torch.rand(4).double()
    upstream = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    sizes: dict[str, list[int]] = {"_gradient": [], "_linearise": []}
    for name, seen in sizes.items():
        function = getattr(resolvent, name)
        setattr(resolvent, name, lambda z, *a, f=function, seen=seen: seen.append(len(z)) or f(z, *a))

    def outcome(rows: slice) -> list[Tensor]:
        of = x[rows].clone().requires_grad_()
        z = resolvent(of, level[rows])
        grads = torch.autograd.grad((z * upstream[rows]).sum(), [of, *resolvent.activation.parameters()])
        return [z, *grads]

    together = outcome(slice(0, 4))
    for name, seen in sizes.items():
        solving = seen if name == "_linearise" else seen[:-1]  # the last is of the whole batch, to be differentiated
        assert solving == sorted(solving, reverse=True) and solving[0] == 4 and min(solving) < 4, name
    z, u = together[0].detach().requires_grad_(), together[1]
    (image,) = torch.autograd.grad(
        z + resolvent._gradient(z, 30.0, level), z, u
    )  # (I + h∇²V)u, which is to be the upstream
    assert (norms(image - upstream) <= 1.01e-8 * norms(upstream)).all()
    alone = [outcome(slice(i, i + 1)) for i in range(4)]
    for index, whole in enumerate(together):
        parts = [outcomes[index] for outcomes in alone]
        expected = torch.cat(parts) if index < 2 else torch.stack(parts).sum(0)
        torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-8)


class Halved(PooledRamps):
    """Overrides what its class's ``derivative`` speaks of."""

    def forward(self, z: Tensor, level: Any = None) -> Tensor:
        return super().forward(z, level) / 2

    def slope_range(self) -> tuple[float, float]:
        return 0.0, 0.5


@pytest.mark.parametrize("kind", [PooledRamps, Halved])
def test_the_derivative_that_an_activation_offers_is_used_only_if_it_is_that_of_its_forward(
    kind: type[PooledRamps],
) -> None:
    torch.manual_seed(0)
    resolvent = Resolvent(nn.Conv2d(2, 6, 3, padding=1, bias=False), kind(6, 3), 30.0, 1e-10).double().eval()
    x, direction = sample((2, 5, 5), 2), sample((2, 5, 5), 2)
    (slope,) = torch.autograd.grad((resolvent(x.requires_grad_(), 0.7) * direction).sum(), x)
    with torch.no_grad():
        ahead, behind = (resolvent(x + e * direction, 0.7) for e in (1e-5, -1e-5))
    torch.testing.assert_close(
        (slope * direction).sum(), ((ahead - behind) * direction).sum() / 2e-5, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("proposal", [lambda y: y, lambda y: y + 1e30, lambda y: y * math.nan])
def test_whatever_the_quick_solver_proposes_the_solution_is_right(
    proposal: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolvent, shape = built(3, "softplus", 5.0, 1e-6)
    x = sample(shape)
    right = resolvent(x)
    monkeypatch.setattr(implicit._QuasiNewton, "__call__", lambda _, y, residual: proposal(y))
    assert (norms(resolvent(x) - right) <= 2 * resolvent.deviation(float(norms(x).max()))).all()


def evaluations(resolvent: Resolvent, x: Tensor) -> int:
    """How often the gradient of V is evaluated to solve for x."""
    count, gradient = 0, resolvent._gradient

    def counted(*inputs: Any) -> Tensor:
        nonlocal count
        count += 1
        return gradient(*inputs)

    resolvent._gradient = counted  # type: ignore[method-assign]
    resolvent(x)
    return count


def test_the_quick_solver_takes_fewer_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    resolvent, shape = built(3, "softplus", 30.0, 1e-6)
    quick = evaluations(copy.deepcopy(resolvent), sample(shape))
    monkeypatch.setattr(implicit, "_QuasiNewton", lambda kappa: implicit._Nesterov(implicit.PRESUMED, kappa))
    assert 1.5 * quick < evaluations(resolvent, sample(shape))


def test_the_quick_solver_does_not_leap_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the kinks of σ V is flat, and steps made for that cross them again and again."""
    torch.manual_seed(0)
    shrinkage = Resolvent(nn.Conv2d(1, 6, 3, padding=1, bias=False), ClippedRamps(6, 1, 0.1), 100.0, 1e-4)
    shrinkage, x = shrinkage.double().eval(), sample((1, 8, 8))
    assert evaluations(copy.deepcopy(shrinkage), x) < 50
    monkeypatch.setattr(implicit._QuasiNewton, "OVERSHOT", math.inf)
    assert evaluations(shrinkage, x) > 500


def test_zero_map_zero_input_and_empty_batch() -> None:
    resolvent, shape = built(0, "relu", 5.0)
    assert resolvent(torch.zeros(0, *shape, dtype=torch.float64)).shape == (0, *shape)
    assert torch.isfinite(resolvent(torch.zeros(2, *shape, dtype=torch.float64))).all()
    for parameter in resolvent.parameters():
        parameter.data.zero_()
    x, relative = sample(shape), Resolvent(nn.Linear(shape[0], 3), relative=True).double()
    for parameter in relative.parameters():
        parameter.data.zero_()
    for mode in (True, False):
        torch.testing.assert_close(resolvent.train(mode)(x), x)
        torch.testing.assert_close(relative.train(mode)(x), x)


def test_float32_half_inputs_and_autocast() -> None:
    torch.manual_seed(0)
    resolvent = Resolvent(nn.Conv2d(2, 4, 3, padding=1), "relu", 10.0).eval()
    x = torch.randn(2, 2, 8, 8)
    exact = copy.deepcopy(resolvent).double()
    exact.tolerance = 1e-12
    reference = exact(x.double())
    assert (norms(resolvent(x).double() - reference) <= 1.5e-5 * norms(x)).all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(resolvent(x), resolvent(x))
        assert (norms(resolvent(x).double() - reference) <= 1.5e-5 * norms(x)).all()
    assert resolvent(x.bfloat16()).dtype == torch.bfloat16


def test_learned_activation_with_a_level() -> None:
    torch.manual_seed(0)
    resolvent = Resolvent(nn.Conv2d(2, 4, 3, padding=1), ClippedRamps(4), 2.0, 1e-10).double().eval()
    x, level = sample((2, 5, 5), 3).requires_grad_(), torch.tensor([0.0, 1.0, 4.0])
    z = resolvent(x, level)
    t, pullback = torch.func.vjp(resolvent.linear, z)
    residual = z + 2 * pullback(resolvent.activation(t, level))[0] - x
    assert (norms(residual) <= 1e-10 * norms(x).clamp_min(1) * (1 + 1e-6)).all()
    z.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in resolvent.parameters())


def test_refusals() -> None:
    torch.manual_seed(0)
    with pytest.raises(Refused, match=r"GELU.*below 1"):
        Resolvent(nn.Linear(2, 2), nn.GELU(), 100.0)
    assert (
        Resolvent(nn.Linear(2, 2), nn.GELU(), 5.0, relative=True).curvature(1.0)[0] > 0.3
    )  # its slopes are above -0.13
    with pytest.raises(Refused, match=r"GELU.*relative"):
        Resolvent(nn.Linear(2, 2), nn.GELU(), 10.0, relative=True)
    with pytest.raises(Refused, match="training mode"):
        certify(Resolvent(nn.Linear(2, 2), "relu", relative=True).train(), (2,))
    with pytest.raises(
        Refused, match="training mode"
    ):  # where the solver's target is m times its tolerance, for an estimate of m
        certify(Resolvent(nn.Linear(2, 2), nn.GELU(), 1.0).train(), (2,))
    assert certify(Resolvent(nn.Linear(2, 2), "relu").train(), (2,)).averaged
    for step, tolerance in [(0.0, 1e-5), (-1.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)]:
        with pytest.raises(BadInput, match="step"):
            Resolvent(nn.Linear(2, 2), "relu", step, tolerance)
    resolvent = Resolvent(nn.Linear(2, 2)).eval()
    with pytest.raises(BadInput, match="finite"):
        resolvent(torch.tensor([[math.nan, 1.0]]))
    torch.manual_seed(0)
    impossible = Resolvent(nn.Linear(50, 50), "tanh", 1e4, 1e-9).eval()
    with pytest.raises(Diverging, match="float64"):
        impossible(torch.randn(2, 50))
