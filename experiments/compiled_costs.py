"""What divergences, methods and training steps cost on a TPU, by its compiler's count.

    python -m experiments.compiled_costs

Nothing runs, and no TPU is needed: libtpu (the extra `[tpu]`) compiles for one on any machine. A
row is printed when it is there. `--only` chooses among the tables, `--names` the rows,
`--topologies` the chips, `--classes` the sizes of `single_pass`. A row takes some ten seconds, one
with products in full precision, or a deep network, a minute.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU that is there is left alone

import functools
import itertools
import runpy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from jax import numpy as jnp
from jax.sharding import Mesh

from abkd_jax import Head, Outputs, at_step, bind, costs, data, divergences, losses, markdown
from abkd_jax import config as configs
from abkd_jax.config import arguments, command
from abkd_jax.config.build import Builder, names
from abkd_jax.config.dry_run import with_statistics
from abkd_jax.run.needs import compiled_step
from abkd_jax.train.sharding import shardings
from abkd_jax.types import Term

_TABLES = ("divergences", "single_pass", "methods", "vocabulary", "steps", "networks")
_ONLY = flags.DEFINE_list("only", [*_TABLES], f"Of {', '.join(_TABLES)}.")
_NAMES = flags.DEFINE_list("names", [], "Some rows alone.")
_SIZES = flags.DEFINE_list("classes", [], "Of the table single_pass, some sizes alone: 1000, ...")
_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x4"], "Of libtpu: v5e:2x4, v6e:2x4, ...")

_SHAPES = ((4096, 1000, jnp.float32), (1024, 32_000, jnp.bfloat16))
_ON_ALL_CHIPS = ("alpha_beta", "adaptive_kl")
_KL = dict(divergence=divergences.forward_kl)
_NUMBERS = dict(
    alpha_beta=dict(alpha=0.8, beta=0.3),
    alpha_divergence=dict(alpha=0.5),
    beta_divergence=dict(beta=0.5),
    renyi=dict(order=2.0),
    skew_forward_kl=dict(skew=0.1),
    skew_reverse_kl=dict(skew=0.1),
    jensen_shannon=dict(teacher_weight=0.5),
    tempered=_KL | dict(temperature=4.0),
    standardized=_KL,
    powered=_KL | dict(teacher_power=0.1),
    prior_shifted=_KL | dict(log_prior=0.0),
    top_k=_KL | dict(k=50),
    top_k_renormalised=_KL | dict(k=50),
    top_k_dropped=_KL | dict(k=50),
    single_pass=_KL,
)
_OF_ONE_PASS = (*_SHAPES, (128, 128_256, jnp.bfloat16))
_WITHOUT_KERNEL = ("single_pass", "adaptive_kl", "top_k", "top_k_dropped", "top_k_renormalised")
_ROWS, _CLASSES, _WIDTH = 4096, 1000, 512  # of the methods
_FEWER = {"sinkd": 1024}  # whose loss is of all pairs of rows
_TOKENS, _VOCABULARY, _WIDTHS = 8192, 128_256, (2048, 4096)  # of student and teacher
_CHUNK = 1024  # the default on accelerators
_IMAGES = 64  # of a network's step
_CONFIGS = ("digits", "fashion_mnist", "online_fashion_mnist", "cifar100")
_SETS = {"fashion_mnist": ((28, 28, 1), 10), "cifar100": ((32, 32, 3), 100)}  # not read, but known


_OF_STEPS = ["MB / image", "MFLOP / image", "temporaries, MB"]
_HEADERS = dict(
    steps=_OF_STEPS,
    networks=_OF_STEPS,
    vocabulary=["traffic, GB", "TFLOP", "temporaries, MB"],
)


class Program(NamedTuple):
    """A row of a table.

    Attributes:
        name: of what it is.
        batch: in words.
        chips: how many.
        compiled: its costs.
        units: of its memory traffic, its operations and its temporaries, in bytes and operations.
    """

    name: str
    batch: str
    chips: int
    compiled: Callable[[], costs.Costs]
    units: tuple[float, float, float]


def main() -> None:
    """Prints the tables."""
    tables = {"divergences": _divergences, "methods": _methods}
    tables |= {"single_pass": _single_pass}
    tables |= {"vocabulary": _vocabulary, "steps": _steps, "networks": _networks}
    for table in _ONLY.value:
        if table not in tables:
            raise ValueError(f"--only takes {', '.join(tables)}; found {table!r}.")
    meshes = {name: costs.tpu_mesh(name) for name in _TOPOLOGIES.value}
    print("Of one chip. The least is to read both logits and to write one gradient. A loop's body")
    print("counts once, however often it runs: a row with loops (*, and how many) costs more.")
    for table in _ONLY.value:
        units = _HEADERS.get(table, ["traffic / least", "FLOPs / entry", "temporaries / gradient"])
        header = [table, "batch", "chips", *units, "collectives", "compiled in s"]
        print(f"\n{markdown.table(header, [])}")
        for topology, mesh in meshes.items():
            for program in tables[table](mesh):
                cells = _cells(program, topology.partition(":")[0])
                print(f"| {' | '.join(cells)} |", flush=True)


def _cells(program: Program, chip: str) -> list[str]:
    """A row of the table; of what does not compile, the reason."""
    cells = [program.name, program.batch, f"{program.chips} {chip}"]
    try:
        found = program.compiled()
    except Exception as error:  # the others are still to come
        return [*cells, " ".join(f"{error}".split())[:120], "", "", "", ""]
    sizes = found.traffic, found.flops, found.temporaries
    numbers = [f"{size / unit:.3g}" for size, unit in zip(sizes, program.units, strict=True)]
    if found.loops:
        numbers[0] += f" *{found.loops}"
    collectives = ", ".join(f"{count} {kind}" for kind, count in found.collectives.items())
    return [*cells, *numbers, collectives or "-", f"{found.seconds:.0f}"]


def _wanted(name: str) -> bool:
    return not _NAMES.value or name in _NAMES.value


def _divergences(mesh: Mesh) -> Iterator[Program]:
    """Value and student gradient of each divergence at each shape; of some also on all chips."""
    for (rows, classes, dtype), name in itertools.product(
        _SHAPES, filter(_wanted, names("divergence"))
    ):
        divergence = bind(getattr(divergences, name), **_NUMBERS.get(name, {}))
        mean = lambda s, t, divergence=divergence: jnp.mean(divergence(s, t))  # noqa: E731
        logits = jax.ShapeDtypeStruct((rows, classes), dtype)
        for chips in (1, mesh.size) if name in _ON_ALL_CHIPS else (1,):
            placed = costs.shapes((logits, logits), costs.part(mesh, chips), split=True)
            compiled = functools.partial(costs.compiled, jax.value_and_grad(mean), *placed)
            batch = f"{rows} x {classes}, {jnp.dtype(dtype)}"
            units = _units(rows * classes / chips, jnp.dtype(dtype).itemsize)
            yield Program(name, batch, chips, compiled, units)


def _single_pass(mesh: Mesh) -> Iterator[Program]:
    """Values, summed, and student gradient of each divergence, as it is and in one pass."""
    for rows, classes, dtype in _OF_ONE_PASS:
        if _SIZES.value and f"{classes}" not in _SIZES.value:
            continue
        units = _units(rows * classes, jnp.dtype(dtype).itemsize)
        logits = (jax.ShapeDtypeStruct((rows, classes), dtype),) * 2
        placed = costs.shapes(logits, costs.part(mesh, 1), split=False)
        for name in (x for x in names("divergence") if x not in _WITHOUT_KERNEL):
            plain = bind(getattr(divergences, name), **_NUMBERS.get(name, {}))
            in_one = bind(divergences.single_pass, divergence=plain)
            both = {name: plain, f"single_pass({name})": in_one}
            for title, divergence in both.items():
                value = lambda s, t, divergence=divergence: jnp.sum(divergence(s, t))  # noqa: E731
                compiled = functools.partial(costs.compiled, jax.value_and_grad(value), *placed)
                batch = f"{rows} x {classes}, {jnp.dtype(dtype)}"
                if _wanted(title):
                    yield Program(title, batch, 1, compiled, units)


def _methods(mesh: Mesh) -> Iterator[Program]:
    """Value and gradient of each method's terms in what the student shows."""
    length = ml_collections.ConfigDict(dict(batch_size=_ROWS, num_steps=1200))
    shapes = dict(
        class_means=(_CLASSES, _WIDTH), class_prior=(_CLASSES,), class_weights=(_CLASSES,)
    )
    found = lambda statistic, term: jnp.ones(shapes[statistic.name])  # noqa: E731
    networks, mesh = dict(learner="student", networks=("student", "teacher")), costs.part(mesh, 1)
    for name, terms in arguments.methods(length, "configs/digits.py").items():
        if not _wanted(name):
            continue
        objective = Builder().objective(terms, field=name, **networks)
        objective = at_step(with_statistics({"": objective}, found)[""], 0)

        def total(student, teacher, batch, objective=objective):
            return losses.total(objective, student, {"teacher": teacher}, batch)[0]

        rows = _FEWER.get(name, _ROWS)
        placed = costs.shapes(_shown(rows), mesh, split=False)
        compiled = functools.partial(costs.compiled, jax.value_and_grad(total), *placed)
        units = _units(rows * _CLASSES, 4)
        yield Program(name, f"{rows} x {_CLASSES}, float32", 1, compiled, units)


