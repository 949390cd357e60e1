"""Splits held in memory, and the batches drawn from them and from streams."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax.data.augment import Preprocess, augmentation_key, augmented, normalized, step_key
from abkd_jax.data.stream import Stream, Streamed
from abkd_jax.types import Batch, Outputs


@struct.dataclass
class Split:
    """Examples, all on the device.

    Attributes:
        inputs: `[N, ...]`; float32, or uint8 for images as they are stored.
        labels: `[N]` int32; -1 where the label is not known.
        labelled: `[N]` bool; False withholds the label from training.
        outputs: {name: `Outputs`} of networks that do not learn, for each example: what a training
            step takes in place of their forward passes. Of value without augmentation alone.
    """

    inputs: Array
    labels: Array
    labelled: Array
    outputs: Mapping[str, Outputs] = struct.field(default_factory=dict)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def with_all_labels(self) -> "Split":
        """The same examples with no known label withheld."""
        return self.replace(labelled=self.labels >= 0)

    def labelled_alone(self) -> "Split":
        """The examples whose labels are not withheld."""
        kept = np.flatnonzero(self.labelled)
        return jax.tree.map(lambda part: part[kept], self)


@struct.dataclass
class DataSet:
    """The splits of a set; hyperparameters are chosen on `validation`, never on `test`.

    Attributes:
        train: what a student is trained on: labels withheld, classes omitted.
        validation: a part of the set's training examples; None where a protocol holds none out, as
            the published ones of CIFAR do.
        test: the set's test examples.
        teacher: what a teacher is trained on: the training examples, no label withheld and no class
            omitted.
        preprocess: how the splits' examples become a network's inputs.
        num_classes: K.
        class_names: K names, or none.
    """

    train: Split | Stream
    validation: Split | Stream | None
    test: Split | Stream
    teacher: Split | Stream
    preprocess: Preprocess
    num_classes: int = struct.field(pytree_node=False)
    class_names: tuple[str, ...] = struct.field(pytree_node=False, default=())


def withhold_labels(split: Split, labelled: int, num_classes: int) -> Split:
    """Keeps the labels of the first examples of each class, and withholds all others.

    Args:
        split: in random order.
        labelled: how many labels to keep in all, a multiple of num_classes.
        num_classes: K.

    Returns:
        The split with `labelled` examples labelled.

    Raises:
        ValueError: if `labelled` is no such multiple, or a class has too few examples.
    """
    labels = np.asarray(split.labels)
    per_class, remainder = divmod(labelled, num_classes)
    available = int(np.bincount(labels[labels >= 0], minlength=num_classes).min())
    if remainder or not 0 < per_class <= available:
        raise ValueError(
            f"data.labelled must be a multiple of the {num_classes} classes, with at most "
            f"{available} examples of each; found {labelled}."
        )
    kept = np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(num_classes)])
    return split.replace(labelled=jnp.zeros(len(split), bool).at[kept].set(True))


def omit_classes(split: Split, classes: Sequence[int]) -> Split:
    """The examples of all other classes; those whose label is not known stay.

    Args:
        split: any.
        classes: the labels of what to leave out.

    Returns:
        The split without them.

    Raises:
        ValueError: if no example is left.
    """
    kept = np.flatnonzero(~np.isin(np.asarray(split.labels), list(classes)))
    if not len(kept):
        raise ValueError(f"data.omit leaves no training example; found {tuple(classes)}.")
    return jax.tree.map(lambda part: part[kept], split)


def epoch_order(data_seed: int | Array, epoch: int | Array, size: int) -> Array:
    """The order in which an epoch visits the examples: `[size]`, a function of its arguments."""
    of_order, _ = jax.random.split(jax.random.key(data_seed))  # not a key that a step uses
    return jax.random.permutation(jax.random.fold_in(of_order, epoch), size)


def batch_at(
    split: Split,
    order: Array,
    data_seed: int | Array,
    step: Array,
    size: int,
    preprocess: Preprocess | None = None,
) -> Batch:
    """The batch of a step: the next `size` examples of the epoch's order.

    Args:
        split: with at least `size` examples; those beyond a multiple of it wait for the next epoch.
        order: `[N]`, from `epoch_order` for the epoch step // (N // size).
        data_seed: also of the batch's key.
        step: counted from 0.
        size: B.
        preprocess: of the inputs, augmentation included; None leaves them as they are stored.

    Returns:
        inputs `[B, ...]`, labels `[B]`, where `[B]`, labelled `[B]` and key.

    Raises:
        ValueError: if the split has fewer examples than a batch.
    """
    _check_size(split, size)
    start = (step % (len(split) // size)) * size
    chosen = jax.lax.dynamic_slice_in_dim(order, start, size)
    key = step_key(data_seed, step)
    if preprocess is None:
        inputs = split.inputs[chosen]
    else:
        inputs = augmented(split.inputs, chosen, augmentation_key(key), preprocess)
    return _batch(split, inputs, chosen, jnp.ones(size, bool)) | {"key": key}


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
        inputs `[B, ...]`, labels `[B]`, where `[B]` and labelled `[B]`.

    Raises:
        ValueError: if a batch has no example.
    """
    if size < 1:
        raise ValueError(f"the evaluation's batch size must be at least 1; found {size}.")
    prepare = (lambda x: x) if preprocess is None else (lambda x: _normalized(x, preprocess))
    if isinstance(split, Stream):
        for batch in split.evaluation(size):
            batch = jax.tree.map(jnp.asarray, batch)
            yield batch | {"inputs": prepare(batch["inputs"]), "labelled": batch["where"]}
        return
    for start in range(0, len(split), size):
        index = np.arange(start, start + size)
        where = jnp.asarray(index < len(split))
        chosen = np.minimum(index, len(split) - 1)
        yield _batch(split, prepare(split.inputs[chosen]), chosen, where)


