"""The commands on what is proved: `certify` for every model, and for classifiers on images too; `attack`; `classify`."""

from __future__ import annotations

import atexit
import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import nonexpansive
from nonexpansive import checkpoint, sealed
from nonexpansive.app.images import read_image
from nonexpansive.app.output import check_writable, err, out, write_json
from nonexpansive.app.runs import MAX_SEED
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.math.certificate import certify
from nonexpansive.math.rounding import above, below
from nonexpansive.nn.classifier import Classifier
from nonexpansive.nn.descent import STEPS
from nonexpansive.robust import Curve, Found, certify_classifier, evaluate, nearest, require_sound, search
from nonexpansive.robust.attacks import ATTACKS, require_package
from nonexpansive.robust.curves import STANDARD
from nonexpansive.robust.evaluate import Evaluation, pixels
from nonexpansive.robust.radius import CertifiedClassifier

RADII = "nonexpansive radii 1"
"""The format of what is noted in between."""

NEAR = 32
"""Images at a time, near which margins are bounded."""


Model = Annotated[str, typer.Argument(help="A shipped model (see `nonexpansive models`) or a .safetensors file.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The folder of the data set, on whose test images a classifier is judged."),
]
Source = Annotated[
    str | None,
    typer.Option(
        help="The data set: cifar10, mnist, ..., an .npz or a folder in DIR.",
        show_default="what the model was trained on",
    ),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local-bounds",
        help="Bound the margins near each image besides: larger radii, at some hundreds of times the time.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=0, help="Steps of descent on each image's bound, with --local-bounds. 0: quick.", show_default=str(STEPS)
    ),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


