"""CIFAR-100 by CRD's benchmark: any of its 13 pairs, by any published method, in full.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560; without a method the loss
is ABKD's, with the numbers of its code for ResNet-56 to ResNet-20 (alpha 0.8, beta 0.3, temperature
4 without the factor T^2, weight 32), which for the other pairs are our reading.
Protocol: 240 epochs of 781 batches of 64; SGD with momentum 0.9, weight decay 5e-4 on everything,
rate 0.05 (0.01 for MobileNetV2 and the ShuffleNets), a tenth of it after epochs 150, 180 and 210;
crops after padding by 4, flips. There is no validation split: the figure that papers quote is that
of the last epoch, or the best of 240 evaluations of the test set. Networks and published scores:
configs/pairs.py.
Differs: a teacher is trained here, by the same recipe; papers load one, as teacher='FILE' does.
Command: python -m abkd_jax.main --config=configs/cifar100.py --workdir=runs/cifar100
Another pair and method: --config=configs/cifar100.py:pair=vgg13-mobilenet_v2,method=dkd
A published teacher, tested alone: --config="configs/cifar100.py:teacher='FILE.pth'" --evaluate
Several seeds in one program: python -m experiments.sweep --config=configs/cifar100.py
--over=student.terms.distill.divergence.alpha=0.8 --init_seeds=5 --workdir=DIR
Time and number: not measured (the full protocol takes a GPU); see LEDGER.md.
"""

import pathlib
import runpy

import ml_collections

from abkd_jax import config as configs

_PAIRS = runpy.run_path(str(pathlib.Path(__file__).with_name("pairs.py")))
_SMALL = {  # of a network's kind, for runlocal
    "resnet": dict(depth=8, widths=(4, 4, 8, 8)),
    "wide_resnet": dict(depth=10, widening=1),
    "vgg": dict(depth=8),
    "imagenet_resnet": dict(depth=18),
    "shufflenet_v2": dict(size=0.5),
}


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.config.arguments` for the argument.

    Of it, `runlocal` and `pair=TEACHER-STUDENT` belong to this config.
    """
    options = configs.parse(argument)
    pairs, name = _PAIRS["get_pairs"](), options.pop("pair", "resnet56-resnet20")
    if not isinstance(name, str) or name not in pairs:
        raise ValueError(f"pair must be one of {', '.join(pairs)}; found {name!r}.")
    pair, method = pairs[name], configs.method_name(options.get("method"))
    epoch = 50_000 // 64
    drops = (150 * epoch, 180 * epoch, 210 * epoch)
    falling = lambda rate: dict(  # noqa: E731
        fn="piecewise", start=rate, factor=0.1, boundaries=drops
    )
    sgd = dict(fn="sgd", momentum=0.9, weight_decay=5e-4)
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
            model=_PAIRS["NETWORKS"][pair.teacher] | dict(dtype="float32"),
            optimizer=sgd | dict(learning_rate=falling(0.05)),
            terms=dict(task=task),
            published=_PAIRS["ALONE"][pair.teacher] / 100,
        ),
        student=dict(
            model=_PAIRS["NETWORKS"][pair.student] | dict(dtype="float32"),
            optimizer=sgd | dict(learning_rate=falling(pair.rate)),
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
    if options.keys() <= {"method", "teacher"} and f"{method}" in pair.scores:
        config.student.published = pair.scores[method] / 100
    if options.pop("runlocal", False):
        config.data = dict(fn="digits", validation=0, shape=(32, 32, 3), pad=4, flip=True)
        config.update(batch_size=8, num_steps=4, checkpoint_every=2, log_every=2)
        del config.teacher["published"]
        for network in (config.teacher, config.student):
            network.model.update(_SMALL.get(network.model.fn, {}))
    options = _PAIRS["get_numbers"](name, f"{method}") | options
    return configs.apply(config, options, beside=__file__)
