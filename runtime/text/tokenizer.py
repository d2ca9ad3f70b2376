"""Text to token ids and back, and chats to prompts.

Built on the `tokenizers` library alone: importing transformers would take longer than loading a small model.
`runtime.checkpoints` makes a `Tokenizer` from a model's files; this module reads no files.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

from runtime.errors import ContextLengthExceeded, InvalidRequest
from runtime.text.chat_template import ChatTemplate, ChatTemplateError, TemplateMessage
from runtime.text.own_tokens import OwnToken, new_tokens, with_own_tokens
from runtime.text.special_text import SpecialText
from runtime.text.token_bounds import bound_of
from runtime.text.tool_prompt import ToolSupport, prepare_tools
from runtime.text.turn_end import TurnEnd, turn_end

# The calling thread encodes a text by itself: the cores belong to the engine's own threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHORT = 4000
"""Longest input, in characters or tokens, that is processed under Python's lock. The library keeps the lock unless it
gets a batch. Up to this length that takes a few milliseconds, and releasing the lock could take longer."""

FIRST_PROBE = 4
"""Number of characters per token of the limit that are encoded first, to check if a text is too long."""
MAX_PROBE_TOKENS = 4
"""Largest number of tokens, per token of the limit, of the beginning of a text."""

MAX_IDS = 2 * 1024**2
"""Largest number of ids that are returned, unless the caller sets a higher limit: making a list of them keeps the
lock."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte in a vocabulary with byte fallback."""


def _bytes_by_char() -> dict[str, int]:
    """Character → the byte that it stands for in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _bytes_by_char()
MAX_VOCABULARIES = 4
"""Number of tokenizers with tokens of adapters that are kept."""
MAX_OTHER_TEMPLATES = 8
"""Number of compiled templates that are kept, besides the model's own."""

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "</s>",
)
"""Tokens that end a turn in the common chat formats. Many models' configurations name only the token that ends a text;
a token of this list that the chat template writes ends the output too."""


class InfillTokens(NamedTuple):
    """Ids of the tokens around the two texts of a prompt whose middle is asked for, in the order of the prompt."""

    prefix: int
    suffix: int
    middle: int

    def prompt(self, before: list[int], behind: list[int]) -> list[int]:
        """The prompt that asks for what stands between two texts."""
        return [self.prefix, *before, self.suffix, *behind, self.middle]


_INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
)

ANSWER_BEGINNINGS = ("a", "1", "\n\na", "  a", *"`-<([{\"'*#$:!。")
"""Beginnings of answers that a tokenizer may join with what stands before."""


