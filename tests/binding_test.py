"""Binding: what becomes a leaf, what structure, what is refused; and the result is a pytree."""

import collections
import typing
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp

from abkd_jax import schedules
from abkd_jax.binding import (
    Bound,
    Domain,
    NonNegative,
    Number,
    Positive,
    Schedule,
    Statistic,
    Unit,
    as_number,
    at_step,
    bind,
    hyperparameters,
    nearest,
    schedule,
)
from abkd_jax.divergences import alpha_beta, alphanet, forward_kl, jensen_shannon, renyi
from abkd_jax.losses import cross_entropy, decoupled_features, norm_and_direction, on_logits
from abkd_jax.types import Batch, Divergence, Loss, Outputs, Term

STUDENT, TEACHER = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.0, 0.3])


def scaled(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    scale: Number = 3.0,
    shift: Array,
    power: int = 2,
    absolute: bool = False,
    axis: str = "last",
    steps: tuple[int, ...] = (1, 2),
) -> Array:
    """One keyword of every kind; its value is one that a calculator gives."""
    value = scale * divergence(student_logits, teacher_logits) ** power + shift
    return jnp.abs(value) if absolute else value


def gap(student_logits: Array, teacher_logits: Array) -> Array:
    return jnp.sum(teacher_logits - student_logits, axis=-1)


def summed(student: Outputs, teacher: Outputs, batch: Batch, *, first: Loss, second: Loss) -> Array:
    return first(student, teacher, batch) + second(student, teacher, batch)


def on_hidden(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    return jnp.sum(student.hidden - teacher.hidden, axis=-1)


def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    return student.logits[..., 0] - jnp.mean(student.logits)


on_hidden.needs = ("hidden",)
coupled.needs = ("logits", "features")
coupled.couples_batch = True


# --- what becomes what --------------------------------------------------------------------------


def test_bind_sorts_the_keywords_by_their_annotations():
    bound = bind(
        scaled, divergence=gap, shift=-20, power=3, absolute=True, axis="first", steps=(4,)
    )
    assert bound.fn is scaled
    assert set(bound.numbers) == {"divergence", "scale", "shift"}
    assert dict(bound.static) == {"power": 3, "absolute": True, "axis": "first", "steps": (4,)}
    assert isinstance(bound.numbers["divergence"], Bound)
    assert bound.numbers["divergence"].fn is gap
    # gap is 0.8 - 1.5 = -0.2, so 3 * (-0.2)^3 - 20 without its sign.
    np.testing.assert_allclose(bound(STUDENT, TEACHER), 20.024, rtol=1e-6)


def test_bind_includes_the_defaults():
    bound = bind(scaled, divergence=gap, shift=0.5)
    expected = {"power": 2, "absolute": False, "axis": "last", "steps": (1, 2)}
    assert dict(bound.static) == expected
    assert bound.numbers["scale"] == 3.0
    np.testing.assert_allclose(bound(STUDENT, TEACHER), 3 * 0.04 + 0.5, rtol=1e-6)


def test_a_list_becomes_a_tuple():
    assert dict(bind(scaled, divergence=gap, shift=0.0, steps=[5, 6]).static)["steps"] == (5, 6)


def test_a_bound_function_nests_as_it_is():
    inner = bind(alpha_beta, alpha=0.8, beta=0.3)
    nested = bind(on_logits, divergence=inner).numbers["divergence"]
    assert jax.tree.structure(nested) == jax.tree.structure(inner)
    assert nested.numbers == inner.numbers
    assert bind(summed, first=cross_entropy, second=on_hidden).numbers["second"].fn is on_hidden


def test_binding_again_changes_what_is_named_and_keeps_the_rest():
    first = bind(scaled, divergence=gap, shift=1.0, power=3)
    again = bind(first, shift=2.0)
    assert again.numbers["shift"] == 2.0 and first.numbers["shift"] == 1.0
    assert again.static == first.static
    assert bind(first, power=1).numbers["shift"] == 1.0


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(2, id="int"),
        pytest.param(2.0, id="float"),
        pytest.param(np.float32(2), id="float32"),
        pytest.param(np.float64(2), id="float64"),
        pytest.param(np.int64(2), id="int64"),
        pytest.param(np.full((), 2, np.uint8), id="uint8 array"),
        pytest.param(jnp.bfloat16(2), id="bfloat16"),
        pytest.param(jnp.asarray(2.0), id="jax array"),
    ],
)
def test_every_way_to_write_a_number_is_one_structure(value):
    reference = bind(alpha_beta, alpha=2.0, beta=0.5)
    bound = bind(alpha_beta, alpha=value, beta=0.5)
    assert jax.tree.structure(bound) == jax.tree.structure(reference)
    assert jax.tree.map(jax.typeof, bound) == jax.tree.map(jax.typeof, reference)
    assert bound.numbers["alpha"] == 2.0


