"""TensorBoard events, a view of what the metrics file records."""

import math
import socket
import time
import warnings
from collections.abc import Mapping
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
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(str(directory / name))
        except OSError as error:
            self._give_up(error)
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
        if self._records:
            try:
                self._records.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        if self._records:
            try:
                self._records.close()
            except OSError as error:
                self._give_up(error)
        self._records = None

    def _append(self, event: Event) -> None:
        if self._records:
            event.wall_time = time.time()
            try:
                self._records.write(event.SerializeToString())
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        warnings.warn(
            f"{self._directory} gets no more events, for they could not be written ({error}); "
            f"the metrics file goes on.",
            stacklevel=2,
        )
        records, self._records = self._records, None
        if records:
            try:
                records.close()  # fails too, for it writes what is left, but it does close
            except OSError:
                pass
