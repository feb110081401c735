"""The block that everything stands on: Runge-Kutta steps of a gradient flow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.activation import activation as find_activation
from nonexpansive.math.activation import monotone
from nonexpansive.math.bounds import absolute_norm_bound, terms
from nonexpansive.math.certificate import Certificate, Shape, compose_averaged, from_enclosure, rule
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.integrate import integrate
from nonexpansive.math.rounding import up
from nonexpansive.math.rules import output_shape, slope_assumptions
from nonexpansive.math.tableau import ButcherTableau, tableau
from nonexpansive.nn.control import NormControl, sound_norm
from nonexpansive.nn.control import control as find_control
from nonexpansive.nn.linear import affine, homogeneous, probe_shape


class GradientFlow(nn.Module):
    """n Runge-Kutta steps of size h of the gradient flow ẋ = -Aᵀσ(Ax + b): a non-expansive, or α-averaged, residual block.

    The right-hand side is -∇V of the convex V(x) = 1ᵀγ(Ax + b), γ' = σ, which is L_σ‖A‖²-smooth; so a step with
    h ≤ 2r/(L_σ‖A‖²) of a method with contractivity radius r is non-expansive (Sherry et al. 2024; Dahlquist & Jeltsch 1979).
    Maps (B, *shape) to (B, *shape).

    - ``linear``: A and b, any ``torch.nn.Linear`` or ``ConvNd`` (every padding mode, stride, groups, dilation), possibly
      parametrized, or a module of your own that is linear and has a method ``norm_bound(shape) -> float``.
    - ``activation``: σ, elementwise and non-decreasing, by name or as a module; anything else is refused.
    - ``method``: a Runge-Kutta method by name or a :class:`ButcherTableau`; those with radius 0 are refused.
    - ``control``: how the constraint is kept ("maximal", "adaptive", "rescale" or a :class:`NormControl`), with ``alpha`` the
      wanted averagedness (default 1: non-expansive).
    - ``shape``: the shape of one input, needed only for a linear module of your own.
    - ``recompute``: keep only x for the backward pass and compute the rest again, which halves the memory of training.

    In training mode the step follows an estimate of ‖A‖. In evaluation mode it follows a sound bound, computed when
    ``eval()`` is called, when weights are loaded, and whenever the weights are seen to have changed.

    Raises Refused if σ may decrease, the method's radius is 0 or the linear layer has no norm bound.
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
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.activation = find_activation(activation)
        monotone(self.activation)
        self.tableau = tableau(method)
        self.tableau.require_usable()
        if not self.tableau.explicit:
            raise Refused(f"{self.tableau.name} is implicit: use nonexpansive.nn.Resolvent for the implicit Euler step")
        self.control = find_control(control, alpha)
        self.control.attach(linear, probe_shape(linear, shape))
        self.recompute = recompute
        self._settled: tuple[Any, float, int] | None = None
        self._steepest = monotone(self.activation).high  # L_σ for training, where reading it from the device at each step would stall
        self.register_load_state_dict_post_hook(_after_loading)

    # ------------------------------------------------------------------------------------------------------------- stepping

    def step(self) -> tuple[float, int]:
        """(h, n) of evaluation mode: the size of the steps and their number, from a sound bound on ‖A‖."""
        key = None if torch.compiler.is_compiling() else _versions(self)
        if self._settled is None or (key is not None and key != self._settled[0]):
            h, n = self.control.safe_step(sound_norm(self.linear), monotone(self.activation).high, self.tableau)
            self._settled = (key, h, n)
        return self._settled[1:]

    def train(self, mode: bool = True) -> GradientFlow:
        super().train(mode)
        self._settled, self._steepest = None, monotone(self.activation).high
        if not mode:
            self.step()
        return self

    def forward(self, x: Tensor, *level: Tensor | float) -> Tensor:
        """x (B, *shape) → (B, *shape); ``level`` is passed on to an activation that takes a noise level."""
        if self.training:
            squared = self.control.squared_norm(self.linear, homogeneous)
            h, n = self.control.training_step(squared, self._steepest, self.tableau)
        else:
            h, n = self.step()
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._integrate, x, h, n, *level, use_reentrant=False)  # type: ignore[return-value]
        return self._integrate(x, h, n, *level)

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
        factor = self.control.rescaling(norm, monotone(self.activation).high, self.tableau)
        if factor < 1:
            weight = dict(self.linear.named_parameters(recurse=False)).get("weight")
            if weight is None:
                raise Refused(f"the rescale control needs a plain weight, which {type(self.linear).__name__} does not have")
            weight.mul_(factor)

    def _apply(self, fn: Any, recurse: bool = True) -> GradientFlow:
        self._settled = None  # another precision has other weights
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"method={self.tableau.name!r}" + (", recompute=True" if self.recompute else "")

    def __getstate__(self) -> dict[str, Any]:
        # a copy's parameters are others: it settles its own step
        return {**self.__dict__, "_settled": None}


