"""A network of tests that leaves its logits unformed, a plugin, as decoders do."""

from flax import linen as nn

from abkd_jax import models
from abkd_jax.types import Outputs


def unformed_mlp(*, num_classes: int, forms: bool = False) -> nn.Module:
    """An MLP that shows hidden and head in place of the logits, unless it forms them."""
    return Unformed(models.mlp(num_classes=num_classes, widths=(8,)), forms)


class Unformed(nn.Module):
    """See `unformed_mlp`."""

    network: nn.Module
    forms: bool

    def __call__(self, inputs, *, train: bool) -> Outputs:
        outputs = self.network(inputs, train=train)
        return outputs if self.forms else outputs.replace(logits=None)
