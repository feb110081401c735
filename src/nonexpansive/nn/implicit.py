"""Implicit Euler on the gradient flow: the resolvent, or proximal map, firmly non-expansive for every step size if V is convex."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.math.activation import activation as find_activation
from nonexpansive.math.activation import slopes, speaks_of
from nonexpansive.math.enclosure import column
from nonexpansive.math.rounding import above, down, times, up
from nonexpansive.nn.control import SMALLEST, NormControl, sound_norm
from nonexpansive.nn.linear import affine, homogeneous, probe_shape

PRESUMED = 0.6
"""The quick solver is given up after the iterations in which the sure one would be done, were m no smaller than this."""

REFERENCE = 1.0
"""The tolerance is relative to ‖x‖, or to this norm where x is smaller: at x = 0 nothing could meet a relative one."""


class Resolvent(nn.Module):
    """z = (I + h∇V)⁻¹(x), the solution of z + hAᵀσ(Az + b) = x, which is argmin_z ½‖z - x‖² + hV(z): the proximal map of hV.

    V(z) = 1ᵀγ(Az + b), γ' = σ. Maps (B, *shape) to (B, *shape).

    - σ that nowhere decreases makes V convex: z is firmly non-expansive in x for every h > 0; more precisely
      1/(2 + 2ν/h)-averaged with ν = 1/(L_σ‖A‖²).
    - σ with slopes from -l makes V weakly convex. As long as μ = hl‖A‖² < 1 the minimiser is unique all the same, and 1/(1 - μ)-
      Lipschitz in x. It is not averaged, but what it is, the proximal map of a function that does not depend on x, makes
      Plug-and-Play descend on an objective (:class:`nonexpansive.restore.Descent`).

    F(z) = z + h∇V(z) - x is m-strongly monotone, m = 1 - μ, hence the error of any z is at most ‖F(z)‖/m: the solver stops, sample by
    sample, once ‖F(z)‖ ≤ m·``tolerance``·max(‖x‖, 1), so the result deviates from the exact resolvent by no more than
    ``tolerance``·max(‖x‖, 1) (plus 1/m of the rounding of one evaluation of F). The gradient is that of the exact solution, by the
    implicit function theorem: conjugate gradients on I + h∇²V, symmetric and at least m, to the same relative tolerance; its
    memory does not depend on the iterations.

    ``linear`` and ``activation``: A, b and σ, as for ``GradientFlow``, σ a gradient, whose method ``derivative(t, *level)``, if it has one,
    gives v ↦ σ'(t)v; ``step``: h. With ``relative``, h is
    ``step``/‖A‖² instead, for a bound on ‖A‖ (in training mode an estimate): μ = ``step``·l whatever the weights become.

    Raises Refused if μ is not below 1 or the norm of A is not known, BadInput for a step or tolerance out of range or an input that is
    not finite, Diverging if the solver misses the tolerance within the iterations that suffice in theory.
    """

    def __init__(
        self,
        linear: nn.Module,
        activation: str | nn.Module = "relu",
        step: float = 1.0,
        tolerance: float = 1e-5,
        relative: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < step < math.inf or not 0 < tolerance < 1:
            raise BadInput(f"needs a finite step h > 0 and a tolerance in (0, 1), not {step} and {tolerance}")
        self.linear = linear
        self.activation = find_activation(activation)
        self.step = float(step)
        self.tolerance = float(tolerance)
        self.estimate = NormControl() if relative else None
        self.curvature(sound_norm(linear))
        if self.estimate is not None:
            self.estimate.attach(linear, probe_shape(linear))
            self.estimate.warm_up(linear, homogeneous)

    def deviation(self, norm: float) -> float:
        """The largest distance of the result from the exact resolvent of an input of that norm, in exact arithmetic."""
        return self.tolerance * max(norm, REFERENCE)

    def potential(self, z: Tensor, *level: Tensor | float) -> Tensor:
        """hV(z) of each sample, (B,), in float64, up to a constant, for a σ that has a ``potential``; in evaluation mode."""
        with torch.autocast(z.device.type, enabled=False):
            t, _ = affine(self.linear, z.to(next((p.dtype for p in self.linear.parameters()), z.dtype)))
            value = self.activation.potential(t, *level)  # type: ignore[operator]
        return self.length(sound_norm(self.linear)) * value

    def length(self, norm: float) -> float:
        """h, for ‖A‖ ≤ ``norm``."""
        return self.step if self.estimate is None else down(self.step / max(times(norm, norm), SMALLEST))

    def curvature(self, norm: float) -> tuple[float, float]:
        """(m, κ): F is m-strongly monotone and κ-Lipschitz, for ‖A‖ ≤ ``norm``. Raises Refused if m is not positive."""
        slope = slopes(self.activation)
        reach = self.step if self.estimate is not None else times(self.step, times(norm, norm))
        m, kappa = down(1 - times(reach, max(0.0, -slope.low))), up(1 + times(reach, max(0.0, slope.high)))
        if not m > 0:
            raise Refused(
                f"{self.activation} decreases with slopes down to {slope.low:g}; times h‖A‖² ≤ {above(reach)} that is not below 1, so the"
                " resolvent need not exist. Use a non-decreasing activation, a shorter step, or relative=True"
            )
        return m, kappa

    @torch.compiler.disable
    def forward(self, x: Tensor, *level: Tensor | float, near: Tensor | None = None) -> Tensor:
        """x (B, *shape) → (B, *shape); ``level`` is passed on to an activation that takes a noise level.

        ``near`` (B, *shape), what is known to lie near the solution, is where the solver begins, in place of x: it saves time, and
        what is promised of the result is the same.
        """
        dtype = next((p.dtype for p in self.linear.parameters()), x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            start = x.to(dtype)
            h, norms = self._lengths(start)
            length = float(h.detach()) if isinstance(h, Tensor) else h
            first = start if near is None else near.to(dtype)
            if first.shape != start.shape:
                raise BadInput(f"the solver is to begin near {tuple(first.shape)}, but x is {tuple(start.shape)}")
            z, condition = self._solve(start.detach(), first.detach(), length, norms, *level)
            if torch.is_grad_enabled():
                y = start - self._gradient(z, h, *level)  # = z, as a function of x and the weights at fixed z
                if y.requires_grad:
                    # the weights of now, which functional_call has put here for the time of this call only
                    held = {**dict(self.named_parameters()), **dict(self.named_buffers())}
                    held = {f"resolvent.{name}": value for name, value in held.items()}
                    derivative = _Derivative(self)
                    z = _Implicit.apply(
                        y, z, lambda g: functional_call(derivative, held, (g, z, length, condition, *level))
                    )
            return z.to(x.dtype)

    def _lengths(self, x: Tensor) -> tuple[float | Tensor, list[Callable[[], float]]]:
        """h, and values for ‖A‖ in the order in which the solver tries them. Training starts with an estimate."""

        def bound() -> float:
            return sound_norm(self.linear)

        if not self.training:
            return self.length(bound()), [bound]
        if self.estimate is None:
            return self.step, [lambda: 1.1 * _estimate(self.linear, x), bound]
        squared = self.estimate.squared_norm(self.linear, homogeneous)
        return (self.step / squared.clamp_min(SMALLEST)).to(x.dtype), [lambda: math.sqrt(float(squared.detach()))]

    def _gradient(self, z: Tensor, h: float | Tensor, *level: Tensor | float) -> Tensor:
        """h∇V(z) = hAᵀσ(Az + b)."""
        t, pullback = affine(self.linear, z)
        return pullback(self.activation(t, *level), h)

    @torch.no_grad()
    def _solve(
        self, x: Tensor, start: Tensor, h: float, norms: list[Callable[[], float]], *level: Tensor | float
    ) -> tuple[Tensor, float]:
        """z, found from ``start``, and the condition number κ/m for its derivative. :class:`_QuasiNewton` is tried first; the samples for
        which that, or an estimate of ‖A‖, fails are solved by :class:`_Nesterov`."""
        worst = math.inf
        for norm in norms:
            m, kappa = self.curvature(norm())
            if self.training and self.estimate is not None:
                kappa *= 1.1  # for what the estimate is short of ‖A‖²
            target = m * self.tolerance * _norms(x).clamp_min(REFERENCE)
            for advance, convexity in ((_QuasiNewton(kappa), max(m, PRESUMED)), (_Nesterov(m, kappa), m)):
                z, ratios = self._iterate(x, start, target, h, advance, kappa / convexity, *level)
                solved = ratios <= 1
                if bool(solved.all()):
                    return z, kappa / m
                worst = float(ratios.max())
                start = torch.where(column(solved, x), z, x)
        raise Diverging(
            f"the resolvent's residual is {worst:.3g} times its tolerance {self.tolerance:g} after the iterations that"
            f" suffice in exact arithmetic: {x.dtype} cannot resolve it for a step of {h:.3g}. Raise the"
            " tolerance, lower the step, or use float64"
        )

    def _iterate(
        self,
        x: Tensor,
        start: Tensor,
        target: Tensor,
        h: float,
        advance: _Nesterov | _QuasiNewton,
        condition: float,
        *level: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """From ``start``: the solutions, and the ratios (B,) of their residuals to the targets. A sample does not feel the others: it
        leaves once it is solved, or has had the iterations that suffice :class:`_Nesterov` at that κ/m."""
        root = math.sqrt(condition)
        solutions, reached = start.clone(), torch.zeros_like(target)
        rows, y, most, k = torch.arange(len(x), device=x.device), start, torch.zeros_like(target), 0
        while len(rows):
            residual = y - x + self._gradient(y, h, *level)
            ratios = _norms(residual) / target
            if k == 0:
                if not bool(ratios.isfinite().all()):
                    raise BadInput("the input or the weights of a resolvent are not finite")
                # with q = κ/m: ‖F(y_k)‖ ≤ 3√2 q (1 - 1/√q)^{(k-1)/2} ‖F(y_0)‖, from f(z_k) - f* ≤ (1 - 1/√q)^k ‖F(y_0)‖²/m
                most = 1 + (2 * root * (3 * math.sqrt(2) * condition * ratios.clamp_min(1.0)).log()).ceil()
            active = (ratios > 1) & (k < most)
            if not bool(active.all()):
                solutions[rows[~active]], reached[rows[~active]] = y[~active], ratios[~active]
                rows, x, y, residual, target, most = (v[active] for v in (rows, x, y, residual, target, most))
                level = _of(level, active)
                advance.keep(active)
            k += 1
            y = advance(y, residual)
        return solutions, reached

    @torch.no_grad()
    def _solve_linear(self, g: Tensor, z: Tensor, h: float, condition: float, *level: Tensor | float) -> Tensor:
        """u with (I + hAᵀDA)u = g, D the symmetric derivative of σ, by conjugate gradients on each sample, to ‖residual‖ ≤
        tolerance·‖g‖."""
        derivative, pullback = self._linearise(z, *level)
        squared = _norms(g) ** 2
        target, rho = self.tolerance**2 * squared, squared
        u, r, p = torch.zeros_like(g), g, g
        if not bool(torch.isfinite(squared).all()):
            raise BadInput("the gradient that reaches a resolvent is not finite")
        solutions, rows = torch.zeros_like(g), torch.arange(len(g), device=g.device)
        # with q = κ/m: ‖r_k‖ ≤ 2√q (1 - 2/(√q + 1))^k ‖g‖; twice that, as rounding delays it and κ may have been estimated
        root = math.sqrt(condition)
        most = 10 + math.ceil(root + 1) * math.ceil(math.log(2 * root / self.tolerance))
        for _ in range(most):
            active = rho > target
            if not bool(active.all()):  # a sample that is solved leaves
                solutions[rows[~active]] = u[~active]
                rows, z, u, r, p, rho, target = (v[active] for v in (rows, z, u, r, p, rho, target))
                if not len(rows):
                    return solutions
                level = _of(level, active)
                derivative, pullback = self._linearise(z, *level)
            image = p + pullback(derivative(_linear_part(self.linear, p)), h)
            a = _factor(rho / _dot(p, image), g)
            u, r = u + a * p, r - a * image
            old, rho = rho, _norms(r) ** 2
            p = r + _factor(rho / old, g) * p
        raise Diverging(
            f"conjugate gradients for the resolvent's derivative miss the tolerance {self.tolerance:g} in"
            f" {g.dtype}: raise the tolerance, lower the step, or use float64"
        )

    def _linearise(self, z: Tensor, *level: Tensor | float) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
        """v ↦ σ'(Az + b)v, of the activation's own ``derivative`` where it has one, and the pullback of A."""
        t, pullback = affine(self.linear, z)
        if speaks_of(type(self.activation), "derivative"):
            return self.activation.derivative(t, *level), pullback  # type: ignore[operator]
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            sigma = self.activation(t.clone(), *level)
        return lambda v: torch.autograd.grad(sigma, t, v, retain_graph=True)[0], pullback

    def extra_repr(self) -> str:
        relative = ", relative=True" if self.estimate is not None else ""
        return f"step={self.step:g}, tolerance={self.tolerance:g}{relative}"


class _Nesterov:
    """y, F(y) ↦ the next y, for the m-strongly convex, κ-smooth function of which F is the gradient (Nesterov, *Lectures on Convex
    Optimization*, 2.2.22); it stays right for a κ that is too large."""

    def __init__(self, m: float, kappa: float) -> None:
        root = math.sqrt(kappa / m)
        self.kappa, self.momentum = kappa, (root - 1) / (root + 1)
        self.z: Tensor | None = None

    def __call__(self, y: Tensor, residual: Tensor) -> Tensor:
        ahead = y - residual / self.kappa
        before, self.z = self.z, ahead
        return torch.lerp(y if before is None else before, ahead, 1 + self.momentum)

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples (a mask) alone."""
        self.z = None if self.z is None else self.z[rows]


