"""A run as a function: your own data and networks, what each phase sees, devices, refusals."""

import contextlib
import functools
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp
from scipy.special import rel_entr

from abkd_jax import data, load
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.log.writer import read
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.train.checkpoint import FOLDER, Checkpoints, digest

K, DIM = 3, 6
TASK = dict(fn="cross_entropy", weight=1.0, where="labelled")
DISTILL = dict(
    fn="on_logits",
    weight=1.0,
    temperature=2.0,
    divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.5),
)
SGD = dict(fn="sgd", learning_rate=0.1)
MLP = dict(fn="mlp", widths=(5,))
SMALL = dict(fn="mlp", widths=(4,))
GIVEN = dict(model=dict(fn="given"))


def network(**changes):
    return dict(model=MLP, optimizer=SGD, terms=dict(task=TASK)) | changes


def config(*, online=False, **changes):
    """Five steps, in phases: a teacher on all labels, maybe a baseline, a student."""
    values = dict(
        data=dict(fn="digits", validation=0),
        teacher=network(),
        student=network(terms=dict(distill=DISTILL)),
        batch_size=16,
        num_steps=5,
        checkpoint_every=5,
        log_every=5,
        devices=1,
        init_seed=0,
        data_seed=0,
    )
    values |= changes
    phases = {
        name: dict(learn=(name,), split=split)
        for name, split in (("teacher", "full"), ("baseline", "labelled"))
        if name in values and values[name] != GIVEN
    }
    phases["distill"] = dict(learn=("student",), see=("teacher",))
    if online:
        phases = dict(together=dict(learn=("teacher", "student"), select="student"))
    return dict(phases=phases) | values


def drawn(size, seed):
    """Vectors around a corner for each class, and labels that go round."""
    labels = np.arange(size) % K
    noise = np.random.default_rng(seed).normal(size=(size, DIM))
    return (2 * np.eye(K, DIM)[labels] + noise).astype(np.float32), labels


def dataset(validation=True, train=None, **options):
    held_out = drawn(30, 1) if validation else None
    train = drawn(90, 0) if train is None else train
    return data.from_arrays(
        train=train, validation=held_out, test=drawn(36, 2), num_classes=K, **options
    )


def images(**options):
    """uint8 images whose brightness tells the class."""

    def examples(size, seed):
        labels = np.arange(size) % K
        noise = np.random.default_rng(seed).integers(0, 80, (size, 8, 8, 1))
        return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels

    splits = {name: examples(48, seed) for seed, name in enumerate(("train", "test"))}
    return data.from_arrays(**splits, validation=None, num_classes=K, **options)


def parameters(workdir, name="student"):
    """The network's parameters in the newest checkpoint."""
    return newest(workdir)["learners"][name]["params"]


def newest(folder):
    """The newest checkpoint."""
    with Checkpoints(folder / FOLDER) as checkpoints:
        return checkpoints.restore()[1]


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def refusal(workdir, *args, **options):
    with pytest.raises(ValueError) as refused:
        train_and_evaluate(*args[:1], workdir, **options)
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")
    return message


# --- what comes out -----------------------------------------------------------------------------


def test_a_run_on_feature_vectors(tmp_path):
    baseline = network()
    result = train_and_evaluate(config(baseline=baseline), tmp_path, data=dataset())
    assert result["num_classes"] == K and result["score"] == "accuracy"
    assert [(x["name"], x["folder"], x["split"]) for x in result["phases"]] == [
        ("teacher", "teacher", "full"),
        ("baseline", "baseline", "labelled"),
        ("distill", "", "train"),
    ]
    assert result["phases"][2]["learn"] == ["student"] and result["phases"][2]["see"] == ["teacher"]
    assert (result["evaluated_on"], result["selected_on"]) == ("test", "validation")
    assert set(result["networks"]) == {"teacher", "baseline", "student"}
    for found in result["networks"].values():
        assert found["steps"] == found["best"]["step"] == 5
        assert found["last"]["top5"] is None  # of three classes
        assert found["parameters"] == (DIM + 1) * 5 + (5 + 1) * K
        assert found["last"]["count"] == 36
        assert found["last"]["scaled"]["nll"] > 0 and found["last"]["temperature"] > 0
        # It was evaluated at the last step alone.
        np.testing.assert_equal(found["last"], found["best"]["scores"])
        assert set(found["sha256"]) == {"params", "opt_state", "batch_stats"}
    for part in ("result.json", "report.md", "metrics.jsonl", "teacher/metrics.jsonl"):
        assert (tmp_path / part).stat().st_size


