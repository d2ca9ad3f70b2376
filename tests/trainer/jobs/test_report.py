"""The report of a job: a page by itself, escaped, with curves where there are points."""

import re
from html.parser import HTMLParser
from typing import Any

from runtime.trainer.jobs.records import Job, JobCheckpoint, JobError, JobFile, JobProgress, ThinnedMetrics
from runtime.trainer.jobs.report import MAX_POINTS, JobReport, render_report

EVIL = "<script>alert('x')</script>&\"'"


def report(**changes: Any) -> str:
    job = Job(
        id="ftjob-1",
        state="succeeded",
        name=EVIL,
        created_at=0.0,
        started_at=10.0,
        finished_at=72.5,
        recipe=f"name: {EVIL}\n".encode(),
        summary={
            "base_model": EVIL,
            "notes": [EVIL],
            "versions": {"eft": "1.0"},
            "train": {"counts": {"rows": 9, "too_long": 2}, "examples": 7, "tokens": 70, "longest": 12},
        },
        total_steps=4,
        wanted=None,
        attempts=1,
        error=None,
        adapter="shop@1",
    )
    fields: dict[str, Any] = {
        "job": job,
        "progress": JobProgress(step=4, trained_tokens=1234),
        "files": [JobFile(name=EVIL, stored_as="0", bytes=5)],
        "checkpoints": [JobCheckpoint(step=2, best=True, created_at=0.0)],
        "metrics": [
            *({"type": "step", "step": n, "loss": 1 / n, "accuracy": 0.5, "learning_rate": 1e-4} for n in range(1, 5)),
            {"type": "eval", "step": 4, "loss": 0.5, "accuracy": None, "metrics": {"exact_match": 0.25}},
        ],
        "answers": [
            {"step": 0, "samples": [{"prompt": EVIL, "reference": "yes", "answer": "no\nno"}]},
            {"step": 4, "samples": [{"prompt": EVIL, "reference": "yes", "answer": EVIL}]},
        ],
    }
    rows = changes.pop("metrics", fields["metrics"])
    counts = {
        f"{kind}s": sum(row["type"] == short for row in rows)
        for kind, short in (("step", "step"), ("evaluation", "eval"))
    }
    fields["metrics"] = ThinnedMetrics(rows=rows, **{**counts, **changes.pop("totals", {})})
    return render_report(JobReport(**{**fields, **changes}))


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "polyline", "circle"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_page_stands_by_itself_and_is_escaped() -> None:
    page = Reader(report())
    assert "script" not in page.tags
    assert not {name for name, _ in page.attributes} & {"src", "href", "onload"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in [value for _, value in page.attributes]
    for text in (EVIL, "ftjob-1", "shop@1", "62.5", "4 of 4", "1,234", "exact_match", "2 too long", "no\nno", "1.0"):
        assert text in page.text, text
    assert page.text.count(EVIL) >= 7  # title twice, base, note, recipe, file, prompt and answer


def test_curves_have_a_point_a_value() -> None:
    page = report()
    lines = dict(re.findall(r'<figcaption>([^<]*)</figcaption><svg.*?points="([^"]*)"', page))
    assert lines["loss (training and evaluation)"].split()[0] == "44.0,22.0"  # the first step, and the highest loss
    assert len(lines["loss (training and evaluation)"].split()) == 4
    assert "exact_match (evaluation)" in lines
    assert page.count("<circle") == 2  # accuracy was not measured


def test_long_curves_are_thinned() -> None:
    rows = [{"type": "step", "step": n, "loss": 1.0, "accuracy": 1.0, "learning_rate": 0.0} for n in range(1, 5001)]
    page = report(metrics=rows)
    (points,) = re.findall(r'<figcaption>loss [^<]*</figcaption><svg.*?points="([^"]*)"', page)
    assert len(points.split()) <= MAX_POINTS
    assert "evenly chosen" not in page


def test_what_was_left_out_is_said() -> None:
    page = report(totals={"steps": 120_000, "evaluations": 700})
    assert "The curves are of 4 of 120,000 steps, evenly chosen." in page
    assert "The curves are of 1 of 700 evaluations, evenly chosen." in page
    assert "The table has 1 of 700 evaluations, the last ones." in page


def test_a_job_that_failed_before_it_began() -> None:
    job = Job(
        id="ftjob-2", state="failed", name=None, created_at=0.0, started_at=None, finished_at=1.0, recipe=b"\xff",
        summary={}, total_steps=None, wanted=None, attempts=0, error=JobError("bad", "No <data>."), adapter=None,
    )  # fmt: skip
    page = report(job=job, metrics=[], answers=[], files=[], checkpoints=[], progress=JobProgress())
    assert "No &lt;data&gt;." in page
    assert "<svg" not in page
    Reader(page)