def _shown(rows: int) -> tuple[Outputs, Outputs, dict[str, jax.ShapeDtypeStruct]]:
    """What two networks show of a batch, and the batch."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    shown = Outputs(
        logits=array(rows, _CLASSES),
        hidden=array(rows, _WIDTH),
        head=Head(array(_WIDTH, _CLASSES), array(_CLASSES)),
        input_gradient=array(rows, _WIDTH),
    )
    labels, mask = (jax.ShapeDtypeStruct((rows,), x) for x in (jnp.int32, bool))
    return shown, shown, {"labels": labels, "where": mask, "labelled": mask}


def _vocabulary(mesh: Mesh) -> Iterator[Program]:
    """Value and gradients, in hidden states and head, of a loss whose logits come in chunks.

    On several chips the heads are split over all of them, as the rows are.
    """
    of_each = ("forward_kl", "alpha_beta"), (False, True), (1, mesh.size)
    for name, in_one_pass, chips in itertools.product(*of_each):
        title = f"single_pass({name})" if in_one_pass else name
        if not _wanted(title):
            continue
        some = costs.part(mesh, chips, fsdp=chips)
        divergence = bind(getattr(divergences, name), **_NUMBERS.get(name, {}))
        if in_one_pass:
            divergence = bind(divergences.single_pass, divergence=divergence)
        loss = bind(losses.on_logits, divergence=divergence, temperature=1.0)
        terms = {"distill": Term(loss, 1.0, other="teacher")}

        def total(student, teacher, where, terms=terms, some=some):
            shown = student, {"teacher": teacher}, {"where": where}
            return losses.total(terms, *shown, chunk=_CHUNK, mesh=some)[0]

        student, teacher = (_unformed(width, some) for width in _WIDTHS)
        where = costs.shapes(jax.ShapeDtypeStruct((_TOKENS,), bool), some, split=True)
        placed = jax.tree.map(lambda x: x.sharding, student)
        program = jax.value_and_grad(total), student, teacher, where
        compiled = functools.partial(costs.compiled, *program, out_shardings=(None, placed))
        yield Program(title, f"{_TOKENS} x {_VOCABULARY}", chips, compiled, (1e9, 1e12, 1e6))


def _unformed(width: int, mesh: Mesh) -> Outputs:
    """What a decoder of bfloat16 shows, its rows and its float32 head split."""
    hidden = jax.ShapeDtypeStruct((_TOKENS, width), jnp.bfloat16)
    head = Head(jax.ShapeDtypeStruct((width, _VOCABULARY), jnp.float32))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    head = jax.tree.map(place, head, shardings(head, mesh))
    return Outputs(hidden=costs.shapes(hidden, mesh, split=True), head=head)


def _units(entries: float, itemsize: int) -> tuple[float, float, float]:
    return 3 * entries * itemsize, entries, entries * itemsize


def _steps(mesh: Mesh) -> Iterator[Program]:
    """A step of each config's last phase, on one chip and on all."""
    for name, chips in itertools.product(filter(_wanted, _CONFIGS), (1, mesh.size)):
        config = runpy.run_path(f"configs/{name}.py")["get_config"]()
        plan, some = configs.resolve(config, data=_stand_in(config)), costs.part(mesh, chips)
        compiled = functools.partial(compiled_step, plan, plan.phases[-1], some)
        images = 1e6 * config.batch_size / chips
        yield Program(name, f"{config.batch_size}", chips, compiled, (images, images, 1e6))


