"""Losses on relations: how the classes of a row, or the rows of a batch, lie to each other."""

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Number, Positive
from abkd_jax.types import Batch, Outputs

_DIST_EPSILON = 1e-8  # of DIST's published code
_SHORT = 8  # classes, of which isotonic regression finds all means: a tile of a TPU


def dist(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    row_weight: Number = 1.0,
    column_weight: Number = 1.0,
    temperature: Positive = 1.0,
) -> Array:
    """T^2 (row_weight (1 - rho of the row) + column_weight (1 - mean over classes of their rho)).

    rho is Pearson's correlation between the probabilities q, p at the temperature T: of a row over
    its classes ("inter-class"), and of a class over the rows of the batch ("intra-class"). Each
    example has its row's part and the part of the columns, which all share. T^2 is the published
    code's. So is its 1e-8, which is added to the product of the two norms: a column whose
    probabilities are all below about 1e-4 counts as uncorrelated, and identical logits give a value
    that is a little more than 0.

    rho is 0 where a row or a column is constant on one side, as the columns of a single row are
    and all rows of a student whose last layer starts at 0. There it has no gradient, where the
    published code's is some 1e8 long.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: its `where` [...]; all leading axes together are the rows.
        row_weight: a number, or an array that broadcasts to the leading axes.
        column_weight: likewise.
        temperature: T > 0, likewise; else NaN results.

    Returns:
        `[...]`, one value per example, in [0, 2 T^2 (row_weight + column_weight)].

    Source: Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022,
    https://arxiv.org/abs/2205.10536.
    """
    q, p, present = batch_probabilities(student, teacher, batch, temperature)
    rows = _where_any(present, 1.0 - _correlation(q, p, present, -1, _DIST_EPSILON), -1)
    columns = _where_any(present, 1.0 - _correlation(q, p, present, 0, _DIST_EPSILON), 0)
    shared = numerics.masked_mean(columns, jnp.any(present, axis=0))
    rows = rows.reshape(batch["where"].shape)
    numbers = {"row_weight": row_weight, "column_weight": column_weight, "temperature": temperature}
    on_rows, on_columns, t = (numerics.per_value(*number, rows) for number in numbers.items())
    return jnp.square(t) * (on_rows * rows + on_columns * shared)


dist.needs = ("logits",)
dist.couples_batch = True


def gram(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    batch_weight: Number = 1.0,
    class_weight: Number = 1.0,
    temperature: Positive = 4.0,
) -> Array:
    """batch_weight |P P' - Q Q'|^2 / B + class_weight |P'P - Q'Q|^2 / K, in Frobenius norms.

    P and Q are the teacher's and the student's probabilities [B, K] at the temperature. P P' says
    how alike the examples of the batch are, P'P how the classes go together. Each example has its
    row's part of the first term, so that their mean is the term, and the second, which all share.
    There is no factor of T^2, as in the published code.

    The paper also leaves out examples and classes of which the teacher is confident. Its code does
    so by a factor on the reduced loss, which is another thing; neither is offered here.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: its `where` [...]; all leading axes together are the B rows.
        batch_weight: a number, or an array that broadcasts to the leading axes.
        class_weight: likewise. The second term takes memory for K^2 numbers.
        temperature: T > 0, likewise; else NaN results.

    Returns:
        `[...]`, one value per example, non-negative, 0 if the logits are identical.

    Source: Jin, Wang and Lin, "Multi-level logit distillation", CVPR 2023.
    """
    q, p, present = batch_probabilities(student, teacher, batch, temperature)
    num_classes = jnp.maximum(jnp.sum(jnp.any(present, axis=0)), 1)
    rows = jnp.sum(jnp.square(_gram(p) - _gram(q)), axis=-1).reshape(batch["where"].shape)
    shared = jnp.sum(jnp.square(_gram(p.T) - _gram(q.T))) / num_classes
    on_rows = numerics.per_value("batch_weight", batch_weight, rows)
    on_classes = numerics.per_value("class_weight", class_weight, rows)
    return on_rows * rows + on_classes * shared


gram.needs = ("logits",)
gram.couples_batch = True


