"""Files of text as examples of ids: tokenised once, then mapped from disk."""

import contextlib
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from abkd_jax.checks import require
from abkd_jax.data.chat import Spans, conversations
from abkd_jax.data.decoded import cache_folder
from abkd_jax.data.tokenizers import Encoded, Tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt")
_LEAVING = "text of which a token is left to predict"
_TOGETHER = 512  # texts that are tokenised at a time
_VERSION = 2  # of what is kept
_UNFINISHED = "unfinished-"  # before the names of folders that are being written
_PARTS = {"ids": np.int32, "counts": np.bool_, "ends": np.int64, "sources": np.int64}


class Corpus(NamedTuple):
    """Examples as ids, one after the other.

    Attributes:
        ids: `[n]` int32.
        counts: `[n]` bool, whether a token is to be predicted.
        ends: `[N]` int64, where each example ends.
        sources: `[N]` int64, the line of the file that it comes from, counted from 0 among those
            that are not blank; of a plain file, which row of it this is.
        identity: of the file's bytes, the tokenizer's and the format; "" for text in memory.
    """

    ids: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    identity: str = ""


@dataclass(frozen=True)
class Format:
    """How a text becomes examples.

    Attributes:
        tokenizer: of its ids.
        length: the most tokens of an example, at least 2.
        max_prompt: the most tokens before the first that counts.
        response_alone: whether the tokens of a prompt do not count.
        template: of a prompt, with {prompt} in its place.
        vocab_size: ids lie below it.
    """

    tokenizer: Tokenizer
    length: int
    max_prompt: int
    response_alone: bool = True
    template: str = "{prompt}"
    vocab_size: int = 2**31

    def examples(self, written: "Written", found: Encoded) -> list[tuple[Any, Any]]:
        """The ids and counts of each example of a text: one, or the windows of a document.

        Raises:
            ValueError: if an id lies beyond the vocabulary, or no token is left to predict.
        """
        inside = [(found.starts < end) & (found.ends > start) for start, end in written.spans]
        written_counts = np.any([np.zeros(len(found.ids), bool), *inside], axis=0)
        ends = self.tokenizer.prefix, [self.tokenizer.eos]
        prefix, eos = (np.array(end, np.int32) for end in ends)
        if written.kind == "conversation":  # the chat template has them
            prefix, eos = prefix[:0], eos[:0]
        elif np.array_equal(found.ids[-1:], eos):
            eos = eos[:0]
        # Where none counts, after the last one; that is refused below.
        first = 0 if written.kind == "text" else int(np.argmax(np.append(written_counts, True)))
        cut = max(0, len(prefix) + first - self.max_prompt)
        ids = np.concatenate([prefix, found.ids[cut:], eos])
        counts = np.concatenate([prefix < 0, written_counts[cut:], eos >= 0])
        largest = int(ids.max(initial=0))
        require(largest < self.vocab_size, "ids", f"below {self.vocab_size}", largest)
        ends = written.kind == "response" and len(eos)  # at once, if there is nothing else
        if not ((written_counts.any() or ends) and counts[1:].any()):
            counted = "".join(written.text[start:end] for start, end in written.spans)
            require(False, f"the {written.kind}", _LEAVING, counted)
        if not self.response_alone or written.kind == "text":
            counts[:] = True
        size = self.length
        if written.kind != "text":
            return [(ids[:size], counts[:size])]
        starts = range(0, len(ids) - 1, size - 1)  # each token but the first is predicted once
        return [(ids[start : start + size], counts[start : start + size]) for start in starts]


class Written(NamedTuple):
    """A text before it is tokenised.

    Attributes:
        text: all of it.
        spans: the characters that count.
        kind: "response" to a prompt, "conversation", or "text" of which everything counts.
    """

    text: str
    spans: Spans
    kind: str


