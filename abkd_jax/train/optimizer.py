"""Optimisers. Each is a function of its numbers, which live in the training state as data.

A new one is one function here with annotated keywords, made of optax's parts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax import Array
from jax import numpy as jnp

from abkd_jax.objective import bind_group
from abkd_jax.types import Bound, bind, nearest


def sgd(
    *,
    learning_rate: float | Array,
    momentum: float | Array = 0.0,
    weight_decay: float | Array = 0.0,
    clip_norm: float | Array = jnp.inf,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """SGD as torch has it: weight decay is L2, added to the gradient before the momentum."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(weight_decay),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam(
    *,
    learning_rate: float | Array,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    clip_norm: float | Array = jnp.inf,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015)."""
    clip = optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.adam(learning_rate, b1, b2, eps))


def adamw(
    *,
    learning_rate: float | Array,
    weight_decay: float | Array,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    clip_norm: float | Array = jnp.inf,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019): decay times learning rate, on all parameters."""
    clip = optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay))


@functools.lru_cache
def transformation(
    fn: Callable[..., optax.GradientTransformation], numbers: tuple[str, ...], static: tuple
) -> optax.GradientTransformation:
    """The transformation with its numbers as state; one object, so that jit sees one structure.

    Args:
        fn: an optimiser of this module.
        numbers: the names of its numbers; their values come with the state.
        static: the rest of its keywords, with values.
    """
    inject = optax.inject_hyperparams(fn, static_args=tuple(name for name, _ in static))
    return inject(**dict.fromkeys(numbers, 0.0), **dict(static))


def from_config(group: Mapping[str, Any], *, field: str, num_steps: int) -> Bound:
    """The optimiser of a network's group: `name`, a function of this module, and its numbers.

    Args:
        group: such as dict(name="adam", learning_rate=3e-3); any number may be a schedule.
        field: where the group stands in the config: "student.optimizer".
        num_steps: the length of the run.

    Returns:
        The function, bound.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    known = {"sgd": sgd, "adam": adam, "adamw": adamw}
    name = group.get("name")
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{field}.name must be one of {', '.join(known)}; found {name!r}"
            f"{nearest(name, known) if isinstance(name, str) else ''}."
        )
    hypers = {key: value for key, value in group.items() if key != "name"}
    return bind_group(bind, known[name], hypers, field=field, num_steps=num_steps)


def of(bound: Bound) -> optax.GradientTransformation:
    """The transformation of an optimiser whose numbers are bound (`types.bind`)."""
    return transformation(bound.fn, tuple(bound.numbers), bound.static)
