"""The lock files: whole, with hashes, as pyproject.toml asks; and the script that audits them, over a stand-in."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SERVE, DEV, TORCH = "requirements.lock", "requirements-dev.lock", "requirements-torch.lock"
DOCS = "requirements-docs.lock"


def locked(name: str) -> dict[str, list[Requirement]]:
    """Package → its entries: several where versions differ between Pythons."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found: dict[str, list[Requirement]] = {}
    for block in re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*", text, re.MULTILINE):
        first, *hashes = block.split("\n")
        requirement = Requirement(first.rstrip("\\ "))
        assert hashes, f"{requirement.name} has no hash"
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), requirement.name
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement.name
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def version_of(requirement: Requirement) -> str:
    return str(requirement.specifier).removeprefix("==")


def asked(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*lines, *PROJECT["build-system"]["requires"])]


@pytest.mark.parametrize(("file", "extras"), [(SERVE, ()), (DEV, ("dev",))])
def test_what_is_asked_for_is_locked(file: str, extras: tuple[str, ...]) -> None:
    found = {**locked(TORCH), **locked(file)}
    for requirement in asked(*extras):
        entries = found[canonicalize_name(requirement.name)]
        for entry in entries:
            assert requirement.specifier.contains(version_of(entry)), (
                f"{requirement} is locked as {entry}: run .ci/lock"
            )


def test_what_builds_the_documentation_is_locked() -> None:
    """It has an environment of its own, with nothing of the server's."""
    found = locked(DOCS)
    for line in PROJECT["project"]["optional-dependencies"]["docs"]:
        requirement = Requirement(line)
        (entry,) = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version_of(entry)), f"{requirement} is locked as {entry}: run .ci/lock"
    assert not {"torch", "transformers", "litestar"} & found.keys()


def test_torch_is_locked_apart() -> None:
    """Its builds have hashes of their own wherever they come from."""
    assert "torch" in locked(TORCH)
    for file in (SERVE, DEV):
        assert not {name for name in locked(file) if re.match(r"torch$|nvidia-|cuda-", name)}
    assert not locked(SERVE).keys() & locked(TORCH).keys()


def test_serving_has_the_same_versions_in_both() -> None:
    serve, dev = locked(SERVE), locked(DEV)
    assert {name: list(map(version_of, entries)) for name, entries in serve.items()} == {
        name: list(map(version_of, dev[name])) for name in serve
    }


def test_no_known_hole_is_locked() -> None:
    """h11 before 0.16 takes malformed chunks, with which requests are smuggled past a proxy."""
    (h11,) = locked(SERVE)["h11"]
    assert tuple(map(int, version_of(h11).split(".")[:2])) >= (0, 16)


STAND_IN = """#!{python}
import json, sys
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
answer = json.loads({answers!r}).get(arguments["--vulnerability-service"])
if answer is None:
    sys.exit(1)
open(arguments["--output"], "w").write(json.dumps({{"dependencies": answer}}))
"""
SKIPPED = [{"name": "h11", "skip_reason": "not found"}]
FINE = [{"name": "h11", "version": "0.16.0", "vulns": []}]
HOLED = [{"name": "h11", "version": "0.14.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["0.16.0"], "aliases": []}]}]


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        ({"pypi": FINE}, 0, "2 packages looked up, 0 findings"),
        ({"pypi": HOLED}, 1, "h11 0.14.0: PYSEC-1, fixed in 0.16.0"),
        ({"pypi": SKIPPED, "osv": HOLED}, 1, "PYSEC-1"),
        ({"pypi": SKIPPED}, 0, "skipped, nothing was looked up"),  # which pip-audit itself calls no known vulnerability
        ({}, 0, "skipped, nothing was looked up"),
    ],
)
def test_the_audit(tmp_path: Path, answers: dict[str, object], code: int, said: str) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(STAND_IN.format(python=sys.executable, answers=json.dumps(answers)))
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "audit")],
        env={**os.environ, "PIP_AUDIT": str(program)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout
