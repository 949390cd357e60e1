"""Log mass ratios against a brute-force softmax step, closed forms and an explicit Jacobian."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp

from abkd_jax.analysis import (
    exact_parameter_log_mass_ratio,
    log_mass_ratio,
    logit_gradient,
    of_logit_change,
    parameter_log_mass_ratio,
)
from abkd_jax.binding import bind
from abkd_jax.divergences import alpha_beta, forward_kl, jensen_shannon, reverse_kl, total_variation

B, K, ETA = 40, 6, 0.3
INF = np.inf


def draw(*shape, seed=0):
    """Logits of many scales, one for each row."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-3, 1.5, (*shape[:-1], 1)))
    return rng.normal(size=shape) * scale


def brute_force(student, gradient, eta):
    """LogR from two softmaxes in numpy."""
    before = scipy.special.log_softmax(student, -1)
    return scipy.special.log_softmax(student - eta * gradient, -1) - before


def closed_form(student, teacher, alpha, beta):
    """The gradient of alpha_beta in the logits, as the paper has it."""
    log_q, log_p = (scipy.special.log_softmax(x, -1) for x in (student, teacher))
    q, p = np.exp(log_q), np.exp(log_p)
    h = (p**alpha - q**alpha) / alpha if alpha else log_p - log_q
    pull = q**beta * h
    return q * pull.sum(-1, keepdims=True) - pull


def naive_jensen_shannon(student, teacher):
    q, p = jax.nn.softmax(student), jax.nn.softmax(teacher)
    m = 0.3 * p + 0.7 * q
    return 0.3 * jnp.sum(p * jnp.log(p / m), -1) + 0.7 * jnp.sum(q * jnp.log(q / m), -1)


def naive_total_variation(student, teacher):
    return 0.5 * jnp.sum(jnp.abs(jax.nn.softmax(student) - jax.nn.softmax(teacher)), -1)


def autodiff(naive):
    summed = lambda s, t: jnp.sum(naive(s, t))  # noqa: E731
    return jax.jit(jax.grad(summed))


@jax.jit
def step(divergence, student, teacher, eta):
    return log_mass_ratio(student, teacher, divergence=divergence, learning_rate=eta)


AB = functools.partial(bind, alpha_beta)
GRADIENTS = [
    (lambda: AB(alpha=0.8, beta=0.3), lambda s, t: closed_form(s, t, 0.8, 0.3)),
    (lambda: AB(alpha=-0.5, beta=1.5), lambda s, t: closed_form(s, t, -0.5, 1.5)),
    (lambda: AB(alpha=1.0, beta=0.0), lambda s, t: closed_form(s, t, 1, 0)),
    (lambda: AB(alpha=0.0, beta=1.0), lambda s, t: closed_form(s, t, 0, 1)),
    (lambda: bind(jensen_shannon, teacher_weight=0.3), autodiff(naive_jensen_shannon)),
    (lambda: bind(total_variation), autodiff(naive_total_variation)),
]
NAMES = ["ABKD", "alpha < 0", "(1, 0)", "(0, 1)", "Jensen-Shannon", "total variation"]


@pytest.mark.parametrize("make,gradient_of", GRADIENTS, ids=NAMES)
def test_it_is_a_softmax_step(make, gradient_of):
    student, teacher = draw(B, K), draw(B, K, seed=1)
    with jax.enable_x64(True):
        gradient = np.asarray(gradient_of(student, teacher))
        found = step(make(), student, teacher, ETA)
        assert found.log_ratio.dtype == np.float64
        np.testing.assert_allclose(
            found.log_ratio, brute_force(student, gradient, ETA), rtol=1e-10, atol=1e-10
        )
        np.testing.assert_allclose(found.target, -ETA * gradient, rtol=1e-10, atol=1e-11)
        log_q = scipy.special.log_softmax(student, -1)
        normaliser = -scipy.special.logsumexp(log_q - ETA * gradient, axis=-1)
        np.testing.assert_allclose(found.normaliser, normaliser, rtol=1e-10, atol=1e-11)
        both = found.target + found.normaliser[..., None]
        np.testing.assert_allclose(found.log_ratio, both, rtol=1e-10, atol=1e-10)


