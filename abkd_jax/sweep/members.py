"""Many students in one program: a sweep over the numbers of a config and over init seeds.

Students are stacked and advanced by one compiled step, by vmap and over the local devices
(`parallel.spread`). They share the batches, and the forward passes of the networks that teach them.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax import numpy as jnp

from abkd_jax import data as datasets
from abkd_jax import parallel, train
from abkd_jax.checks import require
from abkd_jax.config.dry_run import with_statistics
from abkd_jax.config.plan import Phase
from abkd_jax.config.schema import check_integer, needed, plain, resolve
from abkd_jax.losses import in_chunks
from abkd_jax.run import phases
from abkd_jax.run import workdir as folders
from abkd_jax.run.evaluation import summarized
from abkd_jax.run.fit import Fit, fit
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.loop import run_phase
from abkd_jax.run.phases import Run
from abkd_jax.run.recorder import selecting
from abkd_jax.sweep import memory
from abkd_jax.sweep.plan import Members, map_numbers, planned
from abkd_jax.sweep.table import column, read_rows, shown, write_csv
from abkd_jax.tasks import Task
from abkd_jax.train.checkpoint import FOLDER, Checkpoints

TABLE = "sweep.csv"
HISTORY = "history.csv"
_COMMON = "common"  # the folder by whose lock processes that share a sweep take turns
_EVALUATED = 1000  # rows of a batch of an evaluation: examples, or tokens


def sweep(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    over: Mapping[str, Sequence[float]],
    init_seeds: int | None = None,
    chunk: int = 0,
    processes: int = 1,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
    data: datasets.DataSet | None = None,
) -> list[dict[str, float]]:
    """Trains a student for every combination of numbers and init seeds, or goes on with it.

    A member is what the single run with the same numbers and seeds would train in its last phase
    (an `init_seed` of a network's own goes up with the run's). The phases before are trained once,
    in the workdir; those that the last one does without are left out.

    Args:
        config: of a run; see `train_and_evaluate`.
        workdir: the folder of the sweep, which is made.
        over: {path: values}: numbers of the networks that learn last, such as
            "student.terms.distill.divergence.alpha" or "student.optimizer.learning_rate".
        init_seeds: how many, from the config's `init_seed` on; None for its `init_seeds`.
        chunk: how many members train at once; 0 for as many as memory holds.
        processes: how many run this same call on a workdir that they share. Each trains the chunks
            of members that no other has, without a word between them: where one is lost, the
            others take its members from their newest checkpoint. All return the whole table.
        networks: as for `train_and_evaluate`.
        data: likewise.

    Returns:
        One row for each member, in the order of `over` with seeds the fastest: the swept numbers,
        "init_seed", "validation_*" and "test_*" scores after the last step, and "bad_step", -1 for
        a member that stayed finite. The same table is in workdir/sweep.csv, and the scores on
        validation data on the way in workdir/history.csv.

    Raises:
        ValueError: one sentence, if a path, a value, the config or the workdir cannot be used.
        OSError: one sentence, if a file cannot be written; what was saved before is kept.
        FloatingPointError: one sentence, if a teacher's training is not finite.
        SystemExit: if a signal asked to stop, after saving.
    """
    handed = {"chunk": chunk, "processes": processes, "networks": networks, "data": data}
    with opened(config, workdir, over=over, init_seeds=init_seeds, **handed) as found:
        rows, folder = found.rows(), found.run.workdir
        table = [row["last"] for row in rows]
        with _in_turn(found.run, processes):
            write_csv(folder / TABLE, table)
            write_csv(folder / HISTORY, [line for row in rows for line in row["history"]])
        return table


@contextlib.contextmanager
def opened(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    over: Mapping[str, Sequence[float]],
    init_seeds: int | None = None,
    chunk: int = 0,
    processes: int = 1,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
    data: datasets.DataSet | None = None,
) -> Iterator["Program"]:
    """A sweep, for arguments as of `sweep`, that is alone in its workdir until the context ends.

    Yields:
        Its program, the phases before it trained.
    """
    config = plain(config)
    init_seeds = config["init_seeds"] if init_seeds is None else init_seeds
    check_integer("init_seeds", init_seeds, least=1)
    check_integer("chunk", chunk, least=0)
    check_integer("processes", processes, least=1)
    plan = resolve(needed(config) | {"init_seeds": 1}, networks=networks, data=data)
    expected = "0 in a sweep, whose members write nothing"
    require(not plan.task.responses, "task.responses", expected, plan.task.responses)
    *before, phase = plan.phases
    members = planned(plan, over, init_seeds)
    with phases.opened(plan, workdir, shared=processes > 1) as run:
        states, results = phases.ready(run), {}
        run = phases.with_digests(run, states)
        values = [[path, list(map(float, numbers))] for path, numbers in members.over.items()]
        identity = {"over": values, "init_seeds": init_seeds, "chunk": chunk}
        with _in_turn(run, processes):
            of_all = {"chunk": phases.chunk_of(plan, run.workdir)}  # as the first process chose it
            run = run._replace(plan=run.plan._replace(config=run.plan.config | of_all))
            folders.claim(run.workdir, phases.identity(run, phase) | {"sweep": identity})
            for part in before:
                results[part.name] = run_phase(run, part, states, results)
                states |= results[part.name].last
        states = phases.starting(phase, states, results)
        yield Program(run, phase, states, members, chunk, processes)


@contextlib.contextmanager
def _in_turn(run: Run, processes: int) -> Iterator[None]:
    """Where one process of those that share a sweep works for all, and the others wait for it."""
    with contextlib.ExitStack() as lock:
        for wait in itertools.count() if processes > 1 else ():
            try:
                lock.enter_context(folders.locked(run.workdir / _COMMON, needed=True))
                break
            except folders.Busy:
                if not wait:
                    print(f"{run.workdir}: waits for another process to begin.", file=sys.stderr)
                _pause(run)
        yield


def _pause(run: Run) -> None:
    """Some seconds, or less if a signal asks to stop."""
    for _ in range(20):
        if (stops := run.interruption.requested) is not None:
            raise SystemExit(128 + stops)
        time.sleep(0.1)


class Program:
    """The compiled steps of a sweep, and its chunks.

        carry, objectives = program.stacked(slice(0, 4))
        args = program.programs, carry, program.frozen, objectives, program.feed
        carry = run_steps(*args, data_seed=0, end=100, after=look)

    Attributes:
        run: to which it belongs.
        phase: in which the members learn.
        members: all of them.
        programs: over stacked members, see `train.Programs`.
        frozen: the networks that they see.
        feed: of their examples, see `data.Feed`.
        size: how many of them train at once.
        sums: of their evaluation; the same function for all chunks, for which it is compiled.
    """

    def __init__(
        self,
        run: Run,
        phase: Phase,
        states: train.Networks,
        members: Members,
        chunk: int,
        processes: int,
    ):
        self.run, self.phase, self.members = run, phase, members
        self._states, config = states, run.plan.config
        self.frozen = parallel.everywhere(phases.frozen_in(run, phase, states))
        self._statistics = phases.statistics(run, self.frozen)
        split, size = phases.seen_examples(run, phase, self.frozen)
        split = parallel.everywhere(split) if isinstance(split, datasets.Split) else split
        seed = config["data_seed"]
        self.feed = datasets.Feed(split, run.data.preprocess, data_seed=seed, size=size)
        sizes = {name: config[name] for name in ("micro_batches", "log_every", "chunk")}
        self._size, self._static = size, train.Static(**sizes)
        self.sums = functools.partial(_sums, run.plan.task, config["chunk"])
        self.programs = train.Programs(phase.source, self._static, members=True)
        path, each = run.workdir / "chunk.json", math.ceil(len(members.points) / processes)
        with _in_turn(run, processes):
            self.size = memory.remembered(path, lambda: chunk or min(each, self._fitting()))
        self._processes = processes

    def rows(self) -> list[dict[str, Any]]:
        """Trains all members, or goes on with them: {"last": a row, "history": rows} of each."""
        count, found = len(self.members.points), {}
        parts = [slice(x, min(x + self.size, count)) for x in range(0, count, self.size)]
        if len(parts) < self._processes:
            print(
                f"{self.run.workdir}: of {self._processes} processes {len(parts)} train, for the "
                f"sweep began with {self.size} members at once.",
                file=sys.stderr,
            )
        while len(found) < len(parts):
            before = len(found)
            for part in parts:
                if part.start not in found and (rows := self._trained(part)):
                    found[part.start] = rows
            if len(found) == before:  # others are at the rest; one may be lost
                _pause(self.run)
        return [row for start in sorted(found) for row in found[start]]

    def _fitting(self) -> int:
        """How many members memory holds at once."""
        carry, objectives = jax.tree.map(lambda x: x[0], self.stacked(slice(0, 1)))
        shared = {"examples": self.feed(0)[0], "data_seed": 0, "step": 0, "frozen": self.frozen}
        structure = {"source": self.phase.source, "count": 1, "static": self._static}
        step = functools.partial(train.advance, **shared, **structure)
        return memory.fitting(step, carry, objectives=objectives)

    def _trained(self, part: slice) -> list[dict[str, Any]]:
        """Trains some of the members from where their folder stands; their rows.

        None where another process is at it.
        """
        folder = self.run.workdir / f"members_{part.start:05}"
        done, count = folder / "rows.json", part.stop - part.start
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folders.locked(folder, needed=self._processes > 1))
            except folders.Busy:
                return []
            if len(rows := read_rows(done)) == count:
                return rows
            checkpoints = stack.enter_context(Checkpoints(folder / FOLDER))
            recorder = _Recorder(self, checkpoints, count)
            carry = self._train(checkpoints, recorder, part)
            folders.write_json(done, recorder.rows(carry, self.members.points[part]))
            return read_rows(done)

    def _train(self, checkpoints: Checkpoints, recorder: "_Recorder", part: slice) -> train.Carry:
        """From a step to the last."""
        carry, objectives = self.stacked(part)
        kept = {"carry": carry, "history": recorder.history}
        step, kept = checkpoints.restore(kept) or (0, kept)
        recorder.history = kept["history"]
        label = f"students {part.start + 1} to {part.stop} of {len(self.members.points)}"
        per_step = self._size * (part.stop - part.start)
        score, steps = self.run.plan.task.score_column, self.phase.num_steps
        with Progress(label, steps, start=step, examples_per_step=per_step, score=score) as shown:
            recorder.progress = shown
            # On a device from the first step on, as results are: one placement, one compilation.
            place = jax.local_devices()[0]
            carry, objectives = jax.device_put((kept["carry"], objectives), place)
            training = Fit(
                label=label,
                programs=self.programs,
                frozen=self.frozen,
                objectives=objectives,
                feed=self.feed,
                config=self.run.plan.config,
                num_steps=steps,
                interruption=self.run.interruption,
                recorder=recorder,
            )
            return fit(training, carry, step, shown)

    def stacked(self, part: slice | Sequence[int]) -> tuple[train.Carry, train.Objectives]:
        """Some of the members at step 0, and their objectives."""
        part = np.arange(len(self.members.points))[part]
        count = len(part)
        stack = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))  # noqa: E731
        phase = self.phase._replace(learners=map_numbers(lambda x: x[part], self.members.learners))
        stacked = lambda found, term: stack(self._statistics(found, term))  # noqa: E731
        objectives = with_statistics(phase.objectives, stacked)
        carry = jax.tree.map(stack, train.begin({}, objectives, phase.source))
        return carry.replace(learners=self._new(phase, part)), objectives

    def _new(self, phase: Phase, part: np.ndarray) -> train.Networks:
        """The networks that learn, at step 0, one state for each member."""
        run, own = self.run, self.run.plan.networks

        def new(seeds, learners):
            seeded = {name: own[name]._replace(init_seed=seed) for name, seed in seeds.items()}
            member = run._replace(plan=run.plan._replace(networks=seeded))
            return phases.learners_of(member, phase._replace(learners=learners), self._states)

        seeds = {name: jnp.asarray(numbers[part]) for name, numbers in self.members.seeds.items()}
        without_terms = {name: x._replace(terms={}) for name, x in phase.learners.items()}
        return jax.vmap(new)(seeds, without_terms)


class _Recorder:
    """See `run.fit.Fit`: what is told and kept of the members of a chunk.

    Attributes:
        history: {metric: [members, evaluations]}, NaN for those to come.
        progress: that shows them.
    """

    progress: Progress

    def __init__(self, program: Program, checkpoints: Checkpoints, count: int):
        self._program, self._checkpoints = program, checkpoints
        self._run, self._phase, self._task = program.run, program.phase, program.run.plan.task
        every, last = self._run.plan.config["checkpoint_every"], self._phase.num_steps
        self._steps = [*range(every, last, every), last]
        self._name, self._split = selecting(self._run.data)
        empty = np.full((count, len(self._steps)), np.nan, np.float32)
        metrics = itertools.product(self._phase.learners, self._task.logged)
        self.history = {f"{name}/{metric}": empty.copy() for name, metric in metrics}

    def check(self, carry: train.Carry, step: int) -> None:
        """A member that is not finite stays as it was; the others go on."""

    def log(self, carry: train.Carry, step: int) -> None:
        """Shows how far it is; rows are of evaluations alone."""
        self.progress.log(step, {})

    def evaluate(self, carry: train.Carry, step: int) -> tuple[Any, float | None]:
        """Puts the scores into the history, and the best one into the progress."""
        summary = self._summary(carry, self._split)
        scores = _by_key(summary, self._task)
        for key, values in self.history.items() if step else ():
            values[:, self._steps.index(step)] = scores[key]
        best = float(np.nanmax(self._selecting(scores)))
        self.progress.update(step, **{f"best_{self._task.score_column.key}": best})
        return {name: summary[name] for name in self._phase.learners}, None

    def save(self, carry: train.Carry, step: int, score: float | None) -> None:
        """A checkpoint of all members, and of their history."""
        self._checkpoints.save(step, {"carry": carry, "history": self.history}, score=score)

    def wait(self) -> None:
        """Returns when the last checkpoint is complete."""
        self._checkpoints.wait()

    def rows(self, carry: train.Carry, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """{"last": the row of the table, "history": rows} of each member."""
        splits, named = self._run.data, functools.partial(column, self._phase)
        final = {}
        first, select = self._task.score_column.key, self._phase.select
        for name in ("validation", "test") if splits.validation is not None else ("test",):
            scores = _by_key(self._summary(carry, getattr(splits, name)), self._task)
            column_of_it = named(name, f"{select}/{first}") if select else f"{name}_{first}"
            final[column_of_it] = self._selecting(scores)
            final |= {named(name, key): values for key, values in scores.items()}
        history = {named(self._name, key): values for key, values in self.history.items()}
        rows = []
        for i, point in enumerate(points):
            last = point | {key: shown(values[i]) for key, values in final.items()}
            on_the_way = [
                point | {"step": step} | {key: shown(x[i, index]) for key, x in history.items()}
                for index, step in enumerate(self._steps)
            ]
            bad_step = {"bad_step": int(carry.bad_step[i])}
            rows.append({"last": last | bad_step, "history": on_the_way})
        return rows

    def _selecting(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """The score by which runs select: of one network, or the mean of all that learn."""
        names = [self._phase.select] if self._phase.select else list(self._phase.learners)
        return np.mean([scores[f"{x}/{self._task.score_column.key}"] for x in names], axis=0)

    def _summary(
        self, carry: train.Carry, split: datasets.Split | datasets.Stream
    ) -> dict[str, Any]:
        """The task's summary of every member on a split, stacked."""
        frozen = self._program.frozen
        frozen = {name: x for name, x in frozen.items() if name in self._run.plan.judged}
        sums_of = functools.partial(parallel.spread, self._program.sums, carry.learners, frozen)
        of_example = math.prod(self._run.plan.description.labels.shape)
        size = max(_EVALUATED // of_example, self._run.plan.config["batch_size"])
        batches = datasets.evaluation_batches(
            split, min(size, len(split)), self._run.data.preprocess
        )
        found = summarized(sums_of, self._task, batches)
        return {name: dict(values) for name, values in found.items()}


def _sums(
    task: Task, chunk: int, learners: train.Networks, frozen: train.Networks, batch: Any
) -> Any:
    """The sums of the networks that learn, and of what they have in common with all."""
    judged = lambda outputs, batch: (task.sums(outputs, batch, tuple(learners)), ())  # noqa: E731
    outputs = train.eval_outputs(train.together(learners, frozen), batch)
    return in_chunks(judged, outputs, batch, chunk=chunk)[0]


def _by_key(summary: Mapping[str, Mapping[str, Any]], task: Task) -> dict[str, np.ndarray]:
    """{"student/accuracy": [members], "student|teacher/agreement": ...} of what is a number.

    Of each network, the score that selects comes first.
    """
    pairs = {
        f"{name}|{other}": metrics
        for name, found in summary.items()
        for other, metrics in found.get("pairs", {}).items()
    }
    return {
        f"{name}/{metric}": np.asarray(values)
        for name, metrics in (summary | pairs).items()
        for metric, values in sorted(metrics.items(), key=lambda x: x[0] != task.score_column.key)
        if np.ndim(values) == 1
    }
