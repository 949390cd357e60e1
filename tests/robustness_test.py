"""Attacks against their closed forms on a linear network, and their contracts on any."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from abkd_jax import metrics


def linear(seed=0, width=6, classes=2):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(width, classes)), jnp.float32)


def examples(seed=0, rows=16, width=6, low=0.2, high=0.8):
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(low, high, (rows, width)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(rng.integers(2, size=rows))


def cross_entropy(network, inputs, labels):
    log_q = jax.nn.log_softmax(network(inputs))
    return -np.take_along_axis(np.asarray(log_q), np.asarray(labels)[:, None], 1)[:, 0]


def attack(name, network, inputs, labels, radius, steps=10):
    if name == "fgsm":
        return metrics.fgsm(network, inputs, labels, radius=radius)
    options = dict(key=jax.random.key(1), radius=radius, step_size=radius / 2, steps=steps)
    return metrics.pgd(network, inputs, labels, **options)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_of_two_classes_a_linear_network_has_one_worst_input(name):
    """Its loss falls with (w_y - w_other) x, so every number moves by the radius against that."""
    weights, (inputs, labels) = linear(), examples()
    found = attack(name, lambda x: x @ weights, inputs, labels, 0.05)
    margin = np.asarray(weights[:, labels] - weights[:, 1 - labels]).T
    np.testing.assert_allclose(found, inputs - 0.05 * np.sign(margin), atol=1e-6)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), radius=st.floats(0.001, 0.5))
def test_contracts(name, seed, radius):
    first, second = linear(seed, 6, 5), linear(seed + 1, 5, 3)
    network = lambda x: jnp.tanh(x @ first) @ second  # noqa: E731
    inputs, labels = examples(seed, low=0.0, high=1.0)
    labels = labels.at[3].set(-1)
    found = attack(name, network, inputs, labels, radius)
    assert np.all((found >= 0) & (found <= 1))
    assert np.max(np.abs(found - inputs)) <= radius * (1 + 1e-5) + 1e-7
    np.testing.assert_array_equal(found[3], inputs[3])  # whose label is withheld
    # One row's attack is its own.
    alone = attack(name, network, inputs[:1], labels[:1], radius)
    if name == "fgsm":
        np.testing.assert_allclose(found[:1], alone, atol=1e-6)


def test_more_steps_raise_the_loss():
    first, second = linear(3, 6, 20), linear(4, 20, 3)
    network = lambda x: jnp.sin(3 * x @ first) @ second  # noqa: E731
    inputs, labels = examples(5, rows=200)
    losses = [cross_entropy(network, inputs, labels)]
    for steps in (1, 20):
        moved = attack("pgd", network, inputs, labels, 0.1, steps)
        losses.append(cross_entropy(network, moved, labels))
    means = [np.mean(x) for x in losses]
    assert means[0] < means[1] < means[2]


def test_a_radius_of_zero_changes_nothing():
    weights, (inputs, labels) = linear(), examples()
    for name in ("fgsm", "pgd"):
        found = attack(name, lambda x: x @ weights, inputs, labels, 0.0)
        np.testing.assert_array_equal(found, inputs)
