"""The report of a run: a page and three figures, made of the files of its workdir and nothing else.

It is a function of these files, so it can be made again at any time.
"""

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from abkd_jax import figures
from abkd_jax.train import writer

_CONFIG = ("config", "versions", "commit", "device")
_RESULT = ("mode", "num_classes", "class_names", "evaluated_on", "selected_on", "networks")
_NETWORK = ("parameters", "steps", "last", "best")
_CALIBRATION = ("nll", "brier", "ece", "adaptive_ece", "reliability")
_SCORES = ("accuracy", "top5", "class_accuracy", "count", "temperature", "scaled", *_CALIBRATION)
_ON_FEW_LABELS = ("student", "baseline")  # the teachers of an offline run see all
_OF_TERMS = ("weight", "where", "other")  # what a term's group has besides its loss
_MISSING = "-"

_USUAL_NAMES = ("teacher", "baseline", "student")
_NUM_EXAMPLES = 8
_NUM_TOP_CLASSES = 5
_LONGEST_NAME = 14  # characters that fit beside an example's bars


@dataclasses.dataclass(frozen=True)
class Run:
    """What the files of a workdir say.

    Attributes:
        config: the resolved config.
        origin: "versions", "commit" and "device".
        result: result.json.
        rows: by network, the rows of its metrics.jsonl; empty for one that was loaded.
        examples: the arrays of examples.npz.
    """

    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Mapping[str, list[dict[str, Any]]]
    examples: Mapping[str, np.ndarray]

    @property
    def networks(self) -> Mapping[str, Mapping[str, Any]]:
        """The results of each network, by name."""
        return self.result["networks"]

    def colour(self, name: str) -> str:
        """A network's colour: the same in every figure, and in all offline runs for usual names."""
        usual = _USUAL_NAMES if self.result["mode"] == "offline" else ()
        order = [*usual, *(other for other in self.networks if other not in usual)]
        return figures.COLOURS[order.index(name) % len(figures.COLOURS)]

    def class_name(self, index: int) -> str:
        """A class's name, or its number where names are not given."""
        names = self.result["class_names"]
        return str(names[index]) if names else str(index)


def write(workdir: Path) -> Path:
    """Writes `report.md` and `figures/*.png` from the files of a run.

    Args:
        workdir: of a run that is done: config.json, result.json, examples.npz, and metrics.jsonl of
            what was trained, in workdir or, for an offline run's other networks, in workdir/NAME.

    Returns:
        The path of the page.

    Raises:
        ValueError: one sentence that names a file that is missing, unreadable or incomplete.
    """
    workdir = Path(workdir)
    run = load(workdir)
    (workdir / "figures").mkdir(exist_ok=True)
    pictures = {
        "learning_curves": learning_curves(run),
        "reliability": reliability(run),
        "examples": examples(run),
    }
    if _analysed(run):
        pictures["analysis"] = analysis(run)
    for name, figure in pictures.items():
        # Without the version of matplotlib, the bytes depend on the picture alone.
        figure.savefig(
            workdir / "figures" / f"{name}.png", dpi=figures.DPI, metadata={"Software": None}
        )
    path = workdir / "report.md"
    path.write_text(page(run), encoding="utf-8")
    return path


def load(workdir: Path) -> Run:
    """Reads the files of a run.

    Args:
        workdir: as of `write`.

    Returns:
        What they say.

    Raises:
        ValueError: one sentence that names a file that is missing, unreadable or incomplete.
    """
    origin = _read_json(workdir / "config.json", _CONFIG)
    _check_keys(workdir / "config.json", origin["config"], ("data",), "config.")
    _check_keys(workdir / "config.json", origin["config"]["data"], ("name",), "config.data.")
    result = _read_json(workdir / "result.json", _RESULT)
    for name, network in result["networks"].items():
        _check_network(workdir / "result.json", network, f"networks.{name}.")
    together = result["mode"] == "online"
    rows = {
        name: writer.read(workdir if together or name == "student" else workdir / name)
        for name in result["networks"]
    }
    return Run(origin["config"], origin, result, rows, _read_arrays(workdir / "examples.npz"))


