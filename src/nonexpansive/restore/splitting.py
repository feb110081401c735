"""Splittings as modules: an iteration x ↦ T(x) that has a certificate before it runs.

The data term is f(x) = ½‖Ax - y‖², convex and L_f-smooth with L_f = ‖A‖²; the prior is a denoiser D at a fixed noise level. Each
splitting is a chain of small maps with known averagedness, so that its own α is composed, never assumed (theory: Bauschke &
Combettes, *Convex Analysis and Monotone Operator Theory in Hilbert Spaces*; Combettes & Yamada 2015, arXiv:1407.5100):

- gradient step I - τ∇f with τ < 2/L_f: α = τL_f/2;   proximal step prox_{τf}: α = 1/2;   projection on [0,1]ⁿ: α = 1/2;
- forward-backward D∘(I - τ∇f); half-quadratic D∘prox_{τf}; Douglas-Rachford ½I + ½(2prox_{τf} - I)(2D - I).

If T is averaged and has a fixed point, x_{k+1} = T(x_k) converges to one and ‖x_{k+1} - x_k‖ never increases. On a bounded set one
exists (Brouwer): ``box=True`` ends T with the projection on [0,1]ⁿ.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    chain,
    entries,
    fold,
    from_enclosure,
    require_out_of_place,
    rule,
)
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.rounding import above, below, euclidean, times, up


class DataTerm(Protocol):
    """A linear forward model A, from pictures (B, *image_shape) to data (B, *data_shape).

    - ``norm``: a sound bound on ‖A‖; ``lipschitz``: norm², rounded up.
    - ``A``, ``A_adjoint``: A and its exact adjoint.
    - ``prox(z, y, tau)``: argmin_x ½‖Ax - y‖² + ‖x - z‖²/(2τ) in closed form; raises Refused where there is none.
    - ``start(y)``: a picture to begin from.
    """

    @property
    def image_shape(self) -> Shape: ...
    @property
    def data_shape(self) -> Shape: ...
    @property
    def norm(self) -> float: ...
    @property
    def lipschitz(self) -> float: ...

    def A(self, x: Tensor) -> Tensor: ...
    def A_adjoint(self, y: Tensor) -> Tensor: ...
    def prox(self, z: Tensor, y: Tensor, tau: float) -> Tensor: ...
    def start(self, y: Tensor) -> Tensor: ...


class AtLevel(nn.Module):
    """x ↦ D(x, σ): a denoiser at one noise level σ, in the unit of the image."""

    def __init__(self, denoiser: nn.Module, sigma: float) -> None:
        super().__init__()
        self.denoiser, self.sigma = denoiser, float(sigma)

    def forward(self, x: Tensor) -> Tensor:
        return self.denoiser(x, self.sigma)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:.6g}"


@rule(AtLevel)
def _at_level(module: AtLevel, shape: Shape, unit: float) -> Certificate:
    if not 0 <= module.sigma <= 1:
        raise Refused(f"the denoiser's certificate holds for noise levels in [0, 1], not {module.sigma:g}")
    return fold(module.denoiser, shape, unit)


class _OfData(nn.Module):
    """A map that depends on the data y (B, *data_shape), its forward model, and a step τ > 0."""

    y: Tensor

    def __init__(self, data: DataTerm, y: Tensor, tau: float) -> None:
        super().__init__()
        if not 0 < tau < math.inf:
            raise Refused(f"the step τ must be a finite number above 0, not {tau:g}")
        self.data, self.tau = data, float(tau)
        self.register_buffer("y", y, persistent=False)

    def extra_repr(self) -> str:
        return f"tau={self.tau:.6g}"

    def proved(self, shape: Shape, unit: float, alpha: float, name: str, *assumptions: str) -> Certificate:
        """An α-averaged map of ‖T(0)‖ ≤ τ‖A‖‖y‖, as both steps are. Refused for another shape than the forward model's, and for
        a bound on the rounding, which is not known for a foreign model."""
        if tuple(shape) != tuple(self.data.image_shape):
            raise Refused(
                f"the forward model is for images of shape {tuple(self.data.image_shape)}, not {tuple(shape)}"
            )
        if unit:
            raise Refused(
                "the rounding of the forward model (an FFT of another library) is not bounded: ask for exact arithmetic"
            )
        if not 0 <= self.data.lipschitz < math.inf:
            raise Refused(f"the forward model states ‖A‖² ≤ {self.data.lipschitz}, which is no bound")
        if not bool(torch.isfinite(self.y).all()):
            raise Refused("the data y hold NaN or infinite numbers")
        offset = times(times(self.tau, up(self.data.lipschitz**0.5)), euclidean(self.y))
        stated = f"{type(self.data).__name__}: A is linear with ‖A‖² ≤ {above(self.data.lipschitz)} and A_adjoint is its adjoint"
        return Certificate(1.0, alpha, shape, shape, name, Affine(1.0, offset), assumptions=(stated, *assumptions))


class GradientStep(_OfData):
    """x ↦ x - τAᵀ(Ax - y): τL_f/2-averaged for 0 < τ < 2/L_f."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(x, self.data.A_adjoint(self.data.A(x) - self.y), alpha=self.tau)


@rule(GradientStep)
def _gradient_step(module: GradientStep, shape: Shape, unit: float) -> Certificate:
    smoothness = module.data.lipschitz
    alpha = times(module.tau, smoothness) / 2
    if not alpha < 1:
        raise Refused(
            f"the gradient step is not averaged: τ = {module.tau:g}, but τ < 2/L_f = {below(2 / smoothness)} is needed. "
            f"The nearest setting that is proved: τ ≤ {below(1.99 / smoothness, 4)}."
        )
    name = f"GradientStep of the data term: L_f ≤ {above(smoothness)}, τ = {module.tau:.6g}"
    return module.proved(shape, unit, alpha, name)


