"""Digits: a student with 16 hidden units and 100 labels, taught by a teacher that saw them all.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560 (the loss, not the data).
Command: make demo, or python -m abkd_jax.main --config=configs/digits.py --workdir=runs/digits
Time: 25 s on two CPU cores once installed.
Number: 95.3 +- 0.6 % of the test set, against 89.4 +- 1.7 % on the labels alone (3 init seeds, jax
0.10.2; `digits_demo` in LEDGER.md); tables in experiments/README.md.
"""

import ml_collections

from abkd_jax import config as configs


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; `abkd_jax.config.arguments` has the argument, to which runlocal belongs."""
    options = configs.parse(argument)
    task = dict(task=dict(fn="cross_entropy", weight=1.0))
    slow, fast = (dict(fn="adam", learning_rate=rate) for rate in (1e-3, 3e-3))
    distill = dict(
        fn="on_logits",
        weight=1.0,
        temperature=1.0,
        temperature_power=2.0,
        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.5),
    )
    small = dict(fn="mlp", widths=(16,))
    config = configs.defaults()
    config.update(
        data=dict(fn="digits", validation=297, labelled=100),
        teacher=dict(model=dict(fn="mlp", widths=(256, 256)), optimizer=slow, terms=task),
        student=dict(model=small, optimizer=fast, terms=dict(distill=distill)),
        baseline=dict(model=small, optimizer=slow, terms=task),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            baseline=dict(learn=("baseline",), split="labelled"),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        num_steps=1500,
        checkpoint_every=250,
        log_every=50,
    )
    if options.pop("runlocal", False):
        config.update(num_steps=20, checkpoint_every=10, log_every=5)
    return configs.apply(config, options, beside=__file__)
