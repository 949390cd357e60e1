"""dist (DIST), gram (MLKD) and rank_correlation (CMKD-style) against scipy, scikit-learn and torch.

Truths in numpy are written row by row and column by column, with the classes and rows that are not
there left out, as no masked array operation would.
"""

import functools

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_contract import check_contract, draw
from sklearn.isotonic import IsotonicRegression

from abkd_jax.binding import bind
from abkd_jax.losses import dist, gram, rank_correlation, total
from abkd_jax.types import Head, Outputs, Term

N, K = 9, 5
INF, NAN = np.inf, np.nan
EPSILON = 1e-8  # DIST's
COUPLED = pytest.mark.parametrize("loss", [dist, gram])
EVERY = pytest.mark.parametrize("loss", [dist, gram, rank_correlation])


def make(size=N, num_classes=K, scale=2.0, seed=0):
    """Logits of both in float64, nothing masked."""
    return scale * np.random.default_rng(seed).normal(size=(2, size, num_classes))


@jax.jit
def values(bound, student, teacher, where=None):
    where = jnp.ones(student.shape[:-1], bool) if where is None else where
    return bound(Outputs(logits=student), Outputs(logits=teacher), {"where": where})


@jax.jit
def mean_and_slopes(bound, student, teacher, where=None):
    mean = lambda *args: jnp.mean(values(bound, *args, where))  # noqa: E731
    return jax.value_and_grad(mean, argnums=(0, 1))(student, teacher)


def softmax(logits, temperature=1.0):
    return scipy.special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)


def assert_near(found, true, rtol):
    """Relative to the largest entry."""
    true = np.asarray(true)
    np.testing.assert_allclose(found, true, rtol=0, atol=rtol * np.abs(true).max())


# --- dist ---------------------------------------------------------------------------------------


def pearson(x, y, epsilon=EPSILON):
    x, y = x - x.mean(), y - y.mean()
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + epsilon)


def numpy_dist(row_weight, column_weight, temperature):
    def truth(student, teacher, batch):
        where = np.asarray(batch["where"])
        q, p = (softmax(o.logits, temperature) for o in (student, teacher))
        present = where[:, None] & ~(np.isneginf(student.logits) & np.isneginf(teacher.logits))
        columns = [1 - pearson(q[m, k], p[m, k]) for k, m in enumerate(present.T) if m.any()]
        rows = [1 - pearson(q[i, m], p[i, m]) if m.any() else 0.0 for i, m in enumerate(present)]
        return temperature**2 * (row_weight * np.array(rows) + column_weight * np.mean(columns))

    return truth


