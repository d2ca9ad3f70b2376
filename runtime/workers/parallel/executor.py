"""The executor whose worker is a group of ranks."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from runtime.failpoints import failpoint
from runtime.logs import get_logger
from runtime.messages import Row, StepPlan, StepResult
from runtime.ranks.crew import Crew
from runtime.ranks.launchers import Launcher
from runtime.ranks.messages import (
    Allocate,
    Compute,
    Failed,
    Load,
    LoadAdapter,
    Loaded,
    Message,
    Reply,
    Step,
    Stepped,
    UnloadAdapter,
)
from runtime.workers.executor import RowByRow, WorkersLost
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.peft import AdapterInvalid, read_adapter
from runtime.workers.lora_base import LoraBase

LOAD_TIMEOUT = 1800.0
"""Seconds that ranks get to read their weights."""
TRIES = 3

log = get_logger("ranks")


class AllFailed(RuntimeError):
    """All ranks say that what they were asked for raised."""


class DistributedExecutor(RowByRow):
    """For one thread at a time, but for `prepare_adapter`, `lost` and `close`."""

    def __init__(self, launch: Launcher, load: Load, *, timeout: float) -> None:
        """Start the ranks and have them load their weights. `timeout`: seconds that they get for anything else.
        Raises `ModelLoadError`."""
        super().__init__()
        self._launch = launch
        self._load = load
        self._timeout = timeout
        self._notify: Callable[[], None] = lambda: None
        self._allocate: Allocate | None = None
        self._adapters: dict[str, str] = {}
        """Directories of what is loaded, by key."""
        self._prepared: dict[str, str] = {}
        self._closed = False
        self.base: LoraBase | None = None
        """What adapters must fit."""
        self.crew, self.loaded = self._start()

    def allocate(self, message: Allocate) -> None:
        """Make the caches: the last thing before plans can be executed."""
        self._allocate = message
        self._all(self.crew, message)

    # -- steps ---------------------------------------------------------------------------------

    def _batch(self, plan: StepPlan, rows: list[Row]) -> StepResult:
        skipped = [row.slot for row in plan.rows if row not in rows]
        return self._result(self.crew, self.crew.ask(Step(plan, skipped)))

    def _row(self, step: int, row: Row) -> StepResult:
        return self._result(self.crew, self.crew.ask(Compute(step, [row])))

    # -- adapters ------------------------------------------------------------------------------

    def prepare_adapter(self, key: str, directory: str) -> None:
        """The ranks read it when it is loaded; that it can be is found out here."""
        failpoint("adapters.prepare", key)
        assert self.base is not None
        read_adapter(Path(directory), self.base, max_rank=self._load.max_lora_rank)
        self._prepared[key] = directory

    def load_adapter(self, key: str) -> None:
        directory = self._prepared.pop(key)
        failpoint("adapters.load", key)
        try:
            self._all(self.crew, LoadAdapter(key, directory))
        except AllFailed as error:
            raise AdapterInvalid(f"The ranks cannot read the adapter: {error}.") from error
        self._adapters[key] = directory

    def unload_adapter(self, key: str) -> None:
        self._prepared.pop(key, None)
        if self._adapters.pop(key, None) is not None:
            with contextlib.suppress(WorkersLost):  # new ones will not have it
                self._all(self.crew, UnloadAdapter(key))

    # -- loss ----------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        return self.crew.lost

    def on_loss(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def recover(self) -> None:
        if not self._launch.restarts:
            raise WorkersLost("a rank was lost, and those who started the ranks must start them again")
        for left in reversed(range(TRIES)):
            self.crew.end()
            try:
                self._again()
            except (WorkersLost, ModelLoadError) as error:
                log.error("ranks_not_restarted", reason=str(error), tries_left=left)
                if left == 0 or self._closed:
                    raise WorkersLost(f"the ranks cannot be started again: {error}") from error
            else:
                return

    def close(self) -> None:
        self._closed = True
        self.crew.end()
        self._launch.clean()

    def _again(self) -> None:
        began = time.monotonic()
        self._behind.clear()
        self.crew, _ = self._start()
        if self._closed:
            self.crew.end()
            raise WorkersLost("the server ends")
        assert self._allocate is not None
        self._all(self.crew, self._allocate)
        for key, directory in list(self._adapters.items()):
            try:
                self._all(self.crew, LoadAdapter(key, directory))
            except AllFailed as error:
                log.error("adapter_not_reloaded", adapter=key, reason=str(error))
                del self._adapters[key]
        log.info("ranks_restarted", seconds=round(time.monotonic() - began, 2))

    # -- asking --------------------------------------------------------------------------------

    def ask_alike(self, message: Message, key: Callable[[Reply], object]) -> Reply:
        """The first rank's answer, where `key` of all answers is equal. Raises `AllFailed`, `WorkersLost`."""
        return self._agreed(self.crew, self.crew.ask(message), key)

    def _start(self) -> tuple[Crew, list[Loaded]]:
        crew = Crew(self._launch, self._timeout, lambda: self._notify())
        try:
            replies = crew.ask(self._load, LOAD_TIMEOUT)
        except WorkersLost as lost:
            crew.end()
            raise ModelLoadError(f"{self._load.name}: while it was loaded, {lost}.") from lost
        finally:
            self._launch.clean()
        loaded = [reply for reply in replies if isinstance(reply, Loaded)]
        if len(loaded) == len(replies):
            return crew, loaded
        crew.end()
        raise ModelLoadError(next(reply.message for reply in replies if isinstance(reply, Failed)))

    def _all(self, crew: Crew, message: Message) -> None:
        self._agreed(crew, crew.ask(message))

    def _result(self, crew: Crew, replies: list[Reply]) -> StepResult:
        reply = self._agreed(crew, replies, _sampled)
        if not isinstance(reply, Stepped):
            raise crew.give_up(f"a rank answered {type(reply).__name__} to a step")
        return reply.result

    def _agreed(self, crew: Crew, replies: list[Reply], key: Callable[[Reply], object] = lambda reply: reply) -> Reply:
        """What all ranks say. Raises `AllFailed` where that is a failure, and `WorkersLost` where they differ."""
        failed = [reply for reply in replies if isinstance(reply, Failed)]
        if len(failed) == len(replies):
            raise AllFailed(f"{failed[0].kind}: {failed[0].message}")
        if failed:
            raise crew.give_up(f"a rank failed alone: {failed[0].kind}: {failed[0].message}")
        if any(key(reply) != key(replies[0]) for reply in replies):
            raise crew.give_up("the ranks do not agree")
        return replies[0]


def _sampled(reply: Reply) -> object:
    """What ranks must agree on to go on: scores may differ in a bit between devices."""
    if isinstance(reply, Stepped):
        return reply.result.slots, reply.result.tokens, reply.result.failed
    return type(reply)