def rank_correlation(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    pearson_weight: Number = 1.0,
    spearman_weight: Number = 1.0,
    regularization: Positive = 1.0,
) -> Array:
    """pearson_weight (1 - Pearson's correlation) + spearman_weight (1 - a soft Spearman's).

    The first is of a row's logits; the second of their soft ranks, those of Blondel et al.: the
    point of the permutahedron (the convex hull of all orders of 1..K) that is nearest to the logits
    after these have been given the mean and the standard deviation of 1..K, divided by the
    regularization. Both are blind to the logits' scale and shift, and so to a temperature.

    This is our reading of CMKD, of which the abstract alone could be read: Pearson's and Spearman's
    correlations on standardised outputs, the latter by differentiable sorting. Open are the ranker,
    its strength, and the paper's weights by difficulty, which are left to `entropy_weighted` and
    the like. This ranker and not one of pairwise sigmoids, since it gives the very ranks as soon as
    the gaps between logits allow, and its cost in memory is O(K).

    Args:
        student: the network that is being trained; its `logits` [..., K]. -inf on one side stands
            for a logit that goes there, which makes all others equal.
        teacher: the other one; its `logits` [..., K].
        batch: not read.
        pearson_weight: a number, or an array that broadcasts to the leading axes.
        spearman_weight: likewise.
        regularization: > 0, likewise; else NaN results. As it goes to 0 the second part becomes
            Spearman's correlation, whose gradient is 0; as it grows, Pearson's.

    Returns:
        `[...]`, one value per example, in [0, 2 (pearson_weight + spearman_weight)], 0 if the
        logits are identical. A row that is constant on one side has correlation 0, without slope.

    Source: CMKD, arXiv 2410.06561; Blondel et al., "Fast differentiable sorting and ranking", ICML
    2020, https://arxiv.org/abs/2002.08871.
    """
    del batch
    logits = jnp.broadcast_arrays(*checks.check_logits(student.logits, teacher.logits))
    present = ~(jnp.isneginf(logits[0]) & jnp.isneginf(logits[1]))
    z_s, z_t = (jnp.maximum(z, -numerics.MAX_LOG_RATIO) for z in logits)
    strength = numerics.positive("regularization", regularization, z_s)
    pearson = _where_any(present, 1.0 - _correlation(z_s, z_t, present, -1), -1)
    # The classes in the student's falling order, the present ones first.
    _, z_s, z_t = _sorted(jnp.where(present, -z_s, jnp.inf), (z_s, z_t))
    place = jax.lax.broadcasted_iota(jnp.int32, z_s.shape, z_s.ndim - 1)
    present = place < jnp.sum(present, axis=-1, keepdims=True)
    keys = jnp.where(present, -z_t, jnp.inf)
    order, falling = _sorted(keys, (z_t,))
    ranks_t = _permuted(_soft_ranks(falling, present, strength), keys, order, back=True)
    ranks_s = _soft_ranks(z_s, present, strength)
    spearman = _where_any(present, 1.0 - _correlation(ranks_s, ranks_t, present, -1), -1)
    on_pearson = numerics.per_value("pearson_weight", pearson_weight, pearson)
    on_spearman = numerics.per_value("spearman_weight", spearman_weight, spearman)
    return on_pearson * pearson + on_spearman * spearman


rank_correlation.needs = ("logits",)


def batch_probabilities(
    student: Outputs, teacher: Outputs, batch: Batch, temperature: float | Array
) -> tuple[Array, Array, Array]:
    """The probabilities of a batch as two matrices, for losses that couple its examples.

    Args:
        student: its `logits` [..., K].
        teacher: its `logits` [..., K].
        batch: its `where` [...], bool.
        temperature: T > 0, a number, or an array that broadcasts to the leading axes.

    Returns:
        The student's and the teacher's probabilities `[N, K]`, and what of them is `present`
        `[N, K]`: not padding, and not a class with the logit -inf on both sides. The rest is 0, and
        nothing of it, NaN included, gets into values or gradients.
    """
    logits = jnp.broadcast_arrays(*checks.check_logits(student.logits, teacher.logits))
    where = checks.check_where(batch["where"], logits[0].shape[:-1])
    divisor = numerics.positive("temperature", temperature, logits[0])
    present = where[..., None] & ~(jnp.isneginf(logits[0]) & jnp.isneginf(logits[1]))

    def probabilities(logits):
        tempered = numerics.divided_logits(jnp.where(where[..., None], logits, 0.0), divisor)
        probs = jnp.where(present, jnp.exp(numerics.log_probabilities(tempered)), 0.0)
        return probs.reshape(-1, logits.shape[-1])

    return *map(probabilities, logits), present.reshape(-1, logits[0].shape[-1])


