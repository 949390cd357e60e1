"""The metrics of a run as JSON lines, which are the record, and as TensorBoard events, a view."""

import contextlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abkd_jax import files

FILE = "metrics.jsonl"


class Writer(contextlib.AbstractContextManager):
    """Writes rows of metrics, after those that a run had written up to the step it resumes at.

    Every wall-clock number is to be named "time/...", so that all else is reproducible.
    """

    def __init__(self, directory: Path, step: int):
        """Opens `directory/metrics.jsonl`, cut back to the step, and `directory/tensorboard`.

        Args:
            directory: made if it is missing.
            step: the last step whose rows are kept; -1 for a new run.

        Raises:
            ValueError: if a row of the file, other than a torn last one, is no row.
            OSError: if the file cannot be read or written.
        """
        from abkd_jax.run.log.events import Events  # tensorboardX imports torch where there is one

        directory = files.path_of(directory)
        directory.mkdir(parents=True, exist_ok=True)
        cut(directory, step)
        self._file = files.appended(directory / FILE)
        self._events = Events(directory / "tensorboard", step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row.

        Args:
            step: of the metrics.
            metrics: by name, in the order in which they are written. A number of 32 bits is written
                as the number of 64 bits that is equal to it; NaN and infinities, which JSON lacks,
                as null.

        Raises:
            ValueError: if a metric is named "step".
            OSError: if the file cannot be written.
        """
        if "step" in metrics:
            raise ValueError("a metric cannot be named 'step', which is the row's own.")
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        row = {"step": int(step)} | {name: finite.get(name) for name in values}
        rest = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        while rest:  # an unbuffered write may take a part only
            rest = rest[self._file.write(rest) :]
        self._events.write(int(step), finite)

    def sync(self) -> None:
        """Brings all rows to the disk, as before a checkpoint that is to find them there.

        Raises:
            OSError: if the file cannot be written.
        """
        self._file.sync()
        self._events.flush()

    def close(self) -> None:
        """Closes the files; closing twice changes nothing."""
        try:
            self._file.close()
        finally:
            self._events.close()

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            warnings.warn(f"{error}; the last rows are lost.", stacklevel=2)  # what ends it goes on


def read(directory: Path) -> list[dict[str, Any]]:
    """All rows of `directory/metrics.jsonl`; none where there is no such file.

    Args:
        directory: of the file.

    Returns:
        The rows in order; a torn last one is left out.

    Raises:
        ValueError: one sentence that names the file and the line that is no row.
    """
    return [row for row, _ in _rows(files.path_of(directory) / FILE)]


def cut(directory: Path, step: int) -> None:
    """Cuts `directory/metrics.jsonl` back to the rows of a step and those before it.

    The file is replaced as a whole, so an interruption leaves the old one or the new one. The kept
    rows keep their bytes.

    Args:
        directory: of the file, which is made if it is missing.
        step: the last step whose rows are kept.

    Raises:
        ValueError: one sentence that names the file and the line that is no row.
        OSError: if the file cannot be read or written.
    """
    path = files.path_of(directory) / FILE
    kept = [line for row, line in _rows(path) if row["step"] <= step]
    files.write(path, b"".join(line + b"\n" for line in kept))


def _rows(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """The rows with their lines. The last line may be torn, for the process may have been killed.

    A last line that is whole but for its end is kept: no part of a JSON object is one.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.removesuffix(b"\n").split(b"\n")
    rows = [_parsed(line) for line in lines]
    if rows[-1] is None:
        rows.pop()
    if None in rows:
        raise ValueError(
            f"{path} line {rows.index(None) + 1} must be a JSON object with an integer 'step'; "
            f"found {lines[rows.index(None)][:80]!r}."
        )
    return list(zip(rows, lines, strict=False))  # a torn last line has no row


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
