"""The style of every figure, and the figures that experiments and notebooks share.

Each function takes plain arrays and returns a matplotlib Figure, ready to be shown or saved.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

WIDTH = 8.0  # inches, of every figure
DPI = 150
FONT, TITLE = 12, 13  # points: still legible where a page shows the figure at half its width
# Okabe and Ito's colours, which those who are colour-blind can tell apart, in an order that keeps
# neighbours apart in lightness too; black is left for what all networks share.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY, LIGHT_GREY = "#767676", "#BBBBBB"
_MAP = "cividis"  # even in lightness, and the same to those who are colour-blind
_OUTLINE = [withStroke(linewidth=2.5, foreground="black")]
_SPECIAL = (  # points of the (alpha, beta) plane, and where their names stand
    ((1.0, 0.0), "forward KL", "left", "bottom"),
    ((0.0, 1.0), "reverse KL", "left", "bottom"),
    ((0.5, 0.5), "Hellinger", "left", "bottom"),
    ((1.0, 1.0), "Euclidean", "right", "bottom"),
    ((0.0, 0.0), "log-ratios", "left", "bottom"),
)


def new(height: float, layout: str = "constrained") -> Figure:
    """An empty figure of the usual width, in inches, that needs no display."""
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def label(axes: Axes, title: str | None, x: str | None, y: str | None) -> None:
    """Title and labels in the usual sizes, without the frame's upper and right side."""
    axes.set_title(title or "", fontsize=TITLE, parse_math=False)
    axes.set_xlabel(x or "", fontsize=FONT)
    axes.set_ylabel(y or "", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.spines[["top", "right"]].set_visible(False)


def heat_map(
    rows: Sequence[Mapping[str, float]],
    x: str,
    y: str,
    score: str,
    *,
    title: str,
    score_label: str,
    best: Mapping[str, float] | None = None,
    special: bool = False,
    factor: float = 1.0,
) -> Figure:
    """A score over a grid of two numbers.

    Args:
        rows: one for each point, as `train.sweep.averaged` makes them.
        x: the number along the horizontal axis.
        y: along the vertical one.
        score: by its key; a point where it is not finite is hatched.
        title: of the figure.
        score_label: of the colours.
        best: the row of a point to mark with a star; None for none.
        special: whether to mark the divergences at known (alpha, beta), and the line of the
            alpha-divergences, alpha + beta = 1.
        factor: 100 for scores in per cent.

    Returns:
        The figure.

    Raises:
        ValueError: if the points are no grid of at least two by two.
    """
    xs, ys = (sorted({row[name] for row in rows}) for name in (x, y))
    if len(xs) < 2 or len(ys) < 2 or len(rows) != len(xs) * len(ys):
        raise ValueError(
            f"a heat map needs a grid of two numbers, at least 2 x 2; found {len(rows)} points, "
            f"with {len(xs)} values of {x} and {len(ys)} of {y}."
        )
    values = np.full((len(ys), len(xs)), np.nan)
    for row in rows:
        values[ys.index(row[y]), xs.index(row[x])] = factor * row[score]
    figure = new(6.2)
    axes = figure.subplots()
    finite = values[np.isfinite(values)]
    low = np.percentile(finite, 10) if len(finite) else 0.0  # outliers leave no colours to the rest
    mesh = axes.pcolormesh(_edges(xs), _edges(ys), np.ma.masked_invalid(values), cmap=_MAP)
    mesh.set_clim(low, finite.max() if len(finite) else 1.0)
    axes.patch.set(hatch="///", edgecolor=LIGHT_GREY)
    bar = figure.colorbar(mesh, ax=axes, extend="min" if np.any(finite < low) else "neither")
    bar.set_label(score_label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    if special:
        _mark_special(axes, xs, ys)
    if best is not None:
        style = dict(marker="*", s=260, color=COLOURS[5], edgecolor="white", zorder=4)
        axes.scatter(best[x], best[y], **style)
        title = f"{title}; best (star): {best[x]:g}, {best[y]:g}"
    label(axes, title, x.rpartition(".")[2], y.rpartition(".")[2])
    axes.set_xlim(_edges(xs)[[0, -1]])
    axes.set_ylim(_edges(ys)[[0, -1]])
    return figure


def lines(panels: Sequence[Mapping[str, Any]], *, columns: int = 2, height: float = 3.4) -> Figure:
    """Panels of curves, with one legend for each panel.

    Args:
        panels: each with "title", "x" and "y" (labels), and "curves", {name: (xs, ys)} or
            {name: (xs, ys, spread)}, where a band of +- spread is drawn.
        columns: how many panels stand side by side.
        height: inches for each row of panels.

    Returns:
        The figure.
    """
    rows = math.ceil(len(panels) / columns)
    figure = new(height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        for index, (name, (xs, ys, *spread)) in enumerate(panel["curves"].items()):
            colour, style = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS)]
            axes.plot(xs, ys, style, color=colour, label=name, linewidth=2)
            for band in spread:
                low, high = np.subtract(ys, band), np.add(ys, band)
                axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
        label(axes, panel["title"], panel["x"], panel["y"])
        if len(panel["curves"]) > 1:
            axes.legend(fontsize=FONT - 2, frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def save(figure: Figure, path: Any) -> None:
    """Writes the figure as a PNG file."""
    figure.savefig(path, dpi=DPI)


def _edges(centres: Sequence[float]) -> np.ndarray:
    """The borders of cells around sorted centres."""
    middle = (np.asarray(centres)[1:] + np.asarray(centres)[:-1]) / 2
    return np.asarray([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])


def _mark_special(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """The known divergences on the (alpha, beta) plane."""
    axes.plot([-9, 10], [10, -9], "--", color="white", linewidth=1.5)
    for (alpha, beta), name, side, above in _SPECIAL:
        if not (xs[0] <= alpha <= xs[-1] and ys[0] <= beta <= ys[-1]):
            continue
        axes.scatter(alpha, beta, color="white", edgecolor="black", s=45, zorder=3)
        sign = 1 if side == "left" else -1
        axes.annotate(
            name,
            (alpha, beta),
            xytext=(6 * sign, 5),
            textcoords="offset points",
            fontsize=FONT - 1,
            color="white",
            ha=side,
            va=above,
            path_effects=_OUTLINE,
        )
