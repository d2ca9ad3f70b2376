"""One rank: weights, cache, and what it remembers of every running sequence. It plans nothing."""

import numpy as np
import torch
from torch import Tensor

from runtime.failpoints import failpoint
from runtime.messages import Row, StepPlan, StepResult
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.attention import PagedAttention
from runtime.workers.batch import Batch, build_batch
from runtime.workers.cuda_graphs import DecodeGraphs, unsuited
from runtime.workers.decoder import Decoder
from runtime.workers.kv_cache import KVCache
from runtime.workers.model import Model
from runtime.workers.moves import execute_moves
from runtime.workers.sampler import Sampler
from runtime.workers.verify import proved_right


class Worker:
    """Executes step plans. Tokens and block tables live here per slot; a plan carries only what changed."""

    def __init__(
        self,
        decoder: Model,
        cache: KVCache,
        *,
        max_running: int,
        max_len: int,
        host: KVCache | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        """`host`: a pool in host memory for the KV of sequences that are preempted."""
        self._decoder = decoder
        self._cache = cache
        self._host = host
        self._graphs: DecodeGraphs | None = None
        if isinstance(decoder, Decoder) and unsuited(decoder) is None:
            self._graphs = DecodeGraphs(decoder, cache, max_len=max_len)
        self._sampler = Sampler(decoder.ops, decoder.vocabulary)
        self.adapters = adapters
        """None: this worker serves the base alone."""
        self._tokens: dict[int, list[int]] = {}
        self._adapted: dict[int, str] = {}
        """The adapter of each slot that is not for the base."""
        self._tables = np.zeros((max_running, -(-max_len // cache.block_size)), dtype=np.int64)
        self._num_blocks = [0] * max_running

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows. Executing the same plan's rows again is harmless: it writes the same KV."""
        self.admit(plan)
        return self.compute(plan.step, plan.rows)

    def admit(self, plan: StepPlan) -> None:
        """Take in the plan's new sequences and blocks, without computing anything. Not to be done twice."""
        execute_moves(plan.moves, self._cache, self._host)
        for admission in plan.admitted:
            self._tokens[admission.slot] = list(admission.token_ids)
            self._num_blocks[admission.slot] = 0
            self._append_blocks(admission.slot, admission.block_ids)
            self._sampler.admit(admission)
            self._adapted.pop(admission.slot, None)
            if admission.adapter:
                self._adapted[admission.slot] = admission.adapter
        for row in plan.rows:
            self._append_blocks(row.slot, row.new_blocks)

    def compute(self, step: int, rows: list[Row]) -> StepResult:
        """Run the decoder over rows whose sequences are known, and sample where a token is due."""
        for row in rows:
            failpoint("worker.row", row.slot)
            if ends_with := row.draft or row.told:
                self._tokens[row.slot][row.start + row.count - len(ends_with) :] = ends_with
        cache = self._cache
        with torch.inference_mode():
            batch = build_batch(rows, self._tokens, self._tables, cache.block_size, self._decoder.device, self._adapted)
            hidden = self._hidden(batch)
            if not batch.slots:
                return StepResult(step=step, slots=[], tokens=[])
            tokens, broken, scores, candidates = self._sample(hidden, batch)
        kept = proved_right(batch.slots, tokens, {row.slot: row.draft for row in rows if row.draft})
        kept = [index for index in kept if batch.slots[index] not in candidates]
        logprobs: dict[int, float] = {}
        for index in kept:
            slot = batch.slots[index]
            self._tokens[slot][batch.lengths[index] :] = [tokens[index]]
            if index in scores:
                logprobs[slot] = logprobs.get(slot, 0.0) + scores[index]
        failed = {}
        for index in broken:
            slot = batch.slots[index]
            cache.clear_broken(self._tables[slot, : self._num_blocks[slot]].tolist())
            failed[slot] = "The model's output was not a finite number."
        return StepResult(
            step=step,
            slots=[batch.slots[index] for index in kept],
            tokens=[tokens[index] for index in kept],
            failed=failed,
            logprobs=logprobs,
            candidates=candidates,
        )

    def _hidden(self, batch: Batch) -> Tensor:
        """[len(batch.slots), hidden] after the last layer: of the tokens after which one is sampled."""
        wanted = batch.sample_at if len(batch.slots) < len(batch.token_ids) else None
        if self._graphs is not None and self._graphs.takes(batch):
            hidden = self._graphs.forward(batch)
            return hidden if wanted is None else hidden[wanted]
        decoder = self._decoder
        attention = PagedAttention(decoder.ops, self._cache, batch.paged, decoder.spec)
        adaptation = self.adapters.adaptation(batch.adapters) if self.adapters else None
        return decoder.forward(batch.token_ids, batch.positions, attention, adaptation, wanted=wanted)

    def _sample(
        self, hidden: Tensor, batch: Batch
    ) -> tuple[list[int], list[int], dict[int, float], dict[int, list[tuple[int, float]]]]:
        """Tokens, indices of rows that are no numbers, log-probabilities by index of those that want them, and
        candidates by slot."""
        logits, vocabulary = self._decoder.own_logits(hidden), self._decoder.vocabulary
        if (found := self._sampler.likeliest(logits, batch.slots, batch.lengths)) is not None:
            return *found, {}, {}
        logits = vocabulary.join(logits)
        candidates = self._sampler.candidates(logits, batch.slots, batch.lengths)
        tokens, broken = self._sampler(logits, batch.slots, batch.lengths)
        tokens = vocabulary.agree(tokens, logits.device)
        return tokens, broken, self._sampler.logprobs(logits, batch.slots, tokens), candidates

    def _append_blocks(self, slot: int, blocks: list[int]) -> None:
        start = self._num_blocks[slot]
        self._tables[slot, start : start + len(blocks)] = blocks
        self._num_blocks[slot] = start + len(blocks)
