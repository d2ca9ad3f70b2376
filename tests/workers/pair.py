"""Two workers over one tiny model: one whose steps are recorded on a tape, and one that launches all of them by itself,
which says what is right."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import LoraSegment, LoraTable, Ops, PagedRows
from kernels.reference import ReferenceOps, _attend, _gather, _windowed
from kernels.sampling import _invert, _keep
from runtime.checkpoints import open_checkpoint
from runtime.messages import Admission, Row, SamplingParams, StepPlan, StepResult
from runtime.model.attention import KVCache
from runtime.model.decoder import Decoder
from runtime.model.families import find_model
from runtime.model.lora_base import LoraBase
from runtime.text.grammar import GrammarBuilder, GrammarCompiler, regex_part
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.executor import InProcessExecutor
from runtime.workers.recorded_steps import LaunchedStep, RecordedSteps
from runtime.workers.transfers import Transfers
from runtime.workers.worker import Worker
from tests.kernels.triton.backend import TRITON
from tests.parity.llama import load
from tests.workers.tape import TapeRecorder

BLOCK, BLOCKS_EACH, MAX_LEN, MAX_RUNNING = 8, 4, 32, 10


class CountingTransfers(Transfers):
    """Copies of the CPU, counted; `events` has them in their order."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[str] = []
        self.active = False

    def put(self, values: np.ndarray, target: Tensor) -> None:
        self.events.append("put")
        self.active = True
        super().put(values, target)
        self.active = False

    def get(self, source: Tensor) -> Callable[[], np.ndarray]:
        self.events.append("get")
        found = super().get(source)

        def wait() -> np.ndarray:
            self.events.append("wait")
            self.active = True
            values = found()
            self.active = False
            return values

        return wait


