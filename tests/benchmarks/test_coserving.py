"""The benchmark of requests beside training, on a tiny model: every load and way is measured, and it leaves nothing."""

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.coserving.__main__ import main
from benchmarks.coserving.chart import Panel, draw
from benchmarks.coserving.peer import PeftProcess


def test_one_run_measures_all_loads_with_and_without_a_job(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, chart = tmp_path / "report.json", tmp_path / "chart.svg"
    few = [
        "--seconds",
        "0.5",
        "--repeats",
        "1",
        "--output",
        "8",
        "--prompt",
        "4",
        "--at-once",
        "2",
        "--jobs",
        "2",
        "--no-peer",
    ]
    assert main(["--model", str(tiny_model), *few, "--json", str(report), "--plot", str(chart)]) == 0
    results = json.loads(report.read_bytes())["results"]
    assert [(one["weights"], one["load"]) for one in results] == [
        (weights, load) for weights in ("none", "int8") for load in ("lone", "half", "full")
    ]
    for result in results:
        (alone,), (beside,) = result["windows"]["alone"], result["windows"]["one process"]
        assert alone["trained"] == 0
        assert result["stand_alone"]["one process"][0] > 0
        if result["load"] != "half":  # so short a window may have no request at random times
            assert alone["served"] > 0
            assert 0 < alone["tpot"]["p50"] <= alone["tpot"]["p95"]
            assert 0 < beside["tpot"]["p50"] <= beside["tpot"]["p95"]
    assert "int8" in capsys.readouterr().out
    titles = [title.text or "" for title in ElementTree.parse(chart).findall(".//{*}rect/{*}title")]
    assert {title.split(":")[0] for title in titles} >= {"one process, lone", "one process, full"}


def test_the_other_process_trains_only_when_it_is_to(tiny_model: Path) -> None:
    peer = PeftProcess(str(tiny_model), 1)
    try:
        assert peer.memory > 1e6
        with peer.running():
            before = peer.tokens_done
            while peer.tokens_done < before + 512:
                pass
    finally:
        peer.close()
    assert not os.path.exists(f"/proc/{peer._process.pid}")


def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(RuntimeError, match="did not start"):
        PeftProcess("demo", 1)


def test_bars_are_as_high_as_their_values() -> None:
    nan = float("nan")
    root = ElementTree.fromstring(draw([Panel("a <b>", ["x", "y"], {"one": [1.0, 2.0], "two": [nan, 0.5]}, limit=1.5)]))
    bars = [rect for rect in root.findall(".//{*}rect") if rect.find("{*}title") is not None]
    heights = {bar.findtext("{*}title"): float(bar.attrib["height"]) for bar in bars}
    assert heights["one, y: 2"] == pytest.approx(2 * heights["one, x: 1"], abs=0.2)
    assert heights["two, y: 0.5"] == pytest.approx(heights["one, x: 1"] / 2, abs=0.2)
    assert "two, x: nan" not in heights
    assert "a <b>" in "".join(root.itertext())
