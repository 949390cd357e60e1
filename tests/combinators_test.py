"""Combinators against torch and numpy, their identities, and the contract of divergences."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp

from abkd_jax import divergences
from abkd_jax.binding import bind, kind_of
from abkd_jax.divergences import alpha_beta, forward_kl, reverse_kl, total_variation
from abkd_jax.types import Divergence

B, K = 6, 7
INF = np.inf
PRIOR = np.log(np.array([5.0, 3, 1, 1, 0.5, 0.2, 0.1]))
AB = bind(alpha_beta, alpha=0.5, beta=0.3)


def kl(p, q):
    return scipy.special.rel_entr(p, q).sum(-1)


def ab(p, q, a=0.5, b=0.3):
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -terms.sum(-1) / (a * b)


def softmax(logits):
    return scipy.special.softmax(logits, axis=-1)


def z_scores(logits):
    return (logits - logits.mean(-1, keepdims=True)) / (
        1e-7 + logits.std(-1, ddof=1, keepdims=True)
    )


def bucketed(student, teacher, k):
    """p and q on the teacher's k largest and the rest, row by row, from probabilities."""
    rows = []
    for s, t in zip(student, teacher, strict=True):
        head = np.argsort(-t, kind="stable")[:k]
        tail = np.setdiff1d(np.arange(K), head)
        rows.append([np.append(x[head], x[tail].sum()) for x in (softmax(t), softmax(s))])
    return np.moveaxis(np.array(rows), 1, 0)


def head_of(student, teacher, k):
    """p and q of the teacher's k largest, not renormalised, and zeros elsewhere."""
    rank = np.argsort(np.argsort(-teacher, axis=-1, kind="stable"), axis=-1)
    return [np.where(rank < k, softmax(x), 0) for x in (teacher, student)]


def dropped(student, teacher, k):
    p, _ = head_of(student, teacher, k)
    return p / p.sum(-1, keepdims=True), softmax(student)


def renormalised(student, teacher, k):
    return [x / x.sum(-1, keepdims=True) for x in head_of(student, teacher, k)]


class Row(NamedTuple):
    """A combinator with a divergence, and its value in numpy.

    Attributes:
        bound: the whole divergence.
        truth: (student logits, teacher logits) -> [...].
        proper: 0 at p = q.
        rtol: in float32.
    """

    bound: Any
    truth: Callable
    proper: bool = True
    rtol: float = 2e-5


def make(combinator, **numbers):
    return bind(combinator, **numbers)


