"""Classifiers: features with a certificate, and a linear layer on top whose rows decide the margins.

Ours is isometric almost everywhere: pixel-unshuffling and zero channels instead of striding and lifting, flows of the largest
safe step, which are orthogonal maps wherever AᵀA is a multiple of the identity, MaxMin between them (Meunier et al. 2022,
arXiv:2110.12690; Prach et al. 2024, arXiv:2311.16833). Beside it stand the two networks of Sherry et al. 2024, §6.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from nonexpansive.errors import BadInput, Refused
from nonexpansive.math.certificate import (
    Certificate,
    Shape,
    chain,
    entries,
    fold,
    from_enclosure,
    isometry,
    require_out_of_place,
    rule,
)
from nonexpansive.math.enclosure import Affine, Enclosure
from nonexpansive.math.rounding import euclidean, root, times
from nonexpansive.nn.flow import GradientFlow
from nonexpansive.nn.majorant import Rigid, Trace, Views, trace, tracer
from nonexpansive.nn.resize import Residual, Scale
from nonexpansive.nn.sort import MaxMin


class Classifier(nn.Module):
    """Images (B, *shape) in [0, 1] → logits (B, K): ``head(features(x))``.

    - ``features``: (B, *shape) → (B, d), the part whose Lipschitz constant L is certified;
    - ``head``: linear, (K, d); the prediction i is certain within min_j (z_i - z_j)/(L‖w_i - w_j‖);
    - ``shape``: (C, H, W) of one image; ``classes``: the K names.
    """

    def __init__(self, features: nn.Module, head: nn.Linear, shape: Sequence[int], classes: Sequence[str]) -> None:
        super().__init__()
        if len(classes) != head.out_features:
            raise BadInput(f"{head.out_features} logits need as many names of classes, not {len(classes)}")
        self.features, self.head = features, head
        self.shape, self.classes = tuple(shape), tuple(map(str, classes))

    def forward(self, x: Tensor, truth: Tensor | None = None, reach: float = 0.0) -> Tensor:
        """Logits (B, K). With the true classes ``truth`` (B,), for training: the strongest rival's logit is changed by how much the
        bound near each image (:mod:`nonexpansive.nn.majorant`) of what the margin loses within ``reach`` differs from what it
        could by L = 1. Raises Refused for features through which no such bound is known."""
        if tuple(x.shape[1:]) != self.shape:
            raise BadInput(f"this classifier takes images (B, {', '.join(map(str, self.shape))}), not {tuple(x.shape)}")
        if truth is None:
            return self.head(self.features(x))
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # of an image in bfloat16 the bound would round away
        met, weight = trace(self.features, x, sound=False), self.head.weight
        logits = F.linear(met.output, weight, self.head.bias).to(x.dtype)
        rival = logits.detach().scatter(1, truth[:, None], -torch.inf).argmax(1)
        rows = (weight[truth] - weight[rival]).to(x.dtype)
        fall = met.majorant(rows, x.new_full(truth.shape, reach)).within(reach)
        change = fall - reach * rows.norm(dim=1)
        return logits.scatter_add(1, rival[:, None], change.to(logits)[:, None])


@rule(Classifier)
def _classifier(module: Classifier, shape: Shape, unit: float) -> Certificate:
    if shape != module.shape:
        raise Refused(f"this classifier takes images of shape {module.shape}, not {shape}")
    features = fold(module.features, shape, unit)
    return chain(features, fold(module.head, features.codomain, unit), rule="Classifier: head ∘ features")


class Centre(nn.Module):
    """x ↦ x - mean, a translation: nothing is divided by a standard deviation, which would multiply L by its inverse."""

    mean: Tensor

    def __init__(self, mean: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


@rule(Centre)
def _centre(module: Centre, shape: Shape, unit: float) -> Certificate:
    if len(shape) != 3 or shape[0] != len(module.mean):
        raise Refused(
            f"Centre has the means of {len(module.mean)} channels, which does not fit a sample of shape {shape}"
        )
    size = entries(shape)
    offset = times(euclidean(module.mean), root(shape[1] * shape[2]))
    out = Enclosure.input(unit, size) + Enclosure(Affine(0.0, offset), Affine(), unit, size)
    return from_enclosure(out, lipschitz=1.0, averaged=0.0, domain=shape, codomain=shape, rule="Centre, a translation")


class Channels(nn.Module):
    """Zero channels appended, or the last ones dropped, so that ``channels`` are left: P* or P. (B, C, ...) → (B, channels, ...)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 1:
            raise BadInput(f"channels must be at least 1, not {channels}")
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        return str(self.channels)


