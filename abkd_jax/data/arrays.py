"""From arrays in memory to a set, and the checks that all sets share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax.data.augment import Preprocess
from abkd_jax.data.sets import DataSet, Split, omit_classes, withhold_labels

Examples = tuple[Any, Any]
"""inputs [N, ...] and labels [N], arrays of numpy or JAX"""


def from_arrays(
    *,
    train: Examples,
    validation: Examples | None,
    test: Examples,
    num_classes: int,
    labelled: int = 0,
    omit: Sequence[int] = (),
    pad: int = 0,
    flip: bool = False,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    class_names: Sequence[str] = (),
) -> DataSet:
    """A set of your own arrays.

    Args:
        train: inputs `[N, ...]`, uint8 (images as they are stored) or floating (taken as they are),
            and labels `[N]` in 0..K-1, or -1 where a label is not known.
        validation: likewise, every label known; None for no validation split.
        test: likewise, every label known.
        num_classes: K.
        labelled: how many labels of the training examples a student sees, the same number of each
            class, the first ones; 0 keeps all.
        omit: classes of which a student sees no example; labels kept of them go with them.
        pad: how many zero pixels a random crop may take on each side of an image; 0 for no crops.
        flip: whether training images are mirrored, left to right, with probability 1/2.
        mean: one number for each channel, of pixels in [0, 1]; () for no normalisation.
        std: likewise.
        class_names: K names, or none.

    Returns:
        The set; floating inputs are float32, labels int32.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"data.num_classes must be a positive integer; found {num_classes!r}.")
    parts = {"train": train, "validation": validation, "test": test}
    splits = {
        name: _split(name, part, num_classes)
        for name, part in parts.items()
        if part is not None or name != "validation"
    }
    teacher = splits["train"]
    shape = teacher.inputs.shape[1:]
    for name, split in splits.items():
        if split.inputs.dtype != teacher.inputs.dtype:
            raise ValueError(
                f"data.{name} must have inputs of data.train's type, {teacher.inputs.dtype} once "
                f"stored; found {split.inputs.dtype}: uint8 stands for pixels in 0..255, floats "
                "are taken as they are."
            )
        if name != "train" and not jnp.all(jnp.isfinite(split.inputs)):
            raise ValueError(f"data.{name} must have finite inputs; found NaN or infinity.")
        if split.inputs.shape[1:] != shape:
            raise ValueError(
                f"data.{name} must have examples of the shape of data.train's, {shape}; found "
                f"{split.inputs.shape[1:]}."
            )
    if class_names and len(class_names) != num_classes:
        raise ValueError(
            f"data.class_names must name each of the {num_classes} classes; found "
            f"{len(class_names)} names."
        )
    return DataSet(
        train=_for_student(teacher, labelled, omit, num_classes),
        validation=splits.get("validation"),
        test=splits["test"],
        teacher=teacher,
        preprocess=preprocessing(shape, pad=pad, flip=flip, mean=mean, std=std),
        num_classes=num_classes,
        class_names=tuple(class_names),
    )


