"""The metrics against scikit-learn, scipy, mpmath and plain loops."""

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from abkd_jax import metrics, numerics

NUM_ROWS, NUM_CLASSES = 60, 10
INF, NAN = np.inf, np.nan
EVERY_ROW = np.ones(NUM_ROWS, bool)

classification_sums = jax.jit(metrics.classification_sums, static_argnames="num_bins")
agreement_sums = jax.jit(metrics.agreement_sums)


def sums_of(logits, labels, where):
    """Both kinds of sums; the teacher is made of the student, element by element."""
    teacher_logits = jnp.where(jnp.isfinite(logits), 3 * jnp.cos(logits), logits)
    return {
        "classification_sums": metrics.classification_sums(logits, labels, where),
        "agreement_sums": metrics.agreement_sums(logits, teacher_logits, where),
    }


def everything(logits, labels, where):
    """All functions of one batch."""
    return sums_of(logits, labels, where) | {
        "per_example": metrics.per_example(logits, labels),
        "adaptive_ece": metrics.adaptive_ece(logits, labels, where),
        "reliability_diagram": metrics.reliability_diagram(logits, labels, where),
        "fit_temperature": metrics.fit_temperature(logits, labels, where),
    }


# Jitted, as in use. Compiling takes most of the time, so tests share shapes where they can.
jitted_everything = jax.jit(everything)


def evaluate(logits, labels, where=None):
    where = np.ones(np.shape(labels), bool) if where is None else where
    return jitted_everything(logits, labels, where)


def without_rows(results):
    """Everything but the per-example arrays, which know no mask."""
    return {name: value for name, value in results.items() if name != "per_example"}


