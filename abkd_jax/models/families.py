"""The families of decoders on the Hugging Face hub: their config.json, and what tensors are called.

A family is a row of FAMILIES: what it calls the fields of `decoder`, and its parameters.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from abkd_jax.binding import hyperparameters, nearest
from abkd_jax.checks import require
from abkd_jax.models.decoder import decoder
from abkd_jax.models.transformer import Architecture

_LLAMA_KEYS = {
    "num_embeddings": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "activation": "hidden_act",
    "norm_epsilon": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "attention_dropout": "attention_dropout",
    "init_std": "initializer_range",
}
_BIASES = {"query_key_value_bias": "attention_bias", "out_bias": "attention_bias"}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": 0,
    "head_dim": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
}
_LLAMA_TENSORS = {
    "embedding": "embed_tokens.weight",
    "final_norm.scale": "norm.weight",
    "unembedding": "lm_head.weight",
    "layers.attention_norm.scale": "layers.{}.input_layernorm.weight",
    "layers.mlp_norm.scale": "layers.{}.post_attention_layernorm.weight",
    "layers.attention.query_norm.scale": "layers.{}.self_attn.q_norm.weight",
    "layers.attention.key_norm.scale": "layers.{}.self_attn.k_norm.weight",
}
for _own, _theirs in {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}.items():
    _LLAMA_TENSORS[f"layers.{_own}.kernel"] = f"layers.{{}}.{_theirs}.weight"
    _LLAMA_TENSORS[f"layers.{_own}.bias"] = f"layers.{{}}.{_theirs}.bias"
_GEMMA_TENSORS = _LLAMA_TENSORS | {
    "layers.post_attention_norm.scale": "layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.scale": "layers.{}.pre_feedforward_layernorm.weight",
    "layers.post_mlp_norm.scale": "layers.{}.post_feedforward_layernorm.weight",
}
_GPT2_TENSORS = {
    "embedding": "wte.weight",
    "position_embedding": "wpe.weight",
    "unembedding": "lm_head.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.bias": "ln_f.bias",
    "layers.attention_norm.scale": "h.{}.ln_1.weight",
    "layers.attention_norm.bias": "h.{}.ln_1.bias",
    "layers.mlp_norm.scale": "h.{}.ln_2.weight",
    "layers.mlp_norm.bias": "h.{}.ln_2.bias",
}
for _own, _theirs in {
    "attention.query": "attn.c_attn",  # the three are one tensor
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}.items():
    _GPT2_TENSORS[f"layers.{_own}.kernel"] = f"h.{{}}.{_theirs}.weight"
    _GPT2_TENSORS[f"layers.{_own}.bias"] = f"h.{{}}.{_theirs}.bias"


class Family(NamedTuple):
    """What one family calls a decoder's fields and parameters.

    Attributes:
        architecture: its class in transformers.
        keys: {field: key of config.json}.
        defaults: {key: its value where a config.json lacks it}; None stands for 0.
        fixed: the fields that all of the family have.
        only: {key: values that it may have}, for what no field stands for.
        tensors: {dotted path of a parameter: name of a tensor}, {} in it for the layer.
        prefix: of the names of tensors but for the last linear map; some files leave it out.
        unused: what names of tensors without parameters end in.
        transposed: whether linear maps are stored `[out, in]`.
    """

    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = MappingProxyType({})
    only: Mapping[str, tuple] = MappingProxyType({})
    tensors: Mapping[str, str] = _LLAMA_TENSORS
    prefix: str = "model."
    unused: tuple[str, ...] = (".rotary_emb.inv_freq",)
    transposed: bool = True


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        keys=_LLAMA_KEYS | _BIASES | {"mlp_bias": "mlp_bias"},
        defaults=_LLAMA_DEFAULTS,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS | {"sliding_window": 4096},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS,
        fixed={"query_key_value_bias": True},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        keys=_LLAMA_KEYS | _BIASES,
        defaults=_LLAMA_DEFAULTS | {"head_dim": 128},
        fixed={"query_key_norm": True},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        keys=_LLAMA_KEYS
        | _BIASES
        | {
            "activation": "hidden_activation",
            "query_scalar": "query_pre_attn_scalar",
            "attention_soft_cap": "attn_logit_softcapping",
            "logit_soft_cap": "final_logit_softcapping",
        },
        defaults=_LLAMA_DEFAULTS
        | {
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
        fixed={"zero_centered_scale": True, "post_norms": True, "scaled_embedding": True},
        only={"use_bidirectional_attention": (None, False)},
        tensors=_GEMMA_TENSORS,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        keys={
            "num_embeddings": "vocab_size",
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "mlp_width": "n_inner",
            "max_length": "n_positions",
            "activation": "activation_function",
            "norm_epsilon": "layer_norm_epsilon",
            "tied": "tie_word_embeddings",
            "embedding_dropout": "embd_pdrop",
            "attention_dropout": "attn_pdrop",
            "residual_dropout": "resid_pdrop",
            "init_std": "initializer_range",
        },
        defaults={
            "n_inner": 0,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.1,
            "initializer_range": 0.02,
        },
        fixed={
            "norm": "layer",
            "gated": False,
            "positions": "learned",
            "query_key_value_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "scaled_init": True,
        },
        only={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        tensors=_GPT2_TENSORS,
        prefix="transformer.",
        unused=(".attn.bias", ".attn.masked_bias"),
        transposed=False,
    ),
}
_ACTIVATIONS = {  # theirs: ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_ROPE_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_OWN = ("num_classes", "dtype", "param_dtype", "remat", "unroll")  # in no config.json
_FULL, _SLIDING = "full_attention", "sliding_attention"


def fields_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `decoder` that a config.json stands for, but for num_classes.

    Args:
        config: its content.

    Raises:
        ValueError: one sentence that names the key, what was found and what was expected.
    """
    name = config.get("model_type")
    expected = f"one of {', '.join(FAMILIES)}{nearest(name, FAMILIES)}"
    require(name in [*FAMILIES], "model_type", expected, name)
    family, annotations = FAMILIES[name], hyperparameters(decoder)
    for key, values in ({"quantization_config": (None,)} | dict(family.only)).items():
        found = config.get(key, values[0])
        require(found in values, key, f"{values[0]}, for this library has no other", found)
    fields = dict(family.fixed)
    for field, key in family.keys.items():
        value = _value(config, key, family.defaults)
        if field == "activation":
            require(value in [*_ACTIVATIONS], key, f"one of {', '.join(_ACTIVATIONS)}", value)
            value = _ACTIVATIONS[value]
        kind = annotations[field].annotation
        kinds = kind if kind in (int, bool) else str if kind is str else int | float
        fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        expected = {bool: "true or false", int: "an integer"}.get(kind, "a number")
        require(fits, key, expected, value)
        fields[field] = value
    if fields.get("positions") != "learned":
        fields |= _rope(config)
    return fields | {"windows": _windows(name, config, fields["layers"])}


