"""Norms, cosines, noise and temperature against numpy, scipy and linear models by hand."""

import itertools

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from jax import numpy as jnp

from abkd_jax.analysis import (
    cosine,
    effective_temperature,
    gradient_noise,
    gradient_norm,
    logit_cosines,
    logit_gradient,
    parameter_cosines,
    tree_cosine,
    variance_reduction,
)
from abkd_jax.binding import bind
from abkd_jax.divergences import forward_kl
from abkd_jax.losses import cross_entropy, dist, on_logits
from abkd_jax.types import Outputs, Term

INF = np.inf
B, D, K = 9, 4, 5


def softmax(x):
    return scipy.special.softmax(np.asarray(x, np.float64), -1)


def cos(a, b):
    return np.sum(a * b, -1) / np.sqrt(np.sum(a * a, -1) * np.sum(b * b, -1))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_norm_and_cosine(scale):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    a[0, 0] = 0
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(cos(a, b))
    low = np.float32(scale * a), np.float32(scale * b)
    np.testing.assert_allclose(jax.jit(cosine)(*low), expected, atol=1e-6)
    np.testing.assert_allclose(gradient_norm(low[0]), scale * np.linalg.norm(a, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("scale", [6e-38, 1.3e-37, 9e37, 3e38])
def test_norm_and_cosine_at_the_ends_of_float32(scale):
    a, b = np.float32([[scale, scale / 5], [0, scale]])
    np.testing.assert_allclose(gradient_norm(a), np.linalg.norm(np.float64(a)), rtol=1e-6)
    expected = cos(np.float64(a) / scale, np.float64(b) / scale)
    np.testing.assert_allclose(jax.jit(cosine)(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(cosine(a, np.float32([2e-38, 0])), 26**-0.5 * 5, rtol=1e-6)
    assert gradient_norm(jnp.bfloat16(a)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "b,found",
    [
        ({"b": np.ones(3)}, ("['a'] [3]", "['b'] [3]")),
        ({"a": np.ones((3, 1))}, ("['a'] [3]", "['a'] [3, 1]")),
        ({"a": np.ones(3), "c": np.ones(2)}, ("nothing", "['c'] [2]")),
        (np.ones(3), ("['a'] [3]", "[3]")),
    ],
)
def test_trees_that_differ_are_refused(b, found):
    with pytest.raises(ValueError) as error:
        tree_cosine({"a": np.ones(3)}, b)
    assert str(error.value) == f"a and b must be of the same structure and shapes; found {found!r}."


def test_cosine_of_trees():
    a, b = np.random.default_rng(0).normal(size=(2, 23))
    tree = lambda x: {"w": np.float32(x[:20].reshape(4, 5)), "b": np.float32(x[20:])}  # noqa: E731
    np.testing.assert_allclose(tree_cosine(tree(a), tree(b)), cos(a, b), rtol=1e-5)


def test_the_gradient_of_a_removed_class_is_0():
    student, teacher = jnp.array([1.0, -INF, 0.0]), jnp.array([1.0, 0.0, -INF])
    gradient = logit_gradient(student, teacher, divergence=forward_kl)  # a plain function too
    assert gradient[1] == 0 and np.all(np.isfinite(gradient))


# --- cosines of losses: a linear model, whose gradients are X^T (q - target) ----------------------


def setup():
    rng = np.random.default_rng(1)
    inputs, params = rng.normal(size=(B, D)), {"w": rng.normal(size=(D, K))}
    batch = {
        "inputs": jnp.float32(inputs),
        "labels": jnp.array([0, 1, 2, -1, 4, 0, -1, 2, 3]),
        "where": jnp.arange(B) < 8,
    }
    batch["labelled"] = batch["where"] & (batch["labels"] >= 0)
    teacher = 2 * rng.normal(size=(B, K))
    terms = {
        "task": Term(bind(cross_entropy), 2.0, where="labelled"),
        "kd": Term(bind(on_logits, divergence=forward_kl, temperature=1.0), 5.0, other="teacher"),
        "shifted": Term(bind(on_logits, divergence=forward_kl, temperature=1.0), 1.0, other="peer"),
    }
    others = {"teacher": Outputs(jnp.float32(teacher)), "peer": Outputs(jnp.float32(-teacher))}
    q, p, r = softmax(inputs @ params["w"]), softmax(teacher), softmax(-teacher)
    slopes = {"task": q - np.eye(K)[np.asarray(batch["labels"])], "kd": q - p, "shifted": q - r}
    slopes["task"] *= np.asarray(batch["labelled"])[:, None]
    slopes = {name: s * np.asarray(batch["where"])[:, None] for name, s in slopes.items()}
    return jax.tree.map(jnp.float32, params), batch, others, terms, inputs, slopes


def forward(params, batch):
    return Outputs(logits=batch["inputs"] @ params["w"])


def test_cosines_in_logits():
    params, batch, others, terms, _, slopes = setup()
    found = jax.jit(logit_cosines)(terms, forward(params, batch), others, batch)
    masks = {n: np.asarray(batch["labelled" if n == "task" else "where"]) for n in terms}
    for a, b in itertools.product(terms, repeat=2):
        both = masks[a] & masks[b]
        expected = np.mean(cos(slopes[a][both], slopes[b][both]))
        np.testing.assert_allclose(found[a][b], expected, atol=1e-5)
    assert abs(found["task"]["kd"] - found["task"]["shifted"]) > 0.01


def test_cosines_in_parameters():
    params, batch, others, terms, inputs, slopes = setup()
    found = jax.jit(lambda p: parameter_cosines(terms, forward, p, others, batch))(params)
    grads = {name: np.ravel(inputs.T @ slope) for name, slope in slopes.items()}
    for a, b in itertools.product(terms, repeat=2):
        np.testing.assert_allclose(found[a][b], cos(grads[a], grads[b]), atol=1e-5)


@pytest.mark.slow
def test_cosines_of_a_loss_that_couples_the_batch():
    params, batch, others, terms, *_ = setup()
    terms = {"dist": Term(bind(dist), 1.0, other="teacher"), "kd": terms["kd"]}
    student = forward(params, batch)
    found = logit_cosines(terms, student, others, batch)

    def summed(logits):
        values = bind(dist)(Outputs(logits=logits), others["teacher"], batch)
        return jnp.sum(jnp.where(batch["where"], values, 0))

    kept = np.asarray(batch["where"])
    slope = np.asarray(jax.grad(summed)(student.logits), np.float64)[kept]
    expected = np.mean(
        cos(slope, (softmax(student.logits) - softmax(others["teacher"].logits))[kept])
    )
    np.testing.assert_allclose(found["dist"]["kd"], expected, atol=1e-4)
    found = parameter_cosines(terms, forward, params, others, batch)
    assert -1 < found["dist"]["kd"] < 1


# --- noise --------------------------------------------------------------------------------------


def stacked(rows):
    return {"w": np.float32(rows[:, :6].reshape(-1, 2, 3)), "b": np.float32(rows[:, 6:])}


def test_noise_against_numpy():
    rows = 3 + np.random.default_rng(0).normal(size=(5, 8))
    found = jax.jit(gradient_noise)(stacked(rows), batch_size=32)
    variance = np.var(rows, axis=0, ddof=1).sum()
    squared_norm = np.sum(rows.mean(0) ** 2) - variance / 5
    np.testing.assert_allclose(found.variance, variance, rtol=1e-5)
    np.testing.assert_allclose(found.squared_norm, squared_norm, rtol=1e-5)
    np.testing.assert_allclose(found.signal_to_noise, squared_norm / variance, rtol=1e-5)
    np.testing.assert_allclose(found.noise_scale, 32 * variance / squared_norm, rtol=1e-5)


def test_noise_is_estimated_without_bias():
    rng = np.random.default_rng(0)
    true, deviation = rng.normal(size=8), rng.uniform(1, 3, 8)
    rows = true + deviation * rng.normal(size=(20_000, 3, 8))
    found = jax.jit(jax.vmap(gradient_noise))(np.float32(rows))
    np.testing.assert_allclose(np.mean(found.variance), np.sum(deviation**2), rtol=0.01)
    np.testing.assert_allclose(np.mean(found.squared_norm), np.sum(true**2), rtol=0.03)


def test_noise_alone_and_no_noise():
    rows = np.float32([[1, 1], [-1, -1]])
    found = gradient_noise(rows)
    assert found.squared_norm < 0 and found.signal_to_noise == 0 and found.noise_scale == INF
    found = gradient_noise(np.ones((3, 2), np.float32))
    assert found.variance == 0 and found.noise_scale == 0 and found.signal_to_noise == INF


@pytest.mark.parametrize("gradients", [np.ones((1, 4)), {"a": np.ones((2, 3)), "b": np.ones(3)}])
def test_too_few_batches_are_refused(gradients):
    with pytest.raises(ValueError, match=r"^gradients must be the gradients of at least 2 batches"):
        gradient_noise(gradients)


def test_variance_reduction_against_numpy():
    rng = np.random.default_rng(0)
    task = rng.normal(size=(6, 8))
    distill = 0.7 * task + 0.5 * rng.normal(size=(6, 8))
    variance = lambda w: np.var((1 - w) * task + w * distill, axis=0, ddof=1).sum()  # noqa: E731
    for weight in (1.0, 0.4, 1.5):
        found = jax.jit(variance_reduction)(stacked(distill), stacked(task), weight=weight)
        np.testing.assert_allclose(found.removed, 1 - variance(weight) / variance(0), atol=1e-5)
    best = scipy.optimize.minimize_scalar(variance)
    np.testing.assert_allclose(found.best_weight, best.x, rtol=1e-4)
    np.testing.assert_allclose(found.removed_at_best, 1 - best.fun / variance(0), rtol=1e-4)


def test_other_batches_for_the_task_are_refused():
    message = r"^distill_gradients and task_gradients must .*; found \('\[3, 2\]', '\[4, 2\]'\)\.$"
    with pytest.raises(ValueError, match=message):
        variance_reduction(np.ones((3, 2)), np.ones((4, 2)))


def test_a_teacher_is_a_control_variate():
    """Safaryan et al.: a linear model's mixed gradient is the task's less the teacher's."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(50, B, D)), np.eye(K)[rng.integers(0, K, (50, B))]
    student = rng.normal(size=(D, K))
    gradient = lambda w, y: np.einsum("nbd,nbk->ndk", inputs, softmax(inputs @ w) - y) / B  # noqa: E731
    reductions = []
    for apart in (0.0, 0.3, 3.0):
        teacher = student + apart * rng.normal(size=(D, K))
        task, distill = gradient(student, labels), gradient(student, softmax(inputs @ teacher))
        weight = 0.6
        mixed = task - weight * gradient(teacher, labels)
        expected = 1 - np.var(mixed, 0).sum() / np.var(task, 0).sum()
        found = variance_reduction(np.float32(distill), np.float32(task), weight=weight)
        np.testing.assert_allclose(found.removed, expected, atol=1e-4)
        reductions.append(found)
    removed = [float(r.removed_at_best) for r in reductions]
    np.testing.assert_allclose(removed[0], 1.0, atol=1e-5)  # a teacher that is the student
    np.testing.assert_allclose(reductions[0].best_weight, 1.0, rtol=1e-5)
    assert removed[0] > removed[1] > removed[2] >= 0


# --- effective temperature ----------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 50.0])
def test_the_temperature_of_a_tempered_teacher(temperature):
    teacher = 3 * np.random.default_rng(0).normal(size=(2, 6, K))
    teacher[0, :, 2] = -INF
    with jax.enable_x64(True):
        found = jax.jit(effective_temperature)(7 + teacher / temperature, teacher)
    assert found.shape == (2, 6)
    np.testing.assert_allclose(found, temperature, rtol=1e-8)


def test_the_temperature_against_a_root_of_scipy():
    student, teacher = 2 * np.random.default_rng(0).normal(size=(2, 10, K))
    entropy = lambda x: scipy.special.entr(softmax(x)).sum()  # noqa: E731
    gap = lambda log_t, s, t: entropy(t / np.exp(log_t)) - entropy(s)  # noqa: E731
    roots = [
        scipy.optimize.brentq(gap, -6, 6, (s, t)) for s, t in zip(student, teacher, strict=True)
    ]
    found = effective_temperature(np.float32(student), np.float32(teacher))
    np.testing.assert_allclose(found, np.exp(roots), rtol=1e-4)


def test_temperatures_out_of_reach():
    teacher = jnp.array([[1.0, 0.0, -1.0], [1.0, 1.0, 0.0]])
    student = jnp.array([[0.0, 0.0, 0.0], [90.0, 0.0, 0.0]])  # flatter, sharper than any T makes it
    found = effective_temperature(student, teacher)
    assert found[0] > 500 and found[1] < 2e-3
