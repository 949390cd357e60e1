"""Losses on features against torch and numpy."""

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp
from loss_contract import D, K, check_contract, draw

from abkd_jax.binding import bind
from abkd_jax.losses import decoupled_features, norm_and_direction, total
from abkd_jax.losses.feature import aligned, class_means
from abkd_jax.types import Head, Outputs, Term

RNG = np.random.default_rng(5)
CENTERS = RNG.normal(size=(K, D)).round(3)
NEEDS_HEAD = {"own": ("hidden",), "other": ("hidden", "head")}


def features(hidden, **parts):
    return Outputs(hidden=jnp.asarray(hidden, jnp.float32), **parts)


def nd(student, teacher, labels, centers):
    batch = {"labels": jnp.asarray(labels)}
    return bind(norm_and_direction, centers=centers)(features(student), features(teacher), batch)


# --- norm_and_direction -------------------------------------------------------------------------


def published_nd(f_s, f_t, centers, labels):
    """The loop of the published code, in torch."""
    torch = pytest.importorskip("torch")
    values = []
    for s, t, label in zip(f_s, f_t, labels, strict=True):
        direction = centers[label] / torch.linalg.vector_norm(centers[label])
        longer = max(torch.linalg.vector_norm(s), torch.linalg.vector_norm(t))
        values.append(1 - torch.dot(s, direction) / longer)
    return torch.stack(values)


def drawn_features(student_scale, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(9, D)) for _ in range(2))
    return student_scale * student, teacher, rng.integers(0, K, 9)


@pytest.mark.parametrize("student_scale", [0.1, 1.0, 10.0])
def test_norm_and_direction_is_the_published_loss(student_scale):
    torch = pytest.importorskip("torch")
    student, teacher, labels = drawn_features(student_scale)
    s = torch.tensor(student, requires_grad=True)
    published = published_nd(s, torch.tensor(teacher), torch.tensor(CENTERS), labels)
    published.mean().backward()
    with jax.enable_x64(True):
        batch = {"labels": labels}
        loss = bind(norm_and_direction, centers=CENTERS)
        mean = lambda x: jnp.mean(loss(Outputs(hidden=x), Outputs(hidden=teacher), batch))  # noqa: E731
        values = loss(Outputs(hidden=student), Outputs(hidden=teacher), batch)
        np.testing.assert_allclose(values, published.detach(), rtol=1e-12)
        np.testing.assert_allclose(jax.grad(mean)(student), s.grad, rtol=1e-10, atol=1e-15)


def test_a_longer_student_has_one_minus_the_cosine():
    student, teacher, labels = drawn_features(10.0)
    chosen = CENTERS[labels]
    cosine = np.sum(student * chosen, -1)
    cosine /= np.linalg.norm(student, axis=-1) * np.linalg.norm(chosen, axis=-1)
    np.testing.assert_allclose(nd(student, teacher, labels, CENTERS), 1 - cosine, atol=1e-6)
    np.testing.assert_allclose(  # and does not depend on its norm
        nd(3 * student, teacher, labels, CENTERS), 1 - cosine, atol=1e-6
    )


def test_a_shorter_student_is_drawn_along_the_center_alone():
    student, teacher, labels = drawn_features(0.1)
    slope = jax.grad(lambda x: jnp.sum(nd(x, teacher, labels, CENTERS)))(student)
    directions = CENTERS[labels] / np.linalg.norm(CENTERS[labels], axis=-1, keepdims=True)
    expected = -directions / np.linalg.norm(teacher, axis=-1, keepdims=True)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def test_norms_of_zero_have_a_value_and_a_slope():
    zero, one = np.zeros(D), np.eye(D)[0]
    for student, teacher, centers, value, slope in (
        (zero, one, CENTERS, 1.0, -CENTERS[0] / np.linalg.norm(CENTERS[0])),
        (zero, zero, CENTERS, 1.0, None),
        (one, zero, np.zeros((K, D)), 1.0, zero),
    ):
        of = lambda x: nd(x, teacher, 0, centers)  # noqa: B023, E731
        np.testing.assert_allclose(of(student), value)
        found = jax.grad(of)(jnp.asarray(student, jnp.float32))
        assert np.isfinite(found).all()
        if slope is not None:
            np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6)


