"""Functions with bound numbers: an objective as data, and the annotations that say what is what.

The keyword-only parameters of a function are its hyperparameters, each read by its annotation:

- `Number`, and those with a narrower domain (`Positive`, `NonNegative`, `Unit`, or
  `Annotated[float | Array, Domain(low, high)]` of your own), become leaves, in the canonical float
  type; they may also be a `Schedule`. A domain is judged where the value is concrete;
- `Array` becomes a leaf as it is, or a `Statistic`, which a run computes;
- `int`, `bool`, `str`, unions of them and tuples of one of them or of `float` are structure;
- a `Divergence` or `Loss` is a nested `Bound`; a plain function is bound on the way.
"""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jax import Array
from jax import numpy as jnp

from abkd_jax.types import Batch, Divergence, Loss, Outputs


@dataclass(frozen=True)
class Domain:
    """The numbers from low to high.

    Attributes:
        low: -inf for no bound.
        high: inf for no bound.
        open_low: whether low itself is left out.
        open_high: whether high itself is left out.
        finite: whether infinities are left out.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    finite: bool = True

    def has(self, value: Any) -> bool:
        """Whether every entry lies in it; NaN never does."""
        value = np.asarray(value)
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(np.all(above & below & (np.isfinite(value) | (not self.finite))))

    def __str__(self) -> str:
        """In words that go on after "must be"."""
        bounds, ends = [], (self.low, self.high)
        if all(map(math.isfinite, ends)) and not (self.open_low or self.open_high):
            return f"between {self.low:g} and {self.high:g}"
        if math.isfinite(self.low):
            bounds.append(f"{'greater than' if self.open_low else 'at least'} {self.low:g}")
        if math.isfinite(self.high):
            bounds.append(f"{'less than' if self.open_high else 'at most'} {self.high:g}")
        elif self.finite:
            bounds.append("finite" if bounds else "a finite number")
        return " and ".join(bounds) or "a number"


Number = Annotated[float | Array, Domain()]
Positive = Annotated[float | Array, Domain(0, open_low=True)]
NonNegative = Annotated[float | Array, Domain(0)]
Unit = Annotated[float | Array, Domain(0, 1)]


@dataclass(frozen=True)
class Statistic:
    """A leaf that a run computes, such as "class_prior"; see `config.build.STATISTICS`."""

    name: str


class Needs(NamedTuple):
    """The parts of `Outputs` that a function reads.

    Attributes:
        own: of the network being trained.
        other: of the other one.
    """

    own: frozenset[str] = frozenset()
    other: frozenset[str] = frozenset()


@struct.dataclass
class Bound:
    """A function with its hyperparameters bound: numbers are leaves, the rest is structure.

    A pytree, so jit compiles once for all its numbers, vmap sweeps over them and grad
    differentiates them. Called like the function without its keywords.

    Attributes:
        fn: the function.
        numbers: arrays, `Schedule`s, `Statistic`s and nested `Bound`s, by keyword.
        static: the keywords that are structure, with their values.
    """

    fn: Callable = struct.field(pytree_node=False)
    numbers: Mapping[str, Any]
    static: tuple[tuple[str, Any], ...] = struct.field(pytree_node=False, default=())

    def __call__(self, *args, **fixed):
        """The function's value; `fixed` are keywords that were not there to be bound.

        Raises:
            ValueError: if a number is still a schedule.
        """
        for name, number in self.numbers.items():
            if isinstance(number, Schedule):
                raise ValueError(
                    f"{self.fn.__name__}: {name} is a schedule; call at_step(bound, step) first."
                )
        return self.fn(*args, **self.numbers, **dict(self.static), **fixed)

    def domain(self, name: str) -> Domain | None:
        """The domain of one of its numbers; None for an array."""
        return domain_of(hyperparameters(self.fn)[name].annotation)

    @property
    def needs(self) -> Needs:
        """What the function and those nested in it read; their `needs` is a tuple, of both
        networks, or {"own": parts, "other": parts}."""
        said = [
            parts if isinstance(parts, Mapping) else dict.fromkeys(Needs._fields, parts)
            for parts in self._said("needs")
        ]
        sides = ([parts.get(side, ()) for parts in said] for side in Needs._fields)
        return Needs(*(frozenset().union(*parts) for parts in sides))

    @property
    def needs_labels(self) -> bool:
        """Whether the function, or one nested in it, reads a label of every row."""
        return any(self._said("needs_labels"))

    @property
    def couples_batch(self) -> bool:
        """Whether a row's value depends on the other rows."""
        return any(self._said("couples_batch"))

    def _said(self, attribute: str) -> list[Any]:
        """What the function and those nested in it say of themselves, or by a keyword they name."""
        said = getattr(self.fn, attribute, ())
        said = dict(self.static)[said] if isinstance(said, str) else said
        nested = [part for part in self.numbers.values() if isinstance(part, Bound)]
        return [said, *(x for part in nested for x in part._said(attribute))]


