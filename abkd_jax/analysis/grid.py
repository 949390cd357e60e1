"""Large sets of logits over a grid of numbers: one program, a few rows at a time."""

import functools
from typing import Any

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, parallel
from abkd_jax.analysis.checks import check_cached
from abkd_jax.analysis.effects import tightness, upper_bound
from abkd_jax.analysis.flow import (
    head_middle_and_tail,
    mass_change,
    mass_flow,
    moved_mass,
    over_and_underestimated,
)
from abkd_jax.analysis.gradients import cosine, gradient_norm, logit_gradient
from abkd_jax.analysis.reassignment import log_mass_ratio
from abkd_jax.binding import Bound, NonNegative, Number
from abkd_jax.divergences import forward_kl
from abkd_jax.losses.chunks import chunked
from abkd_jax.types import Divergence, Outputs


@struct.dataclass
class Summary:
    """The distribution over examples of a quantity, at each of G points of a grid.

    Attributes:
        mean: `[G]`.
        deviation: `[G]`, the standard deviation (of the examples themselves, divided by n).
        lowest: `[G]`.
        highest: `[G]`.
    """

    mean: Array
    deviation: Array
    lowest: Array
    highest: Array


def over_grid(
    fn: Bound,
    student_logits: Array | Outputs,
    teacher_logits: Array | Outputs,
    *,
    where: Array | None = None,
    chunk: int = 16,
) -> dict[str, Summary]:
    """Evaluates a function on all rows at each point of a grid of its numbers.

    The numbers of `fn` are data: those that are `[G]` arrays make the grid, scalars are shared. So

        fn = bind(reassignment_summary, learning_rate=0.1,
                  divergence=bind(alpha_beta, alpha=alphas, beta=betas))

    with `alphas` and `betas` `[G]`, their points laid out by `jnp.meshgrid(...)` and raveled, is
    one compile, and another grid of G points none. The rows are visited in chunks, all points of
    the grid at once in each, and only sums are kept: the memory is that of the logits themselves
    and of G x chunk x K numbers, several times. Several local devices share the points, and each
    has all logits: not to be called inside `jit`.

    Args:
        fn: student_logits `[n, K]`, teacher_logits `[n, K]` -> {name: `[n]`}, bound.
        student_logits: `[..., K]`; all leading axes together are the rows. A network's outputs may
            stand for them, whose logits, if unformed, are formed a chunk at a time.
        teacher_logits: `[..., K]`; likewise, then with the same leading axes.
        where: `[...]` bool, the rows that count; None for all.
        chunk: how many rows at a time. Few are fast on a CPU, whose caches then hold them; an
            accelerator wants more.

    Returns:
        A `Summary` over rows by the names that `fn` gives, in alphabetical order. Where no row
        counts, mean and deviation are 0, lowest is inf and highest -inf.

    Raises:
        AssertionError: if `where` is not bool `[...]`, or logits do not fit each other.
        ValueError: if `fn` is not bound, its numbers make no grid, or `chunk` is no integer of at
            least 1.
    """
    checks.require(isinstance(fn, Bound), "fn", "bound: bind(function, ...)", fn)
    is_count = isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1
    checks.require(is_count, "chunk", "an integer of at least 1", chunk)
    networks = _checked(student_logits, teacher_logits)
    where = checks.check_where(where, jax.eval_shape(_logits, networks)[0].shape[:-1])
    if not where.size:  # which XLA cannot share
        row = lambda x: jnp.zeros((1, *x.shape[where.ndim :]), x.dtype)  # noqa: E731
        networks, where = tuple(x.map_rows(row) for x in networks), jnp.zeros(1, bool)
    leaves, structure = jax.tree.flatten(fn)
    sizes = {leaf.shape for leaf in leaves} - {()}
    is_grid = len(sizes) == 1 and len(min(sizes)) == 1 and 0 not in min(sizes)
    expected = "scalars and at least one array, all arrays [G], not empty"
    checks.require(is_grid, "the numbers of fn", expected, sorted(map(list, sizes)))
    points = {place: leaf for place, leaf in enumerate(leaves) if leaf.ndim}
    fixed = {place: leaf for place, leaf in enumerate(leaves) if not leaf.ndim}
    return parallel.spread(_at_point(structure, chunk), points, fixed, networks, where)


def _checked(*given: Array | Outputs) -> tuple[Outputs, Outputs]:
    """The logits, or what stands for them, of the same rows; refused if they are no pair."""
    if not any(isinstance(x, Outputs) for x in given):
        return tuple(Outputs(logits=x) for x in check_cached(*given))
    named = zip(("student_logits", "teacher_logits"), given, strict=True)
    shown = {name: x if isinstance(x, Outputs) else Outputs(logits=x) for name, x in named}
    for name, x in shown.items():
        has_any = x.unformed or x.logits is not None
        checks.require(has_any, name, "outputs with logits, or hidden and head", None)
    parts = [Outputs(logits=x.logits) if not x.unformed else x for x in shown.values()]
    parts = tuple(x.replace(features=None, projected=None, input_gradient=None) for x in parts)
    leading = {x.shape[:-1] for x in jax.eval_shape(_logits, parts)}
    checks.require(len(leading) == 1, " and ".join(shown), "of the same rows", sorted(leading))
    return parts


def _logits(networks: tuple[Outputs, Outputs]) -> tuple[Array, Array]:
    """The logits of both, in one dtype."""
    return checks.check_logits(*(x.formed().logits for x in networks))


@functools.lru_cache
def _at_point(structure, chunk):
    """The summaries at one point: one function for equal arguments, which compiles once."""

    def at_point(numbers, fixed, networks, where):
        leaves = numbers | fixed
        fn = structure.unflatten([leaves[place] for place in sorted(leaves)])
        return _over_rows(fn, networks, where, chunk)

    return at_point


