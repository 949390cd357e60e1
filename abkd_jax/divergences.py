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
from abkd_jax.types import Divergence

_LARGEST_ROOT = 1e19  # its square fits float32


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
    p, q, v = jnp.exp(log_p), jnp.exp(log_q), jnp.maximum(u, -u)
    slopes = 0.5 * jnp.sign(u) * p, -0.5 * jnp.sign(u) * q
    terms = 0.5 * jnp.maximum(p, q) * v * numerics.psi(v)
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q), slopes), axis=-1)


@jax.jit
def jensen_shannon(
    student_logits: Array, teacher_logits: Array, *, teacher_weight: float | Array
) -> Array:
    """w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q and w the teacher's weight.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        teacher_weight: w in [0, 1], or an array that broadcasts to the leading axes. 0.5 is the
            symmetric divergence; at 0 and 1 the value is 0 (its slope there is forward KL and minus
            reverse KL, the limits that some codes substitute for the value).

    Returns:
        `[...]` in [0, ln 2] nats, non-negative, 0 exactly where p = q.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991; as a distillation loss,
    Agarwal et al., 2024, https://arxiv.org/abs/2306.13649, whose beta weighs the teacher.
    """
    log_p, log_q, u = _log_probabilities(student_logits, teacher_logits)
    w = numerics.per_row("teacher_weight", teacher_weight, u)
    p, q, p_over_m, q_over_m = jnp.exp(log_p), jnp.exp(log_q), *_log_over_mixture(u, w)
    m = w * p + (1.0 - w) * q
    from_p, from_q = _kl_terms(p, m, p_over_m), _kl_terms(q, m, q_over_m)
    slopes = w * p * p_over_m, (1.0 - w) * q * q_over_m, from_p - from_q
    terms = w * from_p + (1.0 - w) * from_q
    return jnp.sum(numerics.with_slopes(terms, (log_p, log_q, w), slopes), axis=-1)


def tempered(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    temperature: float | Array,
    temperature_power: float | Array = 2.0,
) -> Array:
    """T^power D(softmax(teacher / T) || softmax(student / T)).

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        divergence: D, its own numbers bound.
        temperature: T > 0, or an array that broadcasts to the leading axes; else NaN results.
        temperature_power: 2 keeps the size of the gradient as T grows (Hinton et al., 2015; KD,
            DKD, LSKD); 0 leaves the divergence as it is (ABKD, TTM, SinKD).

    Returns:
        `[...]`, with the sign, the zeros and the limits of the divergence.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    student_logits, teacher_logits = numerics.check_logits(student_logits, teacher_logits)
    leading = jnp.broadcast_shapes(student_logits.shape, teacher_logits.shape)
    logits = jax.ShapeDtypeStruct(leading, student_logits.dtype)
    divisor = numerics.per_row("temperature", temperature, logits)
    power = numerics.per_row("temperature_power", temperature_power, logits)
    value = divergence(
        numerics.divided_logits(student_logits, divisor),
        numerics.divided_logits(teacher_logits, divisor),
    )
    scale = jnp.where(divisor > 0, divisor, jnp.nan) ** power
    return (scale[..., 0] if scale.ndim else scale) * value


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


def _kl_terms(p: Array, q: Array, u: Array) -> Array:
    """The summands p u - p + q of KL(p || q), none negative, for u = log(p / q)."""
    near = jnp.abs(u) < 0.5
    small = jnp.where(near, u, 0.0)
    return jnp.where(near, p * jnp.square(small) * numerics.exp_series(small, 2), p * (u - 1.0) + q)


def _log_over_mixture(u: Array, w: Array) -> tuple[Array, Array]:
    """log(p / m) and log(q / m) for m = w p + (1 - w) q and u = log(p / q)."""
    larger = jnp.where(u >= 0, w, 1.0 - w)  # the weight of the larger of p and q
    v = jnp.where(u >= 0, u, -u)
    near = v < 1.0
    small = jnp.where(near, v, 0.0)
    smaller = jnp.where(u >= 0, 1.0 - w, w)  # that of the other, with its digits near 0
    product = small * numerics.psi(small)
    close = -jnp.log1p(-smaller * product)
    mixture = larger + (1.0 - larger) * jnp.exp(-v)  # over the larger of p and q
    tiny = jnp.finfo(v.dtype).tiny
    far = jnp.where(mixture > tiny, -jnp.log(jnp.maximum(mixture, tiny)), v)
    far = jnp.where(larger > 0.5, -jnp.log1p(smaller * jnp.expm1(-v)), far)
    of_larger = jnp.where(near, close, far)
    growth = jnp.where(near, product * jnp.exp(small), jnp.expm1(jnp.minimum(v, 80.0)))
    of_smaller = jnp.where(v < 80.0, -jnp.log1p(larger * growth), of_larger - v)
    return jnp.where(u >= 0, of_larger, of_smaller), jnp.where(u >= 0, of_smaller, of_larger)
