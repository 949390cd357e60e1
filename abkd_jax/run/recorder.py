"""What a run tells and keeps of a phase: rows, scores on the way, checkpoints, a bad batch."""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from abkd_jax import data as datasets
from abkd_jax import parallel
from abkd_jax.config.plan import Phase
from abkd_jax.run import probing
from abkd_jax.run.evaluation import evaluate
from abkd_jax.run.fit import Fit, fit
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.log.writer import Writer
from abkd_jax.run.phases import Run, examples, objectives_of
from abkd_jax.train import Carry, Networks, Objectives, Programs, Static
from abkd_jax.train.checkpoint import FOLDER, Checkpoints

_PROFILED = range(5, 10)  # the steps of a process that a trace shows


def train_phase(
    run: Run,
    phase: Phase,
    frozen: Networks,
    folder: pathlib.Path,
    checkpoints: Checkpoints,
    step: int,
    carry: Carry,
) -> Carry:
    """Trains the networks of a phase of a run, from a step to its last.

    Args:
        run: to which the phase belongs.
        phase: to train.
        frozen: the networks that it sees.
        folder: of the phase.
        checkpoints: of the phase.
        step: how many steps are done.
        carry: at this step.

    Returns:
        The carry after the last step, which is saved.

    Raises:
        SystemExit: with code 0, if a signal asked to stop, after saving.
        FloatingPointError: one sentence, if a metric was not finite.
        OSError: if a file cannot be written.
    """
    config, replicated = run.plan.config, functools.partial(parallel.replicated, mesh=run.mesh)
    split, size = examples(run, phase)
    split = replicated(split) if isinstance(split, datasets.Split) else split
    feed = datasets.Feed(split, run.data.preprocess, data_seed=config["data_seed"], size=size)
    frozen = replicated(frozen)
    objectives, label = objectives_of(run, phase, frozen), " and ".join(phase.learners)
    score = run.plan.task.score_column
    progress = Progress(label, phase.num_steps, start=step, examples_per_step=size, score=score)
    with Writer(folder, step) as writer, progress, _profiled(feed, run, phase) as profiled:
        recorder = _Recorder(
            run, phase, frozen, objectives, feed, size, folder, checkpoints, writer, progress, step
        )
        training = Fit(
            label=label,
            programs=Programs(
                phase.source, Static(config["micro_batches"], config["log_every"], run.mesh)
            ),
            frozen=frozen,
            objectives=objectives,
            feed=profiled,
            config=config,
            num_steps=phase.num_steps,
            interruption=run.interruption,
            recorder=recorder,
        )
        owned = replicated(jax.tree.map(jax.numpy.copy, carry))  # for each buffer is donated
        return fit(training, owned, step, progress)


