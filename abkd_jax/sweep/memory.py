"""How many members memory holds at once."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from abkd_jax import parallel
from abkd_jax.run import workdir as folders

_SHARE = 0.5  # of what is free


def fitting(fn: Callable, *args: Any, **keywords: Any) -> int:
    """How many members memory holds, were nothing of a step's results ever freed.

    Args:
        fn: the step of one member.
        *args: of it.
        **keywords: of it.
    """
    size = _bytes_of(jax.make_jaxpr(fn)(*args, **keywords).jaxpr) + 1
    return max(1, int(_SHARE * parallel.free_memory() / size))


def remembered(path: pathlib.Path, size: Callable[[], int]) -> int:
    """The size of a chunk, as it was when the sweep began.

    Raises:
        ValueError: if the file that says so is damaged.
    """
    if not path.exists():
        folders.write_json(path, size())
    found = path.read_bytes().decode(errors="replace").strip()
    if not found.isdecimal() or int(found) < 1:
        raise ValueError(f"{path} must hold the size of a chunk, a positive integer; restore it.")
    return int(found)


def _bytes_of(jaxpr: Any) -> int:
    """The size of all that a program computes."""
    total = 0
    for equation in jaxpr.eqns:
        parts = [getattr(part, "jaxpr", part) for part in jax.tree.leaves(equation.params)]
        inner = [part for part in parts if hasattr(part, "eqns")]
        outputs = [v.aval for v in equation.outvars]
        sizes = (math.prod(x.shape) * getattr(x.dtype, "itemsize", 8) for x in outputs)
        total += sum(map(_bytes_of, inner)) if inner else sum(sizes)
    return total
