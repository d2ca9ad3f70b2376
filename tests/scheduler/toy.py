"""A model small enough to check every block: its KV of a token is (adapter, position, token).

Its next token is a function of all tokens before it, read out of the blocks; so wrong blocks, stale
prefixes, lost tokens, missing copies and drafts that were kept wrongly show as a wrong output.
"""

from collections.abc import Iterable, Sequence

from runtime.messages import SamplingParams, StepPlan, StepResult, Submission
from runtime.scheduler import Request, Scheduler


def next_token(tokens: list[int], vocab: int = 3) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1009
    return value % vocab


FORCING = 2
FORCED = (1, 0)
"""What a grammar of the toy says: a generated `FORCING` is followed by these."""


def forced_token(generated: Sequence[int]) -> int | None:
    """The only token that a grammar allows after an output."""
    for distance, token in enumerate(FORCED, 1):
        if len(generated) >= distance and generated[-distance] == FORCING:
            return token
    return None


def likeliest(tokens: list[int], vocab: int, count: int) -> list[tuple[int, float]]:
    """What a beam tells: its likeliest next tokens, and made-up log-probabilities, all of them different."""
    scores = [(token, -0.1 - (next_token([*tokens, token], 997) + token / 100) / 100) for token in range(vocab)]
    return sorted(scores, key=lambda pair: -pair[1])[:count]


def solo(prompt: list[int], length: int, *, adapter: str = "", grammar: str = "", vocab: int = 3) -> list[int]:
    """The tokens of a sequence that runs alone: what every other way of running must give too."""
    tokens = list(prompt)
    while len(tokens) < length:
        forced = forced_token(tokens[len(prompt) :]) if grammar else None
        tokens.append((next_token(tokens, vocab) + len(adapter)) % vocab if forced is None else forced)
    return tokens


