"""The request log: one line a request, a share of them, and those that are always in it."""

import asyncio
import threading
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from structlog.testing import capture_logs

from runtime.api.app import create_app
from runtime.support.logs import configure
from settings.schema import ObservabilitySettings, Settings
from tests.api.fakes import FakeService

pytestmark = pytest.mark.anyio


async def logged(paths: list[str], **settings: Any) -> list[dict[str, Any]]:
    """Lines of requests for these paths, each with an id of its own."""
    observability = ObservabilitySettings(log_format="json", **settings)
    configure(observability)
    app = create_app(FakeService(), Settings(observability=observability))  # type: ignore[arg-type]
    with capture_logs() as logs:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            for number, path in enumerate(paths):
                await client.get(path, headers={"x-request-id": f"id-{number}"})
    return [line for line in logs if line["event"] == "request"]


async def test_a_share_of_the_requests_is_logged_and_their_ids_decide() -> None:
    paths = ["/version"] * 200
    some = await logged(paths, log_share=0.25)
    assert 25 <= len(some) <= 75
    assert len(await logged(paths, log_share=0.25)) == len(some)
    assert len(await logged(paths)) == 200
    assert await logged(paths, log_share=0.0) == []


async def test_failed_and_slow_requests_are_always_logged() -> None:
    (line,) = await logged(["/version", "/v1/models/none", "/version"], log_share=0.0)
    assert (line["status"], line["error_code"]) == (404, "model_not_found")
    assert len(await logged(["/version"], log_share=0.0, slow_request=1e-9)) == 1
    assert await logged(["/v1/models/none"], log_requests=False) == []


async def test_a_scrape_leaves_the_event_loop_and_its_series_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While requests come: of many ids, paths, models and prompts."""
    service = FakeService()
    threads = set()
    render = service.metrics.render

    def watched(accept: str = "") -> Any:
        threads.add(threading.current_thread())
        return render(accept)

    monkeypatch.setattr(service.metrics, "render", watched)
    app = create_app(service, Settings())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:

        async def ask(number: int) -> None:
            body = {"prompt": f"prompt {number}", "max_tokens": 2, "user": f"user {number}"}
            await client.post("/v1/completions", json=body, headers={"x-request-id": f"id {number}"})
            await client.post("/v1/completions", json={**body, "model": f"model-{number}"})
            await client.get(f"/nowhere/{number}")

        async def count() -> int:
            text = (await client.get("/metrics")).text
            return sum(len(family.samples) for family in parse(text))

        await asyncio.gather(*(ask(number) for number in range(5)))
        await count()
        before = await count()
        *_, after = await asyncio.gather(*(ask(number) for number in range(5, 60)), count(), count())
        assert before == after == await count()
    assert threading.main_thread() not in threads
    assert threads
