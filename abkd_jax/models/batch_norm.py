"""Batch norm with PyTorch's running statistics."""

import math

from flax import linen as nn
from jax import Array


class BatchNorm(nn.BatchNorm):
    """flax's batch norm over all axes but the last; its running variance averages the unbiased one.

    flax averages the biased variance of the batches. The unbiased one is n / (n - 1) times as
    large, for n values a channel in the batch, of all devices under jit. With n = 1, which PyTorch
    refuses, it stays the biased one, 0. What comes out in training is the same, bit by bit.
    """

    def __call__(self, x: Array) -> Array:
        """`[..., C]` normalised, in the dtype; the attributes are those of flax."""
        num_values = math.prod(x.shape[:-1])
        if self.use_running_average or self.is_initializing() or num_values < 2:
            return super().__call__(x)
        before = self.get_variable("batch_stats", "var")
        y = super().__call__(x)
        after = self.get_variable("batch_stats", "var")
        of_batch = after - self.momentum * before  # times 1 - momentum, as it entered the average
        self.put_variable("batch_stats", "var", after + of_batch / (num_values - 1))
        return y
