"""Image-classification sets of TensorFlow Datasets, read from ArrayRecord without TensorFlow."""

import importlib.util
import io
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from abkd_jax.data.arrays import Examples, from_arrays, hold_out, preprocessing
from abkd_jax.data.sets import DataSet
from abkd_jax.data.stream import Stream
from abkd_jax.types import nearest

_RESIDENT_BYTES = 4 * 2**30  # of the decoded images; larger sets are streamed
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_STREAM = ("auto", "always", "never")
_FORMAT = "array_record"


def images(
    *,
    name: str,
    data_seed: int,
    validation: int,
    labelled: int = 0,
    omit: tuple[int, ...] = (),
    pad: int = 0,
    flip: bool = False,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    data_dir: str = "",
    download: bool = False,
    test_split: str = "test",
    stream: str = "auto",
    image_size: int = 0,
) -> DataSet:
    """An image-classification set of TensorFlow Datasets, such as fashion_mnist or cifar100.

    Args:
        name: as TFDS has it, a config or a version included: "cifar100", "cifar10_1/v6".
        data_seed: of the split into training and validation images.
        validation: how many of the training images to hold out, at random; 0 for no validation
            split, as in the published protocols of CIFAR.
        labelled: how many labels of the other training images to keep, the same number of each
            class; 0 keeps all.
        omit: classes of which a student sees no image.
        pad: of random crops, in pixels; 0 for none.
        flip: whether training images are mirrored with probability 1/2.
        mean: one number for each channel, of pixels in [0, 1]; () for that of the training images.
        std: likewise.
        data_dir: where TFDS keeps its sets; "" for the environment variable TFDS_DATA_DIR, or
            TFDS's own default.
        download: whether to prepare a set that is not there, which needs TensorFlow.
        test_split: the name of the split to test on.
        stream: "never" decodes all images to the device, "always" reads them as they are needed;
            "auto" reads sets of more than 4 GiB, of images of varying shape and with image_size.
        image_size: 0 for images as they are. Otherwise ImageNet's practice: training images are
            random crops, of 8 % to 100 % of the area, and test images the centre, resized to
            squares of this side.

    Returns:
        The set, inputs `[N, H, W, C]` uint8. Streams show all labels of all classes.

    Raises:
        ValueError: one sentence that names the field, what was found and what was expected.
    """
    if stream not in _STREAM:
        raise ValueError(f"data.stream must be one of {', '.join(_STREAM)}; found {stream!r}.")
    if image_size < 0:
        raise ValueError(f"data.image_size must be at least 0; found {image_size}.")
    builder = _prepared(name, data_dir, download)
    for split in ("train", test_split):
        if split not in builder.info.splits:
            field = "data.name" if split == "train" else "data.test_split"
            raise ValueError(
                f"{field}: the set {name!r} has no split {split!r}; its splits are "
                f"{', '.join(builder.info.splits)}."
            )
    train, test = Records(builder, "train"), Records(builder, test_split)
    order = np.random.default_rng(data_seed).permutation(len(train))
    kept, held_out = hold_out(order, validation)
    augmentation = {"pad": pad, "flip": flip, "mean": mean, "std": std}
    if _is_streamed(train, len(train) + len(test), stream, image_size):
        if labelled or omit:
            raise ValueError(
                f"data.labelled and data.omit need the images in memory, but {name!r} is streamed; "
                "leave them out, or set data.stream='never' and data.image_size=0."
            )
        return _streams(train, test, kept, held_out, image_size, **augmentation)
    inputs, labels = _decoded(train)
    examples = inputs[kept], labels[kept]
    if not (mean or std):
        augmentation |= _statistics(examples[0])
    return from_arrays(
        train=examples,
        validation=(inputs[held_out], labels[held_out]) if validation else None,
        test=_decoded(test),
        num_classes=train.num_classes,
        labelled=labelled,
        omit=omit,
        class_names=train.class_names,
        **augmentation,
    )


