"""CIFAR-100, ResNet-56 to ResNet-20: ABKD's published protocol in full.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560; the numbers are those of
its code for this pair (alpha 0.8, beta 0.3, temperature 4 without the factor T^2, weight 32).
Protocol: 240 epochs of 781 batches of 64; SGD with momentum 0.9, weight decay 5e-4 on everything,
rate 0.05, a tenth of it after epochs 150, 180 and 210; crops after padding by 4, flips. There is no
validation split: the figure that papers quote is the best of 240 evaluations of the test set.
Differs: the teacher is trained here, by the same recipe, where the paper loads one.
Command: python -m abkd_jax.main --config=configs/cifar100.py --workdir=runs/cifar100
Time and number: not measured (the full protocol takes a GPU).
"""

import ml_collections

from abkd_jax import config as configs


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; `abkd_jax.config.arguments` has the argument, to which runlocal belongs."""
    options = configs.parse(argument)
    epoch = 50_000 // 64
    drops = (150 * epoch, 180 * epoch, 210 * epoch)
    optimizer = dict(
        fn="sgd",
        learning_rate=dict(fn="piecewise", start=5e-2, factor=0.1, boundaries=drops),
        momentum=0.9,
        weight_decay=5e-4,
    )
    task = dict(fn="cross_entropy", weight=1.0)
    distill = dict(
        fn="on_logits",
        weight=32.0,
        temperature=4.0,
        temperature_power=0.0,
        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3),
    )
    config = configs.defaults()
    config.update(
        data=dict(
            fn="tfds",
            name="cifar100",
            validation=0,
            labelled=0,
            omit=(),
            pad=4,
            flip=True,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            data_dir="",
            download=False,
        ),
        teacher=dict(
            model=dict(fn="resnet", depth=56, dtype="float32"),
            optimizer=optimizer,
            terms=dict(task=task),
        ),
        student=dict(
            model=dict(fn="resnet", depth=20, dtype="float32"),
            optimizer=optimizer,
            terms=dict(task=task, distill=distill),
        ),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        batch_size=64,
        num_steps=240 * epoch,
        checkpoint_every=epoch,
    )
    if options.pop("runlocal", False):
        config.data = dict(fn="digits", validation=0, shape=(32, 32, 3), pad=4, flip=True)
        config.update(batch_size=8, num_steps=4, checkpoint_every=2, log_every=2)
        config.teacher.model.depth = config.student.model.depth = 8
    return configs.apply(config, options, beside=__file__)
