"""A limit to the tokens of reasoning: once they are used up, the text that ends it is forced, token by token."""

from collections.abc import Sequence

from llguidance import LLTokenizer
from msgspec import Struct


class ThinkingBudget(Struct, frozen=True, kw_only=True):
    """Bounds of reasoning in an output: its beginning, its end, and its largest length."""

    tokens: int
    """Most tokens of reasoning, without its begin and end."""
    begin: str | None
    """Text at the start of an output that reasons; None: every output begins inside of reasoning."""
    end: str
    end_ids: list[int]
    """Tokens of `end`, which are forced."""


class BudgetTracker:
    """Position of one output in its reasoning. The tokens that are given may be any, longer or shorter than before."""

    def __init__(self, budget: ThinkingBudget, tokenizer: LLTokenizer) -> None:
        self._budget = budget
        self._tokenizer = tokenizer
        self._restart()

    def _restart(self) -> None:
        self._seen: list[int] = []
        self._begun_at = 0 if self._budget.begin is None else None
        """Number of tokens at the end of `begin`."""
        self._decided = self._budget.begin is None
        self._closed_at: int | None = None
        """Number of tokens at the end of `end`."""
        self._cut_at: int | None = None
        """Number of tokens at which the end begins to be forced."""
        self._look_for_cut(0)

    def forced(self, tokens: Sequence[int]) -> int | None:
        """The token that has to follow on `tokens`; None if the budget forces none."""
        self._follow(tokens)
        if self._cut_at is None or self._closed_at is not None:
            return None
        beyond = len(tokens) - self._cut_at
        return self._budget.end_ids[beyond] if beyond < len(self._budget.end_ids) else None

    def _follow(self, tokens: Sequence[int]) -> None:
        seen = len(self._seen)
        if list(tokens[:seen]) != self._seen:
            self._restart()
            seen = 0
        for count in range(seen + 1, len(tokens) + 1):
            self._seen.append(tokens[count - 1])
            if not self._decided:
                self._decide(count)
            elif self._begun_at is not None and self._closed_at is None:
                self._look_for_end(count)
            self._look_for_cut(count)

    def _decide(self, count: int) -> None:
        text = self._text(0).lstrip()
        begin = (self._budget.begin or "").encode()
        if text.startswith(begin):
            self._begun_at, self._decided = count, True
        elif not begin.startswith(text):
            self._decided = True

    def _look_for_end(self, count: int) -> None:
        assert self._begun_at is not None
        end = self._budget.end.encode()
        # A token has a byte at least, so the end is within this many tokens.
        if end in self._text(max(self._begun_at, count - len(end))):
            self._closed_at = count

    def _look_for_cut(self, count: int) -> None:
        """The budget is used up, unless it is so in the middle of a character, after which nothing else may come."""
        if self._cut_at is not None or self._begun_at is None or count - self._begun_at < self._budget.tokens:
            return
        tail = self._text(max(self._begun_at, count - 4))[-4:]
        start = next((at for at in range(1, len(tail) + 1) if tail[-at] & 0xC0 != 0x80), 0)
        first = tail[-start] if start else 0
        size = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1
        if size <= start or not tail:
            self._cut_at = count

    def _text(self, start: int) -> bytes:
        return self._tokenizer.decode_bytes(self._seen[start:])
