"""What a run says of its speed: the share that waited for data, rows a device, and MFU."""

import types

import numpy as np
import pytest

from abkd_jax import costs, data, train_and_evaluate
from abkd_jax.run import pace
from abkd_jax.run.log.writer import read
from abkd_jax.run.pace import Pace

SIZE, DIM, WIDTH, K, STEPS = 16, 6, 5, 3, 4


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def slow_feed(clock, *, lengths):
    """A feed that takes a second a step, of rows that are cut to lengths."""

    def feed(step, most):
        clock.now += most
        return types.SimpleNamespace(length=lengths[step]), step + most

    return feed


def test_what_steps_did_since_the_last_time(clock):
    lengths, counted = {0: 8, 3: 16, 4: 8}, []

    def flops(examples):
        counted.append(examples.length)
        return 100.0 * examples.length

    paced = Pace(slow_feed(clock, lengths=lengths), rows=lambda x: 2 * x.length, flops=flops)
    for step, most in ((0, 3), (3, 1)):
        examples, until = paced(step, most)
        assert (examples.length, until) == (lengths[step], step + most)
        clock.now += 50.0  # of the step itself
    assert paced.since(4) == (4.0, 2 * (3 * 8 + 16), 100.0 * (3 * 8 + 16))
    paced(4, 2)
    assert paced.since(5) == (2.0, 16, 800.0) and paced.since(6) == (0.0, 16, 800.0)
    assert counted == [8, 16]


def test_operations_that_nobody_counts(clock):
    paced = Pace(slow_feed(clock, lengths={0: None}), rows=lambda x: 3)
    paced(0)
    assert paced.since(2) == (1.0, 6, None)


def rows(workdir, **changes):
    """Those of training, and their run on vectors of three classes."""
    rng = np.random.default_rng(0)
    split = rng.normal(size=(64, DIM)).astype(np.float32), np.arange(64) % K
    own = data.from_arrays(train=split, validation=None, test=split, num_classes=K)
    model = dict(fn="mlp", widths=(WIDTH,))
    student = dict(model=model, terms=dict(task=dict(fn="cross_entropy", weight=1.0)))
    student |= dict(optimizer=dict(fn="sgd", learning_rate=0.1))
    config = dict(student=student, phases=dict(train=dict(learn=("student",), num_steps=STEPS)))
    config |= dict(batch_size=SIZE, log_every=2, checkpoint_every=STEPS, devices=1) | changes
    train_and_evaluate(config, workdir, data=own)
    return [row for row in read(workdir) if "student/loss" in row]


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 4])
def test_mfu_is_of_the_peak_of_all_devices(tmp_path, monkeypatch, devices):
    monkeypatch.setattr(costs, "peak", lambda kind: 1e9)
    first, second = 2 * DIM * WIDTH, 2 * WIDTH * K  # of an example, in each layer
    flops = 2 * SIZE * (2 * first + 3 * second)  # of two steps; no gradient of the inputs
    found = rows(tmp_path, devices=devices)
    assert len(found) == 2
    for row in found:
        expected = flops / row["time/seconds"] / (1e9 * devices)
        assert row["time/mfu"] == pytest.approx(expected)
        each = row["time/examples_per_second"] / devices
        assert row["time/examples_per_second_per_device"] == pytest.approx(each)
    report = (tmp_path / "report.md").read_text()
    assert "MFU" in report


@pytest.mark.long
def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    (first, *_) = rows(tmp_path, log_every=4)
    assert "time/mfu" not in first and 0 < first["time/waiting_for_data"] < 1
    assert "MFU" not in (tmp_path / "report.md").read_text()


@pytest.mark.long
def test_the_rate_is_of_all_steps_since_the_row_before(tmp_path):
    """Also where an evaluation had a row in between, whose own time is none of theirs."""
    found = rows(tmp_path, log_every=4, checkpoint_every=3)
    written = [row for row in read(tmp_path) if "time/seconds" in row]
    assert [row["step"] for row in written] == [3, 4, 4]
    seconds = 4 * SIZE / found[0]["time/examples_per_second"]
    assert written[1]["time/seconds"] < seconds < sum(row["time/seconds"] for row in written[:2])
