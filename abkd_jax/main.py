"""The command line: `python -m abkd_jax.main --config=configs/digits.py --workdir=runs/digits`.

The config's argument chooses the loss, `--config=configs/digits.py:divergence=reverse_kl`, and
further flags override single values, `--config.student.optimizer.learning_rate=1e-3`. The same
command goes on where the workdir stands.
"""

import functools
import sys
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from abkd_jax import files
from abkd_jax.config import command
from abkd_jax.run import loop, needs, one_run
from abkd_jax.train import hosts

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run, which is made.")
_EVALUATE = flags.DEFINE_bool("evaluate", False, "Evaluate the newest checkpoints; train nothing.")
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps to workdir/profile.")
_PLAN = flags.DEFINE_string(
    "plan", None, "Say what the config needs, 'here' or on TPUs such as v5e:2x4; train nothing."
)
_PLACE = command.define_fields(hosts.Place, "Of a run of several processes: docs/scaling.md.")
_FLAGS = ("config", "workdir", "evaluate", "profile", "plan", *hosts.Place._fields)
parse = functools.partial(command.parse, known=_FLAGS)


@command.entry
def main() -> None:
    """Runs a config in a workdir, and prints where the report is."""
    if not _CONFIG.value:
        sys.exit("--config is missing; give a config file: --config=configs/digits.py.")
    if _PLAN.value is not None:
        for table in needs.tables(_CONFIG.value, _PLAN.value):
            print(f"{table}\n", flush=True)
        return
    if not _WORKDIR.value:
        sys.exit("--workdir is missing; give the folder of the run: --workdir=runs/digits.")
    how = {"evaluate_only": _EVALUATE.value, "profile": _PROFILE.value}
    hosts.start(_PLACE())
    with hosts.together():
        result = loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value, **how)
    if hosts.is_first():
        _tell(result)


def _tell(result: Mapping[str, Any]) -> None:
    """Prints the scores, and where the report is."""
    score = result["score"]
    for name, network in result["networks"].items():
        found = f"{network['last'][score]:.4f}"
        if "seeds" in network:
            found = f"{network['mean'][score]:.4f} +- {network['deviation'][score]:.4f}"
            found += f" ({len(network['seeds'])} init seeds)"
        published = network.get("published")
        said = "" if published is None else f" (published: {published:.4f})"
        print(f"{name}: {score} {found} on the test set{said}")
    report = files.path_of(_WORKDIR.value) / "report.md"
    print(f"report: {report}" if report.exists() else "Nothing was trained, and no result is kept.")


if __name__ == "__main__":
    if one_run.is_several(sys.argv) and not one_run.is_child():
        sys.exit(one_run.watched([sys.executable, "-m", "abkd_jax.main", *sys.argv[1:]]))
    with command.interruptible():
        command.keep_programs()
        app.run(main, flags_parser=parse)
