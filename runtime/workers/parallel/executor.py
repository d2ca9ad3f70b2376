"""The executor whose worker is a group of ranks."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from runtime.checkpoints.peft import AdapterInvalid, read_adapter
from runtime.messages import Row, StepPlan, StepResult
from runtime.model.config import ModelLoadError
from runtime.model.lora_base import LoraBase
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.workers.executor import RowByRow, WorkersLost
from runtime.workers.parallel.launchers import Launcher
from runtime.workers.parallel.messages import (
    Allocate,
    Compute,
    Failed,
    LoadAdapter,
    LoadModel,
    ModelLoaded,
    RankMessage,
    Reply,
    Step,
    Stepped,
    UnloadAdapter,
)
from runtime.workers.parallel.rank_group import RankGroup

LOAD_TIMEOUT = 1800.0
"""Seconds that ranks get to read their weights."""
TRIES = 3

log = get_logger("ranks")


class AllFailed(RuntimeError):
    """A message raised on all ranks."""


class DistributedExecutor(RowByRow):
    """Executor over a group of ranks. For one thread at a time, except `prepare_adapter`, `lost` and `close`."""

    def __init__(self, launch: Launcher, load: LoadModel, *, timeout: float) -> None:
        """Start the ranks and have them load their weights. `timeout`: seconds that they get for any other message.
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
        self._base: LoraBase | None = None
        """The base model as adapters see it: they must fit it."""
        self.ranks, self.loaded = self._start()

    def allocate(self, message: Allocate) -> None:
        """Make the caches: the last thing before plans can be executed."""
        self._allocate = message
        self._all(self.ranks, message)

    # -- steps ---------------------------------------------------------------------------------

    def _batch(self, plan: StepPlan, rows: list[Row]) -> StepResult:
        skipped = [row.slot for row in plan.rows if row not in rows]
        return self._result(self.ranks, self.ranks.ask(Step(plan, skipped)))

    def _row(self, step: int, row: Row) -> StepResult:
        return self._result(self.ranks, self.ranks.ask(Compute(step, [row])))

    # -- adapters ------------------------------------------------------------------------------

    def set_adapter_base(self, base: LoraBase) -> None:
        """Set the model that later adapters must fit, once the ranks have loaded it."""
        self._base = base

    def prepare_adapter(self, key: str, directory: str) -> None:
        """Check an adapter version here; the ranks read it when it is loaded."""
        failpoint("adapters.prepare", key)
        assert self._base is not None
        read_adapter(Path(directory), self._base, max_rank=self._load.max_lora_rank)
        self._prepared[key] = directory

    def load_adapter(self, key: str) -> None:
        directory = self._prepared.pop(key)
        failpoint("adapters.load", key)
        try:
            self._all(self.ranks, LoadAdapter(key, directory))
        except AllFailed as error:
            raise AdapterInvalid(f"The ranks cannot read the adapter: {error}.") from error
        self._adapters[key] = directory

    def unload_adapter(self, key: str) -> None:
        self._prepared.pop(key, None)
        if self._adapters.pop(key, None) is not None:
            with contextlib.suppress(WorkersLost):  # new ones will not have it
                self._all(self.ranks, UnloadAdapter(key))

    # -- loss ----------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        return self.ranks.lost

    def on_loss(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def recover(self) -> None:
        if not self._launch.restarts:
            raise WorkersLost("a rank was lost: start all ranks again, as they were started")
        for left in reversed(range(TRIES)):
            self.ranks.end()
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
        self.ranks.end()
        self._launch.clean()

    def _again(self) -> None:
        began = time.monotonic()
        self._behind.clear()
        self.ranks, _ = self._start()
        if self._closed:
            self.ranks.end()
            raise WorkersLost("the server ends")
        assert self._allocate is not None
        self._all(self.ranks, self._allocate)
        for key, directory in list(self._adapters.items()):
            try:
                self._all(self.ranks, LoadAdapter(key, directory))
            except AllFailed as error:
                log.error("adapter_not_reloaded", adapter=key, reason=str(error))
                del self._adapters[key]
        log.info("ranks_restarted", seconds=round(time.monotonic() - began, 2))

    # -- asking --------------------------------------------------------------------------------

    def ask_alike(self, message: RankMessage, key: Callable[[Reply], object]) -> Reply:
        """The first rank's answer, where `key` of all answers is equal. Raises `AllFailed`, `WorkersLost`."""
        return self._agreed(self.ranks, self.ranks.ask(message), key)

    def _start(self) -> tuple[RankGroup, list[ModelLoaded]]:
        ranks = RankGroup(self._launch, self._timeout, lambda: self._notify())
        try:
            replies = ranks.ask(self._load, LOAD_TIMEOUT)
        except WorkersLost as lost:
            ranks.end()
            raise ModelLoadError(f"{self._load.name}: while it was loaded, {lost}.") from lost
        finally:
            self._launch.clean()
        loaded = [reply for reply in replies if isinstance(reply, ModelLoaded)]
        if len(loaded) == len(replies):
            return ranks, loaded
        ranks.end()
        raise ModelLoadError(next(reply.message for reply in replies if isinstance(reply, Failed)))

    def _all(self, ranks: RankGroup, message: RankMessage) -> None:
        self._agreed(ranks, ranks.ask(message))

    def _result(self, ranks: RankGroup, replies: list[Reply]) -> StepResult:
        reply = self._agreed(ranks, replies, _sampled)
        if not isinstance(reply, Stepped):
            raise ranks.give_up(f"a rank answered {type(reply).__name__} to a step")
        return reply.result

    def _agreed(
        self, ranks: RankGroup, replies: list[Reply], key: Callable[[Reply], object] = lambda reply: reply
    ) -> Reply:
        """Common answer of all ranks. Raises `AllFailed` if it is a failure, and `WorkersLost` if the answers
        differ."""
        failed = [reply for reply in replies if isinstance(reply, Failed)]
        if len(failed) == len(replies):
            raise AllFailed(f"{failed[0].kind}: {failed[0].message}")
        if failed:
            raise ranks.give_up(f"a rank failed alone: {failed[0].kind}: {failed[0].message}")
        if any(key(reply) != key(replies[0]) for reply in replies):
            raise ranks.give_up("the ranks do not agree")
        return replies[0]


def _sampled(reply: Reply) -> object:
    """Part of an answer in which ranks must agree. Scores are left out: they may differ in a bit between devices."""
    if isinstance(reply, Stepped):
        return reply.result.slots, reply.result.tokens, reply.result.failed, reply.result.forced
    return type(reply)
