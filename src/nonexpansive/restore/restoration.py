"""A restoration decided before it runs: which splitting, how strong a prior, and in which memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import Certificate
from nonexpansive.nn.models import ImageDenoiser, ProximalDenoiser
from nonexpansive.restore.iterate import (
    STATES,
    Acceleration,
    Descent,
    Iteration,
    Report,
    averagedness,
    fixed_point,
    prove,
)
from nonexpansive.restore.likelihood import Gaussian, Likelihood, likelihood_of
from nonexpansive.restore.methods import METHODS, Method, splitting
from nonexpansive.restore.operators import Operator
from nonexpansive.restore.physics import Blurring
from nonexpansive.restore.steps import DataTerm
from nonexpansive.restore.tiles import Tiled

Kind = Literal["sharp", "blur", "diffuse"]
"""Of a forward model: what it passes at all it passes whole; blurs; or nearly all that it passes is far below its norm."""

_OWN: dict[str, Kind] = {
    "blur": "blur",
    "inpainting": "sharp",
    "down-sampling": "sharp",
    "mri": "sharp",
    "tomography": "diffuse",
}


@dataclass(frozen=True)
class Strength:
    """How the prior is weighed: with s = ``factor``·ν/max(1, ‖A‖) + ``floor`` for noise ν in the data, τ = (``trust``·s)²/v, v = ν² for
    Gaussian noise, the gain for photons (``Likelihood.variance``), and the denoiser's level is LEVEL·(s/LEVEL)^``power``."""

    factor: float
    floor: float
    trust: float
    power: float = 1.0


LEVEL = 0.012
"""The level at which a power leaves s as it is."""

_BLUR, _SHARP = Strength(0.5, 0.0, 2.1), Strength(1.0, 0.0, 1.4)
STRENGTH: dict[Method, dict[Kind, Strength]] = {
    **{method: {"blur": _BLUR, "sharp": _SHARP, "diffuse": _BLUR} for method in METHODS},
    "half-quadratic": {
        "blur": Strength(0.5, 0.015, 2.1),
        "sharp": Strength(0.5, 0.015, 3.0),
        "diffuse": Strength(0.5, 0.015, 2.1),
    },
    "forward-backward": {"blur": _BLUR, "sharp": _SHARP, "diffuse": Strength(0.5, 0.0, 3.0, 1.22)},
}
"""Chosen for half-quadratic and forward-backward, on training photographs, of blurs with other kernels than those reported (see
docs/training.md; the others by benchmarks/strength.py); from the noise and A alone, not per picture. The other methods take over what
forward-backward has, whose restorations most of them share.

A power above 1: the force of a denoiser's prior grows less than with the square of its level, as the noise's does. That shows where levels
are far from those of pictures, as for tomography."""

PROXIMAL_TRUST = 1.7
"""``trust`` of a proximal denoiser in place of those, chosen alike (see docs/training.md)."""

SMALLEST_NOISE = 0.25 / 255
"""Noise below this (that of rounding to 8 bits) is taken as this: data are never trusted without limit."""


