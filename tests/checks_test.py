"""The checks of arrays: what is lifted, what is refused, and in which words."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import checks


def test_logits_are_lifted_to_one_dtype():
    half, single = jnp.zeros(3, jnp.bfloat16), jnp.zeros((2, 3), jnp.float32)
    for pair in ((half, half), (half, single), (single, half)):
        lifted = checks.check_logits(*pair)
        assert [array.dtype for array in lifted] == [np.float32] * 2
        assert [array.shape for array in lifted] == [array.shape for array in pair]
    with jax.enable_x64(True):
        lifted = checks.check_logits(half, np.zeros(3))
        assert [array.dtype for array in lifted] == [np.float64] * 2


def test_a_requirement_says_what_was_expected_and_found():
    checks.require(True, "k", "at least 1", 0)
    for found, what in (
        (0, "0"),
        ("a", "'a'"),
        (np.zeros((2, 3)), "float64[2, 3]"),
        (None, "None"),
    ):
        with pytest.raises(ValueError) as error:
            checks.require(False, "k", "at least 1", found)
        assert str(error.value) == f"k must be at least 1; found {what}."
    with pytest.raises(AssertionError, match=r"^k must be at least 1; found 0\.$"):
        checks.require(False, "k", "at least 1", 0, AssertionError)
    with pytest.raises(ValueError, match=r"^k must be short; found 'a{79}\.$"):
        checks.require(False, "k", "short", 1000 * "a")


@pytest.mark.parametrize(
    "x,kind,shape,found",
    [
        (np.zeros((2, 3), np.float32), int, (2, 3), "float32[2, 3]"),
        (np.zeros((2, 3), int), int, (2,), "int64[2, 3]"),
        (np.zeros((2, 3), int), bool, (2, 3), "int64[2, 3]"),
        (np.zeros((2, 3)), float, ("N", 4), "float64[2, 3]"),
        (np.zeros((2, 3)), float, (2, 3, 1), "float64[2, 3]"),
        (np.zeros(()), float, ("N",), "float64[]"),
    ],
)
def test_arrays_of_another_type_or_shape(x, kind, shape, found):
    with pytest.raises(AssertionError) as error:
        checks.check_array("x", x, kind, shape, "one for each row")
    words = {int: "integers", bool: "bool", float: "floating-point"}[kind]
    sizes = ", ".join(map(str, shape))
    assert str(error.value) == f"x must be {words} [{sizes}], one for each row; found {found}."


def test_arrays_that_fit():
    checks.check_array("x", jnp.zeros((2, 3), jnp.bfloat16), float, ("N", 3), "")
    checks.check_array("x", np.zeros((), np.uint8), int, (), "")
    jax.eval_shape(lambda x: checks.check_array("x", x, bool, (4,), ""), np.ones(4, bool))


def test_what_is_no_array_is_a_value_error():
    for check in (
        lambda x: checks.check_array("x", x, float, (2,), "two"),
        lambda x: checks.check_rows(x, "x"),
        lambda x: checks.check_logits(np.zeros((2, 3)), x),
    ):
        for x in (None, [1.0, 2.0]):
            with pytest.raises(ValueError, match=r"must be .*floating-point .*; found "):
                check(x)


def test_a_mask_that_is_none_is_everywhere_true():
    np.testing.assert_array_equal(checks.check_where(None, (2, 3)), np.ones((2, 3), bool))
    where = np.array([True, False])
    np.testing.assert_array_equal(checks.check_where(where, (2,)), where)
    with pytest.raises(AssertionError, match=r"^where must be bool \[3\], .*; found bool\[2\]\.$"):
        checks.check_where(where, (3,))


def test_shapes_that_broadcast():
    assert checks.broadcast_shape((2, 1), (3,), ()) == (2, 3)
    assert checks.broadcast_shape((2,), (3,)) is None
