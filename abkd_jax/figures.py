"""The style of every figure, and the figures that experiments and notebooks share.

Each function takes plain arrays and returns a matplotlib Figure, ready to be shown or saved.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter

WIDTH = 8.0  # inches, of every figure
DPI = 150
FONT, TITLE = 12, 13  # points: still legible where a page shows the figure at half its width
# Okabe and Ito's colours, which those who are colour-blind can tell apart, in an order that keeps
# neighbours apart in lightness too; black is left for what all networks share.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY, LIGHT_GREY = "#767676", "#BBBBBB"
_MAP = "cividis"  # even in lightness, and the same to those who are colour-blind
_OUTLINE = [withStroke(linewidth=2.5, foreground="black")]
_SPECIAL = (  # points of the (alpha, beta) plane, and their names
    ((1.0, 0.0), "forward KL"),
    ((0.0, 1.0), "reverse KL"),
    ((0.5, 0.5), "Hellinger"),
    ((1.0, 1.0), "Euclidean"),
    ((0.0, 0.0), "log-ratios"),
)
_SHORT = {"forward KL": "FKL", "reverse KL": "RKL"}  # where a panel is too small for all names


def new(height: float, layout: str = "constrained") -> Figure:
    """An empty figure of the usual width, in inches, that needs no display."""
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def new_grid(count: int, *, columns: int, height: float, above: float = 0.0) -> tuple:
    """A figure of panels in rows.

    Args:
        count: how many panels.
        columns: how many of them stand side by side.
        height: inches for each row of panels.
        above: inches besides, for a legend.

    Returns:
        The figure, and the axes of each panel, row by row.
    """
    rows = math.ceil(count / columns)
    figure = new(height * rows + above)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def label(axes: Axes, title: str | None, x: str | None, y: str | None) -> None:
    """Title and labels in the usual sizes, without the frame's upper and right side."""
    axes.set_title(title or "", fontsize=TITLE, parse_math=False)
    axes.set_xlabel(x or "", fontsize=FONT)
    axes.set_ylabel(y or "", fontsize=FONT)
    axes.tick_params(which="both", labelsize=FONT)
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
    points = {(row[x], row[y]) for row in rows}
    if min(len(xs), len(ys)) < 2 or not len(rows) == len(points) == len(xs) * len(ys):
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
    # Outliers below would leave no colours to the rest.
    limits = (np.percentile(finite, 10), finite.max()) if len(finite) else (0.0, 1.0)
    _draw_map(axes, xs, ys, values, limits, score_label)
    if special:
        _mark_special(axes, xs, ys)
    if best is not None:
        style = dict(marker="*", s=260, color=COLOURS[5], edgecolor="white", zorder=4)
        axes.scatter(best[x], best[y], **style)
        title = f"{title}; best (star): {best[x]:g}, {best[y]:g}"
    label(axes, title, x.rpartition(".")[2], y.rpartition(".")[2])
    return figure


def heat_maps(
    panels: Sequence[Mapping[str, Any]],
    alphas: Sequence[float],
    betas: Sequence[float],
    *,
    height: float = 3.5,
) -> Figure:
    """Maps over the (alpha, beta) plane, two side by side, forward and reverse KL marked.

    Args:
        panels: each with "title", "label" (of the colours) and "values" `[len(betas),
            len(alphas)]`, hatched where not finite; with "log" true the colours are logarithmic,
            and values that are not positive hatched.
        alphas: sorted, along the horizontal axes.
        betas: sorted, along the vertical ones.
        height: inches for each row of panels.

    Returns:
        The figure.

    Raises:
        ValueError: if a panel's values have another shape.
    """
    figure, grid = new_grid(len(panels), columns=2, height=height)
    for axes, panel in zip(grid, panels, strict=True):
        values = np.asarray(panel["values"], float)
        if values.shape != (len(betas), len(alphas)):
            raise ValueError(
                f"the values of {panel['title']!r} must be [{len(betas)}, {len(alphas)}], beta by "
                f"alpha; found {list(values.shape)}."
            )
        log = panel.get("log", False)
        shown = values[np.isfinite(values) & ((values > 0) | (not log))]
        ends = (shown.min(), shown.max()) if len(shown) else (0.1, 1.0)
        _draw_map(axes, alphas, betas, values, ends, panel["label"], log)
        _mark_special(axes, alphas, betas, short=True)
        label(axes, panel["title"], "alpha", "beta")
    return figure


