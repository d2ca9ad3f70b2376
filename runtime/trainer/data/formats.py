"""Types of datasets: each makes an example of a row, and keeps a record of the fields and messages that it saw."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from runtime.adapters.card import MAX_SYSTEM, Prompt
from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example, RowProblem
from runtime.trainer.data.instructions import (
    ALPACA_COLUMNS,
    TEXT_TYPES,
    TextType,
    fields_of,
    trained_text,
    user_type,
)
from runtime.trainer.data.messages import Chat, ChatRows, Seen
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset, Recipe
from runtime.trainer.recipe.dataset import UserType

# -- texts -----------------------------------------------------------------------------------------
#
# Rows of texts, without a chat template: a prompt and its answer, or one text.
#
# The prompt's tokens are the ones `/v1/completions` would compute for it. An end-of-sequence token follows.


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

    def segments(self, parts: Sequence[tuple[str, bool]]) -> Example:
        """The example of texts that follow each other, each with a mark of being trained on: as they stand, without a
        token before or after them."""
        ids, trained = list[int](), list[bool]()
        for text, on in parts:
            found = self._tokenizer.encode(text, add_special_tokens=False)
            ids += found
            trained += [on or self._everything] * len(found)
        if not ids:
            raise RowProblem("the text is empty")
        return Example(ids, [False, *trained[1:]])

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        return ids if ids[-1:] == self._eos else ids + self._eos


MAX_COLUMNS = 1000
"""Names of columns, and of fields of messages, that are remembered."""


class Format(ABC):
    """A type of dataset at work on one of them."""

    fields: frozenset[str]
    """Columns that it reads."""

    def __init__(self) -> None:
        self.columns: set[str] = set()
        """Columns that rows had."""

    def __call__(self, row: Mapping[str, Any]) -> list[Example]:
        """The example of a row; of preferences, the group of them that belongs together. Raises `RowProblem`, also for
        a row that the tokenizer or the template refuses."""
        if len(self.columns) < MAX_COLUMNS:
            self.columns |= {str(name) for name, value in row.items() if value is not None}
        try:
            return self._encode(row)
        except InvalidRequest as error:
            raise RowProblem(error.message) from None

    def pieces(self, example: Example, length: int) -> list[Example]:
        """The examples of a row that may be longer than `length` tokens: one, unless its type is cut into several."""
        return [example]

    @abstractmethod
    def _encode(self, row: Mapping[str, Any]) -> list[Example]: ...

    @property
    @abstractmethod
    def prompt(self) -> Prompt:
        """Form of requests to an adapter that was trained on these rows."""


class ChatFormat(Format):
    """Rows that are rendered by the chat template."""

    def __init__(
        self,
        read: Callable[[Mapping[str, Any]], Chat],
        encoder: ChatEncoder,
        fields: frozenset[str],
        seen: Seen | None = None,
    ) -> None:
        """`seen` is the record that `read` fills."""
        super().__init__()
        self._read = read
        self.encoder = encoder
        self.fields = fields
        self.seen = seen or Seen()
        self._systems: Counter[str | tuple[str, ...] | None] = Counter()

    def _encode(self, row: Mapping[str, Any]) -> list[Example]:
        return [self.encode_chat(self._read(row))]

    def encode_chat(self, chat: Chat) -> Example:
        """The example of a chat; its system message is remembered for `prompt`."""
        first = chat.messages[0]
        if len(self._systems) < 2:  # more do not matter
            content = first["content"] if first["role"] == "system" else None
            self._systems[tuple(part["text"] for part in content) if isinstance(content, list) else content] += 1
        return self.encoder.encode(chat.messages, chat.turns, chat.tools, chat.spans)

    @property
    def prompt(self) -> Prompt:
        system = next(iter(self._systems)) if len(self._systems) == 1 else None
        if not isinstance(system, str) or len(system) > MAX_SYSTEM:  # parts are the same as no text for sure
            system = None
        return Prompt(format="chat", system=system or None)


class TextFormat(Format):
    """Rows of a prompt and its answer."""

    def __init__(self, kind: TextType, texts: TextEncoder) -> None:
        super().__init__()
        self._kind = kind
        self._texts = texts
        self.fields = kind.columns
        self._systems: set[str] = set()

    def _encode(self, row: Mapping[str, Any]) -> list[Example]:
        given = self._kind.read(row)
        if len(self._systems) < 2:  # more do not matter
            self._systems.add(given.system)
        return [self._texts.answer(self._kind.wording.prompt(given), given.answer)]

    @property
    def prompt(self) -> Prompt:
        system = next(iter(self._systems)) if len(self._systems) == 1 else ""
        wording = self._kind.wording.after(system if len(system) <= MAX_SYSTEM else "")
        if wording.is_plain:
            return Prompt(format="text", template="{prompt}")
        return Prompt(format="alpaca", template=wording.without, template_with_input=wording.with_input)


class PlainFormat(Format):
    """Rows of one text, of marked segments, or of tokens."""

    def __init__(
        self, encode: Callable[[Mapping[str, Any]], Example], fields: Collection[str], *, cuts: bool = False
    ) -> None:
        """`cuts`: rows that are too long are cut into several examples."""
        super().__init__()
        self._encode_row = encode
        self.fields = frozenset(fields)
        self._cuts = cuts

    def _encode(self, row: Mapping[str, Any]) -> list[Example]:
        return [self._encode_row(row)]

    def pieces(self, example: Example, length: int) -> list[Example]:
        if not self._cuts or len(example) <= length:
            return [example]
        starts = range(0, len(example), length)
        cut = [(example.token_ids[at : at + length], example.trained[at : at + length]) for at in starts]
        return [Example(ids, [False, *trained[1:]]) for ids, trained in cut]

    @property
    def prompt(self) -> Prompt:
        return Prompt(format="text", template="{prompt}")


def make_format(
    kind: str | UserType, entry: Dataset, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]
) -> Format:
    """The format of the type `kind`, which is not "auto"; `ends` are the ids that end a turn."""
    texts = TextEncoder(tokenizer, everything=recipe.train_on_inputs)
    if isinstance(kind, UserType):
        return TextFormat(user_type(kind), texts)
    if kind in TEXT_TYPES:
        return TextFormat(TEXT_TYPES[kind], texts)
    if kind.startswith("chat_template"):
        return _chat_format(kind, entry, recipe, tokenizer, ends)
    if kind == "input_output":
        return PlainFormat(lambda row: texts.segments(_segments(row)), {"segments"})
    if kind == "tokenized":
        return PlainFormat(lambda row: _tokens(row, tokenizer.vocab_size), TOKEN_COLUMNS)
    return PlainFormat(lambda row: texts.text(trained_text(row, entry.field, "the text")), {entry.field}, cuts=True)


def _chat_format(kind: str, entry: Dataset, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]) -> ChatFormat:
    encoder = ChatEncoder(tokenizer, ends=ends, eos=entry.eos, everything=recipe.train_on_inputs)
    if kind == "chat_template.alpaca":
        system = recipe.default_system_message
        return ChatFormat(lambda row: _alpaca_chat(row, system), encoder, ALPACA_COLUMNS.names)
    rows = ChatRows(entry, system=recipe.default_system_message, template=tokenizer.chat_template)
    return ChatFormat(rows.read, encoder, rows.fields, rows.seen)


def _segments(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The texts of a row of `input_output`, each with its label."""
    given = row.get("segments")
    if not isinstance(given, list) or not given:
        raise RowProblem(f"segments is no list of texts with labels{fields_of(row)}")
    found = []
    for index, segment in enumerate(given, 1):
        text, label = (segment.get("text"), segment.get("label")) if isinstance(segment, Mapping) else (None, None)
        if not isinstance(text, str) or not isinstance(label, bool):
            raise RowProblem(f"segment {index} must have a text, and a label that is true or false")
        found.append((text, label))
    return found


TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask")
_IGNORED = -100
"""Label of a token that is not trained on, as transformers has it."""


def _tokens(row: Mapping[str, Any], vocab_size: int) -> Example:
    """A row of token ids, with labels where some are not trained on, and a mask where there is padding."""
    ids = _integers(row, "input_ids")
    labels = _integers(row, "labels") if row.get("labels") is not None else ids
    mask = _integers(row, "attention_mask") if row.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise RowProblem(f"has {len(ids)} input_ids, {len(labels)} labels and an attention_mask of {len(mask)}")
    for at, (id, label) in enumerate(zip(ids, labels, strict=True)):
        if not 0 <= id < vocab_size:
            raise RowProblem(f"input_ids[{at}] is {id}; the served model has ids from 0 to {vocab_size - 1}")
        if label not in (_IGNORED, id):
            raise RowProblem(f"labels[{at}] is {label}, neither {_IGNORED} nor the token's id {id}")
    kept = [(id, label != _IGNORED) for id, label, on in zip(ids, labels, mask, strict=True) if on]
    if not kept:
        raise RowProblem("has no tokens")
    return Example([id for id, _ in kept], [False, *(on for _, on in kept[1:])])


def _integers(row: Mapping[str, Any], field: str) -> list[int]:
    value = row.get(field)
    if field not in row:
        raise RowProblem(f"has no field {field!r}{fields_of(row)}")
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise RowProblem(f"{field} is no list of whole numbers")
    return value


def guess(row: Mapping[str, Any], entry: Dataset) -> str:
    """The type of a dataset by the fields of its first row. Raises `RowProblem` when none fits."""
    fields = row.keys()
    if "input_ids" in fields:
        return "tokenized"
    if "segments" in fields:
        return "input_output"
    if entry.field_messages in fields:
        return "chat_template"
    if {"instruction", "output"} <= fields:
        return "alpaca"
    if {"prompt", "completion"} <= fields:
        return "prompt_completion"
    if entry.field in fields:
        return "completion"
    raise RowProblem(
        f"has the fields {', '.join(map(str, list(fields)[:8])) or 'none'}, by which no type can be told: give the "
        "dataset's type (chat_template, alpaca, prompt_completion, completion)"
    )


def _alpaca_chat(row: Mapping[str, Any], system: str | None) -> Chat:
    """A row of alpaca's as a chat: instruction and input are the user's message."""
    instruction, given, answer, _ = ALPACA_COLUMNS.read(row)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction})
    messages.append({"role": "assistant", "content": answer})
    return Chat(messages, [len(messages) - 1], None)
