"""The command that has networks answer prompts, and judges what they write.

    python -m abkd_jax.samples --networks=teacher=DIR,student=DIR --sets=a.jsonl,b.jsonl \\
        --judge=teacher --workdir=runs/samples

A network is a folder of the Hugging Face hub, or the workdir of a run. The lines of a file have
`prompt`, and maybe `response` or `references`. Each network answers each prompt once for each seed;
workdir/samples.md has means over seeds with their deviation, and the answers side by side. The same
command goes on where it was stopped. The published protocol for instructions is the default:
temperature 1, five seeds, Rouge-L of stemmed words, the best over references.
"""

import functools
import itertools
import json
import pathlib

from absl import app, flags

from abkd_jax.config import command
from abkd_jax.run.responses import Writing, opened, respond
from abkd_jax.run.samples import judged, page, read_lines

_NETWORKS = flags.DEFINE_list("networks", None, "NAME=FOLDER of each.")
_SETS = flags.DEFINE_list("sets", None, "JSON Lines with prompts, each a set.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that is written.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "How many seeds, from --seed on.", lower_bound=1)
_JUDGE = flags.DEFINE_string("judge", "", "Which of the networks judges the texts of all.")
_WRITING = command.define_fields(Writing, "See run.responses.Writing.")
parse = functools.partial(
    command.parse, known=("networks", "sets", "workdir", "seeds", "judge", *Writing._fields)
)


@command.entry
def main() -> None:
    """Writes workdir/NETWORK/SET_SEED.jsonl, samples.json and samples.md, and prints the tables."""
    command.required(_NETWORKS, _SETS, _WORKDIR)
    folders = dict(part.partition("=")[::2] for part in _NETWORKS.value)
    if not all(folders.values()):
        raise ValueError(f"--networks must be NAME=FOLDER,...; found {','.join(_NETWORKS.value)}.")
    if _JUDGE.value and _JUDGE.value not in folders:
        raise ValueError(f"--judge must be one of {', '.join(folders)}; found {_JUDGE.value!r}.")
    found, written, given = {}, {}, _WRITING()
    workdir = pathlib.Path(_WORKDIR.value)
    judge = opened(folders[_JUDGE.value]) if _JUDGE.value else None
    for name, folder in folders.items():
        ready = judge if name == _JUDGE.value else opened(folder)
        *network, tokenizer, template = ready
        if judge and judge[2].vocabulary != tokenizer.vocabulary:
            raise ValueError(
                f"--judge={_JUDGE.value} has other tokens than {name}, and cannot judge its text."
            )
        for path, seed in itertools.product(map(pathlib.Path, _SETS.value), range(_SEEDS.value)):
            how = {"seed": given.seed + seed, "template": given.template or template}
            stem, writing = path.name.partition(".jsonl")[0], given._replace(**how)
            out = workdir / name / f"{stem}_{writing.seed}.jsonl"
            respond(*network, tokenizer, path, out, writing)
            lines = read_lines(out)
            written.setdefault(stem, {}).setdefault(name, lines)
            numbers = judged(lines, tokenizer=tokenizer, writing=writing, judge=judge and judge[:2])
            found.setdefault(stem, {}).setdefault(name, []).append(numbers)
    about = f"{_SEEDS.value} seeds from {given.seed} on; {given}."
    about += f" The judge is {_JUDGE.value}." if judge else ""
    text = page(found, written, about)
    (workdir / "samples.json").write_text(json.dumps(found, indent=1) + "\n")
    (workdir / "samples.md").write_text(text)
    print(text)


if __name__ == "__main__":
    with command.interruptible():
        command.keep_programs()
        app.run(main, flags_parser=parse)
