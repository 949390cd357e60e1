"""The devices: of a run as one mesh, and of independent members as a place for each.

A run's program is written for the whole batch and XLA splits it. With one view of the whole batch,
a loss that couples its examples and batch norm mean the same on any number of devices.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))  # batches are split over both axes of a mesh
_STACKED = "layers"  # the module that `nn.scan` makes of a decoder's layers
_WIDTHS = {"embedding": 1, "unembedding": 0}  # the axis of the width in tables of two axes
_TILE = 128  # numbers along the last axis of an array in a TPU's memory
_SMALLEST = 2**16  # numbers of an array, or of one layer of a stack, that are worth splitting


def mesh(
    num_devices: int,
    *,
    batch_size: int,
    fsdp: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of a run: batches are split over its axes `data` and `fsdp`, networks over `fsdp`.

    Args:
        num_devices: how many devices to use; 0 for all.
        batch_size: of a training step.
        fsdp: over how many of them each network is split (`train.sharding`).
        devices: all that there are; None for those of this machine.

    Returns:
        The mesh. Its axes are Auto: Explicit ones refuse flax.linen's modules, and gathers.

    Raises:
        ValueError: if there are fewer devices, or they or the batch do not split evenly.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    count = num_devices or available
    if count > available:
        raise ValueError(f"devices must be at most the {available} there are; found {count}.")
    several = len({device.process_index for device in devices}) > 1
    if several and count < available:
        raise ValueError(
            f"devices must be 0, or all {available}, of a run of several processes; found {count}."
        )
    if batch_size % count:
        raise ValueError(
            f"batch_size must be a multiple of the {count} devices; found {batch_size} (set "
            "devices to use fewer)."
        )
    if count % fsdp:
        raise ValueError(f"fsdp must be a divisor of the {count} devices; found {fsdp}.")
    shape, types = (count // fsdp, fsdp), (AxisType.Auto,) * 2
    if several:  # each process has its rows of a batch, so its devices are neighbours
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        return Mesh(np.asarray(ordered).reshape(shape), ("data", "fsdp"), axis_types=types)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=types, devices=devices[:count])


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The tree with a copy of each array on every device of the mesh."""
    return jax.tree.map(lambda x: placed(x, NamedSharding(mesh, PartitionSpec())), tree)


def placed(x: Any, sharding: NamedSharding) -> Array:
    """An array where a sharding has it; a device takes its own part alone.

    Args:
        x: on the host or on devices; on devices of this process or the host, the same everywhere.
        sharding: maybe over the devices of several processes.
    """
    here = sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True)
    if here:
        return jax.device_put(x, sharding)
    # device_put would send all of it to the other processes, to see that they have the same.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


def joined(rows: Any, mesh: Mesh, axis: int = 0) -> Any:
    """The rows of all processes as one tree of arrays, split over the mesh.

    Args:
        rows: of this process, an axis of each array; of all in the processes' order.
        mesh: as `mesh` makes it.
        axis: which.
    """
    along = NamedSharding(mesh, PartitionSpec(*[None] * axis, *BATCH))
    local = lambda x: jax.make_array_from_process_local_data(along, np.asarray(x))  # noqa: E731
    return jax.tree.map(local, rows)