def make(num_rows=NUM_ROWS, num_classes=NUM_CLASSES, scale=3.0, seed=0, dtype=np.float32):
    """Logits, and labels that are right about half of the time."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(num_rows, num_classes))).astype(dtype)
    noise = rng.integers(0, num_classes, num_rows)
    labels = np.where(rng.random(num_rows) < 0.5, np.argmax(logits, -1), noise)
    return logits, labels.astype(np.int32)


def pad(logits, labels):
    """Extends a small batch to the common shape by removed classes and masked rows of NaN."""
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    padded = np.full((NUM_ROWS, NUM_CLASSES), NAN, np.float32)
    padded[: len(logits)] = -INF
    padded[: len(logits), : logits.shape[1]] = logits
    where = np.arange(NUM_ROWS) < len(logits)
    return padded, np.pad(labels.astype(np.int32), (0, NUM_ROWS - len(labels))), where


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)


def bins_by_loop(logits, labels, num_bins):
    """For each bin (a, b], the confidences and the correctness of its rows."""
    bins = [([], []) for _ in range(num_bins)]
    for probs, label in zip(softmax(logits), labels, strict=True):
        index = 0
        while index < num_bins - 1 and probs.max() > (index + 1) / num_bins:
            index += 1
        bins[index][0].append(probs.max())
        bins[index][1].append(probs.argmax() == label)
    return bins


def ece_of(bins):
    """The weighted gap between mean accuracy and mean confidence."""
    total = sum(len(confidences) for confidences, _ in bins)
    full = [pair for pair in bins if len(pair[0])]
    return sum(len(c) / total * abs(np.mean(a) - np.mean(c)) for c, a in full)


def nll_of(logits, labels, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / float(temperature)
    label_logits = scaled[np.arange(len(scaled)), labels]
    return np.mean(scipy.special.logsumexp(scaled, axis=-1) - label_logits)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_classes,dtype", [(2, np.float32), (10, np.float32), (10, jnp.bfloat16)]
)
def test_classification_matches_sklearn(num_classes, dtype):
    logits, labels = make(num_classes=num_classes, dtype=dtype)
    classes, probs = np.arange(num_classes), softmax(logits)
    result = metrics.summarize(classification_sums(logits, labels, EVERY_ROW))
    top5 = 1.0
    if num_classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, probs, k=5, labels=classes)
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, probs.argmax(-1)),
        "top5": top5,
        "nll": sklearn.metrics.log_loss(labels, probs, labels=classes),
        "brier": sum(sklearn.metrics.brier_score_loss(labels == k, probs[:, k]) for k in classes),
        "entropy": np.mean(scipy.stats.entropy(probs, axis=-1)),
        "ece": ece_of(bins_by_loop(logits, labels, 15)),
    }
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
    assert all(value.dtype == np.float32 for value in result.values())


def test_float64_stays_float64():
    with jax.enable_x64(True):
        logits, labels = make(dtype=np.float64)
        results = without_rows(evaluate(logits, labels))
        sums, pair = results["classification_sums"], results["agreement_sums"]
        teacher, student = softmax(3 * np.cos(logits)), softmax(logits)
        expected = scipy.special.rel_entr(teacher, student).sum()
        assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(np.float64)}
        np.testing.assert_allclose(sums["nll"] / NUM_ROWS, nll_of(logits, labels), rtol=1e-13)
        np.testing.assert_allclose(pair["kl_at_1"], expected, rtol=1e-13)
        # 32-bit logits keep to their own type there.
        sums = classification_sums(logits.astype(np.float32), labels)
        assert {value.dtype for value in sums.values()} == {np.dtype(np.float32)}


def test_per_example():
    logits, labels = make()
    labels[3] = -1
    rows, sums = (evaluate(logits, labels)[name] for name in ("per_example", "classification_sums"))
    probs, known = softmax(logits), labels >= 0
    np.testing.assert_array_equal(rows["prediction"], probs.argmax(-1))
    np.testing.assert_allclose(rows["confidence"], probs.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(rows["correct"], probs.argmax(-1) == labels)
    label_probs = probs[np.arange(NUM_ROWS), labels]
    np.testing.assert_allclose(rows["nll"], np.where(known, -np.log(label_probs), 0), rtol=1e-5)
    assert rows["prediction"].dtype == np.int32 and rows["correct"].dtype == bool
    assert sums["accuracy"] == np.sum(rows["correct"])
    np.testing.assert_allclose(sums["nll"], np.sum(rows["nll"]), rtol=1e-6)


def test_top5_breaks_ties_by_class_and_never_predicts_a_removed_class():
    tied = evaluate(*pad(np.zeros((10, 10)), np.arange(10)))["classification_sums"]
    assert tied["top5"] == 5 and tied["accuracy"] == 1
    removed = evaluate(*pad([[1, 0, -INF, -INF]], [2]))["classification_sums"]
    assert removed["top5"] == 0


def test_a_removed_label_costs_infinity():
    sums = evaluate(*pad([[0, 0, -INF]], [2]))["classification_sums"]
    assert sums["nll"] == INF and sums["brier"] == 1.5


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_bins_match_loop(num_bins):
    logits, labels = make()
    bins = bins_by_loop(logits, labels, num_bins)
    sums = classification_sums(logits, labels, EVERY_ROW, num_bins=num_bins)
    np.testing.assert_array_equal(sums["bin_count"], [len(c) for c, _ in bins])
    np.testing.assert_allclose(sums["bin_confidence"], [np.sum(c) for c, _ in bins], rtol=1e-5)
    np.testing.assert_array_equal(sums["bin_accuracy"], [np.sum(a) for _, a in bins])
    np.testing.assert_allclose(metrics.summarize(sums)["ece"], ece_of(bins), rtol=1e-5)


def test_reliability_diagram_matches_loop():
    logits, labels = make()
    diagram, bins = (
        evaluate(logits, labels)["reliability_diagram"],
        bins_by_loop(logits, labels, 15),
    )
    means = np.array([[np.mean(part) if part else NAN for part in pair] for pair in bins])
    assert np.isnan(means).any() and np.isfinite(means).any()
    np.testing.assert_array_equal(diagram["count"], [len(c) for c, _ in bins])
    np.testing.assert_allclose(diagram["confidence"], means[:, 0], rtol=1e-5)
    np.testing.assert_allclose(diagram["accuracy"], means[:, 1], rtol=1e-6)


@pytest.mark.parametrize("num_bins", [10, 15])
def test_edges_belong_to_the_lower_bin(num_bins):
    # Row k - 1 is uniform over k classes, so its confidence 1 / k is an edge if k divides num_bins.
    num_left = np.arange(1, NUM_CLASSES + 1)
    logits = np.where(np.arange(NUM_CLASSES) < num_left[:, None], 0, -INF)
    batch = pad(logits, np.zeros(NUM_CLASSES))
    confidence = evaluate(*batch)["per_example"]["confidence"]
    np.testing.assert_array_equal(confidence[:NUM_CLASSES], np.float32(1 / num_left))
    sums = classification_sums(*batch, num_bins=num_bins)
    lower = -(-num_bins // num_left) - 1
    np.testing.assert_array_equal(sums["bin_count"], np.bincount(lower, minlength=num_bins))


@pytest.mark.parametrize("num_rows", [1, 7, 15, 16, 44, 60])
def test_adaptive_ece_matches_array_split(num_rows):
    logits, labels = make()
    where = np.random.default_rng(0).permutation(NUM_ROWS) < num_rows
    probs = softmax(logits[where])
    order = np.argsort(probs.max(-1), kind="stable")
    confidences = np.array_split(probs.max(-1)[order], 15)
    corrects = np.array_split((probs.argmax(-1) == labels[where])[order], 15)
    expected = ece_of(list(zip(confidences, corrects, strict=True)))
    actual = evaluate(logits, labels, where)["adaptive_ece"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "scale,dtype", [(0.2, np.float32), (1, np.float32), (20, np.float32), (1, np.float64)]
)
def test_temperature_matches_scipy(scale, dtype):
    logits, labels = make(scale=scale, dtype=dtype)
    truth = scipy.optimize.minimize_scalar(
        lambda log_temperature: nll_of(logits, labels, np.exp(log_temperature)),
        bounds=(np.log(1e-2), np.log(1e2)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    with jax.enable_x64(dtype is np.float64):
        actual = evaluate(logits, labels)["fit_temperature"]
    # The minimum is flat: scipy, which compares values, finds it to half the digits.
    rtol = 1e-6 if dtype is np.float64 else 1e-4
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, np.exp(truth.x), rtol=rtol)


@pytest.mark.parametrize(
    "logits,labels,expected",
    [
        pytest.param(5 * np.eye(3), [0, 1, 2], 1e-2, id="all right"),
        pytest.param(200 * np.eye(3), [0, 1, 2], 1e-2, id="all right, by far"),
        pytest.param(-5 * np.eye(3), [0, 1, 2], 1e2, id="all wrong"),
        pytest.param(np.full((3, 4), 7), [0, 1, 2], 1, id="constant logits"),
        pytest.param([[2], [-3]], [0, 0], 1, id="one class"),
        pytest.param([[2, 1]], [-1], 1, id="no valid row"),
        pytest.param([[2, -INF]], [1], NAN, id="label removed"),
        pytest.param([[NAN, 1], [0, 1]], [0, 0], NAN, id="NaN"),
    ],
)
def test_temperature_at_its_limits(logits, labels, expected):
    actual = evaluate(*pad(logits, labels))["fit_temperature"]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_agreement_matches_scipy_and_sklearn(dtype):
    student, teacher = make(dtype=dtype)[0], make(seed=1, dtype=dtype)[0]
    result = metrics.summarize(agreement_sums(student, teacher))
    p, q = softmax(teacher), softmax(student)
    expected = {
        "agreement": sklearn.metrics.accuracy_score(p.argmax(-1), q.argmax(-1)),
        "kl_at_1": scipy.special.rel_entr(p, q).sum(-1).mean(),
    }
    chex.assert_trees_all_close(result, expected, rtol=1e-5)


def exact_kl(student, teacher):
    def log_softmax(logits):
        logits = [mpmath.mpf(float(logit)) for logit in logits]
        log_sum = mpmath.log(sum(mpmath.exp(logit) for logit in logits))
        return [logit - log_sum for logit in logits]

    with mpmath.workdps(50):
        pairs = zip(log_softmax(teacher), log_softmax(student), strict=True)
        return float(sum(mpmath.exp(log_p) * (log_p - log_q) for log_p, log_q in pairs))


def test_kl_keeps_its_digits_near_and_far():
    # From 1e-11 to 19; below 1e-7, sum(p * (log_p - log_q)) in float32 has no digit left.
    rng = np.random.default_rng(0)
    teacher = (20 + 5 * rng.normal(size=(6, 8))).astype(np.float32)
    shifts = np.array([1e-5, 1e-3, 0.1, 0.5, 3, 30])[:, None]
    student = (teacher + shifts * rng.normal(size=(6, 8))).astype(np.float32)
    actual = jax.jit(jax.vmap(metrics.agreement_sums))(student, teacher)["kl_at_1"]
    expected = [exact_kl(*rows) for rows in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=2e-3)


def test_kl_is_exactly_zero_at_equal_logits():
    logits = make(scale=30.0)[0]
    logits[0, :4] = -INF
    sums = agreement_sums(logits, logits)
    assert sums["kl_at_1"] == 0 and sums["agreement"] == NUM_ROWS


def test_kl_of_removed_and_far_classes():
    student = np.array([[0, 0], [0, -INF], [1e4, 0], [0, -INF]], np.float32)
    teacher = np.array([[0, -INF], [0, 0], [0, 1e4], [0, -INF]], np.float32)
    actual = jax.jit(jax.vmap(metrics.agreement_sums))(student, teacher)["kl_at_1"]
    saturated = 0.5 * numerics.MAX_LOG_RATIO  # p times the ratio that stands for infinity
    np.testing.assert_allclose(actual, [np.log(2), saturated, 1e4, 0], rtol=1e-6)


def test_summarize_takes_merged_and_stacked_sums():
    logits, labels = make()
    results = evaluate(logits, labels), evaluate(2 * logits, labels)
    merged = [r["classification_sums"] | r["agreement_sums"] for r in results]
    values = [metrics.summarize(sums) for sums in merged]
    names = {"accuracy", "top5", "nll", "brier", "entropy", "ece", "agreement", "kl_at_1"}
    assert set(values[0]) == names
    stacked = jax.tree.map(lambda *sums: np.stack(sums), *merged)
    expected = jax.tree.map(lambda *means: np.stack(means), *values)
    chex.assert_trees_all_close(metrics.summarize(stacked), expected, rtol=1e-6)


# --- batches, masks, classes --------------------------------------------------------------------


sums_of_parts = jax.jit(jax.vmap(sums_of))


@pytest.mark.parametrize("valid", [np.arange(NUM_ROWS) % 7 != 0, [*range(15, 29), 45]])
def test_sums_of_parts_add_up_to_the_whole(valid):
    """Of parts without a valid row and with a single one, too; the other rows are NaN."""
    logits, labels = make()
    where = np.zeros(NUM_ROWS, bool)
    where[valid] = True
    batch = np.where(where[:, None], logits, NAN), labels, where
    parts = sums_of_parts(*(x.reshape(4, 15, *x.shape[1:]) for x in batch))
    counts = where.reshape(4, 15).sum(-1)
    for sums in parts.values():
        np.testing.assert_array_equal(sums["count"], counts)
        assert not any(np.any(value[counts == 0]) for value in sums.values())
    added = jax.tree.map(lambda x: jnp.sum(x, 0), parts)
    whole = evaluate(logits, labels, where)
    chex.assert_trees_all_close(added, {name: whole[name] for name in added}, rtol=1e-5)


@pytest.mark.parametrize("garbage", [0, 1e30, NAN, INF, -INF])
def test_padded_equals_cut(garbage):
    logits, labels = make()
    padded = np.arange(NUM_ROWS) >= 47
    expected = evaluate(logits[:47], labels[:47])
    logits[padded] = garbage
    actual = evaluate(logits, labels, ~padded)
    chex.assert_trees_all_close(without_rows(actual), without_rows(expected), rtol=1e-5)


def test_withheld_equals_cut():
    logits, labels = make()
    expected = without_rows(evaluate(logits[:47], labels[:47]))
    labels[47:] = -1
    actual = without_rows(evaluate(logits, labels))
    # The agreement of two networks needs no label.
    assert actual.pop("agreement_sums")["count"] == NUM_ROWS
    del expected["agreement_sums"]
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_removed_classes_equal_cut_classes():
    logits, labels = make(num_rows=8)
    kept = np.array([0, 2, 3, 5, 6, 9])
    labels = labels % len(kept)
    expected = without_rows(evaluate(logits[:, kept], labels))
    logits[:, np.setdiff1d(np.arange(NUM_CLASSES), kept)] = -INF
    actual = without_rows(evaluate(*pad(logits, kept[labels])))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("num_rows,num_classes", [(60, 10), (0, 10), (0, 1)])
def test_without_a_valid_row_sums_are_zero_and_means_nan(num_rows, num_classes):
    logits = np.full((num_rows, num_classes), NAN, np.float32)
    results = evaluate(logits, np.full(num_rows, -1, np.int32), np.zeros(num_rows, bool))
    for name in ("classification_sums", "agreement_sums"):
        assert all(np.all(value == 0) for value in results[name].values())
        assert all(np.isnan(value) for value in metrics.summarize(results[name]).values())
    diagram = results["reliability_diagram"]
    assert np.all(diagram["count"] == 0) and np.all(np.isnan(diagram["accuracy"]))
    assert np.isnan(results["adaptive_ece"]) and results["fit_temperature"] == 1


def test_one_class_is_always_right():
    sums = classification_sums(np.array([[3.0], [-4.0]], np.float32), np.array([0, 0]))
    expected = dict(accuracy=1.0, top5=1.0, nll=0.0, brier=0.0, entropy=0.0, ece=0.0)
    assert metrics.summarize(sums) == expected


def test_leading_axes_are_rows():
    logits, labels = make()
    batch = logits, labels, np.arange(NUM_ROWS) % 5 != 0
    folded = jax.tree.map(lambda x: x.reshape(3, 4, 5, *x.shape[1:]), batch)
    actual, expected = evaluate(*folded), evaluate(*batch)
    assert actual["per_example"]["nll"].shape == (3, 4, 5)
    chex.assert_trees_all_close(without_rows(actual), without_rows(expected), rtol=1e-5)


def test_a_single_row_needs_no_leading_axis():
    logits, labels = make()
    expected = evaluate(logits, labels, np.arange(NUM_ROWS) == 1)["classification_sums"]
    actual = classification_sums(logits[1], labels[1], np.asarray(True))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_jit_equals_no_jit():
    logits, labels = make()
    where = np.arange(NUM_ROWS) % 5 != 0
    # XLA turns a product with the mask into a selection; without jit, NaN shows the difference.
    logits[~where] = NAN
    actual = evaluate(logits, labels, where)
    chex.assert_trees_all_close(actual, everything(logits, labels, where), rtol=1e-5)


def test_a_diverged_network_shows_as_nan():
    logits, labels = make()
    logits[5] = NAN
    results = evaluate(logits, labels, np.arange(NUM_ROWS) < 30)
    values = metrics.summarize(results["classification_sums"])
    assert all(np.isnan(values[name]) for name in ("nll", "brier", "ece"))
    assert np.isnan(results["agreement_sums"]["kl_at_1"]) and np.isnan(results["adaptive_ece"])


# --- properties ---------------------------------------------------------------------------------

batches = st.tuples(
    hnp.arrays(np.float32, (8, 6), elements=st.floats(-60, 60, width=32)),
    hnp.arrays(np.int32, 8, elements=st.integers(-1, 5)),
    hnp.arrays(bool, 8),
)
properties = settings(max_examples=50, deadline=None)


@properties
@given(batches)
def test_values_lie_in_their_ranges(batch):
    _, labels, where = batch
    results = evaluate(*batch)
    sums, valid = results["classification_sums"], where & (labels >= 0)
    assert sums["count"] == valid.sum() == sums["bin_count"].sum()
    if not valid.any():
        return
    result = metrics.summarize(sums)
    upper = dict(accuracy=1, top5=1, ece=1, brier=2, nll=INF, entropy=np.log(NUM_CLASSES))
    for name, value in result.items():
        assert 0 <= value <= upper[name] * (1 + 1e-6), name
    assert result["accuracy"] <= result["top5"]
    assert 0 <= results["adaptive_ece"] <= 1 + 1e-6


@properties
@given(batches, st.permutations(range(8)))
def test_the_order_of_rows_is_irrelevant(batch, order):
    # Not for the adaptive ECE: rows of equal confidence may come to lie in different bins.
    expected, actual = evaluate(*batch), evaluate(*(part[np.array(order)] for part in batch))
    for name in ("classification_sums", "agreement_sums", "reliability_diagram"):
        chex.assert_trees_all_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


@properties
@given(batches, st.permutations(range(6)), st.floats(-30, 30, width=32))
def test_kl_is_a_divergence(batch, order, shift):
    student, _, where = batch
    teacher = student[::-1, np.array(order)]
    value = agreement_sums(student, teacher, where)["kl_at_1"]
    assert value >= 0
    expected = scipy.special.rel_entr(softmax(teacher), softmax(student)).sum(-1)[where].sum()
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    shifted = agreement_sums(student + np.float32(shift), teacher, where)["kl_at_1"]
    np.testing.assert_allclose(shifted, value, rtol=1e-4, atol=1e-6)


@properties
@given(batches)
def test_no_temperature_beats_the_fitted_one(batch):
    logits, labels, where = batch
    valid = where & (labels >= 0)
    temperature = evaluate(*batch)["fit_temperature"]
    assert 0.01 <= temperature <= 100
    if not valid.any():
        return
    fitted = nll_of(logits[valid], labels[valid], temperature)
    for other in (0.01, 0.1, 0.5, 1, 2, 10, 100):
        assert fitted <= nll_of(logits[valid], labels[valid], other) + 1e-5 * (1 + fitted)


# --- errors -------------------------------------------------------------------------------------

LOGITS, LABELS = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)
LABELLED = [
    metrics.classification_sums,
    metrics.adaptive_ece,
    metrics.reliability_diagram,
    metrics.fit_temperature,
]


@pytest.mark.parametrize(
    "args,sentence",
    [
        (
            (LOGITS.astype(np.int32), LABELS),
            r"logits must be a floating-point array \[\.\.\., K\] .*; found int32\[4, 3\]\.",
        ),
        (
            (np.zeros(()), LABELS),
            r"logits must be a .* \[\.\.\., K\] with K >= 1; found float64\[\]\.",
        ),
        ((np.zeros((4, 0)), LABELS), r"logits must be a .* with K >= 1; found float64\[4, 0\]\."),
        (
            (LOGITS, LABELS.astype(np.float32)),
            r"labels must be integers \[4\], .*; found float32\[4\]\.",
        ),
        ((LOGITS, LABELS[:3]), r"labels must be integers \[4\], .*; found int32\[3\]\."),
        (
            (LOGITS, LOGITS.astype(np.int32)),
            r"labels must be integers \[4\], .*; found int32\[4, 3\]\.",
        ),
        (
            (LOGITS, LABELS, np.ones(4, np.float32)),
            r"where must be bool \[4\], .*; found float32\[4\]\.",
        ),
        ((LOGITS, LABELS, np.ones(3, bool)), r"where must be bool \[4\], .*; found bool\[3\]\."),
    ],
)
def test_refusals(args, sentence):
    for function in LABELLED if len(args) > 2 else [*LABELLED, metrics.per_example]:
        with pytest.raises(AssertionError, match=sentence):
            function(*args)
        with pytest.raises(AssertionError, match="must"):
            jax.jit(function)(*args)


@pytest.mark.parametrize(
    "args,sentence",
    [
        (
            (LOGITS.astype(np.int32), LOGITS),
            r"student_logits must be a floating-point array .*; found int32\[4, 3\]\.",
        ),
        (
            (LOGITS, LOGITS.astype(np.int32)),
            r"teacher_logits must be a floating-point array .*; found int32\[4, 3\]\.",
        ),
        (
            (LOGITS, LOGITS[:, :2]),
            r"of the same number of classes, .*; found \[\[4, 3\], \[4, 2\]\]\.",
        ),
        (
            (LOGITS, LOGITS, np.ones(4, np.float32)),
            r"where must be bool \[4\], .*; found float32\[4\]\.",
        ),
        (
            (LOGITS, LOGITS, np.ones((4, 3), bool)),
            r"where must be bool \[4\], .*; found bool\[4, 3\]\.",
        ),
    ],
)
def test_agreement_refusals(args, sentence):
    with pytest.raises(AssertionError, match=sentence):
        metrics.agreement_sums(*args)


@pytest.mark.parametrize("function", LABELLED[:3])
def test_number_of_bins_is_refused(function):
    with pytest.raises(ValueError, match=r"^num_bins must be at least 1; found 0\.$"):
        function(LOGITS, LABELS, num_bins=0)


def test_summarize_refuses_sums_without_count():
    with pytest.raises(ValueError, match=r"^sums\['count'\] must be given; found \['nll'\]\.$"):
        metrics.summarize({"nll": np.ones(())})
