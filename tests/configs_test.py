"""Every config runs, is stopped, goes on to the same result, and can be overridden everywhere."""

import importlib.util
import json
import pathlib
import runpy
import signal

import jax
import ml_collections
import numpy as np
import pytest

from abkd_jax import config as configs
from abkd_jax import data, optimizers
from abkd_jax.config.build import Builder
from abkd_jax.config.dry_run import one_step
from abkd_jax.config.schema import DEFAULTS
from abkd_jax.run import recorder
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.loop import train_and_evaluate

_CONFIGS = {
    path.stem: path
    for path in sorted(pathlib.Path(__file__).parents[1].glob("configs/*.py"))
    if path.stem not in ("methods", "pairs")  # tables for the others
}
# Which need files of the user's: see instructions_test.py and glue_test.py.
_OF_FOLDERS = ("instructions", "glue")
# What else the arguments of single configs can be; all of them are also run without it.
_MORE = {
    "cifar100_short": ["transfer"],
    "fashion_mnist": ["omit=5"],
    "imagenet": ["pair=resnet50-mobilenet_v1"],
    "online_fashion_mnist": ["method=bdkd", "method=dml", "method=independent"],
}
_ARGUMENTS = [(name, more) for name in _CONFIGS for more in ("", *_MORE.get(name, ()))]
_FULL = [(name, more) for name, more in _ARGUMENTS if name not in _OF_FOLDERS]


def module(name):
    spec = importlib.util.spec_from_file_location(f"config_of_{name}", _CONFIGS[name])
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


_TABLES = runpy.run_path(str(_CONFIGS["digits"].with_name("pairs.py")))
PAIRS = _TABLES["get_pairs"]()


def test_there_are_configs():
    assert "digits" in _CONFIGS and set(_MORE) <= set(_CONFIGS)


def stand_in(group):
    """A set like that of a config, or None where the config's own is embedded."""
    like = {"fashion_mnist": ((28, 28, 1), 10), "cifar100": ((32, 32, 3), 100)}
    like["imagenet2012"] = ((64, 64, 3), 1000)
    if "name" not in group:
        return None
    shape, num_classes = like[group.name]
    examples = np.zeros((100, *shape), np.uint8), np.arange(100) % num_classes
    return data.from_arrays(train=examples, validation=None, test=examples, num_classes=num_classes)


@pytest.mark.parametrize("name,argument", _FULL)
def test_the_full_config_is_one(name, argument):
    config = module(name).get_config(argument)
    plan = configs.resolve(config, data=stand_in(config.data))
    assert config.is_locked
    missing = set(DEFAULTS) - set(config)
    assert not missing  # for the command line overrides only what is there
    for phase in plan.phases:
        own = config.phases[phase.name].get("num_steps", config.num_steps)
        assert phase.num_steps == own
    assert set(plan.networks) == {name for phase in plan.phases for name in phase.learners}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=[] if x == "digits" else pytest.mark.long)
        for x in _CONFIGS
        if x not in _OF_FOLDERS
    ],
)
def test_a_step_lowers_for_accelerators(name):
    config = module(name).get_config()
    plan = configs.resolve(config, data=stand_in(config.data))
    step, *args = one_step(plan, plan.phases[-1])
    lower = jax.export.export(jax.jit(step), platforms=["tpu", "cuda"])
    assert lower(*args).platforms == ("tpu", "cuda")


@pytest.mark.parametrize("runlocal", ["", "runlocal"])
@pytest.mark.parametrize("name,argument", _ARGUMENTS)
def test_a_config_gives_what_differs_from_the_defaults(monkeypatch, name, argument, runlocal):
    runlocal = "runlocal" if name in _OF_FOLDERS else runlocal
    monkeypatch.setattr(configs, "defaults", ml_collections.ConfigDict)  # none
    config = module(name).get_config(",".join(filter(None, [runlocal, argument]))).to_dict()
    assert config["data"] and config["phases"]
    assert not [key for key, value in config.items() if DEFAULTS.get(key, ...) == value]
    usual = {"see": (), "split": "train", "start": "last", "source": {"fn": "dataset"}}
    usual["num_steps"] = config["num_steps"]
    for phase in config["phases"].values():
        assert not [key for key, value in phase.items() if usual.get(key, ...) == value]


