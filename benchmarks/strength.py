"""How far the rule for the prior's strength is from the best of a grid, model by model: ``python benchmarks/strength.py --data DIR``.

The rule (``nonexpansive.restore.restoration.STRENGTH``) knows the noise and A alone. Here it meets forward models that are no blurs, on
crops of photographs, beside a grid of levels (in units of the noise) and trusts, of which the best is chosen *with* the clean pictures.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

import nonexpansive
from nonexpansive.errors import NonexpansiveError
from nonexpansive.experiments.denoising import centre
from nonexpansive.nn.models import ImageDenoiser
from nonexpansive.restore import Plan, degrade, forward_model, plan
from nonexpansive.train.data import PhotoFolder

LEVELS, TRUSTS = (0.25, 0.5, 1.0, 2.0, 4.0), (1.0, 2.1, 4.0)


@dataclass(frozen=True)
class Case:
    """A forward model; ``unit``: noise is that many times the level asked for, where data are not in the unit of the picture;
    ``method``: in place of the one that is chosen by default."""

    name: str
    channels: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    unit: float = 1.0
    method: str | None = None

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


CASES = [
    Case("inpaint", settings={"keep": 0.4}),
    Case("downsample", settings={"factor": 2}),
    Case("downsample", settings={"factor": 3}),
    Case("mri", 1, {"acceleration": 4}),
    Case("inpaint", settings={"keep": 0.4}, method="forward-backward"),
    Case("downsample", settings={"factor": 2}, method="forward-backward"),
    Case("mri", 1, {"acceleration": 4}, method="forward-backward"),
    Case("tomography", 1, {"angles": 60}, unit=30.0),
    Case("tomography", 1, {"angles": 20}, unit=30.0),
]


def quality(job: Plan, clean: Tensor, iterations: int) -> float:
    image = job.run(iterations=iterations).image.clamp(0, 1)
    return float(peak_signal_noise_ratio(image, clean, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)))


def grid(job: Plan, y: Tensor, denoiser: ImageDenoiser, noise: float) -> Iterator[tuple[float, float | None, Plan]]:
    """(level/noise, trust, plan): the proximal step is free; a gradient step is taken as long as it may be, at any level."""
    longest = 1.99 / job.smoothness if job.smoothness else None
    trusts: tuple[float | None, ...] = (None,) if longest else TRUSTS
    for level, trust in itertools.product(LEVELS, trusts):
        tau = (trust * level) ** 2 if trust else longest
        # where the rule shortens its gradient step, its levels are relative to the shorter one
        sigma = level * (job.sigma if longest else noise)
        yield level, trust, plan(y, job.data, denoiser, noise, method=job.method, sigma=sigma, tau=tau)


def row(case: Case, noise: float, clean: Tensor, denoiser: ImageDenoiser, iterations: int) -> list[str]:
    data = forward_model(case.name, tuple(clean.shape[1:]), **case.settings)
    noise *= case.unit
    y = degrade(clean, data, noise, seed=1)
    job = plan(y, data, denoiser, noise, method=case.method)
    found = quality(job, clean, iterations)
    tried = [(quality(each, clean, iterations), level, trust) for level, trust, each in grid(job, y, denoiser, noise)]
    best, level, trust = max(tried, key=lambda one: one[0])
    at = f"{level:g}" + (f", trust {trust:g}" if trust else " times the rule's")
    start = peak_signal_noise_ratio(
        job.start.clamp(0, 1), clean, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
    )
    return [
        str(case), f"{noise:g}", job.method, f"{float(start):.2f}", f"{found:.2f}", f"{best:.2f}", at, f"{best - found:+.2f}"
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--models", nargs=2, default=["denoiser-colour-small", "denoiser-grey-small"], metavar="MODEL")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.01, 0.03])
    parser.add_argument("--crop", type=int, default=96, help="pixels a side")
    parser.add_argument("--limit", type=int, default=3, help="only the first so many photographs")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nonexpansive.keep_memory()
    head = [
        "forward model",
        "noise",
        "method",
        "start, dB",
        "rule, dB",
        "best of the grid, dB",
        "at level/noise",
        "gap",
    ]
    try:
        loaded = [nonexpansive.load(name) for name in arguments.models]
        models = {model.channels: model for model in loaded if isinstance(model, ImageDenoiser)}
        if sorted(models) != [1, 3]:
            parser.error("--models are a colour and a grey denoiser")
        side = arguments.crop
        clean = {}
        for channels in models:
            photos = PhotoFolder(arguments.data, channels, limit=arguments.limit)
            clean[channels] = torch.stack([centre(photo, side) for photo in photos]) / 255
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for case in CASES:
            for noise in arguments.noise:
                cells = row(case, noise, clean[case.channels], models[case.channels], arguments.iterations)
                print("| " + " | ".join(cells) + " |", flush=True)
    except NonexpansiveError as error:
        parser.exit(3, f"error: {error}\n")


if __name__ == "__main__":
    main()
