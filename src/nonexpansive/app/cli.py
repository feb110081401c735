"""The command line: it parses, calls, prints and shows; the mathematics is elsewhere.

Exit codes: 0 done; 2 wrong usage (unknown option, missing argument); 3 an input or an output that cannot be used; 4 no certificate, so
nothing was run; 5 a run failed (it contradicted its certificate, or a training became unstable); 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import nonexpansive
from nonexpansive import checkpoint
from nonexpansive.app.experiments import experiment
from nonexpansive.app.images import Photograph, read_image, write_image
from nonexpansive.app.output import check_writable, write_json
from nonexpansive.app.robust import attack, certify_model, classify
from nonexpansive.errors import BadInput, NonexpansiveError, Refused
from nonexpansive.math.certificate import certify
from nonexpansive.nn.models import Denoiser
from nonexpansive.restore import blur, degrade, plan
from nonexpansive.restore.physics import KERNEL_FORMS, image_shape, kernel, noise_level
from nonexpansive.restore.tiles import Tiled

EXIT = {BadInput: 3, Refused: 4}
FAILED = 5
CODES = (
    "Exit codes: 0 done, 2 wrong usage, 3 an input or output that cannot be used, 4 no certificate so nothing was run, "
    "5 a run failed, 130 interrupted."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Image restoration by neural networks that are provably stable.\n\n{CODES}",
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Photo = Annotated[Path, typer.Argument(help="A photograph: PNG, JPEG or TIFF, grey or colour, 8 or 16 bit.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the restored picture goes: .png, .jpg or .tiff.")]
Model = Annotated[
    str | None,
    typer.Option(help="A shipped model (see `nonexpansive models`) or a .safetensors file. [default: by channels]"),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result, with the certificate, as JSON.")
]
Figure = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a figure (.png or .pdf): pictures side by side.")
]
Memory = Annotated[
    float, typer.Option(metavar="MB", help="Bound on the denoiser's own arrays; larger pictures go in tiles.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise that is added.")]


def _noise(text: str) -> float:
    return noise_level(text)


@app.command(epilog=CODES)
def deblur(
    photo: Photo,
    blur_kernel: Annotated[str, typer.Option("--kernel", "-k", metavar="K", help="The blur:\n\n\b\n" + KERNEL_FORMS)],
    noise: Annotated[
        str, typer.Option("--noise", "-s", metavar="S", help="Standard deviation of the noise: 1%, 0.01 or 2.55/255.")
    ],
    output: Output,
    degraded: Annotated[
        bool,
        typer.Option(
            "--degrade/--restore", help="Blur and disturb a clean PHOTO first and measure; or restore a blurred one."
        ),
    ] = False,
    boundary: Annotated[
        str | None,
        typer.Option(
            help="circular: the picture continues periodically; valid: its surroundings are unknown. "
            "[default: circular with --degrade, else valid]"
        ),
    ] = None,
    model: Model = None,
    method: Annotated[
        str | None, typer.Option(help="half-quadratic or forward-backward. [default: by boundary]")
    ] = None,
    level: Annotated[str | None, typer.Option(help="The denoiser's noise level, in place of the rule's.")] = None,
    tau: Annotated[float | None, typer.Option(help="The data step τ, in place of the rule's.")] = None,
    tolerance: Annotated[float, typer.Option(min=1e-6, help="Stop when the relative residual is at most this.")] = 3e-4,
    iterations: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 300,
    seed: Seed = 0,
    memory: Memory = 1000.0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Deblur a photograph by an iteration whose convergence is proved before it runs.

    Prints the certificate, iterates with the residual in view, and writes the picture. With --degrade the PHOTO is a clean
    one, which is blurred and disturbed first, so that PSNR and SSIM can be measured.
    """
    began = time.perf_counter()
    _check_outputs(photo, output, figure, json_file)
    level_of_noise = _noise(noise)
    sigma = None if level is None else _noise(level)
    k = kernel(blur_kernel)
    picture = read_image(photo)
    boundary = boundary or ("circular" if degraded else "valid")
    denoiser = _denoiser(model, picture)
    x = picture.tensor[None]
    shape = tuple(picture.tensor.shape)
    if degraded:
        clean = x
        blurring = blur(k, shape, boundary)  # type: ignore[arg-type]
        y = degrade(x, blurring, level_of_noise, seed)
    else:
        clean, y = None, x
        blurring = blur(k, image_shape(shape, k, boundary), boundary)  # type: ignore[arg-type]
    prepared = plan(
        y, blurring, denoiser, level_of_noise, method=method, sigma=sigma, tau=tau, memory=memory * 1e6  # type: ignore[arg-type]
    )  # fmt: skip
    _show_certificate(prepared.certificate, denoiser)
    out.print(
        f"L of the data term ≤ {blurring.lipschitz:.6g}, τ = {prepared.tau:.4g}, denoiser at {prepared.sigma * 255:.2f}/255; "
        f"α of the iteration ≤ {_ceil(prepared.certificate.averaged)}: [bold green]convergence is proved[/]"
    )
    curve: list[float] = []
    with _progress(iterations, "residual") as show:

        def watch(k: int, residual: float, x: Tensor) -> None:
            curve.append(residual)
            show(k, f"{residual:.2e}")

        report = prepared.run(tolerance=tolerance, iterations=iterations, watch=watch)
    restored = blurring.crop(report.image) if not degraded else report.image
    restored = restored.clamp(0, 1)
    result: dict[str, Any] = {
        "command": "deblur",
        "photo": str(photo),
        "output": str(output),
        "kernel": blur_kernel,
        "noise": level_of_noise,
        "boundary": boundary,
        "method": prepared.method,
        "level": prepared.sigma,
        "tau": prepared.tau,
        "tiled": not _whole(denoiser, blurring.image_shape, memory),
        **report.to_json(),
    }
    ending = "converged" if report.converged else "stopped, not yet converged,"
    out.print(
        f"{ending} after {report.iterations} steps at a relative residual of {report.residuals[-1]:.2e}, {report.seconds:.1f} s"
    )
    write_image(output, restored[0], bits=picture.bits, icc=picture.icc)
    if clean is not None:
        shown = blurring.crop(clean), y, blurring.crop(restored)
        result["quality"] = _compare({"blurred": (shown[1], shown[0]), "restored": (shown[2], shown[0])})
    else:
        shown = (None, y, restored)
    if figure is not None:
        from nonexpansive.app.figures import restoration

        restoration(figure, clean=shown[0], degraded=shown[1], restored=shown[2], residuals=curve, tolerance=tolerance,
                    quality=result.get("quality"))  # fmt: skip
    _finish(result, output, figure, json_file, began)


