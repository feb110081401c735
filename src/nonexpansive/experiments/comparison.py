"""Networks beside each other: trained on the same data, certified, attacked, and laid out as curves of accuracy over ε."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nonexpansive import checkpoint, sealed
from nonexpansive.errors import BadInput
from nonexpansive.experiments import shipped
from nonexpansive.experiments.settings import Entry, load, require_named, wanted
from nonexpansive.experiments.training import check, train
from nonexpansive.math.certificate import certify
from nonexpansive.nn.classifier import Classifier
from nonexpansive.robust import Curve, Evaluation, certify_classifier, evaluate, pixels, require_sound, search
from nonexpansive.train import ClassifyTask, LabelledImages, Run, load_images
from nonexpansive.train.config import ClassifyData

FORMAT = "nonexpansive evaluation 1"
POINTS = 40
"""Certified curves are drawn on so many points of [0, the largest ε], beside those of the table."""

Watch = Callable[[str, int, int], None]
"""Is told what is being measured of a network, and how many of how many images are done."""


@dataclass(frozen=True)
class Quoted:
    """Accuracies (in %, at each of the comparison's ε) that others report, and where."""

    name: str
    source: str
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Which networks are trained, and how they are judged.

    - ``epsilons``: the ε of the table, at which the networks are attacked, in units of images in [0, 1];
    - ``attack``: as for :func:`~nonexpansive.robust.search`; an image that is certified at ε is not attacked at ε, in vain by proof;
    - ``images``: the first so many test images are certified (0: all), of which the first ``attacked`` are attacked (0: all).

    In a file: these settings, a table ``[[runs]]`` for each network (:class:`Entry`), ``[[quoted]]`` for each row of others.
    """

    title: str
    epsilons: tuple[float, ...]
    attack: Literal["pgd", "auto"] = "pgd"
    images: int = 0
    attacked: int = 0
    runs: tuple[Entry, ...] = ()
    quoted: tuple[Quoted, ...] = ()

    def __post_init__(self) -> None:
        require_named(self.runs)
        if not self.epsilons or list(self.epsilons) != sorted(set(self.epsilons)) or self.epsilons[0] != 0:
            raise BadInput(f"epsilons must rise from 0, not {list(self.epsilons)}")
        if min(self.images, self.attacked) < 0:
            raise BadInput("images and attacked count images, 0 for all of them")
        if wrong := [row.name for row in self.quoted if len(row.accuracy) != len(self.epsilons)]:
            raise BadInput(f"quoted {wrong[0]}: one accuracy for each of the {len(self.epsilons)} ε is expected")

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> Comparison:
        """Raises BadInput, naming what is wrong."""
        return load(cls, path, {"runs": Entry, "quoted": Quoted}, overrides)


@dataclass(frozen=True)
class Outcome:
    """What was found of one network.

    - ``clean``: right; ``certified``: right, and certain within ε, by the sound radius; ``robust``: right, and not changed by the
      attack within ε, on the images that were attacked.
    - ``lipschitz``: the certified constant of the features; ``pooling``: by what factor it would be larger if every averaging counted
      as norm 1; ``loose``: the certified curve that this would leave.
    """

    name: str
    parameters: int
    lipschitz: float
    clean: Curve
    certified: Curve
    robust: Curve
    pooling: float
    loose: Curve
    weights: Path


def compare(
    comparison: Comparison,
    data: Path | str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    only: Iterable[str] = (),
    limit: int = 0,
    watch: Watch | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Train each network in a folder of ``out``, judge it, and yield the outcome. Whatever is done already is taken from there.

    ``overrides`` change every training, as ``train.steps=100``; ``only`` names the runs that are wanted (all, if none is named);
    ``limit`` bounds the numbers of test images. ``options`` as for :func:`~nonexpansive.train.fit`.

    Raises Diverging if the attack succeeds within a certified radius, BadInput, and what training raises.
    """
    chosen = wanted(only, [entry.name for entry in comparison.runs])
    runs = {
        entry: Run.from_toml(shipped(entry.config), [*entry.set, *overrides])
        for entry in comparison.runs
        if entry.name in chosen
    }
    if wrong := [entry.config for entry, run in runs.items() if not isinstance(run.data, ClassifyData)]:
        raise BadInput(f"{wrong[0]} trains no classifier, which is what can be compared")
    # first, so that what is wrong there is told before anything is trained
    tests = {source: load_images(source, "test", data) for source in {run.data.source for run in runs.values()}}
    for entry, run in runs.items():
        task = ClassifyTask.from_run(run, data)
        _matched(tests[run.data.source], task)
        check(run, task, out / entry.folder)
    for entry, run in runs.items():
        task = ClassifyTask.from_run(run, data)
        images = _matched(tests[run.data.source], task)
        weights = train(run, task, out / entry.folder, **options)
        model = checkpoint.load(weights)
        assert isinstance(model, Classifier)
        counts = [
            min(n or len(images), limit or len(images), len(images)) for n in (comparison.images, comparison.attacked)
        ]
        judged = _judge(model, images[: counts[0]], min(counts), comparison, weights, watch or (lambda *_: None))
        yield _outcome(entry.name, model, judged, comparison.epsilons, weights)


def _matched(images: LabelledImages, task: ClassifyTask) -> LabelledImages:
    """The test images, their classes numbered as those to train on. Raises BadInput where they are of others, or of another shape."""
    if images.shape != task.train.shape:
        raise BadInput(f"test images of shape {images.shape}, but of shape {task.train.shape} to train on")
    return images.among(task.train.classes)


def _judge(
    model: Classifier, images: LabelledImages, attacked: int, comparison: Comparison, weights: Path, watch: Watch
) -> dict[str, Tensor]:
    """Of each image whether it is ``right`` and its certified ``radius``, 0 where it is not; of the attacked ones ``distance``.

    Kept beside the weights after the attack at each ε, and taken up from there if it is of these weights, images and settings.
    """
    asked = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": hashlib.sha256(images.images.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest(),
        "attacked": attacked,
        "attack": comparison.attack,
        "epsilons": list(comparison.epsilons),
    }
    path = weights.with_name("evaluation.safetensors")
    kept, done = _kept(path, asked)
    if kept and done == len(comparison.epsilons):
        return kept
    model = model.eval().requires_grad_(False)
    double = checkpoint.load(weights).double()
    made = certify_classifier(double, model.shape, arithmetic=torch.float64)
    every = evaluate(made, images.images, images.labels, watch=_counted(watch, "certifying", len(images)))
    x, y = pixels(images.images[:attacked]), images.labels[:attacked]
    distance = torch.full(y.shape, torch.inf, dtype=torch.float64).masked_fill(~every.correct[:attacked], 0.0)
    if kept:
        distance = kept["distance"]
    kept = {"right": every.correct, "radius": every.certified, "distance": distance}
    for k in range(max(done, 1), len(comparison.epsilons)):
        epsilon = comparison.epsilons[k]
        rows = ((distance > epsilon) & (every.certified[:attacked] < epsilon)).nonzero()[:, 0]
        if len(rows):
            tick = _counted(watch, f"attacking at ε = {epsilon:.4g}", len(rows))
            found = search(model, x[rows], y[rows], [epsilon], comparison.attack, watch=tick)
            require_sound(made, Evaluation(every.label[rows], every.prediction[rows], every.radius[rows]), found)
            distance[rows] = torch.minimum(distance[rows], found.distance.cpu())
        sealed.write(path, FORMAT, kept, {"asked": asked, "done": k + 1})
    return kept