class ProximalStep(_OfData):
    """x ↦ prox_{τf}(x) = argmin_z ½‖Az - y‖² + ‖z - x‖²/(2τ): firmly non-expansive for any τ > 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.data.prox(x, self.y, self.tau)


@rule(ProximalStep)
def _proximal_step(module: ProximalStep, shape: Shape, unit: float) -> Certificate:
    name = f"ProximalStep of the data term, τ = {module.tau:.6g}"
    return module.proved(shape, unit, 0.5, name, "the proximal map is solved exactly")


class Box(nn.Module):
    """x ↦ the nearest point of [0,1]ⁿ: a projection, firmly non-expansive."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1)


@rule(Box)
def _box(module: Box, shape: Shape, unit: float) -> Certificate:
    return Certificate(1.0, 0.5, shape, shape, "Box: projection on [0, 1]", Affine(1.0))


class Splitting(nn.Sequential):
    """A chain of averaged maps: one step of an iteration, called by the name of its method."""

    method = "splitting"


class ForwardBackward(Splitting):
    """D∘(I - τ∇f)."""

    method = "forward-backward"


class HalfQuadratic(Splitting):
    """D∘prox_{τf}, parameters fixed: half-quadratic splitting, read after the denoiser rather than after the data step."""

    method = "half-quadratic"


@rule(ForwardBackward, HalfQuadratic)
def _splitting(module: Splitting, shape: Shape, unit: float) -> Certificate:
    if not len(module):
        raise Refused(f"{module.method}: it has no factors")
    certificate = chain(*(fold(part, shape, unit) for part in module), rule=f"{module.method} iteration")
    if certificate.averaged is None:
        raise Refused(f"{module.method}: a factor is not averaged, so convergence is not proved:\n{certificate}")
    return certificate


class DouglasRachford(nn.Module):
    """x ↦ ½x + ½(2prox_{τf} - I)(2D - I)(x): ½-averaged if D is α-averaged with α ≤ ½. The restoration is D at the fixed point."""

    method = "Douglas-Rachford"

    def __init__(self, denoiser: nn.Module, proximal: ProximalStep) -> None:
        super().__init__()
        self.denoiser, self.proximal = denoiser, proximal

    def forward(self, x: Tensor) -> Tensor:
        denoised = self.denoiser(x)
        return x + self.proximal(2 * denoised - x) - denoised


@rule(DouglasRachford)
def _douglas_rachford(module: DouglasRachford, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module, "which Douglas-Rachford uses again")
    denoiser, proximal = fold(module.denoiser, shape, unit), fold(module.proximal, shape, unit)
    for map, which in ((denoiser, "denoiser"), (proximal, "proximal map")):
        if map.averaged is None or map.averaged > 0.5:
            alpha = "unknown" if map.averaged is None else above(map.averaged)
            remedy = (
                ""
                if map.averaged is None
                else (
                    f" Relax it: Relaxed({which}, t={below(0.5 / map.averaged)}) has α ≤ 1/2, or use forward-backward."
                )
            )
            raise Refused(
                f"Douglas-Rachford needs a {which} with α ≤ 1/2, so that twice it less the identity is non-expansive; "
                f"its α is {alpha}.{remedy}"
            )
    x = Enclosure.input(unit, entries(shape))
    d = Enclosure(denoiser.growth, denoiser.error, unit, x.entries)
    reflected = d * 2 + x
    p = Enclosure(
        proximal.growth.of(reflected.norm), proximal.error.of(reflected.computed) + reflected.error, unit, x.entries
    )
    # the iteration is non-expansive, which bounds its growth better than its formula
    out = replace(x + p + d, norm=Affine(1.0, (x + p + d).norm.constant))
    return from_enclosure(
        out,
        lipschitz=1.0,
        averaged=0.5,
        domain=shape,
        codomain=shape,
        rule="Douglas-Rachford iteration: ½I + ½(reflection)(reflection)",
        assumptions=tuple(dict.fromkeys(denoiser.assumptions + proximal.assumptions)),
        parts=(denoiser, proximal),
    )


def splitting(
    method: str, denoiser: nn.Module, data: DataTerm, y: Tensor, *, sigma: float, tau: float, box: bool = False
) -> nn.Module:
    """The iteration T of a method ("forward-backward", "half-quadratic", "douglas-rachford") for data y and a denoiser at level σ.

    ``box`` ends each step with the projection on [0, 1]ⁿ, which guarantees a fixed point (not for Douglas-Rachford, whose
    iterates are no pictures). Raises BadInput for a method that there is not.
    """
    prior = AtLevel(denoiser, sigma)
    end = [Box()] if box else []
    if method == "forward-backward":
        return ForwardBackward(GradientStep(data, y, tau), prior, *end)
    if method == "half-quadratic":
        return HalfQuadratic(ProximalStep(data, y, tau), prior, *end)
    if method == "douglas-rachford":
        if box:
            raise BadInput(
                "douglas-rachford iterates on a shadow of the picture, which may not be projected on [0, 1]: box=False"
            )
        return DouglasRachford(prior, ProximalStep(data, y, tau))
    raise BadInput(f"no splitting {method!r}: there are forward-backward, half-quadratic and douglas-rachford")


__all__ = [
    "AtLevel",
    "Box",
    "DataTerm",
    "DouglasRachford",
    "ForwardBackward",
    "GradientStep",
    "HalfQuadratic",
    "ProximalStep",
    "splitting",
]
