"""dkd and nkd against torch, identities, withheld labels; and the contract of all losses on logits.

To add a loss that reads logits alone, add one row to CONTRACT.
"""

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp
from loss_contract import B, K, assert_close, check_against_torch, check_contract, draw, evaluate

from abkd_jax import divergences
from abkd_jax.binding import bind
from abkd_jax.divergences import alpha_beta, forward_kl, reverse_kl
from abkd_jax.losses import (
    difficulty_weighted,
    dkd,
    entropy_aware,
    entropy_gated,
    entropy_weighted,
    nkd,
    on_logits,
    power_weighted,
    total,
    with_teacher_labels,
)
from abkd_jax.types import Outputs, Term

INF, NAN = np.inf, np.nan
KD = bind(on_logits, divergence=forward_kl, temperature=2.0)


def decoupled(target=forward_kl, rest=forward_kl, **numbers):
    given = dict(target_weight=1.0, rest_weight=8.0, temperature=4.0) | numbers
    return bind(dkd, target_divergence=target, rest_divergence=rest, **given)


def lifted(combinator, **numbers):
    return bind(on_logits, divergence=bind(combinator, **numbers), temperature=2.0)


DKD, NKD = decoupled(), bind(nkd, rest_weight=1.5, temperature=3.0)
AB_DKD = decoupled(
    bind(alpha_beta, alpha=0.5, beta=0.3),
    bind(alpha_beta, alpha=0.8, beta=-0.3),
    rest_weight=2.0,
    temperature_power=1.0,
)
SCORES = bind(divergences.tempered, divergence=forward_kl, temperature=2.0)
LABELLED, OF_TEACHER, OF_BOTH = "labelled", ("teacher",), ("student", "teacher")

CONTRACT = {
    "dkd": (DKD, dict(where=LABELLED)),
    "dkd of alpha_beta": (AB_DKD, dict(where=LABELLED)),
    "nkd": (NKD, dict(where=LABELLED, stopped=OF_TEACHER)),
    "dkd with the teacher's labels": (bind(with_teacher_labels, loss=DKD), {}),
    "entropy_weighted": (
        bind(entropy_weighted, loss=KD, temperature=4.0),
        dict(stopped=OF_TEACHER),
    ),
    "entropy_weighted dkd": (
        bind(entropy_weighted, loss=DKD, temperature=4.0),
        dict(where=LABELLED, stopped=OF_TEACHER),
    ),
    "entropy_aware": (bind(entropy_aware, loss=KD, temperature=3.0), dict(stopped=OF_BOTH)),
    "power_weighted": (
        bind(power_weighted, loss=KD, teacher_power=0.3),
        dict(stopped=OF_TEACHER),
    ),
    "difficulty_weighted": (
        bind(difficulty_weighted, loss=KD),
        dict(where=LABELLED, stopped=OF_BOTH),
    ),
    "entropy_gated dkd": (
        bind(entropy_gated, forward=DKD, reverse=KD, gain=2.0),
        dict(where=LABELLED),
    ),
    "standardized": (lifted(divergences.standardized, divergence=SCORES), {}),
    "powered": (lifted(divergences.powered, divergence=forward_kl, teacher_power=0.4), {}),
    "prior_shifted": (
        lifted(divergences.prior_shifted, divergence=forward_kl, log_prior=np.linspace(-1, 1, K)),
        {},
    ),
    "top_k": (lifted(divergences.top_k, divergence=reverse_kl, k=3), {}),
    "top_k_renormalised": (lifted(divergences.top_k_renormalised, divergence=forward_kl, k=3), {}),
    "top_k_dropped": (lifted(divergences.top_k_dropped, divergence=forward_kl, k=2), {}),
}


QUICK = ("dkd", "entropy_aware")  # compiling the rest takes long


