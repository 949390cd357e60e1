"""What each preset of configs/methods.py is, in numpy, from the published formulas.

S and T are the student's and the teacher's logits [N, C], p is the teacher and q the student. Where
the published term is the cross-entropy -sum p log q, it is less the teacher's entropy here. The
weights are those of the table in methods_test.py.
"""

import jax
import numpy as np
import pytest
import scipy.optimize
from jax import numpy as jnp
from methods_test import METHODS, PUBLISHED, objective

from abkd_jax import losses
from abkd_jax.binding import Statistic, at_step
from abkd_jax.types import Head, Outputs

N, C, D = 6, 5, 4


def draw():
    """Two networks' outputs and a batch, in float64: every label known, nothing padded."""
    rng = np.random.default_rng(1)
    shapes = dict(logits=(N, C), hidden=(N, D), head=(D, C), input_gradient=(N, 2, 3))

    def outputs():
        parts = {name: 2 * rng.normal(size=shape) for name, shape in shapes.items()}
        return Outputs(**parts | {"head": Head(unembedding=parts["head"])})

    student, teacher = outputs(), outputs()
    masks = {"where": np.ones(N, bool), "labelled": np.ones(N, bool)}
    return student, teacher, masks | {"labels": np.array([0, 3, 1, 4, 2, 3], np.int32)}


STUDENT, TEACHER, BATCH = draw()
CENTERS = np.random.default_rng(4).normal(size=(C, D))
S, T, Y = STUDENT.logits, TEACHER.logits, BATCH["labels"]
ROWS = np.arange(N)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), -1)


def entropy(p):
    return -np.sum(p * np.log(p), -1)


def alpha_beta(p, q, a, b):
    c = a + b
    return -np.sum(p**a * q**b - a / c * p**c - b / c * q**c, -1) / (a * b)


def of_label(z):
    """-log of the label's probability."""
    return -np.log(softmax(z)[ROWS, Y])


def without_label(z):
    return np.array([np.delete(row, label) for row, label in zip(z, Y, strict=True)])


def kd(temperature, divergence=kl):
    return temperature**2 * divergence(softmax(T / temperature), softmax(S / temperature))


def dkd(target_weight=1, rest_weight=2, rest=kl):
    """At temperature 4; the weight of the rest is that of ResNet-56 to ResNet-20."""
    p, q = softmax(T / 4), softmax(S / 4)
    binary = [np.stack([x[ROWS, Y], 1 - x[ROWS, Y]], -1) for x in (p, q)]
    others = [softmax(without_label(z) / 4) for z in (T, S)]
    return 16 * (target_weight * kl(*binary) + rest_weight * rest(*others))


def lskd(divergence):
    """At temperature 2, which divides the z-scores."""
    p, q = (
        softmax((z - z.mean(-1, keepdims=True)) / (1e-7 + z.std(-1, ddof=1, keepdims=True)) / 2)
        for z in (T, S)
    )
    return 4 * divergence(p, q)


def ttm(divergence):
    power = softmax(T) ** 0.1
    return divergence(power / power.sum(-1, keepdims=True), softmax(S))


def pearson(x, y, axis, epsilon=0.0):
    x, y = (z - z.mean(axis, keepdims=True) for z in (x, y))
    norms = np.linalg.norm(x, axis=axis) * np.linalg.norm(y, axis=axis)
    return np.sum(x * y, axis) / (norms + epsilon)


def dist():
    p, q = softmax(T / 4), softmax(S / 4)
    rows, columns = pearson(p, q, 1, 1e-8).mean(), pearson(p, q, 0, 1e-8).mean()
    return 16 * (1 - rows) + 16 * (1 - columns)


def gram():
    p, q = softmax(T / 4), softmax(S / 4)
    batch = np.sum((p @ p.T - q @ q.T) ** 2) / N
    return batch + np.sum((p.T @ p - q.T @ q) ** 2) / C


def adaptive_kl(p, q):
    values = []
    for p_row, q_row in zip(p, q, strict=True):
        gap, mass, head, tail = np.abs(p_row - q_row), 0.0, 0.0, 0.0
        for rank, k in enumerate(np.argsort(-p_row)):
            mass += p_row[k]
            if rank == 0 or mass <= 0.5:
                head += gap[k]
            else:
                tail += gap[k]
        share = head / (head + tail)
        values.append(share * kl(p_row, q_row) + (1 - share) * kl(q_row, p_row))
    return np.array(values)


