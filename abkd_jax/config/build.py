"""From a config to objectives: names become functions, numbers leaves, mistakes one sentence.

A group of a config that stands for a function has `fn`, its name, and the function's keywords:

    dict(fn="on_logits", temperature=2.0, divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3))

The name is looked up in `abkd_jax.losses`, then in `abkd_jax.divergences`, then as a dotted path in
`abkd_jax` or in a package that the config lists under `plugins`; it must be an annotated loss or
divergence. Any number may be a schedule, `dict(fn="linear", start=1.0, end=0.3)`, whose `steps`
are those of the run unless given. An array, such as the `centers` of `norm_and_direction`, may be
"class_means", which the run computes from the term's other network.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from abkd_jax import divergences, losses, schedules
from abkd_jax.types import (
    Bound,
    Divergence,
    Loss,
    Outputs,
    Schedule,
    Term,
    as_number,
    bind,
    hyperparameters,
    kind_of,
    nearest,
    schedule,
)

CLASS_MEANS = "class_means"  # the array of a config that is computed from a network
MASKS = ("where", "labelled")
TERM_FIELDS = ("fn", "weight", "where", "other")
_UNIT = (lambda x: (x >= 0) & (x <= 1), "between 0 and 1")
_POSITIVE = (lambda x: (x > 0) & (x < jnp.inf), "greater than 0 and finite")
_DOMAINS = {  # what a number of that name may be; any other may be what is finite
    "clip_norm": (lambda x: x > 0, "greater than 0"),
    "ema_decay": (lambda x: (x >= 0) & (x < 1), "at least 0 and less than 1"),
    "clip": (lambda x: x >= 1, "at least 1"),  # of `alphanet`
    "epsilon": _POSITIVE,
    "head_mass": _UNIT,
    "label_smoothing": _UNIT,
    "learning_rate": (lambda x: (x >= 0) & (x < jnp.inf), "at least 0 and finite"),
    "order": (lambda x: (x >= 0) & (x < jnp.inf), "at least 0 and finite"),
    "regularization": _POSITIVE,
    "skew": _UNIT,
    "teacher_weight": _UNIT,
    "temperature": _POSITIVE,
}
_OF_THE_STEP = ("input_gradient",)  # what the training step makes, for any network
_KINDS = {Divergence: "divergence", Loss: "loss"}
_SIGNATURES = {
    Divergence: "(Array, Array, *, numbers) -> Array",
    Loss: "(Outputs, Outputs, Batch, *, numbers) -> Array",
}


def objective(
    terms: Mapping[str, Mapping[str, Any]],
    *,
    field: str,
    learner: str,
    networks: Iterable[str],
    num_steps: int,
    plugins: Iterable[str] = (),
    class_means: Mapping[str, Callable[[], Array]] | None = None,
) -> dict[str, Term]:
    """The objective of one network that learns.

    Args:
        terms: {name: group}. A group has `fn`, a loss, and its keywords; `weight`, a number or a
            schedule; optionally `where`, "where" (the default: every example) or "labelled"; and
            `other`, the network that the loss takes as its second argument (the default: the only
            other network, or the learner itself if it is alone).
        field: where the terms stand in the config, for messages: "student.terms".
        learner: the name of the network that learns.
        networks: the names of all networks that take part in the step.
        num_steps: the length of the run, which schedules take as theirs by default.
        plugins: packages whose functions the config may name.
        class_means: by the name of a network that does not learn; called for the terms with
            centers="class_means".

    Returns:
        {name: Term}.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if not isinstance(terms, Mapping):
        raise ValueError(f"{field} must be a group of terms by name; found {terms!r}.")
    if not terms:
        raise ValueError(f"{field} is empty; a network that learns needs at least one term.")
    others = [name for name in networks if name != learner] or [learner]
    built = {}
    for name, group in terms.items():
        at = f"{field}.{name}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{at} must be a group dict(fn=LOSS, weight=...); found {group!r}.")
        options = {key: group[key] for key in TERM_FIELDS if key in group}
        function = {key: value for key, value in group.items() if key not in TERM_FIELDS[1:]}
        if "weight" not in options:
            raise ValueError(f"{at}.weight is missing; give the term's factor, such as 1.0.")
        if options.get("where", "where") not in MASKS:
            raise ValueError(f"{at}.where must be one of {_or(MASKS)}; found {group['where']!r}.")
        if "other" not in options and len(others) > 1:
            raise ValueError(f"{at}.other is missing; name one of {_or(others)}.")
        other = options.get("other", others[0])
        if other not in others:
            raise ValueError(f"{at}.other must be one of {_or(others)}; found {other!r}.")
        function = _with_class_means(function, at, other, class_means or {})
        built[name] = Term(
            loss=bound(function, Loss, field=at, num_steps=num_steps, plugins=plugins),
            weight=number(options["weight"], f"{at}.weight", num_steps),
            where=options.get("where", "where"),
            other=other,
        )
    return built


