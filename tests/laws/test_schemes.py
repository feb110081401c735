"""Laws of all splittings: averaged as certified with random data terms and denoisers of exactly known α, refused just beyond the limit,
and one restoration where they share one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import Dense, norms, pairs
from nonexpansive import Certificate, certify
from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import rule
from nonexpansive.math.enclosure import Affine
from nonexpansive.nn import Relaxed, Scale
from nonexpansive.restore.iterate import Iteration, Renormed, averagedness, fixed_point, prove
from nonexpansive.restore.likelihood import Gaussian, Likelihood, Poisson
from nonexpansive.restore.methods import splitting
from nonexpansive.restore.primal_dual import DualOfBox, DualOfData, PrimalDual
from nonexpansive.restore.schemes import Halpern, KrasnoselskiiMann
from nonexpansive.restore.splitting import ForwardBackward, GradientRED
from nonexpansive.restore.steps import AtLevel, Box, GradientStep

SHAPE = (1, 3, 2)
SLACK = 1e-8


class Averaged(nn.Module):
    """D = (1-α)I + αR with R an isometry at most places: R(x) = Q|x| + c, or, linear, R(x) = Qx + c. Exactly α-averaged, no better."""

    def __init__(self, alpha: float, seed: int = 0, linear: bool = False) -> None:
        super().__init__()
        n = math.prod(SHAPE)
        generator = torch.Generator().manual_seed(seed)
        self.Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        self.c = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.alpha, self.linear = alpha, linear

    def forward(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        flat = x.flatten(1)
        turned = (flat if self.linear else flat.abs()) @ self.Q.T + self.c
        return ((1 - self.alpha) * flat + self.alpha * turned).unflatten(1, SHAPE)


@rule(Averaged)
def _averaged(module: Averaged, shape: tuple[int, ...], unit: float) -> Certificate:
    alpha = module.alpha if module.alpha < 1 else None
    return Certificate(1.0, alpha, shape, shape, "Averaged", Affine(1.0, 1.001 * float(module.c.norm())))


def make(method: str, seed: int, alpha: float, share: float, linear: bool, likelihood: Likelihood) -> nn.Module:
    """A splitting whose steps are that ``share`` of the longest that is allowed, with the largest α of D that it may have."""
    data = Dense(SHAPE, seed)
    y = data.y if isinstance(likelihood, Gaussian) else data.y.abs()
    smooth = data.lipschitz * likelihood.smoothness(y)
    if method in ("forward-backward", "half-quadratic", "boxed"):
        end = Box(-0.3, 0.7) if method == "boxed" else None
        method = method.replace("boxed", "forward-backward")
        made = splitting(
            method, Averaged(alpha, seed, linear), data, y, sigma=0.1, tau=2 * share / smooth, likelihood=likelihood
        )
        if end is not None:
            made.append(end)
        return made
    if method == "douglas-rachford":
        return splitting(method, Averaged(alpha / 2, seed, linear), data, y, sigma=0.1, tau=10 * share / smooth)
    if method == "red":
        D, weight = Averaged(alpha, seed, linear), 3 * (1 - share) * smooth
        step = 2 * share / (smooth + 2 * weight * alpha)
        return GradientRED(GradientStep(data, y, step, likelihood), AtLevel(D, 0.1), weight)
    if method == "relaxed":
        inner = splitting(
            "forward-backward", Averaged(alpha, seed, linear), data, y, sigma=0.1, tau=1 / smooth, likelihood=likelihood
        )
        found = certify(inner, SHAPE).averaged if alpha < 1 else 1.0
        assert found is not None
        return KrasnoselskiiMann(inner, share / found)
    D = AtLevel(Averaged(alpha / 2, seed, linear), 0.1)
    if method == "primal-dual":
        dual, tau, smoothing = DualOfData(data, y, likelihood), 3 * share / smooth, None
        return PrimalDual(D, dual, SHAPE, tau, share / (tau * dual.norm**2), smoothing)
    tau = share / smooth  # Condat-Vu with a smooth f and a box
    return PrimalDual(
        D, DualOfBox(Box(), SHAPE), SHAPE, tau, share * (1 - share / 2) / tau, GradientStep(data, y, tau, likelihood)
    )


METHODS = [
    "forward-backward", "half-quadratic", "boxed", "douglas-rachford", "red", "relaxed", "primal-dual", "condat-vu",
]  # fmt: skip
GAUSSIAN_ONLY = ("half-quadratic", "douglas-rachford")
settings_of = given(
    st.sampled_from(METHODS), st.integers(0, 10**6), st.floats(0.05, 0.999), st.floats(0.05, 0.999), st.booleans(),
    st.sampled_from([Gaussian(), Poisson(0.1, 0.5), Poisson(0.1, 0.2, 0.3)]),
)  # fmt: skip


def excess(T: nn.Module, certificate: Certificate, x: Tensor, d: Tensor) -> Tensor:
    """‖Tx-Ty‖² + ((1-α)/α)‖(I-T)x-(I-T)y‖² - ‖x-y‖² over ‖x-y‖² in the iteration's norm: above 0, the certificate is wrong."""
    alpha = averagedness(T, certificate)
    assert alpha is not None and isinstance(T, Iteration)
    both = T(torch.cat([x + d, x]))  # type: ignore[operator]
    moved = both[: len(x)] - both[len(x) :]
    square = T.norm(d) ** 2
    return (T.norm(moved) ** 2 + (1 - alpha) / alpha * T.norm(d - moved) ** 2) / square - 1


