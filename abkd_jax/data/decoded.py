"""Images as arrays in memory: a set is decoded once, and kept on disk."""

import contextlib
import hashlib
import os
import pathlib
import sys
import tempfile
import zipfile
from typing import Any

import jax
import numpy as np

_VARIABLE = "ABKD_JAX_CACHE_DIR"


def decoded(records: Any) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a split, decoded or as they were kept when they last were.

    They are kept under ABKD_JAX_CACHE_DIR (by default ~/.cache/abkd_jax), where that can be
    written, for the very files that they were decoded from. A file there that cannot be read is
    made anew.

    Args:
        records: `images.Records`.

    Returns:
        Images `[N, H, W, C]` uint8 and labels `[N]` int32.

    Raises:
        ValueError: if a record cannot be read.
    """
    path = cache_folder() / f"{_identity(records)}.npz"
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(path) as kept:
            return kept["inputs"], kept["labels"]
    if jax.process_index() == 0:
        print(f"decoding {len(records)} images of {records.name}, kept in {path}", file=sys.stderr)
    inputs, labels = _decode(records)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = pathlib.Path(folder, path.name)
            np.savez(written, inputs=inputs, labels=labels)
            written.replace(path)
    return inputs, labels


def cache_folder() -> pathlib.Path:
    """ABKD_JAX_CACHE_DIR, by default ~/.cache/abkd_jax."""
    default = pathlib.Path.home() / ".cache" / "abkd_jax"
    return pathlib.Path(os.environ.get(_VARIABLE) or default).expanduser()


def _identity(records: Any) -> str:
    """Of the split, and of the names, sizes and times of the set's files."""
    stats = [(path.name, path.stat()) for path in sorted(records.folder.iterdir())]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr((records.name, records.shape, files)).encode()).hexdigest()


def _decode(records: Any) -> tuple[np.ndarray, np.ndarray]:
    """With a progress bar.

    One thread: for images of some kilobytes others wait for Python's lock, and slow it down.
    """
    from tqdm import tqdm

    inputs = np.empty((len(records), *records.shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for row in tqdm(range(len(records)), disable=None):
        example = records[row]
        inputs[row], labels[row] = example["inputs"], example["labels"]
    return inputs, labels