def test_numbers_have_the_canonical_float_type():
    assert bind(alpha_beta, alpha=1, beta=0.5).numbers["alpha"].dtype == np.float32
    with jax.enable_x64(True):
        for value in (1, 0.1, np.float64(0.1), np.float32(0.1)):
            bound = bind(alpha_beta, alpha=value, beta=0.5)
            assert {leaf.dtype for leaf in jax.tree.leaves(bound)} == {np.dtype(np.float64)}
        assert bind(alpha_beta, alpha=0.1, beta=0).numbers["alpha"] == np.float64(0.1)


def test_arrays_are_numbers():
    bound = bind(alpha_beta, alpha=[1, 0.5], beta=np.zeros((2, 1)))
    assert bound.numbers["alpha"].shape == (2,) and bound.numbers["beta"].shape == (2, 1)
    assert jax.jit(lambda alpha: bind(alpha_beta, alpha=alpha, beta=0.0).numbers["alpha"])(3) == 3


def test_a_schedule_is_a_number():
    alpha = schedule(schedules.linear, start=1, end=0.5, steps=10)
    bound = bind(alpha_beta, alpha=alpha, beta=0.3)
    assert bound.numbers["alpha"] is alpha and isinstance(alpha, Schedule)
    assert len(jax.tree.leaves(bound)) == 3


# --- refusals -----------------------------------------------------------------------------------


def unannotated(student_logits: Array, teacher_logits: Array, *, alpha) -> Array:
    return student_logits[..., 0]


def optional(student_logits: Array, teacher_logits: Array, *, k: int | None = None) -> Array:
    return student_logits[..., 0]


def no_numbers(student_logits: Array, teacher_logits: Array) -> Array:
    return student_logits[..., 0]


REFUSED = [
    ("unknown", alpha_beta, dict(alpha=1.0, beta=0.0, gama=1.0),
     "alpha_beta.gama is unknown; alpha_beta takes alpha, beta."),
    ("unknown, near", alpha_beta, dict(alpha=1.0, betta=0.0),
     "alpha_beta.betta is unknown (did you mean 'beta'?); alpha_beta takes alpha, beta."),
    ("unknown before missing", alpha_beta, dict(gama=1.0),
     "alpha_beta.gama is unknown; alpha_beta takes alpha, beta."),
    ("takes none", no_numbers, dict(alpha=1.0),
     "no_numbers.alpha is unknown; no_numbers takes none."),
    ("missing", alpha_beta, dict(alpha=1.0),
     "alpha_beta.beta is missing; alpha_beta takes alpha, beta."),
    ("missing, nested", on_logits, dict(divergence=alpha_beta),
     "alpha_beta.alpha is missing; alpha_beta takes alpha, beta."),
    ("positional by name", alpha_beta, dict(student_logits=STUDENT),
     "alpha_beta.student_logits is unknown; alpha_beta takes alpha, beta."),
    ("annotation of no kind", optional, {},
     "optional.k must be annotated `Number` or the like, `Array`, `int`, `bool` or `str`, or "
     "`Divergence` or `Loss` (see abkd_jax.binding); found int | None."),
    ("bool for number", alpha_beta, dict(alpha=True, beta=0.0),
     "alpha_beta.alpha must be a number; found True."),
    ("bools for number", alpha_beta, dict(alpha=0.0, beta=np.ones(2, bool)),
     "alpha_beta.beta must be a number; found array([ True,  True])."),
    ("string for number", alpha_beta, dict(alpha="1", beta=0.0),
     "alpha_beta.alpha must be a number; found '1'."),
    ("None for number", alpha_beta, dict(alpha=None, beta=0.0),
     "alpha_beta.alpha must be a number; found None."),
    ("complex for number", alpha_beta, dict(alpha=1j, beta=0.0),
     "alpha_beta.alpha must be a number; found 1j."),
    ("group for number", alpha_beta, dict(alpha={"fn": "linear"}, beta=0.0),
     "alpha_beta.alpha must be a number; found {'fn': 'linear'}."),
    ("number for function", on_logits, dict(divergence=3.0),
     "on_logits.divergence must be a divergence, a function; found 3.0."),
    ("name for function", on_logits, dict(divergence="forward_kl"),
     "on_logits.divergence must be a divergence, a function; found 'forward_kl'."),
    ("float for int", scaled, dict(divergence=gap, shift=0.0, power=2.0),
     "scaled.power must be of type int; found 2.0."),
    ("bool for int", scaled, dict(divergence=gap, shift=0.0, power=True),
     "scaled.power must be of type int; found True."),
    ("string for int", scaled, dict(divergence=gap, shift=0.0, power="2"),
     "scaled.power must be of type int; found '2'."),
    ("int for bool", scaled, dict(divergence=gap, shift=0.0, absolute=1),
     "scaled.absolute must be of type bool; found 1."),
    ("int for string", scaled, dict(divergence=gap, shift=0.0, axis=-1),
     "scaled.axis must be of type str; found -1."),
    ("int for tuple", scaled, dict(divergence=gap, shift=0.0, steps=3),
     "scaled.steps must be of type tuple; found 3."),
]  # fmt: skip


