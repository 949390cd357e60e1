"""The page of a report, in Markdown."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abkd_jax import figures, files, markdown
from abkd_jax.report import curves
from abkd_jax.report.files import Report, load
from abkd_jax.tasks.task import Task

_OF_TERMS = ("weight", "where", "other")  # what a term's group has besides its loss
_OF_ANALYSIS = (
    "How each network's objective moves it, on the same few training batches every time: one "
    "gradient step on the logits (mass flow), or on the parameters (gradients)."
)
_ON_SPLIT = {
    "full": " on all labels",
    "labelled": " on the {:,} labelled examples alone",
    "train": " on all examples, of which {:,} have their labels",
}


def write(workdir: Path, task: Task) -> Path:
    """Writes `report.md` and `figures/*.png` from the files of a run.

    Args:
        workdir: of a run that is done, as of `load`.
        task: of the run.

    Returns:
        The path of the page.

    Raises:
        ValueError: one sentence that names a file that is missing, unreadable or incomplete.
        OSError: if a file cannot be written.
    """
    workdir = files.path_of(workdir)
    report = load(workdir)
    pictures = _pictures(report, task)
    text = page(report, task, {name: caption for name, (_, caption) in pictures.items()})
    for name, (figure, _) in pictures.items():
        figures.save(figure, workdir / "figures" / f"{name}.png")
    files.write(workdir / "report.md", text.encode())  # last, which says that all is there
    return workdir / "report.md"


def page(report: Report, task: Task, captions: Mapping[str, str]) -> str:
    """The page.

    Args:
        report: what is known of the run.
        task: its columns, and its sections, which follow the tables of scores.
        captions: of the figures, in their order.

    Returns:
        The text.
    """
    data = report.config["data"]
    data_name = data.get("name") or data["fn"]
    blocks = [
        f"# Knowledge distillation on {markdown.plain(data_name)}",
        " ".join(_what_was_run(report, data_name)),
        _origin(report.origin),
        "## Results",
        _results(report, task),
        *_speed(report, task),
        *_best(report, task),
        *task.sections(report),
        "## Figures",
    ]
    if report.has_seeds:
        blocks.append("Figures are of the first init seed; curves of the others are faint.")
    for number, (name, caption) in enumerate(captions.items(), start=1):
        if name == "analysis":
            blocks += ["## Analysis", _cost_of_analysis(report)]
        title = curves.words(name).capitalize()
        blocks += [f"![{title}](figures/{name}.png)", f"*Figure {number}. {caption}*"]
    return "\n\n".join(blocks) + "\n"


def _pictures(report: Report, task: Task) -> dict[str, tuple[Any, str]]:
    """All figures with their captions, by name."""
    score = f"{report.result['selected_on']} {curves.words(task.score_column.key)}"
    caption = (
        f"Training loss and {score} of each network by step. The losses are of each network's own "
        "objective, so their levels do not compare."
    )
    if any(report.history(name)[1] for name in report.networks):
        caption += " At a thin line a network's next phase begins."
    found = {"learning_curves": (curves.learning_curves(report, task.score_column), caption)}
    found |= task.figures(report)
    if curves.analysed(report):
        found["analysis"] = (curves.analysis(report), _OF_ANALYSIS)
    return found


def _what_was_run(report: Report, data_name: str) -> list[str]:
    networks = markdown.names(report.networks)
    said = [f"A run on the data set `{data_name}` with the networks {networks}."]
    for name in report.networks:
        group = report.config[name]
        if group["model"]["fn"] == "given":
            said.append(f"The {name} was given.")
        if group.get("weights"):
            said.append(f"The {name} was loaded by `{_call(group['weights'])}`.")
    labelled = report.config["data"].get("labelled") or None  # 0 for all of them
    num_classes = report.result["num_classes"]
    for phase in report.phases:
        learners = markdown.names(phase["learn"]) + " together" * (len(phase["learn"]) > 1)
        others = f" from {markdown.names(phase['see'])}" if phase["see"] else ""
        split = "" if labelled is None else _ON_SPLIT[phase["split"]].format(labelled)
        said.append(f"Phase `{phase['name']}` trained {learners}{others}{split}.")
        for name in phase["learn"]:
            own = report.config["phases"][phase["name"]].get(name) or {}
            terms = (report.config[name] | own).get("terms") or {}
            if "distill" in terms:
                said.append(f"The {name} is distilled by `{_distillation(terms['distill'])}`.")
    if report.has_seeds:
        counts = {name: len(report.seeds(name)) for name in report.networks}
        several = markdown.names(name for name, count in counts.items() if count > 1)
        said.append(f"Trained for {max(counts.values())} init seeds: {several}.")
    if labelled is not None:
        each = f"{labelled / num_classes:g} of each of the {num_classes} classes"
        said.append(f"The {labelled:,} labels are {each}.")
    return said


def _distillation(term: Mapping[str, Any]) -> str:
    """The divergence of a term, or the whole loss of one that has none."""
    loss = {key: value for key, value in term.items() if key not in _OF_TERMS}
    return _call(term.get("divergence", loss))


def _call(group: Any) -> str:
    """A config's group as a call: alpha_beta(alpha=0.8, beta=0.3)."""
    if not isinstance(group, Mapping):
        return str(group)
    inside = ", ".join(f"{key}={_call(value)}" for key, value in group.items() if key != "fn")
    return f"{group.get('fn', '')}({inside})"


