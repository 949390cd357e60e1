"""Sweeps: members against single runs, chunks, caches, devices, kills, refusals."""

import contextlib
import csv
import math
import re
import signal

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import abkd_jax
from abkd_jax import data, parallel, sweep
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.sweep import members as of_members
from abkd_jax.sweep import memory
from abkd_jax.sweep.table import shown
from abkd_jax.tasks import Column, Task, classification
from abkd_jax.train.checkpoint import FOLDER, Checkpoints, digest

K, DIM, STEPS = 3, 6, 20
ALPHA = "student.terms.distill.divergence.alpha"
WEIGHT = "student.terms.distill.weight"
DISTILL = dict(learn=("student",), see=("teacher",))
RATE = "student.optimizer.learning_rate"
MOMENTUM = "student.optimizer.momentum"


def config(**changes):
    task = dict(fn="cross_entropy", weight=1.0, where="labelled")
    divergence = dict(fn="alpha_beta", alpha=0.8, beta=0.5)
    distill = dict(fn="on_logits", weight=1.0, temperature=2.0, divergence=divergence)
    sgd = dict(fn="sgd", learning_rate=0.1, momentum=0.5)
    net = dict(model=dict(fn="mlp", widths=(5,)), optimizer=sgd)
    values = dict(
        data=dict(fn="digits", validation=0),
        teacher=net | dict(terms=dict(task=task)),
        student=net | dict(terms=dict(task=task, distill=distill)),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            distill=DISTILL,
        ),
        batch_size=16,
        num_steps=STEPS,
        checkpoint_every=8,
        log_every=5,
        devices=1,
        init_seed=3,
        data_seed=0,
    )
    return values | changes


def drawn(size, seed):
    labels = np.arange(size) % K
    noise = np.random.default_rng(seed).normal(size=(size, DIM))
    return (2 * np.eye(K, DIM)[labels] + noise).astype(np.float32), labels


def dataset(**options):
    parts = dict(train=drawn(90, 0), validation=drawn(30, 1), test=drawn(36, 2))
    return data.from_arrays(**parts, num_classes=K, **options)


def images(**options):
    def examples(size, seed):
        labels = np.arange(size) % K
        noise = np.random.default_rng(seed).integers(0, 80, (size, 8, 8, 1))
        return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels

    splits = {name: examples(48, seed) for seed, name in enumerate(("train", "validation", "test"))}
    return data.from_arrays(**splits, num_classes=K, **options)


def newest(folder):
    """The carry in the newest checkpoint: of all members, or of a run."""
    with Checkpoints(folder / FOLDER) as checkpoints:
        tree = checkpoints.restore()[1]
    return tree.get("carry", tree)


def states(folder):
    """What it has of the networks that learn."""
    return newest(folder)["learners"]


def taught(values, workdir):
    """The config of a single run whose teacher is that of a sweep."""
    weights = dict(fn="run", workdir=str(workdir / "teacher"))
    phases = {"distill": values["phases"]["distill"]}
    return values | dict(teacher=values["teacher"] | dict(weights=weights), phases=phases)


def load(workdir, member=-1):
    return abkd_jax.load(workdir, member=member)


