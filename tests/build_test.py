"""From config to objective: what is built, what is refused, and that nothing else is reached."""

import os
import sys
import textwrap

import jax
import numpy as np
import pytest
import scipy.special
from jax import Array
from jax import numpy as jnp

from abkd_jax import divergences, losses, schedules
from abkd_jax.losses import cross_entropy, on_logits, total
from abkd_jax.objective import bind_group, bound, check_needs, kind_of, lookup, number, objective
from abkd_jax.types import (
    Batch,
    Bound,
    Divergence,
    Loss,
    Outputs,
    Schedule,
    Term,
    at_step,
    bind,
    schedule,
)

TASK = dict(fn="cross_entropy", weight=1.0)
DISTILL = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))
NAN = float("nan")


def build(terms, **options):
    defaults = dict(
        field="student.terms", learner="student", networks=("student", "teacher"), num_steps=100
    )
    return objective(terms, **(defaults | options))


def build_one(group, **options):
    return build({"it": group}, **options)["it"]


def refusal(terms, **options):
    """The message of the ValueError, which is one line."""
    with pytest.raises(ValueError) as error:
        build(terms, **options)
    message = str(error.value)
    assert type(error.value) is ValueError and "\n" not in message and message.endswith(".")
    return message


# --- what is built ------------------------------------------------------------------------------


def test_an_objective_is_its_terms():
    ramp = dict(fn="linear", start=1.0, end=0.5)
    alpha = dict(fn="alpha_beta", alpha=ramp, beta=0.3)
    terms = build(
        dict(
            task=dict(fn="cross_entropy", weight=0.25, where="labelled", label_smoothing=0.1),
            distill=dict(fn="on_logits", weight=ramp, temperature=2, divergence=alpha),
        )
    )
    assert list(terms) == ["task", "distill"]
    task, distill = terms["task"], terms["distill"]
    assert (task.where, task.other, distill.where, distill.other) == (
        "labelled",
        "teacher",
        "where",
        "teacher",
    )
    assert task.loss.fn is cross_entropy and distill.loss.fn is on_logits
    assert task.weight == 0.25 and task.loss.numbers["label_smoothing"] == np.float32(0.1)
    divergence = distill.loss.numbers["divergence"]
    assert divergence.fn is divergences.alpha_beta
    assert divergence.numbers["beta"] == np.float32(0.3)
    for scheduled in (distill.weight, divergence.numbers["alpha"]):
        assert isinstance(scheduled, Schedule) and scheduled.fn is schedules.linear
        np.testing.assert_allclose(at_step(scheduled, 50), 0.75)  # over the run's 100 steps
    # The same objective, bound by hand, is the same program.
    by_hand = bind(
        on_logits,
        temperature=2.0,
        divergence=bind(
            divergences.alpha_beta,
            alpha=schedule(schedules.linear, start=1.0, end=0.5, steps=100),
            beta=0.3,
        ),
    )
    assert jax.tree.structure(distill.loss) == jax.tree.structure(by_hand)


def test_its_value_is_that_of_numpy():
    rng = np.random.default_rng(0)
    logits = {name: rng.normal(size=(6, 4)).astype(np.float32) for name in ("student", "teacher")}
    labels = np.array([0, 3, -1, 2, -1, 1])
    batch = dict(labels=labels, where=np.arange(6) < 5, labelled=(labels >= 0) & (np.arange(6) < 5))
    terms = build(
        dict(
            task=TASK | dict(weight=0.5, where="labelled"),
            distill=DISTILL | dict(weight=2.0, temperature=3.0),
        )
    )
    outputs = {name: Outputs(logits=jnp.asarray(value)) for name, value in logits.items()}
    value, means = total(terms, outputs["student"], outputs, batch)
    log_q = scipy.special.log_softmax(logits["student"], axis=-1)
    tempered_p, tempered_q = (
        scipy.special.softmax(logits[name] / 3, axis=-1) for name in ("teacher", "student")
    )
    task = -np.mean([log_q[row, labels[row]] for row in (0, 1, 3)])
    distill = 9 * scipy.special.rel_entr(tempered_p, tempered_q).sum(-1)[:5].mean()
    np.testing.assert_allclose(means["task"], task, rtol=1e-5)
    np.testing.assert_allclose(means["distill"], distill, rtol=1e-5)
    np.testing.assert_allclose(value, 0.5 * task + 2 * distill, rtol=1e-5)


