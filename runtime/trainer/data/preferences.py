"""Rows of preferences: two answers to a prompt, of which one is better, or one answer with a label.

A prompt and an answer are each a text, a message, or a chat that ends with the answer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from runtime.adapters.card import Prompt
from runtime.text.tokenizer import Tokenizer
from runtime.trainer.data.example import Example, RowProblem
from runtime.trainer.data.formats import ChatFormat, Format, TextEncoder
from runtime.trainer.data.instructions import fields_of, text_of
from runtime.trainer.data.messages import Chat, ChatRows, Seen, check_answer
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.recipe import Dataset, Recipe

# -- columns ---------------------------------------------------------------------------------------
#
# The columns of Axolotl's types, which are named after the data sets that came with them.


class PreferenceColumns(NamedTuple):
    """PreferenceColumns of a type, each with all of its names: the first that a row has is read."""

    prompt: tuple[str, ...] = ("prompt", "input", "question", "instruction")
    chosen: tuple[str, ...] = ("chosen", "chosen_response")
    rejected: tuple[str, ...] = ("rejected", "rejected_response")
    completion: tuple[str, ...] = ("completion",)
    label: tuple[str, ...] = ("label",)


COLUMNS: dict[str, PreferenceColumns] = {
    "default": PreferenceColumns(),
    "argilla": PreferenceColumns(prompt=("instruction", "prompt")),
    "argilla_chat": PreferenceColumns(prompt=()),
    "icr": PreferenceColumns(prompt=("input",)),
    "intel": PreferenceColumns(prompt=("question",)),
    "prompt_pairs": PreferenceColumns(prompt=("prompt",)),
    "ultra": PreferenceColumns(prompt=("prompt",)),
    "nectar": PreferenceColumns(prompt=("prompt",)),
    "openai": PreferenceColumns(prompt=("input",), chosen=("preferred_output",), rejected=("non_preferred_output",)),
    "passthrough": PreferenceColumns(prompt=("prompt",)),
}
"""Last part of a type's name → its columns."""

PREFERENCE_TEXTS = ("user_defined.default", "passthrough")
"""Types whose texts are tokenised as they stand; the others are rendered by the chat template."""

_LABELS = {"true": True, "1": True, "false": False, "0": False}


def _columns_of(kind: str, entry: Dataset) -> PreferenceColumns:
    """A type's columns, replaced where the entry names others."""
    known = COLUMNS.get(kind.rpartition(".")[2], COLUMNS["default"])
    if kind in ("auto", "chat_template.default"):
        known = known._replace(prompt=(entry.field_messages, *known.prompt))
    given = {name: getattr(entry, f"field_{name}") for name in PreferenceColumns._fields}
    return known._replace(**{name: (column,) for name, column in given.items() if column})


def _first(row: Mapping[str, Any], names: Sequence[str], key: str) -> str:
    """The column that a row has of these. Raises `RowProblem`."""
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        asked = " or ".join(repr(name) for name in names)
        raise RowProblem(f"has no column {asked}{fields_of(row)}; name it with {key}")
    return found


def label_of(row: Mapping[str, Any], column: str) -> bool:
    """The label of an answer: true, false, 1, 0, or one of these as a text. Raises `RowProblem`."""
    value = row[column]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _LABELS:
        return _LABELS[value.strip().lower()]
    shown = repr(value)
    raise RowProblem(f"{column} must be true or false, got {shown if len(shown) <= 80 else shown[:77] + '…'}")


# -- chats -----------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """A prompt and one answer to it."""

    column: str
    """Column of the answer."""
    messages: list[Any]
    """As the file has them; the last is the answer."""


