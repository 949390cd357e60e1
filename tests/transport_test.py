"""sinkhorn (SinKD) against POT, torch's autograd of the published loop, and identities."""

import functools

import jax
import numpy as np
import ot
import pytest
import scipy.spatial.distance
import scipy.special
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_contract import check_contract, draw

from abkd_jax.binding import bind
from abkd_jax.losses import sinkhorn, total
from abkd_jax.types import Head, Outputs, Term

N, K = 9, 5


def make(size=N, scale=2.0, seed=0):
    """Logits of both in float64, nothing masked."""
    return scale * np.random.default_rng(seed).normal(size=(2, size, K))


@jax.jit
def values(bound, student, teacher, where=None):
    where = jnp.ones(student.shape[:-1], bool) if where is None else where
    return bound(Outputs(logits=student), Outputs(logits=teacher), {"where": where})


@jax.jit
def value_and_slopes(bound, student, teacher, where=None):
    summed = lambda *args: jnp.sum(values(bound, *args, where))  # noqa: E731
    return jax.value_and_grad(summed, argnums=(0, 1))(student, teacher)


def distances(student, teacher, temperature):
    q, p = (scipy.special.softmax(logits / temperature, axis=-1) for logits in (student, teacher))
    return scipy.spatial.distance.cdist(q, p, "cityblock")


def numpy_sinkhorn(temperature, epsilon, num_iterations):
    """The published loop, without logarithms, on the rows that the mask leaves."""

    def truth(student, teacher, batch):
        kept = np.asarray(batch["where"])
        cost = distances(student.logits[kept], teacher.logits[kept], temperature)
        plan = np.exp(-cost / epsilon)
        for _ in range(num_iterations):
            plan = plan / plan.sum(1, keepdims=True)
            plan = plan / plan.sum(0, keepdims=True)
        result = np.full(kept.shape, np.nan)
        result[kept] = (plan * cost).sum(1)
        return result

    return truth


@pytest.mark.slow
def test_contract():
    bound = bind(sinkhorn, temperature=1.0, epsilon=0.3, num_iterations=3)
    check_contract(bound, couples=True, truth=numpy_sinkhorn(1.0, 0.3, 3))


def test_the_defaults_are_the_published_numbers():
    student, teacher, batch = draw()
    with jax.enable_x64(True):
        found = bind(sinkhorn)(student, teacher, batch)
    kept = batch["where"]
    expected = numpy_sinkhorn(2.0, 0.1, 20)(student, teacher, batch)
    np.testing.assert_allclose(np.asarray(found)[kept], expected[kept], rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.02])
def test_many_iterations_reach_the_plan_of_pot(epsilon):
    student, teacher = make()
    cost = distances(student, teacher, 2.0)
    options = dict(reg=epsilon, numItermax=100_000, stopThr=1e-14)
    plan = ot.bregman.sinkhorn_log(np.ones(N), np.ones(N), cost, **options)
    with jax.enable_x64(True):
        found = values(bind(sinkhorn, epsilon=epsilon, num_iterations=5000), student, teacher)
    np.testing.assert_allclose(found, (plan * cost).sum(1), rtol=1e-7)


def test_a_sharp_plan_is_that_of_optimal_transport():
    student, teacher = make(scale=4.0)
    cost = distances(student, teacher, 2.0)
    with jax.enable_x64(True):
        bound = bind(sinkhorn, epsilon=1e-3, num_iterations=20_000)
        found = np.sum(values(bound, student, teacher))
    exact = ot.emd2(np.ones(N) / N, np.ones(N) / N, cost) * N
    np.testing.assert_allclose(found, exact, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, N])
def test_value_and_gradient_against_torch(size):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    arrays = make(size)
    s, t = (torch.tensor(x, requires_grad=True) for x in arrays)
    q, p = (torch.softmax(x / 2, dim=-1) for x in (s, t))
    cost = torch.cdist(q, p, p=1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    expected = (plan * cost).sum()
    expected.backward()
    with jax.enable_x64(True):
        found, slopes = value_and_slopes(bind(sinkhorn), *arrays)
    for dtype, tree, rtol in (
        (np.float64, (found, slopes), 1e-6),  # the numbers were bound in float32
        (np.float32, value_and_slopes(bind(sinkhorn), *arrays.astype(np.float32)), 3e-5),
    ):
        assert tree[0].dtype == dtype
        np.testing.assert_allclose(tree[0], expected.item(), rtol=rtol)
        for slope, exact in zip(tree[1], (s.grad, t.grad), strict=True):
            atol = rtol * np.abs(exact.numpy()).max()
            np.testing.assert_allclose(slope, exact, rtol=0, atol=atol)


def test_one_row_is_its_distance():
    student, teacher = make(1)
    found = values(bind(sinkhorn), *np.float32([student, teacher]))
    np.testing.assert_allclose(found, distances(student, teacher, 2.0)[0], rtol=1e-6)


def test_the_order_of_the_teachers_rows_does_not_matter():
    student, teacher = np.float32(make())
    order = np.random.default_rng(1).permutation(N)
    assert np.any(order != np.arange(N))
    expected = values(bind(sinkhorn), student, teacher)
    np.testing.assert_allclose(values(bind(sinkhorn), student, teacher[order]), expected, rtol=1e-5)
    found = values(bind(sinkhorn), student[order], teacher)
    np.testing.assert_allclose(found, expected[order], rtol=1e-5)


def test_identical_logits_cost_a_little():
    student, teacher = np.float32(make())
    same, apart = (np.mean(values(bind(sinkhorn), student, x)) for x in (student, teacher))
    assert 0 < same < 0.25 * apart
    sharp = np.mean(values(bind(sinkhorn, epsilon=0.01), student, student))
    assert 0 <= sharp < 0.01 * same


@pytest.mark.parametrize("num_iterations", [1, 2, 20])
def test_the_sums_of_the_columns_are_one(num_iterations):
    """Where all rows of the student are equal, a column's cost is constant, and so its sum shows.

    After a step that ended on rows the cheap columns would have more than 1.
    """
    student, teacher = make()
    student = np.broadcast_to(student[:1], student.shape)
    found = values(bind(sinkhorn, num_iterations=num_iterations), *np.float32([student, teacher]))
    np.testing.assert_allclose(np.sum(found), distances(student, teacher, 2.0)[0].sum(), rtol=1e-6)


def test_the_mean_under_total_is_the_cost_per_valid_row():
    student, teacher, batch = draw()
    term = Term(loss=bind(sinkhorn), weight=jnp.asarray(0.5), other="teacher")
    found, means = total({"sinkhorn": term}, student, {"teacher": teacher}, batch)
    expected = np.nanmean(numpy_sinkhorn(2.0, 0.1, 20)(student, teacher, batch))
    np.testing.assert_allclose([means["sinkhorn"], found], [expected, 0.5 * expected], rtol=1e-5)
    unformed = Outputs(hidden=student.logits, head=Head(np.eye(student.logits.shape[-1])))
    with pytest.raises(ValueError, match="couples a batch's rows"):
        total({"sinkhorn": term}, unformed, {"teacher": teacher}, batch, chunk=4)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-3])
