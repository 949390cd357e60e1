"""Losses and their total against torch and numpy: values, gradients, masks, padding.

To add a loss, add one row to LOSSES: everything below it is tested on every row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import scipy.special
from jax import Array
from jax import numpy as jnp

from abkd_jax import divergences, losses
from abkd_jax.binding import Bound, bind, kind_of, schedule
from abkd_jax.divergences import alpha_beta, forward_kl, reverse_kl
from abkd_jax.divergences.combinators import top_of
from abkd_jax.losses import cross_entropy, on_logits, term_counts, total
from abkd_jax.schedules import constant
from abkd_jax.types import Batch, Divergence, Head, Loss, Outputs, Term, Tokens

B, K = 12, 7
INF, NAN = np.inf, np.nan


def log_softmax(logits):
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)


def softmax(logits):
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)


def numpy_cross_entropy(student, teacher, batch, smoothing):
    del teacher
    log_q, labels = log_softmax(student), batch["labels"]
    target = np.where(np.arange(log_q.shape[-1]) == labels[..., None], 1 - smoothing, 0.0)
    present = ~np.isneginf(np.asarray(student, np.float64))
    target = target + smoothing * present / present.sum(-1, keepdims=True)
    values = -np.sum(np.where(target > 0, target * np.where(target > 0, log_q, 0), 0), axis=-1)
    return np.where(labels < 0, NAN, values)


def numpy_kl(p_logits, q_logits, temperature, power):
    p, q = (softmax(np.asarray(x, np.float64) / temperature) for x in (p_logits, q_logits))
    return temperature**power * scipy.special.rel_entr(p, q).sum(-1)


def numpy_alpha_beta(student, teacher, alpha, beta):
    p, q = softmax(teacher), softmax(student)
    kept = p > 0
    p, q = np.where(kept, p, 1), np.where(kept, q, 1)
    both = alpha + beta
    terms = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
    return -np.sum(np.where(kept, terms, 0), -1) / (alpha * beta)


def torch_cross_entropy(smoothing):
    def loss(torch, student, teacher, labels):
        del teacher
        loss = torch.nn.functional.cross_entropy
        return loss(student, labels, label_smoothing=smoothing, reduction="none")

    return loss


def torch_kl(temperature, power, reverse=False):
    def loss(torch, student, teacher, labels):
        del labels
        log_q = torch.log_softmax(student / temperature, -1)
        log_p = torch.log_softmax(teacher / temperature, -1)
        target, given = (log_q, log_p) if reverse else (log_p, log_q)
        kl = torch.nn.functional.kl_div(given, target, reduction="none", log_target=True)
        return kl.sum(-1) * temperature**power

    return loss


def torch_alpha_beta(alpha, beta, temperature, power):
    def loss(torch, student, teacher, labels):
        del labels
        p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
        both = alpha + beta
        terms = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
        return -terms.sum(-1) / (alpha * beta) * temperature**power

    return loss


class Row(NamedTuple):
    """A loss with its numbers, and what it must equal.

    Attributes:
        bound: the loss.
        where: the mask over which it is averaged.
        numpy: (student_logits, teacher_logits, batch) -> [...], in float64.
        torch: (torch, student, teacher, labels) -> [...], of torch's own functions.
    """

    bound: Bound
    where: str
    numpy: Callable[[Any, Any, Mapping[str, Any]], np.ndarray]
    torch: Callable[..., Any]


LOSSES = {
    "cross_entropy": Row(
        bind(cross_entropy),
        "labelled",
        lambda s, t, batch: numpy_cross_entropy(s, t, batch, 0.0),
        torch_cross_entropy(0.0),
    ),
    "cross_entropy, smoothed": Row(
        bind(cross_entropy, label_smoothing=0.1),
        "labelled",
        lambda s, t, batch: numpy_cross_entropy(s, t, batch, 0.1),
        torch_cross_entropy(0.1),
    ),
    "cross_entropy, uniform": Row(
        bind(cross_entropy, label_smoothing=1.0),
        "labelled",
        lambda s, t, batch: numpy_cross_entropy(s, t, batch, 1.0),
        torch_cross_entropy(1.0),
    ),
    "on_logits, forward KL": Row(
        bind(on_logits, divergence=forward_kl),
        "where",
        lambda s, t, batch: numpy_kl(t, s, 1.0, 2.0),
        torch_kl(1.0, 2.0),
    ),
    "on_logits, KD": Row(
        bind(on_logits, divergence=forward_kl, temperature=4.0),
        "where",
        lambda s, t, batch: numpy_kl(t, s, 4.0, 2.0),
        torch_kl(4.0, 2.0),
    ),
    "on_logits, reverse KL, no power": Row(
        bind(on_logits, divergence=reverse_kl, temperature=0.5, temperature_power=0.0),
        "where",
        lambda s, t, batch: numpy_kl(s, t, 0.5, 0.0),
        torch_kl(0.5, 0.0, reverse=True),
    ),
    "on_logits, alpha-beta": Row(
        bind(
            on_logits,
            divergence=bind(alpha_beta, alpha=0.8, beta=0.3),
            temperature=2.0,
            temperature_power=1.0,
        ),
        "where",
        lambda s, t, batch: 2 * numpy_alpha_beta(s / 2, t / 2, 0.8, 0.3),
        torch_alpha_beta(0.8, 0.3, 2.0, 1.0),
    ),
}
every_loss = pytest.mark.parametrize("row", LOSSES.values(), ids=LOSSES)


def make(size=B, seed=0):
    """Logits of both, and a batch with withheld labels and padding in no order."""
    rng = np.random.default_rng(seed)
    logits = [(2 * rng.normal(size=(size, K))).astype(np.float32) for _ in range(2)]
    where, labelled = rng.random(size) < 0.8, rng.random(size) < 0.6
    labels = np.where(labelled, rng.integers(0, K, size), -1).astype(np.int32)
    return *logits, {"labels": labels, "where": where, "labelled": where & labelled}


def full(batch):
    """The batch with nothing withheld and nothing padded."""
    size = len(batch["labels"])
    labels = np.random.default_rng(1).integers(0, K, size).astype(np.int32)
    return {"labels": labels, "where": np.ones(size, bool), "labelled": np.ones(size, bool)}


def call(bound, student, teacher, batch):
    return bound(Outputs(logits=student), Outputs(logits=teacher), batch)


def summed(terms, student, teacher, batch, counts=None):
    outputs = Outputs(logits=student), {"teacher": Outputs(logits=teacher)}
    return total(terms, *outputs, batch, counts=counts)


# Jitted, as in use; one compilation for all rows that differ in numbers.
per_example = jax.jit(call)
in_logits = jax.jit(jax.value_and_grad(summed, argnums=(1, 2), has_aux=True))
in_everything = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))


def evaluate_row(row, student, teacher, batch):
    """(total, metrics), and the gradients in both logits."""
    term = Term(loss=row.bound, weight=jnp.ones(()), where=row.where, other="teacher")
    return in_logits({"it": term}, student, teacher, batch)


COMBINED = ("cross_entropy, smoothed", "on_logits, KD", "on_logits, alpha-beta")


def combined():
    """An objective of several losses, each with a weight of its own."""
    return {
        name: Term(
            loss=LOSSES[name].bound,
            weight=jnp.asarray(weight),
            where=LOSSES[name].where,
            other="teacher",
        )
        for name, weight in zip(COMBINED, (0.5, 2.0, 0.25), strict=True)
    }


def in_float64(bound):
    """The same numbers, as they were written."""
    return jax.tree.map(lambda number: jnp.asarray(round(float(number), 6), float), bound)


# --- values and gradients -----------------------------------------------------------------------


@every_loss
def test_values_against_numpy(row):
    student, teacher, batch = make()
    actual = per_example(row.bound, student, teacher, batch)
    assert actual.shape == (B,) and actual.dtype == np.float32
    expected = row.numpy(student, teacher, batch)
    assert np.isnan(expected).any() == (row.where == "labelled")
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


@every_loss
def test_values_and_gradients_against_torch(row):
    torch = pytest.importorskip("torch", reason="torch, the oracle, is not installed")
    student, teacher, batch = make()
    batch = full(batch)
    s, t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (student, teacher))
    expected = row.torch(torch, s, t, torch.tensor(batch["labels"], dtype=torch.int64))
    actual = per_example(row.bound, student, teacher, batch)
    np.testing.assert_allclose(actual, expected.detach(), rtol=2e-5, atol=1e-6)
    theirs = torch.autograd.grad(expected.mean(), (s, t), allow_unused=True)
    _, ours = evaluate_row(row, student, teacher, batch)
    for slope, exact in zip(ours, theirs, strict=True):
        exact = np.zeros((B, K)) if exact is None else exact
        np.testing.assert_allclose(slope, exact, rtol=1e-4, atol=1e-7)


@every_loss
def test_without_jit(row):
    student, teacher, batch = make()
    out = ~batch[row.where][:, None]
    student, teacher = (np.where(out, np.float32(NAN), x) for x in (student, teacher))
    term = Term(loss=row.bound, weight=jnp.ones(()), where=row.where, other="teacher")
    expected, _ = evaluate_row(row, student, teacher, batch)
    actual = summed({"it": term}, student, teacher, batch)
    assert np.isfinite(actual[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)


@every_loss
def test_float64_stays_float64(row):
    with jax.enable_x64(True):
        student, teacher, batch = make()
        student, teacher = student.astype(np.float64), teacher.astype(np.float64)
        actual = per_example(in_float64(row.bound), student, teacher, batch)
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, row.numpy(student, teacher, batch), rtol=1e-11)


@every_loss
def test_gradients_in_the_numbers(row):
    with jax.enable_x64(True):
        student, teacher, batch = make()
        student, teacher, batch = student.astype(float), teacher.astype(float), full(batch)
        bound = in_float64(row.bound)
        slopes = mean_and_gradient(bound, student, teacher, batch)[1]
        leaves, structure = jax.tree.flatten(bound)
        assert leaves
        for index, slope in enumerate(jax.tree.leaves(slopes)):
            step = 1e-5 * np.eye(len(leaves))[index]
            means = [
                mean_and_gradient(
                    jax.tree.unflatten(structure, [*map(jnp.add, leaves, sign * step)]),
                    student,
                    teacher,
                    batch,
                )[0]
                for sign in (1, -1)
            ]
            np.testing.assert_allclose(slope, (means[0] - means[1]) / 2e-5, rtol=1e-6, atol=1e-9)


mean_and_gradient = jax.jit(jax.value_and_grad(lambda *args: jnp.mean(call(*args))))


@every_loss
def test_bfloat16_is_computed_in_float32(row):
    student, teacher, batch = make()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    widened = [np.asarray(x, np.float32) for x in rounded]
    (value, _), slopes = evaluate_row(row, *rounded, batch)
    (exact, _), exact_slopes = evaluate_row(row, *widened, batch)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for slope, exact in zip(slopes, exact_slopes, strict=True):
        assert slope.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(slope, np.float32), exact, rtol=1e-2, atol=1e-6)


@every_loss
def test_any_leading_axes(row):
    student, teacher, batch = make()
    expected = np.asarray(per_example(row.bound, student, teacher, batch))
    shaped = lambda x: np.reshape(x, (3, 4, *x.shape[1:]))  # noqa: E731
    by_row = jax.jit(jax.vmap(jax.vmap(call, (None, 0, 0, 0)), (None, 0, 0, 0)))
    for fn in (per_example, by_row):
        actual = fn(row.bound, shaped(student), shaped(teacher), jax.tree.map(shaped, batch))
        np.testing.assert_allclose(actual, shaped(expected), rtol=1e-5, atol=1e-7)


# --- masks --------------------------------------------------------------------------------------


@every_loss
def test_the_mean_is_over_the_mask(row):
    student, teacher, batch = make()
    (value, means), _ = evaluate_row(row, student, teacher, batch)
    expected = row.numpy(student, teacher, batch)[batch[row.where]].mean()
    np.testing.assert_allclose(means["it"], expected, rtol=2e-5)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


@every_loss
def test_what_is_masked_out_changes_nothing(row):
    student, teacher, batch = make()
    out = ~batch[row.where]
    assert out.any()
    others = [np.where(out[:, None], 5 - x, x) for x in (student, teacher)]
    changed = batch | {"labels": np.where(out, -1, batch["labels"])}
    expected, slopes = evaluate_row(row, student, teacher, batch)
    actual, moved = evaluate_row(row, *others, changed)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for slope, other in zip(slopes, moved, strict=True):
        assert np.isfinite(slope).all() and np.all(np.asarray(slope)[out] == 0)
        np.testing.assert_array_equal(slope, other)


@every_loss
@pytest.mark.parametrize("filling", [NAN, INF, -INF, 3e38])
def test_masked_rows_may_be_nan_or_infinite(row, filling):
    """With labels that are no class: neither the value nor any gradient sees them."""
    student, teacher, batch = make()
    out = ~batch[row.where]
    terms = {"it": Term(loss=row.bound, weight=jnp.ones(()), where=row.where, other="teacher")}
    expected = in_everything(terms, student, teacher, batch)
    filled = [np.where(out[:, None], np.float32(filling), x) for x in (student, teacher)]
    unknown = batch | {"labels": np.where(out, K + 2, batch["labels"])}
    actual = in_everything(terms, *filled, unknown)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))


@every_loss
def test_padding_and_removed_classes_equal_cutting_them(row):
    student, teacher, batch = make()
    rows, kept = np.arange(8), np.array([1, 2, 4, 5])
    labels = np.where(batch["labels"] < 0, -1, batch["labels"] % len(kept))
    whole = [np.where(np.isin(np.arange(K), kept), x, -np.float32(INF)) for x in (student, teacher)]
    cut = [x[rows][:, kept] for x in (student, teacher)]
    masks = {name: batch[name] & np.isin(np.arange(B), rows) for name in ("where", "labelled")}
    padded = masks | {"labels": np.where(labels < 0, -1, kept[labels]).astype(np.int32)}
    expected, slopes = evaluate_row(
        row, *cut, jax.tree.map(lambda x: x[rows], batch | {"labels": labels})
    )
    actual, wide = evaluate_row(row, *whole, padded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)
    for slope, other in zip(slopes, np.asarray(wide), strict=True):
        np.testing.assert_allclose(other[np.ix_(rows, kept)], slope, rtol=1e-4, atol=1e-7)
        other[np.ix_(rows, kept)] = 0
        assert np.all(other == 0)


@every_loss
def test_an_empty_mask_gives_zero_and_zero_gradients(row):
    student, teacher, batch = make()
    nothing = dict.fromkeys(("where", "labelled"), np.zeros(B, bool))
    (value, means), slopes = evaluate_row(row, student, teacher, batch | nothing)
    assert value == 0 and means == {"it": 0}
    for slope in slopes:
        np.testing.assert_array_equal(slope, np.zeros((B, K)))


def test_a_withheld_label_is_nan_unless_it_is_masked():
    student, teacher, batch = make()
    values = per_example(bind(cross_entropy), student, teacher, batch)
    np.testing.assert_array_equal(np.isnan(values), batch["labels"] < 0)
    row = LOSSES["cross_entropy, smoothed"]
    (value, _), _ = evaluate_row(row._replace(where="where"), student, teacher, batch)
    assert np.isnan(value)  # loud, where a mask was forgotten
    (value, _), (slope, _) = evaluate_row(row, student, teacher, batch)
    assert np.isfinite(value) and np.isfinite(slope).all() and np.any(slope != 0)


# --- the total ----------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_its_metrics():
    student, teacher, batch = make()
    terms = combined()
    (value, means), (slopes, *_) = in_everything(terms, student, teacher, batch)
    assert set(means) == set(COMBINED)
    expected = 0.0
    for name, term in terms.items():
        mean = LOSSES[name].numpy(student, teacher, batch)[batch[term.where]].mean()
        np.testing.assert_allclose(means[name], mean, rtol=2e-5)
        # The slope in a weight is the mean, and a metric knows no weight.
        np.testing.assert_allclose(slopes[name].weight, mean, rtol=2e-5)
        expected += term.weight * mean
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_a_term_sees_the_network_that_it_names():
    student, teacher, batch = make()
    peer = np.roll(teacher, 1, axis=-1)
    row = LOSSES["on_logits, KD"]
    terms = {
        name: Term(loss=row.bound, weight=jnp.ones(()), other=name) for name in ("teacher", "peer")
    }
    others = {"teacher": Outputs(logits=teacher), "peer": Outputs(logits=peer)}
    _, means = total(terms, Outputs(logits=student), others, batch)
    for name, logits in (("teacher", teacher), ("peer", peer)):
        expected = row.numpy(student, logits, batch)[batch["where"]].mean()
        np.testing.assert_allclose(means[name], expected, rtol=2e-5)
    assert abs(means["teacher"] - means["peer"]) > 0.1


def test_parts_add_up_to_the_whole():
    student, teacher, batch = make()
    terms = combined()
    counts = term_counts(terms, batch)
    assert counts == {name: batch[term.where].sum() for name, term in terms.items()}
    expected, slopes = in_everything(terms, student, teacher, batch)
    split = [np.split(x, 3) for x in jax.tree.leaves((student, teacher, batch))]
    structure = jax.tree.structure((student, teacher, batch))
    parts = [jax.tree.unflatten(structure, leaves) for leaves in zip(*split, strict=True)]
    assert len({int(part[2]["labelled"].sum()) for part in parts}) > 1  # else a mean of means
    values, grads = zip(*[in_everything(terms, *part, counts) for part in parts], strict=True)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, jax.tree.map(lambda *x: sum(x), *values), expected)
    of_terms, *of_logits = zip(*grads, strict=True)
    jax.tree.map(close, jax.tree.map(lambda *x: sum(x), *of_terms), slopes[0])
    for joined, slope in zip(of_logits, slopes[1:], strict=True):
        close(np.concatenate(joined), slope)


def test_a_part_without_an_example_adds_nothing_and_is_no_nan():
    student, teacher, batch = make()
    terms = combined()
    empty = batch | dict.fromkeys(("where", "labelled"), np.zeros(B, bool))
    for counts in (term_counts(terms, batch), dict.fromkeys(terms, jnp.zeros((), int))):
        (value, means), slopes = in_everything(terms, student, teacher, empty, counts)
        assert value == 0 and all(mean == 0 for mean in means.values())
        assert all(np.all(np.asarray(slope) == 0) for slope in jax.tree.leaves(slopes))


# --- refusals -----------------------------------------------------------------------------------


def batch_mean(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    return jnp.mean(student.logits)


def per_class(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    return student.logits


def a_column(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    return student.logits[:, :1]


@pytest.mark.parametrize(
    "loss,found", [(batch_mean, "[]"), (per_class, "[12, 7]"), (a_column, "[12, 1]")]
)
def test_a_loss_that_does_not_give_one_value_per_example(loss, found):
    student, teacher, batch = make()
    terms = {"mine": Term(loss=bind(loss), weight=jnp.ones(()), other="teacher")}
    message = (
        "the loss of term 'mine' must be floating-point [12], one value per example; found "
        f"float32{found}."
    )
    for fn in (summed, jax.jit(summed)):
        with pytest.raises(AssertionError) as error:
            fn(terms, student, teacher, batch)
        assert message in str(error.value)


FLOATS, LABELS = jnp.zeros((4, 3)), jnp.zeros(4, int)


@pytest.mark.parametrize(
    "loss,student,teacher,labels,message",
    [
        pytest.param(
            bind(cross_entropy),
            FLOATS,
            None,
            jnp.zeros(4),
            "labels must be integers [4], one for each row of the logits; found float32[4].",
            id="labels of floats",
        ),
        pytest.param(
            bind(cross_entropy),
            FLOATS.astype(int),
            None,
            LABELS,
            "student_logits must be a floating-point array [..., K] with K >= 1; found int32[4, 3]",
            id="logits of integers",
        ),
        pytest.param(
            bind(cross_entropy),
            FLOATS,
            None,
            jnp.zeros(5, int),
            "labels must be integers [4], one for each row of the logits; found int32[5].",
            id="another number of labels",
        ),
        pytest.param(
            bind(cross_entropy),
            FLOATS,
            None,
            jnp.zeros((4, 3), int),
            "labels must be integers [4], one for each row of the logits; found int32[4, 3].",
            id="labels as rows",
        ),
        pytest.param(
            bind(on_logits, divergence=forward_kl),
            FLOATS,
            jnp.zeros((4, 5)),
            LABELS,
            "student_logits and teacher_logits must be of the same number of classes, their last "
            "axis, with leading axes that broadcast; found [[4, 3], [4, 5]].",
            id="another number of classes",
        ),
        pytest.param(
            bind(on_logits, divergence=forward_kl),
            FLOATS,
            jnp.zeros((5, 3)),
            LABELS,
            "student_logits and teacher_logits must be of the same number of classes, their last "
            "axis, with leading axes that broadcast; found [[4, 3], [5, 3]].",
            id="another number of examples",
        ),
        pytest.param(
            bind(on_logits, divergence=forward_kl),
            FLOATS,
            FLOATS.astype(int),
            LABELS,
            "teacher_logits must be a floating-point array [..., K] with K >= 1; found int32[4, 3]",
            id="teacher's logits of integers",
        ),
    ],
)
def test_shapes_and_types_that_do_not_fit(loss, student, teacher, labels, message):
    with pytest.raises(AssertionError) as error:
        call(loss, student, teacher, {"labels": labels})
    assert message in str(error.value)


@pytest.mark.parametrize("loss", [bind(cross_entropy), bind(on_logits, divergence=forward_kl)])
def test_outputs_without_logits_are_refused_by_name(loss):
    with pytest.raises((AssertionError, ValueError), match="logits"):
        call(loss, None, None, {"labels": LABELS})


def test_logits_in_place_of_outputs_are_refused():
    logits = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"^on_logits takes two Outputs, .*; found ndarray\.$"):
        on_logits(logits, logits, {}, divergence=forward_kl)


def test_a_weight_that_is_still_a_schedule_is_refused_by_name():
    student, teacher, batch = make()
    weight = schedule(constant, value=1.0)
    terms = {"task": Term(loss=bind(cross_entropy), weight=weight, where="labelled")}
    with pytest.raises(
        ValueError, match=r"^the weight of term 'task' must be a number: call at_step"
    ):
        summed(terms, student, teacher, batch)


# --- all that is public -------------------------------------------------------------------------

KD = bind(on_logits, divergence=forward_kl)
OF_KL = {
    "tempered": dict(temperature=2.0),
    "standardized": {},
    "single_pass": {},
    "powered": dict(teacher_power=0.5),
    "prior_shifted": dict(log_prior=np.linspace(0, 1, K)),
    "top_k": dict(k=2),
    "top_k_dropped": dict(k=2),
    "top_k_renormalised": dict(k=2),
}
DIVERGENCES = {
    "alpha_beta": dict(alpha=0.8, beta=0.3),
    "alpha_divergence": dict(alpha=0.5),
    "beta_divergence": dict(beta=0.5),
    "renyi": dict(order=2.0),
    "skew_forward_kl": dict(skew=0.1),
    "skew_reverse_kl": dict(skew=0.1),
    "jensen_shannon": dict(teacher_weight=0.5),
} | {name: dict(divergence=forward_kl) | numbers for name, numbers in OF_KL.items()}
OF_LABELS = {
    "cross_entropy": dict(label_smoothing=0.1),
    "dkd": dict(
        target_divergence=forward_kl,
        rest_divergence=forward_kl,
        target_weight=1.0,
        rest_weight=8.0,
        temperature=4.0,
    ),
    "nkd": dict(rest_weight=1.5, temperature=2.0),
    "difficulty_weighted": dict(loss=KD),
    "norm_and_direction": dict(centers=np.random.default_rng(2).normal(size=(K, 3))),
    "decoupled_features": dict(strong_weight=1.0, weak_weight=2.0, temperature=4.0),
    "input_gradient_alignment": {},
    "with_teacher_labels": dict(loss=bind(cross_entropy)),
}
EVERY_LOSS = OF_LABELS | {
    "on_logits": dict(divergence=forward_kl),
    "on_top_k": dict(divergence=forward_kl),
    "entropy_weighted": dict(loss=KD, temperature=4.0),
    "entropy_aware": dict(loss=KD, temperature=3.0),
    "entropy_gated": dict(forward=KD, reverse=bind(on_logits, divergence=reverse_kl)),
    "power_weighted": dict(loss=KD, teacher_power=0.1),
    "importance_weighted": dict(loss=losses.k3),
    "k1": {},
    "k2": {},
    "k3": {},
    "policy_gradient": {},
    "dist": {},
    "gram": {},
    "rank_correlation": {},
    "sinkhorn": {},
}


def public(module, kind):
    """The names of a module's functions of a kind."""
    return sorted(name for name in dir(module) if name[0] != "_" and _kind(module, name) == kind)