@pytest.mark.slow
def test_a_run_on_images_without_validation_data(tmp_path):
    cnn = network(model=dict(fn="cnn", widths=(4,)))
    made = config(teacher=cnn, student=cnn | dict(terms=dict(distill=DISTILL)))
    result = train_and_evaluate(made, tmp_path, data=images(mean=(0.5,), std=(0.3,)))
    assert result["selected_on"] == "test"
    for found in result["networks"].values():
        assert found["last"]["temperature"] is None and found["last"]["scaled"] is None
        assert found["best"]["score"] == pytest.approx(found["last"]["accuracy"], abs=1e-6)
    with np.load(tmp_path / "examples.npz") as examples:
        assert examples["images"].dtype == np.uint8 and examples["images"].shape[1:] == (8, 8, 1)


@pytest.mark.parametrize("counts", [np.ones(48, bool), np.arange(48) % 3 > 0])
def test_the_examples_are_those_on_which_the_networks_differ(tmp_path, counts):
    """The furthest apart first, with their images; rows that do not count are passed over."""
    given = images()
    test = np.asarray(given.test.inputs), np.asarray(given.test.labels), {"where": counts}
    train = np.asarray(given.train.inputs), np.asarray(given.train.labels)
    mine = data.from_arrays(train=train, validation=None, test=test, num_classes=K)
    kernel = np.random.default_rng(1).normal(size=(64, K)).astype(np.float32) / 4
    teacher = (lambda kernel, x: x.reshape(len(x), -1) @ kernel), kernel
    made = config(teacher=GIVEN, student=network(terms=dict(distill=DISTILL)))
    train_and_evaluate(made, tmp_path, networks={"teacher": teacher}, data=mine)
    found, shown = np.load(tmp_path / "examples.npz"), np.flatnonzero(counts)
    positions = found["positions"]
    assert found["candidates"] == len(shown) and len(set(positions)) == 8
    np.testing.assert_array_equal(found["images"], test[0][shown[positions]])
    np.testing.assert_array_equal(found["labels"], test[1][shown[positions]])
    p, q = jax.nn.softmax(load(tmp_path)(test[0][counts]).logits), found["probabilities/student"]
    np.testing.assert_allclose(q, p[positions], atol=1e-6)
    t = jax.nn.softmax(test[0][counts].reshape(len(shown), -1).astype(np.float32) / 255 @ kernel)
    apart = (rel_entr(p, (p + t) / 2) + rel_entr(t, (p + t) / 2)).sum(-1) / 2
    np.testing.assert_allclose(apart[positions], -np.sort(-apart)[:8], atol=1e-6)
    assert list(positions) != list(range(8))
    said = f"They are those 8 of the {len(shown)} on which the networks differ most"
    assert said in (tmp_path / "report.md").read_text()


def test_the_data_is_told_by_its_checksum(tmp_path):
    made = config(teacher=network(), num_steps=1)
    first = train_and_evaluate(made, tmp_path, data=dataset())
    np.testing.assert_equal(train_and_evaluate(made, tmp_path, data=dataset()), first)
    changed = drawn(90, 0)
    changed[0][7, 3] += 1e-3
    message = refusal(tmp_path, made, data=dataset(train=changed))
    sums = r"data\.sha256 \('[0-9a-f]{64}' there, '[0-9a-f]{64}' here\)"
    expected = f"{re.escape(str(tmp_path))} is the workdir of another run; these differ: {sums}. "
    assert re.fullmatch(expected + "Choose another workdir, or the config of that run.", message)


# --- networks of your own -----------------------------------------------------------------------

KERNEL = np.random.default_rng(3).normal(size=(DIM, K)).astype(np.float32)


def linen_teacher():
    module = nn.Dense(K, use_bias=False)
    return module.apply, {"params": {"kernel": KERNEL}}


