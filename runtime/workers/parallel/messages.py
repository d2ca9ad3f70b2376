"""What the engine's process and the ranks say to each other, encoded with msgspec.

Every message goes to all ranks, and each of them answers it with one `Reply`, in order. Ranks that work answer alike.
"""

from typing import Any

import msgspec
from msgspec import Struct

from runtime.messages import Row, StepPlan, StepResult
from runtime.trainer.events import RunEvent
from runtime.trainer.slices import Slice
from runtime.trainer.snapshot import Progress
from settings.schema import ModelSettings, ObservabilitySettings


class Hello(Struct, frozen=True, kw_only=True, tag=True):
    """The first message: who you are, and where you meet the others."""

    rank: int
    size: int
    local_rank: int
    """Among the ranks of this node: which GPU is yours."""
    store: str
    """Where the group meets: `file://…`, or `env://` under torchrun."""
    threads: int
    timeout: float
    """Seconds after which a rank that waits for the others gives up by itself; the engine is to be faster."""
    observability: ObservabilitySettings


class Load(Struct, frozen=True, kw_only=True, tag=True):
    """Read your share of the weights."""

    model: ModelSettings
    name: str
    """What the model is called in the API."""
    max_lora_rank: int


class Allocate(Struct, frozen=True, kw_only=True, tag=True):
    """Make the KV cache."""

    num_blocks: int
    block_size: int
    kv_cache_dtype: str
    """As in the settings, but for "auto"."""
    max_running: int
    max_len: int


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
    key: str


class Tensors(Struct, frozen=True):
    """A snapshot of training (`trainer.snapshot.Snapshot`): its groups as safetensors files."""

    progress: Progress
    parameters: bytes
    optimizer: bytes
    best: bytes | None


class StartRun(Struct, frozen=True, kw_only=True, tag=True):
    """Begin to train. One run at a time."""

    spec: bytes
    """A `trainer.spec.RunSpec`, encoded."""
    feed: bytes
    """A `trainer.feed.Feed`, encoded."""
    restored: Tensors | None


class Advance(Struct, frozen=True, tag=True):
    """Do so much of the slice that you asked for."""

    granted: int
    pause: bool
    """Whether to stand still at the end of the step."""


class TakeSnapshot(Struct, frozen=True, tag=True):
    """Hand out what was captured at this step. The first rank's answer has it."""

    step: int


class CloseRun(Struct, frozen=True, tag=True):
    """Let the run go, if there is one."""


class Stop(Struct, frozen=True, tag=True):
    """End the process. Not answered."""


Message = (
    Hello
    | Load
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
    """It was done."""


class Loaded(Struct, frozen=True, tag=True):
    """The weights are there."""

    fingerprint: str
    free_bytes: int
    """Memory for a KV cache, on the rank's device."""


class Stepped(Struct, frozen=True, tag=True):
    result: StepResult


class Advanced(Struct, frozen=True, kw_only=True, tag=True):
    """Where a training run is now."""

    wanted: Slice | None
    """The next slice; None: the run has ended."""
    paused: bool
    events: list[RunEvent]
    """What happened since the last answer."""


class Captured(Struct, frozen=True, tag=True):
    snapshot: Tensors | None
    """None on all ranks but the first."""


class Failed(Struct, frozen=True, tag=True):
    """It raised, and left the rank as it was. `kind` is the exception's class."""

    kind: str
    message: str


Reply = Done | Loaded | Stepped | Advanced | Captured | Failed

_messages: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

encode = msgspec.msgpack.encode


def decode_message(data: bytes) -> Message:
    """Raises `msgspec.MsgspecError`."""
    return _messages.decode(data)


def decode_reply(data: bytes) -> Any:
    """Raises `msgspec.MsgspecError`."""
    return _replies.decode(data)
