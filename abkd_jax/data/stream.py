"""Sets too large for the device: decoded on the host while the device trains, by grain."""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from abkd_jax.checks import require

_AREAS = (0.08, 1.0)  # of a random crop, as a part of the image's area
_RATIOS = (3 / 4, 4 / 3)  # of a random crop, width by height
_RESIZE = 256 / 224  # an evaluated image's shorter side, by the side of the crop out of it
_MOST_THREADS = 64  # that decode: beyond some the interpreter's lock, which is one, is the limit


@dataclasses.dataclass(eq=False)
class Stream:
    """Examples that are read and decoded as they are needed, by threads of the host.

    With several processes each has its part of every batch: rows [i * B/n, (i + 1) * B/n) of the
    global batch are those of process i of n, so the number of processes changes no batch.

    Attributes:
        records: `records[row]` is a dict of one example: inputs, labels (int32, in 0..K-1, or -1
            where not known) and any masks, such as `where`, of the labels' shape.
        rows: `[N]`, those of the records that belong to the split.
        image_size: 0 for inputs as they are, all of one shape. Otherwise they are images
            [H, W, C] uint8, and this is the side of the square that a random crop of a training
            image, or the centre of an evaluated one, is resized to.
        flip: whether such a random crop is mirrored with probability 1/2. Images as they are, are
            augmented on the device.
        lengths: `[N]`, how many tokens of each example are no padding; None for anything else.
        process_index: of this process, by default JAX's.
        process_count: of all processes, by default JAX's.
    """

    records: Any
    rows: np.ndarray
    _: dataclasses.KW_ONLY
    image_size: int = 0
    flip: bool = False
    lengths: np.ndarray | None = None
    process_index: int = dataclasses.field(default_factory=jax.process_index)
    process_count: int = dataclasses.field(default_factory=jax.process_count)

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self,
        data_seed: int,
        size: int,
        start: int = 0,
        order_of: Callable[[int], Any] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """The training batches of steps start, start + 1, ...; each a function of (seed, step).

        Args:
            data_seed: of each epoch's order, and of the crops and flips.
            size: B of the global batch; examples beyond a multiple of it wait for the next epoch.
            start: the first step; nothing before it is read.
            order_of: epoch -> the order of the examples in it, at least of those that are visited;
                None for a random one. With it, examples are taken as they are.

        Yields:
            inputs, labels and any masks of the records, each `[B / process_count, ...]`.

        Raises:
            ValueError: if B is no multiple of the number of processes.
        """
        import grain  # not at the top: a program without streams has no need of it

        kept = len(self) // size * size
        if order_of is not None:
            order = functools.lru_cache(2)(lambda epoch: self.rows[np.asarray(order_of(epoch))])
            at = lambda i: self.records[order(i // kept)[i % kept]]  # noqa: E731
            return self._read(at, sys.maxsize, size, start)
        examples = (
            grain.MapDataset.source(self.rows)
            .seed(data_seed % 2**32)
            .shuffle()[:kept]
            .random_map(self._for_training)
            .repeat()
        )
        return self._read(lambda position: examples[position], len(examples), size, start)

    def evaluation(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """All examples once, in order and without randomness; the last batch is padded.

        Args:
            size: B of the global batch.

        Yields:
            As `batches` does, always with `where`, which is False for padding.

        Raises:
            ValueError: if B is no multiple of the number of processes.
        """
        return self._read(self.example, math.ceil(len(self) / size) * size, size, start=0)

    def example(self, position: int) -> dict[str, Any]:
        """An example as it is evaluated; beyond the last one this, with `where` False."""
        example = dict(self.records[self.rows[min(position, len(self) - 1)]])
        if self.image_size:
            example["inputs"] = center(example["inputs"], self.image_size)
        where = np.full(np.shape(example["labels"]), position < len(self))
        return {**example, "where": where & example.get("where", True)}

    def _read(
        self, example_at: Callable[[int], dict[str, Any]], count: int, size: int, start: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """This process's part of the batches of `count` examples, from a step on."""
        import grain

        expected = f"a multiple of the {self.process_count} processes that read the stream"
        require(size % self.process_count == 0, "batch_size", expected, size)
        local = size // self.process_count
        threads = min(_MOST_THREADS, cores())
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, local))
        offset = self.process_index * local

        def own(index: int) -> dict[str, Any]:
            batch, row = divmod(index, local)
            return example_at(batch * size + offset + row)

        end = min(count // size * local, sys.maxsize)  # repeated examples have no end
        part = grain.MapDataset.range(start * local, end).map(own)
        return iter(part.to_iter_dataset(options).batch(local))

    def _for_training(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
        example = self.records[row]
        if not self.image_size:
            return example
        image = example["inputs"]
        box = random_box(*image.shape[:2], rng)
        image = _resized(image, box, (self.image_size, self.image_size))
        mirrored = self.flip and rng.random() < 0.5
        return {**example, "inputs": image[:, ::-1] if mirrored else image}


def cores() -> int:
    """How many cores this process may use, for its threads that decode."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere; what Slurm and taskset set
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def random_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random part of an image to train on.

    Its area is uniform in 8 % to 100 % of the image's, the logarithm of its width by its height
    uniform between those of 3/4 and 4/3, its place uniform among those inside the image. After ten
    boxes that do not fit: the largest central one of the nearest ratio.

    Args:
        height: of the image.
        width: of the image.
        rng: the source of randomness.

    Returns:
        left, top, right and bottom, as Pillow counts them.

    Source: Szegedy et al., "Going deeper with convolutions", 2015, section 6.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*_AREAS)
        ratio = math.exp(rng.uniform(*map(math.log, _RATIOS)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(rng.integers(width - across + 1))
            top = int(rng.integers(height - down + 1))
            return left, top, left + across, top + down
    ratio = min(max(width / height, _RATIOS[0]), _RATIOS[1])
    across, down = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def center(image: np.ndarray, size: int) -> np.ndarray:
    """The centre of an image for evaluation.

    Args:
        image: `[H, W, C]` uint8.
        size: of the side of the result. The shorter side of the image is resized to 256/224 of it.

    Returns:
        `[size, size, C]` uint8.
    """
    height, width = image.shape[:2]
    shorter = round(size * _RESIZE)
    down, across = (side * shorter // min(height, width) for side in (height, width))
    image = _resized(image, (0, 0, width, height), (across, down))
    top, left = round((down - size) / 2), round((across - size) / 2)
    return image[top : top + size, left : left + size]


def _resized(image: np.ndarray, box: tuple[float, ...], size: tuple[int, int]) -> np.ndarray:
    """A box of an image, resized with antialiasing: `[size[1], size[0], C]` uint8."""
    from PIL import Image  # not at the top: for streams alone

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.crop(box).resize(size, Image.Resampling.BILINEAR))
    return resized.reshape(*resized.shape[:2], -1)
