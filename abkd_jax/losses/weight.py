"""Losses whose parts are weighted example by example."""

import chex
import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.combinators import at_temperature
from abkd_jax.losses.task import cross_entropy
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
    shape = jnp.broadcast_shapes(h_student.shape, h_teacher.shape)
    forward, reverse = (
        _values(f"the part {name!r} of entropy_gated", part, student, teacher, batch, shape)
        for name, part in {"forward": forward, "reverse": reverse}.items()
    )
    gain = numerics.per_row("gain", gain, jax.ShapeDtypeStruct((*shape, 1), logits[0].dtype))
    gain = gain[..., 0] if gain.ndim else gain
    forward_weight = jnp.where(h_teacher > h_student, gain, 1.0)
    reverse_weight = jnp.where(h_student > h_teacher, gain, 1.0)
    return _weighted(forward_weight, forward) + _weighted(reverse_weight, reverse)


entropy_gated.needs = ("logits",)


def entropy_weighted(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    loss: Loss,
    temperature: float | Array,
) -> Array:
    """The loss times the entropy of the teacher: examples of which it is unsure count more.

    The weight H(softmax(teacher / T)) is in nats, in [0, ln K], is not normalised (it scales the
    term as well), and has no gradient in the logits, only in T. ER-KD has T = 4 with any loss, also
    where that is itself at another temperature.

    Args:
        student: the network that is being trained.
        teacher: the other one; its `logits` [..., K].
        batch: for the loss.
        loss: what is weighted, such as `on_logits`.
        temperature: T > 0, that of the entropy.

    Returns:
        `[...]`, one value per example.

    Raises:
        AssertionError: if the logits do not fit, or the loss does not give one value per example.
        ValueError: if a network shows no logits, or a number does not broadcast.

    Source: "Entropy-reweighted knowledge distillation", https://arxiv.org/abs/2311.13621v1 and
    the code, cpsu00/ER-KD.
    """
    _, teacher_logits = _detached_at(temperature, student, teacher)
    weight = numerics.entropy(teacher_logits)
    return _reweighted("entropy_weighted", loss, weight, student, teacher, batch)


entropy_weighted.needs = ("logits",)


def entropy_aware(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    loss: Loss,
    temperature: float | Array,
) -> Array:
    """The loss times 1/2 H_teacher (1 + H_student / ln K), the entropies at temperature T.

    The weight is in [0, ln K], grows with the teacher's entropy and with the student's where the
    teacher has some, and has no gradient in the logits, only in T. K counts the classes that are
    present; with one class the weight is 0. EA-KD has T = 3 (CIFAR-100) or 2 (ImageNet). Its code
    has in places 100 instead of ln 100, which nearly switches the student's part off; this is the
    formula.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: for the loss.
        loss: what is weighted, such as `on_logits`.
        temperature: T > 0, that of the entropies.

    Returns:
        `[...]`, one value per example.

    Raises:
        AssertionError: if the logits do not fit, or the loss does not give one value per example.
        ValueError: if a network shows no logits, or a number does not broadcast.

    Source: "EA-KD: Entropy-based adaptive knowledge distillation", ICCV 2025,
    https://arxiv.org/abs/2311.13621 and the code, cpsu00/EA-KD.
    """
    logits = _detached_at(temperature, student, teacher)
    h_student, h_teacher = map(numerics.entropy, logits)
    removed = jnp.isneginf(logits[0]) & jnp.isneginf(logits[1])
    count = jnp.maximum(jnp.sum(~removed, axis=-1), 2)  # of one class both entropies are 0
    largest = jnp.log(count.astype(h_student.dtype))
    weight = 0.5 * h_teacher * (1.0 + h_student / largest)
    return _reweighted("entropy_aware", loss, weight, student, teacher, batch)


entropy_aware.needs = ("logits",)


