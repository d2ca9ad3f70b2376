"""Sections of the check: each has a share of the time, and one that fails does not end the others."""

import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

from msgspec import Struct, field

Figures = dict[str, Any]


class Wrong(Exception):
    """A result that is not what it must be; the message has both."""


class NotHere(Exception):
    """A section that cannot run on this machine; the message says why."""


class Clock:
    """The seconds of one section. A section asks before each measurement, and leaves the rest out at the end."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, 0 at the least."""
        return max(0.0, self._end - time.monotonic())

    def share(self, part: float) -> "Clock":
        """A clock for `part` of what is left."""
        return Clock(self.left * part)


class Section(Struct):
    """A section, and what came of it."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    figures: Figures = field(default_factory=dict)
    problem: str = ""
    trace: str = ""


Run = Callable[[Clock, Figures], None]
"""Fills the figures as it measures, so that those before a failure are kept."""


class Report(Struct, kw_only=True):
    """Everything that was found on one machine."""

    device: str
    machine: dict[str, Any]
    model: str
    minutes: float
    sections: list[Section] = []

    @property
    def failed(self) -> list[str]:
        """Names of the sections that failed."""
        return [section.name for section in self.sections if section.status == "failed"]


def run_sections(sections: Mapping[str, tuple[float, Run]], seconds: float) -> list[Section]:
    """Run every section, given as (weight, function), within `seconds` in all. Time that one leaves is the next
    ones'."""
    end = time.monotonic() + seconds
    done: list[Section] = []
    weights = {name: weight for name, (weight, _) in sections.items()}
    for name, (weight, run) in sections.items():
        share = weight / sum(weights.values())
        del weights[name]
        done.append(_run_one(name, run, max(0.0, end - time.monotonic()) * share))
    return done


def _run_one(name: str, run: Run, seconds: float) -> Section:
    begin, figures = time.monotonic(), Figures()
    status: Literal["passed", "failed", "skipped"] = "passed"
    problem = trace = ""
    if not seconds:
        return Section(name, "skipped", 0.0, problem="no time was left")
    try:
        run(Clock(seconds), figures)
    except NotHere as reason:
        status, problem = "skipped", str(reason)
    except Exception as error:  # reported, and the other sections run
        status = "failed"
        problem = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        trace = "" if isinstance(error, Wrong) else traceback.format_exc()
    return Section(name, status, round(time.monotonic() - begin, 1), figures, problem, trace)


def page(report: Report) -> str:
    """The report as one page of text."""
    lines = [
        f"GPU check of {report.model} on {report.device}",
        ", ".join(f"{key} {value}" for key, value in report.machine.items()),
        "",
    ]
    for section in report.sections:
        lines.append(f"{section.status.upper():8}{section.name} ({section.seconds:.0f} s) {section.problem}".rstrip())
        lines += [f"        {key}: {_text(value)}" for key, value in section.figures.items()]
    failed, count = report.failed, len(report.sections)
    skipped = sum(section.status == "skipped" for section in report.sections)
    end = f"{len(failed)} of {count} sections failed: {', '.join(failed)}" if failed else "OK"
    lines += ["", f"{end}, {skipped} of {count} were skipped" if skipped else end]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
