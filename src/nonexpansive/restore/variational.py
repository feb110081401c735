"""Total variation, the classical baseline: convex, convergent, with one weight to tune.

TV(x) = Σ_pixels (Σ_channels |∇x|²)^½, forward differences, none across the picture's border: *vectorial*, the channels
share their edges (Blomgren & Chan 1998; Bresson & Chan 2008), and isotropic. Pictures are (B, C, H, W) in [0, 1], each
of a batch solved by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nonexpansive.restore.physics import Blurring


@dataclass(frozen=True, eq=False)
class Solution:
    """``image`` (B, C, H, W); the most ``iterations`` and the worst ``accuracy`` of the batch, defined by its maker."""

    image: Tensor
    iterations: int
    accuracy: float


def total_variation(x: Tensor) -> Tensor:
    """TV(x), one number a picture: (B, C, H, W) to (B,)."""
    return _length(_inner_gradient(x)).sum((1, 2, 3))


def _gradient(x: Tensor) -> Tensor:
    """Dx, (2, B, C, H, W): differences down and to the right, circular where they cross the border."""
    d = x.new_empty((2, *x.shape))
    for axis in (0, 1):
        dim, n = axis - 2, x.shape[axis - 2]
        torch.sub(x.narrow(dim, 1, n - 1), x.narrow(dim, 0, n - 1), out=d[axis].narrow(dim, 0, n - 1))
        torch.sub(x.narrow(dim, 0, 1), x.narrow(dim, n - 1, 1), out=d[axis].narrow(dim, n - 1, 1))
    return d


def _crossing(p: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of p that stand for differences across the border, as views: TV does not count them."""
    return p[0, ..., -1:, :], p[1, ..., -1:]


def _adjoint(p: Tensor) -> Tensor:
    """Dᵀp, minus the divergence: (2, B, C, H, W) to (B, C, H, W)."""
    x = (p[0] + p[1]).neg_()
    for axis in (0, 1):
        dim, n = axis - 2, x.shape[axis - 2]
        x.narrow(dim, 1, n - 1).add_(p[axis].narrow(dim, 0, n - 1))
        x.narrow(dim, 0, 1).add_(p[axis].narrow(dim, n - 1, 1))
    return x


def _inner_gradient(x: Tensor) -> Tensor:
    d = _gradient(x)
    for edge in _crossing(d):
        edge.zero_()
    return d


def _length(p: Tensor) -> Tensor:
    """|p| at each pixel, over directions and channels: (2, B, C, H, W) to (B, 1, H, W)."""
    square = torch.zeros_like(p[0, :, 0])
    for entry in p.transpose(1, 2).flatten(0, 1):  # seen a hundred times faster than a norm over dimensions 0 and 2
        square.addcmul_(entry, entry)
    return square.sqrt_().unsqueeze(1)


# ---- denoising


def tv_denoise(y: Tensor, weight: float, tolerance: float = 5e-4, iterations: int = 1000) -> Solution:
    """argmin_x ½‖x - y‖² + weight·TV(x) for pictures y (B, C, H, W), by FISTA on the dual (Beck & Teboulle, IEEE TIP
    2009), restarted where the momentum points uphill (O'Donoghue & Candès 2015).

    Stops when √(2·gap/n) ≤ ``tolerance``, n the number of a picture's entries: by strong convexity this bounds the
    root-mean-square distance to the exact minimiser, up to rounding (about 1e-5 in float32), and is
    ``Solution.accuracy``. For noise of standard deviation s the best weights on natural photographs are 0.7 s at
    s = 5/255 to 1.3 s at 50/255 in colour, 0.4 s to 0.9 s in grey (see ``tune``).
    Raises ``ValueError`` for a weight that is not positive or a wrong shape.
    """
    _check(y, weight)
    return _join([_denoise(picture[None], weight, tolerance, iterations) for picture in y])


def _denoise(y: Tensor, weight: float, tolerance: float, iterations: int) -> Solution:
    p = q = y.new_zeros((2, *y.shape))
    t, done, accuracy = 1.0, 0, math.inf
    while done < iterations and accuracy > tolerance:
        done += 1
        new = _inner_gradient(y - _adjoint(q)).div_(8).add_(q)  # ‖D‖² ≤ 8
        new.div_((_length(new) / weight).clamp_(min=1))
        step = new - p
        t = 1.0 if torch.dot((q - new).flatten(), step.flatten()) > 0 else t
        t, momentum = (1 + math.sqrt(1 + 4 * t * t)) / 2, t - 1
        p, q = new, torch.add(new, step, alpha=momentum / t)
        if done % 10 == 0 or done == iterations:
            d = _inner_gradient(y - _adjoint(p))
            # P - D = weight·TV(x) - ⟨p, Dx⟩ at x = y - Dᵀp: a sum of non-negative terms, so nothing cancels
            gap = (weight * _length(d).squeeze(1) - (p * d).sum((0, 2))).clamp_(min=0).sum().item()
            accuracy = math.sqrt(2 * gap / y.numel())
    return Solution(y - _adjoint(p), done, accuracy)


# ---- deblurring

# ADMM's penalties, which change its speed but not its answer: found by trial on motion blur at 1 % and 3 % noise.
SHRINKAGE = 0.1  # the differences are shrunk by this much (in the picture's unit) an iteration
DATA_PENALTY = 0.04  # of the constraint u = Cx that frees the surroundings of a "valid" blur
RELAXATION = 1.7


