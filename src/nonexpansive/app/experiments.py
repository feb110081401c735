"""`nonexpansive experiment`: train what an experiment names, judge it, and write report.md, result.json and figures."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nonexpansive.app.curves import accuracies, growth, iterations, repetitions
from nonexpansive.app.figures import gallery
from nonexpansive.app.output import err, out, write_json
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.experiments import listed, shipped
from nonexpansive.math.certificate import certify

if TYPE_CHECKING:
    from nonexpansive.experiments.comparison import Comparison, Outcome
    from nonexpansive.experiments.denoising import Denoised, Denoising, Photographs, Watch
    from nonexpansive.experiments.depth import Trained
    from nonexpansive.experiments.plug_and_play import PlugAndPlay, Restored
    from nonexpansive.robust import Curve

Report = tuple[str, dict[str, Any], list[str]]
"""The text of a report, the same as plain values, and the names of its figures."""


ATTACK = {
    "pgd": ("PGD", "5 restarts of 100 steps, on the cross-entropy and on the margin in turn"),
    "auto": ("AutoAttack", "APGD-CE, APGD-T, FAB-T and Square"),
}
"""What an attack is called, and what it does."""


def experiment(
    name: Annotated[
        str,
        typer.Argument(
            help="digits, cifar10, fashion-mnist, fashion-mnist-full, depth, bsds500, plug-and-play, or a TOML file of your own."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Weights and the report go here; an experiment resumes from here."
        ),
    ],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of the data set (the digits need none).")
    ] = Path("."),
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of every training, such as train.steps=100, or of the experiment, such as minutes=2.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="Only this network or method of the experiment; may be repeated."),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="At most so many test images or photographs (depth: blocks); 0: all."),
    ] = 0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Train the networks of an experiment, certify, measure and compare them: report.md, result.json and figures.

    Killed at any moment, the same command resumes: trainings from their checkpoints, and what was measured is not measured again.
    """
    began = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    if torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise BadInput(
            "an experiment measures in one process. Its networks may be trained by several first, and are taken up from there: "
            "`torchrun ... -m nonexpansive.app.cli train CONFIG --data DATA -o DIR/NAME --set ...`, with the config, the settings and "
            "the name of a run, a - for each space in that"
        )
    if name == "depth" and only:
        raise BadInput("--only chooses among the networks of a comparison; those of depth are bounded by --limit")
    kind = "depth" if name == "depth" else _kind(_path(name))
    ask = {"name": name, "data": data, "out": output, "settings": settings or [], "only": only or []}
    text, result, figures = KINDS[kind](**ask, limit=limit, accelerator=accelerator)
    options = [("--data", str(data))] if data != Path(".") else []
    options += [("--set", s) for s in settings or ()] + [("--only", o) for o in only or ()]
    options += [("--limit", str(limit))] if limit else []
    command = shlex.join(
        ["nonexpansive", "experiment", name, "-o", str(output), *(word for option in options for word in option)]
    )
    about = {"experiment": name, "command": command, "torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(output / "result.json", about | result)
    pictures = "\n\n".join(f"![{Path(figure).stem}]({figure})" for figure in figures)
    with atomic(output / "report.md") as temporary:
        temporary.write_text(f"{text}\n`{command}`\n\n{pictures}\n", encoding="utf-8")
    out.print(text, markup=False)
    seconds = time.perf_counter() - began
    out.print(f"wrote report.md, {', '.join(figures)} and result.json in {output} ({seconds:.0f} s)", markup=False)


def _path(name: str) -> Path:
    try:
        return shipped(name, "comparisons")
    except BadInput as error:
        names = ", ".join(sorted([*listed("comparisons"), "depth"]))
        raise BadInput(f"{name}: no such file, and no experiment is called so (there are {names})") from error


def _kind(path: Path) -> str:
    """What a file describes. Raises BadInput for a kind that there is not."""
    from nonexpansive.train.config import load_toml, unknown

    kind = load_toml(path).get("kind", "classification")
    accepted = sorted(set(KINDS) - {"depth"})  # which has no settings of its own
    if kind not in accepted:
        raise BadInput(f"{path}: {unknown('kind of experiment', str(kind), accepted)}")
    return kind


def _divided(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings of the experiment itself, and those of its trainings, which have a table before a dot."""
    own = [s for s in settings if "." not in s.partition("=")[0]]
    return own, [s for s in settings if s not in own]


@contextmanager
def _bar() -> Iterator[Watch]:
    """Shows what is being measured on stderr, where that is a terminal; elsewhere a line for each thing that begins."""
    bar: Progress | None = None
    shown = ""

    def watch(text: str, done: int, total: int) -> None:
        nonlocal bar, shown
        if text != shown and not err.is_terminal:
            err.print(text, markup=False)
        if bar and text != shown:
            bar.stop()
            bar = None
        shown = text
        if err.is_terminal and bar is None and done < total:
            text_column = TextColumn("{task.description}", markup=False)
            begun = Progress(text_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err)
            begun.start()
            begun.add_task(text, total=total)
            bar = begun
        if bar:
            bar.update(bar.task_ids[0], completed=done, refresh=done == total)
            if done == total:  # a training, which has a bar of its own, may follow
                bar.stop()
                bar = None

    try:
        yield watch
    finally:
        if bar:
            bar.stop()


# -------------------------------------------------------------------------------------------------------------------- kinds


def _run_depth(
    name: str, data: Path, out: Path, settings: list[str], only: list[str], limit: int, accelerator: str
) -> Report:
    from nonexpansive.experiments import depth

    depths = [n for n in depth.DEPTHS if n <= (limit or depth.DEPTHS[-1])]
    return _depth(depth.experiment(data, out, depths, settings, accelerator=accelerator), out)


def _run_comparison(
    name: str, data: Path, out: Path, settings: list[str], only: list[str], limit: int, accelerator: str
) -> Report:
    from nonexpansive.experiments.comparison import Comparison, compare

    own, overrides = _divided(settings)
    known = Comparison.from_toml(_path(name), own)
    chosen: dict[str, Any] = {"overrides": overrides, "only": only, "limit": limit, "accelerator": accelerator}
    with _bar() as watch:
        return _comparison(known, compare(known, data, out, watch=watch, **chosen), out)


def _run_denoising(
    name: str, data: Path, out: Path, settings: list[str], only: list[str], limit: int, accelerator: str
) -> Report:
    from nonexpansive.experiments.denoising import Denoising, Photographs, compare

    own, overrides = _divided(settings)
    known = Denoising.from_toml(_path(name), own)
    chosen: dict[str, Any] = {"overrides": overrides, "only": only, "limit": limit, "accelerator": accelerator}
    with _bar() as watch:
        results = compare(known, data, out, watch=watch, **chosen)
        channels = known.settings(known.runs[0], overrides).data.channels
        return _denoising(known, results, lambda: Photographs(known, data, channels, limit), out)


def _run_plug_and_play(
    name: str, data: Path, out: Path, settings: list[str], only: list[str], limit: int, accelerator: str
) -> Report:
    from nonexpansive.experiments.plug_and_play import PlugAndPlay, follow

    known = PlugAndPlay.from_toml(_path(name), settings)
    with _bar() as watch:
        return _plug_and_play(known, follow(known, data, out, only=only, limit=limit, watch=watch), out)


KINDS: Mapping[str, Callable[..., Report]] = {
    "classification": _run_comparison,
    "denoising": _run_denoising,
    "depth": _run_depth,
    "plug-and-play": _run_plug_and_play,
}
"""The kinds of experiment, a file's ``kind``, and what runs one."""


# ------------------------------------------------------------------------------------------------------------------ reports


def _comparison(comparison: Comparison, results: Iterable[Outcome], folder: Path) -> Report:
    outcomes = []
    for outcome in results:
        out.print(f"{outcome.name}: clean {_percent(outcome.clean)}", markup=False)
        outcomes.append(outcome)
    attack, by = ATTACK[comparison.attack]
    accuracies(
        folder / "curves.png",
        {o.name: {"certified": o.certified, attack: o.robust} for o in outcomes},
        comparison.title,
    )
    epsilons = comparison.epsilons
    head = [
        "network",
        "parameters",
        "L of the features ≤",
        "clean (95 % interval)",
        "area, certified",
        f"area, {attack}",
    ]
    summary = [
        [o.name, f"{o.parameters:,}", f"{o.lipschitz:.4g}", _percent(o.clean), *(f"{100 * c.area:.1f}" for c in (o.certified, o.robust))]
        for o in outcomes
    ]  # fmt: skip
    rows = []
    for o in outcomes:
        rows.append([f"{o.name}, **certified** ({o.certified.total:,})", *_cells(o.certified, epsilons)])
        rows.append([f"{o.name}, {attack} ({o.robust.total:,})", *_cells(o.robust, epsilons)])
    rows += [[f"{row.name} (quoted)", *(f"{value:g}" for value in row.accuracy)] for row in comparison.quoted]
    columns = ["ε", *map(_epsilon, epsilons)]
    lines = [
        f"# {comparison.title}", "", *_table(head, summary), "",
        "Accuracy, %, under perturbations of ℓ2 norm up to ε (± half of the 95 % interval; the number of images):", "",
        *_table(columns, rows), "",
        f"Certified: by a sound bound, for the float64 program. {attack}: {by}; images that are certified at ε are not attacked",
        f"there, which proof makes vain. Areas are means over ε up to {epsilons[-1]:g}.",
        *(f"Quoted: {source}." for source in dict.fromkeys(row.source for row in comparison.quoted)),
    ]  # fmt: skip
    rows = []
    for o in outcomes:
        if o.pooling > 1:
            rows.append([f"{o.name}, true norms", f"{o.lipschitz:.4g}", *_cells(o.certified, epsilons)])
            rows.append([f"{o.name}, counted as 1", f"{o.lipschitz * o.pooling:.4g}", *_cells(o.loose, epsilons)])
    if rows:
        lines += ["", "Certified accuracy, %, with the true norms of average poolings, and with each counted as 1:", ""]
        lines += _table([columns[0], "L ≤", *columns[1:]], rows)
    curves = ("clean", "certified", "robust", "loose")
    runs = [vars(o) | {name: getattr(o, name).to_json() for name in curves} for o in outcomes]
    result = {"title": comparison.title, "attack": by, "runs": runs, "quoted": comparison.quoted}
    return "\n".join(lines) + "\n", result, ["curves.png"]


def _depth(results: Iterable[Trained], folder: Path) -> Report:
    from nonexpansive.experiments.depth import worst_case
    from nonexpansive.experiments.stability import steepest
    from nonexpansive.robust import Curve

    trained, rows = [], []
    for t in results:
        kind = "ordinary, x + Bσ(Ax + b)" if t.ordinary else "gradient flow, x - hAᵀσ(Ax + b)"
        found, proved = f"{t.measured:.4g}", f"{t.certified:.4g}"
        out.print(f"depth {t.depth}, {kind}: Lipschitz constant between {found} and {proved}", markup=False)
        trained.append(t)
        (right,) = _cells(Curve("right", (0.0,), (t.right,), t.tested), [0.0])
        rows.append([str(t.depth), kind, right, found, proved, f"{t.norm:.4f}"])
    worst = []
    for depth in sorted({t.depth for t in trained}):
        net = worst_case(4, depth).double().requires_grad_(False)
        found = steepest(net, torch.ones(1, 4, dtype=torch.float64))
        worst.append({"depth": depth, "measured": found, "certified": certify(net, (4,)).lipschitz})
    growth(folder / "curves.png", trained, [(w["depth"], w["measured"]) for w in worst])
    head = [
        "depth",
        "blocks",
        "test accuracy, %, ± 95 % interval",
        "Lipschitz constant: found ≥",
        "certified ≤",
        "largest ‖W‖ ≤",
    ]
    lines = [
        "# Depth: residual networks on the digits, every weight at spectral norm 1", "", *_table(head, rows), "",
        "The worst case, x + Iσ(Ix) with σ the ReLU, attains the bound:", "",
        *_table(["depth", "found ≥", "certified ≤"], [[f"{value:.6g}" for value in w.values()] for w in worst]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n", {"trained": trained, "worst_case": worst}, ["curves.png"]


def _denoising(known: Denoising, results: Iterable[Denoised], given: Callable[[], Photographs], folder: Path) -> Report:
    """``given``: the photographs as the experiment saw them, noise included, for the figure."""
    from nonexpansive.experiments.denoising import UNSTABLE, centre
    from nonexpansive.train.data import read_photo

    found = []
    for result in results:
        out.print(f"{result.name}: PSNR {_spread(result.psnr)} dB", markup=False)
        found.append(result)
    if not found:
        raise BadInput("no denoiser is left to be compared")
    rows, bounds = [], []
    for d in found:
        how = f"weight {d.weight:.3g}" if d.weight else f"{d.steps:,} steps, {d.seconds / 60:.1f} min"
        size = f"{d.parameters:,}" if d.parameters else "-"
        rows.append([d.name, size, how, _spread(d.psnr), _spread(d.ssim, 4), f"{_mean(d.seconds_each):.2f}"])
        alpha = "none" if d.averaged is None else f"{d.averaged:.4f}"
        bounds.append(
            [
                d.name,
                *(f"{v:.4g}" for v in (d.certified, d.measured, d.found)),
                alpha,
                f"{d.growth:.4g}",
                f"{d.residual[-1]:.2g}",
            ]
        )
    photographs = given()
    pictures = []
    for name in found[0].pictures:
        clean, noisy = photographs.pair(name)
        side = min(known.crop, *clean.shape[-2:])
        row = [("noisy", noisy)]
        for d in found:
            score = d.psnr[d.names.index(name)]
            row.append((f"{d.name}, {score:.2f} dB", read_photo(d.pictures[name], clean.shape[1])[None] / 255))
        pictures.append([(text, centre(x[0], side)) for text, x in [*row, ("clean", clean)]])
    if pictures:
        gallery(folder / "pictures.png", pictures)
    lines = [
        f"# {known.title}", "",
        f"{len(found[0].names)} test photographs, noise of σ = {known.sigma:g}, the same for all; mean ± standard deviation over them:", "",
        *_table(["denoiser", "parameters", "training", "PSNR, dB", "SSIM", "s a photograph"], rows), "",
        "The Lipschitz constant, from above by proof and from below by measurement; and the denoiser applied",
        f"{known.repeated} times over:", "",
        *_table(["denoiser", "certified ≤", "at photographs ≥", "by ascent ≥", "α ≤", "growth", "last residual"], bounds), "",
        "PSNR has peak 1, and nothing is clipped. Seconds a photograph are the processor's. At photographs: the norm of the Jacobian,",
        f"by power iteration, at noisy crops of {known.probe}x{known.probe} pixels; by ascent: gradient ascent from there. Growth: the",
        "largest ratio of a residual x_k - x_{k-1} to the one before it, x_k = D(x_{k-1}) from such a crop: at most 1 where averagedness",
        "is proved. Last residual: root mean square, the largest of a crop. Total variation is a proximal map, 1/2-averaged by theory,",
        f"its weight chosen on {known.tuned} validation photographs, its slopes found from differences of pictures that are solved for.",
    ]  # fmt: skip
    if known.unstable:
        lines.append(f"{UNSTABLE.capitalize()}: {known.amplification:g} times the denoiser of {known.unstable}.")
    repetitions(folder / "repeated.png", {d.name: d.residual for d in found})
    if known.minutes:
        lines.append(
            f"Each network had {known.minutes:g} minutes of the processor; minutes in the table are the clock's."
        )
    return (
        "\n".join(lines) + "\n",
        {"title": known.title, "settings": known, "denoisers": found},
        ["pictures.png"] * bool(pictures) + ["repeated.png"],
    )


def _plug_and_play(known: PlugAndPlay, results: Iterable[Restored], folder: Path) -> Report:
    found: list[Restored] = []
    for result in results:
        out.print(
            f"{result.method}, noise {result.noise:g}: PSNR {_spread(result.quality[:, -1].tolist())} dB", markup=False
        )
        found.append(result)
    iterations(folder / "curves.png", found, known.title)
    marks = sorted({1, 10, 100, known.iterations} & set(range(1, known.iterations + 1)))
    lines = [f"# {known.title}", ""]
    for noise in dict.fromkeys(r.noise for r in found):
        these = [r for r in found if r.noise == noise]
        rows, proofs = [["blurred", _spread(these[0].blurred.tolist()), *["-"] * (len(marks) + 2)]], []
        for r in these:
            strength = f"{r.strength:.3g}"
            if r.growth is None:
                rows.append(
                    [r.method, *["-"] * (len(marks) - 1), _spread(r.quality[:, -1].tolist()), "-", "-", strength]
                )
                continue
            along = [_spread(r.quality[:, k - 1].tolist()) for k in marks]
            last = r.residual[:, -1]
            rows.append([r.method, *along, f"{float(last.max()):.2g}", f"{r.growth:.6g}", strength])
            proof = f"averaged, α ≤ {r.averaged:.6g}" if r.averaged is not None else f"refused: {r.refusal}"
            proofs.append(
                f"- {r.method}: {proof}" + (f" {r.diverged} of {len(last)} photographs diverged." if r.diverged else "")
            )
        rows[0] = ["blurred", *["-"] * (len(marks) - 1), rows[0][1], "-", "-", "-"]
        head = ["method", *(f"after {k}" for k in marks), "last residual", "growth", "strength"]
        lines += [f"## Noise {100 * noise:g} %", "", *_table(head, rows), "", *proofs, ""]
    lines += [
        f"{len(found[0].blurred)} test photographs, centre crops of {known.size}x{known.size}, each blurred by one of",
        f"{len(known.kernels)} kernels; PSNR in dB after so many iterations, mean ± standard deviation.",
        "Last residual: x_k - x_{k-1}, root mean square, the largest of a photograph. Growth: the largest ratio of a residual to the one",
        "before it, rounding left out, at most 1 where averagedness is proved. Strength: t of (1-t)I + tD, or total variation's weight.",
    ]  # fmt: skip
    curves = [vars(r) | {"diverged": r.diverged} for r in found]
    return "\n".join(lines) + "\n", {"title": known.title, "settings": known, "runs": curves}, ["curves.png"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    mean = _mean(values)
    deviation = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _cells(curve: Curve, epsilons: Sequence[float]) -> list[str]:
    cells = []
    for epsilon in epsilons:
        k = curve.epsilons.index(epsilon)
        low, high = curve.intervals[k]
        cells.append(f"{100 * curve.accuracy[k]:.1f} ± {50 * (high - low):.1f}")
    return cells


def _percent(curve: Curve) -> str:
    """The accuracy at the first ε."""
    low, high = curve.intervals[0]
    return f"{100 * curve.accuracy[0]:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {curve.total:,}"


def _epsilon(epsilon: float) -> str:
    """As a multiple of 1/255 where it is one and not a short decimal."""
    of255 = round(255 * epsilon)
    short = abs(round(epsilon, 2) - epsilon) < 1e-12
    return f"{epsilon:g}" if short or abs(of255 / 255 - epsilon) > 1e-9 else f"{of255}/255"
