"""How a loss moves probability: gradient steps seen as a reassignment of probability mass.

Pure functions of a user's own logits, for jit and vmap; any number may be traced. p is the teacher,
q the student.

Logits are refused by `check_cached`, by their type, their shape or their values.
"""

from abkd_jax.analysis.checks import check_cached
from abkd_jax.analysis.effects import (
    UpperBound,
    confidence_weight,
    hardness_weight,
    likelihood_ratio_weight,
    tightness,
    upper_bound,
)
from abkd_jax.analysis.flow import (
    by_rank,
    head_and_tail,
    head_middle_and_tail,
    mass_change,
    mass_flow,
    moved_mass,
    over_and_underestimated,
    target_and_rest,
)
from abkd_jax.analysis.gradients import (
    GradientNoise,
    VarianceReduction,
    cosine,
    gradient_noise,
    gradient_norm,
    logit_cosines,
    logit_gradient,
    parameter_cosines,
    tree_cosine,
    variance_reduction,
)
from abkd_jax.analysis.grid import (
    Summary,
    bound_summary,
    gradient_summary,
    over_grid,
    rank_summary,
    reassignment_summary,
)
from abkd_jax.analysis.probe import PROBES, probe
from abkd_jax.analysis.reassignment import (
    Reassignment,
    exact_parameter_log_mass_ratio,
    log_mass_ratio,
    of_logit_change,
    parameter_log_mass_ratio,
)
from abkd_jax.analysis.temperature import effective_temperature
