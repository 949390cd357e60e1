"""A teacher's `Outputs.top` for the rows of a text, on disk: written once, read by any run.

A folder of it has `cache.json`, which says of what it is, `hashes.npy`, the hash of each row's
tokens (`row_hashes`), by which outputs and rows find each other in any order, and shards in the
ArrayRecord format. A record is a row: its hash, and of its n predicted tokens the logits [n, k]
float32, the ids [n, k] int32, log_tail [n] and log_normaliser [n] float32, one after the other,
little-endian.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax import files
from abkd_jax.checks import require
from abkd_jax.data.augment import Preprocess
from abkd_jax.data.batches import evaluation_batches
from abkd_jax.data.sets import DataSet, Split
from abkd_jax.data.stream import Stream
from abkd_jax.data.teacher_cache import places, row_hashes
from abkd_jax.types import Batch, Outputs, Top

_COMMAND = "python -m abkd_jax.cache_teacher"
_ABOUT, _HASHES = "cache.json", "hashes.npy"
_VERSION = 1
_HASHED = 1024  # rows at a time
_RESIDENT_BYTES = 4 * 2**30  # of the outputs of a split in memory
_FOR_READING = "readahead_buffer_size:0,max_parallelism:0"  # as is best for random access
_LIKE = {"num_classes": "number of tokens", "vocabulary": "tokenizer", "tokens": "text"}


class TopCache(NamedTuple):
    """A folder of a teacher's outputs.

    Attributes:
        folder: its path.
        about: of what it is: "k", "num_classes", "vocabulary" (`vocabulary_hash`), "teacher" (the
            SHA-256 of its parameters), "length" (T of a row), "tokens" (the SHA-256 of all rows'
            hashes), "rows", "predicted" (tokens), "shard_rows", "version".
    """

    folder: pathlib.Path
    about: Mapping[str, Any]

    @property
    def outputs(self) -> Outputs:
        """The shapes of what it has of one row, `[T, ...]`."""
        length, k = self.about["length"], self.about["k"]
        of_k, of_one = (length, k), (length,)
        shapes = zip((of_k, of_k, of_one, of_one), _DTYPES, strict=True)
        return Outputs(top=Top(*(jax.ShapeDtypeStruct(*pair) for pair in shapes)))

    @property
    def size(self) -> int:
        """The bytes of its shards, as far as they are written."""
        return sum(path.stat().st_size for path in self.shards if path.exists())

    @property
    def shards(self) -> list[pathlib.Path]:
        """The paths of all shards, those that are not written yet included."""
        count = math.ceil(self.about["rows"] / self.about["shard_rows"])
        names = (f"{index:05}-of-{count:05}.array_record" for index in range(count))
        return [self.folder / name for name in names]

    def check(self, wanted: Mapping[str, Any], remedy: str) -> None:
        """Refuses, by ValueError, a cache of something else.

        Args:
            wanted: what it has to be, by names of `about`; a string may be the beginning of it.
            remedy: what to do, in words.
        """
        for name, value in wanted.items():
            found = self.about.get(name)
            found = found[: len(value)] if isinstance(found, str) else found
            what = f"the {_LIKE.get(name, name)} of the cache {self.folder}"
            require(found == value, what, f"{value!r} ({remedy})", found)

    def within(self, data: DataSet, name: str) -> DataSet:
        """The data with the outputs of the teacher for each training example.

        Args:
            data: in memory, or a stream, whose examples have them as they are read.
            name: of the teacher.

        Raises:
            ValueError: one sentence, if the cache is not complete, or not of these examples.
        """
        read = self._opened()
        train = self._known(data.train, name, read)
        full = train
        if data.full is not data.train:
            alike = isinstance(train, Split) and data.full.inputs is data.train.inputs
            full = data.full.replace(outputs=train.outputs) if alike else None
            full = full or self._known(data.full, name, read)
        identity = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        contents = (*data.contents, (f"{name}.model", identity[:12]))
        return data.replace(train=train, full=full, contents=contents)

    def _opened(self) -> Callable[[int, np.ndarray], Top]:
        """A function of a row's place and its mask, to the outputs of its tokens `[T, ...]`."""
        from array_record.python import array_record_data_source as sources

        missing = [path for path in self.shards if not path.exists()]
        whole = f"of {len(self.shards)} shards (the command that writes it goes on with it)"
        found = len(self.shards) - len(missing)
        require(not missing, f"the cache {self.folder}", whole, found)
        rows, each = self.about["rows"], self.about["shard_rows"]
        for index, path in enumerate(self.shards):
            with _told(path):
                count = _reader(path).num_records()
                require(count == min(each, rows - index * each), "its records", "whole", count)
        source = sources.ArrayRecordDataSource([os.fspath(path) for path in self.shards])
        hashes = self._hashes()

        def read(place: int, where: np.ndarray) -> Top:
            with _told(self.shards[place // each]):
                return _unpacked(source[place], hashes[place], where, self.about["k"])

        return read

    def _hashes(self) -> np.ndarray:
        """Those of the rows, in the order of the records."""
        path = self.folder / _HASHES
        with _told(path):
            hashes = np.load(path)
            found = _digest(hashes)
            require(found == self.about["tokens"], "its hash", self.about["tokens"], found)
            return hashes

    def _known(self, split: Split | Stream, name: str, read: Callable) -> Split | Stream:
        """A training split with the outputs."""
        wanted, _ = _hashed(split)
        at = places(self._hashes(), wanted)
        missing = int(np.sum(at < 0))
        if missing:
            raise ValueError(
                f"the cache {self.folder} has no outputs for {missing} of the {len(split)} rows of "
                "data.train: it is of another text, length, template or packing (of which "
                f"data_seed draws the order); write one of these rows by {_COMMAND}."
            )
        if isinstance(split, Stream):
            places_of = dict(zip(split.rows.tolist(), at.tolist(), strict=True))
            records = _WithTop(split.records, name, places_of, read)
            return dataclasses.replace(split, records=records)
        shapes = jax.tree.leaves(self.outputs)
        size = len(split) * sum(x.size * x.dtype.itemsize for x in shapes)
        expected = f"at most {_RESIDENT_BYTES:,} bytes in memory (data.stream='always' reads more)"
        require(size <= _RESIDENT_BYTES, f"the cache {self.folder}", expected, size)
        where = np.asarray(split.masks.get("where", np.ones(split.labels.shape, bool)))
        top = jax.tree.map(lambda x: np.empty((len(split), *x.shape), x.dtype), self.outputs.top)
        for row, place in enumerate(at):
            for whole, part in zip(top, read(place, where[row]), strict=True):
                whole[row] = part
        outputs = Outputs(top=jax.tree.map(jnp.asarray, top))
        return split.replace(outputs={**split.outputs, name: outputs})


class _WithTop:
    """Records of a stream with the outputs of a teacher."""

    def __init__(self, records: Any, name: str, places_of: Mapping[int, int], read: Callable):
        self._records, self._name, self._places, self._read = records, name, places_of, read

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = dict(self._records[row])
        where = np.asarray(example.get("where", np.ones(example["labels"].shape, bool)))
        top = Outputs(top=self._read(self._places[int(row)], where))
        return example | {"outputs": {**example.get("outputs", {}), self._name: top}}


def is_top_cache(folder: str | os.PathLike) -> bool:
    """Whether a folder is that of such a cache; "" is none."""
    return folder != "" and pathlib.Path(folder, _ABOUT).is_file()


def read_top_cache(folder: str | os.PathLike) -> TopCache:
    """The cache in a folder, of which the shards are not yet opened.

    Raises:
        ValueError: one sentence, if there is none.
    """
    path = pathlib.Path(folder) / _ABOUT
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); write it by {_COMMAND}.") from error
    version = about.get("version") if isinstance(about, dict) else None
    require(version == _VERSION, f"the version of {path}", f"{_VERSION}", version)
    return TopCache(path.parent, about)


def write_top_cache(
    folder: str | os.PathLike,
    split: Split | Stream,
    forward: Callable[[Batch], Top],
    *,
    about: Mapping[str, Any],
    preprocess: Preprocess,
    size: int,
    shard_rows: int = 1024,
    process_index: int = 0,
    process_count: int = 1,
    once: Callable[[Callable[[], None]], None] = lambda claim: claim(),
) -> TopCache:
    """Writes a teacher's outputs for each row of a split, or goes on with it.

    A shard gets its name when it is whole, so that the same call, killed at any moment, goes on
    with the shards that are missing and writes the same bytes. Of several processes, each writes
    shards of its own.

    Args:
        folder: which is made.
        split: of tokens; rows that are repeated are written once.
        forward: a batch of B rows -> `[B, T, ...]`, compiled by the caller, who has the parameters.
        about: "k", "num_classes", "vocabulary", "teacher" and "length", see `TopCache`.
        preprocess: of the inputs.
        size: B.
        shard_rows: rows of a shard.
        process_index: of this process.
        process_count: of all.
        once: calls what one of the processes is to do while the others wait.

    Returns:
        The cache, complete if there is no other process.

    Raises:
        ValueError: one sentence, if the folder is a cache of something else.
        OSError: if a file cannot be written.
    """
    require(shard_rows >= 1, "shard_rows", "at least 1", shard_rows)
    hashes, counts = _hashed(split)
    order = np.sort(np.unique(hashes, return_index=True)[1])  # of equal rows the first
    hashes, counts = hashes[order], counts[order]
    sizes = {"rows": len(order), "predicted": int(counts.sum()), "shard_rows": shard_rows}
    about = {**about, "tokens": _digest(hashes), **sizes, "version": _VERSION}
    cache = TopCache(pathlib.Path(folder), about)
    once(lambda: _claim(cache, hashes))
    missing = [index for index, path in enumerate(cache.shards) if not path.exists()]
    begun, done = time.monotonic(), 0
    for index in missing:
        if index % process_count != process_index:
            continue
        own = slice(index * shard_rows, (index + 1) * shard_rows)
        batches = evaluation_batches(_rows(split, order[own]), size, preprocess)
        rows = itertools.chain.from_iterable(_packed(forward(x), x["where"]) for x in batches)
        records = (x.tobytes() + row for x, row in zip(hashes[own], rows, strict=False))
        _write(cache.shards[index], records)
        done += int(counts[own].sum())
        speed = done / (time.monotonic() - begun)
        told = f"shard {index + 1} of {len(cache.shards)}, {speed:,.0f} predicted tokens/s"
        print(f"{cache.folder}: {told}", file=sys.stderr, flush=True)
    return cache


def vocabulary_hash(names: Sequence[str]) -> str:
    """The SHA-256 of what the ids stand for (`DataSet.class_names`), whatever files say so."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


_DTYPES = tuple(np.dtype(x) for x in ("<f4", "<i4", "<f4", "<f4"))  # of the parts of `Top`


def _packed(top: Top, where: Any) -> Iterator[bytes]:
    """The record of each row, but for its hash."""
    top, where = jax.device_get((top, where))
    for row, mask in enumerate(where):
        parts = zip(top, _DTYPES, strict=True)
        yield b"".join(np.asarray(x[row][mask], dtype).tobytes() for x, dtype in parts)


def _unpacked(record: bytes, row_hash: np.uint64, where: np.ndarray, k: int) -> Top:
    """`[T, ...]` of a record; 0 where no token is predicted."""
    count, at, parts = int(where.sum()), row_hash.nbytes, []
    fits = record[:at] == row_hash.tobytes() and len(record) == at + count * (2 * k + 2) * 4
    require(fits, "a record", f"that of its row, of {count} tokens", f"{len(record)} bytes")
    for dtype, shape in zip(_DTYPES, ((count, k), (count, k), (count,), (count,)), strict=True):
        read = np.frombuffer(record, dtype, math.prod(shape), at).reshape(shape)
        part = np.zeros((len(where), *shape[1:]), dtype)
        part[where] = read
        at += read.nbytes
        parts.append(part)
    return Top(*parts)


def _rows(split: Split | Stream, chosen: np.ndarray) -> Split | Stream:
    """Some rows of a split, all of them for this process."""
    if isinstance(split, Stream):
        alone = {"process_index": 0, "process_count": 1}
        return dataclasses.replace(split, rows=split.rows[chosen], **alone)
    return split.take(chosen)


def _hashed(split: Split | Stream) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the hash of its tokens and of which are predicted, and how many these are."""
    hashes, counts = [], []
    for batch in evaluation_batches(_rows(split, np.arange(len(split))), _HASHED):
        where = np.asarray(batch["where"])
        hashes.append(row_hashes((batch["inputs"], where.astype(np.uint8))))
        counts.append(where.sum(axis=1))
    return tuple(np.concatenate(x)[: len(split)] for x in (hashes, counts))


def _digest(hashes: np.ndarray) -> str:
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def _claim(cache: TopCache, hashes: np.ndarray) -> None:
    """Makes the folder that of this cache, or checks that it is."""
    path, rows = cache.folder / _ABOUT, cache.folder / _HASHES
    cache.folder.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        read_top_cache(cache.folder).check(cache.about, "or choose another folder")
    if is_new or not rows.exists():
        content = io.BytesIO()
        np.save(content, hashes)
        files.write(rows, content.getvalue())
    if is_new:
        files.write(path, f"{json.dumps(cache.about, indent=1)}\n".encode())


def _write(path: pathlib.Path, records: Iterator[bytes]) -> None:
    """A shard as a whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with _replacing(path) as temporary:
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        try:
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:
            reason = f"{error}".partition(";")[0]
            raise OSError(f"{path} cannot be written ({reason}).") from error


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, of what gets its name when it is whole and on the disk."""
    temporary = path.with_name(f"{path.name}.unfinished")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _reader(path: pathlib.Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(os.fspath(path), _FOR_READING)


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    """One sentence for a file that is damaged."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError, OSError, EOFError) as error:
        reason = f"{error}".splitlines()[0].rstrip(".")
        raise ValueError(
            f"{path} is damaged ({reason}); delete it, and {_COMMAND} writes it again."
        ) from error
