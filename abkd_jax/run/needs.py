"""What a config needs, before anything is read or trained: by shapes, or by the TPU's compiler."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from abkd_jax import costs, markdown
from abkd_jax.checks import require
from abkd_jax.config.dry_run import one_step
from abkd_jax.config.plan import Phase, Plan
from abkd_jax.config.schema import resolve
from abkd_jax.losses.chunks import default_chunk
from abkd_jax.train import Networks, TrainState
from abkd_jax.train.sharding import shardings
from abkd_jax.types import Batch

HERE = "here"
_MEMORY = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9}  # bytes of a chip
_NETWORKS = (
    "phase: network",
    "parameters",
    "MB",
    "gradients, MB",
    "optimiser, MB",
    "average, MB",
    "on each device, MB",
)
_NO_ACTIVATIONS = (
    "Activations come on top: only a compiler knows them, such as that of --plan=v5e:2x4."
)
_Part = tuple[Phase, Networks, Networks, Batch]  # with its learners, those that they see, a batch


class Needs(NamedTuple):
    """Of a network in a phase; bytes of all its arrays, however many devices they lie on.

    Attributes:
        parameters: how many.
        params: their bytes.
        gradients: bytes; of a network that does not learn 0, and so for those below.
        optimizer: bytes of its state.
        average: bytes of the moving average of the parameters.
        device: bytes on each device, of all of these and the batch statistics.
    """

    parameters: int
    params: int
    gradients: int
    optimizer: int
    average: int
    device: int


def network_needs(state: TrainState, mesh: Mesh, *, learns: bool) -> Needs:
    """What a network needs in a phase.

    Args:
        state: or its shapes.
        mesh: the devices, over whose axis `fsdp` it is split.
        learns: whether it does.
    """
    gradients = state.params if learns else None
    own = state.params, state.base
    return Needs(
        parameters=sum(x.size for x in jax.tree.leaves(own)),
        params=bytes_of(own),
        gradients=bytes_of(gradients),
        optimizer=bytes_of(state.opt_state),
        average=bytes_of(state.ema_params),
        device=bytes_of(state, mesh) + bytes_of({"params": gradients}, mesh),
    )


def bytes_of(tree: Any, mesh: Mesh | None = None) -> int:
    """The bytes of a tree's arrays, or on a mesh those on each device, placed by `shardings`."""
    leaves, shapes = jax.tree.leaves(tree), [x.shape for x in jax.tree.leaves(tree)]
    if mesh is not None:
        places = jax.tree.leaves(shardings(tree, mesh))
        shapes = [place.shard_shape(x) for place, x in zip(places, shapes, strict=True)]
    pairs = zip(leaves, shapes, strict=True)
    return sum(x.dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for x, shape in pairs)


def tables(config: ml_collections.ConfigDict | Mapping[str, Any], where: str) -> Iterator[str]:
    """What a config needs, as Markdown.

    Args:
        config: of a run.
        where: "here", for the devices of this machine, or a topology of TPUs that need not be
            there, as libtpu names it: "v5e:2x4". Then the last phase's step is compiled, too.

    Yields:
        A table of the networks in each phase, one of the phases, and one of the compiled step (or
        a sentence on what only that can tell).

    Raises:
        ValueError: one sentence, if the config cannot be, libtpu lacks, or the step does not fit.
    """
    chip, devices, memory = where.partition(":")[0], None, None
    expected = f"{HERE!r}, or a topology of {', '.join(_MEMORY)}, such as 'v5e:2x4'"
    require(where == HERE or chip in _MEMORY, "--plan", expected, where)
    plan = resolve(config)
    if where != HERE:
        devices, memory = [*costs.tpu_mesh(where).devices.flat], _MEMORY[chip]
    mesh = plan.mesh(devices)
    if plan.leaves_chunk_open:
        chunk = default_chunk(plan.description.num_classes, accelerator=memory)
        plan = plan._replace(config=plan.config | {"chunk": chunk})
    parts = [(phase, *one_step(plan, phase)[1:]) for phase in plan.phases]
    yield _networks(mesh, parts)
    yield _phases(plan, mesh, parts)
    if memory is None:
        yield _NO_ACTIVATIONS
    else:
        yield _compiled(plan, mesh, where, memory)


