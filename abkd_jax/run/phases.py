"""The phases of a run: what each needs made ready, and trained.

Each phase starts from the newest checkpoint of its folder, and all it does is a function of the
config and the step, so that a run which was stopped at any moment goes on as if it had not been: a
phase that was complete restores its last state and has no step left.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from abkd_jax import data as datasets
from abkd_jax import files, models, parallel
from abkd_jax.binding import Statistic
from abkd_jax.checks import require
from abkd_jax.config.adapted import whole
from abkd_jax.config.dry_run import with_statistics
from abkd_jax.config.plan import Phase, Plan
from abkd_jax.config.weights import Weights, read_about
from abkd_jax.losses import feature
from abkd_jax.losses.chunks import default_chunk
from abkd_jax.run import workdir as folders
from abkd_jax.run.evaluation import batches_of
from abkd_jax.run.interruption import Interruption
from abkd_jax.sources import DATASET
from abkd_jax.train import (
    Networks,
    Objectives,
    TrainState,
    adopt,
    beneath,
    create,
    eval_outputs,
    frozen,
    hosts,
)
from abkd_jax.train.checkpoint import digest
from abkd_jax.train.sharding import sharded
from abkd_jax.types import Batch, Outputs, Term, dotted, named_leaves

_CACHED_PARTS = frozenset(("logits", "hidden"))  # of Outputs
_REPEATS = 2.0  # seconds, see `Interruption`
_MOST_BYTES = 2**30  # of the outputs of frozen networks for all examples


class Run(NamedTuple):
    """What the phases of a run share.

    Attributes:
        plan: of the run.
        workdir: its folder.
        data: its data set.
        mesh: its devices.
        interruption: the wish to stop.
        profile: whether to trace some steps of the last phase.
        seed: which of the config's `init_seeds` it is, counted from 0.
        digests: the SHA-256 of the weights beside which networks learn factors, by name.
    """

    plan: Plan
    workdir: pathlib.Path
    data: datasets.DataSet
    mesh: Mesh
    interruption: Interruption
    profile: bool = False
    seed: int = 0
    digests: Mapping[str, str] = MappingProxyType({})


@contextlib.contextmanager
def opened(
    plan: Plan, workdir: str | os.PathLike, *, profile: bool = False, shared: bool = False
) -> Iterator[Run]:
    """A run that is alone in its workdir, its data read, until the context ends.

    Args:
        plan: of the run.
        workdir: its folder, which is made and locked.
        profile: whether to trace some steps of the last phase.
        shared: whether others that share it may be in the workdir, too.

    Yields:
        The run.

    Raises:
        ValueError: one sentence, if the workdir or the data cannot be used.
        OSError: one sentence for what the operating system refuses, also later in the context.
    """
    folder, mesh = files.path_of(workdir), plan.mesh()
    expected = f"False for a workdir in a bucket, such as {workdir}"
    require(not (profile and files.in_bucket(folder)), "profile", expected, profile)
    if jax.process_count() > 1:
        hosts.equal(folders.of_all(plan.config) | hosts.versions())
    with folders.locked_by_first(folder, shared=shared), _told_of_disks(folder):
        chunk = hosts.by_first(lambda: chunk_of(plan, folder))
        plan = plan._replace(config=plan.config | {"chunk": chunk})
        _tell_of_padding(plan)
        # To read it may take long, and loses no step.
        data = hosts.everyone(lambda: _with_known(plan, plan.data()))
        hosts.equal(_told_of_data(data))
        with Interruption(repeats=_REPEATS if jax.process_count() > 1 else 0.0) as interruption:
            run = Run(plan, folder, data, mesh, interruption, profile)
            for phase in plan.phases:  # all of them before the first trains
                examples(run, phase)
            yield run


def _told_of_data(data: datasets.DataSet) -> dict[str, Any]:
    """What the data of all processes must have in common; nothing where there is but one."""
    if jax.process_count() == 1:
        return {}
    parts = {name: getattr(data, name) for name in ("train", "full", "validation", "test")}
    found = {f"data.{name} (examples)": len(x) for name, x in parts.items() if x is not None}
    for name, x in parts.items():
        found[f"data.{name} (its SHA-256)"] = digest(x)[:12]
    return found | {f"data ({name})": checksum for name, checksum in data.contents}


def chunk_of(plan: Plan, workdir: pathlib.Path) -> int:
    """The config's `chunk`, or where it leaves that open the one that the run began with."""
    if not plan.leaves_chunk_open:
        return plan.config["chunk"]
    if (workdir / "config.json").exists():
        return read_about(workdir)["config"].get("chunk", 0)
    return default_chunk(plan.description.num_classes)


