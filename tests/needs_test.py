"""What `--plan` says, against states that are there, and what it refuses."""

import importlib.util

import jax
import numpy as np
import pytest

from abkd_jax import parallel
from abkd_jax.binding import bind
from abkd_jax.config.schema import resolve
from abkd_jax.optimizers import adam
from abkd_jax.run import needs
from abkd_jax.train import create, frozen
from abkd_jax.train.sharding import sharded

ADAM = dict(fn="adam", learning_rate=1e-3)
TASK = dict(task=dict(fn="cross_entropy", weight=1.0))
KL = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))


def images(**changes):
    model = dict(fn="mlp", widths=(256, 256))
    student = dict(model=model, optimizer=ADAM, terms=dict(distill=KL), ema_decay=0.5)
    made = dict(
        data=dict(fn="digits", validation=100),
        teacher=dict(model=model, optimizer=ADAM, terms=TASK),
        student=student,
        phases=dict(
            teacher=dict(learn=("teacher",), num_steps=30),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        batch_size=64,
        num_steps=50,
        devices=8,
        fsdp=4,
    )
    return made | changes


def text(teacher=(), model=(), **changes):
    """With stacked layers, and logits that are left unformed."""
    student = dict(fn="decoder", width=256, layers=2, heads=4, mlp_width=512) | dict(model)
    made = dict(
        task=dict(fn="language"),
        data=dict(fn="topics", validation=2, length=32),
        teacher=dict(model=student | dict(teacher), weights=dict(fn="run", workdir="teacher")),
        student=dict(model=student, optimizer=ADAM, terms=dict(distill=KL)),
        phases=dict(distill=dict(learn=("student",), see=("teacher",))),
        chunk=24,
    )
    return images() | made | changes


def rows(table):
    """{first cell: {header: cell}} of a table in Markdown."""
    header, _, *lines = ([cell.strip() for cell in x.split("|")[1:-1]] for x in table.splitlines())
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def mb(count):
    return f"{count / 1e6:,.2f}"


def test_the_bytes_are_those_of_states_that_are_there():
    mesh = parallel.mesh(8, batch_size=64, fsdp=4)
    plan = resolve(images())
    inputs = np.zeros((2, 64), np.float32)
    options = dict(optimizer=bind(adam, learning_rate=1e-3), ema_decay=0.5)
    state = create(plan.networks["student"].module, inputs, init_seed=0, **options)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    first = jax.devices()[0]
    on_first = lambda tree: sum(  # noqa: E731
        shard.data.nbytes
        for x in jax.tree.leaves(sharded(tree, mesh))
        for shard in x.addressable_shards
        if shard.device == first
    )
    count = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    found = needs.network_needs(state, mesh, learns=True)
    assert (found.parameters, found.params, found.gradients) == (count, 4 * count, 4 * count)
    assert found.optimizer == bytes_of(state.opt_state) == pytest.approx(8 * count, abs=100)
    assert found.average == 4 * count
    gradients = dict(params=state.params)
    assert found.device == on_first(state) + on_first(gradients)
    assert found.device < bytes_of(state) + 4 * count
    seen = frozen(state)
    found = needs.network_needs(seen, mesh, learns=False)
    assert found[:5] == (count, 4 * count, 0, 0, 0) and found.device == on_first(seen)
    network, phase, _ = needs.tables(images(), "here")
    row = rows(network)["distill: student"]
    assert row["parameters"] == f"{count:,}" and row["average, MB"] == mb(4 * count)
    assert rows(network)["distill: teacher, seen"]["gradients, MB"] == mb(0)
    assert [*rows(phase)] == ["teacher", "distill"]


def test_steps_tokens_and_the_logits_of_a_chunk():
    _, phases, last = needs.tables(text(micro_batches=2), "here")
    assert last.startswith("Activations come on top")
    found = rows(phases)
    assert found["distill"].pop("with the networks, MB") > mb(0)
    assert [*found["distill"].values()] == [
        "distill",
        "50",
        f"{64 * 32:,}",
        f"{50 * 64 * 32:,}",
        "24",
        mb(64 * 32 / 8 * (3 * 4 + 4 + 2)),  # ids, positions, segments; labels; two masks
        mb(2 * 24 * 257 * 4),
    ]
    _, phases, _ = needs.tables(text(chunk=10_000, micro_batches=2), "here")
    assert rows(phases)["distill"]["tokens of a chunk"] == f"{64 * 32 // 8 // 2}"
    networks, phases, _ = needs.tables(images(), "here")  # whose logits are formed at once
    found, networks = rows(phases), rows(networks)
    assert found["distill"]["examples of a chunk"] == "8"
    assert (found["teacher"]["steps"], found["distill"]["steps"]) == ("30", "50")
    own = [
        networks[x]["on each device, MB"] for x in ("distill: student", "distill: teacher, seen")
    ]
    own += [found["distill"][x] for x in ("batch on each device, MB", "logits of a chunk, MB")]
    whole = found["distill"]["with the networks, MB"]
    assert float(whole) == pytest.approx(sum(map(float, own)), abs=0.03)


def test_a_network_in_bfloat16_needs_half():
    whole, half = (
        rows(next(needs.tables(text(teacher=dict(param_dtype=dtype)), "here")))
        for dtype in ("float32", "bfloat16")
    )
    parts = [float(x["distill: teacher, seen"]["MB"]) for x in (whole, half)]
    assert parts[0] == pytest.approx(2 * parts[1], abs=0.02) and parts[1] > 1
    on_each = [float(x["distill: teacher, seen"]["on each device, MB"]) for x in (whole, half)]
    assert on_each[0] == pytest.approx(2 * on_each[1], abs=0.02) and on_each[0] < parts[0]
    assert whole["distill: student"] == half["distill: student"]


def test_a_learner_in_bfloat16_is_refused():
    with pytest.raises(ValueError) as refused:
        resolve(text(model=dict(param_dtype="bfloat16")))
    assert f"{refused.value}" == (
        "the parameters of student must be float32 for a network that learns (its model's "
        "param_dtype); found 'bfloat16'."
    )


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({}, "there", "--plan must be 'here', or a topology of v5e, v5p, v6e, such as 'v5e:2x4'; "
                      "found 'there'."),
        ({}, "", "--plan must be 'here', or a topology of v5e, v5p, v6e, such as 'v5e:2x4'; "
                 "found ''."),
        (dict(devices=99), "here", "devices must be at most the 8 there are; found 99."),
        (dict(fsdp=3), "here", "fsdp must be a divisor of the 8 devices; found 3."),
        (dict(batch_size=30), "here", "batch_size must be a multiple of the 8 devices; found 30 "
                                      "(set devices to use fewer)."),
        (dict(num_steps=-1), "here", "num_steps must be an integer of at least 1 and less than "
                                     "2**31; found -1."),
    ],
)  # fmt: skip
def test_refusals(changes, where, message):
    with pytest.raises(ValueError) as refused:
        [*needs.tables(images(**changes), where)]
    assert f"{refused.value}" == message


def test_without_its_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^libtpu, .* is missing; pip install -e '\.\[tpu\]'\.$"):
        [*needs.tables(images(), "v5e:2x4")]


# --- the compiled step ---------------------------------------------------------------------------


def test_a_compiled_step_takes_what_the_tables_say():
    """Compiled for the devices that are here."""
    plan, mesh = resolve(images()), parallel.mesh(8, batch_size=64, fsdp=4)
    found = needs.compiled_step(plan, plan.phases[-1], mesh)
    networks = rows(next(needs.tables(images(), "here")))
    student, teacher = (networks[x] for x in ("distill: student", "distill: teacher, seen"))
    gradients = float(student["gradients, MB"]) * 1e6
    state = 1e6 * (float(student["on each device, MB"]) + float(teacher["on each device, MB"]))
    assert state - gradients < found.arguments < state
    assert found.results < 0.01 * found.arguments  # the learners' buffers are taken