def page(run: Run) -> str:
    """The page, in Markdown."""
    blocks = [
        f"# Knowledge distillation on {_plain(run.config['data']['name'])}",
        " ".join(_what_was_run(run)),
        _origin(run),
        "## Results",
        _results(run),
        *_best(run),
        "## Calibration",
        *_scaling(run),
        *_classes(run),
        "## Figures",
        "![Learning curves](figures/learning_curves.png)",
        f"*Figure 1. Training loss and {run.result['selected_on']} accuracy of each network by "
        "step. The losses are of each network's own objective, so their levels do not compare.*",
        "![Reliability](figures/reliability.png)",
        f"*Figure 2. Accuracy by confidence on the {run.result['evaluated_on']} data, in bins of "
        "equal width: bars as trained, line after temperature scaling, dashed line perfect "
        "calibration. Below, the share of the examples in each bin. ECE before → after scaling.*",
        "![Examples](figures/examples.png)",
        f"*Figure 3. Probabilities that each network gives to {run.result['evaluated_on']} "
        f"examples: the true class (bold, ✓) and up to {_NUM_TOP_CLASSES} others that some network "
        "finds likely.*",
        *_analysis(run),
    ]
    return "\n\n".join(blocks) + "\n"


def learning_curves(run: Run) -> Figure:
    """Training losses on the left, accuracies in the course of training on the right."""
    split = run.result["selected_on"]
    figure = figures.new(4.0)
    left, right = figure.subplots(1, 2)
    for axes, title, label, key, factor in (
        (left, "Training loss", "loss", "{}/loss", 1),
        (right, f"{split.capitalize()} accuracy", "accuracy (%)", f"{split}/{{}}/accuracy", 100),
    ):
        figures.label(axes, title, "step", label)
        for name in run.networks:
            steps, values = _series(run.rows[name], key.format(name))
            if len(steps):
                axes.plot(
                    steps,
                    factor * values,
                    color=run.colour(name),
                    label=name,
                    linewidth=1.8,
                    # A line through few points does not show where they are, or shows nothing.
                    marker="o" if len(steps) <= 20 else None,
                    markersize=4,
                )
        if axes.lines:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        else:
            _say(axes, "no rows in metrics.jsonl")
    losses = [line.get_ydata() for line in left.lines]
    if _decades(losses) > 2:
        left.set_yscale("log")
    _legend(figure, _patches(run, [name for name in run.networks if run.rows[name]]))
    return figure


def reliability(run: Run) -> Figure:
    """A panel a network: accuracy by confidence, before and after temperature scaling."""
    columns = min(len(run.networks), 4)
    rows = math.ceil(len(run.networks) / columns)
    side = min(7 / columns - 0.3, 2.5)  # of a panel, in inches
    figure = figures.new(0.4 + rows * (4 / 3 * side + 1.4), layout="compressed")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    shares = {name: _share(network) for name, network in run.networks.items()}
    highest = 10 * math.ceil(max(share.max() for share in shares.values()) / 10)
    for index, (name, network) in enumerate(run.networks.items()):
        row, column = divmod(index, columns)
        panel = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=panel)
        _reliability_panel(panel, name, network, run.colour(name))
        _share_panel(below, shares[name], highest)
        panel.tick_params(labelbottom=False)
        for axes, label in ((panel, "accuracy (%)"), (below, "share (%)")):
            axes.set_ylabel("" if column else label, fontsize=figures.FONT)
            axes.tick_params(labelleft=not column)
    handles = [
        Patch(facecolor=figures.LIGHT_GREY, edgecolor=figures.GREY, label="as trained"),
        Line2D([], [], color="black", marker="o", label="temperature-scaled"),
        Line2D([], [], color=figures.GREY, linestyle="--", label="perfect"),
    ]
    if not any(network["last"]["scaled"] for network in run.networks.values()):
        del handles[1]
    _legend(figure, handles)
    return figure


