"""Splittings as modules: an iteration x ↦ T(x) that has a certificate before it runs.

The data term f(x) = φ(Ax; y) is convex and L_f-smooth (:mod:`~nonexpansive.restore.likelihood`; for Gaussian noise f = ½‖Ax - y‖² and
L_f = ‖A‖²); the prior is a denoiser D at a fixed noise level. Each splitting is made of maps with known averagedness, so that its own α
is composed, never assumed (theory: Bauschke & Combettes, *Convex Analysis and Monotone Operator Theory in Hilbert Spaces*; Combettes &
Yamada 2015, arXiv:1407.5100):

- gradient step I - τ∇f with τ < 2/L_f: α = τL_f/2;   proximal step prox_{τf}: α = 1/2;   projection on a box: α = 1/2;
- forward-backward D∘(I - τ∇f); half-quadratic D∘prox_{τf}; Douglas-Rachford ½I + ½(2prox_{τf} - I)(2D - I);
- RED gradient x - τ(∇f(x) + λ(x - Dx)); primal-dual (Condat-Vu), averaged in a metric of its own;
- of any of them: Krasnosel'skii-Mann relaxation (1-λ)I + λT, and Halpern's anchored iteration, for which non-expansive suffices.

Forward-backward, Douglas-Rachford, primal-dual, and what is relaxed or anchored of them, have **the same restorations** for the same D
and τ, x = D(x - τ∇f(x)); half-quadratic and RED have others.

If T is averaged and has a fixed point, x_{k+1} = T(x_k) converges to one and ‖x_{k+1} - x_k‖ never increases. On a bounded set one
exists (Brouwer): ``box`` ends T with the projection on one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    certify,
    chain,
    compose_averaged,
    entries,
    fold,
    from_enclosure,
    relaxed,
    require_out_of_place,
    rule,
)
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.rounding import above, below, down, euclidean, plus, root, times, up
from nonexpansive.nn.resize import Relaxed
from nonexpansive.restore.iterate import Iteration, Renormed
from nonexpansive.restore.likelihood import GAUSSIAN, Gaussian, Likelihood

Method = Literal["forward-backward", "half-quadratic", "douglas-rachford", "primal-dual", "red"]
METHODS: tuple[Method, ...] = get_args(Method)


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


class Rescaled(nn.Module):
    """x ↦ μ⁻¹D(μx), input scaling: the same α and L, but a denoiser made for noise of σ₀ then acts on noise of σ₀/μ."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        if not 0 < factor < math.inf:
            raise BadInput(f"the input scaling μ must be a finite number above 0, not {factor}")
        self.inner, self.factor = inner, float(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.factor) / self.factor

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


class _OfData(nn.Module):
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


class _Step(_OfData):
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


# ------------------------------------------------------------------------------------------------------------------ splittings


class Splitting(Iteration, nn.Sequential):
    """A chain of averaged maps: one step of an iteration, called by the name of its method."""

    method = "splitting"

    def distance(self, state: Tensor) -> Tensor | None:
        last = self[-1] if len(self) else None
        return last.farthest(state) if isinstance(last, Box) else None


class ForwardBackward(Splitting):
    """D∘(I - τ∇f)."""

    method = "forward-backward"


class HalfQuadratic(Splitting):
    """D∘prox_{τf}, parameters fixed: half-quadratic splitting, read after the denoiser rather than after the data step."""

    method = "half-quadratic"


def _chained(module: Splitting, shape: Shape, unit: float) -> Certificate:
    if not len(module):
        raise Refused(f"{module.method}: it has no factors")
    return chain(*(fold(part, shape, unit) for part in module), rule=f"{module.method} iteration")


def _nonexpansive(module: nn.Module, shape: Shape, unit: float) -> Certificate:
    """The certificate of an iteration that need not be averaged, as it is to be relaxed or anchored."""
    certificate = _chained(module, shape, unit) if isinstance(module, Splitting) else fold(module, shape, unit)
    if certificate.averaged is None and not certificate.nonexpansive:
        raise Refused(f"the iteration is not proved to be non-expansive.{_culprit(certificate)}\n{certificate}")
    return certificate


