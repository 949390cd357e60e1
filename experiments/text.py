"""Divergences between language models: labels alone, both KLs, JS, and alpha-beta at its best.

    python -m experiments.text --workdir=runs/text

One teacher of configs/text.py for all. alpha and beta are those of the highest log-likelihood on
the validation data, among 5 x 5 and for the first init seed; then all students learn at once, as
learners of one step, for each of the seeds. What is printed are the tables of test scores out of
WORKDIR/students/report.md. A killed run goes on by the same command.
"""

import pathlib

import ml_collections
from absl import flags

from abkd_jax import train_and_evaluate
from abkd_jax.config import command
from abkd_jax.sweep import best, sweep

_CONFIG = command.define_config("configs/text.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the runs.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)
_VALUES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of alpha and of beta
_PATH = "student.terms.distill.divergence."


def main() -> None:
    """Runs what is missing, and prints the tables."""
    config, folder = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    with config.unlocked():
        del config.phases["baseline"], config["baseline"]
    over = {f"{_PATH}{name}": _VALUES for name in ("alpha", "beta")}
    winner = best(sweep(config, folder / "sweep", over=over, init_seeds=1))
    alpha, beta = (winner[path] for path in over)
    print(f"alpha {alpha:g}, beta {beta:g}: {folder / 'sweep' / 'sweep.csv'}")
    train_and_evaluate(
        _together(config, f"{folder}/sweep/teacher", alpha, beta), folder / "students"
    )
    blocks = (folder / "students" / "report.md").read_text().split("\n\n")
    print("\n\n".join(block for block in blocks if block.startswith("| network |")))


def _together(
    config: ml_collections.ConfigDict, teacher: str, alpha: float, beta: float
) -> ml_collections.ConfigDict:
    """The config of all students, taught by the teacher of a run."""
    divergences = {
        "forward_kl": dict(fn="forward_kl"),
        "reverse_kl": dict(fn="reverse_kl"),
        "jensen_shannon": dict(fn="jensen_shannon", teacher_weight=0.5),
        "alpha_beta": dict(fn="alpha_beta", alpha=alpha, beta=beta),
    }
    plain = config.to_dict()
    student, labels = plain.pop("student"), plain["teacher"]["terms"]
    plain["teacher"] = {"model": plain["teacher"]["model"]}
    plain["teacher"]["weights"] = dict(fn="run", workdir=teacher)
    plain["labels"] = student | {"terms": labels}
    for name, divergence in divergences.items():
        distill = student["terms"]["distill"] | {"divergence": divergence, "other": "teacher"}
        plain[name] = student | {"terms": {"distill": distill}}
    learn = ("labels", *divergences)
    plain["phases"] = {"distill": {"learn": learn, "see": ("teacher",)}}
    return ml_collections.ConfigDict(plain | {"init_seeds": _SEEDS.value})


if __name__ == "__main__":
    command.run(main)
