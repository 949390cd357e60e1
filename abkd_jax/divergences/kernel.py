"""A divergence's values, and their gradient in the student's logits, in one pass over memory.

A Pallas kernel for TPUs whose body is the divergence itself, on a block of rows that lies in VMEM:
each logit is read once and each slope written once, whatever the divergence does in between. Its
gradient is traced before the kernel is made, and the calls in it are inlined, since Mosaic, which
compiles the body, has no lowering of functions with derivatives of their own.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from abkd_jax import numerics

_LANES = 128  # numbers in a row of a register, and at least in a row of an array
MIN_CLASSES = _LANES
_SUBLANES = 8  # rows of a register
_BLOCK = 1 << 16  # entries of a block, which has _SUBLANES rows at least: compiling unrolls it
_OF_CLASS = 682  # bytes of VMEM for 8 rows of a class, with what a divergence makes of them
_VMEM = 100 << 20  # bytes of the 128 MB that these have
_LARGE_VMEM = ("TPU v5e", "TPU v5 lite", "TPU v6")
_USUAL_VMEM = 48 << 20  # of 64 MB
_SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")  # chips that have 16 MB
_TRANSCENDENTAL = {"exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sqrt"}
_CALLS = {"closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit"}
_LOWERED = _TRANSCENDENTAL | {  # by Mosaic, on rows
    *("abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy"),
    *("div", "eq", "expand_dims", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "lt"),
    *("max", "min", "mul", "ne", "neg", "not", "or", "reduce_and", "reduce_max", "reduce_min"),
    *("reduce_or", "reduce_sum", "reshape", "round", "select_n", "sign", "square", "squeeze"),
    *("stop_gradient", "sub", "tanh", "xor"),
}


class Body(NamedTuple):
    """What a kernel does with a block of rows.

    Attributes:
        jaxpr: (student's block, teacher's, *numbers) -> the values `[rows]` and, if wanted, the
            gradients `[rows, K]`.
        rows: of the block.
        gradient: whether gradients are wanted.
    """

    jaxpr: core.ClosedJaxpr
    rows: int
    gradient: bool

    @property
    def lowers(self) -> bool:
        """Whether Mosaic has all of it: nothing that sorts, gathers or loops, no array beside."""
        names = {equation.primitive.name for equation in self.jaxpr.jaxpr.eqns}
        return names <= _LOWERED and not self.jaxpr.consts


def axes_of_rows() -> tuple[str, ...] | None:
    """The axes of the current mesh over which each TPU has rows of its own.

    Empty where a TPU is alone with its rows: the only one, or inside of `jax.shard_map`. None where
    there can be no kernel: without TPUs that have room for a block, or where they share rows by a
    mesh that is not the current one (`jax.set_mesh`), so that nobody knows how.
    """
    mesh, kind = jax.sharding.get_abstract_mesh(), _kind()
    if not kind.startswith("TPU") or kind.startswith(_SMALL_VMEM):
        return None
    if mesh.empty:
        return () if jax.device_count() == 1 else None
    kinds = set(mesh.axis_types)
    if mesh.size == 1 or kinds == {AxisType.Manual}:
        return ()
    return mesh.axis_names if kinds == {AxisType.Auto} else None


def most_classes() -> int:
    """Of which a block fits."""
    return _vmem() // _OF_CLASS


def _vmem() -> int:
    """Bytes for a block: as many as most TPUs have, or any machine that interprets the kernel."""
    large = _kind().startswith(_LARGE_VMEM) or not _kind().startswith("TPU")
    return _VMEM if large else _USUAL_VMEM


def _kind() -> str:
    """Of the devices: those of the current mesh, or this machine's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return (device or jax.local_devices()[0]).device_kind