def _counted(watch: Watch, what: str, total: int) -> Callable[[int], None]:
    """Tells ``watch`` how many are done, given how many more are."""
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        watch(what, done, total)

    tick(0)
    return tick


def _kept(path: Path, asked: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """What the file holds of the evaluation that is asked for, and at how many ε that is done; nothing where it is of another."""
    with suppress(BadInput):  # no file, or a damaged one: it is made again
        tensors, header = sealed.read(path, FORMAT)
        if header.get("asked") == asked:
            return tensors, header["done"]
    return {}, 0


def _outcome(
    name: str, model: Classifier, judged: dict[str, Tensor], epsilons: tuple[float, ...], weights: Path
) -> Outcome:
    grid = sorted({*epsilons, *(epsilons[-1] * k / (POINTS - 1) for k in range(POINTS))})
    factor = averaging(model)
    return Outcome(
        name,
        sum(p.numel() for p in model.parameters()),
        certify(model.features, model.shape).lipschitz,
        Curve.of(f"{name}, clean", judged["right"].double(), [0.0]),
        Curve.of(f"{name}, certified", judged["radius"], grid),
        Curve.of(f"{name}, attacked", judged["distance"], epsilons),
        factor,
        Curve.of(f"{name}, certified with loose pooling", judged["radius"] / factor, grid),
        weights,
    )


def averaging(model: Classifier) -> float:
    """The product of 1/‖P‖ over the average poolings P in the features: what the bound loses where each is counted as norm 1.

    Only for poolings that are parts of a Sequential; of others it is 1, they are counted with their true norms in either case.
    """
    if not isinstance(model.features, nn.Sequential):
        return 1.0
    factor = 1.0
    for layer, part in zip(model.features, certify(model.features, model.shape).parts, strict=True):
        if isinstance(layer, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            factor /= part.lipschitz
    return factor
