"""The ledger: that pages tell what was measured alone, and that its rows can be measured."""

import importlib.util
import json
import pathlib
import shlex
import shutil

import numpy as np
import pytest

from abkd_jax import train_and_evaluate

_PATH = pathlib.Path(__file__).parents[1] / "experiments" / "ledger.py"
_SPEC = importlib.util.spec_from_file_location("ledger", _PATH)
ledger = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(ledger)


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
        ("README.md", "| `fashion_mnist/omitted` |", "| 99% |"),
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


def test_a_block_of_what_is_no_code_is_looked_at(copied):
    with (copied / "README.md").open("a") as page:
        page.write("\n```text\nacc. 99.9\nacc. 9999%\n```\n\n```python\naccuracy = 99.9\n```\n")
    told = "README.md tells what is in no row: acc. "
    assert ledger.check() == [f"{told}99.9", f"{told}9999%"]


def test_a_number_of_another_command_is_found(copied):
    path = copied / "experiments" / "measured" / "cifar100_short_transfer.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"command": "python -m abkd_jax.main --config=other.py"}))
    (problem,) = ledger.check()
    assert problem.startswith("cifar100_short_transfer was measured by another command: python -m")


def test_a_command_with_files_of_one_s_own_is_not_run(copied):
    row = ledger.Row("x", "python -m experiments.real_pair --folder=DIR --pairs=FILE", {}, None)
    with pytest.raises(SystemExit, match="is for a DIR of your own; run it by hand"):
        ledger.measure(row)


def test_every_pair_has_its_published_rows():
    rows = {row.name: row for row in ledger.rows()}
    row = rows["cifar100/vgg13-mobilenet_v2/dkd"]
    assert row.published == {"student": (69.71, "megvii-research/mdistiller: README.md", "best")}
    teacher = "runs/ledger/cifar100/vgg13-vgg8/kd/teacher"
    config = f"configs/cifar100.py:pair=vgg13-mobilenet_v2,method=dkd,teacher='{teacher}'"
    assert shlex.split(row.command)[3] == f"--config={config}"
    trains = [row.name for row in rows.values() if "teacher" in row.published]
    assert [name for name in trains if "/vgg13" in name] == ["cifar100/vgg13-vgg8/kd"]
    assert rows["cifar100/vgg13-vgg8/kd"].published["teacher"][::2] == (74.64, "last")
    assert sum(name.startswith("cifar100/") for name in rows) == 13 * 7
    assert not rows["cifar100/vgg13-vgg8/abkd"].published


@pytest.mark.parametrize(
    "last,best,published,verdict",
    [
        ([70.66], [71.0], None, "-"),
        ([70.16], [71.0], (70.66, "x", "last"), "short by 0.50"),
        ([70.66], [71.0], (70.66, "x", "last"), "equal"),
        ([70.67], [71.0], (70.66, "x", "last"), "above by 0.01"),
        ([70.16], [71.0], (70.66, "x", "best"), "above by 0.34"),
        ([70.16], None, (70.66, "x", "best"), "short by 0.50"),
        ([70.4, 70.8], [72.0, 72.1], (70.66, "x", "last"), "within our spread"),
        ([70.0, 70.1, 70.2], [70.6, 70.7, 70.8], (70.66, "x", "best"), "within our spread"),
        ([70.0, 70.1, 70.2], [70.6, 70.7, 70.8], (70.66, "x", "last"), "short by 0.56"),
    ],
)
def test_verdicts(last, best, published, verdict):
    scores = {"last": np.asarray(last), "best": None if best is None else np.asarray(best)}
    assert ledger.verdict(scores, published) == verdict


@pytest.mark.parametrize("seconds,took", [(26, "26 s"), (60, "1 min"), (5400, "90 min")])
def test_the_time_of_a_row(seconds, took):
    measured = json.loads((ledger.ROOT / "experiments" / "measured" / "digits.json").read_text())
    row = ledger.Row("digits", "python -m x --config=y", {}, measured | {"seconds": seconds})
    assert [line[-3] for line in ledger.lines(row, [])] == [took] * 3


def test_a_row_of_another_command_is_measured(copied):
    row = ledger.Row("new/row", "python -c 'print(\"accuracy % 12.34\")'", {}, None)
    ledger.measure(row)
    found = json.loads((copied / "experiments" / "measured" / "new" / "row.json").read_text())
    assert found["printed"] == ["accuracy % 12.34"] and found["command"] == row.command
    assert "| new/row |" in ledger.page()
    (copied / "LEDGER.md").write_text(ledger.page())
    with (copied / "README.md").open("a") as page:
        page.write("\n| | accuracy |\n|---|---|\n| `new/row` | 12.3 |\n")
    assert ledger.check() == []
    with pytest.raises(SystemExit, match="ended with 3; the same --row goes on with it"):
        ledger.measure(row._replace(command="python -c 'import sys; sys.exit(3)'"))


@pytest.mark.long
def test_what_a_row_says_of_a_run(tmp_path, copied):
    import runpy

    config = runpy.run_path(str(ledger.ROOT / "configs" / "digits.py"))["get_config"]("runlocal")
    with config.unlocked():
        config.init_seeds = 2
    result = train_and_evaluate(config, tmp_path / "run")["networks"]
    found = ledger.of_run(tmp_path / "run")
    scores = [seed["last"]["accuracy"] for seed in result["student"]["seeds"]]
    assert found["networks"]["student"]["last"] == scores and len(scores) == 2
    assert found["score"] == "accuracy" and len(found["data"]) == 12
    assert found["seeds"] == "data 0, init 0 to 1"
    command, published = "python -m abkd_jax.main --config=x --workdir=y", (50.0, "x", "last")
    row = ledger.Row("digits", command, {"student": published}, found)
    told = {line[2]: line for line in ledger.lines(row, ["x"])}
    deviation = 100 * np.std(scores, ddof=1)
    assert told["student"][4] == f"{100 * np.mean(scores):.2f} +- {deviation:.2f}"
    assert told["student"][5] == "50.00, last [1]" and told["student"][-1] == found["data"]
    epochs = {name: found["networks"][name]["epochs"] for name in told}
    images, batch = {"teacher": 1000, "student": 1000, "baseline": 100}, config.batch_size
    batch = {name: min(batch, count) for name, count in images.items()}
    assert epochs == {name: 20 * batch[name] / images[name] for name in told}
