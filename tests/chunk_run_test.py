"""Runs and sweeps of networks that leave their logits unformed: as of those that form them."""

import json

import numpy as np
import pytest

from abkd_jax.config.schema import resolve
from abkd_jax.run import phases
from abkd_jax.run.loop import train_and_evaluate
from abkd_jax.sweep.members import sweep

SGD = dict(fn="sgd", learning_rate=0.1)
TASK = dict(fn="cross_entropy", weight=1.0, where="labelled")
KL = dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"), other="teacher")


def config(forms=False, distill=KL, **changes):
    """A teacher, and two learners that see it at once."""
    model = dict(fn="unformed_network.unformed_mlp", forms=forms)
    network = dict(model=model, optimizer=SGD, terms=dict(task=TASK))
    student = network | dict(terms=dict(task=TASK, distill=distill))
    together = dict(learn=("a", "b"), see=("teacher",), select="a")
    made = dict(
        data=dict(fn="digits", validation=200),
        plugins=("unformed_network",),
        teacher=network,
        a=student,
        b=student | dict(init_seed=1),
        phases=dict(first=dict(learn=("teacher",), num_steps=4), together=together),
        batch_size=400,  # so that examples repeat, and the teacher's outputs are kept
        num_steps=4,
        checkpoint_every=4,
        log_every=2,
        devices=1,
    )
    return made | changes


def chunk_of(folder):
    return json.loads((folder / "config.json").read_text())["config"]["chunk"]


def scores_of(result):
    networks = result["networks"]
    return {name: networks[name]["last"] for name in networks}


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, dict):
            close(value, expected[name])
        elif isinstance(value, float):
            np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.long
def test_a_run_in_chunks_is_that_of_all_rows_at_once(tmp_path, capsys):
    """The chunk stays what it was as the run began, also where the config leaves it open."""
    formed = train_and_evaluate(config(forms=True), tmp_path / "formed")
    run = train_and_evaluate(config(chunk=150), tmp_path / "run")
    assert capsys.readouterr().err.count("outputs of teacher: computed once") == 2
    close(scores_of(run), scores_of(formed))
    assert [chunk_of(tmp_path / x) for x in ("formed", "run", "run/first")] == [0, 150, 150]
    train_and_evaluate(config(num_steps=6), tmp_path / "run")
    assert chunk_of(tmp_path / "run") == 150
    with pytest.raises(ValueError, match=r"these differ: chunk \(150 there, 6 here\)\."):
        train_and_evaluate(config(num_steps=6, chunk=6), tmp_path / "run")


def test_a_chunk_that_is_left_open(tmp_path):
    """128 rows on a CPU; none where a loss couples the batch; then a number is refused."""
    coupled = dict(fn="sinkhorn", weight=1.0, other="teacher")
    for expected, made in ((128, config()), (0, config(forms=True)), (0, config(distill=coupled))):
        with phases.opened(resolve(made), tmp_path / "run") as run:
            assert run.plan.config["chunk"] == expected
    with pytest.raises(ValueError, match=r"^the loss of term 'distill' must be of each row alone"):
        resolve(config(distill=coupled, chunk=8))


@pytest.mark.long
def test_a_sweep_in_chunks(tmp_path):
    over = {"a.terms.distill.weight": [0.5, 2.0]}
    rows, expected = (
        sweep(config(forms, chunk=150), tmp_path / str(forms), over=over) for forms in (False, True)
    )
    for found, other in zip(rows, expected, strict=True):
        close(found, other)
