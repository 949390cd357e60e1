"""Text that a decoder writes: prefill and decode as one compiled function."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax.binding import NonNegative
from abkd_jax.checks import require
from abkd_jax.models.decoder import Decoder
from abkd_jax.models.decoding import decoded, empty_caches, unstacked
from abkd_jax.models.transformer import Cache
from abkd_jax.types import Tokens

_LEAST = 1e-30  # in place of a temperature of 0, where something is divided by it


@struct.dataclass
class _State:
    """Of the loop: how many tokens are written, and all that the next one depends on.

    Attributes:
        count: of new tokens so far.
        ids: `[B, N]` of the new tokens.
        log_probs: `[B, N]`.
        done: `[B]`, whether a row has stopped.
        caches: of each layer, of P + N places.
    """

    count: Array
    ids: Array
    log_probs: Array
    done: Array
    caches: list[Cache]


def generate(
    module: Decoder,
    variables: Any,
    prompts: Tokens,
    *,
    key: Array,
    max_new_tokens: int,
    temperature: NonNegative = 1.0,
    top_k: int | Array | None = None,
    top_p: float | Array | None = None,
    stop: Sequence[int] | Array = (),
    samples: int = 1,
) -> tuple[Tokens, Array]:
    """Responses to prompts, a token at a time from the network's own distribution.

    One program for all numbers but `max_new_tokens`, `samples`, and whether top_k and top_p are
    given, without which nothing is sorted. It ends when every row has stopped. A token's draw
    depends on the key, its row and its place alone.

    Args:
        module: a `decoder`.
        variables: its parameters, which stay as they are; there is no dropout.
        prompts: Tokens `[B, P]`, each row one segment, with padding on either side.
        key: of the draws.
        max_new_tokens: N, the most tokens of a response.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: how many of the likeliest tokens are drawn from; None for all.
        top_p: the least mass of the likeliest tokens that are drawn from, at the temperature; None
            for all.
        stop: ids that end a response, which keeps the first of them.
        samples: of each prompt, which is read once.

    Returns:
        Tokens `[B * samples, P + N]`, the samples of a prompt one after the other: its tokens,
        moved to end at P, and the response, with segment 0 from its end on; and the log-probability
        of each new token by the network as it is, whatever the temperature, `[B * samples, N]`, 0
        after a response's end.

    Raises:
        ValueError: one sentence that names the argument, what was found and what was expected.
    """
    require(isinstance(module, Decoder), "module", "a decoder", type(module).__name__)
    require(max_new_tokens >= 1, "max_new_tokens", "at least 1", max_new_tokens)
    require(samples >= 1, "samples", "at least 1", samples)
    check_length(module, prompts.ids.shape[-1] + max_new_tokens)
    numbers = temperature, top_k, top_p, jnp.asarray(stop, jnp.int32).reshape(-1)
    static = {"max_new_tokens": max_new_tokens, "samples": samples}
    return _generate(module, variables["params"], prompts, key, *numbers, **static)


def check_length(module: Decoder, length: int) -> None:
    """Refuses prompts and responses that together are longer than a decoder's positions."""
    most = module.architecture.max_length
    fits = module.architecture.positions != "learned" or length <= most
    expected = f"at most the {most} learned positions"
    require(fits, "the prompts' length and max_new_tokens together", expected, length)


@functools.partial(jax.jit, static_argnames=("module", "max_new_tokens", "samples"))
def _generate(
    module, params, prompts, key, temperature, top_k, top_p, stop, *, max_new_tokens, samples
):
    params, prompts = unstacked(module, params), _ending_together(prompts)
    rows, width = prompts.ids.shape
    lengths = jnp.sum(prompts.segments > 0, axis=-1)  # of the prompts
    filled = jnp.pad(prompts.segments > 0, ((0, 0), (0, max_new_tokens)), constant_values=True)
    caches = empty_caches(module, rows, width + max_new_tokens)
    logits, caches = decoded(module, params, prompts, caches, filled)
    repeated = lambda x: jnp.repeat(x, samples, axis=0) if x.ndim else x  # noqa: E731
    shared = logits, caches, lengths, filled, prompts
    logits, caches, lengths, filled, prompts = jax.tree.map(repeated, shared)
    rows = rows * samples

    def written(state: _State, logits: Array) -> _State:
        """With one more token in each row that goes on."""
        at = state.count
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(key, at), jnp.arange(rows)
        )
        token = jax.vmap(_drawn, (0, 0, None, None, None))(logits, keys, temperature, top_k, top_p)
        log_q = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return state.replace(
            count=at + 1,
            ids=state.ids.at[:, at].set(jnp.where(state.done, 0, token)),
            log_probs=state.log_probs.at[:, at].set(jnp.where(state.done, 0.0, log_q)),
            done=state.done | jnp.any(token[:, None] == stop, axis=-1),
        )

    def step(state: _State) -> _State:
        last = state.count - 1
        place = (lengths + last)[:, None]
        tokens = Tokens(state.ids[:, last][:, None], place, jnp.ones_like(place))
        logits, caches = decoded(module, params, tokens, state.caches, filled)
        return written(state.replace(caches=caches), logits)

    shape = rows, max_new_tokens
    done = jnp.zeros(rows, bool)
    state = _State(jnp.int32(0), jnp.zeros(shape, jnp.int32), jnp.zeros(shape), done, caches)
    goes_on = lambda state: (state.count < max_new_tokens) & ~jnp.all(state.done)  # noqa: E731
    state = jax.lax.while_loop(goes_on, step, written(state, logits))
    return _whole(prompts, state, stop, lengths), state.log_probs


def _whole(prompts: Tokens, state: _State, stop: Array, lengths: Array) -> Tokens:
    """Prompts and responses."""
    places = jnp.arange(state.ids.shape[-1])
    stops = jnp.any(state.ids[..., None] == stop, axis=-1) & (places < state.count)
    before = jnp.cumsum(stops, axis=-1) - stops  # how many stops precede a token
    written = (before == 0) & (places < state.count)
    ids = jnp.concatenate([prompts.ids, state.ids], axis=-1)
    positions = jnp.concatenate([prompts.positions, lengths[:, None] + places], axis=-1)
    segments = jnp.concatenate([prompts.segments, written.astype(jnp.int32)], axis=-1)
    return Tokens(ids, jnp.where(segments > 0, positions, 0), segments)


def _ending_together(prompts: Tokens) -> Tokens:
    """The prompts moved to the right, so that the last token of each is the last of its row."""
    there = prompts.segments > 0
    order = jnp.argsort(there, axis=-1, stable=True)  # padding first
    ids, there = (jnp.take_along_axis(x, order, axis=-1) for x in (prompts.ids, there))
    positions = jnp.maximum(jnp.cumsum(there, axis=-1) - 1, 0)
    return Tokens(jnp.where(there, ids, 0), positions, there.astype(jnp.int32))


def _drawn(logits: Array, key: Array, temperature: Any, top_k: Any, top_p: Any) -> Array:
    """A token of logits `[K]`: the largest of logits / temperature plus Gumbel's noise."""
    if top_k is not None:
        least = jnp.take(jnp.sort(logits, descending=True), top_k - 1, mode="clip")
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p is not None:
        ordered = jnp.sort(logits, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(ordered / jnp.maximum(temperature, _LEAST)))
        count = jnp.sum(mass < top_p)  # of those that are not enough
        logits = jnp.where(logits >= jnp.take(ordered, count, mode="clip"), logits, -jnp.inf)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jnp.argmax(logits + temperature * noise).astype(jnp.int32)