@app.command(epilog=CODES)
def denoise(
    photo: Photo,
    noise: Annotated[
        str, typer.Option("--noise", "-s", metavar="S", help="Standard deviation of the noise: 10%, 0.1 or 25/255.")
    ],
    output: Output,
    degraded: Annotated[
        bool, typer.Option("--degrade/--restore", help="Add the noise to a clean PHOTO first; or denoise a noisy one.")
    ] = False,
    model: Model = None,
    seed: Seed = 0,
    memory: Memory = 1000.0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Denoise a photograph with a certified averaged denoiser."""
    began = time.perf_counter()
    _check_outputs(photo, output, figure, json_file)
    sigma = _noise(noise)
    picture = read_image(photo)
    denoiser = _denoiser(model, picture)
    tiled = Tiled(denoiser, memory * 1e6)
    shape = tuple(picture.tensor.shape)
    certificate = certify(tiled, shape)
    _show_certificate(certificate, denoiser)
    clean = picture.tensor[None]
    y = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) if degraded else clean
    with torch.no_grad(), err.status("denoising"):
        restored = tiled(y, sigma).clamp(0, 1)
    write_image(output, restored[0], bits=picture.bits, icc=picture.icc)
    result: dict[str, Any] = {
        "command": "denoise",
        "photo": str(photo),
        "output": str(output),
        "noise": sigma,
        "tiled": not tiled.whole(shape),
        "certificate": certificate.to_json(),
    }
    if degraded:
        result["quality"] = _compare({"noisy": (y, clean), "restored": (restored, clean)})
    if figure is not None:
        from nonexpansive.app.figures import restoration

        restoration(
            figure, clean=clean if degraded else None, degraded=y, restored=restored, quality=result.get("quality")
        )
    _finish(result, output, figure, json_file, began)


app.command("certify", epilog=CODES)(certify_model)
app.command(epilog=CODES)(attack)
app.command(epilog=CODES)(classify)


@app.command(epilog=CODES)
def models(json_file: Json = None) -> None:
    """List the shipped models; the default of each task is marked."""
    if json_file is not None:
        check_writable(json_file, suffixes=(".json",))
    listed = []
    for name in checkpoint.models():
        header, tensors = checkpoint.read(checkpoint.path_of(name))
        tasks = [task for task, chosen in checkpoint.DEFAULTS.items() if chosen == name]
        weights = sum(t.numel() for key, t in tensors.items() if not key.endswith("control.vector"))
        mark = f"  (default of {', '.join(tasks)})" if tasks else ""
        alpha, lipschitz = header.claimed["averaged"], header.claimed["lipschitz"]
        proved = f"α ≤ {_ceil(alpha)}" if alpha is not None else f"L ≤ {_ceil(lipschitz)}"
        out.print(f"{name}: {header.architecture}, {weights:,} parameters, {proved}{mark}", markup=False)
        listed.append({"name": name, "parameters": weights, "default_of": tasks, **vars(header)})
    if json_file is not None:
        write_json(json_file, listed)


@app.command(epilog=CODES)
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped one, such as denoiser-colour.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="The data folder that the config's paths are relative to.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Weights, checkpoints and logs go here; a run resumes from here."
        ),
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as train.steps=100.")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[
        int | None, typer.Option(min=1, help="Processes to start, one a device. [default: 1, or torchrun's]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each process.")] = None,
    json_file: Json = None,
) -> None:
    """Train a model; killed at any moment, the same command resumes to the same result. Runs under torchrun as it is."""
    from nonexpansive.experiments import shipped
    from nonexpansive.experiments.training import train as fitted
    from nonexpansive.train import Run

    if json_file is not None:
        check_writable(json_file, suffixes=(".json",))
    if threads:
        torch.set_num_threads(threads)
    run = Run.from_toml(shipped(config), settings or ())
    best = fitted(run, data, output, accelerator=accelerator, devices=devices)
    out.print(f"best weights: {best}")
    if json_file is not None:
        header, _ = checkpoint.read(best)
        write_json(json_file, {"command": "train", "best": best, **vars(header)})


app.command(epilog=CODES)(experiment)


# ------------------------------------------------------------------------------------------------------------------- helpers


def _check_outputs(photo: Path, output: Path, figure: Path | None, json_file: Path | None) -> None:
    """Refuse, before any work, what could not be written at its end."""
    check_writable(output, inputs=(photo,))
    if figure is not None:
        check_writable(figure, inputs=(photo, output), suffixes=(".png", ".pdf", ".svg"))
    if json_file is not None:
        check_writable(json_file, inputs=(photo, output), suffixes=(".json",))


def _denoiser(name: str | None, picture: Photograph) -> Denoiser:
    channels = picture.tensor.shape[0]
    module = checkpoint.load(name or checkpoint.DEFAULTS["denoise" if channels == 3 else "denoise-grey"])
    if not isinstance(module, Denoiser):
        raise BadInput(f"{name} is a {type(module).__name__}, not a denoiser")
    if module.channels != channels:
        raise BadInput(
            f"{name} takes {module.channels} channel(s), but {picture.path} has {channels}: choose another --model"
        )
    return module


def _whole(denoiser: Denoiser, shape: tuple[int, ...], memory: float) -> bool:
    return Tiled(denoiser, memory * 1e6).whole(shape)


def _show_certificate(certificate: nonexpansive.Certificate, denoiser: Denoiser) -> None:
    """The tree without the denoiser's single flows, which are all alike."""
    lines = [line for line in str(certificate).splitlines() if "GradientFlow:" not in line]
    out.print("\n".join(lines), markup=False)
    out.print(f"  ({len(denoiser.lifted.inner)} gradient flows; `nonexpansive certify` prints them)", markup=False)  # type: ignore[arg-type]


def _ceil(alpha: float | None) -> str:
    return "unknown" if alpha is None else f"{-(-alpha * 1e4 // 1) / 1e4:.4f}"


def _compare(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
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
def _progress(total: int, what: str) -> Iterator[Callable[[int, str], None]]:
    columns = (
        BarColumn(),
        TextColumn("{task.completed} steps"),
        TimeElapsedColumn(),
        TextColumn(what + " {task.fields[value]}"),
    )
    with Progress(*columns, console=err, transient=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total, value="")
        yield lambda k, value: bar.update(task, completed=k, value=value)


def _finish(result: dict[str, Any], output: Path, figure: Path | None, json_file: Path | None, began: float) -> None:
    if json_file is not None:
        write_json(json_file, result)
    written = ", ".join(str(path) for path in (output, figure, json_file) if path is not None)
    out.print(f"wrote {written} ({time.perf_counter() - began:.1f} s in all)")


def main() -> None:
    """Run the command line; errors that a user can mend are one message and an exit code, never a traceback."""
    try:
        app(standalone_mode=True)
    except NonexpansiveError as error:
        err.print("[bold red]error:[/] ", end="")
        err.print(str(error), markup=False)
        sys.exit(next((code for kind, code in EXIT.items() if isinstance(error, kind)), FAILED))
    except OSError as error:
        err.print(f"error: {error}", markup=False)
        sys.exit(EXIT[BadInput])
    except KeyboardInterrupt:
        err.print("interrupted; nothing was written")
        sys.exit(130)


if __name__ == "__main__":
    main()
