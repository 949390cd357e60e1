"""Every divergence against an independent truth, and the contract that all of them share.

A new divergence is one row of ROWS. `alpha_beta` has its accuracy grid and its identities besides.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import alpha_beta_oracle as oracle
import jax
import mpmath
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from abkd_jax import divergences
from abkd_jax.binding import bind

INF, NAN = np.inf, np.nan
SHAPE = (4, 5)  # shared by most tests: compiling takes most of the time
NUM_DEVICES = 8


def softmaxed(truth: Callable) -> Callable:
    """A truth in probabilities p, q as one in the logits of one row."""

    def in_logits(student_logits, teacher_logits, **numbers):
        p, q = (scipy.special.softmax(logits) for logits in (teacher_logits, student_logits))
        return truth(p, q, **numbers)

    return in_logits


def kl(p, q):
    return scipy.special.rel_entr(p, q).sum()


def skewed_jensen_shannon(p, q, teacher_weight):
    mixture = teacher_weight * p + (1 - teacher_weight) * q
    return teacher_weight * kl(p, mixture) + (1 - teacher_weight) * kl(q, mixture)


def symmetric_jensen_shannon(p, q, teacher_weight):
    assert teacher_weight == 0.5
    return scipy.spatial.distance.jensenshannon(p, q) ** 2


def chi_squared(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sum(np.where(p == q, 0.0, (p - q) ** 2 / q))


def skew_forward(p, q, skew):
    return kl(p, skew * p + (1 - skew) * q)


def skew_reverse(p, q, skew):
    return kl(q, (1 - skew) * p + skew * q)


def renyi(p, q, order):
    if order == 1:
        return kl(p, q)
    with np.errstate(divide="ignore"):
        return np.log(np.sum(p**order * q ** (1 - order))) / (order - 1)


def alpha_divergence(p, q, alpha):
    if alpha in (0, 1):
        return kl(p, q) if alpha == 1 else kl(q, p)
    with np.errstate(divide="ignore"):
        return (np.sum(p**alpha * q ** (1 - alpha)) - 1) / (alpha * (alpha - 1))


def beta_divergence(p, q, beta):
    """The density power divergence of Basu et al., over 1 + beta."""
    power = q ** (1 + beta) - (1 + 1 / beta) * p * q**beta + p ** (1 + beta) / beta
    return np.sum(power) / (1 + beta)


def head_share(p, q, head_mass):
    """AKL's g, by the rule as published."""
    order = np.argsort(-p, kind="stable")
    head = order[: max(1, np.sum(np.cumsum(p[order]) <= head_mass))]
    error = np.abs(p - q)
    return error[head].sum() / error.sum() if error.any() else 0.0


def adaptive_kl(p, q, head_mass):
    share = head_share(p, q, head_mass)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def with_held_weights(student_logits, teacher_logits, numbers):
    """AKL whose weights stay what they are for these logits, as its gradient has it."""
    p, q = (scipy.special.softmax(x, axis=-1) for x in (teacher_logits, student_logits))
    share = np.array([head_share(*row) for row in zip(p, q, numbers["head_mass"], strict=True)])

    def held(student_logits, teacher_logits, head_mass):
        forward = divergences.forward_kl(student_logits, teacher_logits)
        reverse = divergences.reverse_kl(student_logits, teacher_logits)
        return share * forward + (1 - share) * reverse + 0.0 * head_mass

    return held


def clipped_alpha(p, q, alpha, clip):
    """AlphaNet's D and rho for one alpha, as published but for the constant of rho."""
    with np.errstate(divide="ignore"):
        t = p / q
        if alpha == 1:
            return kl(p, q), t - 1
        if alpha == 0:
            return np.sum(-q * np.log(np.minimum(t, clip))), np.log(np.minimum(t, clip))
        power = np.minimum(t**alpha, clip)
    return np.sum(q * (power - 1)) / (alpha * (alpha - 1)), (power - 1) / alpha


def alphanet(p, q, alpha_min, alpha_max, clip):
    return max(clipped_alpha(p, q, alpha, clip)[0] for alpha in (alpha_min, alpha_max))


def surrogate_of_alphanet(student_logits, teacher_logits, numbers):
    """G for the alphas and the rho that these logits give."""
    coefficients = []
    for row in zip(student_logits, teacher_logits, *numbers.values(), strict=True):
        q, p = map(scipy.special.softmax, row[:2])
        of_row = dict(zip(numbers, row[2:], strict=True))
        clip = of_row.pop("clip")
        _, rho = max(
            (clipped_alpha(p, q, alpha, clip) for alpha in of_row.values()), key=lambda x: x[0]
        )
        coefficients.append(q * rho)
    coefficients = np.array(coefficients)

    def held(student_logits, teacher_logits, alpha_min, alpha_max, clip):
        log_q = jax.nn.log_softmax(student_logits)
        return -jnp.sum(coefficients * jnp.where(coefficients == 0, 0.0, log_q), axis=-1)

    return held


def logit_mse(student_logits, teacher_logits):
    kept = ~(np.isneginf(student_logits) & np.isneginf(teacher_logits))
    return np.mean((teacher_logits[kept] - student_logits[kept]) ** 2)


def alpha_beta_value(student_logits, teacher_logits, alpha, beta):
    return oracle.alpha_beta(student_logits, teacher_logits, alpha, beta).value


def tempered_alpha_beta(
    student_logits, teacher_logits, *, alpha, beta, temperature, temperature_power
):
    return divergences.tempered(
        student_logits,
        teacher_logits,
        divergence=functools.partial(divergences.alpha_beta, alpha=alpha, beta=beta),
        temperature=temperature,
        temperature_power=temperature_power,
    )


def tempered_alpha_beta_value(
    student_logits, teacher_logits, alpha, beta, temperature, temperature_power
):
    logits = student_logits / temperature, teacher_logits / temperature
    return temperature**temperature_power * alpha_beta_value(*logits, alpha, beta)


class Row(NamedTuple):
    """A divergence at one setting of its numbers.

    Attributes:
        name: of the test.
        function: the divergence.
        numbers: its hyperparameters.
        truth: one row of each logits in float64, and the numbers -> the value, which may be inf.
        proper: zero at p = q, non-negative, invariant to a shift of either logits.
        smooth: has two derivatives where p = q.
        held: where gradients are stopped, the arguments -> a divergence that has in it what is
            stopped as a constant, and so the gradient as its own.
    """

    name: str
    function: Callable
    numbers: dict[str, float]
    truth: Callable
    proper: bool = True
    smooth: bool = True
    held: Callable | None = None

    def draw(self, num_classes=SHAPE[1], seed=0, scale=1.5, dtype=np.float64):
        """Arguments: student and teacher logits, and the numbers for each row."""
        rng = np.random.default_rng(seed)
        logits = scale * rng.normal(size=(2, SHAPE[0], num_classes))
        numbers = {name: np.full(SHAPE[0], x, dtype) for name, x in self.numbers.items()}
        return *logits.astype(dtype), numbers

    def differentiated(self, *args):
        """The function of which the gradients at these arguments are those."""
        return self.held(*args) if self.held else self.function

    def truths(self, student_logits, teacher_logits, numbers):
        pairs = zip(student_logits, teacher_logits, strict=True)
        return np.array([self.truth(*pair, **self.numbers) for pair in pairs])


