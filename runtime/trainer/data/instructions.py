"""Rows of an instruction and its answer as texts: alpaca, its relatives, and a recipe's own types.

Each type is the columns of a row and the text around them. The wording of prompts is that of the data sets' authors and
of Axolotl's types of the same names: an adapter is asked with the wording that it was trained on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from runtime.trainer.data.example import RowProblem
from runtime.trainer.recipe.dataset import UserType

ReadRow = Mapping[str, Any]


class Instruction(NamedTuple):
    """The texts of one row."""

    instruction: str
    input: str
    """Empty where there is none."""
    answer: str
    system: str = ""


class Wording(NamedTuple):
    """The text around a row's texts: `{instruction}`, `{input}` and `{system}` are replaced."""

    without: str
    """Of rows without an input."""
    with_input: str
    system: str = "{system}"
    """What stands before, where a row has a text of the system."""

    @property
    def is_plain(self) -> bool:
        """True where nothing stands around the row's own prompt."""
        return self.without == "{instruction}"

    def after(self, system: str) -> "Wording":
        """The wording behind a text of the system; the same where that is empty."""
        if not system:
            return self
        before = self.system.replace("{system}", system)
        return Wording(before + self.without, before + self.with_input, self.system)

    def prompt(self, given: Instruction) -> str:
        """The prompt of a row. What a text of the row looks like is not taken for the wording's."""
        template = self.with_input if given.input else self.without
        if given.system:
            template = self.system.replace("{system}", _escaped(given.system)) + template
        for name, text in (("{instruction}", given.instruction), ("{input}", given.input)):
            template = template.replace(name, _escaped(text))
        return template.replace(_OPEN, "{")


_OPEN = "\ufdd0"
"""Stands for a brace of a row's own text while the wording is filled in: no text has this code point."""


def _escaped(text: str) -> str:
    return text.replace("{", _OPEN)


# -- columns ---------------------------------------------------------------------------------------


def text_of(row: ReadRow, field: str) -> str:
    """The text in a column. Raises `RowProblem`."""
    value = row.get(field)
    if field not in row:
        raise RowProblem(f"has no field {field!r}{fields_of(row)}")
    if not isinstance(value, str):
        raise RowProblem(f"{field} is no text")
    return value


def optional_text(row: ReadRow, field: str) -> str:
    """The same, or the empty text where the column is absent or null."""
    return text_of(row, field) if row.get(field) is not None else ""


def trained_text(row: ReadRow, field: str, what: str) -> str:
    """The text in a column that is trained on: it must not be blank. Raises `RowProblem`."""
    text = text_of(row, field)
    if not text.strip():
        raise RowProblem(f"{what} is empty ({field})")
    return text


def fields_of(row: ReadRow) -> str:
    """The columns that a row has, for the error message about a missing one."""
    names = [str(name)[:40] for name in row]
    return f"; it has {', '.join(names[:8])}" if names else "; it is empty"


class Columns(NamedTuple):
    """Names of the columns of a type; an empty name is a text that its rows do not have."""

    instruction: str = "instruction"
    input: str = ""
    answer: str = "output"
    system: str = ""

    def read(self, row: ReadRow) -> Instruction:
        return Instruction(
            text_of(row, self.instruction),
            optional_text(row, self.input) if self.input else "",
            trained_text(row, self.answer, "the answer"),
            optional_text(row, self.system) if self.system else "",
        )

    @property
    def names(self) -> frozenset[str]:
        return frozenset(filter(None, self))


ALPACA_COLUMNS = Columns(input="input")


