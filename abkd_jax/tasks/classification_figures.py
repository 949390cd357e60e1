"""The figures of a report on classification: reliability diagrams, and examples."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from abkd_jax import figures
from abkd_jax.tasks.task import Column

NUM_EXAMPLES = 8
NUM_TOP_CLASSES = 5
FEWEST = 10  # examples of a bin of which the accuracy is drawn as known: its deviation is <= 16 %
_ECE = Column("ece", "ECE %", 100, 1)
_LONGEST_NAME = 14  # characters that fit beside an example's bars


def reliability(report: Any) -> Figure:
    """A panel a network: accuracy by confidence, before and after temperature scaling.

    A bin of fewer than `FEWEST` examples is hollow, and no line goes through it.
    """
    columns = min(len(report.networks), 4)
    rows = math.ceil(len(report.networks) / columns)
    side = min(7 / columns - 0.3, 2.5)  # of a panel, in inches
    figure = figures.new(0.7 + rows * (4 / 3 * side + 1.4), layout="compressed")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    last = {name: network["last"] for name, network in report.networks.items()}
    counts = np.array([scores["reliability"]["count"] for scores in last.values()], float)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    highest = max(10 * math.ceil(shares.max() / 10), 1)
    for index, (name, scores) in enumerate(last.items()):
        row, column = divmod(index, columns)
        panel, below = (figure.add_subplot(grid[2 * row + part, column]) for part in (0, 1))
        _draw_reliability(panel, name, scores, report.colours[name])
        _draw_shares(below, shares[index], highest)
        for axes, label in ((panel, "accuracy (%)"), (below, "share (%)")):
            axes.set_ylabel("" if column else label, fontsize=figures.FONT)
            axes.tick_params(labelleft=not column, labelbottom=axes is below)
    handles = [
        Patch(facecolor=figures.LIGHT_GREY, edgecolor=figures.GREY, label="as trained"),
        Line2D([], [], color="black", marker="o", label="temperature-scaled"),
        Line2D([], [], color=figures.GREY, linestyle="--", label="perfect"),
    ]
    scaled = [scores["scaled"]["reliability"] for scores in last.values() if scores["scaled"]]
    if not scaled:
        del handles[1]
    drawn = [scores["reliability"] for scores in last.values()] + scaled
    if any(0 < count < FEWEST for diagram in drawn for count in diagram["count"]):
        handles.append(_hollow(f"fewer than {FEWEST} examples"))
    figures.legend(figure, handles)
    return figure


def examples(report: Any) -> Figure:
    """The examples with the class distribution that each network gives them."""
    arrays = report.examples
    names = [name for name in report.networks if f"probabilities/{name}" in arrays]
    labels, images = arrays["labels"][:NUM_EXAMPLES].tolist(), arrays.get("images", np.zeros(0))
    have_images = images.ndim == 4 and images.shape[-1] in (1, 3, 4)
    given = [
        {name: arrays[f"probabilities/{name}"][index] for name in names}
        for index in range(len(labels))
    ]
    classes = [_shown_classes(*pair) for pair in zip(given, labels, strict=True)]
    most = max(map(len, classes), default=1)
    rows = max(math.ceil(len(labels) / 2), 1)
    figure = figures.new(1.0 + rows * max(0.27 * most + 0.15, 1.0))
    ratios = [1, 1.5] if have_images else [1]
    grid = figure.add_gridspec(rows, 2 * len(ratios), width_ratios=2 * ratios)
    for index in range(len(labels)):
        row, column = divmod(index, 2)
        if have_images:
            _draw_image(figure.add_subplot(grid[row, 2 * column]), images[index])
        axes = figure.add_subplot(grid[row, (column + 1) * len(ratios) - 1])
        _draw_bars(axes, report, given[index], classes[index])
        # Room for as many classes as anywhere, so that bars are equally thick in every panel.
        axes.set_ylim(most - 0.5, -0.5)
        lowest = index + 2 >= len(labels)
        axes.tick_params(labelbottom=lowest)
        axes.set_xlabel("probability (%)" if lowest else "", fontsize=figures.FONT)
    if not labels or not names:
        figures.say(figure.add_subplot(grid[:, :]), "no examples in examples.npz")
    figures.legend(figure, figures.patches(names, report.colours))
    return figure


def _draw_reliability(axes: Axes, name: str, scores: Mapping[str, Any], colour: str) -> None:
    _, accuracy, known = _bins(scores["reliability"])
    edges = np.linspace(0, 100, len(accuracy) + 1)
    few = np.isfinite(accuracy) & ~known
    looks = {"color": colour, "alpha": 0.45}, {"fill": False, "linestyle": ":"}
    for chosen, look in zip((known, few), looks, strict=True):
        style = dict(width=edges[1], align="edge", edgecolor=colour) | look
        axes.bar(edges[:-1][chosen], accuracy[chosen], **style)
    axes.plot([0, 100], [0, 100], color=figures.GREY, linestyle="--", linewidth=1.2)
    ece = _ECE.cell(scores["ece"])
    if scores["scaled"]:
        *points, known = _bins(scores["scaled"]["reliability"])
        line = np.where(known | np.isnan(points[1]), points, np.inf)  # which breaks it
        _draw_points(axes, line[:, ~np.isnan(line[1])], linewidth=1.6)
        few = np.isfinite(points[1]) & ~known
        if few.any():
            style = dict(linestyle="", markerfacecolor="white")
            _draw_points(axes, np.compress(few, points, axis=1), **style)
        ece += f" → {_ECE.cell(scores['scaled']['ece'])}"
    figures.label(axes, f"{_short(name)}\nECE {ece} %", None, None)
    axes.set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 50, 100))
    axes.set_box_aspect(1)


def _bins(diagram: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each bin the confidence and accuracy in per cent, NaN if empty; whether it has enough."""
    points = 100 * np.array([diagram["confidence"], diagram["accuracy"]], float)
    return *points, np.asarray(diagram["count"]) >= FEWEST


