"""Runs and sweeps say what the bare training step, numpy and their seeds say: recomputed whole."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json

import jax
import numpy as np
import pytest
import recompute
from flax import linen as nn
from recompute import Net, Phase, Run

from abkd_jax.types import Outputs

K = 7
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
    data_seed=5,
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
    """Vectors; a teacher of the test's own with dropout, batch norm and an average."""
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
    near = dict(
        fn="norm_and_direction", centers=recompute.CLASS_MEANS, weight=0.3, where="labelled"
    )
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
        | dict(num_steps=14, log_every=6, steps_per_call=3, analysis=("entropy", "gradient_norms")),
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
        NUMBERS | dict(num_steps=18, log_every=8),
    )


RUNS = {"offline": offline, "unselected": unselected, "online": online}


class Done:
    """A run that is complete, what it left, and what it should have."""

    def __init__(self, run, workdir):
        self.run, self.workdir = run, workdir
        recompute.train(run, workdir)
        self.courses, self.last = recompute.courses(run)
        self.folders = {p.name: recompute.folder(workdir, run, p) for p in run.phases}
        self.saved = {name: recompute.saved(folder) for name, folder in self.folders.items()}
        self.networks = self.result()["networks"]

    def result(self):
        return json.loads((self.workdir / "result.json").read_text())

    def learned(self):
        """The phase of each network that learned."""
        return [(phase, name) for phase in self.run.phases for name in phase.learners]

    def at(self, phase, name, step):
        """The variables that a checkpoint has for evaluation."""
        state = self.saved[phase.name][step][name]
        averaged = state.get("ema_params")
        params = state["params"] if averaged is None else averaged
        return {"params": params, "batch_stats": state.get("batch_stats") or {}}


@pytest.fixture(scope="module", params=RUNS)
def done(request, tmp_path_factory):
    return Done(RUNS[request.param](), tmp_path_factory.mktemp(request.param))


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
        course, steps = done.courses[phase.name], done.saved[phase.name]
        assert {end, recompute.best_step(done.run, phase, course)} <= set(steps)
        for step, networks in steps.items():
            found, expected = networks[name], course.states[step][name]
            assert int(found["step"]) == step
            for part in ("params", "batch_stats", "opt_state"):
                tree = getattr(expected, part)
                for path, array in recompute.arranged(tree, found.get(part)):
                    value = dict(jax.tree.leaves_with_path(tree))[path]
                    close(array, value, at=f"{name}.{part} at {step}: {path}")
            averaged = found.get("ema_params")
            assert (averaged is None) == (done.run.networks[name].ema_decay is None)
            if averaged is not None:
                tree = course.averages[step][name]
                for (_, array), value in zip(
                    recompute.arranged(tree, averaged), jax.tree.leaves(tree), strict=True
                ):
                    close(array, value, at=f"the average of {name} at {step}")


def test_scores(done):
    """Of the last states and of the best ones, on test data; what else the result says."""
    run, end = done.run, done.run.numbers["num_steps"]
    expected = {name: dict(last=(None, x), best=None) for name, x in done.last.items()}
    for phase, name in done.learned():
        best = recompute.best_step(run, phase, done.courses[phase.name])
        expected[name] = dict(
            last=(end, done.at(phase, name, end)), best=(best, done.at(phase, name, best))
        )
    assert set(done.networks) == set(expected)
    for name, states in expected.items():
        found = done.networks[name]
        scores, _ = recompute.scores(run, name, states["last"][1])
        close_scores(found["last"], scores, name)
        if states["best"] is None:
            assert found["best"] is None and found["sha256"] is None and found["steps"] == 0
            continue
        step, variables = states["best"]
        scores, accuracy = recompute.scores(run, name, variables)
        assert found["best"]["step"] == step and found["steps"] == end
        close(found["best"]["score"], accuracy)
        close_scores(found["best"]["scores"], scores, name)
    recompute.said_of_run(run, done.result())


def close_scores(found, expected, name):
    """Also of the temperature, at whose minimum the NLL is flat: float32 knows half its digits."""
    run_t, own_t = found["temperature"], expected["temperature"]
    if own_t is not None:
        close(run_t, own_t, rtol=1e-4, at=name)
    parts = ("temperature", "scaled", "entropy")
    close(
        {k: x for k, x in found.items() if k not in parts},
        {k: x for k, x in expected.items() if k not in parts},
        at=name,
    )
    close(found["scaled"], expected["scaled"], rtol=1e-4, at=name)


def test_digests_and_sizes(done):
    """The SHA-256 of what the last checkpoint holds, and the number of parameters."""
    for phase, name in done.learned():
        saved = done.saved[phase.name][done.run.numbers["num_steps"]][name]
        state = done.courses[phase.name].states[-1][name]
        expected = {
            part: recompute.digest(getattr(state, part), saved.get(part))
            for part in ("params", "opt_state", "batch_stats")
        }
        assert done.networks[name]["sha256"] == expected
    for name, found in done.networks.items():
        plain = recompute.first_variables(done.run, name, False)["params"]
        assert found["parameters"] == sum(x.size for x in jax.tree.leaves(plain))


def test_examples(done):
    """The first examples of the test set, with what each network says of them."""
    found = dict(np.load(done.workdir / "examples.npz"))
    inputs, labels = done.run.test
    assert np.array_equal(found.pop("labels"), labels[:8])
    if inputs.ndim == 4:
        assert np.array_equal(found.pop("images"), inputs[:8])
    expected = {}
    for name, variables in done.last.items():
        logits, _ = recompute.on_split(done.run, name, variables, "test")
        expected[f"probabilities/{name}"] = np.exp(recompute.log_softmax(logits[:8]))
    close(found, expected)


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
        "mlp", dict(widths=(6,)), optimizer=sgd(0.2), terms=dict(task=TASK), ema_decay=0.8
    )
    run = dataclasses.replace(
        run,
        networks=dict(teacher=teacher, student=student),
        phases=(OFFLINE[0], OFFLINE[2]),
        numbers=SHORT | dict(steps_per_call=2),
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
        run.networks["student"], module=None, model="mlp", widths=dict(widths=(6,))
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
        _, self.taught = recompute.courses(before)
        self.members = []
        for *values, later in itertools.product(
            *over.values(), range(options.get("init_seeds", 1))
        ):
            point = dict(zip(over, values, strict=True))
            run = recompute.member(self.run, point, later)
            course = recompute.course(run, run.phases[-1], self.taught)
            self.members.append((point | dict(init_seed=run.numbers["init_seed"]), run, course))


@pytest.fixture(scope="module", params=SWEEPS)
def swept(request, tmp_path_factory):
    return Swept(request.param, tmp_path_factory.mktemp(request.param))


def test_rows_of_members(swept):
    """Each is the row of the single run with its numbers and its seed."""
    assert swept.cached == (not swept.run.how.get("pad") and not swept.run.how.get("flip"))
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
            for part in ("params", "batch_stats", "opt_state"):
                tree = getattr(course.states[-1][name], part)
                values = jax.tree.leaves(tree)
                for (path, array), value in zip(
                    recompute.arranged(tree, saved[name].get(part)), values, strict=True
                ):
                    close(array[i], value, at=f"{name} of member {i}: {path}")


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
