"""One rank: weights, cache, and the state of every running sequence. It plans nothing."""

import contextlib
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from kernels import RidingTokens
from runtime.messages import Admission, RidingRow, Row, StepPlan, StepResult, TokenLogprob
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.decoder import Decoder
from runtime.model.model import Model
from runtime.support.failpoints import failpoint
from runtime.text.grammar import GrammarCompiler
from runtime.trainer.riding import Ride
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.batch import FlatBatch, build_batch, execute_moves
from runtime.workers.cuda_graphs import DecodeGraphs, Recorder, unsuited
from runtime.workers.grammar_masks import GrammarMasks, Masks
from runtime.workers.pooler import Pooler
from runtime.workers.recorded_sampling import STATUS, RecordedSampling
from runtime.workers.recorded_steps import LaunchedStep, RecordedSteps, Sequences
from runtime.workers.sampler import NOT_FINITE, Sampled, Sampler, accept_drafts, token_logprobs
from runtime.workers.transfers import Transfers

SCORED_AT_ONCE = 64
"""Tokens of prompts whose logits are in memory together."""


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt whose log-probability is due."""

    slot: int
    index: int
    """Index in the batch of the token before it."""
    token: int
    count: int
    """Number of the likeliest tokens that are reported beside it."""


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
        grammars: Callable[[], GrammarCompiler] | None = None,
    ) -> None:
        """`host`: a pool in host memory for the KV of sequences that are preempted. `grammars` gives the compiler of
        the model's tokenizer; without it no sequence may have a grammar."""
        self._decoder = decoder
        self._cache = cache
        self._host = host
        self._sampler = Sampler(decoder.ops, decoder.vocabulary)
        self._special: set[int] = set()
        """Slots whose sequence is pooled or has a grammar; the others cost nothing for it."""
        self._pooler = Pooler()
        self._grammars = None if grammars is None else GrammarMasks(grammars, decoder.spec.vocab_size, decoder.device)
        self._ride: Callable[[], Ride | None] = lambda: None
        """What the riding tokens are of. Its memory goes with its run."""
        self.adapters = adapters
        """None: this worker serves the base alone."""
        self._tokens: dict[int, list[int]] = {}
        self._adapted: dict[int, str] = {}
        """The adapter of each slot that is not for the base."""
        self._scored: dict[int, Admission] = {}
        """Slots whose prompts' log-probabilities are asked for."""
        self._tables = np.zeros((max_running + 1, -(-max_len // cache.block_size)), dtype=np.int64)
        """By slot; the last one is of riding tokens."""
        self._num_blocks = [0] * max_running
        self.recorded: RecordedSteps | None = None
        """Steps that run as recorded, as CUDA graphs do; None: all are computed launch by launch."""
        self._launched: list[LaunchedStep] = []
        self.unrecorded = (
            unsuited(decoder) if isinstance(decoder, Decoder) else "transformers' modules compute the model"
        )
        """Reason why no step runs as recorded; None where some do."""
        if self.unrecorded is None:
            self.record_steps(Transfers(decoder.device))

    def record_steps(self, copies: Transfers, record: Recorder | None = None) -> None:
        """Run steps of one token a row as recorded by `record`, by default as CUDA graphs. Called before there are
        sequences."""
        decoder, max_running = self._decoder, len(self._tables) - 1
        assert isinstance(decoder, Decoder)
        table = None if self.adapters is None else self.adapters.make_table()
        vocab_size, max_len = decoder.spec.vocab_size, self._tables.shape[1] * self._cache.block_size
        sampling = RecordedSampling(
            decoder.ops, self._sampler, vocab_size, max_running=max_running, device=decoder.device, copies=copies
        )
        graphs = DecodeGraphs(
            decoder,
            self._cache,
            sampling,
            table,
            max_running=max_running,
            max_len=max_len,
            copies=copies,
            record=record,
        )
        sequences = Sequences(self._tokens, self._tables, self._num_blocks, self._adapted, self._pooler, vocab_size)
        self.recorded = RecordedSteps(
            graphs, sampling, table, self._grammars, sequences, block_size=self._cache.block_size, copies=copies
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute the plan's rows. Executing the same plan's rows again is harmless: it writes the same KV."""
        self.admit(plan)
        return self.compute(plan.step, plan.rows, plan.riding)

    def admit(self, plan: StepPlan) -> None:
        """Take in the plan's new sequences and blocks, without computing anything. Not to be done twice."""
        if plan.admitted or plan.moves:
            self.settle()
        execute_moves(plan.moves, self._cache, self._host)
        for admission in plan.admitted:
            self._tokens[admission.slot] = list(admission.token_ids)
            self._num_blocks[admission.slot] = 0
            self._append_blocks(admission.slot, admission.block_ids)
            self._sampler.admit(admission)
            self._scored.pop(admission.slot, None)
            if admission.prompt_logprobs is not None:
                self._scored[admission.slot] = admission
            special = admission.pooling is not None or bool(admission.grammar)
            if special or admission.slot in self._special:
                self._admit_special(admission)
                (self._special.add if special else self._special.discard)(admission.slot)
            if self.recorded is not None:
                self.recorded.admit(admission)
            self._adapted.pop(admission.slot, None)
            if admission.adapter:
                self._adapted[admission.slot] = admission.adapter
        for row in plan.rows:
            self._append_blocks(row.slot, row.new_blocks)

    def _admit_special(self, admission: Admission) -> None:
        self._pooler.admit(admission)
        if self._grammars is not None:
            self._grammars.admit(admission)

    @property
    def kept_widths(self) -> tuple[int, int, int, int] | None:
        """See `Decoder.kept_widths`; None too where the cache rounds what it holds."""
        decoder, keys = self._decoder, self._cache.layers[0][0]
        if not isinstance(decoder, Decoder) or decoder.group.size > 1 or {keys.dtype, decoder.dtype} != {torch.float32}:
            return None
        return decoder.kept_widths

    def offer(self, ride: Ride) -> None:
        """Set what the riding tokens of the next plans are of."""
        self._ride = weakref.ref(ride)

    def compute(self, step: int, rows: list[Row], riding: RidingRow | None = None) -> StepResult:
        """Run the decoder over rows of admitted sequences, and sample where a token is due. `riding` tokens are left
        out where the batch does not take them."""
        launched = self.launch(step, rows, riding)
        self.settle()
        return launched.finish() if isinstance(launched, LaunchedStep) else launched

    def launch(self, step: int, rows: list[Row], riding: RidingRow | None = None) -> StepResult | LaunchedStep:
        """As `compute`, but a step that runs as recorded is only launched. Its tokens need not be read before the next
        call: what depends on them waits for them here."""
        if self.recorded is None:
            return self._compute(step, rows, riding)
        reason = "tokens of training ride" if riding is not None else self.recorded.refusal(rows)
        reason = reason or self.recorded.sampling_refusal(rows)
        if reason is not None or not self.recorded.follows(rows):
            self.settle()
        if reason is not None:
            self.recorded.refused[reason] += 1
            return self._compute(step, rows, riding)
        self._begin_rows(rows)
        with torch.inference_mode():
            launched = self.recorded.launch(step, rows, self._book)
        self._launched.append(launched)
        return launched

    def settle(self) -> None:
        """Wait for the tokens of what was launched. The error of a step is left to what collects that step."""
        for launched in self._launched[:]:
            with contextlib.suppress(Exception):
                launched.finish()

    def _book(self, launched: LaunchedStep) -> StepResult:
        """Take in the tokens of a step that was launched."""
        assert self.recorded is not None
        self._launched.remove(launched)
        rows, (tokens, status) = launched.rows, launched.wait()[:, : len(launched.rows)].tolist()
        failed: dict[int, str] = {}
        for row, token, number in zip(rows, tokens, status, strict=True):
            self._tokens[row.slot][row.start + 1 :] = [token]
            if number:
                failed[row.slot] = STATUS[number]
                if STATUS[number] is NOT_FINITE:
                    self._clear_broken(row.slot)
        failed |= launched.failed
        self.recorded.book_tokens(launched, tokens)
        forced = self._forced(rows, failed)
        slots = [row.slot for row in rows]
        return StepResult(step=launched.step, slots=slots, tokens=tokens, failed=failed, forced=forced)

    def _begin_rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            failpoint("worker.row", row.slot)
            if ends_with := row.draft or row.new_token_ids:
                self._tokens[row.slot][row.start + row.count - len(ends_with) :] = ends_with

    def _compute(self, step: int, rows: list[Row], riding: RidingRow | None = None) -> StepResult:
        """As `compute`, launch by launch."""
        self._begin_rows(rows)
        cache = self._cache
        with torch.inference_mode():
            if riding is not None and not self._takes_riding(rows, riding):
                riding = None
            batch = build_batch(
                rows if riding is None else [*rows, self._row_of(riding)],
                self._tokens,
                self._tables,
                cache.block_size,
                self._decoder.device,
                self._adapted,
                vocab_size=self._decoder.spec.vocab_size,
                extended=self._extended(rows),
                pooled=self._pooler if self._special else (),
            )
            due = self._due_in_prompts(batch)
            masking = None
            if self._grammars is not None and self._special:
                masking = self._grammars.begin(rows, self._tokens, batch.slots)
            try:
                everything = self._forward(batch, None) if batch.pooled else None
                if riding is None:
                    hidden, of_prompts = self._hidden(batch, due, everything)
                else:
                    hidden = self._ridden(batch, riding)
                    of_prompts = hidden[:0]
                prompt_logprobs = self._score_prompts(of_prompts, due)
            finally:  # it reads what the caller may change
                masks = None if masking is None else masking.result()
            result = self._sampled(step, hidden, prompt_logprobs, batch, rows, masks)
            if riding is not None:
                return replace(result, ridden=True)
            return result if everything is None else self._with_pooled(result, everything, batch)

    def _takes_riding(self, rows: list[Row], riding: RidingRow) -> bool:
        """True if nothing is asked of these sequences but tokens, no adapter keeps them out of the one call, and the
        riding one is not longer than sequences may be."""
        if self._special or self._scored or self._ride() is None or len(riding.blocks) > self._tables.shape[1]:
            return False
        adapted = {self._adapted[row.slot] for row in rows if row.slot in self._adapted}
        return self.adapters is None or not any(map(self.adapters.rescales, adapted))

    def _row_of(self, riding: RidingRow) -> Row:
        """Riding tokens as a row of the last slot. Their ids are not looked at: they bring their embeddings."""
        slot = len(self._tables) - 1
        self._tokens[slot] = [0] * riding.length
        self._tables[slot, : len(riding.blocks)] = riding.blocks
        return Row(slot=slot, start=riding.start, count=riding.count, sample=False, new_blocks=[])

    def _ridden(self, batch: FlatBatch, riding: RidingRow) -> Tensor:
        """[len(batch.slots), hidden], as `_hidden`; those of the riding tokens go to their ride."""
        ride, total = self._ride(), len(batch.token_ids)
        assert ride is not None
        assert isinstance(self._decoder, Decoder)
        own = torch.arange(total - riding.count, total)
        tokens = ride.tokens(riding)
        hidden = self._forward(batch, torch.cat([batch.logits_indices, own]), tokens)
        ride.take(riding, hidden[len(batch.slots) :])
        return hidden[: len(batch.slots)]

    def _sampled(
        self,
        step: int,
        hidden: Tensor,
        prompt_logprobs: dict[int, list[TokenLogprob]],
        batch: FlatBatch,
        rows: list[Row],
        masks: Masks | None,
    ) -> StepResult:
        """Result of sampling after `hidden` [len(batch.slots), hidden]."""
        if not batch.slots:
            return StepResult(step=step, slots=[], tokens=[], prompt_logprobs=prompt_logprobs)
        sampled = self._sample(hidden, batch, masks)
        tokens, candidates = sampled.tokens, sampled.candidates
        kept = accept_drafts(batch.slots, tokens, {row.slot: row.draft for row in rows if row.draft})
        kept = [index for index in kept if batch.slots[index] not in candidates]
        logprobs: dict[int, list[TokenLogprob]] = {}
        for index in kept:
            slot = batch.slots[index]
            self._tokens[slot][batch.lengths[index] :] = [tokens[index]]
            if index in sampled.logprobs:
                logprobs.setdefault(slot, []).append(sampled.logprobs[index])
        failed = {}
        for index, reason in sampled.broken.items():
            slot = batch.slots[index]
            if reason is NOT_FINITE:
                self._clear_broken(slot)
            failed[slot] = reason
        if masks is not None:
            failed |= masks.failed
        return StepResult(
            step=step,
            slots=[batch.slots[index] for index in kept],
            tokens=[tokens[index] for index in kept],
            failed=failed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            forced=self._forced(rows, failed),
            candidates=candidates,
        )

    def _forced(self, rows: Sequence[Row], failed: Mapping[int, str]) -> dict[int, list[int]]:
        """Tokens that grammars force, by slot: they join the sequences here."""
        forced = {}
        for row in rows:
            if row.forces and row.slot not in failed and self._grammars is not None and row.slot in self._grammars:
                tokens = self._tokens[row.slot]
                if found := self._grammars.forced(row.slot, tokens):
                    tokens += found
                    forced[row.slot] = found
        return forced

    def _with_pooled(self, result: StepResult, hidden: Tensor, batch: FlatBatch) -> StepResult:
        """The result with the vectors of the prompts that are complete. The last thing of a step: pooling is not to be
        done twice. `hidden` [T, hidden]: of all tokens."""
        index = torch.tensor(self._pooler.wanted(batch.pooled), dtype=torch.int64, device=hidden.device)
        pooled = self._pooler.add(batch.pooled, self._decoder.normed(hidden[index]))
        failed = dict(result.failed)
        for slot, vector in pooled.items():
            if not all(map(math.isfinite, vector)):
                self._clear_broken(slot)
                failed[slot] = NOT_FINITE
        return replace(result, failed=failed, pooled={slot: v for slot, v in pooled.items() if slot not in failed})

    def _clear_broken(self, slot: int) -> None:
        self._cache.clear_broken(self._tables[slot, : self._num_blocks[slot]].tolist())

    def _hidden(self, batch: FlatBatch, due: list[PromptToken], everything: Tensor | None) -> tuple[Tensor, Tensor]:
        """[len(batch.slots), hidden] after the last layer: of the tokens after which one is sampled. And
        [len(due), hidden]: of the tokens before those in `due`. `everything`: of all tokens, where it was computed."""
        device = batch.logits_indices.device
        if everything is not None:
            places = torch.tensor([token.index for token in due], dtype=torch.int64, device=device)
            return everything[batch.logits_indices], everything[places]
        if due:
            return self._hidden_of_both(batch, due)
        logits_indices = batch.logits_indices if len(batch.slots) < len(batch.token_ids) else None
        hidden = self._forward(batch, logits_indices)
        return hidden, hidden[:0]

    def _hidden_of_both(self, batch: FlatBatch, due: list[PromptToken]) -> tuple[Tensor, Tensor]:
        sampled = batch.logits_indices.tolist()
        places = sorted([*sampled, *(token.index for token in due)])
        found = {place: number for number, place in enumerate(places)}
        device = batch.logits_indices.device
        hidden = self._forward(batch, torch.tensor(places, device=device))
        sampling = torch.tensor([found[place] for place in sampled], dtype=torch.int64, device=device)
        return hidden[sampling], hidden[torch.tensor([found[token.index] for token in due], device=device)]

    def _forward(self, batch: FlatBatch, logits_indices: Tensor | None, riding: RidingTokens | None = None) -> Tensor:
        if self.recorded is not None and riding is None and self.recorded.refusal(batch.rows) is None:
            return self.recorded.forward(batch.rows)  # each row's only token is sampled after
        decoder = self._decoder
        attention = PagedAttention(decoder.ops, self._cache, batch.paged, decoder.spec)
        adaptation = self.adapters.adaptation(batch.adapters) if self.adapters and batch.adapters else None
        if riding is None:
            return decoder.forward(
                batch.token_ids, batch.positions, attention, adaptation, logits_indices=logits_indices
            )
        assert isinstance(decoder, Decoder)
        return decoder.forward(
            batch.token_ids, batch.positions, attention, adaptation, logits_indices=logits_indices, riding=riding
        )

    def _sample(self, hidden: Tensor, batch: FlatBatch, masks: Masks | None) -> Sampled:
        mask = None if masks is None else masks.apply
        if self._changes_logits(batch.slots):
            logits = self._logits(hidden, batch.slots)
            return self._sampler(logits, batch.slots, batch.lengths, self._tokens, mask)
        logits, vocabulary = self._decoder.local_logits(hidden), self._decoder.vocabulary
        if (found := self._sampler.argmax(logits, batch.slots, batch.lengths)) is not None:
            return found
        return self._sampler(vocabulary.join(logits), batch.slots, batch.lengths, self._tokens, mask)

    def _logits(self, hidden: Tensor, slots: Sequence[int]) -> Tensor:
        """Logits [n, vocab] float32 after hidden states [n, hidden] of these slots, from each one's own head; more
        columns where an adapter has more ids."""
        logits = self._decoder.vocabulary.join(self._decoder.local_logits(hidden))
        if self.adapters is None or not self._changes_logits(slots):
            return logits
        return self.adapters.change_logits(hidden, logits, [self._adapted.get(slot, "") for slot in slots])

    def _changes_logits(self, slots: Sequence[int]) -> bool:
        if self.adapters is None or not self._adapted:
            return False
        return self.adapters.changes_logits([self._adapted[slot] for slot in slots if slot in self._adapted])

    def _extended(self, rows: Sequence[Row]) -> dict[int, int]:
        """Slots whose adapter has more ids than the base → their number."""
        if self.adapters is None or not self._adapted:
            return {}
        known = self._decoder.spec.vocab_size
        sizes = {row.slot: self.adapters.vocab_size(self._adapted.get(row.slot, "")) for row in rows}
        return {slot: size for slot, size in sizes.items() if size > known}

    # -- log-probabilities of prompts ----------------------------------------------------------

    def _due_in_prompts(self, batch: FlatBatch) -> list[PromptToken]:
        """The tokens of prompts whose log-probabilities are asked for, and which this batch's tokens predict."""
        if not self._scored:
            return []
        due: list[PromptToken] = []
        first = 0
        for row in batch.rows:
            if (scored := self._scored.get(row.slot)) is not None:
                end = min(row.start + row.count, scored.prompt_len - 1)
                tokens = self._tokens[row.slot]
                due += [
                    PromptToken(row.slot, first + place - row.start, tokens[place + 1], scored.prompt_logprobs or 0)
                    for place in range(row.start, end)
                ]
            first += row.count
        return due

    def _score_prompts(self, hidden: Tensor, due: list[PromptToken]) -> dict[int, list[TokenLogprob]]:
        """Slot → one for each of its tokens in `due`, which the rows of `hidden` predict."""
        found: dict[int, list[TokenLogprob]] = {}
        for start in range(0, len(due), SCORED_AT_ONCE):
            part = due[start : start + SCORED_AT_ONCE]
            logits = self._logits(hidden[start : start + SCORED_AT_ONCE], [one.slot for one in part])
            scores = logits.log_softmax(-1)
            scored = token_logprobs(scores, [one.token for one in part], [one.count for one in part])
            for one, logprob in zip(part, scored, strict=True):
                found.setdefault(one.slot, []).append(logprob)
        return found

    def _append_blocks(self, slot: int, blocks: list[int]) -> None:
        start = self._num_blocks[slot]
        self._tables[slot, start : start + len(blocks)] = blocks
        self._num_blocks[slot] = start + len(blocks)
