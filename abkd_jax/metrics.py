"""Evaluation metrics: additive sums per batch, and calibration of a gathered evaluation set.

Conventions of the whole module:

* Rows are masked by `where` and by a negative (withheld) label; such a row contributes exactly 0,
  whatever its logits are.
* A logit of -inf removes its class: probability exactly 0. A valid row with a NaN logit, or with no
  class left, has no distribution and shows up as NaN.
* Work is in float32 for logits of 32 bits or fewer, in float64 for float64.
"""

import math
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from jax import Array, lax

from abkd_jax import numerics

# Half width of the gap in log-probability within which a KL term is taken from its series.
_SERIES_GAP = 0.5
# 1/15!, ..., 1/2!: the first omitted term is below float64's resolution at a gap of 0.5.
_SERIES = tuple(1 / math.factorial(n) for n in range(15, 1, -1))
_MAX_TEMPERATURE = 1e2


def classification_sums(
    logits: Array, labels: Array, where: Array | None = None, *, num_bins: int = 15
) -> dict[str, Array]:
    """Sums the classification metrics over the valid rows of one batch.

    The sums add up over batches and devices (`jax.tree.map(jnp.add, a, b)`); `summarize` turns them
    into values. Calibration bins have equal width on the highest probability and are open below:
    a confidence on an edge belongs to the lower bin.

    Args:
      logits: [..., K] floating point.
      labels: [...] integer in [0, K), negative where withheld; K or more makes the NLL NaN.
      where: [...] bool, False at padding; None keeps every row.
      num_bins: number of calibration bins, B.

    Returns:
      Scalars "count", "accuracy", "top5" (the label is among the five highest logits, of all where
      K < 5; the lower class index wins a tie), "nll" (infinite if a label's class is removed),
      "brier" (squared error summed over classes) and "entropy" (of the prediction, in nats), each a
      sum over rows of values >= 0; and
      "bin_count", "bin_confidence", "bin_accuracy" [B], the same sums within each bin.

    Raises:
      AssertionError: if a shape or a type is not as above.

    Brier, "Verification of forecasts expressed in terms of probability", 1950.
    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", 2015.
    Guo et al., "On calibration of modern neural networks", 2017.
    """
    _assert_rows(logits, labels=labels, where=where)
    _assert_bins(num_bins)
    valid = _valid(labels, where)
    logits = _upcast(logits)
    rows = per_example(logits, labels)
    top5 = jnp.any(_top5(logits) == jnp.asarray(labels)[..., None], axis=-1)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    brier = jnp.sum(jnp.square(jax.nn.softmax(logits) - one_hot), axis=-1)
    edges = jnp.asarray([edge / num_bins for edge in range(1, num_bins)], logits.dtype)
    bins = jnp.digitize(rows["confidence"], edges, right=True)
    values = {"accuracy": rows["correct"], "top5": top5, "nll": rows["nll"], "brier": brier}
    values["entropy"] = numerics.entropy(logits)
    return _masked_sums(values, valid, logits.dtype) | _bin_sums(bins, rows, valid, num_bins)


def agreement_sums(
    student_logits: Array, teacher_logits: Array, where: Array | None = None
) -> dict[str, Array]:
    """Sums the agreement of a student with its teacher over the valid rows of one batch.

    The sums add up like those of `classification_sums`. Merge the two dictionaries only where both
    saw the same valid rows, that is where no label is withheld: they share "count".

    Args:
      student_logits: [..., K] floating point.
      teacher_logits: [..., K] floating point.
      where: [...] bool, False at padding; None keeps every row.

    Returns:
      Scalars "count", "agreement" (the highest logits are of the same class) and "kl_at_1"
      (KL(teacher || student) at temperature 1, in nats; infinite where the student alone removed a
      class), each a sum over rows of values >= 0.

    Raises:
      AssertionError: if a shape or a type is not as above.

    Stanton et al., "Does knowledge distillation really work?", 2021.
    """
    _assert_rows(student_logits, "student_logits", where=where)
    _assert_rows(teacher_logits, "teacher_logits")
    chex.assert_equal_shape(
        [student_logits, teacher_logits],
        custom_message=f"teacher_logits must have the shape of student_logits, "
        f"{jnp.shape(student_logits)}, found {jnp.shape(teacher_logits)}.",
        include_default_message=False,
    )
    valid = jnp.ones(student_logits.shape[:-1], bool) if where is None else jnp.asarray(where)
    dtype = jnp.promote_types(_upcast(student_logits).dtype, _upcast(teacher_logits).dtype)
    student_logits, teacher_logits = student_logits.astype(dtype), teacher_logits.astype(dtype)
    agreement = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    kl = _kl(teacher_logits, student_logits)
    return _masked_sums({"agreement": agreement, "kl_at_1": kl}, valid, dtype)


