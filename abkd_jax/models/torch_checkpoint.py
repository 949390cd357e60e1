"""Networks of PyTorch by their tensors' names: read from its files, and written as it has them."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from abkd_jax.binding import nearest
from abkd_jax.checks import needed, require
from abkd_jax.types import named_leaves

_LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
_COUNTER = "num_batches_tracked"  # of batch norm, which nothing reads
_WRAPPER = "module."  # before the names in a network that was split over devices
_SHOWN = 4  # tensors that a sentence names


def read_tensors(path: str, *, key: str = "") -> dict[str, np.ndarray]:
    """The tensors of a file by name.

    Args:
        path: of a file of torch.save, which is read with `weights_only=True`, of safetensors or of
            numpy (.npz).
        key: under which they stand in a file of torch.save; "" for the only table of tensors that
            it has. Other files have one table, which needs none.

    Returns:
        {name: array}, without the "module." of a network that was split over devices.

    Raises:
        ValueError: one sentence, if the file cannot be read or has no such table, or what reads it
            is not installed.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"{file} is no file of tensors.")
    alone = file.suffix in (".npz", ".safetensors")
    require(not (alone and key), "key", f"left out for {file}, which has one table", key)
    if file.suffix == ".npz":
        tensors = _of_numpy(file)
    elif file.suffix == ".safetensors":
        tensors = _of_safetensors(file)
    else:
        tensors = _of_torch(file, key)
    return {name.removeprefix(_WRAPPER): x for name, x in tensors.items()}


def from_torch(
    tensors: Mapping[str, np.ndarray], module: Any, own: Mapping[str, Any], *, origin: str
) -> dict[str, Any]:
    """The variables of a network from the tensors that PyTorch has for it.

    Args:
        tensors: by name.
        module: a network with `torch_names`: each network of `models` for images but `mlp`, `cnn`.
        own: its variables or their shapes, {"params": ..., "batch_stats": ...}.
        origin: of the tensors, for messages.

    Returns:
        Variables of the same structure, as arrays of numpy in float32.

    Raises:
        ValueError: one sentence that names the tensors which are missing, left over or of another
            shape.
    """
    wanted = _fitting(_tables(module, own), tensors)
    given = {name for name in tensors if not name.endswith(_COUNTER)}
    missing, left = wanted.keys() - given, given - wanted.keys()
    kind = type(module).__name__
    if missing:
        near = nearest(min(missing), left)
        raise ValueError(f"{origin} lacks {_shown(missing)}, which {kind} has{near}.")
    if left:
        raise ValueError(f"{origin} has {_shown(left)}, for which {kind} has no place.")
    found: dict[str, Any] = {}
    for name, path in wanted.items():
        expected, array = _leaf(own, path), _as_ours(path, np.asarray(tensors[name]))
        shape = _as_theirs(path, np.empty(expected.shape, bool)).shape
        at = f"the tensor {name!r} of {origin}"
        real = np.can_cast(array.dtype, np.float64, "same_kind")  # and no bfloat16 in an npz
        require(real, at, "of real numbers, of a type that the file keeps", array.dtype.name)
        require(array.shape == expected.shape, at, f"of shape {shape}", tensors[name].shape)
        part = found
        for key in path[:-1]:
            part = part.setdefault(key, {})
        part[path[-1]] = array.astype(np.float32)
    return {"params": found["params"], "batch_stats": found.get("batch_stats", {})}


def to_torch(module: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a network as PyTorch has them, by the first of its `torch_names`.

    Args:
        module: see `from_torch`.
        variables: "params" and "batch_stats".

    Returns:
        {name: array}, without the counters of batch norm.
    """
    table = _tables(module, variables)[0]
    return {
        name: _as_theirs(path, np.asarray(_leaf(variables, path))) for name, path in table.items()
    }


def _tables(module: Any, own: Mapping[str, Any]) -> list[dict[str, tuple[str, ...]]]:
    """{name there: path here}, for each of the ways in which PyTorch's codes name the layers."""
    if not hasattr(module, "torch_names"):
        kind = type(module).__name__
        raise ValueError(f"{kind} has no names in PyTorch; give the module a torch_names().")
    parts = {"params": own["params"], "batch_stats": own.get("batch_stats", {})}
    paths = [tuple(path.split(".")) for path in named_leaves(parts)]
    return [{_named(names, path): path for path in paths} for names in module.torch_names()]


def _named(names: Mapping[str, str], path: tuple[str, ...]) -> str:
    collection, *layer, leaf = path
    return f"{names['.'.join(layer)]}.{_LEAVES[collection, leaf]}"


def _fitting(
    tables: list[dict[str, tuple[str, ...]]], tensors: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """The table that has the most names with the tensors in common."""
    return max(tables, key=lambda table: len(table.keys() & tensors.keys()))


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _as_ours(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    """A kernel `[O, I, H, W]` as `[H, W, I, O]`, `[O, I]` as `[I, O]`; the rest as it is."""
    if path[-1] != "kernel":
        return x
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _as_theirs(path: tuple[str, ...], x: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return x
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T)


def _shown(names: set[str]) -> str:
    """A few of them, in words."""
    first = ", ".join(map(repr, sorted(names)[:_SHOWN]))
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the tensors {first}{more}"


def _of_numpy(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # of zip files, headers and objects: several kinds
        raise ValueError(f"{file} cannot be read: {_reason(error)}.") from None


def _of_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    numpy = needed("safetensors.numpy")
    try:
        return numpy.load_file(file)
    except Exception as error:  # of a library in Rust, with an exception of its own
        raise ValueError(f"{file} cannot be read: {_reason(error)}.") from None


def _of_torch(file: pathlib.Path, key: str) -> dict[str, np.ndarray]:
    torch = needed("torch", extra="torch")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler: any
        if other := re.search(r"GLOBAL (\S+) was not an allowed", f"{error}"):
            raise ValueError(
                f"{file} holds {other[1]} beside tensors; save these alone, as "
                "torch.save(content['model'], FILE) does."
            ) from None
        raise ValueError(f"{file} cannot be read by torch.load: {_reason(error)}.") from None

    def is_table(value: Any) -> bool:
        fits = isinstance(value, Mapping) and value
        of_tensors = fits and all(isinstance(x, torch.Tensor) for x in value.values())
        return bool(of_tensors) and all(isinstance(name, str) for name in value)

    tables = {"": content} if is_table(content) else {}
    if isinstance(content, Mapping):
        tables |= {name: value for name, value in content.items() if is_table(value)}
    if not key and "" not in tables and len(tables) == 1:
        (key,) = tables
    expected = f"one of the tables of tensors in {file}, which are {[*tables] or 'none'}"
    require(key in tables, "key", expected, key)
    return {name: x.detach().float().numpy() for name, x in tables[key].items()}


def _reason(error: Exception) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = f"{error}".strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
