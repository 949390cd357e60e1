"""Log-space arithmetic on which the divergences stand: log-probabilities, their difference, psi.

Each device here removes a measured loss of digits; the comment beside it says which. All functions
work on the last axis, accept -inf for a class that has been removed, and differentiate in forward
and reverse mode to any order.
"""

import math
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.custom_derivatives import SymbolicZero

from abkd_jax.checks import broadcast_shape, require

SATURATION = 1e30  # where a value or a slope is infinite it becomes this, so that sums stay finite
MAX_LOG_RATIO = 1e15  # log(p / q) when one of the two is exactly zero


def known_labels(labels: Array, num_classes: int) -> tuple[Array, Array]:
    """The labels, 0 in place of one that is no class, and whether each is one in [0, num_classes).

    A label that is none (-1 where it is withheld) is no class's, and what a loss gives for it is
    NaN: the value is made with class 0, whose slopes are finite, and replaced in the end.
    """
    last = min(num_classes - 1, jnp.iinfo(labels.dtype).max)  # 255 is the last of 8 bit
    known = (labels >= 0) & (labels <= last)
    return jnp.where(known, labels, 0), known


def per_row(name: str, number: float | Array, logits: Array | jax.ShapeDtypeStruct) -> Array:
    """A number in the dtype of the logits, with an axis for the classes if it has axes at all.

    Raises:
        ValueError: naming the number, if it does not broadcast to the logits' leading axes.
    """
    number = per_value(name, number, jax.ShapeDtypeStruct(logits.shape[:-1], logits.dtype))
    return number[..., None] if number.ndim else number


def per_value(name: str, number: float | Array, values: Array | jax.ShapeDtypeStruct) -> Array:
    """A number in the dtype of an array with one value per row.

    Raises:
        ValueError: naming the number, if it does not broadcast to the array's shape.
    """
    number, shape = jnp.asarray(number, values.dtype), tuple(values.shape)
    fits = broadcast_shape(number.shape, shape) == shape
    require(fits, name, f"a number, or an array that broadcasts to the rows {list(shape)}", number)
    return number


def positive(name: str, number: float | Array, logits: Array | jax.ShapeDtypeStruct) -> Array:
    """`per_row`, and NaN where the number is not positive."""
    number = per_row(name, number, logits)
    return jnp.where(number > 0, number, jnp.nan)


def at_temperature(
    student_logits: Array,
    teacher_logits: Array,
    temperature: float | Array,
    temperature_power: float | Array,
) -> tuple[Array, Array, Array]:
    """Both logits divided by T, and T^power.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`, in the same dtype, leading axes that broadcast.
        temperature: T > 0, or an array that broadcasts to the leading axes.
        temperature_power: likewise, any number.

    Returns:
        `[..., K]`, `[..., K]`, and `[...]` or a scalar; all NaN where T is not positive.

    Raises:
        ValueError: naming the number, if it does not broadcast.
    """
    shape = jnp.broadcast_shapes(student_logits.shape, teacher_logits.shape)
    rows = jax.ShapeDtypeStruct(shape, student_logits.dtype)
    divisor = positive("temperature", temperature, rows)
    scale = divisor ** per_row("temperature_power", temperature_power, rows)
    return (
        divided_logits(student_logits, divisor),
        divided_logits(teacher_logits, divisor),
        scale[..., 0] if scale.ndim else scale,
    )


def divided_logits(logits: Array, temperature: Array) -> Array:
    """logits / temperature with -inf left alone, whose derivative in the temperature is NaN."""
    removed = jnp.isneginf(logits)
    return jnp.where(removed, logits, jnp.where(removed, 0.0, logits) / temperature)


def masked_mean(values: Array, where: Array, count: Array | None = None) -> Array:
    """The mean of the values that `where` selects; 0 where it selects none.

    Args:
        values: `[...]`; what is not selected may be anything, NaN included.
        where: `[...]` bool.
        count: the divisor, if it is not the number selected here (a part of a larger batch).

    Returns:
        A scalar.
    """
    count = jnp.sum(where) if count is None else count
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(count, 1)


