"""Divergences made of a divergence, by a change of the logits: scaled, shifted, cut.

Each takes a `divergence` and is one itself, so they nest: the outermost changes the logits first.
What `abkd_jax.divergences` says of shapes, precision and -inf holds here too, and what a divergence
promises (its sign, its zeros, its limits) passes to what is made of it, except where noted. The
`divergence` comes with its own numbers bound.
"""

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Number, Positive
from abkd_jax.divergences.single_pass import moved_inside
from abkd_jax.types import Divergence, Top

_FEW_CLASSES = 256  # up to here numerics.falling_prefix is faster than jax.lax.top_k, on CPU
_PUBLISHED_EPSILON = 1e-7  # added to the standard deviation by LSKD's code
_SMALL = 2.0**-64  # a power of two: its products are exact
_SMALLEST_UNIT = 1e-30  # of z-scores times _SMALL: far below that epsilon


def tempered(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    temperature: Positive,
    temperature_power: Number = 2.0,
) -> Array:
    """T^power D(softmax(teacher / T) || softmax(student / T)).

    Args:
        divergence: D.
        temperature: T > 0, or an array that broadcasts to the leading axes; else NaN results.
        temperature_power: 2 keeps the size of the gradient as T grows (Hinton et al., 2015; KD,
            DKD, LSKD); 0 leaves the divergence as it is (ABKD, TTM, SinKD).

    Returns:
        `[...]`, with the sign, the zeros and the limits of the divergence.
    """
    powers = dict(temperature=temperature, temperature_power=temperature_power)
    if (whole := moved_inside(divergence, tempered, **powers)) is not None:
        return whole(student_logits, teacher_logits)
    logits = checks.check_logits(student_logits, teacher_logits)
    *logits, scale = numerics.at_temperature(*logits, temperature, temperature_power)
    return scale * divergence(*logits)


def standardized(student_logits: Array, teacher_logits: Array, *, divergence: Divergence) -> Array:
    """D of the z-scores, (z - mean) / (1e-7 + standard deviation), of each row of logits.

    Mean and standard deviation (with K - 1) are of the classes that have a finite logit, each
    network's own; the gradient flows through both. Any increasing affine map of a row of logits
    changes nothing, a temperature outside therefore neither: LSKD tempers the scores, which is
    `standardized` of `tempered`. A row whose logits are all equal has the scores 0 and, 1e-7 being
    all that divides, a slope of 1e7.

    Returns:
        `[...]`, 0 also where the one row is an increasing affine map of the other.

    Source: Sun et al., "Logit standardization in knowledge distillation", CVPR 2024,
    https://arxiv.org/abs/2403.01427.
    """
    logits = checks.check_logits(student_logits, teacher_logits)
    return divergence(*map(_z_scores, logits))


def powered(
    student_logits: Array, teacher_logits: Array, *, divergence: Divergence, teacher_power: Number
) -> Array:
    """D of the student and the teacher's probabilities raised to a power and renormalised.

    p^g / sum p^g = softmax(g z) is the teacher at temperature 1 / g, while the student stays at 1:
    transformed teacher matching, KD with the Renyi entropy of q as a regulariser.

    Args:
        divergence: D.
        teacher_power: g, or an array that broadcasts to the leading axes. In (0, 1) it flattens; at
            0 the teacher is uniform over its classes.

    Returns:
        `[...]`, 0 where q = p^g / sum p^g.

    Source: Zheng and Yang, "Knowledge distillation based on transformed teacher matching", ICLR
    2024, https://arxiv.org/abs/2402.11148.
    """
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    student_logits, teacher_logits = jnp.broadcast_arrays(student_logits, teacher_logits)
    power = numerics.per_row("teacher_power", teacher_power, teacher_logits)
    removed = jnp.isneginf(teacher_logits)
    finite = jnp.where(removed, 0.0, teacher_logits)
    return divergence(student_logits, jnp.where(removed, teacher_logits, power * finite))


