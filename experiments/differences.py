"""Where reference codes differ from their papers, and by how much on one fixed batch.

    python -m experiments.differences

The library implements the papers. Each row compares its loss with what a published code computes:
both values of the batch mean, the ratio of the norms of the student's gradients (code / paper), and
the cosine between them. The codes' formulas are written out here in their own terms.
"""

import itertools
from collections.abc import Callable

import jax
import numpy as np
from jax import Array, nn
from jax import numpy as jnp

from abkd_jax import Outputs, alpha_beta, analysis, bind, divergences, forward_kl, losses, numerics
from abkd_jax.config import command

_BATCH, _CLASSES = 64, 100


def main() -> None:
    """Prints the table."""
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, _CLASSES, _BATCH))
    of_label = 6.0 * nn.one_hot(labels, _CLASSES)
    student, teacher = (
        jnp.asarray(2.0 * rng.normal(size=(_BATCH, _CLASSES)) + scale * of_label, jnp.float32)
        for scale in (0.5, 1.0)
    )
    print(f"{_BATCH} examples, {_CLASSES} classes; code / paper: ratio of gradient norms, cosine")
    print(f"{'':46}{'paper':>12}{'code':>12}{'ratio':>10}{'cosine':>8}")
    for name, paper, code in _rows(labels):
        (a, slope_a), (b, slope_b) = (
            jax.value_and_grad(fn)(student, teacher) for fn in (paper, code)
        )
        ratio = jnp.linalg.norm(slope_b) / jnp.linalg.norm(slope_a)
        cosine = analysis.tree_cosine(slope_a, slope_b)
        print(f"{name:46}{a:>12.4g}{b:>12.4g}{ratio:>10.3g}{cosine:>8.3f}")


def _rows(labels: Array) -> list[tuple[str, Callable, Callable]]:
    """(what differs, the paper's batch loss, the code's), of student and teacher logits."""
    batch = {"labels": labels, "where": jnp.ones(len(labels), bool)}

    kd = bind(losses.on_logits, divergence=forward_kl, temperature=4.0)
    kl = dict(target_divergence=forward_kl, rest_divergence=forward_kl)
    dkd = bind(losses.dkd, **kl, target_weight=1.0, rest_weight=2.0, temperature=4.0)
    er = bind(losses.entropy_weighted, loss=dkd, temperature=4.0)
    ea = bind(losses.entropy_aware, loss=kd, temperature=3.0)
    skew = bind(losses.on_logits, divergence=bind(divergences.skew_forward_kl, skew=0.1))
    grams = bind(losses.gram, batch_weight=1.0, class_weight=1.0, temperature=4.0)
    per_example = lambda loss: lambda s, t: loss(Outputs(logits=s), Outputs(logits=t), batch)  # noqa: E731
    mean = lambda loss: lambda s, t: jnp.mean(per_example(loss)(s, t))  # noqa: E731

    def er_dkd(s, t):  # [B] times [B, 1] is [B, B]: the mean of a product becomes one of means
        return jnp.mean(numerics.entropy(t / 4.0)[:, None] * per_example(dkd)(s, t)[None])

    def ea_kd(s, t):  # 100 where the paper has ln 100
        of_student = jax.lax.stop_gradient(numerics.entropy(s / 3.0))
        weight = 0.5 * numerics.entropy(t / 3.0) * (1 + of_student / 100.0)
        return jnp.mean(weight * per_example(kd)(s, t))

    def limit(alpha):  # the branch for beta = 0 divides by alpha, not by its square
        return lambda s, t: jnp.mean(alpha * alpha_beta(s, t, alpha=alpha, beta=0.0))

    def of_choice(low, high):
        adaptive = bind(divergences.alphanet, alpha_min=low, alpha_max=high)
        return bind(losses.on_logits, divergence=adaptive)

    def batch_max(low, high):  # the larger of two batch means, unclipped
        ends = ((low, 1.0 - low), (high, 1.0 - high))
        means = lambda s, t: (jnp.mean(alpha_beta(s, t, alpha=a, beta=b)) for a, b in ends)  # noqa: E731
        return lambda s, t: jnp.maximum(*means(s, t))

    def formed(s, t):  # the log of a formed mixture; the teacher's entropy left out
        p, q = nn.softmax(t), nn.softmax(s)
        return -jnp.mean(jnp.sum(p * jnp.log(0.1 * p + 0.9 * q), axis=-1))

    def masked(s, t):  # the mask of confident examples multiplies a mean: a factor of a half
        confidence = jnp.max(nn.softmax(t), axis=-1)
        return jnp.mean(confidence <= jnp.median(confidence)) * mean(grams)(s, t)

    ab = lambda a: lambda s, t: jnp.mean(alpha_beta(s, t, alpha=a, beta=0.0))  # noqa: E731
    return [
        ("ER-DKD: losses [B] x entropies [B, 1]", mean(er), er_dkd),
        ("EA-KD: entropy bound 100, not ln 100", mean(ea), ea_kd),
        ("ABKD at (0.5, 0): 1 / alpha, not its square", ab(0.5), limit(0.5)),
        ("ABKD at (-0.5, 0): the same, sign included", ab(-0.5), limit(-0.5)),
        *(
            (
                f"AlphaNet in ABKD at {ends}: of batch means",
                mean(of_choice(*ends)),
                batch_max(*ends),
            )
            for ends in itertools.product(
                (0.1, 0.3), (0.7, 0.9)
            )  # the corners of its script's grid
        ),
        ("DistiLLM's skew KL: no teacher entropy", mean(skew), formed),
        ("MLKD: masks on reduced terms", mean(grams), masked),
    ]


if __name__ == "__main__":
    command.run(main)
