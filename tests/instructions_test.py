"""configs/instructions.py end to end: small folders, a file of instructions, a corpus."""

import functools
import importlib.util
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest
import tokenizers
from jax import numpy as jnp

from abkd_jax import config as configs
from abkd_jax import load, train_and_evaluate
from abkd_jax.config.build import Builder
from abkd_jax.models import decoder, load_decoder, save_decoder
from abkd_jax.run.responses import opened
from abkd_jax.sources import DATASET
from abkd_jax.types import Outputs, Tokens

PATH = pathlib.Path(__file__).parents[1] / "configs" / "instructions.py"
METHODS = runpy.run_path(str(PATH.with_name("methods.py")))["get_language_methods"](
    batch_size=8, num_steps=6
)
PADDING = 5  # rows of the tables beyond the tokenizer's tokens


def module():
    spec = importlib.util.spec_from_file_location("config_instructions", PATH)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def write_tokenizer(folder):
    """Bytes, and an end of text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<eos>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return len(vocabulary)


def write_decoder(folder, tokenizer, size, seed, **fields):
    """A new decoder of three layers, as a folder."""
    new = decoder(num_classes=size, num_embeddings=size + PADDING, layers=3, heads=2, **fields)
    one = jnp.ones((1, 1), int)
    init = jax.jit(functools.partial(new.init, train=False))
    variables = init(jax.random.key(seed), Tokens(one, one, one))
    save_decoder(folder, new, variables, tokenizer)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The argument's files and folders, by key."""
    root = tmp_path_factory.mktemp("files")
    size = write_tokenizer(root / "tokenizer")
    lines = [{"prompt": f"What comes after {n}?", "response": f"It is {n + 1}."} for n in range(48)]
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "corpus.txt").write_text("After one comes two, and after two comes three. " * 40)
    folders = {
        "teacher": write_decoder(root / "teacher", root / "tokenizer", size, 0, width=32),
        "student": write_decoder(root / "student", root / "tokenizer", size, 1, width=16),
    }
    files = {"train": root / "train.jsonl", "corpus": root / "corpus.txt"}
    return {key: str(path) for key, path in {**folders, **files}.items()}


def config(given, more="", keys=("teacher", "student", "train")):
    """That of the argument, for a few short steps."""
    argument = ",".join([*(f"{key}='{given[key]}'" for key in keys), *filter(None, [more])])
    made = module().get_config(argument)
    with made.unlocked():
        made.data.update(validation=8, test=8, length=192, max_prompt=160)
        if "warm" in made.phases:
            made.phases.warm.num_steps = 6
        made.update(num_steps=6, checkpoint_every=3, log_every=3, batch_size=8, devices=1)
    return made


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_a_student_is_cut_and_distilled_beside_a_corpus(given, tmp_path):
    values = config(given, "layers=(0,2)", keys=given)
    start, _ = load_decoder(given["student"], layers=(0, 2))
    found = train_and_evaluate(values, tmp_path / "run")["networks"]
    assert set(found) == {"teacher", "student"} and found["teacher"]["phase"] is None
    parameters = jax.tree.leaves(load_decoder(given["student"], layers=(0, 2))[1])
    assert found["student"]["parameters"] == sum(x.size for x in parameters)
    warm, distilled = (rows(tmp_path / "run" / x) for x in ("warm", ""))
    terms = {"student/task", "student/lm", "student/distill"}
    assert terms & {*warm[0]} == {"student/task"}
    assert terms & {*distilled[0]} == {"student/lm", "student/distill"}
    score = "validation/student/log_likelihood"
    first, *_, last = [row[score] for row in warm + distilled if score in row]
    assert last > first
    # The test has the responses' tokens alone: "It is 11." and an end.
    assert found["student"]["last"]["count"] == sum(len(f"It is {n}.") + 1 for n in range(9, 17))
    *_, tokenizer, template = opened(str(tmp_path / "run"))  # as respond and samples take it
    assert (tokenizer.size, template) == (257, values.data.template)
    network = load(tmp_path / "run")
    save_decoder(tmp_path / "out", network.module, network.variables, given["student"])
    module, variables = load_decoder(tmp_path / "out")
    assert module.architecture == start.architecture
    jax.tree.map(np.testing.assert_array_equal, variables["params"], network.variables["params"])
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.long
def test_the_labels_alone_need_no_teacher(given, tmp_path):
    found = train_and_evaluate(config(given, "method=sft"), tmp_path)["networks"]
    assert set(found) == {"student"}
    assert found["student"]["last"]["nll"] < np.log(257)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_a_plan(given, method):
    """Beside a corpus, whose rows are nobody's to write."""
    keys = given if method != "sft" else ("student", "train")
    made = config(given, f"method={method}", keys=keys)
    plan = configs.resolve(made)
    *warm, distill = (phase.objectives["student"] for phase in plan.phases)
    beside = {"lm"} if "corpus" in keys else set()
    assert [set(terms) for terms in warm] == [{"task"}] * (method != "sft")
    assert set(distill) == {*METHODS[method]["terms"], *beside}
    assert plan.description.num_classes == 257
    group, source = made.phases.distill.get("source"), METHODS[method].get("source")
    assert (group and group.to_dict()) == (source and source | {"where": "instructions"})
    assert [phase.source for phase in plan.phases[:-1]] == [DATASET] * len(warm)
    assert bool(plan.phases[-1].source.refill) == bool(source)


