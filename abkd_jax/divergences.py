"""Divergences between a teacher's and a student's distribution, as functions of their logits.

Every function has the signature `f(student_logits, teacher_logits, *, numbers) -> [...]`: it
reduces the last axis only, broadcasts its numbers to the leading axes, computes in float32 (float64
for float64 logits), and can be jitted, vmapped, pmapped and differentiated with respect to
everything, in both modes. `p` is the teacher, `q` the student.

A class whose logit is -inf on both sides does not exist: the result is that of cutting it out.
-inf on one side is probability 0 there, and the divergence takes its true limit; where that is
infinite, value and gradient are finite, large and of the right sign. A row in which no class is
left on either side has value and gradient 0.

To add one, write a function here and a row in the table of `tests/divergences_test.py`.
"""

import functools
from collections.abc import Callable

import jax
from jax import Array
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from abkd_jax import numerics
from abkd_jax.combinators import (  # noqa: F401  (found here by name, in configs)
    powered,
    prior_shifted,
    standardized,
    tempered,
    top_k,
    top_k_dropped,
    top_k_renormalised,
)

_LARGEST_ROOT = 1e19  # its square fits float32


# The alpha-beta family.


@jax.jit
def alpha_beta(
    student_logits: Array, teacher_logits: Array, *, alpha: float | Array, beta: float | Array
) -> Array:
    r"""The alpha-beta-divergence, one smooth function on the whole (alpha, beta) plane.

        D(p || q) = -1/(a b) sum_k [ p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b) ]

    with its limits where a, b or a + b is 0. Forward KL is (1, 0), reverse KL (0, 1), half the
    squared distance of log-probabilities (0, 0), half the squared Euclidean distance (1, 1), the
    alpha-divergences are a + b = 1 and the beta-divergences a = 1.

    The limits need no cases. With s = a + b and u = log p - log q, each summand is

        q^s f[0, a, s],   f(t) = e^(t u),

    a second divided difference, and these exist however the nodes coincide. Let m = max(log p,
    log q), v = |u|, and c = b if u > 0, else a; then the summand is

        u^2 e^(s m) exp[0, -c v, -s v],

    where exp[...] is the second divided difference of exp: a sum of positive terms, and so without
    cancellation (`numerics.exp_second_difference`). Its slopes are first divided differences,

        dD/dlog q = S(m, u, a, b),   dD/dlog p = S(m, -u, b, a),
        S(m, u, a, b) = -u e^(s m - k v) psi(|a| v),   psi(g) = (1 - e^-g) / g,

    k = min(b, s) if u > 0, else min(a, 0). They are given to autodiff as they stand, since
    differentiating the value would subtract large numbers. The derivatives in alpha and beta are
    the ordinary ones of the summand at fixed m and u.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        alpha: any real number, or an array that broadcasts to the leading axes. Smaller: more
            weight on classes with large errors (hardness-concentration).
        beta: likewise. Larger: more weight on classes of which the student is confident
            (confidence-concentration).

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite if
        alpha + beta > 0 and alpha > 0 (for p = 0) or beta > 0 (for q = 0), else saturated.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560; Cichocki et al.,
    "Generalized alpha-beta divergences", Entropy 13, 2011.
    """
    student_logits, teacher_logits = numerics.check_logits(student_logits, teacher_logits)
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    m = _log_larger(*map(numerics.log_softmax, (teacher_logits, student_logits)))
    alpha, beta = numerics.per_row("alpha", alpha, u), numerics.per_row("beta", beta, u)
    return jnp.sum(_alpha_beta_terms(log_p, log_q, u, m, alpha, beta), axis=-1)


@jax.jit
def alpha_divergence(
    student_logits: Array, teacher_logits: Array, *, alpha: float | Array
) -> Array:
    """(sum_k p^a q^(1-a) - 1) / (a (a - 1)): forward KL at a = 1, reverse KL at 0.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        alpha: a, any real number, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite if
        a > 0 (for p = 0) or a < 1 (for q = 0), else saturated.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Amari, "Differential-geometrical methods in statistics", 1985; Cichocki et al.,
    "Generalized alpha-beta divergences", Entropy 13, 2011.
    """
    logs = _log_probabilities(student_logits, teacher_logits)
    return jnp.sum(_alpha_terms(*logs, numerics.per_row("alpha", alpha, logs[2])), axis=-1)


