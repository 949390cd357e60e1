"""`total`: masks reach every part; `chunked_total` is `total`, gradients included."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax.binding import bind
from abkd_jax.divergences import alpha_beta
from abkd_jax.losses import (
    chunked_total,
    cross_entropy,
    mask_of,
    on_logits,
    term_counts,
    total,
)
from abkd_jax.types import Batch, Head, Outputs, Term

SHAPE, D, E, V = (3, 7), 8, 5, 53


def normal(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


STUDENT = (normal(*SHAPE, D, seed=0), normal(D, V, seed=1), normal(V, seed=2))
NUMBERS = tuple(map(jnp.asarray, (0.8, 0.3, 1.5, 2.0)))  # alpha, beta, temperature, weight
TEACHER = Outputs(hidden=normal(*SHAPE, E, seed=3), head=Head(normal(E, V, seed=4)))
WHERE = jax.random.bernoulli(jax.random.key(5), 0.7, SHAPE)
BATCH = {
    "labels": jax.random.randint(jax.random.key(6), SHAPE, 0, V),
    "where": WHERE,
    "labelled": WHERE & (jnp.arange(SHAPE[1]) > 2),
    "inputs": jnp.zeros((3, 2)),
    "key": jax.random.key(7),
}


def terms(alpha, beta, temperature, weight):
    divergence = bind(alpha_beta, alpha=alpha, beta=beta)
    distill = bind(on_logits, divergence=divergence, temperature=temperature)
    return {
        "distill": Term(distill, weight, other="teacher"),
        "task": Term(bind(cross_entropy), jnp.asarray(0.3), "labelled"),
    }


def whole(hidden, unembedding, bias, *numbers):
    student = Outputs(logits=hidden @ unembedding + bias)
    teacher = Outputs(logits=TEACHER.head(TEACHER.hidden))
    return total(terms(*numbers), student, {"teacher": teacher}, BATCH)


def chunked(chunk, teacher=TEACHER):
    def loss(hidden, unembedding, bias, *numbers):
        student = Outputs(hidden=hidden, head=Head(unembedding, bias))
        others = {"teacher": teacher}
        return chunked_total(terms(*numbers), student, others, BATCH, chunk=chunk)

    return loss


def gradients(loss):
    arguments = STUDENT + NUMBERS
    return jax.jit(jax.value_and_grad(loss, argnums=range(len(arguments)), has_aux=True))(
        *arguments
    )


@pytest.mark.parametrize("chunk", [1, 4, 21, 64])
def test_chunks_equal_the_whole(chunk):
    expected, found = gradients(whole), gradients(chunked(chunk))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), expected, found
    )
    value, means = chunked(chunk)(*STUDENT, *NUMBERS)
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-5)
    assert set(means) == {"distill", "task"}


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
        return chunked_total(objective, student, others, batch, chunk=3, counts=counts)

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
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, found, (value, expected, slope.head))
    close(slopes.hidden[:, 0], slope.hidden)


def test_cached_teacher_logits_serve_as_well():
    cached = Outputs(logits=TEACHER.head(TEACHER.hidden))
    expected, found = gradients(chunked(4)), gradients(chunked(4, cached))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found
    )


@pytest.mark.parametrize("filling", [jnp.nan, jnp.inf, 3e38])
def test_masked_tokens_may_be_nan_or_infinite(filling):
    """Neither the value nor any gradient sees them, that of the shared matrix least of all."""
    out = ~BATCH["where"]
    fill = lambda x: jnp.where(out[..., None], filling, x)  # noqa: E731
    expected = gradients(chunked(4))
    teacher = TEACHER.replace(hidden=fill(TEACHER.hidden))
    arguments = fill(STUDENT[0]), *STUDENT[1:], *NUMBERS
    of_all = jax.value_and_grad(chunked(4, teacher), argnums=range(7), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(of_all)(*arguments), expected)


def test_the_cotangent_scales():
    gradient = jax.grad(lambda hidden: -3.0 * chunked(4)(hidden, *STUDENT[1:], *NUMBERS)[0])
    expected = jax.grad(lambda hidden: -3.0 * whole(hidden, *STUDENT[1:], *NUMBERS)[0])
    np.testing.assert_allclose(gradient(STUDENT[0]), expected(STUDENT[0]), rtol=2e-5, atol=1e-6)


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
        return chunked_total(terms(*NUMBERS), outputs, others, batch, chunk=chunk)[0]

    assert temporary(in_chunks) < temporary(dense) / 10
    assert temporary(in_chunks) < tokens * vocabulary * 4


# --- masks: every part has one row for each row of `where` ----------------------------------------


def shown(filling=None, **parts):
    """Outputs with parts of several ranks, a value in place of what is padding."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=(*SHAPE, *shape)).astype(np.float32)  # noqa: E731
    outputs = Outputs(
        logits=draw(5),
        hidden=draw(4),
        head=Head(jnp.ones((4, 5))),
        features={"stage0": draw(4), "stage1": draw(2, 3)},
        projected={"hidden": draw(4)},
        input_gradient=draw(),
    )
    if filling is not None:
        kept = np.asarray(WHERE)
        column = lambda x: kept.reshape(*SHAPE, *(1,) * (x.ndim - 2))  # noqa: E731
        outputs = outputs.map_rows(lambda x: np.where(column(x), x, np.float32(filling)))
    return outputs.replace(**parts)


