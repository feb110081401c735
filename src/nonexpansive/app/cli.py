"""The command line: it parses, calls, prints and shows; the mathematics is elsewhere.

Exit codes: 0 done; 2 wrong usage (unknown option, missing argument); 3 an input or an output that cannot be used; 4 no certificate, so
nothing was run; 5 a run failed (it contradicted its certificate, or a training became unstable); 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import nonexpansive
from nonexpansive import checkpoint
from nonexpansive.allocator import keep_memory
from nonexpansive.app import MISSING, lacking
from nonexpansive.app.experiments import experiment
from nonexpansive.app.folder import one_by_one
from nonexpansive.app.images import read_image, write_like
from nonexpansive.app.output import check_writable, err, out, write_json
from nonexpansive.app.restore import restore
from nonexpansive.app.robust import attack, certify_model, classify
from nonexpansive.app.runs import (
    Accelerated,
    Figure,
    Iterations,
    Json,
    Memory,
    Model,
    Seed,
    Tolerance,
    Uncertified,
    accelerated,
    captions,
    check_outputs,
    compare,
    finish,
    iterate,
    mark,
    promise,
    show_certificate,
    show_plan,
    the_denoiser,
    whole,
)
from nonexpansive.errors import BadInput, Interrupted, NonexpansiveError, Refused
from nonexpansive.math.certificate import certify
from nonexpansive.restore import blur, degrade, plan
from nonexpansive.restore.physics import KERNEL_FORMS, image_shape, kernel, noise_level
from nonexpansive.restore.tiles import Tiled

DEBLURRING = ("half-quadratic", "forward-backward")
EXIT = {BadInput: 3, Refused: 4, Interrupted: 130}
FAILED = 5
BUFFERS = ("control.vector", "estimate.vector", "mean")
"""What models hold beside their parameters."""
CODES = (
    "Exit codes: 0 done, 2 wrong usage, 3 an input or output that cannot be used, 4 no certificate so nothing was run, "
    "5 a run failed, 130 interrupted."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=f"Image restoration and classification by neural networks that are provably stable.\n\n{CODES}",
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"nonexpansive {nonexpansive.__version__}, torch {torch.__version__}", markup=False)
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


Photo = Annotated[Path, typer.Argument(help="A photograph: PNG, JPEG or TIFF, grey or colour, 8 or 16 bit.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the restored picture goes: .png, .jpg or .tiff.")]


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
            help="circular: the picture continues periodically; valid: its surroundings are unknown.",
            show_default="circular with --degrade, else valid",
        ),
    ] = None,
    model: Model = None,
    method: Annotated[str | None, typer.Option(help=f"{' or '.join(DEBLURRING)}.", show_default="by boundary")] = None,
    level: Annotated[str | None, typer.Option(help="The denoiser's noise level, in place of the rule's.")] = None,
    tau: Annotated[float | None, typer.Option(help="The data step τ, in place of the rule's.")] = None,
    acceleration: Accelerated = "auto",
    tolerance: Tolerance = 3e-4,
    iterations: Iterations = 300,
    uncertified: Uncertified = False,
    seed: Seed = 0,
    memory: Memory = 500.0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Deblur a photograph by an iteration whose convergence is proved before it runs.

    Prints the certificate, iterates with the residual in view, and writes the picture. With --degrade the PHOTO is a clean
    one, which is blurred and disturbed first, so that PSNR and SSIM can be measured.
    """
    began = time.perf_counter()
    check_outputs((photo, Path(blur_kernel)), output, figure, json_file)
    if method not in (None, *DEBLURRING):
        raise BadInput(
            f"deblur has no method {method!r}: there are {' and '.join(DEBLURRING)}; `restore -p blur` has the others"
        )
    accelerate = accelerated(acceleration)
    level_of_noise = noise_level(noise)
    sigma = None if level is None else noise_level(level)
    k = kernel(blur_kernel)
    picture = read_image(photo)
    boundary = boundary or ("circular" if degraded else "valid")
    denoiser = the_denoiser(model, picture.tensor.shape[0], str(picture.path), tolerance)
    x = picture.tensor[None]
    shape = tuple(picture.tensor.shape)
    if degraded:
        clean = x
        blurring = blur(k, shape, boundary)  # type: ignore[arg-type]
        y = degrade(x, blurring, level_of_noise, seed)
    else:
        clean, y = None, x
        blurring = blur(k, image_shape(shape, k, boundary), boundary)  # type: ignore[arg-type]
    chosen: dict[str, Any] = {"method": method, "sigma": sigma, "tau": tau, "uncertified": uncertified}
    prepared = plan(y, blurring, denoiser, level_of_noise, memory=memory * 1e6, **chosen)
    show_plan(prepared, denoiser)
    report = iterate(prepared, tolerance, iterations, accelerate)
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
        "refusal": prepared.refusal,
        "tiled": not whole(denoiser, blurring.image_shape, memory),
        **report.to_json(),
    }
    write_like(output, restored[0], picture)
    mark(prepared, output)
    if clean is not None:
        shown = blurring.crop(clean), y, blurring.crop(restored)
        result["quality"] = compare({"blurred": (shown[1], shown[0]), "restored": (shown[2], shown[0])})
    else:
        shown = (None, y, restored)
    if figure is not None:
        from nonexpansive.app.figures import restoration

        restoration(
            figure,
            clean=shown[0],
            degraded=shown[1],
            restored=shown[2],
            residuals=report.residuals,
            tolerance=tolerance,
            quality=result.get("quality"),
            **captions(prepared),
        )
    finish(result, output, figure, json_file, began)


