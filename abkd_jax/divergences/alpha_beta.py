"""The alpha-beta family: `alpha_beta`, its special cases, and what is made of them."""

import functools
from collections.abc import Callable

import jax
from jax import Array
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from abkd_jax import checks, numerics
from abkd_jax.binding import NonNegative, Number
from abkd_jax.divergences.pair import checked_logs, log_larger, logs, saturated

_LARGEST_ROOT = 1e19  # its square fits float32


@jax.jit
def alpha_beta(
    student_logits: Array, teacher_logits: Array, *, alpha: Number, beta: Number
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
        alpha: any real number, or an array that broadcasts to the leading axes. Smaller: more
            weight on classes with large errors (hardness-concentration).
        beta: likewise. Larger: more weight on classes of which the student is confident
            (confidence-concentration).

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite if
        alpha + beta > 0 and alpha > 0 (for p = 0) or beta > 0 (for q = 0), else saturated.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560; Cichocki et al.,
    "Generalized alpha-beta divergences", Entropy 13, 2011.
    """
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    log_p, log_q, u = logs(student_logits, teacher_logits)
    m = log_larger(*map(numerics.log_softmax, (teacher_logits, student_logits)))
    alpha, beta = numerics.per_row("alpha", alpha, u), numerics.per_row("beta", beta, u)
    return jnp.sum(_alpha_beta_terms(log_p, log_q, u, m, alpha, beta), axis=-1)


@jax.jit
def alpha_divergence(student_logits: Array, teacher_logits: Array, *, alpha: Number) -> Array:
    """(sum_k p^a q^(1-a) - 1) / (a (a - 1)): forward KL at a = 1, reverse KL at 0.

    Args:
        alpha: a, any real number, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite if
        a > 0 (for p = 0) or a < 1 (for q = 0), else saturated.

    Source: Amari, "Differential-geometrical methods in statistics", 1985; Cichocki et al.,
    "Generalized alpha-beta divergences", Entropy 13, 2011.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    alpha = numerics.per_row("alpha", alpha, u)
    return jnp.sum(alpha_terms(log_p, log_q, u, alpha), axis=-1)


@jax.jit
def beta_divergence(student_logits: Array, teacher_logits: Array, *, beta: Number) -> Array:
    """`alpha_beta` at alpha = 1: forward KL at beta = 0, half the squared distance at 1.

    Args:
        beta: any real number, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite if
        beta > -1 (for p = 0) or beta > 0 (for q = 0), else saturated.

    Source: Basu et al., "Robust and efficient estimation by minimising a density power divergence",
    Biometrika 85, 1998, whose divergence is this one times 1 + beta.
    """
    return alpha_beta(student_logits, teacher_logits, alpha=1.0, beta=beta)


@jax.jit
def hellinger(student_logits: Array, teacher_logits: Array) -> Array:
    """2 sum (sqrt p - sqrt q)^2, four times the squared Hellinger distance: alpha_beta(1/2, 1/2).

    Returns:
        `[...]` in [0, 4], 0 exactly where p = q.
    """
    return alpha_beta(student_logits, teacher_logits, alpha=0.5, beta=0.5)


@jax.jit
def chi_squared(student_logits: Array, teacher_logits: Array) -> Array:
    """Pearson's sum (p - q)^2 / q, which is 2 alpha_beta(2, -1).

    Returns:
        `[...]`, non-negative, 0 exactly where p = q; saturated where q is 0 and p is not.
    """
    return 2.0 * alpha_beta(student_logits, teacher_logits, alpha=2.0, beta=-1.0)


@jax.jit
def renyi(student_logits: Array, teacher_logits: Array, *, order: NonNegative) -> Array:
    r"""log(sum_k p^o q^(1-o)) / (o - 1), forward KL at o = 1.

    With A the alpha-divergence at o and x = o (o - 1) A, the sum is 1 + x, so the value is
    o A log(1 + x) / x: smooth in o at 1, and with all its digits where p is close to q. Where the
    sum is not close to 1, it is taken in log space.

    Args:
        order: o >= 0, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, non-negative, 0 exactly where p = q. With one side exactly 0 at a class, finite
        unless q is and o >= 1, or the supports are disjoint; then saturated. At o = 0 the value is
        0, the limit of logits that tend to -inf (0^0 counts as 1).

    Source: Rényi, "On measures of entropy and information", 1961.
    """
    log_p, log_q, u = checked_logs(student_logits, teacher_logits)
    order = numerics.per_row("order", order, u)
    scaled = order * jnp.sum(alpha_terms(log_p, log_q, u, order), axis=-1, keepdims=True)
    x = (order - 1.0) * scaled
    near = jnp.abs(x) < 0.5
    close = scaled * numerics.log1p_series(jnp.where(near, x, 0.0))
    far = _log_sum_of_powers(log_p, log_q, u, order) / jnp.where(near, 1.0, order - 1.0)
    far = jnp.where(far < 0, 0.0, far)  # where one side alone has no class
    return jnp.where(near, close, far)[..., 0]


@jax.custom_jvp
def _alpha_beta_terms(
    log_p: Array, log_q: Array, u: Array, m: Array, alpha: float | Array, beta: float | Array
) -> Array:
    """The summands of `alpha_beta`.

    u is log_p - log_q, whose digits a subtraction would lose. m is their maximum once more, with
    its digits where it is near 0: only the derivatives in alpha and beta read it.
    """
    log_scale, factor = _scale_and_factor(log_larger(log_p, log_q), u, alpha, beta)
    square = _square(u, log_scale)
    return jnp.where(square >= _LARGEST_ROOT**2, numerics.SATURATION, saturated(square * factor))


def _alpha_beta_terms_jvp(primals, tangents):
    log_p, log_q, u, exact_m, alpha, beta = primals
    d_log_p, d_log_q, _, _, d_alpha, d_beta = tangents  # u and m move with log_p and log_q
    m = log_larger(log_p, log_q)
    value = _alpha_beta_terms(*primals)
    tangent = jnp.zeros_like(value)
    if not isinstance(d_log_p, SymbolicZero):
        tangent += slope(m, -u, beta, alpha) * d_log_p
    if not isinstance(d_log_q, SymbolicZero):
        tangent += slope(m, u, alpha, beta) * d_log_q
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


def slope(m: Array, u: Array, alpha: float | Array, beta: float | Array) -> Array:
    """S(m, u, alpha, beta), the derivative of a summand with respect to log q."""
    v = jnp.maximum(u, -u)
    k = jnp.where(u > 0, jnp.minimum(beta, alpha + beta), jnp.minimum(alpha, 0.0))
    exponent = jnp.minimum((alpha + beta) * m - k * v, 80.0)
    return saturated(-u * numerics.psi(jnp.maximum(alpha, -alpha) * v) * jnp.exp(exponent))


def _slope_in(
    scale_and_factor: Callable[[Array], tuple[Array, Array]], number: Array, u: Array
) -> Array:
    """The derivative of a summand with respect to alpha or beta, at fixed log p and log q."""
    (log_scale, factor), (d_log_scale, d_factor) = jax.jvp(
        scale_and_factor, (number,), (jnp.ones_like(number),)
    )
    return saturated(_square(u, log_scale) * (d_factor + factor * d_log_scale))


def _square(u: Array, log_scale: Array) -> Array:
    """u^2 e^log_scale, squared last: the exponential alone may overflow where the product fits."""
    root = u * jnp.exp(jnp.minimum(0.5 * log_scale, 80.0))
    return jnp.square(jnp.clip(root, -_LARGEST_ROOT, _LARGEST_ROOT))


def alpha_terms(log_p: Array, log_q: Array, u: Array, alpha: Array) -> Array:
    """`_alpha_beta_terms` at beta = 1 - alpha, with a derivative in alpha that keeps its digits.

    Its own would be the difference of two large sums, over the classes, in alpha and in beta.
    """
    m, beta = log_larger(log_p, log_q), 1.0 - alpha
    terms = _alpha_beta_terms(*jax.lax.stop_gradient((log_p, log_q, u, m, alpha, beta)))
    slopes = (
        slope(m, -u, beta, alpha),
        slope(m, u, alpha, beta),
        _slope_in(lambda a: _scale_and_factor(m, u, a, 1.0 - a), alpha, u),
    )
    return numerics.with_slopes(terms, (log_p, log_q, alpha), slopes)


def _log_sum_of_powers(log_p: Array, log_q: Array, u: Array, order: Array) -> Array:
    """log sum p^o q^(1-o) over the last axis, which it keeps."""
    c = jnp.where(u > 0, 1.0 - order, order)
    powers = jnp.maximum(log_p, log_q) - c * jnp.maximum(u, -u)
    powers = numerics.with_slopes(powers, (log_p, log_q, order), (order, 1.0 - order, u))
    return numerics.log_sum_exp(powers)[..., None]
