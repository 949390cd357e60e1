"""Rows that are not images: bytes, a causal model handed over, a label for every position."""

import functools
import json
import pydoc_data.topics

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from abkd_jax import data, train_and_evaluate
from abkd_jax.run.loop import train_and_evaluate as run
from abkd_jax.sweep import sweep
from abkd_jax.train.checkpoint import Checkpoints

K, T = 256, 12  # bytes, and positions of an example


class Causal(nn.Module):
    """A byte's class from those before it: a running mean of embeddings, and a layer on it."""

    width: int

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nn.Embed(K, self.width)(inputs)
        counts = jnp.arange(1, x.shape[1] + 1)[:, None]
        x = jnp.concatenate([x, jnp.cumsum(x, axis=1) / counts], axis=-1)
        x = nn.relu(nn.Dense(self.width)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(K)(x)


def network(width, seed):
    module = Causal(width)
    return module.apply, module.init(jax.random.key(seed), jnp.zeros((1, T), int))


@functools.cache
def networks():
    return {"large": network(32, 0), "small": network(8, 1)}


def examples(count, first, pad=0):
    """Windows of the text: bytes, the bytes after them, and which of them count."""
    text = np.frombuffer(" ".join(sorted(pydoc_data.topics.topics.values())).encode(), np.uint8)
    starts = 997 * np.arange(first, first + count)
    window = np.stack([text[start : start + T + 1] for start in starts]).astype(np.int32)
    ends = T - np.arange(count) % 5  # examples of several lengths
    where = np.arange(T) < ends[:, None]
    capital = (window[:, 1:] >= 65) & (window[:, 1:] <= 90)
    return window[:, :-1], window[:, 1:], {"where": where, "capital": capital}


def dataset(garbage=0):
    """With `garbage` in what does not count: other bytes, other labels."""

    def part(count, first, withheld):
        inputs, labels, masks = examples(count, first)
        rng = np.random.default_rng(garbage)
        padding = ~masks["where"]
        if garbage:
            inputs = np.where(padding, rng.integers(0, K, inputs.shape), inputs)
        labels = np.where(padding, -1, labels)
        if withheld:  # a third of the labels of the training data
            labels = np.where(np.arange(labels.size).reshape(labels.shape) % 3 == 0, -1, labels)
        return inputs, labels, masks

    return data.from_arrays(
        train=part(64, 0, True),
        validation=part(30, 200, False),
        test=part(37, 400, False),
        num_classes=K,
    )


def config(**changes):
    adam = dict(fn="adam", learning_rate=1e-2)
    task = dict(fn="cross_entropy", weight=1.0, where="labelled")
    distill = dict(fn="on_logits", weight=0.5, temperature=2.0)
    distill |= dict(divergence=dict(fn="alpha_beta", alpha=0.8, beta=0.3))
    capital = dict(distill, weight=0.1, where="capital")
    return (
        dict(
            large=dict(model=dict(fn="given"), optimizer=adam, terms=dict(task=task)),
            small=dict(
                model=dict(fn="given"),
                optimizer=adam,
                terms=dict(task=task, distill=distill, capital=capital),
            ),
            phases=dict(
                first=dict(learn=("large",)), distill=dict(learn=("small",), see=("large",))
            ),
            batch_size=16,
            num_steps=20,
            checkpoint_every=5,
            log_every=5,
            micro_batches=2,
            devices=1,
        )
        | changes
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rows")
    return workdir, run(config(), workdir, networks=networks(), data=dataset())


def restored(workdir, name):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore()[1]["learners"][name]["params"]


@pytest.mark.long
def test_it_learns_and_is_evaluated_exactly(done):
    workdir, result = done
    inputs, labels, masks = examples(37, 400)
    apply_fn, _ = networks()["small"]
    logits = np.asarray(apply_fn({"params": restored(workdir, "small")}, inputs), np.float64)
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nll = -np.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    right = logits.argmax(axis=-1) == labels
    where = masks["where"]
    last = result["networks"]["small"]["last"]
    assert last["count"] == where.sum() < where.size
    np.testing.assert_allclose(last["nll"], nll[where].mean(), rtol=1e-5)
    np.testing.assert_allclose(last["accuracy"], right[where].mean(), rtol=1e-5)
    counts = np.bincount(labels[where], minlength=K)
    of_class = np.bincount(labels[where & right], minlength=K)[counts > 0] / counts[counts > 0]
    found = np.asarray(last["class_accuracy"], float)
    np.testing.assert_allclose(found[counts > 0], of_class, rtol=1e-5)
    assert np.isnan(found[counts == 0]).all()
    untrained = np.asarray(apply_fn(networks()["small"][1], inputs), np.float64)
    untrained -= np.log(np.exp(untrained).sum(axis=-1, keepdims=True))
    before = -np.take_along_axis(untrained, labels[..., None], axis=-1)[..., 0]
    assert last["nll"] < before[where].mean() - 1


@pytest.mark.long
def test_it_is_reported(done):
    workdir, _ = done
    page = (workdir / "report.md").read_text()
    assert "small" in page and "`large`" in page
    for name in ("learning_curves", "reliability", "examples"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000


@pytest.mark.long
def test_what_does_not_count_changes_nothing(done, tmp_path):
    _, result = done
    other = run(config(), tmp_path, networks=networks(), data=dataset(garbage=1))
    for name in ("large", "small"):
        found, expected = (x["networks"][name] for x in (other, result))
        # A causal model does not see what comes after; padding stands at the end.
        assert found["sha256"]["params"] == expected["sha256"]["params"]
        np.testing.assert_equal(found["last"], expected["last"])


@pytest.mark.long
def test_it_resumes_bitwise(done, tmp_path):
    _, result = done

    class Stopped(Exception):
        pass

    workdir = tmp_path / "run"
    run(config(phases=config()["phases"]), workdir, networks=networks(), data=dataset())
    for step in (20, 15):  # as if it had been killed after the save of step 10
        path = workdir / "checkpoints" / str(step)
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        if path.exists():
            path.rmdir()
    again = run(config(), workdir, networks=networks(), data=dataset())
    assert again["networks"]["small"]["sha256"] == result["networks"]["small"]["sha256"]
    assert json.loads((workdir / "result.json").read_text())["networks"].keys() == {
        "large",
        "small",
    }


@pytest.mark.long
def test_it_sweeps(done, tmp_path):
    _, result = done
    rows = sweep(
        config(),
        tmp_path,
        over={"small.terms.distill.divergence.alpha": [0.8, 1.0]},
        networks=networks(),
        data=dataset(),
    )
    assert [row["small.terms.distill.divergence.alpha"] for row in rows] == [0.8, 1.0]
    last = result["networks"]["small"]["last"]
    for metric in ("accuracy", "nll", "brier", "ece"):
        np.testing.assert_allclose(rows[0][f"test_{metric}"], last[metric], rtol=1e-4)
    assert rows[0]["test_nll"] != rows[1]["test_nll"]


def test_a_mask_that_the_data_lacks_is_refused_by_name(tmp_path):
    bad = config()
    bad["small"]["terms"]["capital"]["where"] = "kapital"
    with pytest.raises(ValueError, match=r"small\.terms\.capital\.where must be one of .*capital"):
        train_and_evaluate(bad, tmp_path, networks=networks(), data=dataset())


def test_labels_withheld_from_images_alone():
    with pytest.raises(ValueError, match=r"data\.labelled"):
        inputs, labels, _ = examples(10, 0)
        pair = inputs, labels
        data.from_arrays(train=pair, validation=None, test=pair, num_classes=K, labelled=K)