def test_beside_a_corpus_a_source_of_the_argument_leaves_it_alone(given):
    made = config(given, "source=generated('student')", keys=given)
    assert made.phases.distill.source.where == "instructions"


def test_a_batch_has_as_much_of_a_corpus_as_of_instructions(given):
    sizes = []
    for keys in (("teacher", "student", "train"), given):
        argument = ",".join(f"{key}='{given[key]}'" for key in keys)
        sizes.append(module().get_config(argument).batch_size)
    assert sizes == [32, 64]  # of which data.text mixes as many rows of each


def test_beside_a_corpus_the_data_s_own_text_may_be_named(given):
    made = config(given, "method=gkd,source=dataset", keys=given)
    assert configs.resolve(made).phases[-1].source == DATASET


def test_a_source_of_the_argument_is_that_of_the_last_phase(given):
    made = config(given, "method=gkd,source=generated('teacher',.25,refill_every=2)")
    expected = dict(fn="generated", by="teacher", fraction=0.25, refill_every=2)
    assert made.phases.distill.source.to_dict() == expected and "source" not in made.phases.warm
    assert configs.resolve(made).phases[1].source.refill_every == 2


def test_every_method_is_a_loss_of_no_less_than_0(given):
    """Of its numbers as the config has them; wsd is the mean of both KLs."""
    rng = np.random.default_rng(0)
    student, teacher = (Outputs(logits=jnp.float32(rng.normal(size=(4, 7)))) for _ in range(2))
    how = dict(field="student.terms", learner="student", networks=("student", "teacher"))
    found = {}
    for method in METHODS:
        terms = config(given, f"method={method}").student.terms.to_dict()
        (term,) = Builder((), 10).objective(terms, **how).values()
        batch = {"labels": np.arange(4)}
        found[method] = float(term.weight * jnp.mean(term.loss(student, teacher, batch)))
    assert all(value > 0 for value in found.values())
    assert found["wsd"] == pytest.approx((found["kd"] + found["reverse_kl"]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "argument,message",
    [
        ("", r"^configs/instructions.py needs teacher, student, train: see its head\.$"),
        ("student='{student}',train='{train}'", r"needs teacher: see its head\.$"),
        ("student=gpt2", r"^student must be a path in quotation marks, student='\.\.\.'\.$"),
        ("teacher='{teacher}',train='{train}'", r"needs student: see its head\.$"),
        ("{all},method=distil", r"^method must be one of sft, kd, .*; found 'distil'\.$"),
        ("{all},method=3", r"^method must be one of sft, .*; found 3\.$"),
        ("{all},layers=(0,3)", r"layers must be of the folder's 0 to 2, ascending; found \(0, 3\)"),
        ("{all},layers=(2,0)", r"layers must be of the folder's 0 to 2, ascending; found \(2, 0\)"),
        ("{all},layers=2", r"layers must be numbers in brackets, \(0, 2, 4\); found 2\.$"),
        ("teacher=3", r"^teacher must be a path in quotation marks, teacher='\.\.\.'\.$"),
        ("{all},teacher=3", "gives 'teacher' twice"),
        (
            "teacher='none',student='{student}',train='{train}'",
            r"^teacher.model: none is no folder of a model: it has no config.json",
        ),
        (
            "teacher='{teacher}',student='{student}',train='none.jsonl'",
            r"data.train must be a file",
        ),
        (
            "{all},adapter=lora(rank=0,lora_alpha=1.)",
            r"^student.adapter: lora.rank must be at least 1",
        ),
        ("{all},corpus='none.txt'", r"data.corpus must be a file"),
        ("{all},gamma=2", "has 'gamma', which is no number of student.terms.distill"),
        ("{all},method=sft,alpha=.5", "has 'alpha', but student.terms.distill, whose .*, is none"),
    ],
)
def test_refusals(given, argument, message):
    every = ",".join(f"{key}='{given[key]}'" for key in ("teacher", "student", "train"))
    with pytest.raises(ValueError, match=message) as refused:
        configs.resolve(module().get_config(argument.format(all=every, **given)))
    assert "\n" not in str(refused.value)