def _choices(row: ReadRow) -> Instruction:
    """A question with its choices, a line each; the answer is in `solution` or `explanation`."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise RowProblem("choices is no list of texts")
    field = "solution" if row.get("solution") is not None else "explanation"
    listed = "\n".join(f'- "{choice}"' for choice in choices)
    return Instruction(text_of(row, "question"), listed, trained_text(row, field, "the answer"))


def _jeopardy(row: ReadRow) -> Instruction:
    answer = trained_text(row, "answer", "the answer")
    return Instruction(text_of(row, "question"), text_of(row, "category"), f"what is {answer}")


def _reflection(row: ReadRow) -> Instruction:
    given = ALPACA_COLUMNS.read(row)
    thought, corrected = text_of(row, "reflection"), trained_text(row, "corrected", "the answer")
    answer = f"{given.answer}\n\n### Agent Reflection:\n{thought}\n\n### Final Response:\n{corrected}"
    return given._replace(answer=answer)


def _context(row: ReadRow) -> Instruction:
    question = f"{text_of(row, 'context')}\n===\n{text_of(row, 'question')}"
    return Instruction(question, "", trained_text(row, "answer", "the answer"))


def _context_v2(row: ReadRow) -> Instruction:
    question = f"Context:\n{text_of(row, 'context')}\nQuestion:\n{text_of(row, 'question')}\n"
    return Instruction(question, "", "Answer:\n" + trained_text(row, "answer", "the answer"))


NO_ANSWER = (
    "The context provided does not contain any information about your inquiry. Therefore, I'm unable to answer your "
    "question based on the given context."
)
"""What `context_qa.load_404` teaches to say where the context has no answer."""


def _context_404(row: ReadRow) -> Instruction:
    return Instruction(f"{text_of(row, 'context')}\n===\n{text_of(row, 'question')}", "", NO_ANSWER)


# -- wording ---------------------------------------------------------------------------------------

_TASK = "Below is an instruction that describes a task"
_REQUEST = "response that appropriately completes the request."
_PAIRED = "paired with an input that provides further context."
_NO_INPUT_SYSTEM = f"{_TASK}. Write a {_REQUEST}"
_INPUT_SYSTEM = f"{_TASK}, {_PAIRED} Write a {_REQUEST}"
_CONCISE = "Below is an instruction from a USER that describes a task"
_CONCISE_SYSTEM = (
    f"{_CONCISE}. The ASSISTANT writes a response that appropriately and concisely completes the request.\n\n"
)
_CONCISE_INPUT_SYSTEM = (
    f"{_CONCISE}, {_PAIRED} The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n"
)

_INSTRUCT = Wording(
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "{system}\n\n",
)
_CHAT = Wording("USER: {instruction}\nASSISTANT:", "USER: {instruction}\n{input}\nASSISTANT:", "SYSTEM: {system}\n")
_CHATML = Wording(
    "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\n{system}<|im_end|>\n",
)
_PHI = Wording(
    "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
    "<|system|>\n{system}<|end|>\n",
)


def _opened(style: Wording, system: str, with_input: str | None = None) -> Wording:
    """A style after a text of the system, which may be another one for rows with an input."""
    before, other = (style.system.replace("{system}", one) for one in (system, with_input or system))
    return Wording(before + style.without, other + style.with_input, style.system)


ALPACA = _opened(_INSTRUCT, _NO_INPUT_SYSTEM, _INPUT_SYSTEM)
_ALPACA_CHAT = _opened(_CHAT, _NO_INPUT_SYSTEM, _INPUT_SYSTEM)
_CONCISE_CHAT = _opened(_CHAT, _CONCISE_SYSTEM, _CONCISE_INPUT_SYSTEM)
_ORCA = Wording(
    "### User:\n{instruction}\n\n### Response:\n",
    "### User:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "### System:\n{system}\n\n",
)
_CONTEXT = "Use the following contextual information to concisely answer the question.\n"
_CLUE = (
    "Below is a Jeopardy clue paired with input providing the category of the clue. Write a concise response that best "
    "answers the clue given the category."
)
_REFLECT = (
    "You, the Agent, should generate a response to the given instruction as completely as possible. Then reflect on "
    "your response, and write the final one."
)
_PLAIN = Wording("{instruction}", "{instruction}{input}")


class TextType(NamedTuple):
    """A type of rows."""

    read: Callable[[ReadRow], Instruction]
    wording: Wording
    columns: frozenset[str]


def _type(columns: Columns, wording: Wording) -> TextType:
    return TextType(columns.read, wording, columns.names)


def _special(read: Callable[[ReadRow], Instruction], wording: Wording, columns: str) -> TextType:
    return TextType(read, wording, frozenset(columns.split()))


_WITH_SYSTEM = Columns(input="input", system="system")
_OPEN_ORCA = Columns("question", "", "response", "system_prompt")
_CHOICES = "question choices solution explanation"

TEXT_TYPES: dict[str, TextType] = {
    "alpaca": _type(ALPACA_COLUMNS, ALPACA),
    "alpaca:instruct": _type(ALPACA_COLUMNS, ALPACA),
    "alpaca:chat": _type(ALPACA_COLUMNS, _ALPACA_CHAT),
    "alpaca:chatml": _type(ALPACA_COLUMNS, _opened(_CHATML, _NO_INPUT_SYSTEM, _INPUT_SYSTEM)),
    "alpaca:phi": _type(ALPACA_COLUMNS, _opened(_PHI, _NO_INPUT_SYSTEM, _INPUT_SYSTEM)),
    "alpaca_instruct": _type(ALPACA_COLUMNS, ALPACA),
    "alpaca_instruct.load_no_prompt": _type(ALPACA_COLUMNS, _INSTRUCT),
    "alpaca_chat": _type(ALPACA_COLUMNS, _ALPACA_CHAT),
    "alpaca_chat.load_no_prompt": _type(ALPACA_COLUMNS, _CHAT),
    "alpaca_chat.load_concise": _type(ALPACA_COLUMNS, _CONCISE_CHAT),
    "alpaca_chat.load_qa": _type(Columns("question", "", "answer"), _CONCISE_CHAT),
    "alpaca_chat.load_camel_ai": _type(Columns("message_1", "", "message_2"), _CONCISE_CHAT),
    "alpaca_w_system": _type(_WITH_SYSTEM, _INSTRUCT),
    "alpaca_w_system.load_instruct": _type(_WITH_SYSTEM, _INSTRUCT),
    "alpaca_w_system.load_chat": _type(_WITH_SYSTEM, _CHAT),
    "alpaca_w_system.load_open_orca": _type(_OPEN_ORCA, _ORCA),
    "alpaca_w_system.load_open_orca_chatml": _type(_OPEN_ORCA, _CHATML),
    "context_qa": _special(_context, _opened(_CHAT, _CONTEXT), "context question answer"),
    "context_qa.load_v2": _special(_context_v2, _PLAIN, "context question answer"),
    "context_qa.load_404": _special(_context_404, _opened(_CHAT, _CONTEXT), "context question"),
    "explainchoice": _special(
        _choices,
        _opened(_CHAT, "Choose the answer that best answers the question. Explain your reasoning.\n"),
        _CHOICES,
    ),
    "concisechoice": _special(
        _choices,
        _opened(_CHAT, "Choose the answer that best answers the question. Be concise in your response.\n\n"),
        _CHOICES,
    ),
    "summarizetldr": _type(
        Columns("article", "", "summary"),
        Wording(
            "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
            "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
        ),
    ),
    "reflection": _special(
        _reflection,
        _opened(_INSTRUCT, f"{_NO_INPUT_SYSTEM} {_REFLECT}", f"{_INPUT_SYSTEM} {_REFLECT}"),
        "instruction input output reflection corrected",
    ),
    "gpteacher": _type(Columns(input="input", answer="response"), ALPACA),
    "gpt4all": _type(Columns("prompt", "", "response"), ALPACA),
    "oasst": _type(Columns("INSTRUCTION", "", "RESPONSE"), ALPACA),
    "jeopardy": _special(_jeopardy, _opened(_INSTRUCT, _CLUE), "question category answer"),
    "metharme": _type(Columns("prompt", "", "generation"), _PLAIN),
    "orcamini": _type(_WITH_SYSTEM, _ORCA),
    "prompt_completion": _type(Columns("prompt", "", "completion"), _PLAIN),
}
"""Axolotl's name of a type → it. `prompt_completion` is of OpenAI's older fine-tuning lines."""


def user_type(given: UserType) -> TextType:
    """The type that a recipe describes."""

    def read(row: ReadRow) -> Instruction:
        columns = Columns(given.field_instruction, given.field_input, given.field_output, given.field_system)
        found = columns.read(row)
        return found._replace(system=found.system or given.system_prompt)

    names = {given.field_instruction, given.field_input, given.field_output, given.field_system}
    return TextType(read, Wording(given.no_input_format, given.format, given.system_format), frozenset(names))