def per_example(logits: Array, labels: Array) -> dict[str, Array]:
    """Gives each example's prediction and how it fared against its label.

    Args:
      logits: [..., K] floating point.
      labels: [...] integer in [0, K), negative where withheld; K or more makes the NLL NaN.

    Returns:
      Arrays [...]: "prediction" int32 in [0, K), "confidence" in (0, 1] (the highest probability),
      "correct" bool and "nll" in [0, inf]. Where the label is withheld: False and 0.

    Raises:
      AssertionError: if a shape or a type is not as above.
    """
    _assert_rows(logits, labels=labels)
    logits, labels = _upcast(logits), jnp.asarray(labels)
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
      fractions in [0, 1], "brier" in [0, 2], "nll", "entropy" and "kl_at_1" in nats, >= 0. All are
      NaN where the count is 0, for nothing was measured.

    Raises:
      ValueError: if "count" is missing.

    Naeini et al., 2015, and Guo et al., 2017, for the expected calibration error.
    """
    if "count" not in sums:
        raise ValueError(f"sums must have the key 'count', found {sorted(sums)}.")
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


def adaptive_ece(
    logits: Array, labels: Array, where: Array | None = None, *, num_bins: int = 15
) -> Array:
    """Computes the expected calibration error over bins of equal mass.

    The valid rows are sorted by confidence and split as `numpy.array_split` does: the first bins
    hold one row more. Equal confidences keep the order they came in.

    Args:
      logits: [..., K] floating point, of the whole evaluation set.
      labels: [...] integer in [0, K), negative where withheld.
      where: [...] bool, False at padding; None keeps every row.
      num_bins: number of bins.

    Returns:
      A scalar in [0, 1]; NaN if no row is valid.

    Raises:
      AssertionError: if a shape or a type is not as above.

    Nixon et al., "Measuring calibration in deep learning", 2019, on the predicted class.
    """
    _assert_rows(logits, labels=labels, where=where)
    _assert_bins(num_bins)
    valid = _valid(labels, where).ravel()
    rows = jax.tree.map(jnp.ravel, per_example(logits, labels))
    # Validity is the first key, for a NaN confidence would sort behind any number put in its place.
    order = jnp.lexsort((rows["confidence"], ~valid))
    rows = jax.tree.map(lambda row: row[order], rows)
    small, num_large = jnp.divmod(jnp.sum(valid), num_bins)
    rank = jnp.arange(valid.size)
    in_small = num_large + (rank - num_large * (small + 1)) // jnp.maximum(small, 1)
    bins = jnp.where(rank < num_large * (small + 1), rank // (small + 1), in_small)
    sums = _bin_sums(bins, rows, valid[order], num_bins)
    return summarize({"count": jnp.sum(valid)} | sums)["ece"]


def reliability_diagram(
    logits: Array, labels: Array, where: Array | None = None, *, num_bins: int = 15
) -> dict[str, Array]:
    """Computes the bars of a reliability diagram, in bins of equal width.

    Args:
      logits: [..., K] floating point, of the whole evaluation set.
      labels: [...] integer in [0, K), negative where withheld.
      where: [...] bool, False at padding; None keeps every row.
      num_bins: number of bins, B; bin i covers confidences in (i / B, (i + 1) / B].

    Returns:
      Arrays [B]: "count" >= 0, and the bin's means "confidence" and "accuracy" in [0, 1], NaN where
      the bin is empty.

    Raises:
      AssertionError: if a shape or a type is not as above.

    Guo et al., "On calibration of modern neural networks", 2017.
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
      logits: [..., K] floating point, of the whole evaluation set.
      labels: [...] integer in [0, K), negative where withheld.
      where: [...] bool, False at padding; None keeps every row.

    Returns:
      A scalar in [0.01, 100], at a bound if the minimum lies outside; 1 where the NLL does not
      depend on T, as without a valid row; NaN where it is not finite at any T.

    Raises:
      AssertionError: if a shape or a type is not as above.

    Guo et al., "On calibration of modern neural networks", 2017.
    """
    _assert_rows(logits, labels=labels, where=where)
    valid = _valid(labels, where)
    logits = jnp.where(valid[..., None], lax.stop_gradient(_upcast(logits)), 0)
    index = jnp.maximum(jnp.asarray(labels), 0)[..., None]
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


def _kl(p_logits: Array, q_logits: Array) -> Array:
    """KL(p || q), [..., K] twice -> [...], as a sum of terms that are each >= 0."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    gap = jnp.where(p > 0, log_p - log_q, 0)
    # The terms p * gap + q - p add up to the KL. Unlike p * gap alone they are never negative and
    # forgive the rounding of the normalisers, but for a small gap they cancel: there, the series.
    near = (p > 0) & (jnp.abs(gap) < _SERIES_GAP)
    small_gap = jnp.where(near, gap, 0)
    series = jnp.square(small_gap) * jnp.polyval(jnp.asarray(_SERIES, gap.dtype), -small_gap)
    return jnp.sum(jnp.where(near, p * series, p * gap + (q - p)), axis=-1)


