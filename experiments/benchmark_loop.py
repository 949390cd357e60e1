"""Throughput of the training loop against the bare jitted step, on CNNs and 28x28 images.

    python -m experiments.benchmark_loop

A round trains for the same number of steps twice, in one process: by a Python loop around nothing
but the jitted step (batch from the data on the device, then `train_step`), and by
`train_and_evaluate`, with its metrics, progress, checkpoints and evaluations (of 200 images, as an
evaluation is work of its own). Its time is the sum of its rows' `time/seconds`, without the first
row, which has the start. Images are random, of the shape and number of Fashion-MNIST's, which
changes nothing in the arithmetic.
"""

import copy
import functools
import pathlib
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from abkd_jax import data, schema, train
from abkd_jax.train import loop, writer

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds, each with a turn of both.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 400, "Steps in a turn.", lower_bound=200)
_LOG_EVERY = 50
_CONFIG = dict(
    mode="offline",
    data=dict(name="given"),
    teacher=dict(model="given"),
    student=dict(
        model="cnn",
        widths=(8, 16, 32),
        batch_norm=True,
        optimizer=dict(name="sgd", learning_rate=0.05, momentum=0.9),
        terms=dict(
            task=dict(fn="cross_entropy", weight=1.0),
            distill=dict(
                fn="on_logits",
                weight=1.0,
                temperature=2.0,
                divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3),
            ),
        ),
    ),
    batch_size=128,
    checkpoint_every=100,
    log_every=_LOG_EVERY,
    steps_per_call=1,
    devices=1,
    init_seed=0,
    data_seed=0,
)
_TEACHER = dict(model="cnn", widths=(32, 64, 128), batch_norm=True)


def main(argv: list[str]) -> None:
    """Prints images per second of both, and their ratio."""
    del argv
    logging.set_verbosity(logging.ERROR)
    config = _CONFIG | {"num_steps": _STEPS.value}
    dataset = _dataset()
    module = schema.module({"teacher": _TEACHER}, "teacher", num_classes=10)
    sample = dataset.test.inputs[:1] / 255.0
    teacher = module.apply, module.init(jax.random.key(1), sample, train=False)
    turns = {"bare step": _bare, "train_and_evaluate": _loop}
    rates = {name: [] for name in turns}
    for _ in range(_ROUNDS.value + 1):
        for name, turn in turns.items():
            rates[name].append(turn(copy.deepcopy(config), dataset, teacher))
    rates = {name: np.asarray(values[1:]) for name, values in rates.items()}  # the first compiles
    print(f"{jax.default_backend()}, {_STEPS.value} steps of {config['batch_size']} images a turn")
    print(f"median [quartiles] of {_ROUNDS.value} rounds")
    print(f"{'':20}{'images/s':>28}{'speed / bare step':>26}")
    for name, values in rates.items():
        cell = "{1:,.0f} [{0:,.0f}, {2:,.0f}]".format(*np.percentile(values, [25, 50, 75]))
        ratio = np.percentile(values / rates["bare step"], [25, 50, 75])
        print(f"{name:20}{cell:>28}{'{1:.3f} [{0:.3f}, {2:.3f}]'.format(*ratio):>26}")


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
    built = schema.network(config, "student", num_classes=10)
    sample = dataset.test.inputs[:1] / 255.0
    student = train.create(built.module, sample, init_seed=0, optimizer=built.optimizer)
    networks = {"student": jax.tree.map(jax.numpy.copy, student), "teacher": train.adopt(*teacher)}
    objectives = schema.objectives(config, learners=["student"], present=["student", "teacher"])
    size, steps = config["batch_size"], config["num_steps"]
    feed = data.Feed(dataset.train, data_seed=0, size=size)
    state, frozen = networks["student"], {"teacher": networks["teacher"]}
    for step in range(steps):
        if step == _LOG_EVERY:  # as many steps to warm up as the loop's first row has
            jax.block_until_ready(state)
            started = time.perf_counter()
        fed, _ = feed(step)
        state = _step(state, frozen, objectives, fed, dataset.preprocess, step, size=size)
    jax.block_until_ready(state)
    return (steps - _LOG_EVERY) * size / (time.perf_counter() - started)


@functools.partial(jax.jit, static_argnames="size", donate_argnames="state")
def _step(state, frozen, objectives, fed, preprocess, step, *, size):
    batch = fed.batch(0, step, size, preprocess)
    networks, _ = train.train_step({"student": state, **frozen}, batch, objectives)
    return networks["student"]


def _loop(config: dict, dataset: data.DataSet, teacher: tuple) -> float:
    """Images per second of a whole run's training, evaluations and checkpoints included."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train_and_evaluate(config, folder, networks={"teacher": teacher}, data=dataset)
        rows = writer.read(pathlib.Path(folder))
    seconds = sum(row["time/seconds"] for row in rows[1:])
    return (config["num_steps"] - _LOG_EVERY) * config["batch_size"] / seconds


if __name__ == "__main__":
    app.run(main)
