"""The networks of the benchmark and of ImageNet against torch's, read by their tensors' names."""

import functools

import jax
import numpy as np
import pytest
import torch_networks
from jax import numpy as jnp

from abkd_jax import models

K = 7
RES = dict(widths=(64, 64, 128, 256, 512))
CIFAR = ("shortcut", "linear")


def case(name, model, hypers, kind, options, parameters, *, classes=100, size=32, mark="nightly"):
    marks = [getattr(pytest.mark, mark)] if mark else []
    return pytest.param(
        model, hypers, kind, options, parameters, classes, size, id=name, marks=marks
    )


CASES = [
    case("wrn_16_1", "wide_resnet", dict(depth=16, widening=1), "wide", None, 180_916, mark=None),
    case("wrn_16_2", "wide_resnet", dict(depth=16, widening=2), "wide", None, 703_284),
    case("wrn_40_1", "wide_resnet", dict(depth=40, widening=1), "wide", None, 569_780),
    case("wrn_40_2", "wide_resnet", dict(depth=40, widening=2), "wide", None, 2_255_156),
    case("vgg8", "vgg", dict(depth=8), "vgg", None, 3_965_028, mark="long"),
    case("vgg8 of 64x64", "vgg", dict(depth=8), "vgg", None, 3_965_028, size=64),
    case("vgg11", "vgg", dict(depth=11), "vgg", None, 9_277_284),
    case("vgg13", "vgg", dict(depth=13), "vgg", None, 9_462_180),
    case("vgg16", "vgg", dict(depth=16), "vgg", None, 14_774_436),
    case("vgg19", "vgg", dict(depth=19), "vgg", None, 20_086_692),
    case("MobileNetV2", "mobilenet_v2", {}, "mobile_2", None, 812_836, mark="long"),
    case(
        "MobileNetV2 of width 1.5",
        "mobilenet_v2",
        dict(width=1.5, expansion=2),
        "mobile_2",
        None,
        2_459_620,
    ),
    case("ShuffleV1", "shufflenet_v1", {}, "shuffle_1", None, 949_258, mark="long"),
    case("ShuffleV2", "shufflenet_v2", {}, "shuffle_2", None, 1_355_528, mark="long"),
    case(
        "ResNet50",
        "imagenet_resnet",
        dict(depth=50, small_images=True),
        "residual",
        RES | dict(depths=(3, 4, 6, 3), bottleneck=True, names=CIFAR),
        23_705_252,
    ),
    case(
        "ResNet18 of small images",
        "imagenet_resnet",
        dict(depth=18, small_images=True),
        "residual",
        RES | dict(depths=(2, 2, 2, 2), names=CIFAR),
        11_220_132,
    ),
    case(
        "resnet18",
        "imagenet_resnet",
        dict(depth=18),
        "residual",
        RES | dict(depths=(2, 2, 2, 2), large=True),
        11_689_512,
        classes=1000,
        size=64,
        mark="long",
    ),
    case(
        "resnet34",
        "imagenet_resnet",
        dict(depth=34),
        "residual",
        RES | dict(depths=(3, 4, 6, 3), large=True),
        21_797_672,
        classes=1000,
        size=64,
    ),
    case(
        "resnet50",
        "imagenet_resnet",
        dict(depth=50),
        "residual",
        RES | dict(depths=(3, 4, 6, 3), large=True, bottleneck=True),
        25_557_032,
        classes=1000,
        size=64,
    ),
    case(
        "MobileNetV1",
        "mobilenet_v1",
        {},
        "mobile_1",
        None,
        4_231_976,
        classes=1000,
        size=64,
        mark="long",
    ),
]
every_network = pytest.mark.parametrize("model,hypers,kind,options,parameters,classes,size", CASES)


def shapes(module, size):
    inputs = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), inputs)


def images(size, batch=4):
    return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def tensors_of(network):
    return {name: x.detach().numpy().copy() for name, x in network.state_dict().items()}


