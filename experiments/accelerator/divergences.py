"""Value and student gradient of the divergences, against the textbook's formulas."""

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from abkd_jax import bind, divergences, markdown, timing
from experiments.accelerator import textbook, torch_peers
from experiments.accelerator.rows import Part, Row

_SHAPES = ((4096, 1000, "float32"), (64, 32_000, "float32"), (8192, 128_256, "bfloat16"))
_TINY = ((4, 16, "bfloat16"),)
_NUMBERS = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jensen_shannon": {"teacher_weight": 0.5},
    "alpha_beta": {"alpha": 0.8, "beta": 0.3},
    "skew_forward_kl": {"skew": 0.1},
    "adaptive_kl": {"head_mass": 0.5},
}
_OURS, _TEXTBOOK, _COPY = "abkd_jax", "JAX, textbook", "copy"
_QUEUED = 20  # short calls, of which one starts while the device works on another
_QUEUED_CLASSES = 2**28  # of all queued calls together
_CACHES = 2**28  # bytes, more than caches hold
_ARRAYS = 12  # of the logits' size, in float32, that a formula without fusion holds at once
_CLOSE = 0.02  # relative: of values that are one divergence, and of their gradients' norms


def part(*, small: bool) -> Part:
    """The rows of the bandwidth, and of each divergence at each shape."""
    rows = [_copy(small)]
    for shape in _TINY if small else _SHAPES:
        rows += [_row(name, shape, small) for name in _NUMBERS]
    absent = "; ".join(f"{k}: {v}" for k, v in torch_peers.absent(small=small).items())
    text = (
        "Value and student gradient of the batch mean, a call, on one device. The least traffic "
        "is both logits read once and one gradient written; 'of the limit' is the time that this "
        "takes at the bandwidth of the copy, over the median. On accelerators up to "
        f"{_QUEUED} calls are queued before the last one's result is waited for. Calls go round "
        f"among logits of {_CACHES >> 20} MiB, which no cache holds. JAX and torch share the "
        "device's memory.\n\n"
        f"Skipped peers: {absent or 'none'}."
    )
    return Part("Divergences", text, rows, _table)


def _copy(small: bool) -> Row:
    """An array read and another one written."""
    size = 2**10 if small else 2**26 if jax.default_backend() == "cpu" else 2**28

    def make():
        source, negative = jnp.ones(size), jax.jit(jnp.negative)
        return lambda: negative(source)

    facts = {"bytes": 2 * 4 * size}
    return Row(f"a copy of {4 * size:,} bytes", lambda: {_COPY: make}, facts, turn=_turn(small))