def test_the_contract_of_norm_and_direction():
    def truth(student, teacher, batch):
        f_s, c = student.hidden, CENTERS[np.maximum(batch["labels"], 0)]
        longer = np.maximum(*(np.linalg.norm(o.hidden, axis=-1) for o in (student, teacher)))
        return 1 - np.sum(f_s * c, -1) / np.linalg.norm(c, axis=-1) / longer

    check_contract(
        bind(norm_and_direction, centers=CENTERS),
        needs=("hidden",),
        where="labelled",
        stopped=("teacher", "numbers"),
        truth=truth,
    )


def test_teacher_and_centers_are_detached():
    student, teacher, batch = draw(("hidden",))

    def mean(teacher, centers):
        term = Term(
            bind(norm_and_direction, centers=centers),
            jnp.ones(()),
            where="labelled",
            other="teacher",
        )
        return total({"nd": term}, student, {"teacher": teacher}, batch)[0]

    slopes = jax.grad(mean, argnums=(0, 1))(teacher, jnp.asarray(CENTERS))
    assert all(not np.any(x) for x in jax.tree.leaves(slopes))


def test_a_withheld_label_is_nan():
    assert np.isnan(nd(np.ones(D), np.ones(D), -1, CENTERS))
    outputs = features(np.ones(D), head=Head(jnp.ones((D, K))))
    loss = bind(decoupled_features, strong_weight=1.0, weak_weight=1.0, temperature=1.0)
    assert np.isnan(loss(outputs, outputs, {"labels": jnp.asarray(-1)}))


# --- decoupled_features -------------------------------------------------------------------------


def by_hand(student, teacher, batch, strong_weight, weak_weight, temperature):
    """(value, KL of the whole, the teacher's mass on the strong set), row by row in float64."""
    found = []
    for f_s, f_t, label in zip(student.hidden, teacher.hidden, batch["labels"], strict=True):
        relevance = np.abs(teacher.head.unembedding[:, label] * f_t)
        strong = relevance > relevance.mean()
        p, q = (scipy.special.softmax(np.asarray(f, np.float64) / temperature) for f in (f_t, f_s))
        masses = [np.array([x[strong].sum(), x[~strong].sum()]) for x in (p, q)]
        kl = lambda a, b: scipy.special.rel_entr(a, b).sum()  # noqa: E731
        within = [kl(p[s] / p[s].sum(), q[s] / q[s].sum()) for s in (strong, ~strong)]
        value = kl(*masses) + strong_weight * within[0] + weak_weight * within[1]
        found.append((temperature**2 * value, temperature**2 * kl(p, q), masses[0][0]))
    return np.array(found).T


def cakd(strong_weight, weak_weight, temperature):
    numbers = dict(strong_weight=strong_weight, weak_weight=weak_weight, temperature=temperature)
    return bind(decoupled_features, **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1.0, 2.0, 4.0), (0.0, 8.0, 1.0), (3.0, 0.0, 0.5)])
def test_the_contract_of_decoupled_features(numbers):
    check_contract(
        cakd(*numbers),
        needs=NEEDS_HEAD,
        where="labelled",
        truth=lambda *drawn: by_hand(*drawn, *numbers)[0],
    )


def test_the_teachers_masses_as_weights_give_the_whole_divergence():
    with jax.enable_x64(True):
        drawn = draw(NEEDS_HEAD)
        kept = np.asarray(drawn[2]["labelled"])
        _, whole, mass = by_hand(*drawn, 1.0, 1.0, 3.0)
        values = cakd(mass, 1 - mass, 3.0)(*drawn)
        np.testing.assert_allclose(values[kept], whole[kept], rtol=1e-10)


def test_a_set_without_units_has_no_part():
    """All units matter alike, so that none is strong; or there is one unit."""
    f_s, f_t = np.array([0.3, -0.2, 1.0]), np.array([0.5, 0.5, -0.5])
    kl = scipy.special.rel_entr(*map(scipy.special.softmax, (f_t, f_s))).sum()
    head = dict(head=Head(jnp.ones((3, 2))))
    batch = {"labels": jnp.asarray(0)}
    of = lambda x: cakd(5.0, 2.0, 1.0)(features(x), features(f_t, **head), batch)  # noqa: E731
    np.testing.assert_allclose(of(f_s), 2.0 * kl, rtol=1e-5)
    slope = jax.grad(of)(jnp.asarray(f_s, jnp.float32))
    expected = 2.0 * (scipy.special.softmax(f_s) - scipy.special.softmax(f_t))
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    one = lambda x: cakd(5.0, 2.0, 1.0)(  # noqa: E731
        features(x), features([2.0], head=Head(jnp.ones((1, 2)))), batch
    )
    np.testing.assert_array_equal(one(jnp.ones(1)), 0)
    np.testing.assert_array_equal(jax.grad(one)(jnp.ones(1)), 0)


