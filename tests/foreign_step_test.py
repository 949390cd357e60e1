"""Networks that know nothing of this library, and one in bfloat16, through the training step."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from abkd_jax import losses, models, optimizers, train
from abkd_jax.binding import bind
from abkd_jax.divergences import forward_kl
from abkd_jax.train import eval_outputs, train_step
from abkd_jax.types import Outputs, Term

K, D, B = 4, 6, 16
RULE = bind(optimizers.sgd, learning_rate=0.1)


class Plain(nn.Module):
    """Logits, and no train."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.relu(nn.Dense(8)(x)))


class Normed(nn.Module):
    """Batch norm and dropout."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(K)(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(D, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, K, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(0, K, B))
    where = np.arange(B) < B - 2
    inputs = jnp.asarray(1 + 2 * rng.normal(size=(B, D)), jnp.float32)
    return {"inputs": inputs, "labels": labels, "where": where, "labelled": where}


def linen(module, seed=0):
    return module.apply, module.init(jax.random.key(seed), jnp.zeros((1, D)))


def around_linen(seed=0):
    """A function of a linen module's variables, which says itself what training is."""
    module = Normed()
    return lambda v, x: module.apply(v, x, train=False), linen(module, seed)[1]


def nnx_network(seed=0):
    """In evaluation: its statistics are no parameters."""
    model = Nnx(nnx.Rngs(seed))
    model(make_batch()["inputs"])  # in training still: moves the statistics
    model.eval()
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    call = lambda v, x: nnx.merge(graphdef, v["params"], v["batch_stats"])(x)  # noqa: E731
    return call, {"params": params, "batch_stats": stats}


def function(seed=0):
    """Pure, of a nested dictionary."""
    keys = jax.random.split(jax.random.key(seed))
    params = {
        "linear": {"w": 0.5 * jax.random.normal(keys[0], (D, 8)), "b": jnp.zeros(8)},
        "linear_1": {"w": 0.5 * jax.random.normal(keys[1], (8, K)), "b": jnp.zeros(K)},
    }

    def apply(params, x):
        first, last = params["linear"], params["linear_1"]
        return jax.nn.relu(x @ first["w"] + first["b"]) @ last["w"] + last["b"]

    return apply, params


def of_one_example(seed=0):
    """A pytree that is no mapping, and parts of Outputs."""
    first, last = (layer["w"] for layer in function(seed)[1].values())

    def one(layers, x):
        hidden = jnp.tanh(x @ layers[0])
        return Outputs(logits=hidden @ layers[1], hidden=hidden)

    return lambda layers, x: jax.vmap(one, (None, 0))(layers, x), (first, last)


