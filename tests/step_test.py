"""The training step against optax and torch by hand, and against itself under every regrouping."""

import functools
import operator
import re

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unformed_network import unformed_mlp

from abkd_jax import losses, models, optimizers, parallel, tasks, train
from abkd_jax import schedules as s
from abkd_jax.binding import as_number, bind, schedule
from abkd_jax.divergences import alpha_beta, forward_kl
from abkd_jax.numerics import log_softmax
from abkd_jax.train import eval_outputs, train_step
from abkd_jax.types import Batch, Outputs, Term

K, D, B = 5, 7, 16


def make_batch(size=B, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, size)
    labelled = rng.random(size) < 0.5
    where = rng.random(size) < 0.8
    return {
        "inputs": jnp.asarray(rng.normal(size=(size, D)), jnp.float32),
        "labels": jnp.asarray(np.where(labelled, labels, -1)),
        "where": jnp.asarray(where),
        "labelled": jnp.asarray(where & labelled),
    }


def make_state(widths=(8,), seed=0, rule=None, **kwargs):
    rule = bind(optimizers.sgd, learning_rate=0.1) if rule is None else rule
    module = models.mlp(num_classes=K, widths=widths)
    return train.create(module, jnp.zeros((1, D)), init_seed=seed, optimizer=rule, **kwargs)


def make_terms(weight=1.0, alpha=0.8, beta=0.3, temperature=2.0, other="teacher"):
    distill = bind(
        losses.on_logits,
        divergence=bind(alpha_beta, alpha=alpha, beta=beta),
        temperature=temperature,
    )
    weight = weight if not np.isscalar(weight) else as_number(weight, "weight")
    return {
        "task": Term(bind(losses.cross_entropy), jnp.ones(()), where="labelled"),
        "distill": Term(distill, weight, other=other),
    }


