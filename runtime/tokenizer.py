"""Text to token ids and back, and chats to prompts.

Built on the `tokenizers` library alone: importing transformers would take longer than loading a small
model. `runtime.workers.loading` makes a `Tokenizer` from a model's files; this module reads none.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from runtime.chat_template import ChatTemplate, Message
from runtime.errors import InvalidRequest
from runtime.special_text import SpecialText

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
"""Tokens that end a turn in the chat formats in use. Many models' configurations name only the token that
ends a text; when the chat template writes one of these, it ends the output too."""


class Tokenizer:
    """One model's tokenizer. Immutable but for what it remembers, so any thread may call it."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`template_tokens` are what a template may print by name, such as `bos_token`.

        `eos_ids` are the ids that the model's configuration names; the ends of turns that the chat template
        writes are added here. Raises `ChatTemplateError` when the template does not compile.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_text = SpecialText(backend)
        self._template = None if chat_template is None else ChatTemplate(chat_template)
        self._template_tokens = dict(template_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.bos_id = bos_id
        self.vocab_size: int = max(backend.get_vocab_size(), max(added, default=-1) + 1)
        """One more than the highest id. The model's own count may be higher: embeddings are often padded."""
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos_ids, *self._ends_of_turn()]))
        self._alone: dict[tuple[int, bool], str] = {}
        anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor = anchor, backend.decode(anchor)

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template."""
        return None if self._template is None else self._template.source

    @property
    def definition(self) -> str:
        """Contents of a `tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written in it become their ids.

        `add_special_tokens` adds what the model wants around a text, such as a BOS. Raises `InvalidRequest`
        for text that is not valid Unicode.
        """
        _check_unicode(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no whole character become U+FFFD, ids without a token nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_one(self, id: int, *, skip_special_tokens: bool = True) -> str:
        """`decode` of one id, remembered: of every output each id is asked for alone once."""
        key = (id, skip_special_tokens)
        text = self._alone.get(key)
        if text is None:
            text = self._alone[key] = self._backend.decode([id], skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, id: int) -> str:
        """Text of one token as it reads in the middle of a text, with its leading space."""
        ids, text = self._anchor
        return self._backend.decode([*ids, id], skip_special_tokens=False)[len(text) :]

    def token_id(self, text: str) -> int | None:
        """The id of the token that is spelled exactly so, or None."""
        return self._backend.token_to_id(text)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a chat. `template_kwargs` are further variables of the template.

        `continue_final_message` leaves the last message open, for the model to go on with it. Raises
        `InvalidRequest` when the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template: use completions, or start the server with a chat template.",
                param="messages",
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables={**self._template_tokens, **(template_kwargs or {})},
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of the prompt of a chat; arguments and errors as in `render_chat`.

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
            )
        except InvalidRequest as error:
            if not literal:
                raise
            raise InvalidRequest(
                self._special_text.reveal(error.message), param=error.param, code=error.code
            ) from error
        _check_unicode(rendered)
        if literal:
            return self._special_text.encode(rendered)
        return self.encode(rendered, add_special_tokens=False)

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
