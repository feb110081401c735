"""From a run to trained weights: the data decide what they must of the model, the loop trains it, a checkpoint holds the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nonexpansive import checkpoint
from nonexpansive.nn.models import build
from nonexpansive.train import Run, build_task, fit


def train(run: Run, data: Path | str, out: Path | str, **options: Any) -> Path:
    """The best weights of ``run`` on the data folder ``data``, trained in the folder ``out``, or taken up where that was left.

    ``options`` as for :func:`~nonexpansive.train.fit`, which says what is raised. A finished run is not trained again.
    """
    task = build_task(run, data)
    run = replace(run, kwargs={**getattr(task, "model_settings", {}), **run.kwargs})
    torch.manual_seed(run.train.seed)
    network = build(run.model, **run.kwargs)

    def export(module: nn.Module, path: Path, about: dict[str, Any]) -> None:
        checkpoint.save(path, module, run.model, run.kwargs, about)

    return fit(run, network, task, out, export=export, **options)
