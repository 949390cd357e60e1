"""A divergence whose values and student's gradient are found in one pass over memory."""

import functools
import math
from collections.abc import Callable

import jax
from jax import Array
from jax import numpy as jnp
from jax.custom_batching import custom_vmap, sequential_vmap
from jax.custom_derivatives import SymbolicZero

from abkd_jax import checks
from abkd_jax.binding import Bound, bind
from abkd_jax.divergences import kernel
from abkd_jax.types import Divergence

_DTYPES = (jnp.float32, jnp.bfloat16)


def single_pass(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    interpret: bool = False,
) -> Array:
    """The divergence, on TPUs by a kernel that reads both logits and writes the gradient once.

    It is the same function, also in its derivatives; those in other arguments than the student's
    logits, and second ones, are the divergence's own. Where there is no such kernel, it is the
    divergence itself: on CPUs and GPUs; for fewer than 128 classes, or more than fit (153,750 on a
    v5e or a v6e, 73,800 on a v5p or a v7x); for logits of 64 bit, float16, or of two shapes; for
    numbers of which each row has its own; and for divergences that sort or gather, `adaptive_kl`
    and those of the k likeliest classes.

    What is inside is one pass, so this is the outermost of several combinators; `tempered`, and so
    a loss's temperature, goes inside by itself. TPUs before v5 have no VMEM for a block of rows:
    there it is the divergence itself. Several chips have a kernel each
    in chunks of `losses.total`, inside of `jax.shard_map`, and where their mesh is the current one
    (`jax.set_mesh`), over all of whose axes the rows are then split. A program is exported for TPUs
    alone, or without a kernel. A gradient that is weighted by row, as a mean's is, takes another
    pass, unless what reads it has the weights on its way, as products with a head do.

    Args:
        divergence: D, with its numbers bound; they may be traced.
        interpret: the kernel in Pallas' interpreter, on any device: slow, for tests.

    Returns:
        `[...]`, the values of the divergence.
    """
    checks.check_logits(student_logits, teacher_logits)
    student_logits, teacher_logits = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    numbers, structure = jax.tree.flatten(bind(divergence))
    if not _has_kernel(structure, numbers, student_logits, teacher_logits, interpret):
        return divergence(student_logits, teacher_logits)
    return _values((structure, interpret), tuple(numbers), student_logits, teacher_logits)


def moved_inside(
    divergence: Divergence, combinator: Callable, **numbers: float | Array
) -> Divergence | None:
    """`single_pass` of a combinator of D, for a combinator of `single_pass` of D.

    Args:
        divergence: that of the combinator.
        combinator: one that changes each row alone.
        **numbers: its other hyperparameters.

    Returns:
        The divergence; None if the given one is not `single_pass`.
    """
    if not isinstance(divergence, Bound) or divergence.fn is not single_pass:
        return None
    numbers = jax.tree.map(jnp.asarray, numbers)
    combined = Bound(
        fn=combinator, numbers={"divergence": divergence.numbers["divergence"]} | numbers
    )
    return divergence.replace(numbers={"divergence": combined})


def _has_kernel(structure, numbers, student_logits, teacher_logits, interpret) -> bool:
    """Whether there is one here, for these shapes, and for this divergence."""
    axes = () if interpret else kernel.axes_of_rows()
    if axes is None or student_logits.shape != teacher_logits.shape or not student_logits.size:
        return False
    classes, dtypes = student_logits.shape[-1], {student_logits.dtype, teacher_logits.dtype}
    sizes = jax.sharding.get_abstract_mesh().shape
    fits = student_logits.size // classes % math.prod(sizes[axis] for axis in axes) == 0
    fits &= kernel.MIN_CLASSES <= classes <= kernel.most_classes()
    fits &= dtypes <= set(map(jnp.dtype, _DTYPES)) and all(jnp.ndim(x) == 0 for x in numbers)
    return fits and _body(structure, student_logits, teacher_logits, gradient=True).lowers


def _body(structure, student_logits, teacher_logits, *, gradient: bool) -> kernel.Body:
    *leading, classes = student_logits.shape
    dtypes = student_logits.dtype, teacher_logits.dtype
    return kernel.body(structure, (math.prod(leading), classes), dtypes, gradient=gradient)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _values(options, numbers, student_logits, teacher_logits):
    """The values, by a kernel that finds no gradient."""
    (values,) = _evaluated(options, False, numbers, student_logits, teacher_logits)
    return values


def _values_jvp(options, primals, tangents):
    is_zero = lambda x: isinstance(x, SymbolicZero)  # noqa: E731
    d_numbers, d_student, d_teacher = tangents
    if not all(map(is_zero, (*d_numbers, d_teacher))):
        solid = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_zero(x) else x, tangents)
        values = lambda *x: kernel.by_itself(options[0], False, *x)[0]  # noqa: E731
        return jax.jvp(values, primals, solid)
    values, gradient = _evaluated(options, True, *primals)
    if is_zero(d_student):
        return values, jnp.zeros_like(values)
    wide = (x.astype(values.dtype) for x in (gradient, d_student))
    return values, jnp.sum(jnp.multiply(*wide), axis=-1)


_values.defjvp(_values_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _evaluated(options, gradient, numbers, student_logits, teacher_logits) -> tuple[Array, ...]:
    """The values `[...]` and, if wanted, their gradient `[..., K]` in the student's logits."""
    structure, interpret = options
    by_kernel = functools.partial(_by_kernel, structure, gradient, interpret)
    arguments = numbers, student_logits, teacher_logits
    if interpret:
        return by_kernel(*arguments)
    by_itself = functools.partial(kernel.by_itself, structure, gradient)
    return jax.lax.platform_dependent(*arguments, tpu=by_kernel, default=by_itself)


@_evaluated.defjvp
def _evaluated_jvp(options, gradient, primals, tangents):
    return jax.jvp(functools.partial(kernel.by_itself, options[0], gradient), primals, tangents)


def _by_kernel(structure, gradient, interpret, numbers, student_logits, teacher_logits):
    """The kernel on rows; of a batch of them all at once, of one of numbers one after the other."""
    *leading, classes = student_logits.shape

    @custom_vmap
    def on_rows(numbers, student_logits, teacher_logits):
        trace = functools.partial(_body, structure, gradient=gradient)
        logits = student_logits, teacher_logits
        return kernel.evaluate(trace, numbers, *logits, interpret=interpret)

    @on_rows.def_vmap
    def over(size, is_batched, numbers, *logits):
        if any(is_batched[0]):
            axes = jax.tree.map(lambda x: 0 if x else None, is_batched)
            found = jax.vmap(sequential_vmap(on_rows), axes)(numbers, *logits)
            return found, (True,) * len(found)
        logits = [
            x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            for x, has_axis in zip(logits, is_batched[1:], strict=True)
        ]
        found = on_rows(numbers, *(x.reshape(-1, classes) for x in logits))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in found), (True,) * len(found)

    rows = (x.reshape(-1, classes) for x in (student_logits, teacher_logits))
    found = on_rows(numbers, *rows)
    return tuple(x.reshape(*leading, *x.shape[1:]) for x in found)
