"""The digits, your own arrays, augmentation, and that batches visit what they should, once."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn import datasets

from abkd_jax import data
from abkd_jax.data import augment, sets

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


# --- augmentation -------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(1, 256, (6, 3, 4, 2), dtype=np.uint8)


def windows(image, pad, flip):
    """Every window of the padded image that a crop may be, literally; flipped ones as well."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    cut = {}
    for down in range(2 * pad + 1):
        for right in range(2 * pad + 1):
            window = padded[down : down + height, right : right + width]
            cut[down, right, False] = window
            if flip:
                cut[down, right, True] = window[:, ::-1]
    return cut


@pytest.mark.parametrize("pad,flip", [(1, True), (2, False), (0, True)])
def test_a_crop_is_one_of_the_padded_image_and_each_comes_as_often(pad, flip):
    mean, std = np.array([0.3, 0.5], np.float32), np.array([0.2, 0.4], np.float32)
    preprocess = data.Preprocess(mean=mean, std=std, pad=pad, flip=flip)
    num_draws = 9000
    chosen = np.arange(num_draws) % len(PIXELS)
    drawn = data.augmented(jnp.asarray(PIXELS), chosen, jax.random.key(0), preprocess)
    assert drawn.shape == (num_draws, 3, 4, 2) and drawn.dtype == jnp.float32
    pixels = np.rint((np.asarray(drawn) * std + mean) * 255)
    np.testing.assert_allclose(drawn, (pixels / 255 - mean) / std, atol=1e-5)  # 0 in the padding
    seen = []
    tables = [
        {window.astype(np.uint8).tobytes(): name for name, window in windows(*args).items()}
        for args in ((image, pad, flip) for image in PIXELS)
    ]
    for row, image in zip(chosen, pixels.astype(np.uint8), strict=True):
        seen.append(tables[row][image.tobytes()])  # a KeyError for anything but a window
    names = list(windows(PIXELS[0], pad, flip))
    counts = np.array([seen.count(name) for name in names])
    assert counts.min() > 0
    expected = num_draws / len(names)
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    freedom = len(names) - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_augmentation_is_a_function_of_its_key():
    inputs, chosen = jnp.asarray(PIXELS), jnp.array([5, 0, 3, 3])
    preprocess = data.Preprocess(mean=jnp.ones(2), std=jnp.full(2, 0.5), pad=1, flip=True)
    once = data.augmented(inputs, chosen, jax.random.key(1), preprocess)
    again = data.augmented(inputs, chosen, jax.random.key(1), preprocess)
    np.testing.assert_array_equal(once, again)
    compiled = jax.jit(data.augmented)(inputs, chosen, jax.random.key(1), preprocess)
    np.testing.assert_allclose(once, compiled, atol=1e-6)
    other = data.augmented(inputs, chosen, jax.random.key(2), preprocess)
    assert not np.allclose(once, other)


@pytest.mark.parametrize("shape", [(7, 3), (7, 2, 3), (7, 4, 4, 3)])
@pytest.mark.parametrize("dtype,scale", [(np.uint8, 255), (np.float32, 1)])
def test_without_augmentation_the_chosen_are_normalised(shape, dtype, scale):
    inputs = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    mean, std = np.array([0.1, 0.2, 0.3], np.float32), np.array([1.0, 2.0, 0.5], np.float32)
    chosen = np.array([6, 0, 0, 2])
    preprocess = data.Preprocess(mean=mean, std=std)
    found = data.augmented(jnp.asarray(inputs), chosen, jax.random.key(0), preprocess)
    expected = (inputs[chosen].astype(np.float64) / scale - mean) / std
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    plain = data.normalized(jnp.asarray(inputs), data.Preprocess())
    np.testing.assert_allclose(plain, inputs.astype(np.float64) / scale, rtol=1e-6)


def test_batches_are_augmented_and_evaluation_is_not():
    split = sets.Split(inputs=jnp.asarray(PIXELS), labels=jnp.arange(6), labelled=jnp.ones(6, bool))
    preprocess = data.Preprocess(mean=jnp.full(2, 0.5), std=jnp.full(2, 0.25), pad=1, flip=True)
    order = data.epoch_order(0, 0, 6)
    batch = jax.jit(lambda step: data.batch_at(split, order, 0, step, 3, preprocess))(1)
    raw = data.batch_at(split, order, 0, 1, 3)
    assert raw["inputs"].dtype == jnp.uint8
    np.testing.assert_array_equal(raw["inputs"], PIXELS[np.asarray(order)[3:]])
    for name in ("labels", "where", "labelled"):
        np.testing.assert_array_equal(batch[name], raw[name])
    assert jax.random.key_data(batch["key"]).tolist() == jax.random.key_data(raw["key"]).tolist()
    found = np.rint((np.asarray(batch["inputs"]) * 0.25 + 0.5) * 255).astype(np.uint8)
    for image, row in zip(found, np.asarray(order)[3:], strict=True):
        assert any(np.array_equal(image, w) for w in windows(PIXELS[row], 1, True).values())
    batches = list(data.evaluation_batches(split, 4, preprocess))
    evaluated = np.concatenate([batch["inputs"] for batch in batches])[:6]
    np.testing.assert_allclose(evaluated, (PIXELS / 255 - 0.5) / 0.25, atol=1e-5)


