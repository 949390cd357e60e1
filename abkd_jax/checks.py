"""The checks of what comes from a person: one clear sentence each.

A value that does not fit, or one that is missing, is a ValueError; an array of another type or
shape is an AssertionError.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jax import Array
from jax import numpy as jnp

_KINDS = {
    float: ("floating-point", jnp.floating),
    int: ("integers", jnp.integer),
    bool: ("bool", jnp.bool_),
}


def require(
    condition: Any, field: str, expected: str, found: Any, error: type[Exception] = ValueError
) -> None:
    """Refuses in one sentence what does not fit.

    Args:
        condition: whether it does.
        field: its name, as the person knows it.
        expected: what it must be, and what to do if that is not clear.
        found: what it is; of an array, its type and shape are told.
        error: of which type the refusal is.

    Raises:
        ValueError: if it does not: "FIELD must be EXPECTED; found FOUND."
    """
    if not condition:
        is_array = isinstance(found, Array | np.ndarray)
        what = (
            f"{found.dtype}{list(found.shape)}" if is_array else f"{found!r:.80}".replace("\n", " ")
        )
        raise error(f"{field} must be {expected}; found {what}.")


def check_array(field: str, x: Any, kind: type, shape: tuple[int | str, ...], meaning: str) -> None:
    """Refuses what is no array of this type and shape.

    Args:
        field: its name.
        x: the array.
        kind: float, int or bool.
        shape: the sizes of its axes; a letter, such as "K", is any size.
        meaning: what it holds, such as "one for each row of the logits".

    Raises:
        AssertionError: if its type or shape is another.
        ValueError: if it is no array.
    """
    word, dtype = _KINDS[kind]
    expected = f"{word} [{', '.join(map(str, shape))}], {meaning}"
    require(hasattr(x, "shape"), field, expected, x)
    fits = jnp.issubdtype(x.dtype, dtype) and len(x.shape) == len(shape)
    sizes = zip(x.shape, shape, strict=False)
    fits = fits and all(isinstance(size, str) or found == size for found, size in sizes)
    require(fits, field, expected, x, AssertionError)


def check_rows(x: Any, name: str = "logits", axis: str = "K") -> Array:
    """Refuses what is no floating-point array `[..., K]` with K >= 1, and lifts 16 bit to 32.

    Args:
        x: the array.
        name: its name.
        axis: what its last axis is called, in the message.

    Returns:
        The array, in float64 if it is, else in float32.

    Raises:
        AssertionError: if its type or shape is another.
        ValueError: if it is no array.
    """
    expected = f"a floating-point array [..., {axis}] with {axis} >= 1"
    require(hasattr(x, "shape"), name, expected, x)
    fits = jnp.issubdtype(x.dtype, jnp.floating) and x.shape and x.shape[-1] > 0
    require(fits, name, expected, x, AssertionError)
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def check_logits(student_logits: Any, teacher_logits: Any) -> tuple[Array, Array]:
    """Refuses what is no pair of logits over the same classes, and lifts 16 bit to 32.

    Args:
        student_logits: floating point, `[..., K]`, K >= 1.
        teacher_logits: floating point, `[..., K]`, leading axes that broadcast with the student's.

    Returns:
        The two arrays in one dtype: float64 if either is, else float32.

    Raises:
        AssertionError: if a type or a shape is another.
        ValueError: if one is no array.
    """
    student = check_rows(student_logits, "student_logits")
    teacher = check_rows(teacher_logits, "teacher_logits")
    shapes = student.shape, teacher.shape
    fit = student.shape[-1] == teacher.shape[-1] and broadcast_shape(*shapes) is not None
    expected = "of the same number of classes, their last axis, with leading axes that broadcast"
    found = list(map(list, shapes))
    require(fit, "student_logits and teacher_logits", expected, found, AssertionError)
    dtype = jnp.promote_types(jnp.result_type(student_logits, teacher_logits), jnp.float32)
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


def check_labels(labels: Any, leading: tuple[int, ...], of: str = "logits") -> None:
    """Refuses what is not one integer for each row of an array with these leading axes.

    Raises:
        AssertionError: if the type or the shape is another.
        ValueError: if it is no array.
    """
    check_array("labels", labels, int, leading, f"one for each row of the {of}")


def check_where(where: Any, leading: tuple[int, ...]) -> Array:
    """Refuses what is no mask of the rows of an array with these leading axes.

    Returns:
        The mask; True everywhere if it is None.

    Raises:
        AssertionError: if the type or the shape is another.
        ValueError: if it is no array.
    """
    if where is None:
        return jnp.ones(leading, bool)
    check_array("where", where, bool, leading, "one for each row of the logits")
    return jnp.asarray(where)


def labels_of(
    loss: str, batch: Mapping[str, Any], leading: tuple[int, ...], of: str = "logits"
) -> Array:
    """The labels of a batch, one integer for each row of an array with these leading axes.

    Raises:
        AssertionError: if their type or shape is another.
        ValueError: naming the loss that needs them, if there are none.
    """
    require("labels" in batch, "batch['labels']", f"given, as {loss} reads it", sorted(batch))
    check_labels(batch["labels"], leading, of)
    return batch["labels"]


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape to which all of these broadcast, or None."""
    try:
        return jnp.broadcast_shapes(*shapes)
    except ValueError:
        return None


def needed(module: str, *, extra: str = "language") -> ModuleType:
    """A module of one of the extras.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; pip install 'abkd_jax[{extra}]'."
        ) from error