def test_the_published_gradients_of_both_kls():
    student, teacher = draw(B, K), draw(B, K, seed=1)
    q, p = (scipy.special.softmax(x, -1) for x in (student, teacher))
    u = np.log(p) - np.log(q)
    with jax.enable_x64(True):
        gradient = logit_gradient(student, teacher, divergence=bind(forward_kl))
        np.testing.assert_allclose(gradient, q - p, rtol=1e-10, atol=1e-11)
        gradient = logit_gradient(student, teacher, divergence=bind(reverse_kl))
        expected = -q * u + q * (q * u).sum(-1, keepdims=True)
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-11)


def test_one_compile_for_a_grid_of_alpha_and_beta():
    student, teacher = draw(B, K), draw(B, K, seed=1)
    alphas, betas = np.array([1.0, 0.0, 0.5, 0.8]), np.array([0.0, 1.0, 0.5, 0.3])
    count = []

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def at(alpha, beta, eta):
        count.append(1)
        divergence = bind(alpha_beta, alpha=alpha, beta=beta)
        return log_mass_ratio(student, teacher, divergence=divergence, learning_rate=eta)

    with jax.enable_x64(True):
        for eta in (0.3, 1.7):
            found = at(alphas, betas, eta)
            for i, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
                gradient = closed_form(student, teacher, alpha, beta)
                expected = brute_force(student, gradient, eta)
                np.testing.assert_allclose(found.log_ratio[i], expected, rtol=1e-10, atol=1e-10)
    assert len(count) == 1


def test_any_leading_axes_and_a_rate_for_each_row():
    student, teacher = draw(2, 5, 3, K), draw(5, 1, K, seed=1)
    eta = np.random.default_rng(2).uniform(0.1, 2, (5, 3))
    with jax.enable_x64(True):
        found = step(bind(forward_kl), student, teacher, eta)
        assert found.normaliser.shape == (2, 5, 3)
        gradient = closed_form(student, teacher, 1, 0)
        expected = brute_force(student, gradient, eta[..., None])
        np.testing.assert_allclose(found.log_ratio, expected, rtol=1e-10, atol=1e-10)
        one = step(bind(forward_kl), student[1, 2, 0], teacher[2, 0], eta[2, 0])
        np.testing.assert_allclose(found.log_ratio[1, 2, 0], one.log_ratio, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "divergence", [AB(alpha=1.0, beta=0.0), AB(alpha=0.0, beta=1.0), AB(alpha=0.8, beta=0.3)]
)
def test_removed_classes(divergence):
    student, teacher = draw(B, K), draw(B, K, seed=1)
    student[:, [1, 4]] = teacher[:, [1, 4]] = -INF
    kept = [0, 2, 3, 5]
    found = step(divergence, np.float32(student), np.float32(teacher), ETA)
    cut = step(divergence, np.float32(student[:, kept]), np.float32(teacher[:, kept]), ETA)
    assert np.all(np.asarray(found.log_ratio)[:, [1, 4]] == 0)
    assert np.all(np.asarray(found.target)[:, [1, 4]] == 0)
    np.testing.assert_allclose(found.log_ratio[:, kept], cut.log_ratio, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.normaliser, cut.normaliser, rtol=1e-5, atol=1e-6)


def test_classes_removed_on_one_side_alone():
    student, teacher = draw(B, K), draw(B, K, seed=1)
    student[:, 1] = teacher[:, 4] = -INF
    found = step(AB(alpha=0.0, beta=1.0), np.float32(student), np.float32(teacher), ETA)
    assert all(np.all(np.isfinite(part)) for part in jax.tree.leaves(found))
    assert np.all(np.asarray(found.log_ratio)[:, 1] == 0)
    q = scipy.special.softmax(student, -1)
    assert np.all(np.asarray(found.log_ratio)[q[:, 4] > 1e-3][:, 4] < -1e3)  # all of it leaves


def test_a_tiny_step_keeps_its_digits_in_float32():
    rng = np.random.default_rng(0)
    student = np.float32(3 * rng.normal(size=(200, K)))
    teacher = np.float32(3 * rng.normal(size=(200, K)))
    found = step(AB(alpha=1.0, beta=0.0), student, teacher, 1e-6)
    log_q = scipy.special.log_softmax(np.float64(student), -1)
    q, target = np.exp(log_q), -1e-6 * closed_form(np.float64(student), np.float64(teacher), 1, 0)
    normaliser = -np.log1p(np.sum(q * np.expm1(target), -1))
    scale = np.sum(q * np.abs(target), -1)
    assert np.max(np.abs(found.normaliser - normaliser) / scale) < 1e-6
    expected = target + normaliser[:, None]
    largest = np.max(np.abs(expected), -1, keepdims=True)
    assert np.max(np.abs(found.log_ratio - expected) / largest) < 2e-6


