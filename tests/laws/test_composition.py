"""Laws of putting pieces together: the algebra of the theory, and refusal, by name, of whatever has no proof."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, spectral_norm

import nonexpansive
from cases import denoiser, pairs, stretch
from nonexpansive import Certificate, certify, fold, rule
from nonexpansive.errors import Refused
from nonexpansive.math.certificate import chain, compose_averaged, relaxed, split_averaged
from nonexpansive.math.enclosure import Affine
from nonexpansive.nn import GradientFlow, GroupSort, Lifted, MaxMin, Relaxed, Residual, Scale

alphas = st.floats(1e-9, 1 - 1e-9)


def proved(lipschitz: float = 1.0, averaged: float | None = None, error: Affine | None = None) -> Certificate:
    return Certificate(lipschitz, averaged, (3,), (3,), "a map", Affine(lipschitz, 1.0), error or Affine())


@given(st.lists(alphas, min_size=1, max_size=12))
def test_averagedness_composes_as_the_theory_says_rounded_up(values: list[float]) -> None:
    exact = sum((Fraction(a) / (1 - Fraction(a)) for a in values), Fraction(0))
    composed = compose_averaged(*values)
    assert composed is not None
    assert Fraction(composed) >= exact / (1 + exact)
    assert Fraction(composed) <= (exact / (1 + exact)) * (1 + Fraction(1, 10**12))


@given(alphas, st.integers(1, 50))
def test_splitting_and_composing_are_inverse(alpha: float, count: int) -> None:
    composed = compose_averaged(*[split_averaged(alpha, count)] * count)
    assert composed == pytest.approx(alpha, rel=1e-9)


def test_compositions_at_the_edge() -> None:
    assert compose_averaged() == 0
    assert compose_averaged(0.0, 0.0) == 0
    assert compose_averaged(0.0, 0.5) == 0.5
    assert compose_averaged(*[1 - 2.0**-53] * 9) is None
    both = proved(1.0, 1 - 2.0**-53).then(proved(1.0, 1 - 2.0**-53))
    assert both.averaged is None and both.nonexpansive
    assert proved(2.0).then(proved(0.25)).averaged == pytest.approx(0.75)
    assert proved(1.0).then(proved(1.0, 0.3)).averaged is None


def test_errors_compose() -> None:
    """‖fl S(fl T x) - S(T x)‖: that of S on the computed size, and L_S times that of T."""
    first, second = proved(2.0, error=Affine(0.1, 0.2)), proved(3.0, error=Affine(0.01, 0.02))
    error = first.then(second).error
    u = 5.0
    assert error(u) == pytest.approx(0.01 * (2 * u + 1 + 0.1 * u + 0.2) + 0.02 + 3 * (0.1 * u + 0.2))
    growth = first.then(second).growth
    assert growth(u) == pytest.approx(3 * (2 * u + 1) + 1)


@given(st.floats(0, 4), st.one_of(st.none(), alphas), st.floats(0.1, 3))
def test_relaxation(t: float, alpha: float | None, lipschitz: float) -> None:
    if alpha is not None:
        lipschitz = min(lipschitz, 1.0)
    certificate = relaxed(proved(lipschitz, alpha), t, 0.0)
    assert certificate.lipschitz <= (abs(1 - t) + t * lipschitz) * (1 + 1e-12) + 1e-300
    known = alpha if alpha is not None else 1.0 if lipschitz <= 1 else math.inf
    if t and known < math.inf and Fraction(t) * Fraction(known) < 1:
        assert certificate.averaged is not None
        if lipschitz == 1:
            assert Fraction(certificate.averaged) >= Fraction(t) * Fraction(known)
        assert certificate.nonexpansive
    elif lipschitz > 1 and t > 0:
        assert certificate.averaged is None


def test_a_certificate_that_says_nothing_is_refused() -> None:
    for wrong in (
        lambda: proved(math.inf),
        lambda: proved(math.nan),
        lambda: proved(-1.0),
        lambda: proved(1.0, 1.0),
        lambda: proved(1.0, math.nan),
        lambda: proved(1.0, error=Affine(math.inf)),
        lambda: Certificate(1.0, 0.5, (3,), (4,), "a map", Affine(1.0)),
        lambda: proved().then(Certificate(1.0, None, (4,), (4,), "a map", Affine(1.0))),
    ):
        with pytest.raises(Refused, match="a map"):
            wrong()


# --------------------------------------------------------------------------------------------------- layers that occur twice


def test_a_layer_that_occurs_twice_counts_twice() -> None:
    double = nn.Linear(3, 3, bias=False)
    nn.init.eye_(double.weight)
    with torch.no_grad():
        double.weight.mul_(2)
    certificate = certify(nn.Sequential(double, double), (3,))
    assert certificate.lipschitz == pytest.approx(4)
    assert len(certificate.parts) == 2
    block = GradientFlow(nn.Linear(3, 3), alpha=0.5).eval()
    assert certify(nn.Sequential(block, nn.ReLU(), block), (3,)).averaged == pytest.approx(3 / 4, abs=1e-6)
    tied = GradientFlow(block.linear, alpha=0.5).eval()
    assert certify(nn.Sequential(block, tied), (3,)).averaged == pytest.approx(2 / 3, abs=1e-6)


def test_pooling_that_is_rescaled_has_norm_one_exactly() -> None:
    assert certify(nn.Sequential(nn.AvgPool2d(2), Scale(2)), (1, 4, 4)).lipschitz == 1.0
    assert certify(nn.Sequential(nn.AdaptiveAvgPool2d(1), Scale(8)), (2, 8, 8)).lipschitz == 1.0
    assert certify(nn.AdaptiveAvgPool2d(4), (2, 4, 4)).lipschitz == 1.0
    assert certify(nn.MaxPool2d(2), (1, 4, 4)).lipschitz == 1.0
    assert certify(nn.ReLU(), (3,)).averaged == 0.5
    assert certify(Scale(-0.5), (3,)).averaged == 0.75
    assert certify(nn.Upsample(scale_factor=2), (1, 4, 4)).lipschitz == 2.0


# --------------------------------------------------------------------------------------------------------------- overwriting


class Sum(nn.Module):
    """Uses its input after a part that may have overwritten it."""


@pytest.mark.parametrize("wrap", [Residual, lambda inner: Relaxed(inner, 0.5)])
def test_what_uses_its_input_again_refuses_a_part_that_overwrites_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert certify(wrap(nn.Sequential(nn.ReLU(), nn.Linear(3, 3))), (3,)).lipschitz > 0
    with pytest.raises(Refused, match="inplace=False"):
        certify(wrap(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))), (3,))
    assert certify(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), (3,)).lipschitz > 0


# ------------------------------------------------------------------------------------------------------------------ refusals


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Posing(nn.Linear):
    """A subclass that torch's own test takes for a parametrized layer of torch."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.parametrizations = nn.ModuleDict({"weight": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        return 5 * super().forward(x)


