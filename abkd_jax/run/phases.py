"""The phases of a run: what each needs made ready, checked and trained.

Each phase starts from the newest checkpoint of its folder, and all it does is a function of the
config and the step, so that a run which was stopped at any moment goes on as if it had not been: a
phase that was complete restores its last state and has no step left.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import data as datasets
from abkd_jax import objective, schema, train
from abkd_jax.losses import feature
from abkd_jax.train import checkpoint, parallel
from abkd_jax.train import workdir as folders
from abkd_jax.train.fit import Fit, Run, begin, fit_phase
from abkd_jax.train.interruption import Interruption
from abkd_jax.train.step import Networks, Objectives
from abkd_jax.types import Batch


class Result(NamedTuple):
    """What a phase ends with.

    Attributes:
        last: the networks that learned, after the last step.
        best: the same as they were at best_step.
        best_step: of the highest accuracy, on validation data where there are any.
    """

    last: Networks
    best: Networks
    best_step: int


@contextlib.contextmanager
def opened(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
    data: datasets.DataSet | None = None,
    profile: bool = False,
) -> Iterator[tuple[Run, Networks]]:
    """A run that is checked and ready to train, alone in its workdir, until the context ends.

    Args:
        config: of the run.
        workdir: its folder, which is made and locked.
        networks: {name: (apply_fn, variables)} for the networks of the config with model "given".
        data: in place of the config's.
        profile: whether to trace some steps of the last phase.

    Yields:
        The run, and the states of all its networks, those that are to learn at step 0.

    Raises:
        ValueError: one sentence, if the config, the workdir or the data cannot be used.
        OSError: one sentence for what the operating system refuses, also later in the context.
    """
    for name, value, kind, expected in (
        ("config", config, ml_collections.ConfigDict | Mapping, "a ConfigDict or a mapping"),
        ("workdir", workdir, str | os.PathLike, "the path of a folder"),
        ("networks", networks, Mapping | None, "a mapping {name: (apply_fn, variables)}"),
        ("data", data, datasets.DataSet | None, "a DataSet, such as data.from_arrays makes"),
    ):
        if not isinstance(value, kind) or (name == "workdir" and value == ""):
            raise ValueError(f"{name} must be {expected}; found {value!r:.80}.")
    config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    given, has_data = networks or {}, data is not None
    for name, pair in given.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[0]):
            raise ValueError(
                f"networks[{name!r}] must be (apply_fn, variables); found {pair!r:.80}."
            )
    if has_data:
        config["data"] = {"name": schema.GIVEN, "sha256": checkpoint.digest(data)}
    schema.check(config, given=given, has_data=has_data)
    config = schema.DEFAULTS | config
    mesh = parallel.mesh(config["devices"], batch_size=config["batch_size"])
    folder = pathlib.Path(workdir)
    with folders.locked(folder), Interruption() as interruption, _told_of_disks(folder):
        if not has_data:
            data = datasets.from_config(config["data"], data_seed=config["data_seed"])
        run = Run(config, folder, data, given, mesh, interruption, profile)
        phases = schema.phases(config)
        states = {name: _ready(run, name) for name in schema.ready(config)}
        run = run._replace(
            config=schema.with_widths(config, lambda n: _hidden_width(run, n, states))
        )
        states |= {name: new_network(run, name) for phase in phases for name in phase.learners}
        for phase in phases:  # all of them before the first trains, and before the folder is ours
            _check(run, phase, states)
        yield run, states


def describe(run: Run, phase: schema.Phase) -> dict[str, Any]:
    """What identifies the folder of a phase, and what it takes to load its networks."""
    preprocess = run.data.preprocess
    return {
        "config": run.config,
        "learners": phase.learners,
        "num_classes": run.data.num_classes,
        "preprocess": {
            name: None if value is None else np.asarray(value, np.float64).tolist()
            for name, value in (("mean", preprocess.mean), ("std", preprocess.std))
        },
    }


def _ready(run: Run, name: str) -> train.TrainState:
    """A network that is not trained here: given by the caller, or from another run's workdir."""
    if name in run.given:
        return train.adopt(*run.given[name])
    source = pathlib.Path(run.config[name]["checkpoint"])
    try:
        own = name if name in folders.read_about(source)["learners"] else None
        there, module, variables = folders.restore(source, own)
    except ValueError as error:
        raise ValueError(f"{name}.checkpoint: {error}") from None
    here = describe(run, schema.phases(run.config)[-1])["preprocess"]
    ours = schema.module(run.config, name, num_classes=run.data.num_classes)
    for what, theirs, expected in (
        ("the model", module, ours),
        ("the normalisation", there["preprocess"], here),
    ):
        if theirs != expected:
            raise ValueError(
                f"{name}.checkpoint: {source} has {what} {_in_a_line(theirs)}, but this run has "
                f"{_in_a_line(expected)}."
            )
    return train.adopt(module.apply, variables)


