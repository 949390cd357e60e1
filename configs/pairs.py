"""The benchmark of CRD on CIFAR-100: its networks, its 13 pairs of them, and published scores.

Command: python -m abkd_jax.main --config=configs/cifar100.py:pair=wrn_40_2-wrn_16_2 --workdir=DIR

Scores are accuracies on the test set in %, means of the runs that their sources tell of: after the
last epoch, or the best of 240 evaluations of the test set, as `SOURCES` says. ABKD's own are plots,
without numbers, of seven of them and of resnet110-resnet44, which the benchmark has not.
"""

from typing import Any, NamedTuple

_RESNETS = {f"resnet{depth}": dict(fn="resnet", depth=depth) for depth in (20, 32, 56, 110)}
_WIDE = (32, 64, 128, 256)
_WRNS = {
    f"wrn_{depth}_{widening}": dict(fn="wide_resnet", depth=depth, widening=widening)
    for depth, widening in ((16, 2), (40, 1), (40, 2))
}
NETWORKS = {
    **_RESNETS,
    **_WRNS,
    "resnet8x4": dict(fn="resnet", depth=8, widths=_WIDE),
    "resnet32x4": dict(fn="resnet", depth=32, widths=_WIDE),
    "vgg8": dict(fn="vgg", depth=8),
    "vgg13": dict(fn="vgg", depth=13),
    "resnet50": dict(fn="imagenet_resnet", depth=50, small_images=True),
    "mobilenet_v2": dict(fn="mobilenet_v2", width=0.5, expansion=6),
    "shufflenet_v1": dict(fn="shufflenet_v1"),
    "shufflenet_v2": dict(fn="shufflenet_v2", size=1.0),
}
_OF_MOBILE_DEVICES = ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")

# Of a network on the labels alone; RepDistiller's README.
ALONE = {
    "resnet20": 69.06,
    "resnet32": 71.14,
    "resnet56": 72.34,
    "resnet110": 74.31,
    "resnet8x4": 72.50,
    "resnet32x4": 79.42,
    "wrn_16_2": 73.26,
    "wrn_40_1": 71.98,
    "wrn_40_2": 75.61,
    "vgg8": 70.36,
    "vgg13": 74.64,
    "resnet50": 79.34,
    "mobilenet_v2": 64.60,
    "shufflenet_v1": 70.50,
    "shufflenet_v2": 71.82,
}
# Of the presets in configs/methods.py; None where the source has none.
METHODS = ("kd", "dkd", "dist", "ttm", "wttm", "lskd")
_CRD = "HobbitLong/RepDistiller: README.md", "last"  # train_student.py says which
_MDISTILLER = "megvii-research/mdistiller: README.md", "best"
_TTM = "zkxufo/TTM: README.md", "last"  # which it does not say: the stricter reading
_LSKD = "sunshangquan/logit-standardization-KD: README.md", "best"
SOURCES = dict(alone=_CRD, kd=_CRD, dkd=_MDISTILLER, dist=_TTM, ttm=_TTM, wttm=_TTM, lskd=_LSKD)
_DISTILLED = {
    "wrn_40_2-wrn_16_2": (74.92, 76.23, 75.51, 76.23, 76.37, 76.11),
    "wrn_40_2-wrn_40_1": (73.54, 74.81, 74.73, 74.32, 74.58, 74.37),
    "resnet56-resnet20": (70.66, 71.97, 71.75, 71.83, 71.92, 71.43),
    "resnet110-resnet20": (70.67, None, 71.65, 71.46, 71.67, 71.48),
    "resnet110-resnet32": (73.08, 74.11, 73.69, 73.97, 74.13, 74.17),
    "resnet32x4-resnet8x4": (73.33, 76.32, 76.31, 76.17, 76.06, 76.62),
    "vgg13-vgg8": (72.98, 74.68, 73.89, 74.33, 74.44, 74.36),
    "vgg13-mobilenet_v2": (67.37, 69.71, 68.50, 68.98, 69.16, 68.61),
    "resnet50-mobilenet_v2": (67.35, 70.35, 68.66, 69.24, 69.59, 69.02),
    "resnet50-vgg8": (73.81, None, 74.11, 74.87, 74.82, None),
    "resnet32x4-shufflenet_v1": (74.07, 76.45, 76.34, 74.18, 74.37, None),
    "resnet32x4-shufflenet_v2": (74.45, 77.07, 77.35, 76.57, 76.55, 75.56),
    "wrn_40_2-shufflenet_v1": (74.83, 76.70, 76.40, 75.39, 75.42, None),
}
# Numbers of a preset that are published for a pair, where they are not those of the preset. Where
# neither is, what stands in the preset is our reading for the pair.
_NUMBERS = {
    # mdistiller: configs/cifar100/dkd; a pair without a file of its own has 8 in its cfg.py.
    ("dkd", "resnet56-resnet20"): dict(rest_weight=2.0),
    ("dkd", "resnet110-resnet32"): dict(rest_weight=2.0),
    ("dkd", "vgg13-vgg8"): dict(rest_weight=6.0),
    ("dkd", "wrn_40_2-wrn_16_2"): dict(rest_weight=6.0),
    ("dkd", "wrn_40_2-wrn_40_1"): dict(rest_weight=6.0),
    ("dkd", "vgg13-mobilenet_v2"): dict(rest_weight=6.0),
    # logit-standardization-KD: the logs that its README's table links, by their names.
    ("lskd", "vgg13-vgg8"): dict(temperature=3.0, weight=9.0),
    ("lskd", "resnet110-resnet20"): dict(temperature=4.0, weight=12.0),
    ("lskd", "vgg13-mobilenet_v2"): dict(temperature=3.0, weight=9.0),
    ("lskd", "resnet50-mobilenet_v2"): dict(temperature=3.0, weight=1.0),
    # ghwang-s/abkd: standard_classification/train_dkd.sh and train_ttm.sh.
    ("ab_dkd", "vgg13-vgg8"): dict(rest_weight=6.0),
    ("ab_dkd", "resnet56-resnet20"): {},  # the preset's, our reading
    ("ab_ttm", "wrn_40_2-wrn_40_1"): dict(weight=76.0),
}
_DEFAULTS = {method: dict(rest_weight=8.0) for method in ("dkd", "ab_dkd")}  # of both codes


class Pair(NamedTuple):
    """A teacher and a student.

    Attributes:
        teacher: its name.
        student: its name.
        rate: the student's learning rate at the start.
        scores: {method: accuracy} of the student, where one is published.
    """

    teacher: str
    student: str
    rate: float
    scores: dict[str, float]


def get_pairs() -> dict[str, Pair]:
    """{name: pair}."""
    found = {}
    for name, scores in _DISTILLED.items():
        teacher, student = name.split("-")
        known = {method: x for method, x in zip(METHODS, scores, strict=True) if x is not None}
        rate = 0.01 if student in _OF_MOBILE_DEVICES else 0.05
        found[name] = Pair(teacher, student, rate, known)
    return found


def get_numbers(pair: str, method: str) -> dict[str, Any]:
    """The numbers of a method's `distill` term for a pair, where they are not the preset's."""
    return _NUMBERS.get((method, pair), _DEFAULTS.get(method, {}))
