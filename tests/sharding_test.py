"""Networks split over devices: what lies where, and that it changes no number."""

import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from abkd_jax import load, optimizers, parallel, train_and_evaluate
from abkd_jax.binding import bind
from abkd_jax.config import resolve
from abkd_jax.losses import cross_entropy
from abkd_jax.run import phases
from abkd_jax.train import create, train_step
from abkd_jax.train.checkpoint import Checkpoints
from abkd_jax.train.sharding import sharded, shardings
from abkd_jax.types import Outputs, Term, named_leaves


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "expected"),
    [
        ("params.head.kernel", (512, 1024), 4, P(None, "fsdp")),
        ("params.head.kernel", (1024, 512), 4, P("fsdp")),
        ("params.head.kernel", (512, 512), 4, P(None, "fsdp")),
        ("params.head.kernel", (512, 1023), 4, P("fsdp")),
        ("params.head.kernel", (511, 1023), 4, P()),
        ("params.head.kernel", (128, 511), 4, P()),  # 65,408 numbers
        ("params.head.kernel", (128, 512), 4, P(None, "fsdp")),  # 65,536
        ("params.head.kernel", (512, 1024), 1, P()),
        ("params.head.kernel", (2048, 128_256), 8, P("fsdp")),  # 16,032 is no multiple of 128
        ("params.head.kernel", (2040, 128_256), 8, P(None, "fsdp")),  # neither is 255
        ("params.embedding", (32_768, 512), 8, P(None, "fsdp")),
        ("params.embedding", (32_768, 510), 8, P("fsdp")),
        ("opt_state.inner_state.0.mu.unembedding", (512, 32_768), 8, P("fsdp")),
        ("params.unembedding", (510, 32_768), 8, P(None, "fsdp")),
        ("params.layers.mlp.kernel", (1024, 512, 256), 4, P(None, "fsdp")),
        ("params.layers.mlp.kernel", (1024, 256, 512), 4, P(None, None, "fsdp")),
        ("params.layers.mlp.kernel", (1024, 128, 511), 4, P()),  # of each layer too few
        ("params.layers.norm.scale", (1024, 512), 4, P()),
        ("opt_state.inner_state.0.mu.layers.mlp.kernel", (8, 512, 256), 4, P(None, "fsdp")),
        ("params.layers2.kernel", (512, 256), 4, P("fsdp")),
        ("step", (), 4, P()),
    ],
)
def test_partition(path, shape, fsdp, expected):
    assert parallel.partition(path, shape, fsdp) == expected


class Wide(nn.Module):
    """With kernels large enough to be split."""

    @nn.compact
    def __call__(self, inputs, *, train):
        x = nn.relu(nn.Dense(256, name="narrow")(inputs.reshape(len(inputs), -1)))
        x = nn.relu(nn.Dense(256, name="wide")(x))
        return Outputs(logits=nn.Dense(10)(x))


@pytest.fixture(scope="module")
def mesh():
    return parallel.mesh(8, batch_size=16, fsdp=4)


def state(mesh=None):
    adam = bind(optimizers.adam, learning_rate=1e-2)
    inputs = np.zeros((2, 64), np.float32)
    return create(Wide(), inputs, init_seed=0, optimizer=adam, ema_decay=0.9, mesh=mesh)


def test_states_are_born_split(mesh):
    whole, split = state(), state(mesh)
    for placed in (split, sharded(whole, mesh)):
        kernel = placed.params["wide"]["kernel"]
        assert kernel.sharding.spec == P(None, "fsdp")
        assert {x.data.shape for x in kernel.addressable_shards} == {(256, 64)}
    others = named_leaves((split.opt_state, split.ema_params))
    kernels = [x for path, x in others.items() if path.endswith("wide.kernel")]
    assert len(kernels) == 3  # two moments and the average
    for kernel in kernels:
        assert {x.data.shape for x in kernel.addressable_shards} == {(256, 64)}
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), whole.params, split.params)
    assert all(jax.tree.leaves(same))


def on_each(arrays):
    """The bytes of some arrays that each device holds."""
    found = dict.fromkeys(jax.devices(), 0)
    for x in arrays:  # a look at the parts of one would make arrays of them
        for device in x.devices():
            found[device] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return found