def examples(run: Run) -> Figure:
    """The first examples with the class distribution that each network gives them."""
    names = [name for name in run.networks if f"probabilities/{name}" in run.examples]
    labels = [int(label) for label in run.examples["labels"][:_NUM_EXAMPLES]]
    images = _images(run.examples)
    given = [
        {name: _array(run.examples[f"probabilities/{name}"][index]) for name in names}
        for index in range(len(labels))
    ]
    classes = [_shown_classes(*pair) for pair in zip(given, labels, strict=True)]
    most = max(map(len, classes), default=1)
    columns = 2
    rows = max(math.ceil(len(labels) / columns), 1)
    figure = figures.new(1.0 + rows * max(0.27 * most + 0.15, 1.0))
    ratios = ([1, 1.5] if images is not None else [1]) * columns
    grid = figure.add_gridspec(rows, len(ratios), width_ratios=ratios)
    for index, label in enumerate(labels):
        row, column = divmod(index, columns)
        if images is not None:
            _draw_image(figure.add_subplot(grid[row, 2 * column]), images[index])
        axes = figure.add_subplot(grid[row, (column + 1) * len(ratios) // columns - 1])
        _distribution(axes, run, given[index], classes[index], label)
        # Room for as many classes as anywhere, so that bars are equally thick in every panel.
        axes.set_ylim(most - 0.5, -0.5)
        lowest = index + columns >= len(labels)
        axes.tick_params(labelbottom=lowest)
        axes.set_xlabel("probability (%)" if lowest else "", fontsize=figures.FONT)
    if not labels or not names:
        _say(figure.add_subplot(grid[:, :]), "no examples in examples.npz")
    _legend(figure, _patches(run, names))
    return figure


def analysis(run: Run) -> Figure:
    """A panel for each metric of `config.analysis`, by step, with a curve for each network."""
    metrics = _analysed(run)
    rows = math.ceil(len(metrics) / 2)
    figure = figures.new(2.4 * rows + 0.4)
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics, strict=False):
        for name in run.networks:
            steps, values = _series(run.rows[name], f"analysis/{name}/{metric}")
            axes.plot(steps, values, "o-", color=run.colour(name), linewidth=1.8, markersize=4)
        title = metric.replace("_", " ").replace("/", ": ", 1).replace("/", ", ")
        last = metric in metrics[-2:]
        figures.label(axes, title, "step" if last else None, _units(metric))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    _legend(figure, _patches(run, run.networks))
    return figure


# --- the page's parts -----------------------------------------------------------------------------


def _what_was_run(run: Run) -> list[str]:
    mode, data = run.result["mode"], run.config["data"]
    names = ", ".join(f"`{name}`" for name in run.networks)
    said = [f"An {mode} run on the data set `{data['name']}` with the networks {names}."]
    for name in run.networks:
        term = run.config.get(name, {}).get("terms", {}).get("distill")
        if term:
            said.append(f"The {name} is distilled by `{_distillation(term)}`.")
    if mode == "offline" and "teacher" in run.networks:
        checkpoint = run.config.get("teacher", {}).get("checkpoint")
        how = f"loaded from `{checkpoint}`" if checkpoint else "trained on all labels"
        said.append(f"The teacher was {how}.")
    labelled, num_classes = data.get("labelled"), run.result["num_classes"]
    if labelled is not None:
        learners = [name for name in run.networks if mode == "online" or name in _ON_FEW_LABELS]
        said.append(
            f"Trained on {labelled:,} labels, {labelled / num_classes:g} of each of the "
            f"{num_classes} classes: {', '.join(learners)}."
        )
    return said


def _distillation(term: Mapping[str, Any]) -> str:
    """The divergence of a term, or the whole loss of one that has none."""
    if "divergence" in term:
        return _call(term["divergence"])
    return _call({key: value for key, value in term.items() if key not in _OF_TERMS})


def _origin(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.origin["versions"].items())
    commit = f"commit `{run.origin['commit']}`" if run.origin["commit"] else "commit unknown"
    return f"Made with {versions}; {commit}; on {_plain(run.origin['device'])}."


def _analysed(run: Run) -> list[str]:
    """The metrics of `config.analysis` that the rows have."""
    return list(
        dict.fromkeys(
            key.split("/", 2)[2]
            for rows in run.rows.values()
            for row in rows
            for key in row
            if key.startswith("analysis/")
        )
    )


def _units(metric: str) -> str:
    kinds = {"entropy": "nats", "mass_flow": "probability", "gradient_cosine": "cosine"}
    return kinds.get(metric.split("/")[0], "")


def _analysis(run: Run) -> list[str]:
    """The figure of `config.analysis`, and what its metrics cost."""
    if not _analysed(run):
        return []
    parts = list(run.rows.values())  # of an online run the same ones for each network
    rows = parts[0] if run.result["mode"] == "online" else [row for part in parts for row in part]
    spent, whole = (
        sum(row.get(key) or 0.0 for row in rows)
        for key in ("time/analysis_seconds", "time/seconds")
    )
    return [
        "## Analysis",
        f"Measuring this took {spent:.1f} s, {100 * spent / whole:.1f} % of the time of training "
        "and evaluation together, compilation included.",
        "![Analysis](figures/analysis.png)",
        "*Figure 4. How each network's objective moves it, on the same few training batches every "
        "time: one gradient step on the logits (mass flow), or on the parameters (gradients).*",
    ]


def _results(run: Run) -> str:
    counts = {int(network["last"]["count"]) for network in run.networks.values()}
    counted = " or ".join(f"{count:,}" for count in sorted(counts))
    header = ["network", *_SCORE_COLUMNS, "parameters", "steps", "time"]
    rows = [
        [
            name,
            *_score_cells(run, network["last"]),
            f"{network['parameters']:,}",
            f"{network['steps']:,}",
            _time(run.rows[name]),
        ]
        for name, network in run.networks.items()
    ]
    said = f"After the last step, on {counted} {run.result['evaluated_on']} examples"
    if run.result["mode"] == "online" and len(run.networks) > 1:
        said += "; the networks are trained at once, so the time is that of all"
    return f"{said}:\n\n{_table(header, rows)}"


_SCORE_COLUMNS = ("accuracy %", "top-5 %", "NLL (nats)", "ECE %", "adaptive ECE %", "Brier")


def _score_cells(run: Run, scores: Mapping[str, Any]) -> list[str]:
    # Among five classes or fewer the label is always one of five.
    top5 = scores["top5"] if run.result["num_classes"] > 5 else None
    return [
        _number(scores["accuracy"], 2, 100),
        _number(top5, 2, 100),
        _number(scores["nll"], 4),
        _number(scores["ece"], 2, 100),
        _number(scores["adaptive_ece"], 2, 100),
        _number(scores["brier"], 4),
    ]


def _best(run: Run) -> list[str]:
    """The table of the best steps, where they are not the last ones."""
    selected, evaluated = run.result["selected_on"], run.result["evaluated_on"]
    rows = [
        [
            name,
            f"{network['best']['step']:,}",
            _number(network["best"]["accuracy"], 2, 100),
            *_score_cells(run, network["best"]["scores"]),
        ]
        for name, network in run.networks.items()
        if network["best"] and network["best"]["step"] != network["steps"]
    ]
    if not rows:
        return []
    if selected == evaluated:
        said = (
            f"At the step of the highest {selected} accuracy. These figures are selected on "
            f"{evaluated} data, as the published protocol does, so they are optimistic:"
        )
    else:
        said = (
            f"At the step of the highest {selected} accuracy, measured on {evaluated} data, which "
            "had no part in the selection:"
        )
    return [said, _table(["network", "step", f"{selected} accuracy %", *_SCORE_COLUMNS], rows)]


def _scaling(run: Run) -> list[str]:
    """The table of the scores before and after temperature scaling."""
    rows = []
    for name, network in run.networks.items():
        scores = network["last"]
        if scores["scaled"]:
            temperature = _number(scores["temperature"], 3)
            rows.append([name, "before", "1", *_calibration_cells(scores)])
            rows.append([name, "after", temperature, *_calibration_cells(scores["scaled"])])
    if not rows:
        return ["There is no temperature scaling, for no validation data to fit it on."]
    header = ["network", "scaling", "T", "NLL (nats)", "ECE %", "adaptive ECE %", "Brier"]
    return [
        "Before and after temperature scaling, with T fitted on validation data:",
        _table(header, rows),
    ]


def _calibration_cells(scores: Mapping[str, Any]) -> list[str]:
    return [
        _number(scores["nll"], 4),
        _number(scores["ece"], 2, 100),
        _number(scores["adaptive_ece"], 2, 100),
        _number(scores["brier"], 4),
    ]


def _classes(run: Run) -> list[str]:
    """The classes on which the student gains or loses most against the baseline."""
    if not {"student", "baseline"} <= set(run.networks):
        return []
    after, before = (
        _array(run.networks[name]["last"]["class_accuracy"]) for name in ("student", "baseline")
    )
    changes = [
        (
            y - x,
            f"class {_plain(run.class_name(k))} ({100 * (y - x):+.1f} points, "
            f"{100 * x:.1f} → {100 * y:.1f} %)",
        )
        for k, (x, y) in enumerate(zip(before, after, strict=True))
        if math.isfinite(y - x)  # the test data may lack a class
    ]
    changes.sort(key=lambda change: change[0])  # ties stay in the order of classes
    losses = [text for change, text in changes[:3] if change < 0]
    gains = [text for change, text in reversed(changes[-3:]) if change > 0]
    if not losses and not gains:
        return []
    return [
        "## Classes",
        "Accuracy of the student within a class, against the baseline (the student on its labels "
        "alone):",
        f"- gained most: {', '.join(gains) or 'none'}\n- lost most: {', '.join(losses) or 'none'}",
    ]


# --- the figures' parts ---------------------------------------------------------------------------


def _reliability_panel(axes: Axes, name: str, network: Mapping[str, Any], colour: str) -> None:
    scores = network["last"]
    accuracy = 100 * _array(scores["reliability"]["accuracy"])
    edges = np.linspace(0, 100, len(accuracy) + 1)
    filled = np.isfinite(accuracy)
    axes.bar(
        edges[:-1][filled],
        accuracy[filled],
        width=edges[1],
        align="edge",
        color=colour,
        alpha=0.45,
        edgecolor=colour,
    )
    axes.plot([0, 100], [0, 100], color=figures.GREY, linestyle="--", linewidth=1.2)
    ece = _number(scores["ece"], 1, 100)
    if scores["scaled"]:
        scaled = scores["scaled"]["reliability"]
        confidence, accuracy = _array(scaled["confidence"]), _array(scaled["accuracy"])
        seen = np.isfinite(accuracy)  # an empty bin would break the line
        axes.plot(
            100 * confidence[seen],
            100 * accuracy[seen],
            color="black",
            linewidth=1.6,
            marker="o",
            markersize=3.5,
        )
        ece += f" → {_number(scores['scaled']['ece'], 1, 100)}"
    figures.label(axes, f"{_short(name)}\nECE {ece} %", None, None)
    axes.set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 50, 100))
    axes.set_box_aspect(1)


