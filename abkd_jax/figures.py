"""The style of every figure, and the figures that experiments and notebooks share.

Each function takes plain arrays and returns a matplotlib Figure, ready to be shown or saved.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import offset_copy

from abkd_jax import files

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
_OUTLYING = 10  # median deviations below the median
_EVEN = 1.01  # the largest gap over the smallest one, of values that are evenly spaced but rounded
_CLOSEST_TICKS = 0.09  # of an axis of the usual width: there labels of five characters stand apart
_MOST_NUMBERED = 13  # columns of a map whose cells have room for a number
_CHARACTER = 0.58  # mean width of a character, of the font's size


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
    """Title and labels in the usual sizes, without the frame's upper and right side.

    A title that is wider than the column of its panel goes on in another line.
    """
    axes.set_title(_wrapped(axes, title or ""), fontsize=TITLE, parse_math=False, wrap=True)
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
    """A score over a grid of two numbers, with each number's axis on the scale of `scale_of`.

    Args:
        rows: one for each point, as `train.sweep.averaged` makes them.
        x: the number along the horizontal axis.
        y: along the vertical one.
        score: by its key, higher being better. A point where it is not finite is hatched. One that
            lies below the median by more than ten median deviations is white, with its number, so
            that it leaves the colours to the others.
        title: of the figure, to which the best point is added.
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
    figure, names = new(6.2), _ends(x, y)
    axes = figure.subplots()
    low, high = _limits(values[np.isfinite(values)])
    if np.any(values < low):
        score_label += "; white: below"
    _draw_map(axes, xs, ys, values, (low, high), score_label)
    _mark_below(axes, xs, ys, values, low)
    if special:
        _mark_special(axes, xs, ys)
    if best is not None:
        style = dict(marker="*", s=260, color=COLOURS[5], edgecolor="white", zorder=4)
        axes.scatter(best[x], best[y], **style)
        point = ", ".join(f"{name} {best[of]:g}" for of, name in zip((x, y), names, strict=True))
        title = f"{title}; best (star): {point}"
    label(axes, title, *names)
    return figure


def scale_of(values: Sequence[float]) -> dict[str, Any]:
    """The scale on which values are spread most evenly.

    Args:
        values: sorted, at least two.

    Returns:
        What `Axes.set_xscale` takes: "log" for positive values whose logarithms have the more even
        gaps (1, 2, 4), and for two values a decade apart; "symlog", linear up to the second value,
        for such values from one decade on with a 0 before them; else "linear".
    """
    zero, positive = values[0] == 0, [value for value in values if value > 0]
    if len(positive) < 2 or len(positive) + zero < len(values):
        return {"value": "linear"}
    decade, uneven = positive[-1] >= 10 * positive[0], _unevenness(values)
    geometric = uneven > max(_unevenness(np.log(positive)), _EVEN)
    if zero and geometric and decade:
        return {"value": "symlog", "linthresh": positive[0]}
    if not zero and (geometric or (decade and len(values) == 2)):
        return {"value": "log"}
    return {"value": "linear"}


