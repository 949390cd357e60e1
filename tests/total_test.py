"""`total`: masks reach every part of the outputs, and the labels."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax.binding import bind
from abkd_jax.losses import cross_entropy, mask_of, term_counts, total
from abkd_jax.types import Batch, Head, Outputs, Term

SHAPE = (3, 7)
WHERE = jax.random.bernoulli(jax.random.key(5), 0.7, SHAPE)
BATCH = {
    "labels": jax.random.randint(jax.random.key(6), SHAPE, 0, 5),
    "where": WHERE,
    "labelled": WHERE & (jnp.arange(SHAPE[1]) > 2),
    "inputs": jnp.zeros((3, 2)),
    "key": jax.random.key(7),
}


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
