"""How data y lie about Ax: the data terms f(x) = Σᵢ φ(uᵢ; yᵢ), u = Ax, as values with a gradient that is Lipschitz on all of ℝⁿ.

Each φ(·; y) is convex, and φ' is monotone with slopes in [0, s], s = ``smoothness(y)``. By the chain rule ∇f(x) = Aᵀφ'(Ax), so
‖∇f(x) - ∇f(x')‖ ≤ ‖A‖·s·‖A(x - x')‖: f is convex and L_f-smooth with **L_f = s‖A‖²**, which is all that a gradient step needs.
f is the negative log-likelihood times ``variance``, so that near a grey value of 1 all of them weigh alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.rounding import down, times, up


class Likelihood(Protocol):
    """A data term of u = Ax (B, *data_shape), given data y of that shape."""

    @property
    def variance(self) -> float:
        """What the negative log-likelihood was multiplied by."""
        ...

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        """Σᵢ φ(uᵢ; yᵢ) of each sample: (B,)."""
        ...

    def gradient(self, u: Tensor, y: Tensor) -> Tensor:
        """φ'(u; y), entry by entry."""
        ...

    def smoothness(self, y: Tensor) -> float:
        """A bound on the slope of φ'(·; yᵢ), over all of ℝ and all i. Raises Refused where there is none."""
        ...

    def conjugate(self, w: Tensor, y: Tensor, sigma: float) -> Tensor:
        """prox_{σφ*}(w) = w - σ·argmin_p [φ(p) + (σ/2)(p - w/σ)²], exactly."""
        ...

    def spread(self, y: Tensor) -> float:
        """The standard deviation of the noise, root mean square over the data."""
        ...

    def signal(self, y: Tensor) -> Tensor:
        """What y says of Ax alone: its mean is Ax."""
        ...

    def sample(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Data y for a given u = Ax, drawn on the CPU, so that a seed means the same everywhere."""
        ...


def likelihood_of(noise: float | Tensor | Likelihood) -> Likelihood:
    """The likelihood that is meant: itself, or Gaussian noise of a standard deviation given as one number."""
    if isinstance(noise, Tensor) and noise.numel() != 1:
        raise BadInput(f"noise is one number, its standard deviation, not {noise.numel()}")
    return Gaussian(float(noise)) if isinstance(noise, (float, int, Real, Tensor)) else noise


def _normal(u: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(u.shape, dtype=u.dtype, generator=generator).to(u.device)


@dataclass(frozen=True)
class Gaussian:
    """y = u + ν·n, n standard normal: φ = ½(u - y)², of smoothness 1. ν = ``noise``, in the unit of [0, 1] pictures."""

    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise BadInput(f"a noise level is a finite number from 0, got {self.noise}")

    @property
    def variance(self) -> float:
        return self.noise**2

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).square().flatten(1).sum(1) / 2

    def gradient(self, u: Tensor, y: Tensor) -> Tensor:
        return u - y

    def smoothness(self, y: Tensor) -> float:
        return 1.0

    def conjugate(self, w: Tensor, y: Tensor, sigma: float) -> Tensor:
        return (w - sigma * y) / (1 + sigma)

    def spread(self, y: Tensor) -> float:
        return self.noise

    def signal(self, y: Tensor) -> Tensor:
        return y

    def sample(self, u: Tensor, generator: torch.Generator) -> Tensor:
        return u + self.noise * _normal(u, generator)


GAUSSIAN = Gaussian()
"""f = ½‖Ax - y‖²; its ``noise`` does not enter f."""


@dataclass(frozen=True)
class Poisson:
    """Photon noise, y = γ·Poisson((u + b)/γ) + ν·n with γ = ``gain``, b = ``background``; mixed with Gaussian where ν = ``noise`` > 0.

    With c = ν²/γ both sides shifted by c, y + c has the mean u + b + c and γ times that as its variance, as γ·Poisson((u + b + c)/γ)
    has: the shifted Poisson model (Snyder, Hammoud & White 1993), exact for ν = 0. With ŷ = max(y + c, 0) and s = b + c it reads

        φ(u) = (u + s) - ŷ·log(u + s)    for u ≥ 0,
        φ(u) = φ(0) + φ'(0)u + ½φ''(0)u²    for u < 0, the quadratic continuation, where no picture has its values.

    **Its smoothness.** φ''(u) = ŷ/(u + s)² for u ≥ 0, which is non-negative and decreases, and φ''(u) = ŷ/s² for u < 0; φ' is continuous
    at 0. So φ' is monotone with slopes in [0, ŷ/s²], and Lipschitz on all of ℝ with max(ŷ)/s². Data below -c are taken as -c, without
    which φ would not be convex. For s = 0 (neither background nor Gaussian noise) φ' has no bound at 0, u ≥ 0 is a constraint, and only
    the primal-dual splitting, which takes no gradient of φ, is open.
    """

    gain: float
    background: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.gain < math.inf:
            raise BadInput(f"the gain is a finite number above 0 (grey values a photon), got {self.gain}")
        for name in ("background", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"the {name} is a finite number from 0, got {getattr(self, name)}")

    @property
    def variance(self) -> float:
        return self.gain

    @property
    def _c(self) -> float:
        return self.noise**2 / self.gain

    def _terms(self, y: Tensor) -> tuple[Tensor, float]:
        """ŷ and s."""
        return (y + self._c).clamp_min(0), self.background + self._c

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        data, s = self._terms(y)
        v = u.clamp_min(0) + s
        each = v - torch.xlogy(data, v)
        if s > 0:
            below = u.clamp_max(0)
            each = each + below * (1 - data / s) + data / s**2 * below.square() / 2
        else:
            each = torch.where(u < 0, math.inf, each)
        return each.flatten(1).sum(1)

    def gradient(self, u: Tensor, y: Tensor) -> Tensor:
        data, s = self._terms(y)
        return 1 - data / (u.clamp_min(0) + s) + data / s**2 * u.clamp_max(0)

    def smoothness(self, y: Tensor) -> float:
        s = down(self.background + self._c)
        if s <= 0:
            raise Refused(
                "the Poisson log-likelihood without background has no Lipschitz gradient: state the background that the data "
                "contain, or the Gaussian noise that is mixed in (background=0.02 or noise=0.02, say), or use the method "
                "primal-dual without a box, which needs no gradient"
            )
        largest = float(self._terms(y.detach())[0].max())
        return up(times(largest, up(1 / s)) / s)

    def conjugate(self, w: Tensor, y: Tensor, sigma: float) -> Tensor:
        # p ≥ 0: σv² - cv - ŷ = 0 for v = p + s, c = σ(s + w/σ) - 1; p < 0: a linear equation
        data, s = self._terms(y)
        c = w + (sigma * s - 1)
        root = (c.square() + 4 * sigma * data).sqrt()
        v = torch.where(c > 0, (c + root) / (2 * sigma), 2 * data / (root - c).clamp_min(torch.finfo(w.dtype).tiny))
        p = v - s
        if s > 0:
            p = torch.where(p >= 0, p, (w - 1 + data / s) / (sigma + data / s**2))
        return w - sigma * p

    def spread(self, y: Tensor) -> float:
        return math.sqrt(self.gain * max(float(y.double().mean()), 0.0) + self.noise**2)

    def signal(self, y: Tensor) -> Tensor:
        return y - self.background

    def sample(self, u: Tensor, generator: torch.Generator) -> Tensor:
        rate = ((u + self.background) / self.gain).clamp_min(0)
        photons = torch.poisson(rate.cpu(), generator=generator).to(u) * self.gain
        return photons + self.noise * _normal(u, generator) if self.noise else photons


__all__ = ["GAUSSIAN", "Gaussian", "Likelihood", "Poisson"]
