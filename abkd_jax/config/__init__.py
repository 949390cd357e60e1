"""Configs: their groups, their schema, their argument, the command's flag."""

from abkd_jax.config.arguments import apply, method_name, parse
from abkd_jax.config.schema import defaults, resolve
