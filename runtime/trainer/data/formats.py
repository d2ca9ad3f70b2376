"""What a row is: the types of datasets, and how each makes an example of a row."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from runtime.errors import InvalidRequest
from runtime.tokenizer import Tokenizer
from runtime.trainer.data.messages import ChatRows
from runtime.trainer.data.problems import RowProblem
from runtime.trainer.data.texts import TextEncoder, alpaca, prompt_completion, text_of
from runtime.trainer.data.turns import ChatEncoder
from runtime.trainer.examples import Example
from runtime.trainer.recipe import Dataset, Recipe

Format = Callable[[Mapping[str, Any]], Example]
"""A row to its example. Raises `RowProblem`."""


def make_format(kind: str, entry: Dataset, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]) -> Format:
    """The format of the type `kind`, which is not "auto"; `ends` are the ids that end a turn."""
    if kind.startswith("chat_template"):
        return _guarded(_chat(entry, recipe, tokenizer, ends))
    encoder = TextEncoder(tokenizer, everything=recipe.train_on_inputs)
    if kind == "completion":
        return _guarded(lambda row: encoder.text(text_of(row, entry.field)))
    split = alpaca if kind == "alpaca" else prompt_completion
    return _guarded(lambda row: encoder.answer(*split(row)))


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


def _chat(entry: Dataset, recipe: Recipe, tokenizer: Tokenizer, ends: Collection[int]) -> Format:
    rows = ChatRows(entry, system=recipe.default_system_message, template=tokenizer.chat_template)
    encoder = ChatEncoder(tokenizer, ends=ends, eos=entry.eos, everything=recipe.train_on_inputs)

    def example(row: Mapping[str, Any]) -> Example:
        chat = rows.read(row)
        return encoder.encode(chat.messages, chat.turns, chat.tools)

    return example


def _guarded(encode: Format) -> Format:
    """What the tokenizer or the template has against a row is a problem of that row."""

    def example(row: Mapping[str, Any]) -> Example:
        try:
            return encode(row)
        except InvalidRequest as error:
            raise RowProblem(error.message) from None

    return example
