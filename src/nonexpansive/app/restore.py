"""The command `restore`: any forward model, any splitting, from a picture or a measurement; one file or a folder of them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
import torch
import typer
from torch import Tensor

from nonexpansive.app.folder import one_by_one
from nonexpansive.app.images import Photograph, read_image, write_like
from nonexpansive.app.output import IMAGE_SUFFIXES, out
from nonexpansive.app.runs import (
    MAX_SEED,
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
    show_plan,
    the_denoiser,
    whole,
)
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.restore.iterate import Acceleration
from nonexpansive.restore.likelihood import Gaussian, Likelihood, Poisson
from nonexpansive.restore.methods import METHODS
from nonexpansive.restore.operators import MODELS, forward_model, settings
from nonexpansive.restore.physics import Blurring, degrade, image_shape, kernel, noise_level
from nonexpansive.restore.restoration import Plan, plan
from nonexpansive.restore.steps import DataTerm

ARRAYS = (".npy", ".pt")
MAX_BYTES = 4 * 2**30
SEEN = ("blur", "downsample", "inpaint")
"""Forward models whose data are pictures."""

ROUNDED = 1e-2
"""So far outside [0, 1] values of a clean picture are taken for rounded, and brought back."""

GLARING = 10.0
"""No picture that was measured exceeds white so far."""

LOUDEST = 1e6
"""No noise is louder, where data have a unit of their own."""

WHITE = {torch.uint8: 255, torch.uint16: 65535}


@dataclass(frozen=True)
class Job:
    """One input, its output, and the settings that all inputs share."""

    source: Path
    output: Path
    physics: str
    settings: dict[str, Any]
    size: tuple[int, ...] | None
    degraded: bool
    likelihood: Likelihood
    model: str | None
    chosen: dict[str, Any]
    """Arguments of :func:`plan`."""
    acceleration: Acceleration | Literal["auto"] | None
    tolerance: float
    iterations: int
    seed: int
    memory: float


def restore(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A picture (PNG, JPEG, TIFF), an array or tensor of data (.npy, .pt), or a folder of such files.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The restored picture: .png, .jpg, .tiff or .npy; for a folder, a folder."),
    ],
    physics: Annotated[str, typer.Option("--physics", "-p", metavar="NAME", help=f"One of {', '.join(MODELS)}.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the forward model, such as kernel=motion:15,30."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW", help="Of the unknown picture, where the data do not tell (CxHxW: channels as well)."
        ),
    ] = None,
    degraded: Annotated[
        bool,
        typer.Option(
            "--degrade/--restore", help="INPUT is a clean picture: measure it first; or INPUT is the measurement."
        ),
    ] = False,
    noise: Annotated[
        str, typer.Option("--noise", "-s", metavar="S", help="Standard deviation of the Gaussian noise: 1%, 0.01.")
    ] = "0",
    poisson: Annotated[
        float | None, typer.Option(metavar="GAIN", help="Photon noise of so many grey values a photon, beside --noise.")
    ] = None,
    background: Annotated[
        float, typer.Option(metavar="B", help="With --poisson: the grey value that the data hold beside the picture's.")
    ] = 0.0,
    model: Model = None,
    method: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(METHODS)}.", show_default="by forward model and noise")
    ] = None,
    level: Annotated[str | None, typer.Option(help="The denoiser's noise level, in place of the rule's.")] = None,
    strength: Annotated[
        float, typer.Option(metavar="T", help="(1-T)I + T·D in place of the denoiser D; below 1 weakens it.")
    ] = 1.0,
    scaling: Annotated[
        float, typer.Option(metavar="MU", help="D(MU·x)/MU in place of D(x), for denoisers without a level.")
    ] = 1.0,
    relax: Annotated[
        bool | None,
        typer.Option(
            "--relax/--no-relax",
            help="Weaken the denoiser to α ≤ 1/2, where the method needs it.",
            show_default="if the method is left open",
        ),
    ] = None,
    tau: Annotated[float | None, typer.Option(help="The data step τ, in place of the rule's.")] = None,
    relaxation: Annotated[
        float | None, typer.Option(metavar="LAMBDA", help="Krasnosel'skii-Mann: (1-λ)x + λT(x), λ below 1/α.")
    ] = None,
    anchored: Annotated[
        bool, typer.Option("--anchored", help="Halpern's iteration, for which non-expansive suffices.")
    ] = False,
    box: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Keep grey values within; `none`.", show_default="by method")
    ] = None,
    acceleration: Accelerated = "auto",
    iterations: Iterations = 300,
    tolerance: Tolerance = 3e-4,
    uncertified: Uncertified = False,
    seed: Seed = 0,
    memory: Memory = 500.0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Restore a picture from blurred, incomplete or indirect data by an iteration whose convergence is proved before it runs.

    Prints the certificate, iterates with the residual in view, and writes the picture. With --degrade the INPUT is a clean picture, which
    is measured first, so that PSNR and SSIM can be told. A folder is restored file by file.
    """
    began = time.perf_counter()
    nu = noise_level(noise, 1.0 if physics in SEEN else LOUDEST)
    if background and poisson is None:
        raise BadInput("--background belongs to photon noise: give --poisson GAIN as well")
    likelihood: Likelihood = Gaussian(nu) if poisson is None else Poisson(poisson, background, nu)
    chosen = {
        "method": method,
        "sigma": None if level is None else noise_level(level),
        "tau": tau,
        "strength": strength,
        "scaling": scaling,
        "relax": relax,
        "relaxation": relaxation,
        "anchored": anchored,
        "box": _box(box),
        "uncertified": uncertified,
    }
    if method is not None and method not in METHODS:
        raise BadInput(f"no method {method!r}: there are {', '.join(METHODS)}")
    accelerate = accelerated(acceleration)
    given = _settings(physics, set_ or [])
    if physics == "blur" and not degraded:
        given = {"boundary": "valid", **given}  # no picture that was taken continues periodically
    common = (physics, given, _size(size), degraded, likelihood, model, chosen, accelerate)
    rest = (tolerance, iterations, seed, memory)
    if not source.exists():
        raise BadInput(f"there is no file or folder {str(source)!r}")
    if source.is_dir():

        def work(path: Path, target: Path, name: str) -> dict[str, Any]:
            return _one(Job(path, target, *common, *rest), name=name)

        outputs = {"figure": figure, "json_file": json_file}
        read = _inputs(source, given)[1:]
        one_by_one("restore", "restored", source, output, work, arrays=ARRAYS, read=read, **outputs)
        return
    check_outputs(_inputs(source, given), output, figure, json_file, (*IMAGE_SUFFIXES, ".npy"))
    result = _one(Job(source, output, *common, *rest), figure=figure)
    finish({"command": "restore", **result}, output, figure, json_file, began)