ROWS = {
    "tempered": Row(
        make(divergences.tempered, divergence=AB, temperature=3.0, temperature_power=1.0),
        lambda s, t: 3 * ab(softmax(t / 3), softmax(s / 3)),
    ),
    "standardized": Row(
        make(divergences.standardized, divergence=forward_kl),
        lambda s, t: kl(softmax(z_scores(t)), softmax(z_scores(s))),
    ),
    "standardized alpha_beta": Row(
        make(divergences.standardized, divergence=AB),
        lambda s, t: ab(softmax(z_scores(t)), softmax(z_scores(s))),
    ),
    "powered": Row(
        make(divergences.powered, divergence=forward_kl, teacher_power=0.4),
        lambda s, t: kl(softmax(t) ** 0.4 / (softmax(t) ** 0.4).sum(-1)[:, None], softmax(s)),
        proper=False,
    ),
    "prior_shifted": Row(
        make(divergences.prior_shifted, divergence=reverse_kl, log_prior=PRIOR),
        lambda s, t: kl(
            softmax(s),
            softmax(t) * np.exp(PRIOR) / (softmax(t) * np.exp(PRIOR)).sum(-1)[:, None],
        ),
        proper=False,
    ),
    "top_k": Row(
        make(divergences.top_k, divergence=forward_kl, k=3),
        lambda s, t: kl(*bucketed(s, t, 3)),
    ),
    "top_k alpha_beta": Row(
        make(divergences.top_k, divergence=AB, k=1), lambda s, t: ab(*bucketed(s, t, 1))
    ),
    "top_k_renormalised": Row(
        make(divergences.top_k_renormalised, divergence=reverse_kl, k=3),
        lambda s, t: kl(*renormalised(s, t, 3)[::-1]),
    ),
    "top_k_dropped": Row(
        make(divergences.top_k_dropped, divergence=forward_kl, k=3),
        lambda s, t: kl(*dropped(s, t, 3)),
        proper=False,
    ),
    "top_k_dropped alpha_beta": Row(
        make(divergences.top_k_dropped, divergence=AB, k=4),
        lambda s, t: ab(*dropped(s, t, 4)),
        proper=False,
    ),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def draw(seed=0, dtype=np.float32, scale=1.5):
    return tuple((scale * np.random.default_rng(seed).normal(size=(2, B, K))).astype(dtype))


@jax.jit
def evaluate(bound, student, teacher):
    """The values and the gradients of each row, in the numbers as sums over rows."""
    value, pullback = jax.vjp(lambda *args: args[0](*args[1:]), bound, student, teacher)
    return value, pullback(jnp.ones_like(value))


def wide(bound):
    return jax.tree.map(lambda x: np.round(np.asarray(x, np.float64), 6), bound)


# --- values and gradients -----------------------------------------------------------------------


@pytest.mark.slow
@every_row
def test_values_in_both_precisions(row):
    student, teacher = draw()
    value, slopes = evaluate(row.bound, student, teacher)
    assert value.shape == (B,) and value.dtype == np.float32
    args = [x.astype(np.float64) for x in (student, teacher)]
    with jax.enable_x64(True):
        bound = wide(row.bound)
        if "log_prior" in bound.numbers:
            bound.numbers["log_prior"] = PRIOR
        exact, exact_slopes = jax.device_get(evaluate(bound, *args))
        assert exact.dtype == np.float64
        np.testing.assert_allclose(exact, row.truth(*args), rtol=1e-10)
    np.testing.assert_allclose(value, exact, rtol=row.rtol)
    for slope, true in zip(*map(jax.tree.leaves, (slopes, exact_slopes)), strict=True):
        np.testing.assert_allclose(slope, true, atol=1e-5 * np.abs(true).max())


@every_row
def test_gradients_are_those_of_the_value_in_both_modes(row):
    with jax.enable_x64(True):
        args = (wide(row.bound), *draw(dtype=np.float64))
        _, slopes = evaluate(*args)
        assert jax.tree.leaves(slopes[1])
        summed = jax.jit(lambda args: jnp.sum(args[0](*args[1:])))
        rng = np.random.default_rng(1)
        for part in range(3):
            direction = list(jax.tree.map(np.zeros_like, args))
            direction[part] = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), args[part])
            direction = tuple(direction)
            pairs = zip(*map(jax.tree.leaves, (slopes, direction)), strict=True)
            reverse = sum(np.vdot(x, y) for x, y in pairs)
            above, below = (
                summed(jax.tree.map(lambda x, d, h=h: x + h * d, args, direction))
                for h in (1e-5, -1e-5)
            )
            np.testing.assert_allclose((above - below) / 2e-5, reverse, rtol=1e-6, atol=1e-9)
            forward = jax.jvp(summed, (args,), (direction,))[1]
            np.testing.assert_allclose(forward, reverse, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_lskd_is_torchs(side):
    """Standardised KD as published, with T inside, T^2 and the gradient through mean and std."""
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    logits = draw(dtype=np.float64)
    s, t = (torch.tensor(x, requires_grad=True) for x in logits)
    scores = lambda x: (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))  # noqa: E731
    log_q, log_p = (torch.log_softmax(scores(x) / 2, -1) for x in (s, t))
    true = 4 * (log_p.exp() * (log_p - log_q)).sum(-1)
    (true_slope,) = torch.autograd.grad(true.sum(), [(s, t)[side]])
    with jax.enable_x64(True):
        scored = bind(divergences.tempered, divergence=forward_kl, temperature=2.0)
        value, slopes = evaluate(bind(divergences.standardized, divergence=scored), *logits)
        np.testing.assert_allclose(value, true.detach(), rtol=1e-11)
        np.testing.assert_allclose(slopes[1 + side], true_slope, rtol=1e-8, atol=1e-12)


