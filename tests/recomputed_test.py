"""Runs and sweeps say what the bare training step, numpy and their seeds say: recomputed whole."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import operator

import jax
import numpy as np
import pytest
import recompute
from flax import linen as nn
from recompute import Net, Phase, Run
from reference_scores import log_softmax
from scipy.special import entr, rel_entr

from abkd_jax.types import Outputs

K = 7
PARTS = ("params", "opt_state", "batch_stats")
TASK = dict(fn="cross_entropy", weight=1.0, where="labelled")
NUMBERS = dict(
    batch_size=20,
    num_steps=23,
    checkpoint_every=4,
    log_every=5,
    steps_per_call=1,
    micro_batches=1,
    devices=1,
    init_seed=3,
    data_seed=30,
    analysis=(),
)


class Noisy(nn.Module):
    """With batch norm and dropout, so that training and evaluation differ."""

    width: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, train):
        x = nn.Dense(self.width, use_bias=False)(inputs.reshape(len(inputs), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        head = nn.Dense(K, name="head")
        dropped = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(logits=head(dropped), hidden=x)


def vectors(size, seed, noise, dim=6):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(size) % K
    means = 2 * np.random.default_rng(0).normal(size=(K, dim))
    return (means[labels] + noise * rng.normal(size=(size, dim))).astype(np.float32), labels


def images(size, seed, noise):
    inputs, labels = vectors(size, seed, noise, dim=50)
    return np.clip(128 + 30 * inputs, 0, 255).astype(np.uint8).reshape(size, 5, 5, 2), labels


def with_unknown(examples):
    """Some labels are not known at all."""
    inputs, labels = examples
    labels = labels.copy()
    labels[[5, 17, 30]] = -1
    return inputs, labels


def sgd(learning_rate, **numbers):
    return dict(fn="sgd", learning_rate=learning_rate, **numbers)


def distill(weight=1.0, alpha=0.8, **options):
    divergence = dict(fn="alpha_beta", alpha=alpha, beta=0.5)
    return dict(fn="on_logits", weight=weight, temperature=2.0, divergence=divergence, **options)


def kl(weight=1.0, **options):
    return dict(fn="on_logits", weight=weight, divergence=dict(fn="forward_kl"), **options)


def ramp(start, end):
    return dict(fn="linear", start=start, end=end)


OFFLINE = (
    Phase("teacher", ("teacher",), split="all"),
    Phase("baseline", ("baseline",), split="labelled"),
    Phase("student", ("student",), ("teacher",)),
)


def offline():
    """Vectors; a teacher of the test's own with dropout, batch norm and averaged parameters."""
    teacher = Net(
        module=Noisy(8, 0.3),
        optimizer=dict(fn="adam", learning_rate=dict(fn="cosine", start=0.05, end=0.01)),
        terms=dict(task=TASK),
        ema_decay=0.8,
        init_seed=1,
    )
    baseline = Net(
        "mlp", dict(widths=(6,)), optimizer=sgd(0.2, momentum=0.9), terms=dict(task=TASK)
    )
    near = dict(fn="norm_and_direction", centers=recompute.CLASS_MEANS)
    near = dict(fn="with_teacher_labels", loss=near, weight=0.3)
    student = Net(
        "mlp",
        dict(widths=(6,)),
        optimizer=sgd(ramp(0.1, 0.6), momentum=0.5, weight_decay=1e-3),
        terms=dict(distill=distill(ramp(0.5, 2.0), ramp(1.0, 0.2)), near=near),
        ema_decay=0.3,
        init_seed=11,
        project=dict(hidden="teacher"),
    )
    return Run(
        dict(teacher=teacher, baseline=baseline, student=student),
        OFFLINE,
        with_unknown(vectors(75, 1, 1.5)),
        vectors(22, 2, 3.0),
        vectors(45, 3, 2.0),
        K,
        dict(labelled=14, omit=(2,)),
        NUMBERS | dict(micro_batches=5, analysis=("entropy",)),
    )


