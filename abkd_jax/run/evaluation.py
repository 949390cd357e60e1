"""Evaluation of networks on a whole split: accuracy and calibration, before and after scaling."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import data, metrics
from abkd_jax.train import parallel
from abkd_jax.train.step import Networks, eval_step
from abkd_jax.types import Batch


class Gathered(NamedTuple):
    """What networks say of a split.

    Attributes:
        logits: `[N, K]` of each network, by name.
        labels: `[N]`.
    """

    logits: Mapping[str, np.ndarray]
    labels: np.ndarray


def quick(
    networks: Networks, split: data.Split | data.Stream, **how: Any
) -> dict[str, dict[str, float]]:
    """The metrics that add up over batches, of every network: for a look on the way.

    Args:
        networks: by name.
        split: to evaluate.
        **how: size, preprocess and mesh, as in `gather`.

    Returns:
        {name: {"accuracy", "top5", "nll", "brier", "ece"}}, see `metrics.summarize`.
    """
    total = None
    for sums, _ in _batches(networks, split, **how):
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    values = {name: metrics.summarize(total[name]) for name in networks}
    return jax.tree.map(float, values)


def gather(
    networks: Networks,
    split: data.Split | data.Stream,
    *,
    size: int,
    preprocess: data.Preprocess,
    mesh: Mesh,
) -> Gathered:
    """The logits of every network for every example.

    Args:
        networks: by name.
        split: to evaluate.
        size: of a batch.
        preprocess: of its inputs.
        mesh: of devices.

    Returns:
        Arrays on the host.
    """
    logits, labels = {name: [] for name in networks}, []
    for examples, batch in _batches(networks, split, size, preprocess, mesh, examples=True):
        where = np.asarray(batch["where"])
        labels.append(np.asarray(batch["labels"])[where])
        for name in networks:
            logits[name].append(np.asarray(examples[name]["logits"])[where])
    return Gathered({name: np.concatenate(x) for name, x in logits.items()}, np.concatenate(labels))


def temperatures(validation: Gathered) -> dict[str, float]:
    """The temperature of each network that minimises its NLL on validation data."""
    return {
        name: float(metrics.fit_temperature(logits, validation.labels))
        for name, logits in validation.logits.items()
    }


def scores(logits: Array, labels: Array, temperature: float | None) -> dict[str, Any]:
    """All that a report says of a network on a set.

    Args:
        logits: `[N, K]`.
        labels: `[N]`.
        temperature: of the scaling, from validation data; None for no scaling.

    Returns:
        "accuracy", "top5", "nll", "brier", "ece", "adaptive_ece", "class_accuracy" [K] (NaN where a
        class has no example), "count", "temperature", "reliability" (see
        `metrics.reliability_diagram`), and "scaled": nll, brier, ece, adaptive_ece and reliability
        of logits / temperature, or None.
    """
    correct = np.argmax(logits, axis=-1) == labels
    num_classes = np.shape(logits)[-1]
    count = np.bincount(labels, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        by_class = np.bincount(labels[correct], minlength=num_classes) / count
    found = _calibration(logits, labels)
    scaled = None
    if temperature is not None:
        scaled = _calibration(logits / temperature, labels)
        scaled = {key: scaled[key] for key in ("nll", "brier", "ece", "adaptive_ece")} | {
            "reliability": scaled["reliability"]
        }
    return found | {
        "class_accuracy": by_class.tolist(),
        "count": len(labels),
        "temperature": temperature,
        "scaled": scaled,
    }


@jax.jit
def _calibration_sums(logits, labels):
    summary = metrics.summarize(metrics.classification_sums(logits, labels))
    diagram = metrics.reliability_diagram(logits, labels)
    return summary | {"adaptive_ece": metrics.adaptive_ece(logits, labels), "reliability": diagram}


def _calibration(logits: Array, labels: Array) -> dict[str, Any]:
    """Scalars and the reliability diagram, as plain numbers."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64).tolist(), _calibration_sums(logits, labels)
    )


def _batches(
    networks, split, size, preprocess, mesh, examples=False
) -> Iterator[tuple[Any, Batch]]:
    size += -size % mesh.shape["data"]
    for batch in data.evaluation_batches(split, size, preprocess):
        sums, rows = _evaluate(networks, batch, mesh=mesh)
        yield (rows if examples else sums), batch


@functools.partial(jax.jit, static_argnames="mesh")
def _evaluate(networks: Networks, batch: Batch, *, mesh: Mesh):
    return eval_step(networks, parallel.split(batch, mesh))
