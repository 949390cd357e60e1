"""Sums over chunks of rows, with their gradients taken in the same pass.

What is large for all rows at once, such as logits over a large vocabulary, is there for one chunk
at a time, and the backward pass has only to scale what the forward pass has found.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from abkd_jax import parallel

_ARRAYS = 8  # of float32 [chunk, K] that a chunk has at once, about


class Layout(NamedTuple):
    """How rows are visited.

    Attributes:
        leading: how many leading axes they have.
        chunk: how many rows at a time, on each device.
        mesh: over all of whose axes the first axis is split, if it splits evenly; None for none.
    """

    leading: int
    chunk: int
    mesh: Mesh | None = None


def default_chunk(num_classes: int, *, accelerator: float | None = None) -> int:
    """128 rows on a CPU, whose caches hold few, 1,024 on accelerators; halved until they fit.

    Args:
        num_classes: K.
        accelerator: bytes of one's memory; None for the devices of this machine, and what is free.
    """
    on_cpu = accelerator is None and jax.default_backend() == "cpu"
    each = accelerator or parallel.free_memory() / jax.local_device_count()
    chunk = 128 if on_cpu else 1024
    while chunk > 1 and _ARRAYS * chunk * num_classes * 4 > each / 2:
        chunk //= 2
    return chunk


def chunked(x: Array, *, leading: int, chunk: int) -> Array:
    """`[..., *]` with `leading` axes of rows to `[chunks, chunk, *]`, padded with zeros."""
    flat = x.reshape(-1, *x.shape[leading:])
    padding = -len(flat) % chunk
    padded = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
    return padded.reshape(-1, chunk, *flat.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_chunks(f: Callable, layout: Layout, rows: Any, shared: Any) -> tuple[Array, Any, Any]:
    """The sum of a function over chunks of rows.

    Of its gradients in rows and in what is shared only those that are wanted are computed, each in
    the pass that computes the value, and those in what is shared are added up in float32 at least.
    There is no forward mode.

    Args:
        f: (rows of a chunk `[chunk, *]`, shared) -> (a scalar, further sums, arrays `[chunk, *]`).
            The last chunk is padded by rows of zeros, and False.
        layout: of the rows.
        rows: a pytree of arrays `[..., *]`.
        shared: a pytree of arrays.

    Returns:
        The sum of the scalars; the further sums and the arrays `[..., *]` of all rows, which carry
        no gradient.
    """
    nothing = jax.tree.map(lambda _: False, (rows, shared))
    return _scanned(f, layout, rows, shared, nothing)[0]


def _forward(f, layout, rows, shared):
    arguments = rows, shared
    is_leaf = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
    wanted = jax.tree.map(lambda x: x.perturbed, arguments, is_leaf=is_leaf)
    rows, shared = jax.tree.map(lambda x: x.value, arguments, is_leaf=is_leaf)
    return _scanned(f, layout, rows, shared, wanted)


def _backward(f, layout, gradients, cotangents):
    scale, *_ = cotangents
    if isinstance(scale, SymbolicZero):
        return jax.tree.map(jnp.zeros_like, gradients)
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), gradients)


over_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


def _scanned(f, layout, rows, shared, wanted):
    """What `over_chunks` returns, and the gradients that are wanted, with None for the others."""
    found, gradients = _scanned_on_mesh(f, layout, rows, shared, wanted)
    some, _ = _parted((rows, shared), wanted)
    return found, jax.tree.map(lambda x, of: x.astype(of.dtype), gradients, some)


def _scanned_on_mesh(f, layout, rows, shared, wanted):
    """`_scanned` with sums in float32 at least, by each device of its own rows."""
    local = functools.partial(_scanned_here, f, layout, wanted)
    mesh, (size, *_) = layout.mesh, jax.tree.leaves(rows)[0].shape
    if mesh is None or size % mesh.size:
        return local(rows, shared)

    def on_each(rows, shared):
        (*sums, arrays), (d_rows, d_shared) = local(rows, shared)
        sums = jax.lax.psum(sums, mesh.axis_names)
        return sums, jax.tree.map(_summed, d_shared, places), (arrays, d_rows)

    # Of a matrix as large as a head each device keeps the part that the optimiser has there.
    place = lambda x: parallel.partition("", jnp.shape(x), mesh.shape["fsdp"])  # noqa: E731
    (_, some), _ = _parted((rows, shared), wanted)
    places, whole, split = (
        jax.tree.map(place, some),
        PartitionSpec(),
        PartitionSpec(mesh.axis_names),
    )
    specs = {"in_specs": (split, whole), "out_specs": (whole, places, split)}
    on_mesh = jax.shard_map(on_each, mesh=mesh, check_vma=False, **specs)
    sums, d_shared, (arrays, d_rows) = on_mesh(rows, shared)
    return (*sums, arrays), (d_rows, d_shared)


def _summed(x: Array, place: PartitionSpec) -> Array:
    """The sum over the mesh, in parts where its place has `fsdp`."""
    if "fsdp" in place:
        axis = place.index("fsdp")
        x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(x, "data")
    return jax.lax.psum(x, ("data", "fsdp"))


def _scanned_here(f, layout, wanted, rows, shared):
    """`_scanned_on_mesh` on one device."""
    shape = jax.tree.leaves(rows)[0].shape[: layout.leading]
    count = math.prod(shape)
    chunk = min(layout.chunk, max(count, 1))
    chunks = jax.tree.map(functools.partial(chunked, leading=layout.leading, chunk=chunk), rows)

    def value(some, others):
        total, *rest = f(*_merged(some, others))
        return total, rest

    def of_chunk(rows):
        some, others = _parted((rows, shared), wanted)
        gradient = jax.value_and_grad(value, has_aux=True)
        (total, (sums, arrays)), (d_rows, d_shared) = gradient(some, others)
        return (total, sums, d_shared), (arrays, d_rows)

    def step(summed, rows):
        found, arrays = of_chunk(rows)
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), summed, found), arrays

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), chunks)
    (total, sums, d_shared), _ = jax.eval_shape(of_chunk, one)
    d_shared = jax.tree.map(_at_least_float32, d_shared)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (total, sums, d_shared))
    (total, sums, d_shared), arrays = jax.lax.scan(step, zeros, chunks)
    whole = lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*shape, *x.shape[2:])  # noqa: E731
    arrays, d_rows = jax.tree.map(whole, arrays)
    return (total, sums, arrays), (d_rows, d_shared)


def _at_least_float32(x):
    return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32))


def _parted(tree, wanted):
    """The tree's leaves that are wanted, and the others, each with None for the rest."""
    some = jax.tree.map(lambda x, is_wanted: x if is_wanted else None, tree, wanted)
    others = jax.tree.map(lambda x, is_wanted: None if is_wanted else x, tree, wanted)
    return some, others


def _merged(some, others):
    """What was parted."""
    is_none = lambda x: x is None  # noqa: E731
    return jax.tree.map(lambda x, y: y if x is None else x, some, others, is_leaf=is_none)
