"""Networks small enough to train in seconds on a CPU."""

import math

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.models.batch_norm import BatchNorm
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs


def mlp(*, num_classes: int, widths: tuple[int, ...]) -> nn.Module:
    """A multi-layer perceptron on flattened inputs, with hidden layers of the given widths."""
    return MLP(num_classes=num_classes, widths=_positive("mlp", widths))


def cnn(*, num_classes: int, widths: tuple[int, ...], batch_norm: bool = False) -> nn.Module:
    """3x3 convolutions of the given widths, each with stride 2, and the mean over positions."""
    return CNN(num_classes=num_classes, widths=_positive("cnn", widths), batch_norm=batch_norm)


def _positive(name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    require(all(width > 0 for width in widths), f"{name}.widths", "at least 1 each", widths)
    return tuple(widths)


class MLP(nn.Module):
    """See `mlp`."""

    num_classes: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, ...]` to `Outputs`; training makes no difference."""
        x, features = inputs.reshape(inputs.shape[0], math.prod(inputs.shape[1:])), {}
        for index, width in enumerate(self.widths):
            x = features[f"layer{index}"] = nn.relu(nn.Dense(width)(x))
        return OutputLayer(self.num_classes, name="head")(x, features)


class CNN(nn.Module):
    """See `cnn`."""

    num_classes: int
    widths: tuple[int, ...]
    batch_norm: bool

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        x, features = inputs, {}
        for index, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                x = BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = features[f"layer{index}"] = nn.relu(x)
        return OutputLayer(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)), features)
