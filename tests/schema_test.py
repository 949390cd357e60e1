"""The schema makes a plan of what a config says, and refuses the rest in one sentence."""

import copy
import importlib.util
import pathlib
import pickle
import re

import jax
import ml_collections
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import config as configs
from abkd_jax import data, models, optimizers, sources
from abkd_jax.binding import Schedule, at_step
from abkd_jax.config import resolve
from abkd_jax.config.plan import Phase, Plan
from abkd_jax.config.schema import DEFAULTS
from abkd_jax.losses import cross_entropy, on_logits
from abkd_jax.types import Outputs

_DIGITS = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
_SPEC = importlib.util.spec_from_file_location("digits_config", _DIGITS)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
ADAM = dict(fn="adam", learning_rate=0.1)
TASK = dict(task=dict(fn="cross_entropy", weight=1.0))
KL = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))


def config(**changes):
    """The digits config with values at dotted paths replaced; None deletes."""
    values = copy.deepcopy(resolve(_MODULE.get_config()).config)
    for path, value in changes.items():
        group = values
        *parents, last = path.split("__")
        for parent in parents:
            group = group[parent]
        if value is None:
            del group[last]
        else:
            group[last] = value
    return values


def network(**group):
    model = dict(fn="mlp", widths=(4,))
    return dict(model=model, optimizer=ADAM, terms=TASK) | group


