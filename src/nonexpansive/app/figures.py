"""Figures: pictures side by side, and the residual of a restoration along its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nonexpansive.atomic import atomic


def restoration(
    path: Path,
    *,
    clean: Tensor | None,
    degraded: Tensor,
    restored: Tensor,
    residuals: list[float] | None = None,
    tolerance: float | None = None,
    quality: dict[str, dict[str, float]] | None = None,
    note: str | None = None,
    warning: str | None = None,
) -> None:
    """Pictures (1, C, H, W) side by side with their PSNR, and, for an iteration, the relative residual at each step. ``note`` is what is
    proved of the residual; a ``warning`` becomes the title of the whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = [("degraded", degraded), ("restored", restored)] + ([("clean", clean)] if clean is not None else [])
    scores = list((quality or {}).values())
    height, width = restored.shape[-2:]
    columns = len(pictures) + (1 if residuals else 0)
    figure = Figure(figsize=(4 * columns, 4 * height / width + 0.5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis, (title, picture), score in zip(axes, pictures, [*scores, *[None] * len(pictures)], strict=False):
        _show(axis, picture[0])
        axis.set_title(f"{title}, {score['psnr']:.2f} dB" if score else title)
        axis.set_axis_off()
    if residuals:
        axes[-1].semilogy(range(1, len(residuals) + 1), residuals)
        if tolerance:
            axes[-1].axhline(tolerance, linestyle=":", color="grey")
        axes[-1].set(xlabel="step", title=f"relative residual{note or ''}")
        axes[-1].grid(alpha=0.3, which="both")
    if warning:
        figure.suptitle(warning, color="red")
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".").lower())


def adversary(path: Path, picture: Tensor, other: Tensor, title: str, other_title: str) -> None:
    """A picture (1, C, H, W), one near it of another class, and their difference, brought to the range of grey values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    change = other - picture
    shown = [picture, other, 0.5 + 0.5 * change / change.abs().max().clamp_min(1e-12)]
    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for axis, image, text in zip(
        figure.subplots(1, 3), shown, (title, other_title, "the difference, stretched"), strict=True
    ):
        _show(axis, image[0])
        axis.set_title(text, fontsize="medium")
        axis.set_axis_off()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".").lower())


def gallery(path: Path, rows: Sequence[Sequence[tuple[str, Tensor]]]) -> None:
    """Rows of pictures (C, H, W), each under its title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(2.3 * columns, 2.5 * len(rows)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis, (title, picture) in zip(axes, row, strict=False):
            _show(axis, picture)
            axis.set_title(title, fontsize=7)
        for axis in axes:
            axis.set_axis_off()
    with atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".").lower())


def _show(axis: Any, picture: Tensor) -> None:
    """A picture (C, H, W), C = 1 or 3."""
    values = picture.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axis.imshow(values[..., 0] if len(picture) == 1 else values, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
