"""A hypothesis state machine over the whole engine, with a toy executor: all that a server does to it, in any order.

Plain requests, some held to a grammar that forces tokens, forks and beam searches come, stop at strings and ids, and
are aborted; adapter versions are loaded and unloaded; prefixes are forgotten; rows and allocations fail; planning ahead
or not. Whatever happens: every request ends once, what it got is what it would have got alone, and nothing is held
afterwards.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.blocks import BlockManager, SwapSpace
from runtime.engine.beams import Beam, Search
from runtime.engine.engine import Engine
from runtime.errors import AdapterUnavailable
from runtime.messages import BeamSearch, Output, SamplingParams, StepPlan, StepResult, Submission
from runtime.metrics import CacheShape, Metrics
from runtime.scheduler import Scheduler, Speculation
from runtime.scheduler.policies import POLICIES, make_policy
from runtime.support import failpoints
from runtime.text.tokenizer import Tokenizer
from runtime.workers.executor import AllRowsFailed
from settings.schema import SchedulerSettings
from tests.scheduler.toy import ToyWorker, likeliest, solo

BLOCK, BLOCKS, SLOTS, VOCAB = 2, 8, 3, 3
LIMIT = BLOCK * BLOCKS
LETTERS = "abc"


class ToyTokenizer(Tokenizer):
    """A letter a token."""

    vocab_size, eos_ids = VOCAB, ()  # type: ignore[assignment]

    def __init__(self) -> None:
        pass

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:  # type: ignore[override]
        return "".join(LETTERS[id] for id in ids)

    def decode_one(self, id: int, *, skip_special_tokens: bool = True) -> str:
        return LETTERS[id]


class ToyExecutor:
    """Executes in whatever thread it is called from, and minds which adapters are there."""

    def __init__(self) -> None:
        self.worker = ToyWorker(BLOCK, vocab=VOCAB)
        self.loaded: set[str] = set()
        self.failing: dict[int, int] = {}
        """Number of the step → slot whose row fails in it."""

    def launch(self, plan: StepPlan) -> StepResult:
        self.worker.failing = self.failing.get(plan.step)
        for admission in plan.admitted:
            assert admission.adapter in self.loaded | {""}
        result = self.worker.execute(plan)
        for row in plan.rows:
            assert self.worker.adapter[row.slot] in self.loaded | {""}, "an adapter went while a row used it"
        if plan.rows and len(result.failed) == len(plan.rows):
            raise AllRowsFailed
        return result

    def prepare_adapter(self, key: str, directory: str) -> None:
        pass

    def load_adapter(self, key: str) -> None:
        self.loaded.add(key)

    def unload_adapter(self, key: str) -> None:
        self.loaded.remove(key)


def alone(submission: Submission) -> tuple[list[int], str]:
    """The tokens and the text of a request that nothing happens to."""
    params, prompt = submission.params, submission.prompt_ids
    length = len(prompt) + (params.max_tokens or 1)
    tokens = solo(prompt, length, adapter=submission.adapter, grammar=submission.grammar)[len(prompt) :]
    for count, token in enumerate(tokens, 1):
        text = "".join(LETTERS[token] for token in tokens[:count])
        if token in params.stop_token_ids:
            return tokens[:count], text[:-1]
        if places := [text.find(stop) for stop in params.stop if stop in text]:
            return tokens[:count], text[: min(places)]
    return tokens, "".join(LETTERS[token] for token in tokens)


def searched_alone(submission: Submission) -> list[list[int]]:
    """What a search finds that has the machine for itself."""
    params, prompt, asked = submission.params, submission.prompt_ids, submission.beams
    assert asked is not None
    stops = frozenset(params.stop_token_ids)
    keep = asked.width * max(2, 1 + len(stops))
    search = Search(asked, max_tokens=params.max_tokens or 1, stop_ids=stops, keep=keep)
    live: list[tuple[list[int], float]] = [([], 0.0)]
    while not search.over:
        beams = [Beam(tokens, logprob, likeliest(prompt + tokens, VOCAB, keep)) for tokens, logprob in live]
        followed = search.advance(beams)
        live = [([*beams[branch.parent].tokens, branch.token], branch.logprob) for branch in followed]
    return [one.tokens for one in search.best]


LABELS = st.sampled_from(["gateway-7", "gateway-7/beam-1", "gateway-7-1"])
"""What clients call their requests: the same again, and what looks like a name of the engine's own."""


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        asynchronous=st.booleans(),
        drafts=st.booleans(),
        host=st.sampled_from([0, 6]),
    )
    def start(self, policy: str, asynchronous: bool, drafts: bool, host: int) -> None:
        self.executor = ToyExecutor()
        self.host = SwapSpace(host) if host else None
        scheduler = Scheduler(
            BlockManager(BLOCKS, BLOCK),
            make_policy(policy),
            SchedulerSettings(
                max_batched_tokens=6, max_prefill_chunk=3, max_running=SLOTS, max_waiting=1000, max_preemptions=2
            ),
            speculation=Speculation(2, max_running=1, min_acceptance=0.1) if drafts else None,
            swap=self.host,
        )
        shape = CacheShape(max_model_len=LIMIT, block_size=BLOCK, num_blocks=BLOCKS)
        metrics = Metrics("toy", vllm_names=False, shape=shape)
        self.engine = Engine(
            scheduler, self.executor, ToyTokenizer(), metrics, shape, max_len=LIMIT, asynchronous=asynchronous
        )
        self.version = 0
        self.submitted: dict[int, Submission] = {}
        self.outputs: dict[int, list[Output]] = {}
        self.aborted: set[int] = set()
        self.publish()

    @property
    def key(self) -> str:
        """Of the newest version. Longer ones answer otherwise."""
        return f"toy@{self.version}:" + "x" * self.version

    def _submit(self, submission: Submission) -> None:
        self.engine.submit(submission)
        self.submitted[submission.id] = submission
        self.outputs[submission.id] = []

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LIMIT - 8),
        more=st.integers(1, 8),
        adapted=st.booleans(),
        stop=st.sampled_from([(), ("ab",), ("cc", "ba")]),
        stop_ids=st.sampled_from([(), (1,)]),
        priority=st.integers(0, 1),
        label=LABELS,
        beams=st.none() | st.integers(1, 4),
        held=st.booleans(),
        penalty=st.sampled_from([0.0, 1.0]),
    )
    def submit(
        self,
        prompt: list[int],
        more: int,
        adapted: bool,
        stop: tuple[str, ...],
        stop_ids: tuple[int, ...],
        priority: int,
        label: str,
        beams: int | None,
        held: bool,
        penalty: float,
    ) -> None:
        searches = beams is not None
        params = SamplingParams(max_tokens=more, stop=() if searches else stop, stop_token_ids=stop_ids)
        self._submit(
            Submission(
                request_id=label,
                prompt_ids=prompt,
                params=params,
                adapter=self.key if adapted else "",
                priority=priority,
                grammar="g" if held and not searches else "",
                beams=BeamSearch(width=beams, best=1 + beams // 2, length_penalty=penalty) if beams else None,
            )
        )

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), more=st.integers(1, 8), label=LABELS)
    def fork(self, data: st.DataObject, more: int, label: str) -> None:
        leader = self.submitted[data.draw(st.sampled_from(sorted(self.submitted)))]
        adapter = self.key if leader.adapter else ""
        self._submit(
            Submission(
                request_id=label,
                prompt_ids=leader.prompt_ids,
                params=SamplingParams(max_tokens=more),
                adapter=adapter,
                grammar=leader.grammar,
                fork_of=leader.id,
            )
        )

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.outputs[output.id].append(output)

    @rule(ahead=st.booleans())
    def step(self, ahead: bool) -> None:
        self._take(self.engine.step(ahead=ahead))
        if not ahead:
            assert not self.engine._flights
        self.engine._failed_steps = 0

    @rule(slot=st.integers(0, SLOTS - 1))
    def step_in_which_a_row_fails(self, slot: int) -> None:
        self.executor.failing[self.engine.scheduler._step + 1] = slot
        self.step(ahead=True)

    @rule(at=st.integers(1, 4))
    def step_with_a_failing_allocation(self, at: int) -> None:
        failpoints.configure(f"blocks.take=raise:{at}")
        try:
            self.step(ahead=True)
        finally:
            failpoints.configure("")

    @rule(
        place=st.sampled_from(
            ["planner.enter", "scheduler.book", "engine.deliver", "scheduler.plan", "scheduler.commit"]
        ),
        at=st.integers(1, 3),
    )
    def step_in_which_the_engine_itself_raises(self, place: str, at: int) -> None:
        """For one request, or for all of a plan or a result."""
        failpoints.configure(f"{place}=raise:{at}")
        try:
            self.step(ahead=True)
        finally:
            failpoints.configure("")

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.submitted)))
        self.engine.abort(name)
        self.aborted.add(name)

    @rule()
    def publish(self) -> None:
        """A version is loaded, and the one before it unloaded."""
        before = self.key if self.version else None
        self.version += 1
        self.engine.prepare_adapter(self.key, "")
        self.engine.load_adapter(self.key)
        if before is None:
            return
        self.engine.unload_adapter(before)
        late = Submission(request_id="late", prompt_ids=[0], params=SamplingParams(max_tokens=1), adapter=before)
        try:
            self.engine.submit(late)
        except AdapterUnavailable:
            return
        raise AssertionError("a version that is going was given to a new request")

    @rule()
    def reset_prefixes(self) -> None:
        self.engine.scheduler.blocks.reset_prefixes()

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):
            if not self.engine.busy:
                break
            self.step(ahead=True)
        assert not self.engine.busy, "a request never ends"
        self.nothing_is_lost()
        scheduler = self.engine.scheduler
        assert scheduler.blocks.num_free == BLOCKS
        assert self.host is None or self.host.num_free == self.host.num_blocks
        assert len(self.engine.delivery) == 0
        assert not self.engine._beams._groups
        assert not self.engine._beams._group_of
        assert self.executor.loaded == {self.key}
        for name, submission in self.submitted.items():
            self._check(submission, self.outputs[name], aborted=name in self.aborted)

    def _check(self, submission: Submission, outputs: list[Output], *, aborted: bool) -> None:
        ends = [output.finish_reason for output in outputs if output.finish_reason]
        assert len(ends) == 1 or (aborted and not ends)
        if ends and ends[0] not in ("error", "stop", "length"):
            raise AssertionError(f"nobody asked for {ends[0]}")
        if submission.beams is not None:
            if ends and ends[0] != "error":
                assert [choice.token_ids for choice in outputs[-1].choices] == searched_alone(submission)
            return
        tokens, text = alone(submission)
        got = [token for output in outputs for token in output.token_ids]
        shown = "".join(output.text for output in outputs)
        if ends and ends[0] != "error":
            assert (got, shown) == (tokens, text)
        else:
            assert got == tokens[: len(got)]
            assert text.startswith(shown)


EngineMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestEngine = EngineMachine.TestCase