def _with_class_means(
    group: Any, field: str, other: str, known: Mapping[str, Callable[[], Array]]
) -> Any:
    """The group, functions in it included, with the arrays of the other network in their places."""
    if isinstance(group, Mapping):
        at = lambda key: f"{field}.{key}"  # noqa: E731
        return {key: _with_class_means(x, at(key), other, known) for key, x in group.items()}
    if not isinstance(group, str) or group != CLASS_MEANS:
        return group
    if other not in known:
        raise ValueError(
            f"{field}: {CLASS_MEANS!r} are those of a network that does not learn at the same "
            f"time; found {other!r}, which does."
        )
    return known[other]()


def check_needs(
    objectives: Mapping[str, Mapping[str, Term]], outputs: Mapping[str, Outputs]
) -> None:
    """Refuses a loss that reads what a network does not show.

    Args:
        objectives: by learner.
        outputs: of every network, arrays or their shapes (`jax.eval_shape`).

    Raises:
        ValueError: naming the term, the network and the part that it lacks.
    """
    for learner, terms in objectives.items():
        for name, term in terms.items():
            for network in (learner, term.other):
                for part in sorted(term.loss.needs.difference(_OF_THE_STEP)):
                    if part not in Outputs.__dataclass_fields__:
                        raise ValueError(
                            f"{learner}.terms.{name} needs {part!r}, which is no part of Outputs; "
                            f"these are {', '.join(Outputs.__dataclass_fields__)}."
                        )
                    if getattr(outputs[network], part) is None:
                        raise ValueError(
                            f"{learner}.terms.{name} needs {part!r} of both networks, which the "
                            f"model of {network!r} does not give."
                        )


