"""From a run to trained weights: the data decide what they must of the model, the loop trains it, a checkpoint holds the result."""

from __future__ import annotations

import copy
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonexpansive import checkpoint
from nonexpansive.errors import BadInput
from nonexpansive.experiments.settings import Ledger
from nonexpansive.math.certificate import certify
from nonexpansive.nn.classifier import Classifier
from nonexpansive.nn.models import build
from nonexpansive.train import Run, Task, build_task, fit
from nonexpansive.train.config import differences

TIMED = 6
"""The pace of a training is the median of so many steps, after as many that are not counted."""


def train(run: Run, data: Path | str | Task, out: Path | str, **options: Any) -> Path:
    """The best weights of ``run`` on the data folder ``data`` (or its task), trained in the folder ``out``, or taken up from there.

    ``options`` as for :func:`~nonexpansive.train.fit`, which says what is raised. A finished run is not trained again.
    """
    task = build_task(run, data) if isinstance(data, (str, Path)) else data
    check(run, task, out)
    run, network = _network(run, task)

    def export(module: nn.Module, path: Path, about: dict[str, Any]) -> None:
        checkpoint.save(path, module, run.model, run.kwargs, about)

    return fit(run, network, task, out, export=export, **options)


def within(run: Run, data: Path | str, out: Path | str, minutes: float, **options: Any) -> Run:
    """``run`` with as many steps as its network takes in so many ``minutes``, so that its schedule ends when they do.

    The time is that of the processor (all threads together) where that trains, else by the clock; validation is not counted. The
    pace is measured by a few steps of the very loop, which leave nothing behind, and kept in ``out``: a resumed run has the same steps.
    """
    settings = run.to_dict()
    settings["train"] = {name: value for name, value in settings["train"].items() if name != "steps"}
    kept = Ledger(Path(out) / "pace.jsonl", json.loads(json.dumps(settings)))
    if "seconds a step" not in kept:
        kept.add("seconds a step", pace(run, data, **options))
    steps = max(1, round(60 * minutes / kept["seconds a step"]))
    return replace(run, train=replace(run.train, steps=steps))


def pace(run: Run, data: Path | str, **options: Any) -> float:
    """Seconds that a step takes, as :func:`within` counts them."""
    stopwatch = _Stopwatch(build_task(run, data))
    short = replace(run, train=replace(run.train, steps=2 * TIMED + 1, validate_every=2 * TIMED + 1))
    short, network = _network(short, stopwatch.task)
    with tempfile.TemporaryDirectory() as folder:
        fit(short, network, stopwatch, folder, export=lambda *_: None, **{**options, "progress": False})
    starts = stopwatch.starts[-TIMED - 1 :]
    return statistics.median(after - before for before, after in zip(starts, starts[1:], strict=False))


def seconds_trained(out: Path | str) -> float:
    """By the clock, without validation, of the training that was logged in ``out``."""
    with (Path(out) / "log.csv").open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["step_seconds"])) for row in csv.DictReader(file)]
    before = [0, *(step for step, _ in rows)]
    return sum((step - last) * seconds for (step, seconds), last in zip(rows, before, strict=False))


class _Stopwatch:
    """A task that notes when each step begins, and does not validate."""

    def __init__(self, task: Task) -> None:
        self.task, self.starts = task, list[float]()
        self.metrics, self.batch = task.metrics[:1], task.batch

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        on_processor = batch[0].device.type == "cpu"
        if not on_processor:
            torch.cuda.synchronize()
        self.starts.append(time.process_time() if on_processor else time.perf_counter())
        return self.task.loss(model, batch)

    def validate(self, model: nn.Module) -> dict[str, float]:
        return {self.metrics[0]: 0.0}


def _network(run: Run, task: Task) -> tuple[Run, nn.Module]:
    """The run with what the data decide of the model, and that model at its start. Raises BadInput where the run says otherwise; it may
    name the classes."""
    decided = getattr(task, "model_settings", {})
    shape, classes = run.kwargs.get("shape"), run.kwargs.get("classes")
    if decided and shape is not None and (not isinstance(shape, Sequence) or list(shape) != list(decided["shape"])):
        raise BadInput(f"model.shape = {shape}, but the images have {decided['shape']}: leave it out")
    if decided and classes is not None:
        count = classes if isinstance(classes, int) else len(classes)
        if count != len(decided["classes"]):
            raise BadInput(f"model.classes = {classes}, but the data have {len(decided['classes'])}: leave it out")
    run = replace(run, kwargs={**decided, **run.kwargs})
    torch.manual_seed(run.train.seed)
    network = build(run.model, **run.kwargs)
    if run.train.start:
        _begin(network, run)
    return run, network


def check(run: Run, task: Task, out: Path | str) -> None:
    """Raises what the start of a training or its first validation would, where nothing was trained in ``out`` yet: for settings that
    make no network, and for a classifier that cannot be certified or evaluated."""
    if not any(Path(out).glob("checkpoint-*")):
        _try(_network(run, task)[1])


@torch.no_grad()
def _try(network: nn.Module) -> None:
    if isinstance(network, Classifier):
        still = copy.deepcopy(network).eval()
        certify(still.features, still.shape)
        try:
            still(torch.zeros(2, *still.shape))
        except RuntimeError as error:
            raise BadInput(f"the network fails on pictures of shape {still.shape}: {error}") from error


def _begin(network: nn.Module, run: Run) -> None:
    """Fill ``network`` with the weights that the run starts from. Raises BadInput where they are not its own."""
    header, tensors = checkpoint.read(checkpoint.path_of(run.train.start))
    if header.architecture != run.model:
        raise BadInput(f"train.start = {run.train.start!r} is a {header.architecture}, not a {run.model}")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        changed = differences({"name": run.model, **header.config}, run.to_dict()["model"], "model")
        why = "; ".join(changed) or str(error)
        raise BadInput(
            f"train.start = {run.train.start!r} does not fit: {why}. Both must have the same shapes"
        ) from error
