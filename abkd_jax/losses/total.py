"""The sum of an objective's terms: the only place where losses are reduced."""

import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.types import Batch, Outputs, Schedule, Term


def term_counts(terms: Mapping[str, Term], batch: Batch) -> dict[str, Array]:
    """How many examples each term averages over, by the term's name."""
    return {name: jnp.sum(batch[term.where]) for name, term in terms.items()}


def total(
    terms: Mapping[str, Term],
    student: Outputs,
    others: Mapping[str, Outputs],
    batch: Batch,
    *,
    counts: Mapping[str, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The sum over terms of weight x mean of the loss over the examples of the term's mask.

    What a mask leaves out may be anything, NaN included, and changes neither the value nor a
    gradient: a loss sees zeros there, in the networks' outputs and as the label. One that couples
    the batch also sees what is in batch["where"], whatever its term's mask.

    Args:
        terms: by name; their schedules replaced by numbers (`types.at_step`).
        student: the network that is being trained.
        others: the other networks' outputs, by name.
        batch: with every mask that a term names.
        counts: the divisors of the means, when the batch is a part of a larger one; the parts'
            totals then add up to that of the whole. By default the number of examples in the mask.

    Returns:
        The scalar, and the mean of each term, before its weight, by the term's name.

    Raises:
        AssertionError: if a loss does not give one value per example.
    """
    means = {}
    for name, term in terms.items():
        if isinstance(term.weight, Schedule):
            raise ValueError(f"term {name!r}: its weight is a schedule; call at_step(terms, step).")
        where = batch[term.where]
        if where.dtype != bool:
            raise ValueError(f"batch[{term.where!r}] must be bool; found {where.dtype}.")
        seen = where | batch["where"] if getattr(term.loss, "couples_batch", False) else where
        values = term.loss(*_selected((student, others[term.other], batch), seen))
        chex.assert_shape(
            values,
            where.shape,
            custom_message=f"the loss of term {name!r} must give one value per example, "
            f"{list(where.shape)}; found {list(values.shape)}.",
            include_default_message=False,
        )
        count = None if counts is None else counts[name]
        means[name] = numerics.masked_mean(values, where, count)
    return sum(terms[name].weight * mean for name, mean in means.items()), means


def chunked_total(
    terms: Mapping[str, Term],
    student: Outputs,
    others: Mapping[str, Outputs],
    batch: Batch,
    *,
    chunk: int,
    counts: Mapping[str, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """`total` for vocabularies whose logits do not fit: no `[tokens, K]` array ever exists.

    Networks that leave their logits unformed (None) show `hidden` and `unembedding` instead. The
    tokens are visited in chunks; a chunk's logits are formed once for all terms, and its gradients
    (in the student's hidden, unembedding, bias or logits, and in all numbers) are taken in the same
    pass, so that the backward pass has only to scale them. The other networks get no gradient.

    Args:
        terms: as in `total`, none of which couples the examples of a batch.
        student: the network that is being trained.
        others: the other networks' outputs, by name.
        batch: its masks and labels, all `[...]`.
        chunk: how many tokens at a time.
        counts: as in `total`.

    Returns:
        As `total`; the metrics carry no gradient.

    Raises:
        ValueError: if a term couples the batch, or a network shows neither logits nor hidden.
    """
    for name, term in terms.items():
        if term.loss.couples_batch:
            raise ValueError(f"term {name!r} couples the examples of a batch: it has no chunks.")
    for name, outputs in {"the network being trained": student, **others}.items():
        if outputs.logits is None and (outputs.hidden is None or outputs.unembedding is None):
            raise ValueError(f"{name} must show logits, or hidden and unembedding; found neither.")
    where = batch["where"]
    counts = term_counts(terms, batch) if counts is None else dict(counts)
    split = functools.partial(_chunks, leading=where.ndim, chunk=chunk)
    per_token = {n: x for n, x in batch.items() if getattr(x, "shape", None) == where.shape}
    rows = {n: Outputs(logits=o.logits, hidden=o.hidden) for n, o in others.items()}
    heads = {n: (o.unembedding, o.bias) for n, o in others.items()}
    frozen = jax.lax.stop_gradient((jax.tree.map(split, (rows, per_token)), heads, counts))
    student_rows = jax.tree.map(split, Outputs(logits=student.logits, hidden=student.hidden))
    head = (student.unembedding, student.bias)
    value, means = _over_chunks(student_rows, (head, dict(terms)), frozen)
    return value, jax.lax.stop_gradient(means)


def _selected(
    seen_by_loss: tuple[Outputs, Outputs, Batch], where: Array
) -> tuple[Outputs, Outputs, Batch]:
    """What a loss sees, with 0 in the rows outside: to mask its values alone lets NaN slopes in."""
    student, other, batch = seen_by_loss
    labels = {"labels": _rows(batch["labels"], where)} if "labels" in batch else {}
    return _outputs_selected(student, where), _outputs_selected(other, where), {**batch, **labels}


def _outputs_selected(outputs: Outputs, where: Array) -> Outputs:
    select = functools.partial(_rows, where=where)
    of_network = dict(unembedding=outputs.unembedding, bias=outputs.bias)
    return jax.tree.map(select, outputs).replace(**of_network)


def _rows(x: Array, where: Array) -> Array:
    """x with 0 in the rows outside, if it has these rows."""
    if x.shape[: where.ndim] != where.shape:
        return x
    return jnp.where(jnp.expand_dims(where, range(where.ndim, x.ndim)), x, 0)


@jax.custom_vjp
def _over_chunks(rows: Outputs, shared: Any, frozen: Any) -> tuple[Array, dict[str, Array]]:
    """The total and the means over all chunks of the student's rows."""
    chunks, *rest = frozen

    def step(summed, chunk):
        return jax.tree.map(jnp.add, summed, _chunk_total(chunk[0], shared, chunk[1], *rest)), None

    return jax.lax.scan(step, _zeros(rows, shared, frozen), (rows, chunks))[0]


def _over_chunks_forward(rows, shared, frozen):
    chunks, *rest = frozen
    gradient = jax.value_and_grad(_chunk_total, argnums=(0, 1), has_aux=True)

    def step(summed, chunk):
        result, (d_rows, d_shared) = gradient(chunk[0], shared, chunk[1], *rest)
        return jax.tree.map(jnp.add, summed, (result, d_shared)), d_rows

    zeros = _zeros(rows, shared, frozen), jax.tree.map(jnp.zeros_like, shared)
    (result, d_shared), d_rows = jax.lax.scan(step, zeros, (rows, chunks))
    return result, (d_rows, d_shared)


def _over_chunks_backward(gradients, cotangents):
    scaled = jax.tree.map(lambda gradient: gradient * cotangents[0], gradients)
    return *scaled, None


_over_chunks.defvjp(_over_chunks_forward, _over_chunks_backward)


def _chunk_total(rows, shared, chunk, heads, counts):
    """`total` of one chunk, its logits formed here and nowhere else."""
    (head, terms), (other_rows, batch) = shared, chunk
    seen = functools.reduce(jnp.logical_or, (batch[term.where] for term in terms.values()))
    rows, other_rows = (  # before the head's matrix spreads what they hold
        _outputs_selected(rows, seen),
        {name: _outputs_selected(outputs, seen) for name, outputs in other_rows.items()},
    )
    student = _with_logits(rows, *head)
    others = {name: _with_logits(other_rows[name], *heads[name]) for name in other_rows}
    return total(terms, student, others, batch, counts=counts)


def _with_logits(rows: Outputs, unembedding: Array | None, bias: Array | None) -> Outputs:
    if rows.logits is not None:
        return rows
    logits = rows.hidden @ unembedding
    return rows.replace(logits=logits if bias is None else logits + bias)


def _chunks(x: Array, *, leading: int, chunk: int) -> Array:
    """`[..., *]` with `leading` axes of tokens to `[chunks, chunk, *]`, padded with zeros."""
    flat = x.reshape(-1, *x.shape[leading:])
    padding = -len(flat) % chunk
    padded = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(-1, chunk, *flat.shape[1:])


def _zeros(rows, shared, frozen):
    """What the sums over chunks start from."""
    chunks, *rest = frozen
    first = jax.tree.map(lambda x: x[0], (rows, chunks))
    shapes = jax.eval_shape(_chunk_total, first[0], shared, first[1], *rest)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
