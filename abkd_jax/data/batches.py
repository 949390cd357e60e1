"""Batches: of training steps, as functions of (seed, step), and of an evaluation."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.data.augment import Preprocess, augmentation_key, augmented, normalized, step_key
from abkd_jax.data.sets import Split
from abkd_jax.data.stream import Stream
from abkd_jax.types import Batch


def epoch_order(data_seed: int | Array, epoch: int | Array, size: int) -> Array:
    """The order in which an epoch visits the examples: `[size]`, a function of its arguments."""
    of_order, _ = jax.random.split(jax.random.key(data_seed))  # not a key that a step uses
    return jax.random.permutation(jax.random.fold_in(of_order, epoch), size)


@struct.dataclass
class Resident:
    """What the steps of an epoch take of a split in memory.

    Attributes:
        split: all of it; examples beyond a multiple of the batch size wait for the next epoch.
        order: `[N]`, from `epoch_order` for the epoch step // (N // size).
        preprocess: of the inputs, augmentation included.
        size: B.
    """

    split: Split
    order: Array
    preprocess: Preprocess
    size: int = struct.field(pytree_node=False)

    def batch(self, data_seed: int | Array, step: int | Array) -> Batch:
        """The batch of a step: the next B examples of the epoch's order.

        Args:
            data_seed: of the step's key and of the augmentation.
            step: counted from 0, not from the start of the epoch.

        Returns:
            inputs `[B, ...]`, labels `[B, ...]`, where, labelled and the split's other masks of the
            labels' shape, key, and outputs if the split has some.
        """
        start = (step % (len(self.split) // self.size)) * self.size
        chosen = jax.lax.dynamic_slice_in_dim(self.order, start, self.size)
        key = step_key(data_seed, step)
        inputs = augmented(self.split.inputs, chosen, augmentation_key(key), self.preprocess)
        rows = self.split.replace(inputs=None).take(chosen).replace(inputs=inputs)
        return _batch(rows, jnp.ones(self.size, bool)) | {"key": key}


@struct.dataclass
class Streamed:
    """What a step takes of a stream: its batch, as it was read.

    Attributes:
        rows: inputs `[B, ...]`, labels `[B, ...]` and any masks.
        preprocess: of the inputs, augmentation included.
    """

    rows: Mapping[str, Any]
    preprocess: Preprocess

    def batch(self, data_seed: int | Array, step: int | Array) -> Batch:
        """The batch of the step, as that of `Resident`."""
        rows, key = _split_of(self.rows), step_key(data_seed, step)
        everything = jnp.arange(len(rows))
        inputs = augmented(rows.inputs, everything, augmentation_key(key), self.preprocess)
        return _batch(rows.replace(inputs=inputs), jnp.ones(len(rows), bool)) | {"key": key}


class Feed:
    """What training steps take from the host, of a split in memory or of a stream.

        feed = Feed(split, preprocess, data_seed=0, size=128)
        examples, until = feed(step)  # serves the steps step, ..., until - 1
        batch = examples.batch(data_seed, step)  # inside jit

    A function of (data_seed, step), so that a run resumes at any step; steps in order are the fast
    way through a stream. With several processes a stream's `examples.rows` are this process's, out
    of which the caller makes global arrays.
    """

    def __init__(self, split: Split | Stream, preprocess: Preprocess, *, data_seed: int, size: int):
        """A feed of batches of `size` examples.

        Raises:
            ValueError: if the split has fewer examples than a batch.
        """
        expected = f"between 1 and the {len(split)} examples of the split"
        require(0 < size <= len(split), "batch_size", expected, size)
        self._split, self._preprocess = split, preprocess
        self._data_seed, self._size = data_seed, size
        self._position = None  # the epoch of _order, or the step of the next of _batches
        self._order = self._batches = None

    def __call__(self, step: int) -> tuple[Resident | Streamed, int]:
        """A pytree with the method `batch`, and the first later step that it does not serve."""
        if isinstance(self._split, Stream):
            if step != self._position:
                self._batches = self._split.batches(self._data_seed, self._size, start=step)
            rows = next(self._batches)
            self._position = step + 1
            return Streamed(rows, self._preprocess), step + 1
        steps_per_epoch = len(self._split) // self._size
        epoch = step // steps_per_epoch
        if epoch != self._position:
            self._order = _epoch_order(self._data_seed, epoch, len(self._split))
            self._position = epoch
        examples = Resident(self._split, self._order, self._preprocess, self._size)
        return examples, (epoch + 1) * steps_per_epoch


def evaluation_batches(
    split: Split | Stream, size: int, preprocess: Preprocess | None = None
) -> Iterator[Batch]:
    """The whole split in order, in batches of one shape; the last is padded, with where False.

    Args:
        split: in memory, or a stream, of which each process has its rows of each batch.
        size: B.
        preprocess: of the inputs, which are normalised and never augmented; None leaves them as
            they are stored.

    Yields:
        inputs `[B, ...]`, labels `[B, ...]`, where, labelled and the split's other masks of the
        labels' shape, and outputs if the split has some.

    Raises:
        ValueError: if a batch has no example.
    """
    require(size > 0, "the evaluation's batch size", "at least 1", size)
    if isinstance(split, Stream):
        parts = (_split_of(jax.tree.map(jnp.asarray, rows)) for rows in split.evaluation(size))
        padded = ((rows, jnp.ones(len(rows), bool)) for rows in parts)
    else:
        positions = (np.arange(start, start + size) for start in range(0, len(split), size))
        padded = (
            (split.take(np.minimum(at, len(split) - 1)), jnp.asarray(at < len(split)))
            for at in positions
        )
    for rows, real in padded:
        if preprocess is not None:
            rows = rows.replace(inputs=_normalized(rows.inputs, preprocess))
        yield _batch(rows, real)


_epoch_order = jax.jit(epoch_order, static_argnums=2)
_normalized = jax.jit(normalized)


def _split_of(rows: Mapping[str, Any]) -> Split:
    """What was read of a stream, as a split."""
    parts = ("inputs", "labels", "outputs")
    masks = {name: mask for name, mask in rows.items() if name not in parts}
    return Split(rows["inputs"], rows["labels"], masks, rows.get("outputs", {}))


def _batch(rows: Split, real: Array) -> dict[str, Any]:
    """The batch of some examples, of which `real` [B] is False for padding: in no mask."""
    labels = rows.labels
    real = real.reshape(real.shape + (1,) * (labels.ndim - 1))
    where = jnp.broadcast_to(real, labels.shape) & rows.masks.get("where", True)
    masks = {"labelled": labels >= 0, **rows.masks}
    batch = {name: where & mask for name, mask in masks.items()}
    labels = jnp.where(masks["labelled"], labels, -1)
    batch |= {"inputs": rows.inputs, "labels": labels, "where": where}
    return batch | ({"outputs": rows.outputs} if rows.outputs else {})
