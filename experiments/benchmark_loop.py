"""Throughput of the training loop against the bare jitted step, on CNNs and 28x28 images.

    python -m experiments.benchmark_loop
    python -m experiments.benchmark_loop --other=../another_worktree

A round trains for the same number of steps twice, in one process: by a Python loop around nothing
but the jitted step (batch from the data on the device, then `train_step`), and by
`train_and_evaluate`, with its metrics, progress, checkpoints and evaluations (of 200 images, as an
evaluation is work of its own). Its time is the sum of its rows' `time/seconds`, without the first
row, which has the start. Images are random, of the shape and number of Fashion-MNIST's, which
changes nothing in the arithmetic.

With `--other` a round is this script, with two rounds of its own, in a process here and then in one
there: each tree runs its own version on the same task, and prints the medians that are compared.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from abkd_jax import config as configs
from abkd_jax import data, models, timing, train, train_and_evaluate
from abkd_jax.config import command
from abkd_jax.run.log import writer

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds, each with a turn of both.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 400, "Steps in a turn.", lower_bound=200, upper_bound=429)
_OTHER = flags.DEFINE_string("other", None, "Another worktree of the project, to compare with.")
_ROOT = pathlib.Path(__file__).parents[1]
_TURNS = ("bare step", "train_and_evaluate")
_LOG_EVERY = 50
_TASK = dict(fn="cross_entropy", weight=1.0)
_DISTILL = dict(fn="on_logits", weight=1.0, temperature=2.0)
_DIVERGENCE = dict(fn="alpha_beta", alpha=0.8, beta=0.3)
_CONFIG = dict(
    teacher=dict(model=dict(fn="given")),
    student=dict(
        model=dict(fn="cnn", widths=(8, 16, 32), batch_norm=True),
        optimizer=dict(fn="sgd", learning_rate=0.05, momentum=0.9),
        terms=dict(task=_TASK, distill=_DISTILL | dict(divergence=_DIVERGENCE)),
    ),
    phases=dict(distill=dict(learn=("student",), see=("teacher",))),
    checkpoint_every=100,
    log_every=_LOG_EVERY,
    steps_per_call=1,
    devices=1,
)


def main() -> None:
    """Prints images per second of both, and their ratio; or those of two trees."""
    if _OTHER.value:
        return _compare_trees([_ROOT, pathlib.Path(_OTHER.value).resolve()])
    config, dataset = configs.defaults().to_dict() | _CONFIG, _dataset()
    config["num_steps"] = _STEPS.value
    module = models.cnn(num_classes=10, widths=(32, 64, 128), batch_norm=True)
    sample = dataset.test.inputs[:1] / 255.0
    teacher = module.apply, module.init(jax.random.key(1), sample, train=False)
    rates = [
        [turn(config, dataset, teacher) for turn in (_bare, _loop)]
        for _ in range(_ROUNDS.value + 1)
    ][1:]  # the first compiles
    print(f"{jax.default_backend()}, {_STEPS.value} steps of {config['batch_size']} images a turn")
    print(f"median [quartiles] of {_ROUNDS.value} rounds")
    print(f"{'':20}{'images/s':>28}{'speed / bare step':>26}")
    bare = np.asarray(rates)[:, 0]
    for name, values in zip(_TURNS, np.transpose(rates), strict=True):
        speed, ratio = timing.quartiles(values, ",.0f"), timing.quartiles(values / bare, ".3f")
        print(f"{name:20}{speed:>28}{ratio:>26}")


def _compare_trees(trees: list[pathlib.Path]) -> None:
    """Prints images per second of two trees, and their ratio."""
    rounds = [[_measured(tree) for tree in trees] for _ in range(_ROUNDS.value)]
    print(f"here {trees[0]}, there {trees[1]}; {_STEPS.value} steps a turn; images/s")
    print(f"median [quartiles] of {_ROUNDS.value} rounds, each of one process here and one there")
    print(f"{'':20}{'here':>28}{'there':>28}{'here / there':>26}")
    for name, values in zip(_TURNS, np.transpose(rounds), strict=True):  # [trees, rounds] each
        cells = "".join(f"{timing.quartiles(x, ',.0f'):>28}" for x in values)
        print(f"{name:20}{cells}{timing.quartiles(values[0] / values[1], '.3f'):>26}")


def _measured(tree: pathlib.Path) -> list[float]:
    """The medians that a tree's own version of this script prints, by turn."""
    argv = [sys.executable, "-m", "experiments.benchmark_loop"]
    argv += ["--rounds=2", f"--steps={_STEPS.value}"]
    there = {"cwd": tree, "env": os.environ | {"PYTHONPATH": f"{tree}"}}
    done = subprocess.run(argv, **there, stdout=subprocess.PIPE, text=True, check=False)
    found = [re.search(rf"^{name} +([\d,]+) \[.*", done.stdout, re.MULTILINE) for name in _TURNS]
    if None in found:
        raise ValueError(f"{tree} does not print a table of benchmark_loop; see above.")
    print(f"{tree}: {', '.join(row[0] for row in found)}", file=sys.stderr, flush=True)
    return [float(row[1].replace(",", "")) for row in found]


def _dataset() -> data.DataSet:
    rng = np.random.default_rng(0)

    def split(size):
        images = rng.integers(0, 256, (size, 28, 28, 1), np.uint8)
        return images, rng.integers(0, 10, size)

    return data.from_arrays(
        train=split(55_000), validation=split(200), test=split(200), num_classes=10
    )


def _bare(config: dict, dataset: data.DataSet, teacher: tuple) -> float:
    """Images per second of the jitted step alone."""
    plan = configs.resolve(config, networks={"teacher": teacher}, data=dataset)
    phase, sample = plan.phases[-1], dataset.test.inputs[:1] / 255.0
    optimizer = phase.learners["student"].optimizer
    module = plan.networks["student"].module
    state = train.create(module, sample, init_seed=0, optimizer=optimizer)
    frozen = {"teacher": train.adopt(*teacher)}
    size, steps = config["batch_size"], config["num_steps"]
    feed = data.Feed(dataset.train, dataset.preprocess, data_seed=0, size=size)
    for step in range(steps):
        if step == _LOG_EVERY:  # as many steps to warm up as the loop's first row has
            jax.block_until_ready(state)
            started = time.perf_counter()
        examples, _ = feed(step)
        state = _step(state, frozen, phase.objectives, examples, step)
    jax.block_until_ready(state)
    return (steps - _LOG_EVERY) * size / (time.perf_counter() - started)


@functools.partial(jax.jit, donate_argnames="state")
def _step(state, frozen, objectives, examples, step):
    batch = examples.batch(0, step)
    networks, _ = train.train_step({"student": state, **frozen}, batch, objectives)
    return networks["student"]


def _loop(config: dict, dataset: data.DataSet, teacher: tuple) -> float:
    """Images per second of a whole run's training, evaluations and checkpoints included."""
    with tempfile.TemporaryDirectory() as folder:
        train_and_evaluate(config, folder, networks={"teacher": teacher}, data=dataset)
        rows = writer.read(pathlib.Path(folder))
    seconds = sum(row["time/seconds"] for row in rows[1:])
    return (config["num_steps"] - _LOG_EVERY) * config["batch_size"] / seconds


if __name__ == "__main__":
    command.run(main)
