"""Losses `f(student, teacher, batch, *, numbers) -> [...]`, one value per example, and their sum.

The first argument is always the network that is being trained, the second the other one.
"""

from abkd_jax.losses.lift import on_logits
from abkd_jax.losses.task import cross_entropy
from abkd_jax.losses.total import chunked_total, term_counts, total
from abkd_jax.losses.weight import entropy_gated

__all__ = [
    "chunked_total",
    "cross_entropy",
    "entropy_gated",
    "on_logits",
    "term_counts",
    "total",
]
