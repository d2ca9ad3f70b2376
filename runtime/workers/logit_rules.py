"""Changes that requests make to the logits of their rows before a token is chosen: masks, biases and penalties.

All rows of a step with a rule of one kind are changed in one call. The order is vLLM's: masks, bad words, biases,
penalties. Everything is made from a sequence's tokens up to the position, so drafts, preemption and neighbours change
nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.messages import Admission


@dataclass(frozen=True, slots=True)
class RuledRow:
    """A row of logits whose sequence has rules."""

    index: int
    """Its row in the logits."""
    slot: int
    tokens: Sequence[int]
    """The sequence, at least up to `length`."""
    length: int
    """Tokens of the sequence before the one that is chosen."""


class LogitRules:
    """The rules of each slot that has any. Rows of other slots cost nothing."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, Admission] = {}
        self._banned: dict[int, Tensor] = {}
        """Slot → [vocab] bool, True for ids that are not in `allowed_token_ids`; made at its first row."""
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}
        """Slot → ids and biases; made at its first row."""
        self.history = TokenHistory(vocab_size)

    def admit(self, admission: Admission) -> None:
        """Take in the rules of a sequence that enters a slot."""
        self.forget(admission.slot)
        self._slots[admission.slot] = admission

    def forget(self, slot: int) -> None:
        """Drop the rules of the sequence that was in a slot."""
        for kept in (self._slots, self._banned, self._biases):
            kept.pop(slot, None)
        self.history.forget(slot)

    def apply(
        self, logits: Tensor, slots: Sequence[int], lengths: Sequence[int], tokens: Mapping[int, Sequence[int]]
    ) -> None:
        """Change the logits [R, vocab] in place. For each row its slot and the length of its sequence; `tokens`: the
        sequence of each slot."""
        rows = [
            RuledRow(index, slot, tokens[slot], length)
            for index, (slot, length) in enumerate(zip(slots, lengths, strict=True))
            if slot in self._slots
        ]
        for select, change in (
            (lambda one: one.params.allowed_token_ids is not None, self._mask),
            (lambda one: bool(one.bad_word_ids), self._ban_words),
            (lambda one: bool(one.params.logit_bias), self._bias),
            (lambda one: one.params.has_penalty, self._penalise),
        ):
            if chosen := self._select(rows, select):
                change(logits, chosen)

    def _select(self, rows: list[RuledRow], select: Callable[[Admission], bool]) -> list[RuledRow]:
        return [row for row in rows if select(self._slots[row.slot])]

    def _mask(self, logits: Tensor, rows: list[RuledRow]) -> None:
        for row in rows:
            if row.slot not in self._banned:
                allowed = self._slots[row.slot].params.allowed_token_ids or ()
                size = max(self._vocab_size, max(allowed, default=0) + 1)
                banned = torch.ones(size, dtype=torch.bool, device=logits.device)
                banned[torch.tensor(allowed, device=logits.device)] = False
                self._banned[row.slot] = banned
            banned, own = self._banned[row.slot], logits[row.index]
            own[: len(banned)].masked_fill_(banned[: len(own)], -math.inf)
            own[len(banned) :] = -math.inf

    def _ban_words(self, logits: Tensor, rows: list[RuledRow]) -> None:
        """Exclude each token that would complete a bad word. Only words within the output count."""
        where: list[tuple[int, int]] = []
        for row in rows:
            where += [(row.index, token) for token in completing(self._slots[row.slot], row.tokens, row.length)]
        if where:
            index, token = torch.tensor(where, device=logits.device).T
            logits[index, token] = -math.inf

    def _bias(self, logits: Tensor, rows: list[RuledRow]) -> None:
        device = logits.device
        for row in rows:
            if row.slot not in self._biases:
                bias = self._slots[row.slot].params.logit_bias
                ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
                self._biases[row.slot] = ids, torch.tensor(list(bias.values()), dtype=logits.dtype, device=device)
        found = [self._biases[row.slot] for row in rows]
        counts = torch.tensor([len(ids) for ids, _ in found], device=device)
        index = torch.tensor([row.index for row in rows], device=device).repeat_interleave(counts)
        ids, values = (torch.cat(part) for part in zip(*found, strict=True))
        logits.index_put_((index, ids), values, accumulate=True)

    def _penalise(self, logits: Tensor, rows: list[RuledRow]) -> None:
        """Positions along a draft come one after the other, each with the tokens before it."""
        while rows:
            now: dict[int, RuledRow] = {}
            later: list[RuledRow] = []
            for row in rows:
                if row.slot in now:
                    later.append(row)
                else:
                    now[row.slot] = row
            self._penalise_once(logits, list(now.values()))
            rows = later

    def _penalise_once(self, logits: Tensor, rows: list[RuledRow]) -> None:
        device = logits.device
        prompt_lens = [self._slots[row.slot].prompt_len for row in rows]
        counts, in_prompt = self.history.of(rows, prompt_lens, device, width=logits.shape[1])
        params = [self._slots[row.slot].params for row in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=logits.dtype, device=device).unsqueeze(1)

        index = torch.tensor([row.index for row in rows], device=device)
        found = logits[index]
        repetition = column([one.repetition_penalty for one in params])
        factor = torch.where(found > 0, 1 / repetition, repetition)
        seen = counts > 0
        found = torch.where(seen | in_prompt, found * factor, found)
        found -= column([one.frequency_penalty for one in params]) * counts
        found -= column([one.presence_penalty for one in params]) * seen
        logits[index] = found


