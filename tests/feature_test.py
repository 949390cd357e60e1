"""Losses on features against torch and numpy, projections, and runs with centers and heads."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest
import scipy.special
from jax import numpy as jnp
from loss_contract import D, K, check_contract, draw

import abkd_jax
from abkd_jax import data, models, schema, train
from abkd_jax.losses import decoupled_features, norm_and_direction, total
from abkd_jax.losses.feature import aligned, class_means, norm
from abkd_jax.train import fit, optimizer, phase
from abkd_jax.train.loop import train_and_evaluate
from abkd_jax.types import Outputs, Term, bind

RNG = np.random.default_rng(5)
CENTERS = RNG.normal(size=(K, D)).round(3)
NEEDS_HEAD = ("hidden", "unembedding")


def features(hidden, **parts):
    return Outputs(hidden=jnp.asarray(hidden, jnp.float32), **parts)


def nd(student, teacher, labels, centers):
    batch = {"labels": jnp.asarray(labels)}
    return bind(norm_and_direction, centers=centers)(features(student), features(teacher), batch)


# --- norm_and_direction -------------------------------------------------------------------------


def published_nd(f_s, f_t, centers, labels):
    """The loop of the published code, in torch."""
    torch = pytest.importorskip("torch")
    values = []
    for s, t, label in zip(f_s, f_t, labels, strict=True):
        direction = centers[label] / torch.linalg.vector_norm(centers[label])
        longer = max(torch.linalg.vector_norm(s), torch.linalg.vector_norm(t))
        values.append(1 - torch.dot(s, direction) / longer)
    return torch.stack(values)


def drawn_features(student_scale, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(9, D)) for _ in range(2))
    return student_scale * student, teacher, rng.integers(0, K, 9)


@pytest.mark.parametrize("student_scale", [0.1, 1.0, 10.0])
def test_norm_and_direction_is_the_published_loss(student_scale):
    torch = pytest.importorskip("torch")
    student, teacher, labels = drawn_features(student_scale)
    s = torch.tensor(student, requires_grad=True)
    published = published_nd(s, torch.tensor(teacher), torch.tensor(CENTERS), labels)
    published.mean().backward()
    with jax.enable_x64(True):
        batch = {"labels": labels}
        loss = bind(norm_and_direction, centers=CENTERS)
        mean = lambda x: jnp.mean(loss(Outputs(hidden=x), Outputs(hidden=teacher), batch))  # noqa: E731
        values = loss(Outputs(hidden=student), Outputs(hidden=teacher), batch)
        np.testing.assert_allclose(values, published.detach(), rtol=1e-12)
        np.testing.assert_allclose(jax.grad(mean)(student), s.grad, rtol=1e-10, atol=1e-15)


def test_a_longer_student_has_one_minus_the_cosine():
    student, teacher, labels = drawn_features(10.0)
    chosen = CENTERS[labels]
    cosine = np.sum(student * chosen, -1)
    cosine /= np.linalg.norm(student, axis=-1) * np.linalg.norm(chosen, axis=-1)
    np.testing.assert_allclose(nd(student, teacher, labels, CENTERS), 1 - cosine, atol=1e-6)
    np.testing.assert_allclose(  # and does not depend on its norm
        nd(3 * student, teacher, labels, CENTERS), 1 - cosine, atol=1e-6
    )


def test_a_shorter_student_is_drawn_along_the_center_alone():
    student, teacher, labels = drawn_features(0.1)
    slope = jax.grad(lambda x: jnp.sum(nd(x, teacher, labels, CENTERS)))(student)
    directions = CENTERS[labels] / np.linalg.norm(CENTERS[labels], axis=-1, keepdims=True)
    expected = -directions / np.linalg.norm(teacher, axis=-1, keepdims=True)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def test_norms_of_zero_have_a_value_and_a_slope():
    zero, one = np.zeros(D), np.eye(D)[0]
    for student, teacher, centers, value, slope in (
        (zero, one, CENTERS, 1.0, -CENTERS[0] / np.linalg.norm(CENTERS[0])),
        (zero, zero, CENTERS, 1.0, None),
        (one, zero, np.zeros((K, D)), 1.0, zero),
    ):
        of = lambda x: nd(x, teacher, 0, centers)  # noqa: B023, E731
        np.testing.assert_allclose(of(student), value)
        found = jax.grad(of)(jnp.asarray(student, jnp.float32))
        assert np.isfinite(found).all()
        if slope is not None:
            np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6)


def test_the_contract_of_norm_and_direction():
    def truth(student, teacher, batch):
        f_s, c = student.hidden, CENTERS[np.maximum(batch["labels"], 0)]
        longer = np.maximum(*(np.linalg.norm(o.hidden, axis=-1) for o in (student, teacher)))
        return 1 - np.sum(f_s * c, -1) / np.linalg.norm(c, axis=-1) / longer

    check_contract(
        bind(norm_and_direction, centers=CENTERS),
        needs=("hidden",),
        where="labelled",
        stopped=("teacher", "numbers"),
        truth=truth,
    )


def test_teacher_and_centers_are_detached():
    student, teacher, batch = draw(("hidden",))

    def mean(teacher, centers):
        term = Term(bind(norm_and_direction, centers=centers), jnp.ones(()), where="labelled")
        return total({"nd": term}, student, {"teacher": teacher}, batch)[0]

    slopes = jax.grad(mean, argnums=(0, 1))(teacher, jnp.asarray(CENTERS))
    assert all(not np.any(x) for x in jax.tree.leaves(slopes))


def test_a_withheld_label_is_nan():
    assert np.isnan(nd(np.ones(D), np.ones(D), -1, CENTERS))
    outputs = features(np.ones(D), unembedding=jnp.ones((D, K)))
    loss = bind(decoupled_features, strong_weight=1.0, weak_weight=1.0, temperature=1.0)
    assert np.isnan(loss(outputs, outputs, {"labels": jnp.asarray(-1)}))


# --- decoupled_features -------------------------------------------------------------------------


def by_hand(student, teacher, batch, strong_weight, weak_weight, temperature):
    """(value, KL of the whole, the teacher's mass on the strong set), row by row in float64."""
    found = []
    for f_s, f_t, label in zip(student.hidden, teacher.hidden, batch["labels"], strict=True):
        relevance = np.abs(teacher.unembedding[:, label] * f_t)
        strong = relevance > relevance.mean()
        p, q = (scipy.special.softmax(np.asarray(f, np.float64) / temperature) for f in (f_t, f_s))
        masses = [np.array([x[strong].sum(), x[~strong].sum()]) for x in (p, q)]
        kl = lambda a, b: scipy.special.rel_entr(a, b).sum()  # noqa: E731
        within = [kl(p[s] / p[s].sum(), q[s] / q[s].sum()) for s in (strong, ~strong)]
        value = kl(*masses) + strong_weight * within[0] + weak_weight * within[1]
        found.append((temperature**2 * value, temperature**2 * kl(p, q), masses[0][0]))
    return np.array(found).T


def cakd(strong_weight, weak_weight, temperature):
    numbers = dict(strong_weight=strong_weight, weak_weight=weak_weight, temperature=temperature)
    return bind(decoupled_features, **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(1.0, 2.0, 4.0), (0.0, 8.0, 1.0), (3.0, 0.0, 0.5)])
