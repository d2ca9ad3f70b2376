"""Named places where a test can inject a failure.

`EFT_FAILPOINTS="worker.row=raise:3"` raises at the third pass of the place (and only then); `=raise` at every pass;
`=raise:3+` from the third on; `=raise:%100` at every hundredth; `=exit:2` ends the process there at once; `=sleep:5`
waits 5 seconds; `=interrupt:3` is Ctrl-C at the third; `=hold` waits until `release`, and raises after a minute.
`worker.row@2=…` means the passes with the detail 2 only. Several are separated by `;`. Without the variable a failpoint
costs one look-up in an empty dict.
"""

import os
import threading
import time
from collections import Counter

MAX_HOLD_SECONDS = 60.0


class FailpointError(RuntimeError):
    """Raised by an enabled failpoint."""


_VERBS = ("raise", "exit", "sleep", "interrupt", "hold")
ENABLED: dict[str, tuple[str, str]] = {}
"""Name → verb and argument. Empty in service: a loop may look here once instead of calling `failpoint` each time."""
_held: dict[str, threading.Event] = {}
_passed: Counter[str] = Counter()


def configure(text: str) -> None:
    """Enable the failpoints of `text` (the form of EFT_FAILPOINTS), and no others."""
    for event in _held.values():
        event.set()
    ENABLED.clear()
    _held.clear()
    _passed.clear()
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        verb, _, argument = action.partition(":")
        if verb not in _VERBS:
            raise ValueError(f"failpoint {name!r}: unknown action {verb!r}; there are: {', '.join(_VERBS)}")
        ENABLED[name.strip()] = (verb, argument)
        if verb == "hold":
            _held[name.strip()] = threading.Event()


def release(name: str) -> None:
    """Let all passes of a failpoint with the action `hold` go on, the later ones too."""
    _held[name].set()


def passed(name: str) -> int:
    """Passes of an enabled failpoint so far; `name` as it was enabled, with its `@detail`."""
    return _passed[name]


def failpoint(name: str, detail: object = "") -> None:
    """A place that can fail. `detail` goes into the error's message."""
    if not ENABLED:
        return
    for enabled in (name, f"{name}@{detail}"):
        if enabled in ENABLED:
            _passed[enabled] += 1
            _act(enabled, detail)


def _act(name: str, detail: object) -> None:
    verb, argument = ENABLED[name]
    if verb == "sleep":
        time.sleep(float(argument))
        return
    if verb == "hold":
        if not _held[name].wait(MAX_HOLD_SECONDS):
            raise FailpointError(f"failpoint {name} was not released within {MAX_HOLD_SECONDS:g} s")
        return
    if argument.startswith("%"):
        due = _passed[name] % int(argument[1:]) == 0
    elif argument.endswith("+"):
        due = _passed[name] >= int(argument[:-1])
    else:
        due = not argument or _passed[name] == int(argument)
    if not due:
        return
    if verb == "exit":
        os._exit(70)
    if verb == "interrupt":
        raise KeyboardInterrupt
    raise FailpointError(f"failpoint {name} {detail}")


configure(os.environ.get("EFT_FAILPOINTS", ""))