@settings_of
@settings(max_examples=150, deadline=None)
def test_every_splitting_is_averaged_as_certified(
    method: str, seed: int, alpha: float, share: float, linear: bool, likelihood: Likelihood
) -> None:
    if method in GAUSSIAN_ONLY:
        likelihood = Gaussian()
    T = make(method, seed, alpha, share, linear, likelihood)
    certificate = prove(T, SHAPE)
    found = averagedness(T, certificate)
    assert found is not None and found < 1
    x, d = pairs(certificate.domain, 12, seed)
    assert excess(T, certificate, x, d).max() <= SLACK / found
    assert (norms(T(x)) <= torch.tensor([certificate.growth(float(u)) for u in norms(x)]) * (1 + 1e-12)).all()
    moved = norms(T(x + d) - T(x)) / norms(d)
    assert moved.max() <= certificate.lipschitz * (1 + SLACK)


@pytest.mark.parametrize("method", ["forward-backward", "red", "primal-dual", "condat-vu", "relaxed"])
@pytest.mark.parametrize("likelihood", [Gaussian(), Poisson(0.1, 0.3)], ids=["gaussian", "poisson"])
def test_ascent_on_the_violation_finds_none(method: str, likelihood: Likelihood) -> None:
    T = make(method, 3, 0.9, 0.97, False, likelihood)
    certificate = prove(T, SHAPE)
    x, d = (t.clone().requires_grad_() for t in pairs(certificate.domain, 16, 1))
    best, optimiser = -math.inf, torch.optim.Adam([x, d], lr=0.03)
    for _ in range(150):
        optimiser.zero_grad()
        found = excess(T, certificate, x, d)
        best = max(best, float(found.detach().max()))
        (-found.sum()).backward()
        optimiser.step()
    assert best <= SLACK


def test_the_certificates_are_not_loose() -> None:
    """At the worst D, R = -I, and f along A's largest singular vector, α of the theory is reached within a percent."""
    data = Dense(SHAPE)
    direction = torch.linalg.svd(data.matrix).Vh[0].reshape(1, *SHAPE)
    x = torch.zeros(1, *SHAPE, dtype=torch.float64)

    class Mirror(nn.Module):
        def forward(self, x: Tensor, sigma: float) -> Tensor:
            return 0.4 * x + 0.6 * (-x)

    rule(Mirror)(lambda module, shape, unit: Certificate(1.0, 0.6, shape, shape, "Mirror", Affine(1.0)))
    step, weight = 1.1 / data.lipschitz, 0.2 * data.lipschitz
    T = GradientRED(GradientStep(data, data.y, step), AtLevel(Mirror(), 0.1), weight)
    certificate = prove(T, SHAPE)
    assert -0.02 < float(excess(T, certificate, x, direction)) <= SLACK
    # beyond the limit it does diverge, so the limit is no excess of caution
    assert certificate.averaged is not None
    T = GradientRED(GradientStep(data, data.y, step / certificate.averaged * 1.01), AtLevel(Mirror(), 0.1), weight)
    assert norms(T(direction) - T(x)) > 1.0


