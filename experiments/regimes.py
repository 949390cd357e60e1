"""Sources of text by losses: what a student writes after it learned from data, or from samples.

    python -m experiments.regimes --workdir=runs/regimes

One teacher of configs/text.py for all, and for each source (the data; the teacher's text; the
student's, half of the time; DistiLLM's) and divergence a sweep, whose members are the init seeds.
Then each student goes on from the first halves of test rows, at temperature 1, and the teacher
judges that. With --figure in place of the table: what alpha does over training and beta to
Self-BLEU, on data (ABKD's figure 6 b and d), each a sweep. With --time: seconds of a training step
of one student for each source, refills among them, over those of the data, in one alternating run;
DistiLLM's with the share of written batches that it begins with. A killed run goes on by the same
command.
"""

import csv
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags
from jax import numpy as jnp

from abkd_jax import figures, load, markdown, timing, train, train_and_evaluate
from abkd_jax.config import command, resolve
from abkd_jax.data import read_tokenizer
from abkd_jax.run.responses import Writing, respond
from abkd_jax.run.samples import judged, read_lines
from abkd_jax.sweep import HISTORY, Program, opened, sweep
from abkd_jax.timing import quartiles

_CONFIG = command.define_config("configs/text.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the runs.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many init seeds.", lower_bound=1)
_FIGURE = flags.DEFINE_bool("figure", False, "The figure in place of the table.")
_TIME = flags.DEFINE_bool("time", False, "The time of the sources in place of the table.")
_OUT = flags.DEFINE_string("out", "experiments/figures/text_figure6.png", "The figure's path.")
_SOURCES = {
    "data": dict(fn="dataset"),
    "SeqKD": dict(fn="generated", by="teacher"),
    "GKD": dict(fn="generated", by="student", fraction=0.5),
    "DistiLLM": dict(fn="adaptive", by="student", threshold=0.2),
}
_LOSSES = {
    "forward_kl": dict(fn="forward_kl"),
    "reverse_kl": dict(fn="reverse_kl"),
    "jensen_shannon": dict(fn="jensen_shannon", teacher_weight=0.5),
    "alpha_beta": dict(fn="alpha_beta", alpha=0.75, beta=0.25),
}
_TERM = "student.terms.distill"
_ALONE = {f"{_TERM}.weight": [1.0]}  # the config's own: the seeds alone are swept
_ALPHAS, _BETAS = [0.25, 0.5, 0.75, 1.0], [0.0, 0.25, 0.5, 0.75]  # the other one as above
_ROUNDS, _STEPS = 3, 60  # of a timing; a turn's steps


def main() -> None:
    """Runs what is missing, and prints a table or draws the figure."""
    folder, config = pathlib.Path(_WORKDIR.value), _CONFIG.value
    with config.unlocked():
        del config.phases["baseline"], config["baseline"]
        alone = config.copy_and_resolve_references()
        del alone.phases["distill"], alone["student"]
    train_and_evaluate(alone, folder / "teacher")
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(_first_halves(config)))
    (_figure if _FIGURE.value else _times if _TIME.value else _table)(config, folder)


