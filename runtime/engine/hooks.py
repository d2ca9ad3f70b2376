"""Custom processing of requests: code of other packages that is called when requests arrive, begin and end.

A hook is a class that an installed package names under the entry point group `eft.hooks`; docs/hooks.md has an
example. An exception from a hook is the error of the request that it was called for, and of no other.
"""

import copy
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from runtime.errors import EngineFailure, RequestError
from runtime.messages import RequestTiming, Submission
from runtime.support.logs import get_logger

GROUP = "eft.hooks"

_log = get_logger(__name__)


class Hook:
    """Derive from this and override what is needed. One instance serves all requests.

    `on_submit` runs on the event loop, the others on the engine thread between two steps: while a hook works,
    nothing else does, so it must not wait for anything.
    """

    def on_submit(self, submission: Submission) -> Submission:
        """A sequence is about to be queued. Return it, or a changed copy (`msgspec.structs.replace`); raise a
        `runtime.errors.RequestError` to reject it with that status and message."""
        return submission

    def on_first_token(self, submission: Submission, timing: RequestTiming) -> None:
        """The first token is there."""

    def on_finish(self, submission: Submission, timing: RequestTiming) -> None:
        """The sequence has ended; `timing.finish_reason` says how."""


class Hooks:
    """All hooks, in order of their names."""

    def __init__(self, hooks: Sequence[tuple[str, Hook]] = ()) -> None:
        self._hooks = list(hooks)

    @classmethod
    def installed(cls) -> "Hooks":
        """The hooks of all installed packages. Raises `RuntimeError` naming the one that cannot be loaded."""
        hooks = []
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
            try:
                hook = entry.load()()
            except Exception as error:
                raise RuntimeError(f"the hook {entry.name!r} ({entry.value}) cannot be loaded: {error}") from error
            if not isinstance(hook, Hook):
                raise RuntimeError(f"the hook {entry.name!r} ({entry.value}) is not a runtime.engine.hooks.Hook")
            _log.info("hook_loaded", hook=entry.name)
            hooks.append((entry.name, hook))
        return cls(hooks)

    def submit(self, submission: Submission) -> Submission:
        """Apply the hooks to a submission. Raises the error with which a hook rejects it, or `EngineFailure`."""
        for name, hook in self._hooks:
            try:
                changed = hook.on_submit(submission)
                if (changed.id, changed.request_id) != (submission.id, submission.request_id):
                    raise ValueError("a hook must not change the id or the request_id: use msgspec.structs.replace")
            except RequestError:
                raise
            except Exception as error:
                raise EngineFailure(_blame(name, submission, error), code="hook_failed") from error
            submission = changed
        return submission

    def first_token(self, submission: Submission, timing: RequestTiming) -> str | None:
        """Error message for the client when a hook has raised, else None."""
        return self._each(submission, timing, lambda hook: hook.on_first_token)

    def finish(self, submission: Submission, timing: RequestTiming) -> str | None:
        """Error message for the client when a hook has raised, else None. Every hook is called all the same."""
        return self._each(submission, timing, lambda hook: hook.on_finish)

    def _each(
        self,
        submission: Submission,
        timing: RequestTiming,
        method: Callable[[Hook], Callable[[Submission, RequestTiming], None]],
    ) -> str | None:
        blame = None
        for name, hook in self._hooks:
            try:
                method(hook)(submission, copy.copy(timing))
            except Exception as error:
                blame = _blame(name, submission, error)
        return blame


def _blame(name: str, submission: Submission, error: Exception) -> str:
    _log.error("hook_failed", hook=name, request_id=submission.request_id, exc_info=error)
    return f"The server's hook {name!r} failed on this request."
