"""A process of a run of several, and the parent that says how it ended.

Where one process dies, the runtime of the others ends them as they are, with no word of Python's.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

_WATCHED = "ABKD_JAX_WATCHED"  # in the environment of the child: the pipe that ends with the parent
_SEVERAL = re.compile(r"--?(distributed|coordinator)(=.*)?")
_REASONS = {
    "SIGABRT": "another process ended, or cannot be reached",
    "SIGKILL": "it was ended from outside, maybe for it took too much memory",
}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def is_several(argv: Sequence[str]) -> bool:
    """Whether a command is one process of several, by its flags."""
    return any(_SEVERAL.fullmatch(part) for part in argv)


def is_child() -> bool:
    """Whether a parent watches this process; if so, it ends with the parent from now on."""
    pipe = os.environ.pop(_WATCHED, None)
    if pipe is None:
        return False
    threading.Thread(target=_end_with, args=(int(pipe),), daemon=True).start()
    return True


def watched(command: Sequence[str]) -> int:
    """Runs a command as a child, to which SIGTERM and SIGINT are passed on.

    Args:
        command: with its arguments.

    Returns:
        Its exit status; of one that a signal ended, which is told in a sentence, that of a shell.
    """
    reader, writer = os.pipe()
    environment = os.environ | {_WATCHED: str(reader)}
    # In a session of its own: a terminal sends SIGINT to all of one, which would be the second.
    child = subprocess.Popen(command, env=environment, pass_fds=(reader,), start_new_session=True)
    os.close(reader)
    before = {x: signal.signal(x, lambda number, _: _pass_on(child, number)) for x in _SIGNALS}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
    if status >= 0:
        return status
    name = signal.Signals(-status).name
    reason = _REASONS.get(name, "it was ended from outside")
    print(
        f"this process ended by {name}: {reason}; the other processes end, too. The same commands "
        "go on from what is saved.",
        file=sys.stderr,
        flush=True,
    )
    return 128 - status


def _pass_on(child: subprocess.Popen, number: int) -> None:
    if child.poll() is None:
        child.send_signal(number)


def _end_with(pipe: int) -> None:
    """Ends this process when the parent does, which never writes."""
    os.read(pipe, 1)
    os._exit(1)
