"""Streamed summaries against loops, and refusals of what is no pair of logits."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax.analysis import (
    bound_summary,
    check_cached,
    confidence_weight,
    cosine,
    effective_temperature,
    gradient_summary,
    hardness_weight,
    log_mass_ratio,
    logit_gradient,
    mass_change,
    over_and_underestimated,
    over_grid,
    rank_summary,
    reassignment_summary,
    tightness,
    upper_bound,
)
from abkd_jax.binding import bind
from abkd_jax.divergences import alpha_beta, forward_kl
from abkd_jax.types import Divergence, Head, Outputs

ALPHAS, BETAS = np.array([1.0, 0.0, 0.8]), np.array([0.0, 1.0, 0.3])
ROWS, K = (5, 8), 6


def draw(seed, shape=(*ROWS, K)):
    return np.float32(2 * np.random.default_rng(seed).normal(size=shape))


def grid(alphas=ALPHAS, betas=BETAS):
    return bind(alpha_beta, alpha=alphas, beta=betas)


def expected_of(values, where=None):
    values = np.asarray(values, np.float64)
    values = values.ravel() if where is None else values[where]
    return values.mean(), values.std(), values.min(), values.max()


def check(summary, point, values, where=None):
    found = summary.mean, summary.deviation, summary.lowest, summary.highest
    for part, expected in zip(found, expected_of(values, where), strict=True):
        np.testing.assert_allclose(part[point], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_reassignments_over_a_grid(masked):
    student, teacher = draw(0), draw(1)
    where = np.random.default_rng(2).random(ROWS) < 0.6 if masked else None
    fn = bind(reassignment_summary, divergence=grid(), learning_rate=0.3)
    found = over_grid(fn, student, teacher, where=where, chunk=7)  # 40 rows are no multiple
    for i, numbers in enumerate(zip(ALPHAS, BETAS, strict=True)):
        divergence = bind(alpha_beta, alpha=numbers[0], beta=numbers[1])
        step = log_mass_ratio(student, teacher, divergence=divergence, learning_rate=0.3)
        change = np.asarray(mass_change(student, step.log_ratio))
        under = np.asarray(over_and_underestimated(student, teacher)["underestimated"])
        check(found["moved"], i, np.maximum(change, 0).sum(-1), where)
        check(found["to_underestimated"], i, np.where(under, change, 0).sum(-1), where)
        check(found["normaliser"], i, step.normaliser, where)
        check(found["largest"], i, np.abs(step.log_ratio).max(-1), where)


def unformed(seed, width=3):
    """Tokens' hidden states, and the logits that a network would form of them."""
    rng = np.random.default_rng(seed)
    hidden, matrix = rng.normal(size=(*ROWS, width)), 2 * rng.normal(size=(width, K))
    head = Head(jnp.float32(matrix), jnp.float32(rng.normal(size=K)))
    outputs = Outputs(hidden=jnp.float32(hidden), head=head, features={"other": jnp.zeros(3)})
    return outputs, hidden @ matrix + np.asarray(head.bias)


def test_ranks_of_tokens_whose_logits_are_unformed():
    """The flow of a softmax's step, by numpy, into classes by the teacher's cumulated mass."""
    (student, own), (teacher, others) = unformed(0), unformed(1)
    where = np.random.default_rng(2).random(ROWS) < 0.6
    fn = bind(rank_summary, divergence=grid(), learning_rate=0.3)
    found = over_grid(fn, student, teacher, where=where, chunk=7)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (others, own))
    before = np.array([[[row[row > x].sum() for x in row] for row in rows] for rows in p])
    groups = {"to_head": before + p <= 0.5, "to_tail": before + p > 0.95}
    first = p == p.max(-1, keepdims=True)
    groups = {"to_head": groups["to_head"] | first, "to_tail": groups["to_tail"] & ~first}
    groups["to_middle"] = ~groups["to_head"] & ~groups["to_tail"]
    after = np.exp(own - 0.3 * (q - p))  # forward KL, the first point
    change = after / after.sum(-1, keepdims=True) - q
    assert set(found) == set(groups)
    for name, group in groups.items():
        assert group.any()
        check(found[name], 0, np.where(group, change, 0).sum(-1), where)