class TensorOps(ReferenceOps):
    """The reference, with nothing read by the host where each row has one token: for recording without waiting for
    Triton's interpreter. Adapters alone are Triton's."""

    name = "tensors"

    def paged_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: PagedRows,
        scale: float,
        *,
        window: int | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        tiles, count = rows.tiles, len(rows.counts)
        if tiles.singles < count:
            return super().paged_attention(q, k, v, k_cache, v_cache, rows, scale, window=window, softcap=softcap)
        place = torch.arange(rows.tables.shape[1] * rows.block_size)
        mask = _windowed((place <= tiles.extents[:, 2:3])[:, None, None, :], window)
        keys, values = (_gather(stored, rows.tables, q.dtype) for stored in (k_cache, v_cache))
        query = q.view(count, k_cache.shape[2], -1, q.shape[-1])
        return _attend(query, keys, values, mask, scale, softcap).reshape(q.shape)

    def sample(
        self,
        logits: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
    ) -> Tensor:
        logits, vocab = logits / temperature.unsqueeze(1), logits.shape[1]
        values, ids = logits.topk(vocab, dim=-1)
        weights, _ = _keep((values - logits.logsumexp(-1, keepdim=True)).exp(), vocab, top_k, top_p, min_p)
        kept = ids.gather(1, _invert(weights, uniform).unsqueeze(1)).squeeze(1)
        filtered = (top_k < vocab) | (top_p < 1.0) | (min_p > 0.0)
        return torch.where(filtered, kept, _invert(logits.softmax(-1), uniform))

    def lora_apply(self, x: Tensor, y: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
        return TRITON.lora_apply(x, y, segments)

    def lora_apply_table(self, x: Tensor, y: Tensor, table: LoraTable, adapters: Tensor) -> Tensor:
        return TRITON.lora_apply_table(x, y, table, adapters)


class Pair:
    """The two workers. `sequences`: the tokens of each slot, as the plain one has found them."""

    def __init__(self, model: Path, adapters: dict[str, Path] | None = None, ops: Ops | None = None) -> None:
        """`ops`: of both, by default `TensorOps`."""
        self.decoder, _ = load(model)
        self.decoder.ops = ops or TensorOps()
        checkpoint = open_checkpoint(str(model))
        self._base = LoraBase.of(self.decoder, find_model(checkpoint.config), "tiny")
        self._compiler = GrammarCompiler(checkpoint.tokenizer)
        builder = GrammarBuilder(self._compiler.special_id)
        self.grammar = builder.build(builder.part("body", regex_part("[a-z ]{30,60}", "regex")))
        self.copies, self.recorder = CountingTransfers(), TapeRecorder()
        self.worker, self.plain = self._worker(self.decoder), self._worker(self.decoder)
        self.worker.record_steps(self.copies, self.recorder)
        self.executor = InProcessExecutor(self.worker)
        self.sequences: dict[int, list[int]] = {}
        self._admitted: list[Admission] = []
        self._lengths: dict[int, int] = {}
        """Tokens of each slot that are there or planned."""
        self._step = 0
        self.folders = adapters or {}
        for name in self.folders:
            self.load(name)

    def _worker(self, decoder: Decoder) -> Worker:
        cache = KVCache(
            decoder.kv_shapes,
            num_blocks=MAX_RUNNING * BLOCKS_EACH,
            block_size=BLOCK,
            dtype=torch.float32,
            device=decoder.device,
            spare=True,
        )
        return Worker(
            decoder,
            cache,
            max_running=MAX_RUNNING,
            max_len=MAX_LEN,
            adapters=AdapterSlots(self._base, decoder, max_rank=64),
            grammars=lambda: self._compiler,
        )

    @property
    def recorded(self) -> RecordedSteps:
        assert self.worker.recorded is not None
        return self.worker.recorded

    def load(self, name: str) -> None:
        for worker in (self.worker, self.plain):
            assert worker.adapters is not None
            worker.adapters.prepare(name, str(self.folders[name]))
            worker.adapters.load(name)

    def unload(self, name: str) -> None:
        for worker in (self.worker, self.plain):
            assert worker.adapters is not None
            worker.adapters.unload(name)

    def admit(self, slot: int, prompt: list[int], params: SamplingParams | None = None, **fields: object) -> None:
        """Have a sequence enter a slot with the next step."""
        self._admitted.append(
            Admission(
                slot=slot,
                token_ids=prompt,
                prompt_len=len(prompt),
                block_ids=[],
                params=params or SamplingParams(temperature=0.0),
                seed=100 + slot,
                **{"suppressed_ids": [], **fields},  # type: ignore[arg-type]
            )
        )
        self.sequences[slot] = list(prompt)
        self._lengths[slot] = 0

    def plan(self, slots: list[int]) -> StepPlan:
        """The next step of these slots, whose last tokens need not be known."""
        self._step += 1
        admitted, self._admitted = self._admitted, []
        fresh = {one.slot: len(one.token_ids) for one in admitted}
        rows = []
        for slot in slots:
            start = self._lengths[slot]
            end = fresh.get(slot, start + 1)
            held, needed = -(-start // BLOCK), -(-end // BLOCK)
            blocks = [slot * BLOCKS_EACH + BLOCKS_EACH - 1 - index for index in range(held, needed)]
            rows.append(Row(slot=slot, start=start, count=end - start, sample=True, new_blocks=blocks))
            self._lengths[slot] = end
        return StepPlan(step=self._step, admitted=admitted, rows=rows)

    def step(self, slots: list[int]) -> StepResult:
        """One step by both, one after the other. Raises `AssertionError` where their tokens differ."""
        plan = self.plan(slots)
        return self.check(plan, self.executor.execute(plan))

    def check(self, plan: StepPlan, found: StepResult) -> StepResult:
        """Compare a result with the plain worker's."""
        expected = self.plain.execute(plan)
        theirs = dict(zip(expected.slots, expected.tokens, strict=True))
        mine = dict(zip(found.slots, found.tokens, strict=True))
        assert found.failed == expected.failed
        assert {slot: token for slot, token in mine.items() if slot not in found.failed} == {
            slot: token for slot, token in theirs.items() if slot not in found.failed
        }
        for slot, token in theirs.items():
            self.sequences[slot].append(token)
        return found

    def run_ahead(self, slots: list[int], steps: int) -> None:
        """Steps of which each is launched before the tokens of the one before it are read."""
        launched: list[tuple[StepPlan, StepResult | LaunchedStep]] = []
        for _ in range(steps):
            plan = self.plan(slots)
            launched.append((plan, self.executor.launch(plan)))
            if len(launched) > 1:
                self._collect(*launched.pop(0))
        self._collect(*launched.pop())

    def _collect(self, plan: StepPlan, result: StepResult | LaunchedStep) -> None:
        self.check(plan, result.finish() if isinstance(result, LaunchedStep) else result)
