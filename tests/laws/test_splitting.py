"""Laws of the splittings: what they need of a denoiser is asked for, the iterations do converge, and lies are found out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nonexpansive
from cases import Dense, denoiser, norms
from nonexpansive import Certificate, certify
from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.math.certificate import rule
from nonexpansive.math.enclosure import Affine
from nonexpansive.nn import Relaxed, Scale
from nonexpansive.restore import blur, plan
from nonexpansive.restore.iterate import fixed_point, prove
from nonexpansive.restore.methods import splitting
from nonexpansive.restore.splitting import DouglasRachford, ForwardBackward, HalfQuadratic
from nonexpansive.restore.steps import AtLevel, Box, GradientStep, ProximalStep

SHAPE = (1, 4, 3)
DATA = Dense(SHAPE)


class Shrink(nn.Module):
    """D(x, σ) = prox of σ‖·‖₁, for which the fixed points are known: they solve min ½‖Ax - y‖² + (σ/τ)‖x‖₁."""

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        return torch.nn.functional.softshrink(x, sigma)


rule(Shrink)(lambda module, shape, unit: Certificate(1.0, 0.5, shape, shape, "Shrink", Affine(1.0)))


def optimality(x: Tensor, weight: float) -> float:
    """By how much x misses 0 ∈ Aᵀ(Ax - y) + weight·∂‖x‖₁."""
    gradient = DATA.A_adjoint(DATA.A(x) - DATA.y)
    still = (gradient.abs() - weight).clamp_min(0)
    return float(torch.where(x == 0, still, gradient + weight * x.sign()).abs().max())


@pytest.mark.parametrize("method", ["forward-backward", "douglas-rachford"])
def test_iterations_converge_to_the_solution(method: str) -> None:
    tau = 1.5 / DATA.lipschitz
    iteration = splitting(method, Shrink(), DATA, DATA.y, sigma=0.1 * tau, tau=tau).double()
    report = fixed_point(
        iteration, torch.zeros(1, *SHAPE, dtype=torch.float64), certificate=prove(iteration, SHAPE), tolerance=1e-11,
        iterations=20000,
    )  # fmt: skip
    assert report.converged
    assert optimality(report.image, 0.1) < 1e-7
    assert report.iterations == len(report.residuals) < 20000
    plain = report.to_json()
    assert plain["converged"] and plain["certificate"]["averaged"] == report.certificate.averaged  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["forward-backward", "half-quadratic"])
def test_a_denoiser_in_a_box_converges(method: str) -> None:
    model = denoiser().double().eval()
    tau = 1.9 / DATA.lipschitz
    iteration = splitting(method, model, DATA, DATA.y, sigma=0.1, tau=tau, box=True).double()
    certificate = prove(iteration, SHAPE)
    assert certificate.averaged is not None
    start = torch.rand(1, *SHAPE, dtype=torch.float64)
    report = fixed_point(iteration, start, certificate=certificate, tolerance=1e-9, iterations=5000)
    assert report.converged
    assert report.image.min() >= 0 and report.image.max() <= 1
    assert torch.allclose(iteration(report.image), report.image, atol=1e-8)
    # the rate of the theory: ‖x_{k+1} - x_k‖² ≤ (α/(1-α))‖x₀ - x*‖²/(k+1)
    x, ratio = start, certificate.averaged / (1 - certificate.averaged)
    distance = float(norms(start - report.image).square())
    with torch.no_grad():
        for k in range(50):
            ahead = iteration(x)
            assert float(norms(ahead - x).square()) <= ratio * distance / (k + 1) * (1 + 1e-6) + 1e-12
            x = ahead


def test_averagedness_is_that_of_the_table() -> None:
    tau, alpha = 1.2 / DATA.lipschitz, 0.4
    block = AtLevel(denoiser(alpha=alpha), 0.1).eval()
    step = GradientStep(DATA, DATA.y, tau)
    forward, found = certify(step, SHAPE), certify(block, SHAPE).averaged
    assert forward.averaged == pytest.approx(0.6)
    assert found == pytest.approx(alpha, rel=1e-5)
    whole = certify(ForwardBackward(step, block), SHAPE).averaged
    limit = tau * DATA.lipschitz
    assert whole == pytest.approx((alpha + limit / 2 - alpha * limit) / (1 - alpha * limit / 2), rel=1e-5)
    assert certify(ProximalStep(DATA, DATA.y, 5.0), SHAPE).averaged == certify(Box(), SHAPE).averaged == 0.5
    assert any("as its" in text or "adjoint" in text for text in forward.assumptions)


def test_what_a_splitting_needs_is_asked_for() -> None:
    model = denoiser(alpha=0.9).eval()

    def made(
        method: str, denoiser: nn.Module = model, tau: float = 0.5 / DATA.lipschitz, sigma: float = 0.1
    ) -> nn.Module:
        return splitting(method, denoiser, DATA, DATA.y, sigma=sigma, tau=tau)

    with pytest.raises(Refused, match="τ < 2/L_f"):
        prove(made("forward-backward", tau=2.0 / DATA.lipschitz), SHAPE)
    assert prove(made("forward-backward", tau=1.99 / DATA.lipschitz), SHAPE).averaged
    with pytest.raises(Refused, match=r"Relaxed\(denoiser, t=0.55"):
        prove(made("douglas-rachford"), SHAPE)
    relaxed = made("douglas-rachford", Relaxed(model, 0.5555))
    assert prove(relaxed, SHAPE).averaged == 0.5
    with pytest.raises(Refused, match="proximal map"):
        certify(
            DouglasRachford(AtLevel(denoiser(alpha=0.3), 0.1), GradientStep(DATA, DATA.y, 1.5 / DATA.lipschitz)).eval(),
            SHAPE,
        )  # type: ignore[arg-type]
    with pytest.raises(Refused, match="not averaged"):
        certify(HalfQuadratic(Scale(-1.0), ProximalStep(DATA, DATA.y, 1.0)), SHAPE)
    with pytest.raises(Refused, match="no factors"):
        certify(ForwardBackward(), SHAPE)
    for sigma in (-0.1, 1.1, math.nan):
        with pytest.raises(Refused, match="noise levels"):
            prove(made("half-quadratic", sigma=sigma), SHAPE)
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(Refused, match="finite number above 0"):
            made("half-quadratic", tau=tau)
    with pytest.raises(Refused, match="images of shape"):
        prove(made("half-quadratic"), (1, 3, 4))
    with pytest.raises(Refused, match="exact arithmetic"):
        certify(made("half-quadratic").float(), SHAPE, arithmetic=torch.float32)
    with pytest.raises(BadInput, match="half-quadratic"):
        made("half-quadratc")
    with pytest.raises(BadInput, match="box"):
        splitting("douglas-rachford", model, DATA, DATA.y, sigma=0.1, tau=1.0, box=True)
    with pytest.raises(Refused, match="NaN"):
        certify(ProximalStep(DATA, DATA.y * math.nan, 1.0), SHAPE)


def test_data_are_a_batch_of_floats() -> None:
    A, denoiser = blur(torch.ones(3, 3) / 9, (1, 12, 12)), nonexpansive.load("denoiser-grey-small")
    y = torch.rand(2, 1, 12, 12)
    for wrong in (y[:0], (255 * y).to(torch.uint8)):
        with pytest.raises(BadInput, match="batch of floats"):
            plan(wrong, A, denoiser, 0.01)
    one, other = (plan(data, A, denoiser, noise).run(iterations=2) for data, noise in
                  ((y, 0.01), (y.double(), np.float64(0.01))))  # fmt: skip
    torch.testing.assert_close(one.image, other.image)


def test_a_forward_model_without_a_bound_is_refused() -> None:
    for lipschitz in (math.nan, math.inf, -1.0):
        data = Dense(SHAPE)
        data.lipschitz = lipschitz
        with pytest.raises(Refused):
            certify(GradientStep(data, data.y, 0.1), SHAPE)
    free = Dense(SHAPE)
    free.lipschitz = 0.0
    assert certify(GradientStep(free, free.y, 0.1), SHAPE).averaged == 0


def test_a_run_that_contradicts_its_certificate_is_stopped() -> None:
    class Expanding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * x + 1

    start = torch.ones(2, *SHAPE)
    lie = Certificate(1.0, 0.5, SHAPE, SHAPE, "a lie", Affine(1.0))
    with pytest.raises(Diverging, match="residual grew"):
        fixed_point(Expanding(), start, certificate=lie)
    assert not fixed_point(Expanding(), start, certificate=None, iterations=5).converged
    with pytest.raises(Diverging, match="not finite"):
        fixed_point(Scale(math.nan), start, certificate=None)
    with pytest.raises(Refused, match="does not prove"):
        fixed_point(nn.Identity(), start, certificate=certify(Scale(-1.0), SHAPE))
    with pytest.raises(Refused, match="samples of shape"):
        fixed_point(nn.Identity(), start, certificate=certify(nn.Identity(), (3,)))
    with pytest.raises(Refused, match="not proved"):
        prove(Scale(-1.0), SHAPE)
    one_of_two = torch.cat([torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)])
    with pytest.raises(Diverging):
        fixed_point(nn.Sequential(Scale(1.2)), one_of_two, certificate=lie)


def test_what_is_watched_is_what_is_reported() -> None:
    seen: list[tuple[int, float]] = []
    report = fixed_point(
        Scale(0.5), torch.ones(1, 3), certificate=certify(Scale(0.5), (3,)), tolerance=0.0, iterations=4,
        watch=lambda k, residual, x: seen.append((k, residual)),
    )  # fmt: skip
    assert [k for k, _ in seen] == [1, 2, 3, 4]
    assert [residual for _, residual in seen] == report.residuals
    assert torch.equal(report.image, torch.full((1, 3), 0.0625))