class _QuasiNewton:
    """y, F(y) ↦ the next y, by L-BFGS (Nocedal & Wright, *Numerical Optimization*, algorithm 7.4), each sample by itself; the first
    step is F(y)/κ.

    F is the gradient of a strongly convex f and strongly monotone, so ⟨s, d⟩ > 0, but for rounding, for each of the last MEMORY pairs
    of s = Δy, d = ΔF, and each can be used. Steps p have their full length, but where ⟨F(y + p), p⟩ > OVERSHOT·|⟨F(y), p⟩| f has been
    rising along p for too long: the next y is then where a parabola through both slopes is least. This proves nothing of the
    convergence, and nothing need be proved: F(y) tells who is solved.
    """

    MEMORY = 5
    OVERSHOT = 0.9

    def __init__(self, kappa: float) -> None:
        self.shortest = 1 / kappa
        self.base: tuple[Tensor, Tensor] | None = None  # y and F(y), from where the last step p was taken
        self.step = self.scale = torch.zeros(())
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # s, d and 1/⟨s, d⟩, oldest first

    def __call__(self, y: Tensor, residual: Tensor) -> Tensor:
        if self.base is None:
            self.base, self.step, self.scale = (y, residual), residual * -self.shortest, self.shortest + 0 * y
            return y + self.step
        (y0, residual0), p = self.base, self.step
        d, before, after = residual - residual0, _dot(residual0, p), _dot(residual, p)
        back = column(after > -self.OVERSHOT * before, y)
        product, squared = after - before, _norms(d) ** 2
        usable = product > 0  # not where rounding is all there is
        shorter = _factor((-before / product).where(usable, 1.0), y) * p
        inverse = _factor((1 / product).where(usable, 0.0), y)
        self.pairs = [*self.pairs[1 - self.MEMORY :], (p, d, inverse)]
        self.scale = _factor((product / squared).where(usable, self.shortest), y)
        self.base = (torch.where(back, y0, y), torch.where(back, residual0, residual))
        self.step = torch.where(back, shorter, -self._direction(residual))
        return self.base[0] + self.step

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples (a mask) alone."""
        if self.base is not None:
            self.base = (self.base[0][rows], self.base[1][rows])
            self.step, self.scale = self.step[rows], self.scale[rows]
            self.pairs = [(s[rows], d[rows], inverse[rows]) for s, d, inverse in self.pairs]

    def _direction(self, residual: Tensor) -> Tensor:
        """An approximation of the inverse Jacobian of F, times ``residual``."""
        q, weights = residual, list[Tensor]()
        for s, d, inverse in reversed(self.pairs):
            weights.append(inverse * _factor(_dot(s, q), s))
            q = q - weights[-1] * d
        q = self.scale * q
        for (s, d, inverse), weight in zip(self.pairs, reversed(weights), strict=True):
            q = q + (weight - inverse * _factor(_dot(d, q), d)) * s
        return q


class _Derivative(nn.Module):
    """g ↦ the solution u of (I + hAᵀDA)u = g."""

    def __init__(self, resolvent: Resolvent) -> None:
        super().__init__()
        self.resolvent = resolvent

    def forward(self, *args: Any) -> Tensor:
        return self.resolvent._solve_linear(*args)


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


def _factor(values: Tensor, like: Tensor) -> Tensor:
    """Numbers (B,) in the shape and type in which they are multiplied with (B, *shape)."""
    return column(values.to(like.dtype), like)


def _of(level: tuple[Tensor | float, ...], rows: Tensor) -> tuple[Tensor | float, ...]:
    """The levels of these samples (a mask), where each has its own."""
    own = (isinstance(value, Tensor) and value.numel() == len(rows) > 1 for value in level)
    return tuple(v.reshape(-1)[rows] if mine else v for v, mine in zip(level, own, strict=True))  # type: ignore[union-attr]


def _linear_part(linear: nn.Module, v: Tensor) -> Tensor:
    """Av. The bias is set to zero and not subtracted afterwards, which would cost all digits of a small v."""
    bias = dict(linear.named_parameters(recurse=False)).get("bias")
    if bias is None:
        return homogeneous(linear, v)[0]
    return functional_call(linear, {"bias": torch.zeros_like(bias)}, (v,))


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
