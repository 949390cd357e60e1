"""The argument of a config: what it changes, what it refuses, and that nothing is evaluated."""

import ast
import builtins
import importlib.util
import json
import os
import pathlib
import sys

import numpy as np
import pytest
from absl import flags
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from abkd_jax.binding import at_step
from abkd_jax.config import arguments, resolve
from abkd_jax.config.build import names

_PATH = pathlib.Path(__file__).parents[1] / "configs" / "digits.py"
_SPEC = importlib.util.spec_from_file_location("config_of_digits", _PATH)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
get_config = _MODULE.get_config

DEFAULT = get_config().to_dict()
TERM = DEFAULT["student"]["terms"]["distill"]
NUMBERS = "alpha, beta, temperature, temperature_power, weight"
SCHEDULES = "known are constant, cosine, linear, piecewise, warmup, warmup_cosine."


def distill(argument):
    """The student's distillation term under an argument."""
    return get_config(argument).student.terms.distill.to_dict()


def refusal(argument, call=get_config):
    with pytest.raises(ValueError) as error:
        call(argument)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


# --- parse --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument,expected",
    [
        ("", {}),
        ("  ", {}),
        ("runlocal", {"runlocal": True}),
        pytest.param("x" * 2000, {"x" * 2000: True}, id="the longest"),
        ("divergence=reverse_kl", {"divergence": {"fn": "reverse_kl"}}),
        ("divergence=reverse_kl()", {"divergence": {"fn": "reverse_kl"}}),
        (
            "divergence=alpha_beta(alpha=.5,beta=.5)",
            {"divergence": {"fn": "alpha_beta", "alpha": 0.5, "beta": 0.5}},
        ),
        (
            "divergence=alpha_beta(.5, beta=2)",
            {"divergence": {"fn": "alpha_beta", "*": (0.5,), "beta": 2}},
        ),
        ("alpha=linear(1,.3)", {"alpha": {"fn": "linear", "*": (1, 0.3)}}),
        (
            "alpha=linear(1,.3,steps=7),beta=-1e-2,",
            {"alpha": {"fn": "linear", "*": (1, 0.3), "steps": 7}, "beta": -0.01},
        ),
        (
            "weight=piecewise(1, .1, (3, 6))",
            {"weight": {"fn": "piecewise", "*": (1, 0.1, (3, 6))}},
        ),
        (
            "divergence=tempered(forward_kl, temperature=linear(4., 1.))",
            {
                "divergence": {
                    "fn": "tempered",
                    "*": ({"fn": "forward_kl"},),
                    "temperature": {"fn": "linear", "*": (4.0, 1.0)},
                }
            },
        ),
        ("teacher='runs/digits/teacher'", {"teacher": "runs/digits/teacher"}),
        ("divergence=my.own.kl(.5)", {"divergence": {"fn": "my.own.kl", "*": (0.5,)}}),
        ("divergence=my.own.kl(a=1)", {"divergence": {"fn": "my.own.kl", "a": 1}}),
        ("divergence=my.own.kl", {"divergence": {"fn": "my.own.kl"}}),
        ("a=+1,b='x',c=(1,-2.5),d=None", {"a": 1, "b": "x", "c": (1, -2.5), "d": None}),
        ("one,two,a=1", {"one": True, "two": True, "a": 1}),
    ],
)
def test_parse(argument, expected):
    assert arguments.parse(argument) == expected


# --- what it changes in a config ----------------------------------------------------------------


def test_no_argument_changes_nothing():
    assert distill("") == TERM
    assert TERM["divergence"]["fn"] == "alpha_beta"


