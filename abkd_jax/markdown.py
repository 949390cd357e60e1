"""Markdown, as the pages of reports are written in it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(columns: Iterable[Any], *scores: Mapping[str, float | None]) -> list[str]:
    """Of a table: the scores, of each seed, as the columns (`abkd_jax.tasks.Column`) show them."""
    return [column.cell(*(one[column.key] for one in scores)) for column in columns]


def plain(text: str) -> str:
    """The text with Markdown's signs escaped."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in str(text))


def names(listed: Iterable[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in listed)
