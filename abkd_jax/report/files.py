"""What the files of a workdir say of a run."""

import dataclasses
import io
import itertools
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from abkd_jax import figures, files
from abkd_jax.run.log import writer
from abkd_jax.run.workdir import of_seed

USUAL_ORDER = ("teacher", "baseline", "student")  # of the colours


@dataclasses.dataclass(frozen=True)
class Report:
    """What the files of a workdir say; a key that one of them lacks is one sentence when read.

    Attributes:
        config: the resolved config.
        origin: "versions", "commit" and "device".
        result: result.json.
        rows: by phase, the rows of its metrics.jsonl, of each seed.
        examples: the arrays of examples.npz.
    """

    config: Mapping[str, Any]
    origin: Mapping[str, Any]
    result: Mapping[str, Any]
    rows: Mapping[str, list[list[dict[str, Any]]]]
    examples: Mapping[str, np.ndarray]

    @property
    def networks(self) -> Mapping[str, Mapping[str, Any]]:
        """The results of each network, by name."""
        return self.result["networks"]

    @property
    def phases(self) -> list[Mapping[str, Any]]:
        """The phases in order, each with "name", "folder", "learn", "see", "split" and "seeds"."""
        return self.result["phases"]

    def seeds(self, name: str) -> list[Mapping[str, Any]]:
        """The results of a network for each init seed; one, if it was trained once."""
        return self.networks[name].get("seeds") or [self.networks[name]]

    @property
    def has_seeds(self) -> bool:
        """Whether some network was trained for several init seeds."""
        return any(len(self.seeds(name)) > 1 for name in self.networks)

    def history(self, name: str, seed: int = 0) -> tuple[list[dict[str, Any]], list[int]]:
        """The rows of the phases in which a network learned, one phase after the other.

        Args:
            name: of the network.
            seed: which of its init seeds, counted from 0.

        Returns:
            The rows, whose steps are counted from the first of these phases on, and the steps at
            which the later ones begin; nothing for a network that never learned.
        """
        found, borders = [], []
        for phase in self.phases:
            if name in phase["learn"]:
                start = found[-1]["step"] if found else 0
                borders += [start] if found else []
                rows = self.rows[phase["name"]][seed]
                found += [row | {"step": start + row["step"]} for row in rows]
        return found, borders

    @property
    def colours(self) -> dict[str, str]:
        """By network, its colour in every figure; in all runs the same for usual names."""
        usual = () if set(USUAL_ORDER).isdisjoint(self.networks) else USUAL_ORDER
        order = dict.fromkeys((*usual, *self.networks))
        return dict(zip(order, itertools.cycle(figures.COLOURS), strict=False))

    def class_name(self, index: int) -> str:
        """A class's name, or its number where names are not given."""
        names = self.result["class_names"]
        return str(names[index]) if names else str(index)


def load(workdir: Path) -> Report:
    """Reads the files of a run.

    Args:
        workdir: of a run that is done: config.json, result.json, examples.npz, and metrics.jsonl in
            the folder of each phase.

    Returns:
        What they say.

    Raises:
        ValueError: one sentence that names a file that is missing, unreadable or incomplete.
    """
    workdir = files.path_of(workdir)
    names = ("config.json", "result.json", "examples.npz")
    origin, result, examples = (_read(workdir / name) for name in names)
    rows = {
        phase["name"]: [
            writer.read(of_seed(workdir / phase["folder"], seed)) for seed in range(phase["seeds"])
        ]
        for phase in result["phases"]
    }
    return Report(origin["config"], origin, result, rows, examples)


class _Group(dict):
    """An object of a file: where it lacks a key, a sentence names the file and the field."""

    def __init__(self, path: Path, field: str, content: Mapping[str, Any]):
        super().__init__(content)
        self._path, self._field = path, field
        for key, value in content.items():
            if isinstance(value, dict):
                self[key] = _Group(path, f"{field}{key}.", value)

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self._path} lacks {self._field + key!r}.")


def _read(path: Path) -> Mapping[str, Any]:
    """The content of a JSON file, or of a file of arrays."""
    try:
        if path.suffix == ".json":
            return _Group(path, "", dict(json.loads(path.read_text(encoding="utf-8"))))
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return _Group(path, "", dict(arrays))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is missing or unreadable ({error}).") from error
