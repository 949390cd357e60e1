"""A teacher's outputs for the rows of a text, written once for all runs that learn from it."""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from abkd_jax import files, parallel
from abkd_jax.checks import require
from abkd_jax.config.schema import resolve
from abkd_jax.data import TopCache, vocabulary_hash, write_top_cache
from abkd_jax.divergences.combinators import top_of
from abkd_jax.losses import in_chunks
from abkd_jax.losses.chunks import default_chunk
from abkd_jax.run import phases
from abkd_jax.run import workdir as folders
from abkd_jax.run.interruption import Interruption
from abkd_jax.train import Networks, eval_outputs, frozen, hosts
from abkd_jax.train.checkpoint import digest
from abkd_jax.train.sharding import sharded
from abkd_jax.types import Batch, Top


def cache_teacher(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    network: str = "teacher",
    k: int,
    shard_rows: int = 1024,
) -> TopCache:
    """Writes what a network shows of the training rows of a config, or goes on with it.

    Each process runs the network on its own devices, for shards of its own.

    Args:
        config: of a run whose data are text, in which the network has weights.
        folder: of the cache, which is made; a `cached` model reads it.
        network: its name.
        k: how many of the likeliest classes are kept of each predicted token, at most K.
        shard_rows: rows of a shard.

    Returns:
        The cache.

    Raises:
        ValueError: one sentence, if the config or the folder cannot be used.
        OSError: if a file cannot be written; the shards that are whole are kept.
    """
    plan = resolve(config)
    require(network in plan.networks, "network", f"one of {', '.join(plan.networks)}", network)
    there = plan.networks[network].weights
    require(there, f"{network}.weights", "given, such as by teacher='runs/text/teacher'", None)
    count = plan.description.num_classes
    require(type(k) is int and 1 <= k <= count, "k", f"between 1 and {count}", k)
    shape = plan.description.labels.shape
    require(len(shape) == 1, "data.fn", "of text, such as 'topics'", plan.config["data"]["fn"])
    plan = plan._replace(networks={network: plan.networks[network]})
    own = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    mesh, folder = plan.mesh(jax.local_devices()), files.on_disk(folder, "folder")
    with folders.locked(folder / f".process_{own['process_index']}"):
        run = phases.Run(plan, folder, plan.data(), mesh, Interruption())
        state = frozen(phases.ready(run)[network])
        about = {"k": k, "num_classes": count, "length": shape[0]}
        about |= {"vocabulary": vocabulary_hash(run.data.class_names)}
        about |= {"teacher": digest(state.params)}
        chunk = plan.config["chunk"] or default_chunk(count)
        teacher = sharded({network: state}, mesh)
        forward = functools.partial(_top, teacher, k=k, chunk=chunk, mesh=mesh)
        options = {"size": plan.config["batch_size"], "preprocess": run.data.preprocess}
        options |= {"shard_rows": shard_rows, "about": about, "once": hosts.by_first} | own
        return write_top_cache(folder, run.data.full, forward, **options)


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh"))
def _top(teacher: Networks, batch: Batch, *, k: int, chunk: int, mesh: Mesh) -> Top:
    """`top_of` every predicted token; logits are formed for a chunk of them at a time."""

    def of_rows(outputs, batch):
        (shown,) = outputs.values()
        return (), top_of(shown.logits, k)

    batch = parallel.split(batch, mesh)
    return in_chunks(of_rows, eval_outputs(teacher, batch), batch, chunk=chunk, mesh=mesh)[1]
