"""CIFAR-100 with a long tail, 500 examples of the first class and 5 of the last: BKD and KD.

Papers: Zhang et al., "Balanced knowledge distillation for long-tailed learning", Neurocomputing
2023, https://arxiv.org/abs/2104.10510; Cao et al., "Learning imbalanced datasets with
label-distribution-aware margin loss", NeurIPS 2019 (the counts).
Protocol: 30 epochs of 84 batches of 128; SGD with momentum 0.9, weight decay 5e-4 on everything, a
rate that rises to 0.1 over 3 epochs and falls to 0 by a cosine; crops after padding by 4, flips.
The teacher is trained on the same images. The test set is balanced. Nothing is selected.
Differs: BKD trains ResNet-32 by ResNet-32 for 200 epochs, with decay 2e-4 and drops of the rate
after 160 and 180; ours are ResNet-20 and ResNet-8.
Command: python -m abkd_jax.main --config=configs/cifar100_lt.py --workdir=runs/cifar100_lt
Time and number: see LEDGER.md.
"""

import pathlib
import runpy

import ml_collections

from abkd_jax import config as configs

_METHODS = runpy.run_path(str(pathlib.Path(__file__).with_name("methods.py")))["get_methods"]


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; its argument takes `runlocal` and `teacher='WORKDIR'`."""
    options = configs.parse(argument)
    batch_size, epoch = 128, 10_847 // 128
    num_steps = 30 * epoch
    rate = dict(fn="warmup_cosine", value=0.1, end=0.0, warmup_steps=3 * epoch)
    optimizer = dict(fn="sgd", learning_rate=rate, momentum=0.9, weight_decay=5e-4)
    task = dict(fn="cross_entropy", weight=1.0)
    small = dict(model=dict(fn="resnet", depth=8), optimizer=optimizer)
    terms = _METHODS(batch_size=batch_size, num_steps=num_steps)
    # KD with BKD's numbers, so that the class weights are all that differs.
    kd = dict(fn="on_logits", weight=1.0, temperature=2.0, temperature_power=2.0, other="teacher")
    kd |= dict(divergence=dict(fn="forward_kl"))
    bkd = terms["bkd"]["distill"] | dict(other="teacher")
    config = configs.defaults()
    config.update(
        data=dict(
            fn="tfds",
            name="cifar100",
            validation=0,
            imbalance=100,
            pad=4,
            flip=True,
            data_dir="",
            download=False,
        ),
        teacher=dict(model=dict(fn="resnet", depth=20), optimizer=optimizer, terms=dict(task=task)),
        labels=small | dict(terms=dict(task=task)),
        kd=small | dict(terms=dict(task=task, distill=kd)),
        bkd=small | dict(terms=dict(task=task, distill=bkd)),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            distill=dict(learn=("labels", "kd", "bkd"), see=("teacher",)),
        ),
        num_steps=num_steps,
    )
    if options.pop("runlocal", False):
        config.data = dict(fn="digits", validation=0, imbalance=10, shape=(32, 32, 3), pad=4)
        config.update(batch_size=8, num_steps=4, checkpoint_every=2, log_every=2)
        for name in ("teacher", "labels", "kd", "bkd"):
            config[name].model.update(depth=8, widths=(4, 4, 8, 8))
            config[name].optimizer.learning_rate.warmup_steps = 1
    return configs.apply(config, options)
