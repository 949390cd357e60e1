"""The two distributions of a divergence, p of the teacher and q of the student, and their gap."""

from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics


def checked_logs(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array, Array]:
    """`logs` of what is checked and lifted to 32 bit first."""
    return logs(*checks.check_logits(student_logits, teacher_logits))


def logs(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array, Array]:
    """log p, log q to absolute precision, and their difference to relative precision."""
    log_p, log_q = map(numerics.log_probabilities, (teacher_logits, student_logits))
    return log_p, log_q, numerics.log_ratio(student_logits, teacher_logits)


def probabilities(log_p: Array, log_q: Array, u: Array) -> tuple[Array, Array, Array]:
    """p, q, and p - q to relative precision."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    near = jnp.abs(u) < 0.5
    small = jnp.where(near, u, 0.0)
    return p, q, jnp.where(near, q * small * numerics.exp_series(-small, 1), p - q)


def close_kl_terms(p: Array, u: Array, near: Array) -> Array:
    """The summands p u - p + q of KL(p || q), none negative, for u = log(p / q) near 0."""
    small = jnp.where(near, u, 0.0)
    return p * jnp.square(small) * numerics.exp_series(small, 2)


def log_larger(log_p: Array, log_q: Array) -> Array:
    """max(log p, log q), and 0 for a class that has been removed from both."""
    larger = jnp.maximum(log_p, log_q)
    return jnp.where(jnp.isneginf(larger), 0.0, larger)


def saturated(x: Array) -> Array:
    """x, with a large number in place of infinity."""
    return jnp.clip(x, -numerics.SATURATION, numerics.SATURATION)
