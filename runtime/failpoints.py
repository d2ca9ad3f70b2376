"""Named places where a test can make things go wrong.

`EFT_FAILPOINTS="worker.row=raise:3"` raises at the third time that the place is passed (and only then);
`=raise` at every time; `=raise:3+` from the third on; `=exit:2` ends the process there at once;
`=sleep:5` waits 5 seconds. Several are separated by `;`. Without the variable a failpoint costs one
look at an empty dict.
"""

import os
import time
from collections import Counter


class FailpointError(RuntimeError):
    """Raised by an enabled failpoint."""


_actions: dict[str, tuple[str, str]] = {}
_passed: Counter[str] = Counter()


def configure(text: str) -> None:
    """Enable the failpoints of `text` (the form of EFT_FAILPOINTS), and no others."""
    _actions.clear()
    _passed.clear()
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        verb, _, argument = action.partition(":")
        if verb not in ("raise", "exit", "sleep"):
            raise ValueError(f"failpoint {name!r}: unknown action {verb!r}; there are: raise, exit, sleep")
        _actions[name.strip()] = (verb, argument)


def failpoint(name: str, detail: object = "") -> None:
    """A place that can fail. `detail` goes into the error's message."""
    if not _actions or name not in _actions:
        return
    verb, argument = _actions[name]
    _passed[name] += 1
    if verb == "sleep":
        time.sleep(float(argument))
        return
    if argument.endswith("+"):
        due = _passed[name] >= int(argument[:-1])
    else:
        due = not argument or _passed[name] == int(argument)
    if due and verb == "exit":
        os._exit(70)
    if due:
        raise FailpointError(f"failpoint {name} {detail}")


configure(os.environ.get("EFT_FAILPOINTS", ""))
