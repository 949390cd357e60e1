"""Image-classification sets of TensorFlow Datasets, read from ArrayRecord without TensorFlow."""

import dataclasses
import functools
import importlib.util
import io
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from abkd_jax.binding import nearest
from abkd_jax.checks import require
from abkd_jax.data.arrays import from_arrays
from abkd_jax.data.decoded import decoded
from abkd_jax.data.options import Found, Options, check_held_out, data_set
from abkd_jax.data.sets import DataSet, Description
from abkd_jax.data.stream import Stream

_RESIDENT_BYTES = 4 * 2**30  # of the decoded images; larger sets are streamed
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_STREAM = ("auto", "always", "never")
_FORMAT = "array_record"


@data_set
def tfds(
    *,
    name: str,
    data_seed: int,
    validation: int,
    data_dir: str = "",
    download: bool = False,
    test_split: str = "test",
    stream: str = "auto",
    image_size: int = 0,
    options: Options,
) -> Found:
    """An image-classification set of TensorFlow Datasets, such as fashion_mnist or cifar100.

    Args:
        name: as TFDS has it, a config or a version included: "cifar100", "cifar10_1/v6".
        data_seed: of the split into training and validation images.
        validation: how many of the training images to hold out, at random; 0 for no validation
            split, as in the published protocols of CIFAR.
        data_dir: where TFDS keeps its sets; "" for the environment variable TFDS_DATA_DIR, or
            TFDS's own default.
        download: whether to prepare a set that is not there, which needs TensorFlow.
        test_split: the name of the split to test on.
        stream: "never" decodes all images to the device, "always" reads them as they are needed;
            "auto" reads sets of more than 4 GiB, of images of varying shape and with image_size.
        image_size: 0 for images as they are. Otherwise ImageNet's practice: training images are
            random crops, of 8 % to 100 % of the area, and test images the centre, resized to
            squares of this side.
        options: the keywords labelled, omit, imbalance, pad, flip, mean and std; see `Options`.
            Here mean and std () stand for those of the training images, all of them, whatever
            imbalance leaves. Streams show all labels of all classes.

    Returns:
        The set, inputs `[N, H, W, C]` uint8.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    require(stream in _STREAM, "data.stream", f"one of {', '.join(_STREAM)}", stream)
    require(image_size >= 0, "data.image_size", "at least 0", image_size)
    builder = _prepared(name, data_dir, download)
    sizes = _sizes(builder.info, test_split)
    check_held_out(validation, sizes[0])
    shape, classes = _features(builder.info)
    streamed = _is_streamed(name, shape, sum(sizes), stream, image_size)
    if streamed:
        _check_streamed(options, image_size)
    side = (image_size,) * 2 if image_size else shape[:2]
    description = Description(
        classes.num_classes,
        tuple(classes.names or ()),
        jax.ShapeDtypeStruct((*side, shape[-1]), np.float32),
        jax.ShapeDtypeStruct((), np.int32),
    )
    on_device = dataclasses.replace(options, flip=options.flip and not image_size)
    preprocess = on_device.preprocess(description)

    def read() -> DataSet:
        train, test = (Records(builder, split, shape) for split in ("train", test_split))
        order = np.random.default_rng(data_seed).permutation(len(train))
        held_out, kept = rows = np.split(order, [validation])
        if not streamed:
            return _resident(train, test, rows, description, options)
        # With image_size crops and flips are the stream's, else the device's.
        stream_of = functools.partial(Stream, image_size=image_size, flip=options.flip)
        training = stream_of(train, kept)
        return DataSet(
            train=training,
            full=training,
            validation=stream_of(train, held_out) if validation else None,
            test=stream_of(test, np.arange(len(test))),
            preprocess=preprocess,
            num_classes=description.num_classes,
            class_names=description.class_names,
        )

    return description, read


def _resident(
    train: "Records", test: "Records", rows: list, description: Description, options: Options
) -> DataSet:
    """The set in memory; rows are those of `train` that are held out, and those that are kept."""
    (inputs, labels), (held_out, kept) = decoded(train), rows
    if not len(options.mean):
        options = dataclasses.replace(options, **_statistics(inputs[kept]))
    return from_arrays(
        train=(inputs[kept], labels[kept]),
        validation=(inputs[held_out], labels[held_out]) if len(held_out) else None,
        test=decoded(test),
        num_classes=description.num_classes,
        class_names=description.class_names,
        **vars(options),
    )


def _sizes(info: Any, test_split: str) -> list[int]:
    """How many images there are to train on, and to test on."""
    splits = info.splits
    found = f"{info.name} with {', '.join(splits)}"
    require("train" in splits, "data.name", "a set with a split 'train'", found)
    require(test_split in splits, "data.test_split", f"one of {', '.join(splits)}", test_split)
    return [splits[split].num_examples for split in ("train", test_split)]


def _features(info: Any) -> tuple[tuple[int | None, int | None, int], Any]:
    """The images' (height, width, channels), None for what varies, and TFDS's label feature."""
    from tensorflow_datasets import features  # not at the top: the embedded sets have no need of it

    found = dict(info.features.items())
    image, label = found.get("image"), found.get("label")
    is_image = isinstance(image, features.Image) and image.np_dtype == np.uint8
    fits = is_image and isinstance(label, features.ClassLabel)
    expected = "a classification set, with an 8-bit 'image' and a class 'label'"
    require(fits, "data.name", expected, f"{info.name} with {', '.join(found)}")
    return (*image.shape[:2], image.shape[2] or 3), label


def _is_streamed(name: str, shape: tuple, count: int, stream: str, image_size: int) -> bool:
    """Whether a set of `count` images is read as it is needed."""
    expected = f"given, such as 224, for the images of {name}, which vary in shape"
    require(image_size or None not in shape, "data.image_size", expected, image_size)
    require(
        not (image_size and stream == "never"),
        "data.stream",
        "'auto' with data.image_size, whose crops are made as images are read (or set it to 0)",
        stream,
    )
    if stream != "auto":
        return stream == "always"
    return bool(image_size) or count * int(np.prod(shape)) > _RESIDENT_BYTES


def _check_streamed(options: Options, image_size: int) -> None:
    """Refuses what a stream cannot do."""
    found = options.labelled, options.omit, options.imbalance
    expected = "left out for a stream (or set data.stream='never' and data.image_size=0)"
    everything = not (options.labelled or len(options.omit) or options.imbalance != 1)
    require(everything, "data.labelled, data.omit and data.imbalance", expected, found)
    given = len(options.mean) and len(options.std)
    expected = "given for a stream, a number for each channel"
    require(given, "data.mean and data.std", expected, (options.mean, options.std))
    cropped = image_size and options.pad
    require(not cropped, "data.pad", "0 with data.image_size, which crops at random", options.pad)


class Records:
    """The images and labels of a prepared split, decoded as they are read.

    Attributes:
        name: of the set and its split, for messages.
        folder: of the set's files.
        shape: (height, width, channels); None for a height or width that varies.
    """

    def __init__(self, builder: Any, split: str, shape: tuple[int | None, int | None, int]):
        """The records of a split.

        Raises:
            ValueError: if their files cannot be opened.
        """
        from tensorflow_datasets import decode

        self.name = f"{builder.info.name} ({split}) in {builder.data_dir}"
        self.folder, self.shape = pathlib.Path(builder.data_dir), shape
        skip = {"image": decode.SkipDecoding()}  # Pillow does it, without TFDS's warnings
        try:
            self._examples = builder.as_data_source(split, decoders=skip)
            self._length = len(self._examples)
        except Exception as error:
            raise self._unreadable(error) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A record's inputs `[H, W, C]` uint8, and labels, an int32.

        Raises:
            ValueError: if it cannot be read or decoded.
        """
        from PIL import Image

        try:
            example = self._examples[int(row)]
            with Image.open(io.BytesIO(example["image"])) as picture:
                image = np.asarray(picture.convert(_MODES[self.shape[-1]]))
            inputs = image.reshape(*image.shape[:2], -1)  # grey has an axis of channels, too
            return {"inputs": inputs, "labels": np.int32(example["label"])}
        except Exception as error:  # those of riegeli, protobuf and Pillow have no common kind
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ValueError(
            f"data.name: the files of {self.name} cannot be read ({reason}); copy or prepare the "
            "set again."
        )


