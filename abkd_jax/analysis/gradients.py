"""Gradients of losses, in logits and in parameters: their size, their angle, their noise."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree

from abkd_jax import checks, numerics
from abkd_jax.analysis.checks import check_cached
from abkd_jax.binding import Number
from abkd_jax.losses import mask_of, total
from abkd_jax.types import Batch, Divergence, Outputs, Term


def logit_gradient(
    student_logits: Array, teacher_logits: Array, *, divergence: Divergence
) -> Array:
    """dD/df, the gradient of each example's divergence in its own student logits f.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        divergence: D.

    Returns:
        `[..., K]`; 0 at a class that the student has removed, whose logit stays at -inf.
    """
    return gradient_of_checked(*check_cached(student_logits, teacher_logits), divergence)


def gradient_of_checked(
    student_logits: Array, teacher_logits: Array, divergence: Divergence
) -> Array:
    """`logit_gradient` of logits that are checked."""
    summed = lambda logits: jnp.sum(divergence(logits, teacher_logits))  # noqa: E731
    gradient = jax.grad(summed)(student_logits)
    return jnp.where(jnp.isneginf(student_logits), 0.0, gradient)


def gradient_norm(gradient: Array) -> Array:
    """The Euclidean norm over the last axis, `[..., K]` -> `[...]`; no square under- or overflows.

    Subnormal numbers count as 0 where XLA flushes them, as it does on a CPU. For a pytree there is
    `optax.tree.norm`.
    """
    scaled, scale = _scaled(gradient)
    return scale[..., 0] * jnp.linalg.norm(scaled, axis=-1)


def cosine(a: Array, b: Array) -> Array:
    """The cosine of the angle between a and b over the last axis, 0 where one of them is 0.

    Args:
        a: `[..., K]`.
        b: `[..., K]`, leading axes that broadcast.

    Returns:
        `[...]` in [-1, 1], up to rounding.
    """
    return jnp.sum(_unit(a) * _unit(b), axis=-1)


def tree_cosine(a: Any, b: Any) -> Array:
    """`cosine` of two pytrees of the same structure, each as one long vector.

    Raises:
        ValueError: if the structures or shapes differ.
    """
    _check_alike(a=a, b=b)
    return cosine(ravel_pytree(a)[0], ravel_pytree(b)[0])


def logit_cosines(
    terms: Mapping[str, Term], student: Outputs, others: Mapping[str, Outputs], batch: Batch
) -> dict[str, dict[str, Array]]:
    """The cosines between the terms' gradients in each example's logits, averaged over examples.

    What a term has to say about other parts of the outputs (hidden, features) does not count. A
    term that couples the batch has, at an example's logits, the gradient of its sum over the batch.

    Args:
        terms: by name; a weight changes no cosine and is not read.
        student: the network that is being trained; its `logits` [..., K].
        others: the other networks' outputs, by name.
        batch: with every mask that a term names.

    Returns:
        {term: {term: scalar}}, for each two the mean over the examples that both average over; 0 if
        there are none.
    """
    alone = [{name: term.replace(weight=1.0)} for name, term in terms.items()]
    slopes = [logit_slope(term, student, others, batch) for term in alone]
    units = _unit(jnp.stack(slopes))
    masks = jnp.stack([mask_of(term, batch) for term in terms.values()])
    cosines = jnp.sum(units[:, None] * units[None], axis=-1)
    both = masks[:, None] & masks[None]
    return _by_names(terms, jax.vmap(jax.vmap(numerics.masked_mean))(cosines, both))


def parameter_cosines(
    terms: Mapping[str, Term],
    forward: Callable[[Any, Batch], Outputs],
    params: Any,
    others: Mapping[str, Outputs],
    batch: Batch,
) -> dict[str, dict[str, Array]]:
    """The cosines between the gradients of the terms' batch means in the parameters.

    Args:
        terms: by name; a weight changes no cosine and is not read.
        forward: params, batch -> the outputs of the network that is being trained.
        params: any pytree of floating-point arrays.
        others: the other networks' outputs, by name.
        batch: with every mask that a term names.

    Returns:
        {term: {term: scalar}}.
    """
    gradients, _ = term_gradients(terms, forward, params, others, batch)
    return tree_cosines(gradients)


def tree_cosines(trees: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """`tree_cosine` between each two of several pytrees, as {name: {name: scalar}}."""
    units = _unit(jnp.stack([ravel_pytree(tree)[0] for tree in trees.values()]))
    return _by_names(trees, jnp.matmul(units, units.T, precision=jax.lax.Precision.HIGHEST))


def term_gradients(
    terms: Mapping[str, Term],
    forward: Callable[[Any, Batch], Outputs],
    params: Any,
    others: Mapping[str, Outputs],
    batch: Batch,
    *,
    chunk: int = 0,
) -> tuple[dict[str, Any], Outputs]:
    """The gradients of the terms' batch means, before their weights, and the network's outputs.

    One forward pass, and a backward pass for each term.

    Args:
        terms: by name; the weights are not read, the schedules of their losses are replaced by
            numbers (`binding.at_step`).
        forward: params, batch -> the outputs of the network that is being trained.
        params: any pytree of floating-point arrays.
        others: the other networks' outputs, by name.
        batch: with every mask that a term names.
        chunk: see `losses.total`.

    Returns:
        A pytree like `params` for each term, by its name; the outputs.
    """
    outputs, pull = jax.vjp(lambda params: forward(params, batch), params)

    def mean(outputs: Outputs, name: str) -> Array:
        alone = {name: terms[name].replace(weight=1.0)}
        return total(alone, outputs, others, batch, chunk=chunk)[0]

    return {name: pull(jax.grad(mean)(outputs, name))[0] for name in terms}, outputs


@struct.dataclass
class GradientNoise:
    """How much a batch's gradient G_B varies around the gradient G of the whole distribution.

    Attributes:
        squared_norm: an estimate of |G|^2 without bias; negative where noise hides the gradient.
        variance: E |G_B - G|^2, the trace of the covariance of a batch's gradient, without bias.
        signal_to_noise: squared_norm / variance, at least 0.
        noise_scale: B_simple = tr(Sigma) / |G|^2 in examples, Sigma being the covariance of one
            example's gradient: the batch size at which signal and noise are equal. Infinite where
            the estimate of |G|^2 is not positive.
    """

    squared_norm: Array
    variance: Array
    signal_to_noise: Array
    noise_scale: Array


def gradient_noise(gradients: Any, *, batch_size: Number = 1.0) -> GradientNoise:
    """The noise of gradients, from those of a few batches at the same parameters.

    Args:
        gradients: a pytree of `[N, ...]`, the gradients of the means over N >= 2 batches.
        batch_size: the number of examples in a batch. Only `noise_scale` depends on it.

    Returns:
        Scalars.

    Raises:
        ValueError: if there are fewer than two batches.

    Source: McCandlish et al., "An empirical model of large-batch training", 2018,
    https://arxiv.org/abs/1812.06162.
    """
    rows = _rows("gradients", gradients)
    variance = _covariance(rows, rows)
    squared_norm = jnp.sum(jnp.square(jnp.mean(rows, axis=0))) - variance / len(rows)
    signal = jnp.maximum(squared_norm, 0.0)
    return GradientNoise(
        squared_norm, variance, _ratio(signal, variance), batch_size * _ratio(variance, signal)
    )


@struct.dataclass
class VarianceReduction:
    """How much of the variance of the task's stochastic gradient distillation takes away.

    Attributes:
        removed: 1 - Var(mixed) / Var(task), at most 1; negative where distillation adds noise.
        best_weight: the weight of distillation at which the mixture's variance is smallest.
        removed_at_best: the share removed there, in [0, 1].
    """

    removed: Array
    best_weight: Array
    removed_at_best: Array


def variance_reduction(
    distill_gradients: Any, task_gradients: Any, *, weight: Number = 1.0
) -> VarianceReduction:
    """The partial variance reduction of (1 - w) task + w distillation against the task alone.

    For a linear model under the logistic loss, distillation's gradient is the task's less w times
    the teacher's own task gradient on the same batch: a control variate, like that of SVRG, which
    takes away that part of the noise which teacher and student share. The variance of the mixture
    is a parabola in w, so its minimum comes with the same three sums. Variance is the trace of the
    covariance over batches, without bias. A loss on another scale has another variance: give both
    the scale with which they are trained.

    Args:
        distill_gradients: a pytree of `[N, ...]`, gradients of the distillation loss on N >= 2
            batches at the same parameters.
        task_gradients: the same of the task's loss, on the same batches.
        weight: w; 1 compares distillation alone with the task.

    Returns:
        Scalars.

    Raises:
        ValueError: if there are fewer than two batches, or the two pytrees differ in structure or
            shapes.

    Source: Safaryan et al., "Knowledge distillation performs partial variance reduction", NeurIPS
    2023, https://arxiv.org/abs/2305.17581.
    """
    distill = _rows("distill_gradients", distill_gradients)
    task = _rows("task_gradients", task_gradients)
    _check_alike(distill_gradients=distill_gradients, task_gradients=task_gradients)
    variance = _covariance(task, task)
    toward = distill - task
    shared, square = _covariance(task, toward), _covariance(toward, toward)
    removed = lambda w: _ratio(-w * (2.0 * shared + w * square), variance)  # noqa: E731
    best = jnp.where(square > 0, -shared / jnp.where(square > 0, square, 1.0), 0.0)
    return VarianceReduction(removed(jnp.asarray(weight)), best, removed(best))


def logit_slope(
    terms: Mapping[str, Term], student: Outputs, others: Mapping[str, Outputs], batch: Batch
) -> Array:
    """The gradient of each example's own objective, all terms with their weights, in its logits.

    Args:
        terms: by name; their schedules replaced by numbers.
        student: the network that is being trained; its `logits` [..., K].
        others: the other networks' outputs, by name.
        batch: with every mask that a term names.

    Returns:
        `[..., K]`; 0 where no term's mask is set, and at classes that the student has removed.
    """
    one = dict.fromkeys(terms, 1.0)  # sums in place of means: each example at its own scale

    def summed(logits):
        return total(terms, student.replace(logits=logits), others, batch, counts=one)[0]

    slope = jax.grad(summed)(student.logits)
    return jnp.where(jnp.isneginf(student.logits), 0.0, slope)


def _by_names(names: Iterable[str], matrix: Array) -> dict[str, dict[str, Array]]:
    """A matrix's entries by name, since jit forgets the order of a dictionary's."""
    return {a: {b: matrix[i, j] for j, b in enumerate(names)} for i, a in enumerate(names)}


def _covariance(a: Array, b: Array) -> Array:
    """The trace of the covariance of `[N, P]` and `[N, P]` over N, without bias."""
    centred = [x - jnp.mean(x, axis=0) for x in (a, b)]
    return jnp.sum(centred[0] * centred[1]) / (len(a) - 1)


def _ratio(a: Array, b: Array) -> Array:
    """a / b for b >= 0: infinite where b alone is 0, and 0 where both are."""
    return jnp.where((a == 0) & (b == 0), 0.0, a / jnp.where(a == 0, jnp.where(b == 0, 1.0, b), b))


def _rows(name: str, gradients: Any) -> Array:
    """A pytree of `[N, ...]` as `[N, P]`."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(gradients)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    fits = len(counts) == 1 and min(counts) >= 2
    expected = "the gradients of at least 2 batches, stacked along the first axis of every array"
    checks.require(fits, name, expected, sorted(counts))
    return jax.vmap(lambda tree: ravel_pytree(tree)[0])(gradients)


def _check_alike(**trees: Any) -> None:
    """Refuses two pytrees, by their names, whose arrays differ in path or shape."""
    parts = [
        [f"{jax.tree_util.keystr(path)} {list(jnp.shape(leaf))}".strip() for path, leaf in leaves]
        for leaves in map(jax.tree.leaves_with_path, trees.values())
    ]
    for found in itertools.zip_longest(*parts, fillvalue="nothing"):
        expected = "of the same structure and shapes"
        checks.require(found[0] == found[1], " and ".join(trees), expected, found)


def _scaled(x: Array) -> tuple[Array, Array]:
    """x over its largest magnitude along the last axis, and that magnitude.

    It is clipped to what has a normal number for its reciprocal: XLA multiplies by that instead of
    dividing, and would flush a subnormal one to 0.
    """
    tiny = float(jnp.finfo(jnp.result_type(float, x)).tiny)
    scale = jnp.clip(jnp.max(jnp.abs(x), axis=-1, keepdims=True), tiny, 1.0 / tiny)
    return x / scale, scale


def _unit(x: Array) -> Array:
    """x over its norm along the last axis; 0 stays 0."""
    scaled, _ = _scaled(x)
    square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    return scaled / jnp.sqrt(jnp.where(square == 0, 1.0, square))
