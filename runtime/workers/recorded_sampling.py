"""Sampling inside recorded steps: rules and parameters of each row lie in tensors, and no choice is the host's.

The results are the sampler's (`runtime.workers.sampler`), whose rules and order these are: masks, biases, penalties,
then the largest logit or a draw. Masks and biases are kept by slot on the device and change when a sequence's do.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from kernels import Ops
from runtime.messages import Admission
from runtime.workers.grammar_masks import Masks
from runtime.workers.logit_rules import RuledRow, completing
from runtime.workers.sampler import EXCLUDED, NOT_FINITE, Sampler, suppresses, uniform
from runtime.workers.step_inputs import StagedStep, StepInputs
from runtime.workers.transfers import Transfers

MAX_BIASES = 1024
"""Most biases of a row: all rows have room for as many."""

STATUS = ("", EXCLUDED, NOT_FINITE)
"""Reasons why a row has no token, by the number that recorded work gives."""


def refusal_of(admission: Admission) -> str | None:
    """Reason why the choice of a sequence's tokens is not recorded; None if it is."""
    if admission.num_logprobs is not None:
        return "log-probabilities are reported"
    if admission.candidates:
        return "beams report candidates"
    if len(admission.params.logit_bias) > MAX_BIASES:
        return f"more than {MAX_BIASES} biases"
    return None


class GraphTail(StrEnum):
    """Work that is recorded behind the layers: each kind does all that those before it do."""

    HIDDEN = "hidden states"
    """Nothing: logits and sampling are computed launch by launch."""
    GREEDY = "greedy"
    SAMPLED = "sampled"
    RULED = "with rules"
    """Masks, biases and penalties too."""


