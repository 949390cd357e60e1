"""Training: a pair of ResNets by steps a call and by students, and a sweep against single runs."""

import functools
import pathlib
import runpy
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from abkd_jax import data, markdown, models, timing
from abkd_jax.sweep import Program, opened
from abkd_jax.train import Carry, Objectives, Programs, run_steps
from experiments.accelerator import torch_pair, torch_peers
from experiments.accelerator.rows import Call, Part, Row

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "cifar100.py"
_ALPHA = "student.terms.distill.divergence.alpha"
_CIFAR = 50_000  # training images
_IMAGES = 51_200  # of ours: a call of 50 steps of 1,024 is to fit into an epoch
_FEW = 32  # of --runlocal
_EPOCHS = 240
_MEMBERS, _SWEEP_STEPS = 32, 20
_ROWS, _BATCH, _DIM, _CLASSES = 4096, 128, 784, 100  # of the sweep's data
_TASK = dict(fn="cross_entropy", weight=1.0)
_DISTILL = dict(fn="on_logits", weight=1.0, temperature=4.0)
_DIVERGENCE = dict(fn="alpha_beta", alpha=0.8, beta=0.3)
_SWEEP = dict(
    teacher=dict(model=dict(fn="given")),
    student=dict(
        model=dict(fn="mlp", widths=(64, 64)),
        optimizer=dict(fn="adam", learning_rate=1e-3),
        terms=dict(task=_TASK, distill=_DISTILL | dict(divergence=_DIVERGENCE)),
    ),
    phases=dict(distill=dict(learn=("student",), see=("teacher",))),
    batch_size=_BATCH,
)


def pair(*, small: bool) -> Part:
    """The rows of the pair, at each number of students and each batch size."""
    cpu = jax.default_backend() == "cpu"
    lengths = (1, 2) if small else (1,) if cpu else (1, 10, 50)
    rows = []
    for students in (1,) if small else (1, 8):
        for batch in (8,) if small else (64,) if cpu else (64, 1024):
            steps = 2 if cpu else max(lengths)
            facts = {"students": students, "batch": batch, "steps": steps}
            arms = functools.partial(_pair_arms, students, batch, lengths, steps, small)
            rows.append(Row(f"pair, {students} students, batches of {batch}", arms, facts))
    alone = " On a CPU: batches of 64, and one step a call." if cpu and not small else ""
    peer = torch_peers.absent(small=small).get("torch")
    text = (
        "ResNet-56 to ResNet-20 as in configs/cifar100.py (with --runlocal ResNet-8 to ResNet-8), "
        "on random images of CIFAR-100's shape, with its crops and flips. Stacked students are "
        "one program, as a sweep's; images/s counts an image once for each student, and "
        f"minutes are of {_EPOCHS} epochs of {_CIFAR:,} images, from the median.{alone}"
        f"{f' Skipped peers: torch: {peer}.' if peer else ''}"
    )
    return Part("A pair of ResNets", text, rows, _pair_table)


def sweep(*, small: bool) -> Part:
    """The row of the sweep."""
    members, steps = (3, 2) if small else (_MEMBERS, _SWEEP_STEPS)
    facts = {"students": members, "steps": steps}
    arms = functools.partial(_sweep_arms, members, steps)
    text = (
        "A teacher 784-1024-1024-100 and students 784-64-64-100, batches of 128, as in "
        "experiments.benchmark_sweep: the sweep's program, where the teacher's outputs are "
        "computed once, and with the teacher's forward pass in each step; and one program for "
        "each student in turn, likewise."
    )
    return Part("A sweep", text, [Row(f"sweep, {members} students", arms, facts)], _sweep_table)


def _pair_arms(
    students: int, batch: int, lengths: tuple[int, ...], steps: int, small: bool
) -> dict[str, Callable[[], Call]]:
    config = _config(small)
    opening = functools.cache(lambda: _pair_program(students, batch, small))

    def make(length):
        program = opening()
        carry, objectives = program.stacked(range(students))
        programs = program.programs
        if students == 1:  # as a run has it, without the axis of the members
            carry, objectives = jax.tree.map(lambda x: x[0], (carry, objectives))
            programs = Programs(programs.source, programs.static)
        return _trained(program, programs, carry, objectives, program.feed, steps, length)

    found = {f"{n} step{'s'[: n > 1]} a call": functools.partial(make, n) for n in lengths}
    if students == 1 and "torch" not in torch_peers.absent(small=small):
        depths = [config[name]["model"]["depth"] for name in ("teacher", "student")]
        arguments = depths, config["student"], batch, _FEW if small else _IMAGES, steps
        found["torch"] = functools.partial(torch_pair.arm, *arguments, compiles=False)
        if torch_peers.device()[0] == "cuda":
            found["torch.compile"] = functools.partial(torch_pair.arm, *arguments, compiles=True)
    return found


def _config(small: bool) -> dict[str, Any]:
    """configs/cifar100.py's."""
    return runpy.run_path(str(_CONFIG))["get_config"]("runlocal" if small else "").to_dict()


