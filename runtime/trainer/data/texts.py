"""Rows of texts, without a chat template: a prompt and its answer, or one text.

The prompt's tokens are those that `/v1/completions` would compute for it. An end-of-sequence token follows.
"""

from collections.abc import Mapping
from typing import Any

from runtime.tokenizer import Tokenizer
from runtime.trainer.data.messages import fields_of
from runtime.trainer.data.problems import RowProblem
from runtime.trainer.examples import Example

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and answer of a row with instruction, input (may be absent or empty) and output, in the wording of
    Stanford Alpaca."""
    instruction, answer = text_of(row, "instruction"), text_of(row, "output")
    given = text_of(row, "input") if row.get("input") is not None else ""
    # Replaced one after the other, the second would also be looked for in the first.
    head, _, rest = (_ALPACA_INPUT if given else _ALPACA).partition("{instruction}")
    return head + instruction + rest.replace("{input}", given), answer


def prompt_completion(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and answer of OpenAI's older fine-tuning lines."""
    return text_of(row, "prompt"), text_of(row, "completion")


def text_of(row: Mapping[str, Any], field: str) -> str:
    """The text in a field. Raises `RowProblem`."""
    value = row.get(field)
    if field not in row:
        raise RowProblem(f"has no field {field!r}{fields_of(row)}")
    if not isinstance(value, str):
        raise RowProblem(f"{field} is no text")
    return value


class TextEncoder:
    """Tokenises texts of one dataset."""

    def __init__(self, tokenizer: Tokenizer, *, everything: bool) -> None:
        """`everything`: prompts are trained on, too."""
        self._tokenizer = tokenizer
        self._everything = everything
        self._eos = list(tokenizer.eos_ids[:1])

    def answer(self, prompt: str, answer: str) -> Example:
        """The example of an answer that follows a prompt."""
        if not answer:
            raise RowProblem("the answer is empty")
        ids, before = self._ids(prompt + answer), self._tokenizer.encode(prompt)
        start = next((at for at, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other), None)
        start = min(len(before), len(ids)) if start is None else start
        start = max(1, 0 if self._everything else start)
        return Example(ids, [at >= start for at in range(len(ids))])

    def text(self, text: str) -> Example:
        """The example of a text that is trained on from beginning to end."""
        if not text:
            raise RowProblem("the text is empty")
        ids = self._ids(text)
        return Example(ids, [at > 0 for at in range(len(ids))])

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        return ids if ids[-1:] == self._eos else ids + self._eos
