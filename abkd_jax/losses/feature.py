"""Losses on the features before the last linear map, and what they take of a teacher's.

A student whose features have another width than the teacher's shows its projection of them: a
config's `project=dict(hidden=WIDTH)`, see `models.projected`.
"""

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.binding import Number, Positive
from abkd_jax.divergences import forward_kl
from abkd_jax.types import Batch, Head, Outputs


def norm_and_direction(
    student: Outputs, teacher: Outputs, batch: Batch, *, centers: Array
) -> Array:
    """1 - <f_s, e> / max(||f_s||, ||f_t||) with e the unit vector along the label's center (KD-ND).

    While the student's features are shorter than the teacher's, the divisor is a constant, and
    growing along e lowers the loss; where they are longer, it is one minus the cosine to e. The
    teacher's features enter by their norm alone. They and the centers are detached.

    A label that is no class, such as a withheld one (-1), makes the value NaN: take the mean over
    `where="labelled"`. Our reading, where the published code divides by zero: a norm of 0 has slope
    0, both norms 0 give 1, and so does a center of 0, that of a class without examples.

    Args:
        student: the network that is being trained; its `hidden` [..., D], or in its place its
            `projected["hidden"]`.
        teacher: the other one; its `hidden` [..., D].
        batch: its `labels` [...], integers.
        centers: `[K, D]`, the mean of the teacher's features over each class (`class_means`). A
            config writes "class_means" for those of the other network.

    Returns:
        `[...]` in [0, 2], one value per example.

    Raises:
        AssertionError: if features, labels and centers do not fit.
        ValueError: if the widths of the features differ.

    Source: Wang et al., "Improving knowledge distillation via regularizing feature direction and
    norm", ECCV 2024, https://arxiv.org/abs/2305.17007.
    """
    f_s, f_t = aligned(student, teacher)
    labels = checks.labels_of("norm_and_direction", batch, f_s.shape[:-1], "features")
    meaning = "one for each class, at the width of the other network's features"
    checks.check_array("centers", centers, float, ("K", f_s.shape[-1]), meaning)
    centers = jax.lax.stop_gradient(jnp.asarray(centers, f_s.dtype))
    length = numerics.norm(centers)[:, None]
    directions = jnp.where(length > 0, centers / jnp.where(length > 0, length, 1.0), 0.0)
    labels, known = numerics.known_labels(labels, len(centers))
    along = jnp.sum(f_s * directions[labels], axis=-1)
    longer = jnp.maximum(numerics.norm(f_s), jax.lax.stop_gradient(numerics.norm(f_t)))
    value = 1.0 - along / jnp.where(longer > 0, longer, 1.0)
    return jnp.where(known, value, jnp.nan)


norm_and_direction.needs_labels = True
norm_and_direction.needs = ("hidden",)


def decoupled_features(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    strong_weight: Number,
    weak_weight: Number,
    temperature: Positive,
) -> Array:
    """T^2 (BCD + strong_weight SCD + weak_weight WCD), CAKD on the features before the logits.

    p and q are softmaxes of the teacher's and the student's features over their D units, at
    temperature T. With the units split into a strong set and a weak one,

        KL(p || q) = BCD + p(strong) SCD + p(weak) WCD,

    where BCD is the KL of the two sets' masses, and SCD and WCD are those within the sets. CAKD
    gives the last two weights of their own, in place of the masses by which a confident teacher
    suppresses them. A set without units has no part.

    What is known: the decomposition, the two free weights and that the sets are split by how much a
    unit matters to the prediction. Our reading, for there is no public code: a unit is strong if
    |w f_t|, with w its weight for the label in the teacher's last linear map, lies above the mean
    over units (which is |f dz/df|, the usual relevance); the mask is the teacher's, for both, and
    detached; BCD has weight 1; the factor T^2. As for other losses on labels, one that is no class,
    such as a withheld one (-1), makes the value NaN: take the mean over `where="labelled"`.

    Args:
        student: the network that is being trained; its `hidden` [..., D], or in its place its
            `projected["hidden"]`.
        teacher: the other one; its `hidden` [..., D] and `head`.
        batch: its `labels` [...], integers.
        strong_weight: of SCD; a number, or an array that broadcasts to the leading axes.
        weak_weight: of WCD, likewise.
        temperature: T > 0, likewise; else NaN results.

    Returns:
        `[...]`, one value per example; non-negative for weights that are.

    Raises:
        AssertionError: if features, labels and unembedding do not fit.
        ValueError: if the widths of the features differ.

    Source: Zhang et al., "CAKD: A correlation-aware knowledge distillation framework based on
    decoupling Kullback-Leibler divergence", 2024, https://arxiv.org/abs/2410.14741.
    """
    f_s, f_t = aligned(student, teacher)
    labels = checks.labels_of("decoupled_features", batch, f_s.shape[:-1], "features")
    strong, known = _strong_units(f_t, teacher.head, labels)
    s, t, scale = numerics.at_temperature(f_s, f_t, temperature, 2.0)
    strong_weight = numerics.per_row("strong_weight", strong_weight, f_s)
    weak_weight = numerics.per_row("weak_weight", weak_weight, f_s)
    sets = jnp.stack([strong, ~strong], axis=-2)
    s, t = (jnp.where(sets, x[..., None, :], -jnp.inf) for x in (s, t))
    within = forward_kl(s, t)  # [..., 2]; what is -inf on both sides is no part of it
    value = forward_kl(numerics.log_sum_exp(s), numerics.log_sum_exp(t))[..., None]
    value += strong_weight * within[..., :1] + weak_weight * within[..., 1:]
    return jnp.where(known, scale * value[..., 0], jnp.nan)


