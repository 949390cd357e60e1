"""How fast a run trains: what its steps did since the last row, and how long they waited for it."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Work(NamedTuple):
    """What some steps did.

    Attributes:
        waited: seconds in which the host had no batch for the device.
        rows: images or tokens, padding included.
        flops: floating-point operations of their products; None where they are not counted.
    """

    waited: float
    rows: int
    flops: float | None


class Pace:
    """A feed that takes note of the steps it serves.

        pace = Pace(feed, rows=count_rows, flops=count_flops)
        examples, until = pace(step, most)  # as `data.Feed`
        work = pace.since(step)  # since this was called before

    While the host waits here the device may have steps in flight still: a share of seconds near 0
    says that the feed is fast enough, not by how much.
    """

    def __init__(
        self,
        feed: Callable[[int, int], tuple[Any, int]],
        *,
        rows: Callable[[Any], int],
        flops: Callable[[Any], float] | None = None,
    ):
        """The feed, with nothing noted.

        Args:
            feed: of the examples.
            rows: examples -> how many rows a step has of them.
            flops: examples -> what a step takes; called once for each length of rows.
        """
        self._feed, self._rows, self._flops = feed, rows, flops
        self._step = self._latest = None
        self._counted: dict[Any, tuple[int, float | None]] = {}
        self._clear()

    def __call__(self, step: int, most: int = 1) -> tuple[Any, int]:
        """What the feed has."""
        self._note(step)
        begun = time.monotonic()
        examples, until = self._feed(step, most)
        self._waited += time.monotonic() - begun
        length = getattr(examples, "length", None)
        if length not in self._counted:
            flops = self._flops and self._flops(examples)
            self._counted[length] = self._rows(examples), flops
        self._step, self._latest = step, self._counted[length]
        return examples, until

    def since(self, step: int) -> Work:
        """What was done up to a step since the last call."""
        self._note(step)
        work = Work(self._waited, self._done, self._spent if self._flops else None)
        self._clear()
        return work

    def _note(self, step: int) -> None:
        """Counts the steps that were made of the latest examples."""
        if self._latest is not None:
            rows, flops = self._latest
            self._done += (step - self._step) * rows
            self._spent += (step - self._step) * (flops or 0.0)
        self._step = step

    def _clear(self) -> None:
        self._waited, self._done, self._spent = 0.0, 0, 0.0
