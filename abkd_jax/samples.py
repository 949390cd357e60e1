"""The command that has networks answer prompts, and judges what they write.

    python -m abkd_jax.samples --networks=teacher=DIR,student=DIR --sets=a.jsonl,b.jsonl \\
        --judge=teacher --workdir=runs/samples

A network is a folder of the Hugging Face hub, or the workdir of a run (WORKDIR@NETWORK for one by
which it does not select). The lines of a file have `prompt`, and maybe `response` or
`references`. Each network answers each prompt once for each seed; workdir/samples.md has means over
seeds with their deviation, and the answers side by side. The same command goes on where it was
stopped. The published protocol for instructions is the default: temperature 1, five seeds, Rouge-L
of stemmed words, the best over references.
"""

import functools

from absl import app, flags

from abkd_jax.config import command
from abkd_jax.run.responses import Writing
from abkd_jax.run.samples import compared

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
    how = {"seeds": _SEEDS.value, "judge": _JUDGE.value}
    print(compared(folders, _SETS.value, _WORKDIR.value, _WRITING(), **how))


if __name__ == "__main__":
    with command.interruptible():
        command.keep_programs()
        app.run(main, flags_parser=parse)
