"""What is trained: a task gives batches, a loss and a validation; the loop does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import certify
from nonexpansive.nn.classifier import Classifier
from nonexpansive.robust.radius import estimated_radii
from nonexpansive.train.config import ClassifyData, DenoiseData, Run, unknown
from nonexpansive.train.data import Patches, PhotoFolder, generator, read_names
from nonexpansive.train.images import LabelledImages, load_images

SIGMA_POWER = 0.75
"""Root mean square errors are divided by σ^0.75. A denoiser's error grows about like that, between σ (flat image) and √σ (edges), so
each noise level has about the same share of the gradient."""


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
    samples of RMSE(model(y, σ), x)/σ^0.75, or of its square (`DenoiseData.loss`). Validation is the PSNR (peak 1) on `held_out` at
    each of `levels`/255, with noise that is the same in every run; the headline `psnr` is the mean over the levels.
    """

    def __init__(
        self,
        train: Sequence[Tensor],
        held_out: Sequence[Tensor],
        *,
        patch: int = 64,
        sigma: tuple[float, float] = (1.0, 55.0),
        levels: Sequence[float] = (5.0, 15.0, 25.0, 50.0),
        loss: Literal["rmse", "mse"] = "rmse",
        seed: int = 0,
    ) -> None:
        self.patches = Patches(train, patch)
        self.held_out = list(held_out)
        self.sigma, self.levels, self.seed = sigma, tuple(levels), seed
        self.power = 1 if loss == "rmse" else 2

    @classmethod
    def from_run(cls, run: Run, root: Path | str) -> DenoiseTask:
        """The task that `run.data` describes, on the data folder `root`. Raises `BadInput` for what is not there."""
        data, root = run.data, Path(root)
        assert isinstance(data, DenoiseData)
        exclude = read_names(root / data.exclude) if data.exclude else None
        held_out = PhotoFolder(root / data.validation, data.channels, exclude=exclude, limit=data.validation_images)
        train = PhotoFolder(root / data.train, data.channels, exclude=exclude)
        settings = {name: getattr(data, name) for name in ("patch", "sigma", "levels", "loss")}
        return cls(train, held_out, seed=run.train.seed, **settings)

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
        size = math.sqrt(clean[0].numel())
        errors = torch.linalg.vector_norm((model(noisy, sigma) - clean).flatten(1), dim=1) / size
        return (errors / sigma**SIGMA_POWER).pow(self.power).mean()

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


