"""What the TPU's compiler makes of programs that are split over eight chips."""

import importlib.util

import jax
import pytest
from jax import numpy as jnp

from abkd_jax import alpha_beta, bind, costs
from abkd_jax.losses import on_logits, total
from abkd_jax.run import needs
from abkd_jax.train.sharding import shardings
from abkd_jax.types import Head, Outputs, Term

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is the compiler: pip install -e '.[tpu]'",
    ),
]
CLASSES, WIDTH, TEACHER_WIDTH, TOKENS = 32_768, 256, 512, 8192


def test_a_vocabulary_in_chunks():
    """Each head is gathered once, the gradient of one is added up once, and rows stay."""
    mesh = costs.part(costs.tpu_mesh("v5e:2x4"), 8, fsdp=8)
    divergence = bind(alpha_beta, alpha=0.2, beta=0.7)
    loss_of_logits = bind(on_logits, divergence=divergence, temperature=1.0)
    terms = {"distill": Term(loss_of_logits, 1.0, other="teacher")}

    def loss(student, teacher, where):
        networks = student, {"teacher": teacher}
        return total(terms, *networks, {"where": where}, chunk=256, mesh=mesh)[0]

    def shown(width):
        head = Head(jax.ShapeDtypeStruct((width, CLASSES), jnp.float32))
        put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        head = jax.tree.map(put, head, shardings(head, mesh))
        hidden = jax.ShapeDtypeStruct((TOKENS, width), jnp.bfloat16)
        return Outputs(hidden=costs.shapes(hidden, mesh, split=True), head=head)

    student, teacher = shown(WIDTH), shown(TEACHER_WIDTH)
    where = costs.shapes(jax.ShapeDtypeStruct((TOKENS,), bool), mesh, split=True)
    places = jax.tree.map(lambda x: x.sharding, student)
    options = {"out_shardings": (None, places)}
    found = costs.compiled(jax.value_and_grad(loss), student, teacher, where, **options)
    large = [(x.kind, shape) for x in found.exchanges for shape in x.shapes if len(shape) > 1]
    assert sorted(large) == [
        ("all-gather", (WIDTH, CLASSES)),
        ("all-gather", (TEACHER_WIDTH, CLASSES)),
        ("reduce-scatter", (WIDTH, CLASSES // 8)),
    ]
    assert found.temporaries < TOKENS // 8 * CLASSES * 4 * 4  # not the logits of all rows


def test_the_step_of_a_decoder(monkeypatch):
    """Parameters are gathered, and activations never."""
    compiled, found = costs.compiled, []

    def kept(*args, **options):
        found.append(compiled(*args, **options))
        return found[-1]

    monkeypatch.setattr(costs, "compiled", kept)
    batch_size, length, width = 72, 96, 512  # none of which is of a parameter but the width
    model = dict(fn="decoder", width=width, layers=4, heads=4, mlp_width=1536)
    optimizer = dict(fn="adamw", learning_rate=1e-3, weight_decay=0.1)
    divergence = dict(fn="alpha_beta", alpha=0.2, beta=0.7)
    distill = dict(fn="on_logits", weight=1.0, divergence=divergence)
    config = dict(
        task=dict(fn="language"),
        data=dict(fn="topics", validation=2, length=length),
        teacher=dict(model=model, weights=dict(fn="run", workdir="teacher")),
        student=dict(model=model, optimizer=optimizer, terms=dict(distill=distill)),
        phases=dict(distill=dict(learn=("student",), see=("teacher",))),
        batch_size=batch_size,
        fsdp=8,
    )
    *_, table = needs.tables(config, "v5e:2x4")
    assert "| a step of distill | " in table and " % of 16 GB |" in table
    (step,) = found
    sizes = {size for x in step.exchanges for shape in x.shapes for size in shape}
    assert width in sizes and "all-gather" in step.collectives
    rows = {size * part for size in (batch_size, batch_size // 8) for part in (1, length)}
    assert not sizes & (rows | {length})
