"""Schemes about any iteration: relaxed (Krasnosel'skii and Mann), and anchored (Halpern)."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor, nn

from nonexpansive.errors import Refused
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    relaxed,
    require_out_of_place,
    rule,
)
from nonexpansive.math.rounding import below, times
from nonexpansive.restore.iterate import Iteration
from nonexpansive.restore.splitting import require_nonexpansive


class _Of(Iteration, nn.Module):
    """A scheme about an iteration T, whose picture and state it shares."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def _scheme(self) -> Iteration:
        return self.inner if isinstance(self.inner, Iteration) else Iteration()

    def begin(self, x: Tensor) -> Tensor:
        return self._scheme.begin(x)

    def picture(self, state: Tensor) -> Tensor:
        return self._scheme.picture(state)

    def state_shape(self, shape: Shape) -> Shape:
        return self._scheme.state_shape(shape)

    def distance(self, state: Tensor) -> Tensor | None:
        return self._scheme.distance(state)  # T and (1-λ)I + λT have the same fixed points


class KrasnoselskiiMann(_Of):
    """x ↦ (1-λ)x + λT(x), 0 < λ < 1/α for an α-averaged T, λ < 1 for a T that is merely non-expansive: λα-averaged."""

    method = "Krasnosel'skii-Mann"

    def __init__(self, inner: nn.Module, relaxation: float) -> None:
        super().__init__(inner)
        if not 0 < relaxation < math.inf:
            raise Refused(f"the relaxation λ must be a finite number above 0, not {relaxation}")
        self.relaxation = float(relaxation)

    def forward(self, x: Tensor) -> Tensor:
        return x.lerp(self.inner(x), self.relaxation)

    def extra_repr(self) -> str:
        return f"relaxation={self.relaxation:g}"


@rule(KrasnoselskiiMann)
def _krasnoselskii_mann(module: KrasnoselskiiMann, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module.inner, "which the relaxation uses again")
    inner = require_nonexpansive(module.inner, shape, unit)
    alpha = 1.0 if inner.averaged is None else inner.averaged
    if not times(module.relaxation, alpha) < 1:
        raise Refused(
            f"the relaxed iteration is not averaged: λ = {module.relaxation:g}, but λ < 1/α = {below(1 / alpha)} is needed. "
            f"The nearest setting that is proved: λ ≤ {below(0.99 / alpha, 4)}."
        )
    name = f"Krasnosel'skii-Mann iteration: (1-λ)I + λT, λ = {module.relaxation:g}"
    return replace(relaxed(inner, module.relaxation, unit), rule=name)


class Halpern(_Of):
    """T, to be run anchored: ``fixed_point`` takes x_{k+1} = x₀/(k+2) + (1 - 1/(k+2))T(x_k) (Halpern 1967).

    T need only be non-expansive. If it has a fixed point, x_k converges to the one nearest to x₀ (Wittmann 1992), and
    ‖x_k - T(x_k)‖ ≤ 2‖x₀ - x*‖/(k+1) (Lieder 2021), where averaged iterations have 1/√k; the residual need not fall at every step.
    """

    method, anchored = "Halpern", True

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@rule(Halpern)
def _halpern(module: Halpern, shape: Shape, unit: float) -> Certificate:
    inner = require_nonexpansive(module.inner, shape, unit)
    name = "Halpern iteration: anchored at its start with weights 1/(k+2), of a non-expansive map"
    return replace(inner.plain(), lipschitz=min(1.0, inner.lipschitz), rule=name, parts=(inner,))