def assert_trees_equal(a, b, rtol=1e-6, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def offline():
    return {"student": make_state(), "teacher": train.frozen(make_state((16,), seed=1))}


def test_one_step_is_the_gradient_step_written_out():
    networks, batch = offline(), make_batch()
    student, teacher = networks["student"], networks["teacher"]

    def objective(params):
        student_logits = student.forward(params, batch["inputs"], train=False)[0].logits
        teacher_logits = teacher.forward(teacher.params, batch["inputs"], train=False)[0].logits
        log_p = jax.nn.log_softmax(student_logits)
        at_label = jnp.take_along_axis(log_p, jnp.maximum(batch["labels"], 0)[:, None], 1)[:, 0]
        task = -jnp.sum(jnp.where(batch["labelled"], at_label, 0.0)) / jnp.sum(batch["labelled"])
        log_q, log_p = (jax.nn.log_softmax(z / 2.0) for z in (student_logits, teacher_logits))
        kl = 4.0 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return task + 0.7 * jnp.sum(jnp.where(batch["where"], kl, 0.0)) / jnp.sum(batch["where"])

    params = networks["student"].params
    value, grads = jax.value_and_grad(objective)(params)
    terms = make_terms(weight=0.7, alpha=1.0, beta=0.0)
    after, metrics = train_step(networks, batch, {"student": terms})
    np.testing.assert_allclose(metrics["student/loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["student/gradient_norm"], optax.tree.norm(grads), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_trees_equal(after["student"].params, expected, rtol=1e-5, atol=1e-6)
    assert_trees_equal(after["teacher"].params, networks["teacher"].params, rtol=0, atol=0)
    assert after["student"].step == 1 and after["teacher"].step == 0


def test_metrics_are_named_by_learner_and_term():
    _, metrics = train_step(offline(), make_batch(), {"student": make_terms()})
    assert set(metrics) == {f"student/{m}" for m in ("task", "distill", "loss", "gradient_norm")}


def test_a_teacher_learns_alone():
    networks = {"teacher": make_state()}
    terms = {"task": Term(bind(losses.cross_entropy), jnp.ones(()), "labelled")}
    first = train_step(networks, make_batch(), {"teacher": terms})[1]["teacher/task"]
    for _ in range(20):
        networks, metrics = train_step(networks, make_batch(), {"teacher": terms})
    assert metrics["teacher/task"] < 0.8 * first


def test_learners_update_simultaneously_from_the_outputs_before_the_update():
    networks = {"a": make_state(seed=0), "b": make_state((4,), seed=1)}
    objectives = {"a": make_terms(other="b"), "b": make_terms(other="a")}
    batch = make_batch()
    both, metrics = train_step(networks, batch, objectives)
    for learner, other in (("a", "b"), ("b", "a")):
        pair = {learner: networks[learner], other: train.frozen(networks[other])}
        alone, alone_metrics = train_step(pair, batch, {learner: objectives[learner]})
        assert_trees_equal(both[learner].params, alone[learner].params)
        np.testing.assert_allclose(
            metrics[f"{learner}/loss"], alone_metrics[f"{learner}/loss"], rtol=1e-6
        )


def test_outputs_in_the_batch_replace_the_forward_pass():
    networks, batch, objectives = offline(), make_batch(), {"student": make_terms()}
    teacher = networks["teacher"]
    logits = teacher.forward(teacher.params, batch["inputs"], train=False)[0].logits
    cached = batch | {"outputs": {"teacher": Outputs(logits=logits)}}
    poisoned = networks | {
        "teacher": teacher.replace(params=jax.tree.map(lambda p: p * jnp.nan, teacher.params))
    }
    expected, _ = train_step(networks, batch, objectives)
    for micro_batches in (1, 2):
        found, _ = train_step(poisoned, cached, objectives, micro_batches=micro_batches)
        assert_trees_equal(found["student"].params, expected["student"].params, atol=1e-6)


@pytest.mark.parametrize("micro_batches,devices", [(1, 1), (2, 1), (2, 8)])
def test_logits_that_networks_leave_unformed(micro_batches, devices):
    """Formed in chunks, they make the step of networks that form them."""
    mesh = parallel.mesh(devices, batch_size=B) if devices > 1 else None
    sgd, batch = bind(optimizers.sgd, learning_rate=0.1), make_batch()

    def step(network, **options):
        states = [
            train.create(network, batch["inputs"], init_seed=seed, optimizer=sgd) for seed in (0, 1)
        ]
        networks = {"student": states[0], "teacher": train.frozen(states[1])}
        found, metrics = train_step(networks, batch, {"student": make_terms()}, **options)
        return found["student"].params, metrics

    expected = step(unformed_mlp(num_classes=K, forms=True))
    found = step(unformed_mlp(num_classes=K), chunk=3, micro_batches=micro_batches, mesh=mesh)
    assert_trees_equal(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 4, 16])
def test_accumulation_is_exact_whatever_the_masks(micro_batches):
    networks, batch, objectives = offline(), make_batch(), {"student": make_terms()}
    whole, metrics = train_step(networks, batch, objectives)
    parts, part_metrics = train_step(networks, batch, objectives, micro_batches=micro_batches)
    assert_trees_equal(whole["student"].params, parts["student"].params, rtol=1e-5, atol=1e-6)
    assert_trees_equal(metrics, part_metrics, rtol=1e-5)


def test_parts_without_an_example_of_a_term_add_nothing_to_it():
    """Of four parts two have no row that counts, and three none with a label."""
    networks, batch, objectives = offline(), make_batch(), {"student": make_terms()}
    rows = np.arange(B)
    batch |= {"where": jnp.asarray(rows >= B // 2), "labelled": jnp.asarray(rows == B - 1)}
    batch |= {"labels": jnp.where(batch["labelled"], 1, -1)}
    whole, metrics = train_step(networks, batch, objectives)
    found, found_metrics = train_step(networks, batch, objectives, micro_batches=4)
    assert_trees_equal(whole["student"].params, found["student"].params, rtol=1e-5, atol=1e-6)
    assert_trees_equal(metrics, found_metrics, rtol=1e-5)


def parameters_of_rows(variables, rows, *, train, key):
    """Logits of one class: of each row, the sum of its own parameters that dropout keeps."""
    kept = jax.random.bernoulli(key, 0.5, (len(rows), D)) if train else 1.0
    return jnp.sum(kept * variables[rows], -1, keepdims=True)


def kept_by_dropout(seed=0, **options):
    """What dropout keeps in a step, [B, D] of each of two learners: the gradients tell."""

    def logit(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return student.logits[..., 0]

    rule = bind(optimizers.sgd, learning_rate=float(B))
    state = train.adopt(parameters_of_rows, jnp.zeros((B, D)), optimizer=rule)
    networks = {"a": state, "b": state}
    objectives = {name: {"logit": Term(bind(logit), jnp.ones(()))} for name in networks}
    batch = {"inputs": jnp.arange(B), "key": jax.random.key(seed)}
    after, _ = train_step(networks, batch, objectives, **options)
    return np.stack([-after[name].params for name in networks])


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_dropout_has_a_key_for_each_learner_and_each_part_of_the_batch(micro_batches):
    found = kept_by_dropout(micro_batches=micro_batches)
    assert np.isin(found, (0.0, 1.0)).all()
    parts = [part.tobytes() for kept in found for part in np.split(kept, micro_batches)]
    assert len(set(parts)) == 2 * micro_batches
    np.testing.assert_array_equal(found, kept_by_dropout(micro_batches=micro_batches))
    assert np.any(found != kept_by_dropout(seed=1, micro_batches=micro_batches))
    if micro_batches == 1:
        np.testing.assert_array_equal(found, kept_by_dropout())


def test_accumulation_refusals():
    networks, batch = offline(), make_batch()
    with pytest.raises(ValueError, match=r"^micro_batches must be a divisor of 16 rows; found 3\."):
        train_step(networks, batch, {"student": make_terms()}, micro_batches=3)

    def coupled(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return jnp.sum(student.logits, -1) - jnp.mean(teacher.logits)

    coupled.couples_batch = True
    terms = {"shared": Term(bind(coupled), jnp.ones(()), other="teacher")}
    with pytest.raises(
        ValueError,
        match=r"^micro_batches must be 1, for student\.terms\.shared couples the rows of a batch; "
        r"found 2\.",
    ):
        train_step(networks, batch, {"student": terms}, micro_batches=2)


def test_batch_norm_statistics_move_for_learners_only():
    module = models.cnn(num_classes=K, widths=(4, 8), batch_norm=True)
    rule = bind(optimizers.sgd, learning_rate=0.1)
    new = functools.partial(train.create, module, jnp.zeros((1, 8, 8, 1)), optimizer=rule)
    networks = {"student": new(init_seed=0), "teacher": train.frozen(new(init_seed=1))}
    batch = make_batch() | {"inputs": jax.random.normal(jax.random.key(0), (B, 8, 8, 1)) + 1.0}
    after, _ = train_step(networks, batch, {"student": make_terms()})
    before, moved = networks["student"].batch_stats, after["student"].batch_stats
    assert not np.allclose(jax.tree.leaves(before)[0], jax.tree.leaves(moved)[0])
    assert_trees_equal(
        after["teacher"].batch_stats, networks["teacher"].batch_stats, rtol=0, atol=0
    )
    parts, _ = train_step(networks, batch, {"student": make_terms()}, micro_batches=2)
    halves = networks["student"]
    for half in (batch["inputs"][: B // 2], batch["inputs"][B // 2 :]):
        _, stats = halves.forward(halves.params, half, train=True)
        halves = halves.replace(batch_stats=stats)
    assert_trees_equal(parts["student"].batch_stats, halves.batch_stats, rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_trees_equal(parts["student"].batch_stats, moved, rtol=1e-5)


def test_one_compile_for_fifty_numbers():
    """alpha, beta, temperature, weight and learning rate are data."""
    before = train_step._cache_size()
    rng = np.random.default_rng(0)
    batch = make_batch(11)  # a shape of its own, so that no other test has compiled it
    teacher = train.frozen(make_state((16,), seed=1))
    params = set()
    for index in range(50):
        alpha, beta, temperature, weight, rate = rng.uniform(0.1, 2.0, 5).tolist()
        alpha = int(alpha) if index % 2 else alpha
        rule = bind(optimizers.sgd, learning_rate=rate, momentum=0.9)
        networks = {"student": make_state(rule=rule), "teacher": teacher}
        terms = make_terms(weight, alpha, beta, temperature)
        after, _ = train_step(networks, batch, {"student": terms})
        params.add(float(jax.tree.leaves(after["student"].params)[1].sum()))
    assert train_step._cache_size() == before + 1
    assert len(params) == 50


def test_schedules_are_evaluated_inside_the_step_and_compile_once():
    alpha = schedule(s.linear, start=1.0, end=0.2, steps=4)
    weight = schedule(s.cosine, start=2.0, end=0.0, steps=4)
    rate = schedule(s.linear, start=0.5, end=0.0, steps=4)
    networks = offline()
    scheduled = networks | {
        "student": make_state(rule=bind(optimizers.sgd, learning_rate=rate, momentum=0.9))
    }
    before = None
    for step in range(5):
        fraction = min(step / 4, 1.0)
        fixed_rule = bind(optimizers.sgd, learning_rate=0.5 * (1 - fraction), momentum=0.9)
        state = make_state(rule=fixed_rule)
        inner = scheduled["student"].opt_state.inner_state
        fixed = networks | {
            "student": state.replace(
                params=scheduled["student"].params,
                opt_state=state.opt_state._replace(inner_state=inner),
            )
        }
        terms = make_terms(1.0 + np.cos(np.pi * fraction), 1.0 - 0.8 * fraction)
        expected, _ = train_step(fixed, make_batch(), {"student": terms})
        objective = {"student": make_terms(weight, alpha)}
        scheduled, _ = train_step(scheduled, make_batch(), objective)
        assert_trees_equal(scheduled["student"].params, expected["student"].params, 1e-5, 1e-6)
        before = before or train_step._cache_size()
    assert train_step._cache_size() == before


def test_members_by_vmap_equal_single_runs():
    """A sweep over the divergence's numbers, the learning rate and the seed, with one teacher."""
    teacher, batch = train.frozen(make_state((16,), seed=9)), make_batch()
    rates, alphas = jnp.array([0.1, 0.3, 0.5]), jnp.array([1.0, 0.5, 0.0])

    def member(seed, rate, alpha):
        state = make_state(seed=seed, rule=bind(optimizers.sgd, learning_rate=rate))
        for _ in range(3):
            networks = {"student": state, "teacher": teacher}
            networks, metrics = train_step(networks, batch, {"student": make_terms(alpha=alpha)})
            state = networks["student"]
        return state.params, metrics

    swept = jax.vmap(member)(jnp.arange(3), rates, alphas)
    for index in range(3):
        single = member(index, rates[index], alphas[index])
        swept_member = jax.tree.map(operator.itemgetter(index), swept)
        assert_trees_equal(swept_member, single, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("devices", [2, 8])
def test_a_mesh_of_devices_equals_one(devices):
    networks, batch, objectives = offline(), make_batch(), {"student": make_terms()}
    expected, expected_metrics = train_step(networks, batch, objectives)
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    place = lambda spec, tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    found, metrics = train_step(place((), networks), place(("data",), batch), place((), objectives))
    assert_trees_equal(found["student"].params, expected["student"].params, rtol=1e-5, atol=1e-6)
    assert_trees_equal(metrics, expected_metrics, rtol=1e-5)


def test_scanned_steps_equal_single_steps():
    networks, objectives = offline(), {"student": make_terms()}
    batches = [make_batch(seed=i) for i in range(5)]
    single = networks
    for batch in batches:
        single, _ = train_step(single, batch, objectives)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    scanned, _ = jax.lax.scan(lambda n, b: train_step(n, b, objectives), networks, stacked)
    assert_trees_equal(scanned["student"].params, single["student"].params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_without_a_mask_every_row_counts(labels):
    networks, batch = offline(), make_batch()
    terms = {"distill": make_terms()["distill"]}
    if not labels:
        del batch["labels"]
    bare = {name: batch[name] for name in batch if name not in ("where", "labelled")}
    whole = bare | {"where": jnp.ones(B, bool)}
    found, expected = (train_step(networks, x, {"student": terms}) for x in (bare, whole))
    assert_trees_equal(found, expected)  # the constant mask is compiled into the program
    masked, _ = train_step(networks, batch, {"student": terms})
    with pytest.raises(AssertionError):
        assert_trees_equal(found[0]["student"].params, masked["student"].params)


def test_a_fully_masked_batch_moves_nothing_and_is_finite():
    networks, batch = offline(), make_batch()
    batch = batch | {name: jnp.zeros(B, bool) for name in ("where", "labelled")}
    after, metrics = train_step(networks, batch, {"student": make_terms()})
    assert all(np.asarray(value) == 0 for value in metrics.values())
    assert_trees_equal(after["student"].params, networks["student"].params, rtol=0, atol=0)


def test_evaluation_uses_the_moving_average_and_real_rows_count():
    networks, batch = offline(), make_batch()
    state = networks["student"]
    averaged = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    averaged = averaged.replace(ema_params=state.params)
    outputs = eval_outputs(networks, batch)
    assert set(outputs) == {"student", "teacher"}
    ema_outputs = eval_outputs(networks | {"student": averaged}, batch)
    assert_trees_equal(outputs["student"], ema_outputs["student"], rtol=0, atol=0)
    sums = tasks.classification().sums(outputs, batch, ("student",))
    logits = np.asarray(outputs["student"].logits)
    valid = np.asarray(batch["where"]) & (np.asarray(batch["labels"]) >= 0)
    right = logits.argmax(-1) == np.asarray(batch["labels"])
    assert sums["student"]["count"] == valid.sum()
    assert sums["student"]["accuracy"] == (right & valid).sum()
    divergence = forward_kl(outputs["student"].logits, outputs["teacher"].logits)
    expected = np.where(batch["where"], divergence, 0.0).sum()
    np.testing.assert_allclose(sums["student|teacher"]["kl_at_1"], expected, rtol=1e-5)


def test_evaluation_takes_outputs_that_come_with_the_batch():
    networks, batch = offline(), make_batch()
    given = Outputs(logits=jnp.ones((B, K)))
    outputs = eval_outputs(networks, batch | {"outputs": {"teacher": given}})
    assert_trees_equal(outputs["teacher"], given, rtol=0, atol=0)
    plain = eval_outputs(networks, batch)
    assert_trees_equal(outputs["student"], plain["student"], rtol=0, atol=0)


def test_a_loss_of_the_learner_alone_needs_no_other():
    """Its second argument shows nothing."""

    def alone(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        assert teacher == Outputs()
        return jnp.sum(student.logits**2, -1)

    terms = {"small": Term(bind(alone), jnp.ones(()))}
    networks = {"student": make_state()}
    _, before = train_step(networks, make_batch(), {"student": terms})
    after, _ = train_step(networks, make_batch(), {"student": terms})
    _, metrics = train_step(after, make_batch(), {"student": terms})
    assert metrics["student/small"] < before["student/small"]


def test_log_softmax_of_the_library_is_that_of_jax():
    """The oracle of these tests is jax.nn; this pins the two to each other."""
    logits = make_batch()["inputs"]
    np.testing.assert_allclose(log_softmax(logits), jax.nn.log_softmax(logits), atol=1e-6)


def test_the_heads_of_cached_outputs_are_not_split():
    networks, batch = offline(), make_batch()
    teacher = networks["teacher"]
    outputs = teacher.forward(teacher.params, batch["inputs"], train=False)[0]

    def of_heads(student: Outputs, teacher: Outputs, batch: Batch) -> jax.Array:
        return jnp.sum(student.logits, -1) * jnp.sum(teacher.head.unembedding)

    objectives = {"student": {"heads": Term(bind(of_heads), jnp.ones(()), other="teacher")}}
    expected, _ = train_step(networks, batch, objectives)
    cached = batch | {"outputs": {"teacher": outputs}}
    found, _ = train_step(networks, cached, objectives, micro_batches=2)
    assert_trees_equal(found["student"].params, expected["student"].params, rtol=1e-5, atol=1e-5)


def test_a_new_state_with_a_moving_average_can_be_donated():
    networks = offline() | {"student": make_state(ema_decay=0.9)}
    step = jax.jit(lambda n, b, o: train_step(n, b, o), donate_argnums=0)
    assert step(networks, make_batch(), {"student": make_terms()})[0]["student"].step == 1


@pytest.mark.parametrize(
    "guard,weight,moves", [(True, 1.0, True), (False, 1.0, False), (True, np.nan, False)]
)
def test_a_guarded_step_updates_nothing_unless_all_is_finite(guard, weight, moves):
    rule = bind(optimizers.sgd, learning_rate=0.1, momentum=0.9)
    networks, batch = offline() | {"student": make_state(ema_decay=0.5, rule=rule)}, make_batch()
    objectives = {"student": make_terms(weight=jnp.asarray(weight))}
    after, metrics = train_step(networks, batch, objectives, guard=jnp.asarray(guard))
    expected, plain = train_step(networks, batch, objectives)
    assert_trees_equal(after, expected if moves else networks, rtol=0, atol=0)
    assert_trees_equal(metrics, plain, rtol=0, atol=0)


def without(entry):
    return {name: value for name, value in make_batch().items() if name != entry}


REFUSED = {
    "objectives must be {learner: {name: Term}}; found {}.": dict(objectives={}),
    "a learner of objectives must be one of student, teacher; found 'pupil'.": dict(
        objectives={"pupil": make_terms()}
    ),
    "the objective of 'student' must be of at least one term; found {}.": dict(
        objectives={"student": {}}
    ),
    "'teacher' has no optimiser; leave it out of the objectives.": dict(
        objectives={"teacher": make_terms(other="student")}
    ),
    "student.terms.distill.other must be one of student, teacher; found 'peer'.": dict(
        objectives={"student": make_terms(other="peer")}
    ),
    "student.terms.distill needs an other network; name one of student, teacher.": dict(
        objectives={"student": make_terms(other=None)}
    ),
    "the batch lacks 'labelled'; it has inputs, labels, where.": dict(batch=without("labelled")),
    "the batch lacks 'inputs'; it has labelled, labels, where.": dict(batch=without("inputs")),
    "batch['where'] must be bool [16], one for each row of the batch; found float32[16].": dict(
        batch=make_batch() | {"where": jnp.ones(B)}
    ),
    "batch['outputs'] has 'student', which learns and must be run.": dict(
        batch=make_batch() | {"outputs": {"student": Outputs(logits=jnp.ones((B, K)))}}
    ),
    "micro_batches must be at least 1; found 0.": dict(micro_batches=0),
    "chunk must be at least 0; found -1.": dict(chunk=-1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    change = REFUSED[message]
    batch = change.get("batch", make_batch())
    objectives = change.get("objectives", {"student": make_terms()})
    error = AssertionError if message.startswith("batch['where']") else ValueError
    with pytest.raises(error, match="^" + re.escape(message)):
        sizes = {name: change[name] for name in ("micro_batches", "chunk") if name in change}
        train_step(offline(), batch, objectives, **sizes)


def test_an_unbound_optimiser_is_refused():
    with pytest.raises(TypeError, match=r"^optimizer must be a function of abkd_jax\.optimizers"):
        make_state(rule=optax.sgd(0.1))


def test_an_empty_batch_moves_nothing():
    networks, batch = offline(), jax.tree.map(lambda x: x[:0], make_batch())
    after, _ = train_step(networks, batch, {"student": make_terms()})
    assert_trees_equal(after["student"].params, networks["student"].params, rtol=0, atol=0)
