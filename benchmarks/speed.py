"""Seconds and memory of the shipped denoisers on a picture: ``python benchmarks/speed.py [--sizes 512 2048] [--threads 2]``.

Each measurement is made in a process of its own: the median of three runs after one that does not count, and by how much the runs
raise the peak of resident memory over that of the process with the model and the picture in it; with memory kept (``keep_memory``)
and given back. Pictures whose arrays would need more than ``--memory`` MB go in tiles, as they do in ``nonexpansive denoise``.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import statistics
import sys
import time

import torch

import nonexpansive
from nonexpansive.nn.models import ImageDenoiser
from nonexpansive.restore.tiles import Tiled

UNIT = 1 if sys.platform == "darwin" else 1024
"""Of ``ru_maxrss``, in bytes."""


def measure(name: str, size: int, threads: int, memory: float, keep: bool) -> tuple[float, float, bool]:
    """Seconds, bytes, and whether the picture went whole."""
    torch.set_num_threads(threads)
    if keep:
        nonexpansive.keep_memory()
    model = nonexpansive.load(name)
    assert isinstance(model, ImageDenoiser)
    tiled = Tiled(model, memory)
    x = torch.rand((1, model.channels, size, size), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            tiled(x, 0.1)
            seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.median(seconds[1:]), UNIT * (peak - before), tiled.whole(tuple(x.shape[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", help="shipped names or .safetensors files; all shipped denoisers, if not given"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=500.0, metavar="MB")
    arguments = parser.parse_args()
    names = arguments.models or [n for n in nonexpansive.models() if isinstance(nonexpansive.load(n), ImageDenoiser)]
    print("| denoiser | picture | memory | seconds | peak memory, MB | |\n|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name in names:
        for size, keep in itertools.product(arguments.sizes, (True, False)):
            ask = (name, size, arguments.threads, arguments.memory * 1e6, keep)
            with context.Pool(1) as pool:
                seconds, peak, whole = pool.apply(measure, ask)
            kept, how = "kept" if keep else "given back", "whole" if whole else "in tiles"
            print(f"| {name} | {size}x{size} | {kept} | {seconds:.2f} | {peak / 1e6:.0f} | {how} |", flush=True)


if __name__ == "__main__":
    main()
