"""Where the server is, and clients of OpenAI's package for it."""

import os
from collections.abc import Iterator

import openai
import pytest

URL = os.environ["EFT_URL"]
MODEL = os.environ["EFT_MODEL_NAME"]
KEY = "none"

for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
    os.environ.setdefault(name, KEY)


@pytest.fixture(scope="session")
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client
