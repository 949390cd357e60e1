"""Image sets in TFDS's layout, written here: what is read from them, and every refusal."""

import io
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from array_record.python import array_record_module
from jax import numpy as jnp
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from abkd_jax import data
from abkd_jax.train.checkpoint import digest

SHARED = pathlib.Path(__file__).parents[2] / "shared/data/tfds"
NAMES = ("ant", "bee", "cow")
SIZES = {"train": 30, "test": 12}


def pictures(size, shape=(4, 5, 3), seed=0):
    """Random images, and labels that go round."""
    drawn = np.random.default_rng(seed).integers(0, 256, (size, *shape), dtype=np.uint8)
    return list(drawn), np.arange(size) % len(NAMES)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_records(path, examples):
    """Serialised tf.train.Examples; values are bytes or integers."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        message = tf_example_pb2.Example()
        for key, value in example.items():
            feature = message.features.feature[key]
            if isinstance(value, bytes):
                feature.bytes_list.value.append(value)
            else:
                feature.int64_list.value.append(int(value))
        writer.write(message.SerializeToString())
    writer.close()


def image_feature(shape):
    dimensions = [str(-1 if side is None else side) for side in shape]
    kind = "tensorflow_datasets.core.features.image_feature.Image"
    return {
        "image": {"dtype": "uint8", "shape": {"dimensions": dimensions}},
        "pythonClassName": kind,
    }


LABEL = {
    "classLabel": {"numClasses": str(len(NAMES))},
    "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
}


def write_set(root, splits, shape=(4, 5, 3), name="tiny", features=None, file_format=None):
    """A prepared set in TFDS's layout; its folder."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    features = features or {"image": image_feature(shape), "label": LABEL}
    information = {
        "fileFormat": file_format or "array_record",
        "moduleName": "nowhere",
        "name": name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1000",
                "shardLengths": [str(len(labels))],
            }
            for split, (_, labels) in splits.items()
        ],
        "version": "1.0.0",
    }
    kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    (folder / "dataset_info.json").write_text(json.dumps(information))
    (folder / "features.json").write_text(
        json.dumps({"featuresDict": {"features": features}, "pythonClassName": kind})
    )
    (folder / "label.labels.txt").write_text("\n".join(NAMES))
    for split, (drawn, labels) in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        pairs = zip(drawn, labels, strict=True)
        write_records(path, [{"image": png(i), "label": label} for i, label in pairs])
    return folder


@pytest.fixture(scope="module")
def splits():
    return {name: pictures(size, seed=size) for name, size in SIZES.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory, splits):
    folder = tmp_path_factory.mktemp("tfds")
    write_set(folder, splits)
    return folder


def load(root, data_seed=0, **hypers):
    group = dict(name="tiny", validation=0, data_dir=str(root)) | hypers
    return data.tfds(**group, data_seed=data_seed)


def describe(root, **hypers):
    group = dict(name="tiny", validation=0, data_dir=str(root)) | hypers
    return data.tfds.describe(**group, data_seed=0)


def refusal(root, **hypers):
    with pytest.raises(ValueError) as error:
        load(root, **hypers)
    with pytest.raises(ValueError) as before_reading:
        describe(root, **hypers)
    assert str(error.value) == str(before_reading.value)
    return str(error.value)


def rows_of(inputs, labels):
    """Each image with its label as bytes, sorted."""
    pairs = zip(inputs, labels, strict=True)
    return sorted(np.asarray(image).tobytes() + bytes([label]) for image, label in pairs)


# --- what is read -------------------------------------------------------------------------------


def test_what_was_written_is_read(root, splits):
    dataset = load(root)
    assert dataset.validation is None
    assert dataset.num_classes == 3 and dataset.class_names == NAMES
    for name in SIZES:
        split = getattr(dataset, name)
        assert split.inputs.dtype == jnp.uint8 and split.labels.dtype == jnp.int32
        assert split.inputs.shape == (SIZES[name], 4, 5, 3) and split.masks["labelled"].all()
        assert rows_of(split.inputs, np.asarray(split.labels)) == rows_of(*splits[name])
    np.testing.assert_array_equal(dataset.test.inputs, np.stack(splits["test"][0]))  # in order


