"""The argument of a config file: `--config=configs/digits.py:divergence=reverse_kl,weight=2.`

It is a list of `key=value` and of flags, read as literals only: numbers, strings, tuples of them,
names of functions, and functions with their numbers. `method=NAME` replaces the student's terms by
those of a published method (configs/methods.py); `divergence=NAME(...)` replaces the divergence of
the student's `distill` term; any other key is a number of that term, at whatever depth it stands.
"""

import ast
import functools
import inspect
import os
import pathlib
import runpy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from abkd_jax import divergences, losses, objective, schedules
from abkd_jax.types import Divergence, Loss, hyperparameters, is_number, kind_of, nearest

_TERM = "student.terms.distill"
_LONGEST = 2000


def parse(argument: str) -> dict[str, Any]:
    """The values by key; a flag is True, and a function a group `dict(fn=NAME, ...)`.

    Args:
        argument: "runlocal,divergence=reverse_kl", "alpha=linear(1,.3)", ...; may be empty.

    Returns:
        {key: number, string, tuple or group}.

    Raises:
        ValueError: naming the part that cannot be read.
    """
    if len(argument) > _LONGEST:
        raise ValueError(
            f"the config's argument has {len(argument)} characters; the longest has {_LONGEST}."
        )
    values = {}
    for part in _parts(argument):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not key.isidentifier():
            raise ValueError(f"the config's argument has {part!r}, which is no flag or key=value.")
        if key in values:
            raise ValueError(f"the config's argument gives {key!r} twice.")
        values[key] = _read(value) if equals else True
    return values


def apply(
    config: ml_collections.ConfigDict,
    values: Mapping[str, Any],
    *,
    beside: str | os.PathLike | None = None,
) -> ml_collections.ConfigDict:
    """Puts the values of `parse` into the student's `distill` term, and checks that they fit.

    Args:
        config: with `student.terms.distill`; changed in place, and locked.
        values: {"method": group, "divergence": group, any number of the term: number or group}.
        beside: a config file, whose neighbour methods.py has `get_methods`; None for no methods.

    Returns:
        The config.

    Raises:
        ValueError: naming the key, what was found and what the term takes.
    """
    values, by_method = dict(values), "method" in values
    plugins = tuple(config.get("plugins", ()))
    with config.unlocked(), config.ignore_type():
        if "method" in values:
            name = values.pop("method")
            name = name.get("fn") if isinstance(name, Mapping) else name
            if beside is None:
                raise ValueError(f"this config takes no method; found method={name}.")
            terms = method_terms(config, name, beside)
            config.student.terms = ml_collections.ConfigDict(terms)
        term = config.student.terms.distill
        if "divergence" in values:
            if "divergence" not in term:
                raise ValueError(f"{_TERM} takes no divergence; its loss is {term.fn!r}.")
            group, field = values.pop("divergence"), f"{_TERM}.divergence"
            group = _with_floats(group, Divergence, field, plugins)
            term.divergence = ml_collections.ConfigDict(group)
        # A number that the config gives, before one that is left to its default.
        found = sorted(_places(term.to_dict(), Loss, _TERM, plugins), key=lambda place: place[2])
        places = {name: place for name, place, _ in found}
        for key, value in values.items():
            if key not in places:
                raise ValueError(
                    f"the config's argument has {key!r}, which is no number of {_TERM}"
                    f"{nearest(key, places)}; it takes divergence, {', '.join(places)}."
                )
            if isinstance(value, bool):
                raise ValueError(f"the config's argument gives {key} no number; write {key}=1.0.")
            *path, name = places[key].split(".")
            value = _as_float(value)
            group = isinstance(value, Mapping)
            functools.reduce(getattr, path, config)[name] = (
                ml_collections.ConfigDict(value) if group else value
            )
    built = objective.objective(
        config.student.terms.to_dict(),
        field="student.terms",
        learner="student",
        networks=("student", "teacher"),
        num_steps=config.num_steps,
        plugins=plugins,
        class_means={"teacher": lambda: np.zeros((1, 1))},  # there is no network yet
    )
    if by_method and any("hidden" in term.loss.needs for term in built.values()):
        with config.unlocked():
            config.student.project = ml_collections.ConfigDict({"hidden": "teacher"})
    return config.lock()


def method_terms(
    config: ml_collections.ConfigDict, name: Any, beside: str | os.PathLike
) -> dict[str, dict[str, Any]]:
    """The student's terms of a published method, as the labels that it sees allow.

    Where labels are withheld, the labels' own term is averaged over the labelled examples alone,
    and a loss that needs a label per example has the teacher's most likely class in its place.

    Args:
        config: for batch_size, num_steps and data.labelled.
        name: of the method.
        beside: a config file, whose neighbour methods.py has `get_methods`.

    Returns:
        {name: group of the term}.

    Raises:
        ValueError: if there is no such method.
    """
    known = methods(config, beside)
    if name not in known:
        hint = nearest(name, known) if isinstance(name, str) else ""
        raise ValueError(f"method must be one of {', '.join(known)}; found {name!r}{hint}.")
    if not config.data.get("labelled"):
        return known[name]
    return {term: _for_withheld_labels(group) for term, group in known[name].items()}


def methods(
    config: ml_collections.ConfigDict, beside: str | os.PathLike
) -> dict[str, dict[str, Any]]:
    """All published methods, {name: terms}, for the config's batch_size and num_steps."""
    path = pathlib.Path(beside).with_name("methods.py")
    length = {"batch_size": config.batch_size, "num_steps": config.num_steps}
    return runpy.run_path(str(path))["get_methods"](**length)