@pytest.mark.parametrize(
    "fn,hypers,message", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refusals(fn, hypers, message):
    with pytest.raises(TypeError) as error:
        bind(fn, **hypers)
    assert str(error.value) == message


def held_out(student_logits: Array, teacher_logits: Array, *, test: int | str) -> Array:
    """One keyword that is either of two types."""
    return student_logits[..., 0] - len(f"{test}")


def test_a_union_is_structure():
    for value in (3, "test.txt"):
        assert dict(bind(held_out, test=value).static) == {"test": value}
    for value in (3.0, True, None):
        with pytest.raises(TypeError) as error:
            bind(held_out, test=value)
        expected = f"held_out.test must be of type int or str; found {value!r}."
        assert str(error.value) == expected


def test_a_keyword_without_annotation_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"^unannotated\.alpha must be annotated .*; found nothing\.$"
    ):
        bind(unannotated, alpha=1.0)


def test_a_schedule_is_refused_like_any_function():
    with pytest.raises(TypeError) as error:
        schedule(schedules.linear, start=1.0, end=0.0, step=3)
    expected = (
        "linear.step is unknown (did you mean 'steps'?); linear takes start, end, steps, begin."
    )
    assert str(error.value) == expected
    with pytest.raises(TypeError) as error:
        schedule(schedules.linear, start=1.0, end=0.0, steps=3.0)
    assert str(error.value) == "linear.steps must be of type int; found 3.0."


def test_a_tuple_of_the_wrong_elements_is_refused():
    with pytest.raises(TypeError, match=r"^scaled\.steps must be .*; found \(1\.5, 'a'\)\.$"):
        bind(scaled, divergence=gap, shift=0.0, steps=(1.5, "a"))


def test_a_ragged_list_is_no_number():
    with pytest.raises(TypeError, match=r"^alpha_beta\.alpha must be a number; found \[1, "):
        bind(alpha_beta, alpha=[1, [2, 3]], beta=0.0)


def test_a_schedule_is_no_divergence():
    with pytest.raises(TypeError, match=r"^on_logits\.divergence must be "):
        bind(on_logits, divergence=schedule(schedules.constant, value=1.0))


def test_a_schedule_of_schedules_is_refused():
    inner = schedule(schedules.constant, value=2.0)
    with pytest.raises(TypeError, match=r"^constant\.value must be a number; found another sched"):
        schedule(schedules.constant, value=inner)


def test_a_loss_is_no_divergence_and_the_other_way_round():
    with pytest.raises(
        TypeError, match=r"^on_logits\.divergence must be a divergence; found the ot"
    ):
        bind(on_logits, divergence=cross_entropy)
    with pytest.raises(
        TypeError, match=r"^summed\.first must be a loss; found the other of the two"
    ):
        bind(summed, first=forward_kl, second=on_hidden)


def test_binding_a_schedule_again_keeps_it_a_schedule():
    again = bind(schedule(schedules.constant, value=1.0), value=2.0)
    assert isinstance(again, Schedule) and again.numbers["value"] == 2.0


# --- domains ------------------------------------------------------------------------------------


