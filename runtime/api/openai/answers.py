"""The text of one answer as reasoning, content and calls: the same for a stream and a whole answer."""

import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.api.openai.forms import AnswerForm
from runtime.text.reasoning import ReasoningParser
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import CallDelta

MISTRAL_ID = 9
"""Characters of a call's id that the templates of Mistral's models insist on."""


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: one of these is set."""

    reasoning: str = ""
    content: str = ""
    call: CallDelta | None = None


class AnswerParser:
    """Parser of one answer. Its pieces joined are the same for any pieces of the text."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._reasoning = None if form.reasoning is None else ReasoningParser(form.reasoning, inside=form.inside)
        self._calls = None
        if form.calls is not None:
            parser = form.calls.parser_beside_form if form.structured else form.calls.parser
            self._calls = parser(form.tools)
        self.num_calls = 0

    def feed(self, text: str) -> Iterator[Piece]:
        """Pieces that more text brings."""
        if self._reasoning is None:
            yield from self._after_reasoning(text)
            return
        reasoning, content = self._reasoning.feed(text)
        yield from self._split(reasoning, content)

    def finish(self) -> Iterator[Piece]:
        """Pieces at the end of the answer."""
        if self._reasoning is not None:
            yield from self._split(*self._reasoning.finish())
        if self._calls is not None:
            yield from self._pieces(self._calls.finish())

    def _split(self, reasoning: str, content: str) -> Iterator[Piece]:
        if reasoning and self._form.includes_reasoning:
            yield Piece(reasoning=reasoning)
        yield from self._after_reasoning(content)

    def _after_reasoning(self, text: str) -> Iterator[Piece]:
        if not text:
            return
        if self._calls is None:
            yield Piece(content=text)
        else:
            yield from self._pieces(self._calls.feed(text))

    def _pieces(self, events: Sequence[str | CallDelta]) -> Iterator[Piece]:
        for event in events:
            if isinstance(event, str):
                yield Piece(content=event)
            else:
                self.num_calls = event.index + 1
                yield Piece(call=event)


def new_call_id(form: AnswerForm) -> str:
    """Id of a call."""
    if form.calls is not None and form.calls.name.startswith("mistral"):
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(MISTRAL_ID))
    return f"call_{secrets.token_hex(12)}"


def count_reasoning(ids: Sequence[int], form: AnswerForm, tokenizer: Tokenizer) -> int:
    """Number of an output's tokens up to the end of its reasoning."""
    if form.reasoning is None or form.inside is False or not ids:
        return 0

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=False)

    begin, end = form.reasoning.begin, form.reasoning.end
    if not form.inside and not text(len(begin) + 16).lstrip().startswith(begin):
        return 0
    if end not in text(len(ids)):
        return len(ids)
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if end in text(middle) else (middle + 1, high)
    return low
