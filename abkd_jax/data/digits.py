"""The digits of scikit-learn: 1,797 real 8x8 images of 10 classes, embedded in that package."""

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax.data.arrays import from_arrays, hold_out
from abkd_jax.data.sets import DataSet

_TEST = 500


def digits(
    *,
    data_seed: int,
    validation: int,
    labelled: int = 0,
    omit: tuple[int, ...] = (),
    pad: int = 0,
    flip: bool = False,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    shape: tuple[int, ...] = (),
) -> DataSet:
    """A random split into 500 test images, `validation` validation images, and the rest to train.

    Args:
        data_seed: of the split.
        validation: how many of the 1,297 others to hold out; 0 for no validation split.
        labelled: how many labels of the training images to keep, the same number of each class;
            0 keeps all.
        omit: classes of which a student sees no image.
        pad: of random crops, in pixels; 0 for none.
        flip: whether training images are mirrored with probability 1/2.
        mean: one number for each channel; () for no normalisation.
        std: likewise.
        shape: (height, width, channels) to resize the images to, with the ink repeated in each
            channel, so that the digits can stand in for another set; () leaves them at (8, 8, 1).

    Returns:
        The set, inputs `[N, 8, 8, 1]`, or `[N, *shape]`, in [0, 1].

    Raises:
        ValueError: naming the field that is out of range.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998.
    """
    from sklearn import datasets  # two seconds, which `import abkd_jax` saves

    bunch = datasets.load_digits()
    inputs = (bunch.images[..., None] / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(data_seed).permutation(len(labels))
    test, rest = order[:_TEST], order[_TEST:]
    train, held_out = hold_out(rest, validation)
    if shape:
        inputs = _resized(inputs, shape)
    return from_arrays(
        train=(inputs[train], labels[train]),
        validation=(inputs[held_out], labels[held_out]) if validation else None,
        test=(inputs[test], labels[test]),
        num_classes=10,
        labelled=labelled,
        omit=omit,
        pad=pad,
        flip=flip,
        mean=mean,
        std=std,
        class_names=tuple("0123456789"),
    )


def _resized(inputs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The images `[N, 8, 8, 1]` as `[N, *shape]`, bilinearly."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"data.shape must be (height, width, channels), three positive integers; found {shape}."
        )
    resized = jax.image.resize(jnp.asarray(inputs), (len(inputs), *shape[:2], 1), "bilinear")
    return np.repeat(np.asarray(resized), shape[2], axis=-1)
