"""One rank: does what the engine's messages say, one after the other, until its link closes."""

import os
import sys
from typing import NoReturn

import psutil
import torch

from runtime import logs
from runtime.assembly import CACHE_DTYPES, make_cache
from runtime.messages import StepPlan, StepResult
from runtime.model_loading import load_decoder
from runtime.ranks.collectives import CollectiveFailed, TorchGroup
from runtime.ranks.link import Link, LinkClosed
from runtime.ranks.messages import (
    Advance,
    Allocate,
    CloseRun,
    Compute,
    Done,
    Failed,
    Hello,
    Load,
    LoadAdapter,
    Loaded,
    Message,
    Reply,
    StartRun,
    Step,
    Stepped,
    Stop,
    TakeSnapshot,
    UnloadAdapter,
    decode_message,
    encode,
)
from runtime.ranks.rank_training import RankTraining
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.decoder import Decoder
from runtime.workers.device import make_device
from runtime.workers.group import Group
from runtime.workers.loading import open_checkpoint
from runtime.workers.lora_base import LoraBase
from runtime.workers.memory import keep_freed_memory
from runtime.workers.models import find_model
from runtime.workers.worker import Worker

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
    """What one rank holds: its share of the model, then the worker that computes with it."""

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._decoder: Decoder | None = None
        self._slots: AdapterSlots | None = None
        self._worker: Worker | None = None
        self._training: RankTraining | None = None

    def answer(self, message: Message) -> Reply:
        """Do what a message says. Raises `CollectiveFailed`; what else goes wrong is in the answer."""
        try:
            return self._do(message)
        except CollectiveFailed:
            raise
        except Exception as error:
            if self._hello.rank == 0 and not isinstance(message, Load | LoadAdapter):
                log.exception("rank_failed", message=type(message).__name__)
            return Failed(type(error).__name__, str(error))

    def _do(self, message: Message) -> Reply:
        match message:
            case Load():
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
                return self.training.advance(message)
            case TakeSnapshot():
                return self.training.snapshot(message.step)
            case CloseRun():
                self.training.close()
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

    def _load(self, message: Load) -> Loaded:
        settings = message.model
        checkpoint = open_checkpoint(settings.model, revision=settings.revision, chat_template=settings.chat_template)
        device = make_device(settings.device, local_rank=self._hello.local_rank)
        self._decoder = load_decoder(checkpoint, settings, self._meet(device), device=device)
        self._training = RankTraining(self._decoder)
        base = LoraBase.of(self._decoder, find_model(checkpoint.config), message.name)
        self._slots = AdapterSlots(base, self._decoder, max_rank=message.max_lora_rank)
        free = int(psutil.virtual_memory().available)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
        return Loaded(base.fingerprint, free)

    def _meet(self, device: torch.device) -> Group:
        hello = self._hello
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return TorchGroup.meet(hello.store, hello.rank, hello.size, device, hello.timeout)

    def _allocate(self, message: Allocate) -> None:
        decoder, dtype = self.decoder, CACHE_DTYPES[message.kv_cache_dtype]
        cache = make_cache(decoder, message.num_blocks, message.block_size, decoder.device, dtype)
        self._worker = Worker(
            self.decoder, cache, max_running=message.max_running, max_len=message.max_len, adapters=self.slots
        )


def end(code: int) -> NoReturn:
    """End the process without the farewells of the process group, which wait for ranks that may be gone."""
    sys.stderr.flush()
    os._exit(code)
