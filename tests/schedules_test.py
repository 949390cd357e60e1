"""Schedules against optax's own and closed forms in numpy, at every step and beyond the ends."""

import collections

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from abkd_jax import schedules
from abkd_jax.binding import at_step, schedule

STEPS = np.arange(0, 41)  # every schedule below ends before 40


def numpy_linear(step, start, end, steps, begin=0):
    return start + (end - start) * np.clip((step - begin) / steps, 0, 1)


def numpy_cosine(step, start, end, steps, begin=0):
    fraction = np.clip((step - begin) / steps, 0, 1)
    return end + (start - end) * 0.5 * (1 + np.cos(np.pi * fraction))


def numpy_warmup_cosine(step, value, end, warmup_steps, steps):
    rise = numpy_linear(step, 0, value, warmup_steps) if warmup_steps else value
    fall = numpy_cosine(step, value, end, steps - warmup_steps, warmup_steps)
    return np.where(step < warmup_steps, rise, fall)


def numpy_piecewise(step, start, factor, boundaries):
    return start * factor ** sum((step >= boundary).astype(int) for boundary in boundaries)


# name, numbers, structure, optax's own, the closed form of (step, **numbers, **structure)
TABLE = [
    pytest.param(
        "constant",
        dict(value=0.7),
        {},
        optax.constant_schedule(0.7),
        lambda step, value: np.full(step.shape, value),
        id="constant",
    ),
    pytest.param(
        "linear",
        dict(start=1.0, end=0.3),
        dict(steps=20),
        optax.linear_schedule(1.0, 0.3, 20),
        numpy_linear,
        id="linear",
    ),
    pytest.param(
        "linear",
        dict(start=-2.0, end=5.0),
        dict(steps=7, begin=11),
        optax.linear_schedule(-2.0, 5.0, 7, 11),
        numpy_linear,
        id="linear after begin",
    ),
    pytest.param(
        "cosine",
        dict(start=2.0, end=0.0),
        dict(steps=25),
        optax.cosine_decay_schedule(2.0, 25),
        numpy_cosine,
        id="cosine to 0",
    ),
    pytest.param(
        "cosine",
        dict(start=0.4, end=1.0),
        dict(steps=20, begin=6),
        lambda step: 1 - 0.6 * optax.cosine_decay_schedule(1.0, 20)(np.maximum(step - 6, 0)),
        numpy_cosine,
        id="cosine upwards after begin",
    ),
    pytest.param(
        "warmup",
        dict(value=3.0),
        dict(steps=9),
        optax.warmup_constant_schedule(0.0, 3.0, 9),
        lambda step, value, steps: numpy_linear(step, 0, value, steps),
        id="warmup",
    ),
    pytest.param(
        "warmup_cosine",
        dict(value=0.1, end=0.01),
        dict(warmup_steps=5, steps=30),
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 30, 0.01),
        numpy_warmup_cosine,
        id="warmup_cosine",
    ),
    pytest.param(
        "warmup_cosine",
        dict(value=0.1, end=0.0),
        dict(warmup_steps=0, steps=30),
        optax.cosine_decay_schedule(0.1, 30),
        numpy_warmup_cosine,
        id="warmup_cosine without warm-up",
    ),
    pytest.param(
        "piecewise",
        dict(start=0.05, factor=0.1),
        dict(boundaries=(10, 20, 21)),
        optax.piecewise_constant_schedule(0.05, {10: 0.1, 20: 0.1, 21: 0.1}),
        numpy_piecewise,
        id="piecewise",
    ),
    pytest.param(
        "piecewise",
        dict(start=0.05, factor=0.1),
        dict(boundaries=()),
        optax.constant_schedule(0.05),
        lambda step, start, factor, boundaries: np.full(step.shape, start),
        id="piecewise without boundaries",
    ),
    pytest.param(
        "piecewise",
        dict(start=1.0, factor=2.5),
        dict(boundaries=(4, 30)),
        optax.piecewise_constant_schedule(1.0, {4: 2.5, 30: 2.5}),
        numpy_piecewise,
        id="piecewise upwards",
    ),
]
over_the_table = pytest.mark.parametrize("name,numbers,structure,of_optax,closed_form", TABLE)


def test_the_table_has_every_schedule():
    public = {
        name
        for name, fn in vars(schedules).items()
        if callable(fn)
        and getattr(fn, "__module__", "") == schedules.__name__
        and not name.startswith("_")
    }
    assert public == {case.values[0] for case in TABLE}


