"""The loss against labels."""

import chex
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.types import Batch, Outputs


def cross_entropy(
    student: Outputs, teacher: Outputs, batch: Batch, *, label_smoothing: float | Array = 0.0
) -> Array:
    """-log q at the label, or against (1 - s) of it and s of the uniform distribution.

    A label that is no class, such as a withheld one (-1), makes the value NaN: take the mean over
    `where="labelled"`.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: not read.
        batch: its `labels` [...], integers.
        label_smoothing: s in [0, 1] (Szegedy et al., 2016). Classes with a logit of -inf take no
            part.

    Returns:
        `[...]` in nats, one value per example.

    Raises:
        AssertionError: if logits and labels do not fit.
        ValueError: if the network shows no logits, or the batch no labels.
    """
    del teacher
    labels = numerics.labels_of("cross_entropy", batch)
    if student.logits is None:
        raise ValueError("cross_entropy needs the logits of the network being trained; found None.")
    chex.assert_type(
        [student.logits, labels],
        [float, int],
        custom_message="cross_entropy takes floating-point logits and integer labels; found "
        f"{student.logits.dtype} and {labels.dtype}.",
        include_default_message=False,
    )
    numerics.check_labels(labels, student.logits.shape)
    dtype = jnp.promote_types(student.logits.dtype, jnp.float32)
    log_q = numerics.log_softmax(student.logits.astype(dtype))
    present = ~jnp.isneginf(log_q)
    labels, known = numerics.known_labels(labels, log_q.shape[-1])
    at_label = jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    count = jnp.maximum(jnp.sum(present, axis=-1), 1)
    uniform = jnp.sum(jnp.where(present, log_q, 0.0), axis=-1) / count
    smoothing = jnp.asarray(label_smoothing, dtype)
    value = -(1.0 - smoothing) * at_label - smoothing * uniform
    return jnp.where(known, value, jnp.nan)


cross_entropy.needs = ("logits",)
