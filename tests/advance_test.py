"""Consecutive steps: many are as one by one, what is not finite, memory, the loop and its calls."""

import functools
import itertools
import types

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from abkd_jax import data, losses, models, optimizers, train
from abkd_jax.binding import bind
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.sources import DATASET, Source
from abkd_jax.train import Programs, Static, advance, begin, run_steps
from abkd_jax.train.checkpoint import FOLDER, Checkpoints
from abkd_jax.types import Batch, Outputs, Term, named_leaves

K, DIM, SIZE = 3, 6, 8
SGD = bind(optimizers.sgd, learning_rate=0.1, momentum=0.5)
SOURCE = DATASET
TASK = {"task": Term(bind(losses.cross_entropy), jnp.ones(()))}
STATIC = ("source", "count", "static")
ADVANCE = jax.jit(advance, static_argnames=STATIC)


def root(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
    """Finite; its gradient is zero, and NaN for a row whose inputs are zero."""
    distance = jnp.sum((student.logits - jax.lax.stop_gradient(student.logits)) ** 2, axis=-1)
    return jnp.sqrt(distance + jnp.sum(jnp.abs(batch["inputs"]), axis=-1))


ROOT = TASK | {"root": Term(bind(root), jnp.ones(()))}


class Normed(nn.Module):
    """A network with batch norm on vectors."""

    @nn.compact
    def __call__(self, inputs, *, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(inputs))
        return Outputs(logits=nn.Dense(K)(nn.relu(x)))


def learners():
    inputs = jnp.zeros((1, DIM))
    options = dict(init_seed=0, optimizer=SGD, ema_decay=0.9)
    return {"student": train.create(Normed(), inputs, **options)}


def examples(zero=None, count=44):
    """Vectors, of which one may be zero, and labels."""
    labels = np.arange(count) % K
    inputs = np.random.default_rng(0).normal(size=(count, DIM)) + labels[:, None]
    if zero is not None:
        inputs[zero] = 0.0
    return inputs.astype(np.float32), labels


def own_data(**options):
    parts = dict(train=examples(**options), validation=None, test=examples())
    return data.from_arrays(**parts, num_classes=K)


def fed(**options):
    """The examples of the first epoch, of five steps."""
    own = own_data(**options)
    found, until = data.Feed(own.train, own.preprocess, data_seed=0, size=SIZE)(0)
    assert until == 5
    return found


def assert_equal(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def all_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# --- steps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def singles():
    """The carries after 0, ..., 5 steps, one by one, for sums over 3 steps."""
    carries = [begin(learners(), {"student": TASK}, SOURCE)]
    for step in range(5):
        args = (carries[-1], {}, {"student": TASK}, SOURCE, fed(), 0, step)
        carries.append(ADVANCE(*args, count=1, static=Static(log_every=3)))
    return carries


@pytest.mark.parametrize("start,count", [(0, 5), (1, 4)])
def test_steps_at_once_are_steps_one_by_one(singles, start, count):
    """Parameters, averages, statistics, the optimiser, the sums, the steps."""
    args = (singles[start], {}, {"student": TASK}, SOURCE, fed(), 0, start)
    found = ADVANCE(*args, count=count, static=Static(log_every=3))
    assert_close(found, singles[5])
    assert found.learners["student"].step == 5 and found.bad_step == -1
    with pytest.raises(AssertionError):
        assert_close(found.learners, singles[4].learners)


def test_the_sums_begin_anew_at_multiples_of_log_every(singles):
    losses_of = [float(x.sums["student/loss"]) for x in singles]
    assert losses_of[0] == 0 < losses_of[1] < losses_of[2] < losses_of[3]
    args = (singles[3], {}, {"student": TASK}, SOURCE, fed(), 0, 3)
    alone = ADVANCE(*args, count=1, static=Static(log_every=1))
    assert losses_of[4] == float(alone.sums["student/loss"]) < losses_of[5]


@pytest.mark.parametrize(
    "count,micro_batches,bad_step", [(1, 1, 2), (5, 1, 2), (5, 2, 2), (1, 1, 0)]
)
def test_a_gradient_that_is_not_finite_is_found_before_the_update(count, micro_batches, bad_step):
    """The loss is finite. No later step updates anything, and that step's metrics are kept."""
    zero = np.asarray(data.epoch_order(0, 0, 44))[bad_step * SIZE + 3]
    objectives, static = {"student": ROOT}, Static(micro_batches, log_every=5)
    call = functools.partial(ADVANCE, static=static, source=SOURCE, data_seed=0)
    call = functools.partial(call, frozen={}, objectives=objectives, examples=fed(zero=zero))
    before = begin(learners(), objectives, SOURCE)
    for step in range(bad_step):
        before = call(before, step=step, count=1)
    carry = begin(learners(), objectives, SOURCE)
    for step in range(0, 5, count):
        carry = call(carry, step=step, count=count)
    assert carry.bad_step == bad_step and before.bad_step == -1
    assert all_finite([carry.bad[f"student/{name}"] for name in ("task", "root", "loss")])
    assert np.isnan(carry.bad["student/gradient_norm"])
    after = carry.learners["student"]
    assert after.step == bad_step
    momentum = after.opt_state.inner_state
    for part in (after.params, momentum, after.batch_stats, after.ema_params):
        assert jax.tree.leaves(part) and all_finite(part)
    (assert_equal if count == 1 else assert_close)(after, before.learners["student"])


def test_a_source_is_not_refilled_after_a_bad_step():
    """So that a run can show the batch."""
    source = Source(
        batch=SOURCE.batch, init=lambda: jnp.zeros(()), refill=lambda state, *_: state + 1
    )
    carry = begin(learners(), {"student": TASK}, source)
    refill = Programs(source, Static()).refill
    for bad_step, expected in ((-1, 1), (3, 0)):
        changed = carry.replace(bad_step=jnp.asarray(bad_step, jnp.int32))
        assert refill(changed, {}, fed(), 0, 4).source == expected


def test_a_refill_sees_every_network():
    """Those that learn, as they are now, and those that do not."""

    def refill(state, networks, *_):
        return {name: network.params for name, network in networks.items()}

    networks = learners()
    teacher = jax.tree.map(lambda x: x + 1, networks["student"].params)
    frozen = {"teacher": train.frozen(networks["student"].replace(ema_params=teacher))}
    init = lambda: {"student": networks["student"].params, "teacher": teacher}  # noqa: E731
    source = Source(batch=SOURCE.batch, init=init, refill=refill)
    carry = begin(networks, {"student": TASK}, source)
    nothing = carry.replace(source=jax.tree.map(jnp.zeros_like, carry.source))
    assert_equal(Programs(source, Static()).refill(nothing, frozen, fed(), 0, 0).source, init())


# --- an update that overflows -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "settings", "told"),
    [
        (3, {}, "step 3 of student is not finite: the parameters after its update"),  # saved at 4
        (7, {}, "step 7 of student is not finite: the parameters after its update"),  # the last
        (1, {}, "step 2 of student is not finite: student/"),  # the next step sees it
        (3, dict(steps_per_call=4), "step 3 of student is not finite: the parameters"),
        (1, dict(steps_per_call=4), "step 2 of student is not finite: student/"),
        (3, dict(checkpoint_every=8, log_every=2), "step 3 of student is not finite: the param"),
    ],
)
def test_an_update_that_overflows_is_reported_before_it_is_saved(tmp_path, step, settings, told):
    """With a finite loss and a finite gradient, under a rate that a schedule makes too high."""
    rate = dict(fn="piecewise", start=10.0, factor=3e37, boundaries=(step,))
    student = dict(
        model=dict(fn="mlp", widths=(5,)),
        optimizer=dict(fn="sgd", learning_rate=rate),
        terms=dict(task=dict(fn="cross_entropy", weight=10.0)),
    )
    config = dict(
        student=student, phases=dict(alone=dict(learn=("student",))), data={}, devices=1,
        batch_size=SIZE, num_steps=8, checkpoint_every=4, log_every=4,
    )  # fmt: skip
    with pytest.raises(FloatingPointError) as error:
        train_and_evaluate(config | settings, tmp_path, data=own_data())
    sentence = str(error.value)
    assert sentence.startswith(told) and "\n" not in sentence
    assert list((tmp_path / "nonfinite").glob(f"batch_{step}*" if "after" in told else "batch_*"))
    assert not (tmp_path / "result.json").exists()
    with Checkpoints(tmp_path / FOLDER) as checkpoints:
        assert checkpoints.steps() == ([4] if step == 7 else [])
        for saved in checkpoints.steps():
            assert all_finite(checkpoints.restore_at(saved)["learners"]["student"]["params"])


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_no_second_copy_of_the_parameters_lives(count):
    """Beside the gradient, that is: of the parameters of before an update nothing is kept."""
    module = models.mlp(num_classes=K, widths=(2048, 2048))
    rule = bind(optimizers.sgd, learning_rate=0.1)
    create = functools.partial(train.create, module, init_seed=0, optimizer=rule)
    state = jax.eval_shape(create, jnp.zeros((1, DIM)))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    assert size > 16 * 2**20
    zeros = {f"student/{name}": jnp.zeros(()) for name in ("task", "loss", "gradient_norm")}
    carry = train.Carry({"student": state}, (), zeros, jnp.asarray(-1, jnp.int32), zeros)
    program = jax.jit(advance, static_argnames=STATIC, donate_argnames="carry")
    args = (carry, {}, {"student": TASK}, SOURCE, fed(), 0, 0)
    compiled = program.lower(*args, count=count, static=Static()).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * size


def test_the_buffers_of_a_carry_are_taken():
    """Of parameters, batch statistics, averages and the optimiser; what is returned is whole."""
    carry = begin(learners(), {"student": TASK}, SOURCE)
    programs = Programs(SOURCE, Static())
    after, ready = programs.advance(carry, {}, {"student": TASK}, fed(), 0, 0, 1)
    before = named_leaves(carry.learners)
    assert len(before) > 8 and [name for name, x in before.items() if not x.is_deleted()] == []
    jax.block_until_ready(ready)
    student = after.learners["student"]
    assert all_finite((student.params, student.ema_params)) and student.step == 1


# --- the loop -----------------------------------------------------------------------------------


def traced(start, end, length, intervals, epoch, refill_every):
    """What `run_steps` calls: ("refill", step), ("advance", step, count), ("after", step)."""
    calls = []

    def advance(carry, frozen, objectives, examples, data_seed, step, count):
        assert carry == step and (frozen, objectives, data_seed) == ("frozen", "objectives", 5)
        assert step // epoch == examples
        calls.append(("advance", step, count))
        return carry + count, jnp.zeros(())

    def refill(carry, frozen, examples, data_seed, step):
        assert (carry, step // epoch, frozen, data_seed) == (step, examples, "frozen", 5)
        calls.append(("refill", step))
        return carry

    def after(carry, step):
        assert carry == step
        calls.append(("after", step))
        return carry

    feed = lambda step, most: (step // epoch, (step // epoch + 1) * epoch)  # noqa: E731
    source = Source(batch=SOURCE.batch)
    if refill_every:
        source = source._replace(refill=refill, refill_every=refill_every)
    programs = types.SimpleNamespace(source=source, advance=advance, refill=refill)
    ended = run_steps(
        programs, start, "frozen", "objectives", feed, data_seed=5, start=start, end=end,
        length=length, intervals=intervals, after=after,
    )  # fmt: skip
    assert ended == end
    return calls


@pytest.mark.parametrize("start", [0, 1, 7, 12])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("intervals", [(), (6,), (5, 8)])
@pytest.mark.parametrize("epoch,refill_every", [(100, 0), (9, 0), (9, 3), (100, 8), (10, 1)])
def test_calls_stay_within_intervals_and_epochs(start, length, intervals, epoch, refill_every):
    """Each is followed by `after`; refills are at multiples of `refill_every` and nowhere else."""
    calls = traced(start, 26, length, intervals, epoch, refill_every)
    steps = [call for call in calls if call[0] == "advance"]
    done = start
    for (_, step, count), (name, end) in zip(
        steps, (call for call in calls if call[0] == "after"), strict=True
    ):
        assert step == done and count in (1, length) and (name, end) == ("after", step + count)
        done = end
        for every in (epoch, *intervals, *([refill_every] if refill_every else [])):
            assert step // every == (end - 1) // every
    assert done == 26
    refills = [call[1] for call in calls if call[0] == "refill"]
    expected = [n for n in range(start, 26) if refill_every and n % refill_every == 0]
    assert refills == expected
    for (name, step, *_), (then, at, *_) in itertools.pairwise(calls):
        assert then == {"refill": "advance", "advance": "after"}.get(name, then)
        assert name != "refill" or step == at


def test_the_calls_after_a_resume_are_those_of_before():
    """A scan and single steps may round differently, so it is a function of the step."""
    whole = traced(0, 26, 4, (6,), 9, 3)
    for start in (5, 6, 7, 14):
        if ("after", start) in whole:
            assert traced(start, 26, 4, (6,), 9, 3) == whole[whole.index(("after", start)) + 1 :]


def test_what_comes_after_a_call_is_trained_on():
    source = Source(batch=SOURCE.batch)
    advance = lambda carry, *args: (carry + args[-1], jnp.zeros(()))  # noqa: E731
    programs = types.SimpleNamespace(source=source, advance=advance)
    feed = lambda step, most: (None, 100)  # noqa: E731
    double = lambda carry, step: 2 * carry  # noqa: E731
    assert run_steps(programs, 0, {}, {}, feed, data_seed=0, end=3, after=double) == 14

    def stop(carry, step):
        if step == 2:
            raise SystemExit(0)
        return carry

    with pytest.raises(SystemExit):
        run_steps(programs, 0, {}, {}, feed, data_seed=0, end=3, after=stop)