ALPHA_BETA_POINTS = ((1, 0), (0, 1), (0, 0), (0.5, -0.5), (0.3, 0.6), (2, -1), (-0.4, 0))
ROWS = [
    *(
        Row(
            f"alpha_beta({alpha}, {beta})",
            divergences.alpha_beta,
            {"alpha": alpha, "beta": beta},
            alpha_beta_value,
        )
        for alpha, beta in ALPHA_BETA_POINTS
    ),
    Row("forward_kl", divergences.forward_kl, {}, softmaxed(kl)),
    Row("reverse_kl", divergences.reverse_kl, {}, softmaxed(lambda p, q: kl(q, p))),
    Row(
        "total_variation",
        divergences.total_variation,
        {},
        softmaxed(lambda p, q: 0.5 * np.abs(p - q).sum()),
        smooth=False,
    ),
    Row(
        "jensen_shannon",
        divergences.jensen_shannon,
        {"teacher_weight": 0.5},
        softmaxed(symmetric_jensen_shannon),
    ),
    *(
        Row(
            f"jensen_shannon({weight})",
            divergences.jensen_shannon,
            {"teacher_weight": weight},
            softmaxed(skewed_jensen_shannon),
        )
        for weight in (0.1, 0.9)
    ),
    *(
        Row(
            f"alpha_divergence({alpha})",
            divergences.alpha_divergence,
            {"alpha": alpha},
            softmaxed(alpha_divergence),
        )
        for alpha in (0.0, 1.0, 2.0, 0.3)
    ),
    *(
        Row(
            f"beta_divergence({beta})",
            divergences.beta_divergence,
            {"beta": beta},
            softmaxed(beta_divergence),
        )
        for beta in (1.0, 0.3)
    ),
    Row(
        "hellinger",
        divergences.hellinger,
        {},
        softmaxed(lambda p, q: 2 * np.sum((np.sqrt(p) - np.sqrt(q)) ** 2)),
    ),
    Row("chi_squared", divergences.chi_squared, {}, softmaxed(chi_squared)),
    *(
        Row(f"renyi({order})", divergences.renyi, {"order": order}, softmaxed(renyi))
        for order in (0.5, 1.0, 2.0, 0.9)
    ),
    Row("jeffreys", divergences.jeffreys, {}, softmaxed(lambda p, q: kl(p, q) + kl(q, p))),
    *(
        Row(f"{function.__name__}({skew})", function, {"skew": skew}, softmaxed(truth))
        for function, truth in (
            (divergences.skew_forward_kl, skew_forward),
            (divergences.skew_reverse_kl, skew_reverse),
        )
        for skew in (0.0, 0.9, 0.1)
    ),
    *(
        Row(
            f"adaptive_kl({head_mass})",
            divergences.adaptive_kl,
            {"head_mass": head_mass},
            softmaxed(adaptive_kl),
            held=with_held_weights,
        )
        for head_mass in (0.9, 0.5)
    ),
    *(
        Row(
            f"alphanet({alpha_min}, {alpha_max}, {clip})",
            divergences.alphanet,
            {"alpha_min": alpha_min, "alpha_max": alpha_max, "clip": clip},
            softmaxed(alphanet),
            proper=False,
            smooth=False,
            held=surrogate_of_alphanet,
        )
        for alpha_min, alpha_max, clip in ((0.5, 2.0, 2.0), (-0.5, 3.0, 3.0), (-1.0, 1.0, 5.0))
    ),
    Row("logit_mse", divergences.logit_mse, {}, logit_mse, proper=False),
    Row(
        "tempered alpha_beta",
        tempered_alpha_beta,
        {"alpha": 0.8, "beta": 0.3, "temperature": 2.0, "temperature_power": 1.5},
        tempered_alpha_beta_value,
    ),
]

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
one_row_per_function = pytest.mark.parametrize(
    "row", {row.function: row for row in ROWS}.values(), ids=lambda row: row.name
)
QUICK = (divergences.alpha_beta, divergences.adaptive_kl, divergences.skew_forward_kl)
transformed = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=[] if function in QUICK else pytest.mark.long)
        for function, row in {row.function: row for row in ROWS}.items()
    ],
)


def value_of(function, args):
    student_logits, teacher_logits, numbers = args
    return function(student_logits, teacher_logits, **numbers)


def gradient_of(function, args):
    """With a number for each row, the gradients of each row."""
    value, pullback = jax.vjp(functools.partial(value_of, function), args)
    return pullback(jnp.ones_like(value))[0]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, *args):
    value, pullback = jax.vjp(functools.partial(value_of, function), args)
    return value, pullback(jnp.ones_like(value))[0]


@functools.partial(jax.jit, static_argnums=0)
def along(function, args, direction):
    """The derivatives of the value and of the gradients along a direction, in forward mode."""
    return (
        jax.jvp(functools.partial(value_of, function), (args,), (direction,))[1],
        jax.jvp(functools.partial(gradient_of, function), (args,), (direction,))[1],
    )


def step(args, direction, size):
    return jax.tree.map(lambda x, d: np.asarray(x + size * d), args, direction)


def random_direction(args, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=np.shape(x)), args)


def central_difference(function, args, direction, size):
    """Of the value and the gradients."""
    above, below = (
        value_and_gradients(function, *step(args, direction, sign * size)) for sign in (1, -1)
    )
    return jax.tree.map(lambda x, y: (np.asarray(x) - np.asarray(y)) / (2 * size), above, below)


def unit_directions(args):
    """(leaf, entry, direction) for each class of each logits and each number, all rows at once."""
    leaves, structure = jax.tree.flatten(args)
    for i, leaf in enumerate(leaves):
        for entry in np.ndindex(leaf.shape[1:]):
            moves = [np.zeros_like(other) for other in leaves]
            moves[i][(slice(None), *entry)] = 1.0
            yield i, (slice(None), *entry), jax.tree.unflatten(structure, moves)


def assert_close(found, true, rtol):
    """Leaf by leaf, relative to the largest entry of the true leaf."""
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(true), strict=True):
        size = np.max(np.abs(right), initial=0.0)
        np.testing.assert_allclose(left, right, rtol=0, atol=rtol * size)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all(), leaf


def masked(logits, classes):
    logits = np.array(logits)
    logits[..., classes] = -INF
    return logits


# Values and derivatives.


@every_row
def test_value_in_both_precisions(row):
    args = row.draw()
    true = row.truths(*args)
    with jax.enable_x64(True):
        value, _ = value_and_gradients(row.function, *args)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, true, rtol=1e-12)
        exact = jax.tree.map(lambda x: x.astype(np.float64), row.draw(dtype=np.float32))
        expected = jax.device_get(value_and_gradients(row.function, *exact))
    found = value_and_gradients(row.function, *row.draw(dtype=np.float32))
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found[0], true, rtol=1e-5)
    assert_close(found, expected, rtol=1e-5)


@every_row
def test_gradients_are_those_of_the_value_in_both_modes(row):
    args = row.draw()
    with jax.enable_x64(True):
        _, gradients = value_and_gradients(row.function, *args)
        leaves = jax.tree.leaves(gradients)
        differentiated = row.differentiated(*args)
        for i, entry, direction in unit_directions(args):
            difference, _ = central_difference(differentiated, args, direction, 1e-5)
            size = np.max(np.abs(leaves[i]))
            np.testing.assert_allclose(leaves[i][entry], difference, rtol=0, atol=1e-7 * size)

        direction = random_direction(args)
        forward, _ = along(row.function, args, direction)
        products = jax.tree.map(
            lambda g, d: (g * d).reshape(SHAPE[0], -1).sum(-1),
            *map(jax.tree.leaves, (gradients, direction)),
        )
        np.testing.assert_allclose(forward, sum(products), rtol=1e-12)