def torch_dist(torch, student, teacher, row_weight, column_weight, temperature):
    """The published code's formula, in the test's own words."""

    def uncorrelated(q, p, axis):
        q, p = q - q.mean(axis, keepdim=True), p - p.mean(axis, keepdim=True)
        norms = q.norm(dim=axis) * p.norm(dim=axis)
        return 1 - ((q * p).sum(axis) / (norms + 1e-8)).mean()

    q, p = (torch.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    both = row_weight * uncorrelated(q, p, 1) + column_weight * uncorrelated(q, p, 0)
    return temperature**2 * both


def torch_gram(torch, student, teacher, batch_weight, class_weight, temperature):
    q, p = (torch.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    (size, num_classes) = q.shape
    examples = ((p @ p.T - q @ q.T) ** 2).sum() / size
    classes = ((p.T @ p - q.T @ q) ** 2).sum() / num_classes
    return batch_weight * examples + class_weight * classes


PUBLISHED = pytest.mark.parametrize(
    "loss,published,names",
    [
        pytest.param(dist, torch_dist, ("row_weight", "column_weight", "temperature"), id="dist"),
        pytest.param(gram, torch_gram, ("batch_weight", "class_weight", "temperature"), id="gram"),
    ],
)


@PUBLISHED
@pytest.mark.parametrize("numbers", [(1.0, 1.0, 1.0), (0.5, 0.0, 4.0), (0.0, 2.0, 0.5)])
def test_the_mean_and_its_gradient_against_torch(loss, published, names, numbers):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    arrays = make()
    s, t = (torch.tensor(x, requires_grad=True) for x in arrays)
    expected = published(torch, s, t, *numbers)
    expected.backward()
    bound = bind(loss, **dict(zip(names, numbers, strict=True)))
    with jax.enable_x64(True):
        found = mean_and_slopes(bound, *arrays)
    single = mean_and_slopes(bound, *arrays.astype(np.float32))
    for (mean, slopes), dtype, rtol in ((found, np.float64, 1e-10), (single, np.float32, 2e-5)):
        assert mean.dtype == dtype
        np.testing.assert_allclose(mean, expected.item(), rtol=rtol)
        for slope, exact in zip(slopes, (s.grad, t.grad), strict=True):
            assert_near(slope, exact, rtol)


def test_dist_contract():
    bound = bind(dist, row_weight=0.7, column_weight=1.3, temperature=2.0)
    check_contract(bound, couples=True, truth=numpy_dist(0.7, 1.3, 2.0))


def test_dist_against_scipy():
    """With probabilities of the order of 1 the 1e-8 does not show in float32."""
    student, teacher = make()
    q, p = softmax(student), softmax(teacher)
    rows = [1 - scipy.stats.pearsonr(*pair).statistic for pair in zip(q, p, strict=True)]
    columns = [1 - scipy.stats.pearsonr(*pair).statistic for pair in zip(q.T, p.T, strict=True)]
    arrays = np.float32([student, teacher])
    np.testing.assert_allclose(values(bind(dist, column_weight=0.0), *arrays), rows, rtol=1e-5)
    shared = values(bind(dist, row_weight=0.0), *arrays)
    np.testing.assert_allclose(shared, np.full(N, np.mean(columns)), rtol=1e-5)


@pytest.mark.parametrize("share", [0.9, 0.2])
def test_dist_is_blind_to_an_affine_map_of_the_probabilities(share):
    """Mixing the teacher with the uniform distribution keeps all correlations of rows and columns;
    their opposite has the largest value.
    """
    _, teacher = make()
    mixed = np.log(share * softmax(teacher) + (1 - share) / K)
    with jax.enable_x64(True):
        np.testing.assert_allclose(values(bind(dist), mixed, teacher), 0, atol=1e-5)
        opposite = np.log((1 - softmax(teacher)) / (K - 1))
        np.testing.assert_allclose(values(bind(dist), opposite, teacher), 4, atol=1e-5)


def test_a_class_that_is_rare_everywhere_counts_as_uncorrelated_as_published():
    student, teacher = make()
    student[:, 0] -= 25
    teacher[:, 0] -= 25
    q, p = softmax(student)[:, 0], softmax(teacher)[:, 0]
    assert pearson(q, p) < 1e-6 < abs(pearson(q, p, 0.0))
    truth = numpy_dist(1.0, 1.0, 1.0)
    outputs = Outputs(logits=student), Outputs(logits=teacher)
    expected = truth(*outputs, {"where": np.ones(N, bool)})
    np.testing.assert_allclose(
        values(bind(dist), *np.float32([student, teacher])), expected, rtol=1e-5
    )


def test_dist_of_one_valid_row():
    """Its columns are constant: they add 1, and no gradient."""
    student, teacher = np.float32(make())
    where = np.arange(N) == 4
    found = values(bind(dist), student, teacher, where)[4]
    rho = scipy.stats.pearsonr(softmax(student[4]), softmax(teacher[4])).statistic
    np.testing.assert_allclose(found, 2 - rho, rtol=1e-5)
    _, both = mean_and_slopes(bind(dist), student[4:5], teacher[4:5])
    _, rows = mean_and_slopes(bind(dist, column_weight=0.0), student[4:5], teacher[4:5])
    jax.tree.map(np.testing.assert_array_equal, both, rows)
    assert np.any(both[0] != 0)


@pytest.mark.parametrize("level", [0.0, 3.3, -1e4])
@pytest.mark.parametrize("num_classes", [3, 100])
def test_a_student_whose_rows_are_constant(level, num_classes):
    """As one whose last layer starts at 0: no rounding of the mean may pass for a row."""
    _, teacher = np.float32(make(num_classes=num_classes))
    student = np.full_like(teacher, level)
    mean, slopes = mean_and_slopes(bind(dist), student, teacher)
    np.testing.assert_allclose(mean, 2, rtol=1e-6)
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0), slopes)
    mean, slopes = mean_and_slopes(bind(rank_correlation), student, teacher)
    np.testing.assert_allclose(mean, 2, rtol=1e-6)
    jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0), slopes)
    mean, slopes = mean_and_slopes(bind(gram), student, teacher)
    assert np.isfinite(mean) and np.isfinite(slopes[0]).all()


