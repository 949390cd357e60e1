"""Sweeps: many students of one program over numbers of a config and over init seeds."""

from abkd_jax.sweep.members import HISTORY, TABLE, Program, opened, sweep
from abkd_jax.sweep.table import averaged, best, spread
