"""Language as a task: its scores are those of numpy and scipy, its report shows tokens."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from scipy.special import entr, rel_entr

from abkd_jax import data, parallel
from abkd_jax.run.evaluation import evaluate
from abkd_jax.tasks import language
from abkd_jax.train import adopt
from abkd_jax.types import Head, Outputs, Tokens

TASK, K, B, T = language(), 7, 4, 12
MESH = parallel.mesh(1, batch_size=4)


def examples(seed=0):
    """Two segments in each row, then padding; the first tokens of a segment do not count."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(3, T - 3, B)
    place = np.arange(T)[None]
    segments = np.where(place < ends[:, None], 1, np.where(place < T - 1, 2, 0))
    positions = np.where(segments == 1, place, np.where(segments == 2, place - ends[:, None], 0))
    ids = rng.integers(0, K, (B, T))
    tokens = Tokens(*(x.astype(np.int32) for x in (ids, positions, segments)))
    labels = rng.integers(0, K, (B, T)).astype(np.int32)
    return tokens, labels, (segments > 0) & (positions > 0)


def network(seed, width=5, sharpness=2.0):
    """A bigram model, which leaves its logits unformed."""
    rng = np.random.default_rng(seed)
    embedding = jnp.asarray(rng.normal(size=(K, width)), jnp.float32)
    unembedding = jnp.asarray(sharpness * rng.normal(size=(width, K)), jnp.float32)

    def apply(variables, tokens):
        return Outputs(hidden=variables["e"][tokens.ids], head=Head(variables["u"]))

    return adopt(apply, {"e": embedding, "u": unembedding})


NETWORKS = {"student": network(1), "teacher": network(2)}


def dataset():
    tokens, labels, where = examples()
    part = tokens, labels, {"where": where}
    return data.from_arrays(train=part, validation=None, test=part, num_classes=K)


@pytest.fixture(scope="module", params=[1, 3, 1000])
def found(request):
    given = dataset()
    how = dict(size=4, preprocess=given.preprocess, mesh=MESH, gather=True, chunk=request.param)
    return evaluate(NETWORKS, given.test, TASK, **how)


def truth(name):
    """(probabilities, labels, positions) of the tokens that count, in numpy."""
    tokens, labels, where = examples()
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), NETWORKS[name].params)
    logits = params["e"][tokens.ids] @ params["u"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True))[where], labels[where], tokens.positions[where]


def test_scores(found):
    summary, rows = found
    p, labels, positions = truth("student")
    nll = -np.log(p[np.arange(len(labels)), labels])
    scores = TASK.scores(summary["student"], rows["student"], None)
    expected = dict(
        count=len(labels), nll=nll.mean(), log_likelihood=-nll.mean(),
        perplexity=np.exp(nll.mean()), accuracy=(p.argmax(-1) == labels).mean(),
        entropy=entr(p).sum(-1).mean(),
    )  # fmt: skip
    for key, value in expected.items():
        np.testing.assert_allclose(scores[key], value, rtol=1e-5, err_msg=key)
    assert TASK.score(summary["student"]) == summary["student"]["log_likelihood"]
    bins = np.floor(np.log2(positions + 1)).astype(int)
    for i in range(5):
        inside = bins == i
        assert scores["position_count"][i] == inside.sum()
        if inside.any():
            np.testing.assert_allclose(scores["position_nll"][i], nll[inside].mean(), rtol=1e-5)
            place = positions[inside].mean()
            np.testing.assert_allclose(scores["position_place"][i], place, rtol=1e-6)


def test_the_expected_calibration_error(found):
    summary, _ = found
    p, labels, _ = truth("student")
    confidence, right, expected = p.max(-1), p.argmax(-1) == labels, 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    np.testing.assert_allclose(summary["student"]["ece"], expected, rtol=1e-4)


def test_pairs(found):
    summary, _ = found
    (q, _, positions), (p, *_) = truth("student"), truth("teacher")
    kl = rel_entr(p, q).sum(-1)
    pair = summary["student"]["pairs"]["teacher"]
    np.testing.assert_allclose(pair["kl_at_1"], kl.mean(), rtol=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).mean()
    np.testing.assert_allclose(pair["agreement"], same, rtol=1e-6)
    first = positions <= 2  # position 0 does not count
    np.testing.assert_allclose(pair["position_kl_at_1"][1], kl[first].mean(), rtol=1e-4)
    reverse = summary["teacher"]["pairs"]["student"]["kl_at_1"]
    np.testing.assert_allclose(reverse, rel_entr(q, p).sum(-1).mean(), rtol=1e-4)


def test_rows_and_what_is_notable(found):
    _, rows = found
    for name in NETWORKS:
        p, labels, _ = truth(name)
        shown = rows[name]
        np.testing.assert_array_equal(shown["labels"], labels)
        own = p[np.arange(len(labels)), labels]
        np.testing.assert_allclose(np.exp(-shown["nll"]), own, rtol=1e-4)
        np.testing.assert_array_equal(shown["likeliest"], np.argsort(-p)[:, :3])
        expected = np.take_along_axis(p, np.argsort(-p)[:, :3], 1)
        np.testing.assert_allclose(shown["probabilities"], expected, rtol=1e-4)
    worth = TASK.notable(rows)
    expected = np.abs(rows["student"]["nll"] - rows["teacher"]["nll"])
    np.testing.assert_allclose(worth, expected, rtol=1e-6)
    alone = {"student": rows["student"]}
    np.testing.assert_array_equal(TASK.notable(alone), rows["student"]["nll"])


def test_a_sample_is_a_token_after_its_segments_tokens(found):
    _, rows = found
    tokens, labels, where = examples()
    chosen = np.array([0, 9, where.sum() - 1])
    places = np.argwhere(where)[chosen]
    batch = {"inputs": jax.tree.map(lambda x: x[places[:, 0]], tokens), "place": places[:, 1:]}
    shown = TASK.sample({n: {k: x[chosen] for k, x in r.items()} for n, r in rows.items()}, batch)
    for index, (row, place) in enumerate(places):
        inside = tokens.segments[row] == tokens.segments[row, place]
        before = tokens.ids[row][inside & (np.arange(T) <= place)]
        context = shown["contexts"][index]
        np.testing.assert_array_equal(context[context >= 0], before[-24:])
        assert shown["labels"][index] == labels[row, place]
    assert {"nll/student", "likeliest/teacher", "probabilities/teacher"} <= set(shown)


def test_a_network_of_other_tokens_is_refused():
    description = data.describe(dataset())
    hidden, head = np.zeros((2, T, 5), np.float32), np.zeros((5, K + 1), np.float32)
    outputs = Outputs(hidden=hidden, head=Head(head))
    with pytest.raises(ValueError, match=r"student must give .* 7 tokens .* \(2, 12, 8\)"):
        TASK.check("student", outputs.formed(), description)
    with pytest.raises(ValueError, match="found none"):
        TASK.check("student", Outputs(hidden=hidden), description)