def test_one_constant_row_and_one_constant_column():
    student, teacher = np.float32(make())
    student[3] = 0
    student[:, 2] = np.log(np.exp(student[:, [0, 1, 3, 4]]).sum(1) / 4)
    np.testing.assert_allclose(softmax(student)[:, 2], 0.2, rtol=1e-6)
    mean, slopes = mean_and_slopes(bind(dist), student, teacher)
    assert np.isfinite(mean)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_classes_removed_in_some_rows():
    student, teacher = np.float32(make())
    for i, k in ((0, 1), (0, 2), (3, 1), (5, 4)):
        student[i, k] = teacher[i, k] = -INF
    student[7, 0] = teacher[8, 3] = -INF  # on one side: probability 0
    outputs = Outputs(logits=student), Outputs(logits=teacher)
    expected = numpy_dist(1.0, 1.0, 1.0)(*outputs, {"where": np.ones(N, bool)})
    np.testing.assert_allclose(values(bind(dist), student, teacher), expected, rtol=1e-5)
    for loss in (dist, gram, rank_correlation):
        _, slopes = mean_and_slopes(bind(loss), student, teacher)
        for slope, logits in zip(slopes, (student, teacher), strict=True):
            assert np.isfinite(slope).all()
            np.testing.assert_array_equal(np.asarray(slope)[np.isneginf(logits)], 0)


# --- gram ---------------------------------------------------------------------------------------


def numpy_gram(batch_weight, class_weight, temperature):
    def truth(student, teacher, batch):
        kept = np.flatnonzero(batch["where"])
        q, p = (softmax(o.logits, temperature)[kept] for o in (student, teacher))
        found = np.full(len(batch["where"]), NAN)
        classes = np.linalg.norm(p.T @ p - q.T @ q, "fro") ** 2 / q.shape[1]
        for i, row in enumerate(kept):
            examples = sum((p[i] @ p[j] - q[i] @ q[j]) ** 2 for j in range(len(kept)))
            found[row] = batch_weight * examples + class_weight * classes
        return found

    return truth


@pytest.mark.slow
def test_gram_contract():
    bound = bind(gram, batch_weight=0.7, class_weight=1.3, temperature=2.0)
    check_contract(bound, couples=True, truth=numpy_gram(0.7, 1.3, 2.0))


def test_gram_by_hand():
    """Certain of one class each, P = 1; a student certain of class 0 throughout has ones in Q Q'
    where P P' has zeros, and Q'Q = diag(2, 0).
    """
    teacher = np.float32([[1e4, 0], [0, 1e4]])
    student = np.float32([[1e4, 0], [1e4, 0]])
    of_batch = values(bind(gram, class_weight=0.0), student, teacher)
    np.testing.assert_allclose(of_batch, [1, 1])
    of_classes = values(bind(gram, batch_weight=0.0), student, teacher)
    np.testing.assert_allclose(of_classes, [(1 + 1) / 2] * 2)


def test_gram_is_zero_for_identical_logits_and_blind_to_an_order_of_either_axis():
    student, _ = np.float32(make())
    np.testing.assert_allclose(values(bind(gram), student, student + 1), 0, atol=1e-12)
    np.testing.assert_array_equal(values(bind(gram), student, student), 0)
    classes = np.roll(np.arange(K), 1)
    only_batch, only_classes = bind(gram, class_weight=0.0), bind(gram, batch_weight=0.0)
    np.testing.assert_allclose(values(only_batch, student[:, classes], student), 0, atol=1e-12)
    np.testing.assert_allclose(values(only_classes, student[::-1], student), 0, atol=1e-12)
    assert np.all(values(only_batch, student[::-1], student) > 1e-4)
    assert np.all(values(only_classes, student[:, classes], student) > 1e-4)


