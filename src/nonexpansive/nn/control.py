"""Keeping the spectral-norm constraint while training: five ways behind one interface, and none, to compare with.

A step of size h of a method with contractivity radius r is α-averaged (α = 1: non-expansive) if
h ≤ 2ν/(1/α - 1 + 1/r) with ν = 1/(L_σ‖A‖²). So a bound on ‖A‖ has to steer either the step or the weights:

- :class:`AdaptiveSteps`: the weights are free, the block integrates over a fixed time T in n substeps of T/n, n as small as
  is safe (Sherry et al. 2024, Physica D 463, 134159);
- :class:`MaximalStep`: one step, the largest safe one, differentiated through the norm (for Euler and α = 1 this is the
  convex potential layer of Meunier et al. 2022);
- :class:`CappedStep`: the same, with the weights kept at ‖A‖ ≤ 1;
- :class:`Rescale`: one step of fixed size T, the weights scaled down after each optimiser step (see ``project``);
- :class:`LipschitzStep`: one step that may stretch, by no more than a given L > 1: σ may decrease;
- :class:`Unconstrained`: one step of fixed size and free weights, of which nothing is proved: what the constraint costs.

In training the norm is *estimated*, from below, by one warm-started power iteration a step. In evaluation it is *bounded*, from
above, by ``norm_bound`` for any input size: an estimate may steer a training, only a bound decides what is deployed.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.activation import Slopes, monotone, slopes
from nonexpansive.math.bounds import norm_bound
from nonexpansive.math.certificate import split_averaged
from nonexpansive.math.rounding import down, times, up
from nonexpansive.math.tableau import ButcherTableau

Linear = Callable[[nn.Module, Tensor], tuple[Tensor, Callable[..., Tensor]]]
"""Gives (Ax, s ↦ Aᵀs) for a linear layer and x."""

WARM_UP = 20
"""Power iterations on fresh weights, so that training starts with an estimate of ‖A‖ that is near it."""

SMALLEST = 1e-12
"""L_σ‖A‖² below this counts as this, so that no step is larger than the arithmetic of the weights bears."""


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
        if self.vector.numel():
            raise BadInput("this control belongs to another block already: give each block a control of its own")
        plain = isinstance(dict(linear.named_parameters(recurse=False)).get("weight"), nn.Parameter)
        if type(self).rescaling is not NormControl.rescaling and not plain:
            raise Refused(
                f"{type(self).__name__} multiplies a plain weight, which {type(linear).__name__} does not have: "
                "use the maximal or the adaptive control"
            )
        vector = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        reference = next(linear.parameters(), torch.zeros(()))
        # on a CPU, torch convolves one small contiguous picture by a path that takes twice the time
        if vector.ndim == 4:
            vector = vector.contiguous(memory_format=torch.channels_last)
        self.vector = (vector / vector.norm()).to(reference.device, reference.dtype)

    def slopes(self, activation: nn.Module) -> Slopes:
        """Bounds on the slopes of σ, where it suits the control. Raises Refused if it may decrease."""
        return monotone(activation)

    def squared_norm(self, linear: nn.Module, apply: Linear) -> Tensor:
        """An estimate of ‖A‖² from below, differentiable in A: ‖Av‖² at the v of the power iteration, which moves on by one."""
        with torch.autocast(self.vector.device.type, enabled=False):
            v = self.vector.detach().clone()
            image, pullback = apply(linear, v)
            with torch.no_grad():
                ahead = pullback(image.detach())
                size = torch.linalg.vector_norm(ahead, dtype=_wide(ahead))
                self.vector.copy_(torch.where((size > 0) & (size < math.inf), ahead / size, v))
            return image.to(_wide(image)).square().sum()

    def warm_up(self, linear: nn.Module, apply: Linear) -> None:
        """Bring the estimate near ‖A‖: what it falls short by, the first training steps of a deep network would multiply."""
        with torch.no_grad():
            for _ in range(WARM_UP):
                NormControl.squared_norm(self, linear, apply)

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor | float, int]:
        """The step h (differentiable) and the number of substeps for an estimate of ‖A‖²."""
        raise NotImplementedError

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        """The step h and the number of substeps of evaluation mode, for a bound ‖A‖ ≤ norm: safe if anything is to be proved."""
        raise NotImplementedError

    def rescaling(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> float:
        """The factor by which weights of that norm are to be multiplied after an optimiser step (1: left alone)."""
        return 1.0

    def largest(self, norm: float, lipschitz: float, tableau: ButcherTableau, steps: int = 1) -> float:
        """The largest h with which ``steps`` steps together are α-averaged, rounded down far enough to be stored in float32."""
        return tableau.max_step(self.scale(norm, lipschitz), self._each(steps)) * (1 - 2.0**-21)

    def scale(self, norm: float, lipschitz: float) -> float:
        """ν = 1/(L_σ‖A‖²), of which steps are multiples, rounded down. Raises Refused where it is 0."""
        smoothness = max(times(times(lipschitz, norm), norm), SMALLEST)
        if not smoothness < 1e300:
            raise Refused(f"the norm of A is {norm:g}, so no step is short enough: the weights have diverged")
        return down(1 / smoothness)

    def _each(self, steps: int) -> float:
        """The α that each of ``steps`` steps may have."""
        return self.alpha if steps == 1 or self.alpha == 1 else split_averaged(self.alpha, steps)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class MaximalStep(NormControl):
    """One step of the largest safe size, h = 2ν/(1/α - 1 + 1/r)."""

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor | float, int]:
        return tableau.max_step(1.0, self.alpha) / (lipschitz * squared).clamp_min(SMALLEST), 1

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        return self.largest(norm, lipschitz, tableau), 1


class CappedStep(MaximalStep):
    """The largest safe step, and weights scaled back to ‖A‖ ≤ 1 after each optimiser step.

    With the step in proportion to 1/‖A‖² nothing else holds the weights' size. Under an optimiser whose steps do not shrink with
    the gradient, such as Adam, they drift upwards until a bounded σ saturates and the block stands still.
    """

    def rescaling(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> float:
        return min(1.0, 1.0 / max(norm, SMALLEST))


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

    For α < 1 the n steps are shortened where together they would exceed α: there are weights so large that no number of
    substeps is α-averaged over the whole time T. In training n follows the estimate, so each step reads one number back from
    the device. Raises Refused where more than ``most`` substeps would be needed.
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

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor | float, int]:
        n = self._count(float(squared.detach()) ** 0.5, lipschitz, tableau)
        if self.alpha == 1:
            return self.span / n, n
        return (tableau.max_step(1.0, self._each(n)) / (lipschitz * squared).clamp_min(SMALLEST)).clamp_max(
            self.span / n
        ), n

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        n = self._count(norm, lipschitz, tableau)
        return min(self.span / n, self.largest(norm, lipschitz, tableau, n)) * (1 - 2.0**-22), n

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, most={self.most}"


class Rescale(_FixedSpan):
    """One step of size ``span``; after each optimiser step the weights are scaled until that step is safe.

    Evaluation takes a smaller step where the estimate that scaled the weights was short of the bound.
    """

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor | float, int]:
        return self.span, 1

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        return min(self.span, self.largest(norm, lipschitz, tableau)), 1

    def rescaling(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> float:
        return min(1.0, math.sqrt(self.largest(norm, lipschitz, tableau) / self.span))


class LipschitzStep(NormControl):
    """One step of Euler's method, the longest with which the block is L-Lipschitz, for an L > 1: it may stretch, by no more than that.

    V need not be convex, σ may decrease: with its slopes in [-l, s], I - h∇²V lies between 1 - hs‖A‖² and 1 + hl‖A‖², hence
    h = min((L - 1)/l, (L + 1)/s)/‖A‖². Nothing is averaged then; what is certified is L alone.
    """

    def __init__(self, lipschitz: float) -> None:
        super().__init__()
        if not 1 < lipschitz < math.inf:
            raise BadInput(f"lipschitz is the constant wanted of the block, a finite number above 1; got {lipschitz}")
        self.lipschitz = float(lipschitz)

    def slopes(self, activation: nn.Module) -> Slopes:
        """With an upper end so large that the step which suits it suits the lower one, too."""
        found, turn = slopes(activation), up((self.lipschitz + 1) / down(self.lipschitz - 1))
        return replace(found, high=max(found.high, times(turn, max(0.0, -found.low))))

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor | float, int]:
        return self._reach(tableau) / (lipschitz * squared).clamp_min(SMALLEST), 1

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        return self._reach(tableau) * self.scale(norm, lipschitz) * (1 - 2.0**-21), 1

    def _reach(self, tableau: ButcherTableau) -> float:
        if tableau.stages > 1:
            raise Refused(f"a bound on how far a step may stretch is known for Euler's method, not for {tableau.name}")
        return self.lipschitz + 1

    def extra_repr(self) -> str:
        return f"lipschitz={self.lipschitz:g}"


class Unconstrained(NormControl):
    """One step, always of the size that was the largest safe one when training began (by the estimate then), and free weights.

    The ordinary twin of a constrained network: the same function before training, as fast. As the weights outgrow the step, the
    α of its certificate rises, is lost at 1, and L exceeds 1. σ may decrease, in which case L exceeds 1 from the start. The size
    of the step is a buffer, saved with the weights.
    """

    size: Tensor

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__(alpha)
        self.register_buffer("size", torch.zeros(()))

    def attach(self, linear: nn.Module, shape: tuple[int, ...]) -> None:
        super().attach(linear, shape)
        self.size = self.size.to(self.vector)
        self._begun = False

    def slopes(self, activation: nn.Module) -> Slopes:
        return slopes(activation)

    def squared_norm(self, linear: nn.Module, apply: Linear) -> Tensor:
        self._begun = self._begun or bool(self.size > 0)  # read from the device until it is so, and never again
        if not self._begun:
            self.warm_up(linear, apply)  # of the weights as they are now: the first estimate decides
        return super().squared_norm(linear, apply)

    def training_step(self, squared: Tensor, lipschitz: float, tableau: ButcherTableau) -> tuple[Tensor | float, int]:
        smoothness = lipschitz * squared.detach()
        largest = (tableau.max_step(1.0, self.alpha) / smoothness.clamp_min(SMALLEST)).to(self.size)
        size = torch.where(self.size > 0, self.size, largest)
        self.size.copy_(torch.where(smoothness > SMALLEST, size, self.size))
        return size, 1

    def safe_step(self, norm: float, lipschitz: float, tableau: ButcherTableau) -> tuple[float, int]:
        largest = self.largest(norm, lipschitz, tableau)
        return float(self.size) or largest, 1


CONTROLS: dict[str, type[NormControl]] = {
    "maximal": MaximalStep,
    "capped": CappedStep,
    "adaptive": AdaptiveSteps,
    "rescale": Rescale,
    "unconstrained": Unconstrained,
}


def control(which: str | NormControl, alpha: float | None = None) -> NormControl:
    """A control by name ("maximal", "capped", "adaptive", "rescale", "unconstrained") with the wanted α, or the given one as it is."""
    if isinstance(which, NormControl):
        if alpha is not None and alpha != which.alpha:
            raise BadInput(f"alpha={alpha} contradicts the control's own alpha={which.alpha}: give it once")
        return which
    if which not in CONTROLS:
        close = difflib.get_close_matches(str(which), CONTROLS, 1)
        raise BadInput(
            f"no control {which!r}{f', did you mean {close[0]!r}?' if close else ''}; there are {sorted(CONTROLS)}"
        )
    return CONTROLS[which](alpha=1.0 if alpha is None else alpha)


# ------------------------------------------------------------------------------------------------ bounds, remembered by content

_BOUNDS: OrderedDict[bytes, float] = OrderedDict()
_REMEMBERED = 4096


def sound_norm(linear: nn.Module) -> float:
    """``norm_bound(linear)`` for any input size, remembered by the content of the weights (never by their identity)."""
    weight = getattr(linear, "weight", None)
    if callable(getattr(linear, "norm_bound", None)) or not isinstance(weight, Tensor):
        return norm_bound(linear)
    key = content(linear, weight)
    if key not in _BOUNDS:
        _BOUNDS[key] = norm_bound(linear)
        if len(_BOUNDS) > _REMEMBERED:
            _BOUNDS.popitem(last=False)
    return _BOUNDS[key]


def content(linear: nn.Module, weight: Tensor) -> bytes:
    """A key that tells layers and their weights apart. Raises Refused where the weights have no numbers that can be read."""
    kind = parametrize.type_before_parametrizations(linear)  # the type itself is one that torch made up
    digest = hashlib.blake2b(f"{kind} {linear!r} {weight.dtype} {tuple(weight.shape)}".encode(), digest_size=16)
    try:
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    except RuntimeError as error:
        raise Refused(
            "the norm of A cannot be bounded under a transform (torch.func.grad or vmap over the weights) or for tensors without "
            f"data: use training mode there ({error})"
        ) from error
    return digest.digest()


def _wide(x: Tensor) -> torch.dtype:
    """The type in which the norm of x is accumulated: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
