"""Maps over the (alpha, beta) plane: where a step moves mass, how tight the bound is, the noise.

    python -m experiments.maps
    python -m experiments.maps --temperature=4 --out=runs/maps_at_4.png
    python -m experiments.maps --num_steps=50 --workdir=runs/barely_trained --out=runs/barely.png

The teacher and the student of configs/digits.py after 150 steps each, so that the student has
errors left to mend; no label is read. For each of 15 x 15 points, over the validation images: what
one step of alpha_beta on the logits moves and where to, and |LogR| over the bound of Proposition
4.2. Over batches of training images: the signal-to-noise ratio of the parameters' gradient.
"""

import functools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import Array
from jax import numpy as jnp

from abkd_jax import Divergence, alpha_beta, analysis, bind, data, figures, load, train_and_evaluate
from abkd_jax import config as configs
from abkd_jax.config import command, schema

_CONFIG = command.define_config("configs/digits.py")
_OUT = flags.DEFINE_string("out", "experiments/figures/maps.png", "Where the figure goes.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Of a run to make or take up; None: not kept.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of both networks.", lower_bound=0.01)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 150, "Of each network.", lower_bound=1)
_AXIS = np.round(np.linspace(-0.2, 1.2, 15), 10)
_RATE, _BATCH, _EPOCHS = 0.1, 40, 8
_SHOWN = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.8, 0.5), (1.0, 1.0), (0.0, 0.0))

_TITLES = {  # and the units of the colours
    "moved": ("mass that one step moves", "% of the mass"),
    "to the likeliest": ("of it, to the teacher's likeliest", "% of the moved mass"),
    "to other under": ("to other underestimated ones", "% of the moved mass"),
    "to over": ("to overestimated classes", "% of the moved mass"),
    "tight, likeliest": ("|LogR| / bound, likeliest class", "median over images"),
    "signal to noise": ("signal to noise of gradients", "|G|^2 / variance"),
}


def main() -> None:
    """Trains, prints the table of some points, and draws the maps."""
    config = schema.needed(schema.plain(_CONFIG.value))
    config["num_steps"] = config["checkpoint_every"] = _NUM_STEPS.value
    with tempfile.TemporaryDirectory() as temporary:
        workdir = pathlib.Path(_WORKDIR.value or temporary)
        results = train_and_evaluate(config, workdir)["networks"]
        student, teacher = load(workdir), load(workdir / "teacher")
    dataset = configs.resolve(config).data()
    for name, count in (("teacher", len(dataset.full)), ("student", len(dataset.train))):
        accuracy = 100 * results[name]["last"]["accuracy"]
        print(
            f"{name}: {config['num_steps']} steps, {count} images, test accuracy {accuracy:.1f} %"
        )
    grid = [(a, b) for b in _AXIS for a in _AXIS]
    alphas, betas = jnp.asarray(grid).T
    images = dataset.validation.inputs
    logits = (network(images).logits / _TEMPERATURE.value for network in (student, teacher))
    maps = of_logits(*logits, alphas, betas)
    maps["signal to noise"] = signal_to_noise(student, teacher, dataset.train, alphas, betas)
    _print_table(maps, grid, len(images))
    print(figures.save(draw(maps), _OUT.value))


def of_logits(student: Array, teacher: Array, alphas: Array, betas: Array) -> dict[str, np.ndarray]:
    """The maps `[G]` that need no more than cached logits."""
    step = bind(gains, divergence=bind(alpha_beta, alpha=alphas, beta=betas), learning_rate=_RATE)
    found = {n: s.mean for n, s in analysis.over_grid(step, student, teacher, chunk=64).items()}
    tight = jax.vmap(functools.partial(_median_tightness, student, teacher))
    shares = {name: 100 * found[name] / found["moved"] for name in found if name != "moved"}
    maps = {"moved": 100 * found["moved"], **shares, **jax.jit(tight)(alphas, betas)}
    return {name: np.asarray(values) for name, values in maps.items()}


