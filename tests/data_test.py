"""The digits, their splits and masks, and that batches visit what they should, once."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn import datasets

from abkd_jax import data
from abkd_jax.data import sets

DIGITS = dict(name="digits", validation=297, labelled=100)
NUM_IMAGES = 1797


@pytest.fixture(scope="module")
def digits():
    return data.from_config(DIGITS, data_seed=0)


def splits_of(dataset):
    return {name: getattr(dataset, name) for name in ("train", "validation", "test")}


def rows_of(split):
    """Each image with its label as bytes."""
    inputs, labels = np.asarray(split.inputs), np.asarray(split.labels)
    return [image.tobytes() + bytes([label]) for image, label in zip(inputs, labels, strict=True)]


def small(size=10, num_labelled=6):
    """A split whose inputs name their rows."""
    return sets.Split(
        inputs=jnp.arange(size, dtype=jnp.float32)[:, None],
        labels=jnp.arange(size) % 3,
        labelled=jnp.arange(size) < num_labelled,
    )


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# --- the digits ---------------------------------------------------------------------------------


def test_the_splits_are_disjoint_and_complete(digits):
    bunch = datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    everything = [
        image.tobytes() + bytes([label]) for image, label in zip(images, bunch.target, strict=True)
    ]
    assert len(everything) == NUM_IMAGES == len(set(everything))  # no two alike, so a set will do
    parts = [rows_of(split) for split in splits_of(digits).values()]
    assert [len(part) for part in parts] == [1000, 297, 500]
    assert sorted(itertools.chain(*parts)) == sorted(everything)


def test_types_and_ranges(digits):
    assert digits.num_classes == 10
    for split in splits_of(digits).values():
        assert split.inputs.shape[1:] == (8, 8, 1) and split.inputs.dtype == np.float32
        assert split.labels.dtype == np.int32 and split.labelled.dtype == bool
        assert np.min(split.inputs) == 0 and np.max(split.inputs) == 1
        assert set(np.asarray(split.labels).tolist()) == set(range(10))
        assert len(split) == split.labels.shape[0] == split.inputs.shape[0]


def test_the_split_is_a_function_of_the_data_seed_alone(digits):
    np.random.seed(7)  # the global state has no say
    assert equal(digits, data.from_config(DIGITS, data_seed=0))
    other = data.from_config(DIGITS, data_seed=1)
    for name, split in splits_of(digits).items():
        shared = set(rows_of(split)) & set(rows_of(getattr(other, name)))
        assert len(shared) < 0.8 * len(split)
    # Neither the labels kept nor the size of the validation set touches the test set.
    wider = data.from_config(dict(name="digits", validation=500), data_seed=0)
    assert equal(wider.test, digits.test)
    assert rows_of(wider.validation)[:297] == rows_of(digits.validation)
    full = data.from_config(dict(name="digits", validation=297), data_seed=0)
    assert equal(full.train.inputs, digits.train.inputs) and full.train.labelled.all()


@pytest.mark.parametrize("labelled", [10, 100, 500])
def test_kept_labels_are_balanced(labelled):
    dataset = data.from_config(DIGITS | {"labelled": labelled}, data_seed=0)
    train = dataset.train
    kept = np.asarray(train.labels)[np.asarray(train.labelled)]
    np.testing.assert_array_equal(np.bincount(kept), np.full(10, labelled // 10))
    assert dataset.validation.labelled.all() and dataset.test.labelled.all()


def test_more_labels_keep_those_of_fewer(digits):
    more = data.from_config(DIGITS | {"labelled": 200}, data_seed=0).train.labelled
    assert np.all(np.asarray(more) | ~np.asarray(digits.train.labelled))


def test_what_a_teacher_and_a_baseline_are_trained_on(digits):
    whole = digits.train.with_all_labels()
    assert whole.labelled.all() and equal(whole.labels, digits.train.labels)
    alone = digits.train.labelled_alone()
    assert len(alone) == 100 and alone.labelled.all()
    kept = np.asarray(digits.train.labelled)
    np.testing.assert_array_equal(alone.inputs, np.asarray(digits.train.inputs)[kept])
    np.testing.assert_array_equal(alone.labels, np.asarray(digits.train.labels)[kept])
    assert int(digits.train.labelled.sum()) == 100  # and the split is as it was


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_epochs_order_is_a_permutation_of_its_own(size):
    orders = [np.asarray(data.epoch_order(3, epoch, size)) for epoch in range(5)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    again = jax.jit(data.epoch_order, static_argnums=2)
    for epoch, order in enumerate(orders):
        np.testing.assert_array_equal(again(3, epoch, size), order)
    if size == 1000:
        assert len({order.tobytes() for order in orders}) == 5
        assert len({np.asarray(data.epoch_order(s, 0, size)).tobytes() for s in range(5)}) == 5


@pytest.mark.parametrize("num_examples,size", [(10, 5), (10, 3), (10, 10), (10, 1), (7, 4)])
def test_each_example_comes_once_an_epoch(num_examples, size):
    split = small(num_examples)
    steps_per_epoch = num_examples // size
    visited = []
    batch_at = jax.jit(lambda order, step: data.batch_at(split, order, 0, step, size))
    for step in range(3 * steps_per_epoch):
        order = data.epoch_order(0, step // steps_per_epoch, num_examples)
        batch = batch_at(order, step)
        rows = np.asarray(batch["inputs"])[:, 0].astype(int)
        visited.append(rows)
        start = (step % steps_per_epoch) * size
        np.testing.assert_array_equal(rows, order[start : start + size])
        labelled = np.asarray(split.labelled)[rows]
        expected = np.where(labelled, np.asarray(split.labels)[rows], -1)
        np.testing.assert_array_equal(batch["labels"], expected)
        np.testing.assert_array_equal(batch["labelled"], labelled)
        assert batch["where"].all() and batch["where"].shape == (size,)
    for epoch in np.split(np.concatenate(visited), 3):
        assert len(set(epoch)) == len(epoch) == steps_per_epoch * size


def test_a_batch_is_a_function_of_its_seed_and_step():
    split, order = small(), data.epoch_order(0, 0, 10)
    key_data = lambda seed, step: jax.random.key_data(  # noqa: E731
        data.batch_at(split, order, seed, step, 5)["key"]
    ).tobytes()
    keys = {(seed, step): key_data(seed, step) for seed in range(3) for step in range(4)}
    assert len(set(keys.values())) == 12
    assert keys == {pair: key_data(*pair) for pair in keys}
    assert set(data.batch_at(split, order, 0, 0, 5)) == {
        "inputs",
        "labels",
        "where",
        "labelled",
        "key",
    }


def test_the_steps_of_an_epoch_scan():
    split = small()

    @jax.jit
    def epoch(seed):
        def step(carry, index):
            order = data.epoch_order(seed, index // 2, 10)
            return carry, data.batch_at(split, order, seed, index, 5)["inputs"][:, 0]

        return jax.lax.scan(step, None, jnp.arange(4))[1]

    visited = np.asarray(epoch(0)).reshape(2, 10)
    np.testing.assert_array_equal(np.sort(visited, axis=1), np.tile(np.arange(10), (2, 1)))
    assert not np.array_equal(visited[0], visited[1])


@pytest.mark.parametrize("size", [1, 7, 10, 13])
@pytest.mark.parametrize("num_labelled", [6, 10])
def test_evaluation_sees_everything_once(size, num_labelled):
    split = small(num_labelled=num_labelled)
    batches = list(data.evaluation_batches(split, size))
    assert len(batches) == -(-10 // size)
    assert {jax.tree.map(jnp.shape, batch)["inputs"] for batch in batches} == {(size, 1)}
    assert {name for batch in batches for name in batch} == {
        "inputs",
        "labels",
        "where",
        "labelled",
    }
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    where = joined["where"]
    assert where.dtype == bool and where.sum() == 10 and where[:10].all()
    np.testing.assert_array_equal(joined["inputs"][where][:, 0], np.arange(10))
    expected = np.where(np.arange(10) < num_labelled, np.arange(10) % 3, -1)
    np.testing.assert_array_equal(joined["labels"][where], expected)
    np.testing.assert_array_equal(joined["labelled"][where], np.arange(10) < num_labelled)
    assert not joined["labelled"][~where].any()  # padding belongs to no mask
    assert np.isfinite(joined["inputs"]).all()


@pytest.mark.parametrize("size", [7, 500, 503])
def test_evaluation_of_the_digits_is_exact_for_any_size(digits, size):
    test = digits.test
    ink = jax.jit(
        lambda batch: jnp.sum(jnp.where(batch["where"], batch["inputs"].sum((1, 2, 3)), 0))
    )
    total = sum(float(ink(batch)) for batch in data.evaluation_batches(test, size))
    np.testing.assert_allclose(total, np.sum(np.asarray(test.inputs, np.float64)), rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    (dict(name="digit", validation=3),
     "data.name must be one of digits; found 'digit' (did you mean 'digits'?)."),
    (dict(name="cifar", validation=3), "data.name must be one of digits; found 'cifar'."),
    (dict(validation=3), "data.name must be one of digits; found None."),
    (3, "data must be a group dict(name=NAME, ...); found 3."),
    (dict(name="digits"), "data.validation is missing; digits takes validation, labelled."),
    (DIGITS | {"label": 3},
     "data.label is unknown (did you mean 'labelled'?); digits takes validation, labelled."),
    (DIGITS | {"path": "x"}, "data.path is unknown; digits takes validation, labelled."),
    (DIGITS | {"data_seed": 1}, "data.data_seed is unknown; digits takes validation, labelled."),
    (DIGITS | {"validation": 0}, "data.validation must lie between 1 and 1296; found 0."),
    (DIGITS | {"validation": -5}, "data.validation must lie between 1 and 1296; found -5."),
    (DIGITS | {"validation": 1297}, "data.validation must lie between 1 and 1296; found 1297."),
]  # fmt: skip


@pytest.mark.parametrize("group,message", REFUSED)
def test_refusals(group, message):
    with pytest.raises(ValueError) as error:
        data.from_config(group, data_seed=0)
    if "must be one of" in message:  # more sets may come
        start, _, end = message.partition("digits; ")
        assert str(error.value).startswith(start) and str(error.value).endswith(end)
    else:
        assert str(error.value) == message


@pytest.mark.parametrize("labelled", [1, 9, 101, -10, 1000, 10_000])
def test_labels_that_cannot_be_balanced(labelled):
    train = data.from_config(dict(name="digits", validation=297), data_seed=0).train
    available = np.bincount(np.asarray(train.labels)).min()
    with pytest.raises(ValueError) as error:
        data.from_config(DIGITS | {"labelled": labelled}, data_seed=0)
    assert str(error.value) == (
        f"data.labelled must be a multiple of the 10 classes, with at most {available} examples "
        f"of each; found {labelled}."
    )


def test_the_edges_are_allowed():
    train = data.from_config(DIGITS | {"validation": 1, "labelled": 0}, data_seed=0)
    assert len(train.validation) == 1 and train.train.labelled.all()
    most = int(np.bincount(np.asarray(train.train.labels)).min())
    whole = data.from_config(DIGITS | {"validation": 1, "labelled": 10 * most}, data_seed=0)
    assert int(whole.train.labelled.sum()) == 10 * most
    last = data.from_config(dict(name="digits", validation=1296), data_seed=0)
    assert len(last.train) == 1


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(dict(name=["digits"], validation=3), id="a list for a name"),
        pytest.param(DIGITS | {"validation": 297.0}, id="validation a float"),
        pytest.param(DIGITS | {"validation": "297"}, id="validation a string"),
        pytest.param(DIGITS | {"validation": True}, id="validation a bool"),
        pytest.param(DIGITS | {"labelled": 100.0}, id="labelled a float"),
        pytest.param(DIGITS | {"labelled": "100"}, id="labelled a string"),
    ],
)
def test_also_refused_by_field(group):
    with pytest.raises(ValueError, match=r"^data\.(name|validation|labelled) "):
        data.from_config(group, data_seed=0)


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(lambda: data.batch_at(small(3), jnp.arange(3), 0, 0, 4), id="too large"),
        pytest.param(lambda: list(data.evaluation_batches(small(), 0)), id="of none"),
    ],
)
def test_batches_of_an_impossible_size_are_refused_by_name(take):
    with pytest.raises(ValueError, match=r"size|batch"):
        take()
