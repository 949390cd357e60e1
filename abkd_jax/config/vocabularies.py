"""Whether the networks of a config and its data have one vocabulary."""

import pathlib
from collections.abc import Mapping
from typing import Any

from abkd_jax.config.plan import network_groups
from abkd_jax.data import compare_vocabularies

_FOLDERS = "hugging_face"  # the model, and the weights, that have a folder
_OF_DATA = {"topics": "bytes"}  # the tokenizer of data that do not name theirs


def check_vocabularies(config: Mapping[str, Any]) -> None:
    """Refuses folders whose tokenizer is another than that of the data, or of another network.

    The networks of one tokenizer may differ by rows of padding, which take no part. Folders without
    a tokenizer are not judged.

    Args:
        config: of a run, whose groups have been built.

    Raises:
        ValueError: one sentence, with the number of tokens that are the same.
    """
    data = config.get("data", {})
    named = {"data.tokenizer": data.get("tokenizer") or _OF_DATA.get(data.get("fn"), "")}
    for name, group in network_groups(config).items():
        for part in ("model", "weights"):
            own = group.get(part) or {}
            if own.get("fn") == _FOLDERS and _has_tokenizer(own["folder"]):
                named[f"{name}.{part}.folder"] = own["folder"]
    named = {field: folder for field, folder in named.items() if folder}
    for other, folder in named.items():
        field, first = next(iter(named.items()))
        if folder == first:
            continue
        found = compare_vocabularies(first, folder)
        if not found.same:
            raise ValueError(
                f"{other} must have the tokenizer of {field}, {found.sizes[0]:,} tokens of "
                f"{first!r}; found {found.sizes[1]:,} tokens of {folder!r}, of which "
                f"{found.shared:,} are the same with the same id."
            )


def _has_tokenizer(folder: str) -> bool:
    files = ("tokenizer.json", "vocab.json")
    return any(pathlib.Path(folder, file).is_file() for file in files)
