"""Input gradients through the training step, against torch and by hand."""

import re

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp

from abkd_jax import data, losses, models, optimizers, train
from abkd_jax.binding import bind
from abkd_jax.config.schema import resolve
from abkd_jax.divergences import forward_kl
from abkd_jax.losses import input_gradient_alignment
from abkd_jax.train import train_step
from abkd_jax.types import Outputs, Term

K, D, B = 3, 4, 8
KDIGA = Term(bind(input_gradient_alignment), jnp.ones(()), "labelled", "teacher")
RATE = 0.125  # in float32 what it is in float64
RULE = bind(optimizers.sgd, learning_rate=RATE)


def make_batch(size=B, shape=(D,)):
    rng = np.random.default_rng(0)
    labelled, where = rng.random(size) < 0.6, rng.random(size) < 0.8
    assert 0 < (labelled & where).sum() < labelled.sum() < size
    return {
        "inputs": jnp.asarray(rng.normal(size=(size, *shape)), float),
        "labels": jnp.asarray(np.where(labelled, rng.integers(0, K, size), -1)),
        "where": jnp.asarray(where),
        "labelled": jnp.asarray(labelled & where),
    }


def network(params, inputs):
    """A smooth network, so that its second derivatives are not those of a rectifier."""
    return jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"]


def make_params(width, seed):
    rng = np.random.default_rng(seed)
    shapes = {"w": (D, width), "b": (width,), "v": (width, K)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def smooth_pair():
    return {
        "student": train.adopt(network, make_params(4, 0), optimizer=RULE),
        "teacher": train.adopt(network, make_params(6, 1)),
    }


def learned(networks, batch, terms, **options):
    """The gradient that a step of plain SGD took, and the metrics."""
    after, metrics = train_step(networks, batch, {"student": terms}, **options)
    before = networks["student"].params
    moved = after["student"].params
    return jax.tree.map(lambda a, b: (a - b) / RATE, before, moved), metrics


# --- the gradient that is taken -----------------------------------------------------------------


def test_double_backward_against_torch():
    torch = pytest.importorskip("torch")
    with jax.enable_x64(True):
        networks, batch = smooth_pair(), make_batch()
        found, metrics = learned(networks, batch, {"kdiga": KDIGA})
    kept = np.asarray(batch["labelled"])
    labels = torch.tensor(np.asarray(batch["labels"])[kept])

    def input_gradient(params, create_graph):
        x = torch.tensor(np.asarray(batch["inputs"])[kept], requires_grad=True)
        logits = torch.tanh(x @ params["w"] + params["b"]) @ params["v"]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    student = {
        name: torch.tensor(np.asarray(x), requires_grad=True)
        for name, x in networks["student"].params.items()
    }
    teacher = {name: torch.tensor(np.asarray(x)) for name, x in networks["teacher"].params.items()}
    difference = input_gradient(student, True) - input_gradient(teacher, False)
    value = torch.linalg.vector_norm(difference, dim=-1).mean()
    value.backward()
    np.testing.assert_allclose(metrics["student/kdiga"], value.item(), rtol=1e-12)
    for name, x in student.items():
        np.testing.assert_allclose(found[name], x.grad, rtol=1e-8, atol=1e-12, err_msg=name)


def test_finite_differences_in_the_students_parameters():
    """With a part that reads the logits, whose own gradient is to be added."""
    task = Term(bind(losses.cross_entropy), jnp.ones(()), where="labelled")
    with jax.enable_x64(True):
        networks, batch = smooth_pair(), make_batch()
        terms = {"kdiga": KDIGA, "task": task}
        found, _ = learned(networks, batch, terms)

        def loss(params):
            state = networks["student"].replace(params=params)
            return learned(networks | {"student": state}, batch, terms)[1]["student/loss"]

        rng = np.random.default_rng(2)
        params = networks["student"].params
        for _ in range(4):
            way = {name: rng.normal(size=x.shape) for name, x in params.items()}
            above, below = (
                loss({name: x + size * way[name] for name, x in params.items()})
                for size in (1e-5, -1e-5)
            )
            expected = sum(np.vdot(way[name], found[name]) for name in way)
            np.testing.assert_allclose((above - below) / 2e-5, expected, rtol=1e-6)


def test_a_student_that_is_its_teacher_does_not_move():
    params = make_params(4, 0)
    networks = {
        "student": train.adopt(network, params, optimizer=RULE),
        "teacher": train.adopt(network, params),
    }
    found, metrics = learned(networks, make_batch(), {"kdiga": KDIGA})
    assert metrics["student/kdiga"] == 0
    assert all(not np.any(x) for x in jax.tree.leaves(found))


def test_the_gradients_that_the_step_shows():
    """By hand for linear networks: (q - onehot) W^T; zero without a label."""
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=(D, K)).astype(np.float32) for name in ("student", "teacher")}
    shown = {}

    def spy(student: Outputs, teacher: Outputs, batch: dict) -> jax.Array:
        keep = lambda s, t: shown.update(student=np.array(s), teacher=np.array(t))  # noqa: E731
        jax.debug.callback(keep, student.input_gradient, teacher.input_gradient)
        return jnp.zeros(batch["labels"].shape)

    spy.needs = ("input_gradient",)
    linear = lambda w, x: x @ w  # noqa: E731
    networks = {
        "student": train.adopt(linear, weights["student"], optimizer=RULE),
        "teacher": train.adopt(linear, weights["teacher"]),
    }
    batch, term = make_batch(), Term(bind(spy), jnp.ones(()), other="teacher")
    train_step(networks, batch, {"student": {"spy": term}})
    jax.effects_barrier()
    labels = np.asarray(batch["labels"])
    for name, w in weights.items():
        q = scipy.special.softmax(np.asarray(batch["inputs"]) @ w, -1)
        hidden = (labels < 0) | ~np.asarray(batch["where"])  # the total shows no padding
        expected = np.where(hidden[:, None], 0, (q - np.eye(K)[labels]) @ w.T)
        np.testing.assert_allclose(shown[name], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(shown[name][labels < 0], 0)


def test_a_network_that_does_not_learn_is_its_moving_average():
    networks, batch = smooth_pair(), make_batch()
    teacher = networks["teacher"]
    averaged = teacher.replace(params=make_params(6, 2), ema_params=teacher.params)
    expected, _ = learned(networks, batch, {"kdiga": KDIGA})
    found, _ = learned(networks | {"teacher": averaged}, batch, {"kdiga": KDIGA})
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_parts_of_the_batch_add_up(micro_batches):
    networks, batch = smooth_pair(), make_batch()
    whole, metrics = learned(networks, batch, {"kdiga": KDIGA})
    parts, part_metrics = learned(networks, batch, {"kdiga": KDIGA}, micro_batches=micro_batches)
    np.testing.assert_allclose(part_metrics["student/kdiga"], metrics["student/kdiga"], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, parts, whole)


def test_mutual_learners_each_move_by_their_own_gradient():
    networks = smooth_pair()
    both = networks | {"teacher": train.adopt(network, make_params(6, 1), optimizer=RULE)}
    terms = {"kdiga": KDIGA.replace(other="student")}
    batch = make_batch()
    after, _ = train_step(both, batch, {"student": {"kdiga": KDIGA}, "teacher": terms})
    alone, _ = train_step(networks, batch, {"student": {"kdiga": KDIGA}})
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, after["student"].params, alone["student"].params)
    turned = {"student": train.frozen(networks["student"]), "teacher": both["teacher"]}
    alone, _ = train_step(turned, batch, {"teacher": terms})
    jax.tree.map(close, after["teacher"].params, alone["teacher"].params)


