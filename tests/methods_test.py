"""The published methods of configs/methods.py, as any offline config takes them."""

import importlib.util
import pathlib
import runpy

import jax
import numpy as np
import pytest
import scipy.optimize
from jax import numpy as jnp

from abkd_jax import losses
from abkd_jax.binding import Statistic, at_step
from abkd_jax.config import arguments, resolve
from abkd_jax.config.build import Builder
from abkd_jax.config.schema import plain
from abkd_jax.types import Head, Outputs

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
get_methods = runpy.run_path(str(_CONFIGS / "methods.py"))["get_methods"]
METHODS = get_methods(batch_size=64, num_steps=240)
OF_LABELS = {"dkd", "nkd", "difficulty_weighted", "norm_and_direction", "decoupled_features"}
OF_LABELS |= {"input_gradient_alignment"}


def get_config(name, argument):
    spec = importlib.util.spec_from_file_location(name, _CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return plain(module.get_config(argument))


def named(group):
    """The functions that a group names, at any depth."""
    if not isinstance(group, dict):
        return set()
    return {group.get("fn")}.union(*(named(part) for part in group.values()))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_config_that_can_be_run(method):
    config = get_config("cifar100", f"method={method},runlocal")
    for name, width in (("teacher", 8), ("student", 4)):  # a ResNet takes long to trace
        config[name]["model"] = dict(fn="mlp", widths=(width,))
    distill = resolve(config).phases[-1]
    assert set(distill.objectives["student"]) == set(METHODS[method])
    assert config["student"]["terms"]["task"] == METHODS[method]["task"]  # no label is withheld


@pytest.mark.parametrize("method", METHODS)
def test_where_labels_are_withheld_a_method_uses_those_that_there_are(method):
    config = get_config("digits", f"method={method}")
    terms = config["student"]["terms"]
    assert set(resolve(config).phases[-1].objectives["student"]) == set(terms)
    assert terms["task"] == METHODS[method]["task"] | {"where": "labelled"}
    for name, term in terms.items():
        if name != "task":
            wrapped = term["fn"] == "with_teacher_labels"
            assert wrapped == bool(named(METHODS[method][name]) & OF_LABELS)
            assert (term["loss"] if wrapped else term)["fn"] == METHODS[method][name]["fn"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_features_projects_where_widths_differ(method):
    of_features = bool(named(METHODS[method]) & {"norm_and_direction", "decoupled_features"})
    student = get_config("digits", f"method={method}")["student"]
    assert student.get("project") == (dict(hidden="teacher") if of_features else None)


def test_weights_that_depend_on_the_run():
    assert METHODS["sinkd"]["transport"]["weight"] == pytest.approx(0.8 * 0.001 * 64)
    assert METHODS["dkd"]["distill"]["weight"] == dict(fn="warmup", value=1.0, steps=20)


def test_the_number_of_a_method_can_be_changed():
    terms = get_config("digits", "method=abkd,alpha=0.5,weight=16.")["student"]["terms"]
    assert terms["distill"]["weight"] == 16.0
    assert terms["distill"]["divergence"] == dict(fn="alpha_beta", alpha=0.5, beta=0.3)


def test_the_temperature_of_lskd_is_that_of_its_scores():
    terms = get_config("digits", "method=lskd,temperature=4.")["student"]["terms"]
    assert terms["distill"]["divergence"]["divergence"]["temperature"] == 4.0
    assert "temperature" not in terms["distill"]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"^method must be one of kd, .*; found 'dkdd' \(did you "):
        get_config("digits", "method=dkdd")


def test_a_config_without_methods_says_so():
    config = importlib.util.spec_from_file_location("digits", _CONFIGS / "digits.py")
    module = importlib.util.module_from_spec(config)
    config.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"^this config takes no method; found method=kd\.$"):
        arguments.apply(module.get_config(), {"method": {"fn": "kd"}})


# --- what each preset is, in numpy, from the published formulas --------------------------------
#
# s and t are the student's and the teacher's logits [N, C], p is the teacher and q the student.
# Where the published term is the cross-entropy -sum p log q, it is less the teacher's entropy here.

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
ABKD = published(softmax(T / 4), softmax(S / 4))
NKD_REST = kl(softmax(without_label(T) / 3), softmax(without_label(S) / 3)) + entropy(
    softmax(without_label(T) / 3)
)
INPUTS = np.sqrt(np.sum((STUDENT.input_gradient - TEACHER.input_gradient) ** 2, (1, 2)))

