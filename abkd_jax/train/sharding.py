"""Where the arrays of networks lie on a mesh: whole on every device, or split over `fsdp`."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from abkd_jax.parallel import partition, placed
from abkd_jax.types import dotted


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
    return jax.tree.map(placed, tree, shardings(tree, mesh))
