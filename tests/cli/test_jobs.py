"""`eft jobs rerun`, `report` and `compare`, over a socket."""

import json
from pathlib import Path

import pytest

from runtime.cli.jobs import MAX_POINTS, CurvePoint, _thinned
from tests.cli.conftest import Eft
from tests.cli.test_train import _quiet_logs, jobs_api, jobs_url, recipe

__all__ = ["_quiet_logs", "jobs_api", "jobs_url", "recipe"]


def started(eft: Eft, url: str, recipe: Path) -> str:
    assert eft("train", recipe, "--url", url, "--follow").code == 0
    jobs = json.loads(eft("jobs", "list", "--url", url, "--json").out)["data"]
    return str(jobs[0]["id"])


def test_a_rerun_and_what_is_different(eft: Eft, jobs_url: str, recipe: Path) -> None:
    first = started(eft, jobs_url, recipe)
    done = eft("jobs", "rerun", first, "--set", "steps=6", "--set", "name=other", "--follow", "--url", jobs_url)
    assert done.code == 0
    second = json.loads(eft("jobs", "list", "--url", jobs_url, "--json").out)["data"][0]["id"]
    found = json.loads(eft("jobs", "compare", first, second, "--url", jobs_url, "--json").out)
    assert found["jobs"] == [first, second]
    assert found["recipe"] == [
        {"key": "name", "first": "shop", "second": "other"},
        {"key": "steps", "first": 4, "second": 6},
    ]
    results = {one["key"]: (one["first"], one["second"]) for one in found["results"]}
    assert results["adapter"] == ("shop@1", "other@2")
    assert results["eval_loss"] == (0.5, 0.5)
    assert results["train_loss"] == (pytest.approx(1 / 4), pytest.approx(1 / 6))
    assert {(one["metric"], one["step"]) for one in found["curves"]} >= {("eval_loss", 4)}
    table = eft("jobs", "compare", first, second, "--url", jobs_url).out
    for word in ("name", "shop", "other", "eval_loss", "0.5"):
        assert word in table


def test_a_plan_with_changes(eft: Eft, jobs_url: str, recipe: Path) -> None:
    first = started(eft, jobs_url, recipe)
    done = eft("jobs", "rerun", first, "--set", "name=b", "--dry-run", "--url", jobs_url)
    assert json.loads(done.out)["name"] == "b"
    assert len(json.loads(eft("jobs", "list", "--url", jobs_url, "--json").out)["data"]) == 1
    for wrong in ("name", "=3", "a=[1"):
        refused = eft("jobs", "rerun", first, "--set", wrong, "--url", jobs_url)
        assert refused.code == 2, wrong
        assert "--set" in refused.err


def test_the_report(eft: Eft, jobs_url: str, recipe: Path, tmp_path: Path) -> None:
    first = started(eft, jobs_url, recipe)
    path = tmp_path / "report.html"
    assert eft("jobs", "report", first, "--to", path, "--url", jobs_url).out == f"Wrote {path}.\n"
    assert path.read_text().startswith("<!doctype html>")
    assert eft("jobs", "report", first, "--to", tmp_path / "no" / "x.html", "--url", jobs_url).code == 1


def test_long_curves_are_thinned() -> None:
    points = [CurvePoint(metric="eval_loss", step=step, first=1.0, second=None) for step in range(1, 101)]
    shown = [point.step for point in _thinned(points)]
    assert len(shown) <= MAX_POINTS + 1
    assert (shown[0], shown[-1]) == (1, 100)
