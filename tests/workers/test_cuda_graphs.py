"""Recorded steps against the same steps launched one by one: on the CPU, where a tape stands in for graphs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.messages import SamplingParams
from runtime.workers import cuda_graphs
from runtime.workers.cuda_graphs import DecodeGraphs, GraphVariant, padded, unsuited
from runtime.workers.executor import AllRowsFailed
from runtime.workers.recorded_steps import LaunchedStep
from runtime.workers.sampler import EXCLUDED, NOT_FINITE
from tests.adapter_files import make_adapter
from tests.kernels.triton.backend import TRITON
from tests.tiny import make_tiny_llama
from tests.workers.pair import BLOCKS_EACH, MAX_RUNNING, Pair
from tests.workers.tape import HostReads, NotRecordable, TapeRecorder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of two heads: the interpreter takes milliseconds for each program of a kernel."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_llama(folder, max_position_embeddings=64, num_key_value_heads=1, **sizes)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of other ranks, and of other linears; of few, as the interpreter takes a tenth of a second for each."""
    folder, attention = tmp_path_factory.mktemp("adapters"), ["q_proj", "v_proj"]
    return {
        "small": make_adapter(model, folder / "small", seed=1, target_modules=attention),
        "partial": make_adapter(model, folder / "partial", seed=2, target_modules=["v_proj"]),
        "other": make_adapter(model, folder / "other", seed=5, r=3, target_modules=["q_proj"]),
        "large": make_adapter(model, folder / "large", seed=3, r=20, lora_alpha=20, target_modules=["v_proj"]),
        "dora": make_adapter(model, folder / "dora", seed=4, use_dora=True, target_modules=["v_proj"]),
        "whole": make_adapter(model, folder / "whole", seed=6),
    }


def prompt(slot: int) -> list[int]:
    return [(7 * slot + 3 * at) % 500 + 3 for at in range(2 + slot)]


def test_padding() -> None:
    assert [padded(rows) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 250)] == [1, 2, 4, 8, 8, 16, 16, 24, 256]


def test_rows_come_and_go(model: Path) -> None:
    """A graph serves several numbers of rows, and is recorded once; contexts cross blocks."""
    pair = Pair(model)
    for slot in range(5):
        pair.admit(slot, prompt(slot))
    pair.step([0, 1, 2, 3, 4])
    for slots in ([0, 1, 2, 3, 4], [0], [0], [1, 4], [0, 1, 2], [3, 1, 0, 2], [2]) * 2:
        pair.step(slots)
    assert pair.recorder.recordings == 4  # of one row, two, four and eight
    assert pair.recorder.replays == 14
    assert pair.recorded.refused == {"a row has several tokens, or samples none": 1}


def test_padding_writes_to_no_sequence(model: Path) -> None:
    """Three rows in a graph of four write three places of each tensor of the cache, the spare block aside."""
    pair = Pair(model)
    for slot in range(3):
        pair.admit(slot, prompt(slot))
    pair.step([0, 1, 2])
    tensors = [tensor for layer in pair.worker._cache.layers for tensor in layer]
    before = [tensor.clone() for tensor in tensors]
    pair.step([0, 1, 2])
    for old, new in zip(before, tensors, strict=True):
        changed = (old != new).flatten(2).any(-1)
        assert int(changed[: MAX_RUNNING * BLOCKS_EACH].sum()) == 3


def test_mixed_adapters(model: Path, adapters: dict[str, Path]) -> None:
    """Adapters that are loaded and evicted between replays need no new graph, as long as none has a larger rank."""
    pair = Pair(model, {name: adapters[name] for name in ("small", "partial", "other")})
    for slot, name in enumerate(("", "small", "partial", "small")):
        pair.admit(slot, prompt(slot), adapter=name)
    pair.step([0, 1, 2, 3])
    for _ in range(3):
        pair.step([0, 1, 2, 3])
    assert pair.recorded.graphs.recorded == ["greedy, adapters, 4 rows, 32 tokens"]
    pair.unload("partial")
    pair.unload("other")
    pair.load("other")
    for slot, name in ((2, "other"), (0, "small")):
        pair.admit(slot, prompt(slot), adapter=name)
        pair.step([slot])
    pair.unload("small")
    pair.load("small")
    for _ in range(3):
        pair.step([0, 1, 2, 3])
    assert pair.recorder.recordings == 1


