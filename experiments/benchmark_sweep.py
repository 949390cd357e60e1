"""Speed of a sweep against one run after the other, at several numbers of members.

    python -m experiments.benchmark_sweep

A teacher 784-1024-1024-100 and students 784-64-64-100, batches of 128, each member with its own
alpha. A turn is some steps of all members. The arms, which alternate in one process:

    sweep              the sweep's program: students stacked, teacher's outputs computed once
    sweep, teacher     the same with the teacher's forward pass in each step, once for all members
    runs, teacher      one program for each member in turn, the teacher's forward pass in each step
    runs, cached       one program for each member in turn, the teacher's outputs computed once

The cost of computing the outputs once, a pass over the data, is in none of them.
"""

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from abkd_jax import data, models, timing
from abkd_jax.config import command
from abkd_jax.sweep import Program, opened
from abkd_jax.train import Programs, run_steps

_MEMBERS = flags.DEFINE_list("members", ["1", "4", "16", "32"], "Numbers of members.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds, each with a turn of every arm.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of a turn.", lower_bound=1)
_SIZE, _BATCH, _DIM, _CLASSES = 4096, 128, 784, 100
_TASK = dict(fn="cross_entropy", weight=1.0)
_DISTILL = dict(fn="on_logits", weight=1.0, temperature=4.0)
_DIVERGENCE = dict(fn="alpha_beta", alpha=0.8, beta=0.3)
_CONFIG = dict(
    teacher=dict(model=dict(fn="given")),
    student=dict(
        model=dict(fn="mlp", widths=(64, 64)),
        optimizer=dict(fn="adam", learning_rate=1e-3),
        terms=dict(task=_TASK, distill=_DISTILL | dict(divergence=_DIVERGENCE)),
    ),
    phases=dict(distill=dict(learn=("student",), see=("teacher",))),
    batch_size=_BATCH,
)


def main() -> None:
    """Prints a line for each number of members."""
    print(f"{jax.default_backend()}, float32; one step of all members, ms; median [quartiles] of ")
    print(f"{_ROUNDS.value} rounds of {_STEPS.value} steps; ratios are of times in the same round")
    columns = ("sweep", "sweep, teacher", "runs, teacher / sweep", "runs, cached / sweep")
    print(f"{'members':>8}" + "".join(f"{name:>26}" for name in columns))
    rng, counts = np.random.default_rng(0), list(map(int, _MEMBERS.value))
    examples = rng.normal(size=(_SIZE, _DIM)).astype(np.float32), rng.integers(0, _CLASSES, _SIZE)
    split = dict.fromkeys(("train", "validation", "test"), examples)
    dataset = data.from_arrays(**split, num_classes=_CLASSES)
    module = models.mlp(num_classes=_CLASSES, widths=(1024, 1024))
    teacher = module.apply, module.init(jax.random.key(1), examples[0][:1], train=False)
    given = {"networks": {"teacher": teacher}, "data": dataset}
    alphas = np.linspace(0.2, 1.2, max(counts))
    over = {"student.terms.distill.divergence.alpha": alphas}
    with tempfile.TemporaryDirectory() as folder, opened(_CONFIG, folder, over=over, **given) as it:
        for count in counts:
            seconds = timing.in_turn(_arms(it, count), _ROUNDS.value)
            of_step, own = 1e3 / _STEPS.value, seconds["sweep"]
            times = [of_step * own, of_step * seconds["sweep, teacher"]]
            ratios = [seconds["runs, teacher"] / own, seconds["runs, cached"] / own]
            cells = "".join(f"{timing.quartiles(x, '.2f'):>26}" for x in times + ratios)
            print(f"{count:>8}{cells}", flush=True)


def _arms(program: Program, count: int) -> dict[str, Callable[[], Any]]:
    """By name, a call that trains so many members further."""
    dataset = program.run.data
    plain = data.Feed(dataset.train, dataset.preprocess, data_seed=0, size=_BATCH)
    feeds = {"teacher": plain, "cached": program.feed}
    stacked = program.stacked(range(count))
    members = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
    alone = Programs(program.programs.source, program.programs.static)

    def trained(programs, carry, objectives, feed):
        args = programs, carry, program.frozen, objectives, feeds[feed]
        return run_steps(*args, data_seed=0, end=_STEPS.value)

    def together(feed):
        return trained(program.programs, *stacked, feed)

    def in_turn(feed):
        for i, (carry, objectives) in enumerate(members):  # whose buffers are taken
            members[i] = trained(alone, carry, objectives, feed), objectives
        return members

    return {
        "sweep": functools.partial(together, "cached"),
        "sweep, teacher": functools.partial(together, "teacher"),
        "runs, teacher": functools.partial(in_turn, "teacher"),
        "runs, cached": functools.partial(in_turn, "cached"),
    }


if __name__ == "__main__":
    command.run(main)