@pytest.mark.long
@every_row
@pytest.mark.parametrize("where", ["apart", "p = q", "p = q after a shift"])
def test_second_derivatives_are_those_of_the_gradients(row, where):
    """In all arguments at once: the Hessian times a random direction."""
    student_logits, teacher_logits, numbers = row.draw()
    if where != "apart":
        if not row.smooth:
            pytest.skip("not differentiable where p = q")
        teacher_logits = student_logits + (where != "p = q")
    args = student_logits, teacher_logits, numbers
    with jax.enable_x64(True):
        direction = random_direction(args)
        _, products = along(row.function, args, direction)
        _, differences = central_difference(row.differentiated(*args), args, direction, 1e-5)
        largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(differences))
        for product, difference in zip(*map(jax.tree.leaves, (products, differences)), strict=True):
            np.testing.assert_allclose(product, difference, rtol=0, atol=1e-7 * largest)


# -inf, saturation, NaN.


@every_row
def test_class_removed_from_both_equals_cut_out(row):
    kept = [0, 2, 3]
    student_logits, teacher_logits, numbers = row.draw(dtype=np.float32)
    cut = value_and_gradients(
        row.function, student_logits[:, kept], teacher_logits[:, kept], numbers
    )
    value, gradients = value_and_gradients(
        row.function, masked(student_logits, [1, 4]), masked(teacher_logits, [1, 4]), numbers
    )
    for logits in gradients[:2]:
        np.testing.assert_array_equal(logits[:, [1, 4]], 0.0)
    of_kept = gradients[0][:, kept], gradients[1][:, kept], gradients[2]
    assert_close((value, of_kept), cut, rtol=1e-6)


@every_row
@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)], ids=["student", "teacher", "each"])
def test_class_removed_from_one_side_is_the_limit(row, sides):
    args = list(row.draw())
    for side in sides:
        args[side] = masked(args[side], [2 * side + 1])
    true = row.truths(*args)
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(row.function, *args)
        assert_finite((value, gradients))
        removed = [gradients[side][:, 2 * side + 1] for side in sides]
        if np.isfinite(true).all():
            np.testing.assert_allclose(value, true, rtol=1e-12)
            for slopes in removed:
                np.testing.assert_array_equal(slopes, 0.0)
            differentiated = row.differentiated(*args)
            for i, entry, direction in unit_directions(args):
                leaf = jax.tree.leaves(args)[i][entry]
                if np.isfinite(leaf).all():
                    difference, _ = central_difference(differentiated, args, direction, 1e-5)
                    found = jax.tree.leaves(gradients)[i]
                    atol = 1e-7 * np.max(np.abs(found))
                    np.testing.assert_allclose(found[entry], difference, rtol=0, atol=atol)
        else:
            assert np.isposinf(true).all()
            assert (np.asarray(value) > 1e6).all()
            for side in sides:  # more of the class that lacks mass would help
                alone = list(row.draw())
                alone[side] = args[side]
                if np.isposinf(row.truths(*alone)).all():
                    assert (np.asarray(gradients[side][:, 2 * side + 1]) < 0).all()


@pytest.mark.parametrize("alpha", [1e-11, 1e-6, 0.1])
def test_class_removed_from_the_teacher_is_the_limit_however_small_alpha(alpha):
    """q^s / (alpha s), which grows without bound as alpha tends to 0."""
    alpha = np.float32(alpha)
    row = Row("", divergences.alpha_beta, {"alpha": alpha, "beta": 0.5}, alpha_beta_value)
    student_logits, teacher_logits, numbers = row.draw(dtype=np.float32)
    args = student_logits, masked(teacher_logits, [3]), numbers
    value, _ = value_and_gradients(row.function, *args)
    np.testing.assert_allclose(value, row.truths(*args), rtol=1e-5)


@every_row
@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_saturated_logits_are_finite(row, gap):
    _, _, numbers = row.draw(dtype=np.float32)
    student_logits = gap * np.eye(*SHAPE, dtype=np.float32)
    ramp = np.linspace(0, gap, SHAPE[1], dtype=np.float32)
    for teacher_logits in (
        student_logits,
        -student_logits,
        student_logits[:, ::-1],
        0 * student_logits,
        ramp + 0 * student_logits,
    ):
        for pair in ((student_logits, teacher_logits), (teacher_logits, student_logits)):
            value, gradients = value_and_gradients(row.function, *pair, numbers)
            assert_finite((value, gradients))
            if row.proper:
                assert (np.asarray(value) >= 0).all()


@pytest.mark.slow
@every_row
def test_second_derivatives_without_a_removed_class_are_those_of_cutting_it_out(row):
    student, teacher, numbers = row.draw(4)
    kept = np.array([0, 1, 3])
    numbers = {name: value[0] for name, value in numbers.items()}
    pair = jnp.stack([student[0], teacher[0]]).astype(jnp.float32)
    removed = pair.at[:, 2].set(-jnp.inf)
    hessian = jax.jit(jax.hessian(lambda logits: row.function(*logits, **numbers)))
    found, expected = np.asarray(hessian(removed)), np.asarray(hessian(pair[:, kept]))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[:, kept][..., kept], expected, atol=2e-6 * scale)
    assert not found[:, 2].any() and not found[..., 2].any()


@every_row
def test_nan_logit_gives_nan_in_its_row_alone(row):
    args = row.draw(dtype=np.float32)
    whole = value_and_gradients(row.function, *args)
    for side in (0, 1):
        spoilt = list(args)
        spoilt[side] = args[side].copy()
        spoilt[side][1, 2] = NAN
        value, gradients = value_and_gradients(row.function, *spoilt)
        assert np.isnan(value[1])
        stopped = not np.any(whole[1][side])
        assert stopped or np.isnan(gradients[side][1]).any()
        others = [0, 2, 3]
        for found, expected in zip(*map(jax.tree.leaves, ((value, gradients), whole)), strict=True):
            np.testing.assert_array_equal(found[others,], expected[others,])


@one_row_per_function
def test_one_class_and_no_rows(row):
    _, _, numbers = row.draw(dtype=np.float32)
    column = np.array([[0.0], [1.0], [-1e4], [3.0]], np.float32)
    value, gradients = value_and_gradients(row.function, column, column[::-1], numbers)
    if row.proper:
        np.testing.assert_array_equal(value, 0.0)
        np.testing.assert_array_equal(gradients[0], 0.0)
        np.testing.assert_array_equal(gradients[1], 0.0)
    assert_finite(gradients)
    empty = np.zeros((0, SHAPE[1]), np.float32)
    assert value_of(row.function, (empty, empty, row.numbers)).shape == (0,)


# What makes a divergence proper.

sixty_fourths = hnp.arrays(np.int32, (2, *SHAPE), elements=st.integers(-1024, 1024))
shifts = st.tuples(*[st.integers(-1024, 1024)] * 2)


@every_row
@given(integers=sixty_fourths, shift=shifts)
@settings(max_examples=50, deadline=None)
def test_proper_ones_are_distances_that_ignore_shifts(row, integers, shift):
    """In multiples of 1/64, which float32 adds without rounding."""
    if not row.proper:
        pytest.skip("not proper")
    _, _, numbers = row.draw(dtype=np.float32)
    student_logits, teacher_logits = (integers / 64).astype(np.float32)
    shifted = [
        (part + moved / 64).astype(np.float32)
        for part, moved in zip((student_logits, teacher_logits), shift, strict=True)
    ]
    value, gradients = value_and_gradients(row.function, student_logits, teacher_logits, numbers)
    assert (np.asarray(value) >= 0).all()
    assert_finite((value, gradients))
    np.testing.assert_allclose(
        value_and_gradients(row.function, *shifted, numbers)[0], value, rtol=1e-6
    )
    same, slopes = value_and_gradients(row.function, student_logits, shifted[0], numbers)
    np.testing.assert_array_equal(same, 0.0)
    for slope in jax.tree.leaves(slopes):
        np.testing.assert_array_equal(slope, 0.0)


