"""Files of a workdir: in a folder, or in a bucket, as gs://BUCKET/FOLDER.

Objects of a bucket appear as a whole, and cannot be appended to; it has no folders and no locks.
"""

import contextlib
import importlib.util
import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from abkd_jax.checks import require

_BUCKET = "gs://"


def path_of(path: str | os.PathLike) -> pathlib.Path | epath.Path:
    """The path of a folder or a file, on a disk or in a bucket.

    Raises:
        ValueError: if it is none, or what reads and writes buckets is not installed.
    """
    is_path = isinstance(path, str | os.PathLike) and path != ""
    require(is_path, "workdir", "the path of a folder", path)
    scheme, found, _ = os.fspath(path).partition("://")
    if not found:
        return pathlib.Path(path)
    require(f"{scheme}://" == _BUCKET, "workdir", f"a folder, or one of {_BUCKET}", f"{path}")
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"workdir {path} needs gcsfs: pip install -e '.[gcs]'.")
    return epath.Path(path)


def in_bucket(path: pathlib.Path | epath.Path) -> bool:
    """Whether a path, of `path_of`, is in a bucket."""
    return isinstance(path, epath.Path)


def write(path: pathlib.Path | epath.Path, content: bytes) -> None:
    """Writes a file as a whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    if in_bucket(path):
        with _refusing(path):
            path.write_bytes(content)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_arrays(path: pathlib.Path | epath.Path, arrays: Mapping[str, Any]) -> None:
    """Writes an .npz file, likewise."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write(path, content.getvalue())


def appended(path: pathlib.Path | epath.Path) -> "OnDisk | InBucket":
    """A file that is opened to be appended to: it has `write`, `sync` and `close`."""
    return InBucket(path) if in_bucket(path) else OnDisk(path, "ab")


class OnDisk(io.FileIO):
    """Unbuffered: a row is the operating system's at once, and a full disk shows at its row."""

    def sync(self) -> None:
        """Brings all to the disk."""
        os.fsync(self.fileno())


class InBucket(io.BytesIO):
    """Written as a whole at each `sync` and at the end."""

    def __init__(self, path: epath.Path):
        """With what is there."""
        super().__init__()
        self._path = path
        self.write(path.read_bytes() if path.exists() else b"")

    def sync(self) -> None:
        """Brings all to the bucket."""
        write(self._path, self.getvalue())

    def close(self) -> None:
        if not self.closed:
            self.sync()
        super().close()


@contextlib.contextmanager
def _refusing(path: epath.Path) -> Iterator[None]:
    """One sentence for what the library of a bucket raises, which need be no OSError."""
    try:
        yield
    except Exception as error:
        reason = f"{error}".strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise OSError(f"{path} cannot be written ({reason}).") from error
