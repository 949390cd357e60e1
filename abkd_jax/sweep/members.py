"""Many students in one program: a sweep over the numbers of a config and over init seeds.

Students are stacked and advanced by one compiled step, by vmap and over the local devices
(`parallel.spread`). They share the batches, and the forward passes of the networks that teach them.
"""

import csv
import functools
import itertools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax import data as datasets
from abkd_jax import schema, train
from abkd_jax.metrics import summarize
from abkd_jax.train import checkpoint, parallel
from abkd_jax.train import workdir as folders
from abkd_jax.train.fit import Run, call_length, kept_finite
from abkd_jax.train.phase import class_means, describe, examples, objectives_of, opened, run_phase
from abkd_jax.train.progress import Progress
from abkd_jax.train.step import Networks, Objectives
from abkd_jax.types import Outputs, nearest

TABLE = "sweep.csv"
HISTORY = "history.csv"
_ON_THE_WAY = ("accuracy", "nll", "ece", "entropy")  # of the validation set
_CACHEABLE = frozenset(("logits", "hidden"))  # parts of Outputs with a row for each example
_SHARE_OF_MEMORY = 0.5
_RUN_AHEAD = 2
_EXAMPLE = "student.terms.distill.divergence.alpha"


@struct.dataclass
class Member:
    """What one student carries from step to step; stacked over members.

    Attributes:
        learners: its networks.
        bad_step: the first step after which a metric or parameter was not finite, -1 for none; from
            then on it stays as it was before.
        history: {metric: [evaluations]}, NaN for those to come.
    """

    learners: Networks
    bad_step: Array
    history: dict[str, Array]


class Plan(NamedTuple):
    """A sweep that was checked.

    Attributes:
        points: the swept numbers of each member, by path, and its init seed.
        configs: of each member, a single run's.
        over: the swept values, by path; members go through them in this order.
    """

    points: list[dict[str, float | int]]
    configs: list[dict[str, Any]]
    over: dict[str, list[float]]


