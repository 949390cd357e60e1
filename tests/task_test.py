"""Classification as a task: its sums add up, its scores are those of numpy and scikit-learn."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy.special import entr, rel_entr
from sklearn import metrics as reference

from abkd_jax import data, metrics
from abkd_jax.tasks import Column, classification
from abkd_jax.types import Outputs

TASK, K = classification(), 4


def drawn(size, seed=0, scale=3.0):
    """Overconfident logits, and labels that go with them more often than not, without class 3."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K - 1, size)
    logits = rng.normal(size=(size, K)) + np.eye(K)[labels]
    return (scale * logits).astype(np.float32), labels.astype(np.int32)


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True).astype(np.float64))
    return exp / exp.sum(-1, keepdims=True)


def ece(probabilities, labels, bins=15):
    """Guo et al. 2017, section 2, one bin after the other."""
    confidence, found = probabilities.max(-1), 0.0
    correct = probabilities.argmax(-1) == labels
    for low in np.arange(bins) / bins:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            found += inside.mean() * gap
    return found


def sums(logits, labels, where=None):
    """Those of networks by name: {name: logits}."""
    where = np.ones(np.shape(labels), bool) if where is None else where
    outputs = {name: Outputs(logits=jnp.asarray(x)) for name, x in logits.items()}
    batch = {"labels": jnp.asarray(labels), "where": jnp.asarray(where)}
    return jax.jit(lambda x, batch: TASK.sums(x, batch, tuple(x)))(outputs, batch)


def summary(logits, labels, where=None):
    return jax.jit(TASK.summary)(sums(logits, labels, where))


def scores(logits, labels, selecting=None):
    found = summary({"student": logits}, labels)["student"]
    if selecting is not None:
        selecting = dict(zip(("logits", "labels"), selecting, strict=True))
    return TASK.scores(found, {"logits": logits, "labels": labels}, selecting)


# --- sums ---------------------------------------------------------------------------------------


def assert_close(found, expected, rtol=2e-5):
    assert set(found) == set(expected)
    for name in found:
        assert set(found[name]) == set(expected[name])
        for metric, value in found[name].items():
            told = f"{name} {metric}"
            np.testing.assert_allclose(value, expected[name][metric], rtol=rtol, err_msg=told)


@pytest.mark.parametrize("parts", [(100,), (30, 40, 30), (1, 99), (0, 100)])
def test_sums_add_up_over_batches(parts):
    """Whatever the batches are, an empty one too; NaN where a class has no example."""
    logits, labels = drawn(100)
    both = {"student": logits, "teacher": drawn(100, seed=1)[0]}
    ends = np.cumsum(parts)
    of_parts = [
        sums({name: x[end - size : end] for name, x in both.items()}, labels[end - size : end])
        for size, end in zip(parts, ends, strict=True)
    ]
    added = jax.tree.map(lambda *x: sum(x), *of_parts)
    assert set(added) == {"student", "teacher", "student|teacher", "teacher|student"}
    assert_close(TASK.summary(added), summary(both, labels))


def test_the_summary_is_that_of_the_metrics_on_the_whole():
    logits, labels = drawn(100)
    found = summary({"student": logits, "teacher": logits[::-1]}, labels)
    expected = metrics.summarize(metrics.classification_sums(logits, labels))
    for metric, value in expected.items():
        np.testing.assert_allclose(found["student"][metric], value, rtol=1e-6, err_msg=metric)
    pair = found["student|teacher"]
    np.testing.assert_allclose(
        pair["agreement"], np.mean(logits.argmax(-1) == logits[::-1].argmax(-1)), rtol=1e-6
    )
    assert TASK.score(found["student"]) == found["student"]["accuracy"]
    assert TASK.score_column.key == "accuracy"


def test_only_the_named_networks_have_sums_and_each_with_every_other():
    logits, labels = drawn(20)
    outputs = {name: Outputs(logits=jnp.asarray(logits)) for name in ("a", "b", "c")}
    batch = {"labels": jnp.asarray(labels), "where": jnp.ones(20, bool)}
    assert set(TASK.sums(outputs, batch, ("b",))) == {"b", "b|a", "b|c"}


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_any_axes_count_where_the_mask_says(seed):
    """Labels [B, T]: what is masked, such as padding, is as if it were not there."""
    logits, labels = (x.reshape(12, 5, *x.shape[1:]) for x in drawn(60, seed))
    where = np.random.default_rng(seed).random((12, 5)) < 0.6
    other = drawn(60, seed + 9)[0].reshape(logits.shape)
    poisoned = np.where(where[..., None], logits, np.nan)
    found = summary({"a": poisoned, "b": other}, np.where(where, labels, -1), where)
    expected = summary({"a": logits[where], "b": other[where]}, labels[where])
    assert_close(found, expected)
    assert sum(found["a"]["class_count"]) == where.sum()


