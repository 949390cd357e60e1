"""The schema of a config: a top-level group with a `model` is a network, the rest is the run."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax import Array

from abkd_jax import data, models
from abkd_jax.objective import number, objective
from abkd_jax.train import optimizer
from abkd_jax.train.state import Module
from abkd_jax.types import Bound, Schedule, Term, nearest

MODES = {"offline": ("teacher", "student"), "online": ()}  # and the networks that each must have
REQUIRED = ("mode", "data", "batch_size", "num_steps", "init_seed", "data_seed")
OPTIONAL = ("micro_batches", "plugins")
NETWORK_FIELDS = ("model", "optimizer", "terms", "checkpoint", "ema_decay")


class Network(NamedTuple):
    """What a network's group stands for.

    Attributes:
        module: the flax module.
        optimizer: a function of `train.optimizer`, bound.
        ema_decay: of the moving average of its parameters; None for none.
    """

    module: Module
    optimizer: Bound
    ema_decay: Array | Schedule | None


def networks(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The groups of the config that are networks, by name."""
    return {
        name: group
        for name, group in config.items()
        if isinstance(group, Mapping) and "model" in group
    }


def network(config: Mapping[str, Any], name: str, *, num_classes: int) -> Network:
    """Builds what a network's group stands for.

    Args:
        config: as a plain dict.
        name: of the network.
        num_classes: K.

    Returns:
        Module, optimiser and moving average.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    group = config[name]
    if not isinstance(group.get("optimizer"), Mapping):
        raise ValueError(
            f"{name}.optimizer must be a group dict(name='adam', learning_rate=...); "
            f"found {group.get('optimizer')!r}."
        )
    hypers = {key: value for key, value in group.items() if key not in NETWORK_FIELDS}
    decay, num_steps = group.get("ema_decay"), config["num_steps"]
    return Network(
        models.from_config(group["model"], hypers, num_classes=num_classes, field=name),
        optimizer.from_config(group["optimizer"], field=f"{name}.optimizer", num_steps=num_steps),
        None if decay is None else number(decay, f"{name}.ema_decay", num_steps),
    )


def objectives(
    config: Mapping[str, Any], *, learners: Iterable[str], present: Iterable[str]
) -> dict[str, dict[str, Term]]:
    """The objectives of the networks that learn.

    Args:
        config: as a plain dict.
        learners: the names of the networks that learn.
        present: the names of all networks that take part in the step.

    Returns:
        {learner: {name: Term}}.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    return {
        learner: objective(
            config[learner].get("terms", {}),
            field=f"{learner}.terms",
            learner=learner,
            networks=list(present),
            num_steps=config["num_steps"],
            plugins=config.get("plugins", ()),
        )
        for learner in learners
    }


def check(config: Mapping[str, Any]) -> None:
    """Refuses a config from which no run can be built, before anything is built.

    Args:
        config: as a plain dict.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    known = (*REQUIRED, *OPTIONAL)
    found = networks(config)
    for key in REQUIRED:
        if key not in config:
            raise ValueError(f"the config lacks {key!r}; it needs {', '.join(REQUIRED)}.")
    for key, value in config.items():
        if key not in known and key not in found:
            what = "group without a model" if isinstance(value, Mapping) else "key"
            raise ValueError(
                f"the config has the unknown {what} {key!r}{nearest(key, known)}; it takes "
                f"{', '.join(known)}, and networks, which have a model."
            )
    for key in ("batch_size", "num_steps", "init_seed", "data_seed", "micro_batches"):
        value, least = config.get(key, 1), 0 if key.endswith("seed") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key} must be an integer of at least {least}; found {value!r}.")
    if not isinstance(config["mode"], str) or config["mode"] not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; found {config['mode']!r}.")
    for name in MODES[config["mode"]]:
        if name not in found:
            raise ValueError(f"the config lacks the network {name!r}; {config['mode']} needs it.")
    data.check(config["data"])
    for name in found:
        network(config, name, num_classes=2)
    if config["mode"] == "online":
        objectives(config, learners=found, present=found)
    else:
        objectives(config, learners=["student"], present=found)
        if not config["teacher"].get("checkpoint"):
            objectives(config, learners=["teacher"], present=["teacher"])