def entropy(logits: Array) -> Array:
    """-sum p log p over the last axis, in nats: `[..., K]` -> `[...]`, in [0, ln K]."""
    log_probs = log_softmax(logits)
    present = jnp.where(jnp.isneginf(log_probs), 0.0, log_probs)
    return -jnp.sum(jnp.exp(log_probs) * present, axis=-1)


def norm(x: Array, axis: int | tuple[int, ...] = -1, *, keepdims: bool = False) -> Array:
    """The Euclidean norm over the axes, with slope 0 at 0, where autodiff's would be NaN."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims)
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def psi(gap: Array) -> Array:
    """(1 - e^-g) / g, the mean of e^-t over [0, g], for g >= 0, with all its derivatives."""
    small = gap < 0.5
    quotient = (1.0 - jnp.exp(-gap)) / jnp.where(small, 1.0, gap)
    return jnp.where(small, exp_series(jnp.where(small, gap, 0.0), 1), quotient)


@jax.custom_jvp
def with_slopes(value: Array, arguments: tuple[Array, ...], slopes: tuple[Array, ...]) -> Array:
    """The value, with the given slopes in the arguments in place of those autodiff would find.

    The slopes are differentiable in their turn, so second derivatives are right too.
    """
    del arguments, slopes
    return value


def _with_slopes_jvp(primals, tangents):
    value, arguments, slopes = primals
    parts = [
        slope * tangent
        for slope, tangent in zip(slopes, tangents[1], strict=True)
        if not isinstance(tangent, SymbolicZero)
    ]
    # Not the bare value: what is made of it is differentiated again by these slopes.
    return with_slopes(value, arguments, slopes), sum(parts, jnp.zeros_like(value))


with_slopes.defjvp(_with_slopes_jvp, symbolic_zeros=True)


def exp_series(gap: Array, order: int) -> Array:
    """sum_n (-g)^n / (n + order)! for |g| < 1/2: psi for order 1, (g - 1 + e^-g) / g^2 for order 2.

    expm1 would do for the value of psi, and lose its derivative near 0.
    """
    terms = _terms(gap.dtype)
    series = jnp.full_like(gap, (-1.0) ** terms / math.factorial(terms + order))
    for n in reversed(range(terms)):
        series = series * gap + (-1.0) ** n / math.factorial(n + order)
    return series


def log1p_series(x: Array) -> Array:
    """log(1 + x) / x for |x| <= 1/2, with all its derivatives, which are finite at 0.

    log1p would do for the value, and lose its derivative near 0.
    """
    y = x / (2.0 + x)  # log(1 + x) = 2 artanh y, and |y| <= 1/3
    series = jnp.zeros_like(y)
    for n in reversed(range(2 * _terms(y.dtype))):
        series = series * jnp.square(y) + 1.0 / (2 * n + 1)
    return 2.0 / (2.0 + x) * series


def exp_second_difference(a: Array, b: Array) -> tuple[Array, Array]:
    """The second divided difference of exp on the nodes 0, a, b, as (z, r) with value r e^z.

    It is the mean of exp over the triangle of the nodes, halved: positive, symmetric, and smooth
    however the nodes coincide, so a divergence written with it has no limits left to take.
    """
    # Sorted by selection: minimum and maximum halve the derivatives of nodes that coincide.
    low, high = jnp.where(a > b, b, a), jnp.where(a > b, a, b)
    top, bottom = jnp.where(high > 0, high, 0.0), jnp.where(low > 0, 0.0, low)
    middle = jnp.where(low > 0, low, jnp.where(high > 0, 0.0, high))
    spread = top - bottom
    wide = spread >= 0.5
    upper, lower = top - middle, middle - bottom

    divisor = jnp.where(wide, spread, 1.0)
    quotient = (psi(upper) - jnp.exp(-upper) * psi(lower)) / divisor

    near, lower = jnp.where(wide, 0.0, spread), jnp.where(wide, 0.0, lower)
    complete, power = jnp.ones_like(near), jnp.ones_like(near)
    series = 0.5 * complete
    for n in range(1, _terms(near.dtype)):  # sum of h_n(0, lower, near) / (n + 2)!, all positive
        power = power * near
        complete = complete * lower + power
        series = series + complete / math.factorial(n + 2)
    return jnp.where(wide, top, bottom), jnp.where(wide, quotient, series)


def _terms(dtype: Any) -> int:
    """How many terms of a series in g < 1/2, divided by factorials, reach the dtype's precision."""
    return 8 if jnp.finfo(dtype).bits == 32 else 15


