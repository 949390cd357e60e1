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


def path_of(path: str | os.PathLike, name: str = "workdir") -> pathlib.Path | epath.Path:
    """The path of a folder or a file, on a disk or in a bucket.

    Args:
        path: a folder's or a file's, or gs://BUCKET/FOLDER as text, for pathlib drops a slash.
        name: what refusals call it.

    Raises:
        ValueError: if it is none, or what reads and writes buckets is not installed.
        OSError: if it is in a bucket that cannot be read.
    """
    is_path = isinstance(path, str | os.PathLike) and path != ""
    require(is_path, name, "the path of a folder", path)
    if in_bucket(path):
        return path
    text = os.fspath(path)
    if "://" not in text and not text.startswith("gs:/"):
        return pathlib.Path(path)
    require(text.startswith(_BUCKET), name, f"a folder, or one of {_BUCKET}, as text", text)
    if not importlib.util.find_spec("gcsfs"):
        raise ValueError(f"{name} {text} needs gcsfs: pip install -e '.[gcs]'.")
    import fsspec

    # Not what an earlier listing had: tensorstore and other processes write there, too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    os.environ.setdefault("EPATH_USE_TF", "false")  # by gcsfs, also where TensorFlow is installed
    found = epath.Path(text)
    with _refusing(found, "read"):
        found.exists()
    return found


def on_disk(path: str | os.PathLike, name: str) -> pathlib.Path:
    """The path of what cannot be in a bucket.

    Raises:
        ValueError: if it is in one.
    """
    require(":/" not in os.fspath(path), name, "on a disk", f"{path}")
    return pathlib.Path(path)


def in_bucket(path: pathlib.Path | epath.Path) -> bool:
    """Whether a path, of `path_of`, is in a bucket."""
    return isinstance(path, epath.Path)


def write(path: pathlib.Path | epath.Path, content: bytes) -> None:
    """Writes a file as a whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    if in_bucket(path):
        with _refusing(path, "written"):
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


class InBucket:
    """Written as a whole at each `sync` and at the end."""

    def __init__(self, path: epath.Path):
        """With what is there."""
        self._path = path
        with _refusing(path, "read"):
            self._content = bytearray(path.read_bytes() if path.exists() else b"")

    def write(self, content: bytes) -> int:
        """Appends; how many bytes, all."""
        self._content += content
        return len(content)

    def sync(self) -> None:
        """Brings all to the bucket."""
        write(self._path, bytes(self._content))

    close = sync


@contextlib.contextmanager
def _refusing(path: epath.Path, done: str) -> Iterator[None]:
    """One sentence for what the library of a bucket raises, which need be no OSError."""
    try:
        yield
    except Exception as error:
        reason = f"{error}".strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise OSError(f"{path} cannot be {done} ({reason}).") from error
