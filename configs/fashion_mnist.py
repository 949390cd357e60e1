"""Fashion-MNIST: a small student learns from 55,000 unlabelled images what 500 labels cannot teach.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560 (the loss); Hinton et al.,
"Distilling the knowledge in a neural network", 2015, section 3 (a transfer set without a class).
Command: python -m abkd_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
One class left out of the student's images: --config=configs/fashion_mnist.py:omit=5
Time: one to two minutes on two CPU cores, reading the images included.
Number: 87.5 +- 0.3 % of the test set against 78.0 +- 0.3 % on the labels alone; of the class that
was left out, 36 +- 8 % against none (3 init seeds, jax 0.10.2); tables in experiments/README.md.
"""

import ml_collections

from abkd_jax import arguments


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.arguments` for the argument.

    Of it, `runlocal` and `omit=CLASS` belong to this config. The latter leaves a class out of the
    images that the student sees, and distils at temperature 8.
    """
    options = arguments.parse(argument)
    config = ml_collections.ConfigDict(
        dict(
            mode="offline",
            data=dict(
                name="fashion_mnist",
                validation=5000,
                labelled=500,
                omit=(),
                data_dir="",
                download=False,
            ),
            teacher=dict(
                model="mlp",
                widths=(512, 512),
                optimizer=dict(name="adam", learning_rate=dict(fn="cosine", start=1e-3, end=0.0)),
                terms=dict(task=dict(fn="cross_entropy", weight=1.0)),
                checkpoint="",
            ),
            baseline=dict(
                model="mlp",
                widths=(32,),
                optimizer=dict(name="adam", learning_rate=1e-3),
                terms=dict(task=dict(fn="cross_entropy", weight=1.0)),
            ),
            student=dict(
                model="mlp",
                widths=(32,),
                optimizer=dict(name="adam", learning_rate=dict(fn="cosine", start=3e-3, end=0.0)),
                terms=dict(
                    distill=dict(
                        fn="on_logits",
                        weight=1.0,
                        temperature=2.0,
                        temperature_power=2.0,
                        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3),
                    ),
                ),
            ),
            batch_size=128,
            num_steps=4000,
            checkpoint_every=500,
            log_every=100,
            steps_per_call=0,
            devices=0,
            micro_batches=1,
            init_seed=0,
            data_seed=0,
            plugins=(),
            analysis=(),
        )
    )
    if "omit" in options:
        config.data.omit = (options.pop("omit"),)
        config.student.terms.distill.temperature = 8.0
    if isinstance(options.get("runlocal"), bool) and options.pop("runlocal"):
        config.data = dict(
            name="digits", validation=297, labelled=100, omit=config.data.omit, shape=(28, 28, 1)
        )
        config.update(num_steps=20, checkpoint_every=10, log_every=5)
    return arguments.apply(config, options, beside=__file__)
