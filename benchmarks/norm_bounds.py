"""Sound norm bounds: their time beside that of power iterations, and their tightness. Prints markdown.

    python benchmarks/norm_bounds.py

All figures are of one run, on one thread, in seconds of the process's own CPU. The 1,000 power iterations a layer are
extrapolated from 10.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from nonexpansive.math.bounds import _lanczos, _read, norm_bound, norm_estimate

BLOCKS, SHAPE, ITERATIONS, MEASURED = 10, (64, 321, 481), 1000, 10


def seconds(run: Callable[[], object], repeat: int = 1) -> float:
    """The median of ``repeat`` runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def conv(inputs: int, outputs: int, k: int = 3, d: int = 2, mode: str = "zeros") -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1](inputs, outputs, k, padding=k // 2, padding_mode=mode)


def any_size() -> None:
    print("## Any size at once\n\n| layer | seconds |\n|---|---|")
    for inputs, outputs, k, d in (
        (12, 64, 3, 2),
        (64, 64, 3, 2),
        (128, 128, 3, 2),
        (256, 256, 3, 2),
        (512, 512, 1, 2),
        (64, 64, 5, 2),
        (64, 64, 9, 1),
        (16, 16, 3, 3),
    ):
        layer = conv(inputs, outputs, k, d)
        name = f"{inputs} -> {outputs}, {'x'.join([str(k)] * d)}"
        print(f"| {name} | {seconds(lambda layer=layer: norm_bound(layer)):.3f} |", flush=True)
    linear = nn.Linear(1024, 1024)
    print(f"| Linear 1024 -> 1024 | {seconds(lambda: norm_bound(linear)):.3f} |\n")


def certificate() -> None:
    layers = [conv(64, 64) for _ in range(BLOCKS)]
    bound = seconds(lambda: [norm_bound(layer, SHAPE) for layer in layers])
    start = time.process_time()
    norm_estimate(layers[0], SHAPE, iterations=MEASURED)
    power = (time.process_time() - start) / MEASURED * ITERATIONS * BLOCKS
    print(f"## {BLOCKS} blocks 64 -> 64, 3x3, at {SHAPE[1]}x{SHAPE[2]}\n\n| | seconds |\n|---|---|")
    print(f"| sound bounds, all blocks | {bound:.2f} |")
    print(f"| {ITERATIONS} power iterations a layer (extrapolated from {MEASURED}) | {power:.0f} |")
    print(f"| ratio | {power / bound:.0f} (wanted: at least 500) |\n")


def tightness() -> None:
    print("## Excess over the true norm (bound / 150 Lanczos steps, which are from below), stride 1, random weights\n")
    print("| channels | kernel | padding | n | least | largest | seconds |\n|---|---|---|---|---|---|---|")
    for channels, k, mode, n, seeds in (
        *((c, 3, mode, n, 3) for c in (3, 16) for mode in ("zeros", "circular") for n in (8, 16, 32)),
        *((3, 5, "zeros", n, 3) for n in (8, 32)),
        *((64, 3, "zeros", n, 2) for n in (8, 12, 15, 16, 20, 24, 32, 40, 48)),
        *((128, 3, "zeros", n, 1) for n in (8, 12, 16, 24, 32)),
        *((64, 3, "circular", n, 2) for n in (8, 24)),
    ):
        excess, times = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            layer, shape = conv(channels, channels, k, mode=mode), (channels, n, n)
            start = time.process_time()
            bound = norm_bound(layer, shape)
            times.append(time.process_time() - start)
            convolution = _read(layer)
            below = _lanczos(*convolution.normal(convolution.sizes(shape)), steps=150)
            excess.append(bound / (below * 2.0**convolution.exponent))
        row = f"{min(excess):.5f} | {max(excess):.5f} | {statistics.median(times):.2f}"
        print(f"| {channels} | {k}x{k} | {mode} | {n} | {row} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"# Norm bounds ({platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__})\n")
    any_size()
    certificate()
    tightness()
