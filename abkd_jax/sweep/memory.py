"""How many members memory holds at once."""

import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from abkd_jax.run import workdir as folders

_SHARE = 0.5  # of what is free


def fitting(fn: Callable, *args: Any) -> int:
    """How many members memory holds, were nothing of a step's results ever freed.

    Args:
        fn: the step of one member.
        *args: of it.
    """
    size = _bytes_of(jax.make_jaxpr(fn)(*args).jaxpr) + 1
    return max(1, int(_SHARE * _free() / size))


def remembered(path: pathlib.Path, size: Callable[[], int]) -> int:
    """The size of a chunk, as it was when the sweep began.

    Raises:
        ValueError: if the file that says so is damaged.
    """
    if not path.exists():
        folders.write_json(path, size())
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if type(found) is not int or found < 1:
        raise ValueError(f"{path} must hold the size of a chunk, a positive integer; restore it.")
    return found


def _bytes_of(jaxpr: Any) -> int:
    """The size of all that a program computes."""
    total = 0
    for equation in jaxpr.eqns:
        parts = [p for value in equation.params.values() for p in _as_tuple(value)]
        inner = [getattr(p, "jaxpr", p) for p in parts]
        inner = [p for p in inner if hasattr(p, "eqns")]
        outputs = (v.aval for v in equation.outvars)
        total += sum(map(_bytes_of, inner)) if inner else sum(map(_size_of, outputs))
    return total


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _size_of(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)


def _free() -> float:
    """Bytes that are free, on all local devices together."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(found and "bytes_limit" in found for found in stats):
        return float(sum(found["bytes_limit"] - found["bytes_in_use"] for found in stats))
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf(free))
