"""Training: states, the one step, optimisers."""

from abkd_jax.train.state import TrainState, adopt, create, frozen
from abkd_jax.train.step import eval_step, train_step

__all__ = ["TrainState", "adopt", "create", "eval_step", "frozen", "train_step"]
