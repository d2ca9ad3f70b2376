"""`eft chat`: talk to a server, or to a model loaded here."""

import asyncio
import atexit
import os
import re
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import msgspec
from cyclopts import Parameter
from msgspec import Struct

from runtime.cli import client
from runtime.cli.asking import DEFAULT_MAX_TOKENS as TEXT_MAX_TOKENS
from runtime.cli.asking import Asking, how_to_ask
from runtime.cli.client import describe, error_text
from runtime.cli.flags import MODEL_SECTIONS, ConfigFile, read_settings, refuse_settings, with_settings
from runtime.cli.output import CommandError, UsageError
from settings.suggest import hint

# -- conversation ----------------------------------------------------------------------------------
#
# One conversation with a chat model: its messages, and the stream of the next answer.

DEFAULT_MAX_TOKENS = 1024
"""Default of `max_tokens` in a chat. A small model, or an adapter that was trained for a few steps, may repeat
itself until the context is full, which takes minutes and leaves no room for another question."""


class ChatReply(Struct):
    """The last answer, complete once its stream has ended."""

    text: str = ""
    finish_reason: str | None = None
    """None for an answer that was stopped."""
    usage: dict[str, Any] | None = None


class Conversation:
    """Messages so far. A question that failed leaves no trace, so that it can be asked again."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str,
        *,
        system: str | None,
        params: dict[str, Any],
        asking: Asking | None = None,
    ) -> None:
        """`asking`: the prompt format of the model; default: chat. In a text format each question stands by itself."""
        self._client = client
        self.model = model
        self.system = system
        self._params = params
        self.asking = asking or Asking()
        self._turns: list[dict[str, str]] = []
        self.answer = ChatReply()

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self._turns

    def reset(self) -> None:
        self._turns = []

    def fork(self) -> "Conversation":
        """Another conversation with the same messages so far."""
        made = Conversation(self._client, self.model, system=self.system, params=self._params, asking=self.asking)
        made._turns = list(self._turns)
        return made

    async def models(self) -> list[str]:
        """Names that can be asked. Raises `CommandError`."""
        return [str(card["id"]) for card in (await client.ask(self._client, "GET", "/v1/models"))["data"]]

    async def change_model(self, name: str) -> None:
        """Go on with another model. Raises `CommandError` where the server has none of this name."""
        try:
            await client.ask(self._client, "GET", f"/v1/models/{quote(name)}")
        except client.ServerRefusal as error:
            if error.status != httpx.codes.NOT_FOUND:
                raise
            names = await self.models()
            raise CommandError(f"the server has no model {name!r}{hint(name, names)}; /model lists them") from error
        self.asking = await how_to_ask(self._client, name)
        self.model = name

    async def ask(self, question: str) -> AsyncGenerator[str]:
        """Yield the answer's pieces. Raises `CommandError` if the server has none.

        Leaving the iteration stops the answer: the connection is closed, which aborts the request.
        The text received so far stays in the conversation, as an answer of the model.
        """
        self._turns.append({"role": "user", "content": question})
        self.answer = ChatReply()
        try:
            async for text in self._stream():
                self.answer.text += text
                yield text
        except (httpx.HTTPError, CommandError) as error:
            self._turns.pop()
            message = describe(error) if isinstance(error, httpx.HTTPError) else str(error)
            raise CommandError(f"no answer: {message}") from error
        except BaseException:  # stopped: by a cancellation, or by leaving the iteration
            if self.answer.text:
                self._keep()
            else:
                self._turns.pop()
            raise
        self._keep()

    def _keep(self) -> None:
        self._turns.append({"role": "assistant", "content": self.answer.text})

    def _request(self) -> tuple[str, dict[str, Any]]:
        """Path and body for the last question."""
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **self._params}
        if self.asking.in_chats:
            return "/v1/chat/completions", {"messages": self.messages, **body}
        body.setdefault("max_tokens", self.asking.max_tokens)
        return "/v1/completions", {"prompt": self.asking.prompt(self._turns[-1]["content"]), **body}

    async def _stream(self) -> AsyncGenerator[str]:
        path, body = self._request()
        bodies = [body] if "max_tokens" in body else [{**body, "max_tokens": DEFAULT_MAX_TOKENS}, body]
        for body in bodies:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    if body is not bodies[-1] and _refuses_max_tokens(response):
                        continue  # a long conversation, or a server that allows fewer: use its own default
                    raise CommandError(error_text(response))
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (text := self._read_event(line[5:].strip())):
                        yield text
                return

    def _read_event(self, data: str) -> str:
        """The text in one event; usage and finish reason go to `self.answer`."""
        if data == "[DONE]":
            return ""
        try:
            event = msgspec.json.decode(data)
            if error := event.get("error"):
                raise CommandError(error["message"])
            self.answer.usage = event.get("usage") or self.answer.usage
            text = ""
            for choice in event["choices"]:
                text += (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
                self.answer.finish_reason = choice.get("finish_reason") or self.answer.finish_reason
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as error:
            raise CommandError(f"the server sent what is no chat completion chunk: {data[:200]}") from error
        return text


def _refuses_max_tokens(response: httpx.Response) -> bool:
    try:
        return bool(msgspec.json.decode(response.content)["error"]["param"] == "max_tokens")
    except (msgspec.DecodeError, KeyError, TypeError):
        return False


# -- repl ------------------------------------------------------------------------------------------
#
# The dialogue of `eft chat`: reads lines, runs commands, prints answers.
#
# The event loop runs only while an answer does; at the prompt this is plain blocking input, with line editing, and
# Ctrl-C is Python's own. `asyncio.Runner` turns a Ctrl-C during an answer into its cancellation.

HELP = """\
/model NAME     go on with another model, adapter or version (nothing: list them)
/compare NAME   let a second model answer the same questions too ("-": no more)
/reset          forget the conversation
/system TEXT    set the system message (nothing: show it; "-": take it away)
/save FILE      write the conversation as JSON
/help           this
/exit           leave (also Ctrl-D)
A \\ at the end of a line continues it on the next. Ctrl-C stops an answer."""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


class Repl:
    """Dialogue in a terminal. `run` runs an answer on the event loop: `asyncio.Runner.run`."""

    def __init__(
        self,
        conversation: Conversation,
        run: Callable[[Coroutine[Any, Any, None]], None],
        *,
        interactive: bool,
        json: bool,
    ) -> None:
        self._conversation = conversation
        self._run = run
        self._interactive = interactive
        self._json = json
        self._failed = False
        self._second: Conversation | None = None
        """A conversation with another model on the same questions."""
        self._commands: dict[str, Callable[[str], None]] = {
            "model": self._model,
            "compare": self._compare,
            "reset": self._reset,
            "system": self._system,
            "save": self._save,
            "help": lambda _: self._note(HELP),
        }

    def loop(self) -> int:
        """Run until the input ends or /exit. Returns 1 if input was piped and a question failed."""
        while True:
            try:
                if not self._turn():
                    return 1 if self._failed and not self._interactive else 0
            except CommandError as error:
                self._failed = True
                print(f"eft: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("\n(/exit or Ctrl-D leaves)")

    def _turn(self) -> bool:
        """Read and handle one question or command. Returns False at the end."""
        line = self._read_joined()
        command = _COMMAND.fullmatch(line or "")
        if line is None or (command and command[1] in ("exit", "quit")):
            return False
        if command:
            self._command(command[1], command[2] or "")
        elif line:
            self._answer(line)
        return True

    def _read_joined(self) -> str | None:
        """The next question or command, continued lines joined; None at the end of the input."""
        parts: list[str] = []
        while (line := self._read("… " if parts else "> ")) is not None:
            parts.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(parts).strip() if parts else None

    def _read(self, prompt: str) -> str | None:
        if not self._interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    def _answer(self, question: str) -> None:
        self._answer_of(self._conversation, question)
        if self._second is not None:
            self._answer_of(self._second, question)

    def _answer_of(self, conversation: Conversation, question: str) -> None:
        if self._second is not None and not self._json:
            print(f"{conversation.model}:", flush=True)
        try:
            self._run(self._stream(conversation, question))
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._note("\n(stopped)")
            return
        if self._json:
            record = {
                "question": question,
                "answer": conversation.answer,
                "model": conversation.model,
            }
            print(msgspec.json.encode(record).decode(), flush=True)
        else:
            print(flush=True)
            self._say_if_cut(conversation.answer)

    def _say_if_cut(self, answer: ChatReply) -> None:
        if answer.finish_reason == "length":
            tokens = (answer.usage or {}).get("completion_tokens")
            at = f" after {tokens} tokens" if tokens else ""
            print(f"eft: the answer was cut{at}; --max-tokens sets how long it may be", file=sys.stderr)

    async def _stream(self, conversation: Conversation, question: str) -> None:
        async with aclosing(conversation.ask(question)) as pieces:
            async for piece in pieces:
                if not self._json:
                    print(piece, end="", flush=True)

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise CommandError(f"unknown command /{name}{hint(name, [*self._commands, 'exit'])}; /help lists them")
        self._commands[name](argument.strip())

    def _model(self, name: str) -> None:
        if not name:
            self._run(self._list_models())
            return
        self._run(self._conversation.change_model(name))
        self._note(f"(model: {name})")

    def _compare(self, name: str) -> None:
        if name in ("", "-"):
            self._second = None
            self._note("(one model answers)")
            return
        second = self._conversation.fork()
        self._run(second.change_model(name))
        self._second = second
        self._note(f"({self._conversation.model} and {name} answer)")

    async def _list_models(self) -> None:
        for name in await self._conversation.models():
            self._note(f"{'*' if name == self._conversation.model else ' '} {name}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        if self._second is not None:
            self._second.reset()
        self._note("(conversation forgotten)")

    def _system(self, text: str) -> None:
        if text and not self._conversation.asking.in_chats:
            raise CommandError(f"{self._conversation.model} is asked in texts, which have no system message")
        if text:
            self._conversation.system = None if text == "-" else text
            if self._second is not None:
                self._second.system = self._conversation.system
        self._note(f"(system message: {self._conversation.system or 'none'})")

    def _save(self, name: str) -> None:
        if not name:
            raise CommandError("/save needs a file name")
        record = {"model": self._conversation.model, "messages": self._conversation.messages}
        try:
            Path(name).expanduser().write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
        except OSError as error:
            raise CommandError(f"cannot write {name}: {error.strerror}") from error
        self._note(f"(saved to {name})")

    def _note(self, text: str) -> None:
        """Print a note for a person; piped output holds answers only."""
        if self._interactive:
            print(text, flush=True)


DEFAULT_URL = "http://127.0.0.1:8000"
ANSWER_SECONDS = 10.0
"""Longest wait for a server's list of models, in seconds. A missing server refuses at once; one on a busy machine
may take seconds."""


@with_settings(*MODEL_SECTIONS)
def chat(
    model: Annotated[
        str | None,
        Parameter(help="A model of the server, such as an adapter; or what to load here, such as `demo`."),
    ] = None,
    *,
    url: Annotated[
        str | None, Parameter(help=f"Server to talk to; default: {DEFAULT_URL} if one answers there.")
    ] = None,
    api_key: Annotated[str | None, Parameter(help="Key for the server; default: EFT_API_KEY.")] = None,
    system: Annotated[str | None, Parameter(help="System message.")] = None,
    temperature: Annotated[float | None, Parameter(help="0 is greedy; default: the server's.")] = None,
    max_tokens: Annotated[
        int | None,
        Parameter(
            help=f"Most tokens of an answer; default: {DEFAULT_MAX_TOKENS}, of an adapter of texts {TEXT_MAX_TOKENS}."
        ),
    ] = None,
    seed: Annotated[int | None, Parameter(help="Same seed, same answers.")] = None,
    json: Annotated[bool, Parameter(help="One JSON object per answer.", negative="", show_default=False)] = False,
    config: ConfigFile = None,
    **flags: Any,
) -> int:
    """Answer questions until the input ends. Returns 1 where one that was piped in failed."""
    here = config is not None or any(value is not None for value in flags.values())
    sampling = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    params = {name: value for name, value in sampling.items() if value is not None}
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not json
    with asyncio.Runner() as runner:
        if model and not url and not here and not _is_local(model) and runner.run(_serves(DEFAULT_URL, api_key, model)):
            url = DEFAULT_URL
            if Path(model).exists():  # such as the copy of an adapter that was downloaded
                print(
                    f"eft: {model} is a model of {url}, and is asked there; ./{model} is the one here", file=sys.stderr
                )
        loaded = None
        if model and not url:
            if api_key is not None:
                raise UsageError("--api-key is for a server; a model that is loaded here asks for none")
            loaded = read_settings(flags, config, model=model)
        else:
            refuse_settings(flags, config)
        stack = AsyncExitStack()
        try:
            opened = client.in_process(loaded) if loaded else client.remote(url or DEFAULT_URL, api_key)
            http = runner.run(stack.enter_async_context(opened))
            name = runner.run(_model_name(http, url, model))
            asking = runner.run(how_to_ask(http, name)) if url and model else Asking()
            system = _system(system, asking, name)
            conversation = Conversation(http, name, system=system, params=params, asking=asking)
            if interactive:
                _prepare_terminal(name)
            return Repl(conversation, runner.run, interactive=interactive, json=json).loop()
        finally:
            runner.run(stack.aclose())


def _is_local(model: str) -> bool:
    """True if this cannot be a server's name for a model: it has the form of a path, or is the demo."""
    return model == "demo" or model.startswith((".", "/", "~"))