def _in_a_line(value: Any) -> str:
    """A flax module by its fields, in place of the many lines that it prints."""
    if not dataclasses.is_dataclass(value):
        return f"{value}"
    own = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
    fields = ", ".join(f"{name}={getattr(value, name)!r}" for name in own)
    return f"{type(value).__name__}({fields})"


def run_phase(run: Run, phase: schema.Phase, states: Networks, *, trains: bool) -> Result:
    """Trains the networks of a phase from where its folder stands, or only restores them."""
    folder = run.workdir / phase.name
    folder.mkdir(exist_ok=True)
    folders.claim(folder, describe(run, phase))
    learners, frozen = ({n: states[n] for n in names} for names in (phase.learners, phase.frozen))
    carry = begin(learners, objectives_of(run, phase))
    checkpoints = checkpoint.Checkpoints(folder / folders.CHECKPOINTS)
    try:
        step, carry = checkpoints.restore(carry) or (0, carry)
        if not trains and step == 0:
            raise ValueError(f"{folder} has no checkpoint to evaluate; train first.")
        if trains and step < run.config["num_steps"]:
            on_mesh = functools.partial(parallel.replicated, mesh=run.mesh)
            split, size = examples(run, phase)
            split = on_mesh(split) if isinstance(split, datasets.Split) else split
            objectives = objectives_of(run, phase, class_means(run, frozen))
            fit = Fit(run, phase, folder, on_mesh(frozen), objectives, split, size)
            owned = on_mesh(jax.tree.map(jnp.copy, carry))  # no buffer twice, for each is donated
            carry, step = fit_phase(fit, owned, step, checkpoints), run.config["num_steps"]
        best_step, _ = checkpoints.best() or (step, None)
        best = checkpoints.restore_at(best_step, carry) if best_step != step else carry
        return Result(carry.learners, best.learners, best_step)
    finally:
        checkpoints.close()


def new_network(run: Run, name: str) -> train.TrainState:
    """A network of the config that is to learn, at step 0."""
    built = schema.network(run.config, name, num_classes=run.data.num_classes)
    how = {"optimizer": built.optimizer, "ema_decay": built.ema_decay}
    if name in run.given:
        return train.adopt(*run.given[name], **how)
    inputs = _sample(run)
    try:
        return train.create(
            built.module, inputs, init_seed=schema.init_seed(run.config, name), **how
        )
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(_misfit(name, inputs, error)) from error


def objectives_of(
    run: Run, phase: schema.Phase, class_means: Mapping[str, Callable[[], Array]] | None = None
) -> Objectives:
    """The objectives of a phase; without `class_means`, with something in their place."""
    present = (*phase.learners, *phase.frozen)
    return schema.objectives(
        run.config, learners=phase.learners, present=present, class_means=class_means
    )


def class_means(run: Run, frozen: Networks) -> dict[str, Callable[[], Array]]:
    """By the name of a network that does not learn, what gives its class means, computed once."""
    return {
        name: functools.cache(functools.partial(_class_means, run, state))
        for name, state in frozen.items()
    }


def _class_means(run: Run, state: train.TrainState) -> Array:
    """The means of a network's features over each class of what teachers are trained on.

    A function of the network and the data alone: all labels, no augmentation, evaluation's mode.
    """
    state, size = parallel.replicated(state, run.mesh), run.config["batch_size"]
    sums, counts = np.zeros(()), np.zeros(())
    for batch in datasets.evaluation_batches(run.data.teacher, size, run.data.preprocess):
        found = _class_sums(state, batch, num_classes=run.data.num_classes, mesh=run.mesh)
        sums, counts = sums + np.asarray(found[0]), counts + np.asarray(found[1])
    means = sums / np.maximum(counts, 1)[:, None]
    return parallel.replicated(jnp.asarray(means, jnp.float32), run.mesh)


