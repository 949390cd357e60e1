"""Runs of two processes: the same numbers as one, one word for all, and one end."""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import hosts_run
import jax
import numpy as np
import pytest
from own_process import environment

from abkd_jax import load, train_and_evaluate
from abkd_jax.run import one_run
from abkd_jax.run.log.writer import read
from abkd_jax.train import hosts
from abkd_jax.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


def free_port():
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def started(*command, log):
    """A process with two devices, as on a host of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    how = environment(PYTHONPATH=path)
    how["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=how, stdout=file, stderr=file
        )


def ended(processes, logs):
    """(exit status, what it said) of each."""
    try:
        statuses = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


# --- one pair of processes, and one process with as many devices ----------------------------------


# Of them continuous integration has two, by one pair of processes.
_FIRST = ("online", "split")
every_run = pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.nightly] * (x not in _FIRST)) for x in hosts_run.RUNS],
)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """By run: the folder of `hosts_run`, what its processes saw, and how they ended."""

    @functools.cache
    def ran(names):
        folder, port = tmp_path_factory.mktemp("pair"), free_port()
        logs = [folder / f"log_{i}" for i in range(2)]
        command = ROOT / "tests" / "hosts_run.py", f"localhost:{port}", 2
        found = ended([started(*command, i, folder, *names, log=logs[i]) for i in range(2)], logs)
        seen = [folder / f"seen_{i}.json" for i in range(2)]
        assert all(path.exists() for path in seen), found
        return folder, [json.loads(path.read_text()) for path in seen], found

    return lambda name: ran(_FIRST if name in _FIRST else (name,))


@pytest.fixture(scope="module")
def pair(pair_of):
    return pair_of("online")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By run: the same by this process, on four devices."""

    @functools.cache
    def ran(name):
        folder = tmp_path_factory.mktemp("alone") / name
        train_and_evaluate(hosts_run.RUNS[name](devices=4), folder)
        return folder

    return ran


def carry(folder, step=None):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.restore()[1] if step is None else checkpoints.restore_at(step)


def assert_close(there, here):
    """Within 1e-5 of each array's largest entry."""
    assert jax.tree.structure(there) == jax.tree.structure(here)
    for (path, a), b in zip(jax.tree.leaves_with_path(there), jax.tree.leaves(here), strict=True):
        if np.issubdtype(a.dtype, np.floating):
            most = 1e-5 * max(np.max(np.abs(b), initial=0.0), 1e-6)
            np.testing.assert_allclose(a, b, rtol=0, atol=most, err_msg=f"{path}")
        else:
            np.testing.assert_array_equal(a, b, err_msg=f"{path}")


@pytest.mark.slow
@every_run
def test_two_processes_train_as_one_on_as_many_devices(pair_of, alone, name):
    folder, *_ = pair_of(name)
    assert_close(carry(folder / name)["learners"], carry(alone(name))["learners"])


@pytest.mark.slow
@every_run
def test_two_processes_evaluate_as_one(pair_of, alone, name):
    both = pair_of(name)[0] / name, alone(name)
    found, expected = (json.loads((x / "result.json").read_text()) for x in both)
    for network, there in expected["networks"].items():
        scores = found["networks"][network]["last"]
        assert jax.tree.structure(scores) == jax.tree.structure(there["last"])
        for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(there["last"]), strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    logged, rows = map(read, both)
    assert [row["step"] for row in logged] == [row["step"] for row in rows]
    for row, there in zip(logged, rows, strict=True):
        timed = {key for key in there if key.startswith("time/")}
        assert row.keys() == there.keys()
        numbers = {key: x for key, x in there.items() if key not in timed}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    examples = [np.load(x / "examples.npz") for x in both]
    np.testing.assert_array_equal(*[x["positions"] for x in examples])
    assert (both[0] / "report.md").exists()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_once_and_the_rest_is_repeated_bitwise(pair):
    folder, seen, found = pair
    assert seen[0]["again"] == seen[1]["again"] == seen[0]["sha256"]["online"]
    assert (folder / "online" / "checkpoints_damaged" / f"{hosts_run.STEPS}").is_dir()
    told = [log.count(f"the checkpoint of step {hosts_run.STEPS} is damaged") for _, log in found]
    assert told == [1, 0]


@pytest.mark.slow
def test_what_two_processes_saved_goes_on_in_one(pair, alone, tmp_path):
    shutil.copytree(pair[0] / "copy", tmp_path / "run")
    longer = hosts_run.STEPS + 3
    train_and_evaluate(hosts_run.online(num_steps=longer), tmp_path / "run")  # eight devices
    shutil.copytree(alone("online"), tmp_path / "alone")
    train_and_evaluate(hosts_run.online(num_steps=longer, devices=4), tmp_path / "alone")
    assert_close(carry(tmp_path / "run")["learners"], carry(tmp_path / "alone")["learners"])


@pytest.mark.slow
def test_a_network_that_two_processes_split_is_loaded_whole(pair, alone):
    found, expected = (load(x).variables for x in (pair[0] / "split", alone("split")))
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))


