"""The folder of a run: what is loaded from it, whose it is, and the files that are written."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from abkd_jax import adopt, data, from_nnx
from abkd_jax.config import resolve
from abkd_jax.run import phases
from abkd_jax.run import workdir as folders
from abkd_jax.run.log.writer import read
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.train.checkpoint import FOLDER, Checkpoints

K = 3
CNN = dict(fn="cnn", widths=(4,), batch_norm=True)
MEAN, STD = (0.4,), (0.3,)
TASK = dict(task=dict(fn="cross_entropy", weight=1.0))
TERMS = dict(
    distill=dict(
        fn="on_logits",
        weight=1.0,
        temperature=1.0,
        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.5),
    )
)
TEACHER = dict(learn=("teacher",), split="full")
DISTILL = dict(learn=("student",), see=("teacher",))


def network(**changes):
    group = dict(model=CNN, optimizer=dict(fn="sgd", learning_rate=0.5), terms=TASK)
    return group | changes


def config(**changes):
    values = dict(
        data=dict(fn="digits", validation=0),
        teacher=network(),
        student=network(ema_decay=0.5, terms=TERMS),
        phases=dict(teacher=TEACHER, distill=DISTILL),
        batch_size=16,
        num_steps=6,
        checkpoint_every=2,
        log_every=2,
        devices=1,
        init_seed=0,
        data_seed=0,
    )
    return values | changes


def examples(size, seed):
    """Images whose brightness tells the class, and labels that go round."""
    labels = np.arange(size) % K
    noise = np.random.default_rng(seed).integers(0, 80, (size, 8, 8, 1))
    return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels


def images(std=STD):
    parts = {"train": examples(48, 0), "validation": examples(30, 1), "test": examples(40, 2)}
    return data.from_arrays(**parts, num_classes=K, mean=MEAN, std=std)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its result, and the distributions that its report shows; not to be changed."""
    workdir = tmp_path_factory.mktemp("run")
    made = config()
    # A rate so high at the end that what was learned is lost: the best is not the last.
    lost = dict(fn="piecewise", start=0.5, factor=100.0, boundaries=(4,))
    made["teacher"]["optimizer"]["learning_rate"] = lost
    result = train_and_evaluate(made, workdir, data=images())
    with np.load(workdir / "examples.npz") as file:
        return workdir, result, dict(file)


def state(workdir, name):
    with Checkpoints(workdir / FOLDER) as checkpoints:
        return checkpoints.restore()[1]["learners"][name]


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# --- load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,folder", [("student", ""), ("teacher", "teacher")])
def test_a_loaded_network_says_what_the_run_said(run, name, folder):
    """On inputs as they are stored, or as pixels in [0, 1]; float32, hence 1e-6."""
    workdir, _, shown = run
    module, variables, made = loaded = folders.load(workdir / folder)
    assert made["num_steps"] == 6 and made[name]["model"]["fn"] == "cnn"
    for inputs in (shown["images"], shown["images"].astype(np.float32) / 255):
        for outputs in (loaded(inputs), module.apply(variables, inputs, train=False)):
            found = jax.nn.softmax(outputs.logits)
            np.testing.assert_allclose(found, shown[f"probabilities/{name}"], atol=1e-6)
    assert np.ptp(shown[f"probabilities/{name}"]) > 0.01
    assert same(folders.load(workdir / folder, name).variables, variables)


def test_the_moving_average_is_what_is_loaded(run):
    workdir, _, _ = run
    student, teacher = state(workdir, "student"), state(workdir / "teacher", "teacher")
    loaded = folders.load(workdir).variables["params"]
    assert same(loaded, student["ema_params"]) and not same(loaded, student["params"])
    assert same(folders.load(workdir / "teacher").variables["params"], teacher["params"])
    assert same(folders.load(workdir).variables["batch_stats"], student["batch_stats"])


def test_the_best_state_is_loaded_on_demand(run):
    workdir, result, _ = run
    found, (inputs, labels) = result["networks"]["teacher"], examples(40, 2)
    assert found["best"]["step"] < found["steps"]
    accuracy = {}
    for best in (False, True):
        logits = folders.load(workdir / "teacher", best=best)(inputs).logits
        accuracy[best] = np.mean(np.argmax(logits, -1) == labels)
    assert accuracy[False] == pytest.approx(found["last"]["accuracy"], abs=1e-6)
    assert accuracy[True] == pytest.approx(found["best"]["scores"]["accuracy"], abs=1e-6)
    assert accuracy[True] > accuracy[False]


