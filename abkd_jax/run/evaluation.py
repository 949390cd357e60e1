"""Evaluation of networks on a whole split: sums that add up, and rows where a figure needs them."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import data, parallel
from abkd_jax.losses import in_chunks
from abkd_jax.tasks import Task
from abkd_jax.train import Networks, eval_outputs
from abkd_jax.types import Batch

_MOST_NUMBERS = 2**27  # of a network's rows that are gathered: half a gigabyte in float32

Rows = dict[str, dict[str, np.ndarray]]
"""{network: {name: [rows, ...]}}, see `Task.rows`"""


def summarized(
    sums_of: Callable[[Batch], Any], task: Task, batches: Iterable[Batch]
) -> Mapping[str, Mapping[str, Any]]:
    """The summary of a whole split, from the sums of its batches.

    Args:
        sums_of: of a batch; they may be stacked over members.
        task: that summarises them.
        batches: of the split.

    Returns:
        {network: {metric: value}}, and the like for pairs.
    """
    added = functools.partial(jax.tree.map, jnp.add)
    return task.summary(functools.reduce(added, map(sums_of, batches)))


def batches_of(
    split: data.Split | data.Stream,
    size: int,
    mesh: Mesh,
    preprocess: data.Preprocess | None = None,
) -> Iterator[Batch]:
    """`data.evaluation_batches` as all processes see them: of a stream the rows of all of them."""
    several = jax.process_count() > 1 and isinstance(split, data.Stream)
    for batch in data.evaluation_batches(split, size, preprocess):
        yield parallel.joined(batch, mesh) if several else batch


def evaluate(
    networks: Networks,
    split: data.Split | data.Stream,
    task: Task,
    *,
    size: int,
    preprocess: data.Preprocess,
    mesh: Mesh,
    names: Sequence[str] | None = None,
    gather: bool = False,
    chunk: int = 0,
) -> tuple[dict[str, dict[str, Any]], Rows]:
    """What a task says of networks on a split.

    Args:
        networks: by name.
        split: to evaluate.
        task: how.
        size: of a batch.
        preprocess: of its inputs.
        mesh: of devices.
        names: of those that are judged, beside which the others are; None for all.
        gather: whether rows are wanted, too.
        chunk: of how many rows logits are formed at a time, see `losses.total`.

    Returns:
        {network: {metric: value}}, and the rows of each of them: the first ones of the split, as
        many as fit into half a gigabyte.
    """
    size, names = size + -size % mesh.size, tuple(networks if names is None else names)
    gathered: list[Any] = []

    def sums_of(batch: Batch) -> Any:
        how = dict(task=task, names=names, gather=gather, mesh=mesh, chunk=chunk)
        sums, rows = _evaluate(networks, batch, **how)
        if gather and _room(gathered):
            kept = parallel.fetched(batch["where"])
            gathered.append(jax.tree.map(lambda x: parallel.fetched(x)[kept], rows))
        return sums if jax.process_count() == 1 else parallel.fetched(sums)

    found = summarized(sums_of, task, batches_of(split, size, mesh, preprocess))
    rows = jax.tree.map(lambda *x: np.concatenate(x), *gathered) if gathered else {}
    found = {name: jax.tree.map(parallel.fetched, dict(found[name])) for name in names}
    return found, rows


@functools.partial(jax.jit, static_argnames=("task", "names", "gather", "mesh", "chunk"))
def _evaluate(
    networks: Networks,
    batch: Batch,
    *,
    task: Task,
    names: tuple[str, ...],
    gather: bool,
    mesh: Mesh,
    chunk: int,
):
    def judged(outputs, batch):
        rows = {name: task.rows(outputs[name], batch) for name in names} if gather else {}
        return task.sums(outputs, batch, names), rows

    batch = parallel.split(batch, mesh)
    return in_chunks(judged, eval_outputs(networks, batch), batch, chunk=chunk, mesh=mesh)


def _room(gathered: list[Any]) -> bool:
    """Whether the rows of one more batch, as large as the first, are to be kept."""
    if not gathered:
        return True
    largest = max(sum(x.size for x in rows.values()) for rows in gathered[0].values())
    return (len(gathered) + 1) * largest <= _MOST_NUMBERS
