"""Certificates: what is proved about a module, as a value, folded over the modules that it is made of.

``certify(module, shape)`` returns a :class:`Certificate` for inputs of that shape (one sample, without the batch axis) or
raises :class:`~nonexpansive.errors.Refused`. A rule is registered for an exact type; a type without a rule, a subclass whose
forward may differ, a module with hooks: all are refused by name, never assumed harmless.

The algebra (Combettes & Yamada 2015, Prop. 2.5; Bauschke & Combettes, *Convex Analysis and Monotone Operator Theory*, §4):

- Lipschitz constants multiply: L(S∘T) ≤ L(S)·L(T).
- Averaged maps: with a = α/(1-α), a(S∘T) = a(S) + a(T), and α = a/(1+a). The identity has α = 0.
- L-Lipschitz with L < 1 is (1+L)/2-averaged.
- Relaxation (1-t)I + tT has α' = tα; with a T that is merely non-expansive, and t < 1, it is t-averaged.
- T is the proximal map of a (1 - 1/L)-weakly convex function if and only if it is the gradient of a convex, L-smooth one (Moreau 1965;
  Gribonval & Nikolova 2020, arXiv:1904.03880). Hence so is PTP* for ‖P‖ ≤ 1, of φ∘P*; so are its translations; compositions need not be.
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
from nonexpansive.math.bounds import unreadable
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.rounding import UNIT, above, plus, times, up

Shape = tuple[int, ...]
Rule = Callable[[Any, Shape, float], "Certificate"]


@dataclass(frozen=True)
class Certificate:
    """What is proved about a map T on inputs of one shape.

    - ``lipschitz``: L with ‖T(x)-T(y)‖ ≤ L‖x-y‖ for all x, y, in the Euclidean norm over all entries of one sample.
    - ``averaged``: α in [0, 1) with ‖Tx-Ty‖² ≤ ‖x-y‖² - ((1-α)/α)‖(I-T)x-(I-T)y‖² (α = 0: T is a translation), or None.
    - ``proximal``: whether T is the proximal map of a function that is (1 - 1/L)-weakly convex (convex if L ≤ 1).
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
    proximal: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lipschitz) and self.lipschitz >= 0):
            raise Refused(f"{self.rule}: the Lipschitz bound {self.lipschitz} is not a finite number ≥ 0")
        if self.averaged is not None and not 0 <= self.averaged < 1:
            raise Refused(f"{self.rule}: α = {self.averaged} is not in [0, 1)")
        if self.averaged is not None and self.domain != self.codomain:
            raise Refused(f"{self.rule}: a map {self.domain} → {self.codomain} cannot be averaged")
        bounds = (self.growth.slope, self.growth.constant, self.error.slope, self.error.constant)
        if not all(math.isfinite(bound) and bound >= 0 for bound in bounds):
            raise Refused(
                f"{self.rule}: the bounds on size and error, {self.growth} and {self.error}, are not finite: "
                "the weights are not numbers, or so large that float64 does not hold their products"
            )

    @property
    def nonexpansive(self) -> bool:
        """Whether L ≤ 1 is proved."""
        return self.lipschitz <= 1.0

    def then(self, after: Certificate) -> Certificate:
        """The certificate of x ↦ after(self(x))."""
        if after.domain != self.codomain:
            raise Refused(f"{self.rule} gives shape {self.codomain}, but {after.rule} was certified for {after.domain}")
        both = self.averaged is not None and after.averaged is not None
        lipschitz = times(self.lipschitz, after.lipschitz)
        return Certificate(
            lipschitz=min(1.0, lipschitz) if both else lipschitz,
            averaged=compose_averaged(self.averaged, after.averaged) if both else None,  # type: ignore[arg-type]
            domain=self.domain,
            codomain=after.codomain,
            rule="composition",
            growth=after.growth.of(self.growth),
            error=after.error.of(self.growth + self.error) + self.error * after.lipschitz,
            assumptions=tuple(dict.fromkeys(self.assumptions + after.assumptions)),
            arithmetic=self.arithmetic,
        ).sharpened()

    def sharpened(self) -> Certificate:
        """The same, with what follows from L: ‖T(x)‖ ≤ ‖T(0)‖ + L‖x‖, and α ≤ (1+L)/2 where L < 1 on one shape."""
        averaged, growth = self.averaged, Affine(min(self.growth.slope, self.lipschitz), self.growth.constant)
        if self.lipschitz < 1.0 and self.domain == self.codomain:
            contraction = up((1 + self.lipschitz) / 2)
            if contraction < 1 and (averaged is None or contraction < averaged):
                averaged = contraction
        return replace(self, averaged=averaged, growth=growth)

    def plain(self) -> Certificate:
        """The same without what a subclass adds: a map that is made of an iteration need not inherit what is proved of that."""
        return Certificate(**{name: getattr(self, name) for name in Certificate.__dataclass_fields__})

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Certificate]]:
        """This certificate and its parts, each with its depth in the tree."""
        yield depth, self
        for part in self.parts:
            yield from part.walk(depth + 1)

    def __str__(self) -> str:
        lines = []
        for depth, part in self.walk():
            alpha = "" if part.averaged is None else f"  α ≤ {above(part.averaged)}"
            alpha += "  prox" if part.proximal else ""
            shapes = _shape(part.domain) + (f" → {_shape(part.codomain)}" if part.domain != part.codomain else "")
            lines.append(f"{'  ' * depth}{part.rule}  [{shapes}]  L ≤ {above(part.lipschitz)}{alpha}")
        if self.arithmetic != "exact" or self.error != Affine():
            slope, constant = above(self.error.slope, 2), above(self.error.constant, 2)
            lines.append(f"program: {self.arithmetic}, within {slope}·‖x‖ + {constant} of the exact map")
        lines += [f"assumes: {text}" for text in self.assumptions]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values (strict JSON: no NaN, no infinities)."""
        return {
            "lipschitz": self.lipschitz,
            "averaged": self.averaged,
            "nonexpansive": self.nonexpansive,
            "proximal": self.proximal,
            "domain": list(self.domain),
            "codomain": list(self.codomain),
            "rule": self.rule,
            "arithmetic": self.arithmetic,
            "growth": {"slope": self.growth.slope, "constant": self.growth.constant},
            "error": {"slope": self.error.slope, "constant": self.error.constant},
            "assumptions": list(self.assumptions),
            "parts": [part.to_json() for part in self.parts],
        }


def _shape(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"


def compose_averaged(*alphas: float) -> float | None:
    """α of a composition: with a_i = α_i/(1-α_i), α = Σa_i/(1 + Σa_i), rounded up; None where rounding reaches 1."""
    moving = [alpha for alpha in alphas if alpha > 0]
    if len(moving) < 2:
        return moving[0] if moving else 0.0
    total = 0.0
    for alpha in moving:
        total = plus(total, up(alpha / (1 - alpha)))
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
_FORWARDS: dict[type[nn.Module], object] = {}
"""What each type's forward was when its rule was registered."""

