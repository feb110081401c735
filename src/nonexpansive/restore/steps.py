"""What iterations are made of: the denoiser at a level and a strength, steps on the data, the projection on a box."""

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
    entries,
    fold,
    rule,
)
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.rounding import above, below, euclidean, root, times, up
from nonexpansive.nn.resize import Relaxed
from nonexpansive.restore.likelihood import GAUSSIAN, Likelihood


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

    def forward(self, x: Tensor, near: Tensor | None = None) -> Tensor:
        """``near``: a picture that D(x, σ) is expected to be near, for a D that is ``solved`` for and can begin there."""
        if near is None or not getattr(self.denoiser, "solved", False):
            return self.denoiser(x, self.sigma)
        return self.denoiser(x, self.sigma, near)

    def regulariser(self, x: Tensor) -> Tensor | None:
        """R of D = prox_R, (B,), where D can tell."""
        evaluate = getattr(self.denoiser, "regulariser", None)
        return None if evaluate is None else evaluate(x, self.sigma)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:.6g}"


@rule(AtLevel)
def _at_level(module: AtLevel, shape: Shape, unit: float) -> Certificate:
    if not 0 <= module.sigma <= 1:
        raise Refused(
            f"the denoiser's certificate holds for noise levels in [0, 1], not {module.sigma:g}: state a smaller one (sigma=, --level)"
        )
    return fold(module.denoiser, shape, unit)


class Rescaled(nn.Module):
    """x ↦ μ⁻¹D(μx), input scaling: the same α and L, but a denoiser made for noise of σ₀ then acts on noise of σ₀/μ."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        if not 0 < factor < math.inf:
            raise BadInput(f"the input scaling μ must be a finite number above 0, not {factor}")
        self.inner, self.factor = inner, float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.factor) / self.factor

    def regulariser(self, x: Tensor) -> Tensor | None:
        """μ⁻²R(μx), where D can tell: D' = μ⁻¹prox_R(μ·) is its proximal map."""
        evaluate = getattr(self.inner, "regulariser", lambda x: None)
        inner = evaluate(x * self.factor)
        return None if inner is None else inner / self.factor**2

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


@rule(Rescaled)
def _rescaled(module: Rescaled, shape: Shape, unit: float) -> Certificate:
    inner, size, mu = fold(module.inner, shape, unit), entries(shape), module.factor
    x = Enclosure.input(unit, size) * mu
    y = Enclosure(inner.growth.of(x.norm), inner.error.of(x.computed) + x.error * inner.lipschitz, unit, size)
    out = y * up(1 / mu)
    # as a function of ‖x‖: the slopes of D, its constants over μ
    growth = Affine(inner.growth.slope, times(inner.growth.constant, up(1 / mu)))
    error = out.error if unit else Affine(inner.error.slope, times(inner.error.constant, up(1 / mu)))
    name = f"Rescaled: μ⁻¹D(μx), μ = {mu:g}"
    return replace(inner, growth=growth, error=error, rule=name, parts=(inner,))


def prior(denoiser: nn.Module, sigma: float, *, strength: float = 1.0, scaling: float = 1.0) -> nn.Module:
    """D at the noise level σ, its strength set: by σ itself where D has a level, by ``scaling`` μ⁻¹D(μx) (noise of σ/μ) for a D
    that has none, and by ``strength`` t: (1-t)I + tD, of averagedness tα; above 1 it overshoots, as far as tα < 1."""
    module: nn.Module = AtLevel(denoiser, sigma)
    module = module if scaling == 1 else Rescaled(module, scaling)
    return module if strength == 1 else Relaxed(module, strength)


# ------------------------------------------------------------------------------------------------------------ steps on the data


class OfData(nn.Module):
    """What depends on data y, (B, *data_shape) or (1, *data_shape), and their forward model."""

    y: Tensor

    def __init__(self, data: DataTerm, y: Tensor) -> None:
        super().__init__()
        if tuple(y.shape[1:]) != tuple(data.data_shape):
            raise BadInput(
                f"the forward model gives data of shape {tuple(data.data_shape)}, but y is {tuple(y.shape)} with its batch"
            )
        self.data = data
        self.register_buffer("y", y, persistent=False)

    def stated(self, shape: Shape, unit: float) -> tuple[str, ...]:
        """What is taken on trust of the forward model. Refused for another shape than its own, for a bound on the rounding, which is
        not known for a foreign model, for no bound on ‖A‖, and for data that are not numbers."""
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
        stated = f"{type(self.data).__name__}: A is linear with ‖A‖² ≤ {above(self.data.lipschitz)} and A_adjoint is its adjoint"
        return (stated,)


