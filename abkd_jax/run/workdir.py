"""The folder of a run: whose it is, what it says of itself, and the networks in it."""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax import models, schema
from abkd_jax.train.checkpoint import Checkpoints
from abkd_jax.train.state import Module
from abkd_jax.types import Outputs

CHECKPOINTS = "checkpoints"
_PLACES = ("data.data_dir", "data.download")  # may differ when a run moves to another machine


class Loaded(NamedTuple):
    """A trained network.

    Attributes:
        module: takes inputs as the data set stores them, and normalises them.
        variables: its parameters (their moving average, if there is one) and batch statistics,
            without projections, which belong to its training.
        config: of the run.
    """

    module: Module
    variables: Mapping[str, Any]
    config: Mapping[str, Any]

    def __call__(self, inputs: Any) -> Outputs:
        """The outputs for inputs `[B, ...]` as the data set stores them: uint8, or float."""
        return self.module.apply(self.variables, inputs, train=False)


def load(workdir: str | os.PathLike, name: str | None = None, *, best: bool = False) -> Loaded:
    """Loads a network that a run trained.

    Args:
        workdir: of the run; a teacher that was trained on the way is in workdir/teacher.
        name: of the network; None for the student, or for the only one.
        best: the state that was best on the validation data, in place of the last one.

    Returns:
        (module, variables, config), which can be called with a batch of inputs.

    Raises:
        ValueError: one sentence, if there is no such run, network or checkpoint.
    """
    about, module, variables = restore(pathlib.Path(workdir), name, best=best)
    mean, std = (about["preprocess"][key] for key in ("mean", "std"))
    return Loaded(models.normalized(module, mean=mean, std=std), variables, about["config"])


def restore(
    workdir: pathlib.Path, name: str | None, *, best: bool = False
) -> tuple[dict[str, Any], Module, dict[str, Any]]:
    """What the run says of itself, the network's module for normalised inputs, its variables.

    The arguments and what is raised are those of `load`.
    """
    about = read_about(workdir)
    learners = about["learners"]
    if name is None:
        if len(learners) > 1 and "student" not in learners:
            raise ValueError(f"{workdir} has the networks {', '.join(learners)}; name one of them.")
        name = "student" if "student" in learners else learners[0]
    if name not in learners:
        own = workdir / name
        hint = f", which is in {own}" if (own / "config.json").exists() else ""
        raise ValueError(f"{workdir} trained {', '.join(learners)}; found name {name!r}{hint}.")
    if about["config"][name]["model"] == schema.GIVEN:
        raise ValueError(f"{name} was given by its caller, so that its model is not known here.")
    checkpoints = Checkpoints(workdir / CHECKPOINTS)
    try:
        found = checkpoints.best() if best else checkpoints.restore()
        if found is None:
            raise ValueError(f"{workdir} has no checkpoint{' that was evaluated' if best else ''}.")
        state = (checkpoints.restore_at(found[0]) if best else found[1])["learners"][name]
    finally:
        checkpoints.close()
    averaged = state.get("ema_params")
    variables = {
        "params": models.without_projections(state["params"] if averaged is None else averaged),
        "batch_stats": state.get("batch_stats") or {},
    }
    module = schema.module(about["config"], name, num_classes=about["num_classes"])
    return about, module, jax.tree.map(jnp.asarray, variables)


def read_about(workdir: pathlib.Path) -> dict[str, Any]:
    """What a run says of itself in its config.json.

    Raises:
        ValueError: one sentence, if the folder is not that of a run.
    """
    path = workdir / "config.json"
    try:
        about = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{workdir} is no workdir of a run: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(about, dict) or "config" not in about:
        raise ValueError(f"{path} is not that of a run; restore it, or choose another workdir.")
    return about


def claim(workdir: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Makes the folder that of this run, or checks that it is.

    Args:
        workdir: of the run or of one of its phases.
        about: what identifies it: "config", "learners", "num_classes", "preprocess", ...

    Raises:
        ValueError: naming what differs, if the folder is that of another run.
    """
    about = json.loads(json.dumps(about))
    if not (workdir / "config.json").exists():
        write_json(workdir / "config.json", about | _origin())
        return
    found = read_about(workdir)
    there, here = _flat({key: found.get(key) for key in about}), _flat(about)
    keys = [key for key in {**there, **here} if key.removeprefix("config.") not in _PLACES]
    differing = [
        f"{key.removeprefix('config.')} ({there.get(key, 'absent')!r} there, "
        f"{here.get(key, 'absent')!r} here)"
        for key in keys
        if there.get(key, ...) != here.get(key, ...)
    ]
    if differing:
        raise ValueError(
            f"{workdir} is the workdir of another run; these differ: {', '.join(differing[:8])}"
            f"{f', and {len(differing) - 8} more' if len(differing) > 8 else ''}. "
            "Choose another workdir, or the config of that run."
        )


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of the folder; the lock ends with the process, however it ends.

    Raises:
        ValueError: if another process is at work in the folder, or it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in the workdir {workdir}.") from None
        except OSError:
            pass  # a file system without locks
        yield


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file as a whole or not at all; NaN becomes null."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(_plain(value), file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """Arrays as lists, and what is not finite as None."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted path: leaf}."""
    if isinstance(value, Mapping) and value:
        parts = (_flat(part, f"{prefix}{key}.") for key, part in value.items())
        return {path: leaf for part in parts for path, leaf in part.items()}
    return {prefix[:-1]: value}


def _origin() -> dict[str, Any]:
    """The versions, the commit and the device: for the reader, not compared on a resume."""
    here = pathlib.Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
        commit = found.stdout.strip() if found.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    device = jax.devices()[0]
    return {
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "commit": commit,
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind})",
    }
