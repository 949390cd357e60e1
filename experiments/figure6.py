"""What alpha does to accuracy, and beta to entropy, in the course of training (ABKD's figure 6).

    python -m experiments.figure6 --workdir=runs/figure6

Two sweeps on digits, three init seeds each: alpha at a fixed beta, then beta at a fixed alpha, with
the student, the transfer set and the temperature of configs/digits.py. All on validation data. The
paper's panels are on CIFAR-100 and Dolly. Another config: --config, with alpha_beta as divergence.
"""

import csv
import pathlib

import numpy as np
from absl import flags

from abkd_jax import figures
from abkd_jax.config import command
from abkd_jax.sweep import HISTORY, averaged, spread, sweep

_CONFIG = command.define_config("configs/digits.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the two sweeps.", required=True)
_OUT = flags.DEFINE_string("out", "experiments/figures/figure6.png", "The figure's path.")
_SEEDS = flags.DEFINE_integer("init_seeds", 3, "How many init seeds.", lower_bound=2)
_DIVERGENCE = "student.terms.distill.divergence"
_ALPHAS, _BETAS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_ALPHA, _BETA = 0.8, 0.4  # where the other one is swept
_COLUMNS = (("accuracy", 100, 1, 16), ("nll", 1, 3, 18), ("entropy", 1, 3, 18), ("ece", 100, 1, 14))
_EVERY = 100  # steps between two points of a curve


def main() -> None:
    """Runs what is missing of the sweeps, prints a table, and draws the four panels."""
    print(f"{'':12}{'accuracy %':>16}{'NLL':>18}{'entropy, nats':>18}{'ECE %':>14}")
    panels = [
        *_panels("alpha", _ALPHAS, ("beta", _BETA), "accuracy", "accuracy (%)", 100),
        *_panels("beta", _BETAS, ("alpha", _ALPHA), "entropy", "entropy (nats)", 1),
    ]
    print(figures.save(figures.lines(panels, height=3.6), _OUT.value))


def _panels(name: str, values: tuple, fixed: tuple, metric: str, label: str, factor: float) -> list:
    """A metric on validation data over training, and after the last step over the number."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.checkpoint_every = _EVERY
    config.student.terms.distill.divergence[fixed[0]] = fixed[1]
    folder, path = pathlib.Path(_WORKDIR.value) / name, f"{_DIVERGENCE}.{name}"
    table = averaged(sweep(config, folder, over={path: values}, init_seeds=_SEEDS.value))
    for row in table:
        cells = (f"{spread(row, f'validation_{key}', *how):>{w}}" for key, *how, w in _COLUMNS)
        print(f"{f'{name} {row[path]:g}':12}{''.join(cells)}")
    key, curves = f"validation_{metric}", {}
    with (folder / HISTORY).open() as file:
        history = [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    for value in values:
        own = [(line["step"], line[key]) for line in history if line[path] == value]
        steps, scores = np.reshape(own, (_SEEDS.value, -1, 2)).transpose(2, 0, 1)
        curves[f"{name} {value:g}"] = steps[0], factor * scores.mean(axis=0)
    on_the_way = {"y": label}
    if metric == "accuracy":  # most curves end at one value: the error, on a log axis, parts them
        curves = {name: (steps, 100 - mean) for name, (steps, mean) in curves.items()}
        metric, on_the_way = "error", {"y": "error (%)", "nested": True}
    title = f"Validation {metric}, {fixed[0]} {fixed[1]:g}"
    ends = (np.asarray([factor * row[column] for row in table]) for column in (key, f"{key}_std"))
    last = {f"mean and spread of {_SEEDS.value} seeds": (np.asarray(values), *ends)}
    return [
        {"title": title, "x": "step", "curves": curves, "log_y": True} | on_the_way,
        {"title": "After the last step", "x": name, "y": label, "curves": last},
    ]


if __name__ == "__main__":
    command.run(main)
