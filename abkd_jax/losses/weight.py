"""Losses whose parts are weighted example by example."""

import chex
import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.types import Batch, Loss, Outputs


def entropy_gated(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    forward: Loss,
    reverse: Loss,
    gain: float | Array = 2.0,
) -> Array:
    """a forward + b reverse, where the part that repairs the student's confidence counts more.

    With the entropies h of the two softmaxes at temperature 1, (a, b) is (gain, 1) where
    h_teacher > h_student, an overconfident student, which the mass-covering forward KL flattens;
    (1, gain) where h_student > h_teacher, which the mode-seeking reverse KL sharpens; and (1, 1)
    where they are equal. The gate has no gradient; gain does. A gain of 1 gives Jeffreys.

    What is known of BD-KD: forward and reverse KL together, weighted per sample by the gap of the
    entropies (its abstract and summaries), and the direction, the factors 1 and 3 (2 in a comment)
    and the temperature 1 of the entropies (the function `bdkd` in ABKD's published code). What is
    inferred: that the same holds for images and an online teacher, and the gain of 2; the paper's
    own constants could not be read. The teacher's term of BD-KD, "reverse KL" as seen from the
    student, is `forward_kl` here, with the teacher as the network that is being trained.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: for `forward` and `reverse`.
        forward: the mass-covering part, such as `on_logits` with `forward_kl`.
        reverse: the mode-seeking part, such as `on_logits` with `reverse_kl`.
        gain: a number, or an array that broadcasts to the leading axes.

    Returns:
        `[...]`, one value per example.

    Raises:
        AssertionError: if the logits do not fit, or a part does not give one value per example.
        ValueError: if a network shows no logits, or gain does not fit.

    Amara et al., "BD-KD: Balancing the divergences for online knowledge distillation",
    arXiv 2212.12965.
    """
    logits = jax.lax.stop_gradient(numerics.check_logits(student.logits, teacher.logits))
    h_student, h_teacher = map(numerics.entropy, logits)
    parts = {
        "forward": forward(student, teacher, batch),
        "reverse": reverse(student, teacher, batch),
    }
    expected = jnp.broadcast_shapes(h_student.shape, h_teacher.shape)
    for name, values in parts.items():
        chex.assert_shape(
            values,
            expected,
            custom_message=f"the part {name!r} of entropy_gated must give one value per example, "
            f"{list(expected)}; found {list(values.shape)}.",
            include_default_message=False,
        )
    gain = numerics.per_row("gain", gain, jax.ShapeDtypeStruct((*expected, 1), logits[0].dtype))
    gain = gain[..., 0] if gain.ndim else gain
    forward_weight = jnp.where(h_teacher > h_student, gain, 1.0)
    reverse_weight = jnp.where(h_student > h_teacher, gain, 1.0)
    return forward_weight * parts["forward"] + reverse_weight * parts["reverse"]


entropy_gated.needs = ("logits",)
