"""Knowledge distillation on JAX: the alpha-beta-divergence (ABKD) and the systems around it."""

from abkd_jax.divergences import (
    alpha_beta,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    tempered,
    total_variation,
)
from abkd_jax.losses import cross_entropy, entropy_gated, on_logits, total
from abkd_jax.models import as_outputs
from abkd_jax.train import TrainState, adopt, create, eval_step, frozen, train_step
from abkd_jax.train.loop import train_and_evaluate
from abkd_jax.train.workdir import load
from abkd_jax.types import (
    Batch,
    Bound,
    Divergence,
    Loss,
    Outputs,
    Schedule,
    Term,
    at_step,
    bind,
    schedule,
)

__all__ = [
    "Batch",
    "Bound",
    "Divergence",
    "Loss",
    "Outputs",
    "Schedule",
    "Term",
    "TrainState",
    "adopt",
    "alpha_beta",
    "as_outputs",
    "at_step",
    "bind",
    "create",
    "cross_entropy",
    "entropy_gated",
    "eval_step",
    "forward_kl",
    "frozen",
    "jensen_shannon",
    "load",
    "on_logits",
    "reverse_kl",
    "schedule",
    "tempered",
    "total",
    "total_variation",
    "train_and_evaluate",
    "train_step",
]