def heat_maps(
    panels: Sequence[Mapping[str, Any]],
    alphas: Sequence[float],
    betas: Sequence[float],
    *,
    height: float = 3.5,
) -> Figure:
    """Maps over the (alpha, beta) plane, two side by side, with the divergences at known points.

    The first map has their names.

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
        _mark_special(axes, alphas, betas, named=axes is grid[0])
        label(axes, panel["title"], "alpha", "beta")
    return figure


def lines(panels: Sequence[Mapping[str, Any]], *, columns: int = 2, height: float = 3.4) -> Figure:
    """Panels of curves, with one legend for each panel.

    Args:
        panels: each with "title", "x" and "y" (labels), and "curves", {name: (xs, ys)} or
            {name: (xs, ys, spread)}, where a band of +- spread is drawn; "log_x" and "log_y" true
            for a logarithmic axis; "nested" true for curves that coincide: each is narrower
            than the one behind it, so that all of them are seen.
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
        behind = len(panel["curves"]) - 1 - index if panel.get("nested") else 0
        axes.plot(xs, ys, style, color=colour, label=name, linewidth=2 + 0.7 * behind)
        for band in spread:
            low, high = np.subtract(ys, band), np.add(ys, band)
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    if panel.get("log_x"):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if panel.get("log_y"):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    label(axes, panel["title"], panel["x"], panel["y"])
    if len(panel["curves"]) > 1:
        title = "wider: behind" if panel.get("nested") else None
        axes.legend(fontsize=FONT - 1, frameon=False, title=title, title_fontsize=FONT - 1)


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
    """A legend above all panels, in as few rows as fit, of one length; none without handles."""
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        rows = math.ceil(len(handles) / max(85 // (longest + 8), 1))
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=math.ceil(len(handles) / rows),
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
    place, content = files.path_of(path, "path"), io.BytesIO()
    kind = place.suffix.removeprefix(".") or "png"
    own = {"Software": None} if kind == "png" else {}  # no version of matplotlib
    figure.savefig(content, dpi=DPI, format=kind, metadata=own)
    place.parent.mkdir(parents=True, exist_ok=True)
    files.write(place, content.getvalue())
    return path


def _wrapped(axes: Axes, title: str) -> str:
    """The title in lines that are no wider than the columns of panels over which it stands."""
    spec, width = axes.get_subplotspec(), WIDTH
    if spec is not None:
        width *= len(spec.colspan) / spec.get_gridspec().ncols
    most = int(72 * (width - 0.3) / (_CHARACTER * TITLE))
    return "\n".join(textwrap.fill(line, most) for line in title.split("\n"))


def _ends(x: str, y: str) -> tuple[str, str]:
    """The ends of two dotted paths, as short as they can be and still differ."""
    pairs = zip(*(("." + path).split(".")[::-1] for path in (x, y)), strict=False)
    count = 1 + next((index for index, (of_x, of_y) in enumerate(pairs) if of_x != of_y), 0)
    return tuple(".".join(path.split(".")[-count:]) for path in (x, y))


def _unevenness(values: Sequence[float]) -> float:
    """The largest gap between neighbours over the smallest one."""
    gaps = np.diff(values)
    return gaps.max() / gaps.min()


def _limits(finite: np.ndarray) -> tuple[float, float]:
    """Of the colours: from the lowest value that is no outlier to the highest one."""
    if not len(finite):
        return 0.0, 1.0
    middle = np.median(finite)
    spread = np.median(np.abs(finite - middle))
    kept = finite[finite >= middle - _OUTLYING * spread] if spread else finite
    return kept.min(), finite.max()


def _spread(axis: Axis, centres: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted centres on the axis's scale, and the borders of cells around them, in their middle."""
    at = axis.get_transform().transform(np.asarray(centres, float))
    middle = (at[1:] + at[:-1]) / 2
    return at, np.asarray([2 * at[0] - middle[0], *middle, 2 * at[-1] - middle[-1]])


def _edges(axis: Axis, centres: Sequence[float]) -> np.ndarray:
    """The borders of cells, as numbers."""
    return axis.get_transform().inverted().transform(_spread(axis, centres)[1])


def _set_ticks(axis: Axis, centres: Sequence[float], closest: float) -> None:
    """Ticks at the centres, where all of them have room for a number."""
    at, borders = _spread(axis, centres)
    if np.diff(at).min() >= closest * (borders[-1] - borders[0]):
        axis.set_ticks(centres, [f"{value:g}" for value in centres])
        axis.set_ticks([], minor=True)
    axis.set_minor_formatter(NullFormatter())


def _draw_map(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    values: np.ndarray,
    limits: tuple[float, float],
    colour_label: str,
    log: bool = False,
) -> None:
    """A map with its colour bar; what is not finite is hatched, what lies below is white."""
    axes.set_xscale(**scale_of(xs))
    axes.set_yscale(**scale_of(ys))
    edges = _edges(axes.xaxis, xs), _edges(axes.yaxis, ys)
    scale = (LogNorm if log else Normalize)(*limits)
    shown = np.ma.masked_invalid(values)
    colours = matplotlib.colormaps[_MAP].with_extremes(under="white")
    mesh = axes.pcolormesh(*edges, shown, cmap=colours, norm=scale)
    axes.patch.set(hatch="///", edgecolor=LIGHT_GREY)
    below = np.any(values[np.isfinite(values) & ((values > 0) | (not log))] < limits[0])
    bar = axes.figure.colorbar(mesh, ax=axes, extend="min" if below else "neither")
    bar.set_label(colour_label, fontsize=FONT)
    bar.ax.tick_params(which="both", labelsize=FONT)
    width = axes.get_subplotspec().get_gridspec().ncols
    _set_ticks(axes.xaxis, xs, width * _CLOSEST_TICKS)
    _set_ticks(axes.yaxis, ys, width * _CLOSEST_TICKS / 2)
    axes.set_xlim(edges[0][[0, -1]])
    axes.set_ylim(edges[1][[0, -1]])


def _mark_below(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], values: np.ndarray, lowest: float
) -> None:
    """Writes the values below the colours into their cells, under the middle."""
    if len(xs) > _MOST_NUMBERED:
        return
    under = offset_copy(axes.transData, axes.figure, y=-4, units="points")
    for row, column in np.argwhere(values < lowest):
        text = f"{values[row, column]:.3g}"
        style = dict(ha="center", va="top", fontsize=FONT - 1, transform=under)
        axes.text(xs[column], ys[row], text, clip_on=True, **style)


def _mark_special(axes: Axes, xs: Sequence[float], ys: Sequence[float], named: bool = True) -> None:
    """The known divergences on the (alpha, beta) plane, and the line of the alpha-divergences."""
    to_scale = axes.xaxis.get_transform()
    alphas = to_scale.inverted().transform(np.linspace(*to_scale.transform(axes.get_xlim()), 200))
    betas = np.where((alphas < 1) | (axes.get_yscale() != "log"), 1 - alphas, np.nan)
    axes.plot(alphas, betas, "--", color="white", linewidth=1.5, path_effects=_OUTLINE)
    for (alpha, beta), name in _SPECIAL:
        if not (xs[0] <= alpha <= xs[-1] and ys[0] <= beta <= ys[-1]):
            continue
        axes.scatter(alpha, beta, color="white", edgecolor="black", s=45, zorder=3)
        style = dict(fontsize=FONT - 1, color="white", path_effects=_OUTLINE)
        # Off the line: to the right and above, or, where there is no room for it, the other way.
        place = dict(ha="left", va="bottom", xytext=(6, 5))
        if alpha == 1:
            place = dict(ha="right", va="top", xytext=(-6, -5))
        shown = name if named else ""
        axes.annotate(shown, (alpha, beta), textcoords="offset points", **place, **style)
