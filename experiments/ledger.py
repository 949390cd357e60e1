"""The ledger: every score that the pages tell, with its command, and those still to be measured.

    python -m experiments.ledger               # writes LEDGER.md out of the rows
    python -m experiments.ledger --row=NAME    # measures one, in runs/ledger/NAME, or goes on
    python -m experiments.ledger --check       # that LEDGER.md is up to date, and that no table
                                               # of a page has a score that is in no row

A row is a run of a config or the table that another command prints; what was measured of it stands
in experiments/measured/NAME.json.
"""

import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from abkd_jax import data as datasets
from abkd_jax import markdown
from abkd_jax.config import command, resolve
from abkd_jax.run.log import writer
from abkd_jax.train.checkpoint import digest

_ROW = flags.DEFINE_string("row", None, "The row to measure.")
_CHECK = flags.DEFINE_bool("check", False, "Check, and write nothing.")
ROOT = pathlib.Path(__file__).parents[1]
_PAGES = ("README.md", "experiments/README.md")
_MAIN = "python -m abkd_jax.main"
_RUNS = {  # the configs that are measured as they are
    "cifar100_short": "configs/cifar100_short.py",
    "cifar100_short_transfer": (
        "configs/cifar100_short.py:transfer,teacher='runs/ledger/cifar100_short/teacher'"
    ),
    "cifar100_lt": "configs/cifar100_lt.py",
    "digits": "configs/digits.py",
    "text": "configs/text.py",
}
_IMAGENET = {  # the teachers' accuracy, in %
    "resnet34-resnet18": 73.31,
    "resnet50-mobilenet_v1": 76.16,
}
_OF_SCORES = re.compile(
    r"accuracy|\bacc\b|NLL|\bECE\b|agreement %|next token|error %|top-1|perplexity|FGSM|rouge",
    re.IGNORECASE,
)
_OF_HEADER = r"\n(?:Time and n|N)umber: (.*?)(?:\n[A-Z]\w+:|\n\n|\"\"\")"  # of a config
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE = ("sh", "bash", "python", "json")  # what a block is that is no table
# No version, and of integers those that stand before a spread or per cent.
_NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?!\.?\d)|(?<![\w.])\d+(?= ?(?:\+-|%))")
_PLACEHOLDER = re.compile(r"=(DIR|FILE)\b")


class Row(NamedTuple):
    """What is, or is to be, measured.

    Attributes:
        name: also that of its file.
        command: in full.
        published: {network: (score, where it stands, "last" or "best")}.
        measured: what its file says; None without one.
    """

    name: str
    command: str
    published: Mapping[str, tuple[float, str, str]]
    measured: Mapping[str, Any] | None


def main() -> None:
    """Measures, checks or writes."""
    if _ROW.value:
        found = {row.name: row for row in rows()}
        if _ROW.value not in found:
            sys.exit(f"--row must be one of {', '.join(found)}; found {_ROW.value!r}.")
        measure(found[_ROW.value])
    if _CHECK.value:
        problems = check()
        print("\n".join(problems) or "Every score of a table is a row.")
        sys.exit(bool(problems))
    (ROOT / "LEDGER.md").write_text(page())


def rows() -> list[Row]:
    """All of them."""
    runs = _of_pairs() | {name: (config, {}) for name, config in _RUNS.items()}
    for pair, accuracy in _IMAGENET.items():
        published = {"teacher": (accuracy, "zkxufo/TTM: README.md", "last")}
        runs[f"imagenet/{pair}"] = f"configs/imagenet.py:pair={pair}", published
    found = []
    for name, (config, published) in runs.items():
        ran = f"{_MAIN} {shlex.quote(f'--config={config}')} --workdir=runs/ledger/{name}"
        found.append(Row(name, ran, published, _read(name)))
    folder = ROOT / "experiments" / "measured"
    for path in sorted(folder.rglob("*.json")):  # of the tables of other commands
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in runs:
            measured = _read(name)
            found.append(Row(name, measured["command"], {}, measured))
    return found


def _of_pairs() -> dict[str, tuple[str, dict[str, tuple[float, str, str]]]]:
    """{row: (config, published)} of the benchmark; the first row of a teacher trains it."""
    pairs = runpy.run_path(str(ROOT / "configs" / "pairs.py"))
    runs, teachers = {}, {}
    for name, pair in pairs["get_pairs"]().items():
        for method in (*pairs["METHODS"], "abkd"):
            row, published = f"cifar100/{name}/{method}", {}
            config = f"configs/cifar100.py:pair={name},method={method}"
            if pair.teacher in teachers:
                config += f",teacher='{teachers[pair.teacher]}'"
            else:
                teachers[pair.teacher] = f"runs/ledger/{row}/teacher"
                published["teacher"] = pairs["ALONE"][pair.teacher], *pairs["SOURCES"]["alone"]
            if method in pair.scores:
                published["student"] = pair.scores[method], *pairs["SOURCES"][method]
            runs[row] = config, published
    return runs


