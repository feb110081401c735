"""Laws of the activations: the slopes of the program that runs lie in the stated range, and so does its rounding."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.activation import REGISTERED, Slopes, activation, monotone, register_activation, slopes
from nonexpansive.math.rounding import UNIT
from nonexpansive.nn.spline import ClippedRamps, LinearSpline


def prelu(*weights: float) -> nn.PReLU:
    module = nn.PReLU(len(weights))
    module.weight.data = torch.tensor(weights)
    return module


CASES = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.LeakyReLU(0.9), nn.LeakyReLU(1.7), nn.LeakyReLU(0.0),
    prelu(0.25),
    nn.ELU(), nn.ELU(0.3), nn.ELU(2.5), nn.CELU(), nn.CELU(0.2), nn.CELU(3.0), nn.SELU(), nn.Tanh(), nn.Sigmoid(),
    nn.LogSigmoid(), nn.Softplus(), nn.Softplus(5.0), nn.Softplus(0.3, 40), nn.Softsign(), nn.Softshrink(),
    nn.Softshrink(0.1),
    nn.Tanhshrink(), nn.Hardtanh(), nn.Hardtanh(-0.3, 1.7), nn.Hardtanh(0.1, 0.7), nn.Hardsigmoid(),
    nn.Threshold(0.3, 0.3),
    nn.Hardshrink(0.0),
]  # fmt: skip
DECREASING = [
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.LeakyReLU(-0.2),
    prelu(-0.1),
    nn.ELU(-0.5),
]
GRID = torch.cat([torch.linspace(-12, 12, 400_001), torch.linspace(-90, 90, 100_001)]).double().sort().values


@pytest.mark.parametrize("module", CASES + DECREASING, ids=repr)
def test_slopes_hold_on_a_dense_grid(module: nn.Module) -> None:
    bounds = slopes(module)
    values = copy.deepcopy(module).double()(GRID[:, None] if isinstance(module, nn.PReLU) else GRID).detach().flatten()
    steps = GRID.diff()
    keep = steps > 1e-6
    quotient = (values.diff() / steps)[keep]
    slack = 1e-8 + 2 * bounds.absolute / 6e-5  # rounding of the quotient; softplus's switch
    assert quotient.min() >= bounds.low - slack
    assert quotient.max() <= bounds.high + slack
    # and the range is no larger than that
    assert quotient.max() >= bounds.high - 2e-3
    assert quotient.min() <= bounds.low + 2e-3
    assert bounds.lipschitz == max(abs(bounds.low), abs(bounds.high))


@pytest.mark.parametrize("module", CASES + DECREASING, ids=repr)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(0, 6))
@settings(max_examples=40, deadline=None)
def test_slopes_hold_between_any_two_points(module: nn.Module, s: float, t: float, closer: float) -> None:
    bounds = slopes(module)
    t = s + (t - s) * 10**-closer
    x = torch.tensor([[s], [t]], dtype=torch.float64)
    low, high = copy.deepcopy(module).double()(x).detach().flatten().tolist()
    rounding = 1e-13 * (abs(s) + abs(t) + 1) + 2 * bounds.absolute
    rise, run = (high - low) * math.copysign(1, t - s), abs(t - s)
    assert bounds.low * run - rounding <= rise <= bounds.high * run + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", CASES + DECREASING, ids=repr)
def test_rounding_is_within_the_stated_units(module: nn.Module, dtype: torch.dtype) -> None:
    bounds = slopes(module)
    small = 10 ** torch.linspace(-6, 1.5, 20_000)
    t = torch.cat([small, -small, torch.linspace(-30, 30, 20_001), torch.zeros(1)]).to(dtype)[:, None]
    computed, exact = copy.deepcopy(module).to(dtype)(t), copy.deepcopy(module).double()(t.double())
    allowed = bounds.ulps * UNIT[dtype] * (t.double().abs() + bounds.scale) + bounds.absolute
    tiny = 0 if dtype != torch.float16 else 1e-6  # subnormal numbers of half precision
    assert (computed.double() - exact).abs().sub(allowed).max() <= tiny
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert float(copy.deepcopy(module).double()(zero).detach().abs()) <= bounds.scale


@pytest.mark.parametrize("module", DECREASING, ids=repr)
def test_decreasing_activations_are_refused_by_name(module: nn.Module) -> None:
    with pytest.raises(Refused, match=type(module).__name__):
        monotone(module)


@pytest.mark.parametrize("module", CASES, ids=repr)
def test_the_others_are_monotone(module: nn.Module) -> None:
    assert monotone(module).low >= 0


@pytest.mark.parametrize(
    "module",
    [nn.Hardshrink(), nn.Threshold(0.1, 20.0), nn.Softplus(1.0, 2.0), nn.Softplus(1.0, 200.0),
     nn.CELU(-1.0), nn.Softmax(1), nn.Linear(2, 2)],
    ids=repr,
)  # fmt: skip
def test_what_has_no_slopes_is_refused(module: nn.Module) -> None:
    with pytest.raises(Refused, match=type(module).__name__):
        slopes(module)


def test_subclasses_are_not_trusted() -> None:
    class Squared(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input**2

    with pytest.raises(Refused, match="Squared"):
        slopes(Squared())

    class Steeper(ClippedRamps):
        def forward(self, t: Tensor, level: float | Tensor | None = None) -> Tensor:
            return 2 * super().forward(t, level)

    with pytest.raises(Refused, match="Steeper"):
        slopes(Steeper(3))
    register_activation(Squared, lambda module: Slopes(0.0, 3.0))
    assert slopes(Squared()).high == 3


def test_a_module_of_ones_own() -> None:
    class Half(nn.Module):
        def slope_range(self) -> tuple[float, float]:
            return 0.0, 0.5

    assert slopes(Half()) == Slopes(0.0, 0.5)
    assert math.isinf(slopes(Half()).ulps)


def test_parametrized_weights_are_read() -> None:
    module = prelu(0.5, 2.0)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Sigmoid())
    assert slopes(module).high == 1.0
    assert slopes(module).low == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item())


@pytest.mark.parametrize("bounds", [(1, 0), (math.nan, 1), (0, math.inf), (0, 1, -1), (0, 1, math.nan)])
def test_bad_bounds(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        Slopes(*bounds)


def test_names() -> None:
    assert type(activation("relu")) is nn.ReLU
    assert type(activation("Leaky-ReLU")) is nn.LeakyReLU
    module = nn.Tanh()
    assert activation(module) is module
    with pytest.raises(BadInput, match="Did you mean relu"):
        activation("rellu")
    assert nn.GELU in REGISTERED


# ------------------------------------------------------------------------------------------------ learned activations

SPLINES = [
    ClippedRamps(3),
    ClippedRamps(3, ramps=1),
    ClippedRamps(3, ramps=4, threshold=1.0),
    LinearSpline(3),
    LinearSpline(3, 5, 2.0),
]
LEVELS = [None, 0.0, 0.01, 1.0, 30.0]


def scrambled(module: nn.Module, scale: float = 3.0) -> nn.Module:
    """A copy after some optimiser steps towards random targets, far from where it began."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(module.parameters(), lr=scale / 3)
    for _ in range(6):
        t = torch.randn(16, 3, generator=generator)
        optimiser.zero_grad()
        (
            module(t, 1 + torch.rand(16, generator=generator)) - 5 * torch.randn(16, 3, generator=generator)
        ).square().mean().backward()
        optimiser.step()
    return module.eval()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("module", SPLINES, ids=repr)
