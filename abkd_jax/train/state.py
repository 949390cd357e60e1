"""What training carries from step to step."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import optax
from flax import struct
from flax.training import train_state
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import optimizers
from abkd_jax.binding import Bound, Domain, Schedule, as_number, at_step, domain_of
from abkd_jax.models import (
    Module,
    as_outputs,
    check_learner,
    joined,
    learned,
    split_variables,
)
from abkd_jax.train.sharding import sharded, shardings
from abkd_jax.types import Outputs

Decay = Annotated[float | Array, Domain(0, 1, open_high=True)]
"""of a moving average"""


class TrainState(train_state.TrainState):
    """Flax's training state, with all of an optimiser's numbers in it.

    Attributes:
        batch_stats: the running statistics of batch norm; empty without it.
        hyperparams: the optimiser's numbers, or schedules of them, by name.
        ema_decay: of the moving average of the parameters; None for none.
        ema_params: that average, which evaluation uses in place of the parameters.
    """

    batch_stats: Any = struct.field(default_factory=dict)
    hyperparams: Mapping[str, Array | Schedule] = struct.field(default_factory=dict)
    ema_decay: Array | Schedule | None = None
    ema_params: Any = None

    def forward(
        self, params: Any, inputs: Any, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, Any]:
        """The outputs with these parameters, and the batch statistics after them."""
        variables = {"params": self.whole(params), "batch_stats": self.batch_stats}
        return self.apply_fn(variables, inputs, train=train, key=key)

    def whole(self, params: Any) -> Any:
        """These parameters together with the frozen ones, if the network has some."""
        return params if self.base is None else joined(self.base, params)

    @property
    def base(self) -> Any:
        """The frozen parameters; None without, see `with_base`."""
        return None

    @property
    def eval_params(self) -> Any:
        """The moving average of the parameters if there is one, else the parameters."""
        return self.params if self.ema_params is None else self.ema_params

    def restarted(
        self, *, optimizer: Bound, ema_decay: "Decay | Schedule | None" = None
    ) -> "TrainState":
        """The network at step 0 again, with a new optimiser and average, and no base."""
        options = {"optimizer": optimizer, "ema_decay": ema_decay}
        return _learner(self.apply_fn, self.params, self.batch_stats, **options)

    def apply_gradients(self, *, grads: Any) -> "TrainState":
        """The state after one step of the optimiser, with its numbers as they stand at this one."""
        numbers = at_step(self.hyperparams, self.step)
        updates, opt_state = self.tx.update(
            grads, self.opt_state._replace(hyperparams=numbers), self.params
        )
        params = optax.apply_updates(self.params, updates)
        state = self.replace(step=self.step + 1, params=params, opt_state=opt_state)
        if self.ema_params is None:
            return state
        rate = 1.0 - at_step(self.ema_decay, self.step)
        return state.replace(ema_params=optax.incremental_update(params, self.ema_params, rate))


class _BasedState(TrainState):
    """See `with_base`."""

    base: Any = None


def with_base(state: TrainState, base: Any) -> TrainState:
    """The state of a network together with its frozen parameters.

    A run's carry is without them.

    Args:
        state: of a `models.lora`, whose parameters are the factors.
        base: the parameters of its decoder; None for the state without them.
    """
    fields = {name: x for name, x in vars(state).items() if name != "base"}
    return TrainState(**fields) if base is None else _BasedState(**fields, base=base)


def create(
    module: Module,
    inputs: Any,
    *,
    init_seed: int | Array,
    optimizer: Bound,
    ema_decay: Decay | Schedule | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """A network that learns, with new parameters.

    Args:
        module: a flax module whose call is `(inputs, *, train) -> Outputs`. The parameters of a
            `models.lora` are its factors, beside a base (`with_base`).
        inputs: a batch of inputs, for their shapes.
        init_seed: of the parameters.
        optimizer: a function of `abkd_jax.optimizers`, bound.
        ema_decay: in [0, 1), of a moving average of the parameters; None for none.
        mesh: over whose axis `fsdp` the parameters are split from the beginning; None for none.

    Returns:
        The state at step 0.

    Raises:
        TypeError: if the optimiser is not one of this library, bound.
    """
    variables = _variables(module, init_seed, inputs, mesh)
    return _learner(
        as_outputs(module.apply),
        variables["params"],
        variables.get("batch_stats", {}),
        optimizer=optimizer,
        ema_decay=ema_decay,
    )


def adopt(
    apply_fn: Callable[..., Array | Outputs],
    variables: Any,
    *,
    optimizer: Bound | None = None,
    ema_decay: Decay | Schedule | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """A network written elsewhere, with the variables that it has.

    Args:
        apply_fn: `(variables, inputs) -> logits`; see `models.as_outputs`.
        variables: its first argument, a pytree.
        optimizer: a function of `abkd_jax.optimizers`, bound; None freezes the network.
        ema_decay: in [0, 1), of a moving average of the parameters; None for none.
        mesh: over whose axis `fsdp` the variables are split, of which no device ever has more than
            its part; None for none.

    Returns:
        The state at step 0.

    Raises:
        TypeError: if the optimiser is not one of this library, bound.
        ValueError: if a linen module has collections that a state has no place for, a learner
            cannot learn (`models.check_learner`), or the decay lies outside of its domain.
    """
    params, batch_stats = split_variables(apply_fn, variables)
    if _splits(mesh):
        params, batch_stats = sharded((params, batch_stats), mesh)
    else:
        params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats))
    apply = as_outputs(apply_fn)
    if optimizer is None:
        return _inert(apply, params, batch_stats)
    check_learner(apply_fn, params, batch_stats)
    return _learner(apply, params, batch_stats, optimizer=optimizer, ema_decay=ema_decay)


def _learner(apply_fn, params, batch_stats, *, optimizer, ema_decay) -> TrainState:
    if not isinstance(optimizer, Bound):
        raise TypeError(
            "optimizer must be a function of abkd_jax.optimizers, bound, such as "
            f"bind(sgd, learning_rate=0.1); found {optimizer!r}."
        )
    tx, numbers = optimizers.of(optimizer), at_step(dict(optimizer.numbers), 0)
    inner = optimizer.replace(numbers=numbers)().init(params)  # some start from their numbers
    outer = tx.init({})  # of no parameters: the moments are those of `inner`
    if not (ema_decay is None or isinstance(ema_decay, Schedule)):
        ema_decay = as_number(ema_decay, "ema_decay", domain_of(Decay))
    return TrainState(
        step=jnp.zeros((), int),
        apply_fn=apply_fn,
        params=params,
        tx=tx,
        opt_state=outer._replace(hyperparams=numbers, inner_state=inner),
        batch_stats=batch_stats,
        hyperparams=dict(optimizer.numbers),
        ema_decay=ema_decay,
        ema_params=None if ema_decay is None else jax.tree.map(jnp.copy, params),
    )


def frozen(state: TrainState) -> TrainState:
    """The network alone, without an optimiser: a teacher. Its arrays are those of the state."""
    inert = _inert(state.apply_fn, state.eval_params, state.batch_stats)
    return with_base(inert.replace(step=state.step), state.base)


def beneath(state: TrainState) -> TrainState:
    """The frozen parameters of a network with factors, before or after it has some."""
    return frozen(state) if state.base is None else _inert(state.apply_fn, state.base, {})


def _inert(apply_fn, params, batch_stats) -> TrainState:
    return TrainState(
        step=jnp.zeros((), int),
        apply_fn=apply_fn,
        params=params,
        tx=_IDENTITY,
        opt_state=_IDENTITY.init(params),
        batch_stats=batch_stats,
    )


def _splits(mesh: Mesh | None) -> bool:
    """Whether networks are split over the mesh."""
    return mesh is not None and mesh.shape["fsdp"] > 1


_IDENTITY = optax.identity()


@functools.partial(jax.jit, static_argnums=(0, 3))
def _variables(
    module: Module, init_seed: Array, inputs: Any, mesh: Mesh | None
) -> Mapping[str, Any]:
    variables = module.init(jax.random.key(init_seed), inputs, train=False)
    variables = {**variables, "params": learned(module, variables["params"])}
    if not _splits(mesh):
        return variables
    return jax.lax.with_sharding_constraint(variables, shardings(variables, mesh))
