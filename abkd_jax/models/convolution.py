"""Convolutions and batch norms as PyTorch has them: padding, initialisation, running statistics."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax import Array, lax
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.models.batch_norm import BatchNorm

_DTYPES = ("float32", "bfloat16")

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Of the residual networks: He et al., "Delving deep into rectifiers", 2015."""

default_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""PyTorch's own: uniform within 1 / sqrt(fan in)."""


def check_dtype(name: str, dtype: str) -> str:
    """Refuses a type in which no network computes."""
    require(dtype in _DTYPES, f"{name}.dtype", f"one of {', '.join(_DTYPES)}", dtype)
    return dtype


def convolution(
    width: int,
    size: int,
    stride: int = 1,
    *,
    dtype: str,
    groups: int = 1,
    use_bias: bool = False,
    kernel_init: Callable[..., Array] = he_normal,
    name: str,
) -> nn.Module:
    """A convolution with a square kernel of an odd size, padded by half of it on both sides.

    "SAME" would pad the far side alone at stride 2.
    """
    return nn.Conv(
        width,
        (size, size),
        strides=stride,
        padding=size // 2,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        kernel_init=kernel_init,
        conv_general_dilated=_convolved,
        name=name,
    )


def _convolved(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """`lax.conv_general_dilated`; on a CPU, a large batch in 8 parts.

    XLA's gradient of a kernel over a whole batch falls out of the caches there.
    """
    count = math.gcd(len(x), 8) if len(x) >= 64 and jax.local_device_count() == 1 else 1

    def whole(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, *args, **options)

    def in_parts(x: Array, kernel: Array) -> Array:
        return jnp.concatenate([whole(part, kernel) for part in jnp.split(x, count)])

    if count == 1:
        return whole(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=in_parts, default=whole)


def batch_norm(train: bool, dtype: str, name: str) -> nn.Module:
    """Batch norm with PyTorch's numbers; in training by the statistics of the batch."""
    dtype = jnp.dtype(dtype)
    return BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype, name=name)


class ConvNorm(nn.Module):
    """A convolution, and batch norm.

    Attributes:
        width: of its output.
        size: of the kernel, odd.
        stride: of the kernel.
        dtype: of the computation.
        groups: of channels that do not see each other.
        use_bias: whether the convolution adds one.
        kernel_init: (key, shape) -> the first kernel.
    """

    width: int
    size: int
    stride: int
    dtype: str
    groups: int = 1
    use_bias: bool = False
    kernel_init: Callable[..., Array] = he_normal

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), width]`."""
        options = {"groups": self.groups, "use_bias": self.use_bias, "dtype": self.dtype}
        options |= {"kernel_init": self.kernel_init, "name": "conv"}
        x = convolution(self.width, self.size, self.stride, **options)(x)
        return batch_norm(train, self.dtype, "norm")(x)


def default_linear(width: int) -> dict[str, Callable[..., Array]]:
    """PyTorch's initialisation of a linear map of that many inputs: uniform, the bias too."""
    bound = width**-0.5

    def uniform(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": uniform, "bias_init": uniform}


def shuffled(x: Array, groups: int) -> Array:
    """Channels `[..., C]` in another order: the first of each group, then the second of each, ...

    Source: Zhang et al., "ShuffleNet", CVPR 2018.
    """
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return parts.swapaxes(-1, -2).reshape(x.shape)


def pooled(x: Array) -> Array:
    """The mean over positions, `[B, H, W, C]` to `[B, C]` in float32."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def named(ours: str, conv: str, norm: str) -> dict[str, str]:
    """PyTorch's names of the parts of a `ConvNorm`."""
    return {f"{ours}.conv": conv, f"{ours}.norm": norm}
