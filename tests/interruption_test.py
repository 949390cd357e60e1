"""Signals: the first is noted, the second acts, and afterwards all is as before."""

import ctypes
import io
import os
import signal
import sys
import threading

import pytest

from abkd_jax.config import resolve
from abkd_jax.run import phases
from abkd_jax.run.interruption import Interruption

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def received():
    """The signals that a handler of the caller got."""
    found = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: found.append(number))
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts_as_before(received, number):
    with Interruption() as interruption:
        assert interruption.requested is None
        send(number)
        assert interruption.requested == number and not received
        send(number)
        assert received == [number]


def test_a_signal_that_two_send_is_noted_once(received):
    with Interruption(repeats=3600.0) as interruption:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert interruption.requested == signal.SIGTERM and not received
    with Interruption(repeats=1e-9):  # over when the second comes
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert received == [signal.SIGTERM]


def test_the_second_interrupt_from_the_keyboard_stops_the_program():
    # Python's own handler, which a process in the background of a shell does not start with.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
            send(signal.SIGINT)
            assert interruption.requested == signal.SIGINT
            send(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_data_are_read_before_signals_are_taken_over(received, tmp_path):
    student = dict(model=dict(fn="mlp", widths=()), optimizer=dict(fn="sgd", learning_rate=0.1))
    student["terms"] = dict(task=dict(fn="cross_entropy", weight=1.0))
    only = dict(only=dict(learn=("student",)))
    digits = dict(fn="digits", validation=0)
    plan = resolve(dict(data=digits, student=student, phases=only, devices=1))

    def reading():
        send(signal.SIGTERM)
        return plan.data()

    with phases.opened(plan._replace(data=reading), tmp_path) as run:
        assert received == [signal.SIGTERM] and run.interruption.requested is None


def test_a_signal_of_each_kind_is_noted(received):
    with Interruption() as interruption:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert interruption.requested == signal.SIGINT and not received


@pytest.mark.parametrize("sent", [(), SIGNALS, (signal.SIGTERM, signal.SIGTERM)])
def test_the_handlers_are_given_back(received, sent):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
        for number in sent:
            send(number)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_handlers_are_given_back_after_an_error(received):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), Interruption():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_of_the_main_thread_no_signal_is_taken(received):
    before, noted = [signal.getsignal(number) for number in SIGNALS], []

    def work():
        with Interruption() as interruption:
            noted.append([signal.getsignal(number) for number in SIGNALS] == before)
            noted.append(interruption.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert noted == [True, None]
    send(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_an_interruption_can_be_used_again(received):
    interruption = Interruption()
    for _ in range(2):
        with interruption:
            send(signal.SIGTERM)
    assert interruption.requested == signal.SIGTERM and not received


def test_the_first_signal_is_answered_while_python_waits_for_something_else(received, monkeypatch):
    """As for a compilation: the main thread is in C until it has been answered."""
    answered, told, (reader, writer) = threading.Event(), [], os.pipe()

    class Told(io.StringIO):
        def write(self, text):
            told.append(text)
            if "\n" in text:
                answered.set()

    def work():
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        told.append(answered.wait(timeout=60))
        os.write(writer, b".")

    monkeypatch.setattr(sys, "stderr", Told())
    thread = threading.Thread(target=work)
    with Interruption() as interruption:
        thread.start()
        ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)
        thread.join()
        assert interruption.requested == signal.SIGTERM
    os.close(reader), os.close(writer)
    *lines, in_time = told
    assert in_time and "".join(lines).startswith("SIGTERM: stopping after this step, and saving;")
