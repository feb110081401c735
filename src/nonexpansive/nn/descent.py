"""A larger radius near an image, by descent on what the bound there is free to choose.

A majorant (:mod:`nonexpansive.nn.majorant`) holds for every choice of its w, ω and λ. The gradient of ‖v‖r + κr² + c, at the radius r
that it has itself, tells how to choose them better; a step costs as much as a few bounds. A part of c is a quadratic in each w and in
each ω, with Hessians 2M ⪯ 2ρI and 2hκR ⪯ 4hκI: steps are measured by these, steps of log λ by the price ρr². ‖v‖ nears 0, as it would
at the best multiplier of ‖δ‖² ≤ r² were the fall itself a quadratic (Boyd & Vandenberghe 2004, App. B), and has no derivative there:
√(‖v‖² + ε²) stands for it.

What is found need not be exact, and may be looked for in float32. It is a bound once it is made into one in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nonexpansive.math.enclosure import column
from nonexpansive.nn.majorant import Choice, Majorant, Trace

STEPS = 6
"""How many, unless told otherwise."""

STEP = 0.15
"""Of the step to the minimum of that quadratic, were its Hessian 2ρI or 2hκI; of log λ, per share of its price that it
saves, of which at most two count."""

MOMENTUM = 0.5
"""Of each step of w and ω that is added to the next (Polyak 1964)."""

SMOOTH = 0.06
"""ε, as a share of margin/r."""


class _Point(NamedTuple):
    """Where the descent is in the choice for one flow; also a gradient there, or a move."""

    w: Tensor
    omega: Tensor
    log: Tensor
    """log λ."""

    @classmethod
    def of(cls, flow: Choice) -> _Point:
        assert flow.omega is not None and flow.lam is not None
        return cls(flow.w, flow.omega, flow.lam.log())

    def moved(self, by: _Point) -> _Point:
        return _Point(*(t + move for t, move in zip(self, by, strict=True)))


@torch.no_grad()
def descend(met: Trace, rows: Tensor, margin: Tensor, reach: Tensor, steps: int) -> list[Any]:
    """Choices for ``met.majorant(rows, ...)`` by which a ``margin`` (N,) lasts further than by ``met.choices(rows, reach)``, or as far.

    ``rows`` (N, d), w_i - w_j; ``reach`` (N,): a distance near that at which the margin is lost.
    """
    choices = met.choices(rows, reach)
    radius = met.majorant(rows, reach, choices=choices).lasts(margin)  # the bound completes them
    flows = list(_flows(choices))
    now = best = [_Point.of(flow) for flow in flows]
    moves = [_Point(*map(torch.zeros_like, point)) for point in now]
    for step in range(steps + 1 if steps and flows else 0):
        with torch.set_grad_enabled(step < steps):
            for flow, point in zip(flows, now, strict=True):
                free = [t.requires_grad_(step < steps) for t in point]
                flow.w, flow.omega, flow.lam = free[0], free[1], free[2].exp()
            bound = met.majorant(rows, reach, choices=choices)
        lasts = bound.lasts(margin)
        further, radius = lasts > radius, torch.fmax(radius, lasts)
        best = [_where(further, *pair) for pair in zip(now, best, strict=True)]
        if step < steps:
            gradients = _gradients(bound, margin, radius.where(radius > 0, reach), now)
            moves = [_move(*each, radius) for each in zip(flows, gradients, moves, strict=True)]
            now = [point.moved(move) for point, move in zip(now, moves, strict=True)]
    for flow, point in zip(flows, best, strict=True):
        flow.w, flow.omega, flow.lam = point.w, point.omega, point.log.exp()
    return choices


@torch.enable_grad()
def _gradients(bound: Majorant, margin: Tensor, radius: Tensor, points: list[_Point]) -> list[_Point]:
    """Of ‖v‖r + κr² + c."""
    smoothed = (bound.linear.flatten(1).square().sum(1) + (SMOOTH * margin / radius).square()).sqrt()
    fall = smoothed * radius + bound.curvature * radius.square() + bound.constant
    gradients = iter(torch.autograd.grad(fall.sum(), [t for point in points for t in point]))
    return [_Point(next(gradients), next(gradients), next(gradients)) for _ in points]


def _move(flow: Choice, gradient: _Point, last: _Point, radius: Tensor) -> _Point:
    assert flow.stiffness is not None
    tiny = torch.finfo(radius.dtype).tiny
    stiff, stiffer = (column(t.clamp_min(tiny), gradient.w) for t in flow.stiffness)
    price = (flow.stiffness[0] / 2 * radius.square()).clamp_min(tiny)
    return _Point(
        MOMENTUM * last.w - STEP * gradient.w / stiff,
        MOMENTUM * last.omega - STEP * gradient.omega / stiffer,
        -STEP * (gradient.log / price).clamp(-2, 2),
    )


def _where(first: Tensor, one: _Point, other: _Point) -> _Point:
    return _Point(*(torch.where(column(first, a), a, b) for a, b in zip(one, other, strict=True)))


def _flows(choices: list[Any]) -> Iterator[Choice]:
    for chosen in choices:
        if isinstance(chosen, Choice):
            yield chosen
        elif isinstance(chosen, list):
            yield from _flows(chosen)


def converted(choices: list[Any], dtype: torch.dtype) -> list[Any]:
    """The same choices as numbers of another type."""

    def convert(chosen: Any) -> Any:
        if isinstance(chosen, list):
            return converted(chosen, dtype)
        if isinstance(chosen, Tensor):
            return chosen.to(dtype)
        rest = (chosen.omega, chosen.lam, chosen.seen)
        return Choice(chosen.w.to(dtype), *(None if t is None else t.to(dtype) for t in rest))

    return [convert(chosen) for chosen in choices]
