"""The metrics of `config.analysis`: how objectives move their learners, on a few fixed batches."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import analysis, parallel
from abkd_jax.binding import at_step
from abkd_jax.config.plan import Phase
from abkd_jax.run.phases import Run, examples, feed
from abkd_jax.train import Networks, Objectives, outputs_of, together
from abkd_jax.types import Batch

_BATCHES = 4  # for gradient noise; the same ones through the whole run, so that rows compare


def probe_batches(run: Run, phase: Phase) -> Batch:
    """The batches of the first steps of a phase, stacked: each entry `[N, size, ...]`.

    They are as large as the parts into which a step splits its batch.
    """
    (split, size), data_seed = examples(run, phase), run.plan.config["data_seed"]
    size //= run.plan.config["micro_batches"]
    fed = feed(run, split, size)
    count = min(_BATCHES, len(split) // size)
    batches = [fed(n)[0].batch(data_seed, jnp.asarray(n)) for n in range(count)]
    return parallel.replicated(jax.tree.map(lambda *x: jnp.stack(x), *batches), run.mesh)


@functools.partial(jax.jit, static_argnames=("probes", "chunk"))
def probed(
    learners: Networks,
    frozen: Networks,
    batches: Batch,
    objectives: Objectives,
    *,
    probes: tuple[str, ...],
    chunk: int = 0,
) -> Mapping[str, Array]:
    """`analysis.probe` of every learner, with its objective as it stands at its step.

    Args:
        learners: the networks that learn, by name; seen as in training.
        frozen: those that do not, seen as in evaluation; see `train.on_bases`.
        batches: of `probe_batches`.
        objectives: of the learners.
        probes: of `analysis.PROBES`; gradient noise is left out where there is but one batch.
        chunk: of how many rows unformed logits are formed at a time; 0 for those of a batch.

    Returns:
        {"analysis/NAME/METRIC": a scalar}.
    """
    networks, count = together(learners, frozen), batches["where"].shape[0]
    probes = tuple(name for name in probes if name != "gradient_noise" or count > 1)
    each = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(count)]

    def outputs(name: str, params: Any, batch: Batch) -> Any:
        trains, known = name in learners, batch.get("outputs", {})
        if name in known:
            return known[name]
        return outputs_of(networks[name], params, batch, train=trains, objectives=objectives)

    shown = {}
    for name, state in networks.items():
        params = state.params if name in learners else state.eval_params
        first, *rest = [outputs(name, params, batch) for batch in each]
        shown[name] = first.map_rows(lambda *x: jnp.stack(x), *rest)
    shown = jax.lax.stop_gradient(shown)
    found = {}
    for name, state in learners.items():
        values = analysis.probe(
            state.params,
            functools.partial(outputs, name),
            {other: x for other, x in shown.items() if other != name},
            batches,
            at_step(dict(objectives[name]), state.step),
            probes=probes,
            chunk=chunk,
        )
        found |= {f"analysis/{name}/{metric}": value for metric, value in values.items()}
    return found