def test_a_normaliser_of_second_order_keeps_its_digits_in_float32():
    x = np.float32(3e-6)
    change = np.float32([[1, -1, 1, -1], [1, -1, 0, 0]]) * x
    found = of_logit_change(jnp.zeros((2, 4)), change)
    expected = [-(np.float64(x) ** 2) / 2, -(np.float64(x) ** 2) / 4]  # -log cosh x, and its half
    np.testing.assert_allclose(found.normaliser, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0, 100.0, 1e4, 1e30])
def test_steps_of_any_size(scale):
    logits = np.float32(draw(B, K))
    change = np.float32(scale * np.random.default_rng(3).normal(size=(B, K)))
    found = of_logit_change(logits, change)
    before = scipy.special.log_softmax(np.float64(logits), -1)
    shift = np.float64(change) - np.max(change, -1, keepdims=True)
    after = scipy.special.log_softmax(before + shift, -1)
    rounding = 1e-6 * np.maximum(scale, 40)
    np.testing.assert_allclose(found.log_ratio, after - before, rtol=2e-6, atol=rounding)
    top = np.argmax(after, -1)[:, None]
    got, expected = (
        np.take_along_axis(np.asarray(x), top, -1) for x in (found.log_ratio, after - before)
    )
    np.testing.assert_allclose(
        got, expected, rtol=1e-5, atol=2e-5
    )  # at most -log q: no rounding of scale


def test_the_saturated_class_keeps_its_digits_in_float32():
    logits = np.float32([[20.0, 0.0, 1.0]])
    change = np.float32([[0.3, 0.1, -0.2]])
    found = of_logit_change(logits, change)
    before = scipy.special.log_softmax(np.float64(logits), -1)
    after = scipy.special.log_softmax(np.float64(logits) + np.float64(change), -1)
    np.testing.assert_allclose(found.log_ratio, after - before, rtol=1e-5)


# --- parameters ---------------------------------------------------------------------------------

D, WIDTH = 4, 5


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["first"] + params["bias"])
    return hidden @ params["second"]


