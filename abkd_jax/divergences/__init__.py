"""Divergences between a teacher's and a student's distribution, as functions of their logits.

Every function has the signature `f(student_logits, teacher_logits, *, numbers) -> [...]`: logits
`[..., K]` over the same classes, floating point, with leading axes that broadcast, else it raises
an AssertionError (`abkd_jax.checks`). It reduces the last axis only, broadcasts its numbers to the
leading axes, computes in float32 (float64 for float64 logits), and can be jitted, vmapped, pmapped
and differentiated with respect to everything, in both modes. `p` is the teacher, `q` the student.

A class whose logit is -inf on both sides does not exist: the result is that of cutting it out.
-inf on one side is probability 0 there, and the divergence takes its true limit; where that is
infinite, value and gradient are finite, large and of the right sign. A row in which no class is
left on either side has value and gradient 0.

To add one, write a function in a module here, import it below, and add a row to the table of
`tests/divergences_test.py`.
"""

from abkd_jax.divergences.alpha_beta import (
    alpha_beta,
    alpha_divergence,
    beta_divergence,
    chi_squared,
    hellinger,
    renyi,
)
from abkd_jax.divergences.combinators import (
    powered,
    prior_shifted,
    standardized,
    tempered,
    top_k,
    top_k_dropped,
    top_k_renormalised,
)
from abkd_jax.divergences.kl import (
    adaptive_kl,
    forward_kl,
    jeffreys,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from abkd_jax.divergences.others import alphanet, logit_mse, total_variation
from abkd_jax.divergences.single_pass import single_pass