def tokenised(path: pathlib.Path, form: Format, cache_dir: str) -> Corpus:
    """The examples of a file, tokenised or as they were kept when they last were.

    They are kept for the file's bytes, the tokenizer's and the format. What is kept and cannot be
    read is made anew.

    Args:
        path: of the file.
        form: of its examples.
        cache_dir: a folder; "" for that of `decoded.cache_folder`.

    Raises:
        ValueError: one sentence that names the file and the line, or the folder that cannot be
            written.
    """
    cache = pathlib.Path(cache_dir).expanduser() if cache_dir else cache_folder()
    kept = cache / _identity(path, form)
    with contextlib.suppress(OSError, ValueError):
        return _mapped(kept)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache), contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, ValueError):
                return _mapped(kept)  # which another process has just made
            if jax.process_index() == 0:
                print(f"tokenising {path}, kept in {kept}", file=sys.stderr)
            folder = tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache)
            made = pathlib.Path(stack.enter_context(folder), "made")
            made.mkdir()
            _write(path, form, made)
            return _kept(made, kept)
    except OSError as error:
        raise ValueError(f"data.cache_dir {cache} cannot be written ({error}).") from error


@contextlib.contextmanager
def _alone(cache: pathlib.Path) -> Iterator[None]:
    """Waits until no other process writes to a folder, and removes what a killed one left there.

    On a file system without locks neither.
    """
    handle = os.open(cache, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            for left in cache.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def of_documents(texts: list[str], form: Format) -> Corpus:
    """The examples of some texts of which everything counts, in memory; sources number them."""
    found = []
    for source, (text, encoded) in enumerate(zip(texts, form.tokenizer.encode(texts), strict=True)):
        written = Written(text, ((0, len(text)),), "text")
        found += [(*example, source) for example in form.examples(written, encoded)]
    ids, counts, sources = zip(*found, strict=True)
    ends = np.cumsum([*map(len, ids)])
    return Corpus(np.concatenate(ids), np.concatenate(counts), ends, np.array(sources))


def _identity(path: pathlib.Path, form: Format) -> str:
    with reading(path), path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {key: value for key, value in vars(form).items() if key != "tokenizer"}
    settings |= {"file": content, "kind": path.suffixes[-2:], "tokens": form.tokenizer.identity}
    known = _VERSION, sorted(settings.items())
    return "text-" + hashlib.sha256(repr(known).encode()).hexdigest()


def _mapped(folder: pathlib.Path) -> Corpus:
    """What a folder keeps, if all of it is there."""
    parts = (np.memmap(folder / name, dtype, "r") for name, dtype in _PARTS.items())
    corpus = Corpus(*parts, identity=folder.name)
    whole = len(corpus.ids) == len(corpus.counts) == corpus.ends[-1]
    require(whole and len(corpus.ends) == len(corpus.sources), f"{folder}", "whole", corpus)
    return corpus


def _kept(made: pathlib.Path, kept: pathlib.Path) -> Corpus:
    """What a folder has that is moved to where it is kept, if no other process was faster."""
    with contextlib.suppress(OSError):
        made.rename(kept)
    try:
        return _mapped(kept)
    except (OSError, ValueError):  # what was there is damaged
        shutil.rmtree(kept)
        made.rename(kept)
        return _mapped(kept)


def _write(path: pathlib.Path, form: Format, folder: pathlib.Path) -> None:
    """Tokenises a file, with a progress bar over its bytes."""
    from tqdm import tqdm

    end = source = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in _PARTS]
        raw = stack.enter_context(path.open("rb"))
        size = path.stat().st_size
        bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, disable=None))
        texts = _texts(path, raw, form)
        while some := list(itertools.islice(texts, _TOGETHER)):
            found = form.tokenizer.encode([written.text for _, written in some])
            for (where, written), encoded in zip(some, found, strict=True):
                with _saying(where):
                    examples = form.examples(written, encoded)
                for ids, counts in examples:
                    end += len(ids)
                    rows = (ids, counts, end, source)
                    for file, row, dtype in zip(files, rows, _PARTS.values(), strict=True):
                        file.write(np.asarray(row, dtype).tobytes())
                    source += path.suffix == ".txt"
                source += path.suffix != ".txt"
            bar.update(raw.tell() - bar.n)
    require(end, f"{path}", "a file with an example", "none")


