"""Instruction following: a decoder from a Hugging Face folder learns responses from a larger one.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, its experiments on GPT-2
(XL to base) and Dolly: three epochs on the labels alone, of which the best by validation goes on,
then twenty of distillation without a label term. Published selection and evaluation sample
responses and compare them by Rouge-L; here the log-likelihood of held-out responses selects.
Command: python -m abkd_jax.main --config=configs/instructions.py:ARGUMENT --workdir=runs/dolly
Time: not measured.
Number: not measured.

The argument is "teacher='DIR',student='DIR',train='FILE'", and may have more. teacher and student
are folders with config.json and safetensors; train is a file of JSON Lines with prompt and
response, or messages; corpus, a file of text for the paper's language-modelling term;
layers=(0, 2, 4), which layers of its folder the student keeps; method, one of `get_methods`; and
any number of the student's distill term. method=sft needs no teacher. Data and steps are those for
Dolly, of whose lines the first 1,000 validate and the next 500 test; each number below is also a
flag: --config.data.validation=20.
"""

from typing import Any

import ml_collections

from abkd_jax import config as configs

EPOCH = 357  # steps: Dolly's 11,400 or so training examples in batches of 32
TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


def get_methods() -> dict[str, dict[str, Any] | None]:
    """{method: divergence, at temperature 1}; None for the labels alone.

    Numbers are those of the paper's code for GPT-2; "our reading" marks what is not public.
    """
    return {
        "sft": None,
        "kd": dict(fn="forward_kl"),  # Hinton et al., 2015
        "reverse_kl": dict(fn="reverse_kl"),  # as in Gu et al., "MiniLLM", 2024
        "js": dict(fn="jensen_shannon", teacher_weight=0.1),
        "tvd": dict(fn="total_variation"),  # Wen et al., "f-divergence minimization", 2023
        "wsd": dict(fn="jeffreys"),  # half of it: the weight below
        # Ko et al., "DistiLLM", 2024.
        "skew_forward_kl": dict(fn="skew_forward_kl", skew=0.1),
        "skew_reverse_kl": dict(fn="skew_reverse_kl", skew=0.1),
        "akl": dict(fn="adaptive_kl", head_mass=0.5),  # Wu et al., 2025
        # Wang et al., "AlphaNet", 2021; its own numbers, our reading.
        "alphanet": dict(fn="alphanet", alpha_min=-1.0, alpha_max=1.0, clip=5.0),
        "abkd": dict(fn="alpha_beta", alpha=0.2, beta=0.7),
    }


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see the head of this file for the argument, to which runlocal belongs, too."""
    options = configs.parse(argument)
    folders = {key: options.pop(key, "") for key in ("teacher", "student", "train", "corpus")}
    layers, method = options.pop("layers", ()), options.pop("method", "abkd")
    local = options.pop("runlocal", False)
    if not isinstance(layers, tuple):
        raise ValueError(f"layers must be numbers in brackets, (0, 2, 4); found {layers!r}.")
    for key, path in folders.items():
        if not isinstance(path, str):
            raise ValueError(f"{key} must be a path in quotation marks, {key}='...'.")
    methods = get_methods()
    name = method["fn"] if isinstance(method, dict) else method
    if name not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}; found {name!r}.")
    needed = ("student", "train") if name == "sft" else ("teacher", "student", "train")
    missing = [key for key in needed if not folders[key]]
    if missing and not local:
        raise ValueError(f"configs/instructions.py needs {', '.join(missing)}: see its head.")
    labels = dict(task=dict(fn="cross_entropy", weight=1.0))
    terms = _terms(methods[name], weight=0.5 if name == "wsd" else 1.0)
    if folders["corpus"]:
        labels["task"]["where"] = "instructions"
        terms = {key: term | {"where": "instructions"} for key, term in terms.items()}
        terms["lm"] = dict(fn="cross_entropy", weight=1.0, where="corpus")
    config = configs.defaults()
    config.update(
        task=dict(fn="language"),
        data=dict(
            fn="text",
            train=folders["train"],
            validation=1000,
            test=500,
            tokenizer=folders["student"],
            length=512,
            max_prompt=256,
            template=TEMPLATE,
            corpus=folders["corpus"],
            cache_dir="",
        ),
        teacher=_network(folders["teacher"]),
        student=_network(folders["student"], layers) | dict(optimizer=_adamw(5e-4), terms=terms),
        phases=dict(
            warm=dict(learn=("student",), num_steps=3 * EPOCH, student=dict(terms=labels)),
            distill=dict(learn=("student",), see=("teacher",), start="best"),
        ),
        batch_size=32,
        num_steps=20 * EPOCH,
        checkpoint_every=EPOCH,
        log_every=50,
    )
    if name == "sft":
        config.phases.distill.see = ()
        del config["teacher"]
    if local:
        _shrink(config)
    return configs.apply(config, options, beside=None)


def _terms(divergence: dict[str, Any] | None, weight: float) -> dict[str, Any]:
    if divergence is None:
        return dict(task=dict(fn="cross_entropy", weight=1.0))
    distill = dict(fn="on_logits", weight=weight, temperature=1.0, divergence=divergence)
    return dict(distill=distill)


def _network(folder: str, layers: tuple[int, ...] = ()) -> dict[str, Any]:
    given = dict(fn="hugging_face", folder=folder, layers=tuple(layers))
    return dict(model=dict(given), weights=dict(given))


def _adamw(rate: float) -> dict[str, Any]:
    return dict(
        fn="adamw",
        learning_rate=dict(fn="cosine", start=rate, end=1e-7),
        weight_decay=0.01,
        decay_all=False,
        clip_norm=1.0,
    )


def _shrink(config: ml_collections.ConfigDict) -> None:
    """Bytes of Python's help, and new decoders, of which the teacher learns first."""
    small = dict(fn="decoder", width=16, layers=1, heads=2, mlp_width=32)
    config.data = dict(fn="topics", validation=2, length=32)
    learned = {key: config.student[key] for key in ("optimizer", "terms")}
    config.student = dict(model=small, **learned)
    if "teacher" in config:
        labels = dict(task=dict(fn="cross_entropy", weight=1.0))
        large = small | dict(width=32, layers=2)
        config.teacher = dict(model=large, optimizer=_adamw(1e-3), terms=labels)
        warm, distill = config.phases.warm, config.phases.distill
        config.phases = dict(
            teacher=dict(learn=("teacher",), num_steps=8), warm=warm, distill=distill
        )
    config.phases.warm.num_steps = 8
    config.update(batch_size=8, num_steps=10, checkpoint_every=5, log_every=5)
    config.data_seed = 776  # whose ten topics to test are short
