"""The digits of scikit-learn: 1,797 real 8x8 images of 10 classes, embedded in that package."""

import importlib.util
import pathlib

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.data.arrays import from_arrays
from abkd_jax.data.options import Found, Options, check_held_out, data_set
from abkd_jax.data.sets import DataSet, Description

_TEST, _OTHERS = 500, 1297
_NAMES = tuple("0123456789")


@data_set
def digits(
    *, data_seed: int, validation: int, shape: tuple[int, ...] = (), options: Options
) -> Found:
    """A random split into 500 test images, `validation` validation images, and the rest to train.

    Args:
        data_seed: of the split.
        validation: how many of the 1,297 others to hold out; 0 for no validation split.
        shape: (height, width, channels) to resize the images to, with the ink repeated in each
            channel, so that the digits can stand in for another set; () leaves them at (8, 8, 1).
        options: the keywords labelled, omit, imbalance, pad, flip, mean and std; see `Options`.

    Returns:
        The set, inputs `[N, 8, 8, 1]`, or `[N, *shape]`, in [0, 1].

    Raises:
        ValueError: naming the field that is out of range.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998.
    """
    check_held_out(validation, _OTHERS)
    fits = len(shape) in (0, 3) and all(side > 0 for side in shape)
    expected = "(height, width, channels), three positive integers, or ()"
    require(fits, "data.shape", expected, shape)
    inputs = jax.ShapeDtypeStruct(tuple(shape) or (8, 8, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((), jnp.int32)
    description = Description(len(_NAMES), _NAMES, inputs, labels)
    options.preprocess(description)
    return description, lambda: _read(data_seed, validation, shape, options)


def _file() -> pathlib.Path:
    """What `sklearn.datasets.load_digits` reads, without two seconds of imports."""
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    return pathlib.Path(package) / "datasets" / "data" / "digits.csv.gz"


def _read(data_seed: int, validation: int, shape: tuple[int, ...], options: Options) -> DataSet:
    table = np.loadtxt(_file(), delimiter=",")  # 64 pixels from 0 to 16, and the label
    inputs = (table[:, :-1].reshape(-1, 8, 8, 1) / 16.0).astype(np.float32)
    labels = table[:, -1].astype(np.int32)
    order = np.random.default_rng(data_seed).permutation(len(labels))
    test, held_out, train = np.split(order, [_TEST, _TEST + validation])
    if shape:
        size = len(inputs), *shape[:2], 1
        resized = jax.image.resize(jnp.asarray(inputs), size, "bilinear")
        inputs = np.repeat(np.asarray(resized), shape[2], axis=-1)
    return from_arrays(
        train=(inputs[train], labels[train]),
        validation=(inputs[held_out], labels[held_out]) if validation else None,
        test=(inputs[test], labels[test]),
        num_classes=len(_NAMES),
        class_names=_NAMES,
        **vars(options),
    )
