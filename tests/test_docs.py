"""Documents name files that are there, and documents and docstrings are in plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import PACKAGES, ROOT, modules, tracked

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|cpp|h|yaml|yml|md|jinja)|[\w.-]+(?:/[\w.-]+)*/")
"""A file or a folder, as documents write it between backticks."""

NOT_OURS = {
    "llama.cpp",
    # docs/state.md: folders of a state directory.
    "jobs/ID/", "uploads/", "checkpoints/step-N/", "result/", "adapters/NAME/N/", "batches/ID/",
    "files/ID/", "models/NAME/N/", "prepared/",
    # docs/state.md: folders of a shared store.
    "versions/NAME/N/",
}  # fmt: skip

BANNED = re.compile(r"\b(whoever|nobody|somebody|so\s+many)\b", re.IGNORECASE)
READ = {".py", ".cpp", ".h", ".md", ".yaml", ".yml"}
"""Ends of the names of files that are ours to word; rows of the example recipes are not."""

OPENERS = {"What", "Whether", "Whoever", "Who", "Whose", "How", "Where", "Which", "When", "Of"}
"""Words with which no docstring begins: it opens with a noun phrase, or an imperative."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(path: Path) -> None:
    files = {str(file.relative_to(ROOT)) for file in tracked()}
    known = files | {str(parent) for file in files for parent in Path(file).parents}
    text = path.read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([^`\s]+)`", text) if FILE.fullmatch(name)} - NOT_OURS
    lost = [name for name in named if not any(f"/{file}".endswith("/" + name.rstrip("/")) for file in known)]
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert not lost + [link for link in links if not (path.parent / link).exists()]


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert not {room for room in rooms if f"{room}/" not in text}


def test_words_are_plain() -> None:
    ours = [path for path in tracked() if path.relative_to(ROOT).parts[0] in (*PACKAGES, "docs")]
    texts = [path for path in [*ours, ROOT / "README.md"] if path.suffix in READ]
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts
        for match in BANNED.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def test_docstrings_open_with_a_noun_phrase_or_an_imperative() -> None:
    found = [
        f"{name}: {text.splitlines()[0]}"
        for name, path in modules().items()
        for text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if text and re.split(r"\W", text)[0] in OPENERS
    ]
    assert not found


WIRE = "runtime.api"
"""Structs of this part have the fields of other people's APIs, whose documentation says what they are."""
BY_ARCHITECTURE = "runtime.checkpoints.gguf.configs"
"""One function for each architecture, of its name: the module says what they do."""


def test_public_classes_and_functions_have_docstrings() -> None:
    missing = []
    for name, path in modules().items():
        if name == BY_ARCHITECTURE:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            wire = name.startswith(WIRE) and isinstance(node, ast.ClassDef)
            if not node.name.startswith("_") and not wire and ast.get_docstring(node) is None:
                missing.append(f"{name}.{node.name}")
    assert not missing


def test_every_error_code_is_explained() -> None:
    """In docs/troubleshooting.md, or among the errors of jobs in docs/state.md; and no code that there is not."""
    sources = [path.read_text(encoding="utf-8") for path in tracked() if path.relative_to(ROOT).parts[0] == "runtime"]
    literal = re.compile(r"\b(?:default_)?code ?= ?\"([a-z_]+)\"")
    codes = {code for text in sources for code in literal.findall(text)}
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("troubleshooting.md", "state.md")]
    named = [set(re.findall(r"`([a-z]+(?:_[a-z]+)*)`", page)) for page in pages]
    assert len(codes) > 40
    assert codes - named[0] - named[1] == set()
    first_cells = {
        code
        for line in pages[0].splitlines()
        for code in re.findall(r"`([a-z_]+)`", line.split("|")[1] if "|" in line else "")
    }
    assert first_cells - codes == set()


def test_llms_txt_names_every_document() -> None:
    text = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= links
    assert all((ROOT / "docs" / link).exists() for link in links)
