"""Training: states, the one step, consecutive steps."""

from abkd_jax.train.advance import Carry, Programs, Static, advance, begin, run_steps
from abkd_jax.train.state import TrainState, adopt, create, frozen
from abkd_jax.train.step import Networks, Objectives, eval_outputs, outputs_of, train_step
