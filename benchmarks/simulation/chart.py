"""Distributions as a picture: a file where matplotlib is installed, bars in the terminal where it is not."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.simulation.outcome import Outcome

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
POINTS = 2000
"""Of a curve: more cannot be seen."""
WIDTH = 50
"""Characters of the longest bar."""


def draw(outcomes: Mapping[str, Outcome], target: Path, console: Console) -> None:
    """Distributions of TTFT and TPOT, and throughput, KV waste and preemptions, in `target` (PNG, SVG, …); or
    quantiles of TTFT as bars."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("matplotlib is not installed: bars instead of a file", style="yellow")
        console.print(_bars(outcomes))
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axes, name in zip(above.subplots(1, 2), ("ttft", "tpot"), strict=True):
        for label, outcome in outcomes.items():
            values = sorted(getattr(outcome.served, name))
            values = values[:: max(1, len(values) // POINTS)]
            axes.plot(values, [(index + 1) / len(values) for index in range(len(values))], label=label)
        axes.set_xscale("log")
        axes.set_xlabel(f"{name.upper()}, seconds")
        axes.set_ylabel("share of the requests")
        axes.legend()
    totals: dict[str, list[float]] = {
        "output tokens a second": [outcome.throughput for outcome in outcomes.values()],
        "KV waste, %": [100 * outcome.kv_waste for outcome in outcomes.values()],
        "preemptions": [outcome.preemptions for outcome in outcomes.values()],
    }
    for axes, (title, heights) in zip(below.subplots(1, len(totals)), totals.items(), strict=True):
        axes.bar(list(outcomes), heights)
        axes.set_ylim(0, max(heights) * 1.05 or 1.0)
        axes.set_title(title)
    figure.savefig(target)
    console.print(f"wrote {target}")


def _bars(outcomes: Mapping[str, Outcome]) -> Table:
    table = Table("run", "quantile", "TTFT s", "")
    longest = max(outcome.ttft(SHARES[-1]) for outcome in outcomes.values()) or 1.0
    for label, outcome in outcomes.items():
        for share in SHARES:
            value = outcome.ttft(share)
            table.add_row(label, f"{share:.0%}", f"{value:.3f}", "█" * round(WIDTH * value / longest))
            label = ""
    return table