@over_the_table
def test_values(name, numbers, structure, of_optax, closed_form):
    bound = schedule(getattr(schedules, name), **numbers, **structure)
    traces = collections.Counter()

    @jax.jit
    def value(bound, step):
        traces[name] += 1
        return bound(step)

    actual = [value(bound, step) for step in STEPS]
    assert traces == {name: 1}  # the step is traced
    assert {x.dtype for x in actual} == {np.dtype(np.float32)} and {x.shape for x in actual} == {()}
    expected = closed_form(STEPS, **numbers, **structure)
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=5e-7)
    np.testing.assert_allclose(actual, [of_optax(s) for s in STEPS], rtol=2e-6, atol=5e-7)
    np.testing.assert_allclose(jax.vmap(bound)(STEPS), expected, rtol=2e-6, atol=5e-7)
    for step in (0, 5, 1_000_000):  # a Python integer, and far beyond the end
        exact = closed_form(np.array([step]), **numbers, **structure)[0]
        np.testing.assert_allclose(at_step(bound, step), exact, rtol=2e-6, atol=1e-7)


@over_the_table
def test_gradients_in_the_end_points(name, numbers, structure, of_optax, closed_form):
    del of_optax
    bound = schedule(getattr(schedules, name), **numbers, **structure)
    slopes = jax.vmap(jax.grad(lambda bound, step: bound(step)), (None, 0))(bound, STEPS)
    for number, actual in slopes.numbers.items():
        width = 1e-6
        moved = [numbers | {number: numbers[number] + sign * width} for sign in (1, -1)]
        above, below = (closed_form(STEPS, **values, **structure) for values in moved)
        expected = (above - below) / (2 * width)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@over_the_table
def test_a_sweep_over_end_points(name, numbers, structure, of_optax, closed_form):
    del of_optax
    members = {key: jnp.linspace(0.1, value, 3) for key, value in numbers.items()}
    sweep = jax.vmap(lambda n: schedule(getattr(schedules, name), **n, **structure))(members)
    actual = jax.vmap(lambda bound, step: at_step(bound, step), (0, None))(sweep, 8)
    for index, value in enumerate(actual):
        member = {key: float(part[index]) for key, part in members.items()}
        expected = closed_form(np.array([8]), **member, **structure)[0]
        np.testing.assert_allclose(value, expected, rtol=5e-6, atol=1e-7)


def test_the_ends_are_exact():
    start, end = np.float32(0.7), np.float32(0.1)
    for fn in (schedules.linear, schedules.cosine):
        bound = schedule(fn, start=start, end=end, steps=13, begin=3)
        for step in (0, 3):
            np.testing.assert_allclose(bound(step), start, rtol=2e-7)
        assert bound(16) == end and bound(17) == end and bound(3_000) == end
    assert schedule(schedules.warmup, value=end, steps=6)(0) == 0
    assert schedule(schedules.warmup, value=end, steps=6)(6) == end
    boundary = schedule(schedules.piecewise, start=1.0, factor=0.5, boundaries=[4])
    assert (boundary(3), boundary(4), boundary(5)) == (1.0, 0.5, 0.5)


def test_float64_where_it_is_on():
    with jax.enable_x64(True):
        bound = schedule(schedules.cosine, start=1, end=0.3, steps=20)
        actual = jax.jit(jax.vmap(bound))(STEPS)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, numpy_cosine(STEPS, 1, 0.3, 20), rtol=1e-14)


@pytest.mark.parametrize(
    "name,numbers,structure,expected",
    [
        pytest.param("linear", dict(start=2.0, end=1.0), dict(steps=0), 1.0, id="linear"),
        pytest.param("warmup", dict(value=2.0), dict(steps=0), 2.0, id="warmup"),
        pytest.param("cosine", dict(start=2.0, end=1.0), dict(steps=0), 1.0, id="cosine"),
        pytest.param(
            "warmup_cosine",
            dict(value=2.0, end=1.0),
            dict(warmup_steps=5, steps=5),
            1.0,
            id="warmup_cosine",
        ),
    ],
)
def test_no_steps_at_all_is_the_end_from_then_on_or_refused(name, numbers, structure, expected):
    try:
        value = schedule(getattr(schedules, name), **numbers, **structure)(5)
    except ValueError as error:
        assert str(error).startswith(f"{name}.steps must be ")
    else:
        assert value == expected
