"""From stored examples to a network's inputs, on the device: random crops, flips, normalisation."""

from typing import Any

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp

_AUGMENTATION = 0x617567  # folded into a step's key; networks fold in small indices


@struct.dataclass
class Preprocess:
    """How stored examples become a network's inputs.

    Attributes:
        mean: `[C]`, of pixels in [0, 1]; None for no normalisation.
        std: `[C]`, likewise.
        pad: how many zero pixels a random crop may take on each side of an image; 0 for no crops.
        flip: whether an image is mirrored, left to right, with probability 1/2.
        lengths: to which a training batch of `Tokens` may be cut, in rising order, the last one T:
            the least that holds its rows, which are then of like lengths; () for T alone.
    """

    mean: Array | None = None
    std: Array | None = None
    pad: int = struct.field(pytree_node=False, default=0)
    flip: bool = struct.field(pytree_node=False, default=False)
    lengths: tuple[int, ...] = struct.field(pytree_node=False, default=())


def step_key(data_seed: int | Array, step: int | Array) -> Array:
    """The key of a training step: what all of its randomness derives from."""
    return jax.random.fold_in(jax.random.key(data_seed), step)


def augmentation_key(key: Array) -> Array:
    """The key of a step's augmentation, from the step's key."""
    return jax.random.fold_in(key, _AUGMENTATION)


def normalized(inputs: Any, preprocess: Preprocess) -> Any:
    """Examples as a network takes them, without augmentation.

    Args:
        inputs: a pytree of arrays `[..., C]`: uint8 in 0..255, which is divided by 255; floating,
            taken as it is; or other integers, such as the ids of tokens, which are left alone.
        preprocess: with the mean and the standard deviation to normalise by.

    Returns:
        The pytree, float32 but for those integers.
    """
    return jax.tree.map(lambda x: _normalized(x, preprocess), inputs)


def _normalized(x: Array, preprocess: Preprocess) -> Array:
    if jnp.issubdtype(x.dtype, jnp.integer) and x.dtype != jnp.uint8:
        return x
    scale = 255 if x.dtype == jnp.uint8 else 1
    x = jnp.asarray(x, jnp.float32) / scale
    return x if preprocess.mean is None else (x - preprocess.mean) / preprocess.std


def augmented(inputs: Any, chosen: Array, key: Array, preprocess: Preprocess) -> Any:
    """Chosen examples, each cropped and flipped at random, normalised.

    An image is padded with `pad` zero pixels on each side, a window of its own size is cut out at a
    uniformly random offset, and the window is mirrored with probability 1/2. All of it, the choice
    of the examples included, is one gather.

    Args:
        inputs: `[N, H, W, C]`; any pytree of `[N, ...]` where there is neither crop nor flip.
        chosen: `[B]`, rows of inputs.
        key: of the offsets and the flips.
        preprocess: what to do.

    Returns:
        `[B, H, W, C]` float32, or the pytree as `normalized` gives it.
    """
    pad, flip = preprocess.pad, preprocess.flip
    if not (pad or flip):
        return normalized(jax.tree.map(lambda x: x[chosen], inputs), preprocess)
    _, height, width, _ = inputs.shape
    of_offset, of_flip = jax.random.split(key)
    down, right = jax.random.randint(of_offset, (2, len(chosen), 1), -pad, pad + 1)
    rows = jnp.arange(height) + down
    columns = jnp.broadcast_to(jnp.arange(width), (len(chosen), width))
    if flip:
        mirrored = jax.random.bernoulli(of_flip, shape=(len(chosen), 1))
        columns = jnp.where(mirrored, width - 1 - columns, columns)
    columns = columns + right
    rows, columns = rows[:, :, None], columns[:, None, :]
    pixels = inputs.at[chosen[:, None, None], rows, columns].get(mode="clip")
    inside = (0 <= rows) & (rows < height) & (0 <= columns) & (columns < width)
    return normalized(jnp.where(inside[..., None], pixels, 0), preprocess)
