"""An entry of a recipe's data (`datasets` and the like): where rows are, and how a row becomes an example."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Eos = Literal["all", "turn", "last", "none"]
DataType = Literal[
    "chat_template",
    "chat_template.default",
    "chat_template.alpaca",
    "alpaca",
    "alpaca:instruct",
    "alpaca:chat",
    "alpaca:chatml",
    "alpaca:phi",
    "alpaca_instruct",
    "alpaca_instruct.load_no_prompt",
    "alpaca_chat",
    "alpaca_chat.load_no_prompt",
    "alpaca_chat.load_concise",
    "alpaca_chat.load_qa",
    "alpaca_chat.load_camel_ai",
    "alpaca_w_system",
    "alpaca_w_system.load_instruct",
    "alpaca_w_system.load_chat",
    "alpaca_w_system.load_open_orca",
    "alpaca_w_system.load_open_orca_chatml",
    "context_qa",
    "context_qa.load_v2",
    "context_qa.load_404",
    "explainchoice",
    "concisechoice",
    "summarizetldr",
    "reflection",
    "gpteacher",
    "gpt4all",
    "oasst",
    "jeopardy",
    "metharme",
    "orcamini",
    "completion",
    "prompt_completion",
    "input_output",
    "tokenized",
    "auto",
    "chat_template.argilla",
    "chat_template.argilla_chat",
    "chatml",
    "chatml.default",
    "chatml.argilla",
    "chatml.argilla_chat",
    "chatml.icr",
    "chatml.intel",
    "chatml.prompt_pairs",
    "chatml.ultra",
    "llama3",
    "llama3.default",
    "llama3.argilla",
    "llama3.argilla_chat",
    "llama3.icr",
    "llama3.intel",
    "llama3.prompt_pairs",
    "llama3.ultra",
    "zephyr.nectar",
    "user_defined.default",
    "passthrough",
    "openai",
]


def entry(text: str) -> Meta:
    """The line of documentation of an entry's key."""
    return Meta(description=text)


