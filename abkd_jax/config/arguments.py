"""The argument of a config file: `--config=configs/digits.py:divergence=reverse_kl,weight=2.`

It is a list of `key=value` and of flags, read as literals only: numbers, strings, tuples of them,
names of functions, functions with their numbers, and two names with a hyphen between them, which
are a string. `method=NAME` replaces the student's terms by those of a published method
(configs/methods.py), and the source of the last phase in which it learns if the method has one;
`source=NAME(...)` replaces that source, and `divergence=NAME(...)` the divergence of the student's
`distill` term; `NETWORK='WORKDIR'` takes a network from another run, `NETWORK='FILE.pth'` from a
file of PyTorch's, `NETWORK='CACHE'` from a folder of `abkd_jax.cache_teacher` (the student's terms
`on_logits` are then `on_top_k`), and leaves out the phase in which it alone would learn; any other
key is a number of that term, at whatever depth it stands.
"""

import ast
import os
import pathlib
import runpy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from abkd_jax.binding import Bound, hyperparameters, nearest
from abkd_jax.checks import require
from abkd_jax.config.build import KINDS, TERM_FIELDS, Builder
from abkd_jax.config.schema import ordered
from abkd_jax.data import is_top_cache
from abkd_jax.losses import on_logits, on_top_k
from abkd_jax.types import Divergence, Loss

_LEARNER, _TERM = "student", "distill"
_FIELD = f"{_LEARNER}.terms.{_TERM}"
_LONGEST = 2000
_OF_TORCH = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors", ".npz")
_POSITIONAL = "*"  # the key of those values of a call whose keywords are not known yet


def parse(argument: str) -> dict[str, Any]:
    """The values by key; a flag is True, and a function a group `dict(fn=NAME, ...)`.

    What stands in a call without a keyword is a tuple under "*", until `apply` knows the function.

    Args:
        argument: "runlocal,divergence=reverse_kl", "alpha=linear(1,.3)", ...; may be empty.

    Returns:
        {key: number, string, tuple or group}.

    Raises:
        ValueError: naming the part that cannot be read.
    """
    if len(argument) > _LONGEST:
        raise _refused(f"has {len(argument)} characters; the longest has {_LONGEST}")
    values = {}
    for part in _parts(argument):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not key.isidentifier():
            raise _refused(f"has {part!r}, which is no flag or key=value")
        if key in values:
            raise _refused(f"gives {key!r} twice")
        values[key] = _read(value) if equals else True
    return values


def apply(
    config: ConfigDict,
    values: Mapping[str, Any],
    *,
    beside: str | os.PathLike | None = None,
) -> ConfigDict:
    """Puts the values of `parse` into the config, and checks that the student's terms fit them.

    Args:
        config: with `student.terms.distill`; changed in place, and locked.
        values: {"method": group, "divergence": group, any network: the workdir of a run, any
            number of the term: number or group}.
        beside: a config file, whose neighbour methods.py has `get_methods`; None for no methods.

    Returns:
        The config.

    Raises:
        ValueError: naming the key, what was found and what the term takes.
    """
    values, by_method = dict(values), "method" in values
    builder = Builder(config.get("plugins", ()), config.num_steps)
    with config.unlocked(), config.ignore_type():
        for name, group in config.items():
            if name in values and isinstance(group, ConfigDict) and "model" in group:
                _from_elsewhere(config, name, values.pop(name))
        if by_method:
            name = method_name(values.pop("method"))
            if beside is None:
                raise ValueError(f"this config takes no method; found method={name}.")
            config.student.terms = ConfigDict(method_terms(config, name, beside))
            if source := methods(config, beside)[name].get("source"):
                _last_phase(config).source = ConfigDict(source)
        if "source" in values:
            _put_source(config, values.pop("source"), builder)
        _read_caches(config)
        if values and not (_LEARNER in config and _TERM in config[_LEARNER].terms):
            raise _refused(f"has {next(iter(values))!r}, but {_FIELD}, whose it would be, is none")
        if "divergence" in values:
            _put_divergence(config, values.pop("divergence"), builder)
        if values or (by_method and _TERM in config[_LEARNER].terms):
            with config.ignore_type():  # of groups that have just been put there, too
                losses = _put_numbers(config, values, builder)
            if by_method and any("hidden" in loss.needs.own for loss in losses.values()):
                config.student.project = ConfigDict({"hidden": "teacher"})
    return config.lock()


def method_name(method: Any) -> Any:
    """That of an argument, whose numbers stand beside it."""
    if not isinstance(method, Mapping):
        return method
    if len(method) > 1:
        numbers = ",".join(f"{key}={value}" for key, value in method.items() if key != "fn")
        raise _refused(f"gives numbers in brackets; write method={method['fn']},{numbers}")
    return method["fn"]