@pytest.mark.parametrize(
    "networks,other,expected",
    [
        pytest.param(("student",), None, "student", id="alone"),
        pytest.param(("student",), "student", "student", id="alone, by name"),
        pytest.param(("student", "teacher"), None, "teacher", id="two"),
        pytest.param(("teacher", "student"), None, "teacher", id="two, in the other order"),
        pytest.param(("student", "big"), None, "big", id="two, another name"),
        pytest.param(("student", "a", "b"), "b", "b", id="three"),
    ],
)
def test_the_other_network(networks, other, expected):
    group = TASK if other is None else TASK | {"other": other}
    assert build_one(group, networks=networks).other == expected


@pytest.mark.parametrize("where", ["where", "labelled"])
def test_the_mask(where):
    assert build_one(TASK | {"where": where}).where == where


@pytest.mark.parametrize(
    "name,kind,expected",
    [
        ("cross_entropy", Loss, cross_entropy),
        ("on_logits", Loss, on_logits),
        ("abkd_jax.losses.on_logits", Loss, on_logits),
        ("abkd_jax.losses.lift.on_logits", Loss, on_logits),
        ("abkd_jax.losses.task.cross_entropy", Loss, cross_entropy),
        ("forward_kl", Divergence, divergences.forward_kl),
        ("abkd_jax.divergences.tempered", Divergence, divergences.tempered),
    ],
)
def test_lookup_by_name_and_by_path(name, kind, expected):
    assert lookup(name, kind, field="x") is expected


def test_every_public_loss_and_divergence_can_be_named():
    reached = 0
    for module, kind in ((losses, Loss), (divergences, Divergence)):
        for name, fn in vars(module).items():
            if getattr(fn, "__module__", "").startswith(module.__name__) and kind_of(fn) is kind:
                reached += lookup(name, kind, field="x") is fn
    assert reached >= 8


def test_kind_of_reads_the_annotations_alone():
    def loss(a: Outputs, b: Outputs, c: Batch, *, weight: float | Array = 1.0) -> Array:
        return a.logits[..., 0]

    def late(a: "Outputs", b: "Outputs", c: "Batch") -> "Array":
        return a.logits[..., 0]

    def divergence(a: Array, b: Array) -> Array:
        return a[..., 0]

    def returns_nothing_said(a: Array, b: Array):
        return a

    def one_array(a: Array) -> Array:
        return a

    def three_arrays(a: Array, b: Array, c: Array) -> Array:
        return a

    def returns_a_float(a: Array, b: Array) -> float:
        return 0.0

    def unknown_names(a: "Nowhere", b: "Nowhere") -> "Nowhere":  # noqa: F821
        return a

    assert kind_of(loss) is kind_of(late) is Loss and kind_of(divergence) is Divergence
    assert kind_of(jax.jit(divergence)) is Divergence
    nothing = [returns_nothing_said, one_array, three_arrays, returns_a_float, unknown_names]
    for fn in (*nothing, lambda a, b: a, os, os.system, int, print, None, 3, "forward_kl"):
        assert kind_of(fn) is None


# --- numbers and schedules ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), jnp.asarray(3.0), np.full(2, 3.0)])
def test_numbers(value):
    result = number(value, "x.weight", 10)
    assert result.dtype == np.float32 and np.all(result == 3) and result.shape == np.shape(value)


