"""`eft doctor`: what it finds, what it hides, and what it calls broken.

Environments that are broken are really so: a process of its own finds another package, or none, where ours would be.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from runtime.cli import doctor
from runtime.cli.doctor import cache_obstacle, size
from runtime.support.version import version
from settings.schema import CacheSettings, ModelSettings, Settings
from tests.cli.conftest import Eft

ROOT = Path(__file__).parents[2]


def apart(tmp_path: Path, *path: Path, python: tuple[str, ...] = (), **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of `eft doctor` in a process of its own, which looks into `path` for packages first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EFT_")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), **variables}
    command = [sys.executable, *python, "-m", "runtime", "doctor", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def packages_without(tmp_path: Path, name: str) -> Path:
    """A directory of all packages that are installed here but this one."""
    directory = tmp_path / "packages"
    directory.mkdir()
    missing = importlib.metadata.distribution(name)
    left_out = {Path(str(file)).parts[0] for file in missing.files or ()}
    for entry in Path(str(missing.locate_file(""))).iterdir():
        if entry.name not in left_out:
            (directory / entry.name).symlink_to(entry)
    return directory


def report(eft: Eft) -> dict[str, Any]:
    return json.loads(eft("doctor", "--json").out)  # type: ignore[no-any-return]


def values(area: dict[str, Any]) -> dict[str, str]:
    return {name: finding["value"] for name, finding in area.items()}


def test_json_has_every_area_and_says_that_all_is_well(eft: Eft) -> None:
    done = eft("doctor", "--json")
    found = json.loads(done.out)
    assert done.code == 0
    assert (found["ok"], found["problems"]) == (True, [])
    assert set(found) == {"ok", "problems", "advice", "software", "machine", "storage", "plugins", "settings"}
    software = values(found["software"])
    assert software["eft"] == version()
    assert software["torch"] == importlib.metadata.version("torch")
    assert software["kernels: reference"] == "works"
    assert software["clash of packages"] == "none"


def test_text_names_what_is_broken_and_exits_with_1(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Nothing is broken." in eft("doctor").out
    monkeypatch.setenv("EFT_SERVER_PROT", "1")
    monkeypatch.setenv("EFT_CACHE_DIR", "/dev/null/cache")
    done = eft("doctor")
    assert done.code == 1
    broken = " ".join(done.out[done.out.index("Broken:") :].split())
    assert "environment EFT_SERVER_PROT: unknown setting" in broken
    assert "/dev/null/cache cannot be made, as /dev/null is not a directory" in broken


# -- environments that are broken --------------------------------------------------------------------


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    broken = tmp_path / "packages" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    code, found = apart(tmp_path, broken.parent)
    assert (code, found["ok"]) == (1, False)
    assert "libcudart.so.12" in found["software"]["threads"]["problem"]
    assert found["software"]["threads"]["problem"] in found["problems"]
    assert "libcudart.so.12" in found["software"]["kernels"]["problem"]
    assert found["machine"]["GPU"]["value"] == "unknown: torch cannot be imported (ImportError)"
    assert found["software"]["flash-attn"]["problem"] is None


def test_another_package_called_kernels(tmp_path: Path) -> None:
    other = tmp_path / "packages" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("def get_kernel(name): ...\n")
    code, found = apart(tmp_path, other.parent)
    assert code == 1
    assert str(other) in found["software"]["clash of packages"]["problem"]
    assert "no attribute 'available'" in found["software"]["kernels"]["problem"]


def test_a_package_that_is_missing(tmp_path: Path) -> None:
    code, found = apart(tmp_path, packages_without(tmp_path, "uvloop"), python=("-S",))
    assert code == 1
    assert found["problems"] == ["uvloop is not installed: pip install uvloop, or install Eft again"]
    assert values(found["software"])["uvloop"] == "missing"
    assert values(found["software"])["httpx"] == importlib.metadata.version("httpx")


def test_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """That is no fault: without compiled ops there are those of torch."""
    empty = tmp_path / "bin"
    empty.mkdir()
    cache = str(tmp_path / "cache")
    code, found = apart(tmp_path, PATH=str(empty), EFT_CACHE_DIR=cache, XDG_CACHE_HOME=cache)
    assert (code, found["problems"]) == (0, [])
    assert values(found["machine"])["C++ compiler"] == "none"
    compiled = values(found["software"])["kernels: cpu"] == "works"  # in this tree, before
    assert compiled or any("install g++" in line and "eft kernels build" in line for line in found["advice"])
    _, found = apart(tmp_path, CXX="no-such-compiler")
    assert values(found["machine"])["C++ compiler"] == "none (no-such-compiler of CXX is not found)"


def test_only_what_is_installed_with_eft_can_be_missing(eft: Eft) -> None:
    """A tool of the tests that a plain installation lacks made `eft doctor` fail there."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        required = {re.split("[^a-z0-9-]", line)[0] for line in tomllib.load(file)["project"]["dependencies"]}
    others = {"eft", "Python", "threads", "clash of packages", "flash-attn"}
    named = {name for name in report(eft)["software"] if not name.startswith("kernels")}
    assert others < named
    assert named - others <= required