def set_at(values, path, value):
    key, _, rest = path.partition(".")
    return values | {key: set_at(values[key], rest, value) if rest else value}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over two numbers and two seeds, eight members."""
    workdir = tmp_path_factory.mktemp("sweep")
    over = {ALPHA: [1.0, 0.2], RATE: [0.1, 0.3]}
    rows = sweep.sweep(config(), workdir, over=over, init_seeds=2, data=dataset())
    return workdir, rows


def test_members_are_single_runs(swept, tmp_path):
    workdir, rows = swept
    members = states(workdir / "members_00000")["student"]["params"]
    for index in (0, 3, 5, 6):
        row = rows[index]
        single = taught(config(init_seed=row["init_seed"]), workdir)
        for path in (ALPHA, RATE):
            single = set_at(single, path, row[path])
        folder = tmp_path / f"{index}"
        found = train_and_evaluate(single, folder, data=dataset())["networks"]["student"]["last"]
        params = states(folder)["student"]["params"]
        for a, b in zip(*map(jax.tree.leaves, (params, members)), strict=True):
            np.testing.assert_allclose(b[index], a, rtol=1e-5, atol=1e-5)
        inputs = drawn(4, seed=9)[0]
        logits = [load(*where)(inputs).logits for where in ((folder,), (workdir, index))]
        np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
        assert row["test_accuracy"] == pytest.approx(found["accuracy"], abs=1e-6)
        assert row["test_nll"] == pytest.approx(found["nll"], rel=1e-4)


def test_rows_and_history(swept):
    workdir, rows = swept
    points = [(row[ALPHA], row[RATE], row["init_seed"]) for row in rows]
    assert points == [(a, r, s) for a in (1.0, 0.2) for r in (0.1, 0.3) for s in (3, 4)]
    with (workdir / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in table] == rows
    with (workdir / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [int(line["step"]) for line in history] == [8, 16, 20] * len(rows)
    for row, line in zip(rows, history[2::3], strict=True):
        for name in ("accuracy", "nll", "ece", "entropy"):
            assert float(line[f"validation_{name}"]) == row[f"validation_{name}"]
        assert row["bad_step"] == -1 and 0 < row["validation_entropy"] < math.log(K)
        assert 0 <= row["test_agreement"] <= 1 <= 1 + row["test_kl_at_1"]


def test_a_sweep_that_is_complete_trains_nothing(swept, monkeypatch):
    workdir, rows = swept
    monkeypatch.setattr(parallel, "spread", None)
    over = {ALPHA: [1.0, 0.2], RATE: [0.1, 0.3]}
    assert sweep.sweep(config(), workdir, over=over, init_seeds=2, data=dataset()) == rows
    assert sweep.sweep(config(init_seeds=2), workdir, over=over, data=dataset()) == rows


def test_best_and_averages():
    def row(x, seed, accuracy, bad_step=-1):
        return {"student.x": x, "init_seed": seed, "validation_accuracy": accuracy} | {
            "test_nll": 2 * accuracy,
            "bad_step": bad_step,
        }

    rows = [row(1.0, 0, 0.5), row(1.0, 1, 0.7), row(2.0, 0, 0.9), row(2.0, 1, 0.9, bad_step=4)]
    first, second = sweep.averaged(rows)
    assert first["validation_accuracy"] == pytest.approx(0.6)
    assert first["validation_accuracy_std"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert math.isnan(second["validation_accuracy"])
    assert sweep.best(rows) == first
    with pytest.raises(ValueError, match="no point"):
        sweep.best(rows[3:])
    with pytest.raises(ValueError, match=r"^by must be one of validation_accuracy, test_nll; "):
        sweep.best(rows, "accuracy")


def by_entropy() -> Task:
    """Classification that selects by a metric which is not the first of its summary."""
    column = Column("entropy", "entropy", 1, 2)
    return classification()._replace(score=lambda x: x["entropy"], score_column=column)


def test_the_score_that_selects_is_the_first_of_a_row(tmp_path):
    """By which `best` goes, if it is given none."""
    made = config(task=dict(fn=f"{__name__}.by_entropy"), plugins=(__name__,), num_steps=2)
    made |= dict(teacher=dict(model=dict(fn="given")), phases=dict(distill=DISTILL))
    teacher = (lambda kernel, x: x @ kernel, np.eye(DIM, K, dtype=np.float32))
    options = dict(networks={"teacher": teacher}, data=dataset())
    rows = sweep.sweep(made, tmp_path, over={RATE: [0.01, 3.0]}, **options)
    first = [next(key for key in row if key.startswith("validation_")) for row in rows]
    assert first == ["validation_entropy"] * 2
    chosen = max(rows, key=lambda row: row["validation_entropy"])
    assert sweep.best(rows)[RATE] == chosen[RATE]


def test_a_baseline_is_left_out(tmp_path):
    """And the phase in which it learns, which the last phase does without."""
    values = config(num_steps=2, checkpoint_every=2)
    alone = dict(task=dict(fn="cross_entropy", weight=1.0))
    values["baseline"] = values["teacher"] | dict(terms=alone)
    baseline = dict(learn=("baseline",), split="labelled")
    values["phases"] = dict(baseline=baseline) | values["phases"]
    sweep.sweep(values, tmp_path, over={WEIGHT: [1.0]}, data=dataset())
    assert (tmp_path / "teacher").is_dir() and not (tmp_path / "baseline").exists()


OWN_BATCHES = '''
"""The batches of the library's `dataset`, by another function."""

