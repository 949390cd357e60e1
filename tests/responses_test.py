"""Files of responses: what is written, goes on, is refused, and is judged."""

import fcntl
import gzip
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from decoder_test import make, tokens
from instructions_test import write_tokenizer
from own_process import environment

from abkd_jax import generate, models
from abkd_jax.data import read_tokenizer
from abkd_jax.run import samples
from abkd_jax.run.responses import Writing, opened, prompt_ids, respond

ROOT = pathlib.Path(__file__).parents[1]
BYTES = read_tokenizer("bytes")
FIELDS = dict(num_classes=257, width=8, layers=1, heads=2, mlp_width=8)
WRITING = Writing(max_prompt=6, max_new_tokens=5, samples=2, batch_size=2, seed=3)
LINES = [
    {"prompt": "alpha", "response": "beta", "task": 1},
    {"prompt": "a longer prompt", "references": ["one", "two"], "response": "three"},
    {"prompt": "x"},
]


@pytest.fixture(scope="module")
def network():
    module, variables = make(**FIELDS)
    return module, jax.tree.map(lambda x: x * 0.5, variables)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, LINES)) + "\n\n")
    return path


def test_lines_are_what_the_network_writes(network, prompts, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    assert respond(*network, BYTES, prompts, out, WRITING) == 6
    found = samples.read_lines(out)
    assert [line["prompt"] for line in found] == [x["prompt"] for x in LINES for _ in range(2)]
    assert [line.get("references") for line in found[::2]] == [
        ["beta"],
        ["three", "one", "two"],
        None,
    ]
    assert found[0]["task"] == 1
    ids = [list(line["prompt"].encode())[-6:] for line in LINES]
    for first, rows in ((0, ids[:2]), (2, [ids[2], ids[2]])):
        expected, log_probs = generate(
            *network,
            tokens(rows, 6),
            key=jax.random.fold_in(jax.random.key(3), first),
            max_new_tokens=5,
            stop=(256,),
            samples=2,
        )
        for row, line in enumerate(found[2 * first : 2 * first + 4]):
            there = np.asarray(expected.segments[row, 6:]) > 0
            own = np.asarray(expected.ids[row, 6:])[there].tolist()
            assert line["ids"] == own
            assert line["stopped"] == (own[-1] == 256)
            assert line["response"] == BYTES.decode([x for x in own if x != 256])
            assert line["log_prob"] == pytest.approx(float(log_probs[row].sum()), abs=1e-3)


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 6])
def test_a_file_goes_on_where_it_was_cut(network, prompts, tmp_path, kept):
    """In the middle of a line, of a prompt's samples, or of a batch."""
    out = tmp_path / "out.jsonl"
    respond(*network, BYTES, prompts, out, WRITING)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:kept]) + (lines[kept][:7] if kept < 6 else b""))
    assert respond(*network, BYTES, prompts, out, WRITING) == 6
    assert out.read_bytes() == whole


