"""A chat to one example: the tokens that serving would compute, and which of them are an answer's.

An answer begins where the prompt of its chat ends (the messages before it, with the generation prompt), and ends
with the first token that would have ended it in serving. Both are found by tokenising beginnings of the chat
and comparing, so the template may be any that renders the beginning of a chat as the chat's beginning.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_prompt import shown_call, shown_tool
from runtime.trainer.data.example import Example, RowProblem
from runtime.trainer.data.messages import Span, text_of
from runtime.trainer.recipe.dataset import Eos

# -- spans -----------------------------------------------------------------------------------------
#
# Spans of a message's text, in characters, to tokens.
#
# A tokenizer joins the end of one part and the beginning of the next (a space and the word after it) where it can.
# Such a token is taken apart where the parts meet, so that exactly the marked text of the row is trained on.

MAX_CHARACTER = 4
"""Tokens of one character at most: the bytes of UTF-8."""


class TokenSplit(NamedTuple):
    """A token that is taken apart."""

    at: int
    """Its index."""
    ids: list[int]
    """Tokens that take its place."""
    trained: list[bool]


class Marked(NamedTuple):
    """The tokens of a message that are trained on."""

    trained: list[bool]
    """For each token."""
    splits: list[TokenSplit]
    """In order."""


def mark_spans(
    tokenizer: Tokenizer, whole: list[int], text: slice, spans: Sequence[Span], beginning: Callable[[int], list[int]]
) -> Marked:
    """The marks of the tokens `text` of a chat, which are a message's. `beginning` gives the tokens of the chat up to
    a character of that message. A token that cannot be taken apart belongs to the later span."""

    def read(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    trained, shared = list[bool](), dict[int, list[tuple[int, int]]]()
    for number, span in enumerate(spans[:-1]):
        begun = read(beginning(span.end))
        # The first token boundary that is not before the end of the span. A character may take several tokens, and
        # reads as one that is unknown until the last of them.
        after = bisect_left(range(text.start, text.stop), len(begun), key=lambda at: len(read(whole[:at])))
        ends = range(after, min(after + MAX_CHARACTER, text.stop - text.start) + 1)
        after = next((at for at in ends if read(whole[: text.start + at]).startswith(begun)), after)
        until = read(whole[: text.start + after])
        if until != begun:
            after = max(0, after - 1)
            if until.startswith(begun):
                shared.setdefault(text.start + after, []).append((len(until) - len(begun), number))
        trained += [span.trained] * (after - len(trained))
    trained += [spans[-1].trained] * (len(whole[text]) - len(trained))
    splits = [
        split for at, cuts in sorted(shared.items()) if (split := _split(tokenizer, whole, at, spans, cuts, read))
    ]
    return Marked(trained, splits)


def apply_splits(splits: Sequence[TokenSplit], ids: list[int], trained: list[bool]) -> None:
    """Put the splits of all messages into a chat's tokens and marks."""
    for split in sorted(splits, reverse=True):
        ids[split.at : split.at + 1] = split.ids
        trained[split.at : split.at + 1] = split.trained


def _split(
    tokenizer: Tokenizer,
    whole: list[int],
    at: int,
    spans: Sequence[Span],
    cuts: Sequence[tuple[int, int]],
    read: Callable[[list[int]], str],
) -> TokenSplit | None:
    """`cuts`: characters from the end of the token, and the span that ends there. None: it stays whole."""
    upto = read(whole[: at + 1])
    rest = len(upto) - len(read(whole[:at]))
    found, flags = list[int](), list[bool]()
    for left, number in [*cuts, (0, cuts[-1][1] + 1)]:
        ids = (
            tokenizer.encode(upto[len(upto) - rest : len(upto) - left], add_special_tokens=False) if rest > left else []
        )
        found += ids
        flags += [spans[number].trained] * len(ids)
        rest = left
    return TokenSplit(at, found, flags) if read([*whole[:at], *found]) == upto else None


Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any] | None


