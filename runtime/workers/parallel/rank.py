"""One rank: carries out the engine's messages, one after the other, until its link closes."""

import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.checkpoints import Checkpoint, open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.events import RunEvent
from runtime.messages import StepPlan, StepResult
from runtime.model.attention import CACHE_DTYPES
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.group import Group
from runtime.model.lora import Adapter
from runtime.model.lora_base import LoraBase
from runtime.model.model import device_memory, make_cache, make_device
from runtime.support import logs
from runtime.support.memory import keep_freed_memory
from runtime.text.grammar import GrammarCompiler
from runtime.trainer.run import TrainingRun
from runtime.trainer.schedule import ExampleFeed
from runtime.trainer.sliced_run import RunSpec
from runtime.workers.adapter_slots import AdapterSlots, lora_dtype
from runtime.workers.parallel.messages import (
    Advance,
    Advanced,
    Allocate,
    Captured,
    CloseRun,
    Compute,
    Done,
    Failed,
    Hello,
    Link,
    LinkClosed,
    LoadAdapter,
    LoadModel,
    ModelLoaded,
    RankMessage,
    Reply,
    StartRun,
    Step,
    Stepped,
    Stop,
    TakeSnapshot,
    UnloadAdapter,
    decode_message,
    encode,
    pack,
    unpack,
)
from runtime.workers.worker import Worker

# -- collectives -----------------------------------------------------------------------------------
#
# The group of ranks over torch.distributed: gloo between CPUs, NCCL between GPUs.
#
# NCCL has a stream of its own, on which a sum runs beside what the device computes. With torch, ops that need a result
# wait for it on the device, so the CPU continues and launches what follows.

T = TypeVar("T")


class CollectiveFailed(RuntimeError):
    """A rendezvous or a collective failed: another rank has died or hangs. This rank is unusable from now on."""


class TorchGroup(Group):
    """All ranks of the default process group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def rendezvous(cls, store: str, rank: int, size: int, device: torch.device, timeout: float) -> "TorchGroup":
        """Wait until all ranks are there. `store` is an init method of torch.distributed. Raises
        `CollectiveFailed`."""
        nccl = device.type == "cuda"
        _checked(
            lambda: dist.init_process_group(
                "cpu:gloo,cuda:nccl" if nccl else "gloo",
                init_method=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
                device_id=device if nccl else None,
            )
        )
        return cls(rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        _checked(lambda: dist.all_reduce(x, dist.ReduceOp.SUM))
        return x

    def all_reduce_later(self, x: Tensor) -> Callable[[], Tensor]:
        work = _checked(lambda: dist.all_reduce(x, dist.ReduceOp.SUM, async_op=True))
        assert work is not None

        def wait() -> Tensor:
            _checked(work.wait)
            return x

        return wait

    def max(self, x: Tensor) -> Tensor:
        _checked(lambda: dist.all_reduce(x, dist.ReduceOp.MAX))
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        _checked(lambda: dist.all_gather(found, x))
        return found


def _checked(collective: Callable[[], T]) -> T:
    try:
        return collective()
    except (RuntimeError, ValueError) as error:
        raise CollectiveFailed(str(error)) from error


# -- rank training ---------------------------------------------------------------------------------
#
# A rank's side of training runs.


class RankRun:
    """A training run on one rank."""

    def __init__(self, decoder: Decoder, message: StartRun) -> None:
        """Raises `ValueError` for a snapshot of another run."""
        self._decoder = decoder
        self._events: list[RunEvent] = []
        feed = msgspec.msgpack.decode(message.feed, type=ExampleFeed)
        self._run = TrainingRun(
            decoder,
            msgspec.msgpack.decode(message.spec, type=RunSpec),
            feed.epoch,
            feed.test,
            self._events.append,
            _written_elsewhere,
            restored=None if message.restored is None else unpack(message.restored),
        )

    def advance(self, message: Advance) -> Advanced:
        """Compute one slice."""
        run = self._run
        if message.pause:
            run.pause()
        else:
            run.resume()
        if message.answers is not None:
            run.answer(message.answers)
        wanted = run.pacer.peek()
        if wanted is not None:
            run.pacer.do(wanted.kind, message.granted)
        return self.state()

    def snapshot(self, step: int) -> Captured:
        """Raises `KeyError` for a step without a snapshot."""
        snapshot = self._run.take_snapshot(step)
        return Captured(pack(snapshot) if self._decoder.group.rank == 0 else None)

    def state(self) -> Advanced:
        """Its next slice, and its events since the last answer."""
        wanted = self._run.pacer.peek()
        events, paused = list(self._events), self._run.paused
        self._events.clear()
        return Advanced(wanted=wanted, paused=paused, events=events)

    def close(self) -> None:
        """Release it."""
        self._run.pacer.close()


class RankTraining:
    """Training on one rank: runs by their numbers."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._runs: dict[int, RankRun] = {}

    def start(self, message: StartRun) -> Advanced:
        """Raises `ValueError` for a snapshot of another run."""
        self.close(message.run)
        self._runs[message.run] = run = RankRun(self._decoder, message)
        return run.state()

    def run(self, number: int) -> RankRun:
        """A run that was started."""
        if number not in self._runs:
            raise RuntimeError(f"no run {number} was started")
        return self._runs[number]

    def close(self, number: int) -> None:
        """Release a run, if it is there."""
        if (run := self._runs.pop(number, None)) is not None:
            run.close()


def _written_elsewhere(directory: Path, adapter: Adapter) -> None:
    raise AssertionError("adapters are written by the engine's process")


# -- the rank --------------------------------------------------------------------------------------

log = logs.get_logger("rank")

LOST = 3
"""Exit code of a rank that lost the others."""


def follow(link: Link) -> int:
    """Serve one engine until it has gone; the process's exit code."""
    try:
        return _follow(link)
    except LinkClosed:
        return 0
    except CollectiveFailed as error:
        log.error("rank_lost_the_others", reason=str(error))
        return LOST


def _follow(link: Link) -> int:
    hello = decode_message(link.receive())
    if not isinstance(hello, Hello):
        raise LinkClosed("no greeting")
    logs.configure(hello.observability)
    keep_freed_memory()
    torch.set_num_threads(hello.threads)
    rank = Rank(hello)
    while not isinstance(message := decode_message(link.receive()), Stop):
        link.send(encode(rank.answer(message)))
    return 0


class Rank:
    """State of one rank: its share of the model, then the worker that computes with it."""

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._checkpoint: Checkpoint | None = None
        self._decoder: Decoder | None = None
        self._slots: AdapterSlots | None = None
        self._worker: Worker | None = None
        self._training: RankTraining | None = None

    def answer(self, message: RankMessage) -> Reply:
        """Carry out a message. Raises `CollectiveFailed`; any other failure is in the answer."""
        try:
            return self._do(message)
        except CollectiveFailed:
            raise
        except Exception as error:
            if self._hello.rank == 0 and not isinstance(message, LoadModel | LoadAdapter):
                log.exception("rank_failed", message=type(message).__name__)
            return Failed(type(error).__name__, str(error))

    def _do(self, message: RankMessage) -> Reply:
        match message:
            case LoadModel():
                return self._load(message)
            case Allocate():
                self._allocate(message)
            case Step():
                return Stepped(self._step(message.plan, message.skipped))
            case Compute():
                return Stepped(self.worker.compute(message.step, message.rows))
            case LoadAdapter():
                self.slots.prepare(message.key, message.directory)
                self.slots.load(message.key)
            case UnloadAdapter():
                self.slots.unload(message.key)
            case StartRun():
                return self.training.start(message)
            case Advance():
                return self.training.run(message.run).advance(message)
            case TakeSnapshot():
                return self.training.run(message.run).snapshot(message.step)
            case CloseRun():
                self.training.close(message.run)
            case _:
                raise TypeError(f"unexpected: {type(message).__name__}")
        return Done()

    def _step(self, plan: StepPlan, skipped: list[int]) -> StepResult:
        self.worker.admit(plan)
        rows = [row for row in plan.rows if row.slot not in skipped]
        return self.worker.compute(plan.step, rows) if rows else StepResult(step=plan.step, slots=[], tokens=[])

    @property
    def decoder(self) -> Decoder:
        assert self._decoder is not None, "loaded first"
        return self._decoder

    @property
    def slots(self) -> AdapterSlots:
        assert self._slots is not None, "loaded first"
        return self._slots

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "allocated first"
        return self._worker

    @property
    def training(self) -> RankTraining:
        assert self._training is not None, "loaded first"
        return self._training

    def _load(self, message: LoadModel) -> ModelLoaded:
        settings = message.model
        checkpoint = open_checkpoint(settings.model, revision=settings.revision, chat_template=settings.chat_template)
        self._checkpoint = checkpoint
        device = make_device(settings.device, local_rank=self._hello.local_rank)
        self._decoder = load_decoder(checkpoint, settings, self._meet(device), device=device)
        self._training = RankTraining(self._decoder)
        base = LoraBase.of(self._decoder, find_model(checkpoint.config), message.name)
        held_in = lora_dtype(message.lora_dtype, message.model)
        self._slots = AdapterSlots(base, self._decoder, max_rank=message.max_lora_rank, dtype=held_in)
        memory = device_memory(device)
        return ModelLoaded(base.fingerprint, memory.free, memory.total)

    def _meet(self, device: torch.device) -> Group:
        hello = self._hello
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return TorchGroup.rendezvous(hello.store, hello.rank, hello.size, device, hello.timeout)

    def _allocate(self, message: Allocate) -> None:
        decoder, dtype = self.decoder, CACHE_DTYPES[message.kv_cache_dtype]
        cache = make_cache(decoder, message.num_blocks, message.block_size, decoder.device, dtype)
        self._worker = Worker(
            self.decoder,
            cache,
            max_running=message.max_running,
            max_len=message.max_len,
            adapters=self.slots,
            grammars=functools.cache(lambda: self._grammars(message.eos_ids)),
        )

    def _grammars(self, eos_ids: tuple[int, ...]) -> GrammarCompiler:
        assert self._checkpoint is not None, "loaded first"
        return GrammarCompiler(self._checkpoint.tokenizer.sized(self.decoder.spec.vocab_size), eos_ids)


def end(code: int) -> NoReturn:
    """End the process without the farewells of the process group, which wait for ranks that may be gone."""
    sys.stderr.flush()
    os._exit(code)
