"""Logits in chunks are logits at once: values, means and gradients, on one device and on eight."""

import functools
import re

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding

from abkd_jax import parallel
from abkd_jax.binding import Positive, bind
from abkd_jax.costs import exchanges_of
from abkd_jax.divergences import forward_kl
from abkd_jax.losses import (
    cross_entropy,
    in_chunks,
    joint_total,
    on_logits,
    term_counts,
    total,
)
from abkd_jax.types import Batch, Head, Outputs, Term

SHAPE, D, E, V = (3, 7), 8, 5, 53


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


STUDENT = (normal(*SHAPE, D, seed=0), normal(D, V, seed=1), normal(V, seed=2))
NUMBERS = tuple(map(jnp.asarray, (1.5, 2.0)))  # temperature, weight
TEACHER = Outputs(hidden=normal(*SHAPE, E, seed=3), head=Head(normal(E, V, seed=4)))
WHERE = np.random.default_rng(5).random(SHAPE) < 0.7
BATCH = {
    "labels": jnp.asarray(np.random.default_rng(6).integers(V, size=SHAPE)),
    "where": jnp.asarray(WHERE),
    "labelled": jnp.asarray(WHERE & (np.arange(SHAPE[1]) > 2)),
    "inputs": jnp.zeros((3, 2)),
    "key": jax.random.key(7),
}


def apart(
    student: Outputs, teacher: Outputs, batch: Batch, *, temperature: Positive = 1.0
) -> jax.Array:
    """A loss that compiles in no time: log sum exp of the difference."""
    return jax.nn.logsumexp((student.logits - teacher.logits) / temperature, -1)