def test_schedules_take_the_length_of_the_run_unless_given():
    group = dict(fn="linear", start=1.0, end=0.0)
    np.testing.assert_allclose(at_step(number(group, "x.weight", 10), 5), 0.5)
    given = number(group | {"steps": 50}, "x.weight", 10)
    np.testing.assert_allclose(at_step(given, 5), 0.9, rtol=1e-6)
    warm = dict(fn="warmup_cosine", value=1.0, end=0.0, warmup_steps=4)
    warm = number(warm, "x.weight", 12)
    np.testing.assert_allclose([at_step(warm, step) for step in (2, 8, 12)], [0.5, 0.5, 0.0])
    steps = dict(fn="piecewise", start=1.0, factor=0.1, boundaries=[3, 6])
    np.testing.assert_allclose(at_step(number(steps, "x.weight", 10), 6), 0.01, rtol=1e-6)
    assert at_step(number(dict(fn="constant", value=2), "x.weight", 10), 3) == 2


def test_a_number_is_left_unchanged_by_the_group_it_stands_in():
    group = dict(fn="linear", start=1.0, end=0.5)
    terms = {"it": DISTILL | {"temperature": group}}
    build(terms)
    assert group == dict(fn="linear", start=1.0, end=0.5)
    assert terms == {"it": DISTILL | {"temperature": group}}


# --- refusals -----------------------------------------------------------------------------------


def alpha_beta_with(**numbers):
    return {"it": DISTILL | {"divergence": dict(fn="alpha_beta") | numbers}}


def on_logits_with(**numbers):
    return {"it": DISTILL | numbers}


