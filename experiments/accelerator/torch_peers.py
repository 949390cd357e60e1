"""The divergences in torch, on the device that JAX computes on: the textbook's, and Liger's."""

import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.accelerator import textbook

_LIGER = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}  # its beta


def device() -> tuple[str | None, str]:
    """The name by which torch knows the device of JAX, or None and the reason why it does not."""
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    import torch

    backend = jax.default_backend()
    if backend == "gpu":
        return ("cuda", "") if torch.cuda.is_available() else (None, "torch sees no CUDA device")
    return ("cpu", "") if backend == "cpu" else (None, f"torch does not compute on a {backend}")


def absent(*, small: bool) -> dict[str, str]:
    """The peers that cannot be measured here, and why."""
    where, why = device()
    found = {} if where else {"torch": why, "torch.compile": why}
    if where and small:
        found["torch.compile"] = "it takes longer than --runlocal is to take"
    if where != "cuda":
        found["Liger"] = "its kernels need torch on CUDA"
    elif importlib.util.find_spec("liger_kernel") is None:
        found["Liger"] = "liger_kernel is not installed"
    return found


def arms(
    name: str, inputs: Sequence[tuple[jax.Array, jax.Array]], numbers: Mapping[str, float]
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """{peer: () -> call}; a call gives the value and the student's gradient.

    Args:
        name: of the divergence.
        inputs: a student's and a teacher's logits, `[B, K]`; each call takes the next ones.
        numbers: of the divergence.
    """
    import torch

    if device()[0] == "cuda":
        torch.cuda.empty_cache()
    operations = textbook.of_torch(torch)
    pairs = [(torch.from_dlpack(s).requires_grad_(), torch.from_dlpack(t)) for s, t in inputs]

    def mean(s, t):
        return textbook.mean_divergence(operations, name, s.float(), t.float(), **numbers)

    def of(function):
        around = itertools.cycle(pairs)

        def call():
            leaf, target = next(around)
            value = function(leaf, target)
            return value.detach(), *torch.autograd.grad(value, leaf)

        return call

    def compiled():
        torch.compiler.reset()  # or the eighth program of a function would not be compiled
        return of(torch.compile(mean, fullgraph=True, dynamic=False))

    def liger():
        from liger_kernel.transformers import LigerJSD

        loss = LigerJSD(beta=_LIGER[name])

        def of_log_probabilities(s, t):
            s, t = (torch.log_softmax(x, -1, dtype=torch.float32) for x in (s, t))
            return loss(s, t)

        return of(of_log_probabilities)

    found = {"torch": lambda: of(mean), "torch.compile": compiled}
    return found | ({"Liger": liger} if name in _LIGER else {})


def wait() -> None:
    """Returns when the device has done what torch asked for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
