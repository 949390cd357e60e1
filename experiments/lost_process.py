"""How soon the other process of a run ends when one of two is killed.

    python -m experiments.lost_process --rounds=3

Both run configs/digits.py on this machine; the one is killed (SIGKILL) in the middle of training.
"""

import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from absl import flags

from abkd_jax import timing
from abkd_jax.config import command
from abkd_jax.run.log import writer

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each process that is killed.", lower_bound=1)
_CONFIG = "configs/digits.py:runlocal"
_FLAGS = ("--config.num_steps=1000000", "--config.log_every=10", "--config.checkpoint_every=1000")


def main() -> None:
    """Prints a line for each process that is killed."""
    print(f"{'killed':<12}{'s until the other ended':<28}{'status':<10}its last words")
    for killed in (0, 1):
        found = [_round(killed) for _ in range(_ROUNDS.value)]
        seconds, statuses, words = zip(*found, strict=True)
        took = timing.quartiles(np.asarray(seconds), ".1f")
        status = ", ".join(sorted({f"{x}" for x in statuses}))
        print(f"{f'process {killed}':<12}{took:<28}{status:<10}{words[-1][:60]} ...", flush=True)


def _round(killed: int) -> tuple[float, int, str]:
    """Seconds from the signal to the end of the other, its status, and its last line."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder, "run")
        logs = [pathlib.Path(folder, f"log_{i}") for i in range(2)]
        both = [_started(port, i, workdir, log) for i, log in enumerate(logs)]
        try:
            _await_steps(workdir, both, logs)
            start = time.perf_counter()
            both[killed].kill()
            status = both[1 - killed].wait()
            took = time.perf_counter() - start
        finally:
            for process in both:
                process.kill()
                process.wait()
        return took, status, logs[1 - killed].read_text().rstrip().splitlines()[-1]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _started(port: int, process: int, workdir: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
    place = f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={process}"
    run = "-m", "abkd_jax.main", f"--config={_CONFIG}", *_FLAGS, f"--workdir={workdir}"
    with open(log, "w") as file:
        return subprocess.Popen([sys.executable, *run, *place], stdout=file, stderr=file)


def _await_steps(
    workdir: pathlib.Path, processes: list[subprocess.Popen], logs: list[pathlib.Path]
) -> None:
    """Returns when the first phase has logged two rows."""
    waiting = threading.Event()
    while len(writer.read(workdir / "teacher")) < 2:
        for process, log in zip(processes, logs, strict=True):
            if process.poll() is not None:
                sys.exit(f"A process ended before it trained: {log.read_text()}")
        waiting.wait(0.2)


if __name__ == "__main__":
    command.run(main)