@pytest.mark.parametrize(
    "argument,changes",
    [
        ("divergence=reverse_kl", {"divergence": {"fn": "reverse_kl"}}),
        (
            "divergence=alpha_beta(alpha=.5,beta=.5)",
            {"divergence": {"fn": "alpha_beta", "alpha": 0.5, "beta": 0.5}},
        ),
        (
            "alpha=linear(1,.3)",
            {"divergence": TERM["divergence"] | {"alpha": dict(fn="linear", start=1, end=0.3)}},
        ),
        ("alpha=.25", {"divergence": TERM["divergence"] | {"alpha": 0.25}}),
        ("weight=piecewise(1,.1,(3,6))",
         {"weight": dict(fn="piecewise", start=1.0, factor=0.1, boundaries=(3, 6))}),
        ("temperature=4.,weight=cosine(1., 0.)",
         {"temperature": 4.0, "weight": dict(fn="cosine", start=1.0, end=0.0)}),
        ("divergence=jensen_shannon(.5),teacher_weight=.1,temperature_power=0.",
         {"divergence": dict(fn="jensen_shannon", teacher_weight=0.1), "temperature_power": 0.0}),
        # The divergence is replaced first, wherever it stands.
        ("teacher_weight=.1,divergence=jensen_shannon(.5)",
         {"divergence": dict(fn="jensen_shannon", teacher_weight=0.1)}),
        ("divergence=alpha_beta(.5,.5),alpha=linear(1,.3)",
         {"divergence": dict(
             fn="alpha_beta", alpha=dict(fn="linear", start=1.0, end=0.3), beta=0.5)}),
        # Of two numbers with one name, the outermost is meant.
        ("divergence=tempered(alpha_beta(.5,.5), temperature=3.),temperature=2.,alpha=.1",
         {"temperature": 2.0, "divergence": dict(
             fn="tempered", temperature=3.0,
             divergence=dict(fn="alpha_beta", alpha=0.1, beta=0.5))}),
    ],
)  # fmt: skip
def test_the_term(argument, changes):
    assert distill(argument) == TERM | changes
    config = get_config(argument).to_dict()
    config["student"]["terms"]["distill"] = TERM
    assert config == DEFAULT  # and nothing else


def test_runlocal_shrinks_the_run_alone():
    config = get_config("runlocal").to_dict()
    intervals = ("num_steps", "checkpoint_every", "log_every")
    assert all(0 < config[name] < DEFAULT[name] for name in intervals)
    assert config | {name: DEFAULT[name] for name in intervals} == DEFAULT
    assert get_config("runlocal=False").to_dict() == DEFAULT