def test_a_greyscale_set_keeps_its_channel_axis(tmp_path):
    drawn = {name: pictures(6, (3, 3, 1)) for name in SIZES}
    write_set(tmp_path, drawn, (3, 3, 1))
    dataset = load(tmp_path)
    np.testing.assert_array_equal(dataset.test.inputs, np.stack(drawn["test"][0]))
    assert dataset.preprocess.mean.shape == (1,)


def test_the_validation_images_are_a_random_part_of_the_training_images(root, splits):
    dataset = load(root, validation=9)
    parts = [rows_of(s.inputs, np.asarray(s.labels)) for s in (dataset.train, dataset.validation)]
    assert [len(part) for part in parts] == [21, 9]
    assert sorted(parts[0] + parts[1]) == rows_of(*splits["train"])
    again, other = load(root, validation=9), load(root, validation=9, data_seed=1)
    np.testing.assert_array_equal(dataset.validation.inputs, again.validation.inputs)
    assert rows_of(other.validation.inputs, np.asarray(other.validation.labels)) != parts[1]


def test_labels_withheld_and_classes_omitted_are_the_students_loss_alone(root):
    dataset = load(root, validation=3, labelled=6, omit=(1,))
    kept = np.asarray(dataset.train.labels)[np.asarray(dataset.train.masks["labelled"])]
    np.testing.assert_array_equal(np.bincount(kept, minlength=3), [2, 0, 2])
    assert set(np.asarray(dataset.train.labels).tolist()) == {0, 2}
    assert len(dataset.full) == 27 and dataset.full.masks["labelled"].all()
    assert set(np.asarray(dataset.full.labels).tolist()) == {0, 1, 2}
    assert set(np.asarray(dataset.test.labels).tolist()) == {0, 1, 2}