@jax.jit
def beta_divergence(student_logits: Array, teacher_logits: Array, *, beta: float | Array) -> Array:
    """`alpha_beta` at alpha = 1: forward KL at beta = 0, half the squared distance at 1.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        beta: any real number, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite if
        beta > -1 (for p = 0) or beta > 0 (for q = 0), else saturated.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Basu et al., "Robust and efficient estimation by minimising a density power divergence",
    Biometrika 85, 1998, whose divergence is this one times 1 + beta.
    """
    return alpha_beta(student_logits, teacher_logits, alpha=1.0, beta=beta)


@jax.jit
def hellinger(student_logits: Array, teacher_logits: Array) -> Array:
    """2 sum (sqrt p - sqrt q)^2, four times the squared Hellinger distance: alpha_beta(1/2, 1/2).

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in [0, 4], 0 exactly where p = q.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    return alpha_beta(student_logits, teacher_logits, alpha=0.5, beta=0.5)


@jax.jit
def chi_squared(student_logits: Array, teacher_logits: Array) -> Array:
    """Pearson's sum (p - q)^2 / q, which is 2 alpha_beta(2, -1).

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q; saturated where q is 0 and p is not.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    return 2.0 * alpha_beta(student_logits, teacher_logits, alpha=2.0, beta=-1.0)


@jax.jit
def renyi(student_logits: Array, teacher_logits: Array, *, order: float | Array) -> Array:
    r"""log(sum_k p^o q^(1-o)) / (o - 1), forward KL at o = 1.

    With A the alpha-divergence at o and x = o (o - 1) A, the sum is 1 + x, so the value is
    o A log(1 + x) / x: smooth in o at 1, and with all its digits where p is close to q. Where the
    sum is not close to 1, it is taken in log space.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        order: o >= 0, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite
        unless q is and o >= 1, or the supports are disjoint; then saturated. At o = 0 the value is
        0, the limit of logits that tend to -inf (0^0 counts as 1).

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Rényi, "On measures of entropy and information", 1961.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    order = numerics.per_row("order", order, u)
    scaled = order * jnp.sum(_alpha_terms(log_p, log_q, u, order), axis=-1, keepdims=True)
    x = (order - 1.0) * scaled
    near = jnp.abs(x) < 0.5
    close = scaled * numerics.log1p_series(jnp.where(near, x, 0.0))
    far = _log_sum_of_powers(log_p, log_q, u, order) / jnp.where(near, 1.0, order - 1.0)
    far = jnp.where(far < 0, 0.0, far)  # where one side alone has no class
    return jnp.where(near, close, far)[..., 0]


# Kullback-Leibler, its sums and its mixtures.


@jax.jit
def forward_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(p || q), the loss of Hinton et al., "Distilling the knowledge in a neural network", 2015.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where q is 0 and p is not.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    return alpha_beta(student_logits, teacher_logits, alpha=1.0, beta=0.0)


@jax.jit
def reverse_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(q || p), as in Gu et al., "MiniLLM", 2024, https://arxiv.org/abs/2306.08543.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where p is 0 and q is not.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    return alpha_beta(student_logits, teacher_logits, alpha=0.0, beta=1.0)


@jax.jit
def jeffreys(student_logits: Array, teacher_logits: Array) -> Array:
    """KL(p || q) + KL(q || p) = sum (p - q) log(p / q), of Jeffreys, 1946.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where one of them is 0 and
        the other is not.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    p, q, p_less_q = _probabilities(log_p, log_q, u)
    slopes = p * u + p_less_q, -q * u - p_less_q
    return jnp.sum(numerics.with_slopes(p_less_q * u, (log_p, log_q), slopes), axis=-1)


