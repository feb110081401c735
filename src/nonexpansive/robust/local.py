"""How far a margin can fall near one image: a quadratic majorant, by a single pass back through the network.

A bound by the Lipschitz constant holds everywhere, and so pays for the steepest place anywhere. Near an image x most neurons keep the
sign that they have, and where all of them do the margin is linear, often with half the slope. For a flow F(x) = x - hAᵀσ(Ax + b) with
σ the ReLU and h‖A‖² ≤ 2, what neurons may do that change their sign is bounded as follows.

Let ⟨v, δ'⟩ + κ‖δ'‖² + c bound the fall of the margin when F's *output* moves by δ'. With d = Aδ and Δ = σ(z + d) - σ(z), z = Ax + b,

    δ' = δ - hAᵀΔ  and  ‖δ'‖² = ‖δ‖² - h(2⟨Δ, d - Δ⟩ + ⟨Δ, RΔ⟩) ≤ ‖δ‖² - h⟨Δ, RΔ⟩,   R = 2I - hAAᵀ ⪰ 0.

1. ⟨Δ, RΔ⟩ ≥ 2⟨Rω, Δ⟩ - ⟨ω, Rω⟩ for every ω, as the left side is convex. So the fall is at most ⟨v, δ⟩ + ⟨u, Δ⟩ + κ‖δ‖² + c + hκ⟨ω, Rω⟩
   with u = -h(Av + 2κRω).
2. For slopes s ∈ [0, 1] and a λ > 0, ⟨u, Δ⟩ ≤ ⟨su, d⟩ + λ‖d‖² + Σ_k p_k, with p_k the maximum over d_k of u_k(Δ_k - s_k d_k) - λd_k².
   It is 0 where u_k ≤ 0 and s_k = σ'(z_k), since the ReLU lies above its tangents. For u_k > 0 and t_k = s_k (1 - s_k where z_k > 0)

       p_k = max(u²t², u²(1 - t)² - 4λu|z|)/4λ,  least for t = max(0, 1/2 - 2λ|z|/u),

   so a neuron whose |z_k| exceeds u_k/4λ costs nothing: to change its sign would take more of the ball than that brings.
3. λ‖Aδ‖² ≤ λ(S²‖δ‖² - 2⟨Mw, δ⟩ + ⟨w, Mw⟩) for every w, with S ≥ ‖A‖ and M = S²I - AᵀA ⪰ 0.

Together: a bound of the same kind on the fall when F's *input* moves by δ, with

    v + Aᵀ(su) - 2λMw,   κ + λS²,   c + hκ⟨ω, Rω⟩ + Σ_k p_k + λ⟨w, Mw⟩.

Isometries and projections carry v back by their adjoint, a mean over views adds. At the image itself the margin m is certain while
‖v‖r + κr² + c < m: a quadratic in r. Every choice of ω, λ, s and w gives a bound; the one made here is sharp near the attack along the
gradient. A leaky ReLU is a part of the identity and a part of the ReLU, and MaxMin a flow whose A takes differences of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import Refused
from nonexpansive.math.enclosure import NOTHING, SLACK, sizes
from nonexpansive.math.rounding import UNIT, gamma, root, times
from nonexpansive.nn.classifier import Centre, Channels, Symmetrised
from nonexpansive.nn.control import sound_norm
from nonexpansive.nn.flow import GradientFlow, linear_maps
from nonexpansive.nn.linear import affine, homogeneous
from nonexpansive.nn.sort import MaxMin

TILT = 0.8
"""w and ω are this share of the deviations under the attack: at all of it v may turn over where κ is large."""

PRICE = 0.5
"""What λ is taken to cost per S²r², beside its cost along the attack itself."""

ROUNDS = 12
"""Of Newton's method for λ."""

FEW = 2.0**-47
"""More than the relative rounding of some thirty operations in float64."""


