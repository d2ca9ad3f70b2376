"""Imports point one way, the layout is the one in the README, and no file knows the machine it was written on.

Imports are read from the syntax tree. Who may import whom goes for imports inside functions too; what comes
along when a module is imported does not.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tree import PACKAGES, ROOT, modules, tracked

SUBPARTS = {"runtime.trainer": {"recipe", "data", "evaluation", "plan", "jobs", "launched"}}
"""Packages whose packages are parts of their own; what lies beside these is the part with the package's name."""

# Part → the parts of ours that it may import, besides itself and COMMON. A part is a package or module right below
# `runtime`, one of SUBPARTS, or one of the other top-level packages. Every part is here, from the bottom to the top:
# each may import only what stands above it in this table, so no circle is possible.
ALLOWED: dict[str, set[str]] = {
    "settings": set(),
    "kernels": set(),
    "runtime.errors": set(),
    "runtime.messages": {"runtime.errors"},
    "runtime.events": set(),
    "runtime.support": {"runtime.errors", "settings"},
    "runtime.text": set(),
    "runtime.blocks": set(),
    "runtime.scheduler": {"runtime.blocks"},
    "runtime.access": set(),
    "runtime.responses": set(),
    "runtime.feedback": set(),
    "runtime.metrics": {"runtime.events"},
    "runtime.model": {"kernels"},
    "runtime.checkpoints": {"kernels", "runtime.text", "runtime.model"},
    "runtime.adapters": {"runtime.text", "runtime.metrics", "runtime.model", "runtime.checkpoints"},
    "runtime.trainer.recipe": {"runtime.adapters"},
    "runtime.trainer.data": {"runtime.text", "runtime.adapters", "runtime.trainer.recipe"},
    "runtime.trainer.evaluation": {"runtime.text", "runtime.trainer.recipe", "runtime.trainer.data"},
    "runtime.trainer": {
        "kernels",
        "runtime.events",
        "runtime.model",
        "runtime.trainer.recipe",
        "runtime.trainer.data",
    },
    "runtime.trainer.plan": {
        "runtime.text",
        "runtime.model",
        "runtime.adapters",
        "runtime.trainer.recipe",
        "runtime.trainer.data",
        "runtime.trainer.evaluation",
        "runtime.trainer",
    },
    "runtime.trainer.launched": {
        "runtime.events",
        "runtime.trainer.recipe",
        "runtime.trainer.data",
        "runtime.trainer",
    },
    "runtime.trainer.jobs": {
        "runtime.events",
        "runtime.metrics",
        "runtime.adapters",
        "runtime.trainer.recipe",
        "runtime.trainer.launched",
    },
    "runtime.files": set(),
    "runtime.batches": {"runtime.files"},
    "runtime.workers": {
        "kernels",
        "runtime.events",
        "runtime.text",
        "runtime.model",
        "runtime.checkpoints",
        "runtime.trainer",
    },
    "runtime.engine": {
        "runtime.events",
        "runtime.text",
        "runtime.responses",
        "runtime.feedback",
        "runtime.blocks",
        "runtime.scheduler",
        "runtime.metrics",
        "runtime.model",
        "runtime.checkpoints",
        "runtime.adapters",
        "runtime.trainer.recipe",
        "runtime.trainer.data",
        "runtime.trainer.evaluation",
        "runtime.trainer",
        "runtime.trainer.plan",
        "runtime.trainer.launched",
        "runtime.trainer.jobs",
        "runtime.files",
        "runtime.batches",
        "runtime.workers",
    },
    "runtime.llm": {"runtime.engine"},
    "runtime": {"runtime.llm"},
    "runtime.api": {
        "runtime.text",
        "runtime.access",
        "runtime.responses",
        "runtime.feedback",
        "runtime.metrics",
        "runtime.model",
        "runtime.checkpoints",
        "runtime.adapters",
        "runtime.engine",
        "runtime.trainer.recipe",
        "runtime.trainer.jobs",
        "runtime.files",
        "runtime.batches",
    },
    "runtime.cli": {
        "runtime.access",
        "runtime.metrics",
        "runtime.model",
        "runtime.checkpoints",
        "runtime.adapters",
        "runtime.trainer.recipe",
        "runtime.trainer.data",
        "runtime.trainer.plan",
        "runtime.workers",
        "runtime.engine",
        "runtime.llm",
        "runtime.api",
    },
    "runtime.__main__": {"runtime.cli"},
}

