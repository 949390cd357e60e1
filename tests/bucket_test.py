"""A workdir in a bucket, gs://BUCKET/FOLDER, against a stand-in that gcsfs and tensorstore ask."""

import gc
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from bucket import served
from hosts_test import ended, several
from own_process import environment

from abkd_jax import files, load, train_and_evaluate
from abkd_jax.config import resolve
from abkd_jax.run.log.writer import Writer, read
from abkd_jax.run.responses import opened
from abkd_jax.run.workdir import locked
from abkd_jax.sweep import sweep
from abkd_jax.train.checkpoint import FOLDER, Checkpoints

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None,  # imported under the stand-in's environment
    reason="gcsfs reads buckets: pip install -e '.[gcs]'",
)
_ROOT = pathlib.Path(__file__).parents[1]
_TASK = dict(fn="cross_entropy", weight=1.0)
_NETWORK = dict(
    model=dict(fn="mlp", widths=(8,)),
    optimizer=dict(fn="sgd", learning_rate=0.1),
    terms=dict(task=_TASK),
)
_CONFIG = dict(
    data=dict(fn="digits", validation=100),
    first=_NETWORK,
    student=_NETWORK,
    phases=dict(
        first=dict(learn=("first",)),
        then=dict(learn=("student",), see=("first",)),
    ),
    batch_size=16,
    num_steps=6,
    checkpoint_every=2,
    log_every=2,
    devices=1,
)


@pytest.fixture(scope="module")
def bucket():
    """The stand-in, for this process and those that it starts."""
    with served() as (server, found), pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def pair(bucket, tmp_path_factory):
    """The workdirs of one run, in the bucket and in a folder, and their results."""
    there, here = "gs://bucket/run", tmp_path_factory.mktemp("run")
    return there, here, train_and_evaluate(_CONFIG, there), train_and_evaluate(_CONFIG, here)


def test_a_run_in_a_bucket_is_that_in_a_folder(bucket, pair):
    there, here, found, expected = pair
    assert found["networks"] == expected["networks"]
    names = {name for name in bucket.objects if name.startswith("run/")}
    own = {f"run/{path.relative_to(here)}" for path in here.rglob("*") if path.is_file()}
    plain = lambda names: {x for x in names if "tfevents" not in x and "checkpoints" not in x}  # noqa: E731
    assert plain(names) == plain(own)
    assert len([x for x in names if "tfevents" in x]) == len([x for x in own if "tfevents" in x])
    timeless = lambda rows: [{k: x for k, x in r.items() if k[:5] != "time/"} for r in rows]  # noqa: E731
    for part in ("", "first"):
        rows = read(files.path_of(there) / part), read(here / part)
        assert timeless(rows[0]) == timeless(rows[1]) != []
    text = bucket.objects["run/report.md"][0].decode()
    assert "learning_curves.png" in text and "run/figures/learning_curves.png" in names


def test_what_a_bucket_has_is_loaded_and_teaches(pair, tmp_path):
    there, here, *_ = pair
    for name, folder in (("student", ""), ("first", "/first")):
        own = load(f"{there}{folder}", name), load(f"{here}{folder}", name)
        jax.tree.map(np.testing.assert_array_equal, *(network.variables for network in own))
    for model in (there, f"{there}@student"):
        variables = opened(model)[1]
        jax.tree.map(np.testing.assert_array_equal, variables, load(here, "student").variables)
    weights = dict(weights=dict(fn="run", workdir=f"{there}/first"))
    config = _CONFIG | dict(
        first=dict(model=_NETWORK["model"]) | weights,
        phases=dict(then=dict(learn=("student",), see=("first",))),
    )
    assert resolve(config).networks["first"].weights().origin == f"{there}/first"


def test_a_run_that_is_done_says_so_and_a_longer_one_goes_on(pair, tmp_path, capsys):
    there, here, *_ = pair
    train_and_evaluate(_CONFIG, there)
    assert "gs://bucket/run: this run is done" in capsys.readouterr().err
    longer = _CONFIG | {"num_steps": 8}
    with pytest.raises(ValueError, match="num_steps"):
        train_and_evaluate(_CONFIG | {"num_steps": 4}, there)
    found, expected = (train_and_evaluate(longer, workdir) for workdir in (there, here))
    assert found["networks"] == expected["networks"]


