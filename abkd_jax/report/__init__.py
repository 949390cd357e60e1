"""The report of a run: a page and its figures, made of the files of its workdir and nothing else.

It is a function of these files, so it can be made again at any time. What it says of the scores,
and which figures it has besides the learning curves, is the task's.
"""

from abkd_jax.report.curves import analysis, learning_curves
from abkd_jax.report.files import Report, load
from abkd_jax.report.page import page, write
