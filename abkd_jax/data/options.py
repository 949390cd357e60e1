"""The keywords that all sets share, and what the function of a set has to know."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.data.augment import Preprocess
from abkd_jax.data.sets import DataSet, Description, Split

Found = tuple[Description, Callable[[], DataSet]]
"""What is known of a set, and a function that reads it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a student sees of a set's training examples, and how.

    Attributes:
        labelled: how many labels it sees, the same number of each class, the first ones; 0 for all.
        omit: classes of which it sees no example; labels kept of them go with them.
        imbalance: how many times as many examples the first class has as the last one, of all
            training examples, also those of a teacher; between them the counts fall by a constant
            factor, from N / K on. A class that has fewer keeps them, and examples without a label
            are left out. 1 leaves the set as it is; long-tailed CIFAR has 10 to 200.
        pad: how many zero pixels a random crop may take on each side of an image; 0 for no crops.
        flip: whether training images are mirrored, left to right, with probability 1/2.
        mean: one number for each channel, of pixels in [0, 1]; () for no normalisation.
        std: likewise.
    """

    labelled: int = 0
    omit: tuple[int, ...] = ()
    imbalance: int = 1
    pad: int = 0
    flip: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def preprocess(self, description: Description) -> Preprocess:
        """The set's `Preprocess`.

        Raises:
            ValueError: naming the option that does not fit the set.
        """
        self._check_classes(description)
        inputs, mean, std = description.inputs, self.mean, self.std
        array = isinstance(inputs, jax.ShapeDtypeStruct) and inputs.dtype == jnp.float32
        shape = inputs.shape if array else ()  # neither pixels nor channels in anything else
        require(self.pad >= 0, "data.pad", "at least 0", self.pad)
        as_images = len(shape) == 3 or not (self.pad or self.flip)
        expected = "left out for examples that are no images (height, width, channels)"
        require(as_images, "data.pad and data.flip", expected, shape)
        for name, numbers in (("mean", mean), ("std", std)):
            real = np.ndim(numbers) == 1 and np.asarray(numbers).dtype.kind in "iuf"
            finite = real and np.all(np.isfinite(numbers))
            require(finite, f"data.{name}", "a list of finite numbers", numbers)
        channels = shape[-1] if shape else 0
        fit = len(mean) == len(std) and len(mean) in (0, channels)
        expected = f"left out together, or a number for each channel (there are {channels})"
        require(fit, "data.mean and data.std", expected, (mean, std))
        expected = "positive in each channel (left out, it is the training images': then give one)"
        require(np.all(np.asarray(std) > 0), "data.std", expected, std)
        arrays = (jnp.asarray(x, jnp.float32) if len(x) else None for x in (mean, std))
        return Preprocess(*arrays, pad=self.pad, flip=self.flip)

    def _check_classes(self, description: Description) -> None:
        count, labelled, omit = description.num_classes, self.labelled, self.omit
        whole = type(labelled) is int and labelled >= 0 and labelled % count == 0
        require(whole, "data.labelled", f"a multiple of the {count} classes", labelled)
        classes = np.ndim(omit) == 1 and all(label in range(count) for label in omit)
        require(classes, "data.omit", f"a list of classes in 0..{count - 1}", omit)
        whole = type(self.imbalance) is int and self.imbalance >= 1
        require(whole, "data.imbalance", "an integer of at least 1", self.imbalance)
        some = labelled or len(omit) or self.imbalance > 1
        one = description.labels.shape == () or not some
        expected = "left out where an example has more than one label"
        names = "data.labelled, data.omit and data.imbalance"
        require(one, names, expected, (labelled, omit, self.imbalance))

    def long_tailed(self, split: Split, num_classes: int) -> Split:
        """The split with the first examples of each class, as many as `imbalance` leaves it."""
        if self.imbalance == 1:
            return split
        labels = np.asarray(split.labels)
        falling = self.imbalance ** -(np.arange(num_classes) / max(num_classes - 1, 1))
        counts = np.maximum(len(split) / num_classes * falling + 1e-6, 1).astype(int)
        kept = [np.flatnonzero(labels == k)[:count] for k, count in enumerate(counts)]
        some = sum(map(len, kept))
        require(some, "data.imbalance", "1 for examples without labels", self.imbalance)
        return split.take(np.sort(np.concatenate(kept)))

    def shown(self, split: Split, num_classes: int) -> Split:
        """The split with labels withheld and classes omitted.

        Raises:
            ValueError: if there are too few examples.
        """
        if self.labelled:
            split = _withhold_labels(split, self.labelled, num_classes)
        return _omit_classes(split, self.omit) if len(self.omit) else split


def data_set(look: Callable[..., Found]) -> Callable[..., DataSet]:
    """The function of a set, out of one that looks at it before it is read.

    Args:
        look: of keywords, `options: Options` among them; refuses whatever it can without examples.

    Returns:
        A function of the same keywords, with those of `Options` for `options`, which returns the
        set. Its attribute `describe`, a function of the same, returns the description.
    """
    own, shared = inspect.signature(look), inspect.signature(Options).parameters
    names = [p for p in own.parameters.values() if p.name != "options"] + [*shared.values()]

    def giving(part: Callable[[Found], Any], kind: type) -> Callable[..., Any]:
        @functools.wraps(look)
        def call(**keywords: Any) -> Any:
            given = {name: keywords.pop(name) for name in shared if name in keywords}
            return part(look(**keywords, options=Options(**given)))

        call.__signature__ = own.replace(parameters=names, return_annotation=kind)
        return call

    read = giving(lambda found: found[1](), DataSet)
    read.describe = giving(lambda found: found[0], Description)
    return read


def check_held_out(validation: int, count: int) -> None:
    """Refuses to hold out all of the `count` training examples, or more.

    Raises:
        ValueError: naming the field.
    """
    expected = f"between 0 and {count - 1}"
    require(0 <= validation < count, "data.validation", expected, validation)


def _withhold_labels(split: Split, labelled: int, num_classes: int) -> Split:
    labels = np.where(split.masks["labelled"], split.labels, -1)
    per_class = labelled // num_classes
    most = int(np.bincount(labels[labels >= 0], minlength=num_classes).min())
    expected = f"at most {most * num_classes}, {most} examples of each class"
    require(per_class <= most, "data.labelled", expected, labelled)
    kept = np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(num_classes)])
    mask = jnp.zeros(len(split), bool).at[kept].set(True)
    return split.replace(masks={**split.masks, "labelled": mask})


def _omit_classes(split: Split, classes: Sequence[int]) -> Split:
    """The examples of all other classes; those whose label is not known stay."""
    kept = np.flatnonzero(~np.isin(np.asarray(split.labels), list(classes)))
    require(len(kept), "data.omit", "fewer classes: they leave no training example", tuple(classes))
    return split.take(kept)
