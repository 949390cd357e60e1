"""What networks write after held-out prompts in a run: their Rouge-L selects, a page shows them."""

import json

import numpy as np
import pytest
from instructions_test import write_tokenizer

from abkd_jax import Outputs, train_and_evaluate
from abkd_jax import data as datasets
from abkd_jax.config import resolve
from abkd_jax.metrics.text import rouge_l
from abkd_jax.run.responses import opened
from abkd_jax.sweep import sweep

pytestmark = pytest.mark.long
LENGTH = 16


def config(folder, **changes):
    """A decoder that learns a line of words by heart."""
    path = folder / "train.txt"
    path.write_text("one two six " * 60)
    model = dict(fn="decoder", width=32, layers=1, heads=2, mlp_width=32)
    optimizer = dict(fn="adam", learning_rate=1e-2)
    terms = dict(task=dict(fn="cross_entropy", weight=1.0))
    return (
        dict(
            task=dict(fn="language", responses=5, select="rouge_l"),
            data=dict(
                fn="text",
                train=str(path),
                validation=6,
                test=6,
                tokenizer="bytes",
                length=LENGTH,
                cache_dir=str(folder / "cache"),
            ),
            student=dict(model=model, optimizer=optimizer, terms=terms),
            phases=dict(alone=dict(learn=("student",))),
            batch_size=8,
            num_steps=60,
            checkpoint_every=20,
            log_every=20,
            devices=1,
        )
        | changes
    )


def test_the_best_step_is_that_of_the_most_and_texts_are_shown(tmp_path):
    values, workdir = config(tmp_path), tmp_path / "run"
    result = train_and_evaluate(values, workdir)
    with np.load(workdir / "examples.npz") as arrays:
        own, references = (arrays[key].tolist() for key in ("responses/student", "references"))
        prompts = arrays["prompts"].tolist()
    assert len(own) == len(references) == len(prompts) == 5
    test = resolve(values).data().test.inputs.ids
    for row in range(5):
        text = bytes(np.asarray(test[row]).tolist()).decode()
        assert (prompts[row], references[row]) == (text[: LENGTH // 2], text[LENGTH // 2 :])
        assert 0 < len(own[row]) <= LENGTH // 2
    student = result["networks"]["student"]
    expected = rouge_l(own, [[x] for x in references]).mean()
    assert student["last"]["rouge_l"] == pytest.approx(expected) and expected > 0.2
    key = "validation/student/rouge_l"
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row[key] for row in rows if key in row}
    assert list(found) == [20, 40, 60] and len({*found.values()}) > 1
    assert student["best"]["score"] == pytest.approx(max(found.values()))
    assert found[student["best"]["step"]] == max(found.values())
    assert result["score"] == "rouge_l"
    page = (workdir / "report.md").read_text()
    assert "## Samples" in page and "| the data | `" in page and "| `student` | `" in page
    assert f"{100 * expected:.2f}" in page


def test_a_run_that_goes_on_writes_the_same(tmp_path):
    whole = train_and_evaluate(config(tmp_path), tmp_path / "whole")
    train_and_evaluate(config(tmp_path, num_steps=40), tmp_path / "parted")
    parted = train_and_evaluate(config(tmp_path), tmp_path / "parted")
    assert parted["networks"] == whole["networks"]


def test_without_them_there_is_no_such_number(tmp_path):
    values = config(tmp_path, task=dict(fn="language"), num_steps=20)
    found = train_and_evaluate(values, tmp_path / "run")["networks"]["student"]["last"]
    assert "rouge_l" not in found
    assert "Samples" not in (tmp_path / "run" / "report.md").read_text()


def test_a_sweep_has_none(tmp_path):
    over = {"student.optimizer.learning_rate": [0.1, 0.2]}
    with pytest.raises(ValueError, match=r"task\.responses must be 0 in a sweep"):
        sweep(config(tmp_path), tmp_path / "sweep", over=over)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (dict(responses=-1), "task.responses must be at least 0; found -1"),
        (dict(select="rouge_l"), "task.responses must be at least 1, to select by rouge_l"),
        (dict(select="nll"), "task.select must be one of log_likelihood, rouge_l; found 'nll'"),
    ],
)
def test_refused(task, sentence, tmp_path):
    values = config(tmp_path) | dict(task=dict(fn="language") | task)
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        resolve(values)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(pack=True), "data.pack must be False where task.responses are written; found True."),
        (
            dict(loss_on="all"),
            "data.loss_on must be 'response' where a network writes responses (of documents all "
            "counts all the same); found 'all'.",
        ),
    ],
)
def test_data_that_are_refused(changes, sentence, tmp_path):
    values = config(tmp_path)
    values["data"] |= changes
    with pytest.raises(ValueError) as refused:
        resolve(values)
    assert f"{refused.value}" == sentence


def test_a_teacher_that_is_known_by_its_outputs_alone_is_refused(tmp_path):
    """It writes nothing; that is found before a step, and not when the run would end."""
    values, path = config(tmp_path), tmp_path / "outputs.npz"
    parts = [getattr(resolve(values).data(), name).inputs for name in ("full", "test")]
    nothing = [Outputs(logits=np.zeros((*x.ids.shape, 257), np.float32)) for x in parts]
    datasets.save_outputs(path, *zip(parts, nothing, strict=True))
    values["teacher"] = dict(model=dict(fn="cached", path=str(path)))
    values["phases"]["alone"]["see"] = ("teacher",)
    with pytest.raises(ValueError, match=r"^task\.responses must be 0 where teacher is no decoder"):
        resolve(values)


def test_the_reference_of_a_conversation_is_its_first_answer(tmp_path):
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'][0] }}:"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}|{% endfor %}"
    )
    turns = [("user", "ask"), ("assistant", "answer"), ("user", "more"), ("assistant", "no")]
    line = json.dumps({"messages": [dict(role=role, content=said) for role, said in turns]})
    values = config(tmp_path, num_steps=1, checkpoint_every=1)
    path = tmp_path / "talk.jsonl"
    path.write_text(f"{line}\n" * 30)
    values["data"] |= dict(train=str(path), tokenizer=str(folder), length=40)
    train_and_evaluate(values, tmp_path / "run")
    with np.load(tmp_path / "run" / "examples.npz") as arrays:
        assert arrays["prompts"].tolist() == ["u:ask|a:"] * 5
        assert arrays["references"].tolist() == ["answer"] * 5
    assert opened(str(tmp_path / "run"))[-1] == "u:{prompt}|a:"  # and not data.template
    path.unlink()
    assert opened(str(tmp_path / "run"))[-1] == "{prompt}"
