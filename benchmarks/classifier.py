"""What a training step of a classifier costs beside its bare convolutions: ``python benchmarks/classifier.py [CONFIG] [--data DIR]``.

CONFIG is a shipped config or a file (classifier-cifar10 unless given). In turns, so that other load on the machine falls on both sides:
a whole training step as the config says (batch, forward, backward, norm control, optimiser), and for each flow a conv2d and a
conv_transpose2d (for a dense one products with the matrix and its transpose) of the same shapes, type and layout, forward and backward,
with nothing between them. Both do the same multiplications,
so the ratio of the times is the share of the convolutions' floating-point rate that training reaches. Printed too: the share of a
step that the images (drawing, augmentation) and the optimiser take. With one thread the clock is the process's own CPU time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nonexpansive
from nonexpansive import GradientFlow
from nonexpansive.errors import NonexpansiveError
from nonexpansive.experiments import shipped
from nonexpansive.nn.models import build
from nonexpansive.train import ClassifyTask, LabelledImages, Run, build_task
from nonexpansive.train.loop import _optimiser


def random_images(count: int = 4096) -> LabelledImages:
    """Pictures of CIFAR-10's shape, for machines without it: what a step costs does not depend on what they show."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (count, 3, 32, 32), np.uint8))
    return LabelledImages(images, torch.arange(count) % 10, tuple(map(str, range(10))))


def shapes(model: nn.Module, x: Tensor) -> list[tuple[GradientFlow, torch.Size]]:
    """Every flow with the shape of what it is given."""
    found: list[tuple[GradientFlow, torch.Size]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: found.append((module, args[0].shape)))
        for module in model.modules()
        if isinstance(module, GradientFlow)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def bare(linear: nn.Conv2d | nn.Linear, shape: torch.Size, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """conv2d and conv_transpose2d forward and backward, and the floating-point operations that takes."""
    layout: Any = {"memory_format": torch.channels_last if len(shape) == 4 else torch.contiguous_format}
    x = torch.randn(shape).to(dtype=dtype, **layout).requires_grad_()
    weight = linear.weight.detach().to(dtype=dtype, **layout).requires_grad_()
    upstream = torch.randn_like(x)

    def run() -> None:
        x.grad = weight.grad = None
        if isinstance(linear, nn.Linear):
            out = F.linear(x, weight) @ weight
        else:
            y = F.conv2d(x, weight, padding=linear.padding)  # type: ignore[arg-type]
            out = F.conv_transpose2d(y, weight, padding=linear.padding)  # type: ignore[arg-type]
        out.backward(upstream)

    return run, 3 * 2 * 2 * weight.numel() * shape[0] * math.prod(shape[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", nargs="?", default="classifier-cifar10")
    parser.add_argument("--data", type=Path, help="the data folder; random pictures, if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nonexpansive.keep_memory()
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    try:
        run = Run.from_toml(shipped(arguments.config))
        if arguments.data:
            task: Any = build_task(run, arguments.data)
        else:
            parts = random_images().divided(run.data.validation, 0)
            task = ClassifyTask(*parts, run.data, run.train.batch)
    except NonexpansiveError as error:
        parser.exit(3, f"error: {error}\n")
    model = build(run.model, **{**task.model_settings, **run.kwargs}).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = _optimiser(run.train, model)
    dtype = torch.bfloat16 if run.train.precision == "bf16-mixed" else torch.float32
    flows = shapes(model, task.batch(0, range(run.train.batch))[0])
    pairs = [bare(flow.linear, shape, dtype) for flow, shape in flows]  # type: ignore[arg-type]
    work = sum(operations for _, operations in pairs)

    def step(index: int) -> tuple[float, float, float]:
        marks = [clock()]
        batch = task.batch(index, range(run.train.batch))
        marks.append(clock())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(batch[0])
        task.loss(lambda _: logits, batch).backward()
        marks.append(clock())
        optimiser.step()
        optimiser.zero_grad()
        marks.append(clock())
        return marks[3] - marks[0], marks[1] - marks[0], marks[3] - marks[2]

    rows = []
    for turn in range(arguments.turns + 1):
        whole, images, optimising = step(turn)
        began = clock()
        for program, _ in pairs:
            program()
        if turn:  # the first warms up
            rows.append((whole, clock() - began, images, optimising))
    whole, alone, images, optimising = (statistics.median(column) for column in zip(*rows, strict=True))
    rate = statistics.median(row[1] / row[0] for row in rows)
    print(
        f"{arguments.config}: batch {run.train.batch}, {dtype}, {arguments.threads} thread(s), {work / 1e9:.0f} GFLOP a step\n"
    )
    print("| | seconds | GFLOP/s | share of the step |\n|---|---|---|---|")
    print(f"| training step | {whole:.3f} | {work / whole / 1e9:.0f} | 100 % |")
    print(f"| bare convolutions | {alone:.3f} | {work / alone / 1e9:.0f} | {100 * rate:.0f} % |")
    print(f"| images | {images:.4f} | | {100 * images / whole:.1f} % |")
    print(f"| optimiser | {optimising:.3f} | | {100 * optimising / whole:.1f} % |")


if __name__ == "__main__":
    main()
