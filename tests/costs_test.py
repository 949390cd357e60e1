"""The compiler's count, on programs whose cost can be told by hand."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType

from abkd_jax import costs

SIZE = 1024


def mesh(count):
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def of(fn, *shapes, count=1, split=False):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return costs.compiled(fn, *costs.shapes(arrays, mesh(count), split=split))


def test_what_is_read_and_written():
    found = of(lambda x: x + 1.0, (SIZE, SIZE))
    assert found.traffic == pytest.approx(2 * 4 * SIZE**2, rel=1e-3)
    assert found.flops == pytest.approx(SIZE**2, rel=1e-3)
    assert (found.temporaries, found.collectives, found.loops) == (0, {}, 0)


def test_temporaries():
    found = of(lambda x: x @ x @ x, (SIZE, SIZE))
    assert found.temporaries >= 4 * SIZE**2  # the first product


def test_the_body_of_a_loop_counts_once():
    repeated = lambda count: lambda x: jax.lax.fori_loop(0, count, lambda i, x: x @ x, x)  # noqa: E731
    few, many = (of(repeated(count), (SIZE, SIZE)) for count in (3, 300))
    assert few.loops == many.loops == 1
    assert few.flops == many.flops == pytest.approx(2 * SIZE**3, rel=1e-2)


def test_one_device_s_part_and_its_collectives():
    alone, shared = (of(jnp.sum, (SIZE, SIZE), count=n, split=True) for n in (1, 8))
    assert alone.collectives == {} and shared.collectives == {"all-reduce": 1}
    assert shared.flops == pytest.approx(alone.flops / 8, rel=1e-2)
    gathered = of(lambda x: jnp.sort(x, axis=0), (SIZE, SIZE), count=8, split=True)
    assert set(gathered.collectives) <= {"all-gather", "all-to-all", "all-reduce"}
    assert gathered.collectives


def test_arrays_without_axes_are_everywhere():
    tree = {"rows": np.zeros((16, 3)), "number": np.zeros(())}
    placed = costs.shapes(tree, mesh(8), split=True)
    assert placed["rows"].sharding.shard_shape((16, 3)) == (2, 3)
    assert placed["number"].sharding.is_fully_replicated
    assert costs.shapes(tree, mesh(8), split=False)["rows"].sharding.is_fully_replicated
    assert costs.part(mesh(8), 2).size == 2


def test_without_its_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(costs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^libtpu, .* is missing; pip install -e '\.\[tpu\]'\.$"):
        costs.tpu_mesh("v5e:2x4")
