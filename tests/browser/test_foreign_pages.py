"""Pages in a real browser, on this machine, against a server without keys: what they send, and what comes of it."""

import functools
import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.chromium import CHROMIUM, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: sudo apt-get install chromium)")

# `tries` are [name, path, options of fetch]; the page writes what became of each into its body.
PAGE = """<!doctype html><meta charset="utf-8"><body><pre id="out"></pre><script>
const typeless = text => new Blob([text]);
const form = text => { const f = new FormData(); f.append("recipe", new Blob([text]), "recipe.yaml"); return f; };
const bodies = {typeless, form, plain: text => text, none: () => undefined};
(async () => {
  const found = {};
  for (const [name, path, kind, text, options] of %s) {
    try {
      const answer = await fetch("%s" + path, {body: bodies[kind](text), ...options});
      found[name] = answer.type === "opaque" ? "opaque" : answer.status + " " + (await answer.text()).slice(0, 20);
    } catch (error) { found[name] = "blocked"; }
  }
  document.getElementById("out").textContent = JSON.stringify(found);
})();
</script>"""

COMPLETION = json.dumps({"prompt": "x", "max_tokens": 1})
NO_CORS = {"method": "POST", "mode": "no-cors"}
JSON = {"method": "POST", "headers": {"content-type": "application/json"}}
TRIES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("a body without a type", "/v1/completions", "typeless", COMPLETION, NO_CORS),
    ("text", "/v1/completions", "plain", COMPLETION, NO_CORS),
    ("JSON", "/v1/completions", "plain", COMPLETION, JSON),
    ("reading", "/v1/models", "none", "", {}),
    ("a recipe in a form", "/admin/train", "form", "name: from-a-page\n", NO_CORS),
    ("a recipe as text", "/admin/train", "plain", "name: from-a-page\n", NO_CORS),
    ("the cache", "/admin/cache/reset", "none", "", NO_CORS),
    ("reading jobs", "/admin/jobs", "none", "", {}),
]


@contextmanager
def site(folder: Path) -> Iterator[int]:
    """A web server of another port. Yields the port."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def open_page(url: str, profile: Path, *flags: str) -> str:
    """The page at `url` once its scripts are done, as HTML."""
    command = [
        str(CHROMIUM), "--headless=new", "--disable-gpu", "--no-sandbox", "--no-proxy-server", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
        "--virtual-time-budget=20000", "--dump-dom", *flags, url,
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(profile.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.stdout


def visit(url: str, profile: Path, *flags: str) -> dict[str, str]:
    """What the page at `url`, one of PAGE, found."""
    match = re.search(r'<pre id="out">(.+?)</pre>', open_page(url, profile, *flags), re.DOTALL)
    assert match is not None, "the page did not get to its end"
    found: dict[str, str] = json.loads(unescape(match[1]))
    return found


def generated(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("eft:generation_tokens_t")
    )


@pytest.mark.parametrize("origin", ["http://127.0.0.1:{}", "http://localhost:{}", "http://evil.example:{}"])
def test_a_page_of_another_origin(tiny_model: Path, tmp_path: Path, origin: str) -> None:
    """Another port of this machine, and another site: nothing is computed, changed or read."""
    with serving(tiny_model, tmp_path / "state") as server, site(tmp_path) as port:
        (tmp_path / "page.html").write_text(PAGE % (json.dumps(TRIES), server.url))
        found = visit(
            f"{origin.format(port)}/page.html", tmp_path / "profile", "--host-resolver-rules=MAP evil.example 127.0.0.1"
        )
        assert {name for name, became in found.items() if became == "blocked"} >= {"JSON", "reading", "reading jobs"}
        assert set(found.values()) <= {"blocked", "opaque"}
        assert httpx.get(f"{server.url}/admin/jobs").json()["data"] == []
        assert generated(server.url) == 0


@pytest.mark.parametrize("path", ["/v1/models", "/docs", "/admin/jobs"])
def test_a_rebound_name(tiny_model: Path, tmp_path: Path, path: str) -> None:
    """A name that points to 127.0.0.1 by now, at the server's own port: to the browser, its pages' own origin."""
    with serving(tiny_model, tmp_path / "state") as server:
        url = f"http://evil.example:{server.url.rpartition(':')[2]}{path}"
        page = open_page(url, tmp_path / "profile", "--host-resolver-rules=MAP evil.example 127.0.0.1")
        assert "permission_error" in page
        own = open_page(f"{server.url}{path}", tmp_path / "profile")
        assert "permission_error" not in own
        assert len(own) > 50


def test_an_allowed_origin(tiny_model: Path, tmp_path: Path) -> None:
    """It computes and reads; what changes the server stays closed."""
    with site(tmp_path) as port:
        origin = f"http://localhost:{port}"
        with serving(tiny_model, tmp_path / "state", cors_origins=(origin,)) as server:
            (tmp_path / "page.html").write_text(PAGE % (json.dumps(TRIES), server.url))
            found = visit(f"{origin}/page.html", tmp_path / "profile")
            assert found["JSON"].startswith('200 {"id":"cmpl-')
            assert found["reading"].startswith("200 {")
            assert found["reading jobs"] == "blocked"
            assert generated(server.url) == 1
            assert httpx.get(f"{server.url}/admin/jobs").json()["data"] == []
