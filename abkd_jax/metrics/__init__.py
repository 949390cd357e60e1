"""Evaluation metrics: additive sums per batch, calibration of a gathered set, and attacks.

Conventions of the whole package:

* Rows are masked by `where` and by a negative (withheld) label; such a row contributes exactly 0,
  whatever its logits are.
* A logit of -inf removes its class: probability exactly 0. A valid row with a NaN logit, or with no
  class left, has no distribution and shows up as NaN (but in "kl_at_1", where `forward_kl` has 0
  for a row that neither network gives a class).
* Work is in float32 for logits of 32 bits or fewer, in float64 for float64.
* Arrays of another type or shape than the docstrings give are refused by an AssertionError.
"""

from abkd_jax.metrics.calibration import adaptive_ece, fit_temperature, reliability_diagram
from abkd_jax.metrics.classification import (
    agreement_sums,
    classification_sums,
    per_example,
    summarize,
)
from abkd_jax.metrics.robustness import fgsm, pgd
