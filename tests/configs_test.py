"""Every config runs, is stopped, goes on to the same result, and can be overridden everywhere."""

import importlib.util
import json
import pathlib
import signal

import pytest

from abkd_jax import schema
from abkd_jax.train.loop import train_and_evaluate
from abkd_jax.train.progress import Progress

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
_QUICK = [("digits", "")]  # the rest is compiled for long


def module(name):
    spec = importlib.util.spec_from_file_location(f"config_of_{name}", _CONFIGS[name])
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_there_are_configs():
    assert "digits" in _CONFIGS and set(_MORE) <= set(_CONFIGS)


@pytest.mark.parametrize("name,argument", _ARGUMENTS)
def test_the_full_config_is_one(name, argument):
    config = module(name).get_config(argument)
    schema.check(config.to_dict())
    assert config.is_locked
    missing = set(schema.DEFAULTS) - set(config)
    assert not missing  # for the command line overrides only what is there


@pytest.mark.parametrize("name", _CONFIGS)
def test_the_docstring_has_the_command(name):
    text = module(name).__doc__
    assert text.splitlines()[0].endswith(".") and "\nPaper" in text
    (command,) = [line for line in text.splitlines() if line.startswith("Command: ")]
    assert f"python -m abkd_jax.main --config=configs/{name}.py" in command
    assert "--workdir=" in command


def stop(monkeypatch, label):
    """Sends a signal to this process when the phase of that label is more than half done."""
    update, sent = Progress.update, []

    def updated(self, step, **shown):
        update(self, step, **shown)
        if self._label == label and self._total / 2 < step < self._total and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "update", updated)
    return sent


def rows(folder):
    """What metrics.jsonl has, but for the times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
        for line in lines
    ]


@pytest.mark.parametrize(
    "name,argument",
    [
        pytest.param(name, more, marks=[] if (name, more) in _QUICK else [pytest.mark.slow])
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
    last = schema.phases(config.to_dict())[-1]
    with monkeypatch.context() as patched:
        sent = stop(patched, " and ".join(last.learners))
        with pytest.raises(SystemExit) as stopped:
            train_and_evaluate(config, parts)
    assert stopped.value.code == 0 and len(sent) == 1
    assert not (parts / "result.json").exists()
    assert rows(parts)[-1]["step"] <= sent[0] < config.num_steps
    train_and_evaluate(config, parts)
    assert (parts / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    folders = [whole / phase.name for phase in schema.phases(config.to_dict())]
    assert len(folders) == len(list(whole.rglob("metrics.jsonl")))
    for folder in folders:
        assert rows(parts / folder.relative_to(whole)) == rows(folder)
    result = json.loads((whole / "result.json").read_text())
    assert set(result["networks"]) == set(schema.networks(config.to_dict()))
    for found in result["networks"].values():
        assert found["steps"] == config.num_steps and found["last"]["count"] == 500
