"""From divergences on logits to losses on outputs."""

from jax import Array

from abkd_jax.divergences import tempered
from abkd_jax.types import Batch, Divergence, Outputs


def on_logits(
    student: Outputs,
    teacher: Outputs,
    batch: Batch,
    *,
    divergence: Divergence,
    temperature: float | Array = 1.0,
    temperature_power: float | Array = 2.0,
) -> Array:
    """T^power D(softmax(teacher / T) || softmax(student / T)), the distillation of logits.

    Args:
        student: the network that is being trained; its `logits` [..., K].
        teacher: the other one; its `logits` [..., K].
        batch: not read.
        divergence: D.
        temperature: T > 0.
        temperature_power: 2 for KD (Hinton et al., 2015), DKD and LSKD; 0 for ABKD, TTM and SinKD.

    Returns:
        `[...]`, one value per example.

    Raises:
        AssertionError: if the logits are not floating point or their shapes do not fit.
    """
    del batch
    return tempered(
        student.logits,
        teacher.logits,
        divergence=divergence,
        temperature=temperature,
        temperature_power=temperature_power,
    )


on_logits.needs = ("logits",)
