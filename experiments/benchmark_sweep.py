"""Speed of a sweep against one run after the other, at several numbers of members.

    python -m experiments.benchmark_sweep

A teacher 784-1024-1024-100 and students 784-64-64-100, batches of 128, each member with its own
alpha and beta. A turn is one step of all members. The arms, which alternate in one process:

    sweep              the sweep's program: students stacked, teacher's outputs computed once
    sweep, teacher     the same with the teacher's forward pass in each step, once for all members
    runs, teacher      one jitted step for each member, the teacher's forward pass in each
    runs, cached       one jitted step for each member, the teacher's outputs computed once

The cost of computing the outputs once, a pass over the data, is in none of them.
"""

import functools
import time

import jax
import numpy as np
from absl import app, flags
from jax import numpy as jnp

from abkd_jax import data, schema, train
from abkd_jax.train import parallel, sweep
from abkd_jax.types import Outputs

_MEMBERS = flags.DEFINE_list("members", ["1", "4", "16", "32"], "Numbers of members.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Rounds, each with a turn of every arm.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of a turn.", lower_bound=1)
_SIZE, _BATCH, _DIM, _CLASSES = 4096, 128, 784, 100


def main(argv: list[str]) -> None:
    """Prints a line for each number of members."""
    del argv
    split, cached, frozen = _setting()
    print(f"{jax.default_backend()}, float32; one step of all members, ms; median [quartiles] of ")
    print(f"{_ROUNDS.value} rounds of {_STEPS.value} steps; ratios are of times in the same round")
    columns = ("sweep", "sweep, teacher", "runs, teacher / sweep", "runs, cached / sweep")
    print(f"{'members':>8}" + "".join(f"{name:>26}" for name in columns))
    for count in map(int, _MEMBERS.value):
        seconds = _measure(count, split, cached, frozen)
        ratios = (seconds[name] / seconds["sweep"] for name in ("runs, teacher", "runs, cached"))
        times = (1e3 * seconds[name] for name in ("sweep", "sweep, teacher"))
        cells = (np.percentile(x, [50, 25, 75]) for x in (*times, *ratios))
        cells = ("{:.2f} [{:.2f}, {:.2f}]".format(*cell) for cell in cells)
        print(f"{count:>8}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


def _config() -> dict:
    divergence = dict(fn="alpha_beta", alpha=0.8, beta=0.3)
    distill = dict(fn="on_logits", weight=1.0, temperature=4.0, divergence=divergence)
    task = dict(fn="cross_entropy", weight=1.0)
    adam = dict(name="adam", learning_rate=1e-3)
    return dict(
        num_steps=1000,
        teacher=dict(model="mlp", widths=(1024, 1024), optimizer=adam),
        student=dict(
            model="mlp", widths=(64, 64), optimizer=adam, terms=dict(task=task, distill=distill)
        ),
    )


def _setting() -> tuple[data.Split, data.Split, dict[str, train.TrainState]]:
    """The examples, the same with the teacher's outputs, and the teacher."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(_SIZE, _DIM)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, _CLASSES, _SIZE), jnp.int32)
    split = data.Split(inputs=inputs, labels=labels, labelled=labels >= 0)
    built = schema.network(_config(), "teacher", num_classes=_CLASSES)
    state = train.create(built.module, inputs[:1], init_seed=1, optimizer=built.optimizer)
    frozen = {"teacher": train.frozen(state)}
    logits = frozen["teacher"].forward(state.params, inputs, train=False)[0].logits
    return split, split.replace(outputs={"teacher": Outputs(logits=logits)}), frozen


def _members(count: int, inputs: jax.Array) -> tuple[sweep.Member, dict]:
    """Stacked members with their objectives."""
    config, members = _config(), []
    built = schema.network(config, "student", num_classes=_CLASSES)
    for index in range(count):
        numbers = config["student"]["terms"]["distill"]["divergence"]
        numbers |= dict(alpha=0.2 + index / 40, beta=1.0 - index / 40)
        how = dict(learners=["student"], present=["student", "teacher"])
        objectives = schema.objectives(config, **how)
        student = train.create(built.module, inputs, init_seed=index, optimizer=built.optimizer)
        member = sweep.Member({"student": student}, jnp.asarray(-1), {})
        members.append((member, objectives))
    return jax.tree.map(lambda *x: jnp.stack(x), *members)


def _measure(count, split, cached, frozen) -> dict[str, np.ndarray]:
    """Seconds for one step of all members, in each round, by arm."""
    step = functools.partial(sweep.advanced, count=1, size=_BATCH, micro_batches=1)
    single = jax.jit(step)
    stacked = _members(count, split.inputs[:1])
    one = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
    feeds = {name: data.Feed(s, data_seed=0, size=_BATCH) for name, s in
             (("teacher", split), ("cached", cached))}  # fmt: skip

    def shared(name, n):
        return frozen, feeds[name](n)[0], data.Preprocess(), jnp.asarray(0), jnp.asarray(n)

    def together(name):
        members = stacked
        for n in range(_STEPS.value):
            members = (parallel.spread(step, members, *shared(name, n)), members[1])
        jax.block_until_ready(members)

    def in_turn(name):
        for member in one:
            for n in range(_STEPS.value):
                member = (single(member, *shared(name, n)), member[1])
            jax.block_until_ready(member)

    arms = {
        "sweep": functools.partial(together, "cached"),
        "sweep, teacher": functools.partial(together, "teacher"),
        "runs, teacher": functools.partial(in_turn, "teacher"),
        "runs, cached": functools.partial(in_turn, "cached"),
    }
    seconds = {name: [] for name in arms}
    for _ in range(_ROUNDS.value + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            seconds[name].append((time.perf_counter() - started) / _STEPS.value)
    return {name: np.asarray(times[1:]) for name, times in seconds.items()}  # the first compiles


if __name__ == "__main__":
    app.run(main)
