"""ShuffleNets for 32x32 images."""

from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from abkd_jax.binding import Positive
from abkd_jax.checks import require
from abkd_jax.models.convolution import (
    ConvNorm,
    check_dtype,
    default_kernel,
    default_linear,
    named,
    pooled,
    shuffled,
)
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs

_STEM = 24  # channels
_V1 = ((240, 4), (480, 8), (960, 4))  # of the stages: channels and blocks
_GROUPS = 3
_V2 = {  # of each size: the stages' channels, and those of the last convolution
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (224, 488, 976, 2048),
}
_BLOCKS_V2 = (4, 8, 4)


def shufflenet_v1(*, num_classes: int, dtype: str = "float32") -> nn.Module:
    """ShuffleNet of three groups for CIFAR, as in the model zoo of CRD.

    949,258 parameters for 100 classes.

    Args:
        num_classes: K.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are "stem", the stages' outputs "stage0", "stage1" and "stage2",
        and these before their rectifiers, "stage0_preactivation", ...

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: Zhang et al., "ShuffleNet", CVPR 2018; Tian et al., "Contrastive representation
    distillation", ICLR 2020.
    """
    return ShuffleNetV1(num_classes=num_classes, dtype=check_dtype("shufflenet_v1", dtype))


def shufflenet_v2(*, num_classes: int, size: Positive = 1.0, dtype: str = "float32") -> nn.Module:
    """ShuffleNetV2 for CIFAR, as in the model zoo of CRD; 1,355,528 parameters for 100 classes.

    Args:
        num_classes: K.
        size: 0.5, 1, 1.5 or 2: how wide it is.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are those of `shufflenet_v1`. Before the rectifier is the part
        of the last block that has one, beside the other part, unshuffled.

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: Ma et al., "ShuffleNet V2", ECCV 2018; Tian et al., "Contrastive representation
    distillation", ICLR 2020.
    """
    size = round(float(size), 6)
    require(size in _V2, "shufflenet_v2.size", f"one of {[*_V2]}", size)
    dtype = check_dtype("shufflenet_v2", dtype)
    return ShuffleNetV2(num_classes=num_classes, size=size, dtype=dtype)


class ShuffleNetV1(nn.Module):
    """See `shufflenet_v1`."""

    num_classes: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        stem = _pointwise(_STEM, self.dtype, "stem")
        x = nn.relu(stem(inputs, train=train))
        features = {"stem": x}
        for stage, (width, blocks) in enumerate(_V1):
            for index in range(blocks):
                block = GroupedBlock(width, index == 0, self.dtype, name=f"stage{stage}_{index}")
                preactivation = block(x, train=train)
                x = nn.relu(preactivation)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": preactivation}
        hidden = pooled(x)
        head = OutputLayer(self.num_classes, **default_linear(hidden.shape[-1]), name="head")
        return head(hidden, features)

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers in CRD."""
        names = named("stem", "conv1", "bn1") | {"head": "linear"}
        for stage, (_, blocks) in enumerate(_V1):
            names |= _block_names(stage, blocks, ("reduce", "depthwise", "expand"))
        return (names,)


class ShuffleNetV2(nn.Module):
    """See `shufflenet_v2`."""

    num_classes: int
    size: float
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        *widths, last = _V2[self.size]
        x = nn.relu(_pointwise(_STEM, self.dtype, "stem")(inputs, train=train))
        features = {"stem": x}
        for stage, (width, blocks) in enumerate(zip(widths, _BLOCKS_V2, strict=True)):
            x = HalvingBlock(width, self.dtype, name=f"stage{stage}_0")(x, train=train)
            for index in range(1, blocks):
                block = SplitBlock(self.dtype, name=f"stage{stage}_{index}")
                x, preactivation = block(x, train=train)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": preactivation}
        hidden = pooled(nn.relu(_pointwise(last, self.dtype, "last")(x, train=train)))
        head = OutputLayer(self.num_classes, **default_linear(hidden.shape[-1]), name="head")
        return head(hidden, features)

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers in CRD."""
        names = named("stem", "conv1", "bn1") | named("last", "conv2", "bn2") | {"head": "linear"}
        halving = ("left_depthwise", "left", "reduce", "depthwise", "expand")
        for stage, blocks in enumerate(_BLOCKS_V2):
            names |= _block_names(stage, blocks, ("reduce", "depthwise", "expand"))
            names |= _block_names(stage, 1, halving)
        return (names,)