def _tell_of_padding(plan: Plan) -> None:
    """A line for each network whose table has rows that stand for no token."""
    tokens = plan.description.num_classes
    for name, network in plan.networks.items():
        rows = models.num_embeddings(models.base_of(network.module))
        if rows > tokens and hosts.is_first():
            print(
                f"{name}: {rows:,} rows for {tokens:,} tokens: the others are padding and take no "
                "part",
                file=sys.stderr,
            )


def _with_known(plan: Plan, data: datasets.DataSet) -> datasets.DataSet:
    """The data with the outputs of the networks that are known by these alone."""
    for name, network in plan.networks.items():
        if network.cached is None:
            continue
        field, preprocess = f"{name}.model", data.preprocess
        plain = not (preprocess.pad or preprocess.flip)
        require(plain, field, "called where examples are augmented (data.pad, data.flip)", "cached")
        data = network.cached(data)
    return data


def of_seed(run: Run, seed: int) -> Run:
    """The run of one of the `init_seeds`, of which the first one is the run itself.

    Args:
        run: of the first one.
        seed: which, counted from 0.

    Returns:
        The same, but for the init seeds of the networks of `Plan.seeded`, which are larger by it.
    """
    networks, profile = dict(run.plan.networks), run.profile and seed == 0
    for name in run.plan.seeded:
        networks[name] = networks[name]._replace(init_seed=networks[name].init_seed + seed)
    return run._replace(plan=run.plan._replace(networks=networks), profile=profile, seed=seed)


def trained_once(run: Run, phase: Phase) -> bool:
    """Whether all of the `init_seeds` share what a phase trains."""
    return run.plan.seeded.isdisjoint(phase.learners)


def identity(run: Run, phase: Phase) -> dict[str, Any]:
    """What identifies the folder of a phase, and what it takes to load its networks.

    The config of a further seed is that of the run which trains the same networks alone.
    """
    config = run.plan.config
    if run.seed:
        seeds = {name: run.plan.networks[name].init_seed for name in run.plan.seeded}
        own = {name: config[name] | {"init_seed": seed} for name, seed in seeds.items()}
        config = config | own | {"init_seeds": 1}
    found = dict(run.data.contents) | {f"{name}.weights": x for name, x in run.digests.items()}
    contents = {"contents": found} if found else {}
    return contents | {
        "config": config,
        "learners": tuple(phase.learners),
        "select": phase.select,
        "num_classes": run.data.num_classes,
        "preprocess": _plain(run.data.preprocess),
    }


def ready(run: Run) -> Networks:
    """The networks that are there before any phase: given by the caller, or from weights.

    One that is to learn factors (`models.lora`) is there without them.

    Raises:
        ValueError: one sentence, if weights cannot be read or do not fit.
    """
    found = {}
    for name, network in run.plan.networks.items():
        if network.given:
            found[name] = adopt(*network.given, mesh=run.mesh)
        elif network.weights:
            try:
                weights = whole(network.weights(), run.plan.builder)
                variables = _fitting(run, name, weights)
            except ValueError as error:
                raise ValueError(f"{name}.weights: {error}") from None
            apply = models.base_of(network.module).apply
            found[name] = adopt(apply, variables, mesh=run.mesh)
    return found


def with_digests(run: Run, ready: Networks) -> Run:
    """The run, whose folders also say of what weights its factors are."""
    names = [name for name in run.plan.networks if _has_factors(run, name)]
    return run._replace(digests={name: digest(ready[name].params) for name in names})