def _texts(path: pathlib.Path, raw: BinaryIO, form: Format) -> Iterator[tuple[str, Written]]:
    """Where each text of a file stands, and the text."""
    if path.suffix == ".txt":
        with reading(path):
            text = raw.read().decode("utf-8-sig")
        if text:
            yield f"{path}", Written(text, ((0, len(text)),), "text")
        return
    render = _renderer(form.tokenizer)
    with reading(path):
        lines = gzip.open(raw) if path.suffix == ".gz" else raw
        numbered = enumerate(lines, 1)
    while True:
        with reading(path):
            number, line = next(numbered, (0, b""))
        if not number:
            return
        if line.strip():
            where = f"{path}, line {number}"
            with _saying(where):
                written = _written(line, form.template, render)
            yield where, written


def _written(line: bytes, template: str, render: Callable[[Any], tuple[str, Spans]]) -> Written:
    """The text of a line of JSON.

    Raises:
        ValueError: if it is none.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be JSON ({error}).") from error
    require(isinstance(fields, Mapping), "it", "a JSON object", fields)
    if "messages" in fields:
        text, spans = render(fields["messages"])
        written = Written(text, spans, "conversation")
    else:
        documents = "text" in fields and fields.keys().isdisjoint(("prompt", "response"))
        keys = ("text",) if documents else ("prompt", "response")
        expected = "prompt and response, or text, all of them strings, or messages"
        fits = all(isinstance(fields.get(key), str) for key in keys)
        require(fits, "its fields", expected, fields)
        prompt = template.replace("{prompt}", fields["prompt"]) if len(keys) == 2 else ""
        text = prompt + fields[keys[-1]]
        written = Written(text, ((len(prompt), len(text)),), keys[-1])
    with contextlib.suppress(UnicodeEncodeError):
        written.text.encode()
        return written
    raise ValueError("the text must be Unicode; found half of a surrogate pair.")


def _renderer(tokenizer: Tokenizer) -> Callable[[Any], tuple[str, Spans]]:
    """What renders messages; made when the first of them come."""
    made = []

    def render(messages: Any) -> tuple[str, Spans]:
        expected = "in the tokenizer's folder, for messages"
        require(tokenizer.chat_template, "a chat template", expected, "none")
        if not made:
            made.append(conversations(tokenizer.chat_template, tokenizer.special))
        return made[0](messages)

    return render


def prompt_template(path: pathlib.Path, tokenizer: Tokenizer, template: str) -> str:
    """What stands around a prompt in the examples of a file, with {prompt} in its place.

    Args:
        path: of the file; where it begins with messages, that is what the chat template puts around
            a user's turn, up to the answer.
        tokenizer: of the examples.
        template: of prompts.

    Raises:
        ValueError: one sentence, if the file cannot be read.
    """
    form = Format(tokenizer, 2, 1, template=template)
    with path.open("rb") as raw:
        first = next(_texts(path, raw, form), None)
    if first is None or first[1].kind != "conversation":
        return template
    turns = dict(role="user", content="{prompt}"), dict(role="assistant", content="-")
    text, spans = _renderer(tokenizer)([*turns])
    known = tokenizer.special.get("bos_token", "") if len(tokenizer.prefix) else ""
    return text[: spans[0][0]].removeprefix(known)  # which a prompt's ids begin with anyway


@contextlib.contextmanager
def _saying(where: str) -> Iterator[None]:
    """Tells a ValueError with the place that it speaks of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@contextlib.contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Tells in a sentence that a file cannot be read."""
    try:
        yield
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