BEYOND = 1 + 1e-6


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("forward-backward", "τ < 2/L_f"),
        ("red", "τ < 2/"),
        ("primal-dual", "nearest setting that is proved: σ ≤"),
        ("condat-vu", "nearest setting that is proved: σ ≤"),
        ("condat-vu, smooth part", "nearest setting that is proved: τ ≤"),
        ("relaxed", "λ < 1/α"),
        ("relaxed, merely non-expansive", "λ < 1/α"),
        ("douglas-rachford", "needs a denoiser with α ≤ 1/2"),
        ("primal-dual, denoiser", "needs a denoiser with α ≤ 1/2"),
        ("forward-backward, merely non-expansive", "strength t < 1"),
        ("box on Lipschitz 2", "use a denoiser that is averaged"),
    ],
)
def test_what_is_just_beyond_the_limit_is_refused(method: str, says: str) -> None:
    data = Dense(SHAPE)
    L, y, D = data.lipschitz, data.y, AtLevel(Averaged(0.9), 0.1)
    firm = AtLevel(Averaged(0.5), 0.1)
    box, dual = DualOfBox(Box(), SHAPE), DualOfData(data, y)
    plain = splitting("forward-backward", Averaged(1.0), data, y, sigma=0.1, tau=1 / L)

    def made(beyond: float) -> nn.Module:
        inner = splitting("forward-backward", Averaged(0.5), data, y, sigma=0.1, tau=1 / L)
        return {
            "forward-backward": lambda: splitting("forward-backward", Averaged(0.9), data, y, sigma=0.1, tau=2 / L * beyond),
            "red": lambda: GradientRED(GradientStep(data, y, 2 / (2.8 * L) * beyond), D, L),
            "primal-dual": lambda: PrimalDual(firm, dual, SHAPE, 0.7, beyond / (0.7 * dual.norm**2)),
            "condat-vu": lambda: PrimalDual(firm, box, SHAPE, 1 / L, L / 2 * beyond, GradientStep(data, y, 1 / L)),
            "condat-vu, smooth part": lambda: PrimalDual(
                firm, box, SHAPE, 2 / L * beyond, 1e-9 * L, GradientStep(data, y, 2 / L * beyond)),
            "relaxed": lambda: KrasnoselskiiMann(inner, beyond / certify(inner, SHAPE).averaged),  # type: ignore[operator]
            "relaxed, merely non-expansive": lambda: KrasnoselskiiMann(plain, beyond),
            "douglas-rachford": lambda: splitting("douglas-rachford", Averaged(beyond / 2), data, y, sigma=0.1, tau=1.0),
            "primal-dual, denoiser": lambda: PrimalDual(AtLevel(Averaged(beyond / 2), 0.1), dual, SHAPE, 0.7),
            "forward-backward, merely non-expansive": lambda: splitting(
                "forward-backward", Averaged(1.0 if beyond > 1 else 0.999), data, y, sigma=0.1, tau=1 / L),
            "box on Lipschitz 2": lambda: ForwardBackward(Scale(2.0 if beyond > 1 else 1.0), Box()),
        }[method]()  # fmt: skip

    with pytest.raises(Refused, match=says):
        prove(made(BEYOND), SHAPE)
    found = averagedness(module := made(2 - BEYOND), prove(module, SHAPE))
    assert found is not None and found < 1


def test_merely_non_expansive_suffices_when_relaxed_anchored_or_in_red() -> None:
    data = Dense(SHAPE)
    inner = splitting("forward-backward", Averaged(1.0), data, data.y, sigma=0.1, tau=1 / data.lipschitz)
    assert prove(KrasnoselskiiMann(inner, 0.99), SHAPE).averaged == pytest.approx(0.99)
    assert prove(Halpern(inner), SHAPE).nonexpansive
    assert prove(splitting("red", Averaged(1.0), data, data.y, sigma=0.1, tau=0.3), SHAPE).averaged
    with pytest.raises(Refused, match="not proved to be non-expansive"):
        prove(Halpern(Scale(1.5)), SHAPE)
    with pytest.raises(Refused, match="only L ≤"):
        prove(GradientRED(GradientStep(data, data.y, 0.1), Scale(1.5), 1.0), SHAPE)


def test_methods_that_share_a_fixed_point_find_the_same() -> None:
    """x = D(x - τ∇f(x)): forward-backward, relaxed, anchored, accelerated, Douglas-Rachford and primal-dual, for D with α ≤ 1/2."""
    data = Dense(SHAPE, 4)
    tau, D = 1.2 / data.lipschitz, Averaged(0.45, 2)

    def run(T: nn.Module, tolerance: float = 1e-12, iterations: int = 50_000, **options: str) -> Tensor:
        report = fixed_point(
            T, torch.zeros(1, *SHAPE, dtype=torch.float64), certificate=prove(T, SHAPE), tolerance=tolerance,
            iterations=iterations, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        assert report.converged
        return report.image

    def made(method: str, **options: object) -> nn.Module:
        return splitting(method, D, data, data.y, sigma=0.1, tau=tau, **options)  # type: ignore[arg-type]

    expected = run(made("forward-backward"))
    step = GradientStep(data, data.y, tau)
    assert norms(D(step(expected)) - expected) < 1e-10
    for T in (
        made("douglas-rachford"),
        made("primal-dual"),
        made("forward-backward", relaxation=1.2),
        made("primal-dual", box=(-9.0, 9.0)),
    ):
        assert norms(run(T) - expected) < 1e-8
    assert norms(run(made("forward-backward"), acceleration="anderson") - expected) < 1e-8
    assert norms(run(made("douglas-rachford"), acceleration="anderson") - expected) < 1e-8
    assert norms(run(made("primal-dual"), acceleration="anderson") - expected) < 1e-8
    assert norms(run(made("forward-backward", anchored=True), tolerance=1e-4) - expected) < 1e-2


def test_poisson_by_gradients_and_by_the_dual_are_one_restoration() -> None:
    data, noise = Dense(SHAPE, 1), Poisson(0.1, 0.4, 0.1)
    y, D = data.y.abs(), Averaged(0.5, 1)
    tau = 1.5 / (data.lipschitz * noise.smoothness(y))
    images = []
    for method in ("forward-backward", "primal-dual"):
        T = splitting(method, D, data, y, sigma=0.1, tau=tau, likelihood=noise)
        start = torch.zeros(1, *SHAPE, dtype=torch.float64)
        report = fixed_point(
            T, start, certificate=prove(T, SHAPE), tolerance=1e-12, iterations=100_000, acceleration="anderson"
        )
        assert report.converged
        images.append(report.image)
    assert norms(images[0] - images[1]) < 1e-7


def test_douglas_rachford_relaxes_a_denoiser_that_is_not_firm_and_says_so() -> None:
    data = Dense(SHAPE)
    T = splitting("douglas-rachford", Averaged(0.9), data, data.y, sigma=0.1, tau=1.0, relax=True)
    certificate = prove(T, SHAPE)
    assert certificate.averaged == 0.5
    assert "relaxation (1-t)I + tT, t = 0.555556" in str(certificate)
    firm = splitting("douglas-rachford", Averaged(0.4), data, data.y, sigma=0.1, tau=1.0, relax=True)
    assert "relaxation" not in str(prove(firm, SHAPE))


def test_the_strength_of_the_prior() -> None:
    data, x = Dense(SHAPE), torch.randn(2, *SHAPE, dtype=torch.float64)
    D = Averaged(0.6)

    def factor(**options: float) -> nn.Module:
        return splitting("half-quadratic", D, data, data.y, sigma=0.1, tau=1.0, **options)[1]  # type: ignore[index]

    assert torch.allclose(factor(strength=0.5)(x), (x + D(x)) / 2)
    assert torch.allclose(factor(scaling=3.0)(x), D(3 * x) / 3)
    assert certify(factor(strength=0.5), SHAPE).averaged == pytest.approx(0.3)
    assert certify(factor(scaling=3.0), SHAPE).averaged == 0.6
    with pytest.raises(Refused):
        prove(splitting("half-quadratic", D, data, data.y, sigma=0.1, tau=1.0, strength=1.7), SHAPE)
    with pytest.raises(BadInput, match="scaling"):
        factor(scaling=-1.0)


def test_a_certificate_in_another_norm_lends_itself_to_nothing_else() -> None:
    """What contains a primal-dual step takes over its Euclidean facts alone, and a foreign module cannot be run in its norm."""
    T = make("primal-dual", 0, 0.9, 0.9, False, Gaussian())
    certificate = prove(T, SHAPE)
    assert isinstance(certificate, Renormed) and certificate.averaged is None and certificate.lipschitz > 1
    assert "averaged in a norm of its own" in str(certificate)
    assert certificate.to_json()["averaged_in_metric"] == certificate.renormed
    assert not isinstance(certificate.then(certificate), Renormed)
    with pytest.raises(Refused):
        prove(KrasnoselskiiMann(T, 0.5), SHAPE)
    assert certify(Relaxed(T, 0.5), certificate.domain).averaged is None
    with pytest.raises(Refused, match="does not prove"):
        fixed_point(nn.Identity(), torch.zeros(1, *certificate.domain), certificate=certificate)
    with pytest.raises(Refused, match="does not prove"):
        fixed_point(T, torch.zeros(1, *SHAPE).double(), certificate=replace(certificate, renormed=1.0))


def test_what_does_not_go_together_is_said() -> None:
    data = Dense(SHAPE)

    def made(method: str, **options: object) -> nn.Module:
        return splitting(method, Averaged(0.4), data, data.y.abs(), sigma=0.1, tau=0.1, **options)  # type: ignore[arg-type]

    for method in ("half-quadratic", "douglas-rachford"):
        with pytest.raises(BadInput, match="Gaussian noise only"):
            made(method, likelihood=Poisson(0.1, 0.1))
    with pytest.raises(BadInput, match="box=False"):
        made("red", box=True)
    with pytest.raises(BadInput, match="low < high"):
        made("forward-backward", box=(1.0, 0.0))
    with pytest.raises(BadInput, match="data of shape"):
        GradientStep(data, torch.zeros(1, 99), 0.1)
    with pytest.raises(Refused, match="relaxation"):
        made("forward-backward", relaxation=-1.0)
    with pytest.raises(BadInput, match="must be one"):
        PrimalDual(Averaged(0.4), DualOfData(data, data.y), SHAPE, 0.2, smooth=GradientStep(data, data.y, 0.1))
