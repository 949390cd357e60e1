"""The log-space arithmetic against mpmath, in float32 and float64, where it is delicate."""

import functools
import itertools
import math

import jax
import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax import numpy as jnp

from abkd_jax import numerics

INF, NAN = np.inf, np.nan
DIGITS = 110
STEP = "1e-20"  # of differences in 110 digits

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def within(dtype, units):
    """So many roundings of the dtype."""
    return units * float(np.finfo(dtype).eps)


def log_probabilities(logits):
    """In mpmath, from floats taken as exact; -inf has probability 0."""
    logits = [mpmath.mpf(float(logit)) for logit in logits]
    top = max(logits)
    total = mpmath.log(mpmath.fsum(mpmath.exp(logit - top) for logit in logits))
    return [logit - top - total for logit in logits]


def relative_errors(found, true):
    """Entry by entry, with the truth in mpmath."""
    pairs = zip(np.ravel(np.asarray(found, np.float64)), np.ravel(true), strict=True)
    return np.array([float(abs((mpmath.mpf(float(x)) - y) / y)) for x, y in pairs])


# psi and the divided difference.

GAPS = [0.0, 1e-30, 1e-9, 1e-4, 0.01, 0.2, 0.4999, 0.5, 0.5001, 0.7, 1.0, 3.0, 20.0, 100.0, 1e4]


@both_dtypes
@pytest.mark.parametrize(("order", "units"), [(0, 8), (1, 32), (2, 256)])
def test_psi(dtype, order, units):
    """(-1)^n int_0^1 t^n e^(-g t) dt is the derivative of order n."""
    gaps = np.array(GAPS, dtype)
    with jax.enable_x64(dtype == np.float64):
        function = numerics.psi
        for _ in range(order):
            function = jax.grad(function)
        found = np.asarray(jax.jit(jax.vmap(function))(gaps))
    assert found.dtype == dtype
    with mpmath.workdps(DIGITS):
        true = []
        for gap in gaps:
            g = mpmath.mpf(float(gap)) or mpmath.mpf(STEP)
            true.append((-1) ** order * mpmath.gammainc(order + 1, 0, g) / g ** (order + 1))
        assert np.max(relative_errors(found, true)) <= within(dtype, units)


@both_dtypes
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exp_series(dtype, order):
    """The remainder of e^-g after `order` terms, over (-g)^order, for either sign of g."""
    gaps = np.array([g for gap in (1e-20, 1e-3, 0.1, 0.3, 0.49) for g in (gap, -gap)], dtype)
    with jax.enable_x64(dtype == np.float64):
        found = numerics.exp_series(jnp.asarray(gaps), order)
        slopes = jax.vmap(jax.grad(functools.partial(numerics.exp_series, order=order)))(gaps)
    assert found.dtype == dtype
    with mpmath.workdps(DIGITS):
        terms = range(40)
        powers = [[(-mpmath.mpf(float(gap))) ** n for n in terms] for gap in gaps]
        true = [mpmath.fsum(row[n] / math.factorial(n + order) for n in terms) for row in powers]
        true_slopes = [
            -mpmath.fsum(row[n] * (n + 1) / math.factorial(n + 1 + order) for n in terms)
            for row in powers
        ]
        assert np.max(relative_errors(found, true)) <= within(dtype, 8)
        assert np.max(relative_errors(slopes, true_slopes)) <= within(dtype, 32)


@both_dtypes
@pytest.mark.parametrize(("order", "units"), [(0, 8), (1, 32), (2, 128)])
def test_log1p_series(dtype, order, units):
    """The derivatives of log(1 + x) / x are those of its power series."""
    xs = np.array([0.0, 1e-30, -1e-30, 1e-9, 1e-3, -1e-3, 0.1, -0.2, 0.49, 0.5, -0.5], dtype)
    with jax.enable_x64(dtype == np.float64):
        function = numerics.log1p_series
        for _ in range(order):
            function = jax.grad(function)
        found = np.asarray(jax.jit(jax.vmap(function))(xs))
    assert found.dtype == dtype
    with mpmath.workdps(DIGITS):
        true = [
            mpmath.fsum(
                (-1) ** n * math.perm(n, order) * mpmath.mpf(float(x)) ** (n - order) / (n + 1)
                for n in range(order, 400)
            )
            for x in xs
        ]
        assert np.max(relative_errors(found, true)) <= within(dtype, units)


