"""The probe against a linear model by hand, over all its batches at once."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp
from jax.extend.core import jaxprs_in_params

from abkd_jax.analysis import PROBES, effective_temperature, over_grid, probe, rank_summary
from abkd_jax.binding import bind
from abkd_jax.divergences import alpha_beta, forward_kl
from abkd_jax.losses import cross_entropy, dist, on_logits
from abkd_jax.types import Head, Outputs, Term

N, B, D, K, ETA = 3, 6, 4, 5, 0.2


def softmax(x):
    return scipy.special.softmax(np.asarray(x, np.float64), -1)


def forward(params, batch):
    return Outputs(logits=batch["inputs"] @ params["w"] + params["b"])


KD = bind(on_logits, divergence=forward_kl, temperature=1.0)


def setup():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(D, K)), "b": rng.normal(size=K)}
    inputs, teacher = rng.normal(size=(N, B, D)), 2 * rng.normal(size=(N, B, K))
    where = rng.random((N, B)) < 0.8
    labels = rng.integers(-1, K, (N, B))
    batches = {
        "inputs": jnp.float32(inputs),
        "labels": jnp.asarray(labels),
        "where": jnp.asarray(where),
        "labelled": jnp.asarray(where & (labels >= 0)),
    }
    assert not where.all() and np.any(where & (labels < 0))
    others = {"teacher": Outputs(logits=jnp.float32(teacher)), "silent": Outputs()}
    terms = {
        "task": Term(bind(cross_entropy), 0.5, where="labelled"),
        "kd": Term(KD, 3.0, other="teacher"),
    }
    return jax.tree.map(jnp.float32, params), others, batches, terms


@functools.partial(jax.jit, static_argnames=("forward", "probes"))
def run(params, others, batches, terms, forward=forward, probes=PROBES):
    return probe(params, forward, others, batches, terms, probes=probes, learning_rate=ETA)


@functools.cache
def measured():
    return run(*setup())


@functools.cache
def by_hand():
    """Probabilities, the terms' slopes in the logits, and their gradients for each batch."""
    params, others, batches, _ = setup()
    logits = np.asarray(forward(params, batches).logits, np.float64)
    q, p = softmax(logits), softmax(others["teacher"].logits)
    where, labelled = (np.asarray(batches[n])[..., None] for n in ("where", "labelled"))
    slopes = {
        "task": (q - np.eye(K)[np.asarray(batches["labels"])]) * labelled,
        "kd": (q - p) * where,
    }
    counts = {"task": labelled.sum((1, 2)), "kd": where.sum((1, 2))}
    inputs = np.concatenate([np.asarray(batches["inputs"]), np.ones((N, B, 1))], -1)
    grads = {
        n: np.einsum("nbd,nbk->ndk", inputs, s).reshape(N, -1) / counts[n][:, None]
        for n, s in slopes.items()
    }
    return logits, q, p, slopes, grads


def test_every_metric_is_there_and_a_scalar():
    assert set(measured()) == {
        "entropy",
        "effective_temperature/teacher",
        "mass_flow/moved",
        "mass_flow/to_underestimated/teacher",
        "mass_flow/to_head/teacher",
        "mass_flow/to_middle/teacher",
        "mass_flow/to_tail/teacher",
        "mass_flow/to_target",
        "gradient_norm/task",
        "gradient_norm/kd",
        "gradient_cosine/kd/task",
        "gradient_noise/variance",
        "gradient_noise/squared_norm",
        "gradient_noise/signal_to_noise",
    }
    assert all(value.shape == () and np.isfinite(value) for value in measured().values())


def test_entropy_and_temperature():
    _, others, batches, _ = setup()
    logits, q, *_ = by_hand()
    where = np.asarray(batches["where"])
    entropy = scipy.special.entr(q).sum(-1)[where].mean()
    np.testing.assert_allclose(measured()["entropy"], entropy, rtol=1e-5)
    rows = effective_temperature(np.float32(logits[where]), others["teacher"].logits[where])
    mean = np.exp(np.mean(np.log(np.asarray(rows, np.float64))))
    np.testing.assert_allclose(measured()["effective_temperature/teacher"], mean, rtol=1e-4)


