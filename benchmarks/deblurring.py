"""Plug-and-Play deblurring with a shipped denoiser beside tuned total variation: ``python benchmarks/deblurring.py --data DIR``.

Photograph i, its middle 256x256, is blurred by kernel i (modulo their number), periodically continued, and disturbed by
Gaussian noise of each level (on the scale of 255). Mean PSNR with peak 1, seconds, and steps to a relative residual of 3e-4.

``--ordinary FILE`` adds forward-backward with a denoiser that nothing holds, such as a DnCNN, as its users run it: relaxed,
(1-t)I + tD, and stopped after so many steps, both given for each noise level by ``--settings``. ``certify`` refuses it.

``--tune`` searches, on the photographs and kernels given, which should not be those reported, the denoiser's level and its trust in the
data for both methods, the weight of the total variation, and the t and the number of steps of an ordinary denoiser.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

import nonexpansive
from nonexpansive.app.output import write_json
from nonexpansive.errors import BadInput, NonexpansiveError
from nonexpansive.nn.models import ImageDenoiser
from nonexpansive.restore import Blurring, blur, degrade, kernel, plan, splitting
from nonexpansive.restore.methods import Method
from nonexpansive.restore.physics import Boundary
from nonexpansive.restore.variational import tune, tv_deblur
from nonexpansive.train.data import PhotoFolder, generator, read_names

WEIGHTS = {2.55: 1.7e-3, 7.65: 8.2e-3, 12.75: 1.7e-2}
"""Weight of the total variation for each noise level, made by ``--tune --crop 192 --limit 6`` on the training photographs of BSDS500 with
the kernels shake:27,seed=11 shake:21,seed=12 shake:17,seed=13 box:7 gaussian:2."""

KERNELS = ["shake:27,seed=1", "shake:27,seed=2", "shake:21,seed=3", "shake:17,seed=4", "box:9", "gaussian:1.6"]
TOLERANCE, STEPS = 3e-4, 300
HEAD = ["PSNR, dB", "seconds", "steps (most)"]


@dataclass(frozen=True)
class Problem:
    clean: Tensor
    blurring: Blurring
    data: Tensor
    noise: float

    def psnr(self, x: Tensor) -> float:
        truth = self.blurring.crop(self.clean)
        return float(peak_signal_noise_ratio(x.clamp(0, 1), truth, data_range=1.0))


@dataclass
class Scores:
    psnr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def row(self) -> list[str]:
        counted = f"{statistics.fmean(self.steps):.0f} ({max(self.steps)})" if any(self.steps) else ""
        return [f"{statistics.fmean(self.psnr):.2f}", f"{statistics.fmean(self.seconds):.1f}", counted]


Restoration = Callable[[Problem], tuple[Tensor, int]]


def problems(
    photos: PhotoFolder, kernels: list[Tensor], noise: float, boundary: Boundary, side: int
) -> Iterator[Problem]:
    for index, photo in enumerate(photos):
        top, left = (max(0, (n - side) // 2) for n in photo.shape[-2:])
        clean = photo[None, :, top : top + side, left : left + side] / 255
        blurring = blur(kernels[index % len(kernels)], tuple(clean.shape[1:]), boundary)
        seed = int(torch.randint(2**31, (), generator=generator("deblurring", round(1000 * noise), index)))
        yield Problem(clean, blurring, degrade(clean, blurring, noise / 255, seed), noise / 255)


def run(restore: Restoration, problems: list[Problem]) -> Scores:
    scores = Scores()
    for problem in problems:
        began = time.perf_counter()
        x, steps = restore(problem)
        scores.seconds.append(time.perf_counter() - began)
        scores.psnr.append(problem.psnr(problem.blurring.crop(x)))
        scores.steps.append(steps)
    return scores


def nothing(problem: Problem) -> tuple[Tensor, int]:
    return problem.blurring.start(problem.data), 0


def total_variation(weight: float) -> Restoration:
    def restore(problem: Problem) -> tuple[Tensor, int]:
        solution = tv_deblur(problem.data, problem.blurring, weight)
        return solution.image, solution.iterations

    return restore


def plug_and_play(
    model: ImageDenoiser, method: Method, sigma: float | None = None, tau: float | None = None
) -> Restoration:
    """With the library's own rule for the level and the step, or with those given (forward-backward: the largest step)."""

    def restore(problem: Problem) -> tuple[Tensor, int]:
        longest = method == "forward-backward" and sigma is not None
        step = 1.99 / problem.blurring.lipschitz if longest else tau
        data, blurring, noise = problem.data, problem.blurring, problem.noise
        prepared = plan(data, blurring, model, noise, method=method, sigma=sigma, tau=step)
        report = prepared.run(tolerance=TOLERANCE, iterations=STEPS)
        return report.image, report.iterations

    return restore