class GroupedBlock(nn.Module):
    """ShuffleNet's block: grouped 1x1 convolutions around a 3x3 one in each channel.

    Attributes:
        width: of its output.
        halves: whether it halves the positions; its input is then part of its output.
        dtype: of the computation.
    """

    width: int
    halves: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, H, W, width]`, or half as high and wide; before its rectifier."""
        channels = x.shape[-1]
        width = self.width - channels if self.halves else self.width
        inner, stride = width // 4, 2 if self.halves else 1
        groups = 1 if channels == _STEM else _GROUPS
        y = _pointwise(inner, self.dtype, "reduce", groups=groups)(x, train=train)
        y = shuffled(nn.relu(y), groups)
        y = _depthwise(inner, stride, self.dtype, "depthwise")(y, train=train)
        y = _pointwise(width, self.dtype, "expand", groups=_GROUPS)(nn.relu(y), train=train)
        if not self.halves:
            return y + x
        x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return jnp.concatenate([y, x], axis=-1)


class SplitBlock(nn.Module):
    """ShuffleNetV2's block: half of the channels pass, the others are convolved.

    Attributes:
        dtype: of the computation.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        """`[B, H, W, C]` to the same shape, shuffled, and before rectifier and shuffling."""
        half = x.shape[-1] // 2
        passing, y = x[..., :half], x[..., half:]
        y = nn.relu(_pointwise(half, self.dtype, "reduce")(y, train=train))
        y = _depthwise(half, 1, self.dtype, "depthwise")(y, train=train)
        y = _pointwise(half, self.dtype, "expand")(y, train=train)
        preactivation = jnp.concatenate([passing, y], axis=-1)
        return shuffled(jnp.concatenate([passing, nn.relu(y)], axis=-1), 2), preactivation


class HalvingBlock(nn.Module):
    """ShuffleNetV2's block that halves height and width.

    Attributes:
        width: of its output.
        dtype: of the computation.
    """

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, ceil(H / 2), ceil(W / 2), width]`."""
        half = self.width // 2
        left = _depthwise(x.shape[-1], 2, self.dtype, "left_depthwise")(x, train=train)
        left = nn.relu(_pointwise(half, self.dtype, "left")(left, train=train))
        y = nn.relu(_pointwise(half, self.dtype, "reduce")(x, train=train))
        y = _depthwise(half, 2, self.dtype, "depthwise")(y, train=train)
        y = nn.relu(_pointwise(half, self.dtype, "expand")(y, train=train))
        return shuffled(jnp.concatenate([left, y], axis=-1), 2)


def _pointwise(width: int, dtype: str, name: str, *, groups: int = 1) -> nn.Module:
    return ConvNorm(width, 1, 1, dtype, groups, kernel_init=default_kernel, name=name)


def _depthwise(width: int, stride: int, dtype: str, name: str) -> nn.Module:
    return ConvNorm(width, 3, stride, dtype, width, kernel_init=default_kernel, name=name)


def _block_names(stage: int, blocks: int, layers: tuple[str, ...]) -> dict[str, str]:
    """PyTorch's names of the layers of a stage's first blocks."""
    names = {}
    for index in range(blocks):
        for number, layer in enumerate(layers, start=1):
            theirs = f"layer{stage + 1}.{index}"
            parts = f"{theirs}.conv{number}", f"{theirs}.bn{number}"
            names |= named(f"stage{stage}_{index}.{layer}", *parts)
    return names
