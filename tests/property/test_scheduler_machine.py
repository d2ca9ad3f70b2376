"""A hypothesis state machine over the real scheduler and block pool, with a toy model as the worker.

The toy's next token is a function of all tokens before it, and it keeps KV per block as the tokens
themselves; so wrong blocks, stale prefixes or lost tokens show as a wrong output.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.blocks import BlockManager
from runtime.messages import SamplingParams, StepPlan, StepResult, Submission
from runtime.scheduler import Request, Scheduler, State
from runtime.scheduler.policies import make_policy

BLOCK, BLOCKS, SLOTS = 2, 7, 3
VOCAB = 3  # few tokens, so that prefixes meet often


def next_token(tokens: list[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1009
    return value % VOCAB


def solo(prompt: list[int], adapter: str, length: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < length:
        tokens.append((next_token(tokens) + len(adapter)) % VOCAB)
    return tokens


class ToyWorker:
    """Executes plans like the real worker; its KV of a token is (adapter, token)."""

    def __init__(self) -> None:
        self.kv: dict[tuple[int, int], tuple[str, int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self.adapter: dict[int, str] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.admitted:
            self.tokens[new.slot] = list(new.token_ids)
            self.blocks[new.slot] = list(new.block_ids)
            self.adapter[new.slot] = new.adapter
        slots, sampled = [], []
        for row in plan.rows:
            blocks = self.blocks[row.slot]
            blocks += row.new_blocks
            adapter = self.adapter[row.slot]
            for position in range(row.start, row.start + row.count):
                self.kv[blocks[position // BLOCK], position % BLOCK] = (adapter, self.tokens[row.slot][position])
            seen = [self.kv[blocks[p // BLOCK], p % BLOCK] for p in range(row.start + row.count)]
            assert {owner for owner, _ in seen} == {adapter}, "attended to another adapter's KV"
            if row.sample:
                token = (next_token([token for _, token in seen]) + len(adapter)) % VOCAB
                self.tokens[row.slot].append(token)
                slots.append(row.slot)
                sampled.append(token)
        return StepResult(step=plan.step, slots=slots, tokens=sampled)


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            BlockManager(BLOCKS, BLOCK),
            make_policy("fcfs"),
            max_batched_tokens=4,
            max_prefill_chunk=3,
            max_running=SLOTS,
            max_waiting=100,
        )
        self.worker = ToyWorker()
        self.count = 0
        self.requests: list[Request] = []

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=BLOCK * BLOCKS - 1),
        more=st.integers(1, 8),
        adapter=st.sampled_from(["", "a"]),
        salt=st.sampled_from(["", "s"]),
    )
    def submit(self, prompt: list[int], more: int, adapter: str, salt: str) -> None:
        self.count += 1
        submission = Submission(
            request_id=str(self.count), prompt_ids=prompt, params=SamplingParams(), adapter=adapter, cache_salt=salt
        )
        request = Request(submission, seed=0, max_len=min(len(prompt) + more, BLOCK * BLOCKS))
        self.scheduler.submit(request)
        self.requests.append(request)

    @precondition(lambda self: len(self.scheduler))
    @rule()
    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.rows, "there are requests, but none makes progress"
        assert plan.num_tokens <= 4
        for item in self.scheduler.commit(plan, self.worker.execute(plan)):
            if len(item.request.tokens) >= item.request.max_len:
                self.scheduler.finish(item.request, "length")

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(data.draw(st.sampled_from(list(self.scheduler))), "abort")

    @rule()
    def reset_prefixes(self) -> None:
        self.scheduler.blocks.reset_prefixes()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.scheduler.check_integrity()

    def teardown(self) -> None:
        for _ in range(1000):
            if not len(self.scheduler):
                break
            self.step()
        assert not len(self.scheduler), "a request never ends"
        self.scheduler.check_integrity()
        for request in self.requests:
            assert request.state is State.FINISHED
            expected = solo(request.submission.prompt_ids, request.submission.adapter, request.max_len)
            assert request.tokens == expected[: len(request.tokens)]
            assert request.finish_reason == "abort" or len(request.tokens) == request.max_len


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