def fetched(tree: Any) -> Any:
    """The tree as arrays of the host, of which each process has all; every process must call it."""

    def whole(x: Any) -> np.ndarray:
        scattered = isinstance(x, Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return np.asarray(_whole(x.sharding.mesh)(x) if scattered else x)

    return jax.tree.map(whole, tree)


@functools.lru_cache
def _whole(mesh: Mesh) -> Callable[[Array], Array]:
    """A program that gathers an array on every device."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def split(tree: Any, mesh: Mesh) -> Any:
    """The tree, inside jit or out of it, with the first axis of its arrays split over the mesh.

    Arrays without axes, and those whose first axis does not split evenly, are left to XLA.
    """
    count, along = mesh.size, NamedSharding(mesh, BATCH)

    def put(x):
        whole = x.ndim == 0 or x.shape[0] % count
        return x if whole else jax.lax.with_sharding_constraint(x, along)

    return jax.tree.map(put, tree)


def partition(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """How an array of a network is split over the axis `fsdp` of a mesh.

    Along its largest axis that divides evenly, of equal ones the last; before all others those
    whose parts are multiples of 128 numbers, since a TPU pads parts of its tiles, and adds up whole
    gradients where it could scatter them. Never along the axis that stacks layers (the first, below
    a module named "layers"), from which each step of the scan takes a slice; and tables of
    embeddings along their width if they can, for a lookup in parts of their rows adds up what all
    devices look up. Arrays of fewer than 65,536 numbers, in each layer, stay whole.

    Args:
        path: dotted, such as "params.layers.attention.query.kernel".
        shape: of the array.
        fsdp: the size of that axis.

    Returns:
        The partition.

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", 2020, stage 3.
    """
    stacked = len(shape) > 1 and _STACKED in path.split(".")
    axes = [axis for axis in range(stacked, len(shape)) if shape[axis] % fsdp == 0]
    width = _WIDTHS.get(path.rpartition(".")[2])
    axes = [axis for axis in axes if axis == width] or axes
    small = np.prod(shape[stacked:], dtype=float) < _SMALLEST
    if fsdp == 1 or small or not axes:
        return PartitionSpec()
    aligned = lambda axis: shape[axis] // fsdp % _TILE == 0  # noqa: E731
    largest = max(axes, key=lambda axis: (aligned(axis), shape[axis], axis))
    return PartitionSpec(*[None] * largest, "fsdp")


def spread(fn: Callable, members: Any, *shared: Any) -> Any:
    """`fn(member, *shared)` of every member, by vmap, and by pmap over the local devices.

    Members are independent: those of a sweep, or the points of a grid. They are padded to a
    multiple of the devices, by the last one, and the result is cut.

    Args:
        fn: of one member; the same object in every call, for which it is compiled.
        members: a pytree, the first axis of its arrays over the members.
        *shared: what all members take, whole; copied to each device unless it is `everywhere`.

    Returns:
        The results, stacked along a first axis.

    Raises:
        ValueError: if there is no member.
    """
    sizes = {x.shape[0] for x in jax.tree.leaves(members)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"members must share one first axis, not empty; found {sorted(sizes)}.")
    size, count = sizes.pop(), jax.local_device_count()
    if count == 1:
        return _mapped(fn, len(shared), False)(members, *shared)
    each, sharding = -(-size // count), _on_local(PartitionSpec("i"))
    dealt = jax.tree.map(
        lambda x: _in_turn(jax.device_put(_dealt(x, count, each), sharding)), members
    )
    results = _mapped(fn, len(shared), True)(dealt, *everywhere(shared))
    return _in_turn(_gathered(_in_turn(results), size))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dealt(x: Array, count: int, each: int) -> Array:
    """`[members, ...]`, padded by the last one, as `[count, each, ...]`."""
    x = jnp.concatenate([x, *[x[-1:]] * (count * each - len(x))])
    return x.reshape(count, each, *x.shape[1:])


@functools.partial(jax.jit, static_argnums=1)
def _gathered(results: Any, size: int) -> Any:
    """The results of the members, without those of the padding."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], results)


def _in_turn(tree: Any) -> Any:
    """The tree; on a CPU once it is ready, where several programs at once wait for ever.

    Each runs on all forced devices, with one thread for each core between them.
    """
    return jax.block_until_ready(tree) if jax.default_backend() == "cpu" else tree


def everywhere(tree: Any) -> Any:
    """The tree with a copy of each array on every local device, as `spread` shares it."""
    alone = jax.local_device_count() == 1
    return jax.device_put(tree, jax.local_devices()[0] if alone else _on_local(PartitionSpec()))


def platform(mesh: Mesh | None = None) -> str:
    """Of the devices of a mesh, which need not be there, or of the default ones: "cpu", ..."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def free_memory() -> float:
    """Bytes that are free, on all local devices together."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(found and "bytes_limit" in found for found in stats):
        return float(sum(found["bytes_limit"] - found["bytes_in_use"] for found in stats))
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf(free))


def _on_local(spec: PartitionSpec) -> NamedSharding:
    devices = np.asarray(jax.local_devices())
    return NamedSharding(Mesh(devices, ("i",), axis_types=(AxisType.Auto,)), spec)


@functools.lru_cache
def _mapped(fn: Callable, num_shared: int, over_devices: bool) -> Callable:
    """`fn` over members, compiled; on one device without pmap, whose calls cost more."""
    axes = (0, *(None,) * num_shared)
    mapped = jax.vmap(fn, in_axes=axes)
    return jax.pmap(mapped, in_axes=axes) if over_devices else jax.jit(mapped)