def test_the_flow_of_one_step_of_each_example():
    _, _, batches, _ = setup()
    logits, q, p, slopes, _ = by_hand()
    where, labels = np.asarray(batches["where"]), np.asarray(batches["labels"])
    change = softmax(logits - ETA * (0.5 * slopes["task"] + 3 * slopes["kd"])) - q
    moved = 0.5 * np.abs(change).sum(-1)[where].mean()
    np.testing.assert_allclose(measured()["mass_flow/moved"], moved, rtol=1e-4)
    under = np.where(p > q, change, 0).sum(-1)[where].mean()
    np.testing.assert_allclose(measured()["mass_flow/to_underestimated/teacher"], under, rtol=1e-4)
    falling = np.sort(p, axis=-1)[..., ::-1]
    sums = np.take_along_axis(falling.cumsum(-1), np.argsort(np.argsort(-p)), -1)  # up to each
    head = (sums <= 0.5) | (p == falling[..., :1])
    tail = ~head & (sums > 0.95)
    for name, group in {"head": head, "tail": tail, "middle": ~head & ~tail}.items():
        into = np.where(group, change, 0).sum(-1)[where].mean()
        found = measured()[f"mass_flow/to_{name}/teacher"]
        np.testing.assert_allclose(found, into, rtol=1e-4, err_msg=name)
    known = where & (labels >= 0)
    target = np.take_along_axis(change, np.maximum(labels, 0)[..., None], -1)[known].mean()
    np.testing.assert_allclose(measured()["mass_flow/to_target"], target, rtol=1e-4)


def test_gradients_of_the_parameters():
    *_, grads = by_hand()
    task, kd = grads["task"].mean(0), grads["kd"].mean(0)
    norms = [measured()[f"gradient_norm/{name}"] for name in ("task", "kd")]
    np.testing.assert_allclose(
        norms, [0.5 * np.linalg.norm(task), 3 * np.linalg.norm(kd)], rtol=1e-4
    )
    params, others, batches, terms = setup()
    away = run(params, others, batches, terms | {"kd": Term(KD, -3.0, other="teacher")})
    np.testing.assert_allclose(away["gradient_norm/kd"], norms[1], rtol=1e-6)
    cosine = task @ kd / np.linalg.norm(task) / np.linalg.norm(kd)
    np.testing.assert_allclose(measured()["gradient_cosine/kd/task"], cosine, atol=1e-5)
    whole = 0.5 * grads["task"] + 3 * grads["kd"]
    variance = np.var(whole, 0, ddof=1).sum()
    squared_norm = np.sum(whole.mean(0) ** 2) - variance / N
    np.testing.assert_allclose(measured()["gradient_noise/variance"], variance, rtol=1e-4)
    np.testing.assert_allclose(measured()["gradient_noise/squared_norm"], squared_norm, rtol=1e-4)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_alone_is_that_part_of_all(name):
    alone = run(*setup(), probes=(name,))
    prefix = {"gradient_norms": "gradient_norm/", "gradient_cosines": "gradient_cosine/"}
    chosen = {k: v for k, v in measured().items() if k.startswith(prefix.get(name, name))}
    assert chosen and set(alone) == set(chosen)
    for key, value in chosen.items():
        np.testing.assert_allclose(alone[key], value, rtol=1e-5)


