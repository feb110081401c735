"""Anderson acceleration beside the plain iteration: ``python benchmarks/acceleration.py``.

A 64x64 crop of the shipped photograph, motion blur, circular, 1 % noise, the shipped colour denoiser and, of the crop in grey, the
proximal one, whose iterations descend, in float64. Printed are the evaluations of T
(rejected proposals included) to each relative residual, and the bound on ‖T(x) - x‖ that was proved before the run, over what was
seen at the last plain step.
"""

from __future__ import annotations

import argparse
import itertools
from importlib.resources import as_file, files

import torch

import nonexpansive
from nonexpansive.app.images import read_image
from nonexpansive.nn.models import ImageDenoiser, ProximalDenoiser
from nonexpansive.restore import blur, degrade, kernel, plan
from nonexpansive.restore.iterate import Acceleration
from nonexpansive.train.data import LUMA

TOLERANCES = (1e-3, 1e-4, 1e-5)
METHODS = ("half-quadratic", "forward-backward")
DENOISERS = ("denoiser-colour", "denoiser-grey-proximal")
WAYS: tuple[Acceleration | None, ...] = (None, "anderson")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", default="motion:9,30", help="as for `nonexpansive deblur`")
    parser.add_argument("--denoisers", nargs="+", default=DENOISERS, metavar="MODEL")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nonexpansive.keep_memory()
    with as_file(files("nonexpansive") / "photographs" / "astronaut.png") as path:
        x = read_image(path).tensor[None, :, 60:124, 200:264]
    print(f"| denoiser | method | {' | '.join(f'{tolerance:g}' for tolerance in TOLERANCES)} | proved over seen |")
    print("|---" * (len(TOLERANCES) + 3) + "|")
    for (name, method), acceleration in itertools.product(itertools.product(arguments.denoisers, METHODS), WAYS):
        denoiser = nonexpansive.load(name)
        assert isinstance(denoiser, ImageDenoiser)
        clean = (
            x if denoiser.channels == 3 else (x * torch.tensor(LUMA, dtype=x.dtype)[:, None, None]).sum(1, keepdim=True)
        )
        if isinstance(denoiser, ProximalDenoiser):  # float32 cannot solve for it as precisely
            denoiser.double().tolerance, clean = TOLERANCES[-1] / 4, clean.double()
        blurring = blur(kernel(arguments.kernel), tuple(clean.shape[1:]))
        y = degrade(clean, blurring, 0.01, 0)
        report = plan(y, blurring, denoiser, 0.01, method=method).run(
            tolerance=TOLERANCES[-1], iterations=arguments.iterations, acceleration=acceleration
        )
        reached = [next((k for k, r in enumerate(report.residuals, 1) if r <= t), None) for t in TOLERANCES]
        steps = " | ".join("-" if k is None else str(k) for k in reached)
        loose = f"{report.proved[-1] / report.movements[-1]:,.0f}" if report.proved else ""
        print(f"| {name} | {method}, {acceleration or 'plain'} | {steps} | {loose} |", flush=True)


if __name__ == "__main__":
    main()
