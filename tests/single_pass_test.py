"""`single_pass`: the kernel, interpreted, against the divergence itself; and where it lowers."""

import functools
import importlib.util
import math

import jax
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from abkd_jax import bind, costs, divergences
from abkd_jax.binding import at_step, schedule
from abkd_jax.config.build import Builder
from abkd_jax.divergences import alpha_beta, forward_kl, single_pass, tempered
from abkd_jax.losses import on_logits, total
from abkd_jax.schedules import linear
from abkd_jax.types import Head, Outputs, Term

ROWS, CLASSES = 19, 200  # neither a multiple of a register's
INF = np.inf
KL = dict(divergence=forward_kl)
AB = bind(alpha_beta, alpha=0.8, beta=0.3)
FAMILY = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jensen_shannon": dict(teacher_weight=0.3),
    "skew_forward_kl": dict(skew=0.1),
    "skew_reverse_kl": dict(skew=0.1),
    "total_variation": {},
    "hellinger": {},
    "chi_squared": {},
    "renyi": dict(order=2.0),
    "alpha_beta": dict(alpha=0.8, beta=0.3),
    "alpha_divergence": dict(alpha=0.5),
    "beta_divergence": dict(beta=0.5),
    "alphanet": {},
    "logit_mse": {},
    "tempered": dict(divergence=AB, temperature=3.0),
    "standardized": KL,
    "powered": KL | dict(teacher_power=0.4),
    "prior_shifted": KL | dict(log_prior=0.0),
}
OTHERS = {  # which sort or gather
    "adaptive_kl": {},
    "top_k": KL | dict(k=5),
    "top_k_dropped": KL | dict(k=5),
    "top_k_renormalised": KL | dict(k=5),
}
of_family = pytest.mark.parametrize("name", FAMILY)


def one(name):
    return bind(getattr(divergences, name), **(FAMILY | OTHERS)[name])


def passed(divergence, **options):
    return bind(single_pass, divergence=divergence, **(dict(interpret=True) | options))


def draw(dtype=np.float32, shape=(ROWS, CLASSES), seed=0):
    student, teacher = 2 * np.random.default_rng(seed).normal(size=(2, *shape))
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


def hard():
    """Rows with gaps of 1e4, equal rows, and classes that one side lacks, or both."""
    student, teacher = map(np.array, draw())
    student[0] *= 1e4
    teacher[1] *= 1e4
    student[2] = teacher[2]
    student[:, 7] = teacher[:, 7] = -INF
    student[3, 9], teacher[4, 10] = -INF, -INF
    student[5], teacher[5] = -INF, -INF
    return student, teacher


@jax.jit
def evaluate(divergence, student, teacher):
    """Values, and the student's gradient with weights that differ by row."""

    def weighted(student):
        values = divergence(student, teacher)
        return jnp.vdot(1.0 + jnp.arange(values.size), values.reshape(-1)), values

    (_, values), gradient = jax.value_and_grad(weighted, has_aux=True)(student)
    return values, gradient


def has_kernel(fn, *args):
    return "pallas_call" in str(jax.make_jaxpr(fn)(*args))


def assert_same(found, expected, rtol=3e-6):
    (values, gradient), (true_values, true_gradient) = found, expected
    assert values.dtype == true_values.dtype and gradient.dtype == true_gradient.dtype
    np.testing.assert_allclose(values, true_values, rtol=rtol, atol=1e-7)
    gradient, true_gradient = (np.asarray(x, np.float32) for x in (gradient, true_gradient))
    scale = np.abs(true_gradient).max(axis=-1, keepdims=True)
    assert np.all(np.abs(gradient - true_gradient) <= rtol * scale + 1e-7)


# --- the same function --------------------------------------------------------------------------


@of_family
def test_it_is_the_divergence(name):
    """One compilation each way: in the last block there are fewer rows than in the others."""
    plain, logits = one(name), hard()
    assert has_kernel(passed(plain), *logits)
    assert_same(evaluate(passed(plain), *logits), evaluate(plain, *logits))


