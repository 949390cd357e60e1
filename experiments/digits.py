"""A first distillation on real data: what a teacher's probabilities are worth without labels.

    python -m experiments.digits            # the table, of the test set
    python -m experiments.digits --tune     # the validation grid from which the numbers were chosen

The seeds of a row are one program, with one teacher for all. Forward and reverse KL are the points
(1, 0) and (0, 1) of the alpha-beta-divergence, so the rows differ in numbers only. With --workdir
the runs are kept, and a stopped table goes on.
"""

import pathlib
import tempfile
import time

import ml_collections
from absl import flags

from abkd_jax import config as configs
from abkd_jax import train_and_evaluate
from abkd_jax.config import command, schema
from abkd_jax.run.log import writer
from abkd_jax.sweep import averaged, spread, sweep

_CONFIG = command.define_config("configs/digits.py")
_TUNE = flags.DEFINE_bool("tune", False, "Print the validation grid in place of the table.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the runs to make or take up; None: not kept.")
_RATE, _DISTILL = "student.optimizer.learning_rate", "student.terms.distill"
_NUMBERS = tuple(
    f"{_DISTILL}.{name}" for name in ("temperature", "divergence.alpha", "divergence.beta")
)
_COLUMNS = (("accuracy", 100, 1, 14), ("nll", 1, 3, 16), ("ece", 100, 1, 14))
# Temperatures, values of alpha, values of beta; those of the table were chosen by validation NLL.
_TABLE = {
    "forward KL (alpha 1, beta 0)": ((1.0,), (1.0,), (0.0,)),
    "reverse KL (alpha 0, beta 1)": ((2.0,), (0.0,), (1.0,)),
}
_GRID = {
    "forward KL": ((1.0, 2.0, 4.0), (1.0,), (0.0,)),
    "reverse KL": ((1.0, 2.0, 4.0), (0.0,), (1.0,)),
    "between": ((1.0, 2.0, 4.0), (0.4, 0.6, 0.8, 1.0), (0.1, 0.3, 0.5)),
}


def main() -> None:
    """Trains the teacher, then the students of each row, and prints the scores as they come."""
    with tempfile.TemporaryDirectory() as temporary:
        _print_table(_CONFIG.value, pathlib.Path(_WORKDIR.value or temporary))


def _print_table(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    started, split = time.monotonic(), "validation" if _TUNE.value else "test"
    data = configs.resolve(config).data()
    images = f"{len(getattr(data, split))} images"
    print(f"{split} set, {images}; mean +- standard deviation over init seeds")
    print(f"{'':42}{'accuracy %':>14}{'NLL':>16}{'ECE %':>14}{'seeds':>7}{'s':>5}")

    def show(name: str, row: dict[str, float], seeds: int) -> None:
        cells = (f"{spread(row, f'{split}_{key}', *how):>{w}}" for key, *how, w in _COLUMNS)
        print(f"{name:42}{''.join(cells)}{seeds:>7}{time.monotonic() - started:>5.0f}", flush=True)

    def rows(name: str, config: dict, over: dict[str, tuple]) -> list[dict[str, float]]:
        return averaged(sweep(config, folder / name, over=over, init_seeds=_SEEDS.value))

    show(f"teacher, {len(data.full)} labels", _teacher(config, folder / "teacher"), 1)
    values = schema.plain(configs.apply(config, {"teacher": f"{folder / 'teacher'}"}))
    student, distill = values["student"], values["student"]["terms"]["distill"]
    alone = values | {"student": student | {"terms": values["teacher"]["terms"]}}
    alone["phases"] = {"alone": {"learn": ("student",), "split": "labelled"}}
    labels = f"student, {len(data.train.labelled_alone())} labels alone"
    for row in rows("alone", alone, {_RATE: (3e-4, 1e-3, 3e-3, 1e-2) if _TUNE.value else (1e-3,)}):
        show(f"{labels}, rate {row[_RATE]}" if _TUNE.value else labels, row, _SEEDS.value)

    if not _TUNE.value:
        numbers = dict(distill["divergence"])
        name = " ".join([numbers.pop("fn"), *(f"{key} {x}" for key, x in numbers.items())])
        own = {_NUMBERS[0]: (distill["temperature"],)}
        show(f"student, {name}", *rows("own", values, own), _SEEDS.value)
    divergence = {"divergence": {"fn": "alpha_beta", "alpha": 1.0, "beta": 0.0}}
    values["student"] = student | {"terms": {"distill": distill | divergence}}
    found = {}
    for name, lists in (_GRID if _TUNE.value else _TABLE).items():
        for row in rows(name, values, dict(zip(_NUMBERS, lists, strict=True))):
            point = "T {}, alpha {}, beta {}".format(*(row[path] for path in _NUMBERS))
            found[point if _TUNE.value else name] = row
    for name, row in sorted(found.items(), key=lambda item: item[1][_NUMBERS[0]]):
        show(f"student, {name}", row, _SEEDS.value)
    print(
        f"The teacher saw all {len(data.train)} training labels. The distilled students saw the "
        "same images and the\nteacher's probabilities for them, and no label. Numbers were chosen "
        f"on {len(data.validation)} validation images."
    )


def _teacher(config: ml_collections.ConfigDict, folder: pathlib.Path) -> dict[str, float]:
    """Trains the teacher alone; its scores, as a row of a sweep has them."""
    if "teacher" not in config.phases:
        raise ValueError("experiments.digits trains its own teacher: leave out teacher='WORKDIR'.")
    phases = {"phases": {"teacher": config.phases.teacher.to_dict()}}
    result = train_and_evaluate(schema.needed(schema.plain(config) | phases), folder)
    last, scores = writer.read(folder)[-1], result["networks"]["teacher"]["last"]
    row = {f"test_{key}": scores[key] for key, *_ in _COLUMNS}
    return row | {f"validation_{key}": last[f"validation/teacher/{key}"] for key, *_ in _COLUMNS}


if __name__ == "__main__":
    command.run(main)