def test_a_small_epsilon_and_far_logits_stay_finite(epsilon):
    """exp(-D / epsilon) is 0 in float32 for all pairs of some rows, whose sums are then 0 / 0."""
    student, teacher = np.float32(make(scale=1e4))
    assert np.exp(np.float32(-2 / epsilon)) == 0
    found, slopes = value_and_slopes(bind(sinkhorn, epsilon=epsilon), student, teacher)
    assert 0 <= found <= 2 * N
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_a_class_removed_on_one_side_has_probability_0():
    student, teacher = np.float32(make())
    far, gone = student.copy(), student.copy()
    far[:, 1], gone[:, 1] = -1e9, -np.inf
    expected, actual = (value_and_slopes(bind(sinkhorn), x, teacher) for x in (far, gone))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)
    np.testing.assert_array_equal(actual[1][0][:, 1], 0)


def test_numbers_for_each_example():
    """The plan of a row is blurred by its own epsilon."""
    student, teacher = np.float32(make())
    epsilon, temperature = np.linspace(0.1, 0.5, N), np.linspace(1, 3, N)
    q, p = (
        scipy.special.softmax(np.float64(x) / temperature[:, None], axis=-1)
        for x in (student, teacher)
    )
    cost = scipy.spatial.distance.cdist(q, p, "cityblock")
    plan = np.exp(-cost / epsilon[:, None])
    for _ in range(20):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0)
    bound = bind(sinkhorn, temperature=temperature, epsilon=epsilon)
    np.testing.assert_allclose(values(bound, student, teacher), (plan * cost).sum(1), rtol=1e-5)
    shaped = bind(sinkhorn, temperature=temperature.reshape(3, 3), epsilon=epsilon.reshape(3, 3))
    found = values(shaped, student.reshape(3, 3, K), teacher.reshape(3, 3, K))
    np.testing.assert_allclose(np.ravel(found), (plan * cost).sum(1), rtol=1e-5)


@pytest.mark.parametrize("number", [{"epsilon": 0.0}, {"epsilon": -0.1}, {"temperature": -2.0}])
def test_a_number_outside_of_its_domain_gives_nan(number):
    bound = bind(sinkhorn)  # past `bind`, as a tracer would be
    bound = bound.replace(numbers=bound.numbers | jax.tree.map(jnp.float32, number))
    assert np.isnan(values(bound, *np.float32(make()))).all()
    with pytest.raises(ValueError, match=r"^sinkhorn\.\w+ must be greater than 0 and finite"):
        bind(sinkhorn, **number)


def test_what_does_not_fit_is_refused():
    student, teacher = (Outputs(logits=jnp.asarray(x)) for x in make())
    where = jnp.ones(N, bool)
    with pytest.raises(ValueError, match=r"num_iterations must be at least 1; found 0\.$"):
        bind(sinkhorn, num_iterations=0)(student, teacher, {"where": where})
    with pytest.raises(AssertionError, match=r"where must be bool.*found float32\[9\]"):
        bind(sinkhorn)(student, teacher, {"where": jnp.ones(N)})
    with pytest.raises(AssertionError, match=r"where must be bool \[9\].*; found bool\[8\]"):
        bind(sinkhorn)(student, teacher, {"where": where[1:]})
    with pytest.raises(
        ValueError, match=r"^student_logits must be a floating-point array .*; found None"
    ):
        bind(sinkhorn)(Outputs(), teacher, {"where": where})
    with pytest.raises(ValueError, match=r"^epsilon must be a number, or an array that broadcasts"):
        bind(sinkhorn, epsilon=jnp.ones(N + 1))(student, teacher, {"where": where})


def test_the_gradient_needs_no_array_of_all_pairs_and_classes_nor_all_iterations():
    size, classes = 128, 64
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, size, classes)), jnp.float32)

    def peak(num_iterations):
        bound = bind(sinkhorn, num_iterations=num_iterations)
        compiled = value_and_slopes.lower(bound, *logits).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(20) < 4 * size * size * classes / 2
    assert peak(100) < peak(20) + 80 * 4 * size * size / 10


def test_a_batch_spread_over_devices_is_one_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays = np.float32(make(16))
    expected = value_and_slopes(bind(sinkhorn), *arrays)
    spread = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays]
    found = value_and_slopes(bind(sinkhorn), *spread)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected
    )
