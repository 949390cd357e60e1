"""A run on streams: several steps a call, the time that it waits for data, and its resumption."""

import json

import jax
import numpy as np
import pytest

from abkd_jax import load
from abkd_jax.run.log.writer import read
from abkd_jax.run.loop import train_and_evaluate

PAIRS = [{"prompt": "?" * (i % 5), "response": f"{i % 4}" * (1 + i % 7)} for i in range(44)]


def run(folder, name, *, steps_per_call, num_steps=14, devices=1):
    """A decoder that learns from a file of text which is streamed; in folder/name."""
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    text = dict(fn="text", train=str(path), test=str(path), validation=0, tokenizer="bytes")
    text |= dict(length=16, stream="always", cache_dir=str(folder / "cache"))
    student = dict(model=dict(fn="decoder", width=8, layers=1, heads=2, mlp_width=16))
    student |= dict(optimizer=dict(fn="sgd", learning_rate=0.1, momentum=0.9))
    student |= dict(terms=dict(task=dict(fn="cross_entropy", weight=1.0)))
    config = dict(data=text, task=dict(fn="language"), student=student)
    config |= dict(phases=dict(train=dict(learn=("student",), num_steps=num_steps)))
    config |= dict(batch_size=8, log_every=7, checkpoint_every=7, devices=devices)
    config |= dict(steps_per_call=steps_per_call)
    return train_and_evaluate(config, folder / name)["networks"]["student"]


def parameters(workdir):
    return jax.tree.map(np.asarray, load(workdir).variables)


@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.long)])
def test_steps_of_one_call_are_steps(tmp_path, devices):
    """Of 14 steps, over several epochs; calls of 3 leave single steps before each evaluation."""
    found = []
    for length in (1, 3):
        run(tmp_path, f"{length}", steps_per_call=length, devices=devices)
        rows = [
            row["student/loss"] for row in read(tmp_path / f"{length}") if "student/loss" in row
        ]
        shares = [row.get("time/waiting_for_data") for row in read(tmp_path / f"{length}")]
        assert len(rows) == 2 and all(x is None or 0 < x < 1 for x in shares) and any(shares)
        found.append((parameters(tmp_path / f"{length}"), rows))
    for one, three in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, three, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_it_resumes_bitwise(tmp_path):
    expected = run(tmp_path, "whole", steps_per_call=3)
    run(tmp_path, "parts", steps_per_call=3, num_steps=7)
    found = run(tmp_path, "parts", steps_per_call=3)
    assert found["sha256"] == expected["sha256"] and found["last"] == expected["last"]
