"""One image over training: how the mass of its classes moves under three divergences.

    python -m experiments.mass_over_training

The students of configs/digits.py, distilled without labels by forward KL, reverse KL and the
config's own point of the alpha-beta-divergence, ten init seeds each, as one program. The image is
of the validation set, on which no network is trained: of those to which the teacher gives three
classes at most (95 % of the mass), the one whose second class has the most.
"""

import tempfile
from collections.abc import Mapping

import jax
import numpy as np
from absl import flags
from jax import Array
from jax import numpy as jnp
from matplotlib.figure import Figure

from abkd_jax import data, eval_outputs, figures
from abkd_jax.config import command
from abkd_jax.sweep import Program, opened
from abkd_jax.train import run_steps

_CONFIG = command.define_config("configs/digits.py")
_OUT = flags.DEFINE_string(
    "out", "experiments/figures/mass_over_training.png", "Where the figure goes."
)
_SEEDS = flags.DEFINE_integer("seeds", 10, "How many init seeds.", lower_bound=2)
_NUMBERS = tuple(f"student.terms.distill.divergence.{name}" for name in ("alpha", "beta"))
_VISIBLE = 0.02  # of the teacher's mass, for a class to be shown


def main() -> None:
    """Trains teacher and students, prints the table, and draws the masses over the steps."""
    config = _CONFIG.value
    own = config.student.terms.distill.divergence
    points = {
        "forward KL (1, 0)": (1.0, 0.0),
        "reverse KL (0, 1)": (0.0, 1.0),
        f"alpha-beta ({own.alpha:g}, {own.beta:g})": (own.alpha, own.beta),
    }
    with tempfile.TemporaryDirectory() as folder:
        values = (list(dict.fromkeys(numbers)) for numbers in zip(*points.values(), strict=True))
        over = dict(zip(_NUMBERS, values, strict=True))
        with opened(config, folder, over=over, init_seeds=_SEEDS.value) as program:
            validation = program.run.data.validation
            inputs = data.normalized(validation.inputs, program.run.data.preprocess)
            taught = jax.nn.softmax(
                eval_outputs(program.frozen, {"inputs": inputs})["teacher"].logits
            )
            falling = -jnp.sort(-taught, axis=-1)
            unsure = jnp.where(falling[:, :3].sum(axis=-1) > 0.95, falling[:, 1], 0.0)
            image = int(jnp.argmax(unsure))
            masses = seen(program, list(points.values()), inputs[image : image + 1])
    masses = dict(zip(points, np.moveaxis(masses, 1, 0), strict=True))  # [steps, seeds, K] each

    print(f"validation image {image}, label {validation.labels[image]}; {config.num_steps} steps")
    _print_table(np.asarray(taught[image]), masses)
    print(figures.save(draw(np.asarray(taught[image]), masses), _OUT.value))


def seen(program: Program, points: list[tuple[float, float]], image: Array) -> np.ndarray:
    """The students' probabilities for the image before each step, `[steps, points, seeds, K]`."""
    members = [tuple(member[path] for path in _NUMBERS) for member in program.members.points]
    chosen = [i for point in points for i, member in enumerate(members) if member == point]
    carry, objectives = program.stacked(chosen)
    of_member = lambda state: eval_outputs({"it": state}, {"inputs": image})["it"].logits[0]  # noqa: E731
    of_all = jax.jit(jax.vmap(lambda state: jax.nn.softmax(of_member(state))))
    masses = [of_all(carry.learners["student"])]

    def look(carry, step):
        masses.append(of_all(carry.learners["student"]))
        return carry

    config, feed = program.run.plan.config, program.feed
    args = program.programs, carry, program.frozen, objectives, feed
    run_steps(*args, data_seed=config["data_seed"], end=program.phase.num_steps, after=look)
    return np.asarray(masses[:-1]).reshape(-1, len(points), _SEEDS.value, masses[0].shape[-1])


def _print_table(teacher: np.ndarray, masses: Mapping[str, np.ndarray]) -> None:
    """The mass of each visible class at a few steps."""
    classes = _visible(teacher)
    heads = [f"class {k}, %" for k in classes] + ["TV, %"]
    print(f"{'':26}{'step':>6}{''.join(f'{head:>16}' for head in heads)}")
    print(f"{'teacher':32}{''.join(f'{100 * teacher[k]:>16.1f}' for k in classes)}")
    for name, mass in masses.items():
        steps = [step for step in (10, 30, 100, 300, 1000) if step < len(mass)]
        for step in [*steps, len(mass) - 1]:
            values = [100 * mass[step, :, k] for k in classes] + [100 * apart(mass[step], teacher)]
            cells = (f"{x.mean():.1f} +- {x.std(ddof=1):.1f}" for x in values)
            print(f"{name:26}{step:>6}{''.join(f'{cell:>16}' for cell in cells)}")
    print(f"mean +- standard deviation of {_SEEDS.value} init seeds; TV: total variation")


def apart(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The total variation, `[..., K]` and `[K]` -> `[...]`."""
    return 0.5 * np.abs(q - p).sum(axis=-1)


def _visible(teacher: np.ndarray) -> list[int]:
    """The classes to show, the likeliest first."""
    visible = [int(k) for k in np.argsort(-teacher) if teacher[k] >= _VISIBLE]
    return visible[: len(figures.COLOURS)]


def draw(teacher: np.ndarray, masses: Mapping[str, np.ndarray]) -> Figure:
    """A panel for each divergence, and one for the distance from the teacher."""
    panels = []
    for name, mass in masses.items():
        panels.append({"title": name, "x": "step", "y": "mass (%)", "log_x": True, "curves": {}})
        for k in _visible(teacher):
            panels[-1]["curves"][f"class {k}"] = _band(100 * mass[:, :, k])
    distances = {name: _band(100 * apart(mass, teacher)) for name, mass in masses.items()}
    panels.append({"title": "distance from the teacher", "x": "step", "log_x": True})
    panels[-1] |= {"y": "total variation (%)", "curves": distances}
    figure = figures.lines(panels, height=3.4)
    for axes in figure.axes[: len(masses)]:
        for index, k in enumerate(_visible(teacher)):
            axes.axhline(100 * teacher[k], color=figures.COLOURS[index], linestyle="--")
        axes.set_ylim(0, 100)
    return figure


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some of the steps, mean and deviation there of `[steps, seeds]`."""
    steps = np.unique(np.geomspace(1, len(values) - 1, 60).round().astype(int))
    return steps, values[steps].mean(axis=1), values[steps].std(axis=1, ddof=1)


if __name__ == "__main__":
    command.run(main)
