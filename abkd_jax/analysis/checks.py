"""The refusals of logits that come from files: by their values, besides their type and shape."""

import jax.core
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax.checks import check_logits, check_rows, require


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
        AssertionError: if a type or a shape is another.
        ValueError: naming the array, for NaN or +inf, or probabilities.
    """
    logits = check_logits(student_logits, teacher_logits)
    _check_values("student_logits", student_logits)
    _check_values("teacher_logits", teacher_logits)
    return tuple(jnp.broadcast_arrays(*logits))


def check_values(logits: Array, name: str = "logits") -> Array:
    """`check_cached` for one array: refused by its name, or lifted from 16 bit to 32."""
    lifted = check_rows(logits, name)
    _check_values(name, logits)
    return lifted


def _check_values(name: str, logits: Array) -> None:
    """Minima and maxima make no copy of large arrays."""
    is_readable = not isinstance(logits, jax.core.Tracer) and logits.size > 0
    if not (is_readable and getattr(logits, "is_fully_addressable", True)):
        return
    logits = np.asarray(logits)
    low, high = np.min(logits), np.max(logits)
    if np.isnan(low) or high == np.inf:
        bad = np.any(np.isnan(logits) | (logits == np.inf), axis=-1)
        first = [int(i) for i in np.argwhere(bad)[0]]
        raise ValueError(
            f"{name} must be finite, or -inf for a class that is removed; found "
            f"{'NaN' if np.isnan(low) else '+inf'} in {np.sum(bad)} of {bad.size} rows, the first "
            f"at {first}: cache them again, or leave these rows out."
        )
    if low >= 0 and high <= 1 and logits.shape[-1] > 1 and np.any((logits > 0) & (logits < 1)):
        off = np.abs(np.sum(logits, axis=-1, dtype=np.float64) - 1)
        are_probabilities = np.all(off < (1e-3 if logits.dtype.itemsize > 2 else 2e-2))
        expected = "logits: pass the logarithm, jnp.log(probabilities)"
        found = "probabilities, all in [0, 1], each row of sum 1"
        require(not are_probabilities, name, expected, found)
