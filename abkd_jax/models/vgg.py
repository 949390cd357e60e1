"""VGG with batch norm, for 32x32 images."""

from flax import linen as nn
from jax import Array

from abkd_jax.checks import require
from abkd_jax.models.convolution import ConvNorm, check_dtype, named, pooled
from abkd_jax.models.head import OutputLayer
from abkd_jax.types import Outputs

_LAYERS = {  # of the five stages, how many
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_WIDTHS = (64, 128, 256, 512, 512)


def vgg(*, num_classes: int, depth: int, dtype: str = "float32") -> nn.Module:
    """A VGG for CIFAR, as in the model zoo of CRD: one linear map, after the mean over positions.

    Five stages of 3x3 convolutions with a bias and batch norm; a 2x2 maximum of stride 2 after each
    of the first three, and after the fourth for images 64 pixels high. Parameters for 100 classes:

        vgg8   3,965,028    vgg13   9,462,180    vgg19  20,086,692
        vgg11  9,277,284    vgg16  14,774,436

    Args:
        num_classes: K.
        depth: 8, 11, 13, 16 or 19.
        dtype: see `resnet`.

    Returns:
        A flax module; its features are the stages' outputs "stage0" to "stage4", and these before
        their rectifiers, "stage0_preactivation", ...

    Raises:
        ValueError: one sentence that names the keyword, what was found and what was expected.

    Source: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
    recognition", ICLR 2015; Tian et al., "Contrastive representation distillation", ICLR 2020.
    """
    require(depth in _LAYERS, "vgg.depth", f"one of {[*_LAYERS]}", depth)
    return VGG(num_classes=num_classes, depth=depth, dtype=check_dtype("vgg", dtype))


class VGG(nn.Module):
    """See `vgg`."""

    num_classes: int
    depth: int
    dtype: str

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool) -> Outputs:
        """`[B, H, W, C]` to `Outputs`; in training, batch norm uses the batch's statistics."""
        x, features = inputs, {}
        for stage, (width, layers) in enumerate(zip(_WIDTHS, _LAYERS[self.depth], strict=True)):
            for index in range(layers):
                layer = ConvNorm(
                    width, 3, 1, self.dtype, use_bias=True, name=f"stage{stage}_layer{index}"
                )
                preactivation = layer(x, train=train)
                x = nn.relu(preactivation)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": preactivation}
            if stage < 3 or (stage == 3 and inputs.shape[1] == 64):
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        init = nn.initializers.normal(0.01)
        return OutputLayer(self.num_classes, kernel_init=init, name="head")(pooled(x), features)

    def torch_names(self) -> tuple[dict[str, str], ...]:
        """PyTorch's names of the layers in CRD."""
        names = {"head": "classifier"}
        for stage, layers in enumerate(_LAYERS[self.depth]):
            for index in range(layers):  # of three parts each, with the rectifier
                parts = f"block{stage}.{3 * index}", f"block{stage}.{3 * index + 1}"
                names |= named(f"stage{stage}_layer{index}", *parts)
        return (names,)
