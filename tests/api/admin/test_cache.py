"""POST /admin/cache/reset over a real server."""

import httpx

from tests.api.conftest import RunningServer


def cached(server: RunningServer) -> int:
    body = {"prompt": [7, 8, 9, 10] * 12, "max_tokens": 1, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_reset_forgets_every_prefix(server: RunningServer) -> None:
    cached(server)
    assert cached(server) == 47
    answer = httpx.post(f"{server.url}/admin/cache/reset")
    assert answer.status_code == 200
    assert answer.json()["blocks"] >= 3
    assert cached(server) == 0
    assert httpx.post(f"{server.url}/admin/cache/reset").json()["blocks"] >= 3


def test_it_is_for_administrators(server: RunningServer) -> None:
    assert httpx.post(f"{server.url}/admin/cache/reset", headers={"host": "example.org"}).status_code == 403
    assert httpx.get(f"{server.url}/admin/cache/reset").status_code == 405


def test_choices_share_the_prompt(server: RunningServer) -> None:
    """Through the whole server: prefix hits grow by the shared prompt, and the best of three is one of them."""
    body = {"prompt": [11, 12, 13, 14] * 5, "max_tokens": 4, "seed": 5, "temperature": 1.0, "return_token_ids": True}
    all_three = httpx.post(f"{server.url}/v1/completions", json={**body, "n": 3}).json()
    best = httpx.post(f"{server.url}/v1/completions", json={**body, "n": 1, "best_of": 3}).json()
    texts = [choice["token_ids"] for choice in all_three["choices"]]
    assert best["choices"][0]["token_ids"] in texts
    assert len(best["choices"]) == 1
    assert best["usage"]["completion_tokens"] == all_three["usage"]["completion_tokens"]
