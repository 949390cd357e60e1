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

from abkd_jax import arguments

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
        # What BD-KD calls the teacher's reverse KL, from the student's side: see DESIGN.
        terms["distill"] = _kl("forward_kl") | dict(weight=1.0)
    optimizer = dict(name="sgd", learning_rate=dict(fn="cosine", start=0.05, end=0.0))
    optimizer |= dict(momentum=0.9, weight_decay=5e-4)
    return dict(model="cnn", widths=widths, batch_norm=True, optimizer=optimizer, terms=terms)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see `abkd_jax.arguments` for the argument.

    Of it, `runlocal` and `method=bdkd`, `dml` or `independent` belong to this config.
    """
    options = arguments.parse(argument)
    method = options.pop("method", {"fn": "bdkd"})
    method = method.get("fn") if isinstance(method, dict) else method
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}; found {method!r}.")
    config = ml_collections.ConfigDict(
        dict(
            mode="online",
            data=dict(name="fashion_mnist", validation=5000, data_dir="", download=False),
            teacher=_network(method, learns="teacher", widths=(32, 64, 128)),
            student=_network(method, learns="student", widths=(8, 16, 32)),
            batch_size=128,
            num_steps=4290,
            checkpoint_every=429,
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
    if isinstance(options.get("runlocal"), bool) and options.pop("runlocal"):
        config.data = dict(name="digits", validation=297, shape=(28, 28, 1))
        config.update(batch_size=32, num_steps=8, checkpoint_every=4, log_every=2)
    if method == "independent" and not options:
        return config.lock()
    return arguments.apply(config, options)
