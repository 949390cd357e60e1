"""What networks show: which parts have rows, and by what names."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax.types import Head, Outputs, Term

HIDDEN = jnp.arange(6.0).reshape(2, 3)
FULL = Outputs(
    logits=HIDDEN + 1,
    hidden=HIDDEN,
    head=Head(jnp.ones((3, 4)), jnp.arange(4.0)),
    features={"stage0": HIDDEN + 2, "stage1": HIDDEN + 3},
    projected={"hidden": HIDDEN + 4},
    input_gradient=HIDDEN + 5,
)


def test_outputs_show_nothing_that_they_do_not_have():
    assert jax.tree.leaves(Outputs()) == []
    assert len(jax.tree.leaves(Outputs(logits=HIDDEN, features={"a": HIDDEN, "b": HIDDEN}))) == 3
    assert jax.tree.leaves(Outputs().map_rows(lambda x: x + 1)) == []


def test_a_head_is_the_last_linear_map():
    np.testing.assert_array_equal(FULL.head(HIDDEN), HIDDEN @ np.ones((3, 4)) + np.arange(4))
    np.testing.assert_array_equal(Head(jnp.ones((3, 4)))(HIDDEN), HIDDEN @ np.ones((3, 4)))


def test_logits_have_a_soft_cap():
    logits = HIDDEN @ np.ones((3, 4))
    found = Head(jnp.ones((3, 4)), soft_cap=5.0)(HIDDEN)
    np.testing.assert_allclose(found, 5 * np.tanh(logits / 5), rtol=1e-6)
    assert len(jax.tree.leaves(Head(jnp.ones((3, 4)), soft_cap=5.0))) == 1


@pytest.mark.parametrize("unembedding", [jnp.float32, jnp.bfloat16])
def test_logits_of_16_bit_are_summed_in_32(unembedding):
    hidden = jnp.full((1, 301), 1.0, jnp.bfloat16)  # bfloat16 has no 301
    found = Head(jnp.ones((301, 2), unembedding))(hidden)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, 301)


def test_rows_are_all_but_the_head():
    found = FULL.map_rows(lambda x: -x)
    assert found.head is FULL.head
    expected = jax.tree.map(jnp.negative, FULL.replace(head=None))
    jax.tree.map(np.testing.assert_array_equal, found.replace(head=None), expected)


def test_rows_have_names():
    names = []
    FULL.map_rows(lambda name, x: names.append(name), named=True)
    features = ["features.stage0", "features.stage1"]
    assert sorted(names) == [*features, "hidden", "input_gradient", "logits", "projected.hidden"]


def test_rows_of_several_outputs():
    head = Head(jnp.zeros((3, 4)))
    found = FULL.map_rows(jnp.add, FULL.replace(head=head))
    assert found.head is FULL.head
    np.testing.assert_array_equal(found.features["stage1"], 2 * (HIDDEN + 3))


def test_a_terms_names_are_structure():
    term = Term(loss=None, weight=jnp.ones(()), where="labelled", other="peer")
    assert len(jax.tree.leaves(term)) == 1
    assert (
        Term(loss=None, weight=1.0).where == "where" and Term(loss=None, weight=1.0).other is None
    )
