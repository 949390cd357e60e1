"""How outputs are judged: each function here returns a `Task`."""

from abkd_jax.tasks.classification import classification
from abkd_jax.tasks.language import language
from abkd_jax.tasks.task import Column, Sums, Task
