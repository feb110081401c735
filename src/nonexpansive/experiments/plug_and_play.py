"""Plug-and-Play deblurring followed step by step: with a denoiser that makes it converge by proof, with those that do not, beside
total variation.

The iteration is forward-backward, x ← D(x - τAᵀ(Ax - y)), on centre crops of test photographs, photograph i blurred by kernel i
modulo their number, circularly. The averaged D is certified first, and its residuals must never grow; the others are refused by
``certify`` and run all the same, to be seen.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonexpansive import checkpoint, sealed
from nonexpansive.errors import BadInput, Refused
from nonexpansive.experiments.denoising import TOTAL_VARIATION, UNSTABLE, Watch, centre
from nonexpansive.experiments.settings import Ledger, load, wanted
from nonexpansive.experiments.stability import Amplified, psnr_of, require_settling, trace
from nonexpansive.math.certificate import Shape
from nonexpansive.nn.models import ImageDenoiser
from nonexpansive.restore import Blurring, blur, degrade, kernel, prove, splitting
from nonexpansive.restore.variational import tune, tv_deblur
from nonexpansive.train import PhotoFolder
from nonexpansive.train.data import key

FORMAT = "nonexpansive restorations 1"
AVERAGED, ORDINARY = "averaged", "DnCNN"
METHODS = (TOTAL_VARIATION, AVERAGED, ORDINARY, UNSTABLE)
WORST = -50.0
"""PSNR, in dB, is drawn and averaged as this where it is less, or where the numbers are no longer finite."""


@dataclass(frozen=True)
class PlugAndPlay:
    """The problems, the denoisers, and how long they are followed.

    - ``noise``: standard deviations, in units of images in [0, 1]; ``kernels``: as for :func:`~nonexpansive.restore.kernel`, files being
      looked for in ``kernel_folder`` within the data; the first ``photographs`` of the folder ``test``, centre crops of ``size`` pixels;
    - ``denoiser``: the averaged one, a shipped model or a file; ``ordinary``: weights of a DnCNN, a file;
    - ``level``: a denoiser that takes a noise level is run at so many times that of the data; one that does not is relaxed,
      (1-t)I + tD, with the t that is best after ``trial`` iterations on ``tuned`` crops from the folder ``validation``. The weight of
      the total variation is chosen on the same crops;
    - ``tau``: the step, below 2; ``iterations``: how many are run;
    - ``amplification``: the unstable denoiser is so many times the averaged one.

    In a file: ``kind = "plug-and-play"`` and these settings.
    """

    title: str
    kernels: tuple[str, ...]
    noise: tuple[float, ...] = (0.01, 0.03)
    kernel_folder: str = ""
    test: str = "test"
    validation: str = "val"
    photographs: int = 20
    size: int = 128
    denoiser: str = "denoiser-colour"
    ordinary: str = ""
    level: float = 0.5
    tau: float = 1.1
    iterations: int = 1000
    amplification: float = 1.05
    tuned: int = 2
    trial: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.kernels or not self.noise or not all(0 < noise <= 1 for noise in self.noise):
            raise BadInput("kernels, one or more, and noise, one or more levels in (0, 1], are expected")
        if min(self.photographs, self.tuned, self.trial, self.iterations - 1, self.size - 15) < 1:
            raise BadInput(
                "photographs, tuned and trial are at least 1, iterations at least 2, size at least 16 pixels"
            )
        if not 0 < self.level < math.inf or not 0 < self.tau < 2 or self.seed < 0:
            raise BadInput("level is above 0, tau between 0 and 2, seed at least 0")
        if not 1 < self.amplification < math.inf:
            raise BadInput(f"amplification = {self.amplification}: above 1, or the unstable denoiser would be stable")

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> PlugAndPlay:
        """Raises BadInput, naming what is wrong."""
        return load(cls, path, overrides=overrides)


@dataclass(frozen=True, eq=False)
class Restored:
    """What became of the photographs under one method, at one noise level.

    - ``psnr`` (photographs, iterations), in dB: after each iteration (total variation: one column, its solution); ``blurred``
      (photographs,): of the data; ``residual``: x_k - x_{k-1}, root mean square. They are nan and inf from where
      numbers were no longer finite.
    - ``growth``: the largest ratio of a residual to the one before it, rounding left out: above 1 no averaged map is at work;
    - ``averaged``: α of the iteration where it is proved, else ``refusal`` says why not;
    - ``strength``: the t of (1-t)I + tD, or the weight of the total variation; ``seconds``, of the processor, for all photographs.
    """

    method: str
    noise: float
    blurred: Tensor
    psnr: Tensor
    strength: float
    seconds: float
    residual: Tensor = field(default_factory=lambda: torch.empty(0))
    growth: float | None = None
    averaged: float | None = None
    refusal: str = ""

    @property
    def quality(self) -> Tensor:
        """PSNR, no worse than :data:`WORST`."""
        return self.psnr.nan_to_num(WORST, WORST, WORST).clamp_min(WORST)

    @property
    def diverged(self) -> int:
        """How many photographs ended in numbers that are not finite."""
        return 0 if not self.residual.numel() else int((~self.residual[:, -1].isfinite()).sum())


@dataclass(frozen=True)
class _Prior:
    """A denoiser, the level it is asked for and where it is from."""

    model: nn.Module
    sigma: Callable[[float], float]
    tuned: bool
    sha: str


@dataclass(frozen=True, eq=False)
class _Problem:
    """Photographs (B, C, n, n) that are blurred by one kernel, and their data."""

    clean: Tensor
    y: Tensor
    blurring: Blurring
    about: dict[str, Any]


def follow(
    known: PlugAndPlay,
    data: Path | str,
    out: Path,
    *,
    only: Iterable[str] = (),
    limit: int = 0,
    watch: Watch = lambda *_: None,
) -> Iterator[Restored]:
    """Restore by each method at each noise level; what is done is kept in ``out``, kernel by kernel, and taken from there.

    ``only`` names methods of :data:`METHODS`; ``limit`` bounds the number of photographs.
    Raises Refused if the averaged denoiser proves to be none, Diverging if a residual grows against the proof, BadInput.
    """
    data, chosen = Path(data), wanted(only, METHODS)
    priors = {method: _prior(known, method) for method in chosen if method != TOTAL_VARIATION}
    kernels = [kernel(_found(spec, data / known.kernel_folder)) for spec in known.kernels]
    channels = next((p.model.channels for p in priors.values() if isinstance(p.model, ImageDenoiser)), 3)
    count = min(known.photographs, limit or known.photographs)
    test = _crops(PhotoFolder(data / known.test, channels, limit=count), known.size)
    held_out = _crops(PhotoFolder(data / known.validation, channels, limit=known.tuned), known.size)
    for noise in known.noise:
        problems = [_problem(known, test[j :: len(kernels)], k, noise, j) for j, k in enumerate(kernels[: len(test)])]
        trials = [
            _problem(known, held_out[i : i + 1], kernels[i % len(kernels)], noise, i) for i in range(len(held_out))
        ]
        for method in chosen:
            folder = out / method.replace(" ", "-")
            prior = priors.get(method)
            strength = _strength(known, method, prior, noise, trials, folder, watch)
            rows, certificate = [], (None, "")
            for done, problem in enumerate(problems):
                label = f"{method}, noise {noise:g}, kernel {done + 1} of {len(problems)}"
                asked = {**problem.about, "tau": known.tau, "strength": strength, "iterations": known.iterations}
                asked |= (
                    {"weights": prior.sha, "level": known.level, "amplification": known.amplification} if prior else {}
                )
                if prior:
                    T = _iteration(known, prior, problem, noise, strength)
                    certificate = _certificate(T, problem.blurring.image_shape, required=method == AVERAGED)
                    run = _traced(T, problem, known.iterations, certificate[0], label, watch)
                else:
                    run = _solved(problem, strength)
                rows.append(_kept(folder / f"{noise:g}-{done}.safetensors", asked, run))
            psnr, residual, blurred = (
                torch.cat([row[name] for row in rows]) for name in ("psnr", "residual", "blurred")
            )
            order = torch.argsort(torch.cat([torch.arange(len(test))[j :: len(kernels)] for j in range(len(problems))]))
            yield Restored(
                method, noise, blurred[order], psnr[order], strength, sum(float(row["seconds"]) for row in rows),
                residual[order], max(float(row["growth"]) for row in rows) if prior else None, *certificate,
            )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- parts


def _traced(
    T: nn.Module, problem: _Problem, iterations: int, averaged: float | None, label: str, watch: Watch
) -> Callable[[], dict[str, Tensor]]:
    """Follows T; a residual that grows against its proof ends the experiment."""

    def run() -> dict[str, Tensor]:
        began = time.process_time()
        start = problem.blurring.start(problem.y)
        psnr, residual, growth = trace(T, start, problem.clean, iterations, lambda k: watch(label, k, iterations))
        require_settling(growth, averaged)
        return {"psnr": psnr, "residual": residual, "growth": torch.tensor(growth, dtype=torch.float64),
                **_measured(problem, began)}  # fmt: skip

    return run


def _solved(problem: _Problem, weight: float) -> Callable[[], dict[str, Tensor]]:
    """Solves for the minimum of the total variation, which has no iterations to follow."""

    def run() -> dict[str, Tensor]:
        began = time.process_time()
        x = tv_deblur(problem.y, problem.blurring, weight).image
        return {
            "psnr": psnr_of(x, problem.clean)[:, None],
            "residual": torch.empty(len(x), 0),
            **_measured(problem, began),
        }

    return run


def _measured(problem: _Problem, began: float) -> dict[str, Tensor]:
    seconds = torch.tensor(time.process_time() - began, dtype=torch.float64)
    return {"blurred": psnr_of(problem.y, problem.clean), "seconds": seconds}


def _kept(path: Path, asked: dict[str, Any], run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the file holds, if it answers what is asked, or what ``run`` gives, which is then kept there."""
    with suppress(BadInput):  # no file, or a damaged one: it is made again
        tensors, header = sealed.read(path, FORMAT)
        if header.get("asked") == asked:
            return tensors
    tensors = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    sealed.write(path, FORMAT, tensors, {"asked": asked})
    return tensors


