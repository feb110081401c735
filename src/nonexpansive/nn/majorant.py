"""How far a margin can fall near one image: a quadratic majorant, by a single pass back through the network.

A bound by the Lipschitz constant holds everywhere, and so pays for the steepest place anywhere. Near an image x most neurons keep the
sign that they have, and where all of them do the margin is linear, often with half the slope. For a flow F(x) = x - hAᵀσ(Ax + b) with
σ the ReLU and h‖A‖² ≤ 2, what neurons may do that change their sign is bounded as follows.

Let ⟨v, δ'⟩ + κ‖δ'‖² + c bound the fall of the margin when F's *output* moves by δ'. With d = Aδ and Δ = σ(z + d) - σ(z), z = Ax + b,

    δ' = δ - hAᵀΔ  and  ‖δ'‖² = ‖δ‖² - h(2⟨Δ, d - Δ⟩ + ⟨Δ, RΔ⟩) ≤ ‖δ‖² - h⟨Δ, RΔ⟩,   R = 2I - hAAᵀ ⪰ 0.

1. ⟨Δ, RΔ⟩ ≥ 2⟨Rω, Δ⟩ - ⟨ω, Rω⟩ for every ω, as the left side is convex. So the fall is at most ⟨v, δ⟩ + ⟨u, Δ⟩ + κ‖δ‖² + c + hκ⟨ω, Rω⟩
   with u = -h(Av + 2κRω).
2. For slopes s ∈ [0, 1] and weights λ_k ≥ 0, ⟨u, Δ⟩ ≤ ⟨su, d⟩ + Σ_k (λ_k d_k² + p_k), with p_k the maximum over d_k of
   u_k(Δ_k - s_k d_k) - λ_k d_k². It is 0 where u_k ≤ 0 and s_k is the slope of σ at z_k, since the ReLU lies above its tangents: there
   λ_k = 0. For u_k > 0 and t_k = s_k (1 - s_k where z_k > 0) it is the larger of the maxima of two parabolas, one for each sign,

       p_k = max(u²t², u²(1 - t)² - 4λ_k u|z|)/4λ_k,  least for t = max(0, 1/2 - 2λ_k|z|/u),

   so with λ_k = u_k/4|z_k| a neuron costs nothing: to change its sign would take more than that brings. λ_k = min(λ, u_k/4|z_k|).
3. With Λ = diag λ_k, any ρ ≥ ‖Λ^½A‖² and M = ρI - AᵀΛA ⪰ 0, Σ_k λ_k d_k² = ⟨δ, AᵀΛAδ⟩ ≤ ρ‖δ‖² - 2⟨Mw, δ⟩ + ⟨w, Mw⟩ for every w.
   λS² is such a ρ for S ≥ ‖A‖. Where few neurons are near to changing their sign, max_k (|AAᵀ|Λq)_k/q_k over λ_k > 0 is a smaller one,
   for every q > 0: it bounds the spectral radius of the non-negative |AAᵀ|Λ (Collatz and Wielandt; Horn & Johnson 2013, 8.1.26),
   and so that of AAᵀΛ, which is ‖Λ^½A‖².

Together: a bound of the same kind on the fall when F's *input* moves by δ, with

    v + Aᵀ(su) - 2Mw,   κ + ρ,   c + hκ⟨ω, Rω⟩ + Σ_k p_k + ⟨w, Mw⟩.

Isometries and projections carry v back by their adjoint, a mean over views adds. At the image itself the margin m is certain while
‖v‖r + κr² + c < m: a quadratic in r, less what rounding may do. Every choice of ω, λ, s, q and w gives a bound; the one made here is
sharp near the attack along the gradient, and :mod:`nonexpansive.nn.descent` finds better ones. A leaky ReLU is a part of the identity
and a part of the ReLU, and MaxMin a flow whose A takes differences of channels.

:func:`trace` runs a network and notes what it meets, :meth:`Trace.majorant` goes back. In evaluation mode what is returned is a bound of
the exact map, rounding included, if the network is in float64. In training mode it follows the estimates of ‖A‖ that the
training steps follow, and can be differentiated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import Refused
from nonexpansive.math.enclosure import NOTHING, SLACK, column, sizes
from nonexpansive.math.rounding import UNIT, gamma, times
from nonexpansive.nn.control import content, sound_norm
from nonexpansive.nn.flow import GradientFlow, linear_maps
from nonexpansive.nn.linear import Pullback, affine, homogeneous, is_torch, is_written_out
from nonexpansive.nn.sort import MaxMin

TILT = 0.65
"""w and ω are this share of the deviations under the attack: at all of it v may turn over where κ is large."""

PRICE = 0.6
"""What λ is taken to cost, as a share of the most that it can, ρr²/λ."""

ROUNDS = 2
"""How often λ is chosen for the ρ found, and how many products by |AAᵀ|Λ bring q nearer to its Perron vector at first."""

FLOOR = 1e-6
"""What q is nowhere below, of its largest entry."""

REMEMBERED = 128
"""Of how many layers |AAᵀ| is kept, by the content of their weights."""

_OVERLAPS: OrderedDict[tuple[bytes, torch.device], Tensor] = OrderedDict()
_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}

ROUNDINGS = 2.0**-47
"""More than the relative rounding of some thirty operations in float64."""


class Majorant(NamedTuple):
    """⟨v, δ⟩ + ρ‖δ‖ + κ‖δ‖² + c, for each of N samples: v ``linear`` (N, ...), ρ ``rounding``, κ ``curvature`` and c ``constant`` (N,).

    It bounds by how much a margin falls when something in the network moves by δ, for every δ. ρ holds what v is off by rounding; None,
    where rounding is left out.
    """

    linear: Tensor
    rounding: Tensor | None
    curvature: Tensor
    constant: Tensor

    def within(self, radius: Tensor | float) -> Tensor:
        """The largest fall (N,) for ‖δ‖ ≤ ``radius``, rounding left out."""
        return _square(self.linear).sqrt() * radius + self.curvature * radius * radius + self.constant

    def lasts(self, margin: Tensor) -> Tensor:
        """The r (N,) at which the bound has reached ``margin``, rounding left out; 0 where there is none."""
        left = (margin - self.constant).clamp_min(0)
        b = _square(self.linear).sqrt()
        return 2 * left / (b + (b * b + 4 * self.curvature * left).sqrt()).clamp_min(torch.finfo(b.dtype).tiny)

    def radius(self, margin: Tensor, speed: Tensor) -> Tensor:
        """The r (N,), from below, up to which ``margin`` - ``speed``·r exceeds the fall for all ‖δ‖ ≤ r; 0 where there is none."""
        if self.rounding is None:
            raise Refused("a majorant that leaves rounding out certifies nothing: trace with sound=True")
        b = (sizes(self.linear) + self.rounding + speed) * SLACK
        left = (margin / SLACK - self.constant * SLACK).clamp_min(0)
        return 2 * left / (b + (b * b + 4 * self.curvature * SLACK * left).sqrt() * SLACK) / SLACK**2


@dataclass(eq=False)
class Choice:
    """What a bound through a flow is free to choose: ``w`` (N, ...), ``omega`` (N, ...), ω, ``lam`` (N,), λ, and ``seen`` (N, ...), q.

    None: to be chosen, which the first bound that is made with it does. ``stiffness``: of that bound, 2ρ (N,) and 2hκ (N,), by which its c
    bends at most, and half as much, as a function of w and of ω.
    """

    w: Tensor
    omega: Tensor | None = None
    lam: Tensor | None = None
    seen: Tensor | None = None
    stiffness: tuple[Tensor, Tensor] | None = None


class Trace(NamedTuple):
    """What a network met on samples (N, *shape), as :func:`trace` noted it: its ``parts`` in order, and its ``output`` (N, d).

    ``sound``: whether rounding counts.
    """

    parts: Sequence[_Part]
    output: Tensor
    sound: bool

    def majorant(
        self, rows: Tensor, reach: Tensor, near: Tensor | None = None, choices: list[Any] | None = None
    ) -> Majorant:
        """A majorant of the fall of ⟨rows, output⟩, a margin less its offset, as a function of how far each sample moves.

        ``rows`` (N, d): w_i - w_j, taken as exact; ``reach`` (N,): the distance at which the bound is to be sharp; ``near`` (N,): how
        far what each layer gives may be from what the exact map does (None: not at all); ``choices``: what to choose, as
        :meth:`choices` gives it (None: for these rows and this reach). It is a bound whatever they are, as long as λ and q are not
        negative. What is None in them is filled in, and q is bettered.
        """
        zero = torch.zeros_like(reach)
        start = Majorant(-rows, zero if self.sound else None, zero, zero)
        choices = self.choices(rows, reach) if choices is None else choices
        return _pull(self.parts, choices, start, reach, zero if near is None else near)

    @torch.no_grad()
    def choices(self, rows: Tensor, reach: Tensor) -> list[Any]:
        """For each part what a bound may choose there, sharp at the attack of size ``reach`` along the gradient."""
        against = _back(self.parts, -rows)
        return _push(self.parts, against * column(reach / _square(against).sqrt().clamp_min(NOTHING), against))[0]


Tracer = Callable[[Any, Tensor, bool], Trace]
_TRACERS: dict[type[nn.Module], Tracer] = {}


def tracer(*kinds: type[nn.Module]) -> Callable[[Tracer], Tracer]:
    """Register how modules of exactly these types are traced: (module, x, whether rounding counts) → :class:`Trace`."""

    def register(function: Tracer) -> Tracer:
        _TRACERS.update(dict.fromkeys(kinds, function))
        return function

    return register


def trace(module: nn.Module, x: Tensor, sound: bool = True) -> Trace:
    """Run a network on x (N, *shape), noting what a majorant needs. ``sound``: rounding counts (for float64 alone); else it is left out.

    Raises Refused for layers through which no such bound is known, and, if ``sound``, for flows in training mode or another type.
    """
    if (unknown := untraced(module)) is not None:
        raise Refused(
            f"no bound near an image is known through {unknown}; through flows of Euler steps with the ReLU or the leaky ReLU, MaxMin, "
            "PixelUnshuffle, Channels, Centre, Flatten and means over views there is"
        )
    if sound and x.dtype != torch.float64:
        raise Refused(
            f"a bound with its rounding is made in float64, not in {x.dtype}: convert the network and x, or trace with sound=False"
        )
    return _TRACERS[type(module)](module, x, sound)


def untraced(module: nn.Module) -> str | None:
    """The first layer through which there is no bound, in words; None if there is none such."""
    if type(module) not in _TRACERS:
        return type(module).__name__
    if isinstance(module, GradientFlow):
        if _leak(module.activation) is None or module.tableau.stages > 1:
            return f"{module.tableau.name} steps with {module.activation}"
        if module.training or times(module.step()[0], _squared_norm(module)) <= 2:
            return None
        return f"a step of h = {module.step()[0]:g}, longer than 2/‖A‖²"
    return next((name for child in module.children() if (name := untraced(child)) is not None), None)


# --------------------------------------------------------------------------------------------------------------------- parts


class _Part(Protocol):
    def back(self, v: Tensor) -> Tensor:
        """The adjoint of the derivative at what was met."""
        ...

    def push(self, w: Tensor) -> tuple[Any, Tensor]:
        """What to choose in ``pull`` for samples that are moved by w, and by how much the output moves then."""
        ...

    def pull(self, u: Majorant, chosen: Any, reach: Tensor, near: Tensor) -> Majorant:
        """The majorant at the input from that at the output, for every choice."""
        ...


def _back(parts: Sequence[_Part], v: Tensor) -> Tensor:
    for part in reversed(parts):
        v = part.back(v)
    return v


def _push(parts: Sequence[_Part], w: Tensor) -> tuple[list[Any], Tensor]:
    choices = []
    for part in parts:
        chosen, w = part.push(w)
        choices.append(chosen)
    return choices, w


def _pull(parts: Sequence[_Part], choices: list[Any], u: Majorant, reach: Tensor, near: Tensor) -> Majorant:
    for part, chosen in zip(reversed(parts), reversed(choices), strict=True):
        u = part.pull(u, chosen, reach, near)
    return u


class Rigid(NamedTuple):
    """A linear map P, with its ``adjoint``, that takes entries to entries, or drops them: ‖Pδ‖² = ‖δ‖² - ‖δ_dropped‖².

    ``dropped``: δ with all but those entries set to 0; None where there are none.
    """

    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    dropped: Callable[[Tensor], Tensor] | None = None

    def back(self, v: Tensor) -> Tensor:
        return self.adjoint(v)

    def push(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return TILT * w, self.apply(w)

    def pull(self, u: Majorant, chosen: Tensor, reach: Tensor, near: Tensor) -> Majorant:
        """‖δ_dropped‖² ≥ 2⟨w, δ⟩ - ‖w‖² for every w among those entries."""
        v = self.adjoint(u.linear)
        if self.dropped is None:
            return u._replace(linear=v)
        w = self.dropped(chosen)
        linear, constant = v - column(2 * u.curvature, v) * w, u.constant + u.curvature * _square(w)
        if u.rounding is None:
            return u._replace(linear=linear, constant=constant)
        off = (sizes(v) + 2 * u.curvature * sizes(w)) * ROUNDINGS
        return Majorant(linear, u.rounding + off, u.curvature, constant * SLACK)


class Views(NamedTuple):
    """The mean of one map over several views of its input: ``split`` into views, and its adjoint ``join``; the ``parts`` for each."""

    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]
    parts: Sequence[Sequence[_Part]]

    def back(self, v: Tensor) -> Tensor:
        return self.join([_back(parts, v / len(self.parts)) for parts in self.parts])

    def push(self, w: Tensor) -> tuple[list[list[Any]], Tensor]:
        choices, moved = zip(
            *(_push(parts, view) for parts, view in zip(self.parts, self.split(w), strict=True)), strict=True
        )
        return list(choices), torch.stack(moved).sum(0) / len(self.parts)

    def pull(self, u: Majorant, chosen: list[list[Any]], reach: Tensor, near: Tensor) -> Majorant:
        share = 1 / len(self.parts)
        rounding = None if u.rounding is None else (u.rounding + sizes(u.linear) * ROUNDINGS) * share
        part = Majorant(u.linear * share, rounding, u.curvature * share, u.constant * share)
        pulled = [_pull(parts, each, part, reach, near) for parts, each in zip(self.parts, chosen, strict=True)]
        linear, off, curvature, constant = zip(*pulled, strict=True)
        curvature, constant = (torch.stack(each).sum(0) * SLACK for each in (curvature, constant))
        if rounding is not None:
            rounding = torch.stack([*off, *(sizes(v) * ROUNDINGS * len(linear) for v in linear)]).sum(0) * SLACK  # type: ignore[list-item]
        return Majorant(self.join(list(linear)), rounding, curvature, constant)


class _Known(NamedTuple):
    """A tensor (N, ...), and how far from it in norm (N,) that is which exact arithmetic gives; None, where rounding is left out."""

    value: Tensor
    off: Tensor | None

    def plus(self, a: float | Tensor, b: float | Tensor, other: _Known) -> _Known:
        """a·self + b·other, with a and b one number each, or one for each sample."""
        first, second = (_scaled(c, part.value) for c, part in ((a, self), (b, other)))
        if self.off is None or other.off is None:
            return _Known(first + second, None)
        return _Known(
            first + second, abs(a) * self.off + abs(b) * other.off + ROUNDINGS * (sizes(first) + sizes(second))
        )


class _Bent(NamedTuple):
    """x ↦ x - hAᵀσ(Ax + b), σ(t) = ``leak``·t for t < 0, at z = Ax + b.

    ``square`` ≥ ‖A‖², with h·square ≤ 2. ``forward`` and ``adjoint``: how far, relative to their arguments' sizes, Ax and Aᵀs may be
    off by rounding, Ax by ``drift`` besides; ``off`` (N,): how far z may be, of the x that it was computed from. All four 0 where
    rounding does not count.
    ``overlaps``: |AAᵀ| from above, as :func:`_overlaps` gives it.
    """

    apply: Callable[[Tensor], Tensor]
    transpose: Pullback
    square: float | Tensor
    h: float | Tensor
    leak: float
    z: Tensor
    forward: float
    adjoint: float
    off: Tensor
    drift: float = 0.0
    overlaps: Tensor | None = None

    def back(self, v: Tensor) -> Tensor:
        return v - self.h * self.transpose(self.apply(v) * torch.where(self.z > 0, 1.0, self.leak))

    def push(self, w: Tensor) -> tuple[Choice, Tensor]:
        return Choice(TILT * w), w - self.h * self.transpose(self._sigma(self.z + self.apply(w)) - self._sigma(self.z))

    def pull(self, u: Majorant, chosen: Choice, reach: Tensor, near: Tensor) -> Majorant:
        """The three steps above, each number with what float64 may have got wrong in it."""
        h, exact = self.h, None if u.rounding is None else torch.zeros_like(reach)
        v, w = _Known(u.linear, exact), _Known(chosen.w, exact)
        image = self._forth(w)

        # 1: what the flow takes from ‖δ‖²
        if chosen.omega is None:
            chosen.omega = (self._sigma(self.z + image.value) - self._sigma(self.z)).detach()
        omega = _Known(chosen.omega, exact)
        taken = omega.plus(2.0, -h, self._forth(self._back(omega)))
        coefficient = self._forth(v).plus(-h, -2 * h * u.curvature, taken)

        # 2: neurons that change their sign
        bent = coefficient.value * (1 - self.leak)
        lam, weights, share = self._weights(bent.detach(), reach, chosen)
        slope, penalty = _relaxed(bent, self.z, lam)
        kept = (self.leak + (1 - self.leak) * slope) * coefficient.value
        back = self._back(_Known(kept, None if exact is None else 4 * ROUNDINGS * sizes(coefficient.value)))

        # 3: Σ_k λ_k d_k²
        rho, weighed = share * (lam * self.square), weights * image.value
        off = None if image.off is None else lam * image.off + ROUNDINGS * sizes(weighed)
        missed = w.plus(rho, -1.0, self._back(_Known(weighed, off)))

        linear = v.plus(1.0, 1.0, back).plus(1.0, -2.0, missed)
        constant = (
            u.constant + h * u.curvature * _inner(omega.value, taken.value) + penalty + _inner(w.value, missed.value)
        )
        curvature = u.curvature + rho
        chosen.stiffness = (2 * rho.detach(), 2 * h * u.curvature.detach())
        if u.rounding is None:
            return Majorant(linear.value, None, curvature, constant)
        assert coefficient.off is not None and linear.off is not None
        size, changing = sizes(coefficient.value), sizes(bent.clamp_min(0))
        constant = constant + h * u.curvature * _inner_off(omega, taken) + _inner_off(w, missed)
        constant = constant + ROUNDINGS * changing.square() / lam
        constant = constant + 2 * size * (self._norm * near + self.off)  # z for the exact one
        rounding = u.rounding + self._norm * coefficient.off + linear.off
        return Majorant(linear.value, rounding * SLACK, curvature * SLACK, constant * SLACK)

    @torch.no_grad()
    def _weights(self, u: Tensor, reach: Tensor, chosen: Choice) -> tuple[Tensor, Tensor, Tensor]:
        """λ (N,), the λ_k (N, ...), and ρ as a share of λS² (N,)."""
        enough = u.clamp_min(0) / (4 * self.z.abs()).clamp_min(torch.finfo(u.dtype).tiny) * SLACK
        if chosen.lam is not None:
            return chosen.lam, *self._weighed(enough, chosen.lam, chosen)
        price, share = PRICE * self.square * reach.square(), torch.ones_like(reach)
        for _ in range(ROUNDS):
            lam = _multiplier(u, self.z, share * price)
            weights, share = self._weighed(enough, lam, chosen)
            if bool((share >= 1).all()):
                break
        chosen.lam = lam
        return lam, weights, share

    def _weighed(self, enough: Tensor, lam: Tensor, chosen: Choice) -> tuple[Tensor, Tensor]:
        """The λ_k = min(λ, u_k/4|z_k|), and ρ as a share of λS²."""
        weights, share = torch.minimum(column(lam, enough), enough), torch.ones_like(lam)
        if self.overlaps is None or not weights.any():
            return weights, share
        (fires,) = weights.movedim(1, 0).flatten(1).any(1).nonzero(as_tuple=True)
        overlaps, some = self.overlaps[fires][:, fires], weights[:, fires]
        seen, rounds = (torch.ones_like(weights), 1 + ROUNDS) if chosen.seen is None else (chosen.seen, 1)
        q = seen[:, fires].nan_to_num(1.0).clamp_min(FLOOR)
        for _ in range(rounds):
            norm, q = _weighted(overlaps, some, q)
            share = torch.minimum(share, norm / (lam * self.square) * SLACK)
        chosen.seen = seen.index_copy(1, fires, q)
        return weights, share * SLACK

    def _sigma(self, t: Tensor) -> Tensor:
        return F.leaky_relu(t, self.leak)

    @property
    def _norm(self) -> float | Tensor:
        return self.square**0.5 * SLACK

    def _forth(self, a: _Known) -> _Known:
        """Aa."""
        off = None if a.off is None else self._norm * a.off + self.forward * sizes(a.value) + self.drift
        return _Known(self.apply(a.value), off)

    def _back(self, a: _Known) -> _Known:
        """Aᵀa."""
        off = None if a.off is None else self._norm * a.off + self.adjoint * sizes(a.value)
        return _Known(self.transpose(a.value), off)


def _overlaps(linear: nn.Module, remember: bool) -> Tensor | None:
    """|AAᵀ| from above, rounding included: for a ``Linear`` the matrix (m, m); for a convolution padded with zeros, neither strided nor
    dilated nor grouped, the kernel (m, m, 2k-1, ...) for the whole plane. None for other layers.

    On the plane Ā, A = PĀE with E an extension by zeros and P a choice of neurons, so AAᵀ ⪯ PĀĀᵀPᵀ, whose entries the kernel has.
    ``remember``: keep it, by the content of the weights.
    """
    if not is_torch(linear):
        return None
    weight: Tensor = linear.weight.detach()  # type: ignore[assignment, operator]
    if weight.ndim > 2 and not (
        is_written_out(linear) and not linear.transposed and {*linear.stride, *linear.dilation, linear.groups} == {1}  # type: ignore[misc]
    ):
        return None
    key = (content(linear, weight), weight.device) if remember else None
    if key is not None and key in _OVERLAPS:
        _OVERLAPS.move_to_end(key)
        return _OVERLAPS[key]
    rounding = gamma(weight[0].numel() + 1, UNIT[weight.dtype])
    overlaps = (_correlated(weight).abs() + rounding * _correlated(weight.abs())) * SLACK
    if key is not None:
        _OVERLAPS[key] = overlaps
        if len(_OVERLAPS) > REMEMBERED:
            _OVERLAPS.popitem(last=False)
    return overlaps


def _correlated(weight: Tensor) -> Tensor:
    if weight.ndim == 2:
        return weight @ weight.T
    return _CONVOLVE[weight.ndim](weight, weight, padding=[n - 1 for n in weight.shape[2:]])


def _weighted(overlaps: Tensor, weights: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """max_k (|AAᵀ|Λq)_k/q_k over the λ_k > 0 (N,), and a q (N, ...) nearer to the Perron vector than the one given."""
    t = weights * q
    if overlaps.ndim == 2:
        product = (t @ overlaps.T).to(q.dtype)
    else:
        product = _CONVOLVE[overlaps.ndim](t, overlaps, padding=[n // 2 for n in overlaps.shape[2:]]).to(q.dtype)
    ratios = torch.where(weights > 0, product / q, 0.0).flatten(1).amax(1)
    largest = product.flatten(1).amax(1).clamp_min(torch.finfo(q.dtype).tiny)
    return ratios, product / column(largest, product) + FLOOR


def _multiplier(u: Tensor, z: Tensor, price: Tensor) -> Tensor:
    """The λ (N,) that minimises price·λ + Σ p(λ): Σ max(0, (u/4λ)² - z²) = price over u > 0.

    The left side rises with 1/λ, and is quadratic between the values 4|z|/u at which a neuron comes in."""
    up, away, tiny = u.flatten(1).clamp_min(0), z.flatten(1).abs(), torch.finfo(price.dtype).tiny
    enters, order = torch.where(up > 0, away / up, torch.inf).sort(1)
    held, kept = (t.square().gather(1, order).cumsum(1) for t in (up, away))
    reached = (enters.square() * held - kept < price[:, None]) & enters.isfinite()
    last = (reached.sum(1, keepdim=True) - 1).clamp_min(0)
    held, kept = (t.gather(1, last)[:, 0] for t in (held, kept))
    return (held / (16 * (price + kept)).clamp_min(tiny)).sqrt().clamp(1e-30, 1e30)


def _relaxed(u: Tensor, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """s, and Σ p (N,). At the best t both parabolas are the same, p = max(0, u/2 - 2λ|z|)²/4λ, whose derivative is taken."""
    lam_, away, up = column(lam, z), z.abs(), u.clamp_min(0)
    even = (up / 2 - 2 * lam_ * away).clamp_min(0).square()
    with torch.no_grad():
        t = (0.5 - 2 * lam_ * away / up.clamp_min(torch.finfo(u.dtype).tiny)).clamp_min(0) * (up > 0)
        kept, crossed = (up * t).square(), (up * (1 - t)).square() - 4 * lam_ * up * away
        larger = torch.maximum(kept, crossed) - even
    return torch.where(z > 0, 1 - t, t), (even + larger).flatten(1).sum(1) / (4 * lam)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ (N,)."""
    return (a * b).flatten(1).sum(1)