@pytest.mark.parametrize(
    "loss,options",
    [
        pytest.param(*row, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, row in CONTRACT.items()
    ],
)
def test_contract(loss, options):
    check_contract(loss, **options)


# --- the published formulas ---------------------------------------------------------------------


def others(torch, logits, labels):
    """Without the label's column, `[B, K - 1]`."""
    rest = torch.arange(K) != labels.clamp(min=0)[:, None]
    return logits[rest].reshape(B, K - 1)


def published_dkd(temperature, target_weight, rest_weight):
    def loss(torch, student, teacher, labels):
        index = labels.clamp(min=0)[:, None]
        p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
        binary = [torch.cat([x.gather(1, index), 1 - x.gather(1, index)], 1).log() for x in (p, q)]
        target = (binary[0].exp() * (binary[0] - binary[1])).sum(-1)
        log_p, log_q = (
            torch.log_softmax(others(torch, x, labels) / temperature, -1)
            for x in (teacher, student)
        )
        rest = (log_p.exp() * (log_p - log_q)).sum(-1)
        return temperature**2 * (target_weight * target + rest_weight * rest)

    return loss


def published_nkd(weight, temperature):
    def loss(torch, student, teacher, labels):
        index = labels.clamp(min=0)[:, None]
        p_label = torch.softmax(teacher, -1).gather(1, index)[:, 0].detach()
        log_q_label = torch.log_softmax(student, -1).gather(1, index)[:, 0]
        p = torch.softmax(others(torch, teacher, labels) / temperature, -1)
        log_q = torch.log_softmax(others(torch, student, labels) / temperature, -1)
        return -p_label * log_q_label - weight * temperature**2 * (p * log_q).sum(-1)

    return loss


@pytest.mark.parametrize(
    "weights,temperature", [((1.0, 8.0), 4.0), ((1.0, 0.5), 1.0), ((2.5, 0.0), 3.0)]
)
def test_dkd_is_the_published_one(weights, temperature):
    target_weight, rest_weight = weights
    loss = decoupled(target_weight=target_weight, rest_weight=rest_weight, temperature=temperature)
    published = published_dkd(temperature, *weights)
    check_against_torch(loss, published, where=LABELLED, networks=OF_BOTH)


@pytest.mark.parametrize("weight,temperature", [(1.5, 1.0), (3.5, 3.0)])
def test_nkd_is_the_published_one(weight, temperature):
    loss = bind(nkd, rest_weight=weight, temperature=temperature)
    check_against_torch(loss, published_nkd(weight, temperature), where=LABELLED, networks=OF_BOTH)


# --- identities ---------------------------------------------------------------------------------


def value(loss, student, teacher, labels):
    outputs = Outputs(logits=jnp.asarray(student)), Outputs(logits=jnp.asarray(teacher))
    return jax.jit(lambda b, s, t, y: b(s, t, {"labels": y}))(loss, *outputs, jnp.asarray(labels))


def known():
    student, teacher, _ = draw()
    return student.logits, teacher.logits, np.arange(B) % K


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_target_part_plus_the_rest_part_weighted_by_the_teacher(temperature):
    """KL = TCKD + (1 - p_y) NCKD; the weights of `dkd` are numbers per example."""
    with jax.enable_x64(True):
        student, teacher, labels = known()
        p = scipy.special.softmax(teacher / temperature, -1)[np.arange(B), labels]
        loss = decoupled(rest_weight=1 - p, temperature=temperature)
        whole = bind(on_logits, divergence=forward_kl, temperature=temperature)
        args = student, teacher, labels
        np.testing.assert_allclose(value(loss, *args), value(whole, *args), rtol=1e-12)


def published_cakd(weight, temperature):
    """BCD + weight WCD of sets of classes, the strong one being the label alone."""

    def loss(torch, student, teacher, labels):
        strong = torch.arange(K) == labels.clamp(min=0)[:, None]
        log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
        value = 0.0
        mass = {}
        for name, members in (("strong", strong), ("weak", ~strong)):
            within = [x.masked_fill(~members, -torch.inf) for x in (log_p, log_q)]
            mass[name] = [torch.logsumexp(x, -1, keepdim=True) for x in within]
            log_within = [x - m for x, m in zip((log_p, log_q), mass[name], strict=True)]
            part = torch.where(
                members, log_within[0].exp() * (log_within[0] - log_within[1]), 0.0
            ).sum(-1)
            value = value + (1.0 if name == "strong" else weight) * part
        for of_teacher, of_student in mass.values():
            value = value + (of_teacher.exp() * (of_teacher - of_student))[:, 0]
        return temperature**2 * value

    return loss


def test_cakd_on_logits_is_dkd_with_a_target_weight_of_one():
    loss = decoupled(target_weight=1.0, rest_weight=6.0)
    check_against_torch(loss, published_cakd(6.0, 4.0), where=LABELLED, networks=OF_BOTH)


def test_parts_are_the_divergences_of_the_pair_and_of_the_rest():
    """Any divergence fits: alpha_beta by its sum over p^a q^b, formed from probabilities."""

    def by_hand(p, q, a, b):
        terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -terms.sum(-1) / (a * b)

    with jax.enable_x64(True):
        student, teacher, labels = known()
        p, q = (scipy.special.softmax(x / 4, -1) for x in (teacher, student))
        at = np.arange(B), labels
        pair = [np.stack([x[at], 1 - x[at]], -1) for x in (p, q)]
        rest = [x[np.arange(K) != labels[:, None]].reshape(B, K - 1) for x in (p, q)]
        rest = [x / x.sum(-1, keepdims=True) for x in rest]
        true = 4 * (by_hand(*pair, 0.5, 0.3) + 2 * by_hand(*rest, 0.8, -0.3))
        # Bound here: in float64.
        loss = decoupled(
            bind(alpha_beta, alpha=0.5, beta=0.3),
            bind(alpha_beta, alpha=0.8, beta=-0.3),
            rest_weight=2.0,
            temperature_power=1.0,
        )
        np.testing.assert_allclose(value(loss, student, teacher, labels), true, rtol=1e-10)


def test_equal_networks_have_no_loss():
    student, _, labels = known()
    for loss in (DKD, AB_DKD):
        moved = value(loss, student.astype(np.float32), student.astype(np.float32), labels)
        np.testing.assert_array_equal(moved, np.zeros(B))


def test_nkd_of_equal_networks_is_what_cross_entropies_leave():
    student, _, labels = known()
    p = scipy.special.softmax(student, -1)
    at = np.arange(B), labels
    rest = scipy.special.softmax(student[np.arange(K) != labels[:, None]].reshape(B, K - 1) / 3, -1)
    true = -p[at] * np.log(p[at]) + 1.5 * 9 * scipy.special.entr(rest).sum(-1)
    np.testing.assert_allclose(value(NKD, student, student, labels), true, rtol=1e-5)


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [DKD, NKD, bind(difficulty_weighted, loss=KD), bind(entropy_weighted, loss=DKD, temperature=4)],
    ids=["dkd", "nkd", "difficulty_weighted", "entropy_weighted dkd"],
)
def test_a_withheld_label_is_nan_unless_it_is_masked(loss):
    student, teacher, batch = draw()
    student, teacher = (Outputs(logits=o.logits.astype(np.float32)) for o in (student, teacher))
    values, mean, _ = evaluate(loss, student, teacher, batch, where="where")
    np.testing.assert_array_equal(np.isnan(values), batch["labels"] < 0)
    assert np.isnan(mean)  # loud, where a mask was forgotten
    _, mean, slopes = evaluate(loss, student, teacher, batch, where="labelled")
    assert np.isfinite(mean)
    for leaf in jax.tree.leaves(slopes):
        assert np.isfinite(leaf).all()
    withheld = batch["labels"] < 0
    assert np.all(np.asarray(slopes[1].logits)[withheld] == 0)
    assert np.all(np.any(np.asarray(slopes[1].logits)[~withheld] != 0, axis=-1))