@rule(Channels)
def _channels(module: Channels, shape: Shape, unit: float) -> Certificate:
    kind = "zero channels appended" if module.channels >= shape[0] else "channels dropped"
    return isometry(shape, (module.channels, *shape[1:]), f"Channels, {kind}")


class Symmetrised(nn.Module):
    """x ↦ the mean of T(x) over x, its mirror image, and both shifted by each of ``shifts`` pixels down and right, and up and left.

    A mirror image is an isometry of x and a shift that brings in zeros has norm 1, so the mean is as Lipschitz as T; margins gain
    what an average over views gains, at no cost in the certificate. In training mode it is T alone. (B, C, H, W) → as T.
    """

    def __init__(self, inner: nn.Module, shifts: Sequence[int] = ()) -> None:
        super().__init__()
        self.inner, self.shifts = inner, tuple(sorted({0, *map(int, shifts)}))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.training else self.mean([self.inner(view) for view in self.views(x)])

    def views(self, x: Tensor) -> list[Tensor]:
        """What T sees of x: each (B, C, H, W)."""
        return [view for by in self._moves() for y in [shifted(x, by)] for view in (y, y.flip(-1))]

    def _moves(self) -> list[tuple[int, int]]:
        return [by for s in self.shifts for by in sorted({(s, s), (-s, -s)})]

    def back(self, views: list[Tensor]) -> Tensor:
        """The adjoint of ``views``: what a functional of the views is as one of x."""
        moves = [(-by[0], -by[1]) for by in self._moves() for _ in range(2)]
        flipped = [view.flip(-1) if k % 2 else view for k, view in enumerate(views)]
        return torch.stack([shifted(view, by) for view, by in zip(flipped, moves, strict=True)]).sum(0)

    def mean(self, outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs).sum(0) * (1 / len(outputs))

    def extra_repr(self) -> str:
        return f"shifts={self.shifts}"


def shifted(x: Tensor, by: tuple[int, int]) -> Tensor:
    """x moved by so many pixels down and right, zeros coming in. (B, C, H, W) → (B, C, H, W)"""
    down, right = by
    return F.pad(x, (right, -right, down, -down)) if by != (0, 0) else x


@rule(Symmetrised)
def _symmetrised(module: Symmetrised, shape: Shape, unit: float) -> Certificate:
    if len(shape) != 3:
        raise Refused(f"Symmetrised mirrors pictures (C, H, W), not samples of shape {shape}")
    require_out_of_place(module.inner, "which Symmetrised uses again")
    if module.training:
        raise Refused("Symmetrised is in training mode, where it takes no mean: call .eval() before certifying")
    inner = fold(module.inner, shape, unit)
    views = 2 * (2 * len(module.shifts) - 1)
    one = total = Enclosure.input(unit, entries(inner.codomain))
    for _ in range(views - 1):
        total = total + one
    mean = from_enclosure(
        total * (1 / views), lipschitz=1.0, averaged=None, domain=inner.codomain, codomain=inner.codomain,
        rule="the mean of what is at most that large",
    )  # fmt: skip
    return chain(inner, mean, rule=f"Symmetrised: the mean over {views} views, each of norm at most 1")


@tracer(Centre)
def _centre_traced(module: Centre, x: Tensor, sound: bool) -> Trace:
    return Trace([], module(x), sound)


@tracer(Channels)
def _channels_traced(module: Channels, x: Tensor, sound: bool) -> Trace:
    before, after = x.shape[1], module.channels

    def dropped(w: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(w[:, :after]), w[:, after:]), 1)

    return Trace([Rigid(module, Channels(before), dropped if before > after else None)], module(x), sound)


@tracer(Symmetrised)
def _symmetrised_traced(module: Symmetrised, x: Tensor, sound: bool) -> Trace:
    if module.training:
        return trace(module.inner, x, sound)
    parts, outputs, _ = zip(*(trace(module.inner, view, sound) for view in module.views(x)), strict=True)
    return Trace([Views(module.views, module.back, parts)], module.mean(list(outputs)), sound)


