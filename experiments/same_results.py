"""Did a change that should change no result change one? The runs of two checkouts, compared.

    python -m experiments.same_results --other=../before

For each network the SHA-256 of its last state and every score are to be the same; else it exits 1.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
from absl import flags

from abkd_jax.config import command

_SHRUNK = [f"{name}.py:runlocal" for name in ("fashion_mnist", "online_fashion_mnist", "cifar100")]
_CONFIGS = [f"configs/{x}" for x in ("digits.py", "digits.py:runlocal", *_SHRUNK)]
_OTHER = flags.DEFINE_string("other", None, "The folder of the other checkout.", required=True)
_WHICH = flags.DEFINE_multi_string("configs", _CONFIGS, "Config files, with their arguments.")


def main() -> None:
    """Runs each config here, then there, and prints a line for each of its networks."""
    checkouts, same = [pathlib.Path(__file__).parents[1], pathlib.Path(_OTHER.value)], True
    for config in _WHICH.value:
        here, there = (networks(checkout.resolve(), config) for checkout in checkouts)
        for name in here | there:
            found = differences(leaves(here.get(name)), leaves(there.get(name)))
            print(f"{config} {name}: {found or 'equal'}", flush=True)
            same &= not found
    sys.exit(not same)


def networks(checkout: pathlib.Path, config: str) -> dict:
    """What result.json says of each network after a run of the config."""
    with tempfile.TemporaryDirectory() as workdir:
        argv = [sys.executable, "-m", "abkd_jax.main", f"--config={config}"]
        env = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
        subprocess.run([*argv, f"--workdir={workdir}"], cwd=checkout, env=env, check=True)
        return json.loads(pathlib.Path(workdir, "result.json").read_text())["networks"]


def leaves(value: object) -> dict[str, object]:
    """{dotted path: leaf}."""
    found = jax.tree.leaves_with_path(value, is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def differences(here: dict, there: dict) -> str:
    """What differs, and of the scores the one that differs most; nothing where all is equal."""
    keys = {key for key in here | there if here.get(key) != there.get(key)}
    both = [k for k in keys if {type(here.get(k)), type(there.get(k))} <= {float, int}]
    found = [(abs(here[key] - there[key]), key) for key in both]
    most = [f"{len(found)} scores, {max(found)[1]} by {max(found)[0]:.2g}"] if found else []
    return ", ".join([*sorted(keys.difference(both))[:5], *most])


if __name__ == "__main__":
    command.run(main)
