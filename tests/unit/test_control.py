"""The three ways of keeping the constraint: what they choose, what they refuse, and the state that they keep."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.tableau import tableau
from nonexpansive.nn import AdaptiveSteps, GradientFlow, MaximalStep, NormControl, Rescale, project
from nonexpansive.nn.control import CONTROLS, SMALLEST, control, sound_norm

EULER, SSP = tableau("euler"), tableau("ssp(3,2)")


def norm(linear: nn.Module) -> float:
    return float(torch.linalg.matrix_norm(linear.weight.detach().double(), 2))  # type: ignore[operator, union-attr]


def test_names() -> None:
    assert {name: type(control(name)) for name in CONTROLS} == CONTROLS
    assert control("rescale", 0.5).alpha == 0.5
    given = MaximalStep(0.5)
    assert control(given) is given
    assert control(given, 0.5) is given
    with pytest.raises(BadInput, match="contradicts"):
        control(given, 0.6)
    with pytest.raises(BadInput, match="'maximal'"):
        control("maximl")
    for wrong in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(BadInput, match="alpha"):
            MaximalStep(wrong)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BadInput, match="span"):
            AdaptiveSteps(span=wrong)


def test_the_maximal_step_is_the_formulas() -> None:
    for alpha, method, slope, size in [
        (1.0, EULER, 1.0, 3.0),
        (0.5, EULER, 0.25, 2.0),
        (1.0, SSP, 1.0, 0.1),
        (0.3, SSP, 1.0, 7.0),
    ]:
        expected = 2 / (slope * size**2) / (1 / alpha - 1 + 1 / method.radius)
        assert MaximalStep(alpha).safe_step(size, slope, method) == (pytest.approx(expected, rel=1e-6), 1)
        assert MaximalStep(alpha).safe_step(size, slope, method)[0] < expected
        h, n = MaximalStep(alpha).training_step(torch.tensor(size**2), slope, method)
        assert (float(h), n) == (pytest.approx(expected, rel=1e-6), 1)


def test_the_maximal_step_is_differentiated_through_the_norm() -> None:
    weight = torch.tensor([[2.0]], requires_grad=True)
    h, _ = MaximalStep().training_step((weight**2).sum(), 1.0, EULER)
    (slope,) = torch.autograd.grad(h, weight)  # type: ignore[arg-type]
    assert float(slope) == pytest.approx(-4 / 2.0**3)


def test_adaptive_steps_are_the_papers() -> None:
    for span, size, slope, method in [(1.0, 3.0, 1.0, EULER), (2.0, 1.7, 0.5, SSP), (1.0, 0.1, 1.0, EULER)]:
        n = max(1, math.ceil(span * slope * size**2 / (2 * method.radius) * (1 + 2e-6)))
        h, count = AdaptiveSteps(span=span).safe_step(size, slope, method)
        assert count == n
        assert span / n * (1 - 1e-6) < h <= span / n
        assert AdaptiveSteps(span=span).training_step(torch.tensor(size**2), slope, method) == (
            pytest.approx(span / n),
            n,
        )


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("size", [0.3, 1.4, 3.0])
def test_adaptive_steps_are_averaged_together_as_wanted(alpha: float, size: float) -> None:
    chosen = AdaptiveSteps(alpha)
    h, n = chosen.safe_step(size, 1.0, EULER)
    each = EULER.averagedness(1 / size**2, h)
    assert n * each / (1 - each) <= alpha / (1 - alpha)
    assert n * h <= 1.0
    assert n == 1 or h == pytest.approx(min(1 / n, chosen.largest(size, 1.0, EULER, n)), rel=1e-6)
    training, count = chosen.training_step(torch.tensor(size**2, dtype=torch.float64), 1.0, EULER)
    assert (float(training), count) == (pytest.approx(h, rel=1e-5), n)


def test_weights_that_have_grown_too_large_are_refused() -> None:
    with pytest.raises(Refused, match="201 substeps, more than most=100"):
        AdaptiveSteps().safe_step(20.0, 1.0, EULER)
    assert AdaptiveSteps(most=201).safe_step(20.0, 1.0, EULER)[1] == 201
    for kind in CONTROLS.values():
        for huge in (1e200, math.inf):
            with pytest.raises(Refused, match=r"diverged|grown"):
                kind().safe_step(huge, 1.0, EULER)
    with pytest.raises(Refused, match="diverged"):
        AdaptiveSteps().training_step(torch.tensor(math.nan), 1.0, EULER)


@pytest.mark.parametrize("name", list(CONTROLS))
@pytest.mark.parametrize("activation", ["relu", "flat"])
def test_zero_norms_divide_nothing_by_zero(name: str, activation: str) -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x + 0.5

        def slope_range(self) -> tuple[float, float]:
            return 0.0, 0.0

    block = GradientFlow(nn.Linear(3, 4), Flat() if activation == "flat" else activation, control=name)
    if activation == "relu":
        nn.init.zeros_(block.linear.weight)
    x = torch.randn(2, 3)
    for mode in (True, False):
        y = block.train(mode)(x)
        assert torch.isfinite(y).all()
        if activation == "relu":
            assert torch.equal(y, x)
    h, n = block.step()
    assert n == 1
    assert 0 < h <= 2 / SMALLEST
    project(block)
    y = block.train()(x)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "linear", [nn.Linear(5, 4), nn.Conv2d(2, 3, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect")]
)
def test_the_estimate_climbs_to_the_norm_from_below(linear: nn.Module) -> None:
    torch.manual_seed(0)
    linear.reset_parameters()  # type: ignore[operator]
    block = GradientFlow(copy.deepcopy(linear).double())
    bound, estimates = sound_norm(block.linear), []
    for _ in range(60):
        estimates.append(float(block.control.squared_norm(block.linear, _apply).detach()) ** 0.5)
    assert all(b >= a * (1 - 1e-12) for a, b in zip(estimates, estimates[1:], strict=False))
    # for reflection the bound, for any size, is that of a picture all of border
    assert (0.7 if "reflect" in repr(linear) else 0.9) * bound <= estimates[-1] <= bound
    assert estimates[0] > 0.2 * bound
    assert float(block.control.vector.norm()) == pytest.approx(1.0)


def _apply(linear: nn.Module, x: torch.Tensor) -> object:
    from nonexpansive.nn.linear import homogeneous

    return homogeneous(linear, x)


@pytest.mark.parametrize("name", list(CONTROLS))
def test_the_state_is_saved_loaded_and_copied(name: str) -> None:
    block = GradientFlow(nn.Conv1d(2, 3, 3, padding=1), control=name)
    x = torch.randn(4, 2, 8)
    for _ in range(3):
        block(x)
    vector = block.control.vector.clone()
    assert "control.vector" in block.state_dict()
    fresh = GradientFlow(nn.Conv1d(2, 3, 3, padding=1), control=name)
    assert not torch.equal(fresh.control.vector, vector)
    fresh.load_state_dict(block.state_dict())
    twin = copy.deepcopy(block)
    for other in (fresh, twin):
        assert torch.equal(other.control.vector, vector)
        assert torch.equal(other(x), block(x))
        assert torch.equal(other.control.vector, block.control.vector)
        block.control.vector.copy_(vector)
        assert not torch.equal(other.control.vector, vector)
    block.eval()(x)
    assert torch.equal(block.control.vector, vector)


def test_the_start_is_the_same_everywhere() -> None:
    linear = nn.Linear(5, 4)
    one = GradientFlow(copy.deepcopy(linear)).control.vector
    torch.manual_seed(99)
    assert torch.equal(one, GradientFlow(copy.deepcopy(linear)).control.vector)


@pytest.mark.parametrize("linear", [nn.Linear(64, 64), nn.Conv2d(16, 16, 3, padding=1)])
def test_fresh_weights_are_known_before_the_first_step(linear: nn.Module) -> None:
    block = GradientFlow(linear)
    estimate = float(block.control.squared_norm(linear, _apply).detach()) ** 0.5
    assert 0.93 * sound_norm(linear) <= estimate <= sound_norm(linear)


def test_an_estimate_recovers_from_weights_that_were_not_numbers() -> None:
    block = GradientFlow(nn.Linear(3, 3))
    good = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        block.linear.weight.fill_(math.inf)
    block(torch.ones(1, 3))
    assert torch.isfinite(block.control.vector).all()
    block.load_state_dict({name: t for name, t in good.items() if "vector" not in name}, strict=False)
    assert torch.isfinite(block(torch.ones(1, 3))).all()


def test_rescaling_brings_the_weights_to_the_bound_and_leaves_small_ones() -> None:
    block = GradientFlow(nn.Linear(4, 4), control=Rescale(0.5, span=2.0))
    with torch.no_grad():
        block.linear.weight.mul_(10)
    for _ in range(40):
        project(block)
    largest = math.sqrt(1 / 2.0)  # h L²/2 = α
    assert norm(block.linear) == pytest.approx(largest, rel=1e-2)
    with torch.no_grad():
        block.linear.weight.mul_(0.1)
    before = block.linear.weight.clone()
    project(block)
    assert torch.equal(block.linear.weight, before)
    untouched = GradientFlow(nn.Linear(4, 4))
    with torch.no_grad():
        untouched.linear.weight.mul_(10)
    before = untouched.linear.weight.clone()
    project(untouched)
    assert torch.equal(untouched.linear.weight, before)


def test_a_control_belongs_to_one_block() -> None:
    given = AdaptiveSteps()
    GradientFlow(nn.Linear(3, 3), control=given)
    with pytest.raises(BadInput, match="another block"):
        GradientFlow(nn.Linear(4, 4), control=given)


def test_the_base_class_decides_nothing() -> None:
    with pytest.raises(NotImplementedError):
        NormControl().safe_step(1.0, 1.0, EULER)
    with pytest.raises(NotImplementedError):
        NormControl().training_step(torch.ones(()), 1.0, EULER)


def test_a_bound_is_the_same_in_every_memory_layout() -> None:
    linear = nn.Conv2d(4, 4, 1)  # of a 1x1 kernel torch says in either layout that it is contiguous
    bounds = [sound_norm(linear.to(memory_format=kind)) for kind in (torch.contiguous_format, torch.channels_last)]  # type: ignore
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-9)


def test_bounds_are_remembered_by_content() -> None:
    linear = nn.Linear(3, 3)
    first = sound_norm(linear)
    with torch.no_grad():
        linear.weight.mul_(2)
    assert sound_norm(linear) == pytest.approx(2 * first)
    same = nn.Conv1d(3, 3, 1)
    with torch.no_grad():
        same.weight.copy_(linear.weight[..., None])
    assert sound_norm(same) == pytest.approx(2 * first)
    one, other = (
        nn.Conv1d(1, 1, 3, padding=1, bias=False),
        nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False),
    )
    other.weight = one.weight
    assert sound_norm(other) >= sound_norm(one) > 0


def test_a_bound_is_not_that_of_another_class_of_the_same_look() -> None:
    """Parametrized, torch's own layer and a user's are both called ParametrizedLinear."""

    class Linear(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(input)

    own, users = nn.Linear(3, 3, bias=False), Linear(3, 3, bias=False)
    users.weight.data.copy_(own.weight.data)
    for layer in (own, users):
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert sound_norm(own) > 0
    with pytest.raises(Refused):
        sound_norm(users)