@pytest.mark.parametrize("rows", [1, 700])
def test_any_number_of_rows(rows):
    """A part of one block, and several with a ragged one at the end."""
    logits = draw(shape=(rows, CLASSES))
    assert_same(evaluate(passed(forward_kl), *logits), evaluate(bind(forward_kl), *logits))


def test_values_alone_take_no_gradient():
    logits = draw()
    values = jax.jit(passed(AB).__call__)(*logits)
    np.testing.assert_allclose(values, AB(*logits), rtol=1e-6)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_sixteen_bits_are_computed_in_float32(dtypes):
    logits = [x.astype(dtype) for x, dtype in zip(draw(), dtypes, strict=True)]
    found, expected = evaluate(passed(AB), *logits), evaluate(AB, *logits)
    assert found[0].dtype == jnp.float32 and found[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    wide = (np.asarray(x[1], np.float32) for x in (found, expected))
    np.testing.assert_allclose(*wide, rtol=2.0**-6, atol=1e-6)  # rounded before it is weighted


def test_leading_axes_and_vmap():
    logits = draw(shape=(3, 5, CLASSES))
    assert_same(evaluate(passed(AB), *logits), evaluate(AB, *logits))
    row = jax.jit(jax.vmap(evaluate, in_axes=(None, 0, None)))
    assert_same(row(passed(AB), logits[0], logits[1][0]), row(AB, logits[0], logits[1][0]))


def test_a_sweep_over_its_numbers_is_one_compilation():
    logits, alphas = draw(), jnp.array([0.2, 0.8, 1.0])

    def member(make, alpha):
        return evaluate(make(bind(alpha_beta, alpha=alpha, beta=0.3)), *logits)

    swept, plain = (jax.jit(jax.vmap(functools.partial(member, x))) for x in (passed, bind))
    assert has_kernel(swept, alphas)
    assert_same(swept(alphas), plain(alphas))
    before = evaluate._cache_size()
    for alpha in alphas:
        evaluate(passed(bind(alpha_beta, alpha=alpha, beta=0.3)), *logits)
    assert evaluate._cache_size() <= before + 1


def test_other_derivatives_are_the_divergences_own():
    """In the teacher, in the numbers, second ones, and in forward mode."""
    student, teacher = draw(shape=(3, 130))
    loss = lambda divergence, s, t: jnp.sum(jnp.sin(1 + divergence(s, t)))  # noqa: E731
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    found, expected = (gradient(d, student, teacher) for d in (passed(AB), AB))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    rng = np.random.default_rng(1)
    along = tuple(jnp.asarray(rng.normal(size=student.shape), np.float32) for _ in range(2))

    @jax.jit
    def forward(divergence):
        first = jax.jvp(lambda s: loss(divergence, s, teacher), (student,), along[:1])
        slopes = lambda s: jax.grad(loss, argnums=1)(divergence, s, teacher)  # noqa: E731
        return *first, *jax.jvp(slopes, (student,), along[:1])

    for x, y in zip(forward(passed(AB)), forward(AB), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


# --- where it is the plain function -------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_what_sorts_or_gathers_has_no_kernel(name):
    plain, logits = one(name), draw(shape=(4, 300))
    assert not has_kernel(passed(plain), *logits)
    assert_same(evaluate(passed(plain), *logits), evaluate(plain, *logits), rtol=0)


@pytest.mark.parametrize(
    "divergence,logits",
    [
        pytest.param(AB, draw(shape=(4, 127)), id="few classes"),
        pytest.param(forward_kl, draw(shape=(1, 160_000)), id="more than fit"),
        pytest.param(AB, draw(np.float16), id="float16"),
        pytest.param(AB, (draw()[0], draw()[1][0]), id="one teacher's row for all"),
        pytest.param(AB, draw(shape=(0, CLASSES)), id="no rows"),
        pytest.param(
            bind(alpha_beta, alpha=np.linspace(0, 1, ROWS), beta=0.3), draw(), id="numbers by row"
        ),
        pytest.param(lambda s, t: AB(s, t) + jnp.ones(ROWS), draw(), id="an array beside"),
    ],
)
def test_other_shapes_have_no_kernel(divergence, logits):
    assert not has_kernel(passed(divergence), *logits)
    np.testing.assert_array_equal(passed(divergence)(*logits), divergence(*logits))


def test_float64_has_no_kernel():
    with jax.enable_x64(True):
        logits = draw(np.float64)
        assert not has_kernel(passed(AB), *logits)
        assert passed(AB)(*logits).dtype == np.float64


def test_without_a_tpu_there_is_no_kernel():
    assert not has_kernel(passed(AB, interpret=False), *draw())


def test_other_classes_are_refused_as_by_the_divergence():
    student, teacher = draw()
    with pytest.raises(AssertionError, match="of the same number of classes"):
        passed(AB)(student, teacher[:, 1:])


# --- among other functions ----------------------------------------------------------------------


def test_a_temperature_goes_inside():
    """The kernel reads the logits as they come: no tempered copy is made before it."""
    logits = [x.astype(jnp.bfloat16) for x in draw()]
    outside = bind(tempered, divergence=passed(AB), temperature=3.0)
    inside = passed(bind(tempered, divergence=AB, temperature=3.0))
    for x, y in zip(evaluate(outside, *logits), evaluate(inside, *logits), strict=True):
        np.testing.assert_array_equal(x, y)
    assert str(jax.make_jaxpr(outside)(*logits)) == str(jax.make_jaxpr(inside)(*logits))
    of_row = bind(tempered, divergence=passed(AB), temperature=np.linspace(1, 3, ROWS))
    plain = bind(tempered, divergence=AB, temperature=np.linspace(1, 3, ROWS))
    np.testing.assert_allclose(of_row(*logits), plain(*logits), rtol=1e-6)


def test_a_config_has_it_as_any_combinator():
    ramp = dict(fn="linear", start=1.0, end=0.5)
    group = dict(fn="alpha_beta", alpha=ramp, beta=0.3)
    around = dict(fn="single_pass", divergence=group, interpret=True)
    logits = dict(zip(("student", "teacher"), draw(), strict=True))
    outputs = {name: Outputs(logits=x) for name, x in logits.items()}
    where = jnp.arange(ROWS) % 3 > 0
    options = dict(field="student.terms", learner="student", networks=("student", "teacher"))

    @jax.jit
    def value_and_gradient(terms, student, step):
        shown = outputs["student"].replace(logits=student)
        return total(at_step(terms, step), shown, outputs, {"where": where})[0]

    found = []
    for divergence in (around, group):
        distill = dict(fn="on_logits", weight=2.0, temperature=2.0, divergence=divergence)
        terms = Builder(num_steps=100).objective(dict(distill=distill), **options)
        step = jax.jit(jax.value_and_grad(value_and_gradient, argnums=1))
        found.append(step(terms, logits["student"], 50))
    (value, gradient), (true_value, true_gradient) = found
    np.testing.assert_allclose(value, true_value, rtol=1e-6)
    np.testing.assert_allclose(gradient, true_gradient, rtol=1e-4, atol=1e-7)
    assert not np.any(gradient[~where])


def test_in_chunks_of_a_vocabulary():
    rng = np.random.default_rng(0)
    arrays = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 9, 8), (8, 130)] * 2)
    hidden, head, other_hidden, other_head = arrays
    teacher = Outputs(hidden=jnp.asarray(other_hidden), head=Head(jnp.asarray(other_head)))
    where = jnp.arange(18).reshape(2, 9) % 4 > 0

    def loss(divergence, hidden, head):
        alpha = schedule(linear, start=1.0, end=0.5, steps=10)
        bound = bind(on_logits, divergence=divergence(alpha), temperature=2.0)
        terms = at_step({"distill": Term(bound, 1.0, other="teacher")}, 4)
        student = Outputs(hidden=hidden, head=Head(head))
        return total(terms, student, {"teacher": teacher}, {"where": where}, chunk=4)[0]

    plain = lambda alpha: bind(alpha_beta, alpha=alpha, beta=0.3)  # noqa: E731
    kernel = lambda alpha: passed(plain(alpha))  # noqa: E731
    gradient = lambda make: jax.value_and_grad(functools.partial(loss, make), argnums=(0, 1))  # noqa: E731
    assert has_kernel(gradient(kernel), hidden, head)
    found, expected = (jax.jit(gradient(x))(hidden, head) for x in (kernel, plain))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