class Majorant(NamedTuple):
    """⟨v, δ⟩ + ρ‖δ‖ + κ‖δ‖² + c, for each of N samples: v ``linear`` (N, ...), ρ ``rounding``, κ ``curvature`` and c ``constant`` (N,).

    It bounds by how much a margin falls when something in the network moves by δ, for every δ. ρ holds what v is off by rounding.
    """

    linear: Tensor
    rounding: Tensor
    curvature: Tensor
    constant: Tensor

    def radius(self, margin: Tensor, speed: Tensor) -> Tensor:
        """The r (N,) below which ``margin`` - ``speed``·r exceeds the bound for all ‖δ‖ ≤ r; 0 where there is none."""
        b = (sizes(self.linear) + self.rounding + speed) * SLACK
        left = (margin / SLACK - self.constant * SLACK).clamp_min(0)
        return 2 * left / (b + (b * b + 4 * self.curvature * SLACK * left).sqrt() * SLACK) / SLACK**2


class _Ball(NamedTuple):
    """``near`` (N,): how far each layer's float64 output may be from the exact map's; ``reach`` (N,): the radius to be sharp at."""

    near: Tensor
    reach: Tensor


def majorant(features: nn.Module, x: Tensor, rows: Tensor, near: Tensor, reach: Tensor) -> Majorant:
    """A majorant of the fall of ⟨rows, features(x)⟩, a margin less its offset, at each image x (N, *shape).

    ``features``: in float64, with no parameter that asks for a gradient; ``rows`` (N, d): of each image w_i - w_j, taken as exact;
    ``near``, ``reach`` (N,): see above, ``reach`` a distance at which the bound is to be sharp.

    Raises Refused for layers through which no such bound is known.
    """
    if (unknown := unsupported(features)) is not None:
        raise Refused(
            f"no bound near an image is known through {unknown}; through flows of one Euler step with the ReLU or the leaky ReLU, "
            "MaxMin, PixelUnshuffle, Channels, Centre, Flatten and means over views there is"
        )
    with torch.inference_mode(False), torch.enable_grad():
        start = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((features(start) * rows.clone()).sum(), start)
    far = x - gradient * _column(reach / sizes(gradient), x)
    zero = torch.zeros_like(near)
    return _pull(features, Majorant(-rows, zero, zero, zero), x, far, _Ball(near, reach))


def unsupported(module: nn.Module) -> str | None:
    """The first layer through which there is no bound, in words; None if there is none such."""
    if type(module) not in _RULES:
        return type(module).__name__
    if isinstance(module, GradientFlow):
        return (
            None
            if _leak(module.activation) is not None and module.tableau.stages == 1
            else f"{module.tableau.name} steps with {module.activation}"
        )
    return next((name for child in module.children() if (name := unsupported(child)) is not None), None)


# --------------------------------------------------------------------------------------------------------------------- rules


def _pull(module: nn.Module, u: Majorant, x: Tensor, far: Tensor, ball: _Ball) -> Majorant:
    """The bound at the module's input x from that at its output; ``far``: the input under the attack."""
    return _RULES[type(module)](module, u, x, far, ball)


def _sequential(module: nn.Sequential, u: Majorant, x: Tensor, far: Tensor, ball: _Ball) -> Majorant:
    met = [(x, far)]
    for child in module:
        met.append((child(met[-1][0]), child(met[-1][1])))
    for child, (here, there) in zip(reversed(list(module)), reversed(met[:-1]), strict=True):
        u = _pull(child, u, here, there, ball)
    return u


def _symmetrised(module: Symmetrised, u: Majorant, x: Tensor, far: Tensor, ball: _Ball) -> Majorant:
    here, there = module.views(x), module.views(far)
    share = 1 / len(here)
    part = Majorant(
        u.linear * share, u.rounding * share + sizes(u.linear) * FEW, u.curvature * share, u.constant * share
    )
    parts = [_pull(module.inner, part, *views, ball) for views in zip(here, there, strict=True)]
    linear, rounding, curvature, constant = zip(*parts, strict=True)
    back = module.back(list(linear))
    off = sum(map(sizes, linear)) * FEW
    return Majorant(back, sum(rounding) + off, sum(curvature) * SLACK, sum(constant) * SLACK)  # type: ignore[arg-type]


