"""How one gradient step reassigns probability: the exact log mass ratio and its two parts."""

from collections.abc import Callable
from typing import Any

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.analysis.checks import check_cached, check_values
from abkd_jax.analysis.gradients import gradient_of_checked
from abkd_jax.binding import NonNegative
from abkd_jax.types import Divergence

_LARGEST_CHANGE = 60.0  # whose exp, times any number of classes, is well within float32


@struct.dataclass
class Reassignment:
    """The change of a distribution q, class by class: log_ratio = target + normaliser.

    Attributes:
        log_ratio: `[..., K]`, LogR = log(q after / q before); 0 at a class that is removed.
        target: `[..., K]`, the change of the class's own logit.
        normaliser: `[...]`, N = -log sum_k q_k exp(target_k), which all classes share.
    """

    log_ratio: Array
    target: Array
    normaliser: Array


def log_mass_ratio(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    learning_rate: NonNegative,
) -> Reassignment:
    """One step of gradient descent on the logits themselves, f <- f - eta dD/df.

    Args:
        student_logits: f, `[..., K]`.
        teacher_logits: `[..., K]`.
        divergence: D.
        learning_rate: eta, a number, or an array that broadcasts to the leading axes.

    Returns:
        The reassignment, exact for a step of any size; its `target` is -eta dD/df.

    Raises:
        ValueError: if the rate does not broadcast.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, equation 5.
    """
    student_logits, teacher_logits = check_cached(student_logits, teacher_logits)
    gradient = gradient_of_checked(student_logits, teacher_logits, divergence)
    rate = numerics.per_row("learning_rate", learning_rate, gradient)
    return of_checked_change(student_logits, -rate * gradient)


def of_logit_change(student_logits: Array, change: Array) -> Reassignment:
    """The reassignment by any change of the logits, with its digits however small the change is.

    With d = change - m and m the mean of the change under q,

        LogR = d - r,   N = -m - r,   r = log(1 + sum_k q_k (e^d_k - 1 - d_k)),

    whose summands are all positive, so nothing cancels.

    Args:
        student_logits: `[..., K]`, before the change; -inf where a class is removed.
        change: `[..., K]`, what is added; not read at removed classes.

    Returns:
        The reassignment; its `target` is the change.

    Raises:
        AssertionError: if the change has another shape.
    """
    logits = check_values(student_logits, "student_logits")
    checks.check_array("change", change, float, logits.shape, "as student_logits")
    return of_checked_change(logits, change)


def of_checked_change(logits: Array, change: Array) -> Reassignment:
    """`of_logit_change` of logits that are checked, and a change of their shape."""
    present = ~jnp.isneginf(logits)
    target = jnp.where(present, jnp.asarray(change, logits.dtype), 0.0)
    # The derivative of log q along the change is d, in the digits of a saturated row too.
    log_q, centred = jax.jvp(numerics.log_probabilities, (logits,), (target,))
    centred = jnp.where(present, centred, 0.0)
    mean = jnp.sum(jnp.exp(log_q) * target, axis=-1)

    moderate = jnp.max(centred, axis=-1, keepdims=True) < _LARGEST_CHANGE
    excess = _excess(log_q, jnp.minimum(centred, _LARGEST_CHANGE))
    # Past that, one class takes nearly all: what it has then, less what it had.
    log_after = numerics.log_softmax(log_q + centred)
    log_ratio = jnp.where(moderate, centred - excess, log_after - log_q)
    shared = jnp.where(moderate, excess, jax.nn.logsumexp(log_q + centred, axis=-1, keepdims=True))
    return Reassignment(jnp.where(present, log_ratio, 0.0), target, -(mean + shared[..., 0]))


def parameter_log_mass_ratio(
    logits_fn: Callable[[Any], Array],
    params: Any,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    learning_rate: NonNegative,
    where: Array | None = None,
) -> Reassignment:
    """One step of gradient descent on a network's parameters, to first order in the step.

    With g the gradient of the batch mean of D in all the batch's logits and J the Jacobian of these
    logits in the parameters, the logits change by -eta J J^T g: each example moves all the others.
    The product is taken by one reverse and one forward pass; neither J nor J J^T is formed.

    Args:
        logits_fn: params -> student logits `[..., K]`: the network on one batch.
        params: any pytree of floating-point arrays.
        teacher_logits: `[..., K]`, on the same batch.
        divergence: D.
        learning_rate: eta, a number.
        where: `[...]` bool, the examples whose mean is descended; None for all. The others are
            moved as well.

    Returns:
        The reassignment by the change -eta J J^T g, which is its `target`.

    Raises:
        AssertionError: if `where` is not bool `[...]`.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, appendix C.
    """
    step, _, lifted = _descent(logits_fn, params, teacher_logits, divergence, learning_rate, where)
    _, change = jax.jvp(logits_fn, (params,), (step,))
    return of_checked_change(lifted, change)


def exact_parameter_log_mass_ratio(
    logits_fn: Callable[[Any], Array],
    params: Any,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    learning_rate: NonNegative,
    where: Array | None = None,
) -> Reassignment:
    """`parameter_log_mass_ratio` by the network itself, evaluated again after the step.

    Its `target` is the difference of the logits after and before: exact for a step of any size, but
    where that is tiny it has only the digits that the subtraction leaves.

    Args:
        logits_fn: params -> student logits `[..., K]`: the network on one batch.
        params: any pytree of floating-point arrays.
        teacher_logits: `[..., K]`, on the same batch.
        divergence: D.
        learning_rate: eta, a number.
        where: `[...]` bool, the examples whose mean is descended; None for all.

    Returns:
        The reassignment.

    Raises:
        AssertionError: if `where` is not bool `[...]`.
    """
    step, logits, lifted = _descent(
        logits_fn, params, teacher_logits, divergence, learning_rate, where
    )
    after = logits_fn(jax.tree.map(jnp.add, params, step))
    return of_checked_change(lifted, jnp.where(jnp.isneginf(logits), 0.0, after - logits))


def _descent(logits_fn, params, teacher_logits, divergence, learning_rate, where):
    """The step of the parameters, and the logits before it, as they are and lifted to 32 bit."""
    logits, pull = jax.vjp(logits_fn, params)
    lifted, teacher = check_cached(logits, teacher_logits)
    expected = f"of a shape that broadcasts to {list(logits.shape)}, that of what logits_fn gives"
    checks.require(lifted.shape == logits.shape, "teacher_logits", expected, teacher_logits)
    gradient = gradient_of_checked(lifted, teacher, divergence)
    where = checks.check_where(where, logits.shape[:-1])
    mean = jnp.where(where[..., None], gradient, 0.0) / jnp.maximum(jnp.sum(where), 1)
    (slope,) = pull(mean.astype(logits.dtype))
    step = jax.tree.map(lambda g: -jnp.asarray(learning_rate, g.dtype) * g, slope)
    return step, logits, lifted


def _excess(log_q: Array, d: Array) -> Array:
    """log sum q e^d, at least 0, for d whose mean under q is 0; it keeps the last axis."""
    small = jnp.abs(d) < 0.5  # where e^d - 1 - d would cancel
    near = jnp.where(small, d, 0.0)
    beyond = jnp.square(near) * numerics.exp_series(-near, 2)
    beyond = jnp.where(small, beyond, jnp.expm1(d) - d)
    return jnp.log1p(jnp.sum(jnp.exp(log_q) * beyond, axis=-1, keepdims=True))
