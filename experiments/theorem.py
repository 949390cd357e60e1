"""ABKD's Theorem 3.2 on random pairs of teacher and student: what holds, how often, and when not.

    python -m experiments.theorem

The paper states it informally: in one gradient step (1) forward KL allocates mass across all
classes equally, (2) reverse KL prefers to raise those underestimated classes (p > q) that have a
larger q, and (3) to lower those overestimated ones that have a smaller q. Our formalisation
compares two classes i and j of the same row by their log mass ratios LogR of one step of gradient
descent on the logits, q_i > q_j, and says in what they agree:

    equal gap    p_i - q_i = p_j - q_j
    equal ratio  p_i / q_i = p_j / q_j

The student is a softmax of normal logits, of a standard deviation (sharpness) drawn from four; the
two classes' gap or ratio is drawn, and the teacher's other classes share the rest at random. The
step is a step on the logits alone, in float64.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax import Array
from jax import numpy as jnp
from matplotlib.figure import Figure
from scipy import stats

from abkd_jax import alpha_beta, analysis, bind, figures
from abkd_jax.config import command

_OUT = flags.DEFINE_string("out", "experiments/figures/theorem.png", "Where the figure goes.")
_PAIRS = flags.DEFINE_integer("pairs", 20_000, "Pairs for each K and kind.", lower_bound=1000)
_CLASSES = (3, 10, 100)
_SHARPNESSES = (0.5, 1.0, 2.0, 4.0)
_RATES = tuple(float(rate) for rate in np.geomspace(0.01, 100, 9))
_POINTS = {
    "forward KL": (1.0, 0.0),
    "reverse KL": (0.0, 1.0),
    "Hellinger (.5, .5)": (0.5, 0.5),
    "ABKD (.8, .3)": (0.8, 0.3),
}
_KINDS = ("equal gap", "equal ratio")


class Pairs(NamedTuple):
    """Rows of probabilities, of which the classes 0 and 1 are compared, q_0 > q_1."""

    teacher: np.ndarray
    student: np.ndarray
    sharpness: np.ndarray
    under: np.ndarray


def main() -> None:
    """Prints the tables, and draws the figure."""
    jax.config.update("jax_enable_x64", True)
    drawn = {(kind, k): draw_pairs(k, kind) for kind in _KINDS for k in _CLASSES}
    total = sum(len(pairs.student) for pairs in drawn.values())
    print(f"{total:,} random pairs, half under-, half overestimated; one step on the logits")
    _print_comparisons(drawn)
    regimes = _regimes(drawn)
    _print_regimes(regimes)
    _print_signs({k: drawn["equal gap", k] for k in _CLASSES})
    print(figures.save(draw(drawn, regimes), _OUT.value))


def draw_pairs(classes: int, kind: str) -> Pairs:
    """Students, and teachers that agree with them as `kind` says on the classes 0 and 1."""
    rng, count = np.random.default_rng(classes), _PAIRS.value
    sharpness = rng.choice(_SHARPNESSES, (count, 1))
    student = _normalised(np.exp(sharpness * rng.normal(size=(count, classes))))
    student[:, :2] = -np.sort(-student[:, :2], axis=1)
    of_two, rest = student[:, :2], student[:, 2:].sum(axis=1, keepdims=True)
    under = np.arange(count)[:, None] % 2 == 0
    share = rng.uniform(0.01, 0.99, (count, 1))
    if kind == "equal gap":
        gap = np.where(under, share * rest / 2, -share * of_two.min(axis=1, keepdims=True))
        taught = of_two + gap
    else:
        most = 1 / of_two.sum(axis=1, keepdims=True)
        taught = of_two * np.where(under, most**share, np.exp(-5 * share))
    others = _normalised(np.exp(sharpness * rng.normal(size=(count, classes - 2))))
    others *= 1 - taught.sum(axis=1, keepdims=True)
    return Pairs(np.concatenate([taught, others], axis=1), student, sharpness[:, 0], under[:, 0])


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / x.sum(axis=1, keepdims=True)


def step(pairs: Pairs, name: str, rate: float) -> analysis.Reassignment:
    """One step of gradient descent on the students' logits."""
    alpha, beta = _POINTS[name]
    how = dict(divergence=bind(alpha_beta, alpha=alpha, beta=beta), learning_rate=rate)
    return analysis.log_mass_ratio(jnp.log(pairs.student), jnp.log(pairs.teacher), **how)


def difference(pairs: Pairs, name: str) -> Array:
    """(LogR_0 - LogR_1) / eta, the same at every eta: the normaliser cancels."""
    target = step(pairs, name, 1.0).target
    return target[:, 0] - target[:, 1]


def _print_comparisons(drawn: dict[tuple[str, int], Pairs]) -> None:
    """How often the class with the larger q has the larger LogR, of each kind and divergence."""
    print("\nthe class with the larger q has the larger LogR, % of pairs (the same at every eta);")
    print("'=': all differences are below 1e-12")
    columns = [(side, k) for side in ("under", "over") for k in _CLASSES]
    _line("", [f"{side} K={k}" for side, k in columns])
    for kind, name in itertools.product(_KINDS, _POINTS):
        cells = [_share(drawn[kind, k], name, side == "under") for side, k in columns]
        _line(f"{kind:14}{name}", cells)


def _share(pairs: Pairs, name: str, under: bool) -> str:
    found = difference(pairs, name)[pairs.under == under]
    same = bool(jnp.max(jnp.abs(found)) < 1e-12)
    return "=" if same else f"{100 * float(jnp.mean(found > 0)):.2f}"