# --------------------------------------------------------------------------------------------------------------------- one file


def _one(job: Job, *, figure: Path | None = None, name: str = "") -> dict[str, Any]:
    """Restore one input, write its picture and figure, and give the result as plain values."""
    known = settings(job.physics)
    if job.degraded and job.size is not None:
        raise BadInput(
            "--size is of a picture that is not known; with --degrade it has the size of INPUT: leave it out"
        )
    if not job.degraded and {"mask", "seed"} <= set(known) and not {"mask", "seed"} & set(job.settings):
        raise BadInput(
            f"which data of {job.physics} were measured? Give their mask, --set mask=FILE, "
            "or the seed that it was drawn from, --set seed=..."
        )
    given, picture = _read(job.source, job.degraded or job.physics in SEEN)
    if job.degraded and not bool(((given >= -ROUNDED) & (given <= 1 + ROUNDED)).all()):
        raise BadInput(
            f"{job.source} is to be a clean picture, of values in [0, 1]; these lie in [{float(given.min()):g}, {float(given.max()):g}]: "
            "subtract the black level and divide by the white level"
        )
    if job.physics in SEEN and float(given.abs().max()) > GLARING:
        raise BadInput(
            f"{job.source} holds values up to {float(given.abs().max()):g}, but white is 1: divide by the white level"
        )
    given = given.clamp(0, 1) if job.degraded else given
    clean = given[None] if job.degraded else None
    shape = tuple(given.shape) if job.degraded else _unknown(job, tuple(given.shape))
    data = forward_model(job.physics, shape, **job.settings)
    if clean is None and tuple(given.shape) != tuple(data.data_shape):
        raise BadInput(
            f"{job.source} holds data of shape {tuple(given.shape)}, but {job.physics} of a picture {shape} gives "
            f"{tuple(data.data_shape)}: state the picture's --size, or other settings"
        )
    y = given[None] if clean is None else degrade(clean, data, job.likelihood, job.seed)
    denoiser = the_denoiser(
        job.model, shape[0], str(job.source) if job.degraded else "the unknown picture", job.tolerance
    )
    prepared = plan(y, data, denoiser, job.likelihood, memory=job.memory * 1e6, **job.chosen)
    if not name:
        show_plan(prepared, denoiser)
    report = iterate(prepared, job.tolerance, job.iterations, job.acceleration, name)
    if not name:
        _show_rates(report.proved, report.movements, report.error)
    unclipped, start = _seen(data, report.image), _seen(data, prepared.start)
    restored = unclipped.clamp(0, 1)
    _write(job.output, unclipped if job.output.suffix.lower() == ".npy" else restored, picture)
    result = {
        "input": str(job.source),
        "output": str(job.output),
        "physics": {"name": job.physics, "image": shape, "data": data.data_shape, "norm": data.norm, **job.settings},
        "noise": {"kind": type(job.likelihood).__name__, **vars(job.likelihood)},
        "method": prepared.method,
        "level": prepared.sigma,
        "tau": prepared.tau,
        "strength": job.chosen["strength"],
        "averaged": prepared.averaged,
        "refusal": prepared.refusal,
        "tiled": not whole(denoiser, shape, job.memory),
        **report.to_json(),
    }
    mark(prepared, job.output)
    if clean is not None:
        truth = _seen(data, clean)
        result["quality"] = compare({"start": (start, truth), "restored": (restored, truth)})
    if figure is not None:
        _draw(figure, job, prepared, clean, start, restored, result)
    return result


