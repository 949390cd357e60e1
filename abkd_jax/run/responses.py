"""A file of prompts, and a decoder's responses to them: data for SeqKD, or for an evaluation."""

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax import files
from abkd_jax.checks import require
from abkd_jax.data import Tokenizer, read_tokenizer
from abkd_jax.data.corpus import prompt_template, reading
from abkd_jax.generate import check_length, generate
from abkd_jax.models import Decoder, decoder_in, load_decoder
from abkd_jax.run.workdir import load, write_json
from abkd_jax.train.checkpoint import FOLDER, digest
from abkd_jax.types import Tokens

_PLAIN = "{prompt}"
_REFERENCES = ("response", "references")  # of a line of prompts, in this order


class Writing(NamedTuple):
    """How responses are written.

    Attributes:
        template: of a prompt, with {prompt} in its place; "" for the prompt alone.
        max_prompt: the most tokens of a prompt, which loses its beginning.
        max_new_tokens: of a response.
        temperature: see `generate`; 0 for the likeliest tokens.
        top_k: see `generate`; 0 for all tokens.
        top_p: see `generate`; 1 for all tokens.
        samples: of each prompt.
        seed: of the draws.
        batch_size: prompts at once; draws depend on it.
    """

    template: str = ""
    max_prompt: int = 256
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    batch_size: int = 16


def respond(
    module: Decoder,
    variables: Any,
    tokenizer: Tokenizer,
    prompts: str | os.PathLike,
    out: str | os.PathLike,
    writing: Writing,
) -> int:
    """Writes a network's responses to a file of prompts, or goes on with them.

    Args:
        module: a decoder.
        variables: its parameters.
        tokenizer: of its ids.
        prompts: JSON Lines (.jsonl or .jsonl.gz), each with `prompt`.
        out: JSON Lines, in the order of the prompts and of their samples: each line has what that
            of its prompt has, its response now the first of `references`; `response`, and of it
            with its end `ids` and `log_prob`; `stopped`, whether it ended of itself. Beside it
            OUT.settings.json says how it was made; a file of other settings is refused. Killed at
            any moment, the same call goes on with the batch that was not complete, and writes the
            same.
        writing: how.

    Returns:
        How many responses the file has.

    Raises:
        ValueError: one sentence that names the file and its line, or the setting.
    """
    _check(writing)
    module = decoder_in(module)
    prompts, out = pathlib.Path(prompts), files.on_disk(out, "out")
    lines = [*_lines(prompts)]
    require(lines, f"{prompts}", "a file with a prompt", "none")
    asked = [*zip(lines, prompt_ids(tokenizer, lines, writing, of=f"{prompts}, "), strict=True)]
    check_length(module, writing.max_prompt + writing.max_new_tokens)
    network = digest(variables["params"])[:12]
    settings = {**writing._asdict(), "network": network, "prompts": _identity(prompts)}
    about = out.with_name(f"{out.name}.settings.json")
    _claim(about, settings, out)
    with _alone(about, out):
        whole, per_batch = (x * writing.samples for x in (len(lines), writing.batch_size))
        done = _complete(out, per_batch, whole) // writing.samples
        start, count, first = time.monotonic(), 0, done
        with out.open("ab") as file:
            while done < len(lines):
                batch = asked[done : done + writing.batch_size]
                found = _responses(module, variables, tokenizer, batch, done, writing)
                file.write("".join(f"{json.dumps(line)}\n" for line in found).encode())
                file.flush()
                os.fsync(file.fileno())
                done += len(batch)
                count += sum(len(line["ids"]) for line in found)
                seconds = time.monotonic() - start
                left = (len(lines) - done) * seconds / (done - first)
                speed = f"{count / seconds:,.1f} tokens/s, ETA {left:.0f} s"
                print(f"{done}/{len(lines)} prompts, {speed}", file=sys.stderr, flush=True)
    return whole