def test_a_batch_may_be_made_on_a_mesh():
    inputs = jnp.asarray(np.tile(PIXELS, (3, 1, 1, 1)))
    split = sets.Split(inputs=inputs, labels=jnp.arange(18), labelled=jnp.ones(18, bool))
    preprocess = data.Preprocess(mean=jnp.full(2, 0.5), std=jnp.full(2, 0.25), pad=1, flip=True)
    order = data.epoch_order(0, 0, 18)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))

    def inputs_at(split, order, step):
        return data.batch_at(split, order, 0, step, 16, preprocess)["inputs"]

    expected = jax.jit(inputs_at)(split, order, 0)
    everywhere = jax.device_put((split, order), jax.NamedSharding(mesh, jax.P()))
    found = jax.jit(inputs_at, out_shardings=sharding)(*everywhere, 0)
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_augmentation_has_a_key_that_no_network_has():
    key = augment.step_key(0, 3)
    networks = {jax.random.key_data(jax.random.fold_in(key, i)).tobytes() for i in range(100)}
    own = jax.random.key_data(augment.augmentation_key(key)).tobytes()
    assert own not in networks | {jax.random.key_data(key).tobytes()}


# --- feeds --------------------------------------------------------------------------------------


def test_a_feed_serves_the_batches_of_its_epoch():
    split = small(10)
    preprocess = data.Preprocess(mean=jnp.ones(1), std=jnp.full(1, 2.0))
    feed = data.Feed(split, data_seed=3, size=4)
    for step in (0, 1, 2, 7, 3, 0):  # two steps an epoch, in any order
        epoch = step // 2
        fed, until = feed(step)
        assert until == 2 * (epoch + 1)
        order = data.epoch_order(3, epoch, 10)
        for served in range(step, until):
            make = jax.jit(lambda fed, step: fed.batch(3, step, 4, preprocess))
            found = make(fed, served)
            expected = data.batch_at(split, order, 3, served, 4, preprocess)
            assert set(found) == set(expected)
            key, own = found.pop("key"), expected.pop("key")
            assert jax.random.key_data(key).tolist() == jax.random.key_data(own).tolist()
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_an_order_is_computed_once_an_epoch():
    feed = data.Feed(small(10), data_seed=0, size=2)
    orders = [feed(step)[0].order for step in range(10)]
    assert all(order is orders[0] for order in orders[:5])
    assert all(order is orders[5] for order in orders[5:]) and orders[5] is not orders[0]


# --- your own arrays ----------------------------------------------------------------------------


def arrays(**changes):
    """Keywords of `from_arrays` that are as they should be, but for the changes."""
    drawn = np.random.default_rng(0)
    parts = {
        name: (drawn.random((size, 4, 4, 2)), np.arange(size) % 3)
        for name, size in (("train", 12), ("validation", 5), ("test", 6))
    }
    return parts | {"num_classes": 3} | changes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (4, 4, 1)])
def test_your_own_arrays(dtype, of, shape):
    inputs = (np.arange(4 * np.prod(shape)).reshape(4, *shape) % 7).astype(dtype)
    labels = np.array([0, 2, 1, 1])
    examples = of(inputs), of(labels)
    dataset = data.from_arrays(train=examples, validation=None, test=examples, num_classes=3)
    assert dataset.validation is None and dataset.preprocess.mean is None
    for split in (dataset.train, dataset.teacher, dataset.test):
        assert split.inputs.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        np.testing.assert_array_equal(split.inputs, inputs)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.labels.dtype == np.int32 and split.labelled.all()


def test_labels_that_are_not_known():
    labels = np.array([-1, 0, 1, 2, -1, 0, 1, 2, 0, 1, 2, -1])
    inputs = np.arange(12.0)[:, None]
    own = {
        "train": (inputs, labels),
        "validation": None,
        "test": (inputs[:3], labels[1:4]),
    }
    dataset = data.from_arrays(**arrays(**own))
    for split in (dataset.train, dataset.teacher, dataset.train.with_all_labels()):
        np.testing.assert_array_equal(split.labelled, labels >= 0)
    kept = data.from_arrays(**arrays(**own, labelled=3, omit=(2,)))
    np.testing.assert_array_equal(kept.train.inputs[:, 0], [0, 1, 2, 4, 5, 6, 8, 9, 11])
    np.testing.assert_array_equal(kept.train.labels[kept.train.labelled], [0, 1])
    np.testing.assert_array_equal(kept.train.inputs[:, 0][kept.train.labelled], [1, 2])
    assert len(kept.teacher) == 12 and int(kept.teacher.labelled.sum()) == 9


