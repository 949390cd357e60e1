"""configs/text.py end to end: what it learns, says and leaves, and all ways that say the same."""

import functools
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import data, load, train_and_evaluate
from abkd_jax.models import load_decoder, save_decoder
from abkd_jax.run.responses import opened
from abkd_jax.sweep import sweep
from abkd_jax.train.checkpoint import FOLDER, Checkpoints, digest
from abkd_jax.types import Tokens

pytestmark = pytest.mark.long
PATH = pathlib.Path(__file__).parents[1] / "configs" / "text.py"
ANALYSIS = ("mass_flow", "gradient_cosines")


def config(**changes):
    """`runlocal` on one device, unless changed."""
    spec = importlib.util.spec_from_file_location("config_text", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config("runlocal")
    with made.unlocked():
        made.update(dict(devices=1) | changes)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run of the config, and its result."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    values = config(analysis=ANALYSIS)
    with values.unlocked():
        values.student.terms.task = dict(fn="cross_entropy", weight=0.1)
    return workdir, train_and_evaluate(values, workdir)


def student(whole, **changes):
    """The student alone, of the teacher of that run, for a few steps."""
    values = config(num_steps=4, checkpoint_every=4, log_every=2, **changes)
    with values.unlocked():
        values.teacher.weights = dict(fn="run", workdir=str(whole[0] / "teacher"))
        del values.phases["teacher"], values.phases["baseline"], values["baseline"]
    return values


@pytest.fixture(scope="module")
def alone(whole):
    return train_and_evaluate(student(whole), whole[0].parent / "alone")


def test_a_network_of_a_run_is_opened_by_its_name(whole):
    """And without one that by which the run selects."""
    for name, expected in ((f"{whole[0]}", "student"), (f"{whole[0]}@student", "student")):
        found, own = opened(name)[1], load(whole[0], expected).variables
        assert digest(found["params"]) == digest(own["params"])
    with pytest.raises(ValueError, match=r"trained .*; found name 'tutor'"):
        opened(f"{whole[0]}@tutor")


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def close(result, expected):
    """The same scores of the student, within rounding."""
    found, expected = (x["networks"]["student"]["last"] for x in (result, expected))
    for name in ("nll", "perplexity", "entropy"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    pairs = (x["pairs"]["teacher"]["kl_at_1"] for x in (found, expected))
    np.testing.assert_allclose(*pairs, rtol=1e-3)


def test_it_learns_and_says_so(whole):
    workdir, result = whole
    for name, found in result["networks"].items():
        assert 3 < found["last"]["nll"] < np.log(257) - 0.5, name  # of all tokens alike
    pairs = result["networks"]["student"]["last"]["pairs"]
    assert pairs.keys() == {"teacher", "baseline"}
    assert 0 < pairs["teacher"]["kl_at_1"] < 0.05  # half a nat and more before it has learned
    page = (workdir / "report.md").read_text()
    nll = result["networks"]["student"]["last"]["nll"]
    assert f"| student | {nll:.4f} |" in page and "| network | NLL (nats/token) |" in page
    assert "## Agreement" in page and "## Tokens" in page and "| context → token |" in page
    names = ["learning_curves", "by_position", "analysis"]
    assert sorted(x.stem for x in workdir.glob("figures/*.png")) == sorted(names)
    assert all(f"](figures/{name}.png)" in page for name in names)


def test_its_analysis_is_of_tokens(whole):
    found = [row for row in rows(whole[0]) if "student/loss" in row]
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    for row in found:
        own = {k.removeprefix("analysis/student/"): x for k, x in row.items() if "analysis/" in k}
        flows = [own[f"mass_flow/to_{group}/teacher"] for group in ("head", "middle", "tail")]
        assert abs(sum(flows)) < 1e-6 < max(flows)
        assert own["mass_flow/to_underestimated/teacher"] > 0 < own["mass_flow/to_target"]
        assert -1 <= own["gradient_cosine/distill/task"] <= 1


@pytest.mark.parametrize(
    "changes",
    [
        dict(chunk=40),  # 256 tokens are no multiple
        dict(micro_batches=2),
        dict(devices=2),
        dict(devices=8, chunk=13),
    ],
    ids=str,
)
def test_another_layout_is_the_same_run(whole, alone, changes, tmp_path):
    close(train_and_evaluate(student(whole, **changes), tmp_path), alone)


def test_split_networks_are_the_same(whole, tmp_path):
    """Of a width at which embeddings and kernels are split over the devices."""
    results = []
    for devices, fsdp in ((1, 1), (4, 2)):
        values = student(whole, devices=devices, fsdp=fsdp)
        with values.unlocked():
            values.student.model.update(width=256, mlp_width=256, layers=2)
        results.append(train_and_evaluate(values, tmp_path / f"{fsdp}"))
    close(*results)


def test_a_seed_is_the_run_with_it_alone(whole, alone, tmp_path):
    found = train_and_evaluate(student(whole, init_seeds=2), tmp_path)["networks"]["student"]
    expected = alone["networks"]["student"]
    assert found["sha256"] == expected["sha256"] and found["last"] == expected["last"]
    first, second = (seed["last"]["nll"] for seed in found["seeds"])
    assert first != second
    np.testing.assert_allclose(found["mean"]["nll"], (first + second) / 2, rtol=1e-9)
    assert load(tmp_path, seed=1).module == load(tmp_path).module


def on_policy(whole, **changes):
    """The same, of which the student itself writes half of the batches."""
    values, source = student(whole, **changes), dict(fn="generated", by="student", fraction=0.5)
    with values.unlocked():
        values.phases.distill = values.phases.distill.to_dict() | dict(source=source)
    return values


def written(workdir):
    with Checkpoints(workdir / FOLDER) as checkpoints:
        found = checkpoints.restore()[1]
    return found.get("carry", found)["source"]  # of members, or of a run


@pytest.fixture(scope="module")
def policy(whole):
    workdir = whole[0].parent / "policy"
    return workdir, train_and_evaluate(on_policy(whole), workdir)


def test_a_student_writes_the_same_on_any_number_of_devices(whole, policy, tmp_path):
    close(train_and_evaluate(on_policy(whole, devices=8), tmp_path), policy[1])
    found, expected = (written(path) for path in (tmp_path, policy[0]))
    np.testing.assert_array_equal(found["rows"]["inputs"]["ids"], expected["rows"]["inputs"]["ids"])
    assert 0 < expected["counts"]["generated"] < expected["counts"]["all"]
    assert digest(found["counts"]) == digest(expected["counts"])
    shares = [row["source/generated"] for row in rows(tmp_path) if "source/generated" in row]
    assert shares[-1] == float(found["counts"]["generated"] / found["counts"]["all"])


def test_text_of_several_steps_is_that_of_one_epoch(whole, tmp_path):
    values = on_policy(whole)
    with values.unlocked():
        values.phases.distill.source.refill_every = 997
    with pytest.raises(ValueError, match="refill_every must be 1, or a divisor of"):
        train_and_evaluate(values, tmp_path)


@pytest.mark.slow
def test_students_of_a_sweep_write_as_those_of_single_runs(whole, policy, tmp_path):
    over = {"student.terms.distill.divergence.alpha": [0.75, 1.0]}
    found = sweep(on_policy(whole), tmp_path, over=over)
    last = policy[1]["networks"]["student"]["last"]
    np.testing.assert_allclose(found[0]["test_nll"], last["nll"], rtol=1e-4)
    assert found[0]["test_nll"] != found[1]["test_nll"]
    ids = written(tmp_path / "members_00000")["rows"]["inputs"]["ids"]
    np.testing.assert_array_equal(ids[0], written(policy[0])["rows"]["inputs"]["ids"])


@pytest.mark.slow
def test_a_sweep_of_alpha_and_beta_is_single_runs(whole, alone, tmp_path, monkeypatch):
    sizes, batches = [], data.evaluation_batches

    def seen(split, size, *args):  # of the networks of all members
        sizes.append(size)
        return batches(split, size, *args)

    monkeypatch.setattr(data, "evaluation_batches", seen)
    at = "student.terms.distill.divergence."
    over = {at + "alpha": [0.75, 1.0], at + "beta": [0.25, 0.0]}
    found = sweep(student(whole), tmp_path / "sweep", over=over)
    assert max(sizes) == 1000 // 32  # a thousand tokens
    assert [(row[at + "alpha"], row[at + "beta"]) for row in found] == [
        (0.75, 0.25), (0.75, 0.0), (1.0, 0.25), (1.0, 0.0),
    ]  # fmt: skip
    values = student(whole)
    with values.unlocked():
        values.student.terms.distill.divergence.update(alpha=1.0, beta=0.0)
    forward = train_and_evaluate(values, tmp_path / "forward")
    for row, single in ((found[0], alone), (found[3], forward)):
        last = single["networks"]["student"]["last"]
        for name in ("nll", "entropy"):
            np.testing.assert_allclose(row[f"test_{name}"], last[name], rtol=1e-4, err_msg=name)
        for name in ("agreement", "kl_at_1"):
            other = last["pairs"]["teacher"][name]
            np.testing.assert_allclose(row[f"test_{name}"], other, rtol=1e-3, err_msg=name)


def tokens(ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)
    return Tokens(jnp.asarray(ids), positions, jnp.ones(ids.shape, int))


def saved(whole, folder):
    """The run's student, and what is read of the folder that it was written to."""
    network = load(whole[0])
    save_decoder(folder, network.module, network.variables)
    return network, *load_decoder(folder)


def test_a_student_as_a_folder(whole, tmp_path):
    network, module, variables = saved(whole, tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, variables["params"], network.variables["params"])
    inputs = tokens(np.arange(24).reshape(2, 12))
    shown = jax.jit(functools.partial(module.apply, train=False))(variables, inputs)
    np.testing.assert_allclose(shown.formed().logits, network(inputs).formed().logits, atol=1e-5)


def test_transformers_opens_a_student(whole, tmp_path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    network, *_ = saved(whole, tmp_path / "folder")
    ids = np.arange(60, 84).reshape(2, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(network(tokens(ids)).formed().logits, expected, atol=2e-4)
