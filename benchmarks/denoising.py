"""The shipped denoisers beside tuned total variation: ``python benchmarks/denoising.py --data DIR --names NAMES.txt``.

PSNR with peak 1, the mean over the named photographs of DIR, at Gaussian noise of each level (on the scale of 255). The noise
is seeded by level and photograph and is not clipped, nor is the output. Grey is round(0.2989 R + 0.5870 G + 0.1140 B).

``--tune DIR`` prints the weights of the total variation that are best on photographs of another folder; NAMES are left out of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

import nonexpansive
from nonexpansive import Certificate
from nonexpansive.app.output import write_json
from nonexpansive.errors import BadInput, NonexpansiveError
from nonexpansive.nn.models import ImageDenoiser
from nonexpansive.restore.variational import tune, tv_denoise
from nonexpansive.train.data import PhotoFolder, generator, read_names

WEIGHTS = {
    3: {5.0: 0.0141, 15.0: 0.0581, 25.0: 0.1098, 50.0: 0.2535},
    1: {5.0: 0.0081, 15.0: 0.0372, 25.0: 0.0735, 50.0: 0.1754},
}
"""Weights of the total variation, for each number of channels and level. Made by ``--tune`` on the training photographs of BSDS500:
``python benchmarks/denoising.py --tune BSDS500/train --limit 8``."""

CROP = 192
"""Tuning looks at the middle of each photograph, so many pixels a side."""


def noisy(clean: Tensor, level: float, index: int, purpose: str = "test") -> Tensor:
    noise = torch.randn(clean.shape, generator=generator(f"denoising {purpose}", round(1000 * level), index))
    return clean + level / 255 * noise


def pictures(photos: PhotoFolder) -> list[Tensor]:
    return [photo[None] / 255 for photo in photos]


def total_variation(channels: int) -> Callable[[Tensor, float], Tensor]:
    return lambda y, level: tv_denoise(y, WEIGHTS[channels][level]).image


def learned(model: ImageDenoiser) -> Callable[[Tensor, float], Tensor]:
    def run(y: Tensor, level: float) -> Tensor:
        with torch.inference_mode():
            return model(y, level / 255)

    return run


def measure(
    restore: Callable[[Tensor, float], Tensor], clean: list[Tensor], levels: list[float], known: dict[str, Any]
) -> dict[str, Any]:
    """PSNR of every photograph at every level, and the seconds that a photograph takes; what is ``known`` is not measured again."""
    psnr: dict[str, list[float]] = {}
    seconds: list[float] = [known["seconds"]] if known else []
    for level in levels:
        if known and f"{level:g}" in known["each"]:
            psnr[f"{level:g}"] = known["each"][f"{level:g}"]
            continue
        psnr[f"{level:g}"] = scores = []
        for index, x in enumerate(clean):
            y = noisy(x, level, index)
            began = time.perf_counter()
            restored = restore(y, level)
            seconds.append(time.perf_counter() - began)
            scores.append(float(peak_signal_noise_ratio(restored, x, data_range=1.0)))
    means = {level: statistics.fmean(scores) for level, scores in psnr.items()}
    return {"psnr": means, "seconds": statistics.median(seconds), "each": psnr}


def earlier(file: Path | None, kind: str, photographs: list[str]) -> dict[str, Any]:
    """What an earlier result holds of the total variation on the same photographs: nothing, or a result of ``measure``."""
    found = json.loads(file.read_text()).get(kind, {}) if file else {}
    return found["methods"]["total variation"] if found.get("photographs") == photographs else {}


def compare(arguments: argparse.Namespace) -> None:
    names = arguments.models or nonexpansive.models()
    models = {Path(name).stem: nonexpansive.load(name) for name in names}
    models = {name: model for name, model in models.items() if isinstance(model, ImageDenoiser)}
    if not models:
        raise BadInput("there is no denoiser to measure: name one with --models")
    select = read_names(arguments.names) if arguments.names else None
    result: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__}
    for channels in sorted({model.channels for model in models.values()}, reverse=True):
        photos = PhotoFolder(arguments.data, channels, select=select, limit=arguments.limit)
        clean, shape = pictures(photos), tuple(photos[0].shape)
        rows: dict[str, tuple[dict[str, Any], Certificate | None]] = {}
        kind = {3: "colour", 1: "grey"}[channels]
        known = earlier(arguments.baseline, kind, photos.names)
        rows["total variation"] = (measure(total_variation(channels), clean, arguments.levels, known), None)
        for name, model in models.items():
            if model.channels == channels:
                certificate = nonexpansive.certify(model, shape)
                rows[name] = measure(learned(model), clean, arguments.levels, {}), certificate
        show(f"{kind}, {len(clean)} photographs: PSNR in dB at noise of level /255", arguments.levels, rows)
        methods = {name: {**found, "averaged": proved and proved.averaged} for name, (found, proved) in rows.items()}
        result[kind] = {"photographs": photos.names, "methods": methods}
        if arguments.json:
            write_json(arguments.json, result)


def show(title: str, levels: list[float], rows: dict[str, tuple[dict[str, Any], Certificate | None]]) -> None:
    head = ["method", *(f"{level:g}" for level in levels), "above total variation", "seconds", "α ≤"]
    lines = [head, ["---"] * len(head)]
    baseline = rows["total variation"][0]["psnr"]
    for name, (measured, certificate) in rows.items():
        psnr = measured["psnr"]
        gain = "" if certificate is None else ", ".join(f"{psnr[level] - baseline[level]:+.2f}" for level in psnr)
        if certificate is None:
            bound = "1/2 (proximal)"
        elif certificate.averaged is None:
            bound = f"none ({'proximal, ' if certificate.proximal else ''}L ≤ {certificate.lipschitz:.4g})"
        else:
            bound = f"{math.ceil(certificate.averaged * 1e4) / 1e4:.4f}"
        lines.append([name, *(f"{value:.2f}" for value in psnr.values()), gain, f"{measured['seconds']:.2f}", bound])
    print(f"\n### {title}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


def tune_weights(arguments: argparse.Namespace) -> None:
    exclude = read_names(arguments.names) if arguments.names else None
    for channels in (3, 1):
        clean = []
        for x in pictures(PhotoFolder(arguments.tune, channels, exclude=exclude, limit=arguments.limit or 8)):
            top, left = (max(0, (n - CROP) // 2) for n in x.shape[-2:])
            clean.append(x[..., top : top + CROP, left : left + CROP])
        best = {}
        for level in arguments.levels:
            pairs = [(x, noisy(x, level, index, "tuning")) for index, x in enumerate(clean)]
            rough = (level / 255) * 0.5
            weight, psnr = tune(lambda y, w: tv_denoise(y, w, tolerance=1e-3).image, pairs, rough / 2, rough * 4, 0.05)
            best[level] = round(weight, 4)
            print(f"# {channels} channel(s), level {level:g}: weight {weight:.4f}, {psnr:.2f} dB", flush=True)
        print(f"    {channels}: {best},", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the test photographs")
    parser.add_argument("--names", type=Path, help="text file with the names of those to take; all, if not given")
    parser.add_argument(
        "--models", nargs="+", help="shipped names or .safetensors files; all shipped denoisers, if not given"
    )
    parser.add_argument("--levels", nargs="+", type=float, default=[5.0, 15.0, 25.0, 50.0])
    parser.add_argument("--limit", type=int, help="only the first so many photographs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result, with every photograph's PSNR")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="take the total variation from this earlier result, where it has it",
    )
    parser.add_argument("--tune", type=Path, metavar="DIR", help="tune the total variation on this folder instead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nonexpansive.keep_memory()
    if not arguments.tune and not arguments.data:
        parser.error("--data is needed (or --tune)")
    if untuned := [level for level in arguments.levels if level not in WEIGHTS[3] and not arguments.tune]:
        parser.error(f"total variation is tuned for the levels {list(WEIGHTS[3])}, not for {untuned}: see --tune")
    try:
        (tune_weights if arguments.tune else compare)(arguments)
    except NonexpansiveError as error:
        parser.exit(3, f"error: {error}\n")


if __name__ == "__main__":
    main()
