"""`.ci/python` on machines that lack things, played by a PATH of small stand-ins."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("bash", "dirname", "env", "touch", "cp", "mkdir")

PYTHON = """
case "$*" in
*version_info\\ *) exit {old} ;;
*ensurepip*) [ -e {root}/has-venv ] ;;
*%d.%d-venv*) echo python3.11-venv ;;
*"-m pip --version"*) exit 1 ;;
*"-m venv"*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
*) echo "python $*" >> {root}/log ;;
esac
"""

APT = """
echo "apt-get $*" >> {root}/log
case "$*" in *venv*) touch {root}/has-venv ;; esac
"""


class Machine:
    """A folder that is all the PATH there is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")

    def has(self, name: str, script: str = "", **values: object) -> "Machine":
        path = self.bin / name
        path.write_text("#!/bin/bash\n" + script.format(root=self.root, **values))
        path.chmod(0o755)
        return self

    def user(self, uid: int) -> "Machine":
        return self.has("id", f"echo {uid}")

    def install(self) -> tuple[int, str, list[str]]:
        """Exit code and stderr of `.ci/python run`, and what was called."""
        done = subprocess.run(
            ["bash", str(ROOT / ".ci" / "python"), "run"],
            env={"PATH": str(self.bin), "VENV": str(self.root / "venv")},
            text=True,
            capture_output=True,
            check=False,
        )
        log = self.root / "log"
        return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_everything_there(machine: Machine) -> None:
    (machine.root / "has-venv").touch()
    code, said, calls = machine.user(1000).has("python3", PYTHON, old=0).has("curl").install()
    assert code == 0, said
    assert len(calls) == 2
    assert calls[0].endswith("install --editable .")
    assert calls[1] == "python -m kernels.build"
    assert (machine.root / "venv" / ".installed-run").exists()


def test_kernels_that_do_not_compile_are_no_error(machine: Machine) -> None:
    (machine.root / "has-venv").touch()
    script = PYTHON.replace('case "$*" in', 'case "$*" in\n*kernels.build*) exit 1 ;;', 1)
    code, said, _ = machine.user(1000).has("python3", script, old=0).has("curl").install()
    assert code == 0, said
    assert "the C++ kernels could not be compiled" in said
    assert (machine.root / "venv" / ".installed-run").exists()


def test_root_gets_the_missing_packages(machine: Machine) -> None:
    code, said, calls = machine.user(0).has("python3", PYTHON, old=0).has("apt-get", APT).install()
    assert code == 0, said
    install = "apt-get -o DPkg::Lock::Timeout=600 install -y --no-install-recommends"
    assert calls[:2] == ["apt-get update -q", f"{install} python3.11-venv"]
    assert f"{install} curl" in calls
    assert calls[-2].endswith("install --editable .")


def test_others_are_told_what_to_install(machine: Machine) -> None:
    code, said, calls = machine.user(1000).has("python3", PYTHON, old=0).has("apt-get", APT).install()
    assert (code, calls) == (1, [])
    assert "sudo apt-get install python3.11-venv" in said


def test_no_python_and_no_apt(machine: Machine) -> None:
    code, said, _ = machine.user(0).install()
    assert code == 1
    assert "Python 3.11 or newer is needed" in said
    assert "please install python3 python3-venv" in said


def test_a_python_that_is_too_old_is_not_used(machine: Machine) -> None:
    code, said, calls = machine.user(1000).has("python3", PYTHON, old=1).has("apt-get", APT).install()
    assert (code, calls) == (1, [])
    assert "sudo apt-get install python3 python3-venv" in said