def power_weighted(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    loss: Loss,
    teacher_power: float | Array,
) -> Array:
    """The loss times sum_k p_k^g with p the teacher at temperature 1, its power sum.

    For g < 1 it is at least 1 and grows as the teacher flattens. It has no gradient in the logits,
    only in g. WTTM is this around `on_logits` of `powered` with the same g.

    Args:
        student: the network that is being trained.
        teacher: the other one; its `logits` [..., K].
        batch: for the loss.
        loss: what is weighted.
        teacher_power: g, a number or an array that broadcasts to `[...]`.

    Returns:
        `[...]`, one value per example.

    Raises:
        AssertionError: if the logits do not fit, or the loss does not give one value per example.
        ValueError: if a network shows no logits, or g does not broadcast.

    Source: Zheng and Yang, "Knowledge distillation based on transformed teacher matching", ICLR
    2024, https://arxiv.org/abs/2402.11148.
    """
    _, teacher_logits = _detached_at(1.0, student, teacher)
    log_p = numerics.log_softmax(teacher_logits)
    removed = jnp.isneginf(log_p)
    power = numerics.per_row("teacher_power", teacher_power, log_p)
    log_powers = jnp.where(removed, log_p, power * jnp.where(removed, 0.0, log_p))
    weight = jnp.exp(numerics.log_sum_exp(log_powers))
    return _reweighted("power_weighted", loss, weight, student, teacher, batch)


power_weighted.needs = ("logits",)


def difficulty_weighted(student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss) -> Array:
    """The loss times 1 - exp(-CE_student / CE_teacher), of the cross-entropies with the label.

    The weight is in [0, 1]: near 0 where the student is much better at the label than the teacher,
    which is left to teach where the student has more to learn. It has no gradient. To CE_teacher
    1e-7 is added, as published. A label that is no class, such as a withheld one (-1), makes the
    value NaN: take the mean over `where="labelled"`, or wrap the loss in `with_teacher_labels`.
    WSLD is this around KD (T = 2 and the weight 2.5 on ImageNet). Our reading, where the published
    code divides infinities: both alike, a weight of 1 - 1/e.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: its `labels` [...], integers.
        loss: what is weighted, such as `on_logits`.

    Returns:
        `[...]`, one value per example.

    Raises:
        AssertionError: if logits and labels do not fit, or the loss does not give one value per
            example.
        ValueError: if a network shows no logits, or the batch no labels.

    Source: Zhou et al., "Rethinking soft labels for knowledge distillation: a bias-variance
    tradeoff perspective", ICLR 2021, https://arxiv.org/abs/2102.00650.
    """
    labels = {"labels": numerics.labels_of("difficulty_weighted", batch)}
    of_student, of_teacher = (
        jnp.minimum(cross_entropy(Outputs(logits=x), teacher, labels), numerics.MAX_LOG_RATIO)
        for x in jnp.broadcast_arrays(*_detached_at(1.0, student, teacher))
    )
    weight = -jnp.expm1(-of_student / (of_teacher + 1e-7))
    return _reweighted("difficulty_weighted", loss, weight, student, teacher, batch)


difficulty_weighted.needs_labels = True
difficulty_weighted.needs = ("logits",)


def _detached_at(
    temperature: float | Array, student: Outputs, teacher: Outputs
) -> tuple[Array, Array]:
    """Both logits divided by T, with a gradient in T alone."""
    logits = numerics.check_logits(student.logits, teacher.logits)
    student_logits, teacher_logits = jax.lax.stop_gradient(logits)
    return at_temperature(student_logits, teacher_logits, temperature, 0.0)[:2]


def _reweighted(
    name: str, loss: Loss, weight: Array, student: Outputs, teacher: Outputs, batch: Batch
) -> Array:
    """weight x loss, example by example."""
    shape = jnp.broadcast_shapes(student.logits.shape, teacher.logits.shape)[:-1]
    values = _values(f"the loss of {name}", loss, student, teacher, batch, shape)
    return _weighted(weight, values)


def _values(
    name: str,
    loss: Loss,
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    shape: tuple[int, ...],
) -> Array:
    """The loss, whose shape is checked: another one would broadcast against the weights."""
    values = loss(student, teacher, batch)
    chex.assert_shape(
        values,
        shape,
        custom_message=f"{name} must give one value per example, {list(shape)}; found "
        f"{list(values.shape)}.",
        include_default_message=False,
    )
    return values


def _weighted(weight: Array, values: Array) -> Array:
    """weight x values, where a NaN of either (a label withheld) stays out of the other's slope."""
    missing = jnp.isnan(weight) | jnp.isnan(values)
    product = jnp.where(missing, 0.0, weight) * jnp.where(missing, 0.0, values)
    return jnp.where(missing, jnp.nan, product)
