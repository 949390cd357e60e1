"""What a run's files should say, recomputed from its seeds, its arrays and the bare training step.

A run is described by the classes below, which know nothing of the config. The first block says how
such a run is written, started and read back; it is all that changes when a config does.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from reference_scores import agreement, class_accuracy, summary, temperature

import abkd_jax
from abkd_jax import analysis, data, models, optimizers, schedules
from abkd_jax import sweep as sweeps
from abkd_jax.binding import bind, schedule
from abkd_jax.train.checkpoint import Checkpoints
from abkd_jax.types import Outputs, Term

# --- How a run is written, started and read back ------------------------------------------------

LOGGED = ("accuracy", "nll", "ece", "entropy")  # of the split that selects, on the way
SPLITS = dict(all="full", labelled="labelled", train="train")  # and what a config calls them
CLASS_MEANS = "class_means"  # what a config has in the place of centers
CACHED = "computed once for all steps"  # what a sweep says of the outputs of a frozen network


def group(net: "Net") -> dict[str, Any]:
    """A network's group of the config."""
    model = dict(fn=net.model, **net.hypers) if net.module is None else dict(fn="given")
    written = dict(model=model)
    if net.optimizer:
        written |= dict(optimizer=net.optimizer, terms=net.terms)
    options = dict(ema_decay=net.ema_decay, project=net.project)
    options["init_seed"] = net.init_seed if net.module is None else None
    return written | {key: value for key, value in options.items() if value is not None}


def config(run: "Run") -> dict[str, Any]:
    """The config of a run."""
    networks, phases = {name: group(net) for name, net in run.networks.items()}, {}
    for phase in run.phases:
        phases[phase.name] = dict(learn=phase.learners, see=phase.frozen, split=SPLITS[phase.split])
        if "student" in phase.learners:
            phases[phase.name]["select"] = "student"
    return dict(phases=phases, **networks, **run.numbers)


def given(run: "Run") -> dict[str, Any]:
    """What is handed over beside the config: the networks and the data of the run's own."""
    networks = {
        name: (net.module.apply, first_variables(run, name))
        for name, net in run.networks.items()
        if net.module is not None
    }
    how = dict(train=run.train, validation=run.validation, test=run.test, **run.how)
    return dict(networks=networks, data=data.from_arrays(num_classes=run.classes, **how))


def train(run: "Run", workdir: pathlib.Path) -> None:
    """Trains and evaluates the run."""
    abkd_jax.train_and_evaluate(config(run), workdir, **given(run))


def sweep(run: "Run", workdir: pathlib.Path, **options: Any) -> list[dict[str, float]]:
    """Trains the members of a sweep over the run; their rows."""
    return sweeps.sweep(config(run), workdir, **given(run), **options)


def folder(workdir: pathlib.Path, run: "Run", phase: "Phase") -> pathlib.Path:
    """Where a phase has its rows and checkpoints."""
    return workdir if phase is run.phases[-1] else workdir / phase.name


def saved(folder: pathlib.Path) -> dict[int, Any]:
    """{step: {network: what its state has, as nested dicts}} of the checkpoints of a phase."""
    with Checkpoints(folder / "checkpoints") as opened:
        found = {step: opened.restore_at(step) for step in opened.steps()}
    return {step: tree.get("carry", tree)["learners"] for step, tree in found.items()}


def saved_members(workdir: pathlib.Path) -> dict[str, Any]:
    """{network: what its state has, stacked over the members} after a sweep's last step."""
    chunks = [max(saved(part).items())[1] for part in sorted(workdir.glob("members_*"))]
    return jax.tree.map(lambda *x: np.concatenate(x), *chunks)


def column(run: "Run", split: str, learner: str, metric: str, other: str = "") -> str:
    """The name of a score in a sweep's rows."""
    phase = run.phases[-1]
    own = "" if learner == "student" or len(phase.learners) == 1 else f"{learner}_"
    several = len(phase.learners) + len(phase.frozen) > 2
    return f"{split}_{own}{metric}{f'_with_{other}' if other and several else ''}"


