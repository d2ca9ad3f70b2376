"""The form of an answer: what its text has to be, and how it splits into reasoning, content and calls of tools.

From the fields `response_format`, `structured_outputs` and its older names, `tools`, `tool_choice` and those of
reasoning to one grammar, which is compiled on a thread under a deadline, and to the parser of each answer.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from litestar.types import Receive

from runtime.api.http.sse import unless_disconnected
from runtime.api.openai.models import Served
from runtime.api.openai.schema import (
    ChatRequest,
    GenerationRequest,
    NamedTool,
    ResponseFormat,
    StructuralTag,
    StructuredOutputs,
    ToolSpec,
    is_null,
)
from runtime.errors import InvalidRequest, Unsupported
from runtime.text.grammar import (
    GrammarBuilder,
    GrammarCompiler,
    Part,
    choice_part,
    json_part,
    lark_part,
    regex_part,
)
from runtime.text.grammar.schema import check_depth, parse_schema
from runtime.text.grammar.source import literal, pattern_of
from runtime.text.reasoning import ReasoningFormat
from runtime.text.tokenizer import Tokenizer
from runtime.text.tool_calls import FORMATS, Tool, ToolFormat, detect_format
from runtime.text.tool_prompt import shown_tool
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.engine.service import EngineService

MAX_TAIL = 64
"""Tokens at the end of a prompt that say if the answer begins inside of reasoning."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}", re.ASCII)

# Two, so that one that takes long does not keep all others waiting.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="grammar")


@dataclass(frozen=True)
class Structure:
    """Required form of an answer's content."""

    field: str
    """The request's field, for errors."""
    make: Callable[[], Part] | None = None
    is_json: bool = False
    tags: tuple[StructuralTag, ...] = ()
    triggers: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerForm:
    """The form of the answers to one request, once its prompt is known."""

    grammar: str = ""
    """Source of the grammar of an output; empty: any text."""
    tools: tuple[Tool, ...] = ()
    calls: ToolFormat | None = None
    """Form of calls; None where no tool may be called."""
    structured: bool = False
    """An answer that is no calls is JSON or of another form that was asked for."""
    reasoning: ReasoningFormat | None = None
    inside: bool | None = None
    """As `ReasoningFormat.begins_in` gives it."""
    includes_reasoning: bool = True
    shows_special: bool = False
    """Its parser needs texts that are special tokens."""

    @property
    def plain(self) -> bool:
        """True if all text of an answer is content."""
        return self.calls is None and self.reasoning is None


PLAIN = AnswerForm()


@dataclass(frozen=True)
class FormRequest:
    """Requested form of a request's answers: checked, and independent of its prompt."""

    structure: Structure | None = None
    tools: tuple[Tool, ...] = ()
    shown_tools: tuple[dict[str, object], ...] = ()
    """Descriptions of the tools, for the prompt."""
    forced: bool = False
    """The answer has to be a call."""
    parallel: bool = True
    calls: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    budget: int | None = None
    includes_reasoning: bool = True
    size: int = 0
    """Bytes of schemas and grammars."""
    template_kwargs: dict[str, object] = field(default_factory=dict)

    async def form(self, prompt: list[int], served: Served, settings: Settings, receive: Receive) -> AnswerForm:
        """The form of the answers to a prompt. Raises `InvalidRequest` for a grammar that does not compile, or takes
        too long to, and `ClientDisconnected`."""
        inside, service = None, served.service
        if self.reasoning is not None:
            tail = served.tokenizer.decode(prompt[-MAX_TAIL:], skip_special_tokens=False)
            inside = self.reasoning.begins_in(tail)
            if inside is None and self._hides(service.engine.grammars):
                inside = False
        grammar = ""
        if self.structure is not None or self.tools or self.budget is not None:
            grammar = await self._compiled(inside, service, settings, receive)
        texts = [] if self.calls is None else [*self.calls.special_texts]
        texts += [] if self.reasoning is None else [*self.reasoning.special_texts]
        return AnswerForm(
            grammar=grammar,
            tools=self.tools,
            calls=self.calls,
            structured=self.structure is not None,
            reasoning=self.reasoning,
            inside=inside,
            includes_reasoning=self.includes_reasoning,
            shows_special=any(_is_skipped(served.tokenizer, text) for text in texts),
        )

    def _hides(self, compiler: GrammarCompiler) -> bool:
        """True if the form of the content may be that of the begin of reasoning, so that the one cannot be told from
        the other: there is no reasoning then. No JSON begins so, and no text with a special token."""
        if self.structure is None or self.structure.is_json or self.structure.tags or self.reasoning is None:
            return False
        return compiler.special_id(self.reasoning.begin) is None

    async def _compiled(
        self, inside: bool | None, service: "EngineService", settings: Settings, receive: Receive
    ) -> str:
        compiler, seconds = service.engine.grammars, settings.limits.grammar_timeout
        param = self.structure.field if self.structure is not None else "tools" if self.tools else None

        def work() -> str:
            text = self._source(compiler, inside)
            compiler.compile(text, param=param)
            return text

        async def wait() -> str:
            return await asyncio.get_running_loop().run_in_executor(_threads, work)

        try:
            return await asyncio.wait_for(unless_disconnected(receive, wait()), seconds)
        except TimeoutError:
            raise InvalidRequest(
                f"The grammar of this request takes longer than {seconds:g} seconds to compile.", param=param
            ) from None

    def _source(self, compiler: GrammarCompiler, inside: bool | None) -> str:
        builder = GrammarBuilder(compiler.special_id)
        if self.reasoning is None:
            return builder.build(self._answer(builder))
        if inside is None:
            builder.reserve(rf"\s*{pattern_of(self.reasoning.begin)}")
        answer = self._answer(builder)
        builder.free()
        budget = None
        if self.budget is not None and inside is not False:
            budget = self.reasoning.budget(self.budget, compiler.tokenizer, inside=inside)
        return builder.build(self.reasoning.grammar(builder, answer, inside=inside), budget)

    def _answer(self, builder: GrammarBuilder) -> str:
        """Expression for what comes after reasoning."""
        if self.calls is not None:
            if self.forced:
                return self.calls.calls(builder, self.tools, parallel=self.parallel)
            if self.structure is None:
                return self.calls.answer(builder, self.tools, parallel=self.parallel)
            calls = self.calls.calls(builder, self.tools, parallel=self.parallel)
            return f"{_expression(builder, self.structure)} | {calls}"
        if self.structure is None:
            return builder.text("CONTENT")
        return _expression(builder, self.structure)