_normalized = jax.jit(normalized)


@struct.dataclass
class Resident:
    """What a step takes of a split in memory: the split, and the order of the epoch.

    Attributes:
        split: all of it.
        order: `[N]`.
    """

    split: Split
    order: Array

    def batch(
        self, data_seed: int | Array, step: Array, size: int, preprocess: Preprocess | None = None
    ) -> Batch:
        """The batch of the step: `batch_at`."""
        return batch_at(self.split, self.order, data_seed, step, size, preprocess)


class Feed:
    """What training steps take from the host, of a split in memory or of a stream.

        feed = Feed(split, data_seed=0, size=128)
        fed, until = feed(step)  # serves the steps step, ..., until - 1
        batch = fed.batch(data_seed, step, size, preprocess)  # inside jit

    A function of (data_seed, step), so that a run resumes at any step; steps in order are the fast
    way through a stream. With several processes a stream's `fed` has this process's rows, out of
    which the caller makes global arrays.
    """

    def __init__(self, split: Split | Stream, *, data_seed: int, size: int):
        """A feed of batches of `size` examples.

        Raises:
            ValueError: if the split has fewer examples than a batch.
        """
        _check_size(split, size)
        self._split, self._data_seed, self._size = split, data_seed, size
        self._position = None  # the epoch of _order, or the step of the next of _batches
        self._order = None
        self._batches = None

    def __call__(self, step: int) -> tuple[Resident | Streamed, int]:
        """A pytree with the method `batch`, and the first later step that it does not serve."""
        if isinstance(self._split, Stream):
            if step != self._position:
                self._batches = self._split.batches(self._data_seed, self._size, start=step)
            fed = Streamed(**next(self._batches))
            self._position = step + 1
            return fed, step + 1
        steps_per_epoch = len(self._split) // self._size
        epoch = step // steps_per_epoch
        if epoch != self._position:
            self._order = _epoch_order(self._data_seed, epoch, len(self._split))
            self._position = epoch
        return Resident(self._split, self._order), (epoch + 1) * steps_per_epoch


_epoch_order = jax.jit(epoch_order, static_argnums=2)


def _check_size(split: Split | Stream, size: int) -> None:
    if not 0 < size <= len(split):
        raise ValueError(f"batch_size must lie between 1 and {len(split)} examples; found {size}.")


def _batch(split: Split, inputs: Array, chosen: Array, where: Array) -> dict[str, Array]:
    labelled = where & split.labelled[chosen]
    labels = jnp.where(split.labelled[chosen], split.labels[chosen], -1)
    batch = dict(inputs=inputs, labels=labels, where=where, labelled=labelled)
    if split.outputs:
        batch["outputs"] = jax.tree.map(lambda part: part[chosen], split.outputs)
    return batch
