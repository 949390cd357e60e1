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
from abkd_jax.sweep import HISTORY, sweep

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = command.define_config(str(_ROOT / "configs" / "digits.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the two sweeps.", required=True)
_OUT = flags.DEFINE_string("out", "experiments/figures/figure6.png", "The figure's path.")
_SEEDS = flags.DEFINE_integer("init_seeds", 3, "How many init seeds.", lower_bound=2)
_DIVERGENCE = "student.terms.distill.divergence"
_ALPHAS, _BETAS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_ALPHA, _BETA = 0.8, 0.4  # where the other one is swept
_EVERY = 100  # steps between two points of a curve


def main() -> None:
    """Runs what is missing of the sweeps, prints a table, and draws the four panels."""
    print(f"{'':12}{'accuracy %':>16}{'NLL':>18}{'entropy, nats':>18}{'ECE %':>14}")
    accuracy = _swept("alpha", _ALPHAS, beta=_BETA)
    entropy = _swept("beta", _BETAS, alpha=_ALPHA)
    steps = "step"
    panels = []
    for name, key, label, factor, found in (
        ("alpha", "accuracy", "accuracy (%)", 100, accuracy),
        ("beta", "entropy", "entropy (nats)", 1, entropy),
    ):
        other = f"beta {_BETA:g}" if name == "alpha" else f"alpha {_ALPHA:g}"
        curves = {f"{name} {x:g}": (n, factor * v[key].mean(0)) for x, (n, v) in found.items()}
        title = f"Validation {key}, {other}"
        panels.append({"title": title, "x": steps, "y": label, "curves": curves})
        last = {x: factor * values[key][:, -1] for x, (_, values) in found.items()}
        ys, spread = (np.asarray([f(v) for v in last.values()]) for f in (np.mean, _deviation))
        curve = {f"mean and spread of {_SEEDS.value} seeds": (np.asarray([*last]), ys, spread)}
        panels.append({"title": "After the last step", "x": name, "y": label, "curves": curve})
    figures.save(figures.lines(panels, height=3.6), _OUT.value)
    print(_OUT.value)


def _swept(name: str, values: tuple[float, ...], **fixed: float) -> dict[float, tuple]:
    """{value: (steps [E], {metric: [seeds, E]})} on validation data."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.checkpoint_every = _EVERY
    for key, number in fixed.items():
        config.student.terms.distill.divergence[key] = number
    folder = pathlib.Path(_WORKDIR.value) / name
    path = f"{_DIVERGENCE}.{name}"
    sweep(config, folder, over={path: values}, init_seeds=_SEEDS.value)
    with (folder / HISTORY).open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    found = {}
    for value in values:
        own = [row for row in rows if row[path] == value]
        steps = sorted({row["step"] for row in own})
        table = {
            metric: np.asarray([row[f"validation_{metric}"] for row in own]).reshape(-1, len(steps))
            for metric in ("accuracy", "nll", "ece", "entropy")
        }
        found[value] = steps, table
        cells = (
            f"{f * np.mean(x):.{d}f} +- {f * _deviation(x):.{d}f}"
            for f, d, x in (
                (100, 1, table["accuracy"][:, -1]),
                (1, 3, table["nll"][:, -1]),
                (1, 3, table["entropy"][:, -1]),
                (100, 1, table["ece"][:, -1]),
            )
        )
        widths = (16, 18, 18, 14)
        line = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        print(f"{f'{name} {value:g}':12}{line}")
    return found


def _deviation(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1))


if __name__ == "__main__":
    command.run(main)
