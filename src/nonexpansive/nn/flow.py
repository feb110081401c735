"""The block that everything stands on: Runge-Kutta steps of a gradient flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from numbers import Number
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.activation import Slopes, slopes
from nonexpansive.math.activation import activation as find_activation
from nonexpansive.math.bounds import absolute_norm_bound, terms
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    chain,
    compose_averaged,
    entries,
    fold,
    from_enclosure,
    isometry,
    require_out_of_place,
    rule,
)
from nonexpansive.math.enclosure import SLACK, TINY, Affine, Enclosure, LinearMap, Observed
from nonexpansive.math.integrate import integrate
from nonexpansive.math.rounding import above, below, down, plus, times, up
from nonexpansive.math.rules import elementwise, name_of, output_shape, slope_assumptions
from nonexpansive.math.tableau import ButcherTableau, tableau
from nonexpansive.nn.control import NormControl, sound_norm
from nonexpansive.nn.control import control as find_control
from nonexpansive.nn.implicit import REFERENCE, Resolvent
from nonexpansive.nn.linear import (
    Pullback,
    affine,
    chain_length,
    homogeneous,
    is_torch,
    is_written_out,
    offset_norm,
    probe_shape,
)
from nonexpansive.nn.linear import absolute as absolute_affine
from nonexpansive.nn.pooled import PooledRamps, SignedRamps, WeaklyConvexRamps
from nonexpansive.nn.resize import Lifted
from nonexpansive.nn.spline import ClippedRamps, LinearSpline


class GradientFlow(nn.Module):
    """n Runge-Kutta steps of size h of the gradient flow ẋ = -Aᵀσ(Ax + b): a non-expansive, or α-averaged, residual block.

    The right-hand side is -∇V of the convex V(x) = 1ᵀγ(Ax + b), γ' = σ, which is L_σ‖A‖²-smooth; so a step with
    h ≤ 2r/(L_σ‖A‖²) of a method with contractivity radius r is non-expansive (Sherry et al. 2024; Dahlquist & Jeltsch 1979).
    Maps (B, *shape) to (B, *shape).

    - ``linear``: A and b, any ``torch.nn.Linear`` or ``ConvNd`` (every padding mode, stride, groups, dilation), possibly
      parametrized, or a module of your own that is linear and has a method ``norm_bound(shape) -> float``.
    - ``activation``: σ, elementwise and non-decreasing, by name or as a module; anything else is refused (unless the control is
      "unconstrained" or a :class:`LipschitzStep`).
    - ``method``: a Runge-Kutta method by name or a :class:`ButcherTableau`; those with radius 0 are refused.
    - ``control``: how the constraint is kept ("maximal", "capped", "adaptive", "rescale" or a :class:`NormControl`), with ``alpha``
      the wanted averagedness (default 1: non-expansive); :class:`LipschitzStep`: to a constant L > 1; "unconstrained": not at all.
    - ``shape``: the shape of one input, needed only for a linear module of your own.

    In training mode the step follows an estimate of ‖A‖. In evaluation mode it follows a sound bound, computed when
    ``eval()`` is called, when weights are loaded or converted, and whenever they, or the settings of the layers, are seen to have
    changed. What cannot be seen are writes to memory that the weights share with another tensor, such as ``weight.data``, an array of
    NumPy or the vector of ``vector_to_parameters``, and in a compiled model any that are made in place: call ``eval()`` after those.

    Raises Refused if σ may decrease or works in place, the method's radius is 0 or the linear layer has no norm bound.
    """

    def __init__(
        self,
        linear: nn.Module,
        activation: str | nn.Module = "relu",
        *,
        method: str | ButcherTableau = "euler",
        control: str | NormControl = "maximal",
        alpha: float | None = None,
        shape: Shape | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.activation = find_activation(activation)
        require_out_of_place(self.activation, "which a linear layer may have returned and a gradient flow uses again")
        self.tableau = tableau(method)
        self.tableau.require_usable()
        if not self.tableau.explicit:
            raise Refused(f"{self.tableau.name} is implicit: use nonexpansive.nn.Resolvent for the implicit Euler step")
        self.control = find_control(control, alpha)
        self.control.attach(linear, probe_shape(linear, shape))
        if not any(p.is_meta for p in linear.parameters()):
            self.control.warm_up(linear, homogeneous)
        self._pinned: _Pin | None = None
        self._steepest = self._slopes().high
        """L_σ for training, where reading it from the device at each step would stall."""
        self._step: tuple[float, int] | None = None
        self._seen: _Seen | None = None
        self.register_load_state_dict_post_hook(_after_loading)

    # ------------------------------------------------------------------------------------------------------------- stepping

    def step(self) -> tuple[float, int]:
        """(h, n) of evaluation mode: the size of the steps and their number, from a sound bound on ‖A‖."""
        if self._step is not None and torch.compiler.is_compiling():
            return self._step
        if self._step is None or self._seen is None or not self._seen.still(*self._parts(), but=self.control.vector):
            return self.settle()
        return self._step

    def settle(self) -> tuple[float, int]:
        """``step()``, chosen anew for the weights as they are now."""
        # looked at first, so that what changes meanwhile is noticed at the next call; what parametrize.cached() holds may be older than
        # what it is made of
        seen = None if parametrize._cache_enabled else _Seen(*self._parts(), but=self.control.vector)
        step = self.control.safe_step(sound_norm(self.linear), self._slopes().high, self.tableau)
        self._step, self._seen = step, seen
        return step

    def _parts(self) -> tuple[object, ...]:
        """All that the step of evaluation mode depends on, but for the vector of the control's estimate."""
        return self.linear, self.activation, self.control, self.tableau

    def _slopes(self) -> Slopes:
        return self.control.slopes(self.activation)

    def _unsettle(self) -> None:
        """Forget the step; in evaluation mode choose it anew at once, if there are weights to choose it for."""
        self._step, self._seen = None, None
        if not (self.training or any(p.is_meta for p in self.parameters())):
            self.settle()

    def train(self, mode: bool = True) -> GradientFlow:
        super().train(mode)
        self._steepest = self._slopes().high
        self._unsettle()
        return self

    def forward(self, x: Tensor, *level: Tensor | float) -> Tensor:
        """x (B, *shape) → (B, *shape); ``level`` is passed on to an activation that takes a noise level."""
        h, n = self._chosen() if self._pinned is None else self._pinned.step()
        return self._integrate(x, h, n, *level)

    def _chosen(self) -> tuple[float | Tensor, int]:
        """(h, n) of this call; in training mode the estimate of ‖A‖ moves on by one."""
        if not self.training:
            return self.step()
        squared = self.control.squared_norm(self.linear, homogeneous)
        return self.control.training_step(squared, self._steepest, self.tableau)

    def _integrate(self, x: Tensor, h: float | Tensor, n: int, *level: Tensor | float) -> Tensor:
        def scaled_field(y: Tensor) -> Tensor:
            """hX(y) = -hAᵀσ(Ay + b), h taken into the weights of the adjoint."""
            t, pullback = affine(self.linear, y)
            return pullback(self.activation(t, *level), -h)

        return integrate(scaled_field, x, 1.0, self.tableau, n)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the weights back to the constraint after an optimiser step, where the control asks for it."""
        norm = float(self.control.squared_norm(self.linear, homogeneous)) ** 0.5
        factor = self.control.rescaling(norm, self._slopes().high, self.tableau)
        if factor < 1:
            self.linear.weight.mul_(factor)  # type: ignore[operator, union-attr]

    def _apply(self, fn: Any, recurse: bool = True) -> GradientFlow:
        super()._apply(fn, recurse)
        with suppress(Refused):  # of weights that are not filled in yet
            self._unsettle()  # another precision has other weights
        return self

    def extra_repr(self) -> str:
        return f"method={self.tableau.name!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": None, "_seen": None, "_pinned": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with suppress(Refused):
            self._unsettle()  # a copy's parameters are others: it settles its own step


_Mark = tuple[object, int, object]
_PLAIN, _ROWS = (bool, int, float, str, Number), frozenset({tuple, list})


class _Seen:
    """What these modules, and other objects, are made of, as it is now, with what changes when it is written to; read without touching
    a device.

    The tensors and their memory are kept, since another might else take the place of one that is gone. Inference tensors have no count
    of their changes: theirs is never the same.
    """

    def __init__(self, *parts: object, but: Tensor | None = None) -> None:
        self.marks = _marks(parts, but)
        self.held = [thing.detach() for thing, _, _ in self.marks if isinstance(thing, Tensor)]

    def still(self, *parts: object, but: Tensor | None = None) -> bool:
        """Whether these are the same and unchanged."""
        now = _marks(parts, but)
        return len(now) == len(self.marks) and all(
            a is b and place == place_ and state == state_
            for (a, place, state), (b, place_, state_) in zip(now, self.marks, strict=True)
        )


def _marks(parts: Iterable[object], but: Tensor | None) -> list[_Mark]:
    marks: list[_Mark] = []
    for part in parts:
        if not isinstance(part, nn.Module):
            marks.append((part, 0, None))
            continue
        for module in part.modules():
            settings, tensors = list[object](), [*module._parameters.values(), *module._buffers.values()]
            for value in vars(module).values():
                if isinstance(value, Tensor):
                    tensors.append(value)
                elif isinstance(value, _PLAIN):
                    settings.append(value)
                elif type(value) in _ROWS and all(isinstance(entry, _PLAIN) for entry in value):  # as a stride
                    settings.append(tuple(value))
            marks.append((module, 0, settings))
            marks += [_mark(t) for t in tensors if t is not None and t is not but]
    return marks


def _mark(t: Tensor) -> _Mark:
    try:
        return t, t.data_ptr(), object() if t.is_inference() else t._version
    except RuntimeError:  # a tensor under a functional transform has no place
        return t, 0, object()


class _Pin:
    """The step of one call of a flow, for computing that call again."""

    def __init__(self, flow: GradientFlow) -> None:
        self.chosen = flow._chosen()
        self.parts = (flow.linear, flow.activation)
        self.seen = _Seen(*self.parts)

    def step(self) -> tuple[float | Tensor, int]:
        if not (torch.compiler.is_compiling() or self.seen.still(*self.parts)):
            raise RuntimeError(
                "a flow is to be computed again for the backward pass with other weights than before: they were changed in between, "
                "or a parametrization changes at each call. Run the backward pass first, or use Flows without recompute"
            )
        return self.chosen


class Flows(nn.ModuleList):
    """Gradient flows, or :class:`~nonexpansive.nn.resize.Lifted` ones, one after the other; each is given the noise level, if there is one.

    ``recompute``: keep only the input of each so many flows for the backward pass, and compute the rest again, with the same steps (0:
    keep all). What is kept falls to 1/(2·``recompute``), what is computed again needs memory in proportion to ``recompute``: in a chain
    of ten, 1 brings the peak of training to six tenths, 2 to below half (benchmarks/README.md). Both cost one more forward pass.

    Raises BadInput for another number, or modules of which it is not known how to compute them again: all but flows of linear layers and
    convolutions with padding by zeros.
    """

    def __init__(self, flows: Iterable[nn.Module] = (), recompute: int = 0) -> None:
        super().__init__(flows)
        if not isinstance(recompute, int) or recompute < 0:
            raise BadInput(
                f"recompute is the number of flows of which only one input is kept, from 0, not {recompute!r}"
            )
        self.recompute = int(recompute)
        for member in self if recompute else ():
            flow = _within(member)
            if not (isinstance(flow, GradientFlow) and is_written_out(flow.linear)):
                raise BadInput(
                    f"cannot recompute {member}: give Linear layers, or convolutions padded by zeros, in flows"
                )

    def forward(self, x: Tensor, *level: Tensor | float) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            for member in self:
                x = member(x, *level)
            return x
        pinned = [(member, _Pin(_within(member))) for member in self]
        for first in range(0, len(pinned), self.recompute):
            segment = pinned[first : first + self.recompute]
            x = checkpoint(partial(_again, segment), x, *level, use_reentrant=False)  # type: ignore[assignment]
        return x


def _within(member: nn.Module) -> Any:
    """The gradient flow of a member, where recomputing has been asked for."""
    return member.inner if isinstance(member, Lifted) else member


def _again(segment: list[tuple[nn.Module, _Pin]], x: Tensor, *level: Tensor | float) -> Tensor:
    for member, pin in segment:
        flow = _within(member)
        flow._pinned = pin
        try:
            x = member(x, *level)
        finally:
            flow._pinned = None
    return x


def _after_loading(module: GradientFlow, incompatible: object) -> None:
    module._unsettle()


def project(model: nn.Module) -> None:
    """Call after each optimiser step: every flow whose control constrains its weights brings them back to the constraint."""
    for module in model.modules():
        if isinstance(module, GradientFlow) and type(module.control).rescaling is not NormControl.rescaling:
            module.project()


# -------------------------------------------------------------------------------------------------------------- certificates

rule(ClippedRamps, LinearSpline, PooledRamps, SignedRamps, WeaklyConvexRamps)(elementwise)


@rule(Flows)
def _flows(module: Flows, shape: Shape, unit: float) -> Certificate:
    parts = [fold(flow, shape, unit) for flow in module]
    return chain(*parts, rule="Flows") if parts else isometry(shape, shape, "Flows, none", averaged=0.0)


@rule(GradientFlow)
def _flow(flow: GradientFlow, shape: Shape, unit: float) -> Certificate:
    if flow.training:
        raise Refused(
            "GradientFlow is in training mode, where its step follows an estimate: call .eval() before certifying"
        )
    require_out_of_place(flow.activation, "which a gradient flow uses again")
    slope, norm = flow._slopes(), sound_norm(flow.linear)
    h, n = flow.settle()
    alpha = _averagedness(flow, slope, norm, h)
    one = total = _step_enclosure(flow, shape, unit, norm, h)
    for _ in range(n - 1):
        error = one.error.of(total.computed) + total.error * one.norm.slope
        total = Enclosure(one.norm.of(total.norm), error, unit, total.entries)
    name = (
        f"GradientFlow: {n} × {flow.tableau.name}, h = {h:.6g}, ‖A‖ ≤ {above(norm)}, "
        f"slopes of σ in [{below(slope.low)}, {above(slope.high)}]"
    )
    return from_enclosure(
        total,
        lipschitz=total.norm.slope,
        averaged=compose_averaged(*[alpha] * n) if alpha < 1 else None,
        domain=shape,
        codomain=shape,
        rule=name if alpha <= 1 else f"{name}, not non-expansive: {'σ decreases' if slope.low < 0 else 'too long'}",
        assumptions=(*slope_assumptions(slope, unit), *_stated(flow.linear, norm)),
    )


def _averagedness(flow: GradientFlow, slope: Slopes, norm: float, h: float) -> float:
    """α of one step; above 1 where it is not known to be non-expansive."""
    if slope.low < 0:
        return math.inf
    smoothness = times(times(slope.high, norm), norm)
    return flow.tableau.averagedness(down(1 / smoothness), h) if smoothness else 0.0


def _stated(linear: nn.Module, norm: float) -> tuple[str, ...]:
    if is_torch(linear):
        return ()
    return (f"{name_of(linear)} is linear (with an offset) with ‖A‖ ≤ {above(norm)}, as its author states",)


_E = TypeVar("_E", Enclosure, Observed)


def linear_maps(linear: nn.Module, shape: Shape, norm: float, rounds: bool = True) -> tuple[LinearMap, LinearMap]:
    """x ↦ Ax + b for x of ``shape``, and s ↦ Aᵀs, with ‖A‖ ≤ ``norm``; the second follows samples that went through the first.

    ``rounds``: whether their rounding is asked for too.
    """
    middle = output_shape(linear, shape)
    absolute, (forward, adjoint) = (absolute_norm_bound(linear), terms(linear)) if rounds else (0.0, (0, 0))
    pullbacks: list[Pullback] = [torch.neg, torch.neg]

    def applied(place: int, to: Callable[[nn.Module, Tensor], tuple[Tensor, Pullback]]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            t, pullbacks[place] = to(linear, x)
            return t

        return run

    return (
        LinearMap(
            norm, absolute, forward, entries(middle), offset_norm(linear, shape, middle),
            applied(0, affine), applied(1, absolute_affine), chain_length(linear),
        ),
        LinearMap(
            norm, absolute, adjoint, entries(shape), 0.0, lambda s: pullbacks[0](s), lambda s: pullbacks[1](s)
        ),
    )  # fmt: skip


def _field(linear: nn.Module, activation: nn.Module, y: _E, shape: Shape, norm: float, h: float) -> _E:
    """hAᵀσ(Ay + b) for y of ``shape``: its size, and how far its computed value may be off."""
    forward, adjoint = linear_maps(linear, shape, norm, y.unit > 0)
    s = y.linear(forward).elementwise(slopes(activation), activation)
    out = s.linear(adjoint) * h
    # h is multiplied into the weights, which may underflow there
    underflow = s.computed * max(forward.terms, adjoint.terms)
    return out.rounded(underflow, 2 * TINY / y.unit) if y.unit else out  # pyright: ignore


def _step(flow: GradientFlow, x: _E, shape: Shape, norm: float, h: float) -> _E:
    """One step: its recurrence run on bounds instead of tensors."""
    stage = x
    slopes: list[_E] = []
    for theta, summands, _ in flow.tableau.recurrence:
        slopes.append(_field(flow.linear, flow.activation, stage, shape, norm, -h))
        if theta != 1:
            stage = x.lerp(stage, theta) if theta else x
        for j, weight in summands:
            stage = stage + slopes[j] * weight
    return stage


def _step_enclosure(flow: GradientFlow, shape: Shape, unit: float, norm: float, h: float) -> Enclosure:
    """The growth and the error of one step; the slope of its growth is its Lipschitz constant L: ‖T(x)‖ ≤ ‖T(0)‖ + L‖x‖.

    L = 1 for a step that is short enough. For one that is not, or if σ decreases, L is what the formula gives, a product and sum of
    the constants of its parts; for Euler's also the larger of 1 + hl‖A‖² and hL_σ‖A‖² - 1, with -l ≤ 0 the least slope of σ, as the
    derivative of I - h∇V lies between I - hL_σ‖A‖² and I + hl‖A‖².
    """
    out = _step(flow, Enclosure.input(unit, entries(shape)), shape, norm, h)
    slope, L = flow._slopes(), out.norm.slope
    if _averagedness(flow, slope, norm, h) <= 1:
        L = 1.0
    elif flow.tableau.stages == 1:
        rises, falls = (times(h, times(times(max(0.0, s), norm), norm)) for s in (-slope.low, slope.high))
        L = min(L, max(plus(1.0, rises), plus(falls, -1.0)))
    return Enclosure(Affine(L, out.norm.constant), out.error, unit, out.entries)


LIPSCHITZ = 1 + 2.0**-20
"""More than all that the float64 run of samples, and the sums of their bounds, add to a bound."""


def observe(flow: GradientFlow, x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """The flow at the samples x (N, *shape), run in float64, and bounds (N,) on how far the program of unit roundoff ``unit`` may
    be from the exact flow there.

    Several times less than the certificate's ``error`` at their sizes: rounding is bounded by what the samples are, ‖|A||x|‖ and
    ‖|A|ᵀ|s|‖, not by what samples of their sizes could be. As a function of x the bound has a Lipschitz constant of at most
    LIPSCHITZ times the certificate's ``error.slope``, since each size in it has the one that its bound there has. ``flow`` is in
    evaluation mode, in float64, and its linear layer torch's own.
    """
    shape, norm, (h, n) = tuple(x.shape[1:]), sound_norm(flow.linear), flow.step()
    one = _step_enclosure(flow, shape, unit, norm, h)
    total = x.new_zeros(len(x))
    for _ in range(n):
        # the program is given something that is up to ``total`` away from x
        stepped = _step(flow, Observed.input(x, unit), shape, norm, h)
        total = (one.norm.slope * total + stepped.apart + LIPSCHITZ * one.error.slope * total) * SLACK
        x = stepped.value
    return x, total


@rule(Resolvent)
def _resolvent(module: Resolvent, shape: Shape, unit: float) -> Certificate:
    """The proximal map of hV, as every σ that has slopes here is a gradient. 1/(2 + 2ν/h)-averaged if V is convex, else
    1/m-Lipschitz, as I + h∇V is m-strongly monotone. The solver returns y with a computed residual r = y + h∇V(y) - x of
    ‖r‖ ≤ m·tolerance·max(‖x‖, 1), so that its distance from the solution is at most 1/m times ‖r‖ and the rounding of r."""
    slope = slopes(module.activation)
    if module.training and (module.estimate is not None or slope.low < 0):
        raise Refused(
            "Resolvent is in training mode, where its step, or its solver's target, follows an estimate: call .eval() before certifying"
        )
    require_out_of_place(module.activation, "which the resolvent uses again")
    norm = sound_norm(module.linear)
    (m, _), h = module.curvature(norm), module.length(norm)
    convex = slope.low >= 0
    inverse = 1.0 if convex else up(1 / m)
    smoothness = times(times(slope.high, norm), norm)
    alpha = up(1 / (2 + 2 * down(down(1 / smoothness) / h))) if smoothness else 0.0
    exact = _field(module.linear, module.activation, Enclosure.input(0.0, entries(shape)), shape, norm, h)
    growth = Affine(inverse, times(inverse, exact.norm.constant))  # ‖T(0)‖ ≤ ‖h∇V(0)‖/m
    error = Affine(module.tolerance, times(module.tolerance, REFERENCE))
    if unit:
        # e(‖y‖) bounds 1/m times the rounding of r; with ‖y‖ ≤ growth + error it gives error·(1 - e.slope) ≤ tolerance + e(growth)
        y = Enclosure.input(unit, entries(shape))
        g = _field(module.linear, module.activation, y, shape, norm, h)
        e = g.rounded(Affine(2.0) + g.computed, 3).error * inverse
        if not e.slope < 0.5:
            raise Refused(
                "the rounding of the resolvent's residual is not bounded well enough: ask for exact arithmetic"
            )
        x_rounding = Affine(times(times(6, unit), inverse), 0.0)
        error = (error * 1.000001 + e.of(growth) + x_rounding) * up(1 / (1 - e.slope))
    certificate = from_enclosure(
        Enclosure(growth, error, unit, entries(shape)),
        lipschitz=inverse,
        averaged=alpha if convex else None,
        domain=shape,
        codomain=shape,
        rule=(
            f"Resolvent (implicit Euler), h = {h:.6g}, ‖A‖ ≤ {above(norm)}, "
            f"slopes of σ in [{below(slope.low)}, {above(slope.high)}]"
            + ("" if convex else f", V weakly convex, m ≥ {below(m)}")
        ),
        assumptions=(*slope_assumptions(slope, unit), *_stated(module.linear, norm)),
    )
    return replace(certificate, proximal=True)
