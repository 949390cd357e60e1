"""Streams: what each step reads, from any start and on any number of hosts, and random crops."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

from abkd_jax import data
from abkd_jax.data import stream
from abkd_jax.data.augment import augmentation_key, step_key

NUM = 11


class Records:
    """Images that name their row, and what was read of them."""

    def __init__(self, size=NUM, shape=(3, 4, 2)):
        drawn = np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8)
        self.images, self.read = drawn, []

    def __getitem__(self, row):
        self.read.append(int(row))
        return {"inputs": self.images[row], "labels": np.int32(row)}


def new(rows=NUM, **options):
    return data.Stream(Records(), np.arange(rows), **options)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels_of(batches):
    return [batch["labels"].tolist() for batch in batches]


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 11])
def test_each_example_comes_once_an_epoch(size):
    steps_per_epoch = NUM // size
    records = Records()
    batches = take(data.Stream(records, np.arange(NUM)).batches(0, size), 4 * steps_per_epoch)
    for batch in batches:
        assert batch["inputs"].shape == (size, 3, 4, 2) and batch["inputs"].dtype == np.uint8
        assert batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"], records.images[batch["labels"]])
    visited = np.concatenate(labels_of(batches)).reshape(4, -1)
    for epoch in visited:
        assert len(set(epoch.tolist())) == steps_per_epoch * size
    assert len({epoch.tobytes() for epoch in visited}) == 4
    if NUM % size:  # those that an epoch leaves out are not always the same
        assert len({frozenset(range(NUM)) - set(epoch.tolist()) for epoch in visited}) > 1


def test_a_part_of_the_records_is_all_that_is_read():
    records, rows = Records(), np.array([7, 2, 9, 4])
    split = data.Stream(records, rows)
    assert len(split) == 4
    assert sorted(itertools.chain(*labels_of(take(split.batches(0, 2), 2)))) == [2, 4, 7, 9]
    assert set(records.read) <= set(rows.tolist())


@pytest.mark.parametrize("options", [{}, dict(image_size=2, flip=True)])
def test_a_step_may_be_started_at(options):
    whole = take(new(**options).batches(5, 4), 9)  # two steps an epoch
    for start in (1, 2, 5, 8):
        assert equal(take(new(**options).batches(5, 4, start), 9 - start), whole[start:])
    assert not equal(take(new(**options).batches(6, 4), 9), whole)


def test_a_start_replays_nothing():
    records = Records(size=200)
    next(data.Stream(records, np.arange(200)).batches(0, 10, start=10**6))
    assert len(records.read) < 1000  # what threads read ahead


@pytest.mark.parametrize("num_hosts", [2, 4])
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("options", [{}, dict(image_size=2, flip=True)])
def test_hosts_share_each_batch(num_hosts, options, start):
    hosts = [
        take(new(**options, process_index=i, process_count=num_hosts).batches(3, 8, start), 4)
        for i in range(num_hosts)
    ]
    together = take(new(**options).batches(3, 8, start), 4)
    for parts, batch in zip(zip(*hosts, strict=True), together, strict=True):
        assert {len(part["labels"]) for part in parts} == {8 // num_hosts}
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        assert equal(joined, batch)
        assert len(set(joined["labels"].tolist())) == 8  # so no two hosts have the same


def test_a_batch_that_the_hosts_cannot_share():
    expected = "batch_size must be a multiple of the 2 processes that read the stream; found 5."
    split = new(process_index=0, process_count=2)
    for read in (lambda: split.batches(0, 5), lambda: split.evaluation(5)):
        with pytest.raises(ValueError) as error:
            next(read())
        assert str(error.value) == expected


def test_by_default_a_process_is_jaxs():
    assert (new().process_index, new().process_count) == (0, 1)


# --- feeds --------------------------------------------------------------------------------------


def test_a_feed_serves_one_step_at_a_time():
    whole = take(new().batches(0, 4), 8)
    feed = data.Feed(new(), data.Preprocess(), data_seed=0, size=4)
    for step in (0, 1, 2, 6, 7, 3):  # in order, ahead, and back
        examples, until = feed(step)
        assert until == step + 1
        assert equal(examples.rows, whole[step])


def test_a_feed_stacks_the_steps_of_a_call():
    """The same batches as one by one, whichever calls were made before."""
    whole = take(new().batches(0, 4), 8)
    preprocess = data.Preprocess(mean=jnp.full(2, 0.5), std=jnp.full(2, 0.2), pad=1, flip=True)
    feed, alone = (data.Feed(new(), preprocess, data_seed=0, size=4) for _ in range(2))
    batch = jax.jit(lambda examples, step: examples.batch(0, step))
    for step, most in ((0, 3), (3, 1), (4, 3), (1, 2)):  # an epoch has two steps
        examples, until = feed(step, most)
        assert until == step + most
        assert len(examples.rows["labels"]) == (most if most > 1 else 4)
        for i in range(step, until):
            found = batch(examples, i)
            np.testing.assert_array_equal(found["labels"], whole[i]["labels"])
            assert equal(found["inputs"], batch(alone(i)[0], i)["inputs"])
            assert jax.random.key_data(found["key"]).tolist() == (
                jax.random.key_data(step_key(0, i)).tolist()
            )


def test_a_feed_in_order_starts_reading_once(monkeypatch):
    starts = []
    batches = data.Stream.batches

    def counted(self, data_seed, size, start, order_of):
        starts.append(start)
        return batches(self, data_seed, size, start, order_of)

    monkeypatch.setattr(data.Stream, "batches", counted)
    feed = data.Feed(new(), data.Preprocess(), data_seed=0, size=4)
    for step in (0, 1, 2, 3, 7, 8):
        feed(step)
    assert starts == [0, 7]


def test_a_batch_is_augmented_on_the_device():
    preprocess = data.Preprocess(mean=jnp.full(2, 0.5), std=jnp.full(2, 0.2), pad=1, flip=True)
    examples, _ = data.Feed(new(), preprocess, data_seed=7, size=4)(3)
    batch = jax.jit(lambda examples, step: examples.batch(7, step))(examples, 3)
    key = step_key(7, 3)
    assert set(batch) == {"inputs", "labels", "where", "labelled", "key"}
    inputs = jnp.asarray(examples.rows["inputs"])
    expected = data.augmented(inputs, jnp.arange(4), augmentation_key(key), preprocess)
    np.testing.assert_allclose(batch["inputs"], expected, atol=1e-6)
    assert jax.random.key_data(batch["key"]).tolist() == jax.random.key_data(key).tolist()
    np.testing.assert_array_equal(batch["labels"], examples.rows["labels"])
    assert batch["where"].all() and batch["labelled"].all() and batch["where"].shape == (4,)


def test_more_than_there_is():
    with pytest.raises(ValueError) as error:
        data.Feed(new(), data.Preprocess(), data_seed=0, size=12)
    assert str(error.value) == (
        "batch_size must be between 1 and the 11 examples of the split; found 12."
    )


class Sequences:
    """Records of tokens, of which some do not count and some have no label."""

    ids = np.random.default_rng(0).integers(0, 9, (NUM, 5)).astype(np.int32)

    def __getitem__(self, row):
        labels = np.where(np.arange(5) % 3, self.ids[row], -1)
        where, books = np.arange(5) < 4, np.full(5, row % 2 == 0)
        return {"inputs": {"ids": self.ids[row]}, "labels": labels, "where": where, "books": books}


def test_a_stream_of_sequences():
    split = data.Stream(Sequences(), np.arange(NUM))
    examples, _ = data.Feed(split, data.Preprocess(), data_seed=0, size=4)(2)
    batches = [jax.jit(lambda x, step: x.batch(0, step))(examples, 2)]
    batches += data.evaluation_batches(split, 4, data.Preprocess())
    visited = [np.ones(4, bool)] + [np.arange(i, i + 4) < NUM for i in (0, 4, 8)]
    for batch, real in zip(batches, visited, strict=True):
        ids, real = np.asarray(batch["inputs"]["ids"]), real[:, None]
        assert ids.dtype == np.int32 and ids.shape == (4, 5)
        known = np.broadcast_to(np.arange(5) % 3 > 0, (4, 5))
        where = real & (np.arange(5) < 4)
        np.testing.assert_array_equal(batch["labels"], np.where(known, ids, -1))
        np.testing.assert_array_equal(batch["where"], where)
        np.testing.assert_array_equal(batch["labelled"], where & known)
        even = np.array([np.flatnonzero((Sequences.ids == row).all(1))[0] % 2 == 0 for row in ids])
        np.testing.assert_array_equal(batch["books"], where & even[:, None])


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 11, 13])
def test_evaluation_sees_everything_once_in_order(size):
    records = Records()
    split = data.Stream(records, np.arange(NUM)[::-1])
    preprocess = data.Preprocess(mean=jnp.full(2, 0.5), std=jnp.full(2, 0.2), pad=2, flip=True)
    batches = list(data.evaluation_batches(split, size, preprocess))
    assert len(batches) == -(-NUM // size)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    where = joined["where"]
    assert len(where) == len(batches) * size and where.dtype == bool
    assert where[:NUM].all() and not where[NUM:].any()
    np.testing.assert_array_equal(joined["labelled"], where)
    np.testing.assert_array_equal(joined["labels"][where], np.arange(NUM)[::-1])
    expected = (records.images[::-1] / 255 - 0.5) / 0.2
    np.testing.assert_allclose(joined["inputs"][where], expected, atol=1e-5)
    raw = next(data.evaluation_batches(split, size))
    assert raw["inputs"].dtype == jnp.uint8


def test_hosts_share_an_evaluation():
    hosts = [
        list(data.evaluation_batches(new(process_index=i, process_count=2), 4)) for i in range(2)
    ]
    together = list(data.evaluation_batches(new(), 4))
    for parts, batch in zip(zip(*hosts, strict=True), together, strict=True):
        assert equal(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), batch)


# --- crops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("height,width", [(60, 60), (40, 90), (200, 50), (1, 1), (7, 300)])
def test_a_random_box_lies_in_the_image(height, width):
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = stream.random_box(height, width, rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_boxes_are_as_they_are_defined():
    side, rng = 1000, np.random.default_rng(0)
    boxes = np.array([stream.random_box(side, side, rng) for _ in range(20_000)], float)
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = across * down / side**2, across / down
    assert 0.079 < areas.min() < 0.09 and 0.98 < areas.max() <= 1
    assert 0.745 < ratios.min() < 0.76 and 1.32 < ratios.max() < 1.34
    # By area: boxes of up to 3/4 of the image fit at any ratio, so there the area is uniform.
    fits = areas < 0.75
    np.testing.assert_allclose(areas[fits].mean(), (0.08 + 0.75) / 2, rtol=0.02)
    logs = np.log(ratios[fits])
    np.testing.assert_allclose(logs.mean(), 0, atol=0.01)
    np.testing.assert_allclose(logs.std(), np.log(16 / 9) / np.sqrt(12), rtol=0.02)
    places = boxes[fits, 0] / (side - across[fits])  # uniform among those inside
    np.testing.assert_allclose([places.mean(), places.std()], [0.5, 12**-0.5], rtol=0.02)


def test_a_random_box_may_be_anywhere_inside_of_the_image():
    rng = np.random.default_rng(0)
    boxes = np.array([stream.random_box(4, 4, rng) for _ in range(500)])
    for low, high in ((0, 2), (1, 3)):
        of_two = boxes[boxes[:, high] - boxes[:, low] == 2, low]
        assert set(of_two.tolist()) == {0, 1, 2}


def test_an_image_that_no_box_fits_gives_its_centre():
    rng = np.random.default_rng(0)
    boxes = {stream.random_box(10, 1000, rng) for _ in range(200)}
    assert boxes == {(493, 0, 506, 10)}  # 13 is nearest to 10 * 4/3
    tall = {stream.random_box(1000, 9, rng) for _ in range(200)}
    assert tall == {(0, 494, 9, 506)}  # 12 = 9 / (3/4)


def test_a_random_crop_is_of_the_image():
    """Of an image whose colours are its coordinates: the crop keeps their order, or mirrors it."""
    image = np.zeros((50, 60, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(60) * 4, np.arange(50)[:, None] * 5
    records = Records()
    records.images = np.stack([image] * NUM)
    split = data.Stream(records, np.arange(NUM), image_size=8, flip=True)
    crops = np.concatenate([batch["inputs"] for batch in take(split.batches(0, 11), 20)])
    assert crops.shape == (220, 8, 8, 3) and crops.dtype == np.uint8
    across = np.diff(crops[..., 0].astype(int), axis=2).mean((1, 2))
    down = np.diff(crops[..., 1].astype(int), axis=1).mean((1, 2))
    assert (down > 0).all() and (crops[..., 2] == 0).all()
    assert 70 < (across < 0).sum() < 150 and (across != 0).all()
    assert len({crop.tobytes() for crop in crops}) > 200
    never = data.Stream(records, np.arange(NUM), image_size=8)
    plain = np.concatenate([batch["inputs"] for batch in take(never.batches(0, 11), 5)])
    assert (np.diff(plain[..., 0].astype(int), axis=2).mean((1, 2)) > 0).all()


@pytest.mark.parametrize("shape", [(60, 80, 3), (80, 60, 3), (70, 70, 1)])
def test_the_centre_is_that_of_the_resized_image(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = stream.center(image, 28)
    assert found.shape == (28, 28, shape[-1]) and found.dtype == np.uint8
    width, height = {60: (32, 42), 80: (42, 32), 70: (32, 32)}[shape[1]]
    picture = Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - 28) // 2, (height - 28) // 2
    expected = np.asarray(picture.crop((left, top, left + 28, top + 28)))
    np.testing.assert_array_equal(found.squeeze(), expected)
