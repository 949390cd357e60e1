"""Numbers that depend on the step, wherever a number stands: alpha, a weight, a learning rate.

Each is a function of the step, to be bound by `types.schedule`. The end points are leaves and can
be swept and differentiated; `steps`, `begin` and `boundaries`, counted in training steps, are
structure. The curves are optax's.
"""

import optax
from jax import Array
from jax import numpy as jnp


def constant(step: int | Array, *, value: float | Array) -> Array:
    """The value at every step."""
    return optax.constant_schedule(value)(step)


def linear(
    step: int | Array, *, start: float | Array, end: float | Array, steps: int, begin: int = 0
) -> Array:
    """From start to end in a straight line over `steps` steps, after `begin` steps at start."""
    _check("linear", steps)
    return optax.linear_schedule(start, end, steps, begin)(step)


def cosine(
    step: int | Array, *, start: float | Array, end: float | Array, steps: int, begin: int = 0
) -> Array:
    """From start to end along half a cosine over `steps` steps, after `begin` steps at start."""
    _check("cosine", steps)
    fraction = optax.cosine_decay_schedule(1.0, steps)(jnp.maximum(step - begin, 0))
    return end + (start - end) * fraction


def warmup(step: int | Array, *, value: float | Array, steps: int) -> Array:
    """From 0 to the value in a straight line over `steps` steps (0: none), and the value after."""
    return optax.linear_schedule(0.0, value, steps)(step) if steps > 0 else jnp.asarray(value)


def warmup_cosine(
    step: int | Array,
    *,
    value: float | Array,
    end: float | Array,
    warmup_steps: int,
    steps: int,
) -> Array:
    """`warmup` to the value, then `cosine` to end; `steps` in all, warm-up included."""
    _check("warmup_cosine", steps - warmup_steps, "steps - warmup_steps")
    rise = warmup(step, value=value, steps=warmup_steps)
    fall = cosine(step, start=value, end=end, steps=steps - warmup_steps, begin=warmup_steps)
    return jnp.where(jnp.asarray(step) < warmup_steps, rise, fall)


def piecewise(
    step: int | Array, *, start: float | Array, factor: float | Array, boundaries: tuple[int, ...]
) -> Array:
    """start, multiplied by the factor at each boundary: the usual learning rate on CIFAR."""
    passed = jnp.sum(jnp.asarray(step) >= jnp.asarray(boundaries, dtype=int))
    return start * factor**passed


def _check(name: str, steps: int, field: str = "steps") -> None:
    if steps < 1:
        raise ValueError(f"{name}: {field} must be at least 1; found {steps}.")