COMMON = {"settings", "runtime.errors", "runtime.messages", "runtime.support"}
"""Known to all parts of `runtime` below them in the table."""

LIGHT = {
    "runtime.blocks",
    "runtime.scheduler",
    "runtime.events",
    "runtime.trainer.recipe",
    "runtime.files",
    "runtime.batches",
    *COMMON,
}
"""Parts that may reach none of HEAVY, directly or through anything they import."""

HEAVY = {"torch", "numpy", "transformers", "litestar", "uvicorn"}


def imports(source: str, *, everywhere: bool) -> Iterator[str]:
    """Dotted names that the module imports; `from a import b` gives both a and a.b.

    `everywhere`: also those inside functions, and those under `if TYPE_CHECKING:`.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not everywhere:
            pending += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


@functools.cache
def graph(*, everywhere: bool) -> dict[str, frozenset[str]]:
    """Module → what it imports: our modules, and the top names of everybody else's packages."""
    known = modules()
    edges = {}
    for name, path in known.items():
        used = set()
        for target in imports(path.read_text(encoding="utf-8"), everywhere=everywhere):
            top = target.split(".")[0]
            if top not in PACKAGES or target in known:
                used.add(target if top in PACKAGES else top)
        edges[name] = frozenset(used - {name})
    return edges


def part(module: str) -> str:
    pieces = module.split(".")
    if pieces[0] != "runtime":
        return pieces[0]
    owner = ".".join(pieces[:2])
    return ".".join(pieces[:3]) if len(pieces) > 2 and pieces[2] in SUBPARTS.get(owner, ()) else owner


def reachable(start: str) -> dict[str, str]:
    """Everything that comes along when `start` is imported → the module that brings it."""
    edges = graph(everywhere=False)
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
    assert set(imports(source, everywhere=True)) == {"a.b", "c", "c.d", "e", "g"}
    assert set(imports(source, everywhere=False)) == {"a.b", "c", "c.d"}


def test_every_part_has_its_place_in_the_table() -> None:
    assert {part(name) for name in modules()} == ALLOWED.keys()
    order = list(ALLOWED)
    for owner, allowed in ALLOWED.items():
        below = [other for other in allowed if order.index(other) >= order.index(owner)]
        assert not below, f"{owner} may import {below}, which stands below it"


@pytest.mark.parametrize("owner", ALLOWED)
def test_imports_point_one_way(owner: str) -> None:
    order = list(ALLOWED)
    common = {name for name in COMMON if order.index(name) < order.index(owner)} if owner != "kernels" else set()
    allowed = {owner, *ALLOWED[owner], *common}
    edges = [(name, target) for name, used in graph(everywhere=True).items() for target in used if part(name) == owner]
    assert not {f"{name} imports {target}" for name, target in edges if is_ours(target) and part(target) not in allowed}
    used = {part(target) for _, target in edges if is_ours(target)}
    assert not ALLOWED[owner] - used, "the table allows more than there is"