def _inner_off(a: _Known, b: _Known) -> Tensor:
    """How far ⟨a, b⟩ may be off by rounding (N,), for an exact a: b's own, and that of the sum (Higham 2002, §3.1)."""
    assert b.off is not None
    return sizes(a.value) * (b.off + a.value[:1].numel() * 2.0**-52 * sizes(b.value))


def _square(a: Tensor) -> Tensor:
    """‖a‖² (N,)."""
    return a.flatten(1).square().sum(1)


def _squared_norm(flow: GradientFlow) -> float:
    """‖A‖² from above."""
    norm = sound_norm(flow.linear)
    return times(norm, norm)


def _leak(activation: nn.Module) -> float | None:
    """The slope below 0 of a ReLU or leaky ReLU, in [0, 1]; None for another σ."""
    if type(activation) is nn.ReLU:
        return 0.0
    if type(activation) is nn.LeakyReLU and 0 <= activation.negative_slope <= 1:
        return float(activation.negative_slope)
    return None


def _scaled(factor: float | Tensor, a: Tensor) -> Tensor:
    """One number, or one for each sample, times a."""
    return a * (column(factor, a) if isinstance(factor, Tensor) else factor)


# ------------------------------------------------------------------------------------------------------------------- tracers


@tracer(nn.Sequential)
def _sequential(module: nn.Sequential, x: Tensor, sound: bool) -> Trace:
    parts: list[_Part] = []
    for child in module:
        inner = trace(child, x, sound)
        parts, x = [*parts, *inner.parts], inner.output
    return Trace(parts, x, sound)


