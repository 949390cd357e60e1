"""The schema of a config, and the plan of a run that it becomes: `resolve`, once.

A top-level group with a `model` is a network; `phases` say who learns what from whom, in order;
`task` and `data` stand for functions; the rest are numbers of the run. What stands here was
checked, and is not checked again further on.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from abkd_jax import data as datasets
from abkd_jax.analysis.probe import check_probes
from abkd_jax.binding import domain_of, nearest
from abkd_jax.checks import require
from abkd_jax.config.build import Builder, refusing
from abkd_jax.config.dry_run import dry_run
from abkd_jax.config.networks import check_twins, networks_of
from abkd_jax.config.plan import GIVEN, SPLITS, Learner, Network, Phase, Plan, network_groups
from abkd_jax.config.vocabularies import check_vocabularies
from abkd_jax.models import Adapted, Decoder, base_of
from abkd_jax.sources import Setting
from abkd_jax.sources.written import check_responses_alone
from abkd_jax.train.checkpoint import FOLDER, digest
from abkd_jax.train.state import Decay
from abkd_jax.types import Tokens

DEFAULTS = {
    "task": {"fn": "classification"},
    "batch_size": 128,
    "num_steps": 1000,  # of a phase that does not give its own
    "checkpoint_every": 500,  # steps; each time the validation set is evaluated, too
    "log_every": 100,  # steps
    "steps_per_call": 0,  # 0: one on a CPU, ten on accelerators
    "devices": 0,  # 0: all that there are
    "fsdp": 1,  # over how many of them each network is split
    "micro_batches": 1,
    "chunk": 0,  # of how many rows unformed logits are formed at a time; 0: of as many as fit
    "init_seed": 0,
    "init_seeds": 1,  # how many, from init_seed on, for the networks of `Plan.seeded`
    "data_seed": 0,
    "plugins": (),
    "analysis": (),  # of `analysis.PROBES`: what is measured besides, every log_every steps
}
GROUPS = ("data", "phases")  # which have no default
_LEARNING = ("optimizer", "terms", "ema_decay")  # of a network, or of a phase in its place
_NETWORK = ("model", "weights", "adapter", "init_seed", "project", "published", *_LEARNING)
_PHASE = ("learn", "see", "split", "num_steps", "source", "start", "select")
_STARTS = ("last", "best")
# Which a workdir has besides its phases', as regular expressions.
_FOLDERS = (FOLDER, "figures", "nonfinite", "profile", "seed_[0-9]+")


def defaults() -> ml_collections.ConfigDict:
    """A config with every default, to which a config file adds data, networks and phases."""
    return ml_collections.ConfigDict(DEFAULTS)


def plain(config: Any) -> dict[str, Any]:
    """The config as plain dicts, defaults filled in, phases in the order in which they stand."""
    kinds = ml_collections.ConfigDict | Mapping
    require(isinstance(config, kinds), "config", "a ConfigDict or a mapping", config)
    frozen = isinstance(config, ml_collections.FrozenConfigDict)
    expected = "a ConfigDict that is not frozen, for freezing sorts the phases"
    require(not frozen, "config", expected, type(config).__name__)
    return DEFAULTS | _as_dicts(config)


def _as_dicts(value: Any) -> Any:
    if isinstance(value, ml_collections.ConfigDict):
        return {key: _as_dicts(value[key]) for key in ordered(value)}
    if isinstance(value, Mapping):
        return {key: _as_dicts(part) for key, part in value.items()}
    return value


def ordered(group: ml_collections.ConfigDict) -> list[str]:
    """The keys of a group, such as the phases, in the order in which they were written.

    A ConfigDict shows its keys sorted; in the order of writing they stand in `_fields` alone.
    """
    return list(vars(group).get("_fields", group))


def identified(config: Any, data: datasets.DataSet | None) -> dict[str, Any]:
    """`plain`, with a set of the caller's own by its checksum."""
    config = plain(config)
    if data is not None:
        expected = "a DataSet, such as data.from_arrays makes"
        require(isinstance(data, datasets.DataSet), "data", expected, data)
        config["data"] = GIVEN | {"sha256": digest(data)}
    return config


