"""Networks by name: each function here returns a flax module that maps inputs to `Outputs`."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from abkd_jax.models.adapters import as_outputs, split_variables
from abkd_jax.models.normalized import normalized
from abkd_jax.models.projected import projected, without_projections
from abkd_jax.models.resnet import resnet
from abkd_jax.models.small import cnn, mlp
from abkd_jax.types import call_named

__all__ = [
    "as_outputs",
    "cnn",
    "from_config",
    "mlp",
    "normalized",
    "projected",
    "resnet",
    "split_variables",
    "without_projections",
]

_MODELS = {"cnn": cnn, "mlp": mlp, "resnet": resnet}


def from_config(
    model: str, hypers: Mapping[str, Any], *, num_classes: int, field: str
) -> nn.Module:
    """The module of a network's group.

    Args:
        model: the name of a function of this package.
        hypers: its keywords, without num_classes.
        num_classes: K.
        field: where the group stands in the config, for messages.

    Returns:
        A flax module.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    return call_named(
        _MODELS, model, hypers, num_classes=num_classes, field=field, name_field=f"{field}.model"
    )
