"""Elementwise activations and the range of their slopes.

Inside a gradient-flow block ẋ = -Aᵀσ(Ax + b) the activation σ must be non-decreasing, and its Lipschitz constant L_σ
sets the step; anywhere else only the Lipschitz constant matters. Both are read off one interval: (σ(s) - σ(t))/(s - t)
lies in [low, high] for all s ≠ t. An activation that is not registered is refused, never assumed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.rounding import UNIT, up

TRANSCENDENTAL = 8.0
"""Assumed accuracy of computed exp, tanh, erf, log1p and what is built of a few of them, in units of roundoff. Vector
maths libraries state 1 to 2 units in the last place, that is 2 to 4 of roundoff, per function."""


@dataclass(frozen=True)
class Slopes:
    """Bounds on an elementwise function σ: all difference quotients lie in [``low``, ``high``].

    A computed value misses σ(t) by at most ulps·u·(|t| + scale) + absolute, with u the unit roundoff; ``scale`` is also
    a bound on |σ(0)|. ``ulps`` is infinite where no such bound is known. ``assumption`` says what the bound rests on.
    Raises ValueError unless low ≤ high are finite and the rest is not negative.
    """

    low: float
    high: float
    ulps: float = math.inf
    scale: float = 0.0
    absolute: float = 0.0
    assumption: str = ""

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise ValueError(f"slopes need finite bounds low ≤ high, not [{self.low}, {self.high}]")
        if not (self.ulps >= 0 and self.scale >= 0 and self.absolute >= 0):
            raise ValueError(f"rounding bounds cannot be negative: {self}")

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant max(|low|, |high|)."""
        return max(abs(self.low), abs(self.high))


def _library(low: float, high: float, scale: float = 0.0, absolute: float = 0.0, note: str = "") -> Slopes:
    ulps = TRANSCENDENTAL * max(1.0, abs(low), abs(high))
    return Slopes(low, high, ulps, scale, absolute, "elementary functions accurate to 4 units in the last place" + note)


def _leaky_relu(module: nn.LeakyReLU) -> Slopes:
    slope = float(module.negative_slope)
    return Slopes(min(slope, 1.0), max(slope, 1.0), ulps=2 * max(1.0, abs(slope)))


def _prelu(module: nn.PReLU) -> Slopes:
    weight = module.weight.detach()
    low, high = float(weight.min()), float(weight.max())
    return Slopes(min(low, 1.0), max(high, 1.0), ulps=2 * max(1.0, abs(low), abs(high)))


def _elu(module: nn.ELU) -> Slopes:
    alpha = float(module.alpha)  # slopes αe^t for t < 0 and 1 for t > 0
    return _library(min(0.0, alpha), max(1.0, alpha))


def _celu(module: nn.CELU) -> Slopes:
    if not module.alpha > 0:
        raise Refused(f"{module}: the slope e^(t/α) for t < 0 is unbounded unless α > 0")
    return _library(0.0, 1.0)


def _softplus(module: nn.Softplus) -> Slopes:
    # PyTorch returns t itself where βt > threshold, which is below softplus(t) by at most jump: not even continuous.
    # Certified is the smooth function, and the jump is an error; tolerated only while float32 rounding could hide it.
    beta, threshold = float(module.beta), float(module.threshold)
    if not beta > 0:
        raise Refused(f"{module}: softplus needs β > 0")
    jump = up(math.log1p(math.exp(-max(threshold, 0.0))) / beta)
    # PyTorch's float32 exp(βt) stays finite up to βt = 88, beyond it this threshold would let infinities through.
    if threshold > 88 or jump > threshold / beta * UNIT[torch.float32]:
        raise Refused(
            f"{module}: jumps by {jump:.2g} where it switches to the identity, so it has no Lipschitz constant:"
            " leave the threshold at its default of 20 (at least 15, at most 88)"
        )
    return _library(
        0.0, 1.0, up(math.log(2) / beta), jump, f", softplus without its switch to the identity ({jump:.2g} off)"
    )


def _hardtanh(module: nn.Hardtanh) -> Slopes:
    return Slopes(0.0, 1.0, ulps=1, scale=abs(min(max(0.0, module.min_val), module.max_val)))


def _threshold(module: nn.Threshold) -> Slopes:
    if module.value != module.threshold:
        raise Refused(f"{module}: jumps at {module.threshold} and is no Lipschitz function unless value = threshold")
    return Slopes(0.0, 1.0, ulps=1, scale=max(0.0, float(module.value)))


def _hardshrink(module: nn.Hardshrink) -> Slopes:
    if module.lambd > 0:
        raise Refused(f"{module}: jumps at ±{module.lambd} and is no Lipschitz function: use nn.Softshrink")
    return Slopes(1.0, 1.0, ulps=0)