AT = "student.terms.it"
REFUSED = [
    ("no terms", {}, {},
     "student.terms is empty; a network that learns needs at least one term."),
    ("no weight", {"it": dict(fn="cross_entropy")}, {},
     f"{AT}.weight is missing; give the term's factor, such as 1.0."),
    ("weight is a string", {"it": TASK | {"weight": "1"}}, {},
     f"{AT}.weight must be a number; found '1'."),
    ("weight is a bool", {"it": TASK | {"weight": True}}, {},
     f"{AT}.weight must be a number; found True."),
    ("weight is None", {"it": TASK | {"weight": None}}, {},
     f"{AT}.weight must be a number; found None."),
    ("weight is NaN", {"it": TASK | {"weight": NAN}}, {},
     f"{AT}.weight must be a finite number; found nan."),
    ("wrong mask", {"it": TASK | {"where": "labeled"}}, {},
     f"{AT}.where must be one of 'where' or 'labelled'; found 'labeled'."),
    ("mask of no type", {"it": TASK | {"where": None}}, {},
     f"{AT}.where must be one of 'where' or 'labelled'; found None."),
    ("alone, wrong other", {"it": TASK | {"other": "teacher"}}, {"networks": ("student",)},
     f"{AT}.other must be one of 'student'; found 'teacher'."),
    ("two, wrong other", {"it": TASK | {"other": "tutor"}}, {},
     f"{AT}.other must be one of 'teacher'; found 'tutor'."),
    ("two, itself", {"it": TASK | {"other": "student"}}, {},
     f"{AT}.other must be one of 'teacher'; found 'student'."),
    ("three, no other", {"it": TASK}, {"networks": ("student", "a", "b")},
     f"{AT}.other is missing; name one of 'a' or 'b'."),
    ("three, wrong other", {"it": TASK | {"other": "c"}}, {"networks": ("a", "student", "b")},
     f"{AT}.other must be one of 'a' or 'b'; found 'c'."),
    ("no fn", {"it": dict(weight=1.0)}, {},
     f"{AT} must be a group dict(fn=NAME, ...) that names a loss; found {{}}."),
    ("fn is no name", {"it": TASK | {"fn": 3}}, {},
     f"{AT}.fn must be the name of a loss; found 3."),
    ("fn is a group", {"it": TASK | {"fn": {"fn": "cross_entropy"}}}, {},
     f"{AT}.fn must be the name of a loss; found {{'fn': 'cross_entropy'}}."),
    ("a divergence for a loss", {"it": TASK | {"fn": "reverse_kl"}}, {},
     f"{AT}.fn: reverse_kl is a divergence, where a loss is expected; write "
     "dict(fn='on_logits', divergence=dict(fn='reverse_kl', ...))."),
    ("a loss for a divergence", on_logits_with(divergence=dict(fn="cross_entropy")), {},
     f"{AT}.divergence.fn: cross_entropy is a loss, where a divergence is expected."),
    ("a name for a group", on_logits_with(divergence="forward_kl"), {},
     f"{AT}.divergence must be a group dict(fn=NAME, ...) that names a divergence; "
     "found 'forward_kl'."),
    ("a group without fn", on_logits_with(divergence=dict(alpha=1.0)), {},
     f"{AT}.divergence must be a group dict(fn=NAME, ...) that names a divergence; "
     "found {'alpha': 1.0}."),
    ("unknown number", alpha_beta_with(alpha=1.0, beta=0.0, gama=1.0), {},
     f"{AT}.divergence: alpha_beta has no hyperparameter 'gama'; it takes alpha, beta."),
    ("missing number", alpha_beta_with(alpha=1.0), {},
     f"{AT}.divergence: alpha_beta needs the hyperparameter 'beta'; it takes alpha, beta."),
    ("number of another loss", {"it": TASK | {"temperature": 2.0}}, {},
     f"{AT}: cross_entropy has no hyperparameter 'temperature'; it takes label_smoothing."),
    ("missing divergence", {"it": dict(fn="on_logits", weight=1.0)}, {},
     f"{AT}: on_logits needs the hyperparameter 'divergence'; "
     "it takes divergence, temperature, temperature_power."),
    ("temperature 0", on_logits_with(temperature=0.0), {},
     f"{AT}.temperature must be greater than 0 and finite; found 0.0."),
    ("temperature below 0", on_logits_with(temperature=-1), {},
     f"{AT}.temperature must be greater than 0 and finite; found -1."),
    ("temperature NaN", on_logits_with(temperature=NAN), {},
     f"{AT}.temperature must be greater than 0 and finite; found nan."),
    ("temperature in a string", on_logits_with(temperature="2"), {},
     f"{AT}.temperature must be a number; found '2'."),
    ("temperature in a combinator",
     on_logits_with(divergence=dict(
         fn="tempered", temperature=0.0, divergence=dict(fn="forward_kl"))), {},
     f"{AT}.divergence.temperature must be greater than 0 and finite; found 0.0."),
    ("alpha NaN", alpha_beta_with(alpha=NAN, beta=0.0), {},
     f"{AT}.divergence.alpha must be a finite number; found nan."),
    ("alpha in a string", alpha_beta_with(alpha=".5", beta=0.0), {},
     f"{AT}.divergence.alpha must be a number; found '.5'."),
    ("schedule, NaN", alpha_beta_with(alpha=dict(fn="linear", start=NAN, end=1.0), beta=0.0), {},
     f"{AT}.divergence.alpha.start must be a finite number; found nan."),
    ("schedule, missing", alpha_beta_with(alpha=dict(fn="linear", start=1.0), beta=0.0), {},
     f"{AT}.divergence.alpha: linear needs the hyperparameter 'end'; "
     "it takes start, end, steps, begin."),
    ("schedule, unknown", {"it": TASK | {"weight": dict(fn="constant", value=1.0, steps=3)}}, {},
     f"{AT}.weight: constant has no hyperparameter 'steps'; it takes value."),
    ("schedule, steps", {"it": TASK | {"weight": dict(fn="warmup", value=1.0, steps=3.0)}}, {},
     f"{AT}.weight: warmup.steps must be of type int; found 3.0."),
]  # fmt: skip


