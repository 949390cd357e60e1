"""Conversations as text, by the chat template of a tokenizer's folder."""

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from abkd_jax.checks import needed, require

Spans = tuple[tuple[int, int], ...]
"""The first character of each part of a text, and the first after it."""

_TODAY = datetime.datetime(2024, 7, 26)  # for a text to be the same on every day: Llama 3's
_BEGIN, _END = "\ufdd0", "\ufdd1"  # characters that no text may have
_MARKS = {
    rf"\{{%([-+]?)\s*{tag}\s*([-+]?)%\}}": rf"{{%\1 if true %}}{mark}{{% endif \2%}}"
    for tag, mark in (("generation", _BEGIN), ("endgeneration", _END))
}


def conversations(
    template: str, special: Mapping[str, str]
) -> Callable[[Sequence[Mapping[str, Any]]], tuple[str, Spans]]:
    """What renders messages as a text, and says which characters of it the assistant wrote.

    These are what the template has between {% generation %} and {% endgeneration %}, if it has
    these tags, as `transformers` takes them. Otherwise they are what each of the assistant's
    messages adds to the text that asks for it, the mark of its end included. A template that asks
    for the date is told 26 July 2024, as Llama 3's without one: a file is the same text every day.

    Args:
        template: of jinja, which runs in a sandbox.
        special: the tokens that it may name: {"bos_token": "<s>"}.

    Returns:
        A function of messages, each with a "role" and a "content", two strings; it raises a
        ValueError for messages that are none, or that the template cannot render.

    Raises:
        ValueError: if the template is none.
    """
    marked = template
    for pattern, mark in _MARKS.items():
        marked = re.sub(pattern, mark, marked)
    try:
        compiled = _environment().from_string(marked)
    except needed("jinja2").TemplateError as error:
        raise ValueError(f"the chat template is no template of jinja: {error}") from error

    def render(messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=ask, **special)
        except Exception as error:  # a template is a program, which may raise anything
            raise ValueError(f"the chat template fails: {error}") from error

    def conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[str, Spans]:
        _check(messages)
        text = render(messages)
        return _unmarked(text) if marked != template else (text, _turns(messages, text, render))

    return conversation


def _check(messages: Any) -> None:
    turns = isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)
    keys = ("role", "content")
    fits = turns and all(isinstance(turn.get(key), str) for turn in messages for key in keys)
    expected = "a list of messages, each with the strings role and content"
    require(fits, "messages", expected, messages)
    roles = [turn["role"] for turn in messages]
    require("assistant" in roles, "the roles of messages", "'assistant' somewhere", roles)


def _unmarked(text: str) -> tuple[str, Spans]:
    """The text without marks, and what stood between them."""
    parts = re.split(f"([{_BEGIN}{_END}])", text)
    found, length, bounds = [], 0, []
    for part in parts:
        if part in (_BEGIN, _END):
            bounds.append(length)
        else:
            found.append(part)
            length += len(part)
    return "".join(found), tuple(zip(bounds[::2], bounds[1::2], strict=True))


def _turns(messages: Sequence[Mapping[str, Any]], text: str, render: Callable[..., str]) -> Spans:
    """What the assistant's messages add to a text."""
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before, after = render(messages[:index], ask=True), render(messages[: index + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"the chat template renders messages[{index}] otherwise when others follow, or "
                "without the beginning that asks for it; put {% generation %} and "
                "{% endgeneration %} around what the assistant writes."
            )
        spans.append((len(before), len(after.rstrip())))
    return tuple(spans)


def _environment() -> Any:
    """What templates are given, as those of `transformers` expect it."""
    sandbox = needed("jinja2.sandbox")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **how)

    today = lambda form: _TODAY.strftime(form)  # noqa: E731
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": today}
    return environment