class UnitRows(nn.Module):
    """A parametrization W ↦ the rows w_i/‖w_i‖: no class is favoured by its weights' size, and none of it is wasted in margins."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def orthogonal_(linear: nn.Conv2d | nn.Linear, spread: float = 0.3) -> None:
    """Weights that are nearly orthogonal, so that a flow of the largest step is nearly a reflection in as many directions as it
    has: an orthogonal matrix at the kernel's centre, and normal numbers of variance ``spread``²/(n·k²) everywhere. Bias 0."""
    weight = linear.weight
    with torch.no_grad():
        if weight.ndim == 2:
            nn.init.orthogonal_(weight)
        else:
            outputs, inputs, height, width = weight.shape
            weight.normal_(std=spread / math.sqrt(max(outputs, inputs) * height * width))
            weight[:, :, height // 2, width // 2] += nn.init.orthogonal_(torch.empty(outputs, inputs))
        if linear.bias is not None:
            linear.bias.zero_()


def unit_head(features: int, classes: int) -> nn.Linear:
    """A last layer whose rows are kept at norm 1."""
    head = nn.Linear(features, classes)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    register_parametrization(head, "weight", UnitRows())
    return head


def _names(classes: Sequence[str] | int) -> list[str]:
    return [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)


def flow_classifier(
    shape: Sequence[int] = (3, 32, 32),
    classes: Sequence[str] | int = 10,
    stages: Sequence[dict[str, object]] = ({"unshuffle": 2, "channels": 64, "kernels": [3, 3]},),
    mean: Sequence[float] | None = None,
    activation: str = "relu",
    control: str = "maximal",
    sorting: bool = True,
    dense: Sequence[int] = (),
    symmetrised: bool = False,
    shifts: Sequence[int] = (),
) -> Classifier:
    """A 1-Lipschitz classifier: in each stage pixel-unshuffle, set the number of channels, then flows; dense flows after the last.

    A stage is a table of ``unshuffle`` (the factor; 1 if left out), ``channels``, ``kernels``, the odd kernel size of each flow's
    convolution A, and ``neurons``, the number of channels of Ax (``channels`` if left out); ``sorting``, MaxMin follows each flow.
    What the last stage gives is flattened; ``dense`` has the number of neurons of each flow that follows, whose A is a matrix. The
    rows of the last layer are kept at norm 1. ``mean`` of each channel is subtracted first (1/2 unless given). ``symmetrised``, the
    features are in evaluation mode the mean over the picture and its mirror image, and over those moved by ``shifts`` pixels.
    """
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < 1:
        raise BadInput(f"shape must be (channels, height, width) of one image, not {shape}")

    def flow(linear: nn.Conv2d | nn.Linear) -> list[nn.Module]:
        orthogonal_(linear)
        return [GradientFlow(linear, activation, control=control), *([MaxMin()] if sorting else [])]

    layers: list[nn.Module] = [Centre(mean if mean is not None else [0.5] * shape[0])]
    channels, height, width = shape
    if not isinstance(stages, Sequence) or not all(isinstance(stage, dict) for stage in stages):
        raise BadInput(
            f"stages is a list of tables, such as {{unshuffle = 2, channels = 64, kernels = [3]}}; not {stages!r}"
        )
    for stage in stages:
        if unknown := set(stage) - {"unshuffle", "channels", "kernels", "neurons"}:
            raise BadInput(f"a stage has unshuffle, channels, kernels and neurons, but no {', '.join(sorted(unknown))}")
        factor, kernels = int(stage.get("unshuffle", 1)), list(stage.get("kernels", []))  # type: ignore[call-overload]
        if factor < 1 or any(type(kernel) is not int or kernel < 1 for kernel in kernels):
            raise BadInput(f"unshuffle is a factor and kernels a list of sizes, whole numbers from 1; not {stage}")
        if height % factor or width % factor:
            raise BadInput(
                f"a picture of {height}x{width} cannot be unshuffled by {factor}: take a divisor of its sides"
            )
        if any(kernel % 2 == 0 for kernel in kernels):
            raise BadInput(f"kernels must be odd, so that the flows keep the size of the picture; not {kernels}")
        channels, height, width = channels * factor**2, height // factor, width // factor
        if factor > 1:
            layers.append(nn.PixelUnshuffle(factor))
        wanted = int(stage.get("channels", channels))  # type: ignore[call-overload]
        if sorting and wanted % 2:
            raise BadInput(f"channels must be even, so that MaxMin can pair them; not {wanted}")
        if wanted != channels:
            layers.append(Channels(wanted))
            channels = wanted
        neurons = int(stage.get("neurons", channels))  # type: ignore[call-overload]
        if neurons < 1:
            raise BadInput(f"neurons must be at least 1, not {neurons}")
        for kernel in kernels:
            layers += flow(nn.Conv2d(channels, neurons, kernel, padding=kernel // 2))
    layers.append(nn.Flatten())
    size = channels * height * width
    if not isinstance(dense, Sequence) or any(type(neurons) is not int or neurons < 1 for neurons in dense):
        raise BadInput(f"dense is a list of how many neurons each dense flow has, at least 1; not {dense!r}")
    if sorting and dense and size % 2:
        raise BadInput(
            f"dense flows of {size} numbers, which is odd, so that MaxMin cannot pair them: set sorting = false"
        )
    for neurons in dense:
        layers += flow(nn.Linear(size, neurons))
    names = _names(classes)
    features = nn.Sequential(*layers)
    if shifts and not symmetrised:
        raise BadInput("shifts are views of symmetrised features: set symmetrised as well")
    if symmetrised:  # centred first, so that what a shift brings in is no black border
        features = nn.Sequential(layers[0], Symmetrised(features[1:], shifts))
    return Classifier(features, unit_head(size, len(names)), shape, names)


def paper_classifier(
    shape: Sequence[int] = (3, 32, 32),
    classes: Sequence[str] | int = 10,
    width: int = 16,
    blocks: int = 5,
    stages: int = 3,
    control: str = "adaptive",
    ordinary: bool = False,
    rescaled: bool = False,
) -> Classifier:
    """The network of Sherry et al. 2024 for CIFAR-10 (254,810 parameters), and the ordinary ResNet of the same skeleton (497,290).

    A 1x1 lift to ``width`` channels; ``stages`` of ``blocks`` each followed by a 1x1 convolution that doubles the channels and
    2x2 average pooling; global mean; linear. A block is an Euler step of the gradient flow x - hAᵀσ(Ax + b), or, where
    ``ordinary``, x + Bσ(Ax + b) + c with a free B: 3x3 convolutions, σ the leaky ReLU of slope 0.01. ``rescaled``, each pooling is
    multiplied up to norm 1: as maps the two kinds are multiples of each other, but the logits train at another scale.
    """
    shape = tuple(shape)
    if len(shape) != 3 or min(shape[1:]) < 2**stages:
        raise BadInput(f"pictures of shape {shape} are too small to be halved {stages} times")

    def block(channels: int) -> nn.Module:
        first = nn.Conv2d(channels, channels, 3, padding=1)
        if not ordinary:
            return GradientFlow(first, nn.LeakyReLU(0.01), control=control)
        return Residual(nn.Sequential(first, nn.LeakyReLU(0.01), nn.Conv2d(channels, channels, 3, padding=1)))

    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 1)]
    for _ in range(stages):
        layers += [block(width) for _ in range(blocks)]
        layers += [nn.Conv2d(width, 2 * width, 1), nn.AvgPool2d(2), *([Scale(2)] if rescaled else [])]
        width *= 2
    names = _names(classes)
    positions = math.prod(n // 2**stages for n in shape[1:])
    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *([Scale(math.sqrt(positions))] if rescaled else [])]
    features = nn.Sequential(*layers, *mean)
    return Classifier(features, nn.Linear(width, len(names)), shape, names)


def dense_classifier(
    shape: Sequence[int] = (1, 8, 8), classes: Sequence[str] | int = 10, depth: int = 8, ordinary: bool = False
) -> Classifier:
    """``depth`` residual blocks on flattened pictures, every weight held at spectral norm 1 (torch's ``spectral_norm``), σ the ReLU.

    A block is the flow step x - hAᵀσ(Ax + b), non-expansive at any depth, or, where ``ordinary``, x + Bσ(Ax + b), of which 2 is the
    Lipschitz constant that can be proved, and 2 to the power of ``depth`` that of all.
    """
    size = math.prod(shape)
    if depth < 1:
        raise BadInput(f"depth must be at least 1, not {depth}")

    def linear(bias: bool = True) -> nn.Linear:
        return spectral_norm(nn.Linear(size, size, bias), n_power_iterations=4)  # type: ignore[return-value]

    def block() -> nn.Module:
        if ordinary:
            return Residual(nn.Sequential(linear(), nn.ReLU(), linear(False)))
        return GradientFlow(linear())

    names = _names(classes)
    features = nn.Sequential(Centre([0.5] * shape[0]), nn.Flatten(), *(block() for _ in range(depth)))
    return Classifier(features, unit_head(size, len(names)), shape, names)
