"""The commands of the experiments that users run on configs of their own, and what all avoid."""

import ast
import csv
import importlib
import itertools
import json
import pathlib
import signal
import subprocess
import sys

import pytest
from decoder_test import make
from instructions_test import write_tokenizer
from own_process import environment

from abkd_jax import models

_ROOT = pathlib.Path(__file__).parents[1]
_THE_CALLER = "abkd_jax/train/advance.py"
_OF_THE_BARE_STEP = ("benchmark_loop", "benchmark_losses", "accelerator/language")
_DIVERGENCE = "student.terms.distill.divergence"


def on_devices(count):
    found = environment()
    flags = f"{found['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return found | {"XLA_FLAGS": flags}


def run(*arguments, timeout=300, devices=1):
    command, kept = [sys.executable, "-m", *arguments], dict(capture_output=True, text=True)
    return subprocess.run(command, cwd=_ROOT, env=on_devices(devices), timeout=timeout, **kept)


@pytest.mark.slow
def test_the_table_of_differences_is_what_its_command_prints():
    done = run("experiments.differences")
    assert done.returncode == 0, done.stderr
    text = (_ROOT / "experiments" / "README.md").read_text()
    head, *printed = done.stdout.splitlines()
    assert head in text
    shown = text.split(head + "\n")[1].splitlines()[: len(printed)]
    read = lambda line: (line[:46].strip(), [*map(float, line[46:].split())])  # noqa: E731
    for mine, theirs in zip(map(read, printed[1:]), map(read, shown[1:]), strict=True):
        assert mine[0] == theirs[0] and mine[1] == pytest.approx(theirs[1], rel=1e-2)
    alphanet = [read(line)[1][2] for line in printed if line.startswith("AlphaNet in ABKD")]
    assert len(alphanet) == 4 and 1 < min(alphanet) < max(alphanet) < 2


@pytest.mark.slow
def test_the_table_of_estimators_is_what_its_command_prints(tmp_path):
    done = run("experiments.estimators", f"--out={tmp_path / 'figure.png'}")
    assert done.returncode == 0, done.stderr
    *printed, _ = done.stdout.splitlines()
    assert len(printed) == 30 and (tmp_path / "figure.png").exists()
    assert "\n".join(printed) in (_ROOT / "experiments" / "README.md").read_text()