# --- the contract of divergences ----------------------------------------------------------------


@pytest.mark.slow
@every_row
def test_a_batch_is_a_vmap_of_its_rows(row):
    student, teacher = draw()
    value, _ = evaluate(row.bound, student, teacher)
    rows = jax.jit(jax.vmap(lambda s, t: row.bound(s, t)))(student, teacher)
    np.testing.assert_allclose(rows, value, rtol=1e-6)
    shaped = evaluate(row.bound, *(x.reshape(2, 3, K) for x in (student, teacher)))[0]
    np.testing.assert_allclose(shaped, np.reshape(value, (2, 3)), rtol=1e-6)
    one, _ = evaluate(row.bound, student, teacher[0])
    same, _ = evaluate(row.bound, student, np.broadcast_to(teacher[0], student.shape))
    np.testing.assert_allclose(one, same, rtol=1e-6)
    flipped, _ = evaluate(row.bound, student[0], teacher)
    np.testing.assert_allclose(flipped[0], value[0], rtol=1e-6)


@every_row
def test_bfloat16_is_computed_in_float32(row):
    args = [jnp.asarray(x, jnp.bfloat16) for x in draw()]
    value, slopes = evaluate(row.bound, *args)
    assert value.dtype == np.float32 and slopes[1].dtype == jnp.bfloat16
    wider, _ = evaluate(row.bound, *(x.astype(jnp.float32) for x in args))
    np.testing.assert_allclose(value, wider, rtol=1e-6)


@every_row
def test_a_class_removed_from_both_equals_cutting_it_out(row):
    kept = np.array([0, 2, 3, 5, 6])
    args = draw()
    of_class = lambda x: x[..., kept] if jnp.shape(x)[-1:] == (K,) else x  # noqa: E731
    hidden = [np.where(np.isin(np.arange(K), kept), x, np.float32(-INF)) for x in args]
    value, slopes = evaluate(row.bound, *hidden)
    cut, cut_slopes = evaluate(jax.tree.map(of_class, row.bound), *(x[:, kept] for x in args))
    np.testing.assert_allclose(value, cut, rtol=1e-5, atol=1e-6)
    for slope, true in zip(*map(jax.tree.leaves, (slopes, cut_slopes)), strict=True):
        np.testing.assert_allclose(of_class(slope), true, rtol=1e-4, atol=1e-5)
    for slope in slopes[1:]:
        np.testing.assert_array_equal(np.delete(slope, kept, axis=1), 0)


@every_row
def test_one_sided_and_saturated_logits_and_one_class_are_finite(row):
    student, teacher = draw()
    off = np.where(np.arange(K) == 2, np.float32(-INF), np.float32(0))
    alone = np.where(np.arange(K) == 2, np.float32(0), np.float32(-INF))
    big = np.float32(1e4) * np.eye(B, K, dtype=np.float32)
    for pair in (
        (student + off, teacher),
        (student, teacher + off),
        (student + alone, teacher + alone),
        (student * 0 - np.float32(INF), teacher * 0 - np.float32(INF)),
        (big, -big),
        (big, teacher),
        (student, big),
    ):
        for leaf in jax.tree.leaves(evaluate(row.bound, *pair)):
            assert np.isfinite(leaf).all()


@every_row
def test_equal_logits(row):
    student, teacher = draw()
    value, slopes = evaluate(row.bound, teacher, teacher)
    if row.proper:
        np.testing.assert_array_equal(value, np.zeros(B))
        np.testing.assert_allclose(slopes[1], np.zeros((B, K)), atol=1e-6)
    else:
        assert np.all(np.asarray(value) > 1e-4)
    value, _ = evaluate(row.bound, student, teacher)
    assert np.all(np.asarray(value) >= 0)
    shifted, _ = evaluate(row.bound, student + 8, teacher - 4)
    np.testing.assert_allclose(shifted, value, rtol=1e-4)


