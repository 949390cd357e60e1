"""One image over training: how the mass of its classes moves under three divergences.

    python -m experiments.mass_over_training

The students of configs/digits.py, distilled without labels by forward KL, reverse KL and the
config's own point of the alpha-beta-divergence, ten init seeds each, as one program. The image is
of the validation set, on which no network is trained: of those to which the teacher gives three
classes at most (95 % of the mass), the one whose second class has the most.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax import Array
from jax import numpy as jnp
from matplotlib.figure import Figure

from abkd_jax import data, figures, schema, train
from abkd_jax import flags as config_flags

_DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "digits.py"
_CONFIG = config_flags.define_config(str(_DEFAULT))
_OUT = flags.DEFINE_string(
    "out", "experiments/figures/mass_over_training.png", "Where the figure goes."
)
_SEEDS = flags.DEFINE_integer("seeds", 10, "How many init seeds.", lower_bound=2)
_VISIBLE = 0.02  # of the teacher's mass, for a class to be shown


def main(argv: list[str]) -> None:
    """Trains teacher and students, prints the table, and draws the masses over the steps."""
    del argv
    logging.set_verbosity(logging.ERROR)
    config = _CONFIG.value.to_dict()
    dataset = data.from_config(config["data"], data_seed=config["data_seed"])
    inputs, labels = dataset.validation.inputs, dataset.validation.labels
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731

    terms = stack([_terms(config, "teacher", config["teacher"], ["teacher"])])
    seeds = jnp.asarray([config["init_seed"]])
    states, _ = trained(config, "teacher", terms, seeds, {}, dataset.teacher, inputs[:1])
    teacher = train.frozen(jax.tree.map(lambda x: x[0], states))
    taught = jax.nn.softmax(teacher.forward(teacher.params, inputs, train=False)[0].logits)
    falling = -jnp.sort(-taught, axis=-1)
    image = int(jnp.argmax(jnp.where(falling[:, :3].sum(axis=-1) > 0.95, falling[:, 1], 0.0)))

    named = _groups(config)
    pairs = ["student", "teacher"]
    terms = [_terms(config, "student", group, pairs) for group in named.values()]
    terms = stack([one for one in terms for _ in range(_SEEDS.value)])
    seeds = jnp.tile(config["init_seed"] + jnp.arange(_SEEDS.value), len(named))
    others = {"teacher": teacher}
    shown = inputs[image : image + 1]
    _, masses = trained(config, "student", terms, seeds, others, dataset.train, shown)
    masses = np.asarray(masses).reshape(-1, len(named), _SEEDS.value, dataset.num_classes)
    masses = dict(zip(named, np.moveaxis(masses, 1, 0), strict=True))  # [steps, seeds, K] each

    print(f"validation image {image}, label {labels[image]}; {config['num_steps']} steps")
    _print_table(np.asarray(taught[image]), masses)
    out = pathlib.Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures.save(draw(np.asarray(taught[image]), masses), out)
    print(out)


def _groups(config: Mapping[str, Any]) -> dict[str, Any]:
    """The student's group at three points of the alpha-beta-divergence."""
    own = config["student"]["terms"]["distill"]
    alpha, beta = own["divergence"]["alpha"], own["divergence"]["beta"]
    points = {
        "forward KL (1, 0)": (1.0, 0.0),
        "reverse KL (0, 1)": (0.0, 1.0),
        f"alpha-beta ({alpha:g}, {beta:g})": (alpha, beta),
    }
    groups = {}
    for name, (a, b) in points.items():
        distill = own | {"divergence": {"fn": "alpha_beta", "alpha": a, "beta": b}}
        groups[name] = config["student"] | {"terms": {"distill": distill}}
    return groups


def _terms(config: Mapping[str, Any], learner: str, group: Mapping[str, Any], present: list) -> Any:
    config = {**config, learner: group}
    return schema.objectives(config, learners=[learner], present=present)[learner]


def trained(
    config: Mapping[str, Any],
    learner: str,
    terms: Any,
    seeds: Array,
    others: Mapping[str, train.TrainState],
    split: data.Split,
    image: Array,
) -> tuple[train.TrainState, Array]:
    """Networks with stacked terms and seeds: their states, and the image's q before each step."""
    built = schema.network(config, learner, num_classes=10)
    create = functools.partial(
        train.create, built.module, split.inputs[:1], optimizer=built.optimizer
    )
    size, seed = config["batch_size"], config["data_seed"]

    @jax.jit
    def run(states, terms, split, others):
        def step(states, index):
            order = data.epoch_order(seed, index // (len(split) // size), len(split))
            batch = data.batch_at(split, order, seed, index, size)

            def member(state, objective):
                outputs, _ = state.forward(state.params, image, train=False)
                networks = {learner: state, **others}
                networks, _ = train.train_step(networks, batch, {learner: objective})
                return networks[learner], jax.nn.softmax(outputs.logits[0])

            return jax.vmap(member)(states, terms)

        return jax.lax.scan(step, states, jnp.arange(config["num_steps"]))

    states = jax.vmap(lambda init_seed: create(init_seed=init_seed))(seeds)
    return run(states, terms, split, others)


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
    return [int(k) for k in np.argsort(-teacher) if teacher[k] >= _VISIBLE]


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
    parse = functools.partial(config_flags.parse, known=("config", "out", "seeds"))
    app.run(main, flags_parser=parse)