@tracer(GradientFlow)
def _flow(flow: GradientFlow, x: Tensor, sound: bool) -> Trace:
    leak, linear = _leak(flow.activation), flow.linear
    assert leak is not None
    forward = adjoint = absolute = offset = 0.0
    square: float | Tensor
    if flow.training and sound:
        raise Refused(
            "GradientFlow is in training mode, where its step follows an estimate: call .eval(), or trace with sound=False"
        )
    if flow.training:
        square = flow.control.squared_norm(linear, homogeneous)
        h, n = flow.control.training_step(square, flow._steepest, flow.tableau)
    else:
        h, n = flow.step()
        square = _squared_norm(flow)
        if sound:
            there, back = linear_maps(linear, tuple(x.shape[1:]), sound_norm(linear))
            forward, adjoint = (m.rounding(UNIT[torch.float64]) for m in (there, back))
            absolute, offset = there.absolute, there.bias
    # of a layer that is not torch's own Ax is (Ax + b) - b: twice the operations, and what b rounds away
    again, drift = (1, 0.0) if is_torch(linear) else (2, 4 * forward * offset)

    def apply(t: Tensor) -> Tensor:
        return homogeneous(linear, t)[0].to(t.dtype)

    parts: list[_Part] = []
    overlaps = None
    if x.ndim == 2 or not isinstance(linear, nn.Linear):
        overlaps = _overlaps(linear, remember=not flow.training)
    for _ in range(n):
        z, transposed = affine(linear, x)
        off = forward * (absolute * sizes(x) + offset) if sound else torch.zeros(())

        def transpose(s: Tensor, scale: float | Tensor = 1.0, transposed: Pullback = transposed) -> Tensor:
            return transposed(s, scale).to(s.dtype)

        parts.append(
            _Bent(
                apply,
                transpose,
                square,
                h,
                leak,
                z.to(x.dtype),
                again * forward * absolute,
                adjoint * absolute,
                off,
                drift,
                overlaps,
            )
        )
        x = x + transpose(flow.activation(z), -h).to(x.dtype)
    return Trace(parts, x, sound)


