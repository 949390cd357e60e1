"""Wide residual networks, whose blocks normalise before they convolve."""

from flax import linen as nn
from jax import Array

from abkd_jax.checks import require
from abkd_jax.models.convolution import (
    batch_norm,
    check_dtype,
    convolution,
    default_linear,
    pooled,
)
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs


def wide_resnet(
    *, num_classes: int, depth: int, widening: int, dtype: str = "float32"
) -> nn.Module:
    """A WRN for CIFAR, as in the model zoo of CRD.

    A 3x3 convolution, three stages of (depth - 4) / 6 blocks with strides 1, 2, 2, a batch norm,
    the mean over positions and a linear map. Parameters for 100 classes:

        wrn-16-1  180,916    wrn-16-2    703,284
        wrn-40-1  569,780    wrn-40-2  2,255,156

    Args:
        num_classes: K.
        depth: 6 n + 4.
        widening: the stages have 16, 32 and 64 channels times this.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are "stem", the stages' outputs "stage0", ..., which are sums,
        and the norms of these that the next rectifiers see, "stage0_preactivation", ...

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016.
    """
    whole_stages = depth >= 10 and depth % 6 == 4
    require(whole_stages, "wide_resnet.depth", "6 n + 4, such as 16 or 40", depth)
    require(widening >= 1, "wide_resnet.widening", "at least 1", widening)
    options = {"depth": depth, "widening": widening, "dtype": check_dtype("wide_resnet", dtype)}
    return WideResNet(num_classes=num_classes, **options)


class WideResNet(nn.Module):
    """See `wide_resnet`."""

    num_classes: int
    depth: int
    widening: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        x = convolution(16, 3, dtype=self.dtype, name="stem")(inputs)
        features = {"stem": x}
        for stage, stride in enumerate((1, 2, 2)):
            width = 16 * 2**stage * self.widening
            for index in range(self._blocks):
                name, stride = f"stage{stage}_block{index}", 1 if index else stride
                x, normalised = Block(width, stride, self.dtype, name=name)(x, train=train)
                if stage and not index:
                    features[f"stage{stage - 1}_preactivation"] = normalised
            features[f"stage{stage}"] = x
        x = features["stage2_preactivation"] = batch_norm(train, self.dtype, "norm")(x)
        hidden = pooled(nn.relu(x))
        init = default_linear(hidden.shape[-1]) | {"bias_init": nn.initializers.zeros}
        return OutputLayer(self.num_classes, **init, name="head")(hidden, features)

    @property
    def _blocks(self) -> int:
        return (self.depth - 4) // 6

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers in CRD."""
        names = {"stem": "conv1", "norm": "bn1", "head": "fc"}
        for stage in range(3):
            for index in range(self._blocks):
                ours, theirs = f"stage{stage}_block{index}", f"block{stage + 1}.layer.{index}"
                parts = {"first_norm": "bn1", "first": "conv1", "shortcut": "convShortcut"}
                parts |= {"second_norm": "bn2", "second": "conv2"}
                names |= {f"{ours}.{x}": f"{theirs}.{y}" for x, y in parts.items()}
        return (names,)


class Block(nn.Module):
    """Two 3x3 convolutions, each after a norm and a rectifier, and a shortcut around them.

    Attributes:
        width: of its output.
        stride: of its first convolution and of its shortcut.
        dtype: of the computation.
    """

    width: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), width]`, and x normalised."""
        normalised = batch_norm(train, self.dtype, "first_norm")(x)
        active = nn.relu(normalised)
        options = {"dtype": self.dtype}
        y = convolution(self.width, 3, self.stride, name="first", **options)(active)
        y = nn.relu(batch_norm(train, self.dtype, "second_norm")(y))
        y = convolution(self.width, 3, name="second", **options)(y)
        if x.shape[-1] != self.width:
            x = convolution(self.width, 1, self.stride, name="shortcut", **options)(active)
        return x + y, normalised
