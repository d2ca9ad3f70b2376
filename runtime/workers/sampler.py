"""Sampling of tokens from logits, row by row: suppressed ids, greedy or sampled, log-probabilities, broken rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import Ops
from runtime.messages import Admission, TokenLogprob
from runtime.model.split import Vocabulary
from runtime.workers.logit_rules import LogitRules

_MASK = 2**64 - 1

NOT_FINITE = "The model's output was not a finite number."
EXCLUDED = "No token may follow: allowed_token_ids, logit_bias, bad_words and min_tokens exclude all of them."


@dataclass(frozen=True, slots=True)
class Sampled:
    """Result of sampling the rows of a step."""

    tokens: list[int]
    """One for each row; of a row with candidates or without a token it means nothing."""
    broken: dict[int, str]
    """Index of each row that has no token → the reason."""
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)
    """Index of each row whose sequence asks for them."""
    candidates: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """Slot of each row that samples nothing → its likeliest tokens with their log-probabilities."""


class Sampler:
    """Keeps each slot's sampling parameters; a token depends on its row's logits, its sequence, seed and position
    only."""

    def __init__(self, ops: Ops, vocabulary: Vocabulary) -> None:
        self._ops = ops
        self._vocabulary = vocabulary
        self._slots: dict[int, Admission] = {}
        self.rules = LogitRules(vocabulary.split.full)
        self._ruled: set[int] = set()
        """Slots with rules; the others cost nothing."""
        self._whole: set[int] = set()
        """Slots whose rows need the logits of all ranks, not only the largest."""
        self._suppressed: dict[int, tuple[Tensor, Tensor]] = {}
        """Slot → the ids in `suppressed_ids` and this rank's columns of them, once they were needed."""

    def admit(self, admission: Admission) -> None:
        slot = admission.slot
        self._slots[slot] = admission
        self._suppressed.pop(slot, None)
        if admission.has_rules:
            self.rules.admit(admission)
            self._ruled.add(slot)
        elif slot in self._ruled:
            self.rules.forget(slot)
            self._ruled.discard(slot)
        special = admission.num_logprobs is not None or admission.candidates or admission.grammar
        if special or slot in self._ruled or not admission.params.greedy:
            self._whole.add(slot)
        else:
            self._whole.discard(slot)

    def admission(self, slot: int) -> Admission:
        """The sequence in a slot."""
        return self._slots[slot]

    def argmax(self, logits: Tensor, slots: list[int], lengths: list[int]) -> Sampled | None:
        """As a call, from the logits of this rank's own tokens [R, own]: the ranks exchange two numbers a row. None
        where that is not enough, and then `logits` are as they were."""
        if not self._whole.isdisjoint(slots):
            return None
        self._suppress(logits, slots, lengths, own=True)
        largest, tokens = _to_host(*self._vocabulary.argmax(*self._ops.argmax(logits)))
        return Sampled(tokens, _broken(largest))

    def __call__(
        self,
        logits: Tensor,
        slots: list[int],
        lengths: list[int],
        sequences: Mapping[int, Sequence[int]],
        mask: Callable[[Tensor], None] | None = None,
    ) -> Sampled:
        """logits [R, vocab] float32 (changed in place); for each row its slot, and the length of its sequence before
        the token. `sequences`: the tokens of each slot. `mask` excludes tokens that its caller does not allow: it is
        given the logits once the model's own log-probabilities are taken, and changes them in place."""
        rows = [self._slots[slot] for slot in slots]
        # Before anything is changed: what is reported is the model's own.
        reported = [index for index, row in enumerate(rows) if row.num_logprobs is not None]
        scores = logits[reported].log_softmax(-1) if reported else None
        searching = [index for index, row in enumerate(rows) if row.candidates]
        if searching:  # as in transformers, a search adds up log-probabilities that rules have changed
            logits[searching] = logits[searching].log_softmax(-1)
        self._suppress(logits, slots, lengths, own=False)
        if mask is not None:
            mask(logits)
        if not self._ruled.isdisjoint(slots):
            self.rules.apply(logits, slots, lengths, sequences)
        best, chosen = self._ops.argmax(logits)
        # On a GPU, to read the largest logits already here would be one wait more; a broken row's token means nothing.
        broken = _broken(best.tolist()) if best.device.type == "cpu" else {}
        sampled = [i for i, row in enumerate(rows) if not (row.params.greedy or row.candidates or i in broken)]
        if sampled:
            index_tensor = torch.tensor(sampled, device=logits.device)
            # A copy of all rows would take as long as sampling them.
            picked = logits if len(sampled) == len(rows) else logits[index_tensor]
            chosen[index_tensor] = self._sample(picked, [rows[i] for i in sampled], [lengths[i] for i in sampled])
        if best.device.type == "cpu":
            tokens = chosen.tolist()
        else:
            largest, tokens = _to_host(best, chosen)
            broken = _broken(largest)
        tokens = self._vocabulary.agree(tokens, logits.device)
        logprobs: list[TokenLogprob] = []
        if scores is not None:
            most = [rows[index].num_logprobs or 0 for index in reported]
            logprobs = token_logprobs(scores, [tokens[index] for index in reported], most)
        candidates = {slots[index]: _candidates(logits[index], rows[index].candidates) for index in searching}
        return Sampled(tokens, broken, dict(zip(reported, logprobs, strict=True)), candidates)

    def _suppress(self, logits: Tensor, slots: list[int], lengths: list[int], *, own: bool) -> None:
        for index, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            row = self._slots[slot]
            if not row.grammar and suppresses(row, length):  # in the mask of a grammar
                columns = self._columns(row, logits.device, own=own)
                logits[index].index_fill_(0, columns[columns < logits.shape[1]], -math.inf)

    def _columns(self, row: Admission, device: torch.device, *, own: bool) -> Tensor:
        """Columns of the ids that a row must not sample. Made once for each sequence, not at every step."""
        if row.slot not in self._suppressed:
            known = self._vocabulary.known(row.suppressed_ids)
            lists = [id for id in row.suppressed_ids if id >= 0], self._vocabulary.own(known)
            everywhere, here = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in lists)
            self._suppressed[row.slot] = everywhere, here
        everywhere, here = self._suppressed[row.slot]
        return here if own else everywhere

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