@every_row
def test_a_shift_of_a_hundred_changes_nothing_but_the_rounding_of_the_logits(row):
    """logit_mse alone is of the logits themselves."""
    student_logits, teacher_logits, numbers = row.draw(dtype=np.float32)
    for pair in ((1, 0), (0, 1), (1, -1)):
        shifts = [np.float32(100 * sign) for sign in pair]
        logits = student_logits, teacher_logits
        shifted = [x + shift for x, shift in zip(logits, shifts, strict=True)]
        rounded = [x - shift for x, shift in zip(shifted, shifts, strict=True)]  # exact
        found = value_and_gradients(row.function, *shifted, numbers)
        if row.function is divergences.logit_mse:
            gap = (shifted[0] - shifted[1]).astype(np.float64)
            slope = 2 * gap / SHAPE[1]
            assert_close(found, (np.mean(gap**2, -1), (slope, -slope, {})), rtol=1e-6)
            continue
        expected = value_and_gradients(row.function, *rounded, numbers)
        if "temperature" in numbers:  # its slope is a sum over classes of slope times logit
            of_found, of_expected = (x[1][2].pop("temperature") for x in (found, expected))
            terms = [np.sum(np.abs(g * z), -1) for g, z in zip(found[1], shifted, strict=False)]
            rounding = np.finfo(np.float32).eps * sum(terms) / numbers["temperature"]
            assert (np.abs(of_found - of_expected) <= rounding).all()
        assert_close(found, expected, rtol=2e-6)


# Transformations.


@pytest.mark.slow
@one_row_per_function
def test_without_jit(row):
    args = row.draw(dtype=np.float32)
    jitted = value_and_gradients(row.function, *args)
    with jax.disable_jit():
        plain = value_and_gradients(row.function, *args)
    assert_close(plain, jitted, rtol=1e-6)


@transformed
def test_rows_are_a_batch_by_vmap_and_by_broadcasting(row):
    """Students [2, 1, K], teachers [3, K] and numbers [2, 1], against rows one by one."""
    rng = np.random.default_rng(0)
    student_logits = rng.normal(size=(2, 1, SHAPE[1])).astype(np.float32)
    teacher_logits = rng.normal(size=(3, SHAPE[1])).astype(np.float32)
    numbers = {name: np.array([[x], [x + 0.05]], np.float32) for name, x in row.numbers.items()}
    value = value_of(row.function, (student_logits, teacher_logits, numbers))
    assert value.shape == (2, 3)
    for i, j in np.ndindex(value.shape):
        at_i = {name: number[i, 0] for name, number in numbers.items()}
        alone = row.function(student_logits[i, 0], teacher_logits[j], **at_i)
        assert alone.shape == ()
        np.testing.assert_allclose(value[i, j], alone, rtol=1e-6)

    args = row.draw(dtype=np.float32)
    by_row = jax.vmap(functools.partial(value_and_gradients, row.function))(*args)
    assert_close(by_row, value_and_gradients(row.function, *args), rtol=1e-6)


@transformed
def test_pmap(row):
    args = jax.tree.map(
        lambda x: np.stack([x + 0.01 * i for i in range(NUM_DEVICES)]),
        row.draw(dtype=np.float32),
    )
    spread = jax.pmap(functools.partial(value_and_gradients, row.function))(*args)
    assert len(spread[0].sharding.device_set) == NUM_DEVICES
    for i in range(NUM_DEVICES):
        here = value_and_gradients(row.function, *jax.tree.map(lambda x, i=i: x[i], args))
        # Two programs, each with its own rounding: as far from the truth as the contract has it.
        assert_close(jax.tree.map(lambda x, i=i: x[i], spread), here, rtol=4e-6)


def sharded(function, out_specs):
    """A function of logits sharded by rows and of numbers that every device has."""
    mesh = jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    in_specs = P("data"), P("data"), P()
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def sixteen_rows(row):
    """Arguments with one value of each number for all rows."""
    logits = np.random.default_rng(0).normal(size=(2, 2 * NUM_DEVICES, SHAPE[1]))
    return *logits.astype(np.float32), {name: np.float32(x) for name, x in row.numbers.items()}


@transformed
def test_shard_map(row):
    args = sixteen_rows(row)
    out_specs = P("data"), (P("data"), P("data"), P())  # the gradients of the numbers are summed
    found = sharded(functools.partial(value_and_gradients, row.function), out_specs)(*args)
    assert len(found[0].sharding.device_set) == NUM_DEVICES
    assert_close(found, value_and_gradients(row.function, *args), rtol=1e-6)


def test_shard_map_differentiated_from_outside():
    row = ROWS[0]
    args = sixteen_rows(row)
    value = sharded(lambda *args: value_of(row.function, args), P("data"))
    found = jax.grad(lambda args: jnp.sum(value(*args)))(args)
    assert_close(found, value_and_gradients(row.function, *args)[1], rtol=1e-6)


@transformed
def test_scan_and_remat(row):
    args = row.draw(dtype=np.float32)

    @jax.jit
    @jax.grad
    def scanned(args):
        @jax.checkpoint
        def body(total, part):
            return total + value_of(row.function, part), None

        return jax.lax.scan(body, jnp.float32(0), args)[0]

    _, expected = value_and_gradients(row.function, *args)
    assert_close(scanned(args), expected, rtol=1e-6)


@transformed
def test_bfloat16_is_lifted(row):
    _, _, numbers = row.draw(dtype=np.float32)
    logits = jnp.asarray(5 * np.random.default_rng(0).normal(size=SHAPE), jnp.bfloat16)
    value = jax.jit(functools.partial(value_of, row.function))
    apart = value((logits, logits[::-1], numbers))
    assert apart.dtype == np.float32
    exact = logits.astype(np.float32)
    expected, _ = value_and_gradients(row.function, exact, exact[::-1], numbers)
    np.testing.assert_allclose(apart, expected, rtol=1e-6)
    same = value((logits, logits, numbers))
    assert same.dtype == np.float32
    if row.proper:
        assert (np.abs(same) <= 1e-3).all()


@one_row_per_function
@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            np.zeros((4, 5)),
            np.zeros((4, 3)),
            r"^student_logits and teacher_logits must be of the same number of classes, .*; found "
            r"\[\[4, 5\], \[4, 3\]\]\.",
        ),
        (
            np.zeros((4, 5)),
            np.zeros((3, 5)),
            r"^student_logits and teacher_logits must be .* leading axes that broadcast; found "
            r"\[\[4, 5\], \[3, 5\]\]\.",
        ),
        (
            np.zeros((4, 5), np.int32),
            np.zeros((4, 5)),
            r"student_logits must be a floating-point array .* found int32\[4, 5\]",
        ),
        (
            np.zeros((4, 5)),
            np.zeros((), np.float32),
            r"teacher_logits must be a floating-point array .* found float32\[\]",
        ),
        (
            np.zeros((4, 0), np.float32),
            np.zeros((4, 0), np.float32),
            r"student_logits .* with K >= 1; found float32\[4, 0\]\.",
        ),
    ],
    ids=["class counts", "leading axes", "integers", "scalar", "no classes"],
)
def test_refusals(row, student, teacher, message):
    with pytest.raises(AssertionError, match=message):
        row.function(student, teacher, **row.numbers)


# alpha_beta: accuracy, identities, smoothness, one compile.


