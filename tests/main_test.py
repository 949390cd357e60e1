"""The command line: a run, the same again, and one sentence for each thing that it cannot do."""

import json
import pathlib
import subprocess
import sys

import own_process
import pytest
from absl.testing import flagsaver

from abkd_jax import main
from abkd_jax.config.build import names

# of ml_collections
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

_ROOT = pathlib.Path(__file__).parents[1]
_DIGITS = _ROOT / "configs" / "digits.py"
_FAST = [f"--config={_DIGITS}:runlocal", "--config.devices=1"]

# A config file that is the digits' and then something else.
_CHANGED = """

_unchanged = get_config


def get_config(argument="runlocal"):
    config = _unchanged(argument).unlock()
    config.devices = 1
    {}
    return config
"""


def named(kind):
    """The functions of a kind, as a refusal lists them."""
    return ", ".join(sorted(names(kind)))


def refusal(monkeypatch, *argv):
    """What the command line says as it refuses."""
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of the config before
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as refused:
        main.main(main.parse(["main", *argv]))
    message = refused.value.code
    assert isinstance(message, str), message  # sys.exit prints it, and the exit status is 1
    assert "\n" not in message and "Traceback" not in message and "Error:" not in message
    return message


def run(*argv, **environment):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "abkd_jax.main", *argv]
    how = dict(cwd=_ROOT, env=own_process.environment(**environment))
    return subprocess.run(command, **how, capture_output=True, text=True)


# --- flags --------------------------------------------------------------------------------------

FLAGS = (
    "the flags are --config, --workdir, --evaluate, --profile, --plan, --distributed, "
    "--coordinator, --num_processes, --process_id, --coordinator_timeout, and --config.KEY=VALUE."
)
OF_FLAGS = [
    ([], "--config is missing; give a config file: --config=configs/digits.py."),
    (["--workdir=w"], "--config is missing; give a config file: --config=configs/digits.py."),
    (["--config.batch_size=3"],
     "--config is missing; give a config file: --config=configs/digits.py."),
    ([*_FAST], "--workdir is missing; give the folder of the run: --workdir=runs/digits."),
    ([*_FAST, "--workdir="],
     "--workdir is missing; give the folder of the run: --workdir=runs/digits."),
    (["--config=configs/no.py", "--workdir=w"],
     "--config: there is no file 'configs/no.py'; give one, such as configs/digits.py."),
    (["--config=configs/no.py", "--workdir=w", "--config.batch_size=3"],
     "--config: there is no file 'configs/no.py'; give one, such as configs/digits.py."),
    (["--config=", "--workdir=w"],
     "--config: there is no file ''; give one, such as configs/digits.py."),
    ([*_FAST, "--workdir=w", "--seed=1"], "unknown flag --seed; " + FLAGS),
    ([*_FAST, "--worddir=w"],
     "unknown flag --worddir (did you mean 'workdir'?); " + FLAGS),
    ([*_FAST, "--workdir=w", "--evaluate=maybe"],
     "--evaluate=maybe: ('Non-boolean argument to boolean flag', 'maybe'); mend this flag."),
    ([*_FAST, "--plan="], "--plan must be 'here', or a topology of v5e, v5p, v6e, such as "
     "'v5e:2x4'; found ''."),
    ([*_FAST, "--plan=v5e:2x4", "--config.num_steps=0"],
     "num_steps must be an integer of at least 1 and less than 2**31; found 0."),
    ([*_FAST, "runs/w"], "unknown arguments: runs/w; every option starts with --."),
    ([*_FAST, "--workdir=w", "--config.studnet.model.widths=(3,)"],
     "--config.studnet.model.widths: the config has no 'studnet' there (did you mean 'student'?); "
     "it has analysis, baseline, batch_size, checkpoint_every, chunk, data, data_seed, devices, "
     "fsdp, init_seed, init_seeds, log_every, micro_batches, num_steps, phases, plugins, "
     "steps_per_call, student, task, teacher."),
    ([*_FAST, "--workdir=w", "--config.student.optimizer.momentum=1.0"],
     "--config.student.optimizer.momentum: the config has no 'momentum' there; it has "
     "fn, learning_rate."),
    ([*_FAST, "--workdir=w", "--config.phases.distil.split=full"],
     "--config.phases.distil.split: the config has no 'distil' there (did you mean 'distill'?); it "
     "has baseline, distill, teacher."),
    ([*_FAST, "--workdir=w", "--config.batch_size.x=1"],
     "--config.batch_size.x: the config has no 'x' there."),
    ([*_FAST, "--workdir=w", "--config.batch_size=abc"],
     "--config.batch_size=abc: invalid literal for int() with base 10: 'abc'; mend this flag."),
    ([*_FAST, "--workdir=w", "--config.student.optimizer.learning_rate=fast"],
     "--config.student.optimizer.learning_rate=fast: could not convert string to float: 'fast'; "
     "mend this flag."),
    ([*_FAST, "--workdir=w", "--config.student=3"],
     "--config.student=3: Failed to parse '3' as a ConfigDict: `3` is not a dict; mend this "
     "flag."),
    ([*_FAST, "--workdir=w", "--config.data.fn"],
     "Missing value for flag --config.data.fn; mend this flag."),
    ([f"--config={_DIGITS}:divergence=nope", "--workdir=w"],
     "--config: student.terms.distill.divergence.fn: there is no divergence 'nope'; known are "
     f"{named('divergence')}."),
    ([f"--config={_DIGITS}:alhpa=1.", "--workdir=w"],
     "--config: the config's argument has 'alhpa', which is no number of student.terms.distill "
     "(did you mean 'alpha'?); it takes divergence, alpha, beta, temperature, "
     "temperature_power, weight."),
    ([f"--config={_DIGITS}:teacher=runs/digits", "--workdir=w"],
     "--config: the config's argument has 'runs / digits', which is no number, name, function or "
     "quoted text."),
    ([f"--config={_DIGITS}:num_steps='3'", "--workdir=w"],
     "--config: the config's argument has 'num_steps', which is no number of "
     "student.terms.distill; it takes divergence, alpha, beta, temperature, temperature_power, "
     "weight."),
]  # fmt: skip


