"""Differences of two jobs: their recipes, results and evaluations."""

from typing import Any

from msgspec import Struct
from rich.console import Group
from rich.table import Table

from runtime.trainer.recipe.change import flat_keys
from runtime.trainer.recipe.document import read_document

MAX_POINTS = 12
"""Steps of the curves that the table shows."""


class JobDifference(Struct, frozen=True, kw_only=True):
    """A value of each of the two jobs."""

    key: str
    first: Any
    second: Any


class CurvePoint(Struct, frozen=True, kw_only=True):
    """A metric of both jobs at a step; None where a job has no value there."""

    metric: str
    step: int
    first: float | None
    second: float | None


class JobComparison(Struct, frozen=True, kw_only=True):
    """Two jobs side by side."""

    jobs: tuple[str, str]
    recipe: list[JobDifference]
    """Keys whose values differ; None: the key is not there."""
    results: list[JobDifference]
    curves: list[CurvePoint]


def compare_jobs(
    jobs: tuple[dict[str, Any], dict[str, Any]],
    recipes: tuple[bytes, bytes],
    metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> JobComparison:
    """The comparison of two jobs, each with its recipe and the rows of its metrics."""
    first, second = (flat_keys(read_document(recipe).values) for recipe in recipes)
    keys = dict.fromkeys([*first, *second])
    return JobComparison(
        jobs=(jobs[0]["id"], jobs[1]["id"]),
        recipe=[
            JobDifference(key=key, first=first.get(key), second=second.get(key))
            for key in keys
            if first.get(key) != second.get(key)
        ],
        results=_results(jobs, metrics),
        curves=_curves(metrics),
    )


def _results(
    jobs: tuple[dict[str, Any], dict[str, Any]], metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> list[JobDifference]:
    found = [
        JobDifference(key=key, first=jobs[0].get(key), second=jobs[1].get(key))
        for key in ("status", "adapter", "step", "trained_tokens")
    ]
    seconds = [_seconds(job) for job in jobs]
    found.append(JobDifference(key="seconds", first=seconds[0], second=seconds[1]))
    last = [_last(rows) for rows in metrics]
    names = dict.fromkeys([*last[0], *last[1]])
    return [*found, *(JobDifference(key=name, first=last[0].get(name), second=last[1].get(name)) for name in names)]


def _seconds(job: dict[str, Any]) -> int | None:
    started, finished = job.get("started_at"), job.get("finished_at")
    return None if started is None or finished is None else finished - started


def _last(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of the last step and the last evaluation, as `train_loss`, `eval_loss` and so on."""
    found: dict[str, Any] = {}
    for kind, prefix in (("step", "train"), ("eval", "eval")):
        row = next((row for row in reversed(rows) if row["type"] == kind), None)
        found |= {f"{prefix}_{name}": value for name, value in _named(row or {}).items()}
    return found


def _named(row: dict[str, Any]) -> dict[str, Any]:
    plain = {name: row[name] for name in ("loss", "accuracy") if name in row}
    return {**plain, **row.get("metrics", {})}


def _curves(metrics: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> list[CurvePoint]:
    """Metrics of the evaluations of either job, or, where there are none, of training's steps."""
    kind = "eval" if any(row["type"] == "eval" for rows in metrics for row in rows) else "step"
    values: list[dict[tuple[str, int], Any]] = [
        {(name, row["step"]): value for row in rows if row["type"] == kind for name, value in _named(row).items()}
        for rows in metrics
    ]
    names = dict.fromkeys(name for one in values for name, _ in one)
    steps = sorted({step for one in values for _, step in one})
    prefix = "eval" if kind == "eval" else "train"
    return [
        CurvePoint(
            metric=f"{prefix}_{name}", step=step, first=values[0].get((name, step)), second=values[1].get((name, step))
        )
        for name in names
        for step in steps
        if (name, step) in values[0] or (name, step) in values[1]
    ]


# -- tables ----------------------------------------------------------------------------------------


def tables(comparison: JobComparison) -> Group:
    """The comparison for people."""
    first, second = comparison.jobs
    recipe = Table("recipe", first, second, box=None)
    for one in comparison.recipe or [JobDifference(key="no difference", first="", second="")]:
        recipe.add_row(one.key, _shown(one.first), _shown(one.second))
    results = Table("result", first, second, box=None)
    for one in comparison.results:
        results.add_row(one.key, _shown(one.first), _shown(one.second))
    curves = Table("metric", "step", first, second, box=None)
    for point in _thinned(comparison.curves):
        curves.add_row(point.metric, str(point.step), _shown(point.first), _shown(point.second))
    return Group(recipe, "", results, "", curves)


def _thinned(points: list[CurvePoint]) -> list[CurvePoint]:
    """Some steps of each metric, the first and the last among them."""
    steps = sorted({point.step for point in points})
    size = max(1, -(-(len(steps) - 1) // (MAX_POINTS - 1)))
    kept = {*steps[::size], *steps[-1:]}
    return [point for point in points if point.step in kept]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
