"""What the commands that restore have in common: their options, the denoiser, a run with its progress, and the end."""

from __future__ import annotations

import functools
import math
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from nonexpansive import checkpoint
from nonexpansive.app.output import IMAGE_SUFFIXES, check_writable, err, out, write_json
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import Certificate
from nonexpansive.math.rounding import above
from nonexpansive.nn.models import Denoiser, ImageDenoiser, ProximalDenoiser
from nonexpansive.restore.iterate import NOT_CERTIFIED, Acceleration, Descent, Report
from nonexpansive.restore.restoration import Plan
from nonexpansive.restore.tiles import Tiled

MAX_SEED = 2**63 - 1


Model = Annotated[
    str | None,
    typer.Option(
        help="A shipped model (see `nonexpansive models`) or a .safetensors file.", show_default="by channels"
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result, with the certificate, as JSON.")
]
Figure = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a figure (.png or .pdf): pictures side by side.")
]
Memory = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="MB",
        help="Bound on the denoiser's own arrays (larger pictures go in tiles), and on the acceleration's.",
    ),
]
Accelerated = Annotated[
    str,
    typer.Option(
        help="anderson: fewer steps to the same fixed point, safeguarded; none; or auto: anderson where convergence is proved "
        "and --memory allows it."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise that is added.")]
Tolerance = Annotated[float, typer.Option(min=1e-6, help="Stop when the relative residual is at most this.")]
Iterations = Annotated[int, typer.Option(min=1, help="At most so many steps.")]
Uncertified = Annotated[
    bool, typer.Option("--uncertified", help="Run even where convergence is not proved; every output says so.")
]


def accelerated(name: str) -> Acceleration | Literal["auto"] | None:
    """What --acceleration asks for. Raises BadInput for one that there is not."""
    known: dict[str, Acceleration | Literal["auto"] | None] = {"auto": "auto", "anderson": "anderson", "none": None}
    if name not in known:
        raise BadInput(f"no acceleration {name!r}: there are {', '.join(known)}")
    return known[name]


def check_outputs(
    sources: Sequence[Path],
    output: Path,
    figure: Path | None,
    json_file: Path | None,
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES,
) -> None:
    """Refuse, before any work, what could not be written at its end."""
    check_writable(output, inputs=sources, suffixes=suffixes)
    others = {"--figure": (figure, (".png", ".pdf", ".svg")), "--json": (json_file, (".json",))}
    for option, (path, endings) in others.items():
        if path is not None and os.path.realpath(path) == os.path.realpath(output):
            raise BadInput(f"{option} {str(path)!r} is the output itself: give another name")
        if path is not None:
            check_writable(path, inputs=sources, suffixes=endings)


_loaded = functools.lru_cache(2)(checkpoint.load)
"""Once for all files of a folder."""


def the_denoiser(name: str | None, channels: int, of: str, tolerance: float = math.inf) -> ImageDenoiser:
    """The denoiser of that name or file, or the shipped one for pictures of so many channels. A proximal one is solved for as
    precisely as an iteration to the relative residual ``tolerance`` needs."""
    if name is None and channels not in (1, 3):
        raise BadInput(f"{of} is of {channels} channels: the shipped denoisers are for 1 (grey) and 3 (colour)")
    module = _loaded(name or checkpoint.DEFAULTS["denoise" if channels == 3 else "denoise-grey"])
    if not isinstance(module, ImageDenoiser):
        raise BadInput(f"{name} is a {type(module).__name__}, not a denoiser")
    if module.channels != channels:
        raise BadInput(f"{name} takes {module.channels} channel(s), but {of} has {channels}: choose another --model")
    if isinstance(module, ProximalDenoiser):
        if not tolerance >= 8e-5:  # in float32 the solver is not sure to come below 2e-5
            raise BadInput(f"--tolerance {tolerance:g}: float32 solves for a proximal denoiser to 8e-5 and more")
        module.tolerance = min(module.tolerance, tolerance / 4)
    return module


def whole(denoiser: ImageDenoiser, shape: tuple[int, ...], memory: float) -> bool:
    """Whether a picture is restored without tiles in so many megabytes."""
    return Tiled(denoiser, memory * 1e6).whole(shape)


def show_certificate(certificate: Certificate, denoiser: ImageDenoiser) -> None:
    """The tree without an averaged denoiser's single flows, which are all alike."""
    lines = [line for line in str(certificate).splitlines() if "GradientFlow:" not in line]
    out.print("\n".join(lines), markup=False)
    if isinstance(denoiser, Denoiser):
        out.print(f"  ({len(denoiser.flows())} gradient flows; `nonexpansive certify` prints them)", markup=False)


def show_plan(prepared: Plan, denoiser: ImageDenoiser) -> None:
    """What is proved of a restoration, and its settings; or that nothing is, and why."""
    smoothness = "" if prepared.smoothness is None else f"L of the data term ≤ {above(prepared.smoothness)}, "
    settings = f"{smoothness}τ = {prepared.tau:.4g}, denoiser at {prepared.sigma * 255:.2f}/255"
    if prepared.certificate is None:
        out.print(f"{settings}; [bold red]{NOT_CERTIFIED}[/], as --uncertified allows")
        out.print(f"why: {prepared.refusal}", markup=False)
        return
    show_certificate(prepared.certificate, denoiser)
    if isinstance(prepared.certificate, Descent):
        out.print(f"{settings}: [bold green]descent on an objective is proved[/], and that the residuals tend to 0")
        return
    alpha = prepared.averaged
    proof = "the iteration is non-expansive" if alpha is None else f"α of the iteration ≤ {ceil(alpha)}"
    out.print(f"{settings}; {proof}: [bold green]convergence is proved[/]")


def iterate(
    prepared: Plan,
    tolerance: float,
    iterations: int,
    acceleration: Acceleration | Literal["auto"] | None,
    name: str = "",
) -> Report:
    """Run it with the residual in view, and say how it ended."""
    with progress(iterations, f"{name} residual".strip()) as show:
        report = prepared.run(
            tolerance=tolerance,
            iterations=iterations,
            acceleration=acceleration,
            watch=lambda k, residual, x: show(k, f"{residual:.2e}"),
        )
    ending = "converged" if report.converged else "stopped, not yet converged,"
    out.print(
        f"{f'{name}: ' if name else ''}{ending} after {report.iterations} steps at a relative residual of "
        f"{report.residuals[-1]:.2e}, {report.seconds:.1f} s"
        + (f", {report.acceleration}" if report.acceleration else "")
        + ("" if report.certified else f" ({NOT_CERTIFIED})"),
        markup=False,
    )
    return report


def captions(prepared: Plan, anchored: bool = False) -> dict[str, str | None]:
    """What a figure of the run says of its proof: ``note``, of the residual, and ``warning``."""
    monotone = prepared.averaged is not None and not anchored
    return {
        "note": "\n‖T(x) - x‖ never increases, by proof" if monotone else "",
        "warning": None if prepared.certificate is not None else NOT_CERTIFIED,
    }


def mark(prepared: Plan, output: Path) -> None:
    """Put into a PNG file, as its comment, that nothing was proved, where nothing was: a tEXt chunk after the header (8 + 25 bytes)."""
    if prepared.certificate is not None or output.suffix.lower() != ".png":
        return
    text = b"Comment\0" + NOT_CERTIFIED.encode("latin-1")
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    content = output.read_bytes()
    with atomic(output) as temporary:
        temporary.write_bytes(content[:33] + chunk + content[33:])


def ceil(alpha: float | None) -> str:
    return "unknown" if alpha is None else f"{-(-alpha * 1e4 // 1) / 1e4:.4f}"


def promise(averaged: float | None, lipschitz: float | None) -> str:
    """The strongest that is proved of a map, in short."""
    return f"α ≤ {ceil(averaged)}" if averaged is not None else f"L ≤ {ceil(lipschitz)}"


def compare(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """PSNR (dB, peak 1) and SSIM of each picture against its truth, printed and returned."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    quality = {}
    for name, (picture, truth) in pairs.items():
        psnr = float(peak_signal_noise_ratio(picture, truth, data_range=1.0))
        ssim = (
            structural_similarity_index_measure(picture, truth, data_range=1.0) if min(truth.shape[-2:]) >= 11 else None
        )
        assert ssim is None or isinstance(ssim, Tensor)
        quality[name] = {"psnr": psnr} | ({} if ssim is None else {"ssim": float(ssim)})
        out.print(f"{name:>9}: PSNR {psnr:.2f} dB" + ("" if ssim is None else f", SSIM {float(ssim):.4f}"))
    return quality


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    columns = (
        BarColumn(),
        TextColumn("{task.completed} steps"),
        TimeElapsedColumn(),
        TextColumn("{task.description} {task.fields[value]}", markup=False),
    )
    with Progress(*columns, console=err, transient=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total, value="")
        yield lambda k, value: bar.update(task, completed=k, value=value)


def finish(result: dict[str, Any], output: Path, figure: Path | None, json_file: Path | None, began: float) -> None:
    """Write the JSON, and say what was written."""
    if json_file is not None:
        write_json(json_file, result)
    written = ", ".join(str(path) for path in (output, figure, json_file) if path is not None)
    out.print(f"wrote {written} ({time.perf_counter() - began:.1f} s in all)", markup=False)