def _channels(module: Channels, u: Majorant, x: Tensor, far: Tensor, ball: _Ball) -> Majorant:
    """Dropping channels, ‖δ‖² is what is kept and what is dropped: ‖δ_dropped‖² ≥ 2⟨w, δ⟩ - ‖w‖² for w among those."""
    channels = module.channels
    v = F.pad(u.linear, (0, 0) * (x.ndim - 2) + (0, x.shape[1] - channels))
    if x.shape[1] <= channels:
        return u._replace(linear=v)
    w = TILT * (far - x)
    w[:, :channels] = 0
    off = (sizes(v) + 2 * u.curvature * sizes(w)) * FEW
    return Majorant(
        v - _column(2 * u.curvature, x) * w,
        u.rounding + off,
        u.curvature,
        u.constant + u.curvature * sizes(w).square() * SLACK,
    )


def _flow(flow: GradientFlow, u: Majorant, x: Tensor, far: Tensor, ball: _Ball) -> Majorant:
    (h, n), norm, leak = flow.step(), sound_norm(flow.linear), _leak(flow.activation)
    assert leak is not None
    forward, adjoint = linear_maps(flow.linear, tuple(x.shape[1:]), norm)
    own = UNIT[torch.float64]

    def back(u: Majorant, x: Tensor, far: Tensor) -> Majorant:
        z, transposed = affine(flow.linear, x)
        bent = _Bent(
            lambda t: homogeneous(flow.linear, t)[0],
            transposed,
            times(norm, norm),
            h,
            leak,
            forward.rounding(own) * forward.absolute,
            adjoint.rounding(own) * adjoint.absolute,
        )
        off = norm * ball.near + forward.rounding(own) * (forward.absolute * sizes(x) + forward.bias)
        return _through(bent, u, x, far, z, off, ball)

    met = [(x, far)]
    for _ in range(n - 1):
        met.append(tuple(flow._integrate(y, h, 1) for y in met[-1]))  # type: ignore[arg-type]
    for here, there in reversed(met):
        u = back(u, here, there)
    return u


def _maxmin(module: MaxMin, u: Majorant, x: Tensor, far: Tensor, ball: _Ball) -> Majorant:
    """(x_1, x_2) ↦ (x_1 + σ(x_2 - x_1), x_2 - σ(x_2 - x_1)): A takes x_2 - x_1, of norm √2."""

    def difference(t: Tensor) -> Tensor:
        first, second = t.chunk(2, 1)
        return second - first

    rounding = 2 * gamma(2, UNIT[torch.float64])
    bent = _Bent(difference, lambda s: torch.cat((-s, s), 1), 2.0, 1.0, 0.0, rounding, rounding)
    off = root(2) * ball.near + rounding * sizes(x)
    return _through(bent, u, x, far, difference(x), off, ball)


class _Bent(NamedTuple):
    """x ↦ x - hAᵀσ(Ax + b), σ(z) = ``leak``·z for z < 0: A, Aᵀ, ``square`` ≥ ‖A‖² and h, with h·square ≤ 2; and how far, relative to
    their arguments' sizes, ``forward`` and ``adjoint`` may be off by rounding."""

    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    square: float
    h: float
    leak: float
    forward: float
    adjoint: float