def bound(
    group: Mapping[str, Any],
    kind: Any,
    *,
    field: str,
    num_steps: int,
    plugins: Iterable[str] = (),
) -> Bound:
    """The function that a group stands for, with its numbers, schedules and functions bound.

    Args:
        group: `fn` and keywords.
        kind: `Loss` or `Divergence`.
        field: where the group stands in the config.
        num_steps: the length of the run.
        plugins: packages whose functions the config may name.

    Returns:
        A `Bound`.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if not isinstance(group, Mapping) or "fn" not in group:
        raise ValueError(
            f"{field} must be a group dict(fn=NAME, ...) that names a {_KINDS[kind]}; "
            f"found {group!r}."
        )
    fn = lookup(group["fn"], kind, field=f"{field}.fn", plugins=plugins)
    hypers = {key: value for key, value in group.items() if key != "fn"}
    return bind_group(bind, fn, hypers, field=field, num_steps=num_steps, plugins=plugins)


def bind_group(
    binder: Callable[..., Bound],
    fn: Callable,
    hypers: Mapping[str, Any],
    *,
    field: str,
    num_steps: int,
    plugins: Iterable[str] = (),
) -> Bound:
    """`bind` or `schedule` for values as they stand in a config, nested groups included."""
    annotations = {name: p.annotation for name, p in hyperparameters(fn).items()}
    values = {}
    for key, value in hypers.items():
        kind = annotations.get(key)
        if kind in (Divergence, Loss):
            at = f"{field}.{key}"
            value = bound(value, kind, field=at, num_steps=num_steps, plugins=plugins)
        elif kind == float | Array:
            value = number(value, f"{field}.{key}", num_steps)
        values[key] = value
    try:
        return binder(fn, **values)
    except TypeError as error:
        raise ValueError(f"{field}: {error}") from None


def number(value: Any, field: str, num_steps: int) -> Array | Schedule:
    """A number of a config, or the schedule that a group stands for.

    Raises:
        ValueError: naming the field, if it is neither, or not in the domain of its name.
    """
    key = field.rpartition(".")[2]
    allowed, words = _DOMAINS.get(key, (jnp.isfinite, "a finite number"))
    if isinstance(value, Mapping):
        known = {name: fn for name, fn in vars(schedules).items() if is_schedule(fn)}
        name = value.get("fn")
        if not isinstance(name, str) or name not in known:
            hint = nearest(name, known) if isinstance(name, str) else ""
            raise ValueError(
                f"{field}.fn must name a schedule, one of {_or(known)}; found {name!r}{hint}."
            )
        hypers = {key: part for key, part in value.items() if key != "fn"}
        if "steps" in hyperparameters(known[name]):
            hypers.setdefault("steps", num_steps)
        built = bind_group(schedule, known[name], hypers, field=field, num_steps=num_steps)
        try:
            visited = [built(num_steps * part // 8) for part in range(9)]
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        for part in visited:
            if not isinstance(part, jax.core.Tracer) and not jnp.all(allowed(part)):
                raise ValueError(f"{field} must stay {words}; found {part} on its way.")
        return built
    try:
        array = as_number(value, field)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if isinstance(array, jax.core.Tracer):
        return array
    if not jnp.all(allowed(array)):
        raise ValueError(f"{field} must be {words}; found {value!r}.")
    return array


def lookup(name: Any, kind: Any, *, field: str, plugins: Iterable[str] = ()) -> Callable:
    """The loss or divergence of a name; nothing else can be reached.

    Args:
        name: of a function of `abkd_jax.losses` or `abkd_jax.divergences`, or a dotted path.
        kind: `Loss` or `Divergence`.
        field: where the name stands in the config.
        plugins: packages in which a dotted path may lie, besides `abkd_jax`.

    Returns:
        The function.

    Raises:
        ValueError: naming the field, if there is no such function, or it is not annotated as one.
    """
    if isinstance(plugins, str) or not isinstance(plugins, Iterable):
        raise ValueError(f"plugins must be a list of packages; found {plugins!r}.")
    if not isinstance(name, str):
        raise ValueError(f"{field} must be the name of a {_KINDS[kind]}; found {name!r}.")
    fn = _by_path(name, field, ["abkd_jax", *plugins]) if "." in name else _by_name(name)
    found = kind_of(fn)
    if found is kind:
        return fn
    if found is Divergence:
        raise ValueError(
            f"{field}: {name} is a divergence, where a loss is expected; write "
            f"dict(fn='on_logits', divergence=dict(fn={name!r}, ...))."
        )
    if found is Loss:
        raise ValueError(f"{field}: {name} is a loss, where a divergence is expected.")
    if fn is not None:
        raise ValueError(
            f"{field}: {name} is not annotated as a {_KINDS[kind]}, {_SIGNATURES[kind]}."
        )
    known = [n for module in (losses, divergences) for n, f in vars(module).items() if _is(f, kind)]
    raise ValueError(
        f"{field}: there is no {_KINDS[kind]} {name!r}{nearest(name, known)}; "
        f"known are {', '.join(sorted(known))}."
    )


def _by_name(name: str) -> Any:
    return next((f for m in (losses, divergences) if (f := vars(m).get(name)) and kind_of(f)), None)


def _by_path(path: str, field: str, packages: list[str]) -> Any:
    module, _, name = path.rpartition(".")
    if not any(module == package or module.startswith(package + ".") for package in packages):
        raise ValueError(
            f"{field}: {path!r} lies outside of {_or(packages)}; list its package under `plugins`."
        )
    try:
        return vars(importlib.import_module(module)).get(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: cannot import {module!r}: {error}.") from None


def _is(fn: Any, kind: Any) -> bool:
    return callable(fn) and not getattr(fn, "__name__", "_").startswith("_") and kind_of(fn) is kind


def is_schedule(fn: Any) -> bool:
    """Whether this is a function of `abkd_jax.schedules` that a config may name."""
    own = inspect.isfunction(fn) and fn.__module__ == schedules.__name__
    return own and not fn.__name__.startswith("_")


def _or(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
