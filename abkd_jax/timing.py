"""How long calls take: each has its turn in every round, so that all see the same machine."""

import timeit
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, *, repeats: int = 1, seconds: float = 0.0
) -> dict[str, np.ndarray]:
    """Times calls in rounds, after one to warm up and to compile.

    Args:
        calls: by name; a call has ended when the arrays that it returns are there.
        rounds: how many.
        repeats: of a call in its turn, at least.
        seconds: that a turn takes, about and at least: a short call is repeated more often, so that
            waking up the threads does not count.

    Returns:
        `[rounds]` by name: the seconds of one call.
    """
    found, counts = {name: [] for name in calls}, dict.fromkeys(calls, repeats)
    for _ in range(rounds + 1):
        for name, call in calls.items():
            timer = timeit.Timer(lambda call=call: jax.block_until_ready(call()))
            found[name].append(timer.timeit(counts[name]) / counts[name])
            counts[name] = max(repeats, round(seconds / min(found[name])))
    return {name: np.asarray(times[1:]) for name, times in found.items()}


def quartiles(values: np.ndarray, form: str) -> str:
    """The median and the quartiles as text, "1.02 [0.98, 1.11]", each number in the format."""
    low, median, high = (format(x, form) for x in np.percentile(values, [25, 50, 75]))
    return f"{median} [{low}, {high}]"
