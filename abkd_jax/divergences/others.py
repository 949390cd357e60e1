"""Divergences of no family: total variation, AlphaNet's, and the distance of the raw logits."""

from typing import Annotated

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Domain, Number
from abkd_jax.divergences.alpha_beta import alpha_terms, slope
from abkd_jax.divergences.pair import checked_logs, log_larger, logs, probabilities


@jax.jit
def total_variation(student_logits: Array, teacher_logits: Array) -> Array:
    """Half the sum of |p - q|.

    Returns:
        `[...]` in [0, 1], 0 exactly where p = q. Where p = q at a class, its subgradient is 0.

    Source: Wen et al., 2023, https://arxiv.org/abs/2307.15190.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    p, q, p_less_q = probabilities(log_p, log_q, u)
    slopes = 0.5 * jnp.sign(u) * p, -0.5 * jnp.sign(u) * q
    terms = 0.5 * jnp.abs(p_less_q)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), slopes), axis=-1)


@jax.jit
def alphanet(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha_min: Number = -1.0,
    alpha_max: Number = 1.0,
    clip: Annotated[float | Array, Domain(1, finite=False)] = 5.0,
) -> Array:
    r"""AlphaNet's adaptive alpha-divergence: for each example the larger of two, with t^a clipped.

    With t = p / q, the value is the larger of the two

        D_a = sum_k q (min(t^a, clip) - 1) / (a (a - 1)),   a in (alpha_min, alpha_max),

    and the gradient is **not the gradient of the value**. It is that of the surrogate

        G_a = -sum_k sg[q rho_a] log q,   rho_a = (min(t^a, clip) - 1) / a,

    at the a that was chosen, where sg stops gradients: that of the student alone, and none for the
    teacher and the numbers. Without clipping (clip = inf) it is the student's gradient of D_a.

    As published, alpha within 1e-3 of 1 clips nothing, since there the clipped D has no limit, and
    within 1e-3 of 0 it is t that is clipped, since t^a is 1. Only the clipped classes jump there.

    Args:
        alpha_min: the one that is chosen where its D is larger; a number, or an array that
            broadcasts to the leading axes.
        alpha_max: the other, likewise.
        clip: the bound on t^a, at least 1; likewise.

    Returns:
        `[...]`, 0 where p = q. A small clip can make it negative.

    Source: Wang et al., "AlphaNet: improved training of supernets with alpha-divergence", ICML
    2021, https://arxiv.org/abs/2102.07954, and its code.
    """
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    log_q = numerics.log_probabilities(student_logits)
    detached = logs(*jax.lax.stop_gradient((student_logits, teacher_logits)))
    numbers = dict(alpha_min=alpha_min, alpha_max=alpha_max, clip=clip)
    low, high, clip = (
        jax.lax.stop_gradient(numerics.per_row(name, number, detached[2]))
        for name, number in numbers.items()
    )
    low_value, high_value = (
        jnp.sum(_clipped_alpha_terms(*detached, alpha, clip), axis=-1, keepdims=True)
        for alpha in (low, high)
    )
    chosen = jnp.where(low_value > high_value, low, high)
    slopes = _surrogate_slopes(*detached, chosen, clip)
    surrogate = numerics.with_slopes(jnp.zeros_like(slopes), (log_q,), (slopes,))
    return jnp.maximum(low_value, high_value)[..., 0] + jnp.sum(surrogate, axis=-1)


@jax.jit
def logit_mse(student_logits: Array, teacher_logits: Array) -> Array:
    """The mean over classes of (teacher logit - student logit)^2, on the logits as they are.

    Returns:
        `[...]`, non-negative, 0 where the logits are equal; a shift of either logits changes it.
        Classes that both lack do not count; saturated where one side alone is -inf.

    Source: Ba and Caruana, "Do deep nets really need to be deep?", NeurIPS 2014; against KL, Kim et
    al., IJCAI 2021, https://arxiv.org/abs/2105.08919.
    """
    logits = checks.check_logits(student_logits, teacher_logits)
    no_s, no_t = map(jnp.isneginf, logits)
    s, t = (jnp.where(jnp.isneginf(x), 0.0, x) for x in logits)
    one_sided = numerics.MAX_LOG_RATIO * (no_s.astype(s.dtype) - no_t.astype(s.dtype))
    gap = jnp.where(no_s | no_t, one_sided, t - s)
    gap = jnp.clip(gap, -numerics.MAX_LOG_RATIO, numerics.MAX_LOG_RATIO)
    count = jnp.maximum(jnp.sum(~(no_s & no_t), axis=-1, keepdims=True), 1).astype(s.dtype)
    slopes = -2.0 * gap / count, 2.0 * gap / count
    return jnp.sum(numerics.with_slopes(jnp.square(gap) / count, logits, slopes), axis=-1)


def _clipped(u: Array, alpha: Array, clip: Array) -> tuple[Array, Array, Array]:
    """Where AlphaNet clips, its rho there, and whether alpha counts as 0."""
    near_0, near_1 = jnp.abs(alpha) < 1e-3, jnp.abs(alpha - 1.0) < 1e-3
    safe = jnp.where(near_0, 1.0, alpha)
    rho = jnp.where(near_0, jnp.log(clip), (clip - 1.0) / safe)
    return (safe * u > jnp.log(clip)) & ~near_1, rho, near_0


def _clipped_alpha_terms(log_p: Array, log_q: Array, u: Array, alpha: Array, clip: Array) -> Array:
    """The summands of AlphaNet's D, less (p - q) / (a - 1), whose sum is 0."""
    _, q, p_less_q = probabilities(log_p, log_q, u)
    clipped, rho, near_0 = _clipped(u, alpha, clip)
    bound = (q * rho - p_less_q) / jnp.where(near_0, -1.0, jnp.where(alpha == 1, 1.0, alpha - 1.0))
    return jnp.where(clipped, bound, alpha_terms(log_p, log_q, u, alpha))


def _surrogate_slopes(log_p: Array, log_q: Array, u: Array, alpha: Array, clip: Array) -> Array:
    """-q rho, the slopes of AlphaNet's G in log q."""
    clipped, rho, _ = _clipped(u, alpha, clip)
    slopes = slope(log_larger(log_p, log_q), u, alpha, 1.0 - alpha)
    return jnp.where(clipped, -jnp.exp(log_q) * rho, slopes)
