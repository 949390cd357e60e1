"""A network together with the normalisation of its inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from abkd_jax import data
from abkd_jax.models.adapters import as_outputs, call
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
    return Normalized(module, *_fixed(mean, std))


def normalized_function(
    apply_fn: Callable[..., Array | Outputs],
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> "NormalizedFunction":
    """`normalized` of a network written elsewhere, see `as_outputs`."""
    return NormalizedFunction(apply_fn, *_fixed(mean, std))


def _fixed(*numbers: Sequence[float] | None) -> list[tuple[float, ...] | None]:
    return [None if x is None else tuple(x) for x in numbers]


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
        return call(self.module, _normalized(inputs, self.mean, self.std), train=train)


class NormalizedFunction(NamedTuple):
    """See `normalized_function`."""

    apply_fn: Callable[..., Array | Outputs]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def apply(self, variables: Any, inputs: Any, *, train: bool = False) -> Outputs:
        """Variables "params" and "batch_stats" and stored inputs `[B, ...]` to `Outputs`."""
        inputs = _normalized(inputs, self.mean, self.std)
        return as_outputs(self.apply_fn)(variables, inputs, train=train, key=None)[0]


def _normalized(inputs: Any, *numbers: tuple[float, ...] | None) -> Any:
    arrays = map(jnp.asarray, numbers) if numbers[0] is not None else ()
    return data.normalized(inputs, data.Preprocess(*arrays))