def _share(network: Mapping[str, Any]) -> np.ndarray:
    """Of the examples, in percent, by bin of confidence."""
    counts = _array(network["last"]["reliability"]["count"])
    return 100 * counts / max(counts.sum(), 1)


def _share_panel(axes: Axes, share: np.ndarray, highest: float) -> None:
    edges = np.linspace(0, 100, len(share) + 1)
    axes.bar(edges[:-1], share, width=edges[1], align="edge", color=figures.LIGHT_GREY)
    figures.label(axes, None, "confidence (%)", None)
    axes.set(ylim=(0, max(highest, 1)), yticks=(0, max(highest, 1)))
    axes.set_box_aspect(1 / 3)


def _distribution(
    axes: Axes,
    run: Run,
    probabilities: Mapping[str, np.ndarray],
    classes: Sequence[int],
    label: int,
) -> None:
    """The networks' bars side by side for each of the classes."""
    height = 0.8 / max(len(probabilities), 1)
    for index, (name, values) in enumerate(probabilities.items()):
        at = np.arange(len(classes)) + (index - (len(probabilities) - 1) / 2) * height
        axes.barh(at, 100 * values[classes], height=height, color=run.colour(name))
    figures.label(axes, None, None, None)
    names = [_short(run.class_name(k)) + (" ✓" if k == label else "") for k in classes]
    axes.set_yticks(range(len(classes)), names, parse_math=False)
    axes.get_yticklabels()[classes.index(label)].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 100), xticks=(0, 50, 100))


