"""The effective temperature: the student's sharpness on the teacher's scale."""

import math

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.analysis.checks import check_cached

_RANGE = (1e-3, 1e3)


def effective_temperature(student_logits: Array, teacher_logits: Array) -> Array:
    """The temperature at which the teacher would have the student's entropy.

    T with H(softmax(teacher / T)) = H(softmax(student)): 1 for a student as sharp as its teacher,
    more for a flatter one, 2 for one that has learnt the teacher's logits halved. The entropy
    rises with T, from the logarithm of the number of the teacher's ties at its maximum to that of
    the number of classes, so there is one such T, or the student is out of reach and T is the end
    of [1e-3, 1e3] on its side. Found by bisection of log T, in a fixed number of steps. It has no
    gradient.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in [1e-3, 1e3].
    """
    logits = jax.lax.stop_gradient(check_cached(student_logits, teacher_logits))
    student_logits, teacher_logits = logits
    target = numerics.entropy(student_logits)
    # The maximum is moved to 0, so that dividing by a small T overflows nowhere.
    teacher_logits = numerics.log_probabilities(teacher_logits)
    teacher_logits -= jnp.max(teacher_logits, axis=-1, keepdims=True, initial=-1e30)

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        tempered = numerics.divided_logits(teacher_logits, jnp.exp(middle)[..., None])
        below = numerics.entropy(tempered) < target
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    ends = tuple(jnp.full_like(target, math.log(end)) for end in _RANGE)
    steps = 28 if target.dtype == jnp.float32 else 56
    low, high = jax.lax.fori_loop(0, steps, halve, ends)
    return jnp.exp(0.5 * (low + high))