def sweep(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    over: Mapping[str, Sequence[float]],
    init_seeds: int = 1,
    chunk: int = 0,
    networks: Mapping[str, tuple[Callable, Any]] | None = None,
    data: datasets.DataSet | None = None,
) -> list[dict[str, float]]:
    """Trains a student for every combination of numbers and init seeds, or goes on with it.

    A member is the student of the single run with the same numbers and seeds (an `init_seed` of a
    network's own goes up with the run's). Teachers are trained once, in the workdir; the config's
    `baseline` is left out.

    Args:
        config: of a run; see `train_and_evaluate`.
        workdir: the folder of the sweep, which is made.
        over: {path: values}: numbers of the networks that learn last, such as
            "student.terms.distill.divergence.alpha" or "student.optimizer.learning_rate".
        init_seeds: how many, from the config's on.
        chunk: how many members train at once; 0 for as many as memory holds.
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
        SystemExit: with code 0, if a signal asked to stop, after saving.
    """
    for name, value, least in (("init_seeds", init_seeds, 1), ("chunk", chunk, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; found {value!r}.")
    config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    config.pop("baseline", None)
    with opened(config, workdir, networks=networks, data=data) as (run, states):
        *before, phase = schema.phases(run.config)
        plan = planned(run.config, phase, over, init_seeds)
        values = [[path, list(map(float, numbers))] for path, numbers in plan.over.items()]
        about = {"over": values, "init_seeds": init_seeds, "chunk": chunk}
        folders.claim(run.workdir, describe(run, phase) | {"sweep": about})
        for part in before:
            result = run_phase(run, part, states, trains=True)
            states |= {name: train.frozen(state) for name, state in result.last.items()}
        frozen = {name: states[name] for name in phase.frozen}
        program = _Program(run, phase, frozen, plan)
        size = _remembered(run.workdir / "chunk.json", chunk or program.fitting)
        rows = []
        for start in range(0, len(plan.points), size):
            rows += program.chunk(start, min(start + size, len(plan.points)))
        _write_csv(run.workdir / TABLE, [row["last"] for row in rows])
        _write_csv(run.workdir / HISTORY, [line for row in rows for line in row["history"]])
        return [row["last"] for row in rows]


def planned(
    config: Mapping[str, Any],
    phase: schema.Phase,
    over: Mapping[str, Sequence[float]],
    init_seeds: int,
) -> Plan:
    """The members of a sweep.

    Args:
        config: of the run, as a plain dict.
        phase: in which the members learn.
        over: {path: values}.
        init_seeds: how many.

    Returns:
        Their numbers and configs.

    Raises:
        ValueError: one sentence that names the path and what it should be.
    """
    if not isinstance(over, Mapping):
        raise ValueError(f"over must be a mapping {{path: values}}; found {over!r:.80}.")
    if not over:
        raise ValueError(f"over must name at least one number to sweep, such as {_EXAMPLE!r}.")
    over = {path: _listed(values) for path, values in over.items()}
    for path, values in over.items():
        _check_path(config, phase, path)
        _check_values(config, phase, path, values)
    own = {name: schema.init_seed(config, name) for name in phase.learners}
    if max(own.values()) + init_seeds > 2**31:
        raise ValueError(
            f"init_seeds must leave every init seed below 2**31; found {init_seeds} from "
            f"{max(own.values())} on."
        )
    seeds = range(config["init_seed"], config["init_seed"] + init_seeds)
    points, configs = [], []
    for *numbers, seed in itertools.product(*over.values(), seeds):
        point = dict(zip(over, map(float, numbers), strict=True))
        member = config | {"init_seed": seed}
        for name in phase.learners:  # a network's own seed goes along with the run's
            if "init_seed" in config[name]:
                shifted = config[name]["init_seed"] + seed - config["init_seed"]
                member[name] = dict(config[name]) | {"init_seed": shifted}
        for path, number in point.items():
            member = _with(member, path.split("."), number)
        points.append(point | {"init_seed": seed})
        configs.append(member)
    return Plan(points, configs, over)


def best(rows: Sequence[Mapping[str, float]], by: str = "validation_accuracy") -> dict[str, Any]:
    """The numbers with the highest mean of a score over the init seeds.

    Of equal accuracies that with the lowest NLL is taken, else the first.

    Args:
        rows: of a sweep.
        by: the score, which is to be high.

    Returns:
        The row's numbers with the mean and the standard deviation of every score over the seeds,
        as `averaged` gives them.
    """
    known = [key for key in rows[0] if key.startswith(("validation_", "test_"))]
    if by not in known:
        raise ValueError(f"by must be one of {', '.join(known)}; found {by!r}{nearest(by, known)}.")
    means = [row for row in averaged(rows) if math.isfinite(row[by])]
    if not means:
        raise ValueError(f"no point of the sweep has a finite {by}; lower the learning rate.")
    nll = by.replace("accuracy", "nll")
    return max(means, key=lambda row: (row[by], -row[nll] if nll in row else 0.0))


def averaged(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Means over the init seeds, one row for each point, with "..._std" beside each score.

    A point of which a member was not finite has NaN scores.
    """
    groups: dict[tuple, list] = {}
    for row in rows:
        numbers = tuple((k, v) for k, v in row.items() if "." in k)
        groups.setdefault(numbers, []).append(row)
    table = []
    for numbers, members in groups.items():
        found = dict(numbers)
        for key in members[0]:
            if key.startswith(("validation_", "test_")):
                values = np.asarray([m[key] if m["bad_step"] < 0 else np.nan for m in members])
                found[key] = float(values.mean())
                found[f"{key}_std"] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        table.append(found)
    return table


class _Program:
    """The compiled steps of a sweep, and its chunks."""

    def __init__(self, run: Run, phase: schema.Phase, frozen: Networks, plan: Plan):
        self._run, self._phase, self._plan = run, phase, plan
        self._frozen = parallel.everywhere(frozen)
        split, self._size = examples(run, phase)
        means = class_means(run, frozen)
        self._objectives = lambda config: objectives_of(run._replace(config=config), phase, means)
        first = self._objectives(plan.configs[0])
        if _cacheable(run, phase, split, first):
            print(f"outputs of {', '.join(frozen)}: computed once for all steps", file=sys.stderr)
            split = _with_outputs(run, split, frozen)
        resident = isinstance(split, datasets.Split)
        self._split = parallel.everywhere(split) if resident else split
        steps = range(0, run.config["num_steps"], run.config["checkpoint_every"])
        self._evaluations = len(steps)
        how = {"size": self._size, "micro_batches": run.config["micro_batches"]}
        # One object for each count, by which `spread` compiles.
        self._steps = functools.cache(lambda n: functools.partial(advanced, count=n, **how))
        validation = run.data.validation
        self._selects = "test" if validation is None else "validation"
        self._selecting = run.data.test if validation is None else validation

    def fitting(self) -> int:
        """How many members memory holds at once, were nothing of a step's results ever freed."""
        member = jax.tree.map(lambda x: x[0], self._stacked(0, 1))
        fed, _ = self._feed()(0)
        jaxpr = jax.make_jaxpr(self._steps(1))(member, *self._shared(fed, 0)).jaxpr
        count = int(_SHARE_OF_MEMORY * _memory() / (_bytes_of(jaxpr) + 1))
        return max(1, min(count, len(self._plan.points)))

    def chunk(self, start: int, end: int) -> list[dict[str, Any]]:
        """Trains some of the members from where their folder stands; their rows."""
        folder = self._run.workdir / f"members_{start:05}"
        done = folder / "rows.json"
        if done.exists() and len(rows := _read_rows(done)) == end - start:
            return rows
        folder.mkdir(exist_ok=True)
        checkpoints = checkpoint.Checkpoints(folder / folders.CHECKPOINTS)
        try:
            members, objectives = self._stacked(start, end)
            step, members = checkpoints.restore(members) or (0, members)
            members = self._train(members, objectives, step, checkpoints, start, end)
        finally:
            checkpoints.close()
        rows = self._rows(members, start, end)
        folders.write_json(done, rows)
        return _read_rows(done)

    def _stacked(self, start: int, end: int) -> tuple[Member, Objectives]:
        """The members at step 0, and their objectives."""
        configs, count = self._plan.configs[start:end], end - start
        built = [self._objectives(config) for config in configs]
        optimizers = []
        for member in configs:
            found = {n: self._network(member, n) for n in self._phase.learners}
            optimizers.append({n: (x.optimizer, x.ema_decay) for n, x in found.items()})
        stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
        numbers, objectives = stack(*optimizers), stack(*built)
        learners = {}
        for name in self._phase.learners:
            seeds = jnp.asarray([schema.init_seed(member, name) for member in configs])
            learners[name] = self._new(name, seeds, *numbers[name])
        # With types of their own: a step's results have, and would be compiled for once more.
        empty = jnp.full((count, self._evaluations), jnp.nan, jnp.float32)
        history = {f"{n}/{m}": empty for n in learners for m in _ON_THE_WAY}
        return Member(learners, jnp.full(count, -1, jnp.int32), history), objectives

    def _network(self, config: Mapping[str, Any], name: str) -> schema.Network:
        return schema.network(config, name, num_classes=self._run.data.num_classes)

    def _new(self, name: str, seeds: Array, optimizer: Any, ema_decay: Any) -> train.TrainState:
        """New networks, one for each seed and set of numbers."""
        run = self._run
        if name in run.given:
            new = lambda seed, **how: train.adopt(*run.given[name], **how)  # noqa: E731
        else:
            module = self._network(run.config, name).module
            inputs = next(datasets.evaluation_batches(run.data.test, 1, run.data.preprocess))
            new = lambda seed, **how: train.create(  # noqa: E731
                module, inputs["inputs"], init_seed=seed, **how
            )
        decays = ema_decay is not None
        of = lambda seed, o, e: new(seed, optimizer=o, ema_decay=e if decays else None)  # noqa: E731
        return jax.vmap(of)(seeds, optimizer, ema_decay if decays else seeds)

    def _feed(self) -> datasets.Feed:
        return datasets.Feed(self._split, data_seed=self._run.config["data_seed"], size=self._size)

    def _shared(self, fed: Any, step: int) -> tuple[Any, ...]:
        """What all members take in a step."""
        data_seed = jnp.asarray(self._run.config["data_seed"])
        return self._frozen, fed, self._run.data.preprocess, data_seed, jnp.asarray(step)

    def _train(self, members, objectives, step, checkpoints, start, end) -> Member:
        """From a step to the last."""
        config, feed = self._run.config, self._feed()
        # On a device from the first step on, as results are: one placement is one compilation.
        members, objectives = jax.device_put((members, objectives), jax.local_devices()[0])
        last, every = config["num_steps"], config["checkpoint_every"]
        total = len(self._plan.points)
        label = f"students {start + 1} to {end} of {total}"
        per_step = self._size * (end - start)
        flying = []
        with Progress(label, last, start=step, examples_per_step=per_step) as progress:
            while step < last:
                fed, until = feed(step)
                count = call_length(step, until, config)
                shared = self._shared(fed, step)
                members = parallel.spread(self._steps(count), (members, objectives), *shared)
                step += count
                flying.append(members.bad_step)
                if len(flying) > _RUN_AHEAD:
                    flying.pop(0).block_until_ready()
                progress.update(step)
                saves = step % every == 0 or step == last
                stops = self._run.interruption.requested if step < last else None
                if saves:
                    members = self._evaluated(members, -(-step // every) - 1, progress, step)
                if saves or stops:
                    checkpoints.save(step, members)
                if stops:
                    checkpoints.wait()
                    print(
                        f"{label}: {stops} at step {step} of {last}, which is saved; the same "
                        "command goes on from there.",
                        file=sys.stderr,
                    )
                    raise SystemExit(0)
            checkpoints.wait()
        return members

    def _evaluated(self, members: Member, index: int, progress: Progress, step: int) -> Member:
        """With the scores on validation data in the history."""
        scores = self._scores(members, self._selecting)
        history = dict(members.history)
        for key in history:
            history[key] = members.history[key].at[:, index].set(scores[key])
        name = "student" if "student" in self._phase.learners else self._phase.learners[0]
        accuracy = np.asarray(scores[f"{name}/accuracy"])
        progress.update(step, best_accuracy=float(np.nanmax(accuracy)))
        return members.replace(history=history)

    def _scores(self, members: Member, split: Any) -> dict[str, np.ndarray]:
        """{"student/accuracy": [members], "student|teacher/agreement": ...} on a split."""
        total = None
        size = min(1000, len(split))
        for batch in datasets.evaluation_batches(split, size, self._run.data.preprocess):
            sums = parallel.spread(_sums, members.learners, self._frozen, batch)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        found = {name: jax.vmap(summarize)(sums) for name, sums in total.items()}
        return {f"{n}/{m}": np.asarray(x) for n, values in found.items() for m, x in values.items()}

    def _rows(self, members: Member, start: int, end: int) -> list[dict[str, Any]]:
        """{"last": the row of the table, "history": rows} of each member."""
        splits = {"validation": self._run.data.validation, "test": self._run.data.test}
        scores = {n: self._scores(members, split) for n, split in splits.items() if split}
        last, every = self._run.config["num_steps"], self._run.config["checkpoint_every"]
        rows = []
        for i, point in enumerate(self._plan.points[start:end]):
            row = dict(point)
            for split, values in scores.items():
                row |= {_column(self._phase, split, key): _shown(x[i]) for key, x in values.items()}
            row["bad_step"] = int(members.bad_step[i])
            history = []
            for index in range(self._evaluations):
                line = point | {"step": min((index + 1) * every, last)}
                for key, values in members.history.items():
                    line[_column(self._phase, self._selects, key)] = _shown(values[i, index])
                history.append(line)
            rows.append({"last": row, "history": history})
        return rows


def advanced(member, frozen, fed, preprocess, data_seed, step, *, count, size, micro_batches):
    """A member, which comes with its objectives, after `count` steps."""
    member, objectives = member
    one = functools.partial(
        _stepped, objectives, frozen, fed, preprocess, data_seed, size, micro_batches
    )
    if count == 1:
        return one(member, step)
    return jax.lax.scan(lambda m, i: (one(m, i), None), member, step + jnp.arange(count))[0]


def _stepped(objectives, frozen, fed, preprocess, data_seed, size, micro_batches, member, step):
    batch = fed.batch(data_seed, step, size, preprocess)
    networks, metrics = train.train_step(
        member.learners | frozen, batch, objectives, micro_batches=micro_batches
    )
    learners, bad_step = kept_finite(member.learners, networks, metrics, member.bad_step, step)
    return member.replace(learners=learners, bad_step=bad_step)


def _sums(learners: Networks, frozen: Networks, batch: Any) -> dict[str, Any]:
    """The sums of `eval_step` of the networks that learn, and of their agreement with all."""
    sums, _ = train.eval_step(learners | frozen, batch)
    return {name: x for name, x in sums.items() if name.partition("|")[0] in learners}


def _cacheable(run: Run, phase: schema.Phase, split: Any, objectives: Objectives) -> bool:
    """Whether the outputs of frozen networks may be computed once: exact, and less work."""
    preprocess = run.data.preprocess
    needs = {part for terms in objectives.values() for t in terms.values() for part in t.loss.needs}
    repeats = run.config["num_steps"] * run.config["batch_size"] > len(split)
    fixed = isinstance(split, datasets.Split) and not (preprocess.pad or preprocess.flip)
    return bool(phase.frozen) and fixed and repeats and needs <= _CACHEABLE


def _with_outputs(run: Run, split: datasets.Split, frozen: Networks) -> datasets.Split:
    """The split with the outputs of the networks that do not learn."""
    parts = []
    for batch in datasets.evaluation_batches(split, min(1000, len(split)), run.data.preprocess):
        found = _row_outputs(frozen, batch["inputs"])
        parts.append(jax.tree.map(lambda x, kept=batch["where"]: x[kept], found))
    return split.replace(outputs=jax.tree.map(lambda *x: jnp.concatenate(x), *parts))


@jax.jit
def _row_outputs(frozen: Networks, inputs: Array) -> dict[str, Outputs]:
    outputs = {n: s.forward(s.eval_params, inputs, train=False)[0] for n, s in frozen.items()}
    return {n: Outputs(logits=x.logits, hidden=x.hidden) for n, x in outputs.items()}


def _check_path(config: Mapping[str, Any], phase: schema.Phase, path: str) -> None:
    """Refuses a path at which the config has no number of a network that learns."""
    group, keys = config, path.split(".")
    for depth, key in enumerate(keys):
        known = phase.learners if depth == 0 else group if isinstance(group, Mapping) else ()
        if key not in known:
            at = ".".join(keys[:depth]) or "a sweep"
            raise ValueError(
                f"over {path}: {at} has no {key!r}{nearest(key, known)}; it has "
                f"{', '.join(known) or 'nothing below it'}."
            )
        group = group[key]
    if not _is_number(group):
        raise ValueError(f"over {path}: the config must have a number there; found {group!r:.80}.")
    if path.endswith(".init_seed"):
        raise ValueError(f"over {path}: seeds are swept by init_seeds.")


def _check_values(
    config: Mapping[str, Any], phase: schema.Phase, path: str, values: list[Any]
) -> None:
    """Refuses values that are no numbers, that repeat, or that the config's functions refuse."""
    if (
        not isinstance(values, list)
        or not values
        or not all(map(_is_number, values))
        or len(set(values)) < len(values)
    ):
        raise ValueError(f"over {path} must have different numbers to sweep; found {values!r:.80}.")
    present, structures = (*phase.learners, *phase.frozen), set()
    for value in values:
        member = _with(config, path.split("."), float(value))
        try:
            terms = schema.objectives(member, learners=phase.learners, present=present)
            found = {n: schema.network(member, n, num_classes=2) for n in phase.learners}
        except ValueError as error:
            raise ValueError(f"over {path}: {error}") from None
        numbers = terms, [(x.optimizer, x.ema_decay) for x in found.values()]
        structures.add((jax.tree.structure(numbers), *(x.module for x in found.values())))
    if len(structures) > 1:
        raise ValueError(f"over {path}: this changes the program; sweep numbers alone.")


def _listed(values: Any) -> Any:
    """Values as a plain list, so that arrays of any library do; else as they are."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    return list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else listed


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool) and math.isfinite(value)


def _with(config: Mapping[str, Any], keys: Sequence[str], value: float) -> dict[str, Any]:
    """The config with one value replaced."""
    key, *rest = keys
    return dict(config) | {key: _with(config[key], rest, value) if rest else value}


def _column(phase: schema.Phase, split: str, key: str) -> str:
    """The column of a score: `validation_accuracy`, `test_agreement`; with names if not clear."""
    networks, _, metric = key.rpartition("/")
    learner, _, other = networks.partition("|")
    own = "" if learner == "student" or len(phase.learners) == 1 else f"{learner}_"
    others = len(phase.learners) + len(phase.frozen) > 2
    return f"{split}_{own}{metric}{f'_with_{other}' if other and others else ''}"


def _shown(value: Any) -> float:
    """A float32 score without the digits that float64 would add."""
    return float(f"{float(value):.7g}")


def _remembered(path: pathlib.Path, size: int | Callable[[], int]) -> int:
    """The size of a chunk, as it was when the sweep began.

    Raises:
        ValueError: if the file that says so is damaged.
    """
    if not path.exists():
        folders.write_json(path, size if isinstance(size, int) else size())
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if type(found) is not int or found < 1:
        raise ValueError(f"{path} must hold the size of a chunk, a positive integer; restore it.")
    return found


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a chunk that is done, null as NaN; none if the file is damaged."""
    nan = lambda row: {k: math.nan if v is None else v for k, v in row.items()}  # noqa: E731
    try:
        rows = json.loads(path.read_text())
        return [{"last": nan(r["last"]), "history": [nan(x) for x in r["history"]]} for r in rows]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # the checkpoints have it all


def _write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def _bytes_of(jaxpr: Any) -> int:
    """The size of all that a program computes."""
    total = 0
    for equation in jaxpr.eqns:
        parts = [p for value in equation.params.values() for p in _as_tuple(value)]
        inner = [getattr(p, "jaxpr", p) for p in parts]
        inner = [p for p in inner if hasattr(p, "eqns")]
        outputs = (v.aval for v in equation.outvars)
        total += sum(map(_bytes_of, inner)) if inner else sum(map(_size_of, outputs))
    return total


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _size_of(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 8)


def _memory() -> float:
    """Bytes that are free, on all local devices together."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(found and "bytes_limit" in found for found in stats):
        return float(sum(found["bytes_limit"] - found["bytes_in_use"] for found in stats))
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf(free))