def _draw_points(axes: Axes, points: np.ndarray, **style: Any) -> None:
    """Those of the scaled network, whole at the frame, too."""
    axes.plot(*points, color="black", marker="o", markersize=3.5, clip_on=False, zorder=3, **style)


def _hollow(label: str) -> Line2D:
    """What a legend shows of a bin of few examples."""
    return Line2D(
        [], [], color="black", linestyle=":", marker="o", markerfacecolor="white", label=label
    )


def _draw_shares(axes: Axes, shares: np.ndarray, highest: float) -> None:
    """Of the examples, in per cent, by bin of confidence."""
    edges = np.linspace(0, 100, len(shares) + 1)
    axes.bar(edges[:-1], shares, width=edges[1], align="edge", color=figures.LIGHT_GREY)
    figures.label(axes, None, "confidence (%)", None)
    axes.set(xlim=(0, 100), ylim=(0, highest), xticks=(0, 50, 100), yticks=(0, highest))
    for text, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set_horizontalalignment(side)  # so that neighbours' numbers stay apart
    axes.set_box_aspect(1 / 3)


def _draw_bars(axes: Axes, report: Any, given: Mapping[str, Any], classes: list[int]) -> None:
    """The networks' probabilities side by side for each of the classes, of which one is true."""
    height = 0.8 / max(len(given), 1)
    for index, (name, probabilities) in enumerate(given.items()):
        at = np.arange(len(classes)) + (index - (len(given) - 1) / 2) * height
        axes.barh(at, 100 * probabilities[classes], height, color=report.colours[name])
    figures.label(axes, None, None, None)
    true, *others = (_short(report.class_name(k)) for k in classes)
    axes.set_yticks(range(len(classes)), [f"{true} ✓", *others], parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 100), xticks=(0, 50, 100))


def _shown_classes(probabilities: Mapping[str, np.ndarray], label: int) -> list[int]:
    """The true class, then of the likeliest by the maximum over networks those of 1 % or more."""
    if not probabilities:
        return [label]
    highest = np.max(list(probabilities.values()), axis=0)
    order = np.argsort(-highest, kind="stable")[:NUM_TOP_CLASSES]
    return [label, *(int(k) for k in order if k != label and highest[k] >= 0.01)]


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    scale = 255 if np.issubdtype(image.dtype, np.integer) else 1
    axes.imshow(np.clip(image.astype(float) / scale, 0, 1), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def _short(name: str) -> str:
    """The name, without its middle if it is long: names often differ at their ends."""
    if len(name) <= _LONGEST_NAME:
        return name
    return name[: _LONGEST_NAME // 2] + "…" + name[1 - _LONGEST_NAME // 2 :]
