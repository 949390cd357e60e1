"""The ledger: that pages tell what was measured alone, and that its rows can be measured."""

import json
import shutil

import numpy as np
import pytest

from abkd_jax import train_and_evaluate
from experiments import ledger


def test_every_score_that_a_page_tells_is_a_row():
    assert ledger.check() == []


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of all that is checked."""
    root = ledger.ROOT
    shutil.copytree(root / "configs", tmp_path / "configs")
    shutil.copytree(root / "experiments" / "measured", tmp_path / "experiments" / "measured")
    for name in ("LEDGER.md", "README.md", "experiments/README.md"):
        shutil.copy(root / name, tmp_path / name)
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.setattr(ledger, "_MEASURED", tmp_path / "experiments" / "measured")
    assert ledger.check() == []
    return tmp_path


@pytest.mark.parametrize(
    "name,before,after",
    [
        ("README.md", "95.3 +- 0.6 % distilled", "95.9 +- 0.6 % distilled"),
        ("experiments/README.md", "95.3 +- 0.6  0.157", "95.4 +- 0.6  0.157"),
        ("experiments/README.md", "| 1.9449 +- 0.0195 |", "| 1.9448 +- 0.0195 |"),
        ("experiments/README.md", "dist               96.6", "dist               97.6"),
        ("README.md", "| `fashion_mnist/omitted` |", "| |"),
        ("configs/digits.py", "Number: 95.3", "Number: 98.3"),
        ("configs/fashion_mnist.py", "78.0 +- 0.3 %", "74.0 +- 0.3 %"),
    ],
)
def test_a_score_that_nobody_measured_is_found(copied, name, before, after):
    text = (copied / name).read_text()
    if before not in text:
        pytest.fail(f"{name} has no {before!r} to alter")
    (copied / name).write_text(text.replace(before, after, 1))
    (problem,) = ledger.check()
    assert problem.startswith(f"{name} tells what is in no row: ")
    told = " ".join(after.split()).removeprefix("Number: ")
    assert told in " ".join(problem.split())


def test_a_row_that_is_not_in_ledger_md_is_found(copied):
    path = copied / "experiments" / "measured" / "more.json"
    path.write_text(json.dumps(dict(command="python x.py", seeds="-", commit="abc", printed=[])))
    assert ledger.check() == ["LEDGER.md is not up to date."]


def test_every_pair_has_its_published_rows():
    rows = {row.name: row for row in ledger.rows()}
    row = rows["cifar100/vgg13-mobilenet_v2/dkd"]
    assert row.published["student"] == (69.71, "megvii-research/mdistiller: README.md")
    assert row.command == (
        "python -m abkd_jax.main --config=configs/cifar100.py:pair=vgg13-mobilenet_v2,method=dkd "
        "--workdir=runs/ledger/cifar100/vgg13-mobilenet_v2/dkd"
    )
    assert sum(name.startswith("cifar100/") for name in rows) == 13 * 7
    assert [*rows["cifar100/vgg13-vgg8/abkd"].published] == ["teacher"]


@pytest.mark.parametrize(
    "best,published,verdict",
    [
        (None, (70.66, "x"), "-"),
        ([70.66], None, "-"),
        ([70.16], (70.66, "x"), "short by 0.50"),
        ([71.0], (70.66, "x"), "above by 0.34"),
        ([70.4, 70.8], (70.66, "x"), "within our spread"),
        ([70.0, 70.1, 70.2], (70.66, "x"), "short by 0.56"),
    ],
)
def test_verdicts(best, published, verdict):
    best = None if best is None else np.asarray(best)
    assert ledger._verdict(best, published) == verdict


def test_a_row_of_another_command_is_measured(copied):
    row = ledger.Row("new/row", "python -c 'print(\"accuracy % 12.34\")'", {}, None)
    ledger.measure(row)
    found = json.loads((copied / "experiments" / "measured" / "new" / "row.json").read_text())
    assert found["printed"] == ["accuracy % 12.34"] and found["command"] == row.command
    with pytest.raises(SystemExit, match="ended with 3; the same --row goes on with it"):
        ledger.measure(row._replace(command="python -c 'import sys; sys.exit(3)'"))


@pytest.mark.long
def test_what_a_row_says_of_a_run(tmp_path, copied):
    import runpy

    config = runpy.run_path(str(ledger.ROOT / "configs" / "digits.py"))["get_config"]("runlocal")
    with config.unlocked():
        config.init_seeds = 2
    result = train_and_evaluate(config, tmp_path / "run")["networks"]
    found = ledger._of_run(tmp_path / "run")
    scores = [seed["last"]["accuracy"] for seed in result["student"]["seeds"]]
    assert found["networks"]["student"]["last"] == scores and len(scores) == 2
    assert found["score"] == "accuracy" and len(found["data"]) == 12
    about = dict(
        commit="abc", device="cpu", command="python -m abkd_jax.main --config=x --workdir=y"
    )
    row = ledger.Row("digits", about["command"], {"student": (50.0, "x")}, found | about)
    (line,) = [line for line in ledger._lines(row, ["x"]) if line[2] == "student"]
    assert line[4] == f"{100 * np.mean(scores):.2f} +- {100 * np.std(scores, ddof=1):.2f}"
    assert line[5] == "50.00 [1]" and line[-1] == found["data"]
    assert (
        line[7] == f"{20 * config.batch_size / 1000:.0f}"
        and found["seeds"] == "data 0, init 0 to 1"
    )
