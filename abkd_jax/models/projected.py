"""A network together with heads that bring what it shows to the widths of another network."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from jax import Array

from abkd_jax.models.adapters import call
from abkd_jax.types import Outputs

PROJECTIONS = "abkd_projections"  # where their parameters are, beside those of the network


def projected(module: nn.Module, *, hidden: int) -> nn.Module:
    """A module that also shows a linear map of its hidden features, which is learned with it.

    The parameters of the map have a place of their own, so that `without_projections` gives those
    of the network; they are no part of what is counted, loaded or exported.

    One linear map with a bias is what most feature losses use. (The code of KD-ND puts batch norm
    and dropout before it.)

    Args:
        module: shows `hidden` [..., D].
        hidden: the width of the projection, that of the other network's features.

    Returns:
        A flax module: its outputs are those of the given one, and `projected["hidden"]`
        [..., hidden].
    """
    return Projected(module, hidden)


def without_projections(params: Any) -> Any:
    """The parameters of the network alone."""
    if not isinstance(params, Mapping) or PROJECTIONS not in params:
        return params
    return {name: value for name, value in params.items() if name != PROJECTIONS}


class Projected(nn.Module):
    """See `projected`."""

    module: nn.Module
    hidden: int

    def setup(self) -> None:
        """The network's variables are where they would be without this module."""
        nn.share_scope(self, self.module)

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, ...]` to `Outputs`."""
        outputs = call(self.module, inputs, train=train)
        hidden = nn.Dense(self.hidden, name=PROJECTIONS)(outputs.hidden)
        return outputs.replace(projected={**(outputs.projected or {}), "hidden": hidden})