@functools.partial(jax.jit, static_argnames=("num_classes", "mesh"))
def _class_sums(state: train.TrainState, batch: Batch, *, num_classes: int, mesh: Mesh):
    """The sums and the sizes of the classes in one batch."""
    batch = parallel.split(batch, mesh)
    outputs, _ = state.forward(state.eval_params, batch["inputs"], train=False)
    labels = jnp.where(batch["where"], batch["labels"], -1)
    return feature.class_sums(outputs.hidden, labels, num_classes)


def _check(run: Run, phase: schema.Phase, states: Networks) -> None:
    """Refuses networks that do not fit the data, and losses that read what they do not show."""
    _, size = examples(run, phase)
    inputs, outputs = _sample(run), {}
    for name in (*phase.learners, *phase.frozen):
        state = states[name]
        forward = functools.partial(state.forward, train=name in phase.learners)
        try:
            outputs[name], _ = jax.eval_shape(forward, state.params, inputs, key=jax.random.key(0))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(_misfit(name, inputs, error)) from error
        logits, expected = outputs[name].logits, (len(inputs), run.data.num_classes)
        if not jnp.issubdtype(logits.dtype, jnp.floating):
            raise ValueError(f"{name} must give floating logits; found {logits.dtype}.")
        shape = logits.shape
        if shape != expected:
            raise ValueError(f"{name} must give logits of shape {expected}; found {shape}.")
    width = {name: 1 if x.hidden is None else x.hidden.shape[-1] for name, x in outputs.items()}
    means = lambda name: jnp.zeros((run.data.num_classes, width[name]))  # noqa: E731
    in_place = {name: functools.partial(means, name) for name in phase.frozen}
    objectives = objectives_of(run, phase, in_place)
    objective.check_needs(objectives, outputs)
    flags = jax.ShapeDtypeStruct((size,), bool)
    batch = {
        "inputs": jax.ShapeDtypeStruct((size, *inputs.shape[1:]), inputs.dtype),
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32),
        "where": flags,
        "labelled": flags,
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    step = functools.partial(train.train_step, micro_batches=run.config["micro_batches"])
    try:
        jax.eval_shape(step, {name: states[name] for name in outputs}, batch, objectives)
    except AssertionError as error:  # a check of a loss
        raise ValueError(f"{' and '.join(phase.learners)}: {error}") from error


def _hidden_width(run: Run, name: str, ready: Networks) -> int | None:
    """The width of the features of a network that is ready, or that is to learn."""
    if name in ready:
        state = ready[name]
    else:
        alone = {key: value for key, value in run.config[name].items() if key != "project"}
        state = new_network(run._replace(config=run.config | {name: alone}), name)
    forward = functools.partial(state.forward, train=False)
    outputs, _ = jax.eval_shape(forward, state.params, _sample(run))
    return None if outputs.hidden is None else outputs.hidden.shape[-1]


def _sample(run: Run) -> Array:
    """Two examples as networks see them."""
    return next(datasets.evaluation_batches(run.data.test, 2, run.data.preprocess))["inputs"]


def _misfit(name: str, inputs: Array, error: Exception) -> str:
    reason = f"{error}".strip().splitlines()[0].rstrip(".")
    return f"{name}: its model cannot take inputs of shape {inputs.shape[1:]}: {reason}."


def examples(run: Run, phase: schema.Phase) -> tuple[datasets.Split | datasets.Stream, int]:
    """The examples of a phase, and how many of them are a batch."""
    split = run.data.teacher if phase.split == "teacher" else run.data.train
    size, resident = run.config["batch_size"], isinstance(split, datasets.Split)
    if phase.split == "labelled" and resident:  # a stream withholds no label
        split = split.labelled_alone()
        size, parts = min(size, len(split)), run.mesh.shape["data"] * run.config["micro_batches"]
        size -= size % parts
        if size == 0:
            raise ValueError(
                f"{' and '.join(phase.learners)} trains on the labelled examples alone; of these "
                f"there are {len(split)}, fewer than devices x micro_batches, {parts}."
            )
    if not 0 < size <= len(split):
        raise ValueError(
            f"batch_size must be at most the {len(split)} examples to train "
            f"{' and '.join(phase.learners)}, and at least one for each device; found {size}."
        )
    return split, size


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
