"""The command line: `python -m abkd_jax.main --config=configs/digits.py --workdir=runs/digits`.

The config's argument chooses the loss, `--config=configs/digits.py:divergence=reverse_kl`, and
further flags override single values, `--config.student.optimizer.learning_rate=1e-3`. The same
command goes on where the workdir stands.
"""

import logging
import pathlib
import re
import sys
from collections.abc import Mapping

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from abkd_jax.train import loop
from abkd_jax.types import nearest

_ARGV: list[str] = []  # of `parse`, where the flag --config finds its overrides
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config file, and its argument.", sys_argv=_ARGV
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run, which is made.")
_EVALUATE = flags.DEFINE_bool("evaluate", False, "Evaluate the newest checkpoints; train nothing.")
_PROFILE = flags.DEFINE_bool("profile", False, "Trace a few steps to workdir/profile.")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


def main(argv: list[str]) -> None:
    """Runs a config in a workdir, and prints where the report is."""
    if argv[1:]:
        sys.exit(f"unknown arguments: {' '.join(argv[1:])}; every option starts with --.")
    if not _CONFIG.value:
        sys.exit("--config is missing; give a config file: --config=configs/digits.py.")
    if not _WORKDIR.value:
        sys.exit("--workdir is missing; give the folder of the run: --workdir=runs/digits.")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # of orbax; its errors are raised, too
    sys.unraisablehook = _unraisable
    try:
        result = loop.train_and_evaluate(
            _CONFIG.value,
            _WORKDIR.value,
            evaluate_only=_EVALUATE.value,
            profile=_PROFILE.value,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{error}")
    for name, network in result["networks"].items():
        last = network["last"]
        print(f"{name}: accuracy {last['accuracy']:.2%}, NLL {last['nll']:.4f}, on the test set")
    print(f"report: {_WORKDIR.value}/report.md")


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Python's hook, but for what threads of tensorstore say after a failed write: it is raised."""
    if f"{found.exc_value}" != "Event loop is closed":
        sys.__unraisablehook__(found)


def parse(argv: list[str]) -> list[str]:
    """absl's flag parsing, with one sentence for what cannot be read."""
    overrides = [part for part in argv if _OVERRIDE.match(part)]
    _ARGV[:] = [part for part in argv if part not in overrides]
    rest = _parsed(_ARGV)  # the config as it is in its file, to check overrides against
    if not _CONFIG.value:
        return rest
    for part in overrides:
        _check_override(part, _CONFIG.value)
    _ARGV[:] = argv
    return _parsed(argv)


def _parsed(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        known = ("config", "workdir", "evaluate", "profile")
        sys.exit(
            f"unknown flag --{error.flagname}{nearest(error.flagname, known)}; the flags are "
            f"{', '.join(f'--{name}' for name in known)}, and --config.KEY=VALUE."
        )
    except Exception as error:  # a config file is a program, which may raise anything
        *above, line = f"{error}".strip().splitlines() or [""]
        if isinstance(error, flags.Error) and not above:
            sys.exit(f"{line.removeprefix('flag ').rstrip('.')}; mend this flag.")
        # absl wraps some exceptions of the file: their last line is that of the traceback.
        kind, _, reason = line.partition(": ") if above else (type(error).__name__, "", line)
        if kind == "ValueError":  # a sentence of this library
            sys.exit(f"--config: {reason}")
        sys.exit(f"--config: the file raises {kind} ({reason}); mend it.")
    given = flags.FLAGS["config"]
    path = given.config_filename.partition(":")[0] if given.present else None
    if path is not None and not pathlib.Path(path).is_file():
        sys.exit(f"--config: there is no file {path!r}; give one, such as configs/digits.py.")
    if path is not None and not isinstance(_CONFIG.value, ConfigDict | Mapping):
        sys.exit(f"--config: get_config of {path} must return a ConfigDict.")
    return rest


def _check_override(part: str, config: ConfigDict | None) -> None:
    """Refuses the override of a key that the config does not have."""
    path = _OVERRIDE.match(part)[1]
    group = config
    for key in path.split("."):
        key = key.partition("[")[0]
        known = list(group) if isinstance(group, ConfigDict | Mapping) else []
        if key not in known:
            sys.exit(
                f"--config.{path}: the config has no {key!r} there{nearest(key, known)}"
                f"{'; it has ' + ', '.join(known) if known else ''}."
            )
        group = group[key]


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