def lines(panels: Sequence[Mapping[str, Any]], *, columns: int = 2, height: float = 3.4) -> Figure:
    """Panels of curves, with one legend for each panel.

    Args:
        panels: each with "title", "x" and "y" (labels), and "curves", {name: (xs, ys)} or
            {name: (xs, ys, spread)}, where a band of +- spread is drawn; "log_x" true for a
            logarithmic horizontal axis.
        columns: how many panels stand side by side.
        height: inches for each row of panels.

    Returns:
        The figure.
    """
    figure, grid = new_grid(len(panels), columns=columns, height=height)
    for axes, panel in zip(grid, panels, strict=True):
        curves(axes, panel)
    return figure


def curves(axes: Axes, panel: Mapping[str, Any]) -> None:
    """Draws a panel of `lines`, with a legend where there is more than one curve."""
    for index, (name, (xs, ys, *spread)) in enumerate(panel["curves"].items()):
        colour, style = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS)]
        axes.plot(xs, ys, style, color=colour, label=name, linewidth=2)
        for band in spread:
            low, high = np.subtract(ys, band), np.add(ys, band)
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    if panel.get("log_x"):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    label(axes, panel["title"], panel["x"], panel["y"])
    if len(panel["curves"]) > 1:
        axes.legend(fontsize=FONT - 1, frameon=False)


def bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    colours: Sequence[str] = COLOURS,
) -> None:
    """Bars side by side for each group.

    Args:
        axes: to draw on.
        groups: their names, along the horizontal axis.
        series: {name: a value for each group}; one bar of each series stands in a group.
        colours: of the series, in turn.

    Raises:
        ValueError: if a series has another number of values.
    """
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        if len(values) != len(groups):
            raise ValueError(
                f"{name!r} must have a value for each of {len(groups)} groups; found {len(values)}."
            )
        left = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        axes.bar(left, values, width, color=colours[index % len(colours)], label=name)
    axes.set_xticks(np.arange(len(groups)), groups)


def patches(names: Iterable[str], colours: Mapping[str, str]) -> list[Artist]:
    """What a legend shows of names, by their colours."""
    return [Patch(color=colours[name], label=name) for name in names]


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend above all panels, in as many columns as fit; none without handles."""
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(len(handles), max(85 // (longest + 8), 1)),
            fontsize=FONT,
            frameon=False,
        )


def say(axes: Axes, text: str) -> None:
    """Writes a sentence where there is nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=FONT, transform=axes.transAxes)
    axes.set(xticks=(), yticks=())


def save(figure: Figure, path: Any) -> Any:
    """Writes a PNG file, whose bytes depend on the picture alone, and makes its folder.

    Returns:
        The path, as it was given.
    """
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})  # no version of matplotlib
    return path


def _edges(centres: Sequence[float]) -> np.ndarray:
    """The borders of cells around sorted centres."""
    middle = (np.asarray(centres)[1:] + np.asarray(centres)[:-1]) / 2
    return np.asarray([2 * centres[0] - middle[0], *middle, 2 * centres[-1] - middle[-1]])


def _draw_map(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    values: np.ndarray,
    limits: tuple[float, float],
    colour_label: str,
    log: bool = False,
) -> None:
    """A map with its colour bar; what is not finite is hatched, what lies outside is marked."""
    finite = values[np.isfinite(values)]
    scale = (LogNorm if log else Normalize)(*limits)
    shown = np.ma.masked_invalid(values)
    mesh = axes.pcolormesh(_edges(xs), _edges(ys), shown, cmap=_MAP, norm=scale)
    axes.patch.set(hatch="///", edgecolor=LIGHT_GREY)
    below, above = np.any(finite < limits[0]), np.any(finite > limits[1])
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[(below, above)]
    bar = axes.figure.colorbar(mesh, ax=axes, extend=extend)
    bar.set_label(colour_label, fontsize=FONT)
    bar.ax.tick_params(which="both", labelsize=FONT)
    axes.set_xlim(_edges(xs)[[0, -1]])
    axes.set_ylim(_edges(ys)[[0, -1]])


def _mark_special(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], short: bool = False
) -> None:
    """The known divergences on the (alpha, beta) plane."""
    axes.plot([-9, 10], [10, -9], "--", color="white", linewidth=1.5)
    for (alpha, beta), name in _SPECIAL:
        if not (xs[0] <= alpha <= xs[-1] and ys[0] <= beta <= ys[-1]):
            continue
        axes.scatter(alpha, beta, color="white", edgecolor="black", s=45, zorder=3)
        name = _SHORT.get(name, "") if short else name
        style = dict(fontsize=FONT - 1, color="white", path_effects=_OUTLINE)
        # Off the line: to the right and above, or, where there is no room for it, the other way.
        place = dict(ha="left", va="bottom", xytext=(6, 5))
        if alpha == 1:
            place = dict(ha="right", va="top", xytext=(-6, -5))
        axes.annotate(name, (alpha, beta), textcoords="offset points", **place, **style)
