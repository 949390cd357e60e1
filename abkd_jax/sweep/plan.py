"""The members of a sweep: swept numbers put into a plan's objectives and optimisers, as arrays."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.tree_util import GetAttrKey, KeyPath

from abkd_jax.binding import Bound, Domain, Schedule, Statistic, as_number, domain_of, nearest
from abkd_jax.checks import require
from abkd_jax.config.plan import Learner, Plan
from abkd_jax.config.schema import check_seeds, is_drawn
from abkd_jax.train.state import Decay
from abkd_jax.types import dotted

_EXAMPLE = "student.terms.distill.divergence.alpha"


class Members(NamedTuple):
    """The members of a sweep.

    Attributes:
        points: the swept numbers of each, by path, and its init seed.
        over: the swept values, by path; members go through them in this order, seeds the fastest.
        learners: by name, with an axis of members before those of every number.
        seeds: `[members]` of each learner, by name.
    """

    points: list[dict[str, float | int]]
    over: dict[str, list[float]]
    learners: dict[str, Learner]
    seeds: dict[str, np.ndarray]


def planned(plan: Plan, over: Mapping[str, Sequence[float]], init_seeds: int) -> Members:
    """The members of a sweep.

    Args:
        plan: of the run, in whose last phase they learn.
        over: {path: values}.
        init_seeds: how many, counted from the run's; a network's own goes along.

    Returns:
        The members.

    Raises:
        ValueError: one sentence that names the path and what it should be.
    """
    expected = f"a mapping {{path: values}} of at least one number to sweep, such as {_EXAMPLE!r}"
    require(isinstance(over, Mapping) and over, "over", expected, over)
    over = {path: _listed(path, values) for path, values in over.items()}
    learners = plan.phases[-1].learners
    own = {name: plan.networks[name].init_seed for name in learners}
    check_seeds(own.values(), init_seeds)
    if init_seeds > 1:
        _check_drawn(plan, init_seeds)
    grid = list(itertools.product(*over.values(), range(init_seeds)))
    swept = {
        path: jnp.asarray([row[column] for row in grid], float) for column, path in enumerate(over)
    }
    for path, values in over.items():
        _check(path, values, learners, plan.phases[-1].num_steps)

    def stacked(path: KeyPath, leaf: Any) -> Any:
        if isinstance(leaf, Statistic):
            return leaf
        return swept.get(_name(path), jnp.broadcast_to(leaf, (len(grid), *leaf.shape)))

    points = [
        dict(zip(over, map(float, numbers), strict=True))
        | {"init_seed": plan.config["init_seed"] + offset}
        for *numbers, offset in grid
    ]
    offsets = np.asarray([row[-1] for row in grid])
    seeds = {name: seed + offsets for name, seed in own.items()}
    return Members(points, over, jax.tree.map_with_path(stacked, learners), seeds)


def _check_drawn(plan: Plan, count: int) -> None:
    """Refuses several init seeds where those of a single run would be others."""
    *before, phase = plan.phases
    for name in phase.learners:
        expected = f"1, for {name} has learned before, in a phase that all members share"
        require(not any(name in x.learners for x in before), "init_seeds", expected, count)
    new = [name for name in phase.learners if is_drawn(plan.networks[name])]
    of = " and ".join(sorted(phase.learners))
    expected = f"1, for a seed changes nothing where the parameters of {of} are given"
    require(new, "init_seeds", expected, count)


def map_numbers(f: Callable, learners: Any) -> Any:
    """`jax.tree.map` that leaves each `Statistic` as it is."""
    return jax.tree.map(lambda x: x if isinstance(x, Statistic) else f(x), learners)


def _listed(path: str, values: Any) -> list[float]:
    """Values as a plain list of different numbers, so that arrays of any library do."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    fits = isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed) > 0
    fits = fits and all(map(_is_number, listed)) and len(set(listed)) == len(listed)
    require(fits, f"over {path}", "a list of different numbers to sweep", values)
    return list(listed)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool) and math.isfinite(value)


def _name(path: KeyPath) -> str:
    """A leaf's path as people write it: "student.terms.distill.divergence.alpha"."""
    inner = (GetAttrKey("loss"), GetAttrKey("numbers"))
    return dotted(tuple(key for key in path if key not in inner))


def _check(path: str, values: list[float], learners: Mapping[str, Learner], num_steps: int) -> None:
    """Refuses a path at which there is no number, and values outside of its domain."""
    leaves = jax.tree.leaves_with_path(learners)
    known = {_name(found): found for found, x in leaves if not isinstance(x, Statistic)}
    if path not in known:
        raise ValueError(f"over {path}: {_missing(path.split('.'), known)}.")
    node, owner, domain, schedule = learners, None, Domain(), None
    for key in known[path]:
        name = getattr(key, "key", getattr(key, "name", None))
        if isinstance(owner, Bound):  # and this is one of its numbers
            domain = owner.domain(name)
        elif isinstance(node, Learner) and name == "ema_decay":
            domain = domain_of(Decay)
        owner, node = node, node[name] if isinstance(node, Mapping) else getattr(node, name)
        schedule = (node, domain) if isinstance(node, Schedule) else schedule
    as_number(values, f"over {path}", domain)
    if schedule is not None:
        built, whole = schedule
        built = built.replace(numbers={**built.numbers, name: jnp.asarray(values, float)})
        stays = all(whole.has(built(num_steps * part // 8)) for part in range(9))
        require(stays, f"over {path}", f"such that the schedule stays {whole}", values)


def _missing(keys: list[str], known: Iterable[str]) -> str:
    """Where a path leaves the known ones, and what is there."""
    if keys[-1] == "init_seed":
        return "seeds are swept by init_seeds"
    names = [name.split(".") for name in known]
    for depth, key in enumerate(keys):
        inside = [parts for parts in names if len(parts) > depth and parts[:depth] == keys[:depth]]
        below = list(dict.fromkeys(parts[depth] for parts in inside))
        if key not in below:
            above = ".".join(keys[:depth]) or "a sweep"
            has = f"it has {', '.join(below)}" if below else "it is a number"
            return f"{above} has no {key!r} to sweep{nearest(key, below)}; {has}"
    return "there must be a number, not a group of some"
