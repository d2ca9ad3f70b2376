"""`use_beam_search` over the API: what reaches the engine, what is refused, and what comes back."""

from typing import Any

import httpx
import openai
import pytest

from runtime.messages import BeamSearch
from tests.api.conftest import RunningServer
from tests.api.fakes import FakeService

URL = "/v1/completions"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("stream", {"stream": True}),
        ("temperature", {"temperature": 0.7}),
        ("top_p", {"top_p": 0.9}),
        ("top_k", {"top_k": 5}),
        ("min_p", {"min_p": 0.1}),
        ("stop", {"stop": "x"}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("best_of", {"best_of": 1000}),
        ("n", {"n": 0}),
        ("length_penalty", {"length_penalty": 10.5}),
        ("length_penalty", {"length_penalty": -1e300}),
        ("length_penalty", {"use_beam_search": False, "length_penalty": 2.0}),
        ("early_stopping", {"use_beam_search": None, "early_stopping": True}),
        ("early_stopping", {"early_stopping": "sometimes"}),
    ],
)
@pytest.mark.parametrize("url", [URL, "/v1/chat/completions"])
async def test_what_cannot_be_done_is_refused_by_name(
    client: httpx.AsyncClient, service: FakeService, url: str, field: str, fields: dict[str, Any]
) -> None:
    body = {"prompt": "a"} if url == URL else {"messages": [{"role": "user", "content": "a"}]}
    answer = await client.post(url, json={**body, "use_beam_search": True, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert field in (answer.json()["error"]["param"] or answer.json()["error"]["message"])
    assert not service.submitted


@pytest.mark.anyio
async def test_one_search_for_each_prompt_reaches_the_engine(client: httpx.AsyncClient, service: FakeService) -> None:
    asked = {
        "use_beam_search": True,
        "length_penalty": 0.5,
        "early_stopping": "never",
        "temperature": 0,
        "max_tokens": 2,
    }
    await client.post(URL, json={"prompt": ["a", "b"], "n": 2, "best_of": 5, **asked})
    wanted = BeamSearch(width=5, best=2, length_penalty=0.5, early_stopping="never")
    assert [submission.beams for submission in service.submitted] == [wanted, wanted]
    assert [submission.fork_of for submission in service.submitted] == [0, 0]


def test_the_best_come_back_in_order(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        common: dict[str, Any] = {"model": name, "max_tokens": 6, "temperature": 0}
        beams = {"use_beam_search": True, "best_of": 4, "ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(prompt=["An eft", "Rain"], n=2, extra_body=beams, **common)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert len({tuple(choice.token_ids) for choice in answer.choices}) == 4  # type: ignore[attr-defined]
        assert {choice.finish_reason for choice in answer.choices} == {"length"}
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 24
        again = client.completions.create(prompt="Rain", n=2, extra_body=beams, **common)
        assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices[2:]]
        chat = client.chat.completions.create(
            messages=[{"role": "user", "content": "Rain"}], n=3, extra_body={**beams, "best_of": None}, **common
        )
        assert len({tuple(choice.token_ids) for choice in chat.choices}) == 3  # type: ignore[attr-defined]
        one = client.completions.create(prompt="Rain", extra_body={**beams, "best_of": 1}, **common)
        greedy = client.completions.create(prompt="Rain", extra_body={"ignore_eos": True}, **common)
        assert one.choices[0].text == greedy.choices[0].text
        assert one.choices[0].token_ids  # type: ignore[attr-defined]