def test_a_larger_rank_has_graphs_recorded_anew(model: Path, adapters: dict[str, Path]) -> None:
    pair = Pair(model, {name: adapters[name] for name in ("partial", "large")})
    pair.unload("large")
    pair.admit(0, prompt(0), adapter="partial")
    pair.admit(1, prompt(1))
    pair.step([0, 1])
    pair.step([0, 1])
    pair.step([1])
    assert pair.recorder.recordings == 2
    fresh = Pair(model, {"partial": adapters["partial"]})
    fresh.folders = adapters
    fresh.admit(0, prompt(0), adapter="partial")
    fresh.step([0])
    fresh.step([0])
    fresh.load("large")
    fresh.admit(1, prompt(1), adapter="large")
    fresh.step([1])
    fresh.step([0, 1])
    fresh.step([0])
    assert fresh.recorder.recordings == 3
    assert len(fresh.recorded.graphs.recorded) == 2


RULES = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=0.9),
    "filtered": SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.7, logit_bias={5: 4.0}
    ),
    "drawn with penalties": SamplingParams(temperature=0.8, frequency_penalty=1.5, logit_bias={9: 3.0, 7: -100.0}),
    "allowed": SamplingParams(temperature=0.0, allowed_token_ids=(7, 11, 400, 401, 402, 403)),
    "late end": SamplingParams(temperature=0.0, min_tokens=4),
}


def admit_rules(pair: Pair, names: list[str]) -> None:
    for slot, name in enumerate(names):
        # The likeliest tokens of the tiny model are excluded until `min_tokens`.
        suppressed = list(range(0, 512, 2)) if RULES[name].min_tokens else []
        pair.admit(slot, prompt(slot), RULES[name], suppressed_ids=suppressed)


@pytest.mark.parametrize("ahead", [False, True])
def test_sampling(model: Path, ahead: bool) -> None:
    """Seeds, filters, penalties, biases and masks side by side; with the host's steps and without."""
    pair = Pair(model)
    names = list(RULES)
    admit_rules(pair, names)
    slots = list(range(len(names)))
    pair.step(slots)
    if ahead:
        pair.run_ahead(slots, 7)
    else:
        for _ in range(7):
            pair.step(slots)
    assert pair.recorded.graphs.recorded == ["with rules, 8 rows, 32 tokens"]
    pair.admit(3, prompt(3), RULES["greedy"])  # nothing of the sequence before it is left
    pair.step([3])
    pair.step([3, 5])
    pair.step([1, 2])
    pair.step([0])
    assert pair.recorded.graphs.recorded[1:] == [
        "with rules, 2 rows, 32 tokens",
        "sampled, 2 rows, 32 tokens",
        "greedy, 1 rows, 32 tokens",
    ]


def test_steps_launched_one_by_one_in_between(model: Path) -> None:
    """Counts of tokens and block tables are right after steps that were not recorded."""
    pair = Pair(model)
    admit_rules(pair, ["penalties", "drawn with penalties"])
    pair.step([0, 1])
    for _ in range(2):
        pair.step([0, 1])
        with patch.object(type(pair.recorded), "refusal", lambda self, rows: "for the test"):
            for _ in range(9):  # more than a block
                pair.step([0, 1])
    pair.step([0, 1])
    assert pair.recorded.refused["for the test"] == 18


def test_bad_words_and_grammars(model: Path) -> None:
    """Masks that follow from the tokens so far: each is copied before its replay."""
    pair = Pair(model)
    words = [[first, second] for first in range(3, 60) for second in (70, 80)] + [[token] for token in range(300, 400)]
    pair.admit(0, prompt(0), RULES["drawn"], bad_word_ids=words)
    pair.admit(1, prompt(1), RULES["greedy"], grammar=pair.grammar)
    pair.admit(2, prompt(2), RULES["drawn"])
    pair.step([0, 1, 2])
    for _ in range(6):
        pair.step([0, 1, 2])
    assert pair.recorded.graphs.recorded == ["with rules, 4 rows, 32 tokens"]


def test_adapters_with_sampling(model: Path, adapters: dict[str, Path]) -> None:
    pair = Pair(model, {name: adapters[name] for name in ("small", "partial")})
    for slot, (name, rules) in enumerate([("small", "drawn"), ("", "penalties"), ("partial", "filtered")]):
        pair.admit(slot, prompt(slot), RULES[rules], adapter=name)
    pair.step([0, 1, 2])
    pair.run_ahead([0, 1, 2], 6)
    pair.run_ahead([0], 3)
    assert pair.recorded.graphs.recorded == [
        "with rules, adapters, 4 rows, 32 tokens",
        "sampled, adapters, 1 rows, 32 tokens",
    ]


