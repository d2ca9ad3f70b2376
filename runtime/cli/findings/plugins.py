"""What other packages bring: models and hooks."""

from importlib.metadata import EntryPoint, entry_points

from runtime.cli.findings import Finding

AREA = "plugins"
GROUPS = ("eft.models", "eft.hooks")
"""Entry points; each has its own page in the documentation."""


def find() -> list[Finding]:
    return [finding for group in GROUPS for finding in _group(group)]


def _group(group: str) -> list[Finding]:
    found = sorted(entry_points(group=group), key=lambda entry: entry.name)
    return [_entry(group, entry) for entry in found] or [Finding(AREA, group, "none")]


def _entry(group: str, entry: EntryPoint) -> Finding:
    """Whether it can be imported: a server would not start, or not serve that model."""
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
    name, value = f"{group}: {entry.name}", f"{entry.value} of {package}"
    try:
        entry.load()
    except Exception as error:  # whatever its import raises is what is to be reported
        return Finding(AREA, name, value, f"{name} of {package} cannot be loaded: {type(error).__name__}: {error}")
    return Finding(AREA, name, value)
