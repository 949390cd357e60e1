"""Where batches come from: each function here returns a `Source`."""

from abkd_jax.sources.dataset import dataset
from abkd_jax.sources.source import Source
