"""Sums of classification metrics over the rows of a batch, and the means made of them."""

from collections.abc import Mapping

import jax
from jax import Array, lax
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.divergences import forward_kl


def classification_sums(
    logits: Array, labels: Array, where: Array | None = None, *, num_bins: int = 15
) -> dict[str, Array]:
    """Sums the classification metrics over the valid rows of one batch.

    The sums add up over batches and devices (`jax.tree.map(jnp.add, a, b)`); `summarize` turns them
    into values. Calibration bins have equal width on the highest probability and are open below:
    a confidence on an edge belongs to the lower bin.

    Args:
        logits: `[..., K]`.
        labels: `[...]`, integers in [0, K), negative where withheld; K or more makes the NLL NaN.
        where: `[...]` bool, False at padding; None keeps every row.
        num_bins: number of calibration bins, B.

    Returns:
        Scalars "count", "accuracy", "top5" (the label is among the five highest logits, of all
        where K < 5; the lower class index wins a tie), "nll" (infinite if a label's class is
        removed), "brier" (squared error summed over classes) and "entropy" (of the prediction, in
        nats), each a sum over rows of values >= 0; and "bin_count", "bin_confidence",
        "bin_accuracy" `[B]`, the same sums within each bin.

    Source: Brier, "Verification of forecasts expressed in terms of probability", 1950; Naeini et
    al., "Obtaining well calibrated probabilities using Bayesian binning", 2015; Guo et al., "On
    calibration of modern neural networks", 2017.
    """
    checks.require(num_bins > 0, "num_bins", "at least 1", num_bins)
    logits, labels, valid = checked(logits, labels, where)
    rows = rows_of(logits, labels)
    top5 = jnp.any(_top5(logits) == labels[..., None], axis=-1)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    brier = jnp.sum(jnp.square(jax.nn.softmax(logits) - one_hot), axis=-1)
    edges = jnp.asarray([edge / num_bins for edge in range(1, num_bins)], logits.dtype)
    bins = jnp.digitize(rows["confidence"], edges, right=True)
    values = {"accuracy": rows["correct"], "top5": top5, "nll": rows["nll"], "brier": brier}
    values["entropy"] = numerics.entropy(logits)
    return _masked_sums(values, valid, logits.dtype) | bin_sums(bins, rows, valid, num_bins)


def agreement_sums(
    student_logits: Array, teacher_logits: Array, where: Array | None = None
) -> dict[str, Array]:
    """Sums the agreement of a student with its teacher over the valid rows of one batch.

    The sums add up like those of `classification_sums`. Merge the two dictionaries only where both
    saw the same valid rows, that is where no label is withheld: they share "count".

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        where: `[...]` bool, False at padding; None keeps every row.

    Returns:
        Scalars "count", "agreement" (the highest logits are of the same class) and "kl_at_1"
        (`forward_kl` at temperature 1, in nats; where the student alone removed a class it is
        large and finite), each a sum over rows of values >= 0.

    Source: Stanton et al., "Does knowledge distillation really work?", 2021.
    """
    logits = jnp.broadcast_arrays(*checks.check_logits(student_logits, teacher_logits))
    where = checks.check_where(where, logits[0].shape[:-1])
    of_student, of_teacher = (jnp.argmax(x, axis=-1) for x in logits)
    values = {"agreement": of_student == of_teacher, "kl_at_1": forward_kl(*logits)}
    return _masked_sums(values, where, logits[0].dtype)


def per_example(logits: Array, labels: Array) -> dict[str, Array]:
    """Gives each example's prediction and how it fared against its label.

    Args:
        logits: `[..., K]`.
        labels: `[...]`, integers in [0, K), negative where withheld; K or more makes the NLL NaN.

    Returns:
        `[...]` each: "prediction" int32 in [0, K), "confidence" in (0, 1] (the highest
        probability), "correct" bool and "nll" in [0, inf]. Where the label is withheld: False and
        0.
    """
    logits, labels, _ = checked(logits, labels)
    return rows_of(logits, labels)


def checked(logits: Array, labels: Array, where: Array | None = None) -> tuple[Array, Array, Array]:
    """The logits in at least 32 bit, the labels, and which rows count."""
    logits = checks.check_rows(logits)
    checks.check_labels(labels, logits.shape[:-1])
    labels = jnp.asarray(labels)
    return logits, labels, (labels >= 0) & checks.check_where(where, labels.shape)


def rows_of(logits: Array, labels: Array) -> dict[str, Array]:
    """`per_example` of what is checked."""
    prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Not exp(log_softmax): 1 / sum(exp) is exact for ties, which lie on the edges of bins.
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    index = jnp.maximum(labels, 0)[..., None]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1)[..., 0]
    return {
        "prediction": prediction,
        "confidence": confidence,
        "correct": prediction == labels,
        "nll": jnp.where(labels >= 0, -log_probs, 0),
    }


def summarize(sums: Mapping[str, Array]) -> dict[str, Array]:
    """Turns sums over an evaluation set into mean values.

    Args:
        sums: dictionaries of `classification_sums` or `agreement_sums`, added up, or both merged.
            Sums stacked along leading axes (of a sweep) are summarised along those axes.

    Returns:
        Scalars, as far as their sums are given: "accuracy", "top5", "ece" and "agreement" as
        fractions in [0, 1], "brier" in [0, 2], "nll", "entropy" and "kl_at_1" in nats, >= 0. All
        are NaN where the count is 0, for nothing was measured.

    Raises:
        ValueError: if "count" is missing.

    Source: Naeini et al., 2015, and Guo et al., 2017, for the expected calibration error.
    """
    checks.require("count" in sums, "sums['count']", "given", sorted(sums))
    count = jnp.asarray(sums["count"])
    means = {
        name: value / count
        for name, value in sums.items()
        if name != "count" and not name.startswith("bin_")
    }
    if "bin_count" in sums:
        gaps = jnp.abs(sums["bin_accuracy"] - sums["bin_confidence"])
        means["ece"] = jnp.sum(gaps, axis=-1) / count
    return means


def bin_sums(
    bins: Array, rows: Mapping[str, Array], valid: Array, num_bins: int
) -> dict[str, Array]:
    """The sums of the valid rows in each bin; by comparison, as a scatter's order may vary."""
    member = (bins[..., None] == jnp.arange(num_bins)) & valid[..., None]
    axes, dtype = tuple(range(valid.ndim)), rows["confidence"].dtype
    return {
        "bin_count": jnp.sum(member, axis=axes, dtype=dtype),
        "bin_confidence": jnp.sum(rows["confidence"][..., None], axis=axes, where=member),
        "bin_accuracy": jnp.sum(rows["correct"][..., None] & member, axis=axes, dtype=dtype),
    }


def _top5(logits: Array) -> Array:
    """The classes of the highest five logits, [..., min(5, K)]; -1 for a removed class."""
    values, classes = lax.top_k(logits, min(5, logits.shape[-1]))
    return jnp.where(values == -jnp.inf, -1, classes)


def _masked_sums(values: Mapping[str, Array], valid: Array, dtype) -> dict[str, Array]:
    """The number of valid rows, and each [...] array's sum over them; NaN elsewhere is harmless."""
    sums = {name: jnp.sum(value, where=valid, dtype=dtype) for name, value in values.items()}
    return {"count": jnp.sum(valid, dtype=dtype)} | sums