def test_tokens_whose_logits_are_unformed():
    """Rows of two axes, as the same rows of one; what lies outside of the mask does not count."""
    params, others, batches, terms = setup()

    def tokens(params, batch):
        return Outputs(hidden=batch["inputs"], head=Head(params["w"], params["b"]))

    wide = jax.tree.map(lambda x: x.reshape(N, 2, B // 2, *x.shape[2:]), batches)
    outside = ~wide["where"][..., None]
    wide["inputs"] = jnp.where(outside, jnp.nan, wide["inputs"])
    logits = others["teacher"].logits.reshape(N, 2, B // 2, K)
    shown = {"teacher": Outputs(hidden=logits, head=Head(jnp.eye(K)))}
    measure = functools.partial(probe, chunk=4, learning_rate=ETA)
    found = jax.jit(lambda p: measure(p, tokens, shown, wide, terms))(params)
    assert set(found) == set(measured())
    for key, value in measured().items():
        np.testing.assert_allclose(found[key], value, rtol=2e-4, atol=1e-6, err_msg=key)


def largest(jaxpr):
    """The most elements of an array that a program makes, inner programs included."""
    sizes = [math.prod(x.aval.shape) for equation in jaxpr.eqns for x in equation.outvars]
    inner = (jaxprs_in_params(equation.params) for equation in jaxpr.eqns)
    return max([*sizes, *map(largest, itertools.chain(*inner))], default=0)


def test_the_logits_of_all_tokens_never_exist():
    """No array has more than those of a chunk, or at two points of a grid."""
    vocabulary, chunk, tokens = 4099, 4, (2, 2, 16)
    hidden, matrix = jnp.zeros((*tokens, D)), jnp.zeros((D, vocabulary))
    batches = {"inputs": hidden, "where": jnp.ones(tokens, bool), "labels": jnp.zeros(tokens, int)}
    terms = {"task": Term(bind(cross_entropy), 1.0), "kd": Term(KD, 1.0, other="teacher")}
    forward = lambda matrix, batch: Outputs(hidden=batch["inputs"], head=Head(matrix))  # noqa: E731
    shown = forward(matrix, batches)

    def probed(matrix, chunk):
        return probe(matrix, forward, {"teacher": shown}, batches, terms, chunk=chunk)

    divergence = bind(alpha_beta, alpha=[0.0, 1.0], beta=0.5)
    summary = bind(rank_summary, divergence=divergence, learning_rate=0.1)
    over = lambda matrix: over_grid(summary, forward(matrix, batches), shown, chunk=chunk)  # noqa: E731
    size = lambda f, *args: largest(jax.make_jaxpr(f)(matrix, *args).jaxpr)  # noqa: E731
    assert size(lambda x: probed(x, 0)) == math.prod(tokens[1:]) * vocabulary
    assert size(lambda x: probed(x, chunk)) <= 2 * chunk * vocabulary
    assert size(over) <= 2 * chunk * vocabulary


def test_terms_that_couple_the_batch_and_heads_that_batches_share():
    params, others, batches, _ = setup()

    def with_hidden(params, batch):
        return forward(params, batch).replace(hidden=batch["inputs"], head=Head(params["w"]))

    def needs_head(student, teacher, batch):
        assert teacher.head.unembedding.shape == student.head.unembedding.shape == (D, K)
        return jnp.sum((student.head(student.hidden) - teacher.logits) ** 2, -1)

    others = {"teacher": others["teacher"].replace(head=Head(2 * params["w"]))}
    terms = {
        "dist": Term(bind(dist), 1.0, other="teacher"),
        "head": Term(needs_head, 1.0, other="teacher"),
    }
    found = jax.jit(lambda p: probe(p, with_hidden, others, batches, terms))(params)
    assert all(np.isfinite(value) for value in found.values())

    def batch_mean(params, i):
        batch = {name: entry[i] for name, entry in batches.items()}
        teacher = Outputs(logits=others["teacher"].logits[i])
        values = bind(dist)(forward(params, batch), teacher, batch)
        return jnp.sum(jnp.where(batch["where"], values, 0)) / jnp.sum(batch["where"])

    grads = [jax.grad(batch_mean)(params, i) for i in range(N)]
    mean = [np.mean(g, axis=0) for g in zip(*map(jax.tree.leaves, grads), strict=True)]
    norm = np.sqrt(sum(np.sum(g**2) for g in mean))
    np.testing.assert_allclose(found["gradient_norm/dist"], norm, rtol=1e-4)


def test_a_network_alone_without_labels():
    params, _, batches, _ = setup()
    batches = {name: batches[name] for name in ("inputs", "where")}

    def sharpness(student, other, batch):
        return -jnp.sum(jnp.square(jax.nn.softmax(student.logits)), -1)

    terms = {"sharpen": Term(sharpness, 1.0, other="self")}
    others = {"self": Outputs()}
    found = probe(
        params, forward, others, batches, terms, probes=("effective_temperature", "mass_flow")
    )
    assert set(found) == {"mass_flow/moved"}


def test_refusals():
    params, others, batches, terms = setup()
    with pytest.raises(
        ValueError, match=r"\(did you mean 'gradient_norms'\?\); found 'gradient_norm'\.$"
    ):
        probe(params, forward, others, batches, terms, probes=("gradient_norm",))
    one = jax.tree.map(lambda x: x[:1], (others, batches))
    with pytest.raises(
        ValueError, match=r"^batches must be at least 2, for the probe 'gradient_noise'; found 1"
    ):
        probe(params, forward, *one, terms)
    coupled = {"dist": Term(bind(dist), 1.0, other="teacher")}
    hidden = lambda params, batch: Outputs(hidden=batch["inputs"], head=Head(params["w"]))  # noqa: E731
    with pytest.raises(ValueError, match=r"^the loss of term 'dist' must be of each row alone, "):
        probe(params, hidden, others, batches, coupled, probes=("mass_flow",), chunk=2)
    mute = lambda params, batch: Outputs(hidden=batch["inputs"])  # noqa: E731
    with pytest.raises(
        ValueError, match=r"^the logits of the network being trained must be shown; found None"
    ):
        probe(params, mute, others, batches, terms, probes=("mass_flow",))
