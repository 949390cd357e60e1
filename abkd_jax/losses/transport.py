"""Losses by optimal transport between the rows of a batch."""

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Positive
from abkd_jax.losses.relation import batch_probabilities
from abkd_jax.types import Batch, Outputs


def sinkhorn(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    temperature: Positive = 2.0,
    epsilon: Positive = 0.1,
    num_iterations: int = 20,
) -> Array:
    """The cost of carrying the student's rows to the teacher's, by a plan that entropy blurs.

    The cost is D_ij = |q_i - p_j|_1 between the student's row i and the teacher's row j, softmaxes
    at the temperature. The plan is exp(-D / epsilon), its rows and then its columns divided by
    their sums, num_iterations times: the columns' sums are 1 in the end, the rows' nearly. An
    example's value is sum_j plan_ij D_ij, so that their mean is <plan, D> per row; the published
    total of 0.8 x 0.001 <plan, D> is a weight of 0.0008 times the number of rows. There is no
    factor of T^2, and the gradient passes through all iterations, both as published.

    The loss does not know which of the teacher's rows belongs to which of the student's: it is an
    addition to a paired loss. Identical logits give a small positive value.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: its `where` [...]; all leading axes together are the N rows, and the plan is
            [N, N]. Rows outside take no part in it.
        temperature: T > 0, or an array that broadcasts to the leading axes; else NaN results.
        epsilon: > 0, likewise (of the student's row). Smaller: a sharper plan, which takes more
            iterations.
        num_iterations: at least 1.

    Returns:
        `[...]`, one value per example, non-negative.

    Raises:
        ValueError: if num_iterations is less than 1.

    Source: Cui et al., "Sinkhorn distance minimization for knowledge distillation", LREC-COLING
    2024, https://arxiv.org/abs/2402.17110.
    """
    checks.require(num_iterations >= 1, "sinkhorn.num_iterations", "at least 1", num_iterations)
    q, p, _ = batch_probabilities(student, teacher, batch, temperature)
    leading, where = batch["where"].shape, batch["where"].reshape(-1)
    if not where.size:
        return jnp.zeros(leading, q.dtype)  # no kernel to normalise
    shape = jax.ShapeDtypeStruct((*leading, q.shape[-1]), q.dtype)
    epsilon = jnp.broadcast_to(numerics.per_row("epsilon", epsilon, shape), (*leading, 1))
    epsilon = jnp.where(epsilon > 0, epsilon, jnp.nan).reshape(-1, 1)
    cost = _distances(q, p)
    # The padding has a plan of its own, so that no row is empty whatever the mask.
    together = where[:, None] == where[None]
    log_plan = _normalized(jnp.where(together, -cost / epsilon, -jnp.inf), num_iterations)
    return jnp.sum(jnp.exp(log_plan) * cost, axis=-1).reshape(leading)


sinkhorn.needs = ("logits",)
sinkhorn.couples_batch = True


def _distances(x: Array, y: Array) -> Array:
    """|x_i - y_j|_1 for all rows: `[M, K]`, `[N, K]` -> `[M, N]`.

    Some rows at a time and again in the backward pass: no `[M, N, K]` array ever exists, which is
    also several times as fast.
    """
    to_all = jax.checkpoint(lambda row: jnp.sum(jnp.abs(row[None] - y), axis=-1))
    return jax.lax.map(to_all, x, batch_size=16)


def _normalized(log_kernel: Array, num_iterations: int) -> Array:
    """The log of the kernel with its rows, then its columns divided by their sums, repeatedly.

    The backward pass repeats each iteration instead of keeping its matrices.
    """

    def iterate(scales, _):
        of_rows = -jax.nn.logsumexp(log_kernel + scales[1], axis=1, keepdims=True)
        of_columns = -jax.nn.logsumexp(log_kernel + of_rows, axis=0, keepdims=True)
        return (of_rows, of_columns), None

    zeros = jnp.zeros_like(log_kernel[:, :1]), jnp.zeros_like(log_kernel[:1])
    step = jax.checkpoint(iterate, prevent_cse=False)
    (of_rows, of_columns), _ = jax.lax.scan(step, zeros, length=num_iterations)
    return log_kernel + of_rows + of_columns