class _Step(OfData):
    """With a step τ > 0."""

    def __init__(self, data: DataTerm, y: Tensor, tau: float) -> None:
        if not 0 < tau < math.inf:
            raise Refused(f"the step τ must be a finite number above 0, not {tau:g}")
        super().__init__(data, y)
        self.tau = float(tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau:.6g}"


class GradientStep(_Step):
    """x ↦ x - τ∇f(x) = x - τAᵀφ'(Ax; y), φ of the ``likelihood``: τL_f/2-averaged for 0 < τ < 2/L_f.

    The gradient of a convex L_f-smooth function is 1/L_f-cocoercive (Baillon & Haddad 1977), which is what this says.
    """

    def __init__(self, data: DataTerm, y: Tensor, tau: float, likelihood: Likelihood = GAUSSIAN) -> None:
        super().__init__(data, y, tau)
        self.likelihood = likelihood

    def smoothness(self) -> float:
        """L_f from above."""
        return times(self.data.lipschitz, self.likelihood.smoothness(self.y))

    def forward(self, x: Tensor) -> Tensor:
        slope = self.likelihood.gradient(self.data.A(x), self.y)
        return torch.sub(x, self.data.A_adjoint(slope), alpha=self.tau)

    def objective(self, x: Tensor) -> Tensor:
        """τf(x), (B,), of which this is the gradient step."""
        return self.tau * self.likelihood.value(self.data.A(x).double(), self.y.double())


@rule(GradientStep)
def _gradient_step(module: GradientStep, shape: Shape, unit: float) -> Certificate:
    stated, smoothness = module.stated(shape, unit), module.smoothness()
    alpha = times(module.tau, smoothness) / 2
    if not alpha < 1:
        raise Refused(
            f"the gradient step is not averaged: τ = {module.tau:g}, but τ < 2/L_f = {below(2 / smoothness)} is needed. "
            f"The nearest setting that is proved: τ ≤ {below(1.99 / smoothness, 4)}."
        )
    kind = type(module.likelihood).__name__
    name = f"GradientStep of the data term ({kind}): L_f ≤ {above(smoothness)}, τ = {module.tau:.6g}"
    origin = euclidean(module.likelihood.gradient(torch.zeros_like(module.y), module.y))  # ∇f(0) = Aᵀφ'(0)
    offset = times(times(module.tau, up(module.data.lipschitz**0.5)), origin)
    return Certificate(1.0, alpha, shape, shape, name, Affine(1.0, offset), assumptions=stated)


class ProximalStep(_Step):
    """x ↦ prox_{τf}(x) = argmin_z ½‖Az - y‖² + ‖z - x‖²/(2τ): firmly non-expansive for any τ > 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.data.prox(x, self.y, self.tau)

    def objective(self, x: Tensor) -> Tensor:
        """The Moreau envelope min_z τf(z) + ½‖z - x‖², (B,), of which this is the gradient step I - ∇M."""
        z = self(x)
        misfit = GAUSSIAN.value(self.data.A(z).double(), self.y.double())
        return self.tau * misfit + GAUSSIAN.value(z.double(), x.double())


@rule(ProximalStep)
def _proximal_step(module: ProximalStep, shape: Shape, unit: float) -> Certificate:
    stated = (*module.stated(shape, unit), "the proximal map is solved exactly")
    offset = times(times(module.tau, up(module.data.lipschitz**0.5)), euclidean(module.y))
    name = f"ProximalStep of the data term, τ = {module.tau:.6g}"
    return Certificate(1.0, 0.5, shape, shape, name, Affine(1.0, offset), assumptions=stated)


class Box(nn.Module):
    """x ↦ the nearest point of [low, high]ⁿ: a projection, firmly non-expansive."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not -math.inf < low < high < math.inf:
            raise BadInput(f"the bounds of a box are finite numbers low < high, not {low} and {high}")
        self.low, self.high = float(low), float(high)

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high)

    def farthest(self, x: Tensor) -> Tensor:
        """The distance of each sample from the point of the box that is farthest from it: (B,)."""
        return torch.maximum((x - self.low).abs(), (x - self.high).abs()).flatten(1).double().norm(dim=1)

    def extra_repr(self) -> str:
        return f"low={self.low:g}, high={self.high:g}"


@rule(Box)
def _box(module: Box, shape: Shape, unit: float) -> Certificate:
    size = root(entries(shape))
    nearest = max(module.low, -module.high, 0.0)  # of 0
    # a bound that is no number of the program's type is rounded to one, which moves the result by as much
    rounding = 0.0 if {module.low, module.high} <= {-1.0, 0.0, 1.0} else times(max(-module.low, module.high), unit)
    name = f"Box: projection on [{module.low:g}, {module.high:g}]"
    return Certificate(
        1.0, 0.5, shape, shape, name, Affine(1.0, times(nearest, size)), Affine(0.0, times(rounding, size))
    )
