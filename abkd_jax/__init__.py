"""Knowledge distillation on JAX: the alpha-beta-divergence (ABKD) and the systems around it."""

from abkd_jax.binding import (
    Bound,
    Domain,
    NonNegative,
    Number,
    Positive,
    Schedule,
    Unit,
    at_step,
    bind,
    schedule,
)
from abkd_jax.divergences import (
    adaptive_kl,
    alpha_beta,
    alpha_divergence,
    alphanet,
    beta_divergence,
    chi_squared,
    forward_kl,
    hellinger,
    jeffreys,
    jensen_shannon,
    logit_mse,
    powered,
    prior_shifted,
    renyi,
    reverse_kl,
    single_pass,
    skew_forward_kl,
    skew_reverse_kl,
    standardized,
    tempered,
    top_k,
    top_k_dropped,
    top_k_renormalised,
    total_variation,
)
from abkd_jax.generate import generate
from abkd_jax.losses import (
    cross_entropy,
    decoupled_features,
    difficulty_weighted,
    dist,
    dkd,
    entropy_aware,
    entropy_gated,
    entropy_weighted,
    gram,
    importance_weighted,
    input_gradient_alignment,
    k1,
    k2,
    k3,
    nkd,
    norm_and_direction,
    on_logits,
    on_top_k,
    policy_gradient,
    power_weighted,
    rank_correlation,
    sinkhorn,
    total,
    with_teacher_labels,
)
from abkd_jax.models import as_outputs, from_nnx
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.run.workdir import load
from abkd_jax.sources import Source
from abkd_jax.train import TrainState, adopt, create, eval_outputs, frozen, train_step
from abkd_jax.types import Batch, Divergence, Head, Loss, Outputs, Term, Tokens