def test_a_fully_masked_batch_adds_nothing():
    logits, labels = drawn(8)
    whole, nothing = sums({"a": logits}, labels), sums({"a": logits}, labels, np.zeros(8, bool))
    added = jax.tree.map(jnp.add, whole, nothing)
    jax.tree.map(np.testing.assert_array_equal, added, whole)


# --- scores -------------------------------------------------------------------------------------


def test_scores_are_those_of_numpy_and_scikit_learn():
    logits, labels = drawn(200)
    found = scores(logits, labels)
    probabilities = softmax(logits)
    np.testing.assert_allclose(found["accuracy"], np.mean(logits.argmax(-1) == labels), rtol=1e-6)
    expected = reference.log_loss(labels, probabilities, labels=range(K))
    np.testing.assert_allclose(found["nll"], expected, rtol=1e-5)  # float32 sums of 200 numbers
    expected = np.mean(np.sum((probabilities - np.eye(K)[labels]) ** 2, -1))
    np.testing.assert_allclose(found["brier"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["ece"], ece(probabilities, labels), rtol=1e-4)
    assert found["top5"] is None  # of four classes
    assert found["count"] == 200 and found["temperature"] is None and found["scaled"] is None


@pytest.mark.parametrize("k,known", [(5, False), (6, True), (20, True)])
def test_the_label_among_five_is_a_score_where_there_are_more(k, known):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, k)).astype(np.float32), rng.integers(0, k, 50)
    found = scores(logits, labels)["top5"]
    if not known:
        assert found is None
        return
    expected = np.mean([y in np.argsort(-x)[:5] for x, y in zip(logits, labels, strict=True)])
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_class_without_examples_has_no_accuracy():
    logits, labels = drawn(60)
    found = scores(logits, labels)["class_accuracy"]
    matrix = reference.confusion_matrix(labels, logits.argmax(-1), labels=range(K))
    np.testing.assert_allclose(found[:3], np.diag(matrix)[:3] / matrix.sum(-1)[:3], rtol=1e-6)
    assert np.isnan(found[3])


def test_the_reliability_diagram_adds_up_to_the_ece():
    logits, labels = drawn(200)
    found = scores(logits, labels)
    count, confidence, accuracy = (
        np.asarray(found["reliability"][name]) for name in ("count", "confidence", "accuracy")
    )
    filled = count > 0
    assert not filled.all() and np.isnan(accuracy[~filled]).all()  # four classes: at least 1/4
    gaps = np.abs(accuracy - confidence)[filled] * count[filled]
    np.testing.assert_allclose(gaps.sum() / 200, found["ece"], rtol=1e-5)


def test_adaptive_bins_hold_equally_many_rows_and_the_diagrams_are_equally_wide():
    """As trained and scaled, in numpy; of 400 rows, 10 of 15 bins hold 27 and 5 hold 26."""
    logits, labels = drawn(400)
    found = scores(logits, labels, drawn(400, seed=1))
    scaled = logits / np.float32(found["temperature"])
    for part, part_logits in ((found, logits), (found["scaled"], scaled)):
        probabilities = softmax(part_logits)
        confidence = probabilities.max(-1)
        correct = probabilities.argmax(-1) == labels
        bins = np.array_split(np.argsort(confidence, kind="stable"), 15)
        gaps = [len(x) * abs(correct[x].mean() - confidence[x].mean()) for x in bins]
        np.testing.assert_allclose(part["adaptive_ece"], sum(gaps) / 400, rtol=1e-5)
        counts = np.histogram(confidence, np.arange(16) / 15)[0]
        np.testing.assert_array_equal(part["reliability"]["count"], counts)
    assert abs(found["scaled"]["adaptive_ece"] - found["scaled"]["ece"]) > 1e-3


def test_a_temperature_scales_the_calibration_alone():
    logits, labels = drawn(400)
    held_out, known = drawn(400, seed=1)
    plain, found = scores(logits, labels), scores(logits, labels, (held_out, known))
    temperature = found["temperature"]
    assert temperature > 1.5  # for the logits are three times those of the true distribution
    for name in ("accuracy", "top5", "nll", "ece", "class_accuracy"):
        np.testing.assert_equal(found[name], plain[name])
    by_hand = scores(logits / np.float32(temperature), labels)
    assert set(found["scaled"]) == {"nll", "brier", "ece", "adaptive_ece", "reliability"}
    for name, value in found["scaled"].items():
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # noqa: E731
        jax.tree.map(close, value, by_hand[name])
    assert by_hand["accuracy"] == plain["accuracy"]

    def nll(t):
        return reference.log_loss(known, softmax(held_out / t), labels=range(K))

    # The minimum on validation data: lower than unscaled, and than one per cent to either side.
    assert nll(temperature) < nll(1.0) - 0.05
    assert nll(temperature) < min(nll(temperature * 1.01), nll(temperature / 1.01))


