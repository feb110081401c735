"""Figures of curves: accuracy over the size of a perturbation, Lipschitz constants over depth, restorations over iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nonexpansive.atomic import atomic

if TYPE_CHECKING:
    from nonexpansive.experiments.depth import Trained
    from nonexpansive.experiments.plug_and_play import Restored
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


def iterations(path: Path, runs: Sequence[Restored], title: str = "") -> None:
    """PSNR (above) and residual (below) along the iterations, a column for each noise level, a colour for each method: the
    mean over the photographs (of the residual, of its logarithm) and one standard deviation about it. What has run away leaves the frame.
    """
    import numpy as np

    noises, methods = (list(dict.fromkeys(values)) for values in ([r.noise for r in runs], [r.method for r in runs]))
    figure, axes = _figure(4.6 * len(noises) + 0.4, 6.4, (2, len(noises)))
    for run in runs:
        column, colour = noises.index(run.noise), f"C{methods.index(run.method)}"
        above, below = axes[:, column]
        quality = run.quality.numpy()
        mean, spread = quality.mean(0), quality.std(0)
        if run.growth is None:
            above.axhline(mean[0], linestyle="--", color=colour, label=run.method)
            above.axhspan(mean[0] - spread[0], mean[0] + spread[0], color=colour, alpha=0.08, linewidth=0)
            continue
        k = np.arange(1, quality.shape[1] + 1)
        above.plot(k, mean, color=colour, label=run.method)
        above.fill_between(k, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        residual = np.log10(run.residual.clamp(1e-30, 1e30).numpy())
        residual[~np.isfinite(run.residual.numpy())] = np.nan
        whole = np.isfinite(residual).all(0)  # of photographs that are lost there is no mean
        mean, spread = residual[:, whole].mean(0), residual[:, whole].std(0)
        below.plot(k[whole], 10**mean, color=colour, label=run.method)
        below.fill_between(
            k[whole], 10 ** (mean - spread), 10 ** (mean + spread), color=colour, alpha=0.12, linewidth=0
        )
    for column, noise in enumerate(noises):
        above, below = axes[:, column]
        these = [run for run in runs if run.noise == noise]
        blurred = float(these[0].blurred.mean())
        best = max(float(run.quality.mean(0).max()) for run in these)
        above.axhline(blurred, linestyle=":", color="grey", label="blurred")
        above.set(xscale="log", ylim=(blurred - 8, max(best, blurred) + 4), ylabel="PSNR, dB")
        above.set_title(f"noise {100 * noise:g} %", fontsize="small")
        below.set(xscale="log", yscale="log", xlabel="iteration", ylabel="residual, root mean square", ylim=(1e-8, 1e1))
        for axis in (above, below):
            axis.margins(x=0)
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="x-small", loc="outside lower center", ncols=len(labels))
    figure.suptitle(title, fontsize="small")
    _save(figure, path)


def repetitions(path: Path, residuals: Mapping[str, Sequence[float]]) -> None:
    """For each denoiser D the residuals of x_k = D(x_{k-1}) over k, both axes logarithmic."""
    figure, axis = _figure(6.5, 4.0)
    for name, residual in residuals.items():
        axis.plot(range(1, len(residual) + 1), [min(value, 1e30) for value in residual], label=name)
    axis.set(xscale="log", yscale="log", ylim=(1e-8, 1e3), xlabel="times applied", ylabel="residual, root mean square")
    axis.set_title("Each denoiser applied over and over", fontsize="small")
    axis.margins(x=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    _save(figure, path)


def _figure(width: float, height: float, grid: tuple[int, int] | None = None) -> tuple[Any, Any]:
    """A figure with one pair of axes, or with an array of them in so many rows and columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*grid, squeeze=False) if grid else figure.subplots()


def _save(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".").lower())
