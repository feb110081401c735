"""What is trained: a task gives batches, a loss and a validation; the loop does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.train.config import DenoiseData, Run, unknown
from nonexpansive.train.data import Patches, PhotoFolder, generator, read_names

SIGMA_POWER = 1.5
"""Errors are divided by σ^1.5. A denoiser's squared error grows about like that, between σ² (flat image) and σ (edges),
so each noise level has about the same share of the gradient."""


class Task(Protocol):
    """One training problem."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names that `validate` returns; the first is the headline, higher is better, which decides "best"."""
        ...

    def batch(self, step: int, rows: range) -> tuple[Tensor, ...]:
        """The samples `rows` of the global batch of `step`, on the CPU: a pure function, called in a thread."""
        ...

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The *mean* over the samples of `batch`, a scalar, so that processes with equal shares average rightly."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model in eval mode; called without gradients."""
        ...


class DenoiseTask:
    """Remove Gaussian noise: y = x + σn, unclipped, with one level σ a sample, and a model called `model(y, σ)`.

    x is (B, C, H, W) in [0,1], σ is (B,) in the same unit, uniform in [low, high]/255. The loss is the mean over
    samples of MSE(model(y, σ), x)/σ^1.5. Validation is the PSNR (peak 1) on `held_out` at each of `levels`/255, with
    noise that is the same in every run; the headline `psnr` is the mean over the levels.
    """

    def __init__(
        self,
        train: Sequence[Tensor],
        held_out: Sequence[Tensor],
        *,
        patch: int = 64,
        sigma: tuple[float, float] = (1.0, 55.0),
        levels: Sequence[float] = (5.0, 15.0, 25.0, 50.0),
        seed: int = 0,
    ) -> None:
        self.patches = Patches(train, patch)
        self.held_out = list(held_out)
        self.sigma, self.levels, self.seed = sigma, tuple(levels), seed

    @classmethod
    def from_run(cls, run: Run, root: Path | str) -> DenoiseTask:
        """The task that `run.data` describes, on the data folder `root`. Raises `BadInput` for what is not there."""
        data, root = run.data, Path(root)
        assert isinstance(data, DenoiseData)
        exclude = read_names(root / data.exclude) if data.exclude else None
        held_out = PhotoFolder(root / data.validation, data.channels, exclude=exclude, limit=data.validation_images)
        train = PhotoFolder(root / data.train, data.channels, exclude=exclude)
        return cls(train, held_out, patch=data.patch, sigma=data.sigma, levels=data.levels, seed=run.train.seed)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("psnr", *(f"psnr_{level:g}" for level in self.levels))

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and noisy (B, C, patch, patch) and σ (B,)."""
        low, high = self.sigma
        shape = (len(rows), self.patches.photos[0].shape[0], self.patches.patch, self.patches.patch)
        clean, noisy, sigma = torch.empty(shape), torch.empty(shape), torch.empty(len(rows))
        for index, row in enumerate(rows):  # row by row: small serial operations, which leave the cores to training
            random = generator("denoise", self.seed, step, row)
            torch.div(self.patches.draw(random), 255, out=clean[index])
            level = (low + (high - low) * torch.rand((), generator=random).item()) / 255
            sigma[index] = level
            torch.add(clean[index], noisy[index].normal_(generator=random), alpha=level, out=noisy[index])
        return clean, noisy, sigma

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        clean, noisy, sigma = batch
        errors = (model(noisy, sigma) - clean).square().mean((1, 2, 3))
        return (errors / sigma**SIGMA_POWER).mean()

    def validate(self, model: nn.Module) -> dict[str, float]:
        # imported here because it takes seconds
        from torchmetrics.functional.image import peak_signal_noise_ratio

        device = next(model.parameters()).device
        result = {}
        for level in self.levels:
            total = 0.0
            for index, photo in enumerate(self.held_out):
                clean = photo[None] / 255
                noise = torch.randn(clean.shape, generator=generator("validation", int(1000 * level), index))
                noisy, sigma = clean + level / 255 * noise, torch.tensor([level / 255])
                restored = model(noisy.to(device), sigma.to(device)).cpu()
                total += peak_signal_noise_ratio(restored, clean, data_range=1.0).item()
            result[f"psnr_{level:g}"] = total / len(self.held_out)
        return {"psnr": sum(result.values()) / len(result), **result}


TASKS: dict[str, Callable[[Run, Path | str], Any]] = {"denoise": DenoiseTask.from_run}


def build_task(run: Run, root: Path | str) -> Task:
    """The task named by `run.task`, with its data read from the folder `root`. Raises `BadInput`."""
    if run.task not in TASKS:
        raise BadInput(unknown("task", run.task, TASKS))
    return TASKS[run.task](run, root)