def test_everything_at_once_and_its_objective():
    config = get_config("runlocal,divergence=alpha_beta(linear(1,.3),.5),temperature=3.,weight=2.")
    (term,) = resolve(config).phases[-1].objectives["student"].values()
    term = at_step(term, config.num_steps // 2)
    assert term.weight == 2.0 and term.loss.numbers["temperature"] == 3.0
    numbers = term.loss.numbers["divergence"].numbers
    np.testing.assert_allclose(numbers["alpha"], 0.65, rtol=1e-6)
    assert numbers["beta"] == 0.5


def test_flags_may_stand_anywhere():
    assert arguments.parse(" alpha=.5, runlocal ,") == {"alpha": 0.5, "runlocal": True}


def test_two_configs_share_nothing():
    get_config("alpha=.1,divergence=alpha_beta(.5,.5)")
    assert get_config().to_dict() == DEFAULT


# --- refusals -----------------------------------------------------------------------------------

HAS = "the config's argument has "
GIVES = "the config's argument gives"
TERM_AT = "student.terms.distill"
REFUSED = [
    ("alpha=", HAS + "'', which cannot be read."),
    ("a=1;b=2", HAS + "'1;b=2', which cannot be read."),
    ("a.b=1", HAS + "'a.b=1', which is no flag or key=value."),
    ("a=1)(b=2", HAS + "'1)(b=2', which cannot be read."),
    ("a=(1", "the config's argument 'a=(1' has brackets that do not match."),
    ("3", HAS + "'3', which is no flag or key=value."),
    ("'runlocal'", HAS + "\"'runlocal'\", which is no flag or key=value."),
    ("reverse_kl()", HAS + "'reverse_kl()', which is no flag or key=value."),
    ("os.system", HAS + "'os.system', which is no flag or key=value."),
    ("*alpha", HAS + "'*alpha', which is no flag or key=value."),
    ("alpha==1", HAS + "'=1', which cannot be read."),
    ("alpha:=1", HAS + "'alpha:=1', which is no flag or key=value."),
    ("alpha=1,alpha=2", "the config's argument gives 'alpha' twice."),
    ("alpha,alpha=2", "the config's argument gives 'alpha' twice."),
    ("x" * 2001, "the config's argument has 2001 characters; the longest has 2000."),
    ("divergence=alpha_beta(1,alpha=2)",
     "the config's argument gives alpha_beta's 'alpha' twice."),
    ("divergence=alpha_beta(alpha=1,alpha=2)",
     "the config's argument gives alpha_beta's 'alpha' twice."),
    ("divergence=alpha_beta(1,2,3)",
     "the config's argument gives alpha_beta 3 numbers without names; it takes alpha, beta."),
    ("divergence=reverse_kl(1)",
     "the config's argument gives reverse_kl 1 numbers without names; it takes none."),
    ("divergence=alpha_bet(1,2)",
     f"{TERM_AT}.divergence.fn: there is no divergence 'alpha_bet' (did you mean 'alpha_beta'?); "
     f"known are {', '.join(sorted(names('divergence')))}."),
    ("divergence=tempered(foward_kl)",
     f"{TERM_AT}.divergence.divergence.fn: there is no divergence 'foward_kl' (did you mean "
     f"'forward_kl'?); known are {', '.join(sorted(names('divergence')))}."),
    ("alpha=exp(1)", f"{TERM_AT}.divergence.alpha.fn: there is no schedule 'exp'; {SCHEDULES}"),
    ("alpha=linnear(1,.3)",
     f"{TERM_AT}.divergence.alpha.fn: there is no schedule 'linnear' (did you mean 'linear'?); "
     f"{SCHEDULES}"),
    ("alpha=1+1", HAS + "'1 + 1', which is no number, name, function or quoted text."),
    ("alpha=not 1", HAS + "'not 1', which is no number, name, function or quoted text."),
    ("alpha=linear(1,2**3)", HAS + "'2 ** 3', which is no number, name, function or quoted text."),
    ("teacher=runs/digits",
     HAS + "'runs / digits', which is no number, name, function or quoted text."),
    ("divergence=alpha_beta(alpha=1.)",
     f"{TERM_AT}.divergence.beta is missing; alpha_beta takes alpha, beta."),
    ("divergence=alpha_beta(alpha=1.,beta=0.,gama=1.)",
     f"{TERM_AT}.divergence.gama is unknown; alpha_beta takes alpha, beta."),
    ("divergence=alpha_beta(positional=3)",
     f"{TERM_AT}.divergence.positional is unknown; alpha_beta takes alpha, beta."),
    ("divergence=cross_entropy",
     f"{TERM_AT}.divergence.fn must name a divergence; cross_entropy is a loss."),
    ("divergence=cross_entropy(.1)",
     f"{TERM_AT}.divergence.fn must name a divergence; cross_entropy is a loss."),
    ("divergence=os.system",
     f"{TERM_AT}.divergence.fn: 'os.system' lies outside of abkd_jax; list its package under "
     "`plugins`."),
    ("divergence=my_package.f(.5)",
     f"{TERM_AT}.divergence.fn: 'my_package.f' lies outside of abkd_jax; list its package under "
     "`plugins`."),
    ("divergence=3",
     f"{TERM_AT}.divergence must be a function, such as forward_kl; found 3."),
    ("divergence",
     f"{TERM_AT}.divergence must be a function, such as forward_kl; found True."),
    ("divergence='reverse_kl'",
     f"{TERM_AT}.divergence must be a function, such as forward_kl; found 'reverse_kl'."),
    ("alhpa=1.",
     HAS + f"'alhpa', which is no number of {TERM_AT} (did you mean 'alpha'?); "
     f"it takes divergence, {NUMBERS}."),
    ("where='labelled'",
     HAS + f"'where', which is no number of {TERM_AT}; it takes divergence, {NUMBERS}."),
    ("quick", HAS + f"'quick', which is no number of {TERM_AT}; it takes divergence, {NUMBERS}."),
    ("divergence=reverse_kl,alpha=1.",
     HAS + f"'alpha', which is no number of {TERM_AT}; "
     "it takes divergence, temperature, temperature_power, weight."),
    ("alpha='x'", f"{TERM_AT}.divergence.alpha must be a number; found 'x'."),
    ("alpha=None", f"{TERM_AT}.divergence.alpha must be a number; found None."),
    ("alpha=1j", f"{TERM_AT}.divergence.alpha must be a number; found 1j."),
    ("temperature=0.", f"{TERM_AT}.temperature must be greater than 0 and finite; found 0.0."),
    ("temperature=-1.", f"{TERM_AT}.temperature must be greater than 0 and finite; found -1.0."),
    ("alpha=linear(1.)",
     f"{TERM_AT}.divergence.alpha.end is missing; linear takes start, end, steps, begin."),
    ("alpha=linear(1.,2.,3.)",
     f"{TERM_AT}.divergence.alpha.steps must be of type int; found 3.0."),
    ("teacher=3",
     f"{GIVES} teacher no folder of a run; write teacher='runs/digits/teacher'."),
    ("teacher",
     f"{GIVES} teacher no folder of a run; write teacher='runs/digits/teacher'."),
    ("student='runs/digits',alpha=.5",
     "the config's argument leaves no phase in which student learns."),
    ("num_steps='x'",
     HAS + f"'num_steps', which is no number of {TERM_AT}; it takes divergence, {NUMBERS}."),
    ("data='x'", HAS + f"'data', which is no number of {TERM_AT}; it takes divergence, {NUMBERS}."),
    ("phases='x'",
     HAS + f"'phases', which is no number of {TERM_AT}; it takes divergence, {NUMBERS}."),
]  # fmt: skip


@pytest.mark.parametrize("argument,message", REFUSED, ids=[case[0] for case in REFUSED])
def test_refusals(argument, message):
    assert refusal(argument) == message


def test_a_name_that_is_no_schedule_is_answered_with_the_known_ones():
    at = f"{TERM_AT}.divergence.alpha.fn"
    for name in ("linnear", "nan", "pi", "jax"):
        hint = " (did you mean 'linear'?)" if name == "linnear" else ""
        expected = f"{at}: there is no schedule {name!r}{hint}; {SCHEDULES}"
        assert refusal(f"alpha={name}") == expected
    assert refusal("alpha=forward_kl") == f"{at} must name a schedule; forward_kl is a divergence."
    assert refusal("alpha=os.system") == (
        f"{at}: 'os.system' lies outside of abkd_jax; list its package under `plugins`."
    )


def test_a_loss_without_a_divergence_takes_none():
    config = get_config()
    with config.ignore_type():
        config.student.terms.distill = dict(fn="cross_entropy", weight=1.0)
    with pytest.raises(ValueError) as error:
        arguments.apply(config, {"divergence": {"fn": "reverse_kl"}})
    assert str(error.value) == f"{TERM_AT} takes no divergence; its loss is 'cross_entropy'."
    arguments.apply(config, {"label_smoothing": 0.1})
    assert config.student.terms.distill.label_smoothing == 0.1


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param("**{'alpha': 1.}", id="double star"),
        pytest.param("divergence=alpha_beta(1.,**{})", id="nested double star"),
        pytest.param("alpha=Callable(1)", id="imported name"),
        pytest.param("alpha=jax(1)", id="module"),
        pytest.param("alpha={[]}", id="unhashable"),
        pytest.param("alpha={[1]: 2}", id="unhashable key"),
        pytest.param("alpha={'fn': []}", id="unhashable name"),
        pytest.param("alpha=(1, (2, 3))", id="ragged"),
        pytest.param("divergence={'a.b': 1}", id="dotted key"),
        pytest.param("alpha", id="number as a flag"),
        pytest.param("alpha=True", id="bool for number"),
        pytest.param("temperature=True", id="bool for temperature"),
        pytest.param("alpha=linear(linear(1., 2.), 3.)", id="schedule of schedules"),
        pytest.param("alpha=linear(forward_kl, 3.)", id="schedule of a divergence"),
        pytest.param("temperature=linear(4., 0.)", id="temperature to 0"),
        pytest.param("temperature=1e999", id="infinite temperature"),
    ],
)
def test_also_refused_by_name(argument):
    message = refusal(argument)
    assert message.startswith(("the config's argument ", "student.terms.distill"))
    assert "twice" not in message and "must be a list of key=value" not in message
    assert "did you mean 'jax'" not in message and "Callable 1 numbers" not in message


