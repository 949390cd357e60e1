"""Splits held in memory, and the batches drawn from them."""

from collections.abc import Iterator

import jax
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax.types import Batch


@struct.dataclass
class Split:
    """Examples, all on the device.

    Attributes:
        inputs: `[N, ...]` float32.
        labels: `[N]` int32.
        labelled: `[N]` bool; False withholds the label from training.
    """

    inputs: Array
    labels: Array
    labelled: Array

    def __len__(self) -> int:
        return self.labels.shape[0]

    def with_all_labels(self) -> "Split":
        """The same examples with no label withheld: what a teacher is trained on."""
        return self.replace(labelled=jnp.ones_like(self.labelled))

    def labelled_alone(self) -> "Split":
        """The examples whose labels are not withheld."""
        kept = np.flatnonzero(self.labelled)
        return jax.tree.map(lambda part: part[kept], self)


@struct.dataclass
class DataSet:
    """The three splits of a set; hyperparameters are chosen on `validation`, never on `test`.

    Attributes:
        train: with labels as they may be used in training.
        validation: a part of the set's training examples.
        test: the set's test examples.
        num_classes: K.
    """

    train: Split
    validation: Split
    test: Split
    num_classes: int = struct.field(pytree_node=False)


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
    available = int(np.bincount(labels, minlength=num_classes).min())
    if remainder or not 0 < per_class <= available:
        raise ValueError(
            f"data.labelled must be a multiple of the {num_classes} classes, with at most "
            f"{available} examples of each; found {labelled}."
        )
    kept = np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(num_classes)])
    return split.replace(labelled=jnp.zeros(len(split), bool).at[kept].set(True))


def epoch_order(data_seed: int | Array, epoch: int | Array, size: int) -> Array:
    """The order in which an epoch visits the examples: `[size]`, a function of its arguments."""
    of_order, _ = jax.random.split(jax.random.key(data_seed))  # not a key that a step uses
    return jax.random.permutation(jax.random.fold_in(of_order, epoch), size)


def batch_at(split: Split, order: Array, data_seed: int | Array, step: Array, size: int) -> Batch:
    """The batch of a step: the next `size` examples of the epoch's order.

    Args:
        split: with at least `size` examples; those beyond a multiple of it wait for the next epoch.
        order: `[N]`, from `epoch_order` for the epoch step // (N // size).
        data_seed: also of the batch's key.
        step: counted from 0.
        size: B.

    Returns:
        inputs `[B, ...]`, labels `[B]`, where `[B]`, labelled `[B]` and key.

    Raises:
        ValueError: if the split has fewer examples than a batch.
    """
    if not 0 < size <= len(split):
        raise ValueError(f"batch_size must lie between 1 and {len(split)} examples; found {size}.")
    start = (step % (len(split) // size)) * size
    chosen = jax.lax.dynamic_slice_in_dim(order, start, size)
    batch = _batch(split, chosen, jnp.ones(size, bool))
    return batch | {"key": jax.random.fold_in(jax.random.key(data_seed), step)}


def evaluation_batches(split: Split, size: int) -> Iterator[Batch]:
    """The whole split in order, in batches of one shape; the last is padded, with where False."""
    if size < 1:
        raise ValueError(f"the evaluation's batch size must be at least 1; found {size}.")
    for start in range(0, len(split), size):
        index = np.arange(start, start + size)
        where = jnp.asarray(index < len(split))
        yield _batch(split, np.minimum(index, len(split) - 1), where)


def _batch(split: Split, chosen: Array, where: Array) -> dict[str, Array]:
    labelled = where & split.labelled[chosen]
    labels = jnp.where(split.labelled[chosen], split.labels[chosen], -1)
    return dict(inputs=split.inputs[chosen], labels=labels, where=where, labelled=labelled)
