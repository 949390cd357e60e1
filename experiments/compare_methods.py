"""All published methods on one config: accuracy, calibration and agreement with the teacher.

    python -m experiments.compare_methods --config=configs/digits.py --workdir=runs/compare_digits
    python -m experiments.compare_methods --config=configs/fashion_mnist.py --workdir=runs/compare
    python -m experiments.compare_methods --config=configs/digits.py --workdir=runs/compare_cnn \\
        --with_labels --widths=8,16

A method's terms are those of configs/methods.py. What all its terms but the labels' weigh is tried
at a fourth, once and four times the published weight, for the published ones fit other tasks; the
choice is by the mean validation accuracy over the seeds, and the test set is evaluated at the
choice alone. The seeds and the three weights are one program, by vmap, with one teacher. A killed
comparison goes on after its last complete row.
"""

import copy
import functools
import json
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

from abkd_jax import arguments, data, schema, train
from abkd_jax import flags as config_flags
from abkd_jax.losses.feature import class_means
from abkd_jax.metrics import summarize
from abkd_jax.types import Outputs, Term

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = config_flags.define_config(str(_ROOT / "configs" / "digits.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the rows.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", [], "Some methods alone.")
_WITH_LABELS = flags.DEFINE_bool("with_labels", False, "Withhold no label.")
_WIDTHS = flags.DEFINE_list("widths", [], "The student is a CNN of these widths.")
_FACTORS = (0.25, 1.0, 4.0)
_METRICS = (("accuracy", 100, 1), ("nll", 1, 3), ("ece", 100, 1), ("agreement", 100, 1))


def main(argv: list[str]) -> None:
    """Runs the methods that are missing, and prints the table."""
    del argv
    config = _config()
    folder = pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = data.from_config(config.data.to_dict(), data_seed=config.data_seed)
    on = "all labels" if not config.data.labelled else f"{config.data.labelled} labels"
    print(
        f"{config.data.name}, {len(dataset.train)} images, {on}; {len(dataset.test)} test images; "
        f"{config.num_steps} steps; mean +- standard deviation of {_SEEDS.value} init seeds"
    )
    print(f"{'':16}{'accuracy %':>14}{'NLL':>16}{'ECE %':>14}{'agreement %':>16}{'x':>6}  labels")
    teacher = _teacher(config, dataset)
    _print("teacher", teacher[1] | {"factor": None, "note": ""})
    rows = folder / "rows.jsonl"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {row["method"]: row for row in done}
    for method in _METHODS.value or _known(config):
        if method not in done:
            started = time.monotonic()
            done[method] = {"method": method} | _row(config, dataset, teacher[0], method)
            with rows.open("a") as file:
                file.write(json.dumps(done[method]) + "\n")
            print(f"{method}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        _print(method, done[method])


def _config() -> Any:
    """The config, as the flags change it."""
    config = copy.deepcopy(_CONFIG.value)
    with config.unlocked():
        if _WITH_LABELS.value:
            config.data.labelled = 0
        if _WIDTHS.value:
            widths = tuple(int(width) for width in _WIDTHS.value)
            config.student.model, config.student.widths = "cnn", widths
    return config


def _known(config: Any) -> list[str]:
    return [LABELS, *arguments.methods(config, _ROOT / "configs" / "digits.py")]


LABELS = "labels alone"


def _terms(config: Any, method: str) -> dict[str, Any]:
    if method == LABELS:
        return {"task": dict(fn="cross_entropy", weight=1.0, where="labelled")}
    return arguments.method_terms(config, method, _ROOT / "configs" / "digits.py")


def _teacher(config: Any, dataset: data.DataSet) -> tuple[train.TrainState, dict[str, Any]]:
    """The teacher, frozen, and its scores."""
    terms = schema.objectives(config.to_dict(), learners=["teacher"], present=["teacher"])
    states = _new(config.to_dict(), "teacher", dataset, 1)
    stacked = jax.tree.map(lambda x: x[None], terms["teacher"])
    states = _fit(config, "teacher", states, {}, stacked, dataset.teacher, dataset.preprocess)
    state = train.frozen(jax.tree.map(lambda x: x[0], states))
    scores = _scores(jax.tree.map(lambda x: x[None], state), state, dataset.test, dataset)
    return state, {name: values.tolist() for name, values in scores.items()}


def _row(config: Any, dataset: data.DataSet, teacher: Any, method: str) -> dict[str, Any]:
    """The test scores of a method at the weight that validation chooses."""
    terms = _terms(config, method)
    factors = (1.0,) if method == LABELS else _FACTORS
    values = config.to_dict()
    stacks = []
    for factor in factors:
        scaled = {name: _scaled(name, term, factor) for name, term in terms.items()}
        values["student"] = values["student"] | {"terms": scaled}
        stacks.append(_objective(values, teacher, dataset))
    if any("hidden" in term.loss.needs for term in stacks[0].values()):
        width = _outputs(teacher, dataset.test, dataset).hidden.shape[-1]
        values["student"] |= {"project": {"hidden": width}}
    num = _SEEDS.value
    stacked = jax.tree.map(lambda *x: jnp.repeat(jnp.stack(x), num, axis=0), *stacks)
    seeds = _new(values, "student", dataset, num)
    states = jax.tree.map(lambda x: jnp.concatenate([x] * len(factors)), seeds)
    split = dataset.train.labelled_alone() if method == LABELS else dataset.train
    states = _fit(
        config, "student", states, {"teacher": teacher}, stacked, split, dataset.preprocess
    )
    validation = _scores(states, teacher, dataset.validation, dataset)["accuracy"]
    validation = np.nan_to_num(validation.reshape(len(factors), num).mean(axis=1))
    best = int(np.argmax(validation))
    chosen = jax.tree.map(lambda x: x[best * num : (best + 1) * num], states)
    scores = _scores(chosen, teacher, dataset.test, dataset)
    note = "teacher's" if "with_teacher_labels" in json.dumps(terms) else ""
    found = {name: values.tolist() for name, values in scores.items()}
    return found | {"factor": factors[best], "note": note, "validation": validation.tolist()}


def _scaled(name: str, term: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The term with its weight, a number or a warm-up, times the factor; the labels' as it is."""
    weight = term["weight"]
    if name != "task":
        rises = isinstance(weight, Mapping)
        weight = weight | {"value": factor * weight["value"]} if rises else factor * weight
    return dict(term) | {"weight": weight}


def _objective(values: dict[str, Any], teacher: Any, dataset: data.DataSet) -> dict[str, Term]:
    means = {"teacher": functools.partial(_class_means, teacher, dataset)}
    present = {"learners": ["student"], "present": ["student", "teacher"]}
    return schema.objectives(values, **present, class_means=means)["student"]


def _class_means(teacher: Any, dataset: data.DataSet) -> Array:
    """Of the teacher's features over the training images, `[K, D]`."""
    hidden = _outputs(teacher, dataset.teacher, dataset).hidden
    return class_means(hidden, dataset.teacher.labels, dataset.num_classes)


def _outputs(teacher: Any, split: data.Split, dataset: data.DataSet) -> Outputs:
    """What the teacher shows of a whole split."""
    inputs = data.normalized(split.inputs, dataset.preprocess)
    return teacher.forward(teacher.params, inputs, train=False)[0]


def _new(values: dict[str, Any], name: str, dataset: data.DataSet, count: int) -> train.TrainState:
    """`count` new networks, of consecutive init seeds, stacked."""
    built = schema.network(values, name, num_classes=dataset.num_classes)
    inputs = next(data.evaluation_batches(dataset.test, 1, dataset.preprocess))["inputs"]
    new = functools.partial(train.create, built.module, inputs, optimizer=built.optimizer)
    return jax.vmap(lambda seed: new(init_seed=seed))(values["init_seed"] + jnp.arange(count))


def _fit(config, learner, states, frozen, terms, split, preprocess) -> train.TrainState:
    """Trains stacked networks, each on its own objective and all on the same batches."""
    feed = data.Feed(split, data_seed=config.data_seed, size=min(config.batch_size, len(split)))
    for step in range(config.num_steps):
        fed, _ = feed(step)
        args = (states, frozen, terms, fed, preprocess, config.data_seed, step)
        states = _step(*args, learner=learner, size=min(config.batch_size, len(split)))
        if step % 100 == 0:
            jax.block_until_ready(states.step)
    return states


@functools.partial(jax.jit, static_argnames=("learner", "size"), donate_argnames="states")
def _step(states, frozen, terms, fed, preprocess, data_seed, step, *, learner, size):
    batch = fed.batch(data_seed, step, size, preprocess)

    def member(state, terms):
        networks, _ = train.train_step({learner: state, **frozen}, batch, {learner: terms})
        return networks[learner]

    return jax.vmap(member)(states, terms)


def _scores(states, teacher, split, dataset) -> dict[str, np.ndarray]:
    """{metric: [members]} on a split."""
    total = None
    for batch in data.evaluation_batches(split, 1000, dataset.preprocess):
        sums = _evaluate(states, teacher, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    own, pair = (jax.vmap(summarize)(total[name]) for name in ("student", "student|teacher"))
    return {name: np.asarray((own | pair)[name], float) for name, *_ in _METRICS}


@jax.jit
def _evaluate(states, teacher, batch):
    def member(state):
        return train.eval_step({"student": state, "teacher": teacher}, batch)[0]

    return jax.vmap(member)(states)


def _print(name: str, row: Mapping[str, Any]) -> None:
    cells = ""
    for (metric, factor, digits), width in zip(_METRICS, (14, 16, 14, 16), strict=True):
        values = factor * np.asarray(row[metric], float)
        spread = f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
        cells += f"{f'{values.mean():.{digits}f}{spread}':>{width}}"
    factor = "" if row["factor"] is None else f"{row['factor']:g}"
    print(f"{name:16}{cells}{factor:>6}  {row['note']}", flush=True)


if __name__ == "__main__":
    known = ("config", "workdir", "seeds", "methods", "with_labels", "widths")
    app.run(main, flags_parser=functools.partial(config_flags.parse, known=known))
