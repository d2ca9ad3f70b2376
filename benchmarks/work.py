"""The work that every peer is given, and what came of it."""

import gc
import random
import statistics
from collections.abc import Callable
from typing import Any, Literal, Protocol

from msgspec import Struct

from runtime.checkpoints import open_checkpoint
from runtime.cli.load_prompts import WORDS
from runtime.messages import SamplingParams

Encode = Callable[[str], list[int]]
Unit = Literal["output tok/s", "prompt tok/s", "s to first token"]


class Job(Struct, frozen=True):
    """Prompts as token ids, and how many tokens to generate for each, greedily and past any end token."""

    prompts: list[list[int]]
    output_len: int


class Outcome(Struct, frozen=True):
    """What a peer made of a job."""

    seconds: float
    tokens: list[list[int]]
    """What was generated for each prompt."""

    @property
    def output_rate(self) -> float:
        """Generated tokens a second."""
        return sum(map(len, self.tokens)) / self.seconds


class Peer(Protocol):
    """Something that generates."""

    def run(self, job: Job) -> Outcome: ...


class Measurement(Struct, kw_only=True):
    """One number about one peer, measured several times."""

    peer: str
    unit: Unit
    values: list[float] = []
    note: str = ""
    ttft: list[float] = []
    """Median seconds to the first token, for each of `values`, where the tokens were timed."""
    tpot: list[float] = []
    """Median seconds for each token after the first, likewise."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def times_better(self, base: "Measurement") -> float:
        """How often `base` fits into this: above 1 is faster, for rates and for times."""
        ratio = self.median / base.median
        return 1 / ratio if self.unit == "s to first token" else ratio


class Prompts:
    """Random prompts of exact length. Every call gives other ones, so that nobody has them cached."""

    def __init__(self, encode: Encode, seed: int) -> None:
        self._ids = sorted({token for word in WORDS for token in encode(" " + word)})
        self._rng = random.Random(seed)

    def ids(self, length: int) -> list[int]:
        return self._rng.choices(self._ids, k=length)

    def job(self, count: int, length: int, output_len: int) -> Job:
        return Job([self.ids(length) for _ in range(count)], output_len)


def greedy(output_len: int) -> SamplingParams:
    """Sampling of `output_len` tokens, the likeliest each time and past any end token."""
    return SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)


def load_transformers(model: str) -> Any:
    """transformers' Llama with the weights that Eft reads. Raises `ValueError` where they do not fit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(model)
    untyped: Any = LlamaForCausalLM
    peer = untyped(LlamaConfig(**checkpoint.config)).float().eval()
    missing, unexpected = peer.load_state_dict(dict(checkpoint.tensors()), strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise ValueError(f"{model} is no Llama checkpoint: missing {missing}, unexpected {unexpected}")
    peer.tie_weights()
    gc.collect()
    return peer