def _from_elsewhere(config: ConfigDict, name: str, path: Any) -> None:
    """Takes a network from a run, a file or a cache, not the phase in which it alone learns."""
    if not isinstance(path, str):
        raise _refused(f"gives {name} no folder of a run; write {name}='runs/digits/{name}'")
    of_torch = path.endswith(_OF_TORCH) or pathlib.Path(path).is_file()
    if is_top_cache(path):
        config[name].model = ConfigDict({"fn": "cached", "path": path})
    else:
        weights = {"fn": "torch", "path": path} if of_torch else {"fn": "run", "workdir": path}
        config[name].weights = ConfigDict(weights)
    for phase, group in list(config.phases.items()):
        if tuple(group.get("learn", ())) == (name,):
            del config.phases[phase]


def _read_caches(config: ConfigDict) -> None:
    """Makes the student's terms of logits those of the likeliest classes, where these are all."""
    groups = {name: x for name, x in config.items() if isinstance(x, ConfigDict)}
    models = {name: x.model for name, x in groups.items() if "model" in x}
    cached = {name for name, x in models.items() if is_top_cache(x.get("path", ""))}
    for term in config[_LEARNER].terms.values() if cached and _LEARNER in config else ():
        if term.fn == on_logits.__name__ and term.get("other", *cached) in cached:
            term.fn = on_top_k.__name__


def _put_divergence(config: ConfigDict, group: Any, builder: Builder) -> None:
    """The divergence of the term."""
    term = config[_LEARNER].terms[_TERM]
    if "divergence" not in term:
        raise ValueError(f"{_FIELD} takes no divergence; its loss is {term.fn!r}.")
    expected = "a function, such as forward_kl"
    require(isinstance(group, Mapping), f"{_FIELD}.divergence", expected, group)
    term.divergence = _made(group, "divergence", f"{_FIELD}.divergence", builder)


def _put_source(config: ConfigDict, group: Any, builder: Builder) -> None:
    """The source of the last phase in which the student learns."""
    phase, expected = _last_phase(config), "a function, such as generated(by='student')"
    require(isinstance(group, Mapping), "source", expected, group)
    phase.source = _made(group, "source", "source", builder)


def _last_phase(config: ConfigDict) -> ConfigDict:
    """The last phase in which the student learns."""
    phases = [config.phases[name] for name in ordered(config.phases)]
    phases = [phase for phase in phases if _LEARNER in phase.get("learn", ())]
    if not phases:
        raise _refused(f"leaves no phase in which {_LEARNER} learns")
    return phases[-1]


def _put_numbers(
    config: ConfigDict, values: Mapping[str, Any], builder: Builder
) -> dict[str, Bound]:
    """The numbers of the term, by their keys; the losses that result."""
    term, loss = config[_LEARNER].terms[_TERM], _losses(config, builder)[_TERM]
    # A number that the config gives, before one that is left to its default.
    found = sorted(_places(loss, term.to_dict()), key=lambda place: place[2])
    places = {name: path for name, path, _ in found} | {"weight": "weight"}
    for key, value in values.items():
        if key not in places:
            raise _refused(
                f"has {key!r}, which is no number of {_FIELD}{nearest(key, places)}; it takes "
                f"divergence, {', '.join(places)}"
            )
        if isinstance(value, bool):
            raise _refused(f"gives {key} no number; write {key}=1.0")
        if isinstance(value, Mapping):
            value = _made(value, "schedule", f"{_FIELD}.{places[key]}", builder)
        elif isinstance(value, int):
            value = float(value)
        term.update_from_flattened_dict({places[key]: value})
    return _losses(config, builder)  # what was put there fits


def _made(group: Mapping[str, Any], kind: str, field: str, builder: Builder) -> ConfigDict:
    """The group of a function that can be built, every value under its keyword."""
    group = _named(group, kind, field, builder)
    return ConfigDict(_with_floats(group, builder.bound(group, kind, field)))


def _losses(config: ConfigDict, builder: Builder) -> dict[str, Bound]:
    """The losses of the student's terms, in the last phase in which it learns."""
    phase, terms = _last_phase(config), config[_LEARNER].terms.to_dict()
    terms = builder.objective(
        terms,
        field=f"{_LEARNER}.terms",
        learner=_LEARNER,
        networks=(*phase.learn, *phase.get("see", ())),
        masks={term.get("where", "where") for term in terms.values()},  # `resolve` knows them
    )
    return {name: term.loss for name, term in terms.items()}


