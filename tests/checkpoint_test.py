"""Checkpoints: which are kept, what comes back, and what is said when one cannot be written."""

import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import numpy as jnp

from abkd_jax import data
from abkd_jax.train.checkpoint import Checkpoints, digest


def tree(value=0.0):
    return {
        "weights": jnp.full((64, 64), value, jnp.float32),
        "step": jnp.asarray(int(value)),
        "half": jnp.full((3,), value, jnp.bfloat16),
    }


@pytest.fixture
def reopen(tmp_path):
    """Opens the checkpoints of the test's folder, after closing those that it opened before."""
    opened = []

    def again():
        if opened:
            opened.pop().close()
        opened.append(Checkpoints(tmp_path / "checkpoints"))
        return opened[-1]

    yield again
    for checkpoints in opened:
        checkpoints.close()


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], [1, 4, 5], 1),
        ([0.5, 0.6, 0.7, 0.8, 0.9], [4, 5], 5),
        ([0.5, 0.9, 0.7, 0.8, 0.6], [2, 4, 5], 2),
        ([0.5, None, None, None, None], [1, 4, 5], 1),
        ([0.0, None, None, None, None], [1, 4, 5], 1),
        ([0.8, 0.7, None, 0.9, None], [4, 5], 4),
        ([None], [1], None),
        ([np.nan], [1], None),
        ([np.nan, 0.5, 0.3, np.nan], [2, 3, 4], 2),
    ],
)
def test_the_newest_two_and_the_best_are_kept(reopen, scores, kept, best):
    checkpoints = reopen()
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, tree(step), score=score)
    for again in (False, True):
        checkpoints.wait()
        found = checkpoints.best()
        assert checkpoints.steps() == kept
        assert found == (None if best is None else (best, scores[best - 1]))
        if best is not None:
            assert digest(checkpoints.restore_at(best, tree())) == digest(tree(best))
        checkpoints = checkpoints if again else reopen()


@pytest.mark.parametrize("stops", range(1, 6))
def test_the_best_of_equals_does_not_depend_on_where_a_run_was_stopped(reopen, tmp_path, stops):
    scores = [0.5, 0.9, 0.9, 0.9, 0.1]
    checkpoints = reopen()
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, tree(step), score=score)
        if step == stops:
            checkpoints = reopen()
    checkpoints.wait()
    assert checkpoints.best() == (4, 0.9)


def test_a_state_comes_back_with_its_bits_types_and_structure(reopen):
    saved = tree(np.pi)
    reopen().save(3, saved)
    step, found = reopen().restore(tree())
    assert step == 3
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    assert digest(found) == digest(saved)
    step, found = reopen().restore()
    assert step == 3 and digest(found) == digest(saved)


def test_without_a_checkpoint_nothing_comes_back(reopen):
    assert reopen().restore(tree()) is None
    assert reopen().best() is None


@pytest.mark.parametrize("size", [8, 4_000_000])
def test_the_buffers_may_be_donated_right_after_a_save(reopen, size):
    poison = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpoints = reopen()
    for step in range(1, 4):
        arrays = [jnp.arange(size, dtype=jnp.float32) + step * i for i in range(4)]
        address = arrays[0].unsafe_buffer_pointer()
        checkpoints.save(step, arrays)
        reused = [poison(x) for x in arrays]
        assert reused[0].unsafe_buffer_pointer() == address  # so this test can fail
    found = reopen().restore_at(3)
    for i, array in enumerate(found):
        assert np.array_equal(array, np.arange(size, dtype=np.float32) + 3 * i)


def test_an_array_of_the_host_may_be_changed_right_after_a_save(reopen):
    array = np.ones(4_000_000, np.float32)
    checkpoints = reopen()
    checkpoints.save(1, {"x": array})
    array[:] = 2
    assert np.all(reopen().restore_at(1)["x"] == 1)


def test_saving_a_step_twice_is_harmless(reopen):
    checkpoints = reopen()
    checkpoints.save(1, tree(1), score=0.5)
    checkpoints.save(1, tree(2))
    checkpoints = reopen()
    checkpoints.save(1, tree(3))
    checkpoints.wait()
    assert checkpoints.steps() == [1] and checkpoints.best() == (1, 0.5)
    assert digest(checkpoints.restore_at(1)) == digest(tree(1))