def config_of(a: Architecture) -> dict[str, Any]:
    """The config.json of a decoder, as the first family that has all its fields would write it.

    Raises:
        ValueError: one sentence that names the fields of which no family has all.
    """
    differing = {}
    for name in FAMILIES:
        config = _written(name, a)
        again = decoder(num_classes=a.num_embeddings, **fields_of(config)).architecture
        pairs = ((key, x) for key, x in vars(a).items() if key not in _OWN)
        differing[name] = {key: x for key, x in pairs if x != getattr(again, key)}
        if not differing[name]:
            return config
    name = min(differing, key=lambda name: len(differing[name]))
    found = ", ".join(f"{key}={x!r}" for key, x in differing[name].items())
    raise ValueError(f"no family has all fields of this decoder; {name} does not have {found}.")


def _value(config: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> Any:
    if key not in config and key not in defaults:
        raise ValueError(f"{key!r} is missing; it is needed for a {config['model_type']}.")
    value = config.get(key, defaults.get(key))
    return 0 if value is None else value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the rotations, which older and newer files have in different places."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    require(isinstance(rope, Mapping), "rope_parameters", "an object", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in [*_ROPE_FACTORS], "rope_type", f"one of {', '.join(_ROPE_FACTORS)}", kind)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    require(partial == 1, "partial_rotary_factor", "1, for this library has no other", partial)
    for key in _ROPE_FACTORS[kind]:
        number = isinstance(rope.get(key), int | float)
        require(number, f"rope_parameters[{key!r}]", f"a number, for {kind}", rope.get(key))
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    require(isinstance(theta, int | float), "rope_theta", "a number", theta)
    return {
        "rope_theta": float(theta),
        "rope_type": kind,
        "rope_factors": tuple(float(rope[key]) for key in _ROPE_FACTORS[kind]),
    }


def _windows(name: str, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The window of each layer."""
    window = _value(config, "sliding_window", {"sliding_window": 0} | FAMILIES[name].defaults)
    if name in ("llama", "gpt2"):
        return ()
    require(type(window) is int, "sliding_window", "an integer", window)
    if name == "mistral":
        return (window,) * layers
    kinds = config.get("layer_types")
    if kinds is None and name == "gemma2":
        kinds = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    elif kinds is None:
        first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
        kinds = [_FULL if layer < first else _SLIDING for layer in range(layers)]
    fits = isinstance(kinds, list) and len(kinds) == layers
    fits = fits and all(kind in (_FULL, _SLIDING) for kind in kinds)
    require(fits, "layer_types", f"{layers} of {_FULL!r} and {_SLIDING!r}", kinds)
    return tuple(window if kind == _SLIDING else 0 for kind in kinds)


def _written(name: str, a: Architecture) -> dict[str, Any]:
    """A config.json of the family with what it can say of these fields."""
    family = FAMILIES[name]
    config = {"architectures": [family.architecture], "model_type": name}
    config |= {key: getattr(a, field) for field, key in family.keys.items()}
    activation = family.keys["activation"]
    names = [family.defaults[activation], *_ACTIVATIONS]
    config[activation] = next(x for x in names if _ACTIVATIONS[x] == a.activation)
    config |= {key: None for key in config if key.endswith("softcapping") and not config[key]}
    if name == "gpt2":
        return config
    config["rope_theta"] = a.rope_theta
    if a.rope_type != "default":
        factors = dict(zip(_ROPE_FACTORS[a.rope_type], a.rope_factors, strict=True))
        config["rope_scaling"] = {"rope_type": a.rope_type} | factors
    window = max(a.windows, default=0)
    if name == "mistral":
        config["sliding_window"] = window or None
    elif name != "llama":
        windows = a.windows or (0,) * a.layers
        config["layer_types"] = [_SLIDING if x else _FULL for x in windows]
        config["sliding_window"] = window or a.max_length
        config["use_sliding_window"] = bool(window)
    return config
