"""MobileNets: the first one, of ImageNet, and the second one for 32x32 images."""

from flax import linen as nn
from jax import Array

from abkd_jax.binding import Positive
from abkd_jax.checks import require
from abkd_jax.models.convolution import (
    ConvNorm,
    check_dtype,
    default_kernel,
    default_linear,
    named,
    pooled,
)
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs

# Of MobileNetV1's blocks: width and stride; and which of them end a stage.
_SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5)
_SEPARABLE += ((1024, 2), (1024, 1))
_ENDS_V1 = (2, 4, 10, 12)
# Of MobileNetV2's groups of blocks: whether they expand, width, blocks, stride; likewise.
_INVERTED = (
    (False, 16, 1, 1),
    (True, 24, 2, 1),
    (True, 32, 3, 2),
    (True, 64, 4, 2),
    (True, 96, 3, 1),
    (True, 160, 3, 2),
    (True, 320, 1, 1),
)
_ENDS_V2 = (1, 2, 4, 6)
_LAST = 1280  # channels of MobileNetV2's last convolution


def mobilenet_v1(*, num_classes: int, dtype: str = "float32") -> nn.Module:
    """MobileNet of width 1 for ImageNet: 4,231,976 parameters for 1,000 classes.

    Args:
        num_classes: K.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are "stem", the outputs of the last blocks with a half, a
        quarter, ... of the positions, "stage0" to "stage3", and these before their rectifiers,
        "stage0_preactivation", ...

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: Howard et al., "MobileNets", 2017, https://arxiv.org/abs/1704.04861.
    """
    return MobileNetV1(num_classes=num_classes, dtype=check_dtype("mobilenet_v1", dtype))


def mobilenet_v2(
    *, num_classes: int, width: Positive = 0.5, expansion: int = 6, dtype: str = "float32"
) -> nn.Module:
    """MobileNetV2 for CIFAR, as in the model zoo of CRD, whose MobileNetV2 has half the width.

    The first convolution has stride 2, and 32x32 images end as 2x2. 812,836 parameters for 100
    classes.

    Args:
        num_classes: K.
        width: factor of all channels but those of the last convolution, which it makes wider alone.
        expansion: of the blocks' inner channels.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are "stem" and the outputs of the second, third, fifth and last
        group of blocks, "stage0" to "stage3", which have no rectifier.

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: Sandler et al., "MobileNetV2", CVPR 2018; Tian et al., "Contrastive representation
    distillation", ICLR 2020.
    """
    width = round(float(width), 6)  # as it was written, before it was single precision
    require(width >= 1 / 16, "mobilenet_v2.width", "at least 1/16", width)
    require(expansion >= 1, "mobilenet_v2.expansion", "at least 1", expansion)
    options = {"width": width, "expansion": expansion}
    dtype = check_dtype("mobilenet_v2", dtype)
    return MobileNetV2(num_classes=num_classes, dtype=dtype, **options)


class MobileNetV1(nn.Module):
    """See `mobilenet_v1`."""

    num_classes: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        options = {"dtype": self.dtype, "kernel_init": default_kernel}
        x = nn.relu(ConvNorm(32, 3, 2, **options, name="stem")(inputs, train=train))
        features = {"stem": x}
        for index, (width, stride) in enumerate(_SEPARABLE):
            channels, name = x.shape[-1], f"block{index}"
            depthwise = ConvNorm(
                channels, 3, stride, groups=channels, **options, name=f"{name}_depthwise"
            )
            pointwise = ConvNorm(width, 1, 1, **options, name=f"{name}_pointwise")
            preactivation = pointwise(nn.relu(depthwise(x, train=train)), train=train)
            x = nn.relu(preactivation)
            if index in _ENDS_V1:
                stage = f"stage{_ENDS_V1.index(index)}"
                features |= {stage: x, f"{stage}_preactivation": preactivation}
        hidden = pooled(x)
        head = OutputLayer(self.num_classes, **default_linear(hidden.shape[-1]), name="head")
        return head(hidden, features)

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers in mdistiller, whose layers are numbered.

        timm's network of this name has other rectifiers.
        """
        names = named("stem", "model.0.0", "model.0.1") | {"head": "fc"}
        for index in range(len(_SEPARABLE)):
            for at, part in enumerate(("depthwise", "pointwise")):
                parts = f"model.{index + 1}.{3 * at}", f"model.{index + 1}.{3 * at + 1}"
                names |= named(f"block{index}_{part}", *parts)
        return (names,)


class MobileNetV2(nn.Module):
    """See `mobilenet_v2`."""

    num_classes: int
    width: float
    expansion: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        stem = ConvNorm(int(32 * self.width), 3, 2, self.dtype, name="stem")
        x = nn.relu(stem(inputs, train=train))
        features = {"stem": x}
        for group, (expands, width, blocks, stride) in enumerate(_INVERTED):
            for index in range(blocks):
                block = InvertedResidual(
                    int(width * self.width),
                    1 if index else stride,
                    self.expansion if expands else 1,
                    self.dtype,
                    name=f"group{group}_block{index}",
                )
                x = block(x, train=train)
            if group in _ENDS_V2:
                features[f"stage{_ENDS_V2.index(group)}"] = x
        last = ConvNorm(int(_LAST * max(self.width, 1.0)), 1, 1, self.dtype, name="last")
        hidden = pooled(nn.relu(last(x, train=train)))
        init = nn.initializers.normal(0.01)
        return OutputLayer(self.num_classes, kernel_init=init, name="head")(hidden, features)

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers in CRD."""
        names = named("stem", "conv1.0", "conv1.1") | named("last", "conv2.0", "conv2.1")
        names["head"] = "classifier.0"
        for group, (_, _, blocks, _) in enumerate(_INVERTED):
            for index in range(blocks):
                ours, theirs = f"group{group}_block{index}", f"blocks.{group}.{index}.conv"
                for at, part in enumerate(("expand", "depthwise", "project")):
                    parts = f"{theirs}.{3 * at}", f"{theirs}.{3 * at + 1}"
                    names |= named(f"{ours}.{part}", *parts)
        return (names,)


class InvertedResidual(nn.Module):
    """A 1x1 convolution to more channels, a 3x3 one in each of them, and a linear 1x1 one to few.

    Attributes:
        width: of its output.
        stride: of the 3x3 convolution.
        expansion: of its channels.
        dtype: of the computation.
    """

    width: int
    stride: int
    expansion: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), width]`."""
        inner = x.shape[-1] * self.expansion
        y = nn.relu(ConvNorm(inner, 1, 1, self.dtype, name="expand")(x, train=train))
        depthwise = ConvNorm(inner, 3, self.stride, self.dtype, groups=inner, name="depthwise")
        y = nn.relu(depthwise(y, train=train))
        y = ConvNorm(self.width, 1, 1, self.dtype, name="project")(y, train=train)
        return x + y if self.stride == 1 and x.shape == y.shape else y