def nnx_teacher():
    model = nnx.Linear(DIM, K, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.asarray(KERNEL)
    graph, state = nnx.split(model)
    return lambda state, inputs: nnx.merge(graph, state)(inputs), state


def function_teacher():
    return lambda kernel, inputs: inputs @ kernel, KERNEL


@pytest.mark.slow
def test_teachers_of_any_library_teach_the_same(tmp_path):
    taught = []
    for make in (linen_teacher, nnx_teacher, function_teacher):
        workdir = tmp_path / make.__name__
        given = {"teacher": make()}
        result = train_and_evaluate(config(teacher=GIVEN), workdir, networks=given, data=dataset())
        assert not (workdir / "teacher").exists()
        teacher = result["networks"]["teacher"]
        right = np.argmax(drawn(36, 2)[0] @ KERNEL, -1) == drawn(36, 2)[1]
        assert teacher["last"]["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
        assert teacher["parameters"] == DIM * K
        assert teacher["steps"] == 0 and teacher["best"] is None and teacher["sha256"] is None
        taught.append(parameters(workdir))
    for other in taught[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), taught[0], other)


def test_a_student_of_your_own_learns(tmp_path):
    """From nothing to the accuracy of a teacher that knows the corners."""
    corners = 3 * np.eye(DIM, K, dtype=np.float32)
    teacher, student = (
        (lambda kernel, inputs: inputs @ kernel, corners),
        (lambda params, inputs: inputs @ params["w"], {"w": np.zeros((DIM, K), np.float32)}),
    )
    given = {"teacher": teacher, "student": student}
    own = GIVEN | dict(optimizer=SGD, terms=dict(distill=DISTILL))
    made = config(teacher=GIVEN, student=own, num_steps=60, checkpoint_every=60)
    result = train_and_evaluate(made, tmp_path, networks=given, data=dataset())
    accuracy = {name: x["last"]["accuracy"] for name, x in result["networks"].items()}
    assert accuracy["teacher"] > 0.8
    assert accuracy["student"] >= accuracy["teacher"] - 0.1  # zeros: a third
    assert np.any(parameters(tmp_path)["w"]) and not np.any(student[1]["w"])
    again = train_and_evaluate(made, tmp_path, networks=given, data=dataset())
    np.testing.assert_equal(again, result)


# --- what each phase sees -----------------------------------------------------------------------


def half_labelled(*, inputs=0.0, labels=0, size=90):
    """Examples, of which a student sees 30 labels; the others are shifted as told."""
    x, y = (part[:size] for part in drawn(90, 0))
    x[30:] += inputs
    y[30:] = (y[30:] + labels) % K
    return dataset(train=(x, y), labelled=30)


@pytest.mark.slow
def test_who_sees_the_withheld_labels_and_the_unlabelled_examples(tmp_path):
    """The teacher both; the student the examples alone; the baseline neither."""
    student = network(terms=dict(distill=DISTILL, task=TASK))
    made = config(baseline=network(), student=student)
    sums = {}
    changes = {
        "as": {},
        "labels": dict(labels=1),
        "inputs": dict(inputs=0.5),
        "fewer": dict(size=60),
    }
    for name, change in changes.items():
        found = train_and_evaluate(made, tmp_path / name, data=half_labelled(**change))
        sums[name] = {n: x["sha256"]["params"] for n, x in found["networks"].items()}
    assert len({found["baseline"] for found in sums.values()}) == 1
    assert sums["as"]["teacher"] != sums["labels"]["teacher"]
    assert sums["as"]["teacher"] != sums["inputs"]["teacher"]
    # With a teacher that does not depend on them, a student sees examples and no withheld label.
    made, given = config(teacher=GIVEN, student=student), {"teacher": function_teacher()}
    sums = {}
    for name, change in changes.items():
        workdir = tmp_path / f"given {name}"
        train_and_evaluate(made, workdir, networks=given, data=half_labelled(**change))
        sums[name] = parameters(workdir)
    assert not differ(sums["as"], sums["labels"])
    assert differ(sums["as"], sums["inputs"])


def test_twins_need_seeds_of_their_own(tmp_path):
    learns = network(terms=dict(task=TASK, distill=DISTILL))
    made = config(online=True, teacher=network(), student=learns)
    assert refusal(tmp_path, made, data=dataset()) == (
        "student and teacher are the same model with the same init_seed, 0, so that they would "
        "start as one; give one of them its own: student.init_seed=1."
    )
    made["student"] = network(init_seed=1)
    train_and_evaluate(made, tmp_path, data=dataset())
    assert differ(parameters(tmp_path), parameters(tmp_path, "teacher"))
    assert "init_seed" in refusal(tmp_path, config(student=network(init_seed=-1)), data=dataset())


def test_online_both_networks_learn_and_from_each_other(tmp_path):
    mutual = network(terms=dict(task=TASK, distill=DISTILL))
    alone = network(terms=dict(task=TASK, distill=DISTILL | dict(weight=0.0)))
    learned = {}
    for name, (teacher, student) in {
        "mutual": (mutual, mutual | dict(model=SMALL)),
        "alone": (alone, alone | dict(model=SMALL)),
    }.items():
        made = config(online=True, teacher=teacher, student=student)
        result = train_and_evaluate(made, tmp_path / name, data=dataset())
        assert all(x["steps"] == 5 for x in result["networks"].values())
        assert not (tmp_path / name / "teacher").exists()
        learned[name] = {n: parameters(tmp_path / name, n) for n in ("teacher", "student")}
    still = SGD | dict(learning_rate=0.0)
    made = config(
        online=True,
        teacher=mutual | dict(optimizer=still),
        student=mutual | dict(model=SMALL, optimizer=still),
    )
    train_and_evaluate(made, tmp_path / "still", data=dataset())
    for name in ("teacher", "student"):
        assert differ(learned["mutual"][name], parameters(tmp_path / "still", name))
        assert differ(learned["mutual"][name], learned["alone"][name])


# --- phases of one network ----------------------------------------------------------------------


def rows(folder):
    """Without wall-clock times."""
    return [{k: v for k, v in x.items() if not k.startswith("time/")} for x in read(folder)]


@contextlib.contextmanager
def stopped_at(step):
    """SIGTERM when the phase that is trained first comes to a step, which ends the run."""
    update, sent = Progress.update, []

    def stopping(self, at, **shown):
        if at == step and not sent:
            sent.append(at)
            signal.raise_signal(signal.SIGTERM)
        update(self, at, **shown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", stopping)
        with pytest.raises(SystemExit) as left:
            yield
    assert left.value.code == 128 + signal.SIGTERM


STILL = SGD | dict(learning_rate=0.0)


def in_two_phases(first=None, second=None, **changes):
    """One network: on labels, then from a teacher that is handed over; with batch norm."""
    model = dict(fn="cnn", widths=(4,), batch_norm=True)
    values = dict(
        teacher=GIVEN,
        student=network(model=model),
        phases=dict(
            warm=dict(learn=("student",), num_steps=6) | (first or {}),
            distill=dict(
                learn=("student",), see=("teacher",), student=dict(terms=dict(distill=DISTILL))
            ) | (second or {}),
        ),
        num_steps=4, checkpoint_every=2, log_every=2,
    )  # fmt: skip
    return config(**values | changes)


def brightness():
    """A teacher of images that goes by their brightness."""
    return {"teacher": (lambda w, x: jnp.mean(x, (1, 2)) * w, jnp.asarray([[-1.0, 0.5, 2.0]]))}


def run_two(workdir, made):
    return train_and_evaluate(made, workdir, networks=brightness(), data=images())


@pytest.mark.slow
def test_a_second_phase_goes_on_with_a_new_optimiser_from_step_0(tmp_path):
    """As a run would that has the network's weights, and statistics, from the first."""
    momentum = dict(optimizer=SGD | dict(momentum=0.9))
    made = in_two_phases(student=network(model=dict(fn="cnn", widths=(4,), batch_norm=True)))
    made["student"] = made["student"] | momentum
    result = run_two(tmp_path / "two", made)
    assert [(x["name"], x["folder"]) for x in result["phases"]] == [
        ("warm", "warm"),
        ("distill", ""),
    ]
    found = result["networks"]["student"]
    assert found["steps"] == 4 and found["phase"] == "distill"
    weights = dict(fn="run", workdir=str(tmp_path / "two" / "warm"))
    alone = in_two_phases(student=made["student"] | dict(weights=weights))
    del alone["phases"]["warm"]
    expected = run_two(tmp_path / "alone", alone)["networks"]["student"]
    assert found["sha256"] == expected["sha256"]
    np.testing.assert_equal(found["last"], expected["last"])
    assert rows(tmp_path / "two") == rows(tmp_path / "alone")
    assert {row["step"] for row in rows(tmp_path / "two" / "warm")} == {2, 4, 6}
    assert newest(tmp_path / "two" / "warm")["learners"]["student"]["step"] == 6


def test_a_second_phase_has_a_new_average_and_may_begin_with_the_best_state(tmp_path):
    """The rate of the first is so high at its end that what was learned is lost."""
    lost = dict(fn="piecewise", start=0.5, factor=100.0, boundaries=(4,))
    first = dict(student=dict(optimizer=SGD | dict(learning_rate=lost), ema_decay=0.9))
    states = {}
    for start in ("last", "best"):
        second = dict(
            learn=("student",), see=("teacher",), num_steps=2, start=start,
            student=dict(terms=dict(distill=DISTILL), optimizer=STILL, ema_decay=0.9),
        )  # fmt: skip
        result = run_two(tmp_path / start, in_two_phases(first, second))
        after = newest(tmp_path / start)["learners"]["student"]
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # an average's rounding
        jax.tree.map(same, after["ema_params"], after["params"])
        states[start] = after["params"]
    with Checkpoints(tmp_path / "best" / "warm" / FOLDER) as checkpoints:
        step, _ = checkpoints.best()
        best = checkpoints.restore_at(step)["learners"]["student"]
    last = newest(tmp_path / "best" / "warm")["learners"]["student"]
    assert step < 6 and differ(best["params"], last["params"])
    assert not differ(states["last"], last["params"]) and not differ(states["best"], best["params"])
    assert differ(last["params"], last["ema_params"])
    assert result["networks"]["student"]["best"]["step"] == 2


@pytest.mark.slow
def test_a_run_that_is_stopped_in_either_phase_ends_as_one_that_was_not(tmp_path, capsys):
    made = in_two_phases(second=dict(start="best"), student=network(
        model=dict(fn="cnn", widths=(4,), batch_norm=True), ema_decay=0.9
    ))  # fmt: skip
    expected = run_two(tmp_path / "expected", made)
    for step, end in ((5, 6), (3, 4)):  # the second time phase one goes on from 5
        with stopped_at(step):
            run_two(tmp_path / "run", made)
        told = capsys.readouterr().err
        assert f"student: SIGTERM at step {step} of {end}, which is saved" in told
    np.testing.assert_equal(run_two(tmp_path / "run", made), expected)
    for folder in ("", "warm"):
        assert rows(tmp_path / "run" / folder) == rows(tmp_path / "expected" / folder)


# --- a run that is done --------------------------------------------------------------------------


def alone(**changes):
    """A student that learns from a function, for 5 steps."""
    return config(teacher=GIVEN, checkpoint_every=5, log_every=2, steps_per_call=1, **changes)


def run_alone(workdir, **changes):
    given = {"teacher": function_teacher()}
    return train_and_evaluate(alone(**changes), workdir, networks=given, data=dataset())


def test_a_run_that_is_done_says_its_result_at_once(tmp_path, capsys):
    result = run_alone(tmp_path)
    shutil.rmtree(tmp_path / FOLDER)  # nothing is restored
    capsys.readouterr()
    assert run_alone(tmp_path) == result
    assert capsys.readouterr().err.startswith(f"{tmp_path}: this run is done; with a larger num_s")
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.long
def test_a_run_that_was_evaluated_on_the_way_is_not_done(tmp_path):
    with stopped_at(3):
        run_alone(tmp_path)
    given = {"teacher": function_teacher()}
    options = dict(networks=given, data=dataset(), evaluate_only=True)
    looked = train_and_evaluate(alone(), tmp_path, **options)
    assert looked["networks"]["student"]["steps"] == 3 and (tmp_path / "report.md").exists()
    assert run_alone(tmp_path)["networks"]["student"]["steps"] == 5


@pytest.mark.long
def test_a_phase_gets_no_longer_once_others_learned_from_it(tmp_path, capsys):
    """The last one does: by a length of its own, or by the config's if the teacher keeps its."""
    train = lambda made: train_and_evaluate(made, tmp_path, data=dataset())  # noqa: E731
    made = config()
    train(made)
    own = {"num_steps": 8}
    phases = {name: dict(phase) for name, phase in made["phases"].items()}
    for changes in (own, dict(phases=phases | dict(teacher=phases["teacher"] | own))):
        with pytest.raises(ValueError) as refused:
            train(made | changes)
        assert str(refused.value) == (
            "phases.teacher.num_steps must be 5, after which the phase distill began in "
            f"{tmp_path}; found 8. Give it that (a phase without has the config's), or choose "
            "another workdir."
        )
    assert train(made)["networks"]["student"]["steps"] == 5  # it is as it was
    result = train(made | dict(phases=phases | dict(distill=phases["distill"] | own)))
    assert [result["networks"][x]["steps"] for x in ("teacher", "student")] == [5, 8]
    assert "distill.num_steps (5 there, 8 here)" in capsys.readouterr().err
    kept = dict(phases=phases | dict(teacher=phases["teacher"] | {"num_steps": 5}))
    result = train(made | kept | {"num_steps": 11})
    assert [result["networks"][x]["steps"] for x in ("teacher", "student")] == [5, 11]


@pytest.mark.long
def test_a_run_that_is_done_can_be_made_longer(tmp_path, capsys):
    expected = run_alone(tmp_path / "whole", num_steps=9)
    run_alone(tmp_path / "run")
    capsys.readouterr()
    with stopped_at(7):
        run_alone(tmp_path / "run", num_steps=9)
    assert capsys.readouterr().err.startswith(
        f"{tmp_path / 'run'}: goes on with num_steps (5 there, 9 here); schedules are from now on "
        "those of the new length.\n"
    )
    assert not (tmp_path / "run" / "result.json").exists()
    result = run_alone(tmp_path / "run", num_steps=9)
    assert result["networks"]["student"]["sha256"] == expected["networks"]["student"]["sha256"]
    assert result["networks"]["student"]["last"] == expected["networks"]["student"]["last"]
    for changes in (dict(num_steps=8), dict(num_steps=12, init_seed=1)):
        with pytest.raises(ValueError, match=r"another run; these differ: .*num_"):
            run_alone(tmp_path / "run", **changes)


# --- a source that depends on a network ---------------------------------------------------------

SAMPLED = dict(fn="sampled_source.sampled", refill_every=4)


def drawn_labels(**changes):
    """A student that learns from labels which it draws itself, see sampled_source.py."""
    phases = dict(alone=dict(learn=("student",), source=SAMPLED))
    made = config(student=network(), phases=phases, plugins=("sampled_source",), **changes)
    del made["teacher"]
    return made


def test_a_source_is_told_of_every_evaluation_and_step_0_is_never_the_best(tmp_path):
    """A first phase has learned well, and a second loses it."""
    made = drawn_labels(num_steps=6, checkpoint_every=2, log_every=2)
    second = made["phases"]["alone"] | dict(student=dict(optimizer=SGD | dict(learning_rate=20.0)))
    made["phases"] = dict(warm=dict(learn=("student",), num_steps=40), alone=second)
    result = train_and_evaluate(made, tmp_path, data=dataset())
    found = {
        row["step"]: row["validation/student/accuracy"]
        for row in rows(tmp_path)
        if "validation/student/accuracy" in row
    }
    assert list(found) == [0, 2, 4, 6]
    assert found[0] > max(found[2], found[4], found[6])
    warm = rows(tmp_path / "warm")
    assert found[0] == warm[-1]["validation/student/accuracy"] and warm[0]["step"] > 0
    assert result["networks"]["student"]["best"]["step"] in (2, 4, 6)
    with Checkpoints(tmp_path / FOLDER) as checkpoints:
        for step in checkpoints.steps():
            state = checkpoints.restore_at(step)["source"]
            assert state["evaluations"] == 1 + step // 2  # told before the save
            assert state["accuracy"] == pytest.approx(found[step])


def test_a_run_that_was_killed_before_its_first_checkpoint_has_step_0_once(tmp_path):
    tmp_path.joinpath("metrics.jsonl").write_text('{"step": 0, "validation/student/nll": 1.0}\n')
    made = drawn_labels(num_steps=2, checkpoint_every=2, log_every=2)
    train_and_evaluate(made, tmp_path, data=dataset())
    assert [row["step"] for row in rows(tmp_path)] == [0, 2, 2]


def test_a_trace_is_of_the_last_phase_alone(tmp_path, capsys):
    """Which is too short for one here, in contrast to the one before."""
    made = config(num_steps=2)
    made["phases"]["teacher"]["num_steps"] = 12
    train_and_evaluate(made, tmp_path, data=dataset(), profile=True)
    assert not (tmp_path / "profile").exists()
    assert "profile: no trace, for too few steps were left to train." in capsys.readouterr().err


@pytest.mark.slow
def test_a_source_draws_the_same_on_any_number_of_devices(tmp_path):
    states = {}
    for devices in (1, 8):
        made = drawn_labels(devices=devices, num_steps=10, checkpoint_every=5)
        train_and_evaluate(made, tmp_path / str(devices), data=dataset())
        states[devices] = newest(tmp_path / str(devices))
    assert digest(states[1]["source"]["labels"]) == digest(states[8]["source"]["labels"])
    close(states[1]["source"], states[8]["source"], rtol=1e-5)
    close(
        states[1]["learners"]["student"]["params"], states[8]["learners"]["student"]["params"], 1e-5
    )


@pytest.mark.parametrize("step", [3, 5])
def test_a_source_goes_on_where_a_run_was_stopped(tmp_path, step):
    """Between two refills, and between two evaluations; several steps a call."""
    made = drawn_labels(num_steps=10, checkpoint_every=5, log_every=5, steps_per_call=1)
    train_and_evaluate(made, tmp_path / "expected", data=dataset())
    with stopped_at(step):
        train_and_evaluate(made, tmp_path / "run", data=dataset())
    with Checkpoints(tmp_path / "run" / FOLDER) as checkpoints:
        assert checkpoints.steps() == [step]
    train_and_evaluate(made, tmp_path / "run", data=dataset())
    assert digest(newest(tmp_path / "run")) == digest(newest(tmp_path / "expected"))
    assert rows(tmp_path / "run") == rows(tmp_path / "expected")


@pytest.mark.long
def test_a_wish_to_stop_at_the_last_step_comes_too_late(tmp_path, monkeypatch):
    """The run is done, and says its result."""
    update, sent = Progress.update, []

    def stopping(self, at, **shown):
        if at == 5 and not sent:
            sent.append(at)
            signal.raise_signal(signal.SIGTERM)
        update(self, at, **shown)

    monkeypatch.setattr(Progress, "update", stopping)
    given = {"teacher": function_teacher()}
    train_and_evaluate(config(teacher=GIVEN), tmp_path, networks=given, data=dataset())
    assert (tmp_path / "result.json").exists()


# --- steps in a call, and devices ---------------------------------------------------------------


def close(a, b, rtol):
    """Equal to a relative tolerance of each array's largest number."""
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(x).max())


def test_steps_of_one_call_are_steps(tmp_path):
    """Schedules, the order of the data and the end of an epoch included."""
    scheduled = dict(fn="alpha_beta", alpha=dict(fn="linear", start=1.0, end=0.3), beta=0.5)
    student = network(terms=dict(distill=DISTILL | dict(divergence=scheduled)))
    learned = {}
    for every, alpha in ((1, 0.3), (5, 0.3), (5, 1.0)):
        scheduled["alpha"]["end"] = alpha
        made = config(
            teacher=GIVEN, student=student, steps_per_call=every, num_steps=10, log_every=10,
            checkpoint_every=10,
        )  # fmt: skip
        workdir = tmp_path / f"{every} {alpha}"
        given = {"teacher": function_teacher()}
        train_and_evaluate(made, workdir, networks=given, data=dataset())
        learned[every, alpha] = parameters(workdir)
    close(learned[1, 0.3], learned[5, 0.3], rtol=1e-6)
    with pytest.raises(AssertionError):  # so much that a schedule held still would show
        close(learned[5, 1.0], learned[5, 0.3], rtol=1e-4)


@pytest.mark.long
def test_calls_of_several_steps_end_where_something_is_told(tmp_path):
    intervals = dict(steps_per_call=5, log_every=4, checkpoint_every=6)
    made = config(teacher=GIVEN, num_steps=10, **intervals)
    given = {"teacher": function_teacher()}
    train_and_evaluate(made, tmp_path, networks=given, data=dataset())
    found = {kind: [] for kind in ("student/loss", "validation/student/accuracy")}
    for row in rows(tmp_path):
        for kind, steps in found.items():
            steps += [row["step"]] if kind in row else []
    assert list(found.values()) == [[4, 8, 10], [6, 10]]


PLUGIN = '''
"""A loss with which every example of a batch depends on all others."""

from jax import Array
from jax import numpy as jnp

from abkd_jax.types import Batch, Outputs


def centred(student: Outputs, teacher: Outputs, batch: Batch, *, scale: float | Array) -> Array:
    """The squared distance from the teacher's mean logits, times that of the whole batch."""
    distance = jnp.mean((student.logits - jnp.mean(teacher.logits, axis=0)) ** 2, axis=-1)
    return scale * distance * jnp.mean(distance)


centred.couples_batch = True
'''
COUPLED = dict(fn="losses_of_a_test.centred", scale=0.1, weight=1.0)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "losses_of_a_test.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    return ("losses_of_a_test",)


@pytest.mark.slow
def test_any_number_of_devices_learns_the_same(tmp_path, plugin):
    """Batch norm and a loss that couples the batch see the whole of it on 1, 2 and 8 devices."""
    student = network(
        model=dict(fn="cnn", widths=(4, 4), batch_norm=True), terms=dict(coupled=COUPLED)
    )
    given = {"teacher": (lambda w, x: jnp.mean(x, (1, 2)) * w, jnp.asarray([[-1.0, 0.5, 2.0]]))}
    learned = {}
    for devices in (1, 2, 8):
        made = config(teacher=GIVEN, student=student, plugins=plugin, devices=devices)
        workdir = tmp_path / str(devices)
        train_and_evaluate(made, workdir, networks=given, data=images(pad=1, flip=True))
        learned[devices] = parameters(workdir)
    made = config(
        teacher=GIVEN, student=student | dict(optimizer=SGD | dict(learning_rate=0.0)),
        plugins=plugin,
    )  # fmt: skip
    train_and_evaluate(made, tmp_path / "still", networks=given, data=images(pad=1, flip=True))
    assert differ(learned[1], parameters(tmp_path / "still"))
    # float32: sums over the batch are taken in another order, in each of five steps.
    close(learned[1], learned[2], rtol=1e-5)
    close(learned[1], learned[8], rtol=1e-5)


# --- refusals -----------------------------------------------------------------------------------


def untrained(workdir):
    """Whether the folder is still nobody's, so that nothing was trained in it."""
    return not workdir.exists() or {path.name for path in workdir.iterdir()} <= {".lock"}


def test_a_coupled_loss_is_refused_in_parts_before_the_teacher_trains(tmp_path, plugin):
    student = network(terms=dict(coupled=COUPLED))
    made = config(student=student, plugins=plugin, micro_batches=2)
    assert refusal(tmp_path / "run", made, data=dataset()) == (
        "micro_batches must be 1, for student.terms.coupled couples the rows of a batch; found 2."
    )
    assert untrained(tmp_path / "run")


@pytest.mark.slow
def test_the_baseline_takes_the_labels_that_there_are(tmp_path):
    """10 of 30 labels make no batch of 16 in 4 parts; the largest that do are 8."""
    made = config(baseline=network(), micro_batches=4, num_steps=1)
    options = dict(train=drawn(90, 0), labelled=12)
    result = train_and_evaluate(made, tmp_path, data=dataset(**options))
    assert result["networks"]["baseline"]["steps"] == 1


def test_a_model_that_cannot_take_the_inputs_is_refused_before_the_teacher_trains(tmp_path):
    resnet = dict(fn="resnet", depth=8)
    made = config(student=network(model=resnet, terms=dict(distill=DISTILL)))
    message = refusal(tmp_path, made, data=dataset())
    assert message.startswith(f"student: its model cannot take inputs of shape ({DIM},): ")
    made["student"] = network(model=dict(fn="cnn", widths=(4,)), terms=dict(distill=DISTILL))
    message = refusal(tmp_path, made, data=dataset())
    assert message.startswith(f"student: its model cannot take inputs of shape ({DIM},): ")
    assert untrained(tmp_path)


def product(kernel, inputs):
    return inputs @ kernel


OF_NETWORKS = [
    (dict(), {"peer": (product, KERNEL)},
     "networks has 'peer', which the config lacks; add "
     "peer=dict(model=dict(fn='given'))."),
    (dict(), {"teacher": (product, KERNEL)},
     "teacher.model must be dict(fn='given'), for networks= has 'teacher'; found {'fn': "
     "'mlp', 'widths': (5,)}."),
    (dict(teacher=GIVEN), {},
     "teacher.model is 'given', but networks has no 'teacher'; pass networks={'teacher': "
     "(apply_fn, variables)} to train_and_evaluate."),
    (dict(teacher=GIVEN), {"teacher": (nn.Dense(K), {})},
     "networks['teacher']: a network must be module.apply with the module's variables, or for an "
     "NNX model from_nnx(model); found 'Dense'."),
    (dict(teacher=GIVEN), {"teacher": 3},
     "networks['teacher'] must be (apply_fn, variables); found 3."),
    (dict(teacher=GIVEN), {"teacher": (product, KERNEL[:, :2])},
     "teacher must give logits of shape (B, 3); found (2, 2)."),
    (dict(teacher=GIVEN), {"teacher": (product, KERNEL[:4])},
     "teacher: its model cannot take inputs of shape (6,): dot_general requires contracting "
     "dimensions to have the same shape, got (6,) and (4,)."),
    (dict(teacher=GIVEN), {"teacher": (lambda kernel, inputs: [inputs @ kernel], KERNEL)},
     "teacher: its model cannot take inputs of shape (6,): <lambda> must return logits [..., K] "
     "or Outputs; found list."),
]  # fmt: skip


@pytest.mark.parametrize("changes,given,message", OF_NETWORKS)
def test_networks_that_do_not_fit_are_refused(tmp_path, changes, given, message):
    found = refusal(tmp_path, config(**changes), networks=given, data=dataset())
    assert found == message
    assert untrained(tmp_path)


def test_networks_whose_logits_are_no_logits_are_refused(tmp_path):
    made = config(teacher=GIVEN)
    whole = {"teacher": (lambda kernel, inputs: jnp.round(inputs @ kernel).astype(int), KERNEL)}
    assert refusal(tmp_path, made, networks=whole, data=dataset()) == (
        "teacher must give floating logits; found int32."
    )
    fixed = {"teacher": (lambda kernel, inputs: kernel[:2], KERNEL)}  # whatever the batch is
    assert refusal(tmp_path, made, networks=fixed, data=dataset()) == (
        "teacher: logits must have one row for each row of the batch's where [16]; found [2, 3]."
    )
    assert untrained(tmp_path)


def test_a_teacher_in_half_precision_is_reported(tmp_path):
    given = {"teacher": (lambda kernel, x: (x @ kernel).astype(jnp.bfloat16), KERNEL)}
    train_and_evaluate(config(teacher=GIVEN), tmp_path, networks=given, data=dataset())
    shown = np.load(tmp_path / "examples.npz")["probabilities/teacher"]
    assert shown.dtype == np.float32 and np.allclose(shown.sum(axis=-1), 1, atol=1e-6)
    assert (tmp_path / "report.md").exists()


def test_arguments_of_the_wrong_kind_are_refused(tmp_path):
    assert refusal(tmp_path, None) == "config must be a ConfigDict or a mapping; found None."
    assert refusal("", config()) == "workdir must be the path of a folder; found ''."
    message = refusal(tmp_path, config(), networks=[3])
    assert message == "networks must be a mapping {name: (apply_fn, variables)}; found [3]."
    message = refusal(tmp_path, config(), data=(1, 2))
    assert message == "data must be a DataSet, such as data.from_arrays makes; found (1, 2)."


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    made = config(baseline=network(), batch_size=91)
    assert refusal(tmp_path, made, data=dataset()) == (
        "batch_size must be at most the 90 examples to train teacher; found 91."
    )
    omitted = dataset(omit=(2,))
    assert refusal(tmp_path, config(batch_size=61), data=omitted) == (
        "batch_size must be at most the 60 examples to train student; found 61."
    )
    assert untrained(tmp_path)
