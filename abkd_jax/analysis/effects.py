"""The two effects of ABKD as weights, and the bounds on the log mass ratio made of them."""

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.analysis.checks import check_cached, check_values
from abkd_jax.analysis.reassignment import of_checked_change
from abkd_jax.binding import NonNegative, Number

_LOG_SATURATION = 69.0  # e^69 is just below numerics.SATURATION


def confidence_weight(student_logits: Array, *, beta: Number) -> Array:
    """q^beta, the confidence-concentration: how much a class counts by the student's own mass.

    1 everywhere at beta = 0 (forward KL), q itself at beta = 1 (reverse KL).

    Args:
        student_logits: `[..., K]`.
        beta: any real number, or an array that broadcasts to the leading axes.

    Returns:
        `[..., K]`; where q is exactly 0 the limit: 0 for beta > 0, 1 at 0, saturated below.

    Raises:
        ValueError: if beta does not broadcast.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, section 3.
    """
    logits = check_values(student_logits, "student_logits")
    exponent = numerics.per_row("beta", beta, logits) * _floored(logits)
    return jnp.exp(jnp.minimum(exponent, _LOG_SATURATION))


def hardness_weight(student_logits: Array, teacher_logits: Array, *, alpha: Number) -> Array:
    """|p^alpha - q^alpha| / |alpha|, the hardness-concentration: how much an error counts.

    |p - q| at alpha = 1 (forward KL), |log p - log q| in the limit alpha = 0 (reverse KL), and
    smooth in between: with u = log p - log q it is |u| exp[alpha log p, alpha log q], a first
    divided difference.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        alpha: any real number, or an array that broadcasts to the leading axes.

    Returns:
        `[..., K]`, with all digits also where p is close to q; 0 at a class that both have removed;
        the limit where one alone has, saturated if that is infinite.

    Raises:
        ValueError: if alpha does not broadcast.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, sections 3 and 4.
    """
    student_logits, teacher_logits = check_cached(student_logits, teacher_logits)
    alpha = numerics.per_row("alpha", alpha, student_logits)
    return jnp.abs(_weighted_gap(student_logits, teacher_logits, alpha, jnp.zeros_like(alpha)))


@struct.dataclass
class UpperBound:
    """An upper bound on |LogR| of one gradient step, in its parts.

    Attributes:
        own: `[..., K]`, eta q^beta h, of the class itself; h is the `hardness_weight`.
        others: `[..., K]`, eta q sum_k q_k^beta h_k.
        signed_others: `[..., K]`, eta q |sum_k q_k^beta (p_k^alpha - q_k^alpha) / alpha|, at most
            `others`: the same sum with each error's sign.
        normaliser: `[...]`, |N|.
        log_ratio: `[..., K]`, what is bounded: LogR of the step of `alpha_beta`.
    """

    own: Array
    others: Array
    signed_others: Array
    normaliser: Array
    log_ratio: Array

    @property
    def total(self) -> Array:
        """The bound of Proposition 4.2, `[..., K]`; at (0, 1) that of 3.1 for reverse KL."""
        return self.own + self.others + self.normaliser[..., None]

    @property
    def tighter(self) -> Array:
        """The bound with `signed_others`, `[..., K]`, at most `total`.

        At (1, 0), where the signed sum of p - q is 0, it is Proposition 3.1's for forward KL,
        eta |p - q| + |N|, which `total` is not.
        """
        return self.own + self.signed_others + self.normaliser[..., None]