@struct.dataclass
class Schedule(Bound):
    """A number that depends on the step: a function of `abkd_jax.schedules` with its end points."""


def bind(fn: Callable, /, **hypers: Any) -> Bound:
    """Binds the hyperparameters of a divergence, a loss, an optimiser or the like.

    Args:
        fn: the function, or one that is bound, whose other hyperparameters stay.
        **hypers: values for its keyword-only parameters; those with a default may be left out.

    Returns:
        The function with everything bound, defaults included.

    Raises:
        TypeError: naming the function, the keyword and what it takes, for a keyword that is
            unknown, missing, without annotation, or of the wrong type.
        ValueError: naming them, for a number outside its domain.
    """
    return bound(fn, hypers, field=_name(fn))


def schedule(fn: Callable, /, **hypers: Any) -> Schedule:
    """`bind` for a function of the step, such as those of `abkd_jax.schedules`."""
    return bound(fn, hypers, field=_name(fn), kind=Schedule)


def bound(
    fn: Callable,
    hypers: Mapping[str, Any],
    *,
    field: str,
    kind: type[Bound] = Bound,
    fixed: str = "",
) -> Bound:
    """`bind` with the name under which messages speak of the function.

    Args:
        fn: the function.
        hypers: values for its keyword-only parameters.
        field: "student.terms.distill", say.
        kind: `Bound` or `Schedule`.
        fixed: a keyword that the caller gives when it calls the result, and nobody else.

    Returns:
        The function, bound.

    Raises:
        TypeError: as `bind`.
        ValueError: likewise.
    """
    if isinstance(fn, Bound):
        hypers = dict(fn.numbers) | dict(fn.static) | dict(hypers)
        return bound(fn.fn, hypers, field=field, kind=type(fn), fixed=fixed)
    known = {key: p for key, p in hyperparameters(fn).items() if key != fixed}
    takes = f"{_name(fn)} takes {', '.join(known) or 'none'}"
    for key in hypers:
        if key not in known:
            raise TypeError(f"{field}.{key} is unknown{nearest(key, known)}; {takes}.")
    numbers, static = {}, []
    for key, parameter in known.items():
        value, at = hypers.get(key, parameter.default), f"{field}.{key}"
        if value is inspect.Parameter.empty:
            raise TypeError(f"{at} is missing; {takes}.")
        if is_static(parameter.annotation):
            static.append((key, _static_value(at, parameter.annotation, value)))
        else:
            numbers[key] = _leaf(at, parameter.annotation, value)
            if kind is Schedule and isinstance(numbers[key], Schedule):
                raise TypeError(f"{at} must be a number; found another schedule.")
    return kind(fn=fn, numbers=numbers, static=tuple(static))


def at_step(tree: Any, step: int | Array) -> Any:
    """The tree with every `Schedule` in it replaced by its value at the step."""
    is_schedule = lambda node: isinstance(node, Schedule)  # noqa: E731
    value = lambda node: node(step) if is_schedule(node) else node  # noqa: E731
    return jax.tree.map(value, tree, is_leaf=is_schedule)