# --- for devices that are not here --------------------------------------------------------------


def mesh_of(kind, *sizes):
    device = AbstractDevice(device_kind=kind, platform="tpu", num_cores=1)
    names = ("data", "fsdp")[: len(sizes)]
    auto = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, names, axis_types=auto, abstract_device=device)


def exported(divergence, platform, *, kind="TPU v5e", rows=16):
    """Value and gradient as a program for a platform, in StableHLO."""
    fn = jax.jit(
        jax.value_and_grad(lambda s, t: jnp.sum(passed(divergence, interpret=False)(s, t)))
    )
    logits = (jax.ShapeDtypeStruct((rows, 1000), jnp.bfloat16),) * 2
    with jax.sharding.use_abstract_mesh(mesh_of(kind, 1)):
        return export.export(fn, platforms=[platform])(*logits).mlir_module()


@pytest.mark.long
@of_family
def test_it_lowers_for_a_tpu(name):
    assert exported(one(name), "tpu").count("tpu_custom_call") == 1


@pytest.mark.parametrize(
    "platform,kind", [("cuda", "TPU v5e"), ("cpu", "TPU v5e"), ("tpu", "TPU v4")]
)
def test_it_lowers_as_the_plain_function_elsewhere(platform, kind):
    """A v4 has no room for a block."""
    assert "tpu_custom_call" not in exported(AB, platform, kind=kind)


