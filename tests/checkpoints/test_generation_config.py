"""What a request gets that leaves a sampling field out: from the model's files, another file, or single values."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime import LLM, SamplingParams
from runtime.checkpoints import ModelLoadError, open_checkpoint
from runtime.checkpoints.generation_config import sampling_defaults
from runtime.messages import SamplingDefaults
from settings.schema import Settings
from tests.api.conftest import client_of
from tests.api.fakes import FakeService
from tests.checkpoints.gguf.files import write_gguf

NUMBERS = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "repetition_penalty")
OWN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "max_new_tokens": 100, "eos_token_id": [7, 8]}


def read(own: dict[str, Any], source: str = "auto", override: Any = None) -> SamplingDefaults:
    return sampling_defaults(own, source, None if override is None else json.dumps(override))


def test_the_models_own() -> None:
    """Its limit of new tokens is a default; its ends of sequence are the tokenizer's already."""
    assert read(OWN) == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, max_tokens=100)
    assert read({"temperature": None, "top_k": 50.0, "do_sample": True, "pad_token_id": 0}) == SamplingDefaults(
        top_k=50
    )
    assert read({}) == SamplingDefaults()


def test_none_of_it() -> None:
    assert read(OWN, "none") == SamplingDefaults()
    assert read(OWN, "none", {"top_k": 3}) == SamplingDefaults(top_k=3)


def test_another_file(tmp_path: Path) -> None:
    """In which the limit of new tokens is one, as in vLLM."""
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.1, "max_new_tokens": 9, "eos_token_id": 5}), encoding="utf-8")
    expected = SamplingDefaults(temperature=0.1, max_tokens=9, max_tokens_limit=9, eos_ids=(5,))
    assert read(OWN, str(tmp_path)) == read(OWN, str(file)) == expected
    for missing in (tmp_path / "absent", tmp_path / "absent.json"):
        with pytest.raises(ModelLoadError, match=r"absent.*; it can also be: auto, none"):
            read(OWN, str(missing))


def test_single_values() -> None:
    own = {"temperature": 0.6, "top_p": 0.95}
    assert read(own, override={"top_p": 0.5}) == SamplingDefaults(temperature=0.6, top_p=0.5)
    assert read(own, override={"top_p": None}) == SamplingDefaults(temperature=0.6)
    limited = read(OWN, override={"max_new_tokens": 5, "eos_token_id": [1, 2]})
    assert (limited.max_tokens, limited.max_tokens_limit, limited.eos_ids) == (5, 5, (1, 2))
    assert read(OWN, override={"max_new_tokens": None}).max_tokens is None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100, got hot"),
        ({"temperature": -1}, "temperature must be a number from 0 to 100, got -1"),
        ({"temperature": True}, "temperature must be"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_k": 1.5}, "top_k must be a whole number of at least -1, got 1.5"),
        ({"min_p": [0.1]}, "min_p must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        *(({key: value}, f"{key} must be") for key in NUMBERS for value in (10**400, -(10**400), float("inf"), "1")),
    ],
)
def test_values_that_are_none(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(own)
    assert read(own, "none") == SamplingDefaults()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "override_generation_config is not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"temprature": 1}', "has no key 'temprature'; supported are: temperature"),
        ('{"eos_token_id": ["a"]}', "eos_token_id must be a token id"),
        ('{"repetition_penalty": -1.1}', "repetition_penalty must be a number from 0.01 to 100, got -1.1"),
    ],
)
def test_overrides_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        sampling_defaults({}, "auto", text)


def test_a_penalty_of_the_models() -> None:
    assert read({"repetition_penalty": 1.05, "top_k": 20}) == SamplingDefaults(repetition_penalty=1.05, top_k=20)
    assert read({"repetition_penalty": 1.05}, override={"repetition_penalty": 1.0}) == SamplingDefaults()


# -- where they come from --------------------------------------------------------------------------


def test_of_a_gguf_file(tiny_model: Path, tmp_path: Path) -> None:
    keys = {
        "general.sampling.temp": 0.25,
        "general.sampling.top_k": 40,
        "general.sampling.min_p": 0.125,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.mirostat": 0,
    }
    path = write_gguf(tmp_path / "it.gguf", tiny_model, metadata=keys)
    own = open_checkpoint(str(path)).generation
    assert own == {"temperature": 0.25, "top_k": 40, "min_p": 0.125, "repetition_penalty": 1.5}
    assert open_checkpoint(str(write_gguf(tmp_path / "plain.gguf", tiny_model))).generation == {}
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}', encoding="utf-8")
    assert open_checkpoint(str(path)).generation == {"top_p": 0.5}


