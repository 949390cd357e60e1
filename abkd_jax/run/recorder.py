"""What a run tells and keeps of a phase: rows, scores on the way, checkpoints, a bad batch."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from abkd_jax import costs, files, parallel
from abkd_jax import data as datasets
from abkd_jax.config.plan import Phase
from abkd_jax.run import probing
from abkd_jax.run.answers import with_answers
from abkd_jax.run.evaluation import evaluate
from abkd_jax.run.fit import Fit, fit
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.log.writer import Writer
from abkd_jax.run.pace import Pace
from abkd_jax.run.phases import Run, feed, objectives_of, seen_examples, trained_once
from abkd_jax.train import Carry, Networks, Objectives, Programs, Static, hosts, on_bases
from abkd_jax.train.checkpoint import FOLDER, Checkpoints
from abkd_jax.train.sharding import sharded
from abkd_jax.types import named_leaves

_PROFILED = range(5, 10)  # the calls that a trace shows, of `steps_per_call` steps each


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
        frozen: the networks that do not learn in it, see `phases.frozen_in`.
        folder: of the phase.
        checkpoints: of the phase.
        step: how many steps are done.
        carry: at this step; its buffers are taken.

    Returns:
        The carry after the last step, which is saved.

    Raises:
        SystemExit: if a signal asked to stop, after saving.
        FloatingPointError: one sentence, if a metric was not finite.
        OSError: if a file cannot be written.
    """
    config, frozen = run.plan.config, sharded(frozen, run.mesh)
    split, size = seen_examples(run, phase, frozen)
    resident = isinstance(split, datasets.Split)
    split = parallel.replicated(split, run.mesh) if resident else split
    fed = feed(run, split, size)
    objectives, label = objectives_of(run, phase, frozen), " and ".join(phase.learners)
    if config["init_seeds"] > 1 and not trained_once(run, phase):
        label += f" {run.seed + 1} of {config['init_seeds']}"
    score = run.plan.task.score_column
    kept = step or -1  # of a run that begins anew not even the evaluation at step 0
    progress, writer = _Silent(), _Silent()
    if hosts.is_first():
        options = {"examples_per_step": size, "score": score}
        progress = Progress(label, phase.num_steps, start=step, **options)
        writer = Writer(folder, kept)
    with writer, progress, _profiled(fed, run, phase) as profiled:
        sizes = config["micro_batches"], config["log_every"]
        programs = Programs(phase.source, Static(*sizes, run.mesh, config["chunk"]))
        pace = _pace(run, profiled, programs, carry, frozen, objectives, size)
        recorder = _Recorder(
            run, phase, frozen, objectives, pace, size, folder, checkpoints, writer, progress, step
        )
        training = Fit(
            label=label,
            programs=programs,
            frozen=frozen,
            objectives=objectives,
            feed=pace,
            config=config,
            num_steps=phase.num_steps,
            interruption=run.interruption,
            recorder=recorder,
        )
        return fit(training, carry, step, progress)


def _pace(
    run: Run,
    feed: Callable[[int, int], Any],
    programs: Programs,
    carry: Carry,
    frozen: Networks,
    objectives: Objectives,
    size: int,
) -> Pace:
    """The feed of a phase, whose products are counted where the devices' peak is known.

    Not where a source has some of its own, for what a network writes is of no known length.
    """
    shapes, seed = jax.eval_shape(lambda: carry), run.plan.config["data_seed"]
    of_example = run.plan.description.labels.shape

    def rows(examples: Any) -> int:
        shape = of_example if examples.length is None else (examples.length, *of_example[1:])
        return size * math.prod(shape)

    def flops(examples: Any) -> float:
        return programs.products(shapes, frozen, objectives, examples, seed, 0)

    known = costs.peak(run.mesh.devices.flat[0].device_kind) is not None
    counts = known and programs.source.refill is None
    return Pace(feed, rows=rows, flops=flops if counts else None)


