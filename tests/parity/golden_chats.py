"""Writes the golden answers: `python -m tests.parity.golden_chats`, after a change that is meant to move them.

Eight chats, greedy, 24 tokens each, by the demo model in int8 and int4. They are read by people when they change: an
answer must stay sensible.
"""

import json
import sys
from pathlib import Path

from runtime import LLM, SamplingParams

GOLDEN = Path(__file__).parent / "golden_chats.json"
QUANTIZATIONS = ("int8", "int4")
QUESTIONS = (
    "What is the capital of Japan?",
    "Name three primary colors.",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Translate 'good morning' into Spanish.",
    "Why do leaves fall in autumn?",
    "Give me a short recipe for tea.",
)
TOKENS = 24


def answers(quantization: str) -> list[str]:
    llm = LLM("demo", quantization=quantization)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [answer.text for answer in llm.chat(chats, SamplingParams(max_tokens=TOKENS, temperature=0.0))]


if __name__ == "__main__":
    found = {name: dict(zip(QUESTIONS, answers(name), strict=True)) for name in QUANTIZATIONS}
    GOLDEN.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}\n")
