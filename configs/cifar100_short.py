"""CIFAR-100 in 15 epochs: ResNet-20 to ResNet-8 by eleven losses at once, which share a teacher.

Papers: those of the methods in configs/methods.py; Wang et al., "ABKD", ICML 2025, at five points.
Protocol: batches of 128, SGD with momentum 0.9, weight decay 5e-4 on everything, a rate that rises
to 0.1 over 3 epochs and falls to 0 by a cosine; crops after padding by 4, flips. All students start
from the same parameters and see the same batches. Nothing is selected: the last step is what is
compared. The methods' weights are those of 240 epochs and ResNet-56 to ResNet-20.
Command: python -m abkd_jax.main --config=configs/cifar100_short.py --workdir=runs/cifar100_short
The transfer set: --config="configs/cifar100_short.py:transfer,teacher='DIR/teacher'": labels alone
on 5,000 images, beside KD and ABKD on all 50,000 without a label.
Time and number: see LEDGER.md.
"""

import pathlib
import runpy

import ml_collections

from abkd_jax import config as configs

_METHODS = runpy.run_path(str(pathlib.Path(__file__).with_name("methods.py")))["get_methods"]
_POINTS = {  # alpha and beta
    "abkd": (0.8, 0.3),
    "abkd_fkl": (1.0, 0.0),
    "abkd_hellinger": (0.5, 0.5),
    "abkd_language": (0.2, 0.7),
    "abkd_rkl": (0.0, 1.0),
}
_OTHERS = ("kd", "dkd", "lskd", "ttm", "dist")


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; its argument takes `runlocal`, `transfer` and `teacher='WORKDIR'`."""
    options = configs.parse(argument)
    transfer, runlocal = options.pop("transfer", False), options.pop("runlocal", False)
    batch_size = 128  # the default
    epoch = 50_000 // batch_size
    num_steps = 15 * epoch
    rate = dict(fn="warmup_cosine", value=0.1, end=0.0, warmup_steps=3 * epoch)
    optimizer = dict(fn="sgd", learning_rate=rate, momentum=0.9, weight_decay=5e-4)
    task = dict(fn="cross_entropy", weight=1.0)
    small = dict(model=dict(fn="resnet", depth=8), optimizer=optimizer)
    config = configs.defaults()
    config.update(
        data=dict(
            fn="tfds",
            name="cifar100",
            validation=0,
            labelled=5000 if transfer else 0,
            pad=4,
            flip=True,
            data_dir="",
            download=False,
        ),
        teacher=dict(model=dict(fn="resnet", depth=20), optimizer=optimizer, terms=dict(task=task)),
        labels=small | dict(terms=dict(task=task)),
        phases=dict(teacher=dict(learn=("teacher",), split="full")),
        num_steps=num_steps,
        checkpoint_every=epoch,
    )
    terms = _METHODS(batch_size=batch_size, num_steps=num_steps)
    distill = {name: terms[name]["distill"] for name in _OTHERS}
    for name, (alpha, beta) in _POINTS.items():
        point = dict(divergence=dict(fn="alpha_beta", alpha=alpha, beta=beta))
        distill[name] = terms["abkd"]["distill"] | point
    found = ("kd", "abkd") if transfer else tuple(distill)
    for name in found:
        labels = {} if transfer else dict(task=terms.get(name, terms["abkd"])["task"])
        term = distill[name] | dict(other="teacher")
        config[name] = small | dict(terms=labels | dict(distill=term))
    if transfer:
        config.phases.labels = dict(learn=("labels",), split="labelled")
        config.phases.distill = dict(learn=found, see=("teacher",))
    else:
        config.phases.distill = dict(learn=("labels", *found), see=("teacher",))
    if runlocal:
        config.data = dict(fn="digits", validation=0, shape=(32, 32, 3), pad=4, flip=True)
        config.data.labelled = 500 if transfer else 0
        config.update(batch_size=8, num_steps=4, checkpoint_every=2, log_every=2)
        for name in ("teacher", "labels", *found):
            config[name].model.update(depth=8, widths=(4, 4, 8, 8))
            config[name].optimizer.learning_rate.warmup_steps = 1
    return configs.apply(config, options)
