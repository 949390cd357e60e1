"""A network together with the normalisation of its inputs."""

from collections.abc import Sequence

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from abkd_jax.types import Outputs


def normalized(
    module: nn.Module, *, mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """A module that takes inputs as a data set stores them, with the variables of the given one.

    Args:
        module: for normalised inputs.
        mean: of each channel of pixels in [0, 1]; None for no normalisation.
        std: likewise.

    Returns:
        A flax module: uint8 inputs are divided by 255, then (inputs - mean) / std.
    """
    numbers = (None if x is None else tuple(x) for x in (mean, std))
    return Normalized(module, *numbers)


class Normalized(nn.Module):
    """See `normalized`."""

    module: nn.Module
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def setup(self) -> None:
        """The variables are those of the module, without a level of their own."""
        nn.share_scope(self, self.module)

    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, ...]` to `Outputs`."""
        inputs = jnp.asarray(inputs)
        inputs = inputs / 255 if inputs.dtype == jnp.uint8 else inputs
        if self.mean is not None:
            inputs = (inputs - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return self.module(inputs, train=train)