from abkd_jax.sources import Setting, Source


def plain(*, setting: Setting) -> Source:
    return Source(batch=lambda state, examples, data_seed, step: examples.batch(data_seed, step))
'''


@pytest.mark.slow
def test_chunks_and_forward_passes_do_not_change_members(swept, tmp_path, monkeypatch, capsys):
    """A source of one's own may change examples, so that no teacher's outputs are kept for it."""
    workdir, rows = swept
    (tmp_path / "own_batches.py").write_text(OWN_BATCHES)
    monkeypatch.syspath_prepend(tmp_path)
    values = config(plugins=("own_batches",))
    source = dict(source=dict(fn="own_batches.plain"))
    values["phases"] = values["phases"] | dict(distill=values["phases"]["distill"] | source)
    over = {ALPHA: [1.0, 0.2], RATE: [0.1, 0.3]}
    found = sweep.sweep(values, tmp_path, over=over, init_seeds=2, chunk=3, data=dataset())
    told = capsys.readouterr().err
    assert "computed once" not in told
    for part in ("1 to 3", "4 to 6", "7 to 8"):
        lines = [x for x in told.splitlines() if x.startswith(f"students {part} of 8 step ")]
        steps = [int(x.split("step ")[1].split("/20")[0]) for x in lines]
        assert steps[0] == 5 and steps[-1] == 20
    names = sorted(path.name for path in tmp_path.glob("members_*"))
    assert names == ["members_00000", "members_00003", "members_00006"]
    whole = states(workdir / "members_00000")["student"]["params"]
    part = states(tmp_path / "members_00003")["student"]["params"]
    for a, b in zip(*map(jax.tree.leaves, (whole, part)), strict=True):
        np.testing.assert_allclose(b, a[3:6], rtol=1e-5, atol=1e-5)
    for row, expected in zip(found, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    for member in (2, 3, 7):
        own = load(tmp_path, member).variables["params"]
        for a, b in zip(*map(jax.tree.leaves, (own, whole)), strict=True):
            np.testing.assert_allclose(a, b[member], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options,sentence",
    [
        (dict(), "member must be at least 0 and less than 8, the members of the sweep {}; found"),
        (dict(member=8), "less than 8, the members of the sweep {}; found 8."),
        (dict(member=1, best=True), "best must be False, since a sweep keeps the last state"),
    ],
)
def test_members_that_cannot_be_loaded(swept, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence.format(swept[0]))):
        abkd_jax.load(swept[0], **options)


def test_a_run_has_no_members(swept):
    teacher = swept[0] / "teacher"
    with pytest.raises(ValueError, match=f"member must be -1, since {teacher} is no sweep; found"):
        load(teacher, 0)


def test_a_member_teaches_a_run(swept, tmp_path):
    """As the run with its numbers would, were it the teacher."""
    weights = dict(fn="run", workdir=str(swept[0]), member=6)
    values = taught(config(), swept[0]) | dict(num_steps=2)
    values["teacher"] = dict(model=values["teacher"]["model"], weights=weights)
    found = train_and_evaluate(values, tmp_path, data=dataset())["networks"]["teacher"]["last"]
    assert found["accuracy"] == pytest.approx(swept[1][6]["test_accuracy"], abs=1e-6)


@contextlib.contextmanager
def stopped_at(step):
    """SIGTERM when members come to a step, which ends the sweep."""
    begin, update, members = Progress.__init__, Progress.update, set()

    def labelled(self, label, *args, **options):
        if label.startswith("students"):
            members.add(id(self))
        begin(self, label, *args, **options)

    def stopping(self, at, **shown):
        if at == step and id(self) in members:
            members.clear()
            signal.raise_signal(signal.SIGTERM)
        update(self, at, **shown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "__init__", labelled)
        patch.setattr(Progress, "update", stopping)
        with pytest.raises(SystemExit) as left:
            yield
    assert left.value.code == 128 + signal.SIGTERM


def test_a_stopped_sweep_goes_on(swept, tmp_path, capsys):
    over = {ALPHA: [1.0, 0.2], RATE: [0.1, 0.3]}
    arguments = dict(over=over, init_seeds=2, data=dataset())
    with stopped_at(11):
        sweep.sweep(config(), tmp_path, **arguments)
    assert "SIGTERM at step 11 of 20" in capsys.readouterr().err
    assert sweep.sweep(config(), tmp_path, **arguments) == swept[1]
    assert sweep.sweep(config(), tmp_path, **arguments) == swept[1]
    folders = [path / "members_00000" for path in (swept[0], tmp_path)]
    assert digest(newest(folders[0])) == digest(newest(folders[1]))


# --- a source that depends on the members -------------------------------------------------------


def drawn_labels(**changes):
    """Each member draws labels from itself, see sampled_source.py."""
    source = dict(fn="sampled_source.sampled", refill_every=3)
    values = config(plugins=("sampled_source",), num_steps=12, checkpoint_every=4, **changes)
    values["student"] = values["student"] | dict(terms=values["teacher"]["terms"])
    del values["teacher"]
    return values | dict(phases=dict(alone=dict(learn=("student",), source=source)))


OF_SAMPLED = dict(over={RATE: [0.1, 0.5]}, init_seeds=2, data=dataset())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sampled")
    return workdir, sweep.sweep(drawn_labels(), workdir, **OF_SAMPLED)


@pytest.mark.slow
def test_members_with_a_source_that_depends_on_them_are_single_runs(sampled, tmp_path):
    workdir, rows = sampled
    carry = newest(workdir / "members_00000")
    assert len({labels.tobytes() for labels in carry["source"]["labels"]}) == 4
    for index in (0, 3):
        single = drawn_labels(init_seed=rows[index]["init_seed"])
        single = set_at(single, RATE, rows[index][RATE])
        train_and_evaluate(single, tmp_path / f"{index}", data=dataset())
        alone = newest(tmp_path / f"{index}")
        assert carry["source"]["evaluations"][index] == alone["source"]["evaluations"] == 4
        for part in ("params", "opt_state"):
            found, expected = (x["learners"]["student"][part] for x in (carry, alone))
            for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
                np.testing.assert_allclose(b[index], a, rtol=1e-5, atol=1e-5)
        for name, value in alone["source"].items():
            np.testing.assert_allclose(carry["source"][name][index], value, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 9])
def test_a_sweep_with_such_a_source_goes_on_where_it_was_stopped(sampled, tmp_path, step):
    """Within the interval between two refills, and at a refill."""
    workdir, rows = sampled
    with stopped_at(step):
        sweep.sweep(drawn_labels(), tmp_path, **OF_SAMPLED)
    assert sweep.sweep(drawn_labels(), tmp_path, **OF_SAMPLED) == rows
    folders = [path / "members_00000" for path in (workdir, tmp_path)]
    assert digest(newest(folders[0])) == digest(newest(folders[1]))


MIRRORED = '''
from abkd_jax import sources