def test_the_contract_of_decoupled_features(numbers):
    check_contract(
        cakd(*numbers),
        needs=NEEDS_HEAD,
        where="labelled",
        truth=lambda *drawn: by_hand(*drawn, *numbers)[0],
    )


def test_the_teachers_masses_as_weights_give_the_whole_divergence():
    with jax.enable_x64(True):
        drawn = draw(NEEDS_HEAD)
        kept = np.asarray(drawn[2]["labelled"])
        _, whole, mass = by_hand(*drawn, 1.0, 1.0, 3.0)
        values = cakd(mass, 1 - mass, 3.0)(*drawn)
        np.testing.assert_allclose(values[kept], whole[kept], rtol=1e-10)


def test_a_set_without_units_has_no_part():
    """All units matter alike, so that none is strong; or there is one unit."""
    f_s, f_t = np.array([0.3, -0.2, 1.0]), np.array([0.5, 0.5, -0.5])
    kl = scipy.special.rel_entr(*map(scipy.special.softmax, (f_t, f_s))).sum()
    head = dict(unembedding=jnp.ones((3, 2)))
    batch = {"labels": jnp.asarray(0)}
    of = lambda x: cakd(5.0, 2.0, 1.0)(features(x), features(f_t, **head), batch)  # noqa: E731
    np.testing.assert_allclose(of(f_s), 2.0 * kl, rtol=1e-5)
    slope = jax.grad(of)(jnp.asarray(f_s, jnp.float32))
    expected = 2.0 * (scipy.special.softmax(f_s) - scipy.special.softmax(f_t))
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    one = lambda x: cakd(5.0, 2.0, 1.0)(  # noqa: E731
        features(x), features([2.0], unembedding=jnp.ones((1, 2))), batch
    )
    np.testing.assert_array_equal(one(jnp.ones(1)), 0)
    np.testing.assert_array_equal(jax.grad(one)(jnp.ones(1)), 0)


