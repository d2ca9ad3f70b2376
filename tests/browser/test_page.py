"""The page at / in a real browser, against a server with a tiny model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.support import failpoints
from tests.api.conftest import RunningServer
from tests.browser.chromium import CHROMIUM, Page, browser, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: sudo apt-get install chromium)")

KEY = "sk-of-the-page"
RECIPE = """name: pasted
adapter: lora
lora_r: 4
lora_target_linear: true
datasets:
  - path: train.jsonl
    type: auto
micro_batch_size: 2
max_steps: 3
learning_rate: 1e-3
"""
ROWS = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"Newt {n}?"}, {"role": "assistant", "content": f"Eft {n}."}]})
    for n in range(6)
)
SHOWN = "main > section:not([hidden])"
VIEWS = ("chat", "train", "adapters", "overview", "requests", "system")
DRAWN = f"document.querySelectorAll('{SHOWN} .uplot canvas').length > 0"
AXE = Path(os.environ.get("EFT_AXE", Path(sys.prefix) / "share/axe-core/axe.min.js"))
"""axe-core, which checks accessibility: where .ci/debian puts it."""


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tiny_model, tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture
def page(chromium: Page, server: RunningServer) -> Iterator[Page]:
    """The page, just opened. At the end: nothing in its console, and no request to another host."""
    yield from opened(chromium, server)


def opened(chromium: Page, server: RunningServer) -> Iterator[Page]:
    chromium.problems.clear()
    chromium.requests.clear()
    chromium.look(width=1440, dark=True)
    chromium.open("about:blank")
    chromium.open(f"{server.url}/")
    chromium.until("document.querySelector('#views a[aria-current]') !== null")
    yield chromium
    assert chromium.problems == []
    assert chromium.requests
    assert chromium.foreign(server.url) == set()


def go(page: Page, view: str) -> None:
    page.run(f"location.hash = '{view}'")
    page.until(f"document.querySelector('#views a[aria-current]').hash === '#{view}'")


def ask(page: Page, text: str, tokens: int) -> None:
    page.run("document.querySelector('.composer details').open = true")
    page.fill("Most tokens", str(tokens))
    page.fill("Message", text)
    page.click("Send")


@pytest.fixture
def slow() -> Iterator[None]:
    """A server that takes 20 ms a token: nothing ends before it is looked at."""
    failpoints.configure("engine.deliver=sleep:0.02")
    yield
    failpoints.configure("")


@pytest.mark.usefixtures("slow")
def test_a_chat_streams_and_stops(page: Page) -> None:
    ask(page, "Tell me everything.", 450)
    page.until("document.querySelector('.message.assistant .text').textContent.length > 5")
    page.click("Stop")
    page.until_text(".message.assistant footer", "stopped")
    text = page.run("document.querySelector('.message.assistant .text').textContent")
    page.click("Regenerate")
    page.until_text(".composer button", "Stop")
    page.click("Stop")
    page.until_text(".message.assistant footer", "stopped")
    assert page.run("document.querySelectorAll('.message.assistant').length") == 1
    assert text


def test_two_models_answer_the_same_prompt_and_seeds_repeat(page: Page) -> None:
    page.run("document.querySelector('.composer label.inline input').click()")
    page.run("document.querySelector('.composer details').open = true")
    page.fill("Seed", "7")
    page.fill("Temperature", "1")
    ask(page, "Which?", 12)
    footers = "[...document.querySelectorAll('.message.assistant footer')]"
    page.until(f"{footers}.filter(e => e.innerText.includes('12 tokens')).length === 2")
    first, second = page.run("[...document.querySelectorAll('.message.assistant .text')].map(e => e.textContent)")
    assert first == second != ""


def test_probabilities_of_tokens(page: Page) -> None:
    page.run("document.querySelector('.composer details').open = true")
    page.run("document.querySelector('.composer details label.inline input').click()")
    ask(page, "Which?", 4)
    page.until_text(".message.assistant footer", "4 tokens")
    titles = page.run("[...document.querySelectorAll('.token')].map(e => e.title)")
    assert len(titles) == 4
    assert all(title.count("%") == 6 for title in titles)


def test_an_answer_has_the_form_of_a_schema(page: Page) -> None:
    page.run("document.querySelector('.composer details').open = true")
    page.fill("JSON schema of the answer", '{"enum": ["newt"]}')
    ask(page, "Which?", 20)
    page.until_text(".message.assistant footer", "tokens")
    assert page.run("document.querySelector('.message.assistant .text').textContent") == '"newt"'
    page.fill("JSON schema of the answer", "{")
    ask(page, "Which?", 20)
    page.until_text(".message.assistant .error", "JSON schema:")


def test_a_tool_is_called_and_its_result_is_sent(page: Page) -> None:
    page.run("document.querySelector('.composer details').open = true")
    parameters = {"type": "object", "properties": {"city": {"enum": ["Ulm"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    page.fill("Tools, as a JSON list", json.dumps([tool]))
    page.fill("Call tools", "required")
    ask(page, "Which?", 100)
    assert "weather(" in page.until_text(".message.assistant .calls", "Ulm")
    page.fill("Result of weather", "rain")
    page.fill("Call tools", "none")
    page.click("Send results")
    page.until("document.querySelectorAll('.message.assistant footer').length === 2")
    page.until_text(".message.assistant:last-child footer", "tokens")
    assert page.run("document.querySelector('.message.tool').textContent") == "rain"


def test_thumbs_and_corrections_are_stored(page: Page, server: RunningServer) -> None:
    ask(page, "Which one?", 4)
    page.until_text(".message.assistant footer", "4 tokens")
    page.click("Good answer")
    page.until_text(".feedback", "stored")
    page.click("Correct")
    page.fill("The answer as it should have been", "The young newt.")
    page.click("Store")
    page.until_text(".feedback", "correction stored")
    assert page.run("document.querySelector('.message.assistant .text').textContent") == "The young newt."
    correction, score = httpx.get(f"{server.url}/admin/feedback").json()["data"][:2]
    assert (score["score"], score["messages"]) == (1, None)
    assert correction["correction"] == "The young newt."
    assert correction["messages"] == [{"role": "user", "content": "Which one?"}]
    assert correction["answer_id"] == score["answer_id"]


@pytest.mark.parametrize(("name", "runs"), [("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])])
def test_a_copied_request_gives_an_answer(page: Page, name: str, runs: list[str]) -> None:
    page.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }; 0")
    page.run("document.querySelector('.composer details').open = true")
    page.fill("Most tokens", "5")
    page.fill("Top k", "3")
    page.fill("JSON schema of the answer", '{"enum": ["newt", null, true]}')
    page.fill("Message", 'It\'s "which"?')
    page.click(f"Copy as {name}")
    done = subprocess.run([*runs, page.until("window.copied")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert any(word in done.stdout.replace('","', "") for word in ("newt", "null", "true", "choices")), done.stdout


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("Two\nlines, **bold** and `x = 1`.", "Two\nlines, <strong>bold</strong> and <code>x = 1</code>."),
        ("## Head\n\n- 2 ** 3 ** 4", "<strong>Head</strong>\n\n- 2 ** 3 ** 4"),
        ("<b onclick=x>no</b>", "&lt;b onclick=x&gt;no&lt;/b&gt;"),
        ("In code:\n```html\n<i>**a**</i>\n```\nso", "In code:[&lt;i&gt;**a**&lt;/i&gt;]so"),
        ("Not ended:\n```\na\nb", "Not ended:[a\nb]"),
    ],
)
def test_answers_are_shown_as_markdown_and_never_as_html(page: Page, text: str, html: str) -> None:
    """A block of code stands in brackets here."""
    script = f"""import('/page/markdown.js').then(({{ formatted }}) => {{
      const box = document.createElement('div');
      box.append(...formatted({json.dumps(text)}));
      const blocks = [...box.querySelectorAll('.code-block')];
      for (const e of blocks) e.replaceWith('[', e.querySelector('code').textContent, ']');
      return box.innerHTML;
    }})"""
    assert page.run(script) == html


def test_an_error_is_shown(page: Page) -> None:
    page.fill("Model", "no-such-model")
    ask(page, "Which?", 4)
    assert "no-such-model" in page.until_text(".message.assistant .error", "does not exist")


def test_a_bad_recipe_shows_its_error_at_the_line(page: Page) -> None:
    go(page, "train")
    page.fill("Rows of train.jsonl", ROWS)
    page.fill("Recipe", RECIPE.replace("max_steps", "max_stepps"))
    assert "max_stepps, line 9: unknown key" in page.until_text("#problems", "unknown key")
    assert page.run("document.querySelector('.gutter .wrong').textContent") == "9"
    assert page.run("document.querySelector('#recipe').getAttribute('aria-invalid')") == "true"
    page.run("document.querySelector('#problems button').click()")
    selected = "(e => e.value.slice(e.selectionStart, e.selectionEnd))(document.querySelector('#recipe'))"
    assert page.run(selected) == "max_stepps: 3"


def test_pasted_rows_become_an_adapter_that_answers(page: Page) -> None:
    go(page, "train")
    page.fill("Rows of train.jsonl", ROWS)
    page.fill("Recipe", RECIPE)
    page.until_text(".chip", "valid")
    page.until_text("main h3", "What is trained on")
    assert page.run("document.querySelector('.example mark').textContent").startswith("Eft 0.")
    listed = page.run("[...document.querySelectorAll('.bounded tbody tr')].map(e => e.innerText)")
    assert len(listed) == 6
    assert listed[0].split("\t")[-1].startswith("Eft 0.")
    page.click("Start training")
    page.click("Chat with pasted@1")
    page.until("document.querySelector('#views a[aria-current]').hash === '#chat'")
    ask(page, "Newt 1?", 6)
    page.until_text(".message.assistant footer", "pasted@1")

    go(page, "adapters")
    page.click("pasted", "main")
    page.click("Gate of pasted@1")
    assert "always" in page.until_text("main section:not([hidden]) [role=status] p", "met")
    assert "accuracy" in page.run("document.querySelector('main section:not([hidden]) .bounded').innerText")
    page.fill("New alias", "second-name")
    page.click("Add")
    page.until_text("main section:not([hidden]) .chip", "second-name")
    assert "one version only" in page.until_text("main section:not([hidden]) p", "one version only")
    go(page, "requests")
    page.until_text("td", "/v1/chat/completions")
    go(page, "overview")
    page.until(DRAWN)


COLOURED = """(() => { const drawn = document.querySelectorAll('main > section:not([hidden]) .uplot canvas');
const canvas = [...drawn].at(-2);
const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
const near = at => data[at + 3] > 150 && [RGB].every((value, index) => Math.abs(data[at + index] - value) < 4);
for (let at = 0; at < data.length; at += 4) if (near(at)) return true;
return false; })()"""
"""True if something in the overview's chart of training's share has the colour: it has one line."""
DARK, LIGHT = COLOURED.replace("RGB", "240, 138, 93"), COLOURED.replace("RGB", "165, 59, 23")
"""--series-1 in the two themes."""


def test_charts_have_the_colours_of_the_theme_and_say_their_values(page: Page) -> None:
    go(page, "overview")
    page.until(DRAWN)
    page.until(DARK)
    page.click("Change between dark and light")
    page.until(LIGHT)
    assert page.run(DARK) is False
    page.look(width=1440, dark=False)
    page.look(width=360, dark=False)
    page.until(f"document.querySelector('{SHOWN} .uplot').offsetWidth < 360")
    page.look(width=1440, dark=True)
    page.until(f"document.querySelector('{SHOWN} .uplot').offsetWidth > 1000")
    labels = page.run(f"[...document.querySelectorAll('{SHOWN} [role=img]')].map(e => e.ariaLabel)")
    assert labels[-1].startswith("Tokens of training a second: trained ")
    assert "riding in requests' steps 0" in labels[-1]
    press = "(e => { e.focus(); e.dispatchEvent(new KeyboardEvent('keydown', {key: KEY, bubbles: true})); })"
    second = f"(document.querySelectorAll('{SHOWN} [role=img]')[3])"
    page.run(press.replace("KEY", "'Home'") + second)
    assert "running 0" in page.until(
        "document.querySelector('#announcer').textContent.includes('waiting') &&"
        "document.querySelector('#announcer').textContent"
    )
    shown = page.run(f"[...document.querySelectorAll('{SHOWN} figcaption .at')].map(e => e.textContent)")
    assert len(shown) == len([label for label in labels if "nothing yet" not in label])  # all at the same moment
    assert len(set(shown)) == 1
    page.run(press.replace("KEY", "'Escape'") + second)
    page.until(f"document.querySelectorAll('{SHOWN} figcaption .at').length === 0")


def test_changes_of_others_come_over_one_stream(page: Page, server: RunningServer) -> None:
    go(page, "train")
    page.until("document.querySelector('#recipe').value !== ''")
    recipe = RECIPE.replace("pasted", "from-elsewhere")
    files = {"recipe": ("recipe.yaml", recipe), "train.jsonl": ("train.jsonl", ROWS)}
    assert httpx.post(f"{server.url}/admin/train", files=files, timeout=60).status_code == 201
    page.until_text("main section:not([hidden]) tbody th", "from-elsewhere")
    go(page, "adapters")
    page.until_text("main section:not([hidden]) tbody th", "from-elsewhere")
    alias = {"alias": "from-elsewhere-too"}
    assert httpx.post(f"{server.url}/admin/adapters/from-elsewhere/alias", json=alias).status_code == 200
    page.until_text("main section:not([hidden]) tbody td", "from-elsewhere-too")
    go(page, "overview")
    page.until(DRAWN)
    asked = [url.removeprefix(server.url) for url in page.requests]
    assert asked.count("/admin/status") == 1
    assert not [path for path in asked if path.startswith("/admin/jobs?")]


def test_a_stream_that_breaks_is_taken_up_again(page: Page) -> None:
    broken = "new Error('the network is gone')"
    page.run(
        "window.real = window.fetch; window.fetch = (url, options) => String(url).endsWith('admin/status')"
        f" ? Promise.reject({broken}) : window.real(url, options); 0"
    )
    go(page, "overview")
    page.until_text("main section:not([hidden]) .error", "the network is gone")
    page.run("window.fetch = window.real; 0")
    page.until("document.querySelector('main section:not([hidden]) .error').textContent === ''")
    page.until(DRAWN)


def test_an_example_that_comes_late_does_not_replace_what_is_typed(page: Page) -> None:
    go(page, "train")
    page.until("document.querySelector('#recipe').value !== ''")
    slow = "new Promise(done => setTimeout(done, 300)).then(() => window.quick(url, options))"
    page.run(f"window.quick = window.fetch; window.fetch = (url, options) => {slow}")
    choose = "(e => { e.value = 'newts'; e.dispatchEvent(new Event('change')); })"
    page.run(f"{choose}(document.querySelector('main section:not([hidden]) select'))")
    page.fill("Recipe", "name: typed")
    page.run("new Promise(done => setTimeout(done, 1000))")
    assert page.run("document.querySelector('#recipe').value") == "name: typed"


def test_keys_and_values_of_a_recipe_are_completed(page: Page) -> None:
    go(page, "train")
    typed = "(e => { e.focus(); e.value = TEXT; e.setSelectionRange(e.value.length, e.value.length);"
    typed += "e.dispatchEvent(new Event('input')); })(document.querySelector('#recipe'))"
    press = "document.querySelector('#recipe').dispatchEvent(new KeyboardEvent('keydown', {key: KEY, bubbles: true}))"
    recipe = "document.querySelector('#recipe').value"
    page.run(typed.replace("TEXT", json.dumps("name: a\nlora_al")))
    assert "lora_alpha" in page.until_text(".offers", "lora_alpha")
    page.run(press.replace("KEY", "'ArrowDown'"))
    assert page.run("document.querySelector('#recipe').getAttribute('aria-activedescendant')") == "offer-0"
    page.run(press.replace("KEY", "'Enter'"))
    assert page.run(recipe) == "name: a\nlora_alpha: "
    page.run(typed.replace("TEXT", json.dumps("lr_scheduler: cosine_with_r")))
    page.until_text(".offers", "cosine_with_restarts")
    page.run(press.replace("KEY", "'Tab'"))
    assert page.run(recipe) == "lr_scheduler: cosine_with_restarts"
    page.run(typed.replace("TEXT", json.dumps("datasets:\n  - path: a.jsonl\n    message_p")))
    assert "message_property_mappings" in page.until_text(".offers", "message_property_mappings")
    page.run(press.replace("KEY", "'Escape'"))
    assert page.run("document.querySelector('.offers').hidden") is True


def test_a_job_is_cloned_and_its_checkpoints_answer(page: Page) -> None:
    go(page, "train")
    page.fill("Rows of train.jsonl", ROWS)
    page.fill(
        "Recipe",
        RECIPE.replace("pasted", "first").replace(
            "max_steps: 3", "max_steps: 5000\nsave_steps: 20\nsave_total_limit: 250"
        ),
    )
    page.click("Start training")
    page.until_text("main section:not([hidden]) details summary", "Checkpoints")
    page.run("[...document.querySelectorAll('main section:not([hidden]) details')].forEach(e => (e.open = true))")
    name = page.until_text("details li button", "Chat with step").splitlines()[0]
    page.fill("Recipe", "name: other")
    page.fill("Rows of train.jsonl", "")
    page.click("Clone")
    page.until("document.querySelector('#recipe').value.startsWith('name: first')")
    assert "Newt 5?" in page.until("document.querySelector('#rows').value")
    page.click(name)
    ask(page, "Newt 1?", 4)
    page.until_text(".message.assistant footer", "first:ckpt-step-")
    go(page, "train")
    page.click("Cancel", "main")
    page.until_text("p[role=status]", "cancelled")


def test_versions_are_rolled_back_and_tried_on_some(page: Page) -> None:
    go(page, "train")
    page.fill("Rows of train.jsonl", ROWS)
    page.fill("Recipe", RECIPE.replace("pasted", "twice"))
    for number in (1, 2):
        page.click("Start training")
        page.until_text("main button", f"Chat with twice@{number}")
    go(page, "adapters")
    page.click("twice", "main")
    page.click("Roll back")
    page.until_text("main section:not([hidden]) tbody tr", "twice\t1\t")
    page.click("Promote twice@2")
    page.until_text("main section:not([hidden]) tbody tr", "twice\t2\t")
    page.fill("Share in %", "25")
    page.click("Set")
    page.until_text("main section:not([hidden]) td", "25% to version 1")


def test_a_job_is_paused_resumed_and_cancelled(page: Page) -> None:
    go(page, "train")
    page.fill("Rows of train.jsonl", ROWS)
    page.fill("Recipe", RECIPE.replace("pasted", "long").replace("max_steps: 3", "max_steps: 5000"))
    page.click("Start training")
    page.click("Pause")
    page.until_text("p[role=status]", "paused")
    page.click("Resume")
    page.until_text("main button", "Pause")
    page.until("Number(/training .*?[(]([0-9]+) values/.exec(document.querySelector('[role=img]').ariaLabel)?.[1]) > 3")
    page.click("Cancel", "main")
    page.until_text("p[role=status]", "cancelled")
    page.click("Delete", "main")
    page.click("Yes", "#confirm-dialog")
    page.until("![...document.querySelectorAll('tbody button')].some(e => e.textContent === 'long')")


def test_a_job_that_has_failed_goes_on_where_it_can(page: Page, server: RunningServer) -> None:
    """The first one failed at its third step, with checkpoints of those before; the second at its first step."""
    go(page, "train")
    for name, step, buttons in (("again", 3, ["Resume", "Clone", "Delete"]), ("never", 1, ["Clone", "Delete"])):
        failpoints.configure(f"train.step@{step}=raise")
        page.fill("Rows of train.jsonl", ROWS)
        page.fill("Recipe", RECIPE.replace("pasted", name) + "save_steps: 1\n")
        page.click("Start training")
        page.until_text("p[role=status]", "failed")
        clone = f"[...document.querySelectorAll('{SHOWN} button')].find(e => e.textContent === 'Clone')"
        page.until(f"[...{clone}.parentElement.children].map(e => e.textContent).join() === '{','.join(buttons)}'")
        failpoints.configure("")
    page.run("[...document.querySelectorAll('tbody button')].find(e => e.textContent === 'again').click()")
    page.click("Resume")
    page.until_text("main button", "Chat with again@1")
    jobs = httpx.get(f"{server.url}/admin/jobs").json()["data"]
    steps = {job["name"]: job["step"] for job in jobs}
    assert (steps["again"], steps["never"]) == (3, 0)


def test_an_empty_chat_offers_prompts(page: Page) -> None:
    page.run("document.querySelector('.composer details').open = true")
    page.fill("Most tokens", "3")
    page.click("Why is the sky blue?")
    page.until_text(".message.assistant footer", "3 tokens")
    assert page.run("document.querySelector('.message.user .text').textContent") == "Why is the sky blue?"
    assert page.run("document.querySelector('.hint').checkVisibility()") is False
    page.click("New chat")
    page.fill("Model", "other")
    assert "rows that it was trained on" in page.until_text(".hint", "Ask other")


def test_a_message_is_edited_and_a_new_chat_is_empty(page: Page) -> None:
    ask(page, "First?", 3)
    page.until_text(".message.assistant footer", "3 tokens")
    page.click("Edit")
    assert page.run("document.querySelectorAll('.message').length") == 0
    prompt = "document.querySelector('.composer textarea').value"
    assert page.run(prompt) == "First?"
    ask(page, "Second?", 3)
    page.until_text(".message.assistant footer", "3 tokens")
    assert page.run("document.querySelectorAll('.message').length") == 2
    page.click("New chat")
    assert page.run("document.querySelectorAll('.message').length") == 0


def test_the_system_shows_settings_and_keys_without_secrets(tiny_model: Path, tmp_path: Path, chromium: Page) -> None:
    with serving(tiny_model, tmp_path / "state", admin_key=(KEY,)) as server:
        chromium.problems.clear()
        chromium.open(f"{server.url}/#system")
        chromium.until("document.querySelector('#key-dialog').open")
        chromium.fill("Key", KEY)
        chromium.click("Use this key")
        assert "ready" in chromium.until_text("main section:not([hidden]) p[role=status]", "Eft")
        chromium.fill("Find a setting", "admin_key")
        row = chromium.until_text("main section:not([hidden]) tr", "server.admin_key")
        assert "1 set (hidden)" in row
        assert KEY not in chromium.run("document.body.innerText")
        chromium.fill("Find a setting", "max_running")
        chromium.until_text("main section:not([hidden]) tr", "scheduler.max_running")
        shown = "[...document.querySelectorAll('main section:not([hidden]) th.code')].map(e => e.textContent)"
        assert "server.admin_key" not in chromium.run(shown)
        assert "model.model" not in chromium.run(shown)
        assert chromium.problems == []


@pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core (.ci/debian fetches it, or EFT_AXE names it)")
@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("width", [360, 1440])
def test_accessibility(page: Page, width: int, dark: bool) -> None:
    page.look(width=width, dark=dark)
    page.run(AXE.read_text(encoding="utf-8") + "; 0")
    script = "axe.run().then(found => found.violations.map(one => [one.id, one.impact, one.nodes[0].html]))"

    def check(shown: str) -> None:
        assert [one for one in page.run(script) if one[1] in ("serious", "critical")] == [], shown

    for view in VIEWS:
        go(page, view)
        check(view)
    go(page, "chat")
    page.run("document.querySelector('.composer details').open = true")
    ask(page, "Which?", 4)
    page.until_text(".message.assistant footer", "4 tokens")
    check("an answer")
    go(page, "train")
    page.fill("Rows of train.jsonl", ROWS)
    page.fill("Recipe", RECIPE.replace("pasted", "accessible"))
    page.until_text(".chip", "valid")
    check("a plan")
    page.click("Start training")
    page.until_text("main button", "Chat with accessible@")
    check("a job")
    page.fill("Recipe", RECIPE.replace("max_steps", "max_stepps"))
    page.until_text("#problems", "unknown key")
    check("a bad recipe")
    go(page, "adapters")
    page.click("accessible", "main")
    page.until_text(f"{SHOWN} h3", "Versions")
    check("an adapter")
    go(page, "overview")
    page.until(DRAWN)
    check("charts")


@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.look(width=width, dark=False)
    for view in VIEWS:
        go(page, view)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), view


def test_a_wrong_key_is_refused_and_a_right_one_is_kept_in_memory(
    tiny_model: Path, tmp_path: Path, chromium: Page
) -> None:
    with serving(tiny_model, tmp_path / "state", api_key=(KEY,)) as server:
        chromium.problems.clear()
        chromium.open(f"{server.url}/")
        chromium.until("document.querySelector('#key-dialog').open")
        chromium.fill("Key", "sk-wrong")
        chromium.click("Use this key")
        chromium.until_text("#served", "not valid")
        chromium.click("API key")
        chromium.fill("Key", KEY)
        chromium.click("Use this key")
        name = httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {KEY}"}).json()["data"][0]["id"]
        chromium.until_text("#served", name)
        ask(chromium, "Which?", 4)
        chromium.until_text(".message.assistant footer", "4 tokens")
        stored = "localStorage.length + sessionStorage.length + document.cookie.length"
        assert chromium.run(stored) == 0
        assert chromium.problems == []