def _expression(builder: GrammarBuilder, structure: Structure) -> str:
    if structure.make is not None:
        return builder.part("content", structure.make())
    text = builder.text("CONTENT", without=structure.triggers)
    tags = []
    for index, tag in enumerate(structure.tags):
        trigger = next(one for one in structure.triggers if tag.begin.startswith(one))
        head = builder.text_through(f"tag_{index}", trigger)
        schema = parse_schema(bytes(tag.schema), structure.field) if not is_null(tag.schema) else True
        body = builder.part(f"tag_body_{index}", json_part(schema, structure.field))
        rest = tag.begin[len(trigger) :]
        tags.append(" ".join(filter(None, [head, rest and literal(rest), body, tag.end and literal(tag.end)])))
    return f"({' | '.join(tags)})* {text}"


def _is_skipped(tokenizer: Tokenizer, text: str) -> bool:
    """True for a text that is one token, which detokenizing leaves out as special."""
    id = tokenizer.token_id(text)
    return id is not None and not tokenizer.decode_one(id, skip_special_tokens=True)


# -- requests --------------------------------------------------------------------------------------


def check_form(asked: GenerationRequest, served: Served, settings: Settings) -> FormRequest:
    """Read the requested form of the answers. Cheap, so it runs before tokenising. Raises `InvalidRequest`,
    `Unsupported`."""
    structure = _structure(asked)
    found = FormRequest(structure=structure)
    if isinstance(asked, ChatRequest):
        found = _chat_form(asked, structure, served, settings)
    size = _size(asked)
    if size > settings.limits.max_grammar:
        param = structure.field if structure is not None else "tools"
        raise InvalidRequest(
            f"{param}: the schemas and grammars of a request must have at most {settings.limits.max_grammar} bytes in "
            f"all, got {size}.",
            param=param,
        )
    if structure is not None or found.tools or found.budget is not None:
        what = structure.field if structure is not None else "tools" if found.tools else "thinking_token_budget"
        if asked.use_beam_search:
            raise InvalidRequest(f"use_beam_search cannot be held to a grammar: leave {what} out.", param=what)
        for name in ("allowed_token_ids", "bad_words"):
            if getattr(asked, name):
                raise InvalidRequest(
                    f"{name} may leave a grammar no token to go on with: leave it or {what} out.", param=name
                )
        if asked.ignore_eos:
            raise InvalidRequest(
                f"ignore_eos leaves a grammar no way to end the output: leave it or {what} out.", param="ignore_eos"
            )
    return found


def _size(asked: GenerationRequest) -> int:
    """Bytes of all schemas and grammars, as they are in the body."""
    fields: list[object] = [asked.response_format, asked.structured_outputs, asked.guided_regex]
    fields += [asked.guided_choice, asked.guided_grammar, asked.structural_tag]
    size = sum(len(msgspec.json.encode(one)) for one in fields if one is not None) + len(bytes(asked.guided_json))
    if isinstance(asked, ChatRequest):
        for tool in asked.tools or ():
            if tool.function is not None:
                size += len(bytes(tool.function.parameters))
    return size