class ChatEncoder:
    """Tokenises chats of one dataset."""

    def __init__(self, tokenizer: Tokenizer, *, ends: Collection[int], eos: Eos, everything: bool) -> None:
        """`ends` are the ids that end a turn, `eos` selects those to train on; `everything`: every
        token is, of any role."""
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._eos = eos
        self._everything = everything
        self.turn_ends: Counter[int | None] = Counter()
        """Id → number of the turns trained on so far that it ended; None: turns that no id of `ends` ended."""

    def encode(
        self,
        messages: Messages,
        turns: Sequence[int],
        tools: Tools,
        marked: Mapping[int, Sequence[Span]] | None = None,
    ) -> Example:
        """The example of a chat in which the messages with the indices `turns` are trained on; `marked` has, for
        some of them, the spans of their text that are.

        Raises `RowProblem` for a chat that the template refuses, or renders differently from its beginning,
        and `InvalidRequest` when there is no template.
        """
        messages, tools = _as_served(messages), [shown_tool(tool.get("function", tool)) for tool in tools or ()]
        whole = self._ids(messages, tools)
        if self._everything:
            end_id = next((id for id in reversed(whole) if id in self._ends), None)
            self.turn_ends[end_id] += len(turns)
            return Example(whole, [False, *[True] * (len(whole) - 1)])
        trained = [False] * len(whole)
        splits, last_end = list[TokenSplit](), None
        for turn in turns:
            start = self._start(messages, turn, whole, tools)
            stop = self._stop(messages, turn, start, whole, tools)
            end = next((at for at in range(start, stop) if whole[at] in self._ends), None)
            self.turn_ends[None if end is None else whole[end]] += 1
            text = slice(start, stop if end is None else end)
            parts = (marked or {}).get(turn)
            if parts is None:
                trained[text] = [True] * len(trained[text])
            else:
                found = self._mark(messages, turn, parts, whole, text, tools)
                trained[text] = found.trained
                splits += found.splits
            if end is not None and (parts is None or parts[-1].trained):
                trained[end] = self._eos in ("turn", "all")
                last_end = end
        if self._eos == "last" and last_end is not None:
            trained[last_end] = True
        if self._eos == "all":
            trained = [on or id in self._ends for on, id in zip(trained, whole, strict=True)]
        trained[:1] = [False] * len(trained[:1])
        apply_splits(splits, whole, trained)
        return Example(whole, trained)

    def _start(self, messages: Messages, turn: int, whole: list[int], tools: Tools) -> int:
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

    def _stop(self, messages: Messages, turn: int, start: int, whole: list[int], tools: Tools) -> int:
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

    def _mark(
        self, messages: Messages, turn: int, marked: Sequence[Span], whole: list[int], text: slice, tools: Tools
    ) -> Marked:
        """Marks of a message's tokens `text`: the ones that are trained on."""

        def beginning(end: int) -> list[int]:
            last = {**messages[turn], "content": messages[turn]["content"][:end]}
            cut = [*messages[:turn], last]
            shown, shown_tools = self._tokenizer.adapt_tools(cut, tools or ())
            if last.get("tool_calls") and not shown[-1].get("tool_calls"):  # written behind the text, as text
                del last["tool_calls"]
                shown, shown_tools = self._tokenizer.adapt_tools(cut, tools or ())
            return self._tokenizer.encode_chat(
                shown, add_generation_prompt=False, continue_final_message=True, tools=shown_tools
            )

        return mark_spans(self._tokenizer, whole, text, marked, beginning)

    def _ids(self, messages: Messages, tools: Tools, *, prompt: bool = False) -> list[int]:
        shown, shown_tools = self._tokenizer.adapt_tools(messages, tools or ())
        return self._tokenizer.encode_chat(shown, add_generation_prompt=prompt, tools=shown_tools)

    def _text(self, messages: Messages, tools: Tools, *, prompt: bool = False) -> str:
        shown, shown_tools = self._tokenizer.adapt_tools(messages, tools or ())
        return self._tokenizer.render_chat(shown, add_generation_prompt=prompt, tools=shown_tools)


def _as_served(messages: Messages) -> list[dict[str, Any]]:
    """The messages with their calls in the form that a request's history gets."""
    found = []
    for message in messages:
        calls = [
            shown_call(call.get("function", call), index, call.get("id"))
            for index, call in enumerate(message.get("tool_calls") or ())
        ]
        found.append({**message, "tool_calls": calls} if calls else dict(message))
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at in range(shorter) if one[at] != other[at])


def _with_other_content(messages: Messages) -> Messages:
    """The messages with another content in the last one, that differs from its first character on."""
    last = messages[-1]
    other = "Z" if text_of(last.get("content") or "").lstrip()[:1] != "Z" else "Q"
    return [*messages[:-1], {**last, "content": other}]