class ClassifyTask:
    """Tell the class of an image (B, C, H, W) in [0, 1], with a margin: the loss and the images as :class:`ClassifyData` says.

    Validation gives, on the held-out images, ``certified``: the share that is right with a radius above ``data.radius``, by
    the formula and the certified Lipschitz constant of the features, rounding left out; ``certified_2`` and ``certified_3``, the
    same above twice and three times that; and ``clean``: the share that is right.
    """

    metrics = ("certified", "certified_2", "certified_3", "clean")

    def __init__(
        self, train: LabelledImages, held_out: LabelledImages, data: ClassifyData, size: int, seed: int = 0
    ) -> None:
        """``size``: the number of images in a batch, over all processes."""
        if train.shape != held_out.shape:
            raise BadInput(f"images to train on are {train.shape}, those held out {held_out.shape}")
        self.train, self.held_out, self.data, self.size, self.seed = train, held_out, data, size, seed
        self._permutation = lru_cache(2)(self._draw_permutation)

    @classmethod
    def from_run(cls, run: Run, root: Path | str) -> ClassifyTask:
        """The task that `run.data` describes, its data looked for in the folder `root`. Raises `BadInput`."""
        data = run.data
        assert isinstance(data, ClassifyData)
        images = load_images(data.source, "train", root)
        train, held_out = images.divided(data.validation, run.train.seed)
        if data.limit > len(train):
            raise BadInput(f"data.limit = {data.limit}: only {len(train)} images are left to train on")
        return cls(train[: data.limit or None], held_out, data, run.train.batch, run.train.seed)

    @property
    def model_settings(self) -> dict[str, Any]:
        """What the data decide of a classifier: the shape of an image and the names of the classes."""
        return {"shape": list(self.train.shape), "classes": list(self.train.classes)}

    def batch(self, step: int, rows: range) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,). Each epoch is a permutation; a batch may span two."""
        places = step * self.size + torch.arange(rows.start, rows.stop)
        epochs, places = places // len(self.train), places % len(self.train)
        index = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            index[epochs == epoch] = self._permutation(epoch)[places[epochs == epoch]]
        # one draw for the whole batch, of which a process takes its rows
        random = torch.rand(self.size, 8, generator=generator("augment", self.seed, step))[rows.start : rows.stop]
        images = augmented(self.train.images[index], random, self.data)
        return images.float().div_(255), self.train.labels[index]

    def _draw_permutation(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.train), generator=generator("epoch", self.seed, epoch))

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels = batch
        logits = model(images, labels, self.data.near) if self.data.near else model(images)
        logits, margin = logits.float(), self.data.margin
        if self.data.loss == "multi_margin":
            return F.multi_margin_loss(logits, labels, margin=margin)
        behind = logits - margin * F.one_hot(labels, logits.shape[1])
        return self.data.temperature * F.cross_entropy(behind / self.data.temperature, labels)

    def validate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Classifier)
        device, rows = next(model.parameters()).device, model.head.weight
        lipschitz = certify(model.features, model.shape).lipschitz
        found = []
        for images, labels in zip(self.held_out.images.split(250), self.held_out.labels.split(250), strict=True):
            x = (images.float() / 255).contiguous(memory_format=torch.channels_last)
            logits = model(x.to(device)).double()
            right = logits.argmax(1).cpu() == labels
            radii = estimated_radii(logits, rows, lipschitz).cpu()
            found.append(torch.where(right, radii, -1.0))
        radii = torch.cat(found)
        shares = [(radii > multiple * self.data.radius).double().mean().item() for multiple in (1, 2, 3)]
        return dict(zip(self.metrics, [*shares, (radii >= 0).double().mean().item()], strict=True))


def augmented(images: Tensor, random: Tensor, data: ClassifyData) -> Tensor:
    """uint8 images (B, C, H, W), shifted, mirrored and partly blackened as ``data`` says, by uniform numbers ``random`` (B, 8)."""
    height, width = images.shape[-2:]
    u, sample = random.unbind(1), torch.arange(len(images))
    down, right = (torch.arange(n).expand(len(images), n) for n in (height, width))
    if data.flip:
        right = torch.where(u[0][:, None] < 0.5, right.flip(1), right)
    if data.crop:
        images = F.pad(images, [data.crop] * 4)
        down, right = (axis + (v[:, None] * (2 * data.crop + 1)).long() for axis, v in ((down, u[1]), (right, u[2])))
    if data.flip or data.crop:  # gathered pixel by pixel, which gives (B, H, W, C)
        images = images.permute(0, 2, 3, 1)[sample[:, None, None], down[:, :, None], right[:, None, :]].permute(
            0, 3, 1, 2
        )
    if data.erase[1]:
        share = data.erase[0] + (data.erase[1] - data.erase[0]) * u[3]
        stretch = torch.exp((u[4] - 0.5) * 2 * math.log(3.3))  # height over width, between 1/3.3 and 3.3
        sides = [
            (share * stretch**e * height * width).sqrt().round().clamp(max=n) for e, n in ((1, height), (-1, width))
        ]
        lines = []
        for n, side, place in zip((height, width), sides, u[5:7], strict=True):
            first = (place * (n - side + 1)).floor()
            at = torch.arange(n)
            lines.append((at >= first[:, None]) & (at < (first + side)[:, None]))
        hit = lines[0][:, None, :, None] & lines[1][:, None, None, :] & (u[7] < 0.5)[:, None, None, None]
        images = images.masked_fill(hit, 0)
    return images


TASKS: dict[str, Callable[[Run, Path | str], Any]] = {
    "denoise": DenoiseTask.from_run,
    "classify": ClassifyTask.from_run,
}


def build_task(run: Run, root: Path | str) -> Task:
    """The task named by `run.task`, with its data read from the folder `root`. Raises `BadInput`."""
    if run.task not in TASKS:
        raise BadInput(unknown("task", run.task, TASKS))
    return TASKS[run.task](run, root)