def setup(size=7):
    rng = np.random.default_rng(4)
    shapes = {"first": (D, WIDTH), "bias": (WIDTH,), "second": (WIDTH, K)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return params, rng.normal(size=(size, D)), 2 * rng.normal(size=(size, K))


@functools.partial(jax.jit, static_argnames="exact")
def parameter_step(params, inputs, teacher, divergence, eta, where=None, exact=False):
    fn = exact_parameter_log_mass_ratio if exact else parameter_log_mass_ratio
    logits_fn = lambda p: network(p, inputs)  # noqa: E731
    return fn(logits_fn, params, teacher, divergence=divergence, learning_rate=eta, where=where)


def jacobian(params, inputs):
    """[B, K, P], entry by entry."""
    blocks = jax.jacfwd(network)(params, inputs)
    return np.concatenate([np.reshape(b, (len(inputs), K, -1)) for b in blocks.values()], -1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alpha,beta", [(1.0, 0.0), (0.0, 1.0), (0.8, 0.3)])
def test_parameters_against_an_explicit_jacobian(alpha, beta, masked):
    params, inputs, teacher = setup()
    where = np.array([1, 0, 1, 1, 0, 1, 1], bool) if masked else None
    with jax.enable_x64(True):
        divergence = bind(alpha_beta, alpha=alpha, beta=beta)
        found = parameter_step(params, inputs, teacher, divergence, ETA, where)
        j = jacobian(params, inputs)
        logits = np.asarray(network(params, inputs))
    kept = np.ones(7, bool) if where is None else where
    gradient = closed_form(logits, teacher, alpha, beta) * kept[:, None] / kept.sum()
    target = -ETA * np.einsum("bkp,cjp,cj->bk", j, j, gradient)
    np.testing.assert_allclose(found.target, target, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        found.log_ratio, brute_force(logits, -target, 1.0), rtol=1e-10, atol=1e-10
    )
    log_q = scipy.special.log_softmax(logits, -1)
    normaliser = -scipy.special.logsumexp(log_q + target, axis=-1)
    np.testing.assert_allclose(found.normaliser, normaliser, rtol=1e-10, atol=1e-12)


def test_the_exact_step_of_the_parameters():
    params, inputs, teacher = setup()
    with jax.enable_x64(True):
        found = parameter_step(params, inputs, teacher, AB(alpha=1.0, beta=0.0), ETA, exact=True)
        logits, j = np.asarray(network(params, inputs)), jacobian(params, inputs)
        slope = np.einsum("bkp,bk->p", j, closed_form(logits, teacher, 1, 0)) / len(inputs)
        ends = np.cumsum([np.size(params[name]) for name in sorted(params)])[:-1]
        parts = dict(zip(sorted(params), np.split(slope, ends), strict=True))
        after = {n: x - ETA * parts[n].reshape(x.shape) for n, x in params.items()}
        expected = scipy.special.log_softmax(np.asarray(network(after, inputs)), -1)
    expected -= scipy.special.log_softmax(logits, -1)
    np.testing.assert_allclose(found.log_ratio, expected, rtol=1e-10, atol=1e-12)


def test_the_first_order_is_the_limit_of_the_exact_step():
    params, inputs, teacher = setup()
    with jax.enable_x64(True):
        apart = []
        for eta in (0.02, 0.01):
            args = params, inputs, teacher, AB(alpha=0.8, beta=0.3), eta
            exact, first = parameter_step(*args, exact=True), parameter_step(*args)
            apart.append(np.max(np.abs(exact.log_ratio - first.log_ratio)))
    assert apart[0] > 1e-6
    np.testing.assert_allclose(apart[0] / apart[1], 4.0, rtol=0.1)


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_that_removes_classes(exact):
    params, inputs, teacher = setup()
    present = jnp.arange(K) < K - 2
    masked = lambda p: jnp.where(present, network(p, inputs), -jnp.inf)  # noqa: E731
    fn = exact_parameter_log_mass_ratio if exact else parameter_log_mass_ratio
    teacher = np.where(present, teacher, -np.inf)
    found = fn(
        masked,
        jax.tree.map(jnp.float32, params),
        jnp.float32(teacher),
        divergence=bind(forward_kl),
        learning_rate=ETA,
    )
    assert all(np.all(np.isfinite(part)) for part in jax.tree.leaves(found))
    assert np.all(np.asarray(found.log_ratio)[:, K - 2 :] == 0)
    assert np.all(np.asarray(found.log_ratio)[:, : K - 2] != 0)


def test_a_network_in_half_precision():
    params, inputs, teacher = setup()
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (params, inputs))
    found = parameter_step(*low, jnp.float32(teacher), AB(alpha=1.0, beta=0.0), ETA)
    full = parameter_step(
        *jax.tree.map(jnp.float32, (params, inputs)),
        jnp.float32(teacher),
        AB(alpha=1.0, beta=0.0),
        ETA,
    )
    assert found.log_ratio.dtype == np.float32
    np.testing.assert_allclose(found.log_ratio, full.log_ratio, atol=0.05)
    assert np.max(np.abs(full.log_ratio)) > 0.3


def test_a_change_of_another_shape_is_refused():
    with pytest.raises(
        AssertionError, match=r"^change must be .* \[2, 4\], as student_logits; found"
    ):
        of_logit_change(jnp.zeros((2, 4)), jnp.zeros(4))


def test_a_teacher_of_another_batch_is_refused():
    params, inputs, teacher = setup()
    args = jax.tree.map(jnp.float32, (params, inputs, np.stack([teacher, teacher])))
    with pytest.raises(
        ValueError,
        match=r"that broadcasts to \[7, 6\], that of what logits_fn gives; found float32",
    ):
        parameter_step(*args, AB(alpha=1.0, beta=0.0), ETA)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "where,found",
    [
        (np.ones(1, bool), r"bool\[1\]"),
        (np.ones(4, bool), r"bool\[4\]"),
        (np.ones((7, 1), bool), r"bool\[7, 1\]"),
        (np.full(7, 2, np.int32), r"int32\[7\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(where, found, exact):
    params, inputs, teacher = jax.tree.map(jnp.float32, setup())
    message = rf"^where must be bool \[7\], one for each row .* found {found}\.$"
    with pytest.raises(AssertionError, match=message):
        parameter_step.__wrapped__(params, inputs, teacher, forward_kl, ETA, where, exact=exact)