def _structure(asked: GenerationRequest) -> Structure | None:
    found = [*_response_format(asked.response_format, "response_format")]
    if asked.structured_outputs is not None:
        found += _structured(asked.structured_outputs)
    if not is_null(asked.guided_json):
        found.append(_json(asked.guided_json, "guided_json"))
    if asked.guided_regex is not None:
        found.append(_regex(asked.guided_regex, "guided_regex"))
    if asked.guided_choice is not None:
        found.append(_choice(asked.guided_choice, "guided_choice"))
    if asked.guided_grammar is not None:
        found.append(_lark(asked.guided_grammar, "guided_grammar"))
    if asked.structural_tag is not None:
        found.append(_tagged(asked.structural_tag, "structural_tag"))
    if len(found) > 1:
        names = " and ".join(one.field for one in found)
        raise InvalidRequest(f"An answer can be held to one form only, got {names}.", param=found[1].field)
    return found[0] if found else None


def _response_format(given: ResponseFormat | None, param: str) -> Iterator[Structure]:
    if given is None or given.type == "text":
        return
    if given.type == "json_object":
        yield Structure(param, lambda: json_part({"type": "object"}, param), is_json=True)
    elif given.type == "json_schema":
        schema = given.json_schema.schema if given.json_schema is not None else None
        if schema is None or is_null(schema):
            raise InvalidRequest(f"{param}.json_schema.schema must hold the schema.", param=param)
        yield _json(schema, param)
    elif given.type == "structural_tag":
        yield _tagged(given, param)
    else:
        raise InvalidRequest(
            f"{param}.type must be `text`, `json_object`, `json_schema` or `structural_tag`, got `{given.type[:64]}`.",
            param=param,
        )


def _structured(given: StructuredOutputs) -> list[Structure]:
    param, found = "structured_outputs", []
    if not is_null(given.json):
        found.append(_json(given.json, f"{param}.json"))
    if given.json_object:
        found.append(Structure(param, lambda: json_part({"type": "object"}, param), is_json=True))
    if given.regex is not None:
        found.append(_regex(given.regex, f"{param}.regex"))
    if given.choice is not None:
        found.append(_choice(given.choice, f"{param}.choice"))
    if given.grammar is not None:
        found.append(_lark(given.grammar, f"{param}.grammar"))
    if given.structural_tag is not None:
        found.append(_tagged(given.structural_tag, f"{param}.structural_tag"))
    if not found:
        raise InvalidRequest(
            f"{param} must have one of json, json_object, regex, choice, grammar and structural_tag.", param=param
        )
    return found


def _json(schema: msgspec.Raw, param: str) -> Structure:
    """A schema, or the text of one, as vLLM takes it too."""
    text = bytes(schema)
    if text.startswith(b'"'):
        text = msgspec.json.decode(text, type=str).encode()
    return Structure(param, lambda: json_part(parse_schema(text, param), param), is_json=True)


def _regex(regex: str, param: str) -> Structure:
    return Structure(param, lambda: regex_part(regex, param))


def _choice(choices: list[str], param: str) -> Structure:
    return Structure(param, lambda: choice_part(choices, param))


def _lark(grammar: str, param: str) -> Structure:
    return Structure(param, lambda: lark_part(grammar, param))


def _tagged(given: str | ResponseFormat, param: str) -> Structure:
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given, type=ResponseFormat)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"{param} must be a structural tag as JSON: {error}.", param=param) from error
    if not is_null(given.format):
        raise InvalidRequest(
            f"{param}.format, xgrammar's form of structural tags, is not supported: send `structures`, each with "
            "`begin`, `schema` and `end`, and `triggers`; for a regex or a grammar alone there is structured_outputs.",
            param=param,
        )
    tags, triggers = given.structures or [], given.triggers or []
    if not tags or not triggers or not all(triggers):
        raise InvalidRequest(
            f"{param} must have `structures`, each with `begin`, `schema` and `end`, and `triggers`; other forms of "
            "structural tags are not supported.",
            param=param,
        )
    for tag in tags:
        if not any(tag.begin.startswith(trigger) for trigger in triggers):
            raise InvalidRequest(f"{param}: no trigger begins `{tag.begin[:64]}`.", param=param)
    return Structure(param, tags=tuple(tags), triggers=tuple(triggers))


# -- chats -----------------------------------------------------------------------------------------


