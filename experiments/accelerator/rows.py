"""The rows of a measurement: each is timed once, and kept in a file that outlives the command."""

import contextlib
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from abkd_jax import files, timing

FILE = "rows.jsonl"
_ATTEMPTS = 2  # at a row that ends the process; a time limit may have been the first one's end
_ROUNDS = 15
_FEWEST = 3  # rounds of a row that takes its time
_LONGEST = 110  # of a sentence on what failed

Call = Callable[[], Any]


class Row(NamedTuple):
    """What is timed together: in every round each arm has a turn.

    Attributes:
        name: of the row, as no other has it.
        arms: () -> {arm: () -> call}. A call has ended when the arrays that it returns are there;
            what making it or a first call raises is why the arm has no time.
        facts: what the table has to know of it.
        turn: seconds that a turn takes, about and at least.
    """

    name: str
    arms: Callable[[], Mapping[str, Callable[[], Call]]]
    facts: Mapping[str, Any]
    turn: float = 0.0


class Part(NamedTuple):
    """Rows that are one table.

    Attributes:
        title: of the table.
        text: what it shows.
        rows: in their order.
        table: {name of a row: what `measured` found} -> Markdown.
    """

    title: str
    text: str
    rows: Sequence[Row]
    table: Callable[[Mapping[str, Mapping[str, Any]]], str]


def measured(row: Row, *, seconds: float) -> dict[str, Any]:
    """Times a row.

    Args:
        row: to time.
        seconds: that its rounds may take together, but for the fewest.

    Returns:
        "seconds": {arm: of a call, by round}, "failed": {arm: why it has none}, both in the arms'
        order, and the row's "facts"; "memory": {arm: bytes} of calls with an attribute `memory`.
    """
    calls, failed, found = {}, {}, {}
    try:
        for name, make in row.arms().items():
            try:
                call = make()
                jax.block_until_ready(call())  # compiles, and may find that memory is short
                calls[name] = call
            except Exception as error:
                failed[name] = reason(error)
        once = timing.in_turn(calls, 1, seconds=row.turn)
        turns = sum(max(row.turn, times[0]) for times in once.values())
        rounds = int(np.clip(seconds / max(turns, 1e-9), _FEWEST, _ROUNDS))
        found = timing.in_turn(calls, rounds, seconds=row.turn)
    except Exception as error:
        failed["all"] = reason(error)
    times = {name: values.tolist() for name, values in found.items()}
    told = {"seconds": times, "failed": failed, "facts": dict(row.facts)}
    memory = {name: call.memory for name, call in calls.items() if hasattr(call, "memory")}
    return told | ({"memory": memory} if memory else {})


def answers() -> bool:
    """Whether the device still computes: after some errors a process gets nothing from it."""
    with contextlib.suppress(Exception):
        return float(jax.numpy.ones(()) + 1) == 2
    return False


def reason(error: Exception) -> str:
    """What was raised, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class Ledger:
    """What was measured, by row, in a folder's file of JSON lines.

    Its first line says on what: rows of another device, or of other versions, are not mixed.
    """

    def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any]):
        """Opens or makes the file.

        Raises:
            ValueError: one sentence, if it is damaged, or of another identity.
            OSError: if it cannot be read or written.
        """
        self._path, self.identity = folder / FILE, dict(identity)
        lines = _lines(self._path)
        self._lines, there = lines[1:], lines[0] if lines else dict(identity)
        differing = [key for key in {**there, **identity} if there.get(key) != identity.get(key)]
        if differing:
            told = "; ".join(f"{x} {there.get(x)!r}, now {identity.get(x)!r}" for x in differing)
            raise ValueError(
                f"{self._path} was measured under other conditions ({told}); choose another --out, "
                "or delete that file to measure anew."
            )
        lines = (json.dumps(line) + "\n" for line in [there, *self._lines])
        files.write(self._path, "".join(lines).encode())  # without a torn last line
        self.found = {line["row"]: line for line in self._lines if "seconds" in line}

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[bool]:
        """For the time of a row: whether to measure it, or whether it has ended the process before.

        An interruption is no such end.
        """
        begun = [line.get("begun") for line in self._lines]
        left = [line.get("left") for line in self._lines]
        self._append({"begun": name})
        try:
            yield begun.count(name) - left.count(name) < _ATTEMPTS
        except (KeyboardInterrupt, SystemExit):
            self._append({"left": name})
            raise

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Keeps what `measured` found of a row."""
        self._append({"row": name, **found})
        self.found[name] = found

    def _append(self, line: Mapping[str, Any]) -> None:
        self._lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file, without a torn last one."""
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in whole]
    except ValueError:
        raise ValueError(f"{path} must be JSON lines; restore or delete it.") from None


def eta(took: Mapping[str, Sequence[float]], left: Sequence[str]) -> str:
    """How long further rows will take, were they like those that are done.

    Args:
        took: the seconds of the rows that are done, by part.
        left: the part of each row to come.
    """
    every = [seconds for part in took.values() for seconds in part]
    seconds = sum(statistics.mean(took.get(part) or every) for part in left)
    length = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{len(left)} rows to go, about {length}"
