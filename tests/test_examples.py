"""Every example that asks for text says how much: a small model may go on for as long as its context lasts."""

import re
from pathlib import Path

import pytest

from runtime.cli.serve import banner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

ASKS = re.compile(r"(?:chat/completions|/v1/completions)\b.*-d|completions\.create\(|\.(?:generate|chat)\(", re.DOTALL)


def blocks(text: str) -> list[str]:
    return re.findall(r"```(?:sh|python)\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_have_a_limit(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        asked = len(ASKS.findall(block))
        assert block.count("max_tokens") >= min(asked, 1), block


def test_the_readme_asks() -> None:
    """So that the test above has something to look at."""
    found = [block for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if ASKS.search(block)]
    assert len(found) >= 3


def test_what_the_server_prints_has_a_limit() -> None:
    assert banner("http://127.0.0.1:8000", "m", needs_key=True).count("max_tokens") == 2