class PreferenceChats:
    """Reads rows as chats, in the words that the file has for roles and fields of messages."""

    def __init__(self, kind: str, entry: Dataset, rows: ChatRows) -> None:
        self._kind = kind
        self._entry = entry
        self._rows = rows
        self._columns = _columns_of(kind, entry)

    @property
    def fields(self) -> frozenset[str]:
        """PreferenceColumns that are read."""
        further = {"answers"} if self._kind == "zephyr.nectar" else set()
        return self._rows.fields | frozenset(name for names in self._columns for name in names) | further

    def pair(self, row: Mapping[str, Any]) -> list[Chat]:
        """The chats of the chosen and of the rejected answer. Raises `RowProblem`."""
        if self._kind == "zephyr.nectar":
            row = _of_ranks(row)
        columns = self._columns
        chosen = self._answered(row, _first(row, columns.chosen, "field_chosen"))
        rejected = self._answered(row, _first(row, columns.rejected, "field_rejected"))
        if chosen.messages[:-1] != rejected.messages[:-1]:
            raise RowProblem(
                f"{chosen.column} and {rejected.column} answer different chats: all but their last messages must be "
                "the same"
            )
        return [self._chat(row, one) for one in (chosen, rejected)]

    def labelled(self, row: Mapping[str, Any]) -> tuple[Chat, bool]:
        """The chat of a labelled answer, and its label. Raises `RowProblem`."""
        columns = self._columns
        answered = self._answered(row, _first(row, columns.completion, "field_completion"))
        return self._chat(row, answered), label_of(row, _first(row, columns.label, "field_label"))

    def _answered(self, row: Mapping[str, Any], column: str) -> Answered:
        value = row[column]
        if isinstance(value, list) and not value:
            raise RowProblem(f"{column} is empty")
        items = value if isinstance(value, list) else [value]
        answer = self._message(items[-1], "assistant")
        before = self._prompt(row, column)
        if before is None:
            if len(items) < 2:
                raise RowProblem(f"{column} must be a chat: a list of messages, of which the last is the answer")
            before = items[:-1]
        return Answered(column, [*before, answer])

    def _prompt(self, row: Mapping[str, Any], answer: str) -> list[Any] | None:
        """Messages of the prompt; None where the answer's column has them."""
        names = self._columns.prompt
        column = next((name for name in names if row.get(name) is not None), None)
        if column is None:
            if names and not _is_chat(row[answer]):
                _first(row, names, "field_prompt")
            return None
        value = row[column]
        if isinstance(value, Mapping) and isinstance(value.get("messages"), list):  # OpenAI's
            value = value["messages"]
        if value == [] or (isinstance(value, str) and not value.strip()):
            raise RowProblem(f"{column} is empty")
        return [self._message(item, "user") for item in (value if isinstance(value, list) else [value])]

    def _message(self, item: Any, role: str) -> Any:
        """A text as a message of this role."""
        names = self._entry.properties
        return {names["role"]: role, names["content"]: item} if isinstance(item, str) else item

    def _chat(self, row: Mapping[str, Any], answered: Answered) -> Chat:
        entry = self._entry
        given: dict[str, Any] = {entry.field_messages: answered.messages}
        tools = row.get(entry.field_tools)
        if isinstance(row.get("input"), Mapping):
            tools = row["input"].get("tools")
        given |= {entry.field_tools: tools, entry.field_system: row.get(entry.field_system)}
        try:
            chat = self._rows.read(given)
            answer = chat.messages[-1]
            if answer["role"] != "assistant":
                raise RowProblem(f"the last message is the {answer['role']}'s, and must be the assistant's")
            check_answer(answer, len(answered.messages), None)
        except RowProblem as problem:
            raise RowProblem(f"{answered.column}: {problem}") from None
        return Chat(chat.messages, [len(chat.messages) - 1], chat.tools)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _of_ranks(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of ranked answers as a pair of the best one (rank 1) and the worst. Raises `RowProblem`."""
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowProblem(f"answers must be a list of two answers or more{fields_of(row)}")
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, Mapping) or not isinstance(answer.get("answer"), str):
            raise RowProblem(f"answers: answer {number} has no text in 'answer'")
        if not isinstance(answer.get("rank"), int | float):
            raise RowProblem(f"answers: answer {number} has no number in 'rank'")
    ranked = sorted(answers, key=lambda answer: answer["rank"])
    return {**row, "chosen": ranked[0]["answer"], "rejected": ranked[-1]["answer"]}


class ChatPreferences(ChatFormat):
    """Preferences that are rendered by the chat template: two examples a row, or with labels one."""

    def __init__(self, chats: PreferenceChats, encoder: ChatEncoder, seen: Seen, *, labels: bool) -> None:
        super().__init__(lambda row: chats.labelled(row)[0], encoder, chats.fields, seen)
        self._chats = chats
        self._labels = labels

    def _encode(self, row: Mapping[str, Any]) -> list[Example]:
        if self._labels:
            chat, label = self._chats.labelled(row)
            return [labelled(self.encode_chat(chat), label)]
        return [self.encode_chat(chat) for chat in self._chats.pair(row)]


# -- texts -----------------------------------------------------------------------------------------


class TextPreferences(Format):
    """Preferences that are tokenised as they stand, as prompts of `/v1/completions`."""

    def __init__(self, kind: str, entry: Dataset, encoder: TextEncoder, *, labels: bool) -> None:
        super().__init__()
        self._entry = entry
        self._encoder = encoder
        self._labels = labels
        self._columns = _columns_of(kind, entry)
        self.fields = frozenset([*(name for names in self._columns for name in names), entry.field_system])

    @property
    def prompt(self) -> Prompt:
        return Prompt(format="text", template="{prompt}")

    def _encode(self, row: Mapping[str, Any]) -> list[Example]:
        columns, prompt = self._columns, self._prompt(row)
        if self._labels:
            answer = self._answer(row, _first(row, columns.completion, "field_completion"), "completion")
            label = label_of(row, _first(row, columns.label, "field_label"))
            return [labelled(self._encoder.answer(prompt, answer), label)]
        chosen = self._answer(row, _first(row, columns.chosen, "field_chosen"), "chosen")
        rejected = self._answer(row, _first(row, columns.rejected, "field_rejected"), "rejected")
        return [self._encoder.answer(prompt, answer) for answer in (chosen, rejected)]

    def _prompt(self, row: Mapping[str, Any]) -> str:
        text = text_of(row, _first(row, self._columns.prompt, "field_prompt"))
        system = row.get(self._entry.field_system) or ""
        if not isinstance(system, str):
            raise RowProblem(f"{self._entry.field_system} is no text")
        return _filled(self._entry.prompt_format or "{prompt}", {"prompt": text, "system": system})

    def _answer(self, row: Mapping[str, Any], column: str, what: str) -> str:
        text = text_of(row, column)
        if not text.strip():
            raise RowProblem(f"the answer is empty ({column})")
        form = getattr(self._entry, f"{what}_format") or f"{{{what}}}"
        return _filled(form, {what: text})


def _filled(form: str, texts: Mapping[str, str]) -> str:
    """`form` with each `{name}` replaced, in one pass: a text may hold such names itself."""
    pieces = form.split("{")
    found = pieces[:1]
    for piece in pieces[1:]:
        name, closed, rest = piece.partition("}")
        found.append(texts[name] + rest if closed and name in texts else "{" + piece)
    return "".join(found)


# -- groups ----------------------------------------------------------------------------------------


def labelled(example: Example, label: bool) -> Example:
    """An example whose weight is its label: 1 where it is desirable, else -1."""
    return Example(example.token_ids, example.trained, 1.0 if label else -1.0)


def make_preferences(kind: str, entry: Dataset, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]) -> Format:
    """The format of a dataset of preferences of the type `kind`; `ends` are the ids that end a turn."""
    labels = recipe.rl == "kto"
    if kind in PREFERENCE_TEXTS:
        return TextPreferences(kind, entry, TextEncoder(tokenizer, everything=False), labels=labels)
    rows = ChatRows(entry, system=recipe.default_system_message, template=tokenizer.chat_template)
    encoder = ChatEncoder(tokenizer, ends=ends, eos=entry.eos, everything=False)
    return ChatPreferences(PreferenceChats(kind, entry, rows), encoder, rows.seen, labels=labels)


# -- companions ------------------------------------------------------------------------------------
#
# What a method lays beside its rows, made when a job is planned: prepared data has only what rows say.


def with_companions(examples: Sequence[Example], method: str | None, limit: int) -> list[Example]:
    """The sequences of a run, in groups of `Recipe.group_size`. Sequences are cut at `limit` tokens."""
    if method == "orpo":
        return [_with_prompt(example) if at % 2 == 0 else example for at, example in enumerate(examples)]
    if method == "kto":
        others = [*examples[-1:], *examples[:-1]]
        pairs = zip(examples, others, strict=True)
        return [sequence for own, other in pairs for sequence in (own, _mismatched(own, other, limit))]
    return list(examples)


def _with_prompt(example: Example) -> Example:
    """The example with its prompt as targets too."""
    start = example.trained.index(True)
    trained = [on or 0 < at < start for at, on in enumerate(example.trained)]
    return Example(example.token_ids, trained, example.weight, prompt_targets=start - 1)


def _mismatched(example: Example, other: Example, limit: int) -> Example:
    """The example's prompt with the other's answer, of weight 0."""
    prompt, start = example.trained.index(True), other.trained.index(True)
    size = max(limit, prompt + 1)
    ids = [*example.token_ids[:prompt], *other.token_ids[start:]][:size]
    return Example(ids, [*[False] * prompt, *other.trained[start:]][:size], 0.0)