class Skipping(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _nan() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.bias.data[0] = math.nan
    return linear


def _hooked() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return linear


def _replaced() -> nn.Module:
    relu = nn.ReLU()
    relu.forward = torch.square  # type: ignore[method-assign]
    return relu


def _overridden() -> nn.Module:
    convolution = nn.Conv1d(3, 3, 1)
    convolution._conv_forward = lambda x, weight, bias: 9 * x  # type: ignore[method-assign]
    return convolution


class Loud(Tensor):
    """A tensor that turns what a linear layer does with it up to ten."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 10 * out if func is nn.functional.linear else out


def _with(module: nn.Module, **values: object) -> nn.Module:
    for name, value in values.items():
        setattr(module, name, value)
    return module


def _reweighed(weight: Tensor, **settings: str) -> nn.Module:
    return _with(nn.Conv2d(2, 2, 3, padding=1, **settings), weight=nn.Parameter(weight))  # type: ignore[arg-type]


REFUSED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("Softmax", lambda: nn.Softmax(1), (3,)),
    ("LayerNorm", lambda: nn.LayerNorm(3), (3,)),
    ("GroupNorm", lambda: nn.GroupNorm(1, 3), (3, 2)),
    ("InstanceNorm2d", lambda: nn.InstanceNorm2d(3), (3, 4, 4)),
    ("RReLU", lambda: nn.RReLU(), (3,)),
    ("Hardshrink", lambda: nn.Hardshrink(), (3,)),
    ("Threshold", lambda: nn.Threshold(0.5, 0.0), (3,)),
    ("LSTM", lambda: nn.LSTM(3, 3), (2, 3)),
    ("Scaled", lambda: Scaled(1, 1, 3), (1, 4, 4)),
    ("Skipping", lambda: Skipping(nn.ReLU()), (3,)),
    ("of its own", lambda: Posing().eval(), (3,)),
    ("ModuleList", lambda: nn.ModuleList([nn.ReLU()]), (3,)),
    ("Sum", Sum, (3,)),
    ("NaN", _nan, (3,)),
    ("hooks", _hooked, (3,)),
    ("hooks", lambda: spectral_norm(nn.Linear(3, 3)), (3,)),
    ("of its own", _replaced, (3,)),
    ("of its own", _overridden, (3, 2)),
    ("a Loud", lambda: _with(nn.Linear(3, 3), weight=nn.Parameter(torch.eye(3).as_subclass(Loud))), (3,)),
    ("a Loud", lambda: _with(nn.ReLU(), scale=nn.Parameter(torch.eye(3).as_subclass(Loud))), (3,)),
    ("float8", lambda: nn.Linear(3, 3).to(torch.float8_e4m3fn), (3,)),
    ("sparse", lambda: _with(nn.Linear(3, 3), weight=nn.Parameter(torch.eye(3).to_sparse())), (3,)),
    # torch pads for 3x3, so that the 1x1 kernel sees the picture's margin twice
    ("not what it states", lambda: _reweighed(torch.rand(2, 2, 1, 1), padding_mode="circular"), (2, 5, 5)),
    ("an axis", lambda: _with(nn.Conv2d(1, 1, 3), stride=2), (1, 5, 5)),
    ("an axis", lambda: _with(nn.Conv2d(1, 1, 3), padding=1), (1, 5, 5)),
    ("crops", lambda: nn.Conv1d(1, 1, 3, padding=-1, padding_mode="replicate"), (1, 12)),
    ("crops", lambda: nn.CircularPad3d((3, 2, 1, 3, -1, 1)), (1, 1, 3, 4)),
    ("crops", lambda: nn.ReflectionPad1d((-1, 2)), (1, 5)),
    ("compiled", lambda: _with(nn.ReLU(), _compiled_call_impl=lambda x: 5 * x), (3,)),
    ("complex", lambda: nn.Linear(3, 3, dtype=torch.complex64), (3,)),
    ("meta", lambda: nn.Linear(3, 3, device="meta"), (3,)),
    ("batch", lambda: nn.BatchNorm1d(3), (3,)),
    ("batch", lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(), (3,)),
    ("3 channels", lambda: nn.BatchNorm1d(3).eval(), (4,)),
    ("random", lambda: nn.Dropout(0.5), (3,)),
    ("training mode", lambda: GradientFlow(nn.Linear(3, 3)), (3,)),
    ("training mode", lambda: denoiser(), (1, 4, 4)),
    ("bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 4)),
    ("two outputs", lambda: nn.MaxPool2d(2, return_indices=True), (1, 4, 4)),
    ("divisor_override", lambda: nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), (1, 5, 5)),
    ("in layer 1 of Sequential: in layer last", lambda: nn.Sequential(
        nn.ReLU(), nn.Sequential(OrderedDict(first=nn.ReLU(), last=nn.Softmax(1)))), (3,)),
    # a sample without its channels, which torch would take for one that has no batch
    ("2 axes", lambda: nn.ReflectionPad1d(1), (5,)),
    ("3 axes", lambda: nn.ReplicationPad2d(1), (5, 5)),
    ("3 axes", lambda: nn.CircularPad2d(1), (5, 5)),
    ("2 axes", lambda: nn.ConstantPad1d(1, 2.0), (5,)),
    ("3 axes", lambda: nn.MaxPool2d(2), (4, 4)),
    ("2 axes", lambda: nn.AdaptiveAvgPool1d(2), (4,)),
    ("3 axes", lambda: nn.Conv2d(1, 1, 1), (5, 5)),
    ("one tensor each", lambda: nn.PixelUnshuffle(2), (4, 4)),
    ("one tensor each", lambda: nn.Flatten(0), (3, 2)),
    ("one tensor each", lambda: nn.Flatten(-3), (3, 2)),
    ("one tensor each", lambda: nn.Unflatten(0, (1, -1)), (3,)),
    ("does not accept", lambda: nn.Linear(3, 3), (4,)),
    ("does not accept", lambda: nn.Conv2d(3, 3, 3), (2, 4, 4)),
    ("does not divide", MaxMin, (3,)),
    ("does not divide", lambda: GroupSort(4), (6,)),
    ("own space", lambda: Residual(nn.Linear(3, 4)), (3,)),
    ("own space", lambda: Relaxed(nn.Linear(3, 4), 0.5), (3,)),
    ("own space", lambda: Lifted(nn.Conv2d(4, 4, 3), 4), (2, 5, 5)),
    ("does not take", lambda: Lifted(nn.Identity(), 4), (5, 2, 2)),
    ("takes images", lambda: denoiser(3).eval(), (1, 4, 4)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "make", "shape"), REFUSED, ids=[f"{word} {i}" for i, (word, _, _) in enumerate(REFUSED)]
)
def test_what_has_no_proof_is_refused_by_name(word: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match=word):
        certify(make(), shape)


def test_global_hooks_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        with pytest.raises(Refused, match="global"):
            certify(nn.ReLU(), (3,))
    finally:
        handle.remove()


def test_a_type_whose_forward_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: 5 * x)
    with pytest.raises(Refused, match="was replaced"):
        certify(nn.Tanh(), (3,))


def test_cropping_by_replication_is_certified() -> None:
    """It leaves the kernels of torch that the other negative paddings break out of."""
    pad = nn.ReplicationPad2d((-1, 2, 1, -2)).double()
    assert stretch(pad, *pairs((1, 6, 6))).max() <= certify(pad, (1, 6, 6)).lipschitz


def test_shapes_that_are_none() -> None:
    for shape in ((), (0, 3), (-1,)):
        with pytest.raises(ValueError, match="shape"):
            certify(nn.ReLU(), shape)
    assert certify(nn.ReLU(), torch.Size([3])).codomain == (3,)
    assert certify(nn.ReLU(), [2, 3]).domain == (2, 3)


def test_float32_is_certified_for_float32_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    float32 = torch.float32
    assert certify(model, (3,), arithmetic=float32).error.slope > 0
    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(Refused, match="exact arithmetic"):
            certify(model, (3,), arithmetic=half)
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    for wrong in (nn.Linear(3, 3).double(), nn.Linear(3, 3).half(), mixed):
        with pytest.raises(Refused, match=r"call \.to"):
            certify(wrong, (3,), arithmetic=float32)
    assert certify(nn.Linear(3, 3).double(), (3,), arithmetic=torch.float64).error.slope < 1e-14
    with torch.autocast("cpu"), pytest.raises(Refused, match="autocast"):
        certify(model, (3,), arithmetic=float32)
    with torch.autocast("cpu"):
        assert certify(model, (3,)).arithmetic == "exact"
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(Refused, match="smaller type"):
            certify(model, (3,), arithmetic=float32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert certify(model, (3,), arithmetic=float32).arithmetic == "float32"


def test_an_activation_without_a_rounding_bound_is_refused_for_float32_alone() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0)

        def slope_range(self) -> tuple[float, float]:
            return 0.0, 1.0

    block = GradientFlow(nn.Linear(3, 3), Own()).eval()
    assert certify(block, (3,)).nonexpansive
    with pytest.raises(Refused, match="rounding"):
        certify(block, (3,), arithmetic=torch.float32)


# ---------------------------------------------------------------------------------------------------------- a rule of one's own


class Reflection(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_rules_of_ones_own_are_folded_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonexpansive.math.certificate, "_RULES", dict(nonexpansive.math.certificate._RULES))
    model = nn.Sequential(Wrapped(nn.Linear(3, 3)), Reflection())
    with pytest.raises(Refused, match="Wrapped"):
        certify(model, (3,))
    rule(Wrapped)(lambda module, shape, unit: fold(module.inner, shape, unit))
    rule(Reflection)(lambda module, shape, unit: Certificate(1.0, None, shape, shape, "Reflection", Affine(1.0)))
    certificate = certify(model, (3,))
    assert certificate.lipschitz == certify(model[0].inner, (3,)).lipschitz
    assert certificate.parts[1].rule == "Reflection"
    with pytest.raises(Refused, match="Softmax"):
        certify(Wrapped(nn.Softmax(1)), (3,))


def test_a_parametrized_layer_is_certified_for_its_weight_as_it_is() -> None:
    linear = nn.Linear(3, 3).double()
    parametrize.register_parametrization(linear, "weight", Scale(5.0))
    linear.eval()
    norm = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
    assert norm <= certify(linear, (3,)).lipschitz <= norm * 1.0001
    with torch.no_grad():
        linear.parametrizations.weight.original.mul_(2)  # type: ignore[union-attr]
    assert certify(linear, (3,)).lipschitz >= 2 * norm
    assert stretch(linear, *pairs((3,))).max() <= certify(linear, (3,)).lipschitz
    assert certify(linear, (3,)).rule.startswith("Linear")


def test_chain_keeps_its_parts_and_their_assumptions() -> None:
    parts = [certify(m, (3,), arithmetic=torch.float32) for m in (nn.Tanh(), nn.Sigmoid())]
    certificate = chain(*parts, rule="two")
    assert certificate.parts == tuple(parts)
    assert set(parts[0].assumptions) <= set(certificate.assumptions)
    assert len(certificate.assumptions) == len(set(certificate.assumptions))
