"""Tokens per second of greedy generation, beside transformers, and what an empty cache costs.

    python -m experiments.benchmark_generation --folder=DIR

A turn reads prompts of 64 tokens and writes 64 more. Everyone has a turn in each round, in one
process; a line gives the median over rounds with its quartiles. Without transformers its rows are
skipped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's idle threads slow down the rest

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import numpy as jnp

from abkd_jax import Tokens, generate, models, timing
from abkd_jax.config import command

_FOLDER = flags.DEFINE_string("folder", None, "Of a Hugging Face model.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds, each with a turn of everyone.", lower_bound=2)
_ROWS = flags.DEFINE_list("rows", ["1", "8", "16"], "Prompts at once.")
_PROMPT, _NEW = 64, 64
_PLACES = 128, 2048  # of the caches that are compared
_OURS, _THEIRS = "abkd_jax", "transformers"


def main() -> None:
    """Prints the tables."""
    module, variables = models.load_decoder(_FOLDER.value)
    variables = jax.tree.map(jnp.asarray, variables)  # once, not at each call
    load = f"{_ROUNDS.value} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{_PROMPT} + {_NEW} tokens, float32, {jax.default_backend()}; {load}")
    print(f"{'':24}{'tokens/s':>26}{'/ transformers':>22}")
    for rows in map(int, _ROWS.value):
        ids = _prompts(module, rows)
        calls = {_OURS: functools.partial(_written, module, variables, ids, _NEW)}
        if importlib.util.find_spec("transformers"):
            calls[_THEIRS] = _in_transformers(ids)
        seconds = timing.in_turn(calls, _ROUNDS.value)
        for name, times in seconds.items():
            speed = timing.quartiles(rows * _NEW / times, ".1f")
            ratio = timing.quartiles(seconds.get(_THEIRS, times) / times, ".2f")
            print(f"{f'{name}, {rows} rows':24}{speed:>26}{ratio:>22}", flush=True)
    ids = _prompts(module, 16)
    ids, stop = _longest(ids, np.asarray(_written(module, variables, ids, _NEW)[0].ids))
    calls = {
        f"a cache of {x}": functools.partial(
            _written, module, variables, ids, x - _PROMPT, stop=stop
        )
        for x in _PLACES
    }
    seconds = timing.in_turn(calls, _ROUNDS.value)
    first = next(iter(seconds.values()))
    print(f"{'':24}{'s':>26}{'/ first':>22}{'filled':>10}")
    for name, times in seconds.items():
        cells = timing.quartiles(times, ".3f"), timing.quartiles(times / first, ".2f")
        filled = int(jnp.sum(calls[name]()[0].segments > 0))
        print(f"{name:24}{cells[0]:>26}{cells[1]:>22}{filled:10}")


def _prompts(module: Any, rows: int) -> np.ndarray:
    drawn = np.random.default_rng(0)
    return drawn.integers(module.architecture.num_classes, size=(rows, _PROMPT))


def _written(module: Any, variables: Any, ids: np.ndarray, new: int, **how: Any) -> Any:
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    prompts = Tokens(jnp.asarray(ids), places, jnp.ones(ids.shape, int))
    how = dict(key=jax.random.key(0), max_new_tokens=new, temperature=0.0) | how
    return generate(module, variables, prompts, **how)


def _longest(prompts: np.ndarray, written: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of some prompts the one `[1, _PROMPT]`, and a token `[1]`, by which it stops the latest."""
    new = written[:, _PROMPT:]
    last = [max(n for n, token in enumerate(row) if token not in row[:n]) for row in new]
    row = int(np.argmax(last))
    return prompts[[row]], new[row, [last[row]]]


def _in_transformers(ids: np.ndarray) -> Callable[[], Any]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(_FOLDER.value, dtype=torch.float32)
    model.eval()
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=int)}
    how = dict(max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, pad_token_id=0)

    def call():
        with torch.inference_mode():
            return model.generate(**given, **how).numpy()

    return call


if __name__ == "__main__":
    command.run(main)
