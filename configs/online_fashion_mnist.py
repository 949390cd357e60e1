"""Fashion-MNIST, two networks that learn at once: BD-KD, deep mutual learning, or independently.

Papers: Amara et al., "BD-KD", https://arxiv.org/abs/2212.12965 (its gate: see
`losses.entropy_gated`); Zhang et al., "Deep mutual learning", CVPR 2018.
Command: python -m abkd_jax.main --config=configs/online_fashion_mnist.py:method=bdkd --workdir=DIR
and the same with method=dml and method=independent.
Time: two to five minutes on two CPU cores.
Number: student 89.0 +- 0.5 % (bdkd), 88.9 +- 0.5 % (dml), 88.4 +- 0.4 % (independent); with
calibration and its reading in experiments/README.md (3 init seeds, jax 0.10.2).
"""

import ml_collections

from abkd_jax import config as configs

_METHODS = ("bdkd", "dml", "independent")


def _kl(name: str) -> dict:
    return dict(fn="on_logits", temperature=1.0, temperature_power=2.0, divergence=dict(fn=name))


def _network(method: str, *, learns: str, widths: tuple[int, ...]) -> dict:
    """A convolutional network with the terms that a method gives it."""
    terms = dict(task=dict(fn="cross_entropy", weight=1.0))
    if method == "bdkd" and learns == "student":
        gated = dict(fn="entropy_gated", gain=2.0, forward=_kl("forward_kl"))
        terms["distill"] = gated | dict(reverse=_kl("reverse_kl"), weight=1.0)
    elif method != "independent":
        # What BD-KD calls the teacher's reverse KL, from the student's side.
        terms["distill"] = _kl("forward_kl") | dict(weight=1.0)
    optimizer = dict(fn="sgd", learning_rate=dict(fn="cosine", start=0.05, end=0.0))
    optimizer |= dict(momentum=0.9, weight_decay=5e-4)
    model = dict(fn="cnn", widths=widths, batch_norm=True)
    return dict(model=model, optimizer=optimizer, terms=terms)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.config.arguments` for the argument.

    Of it, `runlocal` and `method=bdkd`, `dml` or `independent` belong to this config.
    """
    options = configs.parse(argument)
    method = options.pop("method", {"fn": "bdkd"})
    method = method.get("fn") if isinstance(method, dict) else method
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; found {method!r}.")
    config = configs.defaults()
    config.update(
        data=dict(fn="tfds", name="fashion_mnist", validation=5000, data_dir="", download=False),
        teacher=_network(method, learns="teacher", widths=(32, 64, 128)),
        student=_network(method, learns="student", widths=(8, 16, 32)),
        phases=dict(together=dict(learn=("teacher", "student"), select="student")),
        num_steps=4290,
        checkpoint_every=429,
    )
    if options.pop("runlocal", False):
        config.data = dict(fn="digits", validation=297, shape=(28, 28, 1))
        config.update(batch_size=32, num_steps=8, checkpoint_every=4, log_every=2)
    return configs.apply(config, options)