def test_equal_features_cost_nothing_and_far_ones_stay_finite():
    head = dict(unembedding=jnp.asarray(RNG.normal(size=(D, K)), jnp.float32))
    batch = {"labels": jnp.asarray(1)}
    hidden = RNG.normal(size=D)
    same = features(hidden, **head)
    assert cakd(1.0, 2.0, 4.0)(same, same, batch) == 0
    far = lambda x: cakd(1.0, 2.0, 4.0)(features(x), same, batch)  # noqa: E731
    value, slope = jax.value_and_grad(far)(jnp.asarray(1e4 * hidden[::-1], jnp.float32))
    assert np.isfinite(value) and value > 0 and np.isfinite(slope).all()


# --- class means, widths ------------------------------------------------------------------------


def test_class_means_against_numpy():
    hidden, labels = RNG.normal(size=(40, D)).astype(np.float32), RNG.integers(-1, K - 1, 40)
    means = class_means(hidden, labels, K)
    for k in range(K - 1):
        np.testing.assert_allclose(means[k], hidden[labels == k].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(means[K - 1], 0)
    assert class_means(jnp.asarray(hidden, jnp.bfloat16), labels, K).dtype == np.float32


def test_norm():
    x = RNG.normal(size=(3, 4, 2))
    np.testing.assert_allclose(norm(x, (1, 2)), np.linalg.norm(x.reshape(3, 8), axis=1), rtol=1e-6)
    assert not np.any(jax.grad(lambda x: norm(x))(jnp.zeros(3)))


def test_the_projection_takes_the_place_of_the_features():
    student, teacher, batch = draw(("hidden", "unembedding"))
    wide = teacher.replace(hidden=RNG.normal(size=(12, 7)), unembedding=RNG.normal(size=(7, K)))
    shown = student.replace(projected={"hidden": RNG.normal(size=(12, 7))})
    np.testing.assert_array_equal(aligned(shown, wide), shown.projected["hidden"])
    np.testing.assert_array_equal(aligned(student, teacher), student.hidden)
    loss = cakd(1.0, 2.0, 4.0)
    alone = student.replace(hidden=shown.projected["hidden"])
    np.testing.assert_array_equal(loss(shown, wide, batch), loss(alone, wide, batch))
    with pytest.raises(
        ValueError,
        match=r"^the features of the network being trained have the width 5 and those of the other "
        r"network 7; give the former project=dict\(hidden=7\)\.$",
    ):
        loss(student, wide, batch)
    with pytest.raises(ValueError, match=r"^the other network must show hidden, its feat"):
        aligned(student, Outputs(logits=jnp.ones((12, K))))


@pytest.mark.parametrize(
    "labels,centers,message",
    [
        (0.0, CENTERS, "labels must be integers; found float"),
        ([0, 0], CENTERS, r"labels \[2\] must have the leading axes of the features \[5\]\."),
        (0, CENTERS[:, :4], r"centers must be \[K, 5\], one for each class .*; found \[6, 4\]\."),
        (0, 1.0, r"centers must be \[K, 5\], one for each class .*; found \[\]\."),
    ],
)
def test_what_does_not_fit_is_refused(labels, centers, message):
    with pytest.raises(AssertionError, match=message):
        nd(np.ones(D), np.ones(D), labels, centers)


# --- projections of a module --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", [dict(model="mlp", widths=(5,)), dict(model="resnet", depth=8)])
def test_a_projection_leaves_the_network_as_it_is(model):
    hypers = {key: value for key, value in model.items() if key != "model"}
    plain = models.from_config(model["model"], hypers, num_classes=K, field="student")
    both = models.projected(plain, hidden=7)
    inputs = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    ours, theirs = (m.init(jax.random.key(1), inputs, train=False) for m in (both, plain))
    alone = models.without_projections(ours["params"])
    jax.tree.map(np.testing.assert_array_equal, ours | {"params": alone}, theirs)
    assert models.without_projections(theirs["params"]) is theirs["params"]
    options = dict(train=True, mutable=["batch_stats"])
    (shown, stats), (expected, expected_stats) = (
        m.apply(v, inputs, **options) for m, v in ((both, ours), (plain, theirs))
    )
    head = ours["params"]["abkd_projections"]
    found = shown.hidden @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(shown.projected["hidden"], found, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, shown.replace(projected=None), expected)
    jax.tree.map(np.testing.assert_array_equal, stats, expected_stats)


# --- runs ---------------------------------------------------------------------------------------

CLASSES, DIM = 3, 6
SGD = dict(name="sgd", learning_rate=0.1)
TASK = dict(fn="cross_entropy", weight=1.0, where="labelled")
ND = dict(fn="norm_and_direction", weight=1.0, where="labelled", centers="class_means")
CAKD = dict(
    fn="decoupled_features", weight=1.0, where="labelled", strong_weight=1.0, weak_weight=2.0,
    temperature=4.0,
)  # fmt: skip
KDIGA = dict(fn="input_gradient_alignment", weight=1.0, where="labelled")


def network(**changes):
    return dict(model="mlp", widths=(5,), optimizer=SGD, terms=dict(task=TASK)) | changes


def config(term, **changes):
    """Six steps, with a student that is narrower than its teacher."""
    student = network(widths=(4,), terms=dict(task=TASK, it=term), project=dict(hidden=5))
    return (
        dict(
            mode="offline",
            data=dict(name="digits", validation=0),
            teacher=network(),
            student=student,
            batch_size=16,
            num_steps=6,
            checkpoint_every=6,
            log_every=2,
            devices=2,
            init_seed=0,
            data_seed=0,
        )
        | changes
    )


def vectors(**options):
    def drawn(size, seed):
        labels = np.arange(size) % CLASSES
        noise = np.random.default_rng(seed).normal(size=(size, DIM))
        return (2 * np.eye(CLASSES, DIM)[labels] + noise).astype(np.float32), labels

    splits = dict(train=drawn(80, 0), validation=None, test=drawn(30, 2))
    return data.from_arrays(**splits, num_classes=CLASSES, **options)


def images(**options):
    def drawn(size, seed):
        labels = np.arange(size) % CLASSES
        noise = np.random.default_rng(seed).integers(0, 80, (size, 8, 8, 1))
        return (noise + 80 * labels[:, None, None, None]).astype(np.uint8), labels

    splits = dict(train=drawn(50, 0), validation=None, test=drawn(18, 1))
    return data.from_arrays(**splits, num_classes=CLASSES, **options)


def rows(workdir: pathlib.Path):
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read]


