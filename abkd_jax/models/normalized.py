"""A network together with the normalisation of its inputs."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
from jax import numpy as jnp

from abkd_jax import data
from abkd_jax.models.adapters import call
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
        A flax module, whose inputs go through `data.normalized`.
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

    def __call__(self, inputs: Any, *, train: bool) -> Outputs:
        """Stored inputs `[B, ...]` to `Outputs`."""
        given = self.mean is not None
        arrays = map(jnp.asarray, (self.mean, self.std)) if given else ()
        inputs = data.normalized(inputs, data.Preprocess(*arrays))
        return call(self.module, inputs, train=train)