def prior_shifted(
    student_logits: Array, teacher_logits: Array, *, divergence: Divergence, log_prior: Array
) -> Array:
    """D of the student and the teacher's probabilities times a prior, renormalised.

    It is added to the teacher's logits as they arrive. BKD multiplies the teacher at temperature T
    by class weights w, (1 - b) / (1 - b^n) for a class of n examples with b = 0.9999, rescaled to
    sum to K (the scale cancels here). With the temperature outside, as in `tempered` of
    `prior_shifted` or in `on_logits`, log_prior is log w; with it inside, `prior_shifted` of
    `tempered`, it is T log w.

    Args:
        divergence: D.
        log_prior: `[K]`, or a number for classes that are equally frequent; a constant added to
            all of it changes nothing.

    Returns:
        `[...]`, 0 where q is proportional to p times the prior.

    Raises:
        ValueError: if log_prior has not one entry per class.

    Source: Zhang et al., "Balanced knowledge distillation for long-tailed learning",
    Neurocomputing 2023, https://arxiv.org/abs/2104.10510.
    """
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    log_prior, classes = jnp.asarray(log_prior, teacher_logits.dtype), teacher_logits.shape[-1:]
    fits = log_prior.shape in (classes, ())
    checks.require(fits, "log_prior", f"an array {list(classes)}, one entry per class", log_prior)
    log_prior = jnp.broadcast_to(log_prior, teacher_logits.shape)
    return divergence(student_logits, teacher_logits + log_prior)


def top_k(student_logits: Array, teacher_logits: Array, *, divergence: Divergence, k: int) -> Array:
    """D on the teacher's k most probable classes and one more, all others together.

    The last class has the exact mass of the others on either side, as the log of their sum and not
    as 1 less the sum of the k. With an f-divergence such as KL the value is at most that of all
    classes apart. TRL's `loss_add_tail` is this with forward KL.

    Args:
        divergence: D.
        k: at least 1. Of classes with equal logits the first are taken. From the number of classes
            on it is the divergence itself.

    Returns:
        `[...]`, 0 where the k + 1 masses agree, and so where p = q.

    Raises:
        ValueError: if k is less than 1.
    """
    logits = _broadcast_logits("top_k", student_logits, teacher_logits, k)
    if k >= logits[1].shape[-1]:
        return divergence(*logits)
    order, num_classes = _order(*logits), logits[1].shape[-1]
    few = num_classes <= _FEW_CLASSES
    support, in_head = (None, _is_in_head(order, k)) if few else _head(order, k)

    def bucketed(logits):
        tail = numerics.log_sum_exp(jnp.where(in_head, -jnp.inf, logits))[..., None]
        if few:  # where they are, with the tail in its first class and the others of it removed
            index = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
            first = jnp.min(jnp.where(in_head, num_classes, index), axis=-1, keepdims=True)
            return jnp.where(in_head, logits, jnp.where(index == first, tail, -jnp.inf))
        head = jnp.take_along_axis(logits, support, axis=-1)
        return jnp.concatenate([head, tail], axis=-1)

    return divergence(*map(bucketed, logits))


def top_of(logits: Array, k: int) -> Top:
    """What `top_k` sees of a teacher, to be kept in its place.

    Args:
        logits: `[..., K]`; a class of -inf comes after all others.
        k: between 1 and K.

    Returns:
        The k likeliest classes, of equal ones the first, and the tail as one.

    Raises:
        ValueError: if there are not so many classes.
    """
    logits = checks.check_rows(logits)
    checks.require(1 <= k <= logits.shape[-1], "k", f"between 1 and {logits.shape[-1]}", k)
    ids, in_head = _head(_order(logits, logits), k)
    tail = numerics.log_sum_exp(jnp.where(in_head, -jnp.inf, logits))
    head = jnp.take_along_axis(logits, ids, axis=-1)
    return Top(head, ids, tail, numerics.log_sum_exp(logits))


def top_k_renormalised(
    student_logits: Array, teacher_logits: Array, *, divergence: Divergence, k: int
) -> Array:
    """D on the teacher's k most probable classes, both sides renormalised on them.

    What the student puts elsewhere costs nothing: this is blind to its tail. MaxText and Tunix call
    it top-k.

    Args:
        divergence: D.
        k: as in `top_k`.

    Returns:
        `[...]`, 0 where the two agree on the k classes up to a factor.

    Raises:
        ValueError: if k is less than 1.
    """
    logits = _broadcast_logits("top_k_renormalised", student_logits, teacher_logits, k)
    if k >= logits[1].shape[-1]:
        return divergence(*logits)
    support = jax.lax.top_k(_order(*logits), k)[1]
    return divergence(*(jnp.take_along_axis(x, support, axis=-1) for x in logits))