def test_a_damaged_checkpoint_is_set_aside(bucket, capsys):
    folder = files.path_of("gs://bucket/damaged") / FOLDER
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": np.full(1000, float(step))}, score=0.5)
        checkpoints.wait()
    large = [x for x in bucket.objects if x.startswith("damaged/checkpoints/2/state/d/")]
    for name in large:
        bucket.put(name, bytes(len(bucket.objects[name][0])))
    with Checkpoints(folder) as checkpoints:
        step, tree = checkpoints.restore()
        assert step == 1 and checkpoints.steps() == [1]
    np.testing.assert_array_equal(tree["w"], np.ones(1000))
    assert "it was moved to gs://bucket/damaged/checkpoints_damaged/2" in capsys.readouterr().err
    assert {x.replace("checkpoints/2", "checkpoints_damaged/2") for x in large} <= {*bucket.objects}
    assert not [x for x in bucket.objects if x.startswith("damaged/checkpoints/2/")]


def test_a_sweep_in_a_bucket_is_that_in_a_folder(bucket, tmp_path):
    over = {"student.optimizer.learning_rate": [0.1, 0.3]}
    config = _CONFIG | dict(init_seeds=2)
    found, expected = (sweep(config, x, over=over) for x in ("gs://bucket/sweep", tmp_path))
    assert found == expected
    assert bucket.objects["sweep/sweep.csv"][0] == (tmp_path / "sweep.csv").read_bytes()
    own = load("gs://bucket/sweep", member=3), load(tmp_path, member=3)
    jax.tree.map(np.testing.assert_array_equal, *(network.variables for network in own))


def test_rows_reach_the_bucket_at_each_sync_as_a_whole(bucket):
    folder = files.path_of("gs://bucket/rows")
    with Writer(folder, -1) as writer:
        for step in range(3):
            writer.write(step, {"loss": step / 4})
        assert read(folder) == []
        writer.sync()
        assert [row["loss"] for row in read(folder)] == [0.0, 0.25, 0.5]
        writer.write(3, {"loss": 1.0})
    assert [row["step"] for row in read(folder)] == [0, 1, 2, 3]
    with Writer(folder, 1) as writer:
        assert [row["step"] for row in read(folder)] == [0, 1]
        writer.write(2, {"loss": 2.0})
    assert [row["step"] for row in read(folder)] == [0, 1, 2]
    events = [bucket.objects[x][0] for x in bucket.objects if x.startswith("rows/tensorboard/")]
    assert len(events) == 2 and len(events[0]) > len(events[1]) > 0


def test_rows_are_kept_where_they_cannot_be_read_again(bucket, monkeypatch):
    folder = files.path_of("gs://bucket/kept")
    with Writer(folder, -1) as writer:
        writer.write(0, {"loss": 1.0})
    kept = bucket.objects["kept/metrics.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "unreadable", True)
        with pytest.raises(OSError, match=r"kept/metrics\.jsonl cannot be read \(Forbidden"):
            files.appended(folder / "metrics.jsonl")
    gc.collect()
    assert bucket.objects["kept/metrics.jsonl"] == kept


def test_events_that_a_bucket_does_not_take_are_a_warning_and_what_ends_a_run_stays(
    bucket, monkeypatch
):
    folder = files.path_of("gs://bucket/refusing")
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning) as warned,
        pytest.raises(SystemExit, match="143"),
        Writer(folder, -1) as writer,
    ):
        writer.write(0, {"loss": 1.0})
        patch.setattr(bucket, "refusing", True)
        writer._events.flush()
        raise SystemExit(143)
    told = [f"{warning.message}" for warning in warned]
    assert [x for x in told if x.startswith(f"{folder}/tensorboard gets no more events")]
    assert [x for x in told if "metrics.jsonl cannot be written (Forbidden" in x]


def test_what_others_write_meanwhile_is_seen(bucket):
    folder = files.path_of("gs://bucket/others")
    assert not (folder / "it").exists() and [*folder.glob("*")] == []
    bucket.put("others/it", b"1")
    assert (folder / "it").exists() and [x.name for x in folder.glob("*")] == ["it"]
    bucket.put("others/that", b"2")
    assert sorted(x.name for x in folder.glob("*")) == ["it", "that"]
    del bucket.objects["others/it"]
    assert not (folder / "it").exists() and [x.name for x in folder.glob("*")] == ["that"]


