"""Denoising: the shipped models beside total variation tuned for each noise level, on the standard photographs.

    python benchmarks/denoising.py --data BSDS500/val --names cbsd68.txt            # the table, on the 68 photographs named
    python benchmarks/denoising.py --data BSDS500/val --names cbsd68.txt --tune     # total variation's weights, on the others

Noise is Gaussian, not clipped, the same for all methods; PSNR has peak 1 and is averaged over photographs. Grey photographs are the
luma of the colour ones, rounded. Total variation (vectorial for colour) has one weight a level, tuned on photographs that are not
among those named, as σ times the factors below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

import nonexpansive
from nonexpansive.app.output import check_writable, write_json
from nonexpansive.restore.variational import tune, tv_denoise
from nonexpansive.train.data import PhotoFolder, generator, read_names

TV_FACTORS = {
    3: {5.0: 0.72, 15.0: 1.00, 25.0: 1.13, 50.0: 1.28},
    1: {5.0: 0.41, 15.0: 0.64, 25.0: 0.75, 50.0: 0.90},
}
"""weight / σ by channels and level (of 255), as ``--tune`` finds them."""


def noisy(photo: Tensor, level: float, index: int) -> tuple[Tensor, Tensor]:
    """Clean and noisy (1, C, H, W)."""
    clean = photo[None] / 255
    return clean, clean + level / 255 * torch.randn(clean.shape, generator=generator("benchmark", int(level * 1000), index))


def psnr(restored: Tensor, clean: Tensor) -> float:
    return float(peak_signal_noise_ratio(restored, clean, data_range=1.0))


def measure(photos: PhotoFolder, level: float, denoise: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Mean PSNR and mean seconds of one method at one level."""
    total = seconds = 0.0
    for index, photo in enumerate(photos):
        clean, y = noisy(photo, level, index)
        began = time.perf_counter()
        with torch.no_grad():
            restored = denoise(y)
        seconds += time.perf_counter() - began
        total += psnr(restored, clean)
    return total / len(photos), seconds / len(photos)


def tune_tv(photos: PhotoFolder, channels: int, levels: list[float]) -> None:
    for level in levels:
        pairs = [noisy(photo[:, 80:240, 80:240], level, index) for index, photo in enumerate(photos)]
        best, _ = tune(lambda y, weight: tv_denoise(y, weight).image, pairs, 0.2 * level / 255, 2 * level / 255)
        print(f"channels {channels}, level {level:g}: factor {best * 255 / level:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--names", type=Path, required=True, help="file with the names of the test photographs")
    parser.add_argument("--models", nargs="*", default=[n for n in nonexpansive.models() if n.startswith("denoiser")])
    parser.add_argument("--levels", nargs="*", type=float, default=[5.0, 15.0, 25.0, 50.0])
    parser.add_argument("--limit", type=int, help="only the first so many photographs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", action="store_true", help="tune total variation on the photographs not named, and stop")
    options = parser.parse_args()
    if options.json:
        check_writable(options.json, suffixes=(".json",))
    names = read_names(options.names)
    if options.tune:
        for channels in (3, 1):
            tune_tv(PhotoFolder(options.data, channels, exclude=names, limit=options.limit or 12), channels, options.levels)
        return
    rows = []
    for name in options.models:
        model = nonexpansive.load(name)
        photos = PhotoFolder(options.data, model.channels, select=names, limit=options.limit)  # type: ignore[arg-type]
        certificate = nonexpansive.certify(model, (model.channels, 321, 481))  # type: ignore[arg-type]
        print(f"\n{name}: {len(photos)} photographs, α ≤ {certificate.averaged:.4f}, L ≤ {certificate.lipschitz:g}\n")
        print("| σ·255 | noisy | total variation, tuned | ours | gain | s a photograph: total variation | ours |\n|" + "---|" * 7)
        for level in options.levels:
            factor = TV_FACTORS[model.channels][level]  # type: ignore[index]
            noise, _ = measure(photos, level, lambda y: y)
            tv, tv_seconds = measure(photos, level, lambda y, w=factor * level / 255: tv_denoise(y, w).image)
            ours, seconds = measure(photos, level, lambda y, s=level / 255: model(y, s))
            gain = ours - tv
            print(f"| {level:g} | {noise:.2f} | {tv:.2f} | {ours:.2f} | {gain:+.2f} | {tv_seconds:.2f} | {seconds:.2f} |", flush=True)
            rows.append({"model": name, "level": level, "noisy": noise, "tv": tv, "ours": ours, "tv_seconds": tv_seconds,
                         "seconds": seconds, "photographs": len(photos), "averaged": certificate.averaged})  # fmt: skip
            if options.json:
                write_json(options.json, rows)


if __name__ == "__main__":
    main()