@dataclasses.dataclass
class _Recorder:
    """See `fit.Fit`; `step` is how many steps were done when the last row was written.

    With `config.analysis`, each row of training metrics has those of `analysis.probe` beside them,
    and the seconds that they took.
    """

    run: Run
    phase: Phase
    frozen: Networks
    objectives: Objectives
    pace: Pace
    size: int
    folder: pathlib.Path
    checkpoints: Checkpoints
    writer: Any
    progress: Any
    step: int

    def __post_init__(self):
        self.time, self.config = time.monotonic(), self.run.plan.config
        self.earlier = 0.0  # seconds of the steps since the last row of theirs, in other rows
        self.logged = self.phase.source.logged and jax.jit(self.phase.source.logged)
        self.split_name, split = selecting(self.run.data)
        resident = isinstance(split, datasets.Split)
        self.split = parallel.replicated(split, self.run.mesh) if resident else split
        if self.config["analysis"]:
            self.batches = probing.probe_batches(self.run, self.phase)

    def check(self, carry: Carry, step: int) -> None:
        """Saves the batch of a step that was not finite, and the state before it, and says so."""
        bad_step = int(carry.bad_step)
        if bad_step < 0:
            return
        folder, data_seed = self.folder / "nonfinite", self.config["data_seed"]
        taken, _ = self.pace(bad_step)
        batch = self.phase.source.batch(carry.source, taken, data_seed, bad_step)
        arrays = {name: x for name, x in batch.items() if name not in ("key", "outputs")}
        arrays = named_leaves(parallel.fetched(arrays))
        if hosts.is_first():
            folder.mkdir(exist_ok=True)
            files.write_arrays(folder / f"batch_{bad_step}.npz", arrays)
        with Checkpoints(folder / FOLDER) as saved:
            saved.save(bad_step, carry)
            saved.wait()
        bad = [f"{name} {float(x)}" for name, x in carry.bad.items() if not np.isfinite(x)]
        found = ", ".join(bad) or "the parameters after its update"
        raise FloatingPointError(
            f"step {bad_step} of {' and '.join(self.phase.learners)} is not finite: {found}. Its "
            f"batch and the state are in {folder}; no checkpoint has a later state. Lower the "
            "learning rate, clip the gradient (optimizer.clip_norm), or mend the data."
        )

    def log(self, carry: Carry, step: int) -> None:
        """The means of the metrics since the last multiple of log_every."""
        count = (step - 1) % self.config["log_every"] + 1
        row = {name: float(x) / count for name, x in jax.device_get(carry.sums).items()}
        for name, state in carry.learners.items():
            rate = state.opt_state.hyperparams.get("learning_rate")
            row |= {} if rate is None else {f"{name}/learning_rate": float(rate)}
        if self.logged:
            told = parallel.fetched(self.logged(carry.source))
            row |= {f"source/{name}": float(x) for name, x in told.items()}
        done, self.step = step - self.step, step
        if self.config["analysis"]:
            row |= self._analysis(carry)
        self._write(step, row, done)

    def evaluate(self, carry: Carry, step: int) -> tuple[Any, float | None]:
        """The metrics on the data that select, and the score that decides which step is best."""
        if step > self.step:  # since when there is no row of them
            self.earlier += time.monotonic() - self.time
        networks = on_bases(carry.learners, self.frozen)
        found, _ = evaluate(
            networks,
            self.split,
            self.run.plan.task,
            size=self.config["batch_size"],
            preprocess=self.run.data.preprocess,
            mesh=self.run.mesh,
            chunk=self.config["chunk"],
        )
        found, _ = with_answers(found, self.run, networks, self.split)
        self._write(
            step,
            {
                f"{self.split_name}/{name}/{metric}": float(values[metric])
                for name, values in found.items()
                for metric in self.run.plan.task.logged
            },
        )
        names = [self.phase.select] if self.phase.select else list(self.phase.learners)
        scores = [float(self.run.plan.task.score(found[name])) for name in names]
        return found, float(np.mean(scores))

    def save(self, carry: Carry, step: int, score: float | None) -> None:
        """A checkpoint, after all rows."""
        self.writer.sync()
        self.checkpoints.save(step, carry, score=score)

    def wait(self) -> None:
        """Returns when the last checkpoint is complete."""
        self.checkpoints.wait()

    def _analysis(self, carry: Carry) -> dict[str, float]:
        """The probes, and what they cost beside the steps."""
        jax.block_until_ready(carry)
        begun = time.monotonic()
        found = probing.probed(
            carry.learners,
            self.frozen,
            self.batches,
            self.objectives,
            probes=tuple(self.config["analysis"]),
            chunk=self.config["chunk"],
        )
        row = {name: float(value) for name, value in parallel.fetched(found).items()}
        return row | {"time/analysis_seconds": time.monotonic() - begun}

    def _write(self, step: int, row: dict[str, float], done: int = 0) -> None:
        """Writes a row, of so many steps if it is one of theirs."""
        now = time.monotonic()
        seconds, self.time = now - self.time, now
        row["time/seconds"] = seconds
        if done:
            stepping = self.earlier + seconds - row.get("time/analysis_seconds", 0.0)
            row["time/examples_per_second"] = done * self.size / stepping
            row |= self._speed(step, stepping)
            self.earlier = 0.0
        self.writer.write(step, row)
        self.progress.log(step, row)

    def _speed(self, step: int, seconds: float) -> dict[str, float]:
        """Of the steps since the last row of theirs, in these seconds."""
        work, devices, unit = self.pace.since(step), self.run.mesh.devices, self.run.plan.task.unit
        found = {
            "time/waiting_for_data": min(work.waited / seconds, 1.0),
            f"time/{unit}_per_second_per_device": work.rows / seconds / devices.size,
        }
        if work.flops is not None:
            whole = costs.peak(devices.flat[0].device_kind) * devices.size
            found["time/mfu"] = work.flops / seconds / whole
        return found


class _Silent(contextlib.AbstractContextManager):
    """A writer, and a progress, of a process that is not the first."""

    def write(self, step: int, metrics: Any) -> None:
        """Writes nothing."""

    def sync(self) -> None:
        """Nothing was written."""

    def update(self, step: int, **shown: float) -> None:
        """Shows nothing."""

    def log(self, step: int, metrics: Any) -> None:
        """Likewise."""

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


def selecting(data: datasets.DataSet) -> tuple[str, datasets.Split | datasets.Stream]:
    """The data that select: validation where there are any, else test."""
    return ("test", data.test) if data.validation is None else ("validation", data.validation)


@contextlib.contextmanager
def _profiled(feed: Callable, run: Run, phase: Phase) -> Iterator[Callable[[int, int], Any]]:
    """The feed, which traces some of this process's calls on the way if it is wanted."""
    calls = itertools.count()
    with contextlib.ExitStack() as trace:

        def profiled(step: int, most: int) -> Any:
            call = next(calls)
            if call == _PROFILED.start:
                trace.enter_context(jax.profiler.trace(str(run.workdir / "profile")))
            elif call == _PROFILED.stop:
                trace.close()
            return feed(step, most)

        yield profiled if run.profile and not phase.folder else feed
