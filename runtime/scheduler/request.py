"""One sequence from submission to its end, and the transitions that it may make."""

from enum import Enum

from runtime.blocks import BlockTable, KeyChain
from runtime.messages import FinishReason, RequestTiming, SamplingParams, Submission
from runtime.scheduler.drafts import Drafter


class State(Enum):
    """Where a request is. Order means nothing; `TRANSITIONS` says what may follow what."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again: its blocks went to somebody else, its tokens are kept and will be recomputed."""
    FINISHED = "finished"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.FINISHED}),
    State.RUNNING: frozenset({State.PREEMPTED, State.FINISHED}),
    State.PREEMPTED: frozenset({State.RUNNING, State.FINISHED}),
    State.FINISHED: frozenset(),
}

ENDS: dict[State, frozenset[FinishReason]] = {
    State.WAITING: frozenset({"abort", "timeout", "error"}),
    State.RUNNING: frozenset({"stop", "length", "abort", "timeout", "error"}),
    State.PREEMPTED: frozenset({"abort", "timeout", "error"}),
    State.FINISHED: frozenset(),
}
"""How a request may end in each state: only one that runs can come to an end of its own."""


class Request:
    """What the scheduler knows of a sequence. Written by the scheduler alone.

    One quantity drives everything: `num_computed` chases `length`. Prefill, a chunk of it, decode and the
    recomputation after a preemption differ only in how far apart the two are. Both run ahead of what is known
    while a step is in flight: `num_written` and `tokens` follow when its result is there.
    """

    __slots__ = (
        "answered",
        "chain",
        "cumulative_logprob",
        "drafter",
        "finish_reason",
        "id",
        "kept",
        "max_len",
        "num_computed",
        "num_kept",
        "num_pending",
        "num_sent_blocks",
        "num_shared",
        "num_told",
        "num_written",
        "order",
        "seed",
        "slot",
        "source",
        "state",
        "stop_ids",
        "stop_reason",
        "submission",
        "table",
        "timing",
        "tokens",
    )

    def __init__(self, submission: Submission, *, seed: int, max_len: int, eos_ids: tuple[int, ...] = ()) -> None:
        """`max_len` is the length at which the sequence is finished: prompt and generated tokens.
        `eos_ids` are the model's; with `ignore_eos` they end nothing."""
        self.id = submission.request_id
        self.submission = submission
        self.seed = seed
        self.max_len = max_len
        self.tokens = list(submission.prompt_ids)
        self.num_computed = 0
        """Tokens whose KV is computed, or is being computed by a step in flight."""
        self.num_written = 0
        """Those of them whose step is done: their KV can be shared."""
        self.num_pending = 0
        """Tokens that a step in flight samples."""
        params = submission.params
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self.order = 0
        """Rank of its arrival, given by the scheduler: breaks ties. The beams of a search have the same."""
        self.table: BlockTable | None = None
        self.chain: KeyChain | None = None
        """Keys of its blocks, kept while it waits: a prompt is hashed once, not once a step."""
        self.num_sent_blocks = 0
        """Blocks of the table that the worker has been told of."""
        self.slot: int | None = None
        self.num_told = 0
        """Tokens that the worker has been told of; it knows those that it samples anyway."""
        self.source: Request | None = None
        """Whose first `num_shared` tokens it has too, so that it can share their blocks when it first comes in."""
        self.num_shared = self.prompt_len - 1  # the last prompt token's logits are its own to sample from
        self.kept: list[int] | None = None
        """Blocks in host memory that hold the KV of its first `num_kept` tokens while it is preempted."""
        self.num_kept = 0
        self.answered = False
        """A beam that has told its candidates, and waits to be told how it goes on."""
        self.drafter: Drafter | None = None
        self.cumulative_logprob = 0.0
        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.timing = RequestTiming(
            arrival=submission.arrival,
            adapter=submission.adapter,
            prompt_tokens=len(submission.prompt_ids),
            max_tokens=max_len - len(submission.prompt_ids),
            deadline=submission.deadline,
        )

    @property
    def params(self) -> SamplingParams:
        return self.submission.params

    @property
    def prompt_len(self) -> int:
        return len(self.submission.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def candidates(self) -> int:
        """Of a beam, how many of the likeliest next tokens its search looks at; 0 of one that samples."""
        beams = self.submission.beams
        return 0 if beams is None else beams.width * max(2, 1 + len(self.stop_ids))

    @property
    def is_branch(self) -> bool:
        """Did it split off from another one, behind the prompt?"""
        return self.num_shared >= self.prompt_len

    @property
    def length(self) -> int:
        """Tokens that are known, or will be when the steps in flight are done."""
        return len(self.tokens) + self.num_pending

    @property
    def num_wanted(self) -> int:
        """Tokens whose KV is still to be computed; none of one that gets its last token from a step in flight."""
        if self.num_pending and self.length >= self.max_len:
            return 0
        return self.length - self.num_computed

    @property
    def suppressed_ids(self) -> list[int]:
        """Token ids that must not be sampled before `min_tokens`."""
        return sorted(self.stop_ids) if self.params.min_tokens else []

    @property
    def finished(self) -> bool:
        return self.state is State.FINISHED

    def cut(self, num_tokens: int) -> None:
        """Take back the last `num_tokens`: they were sampled together with the one that ends the output."""
        if num_tokens:
            del self.tokens[-num_tokens:]

    def forget_progress(self) -> None:
        """Its blocks are gone. What steps in flight still compute for it is dropped, and will be computed again."""
        self.num_computed = self.num_written = self.num_pending = 0

    def move(self, state: State) -> None:
        """Change state. A transition that the table does not have is a bug in the scheduler."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id} cannot go from {self.state.value} to {state.value}")
        self.state = state

    def fail(self) -> None:
        """It had ended well, but what was to be done at its end has raised."""
        self.finish_reason = self.timing.finish_reason = "error"

    def end(self, reason: FinishReason, stop_reason: str | int | None, now: float) -> None:
        """Move to the end. `ENDS` says which ends there are from where."""
        if reason not in ENDS[self.state]:
            raise RuntimeError(f"request {self.id} is {self.state.value} and cannot end with {reason}")
        self.move(State.FINISHED)
        self.finish_reason = self.timing.finish_reason = reason
        self.stop_reason = stop_reason
        self.timing.generated_tokens = self.num_generated
        self.timing.finished = now
