"""The end of an answer in a chat: the template's text after it, and the token at which generation stops.

A template and a vocabulary that do not fit together are easy to combine: a base model with a foreign ChatML template
writes `<|im_end|>` as six ordinary tokens. Such a model answers, and never stops; an adapter trained with it does not
learn to stop either. Loading, planning and training check for this here, and report it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.errors import InvalidRequest

QUESTION, ANSWER = "eft7question", "eft7answer"
"""Contents of the probe: no template writes these, and none changes them when it trims or capitalises."""
SHOWN_CHARACTERS = 40


class ChatTokenizer(Protocol):
    """The required methods of a tokenizer; see `runtime.text.tokenizer.Tokenizer`."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    wants_bos: bool

    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def token_text(self, id: int) -> str: ...

    def render_chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> str: ...


@dataclass(frozen=True)
class TurnEnd:
    """The end of an answer in the chats that a template renders."""

    text: str = ""
    """The template's text after the last answer of a chat."""
    ids: tuple[int, ...] = ()
    """Tokens of `text`."""
    token_id: int | None = None
    """The first token of `ids` that ends generation; None: none does."""
    bos_missing: bool = False
    """Texts should begin with a BOS, and the template's prompts, or texts without a template, have none."""
    problems: tuple[str, ...] = ()
    """Sentences that describe the problems. Empty where an answer ends correctly."""


def turn_end(tokenizer: ChatTokenizer, ends: Collection[int] = ()) -> TurnEnd:
    """The end of an answer as the tokenizer's own chat template writes it.

    Args:
        ends: ids that end a turn besides the tokenizer's `eos_ids`, such as a recipe's `eot_tokens`.
    """
    stops = {*tokenizer.eos_ids, *ends}
    problems = list(_bos_problems(tokenizer))
    bos_missing = bool(problems)
    if tokenizer.chat_template is None:
        if not stops:
            problems.append("The model names no token that ends a text: answers do not end.")
        return TurnEnd(bos_missing=bos_missing, problems=tuple(problems))
    text = _after_answer(tokenizer)
    if text is None:
        problems.append(
            "The chat template does not render a question and its answer as they are, so the token that ends an "
            "answer cannot be told."
        )
        return TurnEnd(bos_missing=bos_missing, problems=tuple(problems))
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    token_id = next((id for id in ids if id in stops), None)
    if token_id is None:
        problems.append(_end_problem(tokenizer, text, stops))
    return TurnEnd(text, ids, token_id, bos_missing, tuple(problems))


def _after_answer(tokenizer: ChatTokenizer) -> str | None:
    """Text after an answer that ends a chat, or, if that is empty, after an answer that a question follows; None where
    the template leaves the answer out or refuses the messages."""
    answered = [_message("user", QUESTION), _message("assistant", ANSWER)]
    last = _rest(tokenizer, answered)
    if last is None or last.strip():
        return last
    asked_again = _rest(tokenizer, [*answered, _message("user", QUESTION)])
    return last if asked_again is None else asked_again.partition(QUESTION)[0]


def _rest(tokenizer: ChatTokenizer, messages: list[dict[str, Any]]) -> str | None:
    """The template's text after the answer; None where it leaves the answer out or refuses the messages."""
    for chat in (messages, [_message("system", QUESTION), *messages], [_in_parts(message) for message in messages]):
        try:
            _, found, rest = tokenizer.render_chat(chat, add_generation_prompt=False).rpartition(ANSWER)
        except InvalidRequest:
            continue
        if found:
            return rest
    return None


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _end_problem(tokenizer: ChatTokenizer, text: str, stops: set[int]) -> str:
    known = ", ".join(repr(tokenizer.token_text(id)) for id in sorted(stops)[:5]) or "no token"
    mark = text.strip()
    if not mark:
        return (
            f"The chat template writes nothing after an answer, and generation ends with {known}: answers do not end."
        )
    mark = mark.split("\n")[0][:SHOWN_CHARACTERS]
    count = len(tokenizer.encode(mark, add_special_tokens=False))
    tokens = (
        "a token at which it does not end" if count == 1 else f"which is {count} tokens in this vocabulary, not one"
    )
    return (
        f"The chat template ends an answer with {mark!r}, {tokens}. Generation ends with {known}: answers in chats do "
        "not end, and an adapter trained on chats does not learn to stop. The model and the chat template do not "
        "belong together."
    )


def _bos_problems(tokenizer: ChatTokenizer) -> Iterator[str]:
    bos = tokenizer.bos_id
    if bos is None:
        return
    begins = tokenizer.encode("a")[:1] == [bos]
    name = repr(tokenizer.token_text(bos))
    if tokenizer.wants_bos and not begins:
        yield f"The model's configuration asks for {name} before texts (add_bos_token), and its tokenizer writes none."
    if not (begins or tokenizer.wants_bos) or tokenizer.chat_template is None:
        return
    try:
        prompt = tokenizer.render_chat([_message("user", QUESTION)])
    except InvalidRequest:
        return
    if tokenizer.encode(prompt, add_special_tokens=False)[:1] != [bos]:
        yield (
            f"The model's texts begin with {name}, and the chat template does not write it: chats lack the token that "
            "the model was trained to begin with."
        )
