"""Text: a decoder of 0.25M parameters learns bytes of Python's help from one of 3.3M.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560 (the loss, not the data).
Command: python -m abkd_jax.main --config=configs/text.py --workdir=runs/text
Time: 5 minutes on two cores, of which the teacher 3.
Number: NLL on the test tokens, one init seed: teacher 1.753, baseline 1.966, student 1.960; several
divergences and seeds in experiments/README.md.
"""

import ml_collections

from abkd_jax import config as configs


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; `abkd_jax.config.arguments` has the argument, to which runlocal belongs."""
    options = configs.parse(argument)
    task = dict(task=dict(fn="cross_entropy", weight=1.0))
    distill = dict(
        fn="on_logits",
        weight=1.0,
        temperature=1.0,
        divergence=dict(fn="alpha_beta", alpha=0.75, beta=0.25),
    )
    small = dict(fn="decoder", width=96, layers=2, heads=4, mlp_width=256)
    config = configs.defaults()
    config.update(
        task=dict(fn="language"),
        data=dict(fn="topics", validation=8, length=128),
        teacher=dict(
            model=dict(fn="decoder", width=256, layers=4, heads=4, mlp_width=704),
            optimizer=_adamw(1e-3),
            terms=task,
        ),
        baseline=dict(model=small, optimizer=_adamw(3e-3), terms=task),
        student=dict(model=small, optimizer=_adamw(3e-3), terms=dict(distill=distill)),
        phases=dict(
            teacher=dict(learn=("teacher",), num_steps=280),
            baseline=dict(learn=("baseline",)),
            distill=dict(learn=("student",), see=("teacher",)),
        ),
        batch_size=16,
        num_steps=300,
        checkpoint_every=100,
        log_every=50,
    )
    if options.pop("runlocal", False):
        config.data.update(length=32, validation=2)
        config.teacher.model.update(width=32, mlp_width=64, layers=2)
        for name in ("baseline", "student"):
            config[name].model.update(width=16, mlp_width=32)
        config.phases.teacher.num_steps = 30
        config.update(batch_size=8, num_steps=20, checkpoint_every=10, log_every=5)
        config.data_seed = 776  # whose ten topics to test are short
    return configs.apply(config, options, beside=__file__)


def _adamw(rate: float) -> dict:
    """AdamW whose rate falls to 0."""
    return dict(
        fn="adamw",
        learning_rate=dict(fn="cosine", start=rate, end=0.0),
        weight_decay=0.1,
        decay_all=False,
        clip_norm=1.0,
    )