class RecordedSampling:
    """Parameters and rules of the sequence in each slot, as recorded work reads them. The last slot is of padding."""

    def __init__(
        self, ops: Ops, sampler: Sampler, vocab_size: int, *, max_running: int, device: torch.device, copies: Transfers
    ) -> None:
        self._ops = ops
        self._sampler = sampler
        self._history = sampler.rules.history
        self._vocab_size = vocab_size
        self._slots = max_running + 1
        self._device = device
        self._copies = copies
        self._reals = {
            name: np.full(self._slots, neutral)
            for name, neutral in (
                ("temperature", 1.0),
                ("top_p", 1.0),
                ("min_p", 0.0),
                ("repetition", 1.0),
                ("frequency", 0.0),
                ("presence", 0.0),
            )
        }
        self._top_k = np.full(self._slots, vocab_size)
        self._sampled = np.zeros(self._slots, dtype=np.int64)
        self._refusals: dict[int, str] = {}
        """Slots whose tokens are not chosen as recorded → the reason."""
        self._ruled: set[int] = set()
        """Slots with rules."""
        self._ending: set[int] = set()
        """Slots whose sequences must not end before some length."""
        self._needing: set[int] = set()
        """Slots whose masks follow from the last token."""
        self._biased: dict[int, int] = {}
        """Slots whose biases are on the device → number of the admission that they are of."""
        self._masked: dict[int, tuple[int, bool]] = {}
        """Slots whose mask on the device excludes tokens → number of the admission, and whether ends are excluded."""
        self._admissions = np.zeros(self._slots, dtype=np.int64)
        self._bits = torch.empty(0)
        self._bias_ids = self._bias_values = torch.empty(0)

    def admit(self, admission: Admission) -> None:
        """Take in the parameters of a sequence that enters a slot, after the sampler has."""
        slot, params = admission.slot, admission.params
        self._admissions[slot] += 1
        drawn = not params.greedy
        self._sampled[slot] = drawn
        self._top_k[slot] = int(min(params.top_k_limit, self._vocab_size)) if drawn else self._vocab_size
        values = {
            "temperature": params.temperature if drawn else 1.0,
            "top_p": params.top_p if drawn else 1.0,
            "min_p": params.min_p if drawn else 0.0,
            "repetition": params.repetition_penalty,
            "frequency": params.frequency_penalty,
            "presence": params.presence_penalty,
        }
        for name, value in values.items():
            self._reals[name][slot] = value
        for slots, belongs in (
            (self._ruled, admission.has_rules or bool(admission.grammar)),
            (self._ending, bool(admission.suppressed_ids)),
            (self._needing, bool(admission.grammar or admission.bad_word_ids)),
        ):
            (slots.add if belongs else slots.discard)(slot)
        self._refusals.pop(slot, None)
        if (reason := refusal_of(admission)) is not None:
            self._refusals[slot] = reason

    @property
    def generation(self) -> int:
        """Changes where work with rules that was recorded before can no longer be replayed."""
        return self._history.generation

    def refusal(self, slots: Sequence[int]) -> str | None:
        """Reason why the choice of these slots' tokens is not recorded; None if it is."""
        if not self._refusals:
            return None
        return next((self._refusals[slot] for slot in slots if slot in self._refusals), None)

    def needs_tokens(self, slots: Sequence[int]) -> bool:
        """True if the host must know the last token of one of these sequences before its next one can be chosen."""
        return not self._needing.isdisjoint(slots)

    def choice(self, slots: Sequence[int], lengths: Sequence[int]) -> GraphTail:
        """The least that these rows need, for sequences of these lengths."""
        if not self._ruled.isdisjoint(slots):
            return GraphTail.RULED
        for slot, length in zip(slots, lengths, strict=True):
            if slot in self._ending and suppresses(self._sampler.admission(slot), length):
                return GraphTail.RULED
        return GraphTail.SAMPLED if self._sampled[list(slots)].any() else GraphTail.GREEDY

    def note(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Book tokens that work with rules has counted, one for each slot."""
        for slot, token in zip(slots, tokens, strict=True):
            if self._sampler.admission(slot).params.has_penalty:
                self._history.note(slot, token)

    # -- inputs, on the host -------------------------------------------------------------------

    def fill(
        self,
        staged: StagedStep,
        choice: GraphTail,
        slots: Sequence[int],
        lengths: Sequence[int],
        sequences: Sequence[Sequence[int]],
        masks: Masks | None,
    ) -> None:
        """Fill in what `choose` reads. For each row its slot, the length of its sequence before the token, and the
        sequence, of which the last token may not be known yet; `masks`: of the rows with a grammar."""
        if choice in (GraphTail.HIDDEN, GraphTail.GREEDY):
            return
        padded = np.full(staged.values.shape[1], self._slots - 1)
        padded[: len(slots)] = slots
        for name, values in self._reals.items():
            staged.reals(name)[:] = values[padded]
        staged.integers("top_k")[:] = self._top_k[padded]
        staged.integers("sampled")[:] = self._sampled[padded]
        points = staged.reals("uniform")
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if self._sampled[slot]:
                points[index] = uniform(self._sampler.admission(slot).seed, length)
        if choice is GraphTail.RULED:
            self._allocate()
            self._fill_history(staged, slots, lengths, sequences)
            self._put_biases(slots)
            self._put_masks(slots, lengths, sequences, masks)

    def _allocate(self) -> None:
        self._history.allocate(self._device)
        if not len(self._bits):
            words, device = -(-self._vocab_size // 32), self._device
            self._bits = torch.full((self._slots, 4 * words), 255, dtype=torch.uint8, device=device)
            self._bias_ids = torch.zeros(self._slots, MAX_BIASES, dtype=torch.int64, device=device)
            self._bias_values = torch.zeros(self._slots, MAX_BIASES, device=device)

    def _fill_history(
        self, staged: StagedStep, slots: Sequence[int], lengths: Sequence[int], sequences: Sequence[Sequence[int]]
    ) -> None:
        rows = [
            RuledRow(index, slot, sequences[index], length)
            for index, (slot, length) in enumerate(zip(slots, lengths, strict=True))
            if self._sampler.admission(slot).params.has_penalty
        ]
        self._history.update(rows, [self._sampler.admission(row.slot).prompt_len for row in rows], self._device)
        places = staged.integers("history")
        for row in rows:
            places[row.index] = self._history.place(row.slot)

    def _put_biases(self, slots: Sequence[int]) -> None:
        for slot in slots:
            bias, number = self._sampler.admission(slot).params.logit_bias, int(self._admissions[slot])
            if (not bias and slot not in self._biased) or self._biased.get(slot) == number:
                continue
            ids, values = np.zeros(MAX_BIASES, dtype=np.int64), np.zeros(MAX_BIASES, dtype=np.float32)
            ids[: len(bias)], values[: len(bias)] = list(bias), list(bias.values())
            self._copies.put(ids, self._bias_ids[slot])
            self._copies.put(values, self._bias_values[slot])
            self._biased[slot] = number

    def _put_masks(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        sequences: Sequence[Sequence[int]],
        masks: Masks | None,
    ) -> None:
        grammars = {} if masks is None or masks.bits is None else dict(zip(masks.indices, masks.bits, strict=True))
        changed: dict[int, np.ndarray] = {}
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            admission = self._sampler.admission(slot)
            number, ends = int(self._admissions[slot]), not admission.grammar and suppresses(admission, length)
            excluded = completing(admission, sequences[index], length) if admission.bad_word_ids else []
            if index in grammars or excluded:
                changed[slot] = self._mask(admission, grammars.get(index), ends, excluded)
                self._masked[slot] = (0, ends)  # of no admission: it holds for this step alone
            elif ends or admission.params.allowed_token_ids is not None:
                if self._masked.get(slot) != (number, ends):
                    changed[slot] = self._mask(admission, None, ends, [])
                    self._masked[slot] = (number, ends)
            elif slot in self._masked:
                changed[slot] = np.full(self._bits.shape[1], 255, dtype=np.uint8)
                del self._masked[slot]
        if changed:
            where = self._copies.new(np.array(list(changed), dtype=np.int64))
            self._bits.index_copy_(0, where, self._copies.new(np.stack(list(changed.values()))))

    def _mask(
        self, admission: Admission, grammar: np.ndarray | None, ends: bool, excluded: Sequence[int]
    ) -> np.ndarray:
        """Bits [bytes] of the tokens that may be sampled."""
        size = self._bits.shape[1] * 8
        allowed = np.ones(size, dtype=bool)
        if (ids := admission.params.allowed_token_ids) is not None:
            allowed[:] = False
            allowed[[id for id in ids if id < size]] = True
        banned = [*excluded, *(admission.suppressed_ids if ends else ())]
        allowed[[id for id in banned if 0 <= id < size]] = False
        bits = np.packbits(allowed, bitorder="little")
        return bits if grammar is None else bits & grammar

    # -- on the device -------------------------------------------------------------------------

    def choose(self, choice: GraphTail, logits: Tensor, inputs: StepInputs) -> Tensor:
        """Logits [R, vocab] float32 → [2, R] int64: tokens, and numbers in `STATUS`. Changes the logits."""
        if choice is GraphTail.RULED:
            logits = self._apply_rules(logits, inputs)
        best, tokens = self._ops.argmax(logits)
        if choice is not GraphTail.GREEDY:
            drawn = self._ops.sample(
                logits,
                inputs.reals("uniform"),
                inputs.floats("temperature"),
                inputs.integers("top_k"),
                inputs.floats("top_p"),
                inputs.floats("min_p"),
            )
            tokens = torch.where(inputs.integers("sampled") == 1, drawn, tokens)
        if choice is GraphTail.RULED:
            counts = self._history.counts
            place = inputs.integers("history") * counts.shape[1] + tokens
            counts.view(-1).index_add_(0, place, torch.ones_like(best))
        status = torch.where(best == -math.inf, 1, torch.where(best.isfinite(), 0, 2))
        return torch.stack((tokens, status))

    def _apply_rules(self, logits: Tensor, inputs: StepInputs) -> Tensor:
        slot, vocab = inputs.integers("slot"), logits.shape[1]
        shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
        allowed = (self._bits.index_select(0, slot).unsqueeze(-1) >> shifts) & 1
        logits = logits.masked_fill(allowed.flatten(1)[:, :vocab] == 0, -math.inf)
        logits.scatter_add_(1, self._bias_ids.index_select(0, slot), self._bias_values.index_select(0, slot))
        place, history = inputs.integers("history"), self._history
        counts = history.counts.index_select(0, place)[:, :vocab]
        in_prompt = history.in_prompt.index_select(0, place)[:, :vocab]
        repetition = inputs.floats("repetition").unsqueeze(1)
        seen = counts > 0
        factor = torch.where(logits > 0, 1 / repetition, repetition)
        logits = torch.where(seen | in_prompt, logits * factor, logits)
        logits -= inputs.floats("frequency").unsqueeze(1) * counts
        logits -= inputs.floats("presence").unsqueeze(1) * seen
        return logits