def relaxed(model: nn.Module, problem: Problem, t: float) -> Iterator[Tensor]:
    """The iterates of x ← D_t(x - τAᵀ(Ax - y)), D_t = (1-t)I + tD, which nothing proves to settle."""
    blurring, data = problem.blurring, problem.data
    T = splitting(
        "forward-backward", model, blurring, data, sigma=problem.noise, tau=1.99 / blurring.lipschitz, strength=t
    )
    x = blurring.start(data)
    with torch.no_grad():
        while True:
            yield (x := T(x))


def ordinary(model: nn.Module, t: float, steps: int) -> Restoration:
    def restore(problem: Problem) -> tuple[Tensor, int]:
        return next(itertools.islice(relaxed(model, problem, t), steps - 1, None)), steps

    return restore


def settings(arguments: argparse.Namespace) -> dict[float, tuple[float, int]]:
    """(t, steps) of the ordinary denoiser at each noise level."""
    try:
        pairs = [(float(t), int(steps)) for t, steps in (setting.split(":") for setting in arguments.settings)]
        if min(steps for _, steps in pairs) < 1:
            raise ValueError
        return dict(zip(arguments.noise, pairs, strict=True))
    except ValueError:
        raise BadInput("--settings are T:STEPS, one for each noise level, such as 0.1:30; --tune finds them") from None


def methods(arguments: argparse.Namespace) -> list[Method]:
    """Those asked for, of those that suit the boundary: half-quadratic needs a circular one."""
    return [method for method in arguments.methods if arguments.boundary == "circular" or method == "forward-backward"]


def compare(
    arguments: argparse.Namespace,
    model: ImageDenoiser,
    other: nn.Module | None,
    photos: PhotoFolder,
    kernels: list[Tensor],
) -> None:
    result, chosen = {}, settings(arguments) if other is not None else {}
    for noise in arguments.noise:
        given = list(problems(photos, kernels, noise, arguments.boundary, arguments.crop))
        ways = {"blurred input": nothing, "total variation": total_variation(WEIGHTS[noise])}
        ways |= {method: plug_and_play(model, method) for method in methods(arguments)}
        if other is not None:
            ways["ordinary denoiser, uncertified"] = ordinary(other, *chosen[noise])
        scores = {name: run(way, given) for name, way in ways.items()}
        rows = [[name, *score.row()] for name, score in scores.items()]
        title = f"Noise {noise:g}/255, {len(given)} photographs, {arguments.boundary} boundary"
        show(title, ["method", *HEAD], rows)
        result[f"{noise:g}"] = {name: vars(score) for name, score in scores.items()}
        if arguments.json:
            write_json(
                arguments.json,
                {"kernels": [Path(k).name for k in arguments.kernels], "photographs": photos.names, "noise": result},
            )


