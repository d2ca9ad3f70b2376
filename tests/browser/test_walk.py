"""A newcomer's way on the demo model: open the page, paste 60 rows, train, chat with the result. Slow.

    EFT_SCREENSHOTS=docs/images pytest -m slow tests/browser/test_walk.py -s

prints the time of every step and writes the pictures of the documents; without EFT_SCREENSHOTS they go to a folder that
is thrown away.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import CHROMIUM, Page, browser
from tests.end_to_end.process import ServerProcess
from tests.tree import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: sudo apt-get install chromium)"),
]

MAX_PICTURE = 150_000
"""Bytes of a picture in docs/."""
PATIENCE = 1800
"""Seconds that the training may take on a busy machine."""
SHOWN = "main > section:not([hidden])"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("EFT_SCREENSHOTS", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "browser" / "profile") as page:
        yield page


def sixty_rows() -> str:
    """The first 60 tickets of the example: what a customer writes, and the labels that it is to get."""
    return "\n".join((ROOT / "settings/recipes/data/tickets.jsonl").read_text("utf-8").splitlines()[:60])


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


class Steps:
    """Times of the steps, printed as they are done."""

    def __init__(self) -> None:
        self.begun = self._last = time.monotonic()
        self.done: list[tuple[str, float]] = []

    def note(self, step: str) -> None:
        now = time.monotonic()
        self.done.append((step, now - self._last))
        say(f"{now - self.begun:7.1f} s  {self.done[-1][1]:7.1f} s  {step}")
        self._last = now


def picture(page: Page, folder: Path, name: str, *, dark: bool = False) -> None:
    """The page as it is, in one of the two themes."""
    page.look(width=1200, height=800, dark=dark)
    page.run("document.activeElement.blur(); new Promise(done => setTimeout(done, 300))")
    path = folder / f"{name}.png"
    page.screenshot(path, whole=False)
    assert path.stat().st_size <= MAX_PICTURE, f"{path}: {path.stat().st_size} bytes"
    page.look(width=1200, height=800, dark=False)


def test_sixty_pasted_rows_become_an_adapter_that_answers(tmp_path: Path, pictures: Path, chromium: Page) -> None:
    page, steps = chromium, Steps()
    with ServerProcess("demo", tmp_path / "state") as server:
        steps.note("the server answers")
        page.look(width=1200, height=800, dark=False)
        page.open(f"{server.url}/")
        page.until("document.querySelector('#served').textContent.length > 0")
        steps.note("the page is there")
        page.click("Why is the sky blue?")
        page.until_text(".message.assistant footer", "tokens", 120)
        steps.note("the model has answered")
        page.click("Train", "#views")
        page.until("document.querySelector('#recipe').value !== ''")
        page.fill("Rows of train.jsonl", sixty_rows())
        page.until_text(".chip", "valid", 60)
        page.until_text("main h3", "What is trained on")
        steps.note("60 rows are pasted, and the plan is there")
        page.run("[...document.querySelectorAll('h3')].find(e => e.textContent === 'The plan').scrollIntoView()")
        picture(page, pictures, "train")
        page.click("Start training")
        page.until("document.querySelectorAll('.uplot canvas').length > 0", PATIENCE)
        steps.note("the first steps of training are done")
        page.until_text("main button", "Chat with my-adapter@1", PATIENCE)
        steps.note("the adapter is trained and served")
        page.run(f"document.querySelector('{SHOWN} progress').closest('.panel').scrollIntoView()")
        picture(page, pictures, "job")
        page.click("Chat with my-adapter@1")
        page.run("document.querySelector('.composer label.inline input').click()")
        page.run("document.querySelector('.composer details').open = true")
        page.fill("Temperature", "0")
        page.fill("Most tokens", "60")
        page.run("document.querySelector('.composer details').open = false")
        page.fill("Message", "My card was charged twice. Please help.")
        page.click("Send")
        page.until_text(".message.assistant footer", "my-adapter@1", 120)
        page.until_text(".column:last-child .message.assistant footer", "base", 120)
        steps.note("adapter and model have answered the same question")
        answer = page.run("document.querySelector('.message.assistant .text').textContent")
        say(f"the adapter's answer: {answer}")
        picture(page, pictures, "chat")
        page.click("Adapters", "#views")
        page.click("my-adapter", "main")
        page.click("Gate of my-adapter@1", "main")
        page.until_text(f"{SHOWN} h3", "Gate of")
        picture(page, pictures, "adapters")
        page.click("Overview", "#views")
        page.until(f"document.querySelectorAll('{SHOWN} .uplot canvas').length > 6")
        picture(page, pictures, "overview", dark=True)
        steps.note("adapters and numbers are looked at")
        assert str(answer).startswith("[")
        assert page.problems == []
        assert page.foreign(server.url) == set()
