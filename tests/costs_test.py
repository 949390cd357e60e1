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
    types = (AxisType.Auto,) * 2
    return jax.make_mesh((count, 1), ("data", "fsdp"), axis_types=types, devices=devices)


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


def test_memory_of_arguments_and_results():
    found = of(lambda x: (x + 1.0)[0], (SIZE, SIZE))
    assert (found.arguments, found.results) == (4 * SIZE**2, 4 * SIZE)
    assert found.memory == found.arguments + found.results + found.temporaries
    array = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    taken = costs.compiled(lambda x: x + 1.0, array, donate_argnums=0)
    assert (taken.arguments, taken.results) == (4 * SIZE**2, 0)


def test_the_body_of_a_loop_counts_once():
    repeated = lambda count: lambda x: jax.lax.fori_loop(0, count, lambda i, x: x @ x, x)  # noqa: E731
    few, many = (of(repeated(count), (SIZE, SIZE)) for count in (3, 300))
    assert few.loops == many.loops == 1
    assert few.flops == many.flops == pytest.approx(2 * SIZE**3, rel=1e-2)


def test_one_device_s_part_and_its_collectives():
    alone, shared = (of(jnp.sum, (SIZE, SIZE), count=n, split=True) for n in (1, 8))
    assert alone.collectives == {} and shared.collectives == {"all-reduce": 1}
    assert shared.flops == pytest.approx(alone.flops / 8, rel=1e-2)
    assert shared.exchanges == (costs.Exchange("all-reduce", ((),), overlapped=False),)
    columns = of(lambda x: (x.sum(0), x.sum()), (SIZE, SIZE), count=8, split=True)
    assert set(columns.collectives) == {"all-reduce"}
    assert {shape for one in columns.exchanges for shape in one.shapes} == {(SIZE,), ()}
    gathered = of(lambda x: jnp.sort(x, axis=0), (SIZE, SIZE), count=8, split=True)
    assert set(gathered.collectives) <= {"all-gather", "all-to-all", "all-reduce"}
    assert gathered.collectives


_TEXT = """
  %a = f32[8,4]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %b.1 = bf16[8,4]{1,0} all-gather(%q), channel_id=2, frontend_attributes={chain_id="0"}
  %b.2 = bf16[8,4]{1,0} all-gather(%q), channel_id=2, frontend_attributes={chain_id="0"}
  %b.3 = bf16[2,4]{1,0} all-gather(%r), channel_id=3, frontend_attributes={chain_id="12"}
  %c = s32[16]{0} all-gather(%s), frontend_attributes={async_collective_name="all-gather-start.3"}
  %d = (f32[2]{0}, f32[3]{0}) all-reduce-start(%t, %u), channel_id=4
  %e = (f32[2]{0}, f32[3]{0}) all-reduce-done(%d)
  %f = f32[5]{0} all-reduce-start(%v), backend_config={"collective_backend_config":{"is_sync":true}}
"""


def test_what_is_overlapped():
    found = costs.exchanges_of(_TEXT)
    assert [(one.kind, one.shapes, one.overlapped) for one in found] == [
        ("all-gather", ((8, 4),), False),
        ("all-gather", ((8, 4),), True),
        ("all-gather", ((2, 4),), True),
        ("all-gather", ((16,),), True),
        ("all-reduce", ((2,), (3,)), True),
        ("all-reduce", ((5,),), False),
    ]
    told = of(jnp.sum, (SIZE,))._replace(exchanges=found)
    assert told.collectives == {"all-gather": 4, "all-reduce": 2}
    assert told.overlapped == {"all-gather": 3, "all-reduce": 1}


def test_arrays_without_axes_are_everywhere():
    tree = {"rows": np.zeros((16, 3)), "number": np.zeros(())}
    placed = costs.shapes(tree, mesh(8), split=True)
    assert placed["rows"].sharding.shard_shape((16, 3)) == (2, 3)
    assert placed["number"].sharding.is_fully_replicated
    assert costs.shapes(tree, mesh(8), split=False)["rows"].sharding.is_fully_replicated
    assert dict(costs.part(mesh(8), 2).shape) == {"data": 2, "fsdp": 1}
    assert dict(costs.part(mesh(8), 4, fsdp=2).shape) == {"data": 2, "fsdp": 2}


# --- products -----------------------------------------------------------------------------------

ROWS, IN, OUT = 6, 5, 7
PRODUCT = 2 * ROWS * IN * OUT


def product(x, kernel):
    return x @ kernel


def arrays():
    return jnp.ones((ROWS, IN)), jnp.ones((IN, OUT))


def square(x):
    return jnp.tanh(x @ x)


def loss(fn):
    return lambda *args: fn(*args).sum()


@pytest.mark.parametrize(
    "fn,expected",
    [
        (product, PRODUCT),
        (jax.jit(product), PRODUCT),
        (lambda x, k: jnp.einsum("bi,io->ob", x, k), PRODUCT),
        (jax.grad(loss(lambda x, k: jnp.tanh(x @ k)), argnums=1), 2 * PRODUCT),
        (jax.grad(loss(lambda x, k: jnp.tanh(x @ k)), argnums=(0, 1)), 3 * PRODUCT),
        (jax.vmap(lambda x, k: x @ k, in_axes=(0, None)), PRODUCT),
        (lambda x, k: jax.lax.scan(lambda c, _: (c, x @ k), 0, None, length=3), 3 * PRODUCT),
        (lambda x, k: jax.lax.cond(x[0, 0] > 0, product, lambda x, k: x @ k @ k.T @ k, x, k),
         3 * PRODUCT),
        (lambda x, k: jax.lax.map(lambda row: row @ k, x), PRODUCT),
        (lambda x, k: x + 1.0, 0),
    ],
)  # fmt: skip
def test_products_of_matrices(fn, expected):
    assert costs.products(fn, *arrays()) == expected


def test_products_need_shapes_alone():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays()]
    assert costs.products(product, *shapes) == PRODUCT


def test_what_is_computed_again_counts_again():
    x = jnp.ones((4, 4))
    of = lambda f: costs.products(jax.grad(loss(lambda x: square(f(x)))), x)  # noqa: E731
    plain, again = of(square), of(jax.checkpoint(square))
    assert again == plain + 2 * 4**3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_products_of_convolutions(stride, groups):
    """Each gradient takes what the function takes."""
    image, kernel = jnp.ones((3, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def convolved(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), "SAME", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    forward = 2 * (3 * (8 // stride) ** 2 * 6) * (3 * 3 * 4 // groups)
    assert costs.products(convolved, image, kernel) == forward
    both = jax.grad(loss(lambda *x: convolved(*x) ** 2), argnums=(0, 1))
    assert costs.products(both, image, kernel) == 3 * forward


def test_products_on_all_devices():
    spec = jax.sharding.PartitionSpec("data")
    shared = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh(2), in_specs=spec, out_specs=spec, check_vma=False
    )
    assert costs.products(shared, jnp.ones((8, 5))) == 2 * (2 * 4 * 5 * 4)


def test_the_peak_is_that_of_the_device():
    assert costs.peak("cpu") is None and costs.peak("NVIDIA L400") is None
    assert costs.peak("TPU v5 lite") == 197e12 < costs.peak("TPU v5") == 459e12
    assert costs.peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert costs.peak("NVIDIA H100 PCIe") < costs.peak("NVIDIA H100 80GB HBM3")


def test_without_its_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(costs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^libtpu, .* is missing; pip install -e '\.\[tpu\]'\.$"):
        costs.tpu_mesh("v5e:2x4")