def _through(f: _Bent, u: Majorant, x: Tensor, far: Tensor, z: Tensor, off: Tensor, ball: _Ball) -> Majorant:
    """The three steps above. ``off`` bounds how far z may be from the exact one; to exchange the two costs 2⟨|u|, off⟩."""
    if not times(f.h, f.square) <= 2:
        raise Refused(f"a step of h = {f.h:g} is longer than 2/‖A‖², so nothing is bounded near an image")
    h, norm, size = f.h, root(1) * f.square**0.5 * SLACK, sizes(u.linear)
    w = TILT * (far - x)
    image = f.apply(w)

    # 1: what the flow takes from ‖δ‖²
    omega = F.leaky_relu(z + image, f.leak) - F.leaky_relu(z, f.leak)
    pulled = f.transpose(omega)
    taken = 2 * omega - h * f.apply(pulled)
    wrong = h * (f.forward * sizes(pulled) + norm * f.adjoint * sizes(omega)) + FEW * (2 * sizes(omega) + sizes(taken))
    coefficient = f.apply(u.linear) * -h - taken * _column(2 * h * u.curvature, x)
    constant = u.constant + h * u.curvature * (_inner(omega, taken) + sizes(omega) * wrong)
    wrong = h * (f.forward * size + 2 * u.curvature * wrong)
    wrong = wrong + FEW * (h * norm * size + 2 * h * u.curvature * sizes(taken))
    rounding = u.rounding + wrong * norm

    # 2: neurons that change their sign
    price = f.square * ball.reach.square() * PRICE + sizes(image).square()
    bent = coefficient * (1 - f.leak)
    lam = _multiplier(bent, z, price.clamp_max(f.square * ball.reach.square()))
    slope, penalty = _relaxed(bent, z, lam)
    back = f.transpose((f.leak + (1 - f.leak) * slope) * coefficient)
    constant = constant + penalty + 2 * sizes(coefficient) * (1 + FEW) * off
    rounding = rounding + (f.adjoint + 4 * FEW * norm) * sizes(coefficient)

    # 3: ‖Aδ‖²
    missed = f.square * w - f.transpose(image)
    wrong = f.adjoint * sizes(image) + norm * f.forward * sizes(w) + FEW * (f.square * sizes(w) + sizes(missed))
    constant = constant + lam * (_inner(w, missed) + sizes(w) * wrong)
    linear = u.linear + back - missed * _column(2 * lam, x)
    rounding = rounding + 2 * lam * wrong + FEW * (size + sizes(back) + 2 * lam * sizes(missed))
    return Majorant(linear, rounding * SLACK, (u.curvature + lam * f.square) * SLACK, constant + constant.abs() * FEW)


def _multiplier(u: Tensor, z: Tensor, price: Tensor) -> Tensor:
    """About the λ (N,) that minimises price·λ + Σ p(λ): Σ max(0, (u/4λ)² - z²) = price over u > 0, by Newton's method in 1/λ.

    The left side is convex in 1/λ, so that once it has passed the solution it comes down on it."""
    square, away = u.flatten(1).clamp_min(0).square() / 16, z.flatten(1).square()
    inverse = (price / square.sum(1).clamp_min(NOTHING)).sqrt()  # as if all z were 0, hence too small
    for _ in range(ROUNDS):
        held = square * inverse.square()[:, None]
        near = held > away
        over = (held - away).clamp_min(0).sum(1) - price
        slope = 2 * (held * near).sum(1) / inverse
        inverse = (inverse - over / slope.clamp_min(NOTHING)).clamp(min=inverse / 2, max=8 * inverse)
    return (1 / inverse).clamp(1e-30, 1e30)


def _relaxed(u: Tensor, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """s, and Σ p (N,) from above."""
    lam_, away, up = _column(lam, z), z.abs(), u.clamp_min(0)
    t = (0.5 - 2 * lam_ * away / up.clamp_min(NOTHING)).clamp_min(0) * (up > 0)
    kept, crossed = (up * t).square(), (up * (1 - t)).square() - 4 * lam_ * up * away
    # what is subtracted in the second is at most as large as what is left of it, or the first is the larger
    total = torch.maximum(kept, crossed).flatten(1).sum(1) * SLACK + sizes(up).square() * FEW
    return torch.where(z > 0, 1 - t, t), total / (4 * lam) * SLACK


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ (N,) from above."""
    return (a * b).flatten(1).sum(1) + sizes(a) * sizes(b) * a[:1].numel() * 2.0**-52


def _leak(activation: nn.Module) -> float | None:
    """The slope below 0 of a ReLU or leaky ReLU, in [0, 1]; None for another σ."""
    if type(activation) is nn.ReLU:
        return 0.0
    if type(activation) is nn.LeakyReLU and 0 <= activation.negative_slope <= 1:
        return float(activation.negative_slope)
    return None


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.ndim - 1))


_RULES: dict[type[nn.Module], Callable[..., Majorant]] = {
    nn.Sequential: _sequential,
    Symmetrised: _symmetrised,
    GradientFlow: _flow,
    MaxMin: _maxmin,
    Channels: _channels,
    Centre: lambda module, u, x, far, ball: u,
    nn.Identity: lambda module, u, x, far, ball: u,
    nn.Flatten: lambda module, u, x, far, ball: u._replace(linear=u.linear.reshape(x.shape)),
    nn.PixelUnshuffle: lambda module, u, x, far, ball: u._replace(
        linear=F.pixel_shuffle(u.linear, module.downscale_factor)
    ),
}