def of_all_parts(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    """Per row, the sum of squares of every part of both, and of the label."""
    rows = jax.tree.leaves((student.replace(head=None), teacher.replace(head=None)))
    squares = [jnp.sum(jnp.square(x), axis=tuple(range(2, x.ndim))) for x in rows]
    return sum(squares) + batch["labels"]


EVERY_PART = {"it": Term(bind(of_all_parts), jnp.ones(()), other="teacher")}


@pytest.mark.parametrize("filling", [np.nan, np.inf])
def test_a_mask_of_tokens_reaches_every_part(filling):
    def mean(student, teacher):
        return total(EVERY_PART, student, {"teacher": teacher}, BATCH)[0]

    gradient = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    expected, slopes = gradient(shown(), shown())
    found, found_slopes = gradient(shown(filling), shown(filling))
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, found_slopes, slopes)
    values = of_all_parts(shown(), shown(), BATCH)
    np.testing.assert_allclose(expected, np.mean(np.asarray(values)[np.asarray(WHERE)]), rtol=1e-5)
    for leaf in jax.tree.leaves([o.replace(head=None) for o in slopes]):
        np.testing.assert_array_equal(leaf[~WHERE], 0)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(student=shown(features={"stage0": jnp.zeros((3, 8))})),
         "the network being trained: features.stage0 must have one row for each row of the batch's "
         "where [3, 7]; found [3, 8]."),
        (dict(teacher=shown(hidden=jnp.zeros((3, 4)))),
         "teacher: hidden must have one row for each row of the batch's where [3, 7]; found "
         "[3, 4]."),
        (dict(teacher=shown(input_gradient=jnp.zeros(3))),
         "teacher: input_gradient must have one row for each row of the batch's where [3, 7]; "
         "found [3]."),
        (dict(labels=jnp.zeros(3, int)),
         "the batch: labels must have one row for each row of the batch's where [3, 7]; found "
         "[3]."),
    ],
)  # fmt: skip
def test_a_part_with_other_rows_is_refused_by_name(change, message):
    parts = {"student": shown(), "teacher": shown(), "labels": BATCH["labels"]} | change
    batch = BATCH | {"labels": parts["labels"]}
    with pytest.raises(ValueError) as error:
        total(EVERY_PART, parts["student"], {"teacher": parts["teacher"]}, batch)
    assert str(error.value) == message


def test_rows_outside_where_are_in_no_terms_mask():
    batch = BATCH | {"labelled": jnp.ones(SHAPE, bool), "some": BATCH["labelled"]}
    every, some = (
        {"it": Term(bind(of_all_parts), jnp.ones(()), name, "teacher")}
        for name in ("labelled", "some")
    )
    others = {"teacher": shown()}
    for terms, mask in ((every, WHERE), (some, BATCH["labelled"])):
        assert term_counts(terms, batch) == {"it": jnp.sum(mask)}
        values = np.asarray(of_all_parts(shown(), shown(), batch))[np.asarray(mask)]
        value, _ = total(terms, shown(np.nan), others, batch)
        np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
        np.testing.assert_array_equal(mask_of(terms["it"], batch), mask)


@pytest.mark.parametrize("where", [jnp.ones(SHAPE), jnp.ones(SHAPE[:1], bool)])
def test_a_mask_that_is_none_is_refused_by_name(where):
    terms = {"it": Term(bind(cross_entropy), jnp.ones(()), "mine")}
    with pytest.raises(
        AssertionError, match=r"^batch\['mine'\] must be bool \[3, 7\], one for eac"
    ):
        total(terms, shown(), {}, BATCH | {"mine": where})


def test_a_term_without_another_network_sees_empty_outputs():
    seen = []

    def alone(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        seen.append(teacher)
        return jnp.sum(student.logits, -1)

    total({"it": Term(bind(alone), jnp.ones(()))}, shown(), {}, BATCH)
    assert seen == [Outputs()]
    student = Outputs(hidden=STUDENT[0], head=Head(*STUDENT[1:]))
    task = {"task": Term(bind(cross_entropy), jnp.ones(()), "labelled")}
    found, _ = chunked_total(task, student, {}, BATCH, chunk=4)
    expected, _ = total(task, Outputs(logits=student.head(student.hidden)), {}, BATCH)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_loss_of_a_head_in_chunks():
    """The head is shown beside the logits that it forms."""

    def of_head(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        difference = teacher.head(teacher.hidden) - student.head(student.hidden)
        return jnp.sum(jnp.square(difference), -1)

    student = Outputs(hidden=STUDENT[0], head=Head(*STUDENT[1:]))
    term, others = {"it": Term(bind(of_head), jnp.ones(()), other="teacher")}, {"teacher": TEACHER}
    slope = jax.grad(lambda o: chunked_total(term, o, others, BATCH, chunk=4)[0])(student)
    expected = jax.grad(lambda o: total(term, o, others, BATCH)[0])(student)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, slope, expected)


def test_refusals():
    def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return jnp.sum(student.logits, -1)

    coupled.couples_batch = True
    shared = {"shared": Term(bind(coupled), jnp.ones(()), other="teacher")}
    student = Outputs(hidden=STUDENT[0], head=Head(STUDENT[1]))
    with pytest.raises(
        ValueError, match=r"^the loss of term 'shared' must be of each row .*couples"
    ):
        chunked_total(shared, student, {"teacher": TEACHER}, BATCH, chunk=4)
    with pytest.raises(
        ValueError, match=r"^what teacher shows must be logits, or hidden and head; found \[\]\.$"
    ):
        chunked_total(terms(*NUMBERS), student, {"teacher": Outputs()}, BATCH, chunk=4)
