"""What a step of a large decoder needs on each chip of a TPU slice, by the TPU's own compiler.

    python -m experiments.scaling
    python -m experiments.scaling --topologies=v5e:16x16 --teachers=llama_1b
    python -m experiments.scaling --compiler_options=xla_tpu_enable_async_collective_fusion=false

Nothing runs, and no TPU is needed: libtpu (the extra `[tpu]`) compiles a training step of abstract
shapes, networks and optimiser split over all chips (`fsdp`). A row takes minutes. Of collectives it
tells how many are overlapped: the chip computes beside them.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU that is there is left alone

import itertools

import ml_collections
import numpy as np
from absl import flags

from abkd_jax import config as configs
from abkd_jax import costs, data, markdown
from abkd_jax.config import command
from abkd_jax.run.needs import compiled_step
from abkd_jax.types import Tokens

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:8x8"], "Of libtpu: v5e:8x8, v5e:16x16, ...")
_STUDENTS = flags.DEFINE_list("students", ["llama_7b"], "Of llama_1b and llama_7b.")
_TEACHERS = flags.DEFINE_list("teachers", ["none"], "Likewise; none learns from labels alone.")
_TOKENS = flags.DEFINE_list("tokens", ["8192"], "A step's, on each chip.")
_CLASSES = flags.DEFINE_list("classes", ["32000"], "Of the vocabulary.")
_CHUNK = flags.DEFINE_integer("chunk", 1024, "Tokens whose logits are there at a time.")
_SINGLE_PASS = flags.DEFINE_bool("single_pass", False, "Whether the divergence is.")
_OPTIONS = flags.DEFINE_list("compiler_options", [], "NAME=VALUE of the TPU's compiler.")

_LENGTH = 2048
_MEMORY = 16e9  # bytes of a v5e
_NETWORKS = dict(
    llama_1b=dict(width=2048, layers=22, heads=32, key_value_heads=4, mlp_width=5632),
    llama_7b=dict(width=4096, layers=32, heads=32, mlp_width=11_008),
)


def main() -> None:
    """Prints the table."""
    columns = ["parameters, optimiser, GB", "temporaries, GB", "memory", "TFLOP", "traffic, GB"]
    header = ["student", "teacher", "chips", "tokens a chip", "vocabulary", *columns, "loops"]
    print(markdown.table([*header, "collectives (overlapped)", "compiled in s"], []))
    names = _TOPOLOGIES.value, _STUDENTS.value, _TEACHERS.value
    numbers = map(int, _TOKENS.value), map(int, _CLASSES.value)
    for topology, student, teacher, tokens, classes in itertools.product(*names, *numbers):
        mesh = costs.tpu_mesh(topology)
        cells = [student, teacher, f"{topology}, {mesh.size}", f"{tokens}", f"{classes}"]
        try:
            found = _compiled(student, teacher, mesh, tokens, classes)
        except Exception as error:  # the others are still to come
            cells += [" ".join(f"{error}".split())[:200], *[""] * 7]
        else:
            share = f"{100 * found.memory / _MEMORY:.0f} % of 16 GB"
            sizes = f"{found.arguments / 1e9:.2f}", f"{found.temporaries / 1e9:.2f}"
            work = f"{found.flops / 1e12:.1f}", f"{found.traffic / 1e9:.0f}", f"{found.loops}"
            cells += [*sizes, share, *work, _exchanges(found), f"{found.seconds:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def _compiled(student, teacher, mesh, tokens, classes) -> costs.Costs:
    """A step of the student, which learns from a teacher or from labels."""
    rows = mesh.size * tokens // _LENGTH
    numbers = np.zeros((rows, _LENGTH), np.int32)
    examples = Tokens(numbers, numbers, numbers + 1), numbers
    text = data.from_arrays(train=examples, validation=None, test=examples, num_classes=classes)
    config = _config(student, teacher) | dict(batch_size=rows, fsdp=mesh.size, chunk=_CHUNK.value)
    plan = configs.resolve(config, data=text)
    options = dict(option.split("=", 1) for option in _OPTIONS.value)
    chips = plan.mesh([*mesh.devices.flat])
    return compiled_step(plan, plan.phases[-1], chips, compiler_options=options)


def _exchanges(found: costs.Costs) -> str:
    """Of each kind how many, and how many of them are overlapped."""
    overlapped = found.overlapped
    told = [f"{n} {kind} ({overlapped.get(kind, 0)})" for kind, n in found.collectives.items()]
    return ", ".join(told) or "-"


def _config(student: str, teacher: str) -> ml_collections.ConfigDict:
    """The student in bfloat16 with float32 parameters and AdamW; the teacher all in bfloat16."""
    of = lambda name, **fields: dict(fn="decoder", tied=False, **_NETWORKS[name], **fields)  # noqa: E731
    optimizer = dict(fn="adamw", learning_rate=1e-4, weight_decay=0.1)
    model = of(student, dtype="bfloat16", remat=True)
    divergence = dict(fn="alpha_beta", alpha=0.2, beta=0.7)
    if _SINGLE_PASS.value:
        divergence = dict(fn="single_pass", divergence=divergence)
    term = dict(fn="cross_entropy", weight=1.0)
    config = dict(task=dict(fn="language"), phases=dict(learn=dict(learn=("student",))))
    if teacher != "none":
        term = dict(fn="on_logits", weight=1.0, divergence=divergence)
        frozen = of(teacher, dtype="bfloat16", param_dtype="bfloat16")
        config["teacher"] = dict(model=frozen, weights=dict(fn="run", workdir="teacher"))
        config["phases"] = dict(learn=dict(learn=("student",), see=("teacher",)))
    return config | dict(student=dict(model=model, optimizer=optimizer, terms=dict(learn=term)))


if __name__ == "__main__":
    command.run(main)
