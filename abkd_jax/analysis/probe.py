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
from abkd_jax.losses import check_chunks, in_chunks
from abkd_jax.types import Batch, Outputs, Term

_LEARNER = "the network being trained"

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
    chunk: int = 0,
) -> dict[str, Array]:
    """Measures one learner and its objective on a few batches; nothing is updated.

    | probe | metrics |
    |---|---|
    | entropy | `entropy`, the student's, mean over examples, in nats |
    | effective_temperature | `effective_temperature/<other>`, geometric mean over examples |
    | mass_flow | of one step of each example's objective on its logits, means over examples: |
    | | `mass_flow/moved`, the mass that changes class; |
    | | `mass_flow/to_underestimated/<other>`, net, from classes with q >= p to those with q < p; |
    | | `mass_flow/to_head/<other>`, `to_middle`, `to_tail`, net, into those classes of the |
    | | other's distribution, see `head_middle_and_tail`; |
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
        chunk: of how many rows unformed logits are formed at a time; 0 for those of a batch.

    Returns:
        Scalars by name.

    Raises:
        ValueError: if a probe is unknown, gradient noise is asked of a single batch, the learner
            shows no logits, or a loss that couples the batch would see chunks.
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
            gradients, outputs = term_gradients(terms, forward, params, seen, batch, chunk=chunk)
        else:
            gradients, outputs = {}, forward(params, batch)
        shown = {_LEARNER: outputs, **seen}
        check_chunks({_LEARNER: terms}, shown, chunk)
        shows = outputs.unformed or outputs.logits is not None
        checks.require(shows, f"the logits of {_LEARNER}", "shown", None)
        sums, _ = in_chunks(of_rows, shown, batch, chunk=chunk)
        return None, (sums, gradients)

    def of_rows(shown, batch):
        values = _of_rows(shown, batch, terms, probes, learning_rate)
        masked = {name: (jnp.where(where, x, 0.0), where) for name, (x, where) in values.items()}
        return jax.tree.map(jnp.sum, masked), ()

    # On a CPU, convolutions in a loop are an order of magnitude slower.
    unroll = jax.default_backend() == "cpu"
    _, measured = jax.lax.scan(measure, None, (dict(batches), rows), unroll=unroll)
    sums, gradients = jax.tree.map(lambda x: jnp.sum(x, axis=0), measured[0]), measured[1]
    metrics = {name: value / jnp.maximum(count, 1) for name, (value, count) in sums.items()}
    logs = [name for name in metrics if name.startswith("effective_temperature/")]
    metrics |= {name: jnp.exp(metrics[name]) for name in logs}  # a geometric mean
    return metrics | _of_gradients(gradients, terms, probes)


def check_probes(probes: tuple[str, ...]) -> None:
    """Refuses what is no tuple of names in PROBES, in one sentence."""
    is_tuple = isinstance(probes, tuple | list)
    checks.require(is_tuple, "probes", "a tuple of names", probes)
    for name in probes:
        expected = f"of {', '.join(PROBES)}{nearest(name, PROBES)}"
        checks.require(name in PROBES, "probes", expected, name)


def _of_rows(shown, batch, terms, probes, learning_rate):
    """The metrics that are means over rows: {name: (values, mask)}; of temperatures the logarithm.

    `shown` has the outputs of all networks, with logits.
    """
    others = {name: x for name, x in shown.items() if name != _LEARNER}
    teachers = {name: x.logits for name, x in others.items() if x.logits is not None}
    own, where, found = shown[_LEARNER], batch["where"], {}
    logits = own.logits.astype(jnp.promote_types(own.logits.dtype, jnp.float32))
    if "entropy" in probes:
        found["entropy"] = numerics.entropy(logits), where
    if "effective_temperature" in probes:
        for name, teacher in teachers.items():
            log = jnp.log(effective_temperature(logits, teacher))
            found[f"effective_temperature/{name}"] = log, where
    if "mass_flow" in probes:
        change = -learning_rate * logit_slope(terms, own, others, batch)
        found |= _flows(logits, change, teachers, batch)
    return found


def _flows(logits, change, teachers, batch):
    """The metrics of `mass_flow`, likewise."""
    where = batch["where"]
    moved = flow.mass_change(logits, of_logit_change(logits, change).log_ratio)
    found = {"mass_flow/moved": (flow.moved_mass(moved), where)}
    for name, teacher in teachers.items():
        errors = flow.over_and_underestimated(logits, teacher)
        into = flow.mass_flow(moved, errors | flow.head_middle_and_tail(teacher))
        for group in ("underestimated", "head", "middle", "tail"):
            found[f"mass_flow/to_{group}/{name}"] = into[group], where
    if "labels" in batch:
        labels = batch["labels"]
        into = flow.mass_flow(moved, flow.target_and_rest(labels, logits.shape[-1]))
        found["mass_flow/to_target"] = into["target"], where & (labels >= 0)
    return found


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
