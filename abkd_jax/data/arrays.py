"""From arrays in memory to a set, with every check of them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.data.augment import Preprocess
from abkd_jax.data.options import Found, Options, data_set
from abkd_jax.data.sets import DataSet, Split, describe, stored_dtype

Examples = tuple[Any, Array] | tuple[Any, Array, Mapping[str, Array]]
"""inputs, a pytree of [N, ...]; labels [N, ...]; and maybe masks {name: [N, ...]}: numpy or JAX"""

_IGNORED = -100  # a label that torch's losses leave out, as they do by default
_TAKEN = ("inputs", "labels", "key", "outputs")  # by other entries of a batch


@data_set
def from_arrays(
    *,
    train: Examples,
    validation: Examples | None,
    test: Examples,
    num_classes: int,
    class_names: tuple[str, ...] = (),
    options: Options,
) -> Found:
    """A set of your own arrays.

    Args:
        train: inputs, a pytree of arrays `[N, ...]`: floating (taken as they are), uint8 (images
            as they are stored) or other integers (the ids of tokens, left alone); labels `[N, ...]`
            in 0..K-1, or -1 (or -100, as in torch) where a label is not known; and maybe masks
            {name: bool of the labels' shape}, such as "where", which is False for what does not
            count.
        validation: likewise, every label known where it counts; None for no validation split.
        test: likewise, every label known where it counts.
        num_classes: K.
        class_names: K names, or none.
        options: the keywords labelled, omit, imbalance, pad, flip, mean and std; see `Options`.

    Returns:
        The set; floating inputs are float32, integers but uint8 int32, labels int32.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    whole = type(num_classes) is int and num_classes > 0
    require(whole, "data.num_classes", "a positive integer", num_classes)
    names = not len(class_names) or len(class_names) == num_classes
    require(names, "data.class_names", f"{num_classes} names, or none", tuple(class_names))
    parts = {"train": train, "test": test}
    parts |= {} if validation is None else {"validation": validation}
    splits = {name: _split(name, examples, num_classes) for name, examples in parts.items()}
    full = splits["train"]
    for name, split in splits.items():
        expected = (
            f"like data.train, {_kinds(full)} once stored (uint8 stands for pixels in 0..255, "
            "floats are taken as they are)"
        )
        require(_kinds(split) == _kinds(full), f"data.{name}", expected, _kinds(split))
        floats = [x for x in jax.tree.leaves(split.inputs) if x.dtype == jnp.float32]
        finite = all(jnp.all(jnp.isfinite(x)) for x in floats)
        require(finite, f"data.{name}'s inputs", "finite", "NaN or infinity")
    dataset = DataSet(
        train=full,
        full=full,
        validation=splits.get("validation"),
        test=splits["test"],
        preprocess=Preprocess(),
        num_classes=num_classes,
        class_names=tuple(class_names),
    )
    description = describe(dataset)
    preprocess = options.preprocess(description)
    full = options.long_tailed(full, num_classes)
    shown = options.shown(full, num_classes)
    dataset = dataset.replace(preprocess=preprocess, train=shown, full=full)
    return description, lambda: dataset


def _split(name: str, examples: Examples, num_classes: int) -> Split:
    """The checked split of some examples."""
    field = f"data.{name}"
    several = isinstance(examples, tuple | list) and len(examples) in (2, 3)
    inputs, labels, masks = (*examples, {})[:3] if several else (None, None, None)
    expected = "(inputs, labels), or (inputs, labels, masks) with masks {name: bool [N, ...]}"
    require(isinstance(masks, Mapping), field, expected, type(examples).__name__)
    parts = [*jax.tree.leaves(inputs), labels, *masks.values()]
    other = next((type(x).__name__ for x in parts if not hasattr(x, "dtype")), None)
    require(other is None, field, "arrays, such as numpy.asarray makes of lists", other)
    rows, *sizes = labels.shape[:1], *(x.shape[:1] for x in jax.tree.leaves(inputs))
    fit = set(sizes) == {rows} != {()} and all(x.size for x in parts)
    expected = "inputs [N, ...] and labels [N, ...] of one N, none of them empty"
    require(fit, field, expected, jax.tree.map(np.shape, (inputs, labels)))
    whole = labels.dtype.kind in "iu"
    expected = "integers; convert them, such as by labels.astype(int)"
    require(whole, f"{field}'s labels", expected, labels.dtype.name)
    masks = _masks(field, masks, labels.shape)
    labels = np.asarray(labels).astype(np.int64)
    labels[labels == _IGNORED] = -1
    counts = name != "train" and masks.get("where", True)  # as a mask, or False for no row
    outside = labels[(labels < np.where(counts, 0, -1)) | (labels >= num_classes)]
    least = "-1" if name == "train" else "0"
    expected = f"in {least}..{num_classes - 1}" + (" where they count" if "where" in masks else "")
    require(not outside.size, f"{field}'s labels", expected, next(iter(outside.tolist()), None))
    labels = jnp.asarray(labels, jnp.int32)
    masks["labelled"] = (labels >= 0) & masks.get("labelled", True)
    return Split(jax.tree.map(lambda x: _stored(field, x), inputs), labels, masks)


def _masks(field: str, masks: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Array]:
    taken = [name for name in masks if name in _TAKEN]
    require(not taken, f"a mask of {field}", f"named other than {', '.join(_TAKEN)}", taken)
    for name, mask in masks.items():
        fits = mask.dtype == bool and mask.shape == shape
        found = f"{mask.dtype} {mask.shape}"
        require(fits, f"{field}'s mask {name!r}", f"bool of the labels' shape, {shape}", found)
    fits = np.any(masks.get("where", True))
    require(fits, f"{field}'s mask 'where'", "True where a row counts", "nothing but False")
    return {name: jnp.asarray(mask) for name, mask in masks.items()}


def _stored(field: str, x: np.ndarray | Array) -> Array:
    """An array of the inputs, on the device."""
    numbers = any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.integer, jnp.floating))
    expected = "floating, uint8 (pixels in 0..255) or other integers (ids)"
    require(numbers, f"{field}'s inputs", expected, x.dtype)
    return jnp.asarray(x, stored_dtype(x.dtype))


def _kinds(split: Split) -> Any:
    """The types and shapes of one example's arrays, as they are told to people."""
    kind = lambda x: f"{x.dtype} {x.shape[1:]}"  # noqa: E731
    return jax.tree.map(kind, {"inputs": split.inputs, "labels": split.labels})