def _responses(
    module: Decoder,
    variables: Any,
    tokenizer: Tokenizer,
    batch: list[tuple[Mapping[str, Any], np.ndarray]],
    first: int,
    writing: Writing,
) -> list[dict[str, Any]]:
    """The lines of the prompts from `first` on, each given with its ids."""
    ids = [own for _, own in batch]
    ids += [ids[0]] * (writing.batch_size - len(batch))  # for batches to be of one shape
    parts = np.zeros((3, writing.batch_size, writing.max_prompt), np.int32)
    for row, own in enumerate(ids):
        parts[:, row, : len(own)] = own, np.arange(len(own)), np.ones(len(own))
    found, log_probs = generate(
        module,
        variables,
        Tokens(*map(jnp.asarray, parts)),
        key=jax.random.fold_in(jax.random.key(writing.seed), first),
        max_new_tokens=writing.max_new_tokens,
        temperature=writing.temperature,
        top_k=writing.top_k or None,
        top_p=None if writing.top_p == 1 else writing.top_p,
        stop=(tokenizer.eos,),
        samples=writing.samples,
    )
    new = np.asarray(found.ids)[:, writing.max_prompt :]
    counts = np.sum(np.asarray(found.segments)[:, writing.max_prompt :] > 0, axis=1)
    told = []
    for row in range(len(batch) * writing.samples):
        own = new[row, : counts[row]].tolist()
        stopped = own[-1:] == [tokenizer.eos]
        response = tokenizer.decode(own[:-1] if stopped else own)
        about = {"response": response, "stopped": stopped, "ids": own}
        about["log_prob"] = round(float(np.sum(log_probs[row])), 4)
        told.append(_with_references(batch[row // writing.samples][0]) | about)
    return told


def prompt_ids(
    tokenizer: Tokenizer, lines: Sequence[Mapping[str, Any]], writing: Writing, *, of: str = ""
) -> list[np.ndarray]:
    """The ids of each line's prompt, or its end; an error begins with what the lines are `of`."""
    template, most = writing.template or _PLAIN, writing.max_prompt - len(tokenizer.prefix)
    expected = f"more than the {len(tokenizer.prefix)} that the tokenizer puts before a text"
    require(most >= 1, "max_prompt", expected, writing.max_prompt)
    texts = [template.replace("{prompt}", line["prompt"]) for line in lines]
    found = [[*tokenizer.prefix, *x.ids.tolist()[-most:]] for x in tokenizer.encode(texts)]
    for number, (line, ids) in enumerate(zip(lines, found, strict=True), 1):
        require(len(ids), f"{of}prompt {number}", "text of a token at least", line["prompt"])
    return [np.asarray(ids, np.int32) for ids in found]


def _with_references(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line, its response, or several, as the first of its references."""
    known = [line[key] for key in _REFERENCES if key in line]
    texts = [text for x in known for text in ([x] if isinstance(x, str) else x)]
    rest = {key: x for key, x in line.items() if key not in _REFERENCES}
    return ({"references": texts} if known else {}) | rest


def opened(model: str) -> tuple[Any, Any, Tokenizer, str]:
    """The decoder of a folder of the hub, or of a run: module, variables, tokenizer and template.

    Of a folder the tokens that its tokenizer has can be written alone, not the table's padding. The
    template is that of the run's prompts, or of the turns of its messages where that file is there.

    Args:
        model: the folder; or a workdir, for the network by which the run selects, or
            WORKDIR@NETWORK.

    Raises:
        ValueError: one sentence, if it is neither.
    """
    folder, _, network = model.rpartition("@")
    if not folder or files.path_of(model, "model").exists():
        folder, network = model, ""
    model = folder
    if not (files.path_of(model, "model") / FOLDER).exists():
        (module, variables), tokenizer = load_decoder(model), read_tokenizer(model)
        count = min(tokenizer.size, module.architecture.num_classes)
        module = Decoder(dataclasses.replace(module.architecture, num_classes=count))
        return module, jax.tree.map(jnp.asarray, variables), tokenizer, _PLAIN
    loaded = load(model, network or None)
    data = loaded.config["data"]
    tokenizer = read_tokenizer(data.get("tokenizer", "bytes"))
    template = data.get("template", _PLAIN)
    if data["fn"] == "text" and (train := pathlib.Path(data["train"])).is_file():
        template = prompt_template(train, tokenizer, template)
    return *loaded[:2], tokenizer, template


def _check(writing: Writing) -> None:
    for name in ("max_prompt", "max_new_tokens", "samples", "batch_size"):
        require(getattr(writing, name) >= 1, name, "at least 1", getattr(writing, name))
    fits = not writing.template or "{prompt}" in writing.template
    require(fits, "template", "text with {prompt}", writing.template)
    fits = writing.temperature >= 0 and np.isfinite(writing.temperature)
    require(fits, "temperature", "at least 0", writing.temperature)
    require(writing.top_k >= 0, "top_k", "at least 0", writing.top_k)
    require(0 < writing.top_p <= 1, "top_p", "greater than 0 and at most 1", writing.top_p)


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The fields of each line."""
    fits = path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file()
    require(fits, "prompts", "a file that ends with .jsonl or .jsonl.gz", f"{path}")
    opened_by = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened_by(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _fields(line, f"{path}, line {number}")


def _fields(line: str, where: str) -> dict[str, Any]:
    """Those of a line of JSON that stands somewhere."""
    fields = None
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(line)
    fits = isinstance(fields, dict) and isinstance(fields.get("prompt"), str)
    require(fits, where, "a JSON object with a string, prompt", line)
    several = fields.get("references", "")
    texts = [fields.get("response", ""), *(several if isinstance(several, list) else [several])]
    fits = all(isinstance(text, str) for text in texts)
    require(fits, where, "of text in its response and references, if it has them", line)
    try:
        "".join([fields["prompt"], *texts]).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} must be Unicode; found half of a surrogate pair.") from None
    return fields


def _identity(path: pathlib.Path) -> list[str]:
    """What tells a file of prompts from another: its name and its bytes."""
    with path.open("rb") as file:
        return [path.name, hashlib.file_digest(file, "sha256").hexdigest()[:12]]


def _claim(path: pathlib.Path, settings: Mapping[str, Any], out: pathlib.Path) -> None:
    """Keeps how a file is made, or refuses one that was made otherwise."""
    if not path.exists():
        require(not out.exists(), f"{out}", "a new file, or one with its settings beside it", out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    found = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(settings)).items():
        expected = f"{found.get(name)!r}, as in {path} (or choose another file)"
        require(found.get(name) == value, name, expected, value)


@contextlib.contextmanager
def _alone(settings: pathlib.Path, out: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a file, by a lock on that of its settings."""
    with settings.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {out}.") from None
        except OSError:  # a file system without locks
            pass
        yield


def _complete(out: pathlib.Path, per_batch: int, whole: int) -> int:
    """How many lines of whole batches a file has, which is cut to them."""
    if not out.exists():
        return 0
    with out.open("rb+") as file:
        lines = [line for line in file if line.endswith(b"\n")]
        require(len(lines) <= whole, f"{out}", f"a file of at most {whole} lines", len(lines))
        kept = len(lines) if len(lines) == whole else len(lines) // per_batch * per_batch
        file.truncate(sum(map(len, lines[:kept])))
    return kept