def _chat_form(
    asked: ChatRequest,
    structure: Structure | None,
    served: Served,
    settings: Settings,
) -> FormRequest:
    template = served.tokenizer.chat_template or ""
    reasoning = served.reasoning
    if asked.thinking_token_budget is not None:
        if reasoning is None:
            raise Unsupported(
                "`thinking_token_budget` is for models that reason; this one does not.", param="thinking_token_budget"
            )
        if not 0 <= asked.thinking_token_budget < 2**31:
            raise InvalidRequest(
                f"thinking_token_budget must be at least 0 and below 2^31, got {asked.thinking_token_budget}.",
                param="thinking_token_budget",
            )
    tools = _tools(asked.tools, settings)
    choice = asked.tool_choice or "auto"
    if not tools:
        if choice not in ("auto", "none"):
            raise InvalidRequest("tool_choice needs tools, got none.", param="tool_choice")
        calls = None
    else:
        calls = _tool_format(served.tokenizer, settings.model.tool_parser) if choice != "none" else None
    shown = _shown(asked.tools)
    if choice == "none":
        tools, calls, shown = (), None, ()
    if isinstance(choice, NamedTool):
        tools = tuple(tool for tool in tools if tool.name == choice.function.name)
        if not tools:
            raise InvalidRequest(
                f"tool_choice names `{choice.function.name[:64]}`, which is not one of the tools.", param="tool_choice"
            )
    forced = bool(tools) and choice not in ("auto", "none")
    if calls is not None and structure is not None and not forced and calls.name in ("llama3_json", "pythonic"):
        raise Unsupported(
            f"{structure.field} and tools cannot be told apart in the format of this model's calls: send one of them, "
            "or tool_choice `required` or `none`.",
            param=structure.field,
        )
    return FormRequest(
        structure=None if forced else structure,
        tools=tools,
        shown_tools=shown,
        forced=forced,
        parallel=asked.parallel_tool_calls is not False,
        calls=calls,
        reasoning=reasoning,
        budget=asked.thinking_token_budget,
        includes_reasoning=asked.include_reasoning is not False,
        template_kwargs=_effort(asked.reasoning_effort, template, reasoning),
    )


def _tool_format(tokenizer: Tokenizer, setting: str) -> ToolFormat:
    """The format that is set, or that the template tells of; Hermes where the tools are described without it."""
    if setting != "auto":
        return FORMATS[setting]
    found = detect_format(tokenizer.chat_template) if tokenizer.writes_own_tools else None
    return found or FORMATS["hermes"]


def _effort(effort: str | None, template: str, reasoning: ReasoningFormat | None) -> dict[str, object]:
    """Template variables for `reasoning_effort`."""
    if effort is None:
        return {}
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort not in ("none", "minimal")}
    if effort == "none" and reasoning is None:
        return {}
    raise Unsupported(
        f"`reasoning_effort` is for models whose chat template can turn reasoning on and off, got {effort}.",
        param="reasoning_effort",
    )


def _tools(specs: list[ToolSpec] | None, settings: Settings) -> tuple[Tool, ...]:
    given = specs or []
    if len(given) > settings.limits.max_tools:
        raise InvalidRequest(
            f"tools must have at most {settings.limits.max_tools} tools, got {len(given)}.", param="tools"
        )
    found: dict[str, Tool] = {}
    for index, spec in enumerate(given):
        param = f"tools[{index}]"
        if spec.type != "function":
            raise InvalidRequest(f"{param}.type must be `function`, got `{spec.type[:64]}`.", param=f"{param}.type")
        if spec.function is None:
            raise InvalidRequest(f"{param}.function is missing.", param=f"{param}.function")
        name = spec.function.name
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"{param}.function.name must have 1 to 64 letters, digits, `_`, `-` and `.`, got `{name[:80]}`.",
                param=f"{param}.function.name",
            )
        if name in found:
            raise InvalidRequest(
                f"{param}.function.name is `{name}`, as that of another tool.", param=f"{param}.function.name"
            )
        field = f"{param}.function.parameters"
        parameters = {} if is_null(spec.function.parameters) else parse_schema(bytes(spec.function.parameters), field)
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise InvalidRequest(f"{field} must be the JSON schema of an object.", param=field)
        check_depth(parameters, field)
        found[name] = Tool(name, parameters, field)
    return tuple(found.values())


def check_shown_tools(specs: list[ToolSpec] | None, settings: Settings) -> tuple[dict[str, object], ...]:
    """The descriptions of a request's tools, for a prompt that is only counted. Raises `InvalidRequest`."""
    _tools(specs, settings)
    return _shown(specs)


def _shown(specs: list[ToolSpec] | None) -> tuple[dict[str, object], ...]:
    return tuple(_shown_tool(spec) for spec in specs or ())


def _shown_tool(spec: ToolSpec) -> dict[str, object]:
    """A tool for the template: in OpenAI's shape, with what is absent left out."""
    assert spec.function is not None
    function, parameters = spec.function, spec.function.parameters
    return shown_tool(
        {
            "name": function.name,
            "description": function.description,
            "parameters": None if is_null(parameters) else json.loads(bytes(parameters)),
        }
    )