@pytest.mark.parametrize("noticed_by", ["wait", "save"])
def test_a_failed_write_is_one_sentence_that_names_what_is_kept(reopen, monkeypatch, noticed_by):
    checkpoints = reopen()
    checkpoints.save(1, tree(1))
    checkpoints.wait()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(ocp.StandardCheckpointHandler, "finalize", fail)
        checkpoints.save(2, tree(2))
        with pytest.raises(OSError) as error:
            checkpoints.wait() if noticed_by == "wait" else checkpoints.save(3, tree(3))
    sentence = str(error.value)
    assert "no space left on the device" in sentence and "that of step 1 is kept" in sentence
    assert "\n" not in sentence and sentence.endswith(".")
    assert reopen().restore(tree())[0] == 1


def test_a_failed_first_write_says_that_there_is_none_before_it(reopen, tmp_path):
    checkpoints, before = reopen(), set(threading.enumerate())
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match=r"could not be written .*there is none before it") as error:
        checkpoints.save(1, tree())
        checkpoints.wait()
    assert "\n" not in str(error.value)
    left = set(threading.enumerate()) - before
    left = [thread.name for thread in left if not thread.daemon]  # what holds the process
    assert all(name.startswith("asyncio_") for name in left)  # these are idle, and end with it
    (tmp_path / "checkpoints").unlink()


def test_a_damaged_newest_checkpoint_gives_way_with_one_line(reopen, tmp_path, capsys):
    checkpoints = reopen()
    for step in (1, 2):
        checkpoints.save(step, tree(step), score=step / 10)
    reopen()
    [arrays] = (tmp_path / "checkpoints" / "2" / "state" / "d").iterdir()
    arrays.write_bytes(arrays.read_bytes()[:-1])
    checkpoints = reopen()
    step, found = checkpoints.restore(tree())
    assert step == 1 and digest(found) == digest(tree(1))
    [line] = capsys.readouterr().err.splitlines()
    assert "the checkpoint of step 2 is damaged" in line and "that of step 1 is used." in line
    assert checkpoints.best() == (1, 0.1)
    checkpoints.save(2, tree(3), score=0.3)
    assert digest(reopen().restore_at(2)) == digest(tree(3))


@pytest.mark.parametrize("item", ["state", "metrics"])
def test_readable_values_other_than_the_saved_ones_are_damage(reopen, tmp_path, capsys, item):
    checkpoints = reopen()
    for step in (1, 2):
        checkpoints.save(step, tree(step), score=step / 10)
    reopen()
    shutil.rmtree(tmp_path / "checkpoints" / "2" / item)
    shutil.copytree(*(tmp_path / "checkpoints" / step / item for step in "12"))
    step, found = reopen().restore(tree())
    assert step == 1 and digest(found) == digest(tree(1))
    assert "step 2 is damaged (it is not what was saved)" in capsys.readouterr().err


def test_a_damaged_best_checkpoint_is_one_sentence(reopen, tmp_path):
    checkpoints = reopen()
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), score=1 / step)
    checkpoints = reopen()
    [arrays] = (tmp_path / "checkpoints" / "1" / "state" / "d").iterdir()
    arrays.write_bytes(b"")
    assert checkpoints.best() == (1, 1.0)
    with pytest.raises(ValueError, match="the checkpoint of step 1 is damaged") as error:
        checkpoints.restore_at(1, tree())
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_a_checkpoint_of_other_shapes_is_not_taken(reopen):
    reopen().save(1, {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"\['x'\] has the shape \(3,\), not \(4,\)\."):
        reopen().restore({"x": jnp.zeros(4)})
    assert reopen().steps() == [1]


def test_a_digest_is_of_values_types_shapes_and_names():
    base = {"x": np.arange(6.0)}
    others = [
        {"x": np.arange(6.0) + 1e-9},
        {"x": np.arange(6.0, dtype=np.float32)},
        {"x": np.arange(6.0).reshape(2, 3)},
        {"y": np.arange(6.0)},
    ]
    digests = [digest(value) for value in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert digest({"x": jnp.arange(6.0)}) == digest({"x": np.arange(6.0, dtype=np.float32)})
    assert all(len(value) == 64 for value in digests)


def test_of_a_stream_the_rows_count_and_nothing_is_read():
    class Records:
        def __getitem__(self, row):
            raise AssertionError

    found = [digest({"train": data.Stream(Records(), np.arange(n))}) for n in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