def _where_any(present: Array, values: Array, axis: int) -> Array:
    return jnp.where(jnp.any(present, axis=axis), values, 0.0)


def _gram(x: Array) -> Array:
    """x x', without the short digits that accelerators have for products of matrices."""
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)


def _correlation(x: Array, y: Array, present: Array, axis: int, epsilon: float = 0.0) -> Array:
    """Pearson's correlation over what is present; 0, without slope, where one side is constant."""
    x, y = (_centred(values, present, axis) for values in (x, y))
    scale = numerics.norm(x, axis) * numerics.norm(y, axis) + epsilon
    return jnp.sum(x * y, axis=axis) / jnp.where(scale > 0, scale, 1.0)


def _centred(x: Array, present: Array, axis: int) -> Array:
    """x less its mean over what is present, elsewhere 0.

    A constant is found by comparing, since rounding leaves something of it to be divided by its
    norm.
    """
    options = dict(axis=axis, keepdims=True)
    low = jnp.min(jnp.where(present, x, jnp.inf), initial=jnp.inf, **options)
    high = jnp.max(jnp.where(present, x, -jnp.inf), initial=-jnp.inf, **options)
    count = jnp.maximum(jnp.sum(present, **options), 1)
    mean = jnp.sum(jnp.where(present, x, 0.0), **options) / count
    return jnp.where(present & (high != low), x - mean, 0.0)


@jax.custom_jvp
def _sorted(keys: Array, values: tuple[Array, ...]) -> tuple[Array, ...]:
    """The places of the keys in rising order, and the values in their order, on the last axis."""
    places = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
    return tuple(jax.lax.sort((keys, places, *values), num_keys=1)[1:])


@_sorted.defjvp
def _sorted_jvp(primals, tangents):
    keys, _ = primals
    order, *values = _sorted(*primals)
    moved = (_permuted(tangent, keys, order, back=False) for tangent in tangents[1])
    return (order, *values), (np.zeros(order.shape, jax.dtypes.float0), *moved)


def _permuted(values: Array, keys: Array, order: Array, *, back: bool) -> Array:
    """The values in rising order of the keys, or back from this order.

    A TPU gathers and scatters class by class, for the price of some fifty sorts; so it sorts, also
    in the derivatives. That the transpose of a sort is another can be said of what solves an
    equation; its matrix is only looked at.
    """
    keys = jax.lax.stop_gradient(keys)

    def matrix(x):
        one_hot = jax.nn.one_hot(order, x.shape[-1], dtype=x.dtype)
        return jnp.einsum("...ij,...j->...i" if back else "...ij,...i->...j", one_hot, x)

    def there(_, x):
        sort = lambda x: jax.lax.sort((keys, x), num_keys=1)[1]  # noqa: E731
        gather = lambda x: jnp.take_along_axis(x, order, axis=-1)  # noqa: E731
        return jax.lax.platform_dependent(x, tpu=sort, default=gather)

    def undone(_, x):
        sort = lambda x: jax.lax.sort((order, x), num_keys=1)[1]  # noqa: E731
        scatter = lambda x: jnp.put_along_axis(x, order, x, axis=-1, inplace=False)  # noqa: E731
        return jax.lax.platform_dependent(x, tpu=sort, default=scatter)

    ways = (undone, there) if back else (there, undone)
    return jax.lax.custom_linear_solve(matrix, values, *ways)


def _soft_ranks(falling: Array, present: Array, regularization: Array) -> Array:
    """The point of the permutahedron nearest to the standardised values, which fall: `[..., K]`.

    It is they less the falling sequence that fits them less (K..1) best; and such a fit consists of
    the means of blocks (isotonic regression).
    """
    count = jnp.sum(present, axis=-1, keepdims=True).astype(falling.dtype)
    centred = _centred(falling, present, -1)
    norm = numerics.norm(centred, -1, keepdims=True)
    size = jnp.sqrt(count * (jnp.square(count) - 1.0) / 12.0) / regularization  # 1..K has this norm
    ranks = count - jax.lax.broadcasted_iota(falling.dtype, falling.shape, falling.ndim - 1)
    rest = centred / jnp.where(norm > 0, norm, 1.0) * size - ranks
    fit = _falling_fit(jnp.where(present, rest, _below(rest, present, -1)))
    # Not the values less the fit: where a block is of one, its rank is then exact.
    return jnp.where(present, ranks + (rest - fit), 0.0)


