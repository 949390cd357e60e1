"""The digits, your own arrays, descriptions of sets, and every refusal."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn import datasets

from abkd_jax import binding, data

DIGITS = dict(validation=297, labelled=100)
NUM_IMAGES = 1797


@pytest.fixture(scope="module")
def digits():
    return data.digits(**DIGITS, data_seed=0)


def splits_of(dataset):
    return {name: getattr(dataset, name) for name in ("train", "validation", "test")}


def rows_of(split):
    """Each image with its label as bytes."""
    inputs, labels = np.asarray(split.inputs), np.asarray(split.labels)
    return [image.tobytes() + bytes([label]) for image, label in zip(inputs, labels, strict=True)]


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


def test_their_file_is_read_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(datasets, "load_digits", None)
    assert len(data.digits(data_seed=0, validation=297).train) == 1000


def test_types_and_ranges(digits):
    assert digits.num_classes == 10
    for split in splits_of(digits).values():
        assert split.inputs.shape[1:] == (8, 8, 1) and split.inputs.dtype == np.float32
        assert split.labels.dtype == np.int32 and split.masks["labelled"].dtype == bool
        assert split.masks.keys() == {"labelled"}
        assert np.min(split.inputs) == 0 and np.max(split.inputs) == 1
        assert set(np.asarray(split.labels).tolist()) == set(range(10))
        assert len(split) == split.labels.shape[0] == split.inputs.shape[0]


def test_the_split_is_a_function_of_the_data_seed_alone(digits):
    np.random.seed(7)  # the global state has no say
    assert equal(digits, data.digits(**DIGITS, data_seed=0))
    other = data.digits(**DIGITS, data_seed=1)
    for name, split in splits_of(digits).items():
        shared = set(rows_of(split)) & set(rows_of(getattr(other, name)))
        assert len(shared) < 0.8 * len(split)
    # Neither the labels kept nor the size of the validation set touches the test set.
    wider = data.digits(validation=500, data_seed=0)
    assert equal(wider.test, digits.test)
    assert rows_of(wider.validation)[:297] == rows_of(digits.validation)
    full = data.digits(validation=297, data_seed=0)
    assert equal(full.train.inputs, digits.train.inputs) and full.train.masks["labelled"].all()


@pytest.mark.parametrize("labelled", [10, 100, 500])
def test_kept_labels_are_balanced(labelled):
    dataset = data.digits(**(DIGITS | {"labelled": labelled}), data_seed=0)
    train = dataset.train
    kept = np.asarray(train.labels)[np.asarray(train.masks["labelled"])]
    np.testing.assert_array_equal(np.bincount(kept), np.full(10, labelled // 10))
    assert dataset.validation.masks["labelled"].all() and dataset.test.masks["labelled"].all()


def test_more_labels_keep_those_of_fewer(digits):
    more = data.digits(**(DIGITS | {"labelled": 200}), data_seed=0).train.masks["labelled"]
    assert np.all(np.asarray(more) | ~np.asarray(digits.train.masks["labelled"]))


def test_what_a_teacher_and_a_baseline_are_trained_on(digits):
    whole = digits.train.with_all_labels()
    assert whole.masks["labelled"].all() and equal(whole.labels, digits.train.labels)
    alone = digits.train.labelled_alone()
    assert len(alone) == 100 and alone.masks["labelled"].all()
    kept = np.asarray(digits.train.masks["labelled"])
    np.testing.assert_array_equal(alone.inputs, np.asarray(digits.train.inputs)[kept])
    np.testing.assert_array_equal(alone.labels, np.asarray(digits.train.labels)[kept])
    assert int(digits.train.masks["labelled"].sum()) == 100  # and the split is as it was


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
    for split in (dataset.train, dataset.full, dataset.test):
        assert split.inputs.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        np.testing.assert_array_equal(split.inputs, inputs)
        np.testing.assert_array_equal(split.labels, labels)
        assert split.labels.dtype == np.int32 and split.masks["labelled"].all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
def test_a_label_of_minus_100_is_withheld(dtype):
    labels = np.array([-100, 0, 1, 2, -1], dtype)
    own = {"train": (np.zeros((5, 2)), labels), "validation": None, "test": GOOD}
    train = data.from_arrays(**arrays(**own)).train
    np.testing.assert_array_equal(train.labels, [-1, 0, 1, 2, -1])
    np.testing.assert_array_equal(train.masks["labelled"], labels >= 0)
    assert labels[0] == -100  # the caller's array stays


def test_labels_that_are_not_known():
    labels = np.array([-1, 0, 1, 2, -1, 0, 1, 2, 0, 1, 2, -1])
    inputs = np.arange(12.0)[:, None]
    own = {
        "train": (inputs, labels),
        "validation": None,
        "test": (inputs[:3], labels[1:4]),
    }
    dataset = data.from_arrays(**arrays(**own))
    for split in (dataset.train, dataset.full, dataset.train.with_all_labels()):
        np.testing.assert_array_equal(split.masks["labelled"], labels >= 0)
    kept = data.from_arrays(**arrays(**own, labelled=3, omit=(2,)))
    np.testing.assert_array_equal(kept.train.inputs[:, 0], [0, 1, 2, 4, 5, 6, 8, 9, 11])
    np.testing.assert_array_equal(kept.train.labels[kept.train.masks["labelled"]], [0, 1])
    np.testing.assert_array_equal(kept.train.inputs[:, 0][kept.train.masks["labelled"]], [1, 2])
    assert len(kept.full) == 12 and int(kept.full.masks["labelled"].sum()) == 9


def test_what_is_given_for_augmentation_is_kept():
    given = dict(pad=2, flip=True, mean=(0.1, 0.2), std=(0.3, 0.4), class_names=("a", "b", "c"))
    dataset = data.from_arrays(**arrays(**given))
    assert (dataset.preprocess.pad, dataset.preprocess.flip) == (2, True)
    np.testing.assert_allclose(dataset.preprocess.mean, [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(dataset.preprocess.std, [0.3, 0.4], rtol=1e-6)
    assert dataset.class_names == ("a", "b", "c")


# --- the digits as a stand-in -------------------------------------------------------------------


def test_the_digits_at_another_shape(digits):
    stand_in = data.digits(**(DIGITS | {"shape": (16, 24, 3)}), data_seed=0)
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
    everything = data.digits(validation=0, data_seed=0)
    assert everything.validation is None and len(everything.train) == 1297
    assert equal(everything.test, digits.test)
    options = dict(omit=(5, 7), pad=1, flip=True, mean=(0.3,), std=(0.4,))
    dataset = data.digits(**DIGITS, **options, data_seed=0)
    assert (dataset.preprocess.pad, dataset.preprocess.flip) == (1, True)
    np.testing.assert_allclose(dataset.preprocess.mean, [0.3], rtol=1e-6)
    kept = ~np.isin(np.asarray(digits.train.labels), (5, 7))
    np.testing.assert_array_equal(dataset.train.inputs, np.asarray(digits.train.inputs)[kept])
    labelled = np.asarray(digits.train.masks["labelled"])[kept]
    np.testing.assert_array_equal(dataset.train.masks["labelled"], labelled)
    assert equal(dataset.full, digits.train.with_all_labels())
    assert equal(dataset.test, digits.test) and equal(dataset.validation, digits.validation)


def test_the_edges_are_allowed():
    train = data.digits(**(DIGITS | {"validation": 1, "labelled": 0}), data_seed=0)
    assert len(train.validation) == 1 and train.train.masks["labelled"].all()
    most = int(np.bincount(np.asarray(train.train.labels)).min())
    whole = data.digits(**(DIGITS | {"validation": 1, "labelled": 10 * most}), data_seed=0)
    assert int(whole.train.masks["labelled"].sum()) == 10 * most
    last = data.digits(validation=1296, data_seed=0)
    assert len(last.train) == 1


# --- pytrees and sequences ----------------------------------------------------------------------


def test_inputs_may_be_any_pytree():
    inputs = {"image": np.full((4, 2, 2, 3), 255, np.uint8), "more": (np.arange(4), np.eye(4))}
    examples = inputs, np.array([0, 1, 2, 0])
    dataset = data.from_arrays(train=examples, validation=None, test=examples, num_classes=3)
    stored = dataset.train.inputs
    kinds = jax.tree.map(lambda x: str(x.dtype), stored)
    assert kinds == {"image": "uint8", "more": ("int32", "float32")}
    jax.tree.map(np.testing.assert_array_equal, stored, inputs)
    batch = next(data.evaluation_batches(dataset.test, 3, dataset.preprocess))
    np.testing.assert_array_equal(batch["inputs"]["image"], np.ones((3, 2, 2, 3)))
    np.testing.assert_array_equal(batch["inputs"]["more"][0], np.arange(3))


def test_masks_are_kept_with_their_names():
    inputs, labels = np.zeros((2, 3)), np.array([[0, 1, -1], [2, -1, -1]])
    masks = {"where": labels >= 0, "corpus": labels == 1}
    examples = inputs, labels, masks
    dataset = data.from_arrays(train=examples, validation=examples, test=examples, num_classes=3)
    assert data.describe(dataset).masks == ("corpus", "labelled", "where")
    for split in (dataset.train, dataset.full, dataset.validation, dataset.test):
        np.testing.assert_array_equal(split.labels, labels)
        np.testing.assert_array_equal(split.masks["where"], masks["where"])
        np.testing.assert_array_equal(split.masks["corpus"], masks["corpus"])
        np.testing.assert_array_equal(split.masks["labelled"], labels >= 0)


# --- descriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(shape=(16, 12, 3), omit=(3,), flip=True)])
def test_the_description_of_the_digits(options):
    described = data.digits.describe(validation=297, data_seed=0, **options)
    assert described == data.describe(data.digits(validation=297, data_seed=0, **options))
    assert described.inputs == jax.ShapeDtypeStruct(options.get("shape", (8, 8, 1)), np.float32)
    assert described.labels == jax.ShapeDtypeStruct((), np.int32)
    assert (described.num_classes, len(described.class_names)) == (10, 10)
    assert described.masks == ("labelled", "where")


def test_the_description_of_arrays():
    labels, where = np.zeros((4, 6), int), np.ones((4, 6), bool)
    inputs = {"ids": labels, "pixels": np.zeros((4, 2), np.uint8)}
    train = inputs, labels, {"where": where, "a": where}
    dataset = data.from_arrays(train=train, validation=None, test=(inputs, labels), num_classes=2)
    assert data.describe(dataset) == data.Description(
        num_classes=2,
        class_names=(),
        inputs={
            "ids": jax.ShapeDtypeStruct((6,), np.int32),
            "pixels": jax.ShapeDtypeStruct((2,), np.float32),
        },
        labels=jax.ShapeDtypeStruct((6,), np.int32),
        masks=("a", "labelled", "where"),
    )


@pytest.mark.parametrize("fn", [data.digits, data.digits.describe, data.tfds, data.from_arrays])
def test_the_keywords_of_all_sets_are_in_their_signatures(fn):
    shared = {
        "labelled": (int, 0),
        "omit": (tuple[int, ...], ()),
        "pad": (int, 0),
        "flip": (bool, False),
        "mean": (tuple[float, ...], ()),
        "std": (tuple[float, ...], ()),
    }
    found = binding.hyperparameters(fn)
    assert {name: (found[name].annotation, found[name].default) for name in shared} == shared
    assert "options" not in found


def test_an_unknown_keyword_is_no_option():
    with pytest.raises(TypeError, match="flop"):
        data.digits(data_seed=0, validation=0, flop=True)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    (dict(validation=-5), "data.validation must be between 0 and 1296; found -5."),
    (dict(validation=1297), "data.validation must be between 0 and 1296; found 1297."),
    (dict(omit=(10,)), "data.omit must be a list of classes in 0..9; found (10,)."),
    (dict(std=(1.0,)),
     "data.mean and data.std must be left out together, or a number for each channel (there are "
     "1); found ((), (1.0,))."),
    (dict(shape=(8, 8)),
     "data.shape must be (height, width, channels), three positive integers, or (); found (8, 8)."),
    (dict(shape=(8, 0, 1)),
     "data.shape must be (height, width, channels), three positive integers, or (); found "
     "(8, 0, 1)."),
    *((dict(labelled=n), f"data.labelled must be a multiple of the 10 classes; found {n!r}.")
      for n in (1, 9, 101, -10, 100.0, "100")),
]  # fmt: skip


@pytest.mark.parametrize("changes,message", REFUSED)
@pytest.mark.parametrize("read", [data.digits, data.digits.describe])
def test_refusals(read, changes, message):
    with pytest.raises(ValueError) as error:
        read(**(DIGITS | changes), data_seed=0)
    assert str(error.value) == message


@pytest.mark.parametrize("labelled", [1000, 10_000])
def test_labels_that_cannot_be_balanced(labelled):
    train = data.digits(validation=297, data_seed=0).train
    most = np.bincount(np.asarray(train.labels)).min()
    with pytest.raises(ValueError) as error:
        data.digits(**(DIGITS | {"labelled": labelled}), data_seed=0)
    assert str(error.value) == (
        f"data.labelled must be at most {10 * most}, {most} examples of each class; found "
        f"{labelled}."
    )


GOOD = np.zeros((4, 2)), np.zeros(4, int)
TWO = np.zeros((4, 2), int)
WRONG_ARRAYS = [
    (dict(train=(np.zeros((4, 2)), np.zeros(3, int))),
     "data.train must be inputs [N, ...] and labels [N, ...] of one N, none of them empty; found "
     "((4, 2), (3,))."),
    (dict(train=({"a": np.zeros((4, 2)), "b": np.zeros(3)}, np.zeros(4, int))),
     "data.train must be inputs [N, ...] and labels [N, ...] of one N, none of them empty; found "
     "({'a': (4, 2), 'b': (3,)}, (4,))."),
    (dict(test=(np.zeros((0, 2)), np.zeros(0, int))),
     "data.test must be inputs [N, ...] and labels [N, ...] of one N, none of them empty; found "
     "((0, 2), (0,))."),
    (dict(test=(np.zeros(()), np.zeros((), int))),
     "data.test must be inputs [N, ...] and labels [N, ...] of one N, none of them empty; found "
     "((), ())."),
    (dict(test=({}, np.zeros(4, int))),
     "data.test must be inputs [N, ...] and labels [N, ...] of one N, none of them empty; found "
     "({}, (4,))."),
    (dict(train=(np.zeros((4, 2)), np.zeros(4))),
     "data.train's labels must be integers; convert them, such as by labels.astype(int); found "
     "'float64'."),
    (dict(train=(np.zeros((4, 2)), np.array([0, 1, 3, 0]))),
     "data.train's labels must be in -1..2; found 3."),
    (dict(train=(np.zeros((4, 2)), np.array([0, 1, -2, 0]))),
     "data.train's labels must be in -1..2; found -2."),
    (dict(test=(np.zeros((2, 2)), np.array([0, -1]))),
     "data.test's labels must be in 0..2; found -1."),
    (dict(validation=(np.zeros((2, 2)), np.array([0, -1]))),
     "data.validation's labels must be in 0..2; found -1."),
    (dict(test=(np.zeros((2, 2)), np.array([0, -1]), {"where": np.array([False, True])})),
     "data.test's labels must be in 0..2 where they count; found -1."),
    (dict(test=(np.zeros((2, 2)), np.array([0, -2]), {"where": np.array([True, False])})),
     "data.test's labels must be in 0..2 where they count; found -2."),
    (dict(test=None),
     "data.test must be (inputs, labels), or (inputs, labels, masks) with masks {name: bool "
     "[N, ...]}; found 'NoneType'."),
    (dict(test=(*GOOD, np.ones(4, bool))),
     "data.test must be (inputs, labels), or (inputs, labels, masks) with masks {name: bool "
     "[N, ...]}; found 'tuple'."),
    (dict(train=([[0.0, 1.0]], [0])),
     "data.train must be arrays, such as numpy.asarray makes of lists; found 'float'."),
    (dict(train=(np.zeros((4, 2)), None)),
     "data.train must be arrays, such as numpy.asarray makes of lists; found 'NoneType'."),
    (dict(train=(*GOOD, {"key": np.ones(4, bool)})),
     "a mask of data.train must be named other than inputs, labels, key, outputs; found ['key']."),
    (dict(train=(*GOOD, {"where": np.ones(4)})),
     "data.train's mask 'where' must be bool of the labels' shape, (4,); found 'float64 (4,)'."),
    (dict(test=(*GOOD, {"where": np.zeros(4, bool)})),
     "data.test's mask 'where' must be True where a row counts; found 'nothing but False'."),
    (dict(train=(*GOOD, {"where": np.ones((4, 2), bool)})),
     "data.train's mask 'where' must be bool of the labels' shape, (4,); found 'bool (4, 2)'."),
    (dict(num_classes=3.0), "data.num_classes must be a positive integer; found 3.0."),
    (dict(omit=1), "data.omit must be a list of classes in 0..2; found 1."),
    (dict(omit=(3,)), "data.omit must be a list of classes in 0..2; found (3,)."),
    (dict(omit=(0,)),
     "data.omit must be fewer classes: they leave no training example; found (0,)."),
    (dict(labelled=3.0), "data.labelled must be a multiple of the 3 classes; found 3.0."),
    (dict(train=(TWO * 1.0, TWO), test=(TWO * 1.0, TWO), omit=(1,)),
     "data.labelled, data.omit and data.imbalance must be left out where an example has more than "
     "one label; found (0, (1,), 1)."),
    (dict(mean=0.5, std=0.5), "data.mean must be a list of finite numbers; found 0.5."),
    (dict(mean=(0.0, np.inf), std=(1.0, 1.0)),
     "data.mean must be a list of finite numbers; found (0.0, inf)."),
    (dict(mean=(0.0, 0.0), std=(1.0, -1.0)),
     "data.std must be positive in each channel (left out, it is the training images': then give "
     "one); found (1.0, -1.0)."),
    (dict(train=(TWO, GOOD[1]), test=(TWO, GOOD[1]), mean=(0.0,), std=(1.0,)),
     "data.mean and data.std must be left out together, or a number for each channel (there are "
     "0); found ((0.0,), (1.0,))."),
    (dict(train=(np.full((4, 2), np.inf), np.zeros(4, int))),
     "data.train's inputs must be finite; found 'NaN or infinity'."),
    (dict(test=(np.full((4, 2), np.nan), np.zeros(4, int))),
     "data.test's inputs must be finite; found 'NaN or infinity'."),
    (dict(test=({"a": np.full((4, 2), np.nan)}, GOOD[1]), train=({"a": GOOD[0]}, GOOD[1])),
     "data.test's inputs must be finite; found 'NaN or infinity'."),
    (dict(test=(np.zeros((4, 2), np.uint8), np.zeros(4, int))),
     "data.test must be like data.train, {'inputs': 'float32 (2,)', 'labels': 'int32 ()'} once "
     "stored (uint8 stands for pixels in 0..255, floats are taken as they are); found {'inputs': "
     "'uint8 (2,)', 'labels': 'int32 ()'}."),
    (dict(test=(np.zeros((4, 3)), np.zeros(4, int))),
     "data.test must be like data.train, {'inputs': 'float32 (2,)', 'labels': 'int32 ()'} once "
     "stored (uint8 stands for pixels in 0..255, floats are taken as they are); found {'inputs': "
     "'float32 (3,)', 'labels': 'int32 ()'}."),
    (dict(test=(GOOD[0], TWO)),
     "data.test must be like data.train, {'inputs': 'float32 (2,)', 'labels': 'int32 ()'} once "
     "stored (uint8 stands for pixels in 0..255, floats are taken as they are); found {'inputs': "
     "'float32 (2,)', 'labels': 'int32 (2,)'}."),
    (dict(train=(TWO == 0, GOOD[1])),
     "data.train's inputs must be floating, uint8 (pixels in 0..255) or other integers (ids); "
     "found dtype('bool')."),
    (dict(flip=True),
     "data.pad and data.flip must be left out for examples that are no images (height, width, "
     "channels); found (2,)."),
    (dict(pad=-1), "data.pad must be at least 0; found -1."),
    (dict(class_names=("a", "b")), "data.class_names must be 3 names, or none; found ('a', 'b')."),
]  # fmt: skip


@pytest.mark.parametrize("changes,message", WRONG_ARRAYS)
def test_arrays_that_are_refused(changes, message):
    given = dict(train=GOOD, validation=None, test=GOOD, num_classes=3) | changes
    with pytest.raises(ValueError) as error:
        data.from_arrays(**given)
    assert str(error.value) == message


# --- long tails ---------------------------------------------------------------------------------


def balanced(size=200, num_classes=10, **options):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(size) % num_classes)
    train = rng.normal(size=(size, 2)).astype(np.float32), labels
    return data.from_arrays(
        train=train, validation=None, test=train, num_classes=num_classes, **options
    )


def test_a_long_tail_has_the_published_counts():
    """Cao et al., LDAM-DRW: imbalance_cifar.py, n_max mu^(k / (K - 1)), truncated."""
    found = balanced(5000, imbalance=100)
    counts = np.bincount(np.asarray(found.full.labels))
    published = [int(500 * 0.01 ** (k / 9)) for k in range(10)]
    assert counts.tolist() == published == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert len(found.train) == len(found.full) and len(found.test) == 5000
    # The first ones of each class, in the order of the set.
    whole = balanced(5000)
    kept = np.isin(np.asarray(whole.full.inputs[:, 0]), np.asarray(found.full.inputs[:, 0]))
    np.testing.assert_array_equal(whole.full.inputs[kept], found.full.inputs)
    labels = np.asarray(whole.full.labels)
    for k, count in enumerate(published):
        assert kept[labels == k][:count].all() and kept[labels == k].sum() == count


def test_a_long_tail_with_few_labels_and_without_a_class():
    found = balanced(imbalance=10, labelled=10, omit=(3,))
    counts = np.bincount(np.asarray(found.full.labels), minlength=10)
    assert counts[0] == 20 and counts[-1] == 2 and counts[3] > 0
    assert np.sum(np.asarray(found.train.labels) == 3) == 0
    assert int(found.train.masks["labelled"].sum()) == 9


def test_a_long_tail_of_no_label_is_refused():
    images, labels = np.zeros((20, 2), np.float32), np.full(20, -1)
    both = dict(train=(images, labels), test=(images, np.arange(20) % 4), num_classes=4)
    with pytest.raises(ValueError, match=r"^data\.imbalance must be 1 for examples without labels"):
        data.from_arrays(**both, validation=None, imbalance=10)


@pytest.mark.parametrize("imbalance", [0, -3, 1.5, True, "10"])
def test_an_imbalance_that_is_none(imbalance):
    with pytest.raises(ValueError, match=r"^data\.imbalance must be an integer of at least 1; fou"):
        balanced(imbalance=imbalance)