def tv_deblur(y: Tensor, blurring: Blurring, weight: float, tolerance: float = 2e-4, iterations: int = 500) -> Solution:
    """argmin_x ½‖Ax - y‖² + weight·TV(x) for data y (B, *data_shape), by over-relaxed ADMM (Boyd et al. 2011), its
    linear step solved exactly by FFT. For a "valid" blur, A = (crop)∘C with C circular, and u = Cx is split off as
    well, so that the unseen surroundings are unknowns too (Almeida & Figueiredo, IEEE TIP 2013).

    Stops when the residuals of the constraints and the picture's last change are all at most ``tolerance``, root mean
    square; ``Solution.accuracy`` is the largest: a residual, not a distance to the minimiser (seen ten times as far).
    Raises ``ValueError`` for a weight that is not positive or a wrong shape.
    """
    _check(y, weight)
    return _join([_deblur(picture[None], blurring, weight, tolerance, iterations) for picture in y])


def _deblur(y: Tensor, blurring: Blurring, weight: float, tolerance: float, iterations: int) -> Solution:
    valid, size = blurring.boundary == "valid", blurring.image_shape[1:]
    rho, beta = weight / SHRINKAGE, DATA_PENALTY if valid else 1.0
    k = blurring.symbol()
    inverse = 1 / (beta * k.abs() ** 2 + rho * _squared_symbol(size).to(y))
    x = blurring.start(y)
    u, a = (blurring.physics.A(x) if valid else x), torch.zeros_like(x)
    v, b = _gradient(x), x.new_zeros((2, *x.shape))
    accuracy, done = math.inf, 0
    while done < iterations and accuracy > tolerance:
        done += 1
        spectrum = torch.fft.rfft2(u - a if valid else y) * k.conj() * beta
        spectrum += torch.fft.rfft2(_adjoint(v - b)) * rho
        spectrum *= inverse
        x, last = torch.fft.irfft2(spectrum, s=size), x
        residuals = [x - last]

        dx = _gradient(x)
        b.add_(dx, alpha=RELAXATION).add_(v, alpha=1 - RELAXATION)
        v = b.clone()
        _shrink(v, SHRINKAGE)
        b -= v
        residuals.append(dx - v)

        if valid:
            cx = torch.fft.irfft2(spectrum * k, s=size)
            a.add_(cx, alpha=RELAXATION).add_(u, alpha=1 - RELAXATION)
            u = a.clone()
            blurring.crop(u).mul_(beta).add_(y).div_(1 + beta)
            a -= u
            residuals.append(cx - u)
        accuracy = max(residual.square().mean().sqrt().item() for residual in residuals)
    return Solution(x, done, accuracy)


def _shrink(v: Tensor, threshold: float) -> None:
    """Moves each pixel's vector by ``threshold`` towards zero, in place; differences across the border stay."""
    edges = _crossing(v)
    kept = [edge.clone() for edge in edges]
    for edge in edges:
        edge.zero_()
    v.mul_(1 - threshold / _length(v).clamp_(min=threshold))
    for edge, values in zip(edges, kept, strict=True):
        edge.copy_(values)


def _squared_symbol(size: tuple[int, int]) -> Tensor:
    """|D̂|² of the circular differences on the frequencies of ``torch.fft.rfft2``."""
    down, right = (
        2 - 2 * torch.cos(2 * torch.pi * frequencies(n, dtype=torch.float64))
        for n, frequencies in zip(size, (torch.fft.fftfreq, torch.fft.rfftfreq), strict=True)
    )
    return down[:, None] + right


# ---- the weight


def tune(
    solve: Callable[[Tensor, float], Tensor],
    pairs: Sequence[tuple[Tensor, Tensor]],
    low: float,
    high: float,
    precision: float = 0.03,
) -> tuple[float, float]:
    """The weight in [low, high] at which ``solve(noisy, weight)`` has the highest PSNR, and that PSNR: the mean over
    the pictures of all pairs (clean, noisy), peak 1, in dB. Golden section on log(weight), to a relative ``precision``:
    one maximum is assumed. Raises ``ValueError`` unless 0 < low < high and there is a pair.
    """
    if not 0 < low < high or not pairs:
        raise ValueError(f"a range 0 < low < high and a pair are needed, got [{low}, {high}], {len(pairs)} pairs")

    def quality(log: float) -> float:
        total = sum(_psnr(solve(noisy, math.exp(log)), clean) for clean, noisy in pairs)
        return total / sum(len(clean) for clean, _ in pairs)

    ratio = (math.sqrt(5) - 1) / 2
    a, b = math.log(low), math.log(high)
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = quality(c), quality(d)
    while b - a > precision:
        if at_c > at_d:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = quality(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = quality(d)
    return (math.exp(c), at_c) if at_c > at_d else (math.exp(d), at_d)


def _psnr(x: Tensor, clean: Tensor) -> float:
    """The sum over the batch of each picture's PSNR."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(x, clean, data_range=1.0, reduction="sum", dim=(1, 2, 3)))


def _join(solutions: list[Solution]) -> Solution:
    return Solution(
        torch.cat([s.image for s in solutions]),
        max(s.iterations for s in solutions),
        max(s.accuracy for s in solutions),
    )


def _check(y: Tensor, weight: float) -> None:
    if y.ndim != 4 or not len(y):
        raise ValueError(f"pictures (B, C, H, W) are expected, got shape {tuple(y.shape)}")
    if not 0 < weight < math.inf:
        raise ValueError(f"the weight of the total variation must be positive, got {weight}")