def test_no_device_holds_more_than_its_share(mesh, tmp_path):
    def grown(before):
        now = on_each(jax.live_arrays())
        return {now[device] - before[device] for device in now}

    before = on_each(jax.live_arrays())
    split = state(mesh)
    leaves = named_leaves(split)
    parts = {path: parallel.partition(path, x.shape, 4) != P() for path, x in leaves.items()}
    share = sum(x.nbytes // (4 if parts[path] else 1) for path, x in leaves.items())
    assert share < sum(x.nbytes for x in leaves.values()) / 2
    assert share - 100 < min(grown(before)) <= max(grown(before)) <= share  # some numbers on one
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, split)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), split)
    del split, leaves
    assert grown(before) == {0}
    with Checkpoints(tmp_path) as checkpoints:
        restored = sharded(checkpoints.restore(like)[1], mesh)
    assert grown(before) == {share}
    batch = {"inputs": jnp.ones((16, 64)), "labels": jnp.zeros(16, int)}
    terms = {"it": {"task": Term(bind(cross_entropy), jnp.asarray(1.0))}}

    def step(networks, batch):
        return train_step(networks, batch, terms, mesh=mesh)[0]

    args = {"it": restored}, parallel.split(batch, mesh)
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    needed, rows = compiled.memory_analysis(), sum(x.nbytes for x in jax.tree.leaves(batch)) // 8
    assert share + rows - 100 < needed.argument_size_in_bytes <= share + rows
    assert needed.output_size_in_bytes < share + 1000  # with a table of its parts
    before = on_each(jax.live_arrays())
    networks = compiled(*args)
    assert max(grown(before)) < share / 20  # in place of those before, but for small ones
    assert jax.tree.structure(networks["it"]) == jax.tree.structure(restored)


def test_what_is_imported_takes_no_more_than_its_share(tmp_path):
    """What is given, and what is of another run with its optimiser, from the beginning."""
    train_and_evaluate(plugin_config(num_steps=3), tmp_path / "there")
    weights = dict(fn="run", workdir=f"{tmp_path / 'there' / 'teacher'}")
    config = plugin_config(devices=8, fsdp=4)
    given = load(tmp_path / "there" / "teacher")
    given = given.module.apply, parallel.fetched(given.variables)
    config["teacher"] = dict(model=dict(fn="given"))
    config["student"] |= dict(weights=weights)
    config["phases"] = dict(distill=dict(learn=("student",), see=("teacher",)))
    plan = resolve(config, networks={"teacher": given})
    with phases.opened(plan, tmp_path / "here") as run:
        before = on_each(jax.live_arrays())
        found = phases.ready(run)
        now = on_each(jax.live_arrays())
        whole = sum(x.nbytes for x in jax.tree.leaves(found["student"].params))
        share = whole - 4 * 256 * 256 * 3 // 4  # of the one kernel that is split
        grown = {now[device] - before[device] for device in now}
        assert 2 * share <= min(grown) <= max(grown) < 2 * share + 100  # and some numbers on one
        learner = phases.learners_of(run, plan.phases[-1], found)["student"]
        large = [x for x in jax.tree.leaves(learner.opt_state) if x.size == 256 * 256]
        assert len(large) == 2  # moments
        for x in large:
            assert {shard.data.shape for shard in x.addressable_shards} == {(256, 64)}
    own = parallel.fetched(learner.params)
    jax.tree.map(np.testing.assert_array_equal, own, given[1]["params"])


def test_small_arrays_are_whole(mesh):
    found = shardings(state(), mesh)
    assert found.params["narrow"]["bias"].spec == found.step.spec == P()


def test_devices_split_evenly():
    with pytest.raises(ValueError, match="fsdp must be a divisor of the 8 devices; found 3"):
        parallel.mesh(8, batch_size=16, fsdp=3)


def plugin_config(**changes):
    adam = dict(fn="adam", learning_rate=1e-3)
    task = dict(fn="cross_entropy", weight=1.0)
    divergence = dict(fn="alpha_beta", alpha=0.8, beta=0.3)
    terms = dict(task=task, distill=dict(fn="on_logits", weight=1.0, divergence=divergence))
    model = dict(fn="mlp", widths=(256, 256))
    return (
        dict(
            data=dict(fn="digits", validation=100),
            teacher=dict(model=model, optimizer=adam, terms=dict(task=task)),
            student=dict(model=model, optimizer=adam, terms=terms, init_seed=1, ema_decay=0.5),
            phases=dict(
                teacher=dict(learn=("teacher",), num_steps=3),
                distill=dict(learn=("student",), see=("teacher",)),
            ),
            batch_size=64,
            num_steps=6,
            checkpoint_every=3,
            log_every=3,
        )
        | changes
    )


@pytest.mark.long
def test_a_run_is_the_same_on_one_device_and_on_eight_split(tmp_path):
    found = {}
    for name, changes in (("one", dict(devices=1)), ("eight", dict(devices=8, fsdp=4))):
        train_and_evaluate(plugin_config(**changes), tmp_path / name)
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            found[name] = checkpoints.restore()[1]["learners"]["student"]
    for part in ("params", "ema_params", "opt_state"):
        of_one, of_eight = (jax.tree.leaves(found[name][part]) for name in found)
        for a, b in zip(of_one, of_eight, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.long
def test_a_split_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    eight = dict(devices=8, fsdp=4)
    whole = train_and_evaluate(plugin_config(**eight), tmp_path / "whole")
    constant = dict(eight, num_steps=3)
    train_and_evaluate(plugin_config(**constant), tmp_path / "parted")
    parted = train_and_evaluate(plugin_config(**eight), tmp_path / "parted")
    sha = lambda result: result["networks"]["student"]["sha256"]  # noqa: E731
    assert sha(parted) == sha(whole)
