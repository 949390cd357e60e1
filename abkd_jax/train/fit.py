"""The training of one phase of a run: steps, rows, evaluations, checkpoints, and how it ends."""

import collections
import contextlib
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import data as datasets
from abkd_jax import schema, train
from abkd_jax.train import evaluation, parallel, probing
from abkd_jax.train.checkpoint import Checkpoints
from abkd_jax.train.interruption import Interruption
from abkd_jax.train.progress import Progress
from abkd_jax.train.step import Networks, Objectives
from abkd_jax.train.workdir import CHECKPOINTS
from abkd_jax.train.writer import Writer

_PROFILED = range(5, 10)  # the steps of a process that a trace shows
_RUN_AHEAD = 2  # calls in flight: enough to hide the host's work, few enough to stop at once


class Run(NamedTuple):
    """What the phases of a run share.

    Attributes:
        config: with every default filled in.
        workdir: its folder.
        data: its data set.
        given: networks that the caller handed over: {name: (apply_fn, variables)}.
        mesh: its devices.
        interruption: the wish to stop.
        profile: whether to trace some steps of the last phase.
    """

    config: Mapping[str, Any]
    workdir: pathlib.Path
    data: datasets.DataSet
    given: Mapping[str, Any]
    mesh: Mesh
    interruption: Interruption
    profile: bool


class Fit(NamedTuple):
    """What stays the same while a phase trains.

    Attributes:
        run: to which it belongs.
        phase: as the schema has it.
        folder: of the phase.
        frozen: the networks that do not learn.
        objectives: of those that do.
        split: the examples.
        size: of a batch.
    """

    run: Run
    phase: schema.Phase
    folder: pathlib.Path
    frozen: Networks
    objectives: Objectives
    split: datasets.Split | datasets.Stream
    size: int


@struct.dataclass
class Carry:
    """What a phase carries from step to step, and what its checkpoints hold.

    Attributes:
        learners: the states of the networks that learn.
        sums: of the metrics of the steps since the last multiple of log_every.
        bad_step: the first step with a metric that is not finite, or after which a parameter is
            not; -1 for none. From then on no network is updated.
        bad: the metrics of that step.
    """

    learners: Networks
    sums: dict[str, Array]
    bad_step: Array
    bad: dict[str, Array]


def begin(learners: Networks, objectives: Objectives) -> Carry:
    """The carry of step 0.

    Args:
        learners: the networks that learn.
        objectives: theirs.

    Returns:
        The carry, with no metric summed.
    """
    names = (
        f"{learner}/{metric}"
        for learner, terms in objectives.items()
        for metric in (*terms, "loss", "gradient_norm")
    )
    zeros = {name: jnp.zeros(()) for name in names}
    return Carry(learners, zeros, jnp.asarray(-1), zeros)


def fit_phase(fit: Fit, carry: Carry, step: int, checkpoints: Checkpoints) -> Carry:
    """Trains from a step to the last.

    Args:
        fit: what stays the same.
        carry: at `step`; its buffers are taken.
        step: how many steps are done.
        checkpoints: of the phase.

    Returns:
        The carry after the last step, which is saved.

    Raises:
        SystemExit: with code 0, if a signal asked to stop, after saving.
        FloatingPointError: one sentence, if a metric was not finite.
        OSError: if a file cannot be written.
    """
    config, run = fit.run.config, fit.run
    feed = datasets.Feed(fit.split, data_seed=config["data_seed"], size=fit.size)
    begun, end, calls = step, config["num_steps"], collections.deque()
    label = " and ".join(fit.phase.learners)
    progress = Progress(label, end, start=step, examples_per_step=fit.size)
    with Writer(fit.folder, step) as writer, progress, _profiler(fit) as profile:
        log = _Log(fit, writer, progress, step)
        while step < end:
            profile(step - begun)
            fed, until = feed(step)
            count = call_length(step, until, config)
            carry, finished = _advance(fit, carry, fed, step, count)
            step += count
            calls.append(finished)
            if len(calls) > _RUN_AHEAD:
                calls.popleft().block_until_ready()
            progress.update(step)
            logs, saves = (
                step % config[every] == 0 or step == end
                for every in ("log_every", "checkpoint_every")
            )
            stops = run.interruption.requested if step < end else None
            if logs or saves or stops:
                _check_finite(fit, carry, feed)
            if logs:
                log.training(carry, step)
            if saves:
                accuracy = log.evaluation(carry, step)
            if saves or stops:
                writer.sync()
                checkpoints.save(step, carry, accuracy=accuracy if saves else None)
            if stops:
                checkpoints.wait()
                print(
                    f"{label}: {stops} at step {step} of {end}, which is saved; the same command "
                    "goes on from there.",
                    file=sys.stderr,
                )
                raise SystemExit(0)
        checkpoints.wait()
    return carry