def ordered_bits(x: Array) -> Array:
    """Integers in the order of the floats, among which no NaN and no -0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def falling_prefix(levels: Array, limit: int | Array, *, weighted: bool = False) -> Array:
    """The classes taken in falling order of level for as long as their sum is within a limit.

    Of equal levels the first class comes first.

    Args:
        levels: integers, `[..., K]`, not negative if they are weights.
        limit: an integer, or `[..., 1]`, whose leading axes broadcast with those of the levels.
        weighted: whether a class counts as much as its level; else each counts 1.

    Returns:
        `[..., K]` bool.
    """
    limit = jnp.asarray(limit, levels.dtype)
    leading = jnp.broadcast_shapes(levels.shape[:-1], limit.shape[:-1])
    levels = jnp.broadcast_to(levels, (*leading, levels.shape[-1]))
    limit = jnp.broadcast_to(limit, (*leading, 1))
    return _prefix_by_search(levels, limit, weighted=weighted)


def head(p: Array, head_mass: Array) -> Array:
    """The likeliest class, and those that follow for as long as their sum is at most `head_mass`.

    Args:
        p: probabilities, `[..., K]`.
        head_mass: `[..., 1]`, whose leading axes broadcast; from 1 on all classes are in the head.

    Returns:
        `[..., K]` bool. Of classes of equal p, to about 2^-31, the first comes first.
    """
    # In fixed point, whose sums are exact in any order.
    double = p.dtype == jnp.float64
    scale, dtype = (2.0**61, jnp.int64) if double else (2.0**30, jnp.int32)
    mass = jnp.round(p * scale).astype(dtype)
    limit = (jnp.clip(head_mass, 0.0, 1.0) * scale).astype(dtype)
    limit = jnp.maximum(limit, jnp.max(mass, axis=-1, keepdims=True))  # at least one class
    return (falling_prefix(mass, limit, weighted=True) & (mass > 0)) | (head_mass >= 1)


def log_sum_exp(logits: Array) -> Array:
    """log sum exp over the last axis, `[..., K]` -> `[...]`; -inf, with slope 0, if all are."""
    top = jax.lax.stop_gradient(_finite_max(logits))
    total = jnp.sum(jnp.exp(logits - top), axis=-1)
    none = total == 0
    # Not _normaliser: the derivative of its maximum is halved where the total is just 1.
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, total)) + top[..., 0])


@jax.custom_jvp
def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, to full relative precision also where one is near 0.

    Args:
        logits: `[..., K]`; -inf gives probability 0. A row of nothing but -inf stays -inf.

    Returns:
        `[..., K]`, at most 0.
    """
    shifted, exp = _shifted_exp(logits)
    below = jnp.sum(jnp.where(shifted == 0, 0.0, exp), axis=-1, keepdims=True)
    ties = jnp.round(jnp.sum(exp, axis=-1, keepdims=True) - below)
    return shifted - jnp.log1p(below + jnp.maximum(ties - 1.0, 0.0))