def _networks(mesh: Mesh, parts: Sequence[_Part]) -> str:
    """The table of the networks, phase by phase."""
    rows = []
    for phase, learners, seen, _ in parts:
        for name, state, learns in _each(learners, seen):
            found = network_needs(state, mesh, learns=learns)
            frozen = ", beside factors" if name in learners else ", seen"
            label = f"{phase.name}: {name}{'' if learns else frozen}"
            rows.append([label, f"{found.parameters:,}", *map(_megabytes, found[1:])])
    return markdown.table(_NETWORKS, rows)


def _each(learners: Networks, seen: Networks) -> list[tuple[str, TrainState, bool]]:
    """The name and state of each network, and whether it learns."""
    return [(*x, True) for x in learners.items()] + [(*x, False) for x in seen.items()]


def _phases(plan: Plan, mesh: Mesh, parts: Sequence[_Part]) -> str:
    """The table of the phases: steps, what a step reads, and the logits that it forms."""
    unit, rows = plan.task.unit, []
    for phase, learners, seen, batch in parts:
        size = int(np.prod(batch["labels"].shape))
        read = sum(bytes_of(x) for name, x in batch.items() if name != "key") / mesh.size
        chunk, logits = _logits(plan, phase, size, mesh)
        each = _each(learners, seen)
        states = [network_needs(x, mesh, learns=learns).device for _, x, learns in each]
        counts = phase.num_steps, size, phase.num_steps * size, chunk
        sizes = read, logits, read + logits + sum(states)
        rows.append([phase.name, *(f"{count:,}" for count in counts), *map(_megabytes, sizes)])
    header = ["phase", "steps", f"{unit} a step", f"{unit} in all", f"{unit} of a chunk"]
    header += ["batch on each device, MB", "logits of a chunk, MB", "with the networks, MB"]
    return markdown.table(header, rows)


def _logits(plan: Plan, phase: Phase, size: int, mesh: Mesh) -> tuple[int, int]:
    """How many rows have logits at a time on a device, and the bytes of all networks' logits."""
    rows = -(-size // (plan.config["micro_batches"] * mesh.size))
    chunk = min(plan.config["chunk"] or rows, rows)
    count = len(phase.learners) + len(phase.see)
    return chunk, count * chunk * plan.description.num_classes * 4


def _compiled(plan: Plan, mesh: Mesh, where: str, memory: float) -> str:
    """The table of the last phase's step, as the compiler counts it."""
    phase = plan.phases[-1]
    try:
        found = compiled_step(plan, phase, mesh)
    except jax.errors.JaxRuntimeError as error:
        reason = f"{error}".strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"a step of {phase.name} does not compile for {where} ({reason}); lower batch_size or "
            "chunk, or raise micro_batches, fsdp or the number of chips."
        ) from error
    exchanges = ", ".join(f"{count} {kind}" for kind, count in found.collectives.items()) or "-"
    sizes = found.arguments, found.results, found.temporaries
    share = f"{100 * found.memory / memory:.1f} % of {memory / 1e9:.0f} GB"
    header = [f"each chip of {where}", "arguments, MB", "results, MB", "temporaries, MB", "memory"]
    header += ["GFLOP", "traffic, MB", "loops, whose body counts once", "collectives"]
    numbers = [f"{found.flops / 1e9:,.2f}", _megabytes(found.traffic), f"{found.loops}"]
    row = [f"a step of {phase.name}", *map(_megabytes, sizes), share, *numbers, exchanges]
    return markdown.table(header, [row])


def compiled_step(plan: Plan, phase: Phase, mesh: Mesh, **options: Any) -> costs.Costs:
    """The costs of a step of a phase, its networks split over the mesh as in a run.

    Args:
        plan: of the run.
        phase: one of its phases.
        mesh: of devices that need not be there.
        **options: of `jax.jit`.
    """
    step, learners, seen, batch = one_step(plan, phase, mesh)
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    placed = lambda tree: jax.tree.map(put, tree, shardings(tree, mesh))  # noqa: E731
    key = costs.shapes(batch.pop("key"), mesh, split=False)
    batch = costs.shapes(batch, mesh, split=True) | {"key": key}
    arguments = placed(learners), placed(seen), batch
    return costs.compiled(step, *arguments, donate_argnums=0, **options)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.2f}"