def test_every_problem_says_what_to_do(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_SERVER_PROT", "1")
    monkeypatch.setenv("EFT_CACHE_DIR", "/dev/null/cache")
    problems = report(eft)["problems"]
    assert any("eft config example" in problem for problem in problems)
    assert any("EFT_CACHE_DIR names another place" in problem for problem in problems)


def test_what_could_be_better_is_said(eft: Eft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that is short of everything: the limits are raised above what this one has."""
    monkeypatch.setattr(doctor, "LITTLE_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 1 << 60)
    monkeypatch.setattr(doctor, "FEW_DESCRIPTORS", 1 << 60)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", str(tmp_path))
    monkeypatch.setattr("runtime.model.model.gpus", tuple)
    done = eft("doctor", "--json")
    found = json.loads(done.out)
    assert (done.code, found["ok"]) == (0, True)
    advice = "\n".join(found["advice"])
    for part in (
        "--quantization int8",
        "eft state du",
        "EFT_TRAINER_STATE_DIR",
        "LimitNOFILE",
        "build of torch for CUDA",
    ):
        assert part in advice
    assert found["machine"]["memory"]["advice"] in found["advice"]
    assert "Could be better:" in eft("doctor").out


# -- settings and the environment --------------------------------------------------------------------


def test_secrets_are_hidden(eft: Eft, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("EFT_SERVER_API_KEY", "EFT_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@hub.example/x")
    monkeypatch.setenv("HF_HOME", "/models")
    out = eft("doctor", "--json").out
    assert "hunter2" not in out
    found = values(json.loads(out)["settings"])
    assert [found[name] for name in secrets] == ["set (hidden)"] * 4
    assert found["HF_ENDPOINT"] == "https://(hidden)@hub.example/x"
    assert found["HF_HOME"] == "/models"


def test_the_settings_that_differ_are_named(eft: Eft, tmp_path: Path) -> None:
    assert values(report(eft)["settings"])["settings"] == "all at their defaults"
    (tmp_path / "eft.toml").write_text("[server]\nport = 1\n")
    found = values(report(eft)["settings"])
    assert found["settings"] == "changed: server.port"
    assert found["file"] == str(tmp_path / "eft.toml")


@pytest.mark.parametrize(
    ("cache", "dtype", "obstacle"),
    [
        ({}, "auto", "cache.block_size is 16, and it reads multiples of 256"),
        ({"block_size": 512}, "auto", None),
        ({"block_size": 256, "kv_cache_dtype": "int8"}, "auto", "the cache holds int8, and it reads bfloat16"),
        ({"block_size": 256}, "float32", "the cache holds float32, and it reads bfloat16"),
    ],
)
def test_the_caches_that_flash_attn_can_read(cache: dict[str, Any], dtype: str, obstacle: str | None) -> None:
    settings = Settings(cache=CacheSettings(**cache), model=ModelSettings(dtype=dtype))
    assert cache_obstacle(settings, 256) == obstacle


# -- machine and storage -----------------------------------------------------------------------------


def test_the_caches_and_what_is_in_them(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    blobs = hub / "models--org--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"x" * 2048)
    (blobs / "dangling").symlink_to(tmp_path / "nowhere")
    _, report = apart(tmp_path, EFT_CACHE_DIR=str(tmp_path / "not" / "yet"), HF_HUB_CACHE=str(hub))
    found = values(report["storage"])
    assert found["cache of Eft"].startswith(f"{tmp_path}/not/yet (")
    assert found["cache of Eft"].endswith(" free)")
    assert found["demo model"].startswith("not here yet")
    assert found["hub model org/some--model"] == "2.0 KiB"


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 * 1024**3, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_plugins_are_listed_and_broken_ones_named(eft: Eft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "pond-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pond\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[eft.models]\nNewtForCausalLM = pond:Newt\n[eft.hooks]\nlog = json:dumps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = eft("doctor", "--json")
    plugins = json.loads(done.out)["plugins"]
    assert plugins["eft.hooks: log"] == {"value": "json:dumps of pond 1.2", "problem": None, "advice": None}
    assert plugins["eft.models: NewtForCausalLM"]["value"] == "pond:Newt of pond 1.2"
    assert "No module named 'pond'" in plugins["eft.models: NewtForCausalLM"]["problem"]
    assert done.code == 1
