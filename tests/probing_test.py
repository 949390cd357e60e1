"""`config.analysis`: measured beside a run, which it leaves as it is."""

import json

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax import numpy as jnp

from abkd_jax import analysis, data, load, losses, models, optimizers, train
from abkd_jax.binding import bind
from abkd_jax.divergences import forward_kl
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.run.probing import probed
from abkd_jax.types import Term

K, DIM = 3, 6


def config(**changes):
    task = dict(fn="cross_entropy", weight=1.0)
    distill = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))
    sgd = dict(fn="sgd", learning_rate=0.1)
    net = dict(model=dict(fn="mlp", widths=(5,)), optimizer=sgd)
    values = dict(
        data=dict(fn="digits", validation=0),
        teacher=net | dict(terms=dict(task=task)),
        student=net | dict(terms=dict(task=task, distill=distill)),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        batch_size=16,
        num_steps=6,
        checkpoint_every=6,
        log_every=3,
        devices=1,
        init_seed=0,
        data_seed=0,
    )
    return values | changes


def dataset():
    def drawn(size, seed):
        labels = np.arange(size) % K
        noise = np.random.default_rng(seed).normal(size=(size, DIM))
        return (2 * np.eye(K, DIM)[labels] + noise).astype(np.float32), labels

    parts = dict(train=drawn(64, 0), validation=drawn(30, 1), test=drawn(36, 2))
    return data.from_arrays(**parts, num_classes=K)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_with_its_analysis(tmp_path):
    train_and_evaluate(config(), tmp_path / "plain", data=dataset())
    train_and_evaluate(config(analysis=analysis.PROBES), tmp_path / "whole", data=dataset())
    results = [(tmp_path / name / "result.json").read_bytes() for name in ("plain", "whole")]
    assert results[0] == results[1]  # the hashes of all states among it
    found = [row for row in rows(tmp_path / "whole") if "student/loss" in row]
    assert [row["step"] for row in found] == [3, 6]
    names = {
        key.removeprefix("analysis/student/") for key in found[0] if key.startswith("analysis")
    }
    assert names == {
        "entropy",
        "effective_temperature/teacher",
        "gradient_cosine/distill/task",
        "gradient_noise/signal_to_noise",
        "gradient_noise/squared_norm",
        "gradient_noise/variance",
        "gradient_norm/distill",
        "gradient_norm/task",
        "mass_flow/moved",
        "mass_flow/to_head/teacher",
        "mass_flow/to_middle/teacher",
        "mass_flow/to_tail/teacher",
        "mass_flow/to_target",
        "mass_flow/to_underestimated/teacher",
    }
    strip = lambda row: {k: v for k, v in row.items() if not k.startswith(("time/", "analysis/"))}  # noqa: E731
    assert list(map(strip, rows(tmp_path / "whole"))) == list(map(strip, rows(tmp_path / "plain")))
    assert found[0]["time/analysis_seconds"] > 0
    page = (tmp_path / "whole" / "report.md").read_text()
    assert "## Analysis" in page and (tmp_path / "whole" / "figures" / "analysis.png").exists()
    assert "## Analysis" not in (tmp_path / "plain" / "report.md").read_text()


def test_the_entropy_is_that_of_the_first_batches(tmp_path):
    """The epoch has just four batches, so that the mean is over the whole split."""
    train_and_evaluate(config(analysis=("entropy",)), tmp_path, data=dataset())
    module, variables, _ = load(tmp_path)
    logits = module.apply(variables, dataset().train.inputs, train=False).logits
    entropies = scipy.stats.entropy(
        scipy.special.softmax(np.asarray(logits, float), axis=-1), axis=-1
    )
    last = [row for row in rows(tmp_path) if "analysis/student/entropy" in row][-1]
    np.testing.assert_allclose(last["analysis/student/entropy"], entropies.mean(), rtol=1e-5)


