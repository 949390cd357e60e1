"""A run, from a config to a report: its phases in order, then the evaluation of all networks."""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax import numpy as jnp

from abkd_jax import data as datasets
from abkd_jax import files, models, parallel
from abkd_jax.config.plan import Phase
from abkd_jax.config.schema import identified, resolve
from abkd_jax.config.weights import read_about
from abkd_jax.run import phases
from abkd_jax.run import workdir as folders
from abkd_jax.run.answers import Answers, with_answers
from abkd_jax.run.evaluation import Rows, batches_of, evaluate
from abkd_jax.run.phases import Run
from abkd_jax.run.recorder import selecting, train_phase
from abkd_jax.train import Carry, Networks, begin, frozen, hosts, on_bases
from abkd_jax.train.checkpoint import FOLDER, Checkpoints, digest
from abkd_jax.train.sharding import sharded
from abkd_jax.types import Batch

_EXAMPLES = 8  # test examples that the report shows
_CANDIDATES = 10_000  # of which they are chosen: of a stream, no more are read again


class Result(NamedTuple):
    """What a phase ends with.

    Attributes:
        last: the networks that learned, after the last step.
        best: the same as they were at best_step.
        best_step: of the highest score, on validation data where there are any.
    """

    last: Networks
    best: Networks
    best_step: int


def train_and_evaluate(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
    data: datasets.DataSet | None = None,
    evaluate_only: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates all that a config asks for, or goes on where the workdir stands.

    A run that is done is told at once, and goes on under more `init_seeds` or a larger `num_steps`,
    but not that of a phase from which a later one has learned.

    Several `init_seeds` train one after the other, by the same compiled steps: each the networks of
    `Plan.seeded`, the students of one teacher.

    The first SIGTERM or SIGINT saves and leaves by SystemExit, with code 143 or 130.

    Args:
        config: of the run; `abkd_jax.config.schema` checks it, configs/ has examples.
        workdir: the folder of the run, which is made; not that of another config.
        networks: {name: (apply_fn, variables)} for the networks of the config with
            model=dict(fn="given"): any function from variables and inputs to logits, see
            `models.as_outputs`.
        data: a data set of your own (`data.from_arrays`), in place of the config's.
        evaluate_only: evaluates the newest checkpoints, and trains nothing; where nothing was
            trained, the networks that are given or have weights, and keeps no result.
        profile: writes a trace of a few steps of the last phase to workdir/profile.

    Returns:
        What result.json holds: {"networks": {name: {"last": scores, "best": ..., ...}}, ...}. A
        network that was trained for several seeds is that of the first one, with "seeds", a list of
        all of them, and the "mean" and sample "deviation" of what they have as "last".

    Raises:
        ValueError: one sentence, if the config, the workdir or the data cannot be used.
        OSError: one sentence, if a file cannot be written; what was saved before is kept.
        FloatingPointError: one sentence, if a term or gradient is not finite; the batch and the
            state are saved in workdir/nonfinite.
    """
    folder = files.path_of(workdir)
    hosts.equal({"--evaluate": evaluate_only, "--profile": profile})
    done = None
    if not (evaluate_only or profile):
        done = hosts.by_first(lambda: _done(folder, identified(config, data)))
    if done is not None:
        if hosts.is_first():
            print(
                f"{workdir}: this run is done; with a larger num_steps or init_seeds it goes on, "
                "and evaluating it makes its report anew. Files of data and weights are not "
                "compared.",
                file=sys.stderr,
            )
        return done
    plan = resolve(config, networks=networks, data=data)
    with phases.opened(plan, workdir, profile=profile) as run:
        ready, first, found = hosts.everyone(lambda: phases.ready(run)), {}, []
        run = phases.with_digests(run, ready)
        if evaluate_only and not hosts.agree((run.workdir / "config.json").exists()):
            return _of_ready(run, {n: x for n, x in ready.items() if n in plan.judged})
        about = phases.identity(run, plan.phases[-1])
        hosts.by_first(lambda: _check_lengths(run, about))
        hosts.by_first(lambda: folders.claim(run.workdir, about, longer=not evaluate_only))
        for seed in range(plan.config["init_seeds"]):
            member = phases.of_seed(run, seed)
            results = _run_phases(member, ready, first, trains=not evaluate_only)
            found.append(_evaluated(member, ready, results))
            first = first or results
        if profile and hosts.is_first() and not (run.workdir / "profile").exists():
            print("profile: no trace, for too few steps were left to train.", file=sys.stderr)
        return _conclude(run, found)


def _done(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a run of the config ended with in a folder; None if none has."""
    found = folders.stored(folder)
    if found is None or not folders.is_of(folder, config):
        return None
    for network in found["networks"].values():  # of which some were evaluated on the way
        phase = config["phases"].get(network["phase"], {})
        steps = phase.get("num_steps", config["num_steps"])
        if network["phase"] and any(x["steps"] < steps for x in network.get("seeds", [network])):
            return None
    return found


def _check_lengths(run: Run, about: Mapping[str, Any]) -> None:
    """Refuses more steps of a phase from whose end a later one has begun to learn."""
    if not folders.is_shorter(run.workdir, about):
        return
    config = read_about(run.workdir)["config"]
    for number, phase in enumerate(run.plan.phases):
        steps = config["phases"].get(phase.name, {}).get("num_steps", config["num_steps"])
        for later in run.plan.phases[number + 1 :] if phase.num_steps > steps else ():
            begun = (run.workdir / later.folder / FOLDER).exists()
            if begun and not set(phase.learners).isdisjoint((*later.see, *later.learners)):
                raise ValueError(
                    f"phases.{phase.name}.num_steps must be {steps}, after which the phase "
                    f"{later.name} began in {run.workdir}; found {phase.num_steps}. Give it that "
                    "(a phase without has the config's), or choose another workdir."
                )


def _of_ready(run: Run, ready: Networks) -> dict[str, Any]:
    """The scores of the networks that are there before any training."""
    if not ready:
        raise ValueError(f"{run.workdir} has no checkpoint to evaluate; train first.")
    last, *_ = _scored(run, {name: frozen(state) for name, state in ready.items()}, list(ready))
    networks = {name: {"last": last[name], "published": _published(run, name)} for name in ready}
    return {"networks": networks, "score": run.plan.task.score_column.key}


def _published(run: Run, name: str) -> float | None:
    """The score of a network that its source gives, as the config has it."""
    return run.plan.config[name].get("published")


def _run_phases(
    run: Run, ready: Networks, first: Mapping[str, Result], *, trains: bool
) -> dict[str, Result]:
    """The results of all phases; those that are trained once have that of the first seed."""
    states, results = dict(ready), {}
    for phase in run.plan.phases:
        if run.seed and phases.trained_once(run, phase):
            results[phase.name] = first[phase.name]
        else:
            results[phase.name] = run_phase(run, phase, states, results, trains=trains)
        states |= results[phase.name].last
    return results


def run_phase(
    run: Run,
    phase: Phase,
    states: Networks,
    results: Mapping[str, Result],
    *,
    trains: bool = True,
) -> Result:
    """Trains the networks of a phase from where its folder stands, or only restores them.

    Args:
        run: to which it belongs.
        phase: to train.
        states: what is known of networks so far, see `phases.learners_of`.
        results: of the phases before, by name.
        trains: False to restore alone.

    Returns:
        What it ends with.

    Raises:
        ValueError: one sentence, if there is nothing to restore.
    """
    states = phases.starting(phase, states, results)
    folder = folders.of_seed(run.workdir / phase.folder, run.seed)
    about = phases.identity(run, phase)
    hosts.by_first(lambda: folder.mkdir(exist_ok=True))
    hosts.by_first(lambda: folders.claim(folder, about, longer=trains))
    with Checkpoints(folder / FOLDER) as checkpoints:
        step, carry = _newest(run, phase, states, checkpoints)
        still = phases.frozen_in(run, phase, states)
        if not trains and step == 0:
            raise ValueError(f"{folder} has no checkpoint to evaluate; train first.")
        if trains and step < phase.num_steps:
            carry = train_phase(run, phase, still, folder, checkpoints, step, carry)
            step = phase.num_steps
        best_step, _ = checkpoints.best() or (step, None)
        best = checkpoints.restore_at(best_step, carry) if best_step != step else carry
        last = on_bases(carry.learners, still)
        best = last if best is carry else on_bases(best.learners, still)
        return Result(last, best, best_step)


def _newest(
    run: Run, phase: Phase, states: Networks, checkpoints: Checkpoints
) -> tuple[int, Carry]:
    """How many steps of a phase are done, and the carry then, on the devices.

    Each leaf is a buffer of its own, which training takes; all that it was copied from is let go.
    """
    carry = begin(phases.learners_of(run, phase, states), phase.objectives, phase.source)
    carry = sharded(carry, run.mesh)
    found = checkpoints.restore(carry)
    if found is None:
        return 0, carry
    step, carry = found  # on the host, whose arrays a CPU may take as they are
    return step, jax.tree.map(jnp.copy, sharded(carry, run.mesh))


def _conclude(run: Run, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Writes result.json and the report of what was found for each seed."""
    networks = dict(found[0])
    for name in run.plan.seeded if len(found) > 1 else ():
        seed = run.plan.networks[name].init_seed
        seeds = [{"init_seed": seed + i} | x[name] for i, x in enumerate(found)]
        networks[name] = networks[name] | {"seeds": seeds} | _spread([x["last"] for x in seeds])
    path = run.workdir / "result.json"

    def written() -> dict[str, Any]:
        from abkd_jax import report  # matplotlib takes a second, which `import abkd_jax` saves

        folders.write_json(path, _header(run) | {"networks": networks})
        report.write(run.workdir, run.plan.task)
        return json.loads(path.read_text())

    return hosts.by_first(written)


def _spread(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean and the sample deviation of each score."""
    of_all = lambda f: jax.tree.map(lambda *x: float(f(x)), *scores)  # noqa: E731
    return {"mean": of_all(np.mean), "deviation": of_all(functools.partial(np.std, ddof=1))}


def _evaluated(run: Run, ready: Networks, results: Mapping[str, Result]) -> dict[str, Any]:
    """What result.json says of each network that a seed has of its own, and of all in the first."""
    states = dict(ready)
    for result in results.values():
        states |= result.last
    own = [name for name in run.plan.judged if not run.seed or name in run.plan.seeded]
    networks = {name: frozen(states[name]) for name in run.plan.judged}
    last, chosen, rows, texts = _scored(run, networks, own)
    found = {
        name: {
            "parameters": sum(
                x.size
                for x in jax.tree.leaves((models.without_projections(state.params), state.base))
            ),
            "steps": int(state.step),
            "last": last[name],
            "published": _published(run, name),
            "best": None,
            "sha256": None,
            "phase": None,
        }
        for name, state in networks.items()
        if name in own
    }
    score = run.plan.task.score
    latest = {name: phase for phase in run.plan.phases for name in phase.learners}
    for phase in run.plan.phases:
        result, scores, summary = results[phase.name], last, chosen
        learned = {n: x for n, x in result.last.items() if latest[n] is phase and n in found}
        if learned and result.best is not result.last:
            best = {name: result.best[name] for name in learned}
            scores, summary, *_ = _scored(run, best, list(best))
        for name, state in learned.items():
            best = {"score": float(score(summary[name])), "scores": scores[name]}
            found[name]["best"] = {"step": result.best_step} | best
            found[name]["phase"] = phase.name
            parts = ("params", "opt_state", "batch_stats")
            found[name]["sha256"] = {p: digest(getattr(state, p)) for p in parts}
    if run.seed == 0:
        _write_examples(run, rows, texts)
    return found


def _header(run: Run) -> dict[str, Any]:
    """What result.json says of the run as a whole."""
    parts = [
        {
            "name": phase.name,
            "folder": phase.folder,
            "learn": list(phase.learners),
            "see": list(phase.see),
            "split": phase.split,
            "seeds": 1 if phases.trained_once(run, phase) else run.plan.config["init_seeds"],
        }
        for phase in run.plan.phases
    ]
    return {
        "phases": parts,
        "num_classes": run.data.num_classes,
        "class_names": list(run.data.class_names),
        "evaluated_on": "test",
        "selected_on": selecting(run.data)[0],
        "score": run.plan.task.score_column.key,
    }


def _scored(
    run: Run, networks: Networks, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], Rows, Answers | None]:
    """Scores of some networks, beside all of these, on the test set; the summary on the data that
    select; the test's rows, and what networks answered to its prompts."""
    networks, task = sharded(networks, run.mesh), run.plan.task
    how = {"size": run.plan.config["batch_size"], "preprocess": run.data.preprocess}
    how |= {"mesh": run.mesh, "names": names, "gather": True, "chunk": run.plan.config["chunk"]}
    summary, rows = evaluate(networks, run.data.test, task, **how)
    summary, texts = with_answers(summary, run, networks, run.data.test)
    chosen, chosen_rows = summary, {}
    if run.data.validation is not None:
        chosen, chosen_rows = evaluate(networks, run.data.validation, task, **how)
        chosen, _ = with_answers(chosen, run, networks, run.data.validation)
    scores = {name: task.scores(summary[name], rows[name], chosen_rows.get(name)) for name in names}
    return scores, chosen, rows, texts


def _write_examples(run: Run, rows: Rows, texts: Answers | None) -> None:
    """A few test examples as the task shows them: those that it finds most notable, in this order.

    With "positions", theirs among the rows that count, and "candidates", of how many; and maybe the
    first `Answers`, as arrays.
    """
    task = run.plan.task
    candidates = jax.tree.map(lambda x: x[:_CANDIDATES], rows)
    count = len(jax.tree.leaves(candidates)[0])
    positions = np.arange(min(_EXAMPLES, count))
    if task.notable is not None:
        worth = np.nan_to_num(task.notable(candidates), nan=-np.inf)
        positions = np.argsort(-worth, kind="stable")[:_EXAMPLES]
    batch = _examples_at(run, positions)
    arrays = task.sample(jax.tree.map(lambda x: x[positions], candidates), batch)
    choice = {"positions": positions, "candidates": np.asarray(count)}
    arrays |= texts.arrays(_EXAMPLES) if texts else {}
    if hosts.is_first():
        arrays |= choice if task.notable else {}
        files.write_arrays(run.workdir / "examples.npz", arrays)


def _examples_at(run: Run, positions: np.ndarray) -> Batch:
    """The test examples to which rows belong, as they are stored, by the rows' positions.

    With "place", where in its example each row stands, for examples of several rows.
    """
    found, first = {}, 0
    for batch in batches_of(run.data.test, run.plan.config["batch_size"], run.mesh):
        stored = {name: value for name, value in batch.items() if name != "outputs"}
        stored = parallel.fetched(stored)
        owners = np.argwhere(stored["where"])
        for position in positions[(positions >= first) & (positions < first + len(owners))]:
            owner, *place = owners[position - first]
            example = jax.tree.map(lambda x, owner=owner: np.asarray(x[owner]), stored)
            found[position] = example | {"place": np.asarray(place, int)}
        first += len(owners)
        if len(found) == len(positions):
            break
    return jax.tree.map(lambda *x: np.stack(x), *(found[position] for position in positions))
