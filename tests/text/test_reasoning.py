"""Reasoning split from content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.text.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningParser, detect_reasoning


def split(name: str, pieces: list[str], inside: bool | None) -> tuple[str, str]:
    parser = ReasoningParser(REASONING_FORMATS[name], inside=inside)
    parts = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("name", "text", "inside", "expected"),
    [
        ("qwen3", "<think>\nTwo and two.\n</think>\n\nFour. ", None, ("Two and two.", "Four. ")),
        ("deepseek_r1", "Two and two.\n</think>\n\nFour.", True, ("Two and two.", "Four.")),
        ("qwen3", "Four.</think>", False, ("", "Four.</think>")),
        ("qwen3", " Four. <think> no", None, ("", " Four. <think> no")),
        ("qwen3", "<think>Cut off </thi", None, ("Cut off </thi", "")),
        ("qwen3", "<think>\n\n</think>\n\nFour.", None, ("", "Four.")),
        ("mistral", "[THINK]Hm.[/THINK]Four.", None, ("Hm.", "Four.")),
        (
            "granite",
            "Here is my thought process: adding. Here is my response: Four.",
            None,
            ("adding.", "Four."),
        ),
        ("qwen3", "<thi", None, ("", "<thi")),
        ("qwen3", "", True, ("", "")),
    ],
)
def test_split(name: str, text: str, inside: bool | None, expected: tuple[str, str]) -> None:
    assert split(name, [text], inside) == expected
    assert split(name, list(text), inside) == expected


def reference(form: ReasoningFormat, text: str, inside: bool | None) -> tuple[str, str]:
    """What the whole text says, without anything incremental."""
    if inside is False:
        return "", text
    if inside is None:
        if not text.lstrip().startswith(form.begin):
            return "", text
        text = text.lstrip().removeprefix(form.begin)
    reasoning, _, content = text.partition(form.end)
    return reasoning.strip(), content.lstrip()


TEXTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<", "</", "</ ", "think>", " ", "\n", "a", "word", "[THINK]", "[/THINK]", "ü"]
    ),
    max_size=12,
).map("".join)


@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 60), max_size=8),
    inside=st.sampled_from([True, False, None]),
    name=st.sampled_from(["qwen3", "mistral", "granite"]),
)
def test_any_split_gives_the_same(text: str, cuts: list[int], inside: bool | None, name: str) -> None:
    at = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
    whole = split(name, [text], inside)
    assert split(name, pieces, inside) == whole
    assert split(name, list(text), inside) == whole
    assert whole == reference(REASONING_FORMATS[name], text, inside)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", None),
    ],
)
def test_the_prompt_says_where_the_answer_begins(prompt: str, expected: bool | None) -> None:
    assert REASONING_FORMATS["qwen3"].begins_in(prompt) is expected


def test_formats_are_told_from_templates() -> None:
    assert detect_reasoning("{% if x %}</think>{% endif %}") is REASONING_FORMATS["deepseek_r1"]
    assert detect_reasoning("[THINK] x [/THINK]") is REASONING_FORMATS["mistral"]
    assert detect_reasoning("{{ messages }}") is None