def _gelu(module: nn.GELU) -> Slopes:
    # Φ(t) + tφ(t) is extremal at t = ±√2, 1/2 ± 0.62891; for the tanh form, by grid, 1/2 ± 0.62900.
    bound = 0.6290 if module.approximate == "none" else 0.6291
    return _library(0.5 - bound, 0.5 + bound)


_RULES: dict[type[nn.Module], Callable[..., Slopes]] = {
    nn.Identity: lambda m: Slopes(1.0, 1.0, ulps=0),
    nn.ReLU: lambda m: Slopes(0.0, 1.0, ulps=0),
    nn.ReLU6: lambda m: Slopes(0.0, 1.0, ulps=0),
    nn.LeakyReLU: _leaky_relu,
    nn.PReLU: _prelu,
    nn.ELU: _elu,
    nn.CELU: _celu,
    nn.SELU: lambda m: _library(0.0, up(1.0507009873554805 * 1.6732632423543772)),
    nn.Tanh: lambda m: _library(0.0, 1.0),
    nn.Sigmoid: lambda m: _library(0.0, 0.25, scale=0.5),
    nn.LogSigmoid: lambda m: _library(0.0, 1.0, scale=up(math.log(2))),
    nn.Softplus: _softplus,
    nn.Softsign: lambda m: Slopes(0.0, 1.0, ulps=3),
    nn.Softshrink: lambda m: Slopes(0.0, 1.0, ulps=2),
    nn.Tanhshrink: lambda m: _library(0.0, 1.0),
    nn.Hardtanh: _hardtanh,
    nn.Hardsigmoid: lambda m: Slopes(0.0, up(1 / 6), ulps=4, scale=0.5),
    nn.Hardshrink: _hardshrink,
    nn.Threshold: _threshold,
    # Not monotone, so never inside a flow block, but Lipschitz: the extreme slopes, with a margin.
    nn.GELU: _gelu,
    nn.SiLU: lambda m: _library(-0.0999, 1.0999),
    nn.Mish: lambda m: _library(-0.1126, 1.0885),
    nn.Hardswish: lambda m: Slopes(-0.5, 1.5, ulps=8),
}

REGISTERED: tuple[type[nn.Module], ...] = tuple(_RULES)
"""PyTorch's activations that have a rule here."""

_NAMES: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "log_sigmoid": nn.LogSigmoid,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "softshrink": nn.Softshrink,
    "tanhshrink": nn.Tanhshrink,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}


def register_activation(cls: type[nn.Module], rule: Callable[..., Slopes]) -> None:
    """Teaches ``slopes`` an elementwise activation class (this exact class, not its subclasses): ``rule(module)``
    returns the ``Slopes`` that hold for every input."""
    _RULES[cls] = rule


def speaks_of(cls: type, method: str) -> bool:
    """Whether the class has a method that speaks of its forward: one that overrides forward alone computes something else."""
    return method in vars(next((c for c in cls.__mro__ if method in vars(c) or "forward" in vars(c)), nn.Module))


def slopes(module: nn.Module) -> Slopes:
    """The range of σ's slopes, for a registered activation (by exact class) or a module with a method
    ``slope_range()`` that returns ``(low, high)`` or ``Slopes``.

    Raises Refused if the module is neither, or has no Lipschitz constant.
    """
    cls = type_before_parametrizations(module)
    if cls in _RULES:
        return _RULES[cls](module)
    if speaks_of(cls, "slope_range"):
        bounds: Any = module.slope_range()  # type: ignore[operator]
        return bounds if isinstance(bounds, Slopes) else Slopes(float(bounds[0]), float(bounds[1]))
    raise Refused(
        f"{cls.__name__} is no known elementwise activation: give the module a method slope_range() -> (low, high) that"
        " bounds its slopes, or register its class with register_activation"
    )


def monotone(module: nn.Module) -> Slopes:
    """``slopes(module)`` for an activation inside a flow block. Raises Refused if it decreases anywhere."""
    bounds = slopes(module)
    if bounds.low < 0:
        raise Refused(
            f"{module} decreases (its slope reaches {bounds.low:.4g}), so -Aᵀσ(Ax + b) is no gradient flow of a convex"
            " function and no step of it is known to be non-expansive: use a non-decreasing activation such as ReLU"
        )
    return bounds


def activation(name: str | nn.Module) -> nn.Module:
    """An activation by name ("relu", "leaky_relu", ...) with PyTorch's defaults; a module is returned as it is.

    Raises BadInput, listing the names and the closest ones, where there is none of that name.
    """
    if isinstance(name, nn.Module):
        return name
    key = name.strip().lower().replace("-", "_")
    if key in _NAMES:
        return _NAMES[key]()
    close = difflib.get_close_matches(key, _NAMES, n=2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise BadInput(f"no activation is called {name!r}.{hint} Known: {', '.join(_NAMES)}")
