"""Several init seeds in one run: each is the run with its seed alone, and the report has all."""

import itertools
import json
import signal

import jax
import numpy as np
import pytest

from abkd_jax import data, load, train_and_evaluate
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.log.writer import read

K, DIM = 3, 6
TASK = dict(task=dict(fn="cross_entropy", weight=1.0, where="labelled"))
KL = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))
MLP = dict(fn="mlp", widths=(4,))
SGD = dict(fn="sgd", learning_rate=0.3, momentum=0.9)
SEEDED = ("baseline", "student")


def config(**changes):
    """A teacher, a baseline on labels, and a student, whose own init seed is another."""
    network = dict(model=MLP, optimizer=SGD, terms=TASK)
    values = dict(
        teacher=network,
        baseline=network,
        student=network | dict(terms=dict(distill=KL), init_seed=5),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            baseline=dict(learn=("baseline",), split="labelled"),
            distill=dict(learn=("student",), see=("teacher",), num_steps=4),
        ),
        batch_size=16,
        num_steps=2,
        checkpoint_every=2,
        log_every=1,
        devices=1,
    )
    return values | changes


def dataset():
    """Vectors around a corner for each class."""

    def drawn(size, seed):
        labels = np.arange(size) % K
        noise = np.random.default_rng(seed).normal(size=(size, DIM))
        return (np.eye(K, DIM)[labels] + noise).astype(np.float32), labels

    splits = {name: drawn(48, i) for i, name in enumerate(("train", "validation", "test"))}
    return data.from_arrays(**splits, num_classes=K, labelled=24)


def trained(workdir, **changes):
    return train_and_evaluate(config(**changes), workdir, data=dataset())


def first_seed(name):
    """The first init seed of a network."""
    return config()[name].get("init_seed", 0)


def alone(seed):
    """The config of the run that trains the networks of one seed alone."""
    own = {name: config()[name] | dict(init_seed=first_seed(name) + seed) for name in SEEDED}
    return config(**own)


def rows(folder):
    """The rows of a phase without wall-clock times."""
    return [{k: v for k, v in row.items() if k[:5] != "time/"} for row in read(folder)]


def refusal(call, *args, **options):
    with pytest.raises(ValueError) as refused:
        call(*args, **options)
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two seeds: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("done")
    return workdir, trained(workdir, init_seeds=2)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The run of the second seed alone: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("second")
    return workdir, train_and_evaluate(alone(1), workdir, data=dataset())


def test_a_seed_is_the_run_with_it_alone(done, second):
    """Bitwise, in its states, scores and rows, and in what its folder says of itself."""
    (workdir, result), (single, expected) = done, second
    assert result["networks"]["teacher"] == expected["networks"]["teacher"]  # for both seeds
    for name in SEEDED:
        found = result["networks"][name]
        assert [x["init_seed"] for x in found["seeds"]] == [first_seed(name), first_seed(name) + 1]
        assert found["seeds"][1] == {"init_seed": first_seed(name) + 1} | expected["networks"][name]
        assert found["seeds"][0]["sha256"] == found["sha256"] != found["seeds"][1]["sha256"]
        assert found["seeds"][0]["last"] == found["last"]
    for phase in ("", "baseline"):
        assert rows(workdir / phase / "seed_1") == rows(single / phase) != rows(workdir / phase)
        own, other = (
            json.loads((x / "config.json").read_text())
            for x in (workdir / phase / "seed_1", single / phase)
        )
        assert own == other
    assert not (workdir / "teacher" / "seed_1").exists()


def test_means_and_deviations(done):
    workdir, result = done
    page = (workdir / "report.md").read_text()
    for name in SEEDED:
        found = result["networks"][name]
        for key in ("accuracy", "nll", "class_accuracy"):
            values = [seed["last"][key] for seed in found["seeds"]]
            np.testing.assert_allclose(found["mean"][key], np.mean(values, 0), rtol=1e-12)
            np.testing.assert_allclose(found["deviation"][key], np.std(values, 0, ddof=1))
        values = [seed["last"]["scaled"]["nll"] for seed in found["seeds"]]
        assert found["deviation"]["scaled"]["nll"] == pytest.approx(np.std(values, ddof=1))
        nll = [seed["last"]["nll"] for seed in found["seeds"]]
        assert f" {np.mean(nll):.4f} +- {np.std(nll, ddof=1):.4f} |" in page
    assert "mean" not in result["networks"]["teacher"]


def test_a_seed_is_loaded(done, second):
    (workdir, _), (single, _) = done, second
    inputs = np.asarray(dataset().test.inputs)
    for folder in ("", "baseline"):
        first, found = (load(workdir / folder, seed=seed)(inputs).logits for seed in (0, 1))
        np.testing.assert_array_equal(found, load(single / folder)(inputs).logits)
        assert np.any(first != found)
    for folder, seed in (("", 2), ("teacher", 1)):
        assert refusal(load, workdir / folder, seed=seed) == (
            f"seed must be 0, or that of a folder seed_1, seed_2, ... of {workdir / folder}; "
            f"found {seed}."
        )


def test_a_run_that_grows_and_is_stopped_ends_as_one_that_was_not(
    done, tmp_path, monkeypatch, caplog
):
    """From one seed to two, stopped in the second student: nothing done or compiled twice."""
    workdir, result = done
    trained(tmp_path)
    update, steps = Progress.update, []

    def stopping(self, step, **shown):
        steps.append(step)
        if step == 3 and 3 not in steps[:-1]:  # the student alone has three steps
            signal.raise_signal(signal.SIGTERM)
        update(self, step, **shown)

    monkeypatch.setattr(Progress, "update", stopping)
    with pytest.raises(SystemExit) as left, jax.log_compiles():
        trained(tmp_path, init_seeds=2)
    assert "Compiling jit(" in caplog.text and "Compiling jit(_advance)" not in caplog.text
    assert left.value.code == 128 + signal.SIGTERM and not (tmp_path / "report.md").exists()
    grown = trained(tmp_path, init_seeds=2)
    assert [step for step, _ in itertools.groupby(steps)] == [1, 2, 1, 2, 3, 4]
    np.testing.assert_equal(grown, result)
    for phase in ("teacher", "baseline", "baseline/seed_1", "", "seed_1"):
        assert rows(tmp_path / phase) == rows(workdir / phase)
    before = (tmp_path / "report.md").stat().st_mtime_ns
    np.testing.assert_equal(trained(tmp_path, init_seeds=2), result)  # which is there
    assert (tmp_path / "report.md").stat().st_mtime_ns == before
    assert refusal(trained, tmp_path) == (
        f"{tmp_path} is the workdir of another run; these differ: init_seeds (2 there, 1 here). "
        "Choose another workdir, or the config of that run."
    )


@pytest.mark.long
def test_all_seeds_are_evaluated(done):
    workdir, result = done
    options = dict(data=dataset(), evaluate_only=True)
    again = train_and_evaluate(config(init_seeds=2), workdir, **options)
    np.testing.assert_equal(again, result)
    message = refusal(train_and_evaluate, config(init_seeds=3), workdir, **options)
    assert "init_seeds (2 there, 3 here)" in message
