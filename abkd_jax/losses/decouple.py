"""Losses that treat the label's class and the rest of the classes apart."""

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Number, Positive
from abkd_jax.divergences import forward_kl
from abkd_jax.types import Batch, Divergence, Outputs


def dkd(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    target_divergence: Divergence,
    rest_divergence: Divergence,
    target_weight: Number,
    rest_weight: Number,
    temperature: Positive,
    temperature_power: Number = 2.0,
) -> Array:
    """T^power (target_weight D(b_t || b_s) + rest_weight D'(p^ || q^)).

    b = (p_y, 1 - p_y) is the mass of the label against that of the rest, p^ the distribution among
    the rest, all at temperature T. Both parts are handed on as logits, so that any divergence fits:
    b as the label's logit and the log of the sum over the others, the rest as the logits with the
    label's removed. KL(p || q) is the first plus 1 - p_y of the second with forward KL in both;
    here the second has a weight of its own, whatever the teacher's confidence.

    DKD has forward KL in both (on CIFAR-100 the weights 1 and 8 and T = 4), CAKD on logits is that
    with a target_weight of 1, AB-DKD has `alpha_beta`. A label that is no class, such as a withheld
    one (-1), makes the value NaN: take the mean over `where="labelled"`, or wrap the loss in
    `with_teacher_labels`.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: its `labels` [...], integers.
        target_divergence: D, between two classes.
        rest_divergence: D', between the classes without the label.
        target_weight: of the first part, a number or an array that broadcasts to `[...]`.
        rest_weight: of the second.
        temperature: T > 0.
        temperature_power: 2 for DKD.

    Returns:
        `[...]`, one value per example.

    Source: Zhao et al., "Decoupled knowledge distillation", CVPR 2022,
    https://arxiv.org/abs/2203.08679; Zhang et al., "CAKD", https://arxiv.org/abs/2410.14741.
    """
    logits = checks.check_logits(student.logits, teacher.logits)
    is_label, known = _is_label("dkd", batch, *logits)
    *logits, scale = numerics.at_temperature(*logits, temperature, temperature_power)
    target = target_divergence(*(_target_pair(x, is_label) for x in logits))
    rest = rest_divergence(*(jnp.where(is_label, -jnp.inf, x) for x in logits))
    weighted = numerics.per_value("target_weight", target_weight, target) * target
    weighted += numerics.per_value("rest_weight", rest_weight, rest) * rest
    return jnp.where(known, scale * weighted, jnp.nan)


dkd.needs_labels = True
dkd.needs = ("logits",)


def nkd(
    student: Outputs, teacher: Outputs, batch: Batch, *, rest_weight: Number, temperature: Positive
) -> Array:
    """-p_y log q_y - rest_weight T^2 sum_k!=y p^_k log q^_k.

    The label's part is cross-entropy at temperature 1 times the teacher's probability of the label,
    which is detached; p^ and q^ are the two distributions among the other classes at temperature T.
    Both parts are cross-entropies as published, so the value where the networks agree is not 0.
    ImageNet: rest_weight 1.5 and T = 1; CIFAR-100: 3.5 and 3. A label that is no class, such as a
    withheld one (-1), makes the value NaN: take the mean over `where="labelled"`, or wrap the loss
    in `with_teacher_labels`.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: its `labels` [...], integers.
        rest_weight: of the second part, a number or an array that broadcasts to `[...]`.
        temperature: T > 0, of the second part.

    Returns:
        `[...]` in nats, one value per example.

    Source: Yang et al., "From knowledge distillation to self-knowledge distillation: a unified
    approach with normalized loss and customized soft labels", ICCV 2023,
    https://arxiv.org/abs/2303.13005.
    """
    student_logits, teacher_logits = checks.check_logits(student.logits, teacher.logits)
    # Lifted apart from those above: in 16 bit the slopes of the two parts are rounded one by one.
    lifted = (x.logits.astype(student_logits.dtype) for x in (student, teacher))
    *tempered, scale = numerics.at_temperature(*lifted, temperature, 2.0)
    is_label, known = _is_label("nkd", batch, student_logits, teacher_logits)
    # Cross-entropies as forward KL, whose value and slopes stay finite where q is 0.
    certain = jnp.array([0.0, -jnp.inf], student_logits.dtype)
    log_p = numerics.log_probabilities(jax.lax.stop_gradient(teacher_logits))
    confidence = jnp.sum(jnp.where(is_label, jnp.exp(log_p), 0.0), axis=-1)
    pair = _target_pair(student_logits, is_label)
    target = confidence * forward_kl(pair, jnp.broadcast_to(certain, pair.shape))
    rest = [jnp.where(is_label, -jnp.inf, x) for x in tempered]
    rest = forward_kl(*rest) + numerics.entropy(rest[1])
    weighted = numerics.per_value("rest_weight", rest_weight, rest) * (scale * rest)
    return jnp.where(known, target + weighted, jnp.nan)


nkd.needs_labels = True
nkd.needs = ("logits",)


def _is_label(
    loss: str, batch: Batch, student_logits: Array, teacher_logits: Array
) -> tuple[Array, Array]:
    """`[..., K]`, True at the label, or at class 0 where it is no class; `[...]`, where it is."""
    shape = jnp.broadcast_shapes(student_logits.shape, teacher_logits.shape)
    labels = checks.labels_of(loss, batch, shape[:-1])
    labels, known = numerics.known_labels(labels, shape[-1])
    return jax.nn.one_hot(labels, shape[-1], dtype=bool), known


def _target_pair(logits: Array, is_label: Array) -> Array:
    """log p_y and log(1 - p_y) up to the row's normaliser, `[..., 2]`."""
    of_label = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    of_rest = numerics.log_sum_exp(jnp.where(is_label, -jnp.inf, logits))
    return jnp.stack([of_label, of_rest], axis=-1)