def test_the_architecture_page_has_the_same_table() -> None:
    """Parts of a row are one; `all above` is any part above, but those that the row takes out."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`.+`) \| .+ \| (.+) \|$", page.partition("| imports |")[2].partition("\n\n")[0], re.M)
    seen: set[str] = set()
    for names, cell in table:
        parts = {part_of_page(name) for name in re.findall(r"`([^`]+)`", names)}
        used = set().union(*(ALLOWED[part] for part in parts)) - COMMON - parts
        listed = set() if cell == "–" else {part_of_page(name) for name in cell.split(" but ")[0].split(", ")}
        if cell.startswith("all above"):
            without = {part_of_page(name) for name in cell.partition(" but ")[2].split(", ") if name}
            assert used <= seen - without, f"{names}: {sorted(used - seen | used & without)}"
        else:
            assert used == listed, f"{names}: {sorted(used ^ listed)}"
        assert not parts & seen
        seen |= parts
    assert seen == ALLOWED.keys() - {"runtime.__main__"}


def part_of_page(name: str) -> str:
    path = name.strip("/").removesuffix("/__init__").removeprefix("runtime/").replace("/", ".")
    return path if path in ("settings", "kernels", "runtime") else f"runtime.{path}"


def is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def test_no_module_imports_itself_through_others() -> None:
    """Not even for its types, or inside a function."""
    edges = {name: {target for target in used if target in modules()} for name, used in modules_used().items()}
    while leaves := [name for name, used in edges.items() if not used]:
        for name in leaves:
            del edges[name]
        for used in edges.values():
            used.difference_update(leaves)
    assert not edges, f"in a circle, or importing one: {sorted(edges)}"


def modules_used() -> dict[str, set[str]]:
    """Module → those whose names it uses: a package counts where a name of its own is imported from it, not where
    one of its modules is."""
    used: dict[str, set[str]] = {}
    for name, path in modules().items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= names & modules().keys()
                targets |= {node.module or ""} if names - modules().keys() else set()
        used[name] = targets - {name}
    return used


def test_no_type_has_the_name_of_another() -> None:
    """Classes and aliases of types, wherever they stand."""
    places: dict[str, list[str]] = {}
    for module, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else ()
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            names += [node.name] if isinstance(node, ast.ClassDef) else []
            for name in names:
                if re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
                    places.setdefault(name, []).append(module)
    assert not {name: found for name, found in places.items() if len(found) > 1}


OWNERS = {
    "handle": "runtime.api",
    "service": "runtime.engine",
    "engine": "runtime.engine",
    "scheduler": "runtime.scheduler",
    "executor": "runtime.workers",
    "worker": "runtime.workers",
    "decoder": "runtime.model",
    "run": "runtime.trainer",
    "jobs": "runtime.trainer.jobs",
    "library": "runtime.adapters",
}
"""What objects of the large classes are called in other parts, and the part that their class is of."""


def test_no_part_hangs_attributes_on_objects_of_others() -> None:
    """What a part needs of another it passes as an argument, or there is a method for it."""
    wrong = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                holder = ast.unparse(node.value).split(".")[-1].lstrip("_")
                if OWNERS.get(holder, part(name)) != part(name):
                    wrong.append(f"{name} sets {ast.unparse(node)}")
    assert not wrong


@pytest.mark.parametrize("owner", sorted(LIGHT))
def test_light_parts_reach_nothing_heavy(owner: str) -> None:
    inside = [name for name in graph(everywhere=True) if part(name) == owner]
    assert inside, f"{owner} has no modules"
    for name in inside:
        assert not HEAVY & graph(everywhere=True)[name], name
        reached = reachable(name)
        assert not {f"{heavy} through {reached[heavy]}" for heavy in HEAVY & reached.keys()}, name


def test_the_server_opens_its_socket_before_torch_is_imported() -> None:
    """It answers probes while the engine's thread imports torch, half of the time that a start takes."""
    reached = reachable("runtime.api.server")
    assert not {f"{heavy} through {reached[heavy]}" for heavy in {"torch", "transformers"} & reached.keys()}


def test_recipes_and_plans_need_no_torch() -> None:
    """They are checked where there is no engine, and while one is busy."""
    for start in ("runtime.trainer.recipe", "runtime.trainer.plan.plan", "runtime.trainer.plan.plan"):
        reached = reachable(start)
        assert not {f"{heavy} through {reached[heavy]}" for heavy in HEAVY & reached.keys()}, start


def test_jobs_know_neither_http_nor_tensors() -> None:
    inside = [name for name in graph(everywhere=True) if name.startswith("runtime.trainer.jobs")]
    assert inside
    for name in inside:
        reached = reachable(name)
        assert not {f"{name}: {heavy} through {reached[heavy]}" for heavy in HEAVY & reached.keys()}
        assert not {
            target for target in graph(everywhere=True)[name] if part(target) in ("runtime.workers", "runtime.api")
        }


def test_top_level_layout() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    folders = {"runtime", "kernels", "settings", "tests", "benchmarks", "docs", ".ci"}
    files = {
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "Makefile", "Dockerfile",
        "pyproject.toml", "requirements.lock", "requirements-dev.lock", "requirements-docs.lock",
        "requirements-torch.lock", ".dockerignore", ".gitignore",
    }  # fmt: skip
    assert names == folders | files


MAX_LINES, CRUMB_LINES, MAX_CRUMBS = 600, 40, 0.12
"""Longest module of `runtime`; what counts as a crumb, and their largest share: `__init__`, one of a kind."""


def test_modules_are_neither_crumbs_nor_tomes() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for name, path in modules().items()
        if name.split(".")[0] == "runtime"
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}
    crumbs = sorted(name for name, length in lengths.items() if length <= CRUMB_LINES)
    assert len(crumbs) <= MAX_CRUMBS * len(lengths), "\n".join(crumbs)


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