@functools.cache
def _pair_given(small: bool) -> dict[str, Any]:
    """Random images of CIFAR-100's shape, and a teacher that has learned nothing."""
    rng, config = np.random.default_rng(0), _config(small)

    def split(size):
        return rng.integers(0, 256, (size, 32, 32, 3), np.uint8), rng.integers(0, 100, size)

    kept = ("pad", "flip", "mean", "std")
    options = {name: value for name, value in config["data"].items() if name in kept}
    splits = dict(train=split(_FEW if small else _IMAGES), validation=None, test=split(_FEW))
    dataset = data.from_arrays(**splits, num_classes=100, **options)
    model = {name: value for name, value in config["teacher"]["model"].items() if name != "fn"}
    module = models.resnet(num_classes=100, **model)
    init = jax.jit(functools.partial(module.init, train=False))
    variables = init(jax.random.key(1), np.zeros((1, 32, 32, 3), np.float32))
    return {"networks": {"teacher": (module.apply, variables)}, "data": dataset}


def _pair_program(students: int, batch: int, small: bool) -> Program:
    """The program of stacked students of the config."""
    config = {name: value for name, value in _config(small).items() if name != "data"}
    config |= {"teacher": dict(model=dict(fn="given")), "batch_size": batch}
    config |= {"phases": {"distill": config["phases"]["distill"]}}
    return _opened(config, students, _pair_given(small))


def _opened(config: Mapping[str, Any], students: int, given: Mapping[str, Any]) -> Program:
    """The program of so many students, each with its own alpha."""
    over = {_ALPHA: np.linspace(0.5, 1.0, students)}
    with tempfile.TemporaryDirectory() as folder, opened(config, folder, over=over, **given) as it:
        return it  # no step needs the folder


def _trained(
    program: Program,
    programs: Programs,
    carry: Carry,
    objectives: Objectives,
    feed: Callable,
    steps: int,
    length: int = 1,
) -> Call:
    """A call that trains so many steps further."""
    place = jax.local_devices()[0]
    carry, objectives = jax.device_put((carry, objectives), place)

    def call():
        nonlocal carry  # whose buffers are taken
        args = programs, carry, program.frozen, objectives, feed
        carry = run_steps(*args, data_seed=0, end=steps, length=length)
        return carry

    return call


def _sweep_arms(members: int, steps: int) -> dict[str, Callable[[], Call]]:
    rng = np.random.default_rng(0)
    examples = rng.normal(size=(_ROWS, _DIM)).astype(np.float32), rng.integers(0, _CLASSES, _ROWS)
    splits = dict.fromkeys(("train", "validation", "test"), examples)
    dataset = data.from_arrays(**splits, num_classes=_CLASSES)
    module = models.mlp(num_classes=_CLASSES, widths=(1024, 1024))
    teacher = module.apply, module.init(jax.random.key(1), examples[0][:1], train=False)
    program = _opened(_SWEEP, members, {"networks": {"teacher": teacher}, "data": dataset})
    plain = data.Feed(dataset.train, dataset.preprocess, data_seed=0, size=_BATCH)
    stacked = program.stacked(range(members))
    alone = Programs(program.programs.source, program.programs.static)

    def together(feed):
        return _trained(program, program.programs, *stacked, feed, steps)

    def in_turn(feed):
        each = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(members)]
        calls = [_trained(program, alone, *member, feed, steps) for member in each]
        return lambda: [call() for call in calls]

    return {
        "sweep": lambda: together(program.feed),
        "sweep, teacher in each step": lambda: together(plain),
        "one by one": lambda: in_turn(program.feed),
        "one by one, teacher in each step": lambda: in_turn(plain),
    }


def _pair_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each arm of each row."""
    header = ("", "students", "batch", "ms a step", "images/s", "minutes", "rounds")
    lines = []
    for row in found.values():
        facts = row["facts"]
        students, batch = facts["students"], facts["batch"]
        for arm, times in row["seconds"].items():
            each = np.asarray(times) / facts["steps"]
            minutes = _EPOCHS * (_CIFAR // batch) * np.median(each) / 60
            rate = timing.quartiles(students * batch / each, ",.0f")
            numbers = timing.quartiles(1e3 * each, ",.2f"), rate, f"{minutes:,.1f}", f"{len(times)}"
            lines.append((arm, f"{students}", f"{batch:,}", *numbers))
        for arm, reason in row["failed"].items():
            told = f"failed: {markdown.plain(reason)}"
            lines.append((arm, f"{students}", f"{batch:,}", told, "", "", ""))
    return markdown.table(header, lines)


def _sweep_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each arm."""
    header = ("", "students", "ms a step of all", "x as long as the sweep", "rounds")
    lines = []
    for row in found.values():
        students, own = f"{row['facts']['students']}", row["seconds"].get("sweep")
        for arm, times in row["seconds"].items():
            ms = timing.quartiles(1e3 * np.asarray(times) / row["facts"]["steps"], ",.2f")
            ratio = timing.quartiles(np.divide(times, own), ".2f") if own else ""
            lines.append((arm, students, ms, ratio, f"{len(times)}"))
        for arm, reason in row["failed"].items():
            lines.append((arm, students, f"failed: {markdown.plain(reason)}", "", ""))
    return markdown.table(header, lines)