def suppresses(row: Admission, length: int) -> bool:
    """True if a sequence of this length must not end with its next token."""
    return bool(row.suppressed_ids) and length - row.prompt_len < row.params.min_tokens


def _to_host(best: Tensor, tokens: Tensor) -> tuple[list[float], list[int]]:
    """Two tensors [R], the second of token ids, as lists. From a device in one copy, as each would wait for it."""
    if best.device.type == "cpu":
        return best.tolist(), tokens.tolist()
    largest, ids = torch.stack((best.double(), tokens.double())).tolist()
    return largest, list(map(int, ids))


def _broken(largest: list[float]) -> dict[int, str]:
    """Rows without a token, by their largest logits. For few numbers this takes less time than a call of torch."""
    return {
        index: EXCLUDED if value == -math.inf else NOT_FINITE
        for index, value in enumerate(largest)
        if not math.isfinite(value)
    }


def _candidates(scores: Tensor, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens of one row [vocab], likeliest first, with their scores."""
    best = scores.topk(min(count, len(scores)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def token_logprobs(scores: Tensor, tokens: Sequence[int], most: Sequence[int]) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` in the rows of `scores` [R, vocab], which are such, and of the likeliest tokens
    beside them: of each row as many as `most` says."""
    ids = torch.tensor(tokens, device=scores.device).unsqueeze(1)
    own = scores.gather(1, ids)
    ranks = (scores > own).sum(-1) + 1
    best = scores.topk(min(max(most), scores.shape[1]), dim=-1)
    rows = zip(own.flatten().tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist(), most, strict=True)
    return [
        TokenLogprob(logprob, rank, list(zip(top[:count], values[:count], strict=True)))
        for logprob, rank, top, values, count in rows
    ]


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


# -- draft verification ----------------------------------------------------------------------------
#
# Choice of the tokens sampled along a draft that are kept.
#
# The first token of a row is sampled after tokens that are certain, the next one after the draft's first guess, and
# so on. Each draws with the number that belongs to its own position, so a token stands exactly when every guess
# before it is what was sampled there: the output is the one that would have come without a draft, token by token (a
# special case of arXiv:2211.17192, in which the draft's distribution has one point).


def accept_drafts(slots: list[int], tokens: list[int], drafts: Mapping[int, list[int]]) -> list[int]:
    """Indices of the tokens that stand. `slots` and `tokens` go by position within each slot; a slot without a
    draft has one token, which stands."""
    if not drafts:
        return list(range(len(slots)))
    kept: list[int] = []
    seen: dict[int, int] = {}
    wrong: set[int] = set()
    for index, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
        if slot in wrong:
            continue
        kept.append(index)
        place = seen[slot] = seen.get(slot, -1) + 1
        draft = drafts.get(slot, [])
        if place < len(draft) and token != draft[place]:
            wrong.add(slot)
    return kept