def test_the_default_normalisation_is_that_of_the_training_images(root):
    dataset = load(root, validation=9, omit=(0,), pad=2, flip=True)
    pixels = np.asarray(dataset.full.inputs, np.float64) / 255
    np.testing.assert_allclose(dataset.preprocess.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.preprocess.std, pixels.std((0, 1, 2)), rtol=1e-6)
    assert (dataset.preprocess.pad, dataset.preprocess.flip) == (2, True)
    given = load(root, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).preprocess
    np.testing.assert_allclose(given.mean, [0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(given.std, [0.4, 0.5, 0.6], rtol=1e-6)


def test_the_folder_may_come_from_the_environment(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert len(load("").train) == SIZES["train"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ABKD_JAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def decoded_by(root, capsys):
    """The set, and what was decoded for it."""
    found = load(root)
    lines = capsys.readouterr().err.splitlines()
    return digest(found), [line.split(" in ")[0] for line in lines if line.startswith("decoding")]


BOTH = ["decoding 30 images of tiny (train)", "decoding 12 images of tiny (test)"]


def test_a_set_is_decoded_once_and_says_so(root, cache, capsys):
    first, told = decoded_by(root, capsys)
    assert told == BOTH
    assert decoded_by(root, capsys) == (first, [])
    assert len(list(cache.iterdir())) == 2


def test_what_is_kept_is_of_the_very_files(splits, tmp_path, cache, capsys):
    write_set(tmp_path / "tfds", splits)
    first, _ = decoded_by(tmp_path / "tfds", capsys)
    (file,) = (tmp_path / "tfds").rglob("*test*array_record*")
    os.utime(file, (0, 0))
    assert decoded_by(tmp_path / "tfds", capsys) == (first, BOTH)


@pytest.mark.parametrize("content", [b"", b"PK", "half"])
def test_a_damaged_file_is_made_anew(root, cache, capsys, content):
    first, _ = decoded_by(root, capsys)
    for path in cache.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert decoded_by(root, capsys) == (first, BOTH)
    assert decoded_by(root, capsys) == (first, [])


def test_a_set_is_read_where_nothing_can_be_kept(root, cache, capsys):
    cache.write_text("in the way")
    first, told = decoded_by(root, capsys)
    assert told == BOTH
    assert decoded_by(root, capsys) == (first, BOTH)


# --- streams ------------------------------------------------------------------------------------

NORMAL = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def test_a_stream_has_the_images_of_the_set_in_memory(root):
    streamed = load(root, validation=9, stream="always", pad=1, flip=True, **NORMAL)
    resident = load(root, validation=9, stream="never", pad=1, flip=True, **NORMAL)
    assert isinstance(streamed.train, data.Stream) and streamed.full is streamed.train
    assert isinstance(resident.train, data.Split)
    assert streamed.preprocess.pad == 1 and streamed.preprocess.flip
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(streamed, name), getattr(resident, name)
        assert len(ours) == len(theirs)
        batches = [
            list(data.evaluation_batches(split, 5, streamed.preprocess)) for split in (ours, theirs)
        ]
        for batch, expected in zip(*batches, strict=True):
            where = np.asarray(expected["where"])
            np.testing.assert_array_equal(batch["where"], where)
            np.testing.assert_array_equal(batch["labelled"], expected["labelled"])
            np.testing.assert_array_equal(batch["inputs"], expected["inputs"])
            np.testing.assert_array_equal(batch["labels"], expected["labels"])


def test_large_sets_are_streamed_of_themselves(tmp_path):
    """By their metadata: four images of 1 GiB fit, five do not."""
    few = {name: pictures(2) for name in SIZES}
    more = {"train": pictures(3), "test": pictures(2)}
    shape, options = (2**14, 2**14, 4), {name: (0.5,) * 4 for name in ("mean", "std")}
    write_set(tmp_path, more, shape)
    dataset = load(tmp_path, **options)
    assert isinstance(dataset.train, data.Stream) and dataset.validation is None
    write_set(tmp_path, few, shape, name="smaller")
    assert describe(tmp_path, name="smaller", omit=(1,), **options)  # which streams refuse
    with pytest.raises(ValueError, match="must be left out for a stream"):
        describe(tmp_path, omit=(1,), **options)


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """A set whose images vary in shape."""
    folder = tmp_path_factory.mktemp("varied")
    drawn = [pictures(1, (6 + i % 5, 5 + i % 7, 3), seed=i)[0][0] for i in range(12)]
    write_set(folder, {name: (drawn, np.arange(12) % 3) for name in SIZES}, (None, None, 3))
    return folder


def test_images_of_varying_shape_are_streamed_at_one_size(varied):
    dataset = load(varied, image_size=4, flip=True, **NORMAL)
    assert dataset.train.flip and not dataset.preprocess.flip  # the host has flipped
    examples, _ = data.Feed(dataset.train, dataset.preprocess, data_seed=0, size=5)(0)
    inputs = examples.rows["inputs"]
    assert inputs.shape == (5, 4, 4, 3) and inputs.dtype == np.uint8
    (batch,) = data.evaluation_batches(dataset.test, 12, dataset.preprocess)
    assert batch["inputs"].shape == (12, 4, 4, 3)
    np.testing.assert_array_equal(batch["labels"], np.arange(12) % 3)


# --- descriptions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hypers",
    [
        {},
        dict(validation=9, labelled=6, omit=(1,), pad=1, flip=True),
        dict(stream="always", pad=1, **NORMAL),
        dict(image_size=3, flip=True, **NORMAL),
    ],
)
def test_a_description_is_that_of_the_set(root, hypers):
    described = describe(root, **hypers)
    assert described == data.describe(load(root, **hypers))
    side = hypers.get("image_size")
    shape = (side, side, 3) if side else (4, 5, 3)
    assert described.inputs == jax.ShapeDtypeStruct(shape, np.float32)
    assert (described.num_classes, described.class_names) == (3, NAMES)
    assert described.masks == ("labelled", "where")


def test_nothing_is_read_for_a_description(tmp_path, splits):
    folder = write_set(tmp_path, splits)
    for path in folder.glob("*array_record*"):
        path.unlink()
    assert describe(tmp_path, validation=9).num_classes == 3
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path, validation=9)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    (dict(validation=30), "data.validation must be between 0 and 29; found 30."),
    (dict(validation=-1), "data.validation must be between 0 and 29; found -1."),
    (dict(labelled=4), "data.labelled must be a multiple of the 3 classes; found 4."),
    (dict(omit=(0, 3)), "data.omit must be a list of classes in 0..2; found (0, 3)."),
    (dict(omit=(-1,)), "data.omit must be a list of classes in 0..2; found (-1,)."),
    (dict(mean=(0.5,) * 3),
     "data.mean and data.std must be left out together, or a number for each channel (there are "
     "3); found ((0.5, 0.5, 0.5), ())."),
    (dict(mean=(0.5,), std=(0.5,)),
     "data.mean and data.std must be left out together, or a number for each channel (there are "
     "3); found ((0.5,), (0.5,))."),
    (dict(mean=(0.5,) * 3, std=(0.5,)),
     "data.mean and data.std must be left out together, or a number for each channel (there are "
     "3); found ((0.5, 0.5, 0.5), (0.5,))."),
    (dict(mean=(0.5,) * 3, std=(0.5, 0.0, 0.5)),
     "data.std must be positive in each channel (left out, it is the training images': then give "
     "one); found (0.5, 0.0, 0.5)."),
    (dict(pad=-1), "data.pad must be at least 0; found -1."),
    (dict(test_split="tset"), "data.test_split must be one of train, test; found 'tset'."),
    (dict(stream="yes"), "data.stream must be one of auto, always, never; found 'yes'."),
    (dict(stream="always"),
     "data.mean and data.std must be given for a stream, a number for each channel; found "
     "((), ())."),
    (dict(stream="always", labelled=3),
     "data.labelled, data.omit and data.imbalance must be left out for a stream (or set "
     "data.stream='never' and data.image_size=0); found (3, (), 1)."),
    (dict(image_size=4, omit=(1,)),
     "data.labelled, data.omit and data.imbalance must be left out for a stream (or set "
     "data.stream='never' and data.image_size=0); found (0, (1,), 1)."),
    (dict(stream="never", image_size=4),
     "data.stream must be 'auto' with data.image_size, whose crops are made as images are read (or "
     "set it to 0); found 'never'."),
    (dict(image_size=4, pad=1, **NORMAL),
     "data.pad must be 0 with data.image_size, which crops at random; found 1."),
    (dict(image_size=-1), "data.image_size must be at least 0; found -1."),
]  # fmt: skip


@pytest.mark.parametrize("hypers,message", REFUSED)
def test_refusals(root, hypers, message):
    assert refusal(root, **hypers) == message


@pytest.mark.parametrize(
    "hypers,message",
    [
        (dict(labelled=33), "data.labelled must be at most 30, 10 examples of each class; found "
                            "33."),
        (dict(omit=(0, 1, 2)), "data.omit must be fewer classes: they leave no training example; "
                               "found (0, 1, 2)."),
    ],
)  # fmt: skip
def test_what_the_examples_alone_can_tell(root, hypers, message):
    assert describe(root, **hypers).num_classes == 3
    with pytest.raises(ValueError) as error:
        load(root, **hypers)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name,found",
    [
        ("cifar10O", "'cifar10O' (did you mean 'cifar10'?)."),
        ("qqqqqq", "'qqqqqq'."),
        ("", "''."),
        ("/1.0.0", "'/1.0.0'."),
    ],
)
def test_a_name_that_tfds_does_not_know(root, name, found):
    expected = "data.name must be an image-classification set of tensorflow_datasets; found "
    assert refusal(root, name=name) == expected + found


