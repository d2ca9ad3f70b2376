"""Another package called `kernels` is found, and stops what loads a model before it begins."""

import importlib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from runtime.support import version as clash
from tests.cli.conftest import Eft


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution `kernels` 0.11.0 on the path, as pip leaves it."""
    metadata = tmp_path / "kernels-0.11.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


def test_here_there_is_none() -> None:
    assert clash.find_clash() is None
    clash.refuse_clash()


def test_the_distribution_is_found_by_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    message = clash.find_clash()
    assert message is not None
    assert "Hugging Face's `kernels` 0.11.0" in message
    assert "pip uninstall kernels" in message


def test_any_other_package_of_that_name_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleSpec("kernels", None, is_package=True)
    other.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: other)
    with pytest.raises(clash.PackageClash, match=f"`import kernels` finds {tmp_path}"):
        clash.refuse_clash()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(clash.PackageClash, match="finds nothing"):
        clash.refuse_clash()


@pytest.mark.parametrize("command", [["serve", "demo"], ["chat", "demo"], ["bench", "offline", "demo"]])
def test_commands_that_load_a_model_refuse_to_start(
    eft: Eft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    install(tmp_path, monkeypatch)
    done = eft(*command)
    assert done.code == 1
    assert done.err.startswith("eft: Hugging Face's `kernels` 0.11.0 is installed in this environment.")
