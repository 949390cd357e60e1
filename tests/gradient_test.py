"""Input gradients: the loss by its contract and by hand."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from loss_contract import INPUT, check_contract, draw

from abkd_jax.binding import bind
from abkd_jax.losses import input_gradient_alignment
from abkd_jax.types import Outputs

# --- the loss -----------------------------------------------------------------------------------


def test_the_contract():
    def truth(student, teacher, batch):
        flat = lambda o: np.reshape(o.input_gradient, (len(batch["labels"]), -1))  # noqa: E731
        return np.linalg.norm(flat(student) - flat(teacher), axis=-1)

    check_contract(
        bind(input_gradient_alignment),
        needs=("input_gradient",),
        where="labelled",
        truth=truth,
    )


def test_equal_gradients_have_neither_value_nor_slope():
    student, _, batch = draw(("input_gradient",))
    batch = {"labels": np.maximum(batch["labels"], 0)}
    of = lambda o: jnp.sum(input_gradient_alignment(o, student, batch))  # noqa: E731
    value, slope = jax.value_and_grad(of)(jax.tree.map(jnp.asarray, student))
    assert value == 0 and not np.any(slope.input_gradient)


def test_a_withheld_label_is_nan():
    student, teacher, batch = draw(("input_gradient",))
    withheld = np.isnan(input_gradient_alignment(student, teacher, batch))
    np.testing.assert_array_equal(withheld, batch["labels"] < 0)
    assert 0 < withheld.sum() < len(withheld)


def test_the_norm_of_the_whole_batch_is_bounded_below_by_the_mean():
    """What the docstring says of the published script: equal for rows of one norm."""
    student, teacher, batch = draw(("input_gradient",))
    size, batch = len(batch["labels"]), {"labels": np.maximum(batch["labels"], 0)}
    difference = np.reshape(student.input_gradient - teacher.input_gradient, (size, -1))
    ours = np.mean(input_gradient_alignment(student, teacher, batch))
    published = np.linalg.norm(difference / size)  # of gradients of the mean cross-entropy
    assert ours < np.sqrt(size) * published
    unit = difference / np.linalg.norm(difference, axis=-1, keepdims=True)
    even = Outputs(input_gradient=teacher.input_gradient + unit.reshape(size, *INPUT))
    ours = np.mean(input_gradient_alignment(even, teacher, batch))
    np.testing.assert_allclose(ours, np.sqrt(size) * np.linalg.norm(unit / size), rtol=1e-6)


def test_what_does_not_fit_is_refused():
    student, teacher, batch = draw(("input_gradient",))
    with pytest.raises(
        ValueError, match=r"^input_gradient of the other network must be .*; found None"
    ):
        input_gradient_alignment(student, Outputs(), batch)
    with pytest.raises(
        AssertionError,
        match=r"^the other input_gradient must be .* \[12, 4, 3\], .*; found float32\[12, 4, 2\]",
    ):
        narrow = teacher.replace(input_gradient=teacher.input_gradient[..., :2])
        input_gradient_alignment(student, narrow, batch)
    with pytest.raises(
        AssertionError,
        match=r"^labels must be integers \[12\], one for each row of the inp.*; found int32\[3\]",
    ):
        input_gradient_alignment(student, teacher, {"labels": batch["labels"][:3]})
