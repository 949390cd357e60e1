"""Every config runs, is stopped, goes on to the same result, and can be overridden everywhere."""

import importlib.util
import json
import pathlib
import signal

import ml_collections
import numpy as np
import pytest

from abkd_jax import config as configs
from abkd_jax import data
from abkd_jax.config.schema import DEFAULTS
from abkd_jax.run import recorder
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.loop import train_and_evaluate

_CONFIGS = {
    path.stem: path
    for path in sorted(pathlib.Path(__file__).parents[1].glob("configs/*.py"))
    if path.stem != "methods"  # terms for the others
}
# What else the arguments of single configs can be; all of them are also run without it.
_MORE = {
    "fashion_mnist": ["omit=5"],
    "online_fashion_mnist": ["method=bdkd", "method=dml", "method=independent"],
}
_ARGUMENTS = [(name, more) for name in _CONFIGS for more in ("", *_MORE.get(name, ()))]


def module(name):
    spec = importlib.util.spec_from_file_location(f"config_of_{name}", _CONFIGS[name])
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_there_are_configs():
    assert "digits" in _CONFIGS and set(_MORE) <= set(_CONFIGS)


def stand_in(group):
    """A set like that of a config, or None where the config's own is embedded."""
    like = {"fashion_mnist": ((28, 28, 1), 10), "cifar100": ((32, 32, 3), 100)}
    if group.fn == "digits":
        return None
    shape, num_classes = like[group.name]
    examples = np.zeros((100, *shape), np.uint8), np.arange(100) % num_classes
    return data.from_arrays(train=examples, validation=None, test=examples, num_classes=num_classes)


@pytest.mark.parametrize("name,argument", _ARGUMENTS)
def test_the_full_config_is_one(name, argument):
    config = module(name).get_config(argument)
    plan = configs.resolve(config, data=stand_in(config.data))
    assert config.is_locked
    missing = set(DEFAULTS) - set(config)
    assert not missing  # for the command line overrides only what is there
    assert {phase.num_steps for phase in plan.phases} == {config.num_steps}
    assert set(plan.networks) == {name for phase in plan.phases for name in phase.learners}


@pytest.mark.parametrize("runlocal", ["", "runlocal"])
@pytest.mark.parametrize("name,argument", _ARGUMENTS)
def test_a_config_gives_what_differs_from_the_defaults(monkeypatch, name, argument, runlocal):
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


def stop(monkeypatch, learners):
    """Sends a signal to this process when the phase of these learners is more than half done."""
    sent = []

    class Stopping(Progress):
        def __init__(self, label, total, *args, **options):
            super().__init__(label, total, *args, **options)
            self.stops_between = (total / 2, total) if label == learners else (0, 0)

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,argument",
    [
        (name, more)
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
        sent = stop(patched, " and ".join(phases[-1].learners))
        with pytest.raises(SystemExit) as stopped:
            train_and_evaluate(config, parts)
    assert stopped.value.code == 0 and len(sent) == 1
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
    for found in result["networks"].values():
        assert found["steps"] == config.num_steps and found["last"]["count"] == 500