# --- a network of another run -------------------------------------------------------------------


def test_a_network_is_taken_from_another_run_in_place_of_its_phase():
    config = get_config("teacher='runs/digits/teacher',alpha=.25")
    assert config.teacher.weights.to_dict() == dict(fn="run", workdir="runs/digits/teacher")
    assert config.student.terms.distill.divergence.alpha == 0.25
    plan = resolve(config)
    assert [phase.name for phase in plan.phases] == ["baseline", "distill"]
    assert plan.phases[-1].see == ("teacher",)
    weights = plan.networks["teacher"].weights
    assert dict(weights.static) == dict(
        workdir="runs/digits/teacher", network="", best=False, member=-1
    )
    without = get_config().to_dict()
    del without["phases"]["teacher"]
    without["teacher"]["weights"] = config.teacher.weights.to_dict()
    without["student"]["terms"]["distill"]["divergence"]["alpha"] = 0.25
    assert config.to_dict() == without  # and nothing else


def test_a_network_that_learns_with_others_keeps_its_phase():
    config = get_config()
    with config.unlocked():
        config.phases = dict(together=dict(learn=("teacher", "student")))
        del config.baseline
    config = arguments.apply(config, {"teacher": "runs/digits/teacher"})
    (phase,) = resolve(config).phases
    assert list(phase.learners) == ["teacher", "student"]  # it goes on from there


