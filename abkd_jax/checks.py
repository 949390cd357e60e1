"""The checks of what comes from a person: one clear sentence each."""

from typing import Any


def require(condition: Any, field: str, expected: str, found: Any) -> None:
    """Refuses in one sentence what does not fit.

    Args:
        condition: whether it does.
        field: its name, as the person knows it.
        expected: what it must be, and what to do if that is not clear.
        found: what it is.

    Raises:
        ValueError: if it does not: "FIELD must be EXPECTED; found FOUND."
    """
    if not condition:
        raise ValueError(f"{field} must be {expected}; found {found!r:.80}.")
