"""Where the arrays of networks lie on a mesh: whole on every device, or split over `fsdp`."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abkd_jax.types import dotted

_STACKED = "layers"  # the module that `nn.scan` makes of a decoder's layers
_SMALLEST = 2**16  # numbers of an array, or of one layer of a stack, that are worth splitting


def partition(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """How an array of a network is split over the axis `fsdp` of a mesh.

    Along its largest axis that divides evenly, of equal ones the last; never along the one that
    stacks layers (the first, below a module named "layers"), from which each step of the
    scan takes a slice. Arrays of fewer than 65,536 numbers, in each layer, stay whole.

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
    small = np.prod(shape[stacked:], dtype=float) < _SMALLEST
    if fsdp == 1 or small or not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[None] * largest, "fsdp")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a tree by `partition`; optimisers' states are as parameters.

    Args:
        tree: of arrays or their shapes: states of networks, or a carry of them.
        mesh: the devices.

    Returns:
        A tree of `NamedSharding`.
    """
    fsdp = mesh.shape["fsdp"]
    place = lambda path, x: NamedSharding(mesh, partition(dotted(path), x.shape, fsdp))  # noqa: E731
    return jax.tree.map_with_path(place, tree)


def sharded(tree: Any, mesh: Mesh) -> Any:
    """The tree, each array where `shardings` has it; a device takes its own part alone.

    Args:
        tree: of arrays on the host, maybe memory-mapped, or on devices.
        mesh: the devices.
    """
    return jax.device_put(tree, shardings(tree, mesh))
