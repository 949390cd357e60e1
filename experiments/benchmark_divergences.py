"""Value and gradient of the divergences against the textbook formula in PyTorch, on CPU.

    python -m experiments.benchmark_divergences

Every competitor takes its turn in each round, in one process, so that all see the same machine; a
turn is `--calls` calls, and more where they take less than 0.1 s, so that waking up the threads
does not count. A line gives the median over rounds with its quartiles, and the median of the times
over forward_kl's of the same round. The textbook formula is that of the ABKD paper: softmax,
powers, sums. Without torch its rows are skipped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's idle threads slow down the rest

import importlib.util
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax import numpy as jnp

from abkd_jax import divergences, timing
from abkd_jax.config import command

_ROUNDS = flags.DEFINE_integer("rounds", 15, "Rounds, each with a turn of everyone.", lower_bound=2)
_CALLS = flags.DEFINE_integer("calls", 20, "Calls in a turn, at least.", lower_bound=1)
_SHAPES = flags.DEFINE_multi_string("shape", ["256x100", "512x1000", "64x32000"], "Batch x K.")

_ALPHA, _BETA = 0.3, 0.6
_LIBRARY = {
    "alpha_beta": lambda s, t, a, b: divergences.alpha_beta(s, t, alpha=a, beta=b),
    "alpha_divergence": lambda s, t, a, b: divergences.alpha_divergence(s, t, alpha=a),
    "beta_divergence": lambda s, t, a, b: divergences.beta_divergence(s, t, beta=b),
    "hellinger": lambda s, t, a, b: divergences.hellinger(s, t),
    "chi_squared": lambda s, t, a, b: divergences.chi_squared(s, t),
    "renyi": lambda s, t, a, b: divergences.renyi(s, t, order=b),
    "forward_kl": lambda s, t, a, b: divergences.forward_kl(s, t),
    "reverse_kl": lambda s, t, a, b: divergences.reverse_kl(s, t),
    "jeffreys": lambda s, t, a, b: divergences.jeffreys(s, t),
    "skew_forward_kl": lambda s, t, a, b: divergences.skew_forward_kl(s, t, skew=a),
    "skew_reverse_kl": lambda s, t, a, b: divergences.skew_reverse_kl(s, t, skew=a),
    "jensen_shannon": lambda s, t, a, b: divergences.jensen_shannon(s, t, teacher_weight=a),
    "total_variation": lambda s, t, a, b: divergences.total_variation(s, t),
    "adaptive_kl": lambda s, t, a, b: divergences.adaptive_kl(s, t, head_mass=b),
    "alphanet": lambda s, t, a, b: divergences.alphanet(s, t),
    "logit_mse": lambda s, t, a, b: divergences.logit_mse(s, t),
}
_TORCH = "torch, textbook alpha_beta"
_TEXTBOOK = "jax, textbook alpha_beta"


def main() -> None:
    """Prints a table for each shape."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: its rows are skipped (pip install -e '.[torch]')")
    for shape in _SHAPES.value:
        batch, classes = map(int, shape.split("x"))
        competitors = _competitors(batch, classes)
        seconds = timing.in_turn(competitors, _ROUNDS.value, repeats=_CALLS.value, seconds=0.1)
        base = _TORCH if _TORCH in seconds else _TEXTBOOK
        print(f"\n{shape}, float32: value and student gradient of the batch mean, alpha {_ALPHA}, ")
        print(f"beta {_BETA}; median [quartiles] of {_ROUNDS.value} rounds")
        print(f"{'':26}{'ms':>26}{'/ forward_kl':>14}{'speed / ' + base:>42}")
        for name, times in seconds.items():
            ms = timing.quartiles(1e3 * times, ".3f")
            factor = np.median(times / seconds["forward_kl"])
            speed = timing.quartiles(seconds[base] / times, ".2f")
            print(f"{name:26}{ms:>26}{factor:>14.2f}{speed:>42}", flush=True)


def _competitors(batch: int, classes: int) -> dict[str, Callable[[], object]]:
    """By name, a call that returns its value and gradient."""
    rng = np.random.default_rng(0)
    student, teacher = (
        (2.0 * rng.normal(size=(batch, classes))).astype(np.float32) for _ in range(2)
    )
    s, t = jnp.asarray(student), jnp.asarray(teacher)
    numbers = jnp.asarray(_ALPHA), jnp.asarray(_BETA)  # on the device, as bound numbers are

    def call(divergence):
        def mean(s, t, a, b):
            return jnp.mean(divergence(s, t, a, b))

        compiled = jax.jit(jax.value_and_grad(mean))
        return lambda: compiled(s, t, *numbers)

    competitors = {name: call(divergence) for name, divergence in _LIBRARY.items()}
    competitors[_TEXTBOOK] = call(lambda s, t, a, b: _textbook(jax.nn.softmax, s, t, a, b))
    if importlib.util.find_spec("torch") is not None:
        import torch

        leaf, target = torch.tensor(student, requires_grad=True), torch.tensor(teacher)

        def in_torch():
            value = _textbook(torch.softmax, leaf, target, _ALPHA, _BETA).mean()
            return value, torch.autograd.grad(value, leaf)

        competitors[_TORCH] = in_torch
    return competitors


def _textbook(softmax: Callable, student, teacher, a, b):
    """Definition 4.1 of the paper, with Python's operators."""
    p, q = softmax(teacher, -1), softmax(student, -1)
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -terms.sum(-1) / (a * b)


if __name__ == "__main__":
    command.run(main)
