"""Weights against numpy and torch: entropy_gated (BD-KD), and those of ER-KD, EA-KD, WTTM, WSLD."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp
from loss_contract import check_against_torch, check_contract

from abkd_jax.binding import bind
from abkd_jax.config.build import Builder
from abkd_jax.divergences import forward_kl, powered, reverse_kl
from abkd_jax.losses import (
    difficulty_weighted,
    entropy_aware,
    entropy_gated,
    entropy_weighted,
    on_logits,
    power_weighted,
    total,
)
from abkd_jax.types import Batch, Head, Outputs, Term

B, K = 12, 6
INF = np.inf

FORWARD, REVERSE = (bind(on_logits, divergence=kl) for kl in (forward_kl, reverse_kl))


def gated(gain=2.0, forward=FORWARD, reverse=REVERSE):
    return bind(entropy_gated, forward=forward, reverse=reverse, gain=gain)


def make(size=B, seed=0):
    """Logits of student and teacher, of as many scales as rows."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.normal(size=(size, K)) * rng.uniform(0.3, 4, (size, 1))  # noqa: E731
    student, teacher = draw(), draw()
    sign = np.sign(entropy(teacher) - entropy(student))
    assert {-1.0, 1.0} == set(sign)  # both sides of the gate
    return student.astype(np.float32), teacher.astype(np.float32)


@jax.jit
def evaluate(bound, student, teacher, batch=None):
    return bound(Outputs(logits=student), Outputs(logits=teacher), batch or {})


@jax.jit
def slopes(bound, student, teacher):
    summed = lambda *args: jnp.sum(evaluate(*args))  # noqa: E731
    return jax.grad(summed, argnums=(0, 1, 2))(bound, student, teacher)


def entropy(logits):
    return scipy.special.entr(scipy.special.softmax(np.asarray(logits, np.float64), -1)).sum(-1)


def kl(p_logits, q_logits):
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), -1) for x in (p_logits, q_logits))
    return scipy.special.rel_entr(p, q).sum(-1)


def expected(student, teacher, gain):
    h_student, h_teacher = entropy(student), entropy(teacher)
    forward = np.where(h_teacher > h_student, gain, 1.0) * kl(teacher, student)
    return forward + np.where(h_student > h_teacher, gain, 1.0) * kl(student, teacher)


LN2, LN3 = np.log(2), np.log(3)
BY_HAND = [
    # student, teacher, gain, value: p = (1/2, 1/2), q = (3/4, 1/4), or the other way around
    pytest.param(
        [LN3, 0],
        [0, 0],
        2.0,
        2 * np.log(4 / 3) / 2 + np.log(27 / 16) / 4,
        id="an overconfident student",
    ),
    pytest.param(
        [0, 0],
        [LN3, 0],
        2.0,
        np.log(27 / 16) / 4 + 2 * np.log(4 / 3) / 2,
        id="an underconfident one",
    ),
    pytest.param(
        [LN3, 0],
        [0, 0],
        3.0,
        3 * np.log(4 / 3) / 2 + np.log(27 / 16) / 4,
        id="the gain of ABKD's code",
    ),
    pytest.param([LN3, 0], [LN3, 0], 2.0, 0.0, id="equal"),
    pytest.param([LN3, 0], [0, 0], 1.0, LN3 / 4, id="a gain of 1: Jeffreys"),
    pytest.param([LN3, 0, -INF], [0, 0, -INF], 1.0, LN3 / 4, id="a class removed"),
]


@pytest.mark.parametrize("student,teacher,gain,value", BY_HAND)
def test_by_hand(student, teacher, gain, value):
    actual = evaluate(gated(gain), *(jnp.asarray(x, jnp.float32) for x in (student, teacher)))
    assert actual.shape == ()
    np.testing.assert_allclose(actual, value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_values_against_numpy(gain):
    student, teacher = make()
    actual = evaluate(gated(gain), student, teacher)
    assert actual.shape == (B,) and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected(student, teacher, gain), rtol=1e-5)


def test_the_default_gain_is_two():
    student, teacher = make()
    default = evaluate(bind(entropy_gated, forward=FORWARD, reverse=REVERSE), student, teacher)
    np.testing.assert_array_equal(default, evaluate(gated(2.0), student, teacher))