def test_one_process_at_a_time_writes_a_file_and_no_more_than_it_is_to_have(
    network, prompts, tmp_path
):
    out = tmp_path / "out.jsonl"
    respond(*network, BYTES, prompts, out, WRITING)
    with (tmp_path / "out.jsonl.settings.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused(network, prompts, out) == f"another process is writing {out}."
    whole = out.read_bytes()
    out.write_bytes(whole + whole)
    expected = f"{out} must be a file of at most 6 lines; found 12."
    assert refused(network, prompts, out) == expected and out.read_bytes() == whole + whole


def refused(network, prompts, out, writing=WRITING, tokenizer=BYTES, **changes):
    with pytest.raises(ValueError) as error:
        respond(*network, tokenizer, prompts, out, writing._replace(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_prompt_keeps_what_stands_before_it_and_loses_its_beginning():
    tokenizer = BYTES._replace(prefix=(256,))
    writing = WRITING._replace(template="<{prompt}>")
    found = prompt_ids(tokenizer, [{"prompt": "abcdefgh"}, {"prompt": ""}], writing)
    assert [x.tolist() for x in found] == [[256, *b"efgh>"], [256, *b"<>"]]


def test_padding_of_a_folders_table_is_never_written(tmp_path):
    module, variables = make(**FIELDS | dict(num_classes=300))
    models.save_decoder(tmp_path / "model", module, variables)
    write_tokenizer(tmp_path / "model")
    module, variables, tokenizer, _ = opened(str(tmp_path / "model"))
    assert module.architecture.num_classes == tokenizer.size == 257
    how = dict(key=jax.random.key(0), max_new_tokens=64, temperature=50.0)
    found, _ = generate(module, variables, tokens([[1]] * 8), **how)
    assert found.ids.max() <= 256


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(samples=0), "samples must be at least 1; found 0."),
        (dict(template="x"), "template must be text with {prompt}; found 'x'."),
        (dict(temperature=-1.0), "temperature must be at least 0; found -1.0."),
        (dict(top_k=-1), "top_k must be at least 0; found -1."),
        (dict(top_p=0.0), "top_p must be greater than 0 and at most 1; found 0.0."),
        (
            dict(max_new_tokens=7, of=dict(positions="learned", max_length=12)),
            "the prompts' length and max_new_tokens together must be at most the 12 learned "
            "positions; found 13.",
        ),
        (
            dict(max_prompt=1, prefix=(256,)),
            "max_prompt must be more than the 1 that the tokenizer puts before a text; found 1.",
        ),
    ],
)
def test_settings_that_are_refused(network, prompts, tmp_path, changes, sentence):
    """And nothing is left behind, so that the same file can be asked for again."""
    network = make(**FIELDS | changes.pop("of")) if "of" in changes else network
    tokenizer = BYTES._replace(prefix=changes.pop("prefix", ()))
    found = refused(network, prompts, tmp_path / "out.jsonl", tokenizer=tokenizer, **changes)
    assert found == sentence
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_files_that_are_refused(network, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    assert "a file that ends with .jsonl" in refused(network, tmp_path / "none.jsonl", out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert "bad.jsonl, line 2 must be a JSON object with a string, prompt" in refused(
        network, bad, out
    )
    bad.write_text("\n")
    assert "must be a file with a prompt; found 'none'" in refused(network, bad, out)
    out.write_text("mine\n")
    assert "must be a new file" in refused(network, prompts, out)
    assert out.read_text() == "mine\n"
    respond(*network, BYTES, prompts, tmp_path / "two.jsonl", WRITING)
    other = make(seed=5, **FIELDS)
    assert "network must be" in refused(other, prompts, tmp_path / "two.jsonl")
    assert "seed must be 3, as in" in refused(network, prompts, tmp_path / "two.jsonl", seed=4)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"prompt": "a"}\n\n{"prompt": ""}\n', ", prompt 2 must be text of a token at least; f"),
        (b'{"prompt": "a", "response": null}\n', ", line 1 must be of text in its response and r"),
        (b'{"prompt": "a", "response": 7}\n', ", line 1 must be of text in its response and ref"),
        (b'{"prompt": "a", "references": ["b", 7]}\n', ", line 1 must be of text in its response"),
        (b'{"prompt": "\\ud800"}\n', ", line 1 must be Unicode; found half of a surrogate pair."),
        (b'{"prompt": "a"}\n{"prompt": "\xe4"}\n', " cannot be read ('utf-8' codec can't decode"),
        (b'{"a":' * 100_000, ", line 1 must be a JSON object with a string, prompt; found "),
    ],
)
def test_lines_that_are_refused(network, tmp_path, content, sentence):
    """Before anything is written, so that the same command can be given for the mended file."""
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(content)
    found = refused(network, bad, tmp_path / "out.jsonl")
    assert found.startswith(f"{bad}{sentence}") and len(found) < 1_000
    bad.write_text('{"prompt": "a"}\n')
    assert respond(*network, BYTES, bad, tmp_path / "out.jsonl", WRITING) == 2


def test_a_compressed_file_that_is_cut_is_refused(network, prompts, tmp_path):
    prompts.write_bytes(prompts.read_bytes()[:-9])
    assert f"{prompts} cannot be read (" in refused(network, prompts, tmp_path / "out.jsonl")


