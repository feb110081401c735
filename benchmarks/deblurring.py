"""Deblurring: the certified Plug-and-Play iteration beside the blurred input and tuned total variation.

    python benchmarks/deblurring.py --data BSDS500/test --limit 8                        # the table
    python benchmarks/deblurring.py --data BSDS500/val --exclude cbsd68.txt --tune       # the strengths, on other photographs

Photographs are cropped at their centre to 256x256; circular boundary; kernels by camera shake (different seeds for tuning and
reporting), or given. Each method's strength depends on the noise alone.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

import nonexpansive
from nonexpansive.app.output import check_writable, write_json
from nonexpansive.restore import blur, degrade, kernel, plan
from nonexpansive.restore.physics import Blurring
from nonexpansive.restore.variational import tv_deblur
from nonexpansive.train.data import PhotoFolder, read_names

REPORTED = ("shake:27,seed=3", "shake:21,seed=4", "shake:31,seed=5", "gaussian:1.6")
TUNED_ON = ("shake:25,seed=101", "shake:27,seed=102")
TV_WEIGHTS = {2.55: 1.5e-3, 7.65: 7e-3}
"""Total variation's weight by noise level (of 255), as ``--tune`` finds them."""


def psnr(restored: Tensor, clean: Tensor) -> float:
    return float(peak_signal_noise_ratio(restored.clamp(0, 1), clean, data_range=1.0))


def problems(photos: PhotoFolder, kernels: tuple[str, ...], level: float, side: int) -> list[tuple[Tensor, Tensor, Blurring]]:
    """(clean, data, blurring), photograph i with kernel i."""
    found = []
    for index, (photo, spec) in enumerate(zip(photos, itertools.cycle(kernels), strict=False)):
        top, left = ((n - side) // 2 for n in photo.shape[-2:])
        clean = photo[None, :, top : top + side, left : left + side] / 255
        blurring = blur(kernel(spec), tuple(clean.shape[1:]))  # type: ignore[arg-type]
        found.append((clean, degrade(clean, blurring, level / 255, seed=index), blurring))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--exclude", type=Path, help="file with names to leave out")
    parser.add_argument("--kernels", nargs="*", help="kernels, as for `nonexpansive deblur`")
    parser.add_argument("--noise", nargs="*", type=float, default=[2.55, 7.65], help="noise levels, of 255")
    parser.add_argument("--model", default="denoiser-colour")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--methods", nargs="*", default=["half-quadratic", "forward-backward"])
    parser.add_argument("--tune", action="store_true", help="search the strengths on these photographs, and stop")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.json:
        check_writable(options.json, suffixes=(".json",))
    model = nonexpansive.load(options.model)
    exclude = read_names(options.exclude) if options.exclude else None
    photos = PhotoFolder(options.data, model.channels, exclude=exclude, limit=options.limit)  # type: ignore[arg-type]
    kernels = tuple(options.kernels or (TUNED_ON if options.tune else REPORTED))
    rows = []
    for level in options.noise:
        cases = problems(photos, kernels, level, options.side)
        if options.tune:
            search(cases, model, level / 255, options.methods, options.tolerance)
            continue
        print(f"\nnoise {level:g}/255, {len(cases)} photographs, kernels {', '.join(kernels)}\n")
        print("| method | PSNR | steps | s a photograph | α of the iteration |\n|" + "---|" * 5)
        mean = sum(psnr(y, clean) for clean, y, _ in cases) / len(cases)
        print(f"| blurred | {mean:.2f} | | | |")
        began, total = time.perf_counter(), 0.0
        for clean, y, blurring in cases:
            total += psnr(tv_deblur(y, blurring, TV_WEIGHTS[level]).image, clean)
        seconds = (time.perf_counter() - began) / len(cases)
        print(f"| total variation, tuned | {total / len(cases):.2f} | | {seconds:.1f} | |", flush=True)
        rows.append({"noise": level, "method": "tv", "psnr": total / len(cases), "blurred": mean, "seconds": seconds})
        for method in options.methods:
            scores, steps, alphas, began = [], [], [], time.perf_counter()
            for clean, y, blurring in cases:
                job = plan(y, blurring, model, level / 255, method=method)  # type: ignore[arg-type]
                report = job.run(tolerance=options.tolerance, iterations=500)
                scores.append(psnr(report.image, clean))
                steps.append(report.iterations)
                alphas.append(job.certificate.averaged or 1.0)
            n, seconds = len(cases), (time.perf_counter() - began) / len(cases)
            print(f"| {method} | {sum(scores) / n:.2f} | {sum(steps) / n:.0f} | {seconds:.1f} | {max(alphas):.4f} |", flush=True)
            rows.append({"noise": level, "method": method, "psnr": sum(scores) / n, "steps": sum(steps) / n, "seconds": seconds})
        if options.json:
            write_json(options.json, rows)


def search(
    cases: list[tuple[Tensor, Tensor, Blurring]], model: torch.nn.Module, noise: float, methods: list[str], tolerance: float
) -> None:
    """Mean PSNR and steps over a grid of denoiser levels and data steps, and of total variation's weights."""
    for weight in noise**1.5 * torch.logspace(-0.5, 0.7, 6):
        mean = sum(psnr(tv_deblur(y, b, float(weight)).image, clean) for clean, y, b in cases) / len(cases)
        print(f"noise {noise * 255:.2f}: total variation {float(weight):.2e} {mean:.2f}", flush=True)
    for method, factor, trust in itertools.product(methods, (1.0, 1.4, 2.0, 3.0, 4.5), (0.7, 1.0, 1.4, 2.0)):
        tau = (trust * factor) ** 2
        if method == "forward-backward":
            if trust != 1.0:
                continue
            tau = 1.99
        scores, steps = [], []
        for clean, y, blurring in cases:
            job = plan(y, blurring, model, noise, method=method, sigma=factor * noise, tau=tau)  # type: ignore[arg-type]
            report = job.run(tolerance=tolerance, iterations=500)
            scores.append(psnr(report.image, clean))
            steps.append(report.iterations)
        n = len(cases)
        print(f"noise {noise * 255:.2f}: {method} level {factor}·ν τ {tau:.2f}: {sum(scores) / n:.2f} dB in {sum(steps) / n:.0f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
