"""The dialogue of `eft chat`: reads lines, runs commands, prints answers.

The event loop runs only while an answer does; at the prompt this is plain blocking input, with
line editing, and Ctrl-C is Python's own. `asyncio.Runner` turns a Ctrl-C during an answer into its
cancellation.
"""

import re
import sys
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from runtime.cli.conversation import Conversation
from runtime.cli.errors import CommandError
from settings.suggest import hint

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message (nothing: show it; "-": take it away)
/save FILE      write the conversation as JSON
/help           this
/exit           leave (also Ctrl-D)
A \\ at the end of a line continues it on the next. Ctrl-C stops an answer."""

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


class Repl:
    """`run` is what the event loop runs an answer with: `asyncio.Runner.run`."""

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
        self._commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "system": self._system,
            "save": self._save,
            "help": lambda _: self._note(HELP),
        }

    def loop(self) -> int:
        """Until the input ends or /exit. Returns 1 where input was piped and a question failed."""
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
        """Read and do one thing. False at the end."""
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
        """The next question or command, continued lines joined; None where the input ends."""
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
        try:
            self._run(self._stream(question))
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._note("\n(stopped)")
            return
        if self._json:
            record = {
                "question": question,
                "answer": self._conversation.answer,
                "model": self._conversation.model,
            }
            print(msgspec.json.encode(record).decode(), flush=True)
        else:
            print(flush=True)

    async def _stream(self, question: str) -> None:
        async with aclosing(self._conversation.ask(question)) as pieces:
            async for piece in pieces:
                if not self._json:
                    print(piece, end="", flush=True)

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            raise CommandError(f"unknown command /{name}{hint(name, [*self._commands, 'exit'])}; /help lists them")
        self._commands[name](argument.strip())

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._note("(conversation forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == "-" else text
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
        """For a person; piped output holds answers only."""
        if self._interactive:
            print(text, flush=True)
