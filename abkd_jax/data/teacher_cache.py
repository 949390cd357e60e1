"""The outputs of networks that do not learn, computed once for all steps."""

from collections.abc import Callable, Mapping
from typing import Any

from jax import numpy as jnp

from abkd_jax.data.augment import Preprocess
from abkd_jax.data.batches import evaluation_batches
from abkd_jax.data.sets import Split
from abkd_jax.types import Outputs


def with_outputs(
    split: Split,
    forward: Callable[[Any], Mapping[str, Outputs]],
    preprocess: Preprocess,
    size: int,
) -> Split:
    """The split with the logits and the hidden features of each example.

    What a step takes of them is what it would compute, as long as inputs are not augmented.

    Args:
        split: in memory.
        forward: `inputs [B, ...] -> {network: Outputs}`, compiled by the caller, who has the
            parameters.
        preprocess: of the inputs; its crops and flips are left out.
        size: B.

    Returns:
        The split, its `outputs` with `logits` and `hidden` for each network.
    """
    found = []
    for batch in evaluation_batches(split, size, preprocess):
        shown = forward(batch["inputs"]).items()
        found.append({name: Outputs(logits=x.logits, hidden=x.hidden) for name, x in shown})
    joined = lambda *parts: jnp.concatenate(parts)[: len(split)]  # noqa: E731
    first, *others = found
    outputs = {name: x.map_rows(joined, *(o[name] for o in others)) for name, x in first.items()}
    return split.replace(outputs=outputs)
