"""What a program costs by its compiler's own count, for devices that need not be there."""

import collections
import contextlib
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from abkd_jax.parallel import BATCH

_COLLECTIVE = re.compile(
    r" = (.*?[ )])(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(-start)?\((.*)"
)
_CHAIN = re.compile(r"chain_id=\"\d+\"")
_SHAPE = re.compile(r"\[([\d,]*)\]")
_LOOP = re.compile(r"[ )]while\(")
_PEAKS = {  # TFLOP/s of a device in bfloat16, of dense matrices, by its vendor's data sheet
    "TPU v4 lite": 138.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "Tesla V100": 125.0,  # in float16
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
}


class Exchange(NamedTuple):
    """An operation between devices.

    Attributes:
        kind: "all-gather", "all-reduce", "all-to-all", "collective-permute" or "reduce-scatter".
        shapes: of the arrays that it makes; where it only starts, also of those that it takes.
        overlapped: whether the device computes beside it: its start and its end are apart, or its
            parts are fused with products. Else the device waits.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    overlapped: bool


class Costs(NamedTuple):
    """Of one device's part of a program. The body of a loop counts once, however often it runs.

    Attributes:
        flops: floating-point operations.
        traffic: bytes read from memory and written to it.
        arguments: bytes of memory that hold them.
        results: bytes of memory that hold them, besides arguments that are taken for them.
        temporaries: bytes of memory besides both.
        exchanges: between devices.
        loops: how many the program has.
        seconds: that compiling took.
    """

    flops: float
    traffic: float
    arguments: int
    results: int
    temporaries: int
    exchanges: tuple[Exchange, ...]
    loops: int
    seconds: float

    @property
    def collectives(self) -> dict[str, int]:
        """{kind: how many} of the exchanges."""
        return _by_kind(self.exchanges)

    @property
    def overlapped(self) -> dict[str, int]:
        """{kind: how many} of those that are overlapped."""
        return _by_kind(one for one in self.exchanges if one.overlapped)

    @property
    def memory(self) -> int:
        """Bytes that the program needs."""
        return self.arguments + self.results + self.temporaries


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


def part(mesh: Mesh, count: int, *, fsdp: int = 1) -> Mesh:
    """The first devices of a mesh, `fsdp` of them along the axis of that name."""
    devices = mesh.devices.reshape(-1)[:count].reshape(-1, fsdp)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


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


def compiled(fn: Callable, *args: Any, **options: Any) -> Costs:
    """Compiles a function, and does not run it.

    Args:
        fn: of arrays.
        *args: `shapes` of them.
        **options: of `jax.jit`.

    Returns:
        The costs.
    """
    started = time.perf_counter()
    meshes = {x.sharding.mesh for x in jax.tree.leaves(args) if x.sharding is not None}
    with jax.set_mesh(*meshes) if meshes else contextlib.nullcontext():  # a kernel asks which chip
        program = jax.jit(fn, **options).lower(*args).compile()
    seconds, text, found = time.perf_counter() - started, program.as_text(), program.cost_analysis()
    memory = program.memory_analysis()
    return Costs(
        flops=found.get("flops", 0.0),
        traffic=found["bytes accessed"],
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        exchanges=exchanges_of(text),
        loops=len(_LOOP.findall(text)),
        seconds=seconds,
    )


def peak(device_kind: str) -> float | None:
    """The most floating-point operations a second of a device, in bfloat16.

    Args:
        device_kind: as `jax.Device` has it: "TPU v5 lite", "NVIDIA A100-SXM4-80GB".

    Returns:
        Of the known kind with which the name begins, the longest; None for others, such as CPUs.
    """
    words = lambda kind: device_kind == kind or device_kind.startswith((f"{kind} ", f"{kind}-"))  # noqa: E731
    known = [kind for kind in _PEAKS if words(kind)]
    return _PEAKS[max(known, key=len)] * 1e12 if known else None


def products(fn: Callable, *args: Any) -> float:
    """The floating-point operations of a function's products of matrices and convolutions.

    A product of [M, K] and [K, N] takes 2 M K N. They are counted in what JAX traces, on all
    devices together: the body of a scan as often as it runs, of `cond` the dearest branch, the body
    of a loop without a known end once. What a function computes again to save memory (remat) counts
    again, as it does for the hardware; what XLA leaves out counts, too, and what is no product
    does not. Nor does what a kernel of a library computes.

    Args:
        fn: of arrays.
        *args: or their shapes.

    Returns:
        The sum.
    """
    return _products(jax.make_jaxpr(fn)(*args).jaxpr)


def _products(jaxpr: Any) -> float:
    return sum(map(_products_of, jaxpr.eqns))


def _products_of(eqn: Any) -> float:
    """Those of one equation of a jaxpr."""
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = [eqn.invars[0].aval.shape[axis] for axis in contracted]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(summed)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
        summed = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # but for its output's channels
        zeros = math.prod(params["lhs_dilation"])  # in a gradient: the stride, of which one counts
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * summed / zeros
    inner = [_products(x) for x in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner, default=0.0)
    return _repeats(name, params) * sum(inner)


def _repeats(name: str, params: Any) -> int:
    """How often an equation runs the programs in it."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # whose body is one device's
        shape = params["mesh"].shape
        return math.prod(shape[axis] for axis in params.get("newly_manual_axes", shape))
    return 1


def _by_kind(exchanges: Iterable[Exchange]) -> dict[str, int]:
    return dict(sorted(collections.Counter(one.kind for one in exchanges).items()))


def exchanges_of(text: str) -> tuple[Exchange, ...]:
    """Those of a compiled program, by its text; a chain of parts counts once."""
    found = {}
    for index, (result, kind, starts, rest) in enumerate(_COLLECTIVE.findall(text)):
        sizes = tuple(tuple(map(int, filter(None, x.split(",")))) for x in _SHAPE.findall(result))
        chain, named = _CHAIN.search(rest), "async_collective_name=" in rest
        overlapped = bool(starts or chain or named) and '"is_sync":true' not in rest
        found.setdefault(chain[0] if chain else index, Exchange(kind, sizes, overlapped))
    return tuple(found.values())
