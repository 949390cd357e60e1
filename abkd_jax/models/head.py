"""The linear map to logits, which shows its parts to losses."""

from collections.abc import Callable, Mapping

from flax import linen as nn
from jax import Array

from abkd_jax.types import Head, Outputs


class OutputLayer(nn.Module):
    """A dense layer that returns all that losses may want to know of it, at no cost.

    Attributes:
        num_classes: K.
        kernel_init: (key, shape) -> the first kernel.
        bias_init: (key, shape) -> the first bias.
    """

    num_classes: int
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, hidden: Array, features: Mapping[str, Array]) -> Outputs:
        """`[..., D]`, and the arrays on the way to it, to `Outputs` with logits `[..., K]`."""
        shape = (hidden.shape[-1], self.num_classes)
        head = Head(
            unembedding=self.param("kernel", self.kernel_init, shape),
            bias=self.param("bias", self.bias_init, shape[-1:]),
        )
        return Outputs(logits=head(hidden), hidden=hidden, head=head, features=features)