def resolve(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    *,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
    data: datasets.DataSet | None = None,
) -> Plan:
    """What a config asks for, or one sentence that says why that cannot be.

    Args:
        config: of a run; see configs/.
        networks: {name: (apply_fn, variables)} for the networks with model=dict(fn="given").
        data: a set of the caller's own (`data.from_arrays`), in place of the config's.

    Returns:
        The plan. No example was read, no array made and no folder touched.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    expected = "a mapping {name: (apply_fn, variables)}"
    require(isinstance(networks, Mapping | None), "networks", expected, networks)
    config, given = identified(config, data), dict(networks or {})
    _check(config)
    builder = Builder(config["plugins"], config["num_steps"])
    read, description = _data(config, builder, data)
    task = builder.bound(config["task"], "task", "task")()
    plan = Plan(config, builder, task, read, description, networks={}, phases=())
    plan = plan._replace(networks=networks_of(plan, given))
    check_vocabularies(config)
    plan = plan._replace(phases=tuple(_phases(plan)))
    of_two = any(len(terms) > 1 for phase in plan.phases for terms in phase.objectives.values())
    if "gradient_cosines" in config["analysis"] and not of_two:
        raise ValueError("analysis: gradient_cosines are between terms, and no learner has two.")
    if plan.task.responses:
        _check_responses(plan)
    writes = [phase.name for phase in plan.phases if phase.source.masks]
    if config["analysis"] and writes:
        raise ValueError(
            f"analysis: its probes are of batches of data, and the source of phases.{writes[0]} "
            "writes others; leave one of the two out."
        )
    if config["init_seeds"] > 1:
        _check_seeds(plan)
    shown = [dry_run(plan, phase) for phase in plan.phases]
    return plan._replace(unformed=any(x.unformed for outputs in shown for x in outputs.values()))


def _check(config: Mapping[str, Any]) -> None:
    """Refuses unknown keys, and numbers of the run that are none."""
    known, networks, phases = (*GROUPS, *DEFAULTS), network_groups(config), config.get("phases")
    expected = "a group of phases by name, in order, such as dict(distill=dict(learn=('student',)))"
    require(isinstance(phases, Mapping) and phases, "phases", expected, phases)
    for key, value in config.items():
        if key not in known and key not in networks:
            what = "group without a model" if isinstance(value, Mapping) else "key"
            raise ValueError(
                f"the config has the unknown {what} {key!r}{nearest(key, known)}; it takes "
                f"{', '.join(known)}, and networks, which have a model."
            )
    for key, default in DEFAULTS.items():
        if type(default) is int:
            check_integer(key, config[key], least=min(default, 1))
    batch_size, parts = config["batch_size"], config["micro_batches"]
    expected = f"a multiple of micro_batches, {parts}"
    require(batch_size % parts == 0, "batch_size", expected, batch_size)
    with refusing(ValueError, "analysis: "):
        check_probes(config["analysis"])
    if not networks:
        raise ValueError("the config has no network, a group with a model; it needs at least one.")
    for name, group in networks.items():
        require(name not in _PHASE, "a network's name", f"none of {', '.join(_PHASE)}", name)
        _check_keys(group, _NETWORK, name)
        check_integer(f"{name}.init_seed", group.get("init_seed", 0), least=0)
        published, numbers = group.get("published"), (int, float)
        fits = published is None or (type(published) in numbers and math.isfinite(published))
        require(fits, f"{name}.published", "the score that its source gives, a number", published)


def check_integer(key: str, value: Any, *, least: int) -> None:
    """Refuses what is no integer, too small, or too large for a seed."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    expected = f"an integer of at least {least} and less than 2**31"
    require(integer and least <= value < 2**31, key, expected, value)


