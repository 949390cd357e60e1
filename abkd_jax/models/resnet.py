"""The residual networks for 32x32 images."""

import functools

import jax
from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.models.batch_norm import BatchNorm
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs

_DTYPES = ("float32", "bfloat16")


def resnet(
    *,
    num_classes: int,
    depth: int,
    widths: tuple[int, ...] = (16, 16, 32, 64),
    dtype: str = "float32",
) -> nn.Module:
    """A ResNet for CIFAR, as in the model zoo of CRD, where most papers take their pairs from.

    A 3x3 convolution, three stages of (depth - 2) / 6 basic blocks with strides 1, 2, 2, the mean
    over positions and a linear map. A block whose input has another shape than its output has a
    1x1 convolution with batch norm on its shortcut. Parameters for 100 classes:

        resnet8    83,892    resnet44      667,188    resnet8x4   1,233,540
        resnet14  181,108    resnet56      861,620    resnet32x4  7,433,860
        resnet20  278,324    resnet110   1,736,564
        resnet32  472,756

    where `x4` stands for widths (32, 64, 128, 256). Initialisation, padding and batch norm, its
    running statistics included, are those of PyTorch.

    Args:
        num_classes: K.
        depth: 6 n + 2.
        widths: of the first convolution and of the three stages.
        dtype: of convolutions and of what batch norm gives, "float32" or "bfloat16". Parameters,
            batch statistics, `hidden` and logits are float32 in either case.

    Returns:
        A flax module; its features "stage0", "stage1" and "stage2" are the stages' outputs, after
        their rectifiers.

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016; Tian et al.,
    "Contrastive representation distillation", ICLR 2020.
    """
    whole_stages = depth >= 8 and depth % 6 == 2
    require(whole_stages, "resnet.depth", "6 n + 2, such as 8, 20 or 56", depth)
    four = len(widths) == 4 and all(width > 0 for width in widths)
    require(four, "resnet.widths", "four, at least 1 each", widths)
    require(dtype in _DTYPES, "resnet.dtype", f"one of {', '.join(_DTYPES)}", dtype)
    return ResNet(num_classes=num_classes, depth=depth, widths=tuple(widths), dtype=dtype)


class ResNet(nn.Module):
    """See `resnet`."""

    num_classes: int
    depth: int
    widths: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        stem, *stages = self.widths
        x = nn.relu(ConvNorm(stem, 3, 1, self.dtype, name="stem")(inputs, train=train))
        features = {}
        for stage, width in enumerate(stages):
            for index in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and index == 0 else 1
                block = Block(width, stride, self.dtype, name=f"stage{stage}_block{index}")
                x = block(x, train=train)
            features[f"stage{stage}"] = x
        hidden = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        init = functools.partial(_uniform, bound=stages[-1] ** -0.5)
        head = OutputLayer(self.num_classes, kernel_init=init, bias_init=init, name="head")
        return head(hidden, features)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    Attributes:
        width: of its output.
        stride: of its first convolution and of its shortcut.
        dtype: of the computation.
    """

    width: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), width]`."""
        y = ConvNorm(self.width, 3, self.stride, self.dtype, name="first")(x, train=train)
        y = ConvNorm(self.width, 3, 1, self.dtype, name="second")(nn.relu(y), train=train)
        if x.shape != y.shape:
            shortcut = ConvNorm(self.width, 1, self.stride, self.dtype, name="shortcut")
            x = shortcut(x, train=train)
        return nn.relu(x + y)


class ConvNorm(nn.Module):
    """A convolution without bias, and batch norm.

    Attributes:
        width: of its output.
        size: of the kernel, odd.
        stride: of the kernel.
        dtype: of the computation.
    """

    width: int
    size: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), width]`."""
        dtype = jnp.dtype(self.dtype)
        x = nn.Conv(
            self.width,
            (self.size, self.size),
            strides=self.stride,
            padding=self.size // 2,  # both sides alike; "SAME" pads only the far one at stride 2
            use_bias=False,
            dtype=dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)
        norm = BatchNorm(
            use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name="norm"
        )
        return norm(x)


def _uniform(key: Array, shape: tuple[int, ...], dtype=jnp.float32, *, bound: float) -> Array:
    """The initialisation of PyTorch's linear layer, kernel and bias, for bound = D^-1/2."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)