def test_equal_features_cost_nothing_and_far_ones_stay_finite():
    head = dict(head=Head(jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)))
    batch = {"labels": jnp.asarray(1)}
    hidden = RNG.normal(size=D)
    same = features(hidden, **head)
    assert cakd(1.0, 2.0, 4.0)(same, same, batch) == 0
    far = lambda x: cakd(1.0, 2.0, 4.0)(features(x), same, batch)  # noqa: E731
    value, slope = jax.value_and_grad(far)(jnp.asarray(1e4 * hidden[::-1], jnp.float32))
    assert np.isfinite(value) and value > 0 and np.isfinite(slope).all()


# --- class means, widths ------------------------------------------------------------------------


def test_class_means_against_numpy():
    hidden, labels = RNG.normal(size=(40, D)).astype(np.float32), RNG.integers(-1, K - 1, 40)
    means = class_means(hidden, labels, K)
    for k in range(K - 1):
        np.testing.assert_allclose(means[k], hidden[labels == k].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(means[K - 1], 0)
    assert class_means(jnp.asarray(hidden, jnp.bfloat16), labels, K).dtype == np.float32


def test_the_projection_takes_the_place_of_the_features():
    student, teacher, batch = draw(("hidden", "head"))
    head = Head(RNG.normal(size=(7, K)))
    wide = teacher.replace(hidden=RNG.normal(size=(12, 7)), head=head)
    shown = student.replace(projected={"hidden": RNG.normal(size=(12, 7))})
    for found, own in (
        (aligned(shown, wide), shown.projected["hidden"]),
        (aligned(student, wide.replace(hidden=teacher.hidden)), student.hidden),
    ):
        np.testing.assert_array_equal(found[0], np.float32(own))
    loss = cakd(1.0, 2.0, 4.0)
    alone = student.replace(hidden=shown.projected["hidden"])
    np.testing.assert_array_equal(loss(shown, wide, batch), loss(alone, wide, batch))
    with pytest.raises(
        ValueError,
        match=r"^the width of the features of the network being trained must be 7, that of the "
        r"other network: give it project=dict\(hidden=7\); found 5\.$",
    ):
        loss(student, wide, batch)
    with pytest.raises(
        ValueError, match=r"^hidden of the other network must be a .*; found None\.$"
    ):
        aligned(student, Outputs(logits=jnp.ones((12, K))))


@pytest.mark.parametrize(
    "labels,centers,message",
    [
        (0.0, CENTERS, r"^labels must be integers \[\], .*; found float32\[\]\.$"),
        (
            [0, 0],
            CENTERS,
            r"^labels must be integers \[\], one for each row of the features; found ",
        ),
        (
            0,
            CENTERS[:, :4],
            r"centers must be .* \[K, 5\], one for each class.*; found float32\[6, 4\]",
        ),
        (0, 1.0, r"centers must be .* \[K, 5\], one for each class.*; found float32\[\]"),
    ],
)
def test_what_does_not_fit_is_refused(labels, centers, message):
    with pytest.raises(AssertionError, match=message):
        nd(np.ones(D), np.ones(D), labels, centers)


def test_a_head_that_is_missing_or_does_not_fit_is_refused():
    student, teacher, batch = draw(NEEDS_HEAD)
    with pytest.raises(
        ValueError, match=r"^the head of the other network must be shown; found None"
    ):
        cakd(1.0, 2.0, 4.0)(student, teacher.replace(head=None), batch)
    with pytest.raises(
        AssertionError, match=r"^the unembedding of the other .* \[5, K\], as wide as"
    ):
        cakd(1.0, 2.0, 4.0)(student, teacher.replace(head=Head(np.ones((4, K)))), batch)
