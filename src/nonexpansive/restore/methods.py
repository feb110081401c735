"""The iteration of a method by name."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import (
    certify,
)
from nonexpansive.math.rounding import down
from nonexpansive.nn.resize import Relaxed
from nonexpansive.restore.likelihood import GAUSSIAN, Gaussian, Likelihood
from nonexpansive.restore.primal_dual import DualOfBox, DualOfData, PrimalDual
from nonexpansive.restore.schemes import Halpern, KrasnoselskiiMann
from nonexpansive.restore.splitting import DouglasRachford, ForwardBackward, GradientRED, HalfQuadratic
from nonexpansive.restore.steps import Box, DataTerm, GradientStep, ProximalStep, prior

Method = Literal["forward-backward", "half-quadratic", "douglas-rachford", "primal-dual", "red"]
METHODS: tuple[Method, ...] = get_args(Method)


def splitting(
    method: str,
    denoiser: nn.Module,
    data: DataTerm,
    y: Tensor,
    *,
    sigma: float,
    tau: float,
    likelihood: Likelihood = GAUSSIAN,
    box: bool | tuple[float, float] = False,
    strength: float = 1.0,
    scaling: float = 1.0,
    relax: bool = False,
    relaxation: float | None = None,
    anchored: bool = False,
) -> nn.Module:
    """The iteration T of a method, one of ``METHODS``, for data y and a denoiser at level σ.

    - ``likelihood``: of the noise in y. What takes a proximal map of f (half-quadratic, Douglas-Rachford) is for Gaussian noise.
    - ``box``: ends each step with the projection on [0, 1]ⁿ (or on [low, high]ⁿ), which guarantees a fixed point. Not for
      Douglas-Rachford, whose iterates are no pictures, nor for RED. Primal-dual takes the box as its h, and the data by their gradient;
      without a box the data are its h.
    - ``strength``, ``scaling``: see :func:`prior`. ``relax``: reduces the strength to 0.5/α, for methods that need α ≤ 1/2.
    - ``tau`` of RED weighs the data as elsewhere, λ = 1/τ; its step is nearly the longest that is proved.
    - ``relaxation``: λ of Krasnosel'skii-Mann; ``anchored``: Halpern's iteration.

    Raises BadInput for what there is not.
    """
    if method not in METHODS:
        raise BadInput(f"no splitting {method!r}: there are {', '.join(METHODS)}")
    bounds = Box() if box is True else Box(*box) if box else None
    end = [bounds] if bounds else []
    if bounds and method in ("douglas-rachford", "red"):
        why = (
            "iterates on a shadow of the picture" if method == "douglas-rachford" else "is one averaged step, no chain"
        )
        raise BadInput(f"{method} {why}, which may not be projected on a box: box=False")
    if method in ("half-quadratic", "douglas-rachford") and not isinstance(likelihood, Gaussian):
        raise BadInput(
            f"{method} needs the proximal map of f, which is known for Gaussian noise only: use forward-backward, primal-dual or red"
        )
    D = prior(denoiser, sigma, strength=strength, scaling=scaling)
    if relax:
        alpha = certify(D, data.image_shape).averaged
        if alpha is None and method in ("forward-backward", "half-quadratic"):  # the others refuse such a denoiser
            raise BadInput("relax brings an averaged denoiser to α ≤ 1/2; of this one no α is known: relax=False")
        if alpha is not None and alpha > 0.5:
            D = Relaxed(D, down(0.5 / alpha))

    def iteration() -> nn.Module:
        if method == "forward-backward":
            return ForwardBackward(GradientStep(data, y, tau, likelihood), D, *end)
        if method == "half-quadratic":
            return HalfQuadratic(ProximalStep(data, y, tau), D, *end)
        if method == "douglas-rachford":
            return DouglasRachford(D, ProximalStep(data, y, tau))
        if method == "primal-dual":
            if bounds:
                dual, smooth = DualOfBox(bounds, data.image_shape), GradientStep(data, y, tau, likelihood)
            else:
                dual, smooth = DualOfData(data, y, likelihood), None
            return PrimalDual(D, dual, data.image_shape, tau, smooth=smooth)
        longest = 1.99 / (data.lipschitz * likelihood.smoothness(y) + 2 / tau) if tau > 0 else tau
        return GradientRED(GradientStep(data, y, longest, likelihood), D, 1 / tau)

    T = iteration()
    if relaxation is not None:
        T = KrasnoselskiiMann(T, relaxation)
    return Halpern(T) if anchored else T