@jax.custom_jvp
def log_probabilities(logits: Array) -> Array:
    """`log_softmax` to full absolute precision: all that its exp needs, and one sum less."""
    shifted, exp = _shifted_exp(logits)
    return shifted - jnp.log(_normaliser(exp))


@log_softmax.defjvp
def _log_softmax_jvp(primals, tangents):
    return log_softmax(*primals), _centred(tangents[0], log_probabilities(*primals))


@log_probabilities.defjvp
def _log_probabilities_jvp(primals, tangents):
    log_probs = log_probabilities(*primals)
    return log_probs, _centred(tangents[0], log_probs)


@jax.custom_jvp
def log_ratio(student_logits: Array, teacher_logits: Array) -> Array:
    """log p - log q, teacher over student, to full relative precision also where p is close to q.

    A difference of two log-softmaxes loses every digit there. Instead the raw logits are
    subtracted, with the rounding error of the subtraction added back, and the two normalisers are
    compared through the sum of the differences of their terms.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[..., K]`, within +-MAX_LOG_RATIO, which stands where one side alone is -inf; 0 where both
        are.
    """
    _, exp_s = _shifted_exp(student_logits)
    _, exp_t = _shifted_exp(teacher_logits)
    no_s, no_t = jnp.isneginf(student_logits), jnp.isneginf(teacher_logits)
    s, t = jnp.where(no_s, 0.0, student_logits), jnp.where(no_t, 0.0, teacher_logits)
    difference, error = _exact_difference(t, s)
    offset, offset_error = _exact_difference(
        _finite_max(teacher_logits), _finite_max(student_logits)
    )
    h = (difference - offset) + (error - offset_error)
    one_sided = MAX_LOG_RATIO * (no_s.astype(h.dtype) - no_t.astype(h.dtype))
    h = jnp.where(no_s | no_t, one_sided, h)

    close = jnp.abs(h) < 0.5  # where exp_t - exp_s would cancel
    near = jnp.where(close, jnp.abs(h), 0.0)
    product = h * exp_series(near, 1) * jnp.maximum(exp_t, exp_s)
    gap = jnp.sum(jnp.where(close, product, exp_t - exp_s), axis=-1, keepdims=True)
    smaller = jnp.minimum(_normaliser(exp_t), _normaliser(exp_s))
    u = h - jnp.sign(gap) * jnp.log1p(jnp.abs(gap) / smaller)
    return jnp.where(no_s & no_t, 0.0, jnp.clip(u, -MAX_LOG_RATIO, MAX_LOG_RATIO))


@log_ratio.defjvp
def _log_ratio_jvp(primals, tangents):
    student_logits, teacher_logits = primals
    d_log_q = _centred(tangents[0], log_probabilities(student_logits))
    d_log_p = _centred(tangents[1], log_probabilities(teacher_logits))
    removed = jnp.isneginf(student_logits) & jnp.isneginf(teacher_logits)
    return log_ratio(*primals), jnp.where(removed, 0.0, d_log_p - d_log_q)


def _finite_max(logits: Array) -> Array:
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(jnp.isneginf(top), 0.0, top)


def _shifted_exp(logits: Array) -> tuple[Array, Array]:
    """logits - max, and its exp."""
    shifted = logits - _finite_max(logits)
    return shifted, jnp.exp(shifted)


def _normaliser(exp: Array) -> Array:
    """The sum of `_shifted_exp`, at least 1 also where a row has no class."""
    return jnp.maximum(jnp.sum(exp, axis=-1, keepdims=True), 1.0)


def _exact_difference(a: Array, b: Array) -> tuple[Array, Array]:
    """a - b as rounded, and the rounding error (Knuth's TwoSum)."""
    difference = a - b
    b_part = a - difference
    a_part = difference + b_part
    return difference, (a - a_part) - (b - b_part)


