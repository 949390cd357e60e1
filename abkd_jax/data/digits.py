"""The digits of scikit-learn: 1,797 real 8x8 images of 10 classes, embedded in that package."""

import numpy as np
from jax import numpy as jnp
from sklearn import datasets

from abkd_jax.data.sets import DataSet, Split, withhold_labels

_TEST = 500


def digits(*, data_seed: int, validation: int, labelled: int = 0) -> DataSet:
    """A random split into 500 test images, `validation` validation images, and the rest to train.

    Args:
        data_seed: of the split.
        validation: how many of the 1,297 others to hold out.
        labelled: how many labels of the training images to keep, the same number of each class;
            0 keeps all.

    Returns:
        The set, inputs `[N, 8, 8, 1]` in [0, 1].

    Raises:
        ValueError: naming the field that is out of range.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998.
    """
    bunch = datasets.load_digits()
    inputs = (bunch.images[..., None] / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    if not 0 < validation < len(labels) - _TEST:
        raise ValueError(
            f"data.validation must lie between 1 and {len(labels) - _TEST - 1}; found {validation}."
        )
    order = np.random.default_rng(data_seed).permutation(len(labels))
    parts = np.split(order, [_TEST, _TEST + validation])
    test, held_out, train = (
        Split(
            inputs=jnp.asarray(inputs[part]),
            labels=jnp.asarray(labels[part]),
            labelled=jnp.ones(len(part), bool),
        )
        for part in parts
    )
    if labelled:
        train = withhold_labels(train, labelled, num_classes=10)
    return DataSet(train=train, validation=held_out, test=test, num_classes=10)