def _culprit(certificate: Certificate) -> str:
    """Which factor is not averaged, and the nearest setting with which it, or the iteration, would be."""
    part = next((part for part in certificate.parts if part.averaged is None), None)
    if part is None:
        return ""
    if part.nonexpansive:
        return (
            f" The factor that fails: {part.rule}, which is non-expansive but not averaged. Nearest settings that are proved: relax that "
            "factor (strength t < 1: (1-t)I + tD), relax the iteration (relaxation λ < 1), or anchor it (Halpern)."
        )
    return (
        f" The factor that fails: {part.rule}, for which only L ≤ {above(part.lipschitz)} is known. No setting of the iteration mends "
        "that: use a denoiser that is averaged."
    )


@rule(ForwardBackward, HalfQuadratic)
def _splitting(module: Splitting, shape: Shape, unit: float) -> Certificate:
    certificate = _chained(module, shape, unit)
    if certificate.averaged is None:
        raise Refused(
            f"{module.method}: a factor is not averaged, so convergence is not proved.{_culprit(certificate)}\n{certificate}"
        )
    return certificate


def _firm(map: Certificate, which: str, method: str, why: str) -> None:
    """Refused unless the map is firmly non-expansive."""
    if map.averaged is not None and map.averaged <= 0.5:
        return
    alpha = "unknown" if map.averaged is None else above(map.averaged)
    known = map.averaged or (1.0 if map.nonexpansive else math.inf)
    remedy = "" if known > 1 else (
        f" Relax it: Relaxed({which}, t={below(0.5 / known)}) has α ≤ 1/2 (relax=True, or --relax, does so), or use forward-backward."
    )  # fmt: skip
    raise Refused(f"{method} needs a {which} with α ≤ 1/2, {why}; its α is {alpha}.{remedy}")


class DouglasRachford(Iteration, nn.Module):
    """x ↦ ½x + ½(2prox_{τf} - I)(2D - I)(x): ½-averaged if D is α-averaged with α ≤ ½. The restoration is D at the fixed point.

    ADMM, with D in the place of the prior's proximal map, is the same iteration in other variables (Gabay 1983).
    """

    method = "Douglas-Rachford"

    def __init__(self, denoiser: nn.Module, proximal: ProximalStep) -> None:
        super().__init__()
        self.denoiser, self.proximal = denoiser, proximal

    def forward(self, x: Tensor) -> Tensor:
        denoised = self.denoiser(x)
        return x + self.proximal(2 * denoised - x) - denoised

    def picture(self, state: Tensor) -> Tensor:
        return self.denoiser(state)


@rule(DouglasRachford)
def _douglas_rachford(module: DouglasRachford, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module, "which Douglas-Rachford uses again")
    denoiser, proximal = fold(module.denoiser, shape, unit), fold(module.proximal, shape, unit)
    for map, which in ((denoiser, "denoiser"), (proximal, "proximal map")):
        _firm(map, which, "Douglas-Rachford", "so that twice it less the identity is non-expansive")
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