def test_log_sum_exp():
    x = np.array([[1.0, -2.0, 0.5], [0.0, -INF, -1e4], [-INF] * 3, [1e15, 0.0, 1e15]], np.float32)
    value, slopes = jax.jit(
        lambda x: (numerics.log_sum_exp(x), jax.grad(lambda y: numerics.log_sum_exp(y).sum())(x))
    )(x)
    kept = [0, 1, 3]
    exact = x.astype(np.float64)[kept]
    np.testing.assert_allclose(value[kept,], scipy.special.logsumexp(exact, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(slopes[kept,], scipy.special.softmax(exact, axis=-1), atol=1e-6)
    assert value[2] == -INF and not slopes[2].any()


def taken(levels, limit, weighted):
    """The mask of one row, class by class."""
    mask, total = np.zeros(len(levels), bool), 0
    for index in np.argsort(-levels.astype(object), kind="stable"):
        total += int(levels[index]) if weighted else 1
        if total > limit:
            break
        mask[index] = True
    return mask


@pytest.mark.parametrize("weighted", [False, True], ids=["counted", "weighted"])
def test_falling_prefix(weighted):
    """Against a loop: few levels and so many ties, many levels, and both in one batch."""
    rng = np.random.default_rng(0)
    prefix = jax.jit(functools.partial(numerics.falling_prefix, weighted=weighted))
    lowest = 0 if weighted else -(2**31)
    for highest, classes in ((2**31 // 40, 33), (2**31 // 40, 1)):
        levels = rng.integers(max(lowest, -(2**31)), highest, (40, classes))
        levels[:10] = rng.integers(max(lowest, -1), 3, (10, classes))
        levels = levels.astype(np.int32)
        every = levels.astype(np.int64).sum(-1) if weighted else np.full(40, classes)
        limits = (every * rng.choice([-0.01, 0, 0.2, 0.5, 0.9, 1, 2], 40)).astype(np.int32)
        limits[-1] = -(2**31)
        true = [taken(*row, weighted) for row in zip(levels, limits, strict=True)]
        np.testing.assert_array_equal(prefix(levels, limits[:, None]), true)
        alone = [prefix(*row) for row in zip(levels[:3], limits[:3, None], strict=True)]
        np.testing.assert_array_equal(alone, true[:3])
        np.testing.assert_array_equal(jax.vmap(prefix)(levels, limits[:, None]), true)
    with jax.enable_x64(True):
        levels = rng.integers(0 if weighted else -(2**62), 2**62 // 33, (40, 33))
        limits = rng.integers(0, 2**61 if weighted else 33, (40, 1))
        true = [taken(*row, weighted) for row in zip(levels, limits[:, 0], strict=True)]
        np.testing.assert_array_equal(prefix(levels, limits), true)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ordered_bits(dtype):
    info = np.finfo(dtype)
    x = [-INF, info.min, -1.5, -1.0, -info.tiny, 0.0, info.tiny, 1.0, 1.0 + info.eps, info.max, INF]
    with jax.enable_x64(True):
        bits = np.asarray(numerics.ordered_bits(jnp.array(x, dtype)))
        assert bits.dtype.itemsize == np.dtype(dtype).itemsize
        assert np.all(bits[1:] > bits[:-1])


NODES = [0.0, 1e-12, 1e-3, 0.3, 0.5, 0.8, 4.0, 60.0]
NODE_PAIRS = list(itertools.product(sorted({*NODES, *(-node for node in NODES)}), repeat=2))


def second_difference(a, b):
    """exp[0, a, b] by its definition, for nodes that differ."""
    if a == b or 0 in (a, b):
        raise ValueError("coincident nodes")
    first = (mpmath.exp(a) - 1) / a, (mpmath.exp(b) - 1) / b
    return (first[1] - first[0]) / (b - a)


def scaled_second_difference(scale, a, b):
    """The function under test with its factor e^z put in, less e^scale for the range."""
    z, r = numerics.exp_second_difference(a, b)
    return r * jnp.exp(z - scale)


@both_dtypes
@pytest.mark.parametrize("order", [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1)], ids=str)
def test_exp_second_difference(dtype, order):
    """The value and its derivatives, also where two or all three nodes coincide."""
    a, b = np.array(NODE_PAIRS, dtype).T
    scale = np.maximum(np.maximum(a, b), 0)
    function = scaled_second_difference
    for argument, times in enumerate(order, 1):
        for _ in range(times):
            function = jax.grad(function, argnums=argument)
    with jax.enable_x64(dtype == np.float64):
        found = np.asarray(jax.jit(jax.vmap(function))(scale, a, b))
    assert found.dtype == dtype
    with mpmath.workdps(DIGITS):
        h = mpmath.mpf(STEP)
        true = [
            mpmath.exp(-float(scale_i)) * derivative(float(a_i), float(b_i), order, h)
            for scale_i, a_i, b_i in zip(scale, a, b, strict=True)
        ]
        errors = relative_errors(found, true)
    worst = np.argmax(errors)
    units = (16, 64, 512)[sum(order)]
    assert errors[worst] <= within(dtype, units), (a[worst], b[worst])


def derivative(a, b, order, h):
    """By central differences about the nodes, set apart by a little if they coincide."""
    a, b = mpmath.mpf(a) + h / 3, mpmath.mpf(b) - h / 5
    weights = {0: {0: 1}, 1: {1: 0.5, -1: -0.5}, 2: {1: 1, 0: -2, -1: 1}}
    total = mpmath.fsum(
        weight_a * weight_b * second_difference(a + i * h, b + j * h)
        for i, weight_a in weights[order[0]].items()
        for j, weight_b in weights[order[1]].items()
    )
    return total / h ** sum(order)


def test_with_slopes():
    """The value is what it is, its derivatives are those of the slopes, in both modes."""

    def function(x, y):  # of a value that autodiff cannot see through, as x^2 y
        value = jax.lax.stop_gradient(x**2 * y)
        return numerics.with_slopes(value, (x, y), (2 * x * y, x**2))

    x, y = np.float32(3), np.float32(0.5)
    assert function(x, y) == 4.5
    for mode in (jax.jacrev, jax.jacfwd):
        np.testing.assert_allclose(mode(function, argnums=(0, 1))(x, y), (3.0, 9.0))
        np.testing.assert_allclose(mode(function)(x, y), 3.0)  # y at rest
        hessian = mode(mode(function, argnums=(0, 1)), argnums=(0, 1))(x, y)
        np.testing.assert_allclose(hessian, [[1.0, 6.0], [6.0, 0.0]])
        squared = mode(mode(lambda x, y: function(x, y) ** 2, argnums=0))(x, y)
        np.testing.assert_allclose(squared, 12 * x**2 * y**2)


# Log-probabilities.

SATURATED = {
    "two classes": [0.0, -30.0],
    "three classes": [5.0, -35.0, -36.0],
    "large": [1e4, 1e4 - 20.0, 1e4 - 21.0, 0.0],
    "tie at the top": [7.0, 7.0, -20.0],
    "soft": [0.3, -0.2, 1.1],
}


@both_dtypes
@pytest.mark.parametrize("name", SATURATED)
def test_log_softmax_and_its_jacobian_keep_their_digits(dtype, name):
    """Also log p of a class with all the mass, about -1e-13, and the slopes of that size."""
    logits = np.array(SATURATED[name], dtype)
    with jax.enable_x64(dtype == np.float64):
        log_probs = jax.jit(numerics.log_softmax)(logits)
        jacobians = [
            jax.jit(mode(numerics.log_softmax))(logits) for mode in (jax.jacrev, jax.jacfwd)
        ]
    assert log_probs.dtype == dtype
    with mpmath.workdps(DIGITS):
        true = log_probabilities(logits)
        assert np.max(relative_errors(log_probs, true)) <= within(dtype, 8)
        probs = [mpmath.exp(x) for x in true]
        rows = range(len(probs))
        others = [mpmath.fsum(probs[k] for k in rows if k != j) for j in rows]  # 1 - p
        slopes = np.array([[others[j] if j == k else -probs[j] for j in rows] for k in rows])
        entries = np.abs(slopes) > 1e-30  # the others underflow
        # A relative error of p is an absolute error of log p, which is as large as the widest gap.
        bar = within(dtype, 8 + 2 * float(np.max(np.abs(logits - np.max(logits)))))
        for jacobian in jacobians:
            assert np.max(relative_errors(jacobian[entries], slopes[entries])) <= bar


def test_log_softmax_with_removed_classes():
    logits = np.array([[0.5, -INF, -1.0], [-INF, -INF, -INF]], np.float32)
    log_probs = np.asarray(numerics.log_softmax(logits))
    np.testing.assert_allclose(log_probs[0, [0, 2]], scipy.special.log_softmax([0.5, -1.0]), 1e-6)
    assert np.isneginf(log_probs[0, 1])
    assert np.isneginf(log_probs[1]).all()
    slopes = jax.jit(jax.grad(lambda x: numerics.log_softmax(x)[0]))(logits[0])
    assert np.isfinite(slopes).all()
    assert slopes[1] == 0


@both_dtypes
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("num_classes", [2, 10, 300])
def test_log_ratio_near_equality(dtype, distance, num_classes):
    """After a shift that rounds; the truth is that of the rounded logits."""
    rng = np.random.default_rng(num_classes)
    student_logits = (3 * rng.normal(size=num_classes)).astype(dtype)
    teacher_logits = (student_logits + distance * rng.normal(size=num_classes)).astype(dtype)
    teacher_logits = teacher_logits + dtype(7.3)
    with jax.enable_x64(dtype == np.float64):
        found = np.asarray(jax.jit(numerics.log_ratio)(student_logits, teacher_logits))
    assert found.dtype == dtype
    with mpmath.workdps(DIGITS):
        log_p, log_q = log_probabilities(teacher_logits), log_probabilities(student_logits)
        true = np.array([float(x - y) for x, y in zip(log_p, log_q, strict=True)])
    assert np.max(np.abs(true)) > 0
    assert np.max(np.abs(found - true)) <= within(dtype, 16) * np.max(np.abs(true))


def test_log_ratio_with_removed_classes():
    student_logits = np.array([0.0, -INF, 1.0, -INF], np.float32)
    teacher_logits = np.array([0.5, 0.0, -INF, -INF], np.float32)
    u = np.asarray(jax.jit(numerics.log_ratio)(student_logits, teacher_logits))
    p = scipy.special.softmax(teacher_logits.astype(np.float64))
    q = scipy.special.softmax(student_logits.astype(np.float64))
    np.testing.assert_allclose(u[0], np.log(p[0] / q[0]), rtol=1e-6)
    limit = numerics.MAX_LOG_RATIO
    np.testing.assert_array_equal(u[1:], np.array([limit, -limit, 0.0], np.float32))


def test_log_ratio_is_differentiated_by_both_arguments():
    """d(log p_k - log q_k) = dt_k - p . dt - dl_k + q . dl, in both modes."""
    student_logits, teacher_logits = np.random.default_rng(0).normal(size=(2, 4))
    p, q = (scipy.special.softmax(logits) for logits in (teacher_logits, student_logits))
    with jax.enable_x64(True):
        for mode in (jax.jacrev, jax.jacfwd):
            jacobians = jax.jit(mode(numerics.log_ratio, argnums=(0, 1)))
            by_student, by_teacher = jacobians(student_logits, teacher_logits)
            np.testing.assert_allclose(by_student, q - np.eye(4), rtol=0, atol=1e-14)
            np.testing.assert_allclose(by_teacher, np.eye(4) - p, rtol=0, atol=1e-14)


# Means, entropy, temperature, checks.


def test_masked_mean():
    values = np.array([1.0, NAN, 3.0, INF, 8.0], np.float32)
    where = np.array([True, False, True, False, True])
    mean, slopes = jax.value_and_grad(numerics.masked_mean)(values, where)
    assert mean == 4.0
    np.testing.assert_allclose(slopes, where / 3, rtol=1e-6)


def test_masked_mean_of_nothing_is_zero():
    values = np.array([NAN, 2.0], np.float32)
    mean, slopes = jax.value_and_grad(numerics.masked_mean)(values, np.zeros(2, bool))
    assert mean == 0.0
    np.testing.assert_array_equal(slopes, 0.0)


def test_masked_mean_with_a_given_count():
    """A part of a larger batch: the parts' means add up to that of the whole."""
    values = np.arange(6, dtype=np.float32) ** 2
    where = np.array([True, True, False, True, False, True])
    whole = numerics.masked_mean(values, where)
    parts = [
        numerics.masked_mean(values[part], where[part], count=where.sum())
        for part in (slice(0, 2), slice(2, 6))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
    np.testing.assert_allclose(whole, values[where].mean(), rtol=1e-6)


def test_entropy():
    rng = np.random.default_rng(0)
    logits = 4 * rng.normal(size=(5, 6))
    logits[1, [0, 3]] = -INF
    logits[2, 1:] = -INF
    logits[3] = 0.5
    probs = scipy.special.softmax(logits, axis=-1)
    true = scipy.stats.entropy(probs, axis=-1)
    for dtype, rtol in ((np.float32, 1e-5), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):
            value = np.asarray(jax.jit(numerics.entropy)(logits.astype(dtype)))
            summed = jax.jit(jax.grad(lambda x: numerics.entropy(x).sum()))
            slopes = np.asarray(summed(logits.astype(dtype)))
        assert value.dtype == dtype
        np.testing.assert_allclose(value, true, rtol=rtol, atol=rtol)
        log_probs = np.where(probs > 0, np.log(np.where(probs > 0, probs, 1)), 0)
        expected = -probs * (log_probs + true[:, None])
        np.testing.assert_allclose(slopes, expected, rtol=0, atol=rtol)
    assert value[2] == 0.0
    np.testing.assert_allclose(value[3], math.log(6), rtol=1e-12)


def test_divided_logits_has_a_finite_derivative_in_the_temperature():
    logits = np.array([1.0, -INF, -4.0, 0.0], np.float32)
    divided = numerics.divided_logits(logits, 2.0)
    np.testing.assert_array_equal(divided, logits / 2)
    for mode in (jax.jacrev, jax.jacfwd):
        slopes = mode(functools.partial(numerics.divided_logits, logits))(2.0)
        np.testing.assert_allclose(slopes, [-0.25, 0.0, 1.0, 0.0], rtol=1e-6)
        of_logits = mode(lambda x: numerics.divided_logits(x, 2.0))(logits)
        assert np.isfinite(of_logits).all()
        np.testing.assert_array_equal(np.diag(of_logits)[[0, 2, 3]], 0.5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_a_label_that_is_no_class_counts_as_the_first_and_is_marked(dtype):
    given = jnp.asarray([0, 4, 5, 100, 127, -1 if np.issubdtype(dtype, np.signedinteger) else 255])
    labels, known = numerics.known_labels(given.astype(dtype), 5)
    np.testing.assert_array_equal(labels, [0, 4, 0, 0, 0, 0])
    np.testing.assert_array_equal(known, [True, True, False, False, False, False])
    assert labels.dtype == dtype
    _, known = numerics.known_labels(given.astype(dtype), 1000)  # more than 8 bit can say
    np.testing.assert_array_equal(known, given.astype(dtype) >= 0)


def test_norm():
    x = np.random.default_rng(5).normal(size=(3, 4, 2))
    np.testing.assert_allclose(
        numerics.norm(x, (1, 2)), np.linalg.norm(x.reshape(3, 8), axis=1), rtol=1e-6
    )
    assert not np.any(jax.grad(lambda x: numerics.norm(x))(jnp.zeros(3)))