@app.command(epilog=CODES)
def denoise(
    photo: Annotated[
        Path,
        typer.Argument(help="A photograph: PNG, JPEG or TIFF, grey or colour, 8 or 16 bit; or a folder of such files."),
    ],
    noise: Annotated[
        str, typer.Option("--noise", "-s", metavar="S", help="Standard deviation of the noise: 10%, 0.1 or 25/255.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where the denoised picture goes: .png, .jpg or .tiff; for a folder, a folder."
        ),
    ],
    degraded: Annotated[
        bool, typer.Option("--degrade/--restore", help="Add the noise to a clean PHOTO first; or denoise a noisy one.")
    ] = False,
    model: Model = None,
    seed: Seed = 0,
    memory: Memory = 500.0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Denoise a photograph, or each of a folder, with a certified denoiser."""
    began = time.perf_counter()
    sigma = noise_level(noise)

    def work(path: Path, target: Path, name: str = "") -> dict[str, Any]:
        return _denoised(path, target, sigma, seed if degraded else None, model, memory, figure, name)

    if not photo.exists():
        raise BadInput(f"there is no file or folder {str(photo)!r}")
    if photo.is_dir():
        one_by_one("denoise", "denoised", photo, output, work, figure=figure, json_file=json_file)
        return
    check_outputs((photo,), output, figure, json_file)
    finish({"command": "denoise", **work(photo, output)}, output, figure, json_file, began)


def _denoised(
    photo: Path,
    output: Path,
    sigma: float,
    seed: int | None,
    model: str | None,
    memory: float,
    figure: Path | None,
    name: str,
) -> dict[str, Any]:
    """Denoise one photograph, with a ``seed`` a clean one to which the noise is added first, and give the result as plain values."""
    picture = read_image(photo)
    denoiser = the_denoiser(model, picture.tensor.shape[0], str(picture.path))
    tiled = Tiled(denoiser, memory * 1e6)
    shape = tuple(picture.tensor.shape)
    certificate = certify(tiled, shape)
    if name:
        out.print(f"{name}: {promise(certificate.averaged, certificate.lipschitz)}", markup=False)
    else:
        show_certificate(certificate, denoiser)
    clean = picture.tensor[None]
    y = (
        clean
        if seed is None
        else clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    )
    with torch.no_grad(), err.status("denoising"):
        restored = tiled(y, sigma).clamp_(0, 1)
    write_like(output, restored[0], picture)
    result: dict[str, Any] = {
        "photo": str(photo),
        "output": str(output),
        "noise": sigma,
        "tiled": not tiled.whole(shape),
        "certificate": certificate.to_json(),
    }
    if seed is not None:
        result["quality"] = compare({"noisy": (y, clean), "restored": (restored, clean)})
    if figure is not None:
        from nonexpansive.app.figures import restoration

        restoration(
            figure,
            clean=None if seed is None else clean,
            degraded=y,
            restored=restored,
            quality=result.get("quality"),
        )
    return result


app.command("certify", epilog=CODES)(certify_model)
app.command(epilog=CODES)(restore)
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
        weights = sum(t.numel() for key, t in tensors.items() if not key.endswith(BUFFERS))
        mark = f"  (default of {', '.join(tasks)})" if tasks else ""
        proved = promise(header.claimed["averaged"], header.claimed["lipschitz"])
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
        int | None, typer.Option(min=1, help="Processes to start, one a device.", show_default="1, or torchrun's")
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
    out.print(f"best weights: {best}", markup=False)
    if json_file is not None:
        header, _ = checkpoint.read(best)
        write_json(json_file, {"command": "train", "best": best, **vars(header)})


app.command(epilog=CODES)(experiment)


def main() -> None:
    """Run the command line; errors that a user can mend are one message and an exit code, never a traceback."""
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # where the terminal does not know ≤ or α
    try:
        app(standalone_mode=True)
    except NonexpansiveError as error:
        err.print("[bold red]error:[/] ", end="")
        err.print(str(error), markup=False)
        sys.exit(next((code for kind, code in EXIT.items() if isinstance(error, kind)), FAILED))
    except OSError as error:
        err.print(f"error: {error}", markup=False)
        sys.exit(EXIT[BadInput])
    except ModuleNotFoundError as error:
        err.print(lacking(error), markup=False)
        sys.exit(MISSING)
    except SystemExit as end:  # typer's, which says nothing of an interruption
        if end.code == EXIT[Interrupted]:
            err.print("interrupted: what was not finished was not written")
        raise


if __name__ == "__main__":
    main()
