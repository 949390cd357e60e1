"""A table of configs over init seeds, each a run of its own that can be killed and resumed.

    python -m experiments.seeds --workdir=runs/transfer --configs=configs/fashion_mnist.py
    python -m experiments.seeds --workdir=runs/omitted --configs=configs/fashion_mnist.py:omit=5 \\
        --of_class=5
    python -m experiments.seeds --workdir=runs/online \\
        --configs=configs/online_fashion_mnist.py:method=bdkd \\
        --configs=configs/online_fashion_mnist.py:method=dml \\
        --configs=configs/online_fashion_mnist.py:method=independent

Figures are of the test set after the last step: mean +- standard deviation over the seeds. The
second part of the table is after temperature scaling, fitted on validation data.
"""

import json
import pathlib
import re
import runpy
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from abkd_jax import train_and_evaluate
from abkd_jax.config import command

_CONFIGS = flags.DEFINE_multi_string("configs", None, "Config files, with their arguments.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that holds the runs.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)
_CLASS = flags.DEFINE_integer("of_class", None, "A class whose accuracy is to be shown, too.")
_COLUMNS = (("nll", "NLL", 1, 3), ("ece", "ECE %", 100, 2), ("adaptive_ece", "aECE %", 100, 2))
_WIDTH = 17


def main() -> None:
    """Runs what is missing, and prints the table."""
    rows = {}
    for text in _CONFIGS.value:
        folder = pathlib.Path(_WORKDIR.value) / re.sub(r"[^\w.=,-]+", "_", text)
        path, _, argument = text.partition(":")
        config = runpy.run_path(path)["get_config"](argument)
        results = [_networks(config, folder, seed) for seed in range(_SEEDS.value)]
        for name in results[0]:
            rows[f"{argument or text}: {name}"] = [found[name]["last"] for found in results]
    _print(rows)


def _networks(config: ml_collections.ConfigDict, folder: pathlib.Path, seed: int) -> dict[str, Any]:
    """The networks of one seed's result: read if the run is complete, else made."""
    workdir, config.init_seed = folder / f"seed_{seed}", seed
    print(f"{workdir}", file=sys.stderr)
    if (done := workdir / "result.json").exists():
        return json.loads(done.read_text())["networks"]
    return train_and_evaluate(config, workdir)["networks"]


def _print(rows: Mapping[str, list[Mapping[str, Any]]]) -> None:
    width = 2 + max(map(len, rows))
    titles = [title for _, title, *_ in _COLUMNS]
    extra = [] if _CLASS.value is None else [f"of class {_CLASS.value} %"]
    header = ["accuracy %", *extra, *titles, "T", *(f"{title} scaled" for title in titles)]
    print(" " * width + "".join(f"{title:>{_WIDTH}}" for title in header))
    for name, scores in rows.items():
        cells = [_cell([s["accuracy"] for s in scores], 100, 2)]
        if _CLASS.value is not None:
            cells.append(_cell([s["class_accuracy"][_CLASS.value] for s in scores], 100, 1))
        cells += [_cell([s[key] for s in scores], *how) for key, _, *how in _COLUMNS]
        if scores[0]["scaled"] is not None:
            cells.append(_cell([s["temperature"] for s in scores], 1, 2))
            cells += [_cell([s["scaled"][key] for s in scores], *how) for key, _, *how in _COLUMNS]
        print(f"{name:{width}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))


def _cell(values: list[float], factor: float, digits: int) -> str:
    values = factor * np.asarray(values, float)
    spread = f" +- {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


if __name__ == "__main__":
    command.run(main)
