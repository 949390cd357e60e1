"""Vocabularies that differ: by rows of padding they are told, by tokens they are refused."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from jax import numpy as jnp

from abkd_jax import Tokens, load, models, train_and_evaluate
from abkd_jax.config.schema import resolve
from abkd_jax.models import save_decoder
from abkd_jax.run import phases
from abkd_jax.types import named_leaves

WORDS = [f"w{i}" for i in range(20)]
TASK = dict(task=dict(fn="cross_entropy", weight=1.0))
KL = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))
SGD = dict(fn="sgd", learning_rate=0.1)


def write_folder(folder, words=(), rows=24, config=True):
    """A folder of a decoder with so many rows, and with a tokenizer of these words and an end."""
    if config:
        module = models.decoder(num_classes=rows, width=8, layers=1, heads=2, mlp_width=8)
        one = jnp.zeros((1, 2), jnp.int32)
        init = lambda: module.init(jax.random.key(0), Tokens(one, one, one), train=False)  # noqa: E731
        normal = np.random.default_rng(0).normal
        variables = jax.tree.map(lambda x: normal(size=x.shape), jax.eval_shape(init))
        variables = jax.tree.map(np.float32, variables)
        save_decoder(folder, module, variables)
    folder.mkdir(exist_ok=True)
    if words:
        vocabulary = {word: i for i, word in enumerate([*words, "<eos>"])}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return str(folder)


def config(tmp_path, teacher, student, tokenizer):
    lines = [json.dumps(dict(prompt="w1 w2", response=f"w{i}")) + "\n" for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    network = lambda folder: dict(model=dict(fn="hugging_face", folder=folder))  # noqa: E731
    weights = dict(weights=dict(fn="hugging_face", folder=teacher))
    files = dict(train=str(tmp_path / "train.jsonl"), validation=0, test=1, tokenizer=tokenizer)
    return dict(
        task=dict(fn="language"),
        data=dict(fn="text", length=4, **files),
        teacher=network(teacher) | weights,
        student=network(student) | dict(terms=dict(distill=KL), optimizer=SGD),
        phases=dict(distill=dict(learn=("student",), see=("teacher",))),
        num_steps=2,
        batch_size=8,
        devices=1,
    )


def test_padding_is_told(tmp_path, capsys):
    """Rows beyond the tokens that exist, of either network."""
    folders = [write_folder(tmp_path / f"{rows}", WORDS, rows) for rows in (1024, 21)]
    plan = resolve(config(tmp_path, *folders, tokenizer=folders[1]))
    with phases.opened(plan, tmp_path / "run"):
        told = capsys.readouterr().err.splitlines()
    line = "teacher: 1,024 rows for 21 tokens: the others are padding and take no part"
    assert [x for x in told if "rows for" in x] == [line]


def test_rows_of_padding_are_found_within_other_modules():
    module = models.decoder(num_classes=5, num_embeddings=8, width=4, layers=1, heads=2)
    assert models.num_embeddings(module) == 8
    assert models.num_embeddings(models.projected(module, hidden=3)) == 8
    assert models.num_embeddings(models.mlp(num_classes=5, widths=(2,))) == 0
    assert models.num_embeddings(None) == 0


OTHER = [*WORDS[:16], *WORDS[:15:-1]]  # of 20 words and an end, 16 + 1 stand where they stood


def test_folders_of_other_tokens_are_refused(tmp_path):
    same = write_folder(tmp_path / "same", WORDS)
    other = write_folder(tmp_path / "other", OTHER)
    larger = write_folder(tmp_path / "larger", [*WORDS, "more"])
    alone = write_folder(tmp_path / "alone", WORDS, config=False)
    silent = write_folder(tmp_path / "silent")
    cases = [
        ((other, same, same), "teacher", same, other, (21, 21, 17)),
        ((other, same, alone), "teacher", alone, other, (21, 21, 17)),
        ((same, larger, same), "student", same, larger, (21, 22, 20)),
    ]
    for folders, name, first, second, (size, found, shared) in cases:
        with pytest.raises(ValueError) as refused:
            resolve(config(tmp_path, *folders))
        assert f"{refused.value}" == (
            f"{name}.model.folder must have the tokenizer of data.tokenizer, {size} tokens of "
            f"{first!r}; found {found} tokens of {second!r}, of which {shared} are the same with "
            "the same id."
        )
    for folders in ((same, same, same), (silent, same, same), (silent, silent, alone)):
        assert resolve(config(tmp_path, *folders)).networks


def test_data_without_files_are_judged_by_their_bytes(tmp_path):
    folder = write_folder(tmp_path / "words", WORDS, rows=300)
    given = config(tmp_path, folder, folder, folder)
    with pytest.raises(ValueError, match="257 tokens of 'bytes'; found 21 tokens"):
        resolve(given | dict(data=dict(fn="topics", validation=1, length=8)))


# --- bfloat16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["float32", "bfloat16"])
def test_a_frozen_network_is_as_its_model_says(tmp_path, read):
    """Whatever type its weights are read in."""
    folder = write_folder(tmp_path / "words", WORDS)
    given = config(tmp_path, folder, folder, folder)
    given["teacher"]["model"]["param_dtype"] = "bfloat16"
    given["teacher"]["weights"]["param_dtype"] = read
    with phases.opened(resolve(given), tmp_path / "run") as run:
        teacher = phases.ready(run)["teacher"]
        student = phases.learners_of(run, run.plan.phases[0], {})["student"]
    for state, dtype in ((teacher, jnp.bfloat16), (student, jnp.float32)):
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(dtype)}
    found = named_leaves(teacher.params)
    _, stored = models.load_decoder(folder)
    for path, x in named_leaves(stored["params"]).items():
        assert np.array_equal(found[path], x.astype(jnp.bfloat16))


@pytest.mark.long
def test_a_run_with_a_teacher_in_bfloat16(tmp_path):
    """The teacher is that in float32 but for rounding; the student stays in float32."""
    folder = write_folder(tmp_path / "words", WORDS)
    scores = {}
    for dtype in ("float32", "bfloat16"):
        given = config(tmp_path, folder, folder, folder)
        given["teacher"]["model"]["param_dtype"] = dtype
        result = train_and_evaluate(given, tmp_path / dtype)
        scores[dtype] = result["networks"]["teacher"]["last"]["nll"]
        _, variables, _ = load(tmp_path / dtype)
        assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert scores["bfloat16"] == pytest.approx(scores["float32"], rel=2e-2)
    assert scores["bfloat16"] != scores["float32"]