def completing(admission: Admission, tokens: Sequence[int], length: int) -> list[int]:
    """Tokens that would complete a bad word after the first `length` of a sequence's tokens."""
    found = []
    for word in admission.bad_word_ids:
        start = length - (len(word) - 1)
        if start >= admission.prompt_len and list(tokens[start:length]) == word[:-1]:
            found.append(word[-1])
    return found


class TokenHistory:
    """Counts of the tokens of sequences with penalties: of the output, and which ones the prompt has."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.counts = torch.zeros(0, vocab_size)
        """[places, vocab] number of times that each output has a token. The first place is no sequence's."""
        self.in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool)
        """[places, vocab] True for tokens of the prompt."""
        self.generation = 0
        """Changes with the addresses of the two tensors."""
        self._places: dict[int, int] = {}
        """Slot → its row in the tensors."""
        self._free: list[int] = []
        self._counted: dict[int, list[int]] = {}
        """Slot → the tokens of its output that are counted."""

    def forget(self, slot: int) -> None:
        """Give back the place of a slot."""
        if (place := self._places.pop(slot, None)) is not None:
            self._free.append(place)
            del self._counted[slot]

    def of(
        self, rows: list[RuledRow], prompt_lens: list[int], device: torch.device, *, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Counts [len(rows), width] of the output's tokens before each row's position, and whether the prompt has
        them. No slot is there twice. `width`: number of ids, where adapters have more than the base."""
        self._widen(width or self._vocab_size)
        self.update(rows, prompt_lens, device)
        index = torch.tensor([self._places[row.slot] for row in rows], device=device)
        return self.counts[index, :width], self.in_prompt[index, :width]

    def update(self, rows: list[RuledRow], prompt_lens: list[int], device: torch.device) -> None:
        """Count what the sequences have before each row's position, and give those that are new a place."""
        places: list[int] = []
        tokens: list[int] = []
        changes: list[float] = []
        for row, prompt_len in zip(rows, prompt_lens, strict=True):
            if row.slot not in self._places:
                self._begin(row, prompt_len, device)
            counted, length = self._counted[row.slot], row.length - prompt_len
            before = len(tokens)
            # Tokens of a draft that was wrong were counted, and are not in the sequence any more.
            while len(counted) > length or (counted and counted[-1] != row.tokens[prompt_len + len(counted) - 1]):
                tokens.append(counted.pop())
                changes.append(-1.0)
            added = list(row.tokens[prompt_len + len(counted) : row.length])
            counted += added
            tokens += added
            changes += [1.0] * len(added)
            places += [self._places[row.slot]] * (len(tokens) - before)
        if tokens:
            where = torch.tensor(places, device=device), torch.tensor(tokens, device=device)
            self.counts.index_put_(where, torch.tensor(changes, device=device), accumulate=True)

    def place(self, slot: int) -> int:
        """Row of a slot in the tensors, after `update`."""
        return self._places[slot]

    def note(self, slot: int, token: int) -> None:
        """Book a token of a slot's output that the device itself has counted."""
        if slot in self._counted:
            self._counted[slot].append(token)

    def allocate(self, device: torch.device) -> None:
        """Have tensors on the device, though no sequence has a place yet."""
        if not len(self.counts):
            self._grow(device)

    def _widen(self, width: int) -> None:
        if (further := width - self._vocab_size) > 0:
            self.counts = torch.nn.functional.pad(self.counts, (0, further))
            self.in_prompt = torch.nn.functional.pad(self.in_prompt, (0, further))
            self._vocab_size = width
            self.generation += 1

    def _grow(self, device: torch.device) -> None:
        held = len(self.counts)
        grown = max(4, 2 * held)
        counts = torch.zeros(grown, self._vocab_size, device=device)
        in_prompt = torch.zeros(grown, self._vocab_size, dtype=torch.bool, device=device)
        counts[:held], in_prompt[:held] = self.counts, self.in_prompt
        self.counts, self.in_prompt = counts, in_prompt
        self._free += range(max(1, held), grown)
        self.generation += 1

    def _begin(self, row: RuledRow, prompt_len: int, device: torch.device) -> None:
        if not self._free:
            self._grow(device)
        place = self._places[row.slot] = self._free.pop()
        self.counts[place] = 0
        self.in_prompt[place] = False
        self.in_prompt[place, torch.tensor(row.tokens[:prompt_len], device=device)] = True
        self._counted[row.slot] = []
