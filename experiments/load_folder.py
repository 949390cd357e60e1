"""What it takes to read a decoder out of a Hugging Face folder: seconds, and memory at its peak.

python -m experiments.load_folder --folder=DIR
"""

import resource
import sys
import time

import jax
from absl import flags
from jax import numpy as jnp

from abkd_jax import Tokens, models
from abkd_jax.config import command

_FOLDER = flags.DEFINE_string("folder", None, "Of the model.", required=True)
_PARAM_DTYPE = flags.DEFINE_enum("param_dtype", "float32", ["float32", "bfloat16"], "Of it.")


def main() -> None:
    """Prints both, and the ratio of the peak to the parameters."""
    models.decoder(num_classes=2, width=2, layers=1, heads=1).init(  # what all programs load
        jax.random.key(0), Tokens(*jnp.zeros((3, 1, 1), int)), train=False
    )
    before, start = _peak(), time.perf_counter()
    _, variables = models.load_decoder(_FOLDER.value, param_dtype=_PARAM_DTYPE.value)
    seconds = time.perf_counter() - start
    size, peak = sum(x.nbytes for x in jax.tree.leaves(variables)) / 1e6, _peak() - before
    print(f"parameters {size:.0f} MB, read in {seconds:.1f} s; peak above the process before:")
    print(f"{peak:.0f} MB, ratio {peak / size:.2f}")


def _peak() -> float:
    """The most memory that the process has had, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    command.run(main)