def test_a_network_without_its_phase_that_none_sees_is_refused():
    with pytest.raises(ValueError) as error:
        resolve(get_config("student='runs/digits'"))
    assert str(error.value) == (
        "no phase names the network student; leave it out, or let it learn."
    )


# --- plugins ------------------------------------------------------------------------------------

PLUGIN = """
from jax import Array
from jax import numpy as jnp

from abkd_jax import Number


def distance(student_logits: Array, teacher_logits: Array, *, power: Number) -> Array:
    return jnp.sum(jnp.abs(student_logits - teacher_logits) ** power, axis=-1)


def halved(step: int | Array, *, start: Number) -> Array:
    return start * 0.5**step
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The name of a module on the path, forgotten again after the test."""
    name = "abkd_arguments_of_a_user"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "argument,numbers",
    [
        ("divergence={}.distance(.5)", dict(power=0.5)),
        ("divergence={}.distance(power=2)", dict(power=2.0)),
        ("divergence={}.distance(2),power=3", dict(power=3.0)),
        ("divergence={0}.distance({0}.halved(1))", dict(power=dict(fn="{}.halved", start=1.0))),
        ("divergence={0}.distance(1.),power={0}.halved(2)",
         dict(power=dict(fn="{}.halved", start=2.0))),
    ],
)  # fmt: skip
def test_a_plugins_functions_in_the_argument(plugin, argument, numbers):
    config = get_config()
    with config.unlocked():
        config.plugins = (plugin,)
    values = arguments.parse(argument.format(plugin))
    divergence = arguments.apply(config, values).student.terms.distill.divergence.to_dict()
    numbers = json.loads(json.dumps(numbers).replace("{}", plugin))
    assert divergence == dict(fn=f"{plugin}.distance") | numbers
    term = resolve(config).phases[-1].objectives["student"]["distill"]
    assert term.loss.numbers["divergence"].fn.__name__ == "distance"


