"""Data sets as arrays on the device or as streams, and batches as functions of (seed, step)."""

from collections.abc import Mapping
from typing import Any

from abkd_jax.data.arrays import from_arrays
from abkd_jax.data.augment import Preprocess, augmented, normalized
from abkd_jax.data.digits import digits
from abkd_jax.data.images import check_name, images
from abkd_jax.data.sets import (
    DataSet,
    Feed,
    Resident,
    Split,
    batch_at,
    epoch_order,
    evaluation_batches,
    omit_classes,
)
from abkd_jax.data.stream import Stream, Streamed
from abkd_jax.types import bind, call_named, check_named

__all__ = [
    "DataSet",
    "Feed",
    "Preprocess",
    "Resident",
    "Split",
    "Stream",
    "Streamed",
    "augmented",
    "batch_at",
    "check",
    "digits",
    "epoch_order",
    "evaluation_batches",
    "from_arrays",
    "from_config",
    "images",
    "normalized",
    "omit_classes",
]

_SETS = {"digits": digits}
_FIELDS = {"field": "data", "name_field": "data.name"}


def from_config(group: Mapping[str, Any], *, data_seed: int) -> DataSet:
    """The set of a config's `data` group: its `name`, and the keywords for it.

    Args:
        group: an embedded set, dict(name="digits", validation=297, labelled=100), with the keywords
            of the function of that name; or a set of TFDS, dict(name="cifar100", validation=0),
            with those of `images`.
        data_seed: of the split.

    Returns:
        The set.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    check(group)
    hypers = {key: value for key, value in group.items() if key != "name"}
    if group["name"] in _SETS:
        return call_named(_SETS, group["name"], hypers, data_seed=data_seed, **_FIELDS)
    try:
        bound = bind(images, name=group["name"], data_seed=data_seed, **hypers)
    except TypeError as error:
        raise ValueError(str(error).replace("images.", "data.", 1)) from None
    return bound()


def check(group: Mapping[str, Any]) -> None:
    """Refuses a `data` group with an unknown name, or with unknown or missing keywords.

    Reads no data; looks no further than whether a folder of the set's name is there.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if not isinstance(group, Mapping):
        raise ValueError(f"data must be a group dict(name=NAME, ...); found {group!r}.")
    name = group.get("name")
    hypers = {key: value for key, value in group.items() if key != "name"}
    if isinstance(name, str) and name in _SETS:
        check_named(_SETS, name, hypers, fixed=("data_seed",), **_FIELDS)
    else:
        check_name(name, tuple(_SETS), group.get("data_dir", ""))
        check_named({"images": images}, "images", hypers, fixed=("name", "data_seed"), **_FIELDS)