def _versions(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """What changes when a parameter is replaced or written to; read without touching its device."""
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in module.parameters())


def _after_loading(module: GradientFlow, incompatible: object) -> None:
    module._settled = None
    if not module.training:
        module.step()


def project(model: nn.Module) -> None:
    """Call after each optimiser step: every flow whose control constrains its weights brings them back to the constraint."""
    for module in model.modules():
        if isinstance(module, GradientFlow) and type(module.control).rescaling is not NormControl.rescaling:
            module.project()


# -------------------------------------------------------------------------------------------------------------- certificate


@rule(GradientFlow)
def _certify(flow: GradientFlow, shape: Shape, unit: float) -> Certificate:
    if flow.training:
        raise Refused("GradientFlow is in training mode, where its step follows an estimate: call .eval() before certifying")
    slope = monotone(flow.activation)
    norm = sound_norm(flow.linear)
    h, n = flow.step()
    middle = output_shape(flow.linear, shape)
    smoothness = up(up(slope.high * norm) * norm)
    if smoothness == 0 or h == 0:
        alpha, lipschitz = 0.0, 1.0
    else:
        nu = 1 / smoothness * (1 - 2.0**-51)
        alpha = flow.tableau.averagedness(nu, h)
        if alpha > 1 and flow.tableau.name != "euler":
            raise Refused(
                f"the step h = {h:g} of {flow.tableau.name} exceeds 2νr = {flow.tableau.max_step(nu):g}: call .eval() again, so "
                "that it is chosen anew for the weights as they are"
            )
        # a Euler step of an L-smooth convex potential that is too long: I - h∇V has slopes in [1 - hL, 1]
        lipschitz = 1.0 if alpha <= 1 else up(up(h * smoothness) - 1)
    averaged = compose_averaged(*[alpha] * n) if alpha < 1 else None
    one = total = _enclose(flow, shape, middle, unit, norm, h, lipschitz)
    for _ in range(n - 1):
        total = Enclosure(one.norm.of(total.norm), one.error.of(total.computed) + total.error * lipschitz, unit)
    certificate = from_enclosure(
        total,
        lipschitz=lipschitz if n == 1 or lipschitz == 1 else up(lipschitz**n * (1 + 1e-12)),
        averaged=averaged,
        domain=shape,
        codomain=shape,
        rule=f"GradientFlow: {n} × {flow.tableau.name}, h = {h:.6g}, ‖A‖ ≤ {norm:.6g}, slopes of σ in [{slope.low:g}, {slope.high:g}]",
        assumptions=slope_assumptions(slope, unit),
    )
    if callable(getattr(flow.linear, "norm_bound", None)):
        stated = f"{type(flow.linear).__name__} is linear with ‖A‖ ≤ {norm:g}, as its author states"
        certificate = replace(certificate, assumptions=(*certificate.assumptions, stated))
    return certificate


def _enclose(
    flow: GradientFlow, shape: Shape, middle: Shape, unit: float, norm: float, h: float, lipschitz: float
) -> Enclosure:
    """The growth and the error of one step: its recurrence run on enclosures instead of tensors."""
    slope = monotone(flow.activation)
    absolute, (forward_terms, adjoint_terms) = (absolute_norm_bound(flow.linear), terms(flow.linear)) if unit else (0.0, (0, 0))
    entries = math.prod(middle)
    positions = entries // (middle[0] if len(middle) > 1 else entries)
    bias = getattr(flow.linear, "bias", None)
    offset = 0.0 if bias is None else up(float(bias.detach().double().norm()) * (1 + 1e-12) * up(positions**0.5))

    def field(y: Enclosure) -> Enclosure:
        t = y.linear(norm, absolute, forward_terms, entries, offset).elementwise(slope, entries)
        return t.linear(norm, absolute, adjoint_terms, math.prod(shape)) * h

    x = stage = Enclosure.input(unit)
    slopes: list[Enclosure] = []
    for theta, summands, _ in flow.tableau.recurrence:
        slopes.append(field(stage))
        if theta == 0:
            stage = x
        elif theta != 1:
            stage = (x * (1 - theta) + stage * theta).rounded(x.computed + stage.computed, 4)
        for j, weight in summands:
            stage = stage + slopes[j] * weight
    # the exact step is L-Lipschitz, which bounds its growth better than its formula: ‖T(x)‖ ≤ ‖T(0)‖ + L‖x‖
    return Enclosure(Affine(lipschitz, stage.norm.constant), stage.error, unit)