def test_a_mask_of_the_data_stays_as_it_is():
    config = get_config()
    with config.unlocked():
        config.student.terms.distill.where = "rare"
    config = arguments.apply(config, {"alpha": 0.5})
    assert config.student.terms.distill.where == "rare"  # `resolve` knows the data's masks
    with pytest.raises(
        ValueError, match=r"^student\.terms\.distill\.where must be one of labelled, "
    ):
        resolve(config)


# --- nothing is evaluated -----------------------------------------------------------------------

EVIL = [
    "__import__('os').system('true')",
    "__import__('a_module_that_nobody_has')",  # its ModuleNotFoundError would be no ValueError
    "os.system('true')",
    "eval('1')",
    "exec('import os')",
    "open('x', 'w')",
    "print(1)",
    "getattr(alpha, 'x')",
    "abkd_jax.config.build.importlib.import_module('os')",
    "(lambda: 1)()",
    "lambda: 1",
    "().__class__.__bases__[0].__subclasses__()",
    "().__class__",
    "''.join(('a',))",
    "'%s' % 1",
    "f'{1}'",
    "f'{__import__(\"os\")}'",
    "[x for x in (1,)]",
    "{x: x for x in (1,)}",
    "(x for x in (1,))",
    "(yield)",
    "(await x)",
    "(x := 1)",
    "1 if 1 else 2",
    "1 and 2",
    "1 < 2",
    "x[0]",
    "(1,)[0]",
    "...",
    "9**9**9",
    "9**9**9**9**9",
    "-9**9**9",
    "1<<9**9",
    "'a'*10**10",
    "10**10**10%2",
]


@pytest.fixture
def spies(monkeypatch):
    """The calls of what could run a text, or reach out, with their first arguments."""
    calls = []

    def spy(name, real):
        def call(*args, **kwargs):
            # Parsing is compile as well, with a flag that says so.
            if name != "compile" or not ast.PyCF_ONLY_AST & [*args, 0, 0, 0, 0][3]:
                calls.append((name, args[0] if args else None))
            return real(*args, **kwargs)

        return call

    for name in ("eval", "exec", "compile", "open", "print"):
        monkeypatch.setattr(builtins, name, spy(name, getattr(builtins, name)))
    monkeypatch.setattr(os, "system", spy("system", lambda command: 0))
    yield calls
    monkeypatch.undo()


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize(
    "argument",
    ["{}", "alpha={}", "divergence={}", "alpha=linear({},1)", "divergence=alpha_beta(alpha={})"],
)
def test_nothing_is_evaluated(argument, evil, spies):
    with pytest.raises(ValueError):
        get_config(argument.format(evil))
    assert not {"system", "print"} & {name for name, _ in spies}
    # Reading annotations evaluates texts too, but never one of the argument.
    texts = [text for _, text in spies if isinstance(text, str)]
    assert [text for text in texts if text in evil or evil in text] == []


def test_the_spies_see_what_they_should(spies):
    eval("1 + 1")
    ast.parse("2 + 2")
    os.system("true")
    assert spies == [("eval", "1 + 1"), ("system", "true")]


# --- any text at all ----------------------------------------------------------------------------

_WORDS = """runlocal divergence alpha beta temperature weight reverse_kl alpha_beta tempered linear
    cosine cross_entropy os.system __import__ lambda x for in if None True 'a' "b" f'{1}' 1 .5 -1
    1e999 nan 9**9 1j () (1,) = , ( ) [ ] : . * ** + - == := # \\ ; \0 é ²"""
