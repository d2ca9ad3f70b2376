"""Adapters in the engine: mixed batches, versions in memory, and what a request for one that is not gets."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import LLM, SamplingParams
from runtime.errors import AdapterUnavailable
from runtime.messages import Submission
from tests.adapter_files import make_adapter, peft_greedy

PROMPT = [5, 77, 131, 9, 42, 200, 17]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one@1:a": make_adapter(tiny_model, folder / "one", seed=1),
        "two@1:b": make_adapter(
            tiny_model, folder / "two", seed=2, r=9, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
        "dora@1:c": make_adapter(tiny_model, folder / "dora", seed=3, use_dora=True),
        "dora@2:d": make_adapter(
            tiny_model, folder / "dora2", seed=4, use_dora=True, target_modules=["k_proj", "o_proj", "up_proj"]
        ),
    }


@pytest.fixture(scope="module", params=["off", "on"])
def llm(tiny_model: Path, adapters: dict[str, Path], request: pytest.FixtureRequest) -> LLM:
    return loaded(LLM(str(tiny_model), max_batched_tokens=40, max_running=16, asynchronous=request.param), adapters)


def loaded(llm: LLM, adapters: dict[str, Path]) -> LLM:
    for key, path in adapters.items():
        llm.engine.prepare_adapter(key, str(path))
        llm.engine.load_adapter(key)
    return llm


@pytest.fixture(autouse=True)
def clean(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.busy
    llm.engine.scheduler.check_integrity()
    assert not llm.engine._adapter_uses


def run(llm: LLM, *submissions: Submission) -> dict[str, list[int]]:
    """What each request generates, all of them at once."""
    for submission in submissions:
        llm.engine.submit(submission)
    tokens: dict[str, list[int]] = {submission.request_id: [] for submission in submissions}
    while llm.engine.busy:
        for output in llm.engine.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
    return tokens


def ask(name: str, adapter: str, prompt: list[int] = PROMPT) -> Submission:
    return Submission(request_id=name, prompt_ids=prompt, params=GREEDY, adapter=adapter)


def test_each_row_of_a_mixed_batch_answers_as_it_does_alone(
    llm: LLM, tiny_model: Path, adapters: dict[str, Path]
) -> None:
    """Adapters with and without magnitudes and the base, prompts of many lengths, in chunks: decode and prefill rows in
    one step."""
    keys = ("", *adapters)
    prompts = [[(7 * i + j) % 500 + 3 for j in range(n)] for i, n in enumerate((1, 3, 30, 50, 8, 2))]
    asked = [ask(f"{key or 'base'}/{index}", key, prompt) for index, prompt in enumerate(prompts) for key in keys]
    together = run(llm, *asked)
    llm.engine.scheduler.blocks.reset_prefixes()
    alone = {s.request_id: run(llm, s)[s.request_id] for s in asked}
    assert together == alone
    for submission in asked[-len(keys) :]:
        if submission.adapter:
            oracle = peft_greedy(tiny_model, adapters[submission.adapter], submission.prompt_ids, 12)
            assert together[submission.request_id] == oracle
    assert len({tuple(together[s.request_id]) for s in asked[-len(keys) :]}) == len(keys)


def test_preemption_keeps_a_rows_adapter(llm: LLM, tiny_model: Path, adapters: dict[str, Path]) -> None:
    asked = [ask(f"{i}", key, [i + 3] * 14) for i in range(4) for key in ("", "one@1:a", "two@1:b")][:9]
    asked = [
        Submission(request_id=str(n), prompt_ids=s.prompt_ids, params=GREEDY, adapter=s.adapter)
        for n, s in enumerate(asked)
    ]
    small = loaded(LLM(str(tiny_model), num_blocks=5, max_running=4), adapters)
    assert run(small, *asked) == run(llm, *asked)
    assert small.engine.scheduler.num_preemptions > 0


def test_cached_prefixes_are_per_version(llm: LLM) -> None:
    prompt = [7, 8, 9, 10] * 16
    llm.engine.scheduler.blocks.reset_prefixes()
    cached = {}
    for round_ in (1, 2):
        for key in ("", "one@1:a", "two@1:b"):
            llm.engine.submit(ask(f"{key}{round_}", key, prompt))
            while llm.engine.busy:
                for output in llm.engine.step():
                    cached[key, round_] = output.cached_tokens
    assert {cached[key, 1] for key in ("", "one@1:a", "two@1:b")} == {0}
    assert {cached[key, 2] for key in ("", "one@1:a", "two@1:b")} == {63}


def test_a_version_that_is_not_loaded_is_refused_before_it_waits(llm: LLM) -> None:
    with pytest.raises(AdapterUnavailable):
        llm.engine.submit(ask("r", "three@1:e"))
    assert not llm.engine.busy


def test_unloading_waits_for_the_last_request(tiny_model: Path, adapters: dict[str, Path]) -> None:
    llm = loaded(LLM(str(tiny_model), max_running=1), adapters)
    slots = llm.engine._executor._slots  # type: ignore[attr-defined]
    expected = run(llm, ask("x", "one@1:a"))["x"]
    llm.engine.submit(ask("running", "one@1:a"))
    llm.engine.submit(ask("waiting", "one@1:a"))
    got: dict[str, list[int]] = {"running": [], "waiting": []}
    llm.engine.step()
    llm.engine.unload_adapter("one@1:a")
    assert "one@1:a" in slots.keys
    with pytest.raises(AdapterUnavailable):
        llm.engine.submit(ask("late", "one@1:a"))
    while llm.engine.busy:
        assert "one@1:a" in slots.keys
        for output in llm.engine.step():
            got[output.request_id] += output.token_ids
    assert got["waiting"] == expected
    assert slots.keys == [key for key in adapters if key != "one@1:a"]
    assert 'adapter="one"' not in llm.engine.metrics.render()[0].decode()
    loaded(llm, {"one@1:a": adapters["one@1:a"]})
    assert run(llm, ask("again", "one@1:a"))["again"] == expected


def test_aborted_requests_let_go_too(tiny_model: Path, adapters: dict[str, Path]) -> None:
    llm = loaded(LLM(str(tiny_model)), adapters)
    asked = ask("a", "one@1:a")
    llm.engine.submit(asked)
    llm.engine.step()
    llm.engine.unload_adapter("one@1:a")
    llm.engine.abort(asked.id)
    assert "one@1:a" not in llm.engine._executor._slots.keys  # type: ignore[attr-defined]


def test_an_idle_version_is_visible_at_zero(llm: LLM) -> None:
    text = llm.engine.metrics.render()[0].decode()
    assert 'eft:adapter_time_to_first_token_seconds_count{adapter="one",' in text
    fresh = loaded(LLM(llm.settings.model.model), {})
    fresh.engine.metrics.on_adapter_loaded("idle@3:abc")
    text = fresh.engine.metrics.render()[0].decode()
    assert any(
        line.startswith("eft:adapter_requests_total{")
        and 'adapter="idle"' in line
        and 'version="3"' in line
        and line.endswith(" 0.0")
        for line in text.splitlines()
    )


def test_a_batch_for_the_base_alone_is_not_adapted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("called for the base")

    monkeypatch.setattr("runtime.workers.adapter_slots.BatchAdaptation.__init__", never)
    assert len(run(llm, ask("base", ""))["base"]) == 12
