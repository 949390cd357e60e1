"""The sum of an objective's terms: the only place where losses are reduced."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Schedule
from abkd_jax.types import Batch, Outputs, Term

_LEARNER = "the network being trained"


def mask_of(term: Term, batch: Batch) -> Array:
    """The rows over which a term is averaged: its mask, and of these what batch["where"] has.

    Raises:
        AssertionError: if a mask is not bool, or not of one shape with batch["where"].
    """
    leading, meaning = jnp.shape(batch["where"]), "one for each row of the batch"
    for name in ("where", term.where):
        checks.check_array(f"batch[{name!r}]", batch[name], bool, leading, meaning)
    return batch[term.where] & batch["where"]


def term_counts(terms: Mapping[str, Term], batch: Batch) -> dict[str, Array]:
    """How many examples each term averages over, by the term's name."""
    return {name: jnp.sum(mask_of(term, batch)) for name, term in terms.items()}


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
    gradient: a loss sees zeros there, in the networks' outputs and as the label. Rows outside of
    batch["where"] are in no term's mask; a loss that couples the batch sees all that are inside,
    whatever its term's mask.

    Args:
        terms: by name; their schedules replaced by numbers (`binding.at_step`).
        student: the network that is being trained.
        others: the other networks' outputs, by name; a loss whose term names none sees an empty
            `Outputs`.
        batch: with every mask that a term names.
        counts: the divisors of the means, when the batch is a part of a larger one; the parts'
            totals then add up to that of the whole. By default the number of examples in the mask.

    Returns:
        The scalar, and the mean of each term, before its weight, by the term's name.

    Raises:
        AssertionError: if a mask is not bool, or a loss does not give one value per example.
        ValueError: if a part of the outputs or the labels have other rows than batch["where"], or a
            weight is a schedule.
    """
    means = {}
    for name, term in terms.items():
        is_number = not isinstance(term.weight, Schedule)
        expected = "a number: call at_step(terms, step) first"
        checks.require(is_number, f"the weight of term {name!r}", expected, term.weight)
        where = mask_of(term, batch)
        seen = batch["where"] if getattr(term.loss, "couples_batch", False) else where
        other = Outputs() if term.other is None else others[term.other]
        values = term.loss(
            _selected(_LEARNER, student, seen),
            _selected(term.other, other, seen),
            _batch_selected(batch, seen),
        )
        field = f"the loss of term {name!r}"
        checks.check_array(field, values, float, where.shape, "one value per example")
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

    Networks that leave their logits unformed (None) show `hidden` and `head` instead. The tokens
    are visited in chunks; a chunk's logits are formed once for all terms, and its gradients (in the
    student's rows, its head and all numbers) are taken in the same pass, so that the backward pass
    has only to scale them. The other networks get no gradient.

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
        is_row_wise, fn = not term.loss.couples_batch, term.loss.fn.__name__
        expected = "of each row alone, to have chunks; this one couples the examples of a batch"
        checks.require(is_row_wise, f"the loss of term {name!r}", expected, fn)
    for name, outputs in {_LEARNER: student, **others}.items():
        forms = outputs.hidden is not None and outputs.head is not None
        shows = outputs.logits is not None or forms
        found = [part for part, x in vars(outputs).items() if x is not None]
        checks.require(shows, f"what {name} shows", "logits, or hidden and head", found)
    where = batch["where"]
    counts = term_counts(terms, batch) if counts is None else dict(counts)
    split = functools.partial(chunked, leading=where.ndim, chunk=chunk)
    per_token = {n: x for n, x in batch.items() if getattr(x, "shape", None) == where.shape}
    rows = lambda o: Outputs(logits=o.logits, hidden=o.hidden).map_rows(split)  # noqa: E731
    chunks = {n: rows(o) for n, o in others.items()}, jax.tree.map(split, per_token)
    heads = {n: o.head for n, o in others.items()}
    frozen = jax.lax.stop_gradient((chunks, heads, counts))
    value, means = _over_chunks(rows(student), (student.head, dict(terms)), frozen)
    return value, jax.lax.stop_gradient(means)


def _selected(network: str, outputs: Outputs, where: Array) -> Outputs:
    """What a loss sees, with 0 in the rows outside: to mask its values alone lets NaN slopes in."""
    return outputs.map_rows(lambda part, x: _rows(f"{network}: {part}", x, where), named=True)


def _batch_selected(batch: Batch, where: Array) -> Batch:
    """The batch with 0 for the labels outside."""
    if "labels" not in batch:
        return batch
    return {**batch, "labels": _rows("the batch: labels", batch["labels"], where)}


def _rows(name: str, x: Array, where: Array) -> Array:
    """x with 0 in the rows outside."""
    if x.shape[: where.ndim] != where.shape:
        raise ValueError(
            f"{name} must have one row for each row of the batch's where {list(where.shape)}; "
            f"found {list(x.shape)}."
        )
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
    masks = [mask_of(term, batch) for term in terms.values()]
    seen = functools.reduce(jnp.logical_or, masks)

    def with_logits(name, rows, head):
        rows = _selected(name, rows, seen)  # before the head's matrix spreads what they hold
        logits = head(rows.hidden) if rows.logits is None else rows.logits
        return rows.replace(logits=logits, head=head)

    student = with_logits(_LEARNER, rows, head)
    others = {name: with_logits(name, rows, heads[name]) for name, rows in other_rows.items()}
    return total(terms, student, others, batch, counts=counts)


def chunked(x: Array, *, leading: int, chunk: int) -> Array:
    """`[..., *]` with `leading` axes of rows to `[chunks, chunk, *]`, padded with zeros."""
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
