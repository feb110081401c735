"""Keeping the spectral-norm constraint while training: three ways behind one interface.

A step of size h of a method with contractivity radius r is α-averaged (α = 1: non-expansive) if
h ≤ 2ν/(1/α - 1 + 1/r) with ν = 1/(L_σ‖A‖²). So a bound on ‖A‖ has to steer either the step or the weights:

- :class:`AdaptiveSteps`: the weights are free, the block integrates over a fixed time T in n substeps of T/n, n as small as
  is safe (Sherry et al. 2024, Physica D 463, 134159);
- :class:`MaximalStep`: one step, the largest safe one, differentiated through the norm (for Euler and α = 1 this is the
  convex potential layer of Meunier et al. 2022);
- :class:`Rescale`: one step of fixed size T, the weights scaled down after each optimiser step (see ``project``).

In training the norm is *estimated*, from below, by one warm-started power iteration a step. In evaluation it is *bounded*, from
above, by ``norm_bound`` for any input size: an estimate may steer a training, only a bound decides what is deployed.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.bounds import norm_bound
from nonexpansive.math.tableau import ButcherTableau

Linear = Callable[[nn.Module, Tensor], tuple[Tensor, Callable[..., Tensor]]]
"""Gives (Ax, s ↦ Aᵀs) for a linear layer and x."""

SMALLEST = 1e-30
"""Squared norms below this count as zero, where any step is safe."""


class NormControl(nn.Module):
    """What all controls share: the wanted α and the power iteration's vector, which is state (a buffer), seeded alike everywhere.

    ``alpha`` in (0, 1]: the averagedness wanted of the block; 1 asks for non-expansiveness alone.
    """

    vector: Tensor

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        if not 0 < alpha <= 1:
            raise BadInput(f"alpha is the wanted averagedness, in (0, 1] with 1 for non-expansive alone; got {alpha}")
        self.alpha = alpha
        self.register_buffer("vector", torch.zeros(0))

    def attach(self, linear: nn.Module, shape: tuple[int, ...]) -> None:
        """Give the power iteration its start: a random unit vector of the linear map's input shape."""
        vector = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        reference = next(linear.parameters(), torch.zeros(()))
        self.vector = (vector / vector.norm()).to(reference.device, reference.dtype)

    def squared_norm(self, linear: nn.Module, apply: Linear) -> Tensor:
        """An estimate of ‖A‖² from below, differentiable in A: ‖Av‖² at the v of the power iteration, which moves on by one."""
        with torch.autocast(self.vector.device.type, enabled=False):
            v = self.vector.detach().clone()
            image, pullback = apply(linear, v)
            with torch.no_grad():
                ahead = pullback(image.detach())
                size = ahead.norm()
                self.vector.copy_(torch.where(size > 0, ahead / size.clamp_min(1e-38), v))
            return image.square().sum().clamp_min(SMALLEST)

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor, int]:
        """The step h (differentiable) and the number of substeps for an estimate of ‖A‖²."""
        raise NotImplementedError

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        """The step h and the number of substeps for a bound ‖A‖ ≤ norm: proved safe."""
        raise NotImplementedError

    def rescaling(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> float:
        """The factor by which weights of that norm are to be multiplied after an optimiser step (1: left alone)."""
        return 1.0

    def largest(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> float:
        """The largest safe h, rounded down far enough to stay safe when stored in float32."""
        smoothness = lipschitz * norm * norm
        if smoothness <= SMALLEST:
            return 1.0 / SMALLEST
        return tableau.max_step(1 / smoothness, self.alpha) * (1 - 2.0**-21)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class MaximalStep(NormControl):
    """One step of the largest safe size, h = 2ν/(1/α - 1 + 1/r)."""

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor, int]:
        return tableau.max_step(1 / lipschitz, self.alpha) / squared, 1

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        return self.largest(norm, lipschitz, tableau), 1


class _FixedSpan(NormControl):
    def __init__(self, alpha: float = 1.0, span: float = 1.0) -> None:
        super().__init__(alpha)
        if not (span > 0 and math.isfinite(span)):
            raise BadInput(f"span is the time T that the block integrates over, a finite number above 0; got {span}")
        self.span = span

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, span={self.span:g}"


class AdaptiveSteps(_FixedSpan):
    """The paper's scheme: time T = ``span`` in n = ⌈T·L_σ‖A‖²(1/α - 1 + 1/r)/2⌉ substeps of T/n, and n = 1 for a zero norm.

    In training n follows the estimate, so each step reads one number back from the device.
    """

    def __init__(self, alpha: float = 1.0, span: float = 1.0, most: int = 100) -> None:
        super().__init__(alpha, span)
        self.most = most

    def _count(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> int:
        n = max(1, math.ceil(self.span / self.largest(norm, lipschitz, tableau)))
        if n > self.most:
            raise Refused(
                f"a span of {self.span:g} with a spectral norm of {norm:.3g} needs {n} substeps, more than most={self.most}: the "
                "weights have grown too large. Lower the learning rate, add weight decay, or use the maximal or rescale control."
            )
        return n

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor, int]:
        n = self._count(float(squared.detach()) ** 0.5, lipschitz, tableau)
        return squared.new_tensor(self.span / n), n

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        n = self._count(norm, lipschitz, tableau)
        return self.span / n * (1 - 2.0**-22), n

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, most={self.most}"


class Rescale(_FixedSpan):
    """One step of size ``span``; after each optimiser step the weights are scaled until that step is safe.

    Evaluation takes a smaller step where the estimate that scaled the weights was short of the bound.
    """

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor, int]:
        return squared.new_tensor(self.span), 1

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        return min(self.span, self.largest(norm, lipschitz, tableau)), 1

    def rescaling(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> float:
        return min(1.0, math.sqrt(self.largest(norm, lipschitz, tableau) / self.span))


CONTROLS: dict[str, type[NormControl]] = {"maximal": MaximalStep, "adaptive": AdaptiveSteps, "rescale": Rescale}


def control(which: str | NormControl, alpha: float | None = None) -> NormControl:
    """A control by name ("maximal", "adaptive", "rescale") with the wanted α, or the given one as it is."""
    if isinstance(which, NormControl):
        if alpha is not None and alpha != which.alpha:
            raise BadInput(f"alpha={alpha} contradicts the control's own alpha={which.alpha}: give it once")
        return which
    if which not in CONTROLS:
        close = difflib.get_close_matches(str(which), CONTROLS, 1)
        raise BadInput(f"no control {which!r}{f', did you mean {close[0]!r}?' if close else ''}; there are {sorted(CONTROLS)}")
    return CONTROLS[which](alpha=1.0 if alpha is None else alpha)


# ------------------------------------------------------------------------------------------------ bounds, remembered by content

_BOUNDS: OrderedDict[bytes, float] = OrderedDict()
_REMEMBERED = 4096


def sound_norm(linear: nn.Module) -> float:
    """``norm_bound(linear)`` for any input size, remembered by the content of the weights (never by their identity)."""
    if callable(getattr(linear, "norm_bound", None)):
        return norm_bound(linear)
    digest = hashlib.blake2b(repr(linear).encode(), digest_size=16)
    weight = linear.weight.detach()  # type: ignore[union-attr]
    digest.update(str((weight.dtype, tuple(weight.shape))).encode())
    digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    key = digest.digest()
    if key not in _BOUNDS:
        _BOUNDS[key] = norm_bound(linear)
        if len(_BOUNDS) > _REMEMBERED:
            _BOUNDS.popitem(last=False)
    return _BOUNDS[key]