def hold_out(order: np.ndarray, validation: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows of training examples in two.

    Args:
        order: `[N]`, the rows in random order.
        validation: how many to hold out, the first ones.

    Returns:
        The rows to train on, and those held out.

    Raises:
        ValueError: if there are not so many, or none is left to train on.
    """
    if not 0 <= validation < len(order):
        raise ValueError(
            f"data.validation must lie between 0 and {len(order) - 1}; found {validation}."
        )
    return order[validation:], order[:validation]


def preprocessing(
    shape: tuple[int, ...],
    *,
    pad: int,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> Preprocess:
    """A set's `Preprocess`, checked against the shape of an example.

    Raises:
        ValueError: naming the field that does not fit.
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if np.ndim(numbers) != 1 or np.asarray(numbers).dtype.kind not in "iuf":
            raise ValueError(f"data.{name} must be a list of numbers; found {numbers!r}.")
    if pad < 0:
        raise ValueError(f"data.pad must be at least 0; found {pad}.")
    if (pad or flip) and len(shape) != 3:
        raise ValueError(
            f"data.pad and data.flip need images (height, width, channels); found examples of "
            f"shape {shape}: leave them out."
        )
    if bool(len(mean)) != bool(len(std)):
        raise ValueError(
            f"data.mean and data.std must be given together, or neither; found mean={tuple(mean)} "
            f"and std={tuple(std)}."
        )
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) and len(numbers) != shape[-1]:
            raise ValueError(
                f"data.{name} must have a number for each of the {shape[-1]} channels; found "
                f"{tuple(numbers)}."
            )
    if not all(math.isfinite(number) for number in mean):
        raise ValueError(f"data.mean must be finite in each channel; found {tuple(mean)}.")
    if not all(0 < number < math.inf for number in std):
        raise ValueError(f"data.std must be positive in each channel; found {tuple(std)}.")
    if not len(mean):
        return Preprocess(pad=pad, flip=flip)
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return Preprocess(mean=mean, std=std, pad=pad, flip=flip)


def _split(name: str, examples: Examples, num_classes: int) -> Split:
    """The checked split of a pair of arrays."""
    if not isinstance(examples, tuple | list) or len(examples) != 2:
        raise ValueError(
            f"data.{name} must be a pair (inputs, labels); found {type(examples).__name__}."
        )
    inputs, labels = (_array(name, part) for part in examples)
    labels = np.asarray(labels)
    if inputs.ndim < 2 or inputs.size == 0:
        raise ValueError(
            f"data.{name} must have inputs [N, ...] of at least one example and two axes, none "
            f"empty; found the shape {inputs.shape}."
        )
    if labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"data.{name} must have one label for each of its {len(inputs)} inputs; found labels "
            f"of shape {labels.shape}."
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"data.{name} must have integer labels; found {labels.dtype}: convert them, such as by "
            "labels.astype(int)."
        )
    least = -1 if name == "train" else 0
    outside = labels[(labels < least) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(
            f"data.{name} must have labels in {least}..{num_classes - 1}; found {outside[0]}."
        )
    labels = jnp.asarray(labels, jnp.int32)
    return Split(inputs=_stored(name, inputs), labels=labels, labelled=labels >= 0)


def _array(name: str, values: Any) -> np.ndarray | Array:
    try:
        return values if isinstance(values, jax.Array) else np.asarray(values)
    except ValueError as error:
        raise ValueError(f"data.{name} must be two arrays; numpy says: {error}.") from None


def _stored(name: str, inputs: np.ndarray | Array) -> Array:
    """Inputs on the device, uint8 or float32."""
    if inputs.dtype == np.uint8:
        return jnp.asarray(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"data.{name} must have uint8 inputs, for pixels in 0..255, or floating ones; found "
            f"{inputs.dtype}: convert them to one of the two."
        )
    return jnp.asarray(inputs, jnp.float32)


def _for_student(split: Split, labelled: int, omit: Sequence[int], num_classes: int) -> Split:
    """The split with labels withheld and classes omitted."""
    if (
        np.ndim(omit) != 1
        or np.asarray(omit, int if not len(omit) else None).dtype.kind not in "iu"
    ):
        raise ValueError(f"data.omit must be a list of classes; found {omit!r}.")
    if isinstance(labelled, bool) or not isinstance(labelled, int):
        raise ValueError(f"data.labelled must be an integer; found {labelled!r}.")
    outside = [label for label in omit if not 0 <= label < num_classes]
    if outside:
        raise ValueError(
            f"data.omit must name classes in 0..{num_classes - 1}; found {tuple(omit)}."
        )
    if labelled:
        split = withhold_labels(split, labelled, num_classes)
    return omit_classes(split, omit) if len(omit) else split