def header(run: "Run") -> dict[str, Any]:
    """What result.json says beside its networks."""
    phases = [
        dict(
            name=phase.name,
            folder="" if phase is run.phases[-1] else phase.name,
            learn=list(phase.learners),
            see=list(phase.frozen),
            split=SPLITS[phase.split],
            seeds=1,
        )
        for phase in run.phases
    ]
    on = dict(evaluated_on="test", selected_on=run.selects, score="accuracy")
    return dict(phases=phases, num_classes=run.classes, class_names=[], **on)


def selecting(accuracies: Mapping[str, float]) -> float:
    """The number by which a phase's best step is chosen, of the accuracies of its learners."""
    return accuracies.get("student", float(np.mean(list(accuracies.values()))))


def stacked_outputs(parts: list[Outputs]) -> Outputs:
    """The outputs for several batches, with a first axis over these; the head is that of all."""
    return stacked([part.replace(head=None) for part in parts]).replace(head=parts[0].head)


# --- What is run --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)  # each is a key of caches
class Net:
    """A network: by the name of its model, or handed over as a linen module of the test's own."""

    model: str = ""
    hypers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: nn.Module | None = None
    optimizer: Mapping[str, Any] | None = None
    terms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ema_decay: float | None = None
    init_seed: int | None = None
    project: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False)  # each is a key of caches
class Phase:
    """Who learns at once, who teaches, and from which examples: all, labelled or train."""

    name: str
    learners: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    split: str = "train"


@dataclasses.dataclass(frozen=True, eq=False)  # each is a key of caches
class Run:
    """Networks, phases in order, arrays and what is done to them (`how`), and the run's numbers."""

    networks: Mapping[str, Net]
    phases: tuple[Phase, ...]
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray] | None
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    how: Mapping[str, Any]
    numbers: Mapping[str, Any]

    @property
    def selects(self) -> str:
        """The name of the split by which the best step is chosen."""
        return "test" if self.validation is None else "validation"


class Course(NamedTuple):
    """What a phase goes through.

    Attributes:
        states: before the first step and after each.
        averages: of the parameters, what evaluation uses: of each network after as many steps.
        metrics: of each step.
    """

    states: list[dict[str, Any]]
    averages: list[dict[str, Any]]
    metrics: list[dict[str, float]]


# --- Batches ------------------------------------------------------------------------------------