def _prior(known: PlugAndPlay, method: str) -> _Prior:
    name = known.ordinary if method == ORDINARY else known.denoiser
    if not name or (name.endswith(".safetensors") and not Path(name).is_file()):
        what, run = ("ordinary", "DnCNN") if method == ORDINARY else ("denoiser", "averaged Euler")
        raise BadInput(
            f"{name or f'the weights of {method}'}: no such file. Train it, `nonexpansive experiment bsds500 --data DIR -o DIR --only "
            f'"{run}"`, and give its weights, `--set {what}=DIR/{run.replace(" ", "-")}/best.safetensors`; or leave the method out, '
            "by an --only for each that is wanted"
        )
    path = checkpoint.path_of(name)
    header, _ = checkpoint.read(path)
    model = checkpoint.load(name).requires_grad_(False)
    levelled = bool(getattr(model, "levelled", False))
    trained = header.training.get("run", {}).get("data", {}).get("sigma")  # the one level that it was trained at
    if method == UNSTABLE:
        model = Amplified(model, known.amplification).eval()

    def sigma(noise: float) -> float:
        return known.level * noise if levelled or not trained else sum(trained) / len(trained) / 255

    return _Prior(model, sigma, not levelled, hashlib.sha256(path.read_bytes()).hexdigest())


