"""How fast the device is at divergences, at training and at sweeps, each against its peers.

    python -m experiments.accelerator --out=runs/accelerator

On any device that JAX has: a CPU, a GPU, a TPU. The rows come in a fixed order. In a row all that
is compared takes turns, in one process; peers that are not installed (torch, Liger's kernels) are
skipped by name. Each row is kept in OUT/rows.jsonl when it is done, and OUT/accelerator.md, a table
for each part, is written anew. After --minutes no row is begun: the same command goes on, and a
command that is killed loses one row. What cannot be measured, because memory is short or a program
does not compile, is a row with the reason.
"""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's idle threads slow down the rest
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too

import jax
from absl import flags

from abkd_jax import files
from abkd_jax.config import command
from abkd_jax.run.workdir import locked
from experiments.accelerator import divergences, language, training
from experiments.accelerator.rows import Ledger, Part, Row, answers, eta, measured

_OUT = flags.DEFINE_string("out", None, "The folder of the rows and of the page.", required=True)
_MINUTES = flags.DEFINE_float("minutes", 9.0, "No row is begun after these.", lower_bound=0.0)
_RUNLOCAL = flags.DEFINE_bool("runlocal", False, "Tiny rows, to see that the command works.")
_PARTS = {"divergences": divergences.part, "pair": training.pair, "sweep": training.sweep}
_PARTS |= {"vocabulary": language.vocabulary, "decoders": language.decoders}
_WHICH = flags.DEFINE_multi_enum("part", [*_PARTS], [*_PARTS], "Some parts alone.")
_PACKAGES = ("jax", "jaxlib", "torch", "liger_kernel")
_PAGE = "accelerator.md"
_SECONDS = 30.0  # of a row's rounds


def main() -> None:
    """Measures the rows that are missing, and writes the page after each."""
    folder, small = pathlib.Path(_OUT.value), _RUNLOCAL.value
    until = time.monotonic() + 60 * _MINUTES.value
    parts = {name: _PARTS[name](small=small) for name in _PARTS}  # the page has all of them
    with locked(folder):
        ledger = Ledger(folder, identity())
        names = [name for name in parts if name in _WHICH.value]
        rows = [(x, row) for x in names for row in parts[x].rows if row.name not in ledger.found]
        took = {name: [] for name in names}
        for index, (name, row) in enumerate(rows):
            write(folder, ledger, parts.values())
            started = time.monotonic()
            if started > until:
                print(f"{len(rows) - index} rows are left; the same command goes on with them.")
                return
            failed = measure(row, ledger)
            took[name].append(time.monotonic() - started)
            left = eta(took, [part for part, _ in rows[index + 1 :]])
            told = "".join(f"; {arm}: {why}" for arm, why in failed.items())
            print(f"{row.name}: {took[name][-1]:.0f} s; {left}{told}", file=sys.stderr)
        write(folder, ledger, parts.values())
    print(f"{folder / _PAGE}")


def measure(row: Row, ledger: Ledger) -> dict[str, str]:
    """Times a row and keeps it; {arm: why it has no time}."""
    ended = {"all": "it ended the process, more than once"}
    found = {"seconds": {}, "failed": ended, "facts": dict(row.facts)}
    with ledger.attempt(row.name) as again:
        if again:
            found = measured(row, seconds=0.1 if _RUNLOCAL.value else _SECONDS)
    if found["failed"] and not answers():
        raise ValueError(f"{row.name}: the device no longer answers; the same command goes on.")
    ledger.add(row.name, found)
    return found["failed"]


def identity() -> dict[str, str]:
    """The device and the versions by which rows belong together."""
    devices = jax.local_devices()
    found = {"device": f"{len(devices)} x {devices[0].device_kind}", "driver": _driver()}
    if jax.default_backend() == "cpu":
        found["device"] = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    return found | {name: _version(name) for name in _PACKAGES} | {"runlocal": f"{_RUNLOCAL.value}"}


def write(folder: pathlib.Path, ledger: Ledger, parts: Iterable[Part]) -> None:
    """Writes the page."""
    told = "; ".join(f"{name} {value}" for name, value in ledger.identity.items())
    sections = [f"# Speed by device\n\n`python -m experiments.accelerator`: {told}."]
    for part in parts:
        found = {x.name: ledger.found[x.name] for x in part.rows if x.name in ledger.found}
        left = len(part.rows) - len(found)
        missing = f"\n\nNot measured yet: {left} of {len(part.rows)} rows." if left else ""
        sections.append(f"## {part.title}\n\n{part.text}{missing}\n\n{part.table(found)}")
    files.write(folder / _PAGE, ("\n\n".join(sections) + "\n").encode())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The driver of a GPU, of what else there is the platform's version."""
    if jax.default_backend() == "gpu" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        return (done.stdout.splitlines() or ["unknown"])[0]
    return jax.local_devices()[0].client.platform_version.splitlines()[0]


if __name__ == "__main__":
    command.run(main)
