"""A chat to one example: the tokens that serving would compute, and which of them are an answer's.

An answer begins where the prompt of its chat ends (the messages before it, with the generation prompt), and ends
with the first token that would have ended it in serving. Both are found by tokenising beginnings of the chat
and comparing, so the template may be any that renders the beginning of a chat as the chat's beginning.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from runtime.tokenizer import Tokenizer
from runtime.trainer.data.problems import RowProblem
from runtime.trainer.examples import Example
from runtime.trainer.recipe.dataset import Eos

Messages = Sequence[Mapping[str, Any]]


class ChatEncoder:
    """Tokenises chats of one dataset."""

    def __init__(self, tokenizer: Tokenizer, *, ends: Collection[int], eos: Eos, everything: bool) -> None:
        """`ends` are the ids that end a turn, `eos` says which of them are trained on; `everything`: every
        token is, whoever wrote it."""
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._eos = eos
        self._everything = everything

    def encode(self, messages: Messages, turns: Sequence[int], tools: Sequence[Any] | None) -> Example:
        """The example of a chat in which the messages with the indices `turns` are trained on.

        Raises `RowProblem` for a chat that the template refuses, or renders differently from its beginning,
        and `InvalidRequest` when there is no template.
        """
        whole = self._ids(messages, tools)
        if self._everything:
            return Example(whole, [False, *[True] * (len(whole) - 1)])
        trained = [False] * len(whole)
        last_end = None
        for turn in turns:
            start = self._start(messages, turn, whole, tools)
            stop = self._stop(messages, turn, start, whole, tools)
            end = next((at for at in range(start, stop) if whole[at] in self._ends), None)
            for at in range(start, stop if end is None else end):
                trained[at] = True
            if end is not None:
                trained[end] = self._eos in ("turn", "all")
                last_end = end
        if self._eos == "last" and last_end is not None:
            trained[last_end] = True
        if self._eos == "all":
            trained = [on or id in self._ends for on, id in zip(trained, whole, strict=True)]
        trained[:1] = [False] * len(trained[:1])
        return Example(whole, trained)

    def _start(self, messages: Messages, turn: int, whole: list[int], tools: Sequence[Any] | None) -> int:
        """Index of the first token of a message's content."""
        if turn == 0 or messages[turn]["role"] != "assistant":
            return _common(self._ids(_with_other_content(messages[: turn + 1]), tools), whole)
        before = messages[:turn]
        prompt = self._ids(before, tools, prompt=True)
        start = _common(prompt, whole)
        if start < len(prompt) and not self._text(messages, tools).startswith(self._text(before, tools, prompt=True)):
            raise RowProblem(
                f"message {turn + 1}: the chat template renders this chat otherwise than the prompt that the message "
                "would answer in serving, so it cannot be trained on"
            )
        return start  # before the prompt's end where the answer's first token takes in its last characters

    def _stop(self, messages: Messages, turn: int, start: int, whole: list[int], tools: Sequence[Any] | None) -> int:
        """Index after the last token that the template writes for a message."""
        if turn == len(messages) - 1:
            return len(whole)
        until = messages[: turn + 1]
        part = self._ids(until, tools)
        stop = _common(part, whole)
        agrees = stop == len(part) or any(id in self._ends for id in whole[start:stop])
        if not agrees and not self._text(messages, tools).startswith(self._text(until, tools)):
            raise RowProblem(
                f"message {turn + 1}: the chat template renders it differently when other messages follow, so it "
                "cannot be trained on in the middle of a chat; end the chat with it"
            )
        return stop

    def _ids(self, messages: Messages, tools: Sequence[Any] | None, *, prompt: bool = False) -> list[int]:
        return self._tokenizer.encode_chat(messages, add_generation_prompt=prompt, tools=tools)

    def _text(self, messages: Messages, tools: Sequence[Any] | None, *, prompt: bool = False) -> str:
        return self._tokenizer.render_chat(messages, add_generation_prompt=prompt, tools=tools)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != other[at])


def _with_other_content(messages: Messages) -> Messages:
    """The messages with another content in the last one, that differs from its first character on."""
    last = messages[-1]
    other = "Z" if str(last.get("content") or "").lstrip()[:1] != "Z" else "Q"
    return [*messages[:-1], {**last, "content": other}]
