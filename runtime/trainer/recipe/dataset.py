"""One entry of `datasets` or `test_datasets`."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Eos = Literal["all", "turn", "last", "none"]
DataType = Literal["chat_template", "chat_template.default", "alpaca", "completion", "prompt_completion", "auto"]


def key(text: str) -> Meta:
    return Meta(description=text)


class Dataset(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of rows, and how a row becomes an example."""

    path: Annotated[
        Text,
        key("A file sent along, or one under the data roots; or `json`, `csv`, `parquet`, with `data_files`."),
    ]
    data_files: Annotated[tuple[Text, ...] | Text, key("Files, by themselves or in the folder `path`.")] = ()
    ds_type: Annotated[
        Literal["json", "jsonl", "csv", "parquet"] | None, key("Format of the files. Default: by their endings.")
    ] = None
    split: Annotated[Text | None, key("`train`, or a slice of the rows: `train[:20%]`, `train[100:200]`.")] = None
    type: Annotated[DataType, key("What a row is; `auto` goes by the fields of the first row.")] = "auto"
    field: Annotated[Text, key("completion: field with the text.")] = "text"
    field_messages: Annotated[Text, key("chat_template: field with the messages.")] = "messages"
    field_tools: Annotated[Text, key("chat_template: field with the tools.")] = "tools"
    message_property_mappings: Annotated[
        dict[str, Text], key("chat_template: the template's name of a message's field → its name in the file.")
    ] = {}
    message_field_role: Annotated[Text | None, key("chat_template: the older way to map `role`.")] = None
    message_field_content: Annotated[Text | None, key("chat_template: the older way to map `content`.")] = None
    field_thinking: Annotated[Text | None, key("chat_template: field of a message with its reasoning.")] = None
    template_thinking_key: Annotated[Text, key("chat_template: the template's name of it.")] = "reasoning_content"
    message_field_training: Annotated[
        Text | None, key("chat_template: field of a message that says whether to train on it.")
    ] = None
    roles: Annotated[
        dict[str, tuple[Text, ...] | Text],
        key("chat_template: role → its names in the file; human, gpt and the like are known."),
    ] = {}
    roles_to_train: Annotated[tuple[Text, ...], key("chat_template: whose turns are trained on.")] = ("assistant",)
    train_on_eos: Annotated[
        Eos | None, key("chat_template: ends of turns to train on: of `turn`s trained on, `all`, the `last`, `none`.")
    ] = None
    train_on_eot: Annotated[Eos | None, key("chat_template: another name of `train_on_eos`.")] = None
    drop_system_message: Annotated[bool, key("chat_template: leave system messages out.")] = False
    chat_template: Annotated[Text | None, key("As the recipe's `chat_template`.")] = None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.data_files,) if isinstance(self.data_files, str) else self.data_files

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
