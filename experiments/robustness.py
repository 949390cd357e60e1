"""The accuracy on test images, as they are and under attack, of the networks that a run trained.

    python -m experiments.robustness --config=configs/digits.py:method=kdiga --workdir=runs/kdiga

The run is trained if it is not there. PGD takes ten steps of a quarter of the radius from a random
start; every image is attacked once.
"""

import functools

import jax
import numpy as np
from absl import flags
from jax import numpy as jnp

from abkd_jax import data, files, load, metrics, train_and_evaluate
from abkd_jax.config import command, resolve

_CONFIG = command.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run.", required=True)
_RADIUS = flags.DEFINE_float("radius", 8.0, "Of 255, in each number of a pixel.", lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 10, "Of PGD.", lower_bound=1)


def main() -> None:
    """Prints a line for each network that learns, of several seeds for the first."""
    train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    plan = resolve(_CONFIG.value)
    test = plan.data().test
    print(f"{'accuracy %':<16}{'clean':>8}{'FGSM':>8}{f'PGD-{_STEPS.value}':>8}")
    for phase in plan.phases:
        for name in phase.learners:
            loaded = load(files.path_of(_WORKDIR.value) / phase.folder, name)
            right = sum(
                np.asarray(_right(loaded.module, loaded.variables, batch))
                for batch in data.evaluation_batches(test, 200)
            )
            cells = "".join(f"{100 * x / len(test):8.2f}" for x in right)
            print(f"{name:<16}{cells}", flush=True)


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
