"""The figures that all tasks share: curves by step."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from abkd_jax import figures
from abkd_jax.report.files import Report
from abkd_jax.tasks.task import Column

_UNITS = {"entropy": "nats", "mass_flow": "probability", "gradient_cosine": "cosine"}
_MOST_MARKERS = 20  # a line through few points does not show where they are, or shows nothing


def learning_curves(report: Report, score: Column) -> Figure:
    """Training losses on the left, the score in the course of training on the right."""
    split = report.result["selected_on"]
    figure = figures.new(4.0)
    left, right = figure.subplots(1, 2)
    figures.label(left, "Training loss", "step", "loss")
    title = f"{split.capitalize()} {words(score.key)}"
    figures.label(right, title, "step", score.title.replace(" %", " (%)"))
    _draw(left, report, "{}/loss", _MOST_MARKERS)
    _draw(right, report, f"{split}/{{}}/{score.key}", _MOST_MARKERS, score.factor)
    for axes in (left, right):
        if axes.lines:
            axes.set_xlim(left=0)
        else:
            figures.say(axes, "no rows in metrics.jsonl")
    losses = [loss for line in left.lines for loss in line.get_ydata() if math.isfinite(loss)]
    if losses and 0 < 100 * min(losses) < max(losses):
        left.set_yscale("log")
    _legend(figure, report)
    return figure


def analysis(report: Report) -> Figure:
    """A panel for each metric of `config.analysis`, by step, with a curve for each network."""
    metrics = analysed(report)
    figure, panels = figures.new_grid(len(metrics), columns=2, height=2.4, above=0.4)
    for axes, metric in zip(panels, metrics, strict=True):
        _draw(axes, report, f"analysis/{{}}/{metric}", math.inf)
        title = words(metric).replace("/", ": ", 1).replace("/", ", ")
        last = metric in metrics[-2:]
        figures.label(axes, title, "step" if last else None, _UNITS.get(metric.split("/")[0]))
    _legend(figure, report)
    return figure


def analysed(report: Report) -> list[str]:
    """The metrics of `config.analysis` that the rows have."""
    keys = (key for seeds in report.rows.values() for rows in seeds for row in rows for key in row)
    return list(dict.fromkeys(key.split("/", 2)[2] for key in keys if key.startswith("analysis/")))


def words(key: str) -> str:
    """A key as it is read."""
    return key.replace("_", " ")


def _draw(axes: Axes, report: Report, key: str, most_markers: float, factor: float = 1) -> None:
    """A curve for each network whose name, in place of {}, makes a key of rows; null is a gap.

    Those of further seeds are faint.
    """
    pairs = ((name, seed) for name in report.networks for seed in range(len(report.seeds(name))))
    for name, seed in pairs:
        rows, borders = report.history(name, seed)
        points = [(row["step"], row[key.format(name)]) for row in rows if key.format(name) in row]
        if not points:
            continue
        steps, values = np.array(points, float).T
        marker = "o" if len(steps) <= most_markers else None
        style = dict(color=report.colours[name], linewidth=1.8, marker=marker, markersize=4)
        style |= dict(alpha=0.35, zorder=1) if seed else {}
        axes.plot(steps, factor * values, label=name, **style)
        whole = axes.get_xaxis_transform()  # from the lower end of the axes to the upper one
        axes.vlines(borders, 0, 1, transform=whole, color=figures.GREY, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _legend(figure: Figure, report: Report) -> None:
    trained = [name for name in report.networks if report.history(name)[0]]
    figures.legend(figure, figures.patches(trained, report.colours))