@pytest.mark.slow
@pytest.mark.parametrize("term", [ND, CAKD, KDIGA], ids=["nd", "cakd", "kdiga"])
def test_a_run_that_is_interrupted_ends_as_one_that_was_not(tmp_path, monkeypatch, term):
    made = config(term)
    whole = train_and_evaluate(made, tmp_path / "whole", data=vectors(labelled=30))
    advance = fit._advance

    def interrupted(fitted, carry, fed, step, count):
        if not fitted.phase.name and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(fitted, carry, fed, step, count)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "_advance", interrupted)
        with pytest.raises(SystemExit):
            train_and_evaluate(made, tmp_path / "parts", data=vectors(labelled=30))
    parts = train_and_evaluate(made, tmp_path / "parts", data=vectors(labelled=30))
    np.testing.assert_equal(parts["networks"], whole["networks"])
    np.testing.assert_equal(rows(tmp_path / "parts"), rows(tmp_path / "whole"))
    still = config(term | dict(weight=0.0))
    other = train_and_evaluate(still, tmp_path / "still", data=vectors(labelled=30))
    sums = [x["networks"]["student"]["sha256"]["params"] for x in (whole, other)]
    assert sums[0] != sums[1]  # the term teaches


@pytest.mark.slow
def test_what_a_projection_is_no_part_of(tmp_path):
    """The count of parameters, what `load` gives, and what a later run takes as its teacher."""
    made = config(ND, student=config(ND)["student"] | dict(ema_decay=0.5))
    result = train_and_evaluate(made, tmp_path / "first", data=vectors())
    counts = {name: x["parameters"] for name, x in result["networks"].items()}
    assert counts["student"] == (DIM + 1) * 4 + (4 + 1) * CLASSES
    loaded = abkd_jax.load(tmp_path / "first")
    assert set(loaded.variables["params"]) == {"Dense_0", "head"}
    with np.load(tmp_path / "first" / "examples.npz") as examples:
        probabilities = jax.nn.softmax(loaded(vectors().test.inputs[:8]).logits)
        np.testing.assert_allclose(probabilities, examples["probabilities/student"], rtol=1e-5)
    teacher = dict(model="mlp", widths=(4,), checkpoint=str(tmp_path / "first"))
    student = config(ND)["student"] | dict(widths=(3,), project=dict(hidden=4))
    second = config(ND, teacher=teacher, student=student)
    found = train_and_evaluate(second, tmp_path / "second", data=vectors())["networks"]["teacher"]
    assert found["parameters"] == counts["student"]
    np.testing.assert_equal(found["last"], result["networks"]["student"]["last"])