NETWORKS = {
    "linen": lambda seed=0: linen(Plain(), seed),
    "linen, batch norm and dropout": lambda seed=0: linen(Normed(), seed),
    "a function around linen with batch norm": around_linen,
    "NNX, batch norm in evaluation": nnx_network,
    "a pure function of dictionaries": function,
    "a pure function of tuples": of_one_example,
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def terms(task=1.0):
    distill = bind(losses.on_logits, divergence=forward_kl)
    return {
        "task": Term(bind(losses.cross_entropy), jnp.asarray(task), where="labelled"),
        "distill": Term(distill, jnp.ones(()), other="teacher"),
    }


def changed(a, b):
    """Leaf by leaf."""
    return [bool(np.any(x != y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]


def logits_of(apply_fn, variables):
    """By the network itself, in evaluation."""
    found = apply_fn(variables, make_batch()["inputs"])
    return found.logits if isinstance(found, Outputs) else found


# --- as they are --------------------------------------------------------------------------------


@every_network
def test_as_a_student(make):
    student, teacher = train.adopt(*make(0), optimizer=RULE), train.adopt(*function(1))
    networks, batch = {"student": student, "teacher": teacher}, make_batch()
    values = []
    for step in range(12):
        batch["key"] = jax.random.key(step)
        networks, metrics = train_step(networks, batch, {"student": terms()})
        values.append(float(metrics["student/loss"]))
    assert np.mean(values[-3:]) < np.mean(values[:3])
    assert all(changed(student.params, networks["student"].params))
    assert not any(changed(teacher, networks["teacher"]))


@every_network
def test_as_a_teacher(make):
    apply_fn, variables = make(0)
    student, teacher = train.adopt(*function(1), optimizer=RULE), train.adopt(apply_fn, variables)
    networks, batch = {"student": student, "teacher": teacher}, make_batch()
    objectives = {"student": terms(task=0.0)}
    networks, first = train_step(networks, batch, objectives)
    own, _ = student.forward(student.params, batch["inputs"], train=False)
    log_p, log_q = map(jax.nn.log_softmax, (logits_of(apply_fn, variables), own.logits))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), -1)[batch["where"]].mean()
    np.testing.assert_allclose(first["student/distill"], kl, rtol=1e-4)
    for _ in range(5):
        networks, metrics = train_step(networks, batch, objectives)
    assert metrics["student/distill"] < first["student/distill"]
    assert not any(changed(teacher, networks["teacher"]))


@every_network
def test_evaluation(make):
    apply_fn, variables = make(0)
    found = eval_outputs({"it": train.adopt(apply_fn, variables)}, make_batch())
    expected = logits_of(apply_fn, variables)
    np.testing.assert_allclose(found["it"].logits, expected, rtol=1e-5, atol=1e-6)


# --- what is learned, and what moves ------------------------------------------------------------


def test_linens_statistics_move_in_the_step_as_linen_moves_them():
    apply_fn, variables = linen(Normed())
    state, batch = train.adopt(apply_fn, variables, optimizer=RULE), make_batch()
    inputs, rngs = batch["inputs"], {"dropout": jax.random.key(3)}
    _, expected = apply_fn(variables, inputs, train=True, rngs=rngs, mutable=["batch_stats"])
    networks = {"student": state, "teacher": train.frozen(state)}
    after, _ = train_step(networks, batch | {"key": jax.random.key(3)}, {"student": terms()})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, after["student"].batch_stats, expected["batch_stats"])
    assert all(changed(state.batch_stats, after["student"].batch_stats))
    assert not any(changed(networks["teacher"], after["teacher"]))


@pytest.mark.parametrize("make", [around_linen, nnx_network])
def test_statistics_of_a_function_stay_and_are_not_learned(make):
    state = train.adopt(*make(), optimizer=RULE)
    assert jax.tree.leaves(state.batch_stats)
    networks = {"student": state, "teacher": train.frozen(state)}
    networks, _ = train_step(networks, make_batch(), {"student": terms()})
    assert all(changed(state.params, networks["student"].params))
    assert not any(changed(state.batch_stats, networks["student"].batch_stats))


def test_states_of_equal_modules_share_a_compilation():
    traces = itertools.count()

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            next(traces)
            return nn.Dense(K)(x)

    states = [train.adopt(*linen(Counting(), seed)) for seed in range(3)]
    evaluate, before = jax.jit(eval_outputs), next(traces)
    for it in states:
        evaluate({"it": it}, make_batch())
    assert next(traces) == before + 2  # traced once
    student = [train.adopt(*linen(Counting(), seed), optimizer=RULE) for seed in range(3)]
    before = next(traces)
    for it, teacher in zip(student, states, strict=True):
        train_step({"student": it, "teacher": teacher}, make_batch(), {"student": terms()})
    assert next(traces) == before + 3  # traced once, as either


# --- bfloat16 -----------------------------------------------------------------------------------


def test_the_step_keeps_parameters_and_statistics_in_float32():
    module = models.resnet(depth=8, num_classes=K, widths=(4, 4, 6, 8), dtype="bfloat16")
    inputs = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    rule = bind(optimizers.sgd, learning_rate=0.1, momentum=0.9)
    create = functools.partial(train.create, module, init_seed=0, optimizer=rule, ema_decay=0.9)
    networks = {"student": jax.eval_shape(create, inputs)}
    ones = jnp.ones(2, bool)
    batch = {"inputs": inputs, "labels": jnp.zeros(2, int), "where": ones, "labelled": ones}
    term = Term(bind(losses.cross_entropy), jnp.ones(()), "labelled")
    step = lambda networks, batch: train_step(networks, batch, {"student": {"task": term}})  # noqa: E731
    after, metrics = jax.eval_shape(step, networks, batch)
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert types(after) == types(networks)
    state = after["student"]
    kept = (state.params, state.batch_stats, state.ema_params, state.opt_state.inner_state, metrics)
    kept = [leaf.dtype for leaf in jax.tree.leaves(kept) if leaf.dtype != jnp.int32]
    assert set(kept) == {np.dtype(np.float32)}