class UserType(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dataset's type of the recipe's own: the columns of a row, and the text that is made of them."""

    field_instruction: Annotated[Text, entry("Column with `{instruction}`.")] = "instruction"
    field_input: Annotated[Text, entry("Column with `{input}`; may be absent.")] = "input"
    field_output: Annotated[Text, entry("Column with the answer.")] = "output"
    field_system: Annotated[Text, entry("Column with `{system}`; may be absent.")] = "system"
    system_prompt: Annotated[str, Meta(max_length=16384), entry("`{system}` of rows without one.")] = ""
    system_format: Annotated[str, Meta(max_length=16384), entry("Text that stands before the prompt.")] = "{system}"
    format: Annotated[str, Meta(max_length=16384), entry("The prompt of a row with an input.")] = (
        "{instruction} {input} "
    )
    no_input_format: Annotated[str, Meta(max_length=16384), entry("The prompt of a row without.")] = "{instruction} "


class Dataset(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of rows, and how a row becomes an example."""

    path: Annotated[
        Text,
        entry(
            "A file sent along, one under the data roots, a pattern, the id of a file of /v1/files, or that of a hub's "
            "data set; or `json`, `csv`, `parquet`, with `data_files`."
        ),
    ]
    data_files: Annotated[tuple[Text, ...] | Text, entry("Files, by themselves or in the folder `path`.")] = ()
    ds_type: Annotated[
        Literal["json", "jsonl", "csv", "parquet"] | None, entry("Format of the files. Default: by their endings.")
    ] = None
    name: Annotated[Text | None, entry("Configuration of a hub's data set.")] = None
    revision: Annotated[Text | None, entry("Branch, tag or commit of a hub's data set.")] = None
    split: Annotated[
        Text | None,
        entry("`train`, or a slice of the rows: `train[:20%]`, `train[100:200]`; a hub's data set may have others."),
    ] = None
    shards: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None,
        entry("Cut the rows, shuffled by the seed, into this number of pieces…"),
    ] = None
    shards_idx: Annotated[Annotated[int, Meta(ge=0)], entry("…and take this one, from 0.")] = 0
    type: Annotated[
        DataType | UserType,
        entry("What a row is; `auto` goes by the fields of the first row. Or a mapping: a type of your own."),
    ] = "auto"
    field: Annotated[Text, entry("completion: field with the text.")] = "text"
    field_messages: Annotated[Text, entry("chat_template: field with the messages.")] = "messages"
    field_tools: Annotated[Text, entry("chat_template: field with the tools.")] = "tools"
    field_system: Annotated[
        Text,
        entry("chat_template: field with the system message of a chat that begins with none; may be absent."),
    ] = "system"
    message_property_mappings: Annotated[
        dict[str, Text], entry("chat_template: the template's name of a message's field → its name in the file.")
    ] = {}
    message_field_role: Annotated[Text | None, entry("chat_template: the older way to map `role`.")] = None
    message_field_content: Annotated[Text | None, entry("chat_template: the older way to map `content`.")] = None
    field_thinking: Annotated[Text | None, entry("chat_template: field of a message with its reasoning.")] = None
    template_thinking_key: Annotated[Text, entry("chat_template: the template's name of it.")] = "reasoning_content"
    split_thinking: Annotated[
        bool, entry("chat_template: text in `<think>` at the beginning of an answer is its reasoning.")
    ] = False
    message_field_training: Annotated[
        Text | None, entry("chat_template: field of a message that says whether to train on it.")
    ] = None
    message_field_training_detail: Annotated[
        Text | None,
        entry("chat_template: field of a message with a list of `{begin_offset, end_offset, train}`, in characters."),
    ] = None
    roles: Annotated[
        dict[str, tuple[Text, ...] | Text],
        entry("chat_template: role → its names in the file; human, gpt and the like are known."),
    ] = {}
    roles_to_train: Annotated[
        tuple[Text, ...], entry("chat_template: whose turns are trained on, by any name of the role.")
    ] = ("assistant",)
    train_on_eos: Annotated[
        Eos | None,
        entry("chat_template: ends of turns to train on: of `turn`s trained on, `all`, the `last`, `none`."),
    ] = None
    train_on_eot: Annotated[Eos | None, entry("chat_template: another name of `train_on_eos`.")] = None
    drop_system_message: Annotated[bool, entry("chat_template: leave system messages out.")] = False
    chat_template: Annotated[Text | None, entry("As the recipe's `chat_template`.")] = None
    chat_template_jinja: Annotated[
        Annotated[str, Meta(min_length=1, max_length=65536)] | None, entry("As the recipe's `chat_template_jinja`.")
    ] = None
    field_prompt: Annotated[Text | None, entry("rl: column with the prompt. Default: as the type has it.")] = None
    field_chosen: Annotated[Text | None, entry("rl: column with the chosen answer, or the chat that it ends.")] = None
    field_rejected: Annotated[Text | None, entry("rl: column with the rejected answer, or the chat.")] = None
    field_completion: Annotated[Text | None, entry("rl kto: column with the answer, or the chat that it ends.")] = None
    field_label: Annotated[Text | None, entry("rl kto: column that says whether the answer is desirable.")] = None
    prompt_format: Annotated[
        Text | None, entry("rl, user_defined.default: the prompt's text around `{prompt}` and `{system}`.")
    ] = None
    chosen_format: Annotated[Text | None, entry("rl, user_defined.default: the same around `{chosen}`.")] = None
    rejected_format: Annotated[Text | None, entry("rl, user_defined.default: the same around `{rejected}`.")] = None
    completion_format: Annotated[
        Text | None, entry("rl kto, user_defined.default: the same around `{completion}`.")
    ] = None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.data_files,) if isinstance(self.data_files, str) else self.data_files

    @property
    def template_of_type(self) -> str | None:
        """The template that a type of preferences is named after: `llama3` of `llama3.ultra`."""
        first = self.type.partition(".")[0] if isinstance(self.type, str) else ""
        return first if first in ("chatml", "llama3", "zephyr") else None

    @property
    def eos(self) -> Eos:
        return self.train_on_eos or self.train_on_eot or "turn"

    @property
    def properties(self) -> dict[str, str]:
        """The template's name of a message's field → its name in the file."""
        older = {
            "role": self.message_field_role,
            "content": self.message_field_content,
            self.template_thinking_key: self.field_thinking,
        }
        named = {name: given for name, given in older.items() if given}
        return {"role": "role", "content": "content", **named, **self.message_property_mappings}