def unselected():
    """Images, cropped and mirrored; several steps a call; a given teacher; no validation split."""
    adamw = dict(fn="adamw", learning_rate=ramp(0.01, 0.1), weight_decay=0.1, clip_norm=0.5)
    task = TASK | dict(label_smoothing=0.1, weight=ramp(2.0, 1.0))
    student = Net(
        module=Noisy(6), optimizer=adamw, terms=dict(task=task, distill=kl()), ema_decay=0.5
    )
    return Run(
        dict(teacher=Net(module=Noisy(8), init_seed=2), student=student),
        OFFLINE[2:],
        images(75, 1, 1.5),
        None,
        images(45, 3, 2.0),
        K,
        dict(labelled=14, pad=1, flip=True, mean=(0.5, 0.4), std=(0.2, 0.3)),
        NUMBERS
        | dict(num_steps=14, log_every=6, steps_per_call=3, data_seed=31)
        | dict(analysis=("entropy", "gradient_norms")),
    )


def online():
    """Two networks that learn from each other, one of them from a bystander, too."""
    steps = dict(fn="piecewise", start=0.2, factor=0.5, boundaries=(4, 8))
    task = dict(fn="cross_entropy", weight=1.0, other="bystander")
    student = Net(
        module=Noisy(6),
        optimizer=sgd(ramp(0.1, 1.0)),
        terms=dict(peer=kl(other="peer"), fixed=kl(ramp(1.0, 0.0), other="bystander")),
        init_seed=0,
    )
    peer = Net(
        "mlp",
        dict(widths=(6,)),
        optimizer=sgd(steps, momentum=0.9, nesterov=True),
        terms=dict(task=task, peer=kl(other="student")),
        ema_decay=0.6,
    )
    return Run(
        dict(student=student, bystander=Net(module=Noisy(6), init_seed=2), peer=peer),
        (Phase("both", ("student", "peer"), ("bystander",)),),
        vectors(75, 1, 1.5),
        vectors(22, 2, 3.0),
        vectors(45, 3, 2.0),
        K,
        {},
        NUMBERS | dict(num_steps=18, log_every=8, data_seed=64),
    )


def peers():
    """Two alone, neither of them the student."""
    terms = dict(task=TASK, peer=kl())
    net = Net("mlp", dict(widths=(6,)), optimizer=sgd(0.3), terms=terms)
    run = online()
    return dataclasses.replace(
        run,
        networks=dict(left=net, right=dataclasses.replace(net, ema_decay=0.6, init_seed=8)),
        phases=(Phase("both", ("left", "right")),),
        numbers=NUMBERS
        | dict(num_steps=11, log_every=4, checkpoint_every=2, data_seed=306)
        | dict(analysis=("entropy", "gradient_norms")),
    )


# What would choose another step as the best.
FIRST, ON_TEST, BY_ANOTHER = "the first of equals", "test data", "another score of several learners"
RUNS = {
    "offline": (offline, {FIRST, ON_TEST}),
    "unselected": (unselected, {FIRST}),
    "online": (online, {ON_TEST, BY_ANOTHER}),
    "peers": (peers, {ON_TEST, BY_ANOTHER}),
}


class Done:
    """A run that is complete, what it left, and what it should have."""

    def __init__(self, name, workdir):
        make, self.told = RUNS[name]
        self.run, self.workdir = make(), workdir
        recompute.train(self.run, workdir)
        self.courses, self.last = recompute.courses(self.run)
        self.folders = {p.name: recompute.folder(workdir, self.run, p) for p in self.run.phases}
        self.saved = {name: recompute.saved(folder) for name, folder in self.folders.items()}
        self.header = json.loads((workdir / "result.json").read_text())
        self.networks = self.header.pop("networks")

    def learned(self):
        """The phase of each network that learned."""
        return [(phase, name) for phase in self.run.phases for name in phase.learners]

    def at(self, phase, name, step):
        """The variables that a checkpoint has for evaluation."""
        state = self.saved[phase.name][step][name]
        averaged = state.get("ema_params")
        params = state["params"] if averaged is None else averaged
        return {"params": params, "batch_stats": state.get("batch_stats") or {}}


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(n, marks=pytest.mark.long) for n in ("offline", "unselected", "online")),
        pytest.param("peers", marks=pytest.mark.slow),
    ],
)
def done(request, tmp_path_factory):
    return Done(request.param, tmp_path_factory.mktemp(request.param))