def _places(bound: Bound, group: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(name, dotted path, whether the config gives it) for each number of a function.

    The outermost of a name comes last.
    """
    inner_first = sorted(bound.numbers.items(), key=lambda item: type(item[1]) is not Bound)
    for name, part in inner_first:
        if type(part) is Bound:
            for inner, path, given in _places(part, group.get(name, {})):
                yield inner, f"{name}.{path}", given
        else:
            yield name, name, name in group


def _with_floats(group: Mapping[str, Any], bound: Bound) -> dict[str, Any]:
    """The group with whole numbers as floats, wherever the function takes a number."""
    values = dict(group)
    for name in bound.numbers.keys() & values.keys():
        if isinstance(values[name], Mapping):
            values[name] = _with_floats(values[name], bound.numbers[name])
        elif isinstance(values[name], int):
            values[name] = float(values[name])
    return values


def method_terms(
    config: ConfigDict, name: Any, beside: str | os.PathLike
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
    if not isinstance(name, str) or name not in known:
        near = nearest(name, known) if isinstance(name, str) else ""
        raise ValueError(f"method must be one of {', '.join(known)}; found {name!r}{near}.")
    terms = known[name]["terms"]
    if not config.data.get("labelled"):
        return terms
    builder = Builder(config.get("plugins", ()), config.num_steps)
    return {term: _for_withheld_labels(group, builder) for term, group in terms.items()}


def methods(config: ConfigDict, beside: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """All published methods of the config's task, {name: {"terms": groups, maybe "source": group}},
    for its batch_size and num_steps."""
    found = runpy.run_path(str(pathlib.Path(beside).with_name("methods.py")))
    length = {"batch_size": config.batch_size, "num_steps": config.num_steps}
    if config.get("task", {}).get("fn") == "language":
        return found["get_language_methods"](**length)
    return {name: {"terms": terms} for name, terms in found["get_methods"](**length).items()}


def _for_withheld_labels(group: dict[str, Any], builder: Builder) -> dict[str, Any]:
    if group["fn"] == "cross_entropy":
        return group | {"where": "labelled"}
    options = {key: group[key] for key in TERM_FIELDS if key in group}
    loss = {key: value for key, value in group.items() if key not in options}
    if not builder.bound(loss, "loss", "method").needs_labels:
        return group
    return dict(fn="with_teacher_labels", loss=loss) | options


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
        raise _refused(f"{argument!r} has brackets that do not match")


def _read(text: str) -> Any:
    """What a value's text stands for; nothing in it is evaluated."""
    unreadable = _refused(f"has {text!r}, which cannot be read")
    if "\0" in text:  # a plain ValueError of Python 3.11
        raise unreadable
    try:
        with warnings.catch_warnings(action="ignore"):
            return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, UnicodeError):
        raise unreadable from None


def _value(node: ast.expr) -> Any:
    """A literal, or the group that a name or a call stands for."""
    match node:
        case ast.Constant(value):
            return value
        case ast.UnaryOp(ast.USub() | ast.UAdd(), operand):
            if not (isinstance(operand, ast.Constant) and type(operand.value) in (int, float)):
                raise _refused(f"has a sign before {ast.unparse(operand)!r}")
            return ast.literal_eval(node)
        case ast.Tuple(parts):
            return tuple(_value(part) for part in parts)
        case ast.Name() | ast.Attribute():
            return {"fn": ast.unparse(node)}
        case ast.BinOp(ast.Name(first), ast.Sub(), ast.Name(second)):
            return f"{first}-{second}"
        case ast.Call():
            return _group(node)
    raise _refused(f"has {ast.unparse(node)!r}, which is no number, name, function or quoted text")


def _group(node: ast.Call) -> dict[str, Any]:
    """The group dict(fn=NAME, ...) of a call; its positional numbers wait for their keywords."""
    group = {"fn": ast.unparse(node.func)}
    if node.args:
        group[_POSITIONAL] = tuple(_value(argument) for argument in node.args)
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _refused(f"gives {group['fn']} a **, which it does not take")
        if keyword.arg in group:
            raise _refused(f"gives {group['fn']}'s {keyword.arg!r} twice")
        group[keyword.arg] = _value(keyword.value)
    return group


def _named(group: Mapping[str, Any], kind: str, field: str, builder: Builder) -> dict[str, Any]:
    """The group with positional values under their keywords, groups in it included."""
    fn = builder.lookup(group["fn"], kind, f"{field}.fn")
    values, known = dict(group), hyperparameters(fn)
    known.pop(KINDS[kind].fixed, None)
    positional = values.pop(_POSITIONAL, ())
    if len(positional) > len(known):
        raise _refused(
            f"gives {group['fn']} {len(positional)} numbers without names; it takes "
            f"{', '.join(known) or 'none'}"
        )
    for key, value in zip(known, positional, strict=False):
        if key in values:
            raise _refused(f"gives {group['fn']}'s {key!r} twice")
        values[key] = value
    kinds = {Divergence: "divergence", Loss: "loss"}
    for key, value in values.items():
        if isinstance(value, Mapping) and key in known:
            inner = kinds.get(known[key].annotation, "schedule")
            values[key] = _named(value, inner, f"{field}.{key}", builder)
    return values


def _refused(what: str) -> ValueError:
    return ValueError(f"the config's argument {what}.")
