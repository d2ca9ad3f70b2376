"""Reasoning in the text of an answer, split from the content: incremental, whatever the pieces of the text."""

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.text.grammar.budget import ThinkingBudget
from runtime.text.grammar.source import GrammarBuilder
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReasoningFormat:
    """The texts around reasoning, which a model writes before its answer."""

    name: str
    begin: str
    end: str
    aliases: tuple[str, ...] = ()

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that the parser has to see although they may be special tokens."""
        return self.begin, self.end

    def detects(self, template: str) -> bool:
        """True if a chat template knows of such reasoning."""
        return self.end in template

    def begins_in(self, prompt: str) -> bool | None:
        """From the end of a prompt: True if the answer is inside of reasoning from its start, False if there is none
        any more, None if the model decides."""
        text = prompt[-256:].rstrip()
        if text.endswith(self.begin):
            return True
        return False if text.endswith(self.end) else None

    def grammar(self, builder: GrammarBuilder, answer: str, *, inside: bool | None) -> str:
        """Expression for reasoning and then `answer`; `inside` as `begins_in` gives it."""
        if inside is False:
            return answer
        space = builder.rule("THINK_SPACE", r"/[ \n]{1,4}/")
        whole = f"{builder.text_through('thinking', self.end)} {space}? ({answer})"
        return whole if inside else f"{builder.marker(self.begin)} {whole} | ({answer})"

    def budget(self, tokens: int, tokenizer: Tokenizer, *, inside: bool | None) -> ThinkingBudget:
        """A limit to the tokens of reasoning."""
        ids = tokenizer.encode(self.end, add_special_tokens=False)
        return ThinkingBudget(tokens=tokens, begin=None if inside else self.begin, end=self.end, end_ids=ids)


_ALL = (
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFormat(
        "deepseek_r1", "<think>", "</think>", ("qwen3", "think", "deepseek_v3", "glm45", "olmo3", "step3", "holo2")
    ),
)

REASONING_FORMATS: Mapping[str, ReasoningFormat] = {name: one for one in _ALL for name in (one.name, *one.aliases)}
"""Name or alias → format."""


def reasoning_format(template: str | None, name: str) -> ReasoningFormat | None:
    """The format with a name or alias; the template's for "auto", and none for "none"."""
    if name == "none":
        return None
    return detect_reasoning(template) if name == "auto" else REASONING_FORMATS[name]


def detect_reasoning(template: str | None) -> ReasoningFormat | None:
    """The format of reasoning that a chat template knows of."""
    return next((one for one in _ALL if one.detects(template)), None) if template else None


class ReasoningParser:
    """Splitter of one answer. Whitespace around reasoning is dropped."""

    def __init__(self, format: ReasoningFormat, *, inside: bool | None) -> None:
        """`inside` as `ReasoningFormat.begins_in` gives it."""
        self._format = format
        self._held = ""
        self._state = "content" if inside is False else "reasoning" if inside else "begin"
        self._skips_space = inside is not False
        """Whitespace is dropped up to the next other character."""

    @property
    def in_reasoning(self) -> bool:
        """True while the answer has not come to its content."""
        return self._state == "reasoning"

    def feed(self, text: str) -> tuple[str, str]:
        """Reasoning and content that more text brings."""
        self._held += text
        reasoning = content = ""
        if self._state == "begin":
            self._begin()
        if self._state == "reasoning":
            reasoning = self._reason()
        if self._state == "content":
            content, self._held = self._held, ""
            if self._skips_space:
                content = content.lstrip()
                self._skips_space = not content
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return held.rstrip(), ""
        return "", held

    def _begin(self) -> None:
        """The first text decides if the model reasons."""
        text, begin = self._held.lstrip(), self._format.begin
        if text.startswith(begin):
            self._state, self._held = "reasoning", text[len(begin) :]
        elif not begin.startswith(text):
            self._state, self._skips_space = "content", False

    def _reason(self) -> str:
        """Take reasoning from the text, all of which cannot be the beginning of its end or of whitespace before it."""
        if self._skips_space:
            self._held = self._held.lstrip()
            self._skips_space = not self._held
        at = self._held.find(self._format.end)
        if at >= 0:
            reasoning, self._held = self._held[:at].rstrip(), self._held[at + len(self._format.end) :]
            self._state, self._skips_space = "content", True
            return reasoning
        end = self._format.end
        size = next((n for n in range(min(len(end), len(self._held)), 0, -1) if self._held.endswith(end[:n])), 0)
        safe = len(self._held[: len(self._held) - size].rstrip())
        reasoning, self._held = self._held[:safe], self._held[safe:]
        return reasoning
