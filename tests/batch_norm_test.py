"""Batch norm's running statistics against torch's, over several steps, types and devices."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from abkd_jax import models
from abkd_jax.models.batch_norm import BatchNorm

STEPS, C = 4, 5
SHAPES = {"images": (3, 4, 2, C), "vectors": (7, C), "two values": (2, C)}


def batches(shape, dtype=np.float32):
    rng = np.random.default_rng(0)
    spread, middle = rng.uniform(0.2, 3.0, C), rng.normal(size=C)
    return (middle + spread * rng.normal(size=(STEPS, *shape))).astype(dtype)


def norm(kind=BatchNorm, train=True, **hypers):
    return kind(use_running_average=not train, momentum=0.9, epsilon=1e-5, **hypers)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, x):
    return module.apply(variables, x, mutable=["batch_stats"])


def trained(module, inputs):
    """The variables after a step on each batch, and what came out of each."""
    variables, outputs = module.init(jax.random.key(0), inputs[0]), []
    for x in inputs:
        y, changed = apply(module, variables, x)
        variables = variables | changed
        outputs.append(y)
    return variables, outputs


def torch_statistics(inputs):
    torch = pytest.importorskip("torch", reason="torch is the oracle: pip install -e '.[torch]'")
    theirs = torch.nn.BatchNorm1d(C, momentum=0.1, eps=1e-5)
    for x in inputs:
        theirs(torch.tensor(x.reshape(-1, C).astype(np.float32)))
    return {"mean": theirs.running_mean.numpy(), "var": theirs.running_var.numpy()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_running_statistics_are_those_of_torch(shape):
    inputs = batches(shape)
    variables, _ = trained(norm(), inputs)
    for name, expected in torch_statistics(inputs).items():
        found = variables["batch_stats"][name]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_of_bfloat16_they_are_those_of_torch_on_the_same_values():
    inputs = batches(SHAPES["images"], jnp.bfloat16)
    variables, outputs = trained(norm(dtype=jnp.bfloat16), inputs)
    assert {y.dtype.name for y in outputs} == {"bfloat16"}
    for name, expected in torch_statistics(inputs).items():
        found = variables["batch_stats"][name]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_else_is_flax_bit_by_bit(dtype):
    inputs, kinds = batches(SHAPES["images"], jnp.dtype(dtype)), (BatchNorm, nn.BatchNorm)
    mine, theirs = (trained(norm(kind, dtype=jnp.dtype(dtype)), inputs) for kind in kinds)
    jax.tree.map(np.testing.assert_array_equal, mine[1], theirs[1])
    assert jax.tree.structure(mine[0]) == jax.tree.structure(theirs[0])
    mean = lambda variables: variables["batch_stats"]["mean"]  # noqa: E731
    np.testing.assert_array_equal(mean(mine[0]), mean(theirs[0]))
    of_both = [apply(norm(kind, train=False), mine[0], inputs[0]) for kind in kinds]
    jax.tree.map(np.testing.assert_array_equal, *of_both)


def test_gradients_are_those_of_flax():
    x = batches(SHAPES["images"])[0]
    variables = norm().init(jax.random.key(0), x)

    def loss(x, kind):
        y, _ = norm(kind).apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    slopes = [
        jax.jit(jax.grad(functools.partial(loss, kind=k)))(x) for k in (BatchNorm, nn.BatchNorm)
    ]
    np.testing.assert_array_equal(*slopes)


def test_of_one_value_the_variance_is_zero():
    variables, _ = trained(norm(), batches((1, C))[:1])
    np.testing.assert_allclose(variables["batch_stats"]["var"], np.full(C, 0.9), rtol=1e-6)


def test_a_batch_on_a_mesh_counts_the_values_of_all_devices():
    inputs = batches((8, 2, 2, C))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    spec = NamedSharding(mesh, PartitionSpec("data"))
    expected, _ = trained(norm(), inputs)
    found, _ = trained(norm(), [jax.device_put(x, spec) for x in inputs])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    "module",
    [
        models.resnet(num_classes=3, depth=8, widths=(4, 4, 6, 8)),
        models.cnn(num_classes=3, widths=(4, 6), batch_norm=True),
    ],
    ids=["resnet", "cnn"],
)
def test_every_model_with_batch_norm_has_this_one(module, monkeypatch):
    found = []

    def called(self, x):
        found.append(self.path)
        return nn.BatchNorm.__call__(self, x)

    monkeypatch.setattr(BatchNorm, "__call__", called)
    shapes = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(0), jnp.ones((2, 16, 16, 3))
    )
    stats = jax.tree_util.tree_leaves_with_path(shapes["batch_stats"])
    assert {tuple(key.key for key in path[:-1]) for path, _ in stats} == set(found)
