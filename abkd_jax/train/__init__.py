"""Training: states, the one step, optimisers."""

from abkd_jax.train.state import TrainState, create, frozen
from abkd_jax.train.step import eval_step, train_step

__all__ = ["TrainState", "create", "eval_step", "frozen", "train_step"]