def gains(
    student_logits: Array,
    teacher_logits: Array,
    *,
    divergence: Divergence,
    learning_rate: float | Array,
) -> dict[str, Array]:
    """The mass that one step moves, and what of it each kind of class gains."""
    step = analysis.log_mass_ratio(
        student_logits, teacher_logits, divergence=divergence, learning_rate=learning_rate
    )
    gained = jnp.maximum(analysis.mass_change(student_logits, step.log_ratio), 0.0)
    classes = teacher_logits.shape[-1]
    of_target = analysis.target_and_rest(jnp.argmax(teacher_logits, axis=-1), classes)
    under = analysis.over_and_underestimated(student_logits, teacher_logits)["underestimated"]
    groups = {
        "to the likeliest": of_target["target"] & under,
        "to other under": of_target["rest"] & under,
        "to over": ~under,
    }
    return {"moved": jnp.sum(gained, axis=-1)} | analysis.mass_flow(gained, groups)


def _median_tightness(
    student: Array, teacher: Array, alpha: Array, beta: Array
) -> dict[str, Array]:
    bound = analysis.upper_bound(student, teacher, alpha=alpha, beta=beta, learning_rate=_RATE)
    tight = analysis.tightness(bound.log_ratio, bound.total)
    likeliest = jnp.argmax(teacher, axis=-1, keepdims=True)
    own = jnp.take_along_axis(tight, likeliest, axis=-1)
    return {"tight": jnp.median(tight), "tight, likeliest": jnp.median(own)}


def signal_to_noise(
    student: Any, teacher: Any, split: data.Split, alphas: Array, betas: Array
) -> np.ndarray:
    """|G|^2 over the variance of a batch's gradient in the student's parameters, `[G]`.

    Both are means over several orders of the images: one alone is a third off.
    """
    orders = jax.vmap(lambda epoch: data.epoch_order(0, epoch, len(split)))(jnp.arange(_EPOCHS))
    chosen = orders[:, : len(split) // _BATCH * _BATCH].reshape(_EPOCHS, -1, _BATCH)
    taught = teacher(split.inputs).logits / _TEMPERATURE.value
    fixed = {name: part for name, part in student.variables.items() if name != "params"}

    def noise(point):
        def loss(params, x, t):
            logits = student.module.apply({"params": params, **fixed}, x, train=False).logits
            logits /= _TEMPERATURE.value
            return jnp.mean(alpha_beta(logits, t, alpha=point[0], beta=point[1]))

        def of_epoch(batches):
            slope = lambda rows: jax.grad(loss)(  # noqa: E731
                student.variables["params"], split.inputs[rows], taught[rows]
            )
            return analysis.gradient_noise(jax.vmap(slope)(batches))

        found = jax.tree.map(jnp.mean, jax.vmap(of_epoch)(chosen))
        return jnp.maximum(found.squared_norm, 0.0) / found.variance

    return np.asarray(jax.jit(lambda points: jax.lax.map(noise, points))((alphas, betas)))


def _print_table(maps: Mapping[str, np.ndarray], points: list, count: int) -> None:
    numbers = f"temperature {_TEMPERATURE.value:g}, eta {_RATE:g}"
    print(f"{count} validation images, {numbers}; batches of {_BATCH} for the signal to noise")
    names = {name: name if "%" not in _TITLES[name][1] else f"{name} %" for name in _TITLES}
    names["tight"] = "tight, all"
    heads = "".join(f"{head:>19}" for head in names.values())
    print(f"{'(alpha, beta)':14}{heads}")
    for point in _SHOWN:
        row = points.index(point)
        cells = "".join(f"{maps[name][row]:>19.3g}" for name in names)
        print(f"{f'({point[0]:g}, {point[1]:g})':14}{cells}")
    print("moved: the mean over images of the mass that changes class; then where it arrives, in %")
    print("of it: the teacher's likeliest class, others that are underestimated, overestimated")
    print("tight: the median of |LogR| over its bound, of that likeliest class, and of all classes")


def draw(maps: Mapping[str, np.ndarray]) -> Any:
    """Six maps, of `[G]` each."""
    shape, panels = (len(_AXIS), len(_AXIS)), []
    for name, (title, label) in _TITLES.items():
        log = name in ("moved", "signal to noise")
        values = maps[name].reshape(shape)
        panels.append({"title": title, "label": label, "values": values, "log": log})
    return figures.heat_maps(panels, _AXIS, _AXIS, height=3.2)


if __name__ == "__main__":
    command.run(main)
