"""The decoder against its formulas: every feature, packing, padding, scan, remat, gradients."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import Tokens, models
from abkd_jax.config.build import Builder
from abkd_jax.models.decoder import Decoder
from abkd_jax.types import named_leaves
from tests.decoder_oracle import hidden_and_logits

K, D = 11, 16
SMALL = dict(num_classes=K, width=D, layers=2, heads=4)
GPT2 = dict(
    norm="layer",
    gated=False,
    activation="gelu_tanh",
    positions="learned",
    max_length=12,
    query_key_value_bias=True,
    out_bias=True,
    mlp_bias=True,
    scaled_init=True,
)
LLAMA3 = dict(
    key_value_heads=2,
    mlp_width=24,
    tied=False,
    num_embeddings=K + 3,
    rope_theta=50.0,
    rope_type="llama3",
    rope_factors=(4.0, 1.0, 4.0, 16.0),
    query_key_norm=True,
    head_width=6,
    windows=(3,),
    activation="gelu",
)
GEMMA2 = dict(
    zero_centered_scale=True,
    post_norms=True,
    scaled_embedding=True,
    activation="gelu_tanh",
    key_value_heads=1,
    windows=(3, 0),
    attention_soft_cap=1.0,
    logit_soft_cap=2.0,
    query_scalar=7,
    rope_type="linear",
    rope_factors=(2.0,),
)


def make(seed=0, **fields):
    """A decoder with parameters that are all of ordinary size: none is 0 or 1."""
    module = models.decoder(**SMALL | fields)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), tokens([[0]]), train=False)["params"]
    )
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(0.5 if x.ndim < 3 else 0, 0.3, x.shape).astype(x.dtype)  # noqa: E731
    return module, {"params": jax.tree.map(draw, shapes)}


def tokens(rows, length=None):
    """Each row: the ids of a sequence, or a list of such, packed; padded to a length."""
    packed = [row if isinstance(row[0], list) else [row] for row in rows]
    length = length or max(sum(map(len, row)) for row in packed)
    parts = np.zeros((3, len(rows), length), np.int32)
    for index, row in enumerate(packed):
        flat = [(t, p, s) for s, ids in enumerate(row, 1) for p, t in enumerate(ids)]
        parts[:, index, : len(flat)] = np.transpose(flat)
    return Tokens(*map(jnp.asarray, parts))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(module, variables, inputs, key=None, *, train=False):
    """hidden and logits."""
    rngs = None if key is None else {"dropout": key}
    outputs = module.apply(variables, inputs, train=train, rngs=rngs)
    assert outputs.logits is None
    return outputs.hidden, outputs.head(outputs.hidden)


FIRST, SECOND = [3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5]
PACKED = tokens([[FIRST, SECOND], FIRST, SECOND], length=12)
PLACES = [(0, slice(0, 7)), (0, slice(7, 11)), (1, slice(0, 7)), (2, slice(0, 4))]


@pytest.mark.parametrize(
    "fields",
    [dict(activation="relu"), GPT2, LLAMA3, GEMMA2],
    ids=["llama", "gpt2", "llama3", "gemma2"],
)
def test_it_is_its_formulas_packed_and_padded(fields):
    module, variables = make(**fields)
    hidden, logits = apply(module, variables, PACKED)
    assert hidden.shape == (3, 12, D) and logits.shape == (3, 12, K)
    assert np.all(np.isfinite(logits))
    for (row, at), ids in zip(PLACES, [FIRST, SECOND, FIRST, SECOND], strict=True):
        expected = hidden_and_logits(module.architecture, variables["params"], ids)
        scale = max(1, np.max(np.abs(expected[1])))
        np.testing.assert_allclose(hidden[row, at], expected[0], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(logits[row, at], expected[1], atol=1e-5 * scale)


def loss(module, params, inputs, target):
    outputs = module.apply({"params": params}, inputs, train=False)
    return jnp.mean(jnp.square(outputs.head(outputs.hidden) - target))


value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


@pytest.mark.long
def test_scan_unrolled_and_remat_are_one():
    module, variables = make(windows=(3, 0))
    target = np.random.default_rng(1).normal(size=(3, 12, K)).astype(np.float32)
    expected = value_and_grad(module, variables["params"], PACKED, target)
    other = Decoder(dataclasses.replace(module.architecture, unroll=2, remat=True))
    found = value_and_grad(other, variables["params"], PACKED, target)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)
    # The embeddings are the last linear map, too: both gradients, by differences.
    step = np.random.default_rng(2).normal(size=(K, D)).astype(np.float32)
    slope = np.sum(step * expected[1]["embedding"])
    moved = [
        variables["params"] | {"embedding": variables["params"]["embedding"] + sign * 2e-3 * step}
        for sign in (1, -1)
    ]
    high, low = (value_and_grad(module, params, PACKED, target)[0] for params in moved)
    np.testing.assert_allclose((high - low) / 4e-3, slope, rtol=1e-2)


def test_remat_keeps_the_input_of_each_layer_only():
    def kept(remat):
        module, variables = make(layers=4, remat=remat)
        hidden = lambda v: module.apply(v, PACKED, train=False).hidden  # noqa: E731
        pull = jax.eval_shape(lambda v: jax.vjp(hidden, v)[1], variables)
        return sum(x.size for x in jax.tree.leaves(pull) if x.shape[:2] == (4, 3))

    assert kept(remat=True) == 4 * 3 * 12 * D < kept(remat=False) / 10


def test_the_program_is_as_long_for_4_layers_as_for_16():
    lengths = []
    for layers in (4, 16):
        module, variables = make(layers=layers, windows=(3, 0))
        call = lambda v: module.apply(v, PACKED, train=False)  # noqa: B023, E731
        lengths.append(len(jax.jit(call).lower(variables).as_text()))
    assert lengths[1] < 1.02 * lengths[0]


def test_bfloat16_is_close():
    module, variables = make(**GEMMA2)
    half = Decoder(dataclasses.replace(module.architecture, dtype="bfloat16"))
    hidden, logits = apply(half, variables, PACKED)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == np.float32
    expected = apply(module, variables, PACKED)[1]
    difference = np.abs(logits - expected)
    assert 0 < np.mean(difference) < 0.02 and np.max(difference) < 0.1
    stored = Decoder(dataclasses.replace(module.architecture, param_dtype="bfloat16"))
    init = functools.partial(stored.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), PACKED)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {np.dtype(jnp.bfloat16)}


KEY = jax.random.key(0, impl="rbg")  # which compiles in no time
RATES = {
    "embedding_dropout": (3, 12, D),
    "attention_dropout": (3, 4, 1, 12, 12),
    "residual_dropout": (3, 12, D),
}


@pytest.mark.parametrize("rate", RATES)
def test_what_dropout_draws_in_training_alone(rate):
    module, variables = make(**{rate: 0.5})

    def program(train):
        call = lambda: apply(module, variables, PACKED, KEY, train=train)  # noqa: E731
        return str(jax.make_jaxpr(call)())

    assert "random_bits" not in program(train=False)
    (drawn,) = re.findall(r"random_bits\[.*? shape=\((.*?)\)", program(train=True))
    assert tuple(map(int, drawn.split(", "))) == RATES[rate]


def test_dropout():
    module, variables = make(**dict.fromkeys(RATES, 0.2))
    call = functools.partial(apply, module, variables, PACKED, train=True)
    one, again, other = (call(key=jax.random.fold_in(KEY, seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.max(np.abs(one - other)) > 0.1
    assert np.all(np.isfinite(one)) and one.shape == (3, 12, D)


def test_new_parameters():
    module = models.decoder(**SMALL | GPT2 | dict(width=64, zero_centered_scale=True))
    variables = jax.jit(functools.partial(module.init, train=False))(KEY, PACKED)
    leaves = named_leaves(variables["params"])
    for path, x in leaves.items():
        if path.endswith(("bias", "scale")):
            np.testing.assert_array_equal(x, 0)
        else:
            into_residual = path.endswith(("attention.out.kernel", "mlp.down.kernel"))
            np.testing.assert_allclose(np.std(x), 0.01 if into_residual else 0.02, rtol=0.1)
    kernel = leaves["layers.mlp.up.kernel"]
    assert kernel.shape == (2, 64, 256) and np.all(kernel[0] != kernel[1])


def test_a_config_says_the_same_as_a_call():
    numbers = dict(norm_epsilon=1e-6, attention_dropout=0.1, rope_theta=500_000.0)
    group = dict(fn="decoder", width=D, layers=2, heads=4, **numbers)
    found = Builder().bound(group, "model", "student.model")(num_classes=K)
    assert found == models.decoder(**SMALL, **numbers)
    assert hash(found) == hash(models.decoder(**SMALL, **numbers))


REFUSALS = [
    (dict(width=30), "decoder.width must be a multiple of heads, 4; found 30."),
    (dict(layers=0), "decoder.layers must be at least 1; found 0."),
    (dict(num_classes=0), "decoder.num_classes must be at least 1; found 0."),
    (dict(unroll=0), "decoder.unroll must be at least 1; found 0."),
    (dict(key_value_heads=3), "decoder.key_value_heads must be a divisor of heads, 4; found 3."),
    (dict(head_width=5), "decoder.head_width must be even, for rotations; found 5."),
    (dict(mlp_width=-1), "decoder.mlp_width must be at least 0; found -1."),
    (
        dict(num_embeddings=9),
        "decoder.num_embeddings must be at least num_classes, the 11 tokens of the data; found 9.",
    ),
    (
        dict(activation="swiglu"),
        "decoder.activation must be one of silu, gelu, gelu_tanh, relu; found 'swiglu'.",
    ),
    (dict(norm="batch"), "decoder.norm must be one of rms, layer; found 'batch'."),
    (dict(norm_epsilon=0.0), "decoder.norm_epsilon must be greater than 0 and finite; found 0.0."),
    (
        dict(positions="alibi"),
        "decoder.positions must be one of rotary, learned; found 'alibi'.",
    ),
    (
        dict(rope_type="yarn"),
        "decoder.rope_type must be one of default, linear, llama3; found 'yarn'.",
    ),
    (
        dict(rope_type="linear"),
        "decoder.rope_factors must be 1 positive numbers, for rope_type 'linear'; found ().",
    ),
    (
        dict(windows=(4, 0, 4)),
        "decoder.windows must be at most one for each of the 2 layers, at least 0 each; found "
        "(4, 0, 4).",
    ),
    (
        dict(attention_dropout=1.0),
        "decoder.attention_dropout must be at least 0 and less than 1; found 1.0.",
    ),
    (
        dict(logit_soft_cap=-1.0),
        "decoder.logit_soft_cap must be at least 0 and finite; found -1.0.",
    ),
    (dict(dtype="float16"), "decoder.dtype must be one of float32, bfloat16; found 'float16'."),
]


@pytest.mark.parametrize("fields,message", REFUSALS, ids=[next(iter(x)) for x, _ in REFUSALS])
def test_refusals(fields, message):
    with pytest.raises(ValueError) as error:
        models.decoder(**SMALL | fields)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "fields,inputs,message",
    [
        (GPT2, tokens([FIRST], length=13), "at most the 12 learned positions; found 13."),
        ({}, np.zeros((2, 4)), "a decoder's inputs must be Tokens of integers [B, T]; found"),
    ],
)
def test_inputs_that_it_cannot_take(fields, inputs, message):
    module, variables = make(**fields)
    with pytest.raises(ValueError) as error:
        module.apply(variables, inputs, train=False)
    assert message in str(error.value)
