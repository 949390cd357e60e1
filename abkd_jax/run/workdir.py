"""The folder of a run: whose it is, what it says of itself, and the networks in it."""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax import numpy as jnp

from abkd_jax import files, models
from abkd_jax.checks import require
from abkd_jax.config import weights
from abkd_jax.config.adapted import adapted, whole
from abkd_jax.config.build import Builder
from abkd_jax.config.dry_run import taking
from abkd_jax.config.schema import check_integer
from abkd_jax.models import split_variables
from abkd_jax.train import hosts
from abkd_jax.types import Outputs, dotted, named_leaves

_ABSENT = "absent"
_LEFT_OPEN = ("config.chunk", 0)  # which a run fills in as it begins
# Which may differ when a run moves to another machine.
_PLACES = ("data.data_dir", "data.download", "data.cache_dir")


class Busy(ValueError):
    """Another process is at work in a folder."""


class Loaded(NamedTuple):
    """A trained network.

    Attributes:
        module: takes inputs as the data set stores them, and normalises them; what a caller gave
            to the run has its `apply` alone.
        variables: its parameters (their moving average, if there is one) and batch statistics,
            without projections, which belong to its training.
        config: of the run.
    """

    module: models.Module
    variables: Mapping[str, Any]
    config: Mapping[str, Any]

    def __call__(self, inputs: Any) -> Outputs:
        """The outputs for inputs `[B, ...]` as the data set stores them.

        Raises:
            ValueError: if the inputs are not such as the network has learned from.
        """
        with taking("the network", inputs):
            return self.module.apply(self.variables, inputs, train=False)


def load(
    workdir: str | os.PathLike,
    name: str | None = None,
    *,
    best: bool = False,
    seed: int = 0,
    member: int = -1,
    merge: bool = True,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
) -> Loaded:
    """Loads a network that a run trained, or a member of a sweep.

    Args:
        workdir: of the run, of a phase before its last, which is in workdir/PHASE, or of a sweep.
        name: of the network; None for the one by which the run selects.
        best: the state that was best on the validation data, in place of the last one.
        seed: of which of a run's `init_seeds`, counted from 0.
        member: of a sweep, the row of its table, counted from 0; -1 for a run.
        merge: whether factors that it learned (`models.lora`) are merged into the weights beside
            them, which are read again; False for a module with both, as `models.save_adapter` has
            it.
        networks: {name: (apply_fn, variables)} as the run had it, for networks that were given to
            it: what is loaded takes the place of these variables.

    Returns:
        (module, variables, config), which can be called with a batch of inputs.

    Raises:
        ValueError: one sentence, if there is no such run, network, seed, member or checkpoint, or
            factors are beside other weights than when they learned.
    """
    check_integer("seed", seed, least=0)
    folder = of_seed(files.path_of(workdir), seed)
    if seed:
        weights.read_about(files.path_of(workdir))  # refuses what is no run
        expected = f"0, or that of a folder seed_1, seed_2, ... of {workdir}"
        require((folder / "config.json").exists(), "seed", expected, seed)
    which = {"network": name or "", "best": best, "member": member}
    found = weights.run(workdir=os.fspath(folder), **which)
    about = weights.read_about(folder)
    config, name = about["config"], name or about["select"]
    if found.model["fn"] == "given":
        if name not in (networks or {}):
            raise ValueError(
                f"{found.origin}: {name} was given by its caller; pass networks={{{name!r}: "
                "(apply_fn, variables)}, as to the run."
            )
        apply_fn, variables = networks[name]
        parts = dict(zip(found.variables, split_variables(apply_fn, variables), strict=True))
        module = models.normalized_function(apply_fn, **found.preprocess)
        return Loaded(module, _in_place_of(parts, found), config)
    builder = Builder(tuple(config["plugins"]))
    if merge:
        found = whole(found, builder)
        model = builder.bound(found.model, "model", f"{found.origin}: model")
        module, variables = model(num_classes=found.num_classes), found.variables
    else:
        require(found.beside, "merge", f"True, for {name} learned no factors", merge)
        module, params = adapted(found, builder)
        variables = {"params": params}
    module = models.normalized(module, **found.preprocess)
    return Loaded(module, jax.tree.map(jnp.asarray, variables), config)