def search(
    arguments: argparse.Namespace,
    model: ImageDenoiser,
    other: nn.Module | None,
    photos: PhotoFolder,
    kernels: list[Tensor],
) -> None:
    """Every pair of a level (a multiple of the noise) and a step, best first; then the total variation. An ``other`` denoiser alone:
    every t with the number of steps, of up to ``--steps``, that is best for it."""
    for noise in arguments.noise:
        given = list(problems(photos, kernels, noise, arguments.boundary, arguments.crop))
        if other is not None:
            rows = []
            for t in arguments.strengths:
                paths = [[p.psnr(x) for x in itertools.islice(relaxed(other, p, t), arguments.steps)] for p in given]
                means = [statistics.fmean(step) for step in zip(*paths, strict=True)]
                best = max(range(len(means)), key=means.__getitem__)
                rows.append([f"{t:g}", f"{best + 1}", f"{means[best]:.2f}", f"{means[-1]:.2f}"])
                print(f"ordinary: {' '.join(rows[-1])}", file=sys.stderr, flush=True)
            rows.sort(key=lambda row: -float(row[2]))
            head = ["t", "best step", "PSNR, dB", f"PSNR after {arguments.steps}"]
            show(f"ordinary denoiser, noise {noise:g}/255", head, rows)
            continue
        for method in methods(arguments):
            rows = []
            # forward-backward takes the longest step that there is: shorter ones only mean more of them at a lower level
            trusts = arguments.trusts if method == "half-quadratic" else [None]
            for level, trust in itertools.product(arguments.levels, trusts):
                tau = None if trust is None else (trust * level) ** 2
                scores = run(plug_and_play(model, method, level * noise / 255, tau), given)
                shown = ["largest"] * 2 if tau is None else [f"{trust:g}", f"{tau:.3g}"]
                rows.append([f"{level * noise:.2f}", f"{level:g}", *shown, *scores.row()])
                print(f"{method}: {' '.join(rows[-1])}", file=sys.stderr, flush=True)
            rows.sort(key=lambda row: -float(row[4]))
            head = ["255·level", "level/noise", "trust", "τ = (trust·level/noise)²", *HEAD]
            show(f"{method}, noise {noise:g}/255", head, rows)
        pairs = [(p.clean, p.data) for p in given]
        blurrings = {id(p.data): p.blurring for p in given}

        def solve(y: Tensor, weight: float, blurrings: dict[int, Blurring] = blurrings) -> Tensor:
            return tv_deblur(y, blurrings[id(y)], weight, tolerance=5e-4).image.clamp(0, 1)

        weight, psnr = tune(solve, pairs, 0.1 * (noise / 255) ** 2, 30 * (noise / 255) ** 2, 0.1)
        print(f"\ntotal variation, noise {noise:g}/255: weight {weight:.3g}, {psnr:.2f} dB", flush=True)


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    lines = [head, ["---"] * len(head), *rows]
    print(f"\n### {title}\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument(
        "--names", type=Path, help="text file with the names of those to take; with --tune, to leave out"
    )
    parser.add_argument("--model", default="denoiser-colour", help="a shipped name or a .safetensors file")
    parser.add_argument(
        "--ordinary", metavar="FILE", help="weights of a denoiser without a certificate, to be run beside"
    )
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="T:STEPS", help="its relaxation and steps, for each noise level"
    )
    parser.add_argument("--kernels", nargs="+", default=KERNELS, help="files or forms such as shake:27,seed=3")
    parser.add_argument("--noise", nargs="+", type=float, default=[2.55, 7.65])
    parser.add_argument("--boundary", choices=["circular", "valid"], default="circular")
    both = ["half-quadratic", "forward-backward"]
    parser.add_argument("--methods", nargs="+", choices=both, default=both, help="certified iterations to run")
    parser.add_argument("--crop", type=int, default=256, help="pixels a side")
    parser.add_argument("--limit", type=int, default=10, help="only the first so many photographs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--tune", action="store_true", help="search the settings instead")
    parser.add_argument(
        "--levels", nargs="+", type=float, default=[1.0, 1.5, 2.0, 3.0], help="levels to try, in units of the noise"
    )
    parser.add_argument("--trusts", nargs="+", type=float, default=[0.7, 1.0, 1.4], help="trusts to try")
    parser.add_argument(
        "--strengths", nargs="+", type=float, default=[0.03, 0.1, 0.2, 0.4, 0.7], help="t of an ordinary one to try"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of an ordinary one to try, up to so many")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nonexpansive.keep_memory()
    if untuned := [noise for noise in arguments.noise if noise not in WEIGHTS and not arguments.tune]:
        parser.error(f"total variation is tuned for noise of {list(WEIGHTS)}, not of {untuned}: see --tune")
    try:
        model = nonexpansive.load(arguments.model)
        if not isinstance(model, ImageDenoiser):
            raise BadInput(f"{arguments.model} is no denoiser")
        other = nonexpansive.load(arguments.ordinary) if arguments.ordinary else None
        names = read_names(arguments.names) if arguments.names else None
        select, exclude = (None, names) if arguments.tune else (names, None)
        photos = PhotoFolder(arguments.data, model.channels, select=select, exclude=exclude, limit=arguments.limit)
        kernels = [kernel(spec) for spec in arguments.kernels]
        (search if arguments.tune else compare)(arguments, model, other, photos, kernels)
    except NonexpansiveError as error:
        parser.exit(3, f"error: {error}\n")


if __name__ == "__main__":
    main()
