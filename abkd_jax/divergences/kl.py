"""Kullback-Leibler, its sums and its mixtures."""

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.binding import Unit
from abkd_jax.divergences.pair import checked_logs, close_kl_terms, probabilities, saturated


@jax.jit
def forward_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(p || q).

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where q is 0 and p is not.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    p, _, p_less_q = probabilities(log_p, log_q, u)
    near = jnp.abs(u) < 0.5
    terms = jnp.where(near, close_kl_terms(p, u, near), p * u - p_less_q)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), (p * u, -p_less_q)), axis=-1)


@jax.jit
def reverse_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(q || p).

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where p is 0 and q is not.

    Source: Gu et al., "MiniLLM", 2024, https://arxiv.org/abs/2306.08543.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    _, q, p_less_q = probabilities(log_p, log_q, u)
    near = jnp.abs(u) < 0.5
    terms = jnp.where(near, close_kl_terms(q, -u, near), p_less_q - q * u)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), (p_less_q, -q * u)), axis=-1)


@jax.jit
def jeffreys(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(p || q) + KL(q || p) = sum (p - q) log(p / q).

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where one of them is 0 and
        the other is not.

    Source: Jeffreys, "An invariant form for the prior probability in estimation problems", 1946.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    p, q, p_less_q = probabilities(log_p, log_q, u)
    slopes = p * u + p_less_q, -q * u - p_less_q
    return jnp.sum(numerics.with_slopes(p_less_q * u, (log_p, log_q), slopes), axis=-1)


@jax.jit
def skew_forward_kl(student_logits: Array, teacher_logits: Array, *, skew: Unit) -> Array:
    """KL(p || s p + (1 - s) q): forward KL at s = 0, zero at s = 1.

    Args:
        skew: s in [0, 1], the teacher's weight in the mixture (0.1 in DistiLLM), or an array that
            broadcasts to the leading axes.

    Returns:
        `[...]` in nats, in [0, -log s], 0 exactly where p = q; saturated where q is 0, p is not,
        and s is 0. Where two classes share nearly all of p or of q, which the mixture then bounds
        alike, a gradient in float32 is right to 4e-7, not to its own digits.

    Source: Ko et al., "DistiLLM", ICML 2024, https://arxiv.org/abs/2402.03898.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    return _skew_kl(log_p, log_q, u, numerics.per_row("skew", skew, u))


@jax.jit
def skew_reverse_kl(student_logits: Array, teacher_logits: Array, *, skew: Unit) -> Array:
    """KL(q || (1 - s) p + s q): reverse KL at s = 0, zero at s = 1.

    Args:
        skew: s in [0, 1], the student's weight in the mixture (0.1 in DistiLLM), or an array that
            broadcasts to the leading axes.

    Returns:
        `[...]` in nats, in [0, -log s], 0 exactly where p = q; saturated where p is 0, q is not,
        and s is 0. Where two classes share nearly all of p or of q, which the mixture then bounds
        alike, a gradient in float32 is right to 4e-7, not to its own digits.

    Source: Ko et al., "DistiLLM", ICML 2024, https://arxiv.org/abs/2402.03898.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    return _skew_kl(log_q, log_p, -u, numerics.per_row("skew", skew, u))


@jax.jit
def jensen_shannon(student_logits: Array, teacher_logits: Array, *, teacher_weight: Unit) -> Array:
    """w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q and w the teacher's weight.

    Others count the same number from the other side, so look up whose setting you have:

        source                              its number     teacher_weight here
        GKD, TRL (GKD and Distillation)     beta           beta
        DistiLLM-2                          alpha = 0.9    0.9
        TAID's repository                   0.1            0.1
        DistiLLM                            lam = 0.9      1 - lam = 0.1
        ABKD's fork of DistiLLM             lam = 0.1      1 - lam = 0.9
        f-DISTILL                           beta = 0.85    1 - beta = 0.15

    Args:
        teacher_weight: w in [0, 1], or an array that broadcasts to the leading axes. 0.5 is the
            symmetric divergence; at 0 and 1 the value is 0 (its slope there is forward KL and minus
            reverse KL, the limits that TRL substitutes for the value).

    Returns:
        `[...]` in [0, ln 2] nats, non-negative, 0 exactly where p = q.

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991; as a distillation loss,
    Agarwal et al., "GKD", 2024, https://arxiv.org/abs/2306.13649.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    w = numerics.per_row("teacher_weight", teacher_weight, u)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    p_over_m, q_over_m = _log_over_mixture(u, w)
    near = jnp.abs(u) < 0.5
    close_p, close_q = close_kl_terms(p, p_over_m, near), close_kl_terms(q, q_over_m, near)
    terms = w * p * p_over_m + (1.0 - w) * q * q_over_m
    terms = jnp.where(near, w * close_p + (1.0 - w) * close_q, terms)
    in_w = jnp.where(near, close_p - close_q, p * (p_over_m - 1.0) - q * (q_over_m - 1.0))
    slopes = w * p * p_over_m, (1.0 - w) * q * q_over_m, in_w
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q, w), slopes), axis=-1)


@jax.jit
def adaptive_kl(student_logits: Array, teacher_logits: Array, *, head_mass: Unit = 0.5) -> Array:
    """AKL: g FKL + (1 - g) RKL, with g the share of the error that lies in the teacher's head.

    The head is the class with the largest p, and those that follow, by falling p, as long as the
    sum of p up to and with them is at most `head_mass`. g is the sum of |p - q| over the head,
    divided by that over all classes. It is a weight: it has no gradient, and so neither has
    `head_mass`. Of classes with the same p, the first in order comes first (our reading).

    Args:
        head_mass: in [0, 1], or an array that broadcasts to the leading axes.

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where one of p and q is 0,
        the other is not, and the weight of the divergence that this makes infinite is not 0.

    Source: Wu et al., "Rethinking Kullback-Leibler divergence in knowledge distillation for large
    language models", 2024, https://arxiv.org/abs/2404.02657, and its code.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    p, q, p_less_q = probabilities(log_p, log_q, u)
    head_share = _head_share(p, p_less_q, numerics.per_row("head_mass", head_mass, u))
    head, tail = jax.lax.stop_gradient((head_share, 1.0 - head_share))
    near = jnp.abs(u) < 0.5
    forward = jnp.where(near, close_kl_terms(p, u, near), p * u - p_less_q)
    reverse = jnp.where(near, close_kl_terms(q, -u, near), p_less_q - q * u)
    slopes = head * p * u + tail * p_less_q, -head * p_less_q - tail * q * u
    terms = head * forward + tail * reverse
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), slopes), axis=-1)