@pytest.mark.parametrize("argv,message", OF_FLAGS)
def test_a_wrong_flag_is_refused(monkeypatch, argv, message):
    assert refusal(monkeypatch, *argv) == message


def test_a_plan_needs_no_workdir(capsys):
    with flagsaver.flagsaver():
        main.main(main.parse(["main", *_FAST, "--plan=here"]))
    told = capsys.readouterr().out
    for name in ("teacher: teacher", "baseline: baseline", "distill: student", "distill: teacher"):
        assert f"| {name}" in told
    assert "examples a step" in told


OF_FILES = [
    ("def get_config(:\n", ":1 raises SyntaxError (invalid syntax (config.py, line 1))"),
    ("raise RuntimeError('boom')\n", ":1 raises RuntimeError (boom)"),
    ("\nimport no_such_module\n",
     ":2 raises ModuleNotFoundError (No module named 'no_such_module')"),
    ("def get_config():\n    return {'a': 1 / 0}\n",
     ":2 raises ZeroDivisionError (division by zero)"),
    ("def get_config():\n    return made()\n\n\ndef made():\n    return {'a': 1 + 'a'}\n",
     ":6 raises TypeError (unsupported operand type(s) for +: 'int' and 'str')"),
    ("x = 1\n", " raises AttributeError (module 'config_config' has no attribute 'get_config')"),
]  # fmt: skip