@pytest.mark.parametrize("name", _CONFIGS)
def test_the_docstring_has_the_command(name):
    text = module(name).__doc__
    assert text.splitlines()[0].endswith(".") and "\nPaper" in text
    (command,) = [line for line in text.splitlines() if line.startswith("Command: ")]
    assert f"python -m abkd_jax.main --config=configs/{name}.py" in command
    assert "--workdir=" in command


# --- the published numbers of the training configs ----------------------------------------------

CRD = {
    # HobbitLong/RepDistiller: train_student.py and train_teacher.py, for all but the three networks
    # of mobile devices; the same in megvii-research/mdistiller: configs/cifar100/kd.yaml and
    # dkd/res56_res20.yaml, and in ghwang-s/abkd: standard_classification/train_student.py.
    "epochs": 240,
    "batch_size": 64,
    "learning_rate": 0.05,
    "lr_decay_epochs": (150, 180, 210),
    "lr_decay_rate": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "nesterov": False,  # of torch.optim.SGD
    # dataset/cifar100.py of the first and the third, mdistiller/dataset/cifar100.py of the second.
    "mean": (0.5071, 0.4867, 0.4408),
    "std": (0.2675, 0.2565, 0.2761),
    "padding": 4,
    "flip": True,
    # The third's: drop_last=True; the other two end an epoch with a smaller batch.
    "steps_per_epoch": 781,
}
ABKD = dict(alpha=0.8, beta=0.3)  # ghwang-s/abkd: README.md, for ResNet-56 to ResNet-20


def test_cifar100_has_the_published_protocol():
    config, epoch = module("cifar100").get_config(), CRD["steps_per_epoch"]
    data, found = config.data, {"teacher": 56, "student": 20}
    assert {name: config[name].model.depth for name in found} == found
    assert (data.mean, data.std) == (CRD["mean"], CRD["std"])
    assert (data.pad, data.flip, data.validation) == (CRD["padding"], CRD["flip"], 0)
    assert (config.batch_size, config.num_steps) == (CRD["batch_size"], CRD["epochs"] * epoch)
    builder = Builder((), config.num_steps)
    for name in found:
        rule = builder.bound(config[name].optimizer.to_dict(), "optimizer", name)
        assert rule.fn is optimizers.sgd
        numbers = {k: rule.numbers[k] for k in ("momentum", "weight_decay")}
        assert numbers == pytest.approx({k: CRD[k] for k in numbers})
        assert dict(rule.static)["nesterov"] == CRD["nesterov"]
        for drops, start in enumerate((0, *CRD["lr_decay_epochs"])):
            end = (*CRD["lr_decay_epochs"], CRD["epochs"])[drops]
            rate = CRD["learning_rate"] * CRD["lr_decay_rate"] ** drops
            of_steps = [
                rule.numbers["learning_rate"](x * epoch - y) for x, y in ((start, 0), (end, 1))
            ]
            np.testing.assert_allclose(of_steps, rate, rtol=1e-6)


# kd, dkd, dist, ttm, wttm and lskd, from the READMEs that `SOURCES` names.
_SCORES = """\
wrn_40_2-wrn_16_2         74.92  76.23  75.51  76.23  76.37  76.11
wrn_40_2-wrn_40_1         73.54  74.81  74.73  74.32  74.58  74.37
resnet56-resnet20         70.66  71.97  71.75  71.83  71.92  71.43
resnet110-resnet20        70.67  -      71.65  71.46  71.67  71.48
resnet110-resnet32        73.08  74.11  73.69  73.97  74.13  74.17
resnet32x4-resnet8x4      73.33  76.32  76.31  76.17  76.06  76.62
vgg13-vgg8                72.98  74.68  73.89  74.33  74.44  74.36
vgg13-mobilenet_v2        67.37  69.71  68.50  68.98  69.16  68.61
resnet50-mobilenet_v2     67.35  70.35  68.66  69.24  69.59  69.02
resnet50-vgg8             73.81  -      74.11  74.87  74.82  -
resnet32x4-shufflenet_v1  74.07  76.45  76.34  74.18  74.37  -
resnet32x4-shufflenet_v2  74.45  77.07  77.35  76.57  76.55  75.56
wrn_40_2-shufflenet_v1    74.83  76.70  76.40  75.39  75.42  -
""".splitlines()


