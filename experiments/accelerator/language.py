"""Language: losses over a large vocabulary, and decoders that train and write."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import (
    Head,
    Outputs,
    Term,
    Tokens,
    bind,
    costs,
    divergences,
    generate,
    losses,
    markdown,
    models,
    optimizers,
    parallel,
    timing,
    train,
)
from abkd_jax.losses.chunks import default_chunk
from experiments.accelerator import textbook, torch_peers
from experiments.accelerator.rows import Part, Row

_VOCABULARY = (8192, 4096, 128_256)  # tokens, widths of both networks, K
_DIVERGENCES = {
    "jensen_shannon": {"teacher_weight": 0.5},
    "alpha_beta": {"alpha": 0.8, "beta": 0.3},
}
_DECODERS = {  # of SmolLM2-135M and TinyLlama-1.1B
    "135M": dict(
        num_classes=49_152, width=576, layers=30, heads=9, key_value_heads=3, mlp_width=1536
    ),
    "1.1B": dict(
        num_classes=32_000, width=2048, layers=22, heads=32, key_value_heads=4, mlp_width=5632,
        tied=False,
    ),
}  # fmt: skip
_TINY = {"tiny": dict(num_classes=128, width=16, layers=2, heads=2, mlp_width=32)}
_BATCH, _LENGTH = 8, 1024  # of a training step
_PROMPTS, _PROMPT, _NEW = 16, 64, 128


class Program(NamedTuple):
    """A call, and the bytes that it needs at most, its arguments included."""

    run: Callable[[], Any]
    memory: int

    def __call__(self) -> Any:
        """Runs it."""
        return self.run()


def vocabulary(*, small: bool) -> Part:
    """The rows of the loss over a large vocabulary."""
    shape = (16, 8, 128) if small else _VOCABULARY
    rows = []
    for name in _DIVERGENCES:
        facts = {"divergence": name, "tokens": shape[0]}
        arms = functools.partial(_vocabulary_arms, name, shape, small)
        rows.append(Row(f"vocabulary, {name}, {shape}", arms, facts))
    text = (
        "Value and gradients, in the student's hidden states and in its head, of a distillation "
        f"loss of {shape[0]:,} tokens, widths {shape[1]:,}, {shape[2]:,} classes, from hidden "
        "states and heads in bfloat16. Memory is what XLA's program, or torch at its peak, needs, "
        "arguments included."
    )
    if not hasattr(divergences, "single_pass"):
        text += " There is no single_pass here."
    if importlib.util.find_spec("liger_kernel") is None or torch_peers.device()[0] != "cuda":
        text += " Skipped peer: Liger: it needs liger_kernel, and torch on CUDA."
    return Part("A loss over a large vocabulary", text, rows, _vocabulary_table)


def decoders(*, small: bool) -> Part:
    """The rows of decoders that train and that write."""
    rows = []
    for name, sizes in (_TINY if small else _DECODERS).items():
        batch, length = (jax.local_device_count(), 16) if small else (_BATCH, _LENGTH)
        facts = {"decoder": name, "does": "trains", "tokens": batch * length}
        facts["flops"] = _training(sizes, batch, length, None)[1]
        arms = functools.partial(_training_arms, sizes, batch, length)
        rows.append(Row(f"decoder {name}, training", arms, facts))
        prompts, prompt, new = (2, 4, 4) if small else (_PROMPTS, _PROMPT, _NEW)
        facts = {"decoder": name, "does": "writes", "tokens": prompts * new, "flops": None}
        arms = functools.partial(_writing_arms, sizes, prompts, prompt, new)
        rows.append(Row(f"decoder {name}, writing", arms, facts))
    text = (
        f"Computation in bfloat16, parameters in float32. Training: cross-entropy, AdamW, "
        f"a step. Writing: the likeliest tokens, {_NEW} after prompts of {_PROMPT} (fewer with "
        "--runlocal), tokens/s of what is written. MFU: `costs.products` by the devices' published "
        "peak; - where `costs.peak` knows none."
    )
    return Part("Decoders", text, rows, _decoders_table)


# --- the loss over a vocabulary -----------------------------------------------------------------


def _vocabulary_arms(
    name: str, shape: tuple[int, int, int], small: bool
) -> dict[str, Callable[[], Program]]:
    tokens, width, classes = shape
    chunk = 4 if small else default_chunk(classes)
    numbers, plain = _DIVERGENCES[name], getattr(divergences, name)
    arrays = functools.cache(lambda: _hidden_and_heads(tokens, width, classes))

    def dense(hidden, head, other, other_head):
        s, t = ((x @ w).astype(jnp.float32) for x, w in ((hidden, head), (other, other_head)))
        return textbook.mean_divergence(textbook.JAX, name, s, t, **numbers)

    def chunked(divergence):
        distill = bind(losses.on_logits, divergence=divergence)
        terms = {"distill": Term(distill, jnp.ones(()), other="teacher")}

        def value(hidden, head, other, other_head):
            student, teacher = (
                Outputs(hidden=x, head=Head(w)) for x, w in ((hidden, head), (other, other_head))
            )
            batch = {"where": jnp.ones(tokens, bool)}
            return losses.total(terms, student, {"teacher": teacher}, batch, chunk=chunk)[0]

        return value

    def of(function):
        return _compiled(jax.value_and_grad(function, argnums=(0, 1)), *arrays())

    found = {"abkd_jax, chunked": lambda: of(chunked(bind(plain, **numbers)))}
    if hasattr(divergences, "single_pass"):
        once = lambda: bind(divergences.single_pass, divergence=bind(plain, **numbers))  # noqa: E731
        found["abkd_jax, chunked, single_pass"] = lambda: of(chunked(once()))
    found["JAX, dense"] = lambda: of(dense)
    liger = name == "jensen_shannon" and importlib.util.find_spec("liger_kernel") is not None
    if liger and torch_peers.device()[0] == "cuda":
        found["Liger, fused"] = lambda: _liger(arrays())
    return found


def _hidden_and_heads(tokens: int, width: int, classes: int) -> list[jax.Array]:
    """Hidden states `[N, D]` and unembeddings `[D, K]`, of the student and of the teacher."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(tokens, width), (width, classes)] * 2
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    found = [draw(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    return [x * (1 if i % 2 == 0 else 2 / np.sqrt(width)) for i, x in enumerate(found)]


def _compiled(fn: Callable, *args: Any) -> Program:
    program = jax.jit(fn).lower(*args).compile()
    return Program(lambda: program(*args), _memory(program))


def _memory(program: Any) -> int:
    found = program.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + results + found.temp_size_in_bytes


def _liger(arrays: list[jax.Array]) -> Program:
    """Liger's fused product and Jensen-Shannon divergence."""
    import torch
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    hidden, head, other, other_head = (torch.from_dlpack(x) for x in arrays)
    leaves = [hidden.requires_grad_(), head.T.contiguous().requires_grad_()]
    loss, other_head = LigerFusedLinearJSD(jsd_beta=0.5), other_head.T.contiguous()

    def call():
        value = loss(*leaves, other, other_head)
        found = value.detach(), *torch.autograd.grad(value, leaves)
        torch.cuda.synchronize()
        return found

    torch.cuda.reset_peak_memory_stats()
    call()
    shared = sum(x.nbytes for x in arrays[::2])  # hidden states, which are JAX's
    return Program(call, torch.cuda.max_memory_allocated() + shared)


def _vocabulary_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    header = ("divergence", "", "ms", "tokens/s", "memory, GB", "rounds")
    lines = []
    for row in found.values():
        facts, memory = row["facts"], row.get("memory", {})
        for arm, times in row["seconds"].items():
            values = np.asarray(times)
            speed = timing.quartiles(facts["tokens"] / values, ",.0f")
            cells = timing.quartiles(1e3 * values, ",.2f"), speed, _gigabytes(memory.get(arm))
            lines.append((facts["divergence"], arm, *cells, f"{len(times)}"))
        lines += _failures(row, facts["divergence"], len(header))
    return markdown.table(header, lines)


# --- decoders -----------------------------------------------------------------------------------


def _training(
    sizes: Mapping[str, Any], batch: int, length: int, mesh: Mesh | None
) -> tuple[Callable, float]:
    """() -> the compiled step with its state and batch, and what a step takes, by `costs`."""
    module = models.decoder(**sizes, dtype="bfloat16", max_length=length)
    optimizer = bind(optimizers.adamw, learning_rate=1e-4, weight_decay=0.1)
    ids = np.random.default_rng(0).integers(sizes["num_classes"], size=(batch, length))
    inputs = _tokens(ids)
    terms = {"learner": {"task": Term(bind(losses.cross_entropy), jnp.ones(()))}}
    examples = {"inputs": inputs, "labels": jnp.asarray(np.roll(ids, -1, 1), jnp.int32)}
    examples |= {"where": jnp.ones(ids.shape, bool), "labelled": jnp.ones(ids.shape, bool)}
    chunk = default_chunk(sizes["num_classes"])
    options = {"init_seed": 0, "optimizer": optimizer, "mesh": mesh}
    create = functools.partial(train.create, module, inputs, **options)

    def step(state, examples):
        examples = examples if mesh is None else parallel.split(examples, mesh)
        networks, _ = train.train_step({"learner": state}, examples, terms, chunk=chunk, mesh=mesh)
        return networks["learner"]

    flops = costs.products(step, jax.eval_shape(create), examples)
    return lambda: (step, create(), examples), flops


def _training_arms(
    sizes: Mapping[str, Any], batch: int, length: int
) -> dict[str, Callable[[], Program]]:
    def make(mesh):
        step, state, examples = _training(sizes, batch, length, mesh)[0]()
        if mesh is not None:
            examples = parallel.split(examples, mesh)
        program = jax.jit(step, donate_argnums=0).lower(state, examples).compile()

        def call():
            nonlocal state  # whose buffers are taken
            state = program(state, examples)
            return state

        return Program(call, _memory(program))

    found, count = {"1 device": lambda: make(None)}, jax.local_device_count()
    if count > 1 and batch % count == 0:
        mesh = parallel.mesh(count, batch_size=batch, fsdp=count)
        found[f"fsdp over {count}"] = lambda: make(mesh)
    return found


def _writing_arms(
    sizes: Mapping[str, Any], prompts: int, prompt: int, new: int
) -> dict[str, Callable[[], Callable]]:
    def make():
        module = models.decoder(**sizes, dtype="bfloat16", max_length=prompt + new)
        ids = np.random.default_rng(0).integers(sizes["num_classes"], size=(prompts, prompt))
        init = jax.jit(functools.partial(module.init, train=False))
        variables, key = init(jax.random.key(0), _tokens(ids)), jax.random.key(1)
        how = {"key": key, "max_new_tokens": new, "temperature": 0.0}
        return lambda: generate(module, variables, _tokens(ids), **how)

    return {"1 device": make}


def _tokens(ids: np.ndarray) -> Tokens:
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return Tokens(jnp.asarray(ids, jnp.int32), places, jnp.ones(ids.shape, jnp.int32))


def _decoders_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    header = ("decoder", "", "on", "ms", "tokens/s", "MFU %", "memory of a device, GB", "rounds")
    peak, lines = costs.peak(jax.local_devices()[0].device_kind), []
    for row in found.values():
        facts, memory = row["facts"], row.get("memory", {})
        for arm, times in row["seconds"].items():
            values, devices = np.asarray(times), int(arm.split()[-1]) if "fsdp" in arm else 1
            speed = timing.quartiles(facts["tokens"] / values, ",.0f")
            known = peak is not None and facts["flops"] is not None
            rate = facts["flops"] / values / (peak * devices) if known else None
            mfu = timing.quartiles(100 * rate, ".1f") if known else "-"
            cells = timing.quartiles(1e3 * values, ",.2f"), speed, mfu, _gigabytes(memory.get(arm))
            lines.append((facts["decoder"], facts["does"], arm, *cells, f"{len(times)}"))
        lines += _failures(row, facts["decoder"], len(header))
    return markdown.table(header, lines)


def _failures(row: Mapping[str, Any], name: str, width: int) -> list[tuple[str, ...]]:
    """A line for each arm without a time."""
    told = [(arm, f"failed: {markdown.plain(why)}") for arm, why in row["failed"].items()]
    return [(name, *one, *[""] * (width - 3)) for one in told]


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:,.2f}"