def check_name(name: Any, embedded: Sequence[str], data_dir: Any = "") -> None:
    """Refuses a name that is neither TFDS's nor that of a folder where TFDS keeps its sets.

    Args:
        name: of a config's data group.
        embedded: the names of the sets that need no files.
        data_dir: as `images` takes it.

    Raises:
        ValueError: one sentence, with the nearest name.
    """
    import tensorflow_datasets as tfds  # not at the top: the embedded sets have no need of it

    known = [*embedded, *tfds.list_builders(with_community_datasets=False)]
    if isinstance(name, str) and name:
        set_name = re.split("[/:]", name)[0]
        if set_name in known or (_folder(str(data_dir)) / set_name).is_dir():
            return
    hint = nearest(name, known) if isinstance(name, str) else ""
    raise ValueError(
        f"data.name must be {', '.join(embedded)} or an image-classification set of "
        f"tensorflow_datasets; found {name!r}{hint}."
    )


class Records:
    """The images and labels of a prepared split, decoded as they are read.

    Attributes:
        name: of the set and its split, for messages.
        shape: (height, width, channels); None for a height or width that varies.
        num_classes: K.
        class_names: K names, or none.
    """

    def __init__(self, builder: Any, split: str):
        """The records of a split.

        Raises:
            ValueError: if they have no uint8 image and label, or their files cannot be opened.
        """
        import tensorflow_datasets as tfds

        self.name = f"{builder.info.name} ({split}) in {builder.data_dir}"
        features = dict(builder.info.features.items())
        image, label = features.get("image"), features.get("label")
        is_image = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
        if not is_image or not isinstance(label, tfds.features.ClassLabel):
            raise ValueError(
                f"data.name must be a classification set, with an 8-bit 'image' and a class "
                f"'label'; {builder.info.name} has {', '.join(features)}: choose another set."
            )
        height, width, channels = image.shape
        self.shape = height, width, channels or 3
        self.num_classes = label.num_classes
        self.class_names = tuple(label.names or ())
        skip = {"image": tfds.decode.SkipDecoding()}  # Pillow does it, without TFDS's warnings
        try:
            self._examples = builder.as_data_source(split, decoders=skip)
            self._length = len(self._examples)
        except Exception as error:
            raise self._unreadable(error) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        """A record's image `[H, W, C]` uint8 and label.

        Raises:
            ValueError: if it cannot be read or decoded.
        """
        try:
            example = self._examples[int(row)]
            return self._image(example["image"]), int(example["label"])
        except Exception as error:  # those of riegeli, protobuf and Pillow have no common kind
            raise self._unreadable(error) from error

    def _image(self, encoded: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(encoded)) as picture:
            image = np.asarray(picture.convert(_MODES[self.shape[-1]]))
        return image[..., None] if image.ndim == 2 else image

    def _unreadable(self, error: Exception) -> ValueError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return ValueError(
            f"data.name: the files of {self.name} cannot be read ({reason}); copy or prepare the "
            "set again."
        )


def _folder(data_dir: str) -> pathlib.Path:
    """Where TFDS keeps its sets; the variable is read now, not when TFDS was imported."""
    default = pathlib.Path.home() / "tensorflow_datasets"
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or default).expanduser()


def _prepared(name: str, data_dir: str, download: bool) -> Any:
    """The builder of a set whose ArrayRecord files are there."""
    import tensorflow_datasets as tfds

    folder = _folder(data_dir)
    field = "data.data_dir" if data_dir else "TFDS_DATA_DIR"
    if (data_dir or os.environ.get("TFDS_DATA_DIR")) and not (folder.is_dir() or download):
        raise ValueError(
            f"{field} must be a folder with prepared sets of TFDS; found {str(folder)!r}, which "
            "does not exist: correct it, or set data.download=True to prepare the set there."
        )
    try:
        builder = tfds.builder(name, data_dir=folder)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rpartition('": ')[-1].rstrip(".: ")
        raise ValueError(
            f"data.name must be a set of tensorflow_datasets, with a config and a version that it "
            f"has; found {name!r} ({reason})."
        ) from error
    if download and not builder.info.splits:
        _prepare(builder)
    if not builder.info.splits:
        raise ValueError(
            f"data.name: the set {name!r} is not prepared in {folder}; install TensorFlow with pip "
            "install 'abkd_jax[prepare]' and set data.download=True to prepare it, or give a "
            "data.data_dir or TFDS_DATA_DIR that has it in ArrayRecord format."
        )
    found = builder.info.file_format.value
    if found != _FORMAT:
        raise ValueError(
            f"data.name: the set {name!r} in {folder} is in {found} format, and {_FORMAT} is "
            "needed; give another data.data_dir, which has it so or in which data.download=True "
            "prepares it."
        )
    return builder