def test_alpha_beta_accuracy():
    """Some 160 cases of the grid of `experiments/accuracy.py`, with its bars."""
    rows = []
    for num_classes in (2, 10, 100):
        cases = oracle.draw_cases(num_classes, oracle.CYCLE, seed=0)
        student_logits, teacher_logits, alpha, beta = (
            np.stack(column) for column in list(zip(*cases, strict=True))[1:]
        )
        results = value_and_gradients(
            divergences.alpha_beta, student_logits, teacher_logits, {"alpha": alpha, "beta": beta}
        )
        assert_finite(results)
        leaves = map(np.asarray, jax.tree.leaves(results))
        for case, found in zip(cases, zip(*leaves, strict=True), strict=True):
            rows.append(oracle.relative_errors(found, oracle.alpha_beta(*case[1:])))
    errors = np.array(rows)
    assert (np.mean(~np.isnan(errors), axis=0) > 0.7).all()
    largest, percentile = np.nanmax(errors, axis=0), np.nanpercentile(errors, 99, axis=0)
    by_name = dict(zip(oracle.Truth._fields, zip(largest, percentile, strict=True), strict=True))
    assert (largest <= oracle.MAX_ERROR).all(), by_name
    assert (percentile <= oracle.PERCENTILE_99).all(), by_name


def test_rounding_explains_the_errors_of_gradients_that_are_small_beside_their_slopes():
    """By the formula for two classes, and where two are likely and the student gives them none."""
    logits = np.float32([[1.0, 0.0], [0.0, 0.5]])
    gap = np.subtract(*scipy.special.softmax(logits.astype(float), axis=-1))[0]
    bound = np.finfo(np.float32).eps * (1 - np.log(abs(gap)))
    np.testing.assert_allclose(oracle.gradient_bounds(*logits, 1.0, 0.0)[0], bound, rtol=1e-12)

    row = Row("", divergences.alpha_beta, {"alpha": 0.9, "beta": 0.0}, alpha_beta_value)
    _, _, numbers = row.draw(dtype=np.float32)
    noise = np.random.default_rng(0).normal(size=(2, *SHAPE))
    offsets = [[0.0, 0.0, 0.0, 0.0, 1e4], [1e4, 1e4, 0.0, 0.0, 0.0]]
    student, teacher = (1e-2 * noise + np.expand_dims(offsets, 1)).astype(np.float32)
    _, gradients = value_and_gradients(row.function, student, teacher, numbers)
    for i, of_teacher in enumerate(gradients[1]):
        case = student[i], teacher[i], np.float32(0.9), 0.0
        of_student, bound = oracle.gradient_bounds(*case)
        assert of_student < oracle.MAX_ERROR < bound < 1
        assert oracle.relative_error(of_teacher, oracle.alpha_beta(*case).teacher) <= bound


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.6), (1.0, 0.0), (0.0, 0.0), (1.2, -1.2)])
def test_alpha_beta_in_float64(alpha, beta):
    row = Row("", divergences.alpha_beta, {"alpha": alpha, "beta": beta}, alpha_beta_value)
    args = row.draw(scale=3.0)
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(row.function, *args)
        leaves = map(np.asarray, (value, *jax.tree.leaves(gradients)))
    for i, found in enumerate(zip(*leaves, strict=True)):
        truth = oracle.alpha_beta(args[0][i], args[1][i], alpha, beta)
        assert np.max(oracle.relative_errors(found, truth)) <= 1e-12


@pytest.mark.parametrize(
    ("alpha", "beta", "definition"),
    [
        (1, 0, kl),
        (0, 1, lambda p, q: kl(q, p)),
        (0.5, 0.5, lambda p, q: 2 * np.sum((np.sqrt(p) - np.sqrt(q)) ** 2)),
        (1, 1, lambda p, q: 0.5 * np.sum((p - q) ** 2)),
        (0, 0, lambda p, q: 0.5 * np.sum(np.log(p / q) ** 2)),
        (2, -1, lambda p, q: 0.5 * np.sum((p - q) ** 2 / q)),
        (0.7, 0.3, lambda p, q: (np.sum(p**0.7 * q**0.3) - 1) / (0.7 * -0.3)),
    ],
    ids=["forward KL", "reverse KL", "Hellinger", "Euclidean", "log", "chi^2", "alpha-divergence"],
)
def test_alpha_beta_identities(alpha, beta, definition):
    student_logits, teacher_logits = 1.5 * np.random.default_rng(0).normal(size=(2, *SHAPE))
    numbers = {"alpha": np.full(SHAPE[0], alpha, float), "beta": np.full(SHAPE[0], beta, float)}
    with jax.enable_x64(True):
        value, _ = value_and_gradients(
            divergences.alpha_beta, student_logits, teacher_logits, numbers
        )
    truth = softmaxed(definition)
    pairs = zip(student_logits, teacher_logits, strict=True)
    np.testing.assert_allclose(value, [truth(*pair) for pair in pairs], rtol=1e-12)


@given(
    logits=hnp.arrays(np.float32, (2, *SHAPE), elements=st.floats(-20, 20, width=32)),
    numbers=hnp.arrays(np.float32, (2, SHAPE[0]), elements=st.floats(-2, 3, width=32)),
)
@settings(max_examples=50, deadline=None)
def test_alpha_beta_duality(logits, numbers):
    """D^(a,b)(p || q) = D^(b,a)(q || p)."""
    (student, teacher), (alpha, beta) = logits, numbers
    value, gradients = value_and_gradients(
        divergences.alpha_beta, student, teacher, {"alpha": alpha, "beta": beta}
    )
    dual, dual_gradients = value_and_gradients(
        divergences.alpha_beta, teacher, student, {"alpha": beta, "beta": alpha}
    )
    assert_finite((value, gradients))
    assert (np.asarray(value) >= 0).all()
    np.testing.assert_allclose(value, dual, rtol=1e-5)
    for mine, other in (
        (gradients[0], dual_gradients[1]),
        (gradients[1], dual_gradients[0]),
        (gradients[2]["alpha"], dual_gradients[2]["beta"]),
    ):
        sizes = np.max(np.abs(mine), axis=tuple(range(1, mine.ndim)), keepdims=True)
        assert (np.abs(mine - other) <= 1e-5 * sizes).all()


@pytest.mark.parametrize(
    ("start", "direction"),
    [((0, 0.7), (1, 0)), ((0.7, 0), (0, 1)), ((0.6, -0.6), (0, 1)), ((0, 0), (1, 0.3))],
    ids=["alpha = 0", "beta = 0", "alpha + beta = 0", "the origin"],
)
def test_alpha_beta_is_smooth_across_its_singular_lines(start, direction):
    """On the line, at tiny distances from it and farther, one cubic fits all."""
    near = 10.0 ** np.arange(-12, -2)
    offsets = np.concatenate([np.linspace(-0.01, 0.01, 21), near, -near])
    alpha, beta = (x + offsets * d for x, d in zip(start, direction, strict=True))
    row = np.random.default_rng(0).normal(size=(2, SHAPE[1]))
    logits = np.broadcast_to(row[:, None], (2, len(offsets), SHAPE[1])).astype(np.float32)
    numbers = {"alpha": alpha.astype(np.float32), "beta": beta.astype(np.float32)}
    for leaf in jax.tree.leaves(value_and_gradients(divergences.alpha_beta, *logits, numbers)):
        columns = np.asarray(leaf, np.float64).reshape(len(offsets), -1)
        basis = np.vander(offsets / 0.01, 4)
        fitted = basis @ np.linalg.lstsq(basis, columns, rcond=None)[0]
        assert np.max(np.abs(columns - fitted)) <= 1e-5 * np.max(np.abs(columns))


