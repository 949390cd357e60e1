"""What networks write, judged: by references, by its variety, and by another network."""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from abkd_jax import files, markdown
from abkd_jax.data import Tokenizer
from abkd_jax.metrics import text
from abkd_jax.models import decoder_in
from abkd_jax.run.responses import Writing, opened, prompt_ids, respond
from abkd_jax.run.workdir import write_json
from abkd_jax.tasks import Column
from abkd_jax.types import Tokens

COLUMNS = (
    Column("rouge_l", "Rouge-L", 100, 2),
    Column("length", "tokens", 1, 1),
    Column("stopped", "stopped %", 100, 1),
    Column("distinct_1", "distinct-1 %", 100, 1),
    Column("distinct_2", "distinct-2 %", 100, 1),
    Column("self_bleu", "Self-BLEU", 100, 1),
    Column("nll", "own NLL (nats/token)", 1, 3),
    Column("judge_nll", "judge's NLL (nats/token)", 1, 3),
)
_SHOWN = 6  # prompts of a page
_LONGEST = 400  # characters of a text on it


def compared(
    networks: Mapping[str, str],
    sets: Sequence[str],
    workdir: str | os.PathLike,
    writing: Writing,
    *,
    seeds: int,
    judge: str = "",
) -> str:
    """Has networks answer prompts, and judges what they write; goes on where it was stopped.

    Args:
        networks: {name: folder}, as `responses.opened` takes it.
        sets: JSON Lines with prompts.
        workdir: the folder that is written: NETWORK/SET_SEED.jsonl, samples.json, samples.md.
        writing: how, by the first seed; a network's own template where it has none.
        seeds: how many.
        judge: which of the networks judges the texts of all; "" for none.

    Returns:
        samples.md, see `page`.

    Raises:
        ValueError: one sentence, if a network or a set cannot be used.
    """
    found, written, workdir = {}, {}, files.on_disk(workdir, "workdir")
    by = opened(networks[judge]) if judge else None
    for name, folder in networks.items():
        *network, tokenizer, template = by if name == judge else opened(folder)
        if by and by[2].vocabulary != tokenizer.vocabulary:
            raise ValueError(
                f"--judge={judge} has other tokens than {name}, and cannot judge its text."
            )
        for path, seed in itertools.product(map(pathlib.Path, sets), range(seeds)):
            how = {"seed": writing.seed + seed, "template": writing.template or template}
            stem, own = path.name.partition(".jsonl")[0], writing._replace(**how)
            out = workdir / name / f"{stem}_{own.seed}.jsonl"
            respond(*network, tokenizer, path, out, own)
            lines = read_lines(out)
            written.setdefault(stem, {}).setdefault(name, lines)
            numbers = judged(lines, tokenizer=tokenizer, writing=own, judge=by and by[:2])
            found.setdefault(stem, {}).setdefault(name, []).append(numbers)
    about = f"{seeds} seeds from {writing.seed} on; {writing}."
    text = page(found, written, f"{about} The judge is {judge}." if judge else about)
    write_json(workdir / "samples.json", found)
    (workdir / "samples.md").write_text(text)
    return text


def judged(
    lines: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Tokenizer,
    writing: Writing,
    judge: tuple[Any, Any] | None = None,
) -> dict[str, float | None]:
    """Numbers of the responses to a set of prompts, of one seed.

    Args:
        lines: as `respond` writes them.
        tokenizer: of their ids.
        writing: how they were written.
        judge: a decoder and its variables, of the same ids; None for none.

    Returns:
        Of `COLUMNS`: "rouge_l", the mean over lines with references; "length", with the end, and
        "stopped", the share of responses with one; "distinct_1" and "distinct_2"; "self_bleu";
        "nll" of a token by the network that wrote it, and "judge_nll" by the judge. None for what
        there is not.

    Raises:
        ValueError: without a line.
    """
    responses = [line["response"] for line in lines]
    count = sum(len(line["ids"]) for line in lines)
    with_references = [line for line in lines if line.get("references")]
    found = {
        "length": count / len(lines),
        "stopped": float(np.mean([line["stopped"] for line in lines])),
        "distinct_1": text.distinct(responses, 1),
        "distinct_2": text.distinct(responses, 2),
        "nll": -sum(line["log_prob"] for line in lines) / count,
        "rouge_l": None,
        "self_bleu": None,
        "judge_nll": None,
    }
    if with_references:
        pairs = ([line[key] for line in with_references] for key in ("response", "references"))
        found["rouge_l"] = float(np.mean(text.rouge_l(*pairs)))
    if sum(bool(x.split()) for x in responses) > 1:
        found["self_bleu"] = text.self_bleu(responses)
    if judge is not None:
        found["judge_nll"] = _nll(*judge, tokenizer, lines, writing) / count
    return {name: None if x != x else x for name, x in found.items()}  # NaN is no JSON


