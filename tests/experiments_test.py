"""The commands of the experiments that users run on configs of their own."""

import csv
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_DIVERGENCE = "student.terms.distill.divergence"


def run(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_sweep_by_command(tmp_path):
    over = [f"--over={_DIVERGENCE}.alpha=0:1:0.5", f"--over={_DIVERGENCE}.beta=0.5,1"]
    where = ["--config=configs/digits.py:runlocal", f"--workdir={tmp_path}"]
    done = run("experiments.sweep", *where, *over, "--init_seeds=2")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    points = [tuple(float(r[f"{_DIVERGENCE}.{n}"]) for n in ("alpha", "beta")) for r in rows]
    assert points == [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.5, 1.0) for _ in range(2)]
    assert (tmp_path / "heat_map.png").exists() and "12 students in" in done.stdout
    again = run("experiments.sweep", *where, *over, "--init_seeds=2")
    assert again.stdout.split(" s;")[1] == done.stdout.split(" s;")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--workdir=w"], "--config is missing."),
        (["--over=a"], "--over must be PATH=START:END:STEP or PATH=A,B,C; found 'a'."),
        (["--over=a=1:0:1"], "--over must be PATH=START:END:STEP or PATH=A,B,C; found 'a=1:0:1'."),
        (["--over=a.b=1"], "over a.b: a sweep has no 'a'; it has student."),
        (["--overs=a"], "unknown flag --overs (did you mean 'over'?); the flags are --config, "),
    ],
)
def test_a_sweep_that_is_refused(arguments, sentence, tmp_path):
    if "--workdir=w" not in arguments:
        arguments += ["--config=configs/digits.py:runlocal", f"--workdir={tmp_path}"]
    done = run("experiments.sweep", *arguments)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(sentence)