def _networks(mesh: Mesh) -> Iterator[Program]:
    """A step of each network of the benchmark, and of ImageNet, on labels alone, on one chip."""
    of_cifar = runpy.run_path("configs/pairs.py")["NETWORKS"]
    of_cifar |= {f"vgg{depth}": dict(fn="vgg", depth=depth) for depth in (11, 16, 19)}
    of_cifar["wrn_16_1"] = dict(fn="wide_resnet", depth=16, widening=1)
    models = {name: (model, 32, 100) for name, model in of_cifar.items()}
    for depth in (18, 34, 50):
        models[f"ImageNet's resnet{depth}"] = dict(fn="imagenet_resnet", depth=depth), 224, 1000
    models["mobilenet_v1"] = dict(fn="mobilenet_v1"), 224, 1000
    optimizer = dict(fn="sgd", learning_rate=0.05, momentum=0.9, weight_decay=5e-4)
    terms = dict(task=dict(fn="cross_entropy", weight=1.0))
    for name, (model, side, num_classes) in models.items():
        if not _wanted(name):
            continue
        config = configs.defaults()
        student = dict(model=model | dict(dtype="bfloat16"), optimizer=optimizer, terms=terms)
        learn = dict(learn=("student",))
        config.update(student=student, phases=dict(learn=learn), batch_size=_IMAGES)
        examples = np.zeros((_IMAGES, side, side, 3), np.uint8), np.arange(_IMAGES) % num_classes
        splits = dict(train=examples, validation=None, test=examples)
        plan = configs.resolve(config, data=data.from_arrays(**splits, num_classes=num_classes))
        compiled = functools.partial(compiled_step, plan, plan.phases[-1], costs.part(mesh, 1))
        images = 1e6 * _IMAGES
        yield Program(name, f"{_IMAGES} x {side} x {side}", 1, compiled, (images, images, 1e6))


def _stand_in(config: ml_collections.ConfigDict) -> data.DataSet | None:
    """A set like the config's; None where its own is embedded."""
    if config.data.fn == "digits":
        return None
    shape, num_classes = _SETS[config.data.name]
    examples = np.zeros((num_classes, *shape), np.uint8), np.arange(num_classes)
    splits = dict(train=examples, validation=None, test=examples)
    return data.from_arrays(**splits, num_classes=num_classes)


if __name__ == "__main__":
    command.run(main)
