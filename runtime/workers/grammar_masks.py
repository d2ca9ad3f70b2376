"""Sequences that are held to a grammar: which tokens each of a step's rows may sample.

The masks of a step are computed on a thread while the model runs. A state follows its sequence's tokens, whatever they
were before, so preemption, rejected drafts and rows that are computed twice need no care.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from runtime.messages import GRAMMAR_TOO_COMPLEX, ROW_FAILED, Admission, Row
from runtime.support.failpoints import failpoint
from runtime.support.logs import get_logger
from runtime.text.grammar import MAX_FORCED, GrammarCompiler, GrammarFailed, GrammarState

log = get_logger(__name__)


@dataclass
class Masks:
    """Tokens that the rows with a grammar may sample, of the rows after which a token is sampled."""

    indices: list[int] = field(default_factory=list)
    """Rows with a grammar."""
    bits: np.ndarray | None = None
    """[len(indices), ceil(vocab_size / 8)] bytes of eight tokens, the first in the lowest bit."""
    banned: Tensor | None = None
    """[len(indices), vocab_size] on a CPU: True for tokens that must not be sampled."""
    vocab_size: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    """Slots whose sequence has to end, with the reason."""

    def apply(self, logits: Tensor) -> None:
        """Set the logits [rows, vocab_size] of tokens that must not be sampled to minus infinity, in place."""
        if self.bits is None:
            return
        banned = self.banned
        if banned is None:  # an eighth of the bytes goes to the device
            bits = torch.from_numpy(self.bits).to(logits.device)
            shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
            banned = ((bits.unsqueeze(-1) >> shifts) & 1 == 0).flatten(1)[:, : self.vocab_size]
        known = logits[:, : self.vocab_size]  # a grammar is of the base's tokens, and an adapter may have more
        if self.indices == list(range(len(logits))):
            known.masked_fill_(banned, -math.inf)
            logits[:, self.vocab_size :] = -math.inf
        else:
            rows = torch.tensor(self.indices, device=logits.device)
            known[rows] = known[rows].masked_fill(banned, -math.inf)
            logits[rows, self.vocab_size :] = -math.inf


class GrammarMasks:
    """The grammar of each slot that has one."""

    def __init__(self, compiler: Callable[[], GrammarCompiler], vocab_size: int, device: torch.device) -> None:
        """`device`: that of the logits. `compiler` is called when the first sequence with a grammar comes."""
        self._compiler = compiler
        self._vocab_size = vocab_size
        self._device = device
        self._admitted: dict[int, Admission] = {}
        self._states: dict[int, GrammarState] = {}
        self._thread: ThreadPoolExecutor | None = None

    def admit(self, admission: Admission) -> None:
        self._states.pop(admission.slot, None)
        self._admitted.pop(admission.slot, None)
        if admission.grammar:
            self._admitted[admission.slot] = admission

    def begin(
        self, rows: Sequence[Row], tokens: Mapping[int, list[int]], slots: Sequence[int]
    ) -> "Future[Masks] | None":
        """Begin to compute the masks of a step; None if no row needs one. `tokens`: those of each slot and then its
        draft; `slots`: those of the rows after which a token is sampled, in batch order."""
        wanted = [row for row in rows if row.sample and row.slot in self._admitted]
        if not wanted:
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        return self._thread.submit(self._masks, wanted, tokens, slots)

    def forced(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """The tokens that have to follow on a slot's `tokens`, as the grammar allows no others."""
        admission, state = self._admitted[slot], self._states[slot]
        generated = tokens[admission.prompt_len :]
        found: list[int] = []
        try:
            state.follow(generated)
            while len(found) < MAX_FORCED and (token := state.forced()) is not None and state.accept(token):
                found.append(token)
        except GrammarFailed:
            pass  # the next mask tells of it
        return found

    def __contains__(self, slot: int) -> bool:
        return slot in self._admitted

    def _masks(self, rows: Sequence[Row], tokens: Mapping[int, list[int]], slots: Sequence[int]) -> Masks:
        places: dict[int, list[int]] = {}
        for index, slot in enumerate(slots):
            places.setdefault(slot, []).append(index)
        rows = sorted(rows, key=lambda row: places[row.slot][0])
        masks = Masks(vocab_size=self._vocab_size)
        bits = np.zeros((sum(len(places[row.slot]) for row in rows), -(-self._vocab_size // 32)), dtype=np.int32)
        for row in rows:
            first = len(masks.indices)
            masks.indices += places[row.slot]
            try:
                self._fill(row, tokens[row.slot], bits[first : len(masks.indices)])
            except Exception as error:
                if isinstance(error, GrammarFailed):
                    log.warning("grammar_failed", slot=row.slot, reason=str(error))
                    masks.failed[row.slot] = GRAMMAR_TOO_COMPLEX
                else:
                    log.exception("grammar_failed", slot=row.slot)
                    masks.failed[row.slot] = ROW_FAILED
                bits[first : len(masks.indices)] = -1
        masks.bits = bits.view(np.uint8)
        if self._device.type == "cpu":
            allowed = np.unpackbits(masks.bits, axis=1, count=self._vocab_size, bitorder="little")
            masks.banned = torch.from_numpy(allowed == 0)
        return masks

    def _fill(self, row: Row, tokens: list[int], bits: np.ndarray) -> None:
        """Set the bits [1 + draft, words] of a row. After a guess that the grammar does not allow nothing counts."""
        failpoint("worker.grammar", row.slot)
        admission = self._admitted[row.slot]
        state = self._states.get(row.slot)
        if state is None:
            state = self._states[row.slot] = self._compiler().compile(admission.grammar).start()
        length = row.start + row.count - len(row.draft)
        generated = tokens[admission.prompt_len : length]
        if generated and generated[-1] in self._compiler().eos_ids:
            bits[:] = -1  # planned before its end was known: what it samples is dropped
            return
        state.follow(generated)
        for index in range(len(row.draft) + 1):
            state.fill(bits[index])
            self._suppress(admission, length + index, bits[index])
            if index < len(row.draft) and not state.accept(row.draft[index]):
                bits[index + 1 :] = -1
                return

    def _suppress(self, admission: Admission, length: int, bits: np.ndarray) -> None:
        """Take the ends out before `min_tokens`, unless the grammar has come to its own end."""
        if length - admission.prompt_len >= admission.params.min_tokens or not admission.suppressed_ids:
            return
        kept = bits.copy()
        for id in admission.suppressed_ids:
            kept.view(np.uint32)[id // 32] &= ~np.uint32(1 << id % 32)
        if kept.any():
            bits[:] = kept
