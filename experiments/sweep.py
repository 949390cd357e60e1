"""A sweep over numbers of a config and over init seeds, as one program: table, best point, map.

    python -m experiments.sweep --config=configs/digits.py --workdir=runs/sweep --init_seeds=3 \\
        --over student.terms.distill.divergence.alpha=0:1.25:0.125 \\
        --over student.terms.distill.divergence.beta=0:1.25:0.125

A range is start:end:step, its end included, or a list, 0.5,1,2. The best point is that of the
highest mean score on the validation data over the seeds; the test scores shown are those of that
point alone. The workdir has sweep.csv (a row for each student), history.csv (scores on the way),
and for two numbers heat_map.png, for one curve.png. A stopped sweep goes on by the same command.
The student of a single run with the same numbers, seeds and teacher
(--config="configs/digits.py:teacher='WORKDIR/teacher'") is that of the sweep.

With --processes=4 the same command runs four times, on hosts that share the workdir or on one with
devices for each: every process trains members that no other has, and those of a lost one are taken
by the others.
"""

import math
import pathlib
import sys
import time

import numpy as np
from absl import flags

from abkd_jax import figures, files
from abkd_jax.config import command, resolve
from abkd_jax.sweep import averaged, best, spread, sweep
from abkd_jax.tasks import Column

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the sweep, which is made.")
_OVER = flags.DEFINE_multi_string("over", [], "PATH=START:END:STEP, or PATH=A,B,C.")
_SEEDS = flags.DEFINE_integer("init_seeds", None, "How many init seeds; None: as the config has.")
_CHUNK = flags.DEFINE_integer("chunk", 0, "Students at once; 0: as many as memory holds.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "How many share the sweep.", lower_bound=1)
_PLANE = ("divergence.alpha", "divergence.beta")
_MOST = 100_000  # values of one number


def main() -> None:
    """Runs what is missing, and prints the best point."""
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            sys.exit(f"--{name} is missing.")
    started, folder = time.monotonic(), files.path_of(_WORKDIR.value)
    over = dict(map(parsed, _OVER.value))
    if len(over) < len(_OVER.value):
        raise ValueError("--over names a path twice; give all its values at once.")
    how = {"chunk": _CHUNK.value, "processes": _PROCESSES.value}
    rows = sweep(_CONFIG.value, folder, over=over, init_seeds=_SEEDS.value, **how)
    winner = best(rows)
    score = next(key for key in winner if key not in over)  # that which selects
    task = resolve(_CONFIG.value).task
    selects = score.removesuffix(task.score_column.key)
    unfinished = sum(row["bad_step"] >= 0 for row in rows)
    print(f"{len(rows)} students in {time.monotonic() - started:.0f} s; not finite: {unfinished}")
    seeds = len({row["init_seed"] for row in rows})
    print(f"best by {_words(score)}, mean over {seeds} init seeds:")
    for path in over:
        print(f"  {path} {winner[path]:g}")
    columns = {column.title: column for column in (task.score_column, *task.columns)}
    for scores in dict.fromkeys((selects, selects.replace("validation", "test"))):
        cells = (
            f"{x.title} {spread(winner, f'{scores}{x.key}', x.factor, x.digits)}"
            for x in columns.values()
            if f"{scores}{x.key}" in winner
        )
        print(f"  {_words(scores)}: {', '.join(cells)}")
    _draw(folder, averaged(rows), winner, tuple(over), score, task.score_column)


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


def _words(name: str) -> str:
    return name.strip("_").replace("_", " ")


def _draw(
    folder: pathlib.Path, table: list, best: dict, paths: tuple, score: str, column: Column
) -> None:
    """A map over two numbers, or a curve over one; further ones are left to the table."""
    counts = [len({row[path] for row in table}) for path in paths]
    label = f"{_words(score)}{' (%)' if column.factor == 100 else ''}"
    if len(paths) > 2 or min(counts) < 2:
        return
    if len(paths) == 2:
        plane = [next((p for p in paths if p.endswith(name)), None) for name in _PLANE]
        special = None not in plane
        how = {"score_label": label, "title": _words(score).capitalize()}
        how |= {"special": special, "factor": float(column.factor), "best": best}
        figure = figures.heat_map(table, *(plane if special else paths), score, **how)
    else:
        rows = sorted(table, key=lambda row: row[paths[0]])
        keys = ((paths[0], 1), (score, column.factor), (f"{score}_std", column.factor))
        xs, ys, spreads = (np.asarray([factor * row[key] for row in rows]) for key, factor in keys)
        panel = {"title": paths[0], "x": paths[0].rpartition(".")[2], "y": label}
        panel["curves"] = {score: (xs, ys, np.nan_to_num(spreads))}
        panel["log_x"] = figures.scale_of(xs)["value"] == "log"
        figure = figures.lines([panel], columns=1)
    print(figures.save(figure, folder / ("heat_map.png" if len(paths) == 2 else "curve.png")))


if __name__ == "__main__":
    command.run(main)
