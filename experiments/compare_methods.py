"""All published methods on one config: accuracy, calibration and agreement with the teacher.

    python -m experiments.compare_methods --config=configs/digits.py --workdir=runs/compare_digits
    python -m experiments.compare_methods --config=configs/fashion_mnist.py --workdir=runs/compare
    python -m experiments.compare_methods --config=configs/digits.py --workdir=runs/compare_cnn \\
        --config.data.labelled=0 --config.student.model.fn=cnn \\
        --config.student.model.widths="(8,16)"

A method's terms are those of configs/methods.py. What all its terms but the labels' weigh is tried
at a fourth, once and four times the published weight, for the published ones fit other tasks; the
choice is by the mean validation accuracy over the seeds, and the test scores shown are those of the
choice alone. The seeds, and the weights of a method with one such term, are one program, with one
teacher for all. A killed comparison goes on from its newest checkpoint.
"""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from abkd_jax import config as configs
from abkd_jax import train_and_evaluate
from abkd_jax.config import arguments, command, schema
from abkd_jax.sweep import averaged, spread, sweep

_BESIDE = "configs/digits.py"  # the file of the methods
_CONFIG = command.define_config(_BESIDE)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the runs.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)
_METHODS = flags.DEFINE_list("methods", [], "Some methods alone.")
_ALONE = "labels alone"
_FACTORS = (0.25, 1.0, 4.0)
_COLUMNS = (
    ("accuracy", 100, 1, 14),
    ("nll", 1, 3, 16),
    ("ece", 100, 1, 14),
    ("agreement", 100, 1, 16),
)


def main() -> None:
    """Runs what is missing, and prints the table."""
    config, folder = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    data = configs.resolve(config).data()
    name, labelled = config.data.get("name", config.data.fn), config.data.labelled
    print(
        f"{name}, {len(data.train)} images, {f'{labelled} labels' if labelled else 'all labels'}; "
        f"{len(data.test)} test images; {config.num_steps} steps; mean +- standard deviation of "
        f"{_SEEDS.value} init seeds"
    )
    print(f"{'':16}{'accuracy %':>14}{'NLL':>16}{'ECE %':>14}{'agreement %':>16}{'x':>6}  labels")
    phases = {"phases": {"teacher": config.phases.teacher.to_dict()}}
    alone = schema.needed(schema.plain(config) | phases)
    result = train_and_evaluate(alone, folder / "teacher")["networks"]["teacher"]["last"]
    row = {f"test_{key}": x for key, x in (result | {"agreement": 1.0}).items()}
    _print("teacher", row, "", "")
    for method in _METHODS.value or [_ALONE, *arguments.methods(config, _BESIDE)]:
        started = time.monotonic()
        taught = config.copy_and_resolve_references()
        values = _values(configs.apply(taught, {"teacher": f"{folder / 'teacher'}"}), method)
        tried = _tried(values, folder / method.replace(" ", "_"))
        accuracy = {x: np.nan_to_num(row["validation_accuracy"]) for x, row in tried.items()}
        chosen = max(accuracy, key=accuracy.get)
        note = "teacher's" if "with_teacher_labels" in json.dumps(values["student"]) else ""
        print(f"{method}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        _print(method, tried[chosen], f"{chosen:g}", note)


def _values(config: ml_collections.ConfigDict, method: str) -> dict[str, Any]:
    """The config with the terms of a method, or with the labels' alone."""
    if method != _ALONE:
        return schema.plain(configs.apply(config, {"method": method}, beside=_BESIDE))
    values = schema.plain(config)
    terms = {"task": {"fn": "cross_entropy", "weight": 1.0}}
    alone = {"learn": ("student",), "see": ("teacher",), "split": "labelled"}
    return values | {"student": values["student"] | {"terms": terms}, "phases": {"alone": alone}}


def _tried(values: dict[str, Any], folder: pathlib.Path) -> dict[float, dict[str, float]]:
    """Trains a method's students; the means over the seeds by the factor on its weights."""
    terms = {name: term["weight"] for name, term in values["student"]["terms"].items()}
    own, numbers = terms.pop("task"), {}
    for name, weight in terms.items():
        rises, path = isinstance(weight, Mapping), f"student.terms.{name}.weight"
        numbers[f"{path}.value" if rises else path] = weight["value"] if rises else weight
    if not numbers:  # the labels alone
        numbers, sweeps = {"student.terms.task.weight": own}, [(1.0,)]
    else:  # one sweep is over all products, so that several weights rise together in one each
        sweeps = [_FACTORS] if len(numbers) == 1 else [(factor,) for factor in _FACTORS]
    tried = {}
    for factors in sweeps:
        over = {path: [x * number for x in factors] for path, number in numbers.items()}
        rows = sweep(values, folder / f"{factors[0]}", over=over, init_seeds=_SEEDS.value)
        tried |= zip(factors, averaged(rows), strict=True)
    return tried


def _print(name: str, row: Mapping[str, float], factor: str, note: str) -> None:
    cells = (f"{spread(row, f'test_{key}', *how):>{w}}" for key, *how, w in _COLUMNS)
    print(f"{name:16}{''.join(cells)}{factor:>6}  {note}", flush=True)


if __name__ == "__main__":
    command.run(main)