@tracer(MaxMin)
def _maxmin(module: MaxMin, x: Tensor, sound: bool) -> Trace:
    """(x_1, x_2) ↦ (x_1 + σ(x_2 - x_1), x_2 - σ(x_2 - x_1)): A takes x_2 - x_1, ‖A‖² = 2."""

    def difference(t: Tensor) -> Tensor:
        first, second = t.chunk(2, 1)
        return second - first

    rounding = 2 * gamma(2, UNIT[torch.float64]) if sound else 0.0
    off = rounding * sizes(x) if sound else torch.zeros(())
    bent = _Bent(difference, lambda s: torch.cat((-s, s), 1), 2.0, 1.0, 0.0, difference(x), rounding, rounding, off)
    return Trace([bent], module(x), sound)


@tracer(nn.Identity)
def _identity(module: nn.Identity, x: Tensor, sound: bool) -> Trace:
    return Trace([], x, sound)


@tracer(nn.Flatten, nn.PixelUnshuffle)
def _rearranged(module: nn.Module, x: Tensor, sound: bool) -> Trace:
    shape = x.shape[1:]
    if isinstance(module, nn.PixelUnshuffle):
        factor = module.downscale_factor
        return Trace([Rigid(module, lambda v: F.pixel_shuffle(v, factor))], module(x), sound)
    return Trace([Rigid(module, lambda v: v.reshape(-1, *shape))], module(x), sound)
