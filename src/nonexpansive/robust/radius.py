"""Certified radii: within which distance of an image a classifier's answer cannot change.

A classifier maps images (B, C, H, W) to logits z = Wφ(x) + b with φ of Lipschitz constant L. The margin z_i - z_j changes by at most
L‖w_i - w_j‖ per unit of distance, so the answer i at x is certain within

    r = min over j ≠ i of (z_i - z_j)/(L‖w_i - w_j‖)

(Tsuzuku, Sato, Sugiyama 2018, arXiv:1802.04034, with the pairwise norm of the last layer). Where no last linear layer is found, W
is the identity, ‖w_i - w_j‖ = √2 and L that of the whole network.

That is a statement about real numbers. What is computed here is a lower bound of r that holds for programs as well:

- The margin at x comes from a float64 copy of the network, less a bound on the copy's own rounding.
- For a program the answer must not change at any x' = x + δ that it may be given, ‖δ‖ ≤ r, so its rounding *at x'* counts.
  Layer k adds an error of at most e_k(‖y'‖), affine in the size of what it is given (:class:`Certificate`, ``error``), and
  ‖y'_k‖ ≤ ‖y_k‖ + L_1⋯L_k r with the sizes ‖y_k‖ known from the copy. Of a flow more is known: what its rounding may be at y_k
  itself (:func:`~nonexpansive.nn.flow.observe`), which replaces e_k(‖y_k‖), and e_k's slope bounds how much more it may be
  at y'_k. The sum over all layers is affine in r: α + βr. So

    z'_i - z'_j ≥ (z_i - z_j) - ‖w_i - w_j‖(Lr + α + βr) - ρ_i - ρ_j > 0  for r < (z_i - z_j - ‖w_i - w_j‖α - …)/(‖w_i - w_j‖(L + β) + …)

  with ρ the rounding of the last layer, affine in r too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nonexpansive.errors import BadInput, Diverging, Refused
from nonexpansive.math.certificate import Certificate, Shape, certify, chain
from nonexpansive.math.enclosure import NOTHING, SLACK, TINY, sizes
from nonexpansive.math.rounding import UNIT, above, gamma
from nonexpansive.nn.classifier import Classifier, Symmetrised
from nonexpansive.nn.descent import STEPS, converted, descend
from nonexpansive.nn.flow import LIPSCHITZ, GradientFlow, observe
from nonexpansive.nn.linear import is_torch
from nonexpansive.nn.majorant import ROUNDINGS, trace, untraced

REACH = 1.5
"""Near an image margins are bounded for a radius so many times the one that the Lipschitz constant gives."""


class Radii(NamedTuple):
    """For each image: ``prediction``, the class (N,) int64, and ``radius`` (N,) float64, 0 where nothing is certain.

    The radius is an ℓ2 distance in units of the image's values, over all its entries. The prediction is certain at every distance
    up to it. "Certified at ε" means radius > ε.
    """

    prediction: torch.Tensor
    radius: torch.Tensor


class _Met(NamedTuple):
    """What a layer is given, and what it may do to it: the ``size`` (N,), and a bound on the program's ``error`` (N,) there, if it
    is better than what the size alone gives (else infinite)."""

    size: Tensor
    error: Tensor


class _Layers(NamedTuple):
    """A classifier taken apart: the certificates of the layers up to the features, in order, and the last linear layer."""

    features: list[Certificate]
    head: nn.Linear | None


@dataclass(frozen=True, eq=False)
class CertifiedClassifier:
    """A classifier with what is proved about it; ``radii(x)`` proves it for images. Made by :func:`certify_classifier`.

    - ``model``: the classifier, as given; ``shape``: that of one image; ``classes``: how many logits it gives.
    - ``certificate``: that of the whole network; ``lipschitz``: L of the features (of the network, where there is no ``head``).
    - ``arithmetic``: "exact" (the exact map, and the float64 copy), or the type of the program for which the radii hold as well.
    - ``head``: whether the pairwise norms of a last linear layer are used.
    - ``statement``: what a radius says, in words.
    """

    model: nn.Module
    shape: Shape
    classes: int
    certificate: Certificate
    lipschitz: float
    arithmetic: str
    head: bool
    _reference: nn.Module
    _copy: _Layers
    _program: _Layers
    _unit: float

    @property
    def statement(self) -> str:
        exact = self.arithmetic == "exact"
        what = "the exact map, and the network run in float64," if exact else f"the {self.arithmetic} program"
        how = "pairwise margins of the last layer" if self.head else "margins over √2, no last linear layer was found"
        return (
            f"{what} gives one answer for all inputs within the radius (ℓ2, in units of the image's values); "
            f"L ≤ {above(self.lipschitz)}, {how}"
        )

    @property
    def only_global(self) -> str | None:
        """Why there are no ``local`` radii: the first layer through which they are not known; None where there are."""
        return untraced(self._features)

    @torch.inference_mode()
    def radii(self, x: Tensor, batch: int = 256, *, local: bool = False, steps: int = STEPS) -> Radii:
        """The class and the certified radius of each image of x (N, *shape), ``batch`` images at a time.

        ``local``: the larger of this radius and one from a bound on the margins near each image
        (:mod:`nonexpansive.nn.majorant`), made sharper by so many ``steps`` of descent on what it may choose. It takes some hundred
        times as long, and half as much again for each step.

        Raises BadInput for images of another shape, of whole numbers, or none at all, Refused for ``local`` where ``only_global``
        is not None.
        """
        self._check(x)
        if not isinstance(steps, int) or steps < 0:
            raise BadInput(f"steps = {steps}: a whole number of steps of descent, or 0 for none")
        parts = [self._radii(images, local, steps) for images in x.split(batch)]
        return Radii(torch.cat([p.prediction for p in parts]), torch.cat([p.radius for p in parts]))

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """The logits (N, classes) by what the radii hold for: the program, or where that is exact the float64 copy."""
        self._check(x)
        return (
            self._run(x)[1]
            if self.arithmetic == "exact"
            else self.model(x.to(next(self.model.parameters()), copy=True))
        )

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise BadInput(f"images of shape {tuple(x.shape[1:])}, but the certificate is for {self.shape}")
        if not x.is_floating_point():
            raise BadInput(f"images in {x.dtype}: the network takes values in [0, 1], so divide by 255 first")
        if len(x) == 0:
            raise BadInput("there are no images")

    def _run(self, x: Tensor) -> tuple[list[_Met], Tensor]:
        """What each layer of the copy meets, in order, and its logits."""
        return _follow(self._reference, self._seen(x), self._unit)

    def _seen(self, x: Tensor) -> Tensor:
        """x as the copy is given it."""
        like = next(self.model.parameters(), x)
        if self.arithmetic != "exact":
            x = x.to(like.dtype)  # the very image that the program is given
        y = x.to(like.device, torch.float64, copy=True)  # which a layer may overwrite
        return y.contiguous(memory_format=torch.channels_last) if y.ndim == 4 else y

    @property
    def _features(self) -> nn.Sequential:
        layers = list(_opened(self._reference))
        return nn.Sequential(*(layers if self._copy.head is None else layers[:-1]))

    def _radii(self, x: Tensor, local: bool, steps: int) -> Radii:
        y = self._seen(x)
        met, z = _follow(self._reference, y, self._unit)
        own = near = alpha = torch.zeros_like(met[0].size)
        beta, growth = 0.0, 1.0
        for (given, seen), copied, program in zip(met, self._copy.features, self._program.features, strict=False):
            # own: how far the copy may be from the exact map; alpha + beta·r: how far the program, at a distance of up to r
            L, e, slope = program.lipschitz, program.error, program.error.slope * LIPSCHITZ
            here = torch.minimum(e.slope * given + e.constant, seen)
            alpha, beta = L * alpha + here + slope * (own + alpha), L * beta + slope * (growth + beta)
            near = torch.maximum(near, own)
            own, growth = copied.lipschitz * own + copied.error.slope * given + copied.error.constant, L * growth

        prediction = z.argmax(1)
        rivals = torch.arange(self.classes, device=z.device) != prediction[:, None]
        head = self._copy.head
        if head is None:
            apart, fixed, moving = z.new_full((), 2**0.5), z.new_zeros(z.shape), z.new_zeros(self.classes)
        else:
            rows, size = sizes(head.weight), met[-1].size
            apart = torch.cdist(head.weight, head.weight, compute_mode="donot_use_mm_for_euclid_dist")[prediction]
            # the last layer's rounding in the copy and in the program: ρ = fixed + moving·r for each logit
            mine, theirs = _inner(head.in_features, UNIT[torch.float64]), _inner(head.in_features, self._unit)
            bias = 0.0 if head.bias is None else head.bias.abs()
            far = size + own + alpha
            fixed = mine[0] * (rows * size[:, None] + bias) + theirs[0] * (rows * far[:, None] + bias)
            fixed, moving = fixed + mine[1] + theirs[1], theirs[0] * rows * (growth + beta)
        apart = apart * SLACK + NOTHING
        margin = (z.gather(1, prediction[:, None]) - z) / SLACK
        lost = apart * (own + alpha)[:, None] + fixed + fixed.gather(1, prediction[:, None])
        speed = apart * (self.lipschitz + beta) + moving + moving.expand_as(z).gather(1, prediction[:, None])
        left = margin - lost * SLACK
        radius = torch.where(left > 0, left / speed / SLACK**2, 0.0).where(rivals, torch.inf)
        if local:
            elsewhere = speed - apart * self.lipschitz * (1 - ROUNDINGS)
            radius = self._refined(y, prediction, radius, left, elsewhere, torch.maximum(near, own), steps)
        return Radii(prediction, radius.amin(1).where(z.isfinite().all(1), 0.0))

    def _refined(
        self, y: Tensor, prediction: Tensor, radius: Tensor, left: Tensor, speed: Tensor, near: Tensor, steps: int
    ) -> Tensor:
        """``radius`` (N, classes), where it matters the larger of it and what a majorant of the exact margin's fall gives, with
        ``speed`` all that is lost per unit of distance besides. It is always the rival with the smallest radius that is looked at
        next, until that is one that has been."""
        head, radius, reach = self._copy.head, radius.clone(), REACH * radius
        rows = torch.eye(self.classes, dtype=y.dtype, device=y.device) if head is None else head.weight
        features, done = self._features, torch.zeros_like(radius, dtype=torch.bool)
        while True:
            closest, rival = radius.min(1)
            (these,) = ((closest > 0) & closest.isfinite() & ~done.gather(1, rival[:, None])[:, 0]).nonzero(
                as_tuple=True
            )
            if not len(these):
                return radius
            i, j = prediction[these], rival[these]
            apart, margin, at = rows[i] - rows[j], left[these, j], reach[these, j]
            choices = self._chosen(y[these], apart, margin, at, steps)
            bound = trace(features, y[these]).majorant(apart, at, near[these], choices)
            off = (sizes(rows)[i] + sizes(rows)[j]) * ROUNDINGS  # of the difference of the rows
            own = bound.radius(margin, speed[these, j] + off)
            radius[these, j] = torch.where(own > closest[these], own, closest[these])
            done[these, j] = True

    def _chosen(self, y: Tensor, rows: Tensor, margin: Tensor, reach: Tensor, steps: int) -> list[Any]:
        """What a bound does well to choose."""
        with torch.inference_mode(False), torch.no_grad():
            sketch = self._sketch
            dtype = next((p.dtype for p in sketch.parameters()), torch.float64)
            y, rows, margin, reach = (t.to(dtype, copy=True) for t in (y, rows, margin, reach))
            return converted(descend(trace(sketch, y, sound=False), rows, margin, reach, steps), torch.float64)

    @cached_property
    def _sketch(self) -> nn.Module:
        """The features in float32, or where their flows may not be run so, or would take other steps, as they are."""
        features = self._features
        rough = copy.deepcopy(features).float()
        flows = zip(
            *([m for m in net.modules() if isinstance(m, GradientFlow)] for net in (features, rough)), strict=True
        )
        same = all(is_torch(b.linear) and a.step()[1] == b.step()[1] for a, b in flows)
        return rough if same and untraced(rough) is None else copy.deepcopy(features)


def certify_classifier(
    model: nn.Module, shape: Shape | torch.Size | list[int], *, arithmetic: torch.dtype | None = None
) -> CertifiedClassifier:
    """A classifier, (B, *shape) → logits (B, classes), made ready to have its radii certified.

    A :class:`Classifier`, or a ``nn.Sequential`` that ends in ``nn.Linear`` (Sequentials within it included), is certified by the
    pairwise norms of that layer's rows, any other network by √2.

    ``arithmetic=None``: the radii hold for the exact map, and for the network run in float64, whose rounding costs next to nothing.
    ``torch.float32``: for the float32 program at every float32 input within the radius; the model must be in that type. That costs
    a part of the radius which grows with depth and width, since the rounding is bounded for the worst order of summation.

    Raises Refused where no certificate can be given, or the model does not end in at least two logits.
    """
    shape = tuple(int(n) for n in shape)
    certificate, program = _take_apart(model, shape, arithmetic)
    if len(certificate.codomain) != 1 or certificate.codomain[0] < 2:
        raise Refused(f"a classifier gives at least two logits for each image, but this gives {certificate.codomain}")
    reference = _in_float64(model)
    copied = _take_apart(reference, shape, torch.float64)[1]
    program = copied if arithmetic is None else program
    lipschitz = chain(*program.features, rule="features").lipschitz if program.features else 1.0
    if program.head is None:
        lipschitz = certificate.lipschitz
    made = CertifiedClassifier(
        model,
        shape,
        certificate.codomain[0],
        certificate,
        lipschitz,
        certificate.arithmetic,
        program.head is not None,
        reference,
        copied,
        program,
        UNIT[arithmetic or torch.float64],
    )
    _compare(made)
    return made


def estimated_radii(logits: Tensor, rows: Tensor | None = None, lipschitz: float = 1.0) -> Tensor:
    """The radii (B,) by the formula alone, from logits (B, K) in whatever type: to watch or steer a training, no certificate.

    ``rows`` (K, n): the weight of the last layer, None where there is none; ``lipschitz``: L of what comes before it.
    """
    best, prediction = logits.max(1)
    margins = best[:, None] - logits
    apart = logits.new_full((), 2**0.5) if rows is None else torch.cdist(rows, rows).to(logits)[prediction]
    radii = margins / (lipschitz * apart).clamp_min(torch.finfo(logits.dtype).tiny)
    return radii.scatter(1, prediction[:, None], torch.inf).amin(1)


# -------------------------------------------------------------------------------------------------------------------- parts


def _take_apart(model: nn.Module, shape: Shape, arithmetic: torch.dtype | None) -> tuple[Certificate, _Layers]:
    certificate = certify(model, shape, arithmetic=arithmetic)
    layers, parts = zip(*_flat(model, certificate), strict=True)
    if parametrize.type_before_parametrizations(layers[-1]) is nn.Linear and len(parts[-1].domain) == 1:
        return certificate, _Layers(list(parts[:-1]), layers[-1])
    return certificate, _Layers(list(parts), None)


def _flat(module: nn.Module, certificate: Certificate) -> Iterator[tuple[nn.Module, Certificate]]:
    """The layers in the order in which they are applied: Sequentials, the two parts of a Classifier, and Symmetrised opened, into
    what is applied to each view and the mean."""
    if isinstance(module, Symmetrised):
        inner, mean = certificate.parts
        yield from _flat(module.inner, inner)
        yield module, mean
    elif children := _chained(module):
        for child, part in zip(children, certificate.parts, strict=True):
            yield from _flat(child, part)
    else:
        yield module, certificate


def _follow(module: nn.Module, y: Tensor, unit: float) -> tuple[list[_Met], Tensor]:
    """What each of ``_flat``'s layers meets, and the module's value at y; ``unit``: the program's unit roundoff.

    Of several views, the largest: what may be lost at a mean is at most the largest of what may be at what it is taken of.
    """
    if isinstance(module, Symmetrised):
        runs = [_follow(module.inner, view, unit) for view in module.views(y)]
        outputs = [output for _, output in runs]
        each = zip(*([*met, _met(output)] for met, output in runs), strict=True)
        most = [_Met(*(torch.stack(bounds).amax(0) for bounds in zip(*met, strict=True))) for met in each]
        return most, module.mean(outputs)
    if children := _chained(module):
        all_met: list[_Met] = []
        for child in children:
            met, y = _follow(child, y, unit)
            all_met += met
        return all_met, y
    # in float64 the worst case costs nothing
    if isinstance(module, GradientFlow) and is_torch(module.linear) and unit > UNIT[torch.float64]:
        output, error = observe(module, y, unit)
        return [_Met(sizes(y), error)], output
    return [_met(y)], module(y)


def _met(y: Tensor) -> _Met:
    size = sizes(y)
    return _Met(size, torch.full_like(size, torch.inf))


def _chained(module: nn.Module) -> list[nn.Module]:
    """What a Sequential or a Classifier applies, in order, the same layer perhaps twice; of any other module nothing."""
    return list(module._modules.values()) if type(module) in (nn.Sequential, Classifier) else []  # type: ignore[arg-type]


def _opened(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in the order in which they are applied, Sequentials and the two parts of a Classifier opened."""
    if children := _chained(module):
        for child in children:
            yield from _opened(child)
    else:
        yield module


