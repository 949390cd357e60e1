"""Losses on relations: how the classes of a row, or the rows of a batch, lie to each other."""

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Number, Positive
from abkd_jax.types import Batch, Outputs

_DIST_EPSILON = 1e-8  # of DIST's published code


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
    the gaps between logits allow, and its cost in memory is O(K); in time it is O(K^2).

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
    ranks = (_soft_ranks(z, present, strength) for z in (z_s, z_t))
    pearson = _where_any(present, 1.0 - _correlation(z_s, z_t, present, -1), -1)
    spearman = _where_any(present, 1.0 - _correlation(*ranks, present, -1), -1)
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


def _soft_ranks(values: Array, present: Array, regularization: Array) -> Array:
    """The point of the permutahedron nearest to the standardised values: `[..., K]`, largest last.

    With the values in falling order it is they less the falling sequence that fits them less
    (K..1) best; and such a fit consists of the means of blocks (isotonic regression).
    """
    count = jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1).astype(values.dtype)
    centred = _centred(values, present, -1)
    norm = numerics.norm(centred, -1, keepdims=True)
    size = jnp.sqrt(count * (jnp.square(count) - 1.0) / 12.0) / regularization  # 1..K has this norm
    order = jnp.argsort(jnp.where(present, -values, jnp.inf), axis=-1)
    sort = lambda x: jnp.take_along_axis(x, order, axis=-1)  # noqa: E731
    falling = sort(centred / jnp.where(norm > 0, norm, 1.0)) * size
    position = jax.lax.broadcasted_iota(values.dtype, values.shape, values.ndim - 1)
    ranks = count - position  # below 1: not present
    rest = jnp.where(ranks > 0, falling - ranks, 0.0)
    # Not `falling` less the fit: where a block is of one, its rank is then exact.
    sorted_ranks = ranks + (rest - _block_means(rest, _blocks(jax.lax.stop_gradient(rest), ranks)))
    return jnp.put_along_axis(jnp.zeros_like(rest), order, sorted_ranks, axis=-1, inplace=False)


def _blocks(x: Array, ranks: Array) -> Array:
    """The number of each entry's block in the falling sequence that fits x best.

    The fit is v_i = max_(k >= i) min_(j <= i) mean(x_j..x_k). The minima are carried along i, which
    takes memory for one row of the table of all means.
    """
    position = jax.lax.broadcasted_iota(int, x.shape, x.ndim - 1)
    sums = jnp.cumsum(x, axis=-1)

    def step(lowest, i_and_before):
        i, before = i_and_before
        means = (sums - before[..., None]) / jnp.maximum(position - i + 1, 1)
        lowest = jnp.where(position >= i, jnp.minimum(lowest, means), lowest)
        ahead = (position >= i) & (ranks > 0)
        return lowest, jnp.max(jnp.where(ahead, lowest, -jnp.inf), axis=-1)

    before = jnp.moveaxis(sums - x, -1, 0)
    each = jnp.arange(x.shape[-1]), before
    _, fit = jax.lax.scan(step, jnp.full_like(x, jnp.inf), each)
    fit = jnp.moveaxis(fit, 0, -1)
    blocks = jnp.cumsum(fit != jnp.roll(fit, 1, axis=-1), axis=-1)
    return blocks - blocks[..., :1]  # from 0, also in a row of NaN: the rows share one numbering


def _block_means(x: Array, blocks: Array) -> Array:
    """The mean of each entry's block. Its derivative is that of the fit, whose blocks stay."""
    flat = blocks.reshape(-1, x.shape[-1])
    ids = (flat + x.shape[-1] * jnp.arange(len(flat))[:, None]).ravel()
    summed = lambda values: jax.ops.segment_sum(values.ravel(), ids, x.size)[ids]  # noqa: E731
    return (summed(x) / summed(jnp.ones_like(x))).reshape(x.shape)
