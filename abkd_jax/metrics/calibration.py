"""Calibration of a gathered evaluation set."""

import math

import jax
from jax import Array, lax
from jax import numpy as jnp

from abkd_jax import checks
from abkd_jax.metrics.classification import (
    bin_sums,
    checked,
    classification_sums,
    rows_of,
    summarize,
)

_MAX_TEMPERATURE = 1e2


def adaptive_ece(
    logits: Array, labels: Array, where: Array | None = None, *, num_bins: int = 15
) -> Array:
    """Computes the expected calibration error over bins of equal mass.

    The valid rows are sorted by confidence and split as `numpy.array_split` does: the first bins
    hold one row more. Equal confidences keep the order they came in.

    Args:
        logits: `[..., K]`, of the whole evaluation set.
        labels: `[...]`, integers in [0, K), negative where withheld.
        where: `[...]` bool, False at padding; None keeps every row.
        num_bins: number of bins.

    Returns:
        A scalar in [0, 1]; NaN if no row is valid.

    Source: Nixon et al., "Measuring calibration in deep learning", 2019, on the predicted class.
    """
    checks.require(num_bins > 0, "num_bins", "at least 1", num_bins)
    logits, labels, valid = checked(logits, labels, where)
    valid, rows = valid.ravel(), jax.tree.map(jnp.ravel, rows_of(logits, labels))
    # Validity is the first key, for a NaN confidence would sort behind any number put in its place.
    order = jnp.lexsort((rows["confidence"], ~valid))
    rows = jax.tree.map(lambda row: row[order], rows)
    small, num_large = jnp.divmod(jnp.sum(valid), num_bins)
    rank = jnp.arange(valid.size)
    in_small = num_large + (rank - num_large * (small + 1)) // jnp.maximum(small, 1)
    bins = jnp.where(rank < num_large * (small + 1), rank // (small + 1), in_small)
    sums = bin_sums(bins, rows, valid[order], num_bins)
    return summarize({"count": jnp.sum(valid)} | sums)["ece"]


def reliability_diagram(
    logits: Array, labels: Array, where: Array | None = None, *, num_bins: int = 15
) -> dict[str, Array]:
    """Computes the bars of a reliability diagram, in bins of equal width.

    Args:
        logits: `[..., K]`, of the whole evaluation set.
        labels: `[...]`, integers in [0, K), negative where withheld.
        where: `[...]` bool, False at padding; None keeps every row.
        num_bins: number of bins, B; bin i covers confidences in (i / B, (i + 1) / B].

    Returns:
        `[B]` each: "count" >= 0, and the bin's means "confidence" and "accuracy" in [0, 1], NaN
        where the bin is empty.

    Source: Guo et al., "On calibration of modern neural networks", 2017.
    """
    sums = classification_sums(logits, labels, where, num_bins=num_bins)
    return {
        "count": sums["bin_count"],
        "confidence": sums["bin_confidence"] / sums["bin_count"],
        "accuracy": sums["bin_accuracy"] / sums["bin_count"],
    }


def fit_temperature(logits: Array, labels: Array, where: Array | None = None) -> Array:
    """Finds the temperature T that minimises the NLL of logits / T.

    The NLL is convex in 1 / T, so its slope there changes sign at most once, and halving an
    interval of log(1 / T) finds the place from any start. No gradient flows through the result.

    Args:
        logits: `[..., K]`, of the whole evaluation set.
        labels: `[...]`, integers in [0, K), negative where withheld.
        where: `[...]` bool, False at padding; None keeps every row.

    Returns:
        A scalar in [0.01, 100], at a bound if the minimum lies outside; 1 where the NLL does not
        depend on T, as without a valid row; NaN where it is not finite at any T.

    Source: Guo et al., "On calibration of modern neural networks", 2017.
    """
    logits, labels, valid = checked(logits, labels, where)
    logits = jnp.where(valid[..., None], lax.stop_gradient(logits), 0)
    index = jnp.maximum(labels, 0)[..., None]
    gaps = logits - jnp.take_along_axis(logits, index, axis=-1)

    def slope(log_inverse):
        probs = jax.nn.softmax(jnp.exp(log_inverse) * gaps)
        return jnp.sum(jnp.where(gaps == -jnp.inf, 0, probs * gaps))

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    end = jnp.asarray(math.log(_MAX_TEMPERATURE), gaps.dtype)
    # Enough halvings to come down from 2 * log(100) to the resolution of the type.
    num_halvings = jnp.finfo(gaps.dtype).nmant + 5
    low, high = lax.fori_loop(0, num_halvings, halve, (-end, end))
    middle = (low + high) / 2
    temperature = jnp.clip(jnp.exp(-middle), 1 / _MAX_TEMPERATURE, _MAX_TEMPERATURE)
    temperature = jnp.where(jnp.isfinite(slope(middle)), temperature, jnp.nan)
    # A slope of 0 says too little here: it underflows to 0 wherever all predictions are right.
    return jnp.where(jnp.all((gaps == 0) | (gaps == -jnp.inf)), 1, temperature)