_M = TypeVar("_M", bound=nn.Module)


def rule(*types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register ``f(module, shape, unit) -> Certificate`` for exactly these types (subclasses are not covered).

    ``unit`` is the unit roundoff of the arithmetic that is certified, 0 for exact arithmetic. What is certified must treat
    the samples of a batch alike and apart, and must not overwrite its input, which whatever contains it may use again.
    """

    def register(function: Rule) -> Rule:
        for type_ in types:
            _RULES[type_], _FORWARDS[type_] = function, type_.forward
        return function

    return register


def certify(
    module: nn.Module, shape: Shape | torch.Size | list[int], *, arithmetic: torch.dtype | None = None
) -> Certificate:
    """What is proved about ``module`` on inputs of ``shape`` (one sample, without the batch axis).

    ``arithmetic=None`` certifies the exact map with the parameters as they are stored. ``arithmetic=torch.float32`` (or
    float64) certifies the program that runs in that type as well: ``Certificate.error`` then bounds its distance from the
    exact map. Norm bounds are computed anew from the weights; nothing that is stored is trusted.

    Raises :class:`~nonexpansive.errors.Refused` for a module without a rule, with hooks, in training mode where that matters,
    or under reduced precision (autocast, TF32) when a floating type is asked for; ValueError for a shape that is none.
    """
    shape = tuple(int(n) for n in shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must be that of one sample, all entries at least 1, not {shape}")
    if arithmetic is None:
        return fold(module, shape, 0.0)
    if arithmetic not in (torch.float32, torch.float64):
        raise Refused(
            f"rounding is bounded for torch.float32 and torch.float64, not for {arithmetic}, whose range or precision is too "
            "small for that: ask for exact arithmetic (arithmetic=None)"
        )
    _require_plain(module, arithmetic)
    certificate = fold(module, shape, UNIT[arithmetic])
    assumptions = (
        "sums of products in any order at the stated precision (no Winograd or FFT convolution), gradual underflow, no overflow",
        *certificate.assumptions,
    )
    return replace(certificate, arithmetic=str(arithmetic).removeprefix("torch."), assumptions=assumptions)


def fold(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """The certificate of one module: its type's rule applied, after a check that its forward is the type's own."""
    kind = parametrize.type_before_parametrizations(module)
    if kind not in _RULES:
        name = kind.__qualname__
        raise Refused(
            f"{name} has no certificate: no rule is registered for exactly this type. "
            f"Use modules that have one, or register your own proof with nonexpansive.rule({name})."
        )
    if kind.forward is not _FORWARDS[kind]:
        raise Refused(f"the forward of {kind.__qualname__} was replaced after its rule had been registered: undo that")
    _require_unaltered(module)
    return _RULES[kind](module, shape, unit).sharpened()


def require_out_of_place(module: nn.Module, why: str) -> None:
    """Raises Refused if anything in ``module`` may overwrite its input."""
    culprit = next((child for child in module.modules() if getattr(child, "inplace", False)), None)
    if culprit is not None:
        raise Refused(f"{culprit} overwrites its input, {why}: set inplace=False")


def _require_unaltered(module: nn.Module) -> None:
    """That the module and all in it compute what their types say, from numbers that are finite."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise Refused("global forward hooks are registered, which may change what any module computes: remove them")
    for child in module.modules():
        name = type(child).__qualname__
        own = next((key for key in vars(child) if callable(getattr(type(child), key, None))), None)
        if parametrize.is_parametrized(child):  # torch makes a class for it, which adds properties and no methods
            methods = (key for key, value in vars(type(child)).items() if callable(value) and not key.startswith("__"))
            own = own or next(methods, None)
        if own is not None:
            raise Refused(f"{name} has a {own} of its own on this instance; certificates hold for the type's alone")
        if child._compiled_call_impl is not None:
            raise Refused(f"{name} was compiled in place: certify it before .compile()")
        if child._forward_hooks or child._forward_pre_hooks:
            raise Refused(
                f"{name} has forward hooks, which may change what it computes. Remove them "
                "(for weight or spectral norm use torch.nn.utils.parametrizations instead of the hook-based versions)."
            )
        if parametrize.is_parametrized(child) and any(p.training for p in child.parametrizations.modules()):  # type: ignore
            raise Refused(f"{name} has a parametrization in training mode, where its weights may change: call .eval()")
        for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
            if (found := unreadable(tensor)) is not None:
                raise Refused(f"{name} holds a tensor that is {found}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise Refused(f"{name} holds NaN or infinite numbers")


def _require_plain(module: nn.Module, arithmetic: torch.dtype) -> None:
    """That the module's arithmetic is the one asked for."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    off = next((t.dtype for t in tensors if t.dtype != arithmetic and t.ndim > 0), None)
    if off is not None:
        raise Refused(
            f"a certificate for {arithmetic} was asked for, but the module holds {off}: call .to({arithmetic})"
        )
    devices = {t.device.type for t in tensors} | {"cpu"}
    for device in sorted(devices):
        if torch.is_autocast_enabled(device):
            raise Refused(
                f"autocast is on for {device}: the program runs in reduced precision, which this certificate does not cover. "
                "Certify and run outside torch.autocast, or ask for exact arithmetic."
            )
    if arithmetic == torch.float32 and (setting := _reduced_precision(devices)):
        raise Refused(
            f"float32 products may be computed in a smaller type: {setting}. Turn that off (torch.set_float32_matmul_precision"
            "('highest'), torch.backends.cudnn.allow_tf32 = False), or ask for exact arithmetic."
        )


def _reduced_precision(devices: set[str]) -> str | None:
    """The setting of torch by which float32 products are not float32, if there is one."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError as error:  # of settings old and new that do not agree
        return str(error)
    if precision != "highest":
        return f"torch.get_float32_matmul_precision() is {precision!r}"
    for kind in ("matmul", "conv"):  # absent from older versions, which have no such setting on a CPU
        chosen = getattr(getattr(torch.backends.mkldnn, kind, None), "fp32_precision", "none")
        if chosen not in ("none", "ieee"):
            return f"torch.backends.mkldnn.{kind}.fp32_precision is {chosen!r}"
    if "cuda" in devices and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        return "TF32 is allowed"
    return None


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


def entries(shape: Shape) -> int:
    """How many numbers a sample of that shape holds."""
    return math.prod(shape)


def relaxed(inner: Certificate, t: float, unit: float) -> Certificate:
    """(1-t)I + tT, t ≥ 0: α' = tα where that is below 1 (α = 1 for a T that is non-expansive), and L ≤ |1-t| + tL in any case.

    For t ≤ 1 it is proximal if T is: the gradient of a convex function, as a sum of two such.
    """
    if inner.domain != inner.codomain:
        raise Refused(f"relaxation needs a map into its own space, not {inner.domain} → {inner.codomain}")
    if not t >= 0:
        raise Refused(f"relaxation by t = {t}: t must be at least 0")
    alpha = inner.averaged if inner.averaged is not None else 1.0 if inner.nonexpansive else math.inf
    averaged = times(t, alpha) if t else 0.0
    lipschitz = plus(up(abs(1 - t)), times(t, inner.lipschitz))
    size = entries(inner.domain)
    out = Enclosure.input(unit, size).lerp(Enclosure(inner.growth, inner.error, unit, size), t)
    certificate = from_enclosure(
        out,
        lipschitz=min(1.0, lipschitz) if averaged <= 1 else lipschitz,
        averaged=averaged if averaged < 1 else None,
        domain=inner.domain,
        codomain=inner.codomain,
        rule=f"relaxation (1-t)I + tT, t = {t:g}",
        assumptions=inner.assumptions,
        parts=(inner,),
    )
    return replace(certificate, proximal=inner.proximal and t <= 1).sharpened()
