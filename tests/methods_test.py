"""The published methods of configs/methods.py, as any offline config takes them."""

import importlib.util
import pathlib
import re
import runpy
import types
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from abkd_jax.binding import Bound
from abkd_jax.config import arguments, resolve
from abkd_jax.config.build import Builder
from abkd_jax.config.schema import plain

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
get_methods = runpy.run_path(str(_CONFIGS / "methods.py"))["get_methods"]
METHODS = get_methods(batch_size=64, num_steps=240)
OF_LABELS = {"dkd", "nkd", "difficulty_weighted", "norm_and_direction", "decoupled_features"}
OF_LABELS |= {"input_gradient_alignment"}


def get_config(name, argument):
    spec = importlib.util.spec_from_file_location(name, _CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return plain(module.get_config(argument))


def named(group):
    """The functions that a group names, at any depth."""
    if not isinstance(group, dict):
        return set()
    return {group.get("fn")}.union(*(named(part) for part in group.values()))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_config_that_can_be_run(method):
    config = get_config("cifar100", f"method={method},runlocal")
    for name, width in (("teacher", 8), ("student", 4)):  # a ResNet takes long to trace
        config[name]["model"] = dict(fn="mlp", widths=(width,))
    distill = resolve(config).phases[-1]
    assert set(distill.objectives["student"]) == set(METHODS[method])
    assert config["student"]["terms"]["task"] == METHODS[method]["task"]  # no label is withheld


@pytest.mark.parametrize("method", METHODS)
def test_where_labels_are_withheld_a_method_uses_those_that_there_are(method):
    config = get_config("digits", f"method={method}")
    terms = config["student"]["terms"]
    assert set(resolve(config).phases[-1].objectives["student"]) == set(terms)
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
        arguments.apply(module.get_config(), {"method": {"fn": "kd"}})


# --- the published numbers ----------------------------------------------------------------------
#
# Each as its official file has it, by the path in the terms that the preset becomes, defaults
# included; an epoch is one step here. A number of `ours` is in no file for any pair of networks.

_OURS = "our reading"
_CRD = (
    "HobbitLong/RepDistiller: scripts/run_cifar_distill.sh, train_student.py, distiller_zoo/KD.py"
)
_DKD = "megvii-research/mdistiller: configs/cifar100/dkd/res56_res20.yaml, mdistiller/engine/cfg.py"
_TTM = "zkxufo/TTM: README.md, train_student.py, distiller_zoo/{ttm,wttm}.py"
_CLS_KD = (
    "yzd-v/cls_KD: configs/distillers/cifar100/res34_distill_res18_cifar.py, "
    "configs/_base_/models/resnet18_cifar.py"
)
_LSKD = "sunshangquan/logit-standardization-KD: README.md, mdistiller/engine/cfg.py"
_DIST = "hunto/image_classification_sota: configs/strategies/distill/dist_cifar.yaml"
_MLKD = "Jin-Ying/Multi-Level-Logit-Distillation: mdistiller/engine/cfg.py, distillers/KD_ours.py"
_AKL = "wutaiqiang/LLM_KD_AKL: AKL.py"
_ALPHANET = "facebookresearch/AlphaNet: configs/train_alphanet_models.yml, loss_ops.py"
_ABKD = (
    "ghwang-s/abkd: README.md, standard_classification/train_{ab,dkd,ls,ttm}.sh, train_student.py"
)
_BDKD = "ghwang-s/abkd: distillation_llm/distillm/losses.py"
_ER = "cpsu00/ER-KD: mdistiller/mdistiller/engine/cfg.py, mdistiller/tools/train.py"
_EA = "cpsu00/EA-KD: mdistiller/engine/cfg.py"
_SINKD = "2018cx/SinKD: loss.py, script/student/*.sh"
_ND = "WangYZ1608/Knowledge-Distillation-via-ND: CIFAR/train_cifar.sh, train_cifar_{kd,dkd}.py"
_DIST_PP = "WangYZ1608/Knowledge-Distillation-via-ND: CIFAR/DIST++/train_dist.{sh,py}"
_BKD = "EricZsy/BalancedKnowledgeDistillation: train_student.py, losses.py"


class Published(NamedTuple):
    """What a preset's numbers are.

    Attributes:
        source: the official repository and its files, or "our reading".
        numbers: those that stand there, {path: number}.
        ours: those that do not.
        pair: the networks that the files are of, where it is not ResNet-56 to ResNet-20 or all.
    """

    source: str
    numbers: dict[str, float]
    ours: Mapping[str, float] = types.MappingProxyType({})
    pair: str | None = None


def _with(prefix: str, **numbers: float) -> dict[str, float]:
    return {f"{prefix}.{name}": number for name, number in numbers.items()}


def _task(weight: float) -> dict[str, float]:
    return _with("task", weight=weight, label_smoothing=0.0)


def _kd(weight: float, temperature: float, power: float = 2.0) -> dict[str, float]:
    return _with("distill", weight=weight, temperature=temperature, temperature_power=power)


def _rising(value: float) -> dict[str, float]:
    """min(1, epoch / 20), whichever the file."""
    return _with("distill.weight", value=value, steps=20)


_SQUARED = dict(temperature_power=2.0)
_PLAIN = dict(temperature=1.0, temperature_power=0.0)  # logits as they are, and no factor
_UNUSED = _with("distill", temperature=1.0, temperature_power=2.0)  # 1 and its square

PUBLISHED = {
    "kd": Published(_CRD, _task(0.1) | _kd(0.9, 4.0)),
    "reverse_kl": Published(_OURS, {}, _task(0.1) | _kd(0.9, 4.0)),
    "jeffreys": Published(_OURS, {}, _task(0.1) | _kd(0.45, 4.0)),
    "js": Published(
        _OURS, {}, _task(0.1) | _kd(0.9, 4.0) | _with("distill.divergence", teacher_weight=0.5)
    ),
    "ttm": Published(
        _TTM,
        _task(1.0)
        | _with("distill", weight=45.0, **_PLAIN)
        | _with("distill.divergence", teacher_power=0.1),
        pair="VGG-13 to VGG-8",
    ),
    "wttm": Published(
        _TTM,
        _task(1.0) | _with("distill.loss", **_PLAIN),
        _with("distill", weight=45.0, teacher_power=0.1, unit_mean=1.0)
        | _with("distill.loss.divergence", teacher_power=0.1),
    ),
    "dkd": Published(
        _DKD,
        _task(1.0)
        | _rising(1.0)
        | _with("distill", target_weight=1.0, rest_weight=2.0, temperature=4.0, **_SQUARED),
    ),
    "nkd": Published(
        _CLS_KD,
        _task(1.0) | _with("distill", weight=1.0, rest_weight=3.5, temperature=3.0),
        pair="ResNet-34 to ResNet-18",
    ),
    "lskd": Published(
        _LSKD,
        _task(0.1)
        | _with("distill", weight=9.0)
        | _UNUSED
        | _with("distill.divergence.divergence", temperature=2.0, **_SQUARED),
    ),
    "dist": Published(
        _DIST,
        _task(1.0)
        | _with("distill", weight=2.0, row_weight=1.0, column_weight=1.0, temperature=4.0),
    ),
    "mlkd": Published(
        _MLKD,
        _task(0.1)
        | _kd(0.9, 4.0)
        | _with("relations", weight=0.9, batch_weight=1.0, class_weight=1.0, temperature=4.0),
    ),
    "akl": Published(
        _AKL, _with("distill.divergence", head_mass=0.5), _task(0.1) | _kd(0.9, temperature=4.0)
    ),
    "alphanet": Published(
        _ALPHANET,
        _with("distill.divergence", alpha_min=-1.0, alpha_max=1.0, clip=5.0) | _UNUSED,
        _task(1.0) | _with("distill", weight=1.0),
    ),
    "abkd": Published(
        _ABKD,
        _task(1.0) | _kd(32.0, 4.0, power=0.0) | _with("distill.divergence", alpha=0.8, beta=0.3),
    ),
    "ab_dkd": Published(
        _ABKD,
        _task(1.0)
        | _rising(1.0)
        | _with("distill", target_weight=1.0, temperature=4.0, **_SQUARED),
        _with("distill", rest_weight=2.0) | _with("distill.rest_divergence", alpha=0.8, beta=0.3),
    ),
    "ab_lskd": Published(
        _ABKD,
        _task(0.1)
        | _with("distill", weight=9.0)
        | _UNUSED
        | _with("distill.divergence.divergence", temperature=2.0, **_SQUARED)
        | _with("distill.divergence.divergence.divergence", alpha=0.9, beta=0.3),
    ),
    "ab_ttm": Published(
        _ABKD,
        _task(1.0) | _with("distill", **_PLAIN) | _with("distill.divergence", teacher_power=0.1),
        _with("distill", weight=45.0) | _with("distill.divergence.divergence", alpha=0.8, beta=0.3),
        pair="WRN-40-2 to WRN-40-1",
    ),
    "er_kd": Published(
        _ER,
        _task(0.1)
        | _with("distill", weight=0.9, temperature=4.0)
        | _with("distill.loss", temperature=4.0, **_SQUARED),
    ),
    "er_dkd": Published(
        _ER,
        _task(1.0)
        | _rising(1.0)
        | _with("distill", temperature=4.0)
        | _with("distill.loss", target_weight=1.0, temperature=4.0, **_SQUARED),
        _with("distill.loss", rest_weight=2.0),
    ),
    "ea_kd": Published(
        _EA,
        _task(0.1)
        | _with("distill", weight=0.9, temperature=3.0)
        | _with("distill.loss", temperature=4.0, **_SQUARED),
    ),
    "ea_dkd": Published(
        _EA,
        _task(1.0)
        | _rising(1.0)
        | _with("distill", temperature=3.0)
        | _with("distill.loss", target_weight=1.0, temperature=4.0, **_SQUARED),
        _with("distill.loss", rest_weight=2.0),
    ),
    "er_abkd": Published(
        _OURS,
        {},
        _task(1.0)
        | _with("distill", weight=32.0, temperature=4.0)
        | _with("distill.loss", temperature=4.0, temperature_power=0.0)
        | _with("distill.loss.divergence", alpha=0.8, beta=0.3),
    ),
    "wslkd": Published(
        _CLS_KD,
        _task(1.0)
        | _with("distill", weight=2.25)
        | _with("distill.loss", temperature=4.0, **_SQUARED),
        pair="ResNet-34 to ResNet-18",
    ),
    "bdkd": Published(
        _BDKD,
        _with("distill.forward", temperature=1.0, **_SQUARED)
        | _with("distill.reverse", temperature=1.0, **_SQUARED),
        _task(1.0) | _with("distill", weight=1.0, gain=2.0),
    ),
    "cakd": Published(
        _OURS,
        {},
        _task(1.0)
        | _with("distill", weight=1.0, target_weight=1.0, rest_weight=2.0, temperature=4.0)
        | _with("distill", **_SQUARED),
    ),
    "cakd_features": Published(
        _OURS,
        {},
        _task(1.0)
        | _with("distill", weight=1.0, target_weight=1.0, rest_weight=2.0, temperature=4.0)
        | _with("distill", **_SQUARED)
        | _with("features", weight=1.0, strong_weight=1.0, weak_weight=2.0, temperature=4.0),
    ),
    "sinkd": Published(
        _SINKD,
        _with("distill", temperature_power=0.0)
        | _with("transport", temperature=2.0, epsilon=0.1, num_iterations=20),
        _task(0.1)
        | _with("distill", weight=0.9, temperature=4.0)
        | _with("transport", weight=0.8 * 0.001 * 64),
    ),
    "kd_pp": Published(
        _ND,
        _task(1.0)
        | _rising(1.0)
        | _with("distill", temperature=4.0, **_SQUARED)
        | _with("features", weight=2.0),
    ),
    "dkd_pp": Published(
        _ND,
        _task(1.0)
        | _rising(1.0)
        | _with("distill", target_weight=2.5, rest_weight=4.0, temperature=4.0, **_SQUARED)
        | _with("features", weight=3.5),
    ),
    "dist_pp": Published(
        _DIST_PP,
        _task(1.0)
        | _rising(2.0)
        | _with("distill", row_weight=1.0, column_weight=1.0, temperature=4.0)
        | _with("features", weight=1.0),
    ),
    "bkd": Published(
        _BKD,
        _task(1.0) | _kd(1.0, 2.0),  # and the log-prior, an array that the run computes
    ),
    "cmkd_style": Published(
        _OURS,
        {},
        _task(1.0)
        | _with("distill", weight=1.0, pearson_weight=1.0, spearman_weight=1.0, regularization=1.0),
    ),
    "kdiga": Published(
        _OURS, {}, _task(0.5) | _kd(0.5, temperature=1.0) | _with("gradients", weight=1.0)
    ),
}


def objective(terms):
    return Builder(num_steps=240).objective(
        terms, field="student.terms", learner="student", networks=("student", "teacher")
    )


def resolved(node, path):
    """{path: number} of all that is bound in an objective's weight or loss."""
    if isinstance(node, Bound):
        parts = (*node.numbers.items(), *node.static)
        return {k: x for key, part in parts for k, x in resolved(part, f"{path}.{key}").items()}
    return {path: float(node)} if hasattr(node, "dtype") or isinstance(node, int) else {}


def test_every_method_is_in_the_table():
    assert set(PUBLISHED) == set(METHODS)


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_numbers_of_a_method_are_those_of_its_official_file(method):
    found = {}
    for name, term in objective(METHODS[method]).items():
        found |= resolved(term.weight, f"{name}.weight") | resolved(term.loss, name)
    row = PUBLISHED[method]
    assert not set(row.numbers) & set(row.ours)
    assert found == pytest.approx(dict(row.numbers, **row.ours))  # of float32


def comments():
    """{method: the comment above it, or above the first of its group}."""
    text, found, block = (_CONFIGS / "methods.py").read_text(), {}, []
    for before, line in zip(["", *text.splitlines()], text.splitlines(), strict=False):
        stripped = line.strip()
        if stripped.startswith("#"):
            block = [*(block if before.strip().startswith("#") else []), stripped.lstrip("# ")]
        elif name := re.match(r'        "(\w+)": _terms\(', line):
            found[name[1]] = " ".join(block)
    return found


@pytest.mark.parametrize("method", PUBLISHED)
def test_what_is_not_published_is_said_beside_the_preset(method):
    row, comment = PUBLISHED[method], comments()[method]
    assert bool(row.numbers) == (row.source != _OURS)
    assert not row.ours or re.search("our reading", comment, re.IGNORECASE)
    assert row.pair is None or row.pair in comment


# --- the language presets -----------------------------------------------------------------------
#
# Likewise, with the source of their text: the groups' numbers, whose defaults sources_test.py has.

_OF_LANGUAGE = "ghwang-s/abkd: distillation_llm/finetune.py, distillm/losses.py, scripts/gpt2"
_GPT2 = dict(threshold=0.0, tolerance=0.1, capacity=1000)  # init_threshold, loss_eps, capacity
_TOKENS = _with("distill", weight=1.0, temperature=1.0)  # and no factor but 1: its square is 1
_LABELS = _with("task", weight=1.0, label_smoothing=0.0)
_SKEWED = _TOKENS | _with("distill.divergence", skew=0.1)
_JS = _TOKENS | _with("distill.divergence", teacher_weight=0.1)
_AB = _TOKENS | _with("distill.divergence", alpha=0.2, beta=0.7)
_NOT_CALLED = _with("distill.divergence", alpha_min=-1.0, alpha_max=1.0, clip=5.0)
_TEACHERS = dict(fn="generated", by="teacher", fraction=1.0)
_STUDENTS = dict(fn="generated", by="student", fraction=1.0)
_MIXED = dict(fn="generated", by="student", fraction=0.5)
_ADAPTIVE = dict(fn="adaptive", by="student", **_GPT2)

LANGUAGE = {
    "sft": (_OF_LANGUAGE, _LABELS, None),
    "kd": (_OF_LANGUAGE, _TOKENS, None),
    "reverse_kl": (_OF_LANGUAGE, _TOKENS, None),
    "js": ("jongwooko/distillm: distillm/losses.py", _JS, None),
    "tvd": (_OF_LANGUAGE, _TOKENS, None),
    "wsd": (_OF_LANGUAGE, _TOKENS | {"distill.weight": 0.5}, None),
    "skew_forward_kl": (_OF_LANGUAGE, _SKEWED, None),
    "skew_reverse_kl": (_OF_LANGUAGE, _SKEWED, None),
    "akl": (_AKL, _TOKENS | _with("distill.divergence", head_mass=0.5), None),
    "alphanet": (_OURS, _TOKENS | _NOT_CALLED, None),
    "seqkd": (_OURS, _LABELS, _TEACHERS | dict(labelled=True)),
    "seqkd_kl": (_OF_LANGUAGE, _TOKENS, _TEACHERS),
    "imitkd": (_OF_LANGUAGE, _TOKENS, _STUDENTS),
    "gkd": ("jongwooko/distillm: distillm/losses.py, scripts/gpt2", _JS, _MIXED),
    "distillm": (_OF_LANGUAGE, _SKEWED, _ADAPTIVE),
    "distillm_forward": (_OF_LANGUAGE, _SKEWED, _ADAPTIVE),
    "abkd": (_OF_LANGUAGE, _AB, None),
    "abkd_seqkd": (_OURS, _AB, _TEACHERS),
    "abkd_imitkd": (_OURS, _AB, _STUDENTS),
    "abkd_gkd": (_OURS, _AB, _MIXED),
    "abkd_distillm": (_OURS, _AB, _ADAPTIVE),
}
_PRESETS = runpy.run_path(str(_CONFIGS / "methods.py"))["get_language_methods"]
OF_LANGUAGE = _PRESETS(batch_size=32, num_steps=240)


def test_every_method_of_language_is_in_the_table():
    assert set(LANGUAGE) == set(OF_LANGUAGE)


@pytest.mark.parametrize("method", LANGUAGE)
def test_the_numbers_of_a_method_of_language_are_those_of_its_source(method):
    _, numbers, source = LANGUAGE[method]
    preset, found = OF_LANGUAGE[method], {}
    for name, term in objective(preset["terms"]).items():
        found |= resolved(term.weight, f"{name}.weight") | resolved(term.loss, name)
    found.pop("distill.temperature_power", None)
    assert found == pytest.approx(numbers)
    assert preset.get("source") == source
