"""Networks of PyTorch by their tensors' names: every kind of file, in a run, and all refusals."""

import functools
import pickle

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from abkd_jax import config as configs
from abkd_jax import models, train_and_evaluate

K = 10
MODULE = models.resnet(num_classes=K, depth=8, widths=(4, 4, 8, 8))


@functools.cache
def variables(seed=0):
    """Of the small network, every number drawn."""
    inputs = jnp.zeros((2, 8, 8, 3))
    init = functools.partial(MODULE.init, train=False)
    leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0), inputs))
    rng = np.random.default_rng(seed)
    drawn = [rng.uniform(0.1, 1, x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, drawn)


def tensors():
    return models.to_torch(MODULE, variables())


def saved(path, tensors, **around):
    """A file of the kind that its name says; `around`: what torch.save puts beside the tensors."""
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(tensors, path)
    else:
        torch = pytest.importorskip("torch")
        table = {name: torch.tensor(x) for name, x in tensors.items()}
        torch.save({"model": table, **around} if around else table, path)
    return str(path)


def read(path, **options):
    found = models.read_tensors(path, **options)
    return models.from_torch(found, MODULE, variables(), origin=path)


def test_the_names_are_those_of_the_benchmark():
    names = set(tensors())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.bn2.bias", "fc.bias"} <= names
    assert {"layer2.0.downsample.0.weight", "layer3.0.downsample.1.running_mean"} <= names
    assert tensors()["layer2.0.conv1.weight"].shape == (8, 4, 3, 3)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth"])
def test_a_file_is_read_bitwise(tmp_path, suffix):
    found = read(saved(tmp_path / f"x.{suffix}", tensors()))
    jax.tree.map(np.testing.assert_array_equal, found, variables())


def test_a_checkpoint_of_a_training_is_read(tmp_path):
    counters = {"bn1.num_batches_tracked": np.int64(7)}
    split = {f"module.{name}": x for name, x in (tensors() | counters).items()}
    around = dict(epoch=240, accuracy=0.7, optimizer={"state": {}, "param_groups": [{"lr": 0.1}]})
    found = read(saved(tmp_path / "ckpt_epoch_240.pth", split, **around))
    jax.tree.map(np.testing.assert_array_equal, found, variables())


def test_one_of_several_tables_is_named(tmp_path):
    other = {"x": pytest.importorskip("torch").zeros(3)}
    path = saved(tmp_path / "x.pth", tensors(), ema=other)
    expected = "key must be one of the tables of tensors in .* which are \\['model', 'ema'\\]; "
    with pytest.raises(ValueError, match=expected + "found ''"):
        read(path)
    jax.tree.map(np.testing.assert_array_equal, read(path, key="model"), variables())


def without(name):
    return {key: x for key, x in tensors().items() if key != name}


REFUSALS = [
    (without("fc.bias"), "x.npz lacks the tensors 'fc.bias', which ResNet has."),
    (
        {("fc.bais" if key == "fc.bias" else key): x for key, x in tensors().items()},
        "x.npz lacks the tensors 'fc.bias', which ResNet has (did you mean 'fc.bais'?).",
    ),
    (
        {key: x for key, x in tensors().items() if "bn" not in key},
        "x.npz lacks the tensors 'bn1.bias', 'bn1.running_mean', 'bn1.running_var', 'bn1.weight' "
        "and 24 more, which ResNet has.",
    ),
    (
        tensors() | {"layer1.1.conv1.weight": np.zeros((4, 4, 3, 3), np.float32)},
        "x.npz has the tensors 'layer1.1.conv1.weight', for which ResNet has no place.",
    ),
    (
        tensors() | {"fc.weight": np.zeros((100, 8), np.float32)},
        "the tensor 'fc.weight' of x.npz must be of shape (10, 8); found (100, 8).",
    ),
    (
        tensors() | {"conv1.weight": np.zeros((3, 3, 3, 4), np.float32)},
        "the tensor 'conv1.weight' of x.npz must be of shape (4, 3, 3, 3); found (3, 3, 3, 4).",
    ),
    (
        tensors() | {"bn1.running_var": np.zeros(5, np.float32)},
        "the tensor 'bn1.running_var' of x.npz must be of shape (4,); found (5,).",
    ),
    (
        tensors() | {"fc.bias": np.zeros(10, np.complex64)},
        "the tensor 'fc.bias' of x.npz must be of real numbers, of a type that the file keeps; "
        "found 'complex64'.",
    ),
    (
        tensors() | {"fc.bias": np.zeros(10, "V2")},  # what np.load makes of bfloat16
        "the tensor 'fc.bias' of x.npz must be of real numbers, of a type that the file keeps; "
        "found 'void16'.",
    ),
]


@pytest.mark.parametrize("found,message", REFUSALS)
def test_tensors_that_do_not_fit(found, message):
    with pytest.raises(ValueError) as error:
        models.from_torch(found, MODULE, variables(), origin="x.npz")
    assert str(error.value) == message


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_files_that_cannot_be_read(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    refused = {}
    for name, content in [("no.npz", b"x"), ("no.safetensors", b"x" * 20), ("no.pth", b"x")]:
        (tmp_path / name).write_bytes(content)
        refused[name] = f"{tmp_path / name} cannot be read"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    refused["evil.pth"] = f"{tmp_path / 'evil.pth'} cannot be read"
    refused["evil.pt"] = f"{tmp_path / 'evil.pt'} holds print beside tensors; save these alone"
    np.savez(tmp_path / "objects.npz", x=np.array([Evil()], object))
    refused["objects.npz"] = f"{tmp_path / 'objects.npz'} cannot be read"
    torch.save({0: torch.zeros(3)}, tmp_path / "numbered.pth")
    refused["numbered.pth"] = "key must be one of the tables of tensors in"
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    refused["empty.pth"] = "key must be one of the tables of tensors in"
    refused["missing.pth"] = f"{tmp_path / 'missing.pth'} is no file of tensors"
    for name, start in refused.items():
        with pytest.raises(ValueError) as error:
            models.read_tensors(str(tmp_path / name))
        message = str(error.value)
        assert message.startswith(start) and message.endswith(".") and "\n" not in message
    assert "executed" not in capsys.readouterr().out


def test_a_network_without_names_is_refused():
    module = models.mlp(num_classes=K, widths=(4,))
    own = jax.eval_shape(
        functools.partial(module.init, train=False), jax.random.key(0), jnp.zeros((2, 3))
    )
    with pytest.raises(ValueError, match=r"^MLP has no names in PyTorch; give the module a torch_"):
        models.from_torch(tensors(), module, own, origin="x")


def config(path, **changes):
    found = configs.defaults()
    found.update(
        data=dict(fn="digits", shape=(8, 8, 3), validation=297),
        teacher=dict(
            model=dict(fn="resnet", depth=8, widths=(4, 4, 8, 8)),
            weights=dict(fn="torch", path=path),
            published=0.75,
        ),
        student=dict(
            model=dict(fn="mlp", widths=(8,)),
            optimizer=dict(fn="adam", learning_rate=1e-3),
            terms=dict(distill=dict(fn="on_logits", weight=1.0, divergence=dict(fn="forward_kl"))),
        ),
        phases=dict(distill=dict(learn=("student",), see=("teacher",))),
        num_steps=3,
        batch_size=8,
        **changes,
    )
    return found


def test_a_teacher_from_a_file_in_a_run(tmp_path):
    path = saved(tmp_path / "x.npz", tensors())
    alone = train_and_evaluate(config(path), tmp_path / "run", evaluate_only=True)
    assert [*alone["networks"]] == ["teacher"] and alone["score"] == "accuracy"
    assert not (tmp_path / "run" / "config.json").exists()
    result = train_and_evaluate(config(path), tmp_path / "run")["networks"]
    accuracy = result["teacher"]["last"]["accuracy"]
    assert accuracy == alone["networks"]["teacher"]["last"]["accuracy"]
    assert (result["teacher"]["published"], result["student"]["published"]) == (0.75, None)
    # The same by hand: the network of torch's tensors on the images as the run sees them.
    run = configs.resolve(config(path)).data()
    inputs = jnp.asarray(run.test.inputs, jnp.float32)
    outputs = MODULE.apply(variables(), inputs, train=False)
    right = np.asarray(outputs.logits).argmax(-1) == np.asarray(run.test.labels)
    assert accuracy == pytest.approx(right.mean(), abs=2e-3)
    page = (tmp_path / "run" / "report.md").read_text()
    header, *_ = [line for line in page.splitlines() if line.startswith("| network | accuracy")]
    row, *_ = [line for line in page.splitlines() if line.startswith("| teacher |")]
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["published"] == "75.00"


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint to evaluate; train first"):
        whole = config("x.npz")
        with whole.unlocked():
            del whole.teacher
            whole.student.terms = dict(task=dict(fn="cross_entropy", weight=1.0))
            whole.phases.distill = dict(learn=("student",))
        train_and_evaluate(whole, tmp_path / "run", evaluate_only=True)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(path="nothing.pth"), "teacher.weights: nothing.pth is no file of tensors."),
        (dict(published=True), "teacher.published must be the score that its source gives, a numb"),
        (dict(published="74"), "teacher.published must be the score that its source gives, a numb"),
        (
            dict(published=float("nan")),
            "teacher.published must be the score that its source gives, a number; found nan.",
        ),
        (dict(depth=14), "teacher.weights: x.npz lacks the tensors 'layer1.1.bn1.bias', 'layer1."),
    ],
)
def test_refusals_of_a_run(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "x.npz", tensors())
    whole = config(changes.get("path", "x.npz"))
    with whole.unlocked():
        whole.teacher.model.depth = changes.get("depth", 8)
        if "published" in changes:
            del whole.teacher.published
            whole.teacher.published = changes["published"]
    with pytest.raises(ValueError) as error:
        train_and_evaluate(whole, tmp_path / "run")
    assert str(error.value).startswith(message)