def _origin(origin: Mapping[str, Any]) -> str:
    made = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    commit = f"commit `{origin['commit']}`" if origin["commit"] else "commit unknown"
    return f"Made with {made}; {commit}; on {markdown.plain(origin['device'])}."


def _results(report: Report, task: Task) -> str:
    rows, columns = [], task.columns
    compares = any(x.get("published") is not None for x in report.networks.values())
    for name, network in report.networks.items():
        seeds, size = report.seeds(name), network["parameters"]
        steps = _before(report, name) + network["steps"]
        scores = markdown.cells(columns, *(seed["last"] for seed in seeds))
        histories = [report.history(name, seed)[0] for seed in range(len(seeds))]
        time = _time(itertools.chain(*histories))
        count = [f"{len(seeds)}"] * report.has_seeds
        scores += [task.score_column.cell(network.get("published"))] * compares
        rows.append([name, *scores, *count, f"{size:,}", f"{steps:,}", time])
    count = network["last"].get("count")  # the same for all; none if a task counts no examples
    counted = "" if count is None else f"{int(count):,} "
    said = f"After the last step, on {counted}{report.result['evaluated_on']} {task.unit}"
    if report.has_seeds:
        said += "; mean +- standard deviation over init seeds, and the time of all of them"
    if any(len(phase["learn"]) > 1 for phase in report.phases):
        said += "; the networks of a phase are trained at once, so the time is that of all"
    titles = [column.title for column in columns] + ["published"] * compares
    titles += ["seeds"] * report.has_seeds
    header = ["network", *titles, "parameters", "steps", "time"]
    return f"{said}:\n\n{markdown.table(header, rows)}"


def _speed(report: Report, task: Task) -> list[str]:
    """How fast each network learned, by the median row of the first seed; nothing without rows."""
    rate, rows = f"time/{task.unit}_per_second_per_device", []
    keys = (rate, "time/waiting_for_data", "time/mfu")
    for name in report.networks:
        history, _ = report.history(name)
        found = [[row[key] for row in history if row.get(key) is not None] for key in keys]
        speed, waited, mfu = (np.median(values) if values else None for values in found)
        if speed is not None:
            told = [
                f"{speed:,.0f}",
                f"{100 * waited:.1f} %",
                *([] if mfu is None else [f"{100 * mfu:.1f} %"]),
            ]
            rows.append([name, *told])
    header = ["network", f"{task.unit} / s and device", "waiting for data", "MFU"]
    width = max(map(len, rows), default=0)
    rows = [row + ["-"] * (width - len(row)) for row in rows]
    return [f"While it learned:\n\n{markdown.table(header[:width], rows)}"] if rows else []


def _best(report: Report, task: Task) -> list[str]:
    """The table of the best steps, unless all are the last ones, and which networks have none."""
    selected, evaluated = report.result["selected_on"], report.result["evaluated_on"]
    score, by = task.score_column, f"{selected} {curves.words(task.score_column.key)}"
    learned = {name: report.seeds(name) for name, x in report.networks.items() if x["best"]}
    if not learned:
        return []
    if all(seed["best"]["step"] == seed["steps"] for seeds in learned.values() for seed in seeds):
        return [f"By {by} the last step of every network that learned is its best one."]
    rows = []
    for name, seeds in learned.items():
        best = [seed["best"] for seed in seeds]
        chosen = score.cell(*(one["score"] for one in best))
        cells = markdown.cells(task.columns, *(one["scores"] for one in best))
        rows.append([name, _steps(seeds, _before(report, name)), chosen, *cells])
    how = f", measured on {evaluated} data, which had no part in the selection:"
    if selected == evaluated:
        how = f". These figures are selected on {evaluated} data, as the published protocol does, "
        how += "so they are optimistic:"
    header = ["network", "step", f"{selected} {score.title}", *(c.title for c in task.columns)]
    said = [f"At the step of the highest {by}{how}", markdown.table(header, rows)]
    if len(learned) < len(report.networks):
        others = markdown.names(name for name in report.networks if name not in learned)
        said.append(f"Without a best step, for it did not learn in this run: {others}.")
    return said


def _before(report: Report, name: str) -> int:
    """The steps of a network's phases before its last one."""
    begins = report.history(name)[1]
    return begins[-1] if begins else 0


def _steps(seeds: Sequence[Mapping[str, Any]], before: int) -> str:
    """The best step, or the first and the last one of several seeds, of all phases."""
    steps, last = sorted({seed["best"]["step"] for seed in seeds}), seeds[0]["steps"]
    said = [f"{before + step:,}" + " (last)" * (step == last) for step in steps]
    return " to ".join([said[0], *said[1:][-1:]])


def _cost_of_analysis(report: Report) -> str:
    rows = [row for seeds in report.rows.values() for of_seed in seeds for row in of_seed]
    keys = ("time/analysis_seconds", "time/seconds")
    spent, whole = (sum(row.get(key) or 0.0 for row in rows) for key in keys)
    return (
        f"Measuring this took {spent:.1f} s, {100 * spent / whole:.1f} % of the time of training "
        "and evaluation together, compilation included."
    )


def _time(rows: Iterable[Mapping[str, Any]]) -> str:
    """The sum of the rows' seconds."""
    seconds = [row["time/seconds"] for row in rows if row.get("time/seconds") is not None]
    if not seconds:
        return "-"
    if sum(seconds) < 60:
        return f"{sum(seconds):.1f} s"
    minutes, rest = divmod(round(sum(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