class Tokenizer:
    """One model's tokenizer. Immutable except for its caches, so any thread may call it."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
        wants_bos: bool = False,
    ) -> None:
        """`template_tokens` are the tokens that a template may print by name, such as `bos_token`; `wants_bos`: the
        model's configuration requires a BOS before texts, whether `backend` adds one or not.

        `eos_ids` are the ids that the model's configuration names. The ends of turns that the chat template writes are
        added: the ones in END_OF_TURN, and, if none of the tokens after an answer is in the result, the first of these
        tokens if it is special. Raises `ChatTemplateError` when the template does not compile.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._template = None if chat_template is None else ChatTemplate(chat_template, template_tokens)
        self.template_tokens: Mapping[str, str] = template_tokens or {}
        """Tokens that a template may print by name."""
        self._template_of = lru_cache(MAX_OTHER_TEMPLATES)(self._compile)
        self.with_template = lru_cache(MAX_OTHER_TEMPLATES)(self._with_template)
        self.with_tokens = lru_cache(MAX_VOCABULARIES)(self._with_tokens)
        vocab = backend.get_vocab(with_added_tokens=True)  # every id once: it takes long with a large vocabulary
        self.bos_id = bos_id
        self.wants_bos = wants_bos
        self.num_ids: int = max(vocab.values(), default=-1) + 1
        """One more than the highest id of a token. Some ids below it may have no token."""
        self.vocab_size: int = self.num_ids
        """Ids from 0 to below this are valid: `num_ids`, or the rows of the model's embedding, see `sized`."""
        self._special_text = SpecialText(backend, self.num_ids)
        self.text_bound = bound_of(backend, vocab)
        """Lower bound of a text's tokens from its length alone."""
        self._own_eos_ids = tuple(eos_ids)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*self._own_eos_ids, *self._ends_of_turn()]))
        self._support: ToolSupport | None = None
        """What the template prints of tools, once it was needed."""
        self._alone: dict[tuple[int, bool], str] = {}
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor = anchor, backend.decode(anchor)
        self.turn_end: TurnEnd = turn_end(self)
        """The end of answers in chats, and its problems."""
        self._end_turns()
        self._answer_start = self._find_answer_start()

    def _end_turns(self) -> None:
        if self.turn_end.token_id is None and (added_end := self._special_end(self.turn_end)) is not None:
            self.eos_ids = (*self.eos_ids, added_end)
            self.turn_end = turn_end(self)

    def _with_template(self, source: str) -> "Tokenizer":
        """The same tokenizer with another chat template, the ends of turns that it writes among `eos_ids`. Cached.

        Raises `ChatTemplateError` when the template does not compile.
        """
        other = copy(self)
        other._template = self._compile(source)
        other._support = None
        other.eos_ids = tuple(dict.fromkeys([*self._own_eos_ids, *other._ends_of_turn()]))
        other.turn_end = turn_end(other)
        other._end_turns()
        other._answer_start = other._find_answer_start(ANSWER_BEGINNINGS)
        return other

    def _find_answer_start(self, beginnings: Sequence[str] = ("a",)) -> str:
        """The text before an answer, where its last tokens are others once one of `beginnings` follows; else "".

        A prompt ends with this text, and it stands before every answer in a history and in rows to train on. Where a
        tokenizer reads its end otherwise before other text ("\\n\\n" is one token at the end of llama3's prompt, and
        two before a word in GPT-2's way of cutting texts), an answer would be learned after other tokens than it is
        asked with. So chats are cut there: with the model's own template where an ordinary word does that, as other
        answers are read as other servers do; with another template where any beginning does.
        """
        if self._template is None:
            return ""
        question = "Who?"
        asked = [{"role": "user", "content": question}]
        try:
            chat = self._template.render(asked, add_generation_prompt=False, variables={})
            prompt = self._template.render(asked, add_generation_prompt=True, variables={})
        except InvalidRequest:  # a template of other roles
            return ""
        start = prompt.removeprefix(chat) if prompt.startswith(chat) else ""
        start = start or prompt.rpartition(question)[2]  # a template whose questions end as prompts do
        if not start:
            return ""
        alone, then = (self._backend.encode(text, add_special_tokens=False).ids for text in (start, "a"))
        if self._backend.decode([*alone, *then], skip_special_tokens=False) != start + "a":
            return ""  # a tokenizer that puts a space before each text
        together = (self._backend.encode(start + text, add_special_tokens=False).ids for text in beginnings)
        return start if any(ids[: len(alone)] != alone for ids in together) else ""

    def _with_tokens(
        self, tokens: tuple[OwnToken, ...], *, rows: int | None = None, eos_id: int | None = None
    ) -> "Tokenizer":
        """The tokenizer of an adapter with tokens of its own, and perhaps more rows; `eos_id` ends its texts. Takes a
        second with a large vocabulary; cached.

        Raises `ValueError` where a token has no row, or does not fit the vocabulary.
        """
        backend = with_own_tokens(self._backend, tokens)
        named, ends = dict(self.template_tokens), self._own_eos_ids
        if eos_id is not None:
            named["eos_token"], ends = backend.id_to_token(eos_id) or "", (eos_id, *ends)
        other = Tokenizer(
            backend,
            bos_id=self.bos_id,
            eos_ids=ends,
            chat_template=self.chat_template,
            template_tokens=named,
            wants_bos=self.wants_bos,
        )
        return other.sized(max(self.vocab_size, rows or 0))

    def new_tokens(self, texts: Sequence[tuple[str, bool]]) -> list[OwnToken]:
        """See `own_tokens.new_tokens`."""
        return new_tokens(self._backend, texts)

    def is_added(self, id: int) -> bool:
        """True for a token that was added to the vocabulary as a whole, such as a special or a reserved one."""
        return id in self._backend.get_added_tokens_decoder()

    def sized(self, rows: int) -> "Tokenizer":
        """The tokenizer of a model whose embedding has `rows` rows: every id of a row is valid, with a token or not.

        Raises `ValueError` naming both counts where a token, or an id that ends generation, has no row.
        """
        if self.num_ids > rows:
            raise ValueError(
                f"the tokenizer has ids up to {self.num_ids - 1} ({self.token_text(self.num_ids - 1)!r}), "
                f"{self.num_ids} in all, and the embedding has {rows} rows (vocab_size): take the tokens without a row "
                "out of the tokenizer's files, or give the embedding more rows"
            )
        if (beyond := max(self.eos_ids, default=-1)) >= rows:
            raise ValueError(f"eos_token_id has the id {beyond}, and the embedding has {rows} rows: 0 to {rows - 1}")
        other = copy(self)
        other._template_of = lru_cache(MAX_OTHER_TEMPLATES)(other._compile)
        other.with_template = lru_cache(MAX_OTHER_TEMPLATES)(other._with_template)
        other.with_tokens = lru_cache(MAX_VOCABULARIES)(other._with_tokens)
        other.vocab_size = rows
        if other.bos_id is not None and other.bos_id >= rows:
            other.bos_id = None  # no token: nothing begins with it
        return other

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template."""
        return None if self._template is None else self._template.source

    @property
    def definition(self) -> str:
        """Contents of a `tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Ids of `text`. Special tokens written in it become their ids.

        `add_special_tokens` adds the model's tokens around a text, such as a BOS. A long text is encoded without
        Python's lock. Raises `InvalidRequest` for text that is not valid Unicode, and `ContextLengthExceeded` as soon
        as it is certain that there are more than `max_tokens`; below four times `max_tokens` the check is left to the
        caller.
        """
        _check_unicode(text)
        return self._encode(self._backend, text, add_special_tokens, max_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are no whole character become U+FFFD, ids without a token are skipped. Many ids are
        decoded without Python's lock."""
        if len(ids) <= SHORT:
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def decode_one(self, id: int, *, skip_special_tokens: bool = True) -> str:
        """`decode` of one id, cached: every output decodes each of its ids alone once."""
        key = (id, skip_special_tokens)
        text = self._alone.get(key)
        if text is None:
            text = self._alone[key] = self._backend.decode([id], skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, id: int) -> str:
        """Text of one token in the middle of a text, with its leading space. Cached."""
        found = self._texts.get(id)
        if found is None:
            ids, text = self._anchor
            found = self._texts[id] = self._backend.decode([*ids, id], skip_special_tokens=False)[len(text) :]
        return found

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of one token in the middle of a text; part of a character where the token is that. Cached."""
        found = self._bytes.get(id)
        if found is None:
            found = self._bytes[id] = self._bytes_of(id)
        return found

    def _bytes_of(self, id: int) -> bytes:
        text = self.token_text(id)
        if "\ufffd" not in text:
            return text.encode()
        spelled = self.token_string(id)
        if (byte := _BYTE_TOKEN.fullmatch(spelled)) is not None:
            return bytes([int(byte[1], 16)])
        if all(char in _BYTE_OF for char in spelled):
            return bytes(_BYTE_OF[char] for char in spelled)
        return text.encode()

    def bad_word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Ids of each text alone, and of it after a space where these differ: as a first word, and as a later one."""
        spelled = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
        ids = (self.encode(text, add_special_tokens=False) for text in spelled)
        return [list(one) for one in dict.fromkeys(map(tuple, ids)) if one]

    def token_string(self, id: int) -> str:
        """The token as the vocabulary spells it (`Ġthe` in a byte-level one); empty where the id has none."""
        return self._backend.id_to_token(id) or ""

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text, or None."""
        return self._backend.token_to_id(text)

    @property
    def infill(self) -> InfillTokens | None:
        """Tokens to fill in a middle; None where the vocabulary has none that are known."""
        for names in _INFILL:
            ids = [self.token_id(name) for name in names]
            if None not in ids:
                return InfillTokens(*(id for id in ids if id is not None))
        return None

    def _compile(self, chat_template: str) -> ChatTemplate:
        return ChatTemplate(chat_template, self.template_tokens)

    def render_chat(
        self,
        messages: Sequence[TemplateMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """The prompt text of a chat. `template_kwargs` are further variables of the template, `chat_template` is the
        source of another one than the model's.

        `continue_final_message` leaves the last message open, for the model to continue it. Raises `InvalidRequest`
        when the model has no template, the template refuses the messages, or `chat_template` does not compile.
        """
        try:
            template = self._template if chat_template is None else self._template_of(chat_template)
        except ChatTemplateError as error:
            raise InvalidRequest(f"{error}.", param="chat_template") from error
        if template is None:
            raise InvalidRequest(
                "This model has no chat template: use completions, or start the server with a chat template.",
                param="messages",
            )
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=template_kwargs or {},
        )

    def adapt_tools(
        self, messages: Sequence[TemplateMessage], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Sequence[TemplateMessage], Sequence[Mapping[str, Any]] | None]:
        """Messages and tools in the form that the chat template prints, for `render_chat` and `encode_chat`. Arguments
        of calls in `messages` are objects."""
        uses = tools or any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)
        if not uses or self._template is None:
            return messages, None
        return prepare_tools(self._tool_support(self._template), messages, tools)

    def _tool_support(self, template: ChatTemplate) -> ToolSupport:
        if self._support is None:
            self._support = ToolSupport.of(template)
        return self._support

    @property
    def writes_own_tools(self) -> bool:
        """True if the chat template prints descriptions of tools; without, they are described in the system message,
        and calls are in the form of Hermes."""
        return self._template is not None and self._tool_support(self._template).tools

    def encode_chat(
        self,
        messages: Sequence[TemplateMessage],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Ids of the prompt of a chat; arguments and errors as in `render_chat`, and as in `encode`.

        Only the template writes special tokens: their text inside a message stays plain text.
        """
        given = [messages, tools, template_kwargs]
        literal = self._special_text.occurs_in(given)
        if literal:
            messages, tools, template_kwargs = self._special_text.hide(given)
        try:
            rendered = self.render_chat(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                template_kwargs=template_kwargs,
                chat_template=chat_template,
            )
        except InvalidRequest as error:
            if not literal:
                raise
            raise InvalidRequest(
                self._special_text.reveal(error.message), param=error.param, code=error.code
            ) from error
        _check_unicode(rendered)

        def encode(backend: Backend, text: str) -> list[int]:
            return self._encode(backend, text, False, max_tokens)

        ids = list[int]()
        for piece in self._pieces(rendered) if chat_template is None else [rendered]:
            ids += self._special_text.encode(piece, encode) if literal else encode(self._backend, piece)
        return ids

    def _pieces(self, rendered: str) -> list[str]:
        """A chat in pieces that are tokenised by themselves: see `_find_answer_start`."""
        if not self._answer_start:
            return [rendered]
        *pieces, last = rendered.split(self._answer_start)
        return [*(f"{piece}{self._answer_start}" for piece in pieces), *([last] if last else [])]

    def _encode(self, backend: Backend, text: str, add_special_tokens: bool, max_tokens: int | None) -> list[int]:
        if len(text) <= SHORT:
            return backend.encode(text, add_special_tokens=add_special_tokens).ids
        if max_tokens is not None:
            self._check_length(backend, text, max_tokens)
        (encoded,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if len(encoded) > max(MAX_IDS, max_tokens or 0):
            raise ContextLengthExceeded(f"The text has {len(encoded)} tokens, and at most {MAX_IDS} are taken.")
        return encoded.ids

    def _check_length(self, backend: Backend, text: str, max_tokens: int) -> None:
        """Raise `ContextLengthExceeded` for a text that is certainly too long, without encoding all of it."""
        too_long = self.text_bound.exceeded_by(text, max_tokens)
        size = FIRST_PROBE * max_tokens
        while size < len(text) and not too_long:
            # The rest of the text may change the last few tokens of a beginning, not three quarters of them.
            (beginning,) = backend.encode_batch_fast([text[:size]], add_special_tokens=False)
            too_long = len(beginning) > MAX_PROBE_TOKENS * max_tokens
            size *= FIRST_PROBE
        if too_long:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_tokens} tokens; "
                f"a text of {len(text)} characters has more."
            )

    def _special_end(self, end: TurnEnd) -> int | None:
        """The first token that the template writes after an answer, if it is special; else None. Text after it is not
        part of the answer."""
        added = self._backend.get_added_tokens_decoder()
        first = next((id for id in end.ids if self.token_text(id).strip()), None)
        return first if first in added and added[first].special else None

    def _ends_of_turn(self) -> list[int]:
        written = self.chat_template or ""
        ids = (self._backend.token_to_id(text) for text in END_OF_TURN if text in written)
        return [id for id in ids if id is not None]


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}."
        ) from error
