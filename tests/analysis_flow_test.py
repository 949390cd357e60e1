"""Mass changes and flows against softmaxes and loops in numpy."""

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp

from abkd_jax.analysis import (
    by_rank,
    head_and_tail,
    head_middle_and_tail,
    log_mass_ratio,
    mass_change,
    mass_flow,
    moved_mass,
    of_logit_change,
    over_and_underestimated,
    target_and_rest,
)
from abkd_jax.binding import bind
from abkd_jax.divergences import forward_kl

INF = np.inf
P = np.array([0.1, 0.5, 0.05, 0.3, 0.05])


def softmax(x):
    return scipy.special.softmax(np.asarray(x, np.float64), -1)


def draw(*shape, seed=0):
    return np.float32(2 * np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_the_change_of_mass(scale):
    logits, change = draw(3, 4, 6), scale * draw(3, 4, 6, seed=1)
    logits[..., 2] = -INF
    after = softmax(np.float64(logits) + np.where(np.isneginf(logits), 0, np.float64(change)))
    found = mass_change(logits, of_logit_change(logits, change).log_ratio)
    expected = after - softmax(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * min(scale, 1.0))
    assert np.all(np.asarray(found)[..., 2] == 0)
    np.testing.assert_allclose(np.sum(found, -1), 0, atol=1e-6 * min(scale, 1.0))
    np.testing.assert_allclose(
        moved_mass(found), 0.5 * np.abs(expected).sum(-1), rtol=1e-5, atol=1e-6 * min(scale, 1.0)
    )


def test_a_class_that_comes_from_nowhere():
    logits = jnp.array([0.0, -200.0])  # e^200 is past float32
    found = mass_change(logits, of_logit_change(logits, jnp.array([0.0, 201.0])).log_ratio)
    np.testing.assert_allclose(found, [-0.73105858, 0.73105858], rtol=1e-5)


def partitions(student, teacher, labels):
    return {
        "error": over_and_underestimated(student, teacher),
        "target": target_and_rest(labels, student.shape[-1]),
        "head": head_and_tail(teacher, head_mass=0.7),
        "three": head_middle_and_tail(teacher),
        "rank": by_rank(teacher, edges=(1, 3)),
    }


@jax.jit
def flows_of(student, teacher, labels):
    step = log_mass_ratio(student, teacher, divergence=bind(forward_kl), learning_rate=0.5)
    change = mass_change(student, step.log_ratio)
    groups = partitions(student, teacher, labels)
    return change, groups, {name: mass_flow(change, group) for name, group in groups.items()}


def test_flows_of_all_partitions():
    student, teacher = draw(2, 7, 6), draw(2, 7, 6, seed=1)
    student[0, :, 4] = teacher[0, :, 4] = -INF
    labels = np.random.default_rng(2).integers(-1, 4, (2, 7))
    assert -1 in labels
    change, groups, flows = jax.tree.map(np.asarray, flows_of(student, teacher, labels))
    for name, parts in flows.items():
        covered = np.sum([np.asarray(g) for g in groups[name].values()], axis=0)
        assert np.all(covered == 1), name  # each class in one group
        np.testing.assert_allclose(sum(parts.values()), 0, atol=1e-7)
        for group, flow in parts.items():
            assert flow.shape == (2, 7)
            for i, j in np.ndindex(2, 7):
                expected = sum(change[i, j, k] for k in range(6) if groups[name][group][i, j, k])
                np.testing.assert_allclose(flow[i, j], expected, atol=1e-7)
    assert np.all(flows["error"]["underestimated"] > 0)  # where forward KL sends it
    under = softmax(teacher) > softmax(student)
    np.testing.assert_array_equal(groups["error"]["underestimated"], under)


def test_target_and_rest():
    groups = target_and_rest(jnp.array([2, -1, 0]), 3)
    expected = [[False, False, True], [False, False, False], [True, False, False]]
    np.testing.assert_array_equal(groups["target"], expected)
    np.testing.assert_array_equal(groups["rest"], ~np.array(expected))


@pytest.mark.parametrize(
    "mass,head",
    [
        (0.0, [1]),
        (0.5 + 1e-6, [1]),
        (0.79, [1]),
        (0.81, [1, 3]),
        (0.91, [0, 1, 3]),
        (1.1, [0, 1, 2, 3, 4]),
    ],
)
def test_the_head(mass, head):
    found = head_and_tail(jnp.log(P), head_mass=mass)
    assert list(np.flatnonzero(found["head"])) == head
    np.testing.assert_array_equal(found["tail"], ~np.asarray(found["head"]))


@pytest.mark.parametrize(
    "head,middle,groups",
    [
        (0.55, 0.91, ([1], [0, 3], [2, 4])),
        (0.85, 0.91, ([1, 3], [0], [2, 4])),
        (0.85, 0.6, ([1, 3], [], [0, 2, 4])),
        (0.0, 1.0, ([1], [0, 2, 3, 4], [])),
    ],
)
def test_the_head_the_middle_and_the_tail(head, middle, groups):
    found = head_middle_and_tail(jnp.log(P), head_mass=head, middle_mass=middle)
    assert [list(np.flatnonzero(g)) for g in found.values()] == list(groups)
    assert list(found) == ["head", "middle", "tail"]


def test_ranks():
    logits = jnp.array([np.log(P), np.log(P[::-1])])
    found = by_rank(logits, edges=(1, 3))
    assert list(found) == ["1", "2-3", "4-"]
    assert [list(np.flatnonzero(g[0])) for g in found.values()] == [[1], [0, 3], [2, 4]]
    assert [list(np.flatnonzero(g[1])) for g in found.values()] == [[3], [1, 4], [0, 2]]
    assert list(by_rank(logits, edges=(2,))) == ["1-2", "3-"]
    ties = by_rank(jnp.zeros(4), edges=(1, 2))
    assert [list(np.flatnonzero(g)) for g in ties.values()] == [[0], [1], [2, 3]]


@pytest.mark.parametrize("edges", [(), (0,), (3, 2), (2, 2), (1.5,), 2])
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(
        ValueError, match="edges must be a tuple of counts of classes that rise from 1"
    ):
        by_rank(jnp.zeros(4), edges=edges)


@pytest.mark.parametrize(
    "group,found",
    [
        (np.ones(3, bool), r"bool\[3\]"),
        (np.ones(1, bool), r"bool\[1\]"),
        (np.ones(4), r"float64\[4\]"),
        (np.ones((5, 4), bool), r"bool\[5, 4\]"),
        (np.bool_(True), r"np\.True_"),
        ([True] * 4, r"\[True, True, True, True\]"),
    ],
)
def test_groups_that_do_not_fit_are_refused(group, found):
    message = rf"^groups\['mine'\] must be bool over the 4 classes, .*; found {found}\.$"
    with pytest.raises(AssertionError, match=message):
        mass_flow(jnp.zeros((2, 4)), {"mine": group})


@pytest.mark.parametrize("log_ratio", [jnp.zeros(4), jnp.zeros((2, 3)), [0.0] * 4])
def test_a_log_ratio_of_another_shape_is_refused(log_ratio):
    with pytest.raises(
        (AssertionError, ValueError), match=r"^log_ratio must be .* \[2, 4\], as student_"
    ):
        mass_change(jnp.zeros((2, 4)), log_ratio)