def _in_place_of(variables: Mapping[str, Any], found: weights.Weights) -> Mapping[str, Any]:
    """What was found, in the containers of the variables, which files do not know."""
    for path, there, here in unlike(found.variables, variables):
        raise ValueError(f"{found.origin} has {path} {there}, but networks has {here}.")
    leaves = named_leaves(found.variables)
    return jax.tree.map_with_path(lambda path, _: jnp.asarray(leaves[dotted(path)]), variables)


def unlike(there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    """(dotted path, shape there, shape here) of the arrays that differ in it; None for none."""
    pairs = [
        {path: np.shape(x) for path, x in named_leaves(tree).items()} for tree in (there, here)
    ]
    found = [(path, *(shapes.get(path) for shapes in pairs)) for path in {**pairs[0], **pairs[1]}]
    return [(path, there, here) for path, there, here in found if there != here]


def of_seed(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """The folder of one of the `init_seeds`, for that of a phase, which is the first one's."""
    return folder / f"seed_{seed}" if seed else folder


def claim(workdir: pathlib.Path, about: Mapping[str, Any], *, longer: bool = False) -> None:
    """Makes the folder that of this run, or checks that it is.

    Args:
        workdir: of the run or of one of its phases.
        about: what identifies it: "config", "learners", "num_classes", "preprocess", ...
        longer: whether it may become that of the same run with more steps, which is told, or with
            more init seeds.

    Raises:
        ValueError: naming what differs, if the folder is that of another run.
    """
    path = workdir / "config.json"
    if not path.exists():
        write_json(path, {**about, **_origin()})
        return
    differing = _differing_in(workdir, about)
    if longer and differing and all(map(_is_longer, differing)):
        steps = [difference for difference in differing if difference[0] != "init_seeds"]
        if steps:
            print(
                f"{workdir}: goes on with {_told(steps)}; schedules are from now on those of the "
                "new length.",
                file=sys.stderr,
            )
        for name in ("report.md", "result.json"):
            (workdir / name).unlink(missing_ok=True)
        write_json(path, {**about, **_origin()})
    elif differing:
        raise ValueError(
            f"{workdir} is the workdir of another run; these differ: {_told(differing[:8])}"
            f"{f', and {len(differing) - 8} more' if len(differing) > 8 else ''}. "
            "Choose another workdir, or the config of that run."
        )


def is_shorter(workdir: pathlib.Path, about: Mapping[str, Any]) -> bool:
    """Whether the folder is that of the same run with fewer steps or init seeds."""
    differing = _differing_in(workdir, about) if (workdir / "config.json").exists() else []
    return bool(differing) and all(map(_is_longer, differing))


def _differing_in(workdir: pathlib.Path, about: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """As `_differing`, of all that identifies the one or the other."""
    found = weights.read_about(workdir)
    of_either = {key: None for key in ("contents", "sweep") if key in found}
    return _differing(found, of_either | about)


def stored(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a run ended with in the folder; None if none has."""
    if not (workdir / "report.md").exists():  # which is written last
        return None
    try:
        return json.loads((workdir / "result.json").read_text())
    except (OSError, ValueError):
        return None


def is_of(workdir: pathlib.Path, config: Mapping[str, Any]) -> bool:
    """Whether the folder is that of a run of the config."""
    try:
        return not _differing(weights.read_about(workdir), {"config": config})
    except ValueError:
        return False


def _differing(found: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted path, value there, value here) of what is not the same."""
    there = _flat(_with_lengths({key: found.get(key) for key in about}))
    here = _flat(_with_lengths(json.loads(json.dumps(about))))
    paths = [(path.removeprefix("config."), path) for path in {**there, **here}]
    differing = [
        (name, there.get(path, _ABSENT), here.get(path, _ABSENT))
        for name, path in paths
        if name not in _PLACES
        and there.get(path, _ABSENT) != here.get(path, _ABSENT)
        and (path, here.get(path)) != _LEFT_OPEN
    ]
    of_all = [values for name, *values in differing if name == "num_steps"]
    own = lambda name: name.startswith("phases.") and name.endswith(".num_steps")  # noqa: E731
    return [x for x in differing if not (own(x[0]) and list(x[1:]) in of_all)]


def _with_lengths(about: Mapping[str, Any]) -> dict[str, Any]:
    """With the `num_steps` of each phase, which a config may leave to that of all."""
    config = about.get("config") or {}
    if not {"phases", "num_steps"} <= config.keys():
        return dict(about)
    phases = {
        name: {"num_steps": config["num_steps"]} | phase for name, phase in config["phases"].items()
    }
    return {**about, "config": {**config, "phases": phases}}


def _is_longer(difference: tuple[str, Any, Any]) -> bool:
    name, there, here = difference
    grows = name == "init_seeds" or name.split(".")[-1] == "num_steps"
    return grows and type(there) is type(here) is int and here > there


def _told(differing: list[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{name} ({there!r} there, {here!r} here)" for name, there, here in differing)


@contextlib.contextmanager
def locked(workdir: pathlib.Path, *, shared: bool = False, needed: bool = False) -> Iterator[None]:
    """Keeps other processes out of the folder; the lock ends with the process, however it ends.

    Args:
        workdir: the folder, which is made.
        shared: whether it keeps out those alone that do not share it.
        needed: whether a file system without locks is refused, as one for `shared` is.

    Raises:
        ValueError: if another process is at work in the folder, or it cannot be made.
        OSError: if it is in a bucket, where there are no locks, and cannot be written.
    """
    if files.in_bucket(workdir):
        if shared or needed:
            raise ValueError(
                f"workdir {workdir} is in a bucket, which has no locks; processes that share it "
                "need some: choose a folder."
            )
        files.write(workdir / ".lock", b"")
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"workdir {workdir} cannot be written: {error.strerror}.") from None
    with handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is at work in the workdir {workdir}.") from None
        except OSError as error:  # a file system without locks
            if shared or needed:
                raise ValueError(
                    f"workdir {workdir} is on a file system without locks ({error.strerror}); "
                    "processes that share it need some: choose another folder."
                ) from None
        yield


@contextlib.contextmanager
def locked_by_first(workdir: pathlib.Path, *, shared: bool = False) -> Iterator[None]:
    """As `locked`, by process 0 for all processes of a run, which must share the folder."""
    with contextlib.ExitStack() as lock:
        hosts.by_first(lambda: lock.enter_context(locked(workdir, shared=shared)))
        hosts.check_shared(workdir)
        yield


def of_all(config: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted path: value} of what all processes of a run must have alike."""
    plain = json.loads(json.dumps(config, default=repr))
    found = {f"config.{path}": value for path, value in _flat(plain).items()}
    return {path: x for path, x in found.items() if path.removeprefix("config.") not in _PLACES}


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes the file as a whole or not at all; NaN becomes null."""
    files.write(path, f"{json.dumps(_plain(value), indent=1, allow_nan=False)}\n".encode())


def _plain(value: Any) -> Any:
    """Arrays as lists, and what is not finite as None."""
    return json.loads(json.dumps(value, default=_listed), parse_constant=lambda _: None)


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    return json.JSONEncoder().default(value)  # refuses it


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted path: leaf}; an empty group is a leaf."""
    return flatten_dict(value, is_leaf=lambda _, x: not x, sep=".")


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
