"""ImageNet: ResNet-34 to ResNet-18, or ResNet-50 to MobileNetV1, by the published protocol.

Paper: Tian et al., "Contrastive representation distillation", ICLR 2020, and Zhao et al.,
"Decoupled knowledge distillation", CVPR 2022, whose code has the numbers of the protocol; the loss
is ABKD's (Wang et al., ICML 2025), at the numbers of ImageNet's KD there (weights 0.5 and 0.5,
temperature 1) with alpha 0.8 and beta 0.3: our reading, for ABKD has no ImageNet.
Protocol: 100 epochs of 2,502 batches of 512; SGD with momentum 0.9, weight decay 1e-4 on
everything, rate 0.2, a tenth of it after epochs 30, 60 and 90; random crops of 224, flips. The
figure that papers quote is the best of 100 evaluations of ImageNet's validation images, on which
everybody tests.
Differs: batches of 512 are of one step on all devices, whose batch norms see all of it; what is
left of an epoch waits for the next one.
Command: python -m abkd_jax.main --config=configs/imagenet.py --workdir=runs/imagenet
With torchvision's teacher, in place of one by the same recipe:
--config="configs/imagenet.py:pair=resnet50-mobilenet_v1,teacher='resnet50.pth'"
Time and number: not measured; see LEDGER.md.
"""

import ml_collections

from abkd_jax import config as configs

_MODELS = {
    "resnet18": dict(fn="imagenet_resnet", depth=18),
    "resnet34": dict(fn="imagenet_resnet", depth=34),
    "resnet50": dict(fn="imagenet_resnet", depth=50),
    "mobilenet_v1": dict(fn="mobilenet_v1"),
}
_PAIRS = ("resnet34-resnet18", "resnet50-mobilenet_v1")
_ALONE = {"resnet34": 0.7331, "resnet50": 0.7616}  # accuracy; zkxufo/TTM: README.md


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.config.arguments` for the argument.

    Of it, `runlocal` and `pair=TEACHER-STUDENT` belong to this config. With a method, its numbers
    are those of CIFAR-100, unless the argument gives others.
    """
    options = configs.parse(argument)
    pair = options.pop("pair", "resnet34-resnet18")
    if pair not in _PAIRS:
        raise ValueError(f"pair must be one of {', '.join(_PAIRS)}; found {pair!r}.")
    teacher, student = pair.split("-")
    epoch = 1_281_167 // 512
    drops = (30 * epoch, 60 * epoch, 90 * epoch)
    optimizer = dict(
        fn="sgd",
        learning_rate=dict(fn="piecewise", start=0.2, factor=0.1, boundaries=drops),
        momentum=0.9,
        weight_decay=1e-4,
    )
    distill = dict(
        fn="on_logits",
        weight=0.5,
        temperature=1.0,
        divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3),
    )
    config = configs.defaults()
    config.update(
        data=dict(
            fn="tfds",
            name="imagenet2012",
            validation=0,
            test_split="validation",
            image_size=224,
            flip=True,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            data_dir="",
            download=False,
        ),
        teacher=dict(
            model=_MODELS[teacher] | dict(dtype="bfloat16"),
            optimizer=optimizer,
            terms=dict(task=dict(fn="cross_entropy", weight=1.0)),
            published=_ALONE[teacher],
        ),
        student=dict(
            model=_MODELS[student] | dict(dtype="bfloat16"),
            optimizer=optimizer,
            terms=dict(task=dict(fn="cross_entropy", weight=0.5), distill=distill),
        ),
        phases=dict(
            teacher=dict(learn=("teacher",), split="full"),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        batch_size=512,
        num_steps=100 * epoch,
        checkpoint_every=epoch,
    )
    if options.pop("runlocal", False):
        config.data = dict(fn="digits", validation=0, shape=(32, 32, 3))
        config.update(batch_size=8, num_steps=4, checkpoint_every=2, log_every=2)
        del config.teacher["published"]
        for network in (config.teacher, config.student):
            network.model.dtype = "float32"
            network.model.update(dict(depth=18) if "depth" in network.model else {})
    return configs.apply(config, options, beside=__file__)
