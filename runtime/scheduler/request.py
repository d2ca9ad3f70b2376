"""One sequence from submission to its end, and the transitions that it may make."""

from enum import Enum

from runtime.blocks import BlockTable, KeyChain
from runtime.messages import FinishReason, RequestTiming, SamplingParams, Submission, TokenLogprob
from runtime.scheduler.drafts import Drafter


class RequestState(Enum):
    """State of a request. The order has no meaning; `TRANSITIONS` lists the states that may follow each."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Waiting again: its blocks were given to another request, its tokens are kept and will be recomputed."""
    FINISHED = "finished"


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.PREEMPTED, RequestState.FINISHED}),
    RequestState.PREEMPTED: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}

ENDS: dict[RequestState, frozenset[FinishReason]] = {
    RequestState.WAITING: frozenset({"abort", "timeout", "error"}),
    RequestState.RUNNING: frozenset({"stop", "length", "abort", "timeout", "error"}),
    RequestState.PREEMPTED: frozenset({"abort", "timeout", "error"}),
    RequestState.FINISHED: frozenset(),
}
"""Ends that a request may have in each state: only a running one can come to an end of its own."""


class Request:
    """State of a sequence in the scheduler. Written by the scheduler alone.

    One quantity drives everything: `num_computed` chases `length`. Prefill, a chunk of it, decode and the
    recomputation after a preemption differ only in how far apart the two are. Both run ahead of the results while a
    step is in flight: `num_written` and `tokens` follow when its result is there.
    """

    __slots__ = (
        "awaiting_expansion",
        "bad_word_ids",
        "chain",
        "cumulative_logprob",
        "drafter",
        "finish_reason",
        "id",
        "max_len",
        "num_computed",
        "num_pending",
        "num_saved",
        "num_sent_blocks",
        "num_sent_tokens",
        "num_shared",
        "num_written",
        "order",
        "prompt_logprobs",
        "saved_blocks",
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

    def __init__(
        self,
        submission: Submission,
        *,
        seed: int,
        max_len: int,
        eos_ids: tuple[int, ...] = (),
        bad_word_ids: list[list[int]] | None = None,
    ) -> None:
        """`max_len` is the length at which the sequence is finished: prompt and generated tokens.
        `eos_ids` are the model's; with `ignore_eos` they end nothing. `bad_word_ids`: tokens of `params.bad_words`."""
        self.id = submission.id
        self.submission = submission
        self.seed = seed
        self.max_len = max_len
        self.tokens = submission.prompt_ids
        """Token ids so far. While it waits for its first tokens, the prompt itself: the choices of a request share
        it."""
        self.num_computed = 0
        """Tokens whose KV is computed, or is being computed by a step in flight."""
        self.num_written = 0
        """Tokens of `num_computed` whose step is done: their KV can be shared."""
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
        """Number of blocks of the table that were sent to the worker."""
        self.slot: int | None = None
        self.num_sent_tokens = 0
        """Number of tokens that were sent to the worker. It has the tokens that it samples without that."""
        self.source: Request | None = None
        """Request with the same first `num_shared` tokens, whose blocks it can share when it is first admitted."""
        self.num_shared = self.prompt_len - 1  # the last prompt token's logits are its own to sample from
        self.saved_blocks: list[int] | None = None
        """Blocks in host memory that hold the KV of its first `num_saved` tokens while it is preempted."""
        self.num_saved = 0
        self.awaiting_expansion = False
        """True for a beam that has given its candidates and waits for its next token."""
        self.drafter: Drafter | None = None
        self.cumulative_logprob = 0.0
        self.bad_word_ids = bad_word_ids or []
        self.prompt_logprobs: list[TokenLogprob] = []
        """Those of the prompt's tokens after the first, as far as they were computed, where they are asked for."""
        self.state = RequestState.WAITING
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
        """Number of the likeliest next tokens that a beam's search looks at; 0 for a request that samples."""
        beams = self.submission.beams
        return 0 if beams is None else beams.width * max(2, 1 + len(self.stop_ids))

    @property
    def num_logprobs(self) -> int | None:
        """Number of the likeliest tokens that are reported with each new one; None: not even its own."""
        if self.params.logprobs is None:
            return 0 if self.submission.scored else None
        return self.params.logprobs

    @property
    def scores_prompt(self) -> bool:
        """True while log-probabilities of the prompt are due."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len - 1

    @property
    def needs_every_token(self) -> bool:
        """True if each token of its prompt must be computed for it, so that no cached KV can replace one: their
        log-probabilities are due, or their hidden states are pooled."""
        return self.scores_prompt or self.submission.pooling == "mean"

    @property
    def may_be_forced(self) -> bool:
        """True if tokens that its grammar forces need no step of their own. Those with log-probabilities need it."""
        return bool(self.submission.grammar) and self.num_logprobs is None

    @property
    def is_branch(self) -> bool:
        """True if it split off from another request behind the prompt."""
        return self.num_shared >= self.prompt_len

    @property
    def length(self) -> int:
        """Number of tokens, including the ones that steps in flight sample."""
        return len(self.tokens) + self.num_pending

    @property
    def num_wanted(self) -> int:
        """Tokens whose KV is still to be computed; 0 if a step in flight gives it its last token."""
        length = len(self.tokens) + self.num_pending
        return 0 if self.num_pending and length >= self.max_len else length - self.num_computed

    @property
    def suppressed_ids(self) -> list[int]:
        """Token ids that must not be sampled before `min_tokens`."""
        return sorted(self.stop_ids) if self.params.min_tokens else []

    @property
    def finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def cut(self, num_tokens: int) -> None:
        """Take back the last `num_tokens`: they were sampled together with the one that ends the output."""
        if num_tokens:
            del self.tokens[-num_tokens:]

    def forget_progress(self) -> None:
        """Its blocks are gone. What steps in flight still compute for it is dropped, and will be computed again."""
        self.num_computed = self.num_written = self.num_pending = 0

    def move(self, state: RequestState) -> None:
        """Change state. A transition that is not in the table is a bug in the scheduler."""
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id} cannot go from {self.state.value} to {state.value}")
        if state is RequestState.RUNNING and self.tokens is self.submission.prompt_ids:
            self.tokens = list(self.tokens)
        self.state = state

    def fail(self) -> None:
        """End with an error in any state, after the handling of its end has raised."""
        self.state = RequestState.FINISHED
        self.finish_reason = self.timing.finish_reason = "error"

    def end(self, reason: FinishReason, stop_reason: str | int | None, now: float) -> None:
        """Move to the end. `ENDS` lists the ends that each state allows."""
        if reason not in ENDS[self.state]:
            raise RuntimeError(f"request {self.id} is {self.state.value} and cannot end with {reason}")
        self.move(RequestState.FINISHED)
        self.finish_reason = self.timing.finish_reason = reason
        self.stop_reason = stop_reason
        self.timing.generated_tokens = self.num_generated
        self.timing.finished = now
