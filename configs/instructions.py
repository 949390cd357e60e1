"""Instruction following: a decoder from a Hugging Face folder learns responses from a larger one.

Paper: Wang et al., "ABKD", ICML 2025, https://arxiv.org/abs/2505.04560, its experiments on GPT-2
(XL to base) and Dolly: three epochs on the labels alone, of which the best by validation goes on,
then twenty of distillation without a label term. Published selection and evaluation sample
responses and compare them by Rouge-L; here the log-likelihood of held-out responses selects.
Command: python -m abkd_jax.main --config=configs/instructions.py:ARGUMENT --workdir=runs/dolly
Time: not measured.
Number: not measured.

The argument is "teacher='DIR',student='DIR',train='FILE'", and may have more. teacher and student
are folders with config.json and safetensors, or the teacher one of `abkd_jax.cache_teacher`; train
is a file of JSON Lines with prompt and response, or messages; corpus, a file of text for the
paper's language-modelling term; layers=(0, 2, 4), which layers of its folder the student keeps;
adapter=lora(rank=16, lora_alpha=64.), that it learns low-rank factors alone; method, one of
`get_language_methods` in configs/methods.py; source=NAME(...), where its text comes from; and any
number of the student's distill term. method=sft is twenty epochs on the labels and needs no
teacher. Data and steps are those for Dolly, of whose lines the first 1,000 validate and the next
500 test; with a corpus each batch has as many rows of that besides. Each number below is also a
flag: --config.data.validation=20.
"""

import pathlib
import runpy
from typing import Any

import ml_collections

from abkd_jax import config as configs
from abkd_jax import data

_FOUND = runpy.run_path(str(pathlib.Path(__file__).with_name("methods.py")))
_METHODS = _FOUND["get_language_methods"]
EPOCH = 357  # steps: Dolly's 11,400 or so training examples in batches of 32
TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """The config; see the head of this file for the argument, to which runlocal belongs, too."""
    options = configs.parse(argument)
    folders = {key: options.pop(key, "") for key in ("teacher", "student", "train", "corpus")}
    layers, method = options.pop("layers", ()), options.pop("method", "abkd")
    adapter, local = options.pop("adapter", None), options.pop("runlocal", False)
    if not isinstance(layers, tuple):
        raise ValueError(f"layers must be numbers in brackets, (0, 2, 4); found {layers!r}.")
    for key, path in folders.items():
        if not isinstance(path, str):
            raise ValueError(f"{key} must be a path in quotation marks, {key}='...'.")
    methods = _METHODS(batch_size=32, num_steps=20 * EPOCH)
    name = configs.method_name(method)
    if not isinstance(name, str) or name not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}; found {name!r}.")
    terms, source = methods[name]["terms"], methods[name].get("source")
    needed = ("student", "train") if name == "sft" else ("teacher", "student", "train")
    missing = [key for key in needed if not folders[key]]
    if missing and not local:
        raise ValueError(f"configs/instructions.py needs {', '.join(missing)}: see its head.")
    labels = dict(task=dict(fn="cross_entropy", weight=1.0))
    if folders["corpus"]:
        labels["task"]["where"] = "instructions"
        terms = {key: {"where": "instructions"} | term for key, term in terms.items()}
        source = source and source | {"where": "instructions"}
        terms["lm"] = dict(fn="cross_entropy", weight=1.0, where="corpus")
        given = options.get("source")
        if isinstance(given, dict) and given["fn"] != "dataset":
            given.setdefault("where", "instructions")
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
        batch_size=64 if folders["corpus"] else 32,  # as many rows of the corpus as instructions
        num_steps=20 * EPOCH,
        checkpoint_every=EPOCH,
        log_every=50,
    )
    if adapter:
        config.student.adapter = adapter
    if source:
        config.phases.distill = config.phases.distill.to_dict() | dict(source=source)
    if name == "sft":
        config.phases = dict(distill=dict(learn=("student",)))
        del config["teacher"]
    if local:
        _shrink(config)
    return configs.apply(config, options, beside=None)


def _network(folder: str, layers: tuple[int, ...] = ()) -> dict[str, Any]:
    if data.is_top_cache(folder):
        return dict(model=dict(fn="cached", path=folder))
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
    if "warm" in config.phases:
        config.phases.warm.num_steps = 8
    config.update(batch_size=8, num_steps=10, checkpoint_every=5, log_every=5)
    config.data_seed = 776  # whose ten topics to test are short
