"""Evaluation: scores as numpy and scikit-learn have them, the same on any devices and batches."""

import functools

import jax
import numpy as np
import pytest
from sklearn import metrics as reference

from abkd_jax import data, models, train
from abkd_jax.train import evaluation, parallel

K = 4


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


# --- scores -------------------------------------------------------------------------------------


def test_scores_are_those_of_numpy_and_scikit_learn():
    logits, labels = drawn(200)
    found = evaluation.scores(logits, labels, None)
    probabilities = softmax(logits)
    np.testing.assert_allclose(found["accuracy"], np.mean(logits.argmax(-1) == labels), rtol=1e-6)
    expected = reference.log_loss(labels, probabilities, labels=range(K))
    np.testing.assert_allclose(found["nll"], expected, rtol=1e-5)  # float32 sums of 200 numbers
    expected = np.mean(np.sum((probabilities - np.eye(K)[labels]) ** 2, -1))
    np.testing.assert_allclose(found["brier"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["ece"], ece(probabilities, labels), rtol=1e-4)
    assert found["top5"] == 1.0  # of four classes
    assert found["count"] == 200 and found["temperature"] is None and found["scaled"] is None


def test_a_class_without_examples_has_no_accuracy():
    logits, labels = drawn(60)
    found = evaluation.scores(logits, labels, None)["class_accuracy"]
    matrix = reference.confusion_matrix(labels, logits.argmax(-1), labels=range(K))
    np.testing.assert_allclose(found[:3], np.diag(matrix)[:3] / matrix.sum(-1)[:3], rtol=1e-12)
    assert np.isnan(found[3])


def test_the_reliability_diagram_adds_up_to_the_ece():
    logits, labels = drawn(200)
    found = evaluation.scores(logits, labels, None)
    count, confidence, accuracy = (
        np.asarray(found["reliability"][name]) for name in ("count", "confidence", "accuracy")
    )
    filled = count > 0
    assert not filled.all() and np.isnan(accuracy[~filled]).all()  # four classes: at least 1/4
    gaps = np.abs(accuracy - confidence)[filled] * count[filled]
    np.testing.assert_allclose(gaps.sum() / 200, found["ece"], rtol=1e-5)


def test_a_temperature_scales_the_calibration_alone():
    logits, labels = drawn(400)
    held_out, known = drawn(400, seed=1)
    gathered = evaluation.Gathered({"student": held_out}, known)
    temperature = evaluation.temperatures(gathered)["student"]
    assert temperature > 1.5  # for the logits are three times those of the true distribution
    plain = evaluation.scores(logits, labels, None)
    found = evaluation.scores(logits, labels, temperature)
    for name in ("accuracy", "top5", "nll", "ece", "class_accuracy"):
        np.testing.assert_equal(found[name], plain[name])
    by_hand = evaluation.scores(logits / temperature, labels, None)
    for name, value in found["scaled"].items():
        np.testing.assert_equal(value, by_hand[name])
    assert by_hand["accuracy"] == plain["accuracy"]

    def nll(t):
        return reference.log_loss(known, softmax(held_out / t), labels=range(K))

    # The minimum on validation data: lower than unscaled, and than one per cent to either side.
    assert nll(temperature) < nll(1.0) - 0.05
    assert nll(temperature) < min(nll(temperature * 1.01), nll(temperature / 1.01))


# --- of networks on splits ----------------------------------------------------------------------

SIZE = 37  # a multiple of neither the batch sizes nor the numbers of devices


@functools.cache
def dataset():
    rng = np.random.default_rng(0)

    def examples(size):
        inputs = rng.integers(0, 256, (size, 4, 4, 1), dtype=np.uint8)
        return inputs, rng.integers(0, K, size)

    return data.from_arrays(
        train=examples(16), validation=None, test=examples(SIZE), num_classes=K, mean=(0.4,),
        std=(0.2,),
    )  # fmt: skip


@functools.cache
def networks():
    """Two of them, as training leaves them: one with a moving average and batch statistics."""
    inputs = next(data.evaluation_batches(dataset().test, 2, dataset().preprocess))["inputs"]
    modules = {
        "student": models.cnn(num_classes=K, widths=(4,), batch_norm=True),
        "teacher": models.mlp(num_classes=K, widths=(8,)),
    }
    states = {}
    for seed, (name, module) in enumerate(modules.items()):
        variables = module.init(jax.random.key(seed), inputs, train=False)
        states[name] = train.adopt(module.apply, variables)
    student = states["student"]
    halved = jax.tree.map(lambda x: 0.5 * x, student.params)
    shifted = jax.tree.map(lambda x: x + 0.25, student.batch_stats)
    return states | {"student": student.replace(ema_params=halved, batch_stats=shifted)}


def direct(name):
    """The logits of one forward pass on all examples, normalised by hand."""
    state = networks()[name]
    inputs = (np.asarray(dataset().test.inputs, np.float32) / 255 - 0.4) / 0.2
    params = state.params if state.ema_params is None else state.ema_params
    return state.forward(params, inputs.astype(np.float32), train=False)[0].logits


@pytest.mark.parametrize("devices,size", [(1, 5), (1, 37), (1, 64), (2, 5), (8, 8), (8, 64)])
def test_gathered_logits_are_those_of_a_direct_forward_pass(devices, size):
    """Every example once, in order, whatever the padding."""
    mesh = parallel.mesh(devices, batch_size=8 * devices)
    how = dict(size=size, preprocess=dataset().preprocess, mesh=mesh)
    found = evaluation.gather(networks(), dataset().test, **how)
    np.testing.assert_array_equal(found.labels, dataset().test.labels)
    for name, logits in found.logits.items():
        # float32: matrix products of other shapes may add in another order.
        np.testing.assert_allclose(logits, direct(name), rtol=1e-5, atol=1e-5)
        assert np.ptp(direct(name)) > 0.1


@pytest.mark.parametrize("devices,size", [(1, 5), (8, 16)])
def test_the_quick_metrics_are_those_of_the_scores(devices, size):
    mesh = parallel.mesh(devices, batch_size=8 * devices)
    how = dict(size=size, preprocess=dataset().preprocess, mesh=mesh)
    quick = evaluation.quick(networks(), dataset().test, **how)
    gathered = evaluation.gather(networks(), dataset().test, **how)
    for name in networks():
        scores = evaluation.scores(gathered.logits[name], gathered.labels, None)
        assert set(quick[name]) == {"accuracy", "top5", "nll", "brier", "entropy", "ece"}
        for metric, value in quick[name].items():
            # The bins of the ECE and its sums are of float32, in another order.
            np.testing.assert_allclose(value, scores[metric], rtol=2e-5, err_msg=metric)
