"""The progress display: what it says, and how seldom."""

import io
import itertools
import re
import threading
import types

import pytest

from abkd_jax.run.log import progress
from abkd_jax.run.log.progress import Progress
from abkd_jax.tasks import Column

ACCURACY = Column("accuracy", "accuracy %", 100, 2)


def display(label="student", total=10, start=0, *, examples_per_step=1, score=ACCURACY):
    return Progress(label, total, start, examples_per_step=examples_per_step, score=score)


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def divert(monkeypatch):
    """Replaces stderr; called in the test, as pytest replaces it between fixtures and test."""

    def replace(terminal=False):
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "80")
        stream = Stream(terminal)
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replace


def run(clock, start, stop, *, seconds=1.0, total=1500, log_every=100, first=60.0):
    """A run whose first step compiles; yields at each log."""
    with display("student", total, start, examples_per_step=128) as shown:
        for step in range(start + 1, stop + 1):
            clock.now += first if step == start + 1 else seconds
            shown.update(step)
            if step % log_every == 0:
                shown.log(step, {"student/loss": 0.12341, "student/distill": 5.0})


def test_a_line_says_all(clock, divert):
    stderr = divert()
    with display("student", 1500, examples_per_step=128) as shown:
        for step in range(1, 301):
            clock.now += 90.0 if step == 1 else 0.01
            shown.update(step)
            if step == 300:
                shown.log(step, {"validation/student/accuracy": 0.9612, "student/loss": 0.123412})
                expected = (
                    "student step 300/1500, 12,800 examples/s, ETA 0:00:12, "
                    "validation accuracy 96.1 %, loss 0.1234\n"
                )
                assert stderr.getvalue() == expected
    assert stderr.getvalue() == expected  # the last line had been said


@pytest.mark.parametrize(
    "waited,mfu,expected", [(0.123, 0.456, ", waiting for data 12 %, MFU 46 %"), (0.004, None, "")]
)
def test_a_line_says_what_the_speed_is_limited_by(clock, divert, waited, mfu, expected):
    stderr = divert()
    row = {"time/waiting_for_data": waited} | ({} if mfu is None else {"time/mfu": mfu})
    with display("student", 20) as shown:
        for step in (1, 2):
            clock.now += 1.0
            shown.update(step)
        shown.log(2, row)
    assert stderr.getvalue() == f"student step 2/20, 1 examples/s, ETA 0:00:18{expected}\n"


def test_steps_before_a_resume_and_compilation_are_not_in_the_rate(clock, divert):
    stderr = divert()
    run(clock, 1000, 1100, seconds=2.0)
    assert "student step 1100/1500, 64 examples/s, ETA 0:13:20, loss 0.1234\n" == stderr.getvalue()


def test_an_evaluation_before_the_first_step_is_not_in_the_rate(clock, divert):
    stderr = divert()
    with display(total=300, examples_per_step=8) as shown:
        shown.log(0, {"validation/student/accuracy": 0.1})
        clock.now += 90.0
        for step in range(1, 102):
            shown.update(step)
            clock.now += 0.1
    assert stderr.getvalue().splitlines()[-1].startswith("student step 101/300, 80 examples/s, ")


def test_before_the_second_step_no_rate_is_claimed(clock, divert):
    stderr = divert()
    with display("student", 10, examples_per_step=1) as shown:
        clock.now += 1
        shown.update(1)
        shown.log(1, {"student/loss": 2.0})
    assert stderr.getvalue() == "student step 1/10, loss 2\n"


def test_lines_are_ten_seconds_apart_and_the_last_step_has_one(clock, divert):
    stderr = divert()
    run(clock, 0, 1499, seconds=0.03)
    lines = stderr.getvalue().splitlines()
    # A log comes every 3 s: each fourth of them is shown.
    steps = [int(line.split()[2].split("/")[0]) for line in lines]
    assert steps == [100, 500, 900, 1300, 1499]


