"""Implicit Euler on the gradient flow: the resolvent, firmly non-expansive for every step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nonexpansive.errors import BadInput, Diverging
from nonexpansive.math.activation import activation as find_activation
from nonexpansive.math.activation import monotone
from nonexpansive.nn.control import sound_norm
from nonexpansive.nn.linear import affine, homogeneous

REFERENCE = 1.0
"""The tolerance is relative to ‖x‖, or to this norm where x is smaller: at x = 0 nothing could meet a relative one."""


class Resolvent(nn.Module):
    """z = (I + h∇V)⁻¹(x), the solution of z + hAᵀσ(Az + b) = x, which is argmin_z ½‖z - x‖² + hV(z).

    V(z) = 1ᵀγ(Az + b), γ' = σ, is convex, so z is firmly non-expansive in x for every h > 0; more precisely
    1/(2 + 2ν/h)-averaged with ν = 1/(L_σ‖A‖²). Maps (B, *shape) to (B, *shape).

    F(z) = z + h∇V(z) - x is 1-strongly monotone, hence the error of any z is at most ‖F(z)‖: the solver stops, sample
    by sample, once ‖F(z)‖ ≤ ``tolerance``·max(‖x‖, 1), so the result deviates from the exact resolvent by no more
    than that (plus the rounding of one evaluation of F). The gradient is that of the exact solution, by the implicit
    function theorem: conjugate gradients on I + hAᵀDA, D = σ'(Az + b), to the same tolerance; its memory does not
    depend on the iterations.

    ``linear`` and ``activation``: A, b and σ, as for ``GradientFlow``; ``step``: h.

    Raises Refused if σ may decrease or the norm of A is not known, BadInput for a step or tolerance out of range or
    an input that is not finite, Diverging if the solver misses the tolerance within the iterations that suffice in
    theory.
    """

    def __init__(
        self, linear: nn.Module, activation: str | nn.Module = "relu", step: float = 1.0, tolerance: float = 1e-5
    ) -> None:
        super().__init__()
        if not 0 < step < math.inf or not 0 < tolerance < 1:
            raise BadInput(f"needs a finite step h > 0 and a tolerance in (0, 1), not {step} and {tolerance}")
        self.linear = linear
        self.activation = find_activation(activation)
        self.step = float(step)
        self.tolerance = float(tolerance)
        monotone(self.activation)
        sound_norm(linear)

    def deviation(self, norm: float) -> float:
        """The largest distance of the result from the exact resolvent of an input of that norm, in exact arithmetic."""
        return self.tolerance * max(norm, REFERENCE)

    @torch.compiler.disable
    def forward(self, x: Tensor, *level: Tensor | float) -> Tensor:
        """x (B, *shape) → (B, *shape); ``level`` is passed on to an activation that takes a noise level."""
        dtype = next((p.dtype for p in self.linear.parameters()), x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            start = x.to(dtype)
            z, kappa = self._solve(start.detach(), *level)
            if torch.is_grad_enabled():
                y = start - self._gradient(z, *level)  # = z, as a function of x and the weights at fixed z
                if y.requires_grad:
                    z = _Implicit.apply(y, z, lambda g: self._solve_linear(g, z, kappa, *level))
            return z.to(x.dtype)

    def _gradient(self, z: Tensor, *level: Tensor | float) -> Tensor:
        """h∇V(z) = hAᵀσ(Az + b)."""
        t, pullback = affine(self.linear, z)
        return pullback(self.activation(t, *level), self.step)

    @torch.no_grad()
    def _solve(self, x: Tensor, *level: Tensor | float) -> tuple[Tensor, float]:
        """z and the κ that led to it. Nesterov's method for 1-strongly convex, κ-smooth functions (*Lectures on
        Convex Optimization*, 2.2.22), which stays right for a κ that is too large. Training starts with an estimate
        of ‖A‖; where it fails, the bound decides."""
        target = self.tolerance * _norms(x).clamp_min(REFERENCE)
        ratio = math.inf
        norms = [lambda: 1.1 * _estimate(self.linear, x), lambda: sound_norm(self.linear)]
        for norm in norms if self.training else norms[1:]:
            kappa = 1 + self.step * monotone(self.activation).high * norm() ** 2
            z, ratio = self._descend(x, target, kappa, *level)
            if ratio <= 1:
                return z, kappa
        raise Diverging(
            f"the resolvent's residual is {ratio:.3g} times its tolerance {self.tolerance:g} after the iterations that"
            f" suffice in exact arithmetic: {x.dtype} cannot resolve it for a step of {self.step:g}. Raise the"
            " tolerance, lower the step, or use float64"
        )

    def _descend(self, x: Tensor, target: Tensor, kappa: float, *level: Tensor | float) -> tuple[Tensor, float]:
        """The solution and the largest ratio of residual to target."""
        root = math.sqrt(kappa)
        momentum = (root - 1) / (root + 1)
        column = (-1, *(1 for _ in x.shape[1:]))
        z = y = x
        most = k = 0
        while True:
            residual = y - x + self._gradient(y, *level)
            ratios = _norms(residual) / target
            worst = float(ratios.max()) if len(ratios) else 0.0
            if k == 0:
                if not math.isfinite(worst):
                    raise BadInput("the input or the weights of a resolvent are not finite")
                # ‖F(y_k)‖ ≤ 3√2 κ (1 - 1/√κ)^{(k-1)/2} ‖F(x)‖, from f(z_k) - f* ≤ (1 - 1/√κ)^k ‖F(x)‖²
                most = 1 + math.ceil(2 * root * math.log(3 * math.sqrt(2) * kappa * max(worst, 1.0)))
            if worst <= 1 or k == most or not math.isfinite(worst):
                return y, worst
            k += 1
            ahead = y - residual / kappa
            # a solved sample rests, so that its result does not depend on the others
            active = (ratios > 1).reshape(column)
            y = torch.where(active, torch.lerp(z, ahead, 1 + momentum), y)
            z = ahead

    @torch.no_grad()
    def _solve_linear(self, g: Tensor, z: Tensor, kappa: float, *level: Tensor | float) -> Tensor:
        """u with (I + hAᵀDA)u = g, by conjugate gradients on each sample, to ‖residual‖ ≤ tolerance·‖g‖."""
        t, pullback = affine(self.linear, z)
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.activation(t.clone(), *level).sum(), t)
        column = (-1, *(1 for _ in g.shape[1:]))
        squared = _norms(g) ** 2
        target, rho = self.tolerance**2 * squared, squared
        u, r, p = torch.zeros_like(g), g, g
        if not bool(torch.isfinite(squared).all()):
            raise BadInput("the gradient that reaches a resolvent is not finite")
        # ‖r_k‖ ≤ 2√κ (1 - 2/(√κ + 1))^k ‖g‖; twice that, as rounding delays it and κ may have been estimated
        most = 10 + math.ceil(math.sqrt(kappa) + 1) * math.ceil(math.log(2 * math.sqrt(kappa) / self.tolerance))
        for _ in range(most):
            active = rho > target
            if not bool(active.any()):
                return u
            image = p + pullback(slope * _linear_part(self.linear, p), self.step)
            curvature = _dot(p, image)
            a = torch.where(active, rho / curvature.where(active, 1.0), 0.0).to(g.dtype).reshape(column)
            u, r = u + a * p, r - a * image
            old, rho = rho, torch.where(active, _norms(r) ** 2, rho)
            p = r + torch.where(active, rho / old.where(active, 1.0), 0.0).to(g.dtype).reshape(column) * p
        raise Diverging(
            f"conjugate gradients for the resolvent's derivative miss the tolerance {self.tolerance:g} in"
            f" {g.dtype}: raise the tolerance, lower the step, or use float64"
        )

    def extra_repr(self) -> str:
        return f"step={self.step:g}, tolerance={self.tolerance:g}"


class _Implicit(torch.autograd.Function):
    """y, z, solve ↦ z, with the pullback g ↦ solve(g) for y = x - h∇V(z): (I + h∇²V) dz = dx - h d(∇V)(z)."""

    @staticmethod
    def forward(y: Tensor, z: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.solve = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(grad.device.type, enabled=False):
            return ctx.solve(grad), None, None


def _norms(x: Tensor) -> Tensor:
    """The Euclidean norm of each sample, (B,), summed in float64."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(1).sum(1, dtype=torch.float64)


def _linear_part(linear: nn.Module, v: Tensor) -> Tensor:
    """Av. The bias is set to zero and not subtracted afterwards, which would cost all digits of a small v."""
    bias = dict(linear.named_parameters(recurse=False)).get("bias")
    if bias is None:
        return homogeneous(linear, v)[0]
    return torch.func.functional_call(linear, {"bias": torch.zeros_like(bias)}, (v,))


def _estimate(linear: nn.Module, x: Tensor, iterations: int = 8) -> float:
    """‖A‖ from below, by a power iteration from a fixed start."""
    v = torch.randn(x[:1].shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    norm = 0.0
    for _ in range(iterations):
        size = float(v.norm())
        if size == 0 or not math.isfinite(size):
            break
        image = _linear_part(linear, v / size)
        norm = float(image.norm())
        v = affine(linear, v)[1](image)
    return norm
