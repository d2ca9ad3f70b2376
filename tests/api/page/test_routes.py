"""The page's files: their headers, sizes and names."""

import gzip
import json
import re
import tomllib

import httpx
import pytest

from runtime.api.page.routes import RECIPES, STATIC, page_files
from tests.api.conftest import client_of
from tests.api.fakes import FakeService, settings_with
from tests.tree import ROOT

pytestmark = pytest.mark.anyio

HTML = {"accept": "text/html,application/xhtml+xml;q=0.9"}
OWN_FILES = [path for path in STATIC.iterdir() if path.is_file()]
"""Without vendored ones."""
MOST_BYTES = 300_000
"""Of everything that the page loads before it is first painted, uncompressed."""


async def test_the_page_is_closed_to_all_but_its_own_origin(client: httpx.AsyncClient) -> None:
    answer = await client.get("/", headers=HTML)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_files_are_compressed_and_have_etags(client: httpx.AsyncClient) -> None:
    plain = await client.get("/page/app.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == (STATIC / "app.js").read_bytes()
    packed = await client.get("/page/app.js", headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    again = await client.get("/page/app.js", headers={"if-none-match": packed.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == packed.headers["etag"]
    assert packed.headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/../app.py", "/page/%2e%2e/routes.py", "/page/examples/"])
async def test_other_files_are_not_served(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404


async def test_clients_that_accept_no_html(client: httpx.AsyncClient) -> None:
    answer = await client.get("/", headers={"accept": "application/json"})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_it_can_be_turned_off(service: FakeService) -> None:
    client = client_of(service, settings_with("server", page_enabled=False))
    assert {(await client.get(path, headers=HTML)).status_code for path in ("/", "/page/app.js")} == {404}


async def test_every_file_that_is_named_is_there(client: httpx.AsyncClient) -> None:
    names = set(re.findall(r'"page/([\w./-]+)"', "".join(path.read_text() for path in OWN_FILES)))
    assert {"app.js", "style.css", "own.yaml", "examples/tickets.yaml", "vendor/uplot/uPlot.iife.min.js"} <= names
    imported = {name for path in STATIC.glob("*.js") for name in re.findall(r'from "\./([\w.]+)"', path.read_text())}
    assert {name for name in names | imported if (await client.get(f"/page/{name}")).status_code != 200} == set()


def test_no_file_has_inline_script_or_names_another_host() -> None:
    html = (STATIC / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", html) == []
    for path in OWN_FILES:
        addresses = set(re.findall(r"https?://[\w.]+", path.read_text()))
        assert addresses <= {"http://www.w3.org"}, path.name  # the name of SVG's elements


def test_a_wheel_carries_every_file() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    carried = {path for pattern in tables["runtime"] for path in (ROOT / "runtime").glob(pattern)}
    carried |= {path for pattern in tables["settings"] for path in (ROOT / "settings").glob(pattern)}
    assert {path for path in STATIC.rglob("*") if path.is_file()} <= carried
    assert {path for path in RECIPES.rglob("*") if path.suffix in (".yaml", ".jsonl")} <= carried


async def test_the_charts_library_is_vendored_with_its_licence(client: httpx.AsyncClient) -> None:
    folder = STATIC / "vendor/uplot"
    script = await client.get("/page/vendor/uplot/uPlot.iife.min.js", headers={"accept-encoding": "gzip"})
    version = json.loads((folder / "package.json").read_text())["version"]
    assert f"(v{version})" in script.text.splitlines()[0]
    assert f"uPlot {version}" in (folder / "README.md").read_text()
    assert int(script.headers["content-length"]) < len(script.content) / 2
    licence = await client.get("/page/vendor/uplot/LICENSE.txt")
    assert licence.headers["content-type"] == "text/plain; charset=utf-8"
    assert "The MIT License" in licence.text
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license-files"]
    assert folder / "LICENSE.txt" in {path for pattern in patterns for path in ROOT.glob(pattern)}


def test_the_page_is_small() -> None:
    files = [file for name, file in page_files().items() if not name.endswith((".yaml", ".jsonl"))]
    assert len(files) > 8
    assert sum(len(file.plain) for file in files) < MOST_BYTES
    assert all(gzip.decompress(file.compressed) == file.plain for file in files)
