"""The command that writes responses.

    python -m abkd_jax.respond --model=DIR --prompts=prompts.jsonl --out=responses.jsonl

The model is a folder of the Hugging Face hub, or the workdir of a run (WORKDIR@NETWORK for one by
which it does not select). The lines of the file have `prompt`, and those that are written
`response` besides, so that they are data to train on (SeqKD). The same command goes on where it was
stopped.
"""

import functools

from absl import app, flags

from abkd_jax.config import command
from abkd_jax.run.responses import Writing, opened, respond

_MODEL = flags.DEFINE_string("model", None, "A Hugging Face folder, WORKDIR or WORKDIR@NETWORK.")
_PROMPTS = flags.DEFINE_string("prompts", None, "JSON Lines, each with a prompt.")
_OUT = flags.DEFINE_string("out", None, "JSON Lines that are written.")
_WRITING = command.define_fields(Writing, "See run.responses.Writing.")
parse = functools.partial(command.parse, known=("model", "prompts", "out", *Writing._fields))


@command.entry
def main() -> None:
    """Writes the responses, and prints how many there are."""
    command.required(_MODEL, _PROMPTS, _OUT)
    *network, template = opened(_MODEL.value)
    writing = _WRITING()
    writing = writing._replace(template=writing.template or template)
    count = respond(*network, _PROMPTS.value, _OUT.value, writing)
    print(f"{_OUT.value}: {count} responses")


if __name__ == "__main__":
    with command.interruptible():
        command.keep_programs()
        app.run(main, flags_parser=parse)
