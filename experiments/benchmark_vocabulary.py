"""Value and gradients of losses over a large vocabulary, in chunks, against their bare products.

    python -m experiments.benchmark_vocabulary

The gradients are those in the student's hidden states and in its head. The bare products are both
logits and these gradients, in the same chunks, with the difference of the logits for a slope.
Everyone has a turn in each round, in one process; a line gives the median over rounds with its
quartiles, then XLA's temporaries, as a part of those of all logits at once, and the peak memory of
a process for this line alone, with what it had before the call. torch has the textbook's formulas,
unfused; without torch its rows are skipped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's idle threads slow down the rest

import importlib.util
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import Array
from jax import numpy as jnp

from abkd_jax import Head, Outputs, Term, bind, divergences, losses, timing
from abkd_jax.config import command
from abkd_jax.losses.chunks import chunked, default_chunk

_TOKENS = flags.DEFINE_integer("tokens", 2048, "Rows.", lower_bound=1)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 50_257, "K.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds, each with a turn of everyone.", lower_bound=2)
_CHUNK = flags.DEFINE_integer("chunk", 0, "Rows at a time; 0 for the default.", lower_bound=0)
_ALONE = flags.DEFINE_string(
    "alone", "", "Calls this once; prints the memory before, and its peak."
)

_WIDTHS = 256, 512  # of the student and of the teacher
_NUMBERS = dict(
    forward_kl={},
    reverse_kl={},
    jensen_shannon=dict(teacher_weight=0.5),
    alpha_beta=dict(alpha=0.2, beta=0.7),
)
_BARE, _TORCH = "bare products", "torch, textbook "


def main() -> None:
    """Prints the table, or the memory of one of its lines."""
    chunk = _CHUNK.value or default_chunk(_VOCABULARY.value)
    if _ALONE.value:
        call, before = _call(_ALONE.value, _arrays(), chunk), _peak()
        jax.block_until_ready(call())
        print(before, _peak())
        return
    names = [_BARE, *_NUMBERS]
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: its rows are skipped (pip install -e '.[torch]')")
    else:
        names += [_TORCH + name for name in _NUMBERS]
    shape = f"{_TOKENS.value} x {_VOCABULARY.value}, widths {_WIDTHS}, float32, chunk {chunk}"
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{shape}, {jax.default_backend()}; {_ROUNDS.value} rounds, {load}")
    print(f"{'':31}{'s':>24}{'/ bare products':>20}{'temporaries':>13}{'peak MB (before)':>18}")
    peaks = {name: _peak_of(name, chunk) for name in names}  # a process begins with its parent's
    arrays = _arrays()
    calls = {name: _call(name, arrays, chunk) for name in names}
    seconds = timing.in_turn(calls, _ROUNDS.value)
    for name, times in seconds.items():
        cells = timing.quartiles(times, ".3f"), timing.quartiles(times / seconds[_BARE], ".2f")
        part = "" if name not in _NUMBERS else f"{_temporaries(name, arrays, chunk):.3f}"
        print(f"{name:31}{cells[0]:>24}{cells[1]:>20}{part:>13}{peaks[name]:>18}")


def _arrays() -> list[np.ndarray]:
    """Hidden states `[N, D]` and the unembedding `[D, K]` of the student, and of the teacher."""
    rng, found = np.random.default_rng(0), []
    for width in _WIDTHS:
        found.append(rng.standard_normal((_TOKENS.value, width), np.float32))
        unembedding = rng.standard_normal((width, _VOCABULARY.value), np.float32)
        unembedding *= np.float32(2 / np.sqrt(width))
        found.append(unembedding)
    return found


def _call(name: str, arrays: list[np.ndarray], chunk: int) -> Callable[[], Any]:
    """A call that returns a value, if there is one, and the gradients."""
    if name.startswith(_TORCH):
        return _in_torch(name.removeprefix(_TORCH), arrays)
    program = jax.jit(_products(chunk) if name == _BARE else _gradients(name, chunk))
    placed = jax.device_put(arrays)
    return lambda: program(*placed)


def _gradients(name: str, chunk: int) -> Callable[..., Any]:
    divergence = bind(getattr(divergences, name), **_NUMBERS[name])
    distill = bind(losses.on_logits, divergence=divergence)
    terms = {"distill": Term(distill, jnp.ones(()), other="teacher")}

    def value(hidden, unembedding, *teacher):
        student, teacher = (
            Outputs(hidden=h, head=Head(w)) for h, w in ((hidden, unembedding), teacher)
        )
        batch = {"where": jnp.ones(len(hidden), bool)}
        return losses.total(terms, student, {"teacher": teacher}, batch, chunk=chunk)[0]

    return jax.value_and_grad(value, argnums=(0, 1))


def _products(chunk: int) -> Callable[..., Any]:
    def products(hidden, unembedding, teacher_hidden, teacher_unembedding):
        def step(summed: Array, rows: tuple[Array, Array]):
            student, teacher = rows
            slope = student @ unembedding - teacher @ teacher_unembedding
            return summed + student.T @ slope, slope @ unembedding.T

        rows = (chunked(x, leading=1, chunk=chunk) for x in (hidden, teacher_hidden))
        return jax.lax.scan(step, jnp.zeros_like(unembedding), tuple(rows))

    return products


def _in_torch(name: str, arrays: list[np.ndarray]) -> Callable[[], Any]:
    import torch

    hidden, unembedding, *teacher = map(torch.from_numpy, arrays)
    leaves = [hidden.requires_grad_(), unembedding.requires_grad_()]

    def call():
        log_q = torch.log_softmax(hidden @ unembedding, -1)
        log_p = torch.log_softmax(teacher[0] @ teacher[1], -1)
        value = _TEXTBOOK[name](torch, log_p.exp(), log_q.exp(), log_p, log_q).sum(-1).mean()
        return value.item(), torch.autograd.grad(value, leaves)

    return call


def _textbook_alpha_beta(torch, p, q, log_p, log_q):
    a, b = _NUMBERS["alpha_beta"].values()
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)


def _textbook_jensen_shannon(torch, p, q, log_p, log_q):
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)) / 2


_TEXTBOOK = dict(
    forward_kl=lambda torch, p, q, log_p, log_q: p * (log_p - log_q),
    reverse_kl=lambda torch, p, q, log_p, log_q: q * (log_q - log_p),
    jensen_shannon=_textbook_jensen_shannon,
    alpha_beta=_textbook_alpha_beta,
)


def _temporaries(name: str, arrays: list[np.ndarray], chunk: int) -> float:
    """Of the program in chunks, as a part of those of the program for all rows at once."""
    found = []
    for size in (chunk, 0):
        compiled = jax.jit(_gradients(name, size)).lower(*arrays).compile()
        found.append(compiled.memory_analysis().temp_size_in_bytes)
    return found[0] / found[1]


def _peak_of(name: str, chunk: int) -> str:
    """The peak of a process that calls this once, and in brackets what it had before."""
    sizes = {"tokens": _TOKENS.value, "vocabulary": _VOCABULARY.value, "chunk": chunk}
    options = [f"--{key}={value}" for key, value in sizes.items()]
    command = [sys.executable, "-m", __spec__.name, f"--alone={name}", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak = map(float, done.stdout.split())
    return f"{peak:.0f} ({before:.0f})"


def _peak() -> float:
    """The most memory that the process has had, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


if __name__ == "__main__":
    command.run(main)
