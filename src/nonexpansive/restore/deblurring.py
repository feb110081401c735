"""Deblurring by a certified iteration: which splitting, how strong a prior, and in which memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import Certificate
from nonexpansive.nn.models import Denoiser
from nonexpansive.restore.iterate import Report, fixed_point, prove
from nonexpansive.restore.physics import Blurring
from nonexpansive.restore.splitting import splitting
from nonexpansive.restore.tiles import Tiled

Method = Literal["half-quadratic", "forward-backward"]


@dataclass(frozen=True)
class Strength:
    """How the prior is weighed: the denoiser's level is ``factor``·ν + ``floor`` for noise ν, and τ = (``trust``·level/ν)²."""

    factor: float
    floor: float
    trust: float


STRENGTH = {"half-quadratic": Strength(0.5, 0.015, 2.1), "forward-backward": Strength(0.5, 0.0, 2.1)}
"""Chosen on training photographs and other kernels than those reported (see docs/training.md); from the noise alone, not per picture."""

SMALLEST_NOISE = 0.25 / 255
"""Noise below this (that of rounding to 8 bits) is taken as this: data are never trusted without limit."""


@dataclass(frozen=True)
class Plan:
    """A restoration that is decided and proved but not yet run: T, its start, its certificate, and the settings behind it."""

    iteration: torch.nn.Module
    start: Tensor
    certificate: Certificate
    method: Method
    sigma: float
    tau: float
    blurring: Blurring

    def run(
        self,
        *,
        tolerance: float = 3e-4,
        iterations: int = 200,
        watch: Callable[[int, float, Tensor], None] | None = None,
    ) -> Report:
        """Iterate to the fixed point; see :func:`nonexpansive.restore.iterate.fixed_point`."""
        return fixed_point(
            self.iteration,
            self.start,
            certificate=self.certificate,
            tolerance=tolerance,
            iterations=iterations,
            watch=watch,
        )


def plan(
    y: Tensor,
    blurring: Blurring,
    denoiser: Denoiser,
    noise: float,
    *,
    method: Method | None = None,
    sigma: float | None = None,
    tau: float | None = None,
    memory: float = 1e9,
) -> Plan:
    """The restoration of blurred data y (1, *data_shape) with noise of standard deviation ``noise``, in the unit of [0, 1] images.

    ``method`` defaults to half-quadratic where the blur's proximal map has a closed form (circular boundary), else forward-backward.
    ``sigma`` (the denoiser's level) and ``tau`` default to a rule in the noise alone. Each step ends with the projection on [0, 1]ⁿ,
    so that a fixed point exists. Raises Refused where convergence is not proved, with the nearest setting that would be.
    """
    if y.shape[1] != denoiser.channels:
        raise BadInput(
            f"the picture has {y.shape[1]} channel(s), the denoiser takes {denoiser.channels}: choose the other model"
        )
    method = method or ("half-quadratic" if blurring.boundary == "circular" else "forward-backward")
    if method not in STRENGTH:
        raise BadInput(f"no method {method!r}: there are {', '.join(STRENGTH)}")
    rule, noise = STRENGTH[method], max(noise, SMALLEST_NOISE)
    if sigma is None:
        sigma = rule.factor * noise + rule.floor
    if tau is None:
        tau = (rule.trust * sigma / noise) ** 2
        if method == "forward-backward":
            tau = min(tau, 1.99 / blurring.lipschitz)
    iteration = splitting(method, Tiled(denoiser, memory), blurring, y, sigma=sigma, tau=tau, box=True)
    return Plan(iteration, blurring.start(y), prove(iteration, blurring.image_shape), method, sigma, tau, blurring)
