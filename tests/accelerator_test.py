"""The rows of `experiments.accelerator`: kept, resumed, refused; and the command, shrunken."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest
from own_process import environment

_ROOT = pathlib.Path(__file__).parents[1]
rows = runpy.run_path(str(_ROOT / "experiments" / "accelerator" / "rows.py"))
Ledger, Row, measured = (rows[name] for name in ("Ledger", "Row", "measured"))
IDENTITY = {"device": "one", "jax": "1"}


def broken():
    raise MemoryError("no room\nfor this | arm")


def test_an_arm_that_fails_is_a_line_and_the_others_have_their_rounds():
    turns = []
    arms = {
        "first": lambda: lambda: turns.append("first"),
        "not made": broken,
        "not called": lambda: broken,
        "last": lambda: lambda: turns.append("last"),
    }
    found = measured(Row("a row", lambda: arms, {"size": 3}), seconds=60.0)
    assert found["failed"] == dict.fromkeys(
        ("not made", "not called"), "MemoryError: no room for this | arm"
    )
    assert found["facts"] == {"size": 3}
    assert {name: len(times) for name, times in found["seconds"].items()} == {
        "first": 15,
        "last": 15,
    }
    assert turns[-4:] == ["first", "last"] * 2
    json.dumps(found)


def test_a_row_that_cannot_begin():
    found = measured(Row("a row", broken, {}), seconds=1.0)
    assert found["seconds"] == {} and "no room" in found["failed"]["all"]


def test_rows_are_there_when_the_command_starts_again(tmp_path):
    ledger = Ledger(tmp_path, IDENTITY)
    kept = {"seconds": {"arm": [0.5, 0.25]}, "failed": {}, "facts": {}}
    with ledger.attempt("first") as measures:
        assert measures
    ledger.add("first", kept)
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text() + '{"row": "second", "sec')  # killed while it wrote
    again = Ledger(tmp_path, IDENTITY)
    assert list(again.found) == ["first"]
    assert again.found["first"]["seconds"] == kept["seconds"]
    again.add("second", kept)
    assert list(Ledger(tmp_path, IDENTITY).found) == ["first", "second"]


def test_rows_of_other_versions_are_not_mixed(tmp_path):
    Ledger(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match=r"jax '1', now '2'.*choose another --out"):
        Ledger(tmp_path, IDENTITY | {"jax": "2"})
    (tmp_path / "rows.jsonl").write_text("{}\nno line\n")
    with pytest.raises(ValueError, match="must be JSON lines; restore or delete it"):
        Ledger(tmp_path, IDENTITY)


def test_a_row_that_ends_the_process_twice_is_not_begun_again(tmp_path):
    measures = []
    for _ in range(3):
        attempt = Ledger(tmp_path, IDENTITY).attempt("deadly")
        measures.append(attempt.__enter__())  # and never left, as in a process that was killed
    assert measures == [True, True, False]
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            with Ledger(tmp_path, IDENTITY).attempt("interrupted") as again:
                assert again
                raise KeyboardInterrupt


def command(folder, *arguments):
    argv = [sys.executable, "-m", "experiments.accelerator", f"--out={folder}", "--runlocal"]
    argv += arguments
    done = subprocess.run(argv, cwd=_ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.long
def test_the_divergences_by_command(tmp_path):
    command(tmp_path, "--part=divergences")
    page, kept = ((tmp_path / name).read_text() for name in ("accelerator.md", "rows.jsonl"))
    assert "failed" not in page and "Not measured yet: 1 of 1 rows." in page
    for name in ("copy", "forward_kl", "adaptive_kl"):
        assert f"| {name} |" in page
    *before, _, last = kept.splitlines(keepends=True)  # the last row has a line when it begins
    (tmp_path / "rows.jsonl").write_text("".join(before) + last[:40])
    told = command(tmp_path, "--part=divergences")
    assert told.count("rows to go") == 1
    assert (tmp_path / "rows.jsonl").read_text().startswith("".join(before))
    assert (tmp_path / "accelerator.md").read_text().count("| abkd_jax |") == 7


@pytest.mark.long
def test_the_vocabulary_and_the_decoders_by_command(tmp_path):
    command(tmp_path, "--part=vocabulary", "--part=decoders")
    page = (tmp_path / "accelerator.md").read_text()
    assert "failed" not in page
    for name in ("jensen_shannon", "alpha_beta"):
        for arm in ("abkd_jax, chunked", "JAX, dense"):
            assert f"| {name} | {arm} |" in page
    assert "| tiny | trains | 1 device |" in page and "| tiny | writes | 1 device |" in page


def test_the_memory_of_a_call_is_kept_beside_its_times():
    class Call:
        memory = 7

        def __call__(self):
            return 1.0

    found = measured(
        Row("a row", lambda: {"known": Call, "not": lambda: lambda: 1.0}, {}), seconds=0
    )
    assert found["memory"] == {"known": 7} and set(found["seconds"]) == {"known", "not"}


@pytest.mark.slow
def test_all_parts_by_command(tmp_path):
    command(tmp_path)
    page = (tmp_path / "accelerator.md").read_text()
    assert "failed" not in page and "Not measured yet" not in page
    assert "| 2 steps a call | 1 | 8 |" in page and "| one by one | 3 |" in page
    assert "rows to go" not in command(tmp_path)
