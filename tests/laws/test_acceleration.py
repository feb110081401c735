"""Laws of the runs: acceleration keeps the fixed point whatever it proposes, anchoring and rates hold, each sample stops by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nonexpansive
from cases import Dense, norms
from nonexpansive import Certificate
from nonexpansive.errors import BadInput, Diverging
from nonexpansive.math.certificate import rule
from nonexpansive.math.enclosure import Affine
from nonexpansive.nn import Resolvent, Scale
from nonexpansive.restore import blur, iterate, kernel, plan
from nonexpansive.restore.iterate import NOT_CERTIFIED, Report, fixed_point, prove
from nonexpansive.restore.methods import splitting
from nonexpansive.restore.schemes import Halpern, KrasnoselskiiMann
from nonexpansive.restore.splitting import ForwardBackward, HalfQuadratic
from nonexpansive.restore.steps import Box, GradientStep

SHAPE = (1, 6, 5)
DATA = Dense(SHAPE, 7)
START = torch.zeros(1, *SHAPE, dtype=torch.float64)


class Shrink(nn.Module):
    """The proximal map of σ‖·‖₁: with it forward-backward solves a convex problem, slowly."""

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        return torch.nn.functional.softshrink(x, sigma)


rule(Shrink)(lambda module, shape, unit: Certificate(1.0, 0.5, shape, shape, "Shrink", Affine(1.0)))


def problem(y: Tensor = DATA.y, box: bool = False) -> nn.Module:
    tau = 0.5 / DATA.lipschitz
    return splitting("forward-backward", Shrink(), DATA, y, sigma=0.3 * tau, tau=tau, box=box)


def run(T: nn.Module, start: Tensor = START, **options: object) -> Report:
    settings = {"tolerance": 1e-9, "iterations": 5_000} | options
    return fixed_point(T, start, certificate=prove(T, SHAPE), **settings)  # type: ignore[arg-type]


def test_anderson_finds_the_same_fixed_point_in_a_third_of_the_steps() -> None:
    plain, fast = run(problem()), run(problem(), acceleration="anderson")
    assert plain.converged and fast.converged
    assert norms(plain.image - fast.image) < 1e-6
    assert fast.iterations <= plain.iterations / 3
    assert all(b <= a * (1 + 1e-12) for a, b in zip(fast.movements, fast.movements[1:], strict=False))
    assert fast.acceleration == "anderson" and fast.proved is None


def _random(scale: float) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda point, residual, differences: (
        point + scale * torch.randn(point.shape, generator=generator, dtype=point.dtype)
    )


@pytest.mark.parametrize(
    "garbage",
    [
        _random(1e9),
        _random(1.0),
        _random(1e-3),
        lambda point, residual, differences: point * math.nan,
        lambda point, residual, differences: point - 50 * residual,  # backwards
        lambda point, residual, differences: point * 0 + 7.0,
    ],
    ids=["huge", "large", "small", "NaN", "backwards", "constant"],
)
def test_garbage_for_proposals_changes_nothing_but_the_time(
    monkeypatch: pytest.MonkeyPatch, garbage: Callable[..., Tensor]
) -> None:
    expected = run(problem()).image
    monkeypatch.setattr(iterate, "propose", garbage)
    spoilt = run(problem(), acceleration="anderson", iterations=10_000)
    assert spoilt.converged
    assert norms(spoilt.image - expected) < 1e-6
    assert all(b <= a * (1 + 1e-12) for a, b in zip(spoilt.movements, spoilt.movements[1:], strict=False))


def test_what_is_taken_is_summable_even_if_every_proposal_looks_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal on a manifold of fixed points never raises the residual, so that the budget alone can stop a drift."""
    drifts = []

    class Flat(nn.Module):
        """The projection on the first axis: all its points are fixed."""

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, 0.999], dtype=x.dtype)

    rule(Flat)(lambda module, shape, unit: Certificate(1.0, 0.5, shape, shape, "Flat", Affine(1.0)))

    def drift(point: Tensor, residual: Tensor, differences: object) -> Tensor:
        drifts.append(point)
        return point + torch.tensor([0.5, 0.0], dtype=point.dtype)

    monkeypatch.setattr(iterate, "propose", drift)
    start = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    report = fixed_point(
        Flat(), start, certificate=prove(Flat(), (2,)), tolerance=0.0, iterations=3000, acceleration="anderson"
    )
    first = 1e-3
    limit = iterate.BUDGET * first * sum(n**-iterate.DECAY for n in range(1, 3000))
    assert 0 < float(report.image[0, 0]) <= limit
    taken = [float(a[0, 0]) for a in drifts]
    assert taken[-1] == taken[-1000], "a drift of a constant size stops once the budget is below it"


