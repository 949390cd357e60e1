"""The small models: the parts of Outputs, parameters counted by hand, batch norm, wrappers."""

import functools
import inspect

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from abkd_jax import binding, data, models
from abkd_jax.models.convolution import convolution
from abkd_jax.types import Outputs

K = 5


def make(model, inputs, seed=0, **hypers):
    """The module and its variables."""
    module = getattr(models, model)(num_classes=K, **hypers)
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
    assert outputs.head.unembedding.shape == (width, K) and outputs.head.bias.shape == (K,)
    found = {name: feature.shape for name, feature in outputs.features.items()}
    assert found == {f"layer{i}": (3, *feature) for i, feature in enumerate(features)}
    assert outputs.projected is None and outputs.input_gradient is None
    exact = np.asarray(outputs.hidden, np.float64) @ np.asarray(
        outputs.head.unembedding, np.float64
    )
    np.testing.assert_allclose(outputs.logits, exact + outputs.head.bias, rtol=1e-5, atol=1e-6)
    # What it shows are its parameters, those of the head.
    head = {"kernel": jnp.full((width, K), 0.25), "bias": jnp.arange(K, dtype=jnp.float32)}
    variables = {**variables, "params": {**variables["params"], "head": head}}
    moved, _ = apply(module, variables, inputs)
    np.testing.assert_array_equal(moved.head.unembedding, head["kernel"])
    np.testing.assert_array_equal(moved.head.bias, head["bias"])
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
        np.testing.assert_allclose(outputs.features[f"layer{index}"], x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs.hidden, x, rtol=1e-5, atol=1e-6)


def test_hidden_of_the_cnn_is_the_mean_over_positions():
    inputs = images()
    module, variables = make("cnn", inputs, widths=(4, 6))
    outputs, _ = apply(module, variables, inputs)
    assert min(np.min(feature) for feature in outputs.features.values()) == 0  # after the rectifier
    expected = np.mean(outputs.features["layer1"], axis=(1, 2))
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
    np.testing.assert_allclose(train.features["layer0"], expected, rtol=1e-3, atol=1e-4)
    (stats,) = changed.values()
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-4)
    unbiased = np.var(before, (0, 1, 2), ddof=1)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * unbiased, rtol=1e-4)
    evaluation, unchanged = apply(module, variables, inputs)
    jax.tree.map(np.testing.assert_array_equal, unchanged, variables["batch_stats"])
    expected = np.maximum(before / np.sqrt(1 + 1e-5), 0)
    np.testing.assert_allclose(evaluation.features["layer0"], expected, rtol=1e-3, atol=1e-4)
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
    modules = [models.mlp(num_classes=K, widths=widths) for widths in ((8,), [8], (9,))]
    assert modules[0] == modules[1] and hash(modules[0]) == hash(modules[1])
    assert modules[0] != modules[2]


@pytest.mark.parametrize("model", [models.mlp, models.cnn])
@pytest.mark.parametrize("widths", [(0,), (4, -4)])
def test_refusals(model, widths):
    with pytest.raises(ValueError) as error:
        model(num_classes=K, widths=widths)
    assert str(error.value) == (f"{model.__name__}.widths must be at least 1 each; found {widths}.")


@pytest.mark.parametrize(
    "model", [models.mlp, models.cnn, models.resnet, models.decoder, models.hugging_face]
)
def test_a_config_can_give_every_keyword(model):
    keywords = binding.hyperparameters(model)
    assert keywords.pop("num_classes").annotation is int
    for annotation in (keyword.annotation for keyword in keywords.values()):
        assert binding.is_static(annotation) or binding.domain_of(annotation)
    assert inspect.signature(model).return_annotation is nn.Module


# --- wrappers -----------------------------------------------------------------------------------


