"""The published methods of configs/methods.py, as any offline config takes them."""

import importlib.util
import pathlib
import runpy

import pytest

from abkd_jax import arguments, schema

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
METHODS = runpy.run_path(str(_CONFIGS / "methods.py"))["get_methods"](batch_size=64, num_steps=240)
OF_LABELS = {"dkd", "nkd", "difficulty_weighted", "norm_and_direction", "decoupled_features"}
OF_LABELS |= {"input_gradient_alignment"}


def get_config(name, argument):
    spec = importlib.util.spec_from_file_location(name, _CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument).to_dict()


def named(group):
    """The functions that a group names, at any depth."""
    if not isinstance(group, dict):
        return set()
    return {group.get("fn")}.union(*(named(part) for part in group.values()))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_config_that_can_be_run(method):
    config = get_config("cifar100", f"method={method},runlocal")
    schema.check(config)
    assert set(config["student"]["terms"]) == set(METHODS[method])
    assert config["student"]["terms"]["task"] == METHODS[method]["task"]  # no label is withheld


@pytest.mark.parametrize("method", METHODS)
def test_where_labels_are_withheld_a_method_uses_those_that_there_are(method):
    terms = get_config("digits", f"method={method}")["student"]["terms"]
    assert terms["task"] == METHODS[method]["task"] | {"where": "labelled"}
    for name, term in terms.items():
        if name != "task":
            wrapped = term["fn"] == "with_teacher_labels"
            assert wrapped == bool(named(METHODS[method][name]) & OF_LABELS)
            assert (term["loss"] if wrapped else term)["fn"] == METHODS[method][name]["fn"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_features_projects_where_widths_differ(method):
    of_features = bool(named(METHODS[method]) & {"norm_and_direction", "decoupled_features"})
    student = get_config("digits", f"method={method}")["student"]
    assert student.get("project") == (dict(hidden="teacher") if of_features else None)


def test_weights_that_depend_on_the_run():
    assert METHODS["sinkd"]["transport"]["weight"] == pytest.approx(0.8 * 0.001 * 64)
    assert METHODS["dkd"]["distill"]["weight"] == dict(fn="warmup", value=1.0, steps=20)


def test_the_number_of_a_method_can_be_changed():
    terms = get_config("digits", "method=abkd,alpha=0.5,weight=16.")["student"]["terms"]
    assert terms["distill"]["weight"] == 16.0
    assert terms["distill"]["divergence"] == dict(fn="alpha_beta", alpha=0.5, beta=0.3)


def test_the_temperature_of_lskd_is_that_of_its_scores():
    terms = get_config("digits", "method=lskd,temperature=4.")["student"]["terms"]
    assert terms["distill"]["divergence"]["divergence"]["temperature"] == 4.0
    assert "temperature" not in terms["distill"]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"^method must be one of kd, .*; found 'dkdd' \(did you "):
        get_config("digits", "method=dkdd")


def test_a_config_without_methods_says_so():
    config = importlib.util.spec_from_file_location("digits", _CONFIGS / "digits.py")
    module = importlib.util.module_from_spec(config)
    config.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"^this config takes no method; found method=kd\.$"):
        arguments.apply(module.get_config().unlock(), {"method": {"fn": "kd"}})
