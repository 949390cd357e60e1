"""The sum of an objective's terms: the only place where losses are reduced."""

from collections.abc import Mapping

import chex
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.types import Batch, Outputs, Term


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
        where = batch[term.where]
        values = term.loss(student, others[term.other], batch)
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