def test_the_13_pairs():
    kinds = [(pair.teacher.split("_")[0], pair.student.split("_")[0]) for pair in PAIRS.values()]
    families = [tuple(kind.rstrip("0123456789x")[:3] for kind in pair) for pair in kinds]
    assert len(PAIRS) == 13 and sum(one == other for one, other in families) == 7
    for name, pair in PAIRS.items():
        config = module("cifar100").get_config(f"pair={name}")
        assert config.teacher.published == _TABLES["ALONE"][pair.teacher] / 100
        assert "published" not in config.student  # ABKD's own are plots
        rate = config.student.optimizer.learning_rate.start
        # HobbitLong/RepDistiller: train_student.py.
        assert rate == (0.01 if families[[*PAIRS].index(name)][1] in ("mob", "shu") else 0.05)
        assert config.teacher.optimizer.learning_rate.start == 0.05
        found = [f"{pair.scores[x]:.2f}" if x in pair.scores else "-" for x in _TABLES["METHODS"]]
        assert [name, *found] == _SCORES[[*PAIRS].index(name)].split()


def test_numbers_and_scores_of_a_method_and_pair():
    get = module("cifar100").get_config
    config = get("pair=vgg13-vgg8,method=dkd")
    assert config.student.terms.distill.rest_weight == 6.0 and config.student.published == 0.7468
    assert get("pair=resnet50-vgg8,method=dkd").student.terms.distill.rest_weight == 8.0
    assert get("method=dkd").student.terms.distill.rest_weight == 2.0
    assert get("pair=vgg13-vgg8,method=dkd,rest_weight=1.").student.get("published") is None
    assert get("pair=wrn_40_2-wrn_40_1,method=ab_ttm").student.terms.distill.weight == 76.0
    assert get("pair='vgg13-vgg8',method='kd'").student.published == 0.7298
    for pair in ("wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1", "vgg13-mobilenet_v2"):
        assert get(f"pair={pair},method=dkd").student.terms.distill.rest_weight == 6.0
    assert get("pair=resnet110-resnet32,method=dkd").student.terms.distill.rest_weight == 2.0
    of_lskd = {"vgg13-vgg8": (3, 9), "vgg13-mobilenet_v2": (3, 9), "resnet110-resnet20": (4, 12)}
    for pair, numbers in (of_lskd | {"resnet50-mobilenet_v2": (3, 1)}).items():
        distill = get(f"pair={pair},method=lskd").student.terms.distill
        assert (distill.divergence.divergence.temperature, distill.weight) == numbers
    small = get("runlocal")
    assert "published" not in small.teacher and "published" not in small.student
    with pytest.raises(
        ValueError, match=r"gives numbers in brackets; write method=dkd,rest_weight"
    ):
        get("method=dkd(rest_weight=1.)")
    for method in ("(kd,dkd)", "3"):
        with pytest.raises(ValueError, match=r"^method must be one of kd, .*; found "):
            get(f"method={method}")
    teacher = get("teacher='a/resnet56.pth'")
    assert teacher.teacher.weights.to_dict() == dict(fn="torch", path="a/resnet56.pth")
    assert [*teacher.phases] == ["distill"]
    with pytest.raises(ValueError, match=r"^pair must be one of wrn_40_2-wrn_16_2, .*; found 'a-b"):
        get("pair=a-b")


@pytest.mark.parametrize(
    "argument,teacher,student,published",
    [
        # zkxufo/TTM: README.md.
        ("", dict(fn="imagenet_resnet", depth=34), dict(fn="imagenet_resnet", depth=18), 0.7331),
        (
            "pair=resnet50-mobilenet_v1",
            dict(fn="imagenet_resnet", depth=50),
            dict(fn="mobilenet_v1"),
            0.7616,
        ),
    ],
)
def test_imagenet_s_pairs(argument, teacher, student, published):
    config = module("imagenet").get_config(argument)
    found = {name: config[name].model.to_dict() for name in ("teacher", "student")}
    half = dict(dtype="bfloat16")
    assert found == dict(teacher=teacher | half, student=student | half)
    assert config.teacher.published == published
    given = ",".join(filter(None, [argument, "runlocal"]))
    assert "published" not in module("imagenet").get_config(given).teacher