def test_one_compile_for_all_numbers():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
    numbers = [*np.random.default_rng(1).uniform(-2, 3, (45, 2)).tolist()]
    numbers += [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, -0.5), (2.0, -2.0)]
    before = divergences.alpha_beta._cache_size()
    for alpha, beta in numbers:
        divergences.alpha_beta(*logits, alpha=alpha, beta=beta)
    assert divergences.alpha_beta._cache_size() == before + 1

    @jax.jit
    def loss(bound, student_logits, teacher_logits):
        return bound(student_logits, teacher_logits)

    for alpha, beta in (*numbers, (1, 0), (np.float64(0.5), jnp.float32(0.5)), (2, 0.5)):
        loss(bind(divergences.alpha_beta, alpha=alpha, beta=beta), *logits)
    assert loss._cache_size() == 1


# The other functions' own properties.


def test_forward_kl_from_a_one_hot_teacher_is_cross_entropy():
    logits = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    one_hot = np.where(np.eye(*SHAPE) > 0, 0.0, -INF).astype(np.float32)
    value, gradients = value_and_gradients(divergences.forward_kl, logits, one_hot, {})
    log_q = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    rows = np.arange(SHAPE[0])
    np.testing.assert_allclose(value, -log_q[rows, rows], rtol=1e-6)
    np.testing.assert_allclose(gradients[0], np.exp(log_q) - np.eye(*SHAPE), rtol=0, atol=1e-6)


HARD_PAIRS = [  # student and teacher logits, in multiples of what float32 adds exactly
    ([0.5, -1.25, 2.0], [1.5, 0.75, -2.0]),
    ([0.5, -1.25, 2.0], [0.5, -1.2490234375, 1.9990234375]),
    ([3.0, 0.0, -4.0], [-2.0, 1.0, 3.5]),
]
NEAR_0 = [0.0, 1e-12, 1e-6, 1e-3]
HARD_NUMBERS = {
    "skew_forward_kl": [*NEAR_0, 0.4, 1 - 1e-3, 1 - 1e-6],
    "skew_reverse_kl": [*NEAR_0, 0.4, 1 - 1e-3, 1 - 1e-6],
    "jensen_shannon": [1e-12, 1e-6, 1e-3, 0.4, 1 - 1e-3, 1 - 1e-6],
    "renyi": [1e-6, 1e-3, 0.4, 1 - 1e-3, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1e-3, 3.0],
    "alpha_divergence": [*NEAR_0, 0.4, 1 - 1e-3, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1e-3],
}


def mp_kl(p, q):
    return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True))


def mp_mixture(p, q, weight):
    return [weight * x + (1 - weight) * y for x, y in zip(p, q, strict=True)]


def mp_jensen_shannon(p, q, weight):
    mixture = mp_mixture(p, q, weight)
    return weight * mp_kl(p, mixture) + (1 - weight) * mp_kl(q, mixture)


def mp_sum_of_powers(p, q, order):
    return mpmath.fsum(x**order * y ** (1 - order) for x, y in zip(p, q, strict=True))


IN_MPMATH = {  # a removable singularity is stepped over, by 1e-40
    "skew_forward_kl": lambda p, q, s: mp_kl(p, mp_mixture(p, q, s)),
    "skew_reverse_kl": lambda p, q, s: mp_kl(q, mp_mixture(q, p, s)),
    "jensen_shannon": mp_jensen_shannon,
    "renyi": lambda p, q, o: mpmath.log(mp_sum_of_powers(p, q, o)) / (o - 1),
    "alpha_divergence": lambda p, q, a: (mp_sum_of_powers(p, q, a) - 1) / (a * (a - 1)),
}