def test_learned_slopes_stay_in_range(module: nn.Module, level: float | None) -> None:
    for scale in (0.3, 10.0):
        trained = scrambled(module, scale).double()
        bounds = slopes(trained)
        assert bounds.low == 0
        assert bounds.high == 1
        t = torch.linspace(-4, 4, 40_001, dtype=torch.float64)[:, None].expand(-1, 3).contiguous()
        with torch.no_grad():
            quotient = trained(t, level).diff(dim=0) / t.diff(dim=0)
        assert quotient.min() >= -1e-9
        assert quotient.max() <= 1 + 1e-9
        assert trained(torch.zeros(2, 3, dtype=torch.float64), level).abs().max() == 0


@given(
    st.integers(0, 2**31),
    st.floats(0.1, 40),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_ramp_weights_never_sum_to_more_than_one(seed: int, scale: float, ramps: int, dtype: torch.dtype) -> None:
    module = ClippedRamps(64, ramps).to(dtype).eval()
    module.logits.data = (scale * torch.randn(ramps + 1, 64, generator=torch.Generator().manual_seed(seed))).to(dtype)
    assert module.slope_range().high == 1.0
    assert module.weights().min() >= 0


@pytest.mark.parametrize("module", SPLINES, ids=repr)
def test_channels_are_axis_one(module: nn.Module) -> None:
    module = scrambled(module)
    t = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    module = module.double()
    flat = module(t.permute(0, 2, 3, 1).reshape(-1, 3)).reshape(2, 5, 4, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(t), flat)
    torch.testing.assert_close(module(t.to(memory_format=torch.channels_last)), flat)
    torch.testing.assert_close(module(t.transpose(2, 3)).transpose(2, 3), flat)
    assert module(t.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    for bad in (t[:, :2], t[0, 0, 0]):
        with pytest.raises(ValueError, match="3 channels"):
            module(bad)


@pytest.mark.parametrize("module", SPLINES, ids=repr)
def test_levels_are_per_sample(module: nn.Module) -> None:
    module, levels = scrambled(module), torch.tensor([0.0, 0.5, 2.0])
    t = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    together = module(t, levels)
    for i, level in enumerate(levels.tolist()):
        torch.testing.assert_close(together[i : i + 1], module(t[i : i + 1], level))
    torch.testing.assert_close(module(t), module(t, 1.0))
    assert torch.isfinite(together).all()
    with pytest.raises(ValueError, match="one level"):
        module(t, torch.ones(2))


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3, 2)])
@pytest.mark.parametrize("module", SPLINES, ids=repr)
def test_gradients(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = scrambled(module, 0.3).double()
    t = (0.7 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(t: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(
            module, dict(zip(names, values, strict=True)), (t, torch.rand(shape[0]).fill_(0.8))
        )

    assert torch.autograd.gradcheck(run, (t, *module.parameters()), fast_mode=len(shape) == 4)
    assert torch.autograd.gradgradcheck(run, (t, *module.parameters()), fast_mode=True)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs are computed block by block, whatever their layout, to the same values and gradients."""
    monkeypatch.setattr("nonexpansive.nn.spline.BLOCK", 256)
    module = scrambled(ClippedRamps(3)).double()
    for shape in [(10, 3, 9, 7), (1, 3, 20, 21), (300, 3)]:
        for channels_last in (False, True)[: len(shape) // 2]:
            t = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            t = t.to(memory_format=torch.channels_last) if channels_last else t
            for level in (1.0, torch.rand(shape[0])):
                results = []
                for create_graph in (False, True):  # the second takes the path without blocks
                    x = t.clone().requires_grad_()
                    out = module(x, level)
                    results.append(
                        (
                            out,
                            *torch.autograd.grad(out.sin().sum(), (x, *module.parameters()), create_graph=create_graph),
                        )
                    )
                for one, two in zip(*results, strict=True):
                    torch.testing.assert_close(one, two)
                some = module(t[:1], level if isinstance(level, float) else level[:1])
                torch.testing.assert_close(results[0][0][:1], some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", SPLINES, ids=repr)
def test_learned_activations_round_as_stated(module: nn.Module, dtype: torch.dtype) -> None:
    assert math.isinf(slopes(ClippedRamps(3)).ulps)  # not known before the thresholds are
    for spread, level in itertools.product((0.1, 1.0, 3.0), (None, 1e-4, 0.03, 1.0, 10.0)):
        module = scrambled(module, spread).eval()
        t = torch.randn(4000, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
        with torch.no_grad():
            error = (module(t, level).double() - copy.deepcopy(module).double()(t.double(), level)).abs()
            assert module(t, level).dtype == dtype
        assert (error <= slopes(module).ulps * UNIT[dtype] * t.double().abs()).all()


@pytest.mark.parametrize("module", [ClippedRamps(3), LinearSpline(3)], ids=repr)
def test_learned_activations_compile_and_transform(module: nn.Module) -> None:
    module = scrambled(module)
    t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(t, 0.5), module(t, 0.5))
    x = t.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(torch.func.vjp(module, t)[1](torch.ones_like(t))[0], expected)
    torch.testing.assert_close(torch.func.grad(lambda t: module(t).sum())(t), expected)


@pytest.mark.parametrize("module", SPLINES, ids=repr)
def test_parameters_that_are_not_numbers_are_refused(module: nn.Module) -> None:
    module = copy.deepcopy(module).eval()
    module.logits.data[0, 1] = math.nan
    with pytest.raises(Refused, match="not finite"):
        slopes(module)
