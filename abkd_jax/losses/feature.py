"""Losses on the features before the last linear map, and what they take of a teacher's.

A student whose features have another width than the teacher's shows its projection of them: a
config's `project=dict(hidden=WIDTH)`, see `models.projected`.
"""

import chex
import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import numerics
from abkd_jax.combinators import at_temperature
from abkd_jax.divergences import forward_kl
from abkd_jax.types import Batch, Outputs


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
        ValueError: if the widths of the features differ, or the batch has no labels.

    Wang et al., "Improving knowledge distillation via regularizing feature direction and norm",
    ECCV 2024, https://arxiv.org/abs/2305.17007.
    """
    f_s, f_t = _features(student, teacher)
    labels = numerics.labels_of("norm_and_direction", batch)
    numerics.check_labels(labels, f_s.shape, "features")
    width = f_s.shape[-1]
    chex.assert_shape(
        centers,
        (None, width),
        custom_message=f"centers must be [K, {width}], one for each class at the width of the "
        f"other network's features; found {list(jnp.shape(centers))}.",
        include_default_message=False,
    )
    centers = jax.lax.stop_gradient(jnp.asarray(centers, f_s.dtype))
    length = norm(centers)[:, None]
    directions = jnp.where(length > 0, centers / jnp.where(length > 0, length, 1.0), 0.0)
    labels, known = numerics.known_labels(labels, len(centers))
    along = jnp.sum(f_s * directions[labels], axis=-1)
    longer = jnp.maximum(norm(f_s), jax.lax.stop_gradient(norm(f_t)))
    value = 1.0 - along / jnp.where(longer > 0, longer, 1.0)
    return jnp.where(known, value, jnp.nan)


norm_and_direction.needs_labels = True
norm_and_direction.needs = ("hidden",)


def decoupled_features(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    strong_weight: float | Array,
    weak_weight: float | Array,
    temperature: float | Array,
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
        teacher: the other one; its `hidden` [..., D] and `unembedding` [D, K].
        batch: its `labels` [...], integers.
        strong_weight: of SCD; a number, or an array that broadcasts to the leading axes.
        weak_weight: of WCD, likewise.
        temperature: T > 0, likewise; else NaN results.

    Returns:
        `[...]`, one value per example; non-negative for weights that are.

    Raises:
        AssertionError: if features, labels and unembedding do not fit.
        ValueError: if the widths of the features differ, or the batch has no labels.

    Zhang et al., "CAKD: A correlation-aware knowledge distillation framework based on decoupling
    Kullback-Leibler divergence", 2024, https://arxiv.org/abs/2410.14741.
    """
    f_s, f_t = _features(student, teacher)
    labels = numerics.labels_of("decoupled_features", batch)
    numerics.check_labels(labels, f_s.shape, "features")
    strong, known = _strong_units(f_t, teacher.unembedding, labels)
    s, t, scale = at_temperature(f_s, f_t, temperature, 2.0)
    strong_weight = numerics.per_row("strong_weight", strong_weight, f_s)
    weak_weight = numerics.per_row("weak_weight", weak_weight, f_s)
    sets = jnp.stack([strong, ~strong], axis=-2)
    s, t = (jnp.where(sets, x[..., None, :], -jnp.inf) for x in (s, t))
    within = forward_kl(s, t)  # [..., 2]; what is -inf on both sides is no part of it
    value = forward_kl(numerics.log_sum_exp(s), numerics.log_sum_exp(t))[..., None]
    value += strong_weight * within[..., :1] + weak_weight * within[..., 1:]
    return jnp.where(known, scale * value[..., 0], jnp.nan)


decoupled_features.needs_labels = True
decoupled_features.needs = ("hidden", "unembedding")


def aligned(student: Outputs, teacher: Outputs) -> Array:
    """The student's features at the width of the teacher's: projected, if it shows that.

    Args:
        student: its `projected["hidden"]` [..., D], else its `hidden` [..., D].
        teacher: its `hidden` [..., D].

    Returns:
        `[..., D]`.

    Raises:
        ValueError: one sentence, if a network shows no features or the widths differ.
    """
    named = {"hidden": student.hidden, **(student.projected or {})}
    found = named["hidden"]
    for name, hidden in {"network being trained": found, "other network": teacher.hidden}.items():
        if hidden is None:
            raise ValueError(f"the {name} must show hidden, its features; found None.")
    width, expected = found.shape[-1], teacher.hidden.shape[-1]
    if width != expected:
        raise ValueError(
            f"the features of the network being trained have the width {width} and those of the "
            f"other network {expected}; give the former project=dict(hidden={expected})."
        )
    return found


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
    chex.assert_rank(hidden, 2)
    numerics.check_labels(labels, hidden.shape, "features")
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    member = jax.nn.one_hot(labels, num_classes, dtype=dtype)
    sums = jnp.einsum("nk,nd->kd", member, hidden.astype(dtype), precision="highest")
    return sums, jnp.sum(member, axis=0)


def norm(x: Array, axes: int | tuple[int, ...] = -1) -> Array:
    """The Euclidean norm over the axes, with slope 0 at 0, where autodiff's would be NaN."""
    square = jnp.sum(jnp.square(x), axis=axes)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def _features(student: Outputs, teacher: Outputs) -> tuple[Array, Array]:
    """The aligned features of both, in one dtype of at least 32 bit."""
    f_s, f_t = aligned(student, teacher), teacher.hidden
    chex.assert_type(
        [f_s, f_t],
        float,
        custom_message=f"features must be floating point; found {f_s.dtype} and {f_t.dtype}.",
        include_default_message=False,
    )
    dtype = jnp.promote_types(jnp.result_type(f_s, f_t), jnp.float32)
    return jnp.asarray(f_s, dtype), jnp.asarray(f_t, dtype)


def _strong_units(f_t: Array, unembedding: Array, labels: Array) -> tuple[Array, Array]:
    """`[..., D]`, the units whose part in the label's logit is larger than the mean part.

    And `[...]`, where the label is one of the classes.
    """
    chex.assert_shape(
        unembedding,
        (f_t.shape[-1], None),
        custom_message=f"the unembedding of the other network must be [{f_t.shape[-1]}, K]; found "
        f"{list(jnp.shape(unembedding))}.",
        include_default_message=False,
    )
    labels, known = numerics.known_labels(labels, unembedding.shape[-1])
    weights = unembedding.astype(f_t.dtype).T[labels]
    relevance = jnp.abs(jax.lax.stop_gradient(weights * f_t))
    return relevance > jnp.mean(relevance, axis=-1, keepdims=True), known