def _prepared(name: str, data_dir: str, download: bool) -> Any:
    """The builder of a set whose ArrayRecord files are there."""
    import tensorflow_datasets as datasets

    # The variable is read now, not when TFDS was imported.
    default = pathlib.Path.home() / "tensorflow_datasets"
    folder = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or default).expanduser()
    _check_place(name, folder, data_dir, download)
    try:
        builder = datasets.builder(name, data_dir=folder)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rpartition('": ')[-1].rstrip(".: ")
        raise ValueError(
            f"data.name must be a set of tensorflow_datasets, with a config and a version that it "
            f"has; found {name!r} ({reason})."
        ) from error
    if download and not builder.info.splits:
        require(
            importlib.util.find_spec("tensorflow"),
            "data.download",
            "False without TensorFlow, which prepares a set (install it with pip install "
            "'abkd_jax[prepare]', or set data.data_dir to a folder that has the set)",
            True,
        )
        builder.download_and_prepare(file_format=_FORMAT)
    require(
        builder.info.splits,
        "data.name",
        f"a set that is prepared in {folder} (install TensorFlow with pip install "
        "'abkd_jax[prepare]' and set data.download=True to prepare it, or give a data.data_dir or "
        "TFDS_DATA_DIR that has it in ArrayRecord format)",
        name,
    )
    found = builder.info.file_format.value
    expected = (
        f"a set that {folder} has in {_FORMAT} format (give another data.data_dir, which has it so "
        "or in which data.download=True prepares it)"
    )
    require(found == _FORMAT, "data.name", expected, f"{name} in {found} format")
    return builder


def _check_place(name: str, folder: pathlib.Path, data_dir: str, download: bool) -> None:
    """Refuses a name that is neither TFDS's nor that of a folder of sets, and such a folder."""
    import tensorflow_datasets as datasets

    known = datasets.list_builders(with_community_datasets=False)
    set_name = re.split("[/:]", name)[0]
    if set_name not in known and not (set_name and (folder / set_name).is_dir()):
        raise ValueError(
            "data.name must be an image-classification set of tensorflow_datasets; found "
            f"{name!r}{nearest(name, known)}."
        )
    given = data_dir or os.environ.get("TFDS_DATA_DIR")
    if given and not (folder.is_dir() or download):
        raise ValueError(
            f"{'data.data_dir' if data_dir else 'TFDS_DATA_DIR'} must be a folder with prepared "
            f"sets of TFDS; found {str(folder)!r}, which does not exist: correct it, or set "
            "data.download=True to prepare the set there."
        )


def _statistics(inputs: np.ndarray) -> dict[str, tuple[float, ...]]:
    """The mean and the standard deviation of each channel, of pixels in [0, 1]: exact, by counts.

    Args:
        inputs: `[N, H, W, C]` uint8.
    """
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(inputs.shape[-1]):
        counts = np.bincount(inputs[..., channel].ravel(), minlength=256)
        mean = np.average(values, weights=counts)
        means.append(float(mean))
        stds.append(float(np.sqrt(np.average((values - mean) ** 2, weights=counts))))
    return {"mean": tuple(means), "std": tuple(stds)}