def mirrored(*, setting: sources.Setting) -> sources.Source:
    """The examples with their inputs' signs changed."""

    def batch(state, examples, data_seed, step):
        found = examples.batch(data_seed, step)
        return found | {"inputs": -found["inputs"]}

    return sources.Source(batch)
'''


@pytest.mark.long
def test_a_teacher_sees_what_a_source_makes_of_the_examples(tmp_path, monkeypatch):
    """Whose outputs of the examples themselves may not stand for it."""
    (tmp_path / "mirrored_of_a_test.py").write_text(MIRRORED)
    monkeypatch.syspath_prepend(tmp_path)
    made = config(plugins=("mirrored_of_a_test",))
    source = dict(source=dict(fn="mirrored_of_a_test.mirrored"))
    made["phases"] = made["phases"] | dict(distill=made["phases"]["distill"] | source)
    sweep.sweep(made, tmp_path / "sweep", over={RATE: [0.1, 0.5]}, data=dataset())
    train_and_evaluate(set_at(made, RATE, 0.5), tmp_path / "single", data=dataset())
    carry, alone = newest(tmp_path / "sweep" / "members_00000"), newest(tmp_path / "single")
    found, expected = (x["learners"]["student"]["params"] for x in (carry, alone))
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(b[1], a, rtol=1e-5, atol=1e-5)


# --- refusals, and more -------------------------------------------------------------------------


def test_another_sweep_is_refused_a_workdir(swept):
    workdir, _ = swept
    with pytest.raises(ValueError, match=r"sweep.init_seeds .2 there, 1 here."):
        over = {ALPHA: [1.0, 0.2], RATE: [0.1, 0.3]}
        sweep.sweep(config(), workdir, over=over, data=dataset())


def test_another_order_is_another_sweep(swept):
    workdir, _ = swept
    with pytest.raises(ValueError, match=r"sweep\.over"):
        over = {RATE: [0.1, 0.3], ALPHA: [1.0, 0.2]}
        sweep.sweep(config(), workdir, over=over, init_seeds=2, data=dataset())


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"last": {}}]'])
def test_damaged_rows_are_made_again(swept, content):
    workdir, rows = swept
    (workdir / "members_00000" / "rows.json").write_text(content)
    over = {ALPHA: np.asarray([1.0, 0.2]), RATE: (0.1, 0.3)}
    assert sweep.sweep(config(), workdir, over=over, init_seeds=2, data=dataset()) == rows


@pytest.mark.slow
def test_a_seed_of_a_networks_own_goes_along(tmp_path):
    values = config(num_steps=4, checkpoint_every=4)
    values["student"] = values["student"] | dict(init_seed=7)
    over = {WEIGHT: [1.0]}
    sweep.sweep(values, tmp_path, over=over, init_seeds=2, data=dataset())
    members = states(tmp_path / "members_00000")["student"]["params"]
    single = values | dict(init_seed=4, student=values["student"] | dict(init_seed=8))
    single = taught(single, tmp_path)
    train_and_evaluate(single, tmp_path / "single", data=dataset())
    params = states(tmp_path / "single")["student"]["params"]
    for a, b in zip(*map(jax.tree.leaves, (params, members)), strict=True):
        np.testing.assert_allclose(b[1], a, rtol=1e-5, atol=1e-5)


def test_a_member_that_is_not_finite_harms_no_other(swept, tmp_path):
    rows = sweep.sweep(config(), tmp_path, over={RATE: [0.1, 1e30]}, data=dataset())
    assert rows[0]["bad_step"] == -1 and rows[1]["bad_step"] >= 0
    assert rows[0]["test_nll"] < 1.0 and math.isfinite(rows[0]["test_nll"])
    assert sweep.best(rows)[RATE] == 0.1
    learners = states(tmp_path / "members_00000")["student"]
    assert all(np.isfinite(x[1]).all() for x in jax.tree.leaves(learners["params"]))


@pytest.mark.slow
def test_augmented_images_and_schedules(tmp_path):
    values = config(num_steps=4, checkpoint_every=4)
    ramp = dict(fn="linear", start=0.0, end=1.0)
    values = set_at(values, WEIGHT, ramp)
    rows = sweep.sweep(
        values, tmp_path, over={f"{WEIGHT}.end": [1.0, 2.0]}, data=images(pad=1, flip=True)
    )
    members = states(tmp_path / "members_00000")["student"]["params"]
    single = set_at(values, f"{WEIGHT}.end", 2.0)
    train_and_evaluate(single, tmp_path / "single", data=images(pad=1, flip=True))
    params = states(tmp_path / "single")["student"]["params"]
    for a, b in zip(*map(jax.tree.leaves, (params, members)), strict=True):
        np.testing.assert_allclose(b[1], a, rtol=1e-5, atol=1e-5)
    assert [row[f"{WEIGHT}.end"] for row in rows] == [1.0, 2.0]


@pytest.mark.slow
def test_networks_that_learn_together(tmp_path):
    together = dict(together=dict(learn=("teacher", "student"), select="student"))
    values = config(num_steps=4, checkpoint_every=4, phases=together)
    values["teacher"] = values["teacher"] | dict(init_seed=9)
    rows = sweep.sweep(values, tmp_path, over={WEIGHT: [0.0, 2.0]}, init_seeds=1, data=dataset())
    assert {"test_accuracy", "test_teacher_accuracy", "test_agreement"} <= set(rows[0])
    members = states(tmp_path / "members_00000")
    train_and_evaluate(set_at(values, WEIGHT, 2.0), tmp_path / "single", data=dataset())
    for name, state in states(tmp_path / "single").items():
        found = members[name]["params"]
        for a, b in zip(*map(jax.tree.leaves, (state["params"], found)), strict=True):
            np.testing.assert_allclose(b[1], a, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["teacher", None])
def test_the_best_point_of_several_networks_is_by_the_score_that_selects(tmp_path, select):
    together = dict(together=dict(learn=("teacher", "student"), select=select))
    values = config(num_steps=4, checkpoint_every=4, phases=together)
    values["teacher"] = values["teacher"] | dict(init_seed=9)
    rows = sweep.sweep(values, tmp_path, over={RATE: [0.0, 0.3]}, init_seeds=1, data=dataset())
    of_each = ("validation_accuracy", "validation_student_accuracy")
    if select is None:
        of_each = ("validation_teacher_accuracy", "validation_student_accuracy")
        means = [np.mean([row[key] for key in of_each]) for row in rows]
        np.testing.assert_allclose([row["validation_accuracy"] for row in rows], means, rtol=1e-6)
    assert {"validation_accuracy", *of_each} <= set(rows[0])
    known = [key for key in rows[0] if key.startswith("validation_")]
    assert known[0] == "validation_accuracy"
    by = sweep.best(rows, by="validation_accuracy")
    assert sweep.best(rows) == by


@pytest.mark.long
def test_members_begin_with_the_best_state_if_the_phase_does(tmp_path):
    """A first phase that loses what it learned, and a second that does not learn."""
    lost = dict(fn="piecewise", start=0.5, factor=100.0, boundaries=(8,))
    sgd = lambda rate: dict(optimizer=dict(fn="sgd", learning_rate=rate, momentum=0.0))  # noqa: E731
    warm = dict(learn=("student",), num_steps=12, student=sgd(lost))
    task = config()["student"]["terms"]["task"]
    warm["student"]["terms"] = dict(task=task)
    phases = dict(warm=warm, distill=DISTILL | dict(start="best"))
    teacher = {"teacher": (lambda w, x: x @ w, np.eye(DIM, K, dtype=np.float32))}
    values = config(phases=phases, num_steps=4, checkpoint_every=4) | dict(
        teacher=dict(model=dict(fn="given"))
    )
    values["student"] = values["student"] | sgd(0.0)
    options = dict(networks=teacher, data=dataset())
    sweep.sweep(values, tmp_path / "sweep", over={WEIGHT: [0.5, 2.0]}, **options)
    train_and_evaluate(values, tmp_path / "single", **options)
    expected = states(tmp_path / "single")["student"]["params"]
    last = states(tmp_path / "single" / "warm")["student"]["params"]
    found = states(tmp_path / "sweep" / "members_00000")["student"]["params"]
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_array_equal(np.stack([a, a]), b)
    assert not jax.tree.all(jax.tree.map(np.array_equal, expected, last))
    with pytest.raises(ValueError, match="seeds must be 1, for student has learned before"):
        sweep.sweep(values, tmp_path / "n", over={WEIGHT: [1.0]}, init_seeds=2, **options)


@pytest.mark.parametrize(
    ("over", "options", "sentence"),
    [
        ({"student.terms.distil.weight": [1.0]}, {}, "student.terms has no 'distil' .*distill"),
        ({"student.optimizer.init_seed": [1.0]}, {}, "seeds are swept by init_seeds"),
        ({"student.optimizer": [1.0]}, {}, "there must be a number, not a group of some"),
        ({"student.optimizer.nesterov": [1.0]}, {}, "student.optimizer has no 'nesterov'"),
        ({"teacher.optimizer.learning_rate": [0.1]}, {}, "a sweep has no 'teacher'.*student"),
        ({"num_steps": [5]}, {}, "a sweep has no 'num_steps'"),
        ({"student.widths": [1.0]}, {}, "student has no .widths. to sweep"),
        ({f"{ALPHA}.x": [1.0]}, {}, "has no 'x'.*it is a number"),
        ({ALPHA: []}, {}, "different numbers to sweep; found .."),
        ({ALPHA: [1.0, 1]}, {}, "different numbers"),
        ({ALPHA: [1.0, math.nan]}, {}, "different numbers"),
        ({ALPHA: ["a"]}, {}, "different numbers"),
        ({ALPHA: 0.5}, {}, "different numbers to sweep; found 0.5"),
        ({ALPHA: [1.0]}, {"init_seeds": 2**31 - 1}, "every init seed below"),
        ({ALPHA: [1.0]}, {"init_seeds": 2**31}, "init_seeds must be .* less than 2"),
        ({"student.terms.distill.temperature": [1.0, -1.0]}, {}, "greater than 0.*found .*-1"),
        ({RATE: [-0.1]}, {}, "learning_rate must be at least 0"),
        ({ALPHA: [1.0]}, {"init_seeds": 0}, "init_seeds must be an integer of at least 1"),
        ({ALPHA: [1.0]}, {"chunk": -1}, "chunk must be an integer of at least 0"),
        ({}, {}, "over must be a mapping .* of at least one number"),
        ([ALPHA], {}, "over must be a mapping"),
    ],
)
def test_refusals(over, options, sentence, tmp_path):
    with pytest.raises(ValueError) as refused:
        sweep.sweep(config(), tmp_path, over=over, data=dataset(), **options)
    message = str(refused.value)
    assert re.search(sentence, message) and "\n" not in message and message.endswith(".")
    assert not (tmp_path / "config.json").exists()


def test_a_schedule_is_refused_that_leaves_its_domain_at_its_last_step_alone(tmp_path):
    made = config()
    rate = dict(fn="linear", start=0.1, end=0.0)
    made["student"] |= dict(optimizer=dict(fn="sgd", learning_rate=rate))
    with pytest.raises(ValueError, match=r"such that the schedule stays at least 0.*; found"):
        sweep.sweep(made, tmp_path, over={f"{RATE}.end": [0.01, -0.001]}, data=dataset())


def test_the_largest_seed_of_a_networks_own_counts(tmp_path):
    made = config(phases=dict(together=dict(learn=("teacher", "student"), select="student")))
    made["student"] |= dict(init_seed=2**31 - 2)
    with pytest.raises(ValueError, match="every init seed below"):
        sweep.sweep(made, tmp_path, over={ALPHA: [1.0]}, init_seeds=3, data=dataset())


def test_a_score_is_shown_with_all_the_digits_of_a_float32():
    for score in (0.1234567, 12.34567, 1 / 3):
        assert shown(np.float32(score)) == float(f"{score:.7g}")


def test_the_size_of_a_chunk_is_that_with_which_a_sweep_began(tmp_path):
    """Whatever memory is free when it goes on: folders are named by their first member."""
    for free in (3, 5):
        assert memory.remembered(tmp_path / "chunk.json", lambda free=free: free) == 3


def test_a_chunk_has_a_member_however_large_it_is():
    """4 PiB; a member of a few bytes leaves room for many."""
    assert memory.fitting(lambda x: jnp.zeros((2**30, 2**20)) + x, 1.0) == 1
    assert memory.fitting(lambda x: x + 1.0, 1.0) > 1000


@pytest.mark.parametrize("size", [1, 7, 8, 19])
def test_spread_is_vmap_on_any_number_of_devices(size, monkeypatch):
    assert jax.local_device_count() == 8
    members = {"x": jnp.arange(3.0 * size).reshape(size, 3), "n": jnp.arange(size)}

    def fn(member, shared):
        return {"y": jnp.tanh(member["x"] @ shared), "n": member["n"]}

    shared = jnp.arange(6.0).reshape(3, 2) / 7
    expected = jax.vmap(lambda m: fn(m, shared))(members)
    for count in (8, 1):
        monkeypatch.setattr(jax, "local_device_count", lambda count=count: count)
        found = parallel.spread(fn, members, shared)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    with pytest.raises(ValueError, match="first axis"):
        parallel.spread(fn, {"x": members["x"], "n": jnp.arange(size + 1)}, shared)


def test_a_sweep_is_one_compilation(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    with jax.log_compiles():
        sweep.sweep(config(), tmp_path, over={ALPHA: [1.0, 0.5, 0.0]}, data=dataset())
    assert caplog.text.count("Compiling jit(_member)") == 1


@pytest.mark.slow
def test_chunks_are_evaluated_by_the_same_program(tmp_path, monkeypatch):
    traced = []
    sums = of_members._sums
    monkeypatch.setattr(of_members, "_sums", lambda *args: traced.append(1) or sums(*args))
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    values = config(num_steps=4, checkpoint_every=4)
    over = {ALPHA: [1.0, 0.5, 0.0]}
    sweep.sweep(values, tmp_path / "a", over=over, chunk=1, data=dataset())
    once = len(traced)
    sweep.sweep(values, tmp_path / "b", over={ALPHA: [1.0]}, chunk=1, data=dataset())
    assert once == len(traced) - once > 0