@every_row
def test_numbers_may_be_one_per_row(row):
    args = draw()
    spread = lambda x: jnp.full(B, x) if jnp.ndim(x) == 0 else x  # noqa: E731
    value, _ = evaluate(row.bound, *args)
    np.testing.assert_allclose(
        evaluate(jax.tree.map(spread, row.bound), *args)[0], value, rtol=1e-6
    )


def test_they_are_divergences_that_a_config_finds():
    for name in (
        "powered prior_shifted standardized tempered top_k top_k_dropped top_k_renormalised".split()
    ):
        assert kind_of(getattr(divergences, name)) is Divergence
        assert getattr(divergences, name) is getattr(divergences, name)


# --- identities ---------------------------------------------------------------------------------


def test_standardized_is_blind_to_increasing_affine_maps():
    student, teacher = draw()
    value, _ = evaluate(ROWS["standardized"].bound, student, teacher)
    moved, _ = evaluate(ROWS["standardized"].bound, 3 * student + 2, 0.5 * teacher - 1)
    np.testing.assert_allclose(moved, value, rtol=1e-5)
    same, _ = evaluate(ROWS["standardized"].bound, 2 * teacher, teacher)
    np.testing.assert_allclose(same, np.zeros(B), atol=1e-6)


@pytest.mark.parametrize("mask", [np.finfo(np.float32).min, -3.3895314e38, -1e30, -1e20])
def test_standardized_with_a_large_number_as_a_mask(mask):
    """Its square is no float32; the truth is that of the same logits in float64."""
    logits = draw(seed=3)
    for side in (0, 1):
        logits[side][:, 2:4] = np.float32(mask)
    function = make(divergences.standardized, divergence=forward_kl)
    value, *slopes = jax.device_get(evaluate(function, *logits))
    with jax.enable_x64(True):
        exact = jax.device_get(evaluate(wide(function), *(x.astype(np.float64) for x in logits)))
    p, q = (softmax(z_scores(x.astype(np.float64))) for x in logits[::-1])
    np.testing.assert_allclose(exact[0], kl(p, q), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(value, exact[0], rtol=1e-5, atol=1e-6)
    for slope, true in zip(jax.tree.leaves(slopes), jax.tree.leaves(exact[1:]), strict=True):
        assert np.isfinite(slope).all()
        np.testing.assert_allclose(slope, true, rtol=1e-4, atol=1e-20)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e3])
def test_standardized_rows_of_equal_logits_are_uniform(level):
    _, teacher = draw()
    flat = np.full((B, K), level, np.float32)
    value, slopes = evaluate(ROWS["standardized"].bound, flat, teacher)
    scores = z_scores(teacher.astype(np.float64))
    np.testing.assert_allclose(value, kl(softmax(scores), np.full((B, K), 1 / K)), rtol=1e-5)
    true = 1e7 * (1 / K - softmax(scores))  # q - p, by which 1e-7 alone divides
    np.testing.assert_allclose(slopes[1], true, rtol=1e-3, atol=1e2)


def test_powered_is_a_teacher_at_another_temperature():
    student, teacher = draw()
    value, _ = evaluate(ROWS["powered"].bound, student, teacher)
    scaled, _ = evaluate(bind(forward_kl), student, np.float32(0.4) * teacher)
    np.testing.assert_allclose(value, scaled, rtol=1e-6)
    uniform, _ = evaluate(bind(ROWS["powered"].bound, teacher_power=0.0), student, teacher)
    np.testing.assert_allclose(uniform, kl(np.full((B, K), 1 / K), softmax(student)), rtol=1e-5)