def _row(name: str, shape: tuple[int, int, str], small: bool) -> Row:
    """A divergence at a shape."""
    batch, classes, dtype = shape
    size = batch * classes
    facts = {"shape": f"{batch:,} x {classes:,} {dtype}", "divergence": name}
    facts |= {"bytes": 3 * size * jnp.dtype(dtype).itemsize}
    facts["queued"] = 1
    if jax.default_backend() != "cpu":
        facts["queued"] = max(1, min(_QUEUED, _QUEUED_CLASSES // size))
    arms = functools.partial(_arms, name, shape, facts["queued"], small)
    return Row(f"{name}, {facts['shape']}", arms, facts, turn=_turn(small))


def _turn(small: bool) -> float:
    return 0.0 if small else 0.1


def _arms(
    name: str, shape: tuple[int, int, str], queued: int, small: bool
) -> dict[str, Callable[[], Callable[[], Any]]]:
    *shape, dtype = shape
    _check_memory(math.prod(shape))
    numbers, inputs = _NUMBERS[name], _inputs(shape, dtype, small)
    bound = bind(getattr(divergences, name), **numbers)

    def ours(s, t, divergence):
        return jnp.mean(divergence(s, t))

    def formula(s, t, numbers):
        s, t = s.astype(jnp.float32), t.astype(jnp.float32)
        return textbook.mean_divergence(textbook.JAX, name, s, t, **numbers)

    def jitted(function, numbers):
        compiled, around = jax.jit(jax.value_and_grad(function)), itertools.cycle(inputs)
        return lambda: compiled(*next(around), numbers)

    makers = {
        _OURS: lambda: jitted(ours, bound),
        _TEXTBOOK: lambda: jitted(formula, jax.tree.map(jnp.asarray, numbers)),
    }
    absent = torch_peers.absent(small=small)
    expected = functools.cache(lambda: _summary(makers[_OURS]()))

    def checked(make, wait):
        call = make()
        _check(_summary(call), expected())
        return _in_queue(call, queued, wait)

    found = {k: functools.partial(checked, make, lambda: None) for k, make in makers.items()}
    if "torch" not in absent:
        peers = torch_peers.arms(name, inputs, numbers)
        peers = {peer: make for peer, make in peers.items() if peer not in absent}
        found |= {k: functools.partial(checked, m, torch_peers.wait) for k, m in peers.items()}
    return found


def _inputs(shape: list[int], dtype: str, small: bool) -> list[tuple[jax.Array, jax.Array]]:
    """The students' and the teachers' logits, more than caches hold."""
    draw = jax.jit(lambda key: 2 * jax.random.normal(key, shape, dtype))
    count = 2 if small else -(-_CACHES // (2 * math.prod(shape) * jnp.dtype(dtype).itemsize))
    return [tuple(map(draw, keys)) for keys in jax.random.split(jax.random.key(0), (count, 2))]


def _check_memory(size: int) -> None:
    """Whether a CPU has room for the textbook's arrays: it would end processes, not say no."""
    needed, free = 4 * size * _ARRAYS, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if jax.default_backend() == "cpu" and needed > free:
        raise MemoryError(f"takes about {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free")


def _in_queue(call: Callable[[], Any], count: int, wait: Callable[[], None]) -> Callable[[], Any]:
    """A call that makes so many, one after the other."""

    def calls():
        for _ in range(count):
            result = call()
        wait()
        return result

    return calls


def _summary(call: Callable[[], tuple[Any, Any]]) -> tuple[float, float]:
    """The value, and the norm of the gradient."""
    value, gradient = call()
    if isinstance(gradient, jax.Array):
        return float(value), float(jnp.linalg.norm(gradient.astype(jnp.float32)))
    return float(value), math.sqrt(float((gradient.float() ** 2).sum()))


def _check(found: tuple[float, float], expected: tuple[float, float]) -> None:
    """Whether it is the same divergence, before its time is told."""
    if not np.allclose(found, expected, rtol=_CLOSE):
        found, expected = ("{:.4g} (gradient {:.4g})".format(*x) for x in (found, expected))
        raise ValueError(f"gives {found} where {_OURS} gives {expected}")


def _table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each arm of each row, after one for the bandwidth."""
    header = ("divergence", "shape", "", "us", "of the limit %", "x as long as abkd_jax", "rounds")
    lines, bandwidth = [], None
    for row in found.values():
        facts, seconds = row["facts"], row["seconds"]
        ours = np.asarray(seconds.get(_OURS, [np.nan]))
        for arm, times in seconds.items():
            each, moved = np.asarray(times) / facts.get("queued", 1), facts["bytes"]
            us = timing.quartiles(1e6 * each, ",.1f")
            if arm == _COPY:
                bandwidth = moved / np.median(each)
                shape = f"{moved / 2:,.0f} bytes, {bandwidth / 1e9:,.1f} GB/s"
                lines.append((_COPY, shape, "", us, "", "", f"{len(times)}"))
                continue
            share = 100 * moved / bandwidth / np.median(each) if bandwidth else np.nan
            ratio = np.median(times / ours) if len(times) == len(ours) else np.nan
            numbers = us, f"{share:.0f}", f"{ratio:.2f}", f"{len(times)}"
            lines.append((facts["divergence"], facts["shape"], arm, *numbers))
        for arm, reason in row["failed"].items():
            names = facts.get("divergence", _COPY), facts.get("shape", "")
            lines.append((*names, arm, f"failed: {markdown.plain(reason)}", "", "", ""))
    return markdown.table(header, lines)