def _for_withheld_labels(group: dict[str, Any]) -> dict[str, Any]:
    if group["fn"] == "cross_entropy":
        return group | {"where": "labelled"}
    if not _needs_labels(group):
        return group
    options = {key: group[key] for key in objective.TERM_FIELDS[1:] if key in group}
    loss = {key: value for key, value in group.items() if key not in options}
    return dict(fn="with_teacher_labels", loss=loss) | options


def _needs_labels(group: Any) -> bool:
    """Whether a function that a group names, or one in it, reads a label of every example."""
    if not isinstance(group, Mapping):
        return False
    own = getattr(vars(losses).get(str(group.get("fn"))), "needs_labels", False)
    return own or any(_needs_labels(part) for part in group.values())


def _places(
    group: Any, kind: Any, field: str, plugins: tuple[str, ...]
) -> Iterator[tuple[str, str, bool]]:
    """(name, where it stands, whether the config gives it) for each number of a function.

    The outermost of a name comes last.
    """
    parameters = _parameters(group, kind, field, plugins)
    for name, parameter in parameters.items():
        if parameter.annotation in (Divergence, Loss) and name in group:
            yield from _places(group[name], parameter.annotation, f"{field}.{name}", plugins)
    if kind is Loss:
        yield "weight", f"{field}.weight", True
    for name, parameter in parameters.items():
        if parameter.annotation not in (Divergence, Loss):
            yield name, f"{field}.{name}", name in group


def _with_floats(group: Any, kind: Any, field: str, plugins: tuple[str, ...]) -> Any:
    """The group with whole numbers as floats, wherever the function takes a number."""
    parameters = _parameters(group, kind, field, plugins)
    kinds = {name: parameter.annotation for name, parameter in parameters.items()}
    values = dict(group)
    for name, value in group.items():
        if kinds.get(name) in (Divergence, Loss):
            values[name] = _with_floats(value, kinds[name], f"{field}.{name}", plugins)
        elif is_number(kinds.get(name)):
            values[name] = _as_float(value)
    return values


def _parameters(
    group: Any, kind: Any, field: str, plugins: tuple[str, ...]
) -> dict[str, inspect.Parameter]:
    """The hyperparameters of the function that a group names."""
    if not isinstance(group, Mapping) or "fn" not in group:
        raise ValueError(f"{field} must be a function, such as forward_kl; found {group!r}.")
    fn = objective.lookup(group["fn"], kind, field=f"{field}.fn", plugins=plugins)
    return hyperparameters(fn)


def _as_float(value: Any) -> Any:
    """A number as a float, also in a schedule's group, where `steps` and the like stay whole."""
    if isinstance(value, Mapping):
        fn = vars(schedules).get(str(value.get("fn")))
        known = hyperparameters(fn) if callable(fn) else {}
        whole = {name for name, p in known.items() if not is_number(p.annotation)}
        return {
            key: part if key in whole or key == "fn" else _as_float(part)
            for key, part in value.items()
        }
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _parts(argument: str) -> Iterator[str]:
    """The argument cut at the commas that stand outside of brackets."""
    depth, start = 0, 0
    for index, character in enumerate(argument + ","):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            if part := argument[start:index].strip():
                yield part
            start = index + 1
    if depth:
        raise ValueError(f"the config's argument {argument!r} has brackets that do not match.")


def _read(text: str) -> Any:
    """What a value's text stands for; nothing in it is evaluated."""
    try:
        with warnings.catch_warnings(action="ignore"):
            node = ast.parse(text.strip(), mode="eval").body
        return _value(node)
    except (SyntaxError, RecursionError, MemoryError, UnicodeError):
        node = None
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        node = None
    raise ValueError(f"the config's argument has {text!r}, which cannot be read.")


def _value(node: ast.expr) -> Any:
    """A literal, or the group that a name or a call stands for."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign, node = (-1 if isinstance(node.op, ast.USub) else 1), node.operand
        if not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
            raise ValueError(f"the config's argument has a sign before {ast.unparse(node)!r}.")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return sign * node.value
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_value(part) for part in node.elts)
    if isinstance(node, ast.Name | ast.Attribute):
        return {"fn": ast.unparse(node)}
    if isinstance(node, ast.Call):
        return _group(node)
    raise ValueError(
        f"the config's argument has {ast.unparse(node)!r}, which is no number, name, or function "
        "with numbers."
    )


def _group(node: ast.Call) -> dict[str, Any]:
    """The group dict(fn=NAME, ...) of a call, its positional numbers under their keywords."""
    name = ast.unparse(node.func)
    order = _keywords(name) if node.args else []
    if len(node.args) > len(order):
        raise ValueError(
            f"the config's argument gives {name} {len(node.args)} numbers without names; "
            f"it takes {', '.join(order) or 'none'}."
        )
    group = {"fn": name}
    for key, value in [
        *zip(order, node.args, strict=False),
        *((k.arg, k.value) for k in node.keywords),
    ]:
        if key is None:
            raise ValueError(f"the config's argument gives {name} a **, which it does not take.")
        if key in group:
            raise ValueError(f"the config's argument gives {name}'s {key!r} twice.")
        group[key] = _value(value)
    return group


def _keywords(name: str) -> list[str]:
    """The keywords of a schedule, a divergence or a loss, in their order."""
    known = {n: f for n, f in (vars(losses) | vars(divergences)).items() if kind_of(f)}
    known |= {n: f for n, f in vars(schedules).items() if objective.is_schedule(f)}
    if name not in known:
        raise ValueError(
            f"the config's argument has {name!r}, which is no schedule, divergence or loss"
            f"{nearest(name, known)}."
        )
    return list(hyperparameters(known[name]))