def test_a_scheduled_weight_is_that_of_the_learners_step(tmp_path):
    """The parameters stand still, so that the gradient's norm is the weight times one number."""
    norms = {}
    for name, weight in (("one", 1.0), ("ramp", dict(fn="linear", start=1.0, end=3.0))):
        values = config(analysis=("gradient_norms",))
        student = values["student"]
        distill = student["terms"]["distill"] | dict(weight=weight)
        still = dict(optimizer=dict(fn="sgd", learning_rate=0.0), terms=dict(distill=distill))
        train_and_evaluate(values | dict(student=student | still), tmp_path / name, data=dataset())
        key = "analysis/student/gradient_norm/distill"
        norms[name] = {row["step"]: row[key] for row in rows(tmp_path / name) if key in row}
    assert norms["one"][3] == pytest.approx(norms["one"][6])
    assert norms["ramp"][3] == pytest.approx(2 * norms["one"][3], rel=1e-5)
    assert norms["ramp"][6] == pytest.approx(3 * norms["one"][6], rel=1e-5)


@pytest.mark.slow
def test_networks_that_learn_together_and_input_gradients(tmp_path):
    values = config(
        phases=dict(together=dict(learn=("teacher", "student"), select="student")),
        analysis=("gradient_norms", "mass_flow"),
        batch_size=64,
    )
    kdiga = dict(fn="input_gradient_alignment", weight=1.0)
    terms = values["student"]["terms"] | dict(it=kdiga)
    values["student"] = values["student"] | dict(terms=terms, init_seed=1)
    train_and_evaluate(values, tmp_path, data=dataset())
    last = [row for row in rows(tmp_path) if "student/loss" in row][-1]
    assert last["analysis/student/gradient_norm/it"] > 0
    assert last["analysis/teacher/gradient_norm/task"] > 0
    # The parts of the loss at this step differ from the step's own batch by the batch alone.
    assert 0 < last["analysis/teacher/mass_flow/moved"] < 0.1


def test_networks_are_seen_as_in_training_and_as_in_evaluation():
    """A learner without its moving average, a network that does not learn by it."""
    module, rule = models.mlp(num_classes=K, widths=(5,)), bind(optimizers.sgd, learning_rate=0.1)
    student, plain, average = (
        train.create(module, jnp.zeros((1, DIM)), init_seed=seed, optimizer=rule)
        for seed in range(3)
    )
    both = plain.replace(ema_params=average.params)
    term = Term(bind(losses.on_logits, divergence=forward_kl), jnp.ones(()), other="teacher")
    split = dataset().train
    batches = {
        "inputs": split.inputs.reshape(4, 16, DIM),
        "labels": split.labels.reshape(4, 16),
        "where": jnp.ones((4, 16), bool),
    }

    def found(teacher, learns):
        learners = {"student": student} | ({"teacher": teacher} if learns else {})
        frozen = {} if learns else {"teacher": teacher}
        objectives = {name: {"distill": term} for name in learners}
        if learns:
            objectives["teacher"] = {"distill": term.replace(other="student")}
        options = dict(objectives=objectives, probes=("effective_temperature",))
        values = probed(learners, frozen, batches, **options)
        return values["analysis/student/effective_temperature/teacher"]

    assert found(both, True) == found(plain, True) != found(average, True)
    assert found(both, False) == found(average, False) != found(plain, False)


def test_one_batch_has_no_gradient_noise(tmp_path):
    values = config(analysis=("gradient_noise", "entropy"), batch_size=64)
    train_and_evaluate(values, tmp_path, data=dataset())
    keys = {key for row in rows(tmp_path) for key in row if key.startswith("analysis/")}
    assert keys == {"analysis/student/entropy"}


@pytest.mark.parametrize("given", [("entropie",), "entropy", 5])
def test_unknown_probes_are_refused(given, tmp_path):
    with pytest.raises(ValueError, match=r"^analysis: probes must be .*; found .*\.$"):
        train_and_evaluate(config(analysis=given), tmp_path, data=dataset())
    assert jax.tree.leaves([path.name for path in tmp_path.iterdir()]) == []
