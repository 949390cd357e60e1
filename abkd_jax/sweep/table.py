"""The tables of a sweep: a row for each member, means over seeds, the best point."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from abkd_jax import files
from abkd_jax.binding import nearest
from abkd_jax.config.plan import Phase

_SPLITS = ("validation_", "test_")


def best(rows: Sequence[Mapping[str, float]], by: str | None = None) -> dict[str, Any]:
    """The numbers with the highest mean of a score over the init seeds.

    Of equal scores that with the lowest NLL is taken, else the first.

    Args:
        rows: of a sweep.
        by: the score, which is to be high; None for the first one, by which runs select.

    Returns:
        The row's numbers with the mean and the standard deviation of every score over the seeds,
        as `averaged` gives them.

    Raises:
        ValueError: if there is no such score, or nowhere a finite one.
    """
    known = [key for key in rows[0] if key.startswith(_SPLITS)]
    by = known[0] if by is None else by
    if by not in known:
        raise ValueError(f"by must be one of {', '.join(known)}; found {by!r}{nearest(by, known)}.")
    means = [row for row in averaged(rows) if math.isfinite(row[by])]
    if not means:
        raise ValueError(f"no point of the sweep has a finite {by}; lower the learning rate.")
    nll = f"{by.rpartition('_')[0]}_nll"
    return max(means, key=lambda row: (row[by], -row.get(nll, 0.0)))


def averaged(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Means over the init seeds, one row for each point, with "..._std" beside each score.

    A point of which a member was not finite has NaN scores.
    """
    groups: dict[tuple, list] = {}
    for row in rows:
        numbers = tuple((k, v) for k, v in row.items() if "." in k)
        groups.setdefault(numbers, []).append(row)
    table = []
    for numbers, members in groups.items():
        found = dict(numbers)
        for key in members[0]:
            if key.startswith(_SPLITS):
                values = np.asarray([m[key] if m["bad_step"] < 0 else np.nan for m in members])
                found[key] = float(values.mean())
                found[f"{key}_std"] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        table.append(found)
    return table


def spread(row: Mapping[str, float], key: str, factor: float = 1, digits: int = 3) -> str:
    """A score of an averaged row as text, "95.3 +- 0.6": mean and deviation if there is one.

    Args:
        row: as `averaged` and `best` give them; without deviations for a single run.
        key: of the score.
        factor: of both, 100 for per cent.
        digits: after the point.
    """
    deviation = row.get(f"{key}_std", math.nan)
    shown = "" if math.isnan(deviation) else f" +- {factor * deviation:.{digits}f}"
    return f"{factor * row[key]:.{digits}f}{shown}"


def column(phase: Phase, split: str, key: str) -> str:
    """The column of a score: `validation_accuracy`, `test_agreement`; with names if not clear.

    Args:
        phase: in which the members learn.
        split: "validation" or "test".
        key: "NETWORK/METRIC" or "NETWORK|OTHER/METRIC".
    """
    networks, _, metric = key.rpartition("/")
    learner, _, other = networks.partition("|")
    own = "" if learner == phase.select else f"{learner}_"
    others = len(phase.learners) + len(phase.see) > 2
    return f"{split}_{own}{metric}{f'_with_{other}' if other and others else ''}"


def shown(value: Any) -> float:
    """A float32 score without the digits that float64 would add."""
    return float(f"{float(value):.7g}")


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a chunk that is done, null as NaN; none if the file is damaged."""
    nan = lambda row: {k: math.nan if v is None else v for k, v in row.items()}  # noqa: E731
    try:
        rows = json.loads(path.read_text())
        return [{"last": nan(r["last"]), "history": [nan(x) for x in r["history"]]} for r in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # the checkpoints have it all


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the table as a whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, text.getvalue().encode())