def _draw(
    path: Path, job: Job, prepared: Plan, clean: Tensor | None, start: Tensor, restored: Tensor, result: dict[str, Any]
) -> None:
    from nonexpansive.app.figures import restoration

    restoration(
        path,
        clean=None if clean is None else _seen(prepared.data, clean),
        degraded=start,
        restored=restored,
        residuals=result["residuals"],
        tolerance=job.tolerance,
        quality=result.get("quality"),
        **captions(prepared, job.chosen["anchored"]),
    )


def _show_rates(proved: list[float] | None, movements: list[float], error: float | None) -> None:
    """What was known beforehand of the last step, and afterwards of the distance to the fixed point."""
    if proved is not None:
        out.print(
            f"‖T(x) - x‖ at the last step: {movements[-1]:.3g}; proved beforehand for any fixed point in the box: ≤ {proved[-1]:.3g}"
        )
    if error is not None:
        out.print(f"distance to the fixed point ≤ {error:.3g} (the iteration is a contraction)")


def _seen(data: DataTerm, x: Tensor) -> Tensor:
    """The part of a picture that the data show: all, but for a blur whose surroundings are unknown."""
    return data.crop(x) if isinstance(data, Blurring) else x


def _unknown(job: Job, data_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of the picture behind data of that shape."""
    channels = 1 if job.physics == "mri" else data_shape[0]
    if job.size is not None:
        full = job.size if len(job.size) == 3 else (channels, *job.size)
        return full[0], full[1], full[2]
    if len(data_shape) != 3:
        raise BadInput(f"data of shape {data_shape} do not tell the picture's size: give --size")
    _, rows, columns = data_shape
    boundary = job.settings.get("boundary", "circular")
    if job.physics == "blur" and boundary == "valid" and "kernel" in job.settings:
        return image_shape((channels, rows, columns), kernel(job.settings["kernel"]), "valid")
    if job.physics == "downsample" and boundary != "valid":
        factor = job.settings.get("factor", settings("downsample")["factor"].default)
        return channels, rows * factor, columns * factor
    if job.physics in ("blur", "inpaint", "mri"):
        return channels, rows, columns
    if job.physics == "tomography" and job.settings.get("circle"):
        return channels, rows, rows
    raise BadInput(f"the data of {job.physics} do not tell the picture's size: give --size HxW")


# ---------------------------------------------------------------------------------------------------------------------- in and out


def _read(path: Path, seen: bool) -> tuple[Tensor, Photograph | None]:
    """A picture or data without the batch axis, float32: from a picture file, or an .npy or .pt file, of which no code is ever run.
    Whole numbers are grey values of 8 or 16 bits, where ``seen`` tells that the data are a picture's."""
    suffix = path.suffix.lower()
    if suffix not in ARRAYS:
        picture = read_image(path)
        return picture.tensor, picture
    if not path.is_file():
        raise BadInput(f"there is no file {str(path)!r}")
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{str(path)!r} is above {MAX_BYTES / 2**30:g} GiB: cut it")
    try:
        if suffix == ".npy":
            loaded: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a decoder says of a bad file
        raise BadInput(
            f"{str(path)!r} cannot be read as {'an array' if suffix == '.npy' else 'a tensor'} without running code: {error}"
        ) from error
    if not isinstance(loaded, Tensor):
        raise BadInput(f"{str(path)!r} holds a {type(loaded).__name__}, not one tensor: save the tensor alone")
    if loaded.layout is not torch.strided or loaded.is_quantized or loaded.is_meta:
        raise BadInput(
            f"{str(path)!r} holds a sparse, quantized or empty tensor: save a plain one (.to_dense(), .dequantize())"
        )
    loaded = loaded.detach()
    if loaded.is_complex():
        raise BadInput(f"{str(path)!r} holds complex numbers: save the real and the imaginary part as two channels")
    if not loaded.is_floating_point():
        if not seen or loaded.dtype not in WHITE:
            raise BadInput(f"{str(path)!r} holds {loaded.dtype}, of no known unit: save floats, such that white is 1")
        loaded = loaded.float() / WHITE[loaded.dtype]
    x = loaded.float()
    x = x[0] if x.ndim == 4 and len(x) == 1 else x[None] if x.ndim == 2 else x
    if x.ndim != 3 or not x.numel():
        raise BadInput(f"{str(path)!r} has shape {tuple(loaded.shape)}: (H, W), (C, H, W) or (1, C, H, W) is expected")
    if not bool(torch.isfinite(x).all()):
        raise BadInput(f"{str(path)!r} holds NaN or infinity: repair those values")
    return x.contiguous(), None


def _write(path: Path, image: Tensor, picture: Photograph | None) -> None:
    if path.suffix.lower() == ".npy":
        with atomic(path) as temporary:
            np.save(temporary, image[0].cpu().numpy(), allow_pickle=False)
        return
    write_like(path, image[0], picture)


def _inputs(source: Path, given: dict[str, Any]) -> list[Path]:
    """The files that are read: none of them may be written."""
    return [source, *(Path(given[key]) for key in ("kernel", "mask") if isinstance(given.get(key), str))]


def _settings(name: str, given: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs as settings of the forward model, each of the type that the model states for it."""
    known, found = settings(name), dict[str, Any]()
    hints = get_type_hints(MODELS[name])
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals or key not in known or key == "dtype":
            shown = ", ".join(key for key in known if key != "dtype")
            raise BadInput(f"--set {pair}: a setting of {name} is expected as KEY=VALUE; there are {shown}")
        found[key] = _value(pair, text, set(get_args(hints[key])) or {hints[key]})
    if "seed" in found and not 0 <= found["seed"] <= MAX_SEED:
        raise BadInput(f"--set seed={found['seed']}: a seed is a whole number from 0 to {MAX_SEED}")
    return found


def _value(pair: str, text: str, kinds: set[type]) -> bool | float | str:
    if str in kinds:
        return text
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise BadInput(f"--set {pair}: true or false is expected")
        return text.lower() == "true"
    try:
        value = float(text) if float in kinds else int(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(f"--set {pair}: {'a number' if float in kinds else 'a whole number'} is expected")
    return value


def _size(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
        raise BadInput(f"size {text!r}: HxW or CxHxW is expected, such as 256x256")
    return tuple(int(part) for part in parts)


def _box(text: str | None) -> bool | tuple[float, float] | None:
    if text is None:
        return None
    if text == "none":
        return False
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise BadInput(f"box {text!r}: two numbers LOW,HIGH are expected, such as 0,1, or none") from error
    return low, high
