"""Figures of curves: accuracy over the size of a perturbation, Lipschitz constants over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nonexpansive.atomic import atomic

if TYPE_CHECKING:
    from nonexpansive.experiments.depth import Trained
    from nonexpansive.robust import Curve


def accuracies(path: Path, groups: Mapping[str, Mapping[str, Curve]], title: str = "") -> None:
    """For each network (the keys of ``groups``) in one colour its curves over ε, by kind: the first drawn through, the others dashed
    and dotted, each with its 95 % intervals. Curves of one kind have one style in all groups."""
    figure, axis = _figure(7.5, 4.5)
    kinds = list(dict.fromkeys(kind for curves in groups.values() for kind in curves))
    for colour, (name, curves) in enumerate(groups.items()):
        for kind, curve in curves.items():
            style, marker = (("-", ""), ("--", "o"), (":", "x"))[min(kinds.index(kind), 2)]
            label = f"{name}, {kind} ({curve.total:,})"
            axis.plot(curve.epsilons, curve.accuracy, style, marker=marker, ms=3, color=f"C{colour}", label=label)
            low, high = zip(*curve.intervals, strict=True)
            axis.fill_between(curve.epsilons, low, high, color=f"C{colour}", alpha=0.12, linewidth=0)
    axis.set(xlabel="ε (ℓ2, images in [0, 1])", ylabel="accuracy", title=title, ylim=(0, 1))
    axis.title.set_size("small")
    axis.margins(x=0.01)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    _save(figure, path)


def growth(path: Path, rows: Sequence[Trained], worst: Sequence[tuple[int, float]]) -> None:
    """Certified and measured Lipschitz constants over the depth, both axes logarithmic; ``worst``: (depth, ratio) of the worst case."""
    figure, axis = _figure(6.5, 4.5)
    for colour, (ordinary, name) in enumerate(((False, "gradient flows"), (True, "ordinary x + Bσ(Ax + b)"))):
        these = [row for row in rows if row.ordinary == ordinary]
        depths = [row.depth for row in these]
        axis.plot(depths, [r.certified for r in these], "-", color=f"C{colour}", label=f"{name}: certified, from above")
        axis.plot(depths, [r.measured for r in these], "o--", color=f"C{colour}", label=f"{name}: found, from below")
    axis.plot(*zip(*worst, strict=True), "kx", label="worst case of weights I: found")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel="depth (residual blocks)", ylabel="Lipschitz constant", title="Every weight at spectral norm 1")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".").lower())
