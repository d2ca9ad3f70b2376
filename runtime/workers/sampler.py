"""From logits to tokens, row by row: suppressed ids, greedy or sampled, and rows that are not finite."""

import math

import torch
from torch import Tensor

from kernels import Ops
from runtime.messages import Admission
from runtime.workers.vocabulary import Vocabulary

_MASK = 2**64 - 1


class Sampler:
    """Keeps each slot's sampling parameters; a token depends on its row's logits, seed and position only."""

    def __init__(self, ops: Ops, vocabulary: Vocabulary) -> None:
        self._ops = ops
        self._vocabulary = vocabulary
        self._slots: dict[int, Admission] = {}

    def admit(self, admission: Admission) -> None:
        self._slots[admission.slot] = admission

    def likeliest(self, logits: Tensor, slots: list[int], lengths: list[int]) -> tuple[list[int], list[int]] | None:
        """As a call, from the logits of this rank's own tokens [R, own]: the ranks exchange two numbers a row. None
        where that is not enough, and then `logits` are as they were."""
        rows = [self._slots[slot] for slot in slots]
        if any(row.scored or row.candidates or not row.params.greedy for row in rows):
            return None
        self._suppress(logits, slots, lengths, own=True)
        best, tokens = self._vocabulary.likeliest(*self._ops.argmax(logits))
        return tokens.tolist(), _not_finite(best)

    def __call__(self, logits: Tensor, slots: list[int], lengths: list[int]) -> tuple[list[int], list[int]]:
        """logits [R, vocab] float32 (changed in place); for each row its slot, and the length of its
        sequence before the token. Returns the tokens, and the indices of rows whose logits are NaN."""
        rows = [self._slots[slot] for slot in slots]
        self._suppress(logits, slots, lengths, own=False)
        best, tokens = self._ops.argmax(logits)
        broken = _not_finite(best)
        sampled = [i for i, row in enumerate(rows) if not row.params.greedy and i not in broken]
        if sampled:
            index_tensor = torch.tensor(sampled, device=logits.device)
            # A copy of all rows would take as long as sampling them.
            wanted = logits if len(sampled) == len(rows) else logits[index_tensor]
            tokens[index_tensor] = self._sample(wanted, [rows[i] for i in sampled], [lengths[i] for i in sampled])
        return tokens.tolist(), broken

    def candidates(self, logits: Tensor, slots: list[int], lengths: list[int]) -> dict[int, list[tuple[int, float]]]:
        """Slot of each row that samples nothing → its likeliest tokens with their log-probabilities.
        Arguments as in a call, before it."""
        searching = [index for index, slot in enumerate(slots) if self._slots[slot].candidates]
        found = {}
        for index in searching:
            row = self._slots[slots[index]]
            scores = logits[index].log_softmax(-1)
            if row.suppressed_ids and lengths[index] - row.prompt_len < row.params.min_tokens:
                scores[row.suppressed_ids] = float("-inf")
            best = scores.topk(min(row.candidates, len(scores)))
            found[slots[index]] = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return found

    def logprobs(self, logits: Tensor, slots: list[int], tokens: list[int]) -> dict[int, float]:
        """Index of each row whose sequence is scored → log-probability of its token, before temperature.
        Arguments as in a call, after it."""
        scored = [index for index, slot in enumerate(slots) if self._slots[slot].scored]
        if not scored:
            return {}
        rows = logits[scored].log_softmax(-1)
        picked = rows.gather(1, torch.tensor([tokens[i] for i in scored], device=logits.device).unsqueeze(1))
        return dict(zip(scored, picked.flatten().tolist(), strict=True))

    def _suppress(self, logits: Tensor, slots: list[int], lengths: list[int], *, own: bool) -> None:
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            row = self._slots[slot]
            if row.suppressed_ids and length - row.prompt_len < row.params.min_tokens:
                columns = self._vocabulary.own(row.suppressed_ids) if own else row.suppressed_ids
                logits[index, columns] = float("-inf")

    def _sample(self, logits: Tensor, rows: list[Admission], lengths: list[int]) -> Tensor:
        vocab, device = logits.shape[1], logits.device
        points = [uniform(row.seed, length) for row, length in zip(rows, lengths, strict=True)]
        top_k = [int(min(row.params.top_k_limit, vocab)) for row in rows]
        return self._ops.sample(
            logits,
            torch.tensor(points, dtype=torch.float64, device=device),
            torch.tensor([row.params.temperature for row in rows], dtype=torch.float32, device=device),
            torch.tensor(top_k, dtype=torch.int64, device=device),
            torch.tensor([row.params.top_p for row in rows], dtype=torch.float32, device=device),
            torch.tensor([row.params.min_p for row in rows], dtype=torch.float32, device=device),
        )


def _not_finite(best: Tensor) -> list[int]:
    """Indices. Of so few numbers this takes less time than a call of torch does."""
    return [index for index, value in enumerate(best.tolist()) if not math.isfinite(value)]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one token of one request: two rounds of splitmix64 (Steele et al., 2014)
    over seed and position. No state, so chunking, preemption and neighbours cannot change it."""
    mixed = _splitmix(_splitmix(seed & _MASK) ^ position)
    return float(mixed >> 11) * 2.0**-53


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
