"""Token ids to text, token by token: whole characters only, and stop strings across token borders."""

from runtime.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


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
        self._include_stop = include_stop
        # The last few prompt tokens are context: whether a token starts with a space, or whether
        # bytes join to a character, depends on what is before it.
        self._ids = list(prompt_ids[-6:])
        self._prefix = 0
        self._read = len(self._ids)
        self._before: str | None = None
        """The text of the ids from `_prefix` to `_read`, once it was asked for."""
        self._pending = ""
        self.stopped_by: str | None = None
        """The stop string that was found; nothing is to be added after that."""

    def add(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that this token completes, possibly empty. Sets `stopped_by` when a stop string is there.

        With `may_stop` false (before `min_tokens`) a stop string passes as text.
        """
        self._ids.append(token_id)
        self._pending += self._decode_new()
        if not self._stop:
            return self._take(len(self._pending))
        if not may_stop:
            return self._take(len(self._pending) - self._held())
        found = min(
            ((at, text) for text in self._stop if (at := self._pending.find(text)) >= 0),
            default=None,
        )
        if found is None:
            return self._take(len(self._pending) - self._held())
        at, self.stopped_by = found
        shown = self._take(at + (len(self.stopped_by) if self._include_stop else 0))
        self._pending = ""
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a request that no stop string ended. Half a character
        comes out as U+FFFD, as it does when all ids are decoded at once."""
        if self.stopped_by is not None:
            return ""
        tail = self._decode(self._prefix)[len(self._text_before()) :]
        return self._take(len(self._pending)) + tail

    def _decode_new(self) -> str:
        """The text between what was read and the newest id; empty while that ends in half a character."""
        before = self._text_before()
        text = self._decode(self._prefix)
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
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
        """How many characters at the end of the pending text could be the start of a stop string."""
        longest = min(len(self._pending), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            if any(text.startswith(self._pending[-size:]) for text in self._stop):
                return size
        return 0

    def _take(self, count: int) -> str:
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken
