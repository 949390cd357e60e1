"""A run, from a config to a report: the teachers first, then the student, or all at once."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from abkd_jax import data as datasets
from abkd_jax import models, schema, train
from abkd_jax.train import checkpoint, evaluation, parallel
from abkd_jax.train import workdir as folders
from abkd_jax.train.fit import Run
from abkd_jax.train.phase import Result, describe, opened, run_phase
from abkd_jax.train.step import Networks

_EXAMPLES = 8  # test examples whose distributions the report shows


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

    The first SIGTERM or SIGINT saves and leaves by SystemExit(0).

    Args:
        config: of the run; `abkd_jax.schema` checks it, configs/ has examples.
        workdir: the folder of the run, which is made; not that of another config.
        networks: {name: (apply_fn, variables)} for the networks of the config with model "given":
            any function from variables and inputs to logits, see `models.as_outputs`.
        data: a data set of your own (`data.from_arrays`), in place of the config's.
        evaluate_only: evaluates the newest checkpoints, and trains nothing.
        profile: writes a trace of a few steps of the last phase to workdir/profile.

    Returns:
        What result.json holds: {"networks": {name: {"last": scores, "best": ..., ...}}, ...}.

    Raises:
        ValueError: one sentence, if the config, the workdir or the data cannot be used.
        OSError: one sentence, if a file cannot be written; what was saved before is kept.
        FloatingPointError: one sentence, if a term or gradient is not finite; the batch and the
            state before it are saved in workdir/nonfinite.
    """
    with opened(config, workdir, networks=networks, data=data, profile=profile) as (run, states):
        phases = schema.phases(run.config)
        if evaluate_only and not (run.workdir / "config.json").exists():
            raise ValueError(f"{run.workdir} has no checkpoint to evaluate; train first.")
        folders.claim(run.workdir, describe(run, phases[-1]))
        results = {}
        for phase in phases:
            results[phase.name] = run_phase(run, phase, states, trains=not evaluate_only)
            states |= {n: train.frozen(state) for n, state in results[phase.name].last.items()}
        return _conclude(run, states, results)


def _conclude(run: Run, states: Networks, results: Mapping[str, Result]) -> dict[str, Any]:
    """Evaluates every network on the test set and writes result.json and the report."""
    from abkd_jax.train import report  # matplotlib takes a second, which `import abkd_jax` saves

    last, selected, test = _scored(run, states)
    found = {
        name: {
            "parameters": sum(
                x.size for x in jax.tree.leaves(models.without_projections(state.params))
            ),
            "steps": int(state.step),
            "last": last[name],
            "best": None,
            "sha256": None,
        }
        for name, state in states.items()
    }
    for result in results.values():
        scores, accuracies = last, selected
        if result.best is not result.last:
            scores, accuracies, _ = _scored(run, result.best)
        for name, state in result.last.items():
            best = {"accuracy": accuracies[name], "scores": scores[name]}
            found[name]["best"] = {"step": result.best_step} | best
            parts = ("params", "opt_state", "batch_stats")
            found[name]["sha256"] = {p: checkpoint.digest(getattr(state, p)) for p in parts}
    value = {
        "mode": run.config["mode"],
        "num_classes": run.data.num_classes,
        "class_names": list(run.data.class_names),
        "evaluated_on": "test",
        "selected_on": "test" if run.data.validation is None else "validation",
        "networks": found,
    }
    folders.write_json(run.workdir / "result.json", value)
    _write_examples(run, test)
    report.write(run.workdir)
    return value


def _scored(
    run: Run, networks: Networks
) -> tuple[dict[str, Any], dict[str, float], evaluation.Gathered]:
    """Scores on the test set, accuracies on the data that select, and the test set's logits."""
    how = {"size": run.config["batch_size"], "preprocess": run.data.preprocess, "mesh": run.mesh}
    networks = parallel.replicated(networks, run.mesh)
    test = evaluation.gather(networks, run.data.test, **how)
    selecting, temperatures = test, dict.fromkeys(networks)
    if run.data.validation is not None:
        selecting = evaluation.gather(networks, run.data.validation, **how)
        temperatures = evaluation.temperatures(selecting)
    scores = {
        name: evaluation.scores(test.logits[name], test.labels, temperatures[name])
        for name in networks
    }
    accuracies = {
        name: float(np.mean(np.argmax(selecting.logits[name], axis=-1) == selecting.labels))
        for name in networks
    }
    return scores, accuracies, test


def _write_examples(run: Run, test: evaluation.Gathered) -> None:
    """The first test examples, with the distributions of all networks."""
    batch = next(datasets.evaluation_batches(run.data.test, _EXAMPLES))
    count = int(np.sum(batch["where"]))
    inputs = np.asarray(batch["inputs"])[:count]
    parts = {"labels": test.labels[:count]}
    if inputs.ndim == 4:
        parts["images"] = inputs
    for name, logits in test.logits.items():
        parts[f"probabilities/{name}"] = np.asarray(
            jax.nn.softmax(logits[:count].astype(np.float32))
        )
    np.savez(run.workdir / "examples.npz", **parts)