def _read(name: str) -> dict[str, Any] | None:
    path = _file_of(name)
    return json.loads(path.read_text()) if path.exists() else None


def _file_of(name: str) -> pathlib.Path:
    return ROOT / "experiments" / "measured" / f"{name}.json"


def measure(row: Row) -> None:
    """Runs the command of a row, and keeps what it found."""
    if given := _PLACEHOLDER.search(row.command):
        sys.exit(f"{row.command} is for a {given[1]} of your own; run it by hand.")
    start, argv = time.perf_counter(), shlex.split(row.command)
    done = subprocess.run([sys.executable, *argv[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode:
        sys.exit(f"{row.command} ended with {done.returncode}; the same --row goes on with it.")
    if row.command.startswith(_MAIN):
        found = of_run(ROOT / "runs" / "ledger" / row.name)
    else:
        commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores; jax {jax.__version__}"
        found = {
            "seeds": (row.measured or {}).get("seeds", "-"),
            "seconds": round(time.perf_counter() - start),
            "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
            "device": device,
            "printed": done.stdout.rstrip().splitlines(),
        }
    path = _file_of(row.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": row.command} | found, indent=1) + "\n")


def of_run(workdir: pathlib.Path) -> dict[str, Any]:
    """What the files of a run say of it."""
    result = json.loads((workdir / "result.json").read_text())
    about, score = json.loads((workdir / "config.json").read_text()), result["score"]
    data, logs = resolve(about["config"]).data(), workdir.rglob("metrics.jsonl")
    logs = [row for path in logs for row in writer.read(path.parent)]
    seed, count = (about["config"][key] for key in ("init_seed", "init_seeds"))
    return {
        "score": score,
        "selected_on": result["selected_on"],
        "seeds": f"data {about['config']['data_seed']}, init {seed}"
        + (f" to {seed + count - 1}" if count > 1 else ""),
        "seconds": round(sum(row.get("time/seconds") or 0 for row in logs)),
        "commit": about["commit"],
        "device": f"{about['device']}, {os.cpu_count()} cores; jax {about['versions']['jax']}",
        "data": digest(data)[:12],
        "networks": {
            name: _of_network(network, score)
            | {"epochs": _epochs(name, network, result, about, data)}
            for name, network in result["networks"].items()
        },
    }


def _of_network(network: Mapping[str, Any], score: str) -> dict[str, Any]:
    """The scores of each of its seeds."""
    seeds = network.get("seeds", [network])
    return {
        "last": [seed["last"][score] for seed in seeds],
        "best": [seed["best"]["scores"][score] for seed in seeds if seed["best"]] or None,
        "nll": [seed["last"].get("nll") for seed in seeds],
        "steps": network["steps"],
        "parameters": network["parameters"],
    }


def _epochs(
    name: str, network: Any, result: Any, about: Any, data: datasets.DataSet
) -> float | None:
    """Over the examples of the phase in which a network learned last; None if it did not learn."""
    splits = [phase["split"] for phase in result["phases"] if name in phase["learn"]]
    if not splits:
        return None
    split = data.full if splits[-1] == "full" else data.train
    split = split.labelled_alone() if splits[-1] == "labelled" else split
    return network["steps"] * min(about["config"]["batch_size"], len(split)) / len(split)


def page() -> str:
    """LEDGER.md."""
    found = rows()
    sources = sorted({source for row in found for _, source, _ in row.published.values()})
    ran = [row for row in found if row.command.startswith(_MAIN)]
    tables = [
        [row.name, f"`{row.command}`", *(f"{row.measured[key]}" for key in ("seeds", "commit"))]
        for row in found
        if row not in ran
    ]
    header = ["row", "config", "network", "best", "last", "published", "verdict", "epochs"]
    header += ["seeds", "device", "time", "commit", "data"]
    numbered = [f"{number} {source}" for number, source in enumerate(sources, start=1)]
    return "\n\n".join(
        [
            "# Ledger",
            "Written by `python -m experiments.ledger`; `--row=NAME` measures a row. Accuracies in "
            "%, log-likelihoods in nats; several seeds as mean +- sample deviation. *best* is the "
            "test score at the step whose score on the data that select is the highest, the mean "
            "over networks that learn together; for CIFAR-100's published protocol the test set "
            "selects. The verdict compares the published number with that of the "
            "two which it is, as it says: within our spread of seeds (no source tells its own), or "
            "above it or short of it by how much. *page of*: measured before the ledger was, and "
            "taken from the page as it was at that commit.",
            "## Runs of configs",
            markdown.table(header, [line for row in ran for line in lines(row, sources)]),
            f"Published, by the numbers in brackets: {'; '.join(numbered)}.",
            "## Tables of other commands",
            "What they printed stands in experiments/measured; the pages repeat it.",
            markdown.table(["row", "command", "seeds", "commit"], tables),
            "",
        ]
    )


def lines(row: Row, sources: list[str]) -> Iterator[list[str]]:
    """The lines of a run in the table, one for each network."""
    config = f"`{shlex.split(row.command)[3].removeprefix('--config=')}`"
    found = row.measured or {"networks": {}}
    for name in found["networks"] or ["student"]:
        given, about, published = row.published.get(name), [row.name, config, name], "-"
        if given is not None:
            score, source, which = given
            published = f"{score:.2f}, {which} [{1 + sources.index(source)}]"
        if not row.measured:
            yield [*about, "-", "-", published, "not measured", *["-"] * 6]
            continue
        network = found["networks"][name]
        factor = 100 if found["score"] == "accuracy" else 1
        scores = {
            key: None if network[key] is None else np.asarray(network[key], float) * factor
            for key in ("best", "last")
        }
        texts = [_text(scores[key], factor) for key in scores]
        epochs = "-" if network["epochs"] is None else f"{network['epochs']:.0f}"
        seconds = found["seconds"]
        took = f"{seconds:.0f} s" if seconds < 60 else f"{seconds / 60:.0f} min"
        how = [epochs, found["seeds"], found["device"], took]
        how += [found["commit"], found["data"]]
        yield [*about, *texts, published, verdict(scores, given), *how]


def _text(scores: np.ndarray | None, factor: int) -> str:
    if scores is None:
        return "-"
    digits = 2 if factor == 100 else 4
    spread = f" +- {np.std(scores, ddof=1):.{digits}f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.{digits}f}{spread}"


def verdict(
    scores: Mapping[str, np.ndarray | None], published: tuple[float, str, str] | None
) -> str:
    """How the scores of seeds, "last" and "best", compare with the published one."""
    if published is None:
        return "-"
    score, _, which = published
    found = scores["last"] if scores[which] is None else scores[which]
    gap = np.mean(found) - score
    if len(found) > 1 and abs(gap) <= np.std(found, ddof=1):
        return "within our spread"
    if abs(gap) < 0.005:
        return "equal"
    return f"{'above' if gap > 0 else 'short'} by {abs(gap):.2f}"


def check() -> list[str]:
    """What is wrong: a sentence each."""
    found = [] if (ROOT / "LEDGER.md").read_text() == page() else ["LEDGER.md is not up to date."]
    measured = {row.name: row for row in rows() if row.measured}
    for row in measured.values():
        if row.measured["command"] != row.command:
            found.append(f"{row.name} was measured by another command: {row.measured['command']}")
    printed = [line for row in measured.values() for line in row.measured.get("printed", ())]
    printed = {_plain(line) for line in printed}
    for name in _PAGES:
        for line in _lines_of_tables((ROOT / name).read_text()):
            if _plain(line) not in printed and not _known(line, _named(line, measured)):
                found.append(f"{name} tells what is in no row: {line.strip()}")
    for path in sorted((ROOT / "configs").glob("*.py")):
        of_config = [row for row in measured.values() if f"configs/{path.name}" in row.command]
        text = re.search(_OF_HEADER, path.read_text(), re.DOTALL)
        if text and not _known(text[1], _named(text[1], measured) or of_config):
            found.append(f"configs/{path.name} tells what is in no row: {_plain(text[1])}")
    return found


def _lines_of_tables(text: str) -> Iterator[str]:
    """The lines with numbers of the tables that tell scores: blocks of code, and Markdown's."""
    blocks = [printed for kind, printed in _FENCED.findall(text) if kind not in _CODE]
    blocks += [match[0] for match in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    for block in blocks:
        if _OF_SCORES.search(block):
            yield from (line for line in block.splitlines() if _NUMBER.search(line))


def _named(line: str, measured: Mapping[str, Row]) -> list[Row]:
    """The rows whose names a line has in backticks."""
    return [measured[name] for name in re.findall(r"`([\w/.-]+)`", line) if name in measured]


def _known(line: str, measured: list[Row]) -> bool:
    """Whether each number of a line is, rounded, one of some rows, whichever of its columns."""
    numbers = np.asarray([x for row in measured for x in _numbers(row.measured)])
    for text in _NUMBER.findall(line):
        digits = len(text.partition(".")[2])
        if not np.any(np.abs(numbers - float(text)) <= 0.5000001 * 10.0**-digits):
            return False
    return True


def _numbers(measured: Mapping[str, Any]) -> Iterator[float]:
    """All numbers of a row: those printed, or a run's scores as they are told, and their spread."""
    for line in measured.get("printed", ()):
        yield from map(float, _NUMBER.findall(line))
    factor = 100 if measured.get("score") == "accuracy" else 1
    for network in measured.get("networks", {}).values():
        for key, of_key in (("last", factor), ("best", factor), ("nll", 1)):
            scores = [of_key * x for x in network[key] or [] if x is not None]
            yield from scores
            yield from [np.mean(scores)] if scores else []
            yield from [np.std(scores, ddof=1)] if len(scores) > 1 else []


def _plain(line: str) -> str:
    return " ".join(line.split())


if __name__ == "__main__":
    command.run(main)
