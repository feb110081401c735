"""How stable a map is seen to be: the differences that it stretches, from below, and what comes of applying it over and over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nonexpansive.errors import Diverging
from nonexpansive.math.certificate import Certificate, Shape, chain, fold, rule
from nonexpansive.nn.resize import Scale

SIZES = (1e-1, 3e1)
"""The distances of the pairs from which the ascent begins lie between these, evenly in their logarithms."""

HALVINGS = 8
"""How often they are halved on the way."""


def jacobian_norm(f: Callable[[Tensor], Tensor], x: Tensor, steps: int = 30, seed: int = 0) -> float:
    """The largest ‖Jv‖, ‖v‖ = 1, seen by a power iteration on JᵀJ, J the Jacobian of f at x: its norm from below."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    pullback = torch.func.vjp(f, x)[1]
    best = 0.0
    for _ in range(steps):
        v = v / v.norm().clamp_min(torch.finfo(x.dtype).tiny)
        u = torch.func.jvp(f, (x,), (v,))[1]
        best = max(best, float(u.norm()))
        (v,) = pullback(u)
    return best


def stretch(f: Callable[[Tensor], Tensor], x: Tensor, size: float, steps: int = 30, seed: int = 0) -> float:
    """The largest ‖f(x + δ) - f(x)‖/‖δ‖ seen for ‖δ‖ = ``size``, f a map that need not be differentiable: a Lipschitz constant from below.

    The next δ is f(x + δ) - f(x), scaled. For a Jacobian that is symmetric, as a proximal map's is, that is a power iteration.
    """
    still, best = f(x), 0.0
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    for _ in range(steps):
        delta = size * delta / delta.norm().clamp_min(torch.finfo(x.dtype).tiny)
        moved = f(x + delta) - still
        best, delta = max(best, float(moved.norm() / delta.norm())), moved
    return best


def steepest(f: Callable[[Tensor], Tensor], x: Tensor, steps: int = 200, seed: int = 0) -> float:
    """The largest ‖f(x+δ) - f(x)‖/‖δ‖ seen on the way of gradient ascent from pairs x, x + δ: a Lipschitz constant from below.

    x (N, *shape), as many starts, float64; f treats them apart. With x held, the steps in δ (to the normalised gradient of
    ‖f(x+δ) - f(x)‖) are, wherever f is linear between the two, those of a power iteration on its Jacobian. Now and then x moves
    uphill, and, :data:`HALVINGS` times, the pair becomes the steeper half of the segment between them, which is at least as steep.
    """

    def ratio(x: Tensor, delta: Tensor) -> Tensor:
        return (f(x + delta) - f(x)).flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)

    random = torch.Generator().manual_seed(seed)
    low, high = (torch.tensor(size, dtype=x.dtype).log() for size in SIZES)
    size = _like((low + (high - low) * torch.rand(len(x), generator=random, dtype=x.dtype)).exp(), x)
    delta = size * _unit(torch.randn(x.shape, generator=random, dtype=x.dtype))
    best = 0.0
    for step in range(steps):
        x, delta = x.detach().requires_grad_(), delta.detach().requires_grad_()
        with torch.enable_grad():
            ratios = ratio(x, delta)
            along, towards = torch.autograd.grad(ratios.clamp_min(1e-300).log().sum(), (x, delta))
        best = max(best, float(ratios.detach().nan_to_num(0.0).max()))
        with torch.no_grad():
            if step % (steps // HALVINGS) == steps // HALVINGS - 1:
                delta, size = delta / 2, size / 2
                x = torch.where(_like(ratio(x + delta, delta) > ratio(x, delta), x), x + delta, x)
                continue
            # the gradient of log ‖f(x+δ) - f(x)‖ alone: that of -log ‖δ‖ taken off again
            delta = size * _unit(towards + delta / _like(delta.flatten(1).norm(dim=1).square(), x))
            if step % 4 == 3:
                x = x + size * (1 - step / steps) * _unit(along)
    return best


def trace(
    iteration: Callable[[Tensor], Tensor],
    start: Tensor,
    clean: Tensor,
    iterations: int,
    watch: Callable[[int], None] = lambda _: None,
) -> tuple[Tensor, Tensor, float]:
    """PSNR and residual (root mean square) of each sample after each iteration, both (B, iterations), and a residual's largest growth.

    A sample whose numbers are no longer finite is given up: its PSNR is then nan and its residual inf, those of the others go on.
    """
    psnr = torch.full((len(start), iterations), torch.nan)
    residual, growth = torch.full_like(psnr, torch.inf), 0.0
    x, before, finite = start, None, torch.ones(len(start), dtype=torch.bool)
    for k in range(iterations):
        with torch.no_grad():
            ahead = iteration(x)
        moved, size = _norm(ahead - x), _norm(ahead).clamp_min(torch.finfo(x.dtype).tiny)
        finite = finite & (moved + size).isfinite()
        if not bool(finite.any()):
            break
        psnr[:, k] = torch.where(finite, psnr_of(ahead, clean), torch.nan)
        residual[:, k] = torch.where(finite, moved / clean[0].numel() ** 0.5, torch.inf)
        if before is not None:
            grown = (moved - 64 * torch.finfo(x.dtype).eps * size) / before.clamp_min(torch.finfo(x.dtype).tiny)
            growth = max(growth, float(grown[finite].max()))
        before = moved
        x = torch.where(finite.view(-1, 1, 1, 1), ahead, 0.0)
        watch(k + 1)
    return psnr, residual, growth


def require_settling(growth: float, averaged: float | None) -> None:
    """Raises Diverging where a residual grew although the iteration is proved to be averaged."""
    if averaged is not None and growth > 1 + 1e-4:
        raise Diverging(
            f"a residual grew {growth:.5g}-fold, which the certificate excludes. This is a defect: please report it with "
            "the model and the settings."
        )


class Amplified(nn.Module):
    """x ↦ factor·D(x, σ), with a factor above 1: no longer non-expansive, the unstable denoiser by construction."""

    def __init__(self, denoiser: nn.Module, factor: float) -> None:
        super().__init__()
        self.denoiser, self.scale = denoiser, Scale(factor)

    def forward(self, noisy: Tensor, sigma: float | Tensor) -> Tensor:
        return self.scale(self.denoiser(noisy, sigma))


@rule(Amplified)
def _amplified(module: Amplified, shape: Shape, unit: float) -> Certificate:
    inner = fold(module.denoiser, shape, unit)
    name = f"Amplified: {module.scale.factor:g} times a denoiser"
    return chain(inner, fold(module.scale, inner.codomain, unit), rule=name)


def psnr_of(x: Tensor, clean: Tensor) -> Tensor:
    """Of each sample, in dB, peak 1, nothing clipped."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(x, clean, data_range=1.0, reduction="none", dim=(1, 2, 3)).reshape(len(x))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _unit(x: Tensor) -> Tensor:
    norm = x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return x / _like(norm, x)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))
