"""Optimisers. Each is a function of its numbers, which live in the training state as data.

A new one is one function with annotated keywords, made of optax's parts, here or in a plugin.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import optax
from jax import Array

from abkd_jax.binding import Bound, Domain, NonNegative, Number
from abkd_jax.types import dotted

_NEVER_DECAYED = ("bias", "scale")
_ClipNorm = Annotated[float | Array, Domain(0, open_low=True, finite=False)]


def sgd(
    *,
    learning_rate: NonNegative,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    clip_norm: _ClipNorm = math.inf,
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
    learning_rate: NonNegative,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    clip_norm: _ClipNorm = math.inf,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015)."""
    clip = optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.adam(learning_rate, b1, b2, eps))


def adamw(
    *,
    learning_rate: NonNegative,
    weight_decay: Number,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    clip_norm: _ClipNorm = math.inf,
    decay_all: bool = True,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019): decay times learning rate, on all parameters.

    Without `decay_all`, not on those named bias or scale: of layers and norms.
    """
    clip, mask = optax.clip_by_global_norm(clip_norm), None if decay_all else _matrices
    decay = {"weight_decay": weight_decay, "mask": mask}
    return optax.chain(clip, optax.adamw(learning_rate, b1, b2, eps, **decay))


def _matrices(params: Any) -> Any:
    """Which parameters are neither biases nor scales, by name, since stacks of layers are 2-d."""
    own = lambda path, _: dotted(path).rpartition(".")[2] not in _NEVER_DECAYED  # noqa: E731
    return jax.tree.map_with_path(own, params)


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


def of(bound: Bound) -> optax.GradientTransformation:
    """The transformation of an optimiser whose numbers are bound (`binding.bind`)."""
    return transformation(bound.fn, tuple(bound.numbers), bound.static)