def domains(
    student_logits: Array,
    teacher_logits: Array,
    *,
    number: Number = 0.0,
    positive: Positive = 1.0,
    non_negative: NonNegative = 0.0,
    unit: Unit = 0.5,
    clip: typing.Annotated[float | Array, Domain(0, 1)] = 0.5,
    decay: typing.Annotated[float | Array, Domain(0, 1, open_high=True)] = 0.0,
    limit: typing.Annotated[float | Array, Domain(1, finite=False)] = 1.0,
    order: Number = 1.0,
) -> Array:
    """A plugin, whose `clip` and `order` have other domains than those of the library."""
    return student_logits[..., 0]


@pytest.mark.parametrize(
    "fn,numbers",
    [
        (domains, dict(clip=0.5, order=-1.0, number=-1e30, unit=0, non_negative=0, decay=0.99)),
        (domains, dict(unit=[0.0, 0.5, 1.0], positive=np.float32(1e-30), limit=np.inf)),
        (alphanet, dict(clip=np.inf, alpha_min=-3)),
        (renyi, dict(order=0)),
        (alpha_beta, dict(alpha=-2.0, beta=1e3)),
    ],
)
def test_numbers_inside_of_their_domain(fn, numbers):
    bound = bind(fn, **numbers).numbers
    for name, number in numbers.items():
        np.testing.assert_array_equal(bound[name], np.float32(number))


@pytest.mark.parametrize(
    "fn,numbers,message",
    [
        (domains, dict(number=np.inf), "domains.number must be a finite number; found inf."),
        (domains, dict(number=np.nan), "domains.number must be a finite number; found nan."),
        (domains, dict(positive=0), "domains.positive must be greater than 0 and finite; found 0."),
        (domains, dict(non_negative=-1),
         "domains.non_negative must be at least 0 and finite; found -1."),
        (domains, dict(unit=1.5), "domains.unit must be between 0 and 1; found 1.5."),
        (domains, dict(unit=[0.5, 2.0]), "domains.unit must be between 0 and 1; found [0.5, 2.0]."),
        (domains, dict(decay=1.0), "domains.decay must be at least 0 and less than 1; found 1.0."),
        (domains, dict(limit=np.nan), "domains.limit must be at least 1; found nan."),
        (alphanet, dict(clip=0.5), "alphanet.clip must be at least 1; found 0.5."),
        (renyi, dict(order=-1.0), "renyi.order must be at least 0 and finite; found -1.0."),
        (on_logits, dict(divergence=forward_kl, temperature=0.0),
         "on_logits.temperature must be greater than 0 and finite; found 0.0."),
        (cross_entropy, dict(label_smoothing=1.5),
         "cross_entropy.label_smoothing must be between 0 and 1; found 1.5."),
    ],
)  # fmt: skip
def test_numbers_outside_of_their_domain(fn, numbers, message):
    with pytest.raises(ValueError) as error:
        bind(fn, **numbers)
    assert str(error.value) == message


def test_what_is_not_concrete_passes():
    traced = jax.jit(lambda x: bind(domains, positive=x, unit=x).numbers["unit"])(-3.0)
    assert traced == -3.0
    jax.eval_shape(lambda x: bind(domains, unit=x), jax.ShapeDtypeStruct((), float))
    ramp = schedule(schedules.linear, start=-1.0, end=2.0, steps=10)
    assert bind(domains, unit=ramp).numbers["unit"] is ramp


def test_a_statistic_stands_for_an_array_alone():
    means = Statistic("class_means")
    assert bind(norm_and_direction, centers=means).numbers["centers"] is means
    for name in ("number", "unit"):
        with pytest.raises(TypeError, match=rf"^domains\.{name} must be a number; found Statistic"):
            bind(domains, **{name: means})


# --- a pytree -----------------------------------------------------------------------------------


def test_one_compile_for_fifty_values_and_one_for_every_structure():
    traces = collections.Counter()

    @jax.jit
    def value(bound):
        traces[dict(bound.static)["power"]] += 1
        return bound(STUDENT, TEACHER)

    for index in range(50):
        shift = index if index % 2 else float(index)
        actual = value(bind(scaled, divergence=gap, shift=shift, scale=0.5 * index))
        np.testing.assert_allclose(actual, 0.5 * index * 0.04 + index, rtol=1e-5)
    assert traces == {2: 1}
    value(bind(scaled, divergence=gap, shift=0.0, power=3))
    assert traces == {2: 1, 3: 1}


def test_the_function_is_structure():
    kl, js = bind(forward_kl), bind(jensen_shannon, teacher_weight=0.5)
    nested = [bind(on_logits, divergence=divergence) for divergence in (kl, js)]
    assert jax.tree.structure(nested[0]) != jax.tree.structure(nested[1])
    assert jax.tree.structure(nested[0]) == jax.tree.structure(bind(on_logits, divergence=kl))
    assert hash(jax.tree.structure(nested[0])) == hash(
        jax.tree.structure(bind(on_logits, divergence=forward_kl))
    )


