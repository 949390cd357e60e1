"""The two effects of ABKD as curves, and one gradient step in which they show.

    python -m experiments.reassignment

The curves are panels (b) and (c) of the paper's figure 1: how much an error of the student counts,
|p^alpha - q^alpha| / alpha, and how much a class counts by the student's own mass, q^beta. Below,
one step on the logits of a student over six classes, of which A to C lack 15 points of mass each
and D to F have 15 too many: they differ in the student's mass q alone. Each divergence takes the
step that moves 2 % of the mass, so the bars say where to, and not how far.
"""

import numpy as np
from absl import flags
from jax import numpy as jnp
from matplotlib.figure import Figure
from scipy import optimize

from abkd_jax import Bound, alpha_beta, analysis, bind, figures
from abkd_jax.config import command

_OUT = flags.DEFINE_string("out", "experiments/figures/reassignment.png", "Where the figure goes.")
_CLASSES = ("A", "B", "C", "D", "E", "F")
_TEACHER = np.asarray([0.40, 0.25, 0.16, 0.14, 0.04, 0.01])
_STUDENT = np.asarray([0.25, 0.10, 0.01, 0.29, 0.19, 0.16])
_POINTS = {
    "forward KL (1, 0)": (1.0, 0.0),
    "reverse KL (0, 1)": (0.0, 1.0),
    "Hellinger (0.5, 0.5)": (0.5, 0.5),
    "ABKD (0.8, 0.3)": (0.8, 0.3),
}
_MOVED = 0.02


def main() -> None:
    """Prints the step of each divergence, and draws the figure."""
    print(f"one step that moves {100 * _MOVED:g} % of the mass; log mass ratio by class, in 1/1000")
    cells = "".join(f"{name:>8}" for name in _CLASSES)
    print(f"{'':22}{'eta':>7}{cells}{'N':>8}")
    for name, values in (("teacher p", _TEACHER), ("student q", _STUDENT)):
        print(f"{name:29}{''.join(f'{value:>8.2f}' for value in values)}")
    ratios, changes = {}, {}
    for name, (alpha, beta) in _POINTS.items():
        rate, step, change = moving(bind(alpha_beta, alpha=alpha, beta=beta), _MOVED)
        ratios[name], changes[name] = 1e3 * step.log_ratio, 100 * change
        cells = "".join(f"{value:>8.0f}" for value in ratios[name])
        print(f"{name:22}{rate:>7.3f}{cells}{1e3 * float(step.normaliser):>8.1f}")
    print(figures.save(draw(ratios, changes), _OUT.value))


def moving(divergence: Bound, mass: float) -> tuple[float, analysis.Reassignment, np.ndarray]:
    """The learning rate at which one step moves so much mass, the step, and the change of q."""

    def stepped(rate):
        step = analysis.log_mass_ratio(
            jnp.log(_STUDENT), jnp.log(_TEACHER), divergence=divergence, learning_rate=rate
        )
        return step, analysis.mass_change(jnp.log(_STUDENT), step.log_ratio)

    rate = optimize.brentq(lambda r: float(analysis.moved_mass(stepped(r)[1])) - mass, 0.0, 10.0)
    step, change = stepped(rate)
    return rate, step, np.asarray(change)


def draw(ratios: dict[str, np.ndarray], changes: dict[str, np.ndarray]) -> Figure:
    """Curves above, the worked example below."""
    figure = figures.new(10.4)
    places = figure.subplot_mosaic("bc;tt;rr;mm", height_ratios=(1.3, 0.8, 1, 1))
    x = np.geomspace(1e-3, 0.999, 400)
    logits = np.log(np.stack([x, 1 - x], axis=-1))  # two classes, of which the first is shown
    fixed = jnp.log(jnp.asarray([0.1, 0.9]))
    hardness = lambda a: analysis.hardness_weight(fixed, jnp.asarray(logits), alpha=a)[:, 0]  # noqa: E731
    confidence = lambda b: analysis.confidence_weight(jnp.asarray(logits), beta=b)[:, 0]  # noqa: E731
    panel = {"title": "(b) hardness weight, at q = 0.1", "x": "teacher's probability p"}
    panel |= {"y": "|p^alpha - q^alpha| / alpha", "log_x": True}
    panel["curves"] = {f"alpha = {a:g}": (x, hardness(a)) for a in (0.0, 0.25, 0.5, 0.8, 1.0)}
    figures.curves(places["b"], panel)
    panel = {"title": "(c) confidence weight", "x": "student's probability q", "y": "q^beta"}
    panel |= {"log_x": True}
    panel["curves"] = {f"beta = {b:g}": (x, confidence(b)) for b in (0.0, 0.25, 0.5, 1.0)}
    figures.curves(places["c"], panel)
    style = dict(fontsize=figures.FONT - 1, frameon=False)
    places["c"].legend(loc="upper left", bbox_to_anchor=(0.0, 0.95), **style)
    given = {"teacher p": 100 * _TEACHER, "student q": 100 * _STUDENT}
    figures.bars(places["t"], _CLASSES, given, colours=(figures.GREY, figures.LIGHT_GREY))
    figures.label(places["t"], "six classes, each off by 15 points", None, "mass (%)")
    figures.bars(places["r"], _CLASSES, ratios)
    title = f"log mass ratio of one step that moves {100 * _MOVED:g} % of the mass"
    figures.label(places["r"], title, None, "LogR (1/1000)")
    figures.bars(places["m"], _CLASSES, changes)
    figures.label(places["m"], "change of mass by the same step", None, "mass (points)")
    for name in "rm":
        places[name].axhline(0, color="black", linewidth=0.8)
    places["t"].legend(**style)
    places["r"].legend(ncols=2, **style)
    return figure


if __name__ == "__main__":
    command.run(main)