def close(found, expected, rtol=1e-5, atol=1e-6, at=""):
    """Asserts that numbers, in whatever mappings and lists, are the same."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), at
        for key, value in expected.items():
            close(found[key], value, rtol, atol, f"{at}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for i, value in enumerate(expected):
            close(found[i], value, rtol, atol, f"{at}/{i}")
    elif expected is None:
        assert found is None, at
    else:
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=at)


# --- Runs ---------------------------------------------------------------------------------------


def test_rows(done):
    """Means between logs, a cut interval, norms, rates, what was measured, scores on the way."""
    for phase in done.run.phases:
        lines = (done.folders[phase.name] / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        found = [{k: x for k, x in row.items() if not k.startswith("time/")} for row in found]
        close(found, recompute.rows(done.run, phase, done.courses[phase.name], done.last))


def test_checkpoints(done):
    """Parameters, their averages, statistics and the optimiser's state, at every step there is."""
    end = done.run.numbers["num_steps"]
    for phase, name in done.learned():
        course, saved = done.courses[phase.name], done.saved[phase.name]
        assert {end, recompute.best_step(done.run, phase, course)} <= set(saved)
        for step, networks in saved.items():
            found, expected = networks[name], course.states[step][name]
            assert int(found["step"]) == step
            trees = {part: getattr(expected, part) for part in PARTS}
            averaged = done.run.networks[name].ema_decay is not None
            assert (found.get("ema_params") is not None) == averaged
            if averaged:
                trees["ema_params"] = course.averages[step][name]
            for part, tree in trees.items():
                for path, array, value in recompute.paired(tree, found.get(part)):
                    close(array, value, at=f"{name}.{part}{path} at {step}")


def test_the_best_step_tells(done):
    """It is never the last, and differs in a phase of the run from what a mistake would choose."""
    run, told = done.run, set()
    on_test = dataclasses.replace(run, validation=None)
    for phase in run.phases:
        course = done.courses[phase.name]
        best = recompute.best_step(run, phase, course)
        assert best != run.numbers["num_steps"]
        every = recompute.accuracies(run, phase, course)
        score = recompute.selecting(every[best])
        if any(recompute.selecting(x) == score for step, x in every.items() if step < best):
            told.add(FIRST)
        if recompute.best_step(on_test, phase, course) != best:
            told.add(ON_TEST)
        rivals = [lambda x: np.mean(list(x.values())), lambda x: max(x.values())]
        rivals += [operator.itemgetter(name) for name in phase.learners]
        highest = [max(map(by, every.values())) for by in rivals]
        if np.sum(np.isclose([by(every[best]) for by in rivals], highest)) == 1:
            told.add(BY_ANOTHER)
    assert told == done.told


def test_scores(done):
    """Of the last states and of the best ones, on test data; what else the result says."""
    run, end, learned = done.run, done.run.numbers["num_steps"], done.learned()
    assert set(done.networks) == set(run.networks)
    for phase, name in learned:
        found, best = done.networks[name], recompute.best_step(run, phase, done.courses[phase.name])
        scores, _ = recompute.scores(run, name, done.at(phase, name, end))
        close(found["last"], scores, at=name)
        scores, accuracy = recompute.scores(run, name, done.at(phase, name, best))
        close(found["best"], dict(step=best, score=accuracy, scores=scores), at=name)
        assert found["best"]["step"] == best and found["steps"] == end
    for name in set(run.networks).difference(name for _, name in learned):
        found = done.networks[name]
        scores, _ = recompute.scores(run, name, done.last[name])
        close(found["last"], scores, at=name)
        assert found["best"] is None and found["sha256"] is None and found["steps"] == 0
    assert done.header == recompute.header(run)


def test_digests_and_sizes(done):
    """The SHA-256 of what the last checkpoint holds, and the number of parameters."""
    for phase, name in done.learned():
        saved = done.saved[phase.name][done.run.numbers["num_steps"]][name]
        state = done.courses[phase.name].states[-1][name]
        trees = {part: (getattr(state, part), saved.get(part)) for part in PARTS}
        expected = {part: recompute.digest(*pair) for part, pair in trees.items()}
        assert done.networks[name]["sha256"] == expected
    for name, found in done.networks.items():
        plain = recompute.first_variables(done.run, name, False)["params"]
        assert found["parameters"] == sum(x.size for x in jax.tree.leaves(plain))


