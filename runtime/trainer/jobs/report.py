"""A job as one HTML page that needs nothing else: curves, evaluations, answers, data, recipe and versions.

Every text is escaped, and the page has neither scripts nor addresses of other files.
"""

import html
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct

from runtime.trainer.jobs.records import Job, JobCheckpoint, JobFile, JobProgress, ThinnedMetrics

WIDTH, HEIGHT, MARGIN = 640, 200, 44
"""Pixels of a curve, and of the space for its numbers."""
MAX_POINTS = 600
"""Points of a curve; of more, each is the mean of its neighbours."""
MAX_ROWS = 500
"""Rows of the table of evaluations."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content-Security-Policy of the page."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .6rem;border-bottom:1px solid #ccc}
td.number{text-align:right;font-variant-numeric:tabular-nums}pre{background:#f4f4f4;padding:.8rem;overflow:auto}
td.text{white-space:pre-wrap;word-break:break-word}figure{margin:1rem 0}figcaption{font-weight:600}
svg{max-width:100%;height:auto}.train{stroke:#1f5fa8}.eval{stroke:#b3470b}
@media(prefers-color-scheme:dark){body{color:#eee;background:#181818}pre{background:#242424}th,td{border-color:#444}
svg text{fill:#eee}.train{stroke:#7fb2ee}.eval{stroke:#f0a36b}}
"""


class JobReport(Struct, frozen=True, kw_only=True):
    """Everything that the page shows."""

    job: Job
    progress: JobProgress
    files: list[JobFile]
    checkpoints: list[JobCheckpoint]
    metrics: ThinnedMetrics
    answers: list[dict[str, Any]]
    """As `JobReader.answers` has them."""


def render_report(report: JobReport) -> str:
    """The page."""
    job = report.job
    title = f"{job.name or job.id}: {job.state}"
    parts = [
        f"<h1>{_escape(title)}</h1>",
        _pairs(_overview(report)),
        *_failure(job),
        *_curves(report.metrics),
        *_evaluations(report.metrics),
        *_answers(report.answers),
        *_data(job, report.files),
        *_remarks(job.summary),
        "<h2>Recipe</h2>",
        f"<pre>{_escape(job.recipe.decode('utf-8', 'replace'))}</pre>",
        *_versions(job.summary),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _overview(report: JobReport) -> list[tuple[str, Any]]:
    job, summary = report.job, report.job.summary
    best = [str(one.step) for one in report.checkpoints if one.best]
    seconds = None if job.started_at is None else (job.finished_at or time.time()) - job.started_at
    return [
        ("Job", job.id),
        ("Base model", summary.get("base_model")),
        ("Method", summary.get("method")),
        ("Published as", job.adapter or "not published"),
        ("Created", _moment(job.created_at)),
        ("Started", _moment(job.started_at)),
        ("Finished", _moment(job.finished_at)),
        ("Seconds", None if seconds is None else round(seconds, 1)),
        ("Steps", f"{report.progress.step} of {job.total_steps}"),
        ("Trained tokens", report.progress.trained_tokens),
        ("Trained parameters", summary.get("trained_parameters")),
        ("Examples in a step", summary.get("effective_batch")),
        ("Checkpoints kept", ", ".join(str(one.step) for one in report.checkpoints)),
        ("Best checkpoint", ", ".join(best)),
    ]


def _failure(job: Job) -> list[str]:
    if job.error is None:
        return []
    return ["<h2>Failure</h2>", _pairs([("Code", job.error.code), ("Message", job.error.message)])]


# -- curves ----------------------------------------------------------------------------------------


def _curves(metrics: ThinnedMetrics) -> list[str]:
    steps = [row for row in metrics.rows if row["type"] == "step"]
    evals = [row for row in metrics.rows if row["type"] == "eval"]
    names = dict.fromkeys(["loss", "accuracy", *(name for row in metrics.rows for name in row.get("metrics", {}))])
    found = [_figure(name, _points(steps, name), _points(evals, name)) for name in names]
    rates = [(row["step"], row["learning_rate"]) for row in steps]
    found += [_figure("learning rate", rates, []), _figure("gradient norm", _points(steps, "grad_norm"), [])]
    said = [
        f"<p>The curves are of {len(some):,} of {total:,} {what}, evenly chosen.</p>"
        for some, total, what in ((steps, metrics.steps, "steps"), (evals, metrics.evaluations, "evaluations"))
        if len(some) < total
    ]
    return ["<h2>Curves</h2>", *said, *filter(None, found)] if any(found) else []


def _points(rows: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    values = ((row["step"], row.get("metrics", {}).get(name, row.get(name))) for row in rows)
    return [(step, float(value)) for step, value in values if value is not None and math.isfinite(value)]


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS, each the mean of neighbours."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in groups]


def _figure(name: str, train: Sequence[tuple[int, float]], evals: Sequence[tuple[int, float]]) -> str:
    """A curve; nothing where there is no point."""
    if not train and not evals:
        return ""
    curves = [("train", _thinned(train)), ("eval", _thinned(evals))]
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> str:
        across = (x - left) / (right - left or 1.0)
        up = (y - low) / (high - low or 1.0)
        return f"{MARGIN + across * (WIDTH - 2 * MARGIN):.1f},{HEIGHT - MARGIN / 2 - up * (HEIGHT - MARGIN):.1f}"

    lines = [
        f'<polyline class="{kind}" fill="none" stroke-width="1.5" '
        f'points="{" ".join(place(x, y) for x, y in (points if len(points) > 1 else [*points, *points]))}"/>'
        for kind, points in curves
        if points
    ]
    dots = [
        f'<circle class="eval" fill="none" r="3" cx="{at.partition(",")[0]}" cy="{at.partition(",")[2]}"/>'
        for at in (place(x, y) for x, y in curves[1][1])
    ]
    shown = " and ".join(kind for kind, points in (("training", train), ("evaluation", evals)) if points)
    label = _escape(f"{name} of {shown}, from step {left:g} to {right:g}, between {low:.4g} and {high:.4g}")
    numbers = [
        f'<text x="2" y="{MARGIN / 2:.0f}" font-size="11">{high:.4g}</text>',
        f'<text x="2" y="{HEIGHT - MARGIN / 2:.0f}" font-size="11">{low:.4g}</text>',
        f'<text x="{MARGIN}" y="{HEIGHT - 4}" font-size="11">step {left:g}</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 4}" font-size="11" text-anchor="end">{right:g}</text>',
    ]
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">'
    return (
        f"<figure><figcaption>{_escape(name)} ({shown})</figcaption>"
        f"{drawing}{''.join([*numbers, *lines, *dots])}</svg></figure>"
    )


# -- tables ----------------------------------------------------------------------------------------


def _evaluations(metrics: ThinnedMetrics) -> list[str]:
    rows = [row for row in metrics.rows if row["type"] == "eval"][-MAX_ROWS:]
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row.get("metrics", {})))
    body = [
        [row["step"], row["loss"], row["accuracy"], *(row.get("metrics", {}).get(name) for name in names)]
        for row in rows
    ]
    cut = f"<p>The table has {len(rows):,} of {metrics.evaluations:,} evaluations, the last ones.</p>"
    table = _table(["step", "loss", "accuracy", *names], body)
    return ["<h2>Evaluations</h2>", *([cut] if len(rows) < metrics.evaluations else []), table]


