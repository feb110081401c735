"""Two hundred random nets under attack, and proof that the attack would find a bound that is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import nn

import nonexpansive
from cases import CONTROLS, METHODS, attack, pairs, violation
from nonexpansive import ButcherTableau, certify
from nonexpansive.errors import Refused
from nonexpansive.nn import (
    ClippedRamps,
    GradientFlow,
    LinearSpline,
    MaximalStep,
    MaxMin,
    Relaxed,
    Residual,
    Resolvent,
    Scale,
)

MONOTONE = ["relu", "leaky_relu", "tanh", "softplus", "elu", "sigmoid", "identity", "softshrink", "hardtanh", "celu"]


def random_net(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A chain of one to four random blocks on small images or vectors, with random weights, in float64 and evaluation mode."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    images = draw.random() < 0.6
    channels = draw.choice([2, 4])
    shape = (channels, draw.randint(2, 5), draw.randint(2, 5)) if images else (channels,)

    def linear(to: int) -> nn.Module:
        if not images:
            return nn.Linear(channels, to, bias=draw.random() < 0.7)
        mode = draw.choice(["zeros", "zeros", "circular", "replicate", "reflect"])
        return nn.Conv2d(channels, to, 3, padding=1, padding_mode=mode, bias=draw.random() < 0.7)

    def sigma() -> nn.Module | str:
        learned = [lambda: ClippedRamps(4), lambda: LinearSpline(4)]
        return draw.choice(learned)() if draw.random() < 0.3 else draw.choice(MONOTONE)

    def flow() -> nn.Module:
        return GradientFlow(linear(4), sigma(), method=draw.choice(METHODS), control=draw.choice(CONTROLS)())

    def block() -> nn.Module:
        kind = draw.randrange(10)
        if kind < 5:
            return flow()
        if kind == 5:
            return Relaxed(flow(), draw.choice([0.3, 0.9, 1.2]))
        if kind == 6:
            return Residual(nn.Sequential(linear(channels), draw.choice([nn.ReLU, nn.Tanh, nn.GELU, MaxMin])()))
        if kind == 7:
            return nn.Sequential(linear(channels), draw.choice([nn.ReLU, nn.SiLU, MaxMin, nn.LeakyReLU])())
        if kind == 8:
            return Resolvent(linear(3), draw.choice(MONOTONE), draw.choice([0.3, 3.0]), 1e-12)
        return Scale(draw.choice([-1.0, 0.7, 1.5]))

    model = nn.Sequential(*(block() for _ in range(draw.randint(1, 4))))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(draw.choice([0.0, 0.1, 0.3]) * torch.randn_like(p))
        while True:
            with suppress(Refused):  # too many substeps for weights of that size
                flows = [part for part in model.double().eval().modules() if isinstance(part, GradientFlow)]
                if all(
                    flow.step()[1] * flow.tableau.stages <= 16 for flow in flows
                ):  # more take long, and show no more
                    return model, shape
            for p in model.parameters():
                p.mul_(0.7)


def excess(module: nn.Module, shape: tuple[int, ...], seed: int) -> float:
    """By how much the attack exceeds what is certified, relative to it: above 0, the certificate is refuted."""
    certificate, (x, d) = certify(module, shape), pairs(shape, 8, seed)
    found = float(attack(module, x, d, steps=6).max()) / certificate.lipschitz - 1
    if (alpha := certificate.averaged) is not None:
        found = max(found, float(attack(module, x, d, 1 - alpha, steps=6).max()) / alpha - 1)
        found = max(found, float(violation(module, x, d, alpha).max()) * alpha)
    return found


@pytest.mark.parametrize("part", range(20))
def test_no_random_net_refutes_its_certificate(part: int) -> None:
    for seed in range(10 * part, 10 * part + 10):
        module, shape = random_net(seed)
        assert excess(module, shape, seed) <= 1e-7, f"net {seed}: {certify(module, shape)}"


# ------------------------------------------------------------------------------------------------------------- the law bites


def refuted(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int = 6) -> bool:
    for seed in range(count):
        torch.manual_seed(seed)
        if excess(make().double().eval(), shape, seed) > 0.01:
            return True
    return False


FLOWS: list[Callable[[], nn.Module]] = [
    lambda: GradientFlow(nn.Linear(4, 6), "leaky_relu"),
    lambda: GradientFlow(nn.Linear(4, 6), "leaky_relu", alpha=0.5),
    lambda: GradientFlow(nn.Linear(4, 6), "tanh", method="heun"),
]


@pytest.mark.parametrize("make", FLOWS)
def test_a_norm_bound_that_is_too_low_is_caught_in_flows(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not refuted(make, (4,))
    true = nonexpansive.nn.control.norm_bound
    monkeypatch.setattr(nonexpansive.nn.control, "_BOUNDS", type(nonexpansive.nn.control._BOUNDS)())
    monkeypatch.setattr(nonexpansive.nn.control, "norm_bound", lambda linear, shape=None: 0.8 * true(linear, shape))
    assert refuted(make, (4,))


@pytest.mark.parametrize("make", FLOWS)
def test_a_step_that_is_too_long_is_caught(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    step, alpha = MaximalStep.safe_step, ButcherTableau.averagedness
    monkeypatch.setattr(MaximalStep, "safe_step", lambda *a: (1.3 * step(*a)[0], 1))
    monkeypatch.setattr(ButcherTableau, "averagedness", lambda tableau, nu, h: alpha(tableau, nu, h / 1.3))
    assert refuted(make, (4,))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 6), (4,)),
        (lambda: nn.Conv2d(2, 2, 3, padding=1), (2, 4, 5)),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2, stride=2, padding_mode="reflect"), (4, 5, 5)),
    ],
)
def test_a_norm_bound_that_is_too_low_is_caught_in_layers(
    make: Callable[[], nn.Module], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = nonexpansive.math.rules.norm_bound
    assert not refuted(make, shape, 2)
    monkeypatch.setattr(nonexpansive.math.rules, "norm_bound", lambda linear, shape=None: 0.8 * true(linear, shape))
    assert refuted(make, shape)


def test_a_composition_that_takes_the_largest_alpha_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonexpansive.math.certificate, "compose_averaged", max)

    def two() -> nn.Module:
        return nn.Sequential(GradientFlow(nn.Linear(4, 4), "leaky_relu", alpha=0.5), nn.ReLU())

    assert refuted(two, (4,), 20)