@functools.cache
def examples(run: Run, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels, and whether a label may be seen, of what a phase trains on."""
    inputs, labels = run.train
    known = labels >= 0
    if split == "all":
        return inputs, labels, known
    if run.how.get("labelled"):
        per_class = run.how["labelled"] // run.classes
        seen_before = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
        known &= seen_before < per_class
    rows = ~np.isin(labels, run.how.get("omit", ()))
    if split == "labelled":
        rows &= known
    return inputs[rows], labels[rows], known[rows]


def batch_size(run: Run, split: str) -> int:
    """Of a phase: the labelled examples may be fewer than a batch, which still parts evenly."""
    size, parts = run.numbers["batch_size"], run.numbers["micro_batches"] * run.numbers["devices"]
    available = len(examples(run, split)[0])
    return size if size <= available else available - available % parts


def batch(run: Run, split: str, step: int, size: int) -> dict[str, Any]:
    """The batch of a step: its place in the epoch's order, and its key, by the seed alone."""
    inputs, labels, known = examples(run, split)
    seed, per_epoch = run.numbers["data_seed"], len(inputs) // size
    of_order = jax.random.split(jax.random.key(seed))[0]
    order = jax.random.permutation(jax.random.fold_in(of_order, step // per_epoch), len(inputs))
    chosen = np.asarray(order)[step % per_epoch * size :][:size]
    key = jax.random.fold_in(jax.random.key(seed), step)
    return dict(
        inputs=normalized(run, augmented(run, inputs[chosen], key)),
        labels=jnp.asarray(np.where(known, labels, -1)[chosen], jnp.int32),
        where=jnp.ones(size, bool),
        labelled=jnp.asarray(known[chosen]),
        key=key,
    )


def augmented(run: Run, images: np.ndarray, key: jax.Array) -> np.ndarray:
    """Each image cut out of its padded self, then mirrored, as the step's key has it."""
    pad, flip, size = run.how.get("pad", 0), run.how.get("flip", False), len(images)
    if not (pad or flip):
        return images
    of_offset, of_flip = jax.random.split(jax.random.fold_in(key, int.from_bytes(b"aug")))
    down, right = np.asarray(jax.random.randint(of_offset, (2, size, 1), -pad, pad + 1))[..., 0]
    mirrored = np.asarray(jax.random.bernoulli(of_flip, shape=(size, 1)))[:, 0] & flip
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = []
    for i, image in enumerate(padded):
        window = image[pad + down[i] :, pad + right[i] :][:height, :width]
        windows.append(window[:, ::-1] if mirrored[i] else window)
    return np.stack(windows)


def normalized(run: Run, inputs: np.ndarray) -> jax.Array:
    """Stored examples as networks take them."""
    found = inputs / 255.0 if inputs.dtype == np.uint8 else inputs
    if run.how.get("mean"):
        found = (found - np.asarray(run.how["mean"])) / np.asarray(run.how["std"])
    return jnp.asarray(found, jnp.float32)


# --- Objectives, optimisers and networks, built by hand -----------------------------------------


def number(value: Any, step: int, num_steps: int) -> float:
    """A number of a config at a step: itself, or the value of a schedule's group."""
    if not isinstance(value, Mapping):
        return value
    group = dict(begin=0, steps=num_steps) | value
    share = np.clip((step - group["begin"]) / group["steps"], 0, 1)
    if group["fn"] == "linear":
        return group["start"] + (group["end"] - group["start"]) * share
    if group["fn"] == "cosine":
        return group["end"] + (group["start"] - group["end"]) * (1 + np.cos(np.pi * share)) / 2
    if group["fn"] == "piecewise":
        return group["start"] * group["factor"] ** np.sum(step >= np.asarray(group["boundaries"]))
    raise NotImplementedError(group["fn"])


def objective(run: Run, phase: Phase, learner: str, step: int, frozen: Any) -> dict[str, Term]:
    """The terms of a network with their numbers as they stand at a step."""
    present = [name for name in (*phase.learners, *phase.frozen) if name != learner] or [learner]
    terms = {}
    for name, group in run.networks[learner].terms.items():
        group = dict(where="where", other=present[0]) | group
        where, other, weight = (group.pop(key) for key in ("where", "other", "weight"))
        weight = jnp.float32(number(weight, step, run.numbers["num_steps"]))
        centers = functools.partial(class_means, run, other, frozen.get(other))
        terms[name] = Term(bound(run, group, step, centers), weight, where=where, other=other)
    return terms


def bound(run: Run, group: Mapping[str, Any], step: int, centers: Callable[[], Any]) -> Any:
    """A loss or divergence with all its numbers, schedules among them, as they stand at a step."""
    values = {}
    for key, value in group.items():
        if isinstance(value, str) and value == CLASS_MEANS:
            values[key] = centers()
        elif isinstance(value, Mapping) and not hasattr(schedules, value["fn"]):
            values[key] = bound(run, value, step, centers)
        elif key != "fn":
            values[key] = number(value, step, run.numbers["num_steps"])
    return bind(getattr(abkd_jax, group["fn"]), **values)


def optimizer(run: Run, net: Net) -> Any:
    """The bound optimiser of a network, its schedules among its numbers."""
    values = {key: value for key, value in net.optimizer.items() if key != "fn"}
    for key, value in values.items():
        if isinstance(value, Mapping):
            fn = getattr(schedules, value["fn"])
            steps = {} if value["fn"] == "piecewise" else dict(steps=run.numbers["num_steps"])
            ends = {k: x for k, x in value.items() if k != "fn"}
            values[key] = schedule(fn, **steps | ends)
    return bind(getattr(optimizers, net.optimizer["fn"]), **values)


@functools.cache
def module(run: Run, name: str, projections: bool = True) -> nn.Module:
    """The linen module of a network, with its projection to the width of another's features."""
    net = run.networks[name]
    if net.module is not None:
        return net.module
    plain = getattr(models, net.model)(num_classes=run.classes, **net.hypers)
    if not (projections and net.project):
        return plain
    width = {
        n: outputs(run, n, first_variables(run, n, False), run.test[0][:2], False).hidden.shape[-1]
        for n in (name, net.project["hidden"])
    }
    other = width[net.project["hidden"]]
    return plain if other == width[name] else models.projected(plain, hidden=other)


@functools.cache
def first_variables(run: Run, name: str, projections: bool = True) -> dict[str, Any]:
    """The variables of a new network: of its own seed, or of the run's."""
    own = run.networks[name].init_seed
    seed = run.numbers["init_seed"] if own is None else own
    inputs = normalized(run, run.test[0][:2])
    return module(run, name, projections).init(jax.random.key(seed), inputs, train=False)


def outputs(run: Run, name: str, variables: Any, inputs: np.ndarray, projections=True) -> Outputs:
    """What a network shows of stored examples in evaluation."""
    return forward(module(run, name, projections))(variables, normalized(run, inputs))


@functools.cache
def forward(network: nn.Module) -> Any:
    """Evaluation, compiled."""
    return jax.jit(functools.partial(network.apply, train=False))


def class_means(run: Run, name: str, variables: Any) -> np.ndarray:
    """The means of a network's features over the classes of all training examples with a label."""
    inputs, labels = run.train
    hidden = np.asarray(outputs(run, name, variables, inputs).hidden, np.float64)
    rows = (labels == np.arange(run.classes)[:, None]).astype(float)
    return np.asarray(rows @ hidden / rows.sum(-1, keepdims=True), np.float32)


# --- What a phase goes through ------------------------------------------------------------------


def course(run: Run, phase: Phase, taught: Mapping[str, Any]) -> Course:
    """A phase, step by step, by the bare `train_step`.

    Args:
        run: to which it belongs.
        phase: to go through.
        taught: {name: variables} of the networks that do not learn.

    Returns:
        All that there was.
    """
    size = batch_size(run, phase.split)
    frozen = {name: taught[name] for name in phase.frozen}
    others = {name: abkd_jax.adopt(module(run, name).apply, x) for name, x in frozen.items()}
    states = {}
    for name in phase.learners:
        how = dict(optimizer=optimizer(run, run.networks[name]))
        states[name] = abkd_jax.adopt(module(run, name).apply, first_variables(run, name), **how)
    found = Course([states], [{n: doubled(state.params) for n, state in states.items()}], [])
    for step in range(run.numbers["num_steps"]):
        terms = {name: objective(run, phase, name, step, frozen) for name in phase.learners}
        after, metrics = abkd_jax.train_step(
            found.states[-1] | others,
            batch(run, phase.split, step, size),
            terms,
            micro_batches=run.numbers["micro_batches"],
        )
        states, averages = {name: after[name] for name in phase.learners}, {}
        for name, state in states.items():
            decay = run.networks[name].ema_decay or 0.0
            before, now = found.averages[-1][name], doubled(state.params)
            averages[name] = jax.tree.map(functools.partial(averaged, decay), before, now)
        found.states.append(states)
        found.averages.append(averages)
        found.metrics.append({name: float(value) for name, value in metrics.items()})
    return found


def averaged(decay: float, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The moving average after another value."""
    return decay * old + (1 - decay) * new


def doubled(tree: Any) -> Any:
    """The arrays in numpy's float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def variables(found: Course, name: str, step: int) -> dict[str, Any]:
    """What evaluation, and a student, sees of a network after so many steps."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found.averages[step][name])
    return {"params": params, "batch_stats": found.states[step][name].batch_stats}


def courses(run: Run) -> tuple[dict[str, Course], dict[str, Any]]:
    """The phases by name, and the variables of every network at the end of its own."""
    found = {}
    learned = [name for phase in run.phases for name in phase.learners]
    last = {name: first_variables(run, name) for name in run.networks if name not in learned}
    for phase in run.phases:
        found[phase.name] = course(run, phase, last)
        last |= {name: variables(found[phase.name], name, -1) for name in phase.learners}
    return found, last


def on_split(run: Run, name: str, variables: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits in float64, and labels, of a whole split."""
    inputs, labels = getattr(run, split)
    return np.asarray(outputs(run, name, variables, inputs).logits, np.float64), labels


# --- What the files should say ------------------------------------------------------------------


def evaluated_steps(run: Run) -> list[int]:
    """The steps at which there is a checkpoint, and an evaluation."""
    last, every = run.numbers["num_steps"], run.numbers["checkpoint_every"]
    return [*range(every, last, every), last]


def quick(run: Run, found: Course, name: str, step: int) -> dict[str, Any]:
    """The scores of a network on the way, on the split that selects."""
    return summary(*on_split(run, name, variables(found, name, step), run.selects))


def rows(run: Run, phase: Phase, found: Course, last: Mapping[str, Any]) -> list[dict[str, float]]:
    """The rows of a phase's metrics.jsonl, but for the times."""
    end, every, written = run.numbers["num_steps"], run.numbers["log_every"], []
    for step in range(1, end + 1):
        if step % every == 0 or step == end:
            begin = (step - 1) // every * every  # of the interval, which the end may cut short
            names = found.metrics[0]
            means = {n: np.mean([m[n] for m in found.metrics[begin:step]]) for n in names}
            rates = {}
            for name in phase.learners:
                rate = run.networks[name].optimizer["learning_rate"]
                rates[f"{name}/learning_rate"] = number(rate, step - 1, end)
            probed = analysed(run, phase, found, step, last) if run.numbers["analysis"] else {}
            written.append(dict(step=step) | means | rates | probed)
        if step in evaluated_steps(run):
            row = dict(step=step)
            for name in phase.learners:
                scores = quick(run, found, name, step)
                for metric in LOGGED:
                    row[f"{run.selects}/{name}/{metric}"] = scores[metric]
            written.append(row)
    return written


def accuracies(run: Run, phase: Phase, found: Course) -> dict[int, dict[str, float]]:
    """{step: {learner: its accuracy}} on the split that selects."""
    return {
        step: {name: quick(run, found, name, step)["accuracy"] for name in phase.learners}
        for step in evaluated_steps(run)
    }


def best_step(run: Run, phase: Phase, found: Course) -> int:
    """That of the highest score; of equal ones the latest."""
    scores = {step: selecting(each) for step, each in accuracies(run, phase, found).items()}
    return max(scores, key=lambda step: (scores[step], step))


def analysed(run: Run, phase: Phase, found: Course, step: int, last: Any) -> dict[str, float]:
    """`analysis.probe` on the first batches, each of the size that a step sees at once."""
    size = batch_size(run, phase.split) // run.numbers["micro_batches"]
    count = min(4, len(examples(run, phase.split)[0]) // size)
    each = [batch(run, phase.split, n, size) for n in range(count)]
    states = found.states[step] | {
        n: abkd_jax.adopt(module(run, n).apply, last[n]) for n in phase.frozen
    }

    def shown(name, params, batch):
        how = dict(train=True, key=batch["key"]) if name in phase.learners else dict(train=False)
        return states[name].forward(params, batch["inputs"], **how)[0]

    others = {}
    for name, state in states.items():
        others[name] = stacked_outputs([shown(name, state.params, part) for part in each])
    written = {}
    for name in phase.learners:
        probes = [p for p in run.numbers["analysis"] if p != "gradient_noise" or count > 1]
        terms = objective(run, phase, name, step, last)
        values = probed(states[name], others, stacked(each), terms, probes=tuple(probes))
        written |= {f"analysis/{name}/{key}": float(value) for key, value in values.items()}
    return {key: value for key, value in written.items() if key.split("/")[1] != key.split("/")[-1]}


def stacked(trees: list[Any]) -> Any:
    """The trees as one, its arrays with a first axis over them."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@functools.partial(jax.jit, static_argnames="probes")
def probed(state: Any, others: Any, batches: Any, terms: Any, *, probes: tuple[str, ...]) -> Any:
    """`analysis.probe` of a network as it is in training, compiled."""

    def shown(params, batch):
        return state.forward(params, batch["inputs"], train=True, key=batch["key"])[0]

    return analysis.probe(state.params, shown, others, batches, terms, probes=probes)


def scores(run: Run, name: str, variables: Any) -> tuple[dict[str, Any], float]:
    """What result.json says of a network on test data, and its accuracy where it is selected."""
    logits, labels = on_split(run, name, variables, "test")
    found = summary(logits, labels) | dict(class_accuracy=class_accuracy(logits, labels))
    found |= dict(count=len(labels), temperature=None, scaled=None)
    selected = on_split(run, name, variables, run.selects)
    if run.validation is not None:
        found["temperature"] = temperature(*selected)
        scaled = summary(logits / found["temperature"], labels)
        parts = ("nll", "brier", "ece", "adaptive_ece", "reliability")
        found["scaled"] = {part: scaled[part] for part in parts}
    return found, summary(*selected)["accuracy"]


def member(run: Run, point: Mapping[str, float], later: int) -> Run:
    """The single run that a member of a sweep stands for: its numbers, its seed that much later."""

    def changed(values, keys, value):
        return {**values, keys[0]: changed(values[keys[0]], keys[1:], value) if keys[1:] else value}

    networks = dict(run.networks)
    for name in run.phases[-1].learners:
        if networks[name].init_seed is not None and networks[name].module is None:
            own = networks[name].init_seed + later
            networks[name] = dataclasses.replace(networks[name], init_seed=own)
    for path, value in point.items():
        name, field, *keys = path.split(".")
        values = changed(getattr(networks[name], field), keys, value)
        networks[name] = dataclasses.replace(networks[name], **{field: values})
    numbers = {**run.numbers, "init_seed": run.numbers["init_seed"] + later}
    return dataclasses.replace(run, networks=networks, numbers=numbers)


def member_scores(run: Run, found: Course, taught: Any, step: int, split: str) -> dict[str, float]:
    """The columns of a member's row on one split, after so many steps."""
    phase = run.phases[-1]
    seen = {n: taught[n] for n in phase.frozen}
    seen |= {n: variables(found, n, step) for n in phase.learners}
    logits = {name: on_split(run, name, x, split)[0] for name, x in seen.items()}
    labels, written = getattr(run, split)[1], {}
    for name in phase.learners:
        for metric, value in summary(logits[name], labels).items():
            if metric not in ("adaptive_ece", "reliability"):
                written[column(run, split, name, metric)] = value
        for other in logits:
            if other != name:
                for metric, value in agreement(logits[name], logits[other]).items():
                    written[column(run, split, name, metric, other)] = value
    return written


def paired(expected: Any, raw: Any) -> list[tuple[str, np.ndarray, Any]]:
    """(path, array, expected leaf), from the nested dicts that a checkpoint has of such a tree."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(expected):
        part = raw
        for key in path:
            key = getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
            part = part[key] if not isinstance(part, Mapping) or key in part else part[str(key)]
        found.append((jax.tree_util.keystr(path), np.asarray(part), leaf))
    return found


def digest(like: Any, raw: Any) -> str:
    """The SHA-256 of a checkpoint's arrays, each by its path, type, shape and bytes."""
    sha = hashlib.sha256()
    for path, array, _ in paired(like, raw):
        sha.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()