def dataset(*, masks=(), num_classes=3, inputs=(5,)):
    """24 examples, with masks of their own besides the labels'."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % num_classes
    examples = rng.normal(size=(24, *inputs)).astype(np.float32), labels
    own = {name: rng.integers(0, 2, 24).astype(bool) for name in masks}
    return data.from_arrays(
        train=(*examples, own), validation=None, test=examples, num_classes=num_classes
    )


def small(**groups):
    """The least that a run needs, with the data handed over."""
    return dict(student=network(), phases=dict(alone=dict(learn=("student",)))) | groups


def refusal(config, **given):
    """The message of the ValueError, which is one sentence."""
    with pytest.raises(ValueError) as error:
        resolve(config, **given)
    message = str(error.value)
    assert type(error.value) is ValueError and "\n" not in message and message.endswith(".")
    return message


# --- what is built ------------------------------------------------------------------------------


def test_the_digits_config_is_accepted_and_built():
    plan = resolve(config(student__ema_decay={"fn": "linear", "start": 0.5, "end": 0.9}))
    assert set(plan.networks) == {"teacher", "baseline", "student"}
    student = plan.networks["student"]
    assert student.module.widths == (16,) and student.module.num_classes == 10
    assert student.init_seed == 0 and student.weights is student.given is None
    learner = plan.phases[-1].learners["student"]
    assert learner.optimizer.fn is optimizers.adam
    assert isinstance(learner.ema_decay, Schedule)
    assert plan.phases[0].learners["teacher"].ema_decay is None
    assert plan.description.num_classes == 10 and plan.description.inputs.shape == (8, 8, 1)
    assert plan.task.score_column.key == "accuracy"


def test_objectives_of_each_phase():
    teacher, _, distill = resolve(config()).phases
    term = teacher.objectives["teacher"]["task"]
    assert term.loss.fn is cross_entropy and term.other is None
    assert distill.objectives["student"]["distill"].loss.fn is on_logits
    assert distill.objectives["student"]["distill"].other == "teacher"


def test_the_phases_of_an_offline_run():
    phases = resolve(config()).phases
    assert [(x.name, x.folder, tuple(x.learners), x.see, x.split) for x in phases] == [
        ("teacher", "teacher", ("teacher",), (), "full"),
        ("baseline", "baseline", ("baseline",), (), "labelled"),
        ("distill", "", ("student",), ("teacher",), "train"),
    ]
    assert [(x.num_steps, x.start, x.select) for x in phases] == [
        (1500, "last", name) for name in ("teacher", "baseline", "student")
    ]
    assert all(x.source == sources.DATASET for x in phases)


@pytest.mark.parametrize(
    "phases,seeded",
    [
        (["teacher:", "baseline:", "student:teacher"], "baseline student"),
        (["teacher:", "assistant:teacher", "student:assistant"], "student"),
        (["student:", "student:teacher"], "student"),
        (["student,teacher:"], "student teacher"),
        (["student,teacher:", "student:teacher"], "student teacher"),
        (["teacher,peer:", "student:teacher"], "peer student teacher"),
        (["teacher,peer:", "assistant:teacher", "last:assistant"], "assistant last peer teacher"),
        (["teacher:", "student:teacher", "teacher:student"], "student teacher"),
    ],
)
def test_the_networks_that_are_trained_for_each_seed(phases, seeded):
    """All but those that a phase sees, unless they learn last, or with or from one of these."""
    parts = []
    for i, (learn, see) in enumerate(phase.split(":") for phase in phases):
        learners, see = dict.fromkeys(learn.split(",")), tuple(filter(None, [see]))
        parts.append(Phase(f"{i}", "", learners, see, "train", 1, None, "last", None))
    assert Plan(*[None] * 6, phases=tuple(parts)).seeded == set(seeded.split())


def test_a_teacher_with_weights_needs_no_phase_and_no_terms():
    weights = dict(fn="run", workdir="runs/teacher")
    plan = resolve(config(teacher__terms=None, teacher__weights=weights, phases__teacher=None))
    assert [phase.name for phase in plan.phases] == ["baseline", "distill"]
    assert dict(plan.networks["teacher"].weights.static)["workdir"] == "runs/teacher"


def test_networks_with_weights_may_learn():
    weights = dict(fn="run", workdir="runs/student")
    (phase,) = resolve(small(student=network(weights=weights)), data=dataset()).phases
    assert list(phase.learners) == ["student"]


def test_online_networks_all_learn():
    together = dict(learn=("teacher", "student"), select="student")
    made = config(baseline=None, phases=dict(together=together))
    (phase,) = resolve(made).phases
    assert list(phase.learners) == ["teacher", "student"] and phase.see == ()
    assert (phase.folder, phase.split, phase.select) == ("", "train", "student")
    assert set(phase.objectives) == {"teacher", "student"}
    del together["select"]
    assert resolve(made).phases[0].select is None  # the mean of both


def test_networks_that_the_caller_gives():
    module = models.mlp(num_classes=10, widths=(3,))
    variables = module.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False)
    given = {"teacher": (module.apply, variables), "student": (module.apply, variables)}
    model = dict(fn="given")
    made = config(teacher=dict(model=model), student__model=model, phases__teacher=None)
    plan = resolve(made, networks=given)
    assert plan.networks["student"].module is None
    assert plan.networks["student"].given is given["student"]
    message = refusal(made, networks=given | {"peer": given["teacher"]})
    assert message == (
        "networks has 'peer', which the config lacks; add peer=dict(model=dict(fn='given'))."
    )
    assert refusal(made, networks={"teacher": given["teacher"]}) == (
        "student.model is 'given', but networks has no 'student'; pass networks={'student': "
        "(apply_fn, variables)} to train_and_evaluate."
    )
    assert refusal(config(), networks={"teacher": given["teacher"]}) == (
        "teacher.model must be dict(fn='given'), for networks= has 'teacher'; found "
        "{'fn': 'mlp', 'widths': (256, 256)}."
    )
    for pair in (3, module.apply, (variables, module.apply), given["teacher"][:1]):
        message = refusal(made, networks=given | {"teacher": pair})
        assert message.startswith("networks['teacher'] must be (apply_fn, variables); found ")


def test_what_is_handed_over_must_be_what_it_is_called():
    assert refusal(small(), networks=[3]) == (
        "networks must be a mapping {name: (apply_fn, variables)}; found [3]."
    )
    assert refusal(small(), data=(1, 2)) == (
        "data must be a DataSet, such as data.from_arrays makes; found (1, 2)."
    )
    assert refusal(small(data=dict(fn="given"))) == (
        "data.fn is 'given', but no data are handed over; pass data=."
    )


# --- defaults -----------------------------------------------------------------------------------


def test_a_config_gives_only_what_differs_from_the_defaults():
    made = configs.defaults()
    assert made.to_dict() == DEFAULTS
    made.update(data=dict(fn="digits", validation=0), **small())
    plan = resolve(made)
    own = {"data", "student", "phases"}
    assert {key: value for key, value in plan.config.items() if key not in own} == DEFAULTS
    (phase,) = plan.phases
    assert (phase.num_steps, phase.split, phase.start) == (DEFAULTS["num_steps"], "train", "last")
    assert phase.see == () and phase.select == "student" and phase.source == sources.DATASET
    plain = dict(data=dict(fn="digits", validation=0), **small())
    assert resolve(plain).config == plan.config  # which need not start from the defaults
    assert configs.defaults().to_dict() == DEFAULTS


def test_data_that_are_handed_over_need_no_group_in_the_config():
    for group in ({}, dict(data={}), dict(data=dict(fn="given")), dict(data=dict(fn="digits"))):
        plan = resolve(small(**group), data=dataset())
        assert plan.config["data"]["fn"] == "given" and len(plan.config["data"]["sha256"]) == 64
        assert plan.description.num_classes == 3


# --- named phases -------------------------------------------------------------------------------


def named(*names):
    """A config with a network for each phase, in this order."""
    made = configs.defaults()
    made.update({name: network() for name in names})
    made.phases = {name: dict(learn=(name,)) for name in names}
    return made


ORDER = ("zeta", "alpha", "midst")
COPIES = {
    "itself": lambda x: x,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "copy_and_resolve_references": lambda x: x.copy_and_resolve_references(),
    "ConfigDict": ml_collections.ConfigDict,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "locked": lambda x: x.lock(),
    "dict": dict,
    "written as a dict": lambda x: dict(x) | {"phases": dict(x)["phases"]},
}


@pytest.mark.parametrize("name", COPIES)
def test_phases_stand_in_the_order_of_writing(name):
    plan = resolve(COPIES[name](named(*ORDER)), data=dataset())
    assert [phase.name for phase in plan.phases] == list(ORDER)
    assert [phase.folder for phase in plan.phases] == ["zeta", "alpha", ""]
    assert list(plan.config["phases"]) == list(ORDER)


def test_phases_that_are_taken_out_and_added_stand_in_the_order_of_writing():
    made = named(*ORDER)
    del made.phases.alpha
    made.phases.beta = dict(learn=("alpha",))
    made.phases.zeta.num_steps = 3
    plan = resolve(made, data=dataset())
    assert [phase.name for phase in plan.phases] == ["zeta", "midst", "beta"]


def test_a_frozen_config_has_lost_the_order_and_is_refused():
    message = refusal(ml_collections.FrozenConfigDict(named(*ORDER)), data=dataset())
    assert message == (
        "config must be a ConfigDict that is not frozen, for freezing sorts the phases; found "
        "'FrozenConfigDict'."
    )


def test_a_phase_may_replace_how_a_network_learns():
    own = dict(
        terms=dict(copy=dict(KL, weight=dict(fn="linear", start=0.0, end=1.0))),
        optimizer=dict(fn="sgd", learning_rate=dict(fn="linear", start=1.0, end=0.0)),
        ema_decay=0.5,
    )
    made = small(
        teacher=network(),
        phases=dict(
            teacher=dict(learn=("teacher",)),
            warm=dict(learn=("student",)),
            distill=dict(learn=("student",), see=("teacher",), num_steps=50, student=own),
        ),
    )
    plan = resolve(made, data=dataset())
    _, warm, distill = (next(iter(phase.learners.values())) for phase in plan.phases)
    assert list(warm.terms) == ["task"] and list(distill.terms) == ["copy"]
    assert warm.optimizer.fn is optimizers.adam and distill.optimizer.fn is optimizers.sgd
    assert warm.ema_decay is None and distill.ema_decay == 0.5
    assert [phase.num_steps for phase in plan.phases] == [1000, 1000, 50]
    rate, weight = distill.optimizer.numbers["learning_rate"], distill.terms["copy"].weight
    assert at_step(rate, 25) == 0.5 and at_step(weight, 25) == 0.5  # over the phase's own steps
    own.pop("terms")
    plan = resolve(made, data=dataset())
    assert list(plan.phases[-1].learners["student"].terms) == ["task"]  # the rest is the network's


def test_a_phase_has_a_split_a_start_a_length_and_a_source():
    phase = dict(learn=("student",), split="labelled", start="best", num_steps=7)
    phase |= dict(source=dict(fn="dataset"), select="student")
    (found,) = resolve(small(phases=dict(it=phase)), data=dataset()).phases
    assert (found.split, found.start, found.num_steps) == ("labelled", "best", 7)
    assert found.source == sources.DATASET and found.select == "student"


def test_a_network_may_learn_in_several_phases_and_be_seen_between():
    made = small(
        peer=network(terms=dict(copy=KL)),
        phases=dict(
            first=dict(learn=("student",)),
            second=dict(learn=("peer",), see=("student",)),
            third=dict(learn=("student",), see=("peer",)),
            both=dict(learn=("student", "peer")),
        ),
    )
    phases = resolve(made, data=dataset()).phases
    assert [tuple(x.learners) for x in phases] == [
        ("student",), ("peer",), ("student",), ("student", "peer")
    ]  # fmt: skip


THREE = "teacher, student, baseline"
IN_PHASES = {
    "phases must be a group of phases by name, in order, such as "
    "dict(distill=dict(learn=('student',))); found {}.": dict(phases={}),
    "phases must be a group of phases by name, in order, such as "
    "dict(distill=dict(learn=('student',))); found None.": dict(phases=None),
    "phases must be a group of phases by name, in order, such as "
    "dict(distill=dict(learn=('student',))); found ('teacher',).": dict(phases=("teacher",)),
    "phases.distill must be a group; found 3.": dict(phases__distill=3),
    "phases.distill.lern is unknown (did you mean 'learn'?); phases.distill takes learn, see, "
    f"split, num_steps, source, start, select, {THREE}.": dict(phases__distill__lern=3),
    "phases.distill.tutor is unknown; phases.distill takes learn, see, split, num_steps, source, "
    f"start, select, {THREE}.": dict(phases__distill__tutor={}),
    f"phases.distill.learn must be a list of networks, each once, of {THREE}; found 'student'.":
        dict(phases__distill__learn="student"),
    f"phases.distill.learn must be a list of networks, each once, of {THREE}; found ('pupil',).":
        dict(phases__distill__learn=("pupil",)),
    f"phases.distill.learn must be a list of networks, each once, of {THREE}; found ('student', "
    "'student').": dict(phases__distill__learn=("student", "student")),
    f"phases.distill.learn must be a list of networks, each once, of {THREE}; found ({{}},).":
        dict(phases__distill__learn=({},)),
    f"phases.distill.learn must be at least one network, of {THREE}; found ().":
        dict(phases__distill__learn=None),
    f"phases.distill.see must be a list of networks, each once, of {THREE}; found 'teacher'.":
        dict(phases__distill__see="teacher"),
    f"phases.distill.see must be a list of networks, each once, of {THREE}; found ('teacher', "
    "'teacher').": dict(phases__distill__see=("teacher", "teacher")),
    "phases.distill.see must be networks that do not learn in this phase; found ['student'].":
        dict(phases__distill__see=("teacher", "student")),
    "phases.distill sees teacher, which has not learned by then; give it a phase before, or "
    "teacher.weights.": dict(phases__teacher=None),
    "student.terms.distill reads another network, and none takes part; let the phase `see` one.":
        dict(phases__distill__see=None),
    "student.terms.distill.other is missing; name the network that the loss reads: teacher, "
    "baseline.": dict(phases__distill__see=("teacher", "baseline")),
    "no phase names the network baseline; leave it out, or let it learn.":
        dict(phases__baseline=None),
    "phases.distill.split must be one of train, labelled, full; found 'all'.":
        dict(phases__distill__split="all"),
    "phases.distill.split must be one of train, labelled, full; found ['train'].":
        dict(phases__distill__split=["train"]),
    "phases.distill.start must be one of last, best; found 'first'.":
        dict(phases__distill__start="first"),
    "phases.distill.select must be one of student, which learn here; found 'teacher'.":
        dict(phases__distill__select="teacher"),
    "phases.distill.num_steps must be an integer of at least 1 and less than 2**31; found 0.":
        dict(phases__distill__num_steps=0),
    "phases.distill.num_steps must be an integer of at least 1 and less than 2**31; found 2.5.":
        dict(phases__distill__num_steps=2.5),
    "phases.distill.source.fn: there is no source 'datset' (did you mean 'dataset'?); known are "
    "adaptive, dataset, generated.": dict(phases__distill__source=dict(fn="datset")),
    "phases.distill.source must be a group dict(fn=NAME, ...) that names a source; found "
    "'dataset'.": dict(phases__distill__source="dataset"),
    "phases.distill.source.size is unknown; dataset takes none.":
        dict(phases__distill__source=dict(fn="dataset", size=3)),
    "phases.distill.teacher is for a network that learns here; phases.distill has ('student',).":
        dict(phases__distill__teacher=dict(terms=TASK)),
    "phases.distill.student.model is unknown; phases.distill.student takes optimizer, terms, "
    "ema_decay.": dict(phases__distill__student=dict(model=dict(fn="mlp", widths=(3,)))),
    "phases.distill.student must be a group; found 3.": dict(phases__distill__student=3),
    "phases.distill.student.terms must be a group of at least one term by name, for student is to "
    "learn; found {}.": dict(phases__distill__student=dict(terms={})),
    "phases.distill.student.terms.task.weight is missing; give the term's factor, such as 1.0.":
        dict(phases__distill__student=dict(terms=dict(task=dict(fn="cross_entropy")))),
    "phases.distill.student.optimizer.fn: there is no optimizer 'adm' (did you mean 'adam'?); "
    "known are adam, adamw, sgd.": dict(phases__distill__student=dict(optimizer=dict(fn="adm"))),
    "phases.distill.student.ema_decay must be at least 0 and less than 1; found 2.0.":
        dict(phases__distill__student=dict(ema_decay=2.0)),
}  # fmt: skip
TAKEN = (
    "an identifier, for the phase's folder, and none of checkpoints, figures, nonfinite, profile, "
    "seed_[0-9]+"
)


@pytest.mark.parametrize("message", IN_PHASES)
def test_refusals_of_phases(message):
    assert refusal(config(**IN_PHASES[message])) == message


@pytest.mark.parametrize("name", ["..", "a/b", "", "a b", "checkpoints", "profile", "seed_12", 3])
def test_a_phase_is_named_like_a_folder_of_its_own(name):
    made = small(phases={name: dict(learn=("student",)), "last": dict(learn=("student",))})
    assert refusal(made, data=dataset()) == f"a phase's name must be {TAKEN}; found {name!r}."


@pytest.mark.parametrize("name", ["learn", "see", "split", "start", "select", "source"])
def test_a_network_is_not_named_like_a_key_of_a_phase(name):
    made = small(**{name: network()})
    assert refusal(made, data=dataset()) == (
        "a network's name must be none of learn, see, split, num_steps, source, start, select; "
        f"found {name!r}."
    )


def test_networks_that_would_learn_from_each_other_as_one_are_refused():
    made = small(peer=network(), phases=dict(both=dict(learn=("student", "peer"))))
    resolve(made, data=dataset())  # twins that do not see each other
    distill = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"), other="student")
    made["peer"]["terms"] = dict(distill=distill)
    assert refusal(made, data=dataset()) == (
        "peer and student are the same model with the same init_seed, 0, so that they would start "
        "as one; give one of them its own: peer.init_seed=1."
    )
    made["peer"]["init_seed"] = 1
    plan = resolve(made, data=dataset())
    assert [plan.networks[name].init_seed for name in ("student", "peer")] == [0, 1]


# --- what else is refused -----------------------------------------------------------------------

TAKES = (
    "data, phases, task, batch_size, num_steps, checkpoint_every, log_every, steps_per_call, "
    "devices, fsdp, micro_batches, chunk, init_seed, init_seeds, data_seed, plugins, analysis, and "
    "networks, which have a model."
)
TERMS = "must be a group of at least one term by name, for"
DIGITS = "digits takes validation, shape, labelled, omit, imbalance, pad, flip, mean, std."
NETWORK = "model, weights, adapter, init_seed, project, published, optimizer, terms, ema_decay."
PROJECT = (
    "student.project must be dict(hidden=WIDTH), with the width of the other network's features, "
    "or dict(hidden=NAME), with its name; found"
)
REFUSED = {
    "data must be a group dict(fn=NAME, ...) that names a data set; found None.": {"data": None},
    "data must be a group dict(fn=NAME, ...) that names a data set; found 'digits'.": {
        "data": "digits"
    },
    f"the config has the unknown key 'num_step' (did you mean 'num_steps'?); it takes {TAKES}": {
        "num_step": 3
    },
    f"the config has the unknown key 'mode'; it takes {TAKES}": {"mode": "offline"},
    f"the config has the unknown group without a model 'peer'; it takes {TAKES}": {
        "peer": {"widths": (3,)}
    },
    "batch_size must be an integer of at least 1 and less than 2**31; found 0.": {"batch_size": 0},
    "num_steps must be an integer of at least 1 and less than 2**31; found 1.5.": {
        "num_steps": 1.5
    },
    "init_seed must be an integer of at least 0 and less than 2**31; found -1.": {"init_seed": -1},
    "student.init_seed must be an integer of at least 0 and less than 2**31; found 2147483648.": {
        "student__init_seed": 2**31
    },
    "init_seeds must be an integer of at least 1 and less than 2**31; found 0.": {"init_seeds": 0},
    "init_seeds must be as many as leave every init seed below 2**31; found 3.": {
        "init_seeds": 3,
        "student__init_seed": 2**31 - 2,
    },
    "init_seeds must be 1, for a seed changes nothing where the parameters of baseline and student "
    "are given; found 2.": {
        "init_seeds": 2,
        "student__weights": dict(fn="run", workdir="w"),
        "baseline__weights": dict(fn="run", workdir="w"),
    },
    "micro_batches must be an integer of at least 1 and less than 2**31; found True.": {
        "micro_batches": True
    },
    "batch_size must be a multiple of micro_batches, 3; found 128.": {"micro_batches": 3},
    "chunk must be an integer of at least 0 and less than 2**31; found -1.": {"chunk": -1},
    "steps_per_call must be an integer of at least 0 and less than 2**31; found -1.": {
        "steps_per_call": -1
    },
    "log_every must be an integer of at least 1 and less than 2**31; found 0.": {"log_every": 0},
    "plugins must be a list of packages; found 'my_package'.": {"plugins": "my_package"},
    "phases.teacher.learn must be a list of networks, each once, of student, baseline; found "
    "('teacher',).": {"teacher": None},
    "task.fn: there is no task 'clasification' (did you mean 'classification'?); known are "
    "classification, language.": {"task": {"fn": "clasification"}},
    "data.fn: there is no data 'digit' (did you mean 'digits'?); known are digits, glue, text, "
    "tfds, topic_lines, topics.": {"data__fn": "digit"},
    f"data.label is unknown (did you mean 'labelled'?); {DIGITS}": {"data__label": 3},
    f"data.validation is missing; {DIGITS}": {"data__validation": None},
    f"data.data_seed is unknown; {DIGITS}": {"data__data_seed": 3},
    "teacher.weights must be a group dict(fn=NAME, ...) that names a set of weights; found 3.": {
        "teacher__weights": 3
    },
    "teacher.weights.fn: there is no weights 'rum' (did you mean 'run'?); known are hugging_face, "
    "run, torch.": {"teacher__weights": {"fn": "rum"}},
    "teacher.weights.workdir is missing; run takes workdir, network, best, member.": {
        "teacher__weights": {"fn": "run"}
    },
    f"teacher.checkpoint is unknown; teacher takes {NETWORK}": {"teacher__checkpoint": "runs"},
    "student.optimizer must be a group dict(fn=NAME, ...) that names an optimizer; found None.": {
        "student__optimizer": None
    },
    "student.ema_decay must be at least 0 and less than 1; found 1.0.": {"student__ema_decay": 1.0},
    "student.ema_decay must stay at least 0 and less than 1; found 1.0 on its way.": {
        "student__ema_decay": {"fn": "linear", "start": 0.5, "end": 1.0}
    },
    "student.ema_decay must be a number; found 'slow'.": {"student__ema_decay": "slow"},
    "student.optimizer.learning_rate must stay at least 0 and finite; found -1.0 on its way.": {
        "student__optimizer__learning_rate": {
            "fn": "piecewise",
            "start": 1.0,
            "factor": -1.0,
            "boundaries": (500,),
        }
    },
    "student.model must be a group dict(fn=NAME, ...) that names a model; found 'mlp'.": {
        "student__model": "mlp"
    },
    "student.model.fn: there is no model 'mpl' (did you mean 'mlp'?); known are cached, cnn, "
    "decoder, encoder, hugging_face, imagenet_resnet, mlp, mobilenet_v1, mobilenet_v2, resnet, "
    "shufflenet_v1, shufflenet_v2, vgg, wide_resnet.": {"student__model__fn": "mpl"},
    "student.model.width is unknown (did you mean 'widths'?); mlp takes widths.": {
        "student__model__width": 3
    },
    f"student.widths is unknown (did you mean 'weights'?); student takes {NETWORK}": {
        "student__widths": (3,)
    },
    "student.model.num_classes is unknown; mlp takes widths.": {"student__model__num_classes": 10},
    "student.model: mlp.widths must be at least 1 each; found (0,).": {
        "student__model__widths": (0,)
    },
    "student.model: resnet.depth must be 6 n + 2, such as 8, 20 or 56; found 21.": {
        "student__model": {"fn": "resnet", "depth": 21}
    },
    f"student.terms {TERMS} student is to learn; found None.": {"student__terms": None},
    f"teacher.terms {TERMS} teacher is to learn; found {{}}.": {"teacher__terms": {}},
    "student.terms.distill.where must be one of labelled, where; found 'labeled'.": {
        "student__terms__distill__where": "labeled"
    },
    "student.terms.distill.other must be one of teacher; found 'tutor'.": {
        "student__terms__distill__other": "tutor"
    },
    f"{PROJECT} 3.": {"student__project": 3},
    f"{PROJECT} {{'hidden': 'tutor'}}.": {"student__project": {"hidden": "tutor"}},
    f"{PROJECT} {{'hidden': 'student'}}.": {"student__project": {"hidden": "student"}},
    "teacher.project is for a network of the library with new parameters; found teacher with "
    "weights.": {
        "teacher__weights": {"fn": "run", "workdir": "runs"},
        "teacher__project": {"hidden": "student"},
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    assert refusal(config(**REFUSED[message])) == message


@pytest.mark.parametrize("found", [None, 3, "configs/digits.py", ["student"]])
def test_what_is_no_config_is_refused(found):
    assert refusal(found) == f"config must be a ConfigDict or a mapping; found {found!r}."


def test_a_config_needs_a_network():
    assert refusal(dict(phases=dict(it=dict(learn=()))), data=dataset()) == (
        "the config has no network, a group with a model; it needs at least one."
    )


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["where", "labelled", "rare", "common"])
def test_a_term_may_be_averaged_over_any_mask_of_the_data(where):
    terms = dict(task=TASK["task"] | dict(where=where))
    given = dataset(masks=("rare", "common"))
    plan = resolve(small(student=network(terms=terms)), data=given)
    assert plan.phases[0].objectives["student"]["task"].where == where
    assert plan.description.masks == ("common", "labelled", "rare", "where")


@pytest.mark.parametrize("where", ["rarely", "inputs", "key", None, 3])
def test_a_mask_that_the_data_lack_is_refused_by_name(where):
    terms = dict(task=TASK["task"] | dict(where=where))
    message = refusal(small(student=network(terms=terms)), data=dataset(masks=("rare",)))
    assert message == (
        f"student.terms.task.where must be one of labelled, rare, where; found {where!r}."
    )


# --- networks and losses that do not fit --------------------------------------------------------


def given(*parts, classes=3):
    """A network of the caller's own that shows such parts alone."""

    def apply(variables, inputs, train=False):
        logits = inputs.reshape(len(inputs), -1)[:, :1] * variables["params"]["scale"]
        shown = dict(logits=logits, hidden=logits)
        return Outputs(**{part: shown[part] for part in parts})

    return apply, {"params": {"scale": jnp.ones(classes)}}


