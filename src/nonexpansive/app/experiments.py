"""`nonexpansive experiment`: train what an experiment names, judge it, and write report.md, curves.png and result.json."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from nonexpansive.app.curves import accuracies, growth
from nonexpansive.app.output import write_json
from nonexpansive.atomic import atomic
from nonexpansive.errors import BadInput
from nonexpansive.experiments import listed, shipped
from nonexpansive.math.certificate import certify

if TYPE_CHECKING:
    from nonexpansive.experiments.comparison import Comparison, Outcome
    from nonexpansive.experiments.depth import Trained
    from nonexpansive.robust import Curve

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ATTACK = {
    "pgd": ("PGD", "5 restarts of 100 steps, on the cross-entropy and on the margin in turn"),
    "auto": ("AutoAttack", "APGD-CE, APGD-T, FAB-T and Square"),
}
"""What an attack is called, and what it does."""


def experiment(
    name: Annotated[
        str,
        typer.Argument(help="digits, cifar10, fashion-mnist, fashion-mnist-full, depth, or a TOML file of your own."),
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
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of every training, such as train.steps=100."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Only this network of the experiment; may be repeated.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, metavar="N", help="At most so many test images (depth: blocks); 0: all.")
    ] = 0,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Train the networks of an experiment, certify, attack and compare them: report.md, curves.png, result.json.

    Killed at any moment, the same command resumes: trainings from their checkpoints, and what was measured is not measured again.
    """
    from nonexpansive.experiments import comparison, depth

    began = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    known = None if name == "depth" else comparison.Comparison.from_toml(_path(name))
    if known is None and only:
        raise BadInput("--only chooses among the networks of a comparison; those of depth are bounded by --limit")
    output.mkdir(parents=True, exist_ok=True)
    if known is None:
        depths = [n for n in depth.DEPTHS if n <= (limit or depth.DEPTHS[-1])]
        text, result = _depth(depth.experiment(data, output, depths, settings or (), accelerator=accelerator), output)
    else:
        chosen = {"overrides": settings or (), "only": only or (), "limit": limit, "accelerator": accelerator}
        text, result = _comparison(
            known,
            comparison.compare(known, data, output, watch=lambda text: err.print(text, markup=False), **chosen),
            output,
        )
    options = [("--set", s) for s in settings or ()] + [("--only", f'"{o}"') for o in only or ()]
    options += [("--limit", str(limit))] if limit else []
    command = " ".join(["nonexpansive experiment", name, *(word for option in options for word in option)])
    about = {"experiment": name, "command": command, "torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(output / "result.json", about | result)
    with atomic(output / "report.md") as temporary:
        temporary.write_text(f"{text}\n`{command}`\n\n![curves](curves.png)\n", encoding="utf-8")
    out.print(text, markup=False)
    seconds = time.perf_counter() - began
    out.print(f"wrote report.md, curves.png and result.json in {output} ({seconds:.0f} s)", markup=False)


def _path(name: str) -> Path:
    try:
        return shipped(name, "comparisons")
    except BadInput as error:
        names = ", ".join(sorted([*listed("comparisons"), "depth"]))
        raise BadInput(f"{name}: no such file, and no experiment is called so (there are {names})") from error


# ------------------------------------------------------------------------------------------------------------------ reports


def _comparison(comparison: Comparison, results: Iterable[Outcome], folder: Path) -> tuple[str, dict[str, Any]]:
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
    return "\n".join(lines) + "\n", result


def _depth(results: Iterable[Trained], folder: Path) -> tuple[str, dict[str, Any]]:
    from nonexpansive.experiments.depth import steepest, worst_case

    trained, rows = [], []
    for t in results:
        kind = "ordinary, x + Bσ(Ax + b)" if t.ordinary else "gradient flow, x - hAᵀσ(Ax + b)"
        found, proved = f"{t.measured:.4g}", f"{t.certified:.4g}"
        out.print(f"depth {t.depth}, {kind}: Lipschitz constant between {found} and {proved}", markup=False)
        trained.append(t)
        rows.append([str(t.depth), kind, f"{100 * t.right / t.tested:.1f}", found, proved, f"{t.norm:.4f}"])
    worst = []
    for depth in sorted({t.depth for t in trained}):
        net = worst_case(4, depth).double().requires_grad_(False)
        found = steepest(net, torch.ones(1, 4, dtype=torch.float64))
        worst.append({"depth": depth, "measured": found, "certified": certify(net, (4,)).lipschitz})
    growth(folder / "curves.png", trained, [(w["depth"], w["measured"]) for w in worst])
    head = ["depth", "blocks", "test accuracy, %", "Lipschitz constant: found ≥", "certified ≤", "largest ‖W‖ ≤"]
    lines = [
        "# Depth: residual networks on the digits, every weight at spectral norm 1", "", *_table(head, rows), "",
        "The worst case, x + Iσ(Ix) with σ the ReLU, attains the bound:", "",
        *_table(["depth", "found ≥", "certified ≤"], [[f"{value:.6g}" for value in w.values()] for w in worst]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n", {"trained": trained, "worst_case": worst}


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
