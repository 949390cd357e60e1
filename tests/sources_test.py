"""Sources of language: what a network writes in place of data, and what is drawn when."""

import collections
import json
import pathlib
import runpy
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from decoder_test import make, tokens
from jax import numpy as jnp
from scipy import stats

from abkd_jax import Tokens, data, generate, sources, train_and_evaluate
from abkd_jax.binding import schedule
from abkd_jax.config import resolve
from abkd_jax.data.augment import step_key
from abkd_jax.data.sets import MASKS
from abkd_jax.schedules import linear
from abkd_jax.sources import written

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
EOS, LENGTH = 7, 8
TINY = dict(num_classes=11, width=4, layers=1, heads=1, mlp_width=4)


class Network(NamedTuple):
    """What a source reads of a network's state."""

    eval_params: Any

    def whole(self, params):
        return params


class Numbered(NamedTuple):
    """Examples that are all prompts, whose ids are their numbers: step * B + row."""

    size: int
    length: int = 4

    def batch(self, data_seed, step):
        numbers = step * self.size + jnp.arange(self.size)[:, None]
        whole = jnp.ones((self.size, self.length), jnp.int32)
        inputs = Tokens(numbers * whole, whole * jnp.arange(self.length), whole)
        where = (whole > 0) & (jnp.arange(self.length) == 1)
        batch = {"inputs": inputs, "labels": jnp.where(where, 1, -1), "where": where}
        return batch | {"labelled": where, "key": step_key(data_seed, step)}


def setting(module, *, length=LENGTH, size=2, num_steps=10, masks=MASKS, eos=EOS, **group):
    row = jax.ShapeDtypeStruct((length,), jnp.int32)
    inputs = Tokens(row, row, row)
    description = data.Description(11, (), inputs, row, masks, eos=eos)
    modules = {"student": module, "given": None, "teacher": module}
    how = modules, description, group, size, num_steps
    return sources.Setting("phases.distill.source", ("student",), *how)


def batch_of(rows, counts, length=LENGTH, **masks):
    """Rows of ids, of which those from a place on count; -1 for all."""
    inputs = tokens(rows, length)
    there = np.asarray(inputs.segments) > 0
    where = np.zeros(there.shape, bool)
    for row, first in enumerate(counts):
        where[row, max(first - 1, 0) : len(rows[row]) - 1] = True
    labels = np.where(there, np.roll(np.asarray(inputs.ids), -1, 1), -1)
    labels[:, -1] = -1
    masks = {name: jnp.asarray(x)[:, None] & where for name, x in masks.items()}
    found = {"inputs": inputs, "labels": jnp.asarray(labels), "where": jnp.asarray(where)}
    return found | {"labelled": jnp.asarray(where), "key": jax.random.key(1)} | masks


def of(prompts):
    """The ids of each."""
    pairs = zip(np.asarray(prompts.ids), np.asarray(prompts.segments) > 0, strict=True)
    return [ids[there].tolist() for ids, there in pairs]


def test_prompts_are_what_stands_before_the_first_token_that_counts():
    batch = batch_of(
        [[1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1], [9, 8, 7, 6, 5, 4, 3], [8]], [3, 5, -1, 1]
    )
    found = written.prompts(batch, 4)
    assert found.ids.shape == (4, 4)
    #   a prompt, the end of a longer one, the first half of a text, and a row of one token
    assert of(found) == [[1, 2, 3], [5, 4, 3, 2], [9, 8, 7], [8]]
    assert found.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("labelled", [False, True])
