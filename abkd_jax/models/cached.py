"""A network of which nothing is there but its outputs for the examples."""

from typing import Any

from flax import linen as nn

from abkd_jax.types import Outputs


def cached(*, num_classes: int, path: str = "") -> nn.Module:
    """A network whose outputs were computed elsewhere: a teacher of any framework.

    A run takes them wherever it would call the network. It is frozen; its examples are those of the
    run as they are, without augmentation.

    Args:
        num_classes: K.
        path: of a file that `data.save_outputs` wrote; "" for outputs that come with the data
            (`Split.outputs`).

    Returns:
        A flax module that stands for it.
    """
    return Cached(num_classes, path)


class Cached(nn.Module):
    """See `cached`."""

    num_classes: int
    file: str

    def __call__(self, inputs: Any, *, train: bool) -> Outputs:
        """There is nothing to be called: raises a RuntimeError."""
        raise RuntimeError("a cached network has outputs for the examples of a run alone.")