# --- rank_correlation ---------------------------------------------------------------------------


def soft_ranks(row, regularization):
    """Blondel et al., proposition 3, with scikit-learn's isotonic regression."""
    size = len(row)
    spread = row.std() or 1.0
    falling = np.sqrt((size**2 - 1) / 12) * (row - row.mean()) / spread / regularization
    order = np.argsort(-falling, kind="stable")
    falling = falling[order]
    rest = falling - np.arange(size, 0, -1)
    fit = IsotonicRegression(increasing=False).fit_transform(np.arange(size), rest)
    ranks = np.empty(size)
    ranks[order] = falling - fit
    return ranks


def numpy_rank_correlation(pearson_weight, spearman_weight, regularization):
    def truth(student, teacher, batch):
        del batch
        found = []
        for s, t in zip(student.logits, teacher.logits, strict=True):
            kept = ~(np.isneginf(s) & np.isneginf(t))
            s, t = (np.float64(x[kept]) for x in (s, t))
            ranks = (soft_ranks(x, regularization) for x in (s, t))
            found.append(
                pearson_weight * (1 - pearson(s, t, 0.0))
                + spearman_weight * (1 - pearson(*ranks, 0.0))
            )
        return np.array(found)

    return truth


@pytest.mark.slow
def test_rank_correlation_contract():
    bound = bind(rank_correlation, pearson_weight=0.7, spearman_weight=1.3, regularization=0.3)
    check_contract(bound, truth=numpy_rank_correlation(0.7, 1.3, 0.3))


def test_the_defaults_of_rank_correlation():
    arrays = make()
    expected = numpy_rank_correlation(1.0, 1.0, 1.0)(*(Outputs(logits=x) for x in arrays), {})
    found = values(bind(rank_correlation), *np.float32(arrays))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 20, 1000])
