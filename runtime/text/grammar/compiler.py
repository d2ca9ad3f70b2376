"""Compiled grammars: the tokens that may come next, for each sequence that is held to one.

`GrammarCompiler` belongs to one tokenizer and is shared by all threads. A `GrammarState` belongs to one sequence.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from runtime.errors import InvalidRequest
from runtime.text.grammar.budget import BudgetTracker, ThinkingBudget
from runtime.text.grammar.source import GrammarSource
from runtime.text.tokenizer import Tokenizer

MAX_CACHED = 256
"""Most compiled grammars that are kept."""

MAX_CACHED_CHARS = 16 * 1024**2
"""Most characters of the grammars that are kept."""

MAX_FORCED = 64
"""Most tokens that are taken without a step in a row."""

MAX_MESSAGE = 300
"""Characters of llguidance's message that a client gets."""

# llguidance's defaults allow a minute of compiling. A mask is computed between two steps, so its limits are lower.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,
    max_lexer_states=100_000,
    max_grammar_size=400_000,
    verbose_errors=False,
)


class GrammarFailed(Exception):
    """A sequence cannot be held to its grammar any further: it has left it, or a limit of llguidance was reached."""


class Grammar(Protocol):
    """A language of answers, compiled for one tokenizer."""

    text: str
    """Source, from which the same grammar can be compiled elsewhere."""

    def start(self) -> "GrammarState":
        """The state of a sequence without output."""


class GrammarState(Protocol):
    """Position of one sequence in a grammar. One thread at a time may use it."""

    def follow(self, tokens: Sequence[int]) -> None:
        """Go to the position after an output of `tokens`, from any other position. Raises `GrammarFailed`."""

    def accept(self, token: int) -> bool:
        """Go on by one token. False, and no change, where the grammar does not allow it."""

    def fill(self, mask: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next, and clear the others. mask [ceil(vocab_size / 32)]. Raises
        `GrammarFailed`."""

    def forced(self) -> int | None:
        """The only token that may come next, the end of the sequence included; None where there are several."""

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""


class GrammarCompiler:
    """Compiler of grammars for one tokenizer, with a cache."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int] | None = None) -> None:
        """`eos_ids`: the ids that end an output; default: the tokenizer's. The first `compile` reads the vocabulary,
        which takes a moment with a large one."""
        self.tokenizer = tokenizer
        self.eos_ids = tuple(tokenizer.eos_ids if eos_ids is None else eos_ids)
        self._lock = threading.Lock()
        self._backend: LLTokenizer | None = None
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._cached_chars = 0

    def special_id(self, text: str) -> int | None:
        """Id of the special token with this text; None if the text is written with ordinary tokens."""
        id = self.tokenizer.token_id(text)
        return id if id is not None and self.backend.is_special_token(id) else None

    @property
    def backend(self) -> LLTokenizer:
        """llguidance's form of the tokenizer. The embedding's rows without a token are never allowed."""
        with self._lock:
            if self._backend is None:
                self._backend = LLTokenizer(
                    self.tokenizer.definition,
                    n_vocab=self.tokenizer.vocab_size,
                    eos_token=list(self.eos_ids) or None,
                )
            return self._backend

    def cached(self, text: str) -> "CompiledGrammar | None":
        """The grammar, if it is in the cache."""
        with self._lock:
            if (found := self._cache.get(text)) is not None:
                self._cache.move_to_end(text)
            return found

    def compile(self, text: str, *, param: str | None = None) -> "CompiledGrammar":
        """The compiled form of a grammar as `GrammarBuilder.build` gives it. Lets go of Python's lock while it takes
        long. Raises `InvalidRequest` naming a keyword that cannot be enforced, and for what nothing satisfies."""
        if (found := self.cached(text)) is not None:
            return found
        if not self.eos_ids:
            raise InvalidRequest(
                "This model has no token that ends an output, so a grammar cannot end one either.", param=param
            )
        source = msgspec.json.decode(text, type=GrammarSource)
        matcher = LLMatcher(self.backend, source.rules, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            first = np.zeros(-(-self.tokenizer.vocab_size // 32), dtype=np.int32)
            matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
            if not matcher.is_error() and not first.any():
                raise InvalidRequest("Nothing satisfies this grammar.", param=param)
        if matcher.is_error():
            raise InvalidRequest(f"The grammar cannot be used: {_reason(matcher)}", param=param)
        grammar = CompiledGrammar(text, matcher, self.backend, self.eos_ids, source.budget)
        with self._lock:
            if text not in self._cache:
                self._cached_chars += len(text)
            self._cache[text] = grammar
            while len(self._cache) > MAX_CACHED or (self._cached_chars > MAX_CACHED_CHARS and len(self._cache) > 1):
                dropped, _ = self._cache.popitem(last=False)
                self._cached_chars -= len(dropped)
        return grammar

    def __len__(self) -> int:
        """Number of grammars in the cache."""
        return len(self._cache)


class CompiledGrammar:
    """A grammar of llguidance. Any thread may start states."""

    def __init__(
        self,
        text: str,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        eos_ids: tuple[int, ...],
        budget: ThinkingBudget | None,
    ) -> None:
        self.text = text
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._budget = budget
        self._lock = threading.Lock()

    def start(self) -> "CompiledState":
        tracker = None if self._budget is None else BudgetTracker(self._budget, self._tokenizer)
        with self._lock:
            return CompiledState(self._matcher.deep_copy(), self._eos_ids, tracker)


class CompiledState:
    """State of one sequence in a `CompiledGrammar`."""

    def __init__(self, matcher: LLMatcher, eos_ids: tuple[int, ...], budget: BudgetTracker | None) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._budget = budget
        self._tokens: list[int] = []
        """Output that the matcher has accepted."""

    def follow(self, tokens: Sequence[int]) -> None:
        tokens = list(tokens)
        done = len(self._tokens)
        if tokens[:done] != self._tokens:
            done = next(
                (at for at, (a, b) in enumerate(zip(tokens, self._tokens, strict=False)) if a != b),
                min(len(tokens), len(self._tokens)),
            )
            self.rollback(len(self._tokens) - done)
        new = tokens[done:]
        if new and not self._matcher.consume_tokens(new):
            raise GrammarFailed(_reason(self._matcher))
        self._tokens += new

    def accept(self, token: int) -> bool:
        if self._matcher.is_stopped() or self._matcher.try_consume_tokens([token]) != 1:
            return False
        self._tokens.append(token)
        return True

    def fill(self, mask: NDArray[np.int32]) -> None:
        if self._matcher.is_error():
            raise GrammarFailed(_reason(self._matcher))
        if self._matcher.is_stopped() or (self._budget is not None and self._budget.forced(self._tokens) is not None):
            forced = self.forced()
            assert forced is not None
            mask.fill(0)
            mask.view(np.uint32)[forced // 32] |= np.uint32(1 << forced % 32)
            return
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise GrammarFailed(_reason(self._matcher))

    def forced(self) -> int | None:
        if self._matcher.is_error():
            return None
        if self._matcher.is_stopped():
            return self._eos_ids[0]  # any is allowed, and all end the output
        if self._budget is not None and (forced := self._budget.forced(self._tokens)) is not None:
            return forced
        return next(iter(self._matcher.compute_ff_tokens()), None)

    def rollback(self, count: int) -> None:
        if count:
            del self._tokens[len(self._tokens) - count :]
            if not self._matcher.rollback(count):
                raise GrammarFailed(_reason(self._matcher))


def _reason(matcher: LLMatcher) -> str:
    """llguidance's message without its dumps of states, for a client."""
    text = matcher.get_error().split("<state>")[0].strip()
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}…"