def _skew_kl(log_p: Array, log_q: Array, u: Array, skew: Array) -> Array:
    """KL(p || m) for m = s p + (1 - s) q and u = log(p / q)."""
    p, _, p_less_q = probabilities(log_p, log_q, u)
    p_over_m, q_over_m = _log_over_mixture(u, skew)
    rest = 1.0 - skew
    near = jnp.abs(p_over_m) < 0.5
    terms = jnp.where(near, close_kl_terms(p, p_over_m, near), p * p_over_m - rest * p_less_q)
    of_q = rest * jnp.exp(jnp.minimum(q_over_m, 80.0))  # the part of q in the mixture
    growth = jnp.expm1(jnp.minimum(p_over_m, 80.0))  # p / m - 1
    small, rise = (jnp.where(near, x, 0.0) for x in (p_over_m, growth))
    bend = jnp.where(near, p * small * rise - terms * (1.0 + rise), p * (growth - p_over_m))
    # p (log(p / m) - s (p / m - 1)), of which no part exceeds p: terms - from_q would cancel.
    from_p = jnp.where(p > 0, rest * p * p_over_m - skew * bend, 0.0)
    # -(1 - s) q (p / m - 1), or without the 1 in a row where all but p / m would be lost on it: the
    # slopes of log q may have any multiple of q added, since sum q is 1 whatever the logits.
    apart = jnp.sum(of_q * p, axis=-1, keepdims=True) < 0.5 * rest
    from_q = -of_q * jnp.where(apart, p, rest * p_less_q)
    slopes = from_p, from_q, -p_less_q * saturated(growth)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q, skew), slopes), axis=-1)


def _log_over_mixture(u: Array, w: Array) -> tuple[Array, Array]:
    """log(p / m) and log(q / m) for m = w p + (1 - w) q and u = log(p / q).

    They differ by u, so one logarithm is enough: of the larger or of the smaller of p and q, as
    keeps the digits of both near the ends of w.
    """
    p_is_larger = u >= 0
    larger, smaller = jnp.where(p_is_larger, w, 1.0 - w), jnp.where(p_is_larger, 1.0 - w, w)
    v = jnp.where(p_is_larger, u, -u)  # not jnp.maximum, whose derivative at 0 is 0
    product, decay = v * numerics.psi(v), jnp.exp(-v)
    longest = jnp.where(p_is_larger, -jnp.log(w), -jnp.log1p(-w))  # where larger e^v is 1
    by_smaller = (larger <= 0.5) & (v <= longest)
    numerator = jnp.where(by_smaller, larger, smaller) * product
    denominator = jnp.where(by_smaller, decay, larger + smaller * decay)
    small = denominator < jnp.finfo(v.dtype).tiny
    logarithm = jnp.log1p(numerator / jnp.where(small, 1.0, denominator))
    of_larger = jnp.where(by_smaller, v - logarithm, logarithm)
    of_smaller = jnp.where(by_smaller, -logarithm, logarithm - v)
    return (
        jnp.where(p_is_larger, of_larger, of_smaller),
        jnp.where(p_is_larger, of_smaller, of_larger),
    )


def _head_share(p: Array, p_less_q: Array, head_mass: Array) -> Array:
    """AKL's share of the error |p - q| that lies in the teacher's head; anything where p = q."""
    in_head = numerics.head(p, head_mass)
    error = jnp.abs(p_less_q)
    total = jnp.sum(error, axis=-1, keepdims=True)
    of_head = jnp.sum(jnp.where(in_head, error, 0.0), axis=-1, keepdims=True)
    return of_head / jnp.where(total > 0, total, 1.0)
