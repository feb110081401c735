"""Training: one loop for every task, on one process or many, that can be killed and resumed exactly."""

from __future__ import annotations

from nonexpansive.errors import Interrupted
from nonexpansive.train.config import ClassifyData, DenoiseData, Run, TrainConfig, apply_overrides
from nonexpansive.train.data import Patches, PhotoFolder
from nonexpansive.train.images import LabelledImages, load_images
from nonexpansive.train.loop import TrainingFailed, fit
from nonexpansive.train.tasks import ClassifyTask, DenoiseTask, Task, build_task

__all__ = [
    "ClassifyData",
    "ClassifyTask",
    "DenoiseData",
    "DenoiseTask",
    "Interrupted",
    "LabelledImages",
    "Patches",
    "PhotoFolder",
    "Run",
    "Task",
    "TrainConfig",
    "TrainingFailed",
    "apply_overrides",
    "build_task",
    "fit",
    "load_images",
]