def test_a_set_that_is_not_prepared(tmp_path):
    assert refusal(tmp_path, name="mnist") == (
        f"data.name must be a set that is prepared in {tmp_path} (install TensorFlow with pip "
        "install 'abkd_jax[prepare]' and set data.download=True to prepare it, or give a "
        "data.data_dir or TFDS_DATA_DIR that has it in ArrayRecord format); found 'mnist'."
    )


def test_preparing_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(tmp_path, name="mnist", download=True) == (
        "data.download must be False without TensorFlow, which prepares a set (install it with pip "
        "install 'abkd_jax[prepare]', or set data.data_dir to a folder that has the set); found "
        "True."
    )


@pytest.mark.parametrize("name", ["cifar100/none", "cifar100:9.9.9", "tiny:2.0.0"])
def test_a_config_or_a_version_that_a_set_does_not_have(root, name):
    message = refusal(root, name=name)
    assert message.startswith(
        "data.name must be a set of tensorflow_datasets, with a config and a version that it has; "
        f"found {name!r} ("
    )
    assert message.endswith(").") and "\n" not in message


def test_another_format_than_array_record(tmp_path, splits):
    write_set(tmp_path, splits, file_format="tfrecord")
    assert refusal(tmp_path) == (
        f"data.name must be a set that {tmp_path} has in array_record format (give another "
        "data.data_dir, which has it so or in which data.download=True prepares it); found 'tiny "
        "in tfrecord format'."
    )