def _prepare(builder: Any) -> None:
    """Downloads a set and writes its ArrayRecord files."""
    import tensorflow_datasets as tfds

    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            "data.download=True needs TensorFlow to prepare a set; install it with pip install "
            "'abkd_jax[prepare]', or set data.data_dir to a folder that has the set."
        )
    config = tfds.download.DownloadConfig()
    builder.download_and_prepare(download_config=config, file_format=_FORMAT)


def _is_streamed(records: Records, num_images: int, stream: str, image_size: int) -> bool:
    """Whether the set is read as it is needed; refuses what cannot be done."""
    varies = None in records.shape
    if varies and not image_size:
        raise ValueError(
            f"data.image_size is missing: the images of {records.name} vary in shape; give "
            "data.image_size, such as 224."
        )
    if stream == "never" and image_size:
        raise ValueError(
            "data.stream='never' cannot be combined with data.image_size, whose crops are made as "
            "the images are read; set data.stream='auto', or data.image_size=0."
        )
    if stream != "auto":
        return stream == "always"
    return bool(image_size) or num_images * int(np.prod(records.shape)) > _RESIDENT_BYTES


def _streams(
    train: Records,
    test: Records,
    kept: np.ndarray,
    held_out: np.ndarray,
    image_size: int,
    *,
    pad: int,
    flip: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> DataSet:
    """The set as streams; with image_size crops and flips are theirs, else the device's."""
    if not (mean and std):
        raise ValueError(
            f"data.mean and data.std must be given for a stream, with a number for each of the "
            f"{train.shape[-1]} channels; found mean={tuple(mean)} and std={tuple(std)}."
        )
    shape = train.shape
    if image_size:
        shape = image_size, image_size, train.shape[-1]
        if pad:
            raise ValueError(
                f"data.pad must be 0 with data.image_size, which crops at random; found {pad}."
            )
    on_device = flip and not image_size
    preprocess = preprocessing(shape, pad=pad, flip=on_device, mean=mean, std=std)
    training = Stream(train, kept, image_size=image_size, flip=flip)
    return DataSet(
        train=training,
        validation=Stream(train, held_out, image_size=image_size) if len(held_out) else None,
        test=Stream(test, np.arange(len(test)), image_size=image_size),
        teacher=training,
        preprocess=preprocess,
        num_classes=train.num_classes,
        class_names=train.class_names,
    )


def _decoded(records: Records) -> Examples:
    """All images `[N, H, W, C]` uint8 and labels `[N]` int32, with a progress bar.

    One thread: for images of some kilobytes others wait for Python's lock, and slow it down.
    """
    from tqdm import tqdm

    started = time.monotonic()
    inputs = np.empty((len(records), *records.shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    rows = tqdm(range(len(records)), desc=f"decoding {records.name}", disable=None)
    for row in rows:
        inputs[row], labels[row] = records[row]
    if rows.disable and jax.process_index() == 0:  # no terminal to show progress on
        seconds = time.monotonic() - started
        print(
            f"decoded {len(records)} images of {records.name} in {seconds:.1f} s", file=sys.stderr
        )
    return inputs, labels


def _statistics(inputs: np.ndarray) -> dict[str, tuple[float, ...]]:
    """The mean and the standard deviation of each channel, of pixels in [0, 1]: exact, by counts.

    Args:
        inputs: `[N, H, W, C]` uint8.

    Raises:
        ValueError: if a channel is constant.
    """
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(inputs.shape[-1]):
        counts = np.bincount(inputs[..., channel].ravel(), minlength=256)
        mean = np.average(values, weights=counts)
        means.append(float(mean))
        stds.append(float(np.sqrt(np.average((values - mean) ** 2, weights=counts))))
    if min(stds) == 0:
        raise ValueError(
            f"data.std must be positive in each channel; that of the training images is "
            f"{tuple(stds)}: give data.mean and data.std."
        )
    return {"mean": tuple(means), "std": tuple(stds)}