def _check_responses(plan: Plan) -> None:
    """Refuses texts of networks that write none, or of data that have none, a text in each row."""
    text = isinstance(plan.description.inputs, Tokens)
    group = plan.config.get("data", {})
    require(text, "task.responses", "0 for data that are no text", group.get("fn"))
    packed = group.get("pack", False)
    require(not packed, "data.pack", "False where task.responses are written", packed)
    check_responses_alone(group)
    for name, network in plan.networks.items():
        fits = isinstance(base_of(network.module), Decoder) or not network.judged
        require(fits, "task.responses", f"0 where {name} is no decoder", plan.task.responses)


def _check_seeds(plan: Plan) -> None:
    """Refuses several init seeds where none tells the networks apart, or one is too large."""
    count, learned = plan.config["init_seeds"], {name: plan.networks[name] for name in plan.seeded}
    new = [x.init_seed for x in learned.values() if is_drawn(x)]
    of = " and ".join(sorted(learned))
    expected = f"1, for a seed changes nothing where the parameters of {of} are given"
    require(new, "init_seeds", expected, count)
    check_seeds(new, count)


def is_drawn(network: Network) -> bool:
    """Whether its init seed draws parameters of a network, or factors beside them."""
    return isinstance(network.module, Adapted) or not (network.weights or network.given)


def check_seeds(first: Iterable[int], count: int) -> None:
    """Refuses more init seeds, from the first ones on, than there are."""
    expected = "as many as leave every init seed below 2**31"
    require(max(first) + count <= 2**31, "init_seeds", expected, count)


def _check_keys(group: Any, known: Iterable[str], field: str) -> None:
    if not isinstance(group, Mapping):
        raise ValueError(f"{field} must be a group; found {group!r}.")
    for key in group:
        if key not in known:
            raise ValueError(
                f"{field}.{key} is unknown{nearest(key, known)}; {field} takes {', '.join(known)}."
            )


def _data(
    config: Mapping[str, Any], builder: Builder, given: datasets.DataSet | None
) -> tuple[Callable[[], datasets.DataSet], datasets.Description]:
    """What reads the data, and what is known before."""
    if given is not None:
        return lambda: given, datasets.describe(given)
    group, seed = config.get("data"), config["data_seed"]
    if isinstance(group, Mapping) and group.get("fn") == GIVEN["fn"]:
        raise ValueError("data.fn is 'given', but no data are handed over; pass data=.")
    function = builder.bound(group, "data", "data")
    if hasattr(function.fn, "describe"):
        description = function.replace(fn=function.fn.describe)(data_seed=seed)
        return lambda: function(data_seed=seed), description
    read = function(data_seed=seed)
    return lambda: read, datasets.describe(read)


def _phases(plan: Plan) -> list[Phase]:
    """The phases, their objectives bound."""
    networks, groups = plan.networks, plan.config["phases"]
    phases, ready = [], {name for name, x in networks.items() if x.weights or x.given}
    for name, group in groups.items():
        folder = isinstance(name, str) and name.isidentifier()
        folder = folder and not re.fullmatch("|".join(_FOLDERS), name)
        expected = f"an identifier, for the phase's folder, and none of {', '.join(_FOLDERS)}"
        require(folder, "a phase's name", expected, name)
        phase = _phase(plan, name, group, folder="" if name == list(groups)[-1] else name)
        for other in phase.see:
            if other not in ready:
                raise ValueError(
                    f"phases.{name} sees {other}, which has not learned by then; give it a phase "
                    f"before, or {other}.weights."
                )
        new = [learner for learner in phase.learners if learner not in ready]
        check_twins(networks, phase, new)
        ready.update(phase.learners)
        phases.append(phase)
    for name in networks:
        if not any(name in (*phase.learners, *phase.see) for phase in phases):
            raise ValueError(f"no phase names the network {name}; leave it out, or let it learn.")
    return phases


