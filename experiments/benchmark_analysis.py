"""Seconds, compilations and peak memory of the gradient analysis over a grid of (alpha, beta).

    python -m experiments.benchmark_analysis

Each of the three streamed summaries sees all rows at all points of the grid, twice: the second time
on another grid of the same size, which must not compile again. The peak is that of the whole
process, the logits included.
"""

import resource
import sys
import time

import jax
import numpy as np
from absl import flags
from jax import monitoring
from jax import numpy as jnp

from abkd_jax import Bound, alpha_beta, analysis, bind
from abkd_jax.config import command

_ROWS = flags.DEFINE_integer("rows", 10_000, "Samples.", lower_bound=1)
_CLASSES = flags.DEFINE_integer("classes", 1000, "K.", lower_bound=2)
_POINTS = flags.DEFINE_integer("points", 5, "Values of alpha, and of beta.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 16, "Rows at a time.", lower_bound=1)
_COMPILED = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    """Prints a line for each summary."""
    compiled = []
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event == _COMPILED else None
    )
    rng = np.random.default_rng(0)
    shape = (_ROWS.value, _CLASSES.value)
    student, teacher = (jnp.asarray(3 * rng.standard_normal(shape, np.float32)) for _ in range(2))
    points = _POINTS.value**2
    print(f"{shape[0]} x {shape[1]}, {points} (alpha, beta), float32, {jax.default_backend()}")
    print(f"{'':24}{'first s':>10}{'again s':>10}{'compiles':>10}{'peak MB':>10}")
    for name in _summaries(0.0):
        fns = [_summaries(shift)[name] for shift in (0.0, 0.05)]
        seconds, before = [], len(compiled)
        for fn in fns:
            start = time.perf_counter()
            jax.block_until_ready(analysis.over_grid(fn, student, teacher, chunk=_CHUNK.value))
            seconds.append(time.perf_counter() - start)
        count = len(compiled) - before
        print(f"{name:24}{seconds[0]:>10.1f}{seconds[1]:>10.1f}{count:>10}{_peak():>10.0f}")


def _summaries(shift: float) -> dict[str, Bound]:
    """By name, each summary with a grid of numbers."""
    axis = np.linspace(0.0, 1.2, _POINTS.value) + shift
    alpha, beta = (x.ravel() for x in np.meshgrid(axis, axis))
    divergence = bind(alpha_beta, alpha=alpha, beta=beta)
    reassignment = bind(analysis.reassignment_summary, divergence=divergence, learning_rate=0.1)
    return {
        "reassignment_summary": reassignment,
        "bound_summary": bind(analysis.bound_summary, alpha=alpha, beta=beta, learning_rate=0.1),
        "gradient_summary": bind(analysis.gradient_summary, divergence=divergence),
    }


def _peak() -> float:
    """The most memory that the process has had, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    command.run(main)