class GradientRED(Iteration, nn.Module):
    """x ↦ x - τ(∇f(x) + λ(x - Dx)), regularisation by denoising (Romano, Elad & Milanfar 2017), read as a monotone equation.

    For an α-averaged D = (1-α)I + αR, α ≤ 1 (1: merely non-expansive), I - D = α(I - R) is 1/(2α)-cocoercive, as I - R is
    ½-cocoercive; ∇f is 1/L_f-cocoercive; the sum of maps that are 1/a- and 1/b-cocoercive is 1/(a+b)-cocoercive. So
    G = ∇f + λ(I - D) is 1/ℓ-cocoercive with ℓ = L_f + 2αλ, and I - τG is τℓ/2-averaged for τ < 2/ℓ. D need not be a gradient.
    """

    method = "RED gradient"

    def __init__(self, gradient: GradientStep, denoiser: nn.Module, weight: float) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise BadInput(f"the weight λ of the prior must be a finite number from 0, not {weight}")
        self.gradient, self.denoiser, self.weight = gradient, denoiser, float(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.gradient(x) + (self.gradient.tau * self.weight) * (self.denoiser(x) - x)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"


@rule(GradientRED)
def _red(module: GradientRED, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module, "which RED uses again")
    tau, weight, denoiser = module.gradient.tau, module.weight, fold(module.denoiser, shape, unit)
    known = denoiser.averaged if denoiser.averaged is not None else 1.0
    if denoiser.averaged is None and not denoiser.nonexpansive:
        raise Refused(
            f"RED needs a denoiser that is non-expansive (α ≤ 1); of {denoiser.rule} only L ≤ {above(denoiser.lipschitz)} is known"
        )
    stated, data = module.gradient.stated(shape, unit), module.gradient.smoothness()
    total = plus(data, times(2 * weight, known))
    alpha = times(tau, total) / 2
    if not alpha < 1:
        raise Refused(
            f"the RED gradient is not averaged: τ = {tau:g}, but τ < 2/(L_f + 2αλ) = {below(2 / total)} is needed, with L_f ≤ "
            f"{above(data)}, α ≤ {above(known)}, λ = {weight:g}. The nearest setting that is proved: τ ≤ {below(1.99 / total, 4)}."
        )
    step = fold(module.gradient, shape, unit)  # τ < 2/L_f follows
    offset = plus(step.growth.constant, times(times(tau, weight), denoiser.growth.constant))
    return Certificate(
        1.0,
        alpha,
        shape,
        shape,
        f"RED gradient iteration: L_f ≤ {above(data)}, λ = {weight:.6g}, τ = {tau:.6g}",
        Affine(1.0, offset),
        step.error + denoiser.error * times(tau, weight),
        tuple(dict.fromkeys((*stated, *denoiser.assumptions))),
        (step, denoiser),
    )


# ------------------------------------------------------------------------------------------------------------------ primal-dual


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


class DualOfData(_OfData):
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
    _firm(denoiser, "denoiser", "primal-dual", "so that it is the resolvent of a monotone operator")
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


# ------------------------------------------------------------------------------------------------------- of any iteration: schemes


class _Of(Iteration, nn.Module):
    """A scheme about an iteration T, whose picture and state it shares."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def _scheme(self) -> Iteration:
        return self.inner if isinstance(self.inner, Iteration) else Iteration()

    def begin(self, x: Tensor) -> Tensor:
        return self._scheme.begin(x)

    def picture(self, state: Tensor) -> Tensor:
        return self._scheme.picture(state)

    def state_shape(self, shape: Shape) -> Shape:
        return self._scheme.state_shape(shape)

    def distance(self, state: Tensor) -> Tensor | None:
        return self._scheme.distance(state)  # T and (1-λ)I + λT have the same fixed points


class KrasnoselskiiMann(_Of):
    """x ↦ (1-λ)x + λT(x), 0 < λ < 1/α for an α-averaged T, λ < 1 for a T that is merely non-expansive: λα-averaged."""

    method = "Krasnosel'skii-Mann"

    def __init__(self, inner: nn.Module, relaxation: float) -> None:
        super().__init__(inner)
        if not 0 < relaxation < math.inf:
            raise Refused(f"the relaxation λ must be a finite number above 0, not {relaxation}")
        self.relaxation = float(relaxation)

    def forward(self, x: Tensor) -> Tensor:
        return x.lerp(self.inner(x), self.relaxation)

    def extra_repr(self) -> str:
        return f"relaxation={self.relaxation:g}"


@rule(KrasnoselskiiMann)
def _krasnoselskii_mann(module: KrasnoselskiiMann, shape: Shape, unit: float) -> Certificate:
    require_out_of_place(module.inner, "which the relaxation uses again")
    inner = _nonexpansive(module.inner, shape, unit)
    alpha = 1.0 if inner.averaged is None else inner.averaged
    if not times(module.relaxation, alpha) < 1:
        raise Refused(
            f"the relaxed iteration is not averaged: λ = {module.relaxation:g}, but λ < 1/α = {below(1 / alpha)} is needed. "
            f"The nearest setting that is proved: λ ≤ {below(0.99 / alpha, 4)}."
        )
    name = f"Krasnosel'skii-Mann iteration: (1-λ)I + λT, λ = {module.relaxation:g}"
    return replace(relaxed(inner, module.relaxation, unit), rule=name)


class Halpern(_Of):
    """T, to be run anchored: ``fixed_point`` takes x_{k+1} = x₀/(k+2) + (1 - 1/(k+2))T(x_k) (Halpern 1967).

    T need only be non-expansive. If it has a fixed point, x_k converges to the one nearest to x₀ (Wittmann 1992), and
    ‖x_k - T(x_k)‖ ≤ 2‖x₀ - x*‖/(k+1) (Lieder 2021), where averaged iterations have 1/√k; the residual need not fall at every step.
    """

    method, anchored = "Halpern", True

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@rule(Halpern)
def _halpern(module: Halpern, shape: Shape, unit: float) -> Certificate:
    inner = _nonexpansive(module.inner, shape, unit)
    name = "Halpern iteration: anchored at its start with weights 1/(k+2), of a non-expansive map"
    return replace(inner, lipschitz=min(1.0, inner.lipschitz), rule=name, parts=(inner,))


def splitting(
    method: str,
    denoiser: nn.Module,
    data: DataTerm,
    y: Tensor,
    *,
    sigma: float,
    tau: float,
    likelihood: Likelihood = GAUSSIAN,
    box: bool | tuple[float, float] = False,
    strength: float = 1.0,
    scaling: float = 1.0,
    relax: bool = False,
    relaxation: float | None = None,
    anchored: bool = False,
) -> nn.Module:
    """The iteration T of a method, one of ``METHODS``, for data y and a denoiser at level σ.

    - ``likelihood``: of the noise in y. What takes a proximal map of f (half-quadratic, Douglas-Rachford) is for Gaussian noise.
    - ``box``: ends each step with the projection on [0, 1]ⁿ (or on [low, high]ⁿ), which guarantees a fixed point. Not for
      Douglas-Rachford, whose iterates are no pictures, nor for RED. Primal-dual takes the box as its h, and the data by their gradient;
      without a box the data are its h.
    - ``strength``, ``scaling``: see :func:`prior`. ``relax``: reduces the strength to 0.5/α, for methods that need α ≤ 1/2.
    - ``tau`` of RED weighs the data as elsewhere, λ = 1/τ; its step is nearly the longest that is proved.
    - ``relaxation``: λ of Krasnosel'skii-Mann; ``anchored``: Halpern's iteration.

    Raises BadInput for what there is not.
    """
    if method not in METHODS:
        raise BadInput(f"no splitting {method!r}: there are {', '.join(METHODS)}")
    bounds = Box() if box is True else Box(*box) if box else None
    end = [bounds] if bounds else []
    if bounds and method in ("douglas-rachford", "red"):
        why = (
            "iterates on a shadow of the picture" if method == "douglas-rachford" else "is one averaged step, no chain"
        )
        raise BadInput(f"{method} {why}, which may not be projected on a box: box=False")
    if method in ("half-quadratic", "douglas-rachford") and not isinstance(likelihood, Gaussian):
        raise BadInput(
            f"{method} needs the proximal map of f, which is known for Gaussian noise only: use forward-backward, primal-dual or red"
        )
    D = prior(denoiser, sigma, strength=strength, scaling=scaling)
    if relax:
        alpha = certify(D, data.image_shape).averaged
        if alpha is not None and alpha > 0.5:
            D = Relaxed(D, down(0.5 / alpha))

    def iteration() -> nn.Module:
        if method == "forward-backward":
            return ForwardBackward(GradientStep(data, y, tau, likelihood), D, *end)
        if method == "half-quadratic":
            return HalfQuadratic(ProximalStep(data, y, tau), D, *end)
        if method == "douglas-rachford":
            return DouglasRachford(D, ProximalStep(data, y, tau))
        if method == "primal-dual":
            if bounds:
                dual, smooth = DualOfBox(bounds, data.image_shape), GradientStep(data, y, tau, likelihood)
            else:
                dual, smooth = DualOfData(data, y, likelihood), None
            return PrimalDual(D, dual, data.image_shape, tau, smooth=smooth)
        longest = 1.99 / (data.lipschitz * likelihood.smoothness(y) + 2 / tau) if tau > 0 else tau
        return GradientRED(GradientStep(data, y, longest, likelihood), D, 1 / tau)

    T = iteration()
    if relaxation is not None:
        T = KrasnoselskiiMann(T, relaxation)
    return Halpern(T) if anchored else T


__all__ = [
    "METHODS",
    "AtLevel",
    "Box",
    "DataTerm",
    "DouglasRachford",
    "Dual",
    "DualOfBox",
    "DualOfData",
    "ForwardBackward",
    "GradientRED",
    "GradientStep",
    "HalfQuadratic",
    "Halpern",
    "KrasnoselskiiMann",
    "Method",
    "PrimalDual",
    "ProximalStep",
    "Rescaled",
    "prior",
    "splitting",
]
