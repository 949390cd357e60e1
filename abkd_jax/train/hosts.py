"""Several processes of one run: how they find each other, agree, and end together.

Each process runs the same program on its own devices, and XLA splits one computation over all of
them. What is agreed here besides goes by the coordinator's store of keys and not by the devices, so
that a process may read its data for an hour while the others wait.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax._src import distributed  # the client has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abkd_jax import files
from abkd_jax.parallel import BATCH

HEARTBEAT_SECONDS = 20  # without a sign of a process, after which the others end
_POLL_SECONDS = 5  # of a wait, after which Python looks for signals
_GRACE_SECONDS = 3  # in which a process that fails like the others says so itself
_VISIBLE_SECONDS = 30  # in which a file of one host shows on the others
_FAILED = "abkd_jax/failed"
_RUN_AHEAD = 2  # calls, as training has it: a wish is read once it is there
_calls = itertools.count()  # of `_exchanged`, the same on all processes


class Refused(ValueError):
    """What all processes know that one of them refused."""


class Failed(OSError):
    """What all processes know that the system of one of them refused."""


class Place(NamedTuple):
    """Which of several processes this is, as flags have it.

    Attributes:
        distributed: whether JAX is to find the rest: of TPU pods, Slurm and MPI.
        coordinator: HOST:PORT of process 0; "" for a run of one process.
        num_processes: of the run.
        process_id: of this one, counted from 0.
        coordinator_timeout: seconds that processes wait for each other at the start.
    """

    distributed: bool = False
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    coordinator_timeout: int = 300


def start(place: Place) -> None:
    """Finds the other processes; must come before anything is computed.

    Raises:
        ValueError: one sentence, if the flags do not fit, or the others are not found.
    """
    if not (place.distributed or place.coordinator):
        for name in ("num_processes", "process_id"):
            if getattr(place, name) != Place._field_defaults[name]:
                raise ValueError(f"--{name} needs --coordinator=HOST:PORT, of process 0.")
        return
    options: dict[str, Any] = {}
    if place.coordinator:
        _check(place)
        options = {"coordinator_address": place.coordinator}
        options |= {name: getattr(place, name) for name in ("num_processes", "process_id")}
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=place.coordinator_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(_not_found(place, _first_line(error))) from error


def _check(place: Place) -> None:
    """Refuses what jax.distributed would trip over, or wait for in vain."""
    host, _, port = place.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"--coordinator must be HOST:PORT of process 0, such as 10.0.0.1:1234; found "
            f"{place.coordinator!r}."
        )
    if place.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1; found {place.num_processes}.")
    if not 0 <= place.process_id < place.num_processes:
        raise ValueError(
            f"--process_id must be between 0 and {place.num_processes - 1}, one less than "
            f"--num_processes; found {place.process_id}."
        )
    if place.coordinator_timeout < 1:
        raise ValueError(
            f"--coordinator_timeout must be at least 1; found {place.coordinator_timeout}."
        )
    if place.process_id == 0:
        try:
            with socket.create_server(("", int(port))):
                pass
        except OSError as error:
            raise ValueError(
                f"--coordinator: port {port} cannot be opened ({os.strerror(error.errno)}); choose "
                "another, the same for all processes."
            ) from None
        return
    deadline = time.monotonic() + place.coordinator_timeout
    while (reason := _unreachable(host.strip("[]"), int(port))) is not None:
        if time.monotonic() > deadline:  # else the runtime waits, and ends this process
            raise ValueError(_not_found(place, reason))
        time.sleep(0.5)


def _unreachable(host: str, port: int) -> str | None:
    """Why nothing answers at an address; None where something does."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return None
    except OSError as error:
        return f"{error.strerror or error}"


def _not_found(place: Place, reason: str) -> str:
    return (
        f"the processes did not find each other at "
        f"{place.coordinator or 'the coordinator that JAX found'} within --coordinator_timeout="
        f"{place.coordinator_timeout} s ({reason}); start all of them, with the address of "
        "process 0, which the others must reach."
    )


def is_first() -> bool:
    """Whether this is process 0, which writes what people read."""
    return jax.process_index() == 0


def everyone(function: Callable[[], Any]) -> Any:
    """What a function returns here, once it has on all processes; what one refuses, all do.

    Raises:
        ValueError: the sentence of the first process that refused, and which that is.
        OSError: likewise.
    """
    if jax.process_count() == 1:
        return function()
    try:
        found = function()
    except (Refused, Failed):  # inside of the function: nobody waits for another word
        raise
    except Exception as error:  # of any kind, for the others wait
        _exchanged(failure=error)
        raise
    _exchanged()
    return found


def by_first(function: Callable[[], Any]) -> Any:
    """What a function returns on process 0, which alone calls it; as JSON has it.

    Raises:
        ValueError: on all processes, if it does.
        OSError: likewise.
    """
    if jax.process_count() == 1:
        return function()
    if not is_first():
        return _exchanged()[0]
    try:
        found = function()
    except Exception as error:
        _exchanged(failure=error)
        raise
    return _exchanged(found)[0]


def agree(value: Any) -> Any:
    """The value of process 0, as JSON has it."""
    return by_first(lambda: value)


def barrier() -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        _exchanged()


def equal(about: Mapping[str, Any]) -> None:
    """Refuses, on all processes, what is not the same on all of them.

    Args:
        about: {what it is: a number, a text, ...}.

    Raises:
        Refused: naming what differs, between which processes.
    """
    if jax.process_count() == 1:
        return
    first, *others = _exchanged({name: f"{value}" for name, value in about.items()})
    for process, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        told = [
            f"{name} is {first.get(name, 'absent')} on process 0 and {other.get(name, 'absent')} "
            f"on process {process}"
            for name in names[:4]
        ]
        more = f", and {len(names) - 4} more differ" if len(names) > 4 else ""
        if names:
            raise Refused(
                f"all processes of a run must have the same config, versions and data: "
                f"{', '.join(told)}{more}."
            )


