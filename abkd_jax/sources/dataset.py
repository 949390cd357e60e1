"""Batches of a data set, as they are."""

from typing import Any

from jax import Array

from abkd_jax.sources.source import Source
from abkd_jax.types import Batch


def dataset() -> Source:
    """The examples of a phase's split, in an order that is a function of (data_seed, step)."""
    return Source(batch=_batch)


def _batch(state: Any, examples: Any, data_seed: Array, step: Array) -> Batch:
    del state
    return examples.batch(data_seed, step)