@pytest.fixture
def fits(monkeypatch):
    """What each phase trained on."""
    found = []

    def spy(fitted, *args):
        found.append(fitted)
        return fit.fit_phase(fitted, *args)

    monkeypatch.setattr(phase, "fit_phase", spy)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_the_centers_of_a_run_are_the_teachers_means_without_augmentation(tmp_path, fits, devices):
    """Of all training examples, withheld labels and a last, padded batch included."""
    cnn = dict(model="cnn", widths=(4, 5), batch_norm=True)
    student = network(**cnn, terms=dict(it=ND))
    made = config(ND, teacher=network(**cnn), student=student, devices=devices)
    options = dict(labelled=15, pad=1, flip=True, mean=(0.4,), std=(0.3,))
    train_and_evaluate(made, tmp_path, data=images(**options))
    last = fits[-1]
    centers = last.objectives["student"]["it"].loss.numbers["centers"]
    teacher, split = last.frozen["teacher"], images().train
    inputs = (np.asarray(split.inputs) / 255 - 0.4) / 0.3
    outputs, _ = teacher.forward(teacher.params, jnp.asarray(inputs, jnp.float32), train=False)
    hidden, labels = np.asarray(outputs.hidden), np.asarray(split.labels)
    expected = np.stack([hidden[labels == k].mean(0) for k in range(CLASSES)])
    np.testing.assert_allclose(centers, expected, rtol=1e-5, atol=1e-6)
    assert hidden.std(0).max() > 0.01  # there is something to average


def test_the_first_steps_loss_by_hand(tmp_path):
    """One batch of all examples, of which 30 are labelled, and a teacher that is a function."""
    kernel = np.random.default_rng(3).normal(size=(DIM, 5)).astype(np.float32)

    def teacher(kernel, inputs):
        hidden = inputs @ kernel
        return Outputs(logits=hidden[:, :CLASSES], hidden=hidden)

    made = config(ND, teacher=dict(model="given"), batch_size=80, num_steps=1, log_every=1)
    given, examples = {"teacher": (teacher, kernel)}, vectors(labelled=30)
    train_and_evaluate(made, tmp_path, networks=given, data=examples)
    inputs, labels = np.asarray(examples.train.inputs), np.asarray(vectors().train.labels)
    f_t = inputs @ kernel
    centers = np.stack([f_t[labels == k].mean(0) for k in range(CLASSES)])
    module = schema.network(made, "student", num_classes=CLASSES).module
    rule = bind(optimizer.sgd, learning_rate=0.1)
    state = train.create(module, jnp.asarray(inputs), init_seed=0, optimizer=rule)
    shown, _ = state.forward(state.params, jnp.asarray(inputs), train=False)
    f_s, c = np.asarray(shown.projected["hidden"]), centers[labels]
    longer = np.maximum(np.linalg.norm(f_s, axis=-1), np.linalg.norm(f_t, axis=-1))
    values = 1 - np.sum(f_s * c, -1) / np.linalg.norm(c, axis=-1) / longer
    expected = values[np.asarray(examples.train.labelled)].mean()
    row = next(row for row in rows(tmp_path) if "student/it" in row)
    np.testing.assert_allclose(row["student/it"], expected, rtol=1e-5)


