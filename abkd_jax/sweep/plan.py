"""The members of a sweep: swept numbers put into a plan's objectives and optimisers, as arrays."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax.binding import (
    Bound,
    Domain,
    Schedule,
    Statistic,
    as_number,
    domain_of,
    hyperparameters,
    nearest,
)
from abkd_jax.checks import require
from abkd_jax.config.plan import Learner, Network, Phase
from abkd_jax.train.state import Decay
from abkd_jax.types import Term

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


def planned(
    phase: Phase,
    networks: Mapping[str, Network],
    over: Mapping[str, Sequence[float]],
    init_seeds: int,
    init_seed: int,
) -> Members:
    """The members of a sweep.

    Args:
        phase: in which they learn.
        networks: of the plan.
        over: {path: values}.
        init_seeds: how many.
        init_seed: of the run, from which they count; a network's own goes along.

    Returns:
        The members.

    Raises:
        ValueError: one sentence that names the path and what it should be.
    """
    if not isinstance(over, Mapping) or not over:
        raise ValueError(
            f"over must be a mapping {{path: values}} of at least one number to sweep, such as "
            f"{_EXAMPLE!r}; found {over!r:.80}."
        )
    over = {path: _checked(path, values) for path, values in over.items()}
    own = {name: networks[name].init_seed for name in phase.learners}
    expected = "as many as leave every init seed below 2**31"
    require(max(own.values()) + init_seeds <= 2**31, "init_seeds", expected, init_seeds)
    grid = list(itertools.product(*over.values(), range(init_seeds)))
    learners: Any = dict(phase.learners)
    for column, (path, values) in enumerate(over.items()):
        leaf = jnp.asarray([row[column] for row in grid], float)
        learners = _put(path, learners, path.split("."), leaf, values, None, phase.num_steps)
    stack = lambda new, old: jnp.broadcast_to(new, (len(grid), *old.shape)) if new is old else new  # noqa: E731
    stacked = map_numbers(stack, learners, dict(phase.learners))
    points = [
        dict(zip(over, map(float, numbers), strict=True)) | {"init_seed": init_seed + offset}
        for *numbers, offset in grid
    ]
    offsets = np.asarray([row[-1] for row in grid])
    return Members(points, over, stacked, {name: seed + offsets for name, seed in own.items()})


def map_numbers(f: Callable, learners: Any, *others: Any) -> Any:
    """`jax.tree.map` that leaves each `Statistic` as it is."""
    call = lambda x, *rest: x if isinstance(x, Statistic) else f(x, *rest)  # noqa: E731
    return jax.tree.map(call, learners, *others)


def _checked(path: str, values: Any) -> list[float]:
    """Values as a plain list of different numbers, so that arrays of any library do."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    fits = isinstance(listed, Sequence) and not isinstance(listed, str) and len(listed) > 0
    fits = fits and all(map(_is_number, listed)) and len(set(listed)) == len(listed)
    require(fits, f"over {path}", "a list of different numbers", values)
    return list(listed)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool) and math.isfinite(value)


def _put(
    path: str,
    node: Any,
    keys: list[str],
    leaf: Any,
    values: list[float],
    domain: Domain | None,
    num_steps: int,
) -> Any:
    """The node with the leaf in the place of a number; the values are judged by its domain."""
    if not keys:
        if node is None or isinstance(node, Mapping | Term | Bound | Learner):
            raise ValueError(f"over {path}: there must be one number; found a {_kind(node)}.")
        try:
            as_number(values, f"over {path}", domain)
        except TypeError as error:
            raise ValueError(f"{error}") from None
        return leaf
    key, *rest = keys
    known = dict(_children(node))
    if key == "init_seed":
        raise ValueError(f"over {path}: seeds are swept by init_seeds.")
    if isinstance(node, Bound) and key in dict(node.static):
        raise ValueError(f"over {path}: this changes the program; sweep numbers alone.")
    if key not in known:
        at = path.removesuffix(".".join(keys)).rstrip(".") or "a sweep"
        raise ValueError(
            f"over {path}: {at} has no {key!r}{nearest(key, known)}; it has "
            f"{', '.join(known) or 'nothing below it'}."
        )
    child, inner = known[key]
    new = _put(path, child, rest, leaf, values, inner, num_steps)
    if isinstance(child, Schedule) and inner is not None:
        visited = [new(num_steps * part // 8) for part in range(9)]
        if not all(map(inner.has, visited)):
            raise ValueError(f"over {path}: the schedule must stay {inner}; found {values!r}.")
    return _with_child(node, key, new)


def _children(node: Any) -> Iterator[tuple[str, tuple[Any, Domain | None]]]:
    """(name, (part, its domain if it is a number)) of what a path can go through."""
    if isinstance(node, Learner):
        yield "terms", (node.terms, None)
        yield "optimizer", (node.optimizer, None)
        yield "ema_decay", (node.ema_decay, domain_of(Decay))
    elif isinstance(node, Term):
        yield "weight", (node.weight, Domain())
        yield from _children(node.loss)
    elif isinstance(node, Bound):
        known = hyperparameters(node.fn)
        for name, part in node.numbers.items():
            yield name, (part, domain_of(known[name].annotation))
    elif isinstance(node, Mapping):
        for name, part in node.items():
            yield name, (part, None)


def _with_child(node: Any, key: str, child: Any) -> Any:
    if isinstance(node, Learner):
        return node._replace(**{key: child})
    if isinstance(node, Term):
        if key == "weight":
            return node.replace(weight=child)
        return node.replace(loss=_with_child(node.loss, key, child))
    if isinstance(node, Bound):
        return node.replace(numbers={**node.numbers, key: child})
    return {**node, key: child}


def _kind(node: Any) -> str:
    return "group" if isinstance(node, Mapping | Learner) else type(node).__name__.lower()
