"""The wish to stop, as a machine or a person sends it."""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """While active, the first SIGTERM or SIGINT is noted; the second acts as it would have.

    The first is answered on stderr at once, also while XLA compiles and Python itself waits.

    Attributes:
        requested: the signal that came, or None.
    """

    def __init__(self, repeats: float = 0.0):
        """Inactive until entered.

        Args:
            repeats: seconds in which the same signal again is the first one still: a process may
                have it from a machine that sends it to all, and from the parent that passes it on.
        """
        self.requested: signal.Signals | None = None
        self._repeats, self._noted = repeats, {}
        self._before, self._active = {}, contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        """Takes the signals over; only the main thread can, another goes on without."""
        if threading.current_thread() is threading.main_thread():
            self._active.enter_context(_answering())
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._noted = {}, {}
        self._active.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._noted.setdefault(number, now)
        self.requested = signal.Signals(number)
        later = now > first + self._repeats
        if later or not self._repeats:
            signal.signal(number, self._before.pop(number))
        if later:
            signal.raise_signal(number)


@contextlib.contextmanager
def _answering():
    """A thread tells of the first signal, whose number Python writes to a pipe as it comes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_answer, args=(reader,), daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()


def _answer(reader: int) -> None:
    with open(reader, "rb", buffering=0) as numbers:
        told = False
        while number := numbers.read(1):
            if number[0] in _SIGNALS and not told:
                name, told = signal.Signals(number[0]).name, True
                line = f"{name}: stopping after this step, and saving; a second one ends at once."
                print(line, file=sys.stderr, flush=True)
