"""Data sets as arrays on the device, and batches of them as a function of (data_seed, step)."""

from collections.abc import Mapping
from typing import Any

from abkd_jax.data.digits import digits
from abkd_jax.data.sets import DataSet, Split, batch_at, epoch_order, evaluation_batches
from abkd_jax.types import call_named, check_named

__all__ = [
    "DataSet",
    "Split",
    "batch_at",
    "check",
    "digits",
    "epoch_order",
    "evaluation_batches",
    "from_config",
]

_SETS = {"digits": digits}


def from_config(group: Mapping[str, Any], *, data_seed: int) -> DataSet:
    """The set of a config's `data` group: `name`, and the keywords of the function of that name.

    Args:
        group: such as dict(name="digits", validation=297, labelled=100).
        data_seed: of the split.

    Returns:
        The set.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    check(group)
    hypers = {key: value for key, value in group.items() if key != "name"}
    fields = {"field": "data", "name_field": "data.name"}
    return call_named(_SETS, group["name"], hypers, data_seed=data_seed, **fields)


def check(group: Mapping[str, Any]) -> None:
    """Refuses a `data` group with an unknown name, or with unknown or missing keywords.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if not isinstance(group, Mapping):
        raise ValueError(f"data must be a group dict(name=NAME, ...); found {group!r}.")
    hypers = {key: value for key, value in group.items() if key != "name"}
    fields = {"field": "data", "name_field": "data.name"}
    check_named(_SETS, group.get("name"), hypers, fixed=("data_seed",), **fields)
