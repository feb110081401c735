"""Laws of Plug-and-Play with the proximal map of a weakly convex function: it descends, whatever the weights, and that is checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cases import Dense
from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.nn import Relaxed, Resolvent, WeaklyConvexRamps
from nonexpansive.nn.models import ProximalDenoiser
from nonexpansive.restore import (
    AtLevel,
    Box,
    Descent,
    GradientStep,
    HalfQuadratic,
    ProximalStep,
    Rescaled,
    fixed_point,
    iterate,
    prove,
)
from nonexpansive.restore.splitting import ForwardBackward

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
    T = HalfQuadratic(ProximalStep(data, y, 2.0), D)
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


def test_inputs_are_checked() -> None:
    for settings, why in [({"channels": 2}, "channels"), ({"kernel": 2}, "odd")]:
        with pytest.raises(BadInput, match=why):
            ProximalDenoiser(**settings)
    model = denoiser()
    with pytest.raises(BadInput, match="images"):
        model(torch.zeros(1, 3, 4, 4).double(), 0.1)
    with pytest.raises(BadInput, match="at least 0"):
        model(torch.zeros(1, 1, 4, 4).double(), -0.1)
    with torch.no_grad():
        still = torch.rand(1, 1, 8, 8).double()
        torch.testing.assert_close(model(still, 0.0), still, atol=5e-3, rtol=0)  # no noise: hardly anything to do
    assert isinstance(model, nn.Module)
