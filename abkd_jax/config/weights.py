"""Where a network's parameters come from, if not from its `init_seed`: functions by name."""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from abkd_jax import files
from abkd_jax.checks import require
from abkd_jax.models import (
    Encoder,
    from_torch,
    load_decoder,
    load_encoder,
    read_tensors,
    without_projections,
)
from abkd_jax.train.checkpoint import FOLDER, Checkpoints


class Weights(NamedTuple):
    """The variables of a network, and what is known of them.

    Attributes:
        variables: "params" and "batch_stats"; or a function that gives them, of the module and of
            its variables' shapes.
        origin: where they are from, in words.
        model: the group of a config that built the network; None where that is not known.
        num_classes: K of the network; None likewise.
        preprocess: "mean" and "std" of its inputs; None likewise.
        beside: of a network of which "params" are factors alone (`models.lora`), what is beside:
            the config's groups "adapter" and "weights", and the "sha256" of the latter.
    """

    variables: Mapping[str, Any] | Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
    origin: str
    model: Mapping[str, Any] | None = None
    num_classes: int | None = None
    preprocess: Mapping[str, Any] | None = None
    beside: Mapping[str, Any] | None = None


def run(*, workdir: str, network: str = "", best: bool = False, member: int = -1) -> Weights:
    """Those of another run, or of a member of a sweep.

    Args:
        workdir: of the run, of one of its phases, or of the sweep.
        network: its name there; "" for the one by which the run selects.
        best: the state that was best on the validation data, in place of the last one.
        member: of a sweep, the row of its table, counted from 0; -1 for a run.

    Returns:
        Its weights, without projections, which belong to its training: the moving average of the
        parameters if there is one.

    Raises:
        ValueError: one sentence, if there is no such run, network, member or checkpoint.
    """
    folder = files.path_of(workdir)
    about = read_about(folder)
    learners, network = about["learners"], network or about["select"]
    if network is None:
        raise ValueError(f"{folder} has the networks {', '.join(learners)}; name one of them.")
    if network not in learners:
        own = [path.parent for path in folder.glob("*/config.json")]
        own = [path for path in own if network in read_about(path)["learners"]]
        hint = f", which is in {own[0]}" if own else ""
        raise ValueError(f"{folder} trained {', '.join(learners)}; found name {network!r}{hint}.")
    if "sweep" in about or member != -1:
        state = _of_member(folder, about, member, best)[network]
    else:
        state = _newest(folder, best)["learners"][network]
    params = state["params"] if state.get("ema_params") is None else state["ema_params"]
    group, beside = about["config"][network], None
    if group.get("adapter"):
        beside = {key: group[key] for key in ("adapter", "weights")}
        beside["sha256"] = about["contents"][f"{network}.weights"]
    return Weights(
        {"params": without_projections(params), "batch_stats": state.get("batch_stats") or {}},
        f"{folder}",
        group["model"],
        about["num_classes"],
        about["preprocess"],
        beside,
    )


def _newest(folder: pathlib.Path, best: bool = False) -> dict[str, Any]:
    """What the newest checkpoint of a folder holds, or the best."""
    with Checkpoints(folder / FOLDER, reads=True) as checkpoints:
        found = checkpoints.best() if best else checkpoints.restore()
        if found is None:
            raise ValueError(f"{folder} has no checkpoint{' that was evaluated' if best else ''}.")
        return checkpoints.restore_at(found[0]) if best else found[1]


def _of_member(
    folder: pathlib.Path, about: Mapping[str, Any], member: int, best: bool
) -> dict[str, Any]:
    """The states of the networks that a member of a sweep trained."""
    grid = about.get("sweep", {"over": [], "init_seeds": 0})
    count = math.prod(len(values) for _, values in grid["over"]) * grid["init_seeds"]
    expected = f"at least 0 and less than {count}, the members of the sweep {folder}"
    expected = expected if count else f"-1, since {folder} is no sweep"
    require(0 <= member < count, "member", expected, member)
    require(not best, "best", "False, since a sweep keeps the last state of its members", best)
    parts = {int(path.name.rpartition("_")[2]): path for path in folder.glob("members_*")}
    starts = [start for start in parts if start <= member]
    if not starts:
        raise ValueError(f"{folder} has no checkpoint of member {member}.")
    learners = _newest(parts[max(starts)])["carry"]["learners"]
    count = len(jax.tree.leaves(learners)[0])
    if member - max(starts) >= count:
        raise ValueError(f"{folder} has no checkpoint of member {member}.")
    return jax.tree.map(lambda x: x[member - max(starts)], learners)


def hugging_face(
    *, folder: str, layers: tuple[int, ...] = (), param_dtype: str = "float32", seed: int = 0
) -> Weights:
    """Those of a folder of the Hugging Face hub, for a model of the same name or its like.

    Args:
        folder: see `models.load_decoder`, or `load_encoder`.
        layers: which of its layers, ascending from 0; () for all.
        param_dtype: of the parameters, "float32" or "bfloat16".
        seed: of what a folder of a pretrained encoder lacks.

    Returns:
        Its weights.

    Raises:
        ValueError: one sentence that names the file, what was found and what was expected.
    """
    options = {"layers": layers, "param_dtype": param_dtype}

    def variables(module: Any, shapes: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(module, Encoder):
            _, found = load_encoder(folder, num_classes=module.num_classes, seed=seed, **options)
        else:
            _, found = load_decoder(folder, **options)
        return {**found, "batch_stats": {}}

    return Weights(variables, folder)


def torch(*, path: str, key: str = "") -> Weights:
    """Those of PyTorch's network of the same kind, such as the published teachers of CRD.

    Args:
        path: of a file of torch.save, read with `weights_only=True`, of safetensors, or of numpy.
        key: see `models.read_tensors`.

    Returns:
        Its weights.

    Raises:
        ValueError: one sentence that names the file or its tensors, what was found and what was
            expected.
    """
    return Weights(functools.partial(from_torch, read_tensors(path, key=key), origin=path), path)


def read_about(folder: pathlib.Path) -> dict[str, Any]:
    """What a run, or a phase of it, says of itself in its config.json.

    Raises:
        ValueError: one sentence, if the folder is not that of a run.
    """
    path = folder / "config.json"
    try:
        about = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no workdir of a run: it has no config.json.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(about, dict) or "config" not in about:
        raise ValueError(f"{path} is not that of a run; restore it, or choose another workdir.")
    return about