@pytest.mark.parametrize(
    "terms,options,message", [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_refusals(terms, options, message):
    assert refusal(terms, **options) == message


def test_the_field_is_the_callers():
    message = refusal({"kd": TASK | {"weight": "1"}}, field="peers.a.terms")
    assert message == "peers.a.terms.kd.weight must be a number; found '1'."


def test_unknown_names_are_answered_with_the_known_ones():
    message = refusal({"it": TASK | {"fn": "cross_entropi"}})
    assert message.startswith(
        f"{AT}.fn: there is no loss 'cross_entropi' (did you mean 'cross_entropy'?); known are "
    )
    known = message.partition("known are ")[2].removesuffix(".").split(", ")
    assert known == sorted(known) and {"cross_entropy", "on_logits"} <= set(known)
    assert not {"total", "term_counts", "forward_kl"} & set(known)
    message = refusal(on_logits_with(divergence=dict(fn="foward_kl")))
    assert message.startswith(
        f"{AT}.divergence.fn: there is no divergence 'foward_kl' (did you mean 'forward_kl'?); "
        "known are "
    )
    known = message.partition("known are ")[2].removesuffix(".").split(", ")
    assert {"alpha_beta", "forward_kl", "reverse_kl", "tempered"} <= set(known)
    assert not {"on_logits", "Divergence"} & set(known)
    for name in ("zzz", "", "total", "lift", "__name__", "_alpha_beta_terms"):
        message = refusal({"it": TASK | {"fn": name}})
        assert message.startswith(f"{AT}.fn: there is no loss {name!r}; known are ")


@pytest.mark.parametrize("name", ["linnear", "optax", "jax", "os.system", "_public", "", None, 3])
def test_unknown_schedules_are_answered_with_the_known_ones(name):
    message = refusal({"it": TASK | {"weight": dict(fn=name, start=1.0, end=0.0)}})
    assert message.startswith(f"{AT}.weight.fn must name a schedule, one of 'constant' or 'linear'")
    assert "'piecewise'" in message
    hint = " (did you mean 'linear'?)" if name == "linnear" else ""
    assert name is None or message.endswith(f"; found {name!r}{hint}.")


def test_nothing_is_suggested_for_a_schedule_without_a_name():
    message = refusal({"it": TASK | {"weight": dict(start=1.0, end=0.0)}})
    assert message.endswith("; found None.")


@pytest.mark.parametrize(
    "kind,arguments",
    [(Loss, "(Outputs, Outputs, Batch, *, numbers)"), (Divergence, "(Array, Array, *, numbers)")],
)
def test_the_signature_is_given_in_the_names_of_the_library(kind, arguments):
    with pytest.raises(ValueError) as error:
        lookup("abkd_jax.types.bind", kind, field="a.fn")
    assert str(error.value).endswith(f", {arguments} -> Array.")


@pytest.mark.parametrize(
    "terms",
    [
        pytest.param({"it": 1.0}, id="a number for a group"),
        pytest.param({"it": "cross_entropy"}, id="a name for a group"),
        pytest.param([TASK], id="a list of groups"),
        pytest.param({"it": TASK | {"weight": dict(fn=["linear"])}}, id="a list for a schedule"),
        pytest.param(on_logits_with(temperature=[1, [2, 3]]), id="a ragged list"),
        pytest.param(on_logits_with(temperature=np.float32(0)), id="temperature 0 of numpy"),
        pytest.param(on_logits_with(temperature=[1.0, 0.0]), id="temperature 0 in a list"),
        pytest.param(
            on_logits_with(temperature=dict(fn="linear", start=4.0, end=0.0)),
            id="temperature 0 at the end of a schedule",
        ),
        pytest.param(
            on_logits_with(
                temperature=dict(
                    fn="linear", start=dict(fn="constant", value=1.0), end=2.0, steps=10
                )
            ),
            id="a schedule in a schedule",
        ),
        pytest.param(
            {
                "it": TASK
                | {"weight": dict(fn="warmup_cosine", value=1.0, end=0.0, warmup_steps=100)}
            },
            id="warm-up as long as the run",
        ),
    ],
)
def test_also_refused_by_field(terms):
    message = refusal(terms)
    assert message.startswith("student.terms")


def test_plugins_given_as_a_string_are_refused_by_name_or_read_as_one():
    message = refusal({"it": TASK | {"fn": "absent.loss"}}, plugins="absent")
    assert "'absent'" in message and "'a' or 'b'" not in message


def test_bind_group_and_bound_name_the_field():
    with pytest.raises(ValueError) as error:
        bind_group(bind, on_logits, {"divergence": {}}, field="x", num_steps=3)
    assert str(error.value) == (
        "x.divergence must be a group dict(fn=NAME, ...) that names a divergence; found {}."
    )
    with pytest.raises(ValueError) as error:
        bound(None, Divergence, field="x", num_steps=3)
    assert str(error.value) == (
        "x must be a group dict(fn=NAME, ...) that names a divergence; found None."
    )


# --- nothing else can be reached ----------------------------------------------------------------


@pytest.fixture
def no_system(monkeypatch):
    """Fails the test if anything calls os.system, however it got hold of it."""
    calls = []
    monkeypatch.setattr(os, "system", calls.append)
    yield
    assert calls == []


OUTSIDE = [
    "os.system",
    "posix.system",
    "subprocess.run",
    "builtins.eval",
    "importlib.import_module",
    ".os.system",
    "..os.system",
    "os. system",
    "jax.numpy.add",
    "optax.kl_divergence",
    "abkd_jax_evil.system",
    "abkd_jaxos.system",
    "Abkd_jax.losses.on_logits",
    " abkd_jax.losses.on_logits",
    "__import__('os').system",
    "configs.digits.get_config",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", [Loss, Divergence])
def test_paths_outside_are_refused_before_any_import(name, kind, no_system):
    before = set(sys.modules)
    with pytest.raises(ValueError) as error:
        lookup(name, kind, field="a.fn")
    assert str(error.value) == (
        f"a.fn: {name!r} lies outside of 'abkd_jax'; list its package under `plugins`."
    )
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "name",
    [
        "abkd_jax.objective.importlib",
        "abkd_jax.objective.importlib.import_module",
        "abkd_jax.objective.inspect",
        "abkd_jax.objective.objective",
        "abkd_jax.objective.Bound",
        "abkd_jax.types.bind",
        "abkd_jax.losses.total.total",
        "abkd_jax.losses.lift",
        "abkd_jax.losses.__builtins__",
        "abkd_jax.losses.__builtins__.eval",
        "abkd_jax.losses.on_logits.__globals__",
        "abkd_jax.divergences._alpha_beta_terms",
        "abkd_jax.divergences.jax",
        "abkd_jax.nothing.at_all",
        "abkd_jax..os.system",
        "abkd_jax.",
        "abkd_jax.losses.",
        "abkd_jax.losses.os.system",
        "abkd_jax.\0.system",
    ],
)
def test_what_is_no_loss_inside_is_refused_too(name, no_system):
    with pytest.raises(ValueError) as error:
        lookup(name, Loss, field="a.fn")
    assert str(error.value).startswith("a.fn: ") and type(error.value) is ValueError
    assert any(
        part in str(error.value)
        for part in (f"there is no loss {name!r}", "cannot import", "is not annotated as a loss")
    )


@pytest.mark.parametrize("package", ["os", "posix", "builtins", "subprocess", "importlib"])
def test_a_plugin_that_is_a_module_of_python_gives_nothing(package, no_system):
    for name in ("system", "eval", "exec", "run", "import_module", "__import__", "nothing"):
        with pytest.raises(ValueError, match=r"^a\.fn: "):
            lookup(f"{package}.{name}", Loss, field="a.fn", plugins=(package,))


# --- plugins ------------------------------------------------------------------------------------

PLUGIN = {
    "__init__.py": """
        import os
        from os import system

        shell = os.system

        def run(command, *, weight: float = 1.0):
            return os.system(command)

        def unannotated(student, teacher, batch):
            return os.system("true")
        """,
    "mine.py": """
        from __future__ import annotations

        from jax import Array
        from jax import numpy as jnp

        from abkd_jax.types import Batch, Divergence, Outputs

        def squared(
            student_logits: Array, teacher_logits: Array, *, scale: float | Array, power: int = 2
        ) -> Array:
            return scale * jnp.sum((student_logits - teacher_logits) ** power, axis=-1)

        def on_scaled_logits(
            student: Outputs,
            teacher: Outputs,
            batch: Batch,
            *,
            inner: Divergence,
            by: float | Array,
        ) -> Array:
            return inner(by * student.logits, by * teacher.logits)

        on_scaled_logits.needs = ("logits", "hidden")
        """,
    "broken.py": "import a_package_that_nobody_has",
}


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a package on the path, forgotten again after the test."""
    name = "abkd_plugin_of_a_user"
    package = tmp_path / name
    package.mkdir()
    for path, text in PLUGIN.items():
        (package / path).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def test_a_users_own_loss_and_divergence_train_like_any_other(plugin):
    group = dict(
        fn=f"{plugin}.mine.on_scaled_logits",
        weight=dict(fn="linear", start=0.0, end=1.0, steps=4),
        by=3,
        inner=dict(fn=f"{plugin}.mine.squared", scale=0.5),
    )
    task = dict(fn="on_logits", weight=1.0, temperature_power=0.0)
    task["divergence"] = dict(fn=f"{plugin}.mine.squared", scale=2.0, power=4)
    terms = build(dict(own=group, mixed=task), plugins=(plugin,))
    assert terms["own"].loss.needs == {"logits", "hidden"}
    student, teacher = (
        np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32) for seed in (0, 1)
    )
    outputs = {"teacher": Outputs(logits=jnp.asarray(teacher))}

    @jax.jit
    def loss(student, terms, step):
        terms = at_step(terms, step)
        batch = dict(where=jnp.ones(3, bool))
        return total(terms, Outputs(logits=student), outputs, batch)[0]

    value, gradient = jax.value_and_grad(loss)(student, terms, 1)
    gap = student - teacher
    expected = 0.25 * (4.5 * gap**2).sum(-1).mean() + 2 * (gap**4).sum(-1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    expected = (0.25 * 9 * gap + 2 * 4 * gap**3) / 3
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_plugins_mistakes_are_named(plugin):
    at = f"{AT}.divergence"
    missing = on_logits_with(divergence=dict(fn=f"{plugin}.mine.squared"))
    assert refusal(missing, plugins=(plugin,)) == (
        f"{at}: squared needs the hyperparameter 'scale'; it takes scale, power."
    )
    wrong = on_logits_with(divergence=dict(fn=f"{plugin}.mine.squared", scale=1.0, power=2.0))
    assert refusal(wrong, plugins=(plugin,)) == (
        f"{at}: squared.power must be of type int; found 2.0."
    )
    loss = on_logits_with(divergence=dict(fn=f"{plugin}.mine.on_scaled_logits"))
    assert refusal(loss, plugins=(plugin,)) == (
        f"{at}.fn: {plugin}.mine.on_scaled_logits is a loss, where a divergence is expected."
    )
    divergence = {"it": dict(fn=f"{plugin}.mine.squared", weight=1.0)}
    assert refusal(divergence, plugins=(plugin,)) == (
        f"{AT}.fn: {plugin}.mine.squared is a divergence, where a loss is expected; write "
        f"dict(fn='on_logits', divergence=dict(fn='{plugin}.mine.squared', ...))."
    )


def test_a_plugin_must_be_listed_by_itself_or_by_a_package_around_it(plugin):
    group = dict(fn=f"{plugin}.mine.squared", scale=1.0)
    for plugins in ((), ("another",), (plugin + "s",), (plugin[:-1],), (f"{plugin}.other",)):
        message = refusal(on_logits_with(divergence=group), plugins=plugins)
        packages = " or ".join(repr(package) for package in ("abkd_jax", *plugins))
        assert message == (
            f"{AT}.divergence.fn: '{plugin}.mine.squared' lies outside of {packages}; "
            "list its package under `plugins`."
        )
        assert plugin not in sys.modules
    for plugins in ((plugin,), (f"{plugin}.mine",), ("another", plugin)):
        assert isinstance(build_one(DISTILL | {"divergence": group}, plugins=plugins).loss, Bound)


@pytest.mark.parametrize("name", ["os", "system", "shell", "run", "unannotated"])
def test_what_a_plugin_imports_or_leaves_unannotated_cannot_be_named(plugin, name, no_system):
    path = f"{plugin}.{name}"
    message = refusal({"it": dict(fn=path, weight=1.0)}, plugins=(plugin,))
    assert message.startswith(f"{AT}.fn: {path} is not annotated as a loss, (Outputs, Outputs, ")
    with pytest.raises(ValueError) as error:
        lookup(path, Divergence, field="a.fn", plugins=(plugin,))
    assert str(error.value).startswith(f"a.fn: {path} is not annotated as a divergence, (")


@pytest.mark.parametrize("name", ["os.system", "os.path.join", "run.__globals__", "absent.loss"])
def test_a_plugins_modules_lead_nowhere_else(plugin, name, no_system):
    module = f"{plugin}.{name.rpartition('.')[0]}"
    message = refusal({"it": dict(fn=f"{plugin}.{name}", weight=1.0)}, plugins=(plugin,))
    assert message.startswith(f"{AT}.fn: cannot import '{module}': No module named ")


def test_a_plugins_own_missing_import_is_named(plugin):
    message = refusal({"it": dict(fn=f"{plugin}.broken.loss", weight=1.0)}, plugins=(plugin,))
    assert message == (
        f"{AT}.fn: cannot import '{plugin}.broken': No module named 'a_package_that_nobody_has'."
    )


# --- what losses need ---------------------------------------------------------------------------


def on_hidden(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
    return jnp.sum(student.hidden - teacher.hidden, axis=-1)


on_hidden.needs = ("hidden",)
LOGITS = Outputs(logits=jax.ShapeDtypeStruct((2, 3), jnp.float32))
HIDDEN = LOGITS.replace(hidden=jax.ShapeDtypeStruct((2, 5), jnp.float32))


def needs_hidden(**options):
    return {"feature": Term(loss=bind(on_hidden), weight=jnp.ones(()), **options)}


@pytest.mark.parametrize(
    "student,teacher,lacking",
    [
        (HIDDEN, HIDDEN, None),
        (LOGITS, HIDDEN, "student"),
        (HIDDEN, LOGITS, "teacher"),
        (LOGITS, LOGITS, "student"),
    ],
)
def test_a_network_that_does_not_give_what_a_loss_needs(student, teacher, lacking):
    outputs = {"student": student, "teacher": teacher}
    objectives = {"student": build(dict(task=TASK)) | needs_hidden()}
    if lacking is None:
        return check_needs(objectives, outputs)
    with pytest.raises(ValueError) as error:
        check_needs(objectives, outputs)
    assert str(error.value) == (
        "student.terms.feature needs 'hidden' of both networks, which the model of "
        f"{lacking!r} does not give."
    )


def test_needs_are_checked_of_every_learner_and_of_the_other_that_it_names():
    outputs = {"a": HIDDEN, "b": HIDDEN, "c": LOGITS}
    task = build(dict(task=TASK), learner="c", networks=("c",))
    check_needs({"a": needs_hidden(other="b"), "b": needs_hidden(other="a"), "c": task}, outputs)
    with pytest.raises(ValueError, match=r"^b\.terms\.feature needs .* of 'c' does not give\.$"):
        check_needs({"a": needs_hidden(other="b"), "b": needs_hidden(other="c")}, outputs)


def test_a_need_that_is_no_part_of_outputs_is_refused_by_name():
    def misspelt(student: Outputs, teacher: Outputs, batch: Batch) -> Array:
        return student.logits[..., 0]

    misspelt.needs = ("hiden",)
    terms = {"feature": Term(loss=bind(misspelt), weight=jnp.ones(()))}
    with pytest.raises((ValueError, TypeError), match="'hiden'"):
        check_needs({"student": terms}, {"student": HIDDEN, "teacher": HIDDEN})