def upper_bound(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha: Number,
    beta: Number,
    learning_rate: NonNegative,
) -> UpperBound:
    """The bounds of ABKD's Propositions 3.1 and 4.2 on |LogR| of a step of `alpha_beta`.

    With c = q^beta (p^alpha - q^alpha) / alpha the logits change by eta (c - q sum_k c_k). The
    bounds are the triangle inequality on that and N; they hold for a step of any size, as long as
    no |c| is saturated (at 1e30, which needs alpha + beta < 0 or a class removed on one side).

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        alpha: a number, or an array that broadcasts to the leading axes.
        beta: likewise.
        learning_rate: eta >= 0, likewise.

    Returns:
        The bound's parts.

    Raises:
        ValueError: if a number does not broadcast.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, Propositions 3.1
    and 4.2.
    """
    student_logits, teacher_logits = check_cached(student_logits, teacher_logits)
    rate = numerics.per_row("learning_rate", learning_rate, student_logits)
    alpha = numerics.per_row("alpha", alpha, student_logits)
    beta = numerics.per_row("beta", beta, student_logits)
    pull = _weighted_gap(student_logits, teacher_logits, alpha, beta)
    log_q, transposed = jax.vjp(numerics.log_probabilities, student_logits)
    (gradient,) = transposed(pull)  # pull - q sum(pull), with its digits where q is near 1
    change = of_checked_change(student_logits, rate * gradient)
    q, sum_of = jnp.exp(log_q), lambda x: jnp.sum(x, axis=-1, keepdims=True)
    return UpperBound(
        own=rate * jnp.abs(pull),
        others=rate * q * sum_of(jnp.abs(pull)),
        signed_others=rate * q * jnp.abs(sum_of(pull)),
        normaliser=jnp.abs(change.normaliser),
        log_ratio=change.log_ratio,
    )


def tightness(log_ratio: Array, bound: Array) -> Array:
    """|LogR| / bound, in [0, 1] up to rounding: 1 where the bound is attained.

    Args:
        log_ratio: `[..., K]`, of a `Reassignment`.
        bound: `[..., K]`, such as `UpperBound.total`.

    Returns:
        `[..., K]`; 1 where both are 0, as at p = q.
    """
    return jnp.where(bound > 0, jnp.abs(log_ratio) / jnp.where(bound > 0, bound, 1.0), 1.0)


def likelihood_ratio_weight(
    log_ratio: Array, log_student: Array, *, alpha: Number, beta: Number
) -> Array:
    """dD/dq = -q^(alpha + beta - 1) ((p / q)^alpha - 1) / alpha, by the likelihood ratio p / q.

    So alpha says how the ratio is weighted, and alpha + beta how the mass is. At alpha = 0 it is
    -q^(beta - 1) log(p / q).

    Args:
        log_ratio: log(p / q), of any shape: an axis to plot over, or `numerics.log_ratio`.
        log_student: log q, of a shape that broadcasts.
        alpha: a number, or an array that broadcasts.
        beta: likewise.

    Returns:
        An array of the common shape: negative, so that descent raises q, where p > q.

    Source: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, appendix E;
    Cichocki et al., "Generalized alpha-beta divergences", Entropy 13, 2011.
    """
    u, log_q, alpha, beta = (
        jnp.asarray(x, jnp.result_type(float, log_ratio))
        for x in (log_ratio, log_student, alpha, beta)
    )
    log_scale = jnp.maximum(alpha * u, 0.0) + (alpha + beta - 1.0) * log_q
    return -_scaled(u * numerics.psi(_magnitude(alpha * u)), log_scale)


def _weighted_gap(student_logits, teacher_logits, alpha, beta):
    """q^beta (p^alpha - q^alpha) / alpha, whatever is 0."""
    u = numerics.log_ratio(student_logits, teacher_logits)
    log_p, log_q = _floored(teacher_logits), _floored(student_logits)
    # One exponent: powers apart could be 0 times infinity.
    log_scale = beta * log_q + jnp.maximum(alpha * log_p, alpha * log_q)
    return _scaled(u * numerics.psi(_magnitude(alpha * u)), log_scale)


def _floored(logits: Array) -> Array:
    """Log-probabilities, with a number of large magnitude where the probability is 0."""
    return jnp.maximum(numerics.log_probabilities(logits), -numerics.MAX_LOG_RATIO)


def _scaled(x: Array, log_scale: Array) -> Array:
    """x e^log_scale, saturated: the scale in two halves, each of which float32 can hold."""
    half = jnp.exp(jnp.minimum(0.5 * log_scale, 80.0))
    return jnp.clip(x * half * half, -numerics.SATURATION, numerics.SATURATION)


def _magnitude(x: Array) -> Array:
    return jnp.maximum(x, -x)  # jnp.abs has the derivative +1 at 0
