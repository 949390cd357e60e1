"""Networks that know nothing of this library, as learners and as teachers."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from abkd_jax import bind, models, optimizers, train
from abkd_jax.models import as_outputs, split_variables
from abkd_jax.types import Outputs

K, D, B = 4, 6, 16


class Plain(nn.Module):
    """Logits, and no train."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.relu(nn.Dense(self.width)(x)))


class Normed(nn.Module):
    """Batch norm and dropout."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        return nn.Dense(K)(x)


class Dropped(nn.Module):
    """Dropout alone."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(K)(nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(8)(x))))


class Told(nn.Module):
    """Batch norm and dropout by the words of other libraries."""

    @nn.compact
    def __call__(self, x, use_running_average=True, *, deterministic=True):
        x = nn.BatchNorm(use_running_average=use_running_average, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(K)(nn.Dropout(0.5)(nn.relu(x), deterministic=deterministic))


class NnxDropped(nnx.Module):
    """Batch norm, and dropout of two streams, with a list of layers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, 8, rngs=rngs), nnx.Linear(8, K, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drops = nnx.List([nnx.Dropout(0.3, rngs=rngs), nnx.Dropout(0.3, rngs=nnx.Rngs(5))])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.layers[0](x)))
        return self.layers[1](self.drops[1](self.drops[0](x)))


class Nnx(nnx.Module):
    def __init__(self, rngs, batch_norm=False):
        self.first = nnx.Linear(D, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if batch_norm else None
        self.last = nnx.Linear(8, K, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        x = x if self.norm is None else self.norm(x)
        return self.last(nnx.relu(x))


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    labels = jnp.asarray(rng.integers(0, K, B))
    inputs = jnp.asarray(1 + 2 * rng.normal(size=(B, D)), jnp.float32)
    return {"inputs": inputs, "labels": labels}


def linen(module, seed=0):
    return module.apply, module.init(jax.random.key(seed), jnp.zeros((1, D)), train=False)


def plain_linen(seed=0):
    module = Plain()
    return module.apply, module.init(jax.random.key(seed), jnp.zeros((1, D)))


def around_linen(seed=0):
    """A function of a linen module's variables, which says itself what training is."""
    module = Normed()
    return lambda v, x: module.apply(v, x, train=False), linen(module, seed)[1]


def around_plain_linen(seed=0):
    module = Plain()
    return lambda v, x: module.apply(v, x), plain_linen(seed)[1]


def nnx_network(seed=0):
    graphdef, state = nnx.split(Nnx(nnx.Rngs(seed)))
    return lambda state, x: nnx.merge(graphdef, state)(x), state


def nnx_batch_norm(seed=0):
    """In evaluation: its statistics are no parameters."""
    model = Nnx(nnx.Rngs(seed), batch_norm=True)
    model(make_batch()["inputs"])  # in training still: moves the statistics
    model.eval()
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    call = lambda v, x: nnx.merge(graphdef, v["params"], v["batch_stats"])(x)  # noqa: E731
    return call, {"params": params, "batch_stats": stats}


def haiku_style(seed=0):
    """A pure function of a nested dictionary."""
    keys = jax.random.split(jax.random.key(seed))
    params = {
        "linear": {"w": 0.5 * jax.random.normal(keys[0], (D, 8)), "b": jnp.zeros(8)},
        "linear_1": {"w": 0.5 * jax.random.normal(keys[1], (8, K)), "b": jnp.zeros(K)},
    }

    def apply(params, x):
        first, last = params["linear"], params["linear_1"]
        return jax.nn.relu(x @ first["w"] + first["b"]) @ last["w"] + last["b"]

    return apply, params


def equinox_style(seed=0):
    """A pytree that is no mapping, for one example, and parts of Outputs."""
    first, last = jax.tree.leaves(haiku_style(seed)[1])[1::2]

    def one(layers, x):
        hidden = jnp.tanh(x @ layers[0])
        return Outputs(logits=hidden @ layers[1], hidden=hidden)

    return lambda layers, x: jax.vmap(one, (None, 0))(layers, x), (first, last)


NETWORKS = {
    "linen": plain_linen,
    "linen, batch norm": lambda seed=0: linen(Normed(), seed),
    "linen, batch norm and dropout": lambda seed=0: linen(Normed(rate=0.5), seed),
    "linen, dropout": lambda seed=0: linen(Dropped(), seed),
    "a function around linen": around_plain_linen,
    "a function around linen with batch norm": around_linen,
    "linen, told otherwise": lambda seed=0: (
        Told().apply,
        Told().init(jax.random.key(seed), jnp.zeros((1, D))),
    ),
    "NNX": nnx_network,
    "NNX, as it is": lambda seed=0: models.from_nnx(Nnx(nnx.Rngs(seed))),
    "NNX, batch norm": lambda seed=0: models.from_nnx(Nnx(nnx.Rngs(seed), batch_norm=True)),
    "NNX, batch norm and dropout": lambda seed=0: models.from_nnx(NnxDropped(nnx.Rngs(seed))),
    "NNX, batch norm in evaluation": nnx_batch_norm,
    "a pure function of dictionaries": haiku_style,
    "a pure function of tuples": equinox_style,
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


class Network(NamedTuple):
    """What a training state has of a network."""

    apply_fn: Any
    params: Any
    batch_stats: Any

    def forward(self, params, inputs, *, train, key=None):
        variables = {"params": params, "batch_stats": self.batch_stats}
        return self.apply_fn(variables, inputs, train=train, key=key)


def adopt(apply_fn, variables):
    return Network(as_outputs(apply_fn), *split_variables(apply_fn, variables))


def stepped(network, batch, key):
    """The loss of a network, and the network after a step of gradient descent."""

    def loss(params):
        outputs, batch_stats = network.forward(params, batch["inputs"], train=True, key=key)
        logs = jax.nn.log_softmax(outputs.logits)
        return -jnp.mean(logs[jnp.arange(B), batch["labels"]]), batch_stats

    (value, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(network.params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, network.params, grads)
    return value, network._replace(params=params, batch_stats=batch_stats)


def changed(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [not np.array_equal(a, b) for a, b in pairs]


@every_network
def test_a_learner(make):
    network = before = adopt(*make(0))
    values = []
    for step in range(12):
        value, network = stepped(network, make_batch(), jax.random.key(step))
        values.append(float(value))
    assert np.mean(values[-3:]) < np.mean(values[:3])
    assert all(changed(before.params, network.params))


@every_network
def test_a_teacher(make):
    apply_fn, variables = make(0)
    network = adopt(apply_fn, variables)
    outputs, stats = network.forward(network.params, make_batch()["inputs"], train=False)
    expected = apply_fn(variables, make_batch()["inputs"])
    expected = expected.logits if isinstance(expected, Outputs) else expected
    np.testing.assert_allclose(outputs.logits, expected, rtol=1e-6, atol=1e-6)
    assert not any(changed(stats, network.batch_stats))


@pytest.mark.parametrize(
    "make", [NETWORKS["linen, batch norm"], NETWORKS["linen, batch norm and dropout"]]
)
def test_linens_statistics_move_in_training_as_linen_moves_them(make):
    apply_fn, variables = make(0)
    state, batch = adopt(apply_fn, variables), make_batch()
    assert set(variables) == {"params", "batch_stats"}
    key = jax.random.key(3)
    outputs, stats = state.forward(state.params, batch["inputs"], train=True, key=key)
    logits, expected = apply_fn(
        variables, batch["inputs"], train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    np.testing.assert_array_equal(outputs.logits, logits)
    jax.tree.map(np.testing.assert_array_equal, stats, expected["batch_stats"])
    assert all(changed(stats, state.batch_stats))
    outputs, stats = state.forward(state.params, batch["inputs"], train=False)
    np.testing.assert_array_equal(outputs.logits, apply_fn(variables, batch["inputs"]))
    assert not any(changed(stats, state.batch_stats))


def test_dropout_has_the_steps_key_in_training_only():
    state, inputs = adopt(*linen(Dropped())), make_batch()["inputs"]
    forward = functools.partial(state.forward, state.params, inputs)
    logits = [forward(train=True, key=jax.random.key(k))[0].logits for k in (0, 0, 1)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.any(logits[0] != logits[2])
    evaluations = [forward(train=False, key=k)[0].logits for k in (None, jax.random.key(1))]
    np.testing.assert_array_equal(*evaluations)
    assert np.any(evaluations[0] != logits[0])


def test_a_module_is_told_by_its_own_words_that_it_trains():
    apply_fn, variables = NETWORKS["linen, told otherwise"]()
    state, inputs, key = adopt(apply_fn, variables), make_batch()["inputs"], jax.random.key(3)
    outputs, stats = state.forward(state.params, inputs, train=True, key=key)
    expected, moved = apply_fn(
        variables, inputs, use_running_average=False, deterministic=False,
        rngs={"dropout": key}, mutable=["batch_stats"],
    )  # fmt: skip
    np.testing.assert_array_equal(outputs.logits, expected)
    jax.tree.map(np.testing.assert_array_equal, stats, moved["batch_stats"])
    outputs, stats = state.forward(state.params, inputs, train=False)
    np.testing.assert_array_equal(outputs.logits, apply_fn(variables, inputs))
    assert not any(changed(stats, state.batch_stats))


def test_an_nnx_model_trains_as_nnx_trains_it():
    """Parameters, and statistics under the dropout of each step's key, by `nnx` itself."""
    model, batch = NnxDropped(nnx.Rngs(0)), make_batch()
    network = adopt(*models.from_nnx(model))
    model = nnx.clone(model)
    model.train()

    def loss(model):
        logs = jax.nn.log_softmax(model(batch["inputs"]))
        return -jnp.mean(logs[jnp.arange(B), batch["labels"]])

    for step in range(3):
        key = jax.random.key(step)
        value, network = stepped(network, batch, key)
        nnx.reseed(model, default=key)
        expected, grads = nnx.value_and_grad(loss)(model)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads)
        nnx.update(model, params)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    _, params, _, stats = nnx.split(model, nnx.Param, nnx.RngState, ...)
    for found, wanted in ((network.params, params), (network.batch_stats, stats)):
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(stats)) == 2


def test_an_nnx_models_dropout_has_the_steps_key_in_training_only():
    model, inputs = NnxDropped(nnx.Rngs(0)), make_batch()["inputs"]
    state = adopt(*models.from_nnx(model))
    forward = functools.partial(state.forward, state.params, inputs)
    logits = [forward(train=True, key=jax.random.key(k))[0].logits for k in (0, 0, 1)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.any(logits[0] != logits[2])
    evaluated = forward(train=False)[0].logits
    model.eval()
    np.testing.assert_allclose(evaluated, model(inputs), rtol=1e-6)


class Untold(nn.Module):
    """Batch norm that is always in training."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(nn.BatchNorm(use_running_average=True)(x))


def test_a_learner_that_cannot_learn_is_refused():
    sgd = bind(optimizers.sgd, learning_rate=0.1)
    module, inputs = Untold(), jnp.zeros((1, D))
    with pytest.raises(ValueError, match=r"^Untold has batch_stats, but its call takes none of tr"):
        train.adopt(module.apply, module.init(jax.random.key(0), inputs), optimizer=sgd)
    graphdef, state = nnx.split(NnxDropped(nnx.Rngs(0)))
    apply_fn = lambda state, x: nnx.merge(graphdef, state)(x)  # noqa: E731
    with pytest.raises(ValueError, match=r"^the parameter .* must be .*from_nnx.*; found .RngC"):
        train.adopt(apply_fn, state, optimizer=sgd)
    with pytest.raises(ValueError, match=r"^the parameter \['n'\] must be .*found .int32"):
        train.adopt(lambda v, x: x * v["n"], {"n": jnp.zeros((), jnp.int32)}, optimizer=sgd)


@pytest.mark.parametrize("module", [Plain(), Nnx(nnx.Rngs(0))], ids=["linen", "NNX"])
def test_a_module_in_place_of_a_function_is_refused(module):
    with pytest.raises(ValueError, match=r"^a network must be module\.apply .*from_nnx\(model\)"):
        train.adopt(module, {})


@pytest.mark.parametrize("make", [around_linen, nnx_batch_norm])
def test_statistics_of_a_function_stay_and_are_not_learned(make):
    network = adopt(*make())
    assert jax.tree.leaves(network.batch_stats)
    _, after = stepped(network, make_batch(), jax.random.key(0))
    assert all(changed(network.params, after.params))
    assert not any(changed(network.batch_stats, after.batch_stats))


def test_a_function_is_told_of_train_and_key_if_it_takes_them():
    def apply(params, x, *, train, key=None):
        keep = jnp.ones(D) if key is None else jax.random.bernoulli(key, 0.5, (D,))
        return (x * keep) @ params * (2.0 if train else 1.0)

    params, inputs = jnp.ones((D, K)), make_batch()["inputs"]
    state = adopt(apply, params)
    evaluation, _ = state.forward(params, inputs, train=False)
    np.testing.assert_allclose(evaluation.logits, inputs @ params, rtol=1e-6)
    training, _ = state.forward(params, inputs, train=True)
    np.testing.assert_allclose(training.logits, 2 * inputs @ params, rtol=1e-6)
    dropped, _ = state.forward(params, inputs, train=True, key=jax.random.key(0))
    assert np.any(dropped.logits != training.logits)
    # Keywords of any name are no promise to understand these.
    as_outputs(lambda params, x, **options: x @ params if not options else 1 / 0)(
        {"params": params, "batch_stats": {}}, inputs, train=True, key=None
    )


def test_outputs_of_the_users_are_passed_on():
    outputs, _ = adopt(*equinox_style()).forward(
        equinox_style()[1], make_batch()["inputs"], train=False
    )
    assert outputs.hidden.shape == (B, 8) and outputs.head is None
    outputs, _ = adopt(*plain_linen()).forward(
        split_variables(*plain_linen())[0], make_batch()["inputs"], train=False
    )
    assert [leaf is outputs.logits for leaf in jax.tree.leaves(outputs)] == [True]


@pytest.mark.parametrize("hypers", [dict(batch_norm=True), {}])
def test_the_librarys_own_modules_go_the_same_way(hypers):
    module = models.cnn(num_classes=K, widths=(4,), **hypers)
    inputs = jnp.ones((2, 4, 4, 1))
    variables = module.init(jax.random.key(0), inputs, train=False)
    own = adopt(module.apply, variables)
    found, stats = own.forward(own.params, inputs, train=False)
    expected = module.apply(variables, inputs, train=False)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not any(changed(stats, own.batch_stats))
    found, stats = own.forward(own.params, inputs, train=True)
    expected, after = module.apply(variables, inputs, train=True, mutable=["batch_stats"])
    jax.tree.map(
        np.testing.assert_array_equal, (found, stats), (expected, {**after}.get("batch_stats", {}))
    )


# --- split_variables ----------------------------------------------------------------------------


def test_splitting():
    function = lambda variables, x: x  # noqa: E731
    tree, stats = {"w": jnp.ones(2)}, {"mean": jnp.zeros(2)}
    both, alone, empty = (
        {"params": tree, "batch_stats": stats},
        {"params": tree},
        {"params": tree, "batch_stats": {}},
    )
    for linen_apply in (Plain().apply, Normed().apply):
        assert split_variables(linen_apply, both) == (tree, stats)
        assert split_variables(linen_apply, alone) == (tree, {})
        assert split_variables(linen_apply, empty) == (tree, {})
    assert split_variables(function, both) == (tree, stats)
    others = (alone, empty, tree, both | {"cache": tree}, [tree], (), None, tree["w"])
    for whole in others:
        assert split_variables(function, whole) == (whole, {})


@pytest.mark.parametrize(
    "variables",
    [
        {"params": {"w": 1.0}, "batch_stats": {"mean": 0.0}},
        {"params": {"w": 1.0}, "batch_stats": {}},
        {"params": {"w": 1.0}},
        {"batch_stats": {"w": 1.0}},
        {"params": [], "batch_stats": {"mean": 0.0}, "cache": 1.0},
        [1.0],
    ],
)
def test_a_function_is_given_the_variables_that_were_split(variables):
    seen = []

    def function(variables, x):
        seen.append(variables)
        return x

    params, batch_stats = split_variables(function, variables)
    stored = {"params": params, "batch_stats": batch_stats}
    _, after = as_outputs(function)(stored, jnp.ones(K), train=True, key=None)
    assert seen == [variables] and after == batch_stats


@pytest.mark.parametrize("names", [("params", "cache"), ("batch_stats",), ()])
def test_collections_without_a_place_are_refused(names):
    with pytest.raises(ValueError) as error:
        split_variables(Plain().apply, {name: {"w": jnp.ones(2)} for name in names})
    assert str(error.value) == (
        "variables of a linen module must be params and, if there are any, batch_stats; found "
        f"{names}."
    )


# --- one adapter a network ----------------------------------------------------------------------


def test_equal_modules_have_one_adapter():
    assert Plain(8).apply != Plain(8).apply  # why the module is the key, not its method
    assert as_outputs(Plain(8).apply) is as_outputs(Plain(8).apply)
    assert as_outputs(Plain(8).apply) is not as_outputs(Plain(9).apply)
    assert as_outputs(Plain(8).apply) is not as_outputs(Normed().apply)
    function = haiku_style()[0]
    assert as_outputs(function) is as_outputs(function)
    assert as_outputs(function) is not as_outputs(haiku_style()[0])


def test_states_of_equal_modules_share_a_compilation():
    traces = itertools.count()

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            next(traces)
            return nn.Dense(K)(x)

    def state(seed):
        module = Counting()
        return adopt(module.apply, module.init(jax.random.key(seed), jnp.zeros((1, D))))

    @functools.partial(jax.jit, static_argnums=0)
    def logits(apply_fn, params, inputs):
        variables = {"params": params, "batch_stats": {}}
        return apply_fn(variables, inputs, train=False, key=None)[0].logits

    states = [state(seed) for seed in range(3)]
    before = next(traces)
    for it in states:
        logits(it.apply_fn, it.params, make_batch()["inputs"])
    assert next(traces) == before + 2  # traced once


@pytest.mark.parametrize(
    "value,found",
    [
        ((jnp.ones(K),), "tuple"),
        (None, "NoneType"),
        ({"logits": jnp.ones(K)}, "dict"),
        (1.0, "float"),
    ],
)
def test_what_is_neither_logits_nor_outputs_is_refused(value, found):
    def network(params, x):
        return value

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return value

    for apply_fn, name in ((network, "network"), (Network().apply, "Network.apply")):
        for mode in (False, True):
            with pytest.raises(TypeError) as error:
                as_outputs(apply_fn)(
                    {"params": {}, "batch_stats": {}}, jnp.ones((1, D)), train=mode, key=None
                )
            message = f"{name} must return logits [..., K] or Outputs; found {found}."
            assert str(error.value) == message