async def _serves(url: str, api_key: str | None, model: str) -> bool:
    """True if a server at `url` has a model of this name: then that is used, and none is loaded here. Raises
    `CommandError` if it has not, and the name can mean nothing else."""
    async with client.remote(url, api_key) as http:
        try:
            found = await http.get(f"/v1/models/{quote(model)}", timeout=ANSWER_SECONDS)
        except httpx.HTTPError:
            return False
        if found.status_code == httpx.codes.NOT_FOUND and "/" not in model and not os.path.exists(model):  # noqa: ASYNC240  one stat
            first = await client.served_model(http)
            raise CommandError(
                f"{url} has no model or adapter {model!r} (yet), and nothing of that name is here. It serves {first}; "
                "eft jobs list and eft adapters list show what else there is"
            )
        return found.status_code == httpx.codes.OK


def _system(given: str | None, asking: Asking, name: str) -> str | None:
    """The initial system message. Prints a note if the adapter sets it, or is asked in texts."""
    if not asking.in_chats:
        if given:
            raise UsageError(f"{name} was trained on texts (format {asking.format}), which have no system message")
        kind = "alpaca's prompt" if asking.format == "alpaca" else "texts"
        print(f"eft: {name} is asked in {kind}, as it was trained; each question stands by itself", file=sys.stderr)
        return None
    if given is None and asking.system:
        print(
            f"eft: the system message is that of the training rows, {asking.system!r} (--system for another one)",
            file=sys.stderr,
        )
        return asking.system
    return given or None


async def _model_name(http: httpx.AsyncClient, url: str | None, model: str | None) -> str:
    if url and model:
        return model
    try:
        return await client.served_model(http)
    except CommandError as error:
        if url or model:
            raise
        raise CommandError(f"{error}. Give --url, or a model to load here: eft chat demo") from error


def _prepare_terminal(name: str) -> None:
    with suppress(ImportError):  # line editing where Python was built with it
        import readline

        _keep_history(readline)
    print(f"{name}\n{HELP}")


HISTORY_LINES = 1000


def history_file() -> Path | None:
    """The file that keeps what is typed; None where EFT_CHAT_HISTORY is empty."""
    named = os.environ.get("EFT_CHAT_HISTORY")
    if named is not None:
        return Path(named).expanduser() if named else None
    home = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".local" / "state") / "eft-chat" / "history"


def _keep_history(readline: Any) -> None:
    """Read the history, and write it at the end, readable by its owner only. A disk that takes nothing is no error."""
    path = history_file()
    if path is None:
        return
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):
        readline.read_history_file(path)

    def write() -> None:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            readline.write_history_file(path)

    atexit.register(write)