def test_the_safeguard_does_not_excuse_a_lie() -> None:
    class Expanding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * x + 1

    lie = Certificate(1.0, 0.5, SHAPE, SHAPE, "a lie", Affine(1.0))
    start = torch.linspace(1, 2, 30, dtype=torch.float64).reshape(1, *SHAPE)
    with pytest.raises(Diverging):
        fixed_point(Expanding(), start, certificate=lie, acceleration="anderson")


@pytest.mark.parametrize("acceleration", [None, "anderson"])
def test_each_sample_stops_by_itself(acceleration: str | None) -> None:
    ys = torch.cat([DATA.y, 0.5 * DATA.y, 2 * DATA.y])
    seen: list[Tensor] = []
    T = problem(ys)
    together = run(T, START.expand(3, *SHAPE), acceleration=acceleration, watch=lambda k, residual, x: seen.append(x))
    assert together.converged and len(set(together.steps)) > 1 and together.iterations == max(together.steps)
    assert (norms(T(together.image) - together.image) <= 1e-9 * norms(together.image)).all()
    for i, y in enumerate(ys):
        assert all(torch.equal(x[i], together.image[i]) for x in seen[together.steps[i] - 1 :]), "it went on"
        alone = run(problem(y[None]), acceleration=acceleration)
        assert norms(together.image[i : i + 1] - alone.image) < 1e-5
        if acceleration is None:  # an accelerated run enlarges the rounding in which one sample and three differ
            assert together.steps[i] == alone.iterations


def test_rates_proved_beforehand_hold() -> None:
    T = problem(box=True)
    report = run(T, START + 0.3)
    assert report.proved is not None
    assert all(moved <= bound for moved, bound in zip(report.movements, report.proved, strict=True))
    assert report.proved[0] >= report.proved[-1] > 0
    assert run(problem()).proved is None
    anchored = run(Halpern(T), START + 0.3, tolerance=2e-3)
    assert anchored.converged and anchored.proved is not None
    # movements hold the residual ‖x_k - T(x_k)‖, which Lieder bounds by 2‖x₀ - x*‖/(k+1)
    assert all(moved <= bound for moved, bound in zip(anchored.movements, anchored.proved, strict=True))
    assert anchored.proved[-1] == pytest.approx(anchored.proved[0] / anchored.iterations)
    truth = float(norms(report.image - (START + 0.3)))
    tight = [2 * truth / (k + 1) for k in range(anchored.iterations)]
    assert all(moved <= bound * (1 + 1e-6) for moved, bound in zip(anchored.movements, tight, strict=True))


def test_anchoring_finds_the_fixed_point_nearest_to_its_start_of_a_map_that_only_turns() -> None:
    class Mirror(nn.Module):
        """(a, b) ↦ (a, -b): non-expansive, not averaged; plain iteration goes to and fro for ever."""

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, -1.0], dtype=x.dtype)

    rule(Mirror)(lambda module, shape, unit: Certificate(1.0, None, shape, shape, "Mirror", Affine(1.0)))
    start = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    T = Halpern(Mirror())
    report = fixed_point(T, start, certificate=prove(T, (2,)), tolerance=1e-3, iterations=50_000)
    assert report.converged
    assert torch.allclose(report.image, torch.tensor([[3.0, 0.0]], dtype=torch.float64), atol=1e-2)
    assert not fixed_point(Mirror(), start, certificate=None, iterations=50).converged
    with pytest.raises(BadInput, match="without acceleration"):
        fixed_point(T, start, certificate=prove(T, (2,)), acceleration="anderson")
    with pytest.raises(BadInput, match="anderson"):
        fixed_point(Mirror(), start, certificate=None, acceleration="magic")  # type: ignore[arg-type]