OBJECTIVES = {  # per example; the objective is the mean
    "kd": 0.1 * TASK + 0.9 * kd(4),
    "rkd": 0.1 * TASK + 0.9 * kd(4, reverse),
    "jeffreys": 0.1 * TASK + 0.45 * kd(4, jeffreys),
    "js": 0.1 * TASK + 0.9 * kd(4, jensen_shannon),
    "ttm": TASK + 45 * ttm(kl),
    "wttm": TASK + 45 * np.sum(softmax(T) ** 0.1, -1) * ttm(kl),
    "dkd": TASK + dkd(),
    "nkd": TASK + softmax(T)[ROWS, Y] * TASK + 3.5 * 9 * NKD_REST,
    "lskd": 0.1 * TASK + 9 * lskd(kl),
    "dist": TASK + dist(),
    "mlkd": 0.1 * TASK + 0.9 * (kd(4) + gram()),
    "akl": 0.1 * TASK + 0.9 * kd(4, adaptive_kl),
    "alphanet": TASK + alphanet(),
    "abkd": TASK + 32 * ABKD,
    "ab_dkd": TASK + dkd(rest=published),
    "ab_lskd": 0.1 * TASK + 9 * lskd(published_lskd),
    "ab_ttm": TASK + 45 * ttm(published),
    "er_kd": 0.1 * TASK + 0.9 * UNSURE * kd(4),
    "er_dkd": TASK + UNSURE * dkd(),
    "ea_kd": 0.1 * TASK + 0.9 * entropy_aware() * kd(4),
    "ea_dkd": TASK + entropy_aware() * dkd(),
    "er_abkd": TASK + 32 * UNSURE * ABKD,
    "wslkd": TASK + 2.25 * HARD * kd(4),
    "bdkd": TASK + balanced(),
    "cakd": TASK + dkd(),
    "cakd_features": TASK + dkd() + cakd_features(),
    "sinkd": 0.1 * TASK + 0.9 * kd(4) / 16 + 0.8 * 0.001 * sinkhorn(),
    "kd_pp": TASK + kd(4) + 2 * norm_and_direction(),
    "dkd_pp": TASK + dkd(2.5, 4) + 3.5 * norm_and_direction(),
    "dist_pp": TASK + 2 * dist() + norm_and_direction(),
    "bkd": TASK + kd(2),
    "cmkd_style": TASK + rank_correlation(),
    "kdiga": 0.5 * TASK + 0.5 * kd(1) + INPUTS,
}


def test_every_method_has_its_formula():
    assert set(OBJECTIVES) == set(METHODS)


@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_whole_objective_is_the_published_one(method):
    """With all its terms and weights; warm-ups are at the end of their ramp."""
    with jax.enable_x64(True):
        terms = objective(get_methods(batch_size=N, num_steps=240)[method])
        means = lambda leaf: CENTERS if isinstance(leaf, Statistic) else leaf  # noqa: E731
        terms = jax.tree.map(means, terms)
        value, _ = in_all(terms, STUDENT, TEACHER, BATCH, jnp.asarray(20))
    np.testing.assert_allclose(value, np.mean(OBJECTIVES[method]), rtol=1e-10)


def objective(terms):
    return Builder(num_steps=240).objective(
        terms, field="student.terms", learner="student", networks=("student", "teacher")
    )


@jax.jit
def in_all(terms, student, teacher, batch, step):
    return losses.total(at_step(terms, step), student, {"teacher": teacher}, batch)


def test_before_its_warm_up_a_method_has_no_more_than_its_labels():
    terms = objective(METHODS["dkd"])
    values = [in_all(terms, STUDENT, TEACHER, BATCH, jnp.asarray(step))[0] for step in (0, 10, 20)]
    expected = [np.mean(TASK + share * dkd()) for share in (0, 0.5, 1)]
    np.testing.assert_allclose(values, expected, rtol=2e-5)