def _falling_fit(x: Array) -> Array:
    """The falling sequence nearest to x along the last axis, by merging neighbouring fits.

    Two parts with the fits v and w have the fit max(v, c) and min(w, c), at the c at which as much
    is added to the one as is taken from the other: c is the mean of all v < c and w > c. Its
    derivative is that of these means, whose members stay.
    """
    classes, size = x.shape[-1], _SHORT
    columns = jnp.moveaxis(x, -1, 0)  # to reduce by whole vectors
    count, rows = max(size, 1 << (classes - 1).bit_length()), columns.shape[1:]
    lower = jnp.broadcast_to(_below(columns, True, 0), (count - classes, *rows))
    columns = jnp.concatenate([columns, lower])
    fit = _short_fit(columns.reshape(count // size, size, *rows))
    while size < count:
        size *= 2
        fit = _merged(fit.reshape(count // size, size, *rows))
    return jnp.moveaxis(fit.reshape(count, *rows)[:classes], 0, -1)


@jax.custom_jvp
def _merged(parts: Array) -> Array:
    """The fits `[N, 2 size, ...]` along axis 1, of which each half is one."""
    return _merged_and_pooled(parts)[0]


@_merged.defjvp
def _merged_jvp(primals, tangents):
    (fit, pooled), (tangent,) = _merged_and_pooled(*primals), tangents
    return fit, jnp.where(pooled, _mean_of(tangent, pooled)[0], tangent)


def _below(x: Array, present: Array | bool, axis: int) -> Array:
    """Something lower than what is present, so that it gets into no block with that."""
    held = jax.lax.stop_gradient(x)
    return 2.0 * jnp.min(held, axis, keepdims=True, where=present, initial=0.0) - 1.0


def _short_fit(x: Array) -> Array:
    """`_falling_fit` along axis 1, at once: max_(k >= i) min_(j <= i) mean(x_j..x_k)."""
    held, index = jax.lax.stop_gradient(x), jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    sums, lowest, fits = jnp.cumsum(held, axis=1), jnp.full_like(held, jnp.inf), []
    for i in range(x.shape[1]):
        before = sums[:, i : i + 1] - held[:, i : i + 1]
        lowest = jnp.minimum(lowest, (sums - before) / jnp.maximum(index - i + 1, 1))
        fits.append(jnp.max(jnp.where(index >= i, lowest, -jnp.inf), axis=1))
    fit = jnp.stack(fits, axis=1)
    same = fit[:, :, None] == fit[:, None]
    return jnp.sum(jnp.where(same, x[:, None], 0.0), axis=2) / jnp.sum(same, axis=2)


def _merged_and_pooled(parts: Array) -> tuple[Array, Array]:
    """`_merged`, and what of it is c, to which Newton's steps lead, between bounds."""
    size = parts.shape[1] // 2
    first = jax.lax.broadcasted_iota(jnp.int32, parts.shape, 1) < size
    low, high = parts[:, size - 1 : size], parts[:, size : size + 1]

    def pooled(level):
        return jnp.where(first, parts < level, parts > level)

    def improve(state):
        _, level, low, high = state
        mean, count = _mean_of(parts, pooled(level))
        mean = jnp.where(count > 0, mean, level)
        low, high = jnp.where(mean > level, level, low), jnp.where(mean < level, level, high)
        inside = (mean == level) | ((mean > low) & (mean < high))
        following = jnp.where(inside, mean, 0.5 * low + 0.5 * high)
        return jnp.any((following < level) | (following > level)), following, low, high

    state = jnp.asarray(True), 0.5 * low + 0.5 * high, low, high
    _, level, *_ = jax.lax.while_loop(lambda state: state[0], improve, state)
    return jnp.where(pooled(level), level, parts), pooled(level)


def _mean_of(x: Array, chosen: Array) -> tuple[Array, Array]:
    """The mean over axis 1 of what is chosen, and how many these are."""
    count = jnp.sum(chosen, axis=1, keepdims=True)
    return jnp.sum(jnp.where(chosen, x, 0.0), axis=1, keepdims=True) / jnp.maximum(count, 1), count