def test_nothing_done_is_nothing_said(clock, divert):
    stderr = divert()
    with display("student", 5, 5, examples_per_step=1):
        pass
    assert stderr.getvalue() == ""


def test_the_networks_of_an_online_run_are_told_apart(clock, divert):
    stderr = divert()
    with display("online", 10, examples_per_step=1) as shown:
        shown.update(1)
        shown.log(1, {"a/loss": 1.0, "a/task": 3.0, "b/loss": float("nan"), "test/b/accuracy": 0.5})
    assert stderr.getvalue() == ("online step 1/10, a loss 1, b loss nan, b test accuracy 50.0 %\n")


def test_a_label_shows_its_own_numbers_alone(clock, divert):
    stderr = divert()
    with display("student", 10, examples_per_step=1) as shown:
        shown.update(1, learning_rate=0.25)
        shown.log(1, {"student/loss": 1.0, "teacher/loss": 2.0})
    assert stderr.getvalue() == "student step 1/10, learning rate 0.25, loss 1\n"


def test_a_log_of_continuous_integration_has_no_control_codes(clock, divert, monkeypatch):
    stderr = divert()
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(clock, 0, 200)
    assert "\x1b" not in stderr.getvalue() and "step 200/1500" in stderr.getvalue()


def test_a_terminal_shows_a_bar(clock, divert):
    stderr = divert(terminal=True)
    with display("student", 1500, examples_per_step=128) as shown:
        for step in range(1, 302):
            clock.now += 90.0 if step == 1 else 0.01
            shown.update(step)
            if step == 300:
                shown.log(step, {"student/loss": 0.12341, "validation/student/accuracy": 0.9612})
    text = stderr.getvalue()
    assert "student" in text and "━" in text and "301/1500 0:01:33" in text
    assert "12,800 examples/s, ETA 0:00:12, loss 0.1234, validation accuracy 96.1 %" in text
    assert "step 300" not in text  # no plain line


def test_a_bar_is_redrawn_twice_a_second_and_at_the_end(clock, divert):
    stderr = divert(terminal=True)
    run(clock, 0, 1000, seconds=0.01, first=0.0)
    shown = re.findall(r"(\d+)/1500", stderr.getvalue())
    drawn = list(dict.fromkeys(map(int, shown)))  # the last of them is shown twice
    # 9.99 s after the drawing on entering, and one on leaving.
    assert len(drawn) == 21
    assert drawn[0] == 0 and drawn[-1] == 1000
    assert all(b - a >= 50 for a, b in itertools.pairwise(drawn[:-1]))


def test_a_dumb_terminal_gets_lines(clock, divert, monkeypatch):
    stderr = divert(terminal=True)
    monkeypatch.setenv("TERM", "dumb")
    run(clock, 0, 100)
    assert stderr.getvalue().startswith("student step 100/1500")


def test_no_thread_redraws(clock, divert):
    divert(terminal=True)
    before = threading.active_count()
    with display("student", 10, examples_per_step=1) as shown:
        shown.update(1)
        assert threading.active_count() == before


@pytest.mark.parametrize("terminal", [True, False])
def test_an_update_between_two_drawings_says_nothing(clock, divert, terminal):
    stderr = divert(terminal)
    with display(total=10**6) as shown:
        clock.now += 0.6
        shown.update(1)
        said = stderr.getvalue()
        for step in range(2, 1000):
            shown.update(step)
        assert stderr.getvalue() == said


def test_the_score_is_that_of_the_task(clock, divert):
    """In per cent where its column is; other metrics of a row are not shown."""
    stderr = divert()
    for column, text in (
        (ACCURACY, "accuracy 50.0 %"),
        (Column("nll", "NLL"), "nll 0.25"),
    ):
        with display(score=column) as shown:
            shown.update(1)
            shown.log(1, {"test/student/accuracy": 0.5, "test/student/nll": 0.25})
        assert stderr.getvalue().splitlines()[-1] == f"student step 1/10, test {text}"
