"""The types of the library: what networks show to losses, and functions with bound numbers."""

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp

Batch = Mapping[str, Array]
"""`inputs`; `labels` [...] (-1 where withheld); `where` [...] bool (False: padding); `labelled`
[...] bool; optionally `key`, for dropout, and `outputs`, which replace a network's forward pass."""


@struct.dataclass
class Outputs:
    """What a network shows to a loss; parts that it does not have are None.

    Attributes:
        logits: `[..., K]`.
        hidden: `[..., D]`, before the last linear map.
        unembedding: `[D, K]`, that map.
        bias: `[K]`, its bias.
        features: intermediate arrays, shallow to deep.
        projected: arrays aligned with the other network's widths, by name.
        input_gradient: `[..., *input]`.
    """

    logits: Array | None = None
    hidden: Array | None = None
    unembedding: Array | None = None
    bias: Array | None = None
    features: tuple[Array, ...] | None = None
    projected: Mapping[str, Array] | None = None
    input_gradient: Array | None = None


Divergence = Callable[[Array, Array], Array]
"""student_logits [..., K], teacher_logits [..., K] -> [...]"""

Loss = Callable[[Outputs, Outputs, Batch], Array]
"""the network being trained, the other one, the batch -> [...], one value per example"""


@struct.dataclass
class Bound:
    """A function with its hyperparameters bound: numbers are leaves, the rest is structure.

    A pytree, so jit compiles once for all its numbers, vmap sweeps over them and grad
    differentiates them. Called like the function without its keywords.

    Attributes:
        fn: the function.
        numbers: arrays, `Schedule`s, and nested `Bound`s, by keyword.
        static: the keywords that are structure, with their values.
    """

    fn: Callable = struct.field(pytree_node=False)
    numbers: Mapping[str, Any]
    static: tuple[tuple[str, Any], ...] = struct.field(pytree_node=False, default=())

    def __call__(self, *args):
        """The function's value.

        Raises:
            ValueError: if a number is still a schedule.
        """
        for name, number in self.numbers.items():
            if isinstance(number, Schedule):
                raise ValueError(
                    f"{self.fn.__name__}: {name} is a schedule; call at_step(bound, step) first."
                )
        return self.fn(*args, **self.numbers, **dict(self.static))

    @property
    def needs(self) -> frozenset[str]:
        """The parts of `Outputs` that the function reads, nested ones included."""
        nested = (part.needs for part in self.numbers.values() if isinstance(part, Bound))
        return frozenset(getattr(self.fn, "needs", ())).union(*nested)

    @property
    def couples_batch(self) -> bool:
        """Whether an example's value depends on the other examples."""
        nested = (part for part in self.numbers.values() if isinstance(part, Bound))
        return getattr(self.fn, "couples_batch", False) or any(p.couples_batch for p in nested)


@struct.dataclass
class Schedule(Bound):
    """A number that depends on the step: a function of `abkd_jax.schedules` with its end points."""


@struct.dataclass
class Term:
    """One summand of an objective.

    Attributes:
        loss: of type `Loss`.
        weight: its factor, a number or a `Schedule`.
        where: the name of the batch's mask over which the loss is averaged.
        other: the name of the network that the loss takes as its second argument.
    """

    loss: Bound
    weight: Array | Schedule
    where: str = struct.field(pytree_node=False, default="where")
    other: str = struct.field(pytree_node=False, default="teacher")


def bind(fn: Callable, /, **hypers: Any) -> Bound:
    """Binds the keyword-only hyperparameters of a divergence, a loss or a schedule.

    Each keyword is read by its annotation. `float | Array` and `Array` become leaves, in the
    canonical float type; they may also be a `Schedule`. `int`, `bool`, `str` and tuples of them
    are static. A `Divergence` or `Loss` is a nested `Bound`; a plain function is bound on the way.

    Args:
        fn: the function.
        **hypers: values for its keyword-only arguments; those with a default may be left out.

    Returns:
        The function with everything bound, defaults included.

    Raises:
        TypeError: naming the function, the keyword and what it takes, for a keyword that is
            unknown, missing, without annotation, or of the wrong type.
    """
    return _bind(Bound, fn, hypers)


def schedule(fn: Callable, /, **hypers: Any) -> Schedule:
    """`bind` for a function of the step, such as those of `abkd_jax.schedules`."""
    return _bind(Schedule, fn, hypers)


