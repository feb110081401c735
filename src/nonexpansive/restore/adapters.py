"""To deepinv and back: our denoisers in its optimisers and its trainer, its denoisers and its physics in our splittings.

A certificate goes neither way by itself. What deepinv runs with one of our denoisers is deepinv's iteration: the denoiser is averaged
there as well, but step sizes are not checked. A denoiser of deepinv has no proof, so it is refused by ``certify`` and runs only where
no certificate is asked for. A physics enters a certificate by the norm that is stated for it. deepinv is imported where it is used.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import Certificate, Shape, rule
from nonexpansive.nn.models import ImageDenoiser
from nonexpansive.restore.operators import Operator
from nonexpansive.restore.tiles import Tiled


@cache
def _deepinv_type() -> type[nn.Module]:
    from deepinv.models import Denoiser as Base

    class NonexpansiveDenoiser(Base):
        """``denoiser`` as deepinv calls denoisers: (x (B, C, H, W), sigma), a number or one for each sample."""

        def __init__(self, denoiser: nn.Module) -> None:
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: Tensor, sigma: float | Tensor, **kwargs: Any) -> Tensor:
            if not isinstance(sigma, Tensor):
                return self.denoiser(x, sigma)
            level = sigma.to(x).flatten()
            if level.numel() not in (1, len(x)):
                raise BadInput(f"sigma is a number or one for each of the {len(x)} samples, not {tuple(sigma.shape)}")
            return self.denoiser(x, level.expand(len(x)))

    return NonexpansiveDenoiser


def to_deepinv(denoiser: ImageDenoiser | Tiled) -> nn.Module:
    """Our denoiser, in tiles or not, as a ``deepinv.models.Denoiser``: ``forward(x, sigma)``, σ a number or a tensor of one or B numbers.

    It is the same module within, ``.denoiser``, whose parameters deepinv's trainer trains: certify that one. For example
    ``deepinv.optim.PnP(denoiser=to_deepinv(load("denoiser-grey")))`` is a prior for ``deepinv.optim.PGD`` and the like.
    """
    if not isinstance(denoiser, (ImageDenoiser, Tiled)):
        raise BadInput(f"a Denoiser of this library is expected, not {type(denoiser).__name__}")
    return _deepinv_type()(denoiser)


class Uncertified(nn.Module):
    """A denoiser D(x, σ) of which nothing is proved, for our splittings: ``certify`` refuses it by name."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.denoiser(x, sigma)


@rule(Uncertified)
def _uncertified(module: Uncertified, shape: Shape, unit: float) -> Certificate:
    raise Refused(
        f"{type(module.denoiser).__name__} is not certified: nothing is proved of its Lipschitz constant, so that the iteration may not "
        "converge. Take a denoiser of this library, or run it without a certificate (certificate=None), which the report says."
    )


def from_deepinv(denoiser: Any) -> nn.Module:
    """A denoiser of deepinv for our splittings, marked *not certified*; or the one within, certified as ever, if ``to_deepinv`` made it.

    Evaluated as it is: call ``.eval()`` and move it first. Raises BadInput for what is no ``deepinv.models.Denoiser``.
    """
    from deepinv.models import Denoiser as Base

    if isinstance(denoiser, _deepinv_type()):
        return cast(nn.Module, denoiser.denoiser)
    if not isinstance(denoiser, Base):
        raise BadInput(f"a deepinv.models.Denoiser is expected, not {type(denoiser).__name__}")
    return Uncertified(denoiser)


def from_physics(
    physics: Any,
    image_shape: Shape,
    data_shape: Shape,
    norm: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Operator:
    """A deepinv ``LinearPhysics`` as a data term for pictures (B, *image_shape), with ‖A‖ ≤ ``norm``, which is yours to prove.

    The proximal map is used where deepinv has it in closed form (its ``DecomposablePhysics``). A copy is taken, so that a later
    ``physics.update`` changes nothing that was certified. Its noise model plays no part.

    Raises Refused without a norm: deepinv's ``compute_norm`` and ``compute_sqnorm`` are power methods, which tend to the norm *from
    below*, so no certificate may rest on them. Raises BadInput for physics that are not linear, and as :class:`Operator` does, among
    others for an ``A_adjoint`` that is not the exact adjoint of A.
    """
    from deepinv.physics import DecomposablePhysics, LinearPhysics

    if not isinstance(physics, LinearPhysics):
        raise BadInput(f"a deepinv.physics.LinearPhysics is expected, not {type(physics).__name__}")
    name = type(physics).__name__
    if norm is None:
        raise Refused(
            f"{name}: state a norm, a number that you can prove to be at least ‖A‖. deepinv's compute_norm and compute_sqnorm are power "
            "methods, whose results lie below it, so they cannot be used for a certificate. For models with a derived norm see "
            "nonexpansive.restore.forward_model."
        )
    physics = deepcopy(physics)
    closed = isinstance(physics, DecomposablePhysics)
    return Operator(
        physics.A,
        image_shape,
        data_shape,
        norm,
        physics.A_adjoint,
        prox=(lambda z, y, tau: physics.prox_l2(z, y, gamma=tau)) if closed else None,
        dtype=dtype,
        name=name,
    )


__all__ = ["Uncertified", "from_deepinv", "from_physics", "to_deepinv"]