@pytest.mark.parametrize("outside", [True, False], ids=["T outside", "T inside"])
def test_bkd_is_a_shift_of_the_teachers_logits(outside):
    """p' = w p / sum w p with p at T, as published; w = (1 - b) / (1 - b^n) rescaled to sum K."""
    student, teacher = draw(dtype=np.float64)
    counts = np.array([5000, 2000, 800, 300, 100, 40, 10])
    weights = (1 - 0.9999) / (1 - 0.9999**counts)
    weights = weights / weights.sum() * K
    p = weights * softmax(teacher / 2)
    true = 4 * kl(p / p.sum(-1, keepdims=True), softmax(student / 2))
    with jax.enable_x64(True):
        make_prior = functools.partial(bind, divergences.prior_shifted)
        make_tempered = functools.partial(bind, divergences.tempered, temperature=2.0)
        if outside:
            inner = make_prior(divergence=forward_kl, log_prior=np.log(weights))
            bound = make_tempered(divergence=inner)
        else:
            inner = make_tempered(divergence=forward_kl)
            bound = make_prior(divergence=inner, log_prior=2 * np.log(weights))
        np.testing.assert_allclose(bound(student, teacher), true, rtol=1e-11)


def test_a_tail_bucket_never_exceeds_the_whole_and_grows_with_k():
    with jax.enable_x64(True):
        args = draw(dtype=np.float64)
        values = [
            np.asarray(bind(divergences.top_k, divergence=forward_kl, k=k)(*args))
            for k in range(1, K + 3)
        ]
        whole = np.asarray(forward_kl(*args))
    for lower, higher in itertools.pairwise(values):
        assert np.all(lower <= higher + 1e-12)
    assert np.all(values[0] < whole)
    np.testing.assert_allclose(values[K - 2], whole, rtol=1e-12)  # one class in the tail
    for value in values[K - 1 :]:
        np.testing.assert_array_equal(value, whole)


@pytest.mark.parametrize("name", ["top_k", "top_k_renormalised", "top_k_dropped"])
def test_k_of_all_classes_is_the_divergence_itself(name):
    args = draw()
    for k in (K, K + 1):
        bound = bind(getattr(divergences, name), divergence=total_variation, k=k)
        np.testing.assert_array_equal(bound(*args), total_variation(*args))


def test_of_equal_logits_the_first_are_taken():
    teacher = np.array([0.0, 1, 1, 1, 0], np.float32)
    student = np.array([0.3, 0.1, 0.9, -2, 0.4], np.float32)
    bound = bind(divergences.top_k_renormalised, divergence=forward_kl, k=2)
    true = kl(np.array([0.5, 0.5]), softmax(student[[1, 2]]))
    np.testing.assert_allclose(bound(student, teacher), true, rtol=1e-5)


@pytest.mark.parametrize("classes", [256, 257])
@pytest.mark.parametrize("name", ["top_k", "top_k_dropped"])
def test_the_heads_of_many_classes_with_ties(name, classes):
    """Around the number from which on `top_k_dropped` takes another way to its head."""
    rng = np.random.default_rng(0)
    student = rng.normal(size=(8, classes)).astype(np.float32)
    teacher = rng.integers(-3, 4, (8, classes)).astype(np.float32)  # some 36 of each logit
    value = bind(getattr(divergences, name), divergence=forward_kl, k=50)(student, teacher)
    p, q = softmax(teacher.astype(float)), softmax(student.astype(float))
    head = np.argsort(np.argsort(-teacher, axis=-1, kind="stable"), axis=-1) < 50
    kept = np.where(head, p, 0)
    if name == "top_k":
        tails = [np.where(head, 0, x).sum(-1) for x in (p, q)]
        true = kl(kept, np.where(head, q, 1)) + kl(*(x[:, None] for x in tails))
    else:
        true = kl(kept / kept.sum(-1, keepdims=True), q)
    np.testing.assert_allclose(value, true, rtol=1e-5)


def test_a_removed_class_does_not_stand_before_one_that_only_the_teacher_lacks():
    """k = 3 of four present classes, two of which the teacher gives nothing."""
    teacher = np.array([-INF, 1, 0, -INF, -INF], np.float32)
    student = np.array([-INF, 1, 0.5, 0.2, -1], np.float32)
    for name in ("top_k", "top_k_renormalised", "top_k_dropped"):
        bound = bind(getattr(divergences, name), divergence=AB, k=3)
        np.testing.assert_allclose(
            bound(student, teacher), bound(student[1:], teacher[1:]), rtol=1e-6
        )


