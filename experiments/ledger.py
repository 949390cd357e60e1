"""The ledger: every score that the pages tell, with its command, and those still to be measured.

    python -m experiments.ledger               # writes LEDGER.md out of the rows
    python -m experiments.ledger --row=NAME    # measures one, in runs/ledger/NAME, or goes on
    python -m experiments.ledger --check       # that LEDGER.md is up to date, and that no page
                                               # tells a score that is in no row

A row is a run of a config or the table that another command prints; what was measured of it stands
in experiments/measured/NAME.json.
"""

import json
import pathlib
import platform
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

from abkd_jax import markdown
from abkd_jax.config import command, resolve
from abkd_jax.run.log import writer
from abkd_jax.train.checkpoint import digest

_ROW = flags.DEFINE_string("row", None, "The row to measure.")
_CHECK = flags.DEFINE_bool("check", False, "Check, and write nothing.")
ROOT = pathlib.Path(__file__).parents[1]
_MEASURED = ROOT / "experiments" / "measured"
_PAGES = ("README.md", "experiments/README.md")
_MAIN = "python -m abkd_jax.main"
_RUNS = {  # the configs that are measured as they are; {} stands for the folder of the rows' runs
    "cifar100_short": "configs/cifar100_short.py",
    "cifar100_short/transfer": (
        "configs/cifar100_short.py:transfer,teacher='{}/cifar100_short/teacher'"
    ),
    "cifar100_lt": "configs/cifar100_lt.py",
    "digits": "configs/digits.py",
    "imagenet/resnet34-resnet18": "configs/imagenet.py:pair=resnet34-resnet18",
    "imagenet/resnet50-mobilenet_v1": "configs/imagenet.py:pair=resnet50-mobilenet_v1",
    "text": "configs/text.py",
}
_OF_SCORES = re.compile(r"accuracy|NLL|\bECE\b|agreement %|next token", re.IGNORECASE)
_OF_HEADER = r"\nNumber: (.*?)(?:\n[A-Z]\w+:|\n\n|\"\"\")"  # of a config
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?!\.?\d)")  # and no version


class Row(NamedTuple):
    """What is, or is to be, measured.

    Attributes:
        name: also that of its file.
        command: in full.
        published: {network: (score, where it stands)}.
        measured: what its file says; None without one.
    """

    name: str
    command: str
    published: Mapping[str, tuple[float, str]]
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
        print("\n".join(problems) or "Every score is a row.")
        sys.exit(bool(problems))
    (ROOT / "LEDGER.md").write_text(page())


def rows() -> list[Row]:
    """All of them."""
    pairs = runpy.run_path(str(ROOT / "configs" / "pairs.py"))
    runs = {}
    for name, pair in pairs["get_pairs"]().items():
        alone = pairs["ALONE"][pair.teacher], pairs["SOURCES"]["alone"]
        for method in (*pairs["METHODS"], "abkd"):
            published = {"teacher": alone}
            if method in pair.scores:
                published["student"] = pair.scores[method], pairs["SOURCES"][method]
            config = f"configs/cifar100.py:pair={name},method={method}"
            runs[f"cifar100/{name}/{method}"] = config, published
    runs |= {name: (config, {}) for name, config in _RUNS.items()}
    found = []
    for name, (config, published) in runs.items():
        argument = shlex.quote(f"--config={config.format('runs/ledger')}")
        ran = f"{_MAIN} {argument} --workdir=runs/ledger/{name}"
        found.append(Row(name, ran, published, _read(name)))
    for path in sorted(_MEASURED.rglob("*.json")):  # of the tables of other commands
        name = path.relative_to(_MEASURED).with_suffix("").as_posix()
        if name not in runs:
            found.append(Row(name, _read(name)["command"], {}, _read(name)))
    return found