def _over_rows(fn, networks, where, chunk):
    """A `Summary` by name, at one point."""

    def step(carry, part):
        *rows, kept = part
        shown = (x.replace(head=network.head) for x, network in zip(rows, networks, strict=True))
        values = fn(*_logits(tuple(shown)))
        return {n: _joined(carry[n], _moments(v, kept)) for n, v in values.items()}, None

    split = functools.partial(chunked, leading=where.ndim, chunk=chunk)
    parts = jax.tree.map(split, (*(x.replace(head=None) for x in networks), where))
    some = jax.eval_shape(_logits, networks)[0]
    some = jax.ShapeDtypeStruct((chunk, some.shape[-1]), some.dtype)
    shapes = jax.eval_shape(fn, some, some)
    nothing = jnp.zeros(chunk, bool)
    start = {n: _moments(jnp.zeros(v.shape, v.dtype), nothing) for n, v in shapes.items()}
    moments, _ = jax.lax.scan(step, start, parts)
    return {
        name: Summary(mean, jnp.sqrt(square / jnp.maximum(count, 1.0)), lowest, highest)
        for name, (count, mean, square, lowest, highest) in moments.items()
    }


def _moments(values, kept):
    """Count, mean, sum of squared deviations, minimum and maximum over the rows that are kept."""
    count = jnp.sum(kept).astype(values.dtype)
    mean = jnp.sum(jnp.where(kept, values, 0.0)) / jnp.maximum(count, 1.0)
    square = jnp.sum(jnp.where(kept, jnp.square(values - mean), 0.0))
    lowest = jnp.min(jnp.where(kept, values, jnp.inf))
    return count, mean, square, lowest, jnp.max(jnp.where(kept, values, -jnp.inf))


def _joined(a, b):
    """The moments of two sets of rows together (Chan et al., 1979)."""
    count = a[0] + b[0]
    share, apart = b[0] / jnp.maximum(count, 1.0), b[1] - a[1]
    square = a[2] + b[2] + jnp.square(apart) * a[0] * share
    return count, a[1] + share * apart, square, jnp.minimum(a[3], b[3]), jnp.maximum(a[4], b[4])


def reassignment_summary(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    learning_rate: NonNegative,
) -> dict[str, Array]:
    """One step on the logits: what it moves, and where to.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        divergence: whose gradient is descended.
        learning_rate: eta.

    Returns:
        `[...]` each: "moved", the mass that changes class; "to_underestimated", the net mass that
        flows from classes with q >= p to those with q < p; "largest", the largest |LogR|;
        "normaliser", N.
    """
    options = {"divergence": divergence, "learning_rate": learning_rate}
    step, change = _one_step(student_logits, teacher_logits, **options)
    flows = mass_flow(change, over_and_underestimated(student_logits, teacher_logits))
    return {
        "moved": moved_mass(change),
        "to_underestimated": flows["underestimated"],
        "largest": jnp.max(jnp.abs(step.log_ratio), axis=-1),
        "normaliser": step.normaliser,
    }


def rank_summary(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    learning_rate: NonNegative,
) -> dict[str, Array]:
    """One step on the logits: the mass that it moves into the teacher's head, middle and tail.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        divergence: whose gradient is descended.
        learning_rate: eta.

    Returns:
        `[...]` each, net, of sum 0: "to_head", "to_middle", "to_tail"; see `head_middle_and_tail`.
    """
    options = {"divergence": divergence, "learning_rate": learning_rate}
    _, change = _one_step(student_logits, teacher_logits, **options)
    flows = mass_flow(change, head_middle_and_tail(teacher_logits))
    return {f"to_{name}": flow for name, flow in flows.items()}


def _one_step(student_logits: Array, teacher_logits: Array, **options: Any) -> tuple[Any, Array]:
    """The log mass ratio of a step on the logits, and the change of each class's mass."""
    step = log_mass_ratio(student_logits, teacher_logits, **options)
    return step, mass_change(student_logits, step.log_ratio)


def bound_summary(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha: Number,
    beta: Number,
    learning_rate: NonNegative,
) -> dict[str, Array]:
    """How tight the bounds on |LogR| are, as means over the classes that are not removed.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        alpha: of `alpha_beta`.
        beta: likewise.
        learning_rate: eta.

    Returns:
        `[...]` each: "tightness" of Proposition 4.2's bound, "tightness_signed" of the tighter one;
        0 in a row whose classes are all removed.
    """
    bound = upper_bound(
        student_logits, teacher_logits, alpha=alpha, beta=beta, learning_rate=learning_rate
    )
    present = ~jnp.isneginf(student_logits)
    count = jnp.maximum(jnp.sum(present, axis=-1), 1)
    over_classes = lambda x: jnp.sum(jnp.where(present, x, 0.0), axis=-1) / count  # noqa: E731
    return {
        "tightness": over_classes(tightness(bound.log_ratio, bound.total)),
        "tightness_signed": over_classes(tightness(bound.log_ratio, bound.tighter)),
    }


def gradient_summary(
    student_logits: Array, teacher_logits: Array, *, divergence: Divergence
) -> dict[str, Array]:
    """The size of a divergence's gradient in the logits, and its angle to forward KL's.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        divergence: D.

    Returns:
        `[...]` each: "gradient_norm", "cosine_with_forward_kl".
    """
    gradient = logit_gradient(student_logits, teacher_logits, divergence=divergence)
    reference = logit_gradient(student_logits, teacher_logits, divergence=forward_kl)
    return {
        "gradient_norm": gradient_norm(gradient),
        "cosine_with_forward_kl": cosine(gradient, reference),
    }
