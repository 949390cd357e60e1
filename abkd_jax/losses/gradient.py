"""Losses on how a network's own loss changes with its inputs."""

from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
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

    Source: Shao et al., "How and when adversarial robustness transfers in knowledge
    distillation?", 2021, https://arxiv.org/abs/2110.12072.
    """
    g_s = checks.check_rows(student.input_gradient, "input_gradient of the network being trained")
    g_t = checks.check_rows(teacher.input_gradient, "input_gradient of the other network")
    checks.check_array("the other input_gradient", g_t, float, g_s.shape, "as the learner's is")
    leading = g_s.shape[: jnp.ndim(batch.get("labels", 0))]
    labels = checks.labels_of("input_gradient_alignment", batch, leading, "input gradients")
    value = numerics.norm(g_s - g_t, tuple(range(labels.ndim, g_s.ndim)))
    return jnp.where(labels < 0, jnp.nan, value)


input_gradient_alignment.needs_labels = True
input_gradient_alignment.needs = ("input_gradient",)
