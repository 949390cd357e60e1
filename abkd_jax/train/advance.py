"""Consecutive training steps: what runs, sweeps and experiments call, and the only loop over them.

Everything that a step does is a function of the carry, the host's examples, `data_seed` and the
step, so that a run which was stopped goes on as if it had not been.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import struct
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import costs, parallel
from abkd_jax.sources import Source
from abkd_jax.train.sharding import shardings
from abkd_jax.train.state import with_base
from abkd_jax.train.step import Networks, Objectives, all_finite, together, train_step
from abkd_jax.types import Batch

_RUN_AHEAD = 2  # calls in flight: enough to hide the host's work, few enough to stop at once


@struct.dataclass
class Carry:
    """What training carries from step to step, and what checkpoints hold.

    Attributes:
        learners: the states of the networks that learn.
        source: the state of the source of batches.
        sums: of the metrics of the steps since the last multiple of log_every.
        bad_step: the first step with a metric that is not finite; -1 for none. From this step on no
            network is updated.
        bad: the metrics of that step.
    """

    learners: Networks
    source: Any
    sums: dict[str, Array]
    bad_step: Array
    bad: dict[str, Array]


class Static(NamedTuple):
    """What of the steps is structure, and part of the compiled program.

    Attributes:
        micro_batches: into how many parts a batch is split.
        log_every: how many steps the sums are over.
        mesh: over which batches are split; None for none.
        chunk: of how many rows logits are formed at a time, see `train_step`.
    """

    micro_batches: int = 1
    log_every: int = 1
    mesh: Mesh | None = None
    chunk: int = 0


def begin(learners: Networks, objectives: Objectives, source: Source) -> Carry:
    """The carry of step 0.

    Args:
        learners: the networks that learn.
        objectives: theirs.
        source: of the batches.

    Returns:
        The carry, with no metric summed, and with a copy of what it is given.
    """
    names = (
        f"{learner}/{metric}"
        for learner, terms in objectives.items()
        for metric in (*terms, "loss", "gradient_norm")
    )
    zeros = {name: jnp.zeros(()) for name in names}
    # With a type of its own: a step's result has, and would be compiled for once more.
    carry = Carry(learners, source.init(), zeros, jnp.asarray(-1, jnp.int32), zeros)
    return jax.tree.map(jnp.copy, carry)  # each leaf a buffer of its own, which training takes


def advance(
    carry: Carry,
    frozen: Networks,
    objectives: Objectives,
    source: Source,
    examples: Any,
    data_seed: int | Array,
    step: int | Array,
    *,
    count: int,
    static: Static,
) -> Carry:
    """The carry after `count` further steps.

    Args:
        carry: at `step`.
        frozen: the networks that do not learn, see `train.on_bases`.
        objectives: of those that do.
        source: of the batches.
        examples: what the host feeds for these steps, see `data.Feed`.
        data_seed: of the batches and of the steps' randomness.
        step: the first one, counted from 0.
        count: how many.
        static: the rest of the structure.

    Returns:
        The carry.
    """

    def one(carry: Carry, step: Array) -> Carry:
        batch = source.batch(carry.source, examples, data_seed, step)
        if static.mesh is not None:
            batch = parallel.split(batch, static.mesh)
        # By the metrics alone, gradient norms among them: to look at the parameters after the
        # update would keep those before it alive beside them.
        good = carry.bad_step < 0
        options = {name: getattr(static, name) for name in ("micro_batches", "chunk", "mesh")}
        networks, metrics = train_step(
            together(carry.learners, frozen), batch, objectives, guard=good, **options
        )
        first_bad = good & ~all_finite(metrics)
        fresh = step % static.log_every == 0
        return Carry(
            learners={name: with_base(networks[name], None) for name in carry.learners},
            source=carry.source,
            sums={n: jnp.where(fresh, 0, x) + metrics[n] for n, x in carry.sums.items()},
            bad_step=jnp.where(first_bad, step, carry.bad_step).astype(jnp.int32),
            bad=_where(first_bad, metrics, carry.bad),
        )

    if count == 1:  # on a CPU convolutions in a scan are an order of magnitude slower
        carry = one(carry, step)
    else:
        steps = step + jnp.arange(count)
        carry, _ = jax.lax.scan(lambda c, i: (one(c, i), None), carry, steps)
    if static.mesh is None:
        return carry
    # Else XLA chooses where the arrays lie, and the next call is another program.
    return jax.lax.with_sharding_constraint(carry, shardings(carry, static.mesh))


def first_bad(carry: Carry, step: Array) -> Array:
    """The carry's `bad_step`, or the last step if its update, which none saw since, overflowed."""
    params = {name: state.params for name, state in carry.learners.items()}
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
    overflowed = ~finite & (carry.bad_step < 0)
    return jnp.where(overflowed, step - 1, carry.bad_step).astype(jnp.int32)


class _Over(NamedTuple):
    """Examples whose batches are split over a mesh."""

    examples: Any
    mesh: Mesh

    def batch(self, data_seed: Array, step: Array) -> Batch:
        return parallel.split(self.examples.batch(data_seed, step), self.mesh)


def refilled(
    carry: Carry,
    frozen: Networks,
    examples: Any,
    data_seed: Array,
    step: Array,
    *,
    source: Source,
    mesh: Mesh | None,
) -> Any:
    """The source's state, refilled before the step; not after a bad one, to be shown."""
    networks = together(carry.learners, frozen)
    examples = examples if mesh is None else _Over(examples, mesh)
    state = source.refill(carry.source, networks, examples, data_seed, step)
    state = _where(carry.bad_step < 0, state, carry.source)
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(state, mesh))


