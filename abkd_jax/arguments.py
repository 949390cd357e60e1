"""The argument of a config file: `--config=configs/digits.py:divergence=reverse_kl,weight=2.`

It is a list of `key=value` and of flags, read as literals only: numbers, strings, tuples, names of
functions, and functions with their numbers. `divergence=NAME(...)` replaces the divergence of the
student's `distill` term; any other key is a number of that term, at whatever depth it stands.
"""

import ast
import functools
from collections.abc import Mapping
from typing import Any

import ml_collections

from abkd_jax import divergences, losses, objective, schedules
from abkd_jax.types import Divergence, Loss, hyperparameters, nearest

_TERM = "student.terms.distill"


def parse(argument: str) -> dict[str, Any]:
    """The values by key; a flag is True, and a function a group `dict(fn=NAME, ...)`.

    Args:
        argument: "runlocal,divergence=reverse_kl", "alpha=linear(1,.3)", ...; may be empty.

    Returns:
        {key: number, string, tuple or group}.

    Raises:
        ValueError: naming the part that cannot be read.
    """
    try:
        call = ast.parse(f"_({argument})", mode="eval").body
    except SyntaxError:
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError(
            f"the config's argument {argument!r} must be a list of key=value and flags."
        )
    values = {}
    for flag in call.args:
        if not isinstance(flag, ast.Name):
            raise ValueError(f"the config's argument has {ast.unparse(flag)!r} without a key=.")
        values[flag.id] = True
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in values:
            raise ValueError(f"the config's argument {argument!r} gives {keyword.arg!r} twice.")
        values[keyword.arg] = _value(keyword.value)
    return values


def apply(
    config: ml_collections.ConfigDict, values: Mapping[str, Any]
) -> ml_collections.ConfigDict:
    """Puts the values of `parse` into the student's `distill` term, and checks that they fit.

    Args:
        config: with `student.terms.distill`; changed in place.
        values: {"divergence": group, any number of the term: number or group}.

    Returns:
        The config.

    Raises:
        ValueError: naming the key, what was found and what the term takes.
    """
    values = dict(values)
    term = config.student.terms.distill
    plugins = tuple(config.get("plugins", ()))
    with config.unlocked(), config.ignore_type():
        if "divergence" in values:
            if "divergence" not in term:
                raise ValueError(f"{_TERM} takes no divergence; its loss is {term.fn!r}.")
            term.divergence = values.pop("divergence")
        places = _places(term.to_dict(), Loss, _TERM, plugins)
        for key, value in values.items():
            if key not in places:
                raise ValueError(
                    f"the config's argument has {key!r}, which is no number of {_TERM}"
                    f"{nearest(key, places)}; it takes divergence, {', '.join(places)}."
                )
            *path, name = places[key].split(".")
            functools.reduce(getattr, path, config)[name] = value
    objective.objective(
        config.student.terms.to_dict(),
        field="student.terms",
        learner="student",
        networks=("student", "teacher"),
        num_steps=config.num_steps,
        plugins=plugins,
    )
    return config


def _places(group: Any, kind: Any, field: str, plugins: tuple[str, ...]) -> dict[str, str]:
    """Where each number of a function stands in the config; the outermost of two of one name."""
    if not isinstance(group, Mapping) or "fn" not in group:
        raise ValueError(f"{field} must be a function, such as forward_kl; found {group!r}.")
    places = {"weight": f"{field}.weight"} if kind is Loss else {}
    fn = objective.lookup(group["fn"], kind, field=f"{field}.fn", plugins=plugins)
    nested = {}
    for name, parameter in hyperparameters(fn).items():
        if parameter.annotation in (Divergence, Loss):
            if name in group:
                place = f"{field}.{name}"
                nested |= _places(group[name], parameter.annotation, place, plugins)
        else:
            places[name] = f"{field}.{name}"
    return nested | places


def _value(node: ast.expr) -> Any:
    """A literal, or the group that a name or a call stands for."""
    if isinstance(node, ast.Name | ast.Attribute):
        return {"fn": ast.unparse(node)}
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(
                f"the config's argument has {ast.unparse(node)!r}, which is no number, name, or "
                "function with numbers."
            ) from None
    name = ast.unparse(node.func)
    group = {"fn": name}
    if node.args:
        order = _keywords(name)
        if len(node.args) > len(order):
            raise ValueError(
                f"the config's argument gives {name} {len(node.args)} numbers without names; "
                f"it takes {', '.join(order) or 'none'}."
            )
        group |= {key: _value(value) for key, value in zip(order, node.args, strict=False)}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in group:
            raise ValueError(f"the config's argument gives {name}'s {keyword.arg!r} twice.")
        group[keyword.arg] = _value(keyword.value)
    return group


def _keywords(name: str) -> list[str]:
    """The keywords of a schedule, a divergence or a loss, in their order."""
    known = vars(losses) | vars(divergences) | vars(schedules)
    if name not in known or not callable(known[name]):
        raise ValueError(
            f"the config's argument has {name!r}, which is no schedule, divergence or loss"
            f"{nearest(name, known)}."
        )
    return list(hyperparameters(known[name]))
