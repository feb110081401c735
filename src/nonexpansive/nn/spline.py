"""Learned monotone activations: piecewise linear, one per channel, slopes in [0, 1] by parametrisation.

No optimiser step can leave the constraint, so nothing has to be projected back. Both take an optional ``level`` > 0
(for a denoiser the noise level, as a multiple of a reference) that moves or scales the knots and leaves the slopes as
they are: the bounds hold at every level. Linear splines as learned activations of Lipschitz-constrained networks:
Ducotterd et al. 2024, *Improving Lipschitz-Constrained Neural Networks by Learning Activation Functions*,
arXiv:2210.16222.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from nonexpansive.errors import Refused
from nonexpansive.math.activation import TRANSCENDENTAL, Slopes
from nonexpansive.math.rounding import up

LEVEL_FLOOR = 1e-4
"""Levels below this act as this one, so that level 0 has finite values and gradients."""


def relative_level(level: float | Tensor | None, t: Tensor, like: Tensor) -> Tensor:
    """The level as a tensor with as many axes as t, of size B or 1 along the first and 1 along the others."""
    values = torch.as_tensor(1.0 if level is None else level, dtype=like.dtype, device=like.device)
    if values.numel() not in (1, t.shape[0]):
        raise ValueError(
            f"one level for all samples or one each for {t.shape[0]}, not a tensor of shape {tuple(values.shape)}"
        )
    return values.reshape(-1, *[1] * (t.ndim - 1)).clamp_min(LEVEL_FLOOR)


def _axis(parameter: Tensor, t: Tensor) -> Tensor:
    """(K, C) to (K, 1, C, 1, ...): K tables that broadcast against t along its channel axis."""
    if t.ndim < 2 or t.shape[1] != parameter.shape[1]:
        raise ValueError(f"expects {parameter.shape[1]} channels along axis 1, not an input of shape {tuple(t.shape)}")
    return parameter.reshape(parameter.shape[0], 1, -1, *[1] * (t.ndim - 2))


BLOCK = 2**16
"""Elements per block of the eager computation: small enough for temporaries to stay in a core's cache."""


def _clip_ramps(t: Tensor, w: Tensor, tau: Tensor) -> Tensor:
    """w₀t + Σ_k w_k clip(t, ±τ_k) for t (B, C, ...), w (K + 1, 1, C, 1, ...) and τ (K, b, C, 1, ...), b = 1 or B."""
    y = t * w[0]
    for w_k, tau_k in zip(w[1:], tau, strict=True):
        y = torch.addcmul(y, w_k, torch.maximum(t, -tau_k).minimum(tau_k))
    return y


