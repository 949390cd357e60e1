"""DistiLLM's batches: the student's own text, the more of it the less it has still to learn."""

from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax.binding import NonNegative, Positive, Schedule, Unit
from abkd_jax.checks import require
from abkd_jax.sources.source import Setting, Source
from abkd_jax.sources.written import WRITTEN, empty_rows, generation_key, in_place_of, told, writer
from abkd_jax.types import Batch


def adaptive(
    *,
    setting: Setting,
    by: str,
    threshold: Unit = 0.0,
    rise: Unit = 0.1,
    tolerance: NonNegative = 0.1,
    capacity: int = 1000,
    where: str = "where",
    max_new_tokens: int = 0,
    temperature: Positive = 1.0,
    top_k: int = 0,
    top_p: Unit = 1.0,
) -> Source:
    """A batch of data, of the student's new text, or of what it wrote before.

    With r uniform in [0, 1), the threshold phi, and n of N steps done: the student writes a batch
    if r < phi (1 - n / N), or if r < phi and the buffer is not full yet; it is put into the buffer,
    which drops its oldest rows. Else, if r < phi, a batch of rows is drawn from the buffer, without
    replacement. Else the data are taken as they are. After an evaluation whose NLL is at least
    `tolerance` above that of reference, phi rises, and this NLL becomes the reference; the first
    one is that at step 0. In a sweep, whose members have thresholds of their own, all of them write
    at a step at which one does.

    Args:
        setting: of the phase.
        by: the student, which writes with the parameters of its evaluation, without dropout.
        threshold: phi at the beginning; 0 for GPT-2 and 0.2 for OpenLLaMA in the published runs.
        rise: of phi, up to 1.
        tolerance: of the NLL, in nats; 0.1 for GPT-2 and 0.2 for OpenLLaMA.
        capacity: of the buffer, in rows; at least a batch.
        where: see `generated`.
        max_new_tokens: likewise.
        temperature: likewise.
        top_k: likewise.
        top_p: likewise.

    Returns:
        The source. It logs "threshold", "replay", the buffer's filled share, "generated", the share
        of the phase's batches so far that were no data, and `written.told` of the last one of them.

    Raises:
        ValueError: one sentence that names the field.

    Source: Ko et al., "DistiLLM: towards streamlined distillation for large language models", ICML
    2024; numbers of its code.
    """
    write = writer(setting, by, where, max_new_tokens, temperature, top_k, top_p)
    size = setting.batch_size
    require(capacity >= size, f"{setting.field}.capacity", f"at least batch_size, {size}", capacity)
    for name, x in {"threshold": threshold, "rise": rise, "tolerance": tolerance}.items():
        fits = not isinstance(x, Schedule)
        require(fits, f"{setting.field}.{name}", "a number, and no schedule", type(x).__name__)
    learners = setting.learners
    require(by in learners, f"{setting.field}.by", f"one that learns, {', '.join(learners)}", by)

    def init() -> Any:
        empty = jax.tree.map(
            lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), empty_rows(setting)
        )
        return {
            "rows": empty_rows(setting),
            "used": jnp.asarray(False),
            "buffer": empty,
            "written": jnp.asarray(0, jnp.int32),  # rows, all in all
            "threshold": jnp.asarray(threshold, jnp.float32),
            "reference": jnp.asarray(jnp.inf, jnp.float32),
            "counts": {"generated": jnp.zeros(()), "all": jnp.zeros(())},
        }

    def refill(state: Any, networks: Any, examples: Any, data_seed: Array, step: Array) -> Any:
        key, phi = generation_key(data_seed, step), state["threshold"]
        drawn, full = jax.random.uniform(key), state["written"] >= capacity
        writes = (drawn < phi * (1 - step / setting.num_steps)) | ((drawn < phi) & ~full)

        def new() -> Any:
            batch = examples.batch(data_seed, step)
            rows = write(networks, batch, jax.random.fold_in(key, 1), step)
            own = jnp.any(batch[where], axis=-1)
            places = jnp.where(own, (state["written"] + jnp.cumsum(own) - 1) % capacity, capacity)
            put = lambda x, y: x.at[places].set(y, mode="drop")  # noqa: E731
            return rows, jax.tree.map(put, state["buffer"], rows), state["written"] + jnp.sum(own)

        def old() -> Any:
            scores = jax.random.uniform(jax.random.fold_in(key, 2), (capacity,))
            rows = jax.tree.map(lambda x: x[jnp.argsort(scores)[:size]], state["buffer"])
            rows = jax.tree.map(lambda x, y: jnp.where(drawn < phi, x, y), rows, state["rows"])
            return rows, state["buffer"], state["written"]

        new_or_old = lambda: jax.lax.cond(writes, new, old)  # noqa: E731
        rows, buffer, written = jax.lax.cond(_of_any(writes), new_or_old, old)
        used = drawn < phi
        counts = {"generated": used.astype(float), "all": 1.0}
        found = {"rows": rows, "used": used, "buffer": buffer, "written": written}
        return {**state, **found, "counts": jax.tree.map(jnp.add, state["counts"], counts)}

    def batch(state: Any, examples: Any, data_seed: Array, step: Array) -> Batch:
        own = examples.batch(data_seed, step)
        return in_place_of(own, state["rows"], state["used"], mask=where)

    def evaluated(state: Any, summary: Any) -> Any:
        nll, reference = summary[by]["nll"], state["reference"]
        worse = nll >= reference + tolerance
        phi = jnp.where(worse, jnp.minimum(state["threshold"] + rise, 1.0), state["threshold"])
        reference = jnp.where(worse | jnp.isinf(reference), nll, reference)
        return {**state, "threshold": phi, "reference": reference.astype(jnp.float32)}

    def logged(state: Any) -> dict[str, Array]:
        counts = state["counts"]
        return {
            "threshold": state["threshold"],
            "replay": jnp.minimum(state["written"], capacity) / capacity,
            "generated": counts["generated"] / jnp.maximum(counts["all"], 1),
        } | told(state["rows"], setting.description.eos)

    return Source(batch, init, refill, evaluated=evaluated, masks=(WRITTEN,), logged=logged)


@jax.custom_batching.custom_vmap
def _of_any(true: Array) -> Array:
    """Itself, and under vmap whether it is of any member: one condition for all, which can skip."""
    return true


@_of_any.def_vmap
def _(_size: int, _batched: list[bool], true: Array) -> tuple[Array, bool]:
    return jnp.any(true, axis=0), False