def test_examples(done):
    """The test examples on which the networks differ most, with what each says of them."""
    found = dict(np.load(done.workdir / "examples.npz"))
    inputs, labels = done.run.test
    at = found.pop("positions")
    assert len(set(at)) == 8 and found.pop("candidates") == len(labels)
    assert np.array_equal(found.pop("labels"), labels[at])
    if inputs.ndim == 4:
        assert np.array_equal(found.pop("images"), inputs[at])
    given = {}
    for name, variables in done.last.items():
        logits, _ = recompute.on_split(done.run, name, variables, "test")
        given[f"probabilities/{name}"] = np.exp(log_softmax(logits))
    close(found, {name: p[at] for name, p in given.items()})
    stacked = np.stack(list(given.values()))
    apart = np.mean([rel_entr(p, stacked.mean(0)).sum(-1) for p in stacked], axis=0)
    if len(given) == 1:
        apart = entr(stacked[0]).sum(-1)
    np.testing.assert_allclose(apart[at], -np.sort(-apart)[:8], atol=1e-5)


# --- Sweeps -------------------------------------------------------------------------------------

ALPHA = "student.terms.distill.divergence.alpha"
RATE = "student.optimizer.learning_rate"
RAMP = "student.terms.distill.weight.end"
MOMENTUM = "peer.optimizer.momentum"
SHORT = NUMBERS | dict(num_steps=9, checkpoint_every=4)


def cached():
    """Neither crop nor flip, so that the teacher's outputs are computed once; two steps a call."""
    run = offline()
    student = dataclasses.replace(
        run.networks["student"],
        optimizer=sgd(0.1, momentum=0.5),
        terms=dict(task=TASK, distill=distill()),
        project=None,
    )
    teacher = Net(
        "mlp",
        dict(widths=(6,)),
        optimizer=sgd(ramp(0.2, 4.0)),
        terms=dict(task=TASK),
        ema_decay=0.8,
    )
    run = dataclasses.replace(
        run,
        networks=dict(teacher=teacher, student=student),
        phases=(OFFLINE[0], OFFLINE[2]),
        train=vectors(1100, 1, 1.5),
        test=vectors(1100, 3, 2.0),
        numbers=SHORT | dict(batch_size=200, steps_per_call=2),
    )
    return run, {ALPHA: [1.0, 0.3], RATE: [0.1, 0.3]}, dict(init_seeds=2, chunk=4)


def flipped():
    """Flips alone; micro batches, and a schedule's end; no validation split."""
    run = unselected()
    terms = dict(task=TASK, distill=kl(ramp(0.0, 1.0)))
    student = Net(module=Noisy(6), optimizer=sgd(0.1), terms=terms, ema_decay=0.5)
    run = dataclasses.replace(
        run,
        networks=run.networks | dict(student=student),
        how=run.how | dict(pad=0),
        numbers=SHORT | dict(micro_batches=2),
    )
    return run, {RAMP: [1.0, 3.0]}, {}


def cropped():
    """Crops alone; two that learn at once."""
    run = online()
    peer = dataclasses.replace(run.networks["peer"], optimizer=sgd(0.2, momentum=0.0))
    student = dataclasses.replace(
        run.networks["student"], module=None, model="mlp", hypers=dict(widths=(6,))
    )
    run = dataclasses.replace(
        run,
        networks=run.networks | dict(student=student, peer=peer),
        train=images(75, 1, 1.5),
        validation=images(45, 2, 3.0),
        test=images(45, 3, 2.0),
        how=dict(pad=1),
        numbers=SHORT,
    )
    return run, {MOMENTUM: [0.5, 0.9]}, {}


SWEEPS = {"cached": cached, "flipped": flipped, "cropped": cropped}


