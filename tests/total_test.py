"""`chunked_total` is `total`: value, metrics and every gradient, without the logits."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax.divergences import alpha_beta
from abkd_jax.losses import chunked_total, cross_entropy, on_logits, total
from abkd_jax.types import Batch, Outputs, Term, bind

SHAPE, D, E, V = (3, 7), 8, 5, 53


def normal(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


STUDENT = (normal(*SHAPE, D, seed=0), normal(D, V, seed=1), normal(V, seed=2))
NUMBERS = tuple(map(jnp.asarray, (0.8, 0.3, 1.5, 2.0)))  # alpha, beta, temperature, weight
TEACHER = Outputs(hidden=normal(*SHAPE, E, seed=3), unembedding=normal(E, V, seed=4))
WHERE = jax.random.bernoulli(jax.random.key(5), 0.7, SHAPE)
BATCH = {
    "labels": jax.random.randint(jax.random.key(6), SHAPE, 0, V),
    "where": WHERE,
    "labelled": WHERE & (jnp.arange(SHAPE[1]) > 2),
    "inputs": jnp.zeros((3, 2)),
    "key": jax.random.key(7),
}


def terms(alpha, beta, temperature, weight):
    divergence = bind(alpha_beta, alpha=alpha, beta=beta)
    distill = bind(on_logits, divergence=divergence, temperature=temperature)
    return {
        "distill": Term(distill, weight),
        "task": Term(bind(cross_entropy), jnp.asarray(0.3), "labelled"),
    }


def whole(hidden, unembedding, bias, *numbers):
    student = Outputs(logits=hidden @ unembedding + bias)
    teacher = Outputs(logits=TEACHER.hidden @ TEACHER.unembedding)
    return total(terms(*numbers), student, {"teacher": teacher}, BATCH)


def chunked(chunk, teacher=TEACHER):
    def loss(hidden, unembedding, bias, *numbers):
        student = Outputs(hidden=hidden, unembedding=unembedding, bias=bias)
        others = {"teacher": teacher}
        return chunked_total(terms(*numbers), student, others, BATCH, chunk=chunk)

    return loss


def gradients(loss):
    arguments = STUDENT + NUMBERS
    return jax.jit(jax.value_and_grad(loss, argnums=range(len(arguments)), has_aux=True))(
        *arguments
    )


@pytest.mark.parametrize("chunk", [1, 4, 21, 64])
def test_chunks_equal_the_whole(chunk):
    expected, found = gradients(whole), gradients(chunked(chunk))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), expected, found
    )
    value, means = chunked(chunk)(*STUDENT, *NUMBERS)
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-5)
    assert set(means) == {"distill", "task"}


def test_cached_teacher_logits_serve_as_well():
    cached = Outputs(logits=TEACHER.hidden @ TEACHER.unembedding)
    expected, found = gradients(chunked(4)), gradients(chunked(4, cached))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found
    )


@pytest.mark.parametrize("filling", [jnp.nan, jnp.inf, 3e38])
def test_masked_tokens_may_be_nan_or_infinite(filling):
    """Neither the value nor any gradient sees them, that of the shared matrix least of all."""
    out = ~BATCH["where"]
    fill = lambda x: jnp.where(out[..., None], filling, x)  # noqa: E731
    expected = gradients(chunked(4))
    teacher = TEACHER.replace(hidden=fill(TEACHER.hidden))
    arguments = fill(STUDENT[0]), *STUDENT[1:], *NUMBERS
    of_all = jax.value_and_grad(chunked(4, teacher), argnums=range(7), has_aux=True)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(of_all)(*arguments), expected)


def test_the_cotangent_scales():
    gradient = jax.grad(lambda hidden: -3.0 * chunked(4)(hidden, *STUDENT[1:], *NUMBERS)[0])
    expected = jax.grad(lambda hidden: -3.0 * whole(hidden, *STUDENT[1:], *NUMBERS)[0])
    np.testing.assert_allclose(gradient(STUDENT[0]), expected(STUDENT[0]), rtol=2e-5, atol=1e-6)


def test_the_logits_of_all_tokens_never_exist():
    """The compiled program's temporary memory is that of a chunk's arrays, not of all tokens'."""
    tokens, vocabulary, chunk = 512, 4096, 16
    hidden, unembedding = jnp.zeros((tokens, D)), jnp.zeros((D, vocabulary))
    batch = {name: jnp.ones(tokens, bool) for name in ("where", "labelled")}
    batch["labels"] = jnp.zeros(tokens, int)

    def temporary(loss):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def dense(hidden, unembedding):
        outputs = Outputs(logits=hidden @ unembedding)
        return total(terms(*NUMBERS), outputs, {"teacher": outputs}, batch)[0]

    def in_chunks(hidden, unembedding):
        outputs = Outputs(hidden=hidden, unembedding=unembedding)
        others = {"teacher": outputs}
        return chunked_total(terms(*NUMBERS), outputs, others, batch, chunk=chunk)[0]

    assert temporary(in_chunks) < temporary(dense) / 10
    assert temporary(in_chunks) < tokens * vocabulary * 4


def test_refusals():
    def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return jnp.sum(student.logits, -1)

    coupled.couples_batch = True
    shared = {"shared": Term(bind(coupled), jnp.ones(()))}
    student = Outputs(hidden=STUDENT[0], unembedding=STUDENT[1])
    with pytest.raises(ValueError, match=r"^term 'shared' couples the examples of a batch"):
        chunked_total(shared, student, {"teacher": TEACHER}, BATCH, chunk=4)
    with pytest.raises(ValueError, match=r"^teacher must show logits, or hidden and unembedding"):
        chunked_total(terms(*NUMBERS), student, {"teacher": Outputs()}, BATCH, chunk=4)
