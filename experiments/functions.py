"""docs/functions.md: all that a config can name, from the functions' signatures and docstrings.

    python -m experiments.functions

The page is written anew where a function, a keyword or a docstring changes; a test compares them.
"""

import inspect
import pathlib
from collections.abc import Callable
from typing import Any

from abkd_jax.analysis import PROBES
from abkd_jax.config import build, command

_OUT = pathlib.Path(__file__).parents[1] / "docs" / "functions.md"
_KINDS = {  # in the order of the page: a title, and where a config names them
    "data": ("Data sets", "`data`"),
    "model": ("Models", "a network's `model`"),
    "weights": ("Weights", "a network's `weights`"),
    "adapter": ("Adapters", "a network's `adapter`"),
    "optimizer": ("Optimisers", "a network's `optimizer`"),
    "loss": ("Losses", "a term of a network's `terms`, and where a loss takes a loss"),
    "divergence": ("Divergences", "a loss's `divergence`"),
    "schedule": ("Schedules", "any number; `steps` are those of the phase unless given"),
    "source": ("Sources", "a phase's `source`"),
    "task": ("Tasks", "`task`"),
}


def main() -> None:
    """Writes the page."""
    _OUT.write_text(page())


def page() -> str:
    """The page, in Markdown."""
    parts = [
        "# What a config can name",
        "Written by `python -m experiments.functions`. A group `dict(fn=NAME, keyword=value, ...)` "
        "stands for the function of that name; a keyword without a default here must be given. "
        "`help(abkd_jax.PACKAGE.NAME)` says what each keyword means, its range, and the paper. "
        "Your own functions are named by a dotted path ([README](../README.md#add-a-divergence)).",
    ]
    for kind, (title, where) in _KINDS.items():
        found = sorted(build.names(kind).items())
        lines = [f"- `{signature(fn, kind)}`: {summary(fn)}" for _, fn in found]
        package = f"`abkd_jax.{build.KINDS[kind].package}`"
        parts += [f"## {title}", f"In {where}; of {package}.", "\n".join(lines)]
    probes = ", ".join(f"`{name}`" for name in PROBES)
    parts += ["## Probes", f"In `analysis`, a tuple of names: {probes}."]
    return "\n\n".join(parts) + "\n"


def signature(fn: Callable, kind: str) -> str:
    """Its name, and what a group of it may have, with defaults."""
    fixed, found = build.KINDS[kind].fixed.split(), inspect.signature(fn).parameters.values()
    found = [p for p in found if p.kind is p.KEYWORD_ONLY and p.name not in fixed]
    shown = (p.name if p.default is p.empty else f"{p.name}={default(p.default)}" for p in found)
    return f"{fn.__name__}({', '.join(shown)})"


def default(value: Any) -> str:
    """As a config has it."""
    return value.__name__ if callable(value) else repr(value)


def summary(fn: Callable) -> str:
    """The first paragraph of its docstring."""
    return " ".join(inspect.getdoc(fn).split("\n\n")[0].split())


if __name__ == "__main__":
    command.run(main)