class Swept:
    """A sweep that is complete, and what each of its members should have gone through."""

    def __init__(self, name, workdir):
        self.run, over, options = SWEEPS[name]()
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.rows = recompute.sweep(self.run, workdir, over=over, **options)
        self.workdir, self.cached = workdir, recompute.CACHED in said.getvalue()
        before = dataclasses.replace(self.run, phases=self.run.phases[:-1])
        self.before, self.taught = recompute.courses(before)
        self.members = []
        for *values, later in itertools.product(
            *over.values(), range(options.get("init_seeds", 1))
        ):
            point = dict(zip(over, values, strict=True))
            run = recompute.member(self.run, point, later)
            course = recompute.course(run, run.phases[-1], self.taught)
            self.members.append((point | dict(init_seed=run.numbers["init_seed"]), run, course))


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.long) for name in SWEEPS]
)
def swept(request, tmp_path_factory):
    return Swept(request.param, tmp_path_factory.mktemp(request.param))


def test_rows_of_members(swept):
    """Each is the row of the single run with its numbers and its seed."""
    assert swept.cached == (not swept.run.how.get("pad") and not swept.run.how.get("flip"))
    for phase in swept.run.phases[:-1]:  # or the best teacher would be the last
        best = recompute.best_step(swept.run, phase, swept.before[phase.name])
        assert best != swept.run.numbers["num_steps"]
    expected = []
    for point, run, course in swept.members:
        scores = recompute.member_scores(run, course, swept.taught, -1, "test")
        if run.validation is not None:
            scores |= recompute.member_scores(run, course, swept.taught, -1, "validation")
        expected.append(point | scores | dict(bad_step=-1))
    close(swept.rows, expected)
    assert read_csv(swept.workdir / "sweep.csv") == swept.rows


def test_history_of_members(swept):
    """The scores on the way, on the split that selects."""
    expected = []
    for point, run, course in swept.members:
        for step in recompute.evaluated_steps(run):
            scores = recompute.member_scores(run, course, swept.taught, step, run.selects)
            kept = [
                recompute.column(run, run.selects, name, metric)
                for name in run.phases[-1].learners
                for metric in ("accuracy", "nll", "ece", "entropy")
            ]
            expected.append(point | dict(step=step) | {key: scores[key] for key in kept})
    close(read_csv(swept.workdir / "history.csv"), expected)


def read_csv(path):
    with path.open() as file:
        return [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]


def test_states_of_members(swept):
    """The last checkpoint holds what each single run would end with."""
    saved = recompute.saved_members(swept.workdir)
    for i, (_, run, course) in enumerate(swept.members):
        for name in run.phases[-1].learners:
            for part in PARTS:
                tree = getattr(course.states[-1][name], part)
                for path, array, value in recompute.paired(tree, saved[name].get(part)):
                    close(array[i], value, at=f"{name}.{part}{path} of member {i}")


def test_means_over_seeds(swept):
    """Of each point, beside their deviations, of which one seed has none."""
    points = {}
    for row in swept.rows:
        points.setdefault(tuple((k, v) for k, v in row.items() if "." in k), []).append(row)
    expected = []
    for point, rows in points.items():
        found = dict(point)
        for key in rows[0]:
            if key.startswith(("validation_", "test_")):
                values = [row[key] for row in rows]
                found[key] = np.mean(values)
                found[f"{key}_std"] = np.std(values, ddof=1) if len(values) > 1 else np.nan
        expected.append(found)
    close(recompute.sweeps.averaged(swept.rows), expected)
    score = column = f"{swept.run.selects}_accuracy"
    nll = column.replace("accuracy", "nll")
    chosen = max(expected, key=lambda row: (row[score], -row[nll]))
    close(recompute.sweeps.best(swept.rows, column), chosen)


@pytest.mark.parametrize(
    "rows,best",
    [([(0.8, 0.5), (0.9, 0.7), (0.9, 0.6), (0.9, 0.65)], 2), ([(0.9, 0.5), (0.9, 0.5)], 0)],
)
def test_of_equal_accuracies_the_lower_nll_is_best(rows, best):
    """And of equal ones the first."""
    table = [
        dict(
            init_seed=0, validation_accuracy=a, validation_nll=n, test_accuracy=i / 10, bad_step=-1
        )
        | {ALPHA: float(i)}
        for i, (a, n) in enumerate(rows)
    ]
    assert recompute.sweeps.best(table)[ALPHA] == best
