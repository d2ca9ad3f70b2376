"""Imports point one way, the layout is the one in the README, and no file knows the machine it was written on.

Imports are read from the syntax tree. Who may import whom goes for imports inside functions too; what comes
along when a module is imported does not.
"""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("runtime", "kernels", "settings")

TEXT = {"runtime.tokenizer", "runtime.detokenizer", "runtime.chat_template", "runtime.special_text"}
"""Between text and token ids."""

# Part → the parts of ours that it may import, besides itself, settings and COMMON. A part is a package or
# module right below `runtime`, or one of the other top-level packages.
ALLOWED: dict[str, set[str]] = {
    "settings": set(),
    "kernels": set(),
    "runtime.blocks": set(),
    "runtime.scheduler": {"runtime.blocks"},
    "runtime.workers": {"kernels", "runtime.durable", *TEXT},
    "runtime.trainer": {
        "runtime.workers",
        "runtime.engine",
        "runtime.apart",
        "runtime.background",
        "runtime.durable",
        "runtime.logs",
        "runtime.metrics",
        "kernels",
        *TEXT,
    },
    "runtime.verification": {"kernels", "runtime.model_loading", "runtime.workers", *TEXT},
    "runtime.model_loading": {"kernels", "runtime.workers", "runtime.logs"},
    "runtime.ranks": {
        "runtime.workers",
        "runtime.trainer",
        "runtime.assembly",
        "runtime.model_loading",
        "runtime.logs",
        "kernels",
    },
    "runtime.hooks": {"runtime.logs"},
    "runtime.delivery": {"runtime.scheduler", "runtime.hooks", "runtime.metrics", *TEXT},
    "runtime.beams": {"runtime.scheduler", "runtime.delivery"},
    "runtime.engine": {
        "runtime.beams",
        "runtime.scheduler",
        "runtime.blocks",
        "runtime.workers",
        "runtime.metrics",
        "runtime.delivery",
        "runtime.hooks",
        *TEXT,
    },
}

COMMON = {"runtime.errors", "runtime.messages", "runtime.failpoints"}
"""What any part of `runtime` may import: nouns, and nothing that does work."""

LIGHT = {"runtime.blocks", "runtime.scheduler", "settings", *COMMON}
"""Parts that may reach none of HEAVY, directly or through anything they import."""

HEAVY = {"torch", "numpy", "transformers", "litestar", "uvicorn"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, *, deferred: bool) -> Iterator[str]:
    """Dotted names that the module imports; `from a import b` gives both a and a.b.

    `deferred`: also those inside functions. Never those under `if TYPE_CHECKING:`.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif deferred or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


@functools.cache
def graph(*, deferred: bool) -> dict[str, frozenset[str]]:
    """Module → what it imports: our modules, and the top names of everybody else's packages."""
    known = modules()
    edges = {}
    for name, path in known.items():
        used = set()
        for target in imports(path.read_text(encoding="utf-8"), deferred=deferred):
            top = target.split(".")[0]
            if top not in PACKAGES or target in known:
                used.add(target if top in PACKAGES else top)
        edges[name] = frozenset(used - {name})
    return edges


def part(module: str) -> str:
    pieces = module.split(".")
    return ".".join(pieces[:2]) if pieces[0] == "runtime" else pieces[0]


def reachable(start: str) -> dict[str, str]:
    """Everything that comes along when `start` is imported → the module that brings it."""
    edges = graph(deferred=False)
    seen: dict[str, str] = {}
    pending = [start]
    while pending:
        module = pending.pop()
        pieces = module.split(".")
        parents = {".".join(pieces[:n]) for n in range(1, len(pieces))} & edges.keys()
        for target in edges.get(module, frozenset()) | parents:
            if target not in seen:
                seen[target] = module
                pending.append(target)
    return seen


def test_the_reader_of_imports_sees_them_all() -> None:
    source = "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    import g\n"
    assert set(imports(source, deferred=True)) == {"a.b", "c", "c.d", "g"}
    assert set(imports(source, deferred=False)) == {"a.b", "c", "c.d"}


@pytest.mark.parametrize("owner", sorted(ALLOWED))
def test_imports_point_one_way(owner: str) -> None:
    inside = {name: used for name, used in graph(deferred=True).items() if part(name) == owner}
    assert inside, f"{owner} has no modules"
    allowed = {owner, "settings", *ALLOWED[owner]} | (COMMON if owner.startswith("runtime") else set())
    wrong = {
        f"{name} imports {target}"
        for name, used in inside.items()
        for target in used
        if target.split(".")[0] in PACKAGES and target != "runtime" and part(target) not in allowed
    }
    assert not wrong


def test_nothing_below_the_api_imports_it() -> None:
    above = {"runtime.api", "runtime.cli", "runtime.__main__"}
    wrong = {
        f"{name} imports {target}"
        for name, used in graph(deferred=True).items()
        for target in used
        if part(target) in above and part(name) not in above
    }
    assert not wrong


@pytest.mark.parametrize("owner", sorted(LIGHT))
def test_light_parts_reach_nothing_heavy(owner: str) -> None:
    inside = [name for name in graph(deferred=True) if part(name) == owner]
    assert inside, f"{owner} has no modules"
    for name in inside:
        assert not HEAVY & graph(deferred=True)[name], name
        reached = reachable(name)
        assert not {f"{heavy} through {reached[heavy]}" for heavy in HEAVY & reached.keys()}, name


def test_recipes_and_plans_need_no_torch() -> None:
    """They are checked where there is no engine, and while one is busy."""
    for start in ("runtime.trainer.recipe", "runtime.trainer.plan", "runtime.trainer.summary"):
        reached = reachable(start)
        assert not {f"{heavy} through {reached[heavy]}" for heavy in HEAVY & reached.keys()}, start


def test_jobs_know_neither_http_nor_tensors() -> None:
    inside = [name for name in graph(deferred=True) if name.startswith("runtime.trainer.jobs")]
    assert inside
    for name in inside:
        reached = reachable(name)
        assert not {f"{name}: {heavy} through {reached[heavy]}" for heavy in HEAVY & reached.keys()}
        assert not {
            target for target in graph(deferred=True)[name] if part(target) in ("runtime.workers", "runtime.api")
        }


def tracked() -> list[Path]:
    """The project's files: what git tracks, and what it would if it were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("this is no git checkout, so which files are the project's is not known")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_top_level_layout() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    folders = {"runtime", "kernels", "settings", "tests", "benchmarks", "docs", ".ci"}
    files = {
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "Dockerfile", "pyproject.toml",
        ".dockerignore", ".gitignore",
    }  # fmt: skip
    assert names == folders | files


def test_readme_names_every_folder_of_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if path.parent != ROOT}
    assert not {name for name in folders if f"{name}/" not in readme}


def test_no_file_knows_a_machine_or_a_registry() -> None:
    hosts = ["pypi.org", "pythonhosted.org", "download.pytorch.org", "deb.debian.org", "registry.npmjs.org"]
    pattern = re.compile("|".join([r"(?<![\w.])/(?:work|root)/", *map(re.escape, hosts)]))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path != Path(__file__) and b"\0" not in (content := path.read_bytes())
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found
