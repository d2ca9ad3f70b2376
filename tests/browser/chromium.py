"""A Chromium that a test drives over a pipe, with the DevTools protocol."""

import base64
import contextlib
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from settings.schema import TrainerSettings
from tests.api.conftest import RunningServer, tiny_settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# The body of a promise that is kept once `CONDITION` holds, and broken after `SECONDS`.
_UNTIL = """new Promise((resolve, reject) => {
  const end = performance.now() + 1000 * SECONDS;
  const look = () => {
    let found = null;
    try { found = CONDITION; } catch (error) { found = null; }
    if (found) resolve(found === true ? true : String(found));
    else if (performance.now() > end) reject(new Error("not within SECONDS s: " + document.body.innerText));
    else setTimeout(look, 20);
  };
  look();
})"""


class PageError(Exception):
    """A script of the test failed, or a condition was never met."""


class Page:
    """The one page of a browser."""

    def __init__(self, read: int, write: int) -> None:
        self._write = os.fdopen(write, "wb", buffering=0)
        self._read = os.fdopen(read, "rb", buffering=0)
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._count = 0
        self._session: str | None = None
        self.problems: list[str] = []
        """Exceptions, errors in the console, and breaches of the security policy; not the statuses of answers."""
        self.requests: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, *, timeout: float = 60, **params: Any) -> dict[str, Any]:
        """The result of a DevTools command, which may take `timeout` seconds."""
        self._count += 1
        number, answer = self._count, queue.Queue[dict[str, Any]]()
        self._answers[number] = answer
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        found = answer.get(timeout=timeout)
        if "error" in found:
            raise PageError(f"{method}: {found['error']}")
        result: dict[str, Any] = found["result"]
        return result

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str, *, timeout: float = 60) -> Any:
        """The value of an expression, awaited where it is a promise."""
        found = self.send("Runtime.evaluate", timeout=timeout, expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise PageError(found["exceptionDetails"].get("exception", {}).get("description", "") or str(found))
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = 30) -> Any:
        """Wait until the expression is truthy; its value."""
        script = _UNTIL.replace("CONDITION", f"({condition})").replace("SECONDS", str(seconds))
        return self.run(script, timeout=seconds + 60)

    def until_text(self, selector: str, text: str, seconds: float = 30) -> str:
        """Wait until an element that is shown has the text; all its text."""
        shown = f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility())"
        return str(self.until(f"{shown}.map(e => e.innerText).find(t => t.includes({json.dumps(text)}))", seconds))

    def click(self, text: str, within: str = "body") -> None:
        """Click the enabled, visible button or link of this text or label."""
        elements = f"[...document.querySelector({json.dumps(within)}).querySelectorAll('button, a, summary')]"
        wanted = json.dumps(text)
        named = f"(e.textContent.trim() === {wanted} || e.getAttribute('aria-label') === {wanted})"
        found = f"{elements}.find(e => e.checkVisibility() && !e.disabled && {named})"
        self.until(f"(e => e && (e.click(), true))({found})")

    def fill(self, label: str, text: str) -> None:
        """Type into the visible control that this label names."""
        wanted = json.dumps(label)
        labels = "[...document.querySelectorAll('label')]"
        control = f"{labels}.find(e => e.textContent.startsWith({wanted}) && e.control?.checkVisibility())?.control"
        self.until(f"{control} !== undefined")
        self.run(
            f"(() => {{ const e = {control}; e.focus(); e.value = {json.dumps(text)};"
            "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def look(self, *, width: int, height: int = 900, dark: bool) -> None:
        """Set the size of the window, and the theme that it prefers."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def foreign(self, url: str) -> set[str]:
        """Requests that went to another host than that of `url`."""
        here = urlsplit(url).netloc
        return {one for one in self.requests if urlsplit(one).scheme in ("http", "https", "ws", "wss")} - {
            one for one in self.requests if urlsplit(one).netloc == here
        }

    def close(self) -> None:
        self._session = None
        with contextlib.suppress(PageError, OSError, queue.Empty):
            self.send("Browser.close")
        self._write.close()

    def _listen(self) -> None:
        rest = b""
        with contextlib.suppress(OSError, ValueError):
            while data := self._read.read(65536):
                *messages, rest = (rest + data).split(b"\0")
                for message in messages:
                    self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if "id" in message:
            self._answers.pop(message["id"]).put(message)
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif message["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str(params["args"]))
        elif message["method"] == "Log.entryAdded":
            entry = params["entry"]
            if entry["level"] == "error" and entry["source"] != "network":
                self.problems.append(entry["text"])


def serving(model: Path, state: Path, **server: Any) -> RunningServer:
    """A server with a state directory, for pages. `server`: its settings."""
    trainer = TrainerSettings(state_dir=str(state))
    return RunningServer(msgspec.structs.replace(tiny_settings(model, **server), trainer=trainer))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile, and its page."""
    flags = [
        "--headless=new", "--disable-gpu", "--no-sandbox", "--no-proxy-server", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-component-update",
        "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}",
    ]  # fmt: skip
    child_read, write = os.pipe()
    read, child_write = os.pipe()
    command = ["bash", "-c", f'exec "$@" 3<&{child_read} 4>&{child_write}', "bash", str(CHROMIUM), *flags]
    environment = {**os.environ, "HOME": str(profile.parent)}
    process = subprocess.Popen(
        command,
        env=environment,
        pass_fds=(child_read, child_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(child_read)
    os.close(child_write)
    try:
        page = Page(read, write)
        try:
            yield page
        finally:
            page.close()
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
