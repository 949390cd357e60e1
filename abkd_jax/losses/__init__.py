"""Losses `f(student, teacher, batch, *, numbers) -> [...]`, one value per example, and their sum.

The first argument is always the network that is being trained, the second the other one.
"""

from abkd_jax.losses.decouple import dkd, nkd
from abkd_jax.losses.feature import decoupled_features, norm_and_direction
from abkd_jax.losses.gradient import input_gradient_alignment
from abkd_jax.losses.lift import on_logits, with_teacher_labels
from abkd_jax.losses.relation import dist, gram, rank_correlation
from abkd_jax.losses.task import cross_entropy
from abkd_jax.losses.total import chunked_total, term_counts, total
from abkd_jax.losses.transport import sinkhorn
from abkd_jax.losses.weight import (
    difficulty_weighted,
    entropy_aware,
    entropy_gated,
    entropy_weighted,
    power_weighted,
)

__all__ = [
    "chunked_total",
    "cross_entropy",
    "decoupled_features",
    "difficulty_weighted",
    "dist",
    "dkd",
    "entropy_aware",
    "entropy_gated",
    "entropy_weighted",
    "gram",
    "input_gradient_alignment",
    "nkd",
    "norm_and_direction",
    "on_logits",
    "power_weighted",
    "rank_correlation",
    "sinkhorn",
    "term_counts",
    "total",
    "with_teacher_labels",
]