def _has_factors(run: Run, name: str) -> bool:
    return isinstance(run.plan.networks[name].module, models.Adapted)


def frozen_in(run: Run, phase: Phase, states: Networks) -> Networks:
    """What stays as it is in a phase: the networks that it sees, and what is beside factors."""
    found = {name: frozen(states[name]) for name in phase.see}
    based = [name for name in phase.learners if _has_factors(run, name)]
    return found | {name: beneath(states[name]) for name in based}


def _fitting(run: Run, name: str, weights: Weights) -> Mapping[str, Any]:
    """The variables, if they are those of the network that the config describes, in its dtypes."""
    module = models.base_of(run.plan.networks[name].module)
    init = functools.partial(module.init, train=False)
    own = jax.eval_shape(init, jax.random.key(0), _sample(run))
    leaves, here = named_leaves(own), _plain(run.data.preprocess)
    variables = weights.variables
    variables = variables(module, own) if callable(variables) else variables
    pairs = folders.unlike(variables, own)
    if weights.model is not None:
        own = run.plan.config[name]["model"]
        pairs.insert(0, ("the model", weights.model["fn"], own["fn"]))
    if weights.preprocess is not None:
        pairs.insert(0, ("the normalisation", dict(weights.preprocess), here))
    for what, there, here in pairs:
        if there != here:
            raise ValueError(f"{weights.origin} has {what} {there}, but this run has {here}.")
    dtypes = {path: x.dtype for path, x in leaves.items()}
    in_its = lambda path, x: x.astype(dtypes[dotted(path)], copy=False)  # noqa: E731
    return jax.tree.map_with_path(in_its, dict(variables))


def starting(phase: Phase, states: Networks, results: Mapping[str, Any]) -> Networks:
    """What is known of networks as a phase begins: its learners as its `start` says.

    Args:
        phase: that begins.
        states: of the networks that were ready, or that learned in an earlier phase, at their last.
        results: of the phases before, by name, with `best`.
    """
    states = dict(states)
    for before in results.values() if phase.start == "best" else ():
        states |= {name: x for name, x in before.best.items() if name in phase.learners}
    return states


def learners_of(run: Run, phase: Phase, states: Networks) -> Networks:
    """The networks that learn in a phase, at its step 0.

    Args:
        run: to which the phase belongs.
        phase: that begins.
        states: of the networks that were ready, or that learned in an earlier phase.

    Returns:
        Their states: parameters and batch statistics go on, optimisers and averages are new.
    """
    found = {}
    for name, learner in phase.learners.items():
        options = {"optimizer": learner.optimizer, "ema_decay": learner.ema_decay}
        new = name not in states or (_has_factors(run, name) and states[name].base is None)
        if not new:
            found[name] = states[name].restarted(**options)
        else:
            network = run.plan.networks[name]
            inputs, seed = _sample(run), network.init_seed
            place = {"init_seed": seed, "mesh": run.mesh}
            found[name] = create(network.module, inputs, **place, **options)
    return found


def objectives_of(run: Run, phase: Phase, networks: Networks) -> Objectives:
    """The objectives of a phase, their statistics computed from the frozen networks."""
    return with_statistics(phase.objectives, statistics(run, networks))


def statistics(run: Run, networks: Networks) -> Callable[[Statistic, Term], Array]:
    """What a run computes for its terms, each once; see `config.build.STATISTICS`."""
    means = functools.cache(lambda name: class_means(run, name, networks[name]))
    counts = functools.cache(lambda: class_counts(run))

    def found(statistic: Statistic, term: Term) -> Array:
        if statistic.name == "class_means":
            return means(term.other)
        of_counts = log_prior if statistic.name == "class_prior" else log_weights
        return parallel.replicated(jnp.asarray(of_counts(counts()), jnp.float32), run.mesh)

    return found


