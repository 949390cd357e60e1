"""The figures of a report on language."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abkd_jax import figures


def by_position(report: Any, pairs: Iterable[tuple[str, str]]) -> Figure:
    """A panel of the networks' NLL by position, and one of their KL from each other network.

    Args:
        report: what is known of the run, an `abkd_jax.report.Report`.
        pairs: (network, another).
    """
    last = {name: network["last"] for name, network in report.networks.items()}
    panels = {"NLL": {name: (scores, "nll") for name, scores in last.items()}}
    for name, other in pairs:
        shown = panels.setdefault(f"KL from the {other}", {})
        shown[name] = last[name]["pairs"][other], "kl_at_1"
    figure, grid = figures.new_grid(len(panels), columns=2, height=3.0, above=0.4)
    for axes, (title, shown) in zip(grid, panels.items(), strict=True):
        for name, (scores, key) in shown.items():
            _draw(axes, scores, key, report.colours[name])
        figures.label(axes, title, "place in the segment", "nats per token")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    figures.legend(figure, figures.patches(list(last), report.colours))
    return figure


def _draw(axes: Axes, scores: Mapping[str, Any], key: str, colour: str) -> None:
    """The bins that have tokens, counted from 1, since the axis is logarithmic."""
    points = np.array([scores["position_place"], scores[f"position_{key}"]], float)
    places, values = points[:, np.isfinite(points).all(axis=0)]
    axes.plot(places + 1, values, "o-", color=colour, markersize=4, linewidth=1.8)