@pytest.mark.parametrize("regularization", [0.03, 0.3, 1.0, 3.0])
def test_soft_ranks_against_isotonic_regression(num_classes, regularization):
    arrays = make(4, num_classes)
    truth = numpy_rank_correlation(0.0, 1.0, regularization)
    expected = truth(*(Outputs(logits=x) for x in arrays), {})
    bound = bind(rank_correlation, pearson_weight=0.0, regularization=regularization)
    found = values(bound, *arrays.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-6)
    with jax.enable_x64(True):
        bound = bind(rank_correlation, pearson_weight=0.0, regularization=regularization)
        np.testing.assert_allclose(values(bound, *arrays), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_classes", [2, 30])
def test_small_regularization_is_spearman_and_large_is_pearson(num_classes):
    student, teacher = make(6, num_classes)
    exact = {
        1e-6: [scipy.stats.spearmanr(*p).statistic for p in zip(student, teacher, strict=True)],
        1e6: [scipy.stats.pearsonr(*p).statistic for p in zip(student, teacher, strict=True)],
    }
    for regularization, rho in exact.items():
        bound = bind(rank_correlation, pearson_weight=0.0, regularization=regularization)
        with jax.enable_x64(True):
            (_, slopes), found = (f(bound, student, teacher) for f in (mean_and_slopes, values))
        np.testing.assert_allclose(found, 1 - np.array(rho), rtol=1e-6, atol=1e-9)
        if num_classes > 2:
            assert np.all(np.asarray(slopes[0]) == 0) == (regularization < 1)
    bound = bind(rank_correlation, spearman_weight=0.0)
    found = values(bound, *np.float32([student, teacher]))
    np.testing.assert_allclose(found, 1 - np.array(exact[1e6]), rtol=1e-5, atol=1e-6)


def test_the_first_is_blind_to_affine_maps_and_ranks_to_all_rising_ones():
    _, teacher = np.float32(make(num_classes=20))
    for student in (teacher, 3 * teacher - 7, teacher / 100):
        np.testing.assert_allclose(values(bind(rank_correlation), student, teacher), 0, atol=1e-6)
    np.testing.assert_allclose(values(bind(rank_correlation), -teacher, teacher), 4, atol=1e-6)
    sharp = bind(rank_correlation, pearson_weight=0.0, regularization=1e-4)
    np.testing.assert_allclose(values(sharp, np.exp(teacher), teacher), 0, atol=1e-6)
    linear = values(bind(rank_correlation, spearman_weight=0.0), np.exp(teacher), teacher)
    assert np.all(linear > 0.1)


def test_ties_share_their_rank_and_their_gradient():
    student = np.float32([[0, 1, 1, 2, 5, 5, 5]])
    teacher = np.float32([[3, 1, 2, 0, 5, 6, 4]])
    bound = bind(rank_correlation, pearson_weight=0.0, regularization=1e-3)
    rho = scipy.stats.spearmanr(student[0], teacher[0]).statistic
    np.testing.assert_allclose(values(bound, student, teacher), [1 - rho], rtol=1e-5)
    soft = bind(rank_correlation, pearson_weight=0.0, regularization=1.0)
    found, slopes = mean_and_slopes(soft, student, teacher)
    order = [0, 2, 1, 3, 6, 4, 5]
    moved, moved_slopes = mean_and_slopes(soft, student[:, order], teacher[:, order])
    np.testing.assert_allclose(found, moved, rtol=1e-5)
    np.testing.assert_allclose(slopes[0][:, order], moved_slopes[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_minus_infinity_on_one_side_is_the_limit(side):
    far, gone = np.float32(make()), np.float32(make())
    far[side, :, 2], gone[side, :, 2] = -1e7, -INF
    found, slopes = mean_and_slopes(bind(rank_correlation), *gone)
    expected, _ = mean_and_slopes(bind(rank_correlation), *far)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(slopes[side][:, 2], 0)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_rank_correlation_reads_no_batch_and_does_not_couple_it():
    student, teacher = np.float32(make())
    found = bind(rank_correlation)(Outputs(logits=student), Outputs(logits=teacher), {})
    np.testing.assert_allclose(
        found[3:5], values(bind(rank_correlation), student[3:5], teacher[3:5]), rtol=1e-5
    )


def test_memory_grows_with_the_classes_not_with_their_square():
    def peak(num_classes):
        logits = np.zeros((16, num_classes), np.float32)
        compiled = mean_and_slopes.lower(bind(rank_correlation), logits, logits).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(1024) < 6 * peak(256)


@pytest.mark.long
def test_a_tpu_sorts_where_others_gather(monkeypatch):
    arrays = np.float32(make(5, 17))
    _, expected = mean_and_slopes(bind(rank_correlation), *arrays)
    lower = jax.export.export(mean_and_slopes, platforms=["tpu"])
    text = lower(bind(rank_correlation), *arrays).mlir_module()
    found = {name for name in ("sort", "gather", "scatter", "dot") if f"stablehlo.{name}" in text}
    assert found == {"sort"}
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, tpu, default: tpu(x))
    _, slopes = mean_and_slopes(bind(rank_correlation), *arrays[:, :4])  # traced anew
    expected = 5 / 4 * np.stack(expected)[:, :4]
    np.testing.assert_allclose(np.stack(slopes), expected, rtol=1e-5, atol=1e-7)


# --- all ----------------------------------------------------------------------------------------


@COUPLED
def test_the_mean_under_total_is_over_valid_rows(loss):
    student, teacher, batch = draw()
    term = Term(loss=bind(loss), weight=jnp.asarray(0.5), other="teacher")
    truth = {dist: numpy_dist(1.0, 1.0, 1.0), gram: numpy_gram(1.0, 1.0, 4.0)}[loss]
    expected = truth(student, teacher, batch)[batch["where"]].mean()
    found, means = total({"it": term}, student, {"teacher": teacher}, batch)
    np.testing.assert_allclose([means["it"], found], [expected, 0.5 * expected], rtol=2e-5)
    unformed = Outputs(hidden=student.logits, head=Head(np.eye(student.logits.shape[-1])))
    with pytest.raises(ValueError, match="couples a batch's rows"):
        total({"it": term}, unformed, {"teacher": teacher}, batch, chunk=4)


@EVERY
def test_numbers_for_each_example(loss):
    """Each example weighs its own parts, and has its own temperature or regularization."""
    student, teacher = np.float32(make())
    names = list(bind(loss).numbers)
    weights = np.linspace(0.5, 2, N).astype(np.float32)
    first, second, last = names
    if loss is rank_correlation:
        each = bind(loss, **{last: weights})
        for i in (0, 5):
            one = values(bind(loss, **{last: weights[i]}), student, teacher)[i]
            np.testing.assert_allclose(values(each, student, teacher)[i], one, rtol=1e-5)
    else:  # logits divided by hand
        each = values(bind(loss, **{last: weights}), student, teacher)
        factor = np.square(weights) if loss is dist else 1.0
        by_hand = bind(loss, **{last: 1.0})
        expected = factor * values(by_hand, *(x / weights[:, None] for x in (student, teacher)))
        np.testing.assert_allclose(each, expected, rtol=1e-5)
    parts = [values(bind(loss, **{name: 0.0}), student, teacher) for name in (second, first)]
    weighted = bind(loss, **{first: weights, second: 3 * weights[::-1]})
    expected = weights * parts[0] + 3 * weights[::-1] * parts[1]
    np.testing.assert_allclose(values(weighted, student, teacher), expected, rtol=1e-5)
    shaped = jax.tree.map(lambda x: x.reshape(3, 3) if x.ndim else x, weighted)
    found = values(shaped, student.reshape(3, 3, K), teacher.reshape(3, 3, K))
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_far_and_near_logits_are_finite(loss, scale):
    mean, slopes = mean_and_slopes(bind(loss), *np.float32(make(scale=scale)))
    assert np.isfinite(mean) and all(np.isfinite(slope).all() for slope in slopes)


@EVERY
def test_one_class_and_no_class(loss):
    for logits in (np.zeros((N, 1), np.float32), np.full((N, 3), -INF, np.float32)):
        mean, slopes = mean_and_slopes(bind(loss), logits, logits)
        assert np.isfinite(mean)
        jax.tree.map(lambda slope: np.testing.assert_array_equal(slope, 0), slopes)
        if np.isneginf(logits).all():
            assert mean == 0


@EVERY
@pytest.mark.parametrize("number", [0.0, -2.0])
def test_a_number_outside_of_its_domain_gives_nan(loss, number):
    last = list(bind(loss).numbers)[-1]
    numbers = bind(loss).numbers | {last: jnp.float32(number)}  # past `bind`, as a tracer would be
    assert np.isnan(values(bind(loss).replace(numbers=numbers), *np.float32(make()))).all()
    with pytest.raises(
        ValueError, match=rf"^{loss.__name__}\.{last} must be greater than 0 and fin"
    ):
        bind(loss, **{last: number})


@EVERY
def test_what_does_not_fit_is_refused(loss):
    student, teacher = (Outputs(logits=jnp.asarray(x, jnp.float32)) for x in make())
    batch = {"where": jnp.ones(N, bool)}
    with pytest.raises(
        ValueError, match=r"^student_logits must be a floating-point array .*; found None"
    ):
        bind(loss)(Outputs(), teacher, batch)
    with pytest.raises(AssertionError, match="same number of classes"):
        bind(loss)(student, Outputs(logits=teacher.logits[:, 1:]), batch)
    first = next(iter(bind(loss).numbers))
    with pytest.raises(ValueError, match=f"^{first} must be a number, or an array that broadcasts"):
        bind(loss, **{first: jnp.ones(N + 1)})(student, teacher, batch)
    if loss is not rank_correlation:
        with pytest.raises(AssertionError, match=r"where must be bool"):
            bind(loss)(student, teacher, {"where": jnp.ones(N)})


@EVERY
def test_a_batch_spread_over_devices_is_one_batch(loss):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays = np.float32(make(16))
    expected = mean_and_slopes(bind(loss), *arrays)
    spread = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays]
    found = mean_and_slopes(bind(loss), *spread)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found, expected)
