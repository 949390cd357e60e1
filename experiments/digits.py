"""A first distillation on real data: what a teacher's probabilities are worth without labels.

    python -m experiments.digits            # the table; the test set is evaluated once
    python -m experiments.digits --tune     # the validation grid from which the numbers were chosen

The seeds of a row are one program, by vmap, with one forward pass of the teacher for all. Forward
and reverse KL are the points (1, 0) and (0, 1) of the alpha-beta-divergence, so the rows differ in
numbers only and share one compilation.
"""

import copy
import functools
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax import Array
from jax import numpy as jnp

from abkd_jax import data, schema, train
from abkd_jax import flags as config_flags
from abkd_jax.metrics import summarize
from abkd_jax.types import Term

_DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "digits.py"
_CONFIG = config_flags.define_config(str(_DEFAULT))
_TUNE = flags.DEFINE_bool("tune", False, "Print the validation grid in place of the table.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)


def main(argv):
    """Trains the teacher, then the student of each row, and prints the scores as they come."""
    del argv
    started = time.monotonic()
    config = _CONFIG.value.to_dict()
    _check(config)
    dataset = data.from_config(config["data"], data_seed=config["data_seed"])
    evaluated = dataset.validation if _TUNE.value else dataset.test
    labelled = dataset.train.labelled_alone()

    name = "validation" if _TUNE.value else "test"
    print(f"{name} set, {len(evaluated)} images; mean +- standard deviation over init seeds")
    print(f"{'':42}{'accuracy %':>14}{'NLL':>16}{'ECE %':>14}{'seeds':>7}{'s':>5}")
    teachers = fit(config, "teacher", config["teacher"], dataset.train.with_all_labels(), 1)
    _print_row(f"teacher, {len(dataset.train)} labels", teachers, evaluated, started)
    teacher = {"teacher": train.frozen(jax.tree.map(lambda x: x[0], teachers))}

    alone, distilled = (_grid if _TUNE.value else _table)(config)
    for name, group in alone.items():
        students = fit(config, "student", group, labelled, _SEEDS.value)
        _print_row(f"student, {len(labelled)} labels alone{name}", students, evaluated, started)
    for name, group in distilled.items():
        students = fit(config, "student", group, dataset.train, _SEEDS.value, teacher)
        _print_row(f"student, {name}", students, evaluated, started)
    print(
        f"The teacher saw all {len(dataset.train)} training labels. The distilled students saw the "
        "same images and the\nteacher's probabilities for them, and no label. Numbers were chosen "
        f"on {len(dataset.validation)} validation images."
    )


def fit(
    config: Mapping[str, Any],
    learner: str,
    group: Mapping[str, Any],
    split: data.Split,
    num_seeds: int,
    teacher: Mapping[str, train.TrainState] | None = None,
) -> train.TrainState:
    """Trains `num_seeds` networks of a group on the split: their states, stacked."""
    teacher = teacher or {}
    config = {**config, learner: group}
    built = schema.network(config, learner, num_classes=10)
    terms = schema.objectives(config, learners=[learner], present=[learner, *teacher])[learner]
    new = functools.partial(
        train.create,
        built.module,
        split.inputs[:1],
        optimizer=built.optimizer,
        ema_decay=built.ema_decay,
    )
    seeds = config["init_seed"] + jnp.arange(num_seeds)
    states = jax.vmap(lambda seed: new(init_seed=seed))(seeds)
    return _train(
        states,
        teacher,
        terms,
        split,
        config["data_seed"],
        learner=learner,
        num_steps=config["num_steps"],
        size=min(config["batch_size"], len(split)),
        micro_batches=config.get("micro_batches", 1),
    )


@functools.partial(jax.jit, static_argnames=("learner", "num_steps", "size", "micro_batches"))
def _train(
    states: train.TrainState,
    teacher: Mapping[str, train.TrainState],
    terms: Mapping[str, Term],
    split: data.Split,
    data_seed: Array,
    *,
    learner: str,
    num_steps: int,
    size: int,
    micro_batches: int,
) -> train.TrainState:
    def step(states, index):
        order = data.epoch_order(data_seed, index // (len(split) // size), len(split))
        batch = data.batch_at(split, order, data_seed, index, size)

        def member(state):
            networks = {learner: state, **teacher}
            networks, _ = train.train_step(
                networks, batch, {learner: terms}, micro_batches=micro_batches
            )
            return networks[learner]

        return jax.vmap(member)(states), None

    return jax.lax.scan(step, states, jnp.arange(num_steps))[0]


def _print_row(name: str, states: train.TrainState, split: data.Split, started: float) -> None:
    """Evaluates the stacked states on the whole split, and prints mean and deviation."""
    (batch,) = data.evaluation_batches(split, len(split))
    sums, _ = jax.vmap(lambda state: train.eval_step({"it": state}, batch))(states)
    scores = jax.vmap(summarize)(sums["it"])
    columns = (("accuracy", 100, 1, 14), ("nll", 1, 3, 16), ("ece", 100, 1, 14))
    cells = ""
    for metric, factor, digits, width in columns:
        values = factor * np.asarray(scores[metric], float)
        spread = f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells += f"{f'{values.mean():.{digits}f}{spread}':>{width}}"
    print(f"{name:42}{cells}{len(states.step):>7}{time.monotonic() - started:>5.0f}", flush=True)


def _table(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows {name: group}: students on their labels alone, and distilled ones."""
    divergence = dict(config["student"]["terms"]["distill"]["divergence"])
    name = " ".join([divergence.pop("fn"), *(f"{key} {n}" for key, n in divergence.items())])
    return {"": _alone(config, 1e-3)}, {  # this rate and the temperatures: by validation NLL
        name: config["student"],
        "forward KL (alpha 1, beta 0)": _distilled(config, 1.0, alpha=1.0, beta=0.0),
        "reverse KL (alpha 0, beta 1)": _distilled(config, 2.0, alpha=0.0, beta=1.0),
    }


def _grid(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows {name: group} of the grid."""
    alone = {f", rate {rate}": _alone(config, rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)}
    pairs = [(a, b) for a in (0.4, 0.6, 0.8, 1.0) for b in (0.1, 0.3, 0.5)]
    return alone, {
        f"T {temperature}, alpha {a}, beta {b}": _distilled(config, temperature, alpha=a, beta=b)
        for temperature in (1.0, 2.0, 4.0)
        for a, b in [(1.0, 0.0), (0.0, 1.0), *pairs]
    }


def _alone(config: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    """The student's group with the teacher's terms, which are those of the labels."""
    group = copy.deepcopy(config["student"]) | {"terms": config["teacher"]["terms"]}
    group["optimizer"]["learning_rate"] = learning_rate
    return group


def _distilled(config: Mapping[str, Any], temperature: float, **numbers: float) -> dict[str, Any]:
    """The student's group with another point of the alpha-beta-divergence."""
    group = copy.deepcopy(config["student"])
    group["terms"]["distill"]["divergence"] = {"fn": "alpha_beta", **numbers}
    group["terms"]["distill"]["temperature"] = temperature
    return group


def _check(config: Mapping[str, Any]) -> None:
    """Leaves with one sentence if this script cannot do what the config says."""
    try:
        schema.check(config)
    except ValueError as error:
        sys.exit(f"{error}")
    if config["mode"] != "offline" or config["teacher"].get("checkpoint"):
        sys.exit(
            "experiments.digits trains its own teacher: mode must be 'offline', no checkpoint."
        )


if __name__ == "__main__":
    parse = functools.partial(config_flags.parse, known=("config", "tune", "seeds"))
    app.run(main, flags_parser=parse)