def call_length(step: int, until: int, config: Mapping[str, Any]) -> int:
    """How many steps the call at this step makes: steps_per_call, or one where they do not fit.

    One or the other, for each length is a compilation; a function of the step, for a scan and
    single steps may round differently and a resumed run is to repeat them.
    """
    length = config["steps_per_call"] or (1 if jax.default_backend() == "cpu" else 10)
    intervals = (config["log_every"], config["checkpoint_every"])
    stop = min(until, config["num_steps"], *((step // n + 1) * n for n in intervals))
    return length if step % length == 0 and step + length <= stop else 1


def _advance(fit: Fit, carry: Carry, fed: Any, step: int, count: int) -> tuple[Carry, Array]:
    """The carry after `count` further steps, and an array that is ready when they are done."""
    return _steps(
        carry,
        fit.frozen,
        fit.objectives,
        fed,
        fit.run.data.preprocess,
        fit.run.config["data_seed"],
        step,
        count=count,
        size=fit.size,
        micro_batches=fit.run.config["micro_batches"],
        log_every=fit.run.config["log_every"],
        mesh=fit.run.mesh,
    )


@functools.partial(
    jax.jit,
    static_argnames=("count", "size", "micro_batches", "log_every", "mesh"),
    donate_argnames="carry",
)
def _steps(
    carry: Carry,
    frozen: Networks,
    objectives: Objectives,
    fed: Any,
    preprocess: datasets.Preprocess,
    data_seed: Array,
    step: Array,
    *,
    count: int,
    size: int,
    micro_batches: int,
    log_every: int,
    mesh: Mesh,
) -> tuple[Carry, Array]:
    """Consecutive steps from `step` on, each on its own batch."""

    def one(carry, step):
        batch = parallel.split(fed.batch(data_seed, step, size, preprocess), mesh)
        networks, metrics = train.train_step(
            carry.learners | frozen, batch, objectives, micro_batches=micro_batches
        )
        learners, bad_step = kept_finite(carry.learners, networks, metrics, carry.bad_step, step)
        first_bad = bad_step != carry.bad_step
        fresh = step % log_every == 0
        return Carry(
            learners=learners,
            sums={n: jnp.where(fresh, 0, x) + metrics[n] for n, x in carry.sums.items()},
            bad_step=bad_step,
            bad=_where(first_bad, metrics, carry.bad),
        )

    if count == 1:
        carry = one(carry, step)
    else:
        carry, _ = jax.lax.scan(lambda c, i: (one(c, i), None), carry, step + jnp.arange(count))
    return carry, carry.bad_step + 0  # a buffer of its own, for the next call takes the carry's


def kept_finite(
    learners: Networks, networks: Networks, metrics: Mapping[str, Array], bad_step: Array, step: Any
) -> tuple[Networks, Array]:
    """The learners after a step, or as they were if it, or one before, was not finite.

    Args:
        learners: before the step.
        networks: after it, the learners among them.
        metrics: of the step.
        bad_step: the first step that was not finite, -1 for none.
        step: this one.

    Returns:
        The learners, and bad_step with this step taken into account.
    """
    new = {name: networks[name] for name in learners}
    params = {name: state.params for name, state in new.items()}
    finite = jnp.all(
        jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((metrics, params))])
    )
    so_far = bad_step < 0
    return _where(finite & so_far, new, learners), jnp.where(~finite & so_far, step, bad_step)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _check_finite(fit: Fit, carry: Carry, feed: datasets.Feed) -> None:
    """Saves the batch of a step that was not finite, and the state before it, and says so."""
    step = int(carry.bad_step)
    if step < 0:
        return
    config, folder = fit.run.config, fit.folder / "nonfinite"
    fed, _ = feed(step)
    batch = fed.batch(config["data_seed"], step, fit.size, fit.run.data.preprocess)
    folder.mkdir(exist_ok=True)
    entries = ("inputs", "labels", "where", "labelled")
    np.savez(folder / f"batch_{step}.npz", **{name: np.asarray(batch[name]) for name in entries})
    saved = Checkpoints(folder / CHECKPOINTS)
    saved.save(step, carry)
    saved.wait()
    saved.close()
    bad = [f"{name} {float(x)}" for name, x in carry.bad.items() if not np.isfinite(x)]
    found = ", ".join(bad) or "the parameters after its update"
    raise FloatingPointError(
        f"step {step} of {' and '.join(fit.phase.learners)} is not finite: {found}. Its batch and "
        f"the state before it are in {folder}; no checkpoint has a later state. Lower the learning "
        "rate, clip the gradient (optimizer.clip_norm), or mend the data."
    )


class _Log:
    """Writes the rows of a phase and shows them.

    With `config.analysis`, each row of training metrics has those of `analysis.probe` beside them,
    and the seconds that they took.
    """

    def __init__(self, fit: Fit, writer: Writer, progress: Progress, step: int):
        self._fit, self._writer, self._progress = fit, writer, progress
        self._step, self._time = step, time.monotonic()
        validation = fit.run.data.validation
        self._name = "test" if validation is None else "validation"
        split = fit.run.data.test if validation is None else validation
        resident = isinstance(split, datasets.Split)
        self._evaluate = functools.partial(
            evaluation.quick,
            split=parallel.replicated(split, fit.run.mesh) if resident else split,
            size=fit.run.config["batch_size"],
            preprocess=fit.run.data.preprocess,
            mesh=fit.run.mesh,
        )
        self._probes = tuple(fit.run.config["analysis"])
        if self._probes:
            batches = probing.probe_batches(
                fit.split,
                data_seed=fit.run.config["data_seed"],
                size=fit.size // fit.run.config["micro_batches"],
                preprocess=fit.run.data.preprocess,
            )
            self._batches = parallel.replicated(batches, fit.run.mesh)

    def training(self, carry: Carry, step: int) -> None:
        """The means of the metrics since the last multiple of log_every."""
        count = (step - 1) % self._fit.run.config["log_every"] + 1
        row = {name: float(x) / count for name, x in jax.device_get(carry.sums).items()}
        for name, state in carry.learners.items():
            row[f"{name}/learning_rate"] = state.opt_state.hyperparams["learning_rate"]
        steps = step - self._step
        self._step = step
        if self._probes:
            row |= self._analysis(carry)
        self._write(step, row, examples=steps * self._fit.size)

    def _analysis(self, carry: Carry) -> dict[str, float]:
        """The probes, and what they cost beside the steps."""
        jax.block_until_ready(carry)
        begun = time.monotonic()
        found = probing.probed(
            carry.learners,
            self._fit.frozen,
            self._batches,
            self._fit.objectives,
            probes=self._probes,
        )
        row = {name: float(value) for name, value in jax.device_get(found).items()}
        return row | {"time/analysis_seconds": time.monotonic() - begun}

    def evaluation(self, carry: Carry, step: int) -> float:
        """The metrics on validation data; returns the accuracy that decides which is best."""
        found = self._evaluate(carry.learners)
        names = ("accuracy", "nll", "ece")
        row = {f"{self._name}/{n}/{m}": values[m] for n, values in found.items() for m in names}
        self._write(step, row)
        accuracies = {name: values["accuracy"] for name, values in found.items()}
        return accuracies.get("student", float(np.mean(list(accuracies.values()))))

    def _write(self, step: int, row: dict[str, float], examples: int | None = None) -> None:
        now = time.monotonic()
        seconds, self._time = now - self._time, now
        row["time/seconds"] = seconds
        if examples is not None:
            stepping = seconds - row.get("time/analysis_seconds", 0.0)
            row["time/images_per_second"] = examples / stepping
        self._writer.write(step, row)
        self._progress.log(step, row)


@contextlib.contextmanager
def _profiler(fit: Fit) -> Iterator[Callable[[int], None]]:
    """A function of the steps done in this process, which traces some of them if it is wanted."""
    wanted, active = fit.run.profile and not fit.phase.name, False

    def profile(done: int) -> None:
        nonlocal active
        if wanted and active != (done in _PROFILED):
            active = not active
            if active:
                jax.profiler.start_trace(str(fit.run.workdir / "profile"))
            else:
                jax.profiler.stop_trace()

    try:
        yield profile
    finally:
        if active:
            jax.profiler.stop_trace()