def test_what_is_given_for_augmentation_is_kept():
    given = dict(pad=2, flip=True, mean=(0.1, 0.2), std=(0.3, 0.4), class_names=("a", "b", "c"))
    dataset = data.from_arrays(**arrays(**given))
    assert (dataset.preprocess.pad, dataset.preprocess.flip) == (2, True)
    np.testing.assert_allclose(dataset.preprocess.mean, [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(dataset.preprocess.std, [0.3, 0.4], rtol=1e-6)
    assert dataset.class_names == ("a", "b", "c")


GOOD = np.zeros((4, 2)), np.zeros(4, int)
WRONG_ARRAYS = [
    (dict(train=(np.zeros((4, 2)), np.zeros(3, int))),
     "data.train must have one label for each of its 4 inputs; found labels of shape (3,)."),
    (dict(train=(np.zeros((4, 2)), np.zeros((4, 3), int))),
     "data.train must have one label for each of its 4 inputs; found labels of shape (4, 3)."),
    (dict(train=(np.zeros((4, 2)), np.zeros(4))),
     "data.train must have integer labels; found float64: convert them, such as by "
     "labels.astype(int)."),
    (dict(train=(np.zeros((4, 2)), np.array([0, 1, 3, 0]))),
     "data.train must have labels in -1..2; found 3."),
    (dict(train=(np.zeros((4, 2)), np.array([0, 1, -2, 0]))),
     "data.train must have labels in -1..2; found -2."),
    (dict(test=(np.zeros((2, 2)), np.array([0, -1]))),
     "data.test must have labels in 0..2; found -1."),
    (dict(validation=(np.zeros((2, 2)), np.array([0, -1]))),
     "data.validation must have labels in 0..2; found -1."),
    (dict(test=(np.zeros((0, 2)), np.zeros(0, int))),
     "data.test must have inputs [N, ...] of at least one example and two axes, none empty; found "
     "the shape (0, 2)."),
    (dict(train=(np.zeros(4), np.zeros(4, int))),
     "data.train must have inputs [N, ...] of at least one example and two axes, none empty; found "
     "the shape (4,)."),
    (dict(test=None), "data.test must be a pair (inputs, labels); found NoneType."),
    (dict(num_classes=3.0), "data.num_classes must be a positive integer; found 3.0."),
    (dict(omit=1), "data.omit must be a list of classes; found 1."),
    (dict(labelled=3.0), "data.labelled must be an integer; found 3.0."),
    (dict(mean=0.5, std=0.5), "data.mean must be a list of numbers; found 0.5."),
    (dict(mean=(0.0, np.nan), std=(1.0, 1.0)),
     "data.mean must be finite in each channel; found (0.0, nan)."),
    (dict(test=(np.full((4, 2), np.nan), np.zeros(4, int))),
     "data.test must have finite inputs; found NaN or infinity."),
    (dict(test=(np.zeros((4, 2), np.uint8), np.zeros(4, int))),
     "data.test must have inputs of data.train's type, float32 once stored; found uint8: uint8 "
     "stands for pixels in 0..255, floats are taken as they are."),
    (dict(test=(np.zeros((4, 3)), np.zeros(4, int))),
     "data.test must have examples of the shape of data.train's, (2,); found (3,)."),
    (dict(train=(np.zeros((4, 2), np.int32), np.zeros(4, int))),
     "data.train must have uint8 inputs, for pixels in 0..255, or floating ones; found int32: "
     "convert them to one of the two."),
    (dict(flip=True),
     "data.pad and data.flip need images (height, width, channels); found examples of shape (2,): "
     "leave them out."),
    (dict(class_names=("a", "b")),
     "data.class_names must name each of the 3 classes; found 2 names."),
    (dict(omit=(3,)), "data.omit must name classes in 0..2; found (3,)."),
    (dict(omit=(0,)), "data.omit leaves no training example; found (0,)."),
    (dict(mean=(0.0, 0.0), std=(1.0, -1.0)),
     "data.std must be positive in each channel; found (1.0, -1.0)."),
]  # fmt: skip


@pytest.mark.parametrize("changes,message", WRONG_ARRAYS)
def test_arrays_that_are_refused(changes, message):
    given = dict(train=GOOD, validation=None, test=GOOD, num_classes=3) | changes
    with pytest.raises(ValueError) as error:
        data.from_arrays(**given)
    assert str(error.value) == message


# --- the digits as a stand-in -------------------------------------------------------------------


def test_the_digits_at_another_shape(digits):
    stand_in = data.from_config(DIGITS | {"shape": (16, 24, 3)}, data_seed=0)
    for name, split in splits_of(stand_in).items():
        original = np.asarray(getattr(digits, name).inputs)
        assert split.inputs.shape == (len(original), 16, 24, 3)
        resized = np.asarray(split.inputs)
        np.testing.assert_array_equal(resized, np.repeat(resized[..., :1], 3, axis=-1))
        blocks = resized[..., 0].reshape(-1, 8, 2, 8, 3).mean((2, 4))
        np.testing.assert_allclose(blocks[:, 1:-1, 1:-1].mean(), original[:, 1:-1, 1:-1].mean(),
                                   rtol=0.02)  # fmt: skip
        correlation = np.corrcoef(blocks.ravel(), original.ravel())[0, 1]
        assert correlation > 0.95
        np.testing.assert_array_equal(split.labels, getattr(digits, name).labels)


def test_the_digits_options(digits):
    assert digits.class_names == tuple("0123456789") and digits.preprocess == data.Preprocess()
    everything = data.from_config(dict(name="digits", validation=0), data_seed=0)
    assert everything.validation is None and len(everything.train) == 1297
    assert equal(everything.test, digits.test)
    options = dict(omit=(5, 7), pad=1, flip=True, mean=(0.3,), std=(0.4,))
    dataset = data.from_config(DIGITS | options, data_seed=0)
    assert (dataset.preprocess.pad, dataset.preprocess.flip) == (1, True)
    np.testing.assert_allclose(dataset.preprocess.mean, [0.3], rtol=1e-6)
    kept = ~np.isin(np.asarray(digits.train.labels), (5, 7))
    np.testing.assert_array_equal(dataset.train.inputs, np.asarray(digits.train.inputs)[kept])
    np.testing.assert_array_equal(dataset.train.labelled, np.asarray(digits.train.labelled)[kept])
    assert equal(dataset.teacher, digits.train.with_all_labels())
    assert equal(dataset.test, digits.test) and equal(dataset.validation, digits.validation)


# --- refusals -----------------------------------------------------------------------------------

TAKES = "digits takes validation, labelled, omit, pad, flip, mean, std, shape."
NAMES = "data.name must be digits or an image-classification set of tensorflow_datasets; found "
REFUSED = [
    (dict(name="digit", validation=3), f"{NAMES}'digit' (did you mean 'digits'?)."),
    (dict(name="", validation=3), f"{NAMES}''."),
    (dict(validation=3), f"{NAMES}None."),
    (dict(name=["digits"], validation=3), f"{NAMES}['digits']."),
    (3, "data must be a group dict(name=NAME, ...); found 3."),
    (dict(name="digits"), f"data.validation is missing; {TAKES}"),
    (DIGITS | {"label": 3}, f"data.label is unknown (did you mean 'labelled'?); {TAKES}"),
    (DIGITS | {"pat": "x"}, f"data.pat is unknown (did you mean 'pad'?); {TAKES}"),
    (DIGITS | {"data_seed": 1}, f"data.data_seed is unknown; {TAKES}"),
    (DIGITS | {"validation": -5}, "data.validation must lie between 0 and 1296; found -5."),
    (DIGITS | {"validation": 1297}, "data.validation must lie between 0 and 1296; found 1297."),
    (DIGITS | {"omit": (10,)}, "data.omit must name classes in 0..9; found (10,)."),
    (DIGITS | {"std": (1.0,)},
     "data.mean and data.std must be given together, or neither; found mean=() and std=(1.0,)."),
    (DIGITS | {"shape": (8, 8)},
     "data.shape must be (height, width, channels), three positive integers; found (8, 8)."),
    (DIGITS | {"shape": (8, 0, 1)},
     "data.shape must be (height, width, channels), three positive integers; found (8, 0, 1)."),
]  # fmt: skip


@pytest.mark.parametrize("group,message", REFUSED)
def test_refusals(group, message):
    with pytest.raises(ValueError) as error:
        data.from_config(group, data_seed=0)
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
        pytest.param(lambda: data.Feed(small(3), data_seed=0, size=4), id="too large to feed"),
        pytest.param(lambda: list(data.evaluation_batches(small(), 0)), id="of none"),
    ],
)
def test_batches_of_an_impossible_size_are_refused_by_name(take):
    with pytest.raises(ValueError, match=r"size|batch"):
        take()
