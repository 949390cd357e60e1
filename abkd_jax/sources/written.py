"""Rows of text whose responses a network writes: what the sources of language are made of.

Rows are {"inputs": Tokens `[B, T]`, "where": `[B, T]`, True where the next token is one of the
response, its end included, "log_probs": `[B, T]`, that token's by the network that wrote it}.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax.binding import Schedule, at_step
from abkd_jax.checks import require
from abkd_jax.data.augment import step_key
from abkd_jax.generate import generate
from abkd_jax.models import Decoder, base_of, merged
from abkd_jax.sources.source import Setting
from abkd_jax.types import Batch, Tokens

Rows = dict[str, Any]
_GENERATION = 0x67656E  # folded into a step's key; networks fold in small indices
WRITTEN = "written"  # the mask of tokens that a network wrote
_GRAM = 4  # tokens, of those whose repetition is counted


def writer(
    setting: Setting,
    by: str,
    mask: str,
    max_new_tokens: int,
    temperature: float | Array | Schedule,
    top_k: int,
    top_p: float | Array | Schedule,
) -> Callable[[Any, Batch, Array, Array], Rows]:
    """A function that has a network write the responses of a batch.

    Args:
        setting: of the phase.
        by: the network's name.
        mask: of the rows whose responses are written; of the others none counts.
        max_new_tokens: N, the most tokens of a response, for which prompts longer than T - N lose
            their beginning; 0 for half of T.
        temperature: of the draws.
        top_k: how many of the likeliest tokens are drawn from; 0 for all.
        top_p: the mass of the likeliest tokens that are drawn from; 1 for all.

    Returns:
        `(networks, batch, key, step) -> Rows`.

    Raises:
        ValueError: one sentence that names the field.
    """
    inputs, group = setting.description.inputs, setting.data
    text = isinstance(inputs, Tokens)
    require(text, f"{setting.field}.fn", "'dataset', for data that are no text", group.get("fn"))
    expected = f"one of {', '.join(setting.modules)}, which take part in the phase"
    require(by in setting.modules, f"{setting.field}.by", expected, by)
    module = base_of(setting.modules[by])
    while hasattr(module, "module"):  # around a decoder, whose parameters it shares
        module = module.module
    masks = setting.description.masks
    require(mask in masks, f"{setting.field}.where", f"one of {', '.join(masks)}", mask)
    fits = isinstance(module, Decoder)
    expected = "a decoder of the library, for it writes"
    require(fits, f"{setting.field}.by", expected, f"{by}, which is none")
    for key, off in (("pack", False), ("lengths", ())):
        expected = f"{off!r} where a network writes responses, for rows of one text and one length"
        require(not group.get(key), f"data.{key}", expected, group.get(key))
    check_responses_alone(group)
    length = inputs.ids.shape[-1]
    new = max_new_tokens or length - length // 2
    expected = f"between 1 and data.length - 1 = {length - 1}, or 0 for half of it"
    require(1 <= new < length, f"{setting.field}.max_new_tokens", expected, max_new_tokens)
    require(top_k >= 0, f"{setting.field}.top_k", "at least 0", top_k)
    cut = isinstance(top_p, Schedule) or float(top_p) < 1
    eos = setting.description.eos

    def write(networks: Any, batch: Batch, key: Array, step: Array) -> Rows:
        chosen = jnp.any(batch[mask], axis=-1, keepdims=True)
        state, numbers = networks[by], at_step({"temperature": temperature, "top_p": top_p}, step)
        found, log_probs = generate(
            module,
            {"params": merged(setting.modules[by], state.whole(state.eval_params))},
            prompts(batch, length - new),
            key=key,
            max_new_tokens=new,
            temperature=numbers["temperature"],
            top_k=top_k or None,
            top_p=numbers["top_p"] if cut else None,
            stop=(eos,) if eos >= 0 else (),
        )
        before = ((0, 0), (length - new - 1, 1))  # the token at t is told of at t - 1
        where = jnp.pad(found.segments[:, length - new :] > 0, before) & chosen
        log_probs = jnp.where(where, jnp.pad(log_probs, before), 0.0)
        return {"inputs": found, "where": where, "log_probs": log_probs}

    return write


def check_responses_alone(group: Mapping[str, Any]) -> None:
    """Refuses data whose prompts count, where they are asked for: nothing tells where they end."""
    expected = "'response' where a network writes responses (of documents all counts all the same)"
    loss_on = group.get("loss_on", "response")
    require(loss_on == "response", "data.loss_on", expected, loss_on)


def prompts(batch: Batch, most: int) -> Tokens:
    """`[B, most]`: of each row what stands before its first token that counts, or the end of that.

    Of a row of which everything counts, such as plain text, the first half.
    """
    there = batch["inputs"].segments > 0
    before = jnp.argmax(batch["where"], axis=-1)
    counts = jnp.where(before > 0, before + 1, jnp.maximum(jnp.sum(there, axis=-1) // 2, 1))
    first = jnp.maximum(counts - most, 0)[:, None]
    places = first + jnp.arange(most)
    known = (places < counts[:, None]) & there[:, :1]
    ids = jnp.take_along_axis(batch["inputs"].ids, places, axis=-1, mode="clip")
    parts = jnp.where(known, ids, 0), jnp.where(known, places - first, 0)
    return Tokens(*parts, known.astype(jnp.int32))


def empty_rows(setting: Setting, *leading: int) -> Rows:
    """Rows `[*leading, B, T]` of nothing."""
    shape = (*leading, setting.batch_size, *setting.description.inputs.ids.shape)
    zeros = [jnp.zeros(shape, jnp.int32) for _ in range(3)]
    rows = {"inputs": Tokens(*zeros), "where": jnp.zeros(shape, bool)}
    return rows | {"log_probs": jnp.zeros(shape)}


def in_place_of(
    batch: Batch, rows: Rows, used: Array, *, mask: str = "where", labelled: bool = False
) -> Batch:
    """A batch, or the rows written in its place.

    Args:
        batch: of data.
        rows: as many.
        used: whether these are taken.
        mask: in place of those rows alone that have some of it.
        labelled: whether the tokens written are labels.

    Returns:
        The batch. "sampled" has the next token where one was written, and else -1; "log_probs" its
        log-probability by the network that wrote it, and else 0; the mask "written" is True there.
        Another mask has all of a written row that counts, if it had some of the row in its place.
    """
    used = used & jnp.any(batch[mask], axis=-1, keepdims=True)
    taken = rows["where"] & used
    sampled = jnp.where(taken, jnp.roll(rows["inputs"].ids, -1, axis=-1), -1)
    masks = {name: x for name, x in batch.items() if getattr(x, "dtype", None) == jnp.bool_}
    of_rows = {name: jnp.any(x, axis=-1, keepdims=True) & taken for name, x in masks.items()}
    of_rows |= {"where": taken, "labelled": taken & labelled}
    chosen = {name: jnp.where(used, of_rows[name], x) for name, x in masks.items()}
    labels = jnp.where(used, sampled if labelled else -1, batch["labels"])
    inputs = jax.tree.map(lambda a, b: jnp.where(used, a, b), rows["inputs"], batch["inputs"])
    log_probs = jnp.where(taken, rows["log_probs"], 0.0)
    found = {"inputs": inputs, "labels": labels, "sampled": sampled, "log_probs": log_probs}
    return {**batch, **chosen, **found, WRITTEN: taken}


def told(rows: Rows, eos: int) -> dict[str, Array]:
    """Of responses: their mean "length", the share "stopped" that ended of themselves, the
    "repetition", which is the share of their 4-grams that occurred before in the same response, and
    the "nll" of a token by the network that wrote it.

    Source: for the repetition, Welleck et al., "Neural text generation with unlikelihood training",
    ICLR 2020.
    """
    where = rows["where"].reshape(-1, rows["where"].shape[-1])
    ids = jnp.roll(rows["inputs"].ids.reshape(where.shape), -1, axis=-1)
    count = jnp.maximum(jnp.sum(where), 1)
    written = jnp.maximum(jnp.sum(jnp.any(where, axis=-1)), 1)
    grams = jnp.stack([jnp.roll(ids, -i, axis=-1) for i in range(_GRAM)], axis=-1)
    whole = where & jnp.roll(where, 1 - _GRAM, axis=-1)
    whole = whole & (jnp.arange(where.shape[-1]) <= where.shape[-1] - _GRAM)

    def repeated(grams: Array, whole: Array) -> Array:
        same = jnp.all(grams[:, None] == grams[None], axis=-1)
        earlier = jnp.tril(jnp.ones(same.shape, bool), -1) & whole[None]
        return jnp.sum(whole & jnp.any(same & earlier, axis=-1))

    repetitions = jnp.sum(jax.lax.map(lambda x: repeated(*x), (grams, whole)))
    return {
        "length": jnp.sum(where) / written,
        "stopped": jnp.sum(where & (ids == eos)) / written,
        "repetition": repetitions / jnp.maximum(jnp.sum(whole), 1),
        "nll": -jnp.sum(rows["log_probs"]) / count,
    }


def generation_key(data_seed: Array, step: Array) -> Array:
    """The key of what a source draws for a step."""
    return jax.random.fold_in(step_key(data_seed, step), _GENERATION)