@pytest.mark.parametrize("rows,calls", [(16, True), (12, False)])
def test_each_chip_of_a_mesh_has_its_own_rows(rows, calls):
    """If they split evenly."""
    logits = (jax.ShapeDtypeStruct((rows, 256), jnp.float32),) * 2
    with jax.sharding.use_abstract_mesh(mesh_of("TPU v6 lite", 4, 2)):
        text = str(jax.make_jaxpr(passed(AB, interpret=False))(*logits))
    assert ("shard_map" in text) == ("pallas_call" in text) == calls
    assert not calls or f"f32[{rows // 8},256]" in text


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (4, 2)])
def test_inside_of_shard_map_a_chip_is_alone(sizes):
    """One after the other: the trace of a block is none of its mesh."""
    rows = PartitionSpec(("data", "fsdp"))
    gradient = jax.grad(lambda s, t: jnp.sum(passed(AB, interpret=False)(s, t)))
    specs = dict(mesh=mesh_of("TPU v5e", *sizes), in_specs=(rows, rows), out_specs=rows)
    on_each = jax.shard_map(gradient, check_vma=False, **specs)
    logits = (jax.ShapeDtypeStruct((8 * math.prod(sizes), 256), jnp.float32),) * 2
    assert has_kernel(on_each, *logits)


@pytest.mark.parametrize("kind,fits", [("TPU v5 lite", True), ("TPU v5p", False)])
def test_a_vocabulary_fits_or_not(kind, fits):
    logits = (jax.ShapeDtypeStruct((8, 128_256), jnp.bfloat16),) * 2
    with jax.sharding.use_abstract_mesh(mesh_of(kind, 1)):
        assert has_kernel(passed(forward_kl, interpret=False), *logits) == fits


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is the compiler: pip install -e '.[tpu]'",
)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4"])
@pytest.mark.parametrize("chips", [1, 8])
@pytest.mark.parametrize("rows,classes", [(1024, 32_000), (128, 128_256)])
def test_a_tpus_compiler_moves_little_more_than_the_least(topology, chips, rows, classes):
    """Both logits read once, one gradient written once: what the kernel moves and what XLA adds."""
    mesh = costs.part(costs.tpu_mesh(topology), chips)
    logits = costs.shapes(
        (jax.ShapeDtypeStruct((rows, classes), jnp.bfloat16),) * 2, mesh, split=True
    )
    loss = lambda s, t: jnp.sum(passed(AB, interpret=False)(s, t))  # noqa: E731
    found = costs.compiled(jax.value_and_grad(loss), *logits)
    least = 3 * rows * classes * 2 / chips
    assert least <= found.traffic < 1.05 * least
    assert found.temporaries < 0.01 * least
