"""Certificates: what is proved about a module, as a value, folded over the modules that it is made of.

``certify(module, shape)`` returns a :class:`Certificate` for inputs of that shape (one sample, without the batch axis) or
raises :class:`~nonexpansive.errors.Refused`. A rule is registered for an exact type; a type without a rule, a subclass whose
forward may differ, a module with hooks: all are refused by name, never assumed harmless.

The algebra (Combettes & Yamada 2015, Prop. 2.5; Bauschke & Combettes, *Convex Analysis and Monotone Operator Theory*, §4):

- Lipschitz constants multiply: L(S∘T) ≤ L(S)·L(T).
- Averaged maps: with a = α/(1-α), a(S∘T) = a(S) + a(T), and α = a/(1+a). The identity has α = 0.
- L-Lipschitz with L < 1 is (1+L)/2-averaged.
- Relaxation (1-t)I + tT has α' = tα.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from nonexpansive.errors import Refused
from nonexpansive.math.enclosure import Affine, Enclosure, times
from nonexpansive.math.rounding import UNIT, up

Shape = tuple[int, ...]
Rule = Callable[[Any, Shape, float], "Certificate"]


@dataclass(frozen=True)
class Certificate:
    """What is proved about a map T on inputs of one shape.

    - ``lipschitz``: L with ‖T(x)-T(y)‖ ≤ L‖x-y‖ for all x, y, in the Euclidean norm over all entries of one sample.
    - ``averaged``: α in [0, 1) with ‖Tx-Ty‖² ≤ ‖x-y‖² - ((1-α)/α)‖(I-T)x-(I-T)y‖² (α = 0: T is a translation), or None.
    - ``domain``, ``codomain``: the shapes of input and output.
    - ``growth``: ‖T(x)‖ ≤ growth(‖x‖).
    - ``error``: the program's output is within error(‖x‖) of T(x), rounding (where asked for) and solver tolerances included.
    - ``rule``: what proved it; ``assumptions``: what was taken for granted; ``parts``: the certificates it was folded from.
    - ``arithmetic``: "exact", or the floating type whose rounding ``error`` accounts for.
    """

    lipschitz: float
    averaged: float | None
    domain: Shape
    codomain: Shape
    rule: str
    growth: Affine
    error: Affine = Affine()
    assumptions: tuple[str, ...] = ()
    parts: tuple[Certificate, ...] = ()
    arithmetic: str = "exact"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lipschitz) and self.lipschitz >= 0):
            raise Refused(f"{self.rule}: the Lipschitz bound {self.lipschitz} is not a finite number ≥ 0")
        if self.averaged is not None and not 0 <= self.averaged < 1:
            raise Refused(f"{self.rule}: α = {self.averaged} is not in [0, 1)")

    @property
    def nonexpansive(self) -> bool:
        """Whether L ≤ 1 is proved."""
        return self.lipschitz <= 1.0

    def then(self, after: Certificate) -> Certificate:
        """The certificate of x ↦ after(self(x))."""
        if after.domain != self.codomain:
            raise Refused(f"{self.rule} gives shape {self.codomain}, but {after.rule} was certified for {after.domain}")
        averaged = None
        if self.averaged is not None and after.averaged is not None:
            averaged = compose_averaged(self.averaged, after.averaged)
        lipschitz = times(self.lipschitz, after.lipschitz)
        return Certificate(
            lipschitz=1.0 if averaged is not None and lipschitz > 1.0 else lipschitz,
            averaged=averaged,
            domain=self.domain,
            codomain=after.codomain,
            rule="composition",
            growth=after.growth.of(self.growth),
            error=after.error.of(self.growth + self.error) + self.error * after.lipschitz,
            assumptions=tuple(dict.fromkeys(self.assumptions + after.assumptions)),
            arithmetic=self.arithmetic,
        ).sharpened()

    def sharpened(self) -> Certificate:
        """The same, with α ≤ (1+L)/2 used where L < 1 on one shape."""
        if self.lipschitz < 1.0 and self.domain == self.codomain:
            contraction = up((1 + self.lipschitz) / 2)
            if contraction < 1 and (self.averaged is None or contraction < self.averaged):
                return replace(self, averaged=contraction)
        return self

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Certificate]]:
        """This certificate and its parts, each with its depth in the tree."""
        yield depth, self
        for part in self.parts:
            yield from part.walk(depth + 1)

    def __str__(self) -> str:
        lines = []
        for depth, part in self.walk():
            alpha = "" if part.averaged is None else f"  α ≤ {_above(part.averaged)}"
            shapes = f"{_shape(part.domain)} → {_shape(part.codomain)}" if part.domain != part.codomain else _shape(part.domain)
            lines.append(f"{'  ' * depth}{part.rule}  [{shapes}]  L ≤ {_above(part.lipschitz)}{alpha}")
        if self.arithmetic != "exact" or self.error != Affine():
            lines.append(
                f"program: {self.arithmetic}, within {self.error.slope:.2g}·‖x‖ + {self.error.constant:.2g} of the exact map"
            )
        lines += [f"assumes: {text}" for text in self.assumptions]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values (strict JSON: no NaN, no infinities)."""
        return {
            "lipschitz": self.lipschitz,
            "averaged": self.averaged,
            "nonexpansive": self.nonexpansive,
            "domain": list(self.domain),
            "codomain": list(self.codomain),
            "rule": self.rule,
            "arithmetic": self.arithmetic,
            "growth": {"slope": self.growth.slope, "constant": self.growth.constant},
            "error": {"slope": self.error.slope, "constant": self.error.constant},
            "assumptions": list(self.assumptions),
            "parts": [part.to_json() for part in self.parts],
        }


