"""Consecutive steps: many are as one by one, what is not finite, memory, the loop and its calls."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import data, losses, models, optimizers, train
from abkd_jax.binding import bind
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.sources import Source, dataset
from abkd_jax.train import Static, advance, begin, on_mesh, over_members, run_steps
from abkd_jax.train.checkpoint import FOLDER, Checkpoints
from abkd_jax.types import Batch, Outputs, Term

K, DIM, SIZE = 3, 6, 8
SGD = bind(optimizers.sgd, learning_rate=0.1, momentum=0.5)
ADVANCE = jax.jit(advance, static_argnames=("source", "count", "static"))
SOURCE = dataset()


def root(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    """Finite everywhere, but its gradient is not where the sum of the inputs is zero."""
    own = jnp.sum(student.logits, -1)
    return jnp.sqrt((own - jax.lax.stop_gradient(own)) + jnp.abs(jnp.sum(batch["inputs"], -1)))


TASK = {"task": Term(bind(losses.cross_entropy), jnp.ones(()))}
ROOT = TASK | {"root": Term(bind(root), jnp.ones(()))}


def examples(count=44, zero=None):
    """Vectors of which one may be zero, and labels."""
    labels = np.arange(count) % K
    inputs = np.random.default_rng(0).normal(size=(count, DIM)) + labels[:, None]
    if zero is not None:
        inputs[zero] = 0.0
    return inputs.astype(np.float32), labels


def set_of(train_examples, **options):
    parts = dict(train=train_examples, validation=None, test=examples())
    return data.from_arrays(**parts, num_classes=K, **options)


def feed_of(train_examples=None, size=SIZE):
    own = set_of(examples() if train_examples is None else train_examples)
    return data.Feed(own.train, own.preprocess, data_seed=0, size=size)


def learners(seed=0, **options):
    module = models.mlp(num_classes=K, widths=(5,))
    inputs = jnp.zeros((1, DIM))
    return {"student": train.create(module, inputs, init_seed=seed, optimizer=SGD, **options)}


def assert_equal(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
def test_steps_at_once_are_steps_one_by_one(start):
    """Parameters, moving averages, sums since the last multiple of log_every, the steps."""
    objectives, static = {"student": TASK}, Static(log_every=3)
    fed, until = feed_of()(start)
    assert until == 5
    carry = begin(learners(ema_decay=0.9), objectives, SOURCE)
    call = functools.partial(ADVANCE, static=static, source=SOURCE, examples=fed, data_seed=0)
    single = carry
    for step in range(start, start + 4):
        single = call(single, {}, objectives, step=step, count=1)
    at_once = call(carry, {}, objectives, step=start, count=4)
    assert_close(at_once, single)
    assert at_once.learners["student"].step == 4 and at_once.bad_step == -1
    last = call(single, {}, objectives, step=start + 4, count=1)
    fresh = (start + 4) % 3 == 0
    growth = last.sums["student/loss"] - (0 if fresh else single.sums["student/loss"])
    assert 0 < growth < 5


def test_the_sums_begin_anew_at_multiples_of_log_every():
    objectives, (fed, _) = {"student": TASK}, feed_of()(0)
    found = {}
    for every in (1, 2, 10):
        carry = begin(learners(), objectives, SOURCE)
        static = Static(log_every=every)
        for step in range(4):
            args = (carry, {}, objectives, SOURCE, fed, 0, step)
            carry = ADVANCE(*args, count=1, static=static)
            found[every, step] = float(carry.sums["student/loss"])
    each = [found[1, step] for step in range(4)]
    np.testing.assert_allclose([found[2, 1], found[2, 3]], [sum(each[:2]), sum(each[2:])], 1e-6)
    np.testing.assert_allclose(found[10, 3], sum(each), rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("count", [1, 5])
def test_a_gradient_that_is_not_finite_is_found_before_the_update(count, micro_batches):
    """The loss is finite; statistics, optimiser and averages stay, and so they do later on."""
    order = np.asarray(data.epoch_order(0, 0, 44))
    step_of_zero = 2
    fed, _ = feed_of(examples(zero=order[step_of_zero * SIZE + 3]))(0)
    state = learners(ema_decay=0.9)["student"]
    module = models.cnn(num_classes=K, widths=(4,), batch_norm=True)

    def apply(variables, inputs, *, train):
        images = inputs.reshape(len(inputs), 3, 2, 1)
        return module.apply(variables, images, train=train)

    del apply, state
    objectives = {"student": ROOT}
    static = Static(micro_batches, log_every=5)
    begun = begin(normed(), objectives, SOURCE)
    call = functools.partial(ADVANCE, static=static, source=SOURCE, examples=fed, data_seed=0)
    before = begun
    for step in range(step_of_zero):
        before = call(before, {}, objectives, step=step, count=1)
    carry = begun
    for step in range(0, 5, count):
        carry = call(carry, {}, objectives, step=step, count=count)
    assert carry.bad_step == step_of_zero
    bad = {name: float(x) for name, x in carry.bad.items()}
    assert np.isfinite(bad["student/loss"]) and np.isfinite(bad["student/root"])
    assert not np.isfinite(bad["student/gradient_norm"])
    after = carry.learners["student"]
    assert after.step == step_of_zero
    assert jax.tree.leaves(after.batch_stats) and jax.tree.leaves(after.ema_params)
    if count == 1:
        assert_equal(after, before.learners["student"])
    else:
        assert_close(after, before.learners["student"])
    assert_equal_finite(after)


def normed():
    """A student with batch norm on vectors, momentum and a moving average."""
    from flax import linen as nn

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, inputs, *, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(inputs))
            return Outputs(logits=nn.Dense(K)(nn.relu(x)))

    state = train.create(
        Normed(), jnp.zeros((1, DIM)), init_seed=0, optimizer=SGD, ema_decay=0.9
    )
    return {"student": state}


def assert_equal_finite(tree):
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