def test_a_contraction_knows_its_distance() -> None:
    tau = 1 / DATA.lipschitz
    T = ForwardBackward(GradientStep(DATA, DATA.y, tau), Scale(0.9), Box(-3, 3))
    exact = run(T, tolerance=1e-14).image
    for iterations in (3, 10, 30):
        report = run(T, iterations=iterations)
        assert report.error is not None and float(norms(report.image - exact)) <= report.error * (1 + 1e-9)
    assert run(problem(), iterations=3).error is None


def test_a_contraction_that_is_solved_for_knows_its_distance() -> None:
    """Of a T that is computed to a tolerance, and so has rest points that the exact one does not have."""
    torch.manual_seed(0)

    def solved(tolerance: float) -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(Resolvent(nn.Linear(5, 7), "softplus", 30.0, tolerance), Scale(0.9)).double().eval()

    start = torch.randn(3, 5, dtype=torch.float64)
    exact, T = solved(1e-10), solved(1e-2)
    image = fixed_point(exact, start, certificate=prove(exact, (5,)), tolerance=1e-12, iterations=3000).image
    report = fixed_point(T, start, certificate=prove(T, (5,)), tolerance=1e-6, iterations=3000)
    assert report.error is not None
    distance = float(norms(report.image - image).max())
    assert 1e-3 < distance <= report.error < 3


def test_a_map_that_overwrites_its_input_is_given_a_copy() -> None:
    """Else ‖T(x) - x‖ would be 0 at once. The fixed points are x ≥ 0."""
    T, start = nn.Sequential(nn.LeakyReLU(0.5, inplace=True)), -torch.ones(1, 3)
    report = fixed_point(T, start, certificate=prove(T, (3,)), iterations=20)
    assert report.residuals[0] == 1.0 and float(report.image.abs().max()) < 1e-5
    assert bool((start == -1).all())


def test_a_fixed_point_is_assumed_where_none_is_known_to_exist() -> None:
    """x - ½ is averaged and has none, a contraction has, and so has what ends in a box."""
    free, box = HalfQuadratic(nn.ReLU(), nn.ReLU()), HalfQuadratic(nn.ReLU(), Box())
    for T, assumed in ((free, True), (KrasnoselskiiMann(free, 0.5), True), (Scale(0.5), False), (box, False)):
        assert ("a fixed point exists" in prove(T, (3,)).assumptions) == assumed


def test_a_black_picture_contradicts_nothing() -> None:
    """A denoiser works on x - ½, so its rounding does not shrink with ‖T(x)‖; and a residual is a number where T(x) = 0."""
    denoiser, A = nonexpansive.load("denoiser-grey-small"), blur(kernel("box:3"), (1, 64, 64))
    black = plan(torch.zeros(1, 1, 64, 64), A, denoiser, 0.01, method="forward-backward")
    assert len(black.run(tolerance=1e-5, iterations=60).residuals) > 30
    below = plan(torch.full((1, 1, 64, 64), -0.2), A, denoiser, 0.01).run(iterations=5)
    assert all(math.isfinite(residual) for residual in below.residuals)


def test_an_uncertified_run_says_so() -> None:
    report = fixed_point(Scale(0.5), torch.ones(1, 3), certificate=None)
    assert not report.certified and report.error is None
    assert report.to_json()["warning"] == NOT_CERTIFIED
    assert "warning" not in run(problem(), iterations=2).to_json()
    with pytest.raises(Diverging, match=NOT_CERTIFIED):
        fixed_point(Scale(math.nan), torch.ones(1, 3), certificate=None)