def test_vmap_sweeps_over_the_numbers():
    scales, shifts = jnp.arange(4.0), jnp.array([1.0, -1.0, 0.0, 2.0])
    members = jax.vmap(lambda c, d: bind(scaled, divergence=gap, scale=c, shift=d))(scales, shifts)
    values = jax.vmap(lambda bound: bound(STUDENT, TEACHER))(members)
    np.testing.assert_allclose(values, 0.04 * scales + shifts, rtol=1e-5, atol=1e-7)
    # A sweep over one number alone, the others shared.
    numbers = {"divergence": None, "scale": 0, "shift": None}
    bound = bind(scaled, divergence=gap, scale=scales, shift=1.0)
    axes = bound.replace(numbers=numbers)
    values = jax.vmap(lambda bound: bound(STUDENT, TEACHER), in_axes=(axes,))(bound)
    np.testing.assert_allclose(values, 0.04 * scales + 1, rtol=1e-5)


def test_grad_goes_through_the_numbers():
    bound = bind(scaled, divergence=gap, shift=0.5, scale=3.0)
    gradient = jax.grad(lambda bound: bound(STUDENT, TEACHER))(bound)
    np.testing.assert_allclose(gradient.numbers["scale"], 0.04, rtol=1e-5)
    np.testing.assert_allclose(gradient.numbers["shift"], 1.0)
    assert jax.tree.structure(gradient) == jax.tree.structure(bound)
    nested = bind(on_logits, divergence=bind(jensen_shannon, teacher_weight=0.5))
    outputs = Outputs(logits=STUDENT), Outputs(logits=TEACHER)
    slope = jax.grad(lambda bound: bound(*outputs, {}))(nested).numbers["divergence"]
    with jax.enable_x64(True):
        step = 1e-5
        values = [
            jensen_shannon(
                STUDENT.astype(float), TEACHER.astype(float), teacher_weight=0.5 + sign * step
            )
            for sign in (1, -1)
        ]
        expected = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(slope.numbers["teacher_weight"], expected, rtol=1e-4)


# --- needs and couples_batch --------------------------------------------------------------------


def test_needs_is_the_union_over_all_depths():
    assert bind(gap).needs == (set(), set())
    assert bind(cross_entropy).needs == ({"logits"}, set())
    inner = bind(summed, first=on_hidden, second=coupled)
    assert inner.needs.own == inner.needs.other == {"hidden", "logits", "features"}
    assert bind(summed, first=cross_entropy, second=inner).needs == inner.needs
    found = bind(summed, first=cross_entropy, second=on_hidden).needs
    assert found == ({"logits", "hidden"}, {"hidden"})


def test_needs_of_each_side():
    def of_head(student: Outputs, teacher: Outputs, batch: Batch, *, loss: Loss) -> Array:
        return loss(student, teacher, batch)

    of_head.needs = {"other": ("head",)}
    assert bind(of_head, loss=cross_entropy).needs == ({"logits"}, {"head"})
    assert bind(of_head, loss=on_hidden).needs == ({"hidden"}, {"hidden", "head"})
    nested = bind(of_head, loss=bind(of_head, loss=decoupled_features_bound()))
    assert nested.needs == ({"hidden"}, {"hidden", "head"})


def decoupled_features_bound():
    return bind(decoupled_features, strong_weight=1.0, weak_weight=1.0, temperature=1.0)


def test_needs_labels_is_inherited():
    assert not bind(summed, first=cross_entropy, second=on_hidden).needs_labels
    assert bind(summed, first=cross_entropy, second=decoupled_features_bound()).needs_labels


def test_couples_batch_is_inherited_at_all_depths():
    apart = bind(summed, first=cross_entropy, second=on_hidden)
    inner = bind(summed, first=cross_entropy, second=coupled)
    assert not apart.couples_batch and bind(coupled).couples_batch
    assert inner.couples_batch and bind(summed, first=inner, second=apart).couples_batch
    assert not bind(summed, first=apart, second=apart).couples_batch


