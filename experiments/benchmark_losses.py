"""Value and student gradient of every loss, as a factor to `on_logits(forward_kl)`, on one batch.

    python -m experiments.benchmark_losses

Each takes its turn in every round, in one process; a line gives the median over rounds of its time
over that of `on_logits(forward_kl)` in the same round, with the quartiles. KDIGA's loss alone is
cheap, so its line is of a whole `train_step` of an MLP with 128 hidden units, with the term against
without it: the step takes the gradients at the inputs.
"""

from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax import Array
from jax import numpy as jnp

from abkd_jax import Bound, Head, Outputs, Term, bind, divergences, losses, timing
from abkd_jax.config import command
from abkd_jax.models import mlp
from abkd_jax.optimizers import sgd
from abkd_jax.train import create, frozen, train_step

_ROUNDS = flags.DEFINE_integer("rounds", 25, "Rounds, each with a turn of everyone.", lower_bound=2)
_SHAPE = flags.DEFINE_string("shape", "512x100", "Batch x K.")
_WIDTH = 64  # of the features
_BASE = "on_logits forward_kl"
_STEP = "train_step, forward_kl"


def main() -> None:
    """Prints a line for each loss."""
    batch_size, classes = map(int, _SHAPE.value.split("x"))
    calls = _losses(batch_size, classes) | _steps(batch_size, classes)
    seconds = timing.in_turn(calls, _ROUNDS.value, repeats=2, seconds=0.1)
    print(f"{_SHAPE.value}, float32, {jax.default_backend()}; value and student gradient; ")
    print(f"median [quartiles] of {_ROUNDS.value} rounds")
    print(f"{'':40}{'ms':>10}{'factor':>24}")
    for name, times in seconds.items():
        base = seconds[_STEP if name.startswith("train_step") else _BASE]
        factor = timing.quartiles(times / base, ".2f")
        print(f"{name:40}{1e3 * np.median(times):>10.3f}{factor:>24}")


def _bound(centers: Array) -> dict[str, Bound]:
    """Every loss, and every combinator of forward KL, with its numbers."""
    kl = divergences.forward_kl
    kd = bind(losses.on_logits, divergence=kl, temperature=4.0)
    weights = dict(target_weight=1.0, rest_weight=8.0, temperature=4.0)
    dkd = bind(losses.dkd, target_divergence=kl, rest_divergence=kl, **weights)

    def of(combinator, **numbers):
        return bind(losses.on_logits, divergence=bind(combinator, divergence=kl, **numbers))

    return {
        _BASE: kd,
        "standardized": of(divergences.standardized),
        "powered": of(divergences.powered, teacher_power=0.1),
        "prior_shifted": of(divergences.prior_shifted, log_prior=0.0),
        "top_k, k = 10": of(divergences.top_k, k=10),
        "top_k_renormalised, k = 10": of(divergences.top_k_renormalised, k=10),
        "top_k_dropped, k = 10": of(divergences.top_k_dropped, k=10),
        "dkd": dkd,
        "nkd": bind(losses.nkd, rest_weight=1.5, temperature=1.0),
        "entropy_weighted": bind(losses.entropy_weighted, loss=kd, temperature=4.0),
        "entropy_aware": bind(losses.entropy_aware, loss=kd, temperature=3.0),
        "entropy_gated": bind(losses.entropy_gated, forward=kd, reverse=kd),
        "power_weighted": bind(losses.power_weighted, loss=kd, teacher_power=0.1),
        "difficulty_weighted": bind(losses.difficulty_weighted, loss=kd),
        "with_teacher_labels dkd": bind(losses.with_teacher_labels, loss=dkd),
        "norm_and_direction": bind(losses.norm_and_direction, centers=centers),
        "decoupled_features": bind(
            losses.decoupled_features, strong_weight=1.0, weak_weight=2.0, temperature=4.0
        ),
        "dist": bind(losses.dist),
        "gram": bind(losses.gram),
        "rank_correlation": bind(losses.rank_correlation),
        "sinkhorn": bind(losses.sinkhorn),
    }


def _losses(batch_size: int, classes: int) -> dict[str, Callable[[], object]]:
    """By name, a call that returns its value and gradient."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(2 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    student, teacher = (
        Outputs(
            logits=draw(batch_size, classes),
            hidden=draw(batch_size, _WIDTH),
            head=Head(draw(_WIDTH, classes), draw(classes)),
        )
        for _ in range(2)
    )
    labels = jnp.asarray(rng.integers(0, classes, batch_size))
    batch = {"labels": labels, "where": jnp.ones(batch_size, bool)}

    @jax.jit
    def value_and_slope(loss, student, teacher, batch):
        return jax.value_and_grad(lambda s: jnp.mean(loss(s, teacher, batch)))(student)

    def call(loss):
        return lambda: value_and_slope(loss, student, teacher, batch)

    return {name: call(loss) for name, loss in _bound(draw(classes, _WIDTH)).items()}


def _steps(batch_size: int, classes: int) -> dict[str, Callable[[], object]]:
    """Whole steps, without and with KDIGA's term."""
    kd = bind(losses.on_logits, divergence=divergences.forward_kl)
    terms = {"kd": Term(kd, 1.0, other="teacher")}
    kdiga = {"gradients": Term(bind(losses.input_gradient_alignment), 1.0, other="teacher")}
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(batch_size, 256)), jnp.float32)
    batch = {"inputs": inputs, "labels": jnp.zeros(batch_size, int)}
    batch |= {"where": jnp.ones(batch_size, bool)}
    how = dict(optimizer=bind(sgd, learning_rate=0.1))
    module = mlp(num_classes=classes, widths=(128,))
    student, teacher = (create(module, inputs[:1], init_seed=seed, **how) for seed in range(2))
    networks = {"student": student, "teacher": frozen(teacher)}

    def call(terms):
        return lambda: train_step(networks, batch, {"student": terms})

    return {_STEP: call(terms), "train_step, forward_kl and KDIGA": call(terms | kdiga)}


if __name__ == "__main__":
    command.run(main)
