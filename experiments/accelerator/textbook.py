"""The divergences as papers write them, in the operations that JAX and torch have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp


class Operations(NamedTuple):
    """What the formulas need of a framework, over the last axis.

    Attributes:
        log_softmax: logits -> log-probabilities.
        exp: elementwise, as the next two.
        log: the natural one.
        detach: the array, without a gradient.
        falling: the positions of the entries, from the largest to the smallest.
        take: (array, positions) -> the entries there.
        cumsum: sums so far.
    """

    log_softmax: Callable
    exp: Callable
    log: Callable
    detach: Callable
    falling: Callable
    take: Callable
    cumsum: Callable


JAX = Operations(
    log_softmax=jax.nn.log_softmax,
    exp=jnp.exp,
    log=jnp.log,
    detach=jax.lax.stop_gradient,
    falling=lambda x: jnp.argsort(x, axis=-1, descending=True),
    take=lambda x, positions: jnp.take_along_axis(x, positions, -1),
    cumsum=lambda x: jnp.cumsum(x, axis=-1),
)


def of_torch(torch: Any) -> Operations:
    """Those of torch, the module."""
    return Operations(
        log_softmax=lambda x: torch.log_softmax(x, -1),
        exp=torch.exp,
        log=torch.log,
        detach=lambda x: x.detach(),
        falling=lambda x: torch.argsort(x, dim=-1, descending=True),
        take=lambda x, positions: torch.gather(x, -1, positions),
        cumsum=lambda x: torch.cumsum(x, -1),
    )


def mean_divergence(operations: Operations, name: str, student, teacher, **numbers: float):
    """The batch mean of a divergence; logits are float32 `[B, K]`."""
    log_q, log_p = operations.log_softmax(student), operations.log_softmax(teacher)
    p, q = operations.exp(log_p), operations.exp(log_q)
    return _ROWS[name](operations, p, q, log_p, log_q, **numbers).mean()


def _forward_kl(operations, p, q, log_p, log_q):
    return (p * (log_p - log_q)).sum(-1)


def _reverse_kl(operations, p, q, log_p, log_q):
    return (q * (log_q - log_p)).sum(-1)


def _jeffreys(operations, p, q, log_p, log_q):
    return ((p - q) * (log_p - log_q)).sum(-1)


def _jensen_shannon(operations, p, q, log_p, log_q, *, teacher_weight):
    w = teacher_weight
    log_m = operations.log(w * p + (1 - w) * q)
    return (w * p * (log_p - log_m) + (1 - w) * q * (log_q - log_m)).sum(-1)


def _alpha_beta(operations, p, q, log_p, log_q, *, alpha, beta):
    a, b = alpha, beta
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -terms.sum(-1) / (a * b)


def _skew_forward_kl(operations, p, q, log_p, log_q, *, skew):
    return (p * (log_p - operations.log(skew * p + (1 - skew) * q))).sum(-1)


def _adaptive_kl(operations, p, q, log_p, log_q, *, head_mass):
    """By sorting, as in its code; the head has the classes before its mass is reached, and one."""
    falling = operations.falling(p)
    of_p, error = (operations.take(x, falling) for x in (p, abs(p - q)))
    up_to = operations.cumsum(of_p)
    head = (up_to <= head_mass) | (up_to == of_p)
    share = operations.detach((error * head).sum(-1) / error.sum(-1))
    forward = (p * (log_p - log_q)).sum(-1)
    return share * forward + (1 - share) * (q * (log_q - log_p)).sum(-1)


_ROWS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "jensen_shannon": _jensen_shannon,
    "alpha_beta": _alpha_beta,
    "skew_forward_kl": _skew_forward_kl,
    "adaptive_kl": _adaptive_kl,
}
