"""Runs whose losses read features: projections, centers and heads of a teacher, and refusals."""

import contextlib
import signal

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import abkd_jax
from abkd_jax import data, models, optimizers, train
from abkd_jax.binding import bind
from abkd_jax.config.schema import resolve
from abkd_jax.run import phases
from abkd_jax.run.log.progress import Progress
from abkd_jax.run.log.writer import read
from abkd_jax.run.loop import run_phase, train_and_evaluate
from abkd_jax.train.checkpoint import Checkpoints
from abkd_jax.types import Outputs

CLASSES, DIM = 3, 6
SGD = dict(fn="sgd", learning_rate=0.1)
TASK = dict(fn="cross_entropy", weight=1.0, where="labelled")
ND = dict(fn="norm_and_direction", weight=1.0, where="labelled", centers="class_means")
CAKD = dict(
    fn="decoupled_features", weight=1.0, where="labelled", strong_weight=1.0, weak_weight=2.0,
    temperature=4.0,
)  # fmt: skip
KDIGA = dict(fn="input_gradient_alignment", weight=1.0, where="labelled")
GIVEN = dict(model=dict(fn="given"))
DISTILL = dict(distill=dict(learn=("student",), see=("teacher",)))
OFFLINE = dict(teacher=dict(learn=("teacher",), split="full")) | DISTILL
ONLINE = dict(together=dict(learn=("teacher", "student"), select="student"))


def mlp(*widths):
    return dict(fn="mlp", widths=widths)


def network(**changes):
    return dict(model=mlp(5), optimizer=SGD, terms=dict(task=TASK)) | changes