@functools.lru_cache(maxsize=256)
def body(
    structure: Any, shape: tuple[int, int], dtypes: tuple[Any, Any], *, gradient: bool
) -> Body:
    """Traces a divergence on a block.

    Args:
        structure: of the bound divergence, whose leaves are numbers.
        shape: of the logits, (rows, K).
        dtypes: of the student's and of the teacher's.
        gradient: whether the values' gradient in the student's logits is wanted, too.
    """
    count, classes = shape
    rows = max(_SUBLANES, _BLOCK // (-(-classes // _LANES) * _LANES) // _SUBLANES * _SUBLANES)
    rows = min(rows, count)

    def evaluated(student_logits, teacher_logits, *numbers):
        return by_itself(structure, gradient, numbers, student_logits, teacher_logits)

    blocks = [jax.ShapeDtypeStruct((rows, classes), dtype) for dtype in dtypes]
    numbers = [jax.ShapeDtypeStruct((), jnp.float32)] * structure.num_leaves
    nowhere = AbstractMesh((), ())  # one trace for all meshes: a block is on one device
    # Literals of 64 bit, such as 1.0, have no lowering.
    with jax.enable_x64(False), jax.sharding.use_abstract_mesh(nowhere):
        jaxpr = jax.make_jaxpr(evaluated)(*blocks, *numbers)
        for _ in range(2):  # what is put in a function's place may have calls in its turn
            flat = functools.partial(_inlined, jaxpr.jaxpr, jaxpr.consts)
            jaxpr = jax.make_jaxpr(flat)(*blocks, *numbers)
        return Body(jaxpr, rows, gradient)


def by_itself(
    structure: Any,
    gradient: bool,
    numbers: Sequence[Array],
    student_logits: Array,
    teacher_logits: Array,
) -> tuple[Array, ...]:
    """What a kernel finds, without one: see `evaluate`, and `body` for the structure."""
    divergence = jax.tree.unflatten(structure, numbers)
    of_student = lambda logits: divergence(logits, teacher_logits)  # noqa: E731
    if not gradient:
        return (of_student(student_logits),)
    values, pullback = jax.vjp(of_student, student_logits)
    return values, *pullback(jnp.ones_like(values))


def evaluate(
    trace: Callable[[Array, Array], Body],
    numbers: Sequence[Array],
    student_logits: Array,
    teacher_logits: Array,
    *,
    interpret: bool,
) -> tuple[Array, ...]:
    """The kernel, on each device for its own rows.

    Args:
        trace: the body for logits of such shapes; a device has fewer rows.
        numbers: the leaves of the divergence, scalars.
        student_logits: `[rows, K]`.
        teacher_logits: likewise.
        interpret: by Pallas' interpreter, on any device.

    Returns:
        `[rows]` in float32 and, if the body has it, `[rows, K]` in the student's dtype.
    """

    def on_rows(scalars, student_logits, teacher_logits):
        body = trace(student_logits, teacher_logits)
        return _called(body, scalars, student_logits, teacher_logits, interpret)

    numbers = [jnp.asarray(x, jnp.float32) for x in numbers]
    jaxpr = trace(student_logits, teacher_logits).jaxpr.jaxpr
    of_numbers, _, read = _parted(jaxpr)
    scalars = _run(of_numbers, dict(zip(jaxpr.invars[2:], numbers, strict=True)), read)
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in (*scalars, 0.0)])  # at least one
    axes = () if interpret else axes_of_rows()
    if axes:  # XLA knows of no kernel how to part it
        rows = PartitionSpec(axes)
        specs = dict(in_specs=(PartitionSpec(), rows, rows), out_specs=rows)
        on_rows = jax.shard_map(on_rows, check_vma=False, **specs)
    return on_rows(scalars, student_logits, teacher_logits)


