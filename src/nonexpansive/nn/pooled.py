"""A learned activation that looks at groups of channels together: the gradient of a convex function of their energies.

Elementwise shrinkage decides each coefficient alone. Where several are large together, as the colours, or the orientations of one
edge, are, it shrinks too much: the amplitude √(Σ z²) of a group tells structure from noise better than each |z|.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.math.activation import TRANSCENDENTAL, Slopes
from nonexpansive.math.rounding import up
from nonexpansive.nn.spline import LEVEL_FLOOR, finite, relative_level

PACE = 4.0
"""The parameters are stored as fractions 1/PACE of the logits and logarithms that they stand for (a power of 2, so that this rounds
nothing). Adam moves each parameter by about the learning rate a step: at the rate that suits a convolution's weights, logits crawl."""

FLOOR = 1e-8
"""ε in the energies: keeps the amplitude's gradient finite at 0."""


LEAST, LARGEST = 1e-6, 1e25
"""A smaller n and a larger τ count as these in T = s p τ/n, so that T is finite; n T ≤ s p τ remains."""


class PooledRamps(nn.Module):
    """σ(z)_j = z_j·(w_j + Σ_i W_ij s_i), s_i = Σ_k c_ki min(1, τ_ki/r_i), r_i = √(Σ_j W_ij z_j² + ε), for inputs (B, C, ...).

    The channels j (axis 1) have shares W_ij ≥ 0 in G groups i, learned, whose amplitudes r_i are compared with thresholds. With
    one group a channel and W the identity this is Σ_k c_k clip(z, -τ_k, τ_k).

    σ = ∇Γ with Γ(z) = ½Σ_j w_j z_j² + Σ_ik c_ki H_ki(r_i), H' = min(r, τ). Each term's gradient is D·P(Dz), D = diag(√W_i·), where
    P takes z to the part in C of the nearest point to (z, √ε) in the ball of radius τ: P is the gradient of a convex function
    and non-expansive. So Γ is convex and its Hessian lies between 0 and diag(w_j + Σ_i W_ij Σ_k c_ki) ≤ 1: in a gradient flow
    σ does all that a non-decreasing elementwise σ with slopes in [0, 1] does.

    (w, W) = softmax over the groups and the share w that is left alone, c = softmax over k, τ_ki = exp(θ_ki) level^ψ_ki with ψ =
    softplus(·) ≥ 0. Learned: the logits of both, θ and ψ. ``ramps`` is the number of k; ``threshold`` the scale of the initial τ, in
    the units of z; channel j begins in group j modulo G.
    """

    def __init__(self, channels: int, groups: int, ramps: int = 2, threshold: float = 0.1) -> None:
        super().__init__()
        if channels < 1 or groups < 1 or ramps < 1 or not threshold > 0:
            raise ValueError("needs channels ≥ 1, groups ≥ 1, ramps ≥ 1 and a threshold > 0")
        spread = torch.linspace(-0.5, 1.0, ramps) if ramps > 1 else torch.zeros(1)
        shares = torch.zeros(1 + groups, channels)
        shares[0] = -3.0
        shares[1 + torch.arange(channels) % groups, torch.arange(channels)] = 2.0 + 0.5 * math.log(groups)
        self.shares = nn.Parameter(shares / PACE)
        self.mixture = nn.Parameter(torch.zeros(ramps, groups))
        self.log_threshold = nn.Parameter((math.log(threshold) + spread)[:, None].repeat(1, groups) / PACE)
        self.sensitivity = nn.Parameter(torch.full((ramps, groups), math.log(math.e - 1) / PACE))  # ψ = 1: τ ∝ level

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """w (C), W (G, C) and c (K, G)."""
        w = _shares(self.shares)
        return w[0], w[1:], self.weights()

    def weights(self) -> Tensor:
        """c (K, G)."""
        return _shares(self.mixture)

    def forward(self, z: Tensor, level: float | Tensor | None = None) -> Tensor:
        """σ(z) at a level given as a number or (B,) tensor, relative to a reference (None: 1). Shape and dtype as z's.

        Raises ValueError if z has not C channels along axis 1 or the levels are neither 1 nor B.
        """
        square = self._square(z)
        w, pool, c = self._tables(square)
        tau = self._thresholds(square, level).to(z.dtype)
        inverse = (F.conv2d(square, pool) + FLOOR).rsqrt()
        s = sum(c_k * (inverse * tau_k).clamp(max=1.0) for c_k, tau_k in zip(c, tau, strict=True))
        factor = F.conv2d(s, pool.transpose(0, 1), w)  # type: ignore[arg-type]
        return z * factor.reshape(z.shape)

    def derivative(self, z: Tensor, level: float | Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """v ↦ σ'(z)v, for v of z's shape: with φ_i = Σ_j W_ij z_j v_j,

        (σ'(z)v)_j = v_j(w_j + Σ_i W_ij s_i) + z_j Σ_i W_ij e_i φ_i,  e_i = ∂s_i/∂r_i / r_i = -Σ_k {c_ki τ_ki/r_i³: τ_ki < r_i}.
        """
        square = self._square(z)
        w, pool, c = self._tables(square)
        inverse = (F.conv2d(square, pool) + FLOOR).rsqrt()
        s, e = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for c_k, tau_k in zip(c, self._thresholds(square, level).to(z.dtype), strict=True):
            ratio = inverse * tau_k
            s += c_k * ratio.clamp(max=1.0)
            e -= c_k * ratio.masked_fill(ratio >= 1, 0.0)
        e *= inverse.square()
        back, state = pool.transpose(0, 1), z.reshape(square.shape)
        factor = F.conv2d(s, back, w)

        def apply(v: Tensor) -> Tensor:
            v_ = v.reshape(square.shape)
            return torch.addcmul(v_ * factor, state, F.conv2d(e * F.conv2d(state * v_, pool), back)).reshape(v.shape)

        return apply

    def potential(self, z: Tensor, level: float | Tensor | None = None) -> Tensor:
        """Γ(z) of each sample, (B,), in float64: H(r) = ½r² up to τ, and τr - ½τ² beyond."""
        square = self._square(z.double())
        w, pool, c = (table.double()[..., None, None] for table in self.tables())
        r = (F.conv2d(square, pool) + FLOOR).sqrt()
        total = (w * square).sum((1, 2, 3)) / 2
        for c_k, tau in zip(c, self._thresholds(square, level), strict=True):
            total = total + (c_k * torch.where(r < tau, r * r / 2, tau * (r - tau / 2))).sum((1, 2, 3))
        return total

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w (C) and, to broadcast against (B, C, H, W), W (G, C, 1, 1) and c (K, G, 1, 1), in the type of ``like``."""
        w, pool, c = (table.to(like.dtype) for table in self.tables())
        return w, pool[..., None, None], c[..., None, None]

    def _square(self, z: Tensor) -> Tensor:
        """z², (B, C, H, W). Raises ValueError for another number of channels."""
        if z.ndim < 2 or z.shape[1] != self.shares.shape[1]:
            raise ValueError(f"expects {self.shares.shape[1]} channels along axis 1, not shape {tuple(z.shape)}")
        return z * z if z.ndim == 4 else (z * z).reshape(*z.shape[:2], -1, 1)

    def _thresholds(self, like: Tensor, level: float | Tensor | None) -> Tensor:
        """τ (K, B or 1, G, 1, 1)."""
        theta, psi = (
            p[:, None, :, None, None] for p in (PACE * self.log_threshold, F.softplus(PACE * self.sensitivity))
        )
        return (theta + psi * relative_level(level, like, theta).log()).exp()

    def slope_range(self) -> Slopes:
        """Γ's Hessian lies in [0, 1] at every level; in evaluation mode the tables are looked at, and Refused is raised if they are
        not numbers.

        Rounding, for levels up to 1/LEVEL_FLOOR and in evaluation mode. Every quantity but z is a sum of products of positive numbers, so
        relative errors add up: of a softmax of n entries 3n + 26 with its margin; of the energies C + 4 and of W; of 1/√ half of that
        and its own; of the thresholds, as in ClippedRamps; of s, K + 2 and of c; of the last sum G + 3 and of W again; 1 for the product.
        """
        bounds = finite(self, Slopes(0.0, 1.0))
        return bounds if self.training else self._read(bounds)

    def _read(self, bounds: Slopes) -> Slopes:
        """``bounds`` for the tables as they are."""
        w, pool, c = (table.detach().double() for table in self.tables())
        rises, size = (_largest(w, pool, parts) for parts in (c.clamp(min=0), c.abs()))
        falls = _largest(torch.zeros_like(w), pool, (-c).clamp(min=0)) if bool((c < 0).any()) else 0.0
        (groups, channels), ramps = pool.shape, len(c)
        theta = PACE * float(self.log_threshold.detach().abs().max())
        psi = float(F.softplus(PACE * self.sensitivity.detach()).max())
        argument = theta - math.log(LEVEL_FLOOR) * psi * (2 * TRANSCENDENTAL + 2) + 2 * psi
        shares = 3 * (groups + 1) + 26
        ulps = (channels + 4 + shares) / 2 + TRANSCENDENTAL  # r
        ulps += argument + TRANSCENDENTAL + ramps + 3 + 3 * ramps + 26  # τ and s
        ulps += groups + 3 + shares + 1
        return replace(bounds, low=0.0 - falls, high=max(1.0, rises), ulps=1.01 * ulps * max(1.0, size))

    def extra_repr(self) -> str:
        return f"channels={self.shares.shape[1]}, groups={self.mixture.shape[1]}, ramps={len(self.log_threshold)}"


class SignedRamps(PooledRamps):
    """:class:`PooledRamps` with free c_ki of any sign, which begin as 1/K: Γ need not be convex, nor σ monotone.

    The Hessian of Γ lies between -diag(Σ_i W_ij Σ_k max(0, -c_ki)) and diag(w_j + Σ_i W_ij Σ_k max(0, c_ki)). What convexity costs is
    seen by training with it and without; a gradient flow takes it under the control "unconstrained", or a LipschitzStep.
    """

    def weights(self) -> Tensor:
        return PACE * self.mixture + 1 / len(self.mixture)

    def slope_range(self) -> Slopes:
        """Of the tables as they are, in training mode too; else as for PooledRamps, rounding in proportion to Σ_i W_ij Σ_k |c_ki|.

        No margin is taken off these c: what the computed tables miss of the exact ones, less than σ's own rounding, is added.
        """
        read = self._read(finite(self, Slopes(0.0, 1.0)))
        missed = read.ulps * torch.finfo(self.mixture.dtype).eps
        return replace(read, low=read.low - missed, high=up(read.high + missed))


class WeaklyConvexRamps(PooledRamps):
    """:class:`PooledRamps` whose every ramp has one that falls: σ(z)_j = z_j·(w_j + Σ_i W_ij Σ_k f_ki(r_i)/r_i) with

        f_ki(r) = p_ki min(r, τ_ki) - n_ki min(r, T_ki),  0 ≤ n_ki ≤ p_ki,  Σ_k p_ki ≤ ``rise``,  Σ_k n_ki ≤ ``modulus`` < 1.

    σ rises steeply up to τ and then falls slowly, by a part s ∈ [0, 1] of what it rose, n T = s p τ, so that large coefficients are
    left alone. Γ is not convex, but Γ + ½·modulus·‖·‖² is: Γ's Hessian lies between -modulus·I and diag(w_j + Σ_i W_ij Σ_k p_ki)
    ≤ max(1, rise), since Σ_i W_ij ≤ 1. And Γ ≥ 0: f is concave on [0, T], 0 at 0 and not negative at T or beyond. (Slopes of
    both signs, weakly convex: Goujon, Neumayer & Unser 2024, arXiv:2308.10542.) For a :class:`~nonexpansive.nn.implicit.Resolvent`.
    A ``modulus`` of 0 leaves the falls out, and Γ is convex.

    p = rise·softmax and n = min(p, modulus·softmax), each over k and a share that is left out, s = sigmoid. ``threshold``: the first
    τ to begin with, which double from ramp to ramp.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        ramps: int = 2,
        threshold: float = 0.1,
        modulus: float = 0.9,
        rise: float = 12.0,
    ) -> None:
        super().__init__(channels, groups, ramps, threshold)
        if not 0 <= modulus < 1 or not 0 < rise < math.inf:
            raise ValueError(f"needs a modulus in [0, 1) and a finite rise > 0, not {modulus} and {rise}")
        self.modulus, self.rise = modulus, rise
        self.mixture = nn.Parameter(torch.zeros(1 + ramps, groups))
        with torch.no_grad():
            self.mixture[0] = math.log(ramps) / PACE  # half of the rise is left out
            self.log_threshold.copy_(math.log(threshold) / PACE + math.log(2) / PACE * torch.arange(ramps)[:, None])
        self.falls = nn.Parameter(torch.zeros(1 + ramps, groups)) if modulus else None
        self.returns = nn.Parameter(torch.zeros(ramps, groups)) if modulus else None

    def weights(self) -> Tensor:
        return self._rise() if self.falls is None else torch.cat([self._rise(), -self._fall()])

    def _rise(self) -> Tensor:
        """p (K, G)."""
        return self.rise * _shares(self.mixture)[1:]

    def _fall(self) -> Tensor:
        """n (K, G)."""
        assert self.falls is not None
        return torch.minimum(self.modulus * _shares(self.falls)[1:], self._rise())

    def _thresholds(self, like: Tensor, level: float | Tensor | None) -> Tensor:
        tau = super()._thresholds(like, level).clamp(max=LARGEST)
        if self.returns is None:
            return tau
        share = (PACE * self.returns).sigmoid() * (
            1 - 4 * torch.finfo(self.returns.dtype).eps
        )  # n T ≤ p τ as computed, too
        ratio = share * (self._rise() / self._fall().clamp_min(LEAST))
        return torch.cat([tau, ratio[:, None, :, None, None] * tau])

    def slope_range(self) -> Slopes:
        """The lower end is -modulus whatever the parameters; the upper one that of the tables as they are, in training mode too.

        Rounding as for PooledRamps; of T besides: of τ's factor that of two softmaxes, a sigmoid with its margin, and six operations.
        """
        read = self._read(finite(self, Slopes(0.0, 1.0)))
        shares = 3 * len(self.mixture) + 26
        ulps = read.ulps + 1.01 * (2 * shares + TRANSCENDENTAL + 14) * max(1.0, self.rise + self.modulus)
        return replace(
            read, low=0.0 - self.modulus, high=up(read.high + ulps * torch.finfo(self.mixture.dtype).eps), ulps=ulps
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, modulus={self.modulus:g}, rise={self.rise:g}"


def _shares(logits: Tensor) -> Tensor:
    """The softmax along the first axis, moved down by its own rounding error so that no sum exceeds 1."""
    return (PACE * logits).softmax(0) * (1 - (len(logits) + 3) * torch.finfo(logits.dtype).eps)


def _largest(own: Tensor, pool: Tensor, parts: Tensor) -> float:
    """The largest over j of own_j + Σ_i W_ij Σ_k parts_ki, rounded up."""
    within = [up(math.fsum(column)) for column in parts.T.tolist()]
    return max(
        up(math.fsum([first, *(share * whole for share, whole in zip(column, within, strict=True))]))
        for first, column in zip(own.tolist(), pool.T.tolist(), strict=True)
    )