@pytest.mark.real_model
def test_of_the_demo_model() -> None:
    assert read(open_checkpoint("demo").generation) == SamplingDefaults(temperature=0.2, top_p=0.9)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """With a generation config of its own, and an end of sequence that only that file names."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    config = {"temperature": 0.0, "max_new_tokens": 6, "eos_token_id": [2, 300]}
    (copy / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def test_offline(model: Path) -> None:
    llm = LLM(str(model), num_blocks=64)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=6)
    assert 300 in llm.engine.eos_ids
    by_default, greedy = (
        llm.generate([[5, 6, 7]]),
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=6)),
    )
    assert by_default[0].token_ids == greedy[0].token_ids
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=9, ignore_eos=True, seed=1))[0].token_ids[8:]
    plain = LLM(str(model), num_blocks=64, generation_config="none", override_generation_config='{"eos_token_id": 301}')
    assert plain.get_default_sampling_params() == SamplingParams()
    assert {2, 300, 301} <= set(plain.engine.eos_ids)
    with pytest.raises(ModelLoadError, match="eos_token_id must be below 512"):
        LLM(str(model), num_blocks=64, override_generation_config='{"eos_token_id": 512}')


def test_an_end_that_the_operator_added_ends(model: Path) -> None:
    ids = LLM(str(model), num_blocks=64).generate(
        [[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    )
    third = ids[0].token_ids[2]
    llm = LLM(str(model), num_blocks=64, override_generation_config=json.dumps({"eos_token_id": third}))
    (done,) = llm.generate([[5, 6, 7]])
    assert done.token_ids[-1] == third
    assert done.finish_reason == "stop"


# -- requests --------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def service() -> FakeService:
    service = FakeService()
    service.sampling_defaults = SamplingDefaults(temperature=0.25, top_p=0.5, top_k=7, min_p=0.125, max_tokens=3)
    return service


async def asked(service: FakeService, body: dict[str, Any], path: str = "/v1/chat/completions") -> SamplingParams:
    answer = await client_of(service, Settings()).post(path, json=body)
    assert answer.status_code == 200, answer.text
    return service.submitted[-1].params


@pytest.mark.anyio
async def test_what_a_request_leaves_out_is_the_models(service: FakeService) -> None:
    expected = SamplingParams(temperature=0.25, top_p=0.5, top_k=7, min_p=0.125, max_tokens=3)
    assert await asked(service, CHAT) == expected
    nothing = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "max_tokens"))
    assert await asked(service, {**CHAT, **nothing}) == expected
    # A completion's own default of 16 tokens is OpenAI's, and vLLM's.
    assert (await asked(service, {"prompt": "a"}, "/v1/completions")).max_tokens == 16


@pytest.mark.anyio
async def test_what_a_request_says_wins(service: FakeService) -> None:
    own = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 40}
    assert await asked(service, {**CHAT, **own}) == SamplingParams(max_tokens=40)
    assert (await asked(service, {**CHAT, "temperature": 0})).top_p == 0.5
    assert (await asked(service, {**CHAT, "min_tokens": 9})).max_tokens == 9


@pytest.mark.anyio
async def test_a_beam_search_samples_nothing(service: FakeService) -> None:
    params = await asked(service, {**CHAT, "use_beam_search": True, "n": 2})
    assert params == SamplingParams(max_tokens=3)


@pytest.mark.anyio
async def test_the_operators_limit_holds_for_every_request() -> None:
    service = FakeService()
    service.sampling_defaults = SamplingDefaults(max_tokens=5, max_tokens_limit=5)
    client = client_of(service, Settings())
    for path, body, field in (
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 50}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10_000}, "max_tokens"),
    ):
        answer = await client.post(path, json=body)
        assert service.submitted[-1].params.max_tokens == 5
        assert answer.headers["x-eft-warning"] == f"{field} is 5, the most that this server generates"
    for body, tokens in ((CHAT, 5), ({**CHAT, "max_tokens": 4}, 4)):
        answer = await client.post("/v1/chat/completions", json=body)
        assert service.submitted[-1].params.max_tokens == tokens
        assert "x-eft-warning" not in answer.headers
    await client.post("/v1/completions", json={"prompt": "a"})
    assert service.submitted[-1].params.max_tokens == 5
    answer = await client.post("/v1/completions", json={"prompt": "a", "min_tokens": 6, "max_tokens": 8})
    assert answer.json()["error"]["param"] == "min_tokens"


@pytest.mark.anyio
async def test_the_list_of_models_says_what_they_are(service: FakeService) -> None:
    async with client_of(service, Settings()) as client:
        (shown,) = (await client.get("/v1/models")).json()["data"]
    assert shown["default_sampling_params"] == {
        "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "max_tokens": 3,
    }  # fmt: skip
    neutral = client_of(FakeService(), Settings())
    assert (await neutral.get("/v1/models/fake")).json()["default_sampling_params"] == {}
