"""The loss against labels."""

from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Unit
from abkd_jax.types import Batch, Outputs


def cross_entropy(
    student: Outputs, teacher: Outputs, batch: Batch, *, label_smoothing: Unit = 0.0
) -> Array:
    """-log q at the label, or against (1 - s) of it and s of the uniform distribution.

    A label that is no class, such as a withheld one (-1), makes the value NaN: take the mean over
    `where="labelled"`.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: not read.
        batch: its `labels` [...], integers.
        label_smoothing: s in [0, 1]. Classes with a logit of -inf take no part.

    Returns:
        `[...]` in nats, one value per example.

    Source: for the smoothing, Szegedy et al., "Rethinking the inception architecture for computer
    vision", CVPR 2016.
    """
    del teacher
    logits = checks.check_rows(student.logits, "student_logits")
    return cost_of_labels("cross_entropy", logits, batch, label_smoothing)


cross_entropy.needs = {"own": ("logits",)}


def cost_of_labels(
    loss: str, logits: Array, batch: Batch, label_smoothing: float | Array = 0.0
) -> Array:
    """`cross_entropy` of logits that are checked, for the loss of this name."""
    labels = checks.labels_of(loss, batch, logits.shape[:-1])
    log_q = numerics.log_softmax(logits)
    present = ~jnp.isneginf(log_q)
    labels, known = numerics.known_labels(labels, log_q.shape[-1])
    at_label = jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    count = jnp.maximum(jnp.sum(present, axis=-1), 1)
    uniform = jnp.sum(jnp.where(present, log_q, 0.0), axis=-1) / count
    smoothing = jnp.asarray(label_smoothing, log_q.dtype)
    value = -(1.0 - smoothing) * at_label - smoothing * uniform
    return jnp.where(known, value, jnp.nan)