def test_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    absent = tmp_path / "images.v2"  # a name that the refusal must not take for its own
    expected = (
        " must be a folder with prepared sets of TFDS; found "
        f"{str(absent)!r}, which does not exist: correct it, or set data.download=True to prepare "
        "the set there."
    )
    assert refusal(absent, name="mnist") == "data.data_dir" + expected
    monkeypatch.setenv("TFDS_DATA_DIR", str(absent))
    assert refusal("", name="mnist") == "TFDS_DATA_DIR" + expected


@pytest.mark.parametrize("features", [{"image": image_feature((4, 5, 3))}, {"label": LABEL}])
def test_a_set_that_is_not_for_classification(tmp_path, splits, features):
    write_set(tmp_path, splits, features=features)
    assert refusal(tmp_path) == (
        "data.name must be a classification set, with an 8-bit 'image' and a class 'label'; found "
        f"'tiny with {next(iter(features))}'."
    )


def test_a_set_without_training_images(tmp_path, splits):
    write_set(tmp_path, {"test": splits["test"]})
    assert refusal(tmp_path) == (
        "data.name must be a set with a split 'train'; found 'tiny with test'."
    )


def test_a_constant_channel_has_no_default_normalisation(tmp_path):
    drawn, labels = pictures(6)
    for image in drawn:
        image[..., 1] = 7
    write_set(tmp_path, {name: (drawn, labels) for name in SIZES})
    with pytest.raises(ValueError, match=r"data\.std must be positive in each channel"):
        load(tmp_path)
    assert load(tmp_path, **NORMAL).preprocess.std.shape == (3,)


def test_images_of_varying_shape_need_a_size(varied):
    assert refusal(varied) == (
        "data.image_size must be given, such as 224, for the images of tiny, which vary in shape; "
        "found 0."
    )


def _truncated(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def _overwritten(path):
    whole = bytearray(path.read_bytes())
    at = whole.index(b"IDAT")
    whole[at - 30 : at + 30] = bytes(60)
    path.write_bytes(whole)


def _not_an_image(path):
    write_records(path, [{"image": b"no image", "label": 0}] * SIZES["train"])


@pytest.mark.parametrize(
    "harm",
    [_truncated, _overwritten, _not_an_image, pathlib.Path.unlink, lambda p: p.write_bytes(b"")],
)
@pytest.mark.parametrize("stream", ["never", "always"])
def test_files_that_are_damaged(tmp_path, splits, harm, stream):
    folder = write_set(tmp_path, splits)
    harm(folder / "tiny-train.array_record-00000-of-00001")
    with pytest.raises(ValueError) as error:
        dataset = load(tmp_path, stream=stream, **NORMAL)
        data.Feed(dataset.train, dataset.preprocess, data_seed=0, size=SIZES["train"])(0)
    message = str(error.value)
    assert message.startswith(f"data.name: the files of tiny (train) in {folder} cannot be read (")
    assert message.endswith("); copy or prepare the set again.") and "\n" not in message


# --- the published sets, where they are ---------------------------------------------------------


@pytest.mark.long
@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the prepared sets are not here")
@pytest.mark.parametrize(
    "name,sizes,shape",
    [
        ("cifar100", (50_000, 10_000), (32, 32, 3)),
        ("fashion_mnist", (60_000, 10_000), (28, 28, 1)),
    ],
)
def test_published_sets(name, sizes, shape):
    dataset = load(SHARED, name=name)
    assert data.describe(dataset) == describe(SHARED, name=name)
    splits = dataset.train, dataset.test
    assert tuple(map(len, splits)) == sizes
    for split in splits:
        assert split.inputs.shape[1:] == shape
        counts = np.bincount(split.labels, minlength=dataset.num_classes)
        np.testing.assert_array_equal(counts, len(split) // dataset.num_classes)
    assert len(dataset.class_names) == dataset.num_classes
    if name == "cifar100":
        mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        np.testing.assert_allclose(dataset.preprocess.mean, mean, atol=1e-3)
        np.testing.assert_allclose(dataset.preprocess.std, std, atol=1e-3)