# --- refusals -----------------------------------------------------------------------------------


def refused(made, **options):
    with pytest.raises(ValueError) as error:
        schema.check(made, **options)
    return str(error.value)


def test_configs_are_checked_without_data():
    for term in (ND, CAKD, KDIGA, ND | dict(centers=((0.0,) * 5,) * CLASSES)):
        schema.check(config(term))


def test_class_means_are_those_of_a_network_that_does_not_learn():
    assert refused(config(ND, mode="online")) == (
        "student.terms.it.centers: 'class_means' are those of a network that does not learn at the "
        "same time; found 'teacher', which does."
    )
    message = refused(config(ND | dict(centers="means")))
    assert message.startswith("student.terms.it: norm_and_direction.centers must be a number; ")


@pytest.mark.parametrize(
    "project", [5, {}, dict(hidden=0), dict(hidden=5.0), dict(logits=5), dict(hidden="student")]
)
def test_projections_that_are_refused(project):
    made = config(ND)
    made["student"]["project"] = project
    assert refused(made) == (
        "student.project must be dict(hidden=WIDTH), with the width of the other network's "
        f"features, or dict(hidden=NAME), with its name; found {project!r}."
    )


@pytest.mark.slow
def test_a_projection_to_a_network_has_its_width(tmp_path):
    for width, projected in ((4, True), (5, False)):
        made = config(ND)
        made["student"] = made["student"] | dict(widths=(width,), project=dict(hidden="teacher"))
        folder = tmp_path / f"{width}"
        train_and_evaluate(made, folder, data=vectors())
        resolved = json.loads((folder / "config.json").read_text())["config"]["student"]
        assert resolved.get("project") == (dict(hidden=5) if projected else None)
    given = {"teacher": (lambda kernel, x: x @ kernel, np.ones((DIM, CLASSES), np.float32))}
    made = config(ND, teacher=dict(model="given"))
    made["student"] = made["student"] | dict(project=dict(hidden="teacher"))
    with pytest.raises(
        ValueError, match=r"^student\.project: the model of 'teacher' does not give"
    ):
        train_and_evaluate(made, tmp_path / "given", networks=given, data=vectors())


def test_projections_of_networks_that_do_not_learn_are_refused():
    made = config(ND, teacher=dict(model="given", project=dict(hidden=3)))
    assert refused(made, given=["teacher"]) == (
        "teacher.project is for a network of the library that learns in this run; found teacher "
        "given."
    )
    made["teacher"] = dict(model="mlp", widths=(5,), checkpoint="a", project=dict(hidden=3))
    assert refused(made).endswith("; found teacher from a checkpoint.")


def test_widths_that_differ_are_refused_before_the_teacher_trains(tmp_path):
    for term in (ND, CAKD):
        made = config(term)
        del made["student"]["project"]
        with pytest.raises(ValueError, match=r" have the width 4 and those .* 5; give the former "):
            train_and_evaluate(made, tmp_path, data=vectors())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_teacher_without_features_is_refused(tmp_path):
    given = {"teacher": (lambda kernel, x: x @ kernel, np.ones((DIM, CLASSES), np.float32))}
    made = config(ND, teacher=dict(model="given"))
    with pytest.raises(
        ValueError,
        match=r"^student\.terms\.it needs 'hidden' of both networks, which the model of 'teacher' "
        r"does not give\.$",
    ):
        train_and_evaluate(made, tmp_path, networks=given, data=vectors())
