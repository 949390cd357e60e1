"""Accuracy under attack: inputs that are moved, within a radius, against a network."""

from collections.abc import Callable

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax.binding import Number

Network = Callable[[Array], Array]
"""inputs [B, ...] -> logits [B, K], each row of its own input alone, as in evaluation"""


def fgsm(network: Network, inputs: Array, labels: Array, *, radius: Number) -> Array:
    """Inputs moved by the radius in the sign of the gradient of their cross-entropy.

    Args:
        network: to attack.
        inputs: `[B, ...]` in 0..1, as pixels are.
        labels: `[B]`, integers; where one is negative the input stays.
        radius: of the move, in each of an input's numbers, such as 8 / 255.

    Returns:
        `[B, ...]`, in 0..1.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015.
    """
    return _moved(network, inputs, labels, inputs, radius, radius)


def pgd(
    network: Network,
    inputs: Array,
    labels: Array,
    *,
    key: Array,
    radius: Number,
    step_size: Number,
    steps: int,
) -> Array:
    """Inputs moved by several such steps from a random start, each back into the radius.

    Args:
        network: to attack.
        inputs: `[B, ...]` in 0..1, as pixels are.
        labels: `[B]`, integers; where one is negative the input stays.
        key: of the start, uniform within the radius.
        radius: the largest move in each of an input's numbers, such as 8 / 255.
        step_size: of a step, such as 2 / 255.
        steps: how many.

    Returns:
        `[B, ...]`, in 0..1.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR
    2018.
    """
    noise = jax.random.uniform(key, inputs.shape, inputs.dtype, -1.0, 1.0)
    start = _where(labels, jnp.clip(inputs + radius * noise, 0.0, 1.0), inputs)

    def step(_, x: Array) -> Array:
        return _moved(network, x, labels, inputs, step_size, radius)

    return jax.lax.fori_loop(0, steps, step, start)


def _moved(
    network: Network, x: Array, labels: Array, center: Array, size: Number, radius: Number
) -> Array:
    """x after a step uphill, within the radius of the centre and 0..1."""

    def loss(x: Array) -> Array:
        log_q = jax.nn.log_softmax(network(x).astype(jnp.float32))
        of_label = jnp.take_along_axis(log_q, jnp.maximum(labels, 0)[:, None], axis=-1)
        return -jnp.sum(of_label)

    moved = x + size * jnp.sign(jax.grad(loss)(x))
    moved = jnp.clip(moved, center - radius, center + radius)
    return _where(labels, jnp.clip(moved, 0.0, 1.0), x)


def _where(labels: Array, moved: Array, kept: Array) -> Array:
    return jnp.where(jnp.reshape(labels >= 0, (-1,) + (1,) * (kept.ndim - 1)), moved, kept)
