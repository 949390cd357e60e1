"""What a report says of classification, besides the tables and figures of all tasks."""

import math
from typing import Any

import numpy as np

from abkd_jax import markdown
from abkd_jax.tasks.task import Column

CALIBRATION = (
    Column("nll", "NLL (nats)", 1, 4),
    Column("ece", "ECE %", 100, 2),
    Column("adaptive_ece", "adaptive ECE %", 100, 2),
    Column("brier", "Brier", 1, 4),
)
_TEMPERATURE = Column("temperature", "T", 1, 3)


def sections(report: Any) -> list[str]:
    """Temperature scaling, and the classes on which distillation gains and loses.

    Args:
        report: what is known of the run, an `abkd_jax.report.Report`.

    Returns:
        Blocks of Markdown.
    """
    return ["## Calibration", *_scaling(report), *_classes(report)]


def figures(report: Any) -> dict[str, tuple[Any, str]]:
    """The reliability diagrams and the examples.

    Args:
        report: as of `sections`.

    Returns:
        {name: (Figure, caption)}.
    """
    from abkd_jax.tasks import classification_figures as drawn  # matplotlib takes a second

    evaluated = report.result["evaluated_on"]
    return {
        "reliability": (
            drawn.reliability(report),
            f"Accuracy by confidence on the {evaluated} data, in bins of equal width: bars as "
            "trained, line after temperature scaling, dashed line perfect calibration; bins of "
            f"fewer than {drawn.FEWEST} examples hollow, and not in the line. Below, the share of "
            "the examples in each bin, as trained. ECE before → after scaling.",
        ),
        "examples": (
            drawn.examples(report),
            f"Probabilities that each network gives to {evaluated} examples: the true class (bold, "
            f"✓) and up to {drawn.NUM_TOP_CLASSES} others that some network finds likely. "
            + _choice(report, drawn.NUM_EXAMPLES),
        ),
    }


def _choice(report: Any, most: int) -> str:
    """How the examples were chosen."""
    arrays = report.examples
    if "positions" not in arrays:
        return "They are the first ones."
    names = [key for key in arrays if key.startswith("probabilities/")]
    shown, count = min(most, len(arrays["labels"])), int(arrays["candidates"])
    whole = all(network["last"]["count"] <= count for network in report.networks.values())
    of = f"They are those {shown} of the {'' if whole else 'first '}{count:,}"
    if len(names) == 1:
        return f"{of} of the highest entropy, the highest one first, and not typical."
    return (
        f"{of} on which the networks differ most, by the Jensen-Shannon divergence of their "
        "distributions, the largest one first, and not typical."
    )


def _scaling(report: Any) -> list[str]:
    """The table of the scores before and after temperature scaling."""
    rows = []
    for name, network in report.networks.items():
        if network["last"]["scaled"]:
            before = [seed["last"] for seed in report.seeds(name)]
            after = [{"temperature": last["temperature"]} | last["scaled"] for last in before]
            rows.append([name, "before", "1", *markdown.cells(CALIBRATION, *before)])
            rows.append([name, "after", *markdown.cells((_TEMPERATURE, *CALIBRATION), *after)])
    if not rows:
        return ["There is no temperature scaling, for no validation data to fit it on."]
    header = ["network", "scaling", *(column.title for column in (_TEMPERATURE, *CALIBRATION))]
    return [
        "Before and after temperature scaling, with T fitted on validation data:",
        markdown.table(header, rows),
    ]


def _classes(report: Any) -> list[str]:
    """The classes on which a network gains or loses most against its like on the labels alone."""
    pair = _on_labels_alone(report)
    if pair is None:
        return []
    before, after = (
        np.mean([np.array(seed["last"]["class_accuracy"], float) for seed in report.seeds(n)], 0)
        for n in pair
    )
    change = after - before  # NaN where the test data lack a class
    order = [k for k in np.argsort(change, kind="stable") if math.isfinite(change[k])]
    lost = [k for k in order[:3] if change[k] < 0]
    gained = [k for k in order[:-4:-1] if change[k] > 0]
    if not lost and not gained:
        return []
    said = [
        f"class {markdown.plain(report.class_name(k))} ({100 * change[k]:+.1f} points, "
        f"{100 * before[k]:.1f} → {100 * after[k]:.1f} %)"
        for k in range(len(change))
    ]
    gains, losses = (", ".join(said[k] for k in part) or "none" for part in (gained, lost))
    baseline, learner = pair
    return [
        "## Classes",
        f"Accuracy of the {learner} within a class, against the {baseline} (the {learner} on its "
        f"labels alone){', means over the init seeds' * report.has_seeds}:",
        f"- gained most: {gains}\n- lost most: {losses}",
    ]


def _on_labels_alone(report: Any) -> tuple[str, str] | None:
    """A network that learned on the labelled examples alone, and its like, the run's last one."""
    *_, last = report.phases
    for name in report.networks:
        splits = {phase["split"] for phase in report.phases if name in phase["learn"]}
        if splits == {"labelled"} and len(last["learn"]) == 1 and name not in last["learn"]:
            (learner,) = last["learn"]
            if report.config[name]["model"] == report.config[learner]["model"]:
                return name, learner
    return None