def test_rows_are_what_the_network_writes_after_the_prompts(labelled):
    """Against `generate` and the full forward pass, token by token."""
    module, variables = make(**TINY)
    own = setting(module, masks=(*MASKS, "corpus"))
    write = written.writer(own, "student", "where", 5, 1.0, 0, 1.0)
    batch = batch_of([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]], [3, 5], corpus=[False, True])
    key = jax.random.key(5)
    rows = write({"student": Network(variables["params"])}, batch, key, jnp.asarray(0))
    found = written.in_place_of(batch, rows, jnp.asarray(True), labelled=labelled)
    expected, log_probs = generate(
        module, variables, written.prompts(batch, 3), key=key, max_new_tokens=5, stop=(EOS,)
    )
    assert of(found["inputs"]) == of(expected)
    outputs = module.apply(variables, found["inputs"], train=False)
    log_q = np.asarray(jax.nn.log_softmax(outputs.head(outputs.hidden)))
    count = 0
    for row, prompt in enumerate(([1, 2, 3], [4, 3, 2])):
        response = of(expected)[row][3:]
        assert of(expected)[row][:3] == prompt
        for place in range(LENGTH):
            new = place - 2  # which token of the response comes next
            counts = 0 <= new < len(response)
            assert found["where"][row, place] == counts
            assert found["labelled"][row, place] == (counts and labelled)
            assert found["corpus"][row, place] == (counts and row == 1)
            assert found["written"][row, place] == counts
            assert found["sampled"][row, place] == (response[new] if counts else -1)
            assert found["labels"][row, place] == (response[new] if counts and labelled else -1)
            told = log_q[row, place, response[new]] if counts else 0
            np.testing.assert_allclose(found["log_probs"][row, place], told, atol=1e-5)
            count += counts
    assert count == int(jnp.sum(log_probs < 0)) > 2


def test_data_stay_where_nothing_was_written():
    module, variables = make(**TINY)
    own = setting(module, masks=(*MASKS, "corpus"))
    write = written.writer(own, "student", "where", 5, 1.0, 0, 1.0)
    batch = batch_of([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]], [3, 5], corpus=[False, True])
    rows = write(
        {"student": Network(variables["params"])}, batch, jax.random.key(5), jnp.asarray(0)
    )
    found = written.in_place_of(batch, rows, jnp.asarray(False))
    for name, value in batch.items():
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), found[name], value))
    assert (found["sampled"] == -1).all() and (found["log_probs"] == 0).all()
    assert not found["written"].any()
    own = written.writer(own, "student", "corpus", 5, 1.0, 0, 1.0)
    told = own({"student": Network(variables["params"])}, batch, jax.random.key(5), jnp.asarray(0))
    assert not told["where"][0].any() and (told["log_probs"][0] == 0).all()
    assert told["where"][1].any() and (told["log_probs"][1] == rows["log_probs"][1]).all()
    found = written.in_place_of(batch, rows, jnp.asarray(True), mask="corpus")
    assert of(found["inputs"])[0] == [1, 2, 3, 4, 5] and of(found["inputs"])[1][:3] == [4, 3, 2]
    assert (found["sampled"][0] == -1).all() and (found["sampled"][1] >= 0).any()


def test_what_is_told_of_responses():
    """Against plain Python."""
    responses = [[1, 2, 3, 4, 1, 2, 3, 4, 1, EOS], [5] * 10, [EOS], []]
    inputs = tokens([[9, *x] for x in responses], 12)
    where = np.zeros((4, 12), bool)
    for row, response in enumerate(responses):
        where[row, : len(response)] = True
    log_probs = jnp.where(where, -0.5, 0.0)
    found = written.told(
        {"inputs": inputs, "where": jnp.asarray(where), "log_probs": log_probs}, EOS
    )
    grams = [[tuple(x[i : i + 4]) for i in range(len(x) - 3)] for x in responses]
    repeated = sum(len(x) - len(set(x)) for x in grams)
    expected = {"length": 21 / 3, "stopped": 2 / 3, "nll": 0.5}
    expected["repetition"] = repeated / sum(map(len, grams))
    assert {name: pytest.approx(float(x)) for name, x in found.items()} == expected
    assert repeated == 8


def over(source, networks, examples, count, shown):
    """What is `shown` of the state after each of `count` refills."""

    def one(state, step):
        state = source.refill(state, networks, examples, jnp.asarray(3), step)
        return state, shown(state)

    return jax.jit(lambda: jax.lax.scan(one, source.init(), jnp.arange(count)))()


