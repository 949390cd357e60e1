"""What a run computes of its training examples for the terms that name it."""

import mpmath
import numpy as np
import pytest

from abkd_jax import config as configs
from abkd_jax import sweep, train_and_evaluate
from abkd_jax.run import phases


def config(log_prior, **options):
    found = configs.defaults()
    divergence = dict(fn="prior_shifted", log_prior=log_prior, divergence=dict(fn="forward_kl"))
    model = dict(model=dict(fn="mlp", widths=(8,)))
    model |= dict(optimizer=dict(fn="adam", learning_rate=1e-3))
    terms = dict(distill=dict(fn="on_logits", weight=1.0, temperature=2.0, divergence=divergence))
    found.update(
        data=dict(fn="digits", validation=297, imbalance=10) | options,
        teacher=model | dict(terms=dict(task=dict(fn="cross_entropy", weight=1.0))),
        student=model | dict(terms=terms),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        batch_size=32,
        num_steps=4,
    )
    return found


def found_in(tmp_path, log_prior, **options):
    """The array in the objective, and the counts of the training labels."""
    with phases.opened(configs.resolve(config(log_prior, **options)), tmp_path) as run:
        term = phases.objectives_of(run, run.plan.phases[-1], {})["student"]["distill"]
        labels = np.asarray(run.data.full.labels)
        array = term.loss.numbers["divergence"].numbers["log_prior"]
        return np.asarray(array, np.float64), np.bincount(labels, minlength=10)


def test_the_prior_is_that_of_the_training_labels(tmp_path):
    found, counts = found_in(tmp_path, "class_prior")
    assert counts.max() > 5 * counts.min()
    expected = [mpmath.log(mpmath.mpf(int(n)) / int(counts.sum())) for n in counts]
    np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-6)


def test_the_weights_are_those_of_bkd(tmp_path):
    found, counts = found_in(tmp_path, "class_weights")
    b = mpmath.mpf("0.9999")
    expected = [mpmath.log((1 - b) / (1 - b ** int(n))) for n in counts]
    np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-6)
    assert (np.diff(found)[np.diff(counts) < 0] > 0).all()  # the rarer, the larger


def test_withheld_labels_count_too(tmp_path):
    found, counts = found_in(tmp_path, "class_prior", labelled=20)
    np.testing.assert_allclose(np.exp(found), counts / counts.sum(), rtol=1e-6)


def test_a_class_without_examples():
    counts = np.array([3, 0, 1])
    np.testing.assert_array_equal(np.isneginf(phases.log_prior(counts)), [False, True, False])
    weights = phases.log_weights(counts)
    assert weights[1] == weights[2] == pytest.approx(0.0, abs=1e-9)


def test_it_runs_and_a_number_in_its_place_is_refused(tmp_path):
    result = train_and_evaluate(config("class_weights"), tmp_path / "run")
    assert np.isfinite(result["networks"]["student"]["last"]["nll"])
    expected = (
        "log_prior must be an array or one of class_means, class_prior, class_weights; found "
    )
    with pytest.raises(ValueError, match=expected + "'prior'"):
        configs.resolve(config("prior"))


@pytest.mark.long
def test_a_sweep_has_it_too(tmp_path):
    over = {"student.terms.distill.temperature": [1.0, 2.0]}
    rows = sweep.sweep(config("class_weights"), tmp_path / "sweep", over=over)
    alone = train_and_evaluate(config("class_weights"), tmp_path / "run")["networks"]["student"]
    (row,) = [row for row in rows if row["student.terms.distill.temperature"] == 2.0]
    assert row["test_nll"] == pytest.approx(alone["last"]["nll"], rel=1e-5)


def test_no_label_is_no_prior():
    with pytest.raises(ValueError, match=r"class_prior must be left out for data without a known"):
        phases.log_prior(np.zeros(3, int))
