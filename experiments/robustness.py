"""The accuracy of a run's networks on its test images, as they are and under attack.

    python -m experiments.robustness --workdir=runs/kdiga

The networks are those that learned in the folder, which may be that of a phase. PGD takes ten steps
of a quarter of the radius from a random start; every image is attacked once.
"""

import functools

import jax
import numpy as np
from absl import flags
from jax import numpy as jnp

from abkd_jax import data, load, metrics
from abkd_jax.config import command, resolve
from abkd_jax.config.weights import read_about
from abkd_jax.run.workdir import path_of

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a run or of one of its phases.", required=True)
_RADIUS = flags.DEFINE_float("radius", 8.0, "Of 255, in each number of a pixel.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 10, "Of PGD.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 10_000, "Of the test images, the first.", lower_bound=1)


def main() -> None:
    """Prints a line for each network."""
    about = read_about(path_of(_WORKDIR.value))
    test = resolve(about["config"]).data().test
    print(f"{'accuracy %':>20} {'clean':>8} {'FGSM':>8} {f'PGD-{_STEPS.value}':>8}")
    for name in about["learners"]:
        loaded, right, count = load(_WORKDIR.value, name), np.zeros(3), 0
        for batch in data.evaluation_batches(test, 200):
            if count < _IMAGES.value:
                right += np.asarray(_right(loaded.module, loaded.variables, batch))
                count += int(np.sum(batch["where"]))
        print(f"{name:>20} " + " ".join(f"{100 * x / count:8.2f}" for x in right), flush=True)


@functools.partial(jax.jit, static_argnums=0)
def _right(module, variables, batch):
    """How many images of a batch are classified right: as they are, after FGSM, after PGD."""
    network = lambda x: module.apply(variables, x, train=False).logits  # noqa: E731
    inputs, radius = batch["inputs"], _RADIUS.value / 255
    inputs = inputs / 255 if inputs.dtype == jnp.uint8 else inputs
    labels, how = jnp.where(batch["where"], batch["labels"], -1), {"radius": radius}
    moved = metrics.fgsm(network, inputs, labels, **how)
    how |= {"key": jax.random.key(0), "step_size": radius / 4, "steps": _STEPS.value}
    stronger = metrics.pgd(network, inputs, labels, **how)
    hits = lambda x: jnp.sum(jnp.argmax(network(x), axis=-1) == labels)  # noqa: E731
    return jnp.stack([hits(inputs), hits(moved), hits(stronger)])


if __name__ == "__main__":
    command.run(main)