class Foreign(nn.Module):
    """Returns logits, and knows of no training."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(x.reshape(len(x), -1))


class Embedding(nn.Module):
    """Of ids, beside a number for each."""

    @nn.compact
    def __call__(self, inputs, *, train):
        return nn.Dense(K)(nn.Embed(9, 4)(inputs["ids"]) * inputs["numbers"][..., None])


MODULES = [models.cnn(num_classes=K, widths=(4,), batch_norm=True), Foreign()]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("normal", [{}, dict(mean=(0.3, 0.5), std=(0.2, 0.4))])
def test_a_normalised_network_takes_what_a_set_stores(module, dtype, normal):
    drawn = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 2)).astype(dtype)
    stored = jnp.asarray(drawn)
    options = {name: jnp.asarray(numbers, jnp.float32) for name, numbers in normal.items()}
    inputs = data.normalized(stored, data.Preprocess(**options))
    call = models.as_outputs(module.apply)
    variables = module.init(jax.random.key(0), inputs, **given_train(module))
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    normalised = models.normalized(module, **(normal or dict(mean=None, std=None)))
    expected, _ = call(variables, inputs, train=False, key=None)
    wrapped = models.as_outputs(normalised.apply)
    found, _ = wrapped(variables, stored, train=False, key=None)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    own = jax.tree.map(jnp.shape, normalised.init(jax.random.key(0), stored, train=False)["params"])
    assert own == jax.tree.map(jnp.shape, variables["params"])


def given_train(module):
    return {} if isinstance(module, Foreign) else {"train": False}


def test_ids_are_not_normalised():
    inputs = {"ids": jnp.arange(8).reshape(2, 4), "numbers": jnp.ones((2, 4))}
    module = Embedding()
    variables = module.init(jax.random.key(0), inputs, train=False)
    normalised = models.normalized(module, mean=None, std=None)
    found = normalised.apply(variables, inputs, train=False).logits
    np.testing.assert_array_equal(found, module.apply(variables, inputs, train=False))


def test_a_projection_is_beside_the_network():
    inputs, plain = images(), models.cnn(num_classes=K, widths=(4, 6))
    both = models.projected(plain, hidden=7)
    variables = both.init(jax.random.key(1), inputs, train=False)
    outputs = both.apply(variables, inputs, train=False)
    alone = models.without_projections(variables["params"])
    expected = plain.apply({"params": alone}, inputs, train=False)
    np.testing.assert_allclose(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)
    (projection,) = (
        variables["params"][name] for name in variables["params"].keys() - alone.keys()
    )
    by_hand = expected.hidden @ projection["kernel"] + projection["bias"]
    np.testing.assert_allclose(outputs.projected["hidden"], by_hand, rtol=1e-5, atol=1e-5)
    assert outputs.features.keys() == {"layer0", "layer1"}
    assert models.without_projections(alone) is alone


@pytest.mark.parametrize(
    ("batch", "devices", "parts"), [(62, 1, 1), (64, 1, 8), (100, 1, 4), (64, 8, 1)]
)
def test_one_cpu_takes_a_large_batch_in_parts(batch, devices, parts, monkeypatch):
    x, module = images(batch, channels=3), convolution(4, 3, 2, dtype="float32", name="conv")
    kernel = module.init(jax.random.key(0), x[:1])["params"]["kernel"]

    def ours(kernel, x):
        return module.apply({"params": {"kernel": kernel}}, x)

    def whole(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers
        )

    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    cosine = jnp.cos(jnp.arange(batch * 4 * 4 * 4).reshape(batch, 4, 4, 4))  # a cotangent
    (found, back), (expected, expected_back) = (
        jax.vjp(jax.jit(fn), kernel, x) for fn in (ours, whole)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for gradient, of_whole in zip(back(cosine), expected_back(cosine), strict=True):
        np.testing.assert_allclose(gradient, of_whole, rtol=1e-4, atol=1e-4)
    both, found = jnp.stack([kernel, 2 * kernel]), []  # of members, differentiated twice
    for fn in (ours, whole):
        slope = jax.grad(lambda kernel, fn=fn: jnp.sum(fn(kernel, x) ** 3))
        curve = jax.jit(jax.vmap(lambda kernel, of=slope: jax.jvp(of, (kernel,), (kernel,))[1]))
        found.append(curve(both))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4 * jnp.max(jnp.abs(found[1])))
    for platform, count in ("cpu", parts), ("tpu", 1):
        lowered = jax.jit(ours).trace(kernel, x).lower(lowering_platforms=(platform,))
        assert lowered.as_text().count("stablehlo.convolution") == count