def relative(found, expected):
    """The largest difference, beside the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@functools.partial(jax.jit, static_argnums=0)
def evaluated(module, variables, inputs):
    return module.apply(variables, inputs, train=False)


@functools.partial(jax.jit, static_argnums=0)
def trained(module, variables, inputs, weights):
    """Logits, statistics after them, and the gradients of their weighted sum."""

    def loss(params):
        own = {"params": params, "batch_stats": variables["batch_stats"]}
        outputs, changed = module.apply(own, inputs, train=True, mutable=["batch_stats"])
        return jnp.sum(outputs.logits * weights), (outputs.logits, changed["batch_stats"])

    gradient, (logits, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    return logits, stats, gradient


@pytest.mark.parametrize(
    "model,hypers,parameters,classes,size",
    [pytest.param(*(case.values[i] for i in (0, 1, 4, 5, 6)), id=case.id) for case in CASES],
)
def test_parameter_counts(model, hypers, parameters, classes, size):
    params = shapes(getattr(models, model)(num_classes=classes, **hypers), size)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.nightly
@every_network
def test_every_network_lowers(model, hypers, kind, options, parameters, classes, size):
    module = getattr(models, model)(num_classes=classes, **hypers)
    inputs = jax.ShapeDtypeStruct((8, size, size, 3), jnp.float32)
    weights = jax.ShapeDtypeStruct((8, classes), jnp.float32)
    step = jax.jit(functools.partial(trained.__wrapped__, module))
    lowered = jax.export.export(step, platforms=["tpu", "cuda"])
    assert lowered(shapes(module, size), inputs, weights).platforms == ("tpu", "cuda")


@every_network
def test_against_torch(torch, model, hypers, kind, options, parameters, classes, size):
    network = torch_networks.built(torch, kind, K, **(hypers if options is None else options))
    module = getattr(models, model)(num_classes=K, **hypers)
    own, tensors, inputs = shapes(module, size), tensors_of(network), images(size)
    variables = models.from_torch(tensors, module, own, origin="torch")
    x = torch.tensor(inputs.transpose(0, 3, 1, 2))

    # A round trip of the names is bitwise.
    again = models.to_torch(module, variables)
    if set(again) <= set(tensors):  # not by the second of its names
        counters = {name for name in tensors if name.endswith("num_batches_tracked")}
        assert again.keys() == tensors.keys() - counters
        for name, tensor in again.items():
            np.testing.assert_array_equal(tensor, tensors[name])
    once_more = models.from_torch(again, module, own, origin="torch")
    jax.tree.map(np.testing.assert_array_equal, once_more, variables)

    network.eval()
    with torch.no_grad():
        logits, features = network(x)
    outputs = evaluated(module, variables, inputs)
    assert relative(outputs.logits, logits) < 1e-5
    assert outputs.features.keys() == features.keys()
    for name, feature in features.items():
        assert relative(outputs.features[name], channels_last(feature)) < 1e-5, name

    # In double precision: where a rectifier turns in single, whole gradients move by percents.
    network.double().train()
    weights = np.random.default_rng(1).normal(size=(len(inputs), K)).astype(np.float32)
    logits, _ = network(x.double())
    (logits * torch.tensor(weights)).sum().backward()
    found, stats, gradient = trained(module, variables, inputs, weights)
    assert relative(found, logits.detach()) < 1e-4
    theirs = {name: x.grad.numpy() for name, x in network.named_parameters()}
    after = tensors_of(network) | theirs
    expected = models.from_torch(after, module, own, origin="torch")
    largest = max(np.linalg.norm(x) for x in theirs.values())
    for path, mine in jax.tree.leaves_with_path(gradient):
        other = functools.reduce(lambda tree, key: tree[key.key], path, expected["params"])
        error = np.linalg.norm(mine - other) / (np.linalg.norm(other) + 1e-3 * largest)
        assert error < 4e-2, path  # torch in single precision has up to 2e-2: rectifiers turn
    for path, mine in jax.tree.leaves_with_path(stats):
        other = functools.reduce(lambda tree, key: tree[key.key], path, expected["batch_stats"])
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "model,hypers,message",
    [
        ("wide_resnet", dict(depth=15, widening=1), "depth must be 6 n + 4, such as 16 or 40; fo"),
        ("wide_resnet", dict(depth=4, widening=1), "depth must be 6 n + 4, such as 16 or 40; fo"),
        ("wide_resnet", dict(depth=16, widening=0), "widening must be at least 1; found 0."),
        ("vgg", dict(depth=9), "depth must be one of [8, 11, 13, 16, 19]; found 9."),
        ("imagenet_resnet", dict(depth=20), "depth must be one of [18, 34, 50]; found 20."),
        ("mobilenet_v2", dict(width=0.01), "width must be at least 1/16; found 0.01."),
        ("mobilenet_v2", dict(expansion=0), "expansion must be at least 1; found 0."),
        ("shufflenet_v2", dict(size=0.7), "size must be one of [0.5, 1.0, 1.5, 2.0]; found 0.7."),
        *(
            (model, hypers | dict(dtype="float16"), "dtype must be one of float32, bfloat16; found")
            for model, hypers in [
                ("wide_resnet", dict(depth=16, widening=1)),
                ("vgg", dict(depth=8)),
                ("imagenet_resnet", dict(depth=18)),
                ("mobilenet_v1", {}),
                ("mobilenet_v2", {}),
                ("shufflenet_v1", {}),
                ("shufflenet_v2", {}),
            ]
        ),
    ],
)
def test_refusals(model, hypers, message):
    with pytest.raises(ValueError) as error:
        getattr(models, model)(num_classes=K, **hypers)
    assert str(error.value).startswith(f"{model}.{message}")
