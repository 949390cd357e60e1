"""The small models: the parts of Outputs, parameters counted by hand, batch norm, refusals."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import models
from abkd_jax.types import Outputs

K = 5


def make(model, inputs, seed=0, **hypers):
    """The module and its variables."""
    module = models.from_config(model, hypers, num_classes=K, field="student")
    return module, init(module, jax.random.key(seed), inputs)


# Jitted: a convolution on its own compiles for longer than all of a network.
@functools.partial(jax.jit, static_argnums=0)
def init(module, key, inputs):
    return module.init(key, inputs, train=False)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(module, variables, inputs, *, train=False):
    """The outputs and the batch statistics after them."""
    outputs, changed = module.apply(variables, inputs, train=train, mutable=["batch_stats"])
    return outputs, changed.get("batch_stats", {})


def images(size=4, height=8, width=8, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(size, height, width, channels)), jnp.float32)


def num_parameters(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


CASES = [
    # model, keywords, inputs' shape, features' shapes, D, parameters by hand
    pytest.param(
        "mlp", dict(widths=(16,)), (8, 8, 1), [(16,)], 16, 64 * 16 + 16 + 16 * K + K, id="mlp"
    ),
    pytest.param(
        "mlp",
        dict(widths=[12, 7]),
        (10,),
        [(12,), (7,)],
        7,
        10 * 12 + 12 + 12 * 7 + 7 + 7 * K + K,
        id="mlp of two layers on vectors",
    ),
    pytest.param("mlp", dict(widths=()), (3, 2), [], 6, 6 * K + K, id="mlp without layers: linear"),
    pytest.param(
        "cnn",
        dict(widths=(4, 6)),
        (8, 8, 1),
        [(4, 4, 4), (2, 2, 6)],
        6,
        9 * 4 + 4 + 9 * 4 * 6 + 6 + 6 * K + K,
        id="cnn",
    ),
    pytest.param(
        "cnn",
        dict(widths=(4, 6), batch_norm=True),
        (7, 9, 3),
        [(4, 5, 4), (2, 3, 6)],
        6,
        9 * 3 * 4 + 2 * 4 + 9 * 4 * 6 + 2 * 6 + 6 * K + K,
        id="cnn with batch norm on odd sizes",
    ),
]
every_case = pytest.mark.parametrize("model,hypers,shape,features,width,parameters", CASES)


@every_case
def test_the_parts_of_outputs(model, hypers, shape, features, width, parameters):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)), jnp.float32)
    module, variables = make(model, inputs, **hypers)
    assert num_parameters(variables) == parameters
    outputs, _ = apply(module, variables, inputs)
    assert isinstance(outputs, Outputs)
    assert outputs.logits.shape == (3, K) and outputs.logits.dtype == np.float32
    assert outputs.hidden.shape == (3, width)
    assert outputs.unembedding.shape == (width, K) and outputs.bias.shape == (K,)
    assert [feature.shape for feature in outputs.features] == [(3, *f) for f in features]
    assert isinstance(outputs.features, tuple)
    assert outputs.projected is None and outputs.input_gradient is None
    exact = np.asarray(outputs.hidden, np.float64) @ np.asarray(outputs.unembedding, np.float64)
    np.testing.assert_allclose(outputs.logits, exact + outputs.bias, rtol=1e-5, atol=1e-6)
    # What it shows are its parameters, those of the head.
    head = {"kernel": jnp.full((width, K), 0.25), "bias": jnp.arange(K, dtype=jnp.float32)}
    variables = {**variables, "params": {**variables["params"], "head": head}}
    moved, _ = apply(module, variables, inputs)
    np.testing.assert_array_equal(moved.unembedding, head["kernel"])
    np.testing.assert_array_equal(moved.bias, head["bias"])
    np.testing.assert_array_equal(moved.hidden, outputs.hidden)
    expected = 0.25 * np.sum(outputs.hidden, -1, keepdims=True) + head["bias"]
    np.testing.assert_allclose(moved.logits, expected, rtol=1e-5, atol=1e-6)


def test_mlp_is_matrix_products_and_relu():
    inputs = images()
    module, variables = make("mlp", inputs, widths=(9, 6))
    outputs, _ = apply(module, variables, inputs)
    x = np.asarray(inputs, np.float64).reshape(4, -1)
    for index, width in enumerate((9, 6)):
        layer = variables["params"][f"Dense_{index}"]
        x = np.maximum(x @ np.asarray(layer["kernel"], np.float64) + layer["bias"], 0)
        assert x.shape == (4, width)
        np.testing.assert_allclose(outputs.features[index], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.hidden, x, rtol=1e-5, atol=1e-6)


def test_hidden_of_the_cnn_is_the_mean_over_positions():
    inputs = images()
    module, variables = make("cnn", inputs, widths=(4, 6))
    outputs, _ = apply(module, variables, inputs)
    assert min(np.min(feature) for feature in outputs.features) == 0  # after the rectifier
    expected = np.mean(outputs.features[-1], axis=(1, 2))
    np.testing.assert_allclose(outputs.hidden, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "model,hypers",
    [("mlp", dict(widths=(6,))), ("cnn", dict(widths=(4,)))],
)
def test_without_batch_norm_training_makes_no_difference(model, hypers):
    inputs = images()
    module, variables = make(model, inputs, **hypers)
    assert set(variables) == {"params"}
    train, changed = apply(module, variables, inputs, train=True)
    evaluation, _ = apply(module, variables, inputs)
    assert changed == {}
    jax.tree.map(np.testing.assert_array_equal, train, evaluation)


def test_batch_norm_uses_the_batch_in_training_and_the_statistics_in_evaluation():
    inputs = 3 + 2 * images(size=32)
    module, variables = make("cnn", inputs, widths=(4,), batch_norm=True)
    assert set(variables) == {"params", "batch_stats"}
    (stats,) = variables["batch_stats"].values()
    np.testing.assert_array_equal(stats["mean"], np.zeros(4))
    np.testing.assert_array_equal(stats["var"], np.ones(4))
    conv = variables["params"]["Conv_0"]
    assert set(conv) == {"kernel"}  # its bias would be subtracted again
    before = jax.lax.conv_general_dilated(
        inputs, conv["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, variance = np.mean(before, (0, 1, 2)), np.var(before, (0, 1, 2))
    train, changed = apply(module, variables, inputs, train=True)
    expected = np.maximum((before - mean) / np.sqrt(variance + 1e-5), 0)
    np.testing.assert_allclose(train.features[0], expected, rtol=1e-3, atol=1e-4)
    (stats,) = changed.values()
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    evaluation, unchanged = apply(module, variables, inputs)
    jax.tree.map(np.testing.assert_array_equal, unchanged, variables["batch_stats"])
    expected = np.maximum(before / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(evaluation.features[0], expected, rtol=1e-3, atol=1e-4)
    assert np.max(np.abs(train.logits - evaluation.logits)) > 0.1
    # A row alone is evaluated as it is in the batch, but not trained so.
    one, _ = apply(module, variables, inputs[:1])
    np.testing.assert_allclose(one.logits, evaluation.logits[:1], rtol=1e-5, atol=1e-6)
    one, _ = apply(module, variables, inputs[:1], train=True)
    assert np.max(np.abs(one.logits - train.logits[:1])) > 1e-3


def test_one_seed_one_network():
    inputs = images()
    first, again, other = (make("mlp", inputs, seed, widths=(6,))[1] for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [v["params"]["head"]["kernel"] for v in (first, other)]
    assert np.all(np.asarray(kernels[0]) != np.asarray(kernels[1]))


def test_modules_of_one_config_are_one_to_jit():
    modules = [
        models.from_config("mlp", {"widths": widths}, num_classes=K, field="x")
        for widths in ((8,), [8], (9,))
    ]
    assert modules[0] == modules[1] and hash(modules[0]) == hash(modules[1])
    assert modules[0] != modules[2]


@pytest.mark.parametrize(
    "model,hypers,message",
    [
        (
            "mpl",
            {},
            "peer.model must be one of cnn, mlp, resnet; found 'mpl' (did you mean 'mlp'?).",
        ),
        ("vit", {}, "peer.model must be one of cnn, mlp, resnet; found 'vit'."),
        (None, {}, "peer.model must be one of cnn, mlp, resnet; found None."),
        (
            "mlp",
            dict(width=(16,)),
            "peer.width is unknown (did you mean 'widths'?); mlp takes widths.",
        ),
        (
            "mlp",
            dict(widths=(16,), batch_norm=True),
            "peer.batch_norm is unknown; mlp takes widths.",
        ),
        ("mlp", {}, "peer.widths is missing; mlp takes widths."),
        ("cnn", dict(batch_norm=True), "peer.widths is missing; cnn takes widths, batch_norm."),
        ("mlp", dict(widths=16), "peer.widths must be of type tuple; found 16."),
        ("cnn", dict(widths=(4,), batch_norm=1), "peer.batch_norm must be of type bool; found 1."),
    ],
)
def test_refusals(model, hypers, message):
    with pytest.raises(ValueError) as error:
        models.from_config(model, hypers, num_classes=K, field="peer")
    assert str(error.value).startswith(message) and str(error.value).endswith(".")
    if "known are" in message:
        known = str(error.value).partition("known are ")[2]
        assert {"cnn", "mlp"} <= set(known.removesuffix(".").split(", "))


@pytest.mark.parametrize(
    "model,hypers",
    [
        pytest.param(["mlp"], dict(widths=(4,)), id="a list for a name"),
        pytest.param("mlp", dict(widths=(4.5,)), id="a width that is no integer"),
        pytest.param("mlp", dict(widths=("4",)), id="a width in a string"),
        pytest.param("mlp", dict(widths=[[4]]), id="nested widths"),
        pytest.param("mlp", dict(widths=(0,)), id="no width"),
        pytest.param("mlp", dict(widths=(-4,)), id="a negative width"),
    ],
)
def test_also_refused_by_field(model, hypers):
    with pytest.raises(ValueError, match=r"^peer"):
        models.from_config(model, hypers, num_classes=K, field="peer")


def test_the_number_of_classes_is_not_the_configs_to_give():
    hypers = dict(widths=(4,), num_classes=3)
    with pytest.raises(ValueError, match=r"^peer.*num_classes") as error:
        models.from_config("mlp", hypers, num_classes=K, field="peer")
    assert "multiple values for keyword argument" not in str(error.value)
