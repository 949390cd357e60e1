"""Optimisers against torch, and the training state that carries their numbers."""

import re
import sys

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from abkd_jax import models, optimizers, train
from abkd_jax.binding import bind, schedule
from abkd_jax.config.build import Builder
from abkd_jax.schedules import linear

STEPS = 6


def run(rule, params, gradients):
    """The parameters after each step, by the state's own update."""
    state = train.adopt(lambda variables, inputs: inputs, params, optimizer=rule)
    for gradient in gradients:
        state = state.apply_gradients(grads=gradient)
        yield state.params


TORCH = {
    "sgd": ({}, "SGD", {}),
    "sgd with momentum and L2": (
        {"momentum": 0.9, "weight_decay": 5e-2},
        "SGD",
        {"momentum": 0.9, "weight_decay": 5e-2},
    ),
    "sgd with Nesterov": (
        {"momentum": 0.9, "weight_decay": 5e-2, "nesterov": True},
        "SGD",
        {"momentum": 0.9, "weight_decay": 5e-2, "nesterov": True},
    ),
    "adam": ({"b1": 0.8, "b2": 0.95, "eps": 1e-4}, "Adam", {"betas": (0.8, 0.95), "eps": 1e-4}),
    "adamw": ({"weight_decay": 0.1}, "AdamW", {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("case", TORCH)
def test_optimisers_are_torchs(case):
    torch = pytest.importorskip("torch", reason="torch is the oracle: pip install -e '.[torch]'")
    ours, theirs, options = TORCH[case]
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=4), rng.normal(size=(STEPS, 4))
    rule = bind(getattr(optimizers, case.split()[0]), learning_rate=0.1, **ours)
    leaf = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    reference = getattr(torch.optim, theirs)([leaf], lr=0.1, **options)
    found = run(rule, jnp.asarray(start, jnp.float32), jnp.asarray(gradients, jnp.float32))
    for gradient, params in zip(gradients, found, strict=True):
        leaf.grad = torch.tensor(gradient, dtype=torch.float32)
        reference.step()
        np.testing.assert_allclose(params, leaf.detach().numpy(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_clipping_scales_the_gradient_to_the_norm(name):
    extra = {"weight_decay": 0.0} if name == "adamw" else {}
    clipped = bind(getattr(optimizers, name), learning_rate=0.1, clip_norm=0.5, **extra)
    free = bind(getattr(optimizers, name), learning_rate=0.1, **extra)
    gradients = [jnp.array([3.0, 4.0]), jnp.array([0.1, 0.2])]
    scaled = [gradients[0] / 10.0, gradients[1]]
    for found, expected in zip(
        run(clipped, jnp.ones(2), gradients), run(free, jnp.ones(2), scaled), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_decay_is_not_clipped():
    """The gradient is, before the decay is added, as by torch's clip_grad_norm_."""
    torch = pytest.importorskip("torch", reason="torch is the oracle: pip install -e '.[torch]'")
    start, gradients = np.array([20.0, -30.0]), [np.array([3.0, 4.0]), np.array([0.1, 0.2])]
    rule = bind(optimizers.sgd, learning_rate=0.1, momentum=0.9, weight_decay=0.3, clip_norm=0.5)
    leaf = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    reference = torch.optim.SGD([leaf], lr=0.1, momentum=0.9, weight_decay=0.3)
    found = run(rule, jnp.asarray(start, jnp.float32), jnp.asarray(gradients, jnp.float32))
    for gradient, params in zip(gradients, found, strict=True):
        leaf.grad = torch.tensor(gradient, dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_([leaf], 0.5)
        reference.step()
        np.testing.assert_allclose(params, leaf.detach().numpy(), rtol=1e-5)


def test_learning_rate_follows_its_schedule():
    rate = schedule(linear, start=1.0, end=0.0, steps=4)
    gradients = [jnp.ones(1)] * STEPS
    found = run(bind(optimizers.sgd, learning_rate=rate), jnp.zeros(1), gradients)
    rates = optax.linear_schedule(1.0, 0.0, 4)(np.arange(STEPS))
    np.testing.assert_allclose(np.ravel(list(found)), -np.cumsum(rates), rtol=1e-6)


def create(**kwargs):
    module = models.mlp(widths=(4,), num_classes=3)
    rule = bind(optimizers.sgd, learning_rate=kwargs.pop("learning_rate", 0.1))
    return train.create(module, jnp.ones((1, 5)), optimizer=rule, init_seed=0, **kwargs)


def test_moving_average_is_the_recursion():
    state = create(ema_decay=0.75)
    average = state.params
    for _ in range(3):
        state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, state.params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema_params, average
        )
    assert state.eval_params is state.ema_params
    plain = create()
    assert plain.ema_params is None and plain.eval_params is plain.params


def test_a_moving_average_follows_the_schedule_of_its_decay():
    """The decay of the first update is the schedule's start, as for every other number."""
    state = create(ema_decay=schedule(linear, start=0.75, end=0.0, steps=3))
    average = state.params
    for decay in (0.75, 0.5, 0.25, 0.0):
        state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
        mixed = lambda a, p, d=decay: d * a + (1 - d) * p  # noqa: E731
        average = jax.tree.map(mixed, average, state.params)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)  # noqa: E731
        jax.tree.map(close, state.ema_params, average)


def test_two_states_of_one_kind_have_one_structure():
    one, other = create(learning_rate=0.1), create(learning_rate=0.7)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_a_frozen_network_keeps_what_evaluation_uses():
    state = create(ema_decay=0.5)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    teacher = train.frozen(state)
    jax.tree.map(np.testing.assert_array_equal, teacher.params, state.ema_params)
    assert not jax.tree.leaves(teacher.opt_state)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            {"fn": "adm", "learning_rate": 0.1},
            "student.optimizer.fn: there is no optimizer 'adm' (did you mean 'adam'?); known are "
            "adam, adamw, sgd.",
        ),
        (
            {"fn": "of", "learning_rate": 0.1},
            "student.optimizer.fn: there is no optimizer 'of'; known are adam, adamw, sgd.",
        ),
        (
            {"learning_rate": 0.1},
            "student.optimizer must be a group dict(fn=NAME, ...) that names an optimizer; found "
            "{'learning_rate': 0.1}.",
        ),
        (
            {"fn": "sgd"},
            "student.optimizer.learning_rate is missing; sgd takes learning_rate, momentum, "
            "weight_decay, clip_norm, nesterov.",
        ),
        (
            {"fn": "adam", "learning_rate": 0.1, "beta": 0.1},
            "student.optimizer.beta is unknown; adam takes learning_rate, b1, b2, eps, clip_norm.",
        ),
        (
            {"fn": "adam", "learning_rate": -0.1},
            "student.optimizer.learning_rate must be at least 0 and finite; found -0.1.",
        ),
        (
            {"fn": "sgd", "learning_rate": 0.1, "clip_norm": 0.0},
            "student.optimizer.clip_norm must be greater than 0; found 0.0.",
        ),
        (
            {"fn": "sgd", "learning_rate": {"fn": "linear", "start": 1.0, "end": -1.0}},
            "student.optimizer.learning_rate must stay at least 0 and finite; found -0.25 on its "
            "way.",
        ),
        (
            {"fn": "sgd", "learning_rate": 0.1, "nesterov": 1},
            "student.optimizer.nesterov must be of type bool; found 1.",
        ),
    ],
)
def test_refusals(group, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Builder(num_steps=8).bound(group, "optimizer", "student.optimizer")


# --- of a plugin --------------------------------------------------------------------------------

OF_OPTAX = {
    "adabelief": {},
    "adafactor": {},
    "adagrad": {"initial_accumulator_value": 0.5},
    "adamaxw": {"weight_decay": 0.01},
    "lamb": {"b1": 0.8},
    "lars": {"weight_decay": 0.01},
    "lion": {"b1": 0.8},
    "nadam": {},
    "novograd": {},
    "radam": {},
    "rmsprop": {"decay": 0.8},
    "rprop": {},
    "yogi": {},
}
PLUGIN = """
import optax

from abkd_jax import NonNegative, Number
"""
FUNCTION = """

def {name}(*, learning_rate: NonNegative{numbers}) -> optax.GradientTransformation:
    return optax.{name}(learning_rate{passed})
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a module on the path, forgotten again after the test."""
    name, text = "abkd_optimizers_of_a_user", PLUGIN
    for function, numbers in OF_OPTAX.items():
        given = "".join(f", {number}: Number" for number in numbers)
        passed = "".join(f", {number}={number}" for number in numbers)
        text += FUNCTION.format(name=function, numbers=given, passed=passed)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", OF_OPTAX)
def test_any_optimiser_of_optax_is_one_function_of_a_plugin(plugin, name):
    """With a learning rate that is a schedule, against optax itself."""
    rate = dict(fn="linear", start=0.1, end=0.02, steps=4)
    group = dict(fn=f"{plugin}.{name}", learning_rate=rate, **OF_OPTAX[name])
    rule = Builder((plugin,)).bound(group, "optimizer", "student.optimizer")
    rng = np.random.default_rng(0)
    start, *gradients = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(4, 5)))
    rates = optax.linear_schedule(0.1, 0.02, 4)
    params, make = start, lambda step: getattr(optax, name)(rates(step), **OF_OPTAX[name])
    state = make(0).init(params)
    for step, found in enumerate(run(rule, start, gradients)):
        updates, state = make(step).update(gradients[step], state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(found, params, rtol=1e-5, atol=1e-7)
    assert not np.allclose(params, start)