def _regimes(drawn: dict[tuple[str, int], Pairs]) -> dict[str, list[float]]:
    """Where statement 3 holds at an equal ratio, % of pairs for each K; NaN where there is none."""
    shares = {}
    for k in _CLASSES:
        pairs = drawn["equal ratio", k]
        holds, error = np.asarray(difference(pairs, "reverse KL") > 0), relative_error(pairs)
        regimes = {"log(q/p) < KL(q||p)": error < 1, "log(q/p) > KL(q||p)": error > 1}
        regimes |= {f"sharpness {s:g}": pairs.sharpness == s for s in _SHARPNESSES}
        for label, chosen in regimes.items():
            found = holds[~pairs.under & chosen]
            shares.setdefault(label, []).append(100 * found.mean() if len(found) else np.nan)
    return shares


def _print_regimes(shares: dict[str, list[float]]) -> None:
    print("\nreverse KL, equal ratio, overestimated: the class with the smaller q loses more, %")
    _line("", [f"K={k}" for k in _CLASSES])
    for label, values in shares.items():
        _line(label, ["none" if np.isnan(share) else f"{share:.2f}" for share in values])


def relative_error(pairs: Pairs) -> np.ndarray:
    """|log(p / q)| of the class 0 over KL(q || p)."""
    ratios = np.log(pairs.teacher / pairs.student)
    return np.abs(ratios[:, 0]) / -np.sum(pairs.student * ratios, axis=1)


def right_signs(pairs: Pairs, name: str, rate: float) -> dict[str, tuple[float, float]]:
    """The shares of the underestimated classes that gain, and of the overestimated ones that lose.

    Each as a share of all such classes, and of the sum of their |p - q|.
    """
    gains = step(pairs, name, rate).log_ratio
    gap = pairs.teacher - pairs.student
    right = {"gain": (gains > 0, gap > 0), "lose": (gains < 0, gap < 0)}
    return {
        side: (float(jnp.mean(moves, where=of)), float(jnp.average(moves, weights=of * abs(gap))))
        for side, (moves, of) in right.items()
    }


def _print_signs(drawn: dict[int, Pairs]) -> None:
    """How often the normaliser turns the sign of the change."""
    rates = (0.01, 1.0, 100.0)
    print("\nunderestimated classes that gain, overestimated ones that lose: % of classes, and in")
    print("brackets % of the sum of their |p - q|")
    _line("", [f"eta={rate:g}" for rate in rates], 16)
    for k, pairs in drawn.items():
        for name in list(_POINTS)[:2]:
            shares = [right_signs(pairs, name, rate) for rate in rates]
            for side in ("gain", "lose"):
                cells = [f"{100 * of:.1f} ({100 * by:.1f})" for of, by in (s[side] for s in shares)]
                _line(f"K={k:<8}{name:16}{side}", cells, 16)


def _line(name: str, cells: Iterable[str], width: int = 13) -> None:
    print(f"{name:34}" + "".join(f"{cell:>{width}}" for cell in cells))


def draw(drawn: dict[tuple[str, int], Pairs], regimes: dict[str, list[float]]) -> Figure:
    """Equal gap, equal ratio, and the signs below."""
    figure = figures.new(7.6)
    first, second, *below = figure.subplots(2, 2).ravel()
    pairs = drawn["equal gap", 10]
    figures.curves(first, _equal_gap_panel(pairs))
    figures.legend(figure, first.lines)
    by_sharpness = np.transpose([regimes[f"sharpness {s:g}"] for s in _SHARPNESSES])
    bars = {
        f"K = {k}" + ("" if np.any(shares) else ": 0 %"): shares
        for k, shares in zip(_CLASSES, by_sharpness, strict=True)
    }
    greys = ("black", figures.GREY, figures.LIGHT_GREY)  # the colours are the divergences'
    figures.bars(second, [f"{s:g}" for s in _SHARPNESSES], bars, colours=greys)
    figures.label(second, "equal p / q: smaller q loses more", "sharpness", "pairs (%), reverse KL")
    second.legend(fontsize=figures.FONT - 1, frameon=False)
    shares = {name: [right_signs(pairs, name, rate) for rate in _RATES] for name in _POINTS}
    titles = {"gain": "underestimated that gain", "lose": "overestimated that lose"}
    for axes, (side, title) in zip(below, titles.items(), strict=True):
        curves = {n: (_RATES, [100 * s[side][0] for s in values]) for n, values in shares.items()}
        panel = {"title": title, "x": "learning rate eta", "y": "classes (%), K = 10"}
        figures.curves(axes, panel | {"log_x": True, "curves": curves})
        axes.set_ylim(0, 103)
    for axes in (first, *below):
        axes.get_legend().remove()
    first.set_xlim(1, 100)
    return figure


def _equal_gap_panel(pairs: Pairs) -> dict:
    """The median difference of LogR of overestimated classes with one gap, by the ratio of q."""
    ratio = pairs.student[:, 0] / pairs.student[:, 1]
    edges = np.geomspace(1, 100, 10)
    curves = {}
    for name in _POINTS:
        values = np.asarray(difference(pairs, name)) / (pairs.student - pairs.teacher)[:, 0]
        medians = stats.binned_statistic(ratio[~pairs.under], values[~pairs.under], "median", edges)
        curves[name] = (np.sqrt(edges[1:] * edges[:-1]), medians.statistic)
    panel = {"title": "overestimated by the same q - p", "x": "ratio of the two q"}
    return panel | {"y": "LogR apart / eta (q - p)", "log_x": True, "curves": curves}


if __name__ == "__main__":
    command.run(main)