def _above(x: float) -> str:
    """x with six decimals, rounded up, so that what is printed is a bound too."""
    return f"{math.ceil(x * 1e6) / 1e6:.6f}".rstrip("0").rstrip(".") if x < 1e6 else f"{x * (1 + 1e-6):.6g}"


def _shape(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"


def compose_averaged(*alphas: float) -> float | None:
    """α of a composition: with a_i = α_i/(1-α_i), α = Σa_i/(1 + Σa_i), rounded up; None where rounding reaches 1."""
    moving = [alpha for alpha in alphas if alpha > 0]
    if len(moving) < 2:
        return moving[0] if moving else 0.0
    total = 0.0
    for alpha in moving:
        total = up(total + up(alpha / (1 - alpha)))
    composed = up(total / (1 + total))
    return composed if composed < 1 else None


def split_averaged(alpha: float, count: int) -> float:
    """The α_i that each of ``count`` equal factors may have for their composition to be α-averaged."""
    if not 0 < alpha < 1:
        raise ValueError(f"α must lie strictly between 0 and 1, not {alpha}")
    a = alpha / (1 - alpha) / max(count, 1)
    return a / (1 + a)


# --------------------------------------------------------------------------------------------------------------- the fold

_RULES: dict[type[nn.Module], Rule] = {}
_M = TypeVar("_M", bound=nn.Module)


def rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register ``f(module, shape, unit) -> Certificate`` for exactly these types (subclasses are not covered).

    ``unit`` is the unit roundoff of the arithmetic that is certified, 0 for exact arithmetic.
    """

    def register(function: Rule) -> Rule:
        for type_ in types:
            _RULES[type_] = function
        return function

    return register


def certify(module: nn.Module, shape: Shape | torch.Size | list[int], *, arithmetic: torch.dtype | None = None) -> Certificate:
    """What is proved about ``module`` on inputs of ``shape`` (one sample, without the batch axis).

    ``arithmetic=None`` certifies the exact map with the parameters as they are stored. ``arithmetic=torch.float32`` certifies
    the program that runs in that type as well: ``Certificate.error`` then bounds its distance from the exact map.
    Norm bounds are computed anew from the weights at every call; nothing that is stored is trusted.

    Raises :class:`~nonexpansive.errors.Refused` for a module without a rule, with hooks, in training mode where that matters,
    or under reduced precision (autocast, TF32) when a floating type is asked for.
    """
    shape = tuple(int(n) for n in shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must be that of one sample, all entries at least 1, not {shape}")
    if arithmetic is None:
        return fold(module, shape, 0.0)
    if arithmetic not in UNIT:
        raise ValueError(f"arithmetic must be None (exact) or one of {sorted(map(str, UNIT))}, not {arithmetic}")
    _require_plain(module, arithmetic)
    certificate = fold(module, shape, UNIT[arithmetic])
    assumptions = (
        "sums of products in any order at the stated precision (no Winograd or FFT convolution, no overflow)",
        *certificate.assumptions,
    )
    return replace(certificate, arithmetic=str(arithmetic).removeprefix("torch."), assumptions=assumptions)


def fold(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """The certificate of one module: its type's rule applied, after a check that its forward is the type's own."""
    kind = _type(module)
    name = kind.__qualname__
    if kind not in _RULES:
        raise Refused(
            f"{name} has no certificate: no rule is registered for exactly this type. "
            f"Use modules that have one, or register your own proof with nonexpansive.rule({name})."
        )
    if "forward" in module.__dict__:
        raise Refused(f"{name} has a forward of its own on this instance; certificates hold for the type's forward alone")
    if any(getattr(module, hooks, None) for hooks in ("_forward_hooks", "_forward_pre_hooks")) or (
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    ):
        raise Refused(
            f"{name} has forward hooks, which may change what it computes. Remove them "
            "(for weight or spectral norm use torch.nn.utils.parametrizations instead of the hook-based versions)."
        )
    for parameter in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise Refused(f"{name} holds NaN or infinite numbers")
    return _RULES[kind](module, shape, unit).sharpened()


def _type(module: nn.Module) -> type[nn.Module]:
    """The module's type; before parametrization where torch replaced it."""
    return parametrize.type_before_parametrizations(module) if parametrize.is_parametrized(module) else type(module)


def _require_plain(module: nn.Module, arithmetic: torch.dtype) -> None:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    off = next((t.dtype for t in tensors if t.dtype != arithmetic and t.ndim > 0), None)
    if off is not None:
        raise Refused(f"a certificate for {arithmetic} was asked for, but the module holds {off}: call module.to({arithmetic})")
    devices = {t.device.type for t in tensors} | {"cpu"}
    for device in sorted(devices):
        if torch.is_autocast_enabled(device):
            raise Refused(
                f"autocast is on for {device}: the program runs in reduced precision, which this certificate does not cover. "
                "Certify and run outside torch.autocast, or ask for exact arithmetic."
            )
    if "cuda" in devices and arithmetic == torch.float32:
        if torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32:
            raise Refused(
                "TF32 is allowed, so float32 convolutions round their inputs to 11 bits. Set torch.backends.cudnn.allow_tf32 "
                "= False and torch.backends.cuda.matmul.allow_tf32 = False, or ask for exact arithmetic."
            )


def chain(first: Certificate, *rest: Certificate, rule: str) -> Certificate:
    """The composition of certificates in the order in which the maps are applied, as one certificate with parts."""
    total = first
    for part in rest:
        total = total.then(part)
    return replace(total, rule=rule, parts=(first, *rest))


def from_enclosure(
    out: Enclosure,
    *,
    lipschitz: float,
    averaged: float | None,
    domain: Shape,
    codomain: Shape,
    rule: str,
    assumptions: tuple[str, ...] = (),
    parts: tuple[Certificate, ...] = (),
) -> Certificate:
    """A certificate whose growth and error were obtained by running the map's formula on enclosures."""
    return Certificate(lipschitz, averaged, domain, codomain, rule, out.norm, out.error, assumptions, parts)


def isometry(domain: Shape, codomain: Shape, rule: str, averaged: float | None = None) -> Certificate:
    """A map that only moves numbers about: L = 1, nothing rounded."""
    return Certificate(1.0, averaged, domain, codomain, rule, Affine(1.0))


def relaxed(inner: Certificate, t: float, unit: float) -> Certificate:
    """(1-t)I + tT for t in (0, 1/α]: α' = tα, and L ≤ |1-t| + tL in any case."""
    if inner.domain != inner.codomain:
        raise Refused(f"relaxation needs a map into its own space, not {inner.domain} → {inner.codomain}")
    if t < 0:
        raise Refused(f"relaxation by t = {t}: t must be at least 0")
    averaged = None
    if inner.averaged is not None and up(t * inner.averaged) < 1:
        averaged = up(t * inner.averaged) if t != 1 else inner.averaged
    x = Enclosure.input(unit)
    out = x * (1 - t) + Enclosure(inner.growth, inner.error, unit) * t
    lipschitz = 1.0 if averaged is not None and inner.lipschitz >= 1 else up(abs(1 - t) + up(t * inner.lipschitz))
    return from_enclosure(
        out,
        lipschitz=lipschitz,
        averaged=averaged,
        domain=inner.domain,
        codomain=inner.codomain,
        rule=f"relaxation (1-t)I + tT, t = {t:g}",
        assumptions=inner.assumptions,
        parts=(inner,),
    ).sharpened()