@pytest.mark.parametrize("name", ["cifar100_short", "cifar100_lt"])
def test_a_config_of_many_students_has_no_number_to_change(name):
    expected = "has 'alpha', but student.terms.distill, whose it would be, is none"
    with pytest.raises(ValueError, match=expected):
        module(name).get_config("alpha=0.5")


@pytest.mark.nightly
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_is_a_config(pair):
    config = module("cifar100").get_config(f"pair={pair}")
    plan = configs.resolve(config, data=stand_in(config.data))
    assert [[*phase.learners] for phase in plan.phases] == [["teacher"], ["student"]]


@pytest.mark.nightly
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_runs(tmp_path, pair):
    config = module("cifar100").get_config(f"pair={pair},runlocal")
    with config.unlocked():
        config.devices = 1
    result = train_and_evaluate(config, tmp_path)["networks"]
    assert {name: found["steps"] for name, found in result.items()} == dict(teacher=4, student=4)


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_alpha_and_beta_are_those_of_the_paper_s_code(name):
    divergence = module(name).get_config().student.terms.distill.divergence.to_dict()
    assert divergence == dict(fn="alpha_beta", **ABKD)


def stop(monkeypatch, phase):
    """Sends a signal to this process when a phase is more than half done."""
    learners = " and ".join(phase.learners)
    sent = []

    class Stopping(Progress):
        def __init__(self, label, total, *args, **options):
            super().__init__(label, total, *args, **options)
            is_it = label == learners and total == phase.num_steps
            self.stops_between = (total / 2, total) if is_it else (0, 0)

        def update(self, step, **shown):
            super().update(step, **shown)
            least, most = self.stops_between
            if least < step < most and not sent:
                sent.append(step)
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(recorder, "Progress", Stopping)
    return sent


def rows(folder):
    """What metrics.jsonl has, but for the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
        for line in lines
    ]


def count_of_tokens(config):
    """Of the test topics: of each all bytes but the first, and an end."""
    from pydoc_data.topics import topics

    order = np.random.default_rng(config.data_seed).permutation(len(topics))
    return sum(len(topics[sorted(topics)[i]].encode()) for i in order[:10])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,argument",
    [
        pytest.param(
            name, more, marks=[pytest.mark.nightly] * (name == "imagenet")
        )  # takes minutes
        for name, more in _ARGUMENTS
        if more or len(_MORE.get(name, ())) < 2  # method=bdkd is what there is without it
    ],
)
def test_runlocal_runs_stops_and_goes_on(tmp_path, monkeypatch, name, argument):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))  # it needs no files
    config = module(name).get_config(",".join(filter(None, ["runlocal", argument])))
    with config.unlocked():
        config.devices = 1
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_and_evaluate(config, whole)
    phases = configs.resolve(config).phases
    with monkeypatch.context() as patched:
        sent = stop(patched, phases[-1])
        with pytest.raises(SystemExit) as stopped:
            train_and_evaluate(config, parts)
    assert stopped.value.code == 128 + signal.SIGTERM and len(sent) == 1
    assert not (parts / "result.json").exists()
    assert rows(parts)[-1]["step"] <= sent[0] < config.num_steps
    train_and_evaluate(config, parts)
    assert (parts / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    folders = [whole / phase.folder for phase in phases]
    assert len(folders) == len(list(whole.rglob("metrics.jsonl")))
    for folder in folders:
        assert rows(parts / folder.relative_to(whole)) == rows(folder)
    result = json.loads((whole / "result.json").read_text())
    assert set(result["networks"]) == {name for phase in phases for name in phase.learners}
    steps = {name: phase.num_steps for phase in phases for name in phase.learners}
    for name, found in result["networks"].items():
        assert found["steps"] == steps[name]
        assert found["last"]["count"] == (
            count_of_tokens(config) if config.task.fn == "language" else 500
        )
