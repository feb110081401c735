"""Running a certified iteration to its fixed point, with what was proved checked as it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nonexpansive.errors import Diverging, Refused
from nonexpansive.math.certificate import Certificate, certify
from nonexpansive.math.enclosure import Affine


@dataclass(frozen=True)
class Report:
    """What a run did: ``image`` (B, C, H, W), and ``residuals``, the relative ‖T(x_k) - x_k‖/‖x_k‖ at each step."""

    image: Tensor
    residuals: list[float]
    converged: bool
    seconds: float
    certificate: Certificate | None

    @property
    def iterations(self) -> int:
        return len(self.residuals)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values, the picture left out."""
        return {
            "iterations": self.iterations,
            "converged": self.converged,
            "residuals": self.residuals,
            "seconds": self.seconds,
            "certificate": None if self.certificate is None else self.certificate.to_json(),
        }


@torch.no_grad()
def fixed_point(
    iteration: nn.Module,
    start: Tensor,
    *,
    certificate: Certificate | None,
    tolerance: float = 3e-4,
    iterations: int = 500,
    watch: Callable[[int, float, Tensor], None] | None = None,
) -> Report:
    """Iterate x ↦ T(x) from ``start`` until ‖T(x) - x‖ ≤ tolerance·‖x‖ for every sample, or for ``iterations`` steps.

    ``certificate`` must prove T averaged on the shape of one sample; None runs an uncertified iteration and says so in the report.
    An averaged T cannot let ‖T(x_k) - x_k‖ increase: with a certificate each sample's residual is checked against the one before it,
    within what the type of x can resolve and the certificate's own error. ``watch(k, residual, x)`` is called after each step.

    Raises Refused for a certificate that proves too little, Diverging if the run contradicts the certificate or meets NaN.
    """
    if certificate is not None and certificate.averaged is None:
        raise Refused(f"the certificate does not prove the iteration averaged, so it may not converge:\n{certificate}")
    if certificate is not None and certificate.domain != tuple(start.shape[1:]):
        raise Refused(f"the certificate is for samples of shape {certificate.domain}, not {tuple(start.shape[1:])}")
    began, x, before, residuals = time.perf_counter(), start, None, []
    noise, error = 64 * torch.finfo(start.dtype).eps, Affine() if certificate is None else certificate.error
    for k in range(1, iterations + 1):
        ahead = iteration(x)
        moved = (ahead - x).flatten(1).norm(dim=1)
        size = ahead.flatten(1).norm(dim=1).clamp_min(torch.finfo(start.dtype).tiny)
        relative = float((moved / size).max())
        if not math.isfinite(relative):
            raise Diverging(f"step {k} gave numbers that are not finite")
        if certificate is not None and before is not None:
            slack = noise * size + 2 * (error.slope * (size + moved + before) + error.constant)
            if bool((moved > before * (1 + 1e-4) + slack).any()):
                raise Diverging(
                    f"step {k}: the residual grew from {float(before.max()):.4g} to {float(moved.max()):.4g}, which its "
                    "certificate excludes. This is a defect: please report it with the model and the settings."
                )
        residuals.append(relative)
        x, before = ahead, moved
        if watch:
            watch(k, relative, x)
        if relative <= tolerance:
            return Report(x, residuals, True, time.perf_counter() - began, certificate)
    return Report(x, residuals, False, time.perf_counter() - began, certificate)


def prove(iteration: nn.Module, shape: tuple[int, ...]) -> Certificate:
    """The certificate of an iteration on samples of ``shape``; Refused unless it proves the iteration averaged."""
    certificate = certify(iteration, shape)
    if certificate.averaged is None:
        raise Refused(f"the iteration is not proved to be averaged:\n{certificate}")
    return certificate


__all__ = ["Report", "fixed_point", "prove"]