def alphanet():
    p, q = softmax(T), softmax(S)
    low = np.sum(q * (np.minimum(q / p, 5.0) - 1) / 2, -1)  # a = -1; at a = 1 it is forward KL
    return np.maximum(low, kl(p, q))


def entropy_aware():
    p, q = softmax(T / 3), softmax(S / 3)
    return 0.5 * entropy(p) * (1 + entropy(q) / np.log(C))


def balanced():
    p, q = softmax(T), softmax(S)
    h_t, h_s = entropy(p), entropy(q)
    return np.where(h_t > h_s, 2, 1) * kl(p, q) + np.where(h_s > h_t, 2, 1) * kl(q, p)


def cakd_features():
    """Strong is a unit whose part in the teacher's logit of the label is above the mean part."""
    values = []
    for f_s, f_t, label in zip(STUDENT.hidden, TEACHER.hidden, Y, strict=True):
        part = np.abs(TEACHER.head.unembedding[:, label] * f_t)
        sets = [part > part.mean(), part <= part.mean()]
        p, q = softmax(f_t / 4), softmax(f_s / 4)
        masses = [np.array([x[units].sum() for units in sets]) for x in (p, q)]
        strong, weak = (kl(*(x[units] / x[units].sum() for x in (p, q))) for units in sets)
        values.append(16 * (kl(*masses) + strong + 2 * weak))
    return np.array(values)


def norm_and_direction():
    f_s, f_t = STUDENT.hidden, TEACHER.hidden
    e = (CENTERS / np.linalg.norm(CENTERS, axis=-1, keepdims=True))[Y]
    longer = np.maximum(np.linalg.norm(f_s, axis=-1), np.linalg.norm(f_t, axis=-1))
    return 1 - np.sum(f_s * e, -1) / longer


def sinkhorn():
    """<plan, D> over the whole batch."""
    p, q = softmax(T / 2), softmax(S / 2)
    cost = np.abs(q[:, None] - p[None]).sum(-1)
    plan = np.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0, keepdims=True)
    return np.sum(plan * cost)


def soft_ranks(z):
    """The point of the permutahedron nearest to the scores, which have the spread of 1..C."""
    scores = (z - z.mean()) / z.std() * np.arange(1, C + 1).std()
    order = np.argsort(-scores)
    rest = scores[order] - np.arange(C, 0, -1)
    ranks = np.empty(C)
    ranks[order] = scores[order] - scipy.optimize.isotonic_regression(rest, increasing=False).x
    return ranks


def rank_correlation():
    ranks = [np.array([soft_ranks(row) for row in z]) for z in (T, S)]
    return 1 - pearson(T, S, -1) + 1 - pearson(*ranks, -1)


def reverse(p, q):
    return kl(q, p)


def jeffreys(p, q):
    return kl(p, q) + kl(q, p)


def jensen_shannon(p, q):
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def published(p, q):
    """alpha and beta of ABKD for ResNet-56 to ResNet-20."""
    return alpha_beta(p, q, 0.8, 0.3)


def published_lskd(p, q):
    return alpha_beta(p, q, 0.9, 0.3)


TASK = of_label(S)
HARD = 1 - np.exp(-of_label(S) / (of_label(T) + 1e-7))
UNSURE = entropy(softmax(T / 4))
POWER = np.sum(softmax(T) ** 0.1, -1)
ABKD = published(softmax(T / 4), softmax(S / 4))
NKD_REST = kl(softmax(without_label(T) / 3), softmax(without_label(S) / 3)) + entropy(
    softmax(without_label(T) / 3)
)
INPUTS = np.sqrt(np.sum((STUDENT.input_gradient - TEACHER.input_gradient) ** 2, (1, 2)))