def evaluated(state_and_summary: tuple[Any, Any], *, source: Source) -> Any:
    """The source's state after it has seen an evaluation."""
    return source.evaluated(*state_and_summary)


class Programs(NamedTuple):
    """The functions above, compiled: for one carry on a mesh, or for stacked members.

    Attributes:
        source: of the batches.
        static: the rest of the structure.
        members: whether carries and objectives are stacked (`parallel.spread`).
    """

    source: Source
    static: Static
    members: bool = False

    def advance(
        self,
        carry: Carry,
        frozen: Networks,
        objectives: Objectives,
        examples: Any,
        data_seed: int,
        step: int,
        count: int,
    ) -> tuple[Carry, Array]:
        """The carry after `count` steps, and an array that is ready when they are done.

        The buffers of a carry that is not stacked are taken.
        """
        if not self.members:
            args = (carry, frozen, objectives, self.source, examples, data_seed, step)
            return _advance(*args, count=count, static=self.static)
        fn = _partial(_member, source=self.source, count=count, static=self.static)
        shared = frozen, examples, jnp.asarray(data_seed), jnp.asarray(step)
        carry = parallel.spread(fn, (carry, objectives), *shared)
        return carry, carry.bad_step

    def products(
        self,
        carry: Carry,
        frozen: Networks,
        objectives: Objectives,
        examples: Any,
        data_seed: int,
        step: int,
    ) -> float:
        """What a step takes by `costs.products`; nothing runs, and shapes suffice."""

        def one(carry: Carry, frozen: Networks, objectives: Objectives, examples: Any) -> Carry:
            args = (carry, frozen, objectives, self.source, examples, data_seed, step)
            return advance(*args, count=1, static=self.static)

        return costs.products(one, carry, frozen, objectives, examples)

    def refill(
        self, carry: Carry, frozen: Networks, examples: Any, data_seed: int, step: int
    ) -> Carry:
        """See `refilled`."""
        shared = frozen, examples, jnp.asarray(data_seed), jnp.asarray(step)
        structure = {"source": self.source, "mesh": self.static.mesh}
        state = self._call(_partial(refilled, **structure), carry, *shared)
        return carry.replace(source=state)

    def evaluated(self, carry: Carry, summary: Any) -> Carry:
        """See `evaluated`."""
        state = self._call(_partial(evaluated, source=self.source), (carry.source, summary))
        return carry.replace(source=state)

    def confirmed(self, carry: Carry, step: int) -> Carry:
        """The carry with the `first_bad` step."""
        return carry.replace(bad_step=self._call(first_bad, carry, jnp.asarray(step)))

    def _call(self, fn: Callable, *args: Any) -> Any:
        return parallel.spread(fn, *args) if self.members else _jitted(fn)(*args)


# One object for the same function and structure, by which programs are compiled once.
_partial, _jitted = functools.lru_cache(functools.partial), functools.lru_cache(jax.jit)


def _member(carry_and_objectives, frozen, examples, data_seed, step, *, source, **options) -> Carry:
    carry, objectives = carry_and_objectives
    return advance(carry, frozen, objectives, source, examples, data_seed, step, **options)


@functools.partial(jax.jit, static_argnames=("source", "count", "static"), donate_argnames="carry")
def _advance(carry, frozen, objectives, source, examples, data_seed, step, *, count, static):
    args = (carry, frozen, objectives, source, examples, data_seed, step)
    carry = advance(*args, count=count, static=static)
    return carry, carry.bad_step + 0  # a buffer of its own, for the next call takes the carry's


def run_steps(
    programs: Programs,
    carry: Carry,
    frozen: Networks,
    objectives: Objectives,
    feed: Callable[[int, int], tuple[Any, int]],
    *,
    data_seed: int,
    start: int = 0,
    end: int,
    length: int = 1,
    intervals: Sequence[int] = (),
    after: Callable[[Carry, int], Carry] = lambda carry, step: carry,
) -> Carry:
    """Trains from a step to another.

    Args:
        programs: compiled.
        carry: at `start`; its buffers are taken.
        frozen: the networks that do not learn.
        objectives: of those that do; stacked, as the carry is, for stacked members.
        feed: (step, how many steps the call is to make) -> what the host feeds, and the first step
            that it does not serve.
        data_seed: of the batches.
        start: how many steps are done.
        end: how many there are to be.
        length: how many steps one call makes, where they fit.
        intervals: no call goes past a multiple of one of these.
        after: called with the carry and the number of steps done, after each call; what it returns
            is trained on. It may raise to end the training.

    Returns:
        The carry after the last step.
    """
    source, step, calls = programs.source, start, collections.deque()
    intervals = (*intervals, *([source.refill_every] if source.refill else []))
    while step < end:
        examples, until = feed(step, _call_length(step, end, length, intervals))
        if source.refill and step % source.refill_every == 0:
            carry = programs.refill(carry, frozen, examples, data_seed, step)
        count = _call_length(step, min(until, end), length, intervals)
        args = (carry, frozen, objectives, examples, data_seed, step, count)
        carry, ready = programs.advance(*args)
        step += count
        calls.append(ready)
        if len(calls) > _RUN_AHEAD:
            calls.popleft().block_until_ready()
        carry = after(carry, step)
    return carry


def _call_length(step: int, until: int, length: int, intervals: Sequence[int]) -> int:
    """How many steps the call at this step makes: `length`, or one where they do not fit.

    One or the other, for each length is a compilation; a function of the step, for a scan and
    single steps may round differently and a resumed run is to repeat them.
    """
    stop = min(until, *((step // n + 1) * n for n in intervals), until)
    return length if step % length == 0 and step + length <= stop else 1


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
