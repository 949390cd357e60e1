"""A pretrained decoder to some of its own layers, on instructions: labels, both KLs, alpha-beta.

    python -m experiments.real_pair --workdir=runs/pair --folder=DIR --pairs=FILE

The folder is one of the Hugging Face hub, with its tokenizer; the file is JSON Lines with prompt
and response, of which those with responses of at least 11 words are taken. All students start from
the same layers and learn at once, as learners of one step that share the teacher's forward pass. A
killed run goes on by the same command; other pairs or questions need another workdir. What is
printed are the tables of test scores out of WORKDIR/run/report.md, tokens per second and the peak
of memory.

With --questions=FILE, JSON Lines with prompt and response or as Self-Instruct has them, of which
the first --count of at most 256 characters are taken, the students of forward KL and alpha-beta go
on for --on_policy steps, half of the batches with responses of their own. Then the teacher and all
students but that of reverse KL answer the questions in at most 128 tokens at temperature 1, for
five seeds, and what is printed besides are Rouge-L and what else `abkd_jax.samples` says.
"""

import gzip
import json
import pathlib
import resource
from collections.abc import Iterable

import ml_collections
from absl import flags

from abkd_jax import config as configs
from abkd_jax import files, train_and_evaluate
from abkd_jax.config import command
from abkd_jax.run.log import writer
from abkd_jax.run.responses import Writing
from abkd_jax.run.samples import compared

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
_QUESTIONS = flags.DEFINE_string("questions", None, "Prompts and responses to evaluate by.")
_COUNT = flags.DEFINE_integer("count", 100, "Of the questions, the first.", lower_bound=1)
_ON_POLICY = flags.DEFINE_integer("on_policy", 100, "Steps on own responses.", lower_bound=1)
_TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
_DIVERGENCES = {
    "forward_kl": dict(fn="forward_kl"),
    "reverse_kl": dict(fn="reverse_kl"),
    "alpha_beta": dict(fn="alpha_beta", alpha=0.2, beta=0.7),
}
_ON = ("forward_kl", "alpha_beta")  # which go on with text of their own
_FEWEST_WORDS = 11
_LONGEST = 256  # characters of a question
_SEEDS = 5
_ANSWERS = Writing(template=_TEMPLATE, max_prompt=128, max_new_tokens=128, batch_size=20)
_END = "<|endoftext|>"  # which some files have at the end of their responses


def main() -> None:
    """Runs what is missing, and prints what it took."""
    folder = pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    _keep(pairs, _chosen(pathlib.Path(_PAIRS.value)), "--pairs")
    questions = folder / "questions.jsonl"
    if _QUESTIONS.value:
        _keep(questions, _questions(pathlib.Path(_QUESTIONS.value)), "--questions")
    train_and_evaluate(_config(pairs), folder / "run")
    rows = [row for row in writer.read(folder / "run") if "time/examples_per_second" in row]
    rate = sorted(row["time/examples_per_second"] for row in rows)[len(rows) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(_tables((folder / "run" / "report.md").read_text()))
    print(f"{rate * _LENGTH.value:.0f} tokens/s, peak {peak:.2f} GiB")
    if _QUESTIONS.value:
        print(_tables(_answers(folder, pairs, questions)))


def _keep(path: pathlib.Path, lines: Iterable[str], flag: str) -> None:
    """Writes a file, or finds that it has these lines."""
    text = "".join(lines).encode()
    if path.exists() and path.read_bytes() != text:
        raise ValueError(f"{path} has other lines than {flag} gives; choose another --workdir.")
    files.write(path, text)


def _answers(folder: pathlib.Path, pairs: pathlib.Path, questions: pathlib.Path) -> str:
    """Trains on, and the page of what is answered then."""
    networks = {"teacher": _FOLDER.value}
    networks |= {name: f"{folder / 'run'}@{name}" for name in ("labels", *_ON)}
    for name in _ON:
        networks[f"{name}, on-policy"] = f"{folder / name}"
        train_and_evaluate(_on_policy(pairs, folder / "run", name), folder / name)
    how = {"seeds": _SEEDS, "judge": "teacher"}
    return compared(networks, [f"{questions}"], folder / "samples", _ANSWERS, **how)


def _on_policy(pairs: pathlib.Path, workdir: pathlib.Path, name: str) -> ml_collections.ConfigDict:
    """A student of the run, that goes on by its divergence, half of the time on its own text."""
    config, steps = _config(pairs), _ON_POLICY.value
    source = dict(fn="generated", by="student", fraction=0.5)
    rate = dict(fn="warmup_cosine", value=1e-4, end=0.0, warmup_steps=max(1, steps // 10))
    with config.unlocked():
        student = config[name].to_dict() | dict(
            weights=dict(fn="run", workdir=f"{workdir}", network=name)
        )
        student["optimizer"]["learning_rate"] = rate
        config.student = student
        for other in ("labels", *_DIVERGENCES):
            del config[other]
        config.phases = dict(distill=dict(learn=("student",), see=("teacher",), source=source))
        config.data.pack = False  # a row is a prompt
        config.num_steps, config.checkpoint_every = steps, max(1, steps // 4)
        config.log_every = max(1, steps // 20)
    return config


def _tables(page: str) -> str:
    return "\n\n".join(block for block in page.split("\n\n") if block.startswith("| network |"))


def _chosen(path: pathlib.Path) -> list[str]:
    """The lines with long responses."""
    found = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as lines:
        for pair in map(json.loads, lines):
            response = pair["response"].removesuffix(_END).strip()
            if len(response.split()) >= _FEWEST_WORDS:
                found.append(json.dumps({"prompt": pair["prompt"], "response": response}) + "\n")
    return found


def _questions(path: pathlib.Path) -> list[str]:
    """The lines with short prompts, as `respond` takes them."""
    found = []
    for line in map(json.loads, path.read_text().splitlines()):
        if "instances" in line:  # as Self-Instruct has them
            first = line["instances"][0]
            prompt = "\n\n".join(filter(None, (line["instruction"], first["input"])))
            line = {"prompt": prompt, "references": [first["output"]]}
        if len(line["prompt"]) <= _LONGEST:
            found.append(json.dumps(line) + "\n")
    return found[: _COUNT.value]


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