def mp_value_and_gradients(function, student_logits, teacher_logits, number):
    """Value, and gradients for the student, the teacher and the number, by differences."""
    step = mpmath.mpf("1e-25")

    def value(arguments):
        logits = arguments[:-1]
        exps = [mpmath.exp(x) for x in logits]
        halves = exps[: len(exps) // 2], exps[len(exps) // 2 :]
        q, p = ([x / mpmath.fsum(half) for x in half] for half in halves)
        return function(p, q, arguments[-1])

    at = [mpmath.mpf(float(x)) for x in (*student_logits, *teacher_logits, number)]
    at[-1] += mpmath.mpf("1e-40")
    slopes = []
    for i in range(len(at)):
        above, below = (
            value([x + sign * step * (i == j) for j, x in enumerate(at)]) for sign in (1, -1)
        )
        slopes.append((above - below) / (2 * step))
    k = len(student_logits)
    leaves = [value(at)], slopes[:k], slopes[k : 2 * k], slopes[2 * k :]
    return [np.array(leaf, float) for leaf in leaves]


@pytest.mark.parametrize("name", HARD_NUMBERS)
def test_digits_at_and_near_the_numbers_where_families_meet(name):
    """In float32, relative to the largest entry, against 120 digits."""
    function = getattr(divergences, name)
    (number_name,) = next(row.numbers for row in ROWS if row.function is function)
    cases = [(*pair, number) for pair in HARD_PAIRS for number in HARD_NUMBERS[name]]
    student, teacher, numbers = (np.array(x, np.float32) for x in zip(*cases, strict=True))
    value, gradients = value_and_gradients(function, student, teacher, {number_name: numbers})
    found = value, *gradients[:2], gradients[2][number_name]
    with mpmath.workdps(120):
        for i in range(len(cases)):
            true = mp_value_and_gradients(IN_MPMATH[name], student[i], teacher[i], numbers[i])
            for leaf, expected in zip(found, true, strict=True):
                np.testing.assert_allclose(
                    np.ravel(leaf[i]),
                    expected,
                    rtol=0,
                    atol=1e-5 * np.max(np.abs(expected)),
                    err_msg=str(cases[i]),
                )


@pytest.mark.parametrize(
    ("function", "numbers", "meets"),
    [
        ("skew_forward_kl", {"skew": 0.0}, "forward_kl"),
        ("skew_reverse_kl", {"skew": 0.0}, "reverse_kl"),
        ("renyi", {"order": 1.0}, "forward_kl"),
        ("alpha_divergence", {"alpha": 1.0}, "forward_kl"),
        ("alpha_divergence", {"alpha": 0.0}, "reverse_kl"),
        ("beta_divergence", {"beta": 0.0}, "forward_kl"),
        ("adaptive_kl", {"head_mass": 1.5}, "forward_kl"),
    ],
)
def test_families_meet(function, numbers, meets):
    logits = 2 * np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    found, of_found = value_and_gradients(getattr(divergences, function), *logits, numbers)
    expected, of_expected = value_and_gradients(getattr(divergences, meets), *logits, {})
    assert_close((found, of_found[:2]), (expected, of_expected[:2]), rtol=2e-6)


def test_families_that_vanish_at_an_end():
    logits = 2 * np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    for function, numbers in (
        (divergences.skew_forward_kl, {"skew": 1.0}),
        (divergences.skew_reverse_kl, {"skew": 1.0}),
        (divergences.renyi, {"order": 0.0}),
    ):
        value, gradients = value_and_gradients(function, *logits, numbers)
        np.testing.assert_array_equal(value, 0.0)
        for gradient in gradients[:2]:
            np.testing.assert_array_equal(gradient, 0.0)
    of_order = value_and_gradients(divergences.renyi, *logits, {"order": np.zeros(4, np.float32)})
    reverse = divergences.reverse_kl(*logits)
    np.testing.assert_allclose(of_order[1][2]["order"], reverse, rtol=1e-5)


def test_jeffreys_is_the_sum_of_both():
    logits = 2 * np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    found, forward, reverse = (
        value_and_gradients(function, *logits, {})
        for function in (divergences.jeffreys, divergences.forward_kl, divergences.reverse_kl)
    )
    assert_close(found, jax.tree.map(jnp.add, forward, reverse), rtol=2e-6)


@given(
    logits=hnp.arrays(np.float32, (2, *SHAPE), elements=st.floats(-20, 20, width=32)),
    alpha=hnp.arrays(np.float32, SHAPE[0], elements=st.floats(-2, 3, width=32)),
)
@settings(max_examples=50, deadline=None)
def test_alpha_and_beta_divergences_are_alpha_beta(logits, alpha):
    ones = np.ones_like(alpha)
    for function, numbers, expected in (
        ("alpha_divergence", {"alpha": alpha}, {"alpha": alpha, "beta": 1 - alpha}),
        ("beta_divergence", {"beta": alpha}, {"alpha": ones, "beta": alpha}),
    ):
        found, of_found = value_and_gradients(getattr(divergences, function), *logits, numbers)
        true, of_true = value_and_gradients(divergences.alpha_beta, *logits, expected)
        np.testing.assert_allclose(found, true, rtol=1e-6)
        for mine, other in zip(of_found[:2], of_true[:2], strict=True):
            sizes = np.max(np.abs(other), axis=-1, keepdims=True)
            assert (np.abs(mine - other) <= 1e-6 * sizes).all()


def peaked_rows():
    """Student and teacher logits, of which some make tiny gradients of large slopes."""
    rng = np.random.default_rng(11)
    scales = [(0.1, 5.0), (5.0, 0.1), (5.0, 5.0), (15.0, 5.0), (5.0, 15.0), (15.0, 15.0)]
    rows = [[scale * rng.normal(size=4) for scale in pair] for pair in scales]
    rows += [
        ([0.0, 1, 2, -1], [25.0, 0, -25, -9]),
        ([25.0, 0, -25, -9], [0.0, 1, 2, -1]),
        ([20.0, 19.3, -9, -9], [-9.0, -8, 3, 4]),
        ([-9.0, -8, 3, 4], [20.0, 19.3, -9, -9]),
    ]
    return np.moveaxis(np.array(rows, np.float32), 1, 0)


@pytest.mark.parametrize("skew", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_gradients_of_skewed_kl_have_their_digits_in_float32(name, skew):
    """Also where they are a billionth of the slopes that they are made of."""
    function, (student, teacher) = getattr(divergences, name), peaked_rows()
    _, found = value_and_gradients(function, student, teacher, {"skew": np.float32(skew)})
    for i in range(len(student)):
        with mpmath.workdps(80):
            true = mp_value_and_gradients(IN_MPMATH[name], student[i], teacher[i], np.float32(skew))
        for leaf, expected in zip(found[:2], true[1:3], strict=True):
            two_heads = i >= 8  # which the mixture bounds alike: their difference is rounded
            atol = 4e-7 if two_heads else 1e-5 * np.max(np.abs(expected))
            np.testing.assert_allclose(leaf[i], expected, rtol=0, atol=atol, err_msg=str(i))


@pytest.mark.parametrize("order", [0.5, 1.0, 1.5, 2.0, 5.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_renyi_of_a_row_without_classes_is_not_negative(order, side):
    logits = {name: np.array([[1.0, -2.0, 0.5]], np.float32) for name in ("student", "teacher")}
    for name in logits:
        if side in (name, "both"):
            logits[name] = np.full((1, 3), -np.inf, np.float32)
    function = bind(divergences.renyi, order=order)
    of_sum = lambda s, t: jnp.sum(function(s, t))  # noqa: E731
    value, slopes = jax.value_and_grad(of_sum, argnums=(0, 1))(*logits.values())
    assert value >= 0 and np.isfinite(value) and (side != "both" or value == 0)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_renyi_of_saturated_logits_keeps_its_digits():
    """Far where the sum of powers underflows, it is the log of the largest of them."""
    far = np.array([0.0, -1e4], np.float32)
    value = divergences.renyi(far, far[::-1], order=0.5)
    np.testing.assert_allclose(value, 1e4 - 2 * math.log(2), rtol=1e-6)


def test_renyi_where_one_class_is_all_of_the_sum_of_powers():
    """There it is (o log p - (o - 1) log q) / (o - 1) of that class."""
    student, teacher = np.array([[12.0, 0.0, -14.0], [-9.0, 3.0, 11.0]], np.float32)
    _, gradients = value_and_gradients(divergences.renyi, student, teacher, {"order": 3.0})
    p, q = (scipy.special.softmax(x.astype(float)) for x in (teacher, student))
    one_hot = np.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(gradients[0], q - one_hot, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradients[1], 1.5 * (one_hot - p), rtol=0, atol=1e-6)


# AKL and AlphaNet, against the rules as published, in torch.


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.8])
def test_adaptive_kl_as_published(head_mass):
    torch = pytest.importorskip("torch")
    student, teacher = 2 * np.random.default_rng(0).normal(size=(2, 16, 12))
    z_s, z_t = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    p, q = torch.softmax(z_t, -1), torch.softmax(z_s, -1)
    falling, order = p.sort(dim=-1, descending=True)
    error = (falling - q.detach().gather(-1, order)).abs()
    outside = falling.cumsum(-1) > head_mass
    outside[:, 0] = False
    share = (error * ~outside).sum(-1) / error.sum(-1)
    forward, reverse = ((a * (a.log() - b.log())).sum(-1) for a, b in ((p, q), (q, p)))
    true = share * forward + (1 - share) * reverse
    slopes = torch.autograd.grad(true.sum(), z_s)[0]
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(
            divergences.adaptive_kl, student, teacher, {"head_mass": np.full(16, head_mass)}
        )
    np.testing.assert_allclose(value, true.detach(), rtol=1e-12)
    np.testing.assert_allclose(gradients[0], slopes, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(gradients[2]["head_mass"], 0.0)


def test_the_weights_of_adaptive_kl():
    """They sum to 1, the head is never empty, and of equal classes the first come first."""
    adaptive = functools.partial(divergences.adaptive_kl, head_mass=0.6)
    log = lambda *p: np.log(np.array(p, np.float32))  # noqa: E731
    swapped = log(0.1, 0.2, 0.7), log(0.7, 0.2, 0.1)  # both divergences are the same
    np.testing.assert_allclose(adaptive(*swapped), divergences.forward_kl(*swapped), rtol=1e-6)
    in_tail = log(0.8, 0.05, 0.15), log(0.8, 0.15, 0.05)
    np.testing.assert_allclose(adaptive(*in_tail), divergences.reverse_kl(*in_tail), rtol=1e-5)
    uniform = np.zeros(4, np.float32)  # the head: classes 0 and 1
    for student, expected in (
        (log(0.4, 0.1, 0.25, 0.25), divergences.forward_kl),
        (log(0.25, 0.25, 0.4, 0.1), divergences.reverse_kl),
    ):
        np.testing.assert_allclose(
            adaptive(student, uniform), expected(student, uniform), rtol=1e-5
        )


def test_the_head_of_a_saturated_teacher_is_its_class_and_that_of_all_the_mass_is_everything():
    teacher = np.array([[300.0, -INF, 0, 5], [300, 0, 0, 1]], np.float32)
    student = np.array([[0.0, 1, 2, 3], [3, 2, 1, 0]], np.float32)
    for head_mass in (0.0, 0.3, 0.999):
        value = divergences.adaptive_kl(student, teacher, head_mass=head_mass)
        p, q = (scipy.special.softmax(x.astype(float), axis=-1) for x in (teacher, student))
        share = np.abs(p - q)[:, 0] / np.abs(p - q).sum(-1)
        parts = [d(student, teacher) for d in (divergences.forward_kl, divergences.reverse_kl)]
        np.testing.assert_allclose(value, share * parts[0] + (1 - share) * parts[1], rtol=1e-5)
    whole = divergences.adaptive_kl(student, teacher, head_mass=1.0)
    np.testing.assert_allclose(whole, divergences.forward_kl(student, teacher), rtol=1e-6)


def test_adaptive_kl_of_a_large_vocabulary_in_float32():
    """All classes but few lie below the step of fixed point in which the head is found."""
    rng = np.random.default_rng(0)
    student, teacher = (3.0 * rng.normal(size=(2, 4, 30_000))).astype(np.float32)
    teacher[:, :8] += 25
    for head_mass in (0.5, 0.9):
        value = divergences.adaptive_kl(student, teacher, head_mass=head_mass)
        p, q = (scipy.special.softmax(x.astype(float), axis=-1) for x in (teacher, student))
        true = [adaptive_kl(*row, head_mass) for row in zip(p, q, strict=True)]
        np.testing.assert_allclose(value, true, rtol=1e-4)


def torch_alphanet(torch, z_s, z_t, alpha, clip):
    """D and G, as published."""
    q, p = torch.softmax(z_s, -1).detach(), torch.softmax(z_t, -1)
    t = p / q
    if alpha == 0:
        t = t.clamp(0, clip)
        divergence, rho = -(q * t.log()).sum(-1), t.log() - 1
    elif alpha == 1:
        divergence, rho = (q * t * t.log()).sum(-1), t
    else:
        power = (t**alpha).clamp(0, clip)
        divergence = (q * (power - 1)).sum(-1) / (alpha * (alpha - 1))
        rho = power / alpha + 1 / (alpha * (alpha - 1))
    return divergence, -(q * rho * torch.log_softmax(z_s, -1)).sum(-1)


@pytest.mark.parametrize(
    ("alpha_min", "alpha_max", "clip"),
    [(-1.0, 1.0, 5.0), (0.0, 2.0, 50.0), (0.5, 2.0, 50.0), (1.0, 0.0, 1.2)],
)
def test_alphanet_as_published(alpha_min, alpha_max, clip):
    torch = pytest.importorskip("torch")
    student, teacher = 1.5 * np.random.default_rng(0).normal(size=(2, 32, 6))
    z_s, z_t = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    (low, of_low), (high, of_high) = (
        torch_alphanet(torch, z_s, z_t, alpha, clip) for alpha in (alpha_min, alpha_max)
    )
    assert 4 < int((low > high).sum()) < 28  # both alphas are chosen
    slopes = torch.autograd.grad(torch.where(low > high, of_low, of_high).sum(), z_s)[0]
    numbers = {"alpha_min": alpha_min, "alpha_max": alpha_max, "clip": clip}
    with jax.enable_x64(True):
        value, gradients = value_and_gradients(divergences.alphanet, student, teacher, numbers)
    np.testing.assert_allclose(value, torch.maximum(low, high), rtol=1e-12)
    np.testing.assert_allclose(gradients[0], slopes, rtol=0, atol=1e-12)
    for stopped in jax.tree.leaves(gradients[1:]):
        np.testing.assert_array_equal(stopped, 0.0)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0, 0.0, 1.0])
def test_alphanet_without_clipping_has_the_gradient_of_the_alpha_divergence(alpha):
    logits = np.random.default_rng(0).normal(size=(2, *SHAPE))
    numbers = {"alpha_min": alpha, "alpha_max": alpha, "clip": INF}
    with jax.enable_x64(True):
        found = value_and_gradients(divergences.alphanet, *logits, numbers)
        true = value_and_gradients(divergences.alpha_divergence, *logits, {"alpha": alpha})
    assert_close((found[0], found[1][0]), (true[0], true[1][0]), rtol=1e-12)


def test_logit_mse_counts_only_the_classes_that_exist():
    student = np.array([1.0, -INF, 2.0, -INF], np.float32)
    teacher = np.array([4.0, -INF, 2.5, -INF], np.float32)
    np.testing.assert_allclose(divergences.logit_mse(student, teacher), 4.625, rtol=1e-6)
    assert divergences.logit_mse(student[1::2], teacher[1::2]) == 0.0


def test_logit_mse_saturates_where_one_side_alone_has_no_class():
    """As the limit of a logit that falls, with slopes of the right sign."""
    whole, without = np.array([1.0, 0.5, 2.0]), np.array([1.0, -INF, 2.0])
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            student, teacher = whole.astype(dtype), without.astype(dtype)
            found, slopes = value_and_gradients(divergences.logit_mse, student, teacher, {})
            slopes = [np.asarray(x) for x in slopes]
            assert 1e14 < found < INF and np.isfinite(slopes[0]).all()
            assert slopes[0][1] > 0 and not slopes[0][[0, 2]].any()
            found, slopes = value_and_gradients(divergences.logit_mse, teacher, student, {})
            assert 1e14 < found < INF and np.isfinite(slopes[1]).all() and slopes[1][1] > 0


def test_jensen_shannon_at_the_ends_has_the_slopes_of_kl():
    row = Row("", divergences.jensen_shannon, {"teacher_weight": 0.0}, softmaxed(kl))
    student_logits, teacher_logits, _ = row.draw(dtype=np.float32)
    for weight, expected in (
        (0.0, divergences.forward_kl(student_logits, teacher_logits)),
        (1.0, -divergences.reverse_kl(student_logits, teacher_logits)),
    ):
        weights = {"teacher_weight": np.full(SHAPE[0], weight, np.float32)}
        value, gradients = value_and_gradients(
            row.function, student_logits, teacher_logits, weights
        )
        np.testing.assert_allclose(value, 0.0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(gradients[2]["teacher_weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("weight", [1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6])
def test_jensen_shannon_keeps_its_digits_near_the_ends(weight):
    row = Row("", divergences.jensen_shannon, {"teacher_weight": weight}, softmaxed(kl))
    args = row.draw(dtype=np.float32)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(np.float64), args)
        expected = jax.device_get(value_and_gradients(row.function, *exact))
    assert_close(value_and_gradients(row.function, *args), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "numbers", "bound"),
    [
        (divergences.total_variation, {}, 1.0),
        (divergences.jensen_shannon, {"teacher_weight": 0.5}, math.log(2)),
        (divergences.hellinger, {}, 4.0),
        (divergences.skew_forward_kl, {"skew": 0.1}, -math.log(0.1)),
        (divergences.skew_reverse_kl, {"skew": 0.1}, -math.log(0.1)),
    ],
    ids=["total_variation", "jensen_shannon", "hellinger", "skew_forward", "skew_reverse"],
)
def test_bounded_ones_reach_their_bound(function, numbers: dict[str, Any], bound):
    apart = np.array([0.0, -INF], np.float32)
    np.testing.assert_allclose(function(apart, apart[::-1], **numbers), bound, rtol=1e-6)
    far = np.array([0.0, -1e4], np.float32)
    np.testing.assert_allclose(function(far, far[::-1], **numbers), bound, rtol=1e-6)


def test_tempered_keeps_the_size_of_the_gradient():
    """T^2 KL at a high temperature tends to half the squared distance of centred logits / K."""
    student_logits, teacher_logits = np.random.default_rng(0).normal(size=(2, 5))
    difference = teacher_logits - student_logits
    expected = 0.5 * np.var(difference)
    with jax.enable_x64(True):
        value = divergences.tempered(
            student_logits, teacher_logits, divergence=divergences.forward_kl, temperature=1e4
        )
    np.testing.assert_allclose(value, expected, rtol=1e-3)
