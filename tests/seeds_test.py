"""Several init seeds in one run: each is the run with its seed alone, and the report has all."""

import contextlib
import io
import itertools
import json
import logging
import signal

import jax
import numpy as np
import pytest

from abkd_jax import data, load, train_and_evaluate
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.log.writer import read

pytestmark = pytest.mark.long
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


@contextlib.contextmanager
def stopped_in_the_second_student():
    """SIGTERM at the third step of the student that begins next, which ends the run.

    Yields:
        The steps that are done until the context ends, in order.
    """
    update, steps = Progress.update, []

    def stopping(self, step, **shown):
        steps.append(step)
        if step == 3 and steps.count(3) == 1:  # no other phase has three steps
            signal.raise_signal(signal.SIGTERM)
        update(self, step, **shown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", stopping)
        with pytest.raises(SystemExit) as left:
            yield steps
    assert left.value.code == 128 + signal.SIGTERM


class Done:
    """A run of one seed that grew to two, and was stopped on the way."""

    def __init__(self, workdir):
        self.workdir, self.first, told = workdir, trained(workdir), io.StringIO()
        logger, handler = logging.getLogger("jax"), logging.StreamHandler(told)
        logger.addHandler(handler)
        with stopped_in_the_second_student() as self.steps, jax.log_compiles():
            trained(workdir, init_seeds=2)
        logger.removeHandler(handler)
        self.compiled, self.reported = told.getvalue(), (workdir / "report.md").exists()
        self.result = trained(workdir, init_seeds=2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return Done(tmp_path_factory.mktemp("done"))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The run of the second seed alone, which nothing stopped: (workdir, result)."""
    workdir = tmp_path_factory.mktemp("second")
    return workdir, train_and_evaluate(alone(1), workdir, data=dataset())


def test_a_seed_is_the_run_with_it_alone(done, second):
    """Bitwise, in its states, scores and rows, and in what its folder says of itself."""
    (single, expected), networks = second, done.result["networks"]
    assert networks["teacher"] == expected["networks"]["teacher"]  # of both seeds
    for name in SEEDED:
        seed, alone = first_seed(name), (done.first, expected)
        each = [{"init_seed": seed + i} | x["networks"][name] for i, x in enumerate(alone)]
        assert networks[name]["seeds"] == each and each[0]["sha256"] != each[1]["sha256"]
        assert networks[name] == networks[name] | done.first["networks"][name]
    for phase in ("", "baseline"):
        own = done.workdir / phase / "seed_1"
        assert rows(own) == rows(single / phase) != rows(done.workdir / phase)
        whose = [json.loads((x / "config.json").read_text()) for x in (own, single / phase)]
        assert whose[0] == whose[1]
    assert not (done.workdir / "teacher" / "seed_1").exists()


def test_what_is_done_is_neither_trained_nor_compiled_again(done):
    """Of the second seed, the baseline; three steps of the student; the fourth one."""
    assert "Compiling jit(" in done.compiled and "Compiling jit(_advance)" not in done.compiled
    assert [step for step, _ in itertools.groupby(done.steps)] == [1, 2, 1, 2, 3]
    assert [row["step"] for row in rows(done.workdir / "seed_1")] == [1, 2, 2, 3, 4, 4]
    assert not done.reported
    before = (done.workdir / "report.md").stat().st_mtime_ns
    np.testing.assert_equal(trained(done.workdir, init_seeds=2), done.result)
    assert (done.workdir / "report.md").stat().st_mtime_ns == before
    assert refusal(trained, done.workdir) == (
        f"{done.workdir} is the workdir of another run; these differ: init_seeds (2 there, 1 "
        "here). Choose another workdir, or the config of that run."
    )


def test_means_and_deviations(done):
    page = (done.workdir / "report.md").read_text()
    for name in SEEDED:
        found = done.result["networks"][name]
        for key in ("accuracy", "nll", "class_accuracy"):
            values = [seed["last"][key] for seed in found["seeds"]]
            np.testing.assert_allclose(found["mean"][key], np.mean(values, 0), rtol=1e-12)
            np.testing.assert_allclose(found["deviation"][key], np.std(values, 0, ddof=1))
        values = [seed["last"]["scaled"]["nll"] for seed in found["seeds"]]
        assert found["deviation"]["scaled"]["nll"] == pytest.approx(np.std(values, ddof=1))
        nll = [seed["last"]["nll"] for seed in found["seeds"]]
        assert f" {np.mean(nll):.4f} +- {np.std(nll, ddof=1):.4f} |" in page
    assert "mean" not in done.result["networks"]["teacher"]


def test_a_seed_is_loaded(done, second):
    inputs = np.asarray(dataset().test.inputs)
    for phase in ("", "baseline"):
        first, found = (load(done.workdir / phase, seed=seed)(inputs).logits for seed in (0, 1))
        np.testing.assert_array_equal(found, load(second[0] / phase)(inputs).logits)
        assert np.any(first != found)
    for folder, seed in ((done.workdir, 2), (done.workdir / "teacher", 1)):
        assert refusal(load, folder, seed=seed) == (
            f"seed must be 0, or that of a folder seed_1, seed_2, ... of {folder}; found {seed}."
        )


def test_all_seeds_are_evaluated(done):
    options = dict(data=dataset(), evaluate_only=True)
    again = train_and_evaluate(config(init_seeds=2), done.workdir, **options)
    np.testing.assert_equal(again, done.result)
    message = refusal(train_and_evaluate, config(init_seeds=3), done.workdir, **options)
    assert "init_seeds (2 there, 3 here)" in message
