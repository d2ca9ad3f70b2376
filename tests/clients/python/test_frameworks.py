"""litellm, instructor and pydantic-ai."""

import instructor
import litellm
import openai
import pytest
from conftest import KEY, MODEL, URL
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

HELLO = [{"role": "user", "content": "Name a colour."}]


class Colour(BaseModel):
    """Closed, and with short texts: what a schema leaves open, a model this small fills without end."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    red: int = Field(ge=0, le=255)


def ask(**more):
    asked = {"messages": HELLO, "max_tokens": 12, "temperature": 0, **more}
    return litellm.completion(model=f"openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, **asked)


def test_litellm() -> None:
    assert ask().choices[0].message.content
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert ask(n=2).choices[1].message.content is not None
    with pytest.raises(litellm.BadRequestError):
        ask(temperature=-1)


def test_litellm_text_and_embeddings() -> None:
    text = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, prompt="Once", max_tokens=4
    )
    assert text.choices[0].text
    found = litellm.embedding(model=f"openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, input=["a", "b"])
    assert len(found.data) == 2


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT])
def test_instructor(mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY), mode=mode)
    # It takes one call; the model may make several.
    one_call = {} if mode is instructor.Mode.JSON_SCHEMA else {"parallel_tool_calls": False}
    found = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe red."}],
        response_model=Colour,
        max_tokens=200,
        max_retries=2,
        temperature=0,
        **one_call,
    )
    assert isinstance(found, Colour)


async def test_pydantic_ai() -> None:
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
    plain = await Agent(model).run("Name a colour.", model_settings={"max_tokens": 10, "temperature": 0.0})
    assert plain.output
    typed = await Agent(model, output_type=Colour, retries=3).run(
        "Describe red.", model_settings={"max_tokens": 200, "temperature": 0.0}
    )
    assert isinstance(typed.output, Colour)
    async with Agent(model).run_stream(
        "Name a colour.", model_settings={"max_tokens": 10, "temperature": 0.0}
    ) as stream:
        assert await stream.get_output()
