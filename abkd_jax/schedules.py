"""Numbers that depend on the step, wherever a number stands: alpha, a weight, a learning rate.

Each is a function of the step, to be bound by `binding.schedule`. The end points are leaves and can
be swept and differentiated; `steps`, `begin` and `boundaries`, counted in training steps, are
structure. The curves are optax's.
"""

import optax
from jax import Array
from jax import numpy as jnp

from abkd_jax.binding import Number
from abkd_jax.checks import require


def constant(step: int | Array, *, value: Number) -> Array:
    """The value at every step."""
    return optax.constant_schedule(value)(step)


def linear(step: int | Array, *, start: Number, end: Number, steps: int, begin: int = 0) -> Array:
    """From start to end in a straight line over `steps` steps, after `begin` steps at start."""
    require(steps >= 1, "linear.steps", "at least 1", steps)
    return optax.linear_schedule(start, end, steps, begin)(step)


def cosine(step: int | Array, *, start: Number, end: Number, steps: int, begin: int = 0) -> Array:
    """From start to end along half a cosine over `steps` steps, after `begin` steps at start."""
    require(steps >= 1, "cosine.steps", "at least 1", steps)
    fraction = optax.cosine_decay_schedule(1.0, steps)(jnp.maximum(step - begin, 0))
    return end + (start - end) * fraction


def warmup(step: int | Array, *, value: Number, steps: int) -> Array:
    """From 0 to the value in a straight line over `steps` steps (0: none), and the value after."""
    return optax.linear_schedule(0.0, value, steps)(step) if steps > 0 else jnp.asarray(value)


def warmup_cosine(
    step: int | Array, *, value: Number, end: Number, warmup_steps: int, steps: int
) -> Array:
    """`warmup` to the value, then `cosine` to end; `steps` in all, warm-up included."""
    expected = f"more than the warmup_steps, {warmup_steps}"
    require(steps > warmup_steps, "warmup_cosine.steps", expected, steps)
    rise = warmup(step, value=value, steps=warmup_steps)
    fall = cosine(step, start=value, end=end, steps=steps - warmup_steps, begin=warmup_steps)
    return jnp.where(jnp.asarray(step) < warmup_steps, rise, fall)


def piecewise(
    step: int | Array, *, start: Number, factor: Number, boundaries: tuple[int, ...]
) -> Array:
    """start, multiplied by the factor at each boundary: the usual learning rate on CIFAR."""
    passed = jnp.sum(jnp.asarray(step) >= jnp.asarray(boundaries, dtype=int))
    return start * factor**passed