def _table(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    header = "source", "loss", "validation NLL", "teacher's NLL of samples", "Self-BLEU", "tokens"
    rows = []
    for source, group in _SOURCES.items():
        for loss, divergence in _LOSSES.items():
            made = _config(config, folder, group, divergence)
            seeds = _learned(made, folder / f"{source}_{loss}", _ALONE)
            columns = ("validation_nll", 3, 1), ("judge_nll", 3, 1), ("self_bleu", 1, 100)
            cells = [_spread(seeds, *column) for column in (*columns, ("length", 1, 1))]
            rows.append((source, loss, *cells))
            print(*rows[-1], sep="  ", flush=True)
    print(f"{_SEEDS.value} init seeds, mean +- deviation\n\n{markdown.table(header, rows)}")


def _figure(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    made = _config(config, folder, _SOURCES["data"], _LOSSES["alpha_beta"])
    alphas, betas = f"{_TERM}.divergence.alpha", f"{_TERM}.divergence.beta"
    sweep(made, folder / "alphas", over={alphas: _ALPHAS}, init_seeds=_SEEDS.value)
    on_the_way, curves = _history(folder / "alphas"), {}
    likelihood = "validation_log_likelihood"
    for alpha in _ALPHAS:
        own = [row for row in on_the_way if row[alphas] == alpha]
        steps = sorted({row["step"] for row in own})
        nlls = [[-row[likelihood] for row in own if row["step"] == step] for step in steps]
        curves[f"alpha {alpha:g}"] = np.asarray(steps), np.mean(nlls, axis=1)
    found = _learned(made, folder / "betas", {betas: _BETAS})
    bleu = np.reshape([100 * row["self_bleu"] for row in found], (len(_BETAS), -1))
    spread = np.std(bleu, 1, ddof=1) if _SEEDS.value > 1 else np.zeros(len(_BETAS))
    means = np.mean(bleu, axis=1)
    last = {f"{_SEEDS.value} seeds": (np.asarray(_BETAS), means, spread)}
    for row in zip(_BETAS, means, spread, strict=True):
        print("beta {:g}: Self-BLEU {:.1f} +- {:.1f}".format(*row))
    for name, (_, nlls) in curves.items():
        print(f"{name}: validation NLL {', '.join(f'{x:.3f}' for x in nlls)}")
    titles = "Validation NLL, beta 0.25", "Self-BLEU of samples, alpha 0.75"
    panels = [
        {"title": titles[0], "x": "step", "y": "NLL (nats/token)", "curves": curves},
        {"title": titles[1], "x": "beta", "y": "Self-BLEU", "curves": last},
    ]
    print(figures.save(figures.lines(panels, height=3.6), _OUT.value))


def _times(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """A step of a student of each source over one on data, refills among them.

    On data the teacher's outputs are computed once, before the first step, as in a run.
    """
    turns = {}
    for name, group in _SOURCES.items():
        made = _config(config, folder, group, _LOSSES["alpha_beta"])
        with opened(made, folder / f"time_{name}", over=_ALONE, init_seeds=1) as program:
            turns[name] = _turn(program)
    seconds = timing.in_turn(turns, _ROUNDS)
    print(f"one student, {_ROUNDS} rounds of {_STEPS} steps: median [quartiles]")
    for name, times in seconds.items():
        ratio = quartiles(times / seconds["data"], ".2f")
        print(f"{name:10}{quartiles(times / _STEPS, '.3f'):>24} s/step{ratio:>22} x data")


def _turn(program: Program) -> Callable[[], Any]:
    """A call that trains the student for some steps from step 0 on.

    By itself and not as a member: of members all write at a step at which one does.
    """
    carry, objectives = jax.tree.map(lambda x: x[0], program.stacked(slice(None)))
    plain = program.programs._replace(members=False)
    how = {"data_seed": 0, "end": _STEPS}

    def call() -> Any:
        own = jax.tree.map(jnp.copy, carry)  # whose buffers are taken
        return train.run_steps(plain, own, program.frozen, objectives, program.feed, **how)

    return call


def _config(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    source: Mapping[str, Any],
    divergence: Mapping[str, Any],
) -> ml_collections.ConfigDict:
    """The students of the teacher, on a source by a divergence."""
    own = ml_collections.ConfigDict(config.to_dict())
    weights = dict(fn="run", workdir=f"{folder}/teacher")
    own.teacher = {"model": own.teacher.model, "weights": weights}
    own.student.terms.distill.divergence = divergence
    own.phases = dict(distill=dict(learn=("student",), see=("teacher",), source=source))
    return own


def _learned(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, over: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """What there is to say of each member of a sweep: its scores, and of what it writes."""
    rows = sweep(config, workdir, over=over, init_seeds=_SEEDS.value)
    judge, tokenizer = load(workdir.parent / "teacher")[:2], read_tokenizer("bytes")
    half = config.data.length // 2
    writing = Writing(max_prompt=half, max_new_tokens=half, batch_size=50)
    for member, row in enumerate(rows):
        own, out = writing._replace(seed=row["init_seed"]), workdir / f"samples_{member}.jsonl"
        network = load(workdir, member=member)[:2]
        respond(*network, tokenizer, workdir.parent / "prompts.jsonl", out, own)
        row |= judged(read_lines(out), tokenizer=tokenizer, writing=own, judge=judge)
    return rows


def _history(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The rows of a sweep's scores on the way."""
    with (workdir / HISTORY).open(newline="") as file:
        return [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]


def _first_halves(config: ml_collections.ConfigDict) -> list[str]:
    """Prompts: those of whole test rows."""
    inputs, tokenizer = resolve(config).data().test.inputs, read_tokenizer("bytes")
    whole = np.asarray(inputs.segments).all(axis=1)
    ids = np.asarray(inputs.ids)[whole, : config.data.length // 2]
    return [json.dumps({"prompt": tokenizer.decode(row.tolist())}) + "\n" for row in ids]


def _spread(seeds: Sequence[Mapping[str, Any]], key: str, digits: int, factor: float) -> str:
    values = factor * np.asarray([seed[key] for seed in seeds])
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    command.run(main)
