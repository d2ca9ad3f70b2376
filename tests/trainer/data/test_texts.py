"""Texts with and without a prompt. The wording of Alpaca's prompts is that of its repository."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import RowProblem
from runtime.trainer.data.formats import TextEncoder
from runtime.trainer.data.instructions import TEXT_TYPES


def alpaca(row: dict[str, object]) -> tuple[str, str]:
    return written("alpaca", row)


def written(name: str, row: dict[str, object]) -> tuple[str, str]:
    """Prompt and answer."""
    kind = TEXT_TYPES[name]
    given = kind.read(row)
    return kind.wording.prompt(given), given.answer


EXAMPLES = settings(max_examples=60)
END = 2


def test_alpacas_prompts() -> None:
    short = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    for row in ({}, {"input": ""}, {"input": None}):
        assert alpaca({"instruction": "Add.", "output": "3", **row}) == (short, "3")
    prompt, _ = alpaca({"instruction": "Add {input}.", "input": "{instruction}", "output": "3"})
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {input}.\n\n### Input:\n{instruction}\n\n### Response:\n"
    )


@EXAMPLES
@given(prompt=st.text(min_size=1), answer=st.text(min_size=1))
def test_prompt_and_answer(tokenizer: Tokenizer, prompt: str, answer: str) -> None:
    """The whole is tokenised as serving tokenises it, and ends; all of the answer is trained on."""
    example = TextEncoder(tokenizer, everything=False).answer(prompt, answer)
    whole = tokenizer.encode(prompt + answer)
    assert example.token_ids[: len(whole)] == whole
    assert example.token_ids[-1] == END
    start = example.trained.index(True)
    assert all(example.trained[start:])
    assert not any(example.trained[:start])
    # The first token is never trained on, even when it takes in a bit of the answer.
    assert start == 1 or example.token_ids[:start] == tokenizer.encode(prompt)[:start]


def test_a_prompt_that_ends_in_a_space_token(tokenizer: Tokenizer) -> None:
    example = TextEncoder(tokenizer, everything=False).answer("The newt ", "is small")
    trained = [id for id, on in zip(example.token_ids, example.trained, strict=True) if on]
    assert tokenizer.decode(trained, skip_special_tokens=False).endswith("is small<|im_end|>")
    assert example.token_ids[:-1] == tokenizer.encode("The newt is small")


def test_whole_texts(tokenizer: Tokenizer) -> None:
    example = TextEncoder(tokenizer, everything=False).text("The newt")
    assert example.token_ids == [*tokenizer.encode("The newt"), END]
    assert example.trained == [False] + [True] * (len(example) - 1)
    everything = TextEncoder(tokenizer, everything=True).answer("The ", "newt")
    assert everything.trained == [False] + [True] * (len(everything) - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a"}, "no field 'output'; it has instruction"),
        ({"instruction": None, "output": "b"}, "instruction is no text"),
        ({"instruction": "a", "output": 3}, "output is no text"),
        ({}, "no field 'instruction'; it is empty"),
        ({"instruction": "a", "output": ""}, r"the answer is empty \(output\)"),
        ({"instruction": "a", "output": " \t"}, r"the answer is empty \(output\)"),
    ],
)
def test_columns_that_are_missing(row: dict[str, object], message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        alpaca(row)
    with pytest.raises(RowProblem, match="no field 'prompt'"):
        written("prompt_completion", row)


def test_empty_texts(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer, everything=False)
    with pytest.raises(RowProblem, match="answer is empty"):
        encoder.answer("a", "")
    with pytest.raises(RowProblem, match="text is empty"):
        encoder.text("")
