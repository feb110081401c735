"""Denoisers beside each other: trained for the same time on the same patches, certified, and measured on test photographs."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nonexpansive import checkpoint
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.experiments import shipped
from nonexpansive.experiments.settings import Entry, Ledger, load, require_named, wanted
from nonexpansive.experiments.stability import Amplified, jacobian_norm, require_settling, steepest, stretch, trace
from nonexpansive.experiments.training import seconds_trained, train, within
from nonexpansive.math.certificate import certify
from nonexpansive.restore.variational import tune, tv_denoise
from nonexpansive.train import DenoiseData, PhotoFolder, Run
from nonexpansive.train.data import generator

TOTAL_VARIATION, UNSTABLE = "total variation", "unstable"

Watch = Callable[[str, int, int], None]
"""Is told what is being measured, how much of it is done, and how much there is."""

Denoise = Callable[[Tensor, float], Tensor]

ACCURACY = 1e-5
"""To which the total variation is solved where its stability is measured, root mean square; and no further than 1,000 iterations."""


@dataclass(frozen=True)
class Denoising:
    """Which denoisers are trained, for how long, and how they are judged; total variation is always beside them.

    - ``sigma``: the standard deviation of the noise that is trained and tested on, in units of images in [0, 1];
    - ``minutes``: each network trains for so many, of the processor (0: for the steps that its config says);
    - ``test``: the folder of the test photographs within the data, of which the first ``photographs`` are taken (0: all);
      ``shown`` of them are drawn, evenly spaced;
    - ``tuned``: the weight of the total variation is chosen on centre crops, ``crop`` pixels wide, of so many validation photographs;
    - ``probe``: Lipschitz constants are sought, from below, around centre crops so many pixels wide of the photographs that are drawn;
      from there each denoiser is also applied ``repeated`` times over, to see whether it settles;
    - ``unstable``: the name of a run beside which ``amplification`` (above 1) times its denoiser is judged (none, if empty): one that is
      unstable by construction.

    In a file: ``kind = "denoising"``, these settings, and a table ``[[runs]]`` for each network (:class:`Entry`), whose ``data``,
    ``train.batch`` and ``train.seed`` must agree: then all see the same patches in the same order.
    """

    title: str
    sigma: float
    minutes: float = 8.0
    test: str = "test"
    photographs: int = 0
    shown: int = 3
    tuned: int = 4
    crop: int = 160
    probe: int = 32
    repeated: int = 200
    unstable: str = ""
    amplification: float = 1.05
    seed: int = 0
    runs: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        require_named(self.runs)
        if taken := {TOTAL_VARIATION, UNSTABLE} & {entry.name for entry in self.runs}:
            raise BadInput(f"{taken.pop()!r} is there without being named: call the run otherwise")
        if not 0 < self.sigma <= 1:
            raise BadInput(f"sigma = {self.sigma}: a noise level in (0, 1], of images in [0, 1], is expected")
        if min(self.minutes, self.photographs, self.shown, self.seed) < 0:
            raise BadInput("minutes, photographs, shown and seed are at least 0")
        if min(self.tuned, self.repeated - 1, self.crop - 15, self.probe - 15) < 1:
            raise BadInput("tuned must be at least 1, repeated at least 2, crop and probe at least 16 pixels")
        if self.unstable and self.unstable not in [entry.name for entry in self.runs]:
            raise BadInput(f"unstable = {self.unstable!r} is not the name of a run")
        if not 1 < self.amplification < math.inf:
            raise BadInput(f"amplification = {self.amplification}: above 1, or the unstable denoiser would be stable")

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> Denoising:
        """Raises BadInput, naming what is wrong."""
        return load(cls, path, {"runs": Entry}, overrides)

    def settings(self, entry: Entry, overrides: Sequence[str] = ()) -> Run:
        """The training of an entry at this noise. Raises BadInput."""
        level = 255 * self.sigma
        own = [f"data.sigma=[{level}, {level}]", f"data.levels=[{level}]"]
        run = Run.from_toml(shipped(entry.config), [*entry.set, *own, *overrides])
        if not isinstance(run.data, DenoiseData):
            raise BadInput(f"{entry.config} trains no denoiser, which is what can be compared here")
        return run


@dataclass(frozen=True)
class Denoised:
    """What was found of one denoiser, photograph by photograph: PSNR in dB (peak 1, nothing clipped), SSIM, seconds of the processor.

    - ``steps`` of training took ``seconds`` by the clock; ``weight``: that of the total variation, which is not trained;
    - ``certified``: its Lipschitz constant, from above; ``averaged``: its α, None where there is no proof of one;
    - ``measured``: a Lipschitz constant from below, the norm of the Jacobian at noisy photographs; ``found``: the same, by
      gradient ascent from there (both for the total variation, which is not differentiated: from differences);
    - ``residual``: x_k - x_{k-1} for x_k = D(x_{k-1}) from noisy photographs, root mean square, the largest of a photograph; inf from where
      numbers were no longer finite. ``growth``: the largest ratio of one of a photograph to the one before it, rounding left out.
    - ``pictures``: of the photographs that are drawn, what was made of them.
    """

    name: str
    names: list[str]
    psnr: list[float]
    ssim: list[float]
    seconds_each: list[float]
    certified: float
    averaged: float | None
    measured: float
    found: float
    residual: list[float]
    growth: float
    pictures: dict[str, Path]
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    weight: float | None = None
    weights: Path | None = None


class Photographs:
    """The test photographs of an experiment, each with its noise: pictures (1, C, H, W) in [0, 1], noisy ones unclipped."""

    def __init__(self, known: Denoising, data: Path, channels: int, limit: int) -> None:
        counts = [n for n in (known.photographs, limit) if n]
        self.folder = PhotoFolder(data / known.test, channels, limit=min(counts, default=None))
        self.known, self.names = known, self.folder.names
        places = np.linspace(0, len(self.names) - 1, min(known.shown, len(self.names))).round().astype(int)
        self.drawn = [self.names[i] for i in places.tolist()]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """(clean, noisy): the noise is the same in every run."""
        index = self.names.index(name)
        clean = self.folder[index][None] / 255
        noise = torch.randn(clean.shape, generator=generator("test noise", self.known.seed, index))
        return clean, clean + self.known.sigma * noise

    def key(self, name: str) -> str:
        """The name with a digest of the pixels: another photograph of that name is another photograph."""
        content = self.folder[self.names.index(name)].numpy().tobytes()
        return f"{name} {hashlib.blake2b(content, digest_size=4).hexdigest()}"


def compare(
    known: Denoising,
    data: Path | str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    only: Iterable[str] = (),
    limit: int = 0,
    watch: Watch = lambda *_: None,
    **options: Any,
) -> Iterator[Denoised]:
    """Train each denoiser in a folder of ``out``, judge it, and yield the outcome. Whatever is done already is taken from there.

    ``overrides`` change every training, as ``train.steps=100``; ``only`` names the denoisers that are wanted (all, if none is named);
    ``limit`` bounds the number of test photographs. ``options`` as for :func:`~nonexpansive.train.fit`.
    """
    data = Path(data)
    chosen = wanted(
        only, [TOTAL_VARIATION, *(entry.name for entry in known.runs), *([UNSTABLE] if known.unstable else [])]
    )
    runs = [known.settings(entry, overrides) for entry in known.runs]
    if len({repr((run.data, run.train.batch, run.train.seed)) for run in runs}) > 1:
        raise BadInput(
            "the runs of this experiment differ in data, train.batch or train.seed, but are to see the same patches"
        )
    given: DenoiseData = runs[0].data
    photographs = Photographs(known, data, given.channels, limit)
    if TOTAL_VARIATION in chosen:
        yield _total_variation(known, data / given.validation, photographs, out, watch)
    for entry, run in zip(known.runs, runs, strict=True):
        amplified = entry.name == known.unstable and UNSTABLE in chosen
        if entry.name not in chosen and not amplified:
            continue
        folder = out / entry.folder
        if known.minutes:
            run = within(run, data, folder, known.minutes, **options)
        weights = train(run, data, folder, **options)
        about = {"steps": run.train.steps, "seconds": seconds_trained(folder), "weights": weights}
        if entry.name in chosen:
            yield _network(entry.name, weights, 1.0, photographs, folder, about, watch)
        if amplified:
            yield _network(UNSTABLE, weights, known.amplification, photographs, out / UNSTABLE, about, watch)


def _network(
    name: str, weights: Path, factor: float, photographs: Photographs, folder: Path, about: dict[str, Any], watch: Watch
) -> Denoised:
    """What is found of ``factor`` times a trained denoiser; ``about``: of its training."""
    known = photographs.known
    model = checkpoint.load(weights).requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    asked = {"weights": hashlib.sha256(weights.read_bytes()).hexdigest(), "sigma": known.sigma, "seed": known.seed}
    if factor != 1:
        model, asked = Amplified(model, factor).eval(), asked | {"factor": factor}
    kept = Ledger(folder / "photographs.jsonl", asked)
    judged = _judge(name, model, photographs, kept, watch)
    certificate = certify(model, (photographs.folder[0].shape[0], known.probe, known.probe))
    model = model.double()  # what is measured from below is not to be rounding

    def f(y: Tensor) -> Tensor:
        return model(y, known.sigma)

    def slopes(x: Tensor, watch: Callable[[int], None]) -> tuple[float, float]:
        measured = 0.0
        for index in range(len(x)):
            watch(index)
            measured = max(measured, jacobian_norm(f, x[index : index + 1], seed=index))
        return measured, max(measured, steepest(f, x, steps=64))

    proved = (certificate.lipschitz, certificate.averaged)
    probed = _probed(name, f, slopes, proved[1], photographs, kept, watch)
    return Denoised(name, *judged[:4], *proved, *probed, judged[4], parameters, **about)


def _total_variation(known: Denoising, validation: Path, photographs: Photographs, out: Path, watch: Watch) -> Denoised:
    """Proximal, so exactly 1/2-averaged; its weight is chosen on validation photographs, at the noise of the experiment."""
    asked = {"tuned": known.tuned, "crop": known.crop, "sigma": known.sigma, "seed": known.seed}
    kept = Ledger(out / TOTAL_VARIATION.replace(" ", "-") / "photographs.jsonl", asked)
    if "weight" not in kept:
        watch(f"{TOTAL_VARIATION}: weight", 0, 1)
        pairs = []
        for index, photo in enumerate(PhotoFolder(validation, photographs.folder[0].shape[0], limit=known.tuned)):
            clean = centre(photo[None] / 255, known.crop)
            noise = torch.randn(clean.shape, generator=generator("tuning noise", known.seed, index))
            pairs.append((clean, clean + known.sigma * noise))
        rough = known.sigma / 2
        weight, _ = tune(lambda y, w: tv_denoise(y, w, tolerance=1e-3).image, pairs, rough / 2, rough * 8, 0.05)
        kept.add("weight", weight)
        watch(f"{TOTAL_VARIATION}: weight", 1, 1)
    weight = float(kept["weight"])
    judged = _judge(TOTAL_VARIATION, lambda y, _: tv_denoise(y, weight).image, photographs, kept, watch)

    missed = 0.0

    def f(y: Tensor) -> Tensor:
        nonlocal missed
        solution = tv_denoise(y, weight, ACCURACY, iterations=1000)
        missed = max(missed, solution.accuracy)
        return solution.image

    def slopes(x: Tensor, watch: Callable[[int], None]) -> tuple[float, float]:
        root = x[0].numel() ** 0.5
        found = [0.0, 0.0]
        for index in range(len(x)):
            watch(index)
            for place, share in enumerate((0.1, 1.0)):  # of the noise: so far apart are the pictures that are compared
                size = share * known.sigma * root
                seen = stretch(f, x[index : index + 1], size, steps=15, seed=index) - 2 * missed * root / size
                found[place] = max(found[place], seen)
        return found[0], max(found)

    probed = _probed(TOTAL_VARIATION, f, slopes, None, photographs, kept, watch)
    return Denoised(TOTAL_VARIATION, *judged[:4], 1.0, 0.5, *probed, judged[4], weight=weight)


def _judge(
    name: str, denoise: Denoise, photographs: Photographs, kept: Ledger, watch: Watch
) -> tuple[list[str], list[float], list[float], list[float], dict[str, Path]]:
    """Names, PSNR, SSIM and seconds of each photograph, and the files of those that are drawn."""
    # imported here because it takes seconds
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    rows, files = [], dict[str, Path]()
    for done, photo in enumerate(photographs.names):
        key, file = photographs.key(photo), kept.path.with_name(Path(photo).stem + ".png")
        if photo in photographs.drawn:
            files[photo] = file
        if key not in kept or (photo in files and not file.is_file()):
            watch(name, done, len(photographs.names))
            clean, noisy = photographs.pair(photo)
            noisy = noisy.contiguous(memory_format=torch.channels_last)  # as the weights are
            began = time.process_time()
            with torch.no_grad():
                restored = denoise(noisy, photographs.known.sigma)
            seconds = time.process_time() - began
            if photo in files:
                write_picture(file, restored)
            psnr = float(peak_signal_noise_ratio(restored, clean, data_range=1.0))
            ssim = float(structural_similarity_index_measure(restored, clean, data_range=1.0))  # pyright: ignore
            kept.add(key, [psnr, ssim, seconds])
        rows.append(kept[key])
    watch(name, len(rows), len(rows))
    psnr, ssim, seconds = (list(column) for column in zip(*rows, strict=True))
    return photographs.names, psnr, ssim, seconds, files


def _probed(
    name: str,
    f: Callable[[Tensor], Tensor],
    slopes: Callable[[Tensor, Callable[[int], None]], tuple[float, float]],
    averaged: float | None,
    photographs: Photographs,
    kept: Ledger,
    watch: Watch,
) -> tuple[float, float, list[float], float]:
    """Lipschitz constants from below at and near noisy crops, the residuals of f applied over and over from there, and their growth."""
    known = photographs.known
    key = f"slopes at {known.probe} pixels of {', '.join(map(photographs.key, photographs.drawn))}"
    repeated = f"{known.repeated} times over, {key}"
    if key not in kept or repeated not in kept:
        pairs = [[centre(picture, known.probe) for picture in photographs.pair(name)] for name in photographs.drawn]
        clean, x = (torch.cat(pictures).double() for pictures in zip(*pairs, strict=True))
        if key not in kept:
            kept.add(key, slopes(x, lambda done: watch(f"{name}: slopes", done, len(x))))
            watch(f"{name}: slopes", len(x), len(x))
        label = f"{name}: applied over and over"
        _, residual, growth = trace(f, x, clean, known.repeated, lambda k: watch(label, k, known.repeated))
        require_settling(growth, averaged)
        kept.add(repeated, [[str(value) for value in residual.amax(0).tolist()], growth])
    residual, growth = kept[repeated]
    return *kept[key], [float(value) for value in residual], growth


def centre(x: Tensor, size: int) -> Tensor:
    """The middle ``size`` x ``size`` pixels of pictures (..., H, W). Raises BadInput where they are smaller."""
    if min(x.shape[-2:]) < size:
        raise BadInput(
            f"a photograph of {x.shape[-2]}x{x.shape[-1]} has no centre crop of {size}x{size}: ask for a smaller one"
        )
    top, left = ((n - size) // 2 for n in x.shape[-2:])
    return x[..., top : top + size, left : left + size]


def write_picture(path: Path, picture: Tensor) -> None:
    """A picture (1, C, H, W), clamped to [0, 1], as a PNG of 8 bits."""
    values = (picture[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with atomic(path) as temporary:
        Image.fromarray(values.squeeze()).save(temporary, format="PNG")
