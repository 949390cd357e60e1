"""The schema of a config: a top-level group with a `model` is a network, the rest is the run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax import Array
from jax import numpy as jnp

from abkd_jax import data, models
from abkd_jax.analysis.probe import check_probes
from abkd_jax.objective import number, objective
from abkd_jax.train import optimizer
from abkd_jax.train.state import Module
from abkd_jax.types import Bound, Schedule, Term, nearest

MODES = {"offline": ("teacher", "student"), "online": ()}  # and the networks that each must have
REQUIRED = ("mode", "data", "batch_size", "num_steps", "init_seed", "data_seed")
DEFAULTS = {
    "checkpoint_every": 500,  # steps; each time the validation set is evaluated, too
    "log_every": 100,  # steps
    "steps_per_call": 0,  # 0: one on a CPU, ten on accelerators
    "devices": 0,  # 0: all that there are
    "micro_batches": 1,
    "plugins": (),
    "analysis": (),  # of `analysis.PROBES`: what is measured besides, every log_every steps
}
NETWORK_FIELDS = (
    "model",
    "optimizer",
    "terms",
    "checkpoint",
    "ema_decay",
    "project",
    "init_seed",  # its own, in place of the run's
)
GIVEN = "given"  # the model of a network, or the name of a data set, that the caller hands over


class Network(NamedTuple):
    """What a network's group stands for.

    Attributes:
        module: the flax module, with its projections; None for a network that the caller hands
            over.
        optimizer: a function of `train.optimizer`, bound.
        ema_decay: of the moving average of its parameters; None for none.
    """

    module: Module | None
    optimizer: Bound
    ema_decay: Array | Schedule | None


class Phase(NamedTuple):
    """A part of a run that trains some networks at once.

    Attributes:
        name: of the folder below workdir that holds it; "" for the last phase, which is workdir's.
        learners: the networks that learn.
        frozen: the networks that they see, and that do not learn.
        split: "teacher" (all labels), "labelled" (the labelled examples alone) or "train".
    """

    name: str
    learners: tuple[str, ...]
    frozen: tuple[str, ...]
    split: str


def networks(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The groups of the config that are networks, by name."""
    return {
        name: group
        for name, group in config.items()
        if isinstance(group, Mapping) and "model" in group
    }


def module(config: Mapping[str, Any], name: str, *, num_classes: int) -> Module:
    """The flax module of a network's group: the network alone, without projections.

    Args:
        config: as a plain dict.
        name: of the network.
        num_classes: K.

    Returns:
        The module.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    group = config[name]
    hypers = {key: value for key, value in group.items() if key not in NETWORK_FIELDS}
    return models.from_config(group["model"], hypers, num_classes=num_classes, field=name)


def network(config: Mapping[str, Any], name: str, *, num_classes: int) -> Network:
    """What it takes to train a network of the config.

    Args:
        config: as a plain dict.
        name: of the network.
        num_classes: K.

    Returns:
        Module (None for one that the caller hands over), optimiser and moving average.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    group = config[name]
    if not isinstance(group.get("optimizer"), Mapping):
        raise ValueError(
            f"{name}.optimizer must be a group dict(name='adam', learning_rate=...); "
            f"found {group.get('optimizer')!r}."
        )
    decay, num_steps = group.get("ema_decay"), config["num_steps"]
    return Network(
        None if group["model"] == GIVEN else _learning_module(config, name, num_classes),
        optimizer.from_config(group["optimizer"], field=f"{name}.optimizer", num_steps=num_steps),
        None if decay is None else number(decay, f"{name}.ema_decay", num_steps),
    )


def _learning_module(config: Mapping[str, Any], name: str, num_classes: int) -> Module:
    """The module together with the projections that its `project` asks for."""
    plain, project = module(config, name, num_classes=num_classes), config[name].get("project")
    if project is None:
        return plain
    width = project.get("hidden") if isinstance(project, Mapping) and len(project) == 1 else None
    others = [other for other in networks(config) if other != name]
    if not ((type(width) is int and width >= 1) or width in others):
        raise ValueError(
            f"{name}.project must be dict(hidden=WIDTH), with the width of the other network's "
            f"features, or dict(hidden=NAME), with its name; found {project!r}."
        )
    return models.projected(plain, hidden=width if type(width) is int else 1)


def with_widths(
    config: Mapping[str, Any], hidden_width: Callable[[str], int | None]
) -> dict[str, Any]:
    """The config with a width for each name in a `project`, which is left out where it is equal.

    Args:
        config: as a plain dict.
        hidden_width: of a network's features before any projection, by its name; None if it shows
            none.

    Returns:
        The config.

    Raises:
        ValueError: naming the network that shows no features.
    """
    resolved = dict(config)
    for name, group in networks(config).items():
        other = (group.get("project") or {}).get("hidden")
        if isinstance(other, str):
            width = hidden_width(other)
            if width is None:
                raise ValueError(
                    f"{name}.project: the model of {other!r} does not give 'hidden', the features "
                    "to project to."
                )
            resolved[name] = {key: value for key, value in group.items() if key != "project"}
            if width != hidden_width(name):
                resolved[name]["project"] = {"hidden": width}
    return resolved


