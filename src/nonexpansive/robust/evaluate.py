"""A classifier on labelled images: what is right, what is certain, and whether an attack contradicts a certificate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nonexpansive.errors import BadInput, Diverging
from nonexpansive.nn.descent import STEPS
from nonexpansive.robust.attacks import Found
from nonexpansive.robust.radius import CertifiedClassifier


@dataclass(frozen=True, eq=False)
class Evaluation:
    """For each of N images: its ``label``, the ``prediction``, and the certified ``radius`` of the prediction."""

    label: Tensor
    prediction: Tensor
    radius: Tensor

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.prediction == self.label

    @property
    def certified(self) -> Tensor:
        """(N,): the radius within which the answer is certain *and* right, 0 elsewhere."""
        return self.radius.where(self.correct, 0.0)


def pixels(images: Tensor) -> Tensor:
    """Images of whole numbers from 0 to 255 (uint8) as float32 in [0, 1]; floating-point ones as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def evaluate(
    made: CertifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    batch: int = 256,
    local: bool = False,
    steps: int = STEPS,
    watch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Certify the images (N, *shape), uint8 or in [0, 1], ``batch`` at a time; ``watch(n)`` is called after every n of them.

    ``local`` and ``steps``: as for :meth:`CertifiedClassifier.radii`, of the images that are classified rightly.

    Raises BadInput for labels that are not the classifier's classes, or images of another shape.
    """
    if labels.shape != images.shape[:1] or len(labels) == 0:
        raise BadInput(f"{len(images)} images with labels {tuple(labels.shape)}: one label an image, and at least one")
    if int(labels.min()) < 0 or int(labels.max()) >= made.classes:
        raise BadInput(
            f"labels up to {int(labels.max())} for a classifier of {made.classes} classes: another data set?"
        )
    predictions, radii = [], []
    for part, true in zip(images.split(batch), labels.split(batch), strict=True):
        prediction, radius = made.radii(pixels(part), batch)
        right = prediction == true.to(prediction.device)
        if local and bool(right.any()):
            near = made.radii(pixels(part)[right.to(part.device)], batch, local=True, steps=steps).radius
            radius = radius.clone().masked_scatter(right, near)
        predictions.append(prediction.cpu())
        radii.append(radius.cpu())
        if watch is not None:
            watch(len(part))
    return Evaluation(labels.cpu(), torch.cat(predictions), torch.cat(radii))


def require_sound(made: CertifiedClassifier, evaluation: Evaluation, found: Found, batch: int = 256) -> None:
    """Raises Diverging if an adversary lies within the certified radius of an image that was classified rightly.

    Such an adversary is asked again by what the radii hold for (the program, or the float64 copy where they are for the exact map),
    since an attack in float32 may owe its success on the very boundary to rounding.
    """
    distance = found.distance.cpu()
    suspects = ((evaluation.certified > 0) & (distance <= evaluation.radius)).nonzero()[:, 0]
    for rows in suspects.split(batch) if len(suspects) else ():
        answers = made.logits(found.image[rows.to(found.image.device)]).argmax(1).cpu()
        if bool((wrong := answers != evaluation.prediction[rows]).any()):
            n = int(rows[wrong][0])
            raise Diverging(
                f"image {n} is certified as class {int(evaluation.prediction[n])} within {float(evaluation.radius[n]):.6g}, but at a "
                f"distance of {float(distance[n]):.6g} it is class {int(answers[wrong][0])}: the certificate is wrong. This is a "
                "defect: please report it with the model."
            )