def test_a_keyword_can_decide_what_a_function_says():
    def optional(student: Outputs, teacher: Outputs, batch: Batch, *, whole: bool = False) -> Array:
        return cross_entropy(student, teacher, batch)

    optional.couples_batch = "whole"
    assert not bind(optional).couples_batch and bind(optional, whole=True).couples_batch
    assert bind(summed, first=cross_entropy, second=bind(optional, whole=True)).couples_batch
    assert not bind(summed, first=cross_entropy, second=optional).couples_batch


# --- schedules in place of numbers --------------------------------------------------------------


def test_at_step_replaces_every_schedule_and_nothing_else():
    ramp = schedule(schedules.linear, start=0.0, end=1.0, steps=10)
    divergence = bind(scaled, divergence=gap, scale=ramp, shift=5.0)
    loss = bind(on_logits, divergence=divergence)
    terms = {"distill": Term(loss=loss, weight=ramp, where="labelled", other="teacher")}
    resolved = at_step(terms, 4)["distill"]
    assert resolved.where == "labelled"
    np.testing.assert_allclose(resolved.weight, 0.4, rtol=1e-6)
    inner = resolved.loss.numbers["divergence"]
    np.testing.assert_allclose(inner.numbers["scale"], 0.4, rtol=1e-6)
    assert inner.numbers["shift"] is divergence.numbers["shift"]
    traced = jax.jit(at_step)(terms, 4)
    jax.tree.map(np.testing.assert_array_equal, traced, at_step(terms, 4))
    assert at_step(terms, 4)["distill"].loss(
        Outputs(logits=STUDENT), Outputs(logits=TEACHER), {}
    ) == pytest.approx(0.4 * 0.04 + 5.0)


def test_the_end_points_of_a_schedule_are_leaves():
    ramp = schedule(schedules.linear, start=0.0, end=1.0, steps=10)
    slope = jax.grad(lambda ramp: at_step(ramp, 4))(ramp)
    np.testing.assert_allclose(slope.numbers["start"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(slope.numbers["end"], 0.4, rtol=1e-6)


def test_a_call_with_an_unresolved_schedule_is_refused():
    ramp = schedule(schedules.linear, start=0.0, end=1.0, steps=10)
    bound = bind(alpha_beta, alpha=1.0, beta=ramp)
    message = "alpha_beta: beta is a schedule; call at_step(bound, step) first."
    outputs = Outputs(logits=STUDENT), Outputs(logits=TEACHER)
    for call in (
        lambda: bound(STUDENT, TEACHER),
        lambda: jax.jit(lambda bound: bound(STUDENT, TEACHER))(bound),
        lambda: bind(on_logits, divergence=bound)(*outputs, {}),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


# --- the small functions ------------------------------------------------------------------------


def test_hyperparameters_are_the_keyword_only_parameters():
    found = hyperparameters(alpha_beta)  # through jit
    assert list(found) == ["alpha", "beta"]
    assert found["alpha"].annotation == Number

    def late(student_logits: "Array", *, alpha: "Number" = 1.0, k: "int") -> "Array":
        return student_logits

    assert [p.annotation for p in hyperparameters(late).values()] == [Number, int]


@pytest.mark.parametrize(
    "annotation",
    [Array, float | Array, Array | float, Number, Positive, typing.Annotated[float | Array, "m"]],
)
def test_annotations_of_numbers(annotation):
    def fn(x: Array, *, number) -> Array:
        return number * x

    fn.__annotations__["number"] = annotation
    assert bind(fn, number=2)(3.0) == 6.0


@pytest.mark.parametrize("annotation", [float, typing.Any, Callable, dict, int | float])
def test_annotations_of_nothing_that_can_be_bound(annotation):
    def fn(x: Array, *, number) -> Array:
        return number * x

    fn.__annotations__["number"] = annotation
    with pytest.raises(TypeError, match=r"^fn\.number must be annotated "):
        bind(fn, number=2.0)


def test_as_number_names_the_field():
    with pytest.raises(TypeError) as error:
        as_number("high", "student.ema_decay")
    assert str(error.value) == "student.ema_decay must be a number; found 'high'."
    with pytest.raises(ValueError, match=r"^student\.ema_decay must be at least 0; found -1\.$"):
        as_number(-1, "student.ema_decay", Domain(0, finite=False))
    assert as_number(3, "x").dtype == np.float32


def test_nearest_ends_a_refusal():
    names = ["alpha_beta", "forward_kl", "reverse_kl"]
    assert nearest("foward_kl", names) == " (did you mean 'forward_kl'?)"
    assert nearest("foward_kl", iter(names)) == " (did you mean 'forward_kl'?)"
    assert nearest("zzz", names) == nearest("x", []) == ""