_SENTENCES = st.lists(st.sampled_from([*_WORDS.split(), " ", "\n", "\t"]), max_size=12).map("".join)
_ANY = st.text(max_size=40) | _SENTENCES | _SENTENCES.map("alpha={}".format)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_ANY)
@example("\0")
@example("alpha=" + "9" * 5000)
@example("alpha=" + "(" * 500)
@example("alpha=" + "(" * 150 + "1" + ")" * 150)
@example("alpha=\ud800")
def test_any_text_is_parsed_or_a_value_error(text):
    try:
        values = arguments.parse(text)
    except ValueError:
        return
    assert all(isinstance(key, str) for key in values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_ANY)
def test_any_text_is_a_config_or_a_value_error(text):
    try:
        config = get_config(text)
    except ValueError:
        return
    assert config.student.terms.distill.fn == "on_logits"


@pytest.mark.parametrize(
    "argument",
    [
        pytest.param("alpha=" + "-" * 5_000 + "1", id="signs"),
        pytest.param("alpha=" + "-" * 200_000 + "1", id="many signs"),
        pytest.param("alpha=" + "1+" * 20_000 + "1", id="a sum"),
        pytest.param("alpha=a" + ".b" * 20_000, id="a path"),
    ],
)
def test_deep_nesting_is_a_value_error(argument):
    with pytest.raises(ValueError):
        get_config(argument)


# --- overridden afterwards ----------------------------------------------------------------------


def from_flags(monkeypatch, argument, *overrides):
    """The config as the command line makes it."""
    values = flags.FlagValues()
    line = ["main", f"--config={_PATH}:{argument}"]
    line += [f"--config.student.terms.distill.{override}" for override in overrides]
    monkeypatch.setattr(sys, "argv", line)
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(line)
    return values.config.student.terms.distill


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    "argument,override,expected",
    [
        pytest.param("", "divergence.alpha=.5", 0.5, id="none"),
        pytest.param("", "divergence.alpha=1", 1.0, id="none, with an integer"),
        pytest.param("alpha=1", "divergence.alpha=.5", 0.5, id="integer for a float"),
        pytest.param("alpha=.25", "divergence.alpha=1", 1.0, id="float, with an integer"),
        pytest.param("temperature=4", "temperature=2.5", 2.5, id="integer temperature"),
        pytest.param("divergence=alpha_beta(.5,.5)", "divergence.alpha=.25", 0.25, id="function"),
        pytest.param("alpha=linear(1.,.3)", "divergence.alpha.start=.5", 0.5, id="schedule"),
        pytest.param("runlocal", "weight=.5", 0.5, id="flag"),
        pytest.param(
            "divergence=alpha_beta(1,0)",
            "divergence.alpha=.5",
            0.5,
            id="integers in a function",
        ),
        pytest.param(
            "alpha=linear(1,.3)",
            "divergence.alpha.start=.5",
            0.5,
            id="integers in a schedule",
        ),
    ],
)
def test_flags_override_the_argument_and_stay_floats(monkeypatch, argument, override, expected):
    value = from_flags(monkeypatch, argument, override)
    for part in override.partition("=")[0].split("."):
        value = value[part]
    assert value == expected and type(value) is float


@pytest.mark.parametrize(
    "argument",
    [
        "",
        "alpha=.5",
        "alpha=1",
        "beta=linear(1.,.3)",
        pytest.param(
            "divergence=alpha_beta(alpha=.5,beta=.5)",
        ),
    ],
)
def test_assignment_keeps_the_type(argument):
    divergence = get_config(argument).student.terms.distill.divergence
    divergence.alpha = 1
    assert type(divergence.alpha) is float
    with pytest.raises(TypeError):
        divergence.alpha = "abc"
