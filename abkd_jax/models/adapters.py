"""Networks that are not of this library, as learners or teachers: Flax linen and NNX, functions."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax import numpy as jnp

from abkd_jax.checks import require
from abkd_jax.types import Outputs

Apply = Callable[..., tuple[Outputs, Any]]
"""(variables, inputs, *, train, key) -> (Outputs, batch_stats), the `apply_fn` of a `TrainState`"""

_COLLECTIONS = ("params", "batch_stats")


def as_outputs(apply_fn: Callable[..., Array | Outputs]) -> Apply:
    """The `apply_fn` of a `TrainState` for a network written elsewhere.

        params, batch_stats = split_variables(apply_fn, variables)
        TrainState(apply_fn=as_outputs(apply_fn), params=params, batch_stats=batch_stats, ...)

    `apply_fn(variables, inputs)` is either of these:

    - a linen module's own `module.apply`. `train` is passed on if the module's call takes it; batch
      norm then updates its statistics in training, and dropout has the step's key.
    - any other function, of the variables as `split_variables` was given them: Equinox and Haiku
      (`lambda params, x: network.apply(params, None, x)`), NNX (`lambda state, x:
      nnx.merge(graphdef, state)(x)`), a function around a linen module. `train` and `key` (None
      in evaluation) are passed on by name if it takes them; the statistics stay as they are.

    One network has one adapter, so that states which share it share a compilation. Networks are
    told apart as keys of a dictionary are: linen modules by their fields, functions by identity.

    Args:
        apply_fn: returns logits `[..., K]`, or `Outputs` to show more. Hashable.

    Returns:
        `(variables, inputs, *, train, key) -> (Outputs, batch_stats)`. It raises a TypeError if
        apply_fn returns anything else.
    """
    module = _linen_module(apply_fn)
    return _of_function(apply_fn) if module is None else _of_linen(module)


def split_variables(
    apply_fn: Callable[..., Array | Outputs], variables: Any
) -> tuple[Any, Mapping[str, Any]]:
    """What a `TrainState` learns of a network's variables, and its running statistics.

    A linen module's variables are taken apart, and so is a mapping of just `params` and
    `batch_stats` with statistics in it. Anything else is all parameters: whatever is not to be
    learned, such as the statistics and the random state of an NNX model, belongs under
    `batch_stats` or inside of apply_fn.

    Args:
        apply_fn: as for `as_outputs`.
        variables: its first argument, a pytree.

    Returns:
        (params, batch_stats), the latter empty if there is none.

    Raises:
        ValueError: if a linen module has no parameters, or collections that a state has no place
            for.
    """
    if _linen_module(apply_fn) is not None:
        fit = {"params"} <= set(variables) <= set(_COLLECTIONS)
        expected = "params and, if there are any, batch_stats"
        require(fit, "variables of a linen module", expected, tuple(variables))
    elif not (
        isinstance(variables, Mapping)
        and set(variables) == set(_COLLECTIONS)
        and jax.tree.leaves(variables["batch_stats"])
    ):
        return variables, {}
    return variables["params"], variables.get("batch_stats", {})


def call(module: nn.Module, inputs: Any, *, train: bool) -> Outputs:
    """What a linen module returns within another one, any module that `as_outputs` takes."""
    options = {"train": train} if _takes_train(module) else {}
    return _checked(module(inputs, **options), type(module).__name__)


def _takes_train(module: nn.Module) -> bool:
    return "train" in inspect.signature(module.__call__).parameters


def _linen_module(apply_fn: Callable) -> nn.Module | None:
    """The module whose `apply` this is."""
    module = getattr(apply_fn, "__self__", None)
    return module if isinstance(module, nn.Module) and apply_fn == module.apply else None


@functools.lru_cache  # by the module: `apply` of two equal modules is not equal
def _of_linen(module: nn.Module) -> Apply:
    takes_train = _takes_train(module)
    name = f"{type(module).__name__}.apply"

    def apply(variables, inputs, *, train, key):
        batch_stats = variables["batch_stats"]
        variables = {name: tree for name, tree in variables.items() if jax.tree.leaves(tree)}
        if not (train and takes_train):
            options = {"train": False} if takes_train else {}
            return _checked(module.apply(variables, inputs, **options), name), batch_stats
        rngs = {} if key is None else {"dropout": key}
        value, changed = module.apply(
            variables, inputs, train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return _checked(value, name), changed.get("batch_stats", {})

    return apply


@functools.lru_cache
def _of_function(apply_fn: Callable[..., Array | Outputs]) -> Apply:
    takes = inspect.signature(apply_fn).parameters
    name = getattr(apply_fn, "__name__", repr(apply_fn))

    def apply(variables, inputs, *, train, key):
        batch_stats = variables["batch_stats"]
        own = variables if jax.tree.leaves(batch_stats) else variables["params"]
        options = {"train": train, "key": key}
        options = {option: value for option, value in options.items() if option in takes}
        return _checked(apply_fn(own, inputs, **options), name), batch_stats

    return apply


def _checked(value: Any, name: str) -> Outputs:
    if isinstance(value, Outputs):
        return value
    if not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must return logits [..., K] or Outputs; found {type(value).__name__}."
        )
    return Outputs(logits=jnp.asarray(value))
