"""Students too small for their teacher: which of its modes each divergence keeps.

    python -m experiments.toy

Panels (d) to (g) of ABKD's figure 1, on a teacher of our own: the paper's values are not published.
The teacher is a mixture of three bumps over 60 ordered classes with a little mass everywhere. The
student's logits are a polynomial of the class, of degree 4, so that it can have two bumps and not
three. Each divergence trains it by gradient descent on its four coefficients from many starting
points, and of these the student with the lowest value of that divergence is shown.
"""

import functools

import jax
import numpy as np
import optax
from absl import flags
from jax import Array
from jax import numpy as jnp
from matplotlib.figure import Figure

from abkd_jax import alpha_beta, figures, forward_kl, numerics, reverse_kl, total_variation
from abkd_jax.config import command

_OUT = flags.DEFINE_string("out", "experiments/figures/toy.png", "Where the figure goes.")
_CLASSES, _DEGREE = 60, 4
_CENTRES, _WIDTHS, _HEIGHTS = (10, 29, 49), (2.5, 2.5, 2.5), (0.5, 0.3, 0.2)
_BACKGROUND = 0.02  # of the teacher's mass, spread evenly
_POINTS = {
    "(d) forward KL (1, 0)": (1.0, 0.0),
    "(e) reverse KL (0, 1)": (0.0, 1.0),
    "(f) alpha-divergence (0.5, 0.5)": (0.5, 0.5),
    "(g) alpha-beta (0.8, 0.5)": (0.8, 0.5),
}
_STARTS, _STEPS, _RATE = 64, 4000, 0.05


def main() -> None:
    """Trains the students, prints their table, and draws them."""
    teacher = jnp.log(jnp.asarray(teacher_probabilities()))
    alphas, betas = (jnp.asarray(numbers) for numbers in zip(*_POINTS.values(), strict=True))
    logits, values = jax.jit(jax.vmap(functools.partial(trained, teacher)))(alphas, betas)
    best = np.argmin(values, axis=-1)
    print(
        f"teacher: {len(_CENTRES)} modes over {_CLASSES} classes; student: a polynomial of degree "
        f"{_DEGREE}; best of {_STARTS} starts, {_STEPS} steps each"
    )
    print(
        f"{'':34}{'mass of mode, %':>18}{'entropy':>9}{'FKL':>7}{'RKL':>7}{'TV':>7}"
        f"{'own D':>8}{'starts':>8}{'optima':>8}"
    )
    _print_row("teacher", teacher, teacher, "")
    students = {}
    for index, name in enumerate(_POINTS):
        found = np.sort(values[index])
        students[name] = logits[index, best[index]]
        near = int(np.sum(found < found[0] * 1.01))
        optima = 1 + int(np.sum(np.diff(found) > 0.01 * found[0]))
        own = f"{found[0]:>8.3f}{near:>8d}{optima:>8d}"
        _print_row(name, students[name], teacher, own)
    print(
        "mass of mode: within 5 classes of its centre; TV: total variation; starts: how many of "
        f"{_STARTS} ended\nwithin 1 % of the lowest value; optima: how many values there are, more "
        "than 1 % of the lowest apart."
    )
    print(figures.save(draw(np.exp(teacher), students), _OUT.value))


def teacher_probabilities() -> np.ndarray:
    """The mixture, over the classes."""
    x = np.arange(_CLASSES)[:, None]
    bumps = np.exp(-0.5 * np.square((x - np.asarray(_CENTRES)) / np.asarray(_WIDTHS)))
    mixture = bumps / bumps.sum(axis=0) @ np.asarray(_HEIGHTS)
    return (1 - _BACKGROUND) * mixture + _BACKGROUND / _CLASSES


def trained(teacher_logits: Array, alpha: Array, beta: Array) -> tuple[Array, Array]:
    """The logits `[starts, K]` after training from each start, and the divergence there."""
    x = np.linspace(-1, 1, _CLASSES)
    basis = jnp.asarray(np.polynomial.legendre.legvander(x, _DEGREE)[:, 1:])
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    def loss(coefficients):
        return alpha_beta(basis @ coefficients, teacher_logits, alpha=alpha, beta=beta)

    def descend(start):
        def step(_, carry):
            coefficients, state = carry
            updates, state = optimizer.update(jax.grad(loss)(coefficients), state)
            return optax.apply_updates(coefficients, updates), state

        carry = start, optimizer.init(start)
        coefficients, _ = jax.lax.fori_loop(0, _STEPS, step, carry)
        return basis @ coefficients, loss(coefficients)

    return jax.vmap(descend)(3 * jax.random.normal(jax.random.key(0), (_STARTS, _DEGREE)))


def _print_row(name: str, logits: Array, teacher: Array, own: str) -> None:
    cells = "".join(f"{100 * mass:>6.1f}" for mass in modes(jax.nn.softmax(logits)))
    gaps = (fn(logits, teacher) for fn in (forward_kl, reverse_kl, total_variation))
    gaps = "".join(f"{gap:>7.3f}" for gap in gaps)
    print(f"{name:34}{cells}{numerics.entropy(logits):>9.3f}{gaps}{own}")


def modes(probabilities: Array) -> list[float]:
    """The mass around each of the teacher's modes."""
    return [float(jnp.sum(probabilities[centre - 5 : centre + 6])) for centre in _CENTRES]


def draw(teacher: np.ndarray, students: dict[str, Array]) -> Figure:
    """A panel for each student, the teacher behind it."""
    figure = figures.new(6.4)
    panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
    classes = np.arange(_CLASSES)
    for axes, (name, logits) in zip(panels, students.items(), strict=True):
        axes.bar(classes, 100 * teacher, 1.0, color=figures.LIGHT_GREY, label="teacher")
        student = 100 * jax.nn.softmax(logits)
        axes.plot(classes, student, color=figures.COLOURS[0], linewidth=2, label="student")
        below = name in list(students)[2:]
        x, y = "class" if below else None, "probability (%)" if axes in panels[::2] else None
        figures.label(axes, name, x, y)
    panels[0].legend(fontsize=figures.FONT - 1, frameon=False)
    return figure


if __name__ == "__main__":
    command.run(main)