@jax.jit
def skew_forward_kl(student_logits: Array, teacher_logits: Array, *, skew: float | Array) -> Array:
    """KL(p || s p + (1 - s) q): forward KL at s = 0, zero at s = 1.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        skew: s in [0, 1], the teacher's weight in the mixture (0.1 in DistiLLM), or an array that
            broadcasts to the leading axes.

    Returns:
        `[...]` in nats, in [0, -log s], 0 exactly where p = q; saturated where q is 0, p is not,
        and s is 0. Where two classes share nearly all of p or of q, which the mixture then bounds
        alike, a gradient in float32 is right to 4e-7, not to its own digits.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Ko et al., "DistiLLM", ICML 2024, https://arxiv.org/abs/2402.03898.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    return _skew_kl(log_p, log_q, u, numerics.per_row("skew", skew, u))


@jax.jit
def skew_reverse_kl(student_logits: Array, teacher_logits: Array, *, skew: float | Array) -> Array:
    """KL(q || (1 - s) p + s q): reverse KL at s = 0, zero at s = 1.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        skew: s in [0, 1], the student's weight in the mixture (0.1 in DistiLLM), or an array that
            broadcasts to the leading axes.

    Returns:
        `[...]` in nats, in [0, -log s], 0 exactly where p = q; saturated where p is 0, q is not,
        and s is 0. Where two classes share nearly all of p or of q, which the mixture then bounds
        alike, a gradient in float32 is right to 4e-7, not to its own digits.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Ko et al., "DistiLLM", ICML 2024, https://arxiv.org/abs/2402.03898.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    return _skew_kl(log_q, log_p, -u, numerics.per_row("skew", skew, u))


@jax.jit
def jensen_shannon(
    student_logits: Array, teacher_logits: Array, *, teacher_weight: float | Array
) -> Array:
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
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        teacher_weight: w in [0, 1], or an array that broadcasts to the leading axes. 0.5 is the
            symmetric divergence; at 0 and 1 the value is 0 (its slope there is forward KL and minus
            reverse KL, the limits that TRL substitutes for the value).

    Returns:
        `[...]` in [0, ln 2] nats, non-negative, 0 exactly where p = q.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991; as a distillation loss,
    Agarwal et al., "GKD", 2024, https://arxiv.org/abs/2306.13649.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    w = numerics.per_row("teacher_weight", teacher_weight, u)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    p_over_m, q_over_m = _log_over_mixture(u, w)
    near = jnp.abs(u) < 0.5
    close_p, close_q = _close_kl_terms(p, p_over_m, near), _close_kl_terms(q, q_over_m, near)
    terms = w * p * p_over_m + (1.0 - w) * q * q_over_m
    terms = jnp.where(near, w * close_p + (1.0 - w) * close_q, terms)
    in_w = jnp.where(near, close_p - close_q, p * (p_over_m - 1.0) - q * (q_over_m - 1.0))
    slopes = w * p * p_over_m, (1.0 - w) * q * q_over_m, in_w
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q, w), slopes), axis=-1)


# Others.


@jax.jit
def total_variation(student_logits: Array, teacher_logits: Array) -> Array:
    """Half the sum of |p - q|, as in Wen et al., 2023, https://arxiv.org/abs/2307.15190.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in [0, 1], 0 exactly where p = q. Where p = q at a class, its subgradient is 0.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    p, q, p_less_q = _probabilities(log_p, log_q, u)
    slopes = 0.5 * jnp.sign(u) * p, -0.5 * jnp.sign(u) * q
    terms = 0.5 * jnp.abs(p_less_q)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), slopes), axis=-1)


@jax.jit
def adaptive_kl(
    student_logits: Array, teacher_logits: Array, *, head_mass: float | Array = 0.5
) -> Array:
    """AKL: g FKL + (1 - g) RKL, with g the share of the error that lies in the teacher's head.

    The head is the class with the largest p, and those that follow, by falling p, as long as the
    sum of p up to and with them is at most `head_mass`. g is the sum of |p - q| over the head,
    divided by that over all classes. It is a weight: it has no gradient, and so neither has
    `head_mass`. Of classes with the same p, the first in order comes first (our reading).

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        head_mass: in [0, 1], or an array that broadcasts to the leading axes.

    Returns:
        `[...]` in nats, non-negative, 0 exactly where p = q; saturated where one of p and q is 0,
        the other is not, and the weight of the divergence that this makes infinite is not 0.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Wu et al., "Rethinking Kullback-Leibler divergence in knowledge distillation for large
    language models", 2024, https://arxiv.org/abs/2404.02657, and its code.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    p, q, p_less_q = _probabilities(log_p, log_q, u)
    head_share = _head_share(p, p_less_q, numerics.per_row("head_mass", head_mass, u))
    head, tail = jax.lax.stop_gradient((head_share, 1.0 - head_share))
    near = jnp.abs(u) < 0.5
    forward = jnp.where(near, _close_kl_terms(p, u, near), p * u - p_less_q)
    reverse = jnp.where(near, _close_kl_terms(q, -u, near), p_less_q - q * u)
    slopes = head * p * u + tail * p_less_q, -head * p_less_q - tail * q * u
    terms = head * forward + tail * reverse
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), slopes), axis=-1)


