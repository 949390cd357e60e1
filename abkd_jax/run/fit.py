"""Training from a step to the last: when to tell, to evaluate, to save and to stop."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from abkd_jax.run.interruption import Interruption
from abkd_jax.run.log.progress import Progress
from abkd_jax.train import Carry, Networks, Objectives, Programs, hosts, run_steps


class Fit(NamedTuple):
    """A training, its examples and its recorder.

    Attributes:
        label: what learns, in words.
        programs: compiled.
        frozen: the networks that do not learn.
        objectives: of those that do.
        feed: of the examples, see `run_steps`.
        config: of the run, for its intervals and seeds.
        num_steps: of the training.
        interruption: the wish to stop.
        recorder: what is told and kept besides the steps, of a run or of a sweep's members, by its
            methods: `check(carry, step)` before anything is told or kept, which may end the
            training; `log(carry, step)` tells the metrics of the last steps; `evaluate(carry,
            step)` tells the scores and returns the summary by network and the score that selects
            (or None); `save(carry, step, score)` keeps the carry in the background; `wait()`
            returns when all is kept.
    """

    label: str
    programs: Programs
    frozen: Networks
    objectives: Objectives
    feed: Callable[[int, int], tuple[Any, int]]
    config: Mapping[str, Any]
    num_steps: int
    interruption: Interruption
    recorder: Any


def fit(training: Fit, carry: Carry, step: int, progress: Progress) -> Carry:
    """Trains from a step to the last.

    Args:
        training: what stays the same.
        carry: at `step`; its buffers are taken.
        step: how many steps are done.
        progress: that shows it.

    Returns:
        The carry after the last step, which is kept.

    Raises:
        SystemExit: if a signal asked to stop, after saving; with the code of a shell for it.
        FloatingPointError: one sentence, if the recorder says so.
        OSError: if a file cannot be written.
    """
    config, end, recorder = training.config, training.num_steps, training.recorder
    source, wishes = training.programs.source, hosts.Wishes(training.programs.static.mesh)

    def told(carry: Carry, step: int) -> tuple[Carry, float | None]:
        summary, score = recorder.evaluate(carry, step)
        if source.evaluated:
            carry = training.programs.evaluated(carry, summary)
        return carry, score

    def after(carry: Carry, step: int) -> Carry:
        progress.update(step)
        logs, saves = (
            step % config[every] == 0 or step == end for every in ("log_every", "checkpoint_every")
        )
        stops = wishes.agreed(training.interruption.requested) if step < end else None
        if not (logs or saves or stops):
            return carry
        carry, score = training.programs.confirmed(carry, step), None
        recorder.check(carry, step)
        if logs:
            recorder.log(carry, step)
        if saves:
            carry, score = told(carry, step)
        if saves or stops:
            recorder.save(carry, step, score)
        if stops:
            recorder.wait()
            print(
                f"{training.label}: {stops.name} at step {step} of {end}, which is saved; the same "
                "command goes on from there.",
                file=sys.stderr,
            )
            raise SystemExit(128 + stops)  # as a shell has it: 130 for SIGINT, 143 for SIGTERM
        return carry

    if source.evaluated and step == 0:
        carry, _ = told(carry, 0)  # never a candidate for the best
    carry = run_steps(
        training.programs,
        carry,
        training.frozen,
        training.objectives,
        training.feed,
        data_seed=config["data_seed"],
        start=step,
        end=end,
        length=config["steps_per_call"] or (1 if jax.default_backend() == "cpu" else 10),
        intervals=(config["log_every"], config["checkpoint_every"]),
        after=after,
    )
    recorder.wait()
    return carry
