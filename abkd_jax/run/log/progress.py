"""How far a run is: a bar in a terminal, now and then a line in a log."""

import importlib.util
import math
import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from abkd_jax.tasks import Column

_SECONDS_BETWEEN_DRAWINGS = 0.5
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows on stderr which step a run is at, how fast it is and how well it does.

    In a terminal and in Jupyter that is a bar, redrawn at most twice a second and by no thread of
    its own; elsewhere a plain line at most every ten seconds, and a last one.

    The rate is that of this process: it counts from the end of the first step, so neither steps
    before a resume nor compilation are in it.
    """

    def __init__(
        self, label: str, total: int, start: int = 0, *, examples_per_step: int, score: Column
    ):
        """Prepares the display; it appears when the context is entered.

        Args:
            label: what is run, such as the name of the network that learns.
            total: the number of steps of the whole run.
            start: the number of steps that were done before.
            examples_per_step: examples in one step.
            score: the metric that is shown besides losses, and how.
        """
        self._label, self._total, self._start, self._step = label, total, start, start
        self._examples_per_step, self._score = examples_per_step, score
        self._shown: dict[str, float] = {}
        self._speed: dict[str, float] = {}
        self._clock: tuple[int, float] | None = None  # the first step seen, and when
        self._due, self._last_line = -math.inf, None
        self._live = _live()

    def update(self, step: int, **shown: float) -> None:
        """Takes note of a step; cheap enough for every one.

        Args:
            step: the number of steps done.
            **shown: further numbers to show from now on, by name with underscores for spaces. They
                are read when they are drawn.
        """
        self._step, self._latest = step, time.monotonic()
        if self._clock is None and step > self._start:
            self._clock = (step, self._latest)
        self._shown |= {name.replace("_", " "): value for name, value in shown.items()}
        if self._live and self._latest >= self._due:
            self._draw()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the losses and scores among a row of metrics.

        Args:
            step: the number of steps done.
            metrics: by name: "NAME/loss", and "validation/NAME/SCORE" or "test/NAME/SCORE".
                If a NAME is the label, only its own are shown. And "time/mfu", and
                "time/waiting_for_data" from one per cent on.
        """
        if "time/waiting_for_data" in metrics:
            self._speed = {
                "waiting for data": metrics["time/waiting_for_data"],
                "MFU": metrics.get("time/mfu", 0.0),
            }
        self._shown |= self._facts(metrics)
        self.update(step)
        if not self._live and self._latest >= self._due:
            self._due = self._latest + _SECONDS_BETWEEN_LINES
            self._print()

    def __enter__(self) -> "Progress":
        self._begun = time.monotonic()
        if self._live:
            self._live.start()
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._draw()
            self._live.stop()
        elif self._clock:
            self._print()

    def _draw(self) -> None:
        self._due = time.monotonic() + _SECONDS_BETWEEN_DRAWINGS
        first = Table.grid(padding=(0, 1), expand=True)
        first.add_column(no_wrap=True)
        first.add_column(ratio=1)
        first.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self._total, 1), completed=self._step)
        done = f"{self._step}/{self._total} {_duration(time.monotonic() - self._begun)}"
        first.add_row(Text(self._label), bar, Text(done))
        # On a line of its own: beside the bar it would not fit into eighty columns.
        second = Text(", ".join([*self._pace(), *self._values()]), style="dim")
        self._live.update(Group(first, second), refresh=True)

    def _print(self) -> None:
        done = f"{self._label} step {self._step}/{self._total}"
        line = ", ".join([done, *self._pace(), *self._values()])
        if line != self._last_line:
            print(line, file=sys.stderr, flush=True)
            self._last_line = line

    def _pace(self) -> list[str]:
        """Rate and time to go, as far as they are known."""
        if self._clock is None or self._latest <= self._clock[1] or self._step <= self._clock[0]:
            return []
        rate = (self._step - self._clock[0]) / (self._latest - self._clock[1])
        left = max(self._total - self._step, 0) / rate
        examples = rate * self._examples_per_step
        examples = f"{examples:,.0f}" if examples >= 10 else f"{examples:.2g}"
        shares = [f"{name} {100 * x:.0f} %" for name, x in self._speed.items() if x >= 0.01]
        return [f"{examples} examples/s", f"ETA {_duration(left)}", *shares]

    def _values(self) -> list[str]:
        return [f"{name} {self._text(name, float(value))}" for name, value in self._shown.items()]

    def _facts(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The losses and scores of a row, each under the name that is shown."""
        found = []
        for key, value in metrics.items():
            match key.split("/"):
                case [name, "loss"]:
                    found.append((name, "loss", value))
                case ["validation" | "test" as split, name, self._score.key]:
                    found.append((name, f"{split} {self._score.key}", value))
        own = {fact: value for name, fact, value in found if name == self._label}
        return own or {f"{name} {fact}": value for name, fact, value in found}

    def _text(self, name: str, value: float) -> str:
        percent = name.endswith(self._score.key) and self._score.factor == 100
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _live() -> Live | None:
    """A live display if stderr can show one."""
    console = Console(stderr=True)
    # Not console.is_terminal, which FORCE_COLOR sets in logs of continuous integration.
    terminal = sys.stderr.isatty() and not console.is_dumb_terminal
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return Live(console=console, auto_refresh=False) if terminal or widgets else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
