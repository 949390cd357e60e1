"""Residual networks: those for 32x32 images, and those of ImageNet."""

from flax import linen as nn
from jax import Array

from abkd_jax.checks import require
from abkd_jax.models.convolution import ConvNorm, check_dtype, default_linear, named, pooled
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs

_IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # blocks of each stage
_EXPANSION = 4  # of a bottleneck


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
        A flax module; its features are "stem", the stages' outputs "stage0", "stage1" and "stage2",
        and these before their rectifiers, "stage0_preactivation", ...

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016; Tian et al.,
    "Contrastive representation distillation", ICLR 2020.
    """
    whole_stages = depth >= 8 and depth % 6 == 2
    require(whole_stages, "resnet.depth", "6 n + 2, such as 8, 20 or 56", depth)
    four = len(widths) == 4 and all(width > 0 for width in widths)
    require(four, "resnet.widths", "four, at least 1 each", widths)
    blocks, dtype = ((depth - 2) // 6,) * 3, check_dtype("resnet", dtype)
    return ResNet(num_classes=num_classes, blocks=blocks, widths=tuple(widths), dtype=dtype)


def imagenet_resnet(
    *, num_classes: int, depth: int, small_images: bool = False, dtype: str = "float32"
) -> nn.Module:
    """ResNet-18, 34 or 50 as torchvision has them, and for small images as CRD's benchmark does.

    Four stages of basic blocks, or from depth 50 on of bottlenecks whose 3x3 convolution has the
    stride, after a 7x7 convolution of stride 2 and a 3x3 maximum of stride 2; for small images
    after a 3x3 convolution of stride 1. Parameters for 1,000 classes, 100 of small images:

        18  11,689,512  11,220,132
        34  21,797,672  21,328,292
        50  25,557,032  23,705,252

    Args:
        num_classes: K.
        depth: 18, 34 or 50.
        small_images: whether they are as small as 32x32.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are those of `resnet`, of four stages.

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016.
    """
    require(depth in _IMAGENET, "imagenet_resnet.depth", f"one of {[*_IMAGENET]}", depth)
    return ResNet(
        num_classes=num_classes,
        blocks=_IMAGENET[depth],
        widths=(64, 64, 128, 256, 512),
        dtype=check_dtype("imagenet_resnet", dtype),
        bottleneck=depth >= 50,
        large_images=not small_images,
    )


class ResNet(nn.Module):
    """See `resnet` and `imagenet_resnet`.

    Attributes:
        num_classes: K.
        blocks: of each stage, how many.
        widths: of the first convolution and of the stages.
        dtype: of the computation.
        bottleneck: whether blocks are bottlenecks, whose outputs are four times as wide.
        large_images: whether the network begins by a quarter of their height and width.
    """

    num_classes: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    dtype: str
    bottleneck: bool = False
    large_images: bool = False

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        stem, *stages = self.widths
        size, stride = (7, 2) if self.large_images else (3, 1)
        x = nn.relu(ConvNorm(stem, size, stride, self.dtype, name="stem")(inputs, train=train))
        features = {"stem": x}
        if self.large_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, (width, blocks) in enumerate(zip(stages, self.blocks, strict=True)):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage}_block{index}"
                block = Block(width, stride, self.dtype, self.bottleneck, name=name)
                preactivation = block(x, train=train)
                x = nn.relu(preactivation)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": preactivation}
        hidden = pooled(x)
        head = OutputLayer(self.num_classes, **default_linear(hidden.shape[-1]), name="head")
        return head(hidden, features)

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers: in CRD and torchvision, and in CRD's ResNet-50."""
        return self._names("downsample", "fc"), self._names("shortcut", "linear")

    def _names(self, shortcut: str, head: str) -> dict[str, str]:
        names = named("stem", "conv1", "bn1") | {"head": head}
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                ours, theirs = f"stage{stage}_block{index}", f"layer{stage + 1}.{index}"
                for number, name in enumerate(("first", "second", "third"), start=1):
                    names |= named(
                        f"{ours}.{name}", f"{theirs}.conv{number}", f"{theirs}.bn{number}"
                    )
                parts = f"{theirs}.{shortcut}.0", f"{theirs}.{shortcut}.1"
                names |= named(f"{ours}.shortcut", *parts)
        return names


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of three, and a shortcut around them.

    Attributes:
        width: of its 3x3 convolutions.
        stride: of the first of these and of the shortcut.
        dtype: of the computation.
        bottleneck: whether 1x1 convolutions stand around the only 3x3 one.
    """

    width: int
    stride: int
    dtype: str
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), D]`, before its rectifier."""
        width, stride = self.width, self.stride
        layers = [("first", width, 3, stride), ("second", width, 3, 1)]
        if self.bottleneck:
            layers = [("first", width, 1, 1), ("second", width, 3, stride)]
            layers += [("third", _EXPANSION * width, 1, 1)]
        y = x
        for index, (name, width, size, stride) in enumerate(layers):
            y = nn.relu(y) if index else y
            y = ConvNorm(width, size, stride, self.dtype, name=name)(y, train=train)
        if x.shape != y.shape:
            shortcut = ConvNorm(y.shape[-1], 1, self.stride, self.dtype, name="shortcut")
            x = shortcut(x, train=train)
        return x + y