def of_label(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    logits = jnp.take_along_axis(student.logits, batch["labels"][..., None], -1)[..., 0]
    return jnp.square(logits) - jnp.max(student.logits, -1)


def terms(temperature, weight):
    return {
        "distill": Term(bind(apart, temperature=temperature), weight, other="teacher"),
        "task": Term(bind(of_label), jnp.asarray(0.3), "labelled"),
    }


def library_terms(temperature, weight):
    distill = bind(on_logits, divergence=bind(forward_kl), temperature=temperature)
    return {
        "distill": Term(distill, weight, other="teacher"),
        "task": Term(bind(cross_entropy), jnp.asarray(0.3), "labelled"),
    }


def whole(hidden, unembedding, bias, *numbers):
    student = Outputs(logits=hidden @ unembedding + bias)
    teacher = Outputs(logits=TEACHER.head(TEACHER.hidden))
    return total(terms(*numbers), student, {"teacher": teacher}, BATCH)


def chunked(chunk, teacher=TEACHER, batch=BATCH, mesh=None, terms=terms):
    def loss(hidden, unembedding, bias, *numbers):
        student = Outputs(hidden=hidden, head=Head(unembedding, bias))
        others = {"teacher": teacher}
        return total(terms(*numbers), student, others, batch, chunk=chunk, mesh=mesh)

    return loss


def gradients(loss, student=STUDENT):
    arguments = student + NUMBERS
    return jax.jit(jax.value_and_grad(loss, argnums=range(len(arguments)), has_aux=True))(
        *arguments
    )


def close(found, expected, rtol=2e-5, atol=1e-6):
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(compare, found, expected)


@pytest.mark.parametrize("chunk", [0, 4, 10])
def test_chunks_equal_the_whole(chunk):
    expected = gradients(whole)
    close(gradients(chunked(chunk)), expected)
    close(chunked(chunk)(*STUDENT, *NUMBERS), expected[0])


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (21, 6)])
def test_chunks_without_a_row_that_counts_are_not_computed(count, expected):
    """Prompts and padding cost no product with the head, wherever they stand."""
    seen = []

    def told(student, teacher, batch):
        jax.debug.callback(lambda: seen.append(1))
        return jnp.sum(student.logits, -1)

    chosen = np.random.default_rng(0).permutation(21)[:count]
    where = np.isin(np.arange(21), chosen).reshape(SHAPE)
    objective = {"it": Term(bind(told), jnp.ones(()))}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(student):
        return total(objective, student, {}, {"where": where}, chunk=4)

    student = Outputs(hidden=STUDENT[0], head=Head(*STUDENT[1:]))
    (value, _), slopes = jax.block_until_ready(loss(student))
    jax.effects_barrier()
    assert len(seen) == expected
    logits = np.asarray(STUDENT[0], np.float64) @ np.asarray(STUDENT[1]) + np.asarray(STUDENT[2])
    mean = logits[where].sum() / max(count, 1)
    np.testing.assert_allclose(value, mean, rtol=1e-5)
    each = np.where(where[..., None], np.asarray(STUDENT[1], np.float64).sum(1), 0.0)
    np.testing.assert_allclose(slopes.hidden, each / max(count, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.long
def test_chunks_of_parts_with_the_counts_of_the_whole_add_up_to_it():
    """One row has no example, so that chunks, and a part, are without any."""
    spoilt = {name: BATCH[name].at[1].set(False) for name in ("where", "labelled")}
    batch = {"labels": BATCH["labels"]} | spoilt
    objective = terms(*NUMBERS)
    student = Outputs(hidden=STUDENT[0].at[1].set(jnp.nan), head=Head(*STUDENT[1:]))
    counts = term_counts(objective, batch)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def of_part(student, others, batch):
        return total(objective, student, others, batch, chunk=3, counts=counts)

    def row(outputs, index):
        return outputs.map_rows(lambda x: x[index : index + 1])

    parts = []
    for index in range(len(WHERE)):
        examples = {name: x[index : index + 1] for name, x in batch.items()}
        parts.append(of_part(row(student, index), {"teacher": row(TEACHER, index)}, examples))
    (values, means), slopes = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    assert values[1] == 0 and not np.any(slopes.hidden[1])
    found = jax.tree.map(lambda x: jnp.sum(x, 0), (values, means, slopes.head))

    def all_at_once(student):
        logits = Outputs(logits=student.head(jnp.nan_to_num(student.hidden)))
        teacher = Outputs(logits=TEACHER.head(TEACHER.hidden))
        return total(objective, logits, {"teacher": teacher}, batch)

    (value, expected), slope = jax.jit(jax.value_and_grad(all_at_once, has_aux=True))(student)
    close(found, (value, expected, slope.head))
    close(slopes.hidden[:, 0], slope.hidden)


def test_cached_teacher_logits_serve_as_well():
    cached = Outputs(logits=TEACHER.head(TEACHER.hidden))
    close(gradients(chunked(64, cached)), gradients(chunked(4)))


@pytest.mark.parametrize("filling", [jnp.nan, jnp.inf])
def test_masked_tokens_may_be_nan_or_infinite(filling):
    """Neither the value nor any gradient sees them, that of the shared matrix least of all."""
    out = ~BATCH["where"]
    fill = lambda x: jnp.where(out[..., None], filling, x)  # noqa: E731
    expected = gradients(chunked(4))
    teacher = TEACHER.replace(hidden=fill(TEACHER.hidden))
    arguments = fill(STUDENT[0]), *STUDENT[1:], *NUMBERS
    of_all = jax.value_and_grad(chunked(4, teacher), argnums=range(5), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(of_all)(*arguments), expected)


def test_the_cotangent_scales():
    loss = lambda scale, hidden: scale * chunked(4)(hidden, *STUDENT[1:], *NUMBERS)[0]  # noqa: E731
    found, slope = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(-3.0, STUDENT[0])[1]
    (value, _), slopes = gradients(chunked(4))
    close((found, slope), (value, -3.0 * slopes[0]))


def test_the_logits_of_all_tokens_never_exist():
    """The compiled program's temporary memory is that of a chunk's arrays, not of all tokens'."""
    tokens, vocabulary, chunk = 512, 4096, 16
    hidden, unembedding = jnp.zeros((tokens, D)), jnp.zeros((D, vocabulary))
    batch = {name: jnp.ones(tokens, bool) for name in ("where", "labelled")}
    batch["labels"] = jnp.zeros(tokens, int)

    def temporary(loss):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def dense(hidden, unembedding):
        outputs = Outputs(logits=hidden @ unembedding)
        return total(terms(*NUMBERS), outputs, {"teacher": outputs}, batch)[0]

    def in_chunks(hidden, unembedding):
        outputs = Outputs(hidden=hidden, head=Head(unembedding))
        others = {"teacher": outputs}
        return total(terms(*NUMBERS), outputs, others, batch, chunk=chunk)[0]

    assert temporary(in_chunks) < temporary(dense) / 10
    assert temporary(in_chunks) < tokens * vocabulary * 4


def test_a_loss_of_a_head_in_chunks():
    """The head is shown beside the logits that it forms."""

    def of_head(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        difference = teacher.head(teacher.hidden) - student.head(student.hidden)
        return jnp.sum(jnp.square(difference), -1)

    student = Outputs(hidden=STUDENT[0], head=Head(*STUDENT[1:]))
    term, others = {"it": Term(bind(of_head), jnp.ones(()), other="teacher")}, {"teacher": TEACHER}
    slope = jax.grad(lambda o: total(term, o, others, BATCH, chunk=4)[0])(student)
    at_once = jax.grad(lambda o: total(term, o, others, BATCH)[0])
    expected = at_once(student)
    close(slope, expected, atol=1e-5)


# --- what is kept, and what is left out -----------------------------------------------------------


def sum_of_parts(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    """Per row, of both networks the squares of all parts, and the learner's head at the other's."""
    rows = jax.tree.leaves((student.replace(head=None), teacher.replace(head=None)))
    leading = batch["labels"].ndim
    squares = [jnp.sum(jnp.square(x), axis=tuple(range(leading, x.ndim))) for x in rows]
    return sum(squares) + jnp.sum(student.head(teacher.hidden), -1)


def shown(filling=0.0):
    """Outputs with every part but logits, a value in place of what is padding."""
    draw = lambda *shape: normal(*SHAPE, *shape, seed=len(shape) + sum(shape))  # noqa: E731
    parts = dict(hidden=draw(4), features={"a": draw(4), "b": draw(2, 3)})
    parts |= dict(projected={"hidden": draw(6)}, input_gradient=draw())
    fill = lambda x: jnp.where(WHERE.reshape(*SHAPE, *(1,) * (x.ndim - 2)), x, filling)  # noqa: E731
    return Outputs(**parts).map_rows(fill).replace(head=Head(normal(4, 5, seed=8)))


@pytest.mark.parametrize("chunk", [0, 4])
def test_every_part_and_the_head_are_there(chunk):
    """The losses see them beside the logits; of both networks all gradients are right."""
    term = {"it": Term(bind(sum_of_parts), jnp.ones(()), other="teacher")}

    def loss(student, teacher):
        return total(term, student, {"teacher": teacher}, BATCH, chunk=chunk)[0]

    def directly(student, teacher):
        student, teacher = (x.replace(logits=x.head(x.hidden)) for x in (student, teacher))
        values = sum_of_parts(student, teacher, BATCH)
        return jnp.sum(jnp.where(WHERE, values, 0)) / jnp.sum(WHERE)

    expected = jax.value_and_grad(directly, argnums=(0, 1))(shown(), shown())
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(shown(np.nan), shown(np.inf))
    close(found, expected)


@pytest.mark.parametrize(
    "wanted,products",
    [
        ((), 2),
        (("hidden",), 3),
        (("head",), 3),
        (("hidden", "head"), 4),
        (("teacher",), 3),
        (("number",), 2),
    ],
)
def test_gradients_that_nobody_wants_are_not_computed(wanted, products):
    """Matrix products of the program: two networks' logits, and one for each gradient."""
    parts = {"hidden": STUDENT[0], "head": STUDENT[1], "number": NUMBERS[0]}
    parts["teacher"] = TEACHER.hidden

    def loss(some):
        x = parts | some
        student = Outputs(hidden=x["hidden"], head=Head(x["head"]))
        others = {"teacher": TEACHER.replace(hidden=x["teacher"])}
        return total(terms(x["number"], NUMBERS[1]), student, others, BATCH, chunk=10)[0]

    program = jax.jit(jax.value_and_grad(loss)).lower({name: parts[name] for name in wanted})
    assert program.as_text().count("stablehlo.dot_general") == products


def test_bfloat16_gives_float32_logits():
    """The gradients come back in bfloat16, as far from those of float32 as its rounding."""
    dtypes = []

    def spy(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        dtypes.extend((student.logits.dtype, teacher.logits.dtype))
        return apart(student, teacher, batch)

    term = {"it": Term(bind(spy), jnp.ones(()), other="teacher")}

    def loss(hidden, unembedding, teacher):
        student = Outputs(hidden=hidden, head=Head(unembedding))
        return total(term, student, {"teacher": teacher}, BATCH, chunk=2)[0]

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (*STUDENT[:2], TEACHER))
    found, slopes = gradient(*half)
    expected, expected_slopes = gradient(*jax.tree.map(lambda x: x.astype(jnp.float32), half))
    assert set(dtypes) == {jnp.dtype("float32")}
    assert [x.dtype for x in slopes] == [jnp.bfloat16] * 2
    close(found, expected, rtol=1e-6)
    for slope, x in zip(slopes, expected_slopes, strict=True):
        close(slope.astype(jnp.float32), x, rtol=0.02, atol=0.01 * float(jnp.max(jnp.abs(x))))


def test_classes_removed_from_both_heads_are_classes_cut_out():
    """By a bias of -inf: of vocabularies that differ by padding."""
    last = jnp.arange(V) >= V - 3
    without = lambda bias: jnp.where(last, -jnp.inf, bias)  # noqa: E731
    batch = BATCH | {"labels": BATCH["labels"] % (V - 3)}
    head = Head(TEACHER.head.unembedding, without(0.0))
    student = (*STUDENT[:2], without(STUDENT[2]))
    teacher = TEACHER.replace(head=head)
    found = gradients(chunked(4, teacher, batch, terms=library_terms), student)
    cut = lambda x: x[..., :-3]  # noqa: E731
    teacher = TEACHER.replace(head=Head(cut(TEACHER.head.unembedding)))
    student = (STUDENT[0], cut(STUDENT[1]), cut(STUDENT[2]))
    value, slopes = gradients(chunked(4, teacher, batch, terms=library_terms), student)
    hidden, unembedding, bias, *numbers = slopes
    padded = jnp.pad(unembedding, [(0, 0), (0, 3)]), jnp.pad(bias, (0, 3))
    close(found, (value, (hidden, *padded, *numbers)))


def test_a_head_that_is_the_transposed_embedding_gets_both_gradients():
    ids = jnp.arange(21).reshape(SHAPE)

    def loss(embedding, chunk):
        student = Outputs(hidden=jnp.tanh(embedding[ids]), head=Head(embedding.T))
        others = {"teacher": TEACHER}
        return total(terms(*NUMBERS), student, others, BATCH, chunk=chunk)[0]

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    embedding = STUDENT[1].T
    close(gradient(embedding, 4), gradient(embedding, 0))


def test_networks_with_logits_have_no_chunks():
    """Nothing of the program changes."""
    student = Outputs(logits=STUDENT[0] @ STUDENT[1])
    teacher = Outputs(logits=TEACHER.head(TEACHER.hidden))

    def text(**options):
        def loss(student):
            return total(terms(*NUMBERS), student, {"teacher": teacher}, BATCH, **options)

        return jax.jit(loss).lower(student).as_text()

    assert text(chunk=4) == text()


# --- several devices, several learners, sums -----------------------------------------------------


def eightfold(x):
    return jnp.concatenate([x, *[jnp.roll(x, i, 0) for i in range(1, 8)]])


def test_devices_have_chunks_of_their_own_rows():
    """No device has the hidden rows of another, and there is no reduction within a loop."""
    teacher = TEACHER.map_rows(eightfold)
    batch = {name: eightfold(BATCH[name]) for name in ("labels", "where", "labelled")}
    student, mesh = (eightfold(STUDENT[0]), *STUDENT[1:]), parallel.mesh(8, batch_size=24)
    loss = chunked(4, teacher, batch, mesh=mesh)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=range(3), has_aux=True))
    placed = parallel.split(student[0], mesh), *parallel.replicated(student[1:], mesh)
    compiled = gradient.lower(*placed, *NUMBERS).compile()
    value, slopes = gradients(chunked(4, teacher, batch), student)
    close(compiled(*placed, *NUMBERS), (value, slopes[:3]))
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" in text
    loops = re.findall(r"body=%?([\w.]+)", text)
    assert loops and not any("all-reduce" in body_of(text, name) for name in loops)


def test_a_large_head_is_gathered_once_and_its_gradient_scattered_once():
    """With a head that is split as a network's parameters are."""
    mesh = parallel.mesh(8, batch_size=24, fsdp=4)
    width, classes = 64, 1024
    hidden, unembedding = normal(24, 7, width, seed=11), normal(width, classes, seed=12)
    batch = {"where": eightfold(WHERE), "labels": eightfold(BATCH["labels"])}
    task = {"task": Term(bind(cross_entropy), jnp.asarray(1.0))}

    def loss(hidden, unembedding, mesh):
        student = Outputs(hidden=hidden, head=Head(unembedding))
        return total(task, student, {}, batch, chunk=4, mesh=mesh)[0]

    gradient = jax.grad(loss, argnums=(0, 1))
    expected = gradient(hidden, unembedding, None)
    place = NamedSharding(mesh, parallel.partition("unembedding", unembedding.shape, 4))
    placed = parallel.split(hidden, mesh), jax.device_put(unembedding, place)
    compiled = jax.jit(functools.partial(gradient, mesh=mesh)).lower(*placed).compile()
    found = compiled(*placed)
    close(found, expected)
    assert found[1].sharding == place
    assert {x.data.shape for x in found[1].addressable_shards} == {(width // 4, classes)}
    exchanges = [(x.kind, shape) for x in exchanges_of(compiled.as_text()) for shape in x.shapes]
    large = [(kind, shape) for kind, shape in exchanges if len(shape) > 1]
    assert sorted(large) == [
        ("all-gather", (width, classes)),
        ("all-reduce", (width // 4, classes)),
        ("reduce-scatter", (width // 4, classes)),
    ]


def body_of(text, name):
    """A computation of a compiled program."""
    return text[text.index(f"\n%{name} ") :].split("\n}\n")[0]


def test_rows_that_do_not_split_evenly_are_visited_as_by_one_device():
    loss = lambda mesh: chunked(4, mesh=mesh)(*STUDENT, *NUMBERS)  # noqa: E731
    close(loss(parallel.mesh(8, batch_size=24)), loss(None))


def test_learners_share_the_logits_of_a_chunk():
    """Each sees the other without a gradient; the program has one product for each network."""
    second = (normal(*SHAPE, D, seed=9), normal(D, V, seed=10))
    objectives = {"a": terms(*NUMBERS), "b": terms(*NUMBERS)}
    objectives["b"]["mutual"] = Term(objectives["b"]["distill"].loss, jnp.ones(()), other="a")
    counts = {name: term_counts(x, BATCH) for name, x in objectives.items()}

    def outputs_of(a, b):
        a, b = (Outputs(hidden=hidden, head=Head(matrix)) for hidden, matrix in (a, b))
        return {"a": a, "b": b, "teacher": TEACHER}

    def joint(a, b):
        shown = outputs_of(a, b)
        return joint_total(objectives, shown, BATCH, counts=counts, chunk=4)

    def apart(a, b):
        shown = outputs_of(a, b)
        others = jax.lax.stop_gradient(shown)
        found = {n: total(x, shown[n], others, BATCH) for n, x in objectives.items()}
        return sum(value for value, _ in found.values()), found

    gradient = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))  # noqa: E731
    close(gradient(joint)(STUDENT[:2], second), gradient(apart)(STUDENT[:2], second))
    program = gradient(joint).lower(STUDENT[:2], second)
    assert program.as_text().count("stablehlo.dot_general") == 3 + 4


@pytest.mark.parametrize("chunk,devices", [(0, 1), (4, 1), (4, 8)])
def test_sums_and_rows_of_networks_in_chunks(chunk, devices):
    """What an evaluation takes of logits; sums of integers stay integers."""
    mesh = parallel.mesh(devices, batch_size=24) if devices > 1 else None
    outputs = {"teacher": TEACHER.map_rows(eightfold)}
    batch = {name: eightfold(BATCH[name]) for name in ("labels", "where")}
    batch |= {"inputs": {"ids": batch["labels"]}, "key": BATCH["key"]}

    def judged(outputs, batch):
        logits = outputs["teacher"].logits
        best = jnp.argmax(logits, -1)
        right = (best == batch["inputs"]["ids"]) & batch["where"]
        return {
            "right": jnp.sum(right),
            "total": jnp.sum(logits, where=batch["where"][..., None]),
        }, best

    find = jax.jit(lambda o, b: in_chunks(judged, o, b, chunk=chunk, mesh=mesh))
    sums, best = find(outputs, batch)
    expected = TEACHER.head(outputs["teacher"].hidden)
    kept = np.asarray(batch["where"])
    np.testing.assert_array_equal(best[kept], np.argmax(expected, -1)[kept])
    assert sums["right"] == np.sum((np.argmax(expected, -1) == batch["labels"]) & kept)
    np.testing.assert_allclose(sums["total"], np.sum(np.asarray(expected)[kept]), rtol=1e-4)


def test_a_part_with_other_rows_is_refused_by_name():
    student = Outputs(hidden=STUDENT[0][:2], head=Head(STUDENT[1]))
    with pytest.raises(ValueError) as error:
        total(terms(*NUMBERS), student, {"teacher": TEACHER}, BATCH, chunk=4)
    assert str(error.value) == (
        "the network being trained: hidden must have one row for each row of the batch's where "
        "[3, 7]; found [2, 7, 8]."
    )


def test_refusals():
    def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return jnp.sum(student.logits, -1)

    coupled.couples_batch = True
    shared = {"shared": Term(bind(coupled), jnp.ones(()), other="teacher")}
    student = Outputs(hidden=STUDENT[0], head=Head(STUDENT[1]))
    with pytest.raises(
        ValueError, match=r"^the loss of term 'shared' must be of each row .*couples"
    ):
        total(shared, student, {"teacher": TEACHER}, BATCH, chunk=4)
    with pytest.raises(ValueError, match=r"^teacher_logits must be a floating-point array .*None"):
        total(library_terms(*NUMBERS), student, {"teacher": Outputs()}, BATCH, chunk=4)