def cnn_pair():
    module = models.cnn(num_classes=K, widths=(4, 6), batch_norm=True)
    inputs = jnp.zeros((1, 6, 6, 1))
    new = lambda seed: train.create(module, inputs, init_seed=seed, optimizer=RULE)  # noqa: E731
    return {"student": new(0), "teacher": train.frozen(new(1))}


@pytest.mark.slow
def test_batch_norm_is_that_of_evaluation():
    """Of the gradient alone: the statistics move as without it, and rows do not see each other."""
    networks, batch = cnn_pair(), make_batch(shape=(6, 6, 1))
    task = {"task": Term(bind(losses.cross_entropy), jnp.ones(()), where="labelled")}
    after, _ = train_step(networks, batch, {"student": task})
    with_gradient, metrics = train_step(networks, batch, {"student": task | {"kdiga": KDIGA}})
    before, plain, found = (x["student"].batch_stats for x in (networks, after, with_gradient))
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    leaves = zip(*map(jax.tree.leaves, (before, plain)), strict=True)
    assert any(np.any(a != b) for a, b in leaves)

    def input_gradient(state, x, label):
        """One row by itself."""

        def cross_entropy(x):
            logits = state.forward(state.params, x[None], train=False)[0].logits[0]
            return -jax.nn.log_softmax(logits)[label]

        return jax.grad(cross_entropy)(x)

    kept = np.flatnonzero(batch["labelled"])
    rows = [(batch["inputs"][i], batch["labels"][i]) for i in kept]
    norms = [
        np.linalg.norm(np.subtract(*(input_gradient(networks[n], *row) for n in networks)))
        for row in rows
    ]
    np.testing.assert_allclose(metrics["student/kdiga"], np.mean(norms), rtol=1e-4)


