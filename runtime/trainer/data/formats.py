"""Types of datasets: each makes an example of a row, and keeps a record of the fields and messages that it saw."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from runtime.adapters.card import MAX_SYSTEM, Prompt
from runtime.errors import InvalidRequest
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example, RowProblem
from runtime.trainer.data.messages import Chat, ChatRows, Seen, fields_of
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset, Recipe

# -- texts -----------------------------------------------------------------------------------------
#
# Rows of texts, without a chat template: a prompt and its answer, or one text.
#
# The prompt's tokens are the ones `/v1/completions` would compute for it. An end-of-sequence token follows.

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and answer of a row with instruction, input (may be absent or empty) and output, in the wording of
    Stanford Alpaca."""
    instruction, given, answer = alpaca_fields(row)
    # Replaced one after the other, the second would also be looked for in the first.
    head, _, rest = (ALPACA_INPUT if given else ALPACA).partition("{instruction}")
    return head + instruction + rest.replace("{input}", given), answer


def alpaca_fields(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Instruction, input (empty where there is none) and output. Raises `RowProblem`."""
    instruction, answer = text_of(row, "instruction"), trained_text(row, "output", "the answer")
    return instruction, text_of(row, "input") if row.get("input") is not None else "", answer


def prompt_completion(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and answer of OpenAI's older fine-tuning lines."""
    return text_of(row, "prompt"), trained_text(row, "completion", "the answer")


def trained_text(row: Mapping[str, Any], field: str, what: str) -> str:
    """The text in a field that is trained on: it must not be blank. Raises `RowProblem`."""
    text = text_of(row, field)
    if not text.strip():
        raise RowProblem(f"{what} is empty ({field})")
    return text


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


MAX_COLUMNS = 1000
"""Names of columns, and of fields of messages, that are remembered."""
_ALPACA_FIELDS = frozenset({"instruction", "input", "output"})


class Format(ABC):
    """A type of dataset at work on one of them."""

    fields: frozenset[str]
    """Columns that it reads."""

    def __init__(self) -> None:
        self.columns: set[str] = set()
        """Columns that rows had."""

    def __call__(self, row: Mapping[str, Any]) -> Example:
        """The example of a row. Raises `RowProblem`, also for a row that the tokenizer or the template
        refuses."""
        if len(self.columns) < MAX_COLUMNS:
            self.columns |= {str(name) for name, value in row.items() if value is not None}
        try:
            return self._encode(row)
        except InvalidRequest as error:
            raise RowProblem(error.message) from None

    @abstractmethod
    def _encode(self, row: Mapping[str, Any]) -> Example: ...

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

    def _encode(self, row: Mapping[str, Any]) -> Example:
        chat = self._read(row)
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
    """Rows that are tokenised as they stand."""

    def __init__(self, encode: Callable[[Mapping[str, Any]], Example], fields: frozenset[str], prompt: Prompt) -> None:
        super().__init__()
        self._encode_row = encode
        self.fields = fields
        self._prompt = prompt

    def _encode(self, row: Mapping[str, Any]) -> Example:
        return self._encode_row(row)

    @property
    def prompt(self) -> Prompt:
        return self._prompt


def make_format(kind: str, entry: Dataset, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]) -> Format:
    """The format of the type `kind`, which is not "auto"; `ends` are the ids that end a turn."""
    if kind.startswith("chat_template"):
        encoder = ChatEncoder(tokenizer, ends=ends, eos=entry.eos, everything=recipe.train_on_inputs)
        if kind == "chat_template.alpaca":
            system = recipe.default_system_message
            return ChatFormat(lambda row: _alpaca_chat(row, system), encoder, _ALPACA_FIELDS)
        rows = ChatRows(entry, system=recipe.default_system_message, template=tokenizer.chat_template)
        return ChatFormat(rows.read, encoder, rows.fields, rows.seen)
    texts = TextEncoder(tokenizer, everything=recipe.train_on_inputs)
    if kind == "alpaca":
        prompt = Prompt(format="alpaca", template=ALPACA, template_with_input=ALPACA_INPUT)
        return TextFormat(lambda row: texts.answer(*alpaca(row)), _ALPACA_FIELDS, prompt)
    prompt = Prompt(format="text", template="{prompt}")
    if kind == "completion":
        return TextFormat(
            lambda row: texts.text(trained_text(row, entry.field, "the text")), frozenset({entry.field}), prompt
        )
    fields = frozenset({"prompt", "completion"})
    return TextFormat(lambda row: texts.answer(*prompt_completion(row)), fields, prompt)


def guess(row: Mapping[str, Any], entry: Dataset) -> str:
    """The type of a dataset by the fields of its first row. Raises `RowProblem` when none fits."""
    fields = row.keys()
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
    instruction, given, answer = alpaca_fields(row)
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction})
    messages.append({"role": "assistant", "content": answer})
    return Chat(messages, [len(messages) - 1], None)