def class_counts(run: Run) -> np.ndarray:
    """How many training examples each class has, `[K]`: all labels, and what counts of them."""
    size, count = run.plan.config["batch_size"], run.data.num_classes
    found, streamed = np.zeros(count, np.int64), isinstance(run.data.full, datasets.Stream)
    if streamed and hosts.is_first():
        print(f"counting the labels of {len(run.data.full):,} examples", file=sys.stderr)
    for batch in datasets.evaluation_batches(run.data.full, size):
        labels = np.asarray(batch["labels"])[np.asarray(batch["where"])]
        found += np.bincount(labels[labels >= 0], minlength=count)
    # Of a stream each process has seen its rows alone.
    return multihost_utils.process_allgather(found).reshape(-1, count).sum(0) if streamed else found


def log_prior(counts: np.ndarray) -> np.ndarray:
    """The log of each class's frequency; -inf for one without examples."""
    known, expected = counts.sum(), "left out for data without a known label"
    require(known, "the statistic class_prior", expected, f"{known} labels")
    with np.errstate(divide="ignore"):
        return np.log(counts) - np.log(counts.sum())


def log_weights(counts: np.ndarray, share: float = 0.9999) -> np.ndarray:
    """The log of each class's weight, (1 - b) / (1 - b^n) for n examples, at least 1, b = `share`.

    Source: Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019, as
    BKD takes it (Zhang et al., https://arxiv.org/abs/2104.10510).
    """
    return np.log1p(-share) - np.log(-np.expm1(np.maximum(counts, 1) * np.log(share)))


def class_means(run: Run, name: str, state: TrainState) -> Array:
    """The means of a network's features over each class of all training examples, `[K, D]`.

    A function of the network and the data alone: all labels, no augmentation, evaluation's mode.
    """
    state, size = sharded(state, run.mesh), run.plan.config["batch_size"]
    sums, counts = np.zeros(()), np.zeros(())
    for batch in batches_of(run.data.full, size, run.mesh, run.data.preprocess):
        found = _class_sums({name: state}, batch, num_classes=run.data.num_classes, mesh=run.mesh)
        found = parallel.fetched(found)
        sums, counts = sums + found[0], counts + found[1]
    means = sums / np.maximum(counts, 1)[:, None]
    return parallel.replicated(jnp.asarray(means, jnp.float32), run.mesh)


@functools.partial(jax.jit, static_argnames=("num_classes", "mesh"))
def _class_sums(network: Networks, batch: Batch, *, num_classes: int, mesh: Mesh):
    """The sums and the sizes of the classes in one batch."""
    batch = parallel.split(batch, mesh)
    (outputs,) = eval_outputs(network, batch).values()
    labels = jnp.where(batch["where"], batch["labels"], -1).reshape(-1)
    hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
    return feature.class_sums(hidden, labels, num_classes)


def examples(run: Run, phase: Phase) -> tuple[datasets.Split | datasets.Stream, int]:
    """The examples of a phase, and how many of them are a batch.

    Raises:
        ValueError: if there are too few.
    """
    split = run.data.full if phase.split == "full" else run.data.train
    size, resident = run.plan.config["batch_size"], isinstance(split, datasets.Split)
    learners = " and ".join(phase.learners)
    if phase.split == "labelled" and resident:  # a stream withholds no label
        split = split.labelled_alone()
        parts = run.plan.config["micro_batches"]  # not the devices: a run may go on on others
        size = min(size, len(split)) // parts * parts
        if size == 0:
            raise ValueError(
                f"{learners} trains on the labelled examples alone; of these there are "
                f"{len(split)}, fewer than micro_batches, {parts}."
            )
    expected = f"at most the {len(split)} examples to train {learners}"
    require(size <= len(split), "batch_size", expected, size)
    every, count = phase.source.refill_every, len(split) // size
    if phase.source.masks and every > 1:  # it writes for steps ahead, after prompts of theirs
        expected = f"1, or a divisor of the {count} batches of an epoch"
        expected = (
            expected if resident else "1 for a stream, of which a step's rows alone are there"
        )
        fits = resident and count % every == 0
        require(fits, f"phases.{phase.name}.source.refill_every", expected, every)
    return split, size