@pytest.mark.parametrize("text,reason", OF_FILES)
def test_a_config_file_that_cannot_be_run_is_refused(monkeypatch, tmp_path, text, reason):
    path = tmp_path / "config.py"
    path.write_text(text)
    message = refusal(monkeypatch, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert message == f"--config: {path}{reason}; mend it."


def test_a_config_file_that_makes_no_config_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("def get_config():\n    return 3\n")
    message = refusal(monkeypatch, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert message == f"--config: get_config of {path} must return a ConfigDict."


# --- configs ------------------------------------------------------------------------------------

TERM = "student.terms.distill"
GROUP = "config.student.terms.distill"
OF_CONFIGS = [
    (f"{GROUP}.divergence.fn = 'revers_kl'",
     f"{TERM}.divergence.fn: there is no divergence 'revers_kl' (did you mean 'reverse_kl'?); "
     f"known are {named('divergence')}."),
    (f"{GROUP}.fn = 'on_logit'",
     f"{TERM}.fn: there is no loss 'on_logit' (did you mean 'on_logits'?); known are "
     f"{named('loss')}."),
    (f"{GROUP}.temprature = 2.0",
     f"{TERM}.temprature is unknown (did you mean 'temperature'?); on_logits takes divergence, "
     "temperature, temperature_power."),
    (f"del {GROUP}.weight", f"{TERM}.weight is missing; give the term's factor, such as 1.0."),
    (f"{GROUP}.temperature = 0.0",
     f"{TERM}.temperature must be greater than 0 and finite; found 0.0."),
    (f"{GROUP}.divergence.alpha = float('nan')",
     f"{TERM}.divergence.alpha must be a finite number; found nan."),
    (f"{GROUP}.other = 'tutor'", f"{TERM}.other must be one of teacher; found 'tutor'."),
    (f"{GROUP}.where = 'rare'", f"{TERM}.where must be one of labelled, where; found 'rare'."),
    (f"{GROUP}.fn, config.plugins = 'no_such_package.loss', ('no_such_package',)",
     f"{TERM}.fn: cannot import 'no_such_package': No module named 'no_such_package'."),
    (f"{GROUP}.fn = 'os.system'",
     f"{TERM}.fn: 'os.system' lies outside of abkd_jax; list its package under `plugins`."),
    ("config.student.model.fn = 'mpl'",
     "student.model.fn: there is no model 'mpl' (did you mean 'mlp'?); known are cached, cnn, "
     "decoder, encoder, hugging_face, imagenet_resnet, mlp, mobilenet_v1, mobilenet_v2, resnet, "
     "shufflenet_v1, shufflenet_v2, vgg, wide_resnet."),
    ("config.student.model = dict(fn='given')",
     "student.model is 'given', but networks has no 'student'; pass networks={'student': "
     "(apply_fn, variables)} to train_and_evaluate."),
    ("config.student.optimizer.fn = 'adm'",
     "student.optimizer.fn: there is no optimizer 'adm' (did you mean 'adam'?); known are adam, "
     "adamw, sgd."),
    ("config.num_steps = -1",
     "num_steps must be an integer of at least 1 and less than 2**31; found -1."),
    ("config.num_steps = 0",
     "num_steps must be an integer of at least 1 and less than 2**31; found 0."),
    ("config.batch_size = 0",
     "batch_size must be an integer of at least 1 and less than 2**31; found 0."),
    ("config.log_every = 0",
     "log_every must be an integer of at least 1 and less than 2**31; found 0."),
    ("config.devices = -1",
     "devices must be an integer of at least 0 and less than 2**31; found -1."),
    ("config.data_seed = 2**31",
     "data_seed must be an integer of at least 0 and less than 2**31; found 2147483648."),
    ("config.micro_batches = 3",
     "batch_size must be a multiple of micro_batches, 3; found 128."),
    ("config.devices = 99", "devices must be at most the 8 there are; found 99."),
    ("config.devices = 3",
     "batch_size must be a multiple of the 3 devices; found 128 (set devices to use fewer)."),
    ("config.batch_size = 1001",
     "batch_size must be at most the 1000 examples to train teacher; found 1001."),
    ("config.phases.distill.split = 'al'",
     "phases.distill.split must be one of train, labelled, full; found 'al'."),
    ("del config.phases.teacher",
     "phases.distill sees teacher, which has not learned by then; give it a phase before, or "
     "teacher.weights."),
    ("del config.student",
     "phases.distill.learn must be a list of networks, each once, of teacher, baseline; found "
     "('student',)."),
    ("del config.student, config.teacher, config.baseline",
     "the config has no network, a group with a model; it needs at least one."),
    ("del config.phases",
     "phases must be a group of phases by name, in order, such as "
     "dict(distill=dict(learn=('student',))); found None."),
    ("config.teacher.weights = 'runs/x'",
     "teacher.weights must be a group dict(fn=NAME, ...) that names a set of weights; found "
     "'runs/x'."),
    ("config.teacher.weights = dict(fn='run', workdir='no/run'); del config.phases.teacher",
     "teacher.weights: no/run is no workdir of a run: it has no config.json."),
    ("config.data.labelled = 101",
     "data.labelled must be a multiple of the 10 classes; found 101."),
    ("config.data.labelled = 1000",
     "data.labelled must be at most 920, 92 examples of each class; found 1000."),
    ("config.data.fn = 'digit'",
     "data.fn: there is no data 'digit' (did you mean 'digits'?); known are digits, glue, text, "
     "tfds, topic_lines, topics."),
    ("config.data = dict(fn='tfds', name='fashion_mnits', validation=0)",
     "data.name must be an image-classification set of tensorflow_datasets; found "
     "'fashion_mnits' (did you mean 'fashion_mnist'?)."),
    ("config.data = dict(fn='tfds', name='fashion_mnist', validation=0, data_dir='no/folder')",
     "data.data_dir must be a folder with prepared sets of TFDS; found 'no/folder', which does not "
     "exist: correct it, or set data.download=True to prepare the set there."),
    ("config.data = dict(fn='tfds', name='fashion_mnist', validation=0, data_dir='{tmp}')",
     "data.name must be a set that is prepared in {tmp} (install TensorFlow with pip install "
     "'abkd_jax[prepare]' and set data.download=True to prepare it, or give a data.data_dir or "
     "TFDS_DATA_DIR that has it in ArrayRecord format); found 'fashion_mnist'."),
]  # fmt: skip


@pytest.mark.parametrize("change,message", OF_CONFIGS)
def test_a_wrong_config_is_refused_and_the_workdir_stays_free(
    monkeypatch, tmp_path, change, message
):
    path, workdir = tmp_path / "config.py", tmp_path / "run"
    change, message = (text.replace("{tmp}", str(tmp_path)) for text in (change, message))
    path.write_text(_DIGITS.read_text() + _CHANGED.format(change))
    assert refusal(monkeypatch, f"--config={path}", f"--workdir={workdir}") == message
    assert not (workdir / "config.json").exists()  # so the mended command can have the same one


def test_a_workdir_that_cannot_be_made_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    found = refusal(monkeypatch, *_FAST, f"--workdir={tmp_path / 'file'}")
    assert found == f"workdir {tmp_path / 'file'} cannot be written: File exists."
    below = tmp_path / "file" / "run"  # root may write anywhere else
    found = refusal(monkeypatch, *_FAST, f"--workdir={below}")
    assert found == f"workdir {below} cannot be written: Not a directory."


def test_an_evaluation_without_checkpoints_is_refused(monkeypatch, tmp_path):
    found = refusal(monkeypatch, *_FAST, f"--workdir={tmp_path}", "--evaluate")
    assert found == f"{tmp_path} has no checkpoint to evaluate; train first."
    assert not (tmp_path / "config.json").exists()


# --- in a process of its own --------------------------------------------------------------------


def test_a_missing_flag_is_told_at_once():
    done = run(PYTHONPROFILEIMPORTTIME="1")
    *imports, message = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout
    assert message == OF_FLAGS[0][1]
    imported = {line.rpartition("|")[2].strip() for line in imports}
    assert "jax" in imported
    assert not imported & {"matplotlib", "tensorflow_datasets", "tensorflow", "torch"}


def test_help_lists_every_flag():
    done = run("--help")
    lines = [line.strip() for line in done.stdout.splitlines()]
    for flag in ("--config:", "--workdir:", "--[no]evaluate:", "--[no]profile:", "--plan:"):
        assert [line for line in lines if line.startswith(flag)], flag
    assert not done.stderr


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_by_the_command_line(tmp_path):
    """Trained, with a trace; the same again, which trains nothing; and evaluated alone.

    Then the student alone, by the teacher of that run.
    """
    workdir, second = tmp_path / "run", tmp_path / "second"
    argv = [*_FAST, f"--workdir={workdir}"]
    done = run(*argv, "--profile")
    assert done.returncode == 0, done.stderr
    *accuracies, last = done.stdout.splitlines()
    assert last == f"report: {workdir}/report.md" and pathlib.Path(last[8:]).exists()
    result = json.loads((workdir / "result.json").read_text())
    assert accuracies == [
        f"{name}: accuracy {network['last']['accuracy']:.4f} on the test set"
        for name, network in result["networks"].items()
    ]
    assert list(result["networks"]) == ["teacher", "student", "baseline"]
    assert {row["step"] for row in rows(workdir)} == {5, 10, 15, 20}
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    written = {path: path.read_bytes() for path in workdir.rglob("metrics.jsonl")}
    assert len(written) == 3
    for further in ([], ["--evaluate"]):
        (workdir / "result.json").unlink()
        again = run(*argv, *further)
        assert again.returncode == 0 and again.stdout == done.stdout, again.stderr
        assert json.loads((workdir / "result.json").read_text()) == result
        assert written == {path: path.read_bytes() for path in workdir.rglob("metrics.jsonl")}
    teacher = f"{_FAST[0]},teacher='{workdir}/teacher'"
    done = run(teacher, *_FAST[1:], f"--workdir={second}")
    assert done.returncode == 0, done.stderr
    networks = json.loads((second / "result.json").read_text())["networks"]
    assert networks["teacher"]["last"] == result["networks"]["teacher"]["last"]
    assert networks["student"] == result["networks"]["student"]
    assert not (second / "teacher").exists() and (second / "baseline").exists()