def certify_model(
    model: Model,
    size: Annotated[
        str | None, typer.Option(help="Height x width of the input.", show_default="a classifier's own, else 512x512")
    ] = None,
    float32: Annotated[
        bool,
        typer.Option(
            "--float32", help="Certify the float32 program, rounding included. On images the default is float64."
        ),
    ] = False,
    data: Data = None,
    source: Source = None,
    local: Local = False,
    steps: Steps = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many test images; 0: all.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write report.md, curves.png and result.json there. A killed run with --local-bounds goes on from what it left there.",
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Print what is proved about a model, as a tree of rules; of a classifier with --data also its certified accuracy."""
    if json_file is not None:
        check_writable(json_file, suffixes=(".json",))
    near = _descent(local, steps)
    module = checkpoint.load(model)
    if data is None:
        if report is not None or source is not None or limit or local:
            raise BadInput("--report, --source, --limit and --local-bounds are about images: give --data DIR")
        shape = _shape(module, size)
        certificate = certify(module, shape, arithmetic=torch.float32 if float32 else None)
        out.print(str(certificate), markup=False)
        if json_file is not None:
            write_json(json_file, {"command": "certify", "model": model, **certificate.to_json()})
        return
    if size is not None:
        raise BadInput("--size is for denoisers; images have the size that the classifier takes")
    classifier = _classifier(module, model)
    images = _images(classifier, model, data, source, limit)
    made = _made(classifier, float32)
    statement = _statement(made, near)
    if not _rank():
        out.print(statement, markup=False)
    if report is not None:
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--report {report}: this folder cannot be made ({error.strerror})") from error
        for name in ("curves.png", "report.md", "result.json"):
            check_writable(report / name, suffixes=(".png", ".md", ".json"))
    evaluation = _evaluated(made, images, None)
    kinds = {"certified": Curve.of("certified", evaluation.certified)}
    if near is not None:
        closer = Curve.of("certified", _evaluated(made, images, near, report).certified)
        kinds = {"certified near each image": closer, "by the Lipschitz constant": kinds["certified"]}
    if _rank():
        return
    clean, certified = Curve.of("clean", evaluation.correct.double(), [0.0]), next(iter(kinds.values()))
    shown = [i for i, e in enumerate(certified.epsilons) if e in STANDARD]
    head = [
        "radii",
        "images",
        "clean",
        *(f"certified at {certified.epsilons[i] * 255:.0f}/255" for i in shown),
        "area to ε = 1",
    ]
    rows = [
        [kind, f"{len(images):,}", _percent(clean, 0), *(_percent(curve, i) for i in shown), f"{100 * curve.area:.1f}"]
        for kind, curve in kinds.items()
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
    out.print(table, markup=False)
    result = {
        "command": "certify", "model": model, "statement": statement, "arithmetic": made.arithmetic,
        "clean": clean.to_json(), "certified": certified.to_json(), "certificate": made.certificate.to_json(),
    }  # fmt: skip
    if local:
        result["by_lipschitz_constant"] = kinds["by the Lipschitz constant"].to_json()
    if report is not None:
        from nonexpansive.app.curves import accuracies

        accuracies(
            report / "curves.png",
            {model: kinds},
            f"L ≤ {above(made.lipschitz)}, {made.arithmetic} program",
        )
        with atomic(report / "report.md") as temporary:
            text = f"# {model}, certified\n\n{statement}. Accuracy in %, with 95 % intervals.\n\n{table}\n\n![curves](curves.png)\n"
            temporary.write_text(text, encoding="utf-8")
        write_json(report / "result.json", result)
    if json_file is not None:
        write_json(json_file, result)
    if report is not None and near is not None:
        for rank in range(_world()):
            _note(report, made, _share(images, rank), near)[0].unlink(missing_ok=True)


def attack(
    model: Model,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the data set, whose test images are attacked.")
    ],
    source: Source = None,
    which: Annotated[
        str, typer.Option("--attack", help="pgd: 5 restarts of 100 steps. auto: APGD-CE, APGD-T, FAB-T and Square.")
    ] = "pgd",
    epsilon: Annotated[
        list[str] | None,
        typer.Option(help="ℓ2 radius where white is 1: 0.14, 36/255; repeatable.", show_default="36/255"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The first so many test images.")] = 100,
    undecided: Annotated[
        bool,
        typer.Option(
            "--undecided",
            help="Attack only images of which the certificate leaves open whether they withstand: far fewer, so --limit can be larger.",
        ),
    ] = False,
    local: Local = False,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the random starts.")] = 0,
    json_file: Json = None,
) -> None:
    """Attack a classifier: its accuracy under the attack, from above, beside the certified one, from below.

    With --undecided images that are certain beyond the largest ε are not attacked, and withstand. Ends with exit code 5 if an attack
    succeeds within a certified radius, which would be a defect of the certificate.
    """
    if json_file is not None:
        check_writable(json_file, suffixes=(".json",))
    near = _descent(local, steps)
    if which not in ATTACKS:
        raise BadInput(f"--attack {which}: there are {', '.join(ATTACKS)}")
    if which != "pgd":
        require_package()
    given = [_radius(text) for text in epsilon or ()]
    classifier = _classifier(checkpoint.load(model), model).requires_grad_(False)
    images = _images(classifier, model, data, source, limit)
    epsilons = sorted({0.0, *(given or STANDARD[:1])})
    made = _made(classifier, False)
    evaluation = _evaluated(made, images, near)

    def attacked(own: Any, tick: Callable[[int], None]) -> Found:
        return search(classifier, pixels(own.images), own.labels, epsilons[1:], which, seed=seed + _rank(), watch=tick)

    chosen = evaluation.certified <= epsilons[-1] if undecided else torch.ones(len(images), dtype=torch.bool)
    found = Found(pixels(images.images), torch.full((len(images),), torch.inf, dtype=torch.float64))
    if bool(chosen.any()):
        for whole, part in zip(found, _shared("attacking", images[chosen], attacked), strict=True):
            whole[chosen] = part
    if _rank():
        return
    require_sound(made, evaluation, found)
    robust, certified = (
        Curve.of(name, values, epsilons)
        for name, values in (("robust", found.distance), ("certified", evaluation.certified))
    )
    attempted = int((chosen & evaluation.correct).sum())
    those = f"{len(images)} images, {which}" + (f" on the {attempted} left undecided" if undecided else "")
    out.print(f"{those}; no attack succeeded within a certified radius", markup=False)
    for i, e in enumerate(epsilons):
        text = f"ε = {e:.4f} ({e * 255:.4g}/255): certified {_percent(certified, i)} %, under attack {_percent(robust, i)} %"
        out.print(text, markup=False)
    if json_file is not None:
        value = {
            "command": "attack",
            "model": model,
            "attack": which,
            "attacked": attempted,
            "robust": robust.to_json(),
            "certified": certified.to_json(),
        }
        write_json(json_file, value)


def classify(
    photo: Annotated[
        Path,
        typer.Argument(help="A photograph: PNG, JPEG or TIFF. Its middle square is brought to the network's size."),
    ],
    model: Annotated[str, typer.Option(help="A shipped classifier or a .safetensors file.")] = checkpoint.DEFAULTS[
        "classify"
    ],
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Look for the nearest picture of another class and draw it beside (.png, .pdf, .svg)."
        ),
    ] = None,
    json_file: Json = None,
) -> None:
    """Say what a photograph shows, and how far from it (ℓ2, pixels in [0, 1], at the network's size) the answer is certain."""
    if json_file is not None:
        check_writable(json_file, inputs=(photo,), suffixes=(".json",))
    if figure is not None:
        check_writable(figure, inputs=(photo,), suffixes=(".png", ".pdf", ".svg"))
        require_package()
    began = time.perf_counter()
    picture = read_image(photo)
    classifier = _classifier(checkpoint.load(model), model).requires_grad_(False)
    x = fitted(picture.tensor, classifier.shape)[None]
    made = _made(classifier, False)
    local = made.only_global is None
    with err.status("certifying"):
        prediction, radius = made.radii(x, local=local)
    logits = made.logits(x)[0]
    first, second = logits.topk(2).values.tolist()
    name = classifier.classes[int(prediction)]
    size = "x".join(map(str, classifier.shape[1:]))
    if tuple(picture.tensor.shape[1:]) != classifier.shape[1:]:
        out.print(f"the middle of the photograph, brought to {size}, is what is classified", markup=False)
    certain = f"certain within {below(float(radius), 4)}"
    out.print(f"{name}: margin {first - second:.4f}, {certain} (ℓ2, pixels in [0, 1])", markup=False)
    result: dict[str, Any] = {
        "command": "classify", "photo": str(photo), "model": model, "class": name, "margin": first - second,
        "radius": float(radius), "logits": dict(zip(classifier.classes, logits.tolist(), strict=True)),
        "statement": _statement(made, STEPS if local else None),
    }  # fmt: skip
    if figure is not None:
        from nonexpansive.app.figures import adversary

        with err.status("looking for the nearest picture of another class"):
            found = nearest(classifier, x, prediction)
            require_sound(made, Evaluation(prediction, prediction, radius), found)
        if found.distance.isinf():
            raise BadInput("no picture of another class was found, so there is nothing to draw: leave --figure out")
        with torch.no_grad():
            other = classifier.classes[int(classifier(found.image).argmax())]
        distance = float(found.distance)
        at = f"{other}, at {above(distance, 4)}"
        out.print(f"nearest picture of another class that was found: {at}", markup=False)
        result |= {"adversary": other, "distance": distance}
        adversary(figure, x, found.image, f"{name}, {certain}", at)
    if json_file is not None:
        write_json(json_file, result)
    written = ", ".join(str(path) for path in (figure, json_file) if path is not None)
    out.print(f"wrote {written} ({time.perf_counter() - began:.1f} s)" if written else "", markup=False)


# ------------------------------------------------------------------------------------------------------------------- helpers


def fitted(picture: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A picture (C, H, W) with its middle of the wanted proportions, averaged down (or interpolated up) to ``shape``.

    A grey picture is given three equal channels where those are wanted; a coloured one for a grey network is refused."""
    channels, height, width = shape
    if picture.shape[0] != channels:
        if picture.shape[0] != 1:
            raise BadInput(
                f"this classifier takes {channels} channel(s), the photograph has {picture.shape[0]}: convert it first"
            )
        picture = picture.expand(channels, -1, -1)
    share = min(picture.shape[1] / height, picture.shape[2] / width)
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top, left = (picture.shape[1] - rows) // 2, (picture.shape[2] - columns) // 2
    middle = picture[None, :, top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return middle[0]
    return F.interpolate(middle, (height, width), mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _shape(module: nn.Module, size: str | None) -> tuple[int, ...]:
    """The shape of the input that is certified."""
    if isinstance(module, Classifier):
        if size is not None:
            raise BadInput(
                f"--size {size}: this classifier takes pictures of {module.shape[1]}x{module.shape[2]}, leave it out"
            )
        return module.shape
    try:
        height, width = (int(n) for n in (size or "512x512").lower().split("x"))
        if min(height, width) < 1:
            raise ValueError
    except ValueError:
        raise BadInput(f"--size {size}: give height x width in pixels, such as 512x512") from None
    return getattr(module, "channels", 3), height, width


def _radius(text: str) -> float:
    """A number, or a fraction, from 0."""
    value, slash, whole = text.partition("/")
    with suppress(ValueError, ZeroDivisionError):
        radius = float(value) / (float(whole) if slash else 1.0)
        if 0 <= radius < math.inf:
            return radius
    raise BadInput(f"--epsilon {text}: a finite number from 0 is expected, or a fraction, such as 36/255")


def _classifier(module: nn.Module, name: str) -> Classifier:
    if not isinstance(module, Classifier):
        raise BadInput(f"{name} is a {type(module).__name__}, not a classifier")
    return module


def _images(classifier: Classifier, name: str, data: Path, source: str | None, limit: int) -> Any:
    """The first ``limit`` test images (0: all), checked to be what the classifier takes."""
    from nonexpansive.train import load_images

    if source is None:
        header, _ = checkpoint.read(checkpoint.path_of(name))
        source = header.training.get("run", {}).get("data", {}).get("source")
        if source is None:
            raise BadInput(f"{name} does not say what it was trained on: give --source")
    images = load_images(source, "test", data)
    if images.shape != classifier.shape:
        raise BadInput(f"{source} has images of shape {images.shape}, this classifier takes {classifier.shape}")
    return images.among(classifier.classes)[: limit or len(images)]


def _descent(local: bool, steps: int | None) -> int | None:
    """How many steps of descent near each image; None: no bound there."""
    if steps is not None and not local:
        raise BadInput("--steps is about the bounds near images: give --local-bounds too")
    return (STEPS if steps is None else steps) if local else None


def _evaluated(made: CertifiedClassifier, images: Any, steps: int | None, kept: Path | None = None) -> Evaluation:
    """The images certified, with ``steps`` of descent near each (None: by the Lipschitz constant). In the folder ``kept`` each process
    notes what it has found near images after every batch, and begins with what is there of the same model, images and settings."""
    if steps is not None and made.only_global is not None:
        raise BadInput(f"--local-bounds: no bound near an image is known through {made.only_global}, leave it out")

    def certified(own: Any, tick: Callable[[int], None]) -> tuple[Tensor, ...]:
        if steps is None:
            evaluation = evaluate(made, own.images, own.labels, watch=tick)
            return evaluation.label, evaluation.prediction, evaluation.radius
        found = {"prediction": own.labels[:0], "radius": torch.zeros(0, dtype=torch.float64)}
        if kept is not None:
            path, asked = _note(kept, made, own, steps)
            found = _noted(path, asked) or found
            tick(len(found["radius"]))
        for first in range(len(found["radius"]), len(own), NEAR):
            x, y = own.images[first : first + NEAR], own.labels[first : first + NEAR]
            part = evaluate(made, x, y, local=True, steps=steps, watch=tick)
            found = {name: torch.cat([values, getattr(part, name)]) for name, values in found.items()}
            if kept is not None:
                sealed.write(path, RADII, found, {"asked": asked})
        return own.labels, found["prediction"], found["radius"]

    return Evaluation(*_shared("certifying", images, certified))


def _note(folder: Path, made: CertifiedClassifier, images: Any, steps: int) -> tuple[Path, str]:
    """The file of a process's notes, and a digest of all that decides what is found: the network, its certificate, the images."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in made.model.state_dict().items()}
    shown = {"images": images.images.contiguous(), "labels": images.labels.contiguous()}
    settings = f"{nonexpansive.__version__} {made.arithmetic} {steps} {made.model} {made.certificate}"
    asked = sealed.digest(tensors | shown, settings)
    return folder / f"radii-{asked[:16]}.safetensors", asked


def _noted(path: Path, asked: str) -> dict[str, Tensor] | None:
    """What the file holds of the images that are asked for; None where it is of others, damaged, or is not."""
    with suppress(BadInput):
        tensors, header = sealed.read(path, RADII)
        if header.get("asked") == asked:
            return tensors
    return None


def _statement(made: CertifiedClassifier, steps: int | None) -> str:
    near = (
        "" if steps is None else f"; or by a bound on the margins near the image, bettered by {steps} steps of descent"
    )
    return made.statement + near


def _rank() -> int:
    """Of this process among those that `torchrun` started."""
    return int(os.environ["RANK"]) if torch.distributed.is_torchelastic_launched() else 0


def _world() -> int:
    """How many processes `torchrun` started."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def _share(images: Any, rank: int) -> Any:
    """The images of one process."""
    return images[torch.arange(rank, len(images), _world())]


def _shared(
    what: str, images: Any, work: Callable[[Any, Callable[[int], None]], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """What ``work(images, tick)`` gives for each image, where there are several processes by each for its share."""
    world = _world()
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # they may be long at different attacks
        atexit.register(torch.distributed.destroy_process_group)
    if len(images) < world:
        raise BadInput(f"{len(images)} images for {world} processes: start fewer")
    own = _share(images, _rank())
    with _progress(what, len(own)) as tick:
        mine = tuple(values.cpu() for values in work(own, tick))
    parts: list[Any] = [mine]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, mine)
    order = torch.cat([torch.arange(rank, len(images), world) for rank in range(world)]).argsort()
    return tuple(torch.cat(values)[order] for values in zip(*parts, strict=True))


def _made(classifier: Classifier, float32: bool) -> CertifiedClassifier:
    """Ready to certify the float32 program, or, which costs next to no radius, the float64 one."""
    if float32:
        return certify_classifier(classifier, classifier.shape, arithmetic=torch.float32)
    return certify_classifier(copy.deepcopy(classifier).double(), classifier.shape, arithmetic=torch.float64)


def _percent(curve: Curve, i: int) -> str:
    low, high = curve.intervals[i]
    return f"{100 * curve.accuracy[i]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=not err.is_terminal, disable=_rank() > 0) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
