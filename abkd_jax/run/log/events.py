"""TensorBoard events, a view of what the metrics file records."""

import contextlib
import math
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

_FLUSH_SECONDS = 30.0  # each flush is an fsync, slow on a network's file system


class Events:
    """A TensorBoard event file, written in the caller's thread.

    Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then its queue blocks the
    run after ten rows, or at exit if the queue is unbounded. Here a failure is a warning, once, and
    ends the events alone, for the rows in the JSON lines have all that they have.
    """

    def __init__(self, directory: Path, purge_step: int):
        """Begins a file that hides what earlier ones in the directory have from purge_step on."""
        now = time.time_ns()
        # TensorBoard reads in the order of names; nanoseconds keep files of one second apart.
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._directory, self._records, self._flushed = directory, None, -math.inf
        with self._one_failure():
            directory.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(str(directory / name))
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(step=step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        with self._one_failure():
            if self._records:
                self._records.flush()

    def close(self) -> None:
        with self._one_failure():
            if self._records:
                self._records.close()
        self._records = None

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._one_failure():
            if self._records:
                self._records.write(event.SerializeToString())

    @contextlib.contextmanager
    def _one_failure(self) -> Iterator[None]:
        """The first failure, of a disk or a bucket, is a warning: then there are no records."""
        try:
            yield
        except Exception as error:
            warnings.warn(
                f"{self._directory} gets no more events, for they could not be written ({error}); "
                f"the metrics file goes on.",
                stacklevel=1,
            )
            records, self._records = self._records, None
            with contextlib.suppress(Exception):  # it writes what is left, but it does close
                if records:
                    records.close()
