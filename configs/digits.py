"""Digits: a student with 16 hidden units and 100 labels, taught by a teacher that saw them all.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560 (the loss, not the data).
Command: make demo, or python -m abkd_jax.main --config=configs/digits.py --workdir=runs/digits
Time: 25 s on two CPU cores once installed.
Number: 95.3 +- 0.6 % of the test set, against 89.4 +- 1.7 % on the labels alone (3 init seeds, jax
0.10.2); tables in experiments/README.md.
"""

import ml_collections

from abkd_jax import arguments


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.arguments` for the argument, to which the flag runlocal belongs."""
    options = arguments.parse(argument)
    config = ml_collections.ConfigDict(
        dict(
            mode="offline",
            data=dict(name="digits", validation=297, labelled=100),
            teacher=dict(
                model="mlp",
                widths=(256, 256),
                optimizer=dict(name="adam", learning_rate=1e-3),
                terms=dict(task=dict(fn="cross_entropy", weight=1.0)),
                checkpoint="",
            ),
            student=dict(
                model="mlp",
                widths=(16,),
                optimizer=dict(name="adam", learning_rate=3e-3),
                terms=dict(
                    distill=dict(
                        fn="on_logits",
                        weight=1.0,
                        temperature=1.0,
                        temperature_power=2.0,
                        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.5),
                    ),
                ),
            ),
            baseline=dict(
                model="mlp",
                widths=(16,),
                optimizer=dict(name="adam", learning_rate=1e-3),
                terms=dict(task=dict(fn="cross_entropy", weight=1.0)),
            ),
            batch_size=128,
            num_steps=1500,
            checkpoint_every=250,
            log_every=50,
            steps_per_call=0,
            devices=0,
            micro_batches=1,
            init_seed=0,
            data_seed=0,
            plugins=(),
            analysis=(),
        )
    )
    if isinstance(options.get("runlocal"), bool) and options.pop("runlocal"):
        config.update(num_steps=20, checkpoint_every=10, log_every=5)
    return arguments.apply(config, options, beside=__file__)
