"""Code that lies beside a model is never run, and nothing is asked about it on a terminal."""

import ast
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOSTILE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"


def of_peft(call: ast.Call) -> bool:
    """True for PEFT's own loading, which runs no code of an adapter's."""
    return ast.unparse(call.func) == "PeftModel.from_pretrained"


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of a `from_pretrained` in what we ship."""
    found = []
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr
            if isinstance(node, ast.Call) and named == "from_pretrained" and not of_peft(node):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_call_says_that_no_code_is_to_be_run() -> None:
    assert len(calls()) >= 3
    for place, call in calls():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        said = given.get("trust_remote_code")
        assert isinstance(said, ast.Constant), place
        assert said.value is False, place


@pytest.mark.parametrize("file", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_with_code_beside_it(tmp_path: Path, file: str) -> None:
    """On a terminal, where transformers would ask whether to run it."""
    (tmp_path / "evil.py").write_text(HOSTILE)
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / file).write_bytes(b"{}")
    program = (
        "import sys; from pathlib import Path\n"
        "from runtime.model.config import ModelLoadError\n"
        "from runtime.checkpoints.hf_tokenizer import load_tokenizer\n"
        "try: load_tokenizer(Path(sys.argv[1]), {}, {})\n"
        "except ModelLoadError: sys.exit(7)\n"
    )
    terminal, inside = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=inside,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(inside)
        os.close(terminal)
    assert done.returncode == 7, done.stderr[-2000:]
    assert "y/N" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()