def test_what_cannot_be_is_one_sentence(bucket, monkeypatch):
    for path in ("s3://bucket/run", pathlib.Path("gs://bucket/run")):  # which drops a slash
        sentence = r"^workdir must be a folder, or one of gs://, as text; found '(s3://|gs:/)bucket"
        with pytest.raises(ValueError, match=sentence):
            train_and_evaluate(_CONFIG, path)
    for path in ("gs://bucket/out", pathlib.Path("gs://bucket/out")):
        with pytest.raises(ValueError, match=r"^out must be on a disk; found 'gs:/+bucket/out'"):
            files.on_disk(path, "out")
    with pytest.raises(ValueError, match=r"^profile must be False for a workdir in a bucket"):
        train_and_evaluate(_CONFIG, "gs://bucket/profile", profile=True)
    sentence = "^workdir gs://bucket/two is in a bucket, which has no locks; processes that share"
    with pytest.raises(ValueError, match=sentence):
        sweep(_CONFIG, "gs://bucket/two", over={"student.terms.task.weight": [1.0]}, processes=2)
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "unreadable", True)
        sentence = r"^gs://bucket/refused cannot be read \(Forbidden: "
        with pytest.raises(OSError, match=sentence):
            load("gs://bucket/refused")
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "refusing", True)
        sentence = r"^gs://bucket/refused/.lock cannot be written \(Forbidden: "
        with pytest.raises(OSError, match=sentence):
            train_and_evaluate(_CONFIG, "gs://bucket/refused")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^workdir gs://bucket/run needs gcsfs: pip install -e"):
        train_and_evaluate(_CONFIG, "gs://bucket/run")
    assert not [x for x in bucket.objects if x.startswith(("profile", "two", "refused"))]


def test_a_file_of_a_folder_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "it.json"
    files.write(path, b"old")

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            files.write(path, b"new")
    assert path.read_bytes() == b"old"
    files.write(path, b"new")
    assert path.read_bytes() == b"new" and [x.name for x in tmp_path.iterdir()] == ["it.json"]


def test_a_bucket_has_no_lock(bucket):
    with locked(files.path_of("gs://bucket/lock")), locked(files.path_of("gs://bucket/lock")):
        assert "lock/.lock" in bucket.objects


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, 40, 80])
def test_a_run_that_is_killed_at_a_request_goes_on(bucket, pair, tmp_path, count):
    """SIGKILL as the process writes its count-th object; the same command ends as one did."""
    workdir, child, left = f"gs://bucket/killed_{count}", [], [count]
    (tmp_path / "run.py").write_text(f"def get_config():\n    return {_CONFIG!r}\n")
    command = [sys.executable, "-m", "abkd_jax.main", f"--config={tmp_path / 'run.py'}"]
    command += [f"--workdir={workdir}"]

    def hook(method, path):
        left[0] -= method in ("POST", "PUT")
        if not left[0] and child:
            os.kill(child.pop().pid, signal.SIGKILL)

    own = {"cwd": _ROOT, "env": environment(PYTHONPATH=f"{_ROOT}"), "stderr": subprocess.PIPE}
    bucket.hook = hook
    try:
        child.append(started := subprocess.Popen(command, stdout=subprocess.PIPE, **own))
        started.communicate(timeout=300)
    finally:
        bucket.hook = lambda method, path: None
    assert started.returncode == -signal.SIGKILL
    subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=300, **own)
    result = json.loads(bucket.objects[f"killed_{count}/result.json"][0])
    (tmp_path / "alone").mkdir()
    expected = train_and_evaluate(_CONFIG, tmp_path / "alone")["networks"]
    for name, network in expected.items():
        assert result["networks"][name]["sha256"] == network["sha256"]


@pytest.mark.slow
def test_two_processes_share_a_bucket_without_more(bucket, tmp_path):
    logs = [tmp_path / f"log_{i}" for i in range(2)]
    for workdir in ("gs://bucket/several", tmp_path / "several"):
        found = ended(several(workdir, logs, "--config.num_steps=6"), logs)
        assert [status for status, _ in found] == [0, 0], found
    here = json.loads((tmp_path / "several" / "result.json").read_text())
    there = json.loads(bucket.objects["several/result.json"][0])
    assert there["networks"] == here["networks"]
    assert "several/report.md" in bucket.objects