def _top5(logits: Array) -> Array:
    """The classes of the highest five logits, [..., min(5, K)]; -1 for a removed class."""
    values, classes = lax.top_k(logits, min(5, logits.shape[-1]))
    return jnp.where(values == -jnp.inf, -1, classes)


def _masked_sums(values: Mapping[str, Array], valid: Array, dtype) -> dict[str, Array]:
    """The number of valid rows, and each [...] array's sum over them; NaN elsewhere is harmless."""
    sums = {name: jnp.sum(value, where=valid, dtype=dtype) for name, value in values.items()}
    return {"count": jnp.sum(valid, dtype=dtype)} | sums


def _bin_sums(
    bins: Array, rows: Mapping[str, Array], valid: Array, num_bins: int
) -> dict[str, Array]:
    """The sums of the valid rows in each bin; a comparison, as a scatter's order may vary."""
    member = (bins[..., None] == jnp.arange(num_bins)) & valid[..., None]
    axes, dtype = tuple(range(valid.ndim)), rows["confidence"].dtype
    return {
        "bin_count": jnp.sum(member, axis=axes, dtype=dtype),
        "bin_confidence": jnp.sum(rows["confidence"][..., None], axis=axes, where=member),
        "bin_accuracy": jnp.sum(rows["correct"][..., None] & member, axis=axes, dtype=dtype),
    }


def _valid(labels: Array, where: Array | None) -> Array:
    known = jnp.asarray(labels) >= 0
    return known if where is None else known & where


def _upcast(logits: Array) -> Array:
    logits = jnp.asarray(logits)
    return logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)


def _assert_rows(
    logits: Array, name: str = "logits", labels: Array | None = None, where: Array | None = None
) -> None:
    """Asserts float logits [..., K], K >= 1, and the rows' integer labels and bool mask [...]."""
    chex.assert_type(
        logits,
        float,
        custom_message=f"{name} must be floating point, found {jnp.result_type(logits)}.",
        include_default_message=False,
    )
    chex.assert_axis_dimension_gt(
        logits,
        -1,
        0,
        custom_message=f"{name} must have shape [..., K] with K >= 1, found {jnp.shape(logits)}.",
        include_default_message=False,
    )
    rows = jnp.shape(logits)[:-1]
    for row_name, row, kind in (("labels", labels, int), ("where", where, bool)):
        if row is None:
            continue
        chex.assert_type(
            row,
            kind,
            custom_message=f"{row_name} must be {kind.__name__}, found {jnp.result_type(row)}.",
            include_default_message=False,
        )
        chex.assert_shape(
            row,
            rows,
            custom_message=f"{row_name} must have shape {rows}, that of {name} without classes, "
            f"found {jnp.shape(row)}.",
            include_default_message=False,
        )


def _assert_bins(num_bins: int) -> None:
    chex.assert_scalar_positive(
        num_bins,
        custom_message=f"num_bins must be positive, found {num_bins}.",
        include_default_message=False,
    )