def _nll(
    module: Any,
    variables: Any,
    tokenizer: Tokenizer,
    lines: Sequence[Mapping[str, Any]],
    writing: Writing,
) -> float:
    """The sum over all tokens of all responses, of which one at a time has its logits formed."""
    prompts, total = prompt_ids(tokenizer, lines, writing), 0.0
    length, size = writing.max_prompt + writing.max_new_tokens, writing.batch_size
    for first in range(0, len(lines), size):
        parts = np.zeros((4, size, length), np.int32)
        pairs = zip(prompts[first : first + size], lines[first : first + size], strict=True)
        for row, (prompt, line) in enumerate(pairs):
            whole, places = [*prompt, *line["ids"]], len(prompt) + len(line["ids"])
            parts[:3, row, :places] = whole, np.arange(places), np.ones(places)
            parts[3, row, len(prompt) - 1 : places - 1] = 1
        *inputs, where = map(jnp.asarray, parts)
        total += float(_sum_of_nll(decoder_in(module), variables, Tokens(*inputs), where > 0))
    return total


@functools.partial(jax.jit, static_argnums=0)
def _sum_of_nll(module: Any, variables: Any, inputs: Tokens, where: Array) -> Array:
    outputs = module.apply(variables, inputs, train=False)

    def of_row(row: tuple[Array, Array, Array]) -> Array:
        hidden, ids, counts = row
        log_q = jax.nn.log_softmax(outputs.head(hidden))
        at = jnp.take_along_axis(log_q, jnp.roll(ids, -1)[:, None], axis=-1)[:, 0]
        return -jnp.sum(jnp.where(counts, at, 0.0))

    return jnp.sum(jax.lax.map(of_row, (outputs.hidden, inputs.ids, where)))


def page(
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    written: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    about: str,
) -> str:
    """A page of tables, and of samples of all networks side by side.

    Args:
        found: {set of prompts: {network: its numbers for each seed, of `judged`}}.
        written: {set: {network: lines of the first seed}}.
        about: how it was made.

    Returns:
        Markdown.
    """
    blocks = ["# Samples", about]
    for name, networks in found.items():
        columns = [
            x
            for x in COLUMNS
            if any(seed[x.key] is not None for s in networks.values() for seed in s)
        ]
        rows = [[own, *markdown.cells(columns, *seeds)] for own, seeds in networks.items()]
        header = ["network", *(column.title for column in columns)]
        blocks += [f"## {markdown.plain(name)}", markdown.table(header, rows)]
        for index, line in enumerate(next(iter(written[name].values()))[:_SHOWN]):
            blocks.append(f"**{_short(line['prompt'])}**")
            shown = [("reference", x) for x in line.get("references", ())[:1]]
            shown += [(own, lines[index]["response"]) for own, lines in written[name].items()]
            blocks.append("\n".join(f"- *{own}*: {_short(x)}" for own, x in shown))
    return "\n\n".join(blocks) + "\n"


def _short(said: str) -> str:
    """A text on one line of a page."""
    flat = " ".join(said.split())
    return markdown.plain(flat if len(flat) <= _LONGEST else f"{flat[:_LONGEST]}…") or "(nothing)"


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file that `respond` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]