def _clip_ramps_pullback(grad: Tensor, t: Tensor, w: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pullback: for t, and the same per sample for w (K + 1, B, C, 1, ...) and τ (K, B, C, 1, ...)."""
    axes = [*range(2, t.ndim)]
    total = (lambda x: x.sum(axes, keepdim=True)) if axes else (lambda x: x)
    grad_t, grad_w, grad_tau = grad * w[0], [total(grad * t)], []
    for w_k, tau_k in zip(w[1:], tau, strict=True):
        s = t * tau_k.reciprocal()
        inner = torch.ops.aten.hardtanh_backward(grad, s, -1.0, 1.0)  # grad where |t| < τ_k, else 0
        clipped = total(grad * s.clamp(-1.0, 1.0))
        grad_w.append(clipped * tau_k)
        grad_tau.append((clipped - total(inner * s)) * w_k)  # left over: Σ grad·sign(t) where |t| ≥ τ_k
        grad_t = torch.addcmul(grad_t, w_k, inner)
    return grad_t, torch.stack(grad_w), torch.stack(grad_tau)


class _ClipRamps(torch.autograd.Function):
    """``_clip_ramps``, saving t and the small tables alone, and block by block in eager mode."""

    @staticmethod
    def forward(t: Tensor, w: Tensor, tau: Tensor) -> Tensor:
        blocks = _blocks(t)
        if len(blocks) == 1:
            return _clip_ramps(t, w, tau)
        y = torch.empty_like(t)
        for part in blocks:
            part(y).copy_(_clip_ramps(part(t), part(w, 1), part(tau, 1)))
        return y

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        t, w, tau = ctx.saved_tensors
        blocks = _blocks(t)
        if torch.is_grad_enabled() or len(blocks) == 1:  # to be differentiated again
            grad_t, grad_w, grad_tau = _clip_ramps_pullback(grad, t, w, tau)
        else:
            grad_t = torch.empty_like(t)
            tables = t.shape[:2] + (1,) * (t.ndim - 2)
            grad_w, grad_tau = t.new_zeros(len(w), *tables), t.new_zeros(len(tau), *tables)
            for part in blocks:
                one, two, three = _clip_ramps_pullback(part(grad), part(t), part(w, 1), part(tau, 1))
                part(grad_t).copy_(one)
                part(grad_w, 1).add_(two)
                part(grad_tau, 1).add_(three)
        return grad_t, grad_w.sum_to_size(w.shape), grad_tau.sum_to_size(tau.shape)


def _blocks(t: Tensor) -> list[Callable[..., Tensor]]:
    """Ways to slice t, and tables that broadcast against it, along the outermost axis of t's memory."""
    axis = max(range(t.ndim), key=lambda i: t.stride(i) if t.shape[i] > 1 else -1)
    rows = max(1, BLOCK * t.shape[axis] // max(1, t.numel()))
    if torch.compiler.is_compiling() or rows >= t.shape[axis]:
        return [lambda x, leading=0: x]

    def slicer(start: int) -> Callable[..., Tensor]:
        length = min(rows, t.shape[axis] - start)
        return lambda x, leading=0: x.narrow(axis + leading, start, length) if x.shape[axis + leading] > 1 else x

    return [slicer(start) for start in range(0, t.shape[axis], rows)]


def finite(module: nn.Module, bounds: Slopes) -> Slopes:
    if not module.training and not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
        raise Refused(f"{type(module).__name__} holds parameters that are not finite numbers: it computes no function")
    return bounds


class ClippedRamps(nn.Module):
    """σ(t) = w₀t + Σ_{k=1..K} w_k clip(t, -τ_k, τ_k), per channel (axis 1), for inputs (B, C, ...) of any further axes.

    w = softmax over 0..K, so the slopes lie in [0, Σw] = [0, 1]; τ_k = exp(θ_k) level^ψ_k > 0 with ψ_k = softplus(·)
    ≥ 0, so thresholds may grow with the level, and vanish with it. Odd, σ(0) = 0. Learned: the logits of w, θ and ψ.

    ``ramps`` is K; ``threshold`` the scale of the initial τ_k, in the units of t.
    """

    def __init__(self, channels: int, ramps: int = 2, threshold: float = 0.1) -> None:
        super().__init__()
        if channels < 1 or ramps < 1 or not threshold > 0:
            raise ValueError("needs channels ≥ 1, ramps ≥ 1 and a threshold > 0")
        spread = torch.linspace(-0.5, 1.0, ramps) if ramps > 1 else torch.zeros(1)
        logits = torch.zeros(ramps + 1, channels)
        logits[0] = -3.0
        self.logits = nn.Parameter(logits)
        self.log_threshold = nn.Parameter((math.log(threshold) + spread)[:, None].repeat(1, channels))
        self.sensitivity = nn.Parameter(torch.full((ramps, channels), math.log(math.e - 1)))  # ψ = 1: τ_k ∝ level

    def weights(self) -> Tensor:
        """w, of shape (K + 1, C): softmax, moved down by its own rounding error so that no sum exceeds 1."""
        count = len(self.logits)
        return self.logits.softmax(0) * (1 - (count + 3) * torch.finfo(self.logits.dtype).eps)

    def forward(self, t: Tensor, level: float | Tensor | None = None) -> Tensor:
        """σ(t) at a level given as a number or (B,) tensor, relative to a reference (None: 1). Shape and dtype as t's.

        Raises ValueError if t has not C channels along axis 1 or the levels are neither 1 nor B.
        """
        theta = _axis(self.log_threshold, t)
        psi = nn.functional.softplus(_axis(self.sensitivity, t))
        tau = (theta + psi * relative_level(level, t, self.log_threshold).log()).exp()
        return _ClipRamps.apply(t, _axis(self.weights(), t).to(t.dtype), tau.to(t.dtype))  # type: ignore[return-value]

    def slope_range(self) -> Slopes:
        """Slopes in [0, 1] at every level; in evaluation mode the weights are looked at, and Refused is raised if
        they are not numbers.

        Rounding, for levels up to 1/LEVEL_FLOOR and in evaluation mode: 3 units for the product and the sum of each of
        the n = K + 1 terms, n + 20 for the softmax, 2(n + 3) for its margin, which depends on the type; and, since a
        threshold off by a share ε moves clip(t, ±τ) by at most ε|t|, that of exp(θ + ψ log level): the exponential and
        the logarithm and ψ in its argument count as elementary functions, the latter times |ψ log level|."""
        bounds = finite(self, Slopes(0.0, 1.0))
        if not self.training:
            sums = self.weights().detach().double().T.tolist()
            theta = float(self.log_threshold.detach().abs().max())
            psi = float(nn.functional.softplus(self.sensitivity.detach()).max())
            argument = theta + -math.log(LEVEL_FLOOR) * psi * (2 * TRANSCENDENTAL + 2) + 2 * psi
            ulps = 6 * len(self.logits) + 26 + TRANSCENDENTAL + argument
            bounds = replace(bounds, high=max(1.0, *(up(math.fsum(w)) for w in sums)), ulps=ulps)
        return bounds

    def extra_repr(self) -> str:
        return f"channels={self.logits.shape[1]}, ramps={len(self.log_threshold)}"


class LinearSpline(nn.Module):
    """σ(t) = λ s(t/λ) with s a linear spline on uniform knots, per channel (axis 1), and λ the level.

    s has ``knots`` (odd) knots on [-``range``, ``range``], in the units of t, slopes sigmoid(·) in [0, 1] between them,
    the outermost slopes continued beyond, and s(0) = 0. Learned: the slopes' logits, (knots - 1, C).
    """

    def __init__(self, channels: int, knots: int = 21, range: float = 1.0) -> None:
        super().__init__()
        if channels < 1 or knots < 3 or knots % 2 == 0 or not range > 0:
            raise ValueError("needs channels ≥ 1, an odd number of knots ≥ 3 and a range > 0")
        self.side = knots // 2
        self.spacing = range / self.side
        middle = (torch.arange(knots - 1) + 0.5 - self.side).abs() / self.side
        self.logits = nn.Parameter((2 - 4 * middle)[:, None].repeat(1, channels))

    def tables(self) -> tuple[Tensor, Tensor]:
        """Slopes and intercepts of the line on each interval, both (knots - 1, C). The two intervals that meet at 0
        have intercept 0, and each next one outward follows by continuity at their common knot."""
        slope = self.logits.sigmoid()
        knot = self.spacing * torch.arange(1, self.side, device=slope.device, dtype=slope.dtype)[:, None]
        left, right = slope[: self.side].flip(0), slope[self.side :]
        zero = torch.zeros_like(slope[:1])
        rise = torch.cat([zero, ((right[:-1] - right[1:]) * knot).cumsum(0)])
        fall = torch.cat([zero, ((left[1:] - left[:-1]) * knot).cumsum(0)])
        return slope, torch.cat([fall.flip(0), rise])

    def forward(self, t: Tensor, level: float | Tensor | None = None) -> Tensor:
        """σ(t) at a level given as a number or (B,) tensor (None: 1). Shape and dtype as t's.

        Raises ValueError if t has not C channels along axis 1 or the levels are neither 1 nor B.
        """
        offset = self.side + len(self.logits) * torch.arange(self.logits.shape[1], device=t.device, dtype=torch.int32)
        offset = _axis(offset[None], t)[0]
        scale = None if level is None else relative_level(level, t, self.logits).to(t.dtype)
        u = t if scale is None else t / scale
        with torch.no_grad():  # floor(u/Δ) and not floor((u + range)/Δ), which would lose the sign of a tiny u
            index = (u / self.spacing).nan_to_num_(0.0).clamp_(-self.side, self.side - 0.5).floor_().int() + offset
            # Flattened in memory order, so that channels-last inputs are not copied and outputs keep their layout.
            order = sorted(range(t.ndim), key=lambda i: -t.stride(i))
            flat, shape = index.permute(order).reshape(-1), [t.shape[i] for i in order]
            back = [order.index(i) for i in range(t.ndim)]
        slope, intercept = (
            table.T.reshape(-1).to(t.dtype).index_select(0, flat).reshape(shape).permute(back)
            for table in self.tables()
        )
        y = torch.addcmul(intercept, slope, u)
        return y if scale is None else y * scale

    def slope_range(self) -> Slopes:
        """Slopes in [0, 1] at every level. Rounding, for n knots a side: the intercept of the n-th interval is a sum
        of n terms of at most |t| each."""
        return finite(self, Slopes(0.0, 1.0, ulps=2 * self.side + 8))

    def extra_repr(self) -> str:
        return f"channels={self.logits.shape[1]}, knots={2 * self.side + 1}, range={self.side * self.spacing:g}"