# --- what a task refuses and shows --------------------------------------------------------------


def description(labels=()):
    """Of data with K classes, and labels of a shape for each row."""
    inputs = jax.ShapeDtypeStruct((6,), jnp.float32)
    return data.Description(K, (), inputs, jax.ShapeDtypeStruct(labels, jnp.int32))


def shaped(*shape, dtype=jnp.float32):
    return Outputs(logits=jax.ShapeDtypeStruct(shape, dtype))


def test_logits_for_each_row_and_class_pass():
    TASK.check("student", shaped(2, K), description())
    TASK.check("student", shaped(2, K, dtype=jnp.bfloat16), description())
    TASK.check("student", shaped(2, 7, K), description((7,)))
    TASK.check("student", Outputs(logits=jnp.zeros((2, K))), description())


REFUSED = [
    (Outputs(), (), "must give floating logits; found none."),
    (shaped(2, K, dtype=jnp.int32), (), "must give floating logits; found int32."),
    (shaped(2, K + 1), (), "must give logits of shape (B, 4); found (2, 5)."),
    (shaped(K), (), "must give logits of shape (B, 4); found (4,)."),
    (shaped(2, 7, K), (), "must give logits of shape (B, 4); found (2, 7, 4)."),
    (shaped(2, K), (7,), "must give logits of shape (B, 7, 4); found (2, 4)."),
    (shaped(2, 6, K), (7,), "must give logits of shape (B, 7, 4); found (2, 6, 4)."),
]


@pytest.mark.parametrize("outputs,labels,sentence", REFUSED)
def test_other_logits_are_refused_by_the_name_of_their_network(outputs, labels, sentence):
    with pytest.raises(ValueError) as refused:
        TASK.check("tutor", outputs, description(labels))
    assert str(refused.value) == f"tutor {sentence}"


def test_a_sample_has_distributions_and_images_where_the_inputs_are_some():
    logits, labels = drawn(3)
    rows = {"student": TASK.rows(Outputs(logits=jnp.asarray(logits)), {"labels": labels})}
    rows["student"]["logits"] = rows["student"]["logits"].astype(jnp.bfloat16)
    where = np.asarray([True, True, True, False])
    images = np.arange(4 * 2 * 2).reshape(4, 2, 2, 1).astype(np.uint8)
    found = TASK.sample(rows, {"inputs": images, "where": where})
    assert set(found) == {"labels", "images", "probabilities/student"}
    np.testing.assert_array_equal(found["images"], images[:3])
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["probabilities/student"].dtype == np.float32
    np.testing.assert_allclose(found["probabilities/student"].sum(-1), 1, atol=1e-6)
    vectors = TASK.sample(rows, {"inputs": np.zeros((4, 5)), "where": where})
    assert set(vectors) == {"labels", "probabilities/student"}


def test_what_is_notable_is_what_networks_disagree_on():
    """By the Jensen-Shannon divergence; of one network, by its entropy."""
    sure, other, unsure = [9.0, 0, 0, 0], [0, 9.0, 0, 0], [1.0, 1, 1, 1]
    dead = [0.0, -np.inf, -np.inf, -np.inf]
    a = np.asarray([sure, sure, unsure, sure, dead], np.float32)
    b = np.asarray([sure, other, unsure, unsure, dead], np.float32)
    rows = {name: {"logits": x, "labels": np.zeros(5, int)} for name, x in (("a", a), ("b", b))}
    p, q = softmax(a.astype(float)), softmax(b.astype(float))
    expected = (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(-1) / 2
    np.testing.assert_allclose(TASK.notable(rows), expected, atol=1e-6)
    assert np.argmax(expected) == 1 and expected[1] <= np.log(2)
    del rows["b"]
    np.testing.assert_allclose(TASK.notable(rows), entr(p).sum(-1), atol=1e-6)


def test_a_column_shows_a_number_with_its_unit():
    assert Column("accuracy", "accuracy %", 100, 2).cell(0.12345) == "12.35"
    assert Column("nll", "NLL").cell(1.5) == "1.5000"
    assert Column("nll", "NLL").cell(None) == Column("nll", "NLL").cell(float("nan")) == "-"
    assert Column("accuracy", "accuracy %", 100, 1).cell(0.5, 0.6, 0.7) == "60.0 +- 10.0"
    assert Column("nll", "NLL").cell(1.5, None) == "-"