@dataclass(frozen=True)
class Plan:
    """A restoration that is decided but not yet run: T, its start, its certificate, and the settings behind it.

    ``certificate`` is None, and ``refusal`` says why, where convergence is not proved and ``uncertified`` allowed that. ``memory``:
    the bound in bytes that was asked for.
    """

    iteration: nn.Module
    start: Tensor
    certificate: Certificate | None
    method: Method
    sigma: float
    tau: float
    data: DataTerm
    likelihood: Likelihood
    smoothness: float | None
    refusal: str | None = None
    memory: float = math.inf

    @property
    def averaged(self) -> float | None:
        """α of the iteration, in its own norm; None where none is proved."""
        return None if self.certificate is None else averagedness(self.iteration, self.certificate)

    def run(
        self,
        *,
        tolerance: float = 3e-4,
        iterations: int = 200,
        acceleration: Acceleration | Literal["auto"] | None = "auto",
        watch: Callable[[int, float, Tensor], None] | None = None,
    ) -> Report:
        """Iterate to the fixed point; see :func:`nonexpansive.restore.iterate.fixed_point`.

        ``acceleration`` "auto" is "anderson" where the iteration is proved averaged, or to descend on an objective that can be
        evaluated, and the states that this keeps fit in the plan's ``memory``, else None.
        """
        if acceleration == "auto":
            proved = self.averaged is not None or (isinstance(self.certificate, Descent) and self._evaluable())
            acceleration = "anderson" if proved and self._remembers() else None
        return fixed_point(
            self.iteration,
            self.start,
            certificate=self.certificate,
            tolerance=tolerance,
            iterations=iterations,
            acceleration=acceleration,
            watch=watch,
        )

    @torch.no_grad()
    def _evaluable(self) -> bool:
        scheme = self.iteration
        return isinstance(scheme, Iteration) and scheme.objective(scheme.begin(self.start)) is not None

    def _remembers(self) -> bool:
        """Whether the acceleration may keep its states, and its plain steps are those of the certificate."""
        scheme = self.iteration if isinstance(self.iteration, Iteration) else Iteration()
        state = scheme.begin(self.start)
        return not scheme.anchored and STATES * state.nbytes <= self.memory


@torch.no_grad()
def has_prox(data: DataTerm, y: Tensor) -> bool:
    """Whether the forward model's proximal map has a closed form."""
    try:
        data.prox(data.start(y[:1]), y[:1], 1.0)
    except Refused:
        return False
    return True