def signature_of(fn: Any) -> inspect.Signature | None:
    """The signature of a function, annotations resolved; None for what has none."""
    try:
        return inspect.signature(fn.fn if isinstance(fn, Bound) else fn, eval_str=True)
    except Exception:  # annotations are expressions, which may raise anything
        return None


def kind_of(fn: Any) -> Any:
    """`Divergence`, `Loss`, or None for anything that is not annotated as one of them."""
    signature = signature_of(fn)
    if signature is None or signature.return_annotation is not Array:
        return None
    parameters = signature.parameters.values()
    positional = [p.annotation for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    kinds = {Divergence: [Array, Array], Loss: [Outputs, Outputs, Batch]}
    return next((kind for kind, expected in kinds.items() if positional == expected), None)


def hyperparameters(fn: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, annotations resolved."""
    parameters = inspect.signature(fn, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def domain_of(annotation: Any) -> Domain | None:
    """The domain of a parameter that is a number; None for any other parameter."""
    if annotation == float | Array:
        return Domain()
    if typing.get_origin(annotation) is Annotated:
        found = (part for part in annotation.__metadata__ if isinstance(part, Domain))
        return next(found, Domain())
    return None


def is_static(annotation: Any) -> bool:
    """Whether a parameter so annotated is structure."""
    scalars = (int, bool, str)
    if typing.get_origin(annotation) is tuple:
        return all(arg in (*scalars, float, ...) for arg in typing.get_args(annotation))
    return all(kind in scalars for kind in _kinds(annotation))


def as_number(value: Any, field: str, domain: Domain | None = None) -> Array:
    """The value as an array of the canonical float type: float64 where x64 is on, else float32.

    Raises:
        TypeError: naming the field, if the value is not a real number or an array of them.
        ValueError: naming the field, if it is concrete and not in the domain.
    """
    try:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    except ValueError:  # ragged
        dtype = object
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{field} must be a number; found {value!r}.")
    concrete = not isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    if domain is not None and concrete and not domain.has(value):
        raise ValueError(f"{field} must be {domain}; found {value!r}.")
    return jnp.asarray(value, dtype=float)


def nearest(name: Any, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for a near miss, else nothing: the end of a refusal."""
    close = difflib.get_close_matches(f"{name}", list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _name(fn: Any) -> str:
    fn = fn.fn if isinstance(fn, Bound) else fn
    return getattr(fn, "__name__", repr(fn))


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _static_value(field: str, annotation: Any, value: Any) -> Any:
    expected = tuple if typing.get_origin(annotation) is tuple else annotation
    if expected is tuple and isinstance(value, list):
        value = tuple(value)
    kinds = _kinds(expected)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{field} must be of type {names}; found {value!r}.")
    if expected is tuple:
        element = typing.get_args(annotation)[0]
        if any(type(part) is not element for part in value):
            raise TypeError(f"{field} must be a tuple of {element.__name__}; found {value!r}.")
    return value


def _leaf(field: str, annotation: Any, value: Any) -> Any:
    if annotation in (Divergence, Loss):
        expected = "divergence" if annotation == Divergence else "loss"
        if not callable(value) or isinstance(value, Schedule):
            raise TypeError(f"{field} must be a {expected}, a function; found {value!r}.")
        if kind_of(value) not in (annotation, None):
            raise TypeError(f"{field} must be a {expected}; found the other of the two.")
        return bind(value)
    if annotation is Array:
        return value if isinstance(value, Schedule | Statistic) else as_number(value, field)
    domain = domain_of(annotation)
    if domain is None:
        found = "nothing" if annotation is inspect.Parameter.empty else repr(annotation)
        raise TypeError(
            f"{field} must be annotated `Number` or the like, `Array`, `int`, `bool` or `str`, or "
            f"`Divergence` or `Loss` (see abkd_jax.binding); found {found}."
        )
    return value if isinstance(value, Schedule) else as_number(value, field, domain)
