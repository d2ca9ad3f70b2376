"""Messages between the engine's process and the ranks, encoded with msgspec.

Every message goes to all ranks, and each of them answers it with one `Reply`, in order. Ranks that work answer alike.
"""

import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from safetensors.torch import load, save
from torch import Tensor

from runtime.events import RunEvent
from runtime.messages import Row, StepPlan, StepResult
from runtime.trainer.course import Restored, RunProgress, Snapshot
from runtime.trainer.slices import Slice
from settings.schema import ModelSettings, ObservabilitySettings


class Hello(Struct, frozen=True, kw_only=True, tag=True):
    """The first message: the rank's number, and where the group meets."""

    rank: int
    size: int
    local_rank: int
    """Rank within this node: the index of its GPU."""
    store: str
    """URL where the group meets: `file://…`, or `env://` under torchrun."""
    threads: int
    timeout: float
    """Seconds after which a rank that waits for the others gives up by itself; the engine is to be faster."""
    observability: ObservabilitySettings


class LoadModel(Struct, frozen=True, kw_only=True, tag=True):
    """Read the rank's share of the weights."""

    model: ModelSettings
    name: str
    """Name of the model in the API."""
    max_lora_rank: int
    lora_dtype: str
    """As in the setting `adapters.lora_dtype`."""


class Allocate(Struct, frozen=True, kw_only=True, tag=True):
    """Make the KV cache, and what computes with it."""

    num_blocks: int
    block_size: int
    kv_cache_dtype: str
    """Name of a type, as in the setting `cache.kv_cache_dtype`; never "auto"."""
    max_running: int
    max_len: int
    eos_ids: tuple[int, ...] = ()
    """Ids that end an output, for grammars."""


class Step(Struct, frozen=True, tag=True):
    """Take in a plan and compute its rows."""

    plan: StepPlan
    skipped: list[int] = []
    """Slots whose rows are not to be computed: they miss a token."""


class Compute(Struct, frozen=True, tag=True):
    """Compute these rows of a plan that was taken in."""

    step: int
    rows: list[Row]


class LoadAdapter(Struct, frozen=True, tag=True):
    """Read an adapter version, and serve it from now on."""

    key: str
    directory: str


class UnloadAdapter(Struct, frozen=True, tag=True):
    """Free a version's slot on a rank."""

    key: str


class Tensors(Struct, frozen=True):
    """A snapshot of training (`trainer.snapshot.Snapshot`): its groups as safetensors files."""

    progress: RunProgress
    parameters: bytes
    optimizer: bytes
    best: bytes | None
    reference: bytes


class StartRun(Struct, frozen=True, kw_only=True, tag=True):
    """Begin a training run; or begin it again, where there is one of that number."""

    run: int
    """Number of the run, by which later messages name it."""
    spec: bytes
    """A `trainer.sliced_run.RunSpec`, encoded."""
    feed: bytes
    """A `trainer.feed.Feed`, encoded."""
    restored: Tensors | None


class Advance(Struct, frozen=True, tag=True):
    """Compute `granted` of the slice that the rank has requested."""

    run: int
    granted: int
    pause: bool
    """True to pause at the end of the step."""
    answers: dict[str, float] | None = None
    """Metrics of generated answers, for a run that waits for them."""


class TakeSnapshot(Struct, frozen=True, tag=True):
    """Hand out what was captured at this step. The first rank's answer has it."""

    run: int
    step: int


class CloseRun(Struct, frozen=True, tag=True):
    """Release a run, if it is there."""

    run: int


class Stop(Struct, frozen=True, tag=True):
    """End the process. Not answered."""


RankMessage = (
    Hello
    | LoadModel
    | Allocate
    | Step
    | Compute
    | LoadAdapter
    | UnloadAdapter
    | StartRun
    | Advance
    | TakeSnapshot
    | CloseRun
    | Stop
)


class Done(Struct, frozen=True, tag=True):
    """The message was carried out."""


class ModelLoaded(Struct, frozen=True, tag=True):
    """The weights are there."""

    fingerprint: str
    free_bytes: int
    """Memory for a KV cache, on the rank's device."""
    total_bytes: int | None = None
    """Of a GPU, all of its memory."""


class Stepped(Struct, frozen=True, tag=True):
    """A rank's result of a step."""

    result: StepResult


class Advanced(Struct, frozen=True, kw_only=True, tag=True):
    """Position of a training run after a slice."""

    wanted: Slice | None
    """The next slice; None: the run has ended."""
    paused: bool
    events: list[RunEvent]
    """Events since the last answer."""


class Captured(Struct, frozen=True, tag=True):
    """A rank's answer to a request for a snapshot."""

    snapshot: Tensors | None
    """None on all ranks except the first."""


class Failed(Struct, frozen=True, tag=True):
    """The message raised, and left the rank unchanged. `kind` is the exception's class."""

    kind: str
    message: str


Reply = Done | ModelLoaded | Stepped | Advanced | Captured | Failed

_messages: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

encode = msgspec.msgpack.encode


def decode_message(data: bytes) -> RankMessage:
    """Raises `msgspec.MsgspecError`."""
    return _messages.decode(data)


def decode_reply(data: bytes) -> Any:
    """Raises `msgspec.MsgspecError`."""
    return _replies.decode(data)


# -- snapshots -------------------------------------------------------------------------------------
#
# Snapshots of training as bytes, to go from a rank to the engine's process and back.


def pack(snapshot: Snapshot | Restored) -> Tensors:
    """A snapshot as bytes."""
    return Tensors(
        progress=snapshot.progress,
        parameters=_file(snapshot.parameters),
        optimizer=_file(snapshot.optimizer),
        best=None if snapshot.best is None else _file(snapshot.best),
        reference=_file(snapshot.reference),
    )


def unpack(tensors: Tensors) -> Restored:
    """The snapshot of what `pack` gave."""
    return Restored(
        progress=tensors.progress,
        parameters=load(tensors.parameters),
        optimizer=load(tensors.optimizer),
        best=None if tensors.best is None else load(tensors.best),
        reference=load(tensors.reference),
    )


def _file(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


# -- link ------------------------------------------------------------------------------------------
#
# One end of a stream to another process: whole messages of bytes, each behind its length.

_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20
MOST = 1 << 34
"""Bytes that one message may have: a length beyond is no length."""


class LinkClosed(ConnectionError):
    """The other end is gone."""


class Link:
    """One end of a stream. For one thread at a time."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._stream.setblocking(False)
        if stream.family != socket.AF_UNIX:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes, deadline: float | None = None) -> None:
        """Raises `LinkClosed`, and `TimeoutError` when the other end has not taken it by `deadline` (monotonic)."""
        rest = memoryview(_LENGTH.pack(len(data)) + data)
        while rest:
            try:
                rest = rest[self._stream.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
            except OSError as error:
                raise LinkClosed(str(error)) from None

    def receive(self, deadline: float | None = None, *, most: int = MOST) -> bytes:
        """The next message. Raises `LinkClosed`, also for one of more than `most` bytes, and `TimeoutError` when it is
        not there by `deadline`."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline))
        if length > most:
            raise LinkClosed(f"a message of {length} bytes")
        return self._exactly(length, deadline)

    def close(self) -> None:
        self._stream.close()

    def _exactly(self, count: int, deadline: float | None) -> bytes:
        parts: list[bytes] = []
        while count:
            try:
                part = self._stream.recv(min(count, _CHUNK))
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise LinkClosed(str(error)) from None
            if not part:
                raise LinkClosed("the other end has closed")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._stream, event)
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poll.poll(left) and deadline is not None:
            raise TimeoutError
