"""The devices of a run as one mesh: the program is written for the whole batch and XLA splits it.

With one view of the whole batch, a loss that couples its examples and batch norm mean the same on
any number of devices.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh(num_devices: int, *, batch_size: int) -> Mesh:
    """The mesh of a run: axes `data`, along which batches are split, and `model`.

    Args:
        num_devices: how many devices to use; 0 for all.
        batch_size: of a training step.

    Returns:
        The mesh. Its axes are Auto: Explicit ones refuse flax.linen's modules, and gathers.

    Raises:
        ValueError: if there are fewer devices, or the batch does not split evenly.
    """
    available = jax.device_count()
    count = num_devices or available
    if count > available:
        raise ValueError(f"devices must be at most the {available} there are; found {count}.")
    if batch_size % count:
        raise ValueError(
            f"batch_size must be a multiple of the {count} devices; found {batch_size} (set "
            "devices to use fewer)."
        )
    axes = (AxisType.Auto,) * 2
    devices = jax.devices()[:count]
    return jax.make_mesh((count, 1), ("data", "model"), axis_types=axes, devices=devices)


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The tree with a copy of each array on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree: Any, mesh: Mesh) -> Any:
    """The tree, inside jit or out of it, with the first axis of its arrays split over the mesh.

    Arrays without axes, and those whose first axis does not split evenly, are left to XLA.
    """
    count = mesh.shape["data"]
    along = NamedSharding(mesh, PartitionSpec("data"))

    def put(x):
        whole = x.ndim == 0 or x.shape[0] % count
        return x if whole else jax.lax.with_sharding_constraint(x, along)

    return jax.tree.map(put, tree)