def test_other_prompts_of_the_same_size_are_refused(network, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    respond(*network, BYTES, path, out, WRITING)
    path.write_text('{"prompt": "b"}\n{"prompt": "a"}\n')
    assert "prompts must be ['prompts.jsonl', '" in refused(network, path, out)


def test_a_judge_that_wrote_the_text_finds_it_as_likely(network, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    respond(*network, BYTES, prompts, out, WRITING)
    lines = samples.read_lines(out)
    found = samples.judged(lines, tokenizer=BYTES, writing=WRITING, judge=network)
    assert found["judge_nll"] == pytest.approx(found["nll"], rel=1e-4)
    count = sum(len(line["ids"]) for line in lines)
    assert found["length"] == count / 6 and 0 < found["nll"] < 20
    assert found["stopped"] == sum(line["ids"][-1] == 256 for line in lines) / 6
    other = make(seed=1, **FIELDS)
    found = samples.judged(lines, tokenizer=BYTES, writing=WRITING, judge=other)
    assert found["judge_nll"] != pytest.approx(found["nll"], rel=1e-3)


def test_what_there_is_not_is_none():
    lines = [dict(prompt="a", response="", ids=[256], stopped=True, log_prob=-1.0)]
    found = samples.judged(lines, tokenizer=BYTES, writing=WRITING)
    names = [name for name, value in found.items() if value is None]
    assert sorted(names) == ["distinct_1", "distinct_2", "judge_nll", "rouge_l", "self_bleu"]
    assert (found["length"], found["stopped"], found["nll"]) == (1, 1, 1)


def test_the_page_has_means_with_their_deviation_and_texts_side_by_side():
    numbers = [dict.fromkeys((x.key for x in samples.COLUMNS), None) for _ in range(2)]
    found = {"set": {"one": [numbers[0] | {"rouge_l": 0.1}, numbers[1] | {"rouge_l": 0.3}]}}
    line = dict(prompt="say | it\n", response="so " * 300, references=["well"])
    text = samples.page(found, {"set": {"one": [line]}}, "about")
    assert "| one | 20.00 +- 14.14 |" in text and "| network | Rouge-L |" in text
    assert "**say \\| it**" in text and "- *reference*: well" in text and "- *one*: so so" in text
    assert text.count("so ") <= 134 and "…" in text


@pytest.mark.long
def test_the_commands(network, prompts, tmp_path):
    """A folder and a file; killed in between, they write the same."""
    folder = tmp_path / "model"
    module, variables = make(**FIELDS | dict(num_classes=257))
    models.save_decoder(folder, module, variables)
    write_tokenizer(folder)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))

    def run(*flags):
        command = [sys.executable, "-m", *flags, "--max_prompt=6", "--max_new_tokens=5"]
        how = dict(cwd=ROOT, env=environment(), capture_output=True, text=True)
        return subprocess.run([*command, "--batch_size=2"], **how)

    files = f"--model={folder}", f"--prompts={path}"
    done = run("abkd_jax.respond", *files, f"--out={tmp_path / 'out.jsonl'}")
    assert done.returncode == 0, done.stderr
    assert "out.jsonl: 3 responses" in done.stdout
    lines = samples.read_lines(tmp_path / "out.jsonl")
    *opened_network, tokenizer, template = opened(str(folder))
    assert template == "{prompt}"
    again = tmp_path / "again.jsonl"
    writing = Writing(max_prompt=6, max_new_tokens=5, batch_size=2)
    respond(*opened_network, tokenizer, path, again, writing)
    assert samples.read_lines(again) == lines
    missing = run("abkd_jax.respond", f"--model={folder}")
    assert missing.returncode == 1 and missing.stderr.strip() == "--prompts is missing."
    own = f"--networks=a={folder},b={folder}", f"--sets={path}", f"--workdir={tmp_path / 'samples'}"
    done = run("abkd_jax.samples", *own, "--seeds=2", "--judge=b")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "samples" / "samples.json").read_text())["prompts"]
    assert found["a"] == found["b"] and len(found["a"]) == 2 and found["a"][0] != found["a"][1]
    assert "Rouge-L" in (tmp_path / "samples" / "samples.md").read_text()
    wrong = run("abkd_jax.samples", *own, "--judge=c")
    assert wrong.stderr.strip() == "--judge must be one of a, b; found 'c'."
