"""Laws of Plug-and-Play with the proximal map of a weakly convex function: it descends, whatever the weights, and that is checked."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from cases import Dense
from nonexpansive import certify, load
from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.nn import Lifted, Relaxed, Resolvent, WeaklyConvexRamps
from nonexpansive.nn.implicit import _Nesterov, _QuasiNewton
from nonexpansive.nn.models import ProximalDenoiser
from nonexpansive.restore import (
    AtLevel,
    Box,
    Descent,
    GradientStep,
    HalfQuadratic,
    ProximalStep,
    Rescaled,
    blur,
    degrade,
    fixed_point,
    iterate,
    kernel,
    plan,
    prove,
    splitting,
)
from nonexpansive.restore.splitting import ForwardBackward
from nonexpansive.restore.tiles import Tiled

SHAPE = (1, 12, 10)


def denoiser(seed: int = 0, modulus: float = 0.9, tolerance: float = 1e-5) -> ProximalDenoiser:
    """Weights that are not at their start, so that R is concave in places."""
    torch.manual_seed(seed)
    model = ProximalDenoiser(1, 2, 3, modulus=modulus, tolerance=tolerance)
    resolvent = model.lifted.inner
    assert isinstance(resolvent, Resolvent) and isinstance(resolvent.activation, WeaklyConvexRamps)
    with torch.no_grad():
        resolvent.linear.weight.add_(0.5 * torch.randn_like(resolvent.linear.weight))
        for p in resolvent.activation.parameters():
            p.add_(0.2 * torch.randn_like(p))
        if resolvent.activation.falls is not None:
            resolvent.activation.falls[1:].add_(1.0)
    return model.double().eval()


def problem(seed: int = 0) -> tuple[Dense, torch.Tensor]:
    torch.manual_seed(seed)
    data = Dense(SHAPE)
    return data, data.A(torch.rand(3, *SHAPE, dtype=torch.float64)) + 0.1 * torch.randn(3, *data.data_shape).double()


@pytest.mark.parametrize("method", ["half-quadratic", "forward-backward"])
@pytest.mark.parametrize("modulus", [0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_it_descends_by_what_is_stated_and_comes_to_rest(seed: int, modulus: float, method: str) -> None:
    data, y = problem(seed)
    prior = AtLevel(denoiser(seed, modulus), 0.15)
    if method == "half-quadratic":
        T: HalfQuadratic | ForwardBackward = HalfQuadratic(ProximalStep(data, y, 2.0), prior)
    else:
        T = ForwardBackward(GradientStep(data, y, 1 / data.lipschitz), prior)
    certificate = prove(T, SHAPE)
    assert isinstance(certificate, Descent) and certificate.averaged is None
    assert 0.99 * (1 - modulus) / 2 <= certificate.decrease <= (1 - modulus) / 2
    x, values = torch.zeros(3, *SHAPE, dtype=torch.float64), []
    with torch.no_grad():
        for _ in range(30):
            ahead = T(x)
            moved = (ahead - x).flatten(1).norm(dim=1)
            before, after = T.objective(x), T.objective(ahead)
            assert before is not None and after is not None
            assert (after <= before - certificate.decrease * moved**2 + 1e-4 * moved).all()
            values.append(after)
            x = ahead
    report = fixed_point(T, torch.zeros(3, *SHAPE).double(), certificate=certificate, tolerance=1e-4, iterations=3000)
    assert report.converged and report.certified and report.objective is not None
    assert all(b <= a + 1e-6 for a, b in zip(report.objective, report.objective[1:], strict=False))
    assert report.to_json()["objective"] == report.objective
    assert report.to_json()["certificate"]["decrease"] == certificate.decrease
    bound = ((report.objective[0] - min(report.objective)) / certificate.decrease) ** 0.5
    assert torch.tensor(report.movements).square().sum().sqrt() <= 3**0.5 * bound * 1.01


@pytest.mark.parametrize("method", ["half-quadratic", "forward-backward"])
@pytest.mark.parametrize("seed", range(3))
def test_acceleration_keeps_the_descent_and_takes_fewer_steps(seed: int, method: str) -> None:
    data, y = problem(seed)
    y, prior = y[:1], AtLevel(denoiser(seed), 0.15)
    if method == "half-quadratic":
        T: HalfQuadratic | ForwardBackward = HalfQuadratic(ProximalStep(data, y, 2.0), prior)
    else:
        T = ForwardBackward(GradientStep(data, y, 1 / data.lipschitz), prior)
    certificate, start = prove(T, SHAPE), torch.zeros(1, *SHAPE).double()
    assert isinstance(certificate, Descent)
    settings = {"certificate": certificate, "tolerance": 1e-4, "iterations": 3000}
    plain, fast = fixed_point(T, start, **settings), fixed_point(T, start, acceleration="anderson", **settings)
    assert plain.converged and fast.converged and fast.iterations <= 0.7 * plain.iterations
    assert fast.objective is not None
    for before, after, moved in zip(fast.objective, fast.objective[1:], fast.movements, strict=False):
        assert after <= before - certificate.decrease * moved**2 + 1e-4 * moved


def test_proposals_that_are_not_lower_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data, y = problem()
    T = HalfQuadratic(ProximalStep(data, y, 2.0), AtLevel(denoiser(), 0.15))
    start, settings = torch.zeros(3, *SHAPE).double(), {"certificate": prove(T, SHAPE), "tolerance": 1e-4}
    plain = fixed_point(T, start, **settings)
    torch.manual_seed(0)
    for wild in (lambda x: x + torch.randn_like(x), lambda x: torch.full_like(x, torch.nan)):
        monkeypatch.setattr(iterate, "propose", lambda point, residual, differences, wild=wild: wild(point))
        fast = fixed_point(T, start, acceleration="anderson", **settings)
        assert torch.equal(fast.image, plain.image) and fast.residuals == plain.residuals and fast.steps == plain.steps


def test_a_run_that_contradicts_its_certificate_is_stopped() -> None:
    data, y = problem()
    T = HalfQuadratic(ProximalStep(data, y, 2.0), AtLevel(denoiser(), 0.15))
    certificate = prove(T, SHAPE)
    assert isinstance(certificate, Descent)
    start = torch.zeros(3, *SHAPE).double()
    with pytest.raises(Diverging, match="objective"):
        fixed_point(T, start, certificate=dataclasses.replace(certificate, decrease=3.0), tolerance=1e-4)


@pytest.mark.parametrize("noise", [0.01, 0.001])
def test_so_is_one_that_strays_uphill_at_any_noise(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped denoiser under the rule, whose τ = (trust·level/ν)² is large where the noise is small: true to itself it passes, moved
    by a hundredth of the picture it does not."""
    torch.manual_seed(0)
    clean = torch.rand(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    blurring = blur(kernel("gaussian:1.6"), (1, 16, 16))
    y = degrade(clean, blurring, noise, 0)
    T = plan(y, blurring, load("denoiser-grey-proximal"), noise=noise).iteration
    certificate = prove(T, (1, 16, 16))
    assert isinstance(certificate, Descent)
    settings = {"certificate": certificate, "tolerance": 2.1e-4, "iterations": 60}
    report = fixed_point(T, blurring.start(y), **settings)
    assert report.objective is not None and len(report.objective) > 3
    original = type(T).forward
    stray = 0.01 * float(report.image.norm()) * torch.randn_like(report.image) / 16
    monkeypatch.setattr(type(T), "forward", lambda self, x: original(self, x) + stray)
    with pytest.raises(Diverging, match="objective"):
        fixed_point(T, report.image, **settings)


@pytest.mark.parametrize("method", ["half-quadratic", "forward-backward"])
def test_an_iteration_begins_to_solve_where_it_is(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T(x) is near x before long: about half as many evaluations, and the same restoration."""
    data, y = problem()
    T = splitting(method, Tiled(denoiser(tolerance=1e-4)), data, y, sigma=0.15, tau=1 / data.lipschitz, box=False)
    original, evaluations = Resolvent._gradient, list[int]()
    monkeypatch.setattr(Resolvent, "_gradient", lambda *args: evaluations.append(1) or original(*args))
    found, spent = [], []
    for near in (True, False):
        monkeypatch.setattr(Tiled, "solved", near)
        evaluations.clear()
        x = torch.zeros(3, *SHAPE, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(60):
                x = T(x)
        found.append(x)
        spent.append(len(evaluations))
    assert (found[0] - found[1]).norm() <= 1e-2 * found[1].norm()
    assert spent[0] < 0.75 * spent[1]


def test_what_is_not_proved_is_refused() -> None:
    data, y = problem()
    D = AtLevel(denoiser(), 0.15)
    steep = GradientStep(data, y, 1.15 / data.lipschitz)  # below 2/L_f, but not below (1 + 1/L)/L_f = 1.1
    for T, why in [
        (ForwardBackward(steep, D), "descend.*half-quadratic"),
        (HalfQuadratic(ProximalStep(data, y, 2.0), D, Box()), "not averaged.*box=False"),  # prox of R, then of a box
        (HalfQuadratic(ProximalStep(data, y, 2.0), Relaxed(D, 1.2)), "not averaged"),
        (HalfQuadratic(ProximalStep(data, y, 2.0), D, D), "not averaged"),
    ]:
        with pytest.raises(Refused, match=f"(?s){why}"):
            prove(T, SHAPE)
    loose = HalfQuadratic(ProximalStep(data, y, 2.0), AtLevel(denoiser(tolerance=1e-3), 0.15))
    with pytest.raises(BadInput, match=r"tolerance of 7\.5e-05"):
        fixed_point(loose, torch.zeros(3, *SHAPE).double(), certificate=prove(loose, SHAPE), tolerance=3e-4)


def test_rescaled_and_at_sides_that_the_factor_does_not_divide() -> None:
    shape = (1, 7, 9)
    torch.manual_seed(0)
    data = Dense(shape)
    y = torch.rand(2, *data.data_shape).double()
    for D, known in ((AtLevel(denoiser(), 0.1), False), (Rescaled(AtLevel(denoiser(), 0.1), 0.5), False)):
        T = HalfQuadratic(ProximalStep(data, y, 2.0), D)
        report = fixed_point(
            T, torch.zeros(2, *shape).double(), certificate=prove(T, shape), tolerance=1e-4, iterations=3000
        )
        assert report.converged and (report.objective is not None) == known
        with pytest.raises(BadInput, match="without acceleration"):
            fixed_point(T, torch.zeros(2, *shape).double(), certificate=prove(T, shape), acceleration="anderson")
    data, y = problem()
    T = HalfQuadratic(ProximalStep(data, y, 2.0), Rescaled(AtLevel(denoiser(), 0.1), 0.5))
    report = fixed_point(
        T, torch.zeros(3, *SHAPE).double(), certificate=prove(T, SHAPE), tolerance=1e-4, iterations=3000
    )
    assert report.converged and report.objective is not None and len(report.objective) == report.iterations


def test_filters_with_zeros_around_them_are_the_same_denoiser() -> None:
    small, large = ProximalDenoiser(1, 1, 3).eval(), ProximalDenoiser(1, 1, 7, frame=3).eval()
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    assert large.lifted.inner.linear.weight.shape == (8, 1, 7, 7)
    assert torch.allclose(small(x, 0.1), large(x, 0.1), atol=1e-4)
    assert float((small(x, 0.1) - x).detach().norm()) > 1e-2 * float(x.norm())


def test_inputs_are_checked() -> None:
    for settings, why in [
        ({"channels": 2}, "channels"),
        ({"kernel": 2}, "odd"),
        ({"kernel": -1}, "odd"),
        ({"factor": 0}, "factor"),
        ({"factor": 1, "kernel": 1}, "more than one pixel"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"kernel": 5, "frame": 7}, "frame is odd and at most the kernel, 5"),
        ({"kernel": 5, "frame": 2}, "frame is odd"),
    ]:
        with pytest.raises(BadInput, match=why):
            ProximalDenoiser(**settings)
    model = denoiser()
    for tolerance in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(BadInput, match="tolerance"):
            model.tolerance = tolerance
    with pytest.raises(BadInput, match="images"):
        model(torch.zeros(1, 3, 4, 4).double(), 0.1)
    for sigma in (-0.1, 25.0, float("nan")):
        with pytest.raises(BadInput, match="where white is 1"):
            model(torch.zeros(1, 1, 4, 4).double(), sigma)
    with torch.no_grad():
        still = torch.rand(1, 1, 8, 8).double()
        torch.testing.assert_close(model(still, 0.0), still, atol=5e-3, rtol=0)  # no noise: hardly anything to do
    assert isinstance(model, nn.Module)


def test_descent_takes_a_step_on_the_data_not_any_averaged_map() -> None:
    """What is averaged need not be I - ∇M (a relaxed rotation is not, and turns for ever before a D that stretches): of the two data
    steps alone it is known."""
    D = denoiser()
    for first in (Relaxed(Box(), 0.6), Box()):
        with pytest.raises(Refused, match="not averaged"):
            prove(HalfQuadratic(first, AtLevel(D, 0.15)), SHAPE)


def test_what_is_made_of_an_iteration_that_descends_need_not_descend() -> None:
    """PTP* of it can have a cycle, in which nothing falls."""
    torch.manual_seed(0)
    data = Dense((4, 3, 3))
    linear = nn.Conv2d(4, 6, 1, bias=False)
    D = Resolvent(linear, WeaklyConvexRamps(6, 2), relative=True, tolerance=1e-6).double().eval()
    T = HalfQuadratic(ProximalStep(data, data.A(torch.rand(1, 4, 3, 3).double()), 1.0), D)
    assert isinstance(prove(T, (4, 3, 3)), Descent)
    assert not isinstance(certify(Lifted(T, 4, 1), (2, 3, 3)), Descent)
    with pytest.raises(Refused, match="not proved"):
        prove(Lifted(T, 4, 1), (2, 3, 3))


def test_there_is_no_relaxing_to_a_half_what_is_not_averaged() -> None:
    data, y = problem()
    for method in ("half-quadratic", "forward-backward"):
        with pytest.raises(BadInput, match="relax=False"):
            splitting(method, denoiser(), data, y, sigma=0.15, tau=1 / data.lipschitz, relax=True, box=False)
    with pytest.raises(Refused, match="α ≤ 1/2"):
        prove(splitting("douglas-rachford", denoiser(), data, y, sigma=0.15, tau=1.0, relax=True, box=False), SHAPE)


def test_a_gradual_proximal_step_descends_too() -> None:
    """(1-t)I + tD, t ≤ 1, is the gradient of a convex function as D is."""
    data, y = problem()
    T = HalfQuadratic(ProximalStep(data, y, 2.0), Relaxed(AtLevel(denoiser(), 0.15), 0.5))
    certificate = prove(T, SHAPE)
    assert isinstance(certificate, Descent)
    assert certificate.decrease == pytest.approx((1 / 5.5) / 2, rel=1e-3)  # L = 0.5 + 0.5·10
    report = fixed_point(T, torch.zeros(3, *SHAPE).double(), certificate=certificate, tolerance=1e-4, iterations=3000)
    assert report.converged and report.objective is None


def test_data_that_say_nothing_are_descended_on() -> None:
    data = Dense((1, 4, 4))
    data.matrix, data.norm, data.lipschitz = 0 * data.matrix, 0.0, 0.0
    y = torch.zeros(1, *data.data_shape).double()
    assert isinstance(prove(ForwardBackward(GradientStep(data, y, 1.0), AtLevel(denoiser(), 0.1)), (1, 4, 4)), Descent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_regulariser_is_not_negative_however_large_the_picture(dtype: torch.dtype) -> None:
    """The ramps come back by s of what they rose, s ≤ 1 as computed, also where the sigmoid is 1 in the type of the weights."""
    torch.manual_seed(20)
    model = ProximalDenoiser(1, 1, 3).to(dtype).eval()
    resolvent = model.lifted.inner
    assert isinstance(resolvent, Resolvent) and isinstance(resolvent.activation, WeaklyConvexRamps)
    with torch.no_grad():
        resolvent.activation.shares[0] = -30
        resolvent.activation.returns.fill_(10.0)
        resolvent.activation.mixture.copy_(0.3 * torch.randn_like(resolvent.activation.mixture))
    for log_threshold in (None, 20.0):  # e^80
        if log_threshold is not None:
            resolvent.activation.log_threshold.data.fill_(log_threshold)
        for scale in (1.0, 1e6, 1e8, 1e10):
            value = model.regulariser(scale * torch.rand(1, 1, 16, 16, dtype=dtype), 0.1)
            assert value is not None and bool((value >= 0).all())


def test_another_type_of_numbers_than_the_weights() -> None:
    data, y = problem()
    model = denoiser(tolerance=2e-5).float()
    T = HalfQuadratic(ProximalStep(data, y, 2.0), AtLevel(model, 0.15))
    start = torch.zeros(3, *SHAPE).double()
    report = fixed_point(T, start, certificate=prove(T, SHAPE), tolerance=1e-3, acceleration="anderson")
    assert report.converged and report.objective is not None and report.image.dtype == torch.float64


def test_a_sample_does_not_feel_that_another_was_hard_to_solve_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ramps, linear = WeaklyConvexRamps(2, 1, 1, 0.1, 0.9), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        ramps.shares[0], ramps.shares[1], ramps.mixture[1], ramps.falls[1] = -9, 9, 9, 9
        ramps.returns.fill_(2.0)
    D = Resolvent(linear, ramps, 1.0, 1e-3, relative=True).double().eval()
    quick, sure, fallbacks = _QuasiNewton.__call__, _Nesterov.__call__, list[int]()
    # the quick solver stands still at samples on the first axis, as at the hard one
    monkeypatch.setattr(_QuasiNewton, "__call__", lambda self, y, F: torch.where(y[:, 1:] == 0, y, quick(self, y, F)))
    monkeypatch.setattr(_Nesterov, "__call__", lambda self, y, F: fallbacks.append(1) or sure(self, y, F))
    easy = torch.tensor([[0.5, 0.7]]).double()
    for a in torch.linspace(0.05, 1.5, 25).tolist():
        z = torch.tensor([[a, 0.0]]).double()
        with torch.no_grad():
            hard = z + D._gradient(z, 1.0)
            both = D(torch.cat([easy, hard]))
            assert torch.equal(both, torch.cat([D(easy), D(hard)]))
            assert (both[1] - z[0]).norm() <= D.deviation(float(hard.norm())) * 1.001
    assert fallbacks


def test_slopes_that_are_all_negative_make_the_problem_no_smoother() -> None:
    class Falling(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return -0.5 * t

        def slope_range(self) -> tuple[float, float]:
            return -0.5, -0.5

    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.05]]))
    z = Resolvent(linear, Falling(), tolerance=1e-6).double().eval()(torch.tensor([[1.0, 2.0]]).double())
    assert torch.allclose(z, torch.tensor([[2.0, 2 / (1 - 0.5 * 0.0025)]]).double(), atol=1e-5)


# ---- a modulus of 0: the proximal map of a convex function


def test_of_a_convex_regulariser_it_is_firmly_non_expansive_and_every_splitting_takes_it() -> None:
    """Gradient ascent finds no pair that is contracted less than firmness says, and forward-backward, Douglas-Rachford and primal-dual,
    each as it is, come to the same restoration, the minimiser of τf + R."""
    D, (data, y), tau = denoiser(modulus=0.0, tolerance=1e-9), problem(), 0.7
    certificate = certify(D, SHAPE)
    assert D.convex and certificate.proximal and certificate.nonexpansive
    assert certificate.averaged is not None and certificate.averaged <= 0.5
    x = 0.5 + 1e-4 * torch.rand(4, *SHAPE, dtype=torch.float64)  # flat: there every ramp is at its steepest
    direction = (1e-4 * torch.randn_like(x)).requires_grad_()
    ascent, worst = torch.optim.Adam([direction], 1e-5), -1.0
    for _ in range(40):
        moved = D(x + direction, 0.1) - D(x, 0.1)
        a = certificate.averaged
        slack = moved.square().sum() + (1 - a) / a * (direction - moved).square().sum() - direction.square().sum()
        worst = max(worst, float(slack.detach() / direction.detach().square().sum()))
        ascent.zero_grad()
        (-slack / direction.square().sum()).backward()
        ascent.step()
    assert -0.2 < worst <= 1e-6  # comes near, and does not get there

    restored, objectives = [], []
    for method in ("forward-backward", "douglas-rachford", "primal-dual"):
        T = splitting(method, D, data, y, sigma=0.1, tau=tau / data.lipschitz)
        report = fixed_point(T, data.start(y), certificate=prove(T, SHAPE), tolerance=1e-8, iterations=4000)
        assert report.converged, method
        restored.append(report.image)
        R = D.regulariser(report.image, 0.1)
        assert R is not None
        objectives.append(
            tau / data.lipschitz * 0.5 * (data.A(report.image) - y).square().flatten(1).sum(1)
            + R  # up to what R leaves out
        )
    for other, value in zip(restored[1:], objectives[1:], strict=True):
        torch.testing.assert_close(other, restored[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(value, objectives[0], atol=1e-6, rtol=1e-6)
    for _ in range(20):
        away = restored[0] + 1e-3 * torch.randn_like(restored[0])
        R = D.regulariser(away, 0.1)
        assert R is not None
        assert (tau / data.lipschitz * 0.5 * (data.A(away) - y).square().flatten(1).sum(1) + R > objectives[0]).all()


def test_a_convex_regulariser_is_planned_as_averaged() -> None:
    D = denoiser(modulus=0.0).float()
    blurring = blur(kernel("motion:5,30"), SHAPE)
    clean = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = degrade(clean, blurring, 0.02, 0)
    for method in ("half-quadratic", "forward-backward", "douglas-rachford"):
        job = plan(y, blurring, D, 0.02, method=method)
        assert not isinstance(job.certificate, Descent) and job.averaged is not None and job.averaged < 1
        report = job.run(tolerance=1e-3, iterations=300, acceleration=None)
        assert report.converged
        assert all(b <= a * (1 + 1e-3) for a, b in itertools.pairwise(report.movements)), method