def _iteration(known: PlugAndPlay, prior: _Prior, problem: _Problem, noise: float, strength: float) -> nn.Module:
    sigma, y = prior.sigma(noise), problem.y
    return splitting(
        "forward-backward", prior.model, problem.blurring, y, sigma=sigma, tau=known.tau, strength=strength
    )


def _certificate(T: nn.Module, shape: Shape, required: bool) -> tuple[float | None, str]:
    """(α, "") of the iteration, or (None, why there is none); where it is ``required``, Refused passes through."""
    try:
        certificate = prove(T, shape)
        if certificate.averaged is None:
            raise Refused("proved to descend, not to be averaged, which this experiment follows")
        return certificate.averaged, ""
    except Refused as refusal:
        if required:
            raise
        return None, str(refusal).splitlines()[0]


def _strength(
    known: PlugAndPlay,
    method: str,
    prior: _Prior | None,
    noise: float,
    trials: list[_Problem],
    folder: Path,
    watch: Watch,
) -> float:
    """Of (1-t)I + tD, or the weight of the total variation; from validation photographs, or 1 where the level decides."""
    if prior and (not prior.tuned or method == UNSTABLE):
        return 1.0
    about = {"trials": [trial.about for trial in trials], "noise": noise, "weights": prior.sha if prior else ""}
    kept = Ledger(folder / f"strength-{noise:g}.jsonl", about | {"trial": known.trial, "tau": known.tau})
    if "strength" not in kept:
        watch(f"{method}, noise {noise:g}: strength", 0, 1)
        problem_of = {id(trial.y): trial for trial in trials}

        def solve(y: Tensor, strength: float) -> Tensor:
            problem = problem_of[id(y)]
            if prior is None:
                return tv_deblur(y, problem.blurring, strength, tolerance=5e-4).image
            T, x = _iteration(known, prior, problem, noise, strength), problem.blurring.start(y)
            with torch.no_grad():
                for _ in range(known.trial):
                    x = T(x)
            return x.nan_to_num(0.0, 0.0, 0.0).clamp(-10, 10)  # what has run away is no picture

        low, high, precision = (0.01, 1.0, 0.3) if prior else (0.1 * noise**2, 30 * noise**2, 0.1)
        best, _ = tune(solve, [(trial.clean, trial.y) for trial in trials], low, high, precision)
        kept.add("strength", best)
        watch(f"{method}, noise {noise:g}: strength", 1, 1)
    return float(kept["strength"])


def _problem(known: PlugAndPlay, clean: Tensor, k: Tensor, noise: float, index: int) -> _Problem:
    blurring = blur(k, (clean.shape[1], known.size, known.size))
    seed = key("blurred", known.seed, round(1e6 * noise), index)
    content = hashlib.sha256(clean.numpy().tobytes() + k.numpy().tobytes()).hexdigest()
    return _Problem(
        clean, degrade(clean, blurring, noise, seed), blurring, {"content": content, "noise": noise, "seed": seed}
    )


def _crops(photos: PhotoFolder, size: int) -> Tensor:
    return torch.stack([centre(photo, size) for photo in photos]) / 255


def _found(spec: str, folder: Path) -> str:
    """A kernel's file in the folder, if there is one; else what the kernel says."""
    return str(folder / spec) if (folder / spec).is_file() else spec