def test_shares_of_generated_batches_over_10_000_steps():
    """Those of a schedule: a binomial count, with chances from 0.2 to 0.6."""
    module, variables = make(**TINY)
    fraction = schedule(linear, start=0.2, end=0.6, steps=10_000)
    own = setting(module, length=4, num_steps=10_000)
    source = sources.generated(setting=own, by="student", fraction=fraction)
    networks = {"student": Network(variables["params"])}
    state, used = over(source, networks, Numbered(2), 10_000, lambda state: state["used"][0])
    used = np.asarray(used)
    for part, chance in ((used[:5000], 0.3), (used[5000:], 0.5)):
        assert stats.binomtest(int(part.sum()), 5000, chance).pvalue > 0.01
    told = source.logged(state)
    own, whole = float(state["counts"]["generated"]), float(state["counts"]["all"])
    assert whole - own == 2 * (10_000 - used.sum())  # of data, a token in each of two rows
    assert told["generated"] == own / whole and 0 < own < 4 * used.sum()


def test_adaptive_draws_over_10_000_steps():
    """New text, rows of the buffer, and data, as often as DistiLLM has them; rows of the buffer
    uniform among the last, each at most once."""
    module, variables = make(**TINY)
    count, size, capacity, phi = 10_000, 2, 20, 0.5
    own = setting(module, length=4, num_steps=count)
    source = sources.adaptive(setting=own, by="student", threshold=phi, capacity=capacity)
    networks = {"student": Network(variables["params"])}

    def shown(state):
        return state["used"], state["written"], state["rows"]["inputs"].ids[:, 1]

    _, (used, total, numbers) = over(source, networks, Numbered(size), count, shown)
    used, total, numbers = map(np.asarray, (used, total, numbers))
    new = np.diff(total, prepend=0) > 0
    assert (new <= used).all() and (new == used)[total <= capacity].all()  # until it is full
    late = total > capacity
    for part, share in ((used, phi), (new[late], phi / 2), ((used & ~new)[late], phi / 2)):
        assert stats.binomtest(int(part.sum()), len(part), share).pvalue > 0.01
    thirds = [int(x.sum()) for x in np.array_split(new, 3)]
    for found, share in zip(thirds, (5 / 6, 1 / 2, 1 / 6), strict=True):
        assert stats.binomtest(found, count // 3, phi * share).pvalue > 0.01
    buffer, ages = collections.deque(maxlen=capacity), []
    for step in np.flatnonzero(used):
        if new[step]:
            assert numbers[step].tolist() == [size * step, size * step + 1]
            buffer.extend(numbers[step].tolist())
        else:
            assert len({*numbers[step].tolist()}) == size
            ages += [buffer.index(number) for number in numbers[step]]
    assert stats.chisquare(np.bincount(ages, minlength=capacity)).pvalue > 0.01


def test_members_write_where_one_of_them_does_and_each_keeps_its_own(monkeypatch):
    calls, count = [], 20

    def counted(*args, **how):
        jax.debug.callback(lambda: calls.append("once"))
        return generate(*args, **how)

    monkeypatch.setattr(written, "generate", counted)
    module, variables = make(**TINY)
    own = setting(module, length=4, num_steps=count)
    source = sources.adaptive(setting=own, by="student", capacity=4)
    networks, examples = {"student": Network(variables["params"])}, Numbered(2)
    state, thresholds = source.init(), jnp.array([0.0, 0.3, 0.6])

    def after(threshold):
        begun = {**state, "threshold": threshold}
        one = lambda state, step: (source.refill(state, networks, examples, 3, step),) * 2  # noqa: E731
        return jax.lax.scan(one, begun, jnp.arange(count))[1]

    together = jax.block_until_ready(jax.jit(jax.vmap(after))(thresholds))
    jax.effects_barrier()
    most, calls[:] = len(calls), []
    single = [jax.block_until_ready(jax.jit(after)(threshold)) for threshold in thresholds]
    jax.effects_barrier()
    jax.tree.map(
        np.testing.assert_array_equal, together, jax.tree.map(lambda *x: np.stack(x), *single)
    )
    wrote = np.diff(np.asarray(together["written"]), axis=1, prepend=0) > 0
    assert len(calls) == wrote.sum() and 0 < wrote[1].sum() < wrote[2].sum() < count
    assert most == wrote.any(axis=0).sum()


def test_the_threshold_rises_where_the_loss_did():
    own = setting(make(**TINY)[0])
    source = sources.adaptive(
        setting=own, by="student", threshold=0.3, rise=0.4, tolerance=0.1, capacity=4
    )
    state, found = source.init(), []
    for nll in (3.0, 3.05, 3.2, 3.25, 2.0, 3.4, 9.0):
        state = source.evaluated(state, {"student": {"nll": jnp.asarray(nll)}})
        found.append((round(float(state["threshold"]), 4), round(float(state["reference"]), 4)))
    # The reference is that of the last rise: a loss that fell in between does not count.
    expected = [(0.3, 3.0), (0.3, 3.0), (0.7, 3.2), (0.7, 3.2), (0.7, 3.2), (1.0, 3.4), (1.0, 9.0)]
    assert found == expected


@pytest.mark.parametrize(
    ("rows", "counts", "eos", "lengths"),
    {
        "a student that never stops": ([[1, 2, 3]] * 2, [2, 2], -1, {5}),
        "an empty response": ([[1, 2, 3]] * 2, [2, 2], None, {1}),
        "a prompt longer than the cache": ([[*range(8)]] * 2, [7, 7], -1, {5}),
        "nothing that counts": ([[1, 2, 3, 4]] * 2, [9, 9], -1, {5}),
        "one token": ([[1], [2]], [1, 1], -1, {5}),
    }.values(),
)
def test_rows_at_the_edges(rows, counts, eos, lengths):
    """Responses of at most 5 tokens. An end that all tokens are is the first that is written."""
    module, variables = make(**TINY)
    network = {"student": Network(variables["params"])}
    batch = batch_of(rows, counts)
    if eos is None:
        first = generate(
            module, variables, written.prompts(batch, 3), key=jax.random.key(0),
            max_new_tokens=1, temperature=0.0,
        )  # fmt: skip
        eos = int(first[0].ids[0, -1])
    write = written.writer(setting(module, eos=eos), "student", "where", 5, 1e-6, 0, 1.0)
    found = write(network, batch, jax.random.key(0), jnp.asarray(0))
    found = written.in_place_of(batch, found, jnp.asarray(True))
    per_row = np.asarray(jnp.sum(found["sampled"] >= 0, axis=1))
    some = np.asarray(jnp.any(batch["where"], axis=1))  # else there is no row to be replaced
    assert {*per_row[some].tolist()} <= lengths and not per_row[~some].any()
    assert np.isfinite(found["log_probs"]).all() and (found["inputs"].ids >= 0).all()


REFUSED = {
    "no such network": (
        dict(by="sudent"),
        "phases.distill.source.by must be one of student, given, teacher",
    ),
    "no decoder": (dict(by="given"), "source.by must be a decoder of the library"),
    "no mask": (dict(where="corpus"), "source.where must be one of labelled, where"),
    "too many tokens": (dict(max_new_tokens=LENGTH), "source.max_new_tokens must be between 1"),
    "negative top_k": (dict(top_k=-1), "source.top_k must be at least 0"),
    "packed": (dict(pack=True), "data.pack must be False"),
    "prompts that count": (dict(loss_on="all"), "data.loss_on must be 'response' where a network"),
    "several lengths": (dict(lengths=(4,)), "data.lengths must be ()"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make_source", [sources.generated, sources.adaptive])
def test_refused(name, make_source):
    changes, sentence = REFUSED[name]
    group = {key: changes[key] for key in ("pack", "lengths", "loss_on") if key in changes}
    changes = {key: x for key, x in changes.items() if key not in group}
    own, capacity = setting(make(**TINY)[0], **group), {}
    if make_source is sources.adaptive:
        capacity = dict(capacity=4)
    with pytest.raises(ValueError, match="(?s)" + sentence.replace("(", r"\(").replace(")", r"\)")):
        make_source(**dict(setting=own, by="student") | capacity | changes)


def test_refused_of_each_alone():
    own = setting(make(**TINY)[0])
    with pytest.raises(ValueError, match="refill_every must be at least 1"):
        sources.generated(setting=own, by="student", refill_every=0)
    with pytest.raises(ValueError, match="capacity must be at least batch_size, 2"):
        sources.adaptive(setting=own, by="student", capacity=1)
    with pytest.raises(ValueError, match=r"source\.by must be one that learns, student; found 't"):
        sources.adaptive(setting=own, by="teacher", capacity=4)
    rising = schedule(linear, start=0.0, end=1.0, steps=2)
    for name in ("threshold", "rise", "tolerance"):
        with pytest.raises(ValueError, match=rf"source\.{name} must be a number, and no schedule"):
            sources.adaptive(setting=own, by="student", capacity=4, **{name: rising})
    image = own._replace(
        description=own.description._replace(inputs=jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
    )
    with pytest.raises(ValueError, match="data that are no text"):
        sources.generated(setting=image, by="student")


def test_of_a_corpus_nothing_is_kept_to_be_drawn_again():
    """Its rows stay as they are, and only what the student wrote comes into the buffer."""
    module, variables = make(**TINY)
    own = setting(module, masks=(*MASKS, "instructions"), num_steps=10**9)
    how = dict(setting=own, by="student", threshold=1.0, capacity=3, where="instructions")
    source, networks = sources.adaptive(**how), {"student": Network(variables["params"])}
    batch = batch_of([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]], [3, 5], instructions=[False, True])
    state = source.init()
    for step in range(2):
        state = source.refill(state, networks, Same(batch), 0, jnp.asarray(step))
    assert state["written"] == 2
    there = of(jax.tree.map(lambda x: x[:2], state["buffer"]["inputs"]))
    assert [ids[:4] for ids in there] == [[5, 4, 3, 2]] * 2
    assert not state["buffer"]["where"][2].any() and not state["rows"]["where"][0].any()
    found = source.batch(state, Same(batch), 0, 1)
    assert of(found["inputs"])[0] == [1, 2, 3, 4, 5] and found["written"][1].any()
    half = sources.generated(setting=own, by="student", where="instructions")
    state = half.refill(half.init(), networks, Same(batch), 0, jnp.asarray(0))
    generated, whole = state["counts"]["generated"], state["counts"]["all"]
    assert whole - generated == 2 and generated == jnp.sum(state["rows"]["where"])


class Same(NamedTuple):
    """Examples of one batch."""

    given: Any

    def batch(self, data_seed, step):
        return self.given


def test_several_steps_are_written_at_once_by_the_network_before_them():
    """Each batch has the prompts of its own step; none is written twice."""
    module, variables = make(**TINY)
    own = setting(module, length=4)
    source = sources.generated(setting=own, by="student", refill_every=3)
    networks = {"student": Network(variables["params"])}
    state = source.refill(source.init(), networks, Numbered(2), 3, jnp.asarray(6))
    for step in (6, 7, 8):
        found = source.batch(state, Numbered(2), jnp.asarray(3), jnp.asarray(step))
        assert found["inputs"].ids[:, 1].tolist() == [2 * step, 2 * step + 1]
        assert (found["labels"] == -1).all() and not found["labelled"].any()


def test_tokens_that_were_written_are_a_mask_for_terms():
    """Whose sampled losses are finite where they count, and which data do not have."""
    made = text_config("source=generated('student')", fn="k2", where="written", other="teacher")
    assert resolve(made).phases[-1].source.masks == ("written",)
    made = text_config("", fn="k2", where="written", other="teacher")
    with pytest.raises(ValueError, match=r"distill\.where must be one of labelled, where; found"):
        resolve(made)
    with pytest.raises(ValueError, match=r"batch\['sampled'\] must be given, as k2 reads it"):
        resolve(text_config("", fn="k2", other="teacher"))


def text_config(argument, **term):
    """configs/text.py, shrunken, with another term."""
    made = runpy.run_path(str(CONFIGS / "text.py"))["get_config"](f"runlocal,{argument}")
    with made.unlocked():
        made.student.terms.distill = dict(weight=1.0, **term)
    return made


@pytest.mark.long
def test_a_student_learns_from_its_own_samples_alone(tmp_path):
    """By the policy gradient of the reverse KL."""
    loss = dict(fn="policy_gradient", where="written", other="teacher")
    made = text_config("source=generated('student')", **loss)
    with made.unlocked():
        del made.phases["baseline"], made["baseline"]
    found = train_and_evaluate(made, tmp_path)["networks"]["student"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["student/loss"] for row in rows if "student/loss" in row]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert found["last"]["nll"] < np.log(257) - 0.05