decoupled_features.needs_labels = True
decoupled_features.needs = {"own": ("hidden",), "other": ("hidden", "head")}


def aligned(student: Outputs, teacher: Outputs) -> tuple[Array, Array]:
    """The features of both networks: the student's projected to the teacher's width, if it is.

    Args:
        student: its `projected["hidden"]` [..., D], else its `hidden` [..., D].
        teacher: its `hidden` [..., D].

    Returns:
        `[..., D]` of each, in one dtype of at least 32 bit.

    Raises:
        AssertionError: if they are not floating point.
        ValueError: if a network shows no features or the widths differ.
    """
    named = {"hidden": student.hidden, **(student.projected or {})}
    f_s = checks.check_rows(named["hidden"], "hidden of the network being trained", "D")
    f_t = checks.check_rows(teacher.hidden, "hidden of the other network", "D")
    found, width = f_s.shape[-1], f_t.shape[-1]
    expected = f"{width}, that of the other network: give it project=dict(hidden={width})"
    field = "the width of the features of the network being trained"
    checks.require(found == width, field, expected, found)
    dtype = jnp.result_type(f_s, f_t)
    return f_s.astype(dtype), f_t.astype(dtype)


def class_means(hidden: Array, labels: Array, num_classes: int) -> Array:
    """The mean of the features of each class, the centers of `norm_and_direction`.

    Args:
        hidden: `[N, D]`.
        labels: `[N]`, integers; examples with -1 are left out.
        num_classes: K.

    Returns:
        `[K, D]`; zeros for a class without examples.

    Raises:
        AssertionError: if hidden and labels do not fit.
    """
    sums, counts = class_sums(hidden, labels, num_classes)
    return sums / jnp.maximum(counts, 1)[:, None]


def class_sums(hidden: Array, labels: Array, num_classes: int) -> tuple[Array, Array]:
    """The sum of the features of each class, [K, D], and its size, [K]: what `class_means` divides.

    The arguments are those of `class_means`; over parts of a set the results add up.
    """
    checks.check_array("hidden", hidden, float, ("N", "D"), "the features of N examples")
    checks.check_labels(labels, hidden.shape[:-1], "features")
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    member = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    sums = jnp.einsum("nk,nd->kd", member, hidden.astype(dtype), precision="highest")
    return sums, jnp.sum(member, axis=0)


def _strong_units(f_t: Array, head: Head | None, labels: Array) -> tuple[Array, Array]:
    """`[..., D]`, the units whose part in the label's logit is larger than the mean part.

    And `[...]`, where the label is one of the classes.
    """
    checks.require(head is not None, "the head of the other network", "shown", head)
    name = "the unembedding of the other network"
    shape = (f_t.shape[-1], "K")
    checks.check_array(name, head.unembedding, float, shape, "as wide as its features")
    labels, known = numerics.known_labels(labels, head.unembedding.shape[-1])
    weights = head.unembedding.astype(f_t.dtype).T[labels]
    relevance = jnp.abs(jax.lax.stop_gradient(weights * f_t))
    return relevance > jnp.mean(relevance, axis=-1, keepdims=True), known
