"""Mass flow: how much probability a change moves into groups of classes."""

import itertools
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.analysis.checks import check_cached, check_values
from abkd_jax.binding import Unit


def mass_change(student_logits: Array, log_ratio: Array) -> Array:
    """q after - q before = q (e^LogR - 1), exact also where it is tiny.

    Args:
        student_logits: `[..., K]`, before the change.
        log_ratio: `[..., K]`, of a `Reassignment`.

    Returns:
        `[..., K]`, of sum 0 over the classes; 0 at a class that is removed.

    Raises:
        AssertionError: if log_ratio has another shape.
    """
    logits = check_values(student_logits, "student_logits")
    checks.check_array("log_ratio", log_ratio, float, logits.shape, "as student_logits")
    log_q = numerics.log_probabilities(logits)
    # Where q grows past measure, q e^LogR in one piece: e^LogR alone could overflow.
    after = jnp.exp(log_q + jnp.maximum(log_ratio, 1.0)) - jnp.exp(log_q)
    return jnp.where(
        log_ratio > 1.0, after, jnp.exp(log_q) * jnp.expm1(jnp.minimum(log_ratio, 1.0))
    )


def mass_flow(change: Array, groups: Mapping[str, Array]) -> dict[str, Array]:
    """The net mass that flows into each group of classes.

    Args:
        change: `[..., K]`, such as `mass_change`.
        groups: by name, `[..., K]` bool; leading axes broadcast.

    Returns:
        `[...]` for each group, by its name; over groups that part the classes the sum is 0.

    Raises:
        AssertionError: if a group is not bool, or its shape does not fit.
    """
    for name, group in groups.items():
        shape = getattr(group, "shape", ())
        fits = checks.broadcast_shape(shape, change.shape) and shape[-1:] == change.shape[-1:]
        expected = f"bool over the {change.shape[-1]} classes, with leading axes that broadcast"
        is_mask = getattr(group, "dtype", None) == np.bool_
        checks.require(fits and is_mask, f"groups[{name!r}]", expected, group, AssertionError)
    return {name: jnp.sum(jnp.where(g, change, 0.0), axis=-1) for name, g in groups.items()}


def moved_mass(change: Array) -> Array:
    """The mass that changes class, sum |change| / 2: `[..., K]` -> `[...]`, in [0, 1]."""
    return 0.5 * jnp.sum(jnp.abs(change), axis=-1)


def over_and_underestimated(student_logits: Array, teacher_logits: Array) -> dict[str, Array]:
    """The classes by the sign of the student's error.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[..., K]` bool: "underestimated" where p > q, "overestimated" where p <= q.
    """
    under = numerics.log_ratio(*check_cached(student_logits, teacher_logits)) > 0
    return {"underestimated": under, "overestimated": ~under}


def target_and_rest(labels: Array, num_classes: int) -> dict[str, Array]:
    """The labelled class and the others.

    Args:
        labels: `[...]` integers; a withheld one (-1) has no target, so all classes are rest.
        num_classes: K.

    Returns:
        `[..., K]` bool: "target" and "rest".
    """
    target = jnp.asarray(labels)[..., None] == jnp.arange(num_classes)
    return {"target": target, "rest": ~target}


def head_and_tail(logits: Array, *, head_mass: Unit = 0.5) -> dict[str, Array]:
    """The likeliest classes and the others, by mass, with the head of `adaptive_kl`.

    The head is the likeliest class, and those that follow as long as the sum of their
    probabilities is at most `head_mass`. For a head of k classes see `by_rank`.

    Args:
        logits: `[..., K]`, the teacher's as a rule.
        head_mass: in [0, 1], or an array that broadcasts to the leading axes.

    Returns:
        `[..., K]` bool: "head" and "tail".

    Raises:
        ValueError: if the number does not broadcast.
    """
    logits = check_values(logits)
    p = jnp.exp(numerics.log_probabilities(logits))
    head = numerics.head(p, numerics.per_row("head_mass", head_mass, logits))
    return {"head": head, "tail": ~head}


def head_middle_and_tail(
    logits: Array, *, head_mass: Unit = 0.5, middle_mass: Unit = 0.95
) -> dict[str, Array]:
    """The classes in three by mass: `head_and_tail`, with a second head cut from the tail.

    Args:
        logits: `[..., K]`, the teacher's as a rule.
        head_mass: as for `head_and_tail`.
        middle_mass: up to which sum of probabilities, the head's included, classes are no tail.

    Returns:
        `[..., K]` bool: "head", "middle" and "tail".

    Raises:
        ValueError: if a number does not broadcast.
    """
    head = head_and_tail(logits, head_mass=head_mass)["head"]
    tail = head_and_tail(logits, head_mass=middle_mass)["tail"]
    return {"head": head, "middle": ~head & ~tail, "tail": ~head & tail}


def by_rank(logits: Array, *, edges: tuple[int, ...]) -> dict[str, Array]:
    """The classes in buckets by how likely they are; of equal ones the first in order comes first.

    Args:
        logits: `[..., K]`, the teacher's or the student's.
        edges: how many classes lie in the first bucket, in the first two, and so on, rising;
            `(1, 5)` gives the likeliest, the next four and the others, and `(k,)` the top k.

    Returns:
        `[..., K]` bool for each bucket, by name: "1", "2-5", "6-" for `(1, 5)`.

    Raises:
        ValueError: if the edges do not rise from at least 1.
    """
    logits = check_values(logits)
    counts = isinstance(edges, tuple | list) and all(isinstance(e, int | np.integer) for e in edges)
    rise = counts and edges and all(a < b for a, b in itertools.pairwise((0, *edges)))
    checks.require(rise, "edges", "a tuple of counts of classes that rise from 1", edges)
    ranks = _ranks(logits)
    groups = {}
    for start, stop in zip((0, *edges), (*edges, None), strict=True):
        name = f"{start + 1}-" if stop is None else f"{start + 1}-{stop}"
        inside = ranks >= start if stop is None else (ranks >= start) & (ranks < stop)
        groups[str(stop) if stop == start + 1 else name] = inside
    return groups


def _ranks(logits: Array) -> Array:
    """0 at the largest."""
    return jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(logits), axis=-1), axis=-1)