def seen_examples(
    run: Run, phase: Phase, frozen: Networks
) -> tuple[datasets.Split | datasets.Stream, int]:
    """The examples of a phase with what the frozen networks show of them, where that stays.

    That is the faster way at every size of a sweep, one student included
    (`experiments.benchmark_sweep`); its rounding is that of another program's forward pass, and
    whether it is taken depends on the config alone, so a resumed run takes it again.

    Args:
        run: to which the phase belongs.
        phase: that trains.
        frozen: the networks that it sees, on the devices.

    Returns:
        The examples, and how many of them are a batch.
    """
    split, size = examples(run, phase)
    called = [name for name in phase.see if run.plan.networks[name].cached is None]
    frozen = {name: frozen[name] for name in called}
    if frozen and _outputs_stay(run, phase, split) and _fit(run, frozen, split):
        names = ", ".join(frozen)
        if hosts.is_first():
            print(f"outputs of {names}: computed once for all steps", file=sys.stderr)
        forward = functools.partial(_shown, frozen)
        split = datasets.with_outputs(split, forward, run.data.preprocess, size)
    return split, size


def _outputs_stay(run: Run, phase: Phase, split: datasets.Split | datasets.Stream) -> bool:
    """Whether an example's outputs are the same in every epoch, are all that losses read, and
    are needed more than once."""
    preprocess = run.data.preprocess
    terms = [term for objective in phase.objectives.values() for term in objective.values()]
    needs = {part for term in terms for part in (*term.loss.needs.own, *term.loss.needs.other)}
    repeats = phase.num_steps * run.plan.config["batch_size"] > len(split)
    fixed = isinstance(split, datasets.Split) and not (preprocess.pad or preprocess.flip)
    plain = phase.source == DATASET  # whose batches are the examples as they are
    return fixed and plain and repeats and needs <= _CACHED_PARTS


def _fit(run: Run, frozen: Networks, split: datasets.Split) -> bool:
    """Whether the outputs of all examples are small enough to be kept on the device."""
    batch = next(datasets.evaluation_batches(split, 1, run.data.preprocess))
    shown = jax.eval_shape(_shown, frozen, batch).values()
    arrays = jax.tree.leaves([(x.logits, x.hidden) for x in shown])
    return len(split) * sum(x.size * x.dtype.itemsize for x in arrays) <= _MOST_BYTES


@jax.jit
def _shown(frozen: Networks, batch: Batch) -> dict[str, Outputs]:
    return eval_outputs(frozen, batch)


def feed(
    run: Run, split: datasets.Split | datasets.Stream, size: int
) -> Callable[..., tuple[Any, int]]:
    """A `data.Feed` of a run, of a stream with the rows of all processes."""
    found = datasets.Feed(
        split, run.data.preprocess, data_seed=run.plan.config["data_seed"], size=size
    )
    if jax.process_count() == 1 or isinstance(split, datasets.Split):
        return found

    def of_all(step: int, most: int = 1) -> tuple[Any, int]:
        examples, until = found(step, most)
        axis = 0 if examples.first is None else 1  # of the rows of one step, or of several
        return examples.replace(rows=parallel.joined(examples.rows, run.mesh, axis)), until

    return of_all


def _sample(run: Run) -> Any:
    """Two examples as networks see them."""
    split = run.data.test
    if isinstance(split, datasets.Stream):  # these two, on each process
        split = dataclasses.replace(split, process_index=0, process_count=1)
    return next(datasets.evaluation_batches(split, 2, run.data.preprocess))["inputs"]


def _plain(preprocess: datasets.Preprocess) -> dict[str, Any]:
    """The normalisation as plain numbers; None stays."""
    arrays = {"mean": preprocess.mean, "std": preprocess.std}
    return jax.tree.map(lambda x: np.asarray(x, np.float64).tolist(), arrays)


@contextlib.contextmanager
def _told_of_disks(workdir: pathlib.Path) -> Iterator[None]:
    """One sentence for what the operating system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence already
            raise
        raise OSError(
            f"{error.filename or workdir} cannot be written or read ({error.strerror}); the "
            f"checkpoints in {workdir} are kept: mend this and run the same command again."
        ) from error