def refusal(call, *args, **options):
    with pytest.raises(ValueError) as refused:
        call(*args, **options)
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_what_cannot_be_loaded_is_refused(run, tmp_path):
    workdir, _, _ = run
    nothing = tmp_path / "nothing"
    expected = f"{nothing} is no workdir of a run: it has no config.json."
    assert refusal(folders.load, nothing) == expected
    assert refusal(folders.load, workdir, "tutor") == (
        f"{workdir} trained student; found name 'tutor'."
    )
    assert refusal(folders.load, workdir, "teacher") == (
        f"{workdir} trained student; found name 'teacher', which is in {workdir / 'teacher'}."
    )
    shutil.copy(workdir / "config.json", tmp_path)
    assert refusal(folders.load, tmp_path) == f"{tmp_path} has no checkpoint."
    assert refusal(folders.load, tmp_path, best=True) == (
        f"{tmp_path} has no checkpoint that was evaluated."
    )
    (tmp_path / "config.json").write_text("{")
    assert refusal(folders.load, tmp_path).startswith(f"{tmp_path}/config.json cannot be read: ")


def test_one_of_several_networks_is_named(tmp_path):
    b = network(model=CNN | dict(widths=(3,)))
    made = config(num_steps=1, a=network(), b=b, phases=dict(both=dict(learn=("a", "b"))))
    del made["teacher"], made["student"]
    train_and_evaluate(made, tmp_path, data=images())
    assert refusal(folders.load, tmp_path) == (
        f"{tmp_path} has the networks a, b; name one of them."
    )
    assert folders.load(tmp_path, "b").module.module.widths == (3,)


@pytest.mark.long
def test_a_given_network_is_loaded_into_what_was_given(tmp_path):
    made = config(
        teacher=dict(model=dict(fn="given")),
        student=network(model=dict(fn="given"), terms=TERMS),
        phases=dict(distill=DISTILL),
        num_steps=1,
    )
    kernel = np.ones((64, K), np.float32)
    given = {"teacher": (lambda w, x: x.reshape(len(x), -1) @ w, kernel)}
    start = np.linspace(-1, 1, kernel.size, dtype=np.float32).reshape(kernel.shape)
    given["student"] = (lambda w, x: x.reshape(len(x), -1) @ w, start)
    train_and_evaluate(made, tmp_path, networks=given, data=images())
    assert refusal(folders.load, tmp_path) == (
        f"{tmp_path}: student was given by its caller; pass networks={{'student': (apply_fn, "
        "variables)}, as to the run."
    )
    loaded = folders.load(tmp_path, networks=given)
    kernel = loaded.variables["params"]
    assert np.any(kernel != start)
    inputs = images().test.inputs[:3]
    normalised = (np.asarray(inputs, np.float32).reshape(3, -1) / 255 - MEAN[0]) / STD[0]
    np.testing.assert_allclose(loaded(inputs).logits, normalised @ kernel, rtol=1e-4, atol=1e-6)
    narrow = given | {"student": (given["student"][0], kernel[:, :2])}
    assert refusal(folders.load, tmp_path, networks=narrow) == (
        f"{tmp_path} has params (64, {K}), but networks has (64, 2)."
    )