def _phase(plan: Plan, name: str, group: Any, folder: str) -> Phase:
    at, networks = f"phases.{name}", plan.networks
    _check_keys(group, (*_PHASE, *networks), at)
    learn, see = _names(group, "learn", at, networks), _names(group, "see", at, networks)
    require(learn, f"{at}.learn", f"at least one network, of {', '.join(networks)}", learn)
    both = [other for other in see if other in learn]
    require(not both, f"{at}.see", "networks that do not learn in this phase", both)
    split, start = group.get("split", "train"), group.get("start", "last")
    require(split in list(SPLITS), f"{at}.split", f"one of {', '.join(SPLITS)}", split)
    require(start in _STARTS, f"{at}.start", f"one of {', '.join(_STARTS)}", start)
    num_steps = group.get("num_steps", plan.config["num_steps"])
    check_integer(f"{at}.num_steps", num_steps, least=1)
    select = group.get("select", learn[0] if len(learn) == 1 else None)
    expected = f"one of {', '.join(learn)}, which learn here"
    require(select in (None, *learn), f"{at}.select", expected, select)
    source = group.get("source", {"fn": "dataset"})
    source = Builder(plan.builder.plugins, num_steps).bound(source, "source", f"{at}.source")
    taking = {key: networks[key].module for key in (*learn, *see)}
    given, size = plan.config.get("data", {}), plan.config["batch_size"]
    setting = Setting(f"{at}.source", learn, taking, plan.description, given, size, num_steps)
    source = source.fn(**source.numbers, **dict(source.static), setting=setting)  # with schedules
    expected = f"train or full, for the source of {at} depends on networks"
    require(not source.refill or split != "labelled", f"{at}.split", expected, split)
    phase = Phase(name, folder, {}, see, split, num_steps, source, start, select)
    for key in [key for key in (*learn, *see) if networks[key].cached]:
        if key in learn:
            raise ValueError(f"{at}.learn: {key} is known by its outputs alone and cannot learn.")
        expected = f"'dataset', for the outputs of {key} are of the data's examples alone"
        require(not source.refill, f"{at}.source.fn", expected, group.get("source"))
    learners = {key: _learner(plan, phase, key, group.get(key, {}), learn) for key in learn}
    for key in networks:
        if key in group and key not in learn:
            raise ValueError(f"{at}.{key} is for a network that learns here; {at} has {learn!r}.")
    return phase._replace(learners=learners)


def _names(group: Mapping[str, Any], key: str, at: str, known: Iterable[str]) -> tuple[str, ...]:
    """A phase's list of networks."""
    names, expected = group.get(key, ()), f"a list of networks, each once, of {', '.join(known)}"
    fits = isinstance(names, tuple | list) and all(name in list(known) for name in names)
    require(fits and len(set(names)) == len(names), f"{at}.{key}", expected, names)
    return tuple(names)


def _learner(plan: Plan, phase: Phase, name: str, own: Any, learn: Iterable[str]) -> Learner:
    """How a network learns in a phase, which may replace some of its parts by its own."""
    at, builder = f"phases.{phase.name}.{name}", Builder(plan.builder.plugins, phase.num_steps)
    _check_keys(own, _LEARNING, at)
    group = plan.config[name] | own
    fields = {key: f"{at if key in own else name}.{key}" for key in _LEARNING}
    decay = group.get("ema_decay")
    if decay is not None:
        decay = builder.number(decay, fields["ema_decay"], domain_of(Decay))
    others = [*learn, *phase.see]
    masks = *plan.description.masks, *phase.source.masks
    options = {"field": fields["terms"], "learner": name, "networks": others, "masks": masks}
    terms = builder.objective(group.get("terms"), **options)
    optimizer = builder.bound(group.get("optimizer"), "optimizer", fields["optimizer"])
    return Learner(terms, optimizer, decay)


def needed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the phases, and the networks, that its last phase does without."""
    phases = config.get("phases")
    if not isinstance(phases, Mapping) or not all(isinstance(x, Mapping) for x in phases.values()):
        return dict(config)  # which `resolve` refuses
    wanted, kept = set(), {}
    for name, phase in reversed(phases.items()):
        if not kept or wanted & set(phase.get("learn", ())):
            wanted |= {*phase.get("learn", ()), *phase.get("see", ())}
            kept = {name: phase} | kept
    unwanted = network_groups(config).keys() - wanted
    rest = {key: value for key, value in config.items() if key not in unwanted}
    return rest | {"phases": kept}
