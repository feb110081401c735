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

A denoiser that is not averaged, but the proximal map of a weakly convex R, makes forward-backward and half-quadratic descend on
M + R instead, M = τf or its Moreau envelope: :func:`_descent`.

If T is averaged and has a fixed point, x_{k+1} = T(x_k) converges to one and ‖x_{k+1} - x_k‖ never increases. On a bounded set one
exists (Brouwer): ``box`` ends T with the projection on one.
"""

from __future__ import annotations

import math
from dataclasses import replace

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
from nonexpansive.math.rounding import above, below, down, plus, times
from nonexpansive.restore.iterate import Descent, Iteration
from nonexpansive.restore.steps import AtLevel, Box, GradientStep, ProximalStep, Rescaled


class Splitting(Iteration, nn.Sequential):
    """A chain of averaged maps: one step of an iteration, called by the name of its method."""

    method = "splitting"

    def forward(self, input: Tensor) -> Tensor:
        x = input
        for part in self:
            x = part(x, near=input) if isinstance(part, AtLevel) else part(x)  # as T(x) is near x before long
        return x

    def distance(self, state: Tensor) -> Tensor | None:
        last = self[-1] if len(self) else None
        return last.farthest(state) if isinstance(last, Box) else None

    def objective(self, state: Tensor) -> Tensor | None:
        """M + R, where the last factor is the proximal map of an R that it can evaluate."""
        step, prior = self if len(self) == 2 else (None, None)
        if not isinstance(step, (GradientStep, ProximalStep)) or not isinstance(prior, (AtLevel, Rescaled)):
            return None
        regulariser = prior.regulariser(state)
        return None if regulariser is None else step.objective(state) + regulariser

    def inexact(self, state: Tensor, certificate: Certificate) -> Tensor:
        """By what the last factor is given, which is smaller than what all factors before it might make of the state."""
        if len(self) != 2 or len(certificate.parts) != 2 or certificate.parts[0].error != Affine():
            return super().inexact(state, certificate)
        return super().inexact(self[0](state), certificate.parts[1])


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


def require_nonexpansive(module: nn.Module, shape: Shape, unit: float) -> Certificate:
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
    if part.proximal:
        return (
            f" The factor that fails: {part.rule}, which is not averaged but the proximal map of a weakly convex function. Nearest setting "
            "that is proved: half-quadratic or forward-backward, its last factor (box=False, strength at most 1), which descend."
        )
    inner = part.parts[0] if part.rule.startswith("relaxation") else None
    if inner is not None and inner.averaged:
        return (
            f" The factor that fails: {part.rule}, which overshoots: its T has α ≤ {above(inner.averaged)}. Nearest setting that is "
            f"proved: a t (strength) below 1/α, at most {below(0.999 / inner.averaged, 4)}."
        )
    return (
        f" The factor that fails: {part.rule}, for which only L ≤ {above(part.lipschitz)} is known. No setting of the iteration mends "
        "that: use a denoiser that is averaged."
    )


@rule(ForwardBackward, HalfQuadratic)
def _splitting(module: Splitting, shape: Shape, unit: float) -> Certificate:
    certificate = _chained(module, shape, unit)
    step = module[0] if len(module) == 2 else None
    if (
        certificate.averaged is None
        and isinstance(step, (GradientStep, ProximalStep))
        and certificate.parts[1].proximal
    ):
        # no other averaged map will do: that it is I - ∇M is what the proof takes
        return _descent(certificate, 1.0 if isinstance(step, ProximalStep) else times(step.tau, step.smoothness()))
    if certificate.averaged is None:
        raise Refused(
            f"{module.method}: a factor is not averaged, so convergence is not proved.{_culprit(certificate)}\n{certificate}"
        )
    return certificate


def _descent(chained: Certificate, smoothness: float) -> Certificate:
    """T = D∘(I - ∇M) with a convex, s-smooth M (``smoothness``) and D = prox_R, R (1 - 1/L)-weakly convex.

    x⁺ = T(x) minimises G(z) = ½‖z - x + ∇M(x)‖² + R(z), which is 1/L-strongly convex: G(x⁺) + ‖x⁺ - x‖²/(2L) ≤ G(x). With
    M(x⁺) ≤ M(x) + ⟨∇M(x), x⁺ - x⟩ + (s/2)‖x⁺ - x‖² this reads

        (M + R)(x⁺) ≤ (M + R)(x) - ½(1 + 1/L - s)‖x⁺ - x‖².

    For a proximal step M is the Moreau envelope of τf, s = 1; for a gradient step M = τf, s = τL_f. (Attouch, Bolte & Svaiter 2013;
    with denoisers that are proximal maps: Hurault, Leclaire & Papadakis 2022, arXiv:2201.13256.)
    """
    denoiser = chained.parts[-1]
    inverse = down(1 / denoiser.lipschitz) if denoiser.lipschitz else 1.0
    decrease = down(plus(down(1 + inverse), -smoothness) / 2)
    if not decrease > 0:
        raise Refused(
            f"the iteration is not proved to descend: the data step has τL_f ≤ {above(smoothness)}, but τL_f < 1 + 1/L = "
            f"{below(1 + inverse)} is needed with a denoiser that is the proximal map of a weakly convex function, of L ≤ "
            f"{above(denoiser.lipschitz)}. The nearest settings that are proved: τ smaller in that proportion, or half-quadratic."
        )
    fields = vars(chained.plain())
    stated = "the objective is bounded below (with a ProximalDenoiser it is at least 0)"
    return Descent(**{**fields, "assumptions": (*chained.assumptions, stated)}, decrease=decrease)


def _descends(denoiser: Certificate) -> str:
    """The way out for a denoiser that is proximal and not averaged."""
    if not denoiser.proximal:
        return ""
    return " It is the proximal map of a weakly convex function: half-quadratic and forward-backward descend with it."


def require_firm(map: Certificate, which: str, method: str, why: str) -> None:
    """Refused unless the map is firmly non-expansive."""
    if map.averaged is not None and map.averaged <= 0.5:
        return
    alpha = "unknown" if map.averaged is None else above(map.averaged)
    known = map.averaged or (1.0 if map.nonexpansive else math.inf)
    remedy = _descends(map) if known > 1 else (
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
        require_firm(map, which, "Douglas-Rachford", "so that twice it less the identity is non-expansive")
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
            f"RED needs a denoiser that is non-expansive (α ≤ 1); of {denoiser.rule} only L ≤ {above(denoiser.lipschitz)} is known."
            f"{_descends(denoiser)}"
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