def test_float64():
    with jax.enable_x64(True):
        student, teacher = (x.astype(np.float64) for x in make())
        parts = [bind(on_logits, divergence=f) for f in (forward_kl, reverse_kl)]
        actual = evaluate(gated(2.0, *parts), student, teacher)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected(student, teacher, 2.0), rtol=1e-12)


def test_bfloat16_is_computed_in_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in make())
    actual = evaluate(gated(), student, teacher)
    assert actual.dtype == np.float32
    wide = evaluate(gated(), *(x.astype(jnp.float32) for x in (student, teacher)))
    np.testing.assert_allclose(actual, wide, rtol=1e-6)


def test_a_tie_weighs_both_parts_with_one():
    student, _ = make()
    np.testing.assert_array_equal(evaluate(gated(7.0, UNIT, UNIT), student, student), np.full(B, 2))
    # Other distributions with the entropy ln 2 to the last bit, in whatever order it is summed.
    other, same = (jnp.asarray(x, jnp.float32) for x in ([0, 0, -INF], [-INF, 0, 0]))
    assert evaluate(gated(7.0, UNIT, UNIT), same, other) == 2


def unit(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    """1 for each example."""
    del batch
    return jnp.ones(jnp.broadcast_shapes(student.logits.shape, teacher.logits.shape)[:-1])


def zero(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    """0 for each example."""
    return 0 * unit(student, teacher, batch)


UNIT, ZERO = bind(unit), bind(zero)


def test_the_weights_themselves():
    student, teacher = make()
    overconfident = entropy(teacher) > entropy(student)
    forward = evaluate(gated(3.0, UNIT, ZERO), student, teacher)
    np.testing.assert_array_equal(forward, np.where(overconfident, 3.0, 1.0))
    reverse = evaluate(gated(3.0, ZERO, UNIT), student, teacher)
    np.testing.assert_array_equal(reverse, np.where(overconfident, 1.0, 3.0))


# --- the controls -------------------------------------------------------------------------------


def test_a_gain_of_one_is_jeffreys():
    student, teacher = make()
    values = [evaluate(part, student, teacher) for part in (FORWARD, REVERSE)]
    np.testing.assert_allclose(evaluate(gated(1.0), student, teacher), sum(values), rtol=1e-6)
    actual = slopes(gated(1.0), student, teacher)[1:]
    parts = [slopes(part, student, teacher)[1:] for part in (FORWARD, REVERSE)]
    for slope, *exact in zip(actual, *parts, strict=True):
        np.testing.assert_allclose(slope, sum(exact), rtol=1e-5, atol=1e-6)


def test_forward_alone_is_mutual_learning():
    student, teacher = make()
    actual = evaluate(gated(1.0, FORWARD, ZERO), student, teacher)
    np.testing.assert_array_equal(actual, evaluate(FORWARD, student, teacher))


def test_the_teachers_term_is_forward_kl_with_the_teacher_in_training():
    """BD-KD's paper calls it reverse KL, KL(p_s || p_t), from the student's side."""
    student, teacher = make()
    values = evaluate(FORWARD, teacher, student)
    np.testing.assert_allclose(values, kl(student, teacher), rtol=1e-5)
    _, in_teacher, _ = slopes(FORWARD, teacher, student)
    exact = scipy.special.softmax(teacher, -1) - scipy.special.softmax(student, -1)
    np.testing.assert_allclose(in_teacher, exact, rtol=1e-5, atol=1e-6)


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        student, teacher = (x.astype(np.float64) for x in make())
        assert np.min(np.abs(entropy(student) - entropy(teacher))) > 1e-3
        parts = [bind(on_logits, divergence=f) for f in (forward_kl, reverse_kl)]
        in_bound, *in_logits = slopes(gated(2.0, *parts), student, teacher)
        value = lambda s, t, gain=2.0: evaluate(gated(gain, *parts), s, t)  # noqa: E731
        step = 1e-6
        rise = value(student, teacher, 2 + step) - value(student, teacher, 2 - step)
        np.testing.assert_allclose(in_bound.numbers["gain"], rise.sum() / (2 * step), rtol=1e-7)
        for k in range(K):
            move = step * np.eye(K)[k]
            rises = (
                value(student + move, teacher) - value(student - move, teacher),
                value(student, teacher + move) - value(student, teacher - move),
            )
            for slope, rise in zip(in_logits, rises, strict=True):
                np.testing.assert_allclose(slope[:, k], rise / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_gradient_of_the_gain_is_the_part_that_it_multiplies():
    student, teacher = make()
    slope = slopes(gated(), student, teacher)[0].numbers["gain"]
    overconfident = entropy(teacher) > entropy(student)
    part = np.where(overconfident, kl(teacher, student), kl(student, teacher))
    np.testing.assert_allclose(slope, part.sum(), rtol=1e-5)


def test_no_gradient_passes_through_the_gate():
    for slope in slopes(gated(2.0, UNIT, UNIT), *make())[1:]:
        np.testing.assert_array_equal(slope, np.zeros((B, K)))
    same, _ = make()  # at ties as well
    for slope in slopes(gated(), same, same)[1:]:
        np.testing.assert_allclose(slope, np.zeros((B, K)), atol=1e-6)


# --- shapes and masks ---------------------------------------------------------------------------


def test_a_batch_is_a_vmap_of_its_rows():
    student, teacher = make()
    rows = jax.jit(jax.vmap(evaluate, (None, 0, 0)))(gated(), student, teacher)
    np.testing.assert_allclose(rows, evaluate(gated(), student, teacher), rtol=1e-6)
    blocks = evaluate(gated(), *(x.reshape(3, 4, K) for x in (student, teacher)))
    np.testing.assert_allclose(blocks, np.reshape(rows, (3, 4)), rtol=1e-6)


def test_without_jit():
    student, teacher = make()
    actual = gated()(Outputs(logits=student), Outputs(logits=teacher), {})
    np.testing.assert_allclose(actual, evaluate(gated(), student, teacher), rtol=1e-6)


def test_removed_classes_equal_cutting_them():
    student, teacher = make()
    kept = np.array([0, 2, 3])
    whole = [np.where(np.isin(np.arange(K), kept), x, np.float32(-INF)) for x in (student, teacher)]
    cut = [x[:, kept] for x in (student, teacher)]
    np.testing.assert_allclose(evaluate(gated(), *whole), evaluate(gated(), *cut), rtol=1e-5)
    in_whole, in_cut = slopes(gated(), *whole), slopes(gated(), *cut)
    np.testing.assert_allclose(in_whole[0].numbers["gain"], in_cut[0].numbers["gain"], rtol=1e-5)
    for wide, narrow in zip(in_whole[1:], in_cut[1:], strict=True):
        np.testing.assert_allclose(wide[:, kept], narrow, rtol=1e-4, atol=1e-6)
        assert np.all(np.delete(wide, kept, 1) == 0)


def test_one_gain_per_example():
    student, teacher = make()
    gains = np.linspace(1, 3, B, dtype=np.float32)
    actual = evaluate(gated(gains), student, teacher)
    np.testing.assert_allclose(actual, expected(student, teacher, gains), rtol=1e-5)


def test_masks_do_not_matter_to_its_values():
    student, teacher = make()
    where = np.arange(B) % 3 > 0
    batch = {"where": where, "labelled": where, "labels": np.full(B, -1)}
    values = evaluate(gated(), student, teacher)
    np.testing.assert_array_equal(evaluate(gated(), student, teacher, batch), values)
    hidden = [np.where(where[:, None], x, np.float32(np.nan)) for x in (student, teacher)]
    term = {"it": Term(gated(), jnp.ones(()), other="teacher")}
    outputs = [Outputs(logits=x) for x in hidden]
    value, _ = total(term, outputs[0], {"teacher": outputs[1]}, batch)
    np.testing.assert_allclose(value, values[where].mean(), rtol=1e-6)


def test_in_chunks():
    student, teacher = (Outputs(hidden=x, head=Head(np.eye(x.shape[-1]))) for x in make())
    term, batch = {"it": Term(gated(), jnp.ones(()), other="teacher")}, {"where": np.ones(B, bool)}
    whole, _ = total(term, student, {"teacher": teacher}, batch)
    parts, _ = jax.jit(functools.partial(total, chunk=5))(
        term, student, {"teacher": teacher}, batch
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


# --- what it is made of -------------------------------------------------------------------------


def test_from_a_config():
    part = lambda name: dict(fn="on_logits", temperature=1.0, divergence=dict(fn=name))  # noqa: E731
    group = dict(
        fn="entropy_gated",
        weight=1.0,
        gain=2.0,
        forward=part("forward_kl"),
        reverse=part("reverse_kl"),
    )
    build = functools.partial(
        Builder(num_steps=8).objective,
        field="student.terms",
        learner="student",
        networks=("student", "teacher"),
    )
    terms = build({"bdkd": group})
    assert terms["bdkd"].other == "teacher"
    student, teacher = make()
    np.testing.assert_allclose(
        evaluate(terms["bdkd"].loss, student, teacher), expected(student, teacher, 2.0), rtol=1e-5
    )
    with pytest.raises(
        ValueError,
        match=r"^student\.terms\.bdkd\.forward\.fn must name a loss; forward_kl is a divergence",
    ):
        build({"bdkd": group | {"forward": dict(fn="forward_kl")}})
    with pytest.raises(ValueError, match=r"^student\.terms\.bdkd.*reverse"):
        build({"bdkd": {key: value for key, value in group.items() if key != "reverse"}})


def test_needs_and_coupling_follow_from_the_parts():
    def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return unit(student, teacher, batch)

    coupled.couples_batch, coupled.needs = True, ("hidden",)
    assert gated().needs == ({"logits"}, {"logits"}) and not gated().couples_batch
    assert gated(2.0, FORWARD, coupled).needs == ({"logits", "hidden"}, {"logits", "hidden"})
    assert gated(2.0, FORWARD, coupled).couples_batch and gated(2.0, coupled, UNIT).couples_batch


def test_a_part_that_is_not_one_value_per_example_is_refused():
    def reduced(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return jnp.mean(unit(student, teacher, batch))

    for name, bound in (
        ("forward", gated(2.0, reduced, UNIT)),
        ("reverse", gated(2.0, UNIT, reduced)),
    ):
        with pytest.raises(AssertionError) as error:
            evaluate(bound, *make())
        assert (
            f"entropy_gated's {name} must be one value per example, [12]; found float32[]."
            in str(error.value)
        )


def test_logits_that_are_missing_or_do_not_fit_are_refused():
    student, teacher = make()
    with pytest.raises(
        ValueError, match=r"^teacher_logits must be a floating-point array .*; found None"
    ):
        gated()(Outputs(logits=student), Outputs(), {})
    with pytest.raises(AssertionError, match="same number of classes"):
        gated()(Outputs(logits=student), Outputs(logits=teacher[:, 1:]), {})
    with pytest.raises(ValueError, match=r"^gain must be a number, or an array that broadcasts"):
        evaluate(gated(jnp.ones(B + 1)), student, teacher)


# --- one weight: ER-KD, EA-KD, WTTM, WSLD -------------------------------------------------------

KD = bind(on_logits, divergence=forward_kl, temperature=4.0)
ONE_WEIGHT = {
    "entropy_weighted": lambda loss: bind(entropy_weighted, loss=loss, temperature=4.0),
    "entropy_aware": lambda loss: bind(entropy_aware, loss=loss, temperature=3.0),
    "power_weighted": lambda loss: bind(power_weighted, loss=loss, teacher_power=0.3),
    "difficulty_weighted": lambda loss: bind(difficulty_weighted, loss=loss),
}
every_weight = pytest.mark.parametrize("weigh", ONE_WEIGHT.values(), ids=ONE_WEIGHT)


def torch_kd(torch, student, teacher, temperature=4.0):
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def torch_entropy(torch, logits, temperature):
    return torch.distributions.Categorical(logits=logits.detach() / temperature).entropy()


def published_er(torch, student, teacher, labels):
    return torch_entropy(torch, teacher, 4.0) * torch_kd(torch, student, teacher)


def published_ea(torch, student, teacher, labels):
    h_teacher, h_student = (torch_entropy(torch, x, 3.0) for x in (teacher, student))
    weight = 0.5 * h_teacher + 0.5 * h_teacher * h_student / np.log(K)
    return weight * torch_kd(torch, student, teacher)


def published_wttm(torch, student, teacher, labels):
    powers = torch.softmax(teacher.detach(), -1) ** 0.3
    total = powers.sum(-1)
    p, log_q = powers / total[:, None], torch.log_softmax(student, -1)
    return total * (p * (p.log() - log_q)).sum(-1)


def published_wsld(torch, student, teacher, labels):
    entropy = lambda x: torch.nn.functional.cross_entropy(  # noqa: E731
        x.detach(), labels.clamp(min=0), reduction="none"
    )
    weight = 1 - torch.exp(-entropy(student) / (entropy(teacher) + 1e-7))
    return weight * torch_kd(torch, student, teacher)


WTTM = bind(
    power_weighted,
    loss=bind(on_logits, divergence=bind(powered, divergence=forward_kl, teacher_power=0.3)),
    teacher_power=0.3,
)


@pytest.mark.parametrize(
    "loss,published,where,networks",
    [
        (ONE_WEIGHT["entropy_weighted"](KD), published_er, "where", ("student", "teacher")),
        (ONE_WEIGHT["entropy_aware"](KD), published_ea, "where", ("student", "teacher")),
        (WTTM, published_wttm, "where", ("student",)),
        (
            ONE_WEIGHT["difficulty_weighted"](KD),
            published_wsld,
            "labelled",
            ("student", "teacher"),
        ),
    ],
    ids=["ER-KD", "EA-KD", "WTTM", "WSLD"],
)
def test_the_published_formula(loss, published, where, networks):
    check_against_torch(loss, published, where=where, networks=networks)


def labelled():
    student, teacher = make()
    return student, teacher, {"labels": np.arange(B) % K}


@every_weight
def test_no_gradient_passes_through_a_weight(weigh):
    student, teacher, batch = labelled()
    of_sum = lambda s, t: jnp.sum(evaluate(weigh(UNIT), s, t, batch))  # noqa: E731
    for slope in jax.grad(of_sum, argnums=(0, 1))(student, teacher):
        np.testing.assert_array_equal(slope, np.zeros((B, K)))


@every_weight
def test_a_weight_multiplies_example_by_example(weigh):
    """Not the mean of the products' means: the shape is that of the batch, not [B, B]."""
    student, teacher, batch = labelled()
    weights = evaluate(weigh(UNIT), student, teacher, batch)
    assert weights.shape == (B,) and np.ptp(weights) > 0.1 and np.min(weights) >= 0
    values = evaluate(weigh(KD), student, teacher, batch)
    true = np.asarray(weights) * np.asarray(evaluate(KD, student, teacher, batch))
    np.testing.assert_allclose(values, true, rtol=1e-6)


def test_a_constant_entropy_is_a_factor():
    """ER-KD with teachers that are shifts of one: its entropy times KD."""
    student, teacher = make()
    teacher = np.stack([np.roll(teacher[0], shift) for shift in range(B)])
    values = evaluate(ONE_WEIGHT["entropy_weighted"](KD), student, teacher)
    true = entropy(teacher[0] / 4) * np.asarray(evaluate(KD, student, teacher))
    np.testing.assert_allclose(values, true, rtol=1e-5)


def test_entropy_weights_by_hand():
    """Uniform over n of the classes has the entropy ln n at any temperature."""
    pair, three = (np.where(np.arange(K) < n, 0.0, -30.0).astype(np.float32) for n in (2, 3))
    weigh = ONE_WEIGHT["entropy_weighted"]
    cold = bind(weigh(UNIT), temperature=0.5)
    np.testing.assert_allclose(evaluate(cold, pair, three), LN3, rtol=1e-6)
    cut = [np.where(x < 0, -INF, x).astype(np.float32) for x in (pair, three)]
    removed = [x[:4] for x in cut]  # the last class is removed from both: three are present
    aware = ONE_WEIGHT["entropy_aware"](UNIT)
    true = 0.5 * LN3 * (1 + LN2 / LN3)
    np.testing.assert_allclose(evaluate(aware, *removed), true, rtol=1e-6)
    np.testing.assert_allclose(evaluate(aware, *(x[:3] for x in removed)), true, rtol=1e-6)


def test_entropy_aware_is_at_most_ln_k_and_zero_with_one_class():
    flat = np.zeros((1, K), np.float32)
    aware = ONE_WEIGHT["entropy_aware"](UNIT)
    np.testing.assert_allclose(evaluate(aware, flat, flat), [np.log(K)], rtol=1e-6)
    one = np.where(np.arange(K) == 2, flat, np.float32(-INF))
    np.testing.assert_array_equal(evaluate(aware, one, one), [0])


def test_the_power_sum_is_one_at_one_and_counts_the_classes_at_zero():
    student, teacher = make()
    for power, true in ((1.0, 1.0), (0.0, K)):
        bound = bind(power_weighted, loss=UNIT, teacher_power=power)
        np.testing.assert_allclose(evaluate(bound, student, teacher), true, rtol=1e-6)


def test_the_power_sum_grows_to_a_power_of_the_classes_as_the_teacher_flattens():
    student, teacher = make()
    teacher = np.linspace(20, 0, B, dtype=np.float32)[:, None] * teacher[0]
    bound = bind(power_weighted, loss=UNIT, teacher_power=0.1)
    weights = evaluate(bound, student, teacher)
    assert np.all(weights >= 1) and np.all(np.diff(weights) > 0)
    np.testing.assert_allclose(weights[-1], K**0.9, rtol=1e-6)


# --- WTTM with weights of mean 1 ----------------------------------------------------------------


def wttm_and_ttm(power=0.1):
    ttm = bind(on_logits, divergence=bind(powered, divergence=forward_kl, teacher_power=power))
    return bind(power_weighted, loss=ttm, teacher_power=power, unit_mean=True), ttm


def pair(num_classes, scale, size=64):
    rng = np.random.default_rng(3)
    draw = lambda: rng.normal(size=(size, num_classes)).astype(np.float32)  # noqa: E731
    return draw(), scale * draw()


def test_weights_of_mean_one_against_numpy():
    student, teacher = make()
    where = np.arange(B) % 4 > 0
    weights = np.sum(scipy.special.softmax(teacher.astype(float), -1) ** 0.1, -1)
    bound = bind(power_weighted, loss=UNIT, teacher_power=0.1, unit_mean=True)
    found = evaluate(bound, student, teacher, {"where": where})
    np.testing.assert_allclose(found, weights / weights[where].mean(), rtol=1e-6)


def test_padding_has_no_part_in_weights_of_mean_one():
    (student, teacher), where = make(), np.arange(B) < 9
    terms = {"it": Term(loss=wttm_and_ttm()[0], weight=1.0, other="teacher")}

    def of_rows(student, teacher, where):
        networks = Outputs(logits=student), {"teacher": Outputs(logits=teacher)}
        return total(terms, *networks, {"where": where})[0]

    padded = [np.where(where[:, None], x, np.float32(np.nan)) for x in (student, teacher)]
    found, slope = jax.value_and_grad(of_rows)(*padded, where)
    expected, true = jax.value_and_grad(of_rows)(student[:9], teacher[:9], where[:9])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(slope[:9], true, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(slope[9:], np.zeros((3, K)))
    value, slope = jax.value_and_grad(of_rows)(*padded, np.zeros(B, bool))
    assert value == 0 and np.all(np.asarray(slope) == 0)


@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
def test_with_weights_of_mean_one_the_gradient_is_as_long_as_without(num_classes, scale):
    student, teacher = pair(num_classes, scale)
    batch = {"where": np.ones(len(student), bool)}
    of_mean = lambda s, bound: jnp.mean(evaluate(bound, s, teacher, batch))  # noqa: E731
    weighted, alone = (jax.grad(of_mean)(student, bound) for bound in wttm_and_ttm())
    ratio = np.linalg.norm(weighted) / np.linalg.norm(alone)
    assert 0.8 < ratio < 1.25


def test_weights_of_mean_one_keep_the_contract():
    def truth(student, teacher, batch):
        weights = np.sum(scipy.special.softmax(teacher.logits, -1) ** 0.3, -1)
        log_q = scipy.special.log_softmax(student.logits, -1)
        p = scipy.special.softmax(0.3 * teacher.logits, -1)
        loss = np.sum(p * (np.log(p) - log_q), -1)
        return weights / weights[batch["where"]].mean() * loss

    check_contract(wttm_and_ttm(0.3)[0], couples=True, stopped=("teacher",), truth=truth)


def test_weights_of_mean_one_couple_the_batch():
    weighted, alone = wttm_and_ttm()
    assert weighted.couples_batch and not alone.couples_batch
    assert not WTTM.couples_batch and not bind(weighted, unit_mean=False).couples_batch


def test_difficulty_weights_by_hand():
    """Cross-entropies of ln 4 and ln 4/3 against a teacher at ln 2, and saturated ones."""
    weigh = ONE_WEIGHT["difficulty_weighted"](UNIT)
    student = np.array([[0, LN3], [LN3, 0], [0, 0], [90, 0], [0, 90], [90, 0]], np.float32)
    teacher = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [90, 0], [90, 0]], np.float32)
    true = [0.75, 1 - np.exp(-np.log(4 / 3) / LN2), 1 - np.exp(-1), 0, 1, 0]
    true[0] = 1 - np.exp(-np.log(4) / LN2)
    values = evaluate(weigh, student, teacher, {"labels": np.zeros(6, int)})
    np.testing.assert_allclose(values, true, rtol=1e-5, atol=1e-7)


def test_difficulty_where_a_label_is_impossible():
    """-log 0 counts as one large number: alike on both sides, and then a ratio of 1."""
    one, none = [0, 0], [-INF, 0]
    student, teacher = (np.array(x, np.float32) for x in ([none, none, one], [none, one, none]))
    weigh = ONE_WEIGHT["difficulty_weighted"](UNIT)
    values = evaluate(weigh, student, teacher, {"labels": np.zeros(3, int)})
    np.testing.assert_allclose(values, [1 - np.exp(-1), 1, 0], rtol=1e-6, atol=1e-12)


def test_difficulty_against_one_row_of_a_teacher():
    student, teacher, batch = labelled()
    weigh = ONE_WEIGHT["difficulty_weighted"](KD)
    one, all_rows = teacher[:1], np.repeat(teacher[:1], B, 0)
    values = evaluate(weigh, student, one, batch)
    np.testing.assert_array_equal(values, evaluate(weigh, student, all_rows, batch))


def test_difficulty_refuses_labels_that_are_no_integers():
    student, teacher, _ = labelled()
    weigh = ONE_WEIGHT["difficulty_weighted"](KD)
    with pytest.raises(
        AssertionError, match=r"^labels must be integers \[12\], .*; found bool\[12\]"
    ):
        evaluate(weigh, student, teacher, {"labels": np.ones(B, bool)})


@every_weight
def test_one_weight_of_what_is_not_one_value_per_example_is_refused(weigh):
    def column(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return unit(student, teacher, batch)[:, None]

    bound, (student, teacher, batch) = weigh(column), labelled()
    with pytest.raises(AssertionError) as error:
        evaluate(bound, student, teacher, batch)
    name = bound.fn.__name__
    message = f"{name}'s loss must be one value per example, [12]; found float32[12, 1]."
    assert str(error.value) == message


@every_weight
def test_one_weight_needs_and_couples_what_its_loss_does(weigh):
    def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return unit(student, teacher, batch)

    coupled.couples_batch, coupled.needs = True, ("hidden",)
    other = {"logits", "hidden"}
    one_side = weigh(coupled).fn.__name__ in ("entropy_weighted", "power_weighted")
    assert weigh(coupled).needs == ({"hidden"} if one_side else other, other)
    assert weigh(coupled).couples_batch
    assert weigh(KD).needs == ({"logits"}, {"logits"}) and not weigh(KD).couples_batch


def test_a_temperature_that_is_not_positive_is_nan():
    student, teacher, batch = labelled()
    for name in ("entropy_weighted", "entropy_aware"):
        for temperature in (0.0, -1.0):
            bound = ONE_WEIGHT[name](UNIT)  # past `bind`, as a tracer would be
            bound = bound.replace(numbers=bound.numbers | {"temperature": temperature})
            assert np.isnan(evaluate(bound, student, teacher, batch)).all()