def test_the_tail_has_its_digits_however_small_it_is():
    """Its log mass is -60: 1 less the sum of the others would be 0, and the value with it."""
    teacher = np.array([60.0, 59, 0, -1, -1], np.float32)
    student = np.array([59.0, 60, 0, 3, 1], np.float32)
    bound = bind(divergences.top_k, divergence=bind(alpha_beta, alpha=0.0, beta=0.0), k=2)
    logs = []
    for logits in (student.astype(np.float64), teacher.astype(np.float64)):
        log_p = scipy.special.log_softmax(logits)
        logs.append(np.append(log_p[:2], scipy.special.logsumexp(log_p[2:])))
    np.testing.assert_allclose(
        bound(student, teacher), np.sum((logs[0] - logs[1]) ** 2) / 2, rtol=1e-5
    )


def test_dropping_the_tail_costs_its_mass_and_renormalising_nothing():
    _, teacher = draw()
    mass = np.sort(softmax(teacher.astype(np.float64)), axis=-1)[:, -3:].sum(-1)
    value, _ = evaluate(ROWS["top_k_dropped"].bound, teacher, teacher)
    np.testing.assert_allclose(value, -np.log(mass), rtol=1e-5)
    rank = np.argsort(np.argsort(-teacher))
    tail_moved = np.where(rank < 3, teacher, teacher + 2)
    value, _ = evaluate(ROWS["top_k_renormalised"].bound, tail_moved, teacher)
    np.testing.assert_array_equal(value, np.zeros(B))


@pytest.mark.parametrize("name", ["top_k", "top_k_renormalised", "top_k_dropped"])
def test_of_two_zeros_the_sign_is_no_order_and_a_nan_is_not_cut_away(name):
    student = np.array([0.3, 0.1, 0.9, -2, 0.4], np.float32)
    bound = bind(getattr(divergences, name), divergence=forward_kl, k=2)
    teacher = np.array([-0.0, 0, 0, -1, -1], np.float32)
    np.testing.assert_array_equal(bound(student, teacher), bound(student, teacher + 0))
    for nan in (np.nan, -np.nan):
        assert np.isnan(bound(student, np.array([0, 1, nan, 3, 4], np.float32)))
        assert np.isnan(bound(student, np.full(5, nan, np.float32)))


@pytest.mark.parametrize("power", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_nan(temperature, power):
    numbers = dict(divergence=forward_kl, temperature=temperature, temperature_power=power)
    assert np.isnan(divergences.tempered(*draw(), **numbers)).all()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "top_k_renormalised", "top_k_dropped"])
def test_k_less_than_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}\.k must be at least 1; found 0\.$"):
        bind(getattr(divergences, name), divergence=forward_kl, k=0)(*draw())
    with pytest.raises(TypeError, match="must be of type int"):
        bind(getattr(divergences, name), divergence=forward_kl, k=2.0)


def test_one_prior_for_all_classes_changes_nothing():
    student, teacher = (np.random.default_rng(i).normal(size=(4, K)) for i in range(2))
    bound = bind(divergences.prior_shifted, divergence=forward_kl, log_prior=1.5)
    expected = forward_kl(student, teacher)
    np.testing.assert_allclose(bound(student, teacher), expected, rtol=1e-5)


def test_a_prior_of_another_length_is_refused():
    bound = bind(divergences.prior_shifted, divergence=forward_kl, log_prior=np.zeros(K - 1))
    with pytest.raises(
        ValueError,
        match=r"log_prior must be an array \[7\], one entry per class; found float32\[6\]",
    ):
        bound(*draw())


@every_row
def test_logits_that_do_not_fit_are_refused(row):
    student, teacher = draw()
    with pytest.raises(AssertionError, match="same number of classes"):
        row.bound(student, teacher[:, 1:])
    with pytest.raises(AssertionError, match="floating-point"):
        row.bound(student.astype(int), teacher)