def objectives(
    config: Mapping[str, Any],
    *,
    learners: Iterable[str],
    present: Iterable[str],
    class_means: Mapping[str, Callable[[], Array]] | None = None,
) -> dict[str, dict[str, Term]]:
    """The objectives of the networks that learn.

    Args:
        config: as a plain dict.
        learners: the names of the networks that learn.
        present: the names of all networks that take part in the step.
        class_means: by the name of a network that does not learn, what gives the means of its
            features over each class, [K, D]; by default, something in their place.

    Returns:
        {learner: {name: Term}}.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if class_means is None:
        class_means = {name: _in_place for name in present if name not in learners}
    return {
        learner: objective(
            config[learner].get("terms", {}),
            field=f"{learner}.terms",
            learner=learner,
            networks=list(present),
            num_steps=config["num_steps"],
            plugins=config.get("plugins", ()),
            class_means=class_means,
        )
        for learner in learners
    }


def _in_place() -> Array:
    """An array where there is no network yet."""
    return jnp.zeros((1, 1))


def phases(config: Mapping[str, Any]) -> list[Phase]:
    """The phases of a run, in order.

    Offline, each teacher that is to be trained has a phase of its own, and so has the `baseline`,
    which sees the labelled examples alone; then the student learns from the teachers. Online, all
    learn at once. A network with a `checkpoint`, or that is given without terms, is never trained.

    Args:
        config: as a plain dict.

    Returns:
        The phases.
    """
    found = networks(config)
    learn = [name for name, group in found.items() if not _is_ready(group)]
    if config["mode"] == "online":
        frozen = tuple(name for name in found if name not in learn)
        return [Phase("", tuple(learn), frozen, "train")]
    teachers = tuple(name for name in found if name not in ("student", "baseline"))
    run = [Phase(name, (name,), (), "teacher") for name in teachers if name in learn]
    if "baseline" in found:
        run.append(Phase("baseline", ("baseline",), (), "labelled"))
    return [*run, Phase("", ("student",), teachers, "train")]


def ready(config: Mapping[str, Any]) -> list[str]:
    """The networks of a config that are not trained: from a checkpoint, or given without terms."""
    return [name for name, group in networks(config).items() if _is_ready(group)]


def _is_ready(group: Mapping[str, Any]) -> bool:
    given = group["model"] == GIVEN and not group.get("terms")
    return bool(group.get("checkpoint")) or given


def check(config: Mapping[str, Any], *, given: Iterable[str] = (), has_data: bool = False) -> None:
    """Refuses a config from which no run can be built, before anything is built.

    Args:
        config: as a plain dict.
        given: the names of the networks that the caller hands over.
        has_data: whether the caller hands over the data.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    known = (*REQUIRED, *DEFAULTS)
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
    for key in ("init_seed", "data_seed"):
        _check_seed(key, config[key])
    for key in ("batch_size", "num_steps", *DEFAULTS):
        if key not in ("plugins", "analysis"):
            value, least = config.get(key, 1), 0 if DEFAULTS.get(key) == 0 else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key} must be an integer of at least {least}; found {value!r}.")
    if config["batch_size"] % (parts := config.get("micro_batches", 1)):
        raise ValueError(
            f"batch_size must be a multiple of micro_batches, {parts}; found "
            f"{config['batch_size']!r}."
        )
    try:
        check_probes(config.get("analysis", ()))
    except ValueError as error:
        raise ValueError(f"analysis: {error}") from None
    if not isinstance(config["mode"], str) or config["mode"] not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; found {config['mode']!r}.")
    for name in MODES[config["mode"]]:
        if name not in found:
            raise ValueError(f"the config lacks the network {name!r}; {config['mode']} needs it.")
    if not has_data:
        data.check(config["data"])
    _check_networks(config, found, set(given))


def _check_networks(config, found, given):
    """Refuses networks that cannot be built, and objectives that do not fit them."""
    if not found:
        raise ValueError("the config has no network, a group with a model; it needs at least one.")
    for name, group in found.items():
        _check_seed(f"{name}.init_seed", group.get("init_seed", 0))
    for name in given:
        if name not in found:
            raise ValueError(
                f"networks has {name!r}, which the config lacks; add {name}=dict(model='given')."
            )
    for name, group in found.items():
        if (group["model"] == GIVEN) != (name in given):
            raise ValueError(
                f"{name}.model must be 'given' exactly if networks= has {name!r}; "
                f"found {group['model']!r}."
            )
        if name not in given:
            module(config, name, num_classes=2)
        if not isinstance(group.get("checkpoint", ""), str):
            raise ValueError(
                f"{name}.checkpoint must be the workdir of another run, or ''; found "
                f"{group['checkpoint']!r}."
            )
        if "project" in group and (name in given or group.get("checkpoint")):
            raise ValueError(
                f"{name}.project is for a network of the library that learns in this run; found "
                f"{name} {'given' if name in given else 'from a checkpoint'}."
            )
    for phase in phases(config):
        if not phase.learners:
            raise ValueError("no network is left to learn: each has a checkpoint or no terms.")
        for name in phase.learners:
            if found[name].get("checkpoint"):
                raise ValueError(f"{name}.checkpoint must be empty: this network is to learn.")
            network(config, name, num_classes=2)
        present = (*phase.learners, *phase.frozen)
        objectives(config, learners=phase.learners, present=present)
        _check_twins(config, [name for name in phase.learners if name not in given])


def init_seed(config: Mapping[str, Any], name: str) -> int:
    """Of a network's parameters: its own, or the run's."""
    return config[name].get("init_seed", config["init_seed"])


def _check_seed(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} must be an integer of at least 0; found {value!r}.")
    if value >= 2**31:
        raise ValueError(f"{key} must be less than 2**31; found {value!r}.")


def _check_twins(config: Mapping[str, Any], learners: Sequence[str]) -> None:
    """Refuses networks that would learn together and start as one and the same."""
    begun = {}
    for name in learners:
        start = (_learning_module(config, name, 2), init_seed(config, name))
        if start in begun:
            raise ValueError(
                f"{name} and {begun[start]} are the same model with the same init_seed, "
                f"{start[1]}, so that they would start as one; give one of them its own: "
                f"{name}.init_seed={start[1] + 1}."
            )
        begun[start] = name
