"""Checkpoints that a killed process, a full disk or a damaged file cannot take away.

Orbax writes them in the background and commits each as a whole. Kept are the newest two and the
best one. Each carries the SHA-256 of its arrays: a newest checkpoint that cannot be read, or that
reads as something else, is set aside and the one before is used.
"""

import contextlib
import functools
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from abkd_jax import files, parallel
from abkd_jax.data import Stream
from abkd_jax.train import hosts

FOLDER = "checkpoints"  # of a run, or of a part of it
_UNKNOWN = -1e30  # the score of a state that was saved without an evaluation: never the best


class Checkpoints:
    """The checkpoints of one phase of a run, by step."""

    def __init__(self, directory: pathlib.Path, *, reads: bool = False):
        """Opens the folder, which is made at the first save.

        Args:
            directory: that holds them.
            reads: whether nothing is saved, and another process may be at work in the folder.
        """
        directory = files.path_of(directory)
        self.directory = directory if files.in_bucket(directory) else directory.resolve()
        hosts.by_first(lambda: _hide_unreadable_scores(self.directory))
        # `max_to_keep` with `best_fn` would delete the newest steps whenever the score falls.
        kept = AnyPreservationPolicy([LatestN(2), BestN(get_metric_fn=_score, n=1)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept,
            best_fn=_score,
            cleanup_tmp_directories=not reads,
            # Else threads wait 300 s for a folder that could not be made, and the process for them.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saved = self._manager.latest_step()

    def save(self, step: int, tree: Any, *, score: float | None = None) -> None:
        """Saves in the background; the arrays may be donated or changed as soon as this returns.

        Args:
            step: that the state has reached.
            tree: of arrays.
            score: by which the best is chosen, the highest; None leaves this one out of that.

        Raises:
            OSError: one sentence, if this checkpoint or the one before could not be written.
        """
        if step == self._saved:
            return
        # Orbax may read a CPU's buffers in place while it writes: give it some that nobody reuses.
        tree = jax.tree.map(np.array if jax.process_count() == 1 else jax.numpy.copy, tree)
        known = score is not None and math.isfinite(score)
        metrics = {"score": float(score) if known else _UNKNOWN}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), about=ocp.args.JsonSave(_about(tree, metrics))
        )
        self._guarded(step, lambda: self._manager.save(step, args=items, metrics=metrics))
        self._saved = step

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
            OSError: one sentence, if it could not be written.
        """
        self._guarded(None, self._manager.wait_until_finished)

    def close(self) -> None:
        """Ends the background work, whatever became of it."""
        try:
            self._manager.close()
        except Exception as error:  # a failed save was reported when it failed
            print(f"{self.directory}: {_first_line(error)}", file=sys.stderr)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, like: Any = None) -> tuple[int, Any] | None:
        """The newest checkpoint that is whole; damaged ones are set aside with a line on stderr.

        Args:
            like: a tree of arrays of the shapes and types to expect; None for whatever there is,
                as nested dicts.

        Returns:
            (step, tree of host arrays), or None without a checkpoint.

        Raises:
            ValueError: if there are checkpoints, none of which can be read.
        """
        damaged = {}
        for step in reversed(hosts.agree(self.steps())):
            try:
                tree = hosts.everyone(functools.partial(self._whole, step, like))
            except ValueError as error:
                damaged[step] = f"{error}"
                continue
            for broken, reason in damaged.items():
                aside = hosts.by_first(functools.partial(self._set_aside, broken))
                self._reload()
                if hosts.is_first():
                    print(
                        f"{self.directory}: the checkpoint of step {broken} is damaged ({reason}); "
                        f"it was moved to {aside}, and that of step {step} is used.",
                        file=sys.stderr,
                    )
            return step, tree
        if damaged:
            raise ValueError(
                f"{self.directory}: no checkpoint can be read; that of step {max(damaged)}: "
                f"{damaged[max(damaged)]}. Move the folder away to start anew."
            )
        return None

    def restore_at(self, step: int, like: Any = None) -> Any:
        """The checkpoint of one step, as host arrays; `like` is as in `restore`.

        Raises:
            ValueError: one sentence, if it is damaged.
        """
        try:
            return self._read(step, like)
        except Exception as error:
            raise ValueError(
                f"{self.directory}: the checkpoint of step {step} is damaged "
                f"({_first_line(error)}); move it away and run the same command again."
            ) from error

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints."""
        return sorted(self._manager.all_steps())

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the best checkpoint; None if none was evaluated."""
        step = self._manager.best_step()
        score = None if step is None else self._manager.metrics(step)["score"]
        return None if score in (None, _UNKNOWN) else (step, score)

    def _whole(self, step: int, like: Any) -> Any:
        """See `_read`; what is wrong with it is a ValueError."""
        try:
            return self._read(step, like)
        except Exception as error:  # of orbax, tensorstore, JSON, ...
            raise ValueError(_first_line(error)) from error

    def _read(self, step: int, like: Any) -> Any:
        target = jax.tree.map(_target, self._shapes(step) if like is None else like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), about=ocp.args.JsonRestore()
        )
        # What one process cannot read none goes on to compare, which takes all of them.
        restored = hosts.everyone(lambda: self._manager.restore(step, args=items))
        tree = jax.tree.map(_here, restored.state)
        if _about(tree, self._manager.metrics(step)) != restored.about:
            raise ValueError("it is not what was saved")
        for (path, array), (_, expected) in zip(_leaves(tree), _leaves(target), strict=False):
            if array.shape != expected.shape:
                raise ValueError(f"{path} has the shape {array.shape}, not {expected.shape}")
        return tree

    def _shapes(self, step: int) -> Any:
        """The arrays of a checkpoint; without them orbax reads it on as many devices alone."""
        handler = ocp.StandardCheckpointHandler()
        with contextlib.closing(handler):
            return handler.metadata(self.directory / str(step) / "state").tree

    def _set_aside(self, step: int) -> str:
        aside = self.directory.with_name(f"{self.directory.name}_damaged")
        aside.mkdir(exist_ok=True)
        # In a bucket it exists from the first file on.
        files.write(aside / "about.txt", b"Checkpoints that could not be read.\n")
        name, number = str(step), 1
        while (aside / name).exists():
            name, number = f"{step}_{number}", number + 1
        (self.directory / str(step)).rename(aside / name)
        return f"{aside / name}"

    def _reload(self) -> None:
        self._manager.reload()
        self._saved = self._manager.latest_step()

    def _guarded(self, step: int | None, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            whole = [s for s in self.steps() if s != step]
            kept = f"that of step {whole[-1]} is kept" if whole else "there is none before it"
            raise OSError(
                f"{self.directory}: a checkpoint could not be written ({_first_line(error)}); "
                f"{kept}: make room and run the same command again."
            ) from error


def digest(tree: Any) -> str:
    """The SHA-256 of a tree's arrays: of their paths, types, shapes and bytes.

    Args:
        tree: of arrays; of a stream, which is not read, the numbers of its rows count.

    Returns:
        64 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for path, leaf in _leaves(tree):
        array = parallel.fetched(leaf.rows if isinstance(leaf, Stream) else leaf)
        sha.update(f"{path} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8))  # bfloat16 has no buffer
    return sha.hexdigest()


def _about(tree: Any, metrics: Mapping[str, float] | None) -> dict[str, Any]:
    """What a checkpoint says of itself: enough to see that it is what was saved.

    By values alone, since a tree that is read without its types has dicts in place of attributes.
    Of several processes each calls it, and has one array at a time as a whole.
    """
    digests = sorted(digest(leaf) for leaf in jax.tree.leaves(tree))
    return {"sha256": hashlib.sha256("".join(digests).encode()).hexdigest(), "metrics": metrics}


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _target(like: Any) -> Any:
    """What orbax is to make of an array: one of the host, or its parts on several processes."""
    if getattr(like, "is_fully_addressable", True):
        return np.empty(np.shape(like), like.dtype)
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)


def _here(x: Any) -> Any:
    """An array of the host, but for one of several processes."""
    return np.asarray(x) if getattr(x, "is_fully_addressable", True) else x


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _hide_unreadable_scores(directory: pathlib.Path) -> None:
    """Without its score a checkpoint is damaged; with half of it none could be opened."""
    for path in directory.glob("[0-9]*/metrics/metrics"):
        try:
            json.loads(path.read_bytes())["score"]
        except (ValueError, KeyError, TypeError):
            path.parent.rename(path.parent.with_name("metrics_damaged"))


def _first_line(error: BaseException) -> str:
    """What went wrong, short; the cause, where the message wraps one."""
    text = f"{error}".strip() or type(error).__name__
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return "no space left on the device"
    return text.splitlines()[0][:200].rstrip(".")
