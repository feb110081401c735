"""Condat-Vu's primal-dual iteration, averaged in a norm of its own."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    compose_averaged,
    entries,
    fold,
    require_out_of_place,
    rule,
)
from nonexpansive.math.enclosure import Affine
from nonexpansive.math.rounding import above, below, down, euclidean, plus, times, up
from nonexpansive.restore.iterate import Iteration, Renormed
from nonexpansive.restore.likelihood import GAUSSIAN, Likelihood
from nonexpansive.restore.splitting import require_firm
from nonexpansive.restore.steps import Box, DataTerm, GradientStep, OfData


class Dual(Protocol):
    """A convex h behind a linear K, from (B, *image_shape) to (B, *shape): ``norm`` ≥ ‖K‖, and prox_{σh*}."""

    @property
    def shape(self) -> Shape: ...
    @property
    def norm(self) -> float: ...

    def K(self, x: Tensor) -> Tensor: ...
    def K_adjoint(self, u: Tensor) -> Tensor: ...
    def conjugate(self, u: Tensor, sigma: float) -> Tensor: ...
    def zero(self) -> Tensor:
        """u = 0, for each of the data that h depends on."""
        ...

    def stated(self, shape: Shape, unit: float) -> tuple[str, ...]:
        """What is taken on trust; Refused where that is not enough."""
        ...


class DualOfData(OfData):
    """h = φ(·; y), the data term of any likelihood, behind K = A: neither its gradient nor a proximal map of f is needed."""

    def __init__(self, data: DataTerm, y: Tensor, likelihood: Likelihood = GAUSSIAN) -> None:
        super().__init__(data, y)
        self.likelihood = likelihood

    @property
    def shape(self) -> Shape:
        return tuple(self.data.data_shape)

    @property
    def norm(self) -> float:
        return self.data.norm

    def K(self, x: Tensor) -> Tensor:
        return self.data.A(x)

    def K_adjoint(self, u: Tensor) -> Tensor:
        return self.data.A_adjoint(u)

    def conjugate(self, u: Tensor, sigma: float) -> Tensor:
        return self.likelihood.conjugate(u, self.y, sigma)

    def zero(self) -> Tensor:
        return torch.zeros_like(self.y)

    def stated(self, shape: Shape, unit: float) -> tuple[str, ...]:
        if not 0 <= self.data.norm < math.inf:
            raise Refused(f"the forward model states ‖A‖ ≤ {self.data.norm}, which is no bound")
        return super().stated(shape, unit)


class DualOfBox(nn.Module):
    """h = 0 on the box [low, high]ⁿ, ∞ outside, behind K = I: the constraint x ∈ [low, high]ⁿ."""

    norm = 1.0

    def __init__(self, box: Box, shape: Shape) -> None:
        super().__init__()
        self.box, self.shape = box, tuple(shape)

    def K(self, x: Tensor) -> Tensor:
        return x

    def K_adjoint(self, u: Tensor) -> Tensor:
        return u

    def conjugate(self, u: Tensor, sigma: float) -> Tensor:
        return u - sigma * self.box(u / sigma)

    def zero(self) -> Tensor:
        return torch.zeros(1, *self.shape)

    def stated(self, shape: Shape, unit: float) -> tuple[str, ...]:
        return ()


class PrimalDual(Iteration, nn.Module):
    """Condat-Vu: x⁺ = D(x - τ∇f(x) - τKᵀu), u⁺ = prox_{σh*}(u + σK(2x⁺ - x)), for h convex behind a linear K; f may be left out.

    **What is proved.** A firmly non-expansive D on the whole space *is* the resolvent of a maximally monotone M/τ-scaled operator,
    D = (I + τM)⁻¹ (Minty 1962): that it be a gradient is not needed (Vu 2013). In the product space, with
    P = [[I/τ, -Kᵀ], [-K, I/σ]], the iteration is z⁺ = (I + P⁻¹B)⁻¹(I - P⁻¹C)z with B = (M + Kᵀu, ∂h* - Kx) maximally monotone and
    C = (∇f, 0). In ⟨·, P·⟩ the resolvent is ½-averaged; P⁻¹C is ω/L_f-cocoercive with ω = 1/τ - σ‖K‖², since ‖(P⁻¹)_{xx}‖ ≤ 1/ω; so
    the forward step is L_f/(2ω)-averaged for ω > L_f/2, and T is averaged **in the norm of P**, not in the Euclidean one.

    The state (B, n + m) holds x and w = √(τ/σ)u, flattened. In these coordinates τP is I less an operator of norm θ = √(τσ)‖K‖ < 1:
    ‖z‖_P² = ‖x‖² + ‖w‖² - 2√(τσ)⟨Kx, w⟩ is between 1 - θ and 1 + θ times the Euclidean square. ``norm`` is that norm, in which
    ``fixed_point`` checks the residuals. Assumed, not proved: that a fixed point exists, and what the forward model states of itself.

    ``smooth``: the gradient step of f, whose τ must be this one; ``sigma``: by default nearly the largest that is proved.
    """

    method = "primal-dual"

    def __init__(
        self,
        denoiser: nn.Module,
        dual: Dual,
        image_shape: Shape,
        tau: float,
        sigma: float | None = None,
        smooth: GradientStep | None = None,
    ) -> None:
        super().__init__()
        if not 0 < tau < math.inf or (sigma is not None and not 0 < sigma < math.inf):
            raise Refused(f"the steps τ and σ must be finite numbers above 0, not {tau} and {sigma}")
        if smooth is not None and smooth.tau != tau:
            raise BadInput(f"the gradient step has τ = {smooth.tau}, the primal-dual iteration {tau}: they must be one")
        self.denoiser, self.dual, self.smooth = denoiser, dual, smooth
        self.image_shape, self.tau = tuple(image_shape), float(tau)
        self.sigma = self.largest(0.99) if sigma is None else float(sigma)

    def largest(self, share: float) -> float:
        """σ such that τσ‖K‖² is that share of what is allowed (1 where nothing is)."""
        allowed = 1 - self.tau * self.smoothness() / 2
        return share * allowed / (self.tau * self.dual.norm**2) if allowed > 0 and self.dual.norm > 0 else 1.0

    def smoothness(self) -> float:
        return 0.0 if self.smooth is None else self.smooth.smoothness()

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, *image_shape) and w (B, *K's shape)."""
        n = entries(self.image_shape)
        return state[:, :n].unflatten(1, self.image_shape), state[:, n:].unflatten(1, self.dual.shape)

    def forward(self, state: Tensor) -> Tensor:
        x, w = self.split(state)
        ratio = (self.sigma / self.tau) ** 0.5
        u = w * ratio
        stepped = x if self.smooth is None else self.smooth(x)
        ahead = self.denoiser(torch.sub(stepped, self.dual.K_adjoint(u), alpha=self.tau))
        u = self.dual.conjugate(torch.add(u, self.dual.K(2 * ahead - x), alpha=self.sigma), self.sigma)
        return torch.cat([ahead.flatten(1), u.flatten(1) / ratio], dim=1)

    def begin(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1), x.new_zeros(len(x), entries(self.dual.shape))], dim=1)

    def picture(self, state: Tensor) -> Tensor:
        return self.split(state)[0]

    def state_shape(self, shape: Shape) -> Shape:
        return (entries(shape) + entries(self.dual.shape),)

    def norm(self, state: Tensor) -> Tensor:
        x, w = self.split(state)
        cross = (self.dual.K(x) * w).flatten(1).sum(1)
        square = state.square().sum(1) - 2 * (self.tau * self.sigma) ** 0.5 * cross
        return square.clamp_min(0).sqrt()

    def extra_repr(self) -> str:
        return f"tau={self.tau:.6g}, sigma={self.sigma:.6g}"