def _centred(tangent: Array, log_probs: Array) -> Array:
    """The tangent of log-softmax: the logits' tangent less its mean under the probabilities.

    Everything is taken relative to the class that holds more than half of the mass, if there is
    one. Transposed, the gradient of that class is minus the sum of the others, which keeps its
    digits when the row is saturated; 1 - q would not.
    """
    probs = jnp.exp(log_probs)
    pivot = probs > 0.5
    at_pivot = jnp.sum(jnp.where(pivot, tangent, 0.0), axis=-1, keepdims=True)
    delta = jnp.where(pivot, 0.0, tangent - at_pivot)
    return delta - jnp.sum(probs * delta, axis=-1, keepdims=True)


def _prefix_by_search(levels: Array, limit: Array, *, weighted: bool) -> Array:
    """By bisection, bit by bit: all its passes together take a fraction of a sort.

    First of the level at which the sum exceeds the limit, until every row has one class left that
    may be it. Where several share that level, of the index up to which they still fit, or of a few
    one by one.
    """
    columns, limit = jnp.moveaxis(levels, -1, 0), limit[..., 0]  # to reduce by whole vectors
    weights = columns if weighted else jnp.ones_like(columns)
    one = jnp.ones((), levels.dtype)

    def sum_of(inside):
        return jnp.sum(jnp.where(inside, weights, 0), axis=0, dtype=levels.dtype)

    def halve(state):  # low <= level < low + 2^bits, with the sums from there on
        bits, low, from_low, above, _ = state
        bits -= 1
        middle = low + (one << bits)
        from_middle = sum_of(columns >= middle[None])
        exceeds = from_middle > limit
        low = jnp.where(exceeds, middle, low)
        from_low = jnp.where(exceeds, from_middle, from_low)
        above = jnp.where(exceeds, above, from_middle)
        lightest = low if weighted else one
        single = (from_low > limit) & (from_low - above - lightest < lightest)
        return bits, low, from_low, above, single

    info = jnp.iinfo(levels.dtype)
    bits, lowest = jnp.asarray(info.bits, levels.dtype), 0 if weighted else info.min
    if weighted:  # no more than the largest level has
        bits -= jax.lax.clz(jnp.max(columns, initial=0))
    low, everything = jnp.full_like(limit, lowest), sum_of(columns >= lowest)
    state = (
        bits,
        low,
        everything,
        jnp.zeros_like(limit),
        jnp.zeros_like(limit, bool),
    )
    bits, low, _, above, single = jax.lax.while_loop(
        lambda state: (state[0] > 0) & ~jnp.all(state[-1]), halve, state
    )
    high = low + ((one << bits) - 1)

    level = (columns >= low[None]) & (columns <= high[None])
    index = jax.lax.broadcasted_iota(int, columns.shape, 0)

    def halve_index(state):
        bits, end = state
        further = end + (1 << (bits - 1))
        fits = above + sum_of(level & (index < further[None])) <= limit
        return bits - 1, jnp.where(fits, further, end)

    def take_next(state):
        left, end = state
        following = jnp.min(jnp.where(level & (index >= end[None]), index, len(columns)), axis=0)
        return left - 1, jnp.where(left > 0, following + 1, end)

    fitting = limit - above
    if weighted:  # by weights of 0 any number
        fitting = jnp.where(low > 0, fitting // jnp.maximum(low, 1), len(columns))
    left = jnp.where(jnp.all(single), 0, jnp.maximum(fitting, 0))
    steps = jnp.asarray(len(columns).bit_length())
    end = jnp.zeros_like(limit, index.dtype)
    few = jnp.max(left, initial=0) < steps
    left, end = jax.lax.while_loop(
        lambda state: few & jnp.any(state[0] > 0), take_next, (left, end)
    )
    steps = jnp.where(few, 0, steps)
    _, end = jax.lax.while_loop(lambda state: state[0] > 0, halve_index, (steps, end))
    low, high, end = low[..., None], high[..., None], end[..., None]
    index = jnp.moveaxis(index, 0, -1)
    return (levels > high) | ((levels >= low) & (index < end))