class ToyWorker:
    """Executes plans like the real worker. Few tokens in `vocab`, so that prefixes meet and drafts prove right."""

    def __init__(self, block_size: int, *, vocab: int = 3, window: int | None = None) -> None:
        self.block_size = block_size
        self.vocab = vocab
        self.window = window
        self.kv: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.host: dict[tuple[int, int], tuple[str, int, int]] = {}
        """Blocks of those that were preempted, where they are swapped."""
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self.adapter: dict[int, str] = {}
        self.candidates: dict[int, int] = {}
        self.held_from: dict[int, int] = {}
        """Slots of sequences with a grammar → length of the prompt."""
        self.num_computed = self.num_forced = 0
        self.failing: int | None = None
        """Slot whose row fails, and leaves garbage."""
        self.lost: set[int] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        for move in plan.moves:
            source = self.host if move.kind == "in" else self.kv
            target = self.host if move.kind == "out" else self.kv
            for offset in range(self.block_size):
                if (move.source, offset) in source:
                    target[move.target, offset] = source[move.source, offset]
        for new in plan.admitted:
            self.tokens[new.slot] = list(new.token_ids)
            self.blocks[new.slot] = list(new.block_ids)
            self.adapter[new.slot] = new.adapter
            self.candidates[new.slot] = new.candidates
            self.held_from.pop(new.slot, None)
            if new.grammar:
                self.held_from[new.slot] = new.prompt_len
            self.lost.discard(new.slot)
        slots: list[int] = []
        tokens: list[int] = []
        failed: dict[int, str] = {}
        forced: dict[int, list[int]] = {}
        candidates: dict[int, list[tuple[int, float]]] = {}
        for row in plan.rows:
            self.blocks[row.slot] += row.new_blocks
            if row.slot in self.lost or row.slot == self.failing:
                self.lost.add(row.slot)
                failed[row.slot] = "the row failed"
                continue
            known = self.tokens[row.slot]
            if ends_with := row.draft or row.new_token_ids:
                known[row.start + row.count - len(ends_with) :] = ends_with
            for position in range(row.start, row.start + row.count):
                self.kv[self._place(row.slot, position)] = (self.adapter[row.slot], position, known[position])
            self.num_computed += row.count
            if row.sample and self.candidates[row.slot]:
                seen = self._read(row.slot, row.start + row.count)
                candidates[row.slot] = likeliest(seen, self.vocab, self.candidates[row.slot])
            elif row.sample:
                kept = self._sample(row.slot, row.start + row.count - len(row.draft), row.draft)
                slots += [row.slot] * len(kept)
                tokens += kept
            if row.forces and (found := self._force(row.slot)):
                forced[row.slot] = found
        return StepResult(
            step=plan.step, slots=slots, tokens=tokens, failed=failed, forced=forced, candidates=candidates
        )

    def _sample(self, slot: int, length: int, draft: list[int]) -> list[int]:
        kept: list[int] = []
        for guess in [*draft, None]:
            seen = self._read(slot, length + len(kept))
            token = (next_token(seen, self.vocab) + len(self.adapter[slot])) % self.vocab
            if slot in self.held_from and (only := forced_token(seen[self.held_from[slot] :])) is not None:
                token = only
            kept.append(token)
            if token != guess:
                break
        self.tokens[slot][length:] = kept
        return kept

    def _force(self, slot: int) -> list[int]:
        """Append what a grammar forces to a slot's tokens."""
        tokens, found = self.tokens[slot], []
        while slot in self.held_from and (token := forced_token(tokens[self.held_from[slot] :])) is not None:
            tokens.append(token)
            found.append(token)
        self.num_forced += len(found)
        return found

    def _read(self, slot: int, length: int) -> list[int]:
        """The tokens as the KV has them. Those outside the window are not looked at, but known."""
        first = 0 if self.window is None else max(0, length - self.window)
        seen = self.tokens[slot][:first]
        for position in range(first, length):
            adapter, place, token = self.kv[self._place(slot, position)]
            assert adapter == self.adapter[slot], "attended to another adapter's KV"
            assert place == position, "attended to another position's KV"
            seen.append(token)
        return seen

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.blocks[slot][position // self.block_size], position % self.block_size


def make_request(
    name: str,
    prompt: Iterable[int],
    more: int,
    *,
    limit: int = 10**9,
    **fields: object,
) -> Request:
    """A request for `more` tokens, at most `limit` with its prompt; `fields` are the submission's."""
    ids = list(prompt)
    submission = Submission(request_id=name, prompt_ids=ids, params=SamplingParams(), **fields)  # type: ignore[arg-type]
    return Request(submission, seed=0, max_len=min(len(ids) + more, limit))


def step(scheduler: Scheduler, worker: ToyWorker) -> StepPlan:
    """One step, as the engine does it: what has reached its length is finished."""
    plan = scheduler.schedule()
    commit(scheduler, plan, worker.execute(plan))
    return plan


def commit(scheduler: Scheduler, plan: StepPlan, result: StepResult) -> None:
    for item in scheduler.commit(plan, result):
        request = item.request
        if item.tokens and len(request.tokens) >= request.max_len:
            scheduler.finish(request, "length")


class Ahead:
    """Steps as an asynchronous engine does them: the next one is planned before the result of the last is known."""

    def __init__(self, scheduler: Scheduler, worker: ToyWorker) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.flight: tuple[StepPlan, StepResult] | None = None

    @property
    def busy(self) -> bool:
        return len(self.scheduler) > 0 or self.flight is not None

    def step(self) -> StepPlan:
        ahead = not self.scheduler.guesses
        if not ahead:
            self.settle()
        plan = self.scheduler.schedule(ahead=ahead)
        result = self.worker.execute(plan)  # steps run in order, so it may as well be computed here
        self.settle()
        if plan.empty or not ahead:
            commit(self.scheduler, plan, result)
        else:
            self.flight = plan, result
        return plan

    def settle(self) -> None:
        if self.flight is not None:
            plan, result = self.flight
            self.flight = None
            commit(self.scheduler, plan, result)


def run(scheduler: Scheduler, worker: ToyWorker, *, most: int = 10_000) -> int:
    """Steps until nothing is left; returns their number."""
    for count in range(most):
        if not len(scheduler):
            scheduler.check_integrity()
            return count
        step(scheduler, worker)
    raise AssertionError(f"not done after {most} steps")
