"""Losses on how a network's own loss changes with its inputs."""

import chex
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.losses.feature import norm
from abkd_jax.types import Batch, Outputs


def input_gradient_alignment(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    """||g_s - g_t||, where g is the gradient of a network's cross-entropy in its inputs (KDIGA).

    The training step makes the gradients for a term that needs them: those of the cross-entropy of
    the label, each example's own, with batch norm and dropout as in evaluation. They cost a second
    forward and backward pass of each network, and the student is differentiated through its own.

    A withheld label (-1) makes the value NaN: take the mean over `where="labelled"`. At equal
    gradients value and slope are 0; there is no eps, which would move the minimum's value.

    What is known: the summand lambda ||g_s - g_t||_2, clean inputs, and a teacher in evaluation
    mode which is detached. A later published script takes one norm over the whole batch of the
    gradients of the *mean* cross-entropy. Our reading: the norm is each example's, so that padding
    and the size of the batch change nothing. Over B examples with squared norms of mean m^2, the
    batch's norm is m / sqrt(B), and the mean of ours is at most m, equal to it if all norms are:
    lambda there is a weight of about lambda / sqrt(B) here.

    Args:
        student: the network that is being trained; its `input_gradient` [..., *input].
        teacher: the other one; its `input_gradient` [..., *input].
        batch: its `labels` [...], integers.

    Returns:
        `[...]`, non-negative, 0 where the gradients are equal.

    Raises:
        AssertionError: if the gradients and the labels do not fit.
        ValueError: if a network shows no gradient, or the batch no labels.

    Shao et al., "How and when adversarial robustness transfers in knowledge distillation?", 2021,
    https://arxiv.org/abs/2110.12072.
    """
    labels = numerics.labels_of("input_gradient_alignment", batch)
    named = {
        "network being trained": student.input_gradient,
        "other network": teacher.input_gradient,
    }
    for name, gradient in named.items():
        if gradient is None:
            raise ValueError(f"the {name} must show input_gradient; found None.")
    g_s, g_t = named.values()
    shapes = f"{list(g_s.shape)} and {list(g_t.shape)}"
    message = f"the input gradients of both networks must have one shape; found {shapes}."
    options = dict(custom_message=message, include_default_message=False)
    chex.assert_equal_shape([g_s, g_t], **options)
    message = f"labels {list(labels.shape)} must have the leading axes of the gradients {shapes}."
    options = dict(custom_message=message, include_default_message=False)
    chex.assert_shape(labels, g_s.shape[: labels.ndim], **options)
    dtype = jnp.promote_types(jnp.result_type(g_s, g_t), jnp.float32)
    difference = g_s.astype(dtype) - g_t.astype(dtype)
    value = norm(difference, tuple(range(labels.ndim, difference.ndim)))
    return jnp.where(labels < 0, jnp.nan, value)


input_gradient_alignment.needs_labels = True
input_gradient_alignment.needs = ("input_gradient",)