def config(term, **changes):
    """Six steps, with a student that is narrower than its teacher."""
    student = network(model=mlp(4), terms=dict(task=TASK, it=term), project=dict(hidden=5))
    return (
        dict(
            data=dict(fn="digits", validation=0),
            teacher=network(),
            student=student,
            phases=OFFLINE,
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


def rows(workdir):
    """Without wall-clock times."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read(workdir)]


# --- projections of a module --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", [dict(fn="mlp", widths=(5,)), dict(fn="resnet", depth=8)])
def test_a_projection_leaves_the_network_as_it_is(model):
    hypers = {key: value for key, value in model.items() if key != "fn"}
    plain = getattr(models, model["fn"])(num_classes=CLASSES, **hypers)
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


@contextlib.contextmanager
def stopped_after(steps):
    """SIGTERM at a step, counted over the phases, which ends the run."""
    update, done = Progress.update, []

    def stopping(self, step, **shown):
        if done[-1:] != [step]:
            done.append(step)
            if len(done) == steps:
                signal.raise_signal(signal.SIGTERM)
        update(self, step, **shown)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", stopping)
        with pytest.raises(SystemExit) as left:
            yield
    assert left.value.code == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("term", [ND, CAKD, KDIGA], ids=["nd", "cakd", "kdiga"])
def test_a_run_that_is_interrupted_ends_as_one_that_was_not(tmp_path, capsys, term):
    made = config(term)
    whole = train_and_evaluate(made, tmp_path / "whole", data=vectors(labelled=30))
    with stopped_after(6 + 3):
        train_and_evaluate(made, tmp_path / "parts", data=vectors(labelled=30))
    assert "student: SIGTERM at step 3 of 6, which is saved" in capsys.readouterr().err
    parts = train_and_evaluate(made, tmp_path / "parts", data=vectors(labelled=30))
    np.testing.assert_equal(parts["networks"], whole["networks"])
    for folder in ("", "teacher"):
        found, expected = (rows(tmp_path / name / folder) for name in ("parts", "whole"))
        np.testing.assert_equal(found, expected)
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
        probabilities = jax.nn.softmax(loaded(vectors().test.inputs[examples["positions"]]).logits)
        np.testing.assert_allclose(probabilities, examples["probabilities/student"], rtol=1e-5)
    teacher = dict(model=mlp(4), weights=dict(fn="run", workdir=str(tmp_path / "first")))
    student = config(ND)["student"] | dict(model=mlp(3), project=dict(hidden=4))
    second = config(ND, teacher=teacher, student=student, phases=DISTILL)
    found = train_and_evaluate(second, tmp_path / "second", data=vectors())["networks"]["teacher"]
    assert found["parameters"] == counts["student"]
    np.testing.assert_equal(found["last"], result["networks"]["student"]["last"])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_the_centers_of_a_run_are_the_teachers_means_without_augmentation(tmp_path, devices):
    """Of all training examples, withheld labels and a last, padded batch included."""
    cnn = network(model=dict(fn="cnn", widths=(4, 5), batch_norm=True))
    student = cnn | dict(terms=dict(it=ND))
    made = config(ND, teacher=cnn, student=student, devices=devices)
    shown = images(labelled=15, pad=1, flip=True, mean=(0.4,), std=(0.3,))
    plan = resolve(made, data=shown)
    with phases.opened(plan, tmp_path) as run:
        first, last = plan.phases
        states = run_phase(run, first, {}, {}).last
        teacher = train.frozen(states["teacher"])
        objectives = phases.objectives_of(run, last, {"teacher": teacher})
        again = phases.class_means(run, "teacher", teacher)
    centers = objectives["student"]["it"].loss.numbers["centers"]
    np.testing.assert_array_equal(centers, again)
    split = images().train
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

    numbers = dict(batch_size=80, num_steps=1, log_every=1)
    made = config(ND, teacher=GIVEN, phases=DISTILL, **numbers)
    given, examples = {"teacher": (teacher, kernel)}, vectors(labelled=30)
    train_and_evaluate(made, tmp_path, networks=given, data=examples)
    inputs, labels = np.asarray(examples.train.inputs), np.asarray(vectors().train.labels)
    f_t = inputs @ kernel
    centers = np.stack([f_t[labels == k].mean(0) for k in range(CLASSES)])
    module = resolve(made, networks=given, data=examples).networks["student"].module
    rule = bind(optimizers.sgd, learning_rate=0.1)
    state = train.create(module, jnp.asarray(inputs), init_seed=0, optimizer=rule)
    shown, _ = state.forward(state.params, jnp.asarray(inputs), train=False)
    f_s, c = np.asarray(shown.projected["hidden"]), centers[labels]
    longer = np.maximum(np.linalg.norm(f_s, axis=-1), np.linalg.norm(f_t, axis=-1))
    values = 1 - np.sum(f_s * c, -1) / np.linalg.norm(c, axis=-1) / longer
    labelled = np.asarray(examples.train.masks["labelled"])
    assert labelled.sum() == 30
    row = next(row for row in rows(tmp_path) if "student/it" in row)
    np.testing.assert_allclose(row["student/it"], values[labelled].mean(), rtol=1e-5)


# --- refusals -----------------------------------------------------------------------------------

WITHOUT_FEATURES = (lambda kernel, x: x @ kernel, np.ones((DIM, CLASSES), np.float32))


def refused(made, **options):
    with pytest.raises(ValueError) as error:
        resolve(made, **options)
    return str(error.value)


def test_configs_are_checked_without_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for term in (ND, CAKD, KDIGA, ND | dict(centers=((0.0,) * 5,) * 10)):
        plan = resolve(config(term))
        assert [phase.name for phase in plan.phases] == ["teacher", "distill"]
    assert not list(tmp_path.iterdir())


def test_class_means_are_those_of_a_network_that_does_not_learn():
    assert refused(config(ND, phases=ONLINE)) == (
        "student.terms.it: 'class_means' are those of another network that does not learn at the "
        "same time; found 'teacher'."
    )
    assert refused(config(ND | dict(centers="means"))) == (
        "student.terms.it.centers must be an array or one of class_means, class_prior, "
        "class_weights; found 'means'."
    )


@pytest.mark.parametrize(
    "project",
    [5, {}, dict(hidden=0), dict(hidden=5.0), dict(hidden=True), dict(logits=5),
     dict(hidden=5, logits=5), dict(hidden="student"), dict(hidden="peer"), dict(hidden=[5])],
)  # fmt: skip
def test_projections_that_are_refused(project):
    made = config(ND)
    made["student"]["project"] = project
    assert refused(made) == (
        "student.project must be dict(hidden=WIDTH), with the width of the other network's "
        f"features, or dict(hidden=NAME), with its name; found {project!r}."
    )


@pytest.mark.parametrize("width", [3, 4])
def test_a_projection_to_a_number_is_there_even_if_that_is_the_students_width(width):
    made = config(ND)
    made["student"] |= dict(project=dict(hidden=width), terms=dict(task=TASK))
    module = resolve(made, data=vectors()).networks["student"].module
    plain = models.mlp(num_classes=CLASSES, widths=(4,))
    assert module == models.projected(plain, hidden=width)


@pytest.mark.slow
def test_a_projection_to_a_network_has_its_width(tmp_path):
    """And there is none where the student has that width already."""
    for width, projected in ((4, True), (5, False)):
        made, folder = config(ND), tmp_path / f"{width}"
        made["student"] |= dict(model=mlp(width), project=dict(hidden="teacher"))
        module = resolve(made, data=vectors()).networks["student"].module
        plain = models.mlp(num_classes=CLASSES, widths=(width,))
        assert module == (models.projected(plain, hidden=5) if projected else plain)
        train_and_evaluate(made, folder, data=vectors())
        with Checkpoints(folder / "checkpoints") as checkpoints:
            params = checkpoints.restore()[1]["learners"]["student"]["params"]
        found = params.keys() - models.without_projections(params).keys()
        assert [params[name]["kernel"].shape for name in found] == [(4, 5)] * projected
    made = config(ND, teacher=GIVEN, phases=DISTILL)
    made["student"] |= dict(project=dict(hidden="teacher"))
    with pytest.raises(
        ValueError, match=r"^student\.project: the model of 'teacher' does not give"
    ):
        given = {"teacher": WITHOUT_FEATURES}
        train_and_evaluate(made, tmp_path / "given", networks=given, data=vectors())


def test_projections_of_networks_that_do_not_learn_are_refused():
    made = config(ND, teacher=GIVEN | dict(project=dict(hidden=3)), phases=DISTILL)
    expected = "teacher.project is for a network of the library with new parameters; found teacher "
    given = {"teacher": WITHOUT_FEATURES}
    assert refused(made, networks=given, data=vectors()) == f"{expected}given."
    weights = dict(fn="run", workdir="a")
    made["teacher"] = dict(model=mlp(5), weights=weights, project=dict(hidden=3))
    assert refused(made) == f"{expected}with weights."
    made["teacher"] = dict(model=mlp(5), project=dict(hidden=3))
    assert "teacher" in refused(made)  # which nothing trains


def test_widths_that_differ_are_refused_before_the_teacher_trains(tmp_path):
    for term in (ND, CAKD):
        made = config(term)
        del made["student"]["project"]
        with pytest.raises(
            ValueError,
            match=r"^the width of the features of the network being trained must be 5, that of the "
            r"other network: give it project=dict\(hidden=5\); found 4\.",
        ):
            train_and_evaluate(made, tmp_path, data=vectors())
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_features_is_refused(tmp_path):
    made, given = config(ND, teacher=GIVEN, phases=DISTILL), {"teacher": WITHOUT_FEATURES}
    with pytest.raises(
        ValueError,
        match=r"^student\.terms\.it needs 'hidden' of 'teacher', which its model does not give\.$",
    ):
        train_and_evaluate(made, tmp_path, networks=given, data=vectors())
    assert not list(tmp_path.iterdir())