@rule(PrimalDual)
def _primal_dual(module: PrimalDual, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module, "which primal-dual uses again")
    state = module.state_shape(module.image_shape)
    if tuple(shape) != state:
        raise Refused(f"the state of this primal-dual iteration has shape {state}, not {tuple(shape)}")
    if unit:
        raise Refused("the rounding of the primal-dual iteration is not bounded: ask for exact arithmetic")
    tau, sigma, norm = module.tau, module.sigma, module.dual.norm
    stated = module.dual.stated(module.image_shape, unit)
    denoiser = fold(module.denoiser, module.image_shape, unit)
    require_firm(denoiser, "denoiser", "primal-dual", "so that it is the resolvent of a monotone operator")
    parts = (denoiser,)
    smoothness = module.smoothness()
    coupling = up(times(times(tau, sigma), times(norm, norm)))  # θ²
    forward = times(tau, smoothness) / 2
    share = up(forward / down(1 - coupling)) if coupling < 1 else math.inf  # L_f/(2ω), α of the forward step
    if not share < 1:
        nearest = (
            f"σ ≤ {below(module.largest(0.99), 4)}"
            if forward < 1
            else f"τ ≤ {below(1 / smoothness, 4)}, with the σ that goes with it"
        )
        raise Refused(
            f"primal-dual needs τσ‖K‖² + τL_f/2 < 1, here it is {above(plus(coupling, forward))} (‖K‖ ≤ {above(norm)}, "
            f"L_f ≤ {above(smoothness)}). The nearest setting that is proved: {nearest}."
        )
    averaged = compose_averaged(0.5, share)
    if averaged is None:
        raise Refused("primal-dual: the steps are so long that α cannot be told from 1: take a smaller τ or σ")
    step, assumptions = Affine(1.0), (*stated, *denoiser.assumptions)
    if module.smooth is not None:
        smooth = fold(module.smooth, module.image_shape, unit)
        parts, step, assumptions = (smooth, denoiser), smooth.growth, (*assumptions, *smooth.assumptions)
    theta = up(coupling**0.5)
    lipschitz = up((up(1 + theta) / down(1 - theta)) ** 0.5)
    twice = plus(1.0, times(2.0, theta))  # what x⁺ adds to w⁺, and itself
    rest = times(up((tau / sigma) ** 0.5), euclidean(module.dual.conjugate(module.dual.zero(), sigma)))
    offset = plus(times(twice, denoiser.growth(step.constant)), rest)
    return Renormed(
        lipschitz,
        None,
        state,
        state,
        f"primal-dual iteration (Condat-Vu): τ = {tau:.6g}, σ = {sigma:.6g}, ‖K‖ ≤ {above(norm)}",
        Affine(lipschitz, offset),
        denoiser.error.of(step + Affine(theta)) * twice,
        tuple(dict.fromkeys((*assumptions, "a fixed point exists"))),
        parts,
        renormed=averaged,
        metric=f"‖x‖² + ‖w‖² - 2√(τσ)⟨Kx, w⟩, w = √(τ/σ)u, within 1 ± {above(theta)} of the Euclidean square",
    )