@pytest.mark.slow
def test_what_the_processes_say_to_each_other(pair):
    _, seen, _ = pair
    for own, found in enumerate(seen):
        assert found["all"] == ["returned", own]
        assert found["one"] == ["Refused", "process 1 of 2: no 1."]
        assert found["each"] == ["Refused", "no 2."]
        assert found["system"] == ["Failed", "process 0 of 2: the disk is full."]
        assert found["nested"] == ["Refused", "process 1 of 2: no 1."]
        assert found["first"] == ["returned", 7]
        assert found["first refuses"] == ["Refused", "process 0 of 2: no 1."]
        assert found["agreed"] == ["returned", 3]
        assert found["equal"] == found["shared"] == ["returned", None]
        same = "all processes of a run must have the same config, versions and data: "
        told = "config.y is 0 on process 0 and 1 on process 1."
        assert found["unequal"] == ["Refused", same + told]
        told = "config.batch_size is 64 on process 0 and 128 on process 1."
        assert found["config"] == ["Refused", same + told]
        told = "the workdir is gs://bucket/of_0 on process 0 and gs://bucket/of_1 on process 1."
        assert found["buckets"] == ["Refused", same + told]
        told = "the workdir is a folder on process 0 and gs://bucket/run on process 1."
        assert found["kinds"] == ["Refused", same + told]
        told = "the version of jax is 0.10.0 on process 0 and 0.10.1 on process 1."
        assert found["version"] == ["Refused", same + told]
        kind, sentence = found["data"]
        sha = "[0-9a-f]{12}"
        told = rf"data.train \(its SHA-256\) is {sha} on process 0 and {sha} on process 1\."
        assert kind == "Refused" and re.fullmatch(same + told, sentence), sentence
        kind, sentence = found["not shared"]
        assert kind == "Refused"
        assert re.fullmatch(
            r"process 1 of 2: workdir \S+/of_1 is not the folder that process 0 has .*", sentence
        )
        assert found["rows"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
        assert found["sum"] == 28
    assert seen[0]["wishes"] == seen[1]["wishes"]
    assert [wish for wish in seen[0]["wishes"] if wish] == [signal.SIGTERM]


@pytest.mark.slow
def test_what_one_process_fails_with_ends_all(pair):
    (first, of_first), (second, of_second) = pair[2]
    sentence = "the data of process 1 are gone."
    assert first == second == 1
    assert of_first.splitlines()[-1] == f"process 1 of 2: {sentence}"
    assert of_second.splitlines()[-1] == sentence
    assert "Traceback" not in of_first + of_second


# --- the command line -----------------------------------------------------------------------------

DIGITS = ("-m", "abkd_jax.main", "--config=configs/digits.py:runlocal", "--config.log_every=2")


def several(workdir, logs, *flags):
    """Both processes of a run, begun."""
    place = f"--coordinator=localhost:{free_port()}", "--num_processes=2"
    command = *DIGITS, *flags, *place, f"--workdir={workdir}"
    return [started(*command, f"--process_id={i}", log=log) for i, log in enumerate(logs)]


def reached(workdir, step, processes, phase="teacher"):
    """Returns when a phase of a run has made some steps."""
    waiting = threading.Event()
    while not any(row["step"] >= step for row in read(workdir / phase)):
        assert all(process.poll() is None for process in processes)
        waiting.wait(0.1)


@pytest.mark.slow
def test_a_signal_to_one_saves_both_at_the_same_step(tmp_path):
    logs = [tmp_path / f"log_{i}" for i in range(2)]
    flags = "--config.num_steps=400", "--config.checkpoint_every=400"
    both = several(tmp_path / "run", logs, *flags)
    reached(tmp_path / "run", 10, both)
    both[1].send_signal(signal.SIGTERM)
    found = ended(both, logs)
    stopped = [re.search(r"teacher: SIGTERM at step (\d+) of 400", log) for _, log in found]
    assert [status for status, _ in found] == [143, 143], found
    assert stopped[0][1] == stopped[1][1]
    with Checkpoints(tmp_path / "run" / "teacher" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [int(stopped[0][1])]


@pytest.mark.slow
def test_where_one_is_killed_the_other_ends_with_a_sentence(tmp_path):
    logs = [tmp_path / f"log_{i}" for i in range(2)]
    both = several(tmp_path / "run", logs, "--config.num_steps=100000")
    reached(tmp_path / "run", 4, both)
    both[0].kill()  # with the coordinator; the child ends with its parent
    (first, _), (second, log) = ended(both, logs)
    assert first == -signal.SIGKILL and second not in (0, -signal.SIGKILL)
    assert log.splitlines()[-1].endswith("The same commands go on from what is saved.")


@pytest.mark.nightly
def test_both_killed_again_and_again_end_as_if_they_had_not_been(tmp_path):
    logs, runs = [tmp_path / f"log_{i}" for i in range(2)], [tmp_path / x for x in ("run", "whole")]
    drawn, flags = random.Random(0), ("--config.num_steps=80",)
    for phase in ("teacher", "baseline", "."):
        both = several(runs[0], logs, *flags)
        reached(runs[0], drawn.randrange(1, 40), both, phase)
        threading.Event().wait(drawn.random() / 2)
        for process in both:
            process.kill()
            process.wait()
    for run in runs:
        found = ended(several(run, logs, *flags), logs)
        assert [status for status, _ in found] == [0, 0], found
    results = [json.loads((run / "result.json").read_text())["networks"] for run in runs]
    shas = [{name: network["sha256"] for name, network in result.items()} for result in results]
    assert shas[0] == shas[1]


@pytest.mark.nightly
def test_both_write_a_teachers_cache_as_one_does(tmp_path):
    config = hosts_run.decoder()
    with config.unlocked():
        del config.phases["distill"], config["student"]
    train_and_evaluate(config, tmp_path / "run")
    argument = f"runlocal,teacher='{tmp_path / 'run'}'"
    command = "-m", "abkd_jax.cache_teacher", f"--config=configs/text.py:{argument}"
    command += "--k=4", "--shard_rows=4096"
    logs = [tmp_path / f"log_{i}" for i in range(2)]
    (alone,) = ended([started(*command, f"--out={tmp_path / 'one'}", log=logs[0])], logs[:1])
    command += f"--out={tmp_path / 'two'}", "--num_processes=2"
    command += (f"--coordinator=localhost:{free_port()}",)
    both = [started(*command, f"--process_id={i}", log=logs[i]) for i in range(2)]
    found = ended(both, logs)
    assert [status for status, _ in (alone, *found)] == [0, 0, 0], (alone, found)
    assert all("shard " in log for _, log in found)
    written = [
        {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert written[0] == written[1] and len(written[0]) > 3


def refused(tmp_path, *flags):
    log = tmp_path / "log"
    process = started(*DIGITS, f"--workdir={tmp_path / 'run'}", *flags, log=log)
    ((status, said),) = ended([process], [log])
    assert status not in (0, -signal.SIGKILL)
    return said.splitlines()[-1]


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"
        assert refused(tmp_path, *place) == (
            f"--coordinator: port {port} cannot be opened (Address already in use); choose "
            "another, the same for all processes."
        )


@pytest.mark.slow
def test_a_coordinator_that_never_answers(tmp_path):
    port = free_port()
    place = f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=1"
    said = refused(tmp_path, *place, "--coordinator_timeout=2")
    assert said.startswith(
        f"the processes did not find each other at localhost:{port} within "
        "--coordinator_timeout=2 s ("
    )


# --- without another process ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (dict(num_processes=2), "--num_processes needs --coordinator=HOST:PORT, of process 0."),
        (dict(process_id=0), "--process_id needs --coordinator=HOST:PORT, of process 0."),
        (
            dict(coordinator="here", num_processes=2, process_id=0),
            "--coordinator must be HOST:PORT of process 0, such as 10.0.0.1:1234; found 'here'.",
        ),
        (
            dict(coordinator="here:1", process_id=0),
            "--num_processes must be at least 1; found 0.",
        ),
        (
            dict(coordinator="here:1", num_processes=2, process_id=2),
            "--process_id must be between 0 and 1, one less than --num_processes; found 2.",
        ),
        (
            dict(coordinator="here:1", num_processes=2, process_id=1, coordinator_timeout=0),
            "--coordinator_timeout must be at least 1; found 0.",
        ),
    ],
)
def test_flags_that_do_not_fit(place, message):
    with pytest.raises(ValueError) as refused:
        hosts.start(hosts.Place(**place))
    assert f"{refused.value}" == message


def test_one_process_agrees_with_itself(tmp_path):
    assert hosts.is_first()
    assert hosts.everyone(lambda: 3) == hosts.by_first(lambda: 3) == hosts.agree(3) == 3
    hosts.equal({"config.x": object()})
    hosts.check_shared(tmp_path / "none")
    hosts.barrier()
    assert hosts.Wishes(None).agreed(signal.SIGINT) is signal.SIGINT
    with pytest.raises(OSError, match="full"), hosts.together():
        raise OSError("full")


@pytest.mark.parametrize(
    ("flag", "several"),
    [
        ("--coordinator=here:1", True),
        ("--distributed", True),
        ("-distributed=true", True),
        ("--nodistributed", False),
        ("--coordinator_timeout=3", False),
        ("--config.distributed=1", False),
    ],
)
def test_a_process_of_several_is_known_by_its_flags(flag, several):
    assert one_run.is_several(["main", flag, "--workdir=w"]) == several


@pytest.mark.parametrize("status", [0, 3, 143])
def test_a_child_ends_its_parent_with_its_status(capfd, status):
    assert one_run.watched([sys.executable, "-c", f"raise SystemExit({status})"]) == status
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SIGABRT", "another process ended, or cannot be reached"),
        ("SIGKILL", "it was ended from outside, maybe for it took too much memory"),
    ],
)
def test_a_child_that_a_signal_ends_is_told_of(capfd, name, reason):
    number = signal.Signals[name]
    script = f"import os; os.kill(os.getpid(), {number:d})"
    assert one_run.watched([sys.executable, "-c", script]) == 128 + number
    assert capfd.readouterr().err == (
        f"this process ended by {name}: {reason}; the other processes end, too. The same commands "
        "go on from what is saved.\n"
    )