class Counted(nnx.Module):
    """Ten layers and more, whose numbers sort otherwise than their names, and batch norm."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.last = nnx.Linear(64, K, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for layer in self.layers:
            x = x + 0.1 * nnx.relu(layer(x))
        return self.last(self.norm(x))


@pytest.mark.long
def test_an_nnx_model_learns_and_is_loaded(tmp_path):
    student = network(model=dict(fn="given"))
    made = config(student=student, phases=dict(alone=dict(learn=("student",))), num_steps=3)
    del made["teacher"]
    given = {"student": from_nnx(Counted(nnx.Rngs(0)))}
    result = train_and_evaluate(made, tmp_path, networks=given, data=images())
    loaded = folders.load(tmp_path, networks=given)
    test = images().test
    accuracy = np.mean(np.argmax(loaded(test.inputs).logits, -1) == test.labels)
    assert accuracy == pytest.approx(result["networks"]["student"]["last"]["accuracy"])
    shown = adopt(loaded.module.apply, loaded.variables)
    outputs, _ = shown.forward(shown.params, test.inputs, train=False)
    np.testing.assert_allclose(outputs.logits, loaded(test.inputs).logits, rtol=1e-5)


def test_inputs_of_another_shape_are_refused_by_a_loaded_network(tmp_path):
    made = config(num_steps=1, phases=dict(alone=dict(learn=("teacher",))))
    del made["student"]
    train_and_evaluate(made, tmp_path, data=images())
    message = refusal(folders.load(tmp_path), np.zeros((2, 8, 8, 3), np.uint8))
    assert message.startswith("the network cannot take inputs of shape (2, 8, 8, 3): ")


# --- a teacher from another run -----------------------------------------------------------------


def taught(workdir, std=STD, model=CNN, **weights):
    """A config whose teacher comes from another run, and what is to be handed over with it."""
    teacher = dict(model=model, weights=dict(fn="run", workdir=str(workdir)) | weights)
    made = config(teacher=teacher, phases=dict(distill=DISTILL))
    return (made,), dict(data=images(std=std))


@pytest.mark.parametrize("folder,name", [("teacher", "teacher"), ("", "student")])
def test_a_teacher_from_another_run_is_not_trained(run, tmp_path, folder, name):
    """From the folder of a teacher, or from a run whose student is to teach."""
    workdir, result, _ = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    (made,), options = taught(workdir / folder)
    found = train_and_evaluate(made, tmp_path, **options)
    assert not (tmp_path / "teacher").exists()
    np.testing.assert_equal(found["networks"]["teacher"]["last"], result["networks"][name]["last"])
    assert found["networks"]["teacher"]["best"] is None
    with np.load(tmp_path / "examples.npz") as file:
        expected = jax.nn.softmax(folders.load(workdir / folder)(file["images"]).logits)
        np.testing.assert_allclose(file["probabilities/teacher"], expected, atol=1e-6)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_teacher_from_another_run_teaches_as_in_its_own(run, tmp_path):
    """Named or not, the same student bit by bit; its best state teaches another."""
    workdir, result, _ = run
    sums = {}
    for key, weights in {
        "plain": {},
        "named": dict(network="teacher"),
        "best": dict(best=True),
    }.items():
        (made,), options = taught(workdir / "teacher", **weights)
        found = train_and_evaluate(made, tmp_path / key, **options)
        sums[key] = found["networks"]["student"]["sha256"]
        expected = result["networks"]["teacher"]
        expected = expected["best"]["scores"] if key == "best" else expected["last"]
        np.testing.assert_equal(found["networks"]["teacher"]["last"], expected)
    assert sums["plain"] == sums["named"] == result["networks"]["student"]["sha256"]
    assert sums["best"] != sums["plain"]


def test_a_network_goes_on_from_another_run(run, tmp_path):
    """With its parameters and statistics, as a phase of the same run would."""
    workdir, _, _ = run
    weights = dict(fn="run", workdir=str(workdir / "teacher"))
    student = network(weights=weights, optimizer=dict(fn="sgd", learning_rate=0.0))
    phases = dict(more=dict(learn=("student",), num_steps=1))
    made = config(student=student, phases=phases)
    del made["teacher"]
    train_and_evaluate(made, tmp_path, data=images())
    assert same(
        state(tmp_path, "student")["params"], state(workdir / "teacher", "teacher")["params"]
    )


def test_a_teacher_that_does_not_fit_is_refused(run, tmp_path):
    source = run[0] / "teacher"

    def told(workdir=source, **changes):
        args, options = taught(workdir, **changes)
        return refusal(train_and_evaluate, *args, tmp_path, **options)

    assert told(model=CNN | dict(widths=(5,))) == (
        f"teacher.weights: {source} has batch_stats.BatchNorm_0.mean (4,), but this run has (5,)."
    )
    assert told(model=CNN | dict(widths=(4, 4))) == (
        f"teacher.weights: {source} has batch_stats.BatchNorm_1.mean None, but this run has (4,)."
    )
    number = r"\[0\.[0-9]+\]"
    assert re.fullmatch(
        f"teacher.weights: {source} has the normalisation {{'mean': {number}, 'std': {number}}}"
        f", but this run has {{'mean': {number}, 'std': \\[0\\.5\\]}}\\.",
        told(std=(0.5,)),
    )
    elsewhere = tmp_path / "elsewhere"
    assert told(elsewhere) == (
        f"teacher.weights: {elsewhere} is no workdir of a run: it has no config.json."
    )
    assert told(network="tutor") == (
        f"teacher.weights: {source} trained teacher; found name 'tutor'."
    )
    assert told(run[0], network="teacher") == (
        f"teacher.weights: {run[0]} trained student; found name 'teacher', which is in {source}."
    )


def test_a_teacher_for_images_of_another_shape_is_refused(run, tmp_path):
    """The same model, but its first kernel has one channel, and the images have three."""

    def coloured(size, seed):
        inputs, labels = examples(size, seed)
        return np.repeat(inputs, 3, axis=-1), labels

    source = tmp_path / "source"
    shutil.copytree(run[0] / "teacher", source)
    about = json.loads((source / "config.json").read_text())
    about["preprocess"] = {"mean": None, "std": None}  # which fits any number of channels
    (source / "config.json").write_text(json.dumps(about))
    parts = {name: coloured(48, seed) for seed, name in enumerate(("train", "test"))}
    (made,), _ = taught(source)
    of_three = data.from_arrays(**parts, validation=None, num_classes=K)
    assert refusal(train_and_evaluate, made, tmp_path / "run", data=of_three) == (
        f"teacher.weights: {source} has params.Conv_0.kernel (3, 3, 1, 4), but this run has "
        "(3, 3, 3, 4)."
    )


def test_weights_with_a_layer_that_the_model_lacks_are_refused(run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(run[0] / "teacher", source)
    with Checkpoints(source / FOLDER) as checkpoints:
        step, tree = checkpoints.restore()
        tree["learners"]["teacher"]["params"]["Dense_9"] = {"bias": np.zeros(5, np.float32)}
        checkpoints.save(step + 1, tree)
        checkpoints.wait()
    (made,), options = taught(source)
    assert refusal(train_and_evaluate, made, tmp_path / "run", **options) == (
        f"teacher.weights: {source} has params.Dense_9.bias (5,), but this run has None."
    )


# --- whose it is --------------------------------------------------------------------------------


def about(**changes):
    group = dict(data=dict(fn="digits", data_dir="/here"), student=dict(widths=(3, 4)))
    return dict(config=group | changes, learners=("student",))


def test_a_folder_is_claimed_once(tmp_path):
    folders.claim(tmp_path, about())
    written = (tmp_path / "config.json").read_text()
    assert json.loads(written)["config"]["student"] == {"widths": [3, 4]}
    folders.claim(tmp_path, about())
    assert (tmp_path / "config.json").read_text() == written


def test_what_differs_is_named_with_both_values(tmp_path):
    folders.claim(tmp_path, about())
    other = about(student=dict(widths=(3,)), num_steps=5)
    other["learners"] = ("student", "teacher")
    assert refusal(folders.claim, tmp_path, other) == (
        f"{tmp_path} is the workdir of another run; these differ: student.widths ([3, 4] there, "
        "[3] here), learners (['student'] there, ['student', 'teacher'] here), num_steps ('absent' "
        "there, 5 here). Choose another workdir, or the config of that run."
    )


@pytest.mark.parametrize("key", ["sweep", "contents"])
def test_a_folder_of_a_sweep_or_of_known_contents_is_no_other_run_s(tmp_path, key):
    folders.claim(tmp_path, about() | {key: {"a": 1}})
    assert f"these differ: {key}.a (1 there, 'absent' here)" in refusal(
        folders.claim, tmp_path, about()
    )
    folders.claim(tmp_path, about() | {key: {"a": 1}})


def test_lengths_of_phases_are_the_configs_unless_they_have_their_own(tmp_path, capsys):
    made = about(num_steps=5, phases=dict(a={}, b=dict(num_steps=7)))
    folders.claim(tmp_path, made)
    folders.claim(
        tmp_path, about(num_steps=5, phases=dict(a=dict(num_steps=5), b=dict(num_steps=7)))
    )
    kept = about(num_steps=9, phases=dict(a=dict(num_steps=5), b=dict(num_steps=7)))
    folders.claim(tmp_path, kept, longer=True)
    assert "goes on with num_steps (5 there, 9 here);" in capsys.readouterr().err
    found = refusal(
        folders.claim, tmp_path, about(num_steps=9, phases=dict(a={}, b=dict(num_steps=7)))
    )
    assert "these differ: phases.a.num_steps (5 there, 9 here)." in found


def test_a_folder_may_become_that_of_more_steps_alone(tmp_path, capsys):
    """And then what the shorter run ended with is gone."""
    folders.claim(tmp_path, about(num_steps=5))
    for name in ("report.md", "result.json"):
        (tmp_path / name).write_text("{}")
    for steps, longer in ((9, False), (4, True), (9.0, True)):
        found = refusal(folders.claim, tmp_path, about(num_steps=steps), longer=longer)
        assert f"these differ: num_steps (5 there, {steps} here)." in found
    assert len(list(tmp_path.iterdir())) == 3
    folders.claim(tmp_path, about(num_steps=9), longer=True)
    assert f"{tmp_path}: goes on with num_steps (5 there, 9 here);" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    folders.claim(tmp_path, about(num_steps=9))


def test_the_place_of_the_data_and_the_versions_may_differ(tmp_path):
    folders.claim(tmp_path, about())
    there = dict(fn="digits", data_dir="/there", download=True, cache_dir="/there/too")
    folders.claim(tmp_path, about(data=there))
    path = tmp_path / "config.json"
    found = json.loads(path.read_text())
    assert {"versions", "commit", "device"} <= set(found)
    path.write_text(json.dumps(found | dict(versions={"jax": "0.0"}, commit="x", device="y")))
    folders.claim(tmp_path, about())


def test_text_that_has_changed_is_another_run(tmp_path):
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    lines = [f'{{"prompt": "{n}", "response": "{n + 1}"}}\n' for n in range(4)]
    text = dict(fn="text", train=str(train), validation=0, test=str(test), tokenizer="bytes")
    text |= dict(length=8, cache_dir=str(tmp_path / "cache"))
    student = network(model=dict(fn="decoder", width=2, layers=1, heads=1))
    made = config(task=dict(fn="language"), data=text, student=student, batch_size=2)
    made["phases"] = dict(only=dict(learn=("student",)))
    del made["teacher"]

    def claim(lines):
        train.write_text("".join(lines))
        plan = resolve(made)
        with phases.opened(plan, tmp_path / "run") as run:
            folders.claim(run.workdir, phases.identity(run, *plan.phases))

    test.write_text(lines[0])
    claim(lines)
    claim(lines)
    differs = r"these differ: contents\.data\.train \('\w{12}' there, '\w{12}' here\)\."
    assert re.search(differs, refusal(claim, lines[::-1]))


def test_a_second_process_is_kept_out(tmp_path):
    workdir = tmp_path / "a" / "b"
    with folders.locked(workdir):
        with pytest.raises(ValueError) as refused, folders.locked(workdir):
            pass
        assert str(refused.value) == f"another process is at work in the workdir {workdir}."
    with folders.locked(workdir):
        pass


def test_json_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    value = {"a": np.float32(0.5), "b": [np.nan, np.inf, 1], "c": np.arange(2), "d": None}
    folders.write_json(path, value)
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [None, None, 1], "c": [0, 1], "d": None}
    written = path.read_bytes()
    with pytest.raises(TypeError):
        folders.write_json(path, {"a": 1, "b": object()})
    assert path.read_bytes() == written


def test_the_rate_is_of_the_examples_since_the_row_before(run):
    """Of two steps, log_every, in the seconds of the same row."""
    found = [row for row in read(run[0]) if "time/examples_per_second" in row]
    assert [row["step"] for row in found] == [2, 4, 6]
    for row in found:
        assert row["time/examples_per_second"] * row["time/seconds"] == pytest.approx(2 * 16)