def _kind(module, name):
    return kind_of(getattr(module, name)) if callable(getattr(module, name)) else None


def bound_loss(name):
    """A loss, or the loss of a divergence, with the numbers above."""
    if hasattr(losses, name):
        return bind(getattr(losses, name), **EVERY_LOSS[name])
    function = getattr(divergences, name)
    return bind(on_logits, divergence=bind(function, **DIVERGENCES.get(name, {})))


EVERYTHING = public(losses, Loss) + public(divergences, Divergence)


def everything(size=B):
    """Both networks with all parts, and a batch whose labels and tokens are all known."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    student, teacher = (
        Outputs(
            logits=draw(size, K),
            hidden=draw(size, 3),
            head=Head(draw(3, K)),
            input_gradient=draw(size, 4),
        )
        for _ in range(2)
    )
    teacher = teacher.replace(top=top_of(teacher.logits, 3))
    tokens = {"inputs": Tokens(*np.ones((3, size), int)), "sampled": np.arange(size) % K}
    tokens["log_probs"] = -np.ones(size, np.float32)
    return student, teacher, full({"labels": np.zeros(size)}) | tokens


def of_total(bound, student, teacher, batch, where="where"):
    terms = {"it": Term(loss=bound, weight=jnp.ones(()), where=where, other="teacher")}
    return total(terms, student, {"teacher": teacher}, batch)[0]


# Of the ids of `top`, which are integers, there is none.
slopes_of_total = jax.value_and_grad(of_total, argnums=(0, 1, 2), allow_int=True)


def test_the_tables_above_have_every_loss():
    assert public(losses, Loss) == sorted(EVERY_LOSS)
    assert set(DIVERGENCES) < set(public(divergences, Divergence))
    for name in OF_LABELS:
        assert getattr(getattr(losses, name), "needs_labels", True), name


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", EVERYTHING)
def test_no_rank_is_promoted(name, per_row):
    bound = bound_loss(name)
    if per_row:
        bound = jax.tree.map(lambda x: jnp.full(B, x) if jnp.ndim(x) == 0 else x, bound)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(slopes_of_total, bound, *everything())


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_no_example_at_all(name):
    bound, args = bound_loss(name), everything(size=0)
    assert bound(*args).shape == (0,)
    value, slopes = slopes_of_total(bound, *args)
    assert value == 0
    for leaf in jax.tree.leaves(slopes):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("name", sorted(OF_LABELS.keys() - {"input_gradient_alignment"}))
def test_a_label_that_is_no_class_is_nan(name):
    student, teacher, batch = everything()
    labels = batch["labels"].copy()
    labels[:4] = -1, K, K + 5, np.iinfo(np.int32).max
    bound, unknown = bound_loss(name), (labels < 0) | (labels >= K)
    values = bound(student, teacher, batch | {"labels": labels})
    if name == "with_teacher_labels":
        unknown &= labels >= 0
    np.testing.assert_array_equal(np.isnan(values), unknown)
    known = bound(student, teacher, batch)
    np.testing.assert_array_equal(np.asarray(values)[4:], np.asarray(known)[4:])


@pytest.mark.parametrize("name", OF_LABELS)
def test_labels_that_are_missing_are_refused(name):
    student, teacher, _ = everything()
    message = rf"^batch\['labels'\] must be given, as {name} reads it; found \['where'\]\.$"
    with pytest.raises(ValueError, match=message):
        bound_loss(name)(student, teacher, {"where": np.ones(B, bool)})


@pytest.mark.parametrize("name", OF_LABELS)
def test_withheld_labels_leave_no_nan_behind_where_they_are_masked(name):
    """As jax_debug_nans finds: it looks at every result on the way, without jit."""
    student, teacher, batch = everything()
    withheld = np.arange(B) % 3 == 0
    batch |= {"labels": np.where(withheld, -1, batch["labels"]), "labelled": ~withheld}
    bound = bound_loss(name)
    with jax.debug_nans(True):
        value, _ = slopes_of_total(bound, student, teacher, batch, "labelled")
        if name == "cross_entropy":
            with pytest.raises(FloatingPointError):
                slopes_of_total(bound, student, teacher, batch, "where")
    assert np.isfinite(value)


@pytest.mark.parametrize("name", ["dist", "gram", "sinkhorn"])
def test_a_loss_that_couples_the_batch_sees_all_that_is_no_padding(name):
    """Its term's mask chooses examples of the mean alone; and no padding gets in."""
    student, teacher, batch = everything()
    labelled, where = np.arange(B) < 5, np.arange(B) < 9
    batch |= {"labelled": labelled, "where": where}
    bound = bound_loss(name)
    cut = jax.tree.map(lambda x: x[:9] if len(x) == B else x, (student, teacher, batch))
    expected = np.mean(np.asarray(bound(*cut))[:5])
    hide = lambda o: o.replace(logits=np.where(where[:, None], o.logits, np.float32(NAN)))  # noqa: E731
    value, (_, *slopes) = slopes_of_total(bound, hide(student), hide(teacher), batch, "labelled")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(slope.logits).all() for slope in slopes)


@every_loss
def test_what_it_reads(row):
    of_teacher = () if row.bound.fn is cross_entropy else ("logits",)
    assert row.bound.needs == ({"logits"}, set(of_teacher)) and not row.bound.couples_batch


# --- accelerators -------------------------------------------------------------------------------

QUICK = ("alpha_beta", "top_k", "decoupled_features", "dist", "cross_entropy")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.long) for x in EVERYTHING]
)
def test_value_and_gradient_lower_for_accelerators(name):
    lower = jax.export.export(jax.jit(slopes_of_total), platforms=["tpu", "cuda"])
    assert lower(bound_loss(name), *everything()).platforms == ("tpu", "cuda")