PARTS = {  # per example, of each term, before its weight; the objective is the mean of their sum
    "kd": (TASK, kd(4)),
    "reverse_kl": (TASK, kd(4, reverse)),
    "jeffreys": (TASK, kd(4, jeffreys)),
    "js": (TASK, kd(4, jensen_shannon)),
    "ttm": (TASK, ttm(kl)),
    "wttm": (TASK, POWER / np.mean(POWER) * ttm(kl)),
    "dkd": (TASK, dkd()),
    "nkd": (TASK, softmax(T)[ROWS, Y] * TASK + 3.5 * 9 * NKD_REST),
    "lskd": (TASK, lskd(kl)),
    "dist": (TASK, dist()),
    "mlkd": (TASK, kd(4), gram()),
    "akl": (TASK, kd(4, adaptive_kl)),
    "alphanet": (TASK, alphanet()),
    "abkd": (TASK, ABKD),
    "ab_dkd": (TASK, dkd(rest=published)),
    "ab_lskd": (TASK, lskd(published_lskd)),
    "ab_ttm": (TASK, ttm(published)),
    "er_kd": (TASK, UNSURE * kd(4)),
    "er_dkd": (TASK, UNSURE * dkd()),
    "ea_kd": (TASK, entropy_aware() * kd(4)),
    "ea_dkd": (TASK, entropy_aware() * dkd()),
    "er_abkd": (TASK, UNSURE * ABKD),
    "wslkd": (TASK, HARD * kd(4)),
    "bdkd": (TASK, balanced()),
    "cakd": (TASK, dkd()),
    "cakd_features": (TASK, dkd(), cakd_features()),
    "sinkd": (TASK, kd(4) / 16, sinkhorn() / N),
    "kd_pp": (TASK, kd(4), norm_and_direction()),
    "dkd_pp": (TASK, dkd(2.5, 4), norm_and_direction()),
    "dist_pp": (TASK, dist(), norm_and_direction()),
    "bkd": (TASK, kd(2)),
    "cmkd_style": (TASK, rank_correlation()),
    "kdiga": (TASK, kd(1), INPUTS),
}


def weights(method, share=1.0):
    """Of each term, in order, when the share of the warm-up is reached."""
    numbers = PUBLISHED[method].numbers | dict(PUBLISHED[method].ours)
    key = lambda term: f"{term}.weight"  # noqa: E731
    rising = lambda term: share * numbers[f"{key(term)}.value"]  # noqa: E731
    return [numbers[key(t)] if key(t) in numbers else rising(t) for t in METHODS[method]]


def expected(method, share=1.0):
    pairs = zip(weights(method, share), PARTS[method], strict=True)
    return sum(weight * np.mean(part) for weight, part in pairs)


def test_every_method_has_its_formula():
    assert set(PARTS) == set(METHODS)


@pytest.mark.parametrize("method", PARTS)
def test_the_whole_objective_is_the_published_one(method):
    """With all its terms and weights; warm-ups are at the end of their ramp."""
    with jax.enable_x64(True):
        arrays = {"class_means": CENTERS, "class_weights": np.full(C, -3.0)}  # of equal classes
        found = lambda x: arrays[x.name] if isinstance(x, Statistic) else x  # noqa: E731
        terms = jax.tree.map(found, objective(METHODS[method]))
        value, _ = in_all(terms, STUDENT, TEACHER, BATCH, jnp.asarray(20))
    np.testing.assert_allclose(value, expected(method), rtol=1e-10)


@jax.jit
def in_all(terms, student, teacher, batch, step):
    return losses.total(at_step(terms, step), student, {"teacher": teacher}, batch)


@pytest.mark.parametrize("method", ["dkd", "dist_pp"])
def test_before_its_warm_up_a_method_has_less_of_its_teacher(method):
    means = lambda leaf: jnp.asarray(CENTERS) if isinstance(leaf, Statistic) else leaf  # noqa: E731
    terms = jax.tree.map(means, objective(METHODS[method]))
    values = [in_all(terms, STUDENT, TEACHER, BATCH, jnp.asarray(step))[0] for step in (0, 10, 20)]
    np.testing.assert_allclose(values, [expected(method, x) for x in (0, 0.5, 1)], rtol=2e-5)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_the_teacher_s_gradient_of_wttm_is_as_long_as_that_of_ttm(num_classes):
    """Its weights alone make it 35 times as long for 100 classes."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 64, num_classes)) * np.array([1, 5])[:, None, None]
    batch = {"where": np.ones(64, bool)}

    def length(method):
        loss = objective(METHODS[method])["distill"].loss
        of_mean = lambda s: jnp.mean(loss(Outputs(logits=s), Outputs(logits=teacher), batch))  # noqa: E731
        return np.linalg.norm(jax.jit(jax.grad(of_mean))(student))

    assert METHODS["wttm"]["distill"]["weight"] == METHODS["ttm"]["distill"]["weight"]
    assert 0.8 < length("wttm") / length("ttm") < 1.25
