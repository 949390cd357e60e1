"""A teacher of which only the outputs are there: from a file, or with the data."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import Outputs, data, sweep
from abkd_jax.run.log.writer import read
from abkd_jax.run.loop import train_and_evaluate

K, DIM = 3, 6
KERNEL = np.random.default_rng(5).normal(size=(DIM, K)).astype(np.float32)
SIZES = {"train": 50, "validation": 20, "test": 30}


def drawn(size, seed):
    labels = np.arange(size) % K
    noise = np.random.default_rng(seed).normal(size=(size, DIM))
    return (2 * np.eye(K, DIM)[labels] + noise).astype(np.float32), labels


EXAMPLES = {name: drawn(size, seed) for seed, (name, size) in enumerate(SIZES.items())}


def dataset(**changes):
    return data.from_arrays(**EXAMPLES | changes, num_classes=K)


def shown(inputs):
    """What the teacher shows, in numpy."""
    return Outputs(logits=inputs @ KERNEL, hidden=np.tanh(inputs))


def network(variables, inputs):
    """The same as a function."""
    return Outputs(logits=inputs @ KERNEL, hidden=jnp.tanh(inputs))


def written(path, names=("test", "train", "validation"), outputs=shown):
    parts = [(EXAMPLES[name][0], outputs(EXAMPLES[name][0])) for name in names]
    data.save_outputs(path, *parts)
    return dict(fn="cached", path=str(path))


def config(teacher, **changes):
    """A student of the teacher's logits and, by its class means, of its features."""
    kd = dict(fn="on_logits", divergence=dict(fn="forward_kl"), temperature=2.0, weight=1.0)
    nd = dict(fn="norm_and_direction", centers="class_means", weight=0.5)
    student = dict(
        model=dict(fn="mlp", widths=(5,)),
        project=dict(hidden="teacher"),
        optimizer=dict(fn="sgd", learning_rate=0.1),
        terms=dict(kd=kd, nd=nd),
    )
    values = dict(
        teacher=dict(model=teacher),
        student=student,
        phases=dict(distill=dict(learn=("student",), see=("teacher",))),
        analysis=("entropy", "mass_flow"),
        batch_size=16,
        num_steps=8,
        checkpoint_every=4,
        log_every=2,
        devices=1,
        init_seed=0,
        data_seed=0,
    )
    return values | changes


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """A run in which the network itself is called."""
    workdir = tmp_path_factory.mktemp("called")
    given = {"teacher": (network, {})}
    made = config(dict(fn="given"))
    return train_and_evaluate(made, workdir, networks=given, data=dataset()), read(workdir)


def assert_same(found, expected):
    """Two runs, but for times and what is known of the teacher's parameters."""
    (result, rows), (wanted, wanted_rows) = found, expected
    for a, b in zip(rows, wanted_rows, strict=True):
        assert set(a) == set(b)
        for name in set(a) - {n for n in a if n.startswith("time/")}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    for name in ("teacher", "student"):
        a, b = (x["networks"][name]["last"] for x in (result, wanted))
        assert jax.tree.map(pytest.approx, a) == b


def test_a_file_stands_for_the_network_everywhere(tmp_path, called):
    """Training, class means, analysis, validation and test, in another order than the data's."""
    made = config(written(tmp_path / "teacher.npz"))
    result = train_and_evaluate(made, tmp_path / "run", data=dataset())
    assert_same((result, read(tmp_path / "run")), called)


@pytest.mark.long
def test_outputs_that_come_with_the_data_do_so_too(tmp_path, called):
    own = dataset()
    for name in ("train", "full", "validation", "test"):
        split = getattr(own, name)
        outputs = jax.tree.map(jnp.asarray, shown(np.asarray(split.inputs)))
        own = own.replace(**{name: split.replace(outputs={"teacher": outputs})})
    result = train_and_evaluate(config(dict(fn="cached")), tmp_path, data=own)
    assert_same((result, read(tmp_path)), called)


@pytest.mark.long
def test_what_a_called_network_shows_is_computed_once(tmp_path, capsys):
    """Where examples are seen more often than once; else it is called in each step."""
    how = dict(networks={"teacher": (network, {})}, data=dataset())
    rows, said = {}, {}
    for steps in (8, 3):  # of 16 out of 50 examples
        made = config(dict(fn="given"), num_steps=steps, log_every=1, analysis=())
        train_and_evaluate(made, tmp_path / f"{steps}", **how)
        rows[steps], said[steps] = read(tmp_path / f"{steps}"), capsys.readouterr().err
    assert "outputs of teacher: computed once" in said[8]
    assert "computed once" not in said[3]
    for once, each in zip(rows[8][:3], rows[3], strict=False):
        for name in ("student/kd", "student/nd", "student/gradient_norm"):
            assert once[name] == pytest.approx(each[name], rel=1e-5), name