def _called(body, scalars, student_logits, teacher_logits, interpret):
    """The values and the gradients of rows that lie on one device."""
    (count, classes), rows = student_logits.shape, body.rows
    jaxpr = body.jaxpr.jaxpr
    _, equations, read = _parted(jaxpr)

    def kernel(scalars, student, teacher, values, *gradients):
        known = {x: scalars[index].astype(x.aval.dtype) for index, x in enumerate(read)}
        known |= dict(zip(jaxpr.invars, (student[...], teacher[...]), strict=False))
        found = _run(equations, known, jaxpr.outvars)
        values[...] = jnp.broadcast_to(found[0][:, None], values.shape)
        for gradient, slopes in zip(gradients, found[1:], strict=True):
            gradient[...] = slopes

    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    block, lanes = (pl.BlockSpec((rows, size), lambda i: (i, 0)) for size in (classes, _LANES))
    shapes = [jax.ShapeDtypeStruct((count, _LANES), jnp.float32)]  # one number is 128 in memory
    shapes += [jax.ShapeDtypeStruct(student_logits.shape, student_logits.dtype)] * body.gradient
    values, *gradient = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, rows),),
        in_specs=[in_smem, block, block],
        out_specs=[lanes, block][: len(shapes)],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_vmem()),
        cost_estimate=_cost(body, [student_logits, teacher_logits, *shapes]),
        interpret=interpret,
    )(scalars, student_logits, teacher_logits)
    return values[:, 0], *gradient


def _cost(body: Body, arrays: Sequence[Any]) -> pl.CostEstimate:
    """Of all blocks: each array is read or written once."""
    blocks = arrays[0].shape[0] / body.rows
    sizes = [
        (equation.primitive.name, math.prod(equation.outvars[0].aval.shape))
        for equation in body.jaxpr.jaxpr.eqns
    ]
    slow = sum(size for name, size in sizes if name in _TRANSCENDENTAL)
    return pl.CostEstimate(
        flops=int(blocks * sum(size for _, size in sizes)),
        transcendentals=int(blocks * slow),
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _inlined(jaxpr: core.Jaxpr, consts: Sequence[Any], *args: Any) -> list[Any]:
    """Evaluates a jaxpr, those that it calls in its place, and by other means what has to be."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    return _run(jaxpr.eqns, known, jaxpr.outvars)


def _run(equations: Sequence[Any], known: dict[Any, Any], wanted: Sequence[Any]) -> list[Any]:
    """Evaluates equations, of which `known` has the inputs and gets the outputs."""
    value = lambda x: x.val if isinstance(x, core.Literal) else known[x]  # noqa: E731
    for equation in equations:
        inputs, name = list(map(value, equation.invars)), equation.primitive.name
        if name in _CALLS:
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            outputs = _inlined(inner.jaxpr, inner.consts, *inputs)
        elif name in _REPLACED:
            outputs = [_REPLACED[name](*inputs)]
        else:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        known.update(zip(equation.outvars, outputs, strict=True))
    return list(map(value, wanted))


def _parted(jaxpr: core.Jaxpr) -> tuple[list[Any], list[Any], list[Any]]:
    """The equations of numbers alone, the others, and what the others read of numbers.

    A scalar is no matter of vectors: Mosaic has not all of its functions, and XLA computes it once.
    """
    numbers, of_numbers, others = set(jaxpr.invars[2:]), [], []
    is_number = lambda x: isinstance(x, core.Literal) or x in numbers  # noqa: E731
    for equation in jaxpr.eqns:
        scalar = all(x.aval.shape == () for x in (*equation.invars, *equation.outvars))
        if scalar and all(map(is_number, equation.invars)):
            numbers.update(equation.outvars)
            of_numbers.append(equation)
        else:
            others.append(equation)
    read = [x for equation in others for x in equation.invars if not isinstance(x, core.Literal)]
    return of_numbers, others, [x for x in dict.fromkeys(read) if x in numbers]


def _expm1(x: Array) -> Array:
    near = abs(x) < 0.5
    small = jnp.where(near, x, 0.0)
    return jnp.where(near, small * numerics.exp_series(-small, 1), jnp.exp(x) - 1.0)


def _log1p(x: Array) -> Array:
    """With its digits near 0, whatever Mosaic's own does: the rounding of 1 + x cancels."""
    rounded = 1.0 + x
    same = (rounded == 1.0) | (x == jnp.inf)
    ratio = jnp.where(same, 1.0, x) / jnp.where(same, 1.0, rounded - 1.0)
    return jnp.where(rounded == 1.0, x, jnp.log(rounded) * ratio)


_REPLACED = {"expm1": _expm1, "log1p": _log1p}