NEEDS_HIDDEN = dict(fn="decoupled_features", strong_weight=1.0, weak_weight=1.0, temperature=1.0)


@pytest.mark.parametrize(
    "phase,field",
    [
        ({}, "student.terms"),
        ({"student": {"terms": {"it": NEEDS_HIDDEN | {"weight": 1.0}}}},
         "phases.it.student.terms"),
    ],
)  # fmt: skip
def test_a_network_that_does_not_give_what_a_loss_needs(phase, field):
    terms = dict(it=NEEDS_HIDDEN | dict(weight=1.0)) if not phase else TASK
    made = small(
        student=network(terms=terms),
        teacher=dict(model=dict(fn="given")),
        phases=dict(it=dict(learn=("student",), see=("teacher",)) | phase),
    )
    message = refusal(made, data=dataset(), networks={"teacher": given("logits")})
    part = re.fullmatch(
        rf"{field}\.it needs '(\w+)' of 'teacher', which its model does not .*", message
    )
    assert part and part[1] in ("hidden", "head")
    made = made | dict(student=network(model=dict(fn="given"), terms=terms))
    both = {"teacher": given("logits", "hidden"), "student": given("logits")}
    message = refusal(made, data=dataset(), networks=both)
    assert re.fullmatch(rf"{field}\.it needs 'h\w+' of '\w+', which its model .*", message)