@torch.no_grad()
def sharpness(data: DataTerm, like: Tensor) -> float:
    """‖AᵀAz‖²/(‖A‖²‖Az‖²) for white noise z: Σs⁴/(‖A‖²Σs²) over A's singular values s, but for chance.

    1 for a projection, small where most of what A passes is far below its norm. On pictures of 96x96 1 for inpainting, 0.73 for
    down-sampling, 0.77 for MRI (on small ones less); 0.15 to 0.67 for blurs, the latter for straight motions; 0.05 to 0.1 for
    tomography. Of A's own scale it knows nothing. ``like``: a tensor of the data's type and device.
    """
    z = torch.randn(1, *data.image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    passed = data.A(z)
    size = float(passed.square().sum()) * data.lipschitz
    return float(data.A_adjoint(passed).square().sum()) / size if size else 1.0


def kind_of(data: DataTerm, like: Tensor) -> Kind:
    """What :data:`STRENGTH` takes a forward model for: the library's own are known, a user's is judged by its :func:`sharpness`."""
    if isinstance(data, Blurring):
        return "blur"
    name = data.name if isinstance(data, Operator) else ""
    for start, kind in _OWN.items():
        if name.startswith(start):
            return kind
    found = sharpness(data, like)
    return "sharp" if found >= 0.71 else "blur" if found >= 0.09 else "diffuse"


def plan(
    y: Tensor,
    data: DataTerm,
    denoiser: nn.Module,
    noise: float | Likelihood,
    *,
    method: str | None = None,
    sigma: float | None = None,
    tau: float | None = None,
    strength: float = 1.0,
    scaling: float = 1.0,
    relax: bool | None = None,
    relaxation: float | None = None,
    anchored: bool = False,
    box: bool | tuple[float, float] | None = None,
    uncertified: bool = False,
    memory: float = 5e8,
) -> Plan:
    """The restoration of data y (B, *data_shape) with ``noise``: a standard deviation ν, in the unit of [0, 1] images, or a likelihood.

    ``method`` defaults to half-quadratic for Gaussian noise where the proximal map of the data term has a closed form, else to
    forward-backward; for photons to primal-dual, with the denoiser relaxed to α ≤ 1/2 (``relax``), as steps on their steep gradient are
    short; a proximal denoiser that is not averaged goes with forward-backward there. ``sigma`` (the denoiser's level) and ``tau`` default
    to a rule in the noise and A (:data:`STRENGTH`), one for all of y; where a step on the gradient may not be that long, both become
    smaller together. ``box`` defaults to the projection on [0, 1]ⁿ for these two methods, so that a fixed point exists; to none for
    others, and for a proximal denoiser that is not averaged, which descends only without. The rest is as for :func:`splitting`.

    Raises Refused where convergence is not proved, with the nearest setting that would be, unless ``uncertified``: then the plan holds
    no certificate, and says why.
    """
    channels = data.image_shape[0]
    if isinstance(denoiser, ImageDenoiser) and channels != denoiser.channels:
        raise BadInput(
            f"the picture has {channels} channel(s), the denoiser takes {denoiser.channels}: choose the other model"
        )
    if not y.is_floating_point() or len(y) == 0:
        raise BadInput(f"data are a batch of floats such that white is 1, not {y.dtype} of shape {tuple(y.shape)}")
    y = y.to(next((p.dtype for p in denoiser.parameters()), y.dtype))
    inner = denoiser.denoiser if isinstance(denoiser, Tiled) else denoiser
    descends = isinstance(inner, ProximalDenoiser) and not inner.convex
    likelihood = likelihood_of(noise)
    gaussian = isinstance(likelihood, Gaussian)
    if not gaussian and getattr(data, "signed", False):
        raise BadInput(
            "photons are counted, so their data are not negative, as those of this forward model are: state Gaussian noise"
        )
    if gaussian and likelihood.noise < SMALLEST_NOISE:
        likelihood = Gaussian(SMALLEST_NOISE)
    chosen: Method
    if method is None:
        chosen = "forward-backward" if gaussian or descends else "primal-dual"
        chosen = "half-quadratic" if gaussian and has_prox(data, y) else chosen
        relax = chosen == "primal-dual" if relax is None else relax
    elif method in METHODS:
        chosen = method  # type: ignore[assignment]
    else:
        raise BadInput(f"no method {method!r}: there are {', '.join(METHODS)}")
    if gaussian and chosen in ("half-quadratic", "douglas-rachford"):
        data.prox(data.start(y[:1]), y[:1], 1.0)  # Refused, with the remedy, where there is none, uncertified or not
    if box is None:
        box = chosen in ("half-quadratic", "forward-backward") and not descends
    rule, smoothness = STRENGTH[chosen]["blur" if descends else kind_of(data, y)], None
    if descends:
        rule = replace(rule, trust=PROXIMAL_TRUST)
    if chosen in ("forward-backward", "red") or (chosen == "primal-dual" and box):
        smoothness = data.lipschitz * likelihood.smoothness(y)
    ruled = rule.factor * likelihood.spread(y) / max(1.0, data.norm) + rule.floor
    level = min(1.0, ruled) if sigma is None else sigma
    if tau is None:
        if not level > 0:
            raise BadInput(
                "a denoiser at level 0 leaves the rule no step τ on the data: state τ as well, or a level above 0"
            )
        tau = (rule.trust * level) ** 2 / likelihood.variance
        longest = 1.99 if chosen == "forward-backward" and not descends else 1.0
        if smoothness and chosen != "red" and tau > longest / smoothness:
            tau = longest / smoothness
            level = math.sqrt(tau * likelihood.variance) / rule.trust if sigma is None else sigma
    if sigma is None:
        level = min(1.0, LEVEL * (level / LEVEL) ** rule.power)
    iteration = splitting(
        chosen,
        Tiled(denoiser, memory) if isinstance(denoiser, ImageDenoiser) else denoiser,
        data,
        y,
        sigma=level,
        tau=tau,
        likelihood=likelihood,
        box=box,
        strength=strength,
        scaling=scaling,
        relax=bool(relax),
        relaxation=relaxation,
        anchored=anchored,
    )
    certificate, refusal = None, None
    try:
        certificate = prove(iteration, data.image_shape)
    except Refused as error:
        if not uncertified:
            raise
        refusal = str(error)
    start = data.start(likelihood.signal(y))
    return Plan(iteration, start, certificate, chosen, level, tau, data, likelihood, smoothness, refusal, memory)


__all__ = ["SMALLEST_NOISE", "STRENGTH", "Plan", "Strength", "has_prox", "plan", "sharpness"]