def _read(name: str) -> dict[str, Any] | None:
    path = _MEASURED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def measure(row: Row) -> None:
    """Runs the command of a row, and keeps what it found."""
    start, argv = time.perf_counter(), shlex.split(row.command)
    done = subprocess.run([sys.executable, *argv[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode:
        sys.exit(f"{row.command} ended with {done.returncode}; the same --row goes on with it.")
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = {
        "command": row.command,
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "device": f"{platform.machine()}, {jax.default_backend()}; jax {jax.__version__}",
        "seconds": round(time.perf_counter() - start),
    }
    if row.command.startswith(_MAIN):
        found |= _of_run(ROOT / "runs" / "ledger" / row.name)
    else:
        found["printed"] = done.stdout.rstrip().splitlines()
    path = _MEASURED / f"{row.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def _of_run(workdir: pathlib.Path) -> dict[str, Any]:
    """What the files of a run say of it."""
    result = json.loads((workdir / "result.json").read_text())
    about, score = json.loads((workdir / "config.json").read_text()), result["score"]
    data = resolve(about["config"]).data()
    logs = [writer.read(path.parent) for path in workdir.rglob("metrics.jsonl")]
    networks = {}
    for name, network in result["networks"].items():
        seeds = network.get("seeds", [network])
        best = [seed["best"]["scores"][score] for seed in seeds if seed["best"]]
        networks[name] = {
            "last": [seed["last"][score] for seed in seeds],
            "best": best or None,
            "nll": [seed["last"].get("nll") for seed in seeds],
            "steps": network["steps"],
            "epochs": network["steps"] * about["config"]["batch_size"] / len(data.full),
            "parameters": network["parameters"],
        }
    seed, count = (about["config"][key] for key in ("init_seed", "init_seeds"))
    seeds = f"{seed} to {seed + count - 1}" if count > 1 else f"{seed}"
    return {
        "seconds": round(sum(row.get("time/seconds") or 0 for log in logs for row in log)),
        "score": score,
        "selected_on": result["selected_on"],
        "seeds": f"data {about['config']['data_seed']}, init {seeds}",
        "data": digest(data)[:12],
        "networks": networks,
    }


def page() -> str:
    """LEDGER.md."""
    found = rows()
    sources = sorted({source for row in found for _, source in row.published.values()})
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
            "best of all evaluations of the data that select, which for CIFAR-100's published "
            "protocol is the test set. The verdict compares it with the published number: within "
            "our spread of seeds, or above it or short of it by how much.",
            "## Runs of configs",
            markdown.table(header, [line for row in ran for line in _lines(row, sources)]),
            f"Published, by the numbers in brackets: {'; '.join(numbered)}.",
            "## Tables of other commands",
            "What they printed stands in experiments/measured; the pages repeat it.",
            markdown.table(["row", "command", "seeds", "commit"], tables),
            "",
        ]
    )


def _lines(row: Row, sources: list[str]) -> Iterator[list[str]]:
    """The lines of a run, one for each network."""
    config = f"`{shlex.split(row.command)[3].removeprefix('--config=')}`"
    found = row.measured or {"networks": {}}
    names = found["networks"] or ["student"]
    for name in names:
        given = row.published.get(name)
        published = "-" if given is None else f"{given[0]:.2f} [{1 + sources.index(given[1])}]"
        about = [row.name, config, name]
        if not row.measured:
            yield [*about, "-", "-", published, "not measured", *["-"] * 6]
            continue
        network = found["networks"][name]
        factor = 100 if found["score"] == "accuracy" else 1
        best, last = (
            np.asarray(network[key], float) * factor if network[key] else None
            for key in ("best", "last")
        )
        texts = [_text(best, factor), _text(last, factor), published, _verdict(best, given)]
        how = [f"{network['epochs']:.0f}", found["seeds"], found["device"]]
        how += [f"{found['seconds'] / 60:.0f} min", found["commit"], found["data"]]
        yield [*about, *texts, *how]


def _text(scores: np.ndarray | None, factor: int) -> str:
    if scores is None:
        return "-"
    digits = 2 if factor == 100 else 4
    spread = f" +- {np.std(scores, ddof=1):.{digits}f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.{digits}f}{spread}"


def _verdict(best: np.ndarray | None, published: tuple[float, str] | None) -> str:
    if best is None or published is None:
        return "-"
    gap = np.mean(best) - published[0]
    if len(best) > 1 and abs(gap) <= np.std(best, ddof=1):
        return "within our spread"
    return f"{'above' if gap > 0 else 'short'} by {abs(gap):.2f}"


def check() -> list[str]:
    """What is wrong: a sentence each."""
    found = [] if (ROOT / "LEDGER.md").read_text() == page() else ["LEDGER.md is not up to date."]
    measured = {row.name: row for row in rows() if row.measured}
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
    blocks = [printed for language, printed in _FENCED.findall(text) if not language]
    blocks += [match[0] for match in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    for block in blocks:
        if _OF_SCORES.search(block):
            yield from (line for line in block.splitlines() if _NUMBER.search(line))


def _named(line: str, measured: Mapping[str, Row]) -> list[Row]:
    """The rows whose names a line has in backticks."""
    return [measured[name] for name in re.findall(r"`([\w/]+)`", line) if name in measured]


def _known(line: str, measured: list[Row]) -> bool:
    """Whether each number of a line is, rounded, one of some rows."""
    numbers = np.asarray([x for row in measured for x in _numbers(row.measured)])
    for text in _NUMBER.findall(line):
        digits = len(text.partition(".")[2])
        if not np.any(np.abs(numbers - float(text)) <= 0.5000001 * 10.0**-digits):
            return False
    return True


def _numbers(measured: Mapping[str, Any]) -> Iterator[float]:
    """All numbers of a row: those printed, and its scores, in % too, with their spread."""
    for line in measured.get("printed", ()):
        yield from map(float, _NUMBER.findall(line))
    for network in measured.get("networks", {}).values():
        for key in ("last", "best", "nll"):
            scores = [x for x in network[key] or [] if x is not None]
            spread = [np.std(scores, ddof=1)] if len(scores) > 1 else []
            for score in [*scores, *spread, *([np.mean(scores)] if scores else [])]:
                yield from (score, 100 * score)


def _plain(line: str) -> str:
    return " ".join(line.split())


if __name__ == "__main__":
    command.run(main)
