"""Token ids to text, token by token: whole characters only, and stop strings across token borders.

The cost of one token depends neither on the length of the output nor on the contents of the stop strings.
"""

from collections.abc import Sequence
from functools import lru_cache

from runtime.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"

MAX_UNREAD = 32
"""Largest number of tokens that wait for the rest of a character. A character has four bytes at most, so more tokens
cannot complete it."""


class StopStrings:
    """Matcher of partial stop strings at the end of a request's text. It reads each character once per stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [(text, _failures(text)) for text in strings]
        self._matched = [0] * len(strings)
        """For each stop string, the number of its first characters that end the text."""

    @property
    def held(self) -> int:
        """Number of characters at the end of the text that could become a stop string."""
        return max(self._matched, default=0)

    def add(self, new: str) -> None:
        """Add text. A string that is complete in it counts only for the part that it shares with the next one."""
        for index, (text, failures) in enumerate(self._strings):
            matched = self._matched[index]
            for char in new:
                while matched and text[matched] != char:
                    matched = failures[matched - 1]
                matched += text[matched] == char
                if matched == len(text):
                    matched = failures[matched - 1]
            self._matched[index] = matched


@lru_cache(maxsize=256)
def _failures(text: str) -> tuple[int, ...]:
    """For each beginning of `text`, the longest shorter one that it ends with (Knuth, Morris and Pratt, 1977)."""
    found, matched = [0], 0
    for char in text[1:]:
        while matched and text[matched] != char:
            matched = found[matched - 1]
        matched += text[matched] == char
        found.append(matched)
    return tuple(found)


class Detokenizer:
    """The text side of one request. `add` returns what is safe to show; `flush` returns the rest.

    Text is held back while it ends in half a character, or could still become a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._stop = stop
        self._stops = StopStrings(stop)
        self._include_stop = include_stop
        # The last few prompt tokens are context: whether a token starts with a space, or whether
        # bytes join to a character, depends on what is before it.
        self._ids = list(prompt_ids[-6:])
        self._prefix = 0
        self._read = len(self._ids)
        self._before: str | None = None
        """Text of the ids from `_prefix` to `_read`, cached at its first use."""
        self._pending = ""
        self.stopped_by: str | None = None
        """The stop string that was found, else None. After it, `add` must not be called."""

    def add(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that this token completes, possibly empty. Sets `stopped_by` when a stop string is there.

        With `may_stop` false (before `min_tokens`) a stop string passes as text.
        """
        self._ids.append(token_id)
        new = self._decode_new()
        self._pending += new
        if not self._stop:
            return self._take(len(self._pending))
        self._stops.add(new)
        found = min(
            ((at, text) for text in self._stop if may_stop and (at := self._pending.find(text)) >= 0),
            default=None,
        )
        if found is None:
            return self._take(len(self._pending) - self._held())
        at, self.stopped_by = found
        shown = self._take(at + (len(self.stopped_by) if self._include_stop else 0))
        self._pending = ""
        return shown

    def flush(self) -> str:
        """The text that was held back, at the end of a request that no stop string ended. Half a character becomes
        U+FFFD, as when all ids are decoded at once."""
        if self.stopped_by is not None:
            return ""
        tail = self._decode(self._prefix)[len(self._text_before()) :]
        return self._take(len(self._pending)) + tail

    def _decode_new(self) -> str:
        """The text from the last read id to the newest; empty while it ends in half a character."""
        before = self._text_before()
        text = self._decode(self._prefix)
        if text.endswith(REPLACEMENT) or len(text) < len(before):
            if len(self._ids) - self._read < MAX_UNREAD:
                return ""
        elif text == before:
            self._ids.pop()  # it has no text, and does not affect later text
            return ""
        self._prefix, self._read, self._before = self._read, len(self._ids), None
        return text[len(before) :]

    def _text_before(self) -> str:
        if self._before is None:
            self._before = self._decode(self._prefix, self._read)
        return self._before

    def _decode(self, start: int, end: int | None = None) -> str:
        ids = self._ids[start:end]
        if len(ids) == 1:
            return self._tokenizer.decode_one(ids[0], skip_special_tokens=self._skip_special)
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def _held(self) -> int:
        return self._stops.held

    def _take(self, count: int) -> str:
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken
