"""What a program costs by its compiler's own count, for devices that need not be there."""

import collections
import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from abkd_jax.parallel import BATCH

_COLLECTIVE = re.compile(
    r"[ )](all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
_LOOP = re.compile(r"[ )]while\(")


class Costs(NamedTuple):
    """Of one device's part of a program. The body of a loop counts once, however often it runs.

    Attributes:
        flops: floating-point operations.
        traffic: bytes read from memory and written to it.
        temporaries: bytes of memory besides arguments and results.
        collectives: {kind: how many} operations between devices.
        loops: how many the program has.
        seconds: that compiling took.
    """

    flops: float
    traffic: float
    temporaries: int
    collectives: Mapping[str, int]
    loops: int
    seconds: float


def tpu_mesh(topology: str) -> Mesh:
    """A mesh of TPU chips for which programs are compiled, and which nobody has to have.

    Args:
        topology: as libtpu names it: "v5e:2x4".

    Returns:
        The mesh of all its chips, with the axes of `parallel.mesh`.

    Raises:
        ValueError: one sentence, if libtpu is not installed or has no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the compiler for TPUs, is missing; pip install -e '.[tpu]'.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # what a TPU VM would answer
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # of the runtime
        reason = f"{error}".strip().splitlines()[0]
        raise ValueError(f"topology must be one that libtpu has; {topology!r}: {reason}") from error
    return Mesh(np.asarray(devices)[:, None], ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def part(mesh: Mesh, count: int) -> Mesh:
    """The first devices of a mesh."""
    return Mesh(mesh.devices[:count], mesh.axis_names, axis_types=mesh.axis_types)


def shapes(tree: Any, mesh: Mesh, *, split: bool) -> Any:
    """The shapes of a tree's arrays, placed on a mesh.

    Args:
        tree: of arrays or `jax.ShapeDtypeStruct`.
        mesh: the devices.
        split: whether the first axis of each array is split over them; else all have all.
    """
    spec = BATCH if split else PartitionSpec()

    def placed(x):
        sharding = NamedSharding(mesh, spec if x.ndim else PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, tree)


def compiled(fn: Callable, *args: Any) -> Costs:
    """Compiles a function, and does not run it.

    Args:
        fn: of arrays.
        *args: `shapes` of them.

    Returns:
        The costs.
    """
    started = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    seconds, text, found = time.perf_counter() - started, program.as_text(), program.cost_analysis()
    return Costs(
        flops=found.get("flops", 0.0),
        traffic=found["bytes accessed"],
        temporaries=program.memory_analysis().temp_size_in_bytes,
        collectives=dict(sorted(collections.Counter(_COLLECTIVE.findall(text)).items())),
        loops=len(_LOOP.findall(text)),
        seconds=seconds,
    )
