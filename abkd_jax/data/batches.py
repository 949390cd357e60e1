"""Batches: of training steps, as functions of (seed, step), and of an evaluation."""

import functools
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
    return jax.random.permutation(_key_of_order(data_seed, epoch), size)


def order_by_length(
    order: Array, groups: Array, size: int, data_seed: int | Array, epoch: int | Array
) -> Array:
    """An epoch's order with like lengths together: the same examples, by batches in random order.

    Args:
        order: `[N]`, of `epoch_order`.
        groups: `[N]` int32, of each example: examples of one group are of like lengths.
        size: B.
        data_seed: of the order.
        epoch: likewise.

    Returns:
        `[N // B * B]`.
    """
    kept = order[: len(order) // size * size]
    batches = kept[jnp.argsort(groups[kept], stable=True)].reshape(-1, size)
    key, _ = jax.random.split(_key_of_order(data_seed, epoch))
    return jax.random.permutation(key, batches).reshape(-1)


def _key_of_order(data_seed: int | Array, epoch: int | Array) -> Array:
    of_order, _ = jax.random.split(jax.random.key(data_seed))  # not a key that a step uses
    return jax.random.fold_in(of_order, epoch)


@struct.dataclass
class Resident:
    """What the steps of an epoch take of a split in memory.

    Attributes:
        split: all of it; examples beyond a multiple of the batch size wait for the next epoch.
        order: `[N]`, from `epoch_order` for the epoch step // (N // size).
        preprocess: of the inputs, augmentation included.
        size: B.
        length: to which rows of tokens are cut; None for all that is stored.
    """

    split: Split
    order: Array
    preprocess: Preprocess
    size: int = struct.field(pytree_node=False)
    length: int | None = struct.field(pytree_node=False, default=None)

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
        return _batch(rows.cut(self.length), jnp.ones(self.size, bool)) | {"key": key}


@struct.dataclass
class Streamed:
    """What the steps of a call take of a stream: their batches, as they were read.

    Attributes:
        rows: of one step: inputs `[B, ...]`, labels `[B, ...]` and any masks; of several, in their
            order, `[steps, B, ...]`.
        preprocess: of the inputs, augmentation included.
        first: the first of several steps; None for one.
        length: see `Resident`.
    """

    rows: Mapping[str, Any]
    preprocess: Preprocess
    first: int | Array | None = None
    length: int | None = struct.field(pytree_node=False, default=None)

    def batch(self, data_seed: int | Array, step: int | Array) -> Batch:
        """The batch of the step, as that of `Resident`."""
        rows, key = self.rows, step_key(data_seed, step)
        if self.first is not None:
            place = step - self.first
            rows = jax.tree.map(lambda x: jnp.asarray(x)[place], rows)
        rows = _split_of(rows).cut(self.length)
        everything = jnp.arange(len(rows))
        inputs = augmented(rows.inputs, everything, augmentation_key(key), self.preprocess)
        return _batch(rows.replace(inputs=inputs), jnp.ones(len(rows), bool)) | {"key": key}


class Feed:
    """What training steps take from the host, of a split in memory or of a stream.

        feed = Feed(split, preprocess, data_seed=0, size=128)
        examples, until = feed(step, most)  # serves the steps step, ..., until - 1
        batch = examples.batch(data_seed, step)  # inside jit

    All of a split in memory is there for an epoch; of a stream the batches of `most` steps, which
    the caller is to make in one call, are read and stacked. A function of (data_seed, step), so
    that a run resumes at any step; steps in order are the fast way through a stream. With several
    processes a stream's `examples.rows` are this process's, out of which the caller makes global
    arrays (of several steps, along their second axis).
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
        self._steps_per_epoch = len(split) // size
        self._groups = _groups(split, preprocess.lengths) if preprocess.lengths else None
        self._epoch = functools.lru_cache(2)(self._epoch_of)
        self._position = self._batches = None  # of a stream; the position is the next one's step

    def __call__(self, step: int, most: int = 1) -> tuple[Resident | Streamed, int]:
        """What serves a step and maybe later ones.

        Args:
            step: the first one, counted from 0.
            most: of a stream, so many steps are read; only this one if they cannot be one call.

        Returns:
            A pytree with the method `batch`, and the first later step that it does not serve.
        """
        epoch, place = divmod(step, self._steps_per_epoch)
        length, served = None, self._steps_per_epoch - place
        if self._groups is not None:
            lengths = self._epoch(epoch)[1][place:]
            length, others = int(lengths[0]), np.flatnonzero(lengths != lengths[0])
            served = int(others[0]) if len(others) else served
        if isinstance(self._split, Stream):
            several = 1 < most and (self._groups is None or most <= served)
            first, count = (np.int32(step), most) if several else (None, 1)
            parts = self._read(step, count)
            rows = jax.tree.map(lambda *x: np.stack(x), *parts) if several else parts[0]
            return Streamed(rows, self._preprocess, first, length), step + count
        order, _ = self._epoch(epoch)
        examples = Resident(self._split, order, self._preprocess, self._size, length)
        return examples, step + served

    def _read(self, step: int, count: int) -> list[Mapping[str, Any]]:
        """The rows of some steps of a stream."""
        if step != self._position:
            by_length = None if self._groups is None else lambda epoch: self._epoch(epoch)[0]
            self._batches = self._split.batches(self._data_seed, self._size, step, by_length)
        self._position = step + count
        return [next(self._batches) for _ in range(count)]

    def _epoch_of(self, epoch: int) -> tuple[Array, np.ndarray | None]:
        """The order of an epoch, and the lengths of its batches, if there are several."""
        order = _epoch_order(self._data_seed, epoch, len(self._split))
        if self._groups is None:
            return order, None
        order = _order_by_length(order, self._groups, self._size, self._data_seed, epoch)
        groups = np.asarray(self._groups[order]).reshape(-1, self._size)
        return order, np.asarray(self._preprocess.lengths)[groups.max(axis=1)]


def _groups(split: Split | Stream, lengths: tuple[int, ...]) -> Array:
    """`[N]`: the position of the least of some lengths that holds an example."""
    if isinstance(split, Stream):
        used = np.asarray(split.lengths)
    else:
        used = np.asarray(jnp.sum(split.inputs.segments > 0, axis=-1))
    return jnp.asarray(np.searchsorted(lengths, used), jnp.int32)


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
_order_by_length = jax.jit(order_by_length, static_argnums=2)
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