def test_the_teachers_labels_stand_where_one_is_withheld():
    student, teacher, batch = draw()
    labels = np.where(batch["labels"] < 0, teacher.logits.argmax(-1), batch["labels"])
    assert np.any(labels != teacher.logits.argmax(-1))  # known ones stay
    loss = bind(with_teacher_labels, loss=DKD)
    found = value(loss, student.logits, teacher.logits, batch["labels"])
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, value(DKD, student.logits, teacher.logits, labels))
    assert loss.needs == ({"logits"}, {"logits"}) and not loss.couples_batch


def test_labels_that_do_not_fit_are_refused():
    student, teacher, _ = draw()
    for loss in (DKD, NKD):
        with pytest.raises(AssertionError, match=r"^labels must be integers .*; found float"):
            loss(student, teacher, {"labels": np.zeros(B, np.float32)})
        with pytest.raises(AssertionError) as error:
            loss(student, teacher, {"labels": np.zeros(B - 1, int)})
        expected = "labels must be integers [12], one for each row of the logits; found int64[11]."
        assert str(error.value) == expected
        with pytest.raises(
            ValueError, match=r"^teacher_logits must be a floating-point array .*; found None"
        ):
            loss(student, Outputs(), {"labels": np.zeros(B, int)})
    with pytest.raises(
        ValueError, match=r"^rest_weight must be a number, or an array that broadcasts"
    ):
        decoupled(rest_weight=jnp.ones(B + 1))(student, teacher, {"labels": np.zeros(B, int)})
    with pytest.raises(
        ValueError, match=r"^rest_weight must be a number, or an array that broadcasts"
    ):
        bind(nkd, rest_weight=jnp.ones(B + 1), temperature=1.0)(
            student, teacher, {"labels": np.zeros(B, int)}
        )


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DKD, AB_DKD, NKD], ids=["dkd", "dkd of alpha_beta", "nkd"])
@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_saturated_logits_are_finite(loss, gap):
    labels = np.arange(B) % K
    sure = (gap * np.eye(K, dtype=np.float32))[labels]
    for student in (sure, -sure, np.roll(sure, 1, axis=-1), 0 * sure):
        batch = {"labels": labels, "where": np.ones(B, bool)}
        outputs = Outputs(logits=student), Outputs(logits=sure)
        values, _, slopes = evaluate(loss, *outputs, batch, where="where")
        assert np.isfinite(values).all() and np.all(np.asarray(values) >= 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_a_confident_teacher_keeps_the_digits_of_what_it_leaves():
    """1 - p_y is 1e-13 and not 0 in float32: a tail of the right mass, not of none."""
    teacher, student = np.array([[30.0, 0, 0]]), np.array([[29.0, 0, 0]])
    labels = np.array([0])
    with jax.enable_x64(True):
        true = value(decoupled(reverse_kl, temperature=1.0), student, teacher, labels)
        p, q = (1 / (1 + np.exp(x[0, 0]) / 2) for x in (teacher, student))
        by_hand = q * np.log(q / p) + (1 - q) * (np.log1p(-q) - np.log1p(-p))
        np.testing.assert_allclose(true, by_hand, rtol=1e-6)
    single = [x.astype(np.float32) for x in (student, teacher)]
    found = value(decoupled(reverse_kl, temperature=1.0), *single, labels)
    np.testing.assert_allclose(found, true, rtol=1e-5)


@pytest.mark.parametrize("loss", [DKD, NKD], ids=["dkd", "nkd"])
def test_a_class_that_the_student_alone_lacks_pulls_it_up(loss):
    student, teacher, labels = known()
    student = student.astype(np.float32)
    student[np.arange(B), labels] = -INF
    batch = {"labels": labels, "where": np.ones(B, bool)}
    outputs = Outputs(logits=student), Outputs(logits=teacher.astype(np.float32))
    values, _, slopes = evaluate(loss, *outputs, batch, where="where")
    assert np.isfinite(values).all() and np.all(np.asarray(values) > 1e6)
    slope = np.asarray(slopes[1].logits)
    assert np.isfinite(slope).all() and np.all(slope[np.arange(B), labels] < 0)


def test_two_classes_have_no_rest():
    student, teacher = (x[:, :2] for x in known()[:2])
    labels = np.arange(B) % 2
    expected = value(
        bind(on_logits, divergence=forward_kl, temperature=4.0), student, teacher, labels
    )
    np.testing.assert_allclose(value(DKD, student, teacher, labels), expected, rtol=1e-4)


def test_it_is_a_term_of_an_objective():
    student, teacher, batch = draw()
    terms = {"it": Term(loss=DKD, weight=jnp.asarray(2.0), where="labelled", other="teacher")}
    scalar, means = total(terms, student, {"teacher": teacher}, batch)
    values = np.asarray(value(DKD, student.logits, teacher.logits, batch["labels"]))
    assert_close(means["it"], values[batch["labelled"]].mean(), 1e-5)
    assert_close(scalar, 2 * means["it"], 1e-6)