def _answers(answers: Sequence[dict[str, Any]]) -> list[str]:
    if not answers or not answers[-1]["samples"]:
        return []
    first, last = answers[0], answers[-1]
    before = {one["prompt"]: one["answer"] for one in first["samples"]} if last is not first else {}
    body = [[one["prompt"], one["reference"], before.get(one["prompt"]), one["answer"]] for one in last["samples"]]
    head = ["prompt", "answer of the row", f"at step {first['step']}", f"at step {last['step']}"]
    return ["<h2>Answers</h2>", _table(head, body)]


def _data(job: Job, files: Sequence[JobFile]) -> list[str]:
    rows = []
    for name in ("train", "test"):
        stats = job.summary.get(name)
        if isinstance(stats, dict) and isinstance(counts := stats.get("counts"), dict):
            left_out = ", ".join(
                f"{counts[what]} {what.replace('_', ' ')}"
                for what in ("truncated", "too_long", "too_short", "untrained", "ties", "duplicates", "cut")
                if counts.get(what)
            )
            numbers = [stats.get(field) for field in ("examples", "tokens", "trained_tokens", "longest")]
            rows.append([name, counts.get("rows"), *numbers, left_out])
    found = ["<h2>Data</h2>"]
    if rows:
        head = ["set", "rows", "examples", "tokens", "trained tokens", "longest", "left out or cut"]
        found.append(_table(head, rows))
    if files:
        found.append(_table(["file", "bytes"], [[file.name, file.bytes] for file in files]))
    return found if len(found) > 1 else []


def _remarks(summary: dict[str, Any]) -> list[str]:
    notes = [str(note) for note in summary.get("notes", ())]
    if not notes:
        return []
    return ["<h2>Notes</h2><ul>", *(f"<li>{_escape(note)}</li>" for note in notes), "</ul>"]


def _versions(summary: dict[str, Any]) -> list[str]:
    versions = summary.get("versions")
    return ["<h2>Versions</h2>", _pairs(list(versions.items()))] if isinstance(versions, dict) and versions else []


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    rows = [f"<tr><th>{_escape(name)}</th>{_cell(value)}</tr>" for name, value in pairs if value not in (None, "")]
    return f"<table>{''.join(rows)}</table>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f'<td class="text">{_escape("" if value is None else str(value))}</td>'


def _moment(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
