"""Maps that change the shape, or the strength, and what they do to a certificate."""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    entries,
    fold,
    from_enclosure,
    relaxed,
    require_out_of_place,
    rule,
)
from nonexpansive.math.enclosure import Enclosure
from nonexpansive.math.rounding import plus


class Lifted(nn.Module):
    """x ↦ P T(P*x) with the isometry P*: pixel-unshuffle by ``factor``, zeros up to ``channels`` channels; P is its adjoint.

    PP* = I, so T and PTP* have the same α (and L). An image whose sides ``factor`` does not divide is bordered by zeros below and
    at the right, which is an isometry too. (B, C, H, W) → (B, C, H, W); T maps (B, channels, ⌈H/factor⌉, ⌈W/factor⌉) to the same.
    """

    def __init__(self, inner: nn.Module, channels: int, factor: int = 1) -> None:
        super().__init__()
        if channels < 1 or factor < 1:
            raise BadInput(f"channels and factor must be at least 1, not {channels} and {factor}")
        self.inner, self.channels, self.factor = inner, channels, factor

    def forward(self, x: Tensor, *level: Tensor | float, **others: Tensor) -> Tensor:
        """``others``: images that T takes by name, lifted as x is."""
        lifted = {name: self.lift(other) for name, other in others.items()}
        return self.project(self.inner(self.lift(x), *level, **lifted), x.shape)

    def lift(self, x: Tensor) -> Tensor:
        """P*x."""
        f = self.factor
        border = (-x.shape[-2] % f, -x.shape[-1] % f)
        if any(border):
            x = F.pad(x, (0, border[1], 0, border[0]))
        x = F.pixel_unshuffle(x, f) if f > 1 else x
        if x.shape[1] > self.channels:
            raise BadInput(f"an image of {x.shape[1]} channels (after unshuffling) does not fit into {self.channels}")
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def project(self, x: Tensor, shape: Shape) -> Tensor:
        """Px, an image of ``shape`` (B, C, H, W)."""
        f = self.factor
        x = x[:, : shape[1] * f * f]
        x = F.pixel_shuffle(x, f) if f > 1 else x
        return x[..., : shape[-2], : shape[-1]]

    def inner_shape(self, shape: Shape) -> Shape:
        """The shape of P*x for one x of ``shape`` (C, H, W)."""
        if len(shape) != 3 or shape[0] * self.factor**2 > self.channels:
            raise Refused(
                f"Lifted to {self.channels} channels by factor {self.factor} does not take a sample of shape {shape}"
            )
        return (self.channels, -(-shape[1] // self.factor), -(-shape[2] // self.factor))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, factor={self.factor}"


@rule(Lifted)
def _lifted(module: Lifted, shape: Shape, unit: float) -> Certificate:
    inner = fold(module.inner, module.inner_shape(shape), unit)
    if inner.codomain != inner.domain:
        raise Refused(f"Lifted needs an inner map into its own space, not {inner.domain} → {inner.codomain}")
    return replace(inner.plain(), domain=shape, codomain=shape, rule="Lifted: PTP* with an isometry P*", parts=(inner,))


class Scale(nn.Module):
    """x ↦ factor·x, ‖·‖ = |factor|: brings a pooling of norm below 1 (2x2 averages: 1/2, the mean of n: 1/√n) to norm 1."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


@rule(Scale)
def _scale(module: Scale, shape: Shape, unit: float) -> Certificate:
    c = module.factor
    averaged = plus(1.0, -c) / 2 if -1 < c <= 1 else None
    out = Enclosure.input(unit, entries(shape)) * c
    return from_enclosure(
        out, lipschitz=abs(c), averaged=averaged, domain=shape, codomain=shape, rule=f"Scale by {c:g}"
    )


class Relaxed(nn.Module):
    """x ↦ (1-t)x + tT(x): α' = tα, so any averaged T is brought to any α wanted."""

    def __init__(self, inner: nn.Module, t: float) -> None:
        super().__init__()
        if not 0 <= t < math.inf:
            raise BadInput(f"the relaxation t must be a finite number from 0, not {t}")
        self.inner, self.t = inner, float(t)

    def forward(self, x: Tensor, *level: Tensor | float) -> Tensor:
        return x.lerp(self.inner(x, *level), self.t)

    def extra_repr(self) -> str:
        return f"t={self.t:g}"


@rule(Relaxed)
def _relaxed(module: Relaxed, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module.inner, "which Relaxed uses again")
    return relaxed(fold(module.inner, shape, unit), module.t, unit)


class Residual(nn.Module):
    """x ↦ x + F(x), the ordinary residual block: only L ≤ 1 + L_F holds, so depth multiplies to exponential growth."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@rule(Residual)
def _residual(module: Residual, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module.inner, "which Residual uses again")
    return residual(fold(module.inner, shape, unit), unit)


def residual(inner: Certificate, unit: float) -> Certificate:
    """x + F(x), of the certificate of F: L ≤ 1 + L_F, and nothing more."""
    if inner.codomain != inner.domain:
        raise Refused(f"Residual needs an inner map into its own space, not {inner.domain} → {inner.codomain}")
    size = entries(inner.domain)
    return from_enclosure(
        Enclosure.input(unit, size) + Enclosure(inner.growth, inner.error, unit, size),
        lipschitz=plus(1.0, inner.lipschitz),
        averaged=None,
        domain=inner.domain,
        codomain=inner.domain,
        rule="Residual: L ≤ 1 + L_F",
        assumptions=inner.assumptions,
        parts=(inner,),
    )
