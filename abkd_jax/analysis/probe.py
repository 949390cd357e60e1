"""What training can stream besides its losses: how a learner's objective moves it, as scalars."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax import Array
from jax import numpy as jnp

from abkd_jax import checks, numerics
from abkd_jax.analysis import flow
from abkd_jax.analysis.gradients import gradient_noise, logit_slope, term_gradients, tree_cosines
from abkd_jax.analysis.reassignment import of_logit_change
from abkd_jax.analysis.temperature import effective_temperature
from abkd_jax.binding import NonNegative, nearest
from abkd_jax.types import Batch, Outputs, Term

PROBES = (
    "entropy",
    "effective_temperature",
    "mass_flow",
    "gradient_norms",
    "gradient_cosines",
    "gradient_noise",
)


def probe(
    params: Any,
    forward: Callable[[Any, Batch], Outputs],
    others: Mapping[str, Outputs],
    batches: Batch,
    terms: Mapping[str, Term],
    *,
    probes: tuple[str, ...] = PROBES,
    learning_rate: NonNegative = 0.1,
) -> dict[str, Array]:
    """Measures one learner and its objective on a few batches; nothing is updated.

    | probe | metrics |
    |---|---|
    | entropy | `entropy`, the student's, mean over examples, in nats |
    | effective_temperature | `effective_temperature/<other>`, geometric mean over examples |
    | mass_flow | of one step of each example's objective on its logits, means over examples: |
    | | `mass_flow/moved`, the mass that changes class; |
    | | `mass_flow/to_underestimated/<other>`, net, from classes with q >= p to those with q < p; |
    | | `mass_flow/to_target`, net, from the rest to the label's class, where it is known |
    | gradient_norms | `gradient_norm/<term>`, of weight x mean over all batches, in parameters |
    | gradient_cosines | `gradient_cosine/<term>/<term>` between each two, in alphabetical order |
    | gradient_noise | `gradient_noise/variance`, `/squared_norm`, `/signal_to_noise` of the |
    | | whole objective's gradient over the batches, see `GradientNoise` |

    A flow the other way is the same number with the other sign, so it is not given. The cost is a
    forward pass of each batch and, for the gradient probes, a backward pass for each term and
    batch, whose gradients are all held at once.

    Args:
        params: the learner's parameters.
        forward: params, batch -> outputs, with whatever the terms' losses need.
        others: the other networks' outputs, by name: rows `[N, batch, ...]`, and a `head` that all
            batches share.
        batches: N batches stacked: each entry is `[N, ...]`, the masks `[N, batch]`. A loss that
            couples a batch sees one of the N.
        terms: the learner's objective, by name; schedules replaced by numbers (`binding.at_step`).
        probes: which, of PROBES.
        learning_rate: of the step on the logits in `mass_flow`.

    Returns:
        Scalars by name.

    Raises:
        ValueError: if a probe is unknown, gradient noise is asked of a single batch, or the learner
            shows no logits.
    """
    check_probes(probes)
    count = batches["where"].shape[0]
    is_enough = "gradient_noise" not in probes or count >= 2
    checks.require(is_enough, "batches", "at least 2, for the probe 'gradient_noise'", count)
    of_gradients = any(name.startswith("gradient_") for name in probes)
    heads = {name: outputs.head for name, outputs in others.items()}
    rows = {name: outputs.replace(head=None) for name, outputs in others.items()}

    def measure(_, part):
        batch, seen = part
        seen = {name: seen[name].replace(head=heads[name]) for name in seen}
        if of_gradients:
            gradients, outputs = term_gradients(terms, forward, params, seen, batch)
        else:
            gradients, outputs = {}, forward(params, batch)
        shows = outputs.logits is not None
        checks.require(shows, "the logits of the network being trained", "shown", None)
        slope = logit_slope(terms, outputs, seen, batch) if "mass_flow" in probes else None
        return None, (outputs.logits, slope, gradients)

    # On a CPU, convolutions in a loop are an order of magnitude slower.
    unroll = jax.default_backend() == "cpu"
    _, measured = jax.lax.scan(measure, None, (dict(batches), rows), unroll=unroll)
    logits, slope, gradients = measured
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    teachers = {n: o.logits for n, o in others.items() if o.logits is not None}
    where, metrics = batches["where"], {}
    if "entropy" in probes:
        metrics["entropy"] = numerics.masked_mean(numerics.entropy(logits), where)
    if "effective_temperature" in probes:
        for name, teacher in teachers.items():
            log = jnp.log(effective_temperature(logits, teacher))
            metrics[f"effective_temperature/{name}"] = jnp.exp(numerics.masked_mean(log, where))
    if "mass_flow" in probes:
        metrics |= _flows(logits, -learning_rate * slope, teachers, batches)
    return metrics | _of_gradients(gradients, terms, probes)


def check_probes(probes: tuple[str, ...]) -> None:
    """Refuses what is no tuple of names in PROBES, in one sentence."""
    is_tuple = isinstance(probes, tuple | list)
    checks.require(is_tuple, "probes", "a tuple of names", probes)
    for name in probes:
        expected = f"of {', '.join(PROBES)}{nearest(name, PROBES)}"
        checks.require(name in PROBES, "probes", expected, name)


def _flows(logits, change, teachers, batches):
    """The metrics of `mass_flow`."""
    where, mean = batches["where"], numerics.masked_mean
    moved = flow.mass_change(logits, of_logit_change(logits, change).log_ratio)
    metrics = {"mass_flow/moved": mean(flow.moved_mass(moved), where)}
    for name, teacher in teachers.items():
        into = flow.mass_flow(moved, flow.over_and_underestimated(logits, teacher))
        metrics[f"mass_flow/to_underestimated/{name}"] = mean(into["underestimated"], where)
    if "labels" in batches:
        labels = batches["labels"]
        into = flow.mass_flow(moved, flow.target_and_rest(labels, logits.shape[-1]))
        metrics["mass_flow/to_target"] = mean(into["target"], where & (labels >= 0))
    return metrics


def _of_gradients(gradients, terms, probes):
    """The metrics of {term: a pytree of `[N, ...]`}."""
    metrics, means = {}, jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)
    if "gradient_norms" in probes:
        for name, mean in means.items():
            norm = optax.tree.norm(mean)
            metrics[f"gradient_norm/{name}"] = jnp.abs(terms[name].weight) * norm
    if "gradient_cosines" in probes:
        cosines = tree_cosines(means)
        for a, b in itertools.combinations(sorted(means), 2):
            metrics[f"gradient_cosine/{a}/{b}"] = cosines[a][b]
    if "gradient_noise" in probes:
        weights = [terms[name].weight for name in gradients]
        weighted_sum = lambda *g: sum(w * x for w, x in zip(weights, g, strict=True))  # noqa: E731
        noise = gradient_noise(jax.tree.map(weighted_sum, *gradients.values()))
        for name in ("variance", "squared_norm", "signal_to_noise"):
            metrics[f"gradient_noise/{name}"] = getattr(noise, name)
    return metrics