# --- what it costs ------------------------------------------------------------------------------


def forwards(terms, **options):
    """How often each network is called while the step is traced, and whether for training."""
    called = []

    def counting(name):
        def apply(params, inputs, *, train):
            called.append((name, train))
            return network(params, inputs)

        return apply

    networks = {
        "student": train.adopt(counting("student"), make_params(4, 0), optimizer=RULE),
        "teacher": train.adopt(counting("teacher"), make_params(6, 1)),
    }
    jax.make_jaxpr(lambda *args: train_step(*args, **options))(
        networks, make_batch(), {"student": terms}
    )
    return sorted(called)


def test_only_a_term_that_needs_it_costs_further_passes():
    kd = Term(bind(losses.on_logits, divergence=forward_kl), jnp.ones(()), other="teacher")
    task = Term(bind(losses.cross_entropy), jnp.ones(()), where="labelled")
    plain = [("student", True), ("teacher", False)]
    assert forwards({"kd": kd, "task": task}) == plain
    more = [("student", False), ("student", True), ("teacher", False), ("teacher", False)]
    assert forwards({"kd": kd, "kdiga": KDIGA}) == more
    nested = bind(losses.entropy_gated, forward=KDIGA.loss, reverse=kd.loss)
    assert forwards({"nested": Term(nested, jnp.ones(()), other="teacher")}) == more


# --- outputs that come with the batch, refusals -------------------------------------------------


def test_outputs_in_the_batch_bring_their_gradient():
    networks, batch = smooth_pair(), make_batch()
    teacher = networks["teacher"]

    def cross_entropy(inputs):
        log_q = jax.nn.log_softmax(network(teacher.params, inputs))
        at_label = jnp.take_along_axis(log_q, jnp.maximum(batch["labels"], 0)[:, None], 1)[:, 0]
        return -jnp.sum(jnp.where(batch["labels"] < 0, 0.0, at_label))

    logits, gradient = network(teacher.params, batch["inputs"]), jax.grad(cross_entropy)
    given = Outputs(logits=logits, input_gradient=gradient(batch["inputs"]))
    broken = teacher.replace(params=jax.tree.map(lambda x: x * jnp.nan, teacher.params))
    expected, _ = learned(networks, batch, {"kdiga": KDIGA})
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    for micro_batches in (1, 2):
        found, _ = learned(
            networks | {"teacher": broken}, batch | {"outputs": {"teacher": given}},
            {"kdiga": KDIGA}, micro_batches=micro_batches,
        )  # fmt: skip
        jax.tree.map(close, found, expected)


def test_refusals():
    networks, batch = smooth_pair(), make_batch()
    given = {"outputs": {"teacher": Outputs(logits=jnp.zeros((B, K)))}}
    message = "batch['outputs'] has 'teacher' without its input_gradient, which a term reads."
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        train_step(networks, batch | given, {"student": {"kdiga": KDIGA}})
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with pytest.raises(ValueError, match=r"^the batch lacks 'labels'; it has inputs, labelled, wh"):
        train_step(networks, unlabelled, {"student": {"kdiga": KDIGA}})


def test_any_network_can_give_it():
    """One that shows logits alone, by a config."""
    term = dict(fn="input_gradient_alignment", weight=1.0, where="labelled")
    rule = dict(fn="sgd", learning_rate=RATE)
    given = {"student": (network, make_params(4, 0)), "teacher": (network, make_params(6, 1))}
    made = dict(
        teacher=dict(model=dict(fn="given")),
        student=dict(model=dict(fn="given"), optimizer=rule, terms=dict(kdiga=term)),
        phases=dict(distill=dict(learn=("student",), see=("teacher",))),
        batch_size=B,
        devices=1,
    )
    examples = np.zeros((B, D), np.float32), np.arange(B) % K
    vectors = data.from_arrays(train=examples, validation=None, test=examples, num_classes=K)
    (phase,) = resolve(made, networks=given, data=vectors).phases
    loss = phase.learners["student"].terms["kdiga"].loss
    assert loss.needs == ({"input_gradient"}, {"input_gradient"})