def _shown_classes(probabilities: Mapping[str, np.ndarray], label: int) -> list[int]:
    """The true class, then of the likeliest by the maximum over networks those of 1 % or more."""
    if not probabilities:
        return [label]
    highest = np.max(list(probabilities.values()), axis=0)
    order = np.argsort(-highest, kind="stable")[:_NUM_TOP_CLASSES]
    return [label, *(int(k) for k in order if k != label and highest[k] >= 0.01)]


def _images(arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Images [n, H, W] or [n, H, W, 3 or 4]; None where the inputs are no images."""
    images = arrays.get("images")
    if images is None or images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        return None
    return images[..., 0] if images.shape[-1] == 1 else images


def _draw_image(axes: Axes, image: np.ndarray) -> None:
    scale = 255 if np.issubdtype(image.dtype, np.integer) else 1
    axes.imshow(np.clip(image.astype(float) / scale, 0, 1), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()


def _patches(run: Run, names: Iterable[str]) -> list[Artist]:
    return [Patch(color=run.colour(name), label=name) for name in names]


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """A legend above all panels, in as many columns as fit."""
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=min(len(handles), max(85 // (longest + 8), 1)),
            fontsize=figures.FONT,
            frameon=False,
        )


def _say(axes: Axes, text: str) -> None:
    axes.text(
        0.5, 0.5, text, ha="center", va="center", fontsize=figures.FONT, transform=axes.transAxes
    )
    axes.set(xticks=(), yticks=())


# --- numbers and text -----------------------------------------------------------------------------


def _series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the key; null is NaN, a gap in the line."""
    having = [row for row in rows if key in row]
    return np.array([row["step"] for row in having]), _array([row[key] for row in having])


def _decades(lines: Iterable[np.ndarray]) -> float:
    """How many powers of ten the values span; 0 unless all are positive."""
    values = np.concatenate([np.asarray(line, float) for line in lines] or [np.ones(1)])
    values = values[np.isfinite(values)]
    if not values.size or values.min() <= 0:
        return 0.0
    return math.log10(values.max() / values.min())


def _time(rows: Iterable[Mapping[str, Any]]) -> str:
    """The sum of the rows' seconds."""
    seconds = [row["time/seconds"] for row in rows if row.get("time/seconds") is not None]
    if not seconds:
        return _MISSING
    if sum(seconds) < 60:
        return f"{sum(seconds):.1f} s"
    minutes, rest = divmod(round(sum(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _array(values: Iterable[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], float)


def _number(value: float | None, digits: int, factor: float = 1) -> str:
    return _MISSING if value is None or math.isnan(value) else f"{factor * value:.{digits}f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _call(group: Any) -> str:
    """A config's group as a call: alpha_beta(alpha=0.8, beta=0.3)."""
    if not isinstance(group, Mapping):
        return str(group)
    inside = ", ".join(f"{key}={_call(value)}" for key, value in group.items() if key != "fn")
    return f"{group['fn']}({inside})" if "fn" in group else f"({inside})"


def _plain(text: str) -> str:
    """The text with Markdown's signs escaped."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in str(text))


def _short(name: str) -> str:
    """The name, without its middle if it is long: names often differ at their ends."""
    if len(name) <= _LONGEST_NAME:
        return name
    return name[: _LONGEST_NAME // 2] + "…" + name[1 - _LONGEST_NAME // 2 :]


# --- files ----------------------------------------------------------------------------------------


def _read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or unreadable ({error}).") from error
    _check_keys(path, content, keys, "")
    return content


def _check_keys(path: Path, content: Any, keys: Iterable[str], field: str) -> None:
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"{path} lacks {field + key!r}.")


def _check_network(path: Path, network: Any, field: str) -> None:
    _check_keys(path, network, _NETWORK, field)
    best = network["best"]
    _check_keys(path, best or {}, ("step", "accuracy", "scores") if best else (), f"{field}best.")
    scores = {"last.": network["last"]} | ({"best.scores.": best["scores"]} if best else {})
    for where, value in scores.items():
        _check_keys(path, value, _SCORES, field + where)
        if value["scaled"]:
            _check_keys(path, value["scaled"], _CALIBRATION, f"{field}{where}scaled.")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is missing or unreadable ({error}).") from error
    _check_keys(path, content, ("labels",), "")
    return content
