"""A pretrained decoder to some of its own layers, on instructions: labels, both KLs, alpha-beta.

    python -m experiments.real_pair --workdir=runs/pair --folder=DIR --pairs=FILE

The folder is one of the Hugging Face hub, with its tokenizer; the file is JSON Lines with prompt
and response, of which those with responses of at least 11 words are taken. All students start from
the same layers and learn at once, as learners of one step that share the teacher's forward pass. A
killed run goes on by the same command. What is printed are the tables of test scores out of
WORKDIR/run/report.md, tokens per second and the peak of memory.
"""

import gzip
import json
import pathlib
import resource

import ml_collections
from absl import flags

from abkd_jax import config as configs
from abkd_jax import train_and_evaluate
from abkd_jax.config import command
from abkd_jax.run.log import writer

_FOLDER = flags.DEFINE_string("folder", None, "The teacher's.", required=True)
_PAIRS = flags.DEFINE_string("pairs", None, "Prompts and responses.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
_LAYERS = flags.DEFINE_list("layers", "0,4,8,12,16,20,25,29".split(","), "Which the students keep.")
_STEPS = flags.DEFINE_integer("steps", 300, "Of training.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows", 7, "Of a batch, of --length tokens each.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a row.", lower_bound=2)
_PROMPT = flags.DEFINE_integer("prompt", 48, "Tokens of a prompt, its last.", lower_bound=1)
_HELD_OUT = flags.DEFINE_integer(
    "held_out", 100, "Lines to test; half as many validate.", lower_bound=2
)
_TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
_DIVERGENCES = {
    "forward_kl": dict(fn="forward_kl"),
    "reverse_kl": dict(fn="reverse_kl"),
    "alpha_beta": dict(fn="alpha_beta", alpha=0.2, beta=0.7),
}
_FEWEST_WORDS = 11
_END = "<|endoftext|>"  # which some files have at the end of their responses


def main() -> None:
    """Runs what is missing, and prints what it took."""
    folder = pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        pairs.write_text("".join(_chosen(pathlib.Path(_PAIRS.value))))
    train_and_evaluate(_config(pairs), folder / "run")
    rows = [row for row in writer.read(folder / "run") if "time/examples_per_second" in row]
    rate = sorted(row["time/examples_per_second"] for row in rows)[len(rows) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    blocks = (folder / "run" / "report.md").read_text().split("\n\n")
    print("\n\n".join(block for block in blocks if block.startswith("| network |")))
    print(f"{rate * _LENGTH.value:.0f} tokens/s, peak {peak:.2f} GiB")


def _chosen(path: pathlib.Path) -> list[str]:
    """The lines with long responses."""
    found = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as lines:
        for pair in map(json.loads, lines):
            response = pair["response"].removesuffix(_END).strip()
            if len(response.split()) >= _FEWEST_WORDS:
                found.append(json.dumps({"prompt": pair["prompt"], "response": response}) + "\n")
    return found


def _config(pairs: pathlib.Path) -> ml_collections.ConfigDict:
    whole = dict(fn="hugging_face", folder=_FOLDER.value)
    part = whole | dict(layers=tuple(map(int, _LAYERS.value)))
    adamw = dict(fn="adamw", weight_decay=0.01, decay_all=False, clip_norm=1.0)
    rate = dict(fn="warmup_cosine", value=3e-4, end=0.0, warmup_steps=max(1, _STEPS.value // 10))
    student = dict(model=part, weights=part, optimizer=adamw | dict(learning_rate=rate))
    labels = dict(task=dict(fn="cross_entropy", weight=1.0))
    config = configs.defaults()
    config.update(
        task=dict(fn="language"),
        data=dict(
            fn="text",
            train=f"{pairs}",
            validation=_HELD_OUT.value // 2,
            test=_HELD_OUT.value,
            tokenizer=_FOLDER.value,
            length=_LENGTH.value,
            max_prompt=_PROMPT.value,
            template=_TEMPLATE,
            pack=True,
        ),
        teacher=dict(model=whole, weights=whole),
        labels=student | dict(terms=labels),
        phases=dict(distill=dict(learn=("labels", *_DIVERGENCES), see=("teacher",))),
        batch_size=_ROWS.value,
        num_steps=_STEPS.value,
        checkpoint_every=max(1, _STEPS.value // 12),
        log_every=max(1, _STEPS.value // 30),
    )
    for name, divergence in _DIVERGENCES.items():
        distill = dict(fn="on_logits", weight=1.0, divergence=divergence, other="teacher")
        config[name] = student | dict(terms=dict(distill=distill))
    return config


if __name__ == "__main__":
    command.run(main)