@pytest.mark.parametrize(
    "other,message",
    [
        (
            Outputs(hidden=jnp.zeros((5, 8, 3))),
            "teacher_logits must be outputs with logits, or",
        ),
        (unformed(1)[0].map_rows(lambda x: x[:1]), r".* must be of the same rows; found \["),
        (np.zeros((5, 8, K + 1), np.float32), r".* must be of the same number of classes"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(other, message):
    fn = bind(gradient_summary, divergence=grid())
    with pytest.raises((AssertionError, ValueError), match=rf"^{message}"):
        over_grid(fn, unformed(0)[0], other)


@pytest.mark.slow
def test_bounds_and_gradients_over_a_grid():
    student, teacher = draw(0), draw(1)
    student[..., 3] = teacher[..., 3] = -np.inf
    kept = [0, 1, 2, 4, 5]
    fn = bind(bound_summary, alpha=ALPHAS, beta=BETAS, learning_rate=[0.3, 0.2, 0.1])
    bounds = over_grid(fn, student, teacher, chunk=8)
    gradients = over_grid(bind(gradient_summary, divergence=grid()), student, teacher)
    reference = logit_gradient(student, teacher, divergence=forward_kl)
    for i, (alpha, beta, eta) in enumerate(zip(ALPHAS, BETAS, (0.3, 0.2, 0.1), strict=True)):
        bound = upper_bound(
            student[..., kept], teacher[..., kept], alpha=alpha, beta=beta, learning_rate=eta
        )
        whole, tighter = (tightness(bound.log_ratio, b) for b in (bound.total, bound.tighter))
        check(bounds["tightness"], i, np.mean(whole, -1))
        check(bounds["tightness_signed"], i, np.mean(tighter, -1))
        divergence = bind(alpha_beta, alpha=alpha, beta=beta)
        gradient = logit_gradient(student, teacher, divergence=divergence)
        check(gradients["gradient_norm"], i, np.linalg.norm(gradient, axis=-1))
        check(gradients["cosine_with_forward_kl"], i, cosine(gradient, reference))


@pytest.mark.parametrize("points", [3, 11])
def test_several_devices_share_the_points(points, monkeypatch):
    student, teacher = draw(0), draw(1)
    alphas, betas = np.linspace(0, 1, points), np.linspace(1, 0.2, points)
    fn = bind(reassignment_summary, divergence=grid(alphas, betas), learning_rate=0.3)
    assert jax.local_device_count() == 8
    shared = over_grid(fn, student, teacher, chunk=7)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    alone = over_grid(fn, student, teacher, chunk=7)
    assert {x.shape for x in jax.tree.leaves(shared)} == {(points,)}
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, shared, alone)


def test_numbers_that_all_points_share_are_each_point_s():
    student, teacher = draw(0), draw(1)
    of = lambda alpha: over_grid(  # noqa: E731
        bind(reassignment_summary, divergence=grid(alpha, BETAS), learning_rate=0.3),
        student,
        teacher,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, of(0.8), of(np.full(3, 0.8)))  # alpha comes before beta


def test_another_grid_is_no_other_compile():
    student, teacher = draw(0), draw(1)
    traces = []

    def counted(student_logits, teacher_logits, *, divergence: Divergence):
        traces.append(1)
        return gradient_summary(student_logits, teacher_logits, divergence=divergence)

    run = lambda *g: over_grid(bind(counted, divergence=grid(*g)), student, teacher)  # noqa: E731
    first = run()
    before = len(traces)
    second = run(ALPHAS + 0.1, BETAS)
    assert len(traces) == before > 0
    assert np.all(first["gradient_norm"].mean != second["gradient_norm"].mean)


def test_moments_far_from_0_keep_their_digits():
    def distance(student, teacher, *, offset: float | jax.Array):
        return {"value": offset + student[..., 0]}

    student = draw(0, (4000, 2))
    found = over_grid(bind(distance, offset=[1e4, 0.0]), student, student)["value"]
    np.testing.assert_allclose(found.deviation[0], student[:, 0].std(), rtol=1e-3)
    np.testing.assert_allclose(found.mean[0], 1e4 + student[:, 0].mean(), rtol=1e-6)


@pytest.mark.parametrize(
    "alpha,beta,found",
    [
        (1.0, 0.5, r"\[\]"),
        (np.ones(3), np.ones(2), r"\[\[2\], \[3\]\]"),
        (np.ones((2, 2)), 1.0, r"\[\[2, 2\]\]"),
        (np.ones(0), 1.0, r"\[\[0\]\]"),
    ],
)
def test_numbers_that_make_no_grid_are_refused(alpha, beta, found):
    fn = bind(gradient_summary, divergence=bind(alpha_beta, alpha=alpha, beta=beta))
    with pytest.raises(
        ValueError, match=f"numbers of fn must be scalars and at least one array.*{found}"
    ):
        over_grid(fn, draw(0), draw(1))


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(where=np.ones(40, bool)), r"where must be bool \[5, 8\].* bool\[40\]\.$"),
        (
            dict(where=np.ones((5, 1), bool)),
            r"where must be bool \[5, 8\].* bool\[5, 1\]\.$",
        ),
        (dict(where=np.ones(ROWS, int)), r"where must be bool .* found int64\[5, 8\]\.$"),
        (dict(where=[True] * 5), r"where must be bool .* found \[True, True, .*\.$"),
        (dict(chunk=0), r"chunk must be an integer of at least 1; found 0\.$"),
        (dict(chunk=-3), "chunk must be .* found -3"),
        (dict(chunk=2.5), "chunk must be .* found 2.5"),
        (
            dict(fn=gradient_summary),
            r"fn must be bound: bind\(function, ...\); found <function grad.*\.$",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    fn = bind(gradient_summary, divergence=grid())
    with pytest.raises((AssertionError, ValueError), match=message):
        over_grid(**(dict(fn=fn, student_logits=draw(0), teacher_logits=draw(1)) | options))


def test_no_rows_are_as_rows_of_which_none_counts():
    fn = bind(gradient_summary, divergence=grid())
    none = over_grid(fn, draw(0)[:0], draw(1)[:0])
    masked = over_grid(fn, draw(0), draw(1), where=np.zeros(ROWS, bool))
    jax.tree.map(np.testing.assert_array_equal, none, masked)
    norm = none["gradient_norm"]
    assert np.all(norm.mean == 0) and np.all(norm.deviation == 0)
    assert np.all(norm.lowest == np.inf) and np.all(norm.highest == -np.inf)


def test_a_row_whose_classes_are_all_removed_does_not_poison_the_bounds():
    student, teacher = draw(0), draw(1)
    student[0, 0] = teacher[0, 0] = -np.inf
    fn = bind(bound_summary, alpha=ALPHAS, beta=BETAS, learning_rate=0.1)
    found = over_grid(fn, student, teacher)
    where = np.arange(40).reshape(ROWS) > 0
    others = over_grid(fn, student, teacher, where=where)
    for name in ("tightness", "tightness_signed"):
        assert np.all(found[name].lowest == 0)
        np.testing.assert_allclose(found[name].mean, others[name].mean * 39 / 40, rtol=1e-5)


# --- refusals -----------------------------------------------------------------------------------

GOOD = draw(0, (4, 3))


def altered(value):
    logits = draw(1, (4, 3))
    logits[2, 1] = value
    return logits


REFUSED = [
    pytest.param(
        GOOD,
        draw(1, (4, 5)),
        r"student_logits and teacher_logits must be of the same number of .* \[4, 5\]\]\.$",
        id="classes",
    ),
    pytest.param(GOOD, draw(1, (5, 3)), "with leading axes that broadcast", id="leading axes"),
    pytest.param(
        GOOD,
        altered(np.nan),
        r"teacher_logits must be finite, .* found NaN in 1 of 4 rows, the first at \[2\]: cache",
        id="NaN",
    ),
    pytest.param(altered(np.inf), GOOD, r"student_logits .* found \+inf in 1 of 4 rows", id="+inf"),
    pytest.param(
        GOOD,
        np.asarray(jax.nn.softmax(GOOD)),
        r"teacher_logits must be logits: .* jnp.log\(probabilities\); found .probabilities",
        id="probabilities",
    ),
    pytest.param(
        np.asarray(jax.nn.softmax(jnp.bfloat16(GOOD))),
        GOOD,
        "student_logits must be logits: .* found .prob",
        id="16 bit",
    ),
    pytest.param(
        GOOD,
        np.ones((4, 3), int),
        r"teacher_logits must be a floating-point array \[..., K\] .*; found int64\[4, 3\]",
        id="integers",
    ),
    pytest.param(
        [1.0, 2.0], GOOD, r"student_logits must be a floating.*found \[1.0, 2.0\]\.$", id="list"
    ),
    pytest.param(
        GOOD,
        [[1.0], [1.0, 2.0]],
        r"teacher_logits must be a fl.*found \[\[1.0\], \[1.0, 2.0\]\]",
        id="ragged",
    ),
    pytest.param(
        np.float32(1),
        GOOD,
        "student_logits must be a floating-point array .*; found np.float32",
        id="scalar",
    ),
]


@pytest.mark.parametrize("student,teacher,message", REFUSED)
def test_what_is_no_pair_of_logits_is_refused_in_one_sentence(student, teacher, message):
    with pytest.raises((AssertionError, ValueError), match=message) as error:
        check_cached(student, teacher)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


LOG_UNIFORM = np.full((4, 3), -np.log(3), np.float32)
ONE_HOT = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    "logits", [LOG_UNIFORM, ONE_HOT, ONE_HOT[0], np.full((2, 1), 1.0), altered(-np.inf)]
)
def test_what_is_a_pair_of_logits_passes(logits):
    found = check_cached(logits, logits)
    assert found[0].shape == found[1].shape == logits.shape


def test_a_pair_is_broadcast_and_lifted():
    found = check_cached(jnp.zeros((2, 1, 3), jnp.bfloat16), jnp.zeros((4, 3)))
    assert found[0].shape == found[1].shape == (2, 4, 3)
    assert found[0].dtype == found[1].dtype == jnp.float32


PROBABILITIES = np.asarray(jax.nn.softmax(GOOD))
USERS = {
    "log_mass_ratio": functools.partial(log_mass_ratio, divergence=forward_kl, learning_rate=1.0),
    "logit_gradient": functools.partial(logit_gradient, divergence=forward_kl),
    "upper_bound": functools.partial(upper_bound, alpha=1.0, beta=1.0, learning_rate=1.0),
    "hardness_weight": functools.partial(hardness_weight, alpha=1.0),
    "confidence_weight": lambda s, t: confidence_weight(s, beta=1.0),
    "over_and_underestimated": over_and_underestimated,
    "effective_temperature": effective_temperature,
    "over_grid": functools.partial(over_grid, bind(gradient_summary, divergence=grid())),
}


@pytest.mark.parametrize("name", USERS)
def test_every_function_refuses_probabilities(name):
    with pytest.raises(ValueError, match=r"student_logits must be logits: .* found .probabilities"):
        USERS[name](PROBABILITIES, GOOD)


def test_values_are_not_read_inside_jit():
    jax.jit(check_cached)(PROBABILITIES, GOOD)
    with pytest.raises(
        ValueError, match=r"found .probabilities"
    ):  # closed over: still there to read
        jax.jit(lambda s: check_cached(s, PROBABILITIES))(GOOD)