class _Recorder:
    """See `fit.Recorder`.

    With `config.analysis`, each row of training metrics has those of `analysis.probe` beside them,
    and the seconds that they took.
    """

    def __init__(
        self,
        run: Run,
        phase: Phase,
        frozen: Networks,
        objectives: Objectives,
        feed: datasets.Feed,
        size: int,
        folder: pathlib.Path,
        checkpoints: Checkpoints,
        writer: Writer,
        progress: Progress,
        step: int,
    ):
        self._run, self._phase, self._frozen, self._objectives = run, phase, frozen, objectives
        self._feed, self._size, self._folder = feed, size, folder
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._step, self._time = step, time.monotonic()
        self._config, self._task = run.plan.config, run.plan.task
        self._split_name, split = selecting(run.data)
        resident = isinstance(split, datasets.Split)
        self._split = parallel.replicated(split, run.mesh) if resident else split
        self._probes = tuple(self._config["analysis"])
        if self._probes:
            batches = probing.probe_batches(
                examples(run, phase)[0],
                run.data.preprocess,
                data_seed=self._config["data_seed"],
                size=size // self._config["micro_batches"],
            )
            self._batches = parallel.replicated(batches, run.mesh)

    def check(self, carry: Carry, step: int) -> None:
        """Saves the batch of a step that was not finite, and the state before it, and says so."""
        bad_step = int(carry.bad_step)
        if bad_step < 0:
            return
        folder, data_seed = self._folder / "nonfinite", self._config["data_seed"]
        fed, _ = self._feed(bad_step)
        batch = self._phase.source.batch(carry.source, fed, data_seed, bad_step)
        folder.mkdir(exist_ok=True)
        arrays = {name: x for name, x in batch.items() if name not in ("key", "outputs")}
        named = jax.tree.leaves_with_path(arrays)
        keyed = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        np.savez(
            folder / f"batch_{bad_step}.npz", **{keyed(path): np.asarray(x) for path, x in named}
        )
        with Checkpoints(folder / FOLDER) as saved:
            saved.save(bad_step, carry)
            saved.wait()
        bad = [f"{name} {float(x)}" for name, x in carry.bad.items() if not np.isfinite(x)]
        found = ", ".join(bad) or "the parameters after its update"
        raise FloatingPointError(
            f"step {bad_step} of {' and '.join(self._phase.learners)} is not finite: {found}. Its "
            f"batch and the state are in {folder}; no checkpoint has a later state. Lower the "
            "learning rate, clip the gradient (optimizer.clip_norm), or mend the data."
        )

    def log(self, carry: Carry, step: int) -> None:
        """The means of the metrics since the last multiple of log_every."""
        count = (step - 1) % self._config["log_every"] + 1
        row = {name: float(x) / count for name, x in jax.device_get(carry.sums).items()}
        for name, state in carry.learners.items():
            rate = state.opt_state.hyperparams.get("learning_rate")
            row |= {} if rate is None else {f"{name}/learning_rate": float(rate)}
        done, self._step = step - self._step, step
        if self._probes:
            row |= self._analysis(carry)
        self._write(step, row, examples=done * self._size)

    def evaluate(self, carry: Carry, step: int) -> tuple[Any, float | None]:
        """The metrics on the data that select, and the score that decides which step is best."""
        found, _ = evaluate(
            carry.learners,
            self._split,
            self._task,
            size=self._config["batch_size"],
            preprocess=self._run.data.preprocess,
            mesh=self._run.mesh,
        )
        self._write(
            step,
            {
                f"{self._split_name}/{name}/{metric}": float(values[metric])
                for name, values in found.items()
                for metric in self._task.logged
            },
        )
        return found, selected(self._phase, self._task.score, found)

    def save(self, carry: Carry, step: int, score: float | None) -> None:
        """A checkpoint, after all rows."""
        self._writer.sync()
        self._checkpoints.save(step, carry, score=score)

    def wait(self) -> None:
        """Returns when the last checkpoint is complete."""
        self._checkpoints.wait()

    def _analysis(self, carry: Carry) -> dict[str, float]:
        """The probes, and what they cost beside the steps."""
        jax.block_until_ready(carry)
        begun = time.monotonic()
        found = probing.probed(
            carry.learners, self._frozen, self._batches, self._objectives, probes=self._probes
        )
        row = {name: float(value) for name, value in jax.device_get(found).items()}
        return row | {"time/analysis_seconds": time.monotonic() - begun}

    def _write(self, step: int, row: dict[str, float], examples: int | None = None) -> None:
        now = time.monotonic()
        seconds, self._time = now - self._time, now
        row["time/seconds"] = seconds
        if examples is not None:
            stepping = seconds - row.get("time/analysis_seconds", 0.0)
            row["time/examples_per_second"] = examples / stepping
        self._writer.write(step, row)
        self._progress.log(step, row)


def selecting(data: datasets.DataSet) -> tuple[str, datasets.Split | datasets.Stream]:
    """The data that select: validation where there are any, else test."""
    return ("test", data.test) if data.validation is None else ("validation", data.validation)


def selected(
    phase: Phase, score: Callable[[Mapping[str, Any]], Any], summary: Mapping[str, Any]
) -> float:
    """The score that selects a step of a phase: that of one network, or the mean over learners."""
    names = [phase.select] if phase.select else list(phase.learners)
    return float(np.mean([float(score(summary[name])) for name in names]))


@contextlib.contextmanager
def _profiled(feed: datasets.Feed, run: Run, phase: Phase) -> Iterator[Callable[[int], Any]]:
    """The feed, which traces some of this process's steps on the way if it is wanted."""
    wanted, active, calls = run.profile and not phase.folder, False, 0

    def profiled(step: int) -> Any:
        nonlocal active, calls
        if wanted and active != (calls in _PROFILED):
            active = not active
            if active:
                jax.profiler.start_trace(str(run.workdir / "profile"))
            else:
                jax.profiler.stop_trace()
        calls += 1
        return feed(step)

    try:
        yield profiled
    finally:
        if active:
            jax.profiler.stop_trace()
