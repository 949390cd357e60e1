"""Evaluation of networks on splits: the same on any devices and batches; task_test has scores."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import data, models, parallel, tasks, train
from abkd_jax.run.evaluation import evaluate, summarized
from abkd_jax.types import Outputs

K = 4


SIZE = 37  # a multiple of neither the batch sizes nor the numbers of devices


@functools.cache
def dataset():
    rng = np.random.default_rng(0)

    def examples(size):
        inputs = rng.integers(0, 256, (size, 4, 4, 1), dtype=np.uint8)
        return inputs, rng.integers(0, K, size)

    return data.from_arrays(
        train=examples(16), validation=None, test=examples(SIZE), num_classes=K, mean=(0.4,),
        std=(0.2,),
    )  # fmt: skip


@functools.cache
def networks():
    """Two of them, as training leaves them: one with a moving average and batch statistics."""
    inputs = next(data.evaluation_batches(dataset().test, 2, dataset().preprocess))["inputs"]
    modules = {
        "student": models.cnn(num_classes=K, widths=(4,), batch_norm=True),
        "teacher": models.mlp(num_classes=K, widths=(8,)),
    }
    states = {}
    for seed, (name, module) in enumerate(modules.items()):
        variables = module.init(jax.random.key(seed), inputs, train=False)
        states[name] = train.adopt(module.apply, variables)
    student = states["student"]
    halved = jax.tree.map(lambda x: 0.5 * x, student.params)
    shifted = jax.tree.map(lambda x: x + 0.25, student.batch_stats)
    return states | {"student": student.replace(ema_params=halved, batch_stats=shifted)}


def direct(name):
    """The logits of one forward pass on all examples, normalised by hand."""
    state = networks()[name]
    inputs = (np.asarray(dataset().test.inputs, np.float32) / 255 - 0.4) / 0.2
    params = state.params if state.ema_params is None else state.ema_params
    return state.forward(params, inputs.astype(np.float32), train=False)[0].logits


def evaluated(devices, size, task=None, gather=True, names=("student", "teacher")):
    mesh = parallel.mesh(devices, batch_size=8 * devices)
    chosen = {name: networks()[name] for name in names}
    how = dict(size=size, preprocess=dataset().preprocess, mesh=mesh, gather=gather)
    task = tasks.classification() if task is None else task
    return evaluate(chosen, dataset().test, task, **how)


@pytest.mark.parametrize("devices,size", [(1, 5), (1, 37), (1, 64), (2, 5), (8, 8), (8, 64)])
def test_gathered_logits_are_those_of_a_direct_forward_pass(devices, size):
    """Every example once, in order, whatever the padding."""
    _, rows = evaluated(devices, size)
    for name, found in rows.items():
        np.testing.assert_array_equal(found["labels"], dataset().test.labels)
        # float32: matrix products of other shapes may add in another order.
        np.testing.assert_allclose(found["logits"], direct(name), rtol=1e-5, atol=1e-5)
        assert np.ptp(direct(name)) > 0.1


@pytest.mark.parametrize("devices,size", [(1, 5), (8, 16)])
def test_the_summary_is_that_of_all_rows_at_once(devices, size):
    task = tasks.classification()
    summary, _ = evaluated(devices, size, gather=False)
    outputs = {name: Outputs(logits=direct(name)) for name in networks()}
    labels = jnp.asarray(dataset().test.labels)
    batch = {"labels": labels, "where": jnp.ones(SIZE, bool)}
    expected = task.summary(task.sums(outputs, batch, tuple(outputs)))
    for name in networks():
        assert set(summary[name]) == set(expected[name])
        for metric, value in summary[name].items():
            # The bins of the ECE and its sums are of float32, in another order.
            np.testing.assert_allclose(value, expected[name][metric], rtol=2e-5, err_msg=metric)


def test_without_a_wish_for_rows_there_are_none():
    summary, rows = evaluated(1, 16, gather=False, names=("student",))
    assert rows == {} and set(summary) == {"student"}


def test_rows_are_gathered_up_to_half_a_gigabyte_and_the_summary_is_of_all():
    """In float32; here each number is of one byte. At least the first batch is kept."""
    plain = tasks.classification()
    expected, _ = evaluated(1, 8, names=("student",))
    for width, kept in ((2**22, 4), (2**24, 1), (2**25, 1)):

        def rows(outputs, batch, width=width):
            return {"wide": jnp.zeros((*batch["labels"].shape, width), jnp.int8)}

        found, gathered = evaluated(1, 8, plain._replace(rows=rows), names=("student",))
        assert gathered["student"]["wide"].shape == (8 * kept, width)
        np.testing.assert_equal(found, expected)


def test_sums_of_members_are_summarised_for_each():
    """As a sweep has them: stacked along a first axis."""
    task, split = tasks.classification(), dataset().test
    scales = jnp.asarray([0.5, 2.0])
    logits = jax.random.normal(jax.random.key(0), (SIZE, K))

    def batches():
        for start in range(0, SIZE, 20):
            rows = slice(start, start + 20)
            where = jnp.ones_like(split.labels[rows], bool)
            yield {"inputs": logits[rows], "labels": split.labels[rows], "where": where}

    @jax.jit
    def of(batch, scale):
        return task.sums({"a": Outputs(logits=scale * batch["inputs"])}, batch, ("a",))

    stacked = summarized(lambda x: jax.vmap(of, (None, 0))(x, scales), task, batches())["a"]
    for index, scale in enumerate(scales):
        alone = summarized(lambda x, scale=scale: of(x, scale), task, batches())["a"]
        for metric, value in alone.items():
            np.testing.assert_allclose(stacked[metric][index], value, rtol=2e-5, err_msg=metric)
