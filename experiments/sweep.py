"""A sweep over numbers of a config and over init seeds, as one program: table, best point, map.

    python -m experiments.sweep --config=configs/digits.py --workdir=runs/sweep --init_seeds=3 \\
        --over student.terms.distill.divergence.alpha=0:1.25:0.125 \\
        --over student.terms.distill.divergence.beta=0:1.25:0.125

A range is start:end:step, its end included, or a list, 0.5,1,2. The best point is that of the
highest mean validation accuracy over the seeds; the test scores shown are those of that point
alone. The workdir has sweep.csv (a row for each student), history.csv (scores on the way), and for
two numbers heat_map.png, for one curve.png. A stopped sweep goes on by the same command. The
student of a single run with the same numbers, seeds and teacher (--config.teacher.checkpoint of
WORKDIR/teacher) is that of the sweep.
"""

import functools
import math
import pathlib
import sys
import time

import numpy as np
from absl import app, flags

from abkd_jax import figures
from abkd_jax import flags as config_flags
from abkd_jax.train import sweep

_CONFIG = config_flags.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the sweep, which is made.")
_OVER = flags.DEFINE_multi_string("over", [], "PATH=START:END:STEP, or PATH=A,B,C.")
_SEEDS = flags.DEFINE_integer("init_seeds", 1, "How many init seeds, from the config's on.")
_CHUNK = flags.DEFINE_integer("chunk", 0, "Students at once; 0: as many as memory holds.")
_PLANE = ("divergence.alpha", "divergence.beta")
_MOST = 100_000  # values of one number


def main(argv: list[str]) -> None:
    """Runs what is missing, and prints the best point."""
    if argv[1:]:
        sys.exit(f"unknown arguments: {' '.join(argv[1:])}; every option starts with --.")
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            sys.exit(f"--{name} is missing.")
    config_flags.silence()
    started = time.monotonic()
    folder = pathlib.Path(_WORKDIR.value)
    try:
        over = dict(map(parsed, _OVER.value))
        if len(over) < len(_OVER.value):
            raise ValueError("--over names a path twice; give all its values at once.")
        how = {"init_seeds": _SEEDS.value, "chunk": _CHUNK.value}
        rows = sweep.sweep(_CONFIG.value, folder, over=over, **how)
        table = sweep.averaged(rows)
        selects = _scores(table[0], next(iter(over)))
        best = sweep.best(rows, f"{selects}accuracy")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{error}")
    unfinished = sum(row["bad_step"] >= 0 for row in rows)
    print(f"{len(rows)} students in {time.monotonic() - started:.0f} s; not finite: {unfinished}")
    print(f"best by {_words(selects)} accuracy, mean over {_SEEDS.value} init seeds:")
    for path in over:
        print(f"  {path} {best[path]:g}")
    for scores in dict.fromkeys((selects, selects.replace("validation", "test"))):
        cells = (_cell(best, f"{scores}{name}", name, *how) for name, *how in _SCORES)
        print(f"  {_words(scores)}: {', '.join(cells)}")
    for path in _pictures(folder, table, best, tuple(over), selects):
        print(path)


_SCORES = (
    ("accuracy", 100, 2, " %"),
    ("nll", 1, 3, ""),
    ("ece", 100, 1, " %"),
    ("entropy", 1, 3, ""),
)


def parsed(text: str) -> tuple[str, list[float]]:
    """The path and the values of a flag --over.

    Raises:
        ValueError: one sentence, if it cannot be read.
    """
    path, _, values = text.partition("=")
    try:
        if values.count(":") == 2:
            start, end, step = map(float, values.split(":"))
            count = math.floor((end - start) / step + 1e-9) + 1
            if not 0 < count <= _MOST:
                raise ValueError
            return path, [round(start + i * step, 10) for i in range(count)]
        return path, [float(value) for value in values.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"--over must be PATH=START:END:STEP or PATH=A,B,C; found {text!r:.80}."
        ) from None


def _scores(row: dict[str, float], path: str) -> str:
    """How the scores that select are called, for the network of the path: "validation_"."""
    split = "validation" if any(key.startswith("validation_") for key in row) else "test"
    alone = f"{split}_accuracy" in row
    return f"{split}_" if alone else f"{split}_{path.partition('.')[0]}_"


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ")


def _cell(row: dict[str, float], key: str, name: str, factor: float, digits: int, unit: str) -> str:
    spread = row[f"{key}_std"]
    spread = "" if math.isnan(spread) else f" +- {factor * spread:.{digits}f}"
    return f"{name} {factor * row[key]:.{digits}f}{spread}{unit}"


def _pictures(
    folder: pathlib.Path, table: list, best: dict, paths: tuple[str, ...], selects: str
) -> list[pathlib.Path]:
    """A map over two numbers, or a curve over one; further ones are left to the table."""
    score = f"{selects}accuracy"
    counts = [len({row[path] for row in table}) for path in paths]
    if len(paths) == 2 and min(counts) > 1:
        plane = [next((p for p in paths if p.endswith(name)), None) for name in _PLANE]
        special = None not in plane
        x, y = plane if special else paths
        what = f"{_words(selects)} accuracy"
        how = {"score_label": f"{what} (%)", "special": special, "factor": 100.0}
        how["best"] = best
        how["title"] = what.capitalize()
        figure, name = figures.heat_map(table, x, y, score, **how), "heat_map.png"
    elif len(paths) == 1 and counts[0] > 1:
        rows = sorted(table, key=lambda row: row[paths[0]])
        xs, ys, spread = (
            np.asarray([factor * row[key] for row in rows])
            for key, factor in ((paths[0], 1), (score, 100), (f"{score}_std", 100))
        )
        curves = {score: (xs, ys, np.nan_to_num(spread))}
        panel = {"title": paths[0], "x": paths[0].rpartition(".")[2], "curves": curves}
        panel["y"] = f"{_words(selects)} accuracy (%)"
        figure, name = figures.lines([panel], columns=1), "curve.png"
    else:
        return []
    figures.save(figure, folder / name)
    return [folder / name]


if __name__ == "__main__":
    known = ("config", "workdir", "over", "init_seeds", "chunk")
    app.run(main, flags_parser=functools.partial(config_flags.parse, known=known))
