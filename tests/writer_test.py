"""The metrics writer: what is in the file, after any interruption, and with a full disk."""

import json
import os
import pathlib
import re
import resource
import struct
import tempfile
import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from abkd_jax.run.log import events as tensorboard
from abkd_jax.run.log.writer import Writer, cut, read


def events(directory):
    """The events of all files, in TensorBoard's order."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def scalars(directory):
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events(directory)
        if event.HasField("summary")
    ]


def test_a_row_is_one_line_in_the_given_order(tmp_path):
    with Writer(tmp_path, 0) as rows:
        rows.write(1, {"b/loss": np.float32(0.1), "a/loss": 0.1, "time/seconds": 2})
        # Read while the writer is open: nothing waits in a buffer.
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 1, "b/loss": 0.10000000149011612, "a/loss": 0.1, "time/seconds": 2.0}\n'
        )


@pytest.mark.parametrize("number", [np.float32, np.float16, np.int64, jax.numpy.asarray])
def test_every_kind_of_number_is_a_number(tmp_path, number):
    with Writer(tmp_path, 0) as rows:
        rows.write(3, {"x": number(3)})
    assert read(tmp_path) == [{"step": 3, "x": 3.0}]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_null_and_no_scalar(tmp_path, value):
    with Writer(tmp_path, 0) as rows:
        rows.write(1, {"x": value, "y": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "x": None, "y": 1.0}
    assert scalars(tmp_path) == [(1, {"y": 1.0})]


def test_a_metric_named_step_is_refused(tmp_path):
    with Writer(tmp_path, 0) as rows, pytest.raises(ValueError, match="cannot be named 'step'"):
        rows.write(1, {"step": 2.0})


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_back_exactly(value):
    with tempfile.TemporaryDirectory() as directory:
        with Writer(pathlib.Path(directory), 0) as rows:
            rows.write(1, {"x": value})
        assert read(pathlib.Path(directory)) == [{"step": 1, "x": value}]


def test_reopening_keeps_the_rows_up_to_the_step(tmp_path):
    with Writer(tmp_path / "new", 0) as rows:
        for step in (1, 2, 2, 3):
            rows.write(step, {"loss": step / 2})
    with Writer(tmp_path / "new", 2) as rows:
        rows.write(3, {"loss": 9.0})
    assert [row["step"] for row in read(tmp_path / "new")] == [1, 2, 2, 3]
    assert read(tmp_path / "new")[-1]["loss"] == 9.0
    assert not (tmp_path / "new" / "metrics.jsonl.tmp").exists()


ROWS = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.dictionaries(
            st.text(min_size=1, max_size=4).filter(lambda name: name != "step"),
            st.floats(width=32),
            max_size=3,
        ),
    ),
    max_size=6,
)


@given(written=ROWS, data=st.data())
def test_an_interruption_at_any_byte_loses_no_whole_row(written, data):
    step = data.draw(st.integers(-1, 6), label="step")
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        (directory / "metrics.jsonl").touch()
        sizes = []
        with Writer(directory, 0) as rows:
            for row_step, metrics in written:
                rows.write(row_step, metrics)
                sizes.append((directory / "metrics.jsonl").stat().st_size)
        whole = (directory / "metrics.jsonl").read_bytes()
        at = data.draw(st.integers(0, len(whole)), label="byte")
        (directory / "metrics.jsonl").write_bytes(whole[:at])
        # A row that lacks its newline alone is whole.
        complete = [i for i, size in enumerate(sizes) if size - 1 <= at]
        expected = [whole.split(b"\n")[i] for i in complete if written[i][0] <= step]
        cut(directory, step)
        assert (directory / "metrics.jsonl").read_bytes() == b"".join(x + b"\n" for x in expected)
        assert read(directory) == [json.loads(line) for line in expected]
        with Writer(directory, step) as rows:
            rows.write(step + 1, {"after": 1.0})
        assert read(directory)[len(expected) :] == [{"step": step + 1, "after": 1.0}]


@pytest.mark.parametrize(
    "torn",
    [b'{"step": 2, "x', b"[1]\n", b'{"x": 1}\n', b'{"step": true}\n', b"\0\0\0", b'{"\xff', b" \n"],
)
def test_a_torn_line_is_dropped_at_the_end_alone(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert read(tmp_path) == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n' + torn.rstrip(b"\n") + b'\n{"step": 2}\n')
    for attempt in (read, lambda directory: cut(directory, 5)):
        with pytest.raises(ValueError, match=re.escape(f"{path} line 2 must be a JSON object")):
            attempt(tmp_path)
    assert path.read_bytes().endswith(b'{"step": 2}\n')


def test_a_run_that_begins_anew_keeps_no_row(tmp_path):
    """Not those of step 0, either, which a source that is told of evaluations has."""
    for _ in range(2):
        with Writer(tmp_path, -1) as rows:
            rows.write(0, {"x": 1.0})
    assert read(tmp_path) == [{"step": 0, "x": 1.0}]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 0]


def test_no_file_is_no_rows(tmp_path):
    assert read(tmp_path) == []
    cut(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_an_interrupted_cut_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut(tmp_path, 1)
    assert read(tmp_path) == [{"step": 1}, {"step": 2}]


def test_tensorboard_has_the_scalars_and_hides_those_of_before(tmp_path):
    with Writer(tmp_path, 0) as rows:
        rows.write(4, {"student/loss": 0.5, "time/seconds": 1.0})
        rows.sync()
        assert scalars(tmp_path) == [(4, {"student/loss": 0.5, "time/seconds": 1.0})]
    # In the same second: the second file must not be written over the first.
    with Writer(tmp_path, 2) as rows:
        rows.write(3, {"student/loss": 0.25})
    assert [step for step, _ in scalars(tmp_path)] == [4, 3]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 3]
    assert all(
        event.session_log.status == SessionLog.START
        for event in events(tmp_path)
        if event.HasField("session_log")
    )


def test_sync_reaches_the_disk_and_closing_twice_is_harmless(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    rows = Writer(tmp_path, 0)
    synced.clear()
    rows.write(1, {"x": 1.0})
    rows.sync()
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced
    rows.close()
    rows.close()


def test_no_thread_is_left_behind(tmp_path):
    before = threading.active_count()
    with Writer(tmp_path, 0) as rows:
        rows.write(1, {"x": 1.0})
        assert threading.active_count() == before


def test_a_full_disk_passes_through_and_the_rows_before_it_remain(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = Writer(tmp_path, 0)
    rows.write(1, {"x": 1.0})
    size = os.path.getsize(tmp_path / "metrics.jsonl")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))  # five bytes of the row
        with pytest.raises(OSError):
            rows.write(2, {"x": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rows.close()
    assert os.path.getsize(tmp_path / "metrics.jsonl") == size + 5
    assert read(tmp_path) == [{"step": 1, "x": 1.0}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_tensorboard_without_disk_is_one_warning(tmp_path, monkeypatch):
    class Full(tensorboard.RecordWriter):
        def __init__(self, path):
            super().__init__("/dev/full")

    monkeypatch.setattr(tensorboard, "RecordWriter", Full)
    with pytest.warns(UserWarning, match="tensorboard gets no more events") as caught:
        with Writer(tmp_path, 0) as rows:
            for step in range(100):
                rows.write(step, {"x": 1.0})
            rows.sync()
    assert len(caught) == 1
    assert len(read(tmp_path)) == 100


def test_a_tensorboard_directory_that_cannot_be_is_one_warning(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.warns(UserWarning, match="gets no more events"), Writer(tmp_path, 0) as rows:
        rows.write(1, {"x": 1.0})
    assert read(tmp_path) == [{"step": 1, "x": 1.0}]