def top_k_dropped(
    student_logits: Array, teacher_logits: Array, *, divergence: Divergence, k: int
) -> Array:
    """D of the student over all classes and the teacher renormalised on its k most probable ones.

    The teacher's tail is set to 0, so the student is driven to give up its own: at p = q forward KL
    is -log of the mass of the k classes, not 0. A divergence that is infinite where p is 0 and q is
    not, such as reverse KL, saturates. EasyDeL's sparse distillation is this with forward KL.

    Args:
        divergence: D.
        k: as in `top_k`.

    Returns:
        `[...]`, 0 where q is the teacher so cut.

    Raises:
        ValueError: if k is less than 1.
    """
    logits = _broadcast_logits("top_k_dropped", student_logits, teacher_logits, k)
    if k >= logits[1].shape[-1]:
        return divergence(*logits)
    in_head = _is_in_head(_order(*logits), k)
    student_logits, teacher_logits = logits
    return divergence(student_logits, jnp.where(in_head, teacher_logits, -jnp.inf))


def _z_scores(logits: Array) -> Array:
    """Of the finite entries of each row; -inf stays."""
    removed = jnp.isneginf(logits)
    count = jnp.sum(~removed, axis=-1, keepdims=True)
    # Less the largest, so that a row of equal logits is one of zeros whatever its level; and in
    # units of the longest way to it, which cancel, since 3e38 stands for a mask and has no square
    # (nor has it an inverse, hence _SMALL first).
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    below = jnp.where(removed, 0.0, _SMALL * logits - _SMALL * top)
    unit = jax.lax.stop_gradient(jnp.max(jnp.abs(below), axis=-1, keepdims=True))
    unit = jnp.maximum(unit, _SMALLEST_UNIT)
    below = below / unit
    mean = jnp.sum(below, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(removed, 0.0, below - mean)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    constant = variance == 0  # where the root has no slope
    deviation = jnp.where(constant, 0.0, jnp.sqrt(jnp.where(constant, 1.0, variance)))
    epsilon = _SMALL * _PUBLISHED_EPSILON / unit
    return jnp.where(removed, logits, centred / (deviation + epsilon))


def _broadcast_logits(
    name: str, student_logits: Array, teacher_logits: Array, k: int
) -> tuple[Array, Array]:
    """Both logits with the same leading axes, k checked on the way."""
    checks.require(k >= 1, f"{name}.k", "at least 1", k)
    return tuple(jnp.broadcast_arrays(*checks.check_logits(student_logits, teacher_logits)))


def _order(student_logits: Array, teacher_logits: Array) -> Array:
    """By which the teacher's most probable classes are taken, of equal ones the first.

    A class that is removed comes last, also behind those that only the teacher gives nothing, and
    NaN first, so that no cut hides it.
    """
    removed = jnp.isneginf(student_logits) & jnp.isneginf(teacher_logits)
    lowest = jnp.finfo(teacher_logits.dtype).min
    order = jnp.where(removed, -jnp.inf, jnp.maximum(teacher_logits, lowest))
    order = jnp.where(order == 0, 0.0, jnp.where(jnp.isnan(order), jnp.inf, order))  # nor any -0
    return jax.lax.stop_gradient(order)


def _is_in_head(order: Array, k: int) -> Array:
    """Whether a class is one of the k first, `[..., K]`, the faster way."""
    if order.shape[-1] <= _FEW_CLASSES:
        return numerics.falling_prefix(numerics.ordered_bits(order), k)
    return _head(order, k)[1]


def _head(order: Array, k: int) -> tuple[Array, Array]:
    """The k first classes, `[..., k]`, and whether a class is one of them, `[..., K]`."""
    falling, support = jax.lax.top_k(order, k)
    # Not falling[..., -1:], for which XLA on CPU would sort all classes.
    last = jnp.min(falling, axis=-1, keepdims=True)
    end = jnp.max(jnp.where(falling == last, support, -1), axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(support.dtype, order.shape, order.ndim - 1)
    return support, (order > last) | ((order == last) & (index <= end))