def test_kernels(model: Path, adapters: dict[str, Path]) -> None:
    """Triton's own kernels find in tensors all that changes from step to step."""
    pair = Pair(model, {"whole": adapters["whole"]}, TRITON)
    pair.admit(0, prompt(3), RULES["drawn"], adapter="whole")
    pair.admit(1, prompt(0), RULES["penalties"])
    pair.step([0, 1])
    pair.run_ahead([0, 1], 3)
    assert pair.recorded.graphs.recorded == ["with rules, adapters, 2 rows, 32 tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_kernels_with_every_rule(model: Path, adapters: dict[str, Path], ahead: bool) -> None:
    pair = Pair(model, {name: adapters[name] for name in ("whole", "small")}, TRITON)
    for slot, name in enumerate(RULES):
        adapter = ("", "whole", "small")[slot % 3]
        pair.admit(slot, prompt(slot), RULES[name], adapter=adapter)
    slots = list(range(len(RULES)))
    pair.step(slots)
    if ahead:
        pair.run_ahead(slots, 12)
    else:
        for _ in range(12):
            pair.step(slots)


# -- batches that are not taken --------------------------------------------------------------------


def test_reasons(model: Path, adapters: dict[str, Path]) -> None:
    """What is not recorded has a name; layers alone are recorded where only the sampling is refused."""
    pair = Pair(model, {"dora": adapters["dora"]})
    pair.admit(0, prompt(0), num_logprobs=2)
    pair.admit(1, prompt(1), adapter="dora")
    pair.step([0, 1])
    pair.step([0])
    pair.step([1])
    assert pair.recorded.graphs.recorded == ["hidden states, 1 rows, 32 tokens"]
    assert pair.recorded.refused == Counter(
        {
            "a row has several tokens, or samples none": 1,
            "log-probabilities are reported": 1,
            "an adapter changes more than linears": 1,
        }
    )


def test_without_cuda_nothing_is_recorded(model: Path) -> None:
    reason = unsuited(Pair(model).decoder)
    assert reason is not None
    assert "CUDA" in reason


def test_the_number_of_graphs_is_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    pair = Pair(model)
    for slot in range(4):
        pair.admit(slot, prompt(slot))
    pair.step([0, 1, 2, 3])
    for slots in ([0], [1, 2], [0], [0, 1, 2, 3], [0]):
        pair.step(slots)
    assert pair.recorder.recordings == 3
    assert pair.recorded.graphs.recorded == ["greedy, 4 rows, 32 tokens", "greedy, 1 rows, 32 tokens"]


def test_broken_rows(model: Path) -> None:
    """Rows without a token are found by the one read, and end themselves alone."""
    pair = Pair(model)
    for slot in range(3):
        pair.admit(slot, prompt(slot))
    pair.step([0, 1, 2])
    pair.step([0, 1, 2])
    for worker in (pair.worker, pair.plain):
        block = worker._tables[1, 0]
        worker._cache.layers[0][1][block] = float("nan")
    found = pair.step([0, 1, 2])
    assert found.failed == {1: NOT_FINITE}
    for worker in (pair.worker, pair.plain):
        assert all(bool(tensor.isfinite().all()) for layer in worker._cache.layers for tensor in layer)
    found = pair.step([0, 2])
    assert found.failed == {}


def test_nothing_left_to_choose(model: Path) -> None:
    pair = Pair(model)
    pair.admit(0, prompt(0), SamplingParams(temperature=0.0, allowed_token_ids=(7,), min_tokens=30))
    pair.admit(1, prompt(1), SamplingParams(temperature=0.7, allowed_token_ids=(7,)), bad_word_ids=[[7, 7], [7, 7, 7]])
    pair.step([0, 1])
    found = pair.step([0, 1])
    assert found.failed == {1: EXCLUDED}


# -- a step that does not wait ---------------------------------------------------------------------


def host_reads(pair: Pair, work: Callable[[], None]) -> Counter[str]:
    """Reads of tensors by the host while `work` runs, other than those of `Transfers`, which counts its own."""
    found: Counter[str] = Counter()

    def note(name: str) -> None:
        if not pair.copies.active:
            found[name] += 1

    with HostReads(note):
        work()
    return found


@pytest.mark.parametrize("rules", ["greedy", "drawn", "penalties", "allowed"])
def test_a_steady_step_reads_once_and_later(model: Path, adapters: dict[str, Path], rules: str) -> None:
    """One copy to the device and one back a step, and the wait for it comes after the next step was launched."""
    pair = Pair(model, {"small": adapters["small"]})
    for slot in range(3):
        pair.admit(slot, prompt(slot), RULES[rules], adapter="small" if slot and rules == "drawn" else "")
    pair.step([0, 1, 2])
    pair.run_ahead([0, 1, 2], 2)
    pair.copies.events.clear()
    replays = pair.recorder.replays
    plans = [pair.plan([0, 1, 2]) for _ in range(4)]
    results = []

    def run() -> None:
        launched = []
        for plan in plans:
            launched.append(pair.executor.launch(plan))
            if len(launched) > 1:
                results.append(launched.pop(0).finish())  # type: ignore[union-attr]
        results.append(launched.pop().finish())  # type: ignore[union-attr]

    reads = host_reads(pair, run)
    assert reads == Counter()
    assert pair.recorder.replays - replays == 4
    assert pair.copies.events == ["put", "get", *["put", "get", "wait"] * 3, "wait"]
    for plan, result in zip(plans, results, strict=True):
        pair.check(plan, result)


def test_reads_are_counted(model: Path) -> None:
    """The test above would see a read: a step that reports log-probabilities has some."""
    pair = Pair(model)
    pair.admit(0, prompt(0), num_logprobs=1)
    pair.step([0])
    plan = pair.plan([0])
    assert host_reads(pair, lambda: pair.check(plan, pair.executor.execute(plan)) and None).total() > 1


def test_a_step_that_needs_tokens_waits_for_them(model: Path) -> None:
    pair = Pair(model)
    pair.admit(0, prompt(0), RULES["greedy"], grammar=pair.grammar)
    pair.step([0])
    pair.step([0])
    pair.copies.events.clear()
    pair.run_ahead([0], 2)
    puts = [event for event in pair.copies.events if event != "put"]
    assert puts == ["get", "wait", "get", "wait"]


# -- the tape is as strict as a graph --------------------------------------------------------------


def test_a_number_of_the_host_is_frozen() -> None:
    x, host = torch.zeros(3), [1.0]
    replay = TapeRecorder()(lambda: x + host[0])
    x += 1
    host[0] = 5.0
    assert replay().tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * float(x[0]),
        lambda x: x if bool((x > 0).any()) else -x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x.cpu() + 1,
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_what_cannot_be_recorded(work: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(3)
    with pytest.raises(NotRecordable):
        TapeRecorder()(lambda: work(x))


def test_what_is_gone_is_not_read() -> None:
    held = [torch.ones(3)]
    replay = TapeRecorder()(lambda: held[0] * 2)
    assert replay().tolist() == [2.0, 2.0, 2.0]
    held.clear()
    with pytest.raises(NotRecordable, match="is gone"):
        replay()


def test_a_forgotten_number_of_the_host_fails(model: Path) -> None:
    """Positions of the first step in place of each step's own: tokens differ, and the pair says so."""
    step = DecodeGraphs._step

    def with_frozen_position(graphs: DecodeGraphs, variant: GraphVariant, inputs: object) -> Tensor:
        numbers = inputs.integers("position").tolist()  # type: ignore[attr-defined]
        inputs.values[1] = numbers[0]  # type: ignore[attr-defined]
        return step(graphs, variant, inputs)  # type: ignore[arg-type]

    pair = Pair(model)
    pair.admit(0, prompt(5))
    pair.step([0])
    with patch.object(DecodeGraphs, "_step", with_frozen_position), pytest.raises(AllRowsFailed) as error:
        pair.step([0])
    assert isinstance(error.value.__cause__, NotRecordable)

    def with_constant(graphs: DecodeGraphs, variant: GraphVariant, inputs: object) -> Tensor:
        numbers = [len(pair.sequences[0]) - 1] * variant.size
        inputs.values[1].fill_(numbers[0])  # type: ignore[attr-defined]
        return step(graphs, variant, inputs)  # type: ignore[arg-type]

    pair = Pair(model)
    pair.admit(0, prompt(5))
    pair.step([0])
    with patch.object(DecodeGraphs, "_step", with_constant):
        found = [pair.executor.execute(pair.plan([0])).tokens for _ in range(8)]
    expected = Pair(model)
    expected.admit(0, prompt(5))
    expected.step([0])
    assert found != [expected.step([0]).tokens for _ in range(8)]


def test_without_memory_to_record_a_step_is_launched(model: Path) -> None:
    """A recorder that fails as CUDA does: tokens come all the same, and it is not tried again."""
    pair = Pair(model)
    tried = []

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tried.append(work)
        raise torch.OutOfMemoryError("out of memory")

    pair.recorded.graphs._record = record
    pair.admit(0, prompt(0))
    pair.step([0])
    pair.run_ahead([0], 3)
    assert len(tried) == 1


def test_a_step_that_fails_keeps_its_error(model: Path) -> None:
    """Whatever waits for it, the steps behind it have their own results, and its error comes once it is collected."""
    pair = Pair(model)
    for slot in range(2):
        pair.admit(slot, prompt(slot), SamplingParams(temperature=0.0))
    pair.step([0, 1])
    pair.run_ahead([0, 1], 2)
    first, second = (pair.executor.launch(pair.plan([0, 1])) for _ in range(2))
    assert isinstance(first, LaunchedStep)
    assert isinstance(second, LaunchedStep)

    def broken() -> np.ndarray:
        raise RuntimeError("the device is gone")

    first.wait = broken
    pair.worker.settle()
    assert len(second.finish().tokens) == 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is gone"):
            first.finish()