def versions() -> dict[str, str]:
    """Of what the processes of a run must have in common, the code of this library included."""
    found = {f"the version of {x}": importlib.metadata.version(x) for x in ("jax", "flax", "optax")}
    root, sha = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found | {"the code of abkd_jax (its SHA-256)": sha.hexdigest()[:12]}


def check_shared(folder: pathlib.Path, seconds: float = _VISIBLE_SECONDS) -> None:
    """Refuses a folder that is not the same one on all hosts.

    Args:
        folder: that is to be shared.
        seconds: in which a file of process 0 is to show on the others.

    Raises:
        ValueError: on all processes.
    """
    if jax.process_count() == 1:
        return
    equal({"the workdir": folder if files.in_bucket(folder) else "a folder"})
    if files.in_bucket(folder):
        return
    token = agree(secrets.token_hex(8))
    path = folder / f".hosts_{token}"
    by_first(lambda: path.touch())
    deadline = time.monotonic() + seconds

    def seen() -> None:
        while not path.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"workdir {folder} is not the folder that process 0 has under this name; give "
                    "one that all hosts share, such as on NFS."
                )
            time.sleep(0.2)

    try:
        everyone(seen)
    finally:
        if is_first():
            path.unlink(missing_ok=True)


class Wishes:
    """What any one process wishes, learned by all at the same call."""

    def __init__(self, mesh: Mesh | None):
        """On the devices of a mesh."""
        self._mesh, self._asked = mesh, collections.deque()

    def agreed(self, wish: signal.Signals | None) -> signal.Signals | None:
        """The signal that some process had at a call before; every process must call it alike.

        Args:
            wish: of this process.
        """
        if jax.process_count() == 1:
            return wish
        own = np.asarray([wish or 0], np.int32)
        along = NamedSharding(self._mesh, BATCH)
        wishes = jax.make_array_from_callback((self._mesh.size,), along, lambda _: own)
        self._asked.append(_largest(wishes, self._mesh))
        if len(self._asked) <= _RUN_AHEAD:  # to wait for it would have the devices wait for us
            return None
        found = int(self._asked.popleft())
        return signal.Signals(found) if found else None


def _largest(wishes: jax.Array, mesh: Mesh) -> jax.Array:
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(jnp.max, out_shardings=whole)(wishes)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Where what one process fails with ends all of them, each with its sentence and status 1.

    A process that fails alone leaves the others in a computation that waits for it.
    """
    if jax.process_count() == 1:
        yield
        return
    ending = threading.Event()
    threading.Thread(target=_end_with_others, args=(ending,), daemon=True).start()
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        ending.set()
        _end(f"{error}")
    except (Exception, KeyboardInterrupt) as error:
        ending.set()
        told = _failure()
        if told is None and not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
            told = f"{type(error).__name__}: {_first_line(error)}"
        _end(told or _lost(error))
    ending.set()


def _lost(error: BaseException) -> str:
    return (
        "what all processes compute together failed, maybe for one of them ended "
        f"({_first_line(error)}); all end: the same commands go on from what is saved."
    )


def _end(sentence: str) -> None:
    """Says what failed here and to the others, and ends once they know."""
    print(sentence, file=sys.stderr, flush=True)
    own = f"process {jax.process_index()} of {jax.process_count()}"
    with contextlib.suppress(Exception):  # the coordinator may be gone
        _client().key_value_set(_FAILED, json.dumps([jax.process_index(), f"{own}: {sentence}"]))
    # Process 0 keeps the store, and what all failed with at once each says itself.
    time.sleep(2 * _GRACE_SECONDS if is_first() else 0)
    _leave()


def _end_with_others(ending: threading.Event) -> None:
    """Ends this process, which waits for another, once that has said that it failed."""
    while not ending.wait(1.0):
        told = _failure()
        if told is None:
            continue
        if not ending.wait(_GRACE_SECONDS):
            print(told, file=sys.stderr, flush=True)
            time.sleep(_GRACE_SECONDS if is_first() else 0)  # which keeps the store, for the others
            _leave()


def _failure() -> str | None:
    """What another process failed with."""
    try:
        process, sentence = json.loads(_client().key_value_try_get(_FAILED))
    except Exception:  # there is no such key, or no coordinator
        return None
    return None if process == jax.process_index() else sentence


def _leave() -> None:
    """Without the handshake at the end, for which another process may be missing."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _exchanged(value: Any = None, failure: Exception | None = None) -> list[Any]:
    """The values of all processes, in their order; where one has failed, that for all of them."""
    number, client, count = next(_calls), _client(), jax.process_count()
    own = None if failure is None else [isinstance(failure, OSError), f"{failure}"]
    client.key_value_set(f"abkd_jax/{number}/{jax.process_index()}", json.dumps([value, own]))
    keys = [f"abkd_jax/{number}/{process}" for process in range(count)]
    told = [json.loads(_awaited(client, key)) for key in keys]
    failures = [(process, x) for process, (_, x) in enumerate(told) if x is not None]
    if failures:
        process, (of_system, sentence) = failures[0]
        alike = len(failures) == count and all(x == failures[0][1] for _, x in failures)
        said = sentence if alike else f"process {process} of {count}: {sentence}"
        raise (Failed if of_system else Refused)(said) from failure
    return [found for found, _ in told]


def _awaited(client: Any, key: str) -> str:
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_SECONDS * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in f"{error}":
                raise


def _client() -> Any:
    return distributed.global_state.client


def _first_line(error: BaseException) -> str:
    text = f"{error}".strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