def test_a_network_that_does_not_fit_the_data_or_the_task():
    made = small(student=network(model=dict(fn="cnn", widths=(3,))))
    message = refusal(made, data=dataset())
    assert message.startswith("student: its model cannot take inputs of shape (5,): ")
    made = small(student=network(model=dict(fn="given")))
    assert refusal(made, data=dataset(), networks={"student": given("logits", classes=4)}) == (
        "student must give logits of shape (B, 3); found (2, 4)."
    )
    assert refusal(made, data=dataset(), networks={"student": given("hidden")}) == (
        "student must give floating logits; found none."
    )


def test_statistics_are_those_of_a_network_that_does_not_learn():
    terms = dict(it=dict(fn="norm_and_direction", centers="class_means", weight=1.0))
    student = network(terms=terms)
    made = small(
        student=student,
        teacher=network(),
        phases=dict(
            teacher=dict(learn=("teacher",)), it=dict(learn=("student",), see=("teacher",))
        ),
    )
    assert resolve(made, data=dataset()).phases[-1].objectives["student"]["it"].other == "teacher"
    made["phases"] = dict(both=dict(learn=("student", "teacher")))
    made["teacher"]["init_seed"] = 1
    assert refusal(made, data=dataset()) == (
        "student.terms.it: 'class_means' are those of another network that does not learn at the "
        "same time; found 'teacher'."
    )
    terms["it"]["centers"] = "class_mean"
    assert refusal(made, data=dataset()) == (
        "student.terms.it.centers must be an array or one of class_means, class_prior, "
        "class_weights; found 'class_mean'."
    )


def test_gradient_cosines_without_two_terms_are_refused():
    one = refusal(config(analysis=("entropy", "gradient_cosines")))
    assert one == "analysis: gradient_cosines are between terms, and no learner has two."
