"""The schema builds what a config says, and refuses the rest in one sentence."""

import copy
import importlib.util
import pathlib
import re

import pytest

from abkd_jax import schema
from abkd_jax.losses import cross_entropy, on_logits
from abkd_jax.train import optimizer
from abkd_jax.types import Schedule

_DIGITS = pathlib.Path(__file__).parent.parent / "configs" / "digits.py"
_SPEC = importlib.util.spec_from_file_location("digits_config", _DIGITS)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)


def config(**changes):
    """The digits config with values at dotted paths replaced; None deletes."""
    values = copy.deepcopy(_MODULE.get_config().to_dict())
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


def test_the_digits_config_is_accepted_and_built():
    values = config(student__ema_decay={"fn": "linear", "start": 0.5, "end": 0.9})
    schema.check(values)
    assert set(schema.networks(values)) == {"teacher", "baseline", "student"}
    student = schema.network(values, "student", num_classes=10)
    assert student.module.widths == (16,) and student.module.num_classes == 10
    assert student.optimizer.fn is optimizer.adam
    assert isinstance(student.ema_decay, Schedule)
    assert schema.network(values, "teacher", num_classes=10).ema_decay is None


def test_objectives_of_each_phase():
    values = config()
    phase = schema.objectives(values, learners=["teacher"], present=["teacher"])
    assert phase["teacher"]["task"].loss.fn is cross_entropy
    assert phase["teacher"]["task"].other == "teacher"
    phase = schema.objectives(values, learners=["student"], present=["teacher", "student"])
    assert phase["student"]["distill"].loss.fn is on_logits
    assert phase["student"]["distill"].other == "teacher"


def test_a_teacher_from_a_checkpoint_needs_no_terms():
    values = config(teacher__terms=None, teacher__checkpoint="runs/teacher")
    schema.check(values)
    assert schema.ready(values) == ["teacher"]
    assert [phase.name for phase in schema.phases(values)] == ["baseline", ""]


def test_the_phases_of_an_offline_run():
    assert schema.phases(config()) == [
        schema.Phase("teacher", ("teacher",), (), "teacher"),
        schema.Phase("baseline", ("baseline",), (), "labelled"),
        schema.Phase("", ("student",), ("teacher",), "train"),
    ]


def test_online_networks_all_learn():
    values = config(mode="online", baseline=None)
    schema.check(values)
    learners = tuple(schema.networks(values))
    assert schema.phases(values) == [schema.Phase("", learners, (), "train")]
    assert set(schema.objectives(values, learners=learners, present=learners)) == set(learners)


def test_an_online_network_with_a_checkpoint_is_frozen():
    values = config(mode="online", baseline=None, teacher__checkpoint="runs/teacher")
    schema.check(values)
    assert schema.phases(values) == [schema.Phase("", ("student",), ("teacher",), "train")]


def test_networks_that_the_caller_gives():
    values = config(teacher={"model": "given"}, student__model="given", student__widths=None)
    schema.check(values, given=["teacher", "student"])
    assert schema.ready(values) == ["teacher"]
    assert schema.network(values, "student", num_classes=10).module is None
    with pytest.raises(ValueError, match=r"^networks has .peer., which the config lacks; "):
        schema.check(values, given=["teacher", "student", "peer"])
    with pytest.raises(ValueError, match=r"^student.model must be .given. exactly if "):
        schema.check(values, given=["teacher"])


REFUSED = {
    "the config lacks 'mode'; it needs mode, data, batch_size, num_steps, init_seed, data_seed.": {
        "mode": None
    },
    "the config has the unknown key 'num_step' (did you mean 'num_steps'?); it takes mode, data, "
    "batch_size, num_steps, init_seed, data_seed, checkpoint_every, log_every, steps_per_call, "
    "devices, micro_batches, plugins, analysis, and networks, which have a model.": {"num_step": 3},
    "the config has the unknown group without a model 'peer'; it takes mode, data, batch_size, "
    "num_steps, init_seed, data_seed, checkpoint_every, log_every, steps_per_call, devices, "
    "micro_batches, plugins, analysis, and networks, which have a model.": {
        "peer": {"widths": (3,)}
    },
    "mode must be one of offline, online; found 'ofline'.": {"mode": "ofline"},
    "batch_size must be an integer of at least 1; found 0.": {"batch_size": 0},
    "num_steps must be an integer of at least 1; found 1.5.": {"num_steps": 1.5},
    "init_seed must be an integer of at least 0; found -1.": {"init_seed": -1},
    "micro_batches must be an integer of at least 1; found True.": {"micro_batches": True},
    "the config lacks the network 'teacher'; offline needs it.": {"teacher": None},
    "data must be a group dict(name=NAME, ...); found 'digits'.": {"data": "digits"},
    "data.name must be digits or an image-classification set of tensorflow_datasets; found "
    "'digit' (did you mean 'digits'?).": {"data__name": "digit"},
    "data.label is unknown (did you mean 'labelled'?); digits takes validation, labelled, omit, "
    "pad, flip, mean, std, shape.": {"data__label": 3},
    "data.validation is missing; digits takes validation, labelled, omit, pad, flip, mean, std, "
    "shape.": {"data__validation": None},
    "student.checkpoint must be empty: this network is to learn.": {"student__checkpoint": "runs"},
    "teacher.checkpoint must be the workdir of another run, or ''; found 3.": {
        "teacher__checkpoint": 3
    },
    "steps_per_call must be an integer of at least 0; found -1.": {"steps_per_call": -1},
    "log_every must be an integer of at least 1; found 0.": {"log_every": 0},
    "student.optimizer must be a group dict(name='adam', learning_rate=...); found None.": {
        "student__optimizer": None
    },
    "student.ema_decay must be at least 0 and less than 1; found 1.0.": {"student__ema_decay": 1.0},
    "student.optimizer.learning_rate must stay at least 0 and finite; found -1.0 on its way.": {
        "student__optimizer__learning_rate": {
            "fn": "piecewise",
            "start": 1.0,
            "factor": -1.0,
            "boundaries": (500,),
        }
    },
    "student.model must be one of cnn, mlp, resnet; found 'mpl' (did you mean 'mlp'?).": {
        "student__model": "mpl"
    },
    "student.width is unknown (did you mean 'widths'?); mlp takes widths.": {"student__width": 3},
    "student.ema_decay must be a number; found 'slow'.": {"student__ema_decay": "slow"},
    "student.terms is empty; a network that learns needs at least one term.": {
        "student__terms": None
    },
    "teacher.terms is empty; a network that learns needs at least one term.": {
        "teacher__terms": {}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        schema.check(config(**REFUSED[message]))
