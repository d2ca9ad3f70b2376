"""`eft models list`: ours and what plugins bring."""

import json
from pathlib import Path

import pytest

from runtime.model.families import REGISTRY
from tests.cli.conftest import Eft


def test_list_has_ours_and_the_plugins(eft: Eft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "pond-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pond\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[eft.models]\nNewtForCausalLM = pond:Newt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {item["architecture"]: item["plugin"] for item in json.loads(eft("models", "list", "--json").out)}
    assert found.keys() == {*REGISTRY, "NewtForCausalLM"}
    assert {name for name, plugin in found.items() if plugin} == {"NewtForCausalLM"}
    assert found["NewtForCausalLM"] == "pond:Newt"
    assert "pond:Newt" in eft("models", "list").out
