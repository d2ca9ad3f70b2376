"""/admin behind a real nginx, in the configurations that people write. nginx connects from 127.0.0.1."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from settings.schema import TrainerSettings
from tests.api.conftest import RunningServer, tiny_settings
from tests.waiting import wait_until

_PATHS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
NGINX = shutil.which("nginx", path=_PATHS)
pytestmark = pytest.mark.skipif(
    NGINX is None or subprocess.run([NGINX, "-v"], capture_output=True, check=False).returncode != 0,
    reason="nginx is not installed (Debian: sudo apt-get install nginx; `make test` fetches it)",
)

# What stands in `location / { … }` beside proxy_pass. Without more, nginx speaks HTTP/1.0 and sends its upstream's own
# address as Host.
CONFIGURATIONS = {
    "the default": "",
    "the client's host": "proxy_set_header Host $host;",
    "the client's host and port": "proxy_set_header Host $http_host; proxy_http_version 1.1;",
    "forwarded for": "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_http_version 1.1;",
    "real ip": "proxy_set_header X-Real-IP $remote_addr; proxy_http_version 1.1;",
    "forwarded": 'proxy_set_header Forwarded "for=$remote_addr"; proxy_http_version 1.1;',
    "via": 'proxy_set_header Via "1.1 nginx"; proxy_http_version 1.1;',
    "nothing is told": "proxy_http_version 1.1; proxy_set_header Connection '';",
}
INDISTINGUISHABLE = "nothing is told"
"""From a request of this machine: SECURITY.md says to set a key behind any proxy."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def nginx(upstream: str, folder: Path) -> Iterator[dict[str, str]]:
    """A proxy for each configuration: name → URL."""
    folder.mkdir()
    urls = {name: f"http://127.0.0.1:{free_port()}" for name in CONFIGURATIONS}
    servers = "".join(
        f"server {{ listen {urls[name].removeprefix('http://')}; location / {{"
        f" proxy_pass {upstream}; proxy_buffering off; {lines} }} }}\n"
        for name, lines in CONFIGURATIONS.items()
    )
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off;\npid {folder}/nginx.pid;\nerror_log stderr;\n{user}events {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{servers}}}\n"
    )
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(configuration)], stderr=subprocess.PIPE)
    try:

        def answers() -> bool:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            with contextlib.suppress(httpx.TransportError):
                return all(httpx.get(f"{url}/health", trust_env=False).status_code == 200 for url in urls.values())
            return False

        wait_until(answers, 20)
        yield urls
    finally:
        process.terminate()
        process.wait(20)
        if process.stderr:
            process.stderr.close()


def serving(model: Path, state: Path, **server: Any) -> RunningServer:
    trainer = TrainerSettings(state_dir=str(state))
    return RunningServer(msgspec.structs.replace(tiny_settings(model, **server), trainer=trainer))


ROUTES = [
    ("GET", "/admin/jobs"),
    ("POST", "/admin/train"),
    ("GET", "//admin/jobs"),
    ("GET", "/%61dmin/jobs/"),
    ("POST", "/admin/cache/reset"),
    ("POST", "/v1/load_lora_adapter"),
]


def statuses(url: str, **headers: str) -> set[int]:
    with httpx.Client(headers=headers, trust_env=False, timeout=30) as client:
        return {client.request(method, url + path, content=b"x").status_code for method, path in ROUTES}


def test_without_any_key(tiny_model: Path, tmp_path: Path) -> None:
    """Closed in every configuration that leaves a trace of the proxy, whatever the client says of itself."""
    with serving(tiny_model, tmp_path / "state") as server, nginx(server.url, tmp_path / "nginx") as urls:
        token = (tmp_path / "state" / "admin-token").read_text().strip()
        assert httpx.get(f"{server.url}/admin/jobs").status_code == 200  # straight from this machine
        for name, url in urls.items():
            if name != INDISTINGUISHABLE:
                assert statuses(url) == {403}, name
                assert statuses(url, **{"x-forwarded-for": "127.0.0.1"}) == {403}, name
            opened = httpx.get(f"{url}/admin/jobs", headers={"authorization": f"Bearer {token}"}, trust_env=False)
            assert opened.status_code == 200, name


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"api_key": ("user",)}, 403),
        ({"local_admin": "token"}, 403),
        ({"api_key": ("user",), "admin_key": ("boss",)}, 401),
        ({"admin_key": ("boss",)}, 401),
    ],
)
def test_with_a_key_every_configuration_is_closed(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], refusal: int
) -> None:
    with (
        serving(tiny_model, tmp_path / "state", **settings) as server,
        nginx(server.url, tmp_path / "nginx") as urls,
    ):
        token = (tmp_path / "state" / "admin-token").read_text().strip()
        (key,) = settings.get("admin_key", (token,))
        for name, url in urls.items():
            for host in (server.url.removeprefix("http://"), "localhost", "models.example"):
                assert statuses(url, host=host) == {refusal}, (name, host)
            opened = httpx.get(f"{url}/admin/jobs", headers={"authorization": f"Bearer {key}"}, trust_env=False)
            assert opened.status_code == 200, name
            if "api_key" in settings:
                headers = {"authorization": "Bearer user", "host": "models.example"}
                body = {"prompt": [5, 6, 7], "max_tokens": 1}
                answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, trust_env=False, timeout=60)
                assert answer.status_code == 200, name


def test_inference_without_a_key_by_a_public_name(tiny_model: Path, tmp_path: Path) -> None:
    """A proxy that passes the client's Host on needs that name in server.allowed_hosts."""
    body = {"prompt": [5, 6, 7], "max_tokens": 1}
    with (
        serving(tiny_model, tmp_path / "state", allowed_hosts=("models.example",)) as server,
        nginx(server.url, tmp_path / "nginx") as urls,
    ):
        url = urls["the client's host"] + "/v1/completions"
        for host, status in (("models.example", 200), ("evil.example", 403)):
            answer = httpx.post(url, json=body, headers={"host": host}, trust_env=False, timeout=60)
            assert answer.status_code == status
