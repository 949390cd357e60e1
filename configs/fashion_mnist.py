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

from abkd_jax import config as configs


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.config.arguments` for the argument.

    Of it, `runlocal` and `omit=CLASS` belong to this config. The latter leaves a class out of the
    images that the student sees, and distils at temperature 8.
    """
    options = configs.parse(argument)
    task = dict(task=dict(fn="cross_entropy", weight=1.0))
    falling = lambda rate: dict(fn="cosine", start=rate, end=0.0)  # noqa: E731
    distill = dict(
        fn="on_logits",
        weight=1.0,
        temperature=2.0,
        temperature_power=2.0,
        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3),
    )
    small = dict(fn="mlp", widths=(32,))
    config = configs.defaults()
    config.update(
        data=dict(
            fn="tfds",
            name="fashion_mnist",
            validation=5000,
            labelled=500,
            omit=(),
            data_dir="",
            download=False,
        ),
        teacher=dict(
            model=dict(fn="mlp", widths=(512, 512)),
            optimizer=dict(fn="adam", learning_rate=falling(1e-3)),
            terms=task,
        ),
        baseline=dict(model=small, optimizer=dict(fn="adam", learning_rate=1e-3), terms=task),
        student=dict(
            model=small,
            optimizer=dict(fn="adam", learning_rate=falling(3e-3)),
            terms=dict(distill=distill),
        ),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            baseline=dict(learn=("baseline",), split="labelled"),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        num_steps=4000,
    )
    if "omit" in options:
        config.data.omit = (options.pop("omit"),)
        config.student.terms.distill.temperature = 8.0
    if options.pop("runlocal", False):
        omit = config.data.omit
        config.data = dict(fn="digits", validation=297, labelled=100, omit=omit, shape=(28, 28, 1))
        config.update(num_steps=20, checkpoint_every=10, log_every=5)
    return configs.apply(config, options, beside=__file__)
