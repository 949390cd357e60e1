"""The metrics of `config.analysis`: how objectives move their learners, on a few fixed batches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import analysis, data
from abkd_jax.train.step import Networks, Objectives, outputs_of
from abkd_jax.types import Batch, at_step

_BATCHES = 4  # for gradient noise; the same ones through the whole run, so that rows compare


def probe_batches(
    split: data.Split | data.Stream, *, data_seed: int, size: int, preprocess: data.Preprocess
) -> Batch:
    """The batches of the first steps, stacked: each entry `[N, size, ...]`."""
    feed = data.Feed(split, data_seed=data_seed, size=size)
    count = min(_BATCHES, len(split) // size) if isinstance(split, data.Split) else _BATCHES
    batches = [feed(n)[0].batch(data_seed, jnp.asarray(n), size, preprocess) for n in range(count)]
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


@functools.partial(jax.jit, static_argnames="probes")
def probed(
    learners: Networks,
    frozen: Networks,
    batches: Batch,
    objectives: Objectives,
    *,
    probes: tuple[str, ...],
) -> Mapping[str, Array]:
    """`analysis.probe` of every learner, with its objective as it stands at its step.

    Args:
        learners: the networks that learn, by name; seen as in training.
        frozen: those that do not, seen as in evaluation.
        batches: of `probe_batches`.
        objectives: of the learners.
        probes: of `analysis.PROBES`; gradient noise is left out where there is but one batch.

    Returns:
        {"analysis/NAME/METRIC": a scalar}.
    """
    networks, count = learners | frozen, batches["where"].shape[0]
    probes = tuple(name for name in probes if name != "gradient_noise" or count > 1)
    each = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(count)]

    def outputs(name: str, params: Any, batch: Batch) -> Any:
        trains = name in learners
        return outputs_of(networks[name], params, batch, train=trains, objectives=objectives)

    shown = {}
    for name, state in networks.items():
        params = state.params if name in learners else state.eval_params
        parts = [outputs(name, params, batch) for batch in each]
        shared = {"unembedding": parts[0].unembedding, "bias": parts[0].bias}
        rows = [part.replace(unembedding=None, bias=None) for part in parts]
        shown[name] = jax.tree.map(lambda *x: jnp.stack(x), *rows).replace(**shared)
    shown = jax.lax.stop_gradient(shown)
    found = {}
    for name, state in learners.items():
        values = analysis.probe(
            state.params,
            functools.partial(outputs, name),
            shown,
            batches,
            at_step(dict(objectives[name]), state.step),
            probes=probes,
        )
        against_itself = f"/{name}"  # a network that learns alone is its terms' other one
        found |= {
            f"analysis/{name}/{metric}": value
            for metric, value in values.items()
            if not metric.endswith(against_itself)
        }
    return found
