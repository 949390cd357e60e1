"""The wish to stop, as a machine or a person sends it."""

import signal
import threading
from types import FrameType


class Interruption:
    """While active, the first SIGTERM or SIGINT is noted; the second acts as it would have.

    Attributes:
        requested: the name of the signal that came, or None.
    """

    def __init__(self):
        """Inactive until entered."""
        self.requested: str | None = None
        self._before = {}

    def __enter__(self) -> "Interruption":
        """Takes the signals over; only the main thread can, another goes on without."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, self._before.pop(number))
