"""Classification of rows, whatever they are: accuracy, likelihood, calibration."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax import metrics
from abkd_jax.tasks import classification_report as report
from abkd_jax.tasks.task import Column, Sums, Task
from abkd_jax.types import Batch, Outputs

ACCURACY = Column("accuracy", "accuracy %", 100, 2)
COLUMNS = (ACCURACY, Column("top5", "top-5 %", 100, 2), *report.CALIBRATION)
_SCALED = ("nll", "brier", "ece", "adaptive_ece", "reliability")


def classification() -> Task:
    """Every row has a label; the most accurate network is the best."""
    return Task(
        check=check,
        sums=sums,
        summary=summary,
        score=score,
        score_column=ACCURACY,
        logged=("accuracy", "nll", "ece", "entropy"),
        columns=COLUMNS,
        rows=rows,
        scores=scores,
        sample=sample,
        sections=report.sections,
        figures=report.figures,
        notable=notable,
    )


def check(network: str, outputs: Outputs, description: Any) -> None:
    """Refuses a network without floating logits for each row and class of the data.

    Args:
        network: its name.
        outputs: of a batch, or their shapes.
        description: of the data.

    Raises:
        ValueError: one sentence.
    """
    logits = outputs.logits
    expected = ("B", *description.labels.shape, description.num_classes)
    if logits is None or not jnp.issubdtype(logits.dtype, jnp.floating):
        found = "none" if logits is None else logits.dtype
        raise ValueError(f"{network} must give floating logits; found {found}.")
    if len(logits.shape) != len(expected) or logits.shape[1:] != expected[1:]:
        shown = f"({', '.join(map(str, expected))})"
        raise ValueError(f"{network} must give logits of shape {shown}; found {logits.shape}.")


def sums(outputs: Mapping[str, Outputs], batch: Batch, names: Iterable[str]) -> Sums:
    """`metrics.classification_sums` of each network, `metrics.agreement_sums` of each pair.

    Args:
        outputs: of all networks.
        batch: its `labels` and `where`.
        names: of the networks whose sums are wanted.

    Returns:
        Sums, to be added over batches.
    """
    labels, where = batch["labels"], batch["where"]
    found = {}
    for name in names:
        logits = outputs[name].logits
        classes = _class_sums(logits, labels, where)
        found[name] = dict(metrics.classification_sums(logits, labels, where)) | classes
        for other in outputs:
            if other != name:
                pair = logits, outputs[other].logits, where
                found[f"{name}|{other}"] = metrics.agreement_sums(*pair)
    return found


def _class_sums(logits: Array, labels: Array, where: Array) -> dict[str, Array]:
    """How many rows each class has, and how many of them are right: `[K]`."""
    member = jax.nn.one_hot(jnp.where(where, labels, -1), logits.shape[-1])
    right = (jnp.argmax(logits, axis=-1) == labels)[..., None]
    axes = tuple(range(labels.ndim))
    return {
        "class_count": jnp.sum(member, axis=axes),
        "class_correct": jnp.sum(jnp.where(right, member, 0.0), axis=axes),
    }


def summary(sums: Sums) -> dict[str, dict[str, Array]]:
    """`metrics.summarize` of each network and pair; a network's classes, `[K]` each, besides."""
    found = {}
    for name, values in sums.items():
        scalars = {key: x for key, x in values.items() if not key.startswith("class_")}
        found[name] = dict(metrics.summarize(scalars))
        if "class_count" in values:
            found[name]["class_count"] = values["class_count"]
            found[name]["class_accuracy"] = values["class_correct"] / values["class_count"]
    return found


def score(summary: Mapping[str, Array]) -> Array:
    """The accuracy."""
    return summary["accuracy"]


def rows(outputs: Outputs, batch: Batch) -> dict[str, Array]:
    """The logits and the label of every row."""
    return {"logits": outputs.logits, "labels": batch["labels"]}


def scores(
    summary: Mapping[str, Any],
    test: Mapping[str, np.ndarray],
    selecting: Mapping[str, np.ndarray] | None,
) -> dict[str, Any]:
    """All that a report says of a network on a set.

    Args:
        summary: of the whole set.
        test: `rows` of the set.
        selecting: `rows` of validation data, on which the temperature is fitted; None for none.

    Returns:
        "accuracy", "top5" (None among five classes or fewer), "nll", "brier", "entropy", "ece",
        "adaptive_ece", "class_accuracy" [K] (NaN where a class has no example), "count",
        "temperature", "reliability" (see `metrics.reliability_diagram`), and "scaled": nll, brier,
        ece, adaptive_ece and reliability of logits / temperature, or None.
    """
    logits, labels = test["logits"], test["labels"]
    plain = _plain(dict(summary))
    kept = ("accuracy", "top5", "nll", "brier", "entropy", "ece", "class_accuracy")
    found = {key: plain[key] for key in kept} | {"count": round(sum(plain["class_count"]))}
    if len(plain["class_accuracy"]) <= 5:  # the label is always one of five
        found["top5"] = None
    by_rows = _plain(_calibration(logits, labels))
    found |= {key: by_rows[key] for key in ("adaptive_ece", "reliability")}
    temperature = scaled = None
    if selecting is not None:
        temperature = float(metrics.fit_temperature(selecting["logits"], selecting["labels"]))
        scaled = _plain(_calibration(logits / temperature, labels))
        scaled = {key: scaled[key] for key in _SCALED}
    return found | {"temperature": temperature, "scaled": scaled}


@jax.jit
def _calibration(logits: Array, labels: Array) -> dict[str, Any]:
    found = metrics.summarize(metrics.classification_sums(logits, labels))
    diagram = metrics.reliability_diagram(logits, labels)
    return found | {"adaptive_ece": metrics.adaptive_ece(logits, labels), "reliability": diagram}


def _plain(values: Any) -> Any:
    """Arrays as plain numbers."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), values)


def notable(rows: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """How far the networks' distributions lie apart; of a single network, how unsure it is.

    Args:
        rows: `rows` of each network.

    Returns:
        `[rows]`, in nats: the mean KL divergence of the networks' distributions from their mean, a
        Jensen-Shannon divergence of equal weights; or the entropy.
    """
    logits = np.stack([shown["logits"].astype(np.float32) for shown in rows.values()])
    given = np.asarray(jax.nn.softmax(logits), np.float64)
    own = _entropy(given).mean(axis=0)
    return own if len(rows) == 1 else _entropy(given.mean(axis=0)) - own


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    log = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -np.sum(probabilities * log, axis=-1)


def sample(rows: Mapping[str, Mapping[str, np.ndarray]], batch: Batch) -> dict[str, np.ndarray]:
    """A few rows with the distributions of all networks.

    Args:
        rows: `rows` of each network.
        batch: its `inputs` as the data set stores them, and `where`.

    Returns:
        "labels", "images" if the inputs are images, and "probabilities/NAME" of each network.
    """
    where, inputs = np.asarray(batch["where"]), batch["inputs"]
    found = {"labels": next(iter(rows.values()))["labels"]}
    if getattr(inputs, "ndim", 0) == 4 and where.ndim == 1:
        found["images"] = np.asarray(inputs)[where]
    for name, shown in rows.items():
        logits = shown["logits"].astype(np.float32)
        found[f"probabilities/{name}"] = np.asarray(jax.nn.softmax(logits))
    return found