def _in_float64(model: nn.Module) -> nn.Module:
    """A copy with the very numbers of the model, its parametrized weights as they are computed in the model's own type."""
    reference = copy.deepcopy(model)
    for module in list(reference.modules()):
        if parametrize.is_parametrized(
            module
        ):  # torch's remove_parametrizations would undo the original's, which shares its class
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
            plain = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            module.__class__ = plain
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
    reference.double()
    steps = [[m.step() for m in net.modules() if isinstance(m, GradientFlow)] for net in (model, reference)]
    if steps[0] != steps[1]:
        raise Refused(
            "a copy of the network in float64 takes other steps than the network, so it says nothing about it"
        )
    return reference.requires_grad_(False)


@torch.inference_mode()
def _compare(made: CertifiedClassifier) -> None:
    """That the copy, layer by layer, computes what the model does: on two images, to what its type can resolve."""
    like = next(made.model.parameters(), torch.zeros(()))
    x = torch.rand((2, *made.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    met, z = made._run(x)
    head = made._copy.head
    scale = (
        sizes(z)
        if head is None
        else met[-1].size * sizes(head.weight).max() + (0 if head.bias is None else head.bias.abs().max())
    )
    off = (made.model(x).double() - z).abs().amax(1)
    if not bool((off <= 2**12 * torch.finfo(like.dtype).eps * scale).all()):
        raise Diverging(
            f"the network, and its layers one after the other in float64, differ by {float(off.max()):.3g} in the logits: one of "
            "them does not do what its certificate says. This is a defect: please report it with the network."
        )


def _inner(terms: int, unit: float) -> tuple[float, float]:
    """(relative, absolute) rounding error of an inner product of so many terms and an offset."""
    return gamma(terms + 2, unit), (2 * terms + 2) * TINY