def test_a_sweep_takes_them(tmp_path):
    rate = "student.optimizer.learning_rate"
    made = config(written(tmp_path / "teacher.npz"), analysis=())
    rows = sweep.sweep(made, tmp_path / "sweep", over={rate: [0.1, 0.3]}, data=dataset())
    made["student"]["optimizer"]["learning_rate"] = 0.3
    single = train_and_evaluate(made, tmp_path / "single", data=dataset())
    last = single["networks"]["student"]["last"]
    assert rows[1]["test_nll"] == pytest.approx(last["nll"], rel=1e-4)


def refusal(tmp_path, made, **options):
    with pytest.raises(ValueError) as refused:
        train_and_evaluate(made, tmp_path / "run", **{"data": dataset()} | options)
    message = str(refused.value)
    assert "\n" not in message and message.endswith(".")
    return message.replace(str(tmp_path), "")


def test_an_example_without_outputs_is_refused(tmp_path):
    made = config(written(tmp_path / "t.npz", names=("train", "validation")))
    assert refusal(tmp_path, made).startswith(
        "/t.npz has no outputs for 30 of the 30 examples of data.test: outputs are found by a hash"
    )
    moved = EXAMPLES["train"][0].copy()
    moved[7, 2] += 1e-3
    made = config(written(tmp_path / "t.npz"))
    own = dataset(train=(moved, EXAMPLES["train"][1]))
    assert refusal(tmp_path, made, data=own).startswith(
        "/t.npz has no outputs for 1 of the 50 examples of data.train"
    )


def test_a_cached_teacher_is_refused_where_examples_change(tmp_path):
    images = {
        name: (
            np.random.default_rng(seed).integers(0, 256, (24, 4, 4, 1), np.uint8),
            np.arange(24) % K,
        )
        for seed, name in enumerate(SIZES)
    }
    data.save_outputs(
        tmp_path / "t.npz",
        *(
            (x, Outputs(logits=np.zeros((24, K)), hidden=np.zeros((24, 5))))
            for x, _ in images.values()
        ),
    )
    made = config(dict(fn="cached", path=str(tmp_path / "t.npz")))
    own = data.from_arrays(**images, num_classes=K, flip=True)
    assert refusal(tmp_path, made, data=own) == (
        "teacher.model must be called where examples are augmented (data.pad, data.flip); found "
        "'cached'."
    )


def test_what_no_file_of_outputs_is_is_refused(tmp_path):
    path = tmp_path / "t.npz"
    made = config(dict(fn="cached", path=str(path)))
    assert "cannot be read" in refusal(tmp_path, made)
    path.write_bytes(b"PK")
    assert "cannot be read" in refusal(tmp_path, made)
    np.savez(path, logits=np.zeros((3, K)))
    assert "must be an npz with hash and logits" in refusal(tmp_path, made)
    written(path, outputs=lambda x: shown(x).replace(logits=np.zeros((len(x), K + 1))))
    assert "teacher" in refusal(tmp_path, made)
    message = refusal(tmp_path, config(dict(fn="cached")))
    assert message.startswith("teacher.model.path must be a file of data.save_outputs, since the d")


def test_a_cached_network_does_not_learn(tmp_path):
    made = config(written(tmp_path / "t.npz"))
    made["phases"] = dict(all=dict(learn=("teacher", "student")))
    assert refusal(tmp_path, made) == (
        "phases.all.learn: teacher is known by its outputs alone and cannot learn."
    )


def test_hashes_tell_examples_apart():
    inputs = {"a": np.arange(12).reshape(6, 2), "b": np.arange(6.0)}
    hashes = data.row_hashes(inputs)
    assert hashes.dtype == np.uint64 and len(set(hashes.tolist())) == 6
    stored = {"a": inputs["a"].astype(np.int32), "b": jnp.asarray(inputs["b"], jnp.float32)}
    np.testing.assert_array_equal(data.row_hashes(stored), hashes)
    np.testing.assert_array_equal(
        data.row_hashes({n: x[::-1] for n, x in inputs.items()}), hashes[::-1]
    )
    other = inputs | {"a": inputs["a"].reshape(6, 2, 1)}
    assert not set(data.row_hashes(other).tolist()) & set(hashes.tolist())
    pixels = np.arange(12, dtype=np.uint8).reshape(6, 2)
    assert not set(data.row_hashes(pixels)) & set(data.row_hashes(pixels.astype(np.int32)))


def test_outputs_of_other_rows_are_refused(tmp_path):
    inputs = EXAMPLES["test"][0]
    with pytest.raises(ValueError, match=r"^the outputs' logits must be of 30 rows; found 29\.$"):
        data.save_outputs(tmp_path / "t.npz", (inputs, Outputs(logits=inputs[:29] @ KERNEL)))
    both = (inputs, shown(inputs)), (inputs, Outputs(logits=inputs @ KERNEL))
    with pytest.raises(ValueError, match=r"^the outputs' hidden must be shown of all parts"):
        data.save_outputs(tmp_path / "t.npz", *both)