def kind_of(fn: Any) -> Any:
    """`Divergence`, `Loss`, or None for anything that is not annotated as one of them."""
    try:
        signature = inspect.signature(fn.fn if isinstance(fn, Bound) else fn, eval_str=True)
    except (TypeError, ValueError, NameError):
        return None
    parameters = signature.parameters.values()
    positional = [p.annotation for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if signature.return_annotation is not Array:
        return None
    kinds = {Divergence: [Array, Array], Loss: [Outputs, Outputs, Batch]}
    return next((kind for kind, expected in kinds.items() if positional == expected), None)


def at_step(tree: Any, step: int | Array) -> Any:
    """The tree with every `Schedule` in it replaced by its value at the step."""
    is_schedule = lambda node: isinstance(node, Schedule)  # noqa: E731
    value = lambda node: node(step) if is_schedule(node) else node  # noqa: E731
    return jax.tree.map(value, tree, is_leaf=is_schedule)


def call_named(
    known: Mapping[str, Callable],
    name: Any,
    given: Mapping[str, Any],
    *,
    field: str,
    name_field: str,
    **fixed: Any,
) -> Any:
    """Calls the function that a group of a config names, with the group's keywords.

    Args:
        known: functions whose keywords are structure, by name.
        name: as the config has it.
        given: the keywords that the config gives.
        field: where the group stands in the config, for messages.
        name_field: where the name stands.
        **fixed: keywords that are not the config's to give.

    Returns:
        What the function returns.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    check_named(known, name, given, field=field, name_field=name_field, fixed=fixed)
    try:
        return bind(known[name], **given, **fixed)()
    except (TypeError, ValueError) as error:
        raise ValueError(str(error).replace(f"{name}.", f"{field}.", 1)) from None


def check_named(
    known: Mapping[str, Callable],
    name: Any,
    given: Mapping[str, Any],
    *,
    field: str,
    name_field: str,
    fixed: Iterable[str],
) -> None:
    """The checks of `call_named` that need no call: the name, and the keywords' names."""
    if not isinstance(name, str) or name not in known:
        hint = nearest(name, known) if isinstance(name, str) else ""
        raise ValueError(f"{name_field} must be one of {', '.join(known)}; found {name!r}{hint}.")
    takes = {key: p for key, p in hyperparameters(known[name]).items() if key not in fixed}
    for key in given:
        if key not in takes:
            raise ValueError(
                f"{field}.{key} is unknown{nearest(key, takes)}; {name} takes {', '.join(takes)}."
            )
    for key, parameter in takes.items():
        if key not in given and parameter.default is parameter.empty:
            raise ValueError(f"{field}.{key} is missing; {name} takes {', '.join(takes)}.")


def hyperparameters(fn: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, annotations resolved."""
    parameters = inspect.signature(fn, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a near miss, else nothing: the end of a refusal."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def is_number(annotation: Any) -> bool:
    """Whether a parameter so annotated is a leaf."""
    return annotation in (float | Array, Array)


def _bind(kind: type[Bound], fn: Callable, hypers: Mapping[str, Any]) -> Bound:
    if isinstance(fn, Bound):
        return _bind(type(fn), fn.fn, dict(fn.numbers) | dict(fn.static) | dict(hypers))
    name = getattr(fn, "__name__", repr(fn))
    known = hyperparameters(fn)
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    for key in hypers:
        if key not in known:
            raise TypeError(f"{name} has no hyperparameter {key!r}; {takes}.")
    numbers, static = {}, []
    for key, parameter in known.items():
        value = hypers.get(key, parameter.default)
        if value is inspect.Parameter.empty:
            raise TypeError(f"{name} needs the hyperparameter {key!r}; {takes}.")
        if is_static(parameter.annotation):
            static.append((key, _static_value(name, key, parameter.annotation, value)))
        else:
            numbers[key] = _leaf(name, key, parameter.annotation, value)
            if kind is Schedule and isinstance(numbers[key], Schedule):
                raise TypeError(f"{name}.{key} must be a number; found another schedule.")
    return kind(fn=fn, numbers=numbers, static=tuple(static))


def is_static(annotation: Any) -> bool:
    """Whether a parameter so annotated is structure."""
    scalars = (int, bool, str)
    if typing.get_origin(annotation) is tuple:
        return all(arg in (*scalars, float, ...) for arg in typing.get_args(annotation))
    return annotation in scalars


def _static_value(name: str, key: str, annotation: Any, value: Any) -> Any:
    expected = typing.get_origin(annotation) or annotation
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not expected:
        raise TypeError(f"{name}.{key} must be of type {expected.__name__}; found {value!r}.")
    if expected is tuple:
        element = typing.get_args(annotation)[0]
        if any(type(part) is not element for part in value):
            raise TypeError(f"{name}.{key} must be a tuple of {element.__name__}; found {value!r}.")
    return value


def _leaf(name: str, key: str, annotation: Any, value: Any) -> Any:
    if annotation in (Divergence, Loss):
        expected = "divergence" if annotation == Divergence else "loss"
        if not callable(value) or isinstance(value, Schedule):
            raise TypeError(f"{name}.{key} must be a {expected}, a function; found {value!r}.")
        if kind_of(value) not in (annotation, None):
            raise TypeError(f"{name}.{key} must be a {expected}; found the other of the two.")
        return bind(value)
    if not is_number(annotation):
        found = "nothing" if annotation is inspect.Parameter.empty else repr(annotation)
        raise TypeError(
            f"{name}.{key} must be annotated `float | Array` (a number), `int`, `bool` or `str` "
            f"(structure), or `Divergence` or `Loss`; found {found}."
        )
    return value if isinstance(value, Schedule) else as_number(value, f"{name}.{key}")


def as_number(value: Any, field: str) -> Array:
    """The value as an array of the canonical float type: float64 where x64 is on, else float32.

    Raises:
        TypeError: naming the field, if the value is not a real number or an array of them.
    """
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except ValueError:  # ragged
        dtype = object
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{field} must be a number; found {value!r}.")
    return jnp.asarray(value, dtype=float)
