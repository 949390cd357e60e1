"""Examples of ids as rows of one length: one example a row, or several as segments."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax.data.corpus import Corpus
from abkd_jax.types import Tokens


class Rows:
    """Rows of tokens, which a `Stream` reads, or all of which are a split in memory.

    Attributes:
        lengths: `[N]`, how many tokens of each row are no padding.
    """

    def __init__(
        self,
        corpus: Corpus,
        examples: np.ndarray,
        length: int,
        pack: bool = False,
        masks: Mapping[str, bool] | None = None,
    ):
        """Rows of some examples.

        Args:
            corpus: that has them.
            examples: `[M]`, which of its examples.
            length: T, at least that of each example.
            pack: whether a row has as many of the examples as fit, in their order, each a segment
                of its own; else one.
            masks: of every row, of which each is True everywhere or False everywhere.
        """
        self._corpus, self._examples, self._length = corpus, examples, length
        self._starts = np.concatenate([[0], corpus.ends[:-1]])
        self._masks = masks or {}
        sizes = (corpus.ends - self._starts)[examples]
        self._borders = _packed(sizes, length) if pack else np.arange(len(examples) + 1)
        self.lengths = np.add.reduceat(sizes, self._borders[:-1]) if len(examples) else sizes

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        """inputs, `Tokens` of `[T]`; labels `[T]` int32; where `[T]`, and the masks."""
        ids, positions, segments = np.zeros((3, self._length), np.int32)
        counts, at = np.zeros(self._length, bool), 0
        chosen = self._examples[self._borders[row] : self._borders[row + 1]]
        for segment, example in enumerate(chosen, 1):
            start, end = self._starts[example], self._corpus.ends[example]
            place = slice(at, at + end - start)
            ids[place] = self._corpus.ids[start:end]
            counts[place] = self._corpus.counts[start:end]
            positions[place], segments[place] = np.arange(end - start), segment
            at += end - start
        labels, where = np.full(self._length, -1, np.int32), np.zeros(self._length, bool)
        known = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        labels[:-1] = np.where(known, ids[1:], -1)
        where[:-1] = known & counts[1:]
        masks = {name: np.full(self._length, value) for name, value in self._masks.items()}
        inputs = Tokens(ids, positions, segments)
        return {"inputs": inputs, "labels": labels, "where": where, **masks}


class Joined:
    """The rows of two sets of them, one after the other."""

    def __init__(self, first: Rows, second: Rows):
        self._first, self._second = first, second
        self.lengths = np.concatenate([first.lengths, second.lengths])

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, row: int) -> dict[str, Any]:
        own = row < len(self._first)
        return self._first[row] if own else self._second[row - len(self._first)]


def stacked(records: Rows | Joined, rows: Sequence[int]) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """Chosen rows in memory, as `from_arrays` takes them: inputs, labels and masks, `[N, T]`."""
    like = records[0]
    arrays = jax.tree.map(lambda x: np.empty((len(rows), *x.shape), x.dtype), like)
    for index, row in enumerate(rows):
        jax.tree.map(lambda array, x, at=index: array.__setitem__(at, x), arrays, records[row])
    return arrays.pop("inputs"), arrays.pop("labels"), arrays


def shapes(length: int) -> tuple[Tokens, jax.ShapeDtypeStruct]:
    """The inputs and the labels of a row."""
    row = jax.ShapeDtypeStruct((length,), jnp.int32)
    return Tokens(row, row, row), row


def _packed(lengths: np.ndarray, length: int) -> np.ndarray:
    """Where rows begin, each with as many examples as fit, and where the last one ends."""
    ends, borders = np.cumsum(lengths), [0]
    while borders[-1] < len(lengths):
        before = ends[borders[-1] - 1] if borders[-1] else 0
        borders.append(int(np.searchsorted(ends, before + length, side="right")))
    return np.array(borders)
