"""A phase on shapes alone: what does not fit is refused before anything is read or made."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import numpy as jnp

from abkd_jax import optimizers
from abkd_jax.binding import Bound, Statistic, bind
from abkd_jax.config.plan import Learner, Network, Phase, Plan
from abkd_jax.data import Description
from abkd_jax.sources import Source
from abkd_jax.train import Static, TrainState, adopt, advance, begin, create, frozen
from abkd_jax.types import Outputs, Term

_ROWS = 2  # of the batch on which networks are tried
_OF_THE_STEP = ("input_gradient",)  # what the training step makes, for any network


def dry_run(plan: Plan, phase: Phase) -> None:
    """Refuses networks that do not fit the data or the task, and losses that read what none shows.

    Args:
        plan: of the run.
        phase: one of its phases.

    Raises:
        ValueError: one sentence.
    """
    description, size = plan.description, plan.config["batch_size"]
    states, outputs = {}, {}
    for name in (*phase.learners, *phase.see):
        learner = phase.learners.get(name)
        states[name] = _state(name, plan.networks[name], learner, description)
        outputs[name] = _outputs(name, states[name], description, train=learner is not None)
        plan.task.check(name, outputs[name], description)
    for name, terms in phase.objectives.items():
        own = "terms" in plan.config["phases"][phase.name].get(name, ())
        at = f"phases.{phase.name}.{name}.terms" if own else f"{name}.terms"
        _check_needs(at, name, terms, outputs)

    def width(statistic: Statistic, term: Term) -> Any:
        return jnp.zeros((description.num_classes, outputs[term.other].hidden.shape[-1]))

    source, static = Source(batch=_as_it_is), Static(plan.config["micro_batches"])

    def step(states, batch):
        learners = {name: states.pop(name) for name in phase.learners}
        objectives = with_statistics(phase.objectives, width)
        carry = begin(learners, objectives, source)
        return advance(carry, states, objectives, source, batch, 0, 0, count=1, static=static)

    try:
        jax.eval_shape(step, states, _batch(description, size))
    except AssertionError as error:  # a check of a loss
        raise ValueError(f"{' and '.join(phase.learners)}: {error}") from error


def _as_it_is(state: Any, examples: Any, data_seed: int, step: int) -> Any:
    """The batch of a source that is handed one."""
    return examples


def hidden_width(name: str, network: Network, description: Description) -> int | None:
    """The width of the features that a network shows; None if it shows none."""
    state = _state(name, network, None, description)
    outputs = _outputs(name, state, description, train=False)
    return None if outputs.hidden is None else outputs.hidden.shape[-1]


def with_statistics(
    objectives: Mapping[str, Mapping[str, Term]], value: Callable[[Statistic, Term], Any]
) -> dict[str, dict[str, Term]]:
    """The objectives with `value(statistic, term)` in place of each `Statistic`."""

    def filled(term: Term) -> Term:
        put = lambda leaf: value(leaf, term) if isinstance(leaf, Statistic) else leaf  # noqa: E731
        return jax.tree.map(put, term)

    return {
        learner: {name: filled(term) for name, term in terms.items()}
        for learner, terms in objectives.items()
    }


def _state(
    name: str, network: Network, learner: Learner | None, description: Description
) -> TrainState:
    """A network's state as shapes."""
    options = {} if learner is None else learner._asdict()
    options.pop("terms", None)
    if network.given:
        return jax.eval_shape(lambda: adopt(*network.given, **options))
    some = {"optimizer": bind(optimizers.sgd, learning_rate=0.0)}  # of a network without its own
    make = functools.partial(create, network.module, init_seed=0, **some | options)
    fn = functools.partial(jax.eval_shape, make)
    state = _fitting(name, fn, _inputs(description, _ROWS), description)
    return frozen(state) if learner is None else state


def _outputs(name: str, state: TrainState, description: Description, *, train: bool) -> Outputs:
    """What a network shows of a batch, as shapes."""
    forward = lambda state, x: state.forward(  # noqa: E731
        state.params, x, train=train, key=jax.random.key(0)
    )
    fn = functools.partial(jax.eval_shape, forward, state)
    outputs, _ = _fitting(name, fn, _inputs(description, _ROWS), description)
    return outputs


def _fitting(name: str, fn: Callable, inputs: Any, description: Description) -> Any:
    try:
        return fn(inputs)
    except (TypeError, ValueError, IndexError) as error:
        shapes = " and ".join(f"{x.shape}" for x in jax.tree.leaves(description.inputs))
        reason = f"{error}".strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name}: its model cannot take inputs of shape {shapes}: {reason}."
        ) from error


def _inputs(description: Description, size: int) -> Any:
    rows = lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(rows, description.inputs)


def _batch(description: Description, size: int) -> dict[str, Any]:
    shape = (size, *description.labels.shape)
    batch = {name: jax.ShapeDtypeStruct(shape, bool) for name in description.masks}
    return batch | {
        "inputs": _inputs(description, size),
        "labels": jax.ShapeDtypeStruct(shape, jnp.int32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }


def _check_needs(
    at: str, learner: str, terms: Mapping[str, Term], outputs: Mapping[str, Outputs]
) -> None:
    """Refuses a loss that reads what a network does not show, or statistics of that."""
    for name, term in terms.items():
        loss: Bound = term.loss
        for network, parts in zip((learner, term.other), loss.needs, strict=True):
            for part in sorted(parts.difference(_OF_THE_STEP)):
                if part not in Outputs.__dataclass_fields__:
                    raise ValueError(
                        f"{at}.{name} needs {part!r}, which is no part of Outputs; these are "
                        f"{', '.join(Outputs.__dataclass_fields__)}."
                    )
                if getattr(outputs[network], part) is None:
                    raise ValueError(
                        f"{at}.{name} needs {part!r} of {network!r}, which its model does not give."
                    )
        statistics = [leaf for leaf in jax.tree.leaves(loss) if isinstance(leaf, Statistic)]
        if statistics and outputs[term.other].hidden is None:
            raise ValueError(
                f"{at}.{name} takes {statistics[0].name!r} of the 'hidden' of {term.other!r}, "
                "which its model does not give."
            )