@jax.jit
def alphanet(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha_min: float | Array = -1.0,
    alpha_max: float | Array = 1.0,
    clip: float | Array = 5.0,
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
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        alpha_min: the one that is chosen where its D is larger; a number, or an array that
            broadcasts to the leading axes.
        alpha_max: the other, likewise.
        clip: the bound on t^a, at least 1; likewise.

    Returns:
        `[...]`, 0 where p = q. A small clip can make it negative.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Wang et al., "AlphaNet: improved training of supernets with alpha-divergence", ICML
    2021, https://arxiv.org/abs/2102.07954, and its code.
    """
    student_logits, teacher_logits = numerics.check_logits(student_logits, teacher_logits)
    log_q = numerics.log_probabilities(student_logits)
    logs = _log_probabilities(*jax.lax.stop_gradient((student_logits, teacher_logits)))
    numbers = dict(alpha_min=alpha_min, alpha_max=alpha_max, clip=clip)
    low, high, clip = (
        jax.lax.stop_gradient(numerics.per_row(name, number, logs[2]))
        for name, number in numbers.items()
    )
    low_value, high_value = (
        jnp.sum(_clipped_alpha_terms(*logs, alpha, clip), axis=-1, keepdims=True)
        for alpha in (low, high)
    )
    chosen = jnp.where(low_value > high_value, low, high)
    slopes = _surrogate_slopes(*logs, chosen, clip)
    surrogate = numerics.with_slopes(jnp.zeros_like(slopes), (log_q,), (slopes,))
    return jnp.maximum(low_value, high_value)[..., 0] + jnp.sum(surrogate, axis=-1)


@jax.jit
def logit_mse(student_logits: Array, teacher_logits: Array) -> Array:
    """The mean over classes of (teacher logit - student logit)^2, on the logits as they are.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]`, non-negative, 0 where the logits are equal; a shift of either logits changes it.
        Classes that both lack do not count; saturated where one side alone is -inf.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Ba and Caruana, "Do deep nets really need to be deep?", NeurIPS 2014; against KL, Kim et
    al., IJCAI 2021, https://arxiv.org/abs/2105.08919.
    """
    logits = numerics.check_logits(student_logits, teacher_logits)
    no_s, no_t = map(jnp.isneginf, logits)
    s, t = (jnp.where(jnp.isneginf(x), 0.0, x) for x in logits)
    one_sided = numerics.MAX_LOG_RATIO * (no_s.astype(s.dtype) - no_t.astype(s.dtype))
    gap = jnp.where(no_s | no_t, one_sided, t - s)
    gap = jnp.clip(gap, -numerics.MAX_LOG_RATIO, numerics.MAX_LOG_RATIO)
    count = jnp.maximum(jnp.sum(~(no_s & no_t), axis=-1, keepdims=True), 1).astype(s.dtype)
    slopes = -2.0 * gap / count, 2.0 * gap / count
    return jnp.sum(numerics.with_slopes(jnp.square(gap) / count, logits, slopes), axis=-1)


# What they share.


def _log_probabilities(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array, Array]:
    """log p, log q to absolute precision, and their difference to relative precision."""
    student_logits, teacher_logits = numerics.check_logits(student_logits, teacher_logits)
    log_p, log_q = map(numerics.log_probabilities, (teacher_logits, student_logits))
    return log_p, log_q, numerics.log_ratio(student_logits, teacher_logits)


@jax.custom_jvp
def _alpha_beta_terms(
    log_p: Array, log_q: Array, u: Array, m: Array, alpha: float | Array, beta: float | Array
) -> Array:
    """The summands of `alpha_beta`.

    u is log_p - log_q, whose digits a subtraction would lose. m is their maximum once more, with
    its digits where it is near 0: only the derivatives in alpha and beta read it.
    """
    log_scale, factor = _scale_and_factor(_log_larger(log_p, log_q), u, alpha, beta)
    square = _square(u, log_scale)
    return jnp.where(square >= _LARGEST_ROOT**2, numerics.SATURATION, _saturated(square * factor))


def _alpha_beta_terms_jvp(primals, tangents):
    log_p, log_q, u, exact_m, alpha, beta = primals
    d_log_p, d_log_q, _, _, d_alpha, d_beta = tangents  # u and m move with log_p and log_q
    m = _log_larger(log_p, log_q)
    value = _alpha_beta_terms(*primals)
    tangent = jnp.zeros_like(value)
    if not isinstance(d_log_p, SymbolicZero):
        tangent += _slope(m, -u, beta, alpha) * d_log_p
    if not isinstance(d_log_q, SymbolicZero):
        tangent += _slope(m, u, alpha, beta) * d_log_q
    scale_and_factor = functools.partial(_scale_and_factor, exact_m, u)
    if not isinstance(d_alpha, SymbolicZero):
        tangent += _slope_in(lambda a: scale_and_factor(a, beta), alpha, u) * d_alpha
    if not isinstance(d_beta, SymbolicZero):
        tangent += _slope_in(lambda b: scale_and_factor(alpha, b), beta, u) * d_beta
    return value, tangent


_alpha_beta_terms.defjvp(_alpha_beta_terms_jvp, symbolic_zeros=True)


def _scale_and_factor(
    m: Array, u: Array, alpha: float | Array, beta: float | Array
) -> tuple[Array, Array]:
    """(z, r), such that the summand is u^2 r e^z."""
    v, s, c = jnp.maximum(u, -u), alpha + beta, jnp.where(u > 0, beta, alpha)
    z, r = numerics.exp_second_difference(-c * v, -s * v)
    return s * m + z, r


def _slope(m: Array, u: Array, alpha: float | Array, beta: float | Array) -> Array:
    """S(m, u, alpha, beta), the derivative of a summand with respect to log q."""
    v = jnp.maximum(u, -u)
    k = jnp.where(u > 0, jnp.minimum(beta, alpha + beta), jnp.minimum(alpha, 0.0))
    exponent = jnp.minimum((alpha + beta) * m - k * v, 80.0)
    return _saturated(-u * numerics.psi(jnp.maximum(alpha, -alpha) * v) * jnp.exp(exponent))


def _slope_in(
    scale_and_factor: Callable[[Array], tuple[Array, Array]], number: Array, u: Array
) -> Array:
    """The derivative of a summand with respect to alpha or beta, at fixed log p and log q."""
    (log_scale, factor), (d_log_scale, d_factor) = jax.jvp(
        scale_and_factor, (number,), (jnp.ones_like(number),)
    )
    return _saturated(_square(u, log_scale) * (d_factor + factor * d_log_scale))


def _square(u: Array, log_scale: Array) -> Array:
    """u^2 e^log_scale, squared last: the exponential alone may overflow where the product fits."""
    root = u * jnp.exp(jnp.minimum(0.5 * log_scale, 80.0))
    return jnp.square(jnp.clip(root, -_LARGEST_ROOT, _LARGEST_ROOT))


def _log_larger(log_p: Array, log_q: Array) -> Array:
    """max(log p, log q), and 0 for a class that has been removed from both."""
    larger = jnp.maximum(log_p, log_q)
    return jnp.where(jnp.isneginf(larger), 0.0, larger)


def _saturated(x: Array) -> Array:
    return jnp.clip(x, -numerics.SATURATION, numerics.SATURATION)


def _alpha_terms(log_p: Array, log_q: Array, u: Array, alpha: Array) -> Array:
    """`_alpha_beta_terms` at beta = 1 - alpha, with a derivative in alpha that keeps its digits.

    Its own would be the difference of two large sums, over the classes, in alpha and in beta.
    """
    m, beta = _log_larger(log_p, log_q), 1.0 - alpha
    terms = _alpha_beta_terms(*jax.lax.stop_gradient((log_p, log_q, u, m, alpha, beta)))
    slopes = (
        _slope(m, -u, beta, alpha),
        _slope(m, u, alpha, beta),
        _slope_in(lambda a: _scale_and_factor(m, u, a, 1.0 - a), alpha, u),
    )
    return numerics.with_slopes(terms, (log_p, log_q, alpha), slopes)


def _log_sum_of_powers(log_p: Array, log_q: Array, u: Array, order: Array) -> Array:
    """log sum p^o q^(1-o) over the last axis, which it keeps."""
    c = jnp.where(u > 0, 1.0 - order, order)
    powers = jnp.maximum(log_p, log_q) - c * jnp.maximum(u, -u)
    powers = numerics.with_slopes(powers, (log_p, log_q, order), (order, 1.0 - order, u))
    return numerics.log_sum_exp(powers)[..., None]


def _head_share(p: Array, p_less_q: Array, head_mass: Array) -> Array:
    """AKL's share of the error |p - q| that lies in the teacher's head; anything where p = q."""
    # In fixed point, whose sums are exact in any order; of classes within 2^-31 the first is first.
    double = p.dtype == jnp.float64
    scale, dtype = (2.0**61, jnp.int64) if double else (2.0**30, jnp.int32)
    mass = jnp.round(p * scale).astype(dtype)
    limit = (jnp.clip(head_mass, 0.0, 1.0) * scale).astype(dtype)
    limit = jnp.maximum(limit, jnp.max(mass, axis=-1, keepdims=True))  # at least one class
    in_head = numerics.falling_prefix(mass, limit, weighted=True)
    in_head = (in_head & (mass > 0)) | (head_mass >= 1)
    error = jnp.abs(p_less_q)
    total = jnp.sum(error, axis=-1, keepdims=True)
    of_head = jnp.sum(jnp.where(in_head, error, 0.0), axis=-1, keepdims=True)
    return of_head / jnp.where(total > 0, total, 1.0)


def _clipped(u: Array, alpha: Array, clip: Array) -> tuple[Array, Array, Array]:
    """Where AlphaNet clips, its rho there, and whether alpha counts as 0."""
    near_0, near_1 = jnp.abs(alpha) < 1e-3, jnp.abs(alpha - 1.0) < 1e-3
    safe = jnp.where(near_0, 1.0, alpha)
    rho = jnp.where(near_0, jnp.log(clip), (clip - 1.0) / safe)
    return (safe * u > jnp.log(clip)) & ~near_1, rho, near_0


def _clipped_alpha_terms(log_p: Array, log_q: Array, u: Array, alpha: Array, clip: Array) -> Array:
    """The summands of AlphaNet's D, less (p - q) / (a - 1), whose sum is 0."""
    _, q, p_less_q = _probabilities(log_p, log_q, u)
    clipped, rho, near_0 = _clipped(u, alpha, clip)
    bound = (q * rho - p_less_q) / jnp.where(near_0, -1.0, jnp.where(alpha == 1, 1.0, alpha - 1.0))
    return jnp.where(clipped, bound, _alpha_terms(log_p, log_q, u, alpha))


def _surrogate_slopes(log_p: Array, log_q: Array, u: Array, alpha: Array, clip: Array) -> Array:
    """-q rho, the slopes of AlphaNet's G in log q."""
    clipped, rho, _ = _clipped(u, alpha, clip)
    slopes = _slope(_log_larger(log_p, log_q), u, alpha, 1.0 - alpha)
    return jnp.where(clipped, -jnp.exp(log_q) * rho, slopes)


def _skew_kl(log_p: Array, log_q: Array, u: Array, skew: Array) -> Array:
    """KL(p || m) for m = s p + (1 - s) q and u = log(p / q)."""
    p, _, p_less_q = _probabilities(log_p, log_q, u)
    p_over_m, q_over_m = _log_over_mixture(u, skew)
    rest = 1.0 - skew
    near = jnp.abs(p_over_m) < 0.5
    terms = jnp.where(near, _close_kl_terms(p, p_over_m, near), p * p_over_m - rest * p_less_q)
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
    slopes = from_p, from_q, -p_less_q * _saturated(growth)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q, skew), slopes), axis=-1)


def _probabilities(log_p: Array, log_q: Array, u: Array) -> tuple[Array, Array, Array]:
    """p, q, and p - q to relative precision."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    near = jnp.abs(u) < 0.5
    small = jnp.where(near, u, 0.0)
    return p, q, jnp.where(near, q * small * numerics.exp_series(-small, 1), p - q)


def _close_kl_terms(p: Array, u: Array, near: Array) -> Array:
    """The summands p u - p + q of KL(p || q), none negative, for u = log(p / q) near 0."""
    small = jnp.where(near, u, 0.0)
    return p * jnp.square(small) * numerics.exp_series(small, 2)


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
