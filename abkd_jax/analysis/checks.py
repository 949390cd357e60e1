"""Refusals for what comes from a user: logits from files, masks, arrays of the wrong shape."""

import jax
import jax.core
import numpy as np
from jax import Array
from jax import numpy as jnp


def check_cached(student_logits: Array, teacher_logits: Array) -> tuple[Array, Array]:
    """Refuses what is not a pair of logit arrays over the same classes, values included.

    The values are read where they are there to be read: not inside jit, nor where they lie on the
    devices of other hosts.

    Args:
        student_logits: floating point, `[..., K]`; -inf where a class has been removed.
        teacher_logits: floating point, `[..., K]`, leading axes that broadcast with the student's.

    Returns:
        The two arrays with the same shape, in one dtype: float64 if either is, else float32.

    Raises:
        ValueError: naming the array, what was found and what was expected: another type or number
            of classes, NaN or +inf, probabilities.
    """
    student = check_logits("student_logits", student_logits)
    teacher = check_logits("teacher_logits", teacher_logits)
    found = (
        f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)} must have"
    )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"{found} the same number of classes in their last axis.")
    try:
        shape = jnp.broadcast_shapes(student.shape, teacher.shape)
    except ValueError:
        raise ValueError(f"{found} leading axes that broadcast.") from None
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    return tuple(jnp.broadcast_to(x.astype(dtype), shape) for x in (student, teacher))


def check_logits(name: str, logits: Array) -> Array:
    """`check_cached` for one array: refused by its name, or lifted from 16 bit to 32."""
    found = what_is(logits)
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point array [..., K]; found {found}.")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class in its last axis; found {found}.")
    if _is_readable(logits):
        _check_values(name, np.asarray(logits))
    return jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32))


def check_where(where: Array | None, leading: tuple[int, ...]) -> None:
    """Refuses a mask that is neither None nor bool of exactly this shape."""
    if where is None:
        return
    if getattr(where, "dtype", None) != np.bool_ or where.shape != leading:
        raise ValueError(
            f"where must be a bool array {list(leading)}, one value for each row of the logits; "
            f"found {what_is(where)}."
        )


def check_shape(name: str, x: Array, student_logits: Array) -> None:
    """Refuses by its name what must have the shape of student_logits and has not."""
    if getattr(x, "shape", None) != student_logits.shape:
        raise ValueError(
            f"{name} must be an array of the shape {list(student_logits.shape)} of student_logits; "
            f"found {what_is(x)}."
        )


def what_is(x: object) -> str:
    """The dtype and shape of an array, or the type of what is none: the end of a refusal."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__


def _is_readable(x: Array) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return getattr(x, "is_fully_addressable", True) and x.size > 0


def _check_values(name: str, logits: np.ndarray) -> None:
    """The refusals that need the values. Minima and maxima make no copy of large arrays."""
    low, high = np.min(logits), np.max(logits)
    if np.isnan(low) or high == np.inf:
        what = "NaN" if np.isnan(low) else "+inf"
        bad = np.any(np.isnan(logits) | (logits == np.inf), axis=-1)
        first = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"{name} must be finite, or -inf for a class that is removed; found {what} in "
            f"{np.sum(bad)} of {bad.size} rows, the first at {first}: cache them again, or leave "
            "these rows out."
        )
    if low >= 0 and high <= 1 and logits.shape[-1] > 1 and np.any((logits > 0) & (logits < 1)):
        sums = np.sum(logits, axis=-1, dtype=np.float64)
        if np.all(np.abs(sums - 1) < (1e-3 if logits.dtype.itemsize > 2 else 2e-2)):
            raise ValueError(
                f"{name} must be logits; found probabilities (all in [0, 1], each row of sum 1): "
                "pass their logarithm, jnp.log(probabilities)."
            )
