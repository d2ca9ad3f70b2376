"""`eft doctor`: what it finds, what it hides, and what it calls broken."""

import importlib.metadata
import json
import re
import tomllib
import types
from pathlib import Path

import pytest

from runtime.cli import doctor as checks
from runtime.support.version import version
from tests.cli.conftest import Eft

X86 = """processor\t: 0
model name\t: Imaginary CPU 9000
flags\t\t: fpu avx avx2 fma avx512f amx_int8

processor\t: 1
model name\t: Another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm\n"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The backends that the package of kernels reports; to be changed by a test."""
    backends: dict[str, str | None] = {"reference": None, "triton": "needs a GPU"}
    monkeypatch.setitem(
        __import__("sys").modules,
        "kernels",
        types.SimpleNamespace(available=lambda: backends, chosen=lambda device: "reference"),
    )
    monkeypatch.setattr(checks, "find_clash", lambda: None)
    return backends


def by_name(found) -> dict[str, str]:
    return {item.name: item.value for item in found}


def test_json_has_every_area_and_says_that_all_is_well(eft: Eft, kernels: dict[str, str | None]) -> None:
    done = eft("doctor", "--json")
    report = json.loads(done.out)
    assert done.code == 0
    assert (report["ok"], report["problems"]) == (True, [])
    assert set(report) == {"ok", "problems", "software", "machine", "storage", "plugins", "settings"}
    assert report["software"]["eft"]["value"] == version()
    assert report["software"]["torch"]["value"] == importlib.metadata.version("torch")
    assert report["software"]["kernels: reference"]["value"] == "works"
    assert report["software"]["kernels: triton"]["value"] == "needs a GPU"
    assert report["software"]["kernels"]["value"] == "reference"


@pytest.mark.parametrize(
    ("reason", "variables", "expected"),
    [
        ("not installed", {}, "not used: not installed"),
        (
            None,
            {},
            "used in training; prompts are left to Triton, as cache.block_size is 16, and it reads multiples of 256",
        ),
        (None, {"EFT_CACHE_BLOCK_SIZE": "512"}, "used for prompts and in training"),
        (
            None,
            {"EFT_CACHE_BLOCK_SIZE": "256", "EFT_CACHE_KV_CACHE_DTYPE": "int8"},
            "used in training; prompts are left to Triton, as the cache holds int8, and it reads bfloat16",
        ),
        (
            None,
            {"EFT_CACHE_BLOCK_SIZE": "256", "EFT_MODEL_DTYPE": "float32"},
            "used in training; prompts are left to Triton, as the cache holds float32, and it reads bfloat16",
        ),
    ],
)
def test_what_flash_attn_is_used_for(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr("kernels.triton.flash.unavailable", lambda: reason)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert by_name(checks.find_flash_attention())["flash-attn"] == expected


def test_text_names_what_is_broken_and_exits_with_1(
    eft: Eft, kernels: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_clash", lambda: "two of a name")
    kernels["reference"] = "no torch"
    monkeypatch.setenv("EFT_SERVER_PROT", "1")
    done = eft("doctor")
    assert done.code == 1
    broken = done.out[done.out.index("Broken:") :]
    assert "two of a name" in broken
    assert "no backend of the ops works here" in broken
    assert "environment EFT_SERVER_PROT: unknown setting" in broken


def test_secrets_are_hidden(eft: Eft, kernels: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("EFT_SERVER_API_KEY", "EFT_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@hub.example/x")
    monkeypatch.setenv("HF_HOME", "/models")
    out = eft("doctor", "--json").out
    assert "hunter2" not in out
    found = by_name(checks.find_environment())
    assert [found[name] for name in secrets] == ["set (hidden)"] * 4
    assert found["HF_ENDPOINT"] == "https://(hidden)@hub.example/x"
    assert found["HF_HOME"] == "/models"


def test_the_settings_that_differ_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name(checks.find_environment())["settings"] == "all at their defaults"
    (tmp_path / "eft.toml").write_text("[server]\nport = 1\n")
    found = by_name(checks.find_environment())
    assert found["settings"] == "changed: server.port"
    assert found["file"] == str(tmp_path / "eft.toml")


@pytest.mark.parametrize(
    ("text", "model", "sets"),
    [(X86, "Imaginary CPU 9000", "avx, fma, avx2, avx512f, amx_int8"), (ARM, None, "asimd, i8mm")],
)
def test_the_processor_as_the_system_describes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, model: str | None, sets: str
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(checks, "_CPUINFO", path)
    found = by_name(checks.find_machine())
    assert found["instruction sets"] == sets
    if model:
        assert found["processor"] == model


def test_systems_without_these_files_are_described_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(checks, "_CGROUP_LIMIT", tmp_path / "none")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = by_name(checks.find_machine())
    assert found["instruction sets"] == "unknown"
    assert found["C++ compiler"] == "none (no-such-compiler of CXX is not found)"
    assert "memory limit of the container" not in found


def test_a_package_that_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    finding = checks._package("torch")
    assert finding.value == "missing"
    assert finding.problem is not None


def test_only_what_is_installed_with_eft_can_be_missing() -> None:
    """A tool of the tests that a plain installation lacks made `eft doctor` fail there."""
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        required = {re.split("[^a-z0-9-]", line)[0] for line in tomllib.load(file)["project"]["dependencies"]}
    assert set(checks._PACKAGES) <= required


def test_the_caches_and_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFT_CACHE_DIR", str(tmp_path / "not" / "yet"))
    hub = tmp_path / "hub"
    blobs = hub / "models--org--some--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(b"x" * 2048)
    (blobs / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    found = by_name(checks.find_storage())
    assert found["cache of Eft"].startswith(f"{tmp_path}/not/yet (")
    assert found["cache of Eft"].endswith(" free)")
    assert found["demo model"].startswith("not here yet")
    assert found["hub model org/some--model"] == "2.0 KiB"


def test_sizes() -> None:
    assert [checks.size(n) for n in (0, 1023, 1024, 5 * 1024**3, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_plugins_are_listed_and_broken_ones_named(
    eft: Eft, kernels: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "pond-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pond\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[eft.models]\nNewtForCausalLM = pond:Newt\n[eft.hooks]\nlog = json:dumps\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = eft("doctor", "--json")
    report = json.loads(done.out)
    assert report["plugins"]["eft.hooks: log"] == {"value": "json:dumps of pond 1.2", "problem": None}
    assert report["plugins"]["eft.models: NewtForCausalLM"]["value"] == "pond:Newt of pond 1.2"
    assert "No module named 'pond'" in report["plugins"]["eft.models: NewtForCausalLM"]["problem"]
    assert done.code == 1