@pytest.mark.slow
def test_processes_share_a_sweep_and_take_over_what_one_loses(tmp_path):
    """One of two is killed among its members; the other ends with the table of one alone."""
    over = f"--over={_DIVERGENCE}.alpha=0:1:0.5"
    command = "experiments.sweep", "--config=configs/digits.py:runlocal", over, "--init_seeds=2"
    for devices in (2, 4):
        where = f"--workdir={tmp_path / f'alone_{devices}'}"
        alone = run(*command, where, "--chunk=3", devices=devices)
        assert alone.returncode == 0, alone.stderr
    shared = tmp_path / "shared"
    command = sys.executable, "-m", *command, f"--workdir={shared}", "--processes=2"
    how = dict(cwd=_ROOT, env=on_devices(2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def started():
        process = subprocess.Popen(command, **how, text=True)
        line = next((x for x in process.stderr if x.startswith("students")), "")
        return process, line.partition(" step")[0]

    lost, first = started()
    lost.send_signal(signal.SIGSTOP)  # it keeps its lock
    other, second = started()
    lost.kill()
    _, told = other.communicate(timeout=300)
    lost.communicate()
    assert other.returncode == 0, told
    assert (first, second) == ("students 1 to 3 of 6", "students 4 to 6 of 6")
    assert first in told and "computed once" not in told
    for name in ("sweep.csv", "history.csv"):
        assert (shared / name).read_text() == (tmp_path / "alone_2" / name).read_text()
        tables = [list(csv.reader((x / name).open())) for x in (shared, tmp_path / "alone_4")]
        assert len(tables[0]) == len(tables[1]) > 6
        for a, b in zip(*map(itertools.chain.from_iterable, tables), strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-5, abs=1e-6)


@pytest.mark.nightly
def test_the_real_pair_goes_on_with_its_own_text_and_answers(tmp_path):
    module, variables = make(num_classes=257, width=8, layers=3, heads=2, mlp_width=8)
    models.save_decoder(tmp_path / "model", module, variables)
    write_tokenizer(tmp_path / "model")
    words = "one two three four five six seven eight nine ten eleven"
    pairs = [{"prompt": f"say {i}", "response": f"{words} {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    question = {"instruction": "say", "instances": [{"input": "it", "output": words}]}
    asked = [question, {"prompt": "x" * 257}, {"prompt": "y", "response": "z"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    files = [f"--pairs={tmp_path / 'pairs.jsonl'}", f"--questions={tmp_path / 'asked.jsonl'}"]
    files += [f"--folder={tmp_path / 'model'}"]
    sizes = ["--steps=4", "--rows=2", "--length=64", "--prompt=16", "--held_out=4", "--on_policy=4"]
    where = f"--workdir={tmp_path / 'pair'}", "--layers=0,2"
    done = run("experiments.real_pair", *where, *files, *sizes, timeout=1500)
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "pair" / "questions.jsonl").read_text().splitlines()
    assert json.loads(kept[0]) == {"prompt": "say\n\nit", "references": [words]}
    assert len(kept) == 2 and json.loads(kept[1]) == asked[2]
    table = done.stdout.rpartition("| network |")[2].splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    on = [f"{name}, on-policy" for name in ("forward_kl", "alpha_beta")]
    assert names == ["teacher", "labels", "forward_kl", "alpha_beta", *on]


@pytest.mark.nightly
def test_regimes(tmp_path):
    """Each source by each divergence, what was done is not done again, and the figure."""
    where = "--config=configs/text.py:runlocal", f"--workdir={tmp_path}", "--seeds=2"
    done = run("experiments.regimes", *where, timeout=3000)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table[2:]]
    sources, losses = (list(dict.fromkeys(x)) for x in zip(*cells, strict=True))
    assert cells == [(source, loss) for source in sources for loss in losses]
    assert sources == ["data", "SeqKD", "GKD", "DistiLLM"] and len(losses) == 4
    assert all(line.count(" +- ") == 4 for line in table[2:])
    again = run("experiments.regimes", *where, timeout=3000)
    assert again.stdout == done.stdout
    figure = run("experiments.regimes", *where, "--figure", f"--out={tmp_path / 'f.png'}")
    assert figure.returncode == 0, figure.stderr
    assert (tmp_path / "f.png").exists() and figure.stdout.count("Self-BLEU") == 4


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
        (["--over=a.b=1"], "over a.b: a sweep has no 'a' to sweep; it has student."),
        (["--overs=a"], "unknown flag --overs (did you mean 'over'?); the flags are --config, "),
    ],
)
def test_a_sweep_that_is_refused(arguments, sentence, tmp_path):
    if "--workdir=w" not in arguments:
        arguments += ["--config=configs/digits.py:runlocal", f"--workdir={tmp_path}"]
    done = run("experiments.sweep", *arguments)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(sentence)


@pytest.mark.slow
def test_the_benchmark_of_a_vocabulary():
    """All but the bare products and torch have less temporaries in chunks than at once."""
    sizes = ["--tokens=256", "--vocabulary=2000", "--rounds=2", "--chunk=16"]
    done = run("experiments.benchmark_vocabulary", *sizes)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "[" in line and "[torch]" not in line]
    names = [row[:31].strip() for row in rows]
    ours = ["forward_kl", "reverse_kl", "jensen_shannon", "alpha_beta"]
    assert names[:5] == ["bare products", *ours]
    assert names[5:] in ([], [f"torch, textbook {name}" for name in ours])
    for row in rows[1:5]:
        part, peak, before = row[75:].replace("(", "").replace(")", "").split()
        assert 0 < float(part) < 0.5 and float(peak) >= float(before) > 0


def uses(source, name):
    """How often a function is called or handed on, by its name or as an attribute of that name."""
    nodes = ast.walk(ast.parse(source))
    return sum(name in (getattr(node, "id", None), getattr(node, "attr", None)) for node in nodes)


def sources():
    """The text of every module of the library, every experiment, and every notebook's code."""
    for folder in ("abkd_jax", "experiments"):
        for path in (_ROOT / folder).rglob("*.py"):
            yield path.relative_to(_ROOT), path.read_text()
    for path in (_ROOT / "colabs").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        lines = "\n".join(code).splitlines()
        magic = ("%", 'if importlib.util.find_spec("abkd_jax")')  # the latter before an install
        yield (
            path.relative_to(_ROOT),
            "\n".join(x for x in lines if not x.lstrip().startswith(magic)),
        )


def test_the_only_caller_of_the_step_is_advance():
    found = {path: uses(source, "train_step") for path, source in sources()}
    assert {"abkd_jax", "experiments", "colabs"} == {path.parts[0] for path in found}
    callers = {f"{path}" for path, count in found.items() if count}
    allowed = {f"experiments/{name}.py" for name in _OF_THE_BARE_STEP}
    assert callers - allowed == {_THE_CALLER}


def test_what_is_imported_of_the_library_is_there():
    for path, source in sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("abkd_jax"):
                module = importlib.import_module(node.module)
                missing = {x.name for x in node.names if not hasattr(module, x.name)}
                folder = _ROOT / node.module.replace(".", "/")
                missing = {x for x in missing if not (folder / f"{x}.py").exists()}
                assert not missing, f"{path} imports {missing} of {node.module}"


@pytest.mark.parametrize(
    "source,count",
    [
        ("train_step(a, b)", 1),
        ("train.train_step(a)", 1),
        ("x = [abkd_jax.train.train_step(a)['b'] for a in c]", 1),
        ("jax.jit(train_step)", 1),
        ("from abkd_jax import train_step", 0),
        ("def train_step(a): ...", 0),
        ("retrain_step(a)", 0),
    ],
)
def test_what_counts_as_a_use(source, count):
    assert uses(source, "train_step") == count
